r"""How far the paths of a learned, stepped dynamics are from the true ones: two errors, apart.

A chain x' = x + D dt s_theta(x) + sqrt(2 D dt) xi, whose noise fills each step continuously, against
the diffusion dx = D s(x) dt + sqrt(2 D) dW that is meant (Girsanov, exact; per step):

.. math::

    \mathrm{KL} = \tfrac14\, E \int_0^{dt} \sum_i D_i\, [s_{\theta,i}(x_0) - s_i(x_\tau)]^2\, d\tau
    = \underbrace{\tfrac14 dt\, E \sum_i D_i (s_{\theta,i} - s_i)^2(x_0)}_\text{score}
    + \underbrace{\tfrac14 E \int \sum_i D_i [s_i(x_\tau) - s_i(x_0)]^2 d\tau}_\text{discretisation}
    + \text{cross}

Over a time T the score term does not know the step (it is the model's), and the discretisation
term falls as dt: to leading order ``(dt^2/4) |D^(1/2) H D^(1/2)|^2`` a step, H the Hessian.

========  =======================  =========
symbol    code                     unit
========  =======================  =========
s_theta   ``learned(x)``           1/nm
s         ``reference(x)``         1/nm
D         ``diffusion``            nm^2/ps
dt        ``step_size``            ps
========  =======================  =========
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from openmm import unit

from .errors import InputError
from .step_size import diffusion_per_coordinate
from .systems import FloatArray, check_positive
from .units import to_md

Field = Callable[[FloatArray], Any]


@dataclass(frozen=True)
class PathDivergence:
    """KL divergence of paths per unit of time [1/ps], each as (value, standard error over frames).

    Attributes
    ----------
    score, discretisation, cross, total : (float, float)
        Total is the sum of the three. Times T it is the divergence of paths of length T, in kT
        units of information (nats), but for that of their starts.
    step_size : float
        [ps].
    n_frames : int
    calls : int
        Evaluations of either score (single frames).
    """

    score: tuple[float, float]
    discretisation: tuple[float, float]
    cross: tuple[float, float]
    total: tuple[float, float]
    step_size: float
    n_frames: int
    calls: int

    def per_step(self) -> dict[str, float]:
        """The values for one step [nats]."""
        names = ("score", "discretisation", "cross", "total")
        return {n: getattr(self, n)[0] * self.step_size for n in names}


def path_divergence(
    learned: Field,
    reference: Field,
    frames: Any,
    diffusion: Any,
    step_size: Any,
    *,
    generator: np.random.Generator,
    n_nodes: int = 3,
    n_draws: int = 1,
) -> PathDivergence:
    """Score error and discretisation error of a learned dynamics, in information per time.

    Parameters
    ----------
    learned, reference : callable
        ``score(x) -> like x`` [1/nm] of frames x [n, n_atoms, 3] or [n, d] in nm. The same one
        twice leaves the discretisation alone.
    frames : float array [n_frames, n_atoms, 3] or [n_frames, d]
        Where the learned chain is: its own stationary frames, independent [nm]. (Frames of the
        reference instead give the divergence to leading order.)
    diffusion : float, Quantity, or array [n_atoms] (or [d])
        D [nm^2/ps].
    step_size : float or Quantity
        dt [ps].
    generator : numpy.random.Generator
    n_nodes : int
        Gauss-Legendre nodes of the integral over the step (3 is exact for a harmonic energy).
    n_draws : int
        Draws of the noise per frame and node, in antithetic pairs.

    Returns
    -------
    PathDivergence

    Raises
    ------
    InputError, UnitsError
        For arguments that do not fit, or scores that are not finite.

    Notes
    -----
    Unbiased in the noise and, up to the nodes, in the step: nothing is expanded in dt. Costs
    ``2 n_nodes n_draws + 1`` evaluations of the reference per frame and one of the learned score.

    References
    ----------
    I. V. Girsanov, On transforming a certain class of stochastic processes by absolutely continuous
    substitution of measures, Theory Probab. Appl. 5 (1960), doi:10.1137/1105027. Diffusion samplers
    as Langevin integrators, arXiv:2511.17741.

    Examples
    --------
    Two harmonic wells, one wrong by 10 %: for both terms there is a formula.

    >>> random = np.random.default_rng(1)
    >>> kappa, D, dt = 100.0, 0.1, 0.001
    >>> x = random.standard_normal((4000, 1)) / np.sqrt(kappa)
    >>> found = path_divergence(
    ...     lambda x: -1.1 * kappa * x, lambda x: -kappa * x, x, D, dt, generator=random
    ... )
    >>> exact = 0.25 * D * (0.1 * kappa) ** 2 / kappa
    >>> bool(abs(found.score[0] - exact) < 4 * found.score[1])
    True
    """
    x = np.asarray(to_md(frames, unit.nanometer, name="frames"), dtype=np.float64)
    if x.ndim not in (2, 3) or 0 in x.shape or len(x) < 2 or not np.isfinite(x).all():
        raise InputError(
            f"frames: expected two or more finite ones, [n_frames, n_atoms, 3] or [n_frames, d], found shape "
            f"{x.shape}."
        )
    per_dof = diffusion_per_coordinate(diffusion, x)
    dt = check_positive("step_size", to_md(step_size, unit.picosecond, name="step_size"))
    n_nodes = check_positive("n_nodes", n_nodes, integer=True)
    n_draws = check_positive("n_draws", n_draws, integer=True)
    calls = 0

    def field(which: Field, name: str, at: FloatArray) -> FloatArray:
        nonlocal calls
        s = np.asarray(which(at), dtype=np.float64)
        calls += len(at)
        if s.shape != at.shape or not np.isfinite(s).all():
            raise InputError(
                f"{name}: expected a finite score of shape {at.shape}, found {s.shape} or others."
            )
        return s

    def squared(a: FloatArray, b: FloatArray) -> FloatArray:
        """Sum of D a b over the coordinates of each frame."""
        return np.asarray((per_dof * a * b).reshape(len(x), -1).sum(axis=1))

    s_theta, s_0 = field(learned, "learned", x), field(reference, "reference", x)
    wrong = s_theta - s_0
    score = 0.25 * squared(wrong, wrong)
    change, cross = np.zeros(len(x)), np.zeros(len(x))
    nodes, weights = np.polynomial.legendre.leggauss(n_nodes)
    for node, weight in zip(0.5 * (nodes + 1.0), 0.5 * weights, strict=True):
        for _ in range(n_draws):
            xi = generator.standard_normal(x.shape)
            for sign in (1.0, -1.0):
                tau = node * dt
                moved = x + per_dof * tau * s_theta + sign * np.sqrt(2.0 * per_dof * tau) * xi
                step = field(reference, "reference", moved) - s_0
                change += 0.25 * weight / (2 * n_draws) * squared(step, step)
                cross -= 0.5 * weight / (2 * n_draws) * squared(wrong, step)

    def mean(v: FloatArray) -> tuple[float, float]:
        return float(v.mean()), float(v.std(ddof=1) / np.sqrt(len(v)))

    return PathDivergence(
        mean(score), mean(change), mean(cross), mean(score + change + cross), dt, len(x), calls
    )
