r"""Rigid-body diffusion of a ligand on R^3 x SO(3): schedules, noise, what a score model is.

Noise acts on poses (R, tau) in the space frame, rotations about the ligand's own centre c + tau, so that
both are independent Brownian motions (variance exploding):

.. math:: R_t = e^{\hat\omega} R_0,\quad \omega \sim \mathrm{IGSO3}(\sigma_{rot}(t)); \qquad
          \tau_t = \tau_0 + \sigma_{tr}(t)\,\epsilon .

A score model is a callable ``(poses, t [n]) -> (tr_score [n, 3], rot_score [n, 3], energy [n] or None)``
with d ln p/dtau [1/nm], d/deps ln p(exp(eps e_i) R) [1/rad] and an energy in kT. Densities are relative
to Lebesgue [nm^-3] x the normalised Haar measure.

Lengths are in nm, angles in rad, arrays float64; nothing here needs OpenMM or torch.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np

from ..errors import InputError, ModelError
from . import so3
from .poses import Poses, check_coordinates, some_poses
from .so3 import FloatArray

Growth = Literal["power", "geometric", "logarithmic"]
Scores = tuple[FloatArray, FloatArray, FloatArray | None]


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


def check_schedule(schedule: Any) -> RigidSchedule:
    """The same schedule, if it is one."""
    if not isinstance(schedule, RigidSchedule):
        raise InputError(f"schedule: expected a RigidSchedule, found {type(schedule).__name__}.")
    return schedule


def _times(t: Any) -> FloatArray:
    t = so3._real("t", t, ())
    if (t < 0).any() or (t > 1).any():
        raise InputError(f"t: expected diffusion times in [0, 1], found {float(t.min()):g} to {t.max():g}.")
    return t


def times_of(t: Any, n: int) -> FloatArray:
    """Diffusion times of n poses, from one for all or one for each, shape (n,)."""
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
    n = len(some_poses(poses))
    t = times_of(t, n)
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
    g, at = check_coordinates("gradient", gradient, 3), check_coordinates("x", x, 3)
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
    n = len(some_poses(poses))
    if not (0 <= t <= t_end <= 1):
        raise InputError(f"t, t_end: expected 0 <= t <= t_end <= 1, found {t!r}, {t_end!r}.")
    grow_tr, grow_rot = (
        math.sqrt(max(float(sigma(t_end)) ** 2 - float(sigma(t)) ** 2, 0.0))
        for sigma in (check_schedule(schedule).sigma_tr, schedule.sigma_rot)
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
    n = len(some_poses(poses))
    t = times_of(t, n)
    if (t <= 0).any():
        raise InputError("t: expected diffusion times above 0, found 0; without noise there is no score.")
    sigma_tr, sigma_rot = check_schedule(schedule).sigma_tr(t), schedule.sigma_rot(t)
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
        mean = check_coordinates("PosePrior.mean", self.mean, 1)
        covariance = check_coordinates("PosePrior.covariance", self.covariance, 2)
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
        if len(some_poses(poses)) < 8:
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
