"""How well a score tells near-native poses from others; lower scores are better throughout."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata, wilcoxon

from ..errors import InputError
from .complex import FloatArray

TOP = 0.05
"""Share of the decoys in which enrichment is counted."""


def _two(score: Any, other: Any, name: str) -> tuple[FloatArray, Any]:
    s, o = np.asarray(score, dtype=np.float64), np.asarray(other)
    if s.ndim != 1 or s.shape != o.shape or not len(s) or not np.isfinite(s).all():
        raise InputError(
            f"{name}: expected finite scores and as many values beside them, found shapes {s.shape} and "
            f"{o.shape} with {np.count_nonzero(~np.isfinite(s))} scores that are not finite."
        )
    return s, o


def area_under_curve(score: Any, near: Any) -> float:
    """Probability that a near-native pose has a lower score than another (ties count half).

    Raises
    ------
    InputError
        If a score is not finite, or all poses or none are near-native.

    Examples
    --------
    >>> area_under_curve([1.0, 2.0, 3.0], [True, False, False])
    1.0
    """
    s, hit = _two(score, near, "area under the curve")
    hit = hit.astype(bool)
    n, m = int(hit.sum()), int((~hit).sum())
    if not (n and m):
        raise InputError(
            f"area under the curve: expected poses of both kinds, found {n} near-native of {n + m}."
        )
    ranks = rankdata(s)
    return float(1 - (ranks[hit].sum() - n * (n + 1) / 2) / (n * m))


def rank_correlation(score: Any, rmsd: Any) -> float:
    """Spearman's correlation of score and RMSD; a funnel has a positive one. A constant score gives 0.

    Examples
    --------
    >>> rank_correlation([1.0, 2.0, 5.0], [0.1, 0.2, 0.3])
    1.0
    """
    s, r = _two(score, rmsd, "rank correlation")
    a, b = (rankdata(v) - (len(s) + 1) / 2 for v in (s, r))
    size = np.sqrt((a @ a) * (b @ b))
    return round(float(a @ b / size), 12) if size > 0 else 0.0


def enrichment(score: Any, near: Any, share: float = TOP) -> float:
    """Near-native poses among the best ``share``, divided by what chance gives.

    Examples
    --------
    >>> enrichment(range(20), [True, *[False] * 19])
    20.0
    """
    s, hit = _two(score, near, "enrichment")
    n = max(1, round(share * len(s)))
    chance = hit.astype(float).mean()
    if not chance:
        raise InputError("enrichment: expected near-native poses, found none.")
    surely, tied, wanted = _best(s, n)
    return float((hit[surely].sum() + wanted * hit[tied].mean()) / n / chance)


def any_near(score: Any, near: Any, n: int) -> float:
    """Whether one of the best n poses is near-native; with ties at the n-th place, how likely.

    Examples
    --------
    >>> any_near([1.0, 2.0, 3.0], [False, True, False], 2), any_near([0.0, 0.0], [True, False], 1)
    (1.0, 0.5)
    """
    s, hit = _two(score, near, "best poses")
    surely, tied, wanted = _best(s, n)
    if hit[surely].any():
        return 1.0
    # None of those wanted among the tied: all come from the others.
    return 1.0 - math.comb(int((~hit[tied]).sum()), wanted) / math.comb(int(tied.sum()), wanted)


def _best(s: FloatArray, n: int) -> tuple[Any, Any, int]:
    """Poses below the n-th lowest score, poses at it, and how many of the latter belong to the best n."""
    last = np.sort(s)[min(n, len(s)) - 1]
    surely, tied = s < last, s == last
    return surely, tied, min(n, len(s)) - int(surely.sum())


@dataclass(frozen=True)
class Comparison:
    """Paired comparison of a score with another over complexes.

    Attributes
    ----------
    measure : str
    other : str
    mean_difference : float
        Positive if the score is better.
    standard_error : float
        Over complexes.
    wins, n : int
        Complexes on which it is better, of how many.
    p_value : float
        Wilcoxon's signed-rank test, one-sided: probability of such ranks if neither is better. Exact
        without ties.
    """

    measure: str
    other: str
    mean_difference: float
    standard_error: float
    wins: int
    n: int
    p_value: float


def compare_paired(values: Mapping[str, FloatArray], score: str, other: str, *, measure: str) -> Comparison:
    """Is ``score`` better than ``other``? Values are means over decoy sets, one per complex.

    Raises
    ------
    InputError
        If a name is missing, or there are fewer than two complexes.
    """
    for name in (score, other):
        if name not in values:
            raise InputError(f"comparison: expected one of {', '.join(values)}, found {name!r}.")
    d = np.asarray(values[score], dtype=np.float64) - np.asarray(values[other], dtype=np.float64)
    if d.ndim != 1 or len(d) < 2:
        raise InputError(f"comparison: expected at least two complexes, found shape {d.shape}.")
    p = 1.0 if not d.any() else float(wilcoxon(d, alternative="greater", method="auto").pvalue)
    return Comparison(
        measure, other, float(d.mean()), float(d.std(ddof=1) / np.sqrt(len(d))), int((d > 0).sum()), len(d), p
    )  # fmt: skip
