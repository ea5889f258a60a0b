"""MBAR between discrete states against pymbar, and its derivatives against differences."""

import numpy as np
import pytest

from openmm_diffforce.binned_mbar import influence_of_counts, overlap_of_two, slope_by_actions, solve_mbar
from openmm_diffforce.estimate import _fit_mbar

N_BINS = 24


def discrete(n_states: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Actions of bins, and frames drawn from their states."""
    generator = np.random.default_rng(seed)
    actions = np.concatenate(
        [np.zeros((N_BINS, 1)), np.cumsum(generator.normal(1.0, 1.0, (N_BINS, n_states - 1)), axis=1)], axis=1
    )
    p = np.exp(-actions) / np.exp(-actions).sum(axis=0)
    counts = np.stack([generator.multinomial(1000 + 300 * k, p[:, k]) for k in range(n_states)], axis=1)
    return counts.astype(float), actions


@pytest.mark.parametrize("n_states", [2, 4])
def test_mbar_between_bins_is_pymbar(n_states: int) -> None:
    counts, actions = discrete(n_states)
    rows = np.concatenate([np.repeat(np.arange(N_BINS), counts[:, k].astype(int)) for k in range(n_states)])
    mbar = _fit_mbar(actions[rows].T, counts.sum(axis=0).astype(int))
    found = mbar.compute_free_energy_differences()
    f, p = solve_mbar(counts, actions)
    assert np.allclose(f, found["Delta_f"][0], atol=1e-6)
    assert np.allclose(counts.sum(axis=1) @ p, counts.sum(axis=0))
    # pymbar's error is that of the influences of all frames.
    influence = influence_of_counts(counts, p)
    variance = sum(
        float(counts[:, k] @ (influence - np.average(influence, weights=counts[:, k])) ** 2)
        for k in range(n_states)
    )
    assert np.sqrt(variance) == pytest.approx(found["dDelta_f"][0, -1], rel=0.1)


@pytest.mark.parametrize("n_states", [2, 4])
def test_derivatives_of_mbar(n_states: int) -> None:
    counts, actions = discrete(n_states, seed=1)
    f, p = solve_mbar(counts, actions)
    slope, influence = slope_by_actions(counts, p), influence_of_counts(counts, p)
    step = 1e-5
    for b, k in ((3, 0), (11, n_states - 1), (7, 1)):
        moved = [actions.copy(), actions.copy()]
        moved[0][b, k] += step
        moved[1][b, k] -= step
        up, down = (solve_mbar(counts, m)[0][-1] for m in moved)
        assert slope[b, k] == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-6)
    # One more frame of the same state in bin 3 instead of bin 11.
    more = counts.copy()
    more[3, 0] += step
    more[11, 0] -= step
    change = (solve_mbar(more, actions)[0][-1] - f[-1]) / step
    assert change == pytest.approx(influence[3] - influence[11], rel=1e-3, abs=1e-7)


def test_overlap_of_two_states() -> None:
    counts, actions = discrete(2)
    f, _ = solve_mbar(counts, actions)
    p = np.exp(-actions) / np.exp(-actions).sum(axis=0)
    exact = float((2 * p[:, 0] * p[:, 1] / p.sum(axis=1)).sum())
    assert overlap_of_two(f - actions, counts) == pytest.approx(exact, abs=0.05)
