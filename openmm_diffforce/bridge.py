r"""The noisy operator bridge: Delta f between states that need not overlap, through their noised frames.

Noising y = x + sigma eps keeps the partition function of every lambda, so that Delta f is also the free
energy between the *noised* states, which overlap better. The work between them,

.. math:: \Delta S_\sigma(y) = -\ln E_0[e^{-O}|y] = +\ln E_1[e^{+O}|y] ,

is the closure: it needs the conditional law of O given y, and only its smoothness speaks where neither
end was sampled. Here that law is one density tilted by lambda (:mod:`~openmm_diffforce.conditional`),
given a summary m(y) (:mod:`~openmm_diffforce.summary`, or by a network :mod:`~openmm_diffforce.heads`):
any function of y is a kernel as good as y.
sigma -> 0 is plain BAR or MBAR, unbiased and noisy; sigma -> infinity is
:func:`~openmm_diffforce.density.fit_operator_density`, quiet and as good as its assumption.

Arrays and callables in, a result out: nothing here needs OpenMM, and only the network's heads need torch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp
from scipy.stats import norm

from .binned_mbar import influence_of_counts, overlap_of_two, slope_by_actions, solve_mbar
from .closure import (
    MomentReadout,
    composite_closure,
    gamma_closure,
    hermite_closure,
    moment_readout,
    trapezoid_closure,
    tweedie_closure,
)
from .conditional import N_BINS, ConditionalDensity, bin_counts
from .density import OperatorCoordinate, OperatorDensity, coordinates_of, fit_operator_density
from .errors import ConvergenceError, InputError
from .estimate import MIN_OVERLAP, statistical_inefficiency
from .summary import PairDistances, Summary, columns_of, cross_fitted_summary, fold_of

if TYPE_CHECKING:
    from .heads import Heads

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
ClosureName = Literal["density", "tweedie", "gamma", "heads"]
SummaryName = Literal["splines", "heads"]

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
        From the posterior of the conditional density; with heads, jackknife over the networks.
    d_models : float
        From the choice of coordinate and roughness; with heads, their distance from the density in bins
        of the same works.
    d_folds : float
        Jackknife over the folds, each of which leaves its frames out of the density (the network) and
        of BAR.
    overlap : float
        A of the noised states, the smallest of neighbours in lambda.
    ess : float
        Effective sample size of the exponential averages, the smaller direction, in independent frames.
    exp_forward, exp_reverse : float
        Delta f by exponential averages over the noised ends [kT].
    normalisation, d_normalisation : float
        ln E_0[exp(-(Delta S - Delta f))], zero when work and states belong together, and its error.
    r_squared : float
        Of the summary, for the coordinate of O that it predicts, on frames it was not fitted to. With
        heads, the share of that coordinate's variance that lies between bins of the work.
    calibration : tuple of float
        Per state, mean square of the normal score of O in its predicted conditional law, on folds it
        was not fitted to; with heads, chi^2 of O. 1 is expected.
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
    closure, summary : str
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
    summary: str
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


@dataclass
class _Frames:
    """All states' noised copies in one row, state by state, copy by copy."""

    operator: FloatArray
    state: IntArray
    frame: IntArray
    block: IntArray  # two to a fold
    fold: IntArray
    weight: FloatArray  # independent frames that a copy stands for

    @classmethod
    def of(cls, operators: list[FloatArray], g: tuple[float, ...], n_copies: int, n_folds: int) -> "_Frames":
        n = [len(o) for o in operators]

        def row(parts: list[Any]) -> Any:
            return np.concatenate([np.tile(p, n_copies) for p in parts])

        block = row([fold_of(k, 2 * n_folds) for k in n])
        return cls(
            operator=row(operators),
            state=row([np.full(k, i) for i, k in enumerate(n)]),
            frame=row([np.arange(k) for k in n]),
            block=block,
            fold=block // 2,
            weight=row([np.full(k, 1.0 / (n_copies * one)) for k, one in zip(n, g, strict=True)]),
        )


@dataclass
class _Level:
    """A level, and what the result and its bootstrap need of it."""

    row: NoiseLevel
    work: FloatArray  # of every copy
    again: Callable[[FloatArray], float]
    """Weights of the copies -> Delta f."""


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
            found[name] = float(solve_mbar(ends, np.stack([0 * one.delta, one.delta], axis=1))[0][-1])
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


def _work_diagnostics(work: FloatArray, delta_f: float, data: _Frames) -> dict[str, float]:
    """EXP both ways, effective sample size and the normalisation, from the work of the copies."""
    last = int(data.state.max())
    out = {}
    sizes = []
    for name, state, sign in (("exp_forward", 0, -1.0), ("exp_reverse", last, 1.0)):
        mine = data.state == state
        log_w = sign * work[mine]
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


def _bins_of(m: FloatArray) -> IntArray:
    """Bins of a summary by its rank: as many copies in each."""
    rank = np.argsort(np.argsort(m, kind="stable"), kind="stable")
    return np.asarray(rank * N_BINS // len(rank), dtype=np.int64)


def _between_bins(target: FloatArray, weight: FloatArray, bins: IntArray) -> float:
    """Share of the target's variance that lies between bins."""
    total = np.bincount(bins, weights=weight, minlength=N_BINS)
    mean = np.bincount(bins, weights=weight * target, minlength=N_BINS) / np.maximum(total, 1e-300)
    rest = float((weight * (target - mean[bins]) ** 2).sum())
    whole = float((weight * (target - np.average(target, weights=weight)) ** 2).sum())
    return 1.0 - rest / whole if whole > 0.0 else 0.0


def _heads_of(columns: FloatArray, data: _Frames, generator: np.random.Generator) -> "Heads":
    from .heads import cross_fitted_heads

    return cross_fitted_heads(
        columns, data.operator, data.state, data.weight, data.block, generator=generator
    )


def _heads_level(sigma: float, heads: "Heads", data: _Frames, density: NoiseLevel, n_folds: int) -> _Level:
    """BAR over single noised copies: the work of each by the network that did not see it.

    Nothing in the heads shows that two moments are too few: the density in bins of the same works does.
    """
    at = np.arange(len(data.state))

    def bar(work: FloatArray, weight: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        counts = np.zeros((len(at), 2))
        counts[at, data.state] = weight
        actions = np.stack([np.zeros(len(at)), work], axis=1)
        return (*solve_mbar(counts, actions), counts, actions)

    def again(weight: FloatArray) -> float:
        return float(bar(heads.moments.delta, weight)[0][-1])

    f, p, counts, actions = bar(heads.moments.delta, data.weight)
    delta_f = float(f[-1])
    d_sampling = _error_of(influence_of_counts(counts, p) * counts.sum(axis=0)[data.state], data)
    networks = [float(bar(one.delta, data.weight)[0][-1]) for one in heads.by_fold]
    folds = [
        float(bar(one.delta, data.weight * (data.fold != k))[0][-1]) for k, one in enumerate(heads.by_fold)
    ]
    d_closure, d_folds = (math.sqrt((n_folds - 1) * np.var(v)) for v in (networks, folds))
    of = heads.moments
    mean, variance = np.where(data.state == 0, (of.o_0, of.v_0), (of.o_1, of.v_1))
    chi2 = (data.operator - mean) ** 2 / variance
    bins = _bins_of(of.delta)
    closures = {"density": density.delta_f, "tweedie": delta_f}  # Tweedie's, of the heads' own moments
    for name, closure in (
        ("gamma", gamma_closure),
        ("hermite", hermite_closure),
        ("trapezoid", trapezoid_closure),
    ):
        try:
            closures[name] = float(bar(closure(of.o_0, of.o_1, of.v_0, of.v_1), data.weight)[0][-1])
        except ConvergenceError:
            continue  # so far off that its noised ends do not meet: nothing to show
    d_models = abs(delta_f - density.delta_f)
    row = NoiseLevel(
        sigma=float(sigma),
        delta_f=delta_f,
        d_delta_f=max(math.hypot(d_sampling, d_closure, d_models), d_folds),
        d_sampling=d_sampling,
        d_closure=d_closure,
        d_models=d_models,
        d_folds=d_folds,
        overlap=overlap_of_two(f - actions, counts),
        r_squared=density.r_squared,
        calibration=tuple(float(chi2[data.state == k].mean()) for k in (0, 1)),
        folds=tuple(folds),
        closures=closures,
        shifted=0.0,
        inverted=_inverted(bins, data),
        **_work_diagnostics(of.delta, delta_f, data),
    )
    return _Level(row, of.delta, again)


def _density_level(
    sigma: float,
    summary: Summary,
    data: _Frames,
    lams: FloatArray,
    coordinates: list[OperatorCoordinate],
    closure: ClosureName,
    n_folds: int,
) -> _Level:
    """BAR or MBAR between bins of the summary: one conditional density of O for all of them."""
    n_states = len(lams)
    bins = _bins_of(summary.m)
    if summary.r_squared <= 0.0:
        bins = np.asarray(np.arange(len(bins)) % N_BINS, dtype=np.int64)  # says nothing: any bin will do
    counts = bin_counts(bins, data.state, data.weight, n_states)
    rows = []
    for coordinate in coordinates:
        model = ConditionalDensity(coordinate, lams, data.operator, bins, data.state)
        for fit, mu, across in model.fits(data.weight):
            actions, _ = _actions(model, fit.c, closure)
            f, p = solve_mbar(counts, actions)
            variance = model.error(fit, slope_by_actions(counts, p))
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
    f, p = solve_mbar(counts, actions)
    d_sampling = _error_of(influence_of_counts(counts, p)[bins] * counts.sum(axis=0)[data.state], data)
    overlap = min(
        overlap_of_two((f - actions)[:, k : k + 2], counts[:, k : k + 2]) for k in range(n_states - 1)
    )
    closures, shift = _other_closures(model, best.c, counts)
    # Each fold left out of the density and of BAR; its frames are judged by that density.
    folds, score = [], np.full(len(bins), np.nan)
    for k in range(n_folds):
        kept = data.weight * (data.fold != k)
        fit = model.fit(kept, mu, across, best.c)
        out = np.flatnonzero(data.fold == k)
        score[out] = model.quantile(fit.c, out)
        less = bin_counts(bins, data.state, kept, n_states)
        folds.append(float(solve_mbar(less, _actions(model, fit.c, closure)[0])[0][-1]))
    normal = norm.ppf(np.clip(score, 1e-6, 1 - 1e-6)) ** 2
    calibration = tuple(float(normal[data.state == k].mean()) for k in range(n_states))
    d_folds = math.sqrt((n_folds - 1) * np.var(folds))
    d = math.sqrt(d_sampling**2 + d_closure**2 + d_models**2)
    row = NoiseLevel(
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
        **_work_diagnostics(actions[bins, -1], own, data),
    )

    def again(weight: FloatArray) -> float:
        fit = model.fit(weight, mu, across, best.c)
        drawn = bin_counts(bins, data.state, weight, n_states)
        return float(solve_mbar(drawn, _actions(model, fit.c, closure)[0])[0][-1])

    return _Level(row, actions[bins, -1], again)


def _bootstrap(
    level: _Level, data: _Frames, g: tuple[float, ...], n: int, generator: np.random.Generator
) -> float:
    """Standard deviation of Delta f over resampled contiguous blocks of frames; curves are refitted,
    networks are not."""
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
        found.append(level.again(data.weight * times))
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
    summary: SummaryName = "splines",
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
    m(y)        ``summary.cross_fitted_summary``, or the work of ``heads.cross_fitted_heads``
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
        states, closed between them (:mod:`~openmm_diffforce.closure`). "heads": the work of every noised
        frame by a cross-fitted network (:mod:`~openmm_diffforce.heads`), and BAR over frames; for two
        end states. It knows two moments of O: where O has a heavy tail, as a steric operator has, it
        is off by kT. How far it is from the density, in bins of the same works, is in its error.
    summary : str
        What a noised frame is reduced to. "splines": linear in splines of the columns. "heads": the
        work that the network of ``closure="heads"`` finds, of which only the order counts here; for
        two end states.
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
    for name, choice, known in (("closure", closure, ClosureName), ("summary", summary, SummaryName)):
        if choice not in get_args(known):
            *some, last = get_args(known)
            raise InputError(f"{name}: expected {', '.join(some)} or {last}, found {choice!r}.")
    by_network = "heads" in (closure, summary)
    if by_network and len(lams) != 2:
        raise InputError(f"heads: expected two end states, found {len(lams)} states; use the defaults.")
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
    target = coordinates[0].z(data.operator)
    found: list[_Level] = []
    for i, sigma in enumerate(levels):
        y = np.concatenate(
            [kernel(np.tile(one, (n_copies, *[1] * (one.ndim - 1))), sigma, generator) for one in x]
        )
        columns = columns_of(features, y)
        try:
            if by_network:
                heads = _heads_of(columns, data, generator)
                work = heads.moments.delta
                said = Summary(work, _between_bins(target, data.weight, _bins_of(work)), math.nan)
            else:
                said = cross_fitted_summary(columns, target, data.weight, data.fold)
            by_bins: ClosureName = "density" if closure == "heads" else closure
            level = _density_level(sigma, said, data, lam, coordinates, by_bins, n_folds)
            found.append(
                _heads_level(sigma, heads, data, level.row, n_folds) if closure == "heads" else level
            )
        except ConvergenceError:
            if i + 1 == len(levels) and not found:
                raise  # no level joins the states
        if progress is not None:
            progress(i + 1, len(levels))
    rows = tuple(f.row for f in found)
    # A level whose noised ends overlap less than BAR asks for is not chosen.
    open_to_choice = [i for i, r in enumerate(rows) if r.overlap >= MIN_OVERLAP] or list(range(len(rows)))
    chosen = min(open_to_choice, key=lambda i: rows[i].d_delta_f)
    best, work = found[chosen].row, found[chosen].work
    d_bootstrap = _bootstrap(found[chosen], data, g, n_bootstrap, generator) if n_bootstrap else math.nan
    near = [
        r.delta_f
        for i, r in enumerate(rows)
        if abs(i - chosen) <= 1 or best.sigma / 2 <= r.sigma <= best.sigma * 2
    ]
    return BridgeResult(
        delta_f=best.delta_f,
        d_delta_f=max(best.d_delta_f, d_bootstrap) if n_bootstrap else best.d_delta_f,
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
        summary=summary,
        work_forward=work[data.state == 0],
        work_reverse=-work[data.state == len(lam) - 1],
    )
