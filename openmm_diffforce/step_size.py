r"""Which time steps are stable, and what a finite one costs, before the run.

Along a mode of reduced curvature kappa the step x' = x - D dt kappa x + sqrt(2 D dt) xi is an
autoregression, and its stationary variance is known:

.. math::

    a = D\, dt\, \kappa, \qquad
    \langle x^2 \rangle = \frac{1}{\kappa (1 - a/2)}, \qquad
    \Delta \langle u \rangle = \sum_i \tfrac12 \left[ \frac{1}{1 - a_i/2} - 1 \right]

so that a step is stable where every a < 2, and heats the stiffest modes first. The a_i are dt times
the eigenvalues of D^(1/2) H D^(1/2), H the Hessian of the reduced potential (minus the derivative
of the score).

==========  ==========================  ================
symbol      code                        unit
==========  ==========================  ================
s           ``score(x)``                1/nm
D           ``diffusion``               nm^2/ps
dt          ``step_size``               ps
a           ``StepAdvice.stiffness``    1
==========  ==========================  ================
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm
from openmm import unit

from .errors import IncompatibleSystemError, InputError
from .langevin import DiffusionLangevinIntegrator
from .systems import FloatArray, check_frames, check_positive, constrained_atoms, evaluate_frames
from .units import thermal_energy, to_md

DENSE_LIMIT = 400
"""Degrees of freedom up to which the whole Hessian is built; beyond, Lanczos from random probes."""

N_LANCZOS = 40
"""Lanczos steps per probe; the largest eigenvalue is found to better than a percent."""

TOLERANCE = 0.02
"""Relative bias of the potential energy from which a step is called biased."""

DIFFUSION_UNIT = unit.nanometer**2 / unit.picosecond


@dataclass(frozen=True)
class CurvatureSpectrum:
    """Eigenvalues of D^(1/2) H D^(1/2) over frames, with weights: rates of relaxation.

    Attributes
    ----------
    rates : [n]
        Of all frames [1/ps]; eigenvalues, or Ritz values.
    weights : [n]
        How many modes of a single frame each stands for; their sum is the number of modes.
    largest : [n_frames]
        Largest rate of each frame [1/ps].
    n_modes : int
        Degrees of freedom.
    calls : int
        Evaluations of the score (single frames).
    method : str
        ``"dense"`` or ``"lanczos"``.
    """

    rates: FloatArray
    weights: FloatArray
    largest: FloatArray
    n_modes: int
    calls: int
    method: str

    def energy_bias(self, step_size: float) -> float:
        """Sum over modes of 1/2 [1/(1 - a/2) - 1] [kT]; inf for an unstable step [ps].

        Modes of negative curvature have no stationary variance of their own and are left out.
        """
        a = step_size * self.rates
        if a.max() >= 2.0:
            return float("inf")
        up = a > 0
        return float((self.weights[up] * 0.5 * (1.0 / (1.0 - 0.5 * a[up]) - 1.0)).sum())


@dataclass(frozen=True)
class StepAdvice:
    """What a time step will do.

    Attributes
    ----------
    step_size : float
        [ps].
    limit : float
        Steps from here on are unstable [ps]: 2 over the largest rate of all frames.
    stiffness : float
        a = D dt kappa of the stiffest mode; stable below 2.
    verdict : str
        ``"stable"`` (energy bias below the tolerance), ``"biased"`` or ``"unstable"``.
    energy_bias : float
        Predicted excess of the mean potential energy [kT]; inf if unstable.
    relative_bias : float
        The same over n_modes / 2, what a harmonic molecule holds.
    variance_factor : float
        Predicted variance along the stiffest mode over the true one; inf if unstable.
    suggested : float
        Step whose relative bias is the tolerance [ps].
    tolerance : float
    spectrum : CurvatureSpectrum
    """

    step_size: float
    limit: float
    stiffness: float
    verdict: str
    energy_bias: float
    relative_bias: float
    variance_factor: float
    suggested: float
    tolerance: float
    spectrum: CurvatureSpectrum

    def __str__(self) -> str:
        head = f"time step {self.step_size:.3g} ps: {self.verdict}"
        tail = f"limit {self.limit:.3g} ps, {self.suggested:.3g} ps for a bias of {self.tolerance:.0%}"
        if self.verdict == "unstable":
            return f"{head} (D dt kappa = {self.stiffness:.2f} of 2; {tail})"
        return (
            f"{head}, potential energy {self.energy_bias:+.2f} kT ({self.relative_bias:+.1%}), variance of "
            f"the stiffest mode times {self.variance_factor:.2f} (D dt kappa = {self.stiffness:.2f} of 2; "
            f"{tail})"
        )

    def require_stable(self) -> None:
        """Refuse an unstable step.

        Raises
        ------
        InputError
        """
        if self.verdict == "unstable":
            raise InputError(
                f"step_size: expected less than {self.limit:.3g} ps, where D dt kappa of the stiffest mode "
                f"is 2, found {self.step_size:.3g} ps ({self.stiffness:.2f}): unstable. "
                f"Take {self.suggested:.2g} ps, or more friction."
            )


def diffusion_per_coordinate(diffusion: Any, frames: FloatArray) -> FloatArray:
    """D of every coordinate of a frame [nm^2/ps], from one number or one per atom (or coordinate).

    Raises
    ------
    InputError, UnitsError
        If the shape does not fit the frames, or no number is above zero.
    """
    d = np.asarray(to_md(diffusion, DIFFUSION_UNIT, name="diffusion"), dtype=np.float64)
    shape = frames.shape[1:]
    if d.ndim > 1 or (d.ndim == 1 and d.shape != shape[:1]):
        raise InputError(f"diffusion: expected a number or shape {shape[:1]}, found {d.shape}.")
    if not (np.isfinite(d).all() and (d >= 0).all() and (d > 0).any()):
        raise InputError("diffusion: expected finite numbers >= 0 [nm^2/ps], some above 0.")
    return np.broadcast_to(d[:, None] if d.ndim and len(shape) == 2 else d, shape)


def curvature_spectrum(
    score: Callable[[FloatArray], Any],
    frames: Any,
    diffusion: Any,
    *,
    difference: float = 1e-5,
    n_probes: int = 4,
    generator: np.random.Generator | None = None,
    dense_limit: int = DENSE_LIMIT,
) -> CurvatureSpectrum:
    r"""Eigenvalues of D^(1/2) H D^(1/2) at a few frames, by differences of the score.

    Parameters
    ----------
    score : callable
        ``score(x) -> like x`` [1/nm], x [n, n_atoms, 3] or [n, d] in nm; at the noise level of the
        dynamics.
    frames : float array [n_frames, n_atoms, 3] or [n_frames, d]
        Equilibrium frames [nm]; a handful.
    diffusion : float, Quantity, or array [n_atoms] (or [d])
        D [nm^2/ps]; atoms with 0 do not move and are left out.
    difference : float
        Displacement of the central difference [nm].
    n_probes : int
        Random probes per frame (Lanczos only).
    generator : numpy.random.Generator, optional
        Of the probes (Lanczos only).
    dense_limit : int
        Degrees of freedom up to which the whole Hessian is built.

    Returns
    -------
    CurvatureSpectrum

    Raises
    ------
    InputError, UnitsError
        For arguments that do not fit, or a score that is not finite.

    Notes
    -----
    Dense: 2 d evaluations per frame. Lanczos: ``2 N_LANCZOS n_probes`` per frame; the sum over modes is
    then an average over random probes (stochastic Lanczos quadrature), the largest rate a Ritz value,
    from below. A score that is not a gradient is symmetrised.

    References
    ----------
    S. Ubaru, J. Chen, Y. Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, SIAM J.
    Matrix Anal. Appl. 38 (2017), doi:10.1137/16M1104974.

    Examples
    --------
    >>> found = curvature_spectrum(lambda x: -x * np.array([100.0, 400.0]), np.zeros((1, 2)), 0.5)
    >>> found.rates.round(6).tolist()
    [50.0, 200.0]
    """
    x = np.asarray(to_md(frames, unit.nanometer, name="frames"), dtype=np.float64)
    if x.ndim not in (2, 3) or 0 in x.shape or not np.isfinite(x).all():
        raise InputError(f"frames: expected finite [n_frames, n_atoms, 3] or [n_frames, d], found {x.shape}.")
    difference = check_positive("difference", difference)
    per_dof = diffusion_per_coordinate(diffusion, x).reshape(-1)
    moving = np.flatnonzero(per_dof > 0)
    root = np.sqrt(per_dof[moving])
    n = len(moving)
    calls = 0

    def product(frame: FloatArray, v: FloatArray) -> FloatArray:
        """Rows of v [m, n] times D^(1/2) H D^(1/2)."""
        nonlocal calls
        shift = np.zeros((len(v), frame.size))
        shift[:, moving] = v * root
        norm = np.abs(shift).max(axis=1, keepdims=True)
        shift *= difference / norm
        both = np.concatenate([frame.ravel() + shift, frame.ravel() - shift]).reshape(-1, *frame.shape)
        s = np.asarray(score(both), dtype=np.float64)
        calls += len(both)
        if s.shape != both.shape or not np.isfinite(s).all():
            raise InputError(
                f"score: expected finite numbers of shape {both.shape}, found shape {s.shape} or others; "
                "frames must lie where the model is defined."
            )
        s = s.reshape(len(both), -1)[:, moving]
        return np.asarray((s[len(v) :] - s[: len(v)]) / (2.0 * difference) * norm * root)

    dense = n <= dense_limit
    rates, weights, largest = [], [], []
    if not dense:
        n_probes = check_positive("n_probes", n_probes, integer=True)
        if generator is None:
            raise InputError("generator: expected one for the probes of Lanczos, found None.")
    for frame in x:
        if dense:
            matrix = product(frame, np.eye(n))
            values = np.linalg.eigvalsh(0.5 * (matrix + matrix.T))
            w = np.ones(n)
        else:
            assert generator is not None
            found = [_lanczos(lambda v, f=frame: product(f, v[None])[0], n, generator)  # type: ignore[misc]
                     for _ in range(n_probes)]  # fmt: skip
            values = np.concatenate([f[0] for f in found])
            w = n * np.concatenate([f[1] for f in found]) / n_probes
        rates.append(values)
        weights.append(w / len(x))
        largest.append(values.max())
    return CurvatureSpectrum(
        np.concatenate(rates), np.concatenate(weights), np.array(largest), n, calls,
        "dense" if dense else "lanczos",
    )  # fmt: skip


def _lanczos(
    product: Callable[[FloatArray], FloatArray], n: int, generator: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Ritz values and quadrature weights (sum 1) from one random probe, fully reorthogonalised."""
    basis = [generator.choice([-1.0, 1.0], n) / np.sqrt(n)]
    alpha, beta = [], []
    for _ in range(min(N_LANCZOS, n)):
        w = product(basis[-1])
        alpha.append(float(w @ basis[-1]))
        q = np.array(basis)
        for _ in range(2):
            w = w - q.T @ (q @ w)
        beta.append(float(np.linalg.norm(w)))
        if beta[-1] < 1e-8 * max(1.0, abs(alpha[0])):
            break
        basis.append(w / beta[-1])
    m = len(alpha)
    matrix = np.diag(alpha) + np.diag(beta[: m - 1], 1) + np.diag(beta[: m - 1], -1)
    values, vectors = np.linalg.eigh(matrix)
    return values, vectors[0] ** 2


def advise_step(
    score: Callable[[FloatArray], Any],
    frames: Any,
    diffusion: Any,
    step_size: Any,
    *,
    tolerance: float = TOLERANCE,
    **options: Any,
) -> StepAdvice:
    """Predict before the run: stable, biased by so much, or unstable.

    Parameters
    ----------
    score, frames, diffusion
        As in :func:`curvature_spectrum`. Take frames of equilibrium, not a minimum: a molecule's
        stiffest mode stiffens as it moves.
    step_size : float or Quantity
        dt [ps].
    tolerance : float
        Relative bias of the potential energy from which a step is called biased.
    **options
        Of :func:`curvature_spectrum`.

    Returns
    -------
    StepAdvice
        Print it.

    Raises
    ------
    InputError, UnitsError
        For arguments that do not fit.

    Notes
    -----
    Exact for a harmonic energy. Elsewhere each frame is taken for its own harmonic molecule: energies
    beyond the frames (a wall hit) are not foreseen.

    Examples
    --------
    >>> print(advise_step(lambda x: -400.0 * x, np.zeros((1, 2)), 0.5, 0.002).verdict)
    biased
    """
    dt = check_positive("step_size", to_md(step_size, unit.picosecond, name="step_size"))
    tolerance = check_positive("tolerance", tolerance)
    spectrum = curvature_spectrum(score, frames, diffusion, **options)
    top = float(spectrum.largest.max())
    if not top > 0:
        raise InputError("frames: expected some positive curvature, found none; no step is too long there.")
    bias = spectrum.energy_bias(dt)
    relative = bias / (0.5 * spectrum.n_modes)
    verdict = "unstable" if dt * top >= 2 else "stable" if relative <= tolerance else "biased"
    low, high = 0.0, 2.0 / top
    for _ in range(60):  # the bias grows with the step
        middle = 0.5 * (low + high)
        small = spectrum.energy_bias(middle) <= tolerance * 0.5 * spectrum.n_modes
        low, high = (middle, high) if small else (low, middle)
    a = dt * top
    return StepAdvice(
        step_size=dt, limit=2.0 / top, stiffness=a, verdict=verdict, energy_bias=bias,
        relative_bias=relative, variance_factor=1.0 / (1.0 - 0.5 * a) if a < 2 else float("inf"),
        suggested=low, tolerance=tolerance, spectrum=spectrum,
    )  # fmt: skip


def advise_integrator(
    integrator: DiffusionLangevinIntegrator,
    system: openmm.System,
    frames: Any,
    *,
    parameters: dict[str, float] | None = None,
    tolerance: float = TOLERANCE,
    **options: Any,
) -> StepAdvice:
    """:func:`advise_step` for an integrator and the System it will run, learned forces included.

    Parameters
    ----------
    integrator : DiffusionLangevinIntegrator
    system : openmm.System
        Unconstrained (refused otherwise: the stiffest bonds would be counted that cannot move).
    frames : float array [n_frames, n_atoms, 3]
        Equilibrium frames [nm].
    parameters : dict, optional
        Context parameters of the run (noise, lambda), where they are not the default ones.
    tolerance, **options
        As in :func:`advise_step`.

    Raises
    ------
    DiffForceError
        As :func:`advise_step`, or from evaluating the forces.

    Examples
    --------
    >>> from openmm_diffforce.alanine import alanine_dipeptide
    >>> topology, x, system = alanine_dipeptide()
    >>> integrator = DiffusionLangevinIntegrator(300.0, 50.0, 0.0005)
    >>> advise_integrator(integrator, system, x).verdict
    'unstable'
    """
    if bound := constrained_atoms(system):
        raise IncompatibleSystemError(
            f"step advice: expected a System without constraints, found {len(bound)} constrained atoms; "
            "advise_step takes a score in coordinates of your own."
        )
    kt = thermal_energy(integrator.getTemperature())
    mask = integrator.getIntegrationForceGroups()
    groups = {g for g in range(32) if mask >> g & 1}

    def score(x: FloatArray) -> FloatArray:
        found = evaluate_frames(system, x, parameters=parameters, groups=groups, with_forces=True)[1]
        return np.asarray(found) / kt

    return advise_step(
        score,
        check_frames(frames, system.getNumParticles(), name="frames"),
        integrator.diffusion(system),
        integrator.getStepSize(),
        tolerance=tolerance,
        **options,
    )
