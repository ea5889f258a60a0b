r"""Closures of the lambda integral: Delta S from means and variances of the operator at both ends.

For linear mixing the noised operator falls with lambda at the rate of its conditional variance,
``dO_lam/dlam = -V_lam``, so that

.. math:: \Delta S = \int_0^1 O_\lambda d\lambda
          = O_0 - \int_0^1 (1 - \lambda) V_\lambda d\lambda , \qquad
          D = O_0 - O_1 = \int_0^1 V_\lambda d\lambda .

A closure is a guess of ``V_lam`` between its ends. The Tweedie closure is a power law with three
parameters, fixed by ``D``, ``V_0`` and ``V_1``. All of it is elementary in two variables,

.. math:: k = \tfrac14 \ln(V_0/V_1), \qquad q = \tfrac12 \ln(1+\theta) - k = (2/p - 1)\, k ,

with S(x) = sinh(x)/x, C(x) = x coth(x) and the Langevin function coth(x) - 1/x = (ln S)':

.. math:: \ln\frac{\sqrt{V_0 V_1}}{D} = \ln S(q+k) - \ln S(q-k), \qquad
          \Delta S = \frac{O_0 + O_1}{2} - D\, \frac{C(q+k) - C(q-k)}{4 q} .

Swapping the ends is (k, q) -> (-k, -q); q = 0 is the gamma closure, q = -k the Poisson closure.
Nothing here needs OpenMM or torch.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import zeta

from .errors import InputError

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

FEASIBLE_MARGIN = 1e-9
"""Relative distance by which D may lie outside [min(V_0, V_1), max(V_0, V_1)] and still count as on
its boundary: rounding of O_0 - O_1 must not make a Gaussian infeasible."""

VARIANCE_FLOOR = 1e-14
"""Smallest variance after a projection, relative to the largest of V_0, V_1 and |D|."""

NOTHING = 1e-200
"""Moments smaller than this count as 0: products of them would underflow [kT, kT^2]."""

MIN_BLOCKS = 5
"""Blocks per end below which a bootstrap error means nothing."""

# coth(x) - 1/x = sum_n _SERIES[n] x^(2n+1), |x| < pi; twelve terms are exact to rounding below 1/2.
_SERIES = np.array([2.0 * (-1) ** (n + 1) * zeta(2 * n) / math.pi ** (2 * n) for n in range(1, 13)])
_ODD = 2.0 * np.arange(12) + 1.0
_SMALL = 0.5
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(8)
_WEIGHTS = 0.5 * _WEIGHTS  # means over [-1, 1]; exact to rounding for half-widths below 1/2
_FAR = 20.0  # exp(-2 * 20) is below rounding


# ------------------------------------------------------------------- elementary functions


def _odd_series(x: FloatArray, factors: Any = 1.0) -> FloatArray:
    out = np.zeros_like(x)
    for c in (_SERIES * factors)[::-1]:
        out = out * x * x + c
    return out * x


def _langevin(x: FloatArray) -> FloatArray:
    """coth(x) - 1/x."""
    small = np.abs(x) < _SMALL
    y = np.where(small, 1.0, x)
    return np.where(small, _odd_series(np.where(small, x, 0.0)), 1.0 / np.tanh(y) - 1.0 / y)


def _langevin_slope(x: FloatArray) -> FloatArray:
    """1/x^2 - 1/sinh(x)^2."""
    small = np.abs(x) < _SMALL
    y = np.where(small, 1.0, np.abs(x))
    e = np.exp(-2.0 * y)
    series = np.zeros_like(x)
    z = np.where(small, x, 0.0)
    for c in (_SERIES * _ODD)[::-1]:
        series = series * z * z + c
    return np.where(small, series, 1.0 / y**2 - 4.0 * e / (1.0 - e) ** 2)


def _xcothx_slope(x: FloatArray) -> FloatArray:
    """d/dx of x coth(x) = coth(x) - x/sinh(x)^2."""
    small = np.abs(x) < _SMALL
    y = np.where(small, 1.0, np.abs(x))
    e = np.exp(-2.0 * y)
    far = np.sign(x) * ((1.0 + e) / (1.0 - e) - 4.0 * y * e / (1.0 - e) ** 2)
    return np.where(small, _odd_series(np.where(small, x, 0.0), _ODD + 1.0), far)


def _log_mean_exp(x: FloatArray) -> FloatArray:
    """ln of int_0^1 exp(-x w) dw = ln[(1 - exp(-x))/x]."""
    y = np.where(x == 0.0, 1.0, np.abs(x))
    return np.where(x == 0.0, 0.0, np.maximum(-x, 0.0) + np.log(-np.expm1(-y) / y))


def _distance(q: FloatArray, k: FloatArray) -> tuple[FloatArray, FloatArray]:
    """y = 1 - [ln S(q+k) - ln S(q-k)]/(2k) for k >= 0, and -dy/dq.

    ln(D/V_1) = 2 k y where V_1 <= V_0. At k = 0 it is 1 minus the Langevin function.
    """
    y, slope = np.empty_like(q), np.empty_like(q)
    near = k < _SMALL
    x = q[near, None] + k[near, None] * _NODES
    y[near] = 1.0 - _langevin(x) @ _WEIGHTS
    slope[near] = _langevin_slope(x) @ _WEIGHTS
    a, b, width = q[~near] + k[~near], q[~near] - k[~near], 2.0 * k[~near]
    y[~near] = (_log_mean_exp(2.0 * b) - _log_mean_exp(2.0 * a)) / width
    slope[~near] = (_langevin(a) - _langevin(b)) / width
    return y, slope


def _asymmetry(q: FloatArray, k: FloatArray) -> FloatArray:
    """[C(q+k) - C(q-k)]/(4q), C(x) = x coth(x), for q, k >= 0: in [0, 1/2), 0 for infinite q."""
    out = np.empty_like(q)
    near = q < _SMALL
    x = k[near, None] + q[near, None] * _NODES
    out[near] = 0.5 * (_xcothx_slope(x) @ _WEIGHTS)
    far = q - k > _FAR
    out[far] = 0.5 * k[far] / q[far]
    rest = ~(near | far)
    a, b, c = q[rest] + k[rest], q[rest] - k[rest], q[rest]
    out[rest] = (a * _langevin(a) - b * _langevin(b)) / (4.0 * c)
    return out


def _solve_distance(y: FloatArray, k: FloatArray) -> FloatArray:
    """q >= 0 with _distance(q, k) = y, for y in [0, 1] and k >= 0; infinite for y = 0."""
    x = k * y
    with np.errstate(divide="ignore", over="ignore"):
        # Without terms exp(-2(q-k)): y = ln[(q+k)/(q-k)]/(2k).
        q = (1.0 + x * _langevin(x)) / y
    todo = np.flatnonzero(~(q - k > _FAR))
    tau, target, width = 1.0 - y[todo], y[todo], k[todo]
    # Bounds from L(x) <= min(x/3, x/(1+x)) and L(x) >= 1 - 1/x, L being increasing and concave.
    gain = _langevin(width)
    linear = np.minimum(width, width * tau / np.where(gain > 0.0, gain, 1.0))
    low = np.maximum(np.maximum(3.0 * tau, tau / target), linear)
    high = np.maximum(width + 1.0 / target, low)
    now = low.copy()
    active = np.arange(todo.size)
    for _ in range(100):
        if active.size == 0:
            break
        at, goal = now[active], target[active]
        found, slope = _distance(at, width[active])
        below = found > goal  # y falls with q
        low[active] = np.where(below, at, low[active])
        high[active] = np.where(below, high[active], at)
        # Newton on 1/y, which is nearly linear in q far out.
        step = found / goal * (found - goal) / slope
        new = at + step
        inside = (new >= low[active]) & (new <= high[active])
        new = np.where(inside, new, 0.5 * (low[active] + high[active]))
        done = np.abs(new - at) <= 1e-12 * (1.0 + new)  # quadratic: the step after is rounding
        now[active] = new
        active = active[~done & (found != goal)]
    q[todo] = np.where(tau <= 0.0, 0.0, now)
    return q


# ------------------------------------------------------------------------------ the door


def _array(name: str, value: Any) -> FloatArray:
    try:
        out = np.asarray(value)
        if out.dtype.kind not in "fiu":
            raise TypeError(f"dtype {out.dtype}")
        out = out.astype(np.float64)
    except (TypeError, ValueError) as err:
        raise InputError(f"{name}: expected an array of real numbers, found {err}.") from err
    if not np.isfinite(out).all():
        raise InputError(
            f"{name}: expected finite numbers, found {np.count_nonzero(~np.isfinite(out))} that are not; "
            "remove those frames, or mend the energies behind them."
        )
    return out


def _moments(o_0: Any, o_1: Any, v_0: Any, v_1: Any) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    found = {"o_0": o_0, "o_1": o_1, "v_0": v_0, "v_1": v_1}
    arrays = {name: _array(name, value) for name, value in found.items()}
    shapes = {name: a.shape for name, a in arrays.items()}
    if len(set(shapes.values())) != 1:
        raise InputError(f"moments: expected one shape for all four, found {shapes}.")
    for name in ("v_0", "v_1"):
        if (arrays[name] < 0.0).any():
            raise InputError(f"{name}: expected variances >= 0, found {arrays[name].min():g}.")
    return arrays["o_0"], arrays["o_1"], arrays["v_0"], arrays["v_1"]


# ------------------------------------------------------------------------- projection


@dataclass(frozen=True)
class FeasibleMoments:
    """What :func:`project_feasible` returns.

    Attributes
    ----------
    moments : numpy.ndarray, shape (..., 3)
        D, V_0 and V_1 [kT, kT^2, kT^2], feasible; untouched where they were.
    feasible : numpy.ndarray of bool, shape (...)
        Whether the input was.
    shift : numpy.ndarray, shape (...)
        Mahalanobis distance moved: standard errors of the given covariance, or a relative distance
        in the default metric; 0 where nothing moved.
    """

    moments: FloatArray
    feasible: BoolArray
    shift: FloatArray


def _is_feasible(x: FloatArray, margin: float = FEASIBLE_MARGIN) -> BoolArray:
    low, high = np.minimum(x[..., 1], x[..., 2]), np.maximum(x[..., 1], x[..., 2])
    inside = (x[..., 0] >= low * (1.0 - margin)) & (x[..., 0] <= high * (1.0 + margin))
    return np.asarray(inside & ((low > 0.0) | (high == 0.0)))


# Rows (D, V_0, V_1) of the surfaces on which a projection may end.
_PLANES = np.array([[1.0, 0.0, -1.0], [1.0, -1.0, 0.0]])  # D = V_1, D = V_0
_FLOORS = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # V_0 = floor, V_1 = floor


def _nearest(x: FloatArray, covariance: FloatArray, floor: float) -> tuple[FloatArray, float]:
    """Nearest feasible point of one infeasible one: the best of all sets of active surfaces."""
    best, distance = x, math.inf
    for n_planes, n_floors in itertools.product(((), (0,), (1,)), ((), (0,), (1,), (0, 1))):
        rows = np.concatenate([_PLANES[list(n_planes)], _FLOORS[list(n_floors)]])
        if len(rows) == 0:
            continue
        value = np.r_[np.zeros(len(n_planes)), np.full(len(n_floors), floor)]
        miss = rows @ x - value
        gram = rows @ covariance @ rows.T
        spread = np.sqrt(np.maximum(np.diag(gram), np.finfo(float).tiny))
        inverse = np.linalg.pinv(gram / np.outer(spread, spread), rcond=1e-13, hermitian=True)
        pull = inverse @ (miss / spread) / spread
        new = x - covariance @ rows.T @ pull
        if np.abs(rows @ new - value).max() > 1e-9 * max(np.abs(x).max(), floor):
            continue  # the covariance does not let it move there
        new[[1 + j for j in n_floors]] = floor
        for j in n_planes:
            new[0] = new[2 - j]
        if new[1:].min() < floor or not _is_feasible(new):
            continue
        length = math.sqrt(max(float(miss @ pull), 0.0))
        if length < distance:
            best, distance = new, length
    return best, distance


def project_feasible(moments: Any, covariance: Any = None) -> FeasibleMoments:
    r"""Nearest moments for which a power law V_lam with the right ends and integral exists.

    Feasible are V_0, V_1 > 0 with ``min(V_0, V_1) <= D <= max(V_0, V_1)``, and D = V_0 = V_1 = 0 (an
    operator without spread). Whatever is infeasible ends on D = V_0 or D = V_1, the nearer plane of

    .. math:: x' = x - \Sigma n \frac{n \cdot x}{n \cdot \Sigma n}, \qquad
              \mathrm{shift} = \frac{|n \cdot x|}{\sqrt{n \cdot \Sigma n}}, \qquad
              n = (1, 0, -1) \text{ or } (1, -1, 0),

    unless a variance is or would be below its floor; then the nearest point above the floor is taken.

    ==============  ============================
    symbol          code
    ==============  ============================
    x               ``moments``, (D, V_0, V_1)
    Sigma           ``covariance``
    x'              ``FeasibleMoments.moments``
    ==============  ============================

    Parameters
    ----------
    moments : array_like, shape (..., 3)
        D = O_0 - O_1, V_0, V_1 [kT, kT^2, kT^2].
    covariance : array_like, shape (3, 3) or (..., 3, 3), optional
        Of the moments, by bootstrap for instance. Default: independent errors as large as the
        moments, diag(max(|D|, min(V_0, V_1))^2, V_0^2, V_1^2), so that ``shift`` is a relative
        distance (0.01 reads one per cent) and not a number of standard errors.

    Returns
    -------
    FeasibleMoments

    Raises
    ------
    InputError
        For another shape, numbers that are not finite, negative variances, a covariance that is
        not symmetric and positive semidefinite, or one that forbids every move that is needed.

    Notes
    -----
    D within a relative ``FEASIBLE_MARGIN`` of the interval counts as on its boundary and stays. The
    floor of the variances is ``VARIANCE_FLOOR`` times the largest moment. Deterministic; a second
    projection changes nothing. On the boundary the Tweedie closure is the trapezoid
    (:func:`tweedie_closure`), so an infeasible Delta S does not depend on the metric; the shift does.

    Examples
    --------
    >>> found = project_feasible([3.0, 1.0, 2.0], np.diag([1.0, 0.1, 1.0]))
    >>> found.moments.round(6).tolist(), bool(found.feasible), round(float(found.shift), 6)
    ([2.5, 1.0, 2.5], False, 0.707107)
    """
    x = _array("moments", moments)
    if x.ndim == 0 or x.shape[-1] != 3:
        raise InputError(f"moments: expected shape (..., 3) for D, V_0, V_1, found {x.shape}.")
    if (x[..., 1:] < 0.0).any():
        raise InputError(f"moments: expected variances >= 0, found {x[..., 1:].min():g}.")
    shape = x.shape[:-1]
    x = np.where(np.abs(x) < NOTHING, 0.0, x).reshape(-1, 3)
    # In units of the largest moment, so that squares neither overflow nor underflow.
    size = np.abs(x).max(axis=1)
    unit = np.where(size > 0.0, size, 1.0)[:, None]
    given, x = x.copy(), x / unit
    floor = VARIANCE_FLOOR * (size > 0.0)
    if covariance is None:
        scale = np.maximum(np.abs(x), floor[:, None])
        scale[:, 0] = np.maximum(scale[:, 0], scale[:, 1:].min(axis=1))
        cov = np.eye(3) * (scale**2)[:, :, None]
    else:
        cov = _covariance(covariance, shape, 3).reshape(-1, 3, 3) / unit[:, :, None] ** 2
    feasible = _is_feasible(x) & (x[:, 1:].min(axis=1) >= floor)
    shift = np.zeros(len(x))
    bad = np.flatnonzero(~feasible)
    if bad.size:
        here, there = x[bad], cov[bad]
        miss = here @ _PLANES.T
        pull = np.einsum("nij,pj->npi", there, _PLANES)
        spread = np.einsum("npi,pi->np", pull, _PLANES)
        with np.errstate(divide="ignore", invalid="ignore"):
            length = np.where(spread > 0.0, np.abs(miss) / np.sqrt(spread), np.inf)
            choice = length.argmin(axis=1)
            row = np.arange(bad.size)
            move = pull[row, choice] * (miss[row, choice] / spread[row, choice])[:, None]
            new = here - move
        new[:, 0] = new[row, 2 - choice]  # exactly on the plane
        distance = length[row, choice]
        awkward = ~(np.isfinite(distance) & (new[:, 1:].min(axis=1) >= floor[bad]))
        awkward |= here[:, 1:].min(axis=1) < floor[bad]
        for i in np.flatnonzero(awkward):
            new[i], distance[i] = _nearest(here[i], there[i], float(floor[bad[i]]))
        if not np.isfinite(distance).all():
            stuck = given[bad[~np.isfinite(distance)][0]].tolist()
            raise InputError(
                "covariance: expected one that lets infeasible moments move, found none for D, V_0, V_1 = "
                f"{stuck}; moments without spread cannot be infeasible: check them."
            )
        given[bad], shift[bad] = new * unit[bad], distance
    return FeasibleMoments(
        moments=given.reshape(*shape, 3), feasible=feasible.reshape(shape), shift=shift.reshape(shape)
    )


def _covariance(value: Any, shape: tuple[int, ...], n: int) -> FloatArray:
    cov = _array("covariance", value)
    if cov.shape not in {(n, n), (*shape, n, n)}:
        raise InputError(
            f"covariance: expected shape ({n}, {n}) or {(*shape, n, n)} beside moments, found {cov.shape}."
        )
    size = np.sqrt(np.abs(np.diagonal(cov, axis1=-2, axis2=-1)))
    unit = cov / np.maximum(size[..., :, None] * size[..., None, :], np.finfo(float).tiny)
    if np.abs(unit - np.swapaxes(unit, -1, -2)).max(initial=0.0) > 1e-8 or (
        cov.size and np.linalg.eigvalsh(unit).min() < -1e-8
    ):
        raise InputError("covariance: expected a symmetric positive semidefinite matrix, found another.")
    return cov


# --------------------------------------------------------------------------- closures


@dataclass(frozen=True)
class ClosureResult:
    """What :func:`tweedie_closure` returns; every array has the shape of the input.

    Attributes
    ----------
    delta : numpy.ndarray
        Delta S [kT].
    s : numpy.ndarray
        1/p, the smooth parameter: 0 Poisson, 1/2 gamma, 2/3 inverse Gaussian. Infinite on the
        boundary of the feasible set and for V_0 = V_1 (Gaussian). Below 0 the power law has no
        probability distribution behind it.
    log1p_theta : numpy.ndarray
        ln(1 + theta).
    moments : numpy.ndarray, shape (..., 3)
        D, V_0 and V_1 that were used, after projection [kT, kT^2, kT^2].
    feasible : numpy.ndarray of bool
        Whether the moments given were feasible.
    shift : numpy.ndarray
        How far the projection moved them, :func:`project_feasible`; 0 where feasible.
    """

    delta: FloatArray
    s: FloatArray
    log1p_theta: FloatArray
    moments: FloatArray
    feasible: BoolArray
    shift: FloatArray

    @property
    def p(self) -> FloatArray:
        """Power of V_lam = V_0 (1 + theta lam)^(-p): P/(P - 1) of the Tweedie power P."""
        out = np.full_like(self.s, np.inf)
        np.divide(1.0, self.s, out=out, where=self.s != 0.0)
        return out

    @property
    def theta(self) -> FloatArray:
        """theta; infinite where it exceeds the range of floats (s -> infinity at V_0 > V_1)."""
        with np.errstate(over="ignore"):
            return np.asarray(np.expm1(self.log1p_theta))


def tweedie_closure(o_0: Any, o_1: Any, v_0: Any, v_1: Any, *, covariance: Any = None) -> ClosureResult:
    r"""Delta S by the power law V_lam = V_0 (1 + theta lam)^(-p) that fits both ends and D.

    .. math:: \int_0^1 (1+\theta\lambda)^{-p} d\lambda = \frac{D}{V_0}, \quad
              (1+\theta)^p = \frac{V_0}{V_1}, \quad
              \Delta S = O_0 - V_0 \int_0^1 (1-\lambda)(1+\theta\lambda)^{-p} d\lambda

    =============  ==================================
    symbol         code
    =============  ==================================
    O_0, O_1       ``o_0``, ``o_1``
    V_0, V_1       ``v_0``, ``v_1``
    D              ``moments[..., 0]`` = O_0 - O_1
    1/p            ``s``
    ln(1+theta)    ``log1p_theta``
    =============  ==================================

    Exact where O given y is gamma, Poisson, inverse Gaussian or Gaussian distributed, of either
    sign, shifted or not. Moments without a solution are projected first (:func:`project_feasible`).

    Parameters
    ----------
    o_0, o_1 : array_like, one shape
        Mean of O given y at lambda 0 and 1 [kT].
    v_0, v_1 : array_like, the same shape
        Variances there [kT^2].
    covariance : array_like, shape (3, 3) or (..., 3, 3), optional
        Of D, V_0, V_1: the metric of the projection. Default: relative, see there.

    Returns
    -------
    ClosureResult

    Raises
    ------
    InputError
        For shapes that differ, numbers that are not finite, negative variances, or a covariance
        that is none.

    Notes
    -----
    Deterministic; accurate to about 1e-14 of D for V_0/V_1 from 1e-12 to 1e12. For feasible moments
    O_1 <= Delta S <= O_0. Delta S is continuous up to the boundary D = V_0 or D = V_1, where V_lam is
    constant up to a jump at one end and Delta S = (O_0 + O_1)/2: this is what every infeasible element
    returns, at unchanged mean of O_0 and O_1. Through V_0 = V_1 it is smooth at fixed p, where it is
    (O_0 + O_1)/2 + (V_1 - V_0)/12 to first order. NOT checked: that V_lam is a power law.

    References
    ----------
    Action-operator semantics and the noisy operator bridge, arXiv:2606.30687.
    M. C. K. Tweedie, An index which distinguishes between some important exponential families, 1984.
    B. Jorgensen, The Theory of Dispersion Models, 1997, Chapman & Hall.

    Examples
    --------
    O gamma distributed with shape 2 and rate 1, exactly 2 ln 2:

    >>> found = tweedie_closure([2.0], [1.0], [2.0], [0.5])
    >>> round(float(found.delta[0] - 2 * np.log(2)), 12), round(float(found.p[0]), 12)
    (0.0, 2.0)
    """
    a, b, var_0, var_1 = _moments(o_0, o_1, v_0, v_1)
    used = project_feasible(np.stack([a - b, var_0, var_1], axis=-1), covariance)
    asymmetry, s, log1p_theta = _fit_power(used.moments)
    return ClosureResult(
        delta=np.asarray(0.5 * (a + b) - used.moments[..., 0] * asymmetry),
        s=s,
        log1p_theta=log1p_theta,
        moments=used.moments,
        feasible=used.feasible,
        shift=used.shift,
    )


def _fit_power(moments: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Weight of D in (O_0 + O_1)/2 - Delta S, 1/p and ln(1+theta) of feasible moments."""
    shape = moments.shape[:-1]
    d, v_0, v_1 = moments.reshape(-1, 3).T
    low, high = np.minimum(v_0, v_1), np.maximum(v_0, v_1)
    d = np.clip(d, low, high)  # within the margin
    flat = high == 0.0
    d, low, high = (np.where(flat, 1.0, a) for a in (d, low, high))
    to_low, to_high = np.log1p((d - low) / low), np.log1p((high - d) / d)
    whole = to_low + to_high
    k = 0.25 * whole
    y = np.where(whole > 0.0, 2.0 * np.minimum(to_low, to_high) / np.where(whole > 0.0, whole, 1.0), 1.0)
    q = _solve_distance(y, k)
    sign = np.where(v_0 >= v_1, 1.0, -1.0)
    side = np.where(to_low <= to_high, 1.0, -1.0)  # of the gamma closure
    s = np.full_like(q, np.inf)
    np.divide(side * q + k, 2.0 * k, out=s, where=whole > 0.0)
    log1p_theta = np.where(whole > 0.0, 2.0 * sign * (side * q + k), 0.0)
    weight = sign * _asymmetry(q, k)
    return weight.reshape(shape), s.reshape(shape), log1p_theta.reshape(shape)


def gamma_closure(o_0: Any, o_1: Any, v_0: Any, v_1: Any) -> FloatArray:
    r"""Delta S by the gamma law, V_lam = V_0 (1 + theta lam)^(-2).

    .. math:: \theta = \sqrt{V_0/V_1} - 1, \quad
              w = \frac{1+\theta}{\theta} - \frac{1+\theta}{\theta^2}\ln(1+\theta), \quad
              \Delta S = O_0 - w (O_0 - O_1)

    Parameters
    ----------
    o_0, o_1, v_0, v_1 : array_like, one shape
        Means [kT] and variances [kT^2] at both ends.

    Returns
    -------
    numpy.ndarray
        Delta S [kT]. Exact where (O_0 - O_1)^2 = V_0 V_1 and V_lam is that law; elsewhere the law
        fits the ratio of the variances and the difference of the means, not both variances.

    Raises
    ------
    InputError
        As :func:`tweedie_closure`.

    Examples
    --------
    >>> round(float(gamma_closure(2.0, 1.0, 2.0, 0.5) - 2 * np.log(2)), 12)
    0.0
    """
    a, b, var_0, var_1 = _moments(o_0, o_1, v_0, v_1)
    low, high = np.minimum(var_0, var_1), np.maximum(var_0, var_1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        k = np.minimum(0.25 * np.log1p((high - low) / low), 400.0)  # where the limit is reached
    k = np.copysign(np.where(high > low, k, 0.0), var_0 - var_1)
    return np.asarray(0.5 * (a + b) - 0.5 * (a - b) * _xcothx_slope(k))


def trapezoid_closure(o_0: Any, o_1: Any, v_0: Any, v_1: Any) -> FloatArray:
    """Delta S = (O_0 + O_1)/2 [kT]; exact for a Gaussian. A diagnostic: the variances are not used.

    Parameters
    ----------
    o_0, o_1, v_0, v_1 : array_like, one shape
        Means [kT] and variances [kT^2] at both ends.

    Returns
    -------
    numpy.ndarray

    Raises
    ------
    InputError
        As :func:`tweedie_closure`.

    Examples
    --------
    >>> float(trapezoid_closure(2.0, 1.0, 2.0, 0.5))
    1.5
    """
    a, b, _, _ = _moments(o_0, o_1, v_0, v_1)
    return np.asarray(0.5 * (a + b))


def hermite_closure(o_0: Any, o_1: Any, v_0: Any, v_1: Any) -> FloatArray:
    """Delta S = (O_0 + O_1)/2 + (V_1 - V_0)/12 [kT], the cubic through both ends with their slopes.

    A diagnostic: exact where V_lam is a parabola, far outside the bracket where the variances differ
    by factors.

    Parameters
    ----------
    o_0, o_1, v_0, v_1 : array_like, one shape
        Means [kT] and variances [kT^2] at both ends.

    Returns
    -------
    numpy.ndarray

    Raises
    ------
    InputError
        As :func:`tweedie_closure`.

    Examples
    --------
    >>> float(hermite_closure(2.0, 1.0, 2.0, 0.5))
    1.375
    """
    a, b, var_0, var_1 = _moments(o_0, o_1, v_0, v_1)
    return np.asarray(0.5 * (a + b) + (var_1 - var_0) / 12.0)


def cumulant_closure(o_0: Any, o_1: Any, v_0: Any, v_1: Any, *, end: int = 0) -> FloatArray:
    """Delta S by the second cumulant at one end [kT]: O_0 - V_0/2, or O_1 + V_1/2.

    A diagnostic; the other end is not used.

    Parameters
    ----------
    o_0, o_1, v_0, v_1 : array_like, one shape
        Means [kT] and variances [kT^2] at both ends.
    end : int
        0 or 1.

    Returns
    -------
    numpy.ndarray

    Raises
    ------
    InputError
        As :func:`tweedie_closure`, and for another ``end``.

    Examples
    --------
    >>> float(cumulant_closure(2.0, 1.0, 2.0, 0.5)), float(cumulant_closure(2.0, 1.0, 2.0, 0.5, end=1))
    (1.0, 1.25)
    """
    if end not in (0, 1):
        raise InputError(f"end: expected 0 or 1, found {end!r}.")
    a, b, var_0, var_1 = _moments(o_0, o_1, v_0, v_1)
    return np.asarray(a - 0.5 * var_0 if end == 0 else b + 0.5 * var_1)


Closure = Callable[[Any, Any, Any, Any], ClosureResult | FloatArray]
"""(o_0, o_1, v_0, v_1) -> Delta S, or a result with it in ``delta``."""


@dataclass(frozen=True)
class CompositeResult:
    """What :func:`composite_closure` returns.

    Attributes
    ----------
    delta : numpy.ndarray, shape (...)
        Delta S [kT], summed over the intervals.
    parts : numpy.ndarray, shape (n_windows - 1, ...)
        Contribution of each interval [kT].
    feasible : numpy.ndarray of bool, shape (n_windows - 1, ...)
        Whether its moments were feasible; all True for closures that need not ask.
    shift : numpy.ndarray, shape (n_windows - 1, ...)
        How far they were moved (:func:`project_feasible`).
    """

    delta: FloatArray
    parts: FloatArray
    feasible: BoolArray
    shift: FloatArray


def composite_closure(
    lams: Any, o_k: Any, v_k: Any, *, closure: Closure = tweedie_closure
) -> CompositeResult:
    r"""Delta S from lambda windows: a closure on each interval, summed.

    On an interval of width h the operator of its own coordinate is h O and its variance h^2 V:

    .. math:: \Delta S = \sum_k \mathrm{closure}(h_k O_k, h_k O_{k+1}, h_k^2 V_k, h_k^2 V_{k+1}),
              \qquad h_k = \lambda_{k+1} - \lambda_k

    Parameters
    ----------
    lams : array_like, shape (n_windows,)
        Strictly increasing, at least two. From the first to the last is what is integrated.
    o_k, v_k : array_like, shape (n_windows, ...)
        Mean [kT] and variance [kT^2] of O at each window.
    closure : callable
        Of this module, or with its signature.

    Returns
    -------
    CompositeResult

    Raises
    ------
    InputError
        For lambdas that do not increase, shapes that do not match, and as the closure does.

    Examples
    --------
    >>> lam = np.array([0.0, 0.3, 1.0])
    >>> found = composite_closure(lam, 2 / (1 + lam), 2 / (1 + lam) ** 2, closure=gamma_closure)
    >>> bool(abs(found.delta - 2 * np.log(2)) < 1e-14)
    True
    """
    lam, o, v = _array("lams", lams), _array("o_k", o_k), _array("v_k", v_k)
    if lam.ndim != 1 or len(lam) < 2 or not (np.diff(lam) > 0.0).all():
        raise InputError(f"lams: expected at least two that strictly increase, found {lam.tolist()}.")
    if o.shape != v.shape or o.shape[:1] != lam.shape:
        raise InputError(
            f"o_k, v_k: expected one shape ({len(lam)}, ...) beside lams, found {o.shape} and {v.shape}."
        )
    h = np.diff(lam).reshape(-1, *[1] * (o.ndim - 1))
    found = closure(h * o[:-1], h * o[1:], h**2 * v[:-1], h**2 * v[1:])
    parts = found.delta if isinstance(found, ClosureResult) else np.asarray(found)
    return CompositeResult(
        delta=np.asarray(parts.sum(axis=0)),
        parts=parts,
        feasible=found.feasible if isinstance(found, ClosureResult) else np.ones(parts.shape, dtype=bool),
        shift=found.shift if isinstance(found, ClosureResult) else np.zeros(parts.shape),
    )


# ------------------------------------------------------------------------ network heads


@dataclass(frozen=True)
class HeadMoments:
    """What :func:`heads_to_moments` returns; every array has the shape of the input.

    Attributes
    ----------
    o_0, o_1 : numpy.ndarray
        Means at both ends [kT].
    v_0, v_1 : numpy.ndarray
        Variances there [kT^2].
    delta : numpy.ndarray
        Delta S [kT].
    log1p_theta : numpy.ndarray
        ln(1 + theta) = s ln r.
    """

    o_0: FloatArray
    o_1: FloatArray
    v_0: FloatArray
    v_1: FloatArray
    delta: FloatArray
    log1p_theta: FloatArray


def heads_to_moments(o_1: Any, difference: Any, ratio: Any, s: Any) -> HeadMoments:
    r"""Consistent moments and Delta S from four free numbers: the heads of a network.

    .. math:: \theta = r^s - 1, \quad V_0 = \frac{D}{\int_0^1 (1+\theta\lambda)^{-1/s} d\lambda}, \quad
              V_1 = V_0/r, \quad O_0 = O_1 + D

    ========  ==============
    symbol    code
    ========  ==============
    D > 0     ``difference``
    r > 0     ``ratio``
    1/p       ``s``
    ========  ==============

    Every choice is feasible, so the bracket O_1 <= Delta S <= O_0 holds by construction, and
    :func:`tweedie_closure` of the moments returns the same Delta S.

    Parameters
    ----------
    o_1 : array_like
        Mean at lambda 1 [kT].
    difference : array_like, the same shape
        O_0 - O_1 > 0 [kT].
    ratio : array_like, the same shape
        V_0/V_1 > 0.
    s : array_like, the same shape
        1/p; any finite number. 0 is the exponential (Poisson), 1/2 gamma; r = 1 is Gaussian for
        every s.

    Returns
    -------
    HeadMoments

    Raises
    ------
    InputError
        For shapes that differ, numbers that are not finite, or D or r that are not positive.

    Notes
    -----
    Smooth in all four numbers, also through s = 0 and r = 1. Deterministic.

    Examples
    --------
    >>> found = heads_to_moments([1.0], [1.0], [4.0], [0.5])
    >>> [round(float(v[0]), 12) for v in (found.o_0, found.v_0, found.v_1)]
    [2.0, 2.0, 0.5]
    """
    given = {"o_1": o_1, "difference": difference, "ratio": ratio, "s": s}
    arrays = {name: _array(name, value) for name, value in given.items()}
    shapes = {name: a.shape for name, a in arrays.items()}
    if len(set(shapes.values())) != 1:
        raise InputError(f"heads: expected one shape for all four, found {shapes}.")
    for name in ("difference", "ratio"):
        if (arrays[name] <= 0.0).any():
            raise InputError(f"{name}: expected positive numbers, found {arrays[name].min():g}.")
    low, d, r, inverse = (arrays[name] for name in given)
    shape = low.shape
    k = 0.25 * np.log(r).ravel()
    q = (2.0 * inverse.ravel() - 1.0) * k
    width, far = np.abs(k), np.abs(q)
    y, _ = _distance(far, width)
    # ln[sqrt(V_0 V_1)/D], odd in k and in q.
    excess = (np.sign(k) * np.sign(q) * 2.0 * width * (1.0 - y)).reshape(shape)
    asymmetry = (np.sign(k) * _asymmetry(far, width)).reshape(shape)
    half = 2.0 * k.reshape(shape)
    with np.errstate(over="ignore"):
        v_0, v_1 = d * np.exp(excess + half), d * np.exp(excess - half)
    return HeadMoments(
        o_0=np.asarray(low + d),
        o_1=low,
        v_0=np.asarray(v_0),
        v_1=np.asarray(v_1),
        delta=np.asarray(low + d * (0.5 - asymmetry)),
        log1p_theta=np.asarray(4.0 * inverse * k.reshape(shape)),
    )


# ---------------------------------------------------------- readout without a network


@dataclass(frozen=True)
class MomentReadout:
    """What :func:`moment_readout` returns.

    Attributes
    ----------
    delta_f, d_delta_f : float
        Delta f and its bootstrap standard error [kT]. The error of the closure is not in it.
    o_0, o_1, v_0, v_1 : float
        Mean [kT] and variance [kT^2] of O at both ends, as sampled.
    d_o_0, d_o_1, d_v_0, d_v_1 : float
        Their bootstrap standard errors.
    feasible : bool
        Whether these moments allow a Tweedie closure.
    shift : float
        Distance to the nearest ones that do, in standard errors; 0 where feasible.
    feasible_fraction : float
        Share of the bootstrap samples that were feasible.
    s : float
        1/p of the Tweedie closure of the (projected) moments; see :class:`ClosureResult`.
    n_frames : tuple of int
        Frames of end 0 and end 1.
    n_bootstrap, block : int
        As given.
    """

    delta_f: float
    d_delta_f: float
    o_0: float
    o_1: float
    v_0: float
    v_1: float
    d_o_0: float
    d_o_1: float
    d_v_0: float
    d_v_1: float
    feasible: bool
    shift: float
    feasible_fraction: float
    s: float
    n_frames: tuple[int, int]
    n_bootstrap: int
    block: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; an infinite ``s`` is None."""
        out = {k: getattr(self, k) for k in self.__dataclass_fields__}
        return out | {"n_frames": list(self.n_frames), "s": self.s if math.isfinite(self.s) else None}


def moment_readout(
    o_on_0: Any,
    o_on_1: Any,
    *,
    closure: Closure = tweedie_closure,
    generator: np.random.Generator,
    n_bootstrap: int = 200,
    block: int = 1,
) -> MomentReadout:
    r"""Delta f from nothing but the mean and variance of O in both end states.

    The limit of infinite noise, where y says nothing and the conditional moments are those of the
    ensembles: quiet, and biased by the closure.

    .. math:: \Delta f = \mathrm{closure}(\langle O\rangle_0, \langle O\rangle_1,
              \mathrm{Var}_0 O, \mathrm{Var}_1 O)

    For the Tweedie closure infeasible moments are projected (:func:`project_feasible`) in the metric
    of their bootstrap covariance; the mean (O_0 + O_1)/2 follows by its covariance with them, so that
    this is the nearest feasible point of all four moments. So are those of every bootstrap sample.

    Parameters
    ----------
    o_on_0, o_on_1 : array_like, shape (n_frames,)
        O = u_1 - u_0 on frames of end state 0 and of end state 1 [kT], in time order.
    closure : callable
        Of this module, or with its signature.
    generator : numpy.random.Generator
    n_bootstrap : int
        At least 20.
    block : int
        Frames per contiguous block, longer than the correlation time. Blocks start anywhere and wrap
        around the end.

    Returns
    -------
    MomentReadout

    Raises
    ------
    InputError
        For arrays that are not one-dimensional and finite, fewer than ``MIN_BLOCKS`` blocks in an
        end, a generator or count that is none, or infeasible moments without any spread.

    Notes
    -----
    NOT checked: that ``block`` exceeds the correlation time, that O is linear in lambda, that the
    closure fits. Deterministic for a given state of ``generator``.

    References
    ----------
    Action-operator semantics and the noisy operator bridge, arXiv:2606.30687.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> o_0, o_1 = rng.gamma(2.0, 1.0, 4000), rng.gamma(2.0, 0.5, 4000)
    >>> found = moment_readout(o_0, o_1, generator=rng)
    >>> abs(found.delta_f - 2 * np.log(2)) < 4 * found.d_delta_f < 0.2
    True
    """
    ends = _array("o_on_0", o_on_0), _array("o_on_1", o_on_1)
    if not isinstance(generator, np.random.Generator):
        raise InputError(f"generator: expected numpy.random.Generator, found {type(generator).__name__}.")
    for name, number, least in (("n_bootstrap", n_bootstrap, 20), ("block", block, 1)):
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < least:
            raise InputError(f"{name}: expected an integer of at least {least}, found {number!r}.")
    for name, o in zip(("o_on_0", "o_on_1"), ends, strict=True):
        if o.ndim != 1 or len(o) < MIN_BLOCKS * max(block, 2):
            raise InputError(
                f"{name}: expected shape (n_frames,) with at least {MIN_BLOCKS * max(block, 2)} frames "
                f"({MIN_BLOCKS} blocks), found {o.shape}; sample longer."
            )
    raw = np.array([[o.mean(), o.var(ddof=1)] for o in ends])
    drawn = np.stack([_block_bootstrap(o, generator, n_bootstrap, block) for o in ends], axis=1)
    x, x_b = _mean_and_feasible(raw), _mean_and_feasible(drawn)  # (mean, D, V_0, V_1)
    covariance = np.cov(x_b, rowvar=False)
    errors = drawn.std(axis=0, ddof=1)
    found, found_b = (project_feasible(a[..., 1:], covariance[1:, 1:]) for a in (x, x_b))
    if closure is tweedie_closure:
        # The mean, given how the others moved.
        follow = np.linalg.pinv(covariance[1:, 1:], rcond=1e-12, hermitian=True) @ covariance[1:, 0]
        x, x_b = (
            np.concatenate([a[..., :1] + ((f.moments - a[..., 1:]) @ follow)[..., None], f.moments], axis=-1)
            for a, f in ((x, found), (x_b, found_b))
        )
    delta, delta_b = (_delta_of(closure, a) for a in (x, x_b))
    return MomentReadout(
        delta_f=float(delta),
        d_delta_f=float(delta_b.std(ddof=1)),
        o_0=float(raw[0, 0]),
        o_1=float(raw[1, 0]),
        v_0=float(raw[0, 1]),
        v_1=float(raw[1, 1]),
        d_o_0=float(errors[0, 0]),
        d_o_1=float(errors[1, 0]),
        d_v_0=float(errors[0, 1]),
        d_v_1=float(errors[1, 1]),
        feasible=bool(found.feasible),
        shift=float(found.shift),
        feasible_fraction=float(found_b.feasible.mean()),
        s=float(_fit_power(found.moments)[1]),
        n_frames=(len(ends[0]), len(ends[1])),
        n_bootstrap=int(n_bootstrap),
        block=int(block),
    )


def _mean_and_feasible(moments: FloatArray) -> FloatArray:
    """((O_0, V_0), (O_1, V_1)) -> ((O_0 + O_1)/2, D, V_0, V_1)."""
    (o_0, v_0), (o_1, v_1) = np.moveaxis(moments, (-2, -1), (0, 1))
    return np.stack([0.5 * (o_0 + o_1), o_0 - o_1, v_0, v_1], axis=-1)


def _delta_of(closure: Closure, x: FloatArray) -> FloatArray:
    mean, d, v_0, v_1 = np.moveaxis(x, -1, 0)
    found = closure(mean + 0.5 * d, mean - 0.5 * d, v_0, v_1)
    return found.delta if isinstance(found, ClosureResult) else np.asarray(found)


def _block_bootstrap(
    o: FloatArray, generator: np.random.Generator, n_bootstrap: int, block: int
) -> FloatArray:
    """Mean and variance of resampled series, shape (n_bootstrap, 2); circular blocks."""
    n, centre = len(o), o.mean()
    c = np.concatenate([o, o[: block - 1]]) - centre
    sums = [np.convolve(c**power, np.ones(block), mode="valid") for power in (1, 2)]
    n_blocks = -(-n // block)
    count = n_blocks * block
    out = np.empty((n_bootstrap, 2))
    for i in range(n_bootstrap):
        first = generator.integers(n, size=n_blocks)
        mean, square = (s[first].sum() / count for s in sums)
        out[i] = centre + mean, max(square - mean**2, 0.0) * count / (count - 1)
    return out
