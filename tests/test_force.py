"""DiffusionForce: derivatives, symmetries and agreement of its backends, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit

from openmm_diffforce.alanine import TEMPERATURE
from openmm_diffforce.constants import LEARNED_GROUP
from openmm_diffforce.errors import (
    DiffForceError,
    IncompatibleSystemError,
    InputError,
    MissingDependencyError,
    ModelError,
)
from openmm_diffforce.force import (
    DiffusionForce,
    available_backends,
    force_from_manifest,
)
from openmm_diffforce.testing import assert_forces_match_energy, assert_parameter_derivative
from openmm_diffforce.units import thermal_energy

from . import tiny

REL_F64 = 1e-10
"""Two ways to the same float64 energy or force."""

BACKENDS = ["python", pytest.param("torchforce", marks=pytest.mark.torchforce)]
MODES = ["add", "operator"]
DISPLACED = (0, 4, 6, 10, 11, 12, 17)
"""Atoms that finite differences displace: C-beta and its hydrogens among them."""


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("artefacts")
    out = {kind: tiny.export(folder / f"{kind}.diffforce", kind) for kind in ("VE", "VP")}
    out["base"] = tiny.export(folder / "base.diffforce", operator=False)
    return out


@pytest.fixture(scope="module")
def build(artefacts: dict[str, Path]) -> Callable[..., DiffusionForce]:
    def make(kind: str = "VE", **options: Any) -> DiffusionForce:
        options = {"topology": tiny.case().topology, "backend": "python", **options}
        return DiffusionForce(artefacts[kind], **options)

    return make


def system_of(n_atoms: int, *forces: DiffusionForce, box: Any = None) -> openmm.System:
    system = openmm.System()
    for _ in range(n_atoms):
        system.addParticle(12.0)
    if box is not None:
        system.setDefaultPeriodicBoxVectors(*(openmm.Vec3(*v) for v in box))
    for force in forces:
        system.addForce(force)
    return system


def context_of(
    force: DiffusionForce, x: np.ndarray | None = None, *, box: Any = None, temperature: float = TEMPERATURE,
    system: openmm.System | None = None, **parameters: float,
) -> openmm.Context:  # fmt: skip
    """Context at ``tiny.frame()``; ``parameters`` are lambda_, noise, scale."""
    x = tiny.frame() if x is None else x
    system = system or system_of(len(x), force, box=box)
    context = openmm.Context(
        system, openmm.LangevinMiddleIntegrator(temperature, 1.0, 0.001),
        openmm.Platform.getPlatformByName("Reference"),
    )  # fmt: skip
    context.setPositions(x)
    for name, value in parameters.items():
        context.setParameter(force.parameter(name.rstrip("_")), value)
    return context


def energy_and_forces(context: openmm.Context, groups: Any = -1) -> tuple[float, np.ndarray]:
    state = context.getState(energy=True, forces=True, groups=groups)
    return state.getPotentialEnergy()._value, np.array(state.getForces(asNumpy=True)._value)


def assert_same(found: tuple[float, np.ndarray], expected: tuple[float, np.ndarray]) -> None:
    """Energies and forces agree, relative to the forces' norm (1 nm turns it into an energy)."""
    size = np.linalg.norm(expected[1])
    assert size > 1.0  # two zeros agree for nothing
    assert abs(found[0] - expected[0]) <= REL_F64 * max(abs(expected[0]), size)
    assert np.linalg.norm(found[1] - expected[1]) <= REL_F64 * size


# ------------------------------------------------------------------ derivatives


@pytest.mark.parametrize("kind", ["VE", "VP"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forces_and_lambda_derivative_are_the_energys(build, backend, mode, kind):
    force = build(kind, mode=mode, backend=backend)
    context = context_of(force, lambda_=0.3, scale=0.7)
    for noise in (0.0, 0.4):
        context.setParameter(force.parameter("noise"), noise)
        assert np.linalg.norm(energy_and_forces(context)[1]) > 1.0
        assert_forces_match_energy(context, atoms=DISPLACED)
        derivative = force.energy_derivative(context)
        assert abs(derivative) > 1e-3
        assert_parameter_derivative(context, force.parameter("lambda"), derivative)


def test_forces_outside_the_data(build):
    """Far from every training frame the walls and linear continuations are conservative too."""
    x = tiny.frame() + 0.03 * np.random.default_rng(1).standard_normal((22, 3))
    for kind in ("VE", "VP"):
        context = context_of(build(kind), x, lambda_=0.3, noise=0.2)
        assert_forces_match_energy(context, atoms=DISPLACED)


@pytest.mark.torchforce
def test_openmm_reports_the_lambda_derivative_of_torchforce(build):
    force = build(mode="add", backend="torchforce")
    context = context_of(force, lambda_=0.6, noise=0.3)
    state = context.getState(parameterDerivatives=True)
    found = state.getEnergyParameterDerivatives()[force.parameter("lambda")]
    assert found == pytest.approx(force.energy_derivative(context), rel=1e-12)
    twin = build(mode="add")
    other = context_of(twin, lambda_=0.6, noise=0.3)
    assert found == pytest.approx(twin.energy_derivative(other), rel=REL_F64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["VE", "VP"])
def test_energy_is_the_models_action_at_scaled_coordinates(build, kind, backend):
    # U = c kT S(alpha x, t, lam), here without the force's code.
    force = build(kind, backend=backend)
    context = context_of(force, lambda_=0.3, noise=0.4, scale=0.7)
    alpha = tiny.SCHEDULES[kind].alpha(0.4)
    y = torch.as_tensor(tiny.frame()[None]) * alpha
    action = tiny.model(kind)(y, *torch.tensor([[0.4], [0.3]], dtype=torch.float64))
    expected = 0.7 * thermal_energy(TEMPERATURE) * float(action)
    assert energy_and_forces(context)[0] == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------------ agreement and symmetry


@pytest.mark.torchforce
@pytest.mark.parametrize("kind", ["VE", "VP"])
@pytest.mark.parametrize("mode", MODES)
def test_backends_agree(build, mode, kind):
    contexts = [context_of(build(kind, mode=mode, backend=b), lambda_=0.3) for b in ("python", "torchforce")]
    for noise in (0.0, 0.4, 1.0):
        for context in contexts:
            context.setParameter("diffforce_noise", noise)
        assert_same(*(energy_and_forces(c) for c in contexts))


def rotation(seed: int) -> np.ndarray:
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.sign(np.linalg.det(q))


@pytest.mark.parametrize("mode", MODES)
def test_translation_and_rotation(build, mode):
    force = build("VP", mode=mode)
    x = tiny.frame()
    context = context_of(force, x, lambda_=0.5, noise=0.4)
    energy, forces = energy_and_forces(context)
    q = rotation(3)
    context.setPositions(x @ q.T + np.array([1.0, -2.0, 0.5]))
    assert_same(energy_and_forces(context), (energy, forces @ q.T))
    assert np.linalg.norm(forces.sum(axis=0)) <= REL_F64 * np.linalg.norm(forces)
    torque = np.cross(x - x.mean(axis=0), forces).sum(axis=0)
    assert np.linalg.norm(torque) <= REL_F64 * np.linalg.norm(forces)


BOXES = {
    "orthorhombic": [[1.7, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.9]],
    "triclinic": [[1.9, 0.0, 0.0], [0.6, 1.8, 0.0], [-0.7, 0.8, 1.7]],
}


def in_box(topology: app.Topology, box: Any) -> app.Topology:
    topology.setPeriodicBoxVectors([openmm.Vec3(*v) for v in box] * unit.nanometer)
    return topology


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", sorted(BOXES))
def test_lattice_shifts_of_single_atoms_change_nothing(build, shape, backend):
    box = np.array(BOXES[shape])
    force = build("VP", backend=backend, topology=in_box(solvated(np.arange(22), 0), box))
    assert force.usesPeriodicBoundaryConditions()
    x = tiny.frame()
    open_field = energy_and_forces(context_of(build("VP"), x, lambda_=0.5, noise=0.4))
    context = context_of(force, x, box=box, lambda_=0.5, noise=0.4)
    assert_same(energy_and_forces(context), open_field)
    derivative = force.energy_derivative(context)
    generator = np.random.default_rng(8)
    for _ in range(3):
        context.setPositions(x + generator.integers(-2, 3, (len(x), 3)) @ box)
        assert_same(energy_and_forces(context), open_field)
        assert force.energy_derivative(context) == pytest.approx(derivative, rel=REL_F64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_contexts_box_counts_not_the_topologys(build, backend):
    box = np.array(BOXES["triclinic"])
    force = build(backend=backend, topology=in_box(solvated(np.arange(22), 0), box))
    x = tiny.frame()
    expected = energy_and_forces(context_of(build(), x))
    context = context_of(force, x, box=box)
    larger = 1.2 * box
    context.setPeriodicBoxVectors(*larger)
    shifts = np.random.default_rng(9).integers(-1, 2, (len(x), 3))
    context.setPositions(x + shifts @ larger)
    assert_same(energy_and_forces(context), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_box_lattice_shifts_do_count(build, backend):
    x = tiny.frame().copy()
    context = context_of(build(backend=backend), x)
    energy = energy_and_forces(context)[0]
    x[3] += [1.7, 0.0, 0.0]
    context.setPositions(x)
    assert energy_and_forces(context)[0] > energy + 1.0


def solvated(order: np.ndarray, n_argon: int) -> app.Topology:
    """Alanine dipeptide with its atoms in another order, argon before and after."""
    source = list(tiny.case().topology.atoms())
    topology = app.Topology()
    chain = topology.addChain()

    def argon(number: int) -> None:
        for _ in range(number):
            residue = topology.addResidue("AR", chain)
            topology.addAtom("AR", app.Element.getBySymbol("Ar"), residue)

    argon(n_argon)
    residue = topology.addResidue("MOL", chain)
    placed = {int(k): topology.addAtom(source[k].name, source[k].element, residue) for k in order}
    for bond in tiny.case().topology.bonds():
        topology.addBond(placed[bond[0].index], placed[bond[1].index])
    argon(n_argon)
    return topology


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_molecule_among_others_feels_what_it_feels_alone(build, backend, mode, permuted):
    n_argon = 2
    x = tiny.frame()
    n = len(x)
    order = np.random.default_rng(4).permutation(n) if permuted else np.arange(n)
    atoms = n_argon + np.argsort(order)  # where each atom of the artefact is in the System
    force = build(backend=backend, mode=mode, topology=solvated(order, n_argon), atoms=atoms.tolist())
    far = np.arange(3.0 * n_argon).reshape(-1, 3)
    context = context_of(force, np.concatenate([far, x[order], -far]), lambda_=0.5, noise=0.4)
    alone_force = build(mode=mode)
    alone = context_of(alone_force, x, lambda_=0.5, noise=0.4)
    energy, forces = energy_and_forces(context)
    assert_same((energy, forces[atoms]), energy_and_forces(alone))
    others = np.setdiff1d(np.arange(n + 2 * n_argon), atoms)
    assert not forces[others].any()
    assert force.energy_derivative(context) == pytest.approx(
        alone_force.energy_derivative(alone), rel=REL_F64
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuted_subset_in_a_periodic_box(build, backend):
    box = np.array(BOXES["triclinic"])
    x = tiny.frame()
    order = np.random.default_rng(6).permutation(len(x))
    atoms = 1 + np.argsort(order)
    force = build(backend=backend, topology=in_box(solvated(order, 1), box), atoms=atoms.tolist())
    everything = np.concatenate([[[0.1, 0.2, 0.3]], x[order], [[0.5, 0.5, 0.5]]])
    shifts = np.random.default_rng(7).integers(-1, 2, everything.shape)
    context = context_of(force, everything + shifts @ box, box=box, lambda_=0.5)
    energy, forces = energy_and_forces(context)
    assert_same((energy, forces[atoms]), energy_and_forces(context_of(build(), x, lambda_=0.5)))


@pytest.mark.parametrize("kind", ["VE", "VP"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_mode_adds_exactly_nothing_at_lambda_zero(build, backend, kind):
    force = build(kind, mode="operator", backend=backend)
    context = context_of(force)
    for noise in (0.0, 0.4):
        context.setParameter(force.parameter("noise"), noise)
        energy, forces = energy_and_forces(context)
        assert energy == 0.0
        assert not forces.any()
        assert force.energy_derivative(context) != 0.0


@pytest.mark.parametrize("kind", ["VE", "VP"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_mode_is_the_difference_of_add_mode(build, backend, kind):
    full = context_of(build(kind, backend=backend), lambda_=0.8, noise=0.4)
    energy, forces = energy_and_forces(full)
    full.setParameter("diffforce_lambda", 0.0)
    energy_0, forces_0 = energy_and_forces(full)
    part = context_of(build(kind, mode="operator", backend=backend), lambda_=0.8, noise=0.4)
    found, found_forces = energy_and_forces(part)
    assert found == pytest.approx(energy - energy_0, abs=1e-9 * abs(energy))
    np.testing.assert_allclose(found_forces, forces - forces_0, atol=1e-9 * np.linalg.norm(forces))


# ------------------------------------------------------------------ in a System


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_prefixes_in_one_system(build, backend):
    base = build(backend=backend, prefix="base_")
    operator = build(backend=backend, mode="operator", prefix="change_")
    operator.setForceGroup(3)
    x = tiny.frame()
    context = context_of(base, x, system=system_of(len(x), base, operator))
    assert set(context.getParameters()) == {
        p + n for p in ("base_", "change_") for n in ("lambda", "noise", "scale")
    }
    context.setParameter("change_lambda", 0.7)
    alone = energy_and_forces(context_of(build(), x))
    assert_same(energy_and_forces(context, {LEARNED_GROUP}), alone)
    change = energy_and_forces(context_of(build(mode="operator"), x, lambda_=0.7))
    assert_same(energy_and_forces(context, {3}), change)
    assert_same(energy_and_forces(context), (alone[0] + change[0], alone[1] + change[1]))
    for force, twin, lam in ((base, build(), 0.0), (operator, build(mode="operator"), 0.7)):
        own = context_of(twin, x, lambda_=lam)
        assert force.energy_derivative(context) == pytest.approx(twin.energy_derivative(own), rel=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_an_openmm_force_in_its_group(build, backend):
    force = build(backend=backend)
    assert isinstance(force, openmm.Force)
    assert isinstance(force, DiffusionForce)
    assert force.backend == backend
    assert force.getForceGroup() == LEARNED_GROUP
    assert not force.usesPeriodicBoundaryConditions()
    context = context_of(force)
    assert energy_and_forces(context, {0})[0] == 0.0
    assert energy_and_forces(context, {LEARNED_GROUP}) != (0.0, 0.0)
    assert context.getParameters()[force.parameter("scale")] == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_dynamics_with_subset_and_parameters(build, backend):
    """A few steps: the force lives through a Context whose System outlives the Python names."""
    force = build(backend=backend)
    context = context_of(force, noise=0.2)
    del force
    context.setVelocitiesToTemperature(TEMPERATURE, 1)
    context.getIntegrator().step(20)
    assert np.isfinite(energy_and_forces(context)[0])


def test_auto_takes_torchforce_where_it_is(build):
    best = "torchforce" if available_backends()["torchforce"] == "ok" else "python"
    assert build(backend="auto").backend == best


# ------------------------------------------------------------------ check()


def test_check_is_silent_where_all_is_well(build):
    force = build()
    force.check(context_of(force, lambda_=1.0, noise=1.0))  # warnings are errors


def test_other_temperature_warns_without_noise_and_raises_with_it(build):
    force = build()
    context = context_of(force, temperature=310.0)
    with pytest.warns(UserWarning, match=r"310 K.*300 K"):
        force.check(context)
    context.setParameter(force.parameter("noise"), 0.1)
    with pytest.raises(IncompatibleSystemError, match="310 K"):
        force.check(context)


def test_other_temperature_at_the_door_warns(build):
    with pytest.warns(UserWarning, match="310 K"):
        build(temperature=310 * unit.kelvin)
    build(temperature=TEMPERATURE)  # warnings are errors


@pytest.mark.parametrize(
    ("parameters", "word"),
    [
        ({"lambda_": -0.01}, "lambda"), ({"lambda_": 1.01}, "lambda"),
        ({"noise": -0.01}, "noise"), ({"noise": 1.01}, "noise"),
        ({"lambda_": float("nan")}, "lambda"), ({"noise": float("nan")}, "noise"),
    ],
)  # fmt: skip
def test_parameters_outside_their_range(build, parameters, word):
    force = build()
    with pytest.raises(InputError, match=f"diffforce_{word}: expected"):
        force.check(context_of(force, **parameters))


def singular_system(force: DiffusionForce, what: str) -> openmm.System:
    system = system_of(22, force)
    if what == "constraint":
        system.addConstraint(0, 1, 0.11)
    elif what == "massless":
        system.setParticleMass(5, 0.0)
    else:
        system.setParticleMass(5, 0.0)
        system.setVirtualSite(5, openmm.TwoParticleAverageSite(1, 2, 0.5, 0.5))
    return system


@pytest.mark.parametrize("what", ["constraint", "massless", "virtual"])
def test_base_action_over_singular_coordinates(build, what):
    force = build()
    with pytest.raises(IncompatibleSystemError, match="constraints=None"):
        force.check(context_of(force, system=singular_system(force, what)))
    operator = build(mode="operator")
    operator.check(context_of(operator, system=singular_system(operator, what)))


def test_constraints_of_other_molecules_are_none_of_its_business(build):
    order = np.arange(22)
    force = build(topology=solvated(order, 2), atoms=(2 + order).tolist())
    system = system_of(26, force)
    system.addConstraint(0, 1, 0.3)
    x = np.concatenate([np.zeros((2, 3)), tiny.frame(), np.ones((2, 3))])
    force.check(context_of(force, x, system=system))


# ------------------------------------------------------------------ what it refuses


def altered(change: str) -> app.Topology:
    source = tiny.case().topology
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    elements = [a.element for a in source.atoms()]
    if change == "order":
        elements[0], elements[1] = elements[1], elements[0]
    if change == "no element":
        elements[3] = None
    if change == "too few":
        elements = elements[:-1]
    atoms = [topology.addAtom(f"X{k}", e, residue) for k, e in enumerate(elements)]
    bonds = [(b[0].index, b[1].index) for b in source.bonds()]
    if change == "missing bond":
        bonds = bonds[1:]
    if change == "other bond":
        bonds.append((0, 21))
    for i, j in bonds:
        if max(i, j) < len(atoms):
            topology.addBond(atoms[i], atoms[j])
    return topology


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("order", "expected element C at place 0.*found H"),
        ("no element", "found none"),
        ("too few", "expected the 22 atoms of the artefact, found 21"),
        ("missing bond", "bonds: the topology and the artefact differ"),
        ("other bond", "bonds: the topology and the artefact differ"),
    ],
)
def test_topologies_of_other_molecules(build, change, message):
    with pytest.raises(ModelError, match=message):
        build(topology=altered(change))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "both"}, InputError, 'mode: expected "add" or "operator"'),
        ({"prefix": ""}, InputError, "prefix: expected"),
        ({"prefix": 3}, InputError, "prefix: expected"),
        ({"backend": "cuda"}, InputError, "backend: expected"),
        ({"topology": "ala.pdb"}, InputError, "topology: expected an openmm.app.Topology, found str"),
        ({"atoms": list(range(21))}, ModelError, "expected the 22 atoms"),
        ({"atoms": [0] * 22}, InputError, "different indices"),
        ({"atoms": [*range(21), 99]}, InputError, "different indices"),
        ({"atoms": [*range(21), -1]}, InputError, "different indices"),
        ({"atoms": np.arange(22.0)}, DiffForceError, "atoms: expected"),
        ({"temperature": -1.0}, InputError, "temperature"),
        ({"temperature": 1.0 * unit.nanometer}, InputError, "temperature"),
    ],
)
def test_bad_arguments(build, options, error, message):
    with pytest.raises(error, match=message):
        build(**options)


def test_part_of_a_molecule_is_refused(build):
    topology = solvated(np.arange(22), 1)
    atoms = list(topology.atoms())
    topology.addBond(atoms[0], atoms[1])
    with pytest.raises(ModelError, match="crosses the boundary"):
        build(topology=topology, atoms=list(range(1, 23)))


def test_missing_torchforce_says_how_to_get_it(build, monkeypatch):
    def absent() -> None:
        raise ImportError("No module named 'openmmtorch'")

    monkeypatch.setattr("openmm_diffforce.force._load_openmmtorch", absent)
    with pytest.raises(MissingDependencyError, match="pip install"):
        build(backend="torchforce")
    assert build(backend="auto").backend == "python"


def test_a_model_without_operator_has_no_operator_mode(build):
    with pytest.raises(ModelError, match="no operator"):
        build("base", mode="operator")
    force = build("base")
    context = context_of(force, lambda_=0.5)
    assert force.energy_derivative(context) == 0.0
    assert_same(energy_and_forces(context), energy_and_forces(context_of(build())))


def test_parameter_names(build):
    force = build(prefix="my_")
    assert [force.parameter(n) for n in ("lambda", "noise", "scale")] == ["my_lambda", "my_noise", "my_scale"]
    with pytest.raises(InputError, match="parameter: expected"):
        force.parameter("temperature")


# ------------------------------------------------------------------ manifest


@pytest.mark.parametrize("backend", BACKENDS)
def test_manifest_round_trip(build, backend):
    order = np.random.default_rng(2).permutation(22)
    topology = solvated(order, 1)
    atoms = (1 + np.argsort(order)).tolist()
    force = build("VP", backend=backend, topology=topology, atoms=atoms, mode="operator", prefix="a_")
    manifest = json.loads(json.dumps(force.manifest()))
    twin = force_from_manifest(manifest, topology)
    assert twin.manifest() == force.manifest()
    x = np.concatenate([np.zeros((1, 3)), tiny.frame()[order], np.ones((1, 3))])
    assert_same(*(energy_and_forces(context_of(f, x, lambda_=0.4, noise=0.3)) for f in (twin, force)))
    assert force_from_manifest(manifest, topology, backend="python").backend == "python"


def test_manifest_of_another_artefact_is_refused(build, tmp_path):
    path = tiny.export(tmp_path / "m.diffforce")
    topology = tiny.case().topology
    manifest = DiffusionForce(path, topology=topology, backend="python").manifest()
    force_from_manifest(manifest, topology)
    tiny.export(path, training={"seed": 2})
    with pytest.raises(ModelError, match="SHA-256"):
        force_from_manifest(manifest, topology)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"manifest_version": 99}, "expected version 1, found 99"),
        ({"manifest_version": None}, "expected version 1, found None"),
        ({"sha256": ...}, "lacks the entry 'sha256'"),
        ({"mode": ...}, "lacks the entry 'mode'"),
    ],
)
def test_unusable_manifests(build, change, message):
    manifest = {**build().manifest(), **change}
    manifest = {k: v for k, v in manifest.items() if v is not ...}
    with pytest.raises(InputError, match=message):
        force_from_manifest(manifest, tiny.case().topology)


# ------------------------------------------------------------------ lambda range


def test_lambda_range_of_the_artefact_is_enforced(tmp_path):
    path = tiny.export(tmp_path / "half.diffforce", lambda_range=(0.0, 0.5))
    force = DiffusionForce(path, topology=tiny.case().topology, backend="python")
    context = context_of(force, lambda_=0.5)
    force.check(context)
    context.setParameter(force.parameter("lambda"), 0.6)
    with pytest.raises(InputError, match=r"\[0, 0.5\]"):
        force.check(context)
