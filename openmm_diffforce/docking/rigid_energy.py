r"""Learned energies of poses: -ln p_0 on R^3 x SO(3), along the probability flow or along any path.

The density p_t of noised poses obeys dp/dt = (g_tr^2 Lap_tau + g_rot^2 Lap_R) p/2, so that for scores
s = grad ln p_t (both parts; sums over translation and rotation, each with its g^2)

.. math:: \frac{\partial \ln p_t}{\partial t} = \tfrac12 \sum g^2 \left(\nabla\cdot s + |s|^2\right) .

Along the flow, dy/dt = -(g^2/2) s, the |s|^2 cancels; along any other path y_t

.. math:: \ln p_0(y_0) = \ln p_1(y_1) - \int_0^1 \tfrac12 \sum g^2 \left(\nabla\cdot s + |s|^2\right) dt
          - \int s \cdot dy .

Every path gives the same number for exact scores; for learned ones the differences between paths
show what the scores are worth. Energies are -ln p_0, in kT, relative to Lebesgue [nm^-3] x Haar.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from ..errors import InputError, ModelError
from . import so3
from .poses import Poses, some_poses
from .rigid import PosePrior, RigidSchedule, Scores, check_schedule, evaluate_scores, times_of
from .rigid_sampler import StepName, group_step, time_grid
from .so3 import FloatArray

Model = Callable[[Poses, FloatArray], Scores]
Divergence = Callable[[Poses, FloatArray], tuple[FloatArray, FloatArray]]
LogDensity = Callable[[Poses], FloatArray]

STEP_TR, STEP_ROT = 1e-3, 1e-3
"""Displacements of the central differences of scores [nm], [rad]: far below the widths of poses."""

MAX_BATCH = 1024
"""Poses in one call of a model."""

_CHORD = np.array([0.0, 0.25, 0.5, 0.75])
_BOOLE = np.array([7.0, 32.0, 12.0, 32.0, 7.0]) / 90
_SIMPSON = np.array([1.0, 0.0, 4.0, 0.0, 1.0]) / 6


@dataclass(frozen=True, eq=False)
class PoseEnergyResult:
    """What :func:`pose_flow_energy` and :func:`pose_path_energy` return.

    Attributes
    ----------
    ln_p0 : numpy.ndarray, shape (n,)
        Relative to Lebesgue [nm^-3] x the normalised Haar measure.
    standard_error : numpy.ndarray, shape (n,)
        Over the random paths; 0 where there is no chance.
    discretisation_error : numpy.ndarray, shape (n,)
        Difference to half the resolution (flow: half the steps; path: Simpson's rule in place of
        Boole's): above the error that is left once the steps are fine enough. 1 kT or more says that
        they are not, and no more than that.
    ln_prior : numpy.ndarray, shape (n,)
        The part ln p_1(y_1), averaged over paths.
    method : str
    n_steps, n_paths : int
    n_calls : int
        Calls of the model.
    n_evaluations : int
        Poses that the model was evaluated at, all calls together.
    """

    ln_p0: FloatArray
    standard_error: FloatArray
    discretisation_error: FloatArray
    ln_prior: FloatArray
    method: str
    n_steps: int
    n_paths: int
    n_calls: int
    n_evaluations: int

    @property
    def energy(self) -> FloatArray:
        """-ln p_0 [n], in kT."""
        return -self.ln_p0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        out = {k: getattr(self, k) for k in self.__dataclass_fields__}
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in out.items()}


class _Counted:
    """A model in batches, held to the contract and counted."""

    def __init__(self, model: Model, divergence: Divergence | None, steps: Any, max_batch: int) -> None:
        try:
            step_tr, step_rot = (float(v) for v in steps)
        except (TypeError, ValueError) as err:
            raise InputError(f"steps: expected two displacements [nm], [rad], found {steps!r}.") from err
        if not (0 < step_tr < 1 and 0 < step_rot < 1):
            raise InputError(f"steps: expected displacements in (0, 1) nm and rad, found {steps!r}.")
        if so3._count(max_batch) < 1:
            raise InputError("max_batch: expected at least 1, found 0.")
        self.model, self.divergence, self.max_batch = model, divergence, max_batch
        self.step_tr, self.step_rot = step_tr, step_rot
        self.n_calls = self.n_evaluations = 0

    def scores(self, poses: Poses, t: FloatArray) -> tuple[FloatArray, FloatArray]:
        tr, rot = np.empty((len(poses), 3)), np.empty((len(poses), 3))
        for begin in range(0, len(poses), self.max_batch):
            part = slice(begin, begin + self.max_batch)
            tr[part], rot[part], _ = evaluate_scores(self.model, poses[part], t[part])
            self.n_calls += 1
        self.n_evaluations += len(poses)
        return tr, rot

    def with_divergence(self, poses: Poses, t: Any) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """tr, rot, div_tr, div_rot."""
        n = len(poses)
        t = times_of(t, n)
        if self.divergence is not None:
            tr, rot = self.scores(poses, t)
            known = [np.asarray(v, dtype=np.float64) for v in self.divergence(poses, t)]
            if [v.shape for v in known] != [(n,), (n,)] or not np.isfinite(known).all():
                raise ModelError(
                    f"divergence: expected two finite arrays of shape ({n},), found shapes "
                    f"{[v.shape for v in known]}."
                )
            return tr, rot, known[0], known[1]
        turn, shift = np.zeros((13, 3)), np.zeros((13, 3))
        for i in range(3):
            shift[1 + 2 * i : 3 + 2 * i, i] = self.step_tr, -self.step_tr
            turn[7 + 2 * i : 9 + 2 * i, i] = self.step_rot, -self.step_rot
        every = Poses(
            (so3.exp(turn)[:, None] @ poses.rotation).reshape(-1, 3, 3),
            (shift[:, None] + poses.translation).reshape(-1, 3),
        )
        tr, rot = (v.reshape(13, n, 3) for v in self.scores(every, np.tile(t, 13)))
        div_tr, div_rot = np.zeros((2, n))
        for i in range(3):
            div_tr += (tr[1 + 2 * i, :, i] - tr[2 + 2 * i, :, i]) / (2 * self.step_tr)
            div_rot += (rot[7 + 2 * i, :, i] - rot[8 + 2 * i, :, i]) / (2 * self.step_rot)
        return tr[0], rot[0], div_tr, div_rot


def score_divergence(
    model: Model,
    poses: Poses,
    t: Any,
    *,
    steps: tuple[float, float] = (STEP_TR, STEP_ROT),
    max_batch: int = MAX_BATCH,
) -> tuple[FloatArray, FloatArray]:
    r"""Divergences of translation and rotation score, by central differences in the six directions.

    .. math:: \nabla_\tau\cdot s_{tr} = \sum_i \frac{\partial s_{tr,i}}{\partial \tau_i}, \qquad
              \nabla_R\cdot s_{rot} = \sum_i \left.\frac{d}{d\epsilon}\right|_0
              s_{rot,i}\!\left(e^{\epsilon \hat e_i} R\right)

    Parameters
    ----------
    model : PoseScoreModel
    poses : Poses
        n of them.
    t : array_like, shape () or (n,)
    steps : (float, float)
        Displacements [nm], [rad]. A model in single precision needs about 1e-2.
    max_batch : int
        Most poses in one call of the model.

    Returns
    -------
    div_tr, div_rot : numpy.ndarray, shape (n,)
        [1/nm^2], [1/rad^2].

    Raises
    ------
    InputError
        For no poses, times outside [0, 1], or steps outside (0, 1).
    ModelError
        If the model breaks the contract.

    Examples
    --------
    >>> model = lambda poses, t: (-4 * poses.translation, 0 * poses.translation, None)
    >>> [v.round(6).tolist() for v in score_divergence(model, Poses.identity(2), 0.0)]
    [[-12.0, -12.0], [0.0, 0.0]]
    """
    counted = _Counted(model, None, steps, max_batch)
    _, _, div_tr, div_rot = counted.with_divergence(some_poses(poses), t)
    return div_tr, div_rot


def _ln_prior(prior: PosePrior | LogDensity, poses: Poses) -> FloatArray:
    value = np.asarray(
        prior.log_density(poses) if isinstance(prior, PosePrior) else prior(poses), dtype=np.float64
    )
    if value.shape != (len(poses),) or not np.isfinite(value).all():
        raise InputError(
            f"prior: expected a PosePrior or a callable with finite ln p for each of {len(poses)} poses, "
            f"found shape {value.shape}."
        )
    return value


def pose_flow_energy(
    model: Model,
    poses: Poses,
    *,
    schedule: RigidSchedule,
    prior: PosePrior | LogDensity,
    n_steps: int = 20,
    method: StepName = "rk4",
    stretch: float = 1.0,
    t_min: float = 0.0,
    divergence: Divergence | None = None,
    steps: tuple[float, float] = (STEP_TR, STEP_ROT),
    max_batch: int = MAX_BATCH,
) -> PoseEnergyResult:
    r"""-ln p_0 of poses along the probability flow.

    .. math:: \frac{d\tau}{dt} = -\frac{g_{tr}^2}{2} s_{tr}, \quad
              \omega = -\frac{g_{rot}^2}{2} s_{rot}, \quad
              \ln p_0(y_0) = \ln p_1(y_1) - \int_0^1 \left(\frac{g_{tr}^2}{2} \nabla\cdot s_{tr}
              + \frac{g_{rot}^2}{2} \nabla\cdot s_{rot}\right) dt

    =========  ==============================
    symbol     code
    =========  ==============================
    g^2        ``schedule.diffusion_tr``, ``diffusion_rot``
    s          ``model``
    ln p_1     ``prior``
    omega      angular velocity in the space frame
    =========  ==============================

    Parameters
    ----------
    model : PoseScoreModel
    poses : Poses
        n of them.
    schedule : RigidSchedule
    prior : PosePrior or callable
        ln p at t = 1: :meth:`PosePrior.noised`, or any function of poses. It must not know the native
        pose of a complex that is to be scored.
    n_steps : int
        Even: half as many give ``discretisation_error``.
    method : {"rk4", "heun"}
        On the group, :func:`~openmm_diffforce.docking.rigid_sampler.group_step`.
    stretch : float
        Of the grid, :func:`~openmm_diffforce.docking.rigid_sampler.time_grid`.
    t_min : float
        Start at this noise in place of t = 0, where a model was not trained lower: p_0 is then p_t_min.
    divergence : callable, optional
        From (poses, t) to the divergences of both scores, where the model knows them; central
        differences otherwise, 13 evaluations of the model in place of one.
    steps, max_batch
        See :func:`score_divergence`.

    Returns
    -------
    PoseEnergyResult

    Raises
    ------
    InputError
        For no poses, an odd number of steps, a bad grid, method or prior.
    ModelError
        If the model breaks the contract.
    ConvergenceError
        If a rotation turns by more than pi in a step.

    Notes
    -----
    Assumed and not checked: that the scores are those of one density noised by ``schedule``, and that
    ``prior`` is its end. Deterministic. The flow runs into the ridges between modes and is stiff there:
    for samples of an exact mixture 20 steps leave 0.001 to 0.01 kT, but for decoys around it 80 steps
    left 0.4 kT where a standing path of :func:`pose_path_energy` with 4 steps, at a thirtieth of the
    evaluations, left 0.001 (``benchmarks/results/rigid.md``).

    References
    ----------
    Y. Song et al., Score-based generative modeling through stochastic differential equations, 2021,
    arXiv:2011.13456.
    L. Falorsi and P. Forre, Neural ordinary differential equations on manifolds, 2020, arXiv:2006.06663.

    Examples
    --------
    >>> from openmm_diffforce.docking.mixture import PoseMixture
    >>> exact = PoseMixture(Poses.identity(1), [1.0], 0.1, 0.2, RigidSchedule())
    >>> poses, _ = exact.sample(2, generator=np.random.default_rng(0))
    >>> found = pose_flow_energy(exact, poses, schedule=exact.schedule, n_steps=20,
    ...                     prior=lambda p: exact.log_density(p, 1.0))
    >>> bool(np.abs(found.ln_p0 - exact.log_density(poses)).max() < 0.01)
    True
    """
    some_poses(poses)
    if so3._count(n_steps) < 2 or n_steps % 2:
        raise InputError(f"n_steps: expected an even number of at least 2, found {n_steps}.")
    if method not in ("rk4", "heun"):
        raise InputError(f"method: expected 'rk4' or 'heun', found {method!r}.")
    check_schedule(schedule)
    counted = _Counted(model, divergence, steps, max_batch)
    times = time_grid(n_steps, t_min, stretch=stretch)

    def velocity(t: float, at: Poses) -> tuple[FloatArray, FloatArray, FloatArray]:
        tr, rot, div_tr, div_rot = counted.with_divergence(at, t)
        half_tr, half_rot = 0.5 * float(schedule.diffusion_tr(t)), 0.5 * float(schedule.diffusion_rot(t))
        return -half_tr * tr, -half_rot * rot, half_tr * div_tr + half_rot * div_rot

    found = []
    for grid in (times, times[::2]):
        at, total = poses, np.zeros(len(poses))
        for a, b in pairwise(grid):
            at, total = group_step(velocity, a, at, total, b - a, method=method)
        end = _ln_prior(prior, at)
        found.append((end - total, end))
    return PoseEnergyResult(
        ln_p0=found[0][0],
        standard_error=np.zeros(len(poses)),
        discretisation_error=np.abs(found[0][0] - found[1][0]),
        ln_prior=found[0][1],
        method=f"flow ({method})",
        n_steps=n_steps,
        n_paths=1,
        n_calls=counted.n_calls,
        n_evaluations=counted.n_evaluations,
    )


def pose_path_energy(
    model: Model,
    poses: Poses,
    *,
    schedule: RigidSchedule,
    prior: PosePrior | LogDensity,
    path: Literal["noising", "standing"] = "noising",
    n_steps: int = 16,
    n_paths: int = 4,
    generator: np.random.Generator | None = None,
    stretch: float = 1.5,
    t_min: float = 0.0,
    divergence: Divergence | None = None,
    steps: tuple[float, float] = (STEP_TR, STEP_ROT),
    max_batch: int = MAX_BATCH,
) -> PoseEnergyResult:
    r"""-ln p_0 of poses along paths that do not depend on the model.

    .. math:: \ln p_0(y_0) = \ln p_1(y_1) - \int_0^1 \tfrac12 \sum g^2
              \left(\nabla\cdot s + |s|^2\right) dt - \int s \cdot dy

    A noising path is drawn at ``n_steps`` + 1 times and joined by geodesics. The joined path is as good
    as any other: the Stratonovich integral becomes an ordinary one, with Boole's rule on each piece, and
    a handful of pieces is enough where the limit of a rough path takes a thousand steps. A standing path
    is y_t = y_0: the last integral is zero, and the noise acts on the density alone.

    Parameters
    ----------
    model, poses, schedule, prior, stretch, t_min, divergence, steps, max_batch
        As in :func:`pose_flow_energy`.
    path : {"noising", "standing"}
    n_steps : int
        Pieces; the model is evaluated at 4 n_steps + 1 times.
    n_paths : int
        Noising paths for every pose, at least 2; their mean is the result.
    generator : numpy.random.Generator, optional
        For noising paths, which need it.

    Returns
    -------
    PoseEnergyResult
        Of exact scores all paths agree; ``standard_error`` shows the inconsistency of learned ones.

    Raises
    ------
    InputError
        For no poses, a bad grid, an unknown path, fewer than two noising paths, or no generator.
    ModelError
        If the model breaks the contract.

    Notes
    -----
    Assumed and not checked: as in :func:`pose_flow_energy`. Of exact scores the standing path is the
    cheapest answer: 8 steps are within 0.001 kT (rms). Of learned ones it asks for scores of decoys at
    low noise that no training has seen; noising paths stay where training was and average over the
    scores' inconsistency. Their spread is a lower bound of the error: what all paths share does not
    show. Deterministic given the generator.

    References
    ----------
    A. Hyvärinen, Estimation of non-normalized statistical models by score matching, 2005, JMLR 6, 695
    (the divergence and square of a score).
    B. Øksendal, Stochastic differential equations, 2003, doi:10.1007/978-3-642-14394-6 (Stratonovich).

    Examples
    --------
    >>> from openmm_diffforce.docking.mixture import PoseMixture
    >>> exact = PoseMixture(Poses.identity(1), [1.0], 0.1, 0.2, RigidSchedule())
    >>> poses, _ = exact.sample(2, generator=np.random.default_rng(0))
    >>> found = pose_path_energy(exact, poses, schedule=exact.schedule, generator=np.random.default_rng(1),
    ...                     prior=lambda p: exact.log_density(p, 1.0), n_paths=2)
    >>> bool(np.abs(found.ln_p0 - exact.log_density(poses)).max() < 0.01)
    True
    """
    n = len(some_poses(poses))
    if path not in ("noising", "standing"):
        raise InputError(f"path: expected 'noising' or 'standing', found {path!r}.")
    check_schedule(schedule)
    times = time_grid(n_steps, t_min, stretch=stretch)
    counted = _Counted(model, divergence, steps, max_batch)
    if path == "standing":
        n_paths = 1
    elif so3._count(n_paths) < 2:
        raise InputError(f"n_paths: expected at least 2 noising paths, found {n_paths}.")
    else:
        so3._generator(generator)

    at = poses.repeat(n_paths)
    total, coarse = np.zeros((2, len(at)))
    value = None
    for a, b in pairwise(times):
        turn, shift = np.zeros((2, len(at), 3))
        if path == "noising":
            assert generator is not None
            grow_tr, grow_rot = (
                np.sqrt(float(f(b)) ** 2 - float(f(a)) ** 2) for f in (schedule.sigma_tr, schedule.sigma_rot)
            )
            shift = grow_tr * generator.standard_normal((len(at), 3))
            turn = so3.sample_igso3(grow_rot, len(at), generator=generator)
        values = []
        for part in (*_CHORD, 1.0):
            if part or value is None:  # the end of a piece is the beginning of the next one
                value = counted.with_divergence(at.perturbed(part * turn, part * shift), a + part * (b - a))
            values.append(_rate(value, schedule, a + part * (b - a), turn / (b - a), shift / (b - a)))
        total += (b - a) * (_BOOLE @ values)
        coarse += (b - a) * (_SIMPSON @ values)
        at = at.perturbed(turn, shift)
    end = _ln_prior(prior, at)
    each = (end - total).reshape(n, n_paths)
    return PoseEnergyResult(
        ln_p0=each.mean(axis=1),
        standard_error=each.std(axis=1, ddof=1) / np.sqrt(n_paths) if n_paths > 1 else np.zeros(n),
        discretisation_error=np.abs((coarse - total).reshape(n, n_paths).mean(axis=1)),
        ln_prior=end.reshape(n, n_paths).mean(axis=1),
        method=f"{path} path",
        n_steps=n_steps,
        n_paths=n_paths,
        n_calls=counted.n_calls,
        n_evaluations=counted.n_evaluations,
    )


def _rate(
    value: tuple[FloatArray, FloatArray, FloatArray, FloatArray],
    schedule: RigidSchedule,
    t: float,
    omega: FloatArray,
    velocity: FloatArray,
) -> FloatArray:
    """d/dt of ln p_t(y_t) along a geodesic piece [n]."""
    tr, rot, div_tr, div_rot = value
    own = 0.5 * float(schedule.diffusion_tr(t)) * (div_tr + (tr**2).sum(axis=1))
    own = own + 0.5 * float(schedule.diffusion_rot(t)) * (div_rot + (rot**2).sum(axis=1))
    return own + (tr * velocity).sum(axis=1) + (rot * omega).sum(axis=1)
