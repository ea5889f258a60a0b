r"""Replica exchange and expanded ensemble between lambda states, by OpenMM's own samplers.

``openmm.app.ReplicaExchangeSampler`` and ``ExpandedEnsembleSampler`` do the dynamics, evaluate the
states and change them. Replaced is only what a run that must be repeatable needs otherwise:

- exchange is decided in log space, by :func:`~openmm_diffforce.swaps.exchange_states` (OpenMM's
  ``math.exp`` overflows above 709 kT);
- random numbers come from a generator of the run's own, saved with it (OpenMM's is Python's global);
- frames and checkpoints are written as numbered parts, whole or not at all. OpenMM's reporter
  writes several files one after the other and resumes from the assignment before the exchange, so
  a run that was killed does not go on as it would have.

The tables are those of :func:`openmm_diffforce.windows.run_windows`.
"""

import contextlib
import functools
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm as mm
from openmm import app, unit

from .constants import EXCHANGE_FILE
from .errors import ConvergenceError, IncompatibleSystemError, InputError, ResumeError
from .estimate import table_order
from .runs import (
    TOPOLOGY_FILE,
    EnergyDerivatives,
    LearnedForce,
    RunInputs,
    Stop,
    check_count,
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
from .swaps import IntArray, SwapStatistics, exchange_states, swap_statistics
from .systems import (
    FloatArray,
    blow_up_error,
    check_frames,
    check_positive,
    describe,
    get_platform,
    seed_to_int32,
    set_parameter,
    start_context,
    step_checked,
)
from .units import thermal_energy
from .windows import WindowRun

PARTS_DIR = "exchange.parts"
"""Parts and the checkpoint of a run at work."""


# -------------------------------------------------------------------------------------- samplers


class _ReplicaSampler(app.ReplicaExchangeSampler):
    """OpenMM's sampler, with an own generator, safe exchange, and a frame of every replica."""

    replicaStateIndex: list[int]

    def __init__(
        self,
        states: list[dict[str, float]],
        simulation: app.Simulation,
        n_steps: int,
        kT: float,
        rng: np.random.Generator,
        take_frame: Callable[[], dict[str, Any]],
    ) -> None:
        super().__init__(states, simulation, n_steps)
        self.kT, self.rng, self.take_frame = kT, rng, take_frame
        self.frames: list[dict[str, Any]] = [{} for _ in states]
        self.row: dict[str, Any] = {}
        self.proposed = np.zeros((len(states), len(states)), dtype=np.int64)
        self.accepted = np.zeros_like(self.proposed)
        self.at_work = 0

    def simulateReplica(self, index: int, steps: int | None = None) -> None:
        """One replica's dynamics; then its frame, while the Context is still in its state."""
        self.at_work = index
        super().simulateReplica(index, steps)
        self.frames[index] = self.take_frame()

    def reduced_energies(self) -> FloatArray:
        """u of each replica in each state [kT]."""
        found = self.replicaStateEnergy.value_in_unit(unit.kilojoule_per_mole)
        return np.array(found, dtype=np.float64) / self.kT

    def exchangeReplicas(self) -> None:
        """Exchange states between replicas."""
        u = self.reduced_energies()
        if not np.isfinite(u).all():
            i, j = np.argwhere(~np.isfinite(u))[0]
            raise blow_up_error(f"replica {i}", f"reduced potential {u[i, j]} in state {j}")
        self.row = {
            "u": u,
            "state": np.array(self.replicaStateIndex),
            **{key: np.stack([f[key] for f in self.frames]) for key in self.frames[0]},
        }
        self.replicaStateIndex, proposed, accepted = exchange_states(
            u, self.replicaStateIndex, self.rng, self.exchangesPerIteration
        )
        self.proposed += proposed
        self.accepted += accepted


class _ExpandedSampler(app.ExpandedEnsembleSampler):
    """OpenMM's sampler, drawing from the run's own generator, and a frame before every change."""

    rng: np.random.Generator
    take_frame: Callable[[], dict[str, Any]]
    row: dict[str, Any]

    def attemptStateChange(self, state: mm.State) -> list[float]:
        """Choose a new state; keep the frame of the old one."""
        row = {"state": np.array([self.currentStateIndex])}
        row |= {key: value[None] for key, value in self.take_frame().items()}
        with _python_random(self.rng):
            u = super().attemptStateChange(state)
        if not np.isfinite(u).all():
            raise blow_up_error("expanded ensemble", f"reduced potentials {u}")
        self.row = {**row, "u": np.array(u, dtype=np.float64)[None]}
        return u


@contextlib.contextmanager
def _python_random(rng: np.random.Generator) -> Iterator[None]:
    """Let code that draws from Python's global generator draw from ``rng``; others notice nothing."""
    kept = random.getstate()
    random.seed(int(rng.integers(2**63)))
    try:
        yield
    finally:
        random.setstate(kept)


# ------------------------------------------------------------------------------------------ runs


@dataclass(frozen=True)
class ExchangeRun(WindowRun):
    """A finished run of replica exchange or expanded ensemble.

    Attributes
    ----------
    swaps : SwapStatistics
    replica : numpy.ndarray, shape (n_rows,)
        Replica that each row of ``u_nk`` comes from: pass it to
        :func:`~openmm_diffforce.estimate.estimate_free_energy`, because a replica carries what it
        remembers from state to state.
    weights : numpy.ndarray or None, shape (n_states,)
        Of an expanded ensemble [kT]: an estimate of f, up to a constant.
    """

    swaps: SwapStatistics
    replica: IntArray
    weights: FloatArray | None = None


class _Walk:
    """A run at work: the simulation, and its parts and checkpoint on disk."""

    what = "replica exchange"

    def __init__(self, inputs: RunInputs, folder: Path, checkpoint_seconds: float) -> None:
        self.inputs, self.folder, self.settings = inputs, folder, inputs.settings
        self.parts = folder / PARTS_DIR
        self.checkpoint_seconds = checkpoint_seconds
        s = self.settings
        self.kT = thermal_energy(s["temperature"])
        self.periodic = describe(inputs.system).periodic
        self.derivatives = EnergyDerivatives(inputs)
        self.rng = np.random.default_rng(s["seed"])
        integrator = mm.LangevinMiddleIntegrator(s["temperature"], s["friction"], s["timestep"])
        integrator.setRandomNumberSeed(seed_to_int32(self.rng))
        platform = get_platform(s["platform"], inputs.starts.shape[1])
        try:
            self.simulation = app.Simulation(inputs.topology, inputs.system, integrator, platform)
        except mm.OpenMMException as err:
            raise IncompatibleSystemError(
                f"OpenMM cannot make a Context of this System on platform {platform.getName()}: {err}"
            ) from err
        self.context = self.simulation.context
        for name in inputs.names:
            set_parameter(self.context, name, float(inputs.values[0, inputs.names.index(name)]))
        self.n_done = 0
        self.n_steps = 0
        self.n_parts = 0
        self.rows: list[dict[str, Any]] = []
        self.last_saved = time.monotonic()

    def take_frame(self) -> dict[str, Any]:
        """Coordinates, box and dH/dlambda of the Context as it is."""
        query = {"positions": True}
        if self.settings["dhdl"]:
            query |= {"energy": True, "parameterDerivatives": True}
        state = self.context.getState(**query)
        x = state.getPositions(asNumpy=True)._value
        if not np.isfinite(x).all():
            raise blow_up_error(f"{self.what}, iteration {self.n_done}", "coordinates that are not finite")
        row: dict[str, Any] = {"x": np.asarray(x, dtype=np.float32)}
        if self.periodic:
            row["box"] = np.array(state.getPeriodicBoxVectors(asNumpy=True)._value)
        if self.settings["dhdl"]:
            row["dhdl"] = self.derivatives(self.context, state) / self.kT
        return row

    def go(self, stop: Stop, count: Callable[[int], None]) -> dict[str, Any]:
        """Do what is left; the arrays of ``EXCHANGE_FILE``."""
        n_iterations = self.settings["n_iterations"]
        if (self.folder / EXCHANGE_FILE).exists():
            shutil.rmtree(self.parts, ignore_errors=True)
            count(n_iterations * self.n_walkers)
            return read_npz(self.folder / EXCHANGE_FILE)
        self.parts.mkdir(exist_ok=True)
        try:
            self._load()
            count(self.n_done * self.n_walkers)
            self.prepare(stop)
            while self.n_done < n_iterations:
                self.rows.append(self._checked(self.iterate))
                self.n_done += 1
                self.n_steps += self.settings["steps_per_iteration"] * self.n_walkers
                self._save_or_stop(stop, count, end=self.n_done == n_iterations)
        except ConvergenceError as err:
            err.add_note(f"What was computed before is kept in {self.folder}.")
            raise
        return self._finish()

    def _checked(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except mm.OpenMMException as err:
            if "nan" in str(err).lower():
                raise blow_up_error(f"{self.what}, {self.where()}", str(err)) from err
            raise

    # What the two kinds of run do each in its way.
    n_walkers: int

    def prepare(self, stop: Stop) -> None:
        """Bring all walkers to the first iteration."""
        raise NotImplementedError

    def iterate(self) -> dict[str, Any]:
        """One iteration: a row with a frame, u and state of each walker."""
        raise NotImplementedError

    def where(self) -> str:
        """What is being simulated, for messages."""
        return f"iteration {self.n_done}"

    def keep(self) -> dict[str, Any]:
        """Arrays from which :meth:`take_up` goes on."""
        raise NotImplementedError

    def take_up(self, kept: dict[str, Any]) -> None:
        """Go on from what :meth:`keep` gave."""
        raise NotImplementedError

    def totals(self) -> dict[str, Any]:
        """Arrays for the result beside the frames."""
        return {}

    # Parts: part_n.npz holds rows; checkpoint_n.npz goes on after the parts 0 to n - 1.
    def save(self, now: bool = False) -> None:
        """Write what came since the last part, if it is time."""
        if not now and time.monotonic() - self.last_saved < self.checkpoint_seconds:
            return
        if self.rows:
            arrays = {key: np.stack([row[key] for row in self.rows]) for key in self.rows[0]}
            write_npz(self.parts / f"part_{self.n_parts:05d}.npz", **arrays)
            self.rows = []
            self.n_parts += 1
        rng = json.dumps(self.rng.bit_generator.state).encode()
        path = self.parts / f"checkpoint_{self.n_parts:05d}.npz"
        write_npz(
            path,
            context=np.frombuffer(self.context.createCheckpoint(), dtype=np.uint8),
            rng=np.frombuffer(rng, dtype=np.uint8),
            n_done=self.n_done,
            **self.keep(),
        )
        # The part is complete only with its checkpoint: older ones go when the new one is there.
        for old in self.parts.glob("checkpoint_*.npz"):
            if old != path:
                old.unlink()
        self.last_saved = time.monotonic()

    def _save_or_stop(
        self, stop: Stop, count: Callable[[int], None] | None = None, *, end: bool = False
    ) -> None:
        """After an iteration (then with ``count``) or a step of the preparation."""
        # Asked once: a Ctrl-C between saving and stopping would lose what came since.
        stopping = stop.requested
        self.save(end or stopping)
        if count is not None:
            count(self.n_walkers)
        if stopping and not end:
            stop.check(self.folder)

    def _load(self) -> None:
        found = sorted(self.parts.glob("checkpoint_*.npz"))
        if not found:
            if any(self.parts.glob("part_*.npz")):
                raise ResumeError(
                    f"{self.parts}: expected a checkpoint beside the parts, found none; remove the "
                    "folder to begin again."
                )
            return
        path = found[-1]
        self.n_parts = int(path.stem.split("_")[1])
        for part in self.parts.glob("part_*.npz"):
            if int(part.stem.split("_")[1]) >= self.n_parts:  # killed before its checkpoint was there
                part.unlink()
        kept = read_npz(path)
        restore_context(self.context, self.inputs.starts[0], kept["context"].tobytes(), path)
        self.rng.bit_generator.state = json.loads(kept["rng"].tobytes())
        self.n_done = int(kept["n_done"])
        self.derivatives.check(self.context, 0)
        self.take_up(kept)

    def _finish(self) -> dict[str, Any]:
        parts = [read_npz(p) for p in sorted(self.parts.glob("part_*.npz"))]
        arrays = {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
        n_found = len(arrays["u"])
        if n_found != self.settings["n_iterations"]:
            raise ResumeError(
                f"{self.parts}: expected {self.settings['n_iterations']} iterations, found {n_found}; "
                "parts are missing: remove the folder to begin again."
            )
        x, box = arrays.pop("x"), arrays.pop("box", None)
        suffix = self.settings["trajectory"]
        times = self._times()
        for k in range(len(self.inputs.values) if suffix else 0):
            # In order of time; a state that was never visited has no file.
            which = arrays["state"] == k
            if which.any():
                n = np.nonzero(which)[0]
                write_trajectory(
                    state_path(self.folder, k, suffix), x[which], None if box is None else box[which],
                    times[n],
                )  # fmt: skip
        result = {**arrays, **self.totals()}
        write_npz(self.folder / EXCHANGE_FILE, **result)
        shutil.rmtree(self.parts)
        return result

    def _times(self) -> FloatArray:
        """Physical time of each iteration [ps]."""
        s = self.settings
        return np.arange(1, s["n_iterations"] + 1) * (s["steps_per_iteration"] * s["timestep"])

    def run(self, progress: bool | Callable[[int, int], None]) -> ExchangeRun:
        """The whole run, in a folder that is locked for it."""
        started = time.monotonic()
        s, n_states = self.settings, len(self.inputs.values)
        with (
            interrupt_flag() as stop,
            progress_bar(progress, s["n_iterations"] * self.n_walkers, what=self.what) as count,
        ):
            found = self.go(stop, count)
        state = found["state"]
        if found["u"].shape != (s["n_iterations"], self.n_walkers, n_states):
            raise ResumeError(
                f"{self.folder / EXCHANGE_FILE}: expected {s['n_iterations']} iterations of "
                f"{self.n_walkers} walkers, found {found['u'].shape}; remove it to begin again."
            )
        order, replica, iteration = table_order(state)
        u_nk, dhdl = make_tables(
            self.inputs,
            state.ravel()[order],
            self._times()[iteration],
            found["u"].reshape(-1, n_states)[order],
            found["dhdl"].reshape(-1, len(self.inputs.names))[order] if s["dhdl"] else None,
        )
        swaps = swap_statistics(
            state, n_states, proposed=found.get("proposed"), accepted=found.get("accepted")
        )
        paths = [state_path(self.folder, k, s["trajectory"]) for k in range(n_states) if s["trajectory"]]
        trajectories = tuple(p for p in paths if p.exists())
        write_results(
            self.what, self.folder, self.inputs, u_nk, dhdl,
            [*trajectories, self.folder / EXCHANGE_FILE], swaps=swaps.to_dict(),
        )  # fmt: skip
        return ExchangeRun(
            u_nk=u_nk,
            dHdl=dhdl,
            out_dir=self.folder,
            trajectories=trajectories,
            topology=self.folder / TOPOLOGY_FILE,
            states=s["states"],
            temperature=s["temperature"],
            n_steps=self.n_steps,
            seconds=time.monotonic() - started,
            swaps=swaps,
            replica=replica,
            weights=found.get("weights"),
        )


def state_path(folder: Path, k: int, suffix: str) -> Path:
    """Trajectory of state k."""
    return folder / f"state_{k:03d}.{suffix}"


class _Replicas(_Walk):
    """One replica per state."""

    def __init__(self, inputs: RunInputs, folder: Path, checkpoint_seconds: float) -> None:
        super().__init__(inputs, folder, checkpoint_seconds)
        self.n_walkers = len(inputs.values)
        self.context.setPositions(inputs.starts[0])
        self.sampler = _ReplicaSampler(
            inputs.settings["states"], self.simulation, inputs.settings["steps_per_iteration"],
            self.kT, self.rng, self.take_frame,
        )  # fmt: skip
        self.velocity_seeds = [seed_to_int32(self.rng) for _ in range(self.n_walkers)]
        self.n_ready = 0

    def where(self) -> str:
        replica = self.sampler.at_work
        state = self.sampler.replicaStateIndex[replica]
        return f"iteration {self.n_done}, replica {replica} in {self.inputs.state_text(state)}"

    def prepare(self, stop: Stop) -> None:
        s = self.settings
        for k in range(self.n_ready, self.n_walkers):
            self.inputs.set_state(self.context, k)
            self.sampler.at_work = k
            start_context(
                self.context, self.inputs.starts[k], seed=self.velocity_seeds[k],
                temperature=s["temperature"], minimize=s["minimize"],
            )  # fmt: skip
            self.derivatives.check(self.context, k)
            self.context.setStepCount(0)
            self.context.setTime(0.0)
            self.sampler.replicaConformation[k] = self.context.getState(
                positions=True, velocities=True, parameters=True, integratorParameters=True
            )
            self._checked(functools.partial(self.sampler.simulateReplica, k, s["n_equil"]))
            self.n_steps += s["n_equil"]
            self.n_ready = k + 1
            self._save_or_stop(stop)

    def iterate(self) -> dict[str, Any]:
        self.sampler.simulate(1)
        return self.sampler.row

    def keep(self) -> dict[str, Any]:
        ready = self.sampler.replicaConformation[: self.n_ready]
        return {
            # Text with the shortest digits that give back the same numbers, bit by bit.
            "replicas": np.array([mm.XmlSerializer.serialize(c).encode() for c in ready], dtype=bytes),
            "assigned": np.array(self.sampler.replicaStateIndex),
            **self.totals(),
        }

    def take_up(self, kept: dict[str, Any]) -> None:
        self.n_ready = len(kept["replicas"])
        for k, text in enumerate(kept["replicas"]):
            self.sampler.replicaConformation[k] = mm.XmlSerializer.deserialize(text.decode())
        self.sampler.replicaStateIndex = [int(i) for i in kept["assigned"]]
        self.sampler.currentIteration = self.n_done
        self.sampler.proposed, self.sampler.accepted = kept["proposed"], kept["accepted"]

    def totals(self) -> dict[str, Any]:
        return {"proposed": self.sampler.proposed, "accepted": self.sampler.accepted}


class _Expanded(_Walk):
    """One walker; weights are adapted first, then held fixed while frames are taken."""

    what = "expanded ensemble"
    n_walkers = 1

    def __init__(self, inputs: RunInputs, folder: Path, checkpoint_seconds: float) -> None:
        super().__init__(inputs, folder, checkpoint_seconds)
        self.velocity_seed = seed_to_int32(self.rng)
        self.started = False
        self.n_adapted = 0
        self.sampler: _ExpandedSampler | None = None
        self.weights: list[float] | None = self.settings["weights"]

    def _sampler(self, weights: list[float] | None) -> _ExpandedSampler:
        """A sampler that begins in the state and at the time of the Context."""
        self.simulation.reporters.clear()  # the previous sampler's
        made = _ExpandedSampler(
            self.settings["states"], self.simulation, self.settings["steps_per_iteration"],
            weights=None if weights is None else list(weights),
        )  # fmt: skip
        made.rng, made.take_frame, made.row = self.rng, self.take_frame, {}
        return made

    def prepare(self, stop: Stop) -> None:
        s = self.settings
        if not self.started:
            self.inputs.set_state(self.context, 0)
            start_context(
                self.context, self.inputs.starts[0], seed=self.velocity_seed,
                temperature=s["temperature"], minimize=s["minimize"],
            )  # fmt: skip
            self.derivatives.check(self.context, 0)
            step_checked(self.simulation.integrator, s["n_equil"], "expanded ensemble, equilibration")
            self.n_steps += s["n_equil"]
            self.context.setStepCount(0)  # the sampler acts on multiples of its interval
            self.started = True
        if s["weights"] is None:
            if self.sampler is None:
                self.sampler = self._sampler(None)
            while self.n_adapted < s["n_adapt"]:
                self._checked(lambda: self._step(self.sampler))
                self.n_adapted += 1
                self.n_steps += s["steps_per_iteration"]
                self._save_or_stop(stop)
        if self.n_done == 0 and (self.weights is None or self.sampler is None):
            state = 0 if self.sampler is None else self.sampler.currentStateIndex
            if self.weights is None:
                assert self.sampler is not None
                self.weights = [float(w) for w in self.sampler.weights]
            self._fix(state)

    def _fix(self, state: int) -> None:
        """Hold the weights from here on, in this state."""
        self.sampler = self._sampler(self.weights)
        self.sampler.currentStateIndex = state
        self.inputs.set_state(self.context, state)

    def _step(self, sampler: _ExpandedSampler | None) -> None:
        assert sampler is not None
        sampler.step(self.settings["steps_per_iteration"])

    def iterate(self) -> dict[str, Any]:
        self._step(self.sampler)
        assert self.sampler is not None
        return self.sampler.row

    def keep(self) -> dict[str, Any]:
        kept: dict[str, Any] = {"fixed": self.weights}
        if self.sampler is not None:
            kept["state"] = self.sampler.currentStateIndex
            if self.weights is None:
                # All of the adaptation, as OpenMM's own checkpoint has it.
                kept["adaptation"] = {
                    k: v for k, v in self.sampler._createCheckpoint().items() if k != "state"
                }
        text = json.dumps({**kept, "n_adapted": self.n_adapted}).encode()
        return {"sampler": np.frombuffer(text, dtype=np.uint8)}

    def take_up(self, kept: dict[str, Any]) -> None:
        found = json.loads(kept["sampler"].tobytes())
        self.started = True
        self.n_adapted = found["n_adapted"]
        self.weights = found["fixed"]
        if self.weights is not None:
            self._fix(found["state"])
        elif "adaptation" in found:
            self.sampler = self._sampler(None)
            state = self.context.getState(
                positions=True, velocities=True, parameters=True, integratorParameters=True
            )
            self.sampler._applyCheckpoint({**found["adaptation"], "state": state})
            self.inputs.set_state(self.context, found["state"])

    def totals(self) -> dict[str, Any]:
        return {"weights": np.array(self.weights, dtype=np.float64)}


def _check_states(states: Sequence[Mapping[str, float]]) -> None:
    if len(states) < 2:
        raise InputError(f"states: expected at least two to exchange, found {len(states)}.")
    for name in ("temperature", "groups"):
        if any(name in s for s in states):
            raise InputError(
                f"states: expected context parameters, found {name!r}; all states share one temperature "
                "and all force groups here, as the tables do."
            )


def _run(
    kind: type[_Walk], inputs: RunInputs, out_dir: Any, checkpoint_seconds: Any, progress: Any
) -> ExchangeRun:
    check_positive("checkpoint_seconds", checkpoint_seconds)
    folder = make_folder(out_dir)
    with locked(folder):
        check_settings_file(folder, inputs.settings)
        if not (folder / TOPOLOGY_FILE).exists():
            write_pdb(folder / TOPOLOGY_FILE, inputs.topology, inputs.starts[0])
        return kind(inputs, folder, checkpoint_seconds).run(progress)


def run_replica_exchange(
    system: mm.System,
    topology: Any,
    positions: Any,
    states: Sequence[Mapping[str, float]],
    *,
    temperature: Any,
    out_dir: str | os.PathLike[str],
    n_iterations: int,
    steps_per_iteration: int = 500,
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
) -> ExchangeRun:
    r"""Hamiltonian replica exchange between lambda states, in one Context.

    Every iteration, each replica runs in its state, is evaluated in all states, and random pairs
    attempt to exchange states with

    .. math:: P = \min\{1, \exp(u_{i,s_i} - u_{i,s_j} + u_{j,s_j} - u_{j,s_i})\}

    Parameters
    ----------
    system, topology, positions, states, temperature, timestep, friction, platform, minimize, \
    learned, dhdl, checkpoint_seconds
        As for :func:`~openmm_diffforce.windows.run_windows`.
    out_dir : path
        Folder of the run; made if absent. A run in it with the same settings is resumed.
    n_iterations : int
        Iterations, and frames of each state.
    steps_per_iteration : int
        MD steps of each replica between exchanges.
    n_equil : int
        Steps of each replica in its first state, thrown away.
    seed : int
        Velocities, noise and exchanges follow from it.
    trajectory : {"dcd", "xtc", None}
        Format of the trajectories, one file per state (they jump where replicas exchange).
    progress : bool or callable
        A rich progress bar with ETA, nothing, or ``progress(n_done, n_total)`` in frames.

    Returns
    -------
    ExchangeRun
        The tables of ``run_windows``, with swap statistics.

    Raises
    ------
    InputError, UnitsError
        For arguments that do not fit, fewer than two states, or states of other temperatures.
    NotConservativeError
        If a learned force has no energy: exchange is decided by energies.
    ResumeError
        If the folder holds a run with other settings, a damaged one, or one that another process
        is working on.
    ConvergenceError
        If the dynamics becomes unstable; what was computed before stays.
    KeyboardInterrupt
        On Ctrl-C, after the current iteration was saved (a second Ctrl-C stops at once).

    Notes
    -----
    Costs n_states^2 energy evaluations per iteration. On the Reference platform a resumed run is
    bit by bit the uninterrupted one. Velocities are kept in exchanges (all states have the same
    masses and temperature). Frames of one replica are correlated across states: give
    ``estimate_free_energy`` the ``replica`` of the result for its errors.

    References
    ----------
    J. D. Chodera, M. R. Shirts, Replica exchange and expanded ensemble simulations as Gibbs
    sampling, 2011, doi:10.1063/1.3660669.

    Examples
    --------
    >>> import tempfile
    >>> from openmm_diffforce.alanine import alanine_case
    >>> from openmm_diffforce.alchemy import lambda_states
    >>> case = alanine_case("F1")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = run_replica_exchange(
    ...         case.pair.linear_system(), case.topology, case.positions, lambda_states(2),
    ...         temperature=300.0, out_dir=folder, n_iterations=3, steps_per_iteration=10,
    ...         n_equil=10, progress=False,
    ...     )
    >>> run.u_nk.shape, run.swaps.state_of_replica.shape
    ((6, 2), (3, 2))
    """
    _check_states(states)
    inputs = check_inputs(
        system, topology, positions, states, learned=learned, temperature=temperature,
        n_equil=n_equil, timestep=timestep, friction=friction, platform=platform, seed=seed,
        minimize=minimize, trajectory=trajectory, dhdl=dhdl, kind="replica exchange",
        n_iterations=check_positive("n_iterations", n_iterations, integer=True),
        steps_per_iteration=check_positive("steps_per_iteration", steps_per_iteration, integer=True),
    )  # fmt: skip
    return _run(_Replicas, inputs, out_dir, checkpoint_seconds, progress)


def run_expanded_ensemble(
    system: mm.System,
    topology: Any,
    positions: Any,
    states: Sequence[Mapping[str, float]],
    *,
    temperature: Any,
    out_dir: str | os.PathLike[str],
    n_iterations: int,
    steps_per_iteration: int = 100,
    n_adapt: int = 1000,
    weights: Sequence[float] | None = None,
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
) -> ExchangeRun:
    r"""One walker through all lambda states (expanded ensemble).

    After each iteration a state is drawn from :math:`p(k|x) \propto \exp(w_k - u_k(x))`. The
    weights w are adapted first (Wang-Landau, then SAMS, as OpenMM has them); frames are taken with
    the weights held fixed, because while they change no distribution is sampled.

    Parameters
    ----------
    system, topology, positions, states, temperature, timestep, friction, platform, minimize, \
    learned, dhdl, checkpoint_seconds, progress
        As for :func:`run_replica_exchange`; ``positions`` is one frame.
    out_dir : path
    n_iterations : int
        Iterations with fixed weights, and frames in all.
    steps_per_iteration : int
    n_adapt : int
        Iterations that adapt the weights; not used if ``weights`` are given.
    weights : sequence of float, optional
        [kT], one per state; f of the states, known from elsewhere, visits all states equally.
    n_equil, seed, trajectory
        As for :func:`run_replica_exchange`.

    Returns
    -------
    ExchangeRun
        With one replica. ``swaps.occupancy`` says how evenly states were visited; a state that
        never was has no rows in the tables and no trajectory.

    Raises
    ------
    InputError, UnitsError, NotConservativeError, ResumeError, ConvergenceError, KeyboardInterrupt
        As :func:`run_replica_exchange`.
    """
    _check_states(states)
    n_starts = len(check_frames(positions, system.getNumParticles()))
    if n_starts != 1:
        raise InputError(f"positions: expected one frame for one walker, found {n_starts}.")
    fixed = None
    if weights is not None:
        fixed = [float(w) for w in weights]
        if len(fixed) != len(states) or not all(map(math.isfinite, fixed)):
            raise InputError(f"weights: expected {len(states)} finite numbers [kT], found {fixed}.")
        fixed = [w - fixed[0] for w in fixed]
    elif check_count("n_adapt", n_adapt) == 0:
        raise InputError("n_adapt: expected at least one iteration, or weights; found neither.")
    inputs = check_inputs(
        system, topology, positions, states, learned=learned, temperature=temperature,
        n_equil=n_equil, timestep=timestep, friction=friction, platform=platform, seed=seed,
        minimize=minimize, trajectory=trajectory, dhdl=dhdl, kind="expanded ensemble",
        n_iterations=check_positive("n_iterations", n_iterations, integer=True),
        steps_per_iteration=check_positive("steps_per_iteration", steps_per_iteration, integer=True),
        n_adapt=0 if fixed is not None else int(n_adapt), weights=fixed,
    )  # fmt: skip
    return _run(_Expanded, inputs, out_dir, checkpoint_seconds, progress)
