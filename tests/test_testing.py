"""The testing helpers themselves: they pass what is right and, above all, fail what is wrong."""

import numpy as np
import openmm
import pytest

from openmm_diffforce.errors import InputError
from openmm_diffforce.testing import (
    HarmonicEndStates,
    assert_forces_match_energy,
    assert_parameter_derivative,
)


def context_of(force: openmm.Force, n_atoms: int = 3) -> openmm.Context:
    system = openmm.System()
    for _ in range(n_atoms):
        system.addParticle(1.0)
    system.addForce(force)
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(np.random.default_rng(0).standard_normal((n_atoms, 3)))
    return context


def quartic(n_atoms: int = 3) -> openmm.CustomCompoundBondForce:
    force = openmm.CustomCompoundBondForce(1, "k*(x1^4 + x1*y1 + sin(z1))")
    force.addGlobalParameter("k", 2.0)
    force.addEnergyParameterDerivative("k")
    for atom in range(n_atoms):
        force.addBond([atom], [])
    return force


def wrong_force(error: float) -> openmm.PythonForce:
    """E = |x|^2 / 2, with forces that are too large by a fraction ``error``."""

    def compute(state: openmm.State) -> tuple[float, np.ndarray]:
        x = np.array(state.getPositions(asNumpy=True)._value)
        return 0.5 * float((x**2).sum()), -(1 + error) * x

    return openmm.PythonForce(compute)


def positions(context: openmm.Context) -> np.ndarray:
    return np.array(context.getState(positions=True).getPositions(asNumpy=True)._value)


def test_right_forces_pass_and_positions_are_restored():
    context = context_of(quartic())
    before = positions(context)
    assert assert_forces_match_energy(context) < 1e-9
    assert np.array_equal(positions(context), before)


def test_wrong_forces_fail_and_positions_are_restored():
    context = context_of(wrong_force(1e-3))
    before = positions(context)
    with pytest.raises(AssertionError, match=r"differ .* by 0.000999 of their norm \(allowed 1e-06\)"):
        assert_forces_match_energy(context)
    assert np.array_equal(positions(context), before)
    assert assert_forces_match_energy(context, relative=2e-3) == pytest.approx(1e-3 / 1.001, rel=1e-4)
    assert_forces_match_energy(context_of(wrong_force(0.0)))


def test_only_the_chosen_atoms_and_groups_count():
    good, bad = quartic(), wrong_force(1e-2)
    bad.setForceGroup(5)
    context = context_of(good)
    context.getSystem().addForce(bad)
    context.reinitialize(preserveState=True)
    assert_forces_match_energy(context, groups={0})
    assert_forces_match_energy(context, groups=1)
    for groups in ({5}, {0, 5}, -1):
        with pytest.raises(AssertionError):
            assert_forces_match_energy(context, groups=groups)

    def second_atom_wrong(state: openmm.State) -> tuple[float, np.ndarray]:
        x = np.array(state.getPositions(asNumpy=True)._value)
        return 0.5 * float((x**2).sum()), -x * np.array([[1.0], [1.1], [1.0]])

    context = context_of(openmm.PythonForce(second_atom_wrong))
    assert_forces_match_energy(context, atoms=[0, 2])
    with pytest.raises(AssertionError):
        assert_forces_match_energy(context, atoms=[1])


def test_parameter_derivative():
    context = context_of(quartic())
    state = context.getState(energy=True, parameterDerivatives=True)
    right = state.getEnergyParameterDerivatives()["k"]
    assert assert_parameter_derivative(context, "k", right) < 1e-8
    with pytest.raises(AssertionError, match="dE/dk"):
        assert_parameter_derivative(context, "k", right * 1.001)
    with pytest.raises(AssertionError, match="dE/dk"):
        assert_parameter_derivative(context, "k", -right)
    assert context.getParameter("k") == 2.0


# ------------------------------------------------------------------ harmonic end states

STATES = HarmonicEndStates((2.0, 8.0), (0.0, 0.3), 3)


@pytest.mark.parametrize("end", [0, 1])
def test_samples_have_the_exact_moments(end):
    n = 40000
    x = STATES.sample(end, n, np.random.default_rng(1))
    assert x.shape == (n, 3)
    variance = 1 / STATES.stiffness[end]
    z_mean = (x.mean(axis=0) - STATES.centre[end]) / np.sqrt(variance / n)
    z_variance = (x.var(axis=0) - variance) / (variance * np.sqrt(2 / n))
    assert np.abs(z_mean).max() < 4
    assert np.abs(z_variance).max() < 4


def test_delta_f_is_that_of_the_samples():
    # f_1 - f_0 = -ln E_0[exp(-(S_1 - S_0))], and the reverse with the other sign
    generator = np.random.default_rng(2)
    near = HarmonicEndStates((2.0, 3.0), (0.0, 0.1), 2)
    n = 100000
    for end, sign in ((0, 1.0), (1, -1.0)):
        x = near.sample(end, n, generator)
        weight = np.exp(-sign * (near.action(1, x) - near.action(0, x)))
        estimate = -sign * np.log(weight.mean())
        error = weight.std() / weight.mean() / np.sqrt(n)
        assert abs(estimate - near.delta_f) < 4 * error
        assert error < 0.01
    assert near.delta_f == pytest.approx(np.log(1.5))


def test_actions_by_hand():
    x = np.array([[0.3, 0.3, 0.3], [1.3, 0.3, 0.3]])
    np.testing.assert_allclose(STATES.action(1, x), [0.0, 4.0])
    np.testing.assert_allclose(STATES.action(0, x), [0.27, 1.87])


@pytest.mark.parametrize(
    "arguments", [((0.0, 1.0), (0.0, 0.0)), ((1.0, -1.0), (0.0, 0.0)), ((1.0, 1.0), (0.0, 0.0), 0)]
)
def test_impossible_end_states(arguments):
    with pytest.raises(InputError, match="expected stiffnesses > 0"):
        HarmonicEndStates(*arguments)
