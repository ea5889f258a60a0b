r"""What energies and dynamics of a diffusion model share: scores, their divergence, priors, grids.

A score is a callable ``score(y, t) -> s`` of torch tensors, s the gradient of ln p_t at the noised
coordinates y [n_frames, ...] in nm. :class:`ScoreSpace` calls it on flat rows, in the subspace without the
centre of mass where that is asked for, and counts.

References
----------
M. F. Hutchinson, A stochastic estimator of the trace, Commun. Stat. 19 (1990),
doi:10.1080/03610919008812866; T. Karras et al., 2022, arXiv:2206.00364 (a grid).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from openmm import unit

from .errors import InputError, ModelError
from .models.action import model_dtype
from .schedule import NoiseSchedule, VESchedule, VPSchedule
from .units import to_md

Tensor = torch.Tensor
FloatArray = npt.NDArray[np.float64]
Score = Callable[[Tensor, Tensor], Tensor]

GRIDS = ("quadratic", "linear", "log", "karras")
"""How t is spread between the smallest and the largest noise."""

KARRAS_RHO = 7.0
"""Exponent of the grid of T. Karras et al., 2022, arXiv:2206.00364."""

ROWS_AT_ONCE = 2048
"""Rows, copies among them, that a divergence puts into one call of the score."""

CHUNK = 32
"""Steps for which noise is drawn at once: the noise of a row depends on no other row."""


@dataclass(frozen=True, eq=False)
class GaussianPrior:
    """Moments of the clean data: what p_T looks like at the largest noise.

    p_T is taken to be ``N(alpha_T mean, alpha_T^2 covariance + sigma_T^2)``: exact for a Gaussian,
    and for anything else in the limit of large noise; with the right moments the error falls fastest.

    Attributes
    ----------
    mean : numpy.ndarray or float
        [n_dim], or one number for all [nm].
    covariance : numpy.ndarray or float
        [n_dim, n_dim], or the variance of each component [nm^2]; zero is a point.

    Raises
    ------
    InputError
        If a number is not finite, shapes disagree, or the covariance is not symmetric and
        positive semidefinite.
    """

    mean: Any = 0.0
    covariance: Any = 0.0

    def __post_init__(self) -> None:
        mean, covariance = (
            check_array("prior mean", self.mean),
            check_array("prior covariance", self.covariance),
        )
        if mean.ndim > 1 or covariance.ndim not in (0, 2):
            raise InputError(
                "prior: expected a mean of shape (n_dim,) and a covariance of shape (n_dim, n_dim), or "
                f"numbers, found {mean.shape} and {covariance.shape}."
            )
        sizes = {*mean.shape, *covariance.shape}
        if len(sizes) > 1:
            raise InputError(f"prior: expected one dimension, found {mean.shape} and {covariance.shape}.")
        if covariance.ndim == 0:
            smallest, scale = float(covariance), abs(float(covariance))
        else:
            scale = float(np.abs(covariance).max())
            if not np.allclose(covariance, covariance.T, atol=1e-9 * scale):
                raise InputError("prior covariance: expected a symmetric matrix, found another.")
            smallest = float(np.linalg.eigvalsh(covariance)[0])
        if smallest < -1e-9 * scale:
            raise InputError(f"prior covariance: expected no eigenvalue below 0, found {smallest:.3g}.")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "covariance", covariance)


def matched_prior(frames: Any, *, isotropic: bool = False) -> GaussianPrior:
    r"""The Gaussian with the moments of frames.

    Parameters
    ----------
    frames : array_like, shape (n_frames, n_dim) or (n_frames, n_atoms, 3)
        Samples of p_0 (training frames) [nm]. Molecules are centred and their covariance is averaged
        over all orientations, since a model's p_0 has none: mean zero and
        :math:`C_{ij} = \langle x_i \cdot x_j \rangle / 3` for each axis.
    isotropic : bool
        One variance for all directions, instead of the full covariance.

    Returns
    -------
    GaussianPrior

    Raises
    ------
    InputError
        For fewer than two frames, or numbers that are not finite.

    Examples
    --------
    >>> matched_prior([[0.0, 0.0], [2.0, 4.0]]).mean.tolist()
    [1.0, 2.0]
    """
    x = check_array("frames", to_md(frames, unit.nanometer, name="frames"))
    if x.ndim not in (2, 3) or len(x) < 2 or (x.ndim == 3 and x.shape[2] != 3) or 0 in x.shape:
        raise InputError(
            "frames: expected shape (n_frames, n_dim) or (n_frames, n_atoms, 3) with two frames or "
            f"more, found {x.shape}."
        )
    if x.ndim == 3:
        n_atoms = x.shape[1]
        x = x - x.mean(axis=1, keepdims=True)
        gram = np.einsum("fia,fja->ij", x, x) / (3 * len(x))
        if isotropic:  # spread over the 3 n - 3 directions that there are
            return GaussianPrior(0.0, float(np.trace(gram)) / max(n_atoms - 1, 1))
        return GaussianPrior(np.zeros(3 * n_atoms), np.kron(gram, np.eye(3)))
    mean = x.mean(axis=0)
    covariance = (x - mean).T @ (x - mean) / len(x)
    return GaussianPrior(mean, float(np.trace(covariance)) / x.shape[1] if isotropic else covariance)


# ------------------------------------------------------------------------------------ scores


class ModelScore:
    """Score of a model with explicit derivatives, and products with its Jacobian.

    ``score(y, t)`` is ``-dS/dx``; ``score.product(y, t, v)`` the Jacobian times v, from the model's own
    Hessian products if it has them, else by central differences of the score.
    """

    def __init__(self, model: Any, lam: float, step: float) -> None:
        self.model, self.lam, self.step = model, lam, step
        self.dtype = model_dtype(model)

    def _arguments(self, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return y.to(self.dtype), t.to(self.dtype), torch.full((len(y),), self.lam, dtype=self.dtype)

    def __call__(self, y: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            gradient: Tensor = self.model.fields(*self._arguments(y, t))[1]
        return -gradient.to(y.dtype)

    def product(self, y: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Jacobian of the score times v, both [n_frames, n_atoms, 3]."""
        if hasattr(self.model, "hessian_product"):
            y_, t_, lam = self._arguments(y, t)
            with torch.no_grad():
                found: Tensor = self.model.hessian_product(y_, t_, lam, v.to(self.dtype))
            return -found.to(y.dtype)
        return (self(y + self.step * v, t) - self(y - self.step * v, t)) / (2.0 * self.step)


def score_of(model: Any, *, lam: float = 0.0, step: float | None = None) -> Score:
    """The score s(y, t) of one of this package's models.

    Parameters
    ----------
    model : ActionModel, ScoreModel, TorchScript of one, or Artefact
    lam : float
        The alchemical coordinate.
    step : float, optional
        Displacement of central differences [nm], where a model has no second derivatives of its
        own; by default 1e-5 for float64 weights and 1e-3 for float32.

    Returns
    -------
    callable
        ``score(y, t) -> s``, for :func:`learned_energy` with the model's own schedule.

    Raises
    ------
    InputError
        If this is no model, or a number is unusable.

    Notes
    -----
    A model that needs autograd (:class:`~openmm_diffforce.models.action.AutogradAction`) is
    differentiated twice by autograd.

    Examples
    --------
    >>> from openmm_diffforce.models import AutogradAction
    >>> class Spring(torch.nn.Module):
    ...     def forward(self, x: Tensor, t: Tensor, lam: Tensor) -> Tensor:
    ...         return 50.0 * ((x[:, 1] - x[:, 0]) ** 2).sum(1)
    >>> y = torch.tensor([[[0.0, 0.0, 0.0], [0.1, 0.0, 0.0]]], dtype=torch.float64)
    >>> score_of(AutogradAction(Spring()))(y, torch.zeros(1, dtype=torch.float64))[0, 0, 0].item()
    10.0
    """
    model = getattr(model, "model", model) if hasattr(model, "metadata") else model
    if not hasattr(model, "fields"):
        raise InputError(
            f"model: expected a model of this package or an artefact, found {type(model).__name__}; a "
            "callable (y, t) -> score goes into learned_energy as it is."
        )
    lam = check_number("lam", lam)
    if not getattr(model, "uses_autograd", False):
        if step is None:
            step = 1e-5 if model_dtype(model) == torch.float64 else 1e-3
        return ModelScore(model, lam, check_number("step", step, above=0.0))
    dtype = model_dtype(model)

    def score(y: Tensor, t: Tensor) -> Tensor:
        twice = y.requires_grad
        with torch.enable_grad():
            at = y if twice else y.detach().requires_grad_(True)
            action = model(at.to(dtype), t.to(dtype), torch.full((len(y),), lam, dtype=dtype))
            (gradient,) = torch.autograd.grad(action.sum(), at, create_graph=twice)
        return -gradient

    return score


# ------------------------------------------------------------------------------------- grids


def noise_grid(
    schedule: NoiseSchedule, n_steps: int, *, kind: str = "quadratic", sigma_min: Any = 0.0,
    sigma_max: Any = None,
) -> FloatArray:  # fmt: skip
    r"""Diffusion times between two noise levels.

    With u from 0 to 1 in equal steps, tau = sigma/alpha and t(tau) of the schedule:

    ===============  =============================================================================
    kind             grid
    ===============  =============================================================================
    ``linear``       t = t_min + (t_max - t_min) u
    ``quadratic``    t = t_min + (t_max - t_min) u^2
    ``log``          ln tau = ln tau_min + u ln(tau_max/tau_min); sigma_min > 0
    ``karras``       tau^(1/7) = tau_min^(1/7) + u (tau_max^(1/7) - tau_min^(1/7))
    ===============  =============================================================================

    Parameters
    ----------
    schedule : VESchedule or VPSchedule
    n_steps : int
    kind : str
    sigma_min, sigma_max : float or Quantity
        Noise-to-signal ratios at the ends [nm]; by default no noise, and the schedule's end.

    Returns
    -------
    numpy.ndarray, shape (n_steps + 1,)
        Increasing t.

    Raises
    ------
    InputError
        For an unknown kind, or noise levels out of order or beyond the schedule.

    Examples
    --------
    >>> noise_grid(VESchedule(1.0), 2).tolist()
    [0.0, 0.25, 1.0]
    """
    if not isinstance(schedule, VESchedule | VPSchedule):
        raise InputError(f"schedule: expected VESchedule or VPSchedule, found {type(schedule).__name__}.")
    n_steps = check_count("n_steps", n_steps)
    if kind not in GRIDS:
        raise InputError(f"grid: expected one of {', '.join(GRIDS)} or an array of t, found {kind!r}.")
    low = schedule.t_of_sigma(sigma_min)
    high = 1.0 if sigma_max is None else schedule.t_of_sigma(sigma_max)
    if not low < high:
        raise InputError(f"sigma_max: expected more noise than sigma_min, found {sigma_max} and {sigma_min}.")
    u = np.linspace(0.0, 1.0, n_steps + 1)
    if kind in ("linear", "quadratic"):
        return np.asarray(low + (high - low) * (u if kind == "linear" else u * u))
    ends = [float(schedule.noise_to_signal(v)) for v in (low, high)]
    if kind == "log":
        if ends[0] <= 0:
            raise InputError("grid: expected sigma_min > 0 for a logarithmic grid, found 0.")
        tau = np.exp(np.log(ends[0]) + u * math.log(ends[1] / ends[0]))
    else:
        first, last = (v ** (1 / KARRAS_RHO) for v in ends)
        tau = (first + u * (last - first)) ** KARRAS_RHO
    t = np.array([low, *(schedule.t_of_sigma(min(v, ends[1])) for v in tau[1:-1]), high])
    return np.asarray(t)


# ------------------------------------------------------------------------------------ checks


def check_array(name: str, value: Any) -> FloatArray:
    try:
        if isinstance(value, Tensor):
            value = value.detach().cpu().numpy()
        out = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as err:
        raise InputError(f"{name}: expected an array of real numbers, found {err}.") from err
    if not np.isfinite(out).all():
        raise InputError(
            f"{name}: expected finite numbers, found {np.count_nonzero(~np.isfinite(out))} that are not."
        )
    return np.ascontiguousarray(out) if out.ndim else out


def check_count(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InputError(f"{name}: expected an integer >= {least}, found {value!r}.")
    return int(value)


def check_number(name: str, value: Any, above: float | None = None) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise InputError(f"{name}: expected a number, found {value!r}.")
    if not math.isfinite(value) or (above is not None and value <= above):
        more = "" if above is None else f" above {above:g}"
        raise InputError(f"{name}: expected a finite number{more}, found {value!r}.")
    return float(value)


def check_choice(name: str, value: Any, allowed: Any) -> str:
    if value not in tuple(allowed):
        raise InputError(f"{name}: expected one of {', '.join(allowed)}, found {value!r}.")
    return str(value)


@dataclass
class ScoreSpace:
    """Where frames live: shape, degrees of freedom, projection; the score there, counted."""

    score: Any
    shape: tuple[int, ...]
    mean_free: bool
    exact: bool
    n_probes: int
    difference: float | None
    dtype: torch.dtype
    n_score: int = 0
    n_products: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def n_dim(self) -> int:
        return self.size - 3 if self.mean_free else self.size

    def project(self, y: Tensor) -> Tensor:
        """Rows [n, size] (or [n, k, size]) in the subspace without the mean."""
        if not self.mean_free:
            return y
        atoms = y.reshape(*y.shape[:-1], -1, 3)
        return (atoms - atoms.mean(-2, keepdim=True)).reshape(y.shape)

    def basis(self) -> FloatArray:
        """Orthonormal columns [size, n_dim] of the space."""
        if not self.mean_free:
            return np.eye(self.size)
        n_atoms = self.size // 3
        columns = np.linalg.qr(np.column_stack([np.ones(n_atoms), np.eye(n_atoms)[:, 1:]]))[0][:, 1:]
        return np.asarray(np.kron(columns, np.eye(3)))

    def _raw(self, y: Tensor, t: float) -> Tensor:
        """Score [n, size] at rows y, checked, with its graph."""
        out = self.score(
            self.project(y).reshape(-1, *self.shape).to(self.dtype),
            torch.full((len(y),), t, dtype=self.dtype),
        )
        if not isinstance(out, Tensor) or out.shape != (len(y), *self.shape):
            found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise InputError(
                f"score: expected a tensor of shape {(len(y), *self.shape)}, that of y, found {found}."
            )
        if not bool(torch.isfinite(out).all()):
            row = int((~torch.isfinite(out)).flatten(1).any(1).nonzero()[0])
            advice = (
                "start at a sigma_min > 0, where the score is defined" if t < 1e-3
                else "the path left the range of the model, or the model is broken"
            )  # fmt: skip
            raise ModelError(
                f"score: expected finite numbers, found others at t = {t:.6g} (row {row}); {advice}."
            )
        return self.project(out.reshape(len(y), -1).to(torch.float64))

    def at(self, y: Tensor, t: float) -> Tensor:
        """Score [n, size] at rows y."""
        self.n_score += len(y)
        with torch.enable_grad():  # an energy network takes its own derivative
            return self._raw(y.detach(), t).detach()

    def with_divergence(self, y: Tensor, t: float, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Score [n, size], and its divergence [n, n_probes] (one column if exact).

        A score may bring its own: ``score.divergence(y, t)`` [n], exact, and ``score.product(y, t, v)``, its
        Jacobian times v. In the mean-free subspace a divergence of its own must be that of a score which
        translations leave alone.
        """
        n, size = y.shape
        if probes is None:
            directions = torch.eye(size, dtype=torch.float64)[:, None].expand(size, n, size)
        else:
            directions = probes.transpose(0, 1)
        if probes is None and hasattr(self.score, "divergence"):
            times = torch.full((n,), t, dtype=self.dtype)
            at_once = self.score.divergence(self.project(y).reshape(-1, *self.shape).to(self.dtype), times)
            self.n_products += n * self.n_dim
            return self.at(y, t), at_once.detach().to(torch.float64).reshape(n, 1)
        columns = []
        # Few rows are repeated, one copy a direction: a network is called once, not size times.
        n_copies = max(1, min(len(directions), ROWS_AT_ONCE // n))
        explicit = hasattr(self.score, "product") or self.difference is not None
        s = self.at(y, t) if explicit else None
        graph: Any = None
        at: Any = None
        for low in range(0, len(directions), n_copies):
            v = self.project(directions[low : low + n_copies])
            copies = len(v)
            rows, v = y.repeat(copies, 1), v.reshape(copies * n, size)
            self.n_products += len(v)
            if explicit:
                pull: Any = self._product(rows, t, v)
            else:
                with torch.enable_grad():
                    if graph is None or n_copies > 1:
                        at = rows.detach().requires_grad_(True)
                        graph = self._differentiable(at, t)
                        if s is None:
                            s = graph[:n].detach()
                            self.n_score += n
                    (pull,) = torch.autograd.grad(
                        (graph * v).sum(), at, retain_graph=n_copies == 1, allow_unused=True
                    )
            if pull is None:  # the score does not depend on y
                pull = torch.zeros_like(v)
            columns.append((pull * v).sum(1).detach().reshape(copies, n))
        assert s is not None
        found = torch.cat(columns).transpose(0, 1)
        return s, found.sum(1, keepdim=True) if probes is None else found

    def _differentiable(self, y: Tensor, t: float) -> Tensor:
        graph = self._raw(y, t)
        if not graph.requires_grad:
            raise InputError(
                "score: expected a function that autograd can differentiate, found one that it cannot; "
                "pass difference (a displacement in nm) for central differences, or use "
                "method='backward_ito', which needs no divergence."
            )
        return graph

    def _product(self, y: Tensor, t: float, v: Tensor) -> Tensor:
        """Jacobian times v [n, size] by the score's own method, or by central differences."""
        if self.difference is not None:
            h = self.difference
            return (self.at(y + h * v, t) - self.at(y - h * v, t)) / (2.0 * h)
        shaped = [self.project(w).reshape(-1, *self.shape).to(self.dtype) for w in (y, v)]
        times = torch.full((len(y),), t, dtype=self.dtype)
        out = self.score.product(shaped[0], times, shaped[1])
        return self.project(out.detach().reshape(len(y), -1).to(torch.float64))


class RowNoise:
    """Numbers of a batch of rows, each row with a stream of its own: batches cannot matter."""

    def __init__(self, key: int | None, rows: range, size: int) -> None:
        self.size = size
        self.streams = [] if key is None else [np.random.default_rng([key, row]) for row in rows]
        self.buffer = torch.empty(0)
        self.used = CHUNK

    def probes(self, n: int) -> Tensor:
        """Rademacher numbers [n_rows, n, size]."""
        signs = [2.0 * s.integers(0, 2, (n, self.size)) - 1.0 for s in self.streams]
        return torch.as_tensor(np.array(signs))

    def normal(self) -> Tensor:
        """Standard normal numbers [n_rows, size]."""
        if self.used == CHUNK:
            drawn = [s.standard_normal((CHUNK, self.size)) for s in self.streams]
            self.buffer, self.used = torch.as_tensor(np.array(drawn)), 0
        self.used += 1
        return self.buffer[:, self.used - 1]


@dataclass(frozen=True)
class TimeGrid:
    """The schedule on a grid of t; as plain floats."""

    schedule: NoiseSchedule
    t: FloatArray
    alpha: FloatArray
    sigma: FloatArray
    drift: FloatArray
    diffusion_2: FloatArray

    @classmethod
    def of(cls, schedule: NoiseSchedule, t: FloatArray) -> "TimeGrid":
        at = torch.as_tensor(t)
        return cls(
            schedule, t, schedule.alpha(at).numpy(), schedule.sigma(at).numpy(),
            schedule.drift(at).numpy(), schedule.diffusion(at).numpy() ** 2,
        )  # fmt: skip

    @property
    def tau(self) -> FloatArray:
        return np.asarray(self.sigma / self.alpha)

    def coarse(self) -> "TimeGrid":
        return TimeGrid.of(self.schedule, self.t[::2])


def log_prior(prior: GaussianPrior, space: ScoreSpace, y: Tensor, alpha: float, sigma: float) -> FloatArray:
    """ln N(y; alpha m, alpha^2 C + sigma^2) in the space [n_rows]."""
    u, variance = prior_axes(prior, space, y.numpy() - alpha * prior_mean(prior, space))
    variance = alpha**2 * variance + sigma**2
    if float(variance.min()) <= 0:
        raise InputError("prior: expected a covariance that is not singular where there is no noise.")
    return np.asarray(-0.5 * (u**2 / variance + np.log(2 * math.pi * variance)).sum(axis=1))


def prior_mean(prior: GaussianPrior, space: ScoreSpace) -> FloatArray:
    mean = np.broadcast_to(prior.mean, space.size).astype(np.float64)
    return space.project(torch.as_tensor(mean)[None]).numpy()[0]


def prior_axes(prior: GaussianPrior, space: ScoreSpace, centred: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Components of rows along the covariance's axes in the space, and its eigenvalues."""
    basis = space.basis()
    if prior.covariance.ndim == 0:
        return centred @ basis, np.full(space.n_dim, float(prior.covariance))
    variance, axes = np.linalg.eigh(basis.T @ prior.covariance @ basis)
    return centred @ (basis @ axes), np.maximum(variance, 0.0)


def prior_vectors(prior: GaussianPrior, space: ScoreSpace) -> FloatArray:
    """Axes of the prior's covariance in the space, columns [size, n_dim]."""
    return prior_axes(prior, space, np.eye(space.size))[0]


def prior_draws(
    prior: GaussianPrior, space: ScoreSpace, normal: Tensor, alpha: float, sigma: float
) -> Tensor:
    """Rows [n, size] of N(alpha m, alpha^2 C + sigma^2) in the space, from standard normal numbers."""
    axes = torch.as_tensor(prior_vectors(prior, space))
    _, variance = prior_axes(prior, space, np.zeros((1, space.size)))
    spread = torch.as_tensor(np.sqrt(alpha**2 * variance + sigma**2))
    return normal @ axes * spread @ axes.T + alpha * torch.as_tensor(prior_mean(prior, space))


def score_space(
    score: Any, shape: tuple[int, ...], *, mean_free: bool | None, divergence: str, n_probes: int,
    difference: Any, dtype: torch.dtype,
) -> ScoreSpace:  # fmt: skip
    """The space of frames of one shape, for a score that was checked to be callable; options as in
    :func:`~openmm_diffforce.energy.learned_energy`.

    Raises
    ------
    InputError
        For a score that is none, or options that do not fit the shape.
    """
    if not callable(score):
        raise InputError(
            f"score: expected a callable (y, t) -> s, found {type(score).__name__}; score_of makes one of "
            "a model."
        )
    if mean_free is None:
        mean_free = len(shape) == 2
    if mean_free and (len(shape) != 2 or shape[1] != 3 or shape[0] < 2):
        raise InputError(
            "mean_free: expected frames of shape (n_frames, n_atoms, 3) with two atoms or more, found "
            f"(n_frames, {', '.join(map(str, shape))}); pass mean_free=False."
        )
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"dtype: expected torch.float64 or torch.float32, found {dtype!r}.")
    exact = check_choice("divergence", divergence, ("exact", "hutchinson")) == "exact"
    if difference is not None:
        difference = check_number("difference", difference, above=0.0)
    return ScoreSpace(
        score, shape, bool(mean_free), exact, check_count("n_probes", n_probes), difference, dtype
    )


def check_rows(x: Any) -> FloatArray:
    x = check_array("x", to_md(x, unit.nanometer, name="x"))
    if x.ndim not in (2, 3) or 0 in x.shape or (x.ndim == 3 and x.shape[2] != 3):
        raise InputError(
            f"x: expected shape (n_frames, n_dim) or (n_frames, n_atoms, 3), none of them 0, found {x.shape}."
        )
    return x


def check_prior(prior: Any, schedule: NoiseSchedule, space: ScoreSpace) -> GaussianPrior:
    if isinstance(prior, str) and prior == "standard":
        # The limit of the forward process: a VP schedule forgets everything but its length.
        return GaussianPrior(0.0, schedule.length**2 if isinstance(schedule, VPSchedule) else 0.0)
    if not isinstance(prior, GaussianPrior):
        raise InputError(
            "prior: expected 'standard' or a GaussianPrior (matched_prior(training frames)), found "
            f"{prior!r}."
        )
    sizes = {*prior.mean.shape, *prior.covariance.shape}
    if sizes - {space.size}:
        raise InputError(f"prior: expected {space.size} dimensions, those of x, found {sizes.pop()}.")
    return prior


def time_nodes(
    grid: Any, schedule: NoiseSchedule, n_steps: int, sigma_min: Any, sigma_max: Any
) -> FloatArray:
    if isinstance(grid, str):
        return noise_grid(schedule, n_steps, kind=grid, sigma_min=sigma_min, sigma_max=sigma_max)
    noise_grid(schedule, n_steps)  # checks the schedule
    t = check_array("grid", grid)
    if t.ndim != 1 or len(t) < 3 or len(t) % 2 == 0 or (np.diff(t) <= 0).any() or t[0] < 0 or t[-1] > 1:
        raise InputError(
            "grid: expected increasing times in [0, 1], an even number of steps, found "
            f"{t.shape} from {t.flat[0] if t.size else None} on."
        )
    return t
