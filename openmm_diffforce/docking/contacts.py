"""Which residues of receptor and ligand are near each other, in many poses at once."""

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from .complex import FloatArray, IntArray, Partner
from .poses import Poses

CA, CB = 1, 3
"""Columns of ``Partner.sites``."""


def placed(points: FloatArray, centre: FloatArray, poses: Poses) -> FloatArray:
    """Points of the ligand in every pose: R (x - c) + c + tau.

    Parameters
    ----------
    points : numpy.ndarray, shape (..., 3)
    centre : numpy.ndarray, shape (3,)
    poses : Poses

    Returns
    -------
    numpy.ndarray, shape (n_poses, ..., 3)
    """
    rotation, translation = poses.rotation, poses.translation
    flat = (points - centre).reshape(-1, 3)
    moved = flat @ np.swapaxes(rotation, 1, 2) + (centre + translation)[:, None]
    return moved.reshape(len(rotation), *points.shape)


@dataclass(frozen=True)
class NearPairs:
    """Pairs of one point of the receptor and one of the ligand within a cutoff.

    Attributes
    ----------
    pose, receptor, ligand : numpy.ndarray of int, shape (n_pairs,)
    distance : numpy.ndarray, shape (n_pairs,)
        [nm]
    """

    pose: IntArray
    receptor: IntArray
    ligand: IntArray
    distance: FloatArray


def near_pairs(receptor: FloatArray, ligand: FloatArray, cutoff: float) -> NearPairs:
    """Pairs nearer than ``cutoff`` of receptor points [n, 3] and posed ligand points [n_poses, m, 3], nm."""
    m = ligand.shape[1]
    found = cKDTree(receptor).sparse_distance_matrix(
        cKDTree(ligand.reshape(-1, 3)), cutoff, output_type="ndarray"
    )  # fmt: skip
    pose, j = np.divmod(found["j"].astype(np.int64), m)
    return NearPairs(pose, found["i"].astype(np.int64), j, found["v"])


def count_pairs(receptor: FloatArray, ligand: FloatArray, cutoff: float) -> IntArray:
    """Number of such pairs in every pose."""
    pairs = near_pairs(receptor, ligand, cutoff)
    return np.bincount(pairs.pose, minlength=len(ligand))


def clash_counts(receptor: cKDTree, ligand_sites: FloatArray, cutoff: float) -> IntArray:
    """Ligand residues of which C-alpha or C-beta is nearer than ``cutoff`` [nm] to one of the receptor.

    Parameters
    ----------
    receptor : scipy.spatial.cKDTree
        :func:`clash_tree`.
    ligand_sites : numpy.ndarray, shape (n_poses, n_residues, 4, 3)
        Posed sites of the ligand.
    cutoff : float

    Returns
    -------
    numpy.ndarray of int, shape (n_poses,)
    """
    points = ligand_sites[:, :, [CA, CB]]
    nearest, _ = receptor.query(points.reshape(-1, 3), distance_upper_bound=cutoff)
    return np.isfinite(nearest).reshape(*points.shape[:3]).any(axis=2).sum(axis=1)


def clash_tree(receptor: Partner) -> cKDTree:
    """Its C-alpha and C-beta."""
    return cKDTree(receptor.sites[:, [CA, CB]].reshape(-1, 3))
