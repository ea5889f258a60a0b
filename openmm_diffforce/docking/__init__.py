"""Docking: rigid-body diffusion on R^3 x SO(3), its likelihoods, and learned docking energies.

The public names are imported on first use, as those of the package are.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Complex": "complex",
    "DFMDOCK_SCHEDULE": "adapter",
    "Decoys": "decoys",
    "DockingFit": "learning",
    "ExternalDockingModel": "adapter",
    "Partner": "complex",
    "PhysicsScore": "physics_score",
    "PoseEnergyResult": "rigid_energy",
    "PoseMixture": "mixture",
    "PosePrior": "rigid",
    "Poses": "poses",
    "Residual": "residual",
    "ResidueModel": "residue_model",
    "RigidSchedule": "rigid",
    "cross_validate": "learning",
    "energy_head": "scoring",
    "fit_docking_model": "learning",
    "load_docking_model": "model_file",
    "make_decoys": "decoys",
    "noise_poses": "rigid",
    "pose_flow_energy": "rigid_energy",
    "pose_metrics": "metrics",
    "pose_path_energy": "rigid_energy",
    "read_complex": "complex",
    "read_partners": "complex",
    "read_poses": "dock_run",
    "run_docking": "dock_run",
    "sample_poses": "rigid_sampler",
    "save_docking_model": "model_file",
    "score_decoys": "scoring",
    "score_poses": "scoring",
    "scores_from_gradient": "rigid",
    "summarise": "scoring",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
