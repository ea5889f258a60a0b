"""Docking: rigid-body diffusion on R^3 x SO(3), its likelihoods, and learned docking energies.

The public names are imported on first use, as those of the package are.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "DFMDOCK_SCHEDULE": "adapter",
    "ExternalDockingModel": "adapter",
    "PoseEnergyResult": "rigid_energy",
    "PoseMixture": "mixture",
    "PosePrior": "rigid",
    "Poses": "rigid",
    "RigidSchedule": "rigid",
    "noise_poses": "rigid",
    "pose_flow_energy": "rigid_energy",
    "pose_path_energy": "rigid_energy",
    "sample_poses": "rigid",
    "scores_from_gradient": "rigid",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
