r"""Pair functions as features: B-splines of distances, and the operator as a sum over pairs, noised.

On a flat base a pair function u of the distance r of two atoms that carry Gaussian noise of variance
s^2 together (2 sigma^2 where both are noised) has closed noised operators at both ends,

.. math:: O_{\sigma,0}(r) = (u * N_s)(r), \qquad
          O_{\sigma,1}(r) = \frac{(u\,e^{-u} * N_s)(r)}{(e^{-u} * N_s)(r)}, \qquad
          (u * N_s)(r) = \int_0^\infty \frac{r' u(r')}{r s \sqrt{2\pi}}
          \left[e^{-(r-r')^2/2s^2} - e^{-(r+r')^2/2s^2}\right] dr' .
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.interpolate import BSpline

from . import ops
from .errors import InputError
from .models.graph import MolecularGraph
from .models.physics import OperatorTables
from .training import OPERATOR_TOLERANCE, check_ends, check_frames

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

N_COEFS = 8
"""B-splines of one pair function."""

POWER = 5
"""Splines are in r^-5: fine where pairs touch, and Coulomb's 1/r or r^-6 bend little in it."""

TAIL = 1e-3
"""Share of the frames at either end of a distance's range in which its function is a straight line."""

NOISE = (0.01, 0.02, 0.04, 0.08)
"""Noise levels of the columns of a pair operator [nm], beside none."""

RIDGE = 1e-7
"""Penalty of a pair operator's functions, relative to its normal matrix: O has no noise."""

SPACING = 0.01
"""Largest spacing of the knots of its tables [nm]."""

NODE = 0.002
"""Spacing of the integrals of a convolution [nm]; levels are several of it."""


@dataclass(frozen=True)
class PairSplines:
    """Cubic B-splines of pair distances in r^-5, summed over the pairs of a type.

    Attributes
    ----------
    pairs : numpy.ndarray of int, shape (n_pairs, 2)
    types : numpy.ndarray of int, shape (n_pairs,)
        Pairs of one type share their function.
    low, high : numpy.ndarray, shape (n_types,)
        Range of r^-5 in which the function bends [nm^-5]; beyond it goes on straight, down to half
        the closest distance of the range, and is constant below.
    """

    pairs: IntArray
    types: IntArray
    low: FloatArray
    high: FloatArray

    @property
    def roughness(self) -> FloatArray:
        """Squared second differences of every function, [n_features, n_features]."""
        return self._differences(2)

    @property
    def ridge(self) -> FloatArray:
        """Squared first differences."""
        return self._differences(1)

    def _differences(self, order: int) -> FloatArray:
        d = np.diff(np.eye(N_COEFS), order, axis=0)
        return np.asarray(np.kron(np.eye(len(self.low)), d.T @ d))

    def __call__(self, x: FloatArray) -> FloatArray:
        """Features [n_frames, n_types * N_COEFS] of frames [n_frames, n_atoms, 3] nm."""
        r = np.linalg.norm(x[:, self.pairs[:, 0]] - x[:, self.pairs[:, 1]], axis=-1)
        u = np.maximum(r, 0.5 * self.high[self.types] ** (-1 / POWER)) ** -POWER
        u = (u - self.low[self.types]) / (self.high - self.low)[self.types] * (N_COEFS - 3)
        inside = np.clip(u, 0.0, (N_COEFS - 3) * (1 - 1e-12))
        basis = BSpline(np.arange(N_COEFS + 4) - 3.0, np.eye(N_COEFS), 3)
        out = np.zeros((len(x), len(self.low), N_COEFS))
        slope = basis.derivative()
        for k, kind in enumerate(self.types):
            out[:, kind] += basis(inside[:, k]) + (u - inside)[:, k, None] * slope(inside[:, k])
        return out.reshape(len(x), -1)


def pair_splines(
    x_0: Any, x_1: Any, graph: MolecularGraph, sites: Sequence[int], becomes: Sequence[str] | None = None
) -> PairSplines:
    """Pair functions that can carry a perturbation: its atoms with all that are three bonds away or more.

    Parameters
    ----------
    x_0, x_1 : array_like, shape (n_frames, n_atoms, 3)
        Frames of both ends [nm]; they set the ranges.
    graph : MolecularGraph
    sites : sequence of int
        The perturbed atoms.
    becomes : sequence of str, optional
        What each turns into. Atoms that are equivalent in the graph and become the same share their
        functions; by default every site is of its own kind.

    Returns
    -------
    PairSplines

    Raises
    ------
    InputError
        For sites that are repeated, out of range, or closer than three bonds to everything, a
        ``becomes`` of another length, or frames of another molecule.

    Examples
    --------
    >>> from openmm_diffforce.models.graph import MolecularGraph
    >>> chain = MolecularGraph(("H", "O", "O", "H"), ((0, 1), (1, 2), (2, 3)))
    >>> x = np.random.default_rng(0).normal(size=(20, 4, 3))
    >>> pair_splines(x, x, chain, [0]).pairs.tolist()
    [[0, 3]]
    """
    frames = [check_frames(x, graph.n_atoms, name=f"x_{end}") for end, x in enumerate((x_0, x_1))]
    sites, n = [int(s) for s in sites], graph.n_atoms
    if not sites or len(set(sites)) != len(sites) or min(sites) < 0 or max(sites) >= n:
        raise InputError(f"sites: expected different atom indices below {n}, found {sites}.")
    kinds = [str(k) for k in range(len(sites))] if becomes is None else [str(k) for k in becomes]
    if len(kinds) != len(sites):
        raise InputError(f"becomes: expected one name for each of {len(sites)} sites, found {len(kinds)}.")
    elements = list(graph.elements)
    for site, kind in zip(sites, kinds, strict=True):
        elements[site] += f" to {kind}"
    classes = replace(graph, elements=tuple(elements)).atom_classes()
    separation = graph.separations()
    numbers: dict[tuple[int, ...], int] = {}
    pairs, types = [], []
    for a in sites:
        for b in range(n):
            if separation[a, b] < 3 or (b in sites and b < a):
                continue
            key = (*sorted((int(classes[a]), int(classes[b]))), int(separation[a, b] == 3))
            pairs.append((a, b))
            types.append(numbers.setdefault(key, len(numbers)))
    if not pairs:
        raise InputError("sites: every pair with the rest of the molecule is closer than three bonds.")
    pair_idx, type_idx = np.array(pairs), np.array(types)
    r = np.concatenate([np.linalg.norm(x[:, pair_idx[:, 0]] - x[:, pair_idx[:, 1]], axis=-1) for x in frames])
    if not r.min() > 0:
        raise InputError("x_0, x_1: expected atoms apart, found two at the same place.")
    u = r**-POWER
    low, high = (
        np.array([np.quantile(u[:, type_idx == k], q) for k in range(len(numbers))]) for q in (TAIL, 1 - TAIL)
    )
    return PairSplines(pair_idx, type_idx, low, np.maximum(high, low * (1 + 1e-6)))


@dataclass(frozen=True)
class PairOperator:
    """The operator as a sum over pairs, at noised frames: columns for a bridge.

    Columns are O_{sigma,0} and O_{sigma,1} of every noise level of the tables (one of them without
    noise) by the compiled kernel, as arsinh((O - centre)/width), and behind them those of ``beside``.

    Attributes
    ----------
    tables : OperatorTables
        Lambda knots 0 and 1; noise levels as many as wanted.
    centre, width : float
        [kT].
    beside : callable, optional
        noised frames -> further columns, such as
        :class:`~openmm_diffforce.summary.PairDistances`.

    Examples
    --------
    >>> chain = MolecularGraph(("H", "O", "O", "H"), ((0, 1), (1, 2), (2, 3)))
    >>> x = np.random.default_rng(0).normal(np.arange(4)[:, None] * [0.2, 0, 0], 0.03, (50, 4, 3))
    >>> o = 0.1 / np.linalg.norm(x[:, 0] - x[:, 3], axis=-1)
    >>> PairOperator.of([x, x], [o, o], chain, [0], sigmas=[0.02])(x).shape
    (50, 3)
    """

    tables: OperatorTables
    centre: float
    width: float
    beside: Callable[[Any], Any] | None = None

    @classmethod
    def of(
        cls,
        frames: Sequence[Any],
        operators: Sequence[Any],
        graph: MolecularGraph,
        sites: Sequence[int],
        *,
        becomes: Sequence[str] | None = None,
        atoms: Sequence[int] | None = None,
        sigmas: Sequence[float] = NOISE,
        beside: Callable[[Any], Any] | None = None,
    ) -> "PairOperator":
        """Fit O without noise as a sum of pair functions, and noise them in closed form.

        Parameters
        ----------
        frames : sequence of array_like, each of shape (n_frames, n_atoms, 3)
            Of both end states [nm].
        operators : sequence of array_like, each of shape (n_frames,)
            O on them [kT].
        graph, sites, becomes
            As in :func:`pair_splines`.
        atoms : sequence of int, optional
            Atoms that are noised, by default all: as the bridge's.
        sigmas : sequence of float
            Noise levels of the columns, increasing [nm].
        beside : callable, optional

        Returns
        -------
        PairOperator
            ``centre`` and ``width`` are median and standard deviation of O in the narrower end state.

        Raises
        ------
        InputError
            For frames of other than two ends, noise levels that do not increase from at least twice
            ``NODE``, atoms that are repeated or out of range, and as :func:`pair_splines`.

        Notes
        -----
        Least squares with the weights of :func:`~openmm_diffforce.training.fit_operator`: a clash counts
        by its relative error. Without noise O is a function of the frame: the fit has no scatter of O to
        learn by heart, and is not repeated for the folds of a bridge. Pairs are noised one by one, as
        on a flat base. The columns are no lengths: a bridge whose columns have none beside them must be
        given its ``sigmas``. Deterministic.
        """
        if len(frames) != 2 or len(operators) != 2:
            raise InputError(
                f"frames, operators: expected two end states, found {len(frames)} and {len(operators)}."
            )
        levels = np.asarray(sigmas, dtype=np.float64)
        rising = levels.ndim == 1 and len(levels) > 0 and np.isfinite(levels).all()
        if not rising or not levels[0] >= 2 * NODE or (np.diff(levels) <= 0).any():
            raise InputError(
                f"sigmas: expected levels of at least {2 * NODE:g} nm that increase, found {levels.tolist()}."
            )
        noised = range(graph.n_atoms) if atoms is None else [int(a) for a in atoms]
        if not noised or len(set(noised)) != len(noised) or min(noised) < 0 or max(noised) >= graph.n_atoms:
            raise InputError(
                f"atoms: expected different indices below {graph.n_atoms}, found {list(noised)}."
            )
        x, o = check_ends(frames[0], operators[0], frames[1], operators[1], graph.n_atoms)
        splines = pair_splines(x[0], x[1], graph, sites, becomes)
        typical = np.quantile(o[1], (0.05, 0.95))
        every = np.concatenate(o)
        distance = np.maximum(np.maximum(typical[0] - every, every - typical[1]), 0.0)
        weight = 1.0 / (1.0 + (distance / OPERATOR_TOLERANCE) ** 2)
        design = splines(np.concatenate(x))
        gram = design.T @ (weight[:, None] * design)
        penalty = splines.roughness + splines.ridge + 1e-3 * np.eye(len(gram))
        c = np.linalg.solve(gram + RIDGE * np.trace(gram) / len(gram) * penalty, design.T @ (weight * every))
        narrow = min(o, key=np.std)
        centre, width = float(np.median(narrow)), float(narrow.std()) or 1.0
        return cls(_noised_tables(splines, c, x, levels, set(noised)), centre, width, beside)

    def __call__(self, y: FloatArray) -> FloatArray:
        """Columns of noised frames [n_frames, n_atoms, 3] nm."""
        x, t = torch.as_tensor(np.ascontiguousarray(y, dtype=np.float64)), self.tables
        columns = []
        for sigma in t.sigma_knots:
            for lam in (0.0, 1.0) if sigma > 0 else (0.0,):
                columns.append(_evaluate(t, x, float(sigma), lam))
        out = np.arcsinh((np.stack(columns, axis=1) - self.centre) / self.width)
        return out if self.beside is None else np.concatenate([out, self.beside(y)], axis=1)


def _evaluate(tables: OperatorTables, x: torch.Tensor, sigma: float, lam: float) -> FloatArray:
    one = torch.ones(len(x), dtype=torch.float64)
    found = ops.pair_operator(
        x, sigma * one, lam * one,
        sites=torch.as_tensor(tables.sites), env=torch.as_tensor(tables.env),
        pair_type=torch.as_tensor(tables.pair_type), table=torch.as_tensor(tables.table),
        r_grid=torch.as_tensor(tables.r_grid), lam_knots=torch.as_tensor(tables.lam_knots),
        sigma_knots=torch.as_tensor(tables.sigma_knots), r_switch=tables.r_switch, r_cutoff=tables.r_cutoff,
    )  # fmt: skip
    return np.asarray(found[0].numpy())


def noised_pair_function(
    u: FloatArray, r: FloatArray, s: float, at: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """O_{sigma,0} and O_{sigma,1} of a pair function on a flat base.

    Parameters
    ----------
    u : numpy.ndarray, shape (n,)
        At ``r`` [kT].
    r : numpy.ndarray, shape (n,)
        Distances > 0, evenly spaced by less than s, reaching 4 s beyond ``at`` [nm].
    s : float
        Standard deviation of the noise of the pair [nm].
    at : numpy.ndarray, shape (m,)
        Distances > 0 of the noised pair [nm].

    Examples
    --------
    >>> r = np.arange(1, 4000) * 1e-3
    >>> start, _ = noised_pair_function(r**2, r, 0.1, np.array([0.5]))
    >>> round(float(start[0]), 6)  # r^2 + 3 s^2
    0.28
    """
    near, far = -((at[:, None] - r) ** 2) / (2 * s * s), -((at[:, None] + r) ** 2) / (2 * s * s)
    share = r * (np.exp(near) - np.exp(far))
    share /= share.sum(axis=1, keepdims=True)
    log_w = np.log(np.maximum(share, 1e-300)) - u
    w = np.exp(log_w - log_w.max(axis=1, keepdims=True))
    return np.asarray(share @ u), np.asarray(w @ u / w.sum(axis=1))


def _noised_tables(
    splines: PairSplines, c: FloatArray, frames: Sequence[FloatArray], sigmas: FloatArray, noised: set[int]
) -> OperatorTables:
    """Pair functions without noise, and noised at both ends, as tables of the compiled kernel."""
    n_types = len(splines.low)
    a_idx, b_idx = splines.pairs.T
    sites = np.unique(a_idx)
    pair_type = np.full((len(sites), frames[0].shape[1]), -1, dtype=np.int64)
    pair_type[np.searchsorted(sites, a_idx), b_idx] = splines.types
    r = np.concatenate([np.linalg.norm(x[:, a_idx] - x[:, b_idx], axis=-1) for x in frames])
    margin = 3.0 * sigmas[-1]
    ranges = [(r[:, splines.types == k].min(), r[:, splines.types == k].max()) for k in range(n_types)]
    low = np.array([max(v[0] - margin, 2 * NODE) for v in ranges])
    high = np.array([v[1] + margin for v in ranges])
    n_coefs = int(np.ceil((high - low).max() / SPACING)) + 3
    spacing = (high - low) / (n_coefs - 3)
    table = np.zeros((n_types, 2, len(sigmas) + 1, n_coefs))
    for k in range(n_types):
        mine = splines.types == k
        # Of the two atoms' noise, in units of sigma^2; the mean where pairs of a type differ.
        share = np.mean([(int(i) in noised) + (int(j) in noised) for i, j in splines.pairs[mine]])
        nodes = np.arange(NODE, high[k] + 5.0 * np.sqrt(2.0) * sigmas[-1], NODE)
        pair = np.zeros((len(nodes), 2, 3))
        pair[:, 1, 0] = nodes
        alone = replace(splines, pairs=np.array([[0, 1]]), types=np.array([k]))
        u = alone(pair) @ c
        at = np.linspace(low[k], high[k], 3 * n_coefs)
        knots = low[k] + spacing[k] * (np.arange(n_coefs + 4) - 3)
        inside = np.clip(at, knots[3], np.nextafter(knots[n_coefs], -np.inf))
        design = BSpline.design_matrix(inside, knots, 3).toarray()
        rows = [np.interp(at, nodes, u)] * 2
        for sigma in sigmas:
            s = sigma * np.sqrt(share)
            rows += noised_pair_function(u, nodes, s, at) if s > 0 else rows[:2]
        found = np.linalg.lstsq(design, np.stack(rows, axis=1), rcond=None)[0]
        table[k] = found.reshape(n_coefs, len(sigmas) + 1, 2).transpose(2, 1, 0)
    return OperatorTables(
        sites, np.arange(pair_type.shape[1]), pair_type, table, np.stack([low, spacing], axis=1),
        np.array([0.0, 1.0]), np.concatenate([[0.0], sigmas]), 0.0, 0.0,
    )  # fmt: skip
