r"""One number for a noised frame: what it says about the operator.

Any function of a noised frame y is a Markov kernel as good as y itself for Delta f; what it loses is
information. The summary m(y) is the best linear prediction of a coordinate z(O) of the operator from
cubic B-splines of invariant columns (pair distances of a molecule, coordinates of a toy),

.. math:: m(y) = c \cdot b(y), \qquad \min_c \sum_n w_n (z(O_n) - c \cdot b(y_n))^2 + \mu |c|^2 ,

fitted for every fold of frames on the others, so that no frame is summarised by what was fitted to it.
Arrays in, arrays out: nothing here needs OpenMM or torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.interpolate import BSpline

from .errors import InputError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

N_SPLINES = 6
"""B-splines of every column."""

EDGE = 0.002
"""Quantile of a column beyond which its splines are flat."""

PENALTIES = tuple(10.0 ** np.arange(-7.0, 1.0))
"""Ridge penalties, per frame and in units of a standardised feature; the folds choose."""

MAX_PAIRS = 100
"""Pair distances taken by default: those that come closest."""


@dataclass(frozen=True)
class PairDistances:
    """Distances between the noised atoms and all atoms: the default columns of a molecule.

    Attributes
    ----------
    pairs : numpy.ndarray, shape (n_pairs, 2)

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(5, 3, 3))
    >>> PairDistances.of([x], atoms=[0])(x).shape
    (5, 2)
    """

    pairs: IntArray

    @classmethod
    def of(
        cls, frames: Sequence[FloatArray], atoms: Sequence[int], *, max_pairs: int = MAX_PAIRS
    ) -> "PairDistances":
        """The ``max_pairs`` pairs of ``atoms`` with any atom that come closest in ``frames``."""
        n_atoms = frames[0].shape[1]
        inside = set(atoms)
        pairs, closest = [], []
        for a in atoms:  # one atom at a time: memory stays that of the frames
            others = [b for b in range(n_atoms) if b != a and not (b in inside and b < a)]
            row = np.array([(a, b) for b in others], dtype=np.int64).reshape(-1, 2)
            pairs.append(row)
            closest.append(np.min([cls(row)(x).min(axis=0) for x in frames], axis=0))
        every, near = np.concatenate(pairs), np.concatenate(closest)
        if len(every) == 0:
            raise InputError("atoms: expected a frame of at least two atoms for pair distances.")
        return cls(every[np.sort(np.argsort(near, kind="stable")[:max_pairs])])

    def __call__(self, x: FloatArray) -> FloatArray:
        """Distances [nm], shape (n_frames, n_pairs)."""
        return np.linalg.norm(x[:, self.pairs[:, 0]] - x[:, self.pairs[:, 1]], axis=-1)


def fold_of(n_frames: int, n_folds: int) -> IntArray:
    """Fold of every frame of a time series: two contiguous blocks per fold, interleaved.

    Examples
    --------
    >>> fold_of(8, 2).tolist()
    [0, 0, 1, 1, 0, 0, 1, 1]
    """
    return np.asarray((np.arange(n_frames) * 2 * n_folds // n_frames) % n_folds, dtype=np.int64)


def _splines(columns: FloatArray) -> FloatArray:
    """Cubic B-splines of every column, flat beyond its edges; a column that is constant says nothing."""
    parts = []
    for v in columns.T:
        low, high = np.quantile(v, [EDGE, 1.0 - EDGE])
        if high - low <= 1e-12 * max(1.0, abs(low), abs(high)):
            continue
        spacing = (high - low) / (N_SPLINES - 3)
        knots = low + spacing * (np.arange(N_SPLINES + 4) - 3)
        inside = np.clip(v, knots[3], np.nextafter(knots[N_SPLINES], -np.inf))
        # They sum to one: the first is left out.
        parts.append(BSpline.design_matrix(inside, knots, 3).toarray()[:, 1:])
    return np.concatenate(parts, axis=1) if parts else np.zeros((len(columns), 0))


@dataclass(frozen=True)
class Summary:
    """What :func:`cross_fitted_summary` returns.

    Attributes
    ----------
    m : numpy.ndarray, shape (n_frames,)
        Prediction of the target for every frame, by the model that did not see it.
    r_squared : float
        Share of the target's variance that they explain.
    penalty : float
    """

    m: FloatArray
    r_squared: float
    penalty: float


def cross_fitted_summary(
    columns: FloatArray, target: FloatArray, weight: FloatArray, fold: IntArray
) -> Summary:
    """Ridge prediction of ``target`` for every frame from the frames of the other folds.

    Parameters
    ----------
    columns : numpy.ndarray, shape (n_frames, n_columns)
    target : numpy.ndarray, shape (n_frames,)
    weight : numpy.ndarray, shape (n_frames,)
    fold : numpy.ndarray of int, shape (n_frames,)
        Copies of one frame share a fold.

    Returns
    -------
    Summary
        The penalty is the one with the smallest error on all held-out frames.
    """
    features = _splines(columns)
    mean = np.average(target, weights=weight)
    total = float((weight * (target - mean) ** 2).sum())
    if features.shape[1] == 0 or total <= 0.0:
        return Summary(np.full(len(target), mean), 0.0, PENALTIES[-1])
    features = features - features.mean(axis=0)
    features /= features.std(axis=0).clip(min=1e-9)
    features = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    folds = np.unique(fold)
    grams, moments = [], []
    for k in folds:
        one = features[fold == k] * weight[fold == k, None]
        grams.append(one.T @ features[fold == k])
        moments.append(one.T @ (target[fold == k] - mean))
    gram, moment = sum(grams), sum(moments)
    predicted = np.empty((len(PENALTIES), len(target)))
    for k, own_gram, own_moment in zip(folds, grams, moments, strict=True):
        values, vectors = np.linalg.eigh(gram - own_gram)
        turned = vectors.T @ (moment - own_moment)
        scale = weight[fold != k].sum()
        at = features[fold == k] @ vectors
        for i, penalty in enumerate(PENALTIES):
            predicted[i, fold == k] = at @ (turned / (values.clip(min=0.0) + penalty * scale)) + mean
    error = (weight * (predicted - target) ** 2).sum(axis=1)
    best = int(error.argmin())
    return Summary(predicted[best], 1.0 - float(error[best]) / total, PENALTIES[best])


def columns_of(features: Callable[[Any], Any], y: FloatArray) -> FloatArray:
    """``features(y)``, checked.

    Raises
    ------
    InputError
        If it is not a finite array of shape (n_frames, n_columns).
    """
    found = np.asarray(features(y), dtype=np.float64)
    if found.ndim != 2 or len(found) != len(y) or not np.isfinite(found).all():
        raise InputError(
            f"features: expected finite values of shape ({len(y)}, n_columns), found shape {found.shape} "
            f"with {np.count_nonzero(~np.isfinite(found))} that are not finite."
        )
    return found
