r"""Delta f from posterior samples: the work at single noised frames, and BAR between the noised ends.

.. math:: \Delta S(y) = \int_0^1 E_\lambda[O|y]\, d\lambda = -\ln E_0[e^{-O}|y] = +\ln E_1[e^{+O}|y]

Given samples of O from the posteriors p_lambda(x|y) at some lambdas, this is a free energy difference
like any other, of a system that a spring to y holds together: narrow enough for a handful of windows.
No model of O given y enters, so that BAR with these works is right in the limit of long sampling, and
audits the bridge, which has a model. :mod:`~openmm_diffforce.posterior_bridge` draws the samples.

Arrays in, a result out: nothing here needs OpenMM or torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import expit, log_expit, logsumexp

from .closure import composite_closure, tweedie_closure
from .density import MIN_FRAMES, OperatorDensity, fit_operator_density
from .errors import InputError
from .estimate import bar_between, statistical_inefficiency

FloatArray = npt.NDArray[np.float64]
WorkName = Literal["bar", "density", "tweedie"]

N_BLOCKS = 10
"""Blocks of samples for the errors of means and variances."""


@dataclass(frozen=True)
class PosteriorBridge:
    """What :func:`bridge_from_posteriors` returns. Index e is the end that a frame y came from.

    Attributes
    ----------
    sigma : float
        Noise level [nm].
    lams : tuple of float
        Where the posteriors were sampled, 0 and 1 included.
    delta_f, d_delta_f : float
        BAR between the noised ends, and its standard error [kT]: finite number of y, errors of the
        works, and ``noise_shift``.
    d_work : float
        Part of it that comes from the errors of the works.
    noise_shift : float
        Bias of BAR from works with errors, to second order in them [kT].
    overlap, d_overlap : float
        A of the noised ends.
    exp_forward, exp_reverse, d_exp_forward, d_exp_reverse : float
        Delta f by the exponential average over the y of one end alone, and its error [kT].
    bound_upper, bound_lower, d_bound_upper, d_bound_lower : float
        Mean Delta S over the y of end 0 and of end 1, and its error [kT]: Delta f lies between.
    work : tuple of numpy.ndarray, each of shape (n_y,)
        Delta S(y) of the y of each end [kT].
    d_works : tuple of numpy.ndarray
        Their errors.
    closures : dict
        Delta f with the work as asked for, and by "tweedie".
    operator, operator_variance : tuple of numpy.ndarray, each of shape (n_y, n_lams)
        E_lambda[O|y] [kT] and Var_lambda(O|y) [kT^2].
    d_operator, d_operator_variance : tuple of numpy.ndarray
        Their errors, from blocks.
    n_samples : int
        Per y and lambda.
    inefficiency : tuple of float
        Statistical inefficiency of O per lambda, mean over all y.
    n_forces, n_energies : int
        Evaluations that the samples took, equilibration included.
    """

    sigma: float
    lams: tuple[float, ...]
    delta_f: float
    d_delta_f: float
    d_work: float
    noise_shift: float
    overlap: float
    d_overlap: float
    exp_forward: float
    exp_reverse: float
    d_exp_forward: float
    d_exp_reverse: float
    bound_upper: float
    bound_lower: float
    d_bound_upper: float
    d_bound_lower: float
    work: tuple[FloatArray, FloatArray]
    d_works: tuple[FloatArray, FloatArray]
    closures: dict[str, float]
    operator: tuple[FloatArray, FloatArray]
    operator_variance: tuple[FloatArray, FloatArray]
    d_operator: tuple[FloatArray, FloatArray]
    d_operator_variance: tuple[FloatArray, FloatArray]
    n_samples: int
    inefficiency: tuple[float, ...]
    n_forces: int
    n_energies: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        out = {k: getattr(self, k) for k in self.__dataclass_fields__}
        return {
            k: [w.tolist() if isinstance(w, np.ndarray) else w for w in v] if isinstance(v, tuple) else v
            for k, v in out.items()
        }


def spread_lams(density: OperatorDensity, n: int) -> tuple[float, ...]:
    r"""``n`` lambdas from 0 to 1, equally far apart in thermodynamic length.

    .. math:: \ell(\lambda) = \int_0^\lambda \sqrt{-d\langle O\rangle/d\lambda'}\, d\lambda'

    Parameters
    ----------
    density : OperatorDensity
        Of the end states; its curve <O>_lambda is all that is used.
    n : int
        At least 2.

    Raises
    ------
    InputError
        For fewer than two.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> found = fit_operator_density([rng.normal(m, 2.0, 500) for m in (2.0, -2.0)], inefficiency=[1, 1])
    >>> [round(v, 1) for v in spread_lams(found, 3)]  # a constant variance: evenly
    [0.0, 0.5, 1.0]
    """
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 2:
        raise InputError(f"lams: expected at least 2 of them, found {n!r}.")
    fall = np.maximum(-np.diff(density.o_lam), 0.0) * np.diff(density.lam)
    length = np.concatenate([[0.0], np.cumsum(np.sqrt(fall))])
    if length[-1] <= 0.0:
        length = density.lam
    inner = np.interp(np.linspace(0.0, length[-1], n)[1:-1], length, density.lam)
    return (0.0, *inner.tolist(), 1.0)


def _check_operators(name: str, value: Any, n_lams: int) -> FloatArray:
    try:
        o = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as err:
        raise InputError(f"{name}: expected numbers [kT], found {err}.") from err
    if o.ndim != 3 or o.shape[0] < 2 or o.shape[1] != n_lams or not np.isfinite(o).all():
        raise InputError(
            f"{name}: expected finite values of shape (n_y, {n_lams}, n_samples) with at least two y, "
            f"found shape {o.shape} with {np.count_nonzero(~np.isfinite(o))} that are not finite."
        )
    return o


def _jackknife(values: FloatArray) -> FloatArray:
    """Standard error of leave-one-block-out values along axis 0."""
    n = len(values)
    return np.asarray(np.sqrt((n - 1) / n * ((values - values.mean(axis=0)) ** 2).sum(axis=0)))


def _moments(o: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Means and variances over the last axis, and both with one block left out along axis 0."""
    size = o.shape[-1] // N_BLOCKS
    o = o[..., : size * N_BLOCKS]
    left = [np.concatenate([o[..., : b * size], o[..., (b + 1) * size :]], axis=-1) for b in range(N_BLOCKS)]
    mean = np.array([v.mean(axis=-1) for v in left])
    variance = np.array([v.var(axis=-1, ddof=1) for v in left])
    return o.mean(axis=-1), o.var(axis=-1, ddof=1), mean, variance


def _tweedie(lams: Sequence[float], o: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Composite Tweedie work of every y and its jackknife error; o [n_y, n_lams, n_samples]."""
    mean, variance, mean_b, variance_b = _moments(o)

    def delta(m: FloatArray, v: FloatArray) -> FloatArray:
        return composite_closure(lams, m.T, v.T, closure=tweedie_closure).delta

    square = np.zeros(len(o))
    for k in range(len(lams)):
        left = []
        for b in range(N_BLOCKS):
            m, v = mean.copy(), variance.copy()
            m[:, k], v[:, k] = mean_b[b, :, k], variance_b[b, :, k]
            left.append(delta(m, v))
        square += _jackknife(np.array(left)) ** 2
    return delta(mean, variance), np.sqrt(square)


def _density(
    lams: Sequence[float], o: FloatArray, inefficiency: Sequence[float]
) -> tuple[FloatArray, FloatArray]:
    found = [fit_operator_density(list(one), lams, inefficiency=inefficiency, n_lam=3) for one in o]
    return np.array([f.delta_f for f in found]), np.array([f.d_delta_f for f in found])


def _bar_chain(
    lams: Sequence[float], o: FloatArray, inefficiency: Sequence[float]
) -> tuple[FloatArray, FloatArray]:
    """BAR from each posterior to the next, summed; a sample moves both of its neighbouring terms."""
    work, error = [], []
    for one in o:
        total, influence = 0.0, np.zeros(one.shape)
        for k, h in enumerate(np.diff(lams)):
            forward, reverse = h * one[k], -h * one[k + 1]
            delta = bar_between(forward, reverse, decorrelate=False, min_overlap=0).delta_f
            total += delta
            for state, sign, w in ((k, -1.0, forward - delta), (k + 1, 1.0, reverse + delta)):
                log_f = log_expit(-w)
                influence[state] += sign * (np.exp(log_f - logsumexp(log_f)) - 1.0 / len(w))
        work.append(total)
        error.append(math.sqrt(float(np.asarray(inefficiency) @ (influence**2).sum(axis=1))))
    return np.array(work), np.array(error)


def _bar_error_of_works(
    work: tuple[FloatArray, FloatArray], errors: tuple[FloatArray, FloatArray], delta_f: float
) -> float:
    """Error that independent errors of the works cause in BAR: its equation differentiated."""
    m = math.log(len(work[0]) / len(work[1]))
    p = [expit(-(m + w - delta_f)) * expit(m + w - delta_f) for w in work]
    return math.sqrt(sum(((a * e) ** 2).sum() for a, e in zip(p, errors, strict=True))) / sum(
        a.sum() for a in p
    )


def _exp(work: FloatArray) -> tuple[float, float]:
    """-ln <exp(-work)> and its error."""
    log_mean = float(logsumexp(-work) - math.log(len(work)))
    ratio = np.exp(-work - log_mean)
    return -log_mean, float(ratio.std(ddof=1) / math.sqrt(len(work)))


def bridge_from_posteriors(
    operators_0: Any,
    operators_1: Any,
    lams: Sequence[float],
    *,
    sigma: float,
    work: WorkName = "bar",
    n_forces: int = 0,
    n_energies: int = 0,
) -> PosteriorBridge:
    r"""BAR between the noised ends, with the work at every y from samples of its posteriors.

    .. math:: \sum_{y \sim p_0} \mathrm{Fermi}(\Delta S(y) - \Delta f)
              = \sum_{y \sim p_1} \mathrm{Fermi}(\Delta f - \Delta S(y)), \qquad
              \langle\Delta S\rangle_{1} \le \Delta f \le \langle\Delta S\rangle_{0}

    Parameters
    ----------
    operators_0, operators_1 : array_like, shape (n_y, n_lams, n_samples)
        O = u_1 - u_0 [kT] on samples of p_lambda(x|y), in time order, for independent noised frames y
        of end state 0 and of end state 1.
    lams : sequence of float
        From 0 to 1, strictly increasing.
    sigma : float
        Noise level of the y [nm]; it is only kept.
    work : str
        "bar": from each posterior to the next; assumes nothing. "density":
        :func:`~openmm_diffforce.density.fit_operator_density` over the posteriors of a y, for lambdas too
        few to overlap. "tweedie": the composite closure of their means and variances, which is always
        made for comparison (``closures``).
    n_forces, n_energies : int
        Evaluations that the samples took; they are only kept.

    Returns
    -------
    PosteriorBridge

    Raises
    ------
    InputError
        For arrays that do not fit, lambdas that do not run from 0 to 1, or fewer than ``MIN_FRAMES``
        independent samples per posterior.

    Notes
    -----
    Assumed and not checked: linear mixing, independent y in equilibrium, posteriors sampled through all
    their basins. Errors of the works bias BAR to second order; the bias is estimated from adding them
    once more and is part of the error. Deterministic.

    References
    ----------
    Action-operator semantics and the noisy operator bridge, arXiv:2606.30687.
    C. H. Bennett, 1976, doi:10.1016/0021-9991(76)90078-4.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> lams = (0.0, 0.5, 1.0)
    >>> def posterior(mean):  # O given y is Gaussian: Delta S(y) = mean - 1/2
    ...     return [[rng.normal(m - lam, 1.0, 100) for lam in lams] for m in mean]
    >>> ends = posterior(rng.normal(1.0, 1.0, 40)), posterior(rng.normal(0.0, 1.0, 40))
    >>> found = bridge_from_posteriors(*ends, lams, sigma=0.02, work="tweedie")
    >>> abs(found.delta_f) < 3 * found.d_delta_f < 1.0
    True
    """
    lam = tuple(float(v) for v in lams)
    if len(lam) < 2 or lam[0] != 0.0 or lam[-1] != 1.0 or not (np.diff(lam) > 0).all():
        raise InputError(f"lams: expected them to rise strictly from 0 to 1, found {list(lam)}.")
    if work not in ("bar", "density", "tweedie"):
        raise InputError(f"work: expected bar, density or tweedie, found {work!r}.")
    both = (
        _check_operators("operators_0", operators_0, len(lam)),
        _check_operators("operators_1", operators_1, len(lam)),
    )
    g = tuple(
        float(np.mean([statistical_inefficiency(series) for o in both for series in o[:, k]]))
        for k in range(len(lam))
    )
    n_samples = min(o.shape[2] for o in both)
    if n_samples < max(2 * N_BLOCKS, MIN_FRAMES * max(g)):
        raise InputError(
            f"operators: expected at least {MIN_FRAMES} independent samples per posterior, found "
            f"{n_samples} with an inefficiency of {max(g):.1f}; draw more, or at longer intervals."
        )
    values: dict[str, list[tuple[FloatArray, FloatArray]]] = {"tweedie": [_tweedie(lam, o) for o in both]}
    if work != "tweedie":
        of = _bar_chain if work == "bar" else _density
        values[work] = [of(lam, o, g) for o in both]
    closures = {
        name: bar_between(a[0], -b[0], decorrelate=False, min_overlap=0).delta_f
        for name, (a, b) in values.items()
    }
    (w_0, e_0), (w_1, e_1) = values[work]
    bar = bar_between(w_0, -w_1, decorrelate=False, min_overlap=0)
    twice = bar_between(
        np.concatenate([w_0 - e_0, w_0 + e_0]), -np.concatenate([w_1 - e_1, w_1 + e_1]),
        decorrelate=False, min_overlap=0,
    )  # fmt: skip
    shift = twice.delta_f - bar.delta_f
    n_y = min(len(w_0), len(w_1))
    (forward, d_forward), (reverse, d_reverse) = _exp(w_0), _exp(-w_1)
    parts = [_moments(o) for o in both]
    bounds = [(float(w.mean()), float(w.std(ddof=1) / math.sqrt(len(w)))) for w in (w_0, w_1)]
    return PosteriorBridge(
        sigma=float(sigma),
        lams=lam,
        delta_f=bar.delta_f,
        d_delta_f=math.hypot(bar.d_delta_f * math.sqrt(n_y / (n_y - 1)), shift),
        d_work=_bar_error_of_works((w_0, -w_1), (e_0, e_1), bar.delta_f),
        noise_shift=shift,
        overlap=bar.overlap,
        d_overlap=bar.d_overlap,
        exp_forward=forward,
        exp_reverse=-reverse,
        d_exp_forward=d_forward,
        d_exp_reverse=d_reverse,
        bound_upper=bounds[0][0],
        bound_lower=bounds[1][0],
        d_bound_upper=bounds[0][1],
        d_bound_lower=bounds[1][1],
        work=(w_0, w_1),
        d_works=(e_0, e_1),
        closures=closures,
        operator=(parts[0][0], parts[1][0]),
        operator_variance=(parts[0][1], parts[1][1]),
        d_operator=(_jackknife(parts[0][2]), _jackknife(parts[1][2])),
        d_operator_variance=(_jackknife(parts[0][3]), _jackknife(parts[1][3])),
        n_samples=n_samples,
        inefficiency=g,
        n_forces=int(n_forces),
        n_energies=int(n_energies),
    )
