r"""Delta f from the density of the operator: what two end states say when they do not overlap.

With linear mixing the operator is a sufficient statistic for lambda. Every state shares one density,

.. math:: p_\lambda(O) = p_0(O)\, e^{f(\lambda) - \lambda O} ,

so frames of all sampled states fit the same curve ln p_0(O), each in its own range. Where no state was
sampled only smoothness speaks, and the posterior of f is as wide as that silence. BAR is the limit of
a curve without smoothness; the Gaussian, the lognormal and their like are its straightest curves.

Arrays in, a result out: nothing here needs OpenMM or torch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.interpolate import BSpline

from .errors import ConvergenceError, InputError
from .estimate import statistical_inefficiency

FloatArray = npt.NDArray[np.float64]

N_COEFS = 48
"""B-splines of ln p_0."""

N_NODES = 700
"""Nodes of the integrals over z."""

STRETCHES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Scales s of z = arsinh((O - m)/(s d)) that are averaged over: linear within s d, logarithmic beyond."""

EDGES = (0.01, 0.1, 1.0)
"""Distances e of the pole of z = +-ln(+-(O - edge) + e d) from the outermost frame, averaged over too: an
operator that piles up at a bound, as r^-12 does at 0, is smooth in the logarithm only."""

ROUGHNESS = tuple(10.0 ** np.arange(-2.0, 6.0))
"""Prior precisions mu of the third differences that are averaged over."""

NEGLIGIBLE = 20.0
"""Fall of the log evidence, from stiff to rough, after which rougher curves are not tried."""

WEAK = 1e-6
"""Prior precision of every coefficient: makes the posterior proper, too weak to be seen."""

N_BINS = 20
"""Bins of equal probability in the test of the fit."""

MIN_FRAMES = 20
"""Independent frames per state below which a density means nothing."""


@dataclass(frozen=True)
class OperatorDensity:
    """What :func:`fit_operator_density` returns.

    Attributes
    ----------
    delta_f, d_delta_f : float
        f(1) - f(0) and the standard deviation of its posterior [kT], over curves and over models.
    d_models : float
        Part of ``d_delta_f`` that comes from the choice of coordinate and roughness [kT].
    lam : numpy.ndarray, shape (n_lam,)
        From 0 to 1, fine at the end where O is wide.
    f_lam, d_f_lam : numpy.ndarray, shape (n_lam,)
        f(lambda) - f(0) and its standard deviation [kT].
    o_lam, d_o_lam : numpy.ndarray, shape (n_lam,)
        <O>_lambda = df/dlambda and its standard deviation [kT].
    next_lam : float
        Where a window would tell most: the largest |lambda - w| ``d_o_lam``, an error of f per octave
        of the distance from the widest state w.
    chi2 : numpy.ndarray, shape (n_states,)
        Per degree of freedom, of the frames of every state in bins of equal probability; 1 is
        expected, more says that the states are not tilts of one density (bad sampling, wrong O).
    n_frames : tuple of int
        Frames of every state.
    inefficiency : tuple of float
        Statistical inefficiency g that divided them.
    coordinate : str
        z(O) of the most probable model.
    roughness : float
        Its mu.
    coordinate_weights : dict
        Probability of every z(O), summed over roughnesses.
    """

    delta_f: float
    d_delta_f: float
    d_models: float
    lam: FloatArray
    f_lam: FloatArray
    d_f_lam: FloatArray
    o_lam: FloatArray
    d_o_lam: FloatArray
    next_lam: float
    chi2: FloatArray
    n_frames: tuple[int, ...]
    inefficiency: tuple[float, ...]
    coordinate: str
    roughness: float
    coordinate_weights: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        out = {k: getattr(self, k) for k in self.__dataclass_fields__}
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in out.items()}


def _states(
    operators: Any, lams: Any, inefficiency: Any
) -> tuple[list[FloatArray], FloatArray, tuple[float, ...]]:
    try:
        lam = np.asarray(lams, dtype=np.float64)
        found = [np.asarray(o, dtype=np.float64) for o in operators]
    except (TypeError, ValueError) as err:
        raise InputError(f"operators, lams: expected arrays of real numbers, found {err}.") from err
    if lam.ndim != 1 or len(lam) < 2 or not (np.diff(lam) > 0).all() or lam[0] < 0 or lam[-1] > 1:
        raise InputError(
            f"lams: expected at least two that strictly increase within [0, 1], found {lam.tolist()}."
        )
    if len(found) != len(lam):
        raise InputError(f"operators: expected one array for each of {len(lam)} lams, found {len(found)}.")
    for k, o in enumerate(found):
        if o.ndim != 1 or not np.isfinite(o).all():
            raise InputError(
                f"operators[{k}]: expected finite values of shape (n_frames,), found shape {o.shape} with "
                f"{np.count_nonzero(~np.isfinite(o))} that are not finite."
            )
    if inefficiency is None:
        g = tuple(statistical_inefficiency(o) for o in found)
    else:
        g = tuple(float(v) for v in inefficiency)
        if len(g) != len(lam) or not all(math.isfinite(v) and v >= 1 for v in g):
            raise InputError(f"inefficiency: expected {len(lam)} numbers >= 1, found {list(g)}.")
    for k, (o, one) in enumerate(zip(found, g, strict=True)):
        if len(o) / one < MIN_FRAMES:
            raise InputError(
                f"operators[{k}]: expected at least {MIN_FRAMES} independent frames at lambda "
                f"{lam[k]:g}, found {len(o)} frames with an inefficiency of {one:.1f}; sample longer."
            )
    return found, lam, g


@dataclass(frozen=True)
class OperatorCoordinate:
    """An increasing z(O): arsinh((O - pole)/scale) for side 0, else side ln(side (O - pole)/scale)."""

    side: int
    pole: float
    scale: float

    def z(self, o: FloatArray) -> FloatArray:
        u = (o - self.pole) / self.scale
        return np.asarray(np.arcsinh(u) if self.side == 0 else self.side * np.log(self.side * u))

    def operator(self, z: FloatArray) -> FloatArray:
        u = np.sinh(z) if self.side == 0 else self.side * np.exp(self.side * z)
        return np.asarray(self.pole + self.scale * u)

    def log_slope(self, z: FloatArray) -> FloatArray:
        """ln dz/dO."""
        bend = np.log(np.cosh(z)) if self.side == 0 else self.side * z
        return np.asarray(-bend - math.log(self.scale))

    def __str__(self) -> str:
        u = f"(O - {self.pole:.3g})/{self.scale:.3g}"
        return {0: f"arsinh({u})", 1: f"ln({u})", -1: f"-ln(-{u})"}[self.side]


def coordinates_of(found: list[FloatArray]) -> list[OperatorCoordinate]:
    """The coordinates that are tried for frames of these states."""
    narrow = min(found, key=np.std)
    low, high = min(o.min() for o in found), max(o.max() for o in found)
    width = max(float(narrow.std()), 1e-6 * (high - low))
    return [OperatorCoordinate(0, float(np.median(narrow)), s * width) for s in STRETCHES] + [
        OperatorCoordinate(side, edge - side * e * width, width)
        for side, edge in ((1, float(low)), (-1, float(high)))
        for e in EDGES
    ]


@dataclass(frozen=True)
class _Model:
    """One coordinate: the curve's basis on nodes, and the states in it."""

    operator: FloatArray  # O at the nodes
    basis: FloatArray  # [n_nodes, N_COEFS]
    means: FloatArray  # [n_states, N_COEFS], of the basis over the frames
    z: list[FloatArray]
    nodes: FloatArray
    wide: float  # lambda of the widest state: the curve is that of its ln p
    log_jacobian: float  # of the frames' density, O instead of z

    def log_z(self, c: FloatArray, lam: float) -> tuple[float, FloatArray]:
        """ln Z_lam up to the node spacing, and the probabilities of the nodes."""
        a = self.basis @ c - (lam - self.wide) * self.operator
        top = a.max()
        w = np.exp(a - top)
        return float(top + np.log(w.sum())), w / w.sum()


def _model(found: list[FloatArray], wide: float, n: FloatArray, coordinate: OperatorCoordinate) -> _Model:
    z = [coordinate.z(o) for o in found]
    low, high = min(v.min() for v in z), max(v.max() for v in z)
    low, high = low - 0.03 * (high - low), high + 0.03 * (high - low)
    spacing = (high - low) / (N_COEFS - 3)
    knots = low + spacing * (np.arange(N_COEFS + 4) - 3)
    nodes = np.linspace(low, high, N_NODES)

    def design(v: FloatArray) -> Any:
        inside = np.clip(v, knots[3], np.nextafter(knots[N_COEFS], -np.inf))
        return BSpline.design_matrix(inside, knots, 3)

    jacobian = [(coordinate.log_slope(v) - np.log(nodes[1] - nodes[0])).mean() for v in z]
    return _Model(
        operator=coordinate.operator(nodes),
        basis=np.asarray(design(nodes).toarray()),
        means=np.stack([np.asarray(design(v).mean(axis=0)).ravel() for v in z]),
        z=z,
        nodes=nodes,
        wide=wide,
        log_jacobian=float(n @ jacobian),
    )


Value = Callable[[FloatArray], float]
Slopes = Callable[[FloatArray], tuple[FloatArray, FloatArray]]


def maximise_concave(
    value: Value, slopes: Slopes, c: FloatArray, *, tolerance: float = 1e-9
) -> tuple[FloatArray, float, FloatArray]:
    """Maximum of a strictly concave function by damped Newton steps.

    Parameters
    ----------
    value : callable
        Of the coefficients.
    slopes : callable
        Gradient, and minus the Hessian.
    c : numpy.ndarray
        Where to start.
    tolerance : float
        Gain of a step below which it was the last.

    Returns
    -------
    c, value, hessian
        Of the maximum; the Hessian of minus the function.

    Raises
    ------
    ConvergenceError
        If 300 steps do not find it.
    """
    now, damping = value(c), 1e-6
    gradient, hessian = slopes(c)
    for _ in range(300):
        step = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), gradient)
        new = value(c + step)
        if math.isfinite(new) and new >= now - 1e-10 * abs(now):
            gain = float(gradient @ step)
            c, now, damping = c + step, new, max(0.1 * damping, 1e-12)
            gradient, hessian = slopes(c)
            if gain < tolerance:
                return c, now, hessian
        else:
            damping *= 10.0
        if damping > 1e14:
            break
    raise ConvergenceError(
        "density of the operator: expected the posterior's mode within 300 steps, found none; look at the "
        "histograms of the operator for single frames far outside."
    )


def _maximise(
    model: _Model, lam: FloatArray, n: FloatArray, prior: FloatArray, c: FloatArray
) -> tuple[FloatArray, float, FloatArray]:
    """Mode of the posterior (it is log-concave), its log and the Hessian."""

    def value(at: FloatArray) -> float:
        out = -0.5 * at @ prior @ at
        for one, weight, mean in zip(lam, n, model.means, strict=True):
            out += weight * (mean @ at - model.log_z(at, one)[0])
        return float(out)

    def slopes(at: FloatArray) -> tuple[FloatArray, FloatArray]:
        gradient, hessian = -prior @ at, prior.copy()
        for one, weight, mean in zip(lam, n, model.means, strict=True):
            p = model.log_z(at, one)[1]
            expected = p @ model.basis
            gradient = gradient + weight * (mean - expected)
            hessian += weight * ((model.basis.T * p) @ model.basis - np.outer(expected, expected))
        return gradient, hessian

    return maximise_concave(value, slopes, c)


def _chi2(model: _Model, c: FloatArray, lam: float, z: FloatArray, g: float) -> float:
    """Chi^2 per degree of freedom of frames in bins of equal probability."""
    p = model.log_z(c, lam)[1]
    edges = np.interp(
        np.arange(1, N_BINS) / N_BINS, np.cumsum(p), model.nodes + 0.5 * np.diff(model.nodes)[0]
    )
    counts = np.bincount(np.searchsorted(edges, z), minlength=N_BINS)
    expected = len(z) / N_BINS
    return float(((counts - expected) ** 2 / expected).sum() / g / (N_BINS - 1))


def fit_operator_density(
    operators: Sequence[Any],
    lams: Sequence[float] = (0.0, 1.0),
    *,
    inefficiency: Sequence[float] | None = None,
    n_lam: int = 51,
) -> OperatorDensity:
    r"""Delta f by maximum a posteriori of one density of O for all sampled states.

    .. math:: L(c) = \sum_k n_k \left[\langle b \rangle_k \cdot c - (\lambda_k - \lambda_w) \langle O\rangle_k
              - \ln Z_{\lambda_k}(c)\right] - \tfrac{\mu}{2} |\Delta^3 c|^2, \qquad
              Z_\lambda(c) = \int e^{b(z)\cdot c - (\lambda - \lambda_w) O(z)} dz

    .. math:: f(\lambda) = -\ln Z_\lambda + \ln Z_0, \qquad
              \mathrm{var} f = g^T H^{-1} g, \quad g = \partial f/\partial c, \quad H = -\partial^2 L

    with cubic B-splines b of z(O), and the curve ln p of the widest state w. L is concave. Coordinates z
    and roughnesses mu are averaged with the evidence ``L + ln|prior|/2 - ln|H|/2``:
    z = arsinh((O - m)/(s d)), m and d the median and standard deviation of the narrowest state, and
    logarithms with their pole just outside the frames.

    =============  ==============================
    symbol         code
    =============  ==============================
    O              ``operators[k]``
    lambda_k       ``lams[k]``
    n_k            frames over ``inefficiency``
    z, mu          ``STRETCHES``, ``EDGES``, ``ROUGHNESS``
    f(lambda)      ``OperatorDensity.f_lam``
    =============  ==============================

    Parameters
    ----------
    operators : sequence of array_like, each of shape (n_frames,)
        O = u_1 - u_0 on the frames of every state [kT], in time order.
    lams : sequence of float
        Lambda of every state; they increase within [0, 1]. Two end states, or any windows between.
    inefficiency : sequence of float, optional
        Statistical inefficiencies g >= 1; pymbar's of O by default.
    n_lam : int
        Points of the curve f(lambda).

    Returns
    -------
    OperatorDensity

    Raises
    ------
    InputError
        For values that are not finite, lambdas that do not increase, or fewer than ``MIN_FRAMES``
        independent frames in a state.
    ConvergenceError
        If no mode of the posterior is found in any coordinate.

    Notes
    -----
    Assumed and not checked: linear mixing, equilibrium in every state, ln p_0 smooth in z where no
    state was sampled. An operator with gaps (a two-state O) breaks the last one. ``chi2`` tests that
    the states are tilts of one density where they were sampled. Deterministic.

    References
    ----------
    C. H. Bennett, Efficient estimation of free energy differences from Monte Carlo data, 1976,
    doi:10.1016/0021-9991(76)90078-4 (its curve fitting is the ancestor).
    I. J. Good and R. A. Gaskins, Nonparametric roughness penalties for probability densities, 1971,
    doi:10.1093/biomet/58.2.255.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> o_0, o_1 = rng.gamma(2.0, 20.0, 1000), rng.gamma(2.0, 20.0 / 21.0, 1000)
    >>> found = fit_operator_density([o_0, o_1], inefficiency=[1, 1])
    >>> abs(found.delta_f - 2 * np.log(21)) < 3 * found.d_delta_f < 0.8
    True
    """
    found, lam, g = _states(operators, lams, inefficiency)
    n = np.array([len(o) / one for o, one in zip(found, g, strict=True)])
    everything = np.concatenate(found)
    spread = float(np.ptp(everything))
    wide = float(lam[int(np.argmax([o.std() for o in found]))])
    grid = np.linspace(0.0, 1.0, n_lam) ** 3  # fine where O changes fast: at the wide end
    if wide > 0.5:
        grid = 1.0 - grid[::-1]
    if spread <= 1e-10 * max(1.0, float(np.abs(everything).max())):
        o = float(everything.mean())
        return OperatorDensity(
            o, 0.0, 0.0, grid, grid * o, np.zeros(n_lam), np.full(n_lam, o), np.zeros(n_lam),
            0.5, np.ones(len(lam)), tuple(len(v) for v in found), g, "O", ROUGHNESS[-1], {"O": 1.0},
        )  # fmt: skip
    third = np.diff(np.eye(N_COEFS), 3, axis=0)
    rough = third.T @ third
    rows = []
    unsolved: ConvergenceError | None = None
    for coordinate in coordinates_of(found):
        model = _model(found, wide, n, coordinate)
        z = model.z[0]
        parabola = -0.5 * ((model.nodes - z.mean()) / z.std()) ** 2 if np.ptp(z) > 0 else 0 * model.nodes
        c = np.linalg.lstsq(model.basis, parabola, rcond=None)[0]
        best = -math.inf
        for mu in ROUGHNESS[::-1]:
            prior = mu * rough + WEAK * np.eye(N_COEFS)
            try:
                c, value, hessian = _maximise(model, lam, n, prior, c)
            except ConvergenceError as err:
                unsolved = err
                break  # this coordinate is no place for these frames
            tilt = float(n @ ((lam - wide) * [o.mean() for o in found]))
            evidence = value + model.log_jacobian - tilt
            evidence += 0.5 * np.linalg.slogdet(prior)[1] - 0.5 * np.linalg.slogdet(hessian)[1]
            best = max(best, evidence)
            if evidence < best - NEGLIGIBLE:
                break  # rougher curves only lose more
            log_z_0, p_0 = model.log_z(c, 0.0)
            f, slope, mean, mean_slope = [], [], [], []
            for one in grid:
                log_z, p = model.log_z(c, one)
                f.append(log_z_0 - log_z)
                slope.append((p_0 - p) @ model.basis)
                mean.append(p @ model.operator)
                mean_slope.append((p * (model.operator - mean[-1])) @ model.basis)
            variance, mean_variance = (
                np.einsum("lc,cl->l", g_, np.linalg.solve(hessian, np.transpose(g_))).clip(min=0.0)
                for g_ in (slope, mean_slope)
            )
            chi2 = [_chi2(model, c, a, b, d) for a, b, d in zip(lam, model.z, g, strict=True)]
            rows.append((evidence, f, variance, mean, mean_variance, chi2, coordinate, mu))
    if not rows:
        assert unsolved is not None
        raise unsolved
    weight = np.exp(np.array([r[0] for r in rows]) - max(r[0] for r in rows))
    weight /= weight.sum()
    f_all, var_all, o_all, var_o_all, chi2_all = (np.array([r[i] for r in rows]) for i in range(1, 6))
    f_lam = weight @ f_all
    between = weight @ (f_all - f_lam) ** 2
    o_lam = weight @ o_all
    d_o_lam = np.sqrt(weight @ (var_o_all + (o_all - o_lam) ** 2))
    d_f_lam = np.sqrt(weight @ var_all + between)
    first = rows[int(weight.argmax())]
    weights: dict[str, float] = {}
    for one, row in zip(weight, rows, strict=True):
        weights[str(row[6])] = weights.get(str(row[6]), 0.0) + float(one)
    return OperatorDensity(
        delta_f=float(f_lam[-1]),
        d_delta_f=float(d_f_lam[-1]),
        d_models=float(np.sqrt(between[-1])),
        lam=grid,
        f_lam=f_lam,
        d_f_lam=d_f_lam,
        o_lam=o_lam,
        d_o_lam=d_o_lam,
        next_lam=float(grid[int((np.abs(grid - wide) * d_o_lam).argmax())]),
        chi2=weight @ chi2_all,
        n_frames=tuple(len(v) for v in found),
        inefficiency=g,
        coordinate=str(first[6]),
        roughness=float(first[7]),
        coordinate_weights=weights,
    )
