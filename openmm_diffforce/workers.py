"""Work shared out to processes: a System that can travel, and a pool that forgets nothing.

Processes are spawned, because a forked one inherits OpenMM's and torch's threads in a broken
state. Workers ignore Ctrl-C (the parent tells them to stop), and end when their parent does.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any, Protocol

import openmm as mm

from .errors import InputError, WorkerError
from .runs import RunInputs, Stop
from .systems import LEARNED_FORCES, force_type

POLL_SECONDS = 0.1
"""Between two looks at workers, Ctrl-C and progress."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENMM_CPU_THREADS")
"""One worker per core: the libraries in it get one thread each."""


@dataclass(frozen=True)
class Recipe:
    """Inputs of a run in a form that goes to another process.

    A System with a TorchForce cannot be deserialized, so learned forces travel as manifests, and
    everything else as XML; the order of forces is kept, because it is the order of summation.

    Attributes
    ----------
    inputs : RunInputs
        Without the System and the learned forces.
    bare_xml : str
        The System without forces.
    forces : tuple
        XML of a classical force, or (manifest, force group, context parameters) of a learned one.
    """

    inputs: RunInputs
    bare_xml: str
    forces: tuple[str | tuple[dict[str, Any], int, dict[str, float]], ...]

    @classmethod
    def of(cls, inputs: RunInputs) -> "Recipe":
        """Take a run's inputs apart.

        Raises
        ------
        InputError
            For learned forces beside virtual sites, which cannot be copied without XML.
        """
        system = inputs.system
        forces: list[Any] = []
        # The DiffusionForce in hand and the force that the System returns are one C++ object.
        learned = {int(f.this): f for f in inputs.learned if hasattr(f, "this")}
        for force in system.getForces():
            if force_type(force) not in LEARNED_FORCES:
                forces.append(mm.XmlSerializer.serialize(force))
            elif int(force.this) in learned:
                own = learned[int(force.this)]
                forces.append((own.manifest(), own.getForceGroup(), _defaults(own)))
            else:
                raise InputError(
                    "n_workers: expected the very DiffusionForce objects that are in the System as "
                    f"learned=..., found {[type(f).__name__ for f in inputs.learned]}; pass them, or "
                    "use n_workers=1."
                )
        if inputs.learned and any(system.isVirtualSite(i) for i in range(system.getNumParticles())):
            raise InputError(
                "n_workers: expected a System without virtual sites beside a learned force, found "
                "some, and OpenMM cannot copy them; use n_workers=1."
            )
        if inputs.learned:
            bare = mm.System()
            for i in range(system.getNumParticles()):
                bare.addParticle(system.getParticleMass(i))
            for i in range(system.getNumConstraints()):
                bare.addConstraint(*system.getConstraintParameters(i))
            bare.setDefaultPeriodicBoxVectors(*system.getDefaultPeriodicBoxVectors())
            xml = mm.XmlSerializer.serialize(bare)
        else:
            xml, forces = mm.XmlSerializer.serialize(system), []
        return cls(replace(inputs, system=None, learned=()), xml, tuple(forces))  # type: ignore[arg-type]

    def build(self) -> RunInputs:
        """Put the inputs together again, in this process."""
        system = mm.XmlSerializer.deserialize(self.bare_xml)
        learned = []
        for force in self.forces:
            if isinstance(force, str):
                system.addForce(mm.XmlSerializer.deserialize(force))
                continue
            import torch

            from .force import force_from_manifest

            torch.set_num_threads(1)
            manifest, group, defaults = force
            own: Any = force_from_manifest(manifest, self.inputs.topology)
            own.setForceGroup(group)
            for i in range(len(defaults)):
                own.setGlobalParameterDefaultValue(i, defaults[own.getGlobalParameterName(i)])
            system.addForce(own)
            learned.append(own)
        return replace(self.inputs, system=system, learned=tuple(learned))


def _defaults(force: Any) -> dict[str, float]:
    """Default values of a force's context parameters that may have been changed since it was made."""
    if not hasattr(force, "getNumGlobalParameters"):  # PythonForce takes them in its constructor only
        return {}
    n = force.getNumGlobalParameters()
    return {force.getGlobalParameterName(i): force.getGlobalParameterDefaultValue(i) for i in range(n)}


class Task(Protocol):
    """What a worker does with one item; picklable, kept by the worker from item to item."""

    def __call__(self, k: int, stop: Stop, count: Callable[[int], None]) -> int:
        """Do item k; look at ``stop``; count what is done; return the number of steps taken."""


class _ParentStop(Stop):
    """Stop as the parent says."""

    def __init__(self, flag: Any) -> None:
        self.flag = flag

    @property
    def requested(self) -> bool:  # type: ignore[override]
        return bool(self.flag.value)


_WORKER: tuple[Task, Any, Any] | None = None


def _start_worker(task: Task, flag: Any, counts: Any) -> None:
    global _WORKER
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _WORKER = (task, flag, counts)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Otherwise a killed parent leaves workers that write into a run which is being resumed.
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_any([parent.sentinel])
    os._exit(1)


def _work(k: int) -> int:
    assert _WORKER is not None
    task, flag, counts = _WORKER

    def count(n: int) -> None:
        counts[k] += n  # only this worker writes here: no lock that a killed worker could keep

    try:
        return task(k, _ParentStop(flag), count)
    except KeyboardInterrupt:
        return 0  # the parent knows


def share_out(
    task: Task,
    n_items: int,
    *,
    n_workers: int,
    stop: Stop,
    count: Callable[[int], None],
    folder: Path,
) -> int:
    """Do a task for every item in several processes.

    Parameters
    ----------
    task : Task
    n_items, n_workers : int
    stop : Stop
        Of this process; workers are told.
    count : callable
        ``count(n)`` is called here, in this thread, with what workers have done.
    folder : pathlib.Path
        Named in messages.

    Returns
    -------
    int
        Steps taken.

    Raises
    ------
    KeyboardInterrupt
        If ``stop`` was requested, after the workers saved what they had.
    WorkerError
        If a worker died.
    Exception
        The first error of a worker, after the others saved what they had.
    """
    context = multiprocessing.get_context("spawn")
    flag = context.RawValue(ctypes.c_bool, False)
    counts = context.RawArray(ctypes.c_longlong, n_items)
    counted = 0
    with (
        one_thread_each(),
        ProcessPoolExecutor(
            n_workers, mp_context=context, initializer=_start_worker, initargs=(task, flag, counts)
        ) as pool,
    ):
        futures = [pool.submit(_work, k) for k in range(n_items)]
        try:
            pending = set(futures)
            failed = False
            while pending and not failed and not stop.requested:
                done, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_EXCEPTION)
                failed = any(f.exception() is not None for f in done)
                now = sum(counts)
                count(now - counted)
                counted = now
        finally:
            flag.value = True
            pool.shutdown(wait=True, cancel_futures=True)
    stop.check(folder)
    n_steps = 0
    for future in futures:
        if future.cancelled():
            continue
        error = future.exception()
        if isinstance(error, BrokenProcessPool):
            raise WorkerError(
                "a worker process died: killed, out of memory, or unable to start (a script must call "
                f'this under if __name__ == "__main__":); what was saved is in {folder}, and the same '
                "call goes on from there, with fewer n_workers if memory was short."
            ) from error
        if error is not None:
            raise error
        n_steps += future.result()
    return n_steps


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Environment of processes started inside: one thread for each library."""
    kept = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
