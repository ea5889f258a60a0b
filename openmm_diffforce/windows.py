"""Independent lambda windows that survive a crash, and the alchemlyb tables they give.

A run is a folder. While a window runs, it leaves numbered parts, each with frames, energies and
the checkpoint to go on from; a finished window is one trajectory and one ``.npz``. Every file is
written under another name and renamed. Call :func:`run_windows` again with the same arguments and
it goes on where it was: on the Reference platform bit by bit as if nothing had happened.
"""

import contextlib
import fcntl
import hashlib
import math
import os
import shutil
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import openmm as mm
import pandas as pd
from openmm import app, unit

from .alchemy import state_values
from .constants import DHDL_FILE, LAMBDA, RECORD_FILE, U_NK_FILE
from .errors import ConvergenceError, InputError, ResumeError
from .record import atomic_path, make_record, plain, read_json, settings_hash, write_json
from .systems import (
    LEARNED_FORCES,
    FloatArray,
    blow_up_error,
    check_frames,
    check_positive,
    check_seed,
    check_topology,
    declared_derivatives,
    default_platform,
    describe,
    force_type,
    get_platform,
    make_context,
    seed_to_int32,
    set_parameter,
    start_context,
    step_checked,
)
from .units import thermal_energy, to_md

SETTINGS_FILE = "settings.json"
"""Settings of a run and their hash, written before the first step."""

TOPOLOGY_FILE = "topology.pdb"
"""Topology and start of a run, for mdtraj."""

STEPS_AT_ONCE = 1000
"""Steps between two looks at Ctrl-C."""


class LearnedForce(Protocol):
    """What is asked of a learned force: ``openmm_diffforce.force.DiffusionForce`` has it."""

    def parameter(self, name: str) -> str:
        """Context parameter of e.g. ``"lambda"``."""

    def energy_derivative(self, context: mm.Context) -> float:
        """dE/dlambda [kJ/mol] of this force alone."""

    def manifest(self) -> dict[str, Any]:
        """What rebuilds the force."""


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
    names, values = state_values(states)
    check_topology(topology, system)
    n_atoms, n_states = system.getNumParticles(), len(values)
    starts = check_frames(positions, n_atoms)
    if len(starts) not in (1, n_states):
        raise InputError(f"positions: expected one frame or one per state ({n_states}), found {len(starts)}.")
    starts = np.broadcast_to(starts, (n_states, n_atoms, 3))
    if trajectory not in ("dcd", "xtc", None):
        raise InputError(f'trajectory: expected "dcd", "xtc" or None, found {trajectory!r}.')
    if not isinstance(n_equil, int | np.integer) or n_equil < 0:
        raise InputError(f"n_equil: expected an integer >= 0, found {n_equil!r}.")
    thermal_energy(temperature)
    kelvin = float(to_md(temperature, unit.kelvin, name="temperature"))
    learned_forces: tuple[Any, ...] = ()
    if learned is not None:
        learned_forces = tuple(learned) if isinstance(learned, Sequence) else (learned,)
    for force in learned_forces:
        if hasattr(force, "require_energy"):
            force.require_energy("lambda windows")
    n_frames = check_positive("n_frames", n_frames, integer=True)
    interval = check_positive("interval", interval, integer=True)
    check_positive("checkpoint_seconds", checkpoint_seconds)
    settings = {
        "format": 1,
        "system_sha256": _system_hash(system, learned_forces),
        "positions_sha256": hashlib.sha256(starts.tobytes()).hexdigest(),
        "atoms_sha256": _topology_hash(topology),
        "states": [dict(zip(names, row.tolist(), strict=True)) for row in values],
        "temperature": kelvin,
        "n_frames": n_frames,
        "interval": interval,
        "n_equil": int(n_equil),
        "timestep": check_positive("timestep", to_md(timestep, unit.picosecond, name="timestep")),
        "friction": check_positive("friction", to_md(friction, unit.picosecond**-1, name="friction")),
        "platform": get_platform(platform, n_atoms).getName(),
        "seed": check_seed(seed),
        "minimize": bool(minimize),
        "trajectory": trajectory,
        "dhdl": bool(dhdl),
    }
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise InputError(f"out_dir: expected a folder that can be made, found {err}.") from err
    with _locked(folder):
        _check_settings(folder, settings)
        if not (folder / TOPOLOGY_FILE).exists():
            _write_pdb(folder / TOPOLOGY_FILE, topology, starts[0])
        run = _Run(system, folder, settings, names, values, starts, learned_forces, checkpoint_seconds)
        with _interrupt_flag() as stop, _progress_bar(progress, n_states * n_frames) as report:
            for k in range(n_states):
                run.window(k, stop, report)
        u_nk, dhdl_frame = _tables(folder, names, values, settings)
        _write_table(folder / U_NK_FILE, u_nk)
        tables = {"u_nk": folder / U_NK_FILE}
        if dhdl_frame is not None:
            _write_table(folder / DHDL_FILE, dhdl_frame)
            tables["dHdl"] = folder / DHDL_FILE
        trajectories = tuple(_window_path(folder, k, trajectory) for k in range(n_states) if trajectory)
        files = {**tables, **{p.stem: p for p in trajectories}}
        write_json(
            folder / RECORD_FILE,
            make_record("windows", settings, seed=settings["seed"], files=files),
        )
    return WindowRun(
        u_nk=u_nk,
        dHdl=dhdl_frame,
        out_dir=folder,
        trajectories=trajectories,
        topology=folder / TOPOLOGY_FILE,
        states=settings["states"],
        temperature=kelvin,
        n_steps=run.n_steps,
        seconds=time.monotonic() - started,
    )


def _window_path(folder: Path, k: int, suffix: str) -> Path:
    return folder / f"window_{k:03d}.{suffix}"


def _parts_dir(folder: Path, k: int) -> Path:
    return folder / f"window_{k:03d}.parts"


class _Run:
    """The state of one call: the context, what to do with it, where to put it."""

    def __init__(
        self,
        system: mm.System,
        folder: Path,
        settings: dict[str, Any],
        names: tuple[str, ...],
        values: FloatArray,
        starts: FloatArray,
        learned: tuple[LearnedForce, ...],
        checkpoint_seconds: float,
    ) -> None:
        self.system, self.folder, self.settings = system, folder, settings
        self.names, self.values, self.starts, self.learned = names, values, starts, learned
        self.checkpoint_seconds = checkpoint_seconds
        self.kT = thermal_energy(settings["temperature"])
        self.periodic = describe(system).periodic
        # A force that comes back from a System has lost its class: learned ones speak themselves.
        self.declared = declared_derivatives(system) | {
            f.parameter(LAMBDA) for f in learned if getattr(f, "backend", "") == "torchforce"
        }
        self.n_steps = 0
        self.checked = False

    def window(self, k: int, stop: "_Stop", report: Callable[[int], None]) -> None:
        n_frames = self.settings["n_frames"]
        if _window_path(self.folder, k, "npz").exists():
            shutil.rmtree(_parts_dir(self.folder, k), ignore_errors=True)
            report(n_frames)
            return
        parts = _parts_dir(self.folder, k)
        parts.mkdir(exist_ok=True)
        what = f"window {k} ({self._state_text(k)})"
        try:
            self._sample(k, what, parts, stop, report)
        except ConvergenceError as err:
            err.add_note(f"Finished windows and parts of this one are kept in {self.folder}.")
            raise
        self._finish(k, parts)

    def _state_text(self, k: int) -> str:
        return ", ".join(f"{n} = {v:g}" for n, v in zip(self.names, self.values[k], strict=True))

    def _set_state(self, context: mm.Context, j: int) -> None:
        for name, value in zip(self.names, self.values[j], strict=True):
            context.setParameter(name, value)

    def _sample(self, k: int, what: str, parts: Path, stop: "_Stop", report: Callable[[int], None]) -> None:
        s = self.settings
        # A window's numbers do not depend on which windows ran before it in this process.
        rng = np.random.default_rng([s["seed"], k])
        context = make_context(
            self.system,
            temperature=s["temperature"],
            timestep=s["timestep"],
            friction=s["friction"],
            platform=s["platform"],
            seed=seed_to_int32(rng),
        )
        for name, value in zip(self.names, self.values[k], strict=True):
            set_parameter(context, name, value)
        done = sorted(parts.glob("part_*.npz"))
        n_done = sum(len(_read_npz(p)["u"]) for p in done)
        if done:
            self._restore(context, _read_npz(done[-1])["checkpoint"].tobytes(), done[-1])
            self._set_state(context, k)
            self._check_derivatives(context, k)
        else:
            start_context(
                context,
                self.starts[k],
                seed=seed_to_int32(rng),
                temperature=s["temperature"],
                minimize=s["minimize"],
            )
            self._check_derivatives(context, k)
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
            if end or stop.requested or time.monotonic() - last > self.checkpoint_seconds:
                self._save_part(context, parts, n_parts, rows)
                n_parts += 1
                rows = []
                last = time.monotonic()
            report(1)
            if not end:
                stop.check(self.folder)

    def _restore(self, context: mm.Context, checkpoint: bytes, path: Path) -> None:
        # The checkpoint carries the random stream, so the trajectory goes on as it would have.
        context.setPositions(self.starts[0])
        try:
            context.loadCheckpoint(checkpoint)
        except mm.OpenMMException as err:
            raise ResumeError(
                f"{path}: expected a checkpoint of this platform and OpenMM version, found one "
                f"that does not load ({err}); remove {path.parent} to redo this window."
            ) from err

    def _steps(self, context: mm.Context, n: int, what: str, stop: "_Stop") -> None:
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
        u = np.empty(len(self.values))
        u[k] = state.getPotentialEnergy()._value
        row: dict[str, Any] = {"x": np.asarray(x, dtype=np.float32), "u": u}
        if self.periodic:
            row["box"] = np.array(state.getPeriodicBoxVectors(asNumpy=True)._value)
        if self.settings["dhdl"]:
            row["dhdl"] = self._derivatives(context, state) / self.kT
        for j in range(len(self.values)):
            if j != k:
                self._set_state(context, j)
                u[j] = context.getState(energy=True).getPotentialEnergy()._value
        self._set_state(context, k)
        if not np.isfinite(u).all():
            j = int(np.flatnonzero(~np.isfinite(u))[0])
            raise blow_up_error(what, f"potential energy {u[j]} kJ/mol in state {j} ({self._state_text(j)})")
        u /= self.kT
        return row

    def _derivatives(self, context: mm.Context, state: mm.State) -> FloatArray:
        """dU/dparameter [kJ/mol]: OpenMM's, else the learned forces' own."""
        found = dict(state.getEnergyParameterDerivatives())
        found = {name: found[name] for name in self.declared & found.keys()}
        for force in self.learned:
            name = force.parameter(LAMBDA)
            # A force on TorchForce reports through OpenMM already: do not count it twice.
            if name in self.names and getattr(force, "backend", "python") == "python":
                found[name] = found.get(name, 0.0) + float(force.energy_derivative(context))
        missing = [n for n in self.names if n not in found]
        if missing:
            raise InputError(
                f"dH/dlambda: expected an energy derivative of {missing}, found those of "
                f"{sorted(found)}; add it to the force (addEnergyParameterDerivative), pass a "
                "learned force as learned=..., or ask for none with dhdl=False."
            )
        return np.array([found[n] for n in self.names])

    def _check_derivatives(self, context: mm.Context, k: int) -> None:
        """Hold dH/dlambda against a finite difference once: a wrong derivative is silent."""
        if not self.settings["dhdl"] or self.checked:
            return
        low, high = self.values.min(axis=0), self.values.max(axis=0)
        middle = 0.5 * (low + high)
        for name, value in zip(self.names, middle, strict=True):
            context.setParameter(name, value)
        exact = self._derivatives(context, context.getState(energy=True, parameterDerivatives=True))
        for i, name in enumerate(self.names):
            h = 1e-3 * (high[i] - low[i])
            if h == 0:
                continue
            energies = []
            for value in (middle[i] - h, middle[i] + h):
                context.setParameter(name, value)
                energies.append(context.getState(energy=True).getPotentialEnergy()._value)
            context.setParameter(name, middle[i])
            slope = (energies[1] - energies[0]) / (2 * h)
            # float32 energies carry 1e-6 of themselves; the difference is divided by 2 h.
            noise = 1e-6 * max(1.0, *(abs(e) for e in energies)) / h
            if not math.isclose(exact[i], slope, rel_tol=0.02, abs_tol=0.05 + noise):
                raise InputError(
                    f"dH/d{name}: expected the finite difference {slope:.6g} kJ/mol, found "
                    f"{exact[i]:.6g}; a force uses {name} without declaring its derivative: "
                    "declare it, pass a learned force as learned=..., or use dhdl=False."
                )
        self._set_state(context, k)
        self.checked = True

    def _save_part(self, context: mm.Context, parts: Path, number: int, rows: list[dict[str, Any]]) -> None:
        n_states, n_atoms = len(self.values), self.starts.shape[1]
        empty = {"x": np.empty((0, n_atoms, 3), np.float32), "u": np.empty((0, n_states))}
        if self.periodic:
            empty["box"] = np.empty((0, 3, 3))
        if self.settings["dhdl"]:
            empty["dhdl"] = np.empty((0, len(self.names)))
        arrays = {key: np.array([r[key] for r in rows]) if rows else empty[key] for key in empty}
        checkpoint = np.frombuffer(context.createCheckpoint(), dtype=np.uint8)
        _write_npz(parts / f"part_{number:05d}.npz", checkpoint=checkpoint, **arrays)

    def _finish(self, k: int, parts: Path) -> None:
        done = [_read_npz(p) for p in sorted(parts.glob("part_*.npz"))]
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
            _write_trajectory(_window_path(self.folder, k, suffix), x, box, self._times())
        # The table last: its presence says that the window is finished.
        _write_npz(_window_path(self.folder, k, "npz"), **arrays)
        shutil.rmtree(parts)

    def _times(self) -> FloatArray:
        return _frame_times(self.settings)


def _frame_times(settings: Mapping[str, Any]) -> FloatArray:
    """Physical time of each frame [ps] since the end of equilibration."""
    step = settings["interval"] * settings["timestep"]
    return np.arange(1, settings["n_frames"] + 1) * step


def _write_npz(path: Path, **arrays: Any) -> None:
    with atomic_path(path) as part, open(part, "wb") as handle:
        np.savez(handle, **arrays)


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        # Opened here, because numpy leaves a damaged archive open.
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as data:
            return {key: data[key] for key in data.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as err:
        raise ResumeError(
            f"{path}: expected a file of this run, found a damaged one ({err}); remove it to redo "
            "what it held."
        ) from err


def _write_trajectory(path: Path, x: Any, box: FloatArray | None, times: FloatArray) -> None:
    from mdtraj.formats import DCDTrajectoryFile, XTCTrajectoryFile
    from mdtraj.utils import box_vectors_to_lengths_and_angles

    with atomic_path(path) as part:
        if path.suffix == ".dcd":
            cell: dict[str, Any] = {}
            if box is not None:
                rows = np.array([box_vectors_to_lengths_and_angles(*b) for b in box])
                cell = {"cell_lengths": rows[:, :3] * 10.0, "cell_angles": rows[:, 3:]}
            with DCDTrajectoryFile(str(part), "w", force_overwrite=True) as out:
                out.write(x * np.float32(10.0), **cell)  # DCD is in angstrom
        else:
            with XTCTrajectoryFile(str(part), "w", force_overwrite=True) as out:
                out.write(
                    x,
                    time=times.astype(np.float32),
                    box=None if box is None else box.astype(np.float32),
                )


def _write_pdb(path: Path, topology: Any, x: FloatArray) -> None:
    with atomic_path(path) as part, open(part, "w", encoding="utf-8") as handle:
        app.PDBFile.writeFile(topology, x * unit.nanometer, handle, keepIds=True)


def _write_table(path: Path, table: pd.DataFrame) -> None:
    if len(table.columns) and isinstance(table.columns[0], tuple):
        # alchemlyb's reader makes tuples of lambdas out of this text again.
        table = table.set_axis(pd.Index([str(c) for c in table.columns]), axis=1)
    with atomic_path(path) as part:
        table.to_parquet(part, engine="pyarrow", index=True)


def _tables(
    folder: Path, names: tuple[str, ...], values: FloatArray, settings: Mapping[str, Any]
) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    windows = [_read_npz(_window_path(folder, k, "npz")) for k in range(len(values))]
    for k, window in enumerate(windows):
        if window["u"].shape != (settings["n_frames"], len(values)):
            raise ResumeError(
                f"window {k} in {folder}: expected {settings['n_frames']} frames and {len(values)} "
                f"states, found {window['u'].shape}; remove its .npz to redo it."
            )
    single = len(names) == 1
    columns: list[Any] = [float(v[0]) if single else tuple(map(float, v)) for v in values]
    # alchemlyb's names: as its AMBER parser has them for one lambda, as GROMACS' for several.
    levels = ["lambdas"] if single else [f"{n}-lambda" for n in names]
    rows = np.repeat(values, settings["n_frames"], axis=0)
    times = np.tile(_frame_times(settings), len(values))
    index = pd.MultiIndex.from_arrays(
        [times, *(rows[:, i] for i in range(len(names)))], names=["time", *levels]
    )
    attrs = {"temperature": settings["temperature"], "energy_unit": "kT"}
    u_nk = pd.DataFrame(np.concatenate([w["u"] for w in windows]), index=index)
    u_nk.columns = pd.Index(columns, tupleize_cols=False)
    u_nk.attrs = dict(attrs)
    if not settings["dhdl"]:
        return u_nk, None
    dhdl = pd.DataFrame(
        np.concatenate([w["dhdl"] for w in windows]),
        index=index,
        columns=["dHdl"] if single else list(names),
    )
    dhdl.attrs = dict(attrs)
    return u_nk, dhdl


def _topology_hash(topology: Any) -> str:
    atoms = [
        (a.name, a.element.symbol if a.element is not None else None, a.residue.name)
        for a in topology.atoms()
    ]
    bonds = sorted(sorted((b[0].index, b[1].index)) for b in topology.bonds())
    return settings_hash({"atoms": atoms, "bonds": bonds})


def _system_hash(system: mm.System, learned: tuple[LearnedForce, ...]) -> str:
    """Hash of all that the System computes; learned forces by their manifests, not their paths."""
    n_learned = sum(force_type(f) in LEARNED_FORCES for f in system.getForces())
    if n_learned != len(learned):
        raise InputError(
            f"learned: expected the {n_learned} learned force(s) that the System holds, found "
            f"{len(learned)}; pass the DiffusionForce objects that were added to it, so that the "
            "run can be resumed and dE/dlambda be exact."
        )
    digest = hashlib.sha256()
    for force in system.getForces():
        if force_type(force) in LEARNED_FORCES:
            digest.update(f"learned:{force.getForceGroup()}".encode())
        else:
            digest.update(mm.XmlSerializer.serialize(force).encode())
    for force in learned:
        manifest = {k: v for k, v in force.manifest().items() if k not in ("artefact", "path")}
        digest.update(settings_hash(manifest).encode())
    bare = mm.System()
    for i in range(system.getNumParticles()):
        bare.addParticle(system.getParticleMass(i))
        if system.isVirtualSite(i):
            site = system.getVirtualSite(i)
            digest.update(f"site:{i}:{type(site).__name__}".encode())
    for i in range(system.getNumConstraints()):
        bare.addConstraint(*system.getConstraintParameters(i))
    bare.setDefaultPeriodicBoxVectors(*system.getDefaultPeriodicBoxVectors())
    digest.update(mm.XmlSerializer.serialize(bare).encode())
    return digest.hexdigest()


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS_FILE
    if not path.exists():
        if any(folder.glob("window_*")):
            raise ResumeError(
                f"{folder}: expected {SETTINGS_FILE} beside the windows found there; choose another out_dir."
            )
        write_json(path, {"sha256": settings_hash(settings), "settings": settings})
        return
    try:
        found = read_json(path)
        old = dict(found["settings"])
    except (InputError, KeyError, TypeError, ValueError) as err:
        raise ResumeError(f"{path}: expected the settings of a run, found {err}.") from err
    if found.get("sha256") != settings_hash(old):
        raise ResumeError(f"{path}: expected unaltered settings, found another hash in the file.")
    if found["sha256"] == settings_hash(settings):
        return
    new = plain(settings)
    changed = [
        f"{key} ({_short(old.get(key))} there, {_short(new.get(key))} now)"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    raise ResumeError(
        f"{folder}: expected a run with the same settings, found other values of "
        f"{'; '.join(changed)}; use the settings it was made with, or another out_dir."
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder / ".lock", "w", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            raise ResumeError(
                f"{folder}: expected a run that nobody works on, found it locked by another "
                "process; wait for it, or choose another out_dir."
            ) from err
        yield


class _Stop:
    """Whether Ctrl-C was pressed."""

    requested = False

    def check(self, folder: Path) -> None:
        if self.requested:
            raise KeyboardInterrupt(f"stopped; the same call resumes the run in {folder}")


@contextlib.contextmanager
def _interrupt_flag() -> Iterator[_Stop]:
    """Turn the first Ctrl-C into a flag, so that a frame is saved before the run stops."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python delivers signals to the main thread only
        return
    previous = signal.getsignal(signal.SIGINT)

    def handler(number: int, frame: Any) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def _progress_bar(
    progress: bool | Callable[[int, int], None], n_total: int
) -> Iterator[Callable[[int], None]]:
    n_done = 0
    if callable(progress):
        call = progress

        def count(n: int) -> None:
            nonlocal n_done
            n_done += n
            call(n_done, n_total)

        yield count
        return
    if not progress:
        yield lambda n: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} frames"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        Remaining(),
    )
    with bar:
        task = bar.add_task("windows", total=n_total)
        yield lambda n: bar.advance(task, n)


__all__ = ["LearnedForce", "WindowRun", "default_platform", "run_windows"]
