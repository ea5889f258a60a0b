"""The bias of a time step: the law on Gaussians, measured, and what the advisor says before a run."""

from collections.abc import Callable
from typing import Any

import numpy as np
import openmm
import pytest
from openmm import unit

from openmm_diffforce.alanine import alanine_dipeptide
from openmm_diffforce.errors import IncompatibleSystemError, InputError, UnitsError
from openmm_diffforce.langevin import DiffusionLangevinIntegrator
from openmm_diffforce.sampler import harmonic_adapter_step
from openmm_diffforce.step_size import advise_integrator, advise_step, curvature_spectrum
from openmm_diffforce.systems import sample
from openmm_diffforce.units import thermal_energy

KT = thermal_energy(300.0)
KAPPA = np.array([100.0, 400.0, 900.0, 1000.0])
"""Reduced stiffness of four modes [1/nm^2]."""

ROTATION = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]
HESSIAN = ROTATION @ np.diag(KAPPA) @ ROTATION.T


def score(x: np.ndarray) -> np.ndarray:
    return -x @ HESSIAN


@pytest.mark.parametrize("step", [0.0002, 0.001, 0.0015])
def test_the_bias_law_and_its_prediction(step: float) -> None:
    """1/(kappa (1 - a/2)) along every mode, from 4000 chains; the energy as the advisor predicts."""
    d = 1.0
    random = np.random.default_rng(1)
    n = 4000
    # Started from the law itself: a wrong law would relax to another one.
    a = d * step * KAPPA
    law = 1 / (KAPPA * (1 - a / 2))
    x = (random.standard_normal((n, 4)) * np.sqrt(law)) @ ROTATION.T
    for _ in range(int(np.ceil(3 / a.min()))):
        x = harmonic_adapter_step(x, score(x), 1 / (2 * d * step), random.standard_normal(x.shape))
    modes = x @ ROTATION
    assert np.abs((modes.var(axis=0) / law - 1) / np.sqrt(2 / n)).max() < 3.5
    advice = advise_step(score, np.zeros((1, 4)), d, step)
    u = 0.5 * (KAPPA * modes**2).sum(axis=1)
    assert abs(u.mean() - 2.0 - advice.energy_bias) < 3.5 * u.std() / np.sqrt(n)
    assert advice.variance_factor == pytest.approx(1 / (1 - a.max() / 2), rel=1e-6)
    assert advice.limit == pytest.approx(0.002, rel=1e-6)
    assert advice.verdict == "biased"


def test_the_verdict_is_what_happens() -> None:
    """Just below the limit chains live, just above it they grow without bound."""
    random = np.random.default_rng(2)
    for step, verdict in ((0.00195, "biased"), (0.00205, "unstable")):
        advice = advise_step(score, np.zeros((1, 4)), 1.0, step)
        assert advice.verdict == verdict
        x = np.zeros((10, 4))
        for _ in range(2000):
            x = x + step * score(x) + np.sqrt(2 * step) * random.standard_normal(x.shape)
        assert (np.abs(x).max() > 1e3) == (verdict == "unstable")
    assert np.isinf(advice.energy_bias)
    with pytest.raises(InputError, match=r"expected less than 0.002 ps.*unstable"):
        advice.require_stable()


def test_the_suggested_step_has_the_tolerated_bias() -> None:
    advice = advise_step(score, np.zeros((1, 4)), 1.0, 0.0005, tolerance=0.05)
    again = advise_step(score, np.zeros((1, 4)), 1.0, advice.suggested, tolerance=0.05)
    assert again.relative_bias == pytest.approx(0.05, rel=1e-6)
    assert (
        advise_step(score, np.zeros((1, 4)), 1.0, 0.9 * advice.suggested, tolerance=0.05).verdict == "stable"
    )
    advice.require_stable()
    assert "biased" in str(advice)
    assert "D dt kappa = 0.50 of 2" in str(advice)


def test_diffusion_per_atom_and_atoms_that_do_not_move() -> None:
    """Two atoms and a third without mass: rates are D_i kappa_i, of two atoms only."""
    kappa = np.array([100.0, 50.0, 1e6])[:, None]
    found = curvature_spectrum(lambda x: -kappa * x, np.zeros((2, 3, 3)), np.array([0.1, 0.4, 0.0]))
    assert found.n_modes == 6
    assert found.calls == 24
    np.testing.assert_allclose(np.sort(found.rates), [10.0] * 6 + [20.0] * 6, rtol=1e-6)
    assert found.weights.sum() == pytest.approx(6)
    dressed = curvature_spectrum(
        lambda x: -kappa * x, np.zeros((2, 3, 3)) * unit.angstrom,
        np.array([10.0, 40.0, 0.0]) * unit.angstrom**2 / unit.picosecond,
    )  # fmt: skip
    np.testing.assert_allclose(dressed.rates, found.rates)


def test_lanczos_is_the_dense_answer() -> None:
    random = np.random.default_rng(3)
    q = np.linalg.qr(random.standard_normal((120, 120)))[0]
    hessian = q @ np.diag(np.geomspace(1.0, 1000.0, 120)) @ q.T
    frames = np.zeros((1, 40, 3))

    def field(x: np.ndarray) -> np.ndarray:
        return -(x.reshape(len(x), -1) @ hessian).reshape(x.shape)

    dense = curvature_spectrum(field, frames, 0.5)
    lanczos = curvature_spectrum(field, frames, 0.5, dense_limit=10, n_probes=20, generator=random)
    assert (dense.method, lanczos.method) == ("dense", "lanczos")
    assert lanczos.largest[0] == pytest.approx(dense.largest[0], rel=1e-6)
    assert lanczos.weights.sum() == pytest.approx(120)
    assert lanczos.energy_bias(0.002) == pytest.approx(dense.energy_bias(0.002), rel=0.1)


def test_modes_of_negative_curvature_do_not_count() -> None:
    found = curvature_spectrum(lambda x: x * [50.0, -100.0], np.zeros((1, 2)), 1.0)
    assert found.energy_bias(0.01) == pytest.approx(0.5 * (1 / 0.5 - 1), rel=1e-6)


@pytest.mark.slow
def test_alanine_is_as_hot_as_predicted() -> None:
    """amber14, D dt kappa about 0.8: excess energy of raw steps over Metropolis-corrected ones.

    Short runs from the same equilibrium frames: the stiff modes relax in tens of steps, the slow
    ones (a single run would measure which basins it met) are alike on both sides.
    """
    topology, x, system = alanine_dipeptide(restrain_phi=True)
    starts = sample(system, topology, x, temperature=300.0, n_frames=60, interval=150, n_equil=3000, seed=5)
    means, step = {}, 1e-4
    for metropolis in (False, True):
        integrator = DiffusionLangevinIntegrator(
            300.0, 50.0, step, metropolis=metropolis, system=system, seed=4
        )
        context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
        u = np.empty((len(starts), 15))
        for k, start in enumerate(starts):
            context.setPositions(start)
            integrator.step(200)
            for i in range(15):
                integrator.step(30)
                u[k, i] = context.getState(energy=True).getPotentialEnergy()._value / KT
        means[metropolis] = u.mean(axis=1)
        if metropolis:
            advice = advise_integrator(integrator, system, starts[::10])
            assert 0.4 < integrator.acceptance_rate < 0.7
    excess = means[False] - means[True]
    error = excess.std(ddof=1) / np.sqrt(len(starts))
    assert 3.0 < advice.energy_bias < 5.0
    assert error < 0.7
    assert abs(excess.mean() - advice.energy_bias) < 3.5 * error


ZERO = np.zeros((1, 4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: advise_step(score, ZERO, 1.0, 0.0), InputError, "step_size"),
        (lambda: advise_step(score, ZERO, 1.0, -1.0), InputError, "step_size"),
        (lambda: advise_step(score, ZERO, 1.0, float("nan")), InputError, "step_size"),
        (lambda: advise_step(score, ZERO, 1.0, 1.0 * unit.kelvin), UnitsError, "step_size"),
        (lambda: advise_step(score, ZERO, 0.0, 0.001), InputError, "diffusion"),
        (lambda: advise_step(score, ZERO, -1.0, 0.001), InputError, "diffusion"),
        (lambda: advise_step(score, ZERO, np.ones(3), 0.001), InputError, "diffusion: expected a number or"),
        (lambda: advise_step(score, ZERO, 1.0 * unit.kelvin, 0.001), UnitsError, "diffusion"),
        (lambda: advise_step(score, np.zeros(4), 1.0, 0.001), InputError, "frames"),
        (lambda: advise_step(score, np.zeros((0, 4)), 1.0, 0.001), InputError, "frames"),
        (lambda: advise_step(score, ZERO * np.nan, 1.0, 0.001), InputError, "frames"),
        (lambda: advise_step(lambda x: x * np.nan, ZERO, 1.0, 0.001), InputError, "score"),
        (lambda: advise_step(lambda x: x[:1], ZERO, 1.0, 0.001), InputError, "score"),
        (lambda: advise_step(lambda x: x, ZERO, 1.0, 0.001), InputError, "positive curvature"),
        (lambda: advise_step(score, ZERO, 1.0, 0.001, tolerance=0.0), InputError, "tolerance"),
        (lambda: advise_step(score, ZERO, 1.0, 0.001, dense_limit=1), InputError, "generator"),
        (lambda: advise_step(score, ZERO, 1.0, 0.001, difference=0.0), InputError, "difference"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_constraints_are_refused() -> None:
    _, x, system = alanine_dipeptide()
    system.addConstraint(0, 1, 0.11)
    with pytest.raises(IncompatibleSystemError, match="2 constrained atoms"):
        advise_integrator(DiffusionLangevinIntegrator(300.0, 50.0, 1e-4), system, x)
