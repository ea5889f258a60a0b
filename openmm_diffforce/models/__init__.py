"""Models of the action S(x, t, lam)."""

from .action import ActionModel, AutogradAction, ScoreModel, model_fields, operator_gradient
from .examine import examine_model
from .graph import MolecularGraph, internal_coordinates, operator_pairs
from .physics import PhysicalModel

__all__ = [
    "ActionModel",
    "AutogradAction",
    "MolecularGraph",
    "PhysicalModel",
    "ScoreModel",
    "examine_model",
    "internal_coordinates",
    "model_fields",
    "operator_gradient",
    "operator_pairs",
]
