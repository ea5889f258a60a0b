"""For tests, this package's and yours: analytic systems and derivative checks.

Nothing in the package imports this module.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit

from .errors import InputError
from .schedule import NoiseSchedule
from .scores import GaussianPrior


def assert_forces_match_energy(
    context: openmm.Context,
    *,
    atoms: Sequence[int] | None = None,
    groups: set[int] | int = -1,
    step: float = 1e-5,
    relative: float = 1e-6,
) -> float:
    """Forces equal the negative finite-difference gradient of the energy.

    Central differences of fourth order, ``(8 [E(+h) - E(-h)] - [E(+2h) - E(-2h)]) / 12 h``.

    Parameters
    ----------
    context : openmm.Context
        On a double-precision platform (Reference); its positions are restored.
    atoms : sequence of int, optional
        Atoms to displace; default all.
    groups : set of int or int
        Force groups, as in ``Context.getState``.
    step : float
        h [nm].
    relative : float
        Largest error allowed, relative to the norm of the forces.

    Returns
    -------
    float
        The relative error found.

    Raises
    ------
    AssertionError
        If the forces do not match.
    """
    state = context.getState(positions=True, forces=True, groups=groups)
    x = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    force = state.getForces(asNumpy=True)._value
    chosen = list(range(len(x))) if atoms is None else list(atoms)

    def energy(atom: int, axis: int, shift: float) -> float:
        moved = np.array(x)
        moved[atom, axis] += shift
        context.setPositions(moved)
        return float(context.getState(energy=True, groups=groups).getPotentialEnergy()._value)

    numeric = np.zeros((len(chosen), 3))
    try:
        for k, atom in enumerate(chosen):
            for axis in range(3):
                near = energy(atom, axis, step) - energy(atom, axis, -step)
                far = energy(atom, axis, 2 * step) - energy(atom, axis, -2 * step)
                numeric[k, axis] = -(8 * near - far) / (12 * step)
    finally:
        context.setPositions(x)
    scale = max(float(np.linalg.norm(force[chosen])), 1e-12)
    error = float(np.linalg.norm(numeric - force[chosen])) / scale
    assert error <= relative, (
        f"forces differ from the energy's finite differences by {error:.3g} of their norm "
        f"(allowed {relative:.3g})"
    )
    return error


def assert_parameter_derivative(
    context: openmm.Context,
    parameter: str,
    derivative: float,
    *,
    step: float = 1e-4,
    relative: float = 1e-6,
) -> float:
    """A parameter derivative equals the central difference of the energy in that parameter.

    Parameters
    ----------
    context : openmm.Context
        Its parameter is restored.
    parameter : str
    derivative : float
        What the force says dE/dparameter is [kJ/mol].
    step, relative : float
        Step in the parameter; largest relative error allowed.

    Returns
    -------
    float
        The relative error found.

    Raises
    ------
    AssertionError
        If they do not match.
    """
    value = context.getParameter(parameter)
    energies = []
    try:
        for shift in (step, -step):
            context.setParameter(parameter, value + shift)
            energies.append(context.getState(energy=True).getPotentialEnergy()._value)
    finally:
        context.setParameter(parameter, value)
    numeric = (energies[0] - energies[1]) / (2 * step)
    error = abs(numeric - derivative) / max(abs(numeric), 1e-6)
    assert error <= relative, (
        f"dE/d{parameter} is {derivative:.8g}, finite differences give {numeric:.8g} "
        f"(relative {error:.3g}, allowed {relative:.3g})"
    )
    return error


@dataclass(frozen=True)
class HarmonicEndStates:
    r"""Two Gaussian end states with everything known.

    .. math:: S_k(x) = \tfrac{1}{2} K_k |x - m_k|^2, \qquad
        \Delta f = \tfrac{d}{2} \ln(K_1 / K_0)

    Parameters
    ----------
    stiffness : (float, float)
        K_0, K_1 [1/nm^2], above zero.
    centre : (float, float)
        Every component of m_0, m_1 [nm].
    n_dim : int
        d.

    Raises
    ------
    InputError
        If a stiffness is not above zero.

    Examples
    --------
    >>> round(HarmonicEndStates((1.0, 4.0), (0.0, 0.0), 1).delta_f, 4)
    0.6931
    """

    stiffness: tuple[float, float]
    centre: tuple[float, float]
    n_dim: int = 1

    def __post_init__(self) -> None:
        if min(self.stiffness) <= 0 or self.n_dim < 1:
            raise InputError("HarmonicEndStates: expected stiffnesses > 0 and n_dim >= 1.")

    @property
    def delta_f(self) -> float:
        """Exact reduced free energy difference [kT]."""
        return 0.5 * self.n_dim * float(np.log(self.stiffness[1] / self.stiffness[0]))

    def sample(self, end: int, n: int, generator: np.random.Generator) -> Any:
        """Exact samples of end state 0 or 1, float64 [n, n_dim]."""
        noise = generator.standard_normal((n, self.n_dim))
        return self.centre[end] + noise / np.sqrt(self.stiffness[end])

    def action(self, end: int, x: Any) -> Any:
        """S_0 or S_1 [n] of x [n, n_dim]."""
        return 0.5 * self.stiffness[end] * ((np.asarray(x) - self.centre[end]) ** 2).sum(axis=-1)


class GaussianMixture:
    r"""A mixture of Gaussians in any dimension, noised by any schedule, with everything known.

    .. math:: p_t(y) = \sum_k w_k\, N(y;\ \alpha_t m_k,\ \alpha_t^2 C_k + \sigma_t^2)

    One component is a Gaussian.

    Parameters
    ----------
    means : array_like, shape (n_components, n_dim)
        m_k [nm].
    covariances : float or array_like, shape (n_components, n_dim, n_dim)
        C_k [nm^2]; one number is the variance of every component in every direction.
    weights : array_like, shape (n_components,), optional
        w_k, above zero; normalised here. By default all alike.

    Raises
    ------
    InputError
        If shapes disagree, weights or variances are not above zero, or a covariance is not
        symmetric and positive definite.

    Examples
    --------
    >>> one = GaussianMixture([[0.0]], 4.0)
    >>> round(float(one.log_density([[0.0]])[0]), 4)
    -1.6121
    """

    def __init__(self, means: Any, covariances: Any, *, weights: Any = None) -> None:
        self.means = np.asarray(means, dtype=np.float64)
        if self.means.ndim != 2 or 0 in self.means.shape or not np.isfinite(self.means).all():
            raise InputError(
                f"means: expected finite numbers of shape (n_components, n_dim), found {self.means.shape}."
            )
        n, d = self.means.shape
        given = np.asarray(covariances, dtype=np.float64)
        self.covariances = given * np.broadcast_to(np.eye(d), (n, d, d)) if given.ndim == 0 else given
        if self.covariances.shape != (n, d, d) or not np.isfinite(self.covariances).all():
            raise InputError(
                f"covariances: expected one number or finite numbers of shape {(n, d, d)}, found "
                f"{given.shape}."
            )
        if not np.allclose(self.covariances, np.swapaxes(self.covariances, 1, 2)):
            raise InputError("covariances: expected symmetric matrices.")
        if float(np.linalg.eigvalsh(self.covariances).min()) <= 0:
            raise InputError("covariances: expected positive definite matrices.")
        w = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
        if w.shape != (n,) or not np.isfinite(w).all() or (w <= 0).any():
            raise InputError(f"weights: expected {n} numbers above zero, found {weights}.")
        self.weights = w / w.sum()
        self.variances, self.axes = (torch.as_tensor(v) for v in np.linalg.eigh(self.covariances))

    @property
    def n_dim(self) -> int:
        """Dimension of the space."""
        return int(self.means.shape[1])

    def _log_terms(self, y: Any, alpha: Any, sigma: Any) -> tuple[Any, Any, Any]:
        """ln of each term [n, n_components]; components along each one's axes; their variances."""
        y = y.reshape(len(y), self.n_dim)
        away = y[:, None] - alpha[:, None, None] * torch.as_tensor(self.means, dtype=y.dtype)
        u = torch.einsum("nkd,kde->nke", away, self.axes.to(y.dtype))
        spread = (alpha**2)[:, None, None] * self.variances.to(y.dtype) + (sigma**2)[:, None, None]
        log_w = torch.log(torch.as_tensor(self.weights, dtype=y.dtype))
        return log_w - 0.5 * (u**2 / spread + torch.log(2 * np.pi * spread)).sum(2), u, spread

    def log_density(self, y: Any, *, alpha: float = 1.0, sigma: float = 0.0) -> Any:
        """ln p_t of noised coordinates, float64 [n_frames]; by default of clean ones.

        Parameters
        ----------
        y : array_like, shape (n_frames, n_dim) or (n_frames, n_atoms, 3)
            [nm].
        alpha, sigma : float
            Signal and noise [nm].
        """
        rows = torch.as_tensor(np.asarray(y, dtype=np.float64))
        one = torch.ones(len(rows), dtype=torch.float64)
        return torch.logsumexp(self._log_terms(rows, alpha * one, sigma * one)[0], dim=1).numpy()

    def score(self, schedule: NoiseSchedule) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """grad ln p_t as a function of torch tensors y [n, ...] and t [n]; differentiable."""

        def score(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            log_terms, u, spread = self._log_terms(y, schedule.alpha(t), schedule.sigma(t))
            share = torch.softmax(log_terms, dim=1)
            pull = torch.einsum("kde,nke->nkd", self.axes.to(y.dtype), u / spread)
            return -(share[:, :, None] * pull).sum(1).reshape(y.shape)

        return score

    def prior(self) -> GaussianPrior:
        """The Gaussian with the mixture's mean and covariance."""
        mean = self.weights @ self.means
        away = self.means - mean
        inside = np.einsum("k,kde->de", self.weights, self.covariances)
        return GaussianPrior(mean, inside + np.einsum("k,kd,ke->de", self.weights, away, away))

    def sample(self, n: int, generator: np.random.Generator) -> Any:
        """Exact samples, float64 [n, n_dim]."""
        which = generator.choice(len(self.weights), n, p=self.weights)
        root = np.linalg.cholesky(self.covariances)
        noise = generator.standard_normal((n, self.n_dim))
        return self.means[which] + np.einsum("nde,ne->nd", root[which], noise)


def assert_model_contract(model: Any, x: Any, *, equilibrium: bool = False) -> Any:
    """A model keeps the contract: shapes, finite values, invariance, derivatives.

    Parameters
    ----------
    model : ActionModel or ScoreModel
    x : float array [n_frames, n_atoms, 3]
        Frames like those it is for [nm].
    equilibrium : bool
        Whether x are equilibrium frames of its base state: then its units are examined too.

    Returns
    -------
    openmm_diffforce.models.examine.Examination
        Everything that was found; print it.

    Raises
    ------
    AssertionError
        If something is broken, with all findings.

    Examples
    --------
    >>> import torch
    >>> from openmm_diffforce.models import AutogradAction
    >>> class Spring(torch.nn.Module):
    ...     def forward(self, x: torch.Tensor, t: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    ...         return 50.0 * (1 + lam) * ((x[:, 1] - x[:, 0]) ** 2).sum(1)
    >>> found = assert_model_contract(AutogradAction(Spring()), [[[0.0, 0, 0], [0.1, 0, 0]]])
    >>> len(found.failures)
    0
    """
    from .models.examine import examine_model

    found = examine_model(model, x, equilibrium=equilibrium)
    assert not found.failures, f"the model breaks the contract:\n{found}"
    return found
