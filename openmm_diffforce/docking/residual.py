r"""A network between residues that corrects the pair splines: what distances alone cannot say.

.. math:: S(\mathrm{pose}, \sigma) = S_{splines}(\mathrm{pose}, \sigma)
          + \sum_{i \in R} \sum_{j \in L} w(d_{ij})\, c_\sigma \cdot
          \left[\phi(A x_{ij} + B z_i + C z_j + b) + \phi(A x_{ij} + B z_j + C z_i + b)\right]

over pairs with a C-beta distance d below r_c, with the fade w(d) = (1 - d^2 / r_c^2)^3 and phi(v) =
v / (1 + exp(-v)).

============ ====================================================================================
symbol       what it is
============ ====================================================================================
x_ij         bumps of the C-beta, C-alpha and side-chain distances, and the cosine between the
             directions C-alpha to C-beta of both residues
z_i          the cosine of that direction of i with the direction to j, the burial of i in its own
             partner, and :data:`DESCRIPTORS` of its type
A, B, C, b   hidden layer, drawn at random once
c_sigma      output layer of a noise level, fitted
============ ====================================================================================

The output layer is fitted together with the splines, in the same convex problem (:mod:`~.learning`). Burial
is the number of C-alpha within 1.3 nm on the side chain's side (half-sphere exposure): a constant of a rigid
partner. Everything is a function of distances and angles within the complex, so that frames do not matter,
and the sum over both orders makes the partners equal. It is an energy: scores are its derivatives, by hand.
Everything is in nm, rad and kT.

What it adds is small: benchmarks/results/docking.md has the cross-validation with and without it.
:data:`GAINS` was chosen on the same training complexes.

References
----------
A. Rahimi and B. Recht, Weighted sums of random kitchen sinks: replacing minimization with randomization in
learning, 2008 (networks with a random hidden layer).
T. Hamelryck, An amino acid has two sides: a new 2D measure provides a different view of solvent exposure,
2005, doi:10.1002/prot.20379.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import expit

from .complex import RESIDUES, SIDE_CHAIN_ATOMS, Complex, FloatArray, IntArray, Partner
from .contacts import near_pairs, placed
from .poses import Poses
from .residue_model import CHARGES, site_points

CUTOFF = 1.2
"""r_c: C-beta distance from which a pair adds nothing [nm]."""

BUMPS = {"cb": (0.35, 0.16, 6), "ca": (0.40, 0.18, 6), "sc": (0.30, 0.18, 6)}
"""First centre and spacing [nm] and number of the Gaussian bumps of a distance; a bump's width is the
spacing."""

_HYDROPATHY = {
    "ALA": 1.8, "ARG": -4.5, "ASN": -3.5, "ASP": -3.5, "CYS": 2.5, "GLN": -3.5, "GLU": -3.5, "GLY": -0.4,
    "HIS": -3.2, "ILE": 4.5, "LEU": 3.8, "LYS": -3.9, "MET": 1.9, "PHE": 2.8, "PRO": -1.6, "SER": -0.8,
    "THR": -0.7, "TRP": -0.9, "TYR": -1.3, "VAL": 4.2,
}  # fmt: skip
_AROMATIC = frozenset({"HIS", "PHE", "TRP", "TYR"})

DESCRIPTORS: FloatArray = np.array(
    [[CHARGES[k], _HYDROPATHY[r] / 3, (SIDE_CHAIN_ATOMS[k] - 4) / 3, float(r in _AROMATIC)]
     for k, r in enumerate(RESIDUES)]
)  # fmt: skip
"""Charge, hydropathy (Kyte and Doolittle), size and aromaticity of a residue type, shape (20, 4)."""

GAINS = (4.0, 0.6, 0.6, 1.0)
"""Standard deviations of the hidden layer's weights: of a pair, of either residue, and of the bias."""

N_RAW = 6
"""Three distances and three cosines of a pair."""

N_SHAPE = sum(n for _, _, n in BUMPS.values()) + 1
N_OWN = 2 + DESCRIPTORS.shape[1]
"""Inputs that belong to a pair, and to one residue of it."""

CHUNK = 32
"""Poses in one pass of the network."""


def _dot(a: FloatArray, b: FloatArray) -> FloatArray:
    """Row by row; b may be one row for all."""
    return np.asarray(a @ b if b.ndim == 1 else np.einsum("pw,pw->p", a, b))


def _own(partner: Partner) -> FloatArray:
    """What a residue brings whatever the pose, shape (n_residues, N_OWN - 1)."""
    return np.column_stack([(partner.burial - 15) / 8, DESCRIPTORS[partner.types]])


@dataclass(frozen=True)
class PairTable:
    """Pairs within the cutoff in many poses, in the order of the poses.

    Attributes
    ----------
    start : numpy.ndarray of int, shape (n_poses + 1,)
        Pairs of pose k are rows start[k] to start[k + 1].
    raw : numpy.ndarray, shape (n_pairs, 6)
        Distances between C-beta, C-alpha and side chains [nm]; cosine of the receptor residue, of the
        ligand residue, and between both.
    receptor, ligand : numpy.ndarray of int, shape (n_pairs,)
        Rows of the following.
    receptor_own, ligand_own : numpy.ndarray, shape (n_residues, N_OWN - 1)
        Burial and descriptors.
    slopes : numpy.ndarray, shape (n_pairs, 6, 6), or None
        Derivatives of ``raw`` by a shift [1/nm] and by a turn about the pose's centre [1/rad].
    laplacians : numpy.ndarray, shape (n_pairs, 6, 2), or None
        Sums of second derivatives of ``raw`` over the three shifts and over the three turns.
    """

    start: IntArray
    raw: FloatArray
    receptor: IntArray
    ligand: IntArray
    receptor_own: FloatArray
    ligand_own: FloatArray
    slopes: FloatArray | None
    laplacians: FloatArray | None

    @property
    def pose(self) -> IntArray:
        """Pose of every pair, shape (n_pairs,)."""
        return np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))

    def sums(self, values: FloatArray) -> Any:
        """Sparse matrix [n_poses, n_pairs] that sums over the pairs of a pose, each times its value."""
        shape = len(self.start) - 1, len(values)
        return csr_matrix((values, np.arange(len(values)), self.start), shape=shape)


def pair_table(complex_: Complex, poses: Poses, lengths: FloatArray, *, gradient: bool) -> PairTable:
    """Pairs of a complex in its poses.

    Parameters
    ----------
    complex_ : Complex
    poses : Poses
    lengths : numpy.ndarray, shape (20,)
        :func:`~.residue_model.side_chain_lengths`.
    gradient : bool
        Whether ``slopes`` and ``laplacians`` are asked for.

    Returns
    -------
    PairTable

    Notes
    -----
    With y the vector of a pair, n = y / d, a the arm of the ligand's point, and c = u . n, the Hessian of
    u . n by y is -(u n^T + n u^T + c - 3 c n n^T) / d^2. Turns move the point by e x a and e x (e x a), of
    which the sums over three directions are |a|^2 - a a^T (outer products) and -2 a.
    """
    receptor, ligand, c = complex_.receptor, complex_.ligand, complex_.ligand.centre
    moved = placed(ligand.sites[:, 3], c, poses)
    found = near_pairs(receptor.sites[:, 3], moved, CUTOFF)
    order = np.lexsort((found.ligand, found.receptor, found.pose))
    pose, i, j = found.pose[order], found.receptor[order], found.ligand[order]
    middle = (c + poses.translation)[pose]
    raw, slopes = np.empty((len(pose), N_RAW)), np.zeros((len(pose), N_RAW, 6))
    laplacians = np.zeros((len(pose), N_RAW, 2))
    for k, site in enumerate(BUMPS):
        x = placed(site_points(ligand, site, lengths), c, poses)[pose, j]
        away = x - site_points(receptor, site, lengths)[i]
        raw[:, k] = np.linalg.norm(away, axis=1)
        d = np.maximum(raw[:, k], 1e-9)[:, None]
        unit, lever = away / d, x - middle
        if k == 0:
            n, a, distance = unit, lever, d
        if gradient:
            slopes[:, k] = np.concatenate([unit, np.cross(lever, unit)], axis=1)
            across = (slopes[:, k, 3:] ** 2).sum(axis=1)
            laplacians[:, k, 0] = 2 / d[:, 0]
            laplacians[:, k, 1] = (2 * _dot(lever, lever) - across) / d[:, 0] - 2 * _dot(unit, lever)
    u = receptor.directions[i]
    v = (ligand.directions @ np.swapaxes(poses.rotation, 1, 2))[pose, j]
    raw[:, 3], raw[:, 4], raw[:, 5] = _dot(u, n), -_dot(v, n), _dot(u, v)
    if gradient:
        # n turns by the part of a displacement across it, v with the ligand.
        for k, w in ((3, u), (4, -v)):
            cosine, d = raw[:, k], distance[:, 0]
            across = (w - cosine[:, None] * n) / distance
            slopes[:, k] = np.concatenate([across, np.cross(a, across)], axis=1)
            laplacians[:, k, 0] = -2 * cosine / d**2
            na, wa, aa = _dot(n, a), _dot(w, a), _dot(a, a)
            laplacians[:, k, 1] = (2 * wa * na - cosine * aa - 3 * cosine * na**2) / d**2 - 2 * _dot(
                across, a
            )
        slopes[:, 4, 3:] -= np.cross(v, n)
        laplacians[:, 4, 1] += 2 * (wa + cosine * na) / d - 2 * cosine
        slopes[:, 5, 3:] = np.cross(v, u)
        laplacians[:, 5, 1] = -2 * raw[:, 5]
    start = np.searchsorted(pose, np.arange(len(poses) + 1))
    more = (slopes, laplacians) if gradient else (None, None)
    return PairTable(start, raw, i, j, _own(receptor), _own(ligand), *more)


@dataclass(frozen=True)
class HiddenLayer:
    """The hidden layer: weights of what a pair is, of what either residue brings, and a bias.

    Attributes
    ----------
    shape : numpy.ndarray, shape (N_SHAPE, width)
    first, second : numpy.ndarray, shape (N_OWN, width)
    bias : numpy.ndarray, shape (width,)
    """

    shape: FloatArray
    first: FloatArray
    second: FloatArray
    bias: FloatArray

    @classmethod
    def drawn(cls, width: int, seed: int) -> "HiddenLayer":
        """Normal weights of standard deviations :data:`GAINS`."""
        generator = np.random.default_rng((seed, N_RAW))
        sizes = (N_SHAPE, width), (N_OWN, width), (N_OWN, width), (width,)
        return cls(*(g * generator.standard_normal(n) for g, n in zip(GAINS, sizes, strict=True)))

    @property
    def width(self) -> int:
        """Hidden units."""
        return len(self.bias)

    def _orders(
        self, table: PairTable, order: int
    ) -> Iterator[tuple[FloatArray, list[FloatArray], list[FloatArray]]]:
        """Both orders: input of the units [n_pairs, width], its first and its second derivatives by ``raw``.

        Second derivatives by different columns, and by the cosines, are zero.
        """
        raw, row = table.raw, 0
        z: FloatArray = self.bias + raw[:, 5:6] * self.shape[-1]
        slopes, bends = [], []
        for k, (low, step, n) in enumerate(BUMPS.values()):
            away = (raw[:, k : k + 1] - low) / step - np.arange(n)
            bump, weights = np.exp(-0.5 * away**2), self.shape[row : row + n]
            z = z + bump @ weights
            if order > 0:
                slopes.append((-away * bump / step) @ weights)
            if order > 1:
                bends.append(((away**2 - 1) * bump / step**2) @ weights)
            row += n
        for one, other in ((self.first, self.second), (self.second, self.first)):
            x = z + raw[:, 3:4] * one[0] + raw[:, 4:5] * other[0]
            x += (table.receptor_own @ one[1:])[table.receptor] + (table.ligand_own @ other[1:])[table.ligand]
            yield x, [*slopes, one[0], other[0], self.shape[-1]], bends

    def of_pairs(self, table: PairTable, *, gradient: bool) -> tuple[FloatArray, list[FloatArray]]:
        """Faded units [n_pairs, width] of both orders, and their derivatives by the columns of ``raw``."""
        fade, fall, _ = (f[:, None] for f in _fade(table.raw[:, 0]))
        total = np.zeros((len(table.raw), self.width))
        slopes = [np.zeros_like(total) for _ in range(N_RAW)] if gradient else []
        for x, by, _ in self._orders(table, int(gradient)):
            gate = expit(x)
            total += x * gate
            slope = gate * (1 + x * (1 - gate))
            for k in range(len(slopes)):
                slopes[k] += slope * by[k]
        slopes = [fade * s for s in slopes]
        if gradient:
            slopes[0] += fall * total
        return fade * total, slopes

    def curvature(self, table: PairTable, out: FloatArray) -> tuple[FloatArray, FloatArray]:
        """First [n_pairs, 6] and second [n_pairs, 6, 6] derivatives by ``raw`` of the energies of pairs.

        ``out`` [n_pairs, width] is the output layer of every pair.
        """
        n = len(table.raw)
        total, pull, hessian = np.zeros(n), np.zeros((n, N_RAW)), np.zeros((n, N_RAW, N_RAW))
        for x, by, bends in self._orders(table, 2):
            gate = expit(x)
            total += _dot(x * gate, out)
            slope = out * gate * (1 + x * (1 - gate))
            bend = out * gate * (1 - gate) * (2 + x * (1 - 2 * gate))
            for k in range(N_RAW):
                pull[:, k] += _dot(slope, by[k])
                turned = bend * by[k]
                for m in range(k, N_RAW):
                    hessian[:, k, m] += _dot(turned, by[m])
            for k, more in enumerate(bends):
                hessian[:, k, k] += _dot(slope, more)
        for k in range(N_RAW):
            hessian[:, k + 1 :, k] = hessian[:, k, k + 1 :]
        fade, fall, bow = _fade(table.raw[:, 0])
        hessian *= fade[:, None, None]
        hessian[:, 0] += fall[:, None] * pull
        hessian[:, :, 0] += fall[:, None] * pull
        hessian[:, 0, 0] += bow * total
        pull *= fade[:, None]
        pull[:, 0] += fall * total
        return pull, hessian


def _fade(d: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """w(d) and its first two derivatives."""
    inside = np.maximum(1 - (d / CUTOFF) ** 2, 0.0)
    fall = -6 * d / CUTOFF**2 * inside**2
    return inside**3, fall, -6 * inside**2 / CUTOFF**2 + 24 * d**2 / CUTOFF**4 * inside


def network_features(
    hidden: HiddenLayer, complex_: Complex, poses: Poses, lengths: FloatArray, *, gradient: bool = False
) -> tuple[FloatArray, FloatArray | None]:
    """What the residual is linear in, for every pose: its units, summed over pairs.

    Parameters
    ----------
    hidden : HiddenLayer
    complex_ : Complex
    poses : Poses
    lengths : numpy.ndarray, shape (20,)
        Side-chain lengths [nm].
    gradient : bool

    Returns
    -------
    features : numpy.ndarray, shape (n_poses, width)
    slopes : numpy.ndarray, shape (n_poses, 6, width), or None
        Their derivatives by a shift [1/nm] and by a turn about the pose's centre [1/rad].
    """
    n = len(poses)
    features, slopes = np.zeros((n, hidden.width)), np.zeros((n, 6, hidden.width))
    for part in _chunks(n):
        table = pair_table(complex_, poses[part], lengths, gradient=gradient)
        units, pulls = hidden.of_pairs(table, gradient=gradient)
        features[part] = table.sums(np.ones(len(units))) @ units
        if table.slopes is not None:
            for q in range(6):
                slopes[part, q] = sum(table.sums(table.slopes[:, r, q]) @ p for r, p in enumerate(pulls))
    return features, slopes if gradient else None


@dataclass(frozen=True)
class Residual:
    """A fitted network; :class:`~.residue_model.ResidueModel` adds it to its closed form.

    Attributes
    ----------
    hidden : HiddenLayer
    out : numpy.ndarray, shape (n_levels, width)
        Coefficients of the units [kT].
    """

    hidden: HiddenLayer
    out: FloatArray

    def evaluate(
        self, complex_: Complex, poses: Poses, levels: FloatArray, lengths: FloatArray, *, gradient: bool
    ) -> tuple[FloatArray, FloatArray | None]:
        """Energy of poses, and its derivatives by shift and turn.

        Parameters
        ----------
        complex_ : Complex
        poses : Poses
        levels : numpy.ndarray, shape (n_poses, n_levels)
            Weight of every noise level.
        lengths : numpy.ndarray, shape (20,)
            Side-chain lengths [nm].
        gradient : bool

        Returns
        -------
        energy : numpy.ndarray, shape (n_poses,)
            [kT]
        slopes : numpy.ndarray, shape (n_poses, 6), or None
            [kT/nm], [kT/rad]
        """
        energy, slopes = np.zeros(len(poses)), np.zeros((len(poses), 6))
        for part in _chunks(len(poses)):
            table = pair_table(complex_, poses[part], lengths, gradient=gradient)
            units, pulls = self.hidden.of_pairs(table, gradient=gradient)
            out = (levels[part] @ self.out)[table.pose]
            energy[part] = table.sums((units * out).sum(axis=1)) @ np.ones(len(units))
            if table.slopes is not None:
                pull = np.stack([(p * out).sum(axis=1) for p in pulls], axis=1)
                push = (pull[:, :, None] * table.slopes).sum(axis=1)
                slopes[part] = table.sums(np.ones(len(push))) @ push
        return energy, slopes if gradient else None

    def laplacians(
        self, complex_: Complex, poses: Poses, levels: FloatArray, lengths: FloatArray
    ) -> FloatArray:
        """Sums of second derivatives of the energy over three shifts and over three turns, exact.

        Parameters
        ----------
        complex_, poses, levels, lengths
            As in :meth:`evaluate`.

        Returns
        -------
        numpy.ndarray, shape (n_poses, 2)
            [kT/nm^2], [kT/rad^2]
        """
        found = np.zeros((len(poses), 2))
        for part in _chunks(len(poses)):
            table = pair_table(complex_, poses[part], lengths, gradient=True)
            assert table.slopes is not None
            assert table.laplacians is not None
            pull, hessian = self.hidden.curvature(table, (levels[part] @ self.out)[table.pose])
            each = (pull[:, :, None] * table.laplacians).sum(axis=1)
            for k, of in enumerate((slice(0, 3), slice(3, 6))):
                slopes = table.slopes[:, :, of]
                each[:, k] += ((hessian @ slopes) * slopes).sum(axis=(1, 2))
            found[part] = table.sums(np.ones(len(each))) @ each
        return found


def _chunks(n: int) -> Iterator[slice]:
    for begin in range(0, n, CHUNK):
        yield slice(begin, min(begin + CHUNK, n))
