"""The conditional density of the operator, held to laws that are known."""

import numpy as np
import pytest

from openmm_diffforce.conditional import N_BINS, ConditionalDensity
from openmm_diffforce.density import OperatorCoordinate, coordinates_of

LAMS = np.array([0.0, 1.0])


def gaussian_bins(n: int, seed: int = 0, variance: float = 4.0):
    """O | bin normal with a mean that rises with the bin; state 1 is its exact tilt."""
    generator = np.random.default_rng(seed)
    bins = generator.integers(N_BINS, size=2 * n)
    state = np.repeat([0, 1], n)
    mean = 6.0 * bins / N_BINS - variance * state
    o = mean + np.sqrt(variance) * generator.normal(size=2 * n)
    coordinate = OperatorCoordinate(0, float(o.mean()), 8.0 * float(o.std()))
    return (
        ConditionalDensity(coordinate, LAMS, o, bins, state),
        np.ones(2 * n),
        6.0 * np.arange(N_BINS) / N_BINS,
    )


def test_delta_s_of_every_bin_is_that_of_its_gaussian():
    model, weight, mean = gaussian_bins(20000)
    fit = model.fit(weight, 10.0, 10.0)
    exact = mean - 0.5 * 4.0
    assert np.abs(model.actions(fit.c)[:, 1] - exact).max() < 0.35
    assert np.abs(model.actions(fit.c)[:, 1] - exact).mean() < 0.12
    assert (model.actions(fit.c)[:, 0] == 0).all()
    o, v = model.moments(fit.c)
    assert np.abs(o[:, 0] - mean).mean() < 0.15
    assert np.abs(o[:, 1] - mean + 4.0).mean() < 0.15
    assert np.abs(v - 4.0).mean() < 0.4


def test_the_bracket_holds_in_every_bin():
    model, weight, _ = gaussian_bins(500)
    for fit, _, _ in model.fits(weight):
        o, _ = model.moments(fit.c)
        delta = model.actions(fit.c)[:, 1]
        assert (o[:, 1] <= delta).all()
        assert (delta <= o[:, 0]).all()


def test_the_mode_is_a_maximum_and_the_hessian_its_curvature():
    model, weight, _ = gaussian_bins(300)
    fit = model.fit(weight, 1.0, 10.0)
    generator = np.random.default_rng(1)
    counts = np.zeros((N_BINS, 2))
    np.add.at(counts, (model.bins, model.state), weight)
    tilt = (LAMS[model.state] - model.wide) * model.operator

    def log_posterior(c: np.ndarray) -> float:
        log_z, _ = model.log_z(c, LAMS)
        a = model._across @ c.reshape(model._across.shape[1], -1)
        at = np.einsum("nc,nc->n", model._at.toarray(), a[model.bins])
        return float(weight @ (at - tilt) - (counts * log_z).sum() - 0.5 * c @ fit.prior @ c)

    best = log_posterior(fit.c)
    for _ in range(5):
        step = generator.normal(size=len(fit.c))
        step *= 1e-3 / np.linalg.norm(step)
        lost = best - 0.5 * (log_posterior(fit.c + step) + log_posterior(fit.c - step))
        assert lost > 0
        assert lost == pytest.approx(0.5 * step @ fit.hessian @ step, rel=1e-3, abs=1e-9)


def test_the_error_of_an_action_is_that_of_its_derivative():
    model, weight, _ = gaussian_bins(300)
    fit = model.fit(weight, 1.0, 10.0)
    slope = np.random.default_rng(2).normal(size=(N_BINS, 2))
    gradient = np.empty(len(fit.c))
    for i in range(len(fit.c)):
        step = np.zeros(len(fit.c))
        step[i] = 1e-5
        up, down = (float((slope * model.actions(fit.c + s)).sum()) for s in (step, -step))
        gradient[i] = (up - down) / 2e-5
    exact = gradient @ np.linalg.solve(fit.hessian, gradient)
    assert model.error(fit, slope) == pytest.approx(exact, rel=1e-5)


def test_more_frames_make_it_surer():
    errors = []
    for n in (300, 3000):
        model, weight, _ = gaussian_bins(n)
        slope = np.zeros((N_BINS, 2))
        slope[:, 1] = 1 / N_BINS
        errors.append(model.error(model.fit(weight, 10.0, 10.0), slope))
    assert errors[1] < 0.3 * errors[0]


def test_quantiles_of_its_own_frames_are_uniform():
    model, weight, _ = gaussian_bins(5000)
    fit = model.fit(weight, 10.0, 10.0)
    q = model.quantile(fit.c, np.arange(len(weight)))
    assert np.abs(np.histogram(q, bins=10, range=(0, 1))[0] / len(q) - 0.1).max() < 0.015


def test_evidence_prefers_the_coordinate_in_which_the_law_is_smooth():
    generator = np.random.default_rng(3)
    bins, state = generator.integers(N_BINS, size=4000), np.repeat([0, 1], 2000)
    o = np.concatenate([generator.gamma(2.0, 20.0, 2000), generator.gamma(2.0, 20.0 / 21.0, 2000)])
    logarithmic = coordinates_of([o[:2000], o[2000:]])[5]
    linear = OperatorCoordinate(0, float(o.mean()), 100.0 * float(o.std()))
    found = [
        max(f.evidence for f, _, _ in ConditionalDensity(c, LAMS, o, bins, state).fits(np.ones(4000)))
        for c in (logarithmic, linear)
    ]
    assert found[0] > found[1] + 20
