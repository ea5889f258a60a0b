"""The fits, held to densities and operators that are known exactly."""

import contextlib
import json
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import scipy.interpolate
import torch

from openmm_diffforce import ops, training
from openmm_diffforce.errors import DiffForceError, InputError
from openmm_diffforce.models.graph import MolecularGraph, internal_coordinates, rotatable_bonds
from openmm_diffforce.models.physics import OperatorTables, PhysicalModel
from openmm_diffforce.project import r_squared
from openmm_diffforce.schedule import VESchedule
from openmm_diffforce.training import (
    DEFAULT_SIGMA_KNOTS,
    fit_base_action,
    fit_operator,
    fit_physical_model,
)

from . import tiny

F64 = torch.float64
DIATOMIC = MolecularGraph(("H", "F"), ((0, 1),))
BENT = MolecularGraph(("O", "H", "H"), ((0, 1), (0, 2)))
CHAIN = MolecularGraph(("C", "N", "O", "F"), ((0, 1), (1, 2), (2, 3)))  # one pair: 0 and 3

STIFFNESS = 1.0e4
"""k [1/nm^2]: bonds of 0.1 nm that vary by 0.01 nm."""
LENGTH = 0.1


# ------------------------------------------------------------------ exact samples


def draw(density: Callable[[np.ndarray], np.ndarray], low: float, high: float, n: int,
         generator: np.random.Generator) -> np.ndarray:  # fmt: skip
    """Exact samples of a 1-D density, by rejection from a uniform."""
    top = 1.001 * density(np.linspace(low, high, 4001)).max()
    out = np.empty(0)
    while len(out) < n:
        q = generator.uniform(low, high, 8 * n)
        out = np.concatenate([out, q[generator.uniform(0, top, len(q)) < density(q)]])
    return out[:n]


def bond_density(r: np.ndarray, k: float = STIFFNESS, r0: float = LENGTH) -> np.ndarray:
    """exp(-S) in space is r^2 exp(-S) in r."""
    return r**2 * np.exp(-0.5 * k * (r - r0) ** 2)


def bond_lengths(n: int, generator: np.random.Generator, k: float = STIFFNESS, r0: float = LENGTH):  # type: ignore[no-untyped-def]
    return draw(lambda r: bond_density(r, k, r0), r0 - 0.08, r0 + 0.08, n, generator)


def directions(n: int, generator: np.random.Generator) -> np.ndarray:
    v = generator.standard_normal((n, 3))
    return v / np.linalg.norm(v, axis=1, keepdims=True)


def diatomics(n: int, generator: np.random.Generator, k: float = STIFFNESS, r0: float = LENGTH) -> np.ndarray:
    d = bond_lengths(n, generator, k, r0)[:, None] * directions(n, generator)
    return np.stack([-0.5 * d, 0.5 * d], axis=1)


def slope_of(model: PhysicalModel, r: np.ndarray, sigma: float = 0.0) -> np.ndarray:
    """dS/dr of a diatomic model at bond lengths r."""
    x = np.zeros((len(r), 2, 3))
    x[:, 1, 0] = r
    t = np.full(len(r), np.sqrt(sigma / model.amplitudes.sigma_max))
    _, gradient, _ = model.fields(torch.as_tensor(x), torch.as_tensor(t), torch.zeros(len(r), dtype=F64))
    return gradient[:, 1, 0].numpy()


def noised_slope(r: np.ndarray, sigma: float) -> np.ndarray:
    """Exact dS_t/dr of the diatomic: both atoms noised, the bond vector by sqrt(2) sigma.

    The Gaussian averaged over a sphere is exp(-(R - r)^2/2s^2) (1 - exp(-2Rr/s^2)) / (R r).
    """
    s2 = 2 * sigma**2
    q = np.linspace(LENGTH - 0.08, LENGTH + 0.08, 4001)

    def action(big: np.ndarray) -> np.ndarray:
        big = big[:, None]
        kernel = np.exp(-((big - q) ** 2) / (2 * s2)) * -np.expm1(-2 * big * q / s2) / (big * q)
        return -np.log((bond_density(q) * kernel).sum(axis=1))

    h = 1e-6
    return (action(r + h) - action(r - h)) / (2 * h)


# ------------------------------------------------------------------ the base action


SIGMA = 0.008


@pytest.fixture(scope="module")
def diatomic_model() -> PhysicalModel:
    generator = np.random.default_rng(1)
    fit = fit_base_action(diatomics(6000, generator), DIATOMIC,
                          sigma_knots=(0.0, SIGMA, 0.02), generator=generator)  # fmt: skip
    return PhysicalModel(fit.tables, None, VESchedule(0.02))


def test_score_matching_finds_a_known_action(diatomic_model):
    # Within 2 standard deviations; a missing Laplacian's Jacobian term alone is 2/r = 20 / nm.
    r = LENGTH + np.linspace(-2, 2, 41) / np.sqrt(STIFFNESS)
    error = slope_of(diatomic_model, r) - STIFFNESS * (r - LENGTH)
    assert np.sqrt((error**2).mean()) < 0.06 * np.sqrt(STIFFNESS)


@pytest.mark.parametrize("sigma", [SIGMA, 0.02])
def test_denoising_finds_the_noised_action(diatomic_model, sigma):
    spread = np.sqrt(1 / STIFFNESS + 2 * sigma**2)
    r = LENGTH + np.linspace(-2, 2, 41) * spread
    exact = noised_slope(r, sigma)
    error = slope_of(diatomic_model, r, sigma) - exact
    assert np.sqrt((error**2).mean()) < 0.06 / spread
    clean = STIFFNESS * (r - LENGTH)
    assert np.sqrt(((clean - exact) ** 2).mean()) > 0.5 / spread  # the noise is not small


def test_the_other_end_teaches_the_base_action():
    """Frames of end 1 with grad O carry S_0 to where end 0 has no frames."""
    generator = np.random.default_rng(2)
    shifted = LENGTH + 0.03
    x_0, x_1 = diatomics(500, generator), diatomics(6000, generator, r0=shifted)
    d = x_1[:, 1] - x_1[:, 0]
    r_1 = np.linalg.norm(d, axis=1)
    slope = (STIFFNESS * (r_1 - shifted) - STIFFNESS * (r_1 - LENGTH))[:, None] * d / r_1[:, None]
    grad_o = np.stack([-slope, slope], axis=1)
    r = shifted + np.linspace(-1.5, 1.5, 31) / np.sqrt(STIFFNESS)
    errors = []
    for other in (None, (x_1, grad_o)):
        fit = fit_base_action(x_0, DIATOMIC, sigma_knots=(0.0, 0.02),
                              generator=np.random.default_rng(0), other_end=other)  # fmt: skip
        model = PhysicalModel(fit.tables, None, VESchedule(0.02))
        errors.append(np.sqrt(((slope_of(model, r) - STIFFNESS * (r - LENGTH)) ** 2).mean()))
    assert errors[1] < 0.15 * np.sqrt(STIFFNESS)
    assert errors[1] < 0.5 * errors[0]


def bent_action(x: torch.Tensor) -> torch.Tensor:
    u, v = x[:, 1] - x[:, 0], x[:, 2] - x[:, 0]
    angle = torch.atan2(torch.linalg.cross(u, v).norm(dim=1), (u * v).sum(1))
    return (
        0.5 * STIFFNESS * ((u.norm(dim=1) - LENGTH) ** 2 + (v.norm(dim=1) - LENGTH) ** 2)
        + 50.0 * (angle - 1.9) ** 2
    )


def test_score_matching_of_bonds_and_an_angle():
    """exp(-S) of three atoms is r1^2 r2^2 sin(angle) exp(-S) in bonds and angle."""
    generator = np.random.default_rng(3)
    n = 20500
    angle = draw(lambda a: np.sin(a) * np.exp(-50 * (a - 1.9) ** 2), 0.8, np.pi, n, generator)
    u = directions(n, generator)
    w = np.cross(u, directions(n, generator))
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    v = np.cos(angle)[:, None] * u + np.sin(angle)[:, None] * w
    x = np.stack([np.zeros((n, 3)), bond_lengths(n, generator)[:, None] * u,
                  bond_lengths(n, generator)[:, None] * v], axis=1)  # fmt: skip
    train, test = x[: n - 500], torch.as_tensor(x[n - 500 :]).requires_grad_(True)
    fit = fit_base_action(train, BENT, sigma_knots=(0.0, 0.01), generator=generator)
    model = PhysicalModel(fit.tables, None, VESchedule(0.01))
    zero = torch.zeros(500, dtype=F64)
    found = model.fields(test.detach(), zero, zero)[1].numpy()
    (exact,) = torch.autograd.grad(bent_action(test).sum(), test)
    assert r_squared(found, exact.numpy()) > 0.99
    assert abs(float((found * exact.numpy()).sum() / (exact.numpy() ** 2).sum()) - 1) < 0.02


# ------------------------------------------------------------------ score matching along rotations

PEROXIDE = MolecularGraph(("H", "O", "O", "H"), ((0, 1), (1, 2), (2, 3)))


def turn(x: np.ndarray, bond: int, angle: float, graph: MolecularGraph) -> np.ndarray:
    """x with one side of a rotatable bond turned rigidly about it (Rodrigues' formula)."""
    axis, moved = rotatable_bonds(graph)
    i, j = axis[bond]
    u = x[:, j] - x[:, i]
    u = (u / np.linalg.norm(u, axis=1, keepdims=True))[:, None]
    d = x - x[:, [j]]
    turned = (d * np.cos(angle) + np.cross(u, d) * np.sin(angle)
              + u * (u * d).sum(-1, keepdims=True) * (1 - np.cos(angle)))  # fmt: skip
    return np.where(moved[bond][:, None], x[:, [j]] + turned, x)


def test_derivatives_along_rotations():
    """A and b against central differences of every feature along the turned molecule."""
    graph = tiny.graph()
    x = tiny.frames()[0][:5]
    coordinates = internal_coordinates(graph)
    n_coefs = np.full(coordinates.n_classes, 6)
    offsets = np.concatenate([[0], np.cumsum(n_coefs)])
    grid = training._class_grid(tiny.frames()[0], coordinates, n_coefs)
    distances = coordinates.kind == ops.DISTANCE  # one more interval at both ends, so that no
    grid[distances, 0] -= grid[distances, 1]  # frame touches an edge
    grid[distances, 1] *= 5 / 3
    target = np.random.default_rng(3).standard_normal(x.shape)
    matrix, vector = training._rotation_normal(x, target, coordinates, graph, grid, offsets)

    def features(y: np.ndarray) -> np.ndarray:
        """[n_frames, n_coefs]: the action of every unit coefficient."""
        columns = []
        for unit in np.eye(offsets[-1]):
            coef = torch.as_tensor(np.stack([unit, unit]))
            columns.append(ops.internal_action(
                torch.as_tensor(y), torch.zeros(len(y), dtype=F64),
                atoms=torch.as_tensor(coordinates.atoms), cls=torch.as_tensor(coordinates.cls),
                kind=torch.as_tensor(coordinates.kind),
                grid=torch.as_tensor(np.stack([grid, grid])), offsets=torch.as_tensor(offsets),
                coef=coef, sigma_knots=torch.tensor([0.0, 0.1], dtype=F64),
            )[0].numpy())  # fmt: skip
        return np.stack(columns, axis=1)

    h = 1e-4
    middle = features(x)
    expected_a, expected_b = np.zeros_like(matrix), np.zeros_like(vector)
    for bond in range(len(rotatable_bonds(graph)[0])):
        up, down = turn(x, bond, h, graph), turn(x, bond, -h, graph)
        above, below = features(up), features(down)
        first, second = (above - below) / (2 * h), (above - 2 * middle + below) / h**2
        known = ((up - down) / (2 * h) * target).sum((1, 2))
        expected_a += first.T @ first / len(x)
        expected_b += (second.sum(0) + first.T @ known) / len(x)
    assert np.abs(expected_b).max() > 1
    np.testing.assert_allclose(matrix, expected_a, rtol=1e-5, atol=1e-6 * expected_a.max())
    np.testing.assert_allclose(vector, expected_b, rtol=1e-4, atol=1e-5 * np.abs(expected_b).max())


def peroxides(n: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Stiff bonds, stiff right angles, and S = 2 cos 3 phi in between."""
    bonds = 0.1 + 0.001 * generator.standard_normal((n, 3))
    bends = np.pi / 2 + 0.02 * generator.standard_normal((n, 2))
    phi = draw(lambda p: np.exp(-2 * np.cos(3 * p)), -np.pi, np.pi, n, generator)
    x = np.zeros((n, 4, 3))
    x[:, 2, 0] = bonds[:, 1]
    x[:, 0] = bonds[:, :1] * np.stack([np.cos(bends[:, 0]), np.sin(bends[:, 0]), 0 * phi], axis=1)
    x[:, 3] = x[:, 2] + bonds[:, 2:] * np.stack(
        [-np.cos(bends[:, 1]), np.sin(bends[:, 1]) * np.cos(phi), np.sin(bends[:, 1]) * np.sin(phi)], axis=1
    )
    return x, phi


def test_rotations_teach_the_torsion():
    """The bonds' forces drown a torsion in Cartesian score matching; rotations bring it out."""
    x, _ = peroxides(1000, np.random.default_rng(6))
    frame = peroxides(1, np.random.default_rng(7))[0]
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    path = np.concatenate([turn(frame, 0, a, PEROXIDE) for a in angles])
    b = np.diff(path, axis=1)
    n_1, n_2 = np.cross(b[:, 0], b[:, 1]), np.cross(b[:, 1], b[:, 2])
    truth = 2 * np.cos(3 * np.arctan2((np.cross(n_1, n_2) * b[:, 1]).sum(1) / np.linalg.norm(b[:, 1], axis=1),
                                      (n_1 * n_2).sum(1)))  # fmt: skip
    errors = []
    for rotations in (True, False):
        with mock.patch.object(training, "_with_rotations", training._with_rotations if rotations
                               else lambda sums, *_: sums):  # fmt: skip
            fit = fit_base_action(x, PEROXIDE, sigma_knots=(0.0, 0.005),
                                  generator=np.random.default_rng(0), n_draws=1)  # fmt: skip
        model = PhysicalModel(fit.tables, None, VESchedule(0.005))
        zero = torch.zeros(len(path), dtype=F64)
        found = model.fields(torch.as_tensor(path), zero, zero)[0].numpy()
        errors.append(float(np.std(found - truth)))
    assert errors[0] < 0.3 * np.std(truth)
    assert errors[0] < 0.7 * errors[1]


def test_each_level_says_what_it_saw():
    x = diatomics(200, np.random.default_rng(4))
    fit = fit_base_action(x, DIATOMIC, sigma_knots=(0.0, 0.01, 0.02),
                          generator=np.random.default_rng(0), n_draws=3)  # fmt: skip
    levels = fit.record["levels"]
    assert [level["sigma_nm"] for level in levels] == [0.0, 0.01, 0.02]
    assert [level["n_frames"] for level in levels] == [200, 1200, 1200]
    assert all(level["penalty"] in training.PENALTIES for level in levels)
    assert all(level["held_out_loss"] < 0 for level in levels)  # zero action has loss 0
    assert fit.record["n_coefs"] == training.N_COEFS["bond"]
    json.dumps(fit.record, allow_nan=False)


@pytest.mark.parametrize("knot", [0, 1])
def test_walls_are_smooth_and_rise(knot):
    """A diatomic's curve beyond its data: C2 up to the wall, whose curvature it then keeps."""
    x = diatomics(400, np.random.default_rng(6), r0=0.5)  # the walls end well above zero
    fit = fit_base_action(x, DIATOMIC, sigma_knots=(0.0, 0.01), generator=np.random.default_rng(0),
                          n_draws=1)  # fmt: skip
    first, spacing, wall = fit.tables.grid[knot, 0]
    last = first + spacing * (np.diff(fit.tables.offsets)[0] - 3)
    (low,), (high,) = fit.tables.domain(knot)
    if knot == 0:
        r = np.linalg.norm(x[:, 0] - x[:, 1], axis=-1)
        np.testing.assert_allclose([low, high], [r.min(), r.max()])
    assert wall * spacing**2 >= training.WALL_KT
    model = PhysicalModel(fit.tables, None, VESchedule(0.01))

    def curvature(r: np.ndarray, step: float = 1e-5) -> np.ndarray:
        sigma = (0.0, 0.01)[knot]
        return (slope_of(model, r + step, sigma) - slope_of(model, r - step, sigma)) / (2 * step)

    # A step over every knot, edges of the data and of the wall among them, changes it continuously.
    edges = np.arange(first, last + spacing / 2, spacing)
    jump = abs(curvature(edges + 2e-5) - curvature(edges - 2e-5))
    assert (jump < 1e-2 * wall).all()
    beyond = np.array([first - 3 * spacing, first - 0.1 * spacing, last + 0.1 * spacing, last + 3 * spacing])
    np.testing.assert_allclose(curvature(beyond), wall, rtol=1e-4)


@pytest.mark.parametrize("penalty", [1e-4, 1.0])
def test_penalty_leaves_harmonic_terms_free(penalty):
    """However strong the penalty, a harmonic diatomic keeps its stiffness."""
    x = diatomics(2000, np.random.default_rng(7))
    with mock.patch.object(training, "PENALTIES", (penalty,)):
        fit = fit_base_action(x, DIATOMIC, sigma_knots=(0.0, 0.01), generator=np.random.default_rng(0),
                              n_draws=1)  # fmt: skip
    r = np.linspace(LENGTH - 0.01, LENGTH + 0.01, 9)
    slope = slope_of(PhysicalModel(fit.tables, None, VESchedule(0.01)), r)
    assert np.polyfit(r, slope, 1)[0] == pytest.approx(STIFFNESS, rel=0.08)


# ------------------------------------------------------------------ the operator


def chains(n: int, spread: float, generator: np.random.Generator) -> np.ndarray:
    """Four atoms; the vector from the first to the last is N(0, spread^2), the others anything."""
    x = generator.standard_normal((n, 4, 3))
    x[:, 3] = x[:, 0] + spread * generator.standard_normal((n, 3))
    return x


def distances(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x[:, 3] - x[:, 0], axis=1)


def operator_values(tables: OperatorTables, x: np.ndarray, sigma: float, lam: float) -> np.ndarray:
    from openmm_diffforce import ops

    def tensor(name: str) -> torch.Tensor:
        return torch.as_tensor(getattr(tables, name))

    names = ("sites", "env", "pair_type", "table", "r_grid", "lam_knots", "sigma_knots")
    full = torch.full((len(x),), 1.0, dtype=F64)
    return ops.pair_operator(
        torch.as_tensor(x), sigma * full, lam * full, **{name: tensor(name) for name in names},
        r_switch=tables.r_switch, r_cutoff=tables.r_cutoff,
    )[0].numpy()  # fmt: skip


def test_an_operator_in_the_span_is_found_exactly():
    """A cubic spline on the fit's own knots, evaluated by SciPy."""
    generator = np.random.default_rng(5)
    ends = [chains(400, 0.1, generator) for _ in (0, 1)]
    knots = (0.0, 0.01)

    def fit(o_0: np.ndarray, o_1: np.ndarray) -> OperatorTables:
        return fit_operator(ends[0], o_0, ends[1], o_1, CHAIN, [0], sigma_knots=knots,
                            generator=np.random.default_rng(0)).tables  # fmt: skip

    tables = fit(distances(ends[0]), distances(ends[1]))
    lo, h = tables.r_grid[0]
    n = tables.table.shape[-1]
    spline = scipy.interpolate.BSpline(lo + h * (np.arange(n + 4) - 3), generator.standard_normal(n), 3)
    with mock.patch.object(training, "OPERATOR_PENALTIES", (1e-13,)):
        found = fit(spline(distances(ends[0])), spline(distances(ends[1])))
    for x in ends:
        exact = spline(distances(x))
        for lam in (0.0, 0.4, 1.0):
            error = operator_values(found, x, 0.0, lam) - exact
            assert np.abs(error).max() < 1e-7 * np.abs(exact).max()


WIDTH = 0.1


def gaussian_operator(x: np.ndarray) -> np.ndarray:
    return 5.0 * np.exp(-(distances(x) ** 2) / (2 * WIDTH**2))


def gaussian_operator_noised(y: np.ndarray, sigma: float, spread: float) -> np.ndarray:
    """E[O | y], exact: the bond vector given y is Gaussian too, with s^2 = 2 sigma^2."""
    s2, p2 = 2 * sigma**2, spread**2
    mean, var = distances(y) * p2 / (p2 + s2), p2 * s2 / (p2 + s2)
    return 5.0 * (1 + var / WIDTH**2) ** -1.5 * np.exp(-(mean**2) / (2 * (WIDTH**2 + var)))


def test_the_noised_operator_is_the_conditional_mean():
    """Smooth function, two ends with different densities, hence different noised operators."""
    generator = np.random.default_rng(6)
    spreads = (0.2, 0.08)
    knots = (0.0, 0.02, 0.05)
    ends = [chains(4000, s, generator) for s in spreads]
    fit = fit_operator(ends[0], gaussian_operator(ends[0]), ends[1], gaussian_operator(ends[1]), CHAIN, [0],
                       sigma_knots=knots, generator=generator)  # fmt: skip
    for end, spread in enumerate(spreads):
        fresh = chains(1000, spread, generator)
        clean = operator_values(fit.tables, fresh, 0.0, end)
        assert r_squared(clean, gaussian_operator(fresh)) > 0.999
        for sigma in knots[1:]:
            y = fresh + sigma * generator.standard_normal(fresh.shape)
            exact = gaussian_operator_noised(y, sigma, spread)
            found = operator_values(fit.tables, y, sigma, end)
            assert r_squared(found, exact) > 0.995
    # at the largest noise the clean operator, or the other end's, would not do
    assert r_squared(gaussian_operator(y), exact) < 0.9
    assert r_squared(gaussian_operator_noised(y, sigma, spreads[0]), exact) < 0.98
    first, *_, last = fit.record["levels"]
    assert len(first["ends"]) == 1
    assert len(last["ends"]) == 2
    assert first["ends"][0]["held_out_r2"] > 0.999
    json.dumps(fit.record, allow_nan=False)


def test_held_out_r2_is_that_of_the_held_out_frames():
    # Pure noise cannot be predicted; a constant operator would give 0 / 0.
    generator = np.random.default_rng(7)
    ends = [chains(500, 0.1, generator) for _ in (0, 1)]
    o = [generator.standard_normal(500) for _ in (0, 1)]
    fit = fit_operator(ends[0], o[0], ends[1], o[1], CHAIN, [0], sigma_knots=(0.0, 0.02), generator=generator)
    for level in fit.record["levels"]:
        for end in level["ends"]:
            assert -0.5 < end["held_out_r2"] < 0.1


def test_frames_that_clash_in_state_1_do_not_spoil_it():
    """A steric operator that no cubic spline follows at short range, seen there from end state 0 alone."""
    generator = np.random.default_rng(8)
    x_0 = chains(1500, 0.1, generator)
    x_0 = x_0[distances(x_0) > 0.02]
    x_1 = chains(6000, 0.1, generator)
    x_1 = x_1[distances(x_1) > 0.1]

    def steric(x: np.ndarray) -> np.ndarray:
        return (0.1 / distances(x)) ** 6

    def error_in_state_1(**changes: float) -> float:
        with contextlib.ExitStack() as stack:
            for name, value in changes.items():
                stack.enter_context(mock.patch.object(training, name, value))
            fit = fit_operator(x_0, steric(x_0), x_1[500:], steric(x_1[500:]), CHAIN, [0],
                               sigma_knots=(0.0, 0.002), generator=np.random.default_rng(0))  # fmt: skip
        return float(np.std(operator_values(fit.tables, x_1[:500], 0.0, 1.0) - steric(x_1[:500])))

    assert steric(x_0).max() > 1000
    assert error_in_state_1() < 0.01
    assert error_in_state_1(OPERATOR_TOLERANCE=1e9) > 5 * error_in_state_1()


def test_beyond_the_closest_contact_the_operator_repels():
    """Downhill towards shorter distances in the frames; the wall turns it round, without a jump of force."""
    generator = np.random.default_rng(9)
    ends = [x[distances(x) > 0.1] for x in (chains(3000, 0.1, generator) for _ in (0, 1))]
    o = [20.0 * distances(x) for x in ends]
    fit = fit_operator(ends[0], o[0], ends[1], o[1], CHAIN, [0], sigma_knots=(0.0, 0.05), generator=generator)
    r = np.linspace(0.01, 0.3, 400)
    line = np.repeat(ends[0][:1], len(r), axis=0)
    line[:, 3] = line[:, 0] + r[:, None] * np.array([1.0, 0.0, 0.0])
    value = operator_values(fit.tables, line, 0.0, 1.0)
    inside = r > 0.12
    np.testing.assert_allclose(value[inside], 20.0 * r[inside], atol=0.02)
    assert value[0] > 20.0 * r[0] + 0.5 * training.OPERATOR_WALL * 0.05**2
    assert np.abs(np.diff(value, 2) / np.diff(r)[0] ** 2).max() < 1.3 * training.OPERATOR_WALL


# ------------------------------------------------------------------ both together


def fitted(seed: int, n_frames: int = 150) -> tuple[PhysicalModel, dict]:
    x_0, o_0, x_1, o_1 = (values[:n_frames] for values in tiny.frames())
    with tiny.few_coefs():
        return fit_physical_model(x_0, o_0, x_1, o_1, tiny.graph(), tiny.case().perturbed,
                                  VESchedule(0.04), seed=seed, n_draws=1)  # fmt: skip


def test_physical_model_by_seed():
    (a, record), (b, _), (c, _) = (fitted(seed, 40) for seed in (1, 1, 2))
    for name, value in a.named_buffers():
        assert torch.equal(value, dict(b.named_buffers())[name])
    np.testing.assert_allclose(a.base_sigma, np.array(DEFAULT_SIGMA_KNOTS) * 0.8)
    assert not torch.equal(a.coef, c.coef)
    # without noise only the other end's operator, fitted without noise too, comes in
    np.testing.assert_allclose(a.coef[0], c.coef[0], rtol=2e-2, atol=2e-2 * float(a.coef[0].abs().max()))
    json.dumps(record, allow_nan=False)
    assert record["seed"] == 1
    assert record["n_frames"] == [40, 40]
    assert record["sites"] == list(tiny.case().perturbed)
    assert record["sigma_knots_nm"] == pytest.approx([0.0, 0.004, 0.008, 0.016, 0.04])


def test_frames_predict_new_frames():
    """150 frames of alanine dipeptide are few, but better than none."""
    model, _ = fitted(1)
    x = tiny.frames()[2][::5]
    zero = torch.zeros(len(x), dtype=F64)
    operator = model.fields(torch.as_tensor(x), zero, zero)[2].numpy()
    assert r_squared(operator, tiny.frames()[3][::5]) > 0.9


# ------------------------------------------------------------------ bad input


def frames_of(n: int = 20) -> np.ndarray:
    return diatomics(n, np.random.default_rng(0))


def with_nan() -> np.ndarray:
    x = frames_of()
    x[7, 1, 2] = np.nan
    return x


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (with_nan(), "x: frame 7 has a coordinate that is not finite"),
        (frames_of()[:, :1], r"x: expected coordinates of shape \[n_frames >= 1, 2, 3\].*found \[20, 1, 3\]"),
        (frames_of()[0], "x: expected coordinates of shape"),
        (frames_of()[..., :2], "x: expected coordinates of shape"),
        (frames_of()[:0], "x: expected coordinates of shape"),
        (frames_of(1), "at least 5 frames, found 1"),
    ],
)
def test_bad_frames(x, message):
    with pytest.raises(InputError, match=message):
        fit_base_action(x, DIATOMIC, generator=np.random.default_rng(0))


@pytest.mark.parametrize(
    "knots",
    [(), (0.0,), (0.01, 0.02), (0.0, 0.02, 0.01), (0.0, 0.0), ((0.0, 0.1),), (0.0, np.nan), (-0.1, 0.0),
     (0.0, np.inf)],
)  # fmt: skip
def test_bad_knots(knots):
    with pytest.raises(InputError, match="sigma_knots: expected increasing noise levels"):
        fit_base_action(frames_of(), DIATOMIC, sigma_knots=knots,
                        generator=np.random.default_rng(0))  # fmt: skip
    x = chains(20, 0.1, np.random.default_rng(0))
    with pytest.raises(InputError, match="sigma_knots"):
        fit_operator(x, distances(x), x, distances(x), CHAIN, [0], sigma_knots=knots,
                     generator=np.random.default_rng(0))  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"o_0": np.zeros(19)}, "o_0: expected 20 finite operator values"),
        ({"o_1": np.zeros((20, 1))}, r"o_1: expected 20 .*found shape \[20, 1\]"),
        ({"o_1": np.full(20, np.nan)}, "o_1: expected 20 finite"),
        ({"x_1": np.zeros((20, 3, 3))}, "x_1: expected coordinates of shape"),
        ({"x_0": np.full((20, 4, 3), np.inf)}, "x_0: frame 0 has a coordinate"),
        ({"sites": []}, "sites"),
        ({"sites": [4]}, "sites"),
    ],
)
def test_bad_operator_input(change, message):
    x = chains(20, 0.1, np.random.default_rng(0))
    given = {"x_0": x, "o_0": distances(x), "x_1": x, "o_1": distances(x), "sites": [0], **change}
    with pytest.raises(InputError, match=message):
        fit_operator(**given, graph=CHAIN, generator=np.random.default_rng(0))


def test_bad_other_end():
    x = frames_of()
    for other, word in (((x[:, :1], x), "other_end"), ((x, x[:, :1]), "gradient"), ((x, x[:10]), "gradient")):
        with pytest.raises(InputError, match=word):
            fit_base_action(x, DIATOMIC, sigma_knots=(0.0, 0.02),
                            generator=np.random.default_rng(0), other_end=other)  # fmt: skip


@pytest.mark.parametrize("holdout", [0.0, 1.0, -0.5, 2.0, float("nan")])
def test_bad_holdout(holdout):
    with pytest.raises(InputError, match="holdout: expected"):
        fit_base_action(frames_of(), DIATOMIC, holdout=holdout,
                        generator=np.random.default_rng(0))  # fmt: skip


@pytest.mark.parametrize("n_draws", [0, -1])
def test_bad_draws(n_draws):
    with pytest.raises(InputError, match="n_draws: expected"):
        fit_base_action(frames_of(), DIATOMIC, n_draws=n_draws,
                        generator=np.random.default_rng(0))  # fmt: skip
    x = chains(20, 0.1, np.random.default_rng(0))
    with pytest.raises(InputError, match="n_draws: expected"):
        fit_operator(x, distances(x), x, distances(x), CHAIN, [0], n_draws=n_draws,
                     generator=np.random.default_rng(0))  # fmt: skip


def test_frames_that_are_all_alike():
    """Nothing can be learned from one conformation; the answer is an error or finite, never NaN."""
    x = np.repeat(frames_of(1), 20, axis=0)
    try:
        fit = fit_base_action(x, DIATOMIC, generator=np.random.default_rng(0))
    except DiffForceError:
        return
    assert np.isfinite(fit.tables.coef).all()
