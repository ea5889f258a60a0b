"""Models of the action S(x, t, lam)."""

from .action import ActionModel, operator_gradient
from .graph import MolecularGraph, internal_coordinates, operator_pairs
from .physics import PhysicalModel

__all__ = [
    "ActionModel",
    "MolecularGraph",
    "PhysicalModel",
    "internal_coordinates",
    "operator_gradient",
    "operator_pairs",
]
