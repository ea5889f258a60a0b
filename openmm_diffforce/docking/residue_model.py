r"""A docking energy between residues: pair splines, conservative, linear in their coefficients.

.. math:: S(\mathrm{pose}, t) = \sum_{i \in R} \sum_{j \in L} \sum_s u^s_{a_i a_j}(d^s_{ij};\, \sigma_t)

over three distances s of a pair: C-beta to C-beta, C-alpha to C-alpha, and between side-chain centres (means
of the side chain's heavy atoms; where some are missing, a point on the ray from C-alpha through C-beta at the
mean distance of the residue type). Every u is a cubic B-spline that ends smoothly at its cutoff, and its
coefficients are tied:

============ ========================================== ===========================================
term         u_ab(d)                                    what it can say
============ ========================================== ===========================================
``cb``       c(d)                                       shape, contacts, overlap
``sc``       c(d)                                       the same for side chains
``ca``       c(d)                                       the same for the backbone
``residue``  h_a(d) + h_b(d)                            which residues like to be in an interface
``class``    k_AB(d), A and B classes of residues       which of them like each other
``charge``   q_a q_b g(d)                               salt bridges
``contact``  e_ab m(d)                                  a statistical potential, e from training structures
============ ========================================== ===========================================

Everything is in nm, rad and kT.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..errors import InputError
from .complex import RESIDUES, Complex, FloatArray, IntArray, Partner
from .contacts import near_pairs, placed
from .poses import Poses
from .rigid import RigidSchedule

N_TYPES = len(RESIDUES)

CHARGES = np.array([{"ARG": 1.0, "LYS": 1.0, "ASP": -1.0, "GLU": -1.0}.get(r, 0.0) for r in RESIDUES])
"""Formal charge of a residue type [e]."""

CLASSES = (
    ("ILE", "LEU", "MET", "VAL"), ("PHE", "TRP", "TYR"), ("ASN", "GLN", "HIS", "SER", "THR"),
    ("ARG", "LYS"), ("ASP", "GLU"), ("ALA", "CYS", "GLY", "PRO"),
)  # fmt: skip
"""Classes of residue types: aliphatic, aromatic, polar, positive, negative, small."""


def _pair_classes() -> IntArray:
    of = {name: k for k, names in enumerate(CLASSES) for name in names}
    kind = np.array([of[name] for name in RESIDUES])
    low, high = np.minimum(kind[:, None], kind), np.maximum(kind[:, None], kind)
    return np.unique(low * len(CLASSES) + high, return_inverse=True)[1].reshape(N_TYPES, N_TYPES)


PAIR_CLASSES = _pair_classes()
"""Index of the pair of classes of two residue types, shape (20, 20)."""

HEAD_SIGMAS = (0.05, 0.1, 0.2, 0.4)
"""Noise levels [nm] whose energies are averaged in the energy head: low ones know the details of the
interface, high ones the way to it. Chosen by cross-validation on training complexes."""


@dataclass(frozen=True)
class Spline:
    """Uniform cubic B-splines on [low, low + step * n): the last ones end at the cutoff with zero slope.

    Attributes
    ----------
    low, step : float
        [nm]
    n : int
        Number of functions; function k lives on the four intervals that begin at low + (k - 3) step.
    """

    low: float
    step: float
    n: int

    @property
    def cutoff(self) -> float:
        """Distance from which every function is zero [nm]."""
        return self.low + self.step * self.n

    def bends(self, d: FloatArray) -> FloatArray:
        """Second derivatives [n, 4] of the same functions as :meth:`weights`."""
        u = np.clip((d - self.low) / self.step, 0.0, self.n - 1e-12)
        x = u - np.floor(u)
        y = 1 - x
        inside = ((d >= self.low) & (d < self.cutoff)) / self.step**2
        return np.stack([y, 3 * x - 2, 3 * y - 2, x], axis=1) * inside[:, None]

    def weights(self, d: FloatArray) -> tuple[IntArray, FloatArray, FloatArray]:
        """First function, values [n, 4] and derivatives [n, 4] of the functions that are not zero at d.

        Functions ``first`` to ``first + 3``; those with an index of ``n`` or more are the ones left out
        so that the sum ends smoothly, and belong to a row of zeros. Below ``low`` the values of ``low``
        hold, with derivatives 0.
        """
        u = np.clip((d - self.low) / self.step, 0.0, self.n - 1e-12)
        first = u.astype(np.int64)
        x = u - first
        inside = ((d >= self.low) & (d < self.cutoff)) / self.step
        y = 1 - x
        value = np.stack(
            [y**3, 3 * x**3 - 6 * x**2 + 4, 3 * y**3 - 6 * y**2 + 4, x**3], axis=1
        ) / 6  # fmt: skip
        slope = np.stack([-(y**2), 3 * x**2 - 4 * x, -(3 * y**2 - 4 * y), x**2], axis=1) / 2
        return first, value, slope * inside[:, None]


@dataclass(frozen=True)
class Term:
    """One term of the energy: which distance, which spline, how tied.

    Attributes
    ----------
    name : str
    site : {"cb", "ca", "sc"}
    spline : Spline
    tie : {"all", "residue", "class", "charge", "contact"}
    weight : float
        Prior standard deviation of the term, in units of what the prior's strength says.
    """

    name: str
    site: str
    spline: Spline
    tie: str
    weight: float

    @property
    def n_classes(self) -> int:
        """Number of curves."""
        return {"residue": N_TYPES, "class": int(PAIR_CLASSES.max()) + 1}.get(self.tie, 1)

    @property
    def n_coefs(self) -> int:
        """Number of coefficients."""
        return self.n_classes * self.spline.n


TERMS = (
    Term("cb", "cb", Spline(0.0, 0.1, 14), "all", 1.0),
    Term("sc", "sc", Spline(0.0, 0.1, 14), "all", 1.0),
    Term("ca", "ca", Spline(0.0, 0.1, 16), "all", 1.0),
    Term("residue", "sc", Spline(0.0, 0.3, 4), "residue", 0.3),
    Term("class", "sc", Spline(0.0, 0.2, 5), "class", 0.3),
    Term("charge", "sc", Spline(0.0, 0.2, 7), "charge", 0.3),
    Term("contact", "sc", Spline(0.0, 0.2, 5), "contact", 0.3),
)
"""The energy's terms. Knots of a site's coarser splines are knots of its finest one."""

SITES: dict[str, Spline] = {t.site: t.spline for t in TERMS if t.tie == "all"}
"""The finest spline of every site, in which tables are written."""


def side_chain_lengths(partners: Sequence[Partner]) -> FloatArray:
    """Mean distance of the side chain's centre along C-alpha to C-beta, per residue type [nm], shape (20,).

    Types that do not occur get the mean of the others.
    """
    total, count = np.zeros(N_TYPES), np.zeros(N_TYPES)
    for p in partners:
        centre, whole = p.side_chains
        ray = p.sites[:, 3] - p.ca
        has = whole & (np.linalg.norm(ray, axis=1) > 0)
        along = ((centre - p.ca) * ray)[has].sum(axis=1) / np.linalg.norm(ray[has], axis=1)
        total += np.bincount(p.types[has], along, minlength=N_TYPES)
        count += np.bincount(p.types[has], minlength=N_TYPES)
    glycine = RESIDUES.index("GLY")
    count[glycine] = 0
    mean = total[count > 0].sum() / max(count.sum(), 1)
    lengths = np.where(count > 0, total / np.maximum(count, 1), mean)
    lengths[glycine] = 0.0
    return lengths


def site_points(partner: Partner, site: str, lengths: FloatArray) -> FloatArray:
    """C-beta, C-alpha or side-chain centre of every residue [nm].

    A side chain with atoms missing is put at ``lengths`` (by residue type, [nm]) along C-alpha to C-beta.
    """
    if site == "ca":
        return partner.ca
    if site == "cb":
        return partner.sites[:, 3]
    guess = partner.ca + lengths[partner.types][:, None] * partner.directions
    centre, whole = partner.side_chains
    return np.where(whole[:, None], centre, guess)


@dataclass(frozen=True)
class _SitePairs:
    """Pairs of one site within its cutoff, with what a gradient needs."""

    pose: IntArray
    a: IntArray
    b: IntArray
    distance: FloatArray
    pull: FloatArray | None  # [n_pairs, 6]: d(distance)/d(shift), d(distance)/d(turn)
    arm: FloatArray | None  # [n_pairs, 3]: from the pose's centre to the ligand's point


def _site_pairs(
    complex_: Complex, poses: Poses, site: str, lengths: FloatArray, gradient: bool
) -> _SitePairs:
    receptor, ligand = (site_points(p, site, lengths) for p in (complex_.receptor, complex_.ligand))
    c = complex_.ligand.centre
    moved = placed(ligand, c, poses)
    found = near_pairs(receptor, moved, SITES[site].cutoff)
    pull = arm = None
    if gradient:
        x = moved[found.pose, found.ligand]
        unit = (x - receptor[found.receptor]) / np.maximum(found.distance, 1e-9)[:, None]
        arm = x - (c + poses.translation)[found.pose]
        pull = np.concatenate([unit, np.cross(arm, unit)], axis=1)
    types = complex_.receptor.types[found.receptor], complex_.ligand.types[found.ligand]
    return _SitePairs(found.pose, *types, found.distance, pull, arm)


def pair_potential_features(
    complex_: Complex, poses: Poses, *, lengths: FloatArray, contact: FloatArray, gradient: bool = False
) -> tuple[FloatArray, FloatArray | None]:
    """What the energy is linear in, for every pose.

    Parameters
    ----------
    complex_ : Complex
    poses : Poses
    lengths : numpy.ndarray, shape (20,)
        :func:`side_chain_lengths`.
    contact : numpy.ndarray, shape (20, 20)
        e_ab of the ``contact`` term.
    gradient : bool

    Returns
    -------
    features : numpy.ndarray, shape (n_poses, n_coefs)
        S = features @ coefs.
    slopes : numpy.ndarray, shape (n_poses, 6, n_coefs), or None
        Their derivatives by a shift [1/nm] and by a turn about the pose's centre [1/rad].
    """
    n_poses = len(poses)
    blocks: list[FloatArray] = []
    slopes: list[FloatArray] = []
    pairs = {s: _site_pairs(complex_, poses, s, lengths, gradient) for s in SITES}
    for term in TERMS:
        p, n = pairs[term.site], term.spline.n
        first, value, slope = term.spline.weights(p.distance)
        scale = np.ones(len(p.pose))
        owners: list[IntArray] = [np.zeros(len(p.pose), dtype=np.int64)]
        if term.tie == "residue":
            owners = [p.a, p.b]
        elif term.tie == "class":
            owners = [PAIR_CLASSES[p.a, p.b]]
        elif term.tie == "charge":
            scale = CHARGES[p.a] * CHARGES[p.b]
        elif term.tie == "contact":
            scale = contact[p.a, p.b]
        # One more column catches the functions beyond the cutoff.
        width = term.n_classes * (n + 1)
        block = np.zeros(n_poses * width)
        turn = np.zeros((6, n_poses * width)) if p.pull is not None else None
        # Most of the charge term's pairs are zero.
        some = np.flatnonzero(scale)
        for owner in owners:
            for k in range(4):
                key = (p.pose * width + owner * (n + 1) + np.minimum(first + k, n))[some]
                block += np.bincount(key, (value[:, k] * scale)[some], minlength=len(block))
                if turn is not None and p.pull is not None:
                    w = (slope[:, k] * scale)[some]
                    for m in range(6):
                        turn[m] += np.bincount(key, w * p.pull[some, m], minlength=len(block))
        blocks.append(block.reshape(n_poses, term.n_classes, n + 1)[:, :, :n].reshape(n_poses, -1))
        if turn is not None:
            slopes.append(
                turn.reshape(6, n_poses, term.n_classes, n + 1)[..., :n]
                .reshape(6, n_poses, -1)
                .transpose(1, 0, 2)
            )  # fmt: skip
    return np.concatenate(blocks, axis=1), np.concatenate(slopes, axis=2) if gradient else None


N_COEFS = sum(t.n_coefs for t in TERMS)
"""Coefficients of the energy at one noise level."""


def _refine(coarse: Spline, fine: Spline) -> FloatArray:
    """Matrix [fine.n, coarse.n] that writes a coarse spline in the fine ones."""
    d = np.linspace(coarse.low, fine.cutoff, 40 * fine.n, endpoint=False)

    def dense(s: Spline) -> FloatArray:
        first, value, _ = s.weights(d)
        out = np.zeros((len(d), s.n + 4))
        for k in range(4):
            out[np.arange(len(d)), first + k] += value[:, k] * (d < s.cutoff)
        return out[:, : s.n]

    # The functions that begin before the coarse spline's first knot go on below it: a smooth start.
    return np.asarray(np.linalg.lstsq(dense(fine), dense(coarse), rcond=None)[0], dtype=np.float64)


def tables_from_coefs(coefs: FloatArray, contact: FloatArray) -> dict[str, FloatArray]:
    """Tables [n_levels, 20, 20, n] of every site from coefficients [n_levels, n_coefs]."""
    n_levels = len(coefs)
    out = {s: np.zeros((n_levels, N_TYPES, N_TYPES, spline.n)) for s, spline in SITES.items()}
    at = 0
    for term in TERMS:
        part = coefs[:, at : at + term.n_coefs].reshape(n_levels, term.n_classes, term.spline.n)
        at += term.n_coefs
        part = part @ _refine(term.spline, SITES[term.site]).T
        if term.tie == "residue":
            out[term.site] += part[:, :, None] + part[:, None]
        elif term.tie == "class":
            out[term.site] += part[:, PAIR_CLASSES]
        else:
            scale = {"all": np.ones((N_TYPES, N_TYPES)), "charge": np.outer(CHARGES, CHARGES),
                     "contact": contact}[term.tie]  # fmt: skip
            out[term.site] += scale[None, :, :, None] * part[:, :, None]
    return out


def _noise(sigma: Any, n: int) -> FloatArray:
    """Translation noise of each of n poses [nm]."""
    if not n:
        raise InputError("poses: expected at least one pose, found none.")
    try:
        noise = np.broadcast_to(np.asarray(sigma, dtype=np.float64), (n,))
    except ValueError as err:
        raise InputError(f"sigma: expected one number, or one for each of {n} poses; {err}.") from err
    if not (np.isfinite(noise).all() and (noise >= 0).all()):
        raise InputError(f"sigma: expected finite values >= 0 [nm], found {sigma!r}.")
    return noise


class Correction(Protocol):
    """An energy that is added to the closed form, as :class:`~.residual.Residual`."""

    def evaluate(
        self, complex_: Complex, poses: Poses, levels: FloatArray, lengths: FloatArray, *, gradient: bool
    ) -> tuple[FloatArray, FloatArray | None]:
        """Energy [n_poses], and its derivatives by shift and turn [n_poses, 6] if asked for."""
        ...

    def laplacians(
        self, complex_: Complex, poses: Poses, levels: FloatArray, lengths: FloatArray
    ) -> FloatArray:
        """Sums of second derivatives over shifts and over turns [n_poses, 2]."""
        ...


@dataclass(frozen=True)
class ResidueModel:
    """The fitted energy at several noise levels.

    Attributes
    ----------
    sigmas : numpy.ndarray, shape (n_levels,)
        Translation noise of the levels [nm], increasing; between them coefficients are linear in the
        logarithm of sigma, outside they are constant. Rotations are noised along with it.
    tables : dict
        Site -> B-spline coefficients [kT], shape (n_levels, 20, 20, n).
    lengths : numpy.ndarray, shape (20,)
        Distance of side-chain centres [nm] where a structure lacks atoms of a side chain.
    schedule : RigidSchedule
        Its lowest level is the first of ``sigmas``: p_0 is the density blurred by that much.
    metadata : dict
        How it was fitted, JSON-ready.
    residual : Correction, optional
        Added to the closed form.
    """

    sigmas: FloatArray
    tables: dict[str, FloatArray]
    lengths: FloatArray
    schedule: RigidSchedule
    metadata: dict[str, Any]
    residual: Correction | None = None

    def _level_weights(self, sigma: FloatArray) -> FloatArray:
        """Weights [n, n_levels] of linear interpolation in ln sigma."""
        x = np.log(np.maximum(sigma, 1e-12))
        knots = np.log(self.sigmas)
        eye = np.eye(len(knots))
        return np.stack([np.interp(x, knots, row) for row in eye], axis=1)

    def evaluate(
        self, complex_: Complex, poses: Poses, sigma: Any, *, gradient: bool = True
    ) -> tuple[FloatArray, FloatArray | None, FloatArray | None]:
        """Energy, and scores of shift and turn, of poses at translation noise ``sigma``.

        Parameters
        ----------
        complex_ : Complex
        poses : Poses
        sigma : float or numpy.ndarray, shape (n_poses,)
            [nm]
        gradient : bool

        Returns
        -------
        energy : numpy.ndarray, shape (n_poses,)
            S [kT]
        tr_score, rot_score : numpy.ndarray, shape (n_poses, 3), or None
            [1/nm], [1/rad]

        Raises
        ------
        InputError
            If there are no poses, or sigma has another shape or is not finite.
        """
        n = len(poses)
        energy, push = np.zeros(n), np.zeros((6, n))
        for p, u, du, _ in self._pairs(complex_, poses, sigma, gradient, False):
            energy += np.bincount(p.pose, u, minlength=n)
            if p.pull is not None:
                for m in range(6):
                    push[m] += np.bincount(p.pose, du * p.pull[:, m], minlength=n)
        if self.residual is not None:
            levels = self._level_weights(_noise(sigma, n))
            more, slopes = self.residual.evaluate(complex_, poses, levels, self.lengths, gradient=gradient)
            energy += more
            if slopes is not None:
                push += slopes.T
        if not gradient:
            return energy, None, None
        return energy, -push[:3].T, -push[3:].T

    def divergences(self, complex_: Complex, poses: Poses, sigma: Any) -> tuple[FloatArray, FloatArray]:
        r"""Divergences of both scores, exact.

        With a = x - c - tau the arm of a ligand point and n the unit vector of a pair,

        .. math:: \nabla_\tau\cdot s_{tr} = -\sum \left(u'' + \frac{2u'}{d}\right), \quad
                  \nabla_R\cdot s_{rot} = -\sum \left(u''\,|a\times n|^2
                  + u' \Big[\frac{2|a|^2 - |a\times n|^2}{d} - 2\, n\cdot a\Big]\right)

        Returns
        -------
        div_tr, div_rot : numpy.ndarray, shape (n_poses,)
            [1/nm^2], [1/rad^2].
        """
        n = len(poses)
        div_tr, div_rot = np.zeros(n), np.zeros(n)
        for p, _, du, bend in self._pairs(complex_, poses, sigma, True, True):
            assert p.pull is not None
            assert p.arm is not None
            d = np.maximum(p.distance, 1e-9)
            cross = (p.pull[:, 3:] ** 2).sum(axis=1)
            along = (p.arm * p.pull[:, :3]).sum(axis=1)
            turn = (2 * (p.arm**2).sum(axis=1) - cross) / d - 2 * along
            div_tr -= np.bincount(p.pose, bend + 2 * du / d, minlength=n)
            div_rot -= np.bincount(p.pose, bend * cross + du * turn, minlength=n)
        if self.residual is not None:
            levels = self._level_weights(_noise(sigma, n))
            more = self.residual.laplacians(complex_, poses, levels, self.lengths)
            div_tr, div_rot = div_tr - more[:, 0], div_rot - more[:, 1]
        return div_tr, div_rot

    def _pairs(
        self, complex_: Complex, poses: Poses, sigma: Any, gradient: bool, second: bool
    ) -> Iterator[tuple["_SitePairs", FloatArray, FloatArray, FloatArray]]:
        """Pairs of every site with u, u' and (if asked for) u''."""
        noise = _noise(sigma, len(poses))
        weights = self._level_weights(noise)
        same = bool((noise == noise[0]).all())
        for site, spline in SITES.items():
            p = _site_pairs(complex_, poses, site, self.lengths, gradient)
            first, value, slope = spline.weights(p.distance)
            bends = spline.bends(p.distance) if second else None
            table = self.tables[site]
            padded = np.concatenate([table, np.zeros((*table.shape[:3], 4))], axis=3)
            if same:
                padded = np.tensordot(weights[0], padded, axes=1)[None]
            u, du, bend = np.zeros((3, len(p.pose)))
            for k in range(4):
                if same:
                    c = padded[0, p.a, p.b, first + k]
                else:
                    c = np.zeros(len(p.pose))
                    for m in range(len(self.sigmas)):
                        c += weights[p.pose, m] * padded[m, p.a, p.b, first + k]
                u += c * value[:, k]
                du += c * slope[:, k]
                if bends is not None:
                    bend += c * bends[:, k]
            yield p, u, du, bend

    def bound_to(self, complex_: Complex) -> "BoundModel":
        """The score model of one complex."""
        return BoundModel(self, complex_)


@dataclass(frozen=True)
class BoundModel:
    """A residue model of one complex: (poses, t [n]) -> (tr_score, rot_score, energy).

    Attributes
    ----------
    model : ResidueModel
    complex_ : Complex
    """

    model: ResidueModel
    complex_: Complex

    def _sigma(self, t: Any) -> FloatArray:
        schedule = self.model.schedule
        return np.hypot(schedule.sigma_tr(t), schedule.sigma_tr_min)

    def __call__(self, poses: Poses, t: Any) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Scores [1/nm], [1/rad] and energy [kT] at diffusion time t."""
        energy, shift, turn = self.model.evaluate(self.complex_, poses, self._sigma(t))
        assert shift is not None
        assert turn is not None
        return shift, turn, energy

    def divergence(self, poses: Poses, t: Any) -> tuple[FloatArray, FloatArray]:
        """Divergences of both scores at diffusion time t."""
        return self.model.divergences(self.complex_, poses, self._sigma(t))
