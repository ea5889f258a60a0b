"""Two of everything: two learned forces, every integrator, barostats, files to go on from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openmm as mm
import pytest
from openmm import app

from openmm_diffforce import mix
from openmm_diffforce.alanine import TEMPERATURE
from openmm_diffforce.constants import CLASSICAL_GROUP, INTERPOLATE, LEARNED_GROUP
from openmm_diffforce.errors import IncompatibleSystemError
from openmm_diffforce.force import DiffusionForce
from openmm_diffforce.systems import clone_system
from openmm_diffforce.testing import assert_parameter_derivative
from openmm_diffforce.units import thermal_energy

from . import solvated, tiny

BACKENDS = ["python", pytest.param("torchforce", marks=pytest.mark.torchforce)]
SOLUTE = list(range(solvated.N_SOLUTE))


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.export(tmp_path_factory.mktemp("combinations") / "tiny.diffforce")


@pytest.fixture(scope="module")
def learned(artefact: Path) -> Callable[..., DiffusionForce]:
    def make(topology: app.Topology | None = None, **options: Any) -> DiffusionForce:
        atoms = None if topology is None else SOLUTE
        options = {"backend": "python", "atoms": atoms, **options}
        return DiffusionForce(artefact, topology=topology or tiny.case().topology, **options)

    return make


def context_of(
    system: mm.System, x: np.ndarray, integrator: mm.Integrator | None = None, **parameters: float
) -> mm.Context:
    integrator = integrator or mm.LangevinMiddleIntegrator(TEMPERATURE, 1.0, 0.0005)
    context = mm.Context(system, integrator, mm.Platform.getPlatformByName("Reference"))
    context.setPositions(x)
    for name, value in parameters.items():
        context.setParameter(name, value)
    return context


def energy(context: mm.Context, groups: Any = -1) -> float:
    return float(context.getState(energy=True, groups=groups).getPotentialEnergy()._value)


def positions(context: mm.Context) -> np.ndarray:
    return np.array(context.getState(positions=True).getPositions(asNumpy=True)._value)


def vacuum(*forces: mm.Force, base: bool = True) -> mm.System:
    """The dipeptide: classical base (or bare particles) and learned forces."""
    system = clone_system(tiny.case().system_0)
    while not base and system.getNumForces():
        system.removeForce(0)
    for force in forces:
        system.addForce(force)
    return system


# ------------------------------------------------------------------ two learned forces


@pytest.mark.torchforce
def test_two_backends_in_one_system(learned: Callable[..., DiffusionForce]) -> None:
    """Energies add, and each force's parameters and derivatives are its own."""
    one = learned(prefix="one_", backend="python")
    two = learned(prefix="two_", backend="torchforce", mode="operator")
    x = tiny.frame()
    context = context_of(vacuum(one, two, base=False), x)
    one.check(context)
    two.check(context)
    alone = {
        f.prefix: context_of(vacuum(f, base=False), x)
        for f in (learned(prefix="one_"), learned(prefix="two_", mode="operator"))
    }
    for lam_1, lam_2, scale_2 in ((0.3, 0.8, 1.0), (0.3, 0.1, 0.5), (0.9, 0.1, 0.5)):
        for c in (context, alone["one_"]):
            c.setParameter("one_lambda", lam_1)
        for c in (context, alone["two_"]):
            c.setParameter("two_lambda", lam_2)
            c.setParameter("two_scale", scale_2)
        assert energy(context) == pytest.approx(sum(energy(c) for c in alone.values()), rel=1e-10)
        for force, c in ((one, alone["one_"]), (two, alone["two_"])):
            own = force.energy_derivative(context)
            assert_parameter_derivative(c, f"{force.prefix}lambda", own)
            assert_parameter_derivative(context, f"{force.prefix}lambda", own)


@pytest.mark.parametrize(
    "backends",
    [
        ("python", "python"),
        pytest.param(("python", "torchforce"), marks=pytest.mark.torchforce),
        pytest.param(("torchforce", "torchforce"), marks=pytest.mark.torchforce),
    ],
)
def test_one_prefix_twice_is_noticed(
    learned: Callable[..., DiffusionForce], backends: tuple[str, str]
) -> None:
    """OpenMM shares the parameters and says nothing."""
    forces = [learned(backend=b) for b in backends]
    context = context_of(vacuum(*forces), tiny.frame())
    for force in forces:
        with pytest.raises(IncompatibleSystemError, match="2 learned forces with the prefix 'diffforce_'"):
            force.check(context)
    forces = [learned(backend=b, prefix=p) for b, p in zip(backends, ("a_", "b_"), strict=True)]
    context = context_of(vacuum(*forces), tiny.frame())
    for force in forces:
        force.check(context)


def test_a_classical_force_may_share_lambda(learned: Callable[..., DiffusionForce]) -> None:
    """One parameter that drives a learned and a classical operator is an intention."""
    force = learned()
    system = tiny.case().pair.linear_system(parameter=force.parameter("lambda"))
    system.addForce(force)
    force.check(context_of(system, tiny.frame()))


# ------------------------------------------------------------------ integrators


def velocity_verlet(dt: float) -> mm.CustomIntegrator:
    integrator = mm.CustomIntegrator(dt)
    integrator.addUpdateContextState()
    integrator.addComputePerDof("v", "v+0.5*dt*f/m")
    integrator.addComputePerDof("x", "x+dt*v")
    integrator.addComputePerDof("v", "v+0.5*dt*f/m")
    return integrator


def mts(dt: float, n_inner: int) -> mm.CustomIntegrator:
    return mm.MTSIntegrator(dt, [(LEARNED_GROUP, 1), (CLASSICAL_GROUP, n_inner)])


INTEGRATORS: dict[str, Callable[[], mm.Integrator]] = {
    "Verlet": lambda: mm.VerletIntegrator(0.0005),
    "LangevinMiddle": lambda: mm.LangevinMiddleIntegrator(TEMPERATURE, 1.0, 0.0005),
    "Brownian": lambda: mm.BrownianIntegrator(TEMPERATURE, 100.0, 0.0002),
    "NoseHoover": lambda: mm.NoseHooverIntegrator(TEMPERATURE, 1.0, 0.0005),
    "VariableLangevin": lambda: mm.VariableLangevinIntegrator(TEMPERATURE, 1.0, 1e-4),
    "Custom": lambda: velocity_verlet(0.0005),
    "MTS": lambda: mts(0.001, 2),
    "MTSLangevin": lambda: mm.MTSLangevinIntegrator(
        TEMPERATURE, 1.0, 0.001, [(LEARNED_GROUP, 1), (CLASSICAL_GROUP, 2)]
    ),
}


@pytest.mark.parametrize("name", sorted(INTEGRATORS))
@pytest.mark.parametrize("backend", BACKENDS)
def test_integrators(learned: Callable[..., DiffusionForce], backend: str, name: str) -> None:
    force = learned(backend=backend, mode="operator")
    context = context_of(vacuum(force), tiny.frame(), INTEGRATORS[name](), diffforce_lambda=1.0)
    force.check(context)
    context.setVelocitiesToTemperature(TEMPERATURE, 1)
    x = positions(context)
    context.getIntegrator().step(50)
    moved = positions(context)
    assert 1e-4 < np.abs(moved - x).max() < 0.1
    assert np.isfinite(energy(context))
    fresh = context_of(vacuum(learned(backend=backend, mode="operator")), moved, diffforce_lambda=1.0)
    assert energy(context) == pytest.approx(energy(fresh), rel=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_energy_is_conserved(learned: Callable[..., DiffusionForce], backend: str) -> None:
    """Base action alone, no classical term: Verlet keeps the total energy."""
    system = vacuum(learned(backend=backend), base=False)
    context = context_of(system, tiny.frame(), velocity_verlet(0.0001), diffforce_lambda=0.5)
    context.setVelocitiesToTemperature(TEMPERATURE, 2)
    totals = []
    for _ in range(20):
        context.getIntegrator().step(10)
        state = context.getState(energy=True)
        totals.append((state.getPotentialEnergy() + state.getKineticEnergy())._value)
    kinetic = state.getKineticEnergy()._value
    assert kinetic > 10.0
    assert np.ptp(totals) < 2e-3 * kinetic  # of order dt^2


@pytest.mark.parametrize("backend", BACKENDS)
def test_multiple_time_steps(learned: Callable[..., DiffusionForce], backend: str) -> None:
    """One inner step is velocity Verlet; more inner steps stay near it, and save learned steps."""
    paths = []
    for integrator in (velocity_verlet(0.0005), mts(0.0005, 1), mts(0.0005, 4)):
        force = learned(backend=backend, mode="operator")
        context = context_of(vacuum(force), tiny.frame(), integrator, diffforce_lambda=1.0)
        context.setVelocitiesToTemperature(TEMPERATURE, 3)
        integrator.step(20)
        paths.append(positions(context))
    np.testing.assert_allclose(paths[1], paths[0], atol=1e-10)
    difference = np.abs(paths[2] - paths[0]).max()
    assert 1e-7 < difference < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "thermostat", ["MTSLangevin", "NoseHoover", "Andersen", "Compound"]
)  # LangevinMiddle is in test_force
def test_every_thermostats_temperature_is_seen(
    learned: Callable[..., DiffusionForce], backend: str, thermostat: str
) -> None:
    force = learned(backend=backend, mode="operator")
    system = vacuum(force)
    integrator: mm.Integrator
    if thermostat == "MTSLangevin":
        integrator = mm.MTSLangevinIntegrator(310.0, 1.0, 0.001, [(LEARNED_GROUP, 1), (0, 2)])
    elif thermostat == "NoseHoover":
        integrator = mm.NoseHooverIntegrator(310.0, 1.0, 0.001)
    elif thermostat == "Andersen":
        system.addForce(mm.AndersenThermostat(310.0, 1.0))
        integrator = mm.VerletIntegrator(0.001)
    else:
        integrator = mm.CompoundIntegrator()
        integrator.addIntegrator(mm.LangevinMiddleIntegrator(310.0, 1.0, 0.001))
    context = context_of(system, tiny.frame(), integrator)
    with pytest.warns(UserWarning, match="310 K"):
        force.check(context)
    context.setParameter(force.parameter("noise"), 0.1)
    with pytest.raises(IncompatibleSystemError, match="310 K"):
        force.check(context)


def test_a_custom_integrators_other_kt_is_none_of_its_business(
    learned: Callable[..., DiffusionForce],
) -> None:
    force = learned(mode="operator")
    integrator = velocity_verlet(0.001)
    integrator.addGlobalVariable("kT", thermal_energy(TEMPERATURE))
    force.check(context_of(vacuum(force), tiny.frame(), integrator))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["add", "operator"])
def test_minimizer(learned: Callable[..., DiffusionForce], backend: str, mode: str) -> None:
    force = learned(backend=backend, mode=mode)
    system = vacuum(force, base=mode == "operator")
    context = context_of(system, tiny.frame(), diffforce_lambda=0.5)
    before = energy(context)
    mm.LocalEnergyMinimizer.minimize(context, 1.0)
    assert energy(context) < before - 1.0
    force_rms = np.sqrt((context.getState(forces=True).getForces(asNumpy=True)._value ** 2).mean())
    assert force_rms < 1.5


# ------------------------------------------------------------------ barostat


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["operator", "replace", "interpolate"])
def test_a_barostat_moves_molecules_whole(
    learned: Callable[..., DiffusionForce], backend: str, how: str
) -> None:
    """Nothing but volume moves: the learned energy, all of it inside a molecule, stays."""
    world = solvated.box("triclinic")
    classical = clone_system(world.system)
    classical.addForce(mm.MonteCarloBarostat(1.0, TEMPERATURE, 1))
    classical.getForce(classical.getNumForces() - 1).setRandomNumberSeed(3)
    force = learned(world.topology, backend=backend, mode="operator" if how == "operator" else "add")
    if how == "operator":
        system = classical
        system.addForce(force)
    else:
        system = mix(classical, world.topology, force, interpolate=how == "interpolate")
    context = context_of(system, world.positions, mm.VerletIntegrator(1e-9), diffforce_lambda=0.7)
    context.setVelocitiesToTemperature(0.0)
    before = energy(context, {LEARNED_GROUP})
    volume = context.getState().getPeriodicBoxVolume()._value
    context.getIntegrator().step(6)
    assert context.getState().getPeriodicBoxVolume()._value != pytest.approx(volume, rel=1e-6)
    assert energy(context, {LEARNED_GROUP}) == pytest.approx(before, rel=1e-7)
    force.check(context)


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_pressure_dynamics(learned: Callable[..., DiffusionForce], backend: str) -> None:
    """Box, positions and energy belong together after steps of both kinds."""
    world = solvated.box()

    def build() -> mm.System:
        system = clone_system(world.system)
        barostat = mm.MonteCarloBarostat(1.0, TEMPERATURE, 1)
        barostat.setRandomNumberSeed(3)  # unseeded, now and then every move was refused
        system.addForce(barostat)
        return mix(system, world.topology, learned(world.topology, backend=backend))

    context = context_of(build(), world.positions)
    mm.LocalEnergyMinimizer.minimize(context, 100.0, 8)
    context.setVelocitiesToTemperature(TEMPERATURE, 1)
    context.getIntegrator().step(20)
    state = context.getState(positions=True, energy=True, enforcePeriodicBox=True)
    assert state.getPeriodicBoxVolume()._value != pytest.approx(1.9**3, rel=1e-6)
    x = np.array(state.getPositions(asNumpy=True)._value)
    assert np.ptp(x[:22], axis=0).max() < 1.2  # wrapping moved the molecule as one
    fresh = context_of(build(), x)
    fresh.setPeriodicBoxVectors(*state.getPeriodicBoxVectors())
    assert energy(fresh) == pytest.approx(state.getPotentialEnergy()._value, rel=1e-8)


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoints_continue_bit_by_bit(learned: Callable[..., DiffusionForce], backend: str) -> None:
    world = solvated.cluster()

    def build() -> mm.Context:
        force = learned(world.topology, backend=backend)
        integrator = mm.LangevinMiddleIntegrator(TEMPERATURE, 1.0, 0.0002)
        integrator.setRandomNumberSeed(5)
        system = mix(world.system, world.topology, force, interpolate=True)
        return context_of(system, world.positions, integrator)

    context = build()
    context.setParameter(INTERPOLATE, 0.4)
    context.setParameter("diffforce_lambda", 0.3)
    context.setVelocitiesToTemperature(TEMPERATURE, 1)
    context.getIntegrator().step(10)
    checkpoint = context.createCheckpoint()
    context.getIntegrator().step(10)
    expected = positions(context)
    for other in (context, build()):
        other.loadCheckpoint(checkpoint)
        assert other.getParameter(INTERPOLATE) == 0.4
        assert other.getParameter("diffforce_lambda") == 0.3
        other.getIntegrator().step(10)
        assert np.array_equal(positions(other), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_files_continue_bit_by_bit(
    learned: Callable[..., DiffusionForce], backend: str, tmp_path: Path
) -> None:
    """A state file has no random stream, so without a thermostat."""
    world = solvated.cluster()

    def build() -> app.Simulation:
        force = learned(world.topology, backend=backend)
        system = mix(world.system, world.topology, force, interpolate=True)
        platform = mm.Platform.getPlatformByName("Reference")
        simulation = app.Simulation(world.topology, system, mm.VerletIntegrator(0.0002), platform)
        simulation.context.setPositions(world.positions)
        return simulation

    simulation = build()
    simulation.context.setParameter(INTERPOLATE, 0.4)
    simulation.context.setParameter("diffforce_noise", 0.1)
    simulation.context.setVelocitiesToTemperature(TEMPERATURE, 1)
    simulation.step(10)
    simulation.saveState(str(tmp_path / "state.xml"))
    simulation.saveCheckpoint(str(tmp_path / "state.chk"))
    simulation.step(10)
    expected = positions(simulation.context)
    for load, name in ((app.Simulation.loadState, "state.xml"), (app.Simulation.loadCheckpoint, "state.chk")):
        other = build()
        load(other, str(tmp_path / name))
        assert other.context.getParameter("diffforce_noise") == 0.1
        other.step(10)
        assert np.array_equal(positions(other.context), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_derivatives_in_a_custom_integrator(learned: Callable[..., DiffusionForce], backend: str) -> None:
    """Exact, or refused: OpenMM takes a derivative that nobody declares for zero."""

    def attempt(name: str) -> tuple[DiffusionForce, mm.Context]:
        force = learned(backend=backend)
        integrator = velocity_verlet(1e-6)
        integrator.addGlobalVariable("slope", 0.0)
        integrator.addComputeGlobal("slope", f"2*deriv( energy, {name} )")
        return force, context_of(vacuum(force), tiny.frame(), integrator)

    force, context = attempt("diffforce_lambda")
    if backend == "torchforce":
        force.check(context)
        context.getIntegrator().step(1)
        found = context.getIntegrator().getGlobalVariableByName("slope")
        assert found == pytest.approx(2 * force.energy_derivative(context), rel=1e-6)
    else:
        with pytest.raises(IncompatibleSystemError, match=r"diffforce_lambda.*energy_derivative"):
            force.check(context)
    force, context = attempt("diffforce_scale")
    with pytest.raises(IncompatibleSystemError, match="diffforce_scale"):
        force.check(context)
