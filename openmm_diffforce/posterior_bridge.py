"""Delta f by posterior MD: exact works at single noised frames, from new force evaluations.

Frames of both ends are noised; around every noised frame y restrained MD runs under S_lambda at a few
lambdas, and BAR takes the works that its O integrate to (:mod:`~openmm_diffforce.posterior_work`).
Needs no model and no training: the spot check of a bridge, and an estimator of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import openmm as mm
from openmm import unit

from .alchemy import EndStatePair
from .constants import LAMBDA
from .density import fit_operator_density
from .errors import InputError
from .estimate import statistical_inefficiency
from .posterior import noised_atoms, place_springs, restrained_system
from .posterior_work import PosteriorBridge, WorkName, bridge_from_posteriors, spread_lams
from .systems import (
    FloatArray,
    check_frames,
    check_positive,
    check_seed,
    make_context,
    require_unconstrained,
    seed_to_int32,
    start_context,
    step_checked,
)
from .units import to_md

N_LAMS = 5
"""Lambdas by default."""

MAX_MINIMIZATION = 100
"""Iterations of the minimizer at every change of lambda."""


class _Iterations(mm.MinimizationReporter):  # type: ignore[misc]
    """Counts the minimizer's iterations, each a force evaluation or more."""

    n = 0

    def report(self, *_: Any) -> bool:
        self.n += 1
        return False


def posterior_operators(
    pair: EndStatePair,
    x: Any,
    y: Any,
    sigma: Any,
    lams: Sequence[float],
    *,
    atoms: Sequence[int] | None = None,
    n_samples: int = 200,
    interval: int = 20,
    n_equil: int = 1000,
    timestep: Any = 0.001,
    friction: Any = 10.0,
    seed: int = 0,
    platform: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[FloatArray, int, int]:
    r"""O on samples of the posteriors p_lambda(x|y), by restrained MD along lambda.

    .. math:: p_\lambda(x|y) \propto e^{-S_\lambda(x)}\, N(y; x, \sigma^2)

    Parameters
    ----------
    pair : EndStatePair
    x : array_like, shape (n_y, n_atoms, 3)
        Starting frames [nm]. A frame x of end ``lams[0]`` with y = x + sigma eps is itself a draw from
        that posterior: such a start needs no equilibration, and gets none.
    y : array_like, shape (n_y, n_atoms, 3)
        Noised frames [nm].
    sigma : float or Quantity
        Noise level [nm].
    lams : sequence of float
        In the order in which they are visited; each starts where the one before ended, minimized and
        equilibrated.
    atoms : sequence of int, optional
        Atoms that are noised: the others are fixed where they are in ``x``.
    n_samples, interval, n_equil : int
        Samples per y and lambda, steps between them, steps thrown away at every lambda but the first.
    timestep, friction : float or Quantity
        [ps], [1/ps].
    seed : int
    platform : str, optional
    progress : callable, optional
        Called as ``progress(n_done, n_y)``.

    Returns
    -------
    operators : numpy.ndarray, shape (n_y, n_lams, n_samples)
        [kT].
    n_forces, n_energies : int
        Evaluations: steps and iterations of the minimizer; values of O.

    Raises
    ------
    InputError, IncompatibleSystemError, ConvergenceError
        For bad arguments, ends that do not mix, dynamics that becomes unstable.

    Notes
    -----
    A posterior of several basins (sigma not well below the distance between them) is sampled only as
    far as the dynamics gets.
    """
    x, y = (check_frames(v, pair.n_atoms) for v in (x, y))
    if len(x) != len(y):
        raise InputError(f"x, y: expected one start for every noised frame, found {len(x)} and {len(y)}.")
    for name, number, least in (
        ("n_samples", n_samples, 1),
        ("interval", interval, 1),
        ("n_equil", n_equil, 0),
    ):
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < least:
            raise InputError(f"{name}: expected an integer of at least {least}, found {number!r}.")
    if not len(lams) or not all(0.0 <= v <= 1.0 for v in lams):
        raise InputError(f"lams: expected numbers in [0, 1], found {list(lams)}.")
    rng = np.random.default_rng(check_seed(seed))
    system, spring = restrained_system(pair.linear_system(), sigma, pair.temperature, atoms=atoms)
    context = make_context(
        system, temperature=pair.temperature, timestep=timestep, friction=friction, platform=platform,
        seed=seed_to_int32(rng),
    )  # fmt: skip
    integrator = context.getIntegrator()
    iterations = _Iterations()
    out = np.empty((len(y), len(lams), n_samples))
    for i in range(len(y)):
        place_springs(spring, y[i], context)
        for k, lam in enumerate(lams):
            context.setParameter(LAMBDA, float(lam))
            what = f"posterior MD (frame {i}, lambda {lam:g})"
            now = x[i] if k == 0 else context.getState(positions=True).getPositions(asNumpy=True)._value
            if k:
                mm.LocalEnergyMinimizer.minimize(context, 1.0, MAX_MINIMIZATION, iterations)
                now = context.getState(positions=True).getPositions(asNumpy=True)._value
            start_context(context, now, seed=seed_to_int32(rng), temperature=pair.temperature, minimize=False)
            step_checked(integrator, n_equil if k else 0, what)
            for j in range(n_samples):
                step_checked(integrator, interval, what)
                state = context.getState(parameterDerivatives=True)
                out[i, k, j] = state.getEnergyParameterDerivatives()[LAMBDA] / pair.kT
        if progress is not None:
            progress(i + 1, len(y))
    steps = len(y) * (len(lams) * n_samples * interval + (len(lams) - 1) * n_equil)
    return out, steps + iterations.n, out.size


def run_posterior_bridge(
    pair: EndStatePair,
    frames_0: Any,
    frames_1: Any,
    sigma: Any,
    *,
    lams: int | Sequence[float] = N_LAMS,
    n_y: int = 20,
    n_samples: int = 200,
    atoms: Sequence[int] | None = None,
    work: WorkName = "bar",
    interval: int = 20,
    n_equil: int = 1000,
    timestep: Any = 0.001,
    friction: Any = 10.0,
    seed: int = 0,
    platform: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PosteriorBridge:
    r"""Delta f by BAR between noised ends, with works from posterior MD.

    .. math:: y = x + \sigma\epsilon, \qquad \Delta S(y) = \int_0^1 E_\lambda[O|y]\, d\lambda, \qquad
              \Delta f \text{ by BAR with } \Delta S

    ==========  ===========================================
    symbol      code
    ==========  ===========================================
    x           ``frames_0``, ``frames_1``, ``n_y`` of each
    O           ``pair.operator_values(x)``
    Delta S     ``PosteriorBridge.work``
    ==========  ===========================================

    Parameters
    ----------
    pair : EndStatePair
        Whose ends mix linearly (:meth:`~openmm_diffforce.alchemy.EndStatePair.linear_system`).
    frames_0, frames_1 : array_like, shape (n_frames, n_atoms, 3)
        Equilibrium frames of both ends in time order [nm]. ``n_y`` of each are taken, evenly spaced.
    sigma : float or Quantity
        Noise level [nm], e.g. ``found.level.sigma`` of a bridge.
    lams : int or sequence of float
        Lambdas of the posteriors, from 0 to 1; a number of them is spread evenly in thermodynamic
        length, by the density of O of the frames.
    n_y : int
        Noised frames per end, at least 2 and at most as many as there are independent frames.
    n_samples, interval, n_equil, timestep, friction, platform
        As for :func:`posterior_operators`.
    atoms : sequence of int, optional
        Atoms that are noised, by default all, which must be unconstrained and massive. With some, the
        posterior keeps the others fixed, constraints among them included: the kernel of a noise on few
        atoms. In solution these are the atoms that O sees.
    work : str
        "bar", "density" or "tweedie" (:func:`~openmm_diffforce.posterior_work.bridge_from_posteriors`).
    seed : int
        Of the noise and the dynamics.
    progress : callable, optional
        Called as ``progress(n_done, 2 * n_y)``.

    Returns
    -------
    PosteriorBridge
        With every force and energy evaluation counted, those on the frames given included; not those
        that sampled them.

    Raises
    ------
    InputError, IncompatibleSystemError, ConvergenceError
        As the functions it calls, and for more y than independent frames.

    Notes
    -----
    Consistent: right in the limit of many y and long posteriors, at every sigma. The box is that of the
    Systems. Repeatable on the Reference platform.

    References
    ----------
    Action-operator semantics and the noisy operator bridge, arXiv:2606.30687.

    Examples
    --------
    >>> import openmm.app
    >>> def well(stiffness):
    ...     system = mm.System()
    ...     force = mm.CustomExternalForce("k/2*(x^2+y^2+z^2)")
    ...     _ = (system.addParticle(12.0), force.addPerParticleParameter("k"))
    ...     _ = (force.addParticle(0, [stiffness]), system.addForce(force))
    ...     return system
    >>> topology = mm.app.Topology()
    >>> residue = topology.addResidue("X", topology.addChain())
    >>> _ = topology.addAtom("C", mm.app.element.carbon, residue)
    >>> pair = EndStatePair(well(2000.0), well(8000.0), topology, 300.0)
    >>> rng = np.random.default_rng(0)
    >>> ends = [rng.normal(0.0, np.sqrt(pair.kT / k), (100, 1, 3)) for k in (2000.0, 8000.0)]
    >>> found = run_posterior_bridge(pair, *ends, 0.05, lams=3, n_y=12, n_samples=40, work="tweedie",
    ...                              timestep=0.005, friction=20.0, n_equil=50)
    >>> abs(found.delta_f - 1.5 * np.log(4.0)) < 3 * found.d_delta_f < 1.5
    True
    """
    level = check_positive("sigma", to_md(sigma, unit.nanometer, name="sigma"))
    n_y = check_positive("n_y", n_y, integer=True)
    if n_y < 2:
        raise InputError(f"n_y: expected at least 2 noised frames per end, found {n_y}.")
    frames = [check_frames(v, pair.n_atoms, name=f"frames_{e}") for e, v in enumerate((frames_0, frames_1))]
    operators = [pair.operator_values(v) for v in frames]
    g = [statistical_inefficiency(o) for o in operators]
    for end, (o, one) in enumerate(zip(operators, g, strict=True)):
        if n_y > len(o) / one:
            raise InputError(
                f"n_y: expected no more than the {len(o) / one:.0f} independent frames of end {end}, found "
                f"{n_y}; sample longer, or take fewer."
            )
    if isinstance(lams, int | np.integer):
        grid = spread_lams(fit_operator_density(operators, inefficiency=g), int(lams))
    else:
        grid = tuple(float(v) for v in lams)
        if len(grid) < 2 or grid[0] != 0.0 or grid[-1] != 1.0 or not (np.diff(grid) > 0).all():
            raise InputError(f"lams: expected them to rise strictly from 0 to 1, found {list(grid)}.")
    if atoms is None:
        require_unconstrained(pair.system_0, name="atoms")
    noised = noised_atoms(pair.system_0, atoms)
    rng = np.random.default_rng(check_seed(seed))
    found: list[FloatArray] = []
    n_forces, n_energies = 0, 2 * sum(len(o) for o in operators)
    for end, x in enumerate(frames):
        chosen = x[np.linspace(0, len(x) - 1, n_y).round().astype(int)]
        y = chosen.copy()
        y[:, noised] += level * rng.standard_normal(y[:, noised].shape)
        o, forces, energies = posterior_operators(
            pair, chosen, y, level, grid if end == 0 else grid[::-1], atoms=atoms, n_samples=n_samples,
            interval=interval, n_equil=n_equil, timestep=timestep, friction=friction,
            seed=seed_to_int32(rng), platform=platform, progress=_counting_from(progress, end * n_y, 2 * n_y),
        )  # fmt: skip
        found.append(o if end == 0 else o[:, ::-1])
        n_forces, n_energies = n_forces + forces, n_energies + energies
    return bridge_from_posteriors(
        found[0], found[1], grid, sigma=level, work=work, n_forces=n_forces, n_energies=n_energies
    )


def _counting_from(
    progress: Callable[[int, int], None] | None, first: int, total: int
) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, _: progress(first + done, total)
