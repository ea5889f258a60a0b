"""The noisy operator bridge, held to ensembles whose Delta f is known exactly, and to its two limits."""

import json
from collections.abc import Callable

import numpy as np
import pytest

from openmm_diffforce.bridge import GaussianKernel, default_levels, noisy_operator_bridge
from openmm_diffforce.errors import ConvergenceError, InputError
from openmm_diffforce.estimate import bar_between

ONES = (1.0, 1.0)
State = tuple[list[np.ndarray], list[np.ndarray], float]


def wells(shift: float, n: int, generator: np.random.Generator, *, lams=(0.0, 1.0)) -> State:
    """S_0 = |x|^2/2 in two dimensions, O moves the first along by ``shift``: Delta f = 0."""
    x = [generator.normal(size=(n, 2)) + np.array([lam * shift, 0.0]) for lam in lams]
    return x, [0.5 * shift**2 - shift * v[:, 0] for v in x], 0.0


def widened(scale: float, n: int, generator: np.random.Generator) -> State:
    x = [generator.normal(0.0, s, (n, 1)) for s in (1.0, scale)]
    return x, [0.5 * (scale**-2 - 1.0) * v[:, 0] ** 2 for v in x], -float(np.log(scale))


def steric(n: int, generator: np.random.Generator, *, lams=(0.0, 1.0)) -> State:
    r = np.linspace(0.2, 1.2, 100001)
    o = (0.7 / r) ** 12
    weights = [np.exp(-50 * (r - 0.6) ** 2 - lam * o) for lam in lams]
    x = [r[np.searchsorted(np.cumsum(w) / w.sum(), generator.random(n))][:, None] for w in weights]
    exact = -float(np.log(weights[-1].sum() / weights[0].sum()))
    return x, [(0.7 / v[:, 0]) ** 12 for v in x], exact


@pytest.mark.parametrize(
    ("draw", "limit"),
    [
        (lambda g: wells(2.0, 2000, g), 0.2),
        (lambda g: wells(6.0, 2000, g), 0.6),
        (lambda g: widened(5.0, 2000, g), 0.2),
        (lambda g: steric(2000, g), 0.5),
    ],
)
def test_exact_delta_f(draw: Callable[..., State], limit: float) -> None:
    x, o, exact = draw(np.random.default_rng(1))
    found = noisy_operator_bridge(x, o, generator=np.random.default_rng(2), inefficiency=ONES)
    assert abs(found.delta_f - exact) < 3 * found.d_delta_f < 3 * limit
    assert found.plateau < 3 * limit
    for level in found.levels:  # every level, not only the chosen one
        assert abs(level.delta_f - exact) < 4 * level.d_delta_f, level


def test_repeats_scatter_as_stated() -> None:
    z = []
    for seed in range(8):
        x, o, exact = wells(3.0, 300, np.random.default_rng(seed))
        found = noisy_operator_bridge(
            x, o, generator=np.random.default_rng(seed), inefficiency=ONES, sigmas=[1.0], n_bootstrap=10
        )
        z.append((found.delta_f - exact) / found.d_delta_f)
    assert 0.4 < np.sqrt(np.mean(np.square(z))) < 1.5
    assert abs(np.mean(z)) < 3 * 1.2 / np.sqrt(8)


def test_no_noise_is_bar() -> None:
    x, o, _ = wells(1.5, 3000, np.random.default_rng(3))
    found = noisy_operator_bridge(
        x, o, generator=np.random.default_rng(0), inefficiency=ONES, sigmas=[1e-4], n_bootstrap=0
    )
    bar = bar_between(o[0], -o[1], decorrelate=False)
    level = found.level
    assert level.r_squared > 0.99
    assert level.delta_f == pytest.approx(bar.delta_f, abs=0.25 * bar.d_delta_f)
    assert level.overlap == pytest.approx(bar.overlap, abs=0.02)
    assert level.d_sampling == pytest.approx(bar.d_delta_f, rel=0.2)


def test_columns_that_say_nothing_are_the_density_of_the_operator() -> None:
    x, o, _ = wells(3.0, 1000, np.random.default_rng(4))
    found = noisy_operator_bridge(
        x, o, generator=np.random.default_rng(0), inefficiency=ONES, sigmas=[1.0], n_bootstrap=0,
        features=lambda y: np.ones((len(y), 1)),
    )  # fmt: skip
    assert found.level.overlap > 0.9
    assert found.delta_f == pytest.approx(found.density.delta_f, abs=0.5 * found.density.d_delta_f)
    assert found.level.d_closure == pytest.approx(found.density.d_delta_f, rel=0.4)


def test_noise_brings_the_ends_together_and_lengthens_the_bridge() -> None:
    x, o, _ = wells(4.0, 2000, np.random.default_rng(5))
    levels = noisy_operator_bridge(
        x, o, generator=np.random.default_rng(0), inefficiency=ONES, sigmas=[0.3, 1.0, 3.0], n_bootstrap=0
    ).levels
    for name, sign in (("overlap", 1), ("d_closure", 1), ("d_sampling", -1), ("r_squared", -1)):
        first, *_, last = (getattr(level, name) for level in levels)
        assert sign * (last - first) > 0, name


def test_windows_between_make_it_surer() -> None:
    errors = []
    for lams in ((0.0, 1.0), (0.0, 0.05, 0.4, 1.0)):
        x, o, exact = steric(800, np.random.default_rng(6), lams=lams)
        found = noisy_operator_bridge(
            x, o, lams, generator=np.random.default_rng(0), inefficiency=(1.0,) * len(lams), n_bootstrap=0
        )
        assert abs(found.delta_f - exact) < 3 * found.d_delta_f
        errors.append(found.d_delta_f)
        assert len(found.level.calibration) == len(found.n_frames) == len(lams)
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("closure", ["tweedie", "gamma"])
def test_other_closures(closure: str) -> None:
    x, o, exact = wells(3.0, 1500, np.random.default_rng(7))
    found = noisy_operator_bridge(
        x, o, generator=np.random.default_rng(0), inefficiency=ONES, closure=closure, n_bootstrap=5
    )  # fmt: skip
    assert found.closure == closure
    assert abs(found.delta_f - exact) < 4 * found.d_delta_f < 2


def test_a_molecule_by_its_distances() -> None:
    """A diatomic whose bond is stretched, tumbling and drifting: Delta f is that of the bond alone."""
    generator = np.random.default_rng(8)
    kappa, r_0, r_1 = 4000.0, 0.11, 0.17
    x, o = [], []
    r = np.linspace(0.01, 0.4, 200001)
    weights = [r**2 * np.exp(-0.5 * kappa * (r - c) ** 2) for c in (r_0, r_1)]
    for w in weights:
        bond = r[np.searchsorted(np.cumsum(w) / w.sum(), generator.random(1500))]
        axis = generator.normal(size=(1500, 3))
        axis /= np.linalg.norm(axis, axis=1, keepdims=True)
        start = generator.normal(0.0, 5.0, (1500, 1, 3))
        x.append(np.concatenate([start, start + (bond[:, None] * axis)[:, None]], axis=1))
        o.append(0.5 * kappa * ((bond - r_1) ** 2 - (bond - r_0) ** 2))
    exact = -float(np.log(weights[1].sum() / weights[0].sum()))
    found = noisy_operator_bridge(x, o, generator=np.random.default_rng(0), atoms=[1], inefficiency=ONES)
    assert abs(found.delta_f - exact) < 3 * found.d_delta_f < 1
    assert 0.2 * 0.0158 < found.levels[0].sigma < found.levels[-1].sigma < 2 * 0.0158


def test_it_is_deterministic_and_says_how_far_it_is() -> None:
    x, o, _ = wells(2.0, 200, np.random.default_rng(9))
    said: list[tuple[int, int]] = []
    one, other = (
        noisy_operator_bridge(
            x, o, generator=np.random.default_rng(4), sigmas=[1.0, 0.5], n_bootstrap=3,
            progress=lambda *args: said.append(args),
        )
        for _ in range(2)
    )  # fmt: skip
    text = json.dumps(one.to_dict(), allow_nan=False)
    assert text == json.dumps(other.to_dict(), allow_nan=False)
    assert said == [(1, 2), (2, 2)] * 2
    assert [level.sigma for level in one.levels] == [0.5, 1.0]


def test_a_kernel_of_your_own() -> None:
    x, o, exact = wells(2.0, 1000, np.random.default_rng(10))
    calls = []

    def kernel(frames: np.ndarray, sigma: float, generator: np.random.Generator) -> np.ndarray:
        calls.append((frames.shape, sigma))
        return np.round(frames / sigma) * sigma

    found = noisy_operator_bridge(
        x, o, generator=np.random.default_rng(0), kernel=kernel, sigmas=[0.5], inefficiency=ONES, n_copies=3
    )
    assert calls == [((3000, 2), 0.5)] * 2
    assert abs(found.delta_f - exact) < 3 * found.d_delta_f


def test_only_the_chosen_atoms_are_noised() -> None:
    x = np.random.default_rng(0).normal(size=(10, 4, 3))
    y = GaussianKernel((1, 3))(x, 0.1, np.random.default_rng(1))
    assert (y[:, [0, 2]] == x[:, [0, 2]]).all()
    assert (y - x)[:, [1, 3]].std() == pytest.approx(0.1, rel=0.3)
    assert (GaussianKernel()(x, 0.1, np.random.default_rng(1)) != x).all()


def test_levels_come_from_within_the_states() -> None:
    x = np.random.default_rng(0).normal(size=(5000, 1))
    near, far = default_levels([x, x + 1.0]), default_levels([x, x + 100.0])
    assert np.allclose(near, far, rtol=1e-9)


# ------------------------------------------------------------------------------------- the door


def good() -> dict:
    x, o, _ = wells(1.0, 100, np.random.default_rng(0))
    return {"frames": x, "operators": o, "generator": np.random.default_rng(0)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": [np.zeros((100, 2))]}, "one entry per state each, found 1, 2 and 2"),
        ({"frames": [np.zeros((100, 2)), np.zeros((100, 3))]}, r"frames\[1\]: expected shape"),
        ({"frames": [np.zeros((100, 2, 2))] * 2}, r"frames\[0\]: expected shape"),
        ({"frames": [["a", "b"], ["c", "d"]]}, "expected arrays of real numbers"),
        ({"frames": [np.full((100, 2), np.nan)] * 2}, "expected finite coordinates, found 200"),
        ({"operators": [np.zeros(99), np.zeros(100)]}, "one value for each of 100 frames"),
        ({"operators": [np.full(100, np.inf)] * 2}, "finite values"),
        ({"operators": [np.full(100, 2.5)] * 2}, "expected values that vary, found 2.5 kT"),
        ({"lams": (0.0, 0.5)}, "expected the end states 0 and 1"),
        ({"lams": (1.0, 0.0)}, "strictly increase"),
        ({"generator": 7}, "expected numpy.random.Generator, found int"),
        ({"closure": "best"}, "expected density, tweedie, gamma or heads, found 'best'"),
        ({"n_folds": 1}, "n_folds: expected an integer of at least 2, found 1"),
        ({"n_copies": 0}, "n_copies"),
        ({"n_bootstrap": -1}, "n_bootstrap"),
        ({"sigmas": [0.1, -0.1]}, "sigmas: expected finite numbers > 0"),
        ({"sigmas": []}, "sigmas"),
        ({"atoms": []}, "atoms: expected different indices below 2"),
        ({"atoms": [0, 0]}, "atoms: expected different indices"),
        ({"atoms": [2]}, "atoms: expected different indices"),
        ({"features": lambda y: y[:, 0]}, "features: expected finite values"),
        ({"features": lambda y: np.ones((len(y), 1))}, "every column of the features is constant"),
        ({"inefficiency": (9.0, 9.0)}, "at least 20 independent frames"),
    ],
)  # fmt: skip
def test_bad_input(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        noisy_operator_bridge(**(good() | change))


def test_ends_that_no_level_joins_are_refused() -> None:
    x, o, _ = wells(60.0, 200, np.random.default_rng(0))
    with pytest.raises(ConvergenceError, match="they do not overlap at all"):
        noisy_operator_bridge(
            x, o, generator=np.random.default_rng(0), inefficiency=ONES, sigmas=[0.1, 0.5], n_bootstrap=0
        )


def test_a_level_that_joins_nothing_is_left_out() -> None:
    x, o, _ = wells(60.0, 200, np.random.default_rng(0))
    found = noisy_operator_bridge(
        x, o, generator=np.random.default_rng(0), inefficiency=ONES, sigmas=[0.5, 100.0], n_bootstrap=0
    )
    assert [level.sigma for level in found.levels] == [100.0]
    assert found.d_delta_f > 10
