r"""Labels only: what frames of two end states say about Delta f without one energy.

A frame's end state is a label. With enough data a classifier of noised frames y learns

.. math:: g_t(y) = \ln \frac{p_{t,0}(y)}{p_{t,1}(y)} = \Delta S_t(y) - \Delta f , \qquad
          P(0 \mid y) = \frac{1}{1 + e^{-g_t(y) - \ln(n_0/n_1)}} ,

since p = exp(-S + f) in either end. A constant of Delta S and Delta f are one and the same to it:
labels alone hold no absolute Delta f. At t = 0, where g_0 = O - Delta f, they hold two other numbers,

.. math:: \Delta f_c = -\tfrac12 (\langle g_0\rangle_0 + \langle g_0\rangle_1)
          = \Delta f - \tfrac12 (\langle O\rangle_0 + \langle O\rangle_1) , \qquad
          \langle g_0\rangle_0 - \langle g_0\rangle_1 = \langle O\rangle_0 - \langle O\rangle_1 ,

and one frame with a known O closes the gauge: Delta f = O(x) - g_0(x).

Arrays in, a result out: nothing here needs OpenMM.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from .errors import ConvergenceError, InputError
from .estimate import statistical_inefficiency

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

ROUGHNESS = (1e3, 1e2, 1e1, 1.0)
"""Prior precisions of second differences that are tried, stiffest first [1/kT^2]."""

RIDGES = (1e-1, 1e-2, 1e-3)
"""Prior precisions of slopes (of standardised columns, if the features are not splines) [1/kT^2]."""

WEAK = 1e-4
"""Prior precision of the constants that slopes leave free, relative to that of slopes [1/kT^2]."""

SIGMAS = (0.0, 0.002, 0.004, 0.006)
"""Noise levels of the curve [nm]."""

N_FOLDS = 4
"""Contiguous folds of the cross-fit."""

MIN_FRAMES = 10
"""Frames per end and fold below which there is nothing to fit."""


@dataclass(frozen=True)
class EndStateClassifier:
    """g(x), the mean of the classifiers of all folds.

    Attributes
    ----------
    features : callable or None
        As given to :func:`fit_labels`.
    centre : numpy.ndarray, shape (n_features,)
    coef : numpy.ndarray, shape (n_folds, n_features)
    intercept : numpy.ndarray, shape (n_folds,)
    """

    features: Callable[[FloatArray], Any] | None
    centre: FloatArray
    coef: FloatArray
    intercept: FloatArray

    def of_folds(self, x: Any) -> FloatArray:
        """g of every fold's classifier [n_folds, n_frames]."""
        design = _design(self.features, _frames("x", x))
        if design.shape[1] != len(self.centre):
            raise InputError(f"x: expected {len(self.centre)} features, found {design.shape[1]}.")
        return self.coef @ (design - self.centre).T + self.intercept[:, None]

    def __call__(self, x: Any) -> FloatArray:
        """g = O - Delta f up to what the classifier missed [kT], shape (n_frames,)."""
        return np.asarray(self.of_folds(x).mean(axis=0))


@dataclass(frozen=True)
class NoiseLevel:
    """Readout at one noise level.

    Attributes
    ----------
    sigma : float
        [nm].
    centered, d_centered : float
        -(<g>_0 + <g>_1)/2 and its standard error [kT].
    scale, d_scale : float
        <g>_0 - <g>_1 and its standard error [kT].
    """

    sigma: float
    centered: float
    d_centered: float
    scale: float
    d_scale: float


@dataclass(frozen=True)
class LabelReadout:
    """What :func:`fit_labels` returns. No absolute Delta f without anchors.

    Attributes
    ----------
    centered, d_centered : float
        Delta f - (<O>_0 + <O>_1)/2 and its standard error [kT].
    scale, d_scale : float
        <O>_0 - <O>_1 and its standard error [kT].
    curve : tuple of NoiseLevel
        The same at every noise level; the clean one first.
    extrapolated : tuple of float or None
        Centered Delta f and scale at sigma -> 0 from the noised levels alone [kT].
    g_0, g_1 : numpy.ndarray, shape (n_frames,)
        Cross-fitted g of every frame at sigma = 0 [kT].
    fold_centered : tuple of float
        Centered Delta f in every fold [kT].
    overlap : float
        A of the clean ends, by the classifier.
    contested : float
        Independent frames whose label is in doubt, the sum of 4 P(0) P(1).
    gain, d_gain : float
        Held-out log-likelihood per frame above that of the class sizes alone, and its error.
    calibration : float
        Slope of the labels on the held-out logit: 1 for a classifier that is right, below 1 for one
        that overfits, infinite where the logit separates the labels.
    roughness, ridge : float
        Penalties that the held-out likelihood chose.
    n_frames : tuple of int
    inefficiency : tuple of float
        Statistical inefficiency of g in either end.
    classifier : EndStateClassifier
    delta_f, d_delta_f : float or None
        Delta f and its error [kT]; only with anchors.
    anchor_values : tuple of float
        O - g_0 at every anchor [kT].
    """

    centered: float
    d_centered: float
    scale: float
    d_scale: float
    curve: tuple[NoiseLevel, ...]
    extrapolated: tuple[float, float] | None
    g_0: FloatArray = field(repr=False)
    g_1: FloatArray = field(repr=False)
    fold_centered: tuple[float, ...]
    overlap: float
    contested: float
    gain: float
    d_gain: float
    calibration: float
    roughness: float
    ridge: float
    n_frames: tuple[int, int]
    inefficiency: tuple[float, float]
    classifier: EndStateClassifier = field(repr=False)
    delta_f: float | None = None
    d_delta_f: float | None = None
    anchor_values: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; without the frames' g and the classifier."""
        kept = {
            k: getattr(self, k) for k in self.__dataclass_fields__ if k not in ("g_0", "g_1", "classifier")
        }
        return kept | {"curve": [asdict(one) for one in self.curve], "anchor_spread": self.anchor_spread}

    @property
    def anchor_spread(self) -> float | None:
        """Standard deviation of O - g_0 over the anchors [kT]; None for fewer than two."""
        return float(np.std(self.anchor_values, ddof=1)) if len(self.anchor_values) > 1 else None

    def anchored(self, x: Any, operator: Any) -> "LabelReadout":
        r"""The same with an absolute Delta f, from K frames whose O is known.

        .. math:: \Delta f = \frac1K \sum_k [O(x_k) - g_0(x_k)]

        Parameters
        ----------
        x : array_like, shape (n_anchors, ...)
            Frames as the classifier's. Those with g near 0 are known best; those far out, in either
            end, test the size of g.
        operator : array_like, shape (n_anchors,)
            O = u_1 - u_0 on them [kT].

        Returns
        -------
        LabelReadout

        Raises
        ------
        InputError
            For no anchors, values that are not finite, or lengths that differ.

        Notes
        -----
        The error adds, in squares, the spread over sqrt(K) and the delete-one-fold jackknife of the
        mean; a slope that is wrong everywhere shows in the spread, if the anchors differ in O.
        """
        x, o = _frames("anchors", x), _frames("operator", operator)
        if o.shape != (len(x),):
            raise InputError(f"operator: expected one value for each of {len(x)} anchors, found {o.shape}.")
        g = self.classifier.of_folds(x)
        values = o - g.mean(axis=0)
        shift = g.mean(axis=1) - g.mean()
        error = math.sqrt((1 - 1 / len(g)) * float((shift**2).sum()))
        if len(o) > 1:
            error = math.hypot(error, float(values.std(ddof=1)) / math.sqrt(len(o)))
        return replace(
            self, delta_f=float(values.mean()), d_delta_f=error, anchor_values=tuple(values.tolist())
        )


def _frames(name: str, value: Any) -> FloatArray:
    try:
        out = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as err:
        raise InputError(f"{name}: expected an array of real numbers, found {err}.") from err
    if out.ndim == 0 or len(out) == 0 or not np.isfinite(out).all():
        raise InputError(
            f"{name}: expected finite numbers, one row per frame, found shape {out.shape} with "
            f"{np.count_nonzero(~np.isfinite(out))} that are not finite."
        )
    return out


def _design(features: Callable[[FloatArray], Any] | None, x: FloatArray) -> FloatArray:
    out = _frames("features", x if features is None else features(x))
    if out.ndim != 2 or len(out) != len(x):
        raise InputError(f"features: expected shape ({len(x)}, n_features), found {out.shape}.")
    return out


def _maximise(
    design: FloatArray, label: FloatArray, weight: FloatArray, offset: float, prior: FloatArray, c: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Mode of the penalised likelihood by Newton steps, and its Hessian; the last column is ones."""

    def loss(at: FloatArray) -> float:
        logit = design @ at + offset
        return float(weight @ (np.logaddexp(0.0, logit) - label * logit) + 0.5 * at @ prior @ at)

    now = loss(c)
    for _ in range(100):
        p = expit(design @ c + offset)
        gradient = design.T @ (weight * (p - label)) + prior @ c
        root = np.sqrt(weight * p * (1 - p))[:, None] * design
        hessian = root.T @ root + prior
        step = np.linalg.solve(hessian, gradient)
        fall = float(gradient @ step)
        if fall < 1e-6:
            return c, hessian
        size = 1.0
        while not (new := loss(c - size * step)) <= now - 1e-4 * size * fall:
            size *= 0.5
            if size < 1e-8:
                return c, hessian  # as far as rounding goes
        c, now = c - size * step, new
    raise ConvergenceError("labels: expected the classifier's mode within 100 steps, found none.")


@dataclass(frozen=True)
class _Level:
    """Frames of both ends at one noise level; noised copies of all frames follow each other."""

    design: FloatArray  # [n_copies * n_frames, n_features + 1], centred; the last column is ones
    label: FloatArray  # [n_frames], 1 in end 0; end 1's frames come after end 0's
    fold: IntArray  # [n_frames]

    @property
    def offset(self) -> float:
        """ln(n_0/n_1)."""
        n_0 = float(self.label.sum())
        return math.log(n_0 / (len(self.label) - n_0))

    @property
    def n_copies(self) -> int:
        return len(self.design) // len(self.label)

    def rows(self, per_frame: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.tile(per_frame, self.n_copies)

    def per_frame(self, rows: FloatArray) -> FloatArray:
        """Means over the copies of every frame."""
        return np.asarray(rows.reshape(self.n_copies, len(self.label), *rows.shape[1:]).mean(axis=0))

    def fit(self, prior: FloatArray, starts: FloatArray) -> tuple[FloatArray, list[FloatArray]]:
        """Coefficients [n_folds, n_features + 1] without each fold, and the Hessians."""
        label, fold = self.rows(self.label), self.rows(self.fold)
        fits = []
        for k, start in enumerate(starts):
            some = fold != k
            weight = np.full(np.count_nonzero(some), 1 / self.n_copies)
            fits.append(_maximise(self.design[some], label[some], weight, self.offset, prior, start))
        return np.array([c for c, _ in fits]), [hessian for _, hessian in fits]

    def held_out(self, c: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Cross-fitted g, and log-likelihood above that of the class sizes alone, per frame."""
        g = np.einsum("ij,ij->i", self.design, c[self.rows(self.fold)])
        sign = 2 * self.rows(self.label) - 1
        chance = np.logaddexp(0.0, -sign * self.offset)
        return self.per_frame(g), self.per_frame(chance - np.logaddexp(0.0, -sign * (g + self.offset)))

    def influences(self, c: FloatArray, hessians: list[FloatArray]) -> FloatArray:
        """First-order effect of every frame on <g>_0 and <g>_1, [n_frames, 2], through all refits too."""
        ends = np.stack([self.label, 1 - self.label], axis=1)
        ends /= ends.sum(axis=0)
        own = self.held_out(c)[0]
        out = ends * (own[:, None] - own @ ends)
        features = self.per_frame(self.design)
        for k, hessian in enumerate(hessians):
            held = self.fold == k
            pull = np.linalg.solve(hessian, features[held].T @ ends[held])
            residual = self.rows(self.label) - expit(self.design @ c[k] + self.offset)
            out += ~held[:, None] * self.per_frame(residual[:, None] * (self.design @ pull))
        for end in (self.label == 1, self.label == 0):  # the numbers of frames per end are given, not drawn
            out[end] -= out[end].mean(axis=0)
        return np.asarray(out)


def _blocks(n: tuple[int, int], inefficiency: tuple[float, float]) -> IntArray:
    """Block of every frame: contiguous, of two inefficiencies, at least ten in each end."""
    first, second = (
        np.arange(k) // min(math.ceil(2 * g), k // 10) for k, g in zip(n, inefficiency, strict=True)
    )
    return np.concatenate([first, second + first[-1] + 1])


def _block_error(influence: FloatArray, blocks: IntArray) -> float:
    """Standard error of a sum of influences: what a bootstrap of the blocks converges to."""
    return float(np.sqrt((np.bincount(blocks, influence) ** 2).sum()))


def _readout(
    sigma: float, level: _Level, c: FloatArray, hessians: list[FloatArray], blocks: IntArray
) -> NoiseLevel:
    g, influence = level.held_out(c)[0], level.influences(c, hessians)
    means = np.array([g[level.label == 1].mean(), g[level.label == 0].mean()])
    found = []
    for weights in ([-0.5, -0.5], [1.0, -1.0]):
        found += [float(means @ weights), _block_error(influence @ weights, blocks)]
    return NoiseLevel(sigma, *found)


def _calibration(g: FloatArray, level: _Level) -> float:
    """Slope of the labels on the held-out logit; infinite where it separates them."""
    zero = level.label == 1
    if g[zero].min() > g[~zero].max():
        return math.inf
    width = float(g.std())
    if width == 0:
        return math.nan
    line = np.stack([g / width, np.ones(len(g))], axis=1)
    c, _ = _maximise(line, level.label, np.ones(len(g)), level.offset, 1e-9 * np.eye(2), np.zeros(2))
    return float(c[0] / width)


def _extrapolated(curve: Sequence[NoiseLevel]) -> tuple[float, float] | None:
    """Centered Delta f and scale at sigma -> 0: a parabola in sigma^2 through the noised levels."""
    noised = [one for one in curve if one.sigma > 0]
    if len(noised) < 2:
        return None
    square = np.array([one.sigma for one in noised]) ** 2
    square /= square.max()
    powers = np.vander(square, min(len(noised), 3), increasing=True)
    values = np.array([[one.centered, one.scale] for one in noised])
    centered, scale = np.linalg.lstsq(powers, values, rcond=None)[0][0]
    return float(centered), float(scale)


def _checked_sigmas(features: Any, sigmas: Sequence[float] | None) -> list[float]:
    if sigmas is None:
        return [0.0] if features is None else list(SIGMAS)
    try:
        found = [float(s) for s in sigmas]
    except (TypeError, ValueError) as err:
        raise InputError(f"sigmas: expected numbers [nm], found {sigmas!r}.") from err
    if not found or found[0] != 0 or not (np.diff(found) > 0).all() or not math.isfinite(found[-1]):
        raise InputError(f"sigmas: expected noise levels that increase from 0 [nm], found {found}.")
    if features is None and len(found) > 1:
        raise InputError(
            "sigmas: expected (0,) without features (x_0 and x_1 are features then, and noise belongs on "
            f"coordinates), found {found}; pass features as a function of the frames."
        )
    return found


def _checked_frames(x_0: Any, x_1: Any, n_folds: int) -> tuple[FloatArray, FloatArray]:
    found = _frames("x_0", x_0), _frames("x_1", x_1)
    if found[0].shape[1:] != found[1].shape[1:]:
        raise InputError(
            f"x_0, x_1: expected frames of one shape, found {found[0].shape[1:]} and {found[1].shape[1:]}."
        )
    if isinstance(n_folds, bool) or not isinstance(n_folds, int | np.integer) or n_folds < 2:
        raise InputError(f"n_folds: expected an integer of at least 2, found {n_folds!r}.")
    for end, x in enumerate(found):
        if len(x) < MIN_FRAMES * n_folds:
            raise InputError(
                f"x_{end}: expected at least {MIN_FRAMES * n_folds} frames ({MIN_FRAMES} in each fold), "
                f"found {len(x)}; sample longer."
            )
    return found


def _noise_mask(noise_atoms: Sequence[int] | None, x: FloatArray) -> FloatArray:
    if noise_atoms is None:
        return np.ones(x.shape[1:])
    atoms = [int(a) for a in noise_atoms]
    if x.ndim != 3 or not atoms or len(set(atoms)) != len(atoms) or not set(atoms) <= set(range(x.shape[1])):
        raise InputError(
            f"noise_atoms: expected different atoms of frames (n_frames, n_atoms, 3), found {atoms} for "
            f"frames of shape {x.shape}."
        )
    mask = np.zeros(x.shape[1:])
    mask[atoms] = 1.0
    return mask


def _choose(features: Any, level: _Level) -> tuple[float, float, FloatArray, FloatArray]:
    """Roughness, ridge, prior precision and coefficients of the largest held-out likelihood."""
    n = level.design.shape[1] - 1
    given = [getattr(features, name, None) for name in ("roughness", "ridge")]
    for name, matrix in zip(("roughness", "ridge"), given, strict=True):
        if matrix is not None and np.shape(matrix) != (n, n):
            raise InputError(f"features.{name}: expected shape {(n, n)}, found {np.shape(matrix)}.")
    rough, flat = given
    if flat is None:
        flat = np.diag(level.design[:, :-1].var(axis=0))
    weak = WEAK * np.diag(np.diag(flat)) + np.finfo(float).eps * np.eye(n)
    tried: list[tuple[float, float, float, FloatArray, FloatArray]] = []
    for rho in RIDGES:
        c = np.zeros((int(level.fold.max()) + 1, n + 1))
        for mu in (0.0,) if rough is None else ROUGHNESS:
            prior = np.zeros((n + 1, n + 1))
            prior[:n, :n] = rho * flat + weak + (0.0 if rough is None else mu * rough)
            c = level.fit(prior, c)[0]
            tried.append((float(level.held_out(c)[1].mean()), mu, rho, prior, c))
    return max(tried, key=lambda one: one[0])[1:]


def fit_labels(
    x_0: Any,
    x_1: Any,
    features: Callable[[FloatArray], Any] | None = None,
    *,
    generator: np.random.Generator,
    sigmas: Sequence[float] | None = None,
    noise_atoms: Sequence[int] | None = None,
    n_folds: int = N_FOLDS,
) -> LabelReadout:
    r"""Centered Delta f and the scale of the operator from frames of two end states, without energies.

    A penalised logistic regression of the labels at every noise level,

    .. math:: g(y) = \phi(y) \cdot c + c_0 , \qquad
              \max_c \sum_i \ln P(\mathrm{end}_i \mid y_i) - \tfrac{\mu}{2}\, c \cdot R c
              - \tfrac{\rho}{2}\, c \cdot Q c , \qquad
              \ln\frac{P(0\mid y)}{P(1\mid y)} = g(y) + \ln\frac{n_0}{n_1} ,

    cross-fitted: every frame's g comes from the fit without its fold. At t = 0

    .. math:: \Delta f_c = -\tfrac12 (\langle g_0\rangle_0 + \langle g_0\rangle_1), \qquad
              \langle g_0\rangle_0 - \langle g_0\rangle_1 = \langle O\rangle_0 - \langle O\rangle_1 \ge 0 .

    At t > 0 the same averages give the smaller moments of Delta S_t: they are the curve, whose way
    to sigma -> 0 judges the clean numbers and does not replace them.

    =============  =================================================
    symbol         code
    =============  =================================================
    phi            ``features``
    R, mu          ``features.roughness``, ``LabelReadout.roughness``
    Q, rho         ``features.ridge``, ``LabelReadout.ridge``
    g_0            ``LabelReadout.g_0`` and ``g_1``, on either end's frames
    Delta f_c      ``LabelReadout.centered``
    =============  =================================================

    Parameters
    ----------
    x_0, x_1 : array_like, shape (n_frames, ...)
        Frames of end state 0 and 1 in time order [nm], or their features (n_frames, n_features) if
        ``features`` is not given. The numbers of frames may differ.
    features : callable, optional
        Frames -> (n_frames, n_features), such as a
        :class:`~openmm_diffforce.pair_features.PairSplines`. Its attributes ``roughness`` and
        ``ridge``, matrices (n_features, n_features), are used if it has them; otherwise there is no
        roughness, and the ridge acts on standardised columns.
    generator : numpy.random.Generator
        Draws the noise.
    sigmas : sequence of float, optional
        Noise levels from 0 [nm]; ``SIGMAS`` by default, or the clean level alone without ``features``.
    noise_atoms : sequence of int, optional
        Atoms that are noised; all by default.
    n_folds : int
        Contiguous folds.

    Returns
    -------
    LabelReadout
        To be judged by :func:`openmm_diffforce.audit.audit_labels`.

    Raises
    ------
    InputError
        For frames that are not finite, of different molecules or too few, noise levels that do not
        increase from 0, noise without ``features``, or features of another shape.
    ConvergenceError
        If a fit finds no mode.

    Notes
    -----
    mu and rho maximise the held-out likelihood at sigma = 0 and serve all levels. Standard errors are
    those of a block bootstrap to first order: the influence of every frame on the readout, through
    the averages and through all refits, summed over contiguous blocks of two statistical
    inefficiencies. They do not hold the bias of the penalties. Assumed and NOT checked: equilibrium
    in both ends, whole molecules, an operator that the features can represent. Where ends do not
    overlap, the labels fix the direction of g and not its size (the gates say so). Deterministic for
    a given state of ``generator``.

    References
    ----------
    M. R. Shirts, E. Bair, G. Hooker and V. S. Pande, Equilibrium free energies from nonequilibrium
    measurements using maximum-likelihood methods, 2003, doi:10.1103/PhysRevLett.91.140601.
    Action-operator semantics and the noisy operator bridge, arXiv:2606.30687.

    Examples
    --------
    O = 2 x + 2 for a unit Gaussian that moves to -2: Delta f = 0, <O>_0 = 2, <O>_1 = -2.

    >>> rng = np.random.default_rng(0)
    >>> found = fit_labels(rng.normal(0, 1, (2000, 1)), rng.normal(-2, 1, (1000, 1)), generator=rng)
    >>> abs(found.centered) < 3 * found.d_centered < 0.5, abs(found.scale - 4) < 3 * found.d_scale < 1
    (True, True)
    >>> found.delta_f is None
    True
    """
    ends = _checked_frames(x_0, x_1, n_folds)
    levels = _checked_sigmas(features, sigmas)
    if not isinstance(generator, np.random.Generator):
        raise InputError(f"generator: expected numpy.random.Generator, found {type(generator).__name__}.")
    x, n = np.concatenate(ends), (len(ends[0]), len(ends[1]))
    mask = _noise_mask(noise_atoms, x)
    label = np.repeat([1.0, 0.0], n)
    fold = np.concatenate([np.arange(k) * n_folds // k for k in n])
    design = _design(features, x)
    centre = design.mean(axis=0)

    def level(rows: FloatArray) -> _Level:
        return _Level(np.column_stack([rows - centre, np.ones(len(rows))]), label, fold)

    clean = level(design)
    mu, rho, prior, start = _choose(features, clean)
    coef, hessians = clean.fit(prior, start)
    g, gain = clean.held_out(coef)
    g_0, g_1 = g[: n[0]], g[n[0] :]
    inefficiency = statistical_inefficiency(g_0), statistical_inefficiency(g_1)
    blocks = _blocks(n, inefficiency)
    curve = [_readout(0.0, clean, coef, hessians, blocks)]
    for sigma in levels[1:]:
        noise = sigma * mask * generator.standard_normal(x.shape)
        noised = level(np.concatenate([_design(features, x + noise), _design(features, x - noise)]))
        curve.append(_readout(sigma, noised, *noised.fit(prior, start), blocks))
    doubt = 4 * expit(g + clean.offset) * expit(-g - clean.offset)
    return LabelReadout(
        centered=curve[0].centered,
        d_centered=curve[0].d_centered,
        scale=curve[0].scale,
        d_scale=curve[0].d_scale,
        curve=tuple(curve),
        extrapolated=_extrapolated(curve),
        g_0=g_0,
        g_1=g_1,
        fold_centered=tuple(
            float(-0.5 * (g_0[fold[: n[0]] == k].mean() + g_1[fold[n[0] :] == k].mean()))
            for k in range(n_folds)
        ),
        overlap=float(expit(-g_0).mean() + expit(g_1).mean()),
        contested=float(doubt[: n[0]].sum() / inefficiency[0] + doubt[n[0] :].sum() / inefficiency[1]),
        gain=float(gain.mean()),
        d_gain=_block_error((gain - gain.mean()) / len(gain), blocks),
        calibration=_calibration(g, clean),
        roughness=mu,
        ridge=rho,
        n_frames=n,
        inefficiency=inefficiency,
        classifier=EndStateClassifier(features, centre, coef[:, :-1], coef[:, -1]),
    )
