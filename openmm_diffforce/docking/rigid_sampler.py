r"""Steps and samples of the reverse diffusion on R^3 x SO(3).

Steps keep rotations rotations: they are taken in the exponential coordinates of the group.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from ..errors import ConvergenceError, InputError
from . import so3
from .poses import Poses, some_poses
from .rigid import RigidSchedule, Scores, check_schedule, evaluate_scores, noise_between
from .so3 import FloatArray

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
        At t = 1, from :meth:`~.rigid.PosePrior.sample`.
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
    >>> from openmm_diffforce.docking.rigid import PosePrior
    >>> generator = np.random.default_rng(0)
    >>> to_origin = lambda poses, t: (-poses.translation, 0 * poses.translation, None)
    >>> start = PosePrior(np.zeros(3), np.eye(3)).sample(4, generator=generator)
    >>> found = sample_poses(to_origin, start, schedule=RigidSchedule(), generator=generator, n_steps=20)
    >>> len(found.poses), found.n_calls
    (4, 40)
    """
    poses = some_poses(start, "start")
    times = time_grid(n_steps, t_min, stretch=stretch)[::-1]
    if method not in ("sde", "ode"):
        raise InputError(f"method: expected 'sde' or 'ode', found {method!r}.")
    if method == "sde":
        so3._generator(generator)
    check_schedule(schedule)
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
