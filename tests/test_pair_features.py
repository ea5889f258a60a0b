"""Pair features: which pairs, which share a function, and what far distances do."""

import numpy as np
import pytest

from openmm_diffforce.errors import InputError
from openmm_diffforce.labels import fit_labels
from openmm_diffforce.models.graph import MolecularGraph
from openmm_diffforce.pair_features import PairSplines, pair_splines

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
