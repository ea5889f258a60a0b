"""For tests, this package's and yours: analytic systems and derivative checks.

Nothing in the package imports this module.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm
from openmm import unit

from .errors import InputError


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
