r"""A diffusion model run as molecular dynamics: the harmonic adapter step inside OpenMM.

.. math::

    x' = x + \frac{\beta F}{2k} + \frac{\xi}{\sqrt k}, \qquad
    k_i = \frac{1}{2 D_i\, dt} = \frac{\beta}{2 \mu_i\, dt}

With F = kT_train s of a :class:`~openmm_diffforce.force.DiffusionForce` at its noise level this is
:func:`~openmm_diffforce.sampler.harmonic_adapter_step`, and with mobility 1/(m gamma) it is the
step of OpenMM's BrownianIntegrator.

=========  ==============================================  =============================
symbol     code                                            unit
=========  ==============================================  =============================
F          ``f`` of the integrator's force groups          kJ/mol/nm
mu         mobility: 1/(m friction), or given              ps/Da = nm^2/(ps kJ/mol)
D          kT mu                                           nm^2/ps
k          :meth:`DiffusionLangevinIntegrator.getStiffness`  1/nm^2, reduced
=========  ==============================================  =============================
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm
from openmm import unit

from .errors import IncompatibleSystemError, InputError, NotConservativeError
from .systems import (
    FloatArray,
    blow_up_error,
    check_frames,
    check_positive,
    check_seed,
    constrained_atoms,
    get_platform,
    particle_masses,
    seed_to_int32,
    set_parameter,
    step_checked,
    virtual_sites,
)
from .units import MOLAR_GAS_CONSTANT, thermal_energy, to_md

MOBILITY_UNIT = unit.picosecond / unit.dalton
"""Unit of a mobility: velocity per force."""


class DiffusionLangevinIntegrator(openmm.CustomIntegrator):
    r"""Overdamped Langevin dynamics by the harmonic adapter step, in OpenMM.

    .. math::

        x' = x + \mu F\, dt + \sqrt{2\, k_B T \mu\, dt}\;\xi
           = x + \frac{\beta F}{2k} + \frac{\xi}{\sqrt k}

    Use it as any integrator: with a DiffusionForce (at a fixed small noise, or clean), a classical
    System, or both. A bare score (ScoreModel) is welcome, unless ``metropolis`` is asked for.

    Parameters
    ----------
    temperature : float or Quantity
        [K]. It acts through k alone: the force field's energy, or kT_train S, stays what it is.
    friction : float, Quantity or None
        gamma [1/ps]: every atom has the mobility 1/(m gamma), as in BrownianIntegrator.
    step_size : float or Quantity
        dt [ps]. :func:`~openmm_diffforce.step_size.advise_step` says which are stable.
    mobility : float, Quantity or array [n_atoms], optional
        Instead of ``friction`` (None then): the mobility of all atoms, or of each [ps/Da].
    metropolis : bool
        Accept each step with the probability that makes the ensemble exact (MALA): removes the
        discretisation bias, needs an energy, and changes the dynamics where steps are rejected.
    system : openmm.System, optional
        Needed with ``mobility`` or ``metropolis``, to be held against them.
    learned : DiffusionForce or sequence of them, optional
        The learned forces in the System: ``metropolis`` asks them for their energy.
    groups : collection of int, optional
        Force groups that are integrated; all by default.
    seed : int
        Of the noise.

    Raises
    ------
    UnitsError
        If a Quantity has another dimension, or the temperature is not above zero.
    InputError
        If a number is not finite and above zero, or not exactly one of friction and mobility is given.
    NotConservativeError
        If ``metropolis`` is asked for a bare score; at the first step, if the energy is NaN.
    IncompatibleSystemError
        If constraints are to be combined with ``mobility`` or ``metropolis``, or virtual sites
        with ``metropolis``.

    Notes
    -----
    Constraints are kept as BrownianIntegrator keeps them, by projection after the step, which
    belongs to the mobility 1/(m gamma) alone. Massless particles stay where they are. Velocities
    are neither used nor set: a kinetic energy or temperature from them means nothing.

    A copy through XML (``XmlSerializer``, ``copy.deepcopy``) is a plain ``CustomIntegrator`` with the
    same steps, variables and noise: it takes the same trajectory, and lacks the methods of this
    class. Checkpoints work.

    Repeatable for a seed on the Reference platform.

    References
    ----------
    Diffusion samplers as Langevin integrators, arXiv:2511.17741. G. O. Roberts and R. L. Tweedie,
    Exponential convergence of Langevin distributions and their discrete approximations, Bernoulli 2
    (1996), doi:10.2307/3318418 (MALA).

    Examples
    --------
    >>> system = openmm.System()
    >>> _ = system.addParticle(12.0)
    >>> integrator = DiffusionLangevinIntegrator(300.0, 50.0, 0.001)
    >>> context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    >>> context.setPositions([[0.0, 0.0, 0.0]])
    >>> integrator.step(10)
    >>> [round(float(k), 1) for k in integrator.getStiffness(system)]  # 12 * 50 / (2 kT * 0.001)
    [120272.4]
    """

    def __init__(
        self,
        temperature: Any,
        friction: Any,
        step_size: Any,
        *,
        mobility: Any = None,
        metropolis: bool = False,
        system: openmm.System | None = None,
        learned: Any = None,
        groups: Collection[int] | None = None,
        seed: int = 0,
    ) -> None:
        kt = thermal_energy(temperature)
        dt = check_positive("step_size", to_md(step_size, unit.picosecond, name="step_size"))
        if (friction is None) == (mobility is None):
            raise InputError(
                "friction, mobility: expected exactly one of them (the other None), found "
                f"{'neither' if friction is None else 'both'}."
            )
        super().__init__(dt)
        self.setRandomNumberSeed(seed_to_int32(np.random.default_rng(check_seed(seed))))
        self.metropolis = bool(metropolis)
        self._learned = _as_tuple(learned)
        self._given_mobility = mobility is not None
        self.addGlobalVariable("kT", kt)
        if friction is not None:
            gamma = check_positive("friction", to_md(friction, unit.picosecond**-1, name="friction"))
            self.addGlobalVariable("friction", gamma)
            stiffness = "m*friction/(2*kT*dt)"
        else:
            self._add_mobility(mobility, system)
            stiffness = "1/(2*kT*mobility*dt)"
        if groups is not None:
            self.setIntegrationForceGroups({_group(g) for g in groups})
        if self.metropolis:
            for force in self._learned:
                if hasattr(force, "require_energy"):
                    force.require_energy("Metropolis correction")
        if system is not None:
            self.check_system(system)
        elif self.metropolis or self._given_mobility:
            raise InputError(
                "system: expected the System beside mobility or metropolis, found None; both depend on "
                "what is in it (constraints, virtual sites)."
            )
        self._add_steps(stiffness)

    def _add_mobility(self, mobility: Any, system: openmm.System | None) -> None:
        values = np.asarray(to_md(mobility, MOBILITY_UNIT, name="mobility"), dtype=np.float64)
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise InputError(f"mobility: expected finite numbers > 0 [ps/Da], found {mobility!r}.")
        if values.ndim == 0:
            self.addGlobalVariable("mobility", float(values))
            return
        n_atoms = system.getNumParticles() if system is not None else len(values)
        if values.shape != (n_atoms,):
            raise InputError(
                f"mobility: expected one number, or one per particle ({n_atoms}), found shape {values.shape}."
            )
        self.addPerDofVariable("mobility", 0.0)
        self.setPerDofVariableByName("mobility", [openmm.Vec3(v, v, v) for v in values.tolist()])

    def _add_steps(self, stiffness: str) -> None:
        step = f"f/(2*kT*k) + gaussian/sqrt(k); k={stiffness}"
        self.addUpdateContextState()
        if not self.metropolis:
            self.addComputePerDof("x", f"x + {step}")
            self.addConstrainPositions()
            return
        for name in (
            "accepted",
            "n_accepted",
            "n_proposed",
            "energy_old",
            "log_ratio",
            "forward",
            "backward",
        ):
            self.addGlobalVariable(name, 0.0)
        for name in ("x_old", "f_old", "xi"):
            self.addPerDofVariable(name, 0.0)
        self.addComputeGlobal("energy_old", "energy")
        self.addComputePerDof("x_old", "x")
        self.addComputePerDof("f_old", "f")
        self.addComputePerDof("xi", "gaussian")
        self.addComputePerDof("x", f"x + f_old/(2*kT*k) + xi/sqrt(k); k={stiffness}")
        # -ln of the proposal densities N(x' | x + f/(2 kT k), 1/k), there and back; k is the same.
        self.addComputeSum("forward", "xi^2/2")
        self.addComputeSum("backward", f"k/2*(x_old - x - f/(2*kT*k))^2; k={stiffness}")
        self.addComputeGlobal("log_ratio", "(energy_old - energy)/kT + forward - backward")
        self.addComputeGlobal("accepted", "step(log_ratio - log(uniform))")  # NaN is no
        # Only a rejection moves atoms again: after an accepted step the forces are there already.
        self.beginIfBlock("accepted < 0.5")
        self.addComputePerDof("x", "x_old")
        self.endBlock()
        self.addComputeGlobal("n_accepted", "n_accepted + accepted")
        self.addComputeGlobal("n_proposed", "n_proposed + 1")

    def step(self, steps: int) -> None:
        """Take steps.

        Raises
        ------
        NotConservativeError
            With ``metropolis``, if the energy is NaN, as that of a bare score is.
        """
        super().step(steps)
        if self.metropolis and np.isnan(self.getGlobalVariableByName("energy_old")):
            raise NotConservativeError(
                "Metropolis correction: needs an energy, found NaN: a bare score has none (metropolis=False "
                "is for dynamics alone), or the start is broken."
            )

    def check_system(self, system: openmm.System) -> None:
        """Hold mobility and Metropolis correction against what is in a System.

        Raises
        ------
        IncompatibleSystemError
            For constraints beside either, or virtual sites beside the latter.
        """
        what = "metropolis" if self.metropolis else "mobility" if self._given_mobility else None
        if what is None:
            return
        if bound := constrained_atoms(system):
            raise IncompatibleSystemError(
                f"{what}: expected a System without constraints, found {len(bound)} constrained atoms; use "
                "friction and no Metropolis correction, or create the System with constraints=None, "
                "rigidWater=False."
            )
        if self.metropolis and (sites := virtual_sites(system)):
            raise IncompatibleSystemError(
                f"metropolis: expected no virtual sites, found {len(sites)}; they move with other atoms, "
                "which the proposal's density does not know."
            )

    def check(self, context: openmm.Context) -> None:
        """Hold the integrator, and the learned forces it was given, against a Context.

        Raises
        ------
        DiffForceError
            As :meth:`check_system` and ``DiffusionForce.check``.
        """
        self.check_system(context.getSystem())
        for force in self._learned:
            if hasattr(force, "check"):
                force.check(context)

    def getTemperature(self) -> unit.Quantity:
        """Temperature of the bath [K]."""
        return self.getGlobalVariableByName("kT") / MOLAR_GAS_CONSTANT * unit.kelvin

    def setTemperature(self, temperature: Any) -> None:
        """Set the temperature of the bath [K]; mobilities stay.

        Raises
        ------
        UnitsError
            If it is not a finite number above zero.
        """
        self.setGlobalVariableByName("kT", thermal_energy(temperature))

    def getFriction(self) -> unit.Quantity:
        """Friction [1/ps].

        Raises
        ------
        InputError
            If mobilities were given instead.
        """
        if self._given_mobility:
            raise InputError("friction: this integrator was given mobilities instead; see mobilities().")
        return self.getGlobalVariableByName("friction") / unit.picosecond

    def setFriction(self, friction: Any) -> None:
        """Set the friction [1/ps].

        Raises
        ------
        InputError
            If it is not above zero, or mobilities were given instead.
        """
        self.getFriction()
        gamma = check_positive("friction", to_md(friction, unit.picosecond**-1, name="friction"))
        self.setGlobalVariableByName("friction", gamma)

    def setStepSize(self, size: Any) -> None:
        """Set dt [ps].

        Raises
        ------
        InputError
            If it is not above zero.
        """
        dt = check_positive("step_size", to_md(size, unit.picosecond, name="step_size"))
        super().setStepSize(dt)

    def mobilities(self, system: openmm.System) -> FloatArray:
        """Mobility of every particle [ps/Da], [n_atoms]; 0 for those without mass."""
        mass = particle_masses(system)
        if not self._given_mobility:
            gamma = self.getGlobalVariableByName("friction")
            return np.divide(1.0, mass * gamma, out=np.zeros_like(mass), where=mass > 0)
        names = [self.getGlobalVariableName(i) for i in range(self.getNumGlobalVariables())]
        if "mobility" in names:
            values = np.full(len(mass), self.getGlobalVariableByName("mobility"))
        else:
            values = np.array([v[0] for v in self.getPerDofVariableByName("mobility")])
        return np.where(mass > 0, values, 0.0)

    def diffusion(self, system: openmm.System) -> FloatArray:
        """Diffusion coefficient D = kT mu of every particle [nm^2/ps], [n_atoms]."""
        return self.getGlobalVariableByName("kT") * self.mobilities(system)

    def getStiffness(self, system: openmm.System) -> FloatArray:
        """Reduced stiffness k = 1/(2 D dt) of the adapter [1/nm^2], [n_atoms]; inf without mass."""
        dt = self.getStepSize().value_in_unit(unit.picosecond)
        with np.errstate(divide="ignore"):
            return np.asarray(1.0 / (2.0 * self.diffusion(system) * dt))

    @property
    def acceptance_rate(self) -> float:
        """Fraction of accepted steps since the start or :meth:`reset_acceptance`; NaN before a step.

        Raises
        ------
        InputError
            Without ``metropolis``.
        """
        if not self.metropolis:
            raise InputError("acceptance_rate: every step is taken; it belongs to metropolis=True.")
        n = self.getGlobalVariableByName("n_proposed")
        return float(self.getGlobalVariableByName("n_accepted") / n) if n else float("nan")

    def reset_acceptance(self) -> None:
        """Count accepted steps anew."""
        if self.metropolis:
            self.setGlobalVariableByName("n_accepted", 0.0)
            self.setGlobalVariableByName("n_proposed", 0.0)


def make_diffusion_context(
    system: openmm.System, *, temperature: Any, timestep: Any, friction: Any, platform: str | None, seed: int
) -> openmm.Context:
    """A Context with a seeded :class:`DiffusionLangevinIntegrator`, as ``systems.make_context`` makes one."""
    integrator = DiffusionLangevinIntegrator(temperature, friction, timestep, seed=seed)
    return openmm.Context(system, integrator, get_platform(platform, system.getNumParticles()))


@dataclass(frozen=True)
class IndependentRuns:
    """Dynamics from independent starts.

    Attributes
    ----------
    frames : [n_starts, n_frames, n_atoms, 3]
        [nm], in time order.
    acceptance_rate : float or None
        Of all steps, with a Metropolis correction.
    """

    frames: FloatArray
    acceptance_rate: float | None


def independent_then_dynamics(
    system: openmm.System,
    starts: Any,
    integrator: openmm.Integrator,
    *,
    n_frames: int,
    interval: int,
    n_equil: int = 0,
    parameters: dict[str, float] | None = None,
    platform: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> IndependentRuns:
    """Dynamics from each of several independent starts, e.g. samples of a reverse diffusion.

    Parameters
    ----------
    system : openmm.System
        May hold a learned force.
    starts : float array [n_starts, n_atoms, 3]
        [nm].
    integrator : openmm.Integrator
        In no Context yet; :class:`DiffusionLangevinIntegrator`, or one of OpenMM's. One without
        velocities: they are not drawn.
    n_frames, interval, n_equil : int
        Frames per start, steps between them, steps thrown away first.
    parameters : dict, optional
        Context parameters to set.
    platform : str, optional
        OpenMM platform; chosen by size if omitted.
    progress : callable, optional
        Called as ``progress(n_done, n_starts)``.

    Returns
    -------
    IndependentRuns

    Raises
    ------
    InputError
        For starts or counts that do not fit.
    ConvergenceError
        If the dynamics becomes unstable.
    DiffForceError
        From the integrator's ``check``.

    Notes
    -----
    Runs differ in their start and in their noise (one stream, one after the other); they are as
    independent as the starts. The integrator ends with the Context of this call.
    """
    starts = check_frames(starts, system.getNumParticles(), name="starts")
    n_frames = check_positive("n_frames", n_frames, integer=True)
    interval = check_positive("interval", interval, integer=True)
    if not isinstance(n_equil, int | np.integer) or isinstance(n_equil, bool) or n_equil < 0:
        raise InputError(f"n_equil: expected an integer >= 0, found {n_equil!r}.")
    context = openmm.Context(system, integrator, get_platform(platform, system.getNumParticles()))
    for key, value in (parameters or {}).items():
        set_parameter(context, key, value)
    if isinstance(integrator, DiffusionLangevinIntegrator):
        integrator.check(context)
    out = np.empty((len(starts), n_frames, *starts.shape[1:]))
    for i, start in enumerate(starts):
        context.setPositions(start)
        context.computeVirtualSites()
        context.applyConstraints(1e-6)
        step_checked(integrator, int(n_equil), f"dynamics from start {i} (equilibration)")
        for n in range(n_frames):
            step_checked(integrator, interval, f"dynamics from start {i} (frame {n})")
            out[i, n] = context.getState(positions=True).getPositions(asNumpy=True)._value
            if not np.isfinite(out[i, n]).all():
                raise blow_up_error(f"dynamics from start {i} (frame {n})", "coordinates that are not finite")
        if progress is not None:
            progress(i + 1, len(starts))
    rate = integrator.acceptance_rate if getattr(integrator, "metropolis", False) else None
    return IndependentRuns(out, rate)


def _as_tuple(learned: Any) -> tuple[Any, ...]:
    if learned is None:
        return ()
    return tuple(learned) if isinstance(learned, Sequence) else (learned,)


def _group(value: Any) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 0 <= value < 32:
        raise InputError(f"groups: expected force groups, integers in [0, 31], found {value!r}.")
    return int(value)
