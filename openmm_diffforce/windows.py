"""Independent lambda windows that survive a crash, and the alchemlyb tables they give.

A run is a folder. While a window runs, it leaves numbered parts, each with frames, energies and
the checkpoint to go on from; a finished window is one trajectory and one ``.npz``. Every file is
written under another name and renamed. Call :func:`run_windows` again with the same arguments and
it goes on where it was: on the Reference platform bit by bit as if nothing had happened.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm as mm
import pandas as pd

from .errors import ConvergenceError, InputError, ResumeError
from .langevin import make_diffusion_context
from .runs import (
    TOPOLOGY_FILE,
    EnergyDerivatives,
    LearnedForce,
    RunInputs,
    Stop,
    check_inputs,
    check_settings_file,
    interrupt_flag,
    locked,
    make_folder,
    make_tables,
    progress_bar,
    read_npz,
    restore_context,
    write_npz,
    write_pdb,
    write_results,
    write_trajectory,
)
from .systems import (
    FloatArray,
    blow_up_error,
    check_positive,
    default_platform,
    describe,
    make_context,
    seed_to_int32,
    set_parameter,
    start_context,
    step_checked,
)
from .units import thermal_energy
from .workers import Recipe, share_out

STEPS_AT_ONCE = 1000
"""Steps between two looks at Ctrl-C."""


@dataclass(frozen=True)
class WindowRun:
    """A finished run.

    Attributes
    ----------
    u_nk : pandas.DataFrame
        Reduced potentials of every frame in every state [kT], alchemlyb standard form.
    dHdl : pandas.DataFrame or None
        Reduced dH/dlambda [kT], alchemlyb standard form.
    out_dir : pathlib.Path
    trajectories : tuple of pathlib.Path
        One per state (empty if none were asked for); ``topology`` belongs to them.
    topology : pathlib.Path
        PDB file.
    states : list of dict
    temperature : float
        [K].
    n_steps : int
        MD steps taken by this call (0 if all was there already).
    seconds : float
        Wall-clock time of this call.
    """

    u_nk: pd.DataFrame
    dHdl: pd.DataFrame | None
    out_dir: Path
    trajectories: tuple[Path, ...]
    topology: Path
    states: list[dict[str, float]]
    temperature: float
    n_steps: int
    seconds: float


def run_windows(
    system: mm.System,
    topology: Any,
    positions: Any,
    states: Sequence[Mapping[str, float]],
    *,
    temperature: Any,
    out_dir: str | os.PathLike[str],
    n_frames: int,
    interval: int = 100,
    n_equil: int = 10000,
    timestep: Any = 0.001,
    friction: Any = 1.0,
    platform: str | None = None,
    seed: int = 0,
    minimize: bool = True,
    trajectory: str | None = "dcd",
    learned: LearnedForce | Sequence[LearnedForce] | None = None,
    dhdl: bool = True,
    checkpoint_seconds: float = 5.0,
    n_workers: int = 1,
    integrator: str = "langevin",
    progress: bool | Callable[[int, int], None] = True,
) -> WindowRun:
    r"""Sample every lambda state, and evaluate every frame in all of them.

    .. math:: u_{kn} = \beta U_{\lambda_k}(x_n), \qquad
              (\partial H/\partial\lambda)_n = \beta\, \partial U/\partial\lambda\,(x_n)

    Parameters
    ----------
    system : openmm.System
        Classical (``EndStatePair.linear_system()``) or with a learned force. It is never copied.
    topology : openmm.app.Topology
    positions : array_like, shape (n_atoms, 3) or (n_states, n_atoms, 3)
        Start of all windows, or of each [nm].
    states : sequence of dict
        ``{context parameter: value}`` of each window, e.g. ``lambda_states(11)``.
    temperature : float or Quantity
        [K].
    out_dir : path
        Folder of the run; made if absent. A run in it with the same settings is resumed.
    n_frames, interval, n_equil : int
        Frames per window, steps between frames, steps thrown away first.
    timestep : float or Quantity
        [ps].
    friction : float or Quantity
        [1/ps].
    platform : str, optional
        By size if omitted: Reference below 200 atoms, where the CPU platform's threads and
        neighbour lists cost an order of magnitude; else CPU. A GPU platform is chosen by name.
    seed : int
        Every window's velocities and noise follow from it and the window's number.
    minimize : bool
        Minimize the energy in each state first.
    trajectory : {"dcd", "xtc", None}
        Format of the trajectories, one file per state.
    learned : DiffusionForce or sequence of them, optional
        The learned forces in the System. They say what they are (for resuming), and give
        dE/dlambda where OpenMM cannot (PythonForce has no parameter derivatives).
    dhdl : bool
        Collect dH/dlambda; it needs energy derivatives of every parameter in ``states``.
    checkpoint_seconds : float
        At most so much wall-clock time is lost by a crash (Ctrl-C loses nothing).
    n_workers : int
        Processes that share the windows, at most one per core; each has its own Context. On the
        Reference platform the numbers are those of one process, bit by bit. A script that asks
        for more than one must run under ``if __name__ == "__main__":``.
    integrator : {"langevin", "diffusion"}
        OpenMM's LangevinMiddle, or overdamped dynamics by
        :class:`~openmm_diffforce.langevin.DiffusionLangevinIntegrator`, which needs far more friction
        (50/ps) and shorter steps (:func:`~openmm_diffforce.step_size.advise_integrator`).
    progress : bool or callable
        A rich progress bar with ETA, nothing, or ``progress(n_done, n_total)`` in frames.

    Returns
    -------
    WindowRun

    Raises
    ------
    InputError, UnitsError
        For arguments that do not fit, or a parameter without an energy derivative.
    ResumeError
        If the folder holds a run with other settings, a damaged one, or one that another process
        is working on.
    NotConservativeError
        If a learned force is a bare score, without an energy.
    ConvergenceError
        If the dynamics becomes unstable; finished windows and parts stay.
    WorkerError
        If a worker process was killed; what it had saved stays.
    KeyboardInterrupt
        On Ctrl-C, after the current frame was saved (a second Ctrl-C stops at once).

    Notes
    -----
    With a barostat the same p V would be added to a frame's energy in every state, so it is left
    out: differences, which is all that estimators use, do not change. Windows are independent:
    nothing checks that they explore the same basins (see ``analysis``). The energy derivative is
    compared once with a finite difference, because a wrong one is silent.

    Examples
    --------
    >>> import tempfile
    >>> from openmm_diffforce.alanine import alanine_case
    >>> from openmm_diffforce.alchemy import lambda_states
    >>> case = alanine_case("F1")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = run_windows(
    ...         case.pair.linear_system(), case.topology, case.positions, lambda_states(2),
    ...         temperature=300.0, out_dir=folder, n_frames=3, interval=10, n_equil=10,
    ...         progress=False,
    ...     )
    >>> run.u_nk.shape
    (6, 2)
    """
    started = time.monotonic()
    check_positive("checkpoint_seconds", checkpoint_seconds)
    n_workers = check_positive("n_workers", n_workers, integer=True)
    if integrator not in ("langevin", "diffusion"):
        raise InputError(f'integrator: expected "langevin" or "diffusion", found {integrator!r}.')
    # Only the new one is a setting: runs from before it was one go on.
    more = {"integrator": integrator} if integrator != "langevin" else {}
    inputs = check_inputs(
        system, topology, positions, states, learned=learned, temperature=temperature,
        n_equil=n_equil, timestep=timestep, friction=friction, platform=platform, seed=seed,
        minimize=minimize, trajectory=trajectory, dhdl=dhdl,
        n_frames=check_positive("n_frames", n_frames, integer=True),
        interval=check_positive("interval", interval, integer=True), **more,
    )  # fmt: skip
    settings, n_states = inputs.settings, len(inputs.values)
    folder = make_folder(out_dir)
    with locked(folder):
        check_settings_file(folder, settings)
        if not (folder / TOPOLOGY_FILE).exists():
            write_pdb(folder / TOPOLOGY_FILE, topology, inputs.starts[0])
        with interrupt_flag() as stop, progress_bar(progress, n_states * settings["n_frames"]) as count:
            if min(n_workers, n_states) > 1:
                n_steps = share_out(
                    _Task(Recipe.of(inputs), folder, checkpoint_seconds), n_states,
                    n_workers=min(n_workers, n_states), stop=stop, count=count, folder=folder,
                )  # fmt: skip
            else:
                run = _Run(inputs, folder, checkpoint_seconds)
                for k in range(n_states):
                    run.window(k, stop, count)
                n_steps = run.n_steps
        u_nk, dhdl_frame = _tables(folder, inputs)
        trajectories = tuple(_window_path(folder, k, trajectory) for k in range(n_states) if trajectory)
        write_results("windows", folder, inputs, u_nk, dhdl_frame, trajectories)
    return WindowRun(
        u_nk=u_nk,
        dHdl=dhdl_frame,
        out_dir=folder,
        trajectories=trajectories,
        topology=folder / TOPOLOGY_FILE,
        states=settings["states"],
        temperature=settings["temperature"],
        n_steps=n_steps,
        seconds=time.monotonic() - started,
    )


def _window_path(folder: Path, k: int, suffix: str) -> Path:
    return folder / f"window_{k:03d}.{suffix}"


def _parts_dir(folder: Path, k: int) -> Path:
    return folder / f"window_{k:03d}.parts"


class _Run:
    """The state of one call: what to do, and where to put it."""

    def __init__(self, inputs: RunInputs, folder: Path, checkpoint_seconds: float) -> None:
        self.inputs, self.folder, self.settings = inputs, folder, inputs.settings
        self.checkpoint_seconds = checkpoint_seconds
        self.kT = thermal_energy(self.settings["temperature"])
        self.periodic = describe(inputs.system).periodic
        self.derivatives = EnergyDerivatives(inputs)
        self.n_steps = 0

    def window(self, k: int, stop: Stop, report: Callable[[int], None]) -> None:
        """All of window k that is not there yet; ``report`` hears of every frame."""
        n_frames = self.settings["n_frames"]
        if _window_path(self.folder, k, "npz").exists():
            shutil.rmtree(_parts_dir(self.folder, k), ignore_errors=True)
            report(n_frames)
            return
        parts = _parts_dir(self.folder, k)
        parts.mkdir(exist_ok=True)
        what = f"window {k} ({self.inputs.state_text(k)})"
        try:
            self._sample(k, what, parts, stop, report)
        except ConvergenceError as err:
            err.add_note(f"Finished windows and parts of this one are kept in {self.folder}.")
            raise
        self._finish(k, parts)

    def _sample(self, k: int, what: str, parts: Path, stop: Stop, report: Callable[[int], None]) -> None:
        s = self.settings
        # A window's numbers do not depend on which windows ran before it in this process.
        rng = np.random.default_rng([s["seed"], k])
        make = make_context if "integrator" not in s else make_diffusion_context
        context = make(
            self.inputs.system,
            temperature=s["temperature"],
            timestep=s["timestep"],
            friction=s["friction"],
            platform=s["platform"],
            seed=seed_to_int32(rng),
        )
        for name, value in zip(self.inputs.names, self.inputs.values[k], strict=True):
            set_parameter(context, name, value)
        done = sorted(parts.glob("part_*.npz"))
        n_done = sum(len(read_npz(p)["u"]) for p in done)
        if done:
            restore_context(
                context, self.inputs.starts[0], read_npz(done[-1])["checkpoint"].tobytes(), done[-1]
            )
            self.inputs.set_state(context, k)
            self.derivatives.check(context, k)
        else:
            start_context(
                context,
                self.inputs.starts[k],
                seed=seed_to_int32(rng),
                temperature=s["temperature"],
                minimize=s["minimize"],
            )
            self.derivatives.check(context, k)
            self._steps(context, s["n_equil"], f"{what}, equilibration", stop)
            self._save_part(context, parts, len(done), [])
            done.append(parts)
        report(n_done)
        stop.check(self.folder)
        rows: list[dict[str, Any]] = []
        last = time.monotonic()
        n_parts = len(done)
        for n in range(n_done, s["n_frames"]):
            self._steps(context, s["interval"], f"{what}, frame {n}", stop)
            rows.append(self._frame(context, k, f"{what}, frame {n}"))
            end = n + 1 == s["n_frames"]
            # Asked once: a Ctrl-C between saving and stopping would lose what came since.
            stopping = stop.requested
            if end or stopping or time.monotonic() - last > self.checkpoint_seconds:
                self._save_part(context, parts, n_parts, rows)
                n_parts += 1
                rows = []
                last = time.monotonic()
            report(1)
            if stopping and not end:
                stop.check(self.folder)

    def _steps(self, context: mm.Context, n: int, what: str, stop: Stop) -> None:
        integrator = context.getIntegrator()
        while n > 0:
            chunk = min(n, STEPS_AT_ONCE)
            step_checked(integrator, chunk, what)
            n -= chunk
            self.n_steps += chunk
            if stop.requested and what.endswith("equilibration"):
                stop.check(self.folder)

    def _frame(self, context: mm.Context, k: int, what: str) -> dict[str, Any]:
        query: dict[str, Any] = {"positions": True, "energy": True}
        if self.settings["dhdl"]:
            query["parameterDerivatives"] = True
        state = context.getState(**query)
        x = state.getPositions(asNumpy=True)._value
        if not np.isfinite(x).all():
            raise blow_up_error(what, "coordinates that are not finite")
        u = np.empty(len(self.inputs.values))
        u[k] = state.getPotentialEnergy()._value
        row: dict[str, Any] = {"x": np.asarray(x, dtype=np.float32), "u": u}
        if self.periodic:
            row["box"] = np.array(state.getPeriodicBoxVectors(asNumpy=True)._value)
        if self.settings["dhdl"]:
            row["dhdl"] = self.derivatives(context, state) / self.kT
        for j in range(len(self.inputs.values)):
            if j != k:
                self.inputs.set_state(context, j)
                u[j] = context.getState(energy=True).getPotentialEnergy()._value
        self.inputs.set_state(context, k)
        if not np.isfinite(u).all():
            j = int(np.flatnonzero(~np.isfinite(u))[0])
            raise blow_up_error(
                what, f"potential energy {u[j]} kJ/mol in state {j} ({self.inputs.state_text(j)})"
            )
        u /= self.kT
        return row

    def _save_part(self, context: mm.Context, parts: Path, number: int, rows: list[dict[str, Any]]) -> None:
        n_states, n_atoms = len(self.inputs.values), self.inputs.starts.shape[1]
        empty = {"x": np.empty((0, n_atoms, 3), np.float32), "u": np.empty((0, n_states))}
        if self.periodic:
            empty["box"] = np.empty((0, 3, 3))
        if self.settings["dhdl"]:
            empty["dhdl"] = np.empty((0, len(self.inputs.names)))
        arrays = {key: np.array([r[key] for r in rows]) if rows else empty[key] for key in empty}
        checkpoint = np.frombuffer(context.createCheckpoint(), dtype=np.uint8)
        write_npz(parts / f"part_{number:05d}.npz", checkpoint=checkpoint, **arrays)

    def _finish(self, k: int, parts: Path) -> None:
        done = [read_npz(p) for p in sorted(parts.glob("part_*.npz"))]
        arrays = {key: np.concatenate([d[key] for d in done]) for key in done[0] if key != "checkpoint"}
        n_found = len(arrays["u"])
        if n_found != self.settings["n_frames"]:
            raise ResumeError(
                f"{parts}: expected {self.settings['n_frames']} frames, found {n_found}; parts are "
                "missing: remove the folder to redo this window."
            )
        x, box = arrays.pop("x"), arrays.pop("box", None)
        suffix = self.settings["trajectory"]
        if suffix:
            write_trajectory(_window_path(self.folder, k, suffix), x, box, self._times())
        # The table last: its presence says that the window is finished.
        write_npz(_window_path(self.folder, k, "npz"), **arrays)
        shutil.rmtree(parts)

    def _times(self) -> FloatArray:
        return _frame_times(self.settings)


def _frame_times(settings: Mapping[str, Any]) -> FloatArray:
    """Physical time of each frame [ps] since the end of equilibration."""
    step = settings["interval"] * settings["timestep"]
    return np.arange(1, settings["n_frames"] + 1) * step


def _tables(folder: Path, inputs: RunInputs) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    settings, n_states = inputs.settings, len(inputs.values)
    windows = [read_npz(_window_path(folder, k, "npz")) for k in range(n_states)]
    for k, window in enumerate(windows):
        if window["u"].shape != (settings["n_frames"], n_states):
            raise ResumeError(
                f"window {k} in {folder}: expected {settings['n_frames']} frames and {n_states} "
                f"states, found {window['u'].shape}; remove its .npz to redo it."
            )
    return make_tables(
        inputs,
        np.repeat(np.arange(n_states), settings["n_frames"]),
        np.tile(_frame_times(settings), n_states),
        np.concatenate([w["u"] for w in windows]),
        np.concatenate([w["dhdl"] for w in windows]) if settings["dhdl"] else None,
    )


class _Task:
    """One window in a worker process: built there on its first window, because a Context and a
    learned force cannot travel."""

    def __init__(self, recipe: Recipe, folder: Path, checkpoint_seconds: float) -> None:
        self.recipe, self.folder, self.checkpoint_seconds = recipe, folder, checkpoint_seconds
        self.run: _Run | None = None

    def __call__(self, k: int, stop: Stop, count: Callable[[int], None]) -> int:
        if self.run is None:
            self.run = _Run(self.recipe.build(), self.folder, self.checkpoint_seconds)
        before = self.run.n_steps
        self.run.window(k, stop, count)
        return self.run.n_steps - before


__all__ = ["TOPOLOGY_FILE", "LearnedForce", "WindowRun", "default_platform", "run_windows"]
