r"""Null scores: what a learned docking energy must beat.

Contact count, and a contact potential after Miyazawa and Jernigan. Both are scores like any other:
lower is better. The contact energies come from the contacts of structures that the caller brings;
no table is shipped.
"""

from collections.abc import Sequence

import numpy as np

from .complex import RESIDUES, Complex, FloatArray
from .contacts import CB, count_pairs, near_pairs, placed
from .poses import Poses

N_TYPES = len(RESIDUES)

NULL_CUTOFF = 1.0
"""C-beta distance of a contact in the null scores [nm]: of 0.65, 0.8 and 1.0 the one at which both nulls
are strongest on the training complexes."""

PSEUDO_COUNT = 20.0
"""Contacts added to every pair of types, of what chance expects."""


def contact_numbers(
    points: Sequence[tuple[FloatArray, FloatArray]], complexes: Sequence[Complex], cutoff: float, apart: int
) -> tuple[FloatArray, FloatArray, list[list[int]]]:
    """Contacts within and between the partners.

    Parameters
    ----------
    points : sequence of (numpy.ndarray, numpy.ndarray)
        One point of every residue, receptor and ligand of each complex [nm].
    complexes : sequence of Complex
    cutoff : float
        [nm]
    apart : int
        Least number of residues from one to the other along a chain.

    Returns
    -------
    contacts : numpy.ndarray, shape (20, 20)
        n_ab, symmetric; a pair of one type counts twice on the diagonal.
    residues : numpy.ndarray, shape (20,)
        How often each type occurs.
    around : list of list of int
        For every type, the number of neighbours of each such residue in its own chain.
    """
    contacts, residues = np.zeros((N_TYPES, N_TYPES)), np.zeros(N_TYPES)
    around: list[list[int]] = [[] for _ in range(N_TYPES)]
    for one, (receptor, ligand) in zip(complexes, points, strict=True):
        for partner, x in ((one.receptor, receptor), (one.ligand, ligand)):
            order = np.arange(len(x))
            near = np.linalg.norm(x[:, None] - x, axis=-1) < cutoff
            near &= np.abs(order[:, None] - order) >= apart
            i, j = np.nonzero(near)
            np.add.at(contacts, (partner.types[i], partner.types[j]), 1.0)
            residues += np.bincount(partner.types, minlength=N_TYPES)
            for kind, n in zip(partner.types, near.sum(axis=1), strict=True):
                around[kind].append(int(n))
        if one.native:
            pairs = near_pairs(receptor, ligand[None], cutoff)
            a, b = one.receptor.types[pairs.receptor], one.ligand.types[pairs.ligand]
            np.add.at(contacts, (a, b), 1.0)
            np.add.at(contacts, (b, a), 1.0)
    return contacts, residues, around


def statistical_contacts(
    points: Sequence[tuple[FloatArray, FloatArray]], complexes: Sequence[Complex], cutoff: float = 0.7
) -> FloatArray:
    r"""Contact energies relative to chance: e_ab = -ln(n_ab / (N x_a x_b)), shape (20, 20) [kT].

    x_a is the share of type a in all contacts, N their number. The ``contact`` term of the residue model.
    """
    n, _, _ = contact_numbers(points, complexes, cutoff, 4)
    share = n.sum(axis=1) / max(n.sum(), 1.0)
    chance = n.sum() * np.outer(share, share)
    return -np.log((n + PSEUDO_COUNT) / (chance + PSEUDO_COUNT))


def miyazawa_jernigan(complexes: Sequence[Complex], cutoff: float = NULL_CUTOFF) -> FloatArray:
    r"""Contact energies in the quasi-chemical approximation, with solvent, from given structures.

    .. math:: e_{ab} = -\ln \frac{n_{ab}\, n_{00}}{n_{a0}\, n_{b0}}, \qquad
              n_{a0} = q_a n_a - \sum_b n_{ab}

    the energy of a contact of a and b that replaces one of each with solvent. n_ab counts contacts of
    C-beta within and between the chains; q_a is the coordination number of type a, the 90th percentile
    of its neighbours (at least a twentieth of the q_a n_a places are taken to be solvent); n_00 is the
    number of contacts with solvent in all.

    Parameters
    ----------
    complexes : sequence of Complex
        Training structures.
    cutoff : float
        [nm]

    Returns
    -------
    numpy.ndarray, shape (20, 20)
        [kT], symmetric.

    References
    ----------
    S. Miyazawa and R. L. Jernigan, Estimation of effective interresidue contact energies from protein
    crystal structures: quasi-chemical approximation, Macromolecules 18, 534 (1985),
    doi:10.1021/ma00145a039.
    """
    points = [(c.receptor.sites[:, CB], c.ligand.sites[:, CB]) for c in complexes]
    n, residues, around = contact_numbers(points, complexes, cutoff, 3)
    places = np.array([np.percentile(v, 90) if v else 1.0 for v in around]) * np.maximum(residues, 1.0)
    solvent = np.maximum(places - n.sum(axis=1), 0.05 * places)
    chance = np.outer(solvent, solvent) / solvent.sum()
    return -np.log((n + PSEUDO_COUNT / 4 * chance / chance.mean()) / chance)


def contact_count_score(complex_: Complex, poses: Poses, cutoff: float = NULL_CUTOFF) -> FloatArray:
    """Minus the number of C-beta pairs within the cutoff, shape (n_poses,)."""
    ligand = placed(complex_.ligand.sites[:, CB], complex_.ligand.centre, poses)
    return -count_pairs(complex_.receptor.sites[:, CB], ligand, cutoff).astype(np.float64)


def contact_energy_score(
    complex_: Complex, poses: Poses, energies: FloatArray, cutoff: float = NULL_CUTOFF
) -> FloatArray:
    """Sum of contact energies [kT] of the C-beta pairs within the cutoff, shape (n_poses,)."""
    ligand = placed(complex_.ligand.sites[:, CB], complex_.ligand.centre, poses)
    pairs = near_pairs(complex_.receptor.sites[:, CB], ligand, cutoff)
    e = energies[complex_.receptor.types[pairs.receptor], complex_.ligand.types[pairs.ligand]]
    return np.bincount(pairs.pose, e, minlength=len(poses)).astype(np.float64)
