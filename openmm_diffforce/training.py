r"""Closed-form fits: score matching for the base action, regression for the noised operator.

Base action, linear in its coefficients c, with features phi:

.. math::

    J_0(c) = \tfrac12 E|\nabla S|^2 - E[\nabla^2 S] \quad (t = 0,\ \text{implicit}), \qquad
    J_t(c) = \tfrac12 E|\nabla S(y)|^2 - E[\nabla S(y) \cdot (y - x)/\sigma^2]
    \quad (t > 0,\ \text{denoising})

Cartesian gradients drown soft torsions in the forces of stiff bonds, so that at t = 0 the same
identity along rigid rotations about the rotatable bonds k is added:

.. math::

    J_\tau(c) = \sum_k E\big[\tfrac12 (v_k \cdot \nabla S)^2 - (v_k \cdot \nabla)^2 S\big],
    \qquad v_k = u_k \times (x - x_k)\ \text{on one side of the bond}

(v_k turns one side about the bond's direction u_k; it has no divergence, and it moves no bond,
no angle and no improper.) The two are added with the weight that gives both the same trace on
the features that rotations move.

All are quadratic forms ``c.A c/2 - b.c``, e.g. ``A = E[grad phi . grad phi]``. The noised
operator is the least-squares projection of O(x) on pair features of the noised frame,
``O_{t,lam}(y) = E_lam[O(x) | y]``, at lam = 0 and lam = 1.

The strength of the smoothness penalty is the only hyperparameter; it is chosen per noise level
on held-out frames by the fit's own loss, never by a reference.

References
----------
A. Hyvarinen, Estimation of non-normalized statistical models by score matching, JMLR 6 (2005).
P. Vincent, A connection between score matching and denoising autoencoders, Neural Comput. 23
(2011), doi:10.1162/NECO_a_00142.
arXiv:2606.30687 (the noised operator as a conditional mean).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import torch

from . import ops
from .errors import ConvergenceError, InputError
from .models.graph import (
    InternalCoordinates,
    MolecularGraph,
    internal_coordinates,
    operator_pairs,
    rotatable_bonds,
)
from .models.physics import (
    BaseTables,
    OperatorTables,
    PhysicalModel,
    check_noise_range,
    internal_values,
)
from .ops import DISTANCE, TORSION
from .schedule import NoiseSchedule

DEFAULT_SIGMA_KNOTS = (0.0, 0.005, 0.01, 0.02, 0.05)
"""Noise levels at which the coefficients are fitted [nm]."""

N_COEFS = {
    "bond": 6,
    "angle": 6,
    "torsion": 14,
    "improper": 12,
    "1-3": 6,
    "1-4": 10,
    "nonbonded": 14,
}
"""Spline coefficients of the base action per class, by role of the coordinate.

Stiff coordinates cross the knots of their splines all the time, and each crossing (a jump of the third
derivative) costs a Verlet step energy: few knots conserve it better, and fit as well.
"""

OPERATOR_SPACING = 0.02
"""Knot spacing of the pair operator's tables [nm]."""

WALL_KT = 4.0
"""Least stiffness of the walls outside the data, in kT per squared knot spacing."""

WALL_CELLS = 2
"""Knot spacings beyond the data over which the curvature of a spline passes over to its wall's."""

BASE_ROUGHNESS = 3
"""Order of the differences that the base action's penalty squares: 3 leaves harmonic terms free."""

OPERATOR_WALL = 1e4
"""Least curvature of a pair's operator below the closest distance that its frames showed [kT/nm^2]."""

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Smoothness penalties tried for the base action, relative to the diagonal of the normal matrix."""

OPERATOR_PENALTIES = (1e-6, 1e-5, *PENALTIES)
"""The same for the operator, which has no noise at t = 0 and needs less smoothing."""

OPERATOR_TOLERANCE = 10.0
"""Distance of O from the values of end state 1 beyond which its error counts relative to it [kT]."""


@dataclass(frozen=True)
class FitResult:
    """A fitted table and what the fit saw of itself.

    Attributes
    ----------
    tables : BaseTables or OperatorTables
    record : dict
        Per noise level: penalty, held-out loss or R^2, frames, and CPU seconds; JSON-ready.
    """

    tables: Any
    record: dict[str, Any]


def check_frames(x: Any, n_atoms: int, *, name: str = "x") -> np.ndarray:
    """Frames as a float64 array [n_frames, n_atoms, 3] nm, or one clear error.

    Raises
    ------
    InputError
        If the shape is another, there are no frames, or a coordinate is not finite.
    """
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 3 or x.shape[1:] != (n_atoms, 3) or len(x) == 0:
        raise InputError(
            f"{name}: expected coordinates of shape [n_frames >= 1, {n_atoms}, 3] in nm, "
            f"found {list(x.shape)}."
        )
    if not np.isfinite(x).all():
        bad = int(np.flatnonzero(~np.isfinite(x).all(axis=(1, 2)))[0])
        raise InputError(f"{name}: frame {bad} has a coordinate that is not finite; remove it.")
    return x


def check_ends(
    x_0: Any, o_0: Any, x_1: Any, o_1: Any, n_atoms: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Frames [n_frames, n_atoms, 3] nm and operator values [n_frames] kT of both ends, checked.

    Raises
    ------
    InputError
        If frames are unusable, or the values are not one finite number for each frame.
    """
    frames, values = [], []
    for end, (x, o) in enumerate(((x_0, o_0), (x_1, o_1))):
        x = check_frames(x, n_atoms, name=f"x_{end}")
        o = np.asarray(o, dtype=float)
        if o.shape != (len(x),) or not np.isfinite(o).all():
            raise InputError(
                f"o_{end}: expected {len(x)} finite operator values [kT], one per frame, "
                f"found shape {list(o.shape)}."
            )
        frames.append(x)
        values.append(o)
    return frames, values


def _check_knots(sigma_knots: Sequence[float]) -> np.ndarray:
    knots = np.asarray(sigma_knots, dtype=float)
    if (
        knots.ndim != 1
        or len(knots) < 2
        or knots[0] != 0
        or not np.isfinite(knots).all()
        or (np.diff(knots) <= 0).any()
    ):
        raise InputError(
            f"sigma_knots: expected increasing noise levels [nm] that start at 0, found {knots}."
        )
    return knots


def _check_draws(n_draws: int) -> None:
    if not isinstance(n_draws, int | np.integer) or n_draws < 1:
        raise InputError(f"n_draws: expected a whole number >= 1, found {n_draws!r}.")


def _roughness(n: int, order: int = 2) -> np.ndarray:
    """Squared differences of n coefficients, as a matrix [n, n]."""
    d = np.diff(np.eye(n), order, axis=0)
    return d.T @ d


def _periodic_roughness(n: int) -> np.ndarray:
    """Squared second differences of n coefficients on a circle, as a matrix [n, n]."""
    d = np.roll(np.eye(n), 1, 1) - 2 * np.eye(n) + np.roll(np.eye(n), -1, 1)
    return d.T @ d


def _best_penalty(
    a_train: np.ndarray, b_train: np.ndarray, a_test: np.ndarray, b_test: np.ndarray,
    penalty: np.ndarray, block: np.ndarray, holdout: float, centre: np.ndarray | None = None,
    strengths: Sequence[float] = PENALTIES,
) -> tuple[np.ndarray, dict[str, float]]:  # fmt: skip
    """Choose the penalty on held-out data, then refit on everything.

    The matrices are means over frames, ``holdout`` the fraction of frames held out. Minimises
    ``c.A c/2 - b.c + mu/2 (c - centre).P (c - centre)``; ``block`` names the class of every
    coefficient. Returns the coefficients, and what was chosen.
    """
    diagonal = np.diag(a_train)
    if not np.isfinite(diagonal).all() or diagonal.max() <= 0:
        raise ConvergenceError("fit: the normal matrix is empty or not finite; are the frames all alike?")
    # Each class is smoothed in proportion to the stiffness of its own features.
    own = (np.bincount(block, diagonal) / np.bincount(block))[block]
    scaled = np.maximum(own, 1e-12 * own.max())[:, None] * penalty
    offset = np.zeros(len(b_train)) if centre is None else centre

    def solve(a: np.ndarray, b: np.ndarray, mu: float) -> np.ndarray:
        try:
            factor = scipy.linalg.cho_factor(a + mu * scaled, lower=True, check_finite=False)
        except scipy.linalg.LinAlgError as err:
            raise ConvergenceError("fit: the normal equations are singular; give more frames.") from err
        right = b + mu * (scaled @ offset)
        return np.asarray(scipy.linalg.cho_solve(factor, right, check_finite=False))

    best = (np.inf, 0.0)
    for mu in strengths:
        c = solve(a_train, b_train, mu)
        loss = float(0.5 * c @ a_test @ c - b_test @ c)
        if loss < best[0]:
            best = (loss, mu)
    loss, mu = best
    if not np.isfinite(loss):
        raise ConvergenceError("fit: no penalty gave a finite held-out loss; check the frames.")
    a_all = (1 - holdout) * a_train + holdout * a_test
    b_all = (1 - holdout) * b_train + holdout * b_test
    return solve(a_all, b_all, mu), {"penalty": mu, "held_out_loss": loss}


def _blocks(n_frames: int, holdout: float, *, spread: bool = False) -> np.ndarray:
    """True for held-out frames: the last contiguous fraction, so that time correlation stays out.

    With ``spread`` evenly spaced frames instead.
    """
    if not 0 < holdout < 1:
        raise InputError(f"holdout: expected a fraction of the frames in (0, 1), found {holdout!r}.")
    test = np.zeros(n_frames, dtype=bool)
    if spread:
        test[np.arange(n_frames) * holdout % 1 >= 1 - holdout - 1e-9] = True
    else:
        test[int(np.ceil(n_frames * (1 - holdout))):] = True  # fmt: skip
    if test.all() or not test.any():
        raise InputError(f"fit: expected at least 5 frames, found {n_frames}.")
    return test


def fit_base_action(
    x: Any,
    graph: MolecularGraph,
    *,
    sigma_knots: Sequence[float] = DEFAULT_SIGMA_KNOTS,
    generator: np.random.Generator,
    n_draws: int = 2,
    holdout: float = 0.2,
    other_end: tuple[Any, Any] | None = None,
) -> FitResult:
    """Fit the base action to equilibrium snapshots, without energies or forces.

    Implicit score matching at t = 0 (the Laplacian is the kernel's), in Cartesian coordinates and
    along rigid rotations; denoising score matching at every other noise level, with antithetic
    noise.

    Parameters
    ----------
    x : float array [n_frames, n_atoms, 3]
        Equilibrium frames of the base state [nm].
    graph : MolecularGraph
    sigma_knots : sequence of float
        Noise levels [nm], increasing from 0.
    generator : numpy.random.Generator
    n_draws : int
        Antithetic pairs of noise per frame.
    holdout : float
        Contiguous fraction of frames on which the penalty is chosen.
    other_end : (x_1, grad_o_1), optional
        Frames of end state 1 and the gradient of the (learned, clean) operator on them [1/nm]:
        their score is -grad(S_0 + O), so they teach S_0 at t = 0 as well.

    Returns
    -------
    FitResult
        With :class:`BaseTables`.

    Raises
    ------
    InputError
        If frames, knots or fractions are unusable.
    ConvergenceError
        If the normal equations cannot be solved.

    Notes
    -----
    Deterministic for a given generator state. Frames are assumed to be drawn at equilibrium and
    unconstrained; neither is checked here (``systems.py`` refuses constraints).
    """
    x = check_frames(x, graph.n_atoms)
    coordinates = internal_coordinates(graph)
    knots = _check_knots(sigma_knots)
    _check_draws(n_draws)
    test = _blocks(len(x), holdout)
    started = time.process_time()
    n_coefs = np.array([N_COEFS[r] for r in coordinates.role])
    offsets = np.concatenate([[0], np.cumsum(n_coefs)]).astype(np.int64)
    periodic = coordinates.kind == TORSION
    penalty = scipy.linalg.block_diag(
        *[
            _periodic_roughness(n) if p else _roughness(n, BASE_ROUGHNESS)
            for n, p in zip(n_coefs, periodic, strict=True)
        ]
    ) + 1e-3 * np.eye(offsets[-1])  # the ridge fixes each spline's free constant
    block = np.repeat(np.arange(coordinates.n_classes), n_coefs)
    grid = np.empty((len(knots), coordinates.n_classes, 3))
    coef = np.empty((len(knots), offsets[-1]))
    levels = []
    for m, sigma in enumerate(knots):
        if sigma == 0:
            y, target, held = x, np.zeros_like(x), test
            if other_end is not None:
                # E_1[grad phi . grad(S_0 + O)] = E_1[lap phi]: O's part moves to the right side.
                x_1 = check_frames(other_end[0], x.shape[1], name="other_end")
                grad_o = check_frames(other_end[1], x.shape[1], name="other_end gradient")
                if len(grad_o) != len(x_1):
                    raise InputError(
                        f"other_end gradient: expected one per frame ({len(x_1)}), found {len(grad_o)}."
                    )
                y = np.concatenate([x, x_1])
                target = np.concatenate([target, -grad_o])
                held = np.concatenate([test, _blocks(len(x_1), holdout)])
        else:
            noise = generator.standard_normal((n_draws, *x.shape))
            noise = np.concatenate([noise, -noise])
            y = (x + sigma * noise).reshape(-1, *x.shape[1:])
            target = (noise / sigma).reshape(y.shape)
            held = np.tile(test, 2 * n_draws)
        grid[m] = _class_grid(y, coordinates, n_coefs)
        sums = []
        for part in (~held, held):
            a, b, lap = ops.internal_normal(
                torch.as_tensor(y[part]), torch.as_tensor(target[part]),
                atoms=torch.as_tensor(coordinates.atoms), cls=torch.as_tensor(coordinates.cls),
                kind=torch.as_tensor(coordinates.kind), grid=torch.as_tensor(grid[m]),
                offsets=torch.as_tensor(offsets),
            )  # fmt: skip
            right = (b + lap if sigma == 0 else b).numpy()
            n = float(part.sum())
            sums.append((a.numpy() / n, right / n))
        if sigma == 0:
            sums = _with_rotations(sums, y, target, held, coordinates, graph, grid[m], offsets)
        coef[m], chosen = _best_penalty(*sums[0], *sums[1], penalty, block, holdout)
        levels.append({"sigma_nm": float(sigma), "n_frames": len(y), **chosen})
    tables = _with_walls(BaseTables(coordinates, knots, grid, offsets, coef))
    return FitResult(tables, {"n_coefs": int(offsets[-1]), "levels": levels,
                              "cpu_seconds": time.process_time() - started})  # fmt: skip


def _with_rotations(
    sums: list[tuple[np.ndarray, np.ndarray]], y: np.ndarray, target: np.ndarray, held: np.ndarray,
    coordinates: InternalCoordinates, graph: MolecularGraph, grid: np.ndarray, offsets: np.ndarray,
) -> list[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Add the identity along rotations to the normal equations of train and held-out frames."""
    if len(rotatable_bonds(graph)[0]) == 0:
        return sums
    turned = [_rotation_normal(y[part], target[part], coordinates, graph, grid, offsets)
              for part in (~held, held)]  # fmt: skip
    moved = np.diag(turned[0][0]) > 0
    weight = np.diag(sums[0][0])[moved].sum() / np.diag(turned[0][0]).sum()
    return [(a + weight * a_k, b + weight * b_k)
            for (a, b), (a_k, b_k) in zip(sums, turned, strict=True)]  # fmt: skip


def _rotation_normal(
    x: np.ndarray, target: np.ndarray, coordinates: InternalCoordinates, graph: MolecularGraph,
    grid: np.ndarray, offsets: np.ndarray, chunk: int = 500,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Means over frames of ``A = sum_k phi' phi'`` and ``b = sum_k phi'' + (v_k . target) phi'``.

    Primes are derivatives of the features along the rotation about bond k. ``target`` stands in
    for a known part of the score, as in :func:`ops.internal_normal`.
    """
    n_coefs = int(offsets[-1])
    matrix, vector = np.zeros((n_coefs, n_coefs)), np.zeros(n_coefs)
    torsion = np.array(coordinates.role)[coordinates.cls] == "torsion"
    i, j = coordinates.atoms[:, 0], coordinates.atoms[:, 1]
    distance = coordinates.kind[coordinates.cls] == DISTANCE
    for (fixed, axis_end), moved in zip(*rotatable_bonds(graph), strict=True):
        on_axis = np.isin(np.arange(graph.n_atoms), (fixed, axis_end))
        # distances between an atom that turns and one that does not, neither on the axis
        pairs = np.flatnonzero(distance & (moved[i] != moved[j]) & ~on_axis[i] & ~on_axis[j])
        turning = np.where(moved[i[pairs]], i[pairs], j[pairs])
        resting = np.where(moved[i[pairs]], j[pairs], i[pairs])
        middle = np.sort(coordinates.atoms[:, 1:3], axis=1) == sorted((fixed, axis_end))
        twists = np.flatnonzero(torsion & middle.all(axis=1))
        used = np.unique(coordinates.cls[np.concatenate([pairs, twists])])
        columns = np.concatenate([np.arange(offsets[c], offsets[c + 1]) for c in used])
        place = np.full(n_coefs, -1)
        place[columns] = np.arange(len(columns))
        for start in range(0, len(x), chunk):
            y, aim = x[start : start + chunk], target[start : start + chunk]
            axis = y[:, axis_end] - y[:, fixed]
            axis = (axis / np.linalg.norm(axis, axis=1, keepdims=True))[:, None]
            velocity = np.cross(axis, y - y[:, [axis_end]]) * moved[:, None]
            d = y[:, turning] - y[:, resting]
            v = velocity[:, turning]
            r = np.linalg.norm(d, axis=-1)
            first = (d * v).sum(-1) / r
            second = ((v * v).sum(-1) + (d * np.cross(axis, v)).sum(-1) - first**2) / r
            values = internal_values(y, coordinates, select=twists)
            index, slope, curve = _spline_derivatives(
                np.concatenate([r, values], axis=1),
                coordinates.cls[np.concatenate([pairs, twists])], coordinates.kind, grid, offsets,
            )  # fmt: skip
            one = np.ones_like(values)  # every torsion about the bond turns with it
            first = np.concatenate([first, one], axis=1)[..., None]
            second = np.concatenate([second, 0 * one], axis=1)[..., None]
            where = place[index]
            rows = np.arange(len(y))[:, None, None] * len(columns)
            design = np.bincount(
                (rows + where).ravel(), (slope * first).ravel(), len(y) * len(columns)
            ).reshape(len(y), -1)
            known = (velocity * aim).sum((1, 2))
            matrix[np.ix_(columns, columns)] += design.T @ design
            vector[columns] += design.T @ known + np.bincount(
                where.ravel(), (curve * first**2 + slope * second).ravel(), len(columns)
            )
    return matrix / len(x), vector / len(x)


def _spline_derivatives(
    q: np.ndarray, cls: np.ndarray, kind: np.ndarray, grid: np.ndarray, offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns, first and second derivatives of the four splines at q, each [n_frames, n_q, 4]."""
    n = np.diff(offsets)[cls]
    lo, h = grid[cls, 0], grid[cls, 1]
    periodic = kind[cls] == TORSION
    u = (q - lo) / h
    cell = np.where(periodic, np.floor(u), np.clip(np.floor(u), 0, n - 4)).astype(int)
    w = u - cell  # the grid spans the data: nothing lies outside
    index = cell[..., None] + np.arange(4)
    index = offsets[:-1][cls][:, None] + np.where(periodic[:, None], index % n[:, None], index)
    slope = np.stack([-((1 - w) ** 2) / 2, (3 * w**2 - 4 * w) / 2,
                      (-3 * w**2 + 2 * w + 1) / 2, w**2 / 2], axis=-1)  # fmt: skip
    curve = np.stack([1 - w, 3 * w - 2, 1 - 3 * w, w], axis=-1)
    return index, slope / h[:, None], curve / (h * h)[:, None]


def _class_grid(y: np.ndarray, coordinates: InternalCoordinates, n_coefs: np.ndarray) -> np.ndarray:
    """(lo, spacing, no wall yet) of every class: the range of the data, or the circle."""
    q = internal_values(y, coordinates)
    out = np.empty((coordinates.n_classes, 3))
    for c in range(coordinates.n_classes):
        if coordinates.kind[c] == TORSION:
            out[c] = (-np.pi, 2 * np.pi / n_coefs[c], 0.0)
            continue
        values = q[:, coordinates.cls == c]
        lo, hi = float(values.min()), float(values.max())
        spacing = max(hi - lo, 1e-6) / (n_coefs[c] - 3)
        out[c] = (lo, spacing, 0.0)
    return out


def _with_walls(base: BaseTables) -> BaseTables:
    """Continue every spline beyond its data into a harmonic wall, twice continuously differentiable.

    The second difference of the coefficients is the spline's curvature at a knot, in kT per squared
    spacing. Over ``WALL_CELLS`` intervals it goes in equal steps from what the fit has at the edge to
    the wall's: the edge's own, but at least ``WALL_KT``. (A jump of the curvature costs Verlet dynamics
    energy at each crossing.)
    """
    periodic = base.coordinates.kind == TORSION
    n_coefs = np.diff(base.offsets) + np.where(periodic, 0, 2 * WALL_CELLS)
    offsets = np.concatenate([[0], np.cumsum(n_coefs)]).astype(np.int64)
    coef = np.empty((len(base.sigma_knots), offsets[-1]))
    grid = base.grid.copy()
    for m, row in enumerate(base.coef):
        for c, flat in enumerate(periodic):
            spline = row[base.offsets[c] : base.offsets[c + 1]]
            if not flat:
                wall = max(WALL_KT, *np.diff(spline, 2)[[0, -1]])
                below, above = (_ramp(side, wall) for side in (spline[::-1], spline))
                spline = np.concatenate([below[::-1], spline, above])
                spacing = grid[m, c, 1]
                grid[m, c] = (grid[m, c, 0] - WALL_CELLS * spacing, spacing, wall / spacing**2)
            coef[m, offsets[c] : offsets[c + 1]] = spline
    return BaseTables(base.coordinates, base.sigma_knots, grid, offsets, coef, WALL_CELLS)


def _ramp(spline: np.ndarray, wall: float) -> np.ndarray:
    """Coefficients [WALL_CELLS] that continue a spline beyond its last one."""
    edge = np.diff(spline[-3:], 2)[0]
    curvature = np.linspace(edge, wall, WALL_CELLS + 1)[1:]
    slope = spline[-1] - spline[-2] + np.cumsum(curvature)
    return np.asarray(spline[-1] + np.cumsum(slope))


def _guarded(spline: np.ndarray, unseen: int, spacing: float) -> np.ndarray:
    """Continue a pair's spline below the closest distance of its frames into a harmonic wall.

    The frames leave slopes of pairs that move together undetermined up to what cancels among them. At
    distances that no frame showed nothing cancels any more, and a slope downhill is a hole.
    """
    out = spline.copy()
    wall = OPERATOR_WALL * spacing**2
    for i in range(unseen - 1, -1, -1):
        edge, slope = np.diff(out[i + 1 : i + 4], 2)[0], out[i + 1] - out[i + 2]
        out[i] = out[i + 1] + slope + max(edge, wall)
    return out


def _pair_design(y: np.ndarray, tables: OperatorTables, first: np.ndarray, n_coefs: int) -> np.ndarray:
    """Features of the pair operator [n_frames, n_types * n_coefs]."""
    a_idx, b_idx = np.nonzero(tables.pair_type >= 0)
    types = tables.pair_type[a_idx, b_idx]
    r = np.linalg.norm(y[:, tables.sites[a_idx]] - y[:, tables.env[b_idx]], axis=-1)
    u = (r - first[types]) / tables.r_grid[types, 1]
    u = np.clip(u, 0.0, n_coefs - 3 - 1e-12)  # the grid spans the data; nothing is cut here
    cell = u.astype(int)
    w = u - cell
    basis = ((1 - w) ** 3 / 6, (3 * w**3 - 6 * w**2 + 4) / 6,
             (-3 * w**3 + 3 * w**2 + 3 * w + 1) / 6, w**3 / 6)  # fmt: skip
    design = np.zeros((len(y), len(tables.table) * n_coefs))
    rows = np.arange(len(y))[:, None]
    for k, value in enumerate(basis):
        np.add.at(design, (rows, types * n_coefs + cell + k), value)
    return design


def fit_operator(
    x_0: Any, o_0: Any, x_1: Any, o_1: Any,
    graph: MolecularGraph, sites: Sequence[int],
    *,
    sigma_knots: Sequence[float] = DEFAULT_SIGMA_KNOTS,
    generator: np.random.Generator,
    n_draws: int = 2,
    holdout: float = 0.2,
) -> FitResult:  # fmt: skip
    r"""Fit the noised pair operator O_{t,lam}(y) = E_lam[O(x) | y] at lam = 0 and lam = 1.

    At t = 0 the operator is a function of x and does not depend on lambda (linear mixing): both ends
    share one fit, in which a frame weighs

    .. math:: w = 1 / [1 + (d/\tau)^2]

    with d the distance of its O from the central 90 % of O in end state 1 and tau
    ``OPERATOR_TOLERANCE``. A frame that clashes in state 1, with O above it by d, is met at
    lambda < 1/d only, where an error of d/tau is harmless; without weights a few such frames decide
    the whole fit, and its errors open holes in state 1. At t > 0 each end is fitted on its own noised
    frames, shrunk towards the level before, and every frame weighs alike: the target is a mean over x.

    Parameters
    ----------
    x_0, x_1 : float arrays [n_frames, n_atoms, 3]
        Frames of both end states [nm].
    o_0, o_1 : float arrays [n_frames]
        O(x) = beta (U_1 - U_0) on the same frames [kT].
    graph : MolecularGraph
    sites : sequence of int
        The perturbed atoms.
    sigma_knots, generator, n_draws, holdout
        As in :func:`fit_base_action`.

    Returns
    -------
    FitResult
        With :class:`OperatorTables`; the record has the held-out R^2 of O per level and end,
        weighted as the fit.

    Raises
    ------
    InputError
        If frames and operator values do not fit each other.
    ConvergenceError
        If the normal equations cannot be solved.
    """
    knots = _check_knots(sigma_knots)
    _check_draws(n_draws)
    frames, values = check_ends(x_0, o_0, x_1, o_1, graph.n_atoms)
    started = time.process_time()
    env, pair_type, labels = operator_pairs(graph, sites)
    a_idx, b_idx = np.nonzero(pair_type >= 0)
    types = pair_type[a_idx, b_idx]
    site_idx = np.asarray(sites, dtype=np.int64)

    noised = []  # per level and end: frames and which row each came from
    for sigma in knots:
        for x in frames:
            if sigma == 0:
                noised.append((x, np.arange(len(x))))
            else:
                noise = generator.standard_normal((n_draws, *x.shape))
                noise = np.concatenate([noise, -noise])
                noised.append(((x + sigma * noise).reshape(-1, *x.shape[1:]),
                               np.tile(np.arange(len(x)), 2 * n_draws)))  # fmt: skip
    closest = np.full((len(noised), len(labels)), np.inf)
    high = np.zeros(len(labels))
    for i, (y, _) in enumerate(noised):
        r = np.linalg.norm(y[:, site_idx[a_idx]] - y[:, env[b_idx]], axis=-1)
        np.minimum.at(closest[i], types, r.min(axis=0))
        np.maximum.at(high, types, r.max(axis=0))
    low = closest.min(axis=0)
    n_coefs = int(np.ceil((high - low).max() / OPERATOR_SPACING)) + 3
    spacing = (high - low) / (n_coefs - 3)
    r_switch = float(1.25 * high.max())
    table = np.zeros((len(labels), 2, len(knots), n_coefs))
    tables = OperatorTables(
        site_idx, env, pair_type, table, np.stack([low, spacing], axis=1),
        np.array([0.0, 1.0]), knots, r_switch, r_switch + 0.2,
    )  # fmt: skip
    penalty = scipy.linalg.block_diag(*[_roughness(n_coefs)] * len(labels))
    penalty += 1e-3 * np.eye(len(penalty))
    block = np.repeat(np.arange(len(labels)), n_coefs)

    typical = np.quantile(values[1], (0.05, 0.95))

    def weights(o: np.ndarray) -> np.ndarray:
        distance = np.maximum(np.maximum(typical[0] - o, o - typical[1]), 0.0)
        return np.asarray(1.0 / (1.0 + (distance / OPERATOR_TOLERANCE) ** 2))

    def normal(level: int, end: int) -> list[tuple[np.ndarray, np.ndarray, float, float, float]]:
        y, row = noised[2 * level + end]
        # O has no noise at t = 0, and rare contacts belong on both sides: frames spread over the run.
        test = _blocks(len(frames[end]), holdout, spread=level == 0)[row]
        out = []
        for part in (~test, test):
            a = np.zeros((len(penalty), len(penalty)))
            b = np.zeros(len(penalty))
            target = values[end][row][part]
            weight = weights(target) if level == 0 else np.ones(len(target))
            y_part = y[part]
            for chunk in range(0, len(y_part), 4000):
                some = slice(chunk, chunk + 4000)
                design = _pair_design(y_part[some], tables, low, n_coefs)
                a += design.T @ (weight[some, None] * design)
                b += design.T @ (weight[some] * target[some])
            mass, first, second = (float((weight * target**power).sum()) for power in range(3))
            out.append((a, b, mass, first, second))
        return out

    levels = []
    shape = (len(labels), n_coefs)
    fitted = np.zeros_like(table)
    for m, sigma in enumerate(knots):
        ends: list[Any] = [normal(m, 0), normal(m, 1)]
        if m == 0:  # one operator for both ends
            ends = [[[p + q for p, q in zip(*parts, strict=True)] for parts in zip(*ends, strict=True)]]
        record = []
        for end, (train, held) in enumerate(ends):
            centre = None if m == 0 else fitted[:, end, m - 1].ravel()
            n_train, n_test = train[2], held[2]
            c, chosen = _best_penalty(
                train[0] / n_train, train[1] / n_train, held[0] / n_test, held[1] / n_test,
                penalty, block, holdout, centre, OPERATOR_PENALTIES,
            )  # fmt: skip
            for lam in (0, 1) if m == 0 else (end,):
                fitted[:, lam, m] = c.reshape(shape)
            # held-out loss = (residual - |O|^2)/2 per frame, so that R^2 follows from it
            square = held[4] / n_test
            residual = 2 * chosen["held_out_loss"] + square
            chosen["held_out_r2"] = 1 - residual / (square - (held[3] / n_test) ** 2)
            record.append(chosen)
        levels.append({"sigma_nm": float(sigma), "ends": record})
    for m in range(len(knots)):
        for lam in (0, 1):
            seen = closest[2 * m : 2 * m + 2].min(axis=0) if m == 0 else closest[2 * m + lam]
            cells = np.floor((seen - low) / spacing).astype(int)
            for k, unseen in enumerate(cells):
                table[k, lam, m] = _guarded(fitted[k, lam, m], int(unseen), spacing[k])
    return FitResult(tables, {"n_types": len(labels), "n_coefs": int(n_coefs), "levels": levels,
                              "cpu_seconds": time.process_time() - started})  # fmt: skip


def _clean_operator_gradient(tables: OperatorTables, x: np.ndarray) -> np.ndarray:
    """grad O at t = 0 [1/nm] on frames x."""
    zero = torch.zeros(len(x), dtype=torch.float64)
    return np.asarray(
        ops.pair_operator(
            torch.as_tensor(x), zero, zero,
            sites=torch.as_tensor(tables.sites), env=torch.as_tensor(tables.env),
            pair_type=torch.as_tensor(tables.pair_type), table=torch.as_tensor(tables.table),
            r_grid=torch.as_tensor(tables.r_grid), lam_knots=torch.as_tensor(tables.lam_knots),
            sigma_knots=torch.as_tensor(tables.sigma_knots), r_switch=tables.r_switch,
            r_cutoff=tables.r_cutoff,
        )[1]
    )  # fmt: skip


def default_knots(schedule: NoiseSchedule) -> tuple[float, ...]:
    """:data:`DEFAULT_SIGMA_KNOTS` stretched to the schedule's noise-to-signal range [nm]."""
    top = float(schedule.noise_to_signal(1.0))
    return tuple(k * top / DEFAULT_SIGMA_KNOTS[-1] for k in DEFAULT_SIGMA_KNOTS)


def fit_physical_model(
    x_0: Any, o_0: Any, x_1: Any, o_1: Any,
    graph: MolecularGraph, sites: Sequence[int], schedule: NoiseSchedule,
    *,
    seed: int,
    sigma_knots: Sequence[float] | None = None,
    n_draws: int = 2,
) -> tuple[PhysicalModel, dict[str, Any]]:  # fmt: skip
    """Fit noised operator (on both ends) and base action (both ends at t = 0, end 0 above).

    Parameters
    ----------
    x_0, o_0, x_1, o_1, graph, sites, n_draws
        As in :func:`fit_operator`.
    schedule : VESchedule or VPSchedule
        The knots default to :func:`default_knots`.
    seed : int
        Seed of the noise; kept in the record.

    Returns
    -------
    model : PhysicalModel
    record : dict
        JSON-ready training record.

    Raises
    ------
    InputError, ConvergenceError
        As in the two fits.
    """
    if sigma_knots is None:
        sigma_knots = default_knots(schedule)
    check_noise_range("sigma_knots", _check_knots(sigma_knots), schedule)  # before the fits, not after
    generator = np.random.default_rng(seed)
    operator = fit_operator(x_0, o_0, x_1, o_1, graph, sites, sigma_knots=sigma_knots,
                            generator=generator, n_draws=n_draws)  # fmt: skip
    grad_o = _clean_operator_gradient(operator.tables, check_frames(x_1, graph.n_atoms))
    base = fit_base_action(x_0, graph, sigma_knots=sigma_knots,
                           generator=generator, n_draws=n_draws, other_end=(x_1, grad_o))  # fmt: skip
    model = PhysicalModel(base.tables, operator.tables, schedule)
    return model, {
        "model": "PhysicalModel", "seed": int(seed), "n_draws": n_draws,
        "n_frames": [len(x_0), len(x_1)], "sigma_knots_nm": [float(k) for k in sigma_knots],
        "sites": [int(s) for s in sites], "base": base.record, "operator": operator.record,
    }  # fmt: skip
