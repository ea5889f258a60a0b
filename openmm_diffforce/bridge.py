r"""The noisy operator bridge: Delta f between states that need not overlap, through their noised frames.

Noising y = x + sigma eps keeps the partition function of every lambda, so that Delta f is also the free
energy between the *noised* states, which overlap better. The work between them,

.. math:: \Delta S_\sigma(y) = -\ln E_0[e^{-O}|y] = +\ln E_1[e^{+O}|y] ,

is the closure: it needs the conditional law of O given y, and only its smoothness speaks where neither
end was sampled. Here that law is one density tilted by lambda (:mod:`~openmm_diffforce.conditional`),
given a summary m(y) (:mod:`~openmm_diffforce.summary`): any function of y is a kernel as good as y.
sigma -> 0 is plain BAR or MBAR, unbiased and noisy; sigma -> infinity is
:func:`~openmm_diffforce.density.fit_operator_density`, quiet and as good as its assumption.

Arrays and callables in, a result out: nothing here needs OpenMM or torch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp
from scipy.stats import norm

from .closure import (
    MomentReadout,
    composite_closure,
    gamma_closure,
    hermite_closure,
    moment_readout,
    trapezoid_closure,
    tweedie_closure,
)
from .conditional import N_BINS, ConditionalDensity, Fit, bin_counts
from .density import OperatorCoordinate, OperatorDensity, coordinates_of, fit_operator_density
from .errors import ConvergenceError, InputError
from .estimate import MIN_OVERLAP, statistical_inefficiency
from .summary import PairDistances, columns_of, cross_fitted_summary, fold_of

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
ClosureName = Literal["density", "tweedie", "gamma"]

N_LEVELS = 7
"""Noise levels by default."""

NARROWEST, WIDEST = 0.3, 1.5
"""The default levels run from NARROWEST times the fluctuation of the stiffest column (its tenth
percentile) to WIDEST times that of the softest (its ninetieth)."""

N_COPIES = 2
"""Noised copies of every frame."""

N_FOLDS = 5
N_BOOTSTRAP = 40

MAX_COORDINATES = 2
"""Coordinates z(O) taken over from the density without noise, the most probable first ..."""

LEAST_WEIGHT = 0.05
"""... with at least this probability."""

LONGEST_STEP = 1e3
"""Of Newton's method for MBAR between the noised states [kT]."""

Kernel = Callable[[FloatArray, float, np.random.Generator], FloatArray]
"""(frames, sigma, generator) -> noised frames."""


@dataclass(frozen=True)
class GaussianKernel:
    """y = x + sigma eps on some atoms, or on all.

    Attributes
    ----------
    atoms : tuple of int or None
        None noises everything. Elsewhere the atoms that O sees: noise on others only hides them.

    Examples
    --------
    >>> y = GaussianKernel((1,))(np.zeros((1, 2, 3)), 0.1, np.random.default_rng(0))
    >>> bool((y[0, 0] == 0).all() and (y[0, 1] != 0).all())
    True
    """

    atoms: tuple[int, ...] | None = None

    def __call__(self, x: FloatArray, sigma: float, generator: np.random.Generator) -> FloatArray:
        """Noised copies of ``x`` [nm]."""
        y = x.copy()
        if self.atoms is None:
            y += sigma * generator.standard_normal(x.shape)
        else:
            where = list(self.atoms)
            y[:, where] += sigma * generator.standard_normal(x[:, where].shape)
        return y


@dataclass(frozen=True)
class NoiseLevel:
    """The bridge at one noise level.

    Attributes
    ----------
    sigma : float
        [nm], or the unit of the frames.
    delta_f, d_delta_f : float
        BAR (MBAR with windows) between the noised states, and its standard error [kT]: that of
        ``d_sampling``, ``d_closure`` and ``d_models`` together, never below ``d_folds``.
    d_sampling : float
        From the finite number of noised frames.
    d_closure : float
        From the posterior of the conditional density.
    d_models : float
        From the choice of coordinate and roughness.
    d_folds : float
        Jackknife over the folds, each of which leaves its frames out of the density and of BAR.
    overlap : float
        A of the noised states, the smallest of neighbours in lambda.
    ess : float
        Effective sample size of the exponential averages, the smaller direction, in independent frames.
    exp_forward, exp_reverse : float
        Delta f by exponential averages over the noised ends [kT].
    normalisation, d_normalisation : float
        ln E_0[exp(-(Delta S - Delta f))], zero when work and states belong together, and its error.
    r_squared : float
        Of the summary, for the coordinate of O that it predicts, on frames it was not fitted to.
    calibration : tuple of float
        Per state, mean square of the normal score of O in its predicted conditional law, on folds it
        was not fitted to; 1 is expected.
    folds : tuple of float
        Delta f with each fold left out [kT].
    closures : dict
        Delta f with other closures of the same conditional moments [kT], those that have one.
    shifted : float
        Largest distance by which those moments had to be moved for the Tweedie closure, relative.
    inverted : float
        Share of noised frames in bins where the frames of the last state have a larger mean O than
        those of the first, beyond two standard errors: the bracket O_1 <= Delta S <= O_0 is violated.
    """

    sigma: float
    delta_f: float
    d_delta_f: float
    d_sampling: float
    d_closure: float
    d_models: float
    d_folds: float
    overlap: float
    ess: float
    exp_forward: float
    exp_reverse: float
    normalisation: float
    d_normalisation: float
    r_squared: float
    calibration: tuple[float, ...]
    folds: tuple[float, ...]
    closures: dict[str, float]
    shifted: float
    inverted: float


@dataclass(frozen=True)
class BridgeResult:
    """What :func:`noisy_operator_bridge` returns.

    Attributes
    ----------
    delta_f, d_delta_f : float
        At the chosen level [kT]; the error is the larger of the level's own and the bootstrap's.
    d_bootstrap : float
        Standard deviation over resampled blocks of frames [kT]; NaN without a bootstrap.
    chosen : int
        Index of the level with the smallest stated error among those whose ends overlap.
    levels : tuple of NoiseLevel
        In the order of rising sigma; those at which the states do not meet at all are left out.
    plateau : float
        Range of Delta f over the levels within a factor two of the chosen sigma, its neighbours
        always among them [kT]; NaN for a single level.
    density : OperatorDensity
        The limit of infinite noise.
    readout : MomentReadout
        The same limit from two moments of the end states: what needs no model at all.
    lams : tuple of float
    n_frames : tuple of int
    inefficiency : tuple of float
        Statistical inefficiency of O in every state.
    closure : str
    work_forward, work_reverse : numpy.ndarray
        Work between the noised ends at the chosen level, Delta S on noised frames of state 0 and
        -Delta S on those of state 1 [kT].
    """

    delta_f: float
    d_delta_f: float
    d_bootstrap: float
    chosen: int
    levels: tuple[NoiseLevel, ...]
    plateau: float
    density: OperatorDensity
    readout: MomentReadout
    lams: tuple[float, ...]
    n_frames: tuple[int, ...]
    inefficiency: tuple[float, ...]
    closure: str
    work_forward: FloatArray
    work_reverse: FloatArray

    @property
    def level(self) -> NoiseLevel:
        """The chosen level."""
        return self.levels[self.chosen]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a number that there is none of is None."""
        return _plain({f.name: getattr(self, f.name) for f in fields(self)})


def _plain(value: Any) -> Any:
    if isinstance(value, OperatorDensity | MomentReadout):
        return value.to_dict()
    if isinstance(value, NoiseLevel):
        return _plain(vars(value))
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | np.ndarray):
        return [_plain(v) for v in (value.tolist() if isinstance(value, np.ndarray) else value)]
    return None if isinstance(value, float) and math.isnan(value) else value


def default_levels(columns: Sequence[FloatArray], n_levels: int = N_LEVELS) -> tuple[float, ...]:
    """Noise levels from the fluctuations of the columns within the states: stiffest to softest.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(10000, 1))
    >>> [round(s, 1) for s in default_levels([x, x + 9], 3)]
    [0.3, 0.7, 1.5]
    """
    spread = np.sqrt(np.mean([c.var(axis=0) for c in columns], axis=0))
    spread = spread[spread > 1e-9]
    if len(spread) == 0:
        raise InputError("sigmas: every column of the features is constant; pass features that vary.")
    low, high = np.quantile(spread, [0.1, 0.9])
    return tuple(np.geomspace(NARROWEST * low, WIDEST * high, n_levels).tolist())


# ------------------------------------------------------------- discrete states: one per bin


def _solve_mbar(counts: FloatArray, actions: FloatArray) -> tuple[FloatArray, FloatArray]:
    """f_k - f_0 and p_k(b) [N_BINS, n_states] from counts and actions of bins; BAR for two states.

    Stationary: sum_b N_b p_k(b) = N_k. The negative log likelihood is convex in f; damped Newton.
    """
    n_k, n_b = counts.sum(axis=0), counts.sum(axis=1)
    log_n, floor = np.log(n_k), n_k.min() * np.eye(len(n_k) - 1)

    def value(f: FloatArray) -> float:
        return float(n_b @ logsumexp(log_n + f - actions, axis=1) - n_k @ f)

    f = np.average(actions, axis=0, weights=n_b)
    now, damping = value(f), 0.0
    for _ in range(200):
        log_p = log_n + f - actions
        p = np.exp(log_p - logsumexp(log_p, axis=1, keepdims=True))
        gradient = n_b @ p - n_k
        step = np.zeros(len(f))
        step[1:] = -np.linalg.solve(_curvature(counts, p) + damping * floor, gradient[1:])
        step *= min(1.0, LONGEST_STEP / max(np.abs(step).max(), 1e-300))
        new = value(f + step)
        if new <= now + 1e-12 * abs(now):
            f, now, damping = f + step, new, 0.1 * damping
            if np.abs(step).max() < 1e-10:
                return f - f[0], p
        else:
            damping = max(10.0 * damping, 1e-6)
            if damping > 1e12:
                break
    raise ConvergenceError(
        "bridge: expected BAR between the noised states to converge, found none; they do not overlap at "
        "all: use larger noise levels, or add a window."
    )


def _curvature(counts: FloatArray, p: FloatArray) -> FloatArray:
    """Second derivative by f of all states but the first. Where states do not overlap at all it would be
    zero: a trace of their size keeps it invertible, and the errors finite and huge."""
    n_b = counts.sum(axis=1)
    full = np.diag(n_b @ p) - (p * n_b[:, None]).T @ p
    return np.asarray(full[1:, 1:] + 1e-12 * counts.sum(axis=0).min() * np.eye(p.shape[1] - 1))


def _slope(counts: FloatArray, p: FloatArray) -> FloatArray:
    """d Delta f / d actions, shape (N_BINS, n_states): implicit differentiation of MBAR's equations."""
    a = np.zeros(p.shape[1])
    unit = np.zeros(p.shape[1] - 1)
    unit[-1] = 1.0
    a[1:] = np.linalg.solve(_curvature(counts, p), unit)
    return np.asarray(counts.sum(axis=1)[:, None] * p * (a - (p @ a)[:, None]))


def _influence(counts: FloatArray, p: FloatArray) -> FloatArray:
    """First-order effect of one more frame in a bin on Delta f, up to a constant per state."""
    return np.asarray(-np.linalg.solve(_curvature(counts, p), p[:, 1:].T)[-1])


def _overlap(log_p: FloatArray, counts: FloatArray) -> float:
    """A = int 2 p q/(p + q) of two states from both of them; ln p, ln q up to what they share."""
    share = 2.0 * np.exp(log_p[:, ::-1] - np.logaddexp(*log_p.T)[:, None])
    return float((share * counts).sum() / counts.sum())


@dataclass
class _Frames:
    """All states' noised copies in one row, state by state, copy by copy."""

    operator: FloatArray
    state: IntArray
    frame: IntArray
    fold: IntArray
    weight: FloatArray  # independent frames that a copy stands for

    @classmethod
    def of(cls, operators: list[FloatArray], g: tuple[float, ...], n_copies: int, n_folds: int) -> "_Frames":
        n = [len(o) for o in operators]

        def row(parts: list[Any]) -> Any:
            return np.concatenate([np.tile(p, n_copies) for p in parts])

        return cls(
            operator=row(operators),
            state=row([np.full(k, i) for i, k in enumerate(n)]),
            frame=row([np.arange(k) for k in n]),
            fold=row([fold_of(k, n_folds) for k in n]),
            weight=row([np.full(k, 1.0 / (n_copies * one)) for k, one in zip(n, g, strict=True)]),
        )


@dataclass
class _Level:
    """The data of a level that the bootstrap needs again."""

    model: ConditionalDensity
    best: Fit
    mu: float
    across: float


def _actions(model: ConditionalDensity, c: FloatArray, closure: ClosureName) -> tuple[FloatArray, float]:
    """S_k - S_0 of every bin by the closure, and how far it had to move the moments."""
    if closure == "density":
        return model.actions(c), 0.0
    o, v = model.moments(c)
    out, shift = np.zeros_like(o), 0.0
    for k in range(1, o.shape[1]):
        of = tweedie_closure if closure == "tweedie" else gamma_closure
        found = composite_closure(model.lams[: k + 1], o.T[: k + 1], v.T[: k + 1], closure=of)
        out[:, k], shift = found.delta, max(shift, float(found.shift.max()))
    return out, shift


def _other_closures(
    model: ConditionalDensity, c: FloatArray, counts: FloatArray
) -> tuple[dict[str, float], float]:
    o, v = model.moments(c)
    found, shift = {}, 0.0
    for name, of in (
        ("tweedie", tweedie_closure), ("gamma", gamma_closure), ("hermite", hermite_closure),
        ("trapezoid", trapezoid_closure),
    ):  # fmt: skip
        one = composite_closure(model.lams, o.T, v.T, closure=of)
        if name == "tweedie":
            shift = float(one.shift.max())
        ends = counts[:, [0, -1]]
        try:
            found[name] = float(_solve_mbar(ends, np.stack([0 * one.delta, one.delta], axis=1))[0][-1])
        except ConvergenceError:
            continue  # so far off that its noised ends do not meet: nothing to show
    return found, shift


def _error_of(influence: FloatArray, data: _Frames) -> float:
    """Standard error of a sum of influences of copies: copies of a frame averaged, frames by their g."""
    variance = 0.0
    for k in range(int(data.state.max()) + 1):
        mine = data.state == k
        n = int(data.frame[mine].max()) + 1
        total = np.bincount(data.frame[mine], weights=influence[mine], minlength=n)
        per_frame = np.asarray(total / np.bincount(data.frame[mine], minlength=n), dtype=np.float64)
        variance += statistical_inefficiency(per_frame) * per_frame.var(ddof=1) / n
    return math.sqrt(variance)


def _work_diagnostics(work: FloatArray, delta_f: float, data: _Frames, bins: IntArray) -> dict[str, float]:
    """EXP both ways, effective sample size and the normalisation, from the work of the bins."""
    last = int(data.state.max())
    out = {}
    sizes = []
    for name, state, sign in (("exp_forward", 0, -1.0), ("exp_reverse", last, 1.0)):
        mine = data.state == state
        log_w = sign * work[bins[mine]]
        mean = float(logsumexp(log_w) - math.log(mine.sum()))
        out[name] = sign * mean
        share = np.exp(log_w - logsumexp(log_w))
        ess = 1.0 / float((share**2).sum()) / mine.sum()
        n_independent = float(data.weight[mine].sum())
        sizes.append(float(ess * n_independent))
        if state == 0:
            out["normalisation"] = mean + delta_f
            out["d_normalisation"] = math.sqrt(max(1.0 / ess - 1.0, 0.0) / n_independent)
    return out | {"ess": min(sizes)}


def _inverted(bins: IntArray, data: _Frames) -> float:
    """Share of copies in bins whose mean O rises from the first to the last state, beyond two errors."""
    last, bad, total = int(data.state.max()), 0.0, 0.0
    for b in range(N_BINS):
        ends = [(bins == b) & (data.state == k) for k in (0, last)]
        n = [data.weight[e].sum() for e in ends]
        total += sum(n)
        if min(n) < 3:
            continue
        mean = [data.operator[e].mean() for e in ends]
        error = math.sqrt(sum(data.operator[e].var() / k for e, k in zip(ends, n, strict=True)))
        bad += sum(n) if mean[1] - mean[0] > 2 * error else 0.0
    return float(bad / total)


def _bridge_level(
    sigma: float,
    columns: FloatArray,
    data: _Frames,
    lams: FloatArray,
    coordinates: list[OperatorCoordinate],
    closure: ClosureName,
    n_folds: int,
) -> tuple[NoiseLevel, _Level, FloatArray]:
    n_states = len(lams)
    target = coordinates[0].z(data.operator)
    summary = cross_fitted_summary(columns, target, data.weight, data.fold)
    rank = np.argsort(np.argsort(summary.m, kind="stable"), kind="stable")
    bins = np.asarray(rank * N_BINS // len(rank), dtype=np.int64)
    if summary.r_squared <= 0.0:
        bins = np.asarray(np.arange(len(rank)) % N_BINS, dtype=np.int64)  # says nothing: any bin will do
    counts = bin_counts(bins, data.state, data.weight, n_states)
    rows = []
    for coordinate in coordinates:
        model = ConditionalDensity(coordinate, lams, data.operator, bins, data.state)
        for fit, mu, across in model.fits(data.weight):
            actions, _ = _actions(model, fit.c, closure)
            f, p = _solve_mbar(counts, actions)
            variance = model.error(fit, _slope(counts, p))
            rows.append((fit.evidence, float(f[-1]), variance, model, fit, mu, across))
    evidence = np.array([r[0] for r in rows])
    weight = np.exp(evidence - evidence.max())
    weight /= weight.sum()
    values, variances = (np.array([r[i] for r in rows]) for i in (1, 2))
    delta_f = float(weight @ values)
    d_models = math.sqrt(float(weight @ (values - delta_f) ** 2))
    d_closure = math.sqrt(float(weight @ variances))
    _, own, _, model, best, mu, across = rows[int(weight.argmax())]
    actions, shifted = _actions(model, best.c, closure)
    f, p = _solve_mbar(counts, actions)
    d_sampling = _error_of(_influence(counts, p)[bins] * counts.sum(axis=0)[data.state], data)
    overlap = min(_overlap((f - actions)[:, k : k + 2], counts[:, k : k + 2]) for k in range(n_states - 1))
    closures, shift = _other_closures(model, best.c, counts)
    # Each fold left out of the density and of BAR; its frames are judged by that density.
    folds, score = [], np.full(len(bins), np.nan)
    for k in range(n_folds):
        kept = data.weight * (data.fold != k)
        fit = model.fit(kept, mu, across, best.c)
        out = np.flatnonzero(data.fold == k)
        score[out] = model.quantile(fit.c, out)
        less = bin_counts(bins, data.state, kept, n_states)
        folds.append(float(_solve_mbar(less, _actions(model, fit.c, closure)[0])[0][-1]))
    normal = norm.ppf(np.clip(score, 1e-6, 1 - 1e-6)) ** 2
    calibration = tuple(float(normal[data.state == k].mean()) for k in range(n_states))
    d_folds = math.sqrt((n_folds - 1) * np.var(folds))
    d = math.sqrt(d_sampling**2 + d_closure**2 + d_models**2)
    level = NoiseLevel(
        sigma=float(sigma),
        delta_f=delta_f,
        d_delta_f=max(d, d_folds),
        d_sampling=d_sampling,
        d_closure=d_closure,
        d_models=d_models,
        d_folds=d_folds,
        overlap=overlap,
        r_squared=summary.r_squared,
        calibration=calibration,
        folds=tuple(folds),
        closures={"density": own, **closures} if closure == "density" else closures,
        shifted=max(shift, shifted),
        inverted=_inverted(bins, data),
        **_work_diagnostics(actions[:, -1], own, data, bins),
    )
    return level, _Level(model, best, mu, across), actions[:, -1]


def _bootstrap(
    level: _Level,
    data: _Frames,
    closure: ClosureName,
    g: tuple[float, ...],
    n: int,
    generator: np.random.Generator,
) -> float:
    """Standard deviation of Delta f over resampled contiguous blocks of frames; curves are refitted."""
    found = []
    for _ in range(n):
        times = np.zeros(len(data.state))
        for k, one in enumerate(g):
            mine = data.state == k
            n_frames = int(data.frame[mine].max()) + 1
            block = min(math.ceil(one), n_frames)
            first = generator.integers(n_frames, size=-(-n_frames // block))
            drawn = (first[:, None] + np.arange(block)).ravel()[:n_frames] % n_frames
            times[mine] = np.bincount(drawn, minlength=n_frames)[data.frame[mine]]
        weight = data.weight * times
        fit = level.model.fit(weight, level.mu, level.across, level.best.c)
        counts = bin_counts(level.model.bins, data.state, weight, len(g))
        found.append(_solve_mbar(counts, _actions(level.model, fit.c, closure)[0])[0][-1])
    return float(np.std(found, ddof=1))


def _check(frames: Any, operators: Any, lams: Any) -> tuple[list[FloatArray], list[FloatArray]]:
    try:
        x = [np.asarray(f, dtype=np.float64) for f in frames]
        o = [np.asarray(v, dtype=np.float64) for v in operators]
    except (TypeError, ValueError) as err:
        raise InputError(f"frames, operators: expected arrays of real numbers, found {err}.") from err
    if not len(x) == len(o) == len(lams):
        raise InputError(
            f"frames, operators, lams: expected one entry per state each, found {len(x)}, {len(o)} and "
            f"{len(lams)}."
        )
    for k, (one, value) in enumerate(zip(x, o, strict=True)):
        molecule = one.ndim == 3 and one.shape[2] == 3
        if not (molecule or one.ndim == 2) or one.shape[1:] != x[0].shape[1:]:
            raise InputError(
                f"frames[{k}]: expected shape (n_frames, n_atoms, 3) or (n_frames, n_coordinates), the "
                f"same for all states, found {one.shape}."
            )
        if value.shape != one.shape[:1]:
            raise InputError(
                f"operators[{k}]: expected one value for each of {len(one)} frames, found {value.shape}."
            )
        if not np.isfinite(one).all():
            raise InputError(
                f"frames[{k}]: expected finite coordinates, found {np.count_nonzero(~np.isfinite(one))} "
                "that are not; look for the step at which the run blew up."
            )
    return x, o


def noisy_operator_bridge(
    frames: Sequence[Any],
    operators: Sequence[Any],
    lams: Sequence[float] = (0.0, 1.0),
    *,
    generator: np.random.Generator,
    atoms: Sequence[int] | None = None,
    kernel: Kernel | None = None,
    features: Callable[[Any], Any] | None = None,
    sigmas: Sequence[float] | None = None,
    closure: ClosureName = "density",
    inefficiency: Sequence[float] | None = None,
    n_copies: int = N_COPIES,
    n_folds: int = N_FOLDS,
    n_bootstrap: int = N_BOOTSTRAP,
    progress: Callable[[int, int], None] | None = None,
) -> BridgeResult:
    r"""Delta f by BAR (MBAR with windows) between noised states, over a curve of noise levels.

    .. math:: y = x + \sigma\epsilon, \quad b = \mathrm{bin}(m(y)), \quad
              p_\lambda(O|b) = e^{a_b(z(O)) - \lambda O}/Z_\lambda(b), \quad
              \Delta S(b) = -\ln Z_1(b) + \ln Z_0(b)

    .. math:: \Delta f: \quad \sum_{b} n_0(b) \, \mathrm{Fermi}(\Delta S(b) - \Delta f)
              = \sum_b n_1(b) \, \mathrm{Fermi}(\Delta f - \Delta S(b)) \quad (n_0 = n_1)

    ==========  =======================================
    symbol      code
    ==========  =======================================
    x, O        ``frames[k]``, ``operators[k]``
    lambda      ``lams[k]``
    y           ``kernel(x, sigma, generator)``
    m(y)        ``summary.cross_fitted_summary``
    a_b(z)      ``conditional.ConditionalDensity``
    Delta S     ``work_forward`` on noised frames of 0
    ==========  =======================================

    Parameters
    ----------
    frames : sequence of array_like, each (n_frames, n_atoms, 3) or (n_frames, n_coordinates)
        Equilibrium frames of every state in time order [nm]; molecules whole.
    operators : sequence of array_like, each of shape (n_frames,)
        O = u_1 - u_0 on them [kT].
    lams : sequence of float
        Lambda of every state, 0 and 1 for two end states; windows between make it composite.
    generator : numpy.random.Generator
        Of the noise and the bootstrap.
    atoms : sequence of int, optional
        Atoms that are noised, by default all. Best are the unconstrained atoms that O sees.
    kernel : callable, optional
        (frames, sigma, generator) -> noised frames, instead of :class:`GaussianKernel` on ``atoms``.
    features : callable, optional
        noised frames -> invariant columns (n_frames, n_columns). Distances from ``atoms``
        (:class:`~openmm_diffforce.summary.PairDistances`) by default, the coordinates themselves for
        two-dimensional frames.
    sigmas : sequence of float, optional
        Noise levels > 0; by default from the fluctuations of the columns.
    closure : str
        "density": one conditional density tilted by lambda. "tweedie", "gamma": its moments at the
        states, closed between them (:mod:`~openmm_diffforce.closure`).
    inefficiency : sequence of float, optional
        Statistical inefficiencies g >= 1; pymbar's of O by default.
    n_copies : int
        Noised copies of every frame.
    n_folds : int
        Cross-fitting: no frame is judged by what was fitted to it.
    n_bootstrap : int
        Resamplings at the chosen level; 0 for none.
    progress : callable, optional
        Called as (levels done, levels in all).

    Returns
    -------
    BridgeResult
        The noise level is chosen by its own stated error, never by a reference.

    Raises
    ------
    InputError
        For arrays that do not belong together or are not finite, lambdas that do not start at 0 and
        end at 1, a constant operator, or fewer than 20 independent frames in a state.
    ConvergenceError
        If a fit finds no mode, or the noised states do not overlap at any level.

    Notes
    -----
    Assumed and not checked: linear mixing; equilibrium in every state; invariant features; a conditional
    density that is smooth where no state was sampled. What depends on it is judged by
    :func:`~openmm_diffforce.audit.audit_bridge`. Deterministic for a given state of ``generator``.

    References
    ----------
    Action-operator semantics and the noisy operator bridge, arXiv:2606.30687.
    C. H. Bennett, 1976, doi:10.1016/0021-9991(76)90078-4.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = [rng.normal(0.0, 1.0, (400, 1)), rng.normal(3.0, 1.0, (400, 1))]
    >>> found = noisy_operator_bridge(x, [4.5 - 3 * v[:, 0] for v in x], generator=rng, inefficiency=[1, 1],
    ...                               sigmas=[0.5, 1.0], n_bootstrap=0)
    >>> abs(found.delta_f) < 3 * found.d_delta_f < 1
    True
    """
    x, o = _check(frames, operators, lams)
    if not isinstance(generator, np.random.Generator):
        raise InputError(f"generator: expected numpy.random.Generator, found {type(generator).__name__}.")
    if closure not in ("density", "tweedie", "gamma"):
        raise InputError(f"closure: expected density, tweedie or gamma, found {closure!r}.")
    for name, number, least in (
        ("n_copies", n_copies, 1),
        ("n_folds", n_folds, 2),
        ("n_bootstrap", n_bootstrap, 0),
    ):
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < least:
            raise InputError(f"{name}: expected an integer of at least {least}, found {number!r}.")
    density = fit_operator_density(o, lams, inefficiency=inefficiency)
    lam, g = np.asarray(lams, dtype=np.float64), density.inefficiency
    if lam[0] != 0.0 or lam[-1] != 1.0:
        raise InputError(f"lams: expected the end states 0 and 1 among them, found {lam.tolist()}.")
    if density.coordinate == "O":
        raise InputError(
            f"operators: expected values that vary, found {o[0][0]:g} kT on every frame; then Delta f is "
            "that number."
        )
    n_atoms = x[0].shape[1]
    noised = tuple(range(n_atoms)) if atoms is None else tuple(int(a) for a in atoms)
    if len(noised) == 0 or len(set(noised)) != len(noised) or min(noised) < 0 or max(noised) >= n_atoms:
        raise InputError(f"atoms: expected different indices below {n_atoms}, found {list(noised)}.")
    kernel = GaussianKernel(noised) if kernel is None else kernel
    if features is None:
        features = PairDistances.of(x, noised) if x[0].ndim == 3 else np.asarray
    levels = default_levels([columns_of(features, one) for one in x]) if sigmas is None else tuple(sigmas)
    if not levels or not all(math.isfinite(s) and s > 0 for s in levels):
        raise InputError(f"sigmas: expected finite numbers > 0, found {list(levels)}.")
    levels = tuple(sorted(float(s) for s in levels))
    by_name = {str(c): c for c in coordinates_of(o)}
    ranked = sorted(density.coordinate_weights.items(), key=lambda item: -item[1])[:MAX_COORDINATES]
    coordinates = [by_name[n] for i, (n, w) in enumerate(ranked) if i == 0 or w >= LEAST_WEIGHT]
    data = _Frames.of(o, g, n_copies, n_folds)
    readout = moment_readout(o[0], o[-1], generator=generator, block=math.ceil(max(g[0], g[-1])))
    found: list[tuple[NoiseLevel, _Level, FloatArray]] = []
    for i, sigma in enumerate(levels):
        y = np.concatenate(
            [kernel(np.tile(one, (n_copies, *[1] * (one.ndim - 1))), sigma, generator) for one in x]
        )
        columns = columns_of(features, y)
        try:
            found.append(_bridge_level(sigma, columns, data, lam, coordinates, closure, n_folds))
        except ConvergenceError:
            if i + 1 == len(levels) and not found:
                raise  # no level joins the states
        if progress is not None:
            progress(i + 1, len(levels))
    rows = tuple(f[0] for f in found)
    # A level whose noised ends overlap less than BAR asks for is not chosen.
    open_to_choice = [i for i, r in enumerate(rows) if r.overlap >= MIN_OVERLAP] or list(range(len(rows)))
    chosen = min(open_to_choice, key=lambda i: rows[i].d_delta_f)
    level, kept, work = found[chosen]
    d_bootstrap = math.nan
    if n_bootstrap:
        d_bootstrap = _bootstrap(kept, data, closure, g, n_bootstrap, generator)
    near = [
        r.delta_f
        for i, r in enumerate(rows)
        if abs(i - chosen) <= 1 or level.sigma / 2 <= r.sigma <= level.sigma * 2
    ]
    bins = kept.model.bins
    return BridgeResult(
        delta_f=level.delta_f,
        d_delta_f=max(level.d_delta_f, d_bootstrap) if n_bootstrap else level.d_delta_f,
        d_bootstrap=d_bootstrap,
        chosen=chosen,
        levels=rows,
        plateau=max(near) - min(near) if len(near) > 1 else math.nan,
        density=density,
        readout=readout,
        lams=tuple(lam.tolist()),
        n_frames=tuple(len(v) for v in o),
        inefficiency=g,
        closure=closure,
        work_forward=work[bins[data.state == 0]],
        work_reverse=-work[bins[data.state == len(lam) - 1]],
    )
