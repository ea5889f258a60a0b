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
s = grad ln p_t(y)    ``score(y, t)``, shaped like y        1/nm
tau = sigma / alpha   ``schedule.noise_to_signal(t)``       nm
k                     ``stiffness``, reduced                1/nm^2
====================  ====================================  =============

A step of the reverse SDE is not dynamics: its drift is twice that of Langevin dynamics and its
noise level falls. Dynamics is :func:`harmonic_adapter_step` at one small level, again and again;
inside OpenMM it is :class:`~openmm_diffforce.langevin.DiffusionLangevinIntegrator`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from openmm import unit

from .errors import ConvergenceError, InputError, PoorOverlapError
from .models.action import model_fields
from .schedule import NoiseSchedule
from .units import to_md

FloatArray = np.ndarray
Score = Callable[[FloatArray, float], Any]

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
        Diffusion times, falling.
    residual_noise : float
        Noise level [nm] that the samples still carry (0 after "denoise": there the mean of x
        given the last z was taken, whose variance is too small by what is left out).
    """

    samples: FloatArray
    calls: int
    times: FloatArray
    residual_noise: float


def model_score(model: Any, *, lam: float = 0.0) -> Score:
    """The score -dS/dx of a model as ``score(y, t)``, for the samplers of this module.

    Parameters
    ----------
    model : ActionModel, ScoreModel or TorchScript of one
        E.g. ``load_artefact(path).model``.
    lam : float

    Returns
    -------
    callable
        ``score(y[n_frames, n_atoms, 3] nm, t) -> [n_frames, n_atoms, 3]`` [1/nm].

    Examples
    --------
    >>> import torch
    >>> from openmm_diffforce.models import AutogradAction
    >>> class Spring(torch.nn.Module):
    ...     def forward(self, x: torch.Tensor, t: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    ...         return 50.0 * (x**2).sum(2).sum(1)
    >>> model_score(AutogradAction(Spring()))(np.full((1, 1, 3), 0.1), 0.0).round(9).tolist()
    [[[-10.0, -10.0, -10.0]]]
    """
    return lambda y, t: -model_fields(model, y, t=t, lam=lam)[1]


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


def diffusion_times(
    schedule: NoiseSchedule, n_steps: int, *, sigma_min: Any, sigma_max: Any = None, spacing: str = "log"
) -> FloatArray:
    """Falling grid of diffusion times for a sampler.

    Parameters
    ----------
    schedule : VESchedule or VPSchedule
    n_steps : int
    sigma_min : float or Quantity
        Noise-to-signal ratio at the last time [nm], above zero: the score has no limit at t = 0
        for samples that are not clean already.
    sigma_max : float or Quantity, optional
        At the first time [nm]; by default that of t = 1.
    spacing : {"log", "time"}
        Steps of equal ratio in sigma/alpha, or equal in t.

    Returns
    -------
    [n_steps + 1]

    Raises
    ------
    InputError, UnitsError
        For counts, levels or a spacing that do not fit.

    Examples
    --------
    >>> from openmm_diffforce.schedule import VESchedule
    >>> diffusion_times(VESchedule(0.05), 2, sigma_min=0.0005).round(4).tolist()
    [1.0, 0.3162, 0.1]
    """
    if not isinstance(n_steps, int | np.integer) or isinstance(n_steps, bool) or n_steps < 1:
        raise InputError(f"n_steps: expected an integer >= 1, found {n_steps!r}.")
    first = 1.0 if sigma_max is None else schedule.t_of_sigma(sigma_max)
    last = schedule.t_of_sigma(sigma_min)
    if not 0 < last < first:
        raise InputError(
            f"sigma_min, sigma_max: expected 0 < sigma_min < sigma_max [nm], found {sigma_min!r} and "
            f"{'that of t = 1' if sigma_max is None else repr(sigma_max)}."
        )
    if spacing == "time":
        return np.linspace(first, last, n_steps + 1)
    if spacing != "log":
        raise InputError(f'spacing: expected "log" or "time", found {spacing!r}.')
    high, low = (float(schedule.noise_to_signal(t)) for t in (first, last))
    inner = np.geomspace(high, low, n_steps + 1)[1:-1]
    return np.array([first, *(schedule.t_of_sigma(v) for v in inner), last])


def noise_frames(
    x: Any, schedule: NoiseSchedule, t: float, *, generator: np.random.Generator, mean_free: bool = False
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
    mean_free : bool
        Noise without a mean over atoms (a free molecule).

    Raises
    ------
    InputError
        If frames or t are unusable.
    """
    frames = _array("x", to_md(x, unit.nanometer, name="x"))
    _check_batch("x", frames, mean_free)
    eps = _centred(generator.standard_normal(frames.shape), mean_free)
    return np.asarray(float(schedule.alpha(t)) * frames + float(schedule.sigma(t)) * eps)


def prior_frames(
    shape: tuple[int, ...], schedule: NoiseSchedule, t: float, *, generator: np.random.Generator,
    mean: Any = 0.0, std: Any = 0.0, mean_free: bool = False,
) -> FloatArray:  # fmt: skip
    r"""Draws of the moment-matched Gaussian prior at time t: the start of a complete diffusion.

    .. math:: y \sim N(\alpha_t m,\; \sigma_t^2 + \alpha_t^2 v)

    Parameters
    ----------
    shape : tuple of int
        (n, n_atoms, 3) or (n, d).
    schedule : VESchedule or VPSchedule
    t : float
    generator : numpy.random.Generator
    mean, std : float or array that broadcasts against one frame
        m and sqrt(v) of the data [nm].
    mean_free : bool
        As in :func:`noise_frames`; give ``std`` as one number then.

    Raises
    ------
    InputError
        If shape, mean or std are unusable.
    """
    if len(shape) < 2 or min(shape) < 1:
        raise InputError(f"shape: expected (n, n_atoms, 3) or (n, d) without a zero, found {shape}.")
    m, v = (_array(n, to_md(a, unit.nanometer, name=n)) for n, a in (("mean", mean), ("std", std)))
    if (v < 0).any():
        raise InputError(f"std: expected numbers >= 0 [nm], found {float(v.min())!r}.")
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    draws = np.zeros(shape)
    _check_batch("shape", draws, mean_free)
    try:
        draws += alpha * m + np.sqrt(sigma**2 + (alpha * v) ** 2) * generator.standard_normal(shape)
    except ValueError as err:
        raise InputError(f"mean, std: expected shapes that broadcast to {shape[1:]} ({err}).") from err
    return _centred(draws, mean_free)


class _Walk:
    """A batch on its way down the noise levels, in z = y / alpha; counts what it asks the score."""

    def __init__(
        self, score: Score, y: Any, schedule: NoiseSchedule, times: Any, final: str, mean_free: bool
    ) -> None:
        if not callable(score):
            raise InputError(f"score: expected a callable score(y, t), found {type(score).__name__}.")
        if final not in FINAL:
            raise InputError(f'final: expected "denoise" or "keep", found {final!r}.')
        y = _array("y", to_md(y, unit.nanometer, name="y"))
        _check_batch("y", y, mean_free)
        self.times = _array("times", times)
        if self.times.ndim != 1 or len(self.times) < 2 or not (np.diff(self.times) < 0).all():
            raise InputError(f"times: expected at least two falling diffusion times, found {times!r}.")
        if not self.times[-1] > 0:
            raise InputError(
                "times: expected a last time above 0, where there is still noise to tell the score from; "
                "choose a small one and final='denoise'."
            )
        self.score, self.schedule, self.final, self.mean_free = score, schedule, final, mean_free
        self.alphas = schedule.alpha(self.times).numpy()
        self.taus = schedule.noise_to_signal(self.times).numpy()
        self.z = _centred(y / self.alphas[0], mean_free)
        self.calls = 0

    def score_z(self, z: FloatArray, i: int) -> FloatArray:
        """s_z(z) at the i-th time."""
        self.calls += 1
        s = np.asarray(self.score(self.alphas[i] * z, float(self.times[i])), dtype=np.float64)
        if s.shape != z.shape:
            raise InputError(f"score: expected a result of shape {z.shape}, found {s.shape}.")
        if not np.isfinite(s).all():
            raise ConvergenceError(
                f"score: expected finite numbers at t = {self.times[i]:.4g} (noise {self.taus[i]:.4g} nm), "
                "found others; the samples left the range of the model, or it is not made for this t."
            )
        return _centred(self.alphas[i] * s, self.mean_free)

    def noise(self, generator: np.random.Generator) -> FloatArray:
        return _centred(generator.standard_normal(self.z.shape), self.mean_free)

    def reverse_step(self, i: int, generator: np.random.Generator) -> None:
        """From time i to i + 1: the exact posterior of z if x were its mean."""
        high, low = self.taus[i], self.taus[i + 1]
        drop = high**2 - low**2
        self.z = self.z + drop * self.score_z(self.z, i)
        self.z += low / high * math.sqrt(drop) * self.noise(generator)

    def result(self) -> DiffusionSamples:
        x, left = self.z, float(self.taus[-1])
        if self.final == "denoise":
            x, left = x + left**2 * self.score_z(x, len(self.times) - 1), 0.0
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
    mean_free: bool = False,
) -> DiffusionSamples:
    r"""Ancestral sampling: the reverse SDE, each step the posterior of the less noised frame.

    .. math::

        z_{j} = z_i + (\tau_i^2 - \tau_j^2)\, s_z(z_i)
        + \frac{\tau_j}{\tau_i} \sqrt{\tau_i^2 - \tau_j^2}\; \xi

    Parameters
    ----------
    score : callable
        ``score(y, t)`` = grad ln p_t(y) [1/nm], shaped like y; ``t`` is a float. See
        :func:`model_score`.
    y : float array [n, n_atoms, 3] or [n, d]
        Noised frames at ``times[0]`` [nm]: :func:`prior_frames`, or :func:`noise_frames` for a
        diffusion about frames that are there.
    schedule : VESchedule or VPSchedule
    times : float array [n_steps + 1]
        Falling diffusion times, the last above 0: :func:`diffusion_times`.
    generator : numpy.random.Generator
    final : {"denoise", "keep"}
        At the last time: take the mean of x given z, ``z + tau^2 s_z`` (one more call; sharp, and
        too narrow by the variance that the mean has lost), or keep z with its noise tau.
    mean_free : bool
        For a free molecule: start, noise and score without their mean over atoms.

    Returns
    -------
    DiffusionSamples

    Raises
    ------
    InputError, UnitsError
        For shapes, times or options that do not fit.
    ConvergenceError
        If score or samples are no longer finite.

    References
    ----------
    Y. Song et al., Score-based generative modeling through stochastic differential equations,
    2021, arXiv:2011.13456.

    Examples
    --------
    A Gaussian of width 0.02 nm, from noise alone:

    >>> from openmm_diffforce.schedule import VESchedule
    >>> schedule, random = VESchedule(0.5), np.random.default_rng(1)
    >>> score = lambda y, t: -y / (0.02**2 + float(schedule.sigma(t)) ** 2)
    >>> y = prior_frames((4000, 2), schedule, 1.0, generator=random)
    >>> times = diffusion_times(schedule, 300, sigma_min=0.001)
    >>> found = reverse_sde(score, y, schedule, times=times, generator=random, final="keep")
    >>> found.calls, bool(abs(found.samples.std() - 0.02) < 0.001)
    (300, True)
    """
    walk = _Walk(score, y, schedule, times, final, mean_free)
    for i in range(len(walk.times) - 1):
        walk.reverse_step(i, generator)
    return walk.result()


def probability_flow(
    score: Score, y: Any, schedule: NoiseSchedule, *, times: Any, final: str, method: str = "heun",
    mean_free: bool = False,
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
    ConvergenceError
        If score or samples are no longer finite.

    References
    ----------
    Y. Song et al., 2021, arXiv:2011.13456.
    """
    if method not in ("heun", "euler"):
        raise InputError(f'method: expected "heun" or "euler", found {method!r}.')
    walk = _Walk(score, y, schedule, times, final, mean_free)
    for i in range(len(walk.times) - 1):
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
    mean_free: bool = False,
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
    ConvergenceError
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
    for i in range(len(walk.times) - 1):
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
    try:
        out = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as err:
        raise InputError(f"{name}: expected an array of numbers, found {err}.") from err
    if shape is not None and out.shape != shape:
        raise InputError(f"{name}: expected shape {shape}, found {out.shape}.")
    if not np.isfinite(out).all():
        raise InputError(f"{name}: expected finite numbers, found others.")
    return out


def _check_batch(name: str, y: FloatArray, mean_free: bool) -> None:
    if y.ndim not in (2, 3) or 0 in y.shape or (y.ndim == 3 and y.shape[-1] != 3):
        raise InputError(f"{name}: expected [n, n_atoms, 3] or [n, d], not empty, found shape {y.shape}.")
    if mean_free and (y.ndim != 3 or y.shape[1] < 2):
        raise InputError(
            f"mean_free: expected frames [n, n_atoms >= 2, 3], whose mean over atoms goes; found {y.shape}."
        )


def _centred(v: FloatArray, mean_free: bool) -> FloatArray:
    return np.asarray(v - v.mean(axis=-2, keepdims=True)) if mean_free else v
