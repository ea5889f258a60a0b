r"""Rigid-body diffusion of a ligand on R^3 x SO(3): poses, noise, reverse sampling.

A pose (R, tau) moves the reference coordinates of a ligand with centre c,

.. math:: x = R\,(x_{ref} - c) + c + \tau .

Noise acts in the space frame, rotations about the ligand's own centre c + tau, so that both are
independent Brownian motions (variance exploding):

.. math:: R_t = e^{\hat\omega} R_0,\quad \omega \sim \mathrm{IGSO3}(\sigma_{rot}(t)); \qquad
          \tau_t = \tau_0 + \sigma_{tr}(t)\,\epsilon .

A score model is a callable ``(poses, t [n]) -> (tr_score [n, 3], rot_score [n, 3], energy [n] or None)``
with d ln p/dtau [1/nm], d/deps ln p(exp(eps e_i) R) [1/rad] and an energy in kT. Densities are relative
to Lebesgue [nm^-3] x the normalised Haar measure.

Lengths are in nm, angles in rad, arrays float64; nothing here needs OpenMM or torch.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np

from ..errors import ConvergenceError, InputError, ModelError
from . import so3
from .so3 import FloatArray

Growth = Literal["power", "geometric", "logarithmic"]
Scores = tuple[FloatArray, FloatArray, FloatArray | None]


def _coordinates(name: str, value: Any, ndim: int) -> FloatArray:
    x = so3._real(name, value, (3,))
    if x.ndim != ndim or not all(x.shape):
        want = ("(3)", "(n_atoms, 3)", "(n, n_atoms, 3)")[ndim - 1]
        raise InputError(f"{name}: expected shape {want}, found {x.shape}.")
    return x


# --------------------------------------------------------------------------------------- poses


@dataclass(frozen=True, eq=False)
class Poses:
    """Poses of one rigid ligand: x = R (x_ref - c) + c + tau.

    Parameters
    ----------
    rotation : array_like, shape (n, 3, 3)
        R.
    translation : array_like, shape (n, 3)
        tau [nm].

    Raises
    ------
    InputError
        If shapes do not fit, a number is not finite, or a matrix is no rotation.

    Notes
    -----
    Reference coordinates and centre are not held here: the same poses move any atoms of the ligand.
    n may be 0 (a selection that left none); what evaluates poses asks for at least one.

    Examples
    --------
    >>> pose = Poses(so3.exp([[0.0, 0.0, np.pi]]), [[1.0, 0.0, 0.0]])
    >>> pose.apply([[0.1, 0.0, 0.0], [-0.1, 0.0, 0.0]], [0.0, 0.0, 0.0]).round(12)[0, :, 0]
    array([0.9, 1.1])
    """

    rotation: FloatArray
    translation: FloatArray

    def __post_init__(self) -> None:
        rotation = so3.check_rotations(self.rotation, name="Poses.rotation")
        translation = so3._real("Poses.translation", self.translation, (3,))
        if rotation.ndim != 3 or translation.shape != (len(rotation), 3):
            raise InputError(
                f"Poses: expected rotation (n, 3, 3) and translation (n, 3), found {rotation.shape} and "
                f"{translation.shape}."
            )
        object.__setattr__(self, "rotation", rotation)
        object.__setattr__(self, "translation", translation)

    def __len__(self) -> int:
        return len(self.translation)

    def __getitem__(self, index: Any) -> "Poses":
        """A slice, a mask, an array of indices or one index; always Poses."""
        if isinstance(index, int | np.integer) and not isinstance(index, bool):
            index = [index]
        return Poses(self.rotation[index], self.translation[index])

    def __iter__(self) -> Iterator["Poses"]:
        return (self[i] for i in range(len(self)))

    @classmethod
    def identity(cls, n: int = 1) -> "Poses":
        """n times the reference itself."""
        n = so3._count(n)
        return cls(np.broadcast_to(np.eye(3), (n, 3, 3)).copy(), np.zeros((n, 3)))

    @classmethod
    def concatenate(cls, many: Any) -> "Poses":
        """One after the other."""
        many = list(many)
        if not many:
            raise InputError("Poses.concatenate: expected at least one Poses, found none.")
        return cls(np.concatenate([p.rotation for p in many]), np.concatenate([p.translation for p in many]))

    @classmethod
    def from_coordinates(
        cls, x_ref: Any, x: Any, *, centre: Any = None, tolerance: float | None = 1e-3
    ) -> "Poses":
        """Poses that superpose the reference on given coordinates (least squares; Kabsch).

        Parameters
        ----------
        x_ref : array_like, shape (n_atoms, 3)
            [nm], at least three atoms that are not on one line.
        x : array_like, shape (n, n_atoms, 3)
            The same atoms, moved [nm].
        centre : array_like, shape (3,), optional
            c [nm]; the mean of ``x_ref`` by default.
        tolerance : float, optional
            Largest root mean square deviation allowed [nm]; None allows any.

        Returns
        -------
        Poses

        Raises
        ------
        InputError
            If shapes do not fit, atoms are on a line, or the deviation is larger than ``tolerance``.

        References
        ----------
        W. Kabsch, A solution for the best rotation to relate two sets of vectors, 1976,
        doi:10.1107/S0567739476001873.
        """
        ref = _coordinates("x_ref", x_ref, 2)
        moved = _coordinates("x", x, 3)
        if moved.shape[1:] != ref.shape or len(ref) < 3:
            raise InputError(
                f"Poses.from_coordinates: expected x of shape (n, n_atoms, 3) with the atoms of x_ref, at "
                f"least three; found {moved.shape} and {ref.shape}."
            )
        c = ref.mean(axis=0) if centre is None else _coordinates("centre", centre, 1)
        own = ref - ref.mean(axis=0)
        spread = np.linalg.svd(own, compute_uv=False)
        if spread[1] < 1e-6 * max(spread[0], 1e-12):
            raise InputError(
                "Poses.from_coordinates: expected atoms that span a plane, found them on a line."
            )
        mean = moved.mean(axis=1)
        u, _, vt = np.linalg.svd(np.einsum("nai,aj->nij", moved - mean[:, None], own))
        u[:, :, 2] *= np.sign(np.linalg.det(u @ vt))[:, None]
        rotation = u @ vt
        out = cls(rotation, mean - c - np.einsum("nij,j->ni", rotation, ref.mean(axis=0) - c))
        if tolerance is not None:
            worst = np.sqrt(((out.apply(ref, c) - moved) ** 2).sum(axis=-1).mean(axis=-1)).max()
            if worst > tolerance:
                raise InputError(
                    f"Poses.from_coordinates: expected rigid copies of x_ref within {tolerance:g} nm, found "
                    f"a deviation of {worst:.3g} nm; same atoms, same order? tolerance=None takes it anyway."
                )
        return out

    def apply(self, x_ref: Any, centre: Any) -> FloatArray:
        """Coordinates of the ligand in every pose.

        Parameters
        ----------
        x_ref : array_like, shape (n_atoms, 3)
            [nm].
        centre : array_like, shape (3,)
            c [nm].

        Returns
        -------
        numpy.ndarray, shape (n, n_atoms, 3)
            [nm].

        Raises
        ------
        InputError
            If a shape is wrong or a number is not finite.
        """
        ref, c = _coordinates("x_ref", x_ref, 2), _coordinates("centre", centre, 1)
        return (ref - c) @ self.rotation.swapaxes(1, 2) + (c + self.translation)[:, None]

    def compose(self, other: "Poses") -> "Poses":
        """First ``other``, then this: both about the reference centre c; one of them may be single."""
        turned = (self.rotation @ other.translation[..., None])[..., 0]
        return Poses(self.rotation @ other.rotation, turned + self.translation)

    def inverse(self) -> "Poses":
        """The poses that take these back to the reference."""
        back = self.rotation.swapaxes(1, 2)
        return Poses(back, -(back @ self.translation[..., None])[..., 0])

    def perturbed(self, rotation_vector: Any, shift: Any) -> "Poses":
        """Rotated in the space frame about the ligand's own centre, and shifted.

        R becomes exp(omega) R, tau becomes tau + shift: the step of noising, sampler and flow.

        Parameters
        ----------
        rotation_vector : array_like, shape (n, 3) or (3,)
            omega [rad].
        shift : array_like, shape (n, 3) or (3,)
            [nm].

        Returns
        -------
        Poses
        """
        return Poses(so3.exp(rotation_vector) @ self.rotation, self.translation + shift)

    def moved(self, rotation: Any, translation: Any, centre: Any) -> "Poses":
        """What the poses become when the whole complex is moved, x -> Q x + b.

        Parameters
        ----------
        rotation : array_like, shape (3, 3)
            Q.
        translation : array_like, shape (3,)
            b [nm].
        centre : array_like, shape (3,)
            c [nm] of the reference, which stays where it is.

        Returns
        -------
        Poses
            Scores of an invariant density turn with Q.
        """
        q = so3.check_rotations(rotation)
        b, c = _coordinates("translation", translation, 1), _coordinates("centre", centre, 1)
        return Poses(q @ self.rotation, (c + self.translation) @ q.T + b - c)

    def repeat(self, n: int) -> "Poses":
        """Every pose n times in a row."""
        n = so3._count(n)
        return Poses(np.repeat(self.rotation, n, axis=0), np.repeat(self.translation, n, axis=0))


def _some(poses: Any, name: str = "poses") -> Poses:
    if not isinstance(poses, Poses):
        raise InputError(f"{name}: expected Poses, found {type(poses).__name__}.")
    if not len(poses):
        raise InputError(f"{name}: expected at least one pose, found none.")
    return poses


# ------------------------------------------------------------------------------------ schedule


@dataclass(frozen=True)
class RigidSchedule:
    r"""Variance-exploding noise of translation and rotation, exactly clean at t = 0.

    .. math:: \sigma(t)^2 = s(t)^2 - s(0)^2, \qquad g(t)^2 = \frac{d\sigma^2}{dt}

    with a level s(t) from ``min`` to ``max`` for each of the two:

    ============  =============================================
    growth        s(t)
    ============  =============================================
    power         min + (max - min) t^power
    geometric     min (max/min)^t
    logarithmic   ln[t e^max + (1 - t) e^min]  (rotation, rad)
    ============  =============================================

    A model that was trained from a lowest level ``min`` > 0 knows its data blurred by ``min`` only: that
    blurred density is its p_0, and sigma(t) is the noise on top of it, exactly, since normal and IGSO3
    both add in squares.

    Parameters
    ----------
    sigma_tr_max, sigma_rot_max : float
        Levels at t = 1 [nm], [rad].
    sigma_tr_min, sigma_rot_min : float
        Levels at t = 0 [nm], [rad]; above zero for geometric growth.
    growth_tr, growth_rot : {"power", "geometric", "logarithmic"}
    power : float
        At least 1.

    Raises
    ------
    InputError
        If a number is not finite or not in its range, or a growth is unknown.

    Notes
    -----
    DFMDock's schedule, in nm: ``RigidSchedule(3.0, 1.5, 0.01, 0.1, "geometric", "logarithmic")``.

    Examples
    --------
    >>> s = RigidSchedule()
    >>> float(s.sigma_tr(0.0)), float(s.sigma_tr(0.5)), float(s.sigma_rot(1.0))
    (0.0, 0.5, 1.5)
    """

    sigma_tr_max: float = 2.0
    sigma_rot_max: float = 1.5
    sigma_tr_min: float = 0.0
    sigma_rot_min: float = 0.0
    growth_tr: Growth = "power"
    growth_rot: Growth = "power"
    power: float = 2.0

    def __post_init__(self) -> None:
        for kind, unit in (("tr", "nm"), ("rot", "rad")):
            low, high = getattr(self, f"sigma_{kind}_min"), getattr(self, f"sigma_{kind}_max")
            growth = getattr(self, f"growth_{kind}")
            if growth not in ("power", "geometric", "logarithmic"):
                raise InputError(
                    f"growth_{kind}: expected 'power', 'geometric' or 'logarithmic', found {growth!r}."
                )
            if not all(isinstance(v, int | float) and math.isfinite(v) for v in (low, high)) or not (
                0 <= low < high
            ):
                raise InputError(
                    f"sigma_{kind}_min, sigma_{kind}_max: expected 0 <= min < max [{unit}], found {low!r}, "
                    f"{high!r}."
                )
            if growth == "geometric" and low <= 0:
                raise InputError(f"sigma_{kind}_min: geometric growth begins above zero, found {low!r}.")
        if not (isinstance(self.power, int | float) and math.isfinite(self.power) and self.power >= 1):
            raise InputError(f"power: expected a finite number >= 1, found {self.power!r}.")

    def _level(self, kind: str, t: Any) -> tuple[FloatArray, FloatArray]:
        """s(t) - s(0), and ds/dt."""
        t = _times(t)
        low, high = getattr(self, f"sigma_{kind}_min"), getattr(self, f"sigma_{kind}_max")
        growth = getattr(self, f"growth_{kind}")
        if growth == "power":
            return (high - low) * t**self.power, (high - low) * self.power * t ** (self.power - 1)
        if growth == "geometric":
            rate = math.log(high / low)
            return low * np.expm1(rate * t), low * rate * np.exp(rate * t)
        span = math.expm1(high - low)
        return np.log1p(t * span), span / (1 + t * span)

    def _sigma(self, kind: str, t: Any) -> FloatArray:
        rise = self._level(kind, t)[0]
        return np.sqrt(rise * (rise + 2 * getattr(self, f"sigma_{kind}_min")))

    def _diffusion(self, kind: str, t: Any) -> FloatArray:
        rise, slope = self._level(kind, t)
        return 2 * (rise + getattr(self, f"sigma_{kind}_min")) * slope

    def sigma_tr(self, t: Any) -> FloatArray:
        """Noise of the translation [nm], shaped like ``t``."""
        return self._sigma("tr", t)

    def sigma_rot(self, t: Any) -> FloatArray:
        """Noise of the rotation [rad], shaped like ``t``."""
        return self._sigma("rot", t)

    def diffusion_tr(self, t: Any) -> FloatArray:
        """g_tr^2 = d sigma_tr^2/dt [nm^2], shaped like ``t``."""
        return self._diffusion("tr", t)

    def diffusion_rot(self, t: Any) -> FloatArray:
        """g_rot^2 = d sigma_rot^2/dt [rad^2], shaped like ``t``."""
        return self._diffusion("rot", t)

    def t_of_sigma_tr(self, sigma: float) -> float:
        """Diffusion time at which the noise of the translation is ``sigma`` [nm].

        Raises
        ------
        InputError
            If ``sigma`` is not between 0 and the noise at t = 1.
        """
        low, high = self.sigma_tr_min, self.sigma_tr_max
        top = float(self.sigma_tr(1.0))
        if not (isinstance(sigma, int | float) and 0 <= sigma <= top * (1 + 1e-12)):
            raise InputError(f"sigma: expected a noise level in [0, {top:.6g}] nm, found {sigma!r}.")
        rise = sigma**2 / (math.hypot(sigma, low) + low) if sigma else 0.0
        if self.growth_tr == "power":
            return min(1.0, (rise / (high - low)) ** (1 / self.power))
        if self.growth_tr == "geometric":
            return min(1.0, math.log1p(rise / low) / math.log(high / low))
        return min(1.0, math.expm1(rise) / math.expm1(high - low))

    def to_json(self) -> str:
        """JSON text; :meth:`from_json` reads it back."""
        return json.dumps({"schedule": type(self).__name__, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> "RigidSchedule":
        """Read a schedule back.

        Raises
        ------
        InputError
            If the text describes none.

        Examples
        --------
        >>> RigidSchedule.from_json(RigidSchedule(3.0).to_json()) == RigidSchedule(3.0)
        True
        """
        try:
            fields = json.loads(text)
            if fields.pop("schedule") != cls.__name__:
                raise KeyError("schedule")
            return cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            raise InputError(
                f"noise schedule: expected JSON of RigidSchedule, found {text!r} ({err})."
            ) from err


def _schedule(schedule: Any) -> RigidSchedule:
    if not isinstance(schedule, RigidSchedule):
        raise InputError(f"schedule: expected a RigidSchedule, found {type(schedule).__name__}.")
    return schedule


def _times(t: Any) -> FloatArray:
    t = so3._real("t", t, ())
    if (t < 0).any() or (t > 1).any():
        raise InputError(f"t: expected diffusion times in [0, 1], found {float(t.min()):g} to {t.max():g}.")
    return t


def _times_of(t: Any, n: int) -> FloatArray:
    t = _times(t)
    if t.ndim > 1 or (t.ndim == 1 and len(t) != n):
        raise InputError(f"t: expected one time or one for each of {n} poses, found shape {t.shape}.")
    return np.broadcast_to(t, (n,))


# -------------------------------------------------------------------------------- score models


class PoseScoreModel(Protocol):
    """The contract of a score model of poses; see the module's text for units and frames."""

    def __call__(self, poses: Poses, t: FloatArray) -> Scores:
        """tr_score [n, 3] (1/nm), rot_score [n, 3] (1/rad), energy [n] (kT) or None."""


def evaluate_scores(model: Callable[[Poses, FloatArray], Scores], poses: Poses, t: Any) -> Scores:
    """Scores of a model, held to the contract.

    Parameters
    ----------
    model : PoseScoreModel
    poses : Poses
        n of them.
    t : array_like, shape () or (n,)
        Diffusion times in [0, 1].

    Returns
    -------
    tr_score : numpy.ndarray, shape (n, 3)
        d ln p/dtau [1/nm].
    rot_score : numpy.ndarray, shape (n, 3)
        d/deps ln p(exp(eps e_i) R) [1/rad].
    energy : numpy.ndarray, shape (n,), or None
        [kT].

    Raises
    ------
    InputError
        For no poses, or times outside [0, 1].
    ModelError
        If the model returns other shapes, or numbers that are not finite.

    Examples
    --------
    >>> flat = lambda poses, t: (0 * poses.translation, 0 * poses.translation, None)
    >>> evaluate_scores(flat, Poses.identity(2), 0.5)[0].shape
    (2, 3)
    """
    n = len(_some(poses))
    t = _times_of(t, n)
    found = model(poses, t)
    if not isinstance(found, tuple) or len(found) != 3:
        raise ModelError(
            f"score model: expected (tr_score, rot_score, energy or None), found {type(found).__name__}."
        )
    out: list[FloatArray | None] = []
    for name, value, shape in zip(
        ("tr_score", "rot_score", "energy"), found, ((n, 3), (n, 3), (n,)), strict=True
    ):
        if value is None and name == "energy":
            out.append(None)
            continue
        try:
            array = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError) as err:
            raise ModelError(f"score model: {name} is no array of real numbers ({err}).") from err
        if array.shape != shape:
            raise ModelError(f"score model: expected {name} of shape {shape}, found {array.shape}.")
        bad = ~np.isfinite(array.reshape(n, -1)).all(axis=1)
        if bad.any():
            first = int(bad.argmax())
            raise ModelError(
                f"score model: {name} is not finite for {int(bad.sum())} of {n} poses, the first at index "
                f"{first} and t = {t[first]:g}."
            )
        out.append(array)
    return out[0], out[1], out[2]  # type: ignore[return-value]


def scores_from_gradient(gradient: Any, x: Any, centre: Any) -> tuple[FloatArray, FloatArray]:
    r"""Scores of a pose from the Cartesian gradient of an energy S(x).

    .. math:: s_{tr} = -\sum_i \frac{\partial S}{\partial x_i}, \qquad
              s_{rot} = -\sum_i (x_i - c_{pose}) \times \frac{\partial S}{\partial x_i}

    Parameters
    ----------
    gradient : array_like, shape (n, n_atoms, 3)
        dS/dx [kT/nm] of the ligand's atoms.
    x : array_like, shape (n, n_atoms, 3)
        Their coordinates [nm].
    centre : array_like, shape (n, 3)
        c + tau, the centre of every pose [nm].

    Returns
    -------
    tr_score, rot_score : numpy.ndarray, shape (n, 3)
        [1/nm], [1/rad].

    Raises
    ------
    InputError
        If shapes do not fit or a number is not finite.

    Examples
    --------
    >>> x = np.array([[[1.0, 0.0, 0.0]]])
    >>> scores_from_gradient([[[0.0, 2.0, 0.0]]], x, [[0.0, 0.0, 0.0]])[1][0, 2].tolist()
    -2.0
    """
    g, at = _coordinates("gradient", gradient, 3), _coordinates("x", x, 3)
    c = so3._real("centre", centre, (3,))
    if g.shape != at.shape or c.shape != (len(g), 3):
        raise InputError(
            f"scores_from_gradient: expected gradient and x of one shape (n, n_atoms, 3) and centre (n, 3), "
            f"found {g.shape}, {at.shape}, {c.shape}."
        )
    return -g.sum(axis=1), -np.cross(at - c[:, None], g).sum(axis=1)


# --------------------------------------------------------------------------------------- noise


@dataclass(frozen=True, eq=False)
class NoisedPoses:
    """What :func:`noise_poses` returns.

    Attributes
    ----------
    poses : Poses
    t : numpy.ndarray, shape (n,)
    tr_target, rot_target : numpy.ndarray, shape (n, 3)
        Score of the noising kernel [1/nm], [1/rad]: what denoising score matching regresses on.
    rotation_vector, shift : numpy.ndarray, shape (n, 3)
        The noise itself [rad], [nm].
    """

    poses: Poses
    t: FloatArray
    tr_target: FloatArray
    rot_target: FloatArray
    rotation_vector: FloatArray
    shift: FloatArray


def noise_between(
    poses: Poses, t: float, t_end: float, *, schedule: RigidSchedule, generator: np.random.Generator
) -> Poses:
    """Poses of noise level t noised further, up to level t_end; exact, widths add in squares.

    Parameters
    ----------
    poses : Poses
    t, t_end : float
        0 <= t <= t_end <= 1.
    schedule : RigidSchedule
    generator : numpy.random.Generator

    Returns
    -------
    Poses

    Raises
    ------
    InputError
        For no poses, or times that are not in this order.

    Examples
    --------
    >>> generator = np.random.default_rng(0)
    >>> len(noise_between(Poses.identity(3), 0.2, 0.5, schedule=RigidSchedule(), generator=generator))
    3
    """
    n = len(_some(poses))
    if not (0 <= t <= t_end <= 1):
        raise InputError(f"t, t_end: expected 0 <= t <= t_end <= 1, found {t!r}, {t_end!r}.")
    grow_tr, grow_rot = (
        math.sqrt(max(float(sigma(t_end)) ** 2 - float(sigma(t)) ** 2, 0.0))
        for sigma in (_schedule(schedule).sigma_tr, schedule.sigma_rot)
    )
    shift = grow_tr * so3._generator(generator).standard_normal((n, 3))
    return poses.perturbed(so3.sample_igso3(grow_rot, n, generator=generator), shift)


def noise_poses(
    poses: Poses, t: Any, *, schedule: RigidSchedule, generator: np.random.Generator
) -> NoisedPoses:
    r"""Noised copies, and the scores of the noising kernel.

    .. math:: \nabla \ln q_t = \left(-\frac{\tau_t - \tau_0}{\sigma_{tr}^2},\;
              \frac{d \ln f_{\sigma_{rot}}}{d|\omega|} \frac{\omega}{|\omega|}\right)

    Their mean over clean poses given a noised one is the score of the noised density.

    Parameters
    ----------
    poses : Poses
        n clean poses.
    t : array_like, shape () or (n,)
        Diffusion times in (0, 1].
    schedule : RigidSchedule
    generator : numpy.random.Generator

    Returns
    -------
    NoisedPoses

    Raises
    ------
    InputError
        For no poses, or times outside (0, 1]: without noise the kernel has no score.

    References
    ----------
    P. Vincent, A connection between score matching and denoising autoencoders, 2011,
    doi:10.1162/NECO_a_00142.
    V. De Bortoli et al., Riemannian score-based generative modelling, 2022, arXiv:2202.02763.
    J. Yim et al., SE(3) diffusion model with application to protein backbone generation, 2023,
    arXiv:2302.02277.

    Examples
    --------
    >>> found = noise_poses(Poses.identity(3), 0.5, schedule=RigidSchedule(),
    ...                     generator=np.random.default_rng(0))
    >>> bool(np.allclose(found.tr_target, -found.shift / 0.5**2))
    True
    """
    n = len(_some(poses))
    t = _times_of(t, n)
    if (t <= 0).any():
        raise InputError("t: expected diffusion times above 0, found 0; without noise there is no score.")
    sigma_tr, sigma_rot = _schedule(schedule).sigma_tr(t), schedule.sigma_rot(t)
    shift = sigma_tr[:, None] * so3._generator(generator).standard_normal((n, 3))
    omega = so3.sample_igso3(sigma_rot, generator=generator)
    return NoisedPoses(
        poses=poses.perturbed(omega, shift),
        t=t,
        tr_target=-shift / sigma_tr[:, None] ** 2,
        rot_target=so3.igso3_score(omega, sigma_rot),
        rotation_vector=omega,
        shift=shift,
    )


# --------------------------------------------------------------------------------------- priors


@dataclass(frozen=True, eq=False)
class PosePrior:
    r"""Density at the end of the noise: normal in tau, times IGSO3 about a rotation, or uniform.

    .. math:: p(R, \tau) = N(\tau;\, m, C)\; f_\sigma(\mathrm{angle}(R R_m^T))

    Parameters
    ----------
    mean : array_like, shape (3,)
        m [nm].
    covariance : array_like, shape (3, 3)
        C [nm^2].
    rotation : array_like, shape (3, 3), optional
        R_m; None makes all rotations equally likely.
    sigma_rot : float, optional
        sigma [rad]; together with ``rotation``.

    Raises
    ------
    InputError
        If shapes do not fit, C is not positive definite, or only one of the last two is given.

    Examples
    --------
    >>> prior = PosePrior(np.zeros(3), np.eye(3))
    >>> prior.log_density(Poses.identity(1)).round(4)
    array([-2.7568])
    """

    mean: FloatArray
    covariance: FloatArray
    rotation: FloatArray | None = None
    sigma_rot: float | None = None

    def __post_init__(self) -> None:
        mean = _coordinates("PosePrior.mean", self.mean, 1)
        covariance = _coordinates("PosePrior.covariance", self.covariance, 2)
        if covariance.shape != (3, 3) or not np.allclose(covariance, covariance.T):
            raise InputError("PosePrior.covariance: expected a symmetric matrix (3, 3).")
        if np.linalg.eigvalsh(covariance)[0] <= 0:
            raise InputError("PosePrior.covariance: expected a positive definite matrix [nm^2].")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "covariance", covariance)
        if (self.rotation is None) != (self.sigma_rot is None):
            raise InputError("PosePrior: expected rotation and sigma_rot together, or neither (uniform).")
        if self.rotation is not None:
            rotation = so3.check_rotations(self.rotation, name="PosePrior.rotation")
            if rotation.shape != (3, 3):
                raise InputError(f"PosePrior.rotation: expected shape (3, 3), found {rotation.shape}.")
            object.__setattr__(self, "rotation", rotation)
            object.__setattr__(self, "sigma_rot", float(so3._sigma(self.sigma_rot)))

    @classmethod
    def from_poses(cls, poses: Poses, *, uniform: bool = False) -> "PosePrior":
        """The prior with the moments of given poses.

        Mean and covariance of tau; R_m is the rotation nearest to the mean of R, and sigma follows
        from E[R] = exp(-sigma^2) R_m, which holds for IGSO3.

        Parameters
        ----------
        poses : Poses
            At least 8.
        uniform : bool
            Make all rotations equally likely.

        Returns
        -------
        PosePrior

        Raises
        ------
        InputError
            For fewer than 8 poses, or poses that are all the same.
        """
        if len(_some(poses)) < 8:
            raise InputError(f"PosePrior.from_poses: expected at least 8 poses, found {len(poses)}.")
        mean, covariance = poses.translation.mean(axis=0), np.cov(poses.translation.T)
        if uniform:
            return cls(mean, covariance)
        average = poses.rotation.mean(axis=0)
        u, _, vt = np.linalg.svd(average)
        u[:, 2] *= np.sign(np.linalg.det(u @ vt))
        nearest = u @ vt
        length = float(np.trace(nearest.T @ average)) / 3
        # A mean of R below a thousandth is that of uniform rotations.
        sigma = math.sqrt(-math.log(min(max(length, 1e-3), 1 - 1e-14)))
        return cls(mean, covariance, nearest, sigma)

    def noised(self, schedule: RigidSchedule, t: float = 1.0) -> "PosePrior":
        """The prior after the noise of ``schedule`` up to time t; exact, widths add in squares."""
        covariance = self.covariance + float(schedule.sigma_tr(t)) ** 2 * np.eye(3)
        if self.sigma_rot is None:
            return PosePrior(self.mean, covariance)
        return PosePrior(
            self.mean, covariance, self.rotation, math.hypot(self.sigma_rot, float(schedule.sigma_rot(t)))
        )

    def log_density(self, poses: Poses) -> FloatArray:
        """ln p [n], relative to Lebesgue [nm^-3] x Haar."""
        away = poses.translation - self.mean
        _, determinant = np.linalg.slogdet(2 * np.pi * self.covariance)
        out = -0.5 * (away * np.linalg.solve(self.covariance, away.T).T).sum(axis=1) - 0.5 * determinant
        if self.rotation is not None:
            out = out + so3.igso3_log_density(so3.angle(poses.rotation @ self.rotation.T), self.sigma_rot)
        return out

    def sample(self, n: int, *, generator: np.random.Generator) -> Poses:
        """n draws."""
        n = so3._count(n)
        tau = (
            self.mean
            + so3._generator(generator).standard_normal((n, 3)) @ np.linalg.cholesky(self.covariance).T
        )
        if self.rotation is None:
            return Poses(so3.random_rotations(n, generator), tau)
        turn = so3.exp(so3.sample_igso3(self.sigma_rot, n, generator=generator))
        return Poses(turn @ self.rotation, tau)


# ---------------------------------------------------------------------------- steps on the group

Velocity = Callable[[float, Poses], tuple[FloatArray, FloatArray, FloatArray]]
"""At (t, poses): d tau/dt [n, 3], angular velocity in the space frame [n, 3], d(extra)/dt [n]."""

StepName = Literal["heun", "rk4"]


def group_step(
    velocity: Velocity, t: float, poses: Poses, extra: FloatArray, dt: float, *, method: StepName = "rk4"
) -> tuple[Poses, FloatArray]:
    r"""One step of an ordinary differential equation on R^3 x SO(3) (Runge-Kutta-Munthe-Kaas).

    R(t + dt) = exp(Theta) R(t), and Theta obeys dTheta/dt = J^{-1}(Theta) omega in flat space, where
    an ordinary Runge-Kutta method keeps its order: 2 for Heun, 4 for RK4. R stays a rotation.

    Parameters
    ----------
    velocity : callable
        See :data:`Velocity`; ``extra`` is a number carried along (the log density).
    t : float
    poses : Poses
    extra : numpy.ndarray, shape (n,)
    dt : float
        Of either sign.
    method : {"heun", "rk4"}

    Returns
    -------
    poses, extra
        At t + dt.

    Raises
    ------
    ConvergenceError
        If a rotation turns by more than pi within the step.

    References
    ----------
    H. Munthe-Kaas, Runge-Kutta methods on Lie groups, 1998, doi:10.1007/BF02510919.

    Examples
    --------
    >>> spin = lambda t, p: (np.zeros((1, 3)), np.array([[0.0, 0.0, 2 * t]]), np.ones(1))
    >>> pose, extra = group_step(spin, 0.0, Poses.identity(), np.zeros(1), 1.0)
    >>> so3.log(pose.rotation).round(12).tolist(), extra.round(12).tolist()
    ([[0.0, 0.0, 1.0]], [1.0])
    """

    def stage(after: float, tau: FloatArray, theta: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        if (np.linalg.norm(theta, axis=1) > np.pi).any():
            raise ConvergenceError(
                f"flow of poses: a rotation turns by more than pi within the step from t = {t:g}; take more "
                "steps."
            )
        d_tau, omega, d_extra = velocity(t + after, poses.perturbed(theta, tau))
        return d_tau, (so3.left_jacobian_inverse(theta) @ omega[..., None])[..., 0], d_extra

    zero = np.zeros((len(poses), 3))
    first = stage(0.0, zero, zero)
    if method == "heun":
        second = stage(dt, dt * first[0], dt * first[1])
        tau, theta, more = (0.5 * dt * (a + b) for a, b in zip(first, second, strict=True))
    else:
        second = stage(0.5 * dt, 0.5 * dt * first[0], 0.5 * dt * first[1])
        third = stage(0.5 * dt, 0.5 * dt * second[0], 0.5 * dt * second[1])
        last = stage(dt, dt * third[0], dt * third[1])
        tau, theta, more = (
            dt / 6 * (a + 2 * b + 2 * c + d) for a, b, c, d in zip(first, second, third, last, strict=True)
        )
    return poses.perturbed(theta, tau), extra + more


def time_grid(n_steps: int, t_min: float = 0.0, t_max: float = 1.0, *, stretch: float = 1.0) -> FloatArray:
    """n_steps + 1 times from t_min to t_max, finer at t_min for stretch > 1: t ~ (k/n)^stretch.

    Raises
    ------
    InputError
        If ``n_steps`` is no whole number above 0, the times are not 0 <= t_min < t_max <= 1, or
        ``stretch`` is not above 0.

    Examples
    --------
    >>> time_grid(2, stretch=2.0).tolist()
    [0.0, 0.25, 1.0]
    """
    if so3._count(n_steps) < 1:
        raise InputError("n_steps: expected at least 1, found 0.")
    if not (0 <= t_min < t_max <= 1):
        raise InputError(f"t_min, t_max: expected 0 <= t_min < t_max <= 1, found {t_min!r}, {t_max!r}.")
    if not (math.isfinite(stretch) and stretch > 0):
        raise InputError(f"stretch: expected a finite number > 0, found {stretch!r}.")
    return t_min + (t_max - t_min) * np.linspace(0.0, 1.0, n_steps + 1) ** stretch


# ------------------------------------------------------------------------------ reverse sampling


@dataclass(frozen=True, eq=False)
class PoseSamples:
    """What :func:`sample_poses` returns.

    Attributes
    ----------
    poses : Poses
        At the last time.
    times : numpy.ndarray, shape (n_steps + 1,)
        From 1 down.
    trajectory : tuple of Poses
        At every time, the first drawn from the prior; empty unless asked for.
    n_calls : int
        Calls of the model, each on all poses.
    """

    poses: Poses
    times: FloatArray
    trajectory: tuple[Poses, ...]
    n_calls: int


def sample_poses(
    model: Callable[[Poses, FloatArray], Scores],
    start: Poses,
    *,
    schedule: RigidSchedule,
    generator: np.random.Generator | None = None,
    method: Literal["sde", "ode"] = "sde",
    n_steps: int = 50,
    t_min: float = 0.0,
    stretch: float = 1.0,
    keep_trajectory: bool = False,
) -> PoseSamples:
    r"""Poses from the reverse of the noise: the probability flow, with or without fresh noise.

    The flow is, by Heun's method on the group,

    .. math:: \frac{d\tau}{dt} = -\frac{g_{tr}^2}{2} s_{tr}, \qquad \omega = -\frac{g_{rot}^2}{2} s_{rot} .

    The reverse SDE has twice this drift and noise: a step from t to s < t first adds the noise that leads
    up to t + (t - s), a step of the geodesic random walk that is exact for any density, and then takes
    the flow two steps down.

    Parameters
    ----------
    model : PoseScoreModel
    start : Poses
        At t = 1, from :meth:`PosePrior.sample`.
    schedule : RigidSchedule
    generator : numpy.random.Generator, optional
        For "sde", which needs it.
    method : {"sde", "ode"}
    n_steps : int
    t_min : float
        Where to stop.
    stretch : float
        See :func:`time_grid`.
    keep_trajectory : bool

    Returns
    -------
    PoseSamples

    Raises
    ------
    InputError
        For no poses, a bad grid, an unknown method, or "sde" without a generator.
    ModelError
        If the model breaks the contract.

    Notes
    -----
    The first step sees scores at t = 1, of poses that ``start`` must be typical of. Deterministic given
    the generator.

    References
    ----------
    Y. Song et al., Score-based generative modeling through stochastic differential equations, 2021,
    arXiv:2011.13456.
    T. Karras et al., Elucidating the design space of diffusion-based generative models, 2022,
    arXiv:2206.00364 (noise up, flow down).
    V. De Bortoli et al., Riemannian score-based generative modelling, 2022, arXiv:2202.02763.

    Examples
    --------
    >>> generator = np.random.default_rng(0)
    >>> to_origin = lambda poses, t: (-poses.translation, 0 * poses.translation, None)
    >>> start = PosePrior(np.zeros(3), np.eye(3)).sample(4, generator=generator)
    >>> found = sample_poses(to_origin, start, schedule=RigidSchedule(), generator=generator, n_steps=20)
    >>> len(found.poses), found.n_calls
    (4, 40)
    """
    poses = _some(start, "start")
    times = time_grid(n_steps, t_min, stretch=stretch)[::-1]
    if method not in ("sde", "ode"):
        raise InputError(f"method: expected 'sde' or 'ode', found {method!r}.")
    if method == "sde":
        so3._generator(generator)
    _schedule(schedule)
    kept = [poses]
    n_calls = 0

    def velocity(t: float, at: Poses) -> tuple[FloatArray, FloatArray, FloatArray]:
        tr, rot, _ = evaluate_scores(model, at, t)
        return (
            -0.5 * float(schedule.diffusion_tr(t)) * tr,
            -0.5 * float(schedule.diffusion_rot(t)) * rot,
            np.zeros(len(at)),
        )

    for t, s in pairwise(times):
        top = t
        if method == "sde" and t < 1.0:
            assert generator is not None
            top = min(1.0, 2 * t - s)
            poses = noise_between(poses, t, top, schedule=schedule, generator=generator)
        poses, _ = group_step(velocity, top, poses, np.zeros(len(poses)), s - top, method="heun")
        n_calls += 2
        if keep_trajectory:
            kept.append(poses)
    return PoseSamples(poses, times, tuple(kept) if keep_trajectory else (), n_calls)
