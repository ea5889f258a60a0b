"""The physical model: its derivatives, its two schedules, its limits; and the action contract."""

import dataclasses

import numpy as np
import pytest
import torch

from openmm_diffforce.errors import InputError
from openmm_diffforce.models.action import ActionModel, operator_gradient
from openmm_diffforce.models.graph import MolecularGraph, internal_coordinates
from openmm_diffforce.models.physics import (
    BaseTables,
    PhysicalModel,
    base_tables,
    internal_values,
    outside_fraction,
)
from openmm_diffforce.schedule import VESchedule, VPSchedule

from . import tiny

F64 = torch.float64
REL_F64 = 1e-10


def batch(n: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Frames a little off the data, times and lambdas from 0 to 1."""
    noise = np.random.default_rng(2).standard_normal((n, tiny.graph().n_atoms, 3))
    x = torch.as_tensor(tiny.frames()[0][:n] + 2e-3 * noise)
    return x, torch.linspace(0, 1, n, dtype=F64), torch.linspace(1, 0, n, dtype=F64)


def column(value: float, n: int) -> torch.Tensor:
    return torch.full((n,), value, dtype=F64)


def close(found: torch.Tensor, expected: torch.Tensor, relative: float = REL_F64) -> None:
    size = float(expected.abs().max())
    assert size > 0
    assert float((found - expected).abs().max()) <= relative * size


# ------------------------------------------------------------------ derivatives


@pytest.mark.parametrize("kind", ["VE", "VP"])
def test_fields_are_the_derivatives_of_forward(kind):
    model = tiny.model(kind)
    for found, expected in zip(model.fields(*batch()), ActionModel.fields(model, *batch()), strict=True):
        assert found.shape == expected.shape
        close(found, expected)


@pytest.mark.parametrize("kind", ["VE", "VP"])
def test_fields_against_finite_differences(kind):
    model = tiny.model(kind)
    x, t, lam = batch()
    _, gradient, d_lam = model.fields(x, t, lam)
    direction = torch.as_tensor(np.random.default_rng(3).standard_normal(x.shape))

    def along(h: float) -> torch.Tensor:
        return model(x + h * direction, t, lam)

    h = 1e-6
    numeric = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
    close((gradient * direction).sum((1, 2)), numeric, 1e-6)
    inner = lam.clamp(0.01, 0.99)
    _, _, d_lam = model.fields(x, t, inner)
    close(d_lam, (model(x, t, inner + 1e-4) - model(x, t, inner - 1e-4)) / 2e-4, 1e-8)


@pytest.mark.parametrize("kind", ["VE", "VP"])
def test_operator_gradient_against_finite_differences(kind):
    model = tiny.model(kind)
    x, t, lam = batch()
    found = operator_gradient(model, x, t, lam)
    direction = torch.as_tensor(np.random.default_rng(4).standard_normal(x.shape))

    def along(h: float) -> torch.Tensor:
        return model.fields(x + h * direction, t, lam)[2]

    h = 1e-6
    numeric = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
    close((found * direction).sum((1, 2)), numeric, 1e-6)
    assert torch.equal(operator_gradient(torch.jit.script(model), x, t, lam), found)
    # ... and it is -d(score)/d(lambda)
    inner = lam.clamp(0.01, 0.99)
    mixed = (model.fields(x, t, inner + 1e-4)[1] - model.fields(x, t, inner - 1e-4)[1]) / 2e-4
    close(operator_gradient(model, x, t, inner), mixed, 1e-7)


@pytest.mark.parametrize("kind", ["VE", "VP"])
def test_autograd_sees_through_forward_twice(kind):
    model = tiny.model(kind)
    x, t, lam = batch()
    x.requires_grad_(True)
    lam.requires_grad_(True)
    (operator,) = torch.autograd.grad(model(x, t, lam).sum(), lam, create_graph=True)
    (gradient,) = torch.autograd.grad(operator.sum(), x)
    close(gradient, operator_gradient(model, x.detach(), t, lam.detach()))


@pytest.mark.parametrize("kind", ["VE", "VP"])
@pytest.mark.parametrize("operator", [True, False])
def test_torchscript_is_eager(kind, operator):
    model = tiny.model(kind, operator)
    script = torch.jit.script(model)
    assert torch.equal(script(*batch()), model(*batch()))
    for name in ("fields", "increment_fields"):
        for found, expected in zip(getattr(script, name)(*batch()), getattr(model, name)(*batch()),
                                   strict=True):  # fmt: skip
            assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["VE", "VP"])
def test_increment_is_the_difference_in_lambda(kind):
    model = tiny.model(kind)
    x, t, lam = batch()
    action, gradient, d_lam = model.fields(x, t, lam)
    action_0, gradient_0, _ = model.fields(x, t, torch.zeros_like(lam))
    increment, increment_gradient, derivative = model.increment_fields(x, t, lam)
    np.testing.assert_allclose(increment, action - action_0, atol=1e-10 * float(action.abs().max()))
    atol = REL_F64 * float(gradient.abs().max())
    np.testing.assert_allclose(increment_gradient, gradient - gradient_0, atol=atol)
    assert torch.equal(derivative, d_lam)
    at_zero = model.increment_fields(x, t, torch.zeros_like(lam))
    assert not at_zero[0].any()
    assert not at_zero[1].any()
    assert at_zero[2].any()


def test_without_operator_nothing_depends_on_lambda():
    full, base = tiny.model(), tiny.model(operator=False)
    x, t, lam = batch()
    action, gradient, d_lam = base.fields(x, t, lam)
    assert not d_lam.any()
    expected = full.fields(x, t, torch.zeros_like(lam))
    assert torch.equal(action, expected[0])
    assert torch.equal(gradient, expected[1])
    assert torch.equal(base(x, t, lam), action)
    assert not operator_gradient(base, x, t, lam).any()


# ------------------------------------------------------------------ schedules, noise and lambda


def test_vp_is_ve_at_the_same_noise_to_signal():
    # S_VP(y, t) = S_VE(y / alpha, tau) + d ln alpha: the density of y = alpha z has that Jacobian.
    ve, vp = tiny.model("VE"), tiny.model("VP")
    z, t, lam = batch()
    schedule = tiny.SCHEDULES["VP"]
    alpha = schedule.alpha(t)
    t_ve = torch.tensor(
        [tiny.SCHEDULES["VE"].t_of_sigma(float(schedule.noise_to_signal(s))) for s in t], dtype=F64
    )
    found = vp.fields(alpha[:, None, None] * z, t, lam)
    action, gradient, d_lam = ve.fields(z, t_ve, lam)
    d = 3 * tiny.graph().n_atoms - 3
    close(found[0], action + d * torch.log(alpha))
    close(found[1], gradient / alpha[:, None, None])
    close(found[2], d_lam)


def test_clean_action_is_linear_in_lambda():
    # O(x) = S_1 - S_0 does not depend on lambda at t = 0, but it does where there is noise.
    model = tiny.model()
    x, _, _ = batch()
    n = len(x)
    half = model.fields(x, column(0.0, n), column(0.5, n))
    ends = [model.fields(x, column(0.0, n), column(v, n)) for v in (0.0, 1.0)]
    close(half[0], 0.5 * (ends[0][0] + ends[1][0]))
    close(half[1], 0.5 * (ends[0][1] + ends[1][1]))
    close(ends[1][2], ends[0][2])
    close(ends[1][0] - ends[0][0], half[2], 1e-8)
    noisy = [model.fields(x, column(0.9, n), column(v, n))[2] for v in (0.0, 1.0)]
    assert float((noisy[0] - noisy[1]).abs().min()) > 1e-3


@pytest.mark.parametrize("sigma", tiny.SIGMA_KNOTS[1:-1])
def test_continuous_across_noise_knots(sigma):
    model = tiny.model()
    x, _, lam = batch()
    t = tiny.SCHEDULES["VE"].t_of_sigma(sigma)
    at = model.fields(x, column(t, len(x)), lam)
    for step in (-1e-9, 1e-9):
        near = model.fields(x, column(t + step, len(x)), lam)
        for found, expected in zip(near, at, strict=True):
            close(found, expected, 1e-6)
    away = model.fields(x, column(t + 0.05, len(x)), lam)
    assert float((away[0] - at[0]).abs().min()) > 1e-3


def test_each_noise_knot_is_its_own_table():
    """At a knot only that knot's coefficients count; between, the weights are as documented."""
    base, pairs = tiny.tables()
    x, _, _ = batch(1)
    schedule = tiny.SCHEDULES["VE"]
    zero = column(0.0, 1)

    def action(sigma: float, keep: int) -> float:
        coef = np.zeros_like(base.coef)
        coef[keep] = base.coef[keep]
        grid = base.grid.copy()
        grid[:, :, 2] = 0.0  # no walls
        model = PhysicalModel(dataclasses.replace(base, coef=coef, grid=grid), pairs, schedule)
        return float(model(x, column(schedule.t_of_sigma(sigma), 1), zero))

    knots = tiny.SIGMA_KNOTS
    pure = [action(s, k) for k, s in enumerate(knots)]
    for k, sigma in enumerate(knots):
        for other in range(len(knots)):
            if other != k:
                assert action(sigma, other) == pytest.approx(0.0, abs=1e-9 * abs(pure[other]))
    # first interval linear in sigma^2, the others in log sigma
    assert action(0.6 * knots[1], 1) == pytest.approx(0.36 * pure[1], rel=1e-10)
    assert action(0.6 * knots[1], 0) == pytest.approx(0.64 * pure[0], rel=1e-10)
    middle = float(np.sqrt(knots[1] * knots[2]))
    assert action(middle, 2) == pytest.approx(0.5 * pure[2], rel=1e-10)


def test_invariant_under_motion_and_equivalent_hydrogens():
    model = tiny.model("VP", operator=False)
    x, t, lam = batch()
    q, _ = np.linalg.qr(np.random.default_rng(5).standard_normal((3, 3)))
    q = torch.as_tensor(q * np.sign(np.linalg.det(q)))
    close(model(x @ q.T + 3.0, t, lam), model(x, t, lam))
    # hydrogens of one methyl group are exchangeable, those of different groups are not
    classes = tiny.graph().atom_classes()
    names = tiny.graph().names
    swap = np.arange(tiny.graph().n_atoms)
    same = [k for k, name in enumerate(names) if name in ("HB1", "HB2")]
    swap[same] = swap[same[::-1]]
    assert classes[same[0]] == classes[same[1]]
    close(model(x[:, swap], t, lam), model(x, t, lam))
    swap = np.arange(tiny.graph().n_atoms)
    other = [same[0], int(np.flatnonzero(np.array(names) == "HA")[0])]
    swap[other] = swap[other[::-1]]
    assert float((model(x[:, swap], t, lam) - model(x, t, lam)).abs().min()) > 1e-3


def test_frames_do_not_mix():
    model = tiny.model()
    x, t, lam = batch()
    together = model.fields(x, t, lam)
    for k in range(len(x)):
        alone = model.fields(x[k : k + 1], t[k : k + 1], lam[k : k + 1])
        for a, b in zip(alone, together, strict=True):
            close(a[0], b[k])


# ------------------------------------------------------------------ schedules that do not fit


@pytest.mark.parametrize("schedule", [VESchedule(0.06), VPSchedule()])
def test_knots_must_reach_the_schedules_noise(schedule):
    with pytest.raises(InputError, match=r"base: expected noise knots up to .* found 0.05"):
        PhysicalModel(*tiny.tables(), schedule)
    base, pairs = tiny.tables()
    short = dataclasses.replace(pairs, sigma_knots=np.array([0.0, 0.01, 0.04]))
    with pytest.raises(InputError, match="operator: expected noise knots"):
        PhysicalModel(base, short, VESchedule(0.05))


# ------------------------------------------------------------------ tables and coordinates


def test_base_tables_round_trip(tmp_path):
    from openmm_diffforce.artefact import load_artefact

    base, _ = tiny.tables()
    loaded = load_artefact(tiny.export(tmp_path / "m")).model
    for model in (tiny.model(), loaded):
        found = base_tables(model, tiny.graph())
        for name in ("sigma_knots", "grid", "offsets", "coef"):
            assert np.array_equal(getattr(found, name), getattr(base, name))
        assert np.array_equal(found.coordinates.atoms, base.coordinates.atoms)
        assert found.wall_cells == base.wall_cells > 0


def test_base_tables_of_something_else():
    with pytest.raises(InputError, match="base_tables"):
        base_tables(torch.nn.Linear(1, 1), tiny.graph())
    with pytest.raises(InputError, match="base_tables"):
        base_tables(tiny.model(), MolecularGraph(("O", "H", "H"), ((0, 1), (0, 2))))


def test_internal_values_of_a_known_shape():
    """A chain with bonds of 0.1, right angles and a torsion of +90 degrees."""
    chain = MolecularGraph(("C", "N", "O", "F"), ((0, 1), (1, 2), (2, 3)))
    c = internal_coordinates(chain)
    x = 0.1 * np.array([[[1.0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 1, 1]]])
    q = internal_values(x, c)[0]
    role = np.array(c.role)[c.cls]
    np.testing.assert_allclose(q[role == "bond"], 0.1)
    np.testing.assert_allclose(q[role == "angle"], np.pi / 2)
    np.testing.assert_allclose(q[role == "1-3"], 0.1 * np.sqrt(2))
    np.testing.assert_allclose(q[role == "1-4"], 0.1 * np.sqrt(3))
    import mdtraj

    topology = mdtraj.Topology.from_dataframe(
        __import__("pandas").DataFrame({
            "serial": range(4), "name": list("CNOF"), "element": list("CNOF"), "resSeq": 1,
            "resName": "X", "chainID": 0, "segmentID": "",
        })
    )  # fmt: skip
    expected = mdtraj.compute_dihedrals(mdtraj.Trajectory(x, topology), [[0, 1, 2, 3]])[0, 0]
    np.testing.assert_allclose(q[role == "torsion"], expected, atol=1e-6)
    assert abs(abs(expected) - np.pi / 2) < 1e-6


def test_outside_fraction_of_hand_made_frames():
    """A bond with the domain [0.1, 0.2] nm and an angle that is always inside."""
    water = MolecularGraph(("O", "H", "F"), ((0, 1), (0, 2)))
    c = internal_coordinates(water)
    n_coefs = 5
    offsets = np.arange(c.n_classes + 1) * n_coefs
    grid = np.empty((2, c.n_classes, 3))
    for k, role in enumerate(c.role):
        lo, hi = {"bond": (0.1, 0.2), "angle": (0.0, np.pi), "1-3": (0.0, 9.0)}[role]
        grid[:, k] = (lo, (hi - lo) / (n_coefs - 3), 0.0)
    grid[1, :, 0] -= 0.05  # the second noise knot begins at 0.05 nm
    base = BaseTables(c, np.array([0.0, 0.01]), grid, offsets, np.zeros((2, offsets[-1])))

    def frame(a: float, b: float) -> list[list[float]]:
        return [[0, 0, 0], [a, 0, 0], [0, b, 0]]

    x = np.array([frame(0.15, 0.15), frame(0.11, 0.19), frame(0.09, 0.15), frame(0.15, 0.21)])
    assert outside_fraction(x, base) == (0.5, {"1-3": 0.0, "angle": 0.0, "bond": 0.5})
    assert outside_fraction(x, base, knot=1)[0] == 0.5  # 0.16 is now the top: 0.19 and 0.21
    assert outside_fraction(x[:2], base) == (0.0, {"1-3": 0.0, "angle": 0.0, "bond": 0.0})
    assert outside_fraction(x[2:], base)[0] == 1.0


def test_domain_is_the_data_without_the_wall():
    """One class by hand: 5 cells of 0.1 from 1.0, of which one on either side is wall."""
    pair = MolecularGraph(("O", "H"), ((0, 1),))
    c = internal_coordinates(pair)
    grid = np.array([[[1.0, 0.1, 3.0]]] * 2)
    base = BaseTables(c, np.array([0.0, 0.01]), grid, np.array([0, 8]), np.zeros((2, 8)), wall_cells=1)
    low, high = base.domain()
    np.testing.assert_allclose([low[0], high[0]], [1.1, 1.4])
    x = np.array([[[0, 0, 0], [r, 0, 0]] for r in (1.05, 1.15, 1.35, 1.45)])
    assert outside_fraction(x, base) == (0.5, {"bond": 0.5})


def test_training_frames_are_inside():
    assert outside_fraction(tiny.frames()[0], tiny.tables()[0])[0] == 0.0
    assert outside_fraction(1.3 * tiny.frames()[0], tiny.tables()[0])[0] == 1.0


# ------------------------------------------------------------------ the contract


def test_default_fields_of_a_model():
    class Springs(ActionModel):
        def forward(self, x: torch.Tensor, t: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
            return 0.5 * (1 + lam) * (x**2).sum((1, 2))

    class Free(ActionModel):
        def forward(self, x: torch.Tensor, t: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
            return 0.5 * (x**2).sum((1, 2))

    x, t, lam = batch()
    action, gradient, d_lam = Springs().fields(x, t, lam)
    assert not action.requires_grad
    close(gradient, (1 + lam)[:, None, None] * x)
    close(d_lam, 0.5 * (x**2).sum((1, 2)))
    close(operator_gradient(Springs(), x, t, lam), x)
    assert not Free().fields(x, t, lam)[2].any()
    with pytest.raises(NotImplementedError):
        ActionModel()(x, t, lam)
