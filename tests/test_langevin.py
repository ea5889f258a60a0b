"""The harmonic adapter inside OpenMM: the same steps, BrownianIntegrator's ensemble, MALA."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pytest
import torch
from openmm import unit

from openmm_diffforce.artefact import export_artefact
from openmm_diffforce.errors import (
    ConvergenceError,
    IncompatibleSystemError,
    InputError,
    NotConservativeError,
    UnitsError,
)
from openmm_diffforce.force import DiffusionForce
from openmm_diffforce.langevin import DiffusionLangevinIntegrator, independent_then_dynamics
from openmm_diffforce.models.action import ScoreModel, model_fields
from openmm_diffforce.sampler import harmonic_adapter_step
from openmm_diffforce.systems import forces
from openmm_diffforce.units import thermal_energy
from openmm_diffforce.windows import run_windows

from . import tiny

KT = thermal_energy(300.0)
REFERENCE = openmm.Platform.getPlatformByName("Reference")


def well(masses: Any, stiffness: float, power: int = 2) -> openmm.System:
    """Particles that do not see each other, each in stiffness/power * |x|^power [kJ/mol]."""
    system = openmm.System()
    force = openmm.CustomExternalForce(f"{stiffness / power}*(abs(x)^{power}+abs(y)^{power}+abs(z)^{power})")
    for i, mass in enumerate(masses):
        system.addParticle(mass)
        force.addParticle(i)
    system.addForce(force)
    return system


def run(system: openmm.System, integrator: openmm.Integrator, x: Any, n: int = 0) -> openmm.Context:
    context = openmm.Context(system, integrator, REFERENCE)
    context.setPositions(x)
    if n:
        integrator.step(n)
    return context


def positions(context: openmm.Context) -> np.ndarray:
    return np.array(context.getState(positions=True).getPositions(asNumpy=True)._value)


def noise_of(make: Callable[[], DiffusionLangevinIntegrator], masses: Any, n: int = 1) -> np.ndarray:
    """The standard normal numbers of the first n steps, from free particles."""
    system = openmm.System()
    for mass in masses:
        system.addParticle(mass)
    integrator = make()
    context = run(system, integrator, np.zeros((len(masses), 3)))
    root = np.sqrt(integrator.getStiffness(system))[:, None]
    found, before = [], np.zeros((len(masses), 3))
    for _ in range(n):
        integrator.step(1)
        now = positions(context)
        found.append((now - before) * root)
        before = now
    return np.array(found)


MASSES = np.array([1.008, 12.011, 14.007, 15.999])


@pytest.mark.parametrize("mobility", [None, 0.002, [0.001, 0.002, 0.003, 0.004]])
def test_the_same_noise_gives_the_positions_of_the_adapter(mobility: Any) -> None:
    system = well(MASSES, 900.0)

    def make() -> DiffusionLangevinIntegrator:
        friction = 40.0 if mobility is None else None
        return DiffusionLangevinIntegrator(
            300.0, friction, 0.001, mobility=mobility, system=system if mobility is not None else None, seed=3
        )

    xi = noise_of(make, MASSES, 5)
    integrator = make()
    x = np.random.default_rng(1).normal(size=(4, 3)) * 0.05
    context = run(system, integrator, x)
    k = integrator.getStiffness(system)[:, None]
    mu = 1 / (40.0 * MASSES) if mobility is None else np.broadcast_to(mobility, 4)
    np.testing.assert_allclose(k[:, 0], 1 / (2 * KT * mu * 0.001), rtol=1e-12)
    np.testing.assert_allclose(integrator.mobilities(system), mu, rtol=1e-12)
    for n in range(5):
        x = harmonic_adapter_step(x, forces(system, x)[0] / KT, k, xi[n])
        integrator.step(1)
        np.testing.assert_allclose(positions(context), x, atol=1e-12)


def z_of_pooled(x: np.ndarray, mean: float, variance: float) -> tuple[float, float]:
    n = x.size
    return (
        float((x.mean() - mean) / np.sqrt(variance / n)),
        float((x.var() / variance - 1) / np.sqrt(2 / n)),
    )


@pytest.mark.parametrize("kind", ["adapter", "brownian"])
def test_steps_and_ensemble_of_brownian_dynamics(kind: str) -> None:
    """Both integrators against one formula: displacements of a step, then stationary variances."""
    n, stiffness, gamma, dt = 1500, 800.0, 50.0, 0.5
    masses = np.repeat([12.0, 24.0], n)
    system = well(masses, stiffness)
    integrator: Any = (
        DiffusionLangevinIntegrator(300.0, gamma, dt, seed=5)
        if kind == "adapter"
        else openmm.BrownianIntegrator(300.0, gamma, dt)
    )
    if kind == "brownian":
        integrator.setRandomNumberSeed(5)
    context = run(system, integrator, np.full((2 * n, 3), 0.05), 1)
    for part, mass in ((slice(0, n), 12.0), (slice(n, None), 24.0)):
        mu = 1 / (mass * gamma)
        moved = positions(context)[part] - 0.05
        # k = beta m gamma / (2 dt): mean s/(2k), variance 1/k.
        assert np.abs(z_of_pooled(moved, -stiffness * 0.05 * mu * dt, 2 * KT * mu * dt)).max() < 3.5
    integrator.step(60)
    before = positions(context)
    integrator.step(1)
    after = positions(context)
    for part, mass in ((slice(0, n), 12.0), (slice(n, None), 24.0)):
        a = stiffness / (mass * gamma) * dt  # D dt kappa: 2/3 and 1/3
        variance = KT / stiffness / (1 - a / 2)
        assert np.abs(z_of_pooled(after[part], 0.0, variance)).max() < 3.5
        # The mean squared displacement in a stationary run: 2 variance (1 - (1 - a)).
        assert abs(z_of_pooled(after[part] - before[part], 0.0, 2 * variance * a)[1]) < 3.5


def test_the_temperature_acts_through_the_stiffness_alone() -> None:
    """At T' the drift is the same and k = beta' / (2 mu dt): the ensemble is that of T'."""
    n, stiffness = 2000, 800.0
    system = well(np.full(n, 12.0), stiffness)
    integrator = DiffusionLangevinIntegrator(300.0 * unit.kelvin, 50.0 / unit.picosecond, 0.05, seed=2)
    cold = integrator.getStiffness(system)[0]
    integrator.setTemperature(600.0 * unit.kelvin)
    assert integrator.getTemperature().value_in_unit(unit.kelvin) == pytest.approx(600.0)
    assert integrator.getStiffness(system)[0] == pytest.approx(cold / 2)
    x = positions(run(system, integrator, np.zeros((n, 3)), 400))
    a = stiffness / (12.0 * 50.0) * 0.05
    assert np.abs(z_of_pooled(x, 0.0, 2 * KT / stiffness / (1 - a / 2))).max() < 3.5


def test_what_openmm_users_expect() -> None:
    integrator = DiffusionLangevinIntegrator(300.0, 50 / unit.picosecond, 2 * unit.femtosecond)
    assert integrator.getStepSize().value_in_unit(unit.picosecond) == pytest.approx(0.002)
    integrator.setStepSize(1 * unit.femtosecond)
    assert integrator.getStepSize().value_in_unit(unit.picosecond) == pytest.approx(0.001)
    integrator.setFriction(20.0)
    assert integrator.getFriction().value_in_unit(unit.picosecond**-1) == pytest.approx(20.0)
    system = well([10.0], 1.0)
    np.testing.assert_allclose(integrator.getStiffness(system), [10 * 20 / (2 * KT * 0.001)])
    np.testing.assert_allclose(integrator.diffusion(system), [KT / 200])
    with pytest.raises(InputError, match="acceptance_rate"):
        _ = integrator.acceptance_rate


def test_a_seed_gives_one_trajectory_and_another_gives_another() -> None:
    system, x = well(MASSES, 900.0), np.zeros((4, 3))
    ends = [
        positions(run(system, DiffusionLangevinIntegrator(300.0, 40.0, 0.001, seed=s), x, 20))
        for s in (1, 1, 2)
    ]
    np.testing.assert_array_equal(ends[0], ends[1])
    assert np.abs(ends[0] - ends[2]).min() > 0


def test_force_groups() -> None:
    system = well(MASSES, 900.0)
    system.getForce(0).setForceGroup(3)
    make = lambda: DiffusionLangevinIntegrator(300.0, 40.0, 0.001, groups={3}, seed=4)  # noqa: E731
    other = DiffusionLangevinIntegrator(300.0, 40.0, 0.001, groups={4}, seed=4)
    x, xi = np.full((4, 3), 0.1), noise_of(make, MASSES)[0]
    k = other.getStiffness(system)[:, None]
    seen = positions(run(system, make(), x, 1))
    np.testing.assert_allclose(seen, harmonic_adapter_step(x, -900.0 * x / KT, k, xi), atol=1e-12)
    unseen = positions(run(system, other, x, 1))
    np.testing.assert_allclose(unseen, harmonic_adapter_step(x, 0 * x, k, xi), atol=1e-12)


def test_massless_particles_stay() -> None:
    system = well([0.0, 12.0], 900.0)
    integrator = DiffusionLangevinIntegrator(300.0, 40.0, 0.001)
    context = run(system, integrator, np.full((2, 3), 0.1), 50)
    x = positions(context)
    np.testing.assert_array_equal(x[0], 0.1)
    assert np.abs(x[1] - 0.1).min() > 1e-4
    assert integrator.mobilities(system)[0] == 0
    assert np.isinf(integrator.getStiffness(system)[0])


def test_constraints_are_kept_as_brownian_integrator_keeps_them() -> None:
    """The bond keeps its length, and its direction turns as fast in both."""
    system = openmm.System()
    for _ in range(600):
        i = system.addParticle(12.0)
        system.addParticle(12.0)
        system.addConstraint(i, i + 1, 0.15)
    x = np.zeros((1200, 3))
    x[1::2, 0] = 0.15
    turned = []
    for make in (DiffusionLangevinIntegrator, openmm.BrownianIntegrator):
        integrator = make(300.0, 50.0, 0.01)
        integrator.setRandomNumberSeed(8)
        bond = np.diff(positions(run(system, integrator, x, 20)).reshape(600, 2, 3), axis=1)[:, 0]
        np.testing.assert_allclose(np.linalg.norm(bond, axis=1), 0.15, rtol=1e-4)
        turned.append(bond[:, 0] / 0.15)
    mean, error = np.mean(turned, axis=1), np.std(turned, axis=1) / np.sqrt(600)
    assert abs(mean[0] - mean[1]) < 3.5 * np.hypot(*error)
    assert mean[0] < 0.99


def test_a_copy_through_xml_takes_the_same_steps() -> None:
    """It is a plain CustomIntegrator, without the methods of the class."""
    system, x = well(MASSES, 900.0), np.full((4, 3), 0.03)
    integrator = DiffusionLangevinIntegrator(300.0, 40.0, 0.001, seed=6)
    copy = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(integrator))
    assert type(copy) is openmm.CustomIntegrator
    np.testing.assert_array_equal(
        positions(run(system, integrator, x, 30)), positions(run(system, copy, x, 30))
    )


def test_a_checkpoint_goes_on() -> None:
    system, x = well(MASSES, 900.0), np.full((4, 3), 0.03)
    integrator = DiffusionLangevinIntegrator(300.0, 40.0, 0.001, seed=6)
    context = run(system, integrator, x, 10)
    kept = context.createCheckpoint()
    integrator.step(10)
    there = positions(context)
    context.loadCheckpoint(kept)
    integrator.step(10)
    np.testing.assert_array_equal(positions(context), there)


# ------------------------------------------------------------------------------ Metropolis


def moments(system: openmm.System, integrator: Any, n: int, every: int = 10) -> tuple[float, float, float]:
    """Mean of x^2 over particles, axes and time; its error from 20 blocks; the acceptance rate."""
    context = run(system, integrator, np.zeros((system.getNumParticles(), 3)), 200)
    squares = np.empty(n)
    for i in range(n):
        integrator.step(every)
        squares[i] = (positions(context) ** 2).mean()
    blocks = squares.reshape(20, -1).mean(axis=1)
    rate = integrator.acceptance_rate if integrator.metropolis else 1.0
    return float(blocks.mean()), float(blocks.std(ddof=1) / np.sqrt(20)), rate


@pytest.mark.parametrize(("power", "stiffness", "dt"), [(2, 800.0, 0.3), (4, 4e5, 0.1)])
def test_metropolis_removes_the_bias(power: int, stiffness: float, dt: float) -> None:
    """Two masses in a harmonic well (raw steps are wrong by 40 %) and a quartic one (they run away)."""
    system = well([6.0, 12.0], stiffness, power=power)
    grid = np.linspace(-0.5, 0.5, 20001)
    w = np.exp(-stiffness / power * grid**power / KT)
    exact = float(w @ grid**2 / w.sum())
    raw = DiffusionLangevinIntegrator(300.0, 50.0, dt, seed=1)
    biased, error, _ = moments(system, raw, 2000)
    assert not biased - exact < 8 * error  # NaN where they ran away
    mala = DiffusionLangevinIntegrator(300.0, 50.0, dt, metropolis=True, system=system, seed=1)
    value, error, rate = moments(system, mala, 4000)
    assert abs(value - exact) < 3.5 * error
    assert error < 0.03 * exact
    assert 0.3 < rate < 0.98


def test_the_acceptance_rate_is_that_of_mala() -> None:
    """Against MALA in numpy on the same harmonic wells."""
    masses, stiffness, gamma, dt = np.array([6.0, 12.0]), 800.0, 50.0, 0.4
    system = well(masses, stiffness)
    mala = DiffusionLangevinIntegrator(300.0, gamma, dt, metropolis=True, system=system, seed=1)
    context = run(system, mala, np.zeros((2, 3)), 200)
    mala.reset_acceptance()
    assert np.isnan(mala.acceptance_rate)
    mala.step(8000)
    random = np.random.default_rng(2)
    v = np.repeat(KT / (masses * gamma) * dt, 3)  # D dt
    kappa = stiffness / KT
    x = random.standard_normal((8000, 6)) / np.sqrt(kappa)
    y = x - v * kappa * x + np.sqrt(2 * v) * random.standard_normal(x.shape)
    forward, backward = ((((a - b + v * kappa * b) ** 2) / (4 * v)).sum(1) for a, b in ((y, x), (x, y)))
    rate = np.minimum(1, np.exp(kappa / 2 * (x**2 - y**2).sum(1) + forward - backward))
    error = np.hypot(rate.std() / np.sqrt(8000), 2 * np.sqrt(0.25 / 8000))
    assert abs(mala.acceptance_rate - rate.mean()) < 3.5 * error
    del context  # an integrator answers as long as its Context lives


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("langevin")
    bare = folder / "bare.diffforce"

    class Pull(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return -200.0 * (x - x.mean(dim=1, keepdim=True))

    export_artefact(
        ScoreModel(Pull()), bare, graph=tiny.graph(), schedule=tiny.SCHEDULES["VE"], temperature=300.0,
        frames=tiny.frames()[0][:20],
    )  # fmt: skip
    return {"bare": bare, "VP": tiny.export(folder / "VP.diffforce", "VP", operator=False)}


def learned_system(path: Path, backend: str) -> tuple[openmm.System, DiffusionForce]:
    system = openmm.System()
    for atom in range(22):
        system.addParticle(tiny.case().system_0.getParticleMass(atom))
    force = DiffusionForce(path, topology=tiny.case().topology, backend=backend)
    system.addForce(force)
    return system, force


@pytest.mark.parametrize("backend", ["python", pytest.param("torchforce", marks=pytest.mark.torchforce)])
def test_dynamics_at_a_fixed_noise_level(paths: dict[str, Path], backend: str) -> None:
    """F = kT alpha s(alpha x, t) of the artefact; at another temperature than that of training, too."""
    system, force = learned_system(paths["VP"], backend)
    masses = [system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(22)]

    def make() -> DiffusionLangevinIntegrator:
        return DiffusionLangevinIntegrator(350.0, 50.0, 1e-4, learned=force, seed=9)

    x, t = tiny.frame(), 0.3
    integrator = make()
    context = run(system, integrator, x)
    context.setParameter(force.parameter("noise"), t)
    integrator.step(1)
    alpha = float(tiny.SCHEDULES["VP"].alpha(t))
    drift = -alpha * model_fields(tiny.model("VP", False), alpha * x[None], t=t)[1][0] * KT
    k = integrator.getStiffness(system)[:, None]
    want = harmonic_adapter_step(x, drift / thermal_energy(350.0), k, noise_of(make, masses)[0])
    np.testing.assert_allclose(positions(context), want, atol=1e-12 if backend == "python" else 1e-9)
    # The temperature differs at noise > 0: DiffusionForce.check refuses, and the integrator asks it.
    with pytest.raises(IncompatibleSystemError, match="350 K"):
        integrator.check(context)


def test_a_bare_score_drives_dynamics_but_no_metropolis(paths: dict[str, Path]) -> None:
    system, force = learned_system(paths["bare"], "python")
    with pytest.raises(NotConservativeError, match=r"Metropolis correction: needs an energy"):
        DiffusionLangevinIntegrator(300.0, 50.0, 1e-3, metropolis=True, system=system, learned=force)
    x = tiny.frame()
    plain = DiffusionLangevinIntegrator(300.0, 50.0, 1e-3, learned=force)
    assert np.isfinite(positions(run(system, plain, x, 5))).all()
    # Not told of the force, it finds out at the first step.
    with pytest.raises(NotConservativeError, match="found NaN"):
        run(system, DiffusionLangevinIntegrator(300.0, 50.0, 1e-3, metropolis=True, system=system), x, 1)


# --------------------------------------------------------------------- independent starts


def test_independent_starts_then_dynamics() -> None:
    """From exact samples of a well: every run stays in its ensemble, and starts where it was put."""
    system = well([12.0] * 5, 800.0)
    starts = np.random.default_rng(1).normal(size=(40, 5, 3)) * np.sqrt(KT / 800.0)
    done: list[tuple[int, int]] = []
    x = independent_then_dynamics(
        system, starts, DiffusionLangevinIntegrator(300.0, 50.0, 0.05, seed=3), n_frames=4, interval=20,
        progress=lambda i, n: done.append((i, n)),
    ).frames  # fmt: skip
    assert x.shape == (40, 4, 5, 3)
    assert done[-1] == (40, 40)
    a = 800.0 / (12 * 50) * 0.05
    assert abs(z_of_pooled(x[:, -1], 0.0, KT / 800.0 / (1 - a / 2))[1]) < 3.5
    one = independent_then_dynamics(
        system, starts, DiffusionLangevinIntegrator(300.0, 50.0, 1e-6, seed=3), n_frames=1, interval=1
    ).frames
    np.testing.assert_allclose(one[:, 0], starts, atol=1e-3)


def test_unstable_dynamics_is_said() -> None:
    system = well([12.0], 1e6, power=4)
    integrator = DiffusionLangevinIntegrator(300.0, 50.0, 5.0)
    with pytest.raises(ConvergenceError, match="unstable"):
        independent_then_dynamics(system, np.ones((1, 1, 3)), integrator, n_frames=1, interval=50)


def constrained() -> openmm.System:
    system = well([12.0, 12.0], 1.0)
    system.addConstraint(0, 1, 0.1)
    return system


def with_site() -> openmm.System:
    system = well([12.0, 12.0], 1.0)
    system.addParticle(0.0)
    system.setVirtualSite(2, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    return system


def test_windows_refuse_an_unknown_integrator(tmp_path: Path) -> None:
    case = tiny.case()
    with pytest.raises(InputError, match='integrator: expected "langevin" or "diffusion"'):
        run_windows(
            case.system_0, case.topology, case.positions, [{"lambda": 0.0}], temperature=300.0,
            out_dir=tmp_path, n_frames=1, integrator="brownian",
        )  # fmt: skip


Make = DiffusionLangevinIntegrator
TWO = well([12.0, 12.0], 1.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Make(0.0, 1.0, 0.001), UnitsError, "temperature"),
        (lambda: Make(-1.0, 1.0, 0.001), UnitsError, "temperature"),
        (lambda: Make(float("nan"), 1.0, 0.001), UnitsError, "temperature"),
        (lambda: Make(300 * unit.picosecond, 1.0, 0.001), UnitsError, "temperature"),
        (lambda: Make(300.0, 0.0, 0.001), InputError, "friction: expected a finite"),
        (lambda: Make(300.0, float("inf"), 0.001), InputError, "friction"),
        (lambda: Make(300.0, 1.0 * unit.nanometer, 0.001), UnitsError, "friction"),
        (lambda: Make(300.0, 1.0, 0.0), InputError, "step_size"),
        (lambda: Make(300.0, 1.0, -0.001), InputError, "step_size"),
        (lambda: Make(300.0, 1.0, float("nan")), InputError, "step_size"),
        (lambda: Make(300.0, 1.0, 1.0 * unit.kelvin), UnitsError, "step_size"),
        (lambda: Make(300.0, None, 0.001), InputError, "exactly one of them.*found neither"),
        (lambda: Make(300.0, 1.0, 0.001, mobility=1.0, system=TWO), InputError, "found both"),
        (lambda: Make(300.0, None, 0.001, mobility=0.0, system=TWO), InputError, "mobility"),
        (lambda: Make(300.0, None, 0.001, mobility=[1.0], system=TWO), InputError, "one per particle"),
        (lambda: Make(300.0, None, 0.001, mobility=1.0 * unit.nanometer, system=TWO), UnitsError, "mobility"),
        (lambda: Make(300.0, None, 0.001, mobility=1.0), InputError, "system: expected the System"),
        (lambda: Make(300.0, 1.0, 0.001, metropolis=True), InputError, "system: expected the System"),
        (lambda: Make(300.0, 1.0, 0.001, groups={40}), InputError, "groups"),
        (lambda: Make(300.0, 1.0, 0.001, seed=-1), InputError, "seed"),
        (lambda: Make(300.0, None, 0.001, mobility=1.0, system=constrained()), IncompatibleSystemError,
         "mobility: expected a System without constraints"),
        (lambda: Make(300.0, 1.0, 0.001, metropolis=True, system=constrained()), IncompatibleSystemError,
         "metropolis: expected a System without constraints"),
        (lambda: Make(300.0, 1.0, 0.001, metropolis=True, system=with_site()), IncompatibleSystemError,
         "virtual sites"),
        (lambda: Make(300.0, 1.0, 0.001).setTemperature(0.0), UnitsError, "temperature"),
        (lambda: Make(300.0, 1.0, 0.001).setStepSize(0.0), InputError, "step_size"),
        (lambda: Make(300.0, 1.0, 0.001).setFriction(-1.0), InputError, "friction"),
        (lambda: Make(300.0, None, 0.001, mobility=1.0, system=TWO).getFriction(), InputError, "friction"),
        (lambda: independent_then_dynamics(TWO, np.zeros((1, 3, 3)), Make(300.0, 1.0, 0.001), n_frames=1,
                                           interval=1), InputError, "starts"),
        (lambda: independent_then_dynamics(TWO, np.zeros((1, 2, 3)), Make(300.0, 1.0, 0.001), n_frames=0,
                                           interval=1), InputError, "n_frames"),
        (lambda: independent_then_dynamics(TWO, np.zeros((1, 2, 3)), Make(300.0, 1.0, 0.001), n_frames=1,
                                           interval=1, n_equil=-1), InputError, "n_equil"),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with warnings.catch_warnings(), pytest.raises(error, match=message):
        call()
