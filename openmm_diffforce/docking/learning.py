r"""Fit of the residue model to native complexes: denoising score matching in closed form.

Every training complex is noised rigidly, and the energy's slopes are regressed on the score of the noise:

.. math:: L(c) = \frac12 \Big\langle \sigma_{tr}^2 |s_{tr} - s^*_{tr}|^2
          + \sigma_{rot}^2 |s_{rot} - s^*_{rot}|^2 \Big\rangle / 6
          + \frac{w}{M} \sum_m \mathrm{KL}(q_m \| \pi_m) + \frac{\lambda}{2} |c|^2

at each noise level by itself. The first term is quadratic in the coefficients c, so that w = 0 is one
linear system. With w > 0 decoys are looked at too: q_m is the noise kernel about the native pose of complex
m, on its decoys, normalised over them, and pi_m is exp(-S) normalised in the same way. The score of the
noise says how to get back from near the native pose; decoys say what lies elsewhere. Convex, by Newton.

A network residual (:mod:`~.residual`) is linear in its output layer: its units are more columns of the same
problem, and its coefficients are found together with those of the pair splines.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ..errors import ConvergenceError, InputError
from . import so3
from .complex import Complex, FloatArray
from .decoys import Decoys, make_decoys
from .poses import Poses
from .potentials import statistical_contacts
from .residual import HiddenLayer, Residual, network_features
from .residue_model import (
    HEAD_SIGMAS,
    N_COEFS,
    TERMS,
    ResidueModel,
    pair_potential_features,
    side_chain_lengths,
    site_points,
    tables_from_coefs,
)
from .rigid import RigidSchedule, noise_poses
from .statistics import any_near, area_under_curve, rank_correlation

Progress = Callable[[str, int, int], None]
"""Called with what is done, how far, of how much."""


@dataclass(frozen=True)
class DockingFit:
    """Settings of a fit.

    Attributes
    ----------
    sigmas : tuple of float
        Translation noise of the levels [nm], increasing.
    radius : float
        Rotation noise is sigma / radius [nm per rad]: about the radius of gyration of a ligand.
    n_noised : int
        Noised poses of every complex at every level.
    ridge : float
        lambda; every coefficient is measured by the spread of its feature over decoys and the weight
        of its term.
    decoy_weight : float
        w; 0 is score matching alone, in closed form.
    n_sets, n_decoys : int
        Sets of decoys of every complex, and decoys of a set.
    network : int
        Units of the network residual; 0 is the closed form alone.
    network_weight : float
        Weight of the network in the prior, as that of a term.
    """

    sigmas: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8)
    radius: float = 1.5
    n_noised: int = 200
    ridge: float = 0.003
    decoy_weight: float = 0.3
    n_sets: int = 3
    n_decoys: int = 200
    network: int = 0
    network_weight: float = 1.0

    def __post_init__(self) -> None:
        s = self.sigmas
        if not s or not all(np.isfinite(s)) or s[0] <= 0 or any(b <= a for a, b in pairwise(s)):
            raise InputError(f"sigmas: expected increasing widths > 0 [nm], found {s}.")
        limits = (("radius", 1e-6), ("ridge", 1e-12), ("decoy_weight", 0.0), ("network_weight", 1e-6))
        for name, least in limits:
            value = getattr(self, name)
            if not (isinstance(value, int | float) and np.isfinite(value) and value >= least):
                raise InputError(f"{name}: expected a finite number >= {least:g}, found {value!r}.")
        for name, fewest in (("n_noised", 1), ("n_sets", 1), ("n_decoys", 1), ("network", 0)):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= fewest):
                raise InputError(f"{name}: expected a whole number >= {fewest}, found {value!r}.")

    def schedule(self) -> RigidSchedule:
        """From the first level to the last, geometric."""
        low, high = self.sigmas[0], max(self.sigmas[-1], 1.0001 * self.sigmas[0])
        return RigidSchedule(
            high, high / self.radius, low, low / self.radius, "geometric", "geometric"
        )  # fmt: skip


@dataclass(frozen=True)
class _Level:
    """Normal equations of one complex at one noise level, and its decoys' target."""

    normal: FloatArray
    right: FloatArray
    square: float
    target: FloatArray  # q over all decoys of the complex


@dataclass(frozen=True)
class DockingData:
    """What a fit needs of its training complexes; made once, used by every fold.

    Attributes
    ----------
    names : tuple of str
    lengths, contact : numpy.ndarray
        Side-chain lengths [nm]; statistical contact energies [kT].
    features : tuple of numpy.ndarray, each (n_sets * n_decoys, n_coefs)
        Of the decoys of each complex.
    decoys : tuple of tuple of Decoys
    levels : tuple of tuple of _Level
        Of each complex, of each noise level.
    hidden : HiddenLayer, optional
        Of the network residual; its units are the last columns of the features.
    """

    names: tuple[str, ...]
    lengths: FloatArray
    contact: FloatArray
    features: tuple[FloatArray, ...]
    decoys: tuple[tuple[Decoys, ...], ...]
    levels: tuple[tuple[_Level, ...], ...]
    hidden: HiddenLayer | None = None


def _checked(complexes: Sequence[Complex]) -> None:
    names = [c.name for c in complexes]
    if len(complexes) < 2:
        raise InputError(f"docking fit: expected at least two native complexes, found {len(complexes)}.")
    if len(set(names)) < len(names):
        raise InputError("docking fit: expected every complex once, found names that repeat.")
    if other := [c.name for c in complexes if not c.native]:
        raise InputError(f"docking fit: expected native complexes, found none known for {', '.join(other)}.")


def _features(
    one: Complex,
    poses: Poses,
    lengths: FloatArray,
    contact: FloatArray,
    hidden: HiddenLayer | None,
    gradient: bool,
) -> tuple[FloatArray, FloatArray | None]:
    """What the energy is linear in, and its slopes: pair splines, then the network's units."""
    found, slopes = pair_potential_features(one, poses, lengths=lengths, contact=contact, gradient=gradient)
    if hidden is None:
        return found, slopes
    more, steeper = network_features(hidden, one, poses, lengths, gradient=gradient)
    found = np.concatenate([found, more], axis=1)
    if slopes is None or steeper is None:
        return found, None
    return found, np.concatenate([slopes, steeper], axis=2)


def _noised(
    one: Complex,
    settings: DockingFit,
    sigma: float,
    lengths: FloatArray,
    contact: FloatArray,
    hidden: HiddenLayer | None,
    seed: Any,
) -> tuple[FloatArray, FloatArray, float]:
    """Normal equations of the weighted regression of slopes on the score of the noise."""
    turn = sigma / settings.radius
    found = noise_poses(
        Poses.identity(settings.n_noised), 1.0, schedule=RigidSchedule(sigma, turn),
        generator=np.random.default_rng(seed),
    )  # fmt: skip
    _, slopes = _features(one, found.poses, lengths, contact, hidden, True)
    assert slopes is not None
    weights = np.repeat([sigma, turn], 3)
    design = -(slopes * weights[:, None]).reshape(-1, slopes.shape[2])
    target = (np.concatenate([found.tr_target, found.rot_target], axis=1) * weights).reshape(-1)
    n = len(target)
    return design.T @ design / n, design.T @ target / n, float(target @ target / n)


def prepare_docking_data(
    complexes: Sequence[Complex],
    settings: DockingFit | None = None,
    *,
    seed: int,
    progress: Progress | None = None,
) -> DockingData:
    """Decoys, noised poses and features of the training complexes.

    Parameters
    ----------
    complexes : sequence of Complex
        With native poses and different names.
    settings : DockingFit, optional
    seed : int
    progress : callable, optional

    Returns
    -------
    DockingData

    Raises
    ------
    InputError
        If there are fewer than two complexes, or one is not native.
    ConvergenceError
        If decoys cannot be made.
    """
    settings = settings or DockingFit()
    _checked(complexes)
    lengths = side_chain_lengths([p for c in complexes for p in (c.receptor, c.ligand)])
    points = [tuple(site_points(p, "sc", lengths) for p in (c.receptor, c.ligand)) for c in complexes]
    contact = statistical_contacts([(a, b) for a, b in points], complexes)
    hidden = HiddenLayer.drawn(settings.network, seed) if settings.network else None
    features, decoys, levels = [], [], []
    for k, one in enumerate(complexes):
        sets = tuple(
            make_decoys(one, settings.n_decoys, seed=seed + m) for m in range(settings.n_sets)
        )  # fmt: skip
        poses = Poses.concatenate([d.poses for d in sets])
        features.append(_features(one, poses, lengths, contact, hidden, False)[0])
        angle = so3.angle(poses.rotation)
        mine = []
        for m, sigma in enumerate(settings.sigmas):
            log_q = so3.igso3_log_density(angle, sigma / settings.radius)
            log_q = log_q - 0.5 * (poses.translation**2).sum(axis=1) / sigma**2
            q = np.exp(log_q - log_q.max())
            entropy = (seed, m, *one.name.encode())
            mine.append(
                _Level(*_noised(one, settings, sigma, lengths, contact, hidden, entropy), q / q.sum())
            )
        levels.append(tuple(mine))
        decoys.append(sets)
        if progress is not None:
            progress("noised poses and decoys", k + 1, len(complexes))
    return DockingData(
        tuple(c.name for c in complexes), lengths, contact, tuple(features), tuple(decoys), tuple(levels),
        hidden,
    )  # fmt: skip


def _scales(data: DockingData, settings: DockingFit) -> FloatArray:
    """Prior standard deviation of every coefficient at lambda = 1."""
    spread = np.sqrt(np.mean([f.var(axis=0) for f in data.features], axis=0))
    # A distance that no decoy has (overlap) is known from noised poses alone: no large coefficients there.
    spread = np.where(spread > 1e-2, spread, 1.0)
    terms = [(t.weight, t.n_coefs) for t in TERMS]
    if data.hidden is not None:
        terms.append((settings.network_weight, data.hidden.width))
    weights = np.concatenate([np.full(n, weight / np.sqrt(n)) for weight, n in terms])
    return weights / spread


def solve_level(data: DockingData, settings: DockingFit, level: int, use: Sequence[int]) -> FloatArray:
    """Coefficients at one noise level from the complexes of index ``use``; those of a network are last.

    Raises
    ------
    InputError
        If the data have no network of the settings' width.
    ConvergenceError
        If Newton's method does not converge in 100 steps.
    """
    units = 0 if data.hidden is None else data.hidden.width
    if units != settings.network:
        raise InputError(
            f"docking fit: expected data with the {settings.network} network units of the settings, found "
            f"{units}; prepare them again."
        )
    scale = _scales(data, settings)
    eye = np.eye(len(scale))
    normal = np.mean([data.levels[k][level].normal for k in use], axis=0) * np.outer(scale, scale)
    right = np.mean([data.levels[k][level].right for k in use], axis=0) * scale
    c = np.linalg.solve(normal + settings.ridge * eye, right)
    if settings.decoy_weight == 0:
        return scale * c
    many = [(data.features[k] * scale, data.levels[k][level].target) for k in use]

    def value_of(c: FloatArray) -> float:
        total = 0.5 * c @ normal @ c - right @ c + 0.5 * settings.ridge * c @ c
        for f, q in many:
            s = -f @ c
            total -= settings.decoy_weight / len(many) * (q @ s - s.max() - np.log(np.exp(s - s.max()).sum()))
        return float(total)

    value = value_of(c)
    for _ in range(100):
        slope = normal @ c - right + settings.ridge * c
        curve = normal + settings.ridge * eye
        for f, q in many:
            s = -f @ c
            p = np.exp(s - s.max())
            p /= p.sum()
            mean = p @ f
            slope = slope + settings.decoy_weight / len(many) * (q @ f - mean)
            curve = curve + settings.decoy_weight / len(many) * ((f.T * p) @ f - np.outer(mean, mean))
        step = np.linalg.solve(curve, slope)
        if slope @ step < 1e-9:
            return scale * c
        size = 1.0
        while size > 1e-6 and (new := value_of(c - size * step)) > value - 0.25 * size * (slope @ step):
            size *= 0.5
        c, value = c - size * step, new
    raise ConvergenceError(
        f"docking fit: expected Newton's method to converge in 100 steps, found a decrement of "
        f"{slope @ step:.2g}; raise the ridge."
    )


def score_r_squared(data: DockingData, coefs: FloatArray, level: int, of: Sequence[int]) -> float:
    """Share of the noise's score that the energy explains on complexes ``of``; the best possible is < 1."""
    ones = [data.levels[k][level] for k in of]
    miss = sum(float(coefs @ one.normal @ coefs - 2 * one.right @ coefs) + one.square for one in ones)
    return 1 - miss / sum(one.square for one in ones)


def fit_docking_model(
    complexes: Sequence[Complex] | None = None,
    settings: DockingFit | None = None,
    *,
    seed: int = 1,
    data: DockingData | None = None,
    progress: Progress | None = None,
) -> ResidueModel:
    """Fit the residue model to native complexes.

    Parameters
    ----------
    complexes : sequence of Complex, optional
    settings : DockingFit, optional
    seed : int
    data : DockingData, optional
        From :func:`prepare_docking_data`, instead of ``complexes``.
    progress : callable, optional

    Returns
    -------
    ResidueModel

    Raises
    ------
    InputError
        If there are neither complexes nor data, or they cannot be used.
    ConvergenceError
        If decoys cannot be made, or the fit does not converge.
    """
    settings = settings or DockingFit()
    if data is None:
        if complexes is None:
            raise InputError("docking fit: expected complexes or prepared data, found neither.")
        data = prepare_docking_data(complexes, settings, seed=seed, progress=progress)
    everyone = range(len(data.names))
    coefs = np.stack([solve_level(data, settings, m, everyone) for m in range(len(settings.sigmas))])
    metadata = {
        "trained_on": list(data.names), "settings": asdict(settings), "seed": seed,
        "score_r2": [score_r_squared(data, c, m, everyone) for m, c in enumerate(coefs)],
        "contact": data.contact.tolist(),
    }  # fmt: skip
    residual = None if data.hidden is None else Residual(data.hidden, coefs[:, N_COEFS:])
    return ResidueModel(
        np.array(settings.sigmas), tables_from_coefs(coefs[:, :N_COEFS], data.contact), data.lengths,
        settings.schedule(), metadata, residual,
    )  # fmt: skip


@dataclass(frozen=True)
class HeldOut:
    """How an energy ranks the decoys of complexes left out, means over them.

    Attributes
    ----------
    sigmas : tuple of float
        Noise levels whose energies are averaged [nm].
    auc, spearman, top : float
        Area under the curve, rank correlation of energy and ligand RMSD, share of decoy sets whose best
        decoy is near-native.
    score_r2 : float
        Share of the noise's score that is explained, mean over the levels.
    """

    sigmas: tuple[float, ...]
    auc: float
    spearman: float
    top: float
    score_r2: float


def cross_validate(
    data: DockingData, settings: DockingFit, clusters: Sequence[int] | None = None
) -> tuple[HeldOut, ...]:
    """Leave out one cluster of complexes after the other.

    Parameters
    ----------
    data : DockingData
    settings : DockingFit
        ``ridge`` and the two weights may differ from those of the data; the rest may not.
    clusters : sequence of int, optional
        Cluster of every complex (related ones are left out together); each its own by default.

    Returns
    -------
    tuple of HeldOut
        One for each noise level, and where there are several of :data:`~.residue_model.HEAD_SIGMAS`,
        last, one for their mean: the energy head.

    Notes
    -----
    Side-chain lengths and the statistical contact energies are those of all training complexes.
    """
    group = np.arange(len(data.names)) if clusters is None else np.asarray(clusters)
    if group.shape != (len(data.names),) or len(np.unique(group)) < 2:
        raise InputError(
            f"clusters: expected a number for each of {len(data.names)} complexes and at least two different "
            f"ones, found shape {group.shape}."
        )
    n_levels = len(settings.sigmas)
    averaged: list[tuple[int, ...]] = [(m,) for m in range(n_levels)]
    head = tuple(m for m, sigma in enumerate(settings.sigmas) if sigma in HEAD_SIGMAS)
    if len(head) > 1:
        averaged.append(head)
    rows: list[list[tuple[float, ...]]] = [[] for _ in averaged]
    for g in np.unique(group):
        use = [int(k) for k in np.flatnonzero(group != g)]
        coefs = [solve_level(data, settings, m, use) for m in range(n_levels)]
        for k in np.flatnonzero(group == g):
            energy = np.stack([data.features[k] @ c for c in coefs]).reshape(
                n_levels, len(data.decoys[k]), -1
            )
            r2 = np.array([score_r_squared(data, c, m, [int(k)]) for m, c in enumerate(coefs)])
            for row, levels in zip(rows, averaged, strict=True):
                for e, d in zip(energy[list(levels)].mean(axis=0), data.decoys[k], strict=True):
                    row.append((
                        area_under_curve(e, d.near), rank_correlation(e, d.rmsd),
                        any_near(e, d.near, 1), float(r2[list(levels)].mean()),
                    ))  # fmt: skip
    return tuple(
        HeldOut(tuple(settings.sigmas[m] for m in levels), *(float(v) for v in np.mean(row, axis=0)))
        for row, levels in zip(rows, averaged, strict=True)
    )
