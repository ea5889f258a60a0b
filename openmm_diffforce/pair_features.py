"""Pair functions as features: B-splines of the distances that can carry a perturbation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.interpolate import BSpline

from .errors import InputError
from .models.graph import MolecularGraph
from .training import check_frames

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

N_COEFS = 8
"""B-splines of one pair function."""

POWER = 5
"""Splines are in r^-5: fine where pairs touch, and Coulomb's 1/r or r^-6 bend little in it."""

TAIL = 1e-3
"""Share of the frames at either end of a distance's range in which its function is a straight line."""


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
