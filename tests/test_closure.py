"""Closures of the lambda integral, against distributions whose Delta S is known."""

import math
from decimal import Decimal, localcontext

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from openmm_diffforce import closure as c
from openmm_diffforce.errors import InputError

Array = npt.NDArray[np.float64]
EXACT = 1e-10

# D, V_0, V_1 measured on two near-harmonic changes of a bonded ligand; the first has no solution.
BONDED_6 = (84.55, 68.9, 84.0)
BONDED_8 = (78.86, 72.39, 106.09)


def gamma(lam: Array, *, shape: float = 3.0, rate: float = 0.2) -> tuple[Array, Array, float]:
    """O_lam, V_lam and Delta S = -ln E_0 exp(-O); rate < 0 is -O gamma distributed."""
    at = rate + lam
    return shape / at, shape / at**2, shape * math.log((rate + 1) / rate)


def poisson(lam: Array, *, mean: float = 4.0, jump: float = 2.5) -> tuple[Array, Array, float]:
    """O = jump times a Poisson number; jump < 0 rises with lambda."""
    now = mean * np.exp(-jump * lam)
    return jump * now, jump**2 * now, -mean * math.expm1(-jump)


def inverse_gaussian(
    lam: Array, *, mean: float = 5.0, shape: float = 2.0, sign: float = 1.0
) -> tuple[Array, Array, float]:
    root = np.sqrt(1 + sign * 2 * mean**2 * lam / shape)
    end = math.sqrt(1 + sign * 2 * mean**2 / shape)
    return sign * mean / root, mean**3 / shape / root**3, shape / mean * (end - 1)


def gaussian(lam: Array, *, mean: float = -1.0, variance: float = 7.0) -> tuple[Array, Array, float]:
    return mean - variance * lam, variance + 0 * lam, mean - variance / 2


LAWS = {
    "gamma": (gamma, {}, 2.0),
    "gamma, wide": (gamma, {"shape": 0.5, "rate": 1e-3}, 2.0),
    "gamma, narrow": (gamma, {"shape": 1e4, "rate": 1e3}, 2.0),
    "minus gamma": (gamma, {"shape": 3.0, "rate": -1.01}, 2.0),
    "Poisson": (poisson, {}, math.inf),
    "Poisson, wide": (poisson, {"mean": 1e-2, "jump": 25.0}, math.inf),
    "minus Poisson": (poisson, {"jump": -2.5}, math.inf),
    "inverse Gaussian": (inverse_gaussian, {}, 1.5),
    "inverse Gaussian, wide": (inverse_gaussian, {"mean": 500.0, "shape": 0.1}, 1.5),
    "minus inverse Gaussian": (inverse_gaussian, {"mean": 0.9, "shape": 2.0, "sign": -1.0}, 1.5),
    "Gaussian": (gaussian, {}, 0.0),
}


def ends(law: str, lam: tuple[float, ...] = (0.0, 1.0)) -> tuple[Array, Array, float, float]:
    function, settings_, power = LAWS[law]
    o, v, delta = function(np.array(lam), **settings_)
    return o, v, delta, power


def by_decimals(log_ratio: float, s: float) -> tuple[float, float]:
    """int V/V_0 and int (1-lam) V / int V by the antiderivatives, in 120 digits."""
    with localcontext() as context:
        context.prec = 120
        rho, inverse = Decimal(log_ratio), Decimal(s)
        p, log_theta = 1 / inverse, inverse * rho
        theta = log_theta.exp() - 1
        whole = (((1 - p) * log_theta).exp() - 1) / ((1 - p) * theta)
        moment = (((2 - p) * log_theta).exp() - 1) / ((2 - p) * theta)
        return float(whole), float(((1 + theta) * whole - moment) / theta / whole)


@pytest.mark.parametrize("law", LAWS)
def test_tweedie_is_exact_on_its_family(law: str) -> None:
    o, v, delta, p = ends(law)
    found = c.tweedie_closure(o[0], o[1], v[0], v[1])
    assert found.feasible
    assert found.shift == 0
    assert abs(found.delta - delta) <= EXACT * abs(delta)
    if p < math.inf:
        assert_allclose(found.p, p, rtol=1e-5 if law == "gamma, narrow" else 1e-8)
    else:
        assert_allclose(found.s, 0.0, atol=1e-8)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("shift", [0.0, 3e3])
def test_swapping_the_ends_changes_the_sign(law: str, shift: float) -> None:
    o, v, _, _ = ends(law)
    o = o + shift
    found = c.tweedie_closure(o[0], o[1], v[0], v[1])
    back = c.tweedie_closure(-o[1], -o[0], v[1], v[0])
    assert back.delta == -found.delta
    assert back.s == found.s
    assert back.log1p_theta == -found.log1p_theta


def random_family(n: int = 1500) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    log_ratio = rng.uniform(-27.6, 27.6, n) * rng.choice([1.0, 0.1, 1e-3, 1e-6], n)
    s = rng.choice([-1.0, 1.0], n) * 10 ** rng.uniform(-4, 1.2, n)
    return log_ratio, s


def test_against_120_digits() -> None:
    """V_0/V_1 from 1e-12 to 1e12, every power, both signs: Delta S, the power and the heads."""
    log_ratio, s = random_family()
    whole, weight = np.array([by_decimals(a, b) for a, b in zip(log_ratio, s, strict=True)]).T
    one, zero = np.ones_like(s), np.zeros_like(s)
    v_0 = 1 / whole
    found = c.tweedie_closure(one, zero, v_0, v_0 * np.exp(-log_ratio))
    assert found.feasible.all()
    assert_allclose(found.delta, 1 - weight, rtol=0, atol=1e-14)
    wide = np.abs(log_ratio) > 0.1
    assert_allclose(found.s[wide], s[wide], rtol=1e-9, atol=1e-9)
    assert_allclose(found.theta[wide], np.expm1(s * log_ratio)[wide], rtol=1e-7, atol=1e-9)

    heads = c.heads_to_moments(zero, one, np.exp(log_ratio), s)
    assert_allclose(heads.delta, 1 - weight, rtol=0, atol=1e-14)
    assert_allclose(heads.v_0, v_0, rtol=1e-12)
    assert_allclose(heads.v_1, heads.v_0 * np.exp(-log_ratio), rtol=1e-12)
    assert_array_equal(heads.o_0, one)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_sizes_from_micro_to_mega(size: float) -> None:
    """n independent copies have n times every moment, and n times Delta S."""
    log_ratio, s = random_family(200)
    heads = c.heads_to_moments(s, np.ones_like(s), np.exp(log_ratio), s)
    one = c.tweedie_closure(heads.o_0, heads.o_1, heads.v_0, heads.v_1)
    many = c.tweedie_closure(*(size * a for a in (heads.o_0, heads.o_1, heads.v_0, heads.v_1)))
    assert_allclose(many.delta, size * one.delta, rtol=0, atol=1e-12 * size)
    moved = c.tweedie_closure(heads.o_0 + 64.0, heads.o_1 + 64.0, heads.v_0, heads.v_1)
    assert_allclose(moved.delta - 64.0, one.delta, rtol=0, atol=1e-12)


@pytest.mark.parametrize("s", [-1.0, 0.0, 0.5, 2 / 3, 1.0])
def test_smooth_through_equal_variances(s: float) -> None:
    """No jump larger than the slope allows; Hermite to second order; the same from the moments."""
    x = np.linspace(-1e-3, 1e-3, 4001)
    zero = np.zeros_like(x)
    heads = c.heads_to_moments(zero, zero + 2.0, np.exp(x), zero + s)
    hermite = c.hermite_closure(heads.o_0, heads.o_1, heads.v_0, heads.v_1)
    assert_allclose(heads.delta, hermite, rtol=0, atol=1e-9)
    assert heads.delta[2000] == 1.0
    assert np.abs(np.diff(heads.delta, 2)).max() < 1e-14
    found = c.tweedie_closure(heads.o_0, heads.o_1, heads.v_0, heads.v_1)
    assert found.feasible.all()
    assert_allclose(found.delta, heads.delta, rtol=0, atol=1e-13)


@pytest.mark.parametrize("d", [0.9, 0.99999, 1.0, 1.00001, 1.1])
def test_no_jump_across_equal_variances_at_fixed_difference(d: float) -> None:
    """D stays, V_0 - V_1 goes through 0: in and out of the feasible set."""
    step = 1e-5
    x = np.arange(-30000, 30001) * step
    found = c.tweedie_closure(d + 0 * x, 0 * x, 1 + x, 1 - x)
    assert found.feasible.any()
    # Hermite's slope is 1/6; a jump would add to it.
    assert np.abs(np.diff(found.delta)).max() <= step * 0.5
    fine = np.linspace(-1e-9, 1e-9, 201)
    close = c.tweedie_closure(d + 0 * fine, 0 * fine, 1 + fine, 1 - fine)
    assert np.abs(np.diff(close.delta)).max() <= 1e-9


def test_heads_are_smooth_through_poisson_and_equal_variances() -> None:
    for r in (0.3, 1.0, 20.0):
        s = np.linspace(-0.02, 0.02, 2001)
        one = np.ones_like(s)
        heads = c.heads_to_moments(0 * s, one, r * one, s)
        for values in (heads.delta, heads.v_0):
            assert np.abs(np.diff(values, 2)).max() < 1e-8
    exact = c.heads_to_moments(0.0, 1.0, 20.0, 0.0)
    assert_allclose(exact.v_0, 20.0 * math.log(20.0) / 19.0, rtol=1e-13)


def test_gamma_closure() -> None:
    for law in ("gamma", "gamma, wide", "gamma, narrow", "minus gamma"):
        o, v, delta, _ = ends(law)
        assert abs(c.gamma_closure(o[0], o[1], v[0], v[1]) - delta) <= EXACT * abs(delta)
    # The formula as it is written, where it does not cancel, and through its singularity.
    theta = np.array([-0.9, -0.3, 0.5, 9.0, 1e5])
    w = (1 + theta) / theta - (1 + theta) * np.log1p(theta) / theta**2
    one = np.ones_like(theta)
    assert_allclose(c.gamma_closure(one, 0 * one, (1 + theta) ** 2, one), 1 - w, rtol=1e-12, atol=1e-15)
    x = np.linspace(-1e-4, 1e-4, 2001)
    near = c.gamma_closure(1 + 0 * x, 0 * x, (1 + x) ** 2, 1 + 0 * x)
    assert_allclose(near, 0.5 - x / 6, rtol=0, atol=1e-8)
    assert np.abs(np.diff(near, 2)).max() < 1e-13
    # One end without spread: the law drops to the other end's mean.
    assert_allclose(
        c.gamma_closure([3.0, 3.0, 3.0], [1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [0.0, 2.0, 0.0]), [1, 3, 2]
    )


def test_diagnostic_closures() -> None:
    moments = (np.array([3.0]), np.array([1.0]), np.array([5.0]), np.array([2.0]))
    assert c.trapezoid_closure(*moments) == 2.0
    assert c.hermite_closure(*moments) == 1.75
    assert c.cumulant_closure(*moments) == 0.5
    assert c.cumulant_closure(*moments, end=1) == 2.0
    with pytest.raises(InputError, match="end: expected 0 or 1"):
        c.cumulant_closure(*moments, end=2)


# ------------------------------------------------------------------------ feasibility

finite = st.floats(-1e4, 1e4)
variances = st.floats(1e-6, 1e6)


@settings(max_examples=300, deadline=None, database=None)
@given(o_1=finite, v_0=variances, v_1=variances, place=st.floats(0.0, 1.0))
def test_the_bracket_holds(o_1: float, v_0: float, v_1: float, place: float) -> None:
    d = v_1 + place * (v_0 - v_1)
    o_0 = o_1 + d
    found = c.tweedie_closure(o_0, o_1, v_0, v_1)
    slack = 1e-12 * (abs(o_0) + abs(o_1))
    assert np.isfinite(found.delta)
    assert o_1 - slack <= found.delta <= o_0 + slack
    assert not np.isnan(found.s)
    assert not np.isnan(found.p)
    assert not np.isnan(found.theta)
    if d > 1e-6 * (abs(o_0) + abs(o_1)):  # else D is lost in the rounding of O_0
        assert found.feasible
    # Variance that falls: below the chord; that rises: above.
    assert (found.delta - (o_0 + o_1) / 2) * np.sign(v_1 - v_0) >= -slack


@settings(max_examples=300, deadline=None, database=None)
@given(o_0=finite, o_1=finite, v_0=st.floats(0.0, 1e6), v_1=st.floats(0.0, 1e6))
@example(o_0=0.0, o_1=0.0, v_0=5e-324, v_1=5e-324)
@example(o_0=1.0, o_1=1.0, v_0=5e-324, v_1=1e-310)
@example(o_0=1.0, o_1=0.0, v_0=1e-308, v_1=1.0)
@example(o_0=1e-300, o_1=0.0, v_0=1e-199, v_1=1e-190)
def test_nothing_is_nan_and_nothing_is_silent(o_0: float, o_1: float, v_0: float, v_1: float) -> None:
    found = c.tweedie_closure(o_0, o_1, v_0, v_1)
    assert np.isfinite(found.delta)
    assert np.isfinite(found.moments).all()
    assert not np.isnan(np.array([found.s, found.p, found.theta, found.log1p_theta])).any()
    d, a, b = found.moments
    assert min(a, b) * (1 - 2e-9) <= d <= max(a, b) * (1 + 2e-9)
    assert bool(found.feasible) == (found.shift == 0)
    assert min(o_0, o_1) - 1e-9 <= found.delta <= max(o_0, o_1) + 1e-9 or not found.feasible


def test_the_edge_of_the_feasible_set() -> None:
    """On the edge and beyond it the closure is the trapezoid, reached without a jump."""
    for v_0, v_1 in ((2.0, 1.0), (1.0, 2.0)):
        d = 1.0 + np.array([-1.0, -0.5, -1e-3, 0.0, 1e-12, 1e-6, 1 - 1e-6, 1.0, 1 + 1e-3, 3.0])
        one = np.ones_like(d)
        found = c.tweedie_closure(d, 0 * d, v_0 * one, v_1 * one)
        assert_array_equal(found.feasible, [False] * 3 + [True] * 5 + [False] * 2)
        assert_allclose(found.delta[[0, 1, 2, 3, 7, 8, 9]], d[[0, 1, 2, 3, 7, 8, 9]] / 2, atol=1e-12)
        assert_allclose(found.delta, d / 2, atol=1e-6)
        assert np.isinf(found.s[[3, 7]]).all()
        assert_array_equal(found.p[[3, 7]], [0.0, 0.0])
    far = c.tweedie_closure(1.5, 0.0, 2.0, 1.0)
    assert abs(far.delta - 0.75) > 0.05


def test_operators_without_spread() -> None:
    found = c.tweedie_closure([3.0], [3.0], [0.0], [0.0])
    assert found.feasible[0]
    assert found.delta[0] == 3.0
    one_sided = c.tweedie_closure([3.0], [2.5], [1.0], [0.0])
    assert not one_sided.feasible[0]
    assert 2.5 <= one_sided.delta[0] <= 3.0


def brute_force(x: Array, covariance: Array) -> float:
    """Smallest distance from x to either plane of the feasible set, by a grid of the plane."""
    inverse = np.linalg.inv(covariance)
    best = math.inf
    grid = np.linspace(1e-3, 12.0, 1501)
    a, b = np.meshgrid(grid, grid, indexing="ij")
    for moments in (np.stack([a, b, a], -1), np.stack([a, a, b], -1)):
        gap = moments - x
        best = min(best, float(np.einsum("...i,ij,...j->...", gap, inverse, gap).min()))
    return math.sqrt(best)


@pytest.mark.parametrize("seed", range(4))
def test_projection_is_the_nearest_point(seed: int) -> None:
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(3, 3))
    covariance = root @ root.T + 0.05 * np.eye(3)
    x = np.array([0.3, 2.0, 5.0]) if seed % 2 else np.array([9.0, 2.0, 5.0])
    found = c.project_feasible(x, covariance)
    gap = found.moments - x
    assert not found.feasible
    assert_allclose(found.shift**2, gap @ np.linalg.solve(covariance, gap), rtol=1e-8)
    assert_allclose(found.shift, brute_force(x, covariance), rtol=1e-3)
    again = c.project_feasible(found.moments, covariance)
    assert again.feasible
    assert_array_equal(again.moments, found.moments)


def test_projection_keeps_variances_positive() -> None:
    """D < 0 with a loose V_0 and V_1 would pull them below zero."""
    covariance = np.diag([1e-4, 1.0, 1.0])
    x = np.array([-1.0, 0.5, 2.0])
    found = c.project_feasible(x, covariance)
    assert found.moments.min() > 0
    assert found.moments.max() < 2.1
    # D at its floor of 0 with V_0 there too: 1 in D and 1/2 in V_0, almost.
    assert_allclose(found.shift, math.hypot(1.0 / 1e-2, 0.5), rtol=1e-6)
    lost = c.project_feasible([0.5, 1.0, 0.0], np.eye(3))
    assert not lost.feasible
    assert 0 < lost.moments[2] < 1e-12
    assert_allclose(lost.moments[:2], [0.5, 1.0])


def test_projection_is_symmetric_and_vectorised() -> None:
    rng = np.random.default_rng(3)
    x = np.abs(rng.normal(size=(2, 50, 3))) * [1, 3, 1]
    found = c.project_feasible(x)
    swapped = c.project_feasible(x[..., [0, 2, 1]])
    assert found.shift.shape == found.feasible.shape == (2, 50)
    assert 10 < found.feasible.sum() < 90
    assert_allclose(swapped.moments[..., [0, 2, 1]], found.moments)
    assert_allclose(swapped.shift, found.shift)
    one = c.project_feasible(x[1, 7])
    assert_array_equal(one.moments, found.moments[1, 7])
    many = np.broadcast_to(np.diag([1.0, 2.0, 3.0]), (2, 50, 3, 3))
    assert_array_equal(c.project_feasible(x, many).shift, c.project_feasible(x, many[0, 0]).shift)


def test_bonded_moments() -> None:
    """The two near-harmonic changes: one outside by half a standard error, one inside but close."""
    d, v_0, v_1 = BONDED_6
    for relative in (0.01, 0.02):
        covariance = np.diag((relative * np.array(BONDED_6)) ** 2)
        found = c.tweedie_closure(d, 0.0, v_0, v_1, covariance=covariance)
        assert not found.feasible
        assert_allclose(found.shift, 0.55 / (relative * math.hypot(84.55, 84.0)), rtol=1e-9)
        assert found.shift < 1
        assert_allclose(found.delta, d / 2, rtol=1e-12)
        assert_allclose(found.moments[0], found.moments[2], rtol=1e-12)
    inside = c.tweedie_closure(BONDED_8[0], 0.0, BONDED_8[1], BONDED_8[2])
    assert inside.feasible
    low, high = d_bracket = (BONDED_8[0] / 2, c.hermite_closure(BONDED_8[0], 0.0, *BONDED_8[1:]))
    assert low < inside.delta < high, d_bracket
    # Close to the boundary Delta S forgets the variances: within a kT of the trapezoid's side.
    rng = np.random.default_rng(0)
    many = np.array(BONDED_8) * (1 + 0.1 * rng.normal(size=(500, 3)))
    scanned = c.tweedie_closure(many[:, 0], 0 * many[:, 0], many[:, 1], many[:, 2])
    assert np.isfinite(scanned.delta).all()
    assert 0.1 < np.mean(~scanned.feasible) < 0.9
    assert (scanned.shift[~scanned.feasible] > 0).all()


# --------------------------------------------------------------------------- composite


@pytest.mark.parametrize("law", ["gamma, wide", "minus Poisson", "Gaussian"])
def test_composite_of_an_exact_closure_is_exact(law: str) -> None:
    lam = (0.0, 0.01, 0.2, 0.7, 1.0)
    o, v, delta, _ = ends(law, lam)
    both = c.composite_closure(lam, np.stack([o, o], 1), np.stack([v, v], 1))
    assert both.parts.shape == both.feasible.shape == (4, 2)
    assert both.feasible.all()
    assert_allclose(both.delta, delta, rtol=1e-10)


def test_composite_converges_where_the_closure_is_wrong() -> None:
    """O = two independent parts, gamma and Poisson: outside the family."""

    def error(n: int, closure: c.Closure) -> float:
        lam = np.linspace(0, 1, n + 1)
        a, b = gamma(lam, shape=2.0, rate=0.05), poisson(lam, jump=4.0)
        found = c.composite_closure(lam, a[0] + b[0], a[1] + b[1], closure=closure)
        return abs(float(found.delta) - a[2] - b[2])

    assert error(1, c.tweedie_closure) > 0.01
    errors = [error(n, c.tweedie_closure) for n in (1, 4, 16, 64)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5
    assert error(16, c.tweedie_closure) < 0.1 * error(16, c.hermite_closure)
    # Fourth order for Hermite, second for the trapezoid.
    assert 12 < error(128, c.hermite_closure) / error(256, c.hermite_closure) < 17
    assert 3.8 < error(256, c.trapezoid_closure) / error(512, c.trapezoid_closure) < 4.2


# ----------------------------------------------------------------------------- readout


def gamma_frames(seed: int, n: int = 2000) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return rng.gamma(2.0, 1.0, n), rng.gamma(2.0, 0.5, n)


def test_readout_is_right_within_its_error() -> None:
    scores = []
    for seed in range(60):
        found = c.moment_readout(
            *gamma_frames(seed), generator=np.random.default_rng(seed + 100), n_bootstrap=100
        )
        scores.append((found.delta_f - 2 * math.log(2)) / found.d_delta_f)
        assert 0.005 < found.d_delta_f < 0.05
    assert abs(np.mean(scores)) < 4 / math.sqrt(60)
    assert 0.7 < np.std(scores) < 1.35


def test_readout_counts_blocks_and_correlation() -> None:
    """Every frame ten times over: the error grows by sqrt(10) once blocks are long enough."""
    o_0, o_1 = gamma_frames(0)
    long = np.repeat(o_0, 10), np.repeat(o_1, 10)
    rng = np.random.default_rng(0)
    plain = c.moment_readout(o_0, o_1, generator=rng, n_bootstrap=400)
    blocks = c.moment_readout(*long, generator=rng, n_bootstrap=400, block=50)
    naive = c.moment_readout(*long, generator=rng, n_bootstrap=400)
    assert_allclose(blocks.d_delta_f, plain.d_delta_f, rtol=0.2)
    assert naive.d_delta_f < 0.5 * blocks.d_delta_f
    assert_allclose(plain.d_o_0, math.sqrt(2 / 2000), rtol=0.15)
    again = c.moment_readout(*long, generator=np.random.default_rng(5), block=7)
    assert again == c.moment_readout(*long, generator=np.random.default_rng(5), block=7)


def test_readout_projects_and_says_so() -> None:
    """Gaussian O sits on the edge: half of all samples are infeasible, and all are finite."""
    exact, shifts, scores = -1.0 - 7.0 / 2, [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        o_0, o_1 = rng.normal(-1, math.sqrt(7), 500), rng.normal(-8, math.sqrt(7), 500)
        found = c.moment_readout(o_0, o_1, generator=rng, n_bootstrap=50)
        assert found.feasible == (found.shift == 0)
        shifts.append(found.shift)
        scores.append((found.delta_f - exact) / found.d_delta_f)
    assert 5 < np.count_nonzero(shifts) < 39
    assert max(shifts) < 4
    assert abs(np.mean(scores)) < 4 / math.sqrt(40)
    assert 0.6 < np.std(scores) < 1.5
    # Two ensembles that no Delta S connects: far out, and the shift says it.
    rng = np.random.default_rng(0)
    bad = c.moment_readout(rng.normal(50, 1, 500), rng.normal(0, 1, 500), generator=rng)
    assert not bad.feasible
    assert bad.shift > 4
    assert bad.feasible_fraction == 0
    assert math.isfinite(bad.delta_f)
    assert bad.to_dict()["s"] is None
    assert bad.to_dict()["n_frames"] == [500, 500]


def test_readout_moves_all_four_moments() -> None:
    """The mean of both ends follows the projection by its covariance: one plane in four dimensions."""
    rng = np.random.default_rng(1)
    skew = rng.gamma(1.0, 1.0, 400)  # mean and variance correlate
    o_0, o_1 = 4.0 + skew, rng.normal(0.0, 1.0, 400)
    seen = c.moment_readout(o_0, o_1, generator=np.random.default_rng(7), n_bootstrap=50)
    assert not seen.feasible
    rng = np.random.default_rng(7)
    drawn = np.stack([c._block_bootstrap(o, rng, 50, 1) for o in (o_0, o_1)], axis=1)

    def four(a: Array) -> Array:
        return np.stack([a[..., :, 0].mean(-1), a[..., 0, 0] - a[..., 1, 0], a[..., 0, 1], a[..., 1, 1]], -1)

    covariance = np.cov(four(drawn), rowvar=False)
    x = four(np.array([[o.mean(), o.var(ddof=1)] for o in (o_0, o_1)]))
    found = []
    for n in np.array([[0.0, 1, 0, -1], [0.0, 1, -1, 0]]):
        moved = x - covariance @ n * (n @ x) / (n @ covariance @ n)
        found.append((abs(n @ x) / math.sqrt(n @ covariance @ n), moved[0]))
    shift, mean = min(found)
    assert_allclose(seen.shift, shift, rtol=1e-9)
    assert_allclose(seen.delta_f, mean, rtol=1e-9)
    assert abs(mean - x[0]) > 0.01


def test_readout_with_other_closures() -> None:
    o_0, o_1 = gamma_frames(1)
    for closure in (c.gamma_closure, c.hermite_closure, c.trapezoid_closure, c.cumulant_closure):
        found = c.moment_readout(o_0, o_1, closure=closure, generator=np.random.default_rng(0))
        want = closure(found.o_0, found.o_1, found.v_0, found.v_1)
        assert_allclose(found.delta_f, want, rtol=1e-12)
    constant = c.moment_readout(np.full(50, 2.0), np.full(50, 2.0), generator=np.random.default_rng(0))
    assert constant.delta_f == 2.0
    assert constant.d_delta_f == 0.0


# ---------------------------------------------------------------------------- bad input

ONE = np.ones(3)
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: c.tweedie_closure([np.nan], [0.0], [1.0], [1.0]), "o_0: expected finite"),
        (lambda: c.tweedie_closure([2.0], [np.inf], [1.0], [1.0]), "o_1: expected finite"),
        (lambda: c.tweedie_closure([2.0], [0.0], [-1.0], [1.0]), "v_0: expected variances >= 0"),
        (lambda: c.gamma_closure([2.0], [0.0], [1.0], [-1.0]), "v_1: expected variances >= 0"),
        (lambda: c.hermite_closure(ONE, ONE, ONE, np.ones(2)), "expected one shape"),
        (lambda: c.trapezoid_closure(ONE, ONE, ONE, 1.0), "expected one shape"),
        (lambda: c.cumulant_closure("a", 1.0, 1.0, 1.0), "o_0: expected an array of real numbers"),
        (lambda: c.tweedie_closure([1j], [0.0], [1.0], [1.0]), "o_0: expected an array of real numbers"),
        (lambda: c.tweedie_closure([[1.0], [1.0, 2.0]], 0, 1, 1), "o_0: expected an array of real numbers"),
        (lambda: c.project_feasible(np.ones(4)), "moments: expected shape"),
        (lambda: c.project_feasible(2.0), "moments: expected shape"),
        (lambda: c.project_feasible([1.0, -1.0, 1.0]), "moments: expected variances >= 0"),
        (lambda: c.project_feasible([3.0, 1.0, 2.0], np.eye(2)), "covariance: expected shape"),
        (
            lambda: c.project_feasible([3.0, 1.0, 2.0], np.diag([1.0, -1.0, 1.0])),
            "covariance: expected a symm",
        ),
        (
            lambda: c.project_feasible([3.0, 1.0, 2.0], np.eye(3) + np.eye(3, k=1)),
            "covariance: expected a symm",
        ),
        (lambda: c.project_feasible([3.0, 1.0, 2.0], np.zeros((3, 3))), "covariance: expected one that lets"),
        (lambda: c.composite_closure([0.0, 1.0, 1.0], ONE, ONE), "lams: expected"),
        (lambda: c.composite_closure([0.0], ONE[:1], ONE[:1]), "lams: expected"),
        (lambda: c.composite_closure([0.0, 1.0], ONE, ONE), "o_k, v_k: expected one shape"),
        (lambda: c.heads_to_moments(ONE, ONE, ONE, 1.0), "heads: expected one shape"),
        (lambda: c.heads_to_moments(1.0, 0.0, 1.0, 1.0), "difference: expected positive"),
        (lambda: c.heads_to_moments(1.0, 1.0, -1.0, 1.0), "ratio: expected positive"),
        (lambda: c.heads_to_moments(1.0, 1.0, 1.0, np.nan), "s: expected finite"),
        (lambda: c.moment_readout(np.ones((9, 9)), ONE, generator=RNG), "o_on_0: expected shape"),
        (lambda: c.moment_readout(np.arange(99.0), ONE, generator=RNG), "o_on_1: expected shape"),
        (
            lambda: c.moment_readout(np.arange(99.0), np.arange(99.0), generator=RNG, block=50),
            "sample longer",
        ),
        (lambda: c.moment_readout(np.arange(99.0), np.arange(99.0), generator=0), "generator: expected"),
        (lambda: c.moment_readout(ONE, ONE, generator=RNG, block=0), "block: expected an integer"),
        (lambda: c.moment_readout(ONE, ONE, generator=RNG, n_bootstrap=2.5), "n_bootstrap: expected"),
        (lambda: c.moment_readout(np.ones(99), np.zeros(99), generator=RNG), "moments without spread"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, match: str) -> None:
    with pytest.raises(InputError, match=match):
        call()
