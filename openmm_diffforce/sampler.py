r"""Sampling by a diffusion model: reverse SDE, probability flow, and Langevin at a fixed noise level.

All samplers take arrays and callables, and any schedule, because they work in the coordinates
z = y / alpha, where every schedule is variance exploding with tau = sigma / alpha:

.. math::

    z = x + \tau \epsilon, \qquad s_z(z, t) = \alpha_t\, s(\alpha_t z, t), \qquad
    \nabla^2 (-\ln p_\tau) \le 1 / \tau^2

====================  ====================================  =============
symbol                code                                  unit
====================  ====================================  =============
y                     noised coordinates ``y``              nm
s = grad ln p_t(y)    ``score(y, t)``, torch, like y        1/nm
tau = sigma / alpha   ``schedule.noise_to_signal(t)``       nm
k                     ``stiffness``, reduced                1/nm^2
====================  ====================================  =============

A step of the reverse SDE is not dynamics: its drift is twice that of Langevin dynamics and its
noise level falls. Dynamics is :func:`harmonic_adapter_step` at one small level, again and again;
inside OpenMM it is :class:`~openmm_diffforce.langevin.DiffusionLangevinIntegrator`.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from openmm import unit

from .errors import ConvergenceError, InputError, PoorOverlapError
from .schedule import NoiseSchedule
from .scores import (
    FloatArray,
    Score,
    ScoreSpace,
    TimeGrid,
    check_array,
    check_prior,
    prior_draws,
    score_space,
)
from .units import to_md

FINAL = ("denoise", "keep")
"""What is done with the noise that is left at the last time: see :class:`DiffusionSamples`."""


@dataclass(frozen=True)
class DiffusionSamples:
    """Samples of a diffusion model and what they cost.

    Attributes
    ----------
    samples : like the start
        In clean coordinates x [nm].
    calls : int
        Evaluations of the score, each on the whole batch.
    times : [n_steps + 1]
        Diffusion times, as they were given.
    residual_noise : float
        Noise level [nm] that the samples still carry (0 after "denoise": there the mean of x
        given the last z was taken, whose variance is too small by what is left out).
    """

    samples: FloatArray
    calls: int
    times: FloatArray
    residual_noise: float


def harmonic_adapter_step(x: Any, score: Any, stiffness: Any, noise: Any) -> FloatArray:
    r"""One step of the harmonic adapter, which is one step of overdamped Langevin dynamics.

    .. math::

        p(x'|x) \propto \exp\left[-\tfrac{k}{2} |x'-x|^2 + \tfrac12 s(x) \cdot (x'-x)\right]
        = N\!\left(x + \frac{s}{2k}, \frac1k\right), \qquad
        x' = x + \frac{s(x)}{2k} + \frac{\xi}{\sqrt k}

    With s = beta F this is the Euler-Maruyama step of dx = beta D F dt + sqrt(2 D) dW with
    ``D dt = 1/(2k)``; with unit mobility (D = kT) the time step is ``dt = beta / (2k)``.

    =======  ==============  =======================================================
    symbol   code            unit
    =======  ==============  =======================================================
    k        ``stiffness``   1/nm^2, reduced: a physical spring is kT k
    xi       ``noise``       1, standard normal
    =======  ==============  =======================================================

    Parameters
    ----------
    x : float array [..., n_atoms, 3] or [..., d]
        [nm].
    score : float array, like x
        s(x) [1/nm].
    stiffness : float, Quantity, or array that broadcasts against x
        k [1/nm^2], reduced; one per atom as [n_atoms, 1].
    noise : float array, like x
        Standard normal numbers.

    Returns
    -------
    numpy.ndarray
        x' [nm].

    Raises
    ------
    InputError, UnitsError
        If shapes differ, a number is not finite, or k is not above zero.

    Notes
    -----
    Deterministic: the noise is passed in.

    References
    ----------
    Diffusion samplers as Langevin integrators, arXiv:2511.17741.

    Examples
    --------
    >>> harmonic_adapter_step([[0.1, 0.0]], [[-20.0, 0.0]], 100.0, [[0.0, 1.0]]).tolist()
    [[0.0, 0.1]]
    """
    x = _array("x", to_md(x, unit.nanometer, name="x"))
    s = _array("score", to_md(score, unit.nanometer**-1, name="score"), x.shape)
    xi = _array("noise", noise, x.shape)
    k = _array("stiffness", to_md(stiffness, unit.nanometer**-2, name="stiffness"))
    if not (k > 0).all():
        raise InputError(f"stiffness: expected k > 0 [1/nm^2], found {float(k.min())!r}.")
    try:
        np.broadcast_shapes(k.shape, x.shape)
        out = x + s / (2.0 * k) + xi / np.sqrt(k)
    except ValueError as err:
        raise InputError(
            f"stiffness: expected a number, or one per atom as [n_atoms, 1], found shape {k.shape} "
            f"beside x {x.shape}."
        ) from err
    if out.shape != x.shape:
        raise InputError(f"stiffness: expected a shape that broadcasts to x {x.shape}, found {k.shape}.")
    return np.asarray(out)


def noise_frames(
    x: Any,
    schedule: NoiseSchedule,
    t: float,
    *,
    generator: np.random.Generator,
    mean_free: bool | None = None,
) -> FloatArray:
    """y = alpha x + sigma eps [nm]: the start of a local diffusion, from frames that are there.

    Parameters
    ----------
    x : float array [n, n_atoms, 3] or [n, d]
        Clean frames [nm].
    schedule : VESchedule or VPSchedule
    t : float
        Diffusion time.
    generator : numpy.random.Generator
    mean_free : bool, optional
        Noise without a mean over atoms (a free molecule); by default for frames of atoms.

    Raises
    ------
    InputError
        If frames or t are unusable.
    """
    frames = _array("x", to_md(x, unit.nanometer, name="x"))
    space = _space(None, "x", frames, mean_free)
    eps = _project(space, generator.standard_normal(frames.shape))
    return np.asarray(float(schedule.alpha(t)) * frames + float(schedule.sigma(t)) * eps)


def prior_frames(
    shape: tuple[int, ...], schedule: NoiseSchedule, t: float, *, generator: np.random.Generator,
    prior: Any = "standard", mean_free: bool | None = None,
) -> FloatArray:  # fmt: skip
    r"""Draws of the Gaussian prior at time t: the start of a complete diffusion.

    .. math:: y \sim N(\alpha_t m,\; \sigma_t^2 + \alpha_t^2 C)

    Parameters
    ----------
    shape : tuple of int
        (n, n_atoms, 3) or (n, d).
    schedule : VESchedule or VPSchedule
    t : float
    generator : numpy.random.Generator
    prior : "standard" or GaussianPrior
        Mean m and covariance C of the data: :func:`~openmm_diffforce.scores.matched_prior` of frames.
    mean_free : bool, optional
        As in :func:`noise_frames`.

    Raises
    ------
    InputError
        If shape or prior are unusable.
    """
    if len(shape) < 2 or min(shape) < 1:
        raise InputError(f"shape: expected (n, n_atoms, 3) or (n, d) without a zero, found {shape}.")
    space = _space(None, "shape", np.zeros(shape), mean_free)
    noise = torch.as_tensor(generator.standard_normal((shape[0], space.size)))
    grid = TimeGrid.of(schedule, np.array([float(t)]))
    draws = prior_draws(check_prior(prior, schedule, space), space, noise, grid.alpha[0], grid.sigma[0])
    return np.asarray(draws.numpy().reshape(shape))


class _Walk:
    """A batch on its way down the noise levels, in z = y / alpha; counts what it asks the score."""

    def __init__(
        self, score: Score, y: Any, schedule: NoiseSchedule, times: Any, final: str, mean_free: bool | None
    ) -> None:
        if final not in FINAL:
            raise InputError(f'final: expected "denoise" or "keep", found {final!r}.')
        y = _array("y", to_md(y, unit.nanometer, name="y"))
        self.space = _space(score, "y", y, mean_free)
        self.shape, self.final = y.shape, final
        self.times = _array("times", times)
        if self.times.ndim != 1 or len(self.times) < 2 or not (np.diff(self.times) > 0).all():
            raise InputError(
                f"times: expected at least two increasing diffusion times (noise_grid), found {times!r}."
            )
        if not self.times[0] > 0:
            raise InputError(
                "times: expected a first time above 0, where there is still noise to tell the score from; "
                "choose a small sigma_min and final='denoise'."
            )
        grid = TimeGrid.of(schedule, self.times[::-1].copy())
        self.alphas, self.taus, self.t = grid.alpha, grid.tau, grid.t
        self.z = _project(self.space, y / self.alphas[0])
        self.calls = 0

    def score_z(self, z: FloatArray, i: int) -> FloatArray:
        """s_z(z) at the i-th level."""
        self.calls += 1
        rows = torch.as_tensor(self.alphas[i] * z).reshape(len(z), -1)
        return np.asarray(self.alphas[i] * self.space.at(rows, float(self.t[i])).numpy().reshape(self.shape))

    def noise(self, generator: np.random.Generator) -> FloatArray:
        return _project(self.space, generator.standard_normal(self.shape))

    def reverse_step(self, i: int, generator: np.random.Generator) -> None:
        """From level i to i + 1: the exact posterior of z if x were its mean."""
        high, low = self.taus[i], self.taus[i + 1]
        drop = high**2 - low**2
        self.z = self.z + drop * self.score_z(self.z, i)
        self.z += low / high * math.sqrt(drop) * self.noise(generator)

    def result(self) -> DiffusionSamples:
        x, left = self.z, float(self.taus[-1])
        if self.final == "denoise":
            x, left = x + left**2 * self.score_z(x, len(self.t) - 1), 0.0
        if not np.isfinite(x).all():
            raise ConvergenceError("samples: expected finite numbers, found others; take more steps.")
        return DiffusionSamples(x, self.calls, self.times, left)


def reverse_sde(
    score: Score,
    y: Any,
    schedule: NoiseSchedule,
    *,
    times: Any,
    generator: np.random.Generator,
    final: str,
    mean_free: bool | None = None,
) -> DiffusionSamples:
    r"""Ancestral sampling: the reverse SDE, each step the posterior of the less noised frame.

    .. math::

        z_{j} = z_i + (\tau_i^2 - \tau_j^2)\, s_z(z_i)
        + \frac{\tau_j}{\tau_i} \sqrt{\tau_i^2 - \tau_j^2}\; \xi

    Parameters
    ----------
    score : callable
        ``score(y, t [n]) -> s``, torch tensors: grad ln p_t(y) [1/nm], shaped like y
        (:func:`~openmm_diffforce.scores.score_of` makes one of a model).
    y : float array [n, n_atoms, 3] or [n, d]
        Noised frames at ``times[-1]`` [nm]: :func:`prior_frames`, or :func:`noise_frames` for a
        diffusion about frames that are there.
    schedule : VESchedule or VPSchedule
    times : float array [n_steps + 1]
        Diffusion times, increasing from above 0 and walked from the last to the first:
        :func:`~openmm_diffforce.scores.noise_grid`.
    generator : numpy.random.Generator
    final : {"denoise", "keep"}
        At the end: take the mean of x given z, ``z + tau^2 s_z`` (one more call; sharp, and
        too narrow by the variance that the mean has lost), or keep z with its noise tau.
    mean_free : bool, optional
        Start, noise and score without their mean over atoms; by default for frames of atoms.

    Returns
    -------
    DiffusionSamples

    Raises
    ------
    InputError, UnitsError
        For shapes, times or options that do not fit.
    ModelError, ConvergenceError
        If score or samples are no longer finite.

    References
    ----------
    Y. Song et al., Score-based generative modeling through stochastic differential equations,
    2021, arXiv:2011.13456.

    Examples
    --------
    A Gaussian of width 0.02 nm, from noise alone:

    >>> from openmm_diffforce.schedule import VESchedule
    >>> from openmm_diffforce.scores import noise_grid
    >>> schedule, random = VESchedule(0.5), np.random.default_rng(1)
    >>> score = lambda y, t: -y / (0.02**2 + schedule.sigma(t)[:, None] ** 2)
    >>> y = prior_frames((4000, 2), schedule, 1.0, generator=random)
    >>> times = noise_grid(schedule, 300, kind="log", sigma_min=0.001)
    >>> found = reverse_sde(score, y, schedule, times=times, generator=random, final="keep")
    >>> found.calls, bool(abs(found.samples.std() - 0.02) < 0.001)
    (300, True)
    """
    walk = _Walk(score, y, schedule, times, final, mean_free)
    for i in range(len(walk.t) - 1):
        walk.reverse_step(i, generator)
    return walk.result()


def probability_flow(
    score: Score, y: Any, schedule: NoiseSchedule, *, times: Any, final: str, method: str = "heun",
    mean_free: bool | None = None,
) -> DiffusionSamples:  # fmt: skip
    r"""Deterministic sampling: the probability-flow ODE, which has the reverse SDE's marginals.

    .. math:: \frac{dz}{d\tau} = -\tau\, s_z(z)

    Parameters
    ----------
    score, y, schedule, times, final, mean_free
        As in :func:`reverse_sde`.
    method : {"heun", "euler"}
        Second order with two calls a step, or first order with one.

    Returns
    -------
    DiffusionSamples

    Raises
    ------
    InputError, UnitsError
        For shapes, times or options that do not fit.
    ModelError, ConvergenceError
        If score or samples are no longer finite.

    References
    ----------
    Y. Song et al., 2021, arXiv:2011.13456.
    """
    if method not in ("heun", "euler"):
        raise InputError(f'method: expected "heun" or "euler", found {method!r}.')
    walk = _Walk(score, y, schedule, times, final, mean_free)
    for i in range(len(walk.t) - 1):
        step = walk.taus[i + 1] - walk.taus[i]
        slope = -walk.taus[i] * walk.score_z(walk.z, i)
        if method == "heun":
            ahead = -walk.taus[i + 1] * walk.score_z(walk.z + step * slope, i + 1)
            slope = 0.5 * (slope + ahead)
        walk.z = walk.z + step * slope
    return walk.result()


def predictor_corrector(
    score: Score,
    y: Any,
    schedule: NoiseSchedule,
    *,
    times: Any,
    generator: np.random.Generator,
    final: str,
    n_corrector: int = 1,
    corrector_step: float = 0.2,
    mean_free: bool | None = None,
) -> DiffusionSamples:
    r"""Reverse steps, each followed by Langevin steps at the level reached.

    The corrector is :func:`harmonic_adapter_step` with ``1/(2k) = r tau^2``; the curvature of
    ``-ln p_tau`` is at most ``1/tau^2``, so that r < 2 is stable at every level.

    Parameters
    ----------
    score, y, schedule, times, generator, final, mean_free
        As in :func:`reverse_sde`.
    n_corrector : int
        Langevin steps per level.
    corrector_step : float
        r, in (0, 2); its bias of the variance along a direction without signal is 1/(1 - r/2).

    Returns
    -------
    DiffusionSamples

    Raises
    ------
    InputError, UnitsError
        For shapes, times or options that do not fit.
    ModelError, ConvergenceError
        If score or samples are no longer finite.

    References
    ----------
    Y. Song et al., 2021, arXiv:2011.13456.
    """
    if not isinstance(n_corrector, int | np.integer) or isinstance(n_corrector, bool) or n_corrector < 0:
        raise InputError(f"n_corrector: expected an integer >= 0, found {n_corrector!r}.")
    if not (isinstance(corrector_step, int | float) and 0 < corrector_step < 2):
        raise InputError(
            f"corrector_step: expected a number in (0, 2), found {corrector_step!r}; from 2 on the Langevin "
            "steps are unstable."
        )
    walk = _Walk(score, y, schedule, times, final, mean_free)
    for i in range(len(walk.t) - 1):
        walk.reverse_step(i, generator)
        k = 1.0 / (2.0 * corrector_step * walk.taus[i + 1] ** 2)
        for _ in range(n_corrector):
            walk.z = harmonic_adapter_step(walk.z, walk.score_z(walk.z, i + 1), k, walk.noise(generator))
    return walk.result()


@dataclass(frozen=True)
class Reweighting:
    """Weights of frames of one ensemble in another, and how many frames they are worth.

    Attributes
    ----------
    weights : [n_frames]
        Sum 1.
    effective_samples : float
        Kish: ``1 / sum(weights^2)``; between 1 and n_frames.
    delta_f : float
        Reduced free energy of the target less that of the sampled ensemble [kT]; up to the free
        constant of a learned action.
    """

    weights: FloatArray
    effective_samples: float
    delta_f: float

    def average(self, values: Any) -> tuple[float, float]:
        """Reweighted mean of one number per frame, and its standard error (independent frames)."""
        v = _array("values", values, self.weights.shape)
        mean = float(self.weights @ v)
        return mean, float(np.sqrt(((self.weights * (v - mean)) ** 2).sum()))


def reweight_samples(u_target: Any, action: Any, *, min_effective: float = 20.0) -> Reweighting:
    r"""From the ensemble that was sampled to the one that is wanted.

    .. math:: w_n \propto \exp[-(u(x_n) - S(x_n))], \qquad
              n_\mathrm{eff} = \frac{(\sum w)^2}{\sum w^2}

    ======  ==================  ==========================================================
    symbol  code                unit
    ======  ==================  ==========================================================
    u       ``u_target``        kT: beta U of the force field on the frames
    S       ``action``          kT: minus the logarithm of the density sampled from: the learned
                                action (dynamics), or -ln p0 (frames of a reverse diffusion)
    ======  ==================  ==========================================================

    Parameters
    ----------
    u_target, action : float array [n_frames]
        Reduced; constants do not matter to the weights.
    min_effective : float
        Refuse fewer effective samples than this; 0 never refuses.

    Returns
    -------
    Reweighting

    Raises
    ------
    InputError
        For shapes that differ, no frames, or numbers that are not finite.
    PoorOverlapError
        If the effective sample size is below ``min_effective``.

    Notes
    -----
    Not checked: that frames are independent, and that ``action`` is that of the density they came
    from; a large effective sample size does not prove either.

    References
    ----------
    L. Kish, Survey Sampling, Wiley, 1965 (effective sample size).

    Examples
    --------
    >>> found = reweight_samples([0.0, 0.7, 0.0, 0.7], [0.0, 0.0, 0.0, 0.0], min_effective=0)
    >>> round(found.effective_samples, 2)
    3.59
    """
    u = _array("u_target", u_target)
    s = _array("action", action, u.shape)
    if u.ndim != 1 or len(u) == 0:
        raise InputError(f"u_target: expected one number per frame, [n_frames] >= 1, found shape {u.shape}.")
    log_w = s - u
    top = log_w.max()
    w = np.exp(log_w - top)
    delta_f = -float(top + math.log(w.mean()))
    w /= w.sum()
    effective = float(1.0 / (w**2).sum())
    if effective < min_effective:
        raise PoorOverlapError(
            f"reweighting: expected at least {min_effective:g} effective samples, found {effective:.1f} of "
            f"{len(w)} frames: the sampled ensemble hardly overlaps with the target, and a few frames would "
            "decide every average. Train on more frames, sample more, or (for the number all the same) "
            "pass min_effective=0."
        )
    return Reweighting(w, effective, delta_f)


def _array(name: str, value: Any, shape: tuple[int, ...] | None = None) -> FloatArray:
    """A finite float64 array, of a shape if given, or InputError with the name."""
    out = check_array(name, value)
    if shape is not None and out.shape != shape:
        raise InputError(f"{name}: expected shape {shape}, found {out.shape}.")
    return out


def _space(score: Any, name: str, y: FloatArray, mean_free: bool | None) -> ScoreSpace:
    """Where a batch lives; a score that is not asked may be None."""
    if y.ndim not in (2, 3) or 0 in y.shape or (y.ndim == 3 and y.shape[-1] != 3):
        raise InputError(f"{name}: expected [n, n_atoms, 3] or [n, d], not empty, found shape {y.shape}.")
    return score_space(
        (lambda y, t: y) if score is None else score, y.shape[1:], mean_free=mean_free, divergence="exact",
        n_probes=1, difference=None, dtype=torch.float64,
    )  # fmt: skip


def _project(space: ScoreSpace, v: FloatArray) -> FloatArray:
    return np.asarray(space.project(torch.as_tensor(v).reshape(len(v), -1)).numpy().reshape(v.shape))
