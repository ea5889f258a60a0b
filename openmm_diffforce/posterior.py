r"""Posterior molecular dynamics: what x was, given the noised frame y.

.. math:: p_\lambda(x | y) \propto \exp[-S_\lambda(x)]\, N(y; \alpha x, \sigma^2)

is the end state with a spring of stiffness ``kT alpha^2 / sigma^2`` from every atom to
``y / alpha``. Its moments are the exact noised fields, without a model:

.. math::

    s = (\alpha E[x|y] - y)/\sigma^2, \quad O_{t,\lambda} = E[O|y], \quad
    \nabla O_{t,\lambda} = (\alpha/\sigma^2)\, \mathrm{Cov}(x, O | y)

With alpha = 1 (VE) throughout this module: VP frames are first divided by alpha.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm
from openmm import unit

from .errors import InputError
from .systems import (
    FloatArray,
    check_frames,
    clone_system,
    make_context,
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
    restrained = clone_system(system)
    spring = openmm.CustomExternalForce("k_post/2*((x-x0)^2+(y-y0)^2+(z-z0)^2)")
    spring.addGlobalParameter("k_post", thermal_energy(temperature) / level**2)
    for name in ("x0", "y0", "z0"):
        spring.addPerParticleParameter(name)
    for atom in range(system.getNumParticles()):
        spring.addParticle(atom, [0.0, 0.0, 0.0])
    restrained.addForce(spring)
    generator = np.random.default_rng(seed)
    context = make_context(
        restrained, temperature=temperature, timestep=timestep, friction=friction,
        platform=platform, seed=int(generator.integers(1, 2**31 - 1)),
    )  # fmt: skip
    integrator = context.getIntegrator()
    fields: list[tuple[Any, ...]] = []
    for number, frame in enumerate(y):
        for atom, (a, b, c) in enumerate(frame):
            spring.setParticleParameters(atom, atom, [a, b, c])
        spring.updateParametersInContext(context)
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
