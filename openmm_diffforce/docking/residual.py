r"""A network between residues that corrects the closed form: what pair splines cannot say.

.. math:: S(\mathrm{pose}, \sigma) = S_{closed}(\mathrm{pose}, \sigma)
          + \sum_{i \in R} \sum_{j \in L} w(d_{ij})
          \left[f_\theta(x_{ij}, z_i, z_j) + f_\theta(x_{ij}, z_j, z_i)\right]_\sigma,
          \qquad w(d) = (1 - d^2 / r_c^2)^3

over pairs with a C-beta distance d below r_c. The network f sees a pair as

====== ==========================================================================================
symbol what it is
====== ==========================================================================================
x_ij   bumps of the C-beta, C-alpha and side-chain distances, and the cosine between the directions
       C-alpha to C-beta of both residues
z_i    the cosine of that direction of i with the direction to j, the burial of i in its own partner,
       and :data:`DESCRIPTORS` of its type
====== ==========================================================================================

has two hidden layers and one output for each noise level. Burial is the number of C-alpha within 1.3 nm on
the side chain's side (half-sphere exposure): a constant of a rigid partner. Everything is a function of
distances and angles within the complex, so that frames do not matter, and the sum over both orders makes
the partners equal. It is an energy: scores are its derivatives. Everything is in nm, rad and kT.

References
----------
T. Hamelryck, An amino acid has two sides: a new 2D measure provides a different view of solvent exposure,
2005, doi:10.1002/prot.20379.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .complex import RESIDUES, Complex, FloatArray, IntArray, Partner
from .contacts import near_pairs, placed
from .residue_model import CHARGES, site_points
from .rigid import Poses

CUTOFF = 1.2
"""r_c: C-beta distance from which a pair adds nothing [nm]."""

BUMPS = {"cb": (0.35, 0.16, 6), "ca": (0.40, 0.18, 6), "sc": (0.30, 0.18, 6)}
"""First centre and spacing [nm] and number of the Gaussian bumps of a distance; a bump's width is the
spacing."""

SPHERE = 1.3
"""Radius of the half sphere of the burial [nm]."""

_HYDROPATHY = {
    "ALA": 1.8, "ARG": -4.5, "ASN": -3.5, "ASP": -3.5, "CYS": 2.5, "GLN": -3.5, "GLU": -3.5, "GLY": -0.4,
    "HIS": -3.2, "ILE": 4.5, "LEU": 3.8, "LYS": -3.9, "MET": 1.9, "PHE": 2.8, "PRO": -1.6, "SER": -0.8,
    "THR": -0.7, "TRP": -0.9, "TYR": -1.3, "VAL": 4.2,
}  # fmt: skip
_SIDE_ATOMS = {
    "ALA": 1, "ARG": 7, "ASN": 4, "ASP": 4, "CYS": 2, "GLN": 5, "GLU": 5, "GLY": 0, "HIS": 6, "ILE": 4,
    "LEU": 4, "LYS": 5, "MET": 4, "PHE": 7, "PRO": 3, "SER": 2, "THR": 3, "TRP": 10, "TYR": 8, "VAL": 3,
}  # fmt: skip
_AROMATIC = frozenset({"HIS", "PHE", "TRP", "TYR"})

DESCRIPTORS: FloatArray = np.array(
    [[CHARGES[k], _HYDROPATHY[r] / 3, (_SIDE_ATOMS[r] - 4) / 3, float(r in _AROMATIC)]
     for k, r in enumerate(RESIDUES)]
)  # fmt: skip
"""Charge, hydropathy (Kyte and Doolittle), size and aromaticity of a residue type, shape (20, 4)."""

N_RAW = 6
"""Three distances and three cosines of a pair."""

N_SHAPE = sum(n for _, _, n in BUMPS.values()) + 1
N_OWN = 2 + DESCRIPTORS.shape[1]
"""Inputs that belong to a pair, and to one residue of it."""

OUTPUT_SCALE = 0.1
"""The energy of a pair in units of the network's output [kT]: some hundred pairs make a pose."""

CHUNK = 64
"""Poses in one pass of the network."""


def weight_shapes(width: int, n_levels: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the network's arrays."""
    return {
        "shape": (N_SHAPE, width), "first": (N_OWN, width), "second": (N_OWN, width), "bias": (width,),
        "hidden": (width, width), "hidden_bias": (width,), "out": (width, n_levels),
    }  # fmt: skip


def _directions(partner: Partner) -> FloatArray:
    """Unit vectors from C-alpha to C-beta; zero where a C-beta could not be placed."""
    ray = partner.sites[:, 3] - partner.ca
    return ray / np.maximum(np.linalg.norm(ray, axis=1, keepdims=True), 1e-9)


def burial(partner: Partner) -> FloatArray:
    """C-alpha of the partner within 1.3 nm of each residue's, on the side of its C-beta."""
    away = partner.ca - partner.ca[:, None]
    distance = np.linalg.norm(away, axis=2)
    above = np.einsum("ijk,ik->ij", away, _directions(partner)) > 0
    return np.asarray((above & (distance < SPHERE)).sum(axis=1), dtype=np.float64)


def _own(partner: Partner) -> FloatArray:
    """What a residue brings whatever the pose, shape (n_residues, N_OWN - 1)."""
    return np.column_stack([(burial(partner) - 15) / 8, DESCRIPTORS[partner.types]])


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
    """

    start: IntArray
    raw: FloatArray
    receptor: IntArray
    ligand: IntArray
    receptor_own: FloatArray
    ligand_own: FloatArray
    slopes: FloatArray | None

    @property
    def pose(self) -> IntArray:
        """Pose of every pair, shape (n_pairs,)."""
        return np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))


def pair_table(complex_: Complex, poses: Poses, lengths: FloatArray, *, gradient: bool) -> PairTable:
    """Pairs of a complex in its poses.

    Parameters
    ----------
    complex_ : Complex
    poses : Poses
    lengths : numpy.ndarray, shape (20,)
        :func:`~.residue_model.side_chain_lengths`.
    gradient : bool
        Whether ``slopes`` are asked for.

    Returns
    -------
    PairTable
    """
    receptor, ligand, c = complex_.receptor, complex_.ligand, complex_.ligand.centre
    moved = placed(ligand.sites[:, 3], c, poses)
    found = near_pairs(receptor.sites[:, 3], moved, CUTOFF)
    order = np.lexsort((found.ligand, found.receptor, found.pose))
    pose, i, j = found.pose[order], found.receptor[order], found.ligand[order]
    middle = (c + poses.translation)[pose]
    raw, slopes = np.empty((len(pose), N_RAW)), np.zeros((len(pose), N_RAW, 6))
    for k, site in enumerate(BUMPS):
        x = placed(site_points(ligand, site, lengths), c, poses)[pose, j]
        away = x - site_points(receptor, site, lengths)[i]
        raw[:, k] = np.linalg.norm(away, axis=1)
        unit = away / np.maximum(raw[:, k], 1e-9)[:, None]
        if k == 0:
            n, arm, distance = unit, x - middle, np.maximum(raw[:, 0], 1e-9)[:, None]
        if gradient:
            slopes[:, k] = np.concatenate([unit, np.cross(x - middle, unit)], axis=1)
    u = _directions(receptor)[i]
    v = (_directions(ligand) @ np.swapaxes(poses.rotation, 1, 2))[pose, j]
    raw[:, 3], raw[:, 4], raw[:, 5] = (u * n).sum(axis=1), -(v * n).sum(axis=1), (u * v).sum(axis=1)
    if gradient:
        # n turns by the part of a displacement across it, v with the ligand.
        for k, (sign, w) in enumerate(((1, u), (-1, v)), start=3):
            across = (sign * w - raw[:, k : k + 1] * n) / distance
            slopes[:, k] = np.concatenate([across, np.cross(arm, across)], axis=1)
        slopes[:, 4, 3:] -= np.cross(v, n)
        slopes[:, 5, 3:] = np.cross(v, u)
    start = np.searchsorted(pose, np.arange(len(poses) + 1))
    return PairTable(start, raw, i, j, _own(receptor), _own(ligand), slopes if gradient else None)


def pair_energies(weights: Mapping[str, Any], raw: Any, receptor: Any, ligand: Any) -> Any:
    """Energies of pairs at every noise level, in torch.

    Parameters
    ----------
    weights : mapping of str to torch.Tensor
        :func:`weight_shapes`.
    raw : torch.Tensor, shape (n_pairs, 6)
    receptor, ligand : torch.Tensor, shape (n_pairs, N_OWN - 1)
        What either residue brings.

    Returns
    -------
    torch.Tensor, shape (n_pairs, n_levels)
        [kT]
    """
    import torch

    silu = torch.nn.functional.silu
    parts = []
    for k, (low, step, n) in enumerate(BUMPS.values()):
        centres = low + step * torch.arange(n, dtype=raw.dtype)
        parts.append(torch.exp(-0.5 * ((raw[:, k : k + 1] - centres) / step) ** 2))
    parts.append(raw[:, 5:6])
    shape = torch.cat(parts, dim=1) @ weights["shape"] + weights["bias"]
    one = torch.cat([raw[:, 3:4], receptor], dim=1)
    other = torch.cat([raw[:, 4:5], ligand], dim=1)
    total = 0.0
    for a, b in ((one, other), (other, one)):
        h = silu(shape + a @ weights["first"] + b @ weights["second"])
        total = total + silu(h @ weights["hidden"] + weights["hidden_bias"])
    fade = (1 - (raw[:, :1] / CUTOFF) ** 2).clamp(min=0.0) ** 3
    return OUTPUT_SCALE * fade * (total @ weights["out"])


@dataclass(frozen=True)
class Residual:
    """A trained network; :class:`~.residue_model.ResidueModel` adds it to its closed form.

    Attributes
    ----------
    weights : dict
        Name -> numpy.ndarray; :func:`weight_shapes`.
    """

    weights: dict[str, FloatArray]

    @property
    def width(self) -> int:
        """Hidden units of a layer."""
        return len(self.weights["bias"])

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
        import torch

        weights = {k: torch.as_tensor(v, dtype=torch.float64) for k, v in self.weights.items()}
        energy, slopes = np.zeros(len(poses)), np.zeros((len(poses), 6))
        for part in _chunks(len(poses)):
            table = pair_table(complex_, poses[part], lengths, gradient=gradient)
            pose, n = table.pose, len(table.start) - 1
            raw = torch.as_tensor(table.raw).requires_grad_(gradient)
            own = [torch.as_tensor(v) for v in (table.receptor_own[table.receptor],
                                                table.ligand_own[table.ligand])]  # fmt: skip
            with torch.set_grad_enabled(gradient):
                u = (pair_energies(weights, raw, *own) * torch.as_tensor(levels[part][pose])).sum(dim=1)
            energy[part] = np.bincount(pose, u.detach().numpy(), minlength=n)
            if table.slopes is not None:
                (pull,) = torch.autograd.grad(u.sum(), raw)
                push = np.einsum("pr,prq->qp", pull.numpy(), table.slopes)
                slopes[part] = np.stack([np.bincount(pose, p, minlength=n) for p in push], axis=1)
        return energy, slopes if gradient else None


def _chunks(n: int) -> Iterator[slice]:
    for begin in range(0, n, CHUNK):
        yield slice(begin, min(begin + CHUNK, n))
