"""A small fitted model of alanine dipeptide (F1), made once per test run in about a second.

Good enough to have every part of a real one; not good enough to describe the molecule.
"""

from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from openmm_diffforce import training
from openmm_diffforce.alanine import TEMPERATURE, AlanineCase, alanine_case
from openmm_diffforce.alchemy import lambda_states
from openmm_diffforce.analysis import trajectory_of
from openmm_diffforce.artefact import export_artefact
from openmm_diffforce.models.graph import MolecularGraph
from openmm_diffforce.models.physics import BaseTables, OperatorTables, PhysicalModel
from openmm_diffforce.schedule import VESchedule, VPSchedule
from openmm_diffforce.systems import graph_from_topology, sample
from openmm_diffforce.windows import run_windows

SIGMA_KNOTS = (0.0, 0.01, 0.05)
SCHEDULES: dict[str, Any] = {
    "VE": VESchedule(0.05),
    "VP": VPSchedule(beta_min=0.1, beta_max=2.0, length=0.03),  # sigma/alpha = 0.041 nm at t = 1
}


@cache
def case() -> AlanineCase:
    return alanine_case("F1")


@cache
def graph() -> MolecularGraph:
    return graph_from_topology(case().topology)


@cache
def frames() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x_0, o_0, x_1, o_1: 150 frames of each end and the operator on them."""
    c = case()
    out = []
    for end, system in enumerate((c.system_0, c.system_1)):
        x = sample(
            system, c.topology, c.positions, temperature=TEMPERATURE, n_frames=150, interval=20,
            timestep=0.001, friction=5.0, n_equil=500, seed=11 + end,
        )  # fmt: skip
        out += [x, c.pair.operator_values(x)]
    return tuple(out)  # type: ignore[return-value]


def save_ends(folder: Path, n_frames: int, suffixes: tuple[str, ...] = ("dcd",)) -> None:
    """The first frames of both ends as 0.dcd, 1.dcd and so on."""
    for end in (0, 1):
        trajectory = trajectory_of(frames()[2 * end][:n_frames], case().topology)
        for suffix in suffixes:
            trajectory.save(str(folder / f"{end}.{suffix}"))


def save_run(folder: Path, n_windows: int, n_frames: int) -> None:
    """A short run of lambda windows."""
    c = case()
    run_windows(
        c.pair.linear_system(), c.topology, c.positions, lambda_states(n_windows), temperature=TEMPERATURE,
        out_dir=folder, n_frames=n_frames, interval=5, n_equil=50, progress=False,
    )  # fmt: skip


def frame() -> np.ndarray:
    """One frame [n_atoms, 3] off the edges of the splines, where the second derivative jumps.

    (The smallest and largest value of a coordinate in the training frames are its edges.)
    """
    noise = np.random.default_rng(21).standard_normal((graph().n_atoms, 3))
    return frames()[0][-1] + 1e-3 * noise


def few_coefs(n: int = 5) -> Any:
    """Context in which every class of the base action has ``n`` coefficients."""
    return mock.patch.dict(training.N_COEFS, dict.fromkeys(training.N_COEFS, n))


@cache
def tables() -> tuple[BaseTables, OperatorTables]:
    x_0, o_0, x_1, o_1 = frames()
    generator = np.random.default_rng(5)
    with few_coefs():
        base = training.fit_base_action(x_0, graph(), sigma_knots=SIGMA_KNOTS, generator=generator, n_draws=1)
    operator = training.fit_operator(
        x_0, o_0, x_1, o_1, graph(), case().perturbed, sigma_knots=SIGMA_KNOTS, generator=generator,
        n_draws=1,
    )  # fmt: skip
    return base.tables, operator.tables


@cache
def model(kind: str = "VE", operator: bool = True) -> PhysicalModel:
    base, pairs = tables()
    return PhysicalModel(base, pairs if operator else None, SCHEDULES[kind])


def export(path: Path, kind: str = "VE", operator: bool = True, **metadata: Any) -> Path:
    """Write the tiny model to ``path``."""
    export_artefact(
        model(kind, operator), path,
        **{"graph": graph(), "schedule": SCHEDULES[kind], "temperature": TEMPERATURE, **metadata},
    )  # fmt: skip
    return path
