r"""Posterior molecular dynamics: what x was, given the noised frame y.

.. math:: p_\lambda(x | y) \propto \exp[-S_\lambda(x)]\, N(y; \alpha x, \sigma^2)

is the end state with a spring of stiffness ``kT alpha^2 / sigma^2`` from every atom to
``y / alpha``. Its moments are the exact noised fields, without a model:

.. math::

    s = (\alpha E[x|y] - y)/\sigma^2, \quad O_{t,\lambda} = E[O|y], \quad
    \nabla O_{t,\lambda} = (\alpha/\sigma^2)\, \mathrm{Cov}(x, O | y)

With alpha = 1 (VE) throughout this module: VP frames are first divided by alpha.

:func:`posterior_moments` samples that posterior with the force field (the reference);
:func:`posterior_mode` finds its mode under a learned clean action (a model's noised fields).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm
from openmm import unit

from .errors import ConvergenceError, InputError
from .models.action import model_fields
from .systems import (
    BOOKKEEPING_FORCES,
    FloatArray,
    check_frames,
    clone_system,
    force_type,
    make_context,
    require_unconstrained,
    start_context,
    step_checked,
)
from .units import thermal_energy, to_md


@dataclass(frozen=True)
class PosteriorMoments:
    """Exact noised fields at the frames y, with standard errors from blocks.

    Attributes
    ----------
    score : [n_frames, n_atoms, 3]
        -grad S_t(y) [1/nm].
    operator : [n_frames]
        O_t(y) [kT].
    operator_variance : [n_frames]
        Var(O | y) [kT^2].
    operator_gradient : [n_frames, n_atoms, 3]
        grad O_t(y) [kT/nm].
    score_error, operator_error, operator_gradient_error
        Standard errors, shaped like the fields.
    """

    score: FloatArray
    operator: FloatArray
    operator_variance: FloatArray
    operator_gradient: FloatArray
    score_error: FloatArray
    operator_error: FloatArray
    operator_gradient_error: FloatArray


def noised_atoms(system: openmm.System, atoms: Sequence[int] | None) -> list[int]:
    """All particles for None; else the atoms, checked: different, unconstrained and massive.

    Raises
    ------
    InputError
        For indices that are none, or that repeat.
    IncompatibleSystemError
        If one of ``atoms`` is constrained, virtual or massless.
    """
    n_atoms = system.getNumParticles()
    if atoms is None:
        return list(range(n_atoms))
    noised = [int(a) for a in atoms]
    if not noised or len(set(noised)) != len(noised) or not all(0 <= a < n_atoms for a in noised):
        raise InputError(f"atoms: expected different indices below {n_atoms}, found {noised}.")
    require_unconstrained(system, noised)
    return noised


def restrained_system(
    system: openmm.System, sigma: Any, temperature: Any, *, atoms: Sequence[int] | None = None
) -> tuple[openmm.System, openmm.CustomExternalForce]:
    """A copy of a System with a spring kT/sigma^2 on noised atoms: its equilibrium is the posterior.

    Parameters
    ----------
    system : openmm.System
        Classical.
    sigma : float or Quantity
        Noise level [nm].
    temperature : float or Quantity
        [K].
    atoms : sequence of int, optional
        Atoms that are noised, unconstrained and massive. Their y says nothing new about the others,
        which are known exactly: these lose their mass and are fixed, and the constraints among them go.
        By default every atom has a spring, and none is fixed.

    Returns
    -------
    system : openmm.System
        Without centre-of-mass remover (the springs hold it) and thermostats of its own.
    spring : openmm.CustomExternalForce
        For :func:`place_springs`.

    Raises
    ------
    InputError
        For atoms that are none, or a System with a barostat: its box would not be that of the frames.
    IncompatibleSystemError
        If a noised atom among ``atoms`` is constrained, virtual or massless.
    """
    level = float(to_md(sigma, unit.nanometer, name="sigma"))
    if not (np.isfinite(level) and level > 0):
        raise InputError(f"sigma: expected a noise level > 0 nm, found {level!r}.")
    n_atoms = system.getNumParticles()
    noised = noised_atoms(system, atoms)
    restrained = clone_system(system)
    for i in reversed(range(restrained.getNumForces())):
        name = force_type(restrained.getForce(i))
        if "Barostat" in name:
            raise InputError(
                f"system: expected a constant volume for a posterior, found a {name}; remove it."
            )
        if name in BOOKKEEPING_FORCES:
            restrained.removeForce(i)
    if atoms is not None:
        for i in reversed(range(restrained.getNumConstraints())):
            restrained.removeConstraint(i)
        for atom in set(range(n_atoms)) - set(noised):
            restrained.setParticleMass(atom, 0.0)
    spring = openmm.CustomExternalForce("k_post/2*((x-x0)^2+(y-y0)^2+(z-z0)^2)")
    spring.addGlobalParameter("k_post", thermal_energy(temperature) / level**2)
    for name in ("x0", "y0", "z0"):
        spring.addPerParticleParameter(name)
    for atom in noised:
        spring.addParticle(atom, [0.0, 0.0, 0.0])
    restrained.addForce(spring)
    return restrained, spring


def place_springs(spring: openmm.CustomExternalForce, y: FloatArray, context: openmm.Context) -> None:
    """Centre the springs of :func:`restrained_system` on the noised frame y [nm], (n_atoms, 3)."""
    for i in range(spring.getNumParticles()):
        atom = spring.getParticleParameters(i)[0]
        spring.setParticleParameters(i, atom, y[atom].tolist())
    spring.updateParametersInContext(context)


def posterior_moments(
    system: openmm.System,
    y: Any,
    sigma: Any,
    *,
    operator: Callable[[FloatArray], FloatArray],
    temperature: Any,
    n_samples: int = 2000,
    interval: int = 20,
    n_equil: int = 2000,
    timestep: Any = 0.001,
    friction: Any = 10.0,
    n_blocks: int = 10,
    seed: int = 0,
    platform: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PosteriorMoments:
    """Noised score, operator and operator gradient at y, by restrained MD.

    Parameters
    ----------
    system : openmm.System
        The end state (classical; it is copied and gains a spring on every massive atom).
    y : float array [n_frames, n_atoms, 3]
        Noised frames [nm].
    sigma : float or Quantity
        Noise level [nm].
    operator : callable
        O(x) [n_samples] of frames [n_samples, n_atoms, 3]; e.g. ``pair.operator_values``.
    temperature : float [K] or Quantity
    n_samples, interval, n_equil : int
        Samples per frame, steps between them, steps thrown away first.
    timestep, friction : float or Quantity
        [ps], [1/ps].
    n_blocks : int
        Blocks for the standard errors.
    seed : int
    platform : str, optional
    progress : callable, optional
        Called as ``progress(n_done, n_frames)``.

    Returns
    -------
    PosteriorMoments

    Raises
    ------
    InputError
        If sigma is not above zero, or frames or counts are unusable.

    Notes
    -----
    Starts at y; assumes that the posterior is one basin (true for sigma well below the distance
    between basins) and that the springs' stiffness is resolved by the time step.
    """
    level = float(to_md(sigma, unit.nanometer, name="sigma"))
    if not (np.isfinite(level) and level > 0):
        raise InputError(f"sigma: expected a noise level > 0 nm, found {level!r}.")
    if n_samples < 2 * n_blocks or n_blocks < 2:
        raise InputError(f"n_samples: expected at least two per block ({2 * n_blocks}), found {n_samples}.")
    y = check_frames(y, system.getNumParticles())
    restrained, spring = restrained_system(system, level, temperature)
    generator = np.random.default_rng(seed)
    context = make_context(
        restrained, temperature=temperature, timestep=timestep, friction=friction,
        platform=platform, seed=int(generator.integers(1, 2**31 - 1)),
    )  # fmt: skip
    integrator = context.getIntegrator()
    fields: list[tuple[Any, ...]] = []
    for number, frame in enumerate(y):
        place_springs(spring, frame, context)
        start_context(context, frame, seed=int(generator.integers(1, 2**31 - 1)),
                      temperature=temperature, minimize=True)  # fmt: skip
        what = f"posterior MD (frame {number})"
        step_checked(integrator, n_equil, what)
        x = np.empty((n_samples, *frame.shape))
        for k in range(n_samples):
            step_checked(integrator, interval, what)
            x[k] = context.getState(positions=True).getPositions(asNumpy=True)._value
        fields.append(_moments(x, np.asarray(operator(x)), frame, level, n_blocks))
        if progress is not None:
            progress(number + 1, len(y))
    return PosteriorMoments(*(np.array(column) for column in zip(*fields, strict=True)))


def _moments(x: FloatArray, o: FloatArray, y: FloatArray, sigma: float, n_blocks: int) -> tuple[Any, ...]:
    """The seven fields of :class:`PosteriorMoments` for one frame."""
    size = len(x) // n_blocks
    x, o = x[: size * n_blocks], o[: size * n_blocks]
    product = (x - x.mean(axis=0)) * (o - o.mean())[:, None, None]

    def error(values: FloatArray) -> FloatArray:
        blocks = values.reshape(n_blocks, size, *values.shape[1:]).mean(axis=1)
        return np.asarray(blocks.std(axis=0, ddof=1) / np.sqrt(n_blocks))

    return (
        (x.mean(axis=0) - y) / sigma**2, o.mean(), o.var(ddof=1), product.mean(axis=0) / sigma**2,
        error(x) / sigma**2, error(o), error(product) / sigma**2,
    )  # fmt: skip


@dataclass(frozen=True)
class PosteriorMode:
    """Noised fields from the most probable clean frame of each noised one.

    Attributes
    ----------
    x : [n_frames, n_atoms, 3]
        The mode x* [nm].
    action : [n_frames]
        ``min_x S_lam(x) + |x - y|^2 / (2 sigma^2)`` [kT].
    score : [n_frames, n_atoms, 3]
        ``(x* - y) / sigma^2`` [1/nm], minus the gradient of ``action``.
    operator : [n_frames]
        O(x*) [kT], the lambda derivative of ``action``.
    operator_gradient : [n_frames, n_atoms, 3]
        ``(1 + sigma^2 H)^-1 grad O(x*)`` [kT/nm], the mixed derivative of ``action``.
    n_iterations : [n_frames]
        Newton steps taken.
    """

    x: FloatArray
    action: FloatArray
    score: FloatArray
    operator: FloatArray
    operator_gradient: FloatArray
    n_iterations: np.ndarray


def posterior_mode(
    model: Any,
    y: Any,
    sigma: Any,
    *,
    lam: float = 0.0,
    tolerance: float = 1e-7,
    max_iterations: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> PosteriorMode:
    r"""Noised fields of a learned clean action, without sampling: its posterior's mode.

    .. math::

        S_{t,\lambda}(y) \approx \min_x \left[ S_\lambda(x) + \frac{|x-y|^2}{2\sigma^2} \right],
        \quad s = \frac{x^* - y}{\sigma^2}, \quad O_t = O(x^*), \quad
        \nabla O_t = (1 + \sigma^2 H)^{-1} \nabla O(x^*)

    The three fields are exact derivatives of one scalar, the Moreau envelope of the clean action.
    What is left out, half the log-determinant of ``1 + sigma^2 H``, changes the partition
    function: read fields from this, not free energies.

    ===========  ============================================  ======
    symbol       code                                          unit
    ===========  ============================================  ======
    S, O         ``model.fields(x, t=0, lam)``                 kT
    H            Hessian of S at x*, by differences of dS/dx   1/nm^2
    sigma        ``sigma``                                     nm
    ===========  ============================================  ======

    Parameters
    ----------
    model : ActionModel or TorchScript of one
        Its clean action (t = 0) is used; VE coordinates (alpha = 1).
    y : float array [n_frames, n_atoms, 3]
        Noised frames [nm].
    sigma : float or Quantity
        Noise level [nm].
    lam : float
        The posterior of which lambda state.
    tolerance : float
        Largest component of the last Newton step [nm].
    max_iterations : int
    progress : callable, optional
        Called as ``progress(n_done, n_frames)``.

    Returns
    -------
    PosteriorMode

    Raises
    ------
    InputError
        If sigma is not above zero or frames are unusable.
    ConvergenceError
        If a frame's mode is not found.

    Notes
    -----
    Deterministic. Costs 6 n_atoms evaluations and a dense eigenproblem of that size per Newton
    step: for molecules up to a few hundred atoms. Directions of negative curvature are stepped
    along by their absolute value; at the mode found the curvature is positive.

    References
    ----------
    J. J. Moreau, Proximite et dualite dans un espace hilbertien, Bull. Soc. Math. France 93
    (1965), doi:10.24033/bsmf.1625.
    """
    level = float(to_md(sigma, unit.nanometer, name="sigma"))
    if not (np.isfinite(level) and level > 0):
        raise InputError(f"sigma: expected a noise level > 0 nm, found {level!r}.")
    frames = np.asarray(y, dtype=np.float64)
    frames = check_frames(frames, frames.shape[1] if frames.ndim == 3 else 0)
    found = []
    for number, frame in enumerate(frames):
        found.append(_mode(model, frame, level, float(lam), tolerance, max_iterations, number))
        if progress is not None:
            progress(number + 1, len(frames))
    return PosteriorMode(*(np.array(column) for column in zip(*found, strict=True)))


def _fields(model: Any, x: FloatArray, lam: float) -> tuple[FloatArray, FloatArray, FloatArray]:
    """S, dS/dx flattened, O of clean frames [n, 3 n_atoms], n_atoms from the shape."""
    action, gradient, operator = model_fields(model, x.reshape(len(x), -1, 3), lam=lam)
    return action, gradient.reshape(len(x), -1), operator


def _mode(
    model: Any, frame: FloatArray, sigma: float, lam: float, tolerance: float, n_most: int,
    number: int,
) -> tuple[Any, ...]:  # fmt: skip
    """The fields of :class:`PosteriorMode` for one frame, by damped Newton steps."""
    y = frame.ravel()
    n = len(y)
    floor = 0.1 / sigma**2
    shifts = 1e-5 * np.concatenate([np.eye(n), -np.eye(n)])

    def target(x: FloatArray) -> float:
        return float(_fields(model, x[None], lam)[0][0] + ((x - y) ** 2).sum() / (2 * sigma**2))

    x = y.copy()
    for n_iterations in range(1, n_most + 1):  # noqa: B007 (it is returned)
        around = _fields(model, x + shifts, lam)[1]
        hessian = (around[:n] - around[n:]) / 2e-5
        gradient = _fields(model, x[None], lam)[1][0] + (x - y) / sigma**2
        curvature, axes = np.linalg.eigh(0.5 * (hessian + hessian.T) + np.eye(n) / sigma**2)
        step = -axes @ ((axes.T @ gradient) / np.maximum(np.abs(curvature), floor))
        if np.abs(step).max() < tolerance and curvature[0] > 0:
            break
        # Long steps jump into another basin, with a bond or an angle turned over.
        value, scale = target(x), min(1.0, 0.25 * sigma / np.abs(step).max())
        while target(x + scale * step) > value + 1e-9 and scale > 1e-6:
            scale *= 0.5
        x = x + scale * step
    else:
        raise ConvergenceError(
            f"posterior mode (frame {number}): expected a last step below {tolerance:g} nm within "
            f"{n_most} iterations, found {np.abs(step).max():.2g}; the noised frame lies too far "
            "outside the training data, or sigma is too large for this method: use posterior MD."
        )
    gradients = [_fields(model, x[None], end)[1][0] for end in (0.0, 1.0)]
    slope = axes @ ((axes.T @ (gradients[1] - gradients[0])) / curvature) / sigma**2
    shape = frame.shape
    return (
        x.reshape(shape), target(x), ((x - y) / sigma**2).reshape(shape),
        float(_fields(model, x[None], lam)[2][0]), slope.reshape(shape), n_iterations,
    )  # fmt: skip
