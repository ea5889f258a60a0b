"""One's own molecule, stage by stage: sample both end states, fit, simulate, lambda windows.

Each stage is a folder under the project's ``out_dir`` and can be stopped and called again; the
next stage reads what it left.
"""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch

from . import __version__
from .alchemy import EndStatePair, lambda_states
from .analysis import load_trajectory
from .artefact import Artefact, export_artefact, load_artefact
from .config import ProjectSettings, SamplerSettings, StatesSettings, SystemParts, read_system
from .constants import LAMBDA, U_NK_FILE
from .errors import InputError, ModelError, PoorOverlapError
from .estimate import MIN_OVERLAP, EndCorrection, FreeEnergyEstimate, end_correction
from .exchange import run_expanded_ensemble, run_replica_exchange
from .force import DiffusionForce, mix
from .langevin import DiffusionLangevinIntegrator
from .models.action import model_fields
from .models.physics import PhysicalModel
from .record import settings_hash, write_json
from .schedule import VESchedule
from .step_size import advise_integrator
from .systems import (
    FloatArray,
    clone_system,
    forces,
    graph_from_topology,
    potential_energies,
    require_unconstrained,
)
from .training import default_knots, fit_base_action, fit_physical_model
from .units import thermal_energy
from .windows import WindowRun, run_windows

ENDS_DIR, SIMULATION_DIR, WINDOWS_DIR = "ends", "simulation", "windows"
"""Folders of the stages."""

MODEL_FILE, QUALITY_FILE = "model.diffforce", "quality.json"
"""The fitted model, and how it does on held-out frames."""

MOST_ATOMS = 300
"""The physical model has a feature for every pair: beyond this size a fit takes hours."""


def r_squared(prediction: Any, truth: Any) -> float:
    """1 - |prediction - truth|^2 / |truth - mean|^2, the mean taken over all values.

    Examples
    --------
    >>> r_squared([1.0, 2.0], [1.0, 2.0])
    1.0
    """
    prediction, truth = np.asarray(prediction, float), np.asarray(truth, float)
    return float(1 - ((prediction - truth) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())


def fit_quality(
    model: torch.nn.Module, system_0: openmm.System, pair: EndStatePair | None,
    x_test: tuple[FloatArray, ...], *, temperature: float = 300.0,
) -> dict[str, float]:  # fmt: skip
    """Held-out R^2 of force, base action, operator and its gradient at t = 0.

    Parameters
    ----------
    model : ActionModel
    system_0 : openmm.System
        End state 0, the reference.
    pair : EndStatePair or None
        The reference of the operator; without it only the base action is judged.
    x_test : tuple of float arrays [n_frames, n_atoms, 3]
        Frames of each end [nm] that the fit has not seen.
    temperature : float
        [K].
    """
    kt, n = thermal_energy(temperature), len(x_test[0])
    x = np.concatenate(x_test)
    action, gradient, _ = model_fields(model, x)
    u = potential_energies(system_0, x[:n]) / kt
    found = {
        "sigma_nm": 0.0,
        "force_r2": r_squared(-kt * gradient[:n], forces(system_0, x[:n])),
        "action_r2": r_squared(action[:n] - action[:n].mean(), u - u.mean()),
    }
    if pair is not None:
        _, gradient_1, operator = model_fields(model, x, lam=1.0)
        found["operator_r2"] = r_squared(operator, pair.operator_values(x))
        found["operator_gradient_r2"] = r_squared(gradient_1 - gradient, pair.operator_gradients(x))
    return found


def fit_seconds(training: dict[str, Any]) -> float:
    """CPU seconds of the fits in a training record, of base action and (if there is one) operator.

    Examples
    --------
    >>> fit_seconds({"base": {"cpu_seconds": 20.0}, "operator": {"cpu_seconds": 1.5}})
    21.5
    """
    return float(sum(training[part]["cpu_seconds"] for part in ("base", "operator") if part in training))


def _parts(project: ProjectSettings) -> SystemParts:
    return read_system(project.system, project.topology, project.temperature, project.restrain_phi)


def _with_idle_lambda(system: openmm.System) -> openmm.System:
    """The System with a context parameter ``lambda`` that nothing depends on."""
    out = clone_system(system)
    idle = openmm.CustomBondForce(f"0*{LAMBDA}*r")
    idle.addGlobalParameter(LAMBDA, 0.0)
    idle.addEnergyParameterDerivative(LAMBDA)
    out.addForce(idle)
    return out


def run_sampler(settings: SamplerSettings, **arguments: Any) -> WindowRun:
    """Sample lambda states with the sampler that the settings name.

    Parameters
    ----------
    settings : SamplerSettings
        Sampler, frames and interval; its ``states`` and ``n_equil`` are taken from the arguments.
    **arguments
        What ``run_windows``, ``run_replica_exchange`` and ``run_expanded_ensemble`` take alike,
        ``states`` among them by name.

    Returns
    -------
    WindowRun
        An ``ExchangeRun`` unless windows are independent. An expanded ensemble has ``n_frames``
        frames times the number of states in all.

    Raises
    ------
    DiffForceError
        From the sampler.
    """
    n_frames, interval = settings.n_frames, settings.interval
    if settings.sampler == "independent":
        return run_windows(n_frames=n_frames, interval=interval, n_workers=settings.n_workers, **arguments)
    if settings.sampler == "exchange":
        return run_replica_exchange(n_iterations=n_frames, steps_per_iteration=interval, **arguments)
    return run_expanded_ensemble(
        n_iterations=n_frames * len(arguments["states"]), steps_per_iteration=interval,
        n_adapt=settings.n_adapt, **arguments,
    )  # fmt: skip


def _arguments(project: ProjectSettings, folder: str, system: openmm.System, parts: SystemParts,
               states: list[dict[str, float]], stage: Any, progress: Any,
               learned: DiffusionForce | None = None) -> dict[str, Any]:  # fmt: skip
    """What all samplers take alike."""
    return {
        "system": system, "topology": parts.topology, "positions": parts.positions, "states": states,
        "temperature": project.temperature, "out_dir": project.out_dir / folder,
        "n_equil": stage.n_equil, "timestep": project.timestep, "friction": project.friction,
        "platform": project.platform, "seed": project.seed, "trajectory": project.trajectory,
        "learned": learned, "progress": progress,
    }  # fmt: skip


def sample_project(project: ProjectSettings, *, progress: Any = True) -> WindowRun:
    """Frames of the end states (or of the only state) under the force field.

    Returns
    -------
    WindowRun
        One trajectory per end in ``<out_dir>/ends``; the last ``n_test`` frames are for judging.

    Raises
    ------
    DiffForceError
        If the System cannot carry a base action, or from ``run_windows``.
    """
    parts = _parts(project)
    require_unconstrained(parts.system)
    if parts.pair is None:
        system, states = _with_idle_lambda(parts.system), [{LAMBDA: 0.0}]
    else:
        system, states = parts.pair.linear_system(), lambda_states(2)
    n_frames = project.sample.n_frames + project.sample.n_test
    return run_windows(
        **_arguments(project, ENDS_DIR, system, parts, states, project.sample, progress),
        n_frames=n_frames, interval=project.sample.interval,
    )  # fmt: skip


def _sampled_ends(project: ProjectSettings, parts: SystemParts) -> list[FloatArray]:
    """Frames [nm] of each end that :func:`sample_project` left, with these settings and no others."""
    folder = project.out_dir / ENDS_DIR
    for end in range(1 if parts.pair is None else 2):
        path = folder / f"window_{end:03d}.{project.trajectory}"
        if not path.exists():
            raise InputError(f"{path}: expected the frames of end state {end}, found none; run sample first.")
    # A finished run is only held against its settings: other Systems, another temperature are refused.
    run = sample_project(project, progress=False)
    return [load_trajectory(p, run.topology).xyz.astype(np.float64) for p in run.trajectories]


def fit_model(
    frames: Sequence[FloatArray], pair: EndStatePair | None, topology: Any, path: Path, *,
    sites: Sequence[int] | None, sigma_max: float, n_draws: int, seed: int, temperature: float,
) -> Artefact:  # fmt: skip
    """Fit a physical model and export it; or load what the same frames and settings gave before.

    Windows belong to one model file, and a fit repeated to the last digit is another file (it holds
    its CPU time): hence the second half.

    Parameters
    ----------
    frames : sequence of float arrays [n_frames, n_atoms, 3]
        Of end state 0, and of 1 where there is a pair [nm].
    pair : EndStatePair or None
        Without it a base action alone is fitted.
    topology : openmm.app.Topology
    path : pathlib.Path
        Of the model file.
    sites : sequence of int or None
        Perturbed atoms; the pair's own where None.
    sigma_max : float
        Noise at t = 1 [nm].
    n_draws, seed : int
    temperature : float
        [K].

    Raises
    ------
    DiffForceError
        From the fit or the export.
    """
    graph, schedule = graph_from_topology(topology), VESchedule(sigma_max)
    operators = [] if pair is None else [pair.operator_values(x) for x in frames]
    if pair is not None and sites is None:
        sites = pair.perturbed_atoms
    digests = [hashlib.sha256(np.ascontiguousarray(v).tobytes()).hexdigest() for v in (*frames, *operators)]
    inputs = settings_hash({
        "version": __version__, "data": digests, "bonds": graph.bonds_hash(), "sites": sites,
        "sigma_max": sigma_max, "n_draws": n_draws, "seed": seed, "temperature": temperature,
    })  # fmt: skip
    if path.exists():
        with contextlib.suppress(ModelError):  # a damaged file is written anew
            kept = load_artefact(path)
            if kept.metadata["training"].get("inputs_sha256") == inputs:
                return kept
    if pair is None or sites is None:
        base = fit_base_action(
            frames[0], graph, sigma_knots=default_knots(schedule), n_draws=n_draws,
            generator=np.random.default_rng(seed),
        )  # fmt: skip
        model = PhysicalModel(base.tables, None, schedule)
        training: dict[str, Any] = {"model": "PhysicalModel", "seed": seed, "n_frames": [len(frames[0])],
                                    "base": base.record}  # fmt: skip
    else:
        model, training = fit_physical_model(
            frames[0],
            operators[0],
            frames[1],
            operators[1],
            graph,
            sites,
            schedule,
            seed=seed,
            n_draws=n_draws,
        )
    export_artefact(model, path, graph=graph, schedule=schedule, temperature=temperature,
                    training={**training, "inputs_sha256": inputs}, frames=frames[0])  # fmt: skip
    return load_artefact(path)


def fit_project(project: ProjectSettings) -> tuple[Path, dict[str, Any]]:
    """Fit to the frames that :func:`sample_project` left, and write the model file; once.

    Returns
    -------
    path : pathlib.Path
        ``<out_dir>/model.diffforce``.
    quality : dict
        Held-out R^2 (:func:`fit_quality`) and CPU seconds; also in ``quality.json``.

    Raises
    ------
    InputError
        If there are no frames yet, or the molecule is too large.
    ResumeError
        If the frames were sampled with other settings.
    DiffForceError
        From the fit or the export.
    """
    parts = _parts(project)
    n_atoms = parts.system.getNumParticles()
    if n_atoms > MOST_ATOMS:
        raise InputError(
            f"fit: expected at most {MOST_ATOMS} atoms, found {n_atoms}; the physical model has a feature "
            "for every pair of atoms: fit the molecule of interest alone."
        )
    ends = _sampled_ends(project, parts)
    train = [x[: project.sample.n_frames] for x in ends]
    test = [x[project.sample.n_frames :] for x in ends]
    path = project.out_dir / MODEL_FILE
    artefact = fit_model(
        train, parts.pair, parts.topology, path, sites=project.fit.sites, sigma_max=project.fit.sigma_max,
        n_draws=project.fit.n_draws, seed=project.seed, temperature=project.temperature,
    )  # fmt: skip
    quality = {
        **fit_quality(artefact.model, parts.system, parts.pair, tuple(test),
                      temperature=project.temperature),
        "cpu_seconds": fit_seconds(artefact.metadata["training"]),
    }  # fmt: skip
    write_json(project.out_dir / QUALITY_FILE, quality)
    return path, quality


def _learned(project: ProjectSettings, parts: SystemParts, mode: str) -> tuple[openmm.System, DiffusionForce]:
    """The System with the learned force in it."""
    path = project.out_dir / MODEL_FILE
    if not path.exists():
        raise InputError(f"{path}: expected a fitted model, found none; run fit first.")
    if mode == "operator" and parts.pair is None:
        raise InputError(
            "simulate.mode: expected replace where there is one System, found operator; an operator needs "
            "two end states."
        )
    force = DiffusionForce(
        path, topology=parts.topology, mode="add" if mode == "replace" else mode,
        temperature=project.temperature, backend=project.backend,
    )  # fmt: skip
    if mode == "replace":
        return mix(parts.system, parts.topology, force), force
    system = clone_system(parts.system)
    system.addForce(force)
    return system, force


def simulate_project(
    project: ProjectSettings, *, progress: Any = True, say: Callable[[str], None] | None = None
) -> WindowRun:
    """Dynamics with the learned force at one lambda: a trajectory in ``<out_dir>/simulation``.

    Parameters
    ----------
    project : ProjectSettings
    progress : bool or callable
        As in ``run_windows``.
    say : callable, optional
        Hears, before a run with ``integrator: diffusion``, what its step will do.

    Raises
    ------
    InputError
        If there is no model yet, or a step of ``integrator: diffusion`` would be unstable.
    DiffForceError
        From the force or ``run_windows``.
    """
    parts, stage = _parts(project), project.simulate
    system, force = _learned(project, parts, stage.mode)
    states = [{force.parameter(LAMBDA): stage.lam}]
    arguments = _arguments(project, SIMULATION_DIR, system, parts, states, stage, progress, force)
    for name in ("timestep", "friction"):
        if getattr(stage, name) is not None:
            arguments[name] = getattr(stage, name)
    if stage.integrator == "diffusion":
        integrator = DiffusionLangevinIntegrator(
            project.temperature, arguments["friction"], arguments["timestep"]
        )
        frames = _sampled_ends(project, parts)[0]
        pick = np.linspace(0, len(frames) - 1, min(10, len(frames))).astype(int)
        advice = advise_integrator(integrator, system, frames[pick], parameters=states[0])
        if say is not None:
            say(str(advice))
        advice.require_stable()
    return run_windows(
        **arguments, n_frames=stage.n_frames, interval=stage.interval, integrator=stage.integrator
    )


def windows_project(project: ProjectSettings, *, progress: Any = True) -> WindowRun:
    """Lambda windows under the learned operator, by the sampler of the settings: ``<out_dir>/windows``.

    Raises
    ------
    InputError
        If there is no model yet, or only one end state.
    DiffForceError
        From the force or the sampler.
    """
    parts = _parts(project)
    if parts.pair is None:
        raise InputError("windows: expected two end states, found one System; lambda has nothing to change.")
    system, force = _learned(project, parts, "operator")
    states = project.windows.states
    if isinstance(states, StatesSettings):
        states = lambda_states(states.n, states.power, parameter=force.parameter(LAMBDA))
    return run_sampler(
        project.windows,
        **_arguments(project, WINDOWS_DIR, system, parts, states, project.windows, progress, force),
    )


def finished_windows(project: ProjectSettings) -> WindowRun:
    """The windows that :func:`windows_project` left, held against project and model; nothing is run.

    Raises
    ------
    InputError
        If they are not finished.
    ResumeError
        If windows, model and project do not belong together.
    """
    folder = project.out_dir / WINDOWS_DIR
    if not (folder / U_NK_FILE).exists():
        raise InputError(f"{folder}: expected a finished run of windows, found none; run windows first.")
    return windows_project(project, progress=False)


def correct_end(
    project: ProjectSettings, run: WindowRun, estimate: FreeEnergyEstimate, *, decorrelate: bool = True,
    min_overlap: float = MIN_OVERLAP,
) -> EndCorrection:  # fmt: skip
    """From the learned end state 1 of a project's windows to that of the force field.

    BAR between the frames of the last window and the held-out frames of end state 1.

    Parameters
    ----------
    project : ProjectSettings
    run : WindowRun
        From :func:`finished_windows`.
    estimate : FreeEnergyEstimate
        Of the run.
    decorrelate : bool
    min_overlap : float
        Gate on the overlap of the learned and the classical end state.

    Raises
    ------
    InputError
        If the windows do not go from lambda = 0 to 1, or the sampled ends are not there.
    PoorOverlapError
        If the learned end state is another one than the force field's.
    """
    ends = [list(state.values()) for state in (run.states[0], run.states[-1])]
    if ends != [[0.0], [1.0]]:
        raise InputError(
            f"end correction: expected windows from lambda 0 to 1, found {ends[0]} to {ends[1]}."
        )
    if len(run.trajectories) != len(run.states):
        raise InputError(
            f"end correction: expected frames of all {len(run.states)} windows, found those of "
            f"{len(run.trajectories)}; the walker never came to the others: run longer."
        )
    parts = _parts(project)
    model = load_artefact(project.out_dir / MODEL_FILE).model
    learned = load_trajectory(run.trajectories[-1], run.topology).xyz.astype(np.float64)
    classical = _sampled_ends(project, parts)[1][project.sample.n_frames :]

    def gap(x: FloatArray) -> FloatArray:
        """Classical less learned reduced potential of end state 1."""
        increment = model_fields(model, x, lam=1.0)[0] - model_fields(model, x)[0]
        return np.asarray(parts.pair.operator_values(x) - increment)

    try:
        return end_correction(
            estimate, work_1=(gap(learned), -gap(classical)), decorrelate=decorrelate, min_overlap=min_overlap
        )
    except PoorOverlapError as err:
        err.add_note(
            f"Without the correction, between the learned end states: diffforce estimate {run.out_dir}"
        )
        raise
