"""The summary of noised frames: invariant, cross-fitted, and no better than its columns."""

import numpy as np
import pytest

from openmm_diffforce.errors import InputError
from openmm_diffforce.summary import PairDistances, columns_of, cross_fitted_summary, fold_of


def made_up(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    columns = generator.normal(size=(n, 3))
    target = np.sin(columns[:, 0]) + columns[:, 1] + 0.3 * generator.normal(size=n)
    return columns, target, np.ones(n), fold_of(n, 5)


def test_distances_do_not_see_translations_and_rotations():
    generator = np.random.default_rng(1)
    x = generator.normal(size=(20, 6, 3))
    turn = np.linalg.qr(generator.normal(size=(3, 3)))[0]
    pairs = PairDistances.of([x], [1, 4])
    assert np.allclose(pairs(x @ turn + 3.0), pairs(x), atol=1e-12)
    assert {tuple(sorted(p)) for p in pairs.pairs.tolist()} == {
        tuple(sorted((a, b))) for a in (1, 4) for b in range(6) if b != a
    }


def test_the_closest_pairs_are_kept():
    x = np.zeros((1, 5, 3))
    x[0, :, 0] = [0.0, 1.0, 3.0, 0.5, 9.0]
    assert PairDistances.of([x], [0], max_pairs=2).pairs.tolist() == [[0, 1], [0, 3]]


def test_a_function_of_the_columns_is_found():
    columns, target, weight, fold = made_up(2000)
    found = cross_fitted_summary(columns, target, weight, fold)
    noise = 0.3**2 / target.var()
    assert 1 - 1.2 * noise < found.r_squared < 1 - 0.8 * noise
    assert np.corrcoef(found.m, target)[0, 1] > 0.95


def test_columns_that_say_nothing_explain_nothing():
    generator = np.random.default_rng(2)
    n = 400
    found = cross_fitted_summary(
        generator.normal(size=(n, 40)), generator.normal(size=n), np.ones(n), fold_of(n, 5)
    )
    assert found.r_squared < 0.05
    constant = cross_fitted_summary(np.ones((n, 2)), generator.normal(size=n), np.ones(n), fold_of(n, 5))
    assert constant.r_squared == 0
    assert np.ptp(constant.m) == 0


def test_a_frame_does_not_decide_its_own_summary():
    columns, target, weight, fold = made_up(300)
    own = fold == 2
    changed = np.where(own, target + np.random.default_rng(3).normal(size=300), target)
    one, other = (cross_fitted_summary(columns, t, weight, fold) for t in (target, changed))
    if one.penalty == other.penalty:  # the folds choose it together
        assert np.allclose(one.m[own] - target[~own].mean(), other.m[own] - changed[~own].mean(), atol=0.2)
    assert not np.allclose(one.m[~own], other.m[~own])


def test_a_column_far_outside_is_flat():
    columns, target, weight, fold = made_up(500)
    columns[7, 0] = 1e9
    found = cross_fitted_summary(columns, target, weight, fold)
    assert np.isfinite(found.m).all()
    assert abs(found.m[7]) < 10


def test_folds_are_blocks():
    fold = fold_of(100, 5)
    assert np.bincount(fold).tolist() == [20] * 5
    assert np.count_nonzero(np.diff(fold)) == 9


@pytest.mark.parametrize(
    "features",
    [lambda y: y[:, 0], lambda y: y[:-1], lambda y: np.full((len(y), 2), np.nan)],
)
def test_features_are_checked(features):
    with pytest.raises(InputError, match=r"features: expected finite values of shape \(9, n_columns\)"):
        columns_of(features, np.ones((9, 3)))


def test_a_lone_atom_has_no_distances():
    with pytest.raises(InputError, match="at least two atoms"):
        PairDistances.of([np.zeros((3, 1, 3))], [0])
