"""Pair features: which pairs, which share a function, and what far distances do."""

import numpy as np
import pytest

from openmm_diffforce.bridge import default_levels, noisy_operator_bridge
from openmm_diffforce.errors import InputError
from openmm_diffforce.labels import fit_labels
from openmm_diffforce.models.graph import MolecularGraph
from openmm_diffforce.pair_features import PairOperator, PairSplines, noised_pair_function, pair_splines
from openmm_diffforce.summary import PairDistances

CHAIN = MolecularGraph(("C", "C", "C", "C", "H", "H", "H"), ((0, 1), (1, 2), (2, 3), (3, 4), (3, 5), (3, 6)))


def chain_frames(n: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.arange(7)[:, None] * [0.15, 0.03, 0.0] + 0.03 * generator.standard_normal((n, 7, 3))


def test_pairs_of_equivalent_sites_share_their_functions():
    x = chain_frames(50, 0)
    alike = pair_splines(x, x, CHAIN, [4, 5, 6], ["F", "F", "F"])
    apart = pair_splines(x, x, CHAIN, [4, 5, 6])
    assert alike.pairs.tolist() == apart.pairs.tolist()  # C0 and C1 with each of three
    assert len(alike.pairs) == 6
    assert (len(alike.low), len(apart.low)) == (2, 6)
    swapped = x.copy()
    swapped[:, [4, 5]] = x[:, [5, 4]]
    np.testing.assert_allclose(alike(swapped), alike(x), atol=1e-12)
    assert np.abs(apart(swapped) - apart(x)).max() > 0.01


def test_pair_features_are_blind_to_rigid_motion():
    x = chain_frames(20, 1)
    features = pair_splines(x, x, CHAIN, [4])
    c, s = np.cos(0.7), np.sin(0.7)
    turned = x @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) + 3.0
    np.testing.assert_allclose(features(turned), features(x), atol=1e-9)


def test_far_distances_go_on_straight_and_a_collision_is_finite():
    splines = PairSplines(np.array([[0, 1]]), np.array([0]), np.array([1.0]), np.array([100.0]))

    def at(u: np.ndarray) -> np.ndarray:
        x = np.zeros((len(u), 2, 3))
        x[:, 1, 0] = u ** (-1 / 5)
        return splines(x)

    step = np.diff(at(np.array([100.0, 150.0, 200.0, 250.0])), axis=0)
    np.testing.assert_allclose(step[0], step[1], atol=1e-9)
    np.testing.assert_allclose(step[1], step[2], atol=1e-9)
    assert np.abs(step).max() > 0.1
    np.testing.assert_allclose(at(np.array([20.0, 500.0])).sum(axis=1), 1, atol=1e-9)
    collided = splines(np.zeros((1, 2, 3)))
    assert np.isfinite(collided).all()


def test_a_pair_operator_is_found_by_its_labels():
    """S_1 - S_0 = 60 r_04 + a constant, for one pair whose distance is Gaussian: Delta f is centered at 0."""
    generator = np.random.default_rng(20)
    frames = []
    for end in (0, 1):
        x = chain_frames(2500, 21 + end)
        r = 0.6 + 0.03 * generator.standard_normal(2500) - end * 60 * 0.03**2
        x[:, 0] = x[:, 4] - r[:, None] * np.eye(3)[0]
        frames.append(x)
    features = pair_splines(*frames, CHAIN, [4])
    found = fit_labels(*frames, features, generator=generator, sigmas=(0.0, 0.002), noise_atoms=[0, 4])
    o = [60 * np.linalg.norm(x[:, 4] - x[:, 0], axis=-1) for x in frames]
    scale = o[0].mean() - o[1].mean()
    assert abs(found.scale - scale) < 3 * found.d_scale < 1.5
    assert abs(found.centered) < 3 * found.d_centered < 0.5
    assert np.corrcoef(np.concatenate([found.g_0, found.g_1]), np.concatenate(o))[0, 1] > 0.97
    assert found.curve[1].scale < found.curve[0].scale


@pytest.mark.parametrize(
    ("sites", "becomes", "message"),
    [
        ([], None, "sites: expected different"),
        ([4, 4], None, "sites: expected different"),
        ([7], None, "sites: expected different"),
        ([4], ["F", "F"], "becomes: expected one name for each of 1"),
        ([2], None, "closer than three bonds"),
    ],
)
def test_bad_sites(sites, becomes, message):
    x = chain_frames(20, 2)
    with pytest.raises(InputError, match=message):
        pair_splines(x, x, CHAIN, sites, becomes)


def test_frames_of_another_molecule_and_atoms_at_one_place():
    x = chain_frames(20, 3)
    with pytest.raises(InputError, match="x_1: expected coordinates of shape"):
        pair_splines(x, x[:, :6], CHAIN, [4])
    x[0, 0] = x[0, 4]
    with pytest.raises(InputError, match="two at the same place"):
        pair_splines(x, x, CHAIN, [4])


# ------------------------------------------------------------------- the operator, noised by pairs

END = MolecularGraph(("C", "C", "C", "H"), ((0, 1), (1, 2), (2, 3)))


def end_frames(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Four atoms of which the last and the first come closer or part; O is a function of that distance."""
    generator = np.random.default_rng(seed)
    x = np.array([[0.0, 0, 0], [0.15, 0, 0], [0.2, 0.14, 0], [0.1, 0.25, 0]]) + np.zeros((n, 1, 1))
    x[:, 3] += 0.04 * generator.standard_normal((n, 3))
    return x, pair_function(np.linalg.norm(x[:, 3] - x[:, 0], axis=-1))


def pair_function(r: np.ndarray) -> np.ndarray:
    return 3.0 * (0.25 / np.maximum(r, 0.1)) ** 6 + 0.5 / np.maximum(r, 0.1)


def test_noised_pair_functions_against_draws():
    """Three-dimensional noise on both atoms, by hand; at end 1 the draws are weighted with exp(-u)."""
    generator = np.random.default_rng(2)
    r, sigma = np.arange(1, 1200) * 1e-3, 0.05
    for distance in (0.1, 0.3):
        noise = np.sqrt(2) * sigma * generator.standard_normal((200_000, 3))
        drawn = pair_function(np.linalg.norm(noise + np.array([distance, 0, 0]), axis=-1))
        weight = np.exp(-drawn)
        start, end = noised_pair_function(pair_function(r), r, np.sqrt(2) * sigma, np.array([distance]))
        assert start[0] == pytest.approx(drawn.mean(), abs=4 * drawn.std() / 200_000**0.5)
        tilted = (weight * drawn).sum() / weight.sum()
        assert end[0] == pytest.approx(tilted, abs=6 * drawn.std() / 200_000**0.5)
        assert end[0] < start[0]


@pytest.fixture(scope="module")
def pair_operator() -> PairOperator:
    x, o = zip(end_frames(400, 0), end_frames(400, 1), strict=True)
    return PairOperator.of(x, o, END, [3], atoms=[3], sigmas=[0.02, 0.05])


def test_a_pair_operator_is_o_without_noise(pair_operator: PairOperator):
    x, o = end_frames(100, 5)
    distance = np.linalg.norm(x[:, 3] - x[:, 0], axis=-1)
    seen = np.abs(distance - np.median(distance)) < distance.std()  # beyond, walls are added
    x, o, distance = x[seen], o[seen], distance[seen]
    columns = pair_operator(x)
    assert columns.shape == (len(x), 5)  # without noise, and two ends of two levels
    found = np.sinh(columns) * pair_operator.width + pair_operator.centre
    np.testing.assert_allclose(found[:, 0], o, atol=0.03 * o.std())
    # One atom of the pair is noised: once the variance, not twice.
    r = np.arange(1, 1500) * 1e-3
    for k, sigma in enumerate((0.02, 0.05)):
        for lam, exact in enumerate(noised_pair_function(pair_function(r), r, sigma, distance)):
            np.testing.assert_allclose(found[:, 1 + 2 * k + lam], exact, rtol=0.1, atol=0.1 * o.std())
    twice = noised_pair_function(pair_function(r), r, np.sqrt(2) * 0.05, distance)[0]
    once = noised_pair_function(pair_function(r), r, 0.05, distance)[0]
    assert np.abs(found[:, 3] - once).mean() < 0.3 * np.abs(found[:, 3] - twice).mean()


def test_a_pair_operator_does_not_see_rigid_motion(pair_operator: PairOperator):
    x, _ = end_frames(20, 6)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    np.testing.assert_allclose(pair_operator(x @ turn + 1.0), pair_operator(x), atol=1e-9)


def test_a_pair_operator_as_columns_of_a_bridge():
    generator = np.random.default_rng(7)
    x, o = end_frames(4000, 8)
    other = generator.random(4000) < np.exp(-(o - o.min()))  # end 1 by rejection
    frames, operators = [x[:500], x[other][:500]], [o[:500], o[other][:500]]
    exact = -np.log(np.exp(-o).mean())
    distances = PairDistances.of(frames, [3])
    columns = PairOperator.of(frames, operators, END, [3], atoms=[3], sigmas=[0.02], beside=distances)
    assert columns(x[:9]).shape == (9, 3 + distances(x[:9]).shape[1])
    levels = default_levels([distances(f) for f in frames], 2)
    found = noisy_operator_bridge(
        frames, operators, generator=generator, atoms=[3], features=columns, sigmas=levels, n_bootstrap=0,
        inefficiency=(1, 1),
    )  # fmt: skip
    assert found.level.r_squared > 0.3
    assert abs(found.delta_f - exact) < 4 * found.d_delta_f < 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": [np.zeros((5, 4, 3))]}, "expected two end states, found 1 and 2"),
        ({"operators": [np.zeros(5)]}, "expected two end states, found 2 and 1"),
        ({"frames": [np.zeros((5, 3, 3))] * 2}, "x_0: expected coordinates of shape"),
        ({"operators": [np.full(5, np.nan)] * 2}, "o_0: expected 5 finite operator values"),
        ({"sigmas": []}, "sigmas: expected levels of at least 0.004 nm"),
        ({"sigmas": [0.0, 0.1]}, "sigmas: expected levels of at least 0.004 nm"),
        ({"sigmas": [0.1, 0.05]}, "sigmas: expected levels of at least 0.004 nm that increase"),
        ({"sigmas": 0.1}, "sigmas: expected"),
        ({"atoms": []}, "atoms: expected different indices below 4"),
        ({"atoms": [4]}, "atoms: expected different indices below 4"),
        ({"sites": [9]}, "sites: expected different atom indices below 4"),
    ],
)
def test_a_pair_operator_refuses(change, message):
    good = {
        "frames": [np.random.default_rng(0).normal(size=(5, 4, 3))] * 2, "operators": [np.zeros(5)] * 2,
        "graph": END, "sites": [3],
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        PairOperator.of(**(good | change))
