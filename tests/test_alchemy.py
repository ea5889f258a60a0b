import math

import numpy as np
import openmm as mm
import pytest
from openmm import app

from openmm_diffforce import alchemy
from openmm_diffforce.alanine import alanine_case
from openmm_diffforce.errors import IncompatibleSystemError, InputError
from openmm_diffforce.systems import evaluate_frames, sample
from openmm_diffforce.units import thermal_energy

from .test_systems import spring_system, topology_of


def frames(case: object, n: int = 8) -> np.ndarray:
    return sample(
        case.system_0, case.topology, case.positions,
        temperature=300.0, n_frames=n, interval=200, n_equil=200, seed=1,
    )  # fmt: skip


def assert_linear(pair: alchemy.EndStatePair, x: np.ndarray, box: object = None) -> mm.System:
    mixed = pair.linear_system()
    e = [evaluate_frames(s, x, box=box, with_forces=True) for s in (pair.system_0, pair.system_1)]
    for lam in (0.0, 0.25, 0.7, 1.0):
        u, f, slope = evaluate_frames(
            mixed, x, box=box, parameters={"lambda": lam}, with_forces=True, derivative="lambda"
        )
        expected = (1 - lam) * e[0][0] + lam * e[1][0]
        assert np.allclose(u, expected, rtol=1e-8, atol=1e-8 * abs(expected).max())
        assert np.allclose(slope, e[1][0] - e[0][0], rtol=1e-8, atol=1e-7)
        f_expected = (1 - lam) * e[0][1] + lam * e[1][1]
        assert np.linalg.norm(f - f_expected) <= 1e-8 * np.linalg.norm(f_expected)
    return mixed


@pytest.mark.parametrize("name", ["F1", "Br3", "I3"])
def test_linear_system_of_alanine_is_exact_and_has_no_slow_force(name: str) -> None:
    case = alanine_case(name, restrain_phi=True)
    mixed = assert_linear(case.pair, frames(case))
    assert not any(isinstance(f, mm.CustomCVForce) for f in mixed.getForces())


def test_operator_against_numbers_by_hand() -> None:
    # Three particles, one perturbed: O is the change of two Coulomb + Lennard-Jones pairs.
    def system(q: float, sigma: float, eps: float) -> mm.System:
        out = mm.System()
        force = mm.NonbondedForce()
        for row in ((q, sigma, eps), (0.3, 0.3, 0.5), (-0.2, 0.25, 0.7)):
            out.addParticle(12.0)
            force.addParticle(*row)
        force.addException(2, 0, 0.05 * q, 0.3, 0.1 * eps)
        out.addForce(force)
        return out

    def by_hand(q: float, sigma: float, eps: float) -> float:
        k = 138.93545764
        lj = lambda s, e, r: 4 * e * ((s / r) ** 12 - (s / r) ** 6)  # noqa: E731
        return (
            k * q * 0.3 / 0.4 + lj((sigma + 0.3) / 2, math.sqrt(eps * 0.5), 0.4)
            + k * 0.05 * q / 0.5 + lj(0.3, 0.1 * eps, 0.5)
        )  # fmt: skip

    a, b = (0.1, 0.31, 0.4), (-0.4, 0.35, 0.9)
    pair = alchemy.EndStatePair(system(*a), system(*b), topology_of(3), 300.0)
    x = np.array([[[0, 0, 0], [0.4, 0, 0], [0, 0.5, 0]]])
    expected = (by_hand(*b) - by_hand(*a)) / thermal_energy(300.0)
    # OpenMM's Coulomb constant and CODATA's differ in the seventh digit.
    assert pair.operator_values(x) == pytest.approx([expected], rel=1e-6)
    assert_linear(pair, x)


def test_operator_gradient_is_the_derivative() -> None:
    case = alanine_case("F1")
    x, pair = case.positions, case.pair
    step = np.random.default_rng(0).normal(size=x.shape)
    step /= np.linalg.norm(step)
    h = 1e-5
    slope = (pair.operator_values(x + h * step) - pair.operator_values(x - h * step)) / (2 * h)
    assert (pair.operator_gradients(x)[0] * step).sum() == pytest.approx(slope[0], rel=1e-6)


def test_bonded_differences_and_term_order() -> None:
    def system(k: float, reverse: bool, phase: float) -> mm.System:
        out = mm.System()
        bond, angle, torsion = (
            mm.HarmonicBondForce(), mm.HarmonicAngleForce(), mm.PeriodicTorsionForce()
        )  # fmt: skip
        for _ in range(4):
            out.addParticle(12.0)
        bonds = [(0, 1, 0.15, k), (1, 2, 0.15, 700.0), (2, 3, 0.14, 800.0)]
        for row in reversed(bonds) if reverse else bonds:
            bond.addBond(*row)
        angle.addAngle(0, 1, 2, 1.9, k)
        torsion.addTorsion(0, 1, 2, 3, 3, phase, 2.0)
        torsion.addTorsion(0, 1, 2, 3, 1, 0.0, 1.0)
        for force in (bond, angle, torsion):
            out.addForce(force)
        return out

    x = np.random.default_rng(2).normal(size=(5, 4, 3)) * 0.1 + np.arange(4)[None, :, None] * 0.1
    pair = alchemy.EndStatePair(system(500.0, False, 0.0), system(900.0, True, 1.0), topology_of(4), 300.0)
    mixed = assert_linear(pair, x)
    kinds = {type(f).__name__ for f in mixed.getForces()}
    assert kinds == {
        "HarmonicBondForce", "CustomBondForce", "CustomAngleForce",
        "PeriodicTorsionForce", "CustomTorsionForce",
    }  # fmt: skip


def test_periodic_nonbonded_goes_through_collective_variables() -> None:
    def system(q: float) -> mm.System:
        out = mm.System()
        out.setDefaultPeriodicBoxVectors([2, 0, 0], [0, 2, 0], [0, 0, 2])
        force = mm.NonbondedForce()
        force.setNonbondedMethod(mm.NonbondedForce.PME)
        force.setCutoffDistance(0.9)
        force.setEwaldErrorTolerance(1e-4)
        for i in range(8):
            out.addParticle(12.0)
            force.addParticle(q if i < 2 else (-q if i < 4 else 0.1 * (-1) ** i), 0.3, 0.3)
        out.addForce(force)
        return out

    x = np.random.default_rng(1).uniform(0, 2, size=(2, 8, 3))
    pair = alchemy.EndStatePair(system(0.1), system(0.5), topology_of(8), 300.0)
    mixed = assert_linear(pair, x)
    assert any(isinstance(f, mm.CustomCVForce) for f in mixed.getForces())


def test_force_of_one_end_only() -> None:
    one, two = spring_system(), spring_system()
    extra = mm.CustomBondForce("a*r")
    extra.addGlobalParameter("a", 2.0)
    extra.addBond(0, 1)
    two.addForce(extra)
    assert_linear(alchemy.EndStatePair(one, two, topology_of(2), 300.0), np.array([[[0, 0, 0], [0.2, 0, 0]]]))


def parameter_system() -> mm.System:
    system = spring_system()
    force = mm.CustomBondForce("a*r^2")
    force.addGlobalParameter("a", 0.0)
    force.addBond(0, 1)
    system.addForce(force)
    return system


def test_pair_from_one_system_with_a_parameter() -> None:
    pair = alchemy.EndStatePair.from_parameter(
        parameter_system(), topology_of(2), "a", temperature=300.0, value_0=1.0, value_1=3.0
    )
    o = pair.operator_values([[[0, 0, 0], [0.5, 0, 0]]])
    assert o * pair.kT == pytest.approx([0.5])
    with pytest.raises(IncompatibleSystemError, match="has the defaults"):
        pair.linear_system()
    with pytest.raises(InputError, match="no force"):
        alchemy.EndStatePair.from_parameter(spring_system(), topology_of(2), "a", temperature=300.0)


def test_pair_refuses() -> None:
    top = topology_of(2)
    with pytest.raises(IncompatibleSystemError, match="number of particles"):
        alchemy.EndStatePair(spring_system(), spring_system(n=3), top, 300.0)
    with pytest.raises(InputError, match="topology"):
        alchemy.EndStatePair(spring_system(), spring_system(), topology_of(3), 300.0)
    with pytest.raises(InputError, match="temperature"):
        alchemy.EndStatePair(spring_system(), spring_system(), top, 0.0)
    with pytest.raises(IncompatibleSystemError, match="no difference"):
        alchemy.EndStatePair(spring_system(), spring_system(), top, 300.0).linear_system()
    thermal = spring_system(2.0)
    thermal.addForce(mm.CMMotionRemover())
    with pytest.raises(IncompatibleSystemError, match="CMMotionRemover"):
        alchemy.EndStatePair(spring_system(), thermal, top, 300.0).linear_system()
    pair = alchemy.EndStatePair(parameter_system(), spring_system(2.0), top, 300.0)
    with pytest.raises(IncompatibleSystemError, match="choose another name"):
        pair.linear_system(parameter="a")
    with pytest.raises(InputError, match="positions"):
        pair.operator_values(np.zeros((1, 5, 3)))


def test_pair_keeps_copies() -> None:
    system_0, system_1 = spring_system(100.0), spring_system(300.0)
    pair = alchemy.EndStatePair(system_0, system_1, topology_of(2), 300.0)
    system_1.getForce(0).setBondParameters(0, 0, 1, 0.15, 1e6)
    assert pair.operator_values([[[0, 0, 0], [0.25, 0, 0]]]) * pair.kT == pytest.approx([1.0])


def test_perturbations_keep_the_charge_and_follow_14_rules() -> None:
    case = alanine_case("F1")
    f0, f1 = (
        next(f for f in s.getForces() if isinstance(f, mm.NonbondedForce))
        for s in (case.system_0, case.system_1)
    )
    q = [[f.getParticleParameters(i)[0]._value for i in range(22)] for f in (f0, f1)]
    assert sum(q[0]) == pytest.approx(sum(q[1]), abs=1e-12)
    assert tuple(np.flatnonzero(np.array(q[0]) != q[1])) == case.perturbed
    # amber itself is reproduced by perturbing to the values it has already.
    hb1 = case.perturbed[-1]
    values = tuple(v._value for v in f0.getParticleParameters(hb1))
    same = alchemy.perturb_nonbonded(case.system_0, {hb1: values}, neutralize_on=case.perturbed[0])
    pair = alchemy.EndStatePair(case.system_0, same, case.topology, 300.0)
    assert pair.operator_values(case.positions) == pytest.approx([0.0], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "kwargs", "error"),
    [
        ({99: (0.0, 0.3, 0.1)}, {}, InputError),
        ({1: (math.nan, 0.3, 0.1)}, {}, InputError),
        ({1: (0.0, -0.3, 0.1)}, {}, InputError),
        ({1: (0.0, 0.3, 0.1)}, {"neutralize_on": 1}, InputError),
        ({11: (0.0, 0.3, 0.1)}, {"lj_14": 1.0}, IncompatibleSystemError),
    ],
)
def test_perturb_refuses(changes: dict, kwargs: dict, error: type) -> None:
    with pytest.raises(error):
        alchemy.perturb_nonbonded(alanine_case("F1").system_0, changes, **kwargs)


def test_lambda_states() -> None:
    states = alchemy.lambda_states(19, 3.5)
    assert len(states) == 19
    assert states[1]["lambda"] == pytest.approx((1 / 18) ** 3.5)
    assert states[0]["lambda"] == 0.0
    assert states[-1]["lambda"] == 1.0
    with pytest.raises(InputError):
        alchemy.lambda_states(1)
    with pytest.raises(InputError):
        alchemy.lambda_states(3, 0.0)


@pytest.mark.parametrize(
    "states",
    [[], [{}], [{"a": 0.0}, {"b": 1.0}], [{"a": 0.0}, {"a": 0.0}], [{"a": math.inf}], ["a"]],
)
def test_state_values_refuses(states: list) -> None:
    with pytest.raises(InputError, match="states"):
        alchemy.state_values(states)


def test_unknown_alanine_case() -> None:
    with pytest.raises(InputError, match="expected one of"):
        alanine_case("Cl2")
    assert isinstance(alanine_case("F1").topology, app.Topology)


@pytest.mark.parametrize("name", ["F1", "Br3"])
def test_changed_atoms_are_the_perturbed_ones_where_nothing_bonded_differs(name: str) -> None:
    case = alanine_case(name)
    assert case.pair.changed_atoms == case.pair.perturbed_atoms == case.perturbed


def test_changed_atoms_of_bonded_terms_and_of_lone_exceptions() -> None:
    case = alanine_case("F1")
    with pytest.raises(IncompatibleSystemError, match="no atom's parameters differ"):
        _ = alchemy.EndStatePair(case.system_0, case.system_0, case.topology, 300.0).changed_atoms
    other = mm.XmlSerializer.deserialize(mm.XmlSerializer.serialize(case.system_0))
    for force in other.getForces():
        if isinstance(force, mm.HarmonicAngleForce):
            *angle, theta, k = force.getAngleParameters(3)
            force.setAngleParameters(3, *angle, theta, 1.2 * k)
        if isinstance(force, mm.NonbondedForce):
            pair = next(
                force.getExceptionParameters(i) for i in range(force.getNumExceptions())
                if force.getExceptionParameters(i)[4]._value > 0
            )  # fmt: skip
            force.addException(*pair[:3], pair[3], 1.5 * pair[4], replace=True)
    found = alchemy.EndStatePair(case.system_0, other, case.topology, 300.0).changed_atoms
    assert found == tuple(sorted({*angle, *pair[:2]}))
