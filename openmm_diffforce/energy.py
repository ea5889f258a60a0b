r"""Energies out of a diffusion model: -ln p_0(x), from its score alone.

.. math::

    dy = f y\, dt + g\, dW, \qquad y_t = \alpha_t x + \sigma_t \epsilon, \qquad
    s(y, t) = \nabla \ln p_t(y), \qquad S = -\ln p_0

Every method starts at the frame, goes up in noise along a path y_t, and ends in a Gaussian p_T.
With D the divergence of the score:

==================  ==========================================================================
method              ln p_0(x) =
==================  ==========================================================================
``flow``            ln p_T + int [f d - (g^2/2) D] dt, on dy/dt = f y - (g^2/2) s
``stratonovich``    ln p_T + int [f d + f y.s - (g^2/2) (D + |s|^2)] dt - int s o dy, on ANY path
``ito``             ln p_T + int [f d - g^2 D - (g^2/2) |s|^2] dt - int g s.dW, on the forward SDE
``backward_ito``    ln p_T + int [f d + f y.s - (g^2/2) |s|^2] dt - int s.dy, the score taken at
                    the END of each step; the forward SDE, no divergence
``mmse``            ln N(x; m, C) - (1/2) int [mmse(x) - mmse_N(x)] dsnr, snr = alpha^2/sigma^2
==================  ==========================================================================

and while a reverse SDE generates samples, :func:`sample_with_energy` sums
``ln p_T + int [f d + (g^2/2) |s|^2] dt + int g s.dW``.

Arrays and a callable in, a result out: nothing here needs OpenMM.

References
----------
Y. Song et al., Score-based generative modeling through stochastic differential equations, 2021,
arXiv:2011.13456; energies from diffusion models, doi:10.1101/2025.11.28.690021; X. Kong, R. Brekelmans,
G. Ver Steeg, Information-theoretic diffusion, 2023, arXiv:2302.03792; M. F. Hutchinson, A stochastic
estimator of the trace, Commun. Stat. 19 (1990), doi:10.1080/03610919008812866.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from openmm import unit

from .errors import InputError, ModelError, NotConservativeError
from .models.action import model_fields
from .record import atomic_path
from .schedule import NoiseSchedule
from .scores import (
    FloatArray,
    GaussianPrior,
    RowNoise,
    Score,
    ScoreSpace,
    TimeGrid,
    check_array,
    check_choice,
    check_count,
    check_number,
    check_prior,
    check_rows,
    log_prior,
    matched_prior,
    prior_axes,
    prior_draws,
    prior_mean,
    prior_vectors,
    score_of,
    score_space,
    time_nodes,
)
from .units import thermal_energy, to_md

Tensor = torch.Tensor
Progress = Callable[[int, int], None]

METHODS = ("flow", "stratonovich", "ito", "backward_ito", "mmse")
"""How ln p_0 of a given frame can be found."""

PATHS = ("noising", "mean", "flow", "brownian")
"""Ready-made paths of the Stratonovich integral."""

N_STEPS = {"flow": 40, "stratonovich": 400, "ito": 1000, "backward_ito": 1000, "mmse": 200}
"""Steps if none are asked for."""

MIN_NOISE = 2.0
"""Largest noise of a model, in units of the molecule's spread, below which p_T is no Gaussian."""

SOLVERS = {"heun": (2, 2), "rk4": (4, 4)}
"""Order, and score evaluations in a step."""


@dataclass(frozen=True)
class EnergyResult:
    """ln p_0 of every frame, with what judges it.

    Attributes
    ----------
    log_density : numpy.ndarray, shape (n_frames,)
        ln p_0, a density per nm^n_dim.
    standard_error : numpy.ndarray, shape (n_frames,)
        Of ``log_density`` over paths and probes; zero where nothing is drawn. A single path of an
        Ito sum has that of its own quadratic variation; of the other methods, NaN: ask for more paths.
    discretisation : numpy.ndarray, shape (n_frames,)
        What half as many steps change, divided by ``2^order - 1``: an estimate of the exact integral
        less ``log_density`` (of its size, if ``extrapolated``). NaN if it was not asked for. On
        Brownian paths it holds their noise too.
    truncation : numpy.ndarray, shape (n_frames,)
        First-order estimate of what the noise below ``sigma_min`` would add; not added. Zero for
        ``sigma_min = 0``; NaN where no divergence was computed.
    method : str
    n_dim : int
        Degrees of freedom.
    n_steps, n_paths : int
    sigma_min, sigma_max : float
        Smallest and largest sigma/alpha [nm].
    extrapolated : bool
        Whether ``discretisation`` was added.
    n_score, n_products : int
        Score evaluations and Jacobian products in all, each of one frame.
    """

    log_density: FloatArray
    standard_error: FloatArray
    discretisation: FloatArray
    truncation: FloatArray
    method: str
    n_dim: int
    n_steps: int
    n_paths: int
    sigma_min: float
    sigma_max: float
    extrapolated: bool
    n_score: int
    n_products: int

    def __len__(self) -> int:
        return len(self.log_density)

    def energies(self, *, temperature: Any = None, reference: int | None = None) -> FloatArray:
        """-ln p_0 of every frame [kT], or times kT [kJ/mol].

        Parameters
        ----------
        temperature : float [K] or Quantity, optional
            That of the training ensemble: energies in kJ/mol.
        reference : int, optional
            Frame whose energy is zero. Without it the zero is that of ln p_0, which depends on the
            unit of length.

        Raises
        ------
        InputError
            If there is no such frame.
        UnitsError
            For a temperature that is none.
        """
        s = -self.log_density
        if reference is not None:
            if isinstance(reference, bool) or not isinstance(reference, int | np.integer):
                raise InputError(f"reference: expected the number of a frame, found {reference!r}.")
            if not -len(s) <= reference < len(s):
                raise InputError(f"reference: expected a frame below {len(s)}, found {reference}.")
            s = s - s[reference]
        return s if temperature is None else thermal_energy(temperature) * s

    def to_frame(self, *, temperature: Any = None, reference: int | None = None) -> Any:
        """A pandas table, one row per frame.

        Columns ``log_density``, ``energy_kT``, ``energy_kJ_mol`` (with a temperature), ``standard_error_kT``,
        ``discretisation_kT``, ``truncation_kT``; ``attrs`` hold the method, its settings and the temperature.
        """
        import pandas as pd

        columns = {"log_density": self.log_density, "energy_kT": self.energies(reference=reference)}
        if temperature is not None:
            columns["energy_kJ_mol"] = self.energies(temperature=temperature, reference=reference)
        columns |= {
            "standard_error_kT": self.standard_error,
            # of the energy, which is minus ln p_0
            "discretisation_kT": 0.0 - self.discretisation,
            "truncation_kT": 0.0 - self.truncation,
        }
        table = pd.DataFrame(columns, index=pd.RangeIndex(len(self), name="frame"))
        table.attrs = {**self.settings(), "reference_frame": reference}
        if temperature is not None:
            table.attrs["temperature"] = float(to_md(temperature, unit.kelvin, name="temperature"))
        return table

    def settings(self) -> dict[str, Any]:
        """What is not per frame, JSON-ready."""
        names = (
            "method", "n_dim", "n_steps", "n_paths", "sigma_min", "sigma_max", "extrapolated",
            "n_score", "n_products",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def write(
        self, path: str | os.PathLike[str], *, temperature: Any = None, reference: int | None = None
    ) -> Path:
        """The table of :meth:`to_frame` as ``.csv`` or ``.parquet``; written aside and renamed.

        Raises
        ------
        InputError
            For another ending.
        """
        out = Path(path)
        if out.suffix not in (".csv", ".parquet"):
            raise InputError(f"{out}: expected a name that ends in .csv or .parquet.")
        table = self.to_frame(temperature=temperature, reference=reference)
        with atomic_path(out) as temporary:
            if out.suffix == ".csv":
                table.to_csv(temporary)
            else:
                table.to_parquet(temporary)
        return out


# ----------------------------------------------------------------------------------- methods


@dataclass
class _Sums:
    """What a batch of rows gives: [n_rows, n_probes], or [n_rows]."""

    fine: FloatArray
    coarse: FloatArray | None
    noise: FloatArray  # variance of the discretisation noise of a Brownian path, by itself
    truncation: FloatArray


def _column(value: FloatArray) -> FloatArray:
    return np.asarray(value)[:, None]


def _truncation(space: ScoreSpace, grid: TimeGrid, s: Tensor, div: Tensor) -> FloatArray:
    square = (s * s).sum(1, keepdim=True)
    # in z = y/alpha: d ln p / d(tau^2) = (div s_z + |s_z|^2)/2, s_z = alpha s
    return (-0.5 * grid.sigma[0] ** 2 * (div + square)).mean(1).numpy()


def _flow(
    space: ScoreSpace, grid: TimeGrid, prior: GaussianPrior, x: Tensor, probes: Tensor | None, solver: str,
    tick: Callable[[], None],
) -> tuple[FloatArray, FloatArray]:  # fmt: skip
    """ln p_0 [n_rows, n_probes] along the probability flow; and its truncation."""
    d = space.n_dim
    stages = {"heun": (0.0, 1.0), "rk4": (0.0, 0.5, 0.5, 1.0)}[solver]
    weights = {"heun": (0.5, 0.5), "rk4": (1 / 6, 1 / 3, 1 / 3, 1 / 6)}[solver]
    y, truncation = x * grid.alpha[0], None
    total: Any = 0.0
    halves = np.empty(2 * len(grid.t) - 1)
    halves[::2], halves[1::2] = grid.t, 0.5 * (grid.t[1:] + grid.t[:-1])
    inside = TimeGrid.of(grid.schedule, halves)
    for k in range(len(grid.t) - 1):
        h = float(grid.t[k + 1] - grid.t[k])
        slope = torch.zeros_like(y)
        step, gain = torch.zeros_like(y), torch.zeros(1, dtype=torch.float64)
        for where, weight in zip(stages, weights, strict=True):
            i = 2 * k + int(2 * where)
            f, g2 = float(inside.drift[i]), float(inside.diffusion_2[i])
            s, div = space.with_divergence(y + where * h * slope, float(inside.t[i]), probes)
            if truncation is None:
                truncation = _truncation(space, grid, s, div)
            slope = f * (y + where * h * slope) - 0.5 * g2 * s
            step = step + weight * slope
            gain = gain + weight * (f * d - 0.5 * g2 * div)
        y, total = y + h * step, total + h * gain
        tick()
    assert truncation is not None
    last = log_prior(prior, space, y, grid.alpha[-1], grid.sigma[-1])
    return _column(last) + np.asarray(total), truncation


def _path_nodes(
    space: ScoreSpace, grid: TimeGrid, x: Tensor, kind: str, given: Tensor | None, noise: RowNoise
) -> Callable[[int, Tensor | None, Tensor | None], Tensor]:
    """A function of (node, y before, score before) that gives y at the node."""
    eps = space.project(noise.normal()) if kind == "noising" else None
    ratio = grid.alpha[1:] / grid.alpha[:-1]
    spread = np.sqrt(np.maximum(grid.sigma[1:] ** 2 - (ratio * grid.sigma[:-1]) ** 2, 0.0))

    def node(k: int, y: Tensor | None, s: Tensor | None) -> Tensor:
        if given is not None:
            return given[:, k]
        if k == 0 or kind == "mean":
            return x * grid.alpha[k]
        if eps is not None:  # no noise yet at sigma_min: the path begins at the frame
            return grid.alpha[k] * (x + (grid.tau[k] - grid.tau[0]) * eps)
        assert y is not None
        if kind == "flow":
            assert s is not None
            h = grid.t[k] - grid.t[k - 1]
            return y + h * (grid.drift[k - 1] * y - 0.5 * grid.diffusion_2[k - 1] * s)
        return ratio[k - 1] * y + spread[k - 1] * space.project(noise.normal())

    return node


class _PathSum:
    """The integrals along a path, from its nodes one after the other, over one grid."""

    def __init__(self, method: str, grid: TimeGrid, n_dim: int) -> None:
        self.method, self.grid, self.d, self.k = method, grid, n_dim, 0
        self.total: Any = 0.0
        self.last: tuple[Tensor, Tensor, Any] | None = None

    def add(self, y: Tensor, s: Tensor, div: Any) -> None:
        """The next node; div is None where the method needs none."""
        k, square = self.k, (s * s).sum(1, keepdim=True)
        f, g2 = self.grid.drift[k], self.grid.diffusion_2[k]
        inner = f * (y * s).sum(1, keepdim=True)
        if self.method == "ito":
            rate = f * self.d - g2 * div - 0.5 * g2 * square
        elif self.method == "backward_ito":
            rate = f * self.d + inner - 0.5 * g2 * square
        else:
            rate = f * self.d + inner - 0.5 * g2 * (div + square)
        if self.last is not None:
            y_0, s_0, rate_0 = self.last
            h, move = self.grid.t[k] - self.grid.t[k - 1], y - y_0
            if self.method == "ito":
                # g dW of the exact step; the signal shrinks by a known factor
                ratio = self.grid.alpha[k] / self.grid.alpha[k - 1]
                work = (s_0 * (y - ratio * y_0)).sum(1, keepdim=True)
            elif self.method == "backward_ito":
                work = (s * move).sum(1, keepdim=True)
            else:
                work = 0.5 * ((s + s_0) * move).sum(1, keepdim=True)
            self.total = self.total + 0.5 * h * (rate + rate_0) - work
        self.last = (y, s, rate)
        self.k += 1


def _along(
    space: ScoreSpace, grid: TimeGrid, prior: GaussianPrior, x: Tensor, probes: Tensor | None, method: str,
    kind: str, given: Tensor | None, noise: RowNoise, tick: Callable[[], None],
) -> _Sums:  # fmt: skip
    """Stratonovich or either Ito integral along a path; the coarse sum costs no further scores."""
    node = _path_nodes(space, grid, x, kind, given, noise)
    fine, coarse = _PathSum(method, grid, space.n_dim), _PathSum(method, grid.coarse(), space.n_dim)
    truncation = np.full(len(x), 0.0 if grid.sigma[0] == 0 else np.nan)
    variance = np.zeros(len(x))
    y: Tensor | None = None
    s: Tensor | None = None
    kept: list[tuple[Tensor, Tensor]] = []
    for k in range(len(grid.t)):
        y = node(k, y, s)
        div = None
        if method == "backward_ito":
            s = space.at(y, float(grid.t[k]))
        else:
            s, div = space.with_divergence(y, float(grid.t[k]), probes)
            if k == 0:
                truncation = _truncation(space, grid, s, div)
        fine.add(y, s, div)
        if k % 2 == 0:
            coarse.add(y, s, div)
        # Two half steps against one: (s_2 - s_1).(y_1 - y_0) has mean zero and, squared, the variance
        # that the second-order term of an Ito sum has over both.
        kept = [*kept[-2:], (y, s)]
        if k % 2 == 0 and k > 0:
            variance += ((kept[2][1] - kept[1][1]) * (kept[1][0] - kept[0][0])).sum(1).numpy() ** 2
        tick()
    assert y is not None
    last = _column(log_prior(prior, space, y, grid.alpha[-1], grid.sigma[-1]))
    brownian = method != "stratonovich"
    return _Sums(
        last + np.asarray(fine.total), last + np.asarray(coarse.total),
        variance if brownian else np.zeros(len(x)), truncation,
    )  # fmt: skip


def _mmse(
    space: ScoreSpace,
    grid: TimeGrid,
    prior: GaussianPrior,
    x: Tensor,
    noise: RowNoise,
    tick: Callable[[], None],
) -> _Sums:
    """Pointwise I-MMSE against the matched Gaussian, on pairs of opposite noise."""
    eps = space.project(noise.normal())
    mean = torch.as_tensor(prior_mean(prior, space))
    _, variance = prior_axes(prior, space, np.zeros((1, space.size)))
    axes = torch.as_tensor(prior_vectors(prior, space))
    start = log_prior(prior, space, x, 1.0, 0.0)

    def rate(k: int) -> Tensor:
        """mmse less that of the Gaussian, times -dsnr/dw, at w = tau^2."""
        tau, alpha = float(grid.tau[k]), float(grid.alpha[k])
        out = torch.zeros(len(x), dtype=torch.float64)
        for sign in (1.0, -1.0):
            z = x + sign * tau * eps
            s = alpha * space.at(alpha * z, float(grid.t[k]))
            gauss = -((z - mean) @ axes / torch.as_tensor(variance + tau**2)) @ axes.T
            square = (s * s).sum(1) - (gauss * gauss).sum(1)
            out += 0.5 * square + sign * (eps * (s - gauss)).sum(1) / tau
        return out

    w = grid.tau**2
    first = 1 if w[0] == 0 else 0
    rates = []
    for k in range(first, len(w)):
        rates.append(rate(k).numpy())
        tick()
    nodes, values = w[first:], np.array(rates)
    # below the first noise the integrand is that of the first noise
    nodes, values = np.append(0.0, nodes), np.concatenate([values[:1], values])
    sums = []
    for stride in (1, 2):
        chosen = np.arange(0, len(nodes), stride)
        if chosen[-1] != len(nodes) - 1:
            chosen = np.append(chosen, len(nodes) - 1)
        sums.append(start - 0.5 * np.trapezoid(values[chosen], nodes[chosen], axis=0))
    return _Sums(_column(sums[0]), _column(sums[1]), np.zeros(len(x)), np.zeros(len(x)))


# ------------------------------------------------------------------------------------- doors


def learned_energy(
    score: Score,
    x: Any,
    schedule: NoiseSchedule,
    *,
    method: str = "flow",
    solver: str = "rk4",
    path: Any = "noising",
    n_steps: int | None = None,
    grid: Any = "quadratic",
    sigma_min: Any = 0.0,
    sigma_max: Any = None,
    prior: Any = "standard",
    n_paths: int = 1,
    divergence: str = "exact",
    n_probes: int = 8,
    difference: Any = None,
    mean_free: bool | None = None,
    halving: bool = True,
    extrapolate: bool = False,
    batch_size: int = 1024,
    dtype: torch.dtype = torch.float64,
    generator: np.random.Generator | None = None,
    progress: Progress | None = None,
) -> EnergyResult:
    r"""ln p_0 of frames under a diffusion model, and the energy -ln p_0.

    .. math:: \ln p_0(x) = \ln p_T(y_T) + \int_{t_{min}}^{T} [f d - \tfrac12 g^2\, \nabla\cdot s]\, dt,
        \qquad \dot y = f y - \tfrac12 g^2 s, \quad y_{t_{min}} = \alpha x

    is the default, the probability flow; the others are in the module's table.

    ===========  ==========================================  ======
    symbol       code                                        unit
    ===========  ==========================================  ======
    s            ``score(y, t)``                             1/nm
    f, g         ``schedule.drift(t)``, ``.diffusion(t)``    -, nm
    p_T          ``prior`` and the schedule at the end       nm^-d
    d            ``result.n_dim``                            -
    ===========  ==========================================  ======

    Parameters
    ----------
    score : callable
        ``score(y, t) -> s`` of torch tensors y [n_rows, ...] in nm, shaped like x, and t [n_rows]; the
        gradient of ln p_t at the noised coordinates. :func:`score_of` makes one of a model.
    x : array_like or Quantity, shape (n_frames, n_dim) or (n_frames, n_atoms, 3)
        Frames [nm].
    schedule : VESchedule or VPSchedule
        The one that the model was trained with.
    method : {"flow", "stratonovich", "ito", "backward_ito", "mmse"}
    solver : {"rk4", "heun"}
        Of the flow.
    path : {"noising", "mean", "flow", "brownian"} or array_like
        Of ``stratonovich``: ``alpha x + sigma eps`` with one eps, ``alpha x``, the probability flow by
        Euler steps, the forward SDE, or nodes of your own, shape (n_steps + 1, *x.shape) on the
        grid, the first ``alpha x``. With the exact score every path gives the same; how much paths
        differ is what the score lacks in being a gradient that moves as it should.
    n_steps : int, optional
        An even number; by default :data:`N_STEPS` of the method.
    grid : {"quadratic", "linear", "log", "karras"} or array_like
        As in :func:`noise_grid`; or increasing t, an even number of steps.
    sigma_min, sigma_max : float or Quantity
        Noise-to-signal ratios at which to begin and to end [nm]. A network that was never trained without
        noise needs ``sigma_min > 0``: what is found is then ln p of the frames noised so much.
    prior : "standard" or GaussianPrior
        p_T is its Gaussian, noised. Standard: ``N(0, sigma_T^2)``, or ``N(0, l^2)`` for VP.
    n_paths : int
        Paths per frame, averaged. The flow has one.
    divergence : {"exact", "hutchinson"}
        By ``size`` products with the Jacobian, or by ``n_probes`` products with random signs.
    n_probes : int
        Random vectors per path, kept along it.
    difference : float, optional
        Displacement [nm] for central differences of the score, where autograd cannot differentiate it.
    mean_free : bool, optional
        Work in the subspace without the centre of mass, ``d = 3 n_atoms - 3``; by default for
        frames of atoms. Densities are per volume of that subspace of the 3 n_atoms coordinates; as a
        density of positions relative to one atom they are ``n_atoms^(-3/2)`` times as large.
    halving : bool
        Estimate the discretisation error from half as many steps (the flow: half again the cost; the
        others have it for nothing).
    extrapolate : bool
        Add that estimate (Richardson). Flow and Stratonovich only.
    batch_size : int
        Rows (frames times paths) at once: bounds memory, changes nothing.
    dtype : torch.dtype
        Of what the score is given. Sums are float64.
    generator : numpy.random.Generator, optional
        Needed where something is drawn.
    progress : callable, optional
        Called as ``progress(n_done, n_all)``.

    Returns
    -------
    EnergyResult

    Raises
    ------
    InputError
        For arguments of the wrong shape, kind or range, and a score of the wrong shape.
    ModelError
        If the score is not finite.

    Notes
    -----
    Deterministic given the generator. What is NOT checked: that the score belongs to the schedule, and that
    p_T is the Gaussian it is taken for (another ``sigma_max`` or prior must not matter).
    The time of the default grid is quadratic: it resolves small noise, where the score is largest.

    Examples
    --------
    >>> from openmm_diffforce.schedule import VPSchedule
    >>> from openmm_diffforce.testing import GaussianMixture
    >>> mixture = GaussianMixture([[-1.0], [1.0]], 0.1, weights=[0.3, 0.7])
    >>> schedule = VPSchedule(length=1.0)
    >>> found = learned_energy(mixture.score(schedule), [[0.9]], schedule, prior=mixture.prior())
    >>> abs(found.log_density - mixture.log_density([[0.9]])).item() < 1e-3
    True
    """
    frames = check_rows(x)
    method = check_choice("method", method, METHODS)
    space = score_space(
        score, frames.shape[1:], mean_free=mean_free, divergence=divergence, n_probes=n_probes,
        difference=difference, dtype=dtype,
    )  # fmt: skip
    check_choice("solver", solver, SOLVERS)
    n_steps = check_count("n_steps", N_STEPS[method] if n_steps is None else n_steps, 2)
    n_paths, batch_size = check_count("n_paths", n_paths), check_count("batch_size", batch_size)
    if n_steps % 2:
        raise InputError(f"n_steps: expected an even number (its half is run too), found {n_steps}.")
    nodes = TimeGrid.of(schedule, time_nodes(grid, schedule, n_steps, sigma_min, sigma_max))
    n_steps = len(nodes.t) - 1
    chosen = check_prior(prior, schedule, space)
    kind, given = ("", None)
    if method == "stratonovich":
        kind, given = _path(path, frames, nodes, space)
    elif not (isinstance(path, str) and path == "noising"):
        raise InputError(f"path: expected it with method 'stratonovich' only, found it with {method!r}.")
    elif method in ("ito", "backward_ito"):
        kind = "brownian"
    uses_divergence = method in ("flow", "stratonovich", "ito")
    probing = uses_divergence and not space.exact
    drawing = kind in ("noising", "brownian") or method == "mmse"
    if n_paths > 1 and not drawing:
        raise InputError(f"n_paths: expected 1, since {method} on this path draws none, found {n_paths}.")
    if probing and n_probes * n_paths < 2:
        raise InputError("n_probes: expected two or more for a standard error, found 1.")
    if extrapolate and method not in ("flow", "stratonovich"):
        raise InputError(
            f"extrapolate: expected method flow or stratonovich, found {method}: its error is noise."
        )
    if extrapolate and not halving:
        raise InputError("extrapolate: expected halving=True, found False.")
    key = None
    if probing or drawing:
        if not isinstance(generator, np.random.Generator):
            raise InputError(
                "generator: expected a numpy.random.Generator (np.random.default_rng(seed)), found "
                f"{generator!r}."
            )
        key = int(generator.integers(2**62))

    start = space.project(torch.as_tensor(frames.reshape(len(frames), -1)))
    n_rows = len(frames) * n_paths
    per_batch = n_steps + (n_steps // 2 if method == "flow" and halving else 0)
    done, total = 0, per_batch * -(-n_rows // batch_size)

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(min(done, total), total)

    batches = []
    for low in range(0, n_rows, batch_size):
        rows = range(low, min(low + batch_size, n_rows))
        at = start[torch.arange(rows.start, rows.stop) // n_paths]
        noise = RowNoise(key, rows, space.size)
        probes = space.project(noise.probes(space.n_probes)) if probing else None
        if method == "flow":
            fine, cut = _flow(space, nodes, chosen, at, probes, solver, tick)
            coarse = None
            if halving:
                coarse, _ = _flow(space, nodes.coarse(), chosen, at, probes, solver, tick)
            batches.append(_Sums(fine, coarse, np.zeros(len(at)), cut))
        elif method == "mmse":
            batches.append(_mmse(space, nodes, chosen, at, noise, tick))
        else:
            own = None if given is None else given[rows.start : rows.stop]
            batches.append(_along(space, nodes, chosen, at, probes, method, kind, own, noise, tick))
    if progress is not None and done != total:
        progress(total, total)
    order = SOLVERS[solver][0] if method == "flow" else 1 if kind == "brownian" else 2
    return _result(batches, space, nodes, method, n_paths, order, probing, halving, extrapolate, drawing)


def _result(
    batches: list[_Sums], space: ScoreSpace, grid: TimeGrid, method: str, n_paths: int, order: int,
    probing: bool, halving: bool, extrapolate: bool, drawing: bool,
) -> EnergyResult:  # fmt: skip
    fine = np.concatenate([b.fine for b in batches])
    n_frames = len(fine) // n_paths
    coarse = None
    if halving and batches[0].coarse is not None:
        coarse = np.concatenate([np.asarray(b.coarse) for b in batches])
    gain = np.full(n_frames, np.nan) if coarse is None else (fine - coarse) / (2.0**order - 1.0)
    if coarse is not None and extrapolate:
        fine = fine + gain
    if coarse is not None:
        gain = gain.mean(axis=1).reshape(n_frames, n_paths).mean(axis=1)
    by_path = fine.mean(axis=1).reshape(n_frames, n_paths)
    noise = np.concatenate([b.noise for b in batches]).reshape(n_frames, n_paths)
    if n_paths > 1:
        error = by_path.std(axis=1, ddof=1) / math.sqrt(n_paths)
    elif drawing and method in ("stratonovich", "mmse") and not np.any(noise):
        error = np.full(n_frames, np.nan)  # one path: its spread is not known
    else:
        square = noise[:, 0]
        if probing and fine.shape[1] > 1:
            square = square + fine.var(axis=1, ddof=1) / fine.shape[1]
        error = np.sqrt(square)
    truncation = np.concatenate([b.truncation for b in batches]).reshape(n_frames, n_paths).mean(axis=1)
    return EnergyResult(
        log_density=by_path.mean(axis=1), standard_error=error, discretisation=gain,
        truncation=truncation, method=method, n_dim=space.n_dim, n_steps=len(grid.t) - 1,
        n_paths=n_paths, sigma_min=float(grid.tau[0]), sigma_max=float(grid.tau[-1]),
        extrapolated=extrapolate, n_score=space.n_score, n_products=space.n_products,
    )  # fmt: skip


def _path(path: Any, frames: FloatArray, grid: TimeGrid, space: ScoreSpace) -> tuple[str, Tensor | None]:
    """Kind of a ready-made path; or the caller's nodes, rows first [n_frames, n_nodes, size]."""
    if isinstance(path, str):
        return check_choice("path", path, PATHS), None
    nodes = check_array("path", to_md(path, unit.nanometer, name="path"))
    if nodes.shape != (len(grid.t), *frames.shape):
        raise InputError(
            f"path: expected shape {(len(grid.t), *frames.shape)}, a node at every time of the grid, found "
            f"{nodes.shape}."
        )
    rows = torch.as_tensor(nodes.reshape(len(grid.t), len(frames), -1)).transpose(0, 1)
    rows = space.project(rows)
    first = space.project(torch.as_tensor(frames.reshape(len(frames), -1))) * grid.alpha[0]
    if not torch.allclose(rows[:, 0], first, rtol=1e-6, atol=1e-9):
        raise InputError("path: expected it to begin at alpha x of every frame, found another start.")
    return "given", rows


def action_energy(model: Any, x: Any, *, lam: float = 0.0) -> EnergyResult:
    """The model's own clean action S(x, t = 0, lam) of frames, as a result: -ln p_0 up to a constant.

    Parameters
    ----------
    model : ActionModel, TorchScript of one, or Artefact
    x : array_like or Quantity, shape (n_frames, n_atoms, 3)
        Frames [nm].
    lam : float

    Returns
    -------
    EnergyResult
        ``log_density`` is -S, not normalised; nothing is drawn, and nothing errs but the model.

    Raises
    ------
    NotConservativeError
        If the model is a bare score, which has no action.
    InputError, ModelError
        For frames that are none, or an action that is not finite.
    """
    frames = check_rows(x)
    if frames.ndim != 3:
        raise InputError(f"x: expected shape (n_frames, n_atoms, 3), found {frames.shape}.")
    model = model.model if hasattr(model, "metadata") else model
    if not bool(getattr(model, "conservative", True)):
        raise NotConservativeError(
            "model: expected one with an action, found a bare score; learned_energy integrates it "
            "(method flow)."
        )
    try:
        action = model_fields(model, frames, lam=check_number("lam", lam))[0]
    except RuntimeError as err:  # the atoms of another molecule, in TorchScript
        raise InputError(
            f"x: expected frames of the model's molecule, found {frames.shape[1]} atoms that it cannot take "
            f"({str(err).strip().splitlines()[-1]:.200})."
        ) from err
    if not np.isfinite(action).all():
        raise ModelError("model: expected finite actions, found others; the frames are outside its range.")
    nothing = np.zeros(len(frames))
    return EnergyResult(
        log_density=-action, standard_error=nothing, discretisation=nothing, truncation=nothing,
        method="action", n_dim=3 * frames.shape[1] - 3, n_steps=0, n_paths=1, sigma_min=0.0, sigma_max=0.0,
        extrapolated=False, n_score=len(frames), n_products=0,
    )  # fmt: skip


def energies_of_model(
    artefact: Any, x: Any, *, method: str = "flow", n_steps: int | None = None, n_paths: int | None = None,
    n_probes: int | None = None, sigma_min: Any = 0.0, prior_frames: Any = None, lam: float = 0.0,
    seed: int = 0, insist: bool = False, progress: Progress | None = None,
) -> EnergyResult:  # fmt: skip
    """:func:`learned_energy` of frames under an artefact, with its schedule and a matched prior.

    Parameters
    ----------
    artefact : Artefact
    x : array_like or Quantity, shape (n_frames, n_atoms, 3)
        Frames [nm].
    method, n_steps, sigma_min, progress
        As in :func:`learned_energy`.
    n_paths : int, optional
        By default 8 where paths are drawn, else 1.
    n_probes : int, optional
        Hutchinson probes; by default the divergence is exact.
    prior_frames : array_like, optional
        Frames whose moments the prior has; by default x, if there are two or more.
    lam : float
    seed : int
    insist : bool
        Go on where the noise ends before the molecule is forgotten.

    Returns
    -------
    EnergyResult

    Raises
    ------
    InputError
        If the largest noise is below :data:`MIN_NOISE` times the largest spread of the frames: p_T is then
        no Gaussian, and its error would be that of the answer. As :func:`learned_energy` otherwise.
    """
    frames = check_rows(x)
    if frames.ndim != 3:
        raise InputError(f"x: expected shape (n_frames, n_atoms, 3), found {frames.shape}.")
    moments = frames if prior_frames is None else prior_frames
    if len(moments) < 2:
        raise InputError("prior: expected two frames or more for its moments, found one; pass prior_frames.")
    prior = matched_prior(moments)
    if prior.mean.shape != (frames[0].size,):
        raise InputError(f"prior: expected frames of {frames.shape[1]} atoms, found another number.")
    schedule = artefact.schedule
    top, spread = float(schedule.noise_to_signal(1.0)), math.sqrt(np.linalg.eigvalsh(prior.covariance)[-1])
    if top < MIN_NOISE * spread and not insist:
        raise InputError(
            f"model: expected noise up to {MIN_NOISE:g} times the spread of the molecule ({spread:.3g} nm), "
            f"where it has become a Gaussian, found a schedule that ends at {top:.3g} nm; method 'action' "
            "needs no noise; insist=True (--insist) takes p_T for a Gaussian all the same."
        )
    drawn = method in ("stratonovich", "ito", "backward_ito", "mmse")
    return learned_energy(
        score_of(artefact, lam=lam), frames, schedule, method=method, n_steps=n_steps,
        n_paths=(8 if drawn else 1) if n_paths is None else n_paths, sigma_min=sigma_min, prior=prior,
        divergence="exact" if n_probes is None else "hutchinson",
        n_probes=2 if n_probes is None else n_probes, generator=np.random.default_rng(seed),
        progress=progress,
    )  # fmt: skip


@dataclass(frozen=True)
class GeneratedFrames:
    """What :func:`sample_with_energy` returns.

    Attributes
    ----------
    x : numpy.ndarray, shape (n_frames, *shape)
        Samples at ``sigma_min``, divided by alpha [nm].
    energy : EnergyResult
        Of every sample, summed on its own way; the standard error is that of the sum.
    """

    x: FloatArray = field(repr=False)
    energy: EnergyResult


def sample_with_energy(
    score: Score,
    shape: tuple[int, ...],
    schedule: NoiseSchedule,
    *,
    n_frames: int,
    generator: np.random.Generator,
    n_steps: int = 1000,
    grid: Any = "quadratic",
    sigma_min: Any = 0.0,
    sigma_max: Any = None,
    prior: Any = "standard",
    mean_free: bool | None = None,
    batch_size: int = 1024,
    dtype: torch.dtype = torch.float64,
    progress: Progress | None = None,
) -> GeneratedFrames:
    r"""Samples of the reverse SDE, and ln p_0 of each, summed while it is made.

    .. math:: y_k = y_{k+1} - (f y_{k+1} - g^2 s_{k+1}) \Delta t + g \sqrt{\Delta t}\, \xi, \qquad
        \ln p_0(y_0) = \ln p_T(y_T) + \sum_k [f d + \tfrac12 g^2 |s|^2] \Delta t
        + \sum_k g \sqrt{\Delta t}\; s_{k+1} \cdot \xi

    No divergence is needed. The second sum may not be dropped.

    Parameters
    ----------
    score : callable
        As in :func:`learned_energy`.
    shape : tuple of int
        Of one frame: (n_dim,) or (n_atoms, 3).
    schedule : VESchedule or VPSchedule
    n_frames : int
    generator : numpy.random.Generator
    n_steps, grid, sigma_min, sigma_max, prior, mean_free, batch_size, dtype, progress
        As in :func:`learned_energy`; y_T is drawn from the prior.

    Returns
    -------
    GeneratedFrames
        ``energy.standard_error`` is from the quadratic variation of each sum.

    Raises
    ------
    InputError, ModelError
        As :func:`learned_energy`.

    Notes
    -----
    The sum is ln p_0 at the sample under the score's own p_t, whatever the step; with few steps the samples
    are not those of p_0. Deterministic given the generator.

    Examples
    --------
    >>> from openmm_diffforce.schedule import VESchedule
    >>> from openmm_diffforce.testing import GaussianMixture
    >>> made = sample_with_energy(
    ...     GaussianMixture([[0.0]], 1.0).score(VESchedule(5.0)), (1,), VESchedule(5.0),
    ...     n_frames=3, n_steps=50, prior=GaussianPrior(0.0, 1.0), generator=np.random.default_rng(1))
    >>> made.x.shape, made.energy.method
    ((3, 1), 'reverse')
    """
    shape = tuple(check_count("shape", v) for v in shape) if isinstance(shape, tuple | list) else ()
    if len(shape) not in (1, 2) or (len(shape) == 2 and shape[1] != 3):
        raise InputError(f"shape: expected (n_dim,) or (n_atoms, 3), found {shape}.")
    if not isinstance(generator, np.random.Generator):
        raise InputError(f"generator: expected a numpy.random.Generator, found {generator!r}.")
    n_frames, batch_size = check_count("n_frames", n_frames), check_count("batch_size", batch_size)
    space = score_space(
        score, shape, mean_free=mean_free, divergence="exact", n_probes=1, difference=None, dtype=dtype
    )
    n_steps = check_count("n_steps", n_steps, 2)
    if n_steps % 2:
        raise InputError(f"n_steps: expected an even number, found {n_steps}.")
    nodes = TimeGrid.of(schedule, time_nodes(grid, schedule, n_steps, sigma_min, sigma_max))
    chosen = check_prior(prior, schedule, space)
    key = int(generator.integers(2**62))
    n_steps = len(nodes.t) - 1
    done, total = 0, n_steps * -(-n_frames // batch_size)
    found, values, errors = [], [], []
    for low in range(0, n_frames, batch_size):
        noise = RowNoise(key, range(low, min(low + batch_size, n_frames)), space.size)
        y = prior_draws(chosen, space, noise.normal(), nodes.alpha[-1], nodes.sigma[-1])
        value = torch.as_tensor(log_prior(chosen, space, y, nodes.alpha[-1], nodes.sigma[-1]))
        square = torch.zeros_like(value)
        before = torch.zeros_like(y)
        for k in range(n_steps, 0, -1):
            h = float(nodes.t[k] - nodes.t[k - 1])
            f, g2 = float(nodes.drift[k]), float(nodes.diffusion_2[k])
            s = space.at(y, float(nodes.t[k]))
            kick = math.sqrt(g2 * h) * space.project(noise.normal())
            value = value + h * (f * space.n_dim + 0.5 * g2 * (s * s).sum(1)) + (s * kick).sum(1)
            if (n_steps - k) % 2:  # as in the forward sums, every pair of steps
                square = square + ((s - before) * kick).sum(1) ** 2
            before = s
            y = y - h * (f * y - g2 * s) + kick
            done += 1
            if progress is not None:
                progress(done, total)
        found.append((y / nodes.alpha[0]).numpy())
        values.append(value.numpy())
        errors.append(np.sqrt(square.numpy()))
    n = n_frames
    energy = EnergyResult(
        log_density=np.concatenate(values), standard_error=np.concatenate(errors),
        discretisation=np.full(n, np.nan), truncation=np.full(n, np.nan), method="reverse",
        n_dim=space.n_dim, n_steps=n_steps, n_paths=1, sigma_min=float(nodes.tau[0]),
        sigma_max=float(nodes.tau[-1]), extrapolated=False, n_score=space.n_score, n_products=0,
    )  # fmt: skip
    return GeneratedFrames(np.concatenate(found).reshape(n, *shape), energy)
