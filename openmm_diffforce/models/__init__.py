"""Models of the action S(x, t, lam)."""

from .action import ActionModel, AutogradAction, ScoreModel, model_fields, operator_gradient
from .envelope import EnvelopeAction
from .examine import examine_model
from .graph import MolecularGraph, internal_coordinates, operator_pairs
from .network import NetworkAction
from .physics import PhysicalModel
from .stiff import StiffDenoiser

__all__ = [
    "ActionModel",
    "AutogradAction",
    "EnvelopeAction",
    "MolecularGraph",
    "NetworkAction",
    "PhysicalModel",
    "ScoreModel",
    "StiffDenoiser",
    "examine_model",
    "internal_coordinates",
    "model_fields",
    "operator_gradient",
    "operator_pairs",
]
