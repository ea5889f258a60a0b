r"""Decoys: poses of the ligand at known distances from the native one, all without clashes, all touching.

One protocol for every score. A ligand RMSD is drawn, a random share of its square is given to a turn
about a random axis through the ligand's centre and the rest to a shift in a random direction; then the
ligand slides along the line between the centres until it touches, and back by a gap of up to 0.1 nm. So
every decoy is as close as its shape allows, native-like or not, and clashes or gaps tell nothing.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConvergenceError, InputError
from .complex import Complex, FloatArray
from .contacts import CB, clash_counts, clash_tree, count_pairs, placed
from .metrics import ligand_rmsd
from .poses import Poses
from .so3 import exp, random_rotations

CLASH_DISTANCE = 0.4
"""A C-alpha or C-beta of the ligand nearer than this [nm] to one of the receptor is a clash."""

MAX_CLASHES = 3
"""Ligand residues that may clash in a decoy: as many as do in native complexes at this distance."""

CONTACT_DISTANCE = 0.8
"""C-beta distance [nm] of a contact."""

MIN_CONTACTS = 10
"""Contacts that a decoy must have."""

SLIDE_STEP, SLIDE_RANGE = 0.05, 1.0
"""Step and largest length of the slide [nm]."""

MAX_GAP = 0.1
"""From where it touches every pose is drawn back by a length uniform up to this [nm]."""

NATIVE = 0.02
"""Ligand RMSD [nm] below which a pose is the native one, and left out."""

_BATCH = 256
_MAX_BATCHES = 60
_UNSLID_BATCHES = 20


@dataclass(frozen=True)
class Decoys:
    """Poses of one complex.

    Attributes
    ----------
    poses : Poses
    rmsd : numpy.ndarray, shape (n_decoys,)
        Ligand RMSD over C-alpha, the receptor in place [nm].
    near_rmsd : float
        A decoy at most this far from the native pose is near-native [nm].
    seed : tuple of int
    """

    poses: Poses
    rmsd: FloatArray
    near_rmsd: float
    seed: tuple[int, ...]

    @property
    def near(self) -> Any:
        """Which decoys are near-native."""
        return self.rmsd <= self.near_rmsd

    def every(self, k: int) -> "Decoys":
        """Every k-th of them, in the order of their RMSD."""
        return Decoys(self.poses[::k], self.rmsd[::k], self.near_rmsd, self.seed)


def _directions(n: int, generator: np.random.Generator) -> FloatArray:
    v = generator.standard_normal((n, 3))
    return v / np.linalg.norm(v, axis=1, keepdims=True)


def _proposals(complex_: Complex, target: FloatArray, generator: np.random.Generator) -> Poses:
    """Poses of given ligand RMSD, before the slide."""
    n, ligand = len(target), complex_.ligand
    x = ligand.ca - ligand.centre
    axis, share = _directions(n, generator), generator.uniform(size=n)
    # A turn by w about n moves the C-alpha by 2 sin(w/2) times their rms distance from the axis.
    radius = np.sqrt((x**2).sum(axis=1).mean() - ((axis @ x.T) ** 2).mean(axis=1))
    sine = np.minimum(target * np.sqrt(share) / (2 * np.maximum(radius, 1e-9)), 1.0)
    turned = 2 * radius * sine
    shift = np.sqrt(np.maximum(target**2 - turned**2, 0.0))
    return Poses(
        rotation=exp(2 * np.arcsin(sine)[:, None] * axis),
        translation=shift[:, None] * _directions(n, generator),
    )


def slide_to_contact(complex_: Complex, poses: Poses, generator: np.random.Generator) -> tuple[Poses, Any]:
    """Move the ligand along the line of the centres until it touches, and back by a random gap.

    Returns
    -------
    poses : Poses
        Up to :data:`MAX_GAP` from where a further step would clash.
    good : numpy.ndarray of bool
        Whether that place was found within 1 nm, is free of clashes and has enough contacts.
    """
    ligand, receptor = complex_.ligand, complex_.receptor
    rotation, tau = poses.rotation, poses.translation.copy()
    sites = placed(ligand.sites, ligand.centre, poses)
    out = ligand.centre + tau - receptor.centre
    out /= np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)
    moved = np.zeros(len(tau))
    tree = clash_tree(receptor)
    outward = clash_counts(tree, sites, CLASH_DISTANCE) > MAX_CLASHES
    done = np.zeros(len(tau), dtype=bool)
    for _ in range(round(SLIDE_RANGE / SLIDE_STEP)):
        todo = np.flatnonzero(~done)
        if not len(todo):
            break
        step = np.where(outward[todo], SLIDE_STEP, -SLIDE_STEP)
        trial = sites[todo] + ((moved[todo] + step)[:, None] * out[todo])[:, None, None]
        now = clash_counts(tree, trial, CLASH_DISTANCE) > MAX_CLASHES
        # Outward: stop at the first place that is free. Inward: stop before the first that is not.
        take = outward[todo] | ~now
        moved[todo[take]] += step[take]
        done[todo] = np.where(outward[todo], ~now, now)
    moved += generator.uniform(0.0, MAX_GAP, len(moved))
    tau += moved[:, None] * out
    sites += (moved[:, None] * out)[:, None, None]
    contacts = count_pairs(receptor.sites[:, CB], sites[:, :, CB], CONTACT_DISTANCE)
    free = clash_counts(tree, sites, CLASH_DISTANCE) <= MAX_CLASHES
    return Poses(rotation=rotation, translation=tau), done & free & (contacts >= MIN_CONTACTS)


def _allowed(complex_: Complex, poses: Poses) -> Any:
    """Which poses are free of clashes and have enough contacts."""
    ligand, receptor = complex_.ligand, complex_.receptor
    sites = placed(ligand.sites, ligand.centre, poses)
    free = clash_counts(clash_tree(receptor), sites, CLASH_DISTANCE) <= MAX_CLASHES
    return free & (
        count_pairs(receptor.sites[:, CB], sites[:, :, CB], CONTACT_DISTANCE) >= MIN_CONTACTS
    )  # fmt: skip


def make_decoys(
    complex_: Complex,
    n_decoys: int = 200,
    *,
    seed: int,
    near_share: float = 0.05,
    near_rmsd: float = 0.5,
    max_rmsd: float = 3.0,
) -> Decoys:
    """Decoys of a complex by the protocol of this module.

    Parameters
    ----------
    complex_ : Complex
        With its native pose.
    n_decoys : int
    seed : int
        Every random number follows from it and from the name of the complex.
    near_share : float
        Share of decoys with a ligand RMSD of at most ``near_rmsd`` (at least one).
    near_rmsd, max_rmsd : float
        [nm]; RMSDs are uniform up to ``near_rmsd``, and uniform from there to ``max_rmsd``: each range
        is cut into as many equal parts as it has decoys, and every part gets one.

    Returns
    -------
    Decoys
        In the order of their RMSD; the native pose is not among them.

    Raises
    ------
    InputError
        If a number makes no sense, or the complex has no native pose.
    ConvergenceError
        If some RMSDs cannot be reached without clashes and with contacts.

    Notes
    -----
    Deterministic. Where no slide ends in a part (a native interface may be looser than any slide leaves it),
    a pose that is allowed without one is taken. At most :data:`MAX_CLASHES` residues clash, and at
    least :data:`MIN_CONTACTS` are in contact.
    """
    if not complex_.native:
        raise InputError(
            f"decoys of {complex_.name}: expected a complex with a known native pose, found two partners "
            "without one; give one file with both partners, or poses of your own."
        )
    numbers = (near_share, near_rmsd, max_rmsd)
    if not (
        isinstance(n_decoys, int) and n_decoys >= 2 and np.isfinite(numbers).all() and 0 < near_share < 1
        and NATIVE < near_rmsd < max_rmsd
    ):  # fmt: skip
        raise InputError(
            f"decoys: expected n_decoys >= 2, 0 < near_share < 1 and {NATIVE} < near_rmsd < max_rmsd, found "
            f"{n_decoys!r}, {near_share!r}, {near_rmsd!r}, {max_rmsd!r}."
        )
    entropy = (int(seed), *complex_.name.encode())
    generator = np.random.default_rng(entropy)
    n_near = max(1, round(near_share * n_decoys))
    edges = np.concatenate(
        [
            np.linspace(NATIVE, near_rmsd, n_near + 1)[:-1],
            np.linspace(near_rmsd, max_rmsd, n_decoys - n_near + 1),
        ]
    )
    rotation, tau = np.zeros((n_decoys, 3, 3)), np.zeros((n_decoys, 3))
    rmsd = np.full(n_decoys, np.nan)
    for batch in range(_MAX_BATCHES + _UNSLID_BATCHES):
        empty = np.flatnonzero(np.isnan(rmsd))
        if not len(empty):
            break
        part = generator.choice(empty, _BATCH)
        proposed = _proposals(complex_, generator.uniform(edges[part], edges[part + 1]), generator)
        if batch < _MAX_BATCHES:
            poses, good = slide_to_contact(complex_, proposed, generator)
        else:
            poses, good = proposed, _allowed(complex_, proposed)
        found = ligand_rmsd(complex_, poses)
        where = np.searchsorted(edges, found, side="right") - 1
        for k in np.flatnonzero(good & (found >= NATIVE) & (found < max_rmsd)):
            if np.isnan(rmsd[where[k]]):
                rmsd[where[k]], tau[where[k]] = found[k], poses.translation[k]
                rotation[where[k]] = poses.rotation[k]
    if len(empty := np.flatnonzero(np.isnan(rmsd))):
        raise ConvergenceError(
            f"decoys of {complex_.name}: expected a decoy in each of {n_decoys} parts of the RMSD range, "
            f"found none in {len(empty)}, e.g. {edges[empty[0]]:.2f} to {edges[empty[0] + 1]:.2f} nm, in "
            f"{(_MAX_BATCHES + _UNSLID_BATCHES) * _BATCH} tries; ask for fewer decoys, or for "
            "a smaller max_rmsd."
        )
    return Decoys(Poses(rotation=rotation, translation=tau), rmsd, near_rmsd, entropy)


def reposed(complex_: Complex, poses: Poses, generator: np.random.Generator) -> tuple[Complex, Poses]:
    """The same complex and poses in frames that give nothing away.

    The receptor, and with it every pose, is turned and shifted at random; the ligand's own coordinates
    (pose zero) are turned and shifted at random too, and the poses written relative to them. The
    positions of ligand and receptor relative to each other stay.
    """
    a, b = random_rotations(2, generator)
    shift, away = generator.normal(scale=5.0, size=(2, 3))
    c = complex_.ligand.centre
    receptor = complex_.receptor
    # World: x -> a (x - centre of the receptor) + shift.
    moved = receptor.moved(a, shift - receptor.centre)
    ligand = complex_.ligand.moved(b, away - c)
    rotation = a @ poses.rotation @ b.T
    translation = (c + poses.translation - receptor.centre) @ a.T + shift - away
    renamed = Complex(complex_.name, moved, ligand, native=False, notes=complex_.notes)
    return renamed, Poses(rotation=rotation, translation=translation)
