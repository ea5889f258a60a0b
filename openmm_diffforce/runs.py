"""What every run of simulations on disk shares: its settings, its lock, Ctrl-C, progress, tables.

A run is a folder with ``settings.json``, numbered parts while it works, and alchemlyb tables when
it is done. :mod:`~openmm_diffforce.windows` and :mod:`~openmm_diffforce.exchange` are made of this.
"""

import contextlib
import fcntl
import hashlib
import math
import os
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import openmm as mm
import pandas as pd
from openmm import app, unit

from .alchemy import state_values
from .constants import DHDL_FILE, INTERPOLATE, LAMBDA, RECORD_FILE, U_NK_FILE
from .errors import InputError, ResumeError
from .record import atomic_path, make_record, plain, read_json, settings_hash, write_json
from .systems import (
    LEARNED_FORCES,
    FloatArray,
    check_frames,
    check_positive,
    check_seed,
    check_topology,
    declared_derivatives,
    force_type,
    get_platform,
)
from .units import thermal_energy, to_md

SETTINGS_FILE = "settings.json"
"""Settings of a run and their hash, written before the first step."""

TOPOLOGY_FILE = "topology.pdb"
"""Topology and start of a run, for mdtraj."""


class LearnedForce(Protocol):
    """What is asked of a learned force: ``openmm_diffforce.force.DiffusionForce`` has it."""

    def parameter(self, name: str) -> str:
        """Context parameter of e.g. ``"lambda"``."""

    def energy_derivative(self, context: mm.Context, parameter: str) -> float:
        """dE/dparameter [kJ/mol] of this force alone, e.g. of ``"lambda"``."""

    def manifest(self) -> dict[str, Any]:
        """What rebuilds the force."""


@dataclass(frozen=True)
class RunInputs:
    """Arguments of a run, checked.

    Attributes
    ----------
    system : openmm.System
    topology : openmm.app.Topology
    names : tuple of str
        Context parameters of the states.
    values : numpy.ndarray, shape (n_states, n_parameters)
    starts : numpy.ndarray, shape (n_states, n_atoms, 3)
        [nm].
    learned : tuple of LearnedForce
    settings : dict
        All that the numbers of the run depend on, JSON-ready.
    """

    system: mm.System
    topology: Any
    names: tuple[str, ...]
    values: FloatArray
    starts: FloatArray
    learned: tuple[Any, ...]
    settings: dict[str, Any]

    def state_text(self, k: int) -> str:
        """State k for messages: ``lambda = 0.5``."""
        return ", ".join(f"{n} = {v:g}" for n, v in zip(self.names, self.values[k], strict=True))

    def set_state(self, context: mm.Context, k: int) -> None:
        """Put a Context into state k."""
        for name, value in zip(self.names, self.values[k], strict=True):
            context.setParameter(name, value)


def check_inputs(
    system: mm.System,
    topology: Any,
    positions: Any,
    states: Sequence[Mapping[str, float]],
    *,
    learned: Any,
    temperature: Any,
    n_equil: Any,
    timestep: Any,
    friction: Any,
    platform: str | None,
    seed: Any,
    minimize: bool,
    trajectory: str | None,
    dhdl: bool,
    **more: Any,
) -> RunInputs:
    """Check what every kind of run is given; ``more`` are settings of one kind, checked by it.

    Raises
    ------
    InputError, UnitsError
        For arguments that do not fit.
    NotConservativeError
        If a learned force has no energy: u_nk, MBAR and exchange need one.
    """
    names, values = state_values(states)
    check_topology(topology, system)
    n_atoms, n_states = system.getNumParticles(), len(values)
    starts = check_frames(positions, n_atoms)
    if len(starts) not in (1, n_states):
        raise InputError(f"positions: expected one frame or one per state ({n_states}), found {len(starts)}.")
    starts = np.broadcast_to(starts, (n_states, n_atoms, 3))
    if trajectory not in ("dcd", "xtc", None):
        raise InputError(f'trajectory: expected "dcd", "xtc" or None, found {trajectory!r}.')
    thermal_energy(temperature)
    kelvin = float(to_md(temperature, unit.kelvin, name="temperature"))
    forces: tuple[Any, ...] = ()
    if learned is not None:
        forces = tuple(learned) if isinstance(learned, Sequence) else (learned,)
    require_conservative(forces)
    settings = {
        "format": 1,
        "system_sha256": system_hash(system, forces),
        "positions_sha256": hashlib.sha256(starts.tobytes()).hexdigest(),
        "atoms_sha256": topology_hash(topology),
        "states": [dict(zip(names, row.tolist(), strict=True)) for row in values],
        "temperature": kelvin,
        "n_equil": check_count("n_equil", n_equil),
        "timestep": check_positive("timestep", to_md(timestep, unit.picosecond, name="timestep")),
        "friction": check_positive("friction", to_md(friction, unit.picosecond**-1, name="friction")),
        "platform": get_platform(platform, n_atoms).getName(),
        "seed": check_seed(seed),
        "minimize": bool(minimize),
        "trajectory": trajectory,
        "dhdl": bool(dhdl),
        **more,
    }
    return RunInputs(system, topology, names, values, starts, forces, settings)


def check_count(name: str, value: Any) -> int:
    """An integer >= 0, or InputError with the name."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 0:
        raise InputError(f"{name}: expected an integer >= 0, found {value!r}.")
    return int(value)


def require_conservative(learned: Sequence[Any]) -> None:
    """Refuse learned forces whose artefact says that they are no gradient of an energy.

    Raises
    ------
    NotConservativeError
    """
    for force in learned:
        if hasattr(force, "require_energy"):
            force.require_energy("reduced potentials, MBAR, exchange")


def make_folder(out_dir: str | os.PathLike[str]) -> Path:
    """The folder of a run, made if absent."""
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise InputError(
            f"out_dir: expected a folder that can be made, found {folder}: {err.strerror}."
        ) from err
    return folder


class EnergyDerivatives:
    """dU/dparameter [kJ/mol] of a run's parameters: OpenMM's, else the learned forces' own."""

    def __init__(self, inputs: RunInputs) -> None:
        self.inputs = inputs
        # A force that comes back from a System has lost its class: learned ones speak themselves.
        self.declared = declared_derivatives(inputs.system) | {
            f.parameter(LAMBDA) for f in inputs.learned if getattr(f, "backend", "") == "torchforce"
        }
        self.checked = False

    def __call__(self, context: mm.Context, state: mm.State) -> FloatArray:
        """Derivatives at a state of ``context`` that was asked for ``parameterDerivatives``."""
        names = self.inputs.names
        found = dict(state.getEnergyParameterDerivatives())
        found = {name: found[name] for name in self.declared & found.keys()}
        for force in self.inputs.learned:
            # A force on TorchForce reports through OpenMM already: do not count it twice.
            if getattr(force, "backend", "python") != "python":
                continue
            for which in (LAMBDA, INTERPOLATE) if getattr(force, "interpolated", False) else (LAMBDA,):
                if (name := force.parameter(which)) in names:
                    found[name] = found.get(name, 0.0) + float(force.energy_derivative(context, which))
        missing = [n for n in names if n not in found]
        if missing:
            raise InputError(
                f"dH/dlambda: expected an energy derivative of {missing}, found those of "
                f"{sorted(found)}; add it to the force (addEnergyParameterDerivative), pass a "
                "learned force as learned=..., or ask for none with dhdl=False."
            )
        return np.array([found[n] for n in names])

    def check(self, context: mm.Context, k: int) -> None:
        """Hold learned forces against the context; and dH/dlambda, once, against a finite difference.

        A wrong derivative is silent. ``context`` is left in state k.
        """
        for force in self.inputs.learned:
            if hasattr(force, "check"):
                force.check(context)
        names, values = self.inputs.names, self.inputs.values
        if not self.inputs.settings["dhdl"] or self.checked:
            return
        low, high = values.min(axis=0), values.max(axis=0)
        middle = 0.5 * (low + high)
        for name, value in zip(names, middle, strict=True):
            context.setParameter(name, value)
        exact = self(context, context.getState(energy=True, parameterDerivatives=True))
        for i, name in enumerate(names):
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
        self.inputs.set_state(context, k)
        self.checked = True


def write_npz(path: Path, **arrays: Any) -> None:
    """Write arrays, whole or not at all."""
    with atomic_path(path) as part, open(part, "wb") as handle:
        np.savez(handle, **arrays)


def read_npz(path: Path) -> dict[str, Any]:
    """Read arrays.

    Raises
    ------
    ResumeError
        If the file is damaged.
    """
    try:
        # Opened here, because numpy leaves a damaged archive open.
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as data:
            return {key: data[key] for key in data.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as err:
        raise ResumeError(
            f"{path}: expected a file of this run, found a damaged one ({err}); remove it to redo "
            "what it held."
        ) from err


def write_trajectory(path: Path, x: Any, box: FloatArray | None, times: FloatArray) -> None:
    """Write frames x [nm] as DCD or XTC, by the suffix."""
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


def write_pdb(path: Path, topology: Any, x: FloatArray) -> None:
    """Write one frame x [nm] as PDB."""
    with atomic_path(path) as part, open(part, "w", encoding="utf-8") as handle:
        app.PDBFile.writeFile(topology, x * unit.nanometer, handle, keepIds=True)


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write an alchemlyb table as parquet."""
    if len(table.columns) and isinstance(table.columns[0], tuple):
        # alchemlyb's reader makes tuples of lambdas out of this text again.
        table = table.set_axis(pd.Index([str(c) for c in table.columns]), axis=1)
    with atomic_path(path) as part:
        table.to_parquet(part, engine="pyarrow", index=True)


def make_tables(
    inputs: RunInputs, state: npt.NDArray[np.int64], times: FloatArray, u: FloatArray, dhdl: FloatArray | None
) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """alchemlyb's u_nk and dHdl of frames grouped by state.

    Parameters
    ----------
    inputs : RunInputs
    state : numpy.ndarray, shape (n_rows,)
        State that each frame was sampled in.
    times : numpy.ndarray, shape (n_rows,)
        [ps].
    u : numpy.ndarray, shape (n_rows, n_states)
        [kT].
    dhdl : numpy.ndarray, shape (n_rows, n_parameters), optional
        [kT].
    """
    names, values = inputs.names, inputs.values
    single = len(names) == 1
    columns: list[Any] = [float(v[0]) if single else tuple(map(float, v)) for v in values]
    # alchemlyb's names: as its AMBER parser has them for one lambda, as GROMACS' for several.
    levels = ["lambdas"] if single else [f"{n}-lambda" for n in names]
    rows = values[state]
    index = pd.MultiIndex.from_arrays(
        [times, *(rows[:, i] for i in range(len(names)))], names=["time", *levels]
    )
    attrs = {"temperature": inputs.settings["temperature"], "energy_unit": "kT"}
    u_nk = pd.DataFrame(u, index=index)
    u_nk.columns = pd.Index(columns, tupleize_cols=False)
    u_nk.attrs = dict(attrs)
    if dhdl is None:
        return u_nk, None
    slopes = pd.DataFrame(dhdl, index=index, columns=["dHdl"] if single else list(names))
    slopes.attrs = dict(attrs)
    return u_nk, slopes


def write_results(
    what: str,
    folder: Path,
    inputs: RunInputs,
    u_nk: pd.DataFrame,
    dhdl: pd.DataFrame | None,
    files: Sequence[Path],
    **more: Any,
) -> None:
    """Write the tables and, last, ``record.json`` with the hashes of all files of the run.

    ``more`` goes into the record as it is.
    """
    write_table(folder / U_NK_FILE, u_nk)
    tables = {"u_nk": folder / U_NK_FILE}
    if dhdl is not None:
        write_table(folder / DHDL_FILE, dhdl)
        tables["dHdl"] = folder / DHDL_FILE
    settings = inputs.settings
    record = make_record(
        what, settings, seed=settings["seed"], files={**tables, **{p.stem: p for p in files}}
    )
    write_json(folder / RECORD_FILE, {**record, **more})


def restore_context(context: mm.Context, x: FloatArray, checkpoint: bytes, path: Path) -> None:
    """Load a checkpoint; it carries the random stream, so the dynamics goes on as it would have.

    Raises
    ------
    ResumeError
        If it is of another platform or version.
    """
    context.setPositions(x)
    try:
        context.loadCheckpoint(checkpoint)
    except mm.OpenMMException as err:
        raise ResumeError(
            f"{path}: expected a checkpoint of this platform and OpenMM version, found one "
            f"that does not load ({err}); remove {path.parent} to redo what it holds."
        ) from err


def topology_hash(topology: Any) -> str:
    """sha256 of atoms and bonds."""
    atoms = [
        (a.name, a.element.symbol if a.element is not None else None, a.residue.name)
        for a in topology.atoms()
    ]
    bonds = sorted(sorted((b[0].index, b[1].index)) for b in topology.bonds())
    return settings_hash({"atoms": atoms, "bonds": bonds})


def system_hash(system: mm.System, learned: tuple[LearnedForce, ...]) -> str:
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


def check_settings_file(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a new run; compare them with those of one that is resumed.

    A run that failed before it computed anything, on a misspelt parameter for one, may be begun
    again with other settings.

    Raises
    ------
    ResumeError
        If they differ, or the file was altered.
    """
    path = folder / SETTINGS_FILE
    if not path.exists():
        if _has_results(folder):
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
    if not _has_results(folder):
        (folder / TOPOLOGY_FILE).unlink(missing_ok=True)
        write_json(path, {"sha256": settings_hash(settings), "settings": settings})
        return
    new = plain(settings)
    changed = [
        f"{key} ({_HASHED[key]})"
        if key in _HASHED
        else f"{key} ({_short(old.get(key))} there, {_short(new.get(key))} now)"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    raise ResumeError(
        f"{folder}: expected a run with the same settings, found other values of "
        f"{'; '.join(changed)}; use the settings it was made with, or another out_dir."
    )


def _has_results(folder: Path) -> bool:
    """Whether a run left anything that was computed; an empty folder of parts is nothing."""
    left = (p for pattern in ("window_*", "state_*", "*.parts") for p in folder.glob(pattern))
    return any(p.is_file() or any(p.iterdir()) for p in left)


_HASHED = {
    "system_sha256": "another System or learned model",
    "positions_sha256": "other starting positions",
    "atoms_sha256": "other atoms in the topology",
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process.

    Raises
    ------
    ResumeError
        If another process holds it.
    """
    with open(folder / ".lock", "w", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            raise ResumeError(
                f"{folder}: expected a run that nobody works on, found it locked by another "
                "process; wait for it, or choose another out_dir."
            ) from err
        yield


class Stop:
    """Whether Ctrl-C was pressed."""

    requested = False

    def check(self, folder: Path) -> None:
        """Raise KeyboardInterrupt if it was."""
        if self.requested:
            raise KeyboardInterrupt(f"stopped; the same call resumes the run in {folder}")


@contextlib.contextmanager
def interrupt_flag() -> Iterator[Stop]:
    """Turn the first Ctrl-C into a flag, so that a frame is saved before the run stops."""
    stop = Stop()
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
def progress_bar(
    progress: bool | Callable[[int, int], None], n_total: int, *, what: str = "sampling"
) -> Iterator[Callable[[int], None]]:
    """Yield ``count(n)``, which adds n frames to a bar with ETA on stderr, to nothing, or to a callable."""
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
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} frames"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        Remaining(),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task(what, total=n_total)
        yield lambda n: bar.advance(task, n)
