r"""Scores side by side, on the same poses, in frames that give nothing away.

A score is a callable ``(complex, poses) -> numbers [n_poses]``, lower is better. Before any of them sees
poses, receptor and ligand are turned and shifted at random (:func:`~.decoys.reposed`), once for all scores.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError, ModelError
from .complex import Complex, FloatArray
from .decoys import Decoys, reposed
from .metrics import pose_metrics
from .poses import Poses
from .residue_model import HEAD_SIGMAS, ResidueModel
from .rigid_energy import pose_flow_energy, pose_path_energy
from .statistics import (
    Comparison,
    any_near,
    area_under_curve,
    compare_paired,
    enrichment,
    rank_correlation,
)

Score = Callable[[Complex, Poses], Any]
"""Complex and poses -> one number for each pose; lower is better."""

MEASURES = ("auc", "spearman", "enrichment", "top", "top_ten")
"""Area under the curve; rank correlation with ligand RMSD; enrichment in the best 5 %; whether the best
decoy is near-native; whether one of the best ten is. Ties are shared."""


@dataclass(frozen=True)
class ScoredDecoys:
    """One set of decoys of one complex, with every score.

    Attributes
    ----------
    name : str
        Of the complex.
    decoys : Decoys
    dockq : numpy.ndarray, shape (n_decoys,)
    scores : dict
        Name -> numpy.ndarray of shape (n_decoys,).
    """

    name: str
    decoys: Decoys
    dockq: FloatArray
    scores: dict[str, FloatArray]


def energy_head(model: ResidueModel, sigmas: Sequence[float] = HEAD_SIGMAS) -> Score:
    """The model's energy S [kT], mean over translation noises ``sigmas`` [nm], as a score."""
    if not len(sigmas):
        raise InputError("energy head: expected at least one noise level, found none.")

    def score(complex_: Complex, poses: Poses) -> FloatArray:
        found = [model.evaluate(complex_, poses, s, gradient=False)[0] for s in sigmas]
        return np.mean(found, axis=0)

    return score


def flow_energy(model: ResidueModel, *, n_steps: int = 6) -> Score:
    """-ln p_0 [kT] along the probability flow, up to a constant.

    Where the score is steep, six steps leave a few kT: -ln p_0 of a single pose is to be checked with more.
    The flow ends at the model's last noise level, whose energy S is -ln p_1 there: the native pose is
    not asked for. p_0 is the density blurred by the model's first level.
    """

    def score(complex_: Complex, poses: Poses) -> FloatArray:
        bound = model.bound_to(complex_)
        found = pose_flow_energy(
            bound, poses, schedule=model.schedule, n_steps=n_steps, divergence=bound.divergence,
            prior=lambda p: -model.evaluate(complex_, p, model.sigmas[-1], gradient=False)[0],
        )  # fmt: skip
        return -found.ln_p0

    return score


def path_energy(model: ResidueModel, *, n_steps: int = 4) -> Score:
    """The same along a standing path (y_t = y_0), which needs no steps of the flow."""

    def score(complex_: Complex, poses: Poses) -> FloatArray:
        bound = model.bound_to(complex_)
        found = pose_path_energy(
            bound, poses, schedule=model.schedule, path="standing", n_steps=n_steps,
            divergence=bound.divergence,
            prior=lambda p: -model.evaluate(complex_, p, model.sigmas[-1], gradient=False)[0],
        )  # fmt: skip
        return -found.ln_p0

    return score


def chance(seed: int) -> Score:
    """Random numbers, others for other poses: what any score must beat."""

    def score(complex_: Complex, poses: Poses) -> FloatArray:
        entropy = (seed, zlib.crc32(poses.translation.tobytes()))
        return np.random.default_rng(entropy).uniform(size=len(poses))

    return score


def score_poses(
    complex_: Complex, poses: Poses, scores: Mapping[str, Score], *, seed: int
) -> dict[str, FloatArray]:
    """Every score of the same poses, in frames turned and shifted at random.

    Raises
    ------
    InputError
        If there are no scores or no poses.
    ModelError
        If a score gives another number of values, or one that is not finite.
    """
    if not scores or not len(poses):
        raise InputError(f"scoring: expected scores and poses, found {len(scores)} and {len(poses)}.")
    hidden, same = reposed(complex_, poses, np.random.default_rng((seed, *complex_.name.encode())))
    out = {}
    for name, score in scores.items():
        value = np.asarray(score(hidden, same), dtype=np.float64)
        if value.shape != (len(poses),) or not np.isfinite(value).all():
            raise ModelError(
                f"score {name}: expected {len(poses)} finite numbers, found shape {value.shape} with "
                f"{np.count_nonzero(~np.isfinite(value))} that are not finite."
            )
        out[name] = value
    return out


def score_decoys(
    complex_: Complex, decoys: Decoys, scores: Mapping[str, Score], *, seed: int
) -> ScoredDecoys:
    """:func:`score_poses` of decoys, with their DockQ."""
    values = score_poses(complex_, decoys.poses, scores, seed=seed)
    return ScoredDecoys(complex_.name, decoys, pose_metrics(complex_, decoys.poses).dockq, values)


def measures_of(score: Any, rmsd: Any, near: Any) -> dict[str, float]:
    """The :data:`MEASURES` of one score on one set of decoys."""
    return {
        "auc": area_under_curve(score, near),
        "spearman": rank_correlation(score, rmsd),
        "enrichment": enrichment(score, near),
        "top": any_near(score, near, 1),
        "top_ten": any_near(score, near, 10),
    }


@dataclass(frozen=True)
class Summary:
    """What :func:`summarise` returns.

    Attributes
    ----------
    complexes : tuple of str
    values : dict
        Measure -> score -> numpy.ndarray of shape (n_complexes,), means over the decoy sets.
    seed_errors : dict
        Measure -> score -> standard error of the mean over complexes that comes from the draw of decoys.
    n_sets : int
        Decoy sets of every complex.
    """

    complexes: tuple[str, ...]
    values: dict[str, dict[str, FloatArray]]
    seed_errors: dict[str, dict[str, float]]
    n_sets: int

    def compare(self, score: str, other: str, measure: str = "auc") -> Comparison:
        """Paired over complexes; see :func:`~.statistics.compare_paired`."""
        if measure not in self.values:
            raise InputError(f"measure: expected one of {', '.join(MEASURES)}, found {measure!r}.")
        return compare_paired(self.values[measure], score, other, measure=measure)

    def mean(self, score: str, measure: str) -> tuple[float, float]:
        """Mean over complexes, and its standard error over complexes."""
        v = self.values[measure][score]
        return float(v.mean()), float(v.std(ddof=1) / np.sqrt(len(v))) if len(v) > 1 else 0.0


def summarise(scored: Sequence[ScoredDecoys]) -> Summary:
    """Measures of every score, complex by complex.

    Raises
    ------
    InputError
        If there is nothing, a complex has fewer sets than another, or scores differ between sets.
    """
    if not scored:
        raise InputError("summary: expected scored decoys, found none.")
    names = tuple(dict.fromkeys(s.name for s in scored))
    scores = tuple(scored[0].scores)
    counts = {n: sum(s.name == n for s in scored) for n in names}
    if len(set(counts.values())) > 1 or any(tuple(s.scores) != scores for s in scored):
        raise InputError(
            f"summary: expected the same scores and as many decoy sets for every complex, found sets "
            f"{counts} and scores {sorted({tuple(s.scores) for s in scored})}."
        )
    n_sets = next(iter(counts.values()))
    found = {
        (s.name, k): {
            score: measures_of(value, s.decoys.rmsd, s.decoys.near) for score, value in s.scores.items()
        }
        for s, k in zip(scored, _running(scored), strict=True)
    }
    values: dict[str, dict[str, FloatArray]] = {m: {} for m in MEASURES}
    errors: dict[str, dict[str, float]] = {m: {} for m in MEASURES}
    for m in MEASURES:
        for score in scores:
            grid = np.array([[found[n, k][score][m] for k in range(n_sets)] for n in names])
            values[m][score] = grid.mean(axis=1)
            over_sets = grid.mean(axis=0)
            errors[m][score] = float(over_sets.std(ddof=1) / np.sqrt(n_sets)) if n_sets > 1 else 0.0
    return Summary(names, values, errors, n_sets)


def _running(scored: Sequence[ScoredDecoys]) -> list[int]:
    """Number of each set within its complex."""
    seen: dict[str, int] = {}
    out = []
    for s in scored:
        out.append(seen.get(s.name, 0))
        seen[s.name] = out[-1] + 1
    return out
