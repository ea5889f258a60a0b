r"""How near a pose is to the native complex: ligand RMSD, interface RMSD, native contacts, DockQ."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from .complex import Complex, FloatArray, IntArray
from .contacts import near_pairs, placed
from .poses import Poses

BACKBONE = ("N", "CA", "C", "O")
"""Atoms of interface and ligand RMSD in DockQ."""

CONTACT = 0.5
"""Distance [nm] of two heavy atoms that puts their residues in contact."""

INTERFACE_ATOMS = 1.0
"""The same for interface residues [nm]."""

RMSD_SCALE_INTERFACE, RMSD_SCALE_LIGAND = 0.15, 0.85
"""d_1 and d_2 of DockQ [nm]."""

QUALITY = ((0.80, "high"), (0.49, "medium"), (0.23, "acceptable"))
"""Lowest DockQ of every class; below the last a pose is incorrect."""


def ligand_rmsd(complex_: Complex, poses: Poses) -> FloatArray:
    r"""RMSD of the ligand's C-alpha from its native pose, the receptor in place [nm].

    .. math:: L^2 = |\tau|^2 + 2\, \mathrm{tr}[(1 - R) M], \quad M = \frac1n \sum_i (x_i - c)(x_i - c)^T

    which is exact, since c is the mean of the C-alpha.

    Raises
    ------
    InputError
        If the complex has no native pose.
    """
    _native(complex_)
    x = complex_.ligand.ca - complex_.ligand.centre
    second = x.T @ x / len(x)
    rotation, tau = poses.rotation, poses.translation
    turned = 2 * (np.trace(second) - np.einsum("nij,ij->n", rotation, second))
    return np.sqrt(np.maximum(turned, 0.0) + (tau**2).sum(axis=1))


def superposition(moving: FloatArray, fixed: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Rotation and translation that bring ``moving`` [n, 3] onto ``fixed`` with the least RMSD.

    Returns
    -------
    rotation, translation : numpy.ndarray, shape (3, 3), (3,)
        ``moving @ rotation.T + translation``.
    """
    a, b = moving.mean(axis=0), fixed.mean(axis=0)
    u, _, vt = np.linalg.svd((fixed - b).T @ (moving - a))
    rotation = u @ np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))]) @ vt
    return rotation, b - rotation @ a


def least_rmsd(moving: FloatArray, fixed: FloatArray) -> FloatArray:
    """Least RMSD [n_poses] of ``moving`` [n_poses, n, 3] from ``fixed`` [n, 3] (Kabsch)."""
    a = moving - moving.mean(axis=1, keepdims=True)
    b = fixed - fixed.mean(axis=0)
    covariance = np.swapaxes(a, 1, 2) @ b
    s = np.linalg.svd(covariance, compute_uv=False)
    s[:, 2] *= np.sign(np.linalg.det(covariance))
    square = (a**2).sum(axis=(1, 2)) + (b**2).sum() - 2 * s.sum(axis=1)
    return np.sqrt(np.maximum(square, 0.0) / len(fixed))


def dockq(fraction_native: Any, interface_rmsd: Any, ligand_rmsd_: Any) -> FloatArray:
    r"""DockQ of the three measures, between 0 and 1.

    .. math:: \mathrm{DockQ} = \frac13\left[f_{nat} + \frac{1}{1+(i/d_1)^2} + \frac{1}{1+(L/d_2)^2}\right]

    with d_1 = 0.15 nm and d_2 = 0.85 nm.

    ================ =====================
    symbol           argument
    ================ =====================
    f_nat            ``fraction_native``
    i [nm]           ``interface_rmsd``
    L [nm]           ``ligand_rmsd_``
    ================ =====================

    References
    ----------
    S. Basu and B. Wallner, DockQ: a quality measure for protein-protein docking models, PLoS ONE 11,
    e0161879 (2016), doi:10.1371/journal.pone.0161879.

    Examples
    --------
    >>> float(dockq(1.0, 0.0, 0.0))
    1.0
    >>> round(float(dockq(0.5, 0.15, 0.85)), 3)
    0.5
    """
    f, i, ligand = (np.asarray(v, dtype=np.float64) for v in (fraction_native, interface_rmsd, ligand_rmsd_))
    scaled = [
        1 / (1 + (v / d) ** 2) for v, d in ((i, RMSD_SCALE_INTERFACE), (ligand, RMSD_SCALE_LIGAND))
    ]  # fmt: skip
    return np.asarray((f + scaled[0] + scaled[1]) / 3)


def quality(dockq_: float) -> str:
    """Class of a DockQ: high, medium, acceptable or incorrect.

    Examples
    --------
    >>> quality(0.5), quality(0.1)
    ('medium', 'incorrect')
    """
    return next((name for least, name in QUALITY if dockq_ >= least), "incorrect")


@dataclass(frozen=True)
class PoseMetrics:
    """What :func:`pose_metrics` returns, each of shape (n_poses,).

    Attributes
    ----------
    ligand_rmsd : numpy.ndarray
        Over C-alpha, the receptor in place [nm].
    backbone_rmsd : numpy.ndarray
        The same over N, C-alpha, C and O: the L of DockQ [nm].
    interface_rmsd : numpy.ndarray
        Backbone of the native interface residues of both partners, superposed [nm].
    fraction_native : numpy.ndarray
        Share of the native residue contacts that are there.
    dockq : numpy.ndarray
    """

    ligand_rmsd: FloatArray
    backbone_rmsd: FloatArray
    interface_rmsd: FloatArray
    fraction_native: FloatArray
    dockq: FloatArray


def _native(complex_: Complex) -> None:
    if not complex_.native:
        raise InputError(
            f"{complex_.name}: expected a complex with a known native pose, found two partners without one; "
            "RMSD and DockQ need a structure of the complex."
        )


def _contact_pairs(complex_: Complex, cutoff: float) -> IntArray:
    """Residue pairs [n_pairs, 2] with two heavy atoms within the cutoff in pose zero."""
    receptor, ligand = complex_.receptor, complex_.ligand
    pairs = near_pairs(receptor.atoms, ligand.atoms[None], cutoff)
    two = np.stack([receptor.atom_residues[pairs.receptor], ligand.atom_residues[pairs.ligand]], axis=1)
    return np.unique(two, axis=0)


def pose_metrics(complex_: Complex, poses: Poses) -> PoseMetrics:
    """Ligand and interface RMSD, fraction of native contacts and DockQ of every pose.

    Parameters
    ----------
    complex_ : Complex
        With its native pose.
    poses : Poses

    Returns
    -------
    PoseMetrics

    Raises
    ------
    InputError
        If the complex has no native pose, or no contacts in it.

    Notes
    -----
    Contacts: two heavy atoms within 0.5 nm; interface residues: within 1 nm of the partner.
    The receptor is the partner that stays, whether or not it is the larger one.
    """
    _native(complex_)
    receptor, ligand = complex_.receptor, complex_.ligand
    contacts = _contact_pairs(complex_, CONTACT)
    interface = _contact_pairs(complex_, INTERFACE_ATOMS)
    if not len(contacts):
        raise InputError(
            f"{complex_.name}: expected native contacts (heavy atoms within {CONTACT:g} nm), found none."
        )
    n_poses = len(poses)
    atoms = placed(ligand.atoms, ligand.centre, poses)

    there = np.zeros((n_poses, len(contacts)), dtype=bool)
    near = near_pairs(receptor.atoms, atoms, CONTACT)
    code = receptor.atom_residues[near.receptor] * ligand.n_residues + ligand.atom_residues[near.ligand]
    known = contacts[:, 0] * ligand.n_residues + contacts[:, 1]
    at = np.minimum(np.searchsorted(known, code), len(known) - 1)
    hit = known[at] == code
    there[near.pose[hit], at[hit]] = True

    backbone = [np.isin(p.atom_names, BACKBONE) for p in (receptor, ligand)]
    face = [
        b & np.isin(p.atom_residues, np.unique(interface[:, k]))
        for k, (p, b) in enumerate(zip((receptor, ligand), backbone, strict=True))
    ]
    still = np.broadcast_to(receptor.atoms[face[0]], (n_poses, int(face[0].sum()), 3))
    moving = np.concatenate([still, atoms[:, face[1]]], axis=1)
    fixed = np.concatenate([receptor.atoms[face[0]], ligand.atoms[face[1]]])
    i_rmsd = least_rmsd(moving, fixed)
    whole = atoms[:, backbone[1]] - ligand.atoms[backbone[1]]
    l_rmsd = np.sqrt((whole**2).sum(axis=2).mean(axis=1))
    fraction = there.mean(axis=1)
    return PoseMetrics(
        ligand_rmsd(complex_, poses), l_rmsd, i_rmsd, fraction, dockq(fraction, i_rmsd, l_rmsd)
    )  # fmt: skip
