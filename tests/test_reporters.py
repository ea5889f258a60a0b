"""DomainReporter: inside, outside, warning, stopping; as OpenMM calls it."""

import copy
import csv
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import openmm as mm
import pytest
import torch
from openmm import app

from openmm_diffforce.errors import DomainError, InputError
from openmm_diffforce.force import DiffusionForce
from openmm_diffforce.models.physics import outside_fraction
from openmm_diffforce.reporters import DomainReporter, _physical_tables
from openmm_diffforce.systems import clone_system

from . import tiny


def simulation(folder: Path, box: float | None = None) -> tuple[app.Simulation, DiffusionForce]:
    case = tiny.case()
    path = tiny.export(folder / "tiny.diffforce")
    topology = copy.deepcopy(case.topology)  # a Modeller would share it with other tests
    if box is not None:
        topology.setPeriodicBoxVectors(np.eye(3) * box)
    system = clone_system(case.system_0)
    force = DiffusionForce(path, topology=topology, mode="operator", backend="python")
    system.addForce(force)
    integrator = mm.LangevinMiddleIntegrator(300.0, 5.0, 0.0005)
    integrator.setRandomNumberSeed(4)
    made = app.Simulation(topology, system, integrator, mm.Platform.getPlatformByName("Reference"))
    if box is not None:
        made.context.setPeriodicBoxVectors(*(np.eye(3) * box))
    made.context.setPositions(tiny.frames()[0][-1])
    return made, force


def look(made: app.Simulation, reporter: DomainReporter, x: np.ndarray) -> None:
    made.context.setPositions(x)
    reporter.report(made, made.context.getState(positions=True))


def test_same_judgement_as_outside_fraction(tmp_path: Path) -> None:
    made, force = simulation(tmp_path)
    stream = io.StringIO()
    reporter = DomainReporter(force, 5, file=stream, action="record")
    rng = np.random.default_rng(1)
    x = tiny.frames()[0][:30]
    x = np.concatenate([x, x + rng.normal(size=x.shape) * 0.004])
    for frame in x:
        look(made, reporter, frame)
    total, by_role = outside_fraction(x, tiny.tables()[0])
    assert 0 < total < 1
    assert reporter.fractions["any"] == pytest.approx(total)
    for role in reporter.roles:
        assert reporter.fractions[role] == pytest.approx(by_role[role])
    rows = list(csv.DictReader(io.StringIO(stream.getvalue())))
    assert len(rows) == 60
    assert sum(int(r["any"]) for r in rows) == reporter.n_outside["any"]
    assert float(rows[-1]["fraction_any"]) == pytest.approx(total)


def test_in_a_simulation(tmp_path: Path) -> None:
    made, force = simulation(tmp_path)
    reporter = DomainReporter(force, 5, file=tmp_path / "domain.csv", action="record")
    made.reporters.append(reporter)
    made.step(20)
    assert [r["step"] for r in reporter.rows] == [5, 10, 15, 20]
    assert reporter.rows[-1]["time_ps"] == pytest.approx(0.01)
    assert len((tmp_path / "domain.csv").read_text().splitlines()) == 5


def pulled() -> np.ndarray:
    """The last atom, a methyl hydrogen, torn off by 0.1 nm along its bond."""
    x = tiny.frames()[0][-1].copy()
    near = tiny.graph().neighbours()[21][0]
    bond = x[21] - x[near]
    x[21] += 0.1 * bond / np.linalg.norm(bond)
    return x


def test_pulled_out_of_range_warns_once(tmp_path: Path) -> None:
    made, force = simulation(tmp_path)
    reporter = DomainReporter(force, 5, threshold=0.5, min_frames=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look(made, reporter, tiny.frames()[0][-1])
        assert reporter.last is None
        look(made, reporter, pulled())  # half outside: not above the threshold
    with pytest.warns(UserWarning, match="67% of 3 .*bond") as caught:
        look(made, reporter, pulled())
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look(made, reporter, pulled())
    assert reporter.last is not None
    assert reporter.last.value > reporter.last.high
    assert "nm (trained" in str(reporter.last) or "rad (trained" in str(reporter.last)


def test_pulled_out_of_range_stops(tmp_path: Path) -> None:
    made, force = simulation(tmp_path)
    made.reporters.append(DomainReporter(force, 1, action="stop", threshold=0.5, min_frames=1))
    made.context.setPositions(pulled())
    with pytest.raises(DomainError, match="training range"):
        made.step(10)
    assert made.currentStep == 1


def test_wrapped_molecules_are_made_whole(tmp_path: Path) -> None:
    made, force = simulation(tmp_path, box=3.0)
    reporter = DomainReporter(force, 5, action="record")
    # Training frames define the edges: take one that is on none of them.
    noise = 1e-6 * np.random.default_rng(0).normal(size=(22, 3))
    inside = next(x for x in tiny.frames()[0] if outside_fraction([x + noise], tiny.tables()[0])[0] == 0)
    x = inside + noise - inside.mean(axis=0)
    assert (np.ptp(x % 3.0, axis=0) > 2.0).any()
    look(made, reporter, x % 3.0)
    assert reporter.n_outside["any"] == 0


def test_the_range_follows_the_noise(tmp_path: Path) -> None:
    made, force = simulation(tmp_path)
    reporter = DomainReporter(force, 5, action="record")
    x = tiny.frames()[0][-1] + np.random.default_rng(3).normal(size=(22, 3)) * 0.05
    look(made, reporter, x)
    made.context.setParameter(force.parameter("noise"), 1.0)
    look(made, reporter, x)
    clean, noised = (sum(r[role] for role in reporter.roles) for r in reporter.rows)
    assert noised < clean


class Residual(torch.nn.Module):
    """Something on top of a physical model."""

    def __init__(self) -> None:
        super().__init__()
        self.base = tiny.model()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: torch.Tensor, t: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
        return self.base(x, t, lam) + self.weight * x.sum()


def test_physical_part_of_another_model() -> None:
    found = _physical_tables(torch.jit.script(Residual()), tiny.graph())
    assert np.array_equal(found.grid, tiny.tables()[0].grid)
    with pytest.raises(InputError, match="holds a PhysicalModel"):
        _physical_tables(torch.nn.Linear(1, 1), tiny.graph())


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"threshold": 0.0}, "threshold"),
        ({"threshold": 1.5}, "threshold"),
        ({"action": "shout"}, "action"),
        ({"report_interval": 0}, "report_interval"),
        ({"min_frames": 0}, "min_frames"),
        ({"force": mm.HarmonicBondForce()}, "DiffusionForce"),
        ({"file": "/nowhere/at/all.csv"}, "file"),
    ],
)
def test_bad_input(tmp_path: Path, bad: dict[str, Any], word: str) -> None:
    _, force = simulation(tmp_path)
    args = {"force": force, "report_interval": 5, **bad}
    with pytest.raises(InputError, match=word):
        DomainReporter(args.pop("force"), args.pop("report_interval"), **args)
