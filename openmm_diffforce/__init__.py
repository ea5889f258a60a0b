"""A diffusion model of a molecule, used as a force in OpenMM.

The public names are imported on first use, so that ``import openmm_diffforce`` is instant and
loads neither torch nor OpenMM.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .alanine import alanine_case as alanine_case
    from .alchemy import EndStatePair as EndStatePair
    from .alchemy import lambda_states as lambda_states
    from .artefact import export_artefact as export_artefact
    from .artefact import load_artefact as load_artefact
    from .bridge import noisy_operator_bridge as noisy_operator_bridge
    from .density import fit_operator_density as fit_operator_density
    from .energy import EnergyResult as EnergyResult
    from .energy import learned_energy as learned_energy
    from .energy import sample_with_energy as sample_with_energy
    from .errors import DiffForceError as DiffForceError
    from .exchange import run_expanded_ensemble as run_expanded_ensemble
    from .exchange import run_replica_exchange as run_replica_exchange
    from .force import DiffusionForce as DiffusionForce
    from .force import force_from_manifest as force_from_manifest
    from .force import mix as mix
    from .labels import fit_labels as fit_labels
    from .langevin import DiffusionLangevinIntegrator as DiffusionLangevinIntegrator
    from .langevin import independent_then_dynamics as independent_then_dynamics
    from .models.action import ActionModel as ActionModel
    from .models.action import AutogradAction as AutogradAction
    from .models.action import ScoreModel as ScoreModel
    from .models.action import model_fields as model_fields
    from .models.envelope import EnvelopeAction as EnvelopeAction
    from .models.examine import examine_model as examine_model
    from .models.graph import MolecularGraph as MolecularGraph
    from .models.network import NetworkAction as NetworkAction
    from .models.physics import PhysicalModel as PhysicalModel
    from .network_training import NetworkSettings as NetworkSettings
    from .network_training import fit_network as fit_network
    from .pair_features import PairOperator as PairOperator
    from .pair_features import pair_splines as pair_splines
    from .path_kl import path_divergence as path_divergence
    from .posterior_bridge import run_posterior_bridge as run_posterior_bridge
    from .reporters import DomainReporter as DomainReporter
    from .sampler import harmonic_adapter_step as harmonic_adapter_step
    from .sampler import noise_frames as noise_frames
    from .sampler import predictor_corrector as predictor_corrector
    from .sampler import prior_frames as prior_frames
    from .sampler import probability_flow as probability_flow
    from .sampler import reverse_sde as reverse_sde
    from .sampler import reweight_samples as reweight_samples
    from .schedule import VESchedule as VESchedule
    from .schedule import VPSchedule as VPSchedule
    from .scores import GaussianPrior as GaussianPrior
    from .scores import matched_prior as matched_prior
    from .scores import noise_grid as noise_grid
    from .scores import score_of as score_of
    from .step_size import advise_integrator as advise_integrator
    from .step_size import advise_step as advise_step
    from .systems import graph_from_topology as graph_from_topology
    from .training import fit_physical_model as fit_physical_model
    from .windows import run_windows as run_windows

_HOME = {
    "ActionModel": "models.action",
    "AutogradAction": "models.action",
    "DiffForceError": "errors",
    "DiffusionForce": "force",
    "DiffusionLangevinIntegrator": "langevin",
    "DomainReporter": "reporters",
    "EndStatePair": "alchemy",
    "EnergyResult": "energy",
    "EnvelopeAction": "models.envelope",
    "GaussianPrior": "scores",
    "MolecularGraph": "models.graph",
    "NetworkAction": "models.network",
    "NetworkSettings": "network_training",
    "PairOperator": "pair_features",
    "PhysicalModel": "models.physics",
    "ScoreModel": "models.action",
    "VESchedule": "schedule",
    "VPSchedule": "schedule",
    "advise_integrator": "step_size",
    "advise_step": "step_size",
    "alanine_case": "alanine",
    "examine_model": "models.examine",
    "export_artefact": "artefact",
    "fit_labels": "labels",
    "fit_network": "network_training",
    "fit_operator_density": "density",
    "fit_physical_model": "training",
    "force_from_manifest": "force",
    "graph_from_topology": "systems",
    "harmonic_adapter_step": "sampler",
    "independent_then_dynamics": "langevin",
    "lambda_states": "alchemy",
    "learned_energy": "energy",
    "load_artefact": "artefact",
    "matched_prior": "scores",
    "mix": "force",
    "model_fields": "models.action",
    "noise_frames": "sampler",
    "noise_grid": "scores",
    "noisy_operator_bridge": "bridge",
    "pair_splines": "pair_features",
    "path_divergence": "path_kl",
    "predictor_corrector": "sampler",
    "prior_frames": "sampler",
    "probability_flow": "sampler",
    "reverse_sde": "sampler",
    "reweight_samples": "sampler",
    "run_expanded_ensemble": "exchange",
    "run_posterior_bridge": "posterior_bridge",
    "run_replica_exchange": "exchange",
    "run_windows": "windows",
    "sample_with_energy": "energy",
    "score_of": "scores",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
