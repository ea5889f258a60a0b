"""Models of the action S(x, t, lam)."""

from .action import ActionModel, operator_gradient
from .envelope import EnvelopeAction
from .graph import MolecularGraph, internal_coordinates, operator_pairs
from .network import NetworkAction
from .physics import PhysicalModel
from .stiff import StiffDenoiser

__all__ = [
    "ActionModel",
    "EnvelopeAction",
    "MolecularGraph",
    "NetworkAction",
    "PhysicalModel",
    "StiffDenoiser",
    "internal_coordinates",
    "operator_gradient",
    "operator_pairs",
]
