"""The network model: derivatives, symmetry, limits; its training; its export."""

import dataclasses
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import openmm
import pytest
import torch

from openmm_diffforce import network_training
from openmm_diffforce.alanine import TEMPERATURE
from openmm_diffforce.artefact import export_artefact, load_artefact
from openmm_diffforce.errors import ConvergenceError, InputError, ResumeError
from openmm_diffforce.force import DiffusionForce, available_backends
from openmm_diffforce.models.action import ActionModel, operator_gradient
from openmm_diffforce.models.envelope import EnvelopeAction
from openmm_diffforce.models.graph import MolecularGraph
from openmm_diffforce.models.network import NetworkAction, ShapeNetwork
from openmm_diffforce.models.stiff import ShapeCoordinates, StiffDenoiser
from openmm_diffforce.network_training import NetworkSettings, fit_denoiser, fit_network
from openmm_diffforce.posterior import posterior_mode
from openmm_diffforce.schedule import VESchedule, VPSchedule
from openmm_diffforce.systems import make_context
from openmm_diffforce.testing import assert_forces_match_energy, assert_parameter_derivative

from . import tiny

F64 = torch.float64
SCHEDULES: dict[str, Any] = {
    "VE": VESchedule(0.02),
    "VP": VPSchedule(beta_min=0.1, beta_max=1.0, length=0.02),  # sigma/alpha = 0.017 nm at t = 1
}
SMALL = NetworkSettings(width=8, channels=2, n_steps=6, batch=4, check_every=2)
REL_F64 = 1e-10
REL_F32 = 2e-4


@cache
def denoiser() -> StiffDenoiser:
    return fit_denoiser(tiny.frames()[0], tiny.graph())


@cache
def network(kind: str = "VE", residual: bool = False) -> NetworkAction:
    """A small network with random weights everywhere, trained by nobody."""
    base = EnvelopeAction(tiny.model("VE"), denoiser(), SCHEDULES[kind]) if residual else None
    model = NetworkAction(
        tiny.graph(), tiny.case().perturbed, denoiser(), SCHEDULES[kind], base=base, width=8,
        channels=2, operator_mean=-1.0, operator_spread=2.0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    for part in (model.base_network, model.operator_network):
        part.initialise(tiny.frames()[0], generator)
        with torch.no_grad():
            for weight in (part.last, part.additive, part.bias):
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator, dtype=F64))
    return model.requires_grad_(False)


def batch(n: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Frames noised by 5 pm, times and lambdas from 0 to 1."""
    noise = np.random.default_rng(2).standard_normal((n, tiny.graph().n_atoms, 3))
    x = torch.as_tensor(tiny.frames()[0][:n] + 5e-3 * noise)
    return x, torch.linspace(0, 1, n, dtype=F64), torch.linspace(1, 0, n, dtype=F64)


def close(found: torch.Tensor, expected: torch.Tensor, relative: float = REL_F64) -> None:
    size = float(expected.abs().max())
    assert size > 0
    assert float((found - expected).abs().max()) <= relative * size


def flat(end: int, n: int, t: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((n,), t, dtype=F64), torch.full((n,), float(end), dtype=F64)


# --------------------------------------------------------------- coordinates and denoiser


def test_shape_coordinates_against_autograd():
    coordinates = ShapeCoordinates(
        np.array([[0, 1], [1, 3]]),
        np.array([[0, 1, 3], [3, 2, 1]]),
        np.array([[0, 1, 2, 3], [3, 1, 0, 2]]),
        4,
    )
    generator = torch.Generator().manual_seed(1)
    x, v = (torch.randn(3, 4, 3, generator=generator, dtype=F64) for _ in range(2))
    weight = torch.randn(3, 6, generator=generator, dtype=F64)
    a, b = x[0, 1] - x[0, 0], x[0, 2] - x[0, 1]
    by_hand = torch.dot(a, torch.linalg.cross(b, x[0, 3] - x[0, 2]))
    close(coordinates.values(x)[0, 4], by_hand)
    close(coordinates.values(x)[:, 0] ** 2, ((x[:, 0] - x[:, 1]) ** 2).sum(1) + 1e-4)

    def total(y):
        return (weight * coordinates.values(y)).sum()

    gradient = torch.autograd.functional.jacobian(total, x)
    close(coordinates.pullback(x, weight), gradient)
    close(coordinates.push(x, v), torch.autograd.functional.jvp(coordinates.values, x, v)[1])
    close(torch.einsum("fi,fid->fd", weight, coordinates.jacobian(x)), gradient.flatten(1))
    close(coordinates.curvature(x, weight, v), torch.autograd.functional.hvp(total, x, v)[1])
    one = torch.eye(12, dtype=F64).reshape(12, 1, 4, 3).expand(-1, 3, -1, -1)
    trace = sum((coordinates.curvature(x, weight, e) * e).sum((1, 2)) for e in one)
    close((weight * coordinates.laplacian(x)).sum(1), trace)


def test_denoiser_recovers_a_harmonic_molecule():
    """Three atoms on springs: the fitted stiffness is the springs', the denoised bond is the mean."""
    generator = np.random.default_rng(0)
    graph = type(tiny.graph())(("O", "H", "H"), ((0, 1), (0, 2)))
    bond = 0.1 + generator.standard_normal((4000, 2)) / np.sqrt(1e5)
    angle = 1.9 + 0.05 * generator.standard_normal(4000)
    x = np.zeros((4000, 3, 3))
    x[:, 1, 0] = bond[:, 0]
    x[:, 2, 0], x[:, 2, 1] = bond[:, 1] * np.cos(angle), bond[:, 1] * np.sin(angle)
    found = fit_denoiser(x, graph)
    assert float(found.root[0]) ** 2 == pytest.approx(1e5, rel=0.15)
    y = torch.as_tensor(x[:200] + 0.01 * generator.standard_normal((200, 3, 3)))
    denoised = found.denoise(y, torch.full((200,), 0.01, dtype=F64))[0][-1]
    before, after = (np.linalg.norm(z[:, 0] - z[:, 1], axis=1).std() for z in (y.numpy(), denoised.numpy()))
    assert after < 0.25 * before


def test_denoiser_at_no_noise_is_the_identity():
    x, _, _ = batch()
    xs, _, us, w = denoiser().denoise(x, torch.zeros(len(x), dtype=F64))
    assert torch.equal(xs[-1], x)
    energy = denoiser().energy(torch.zeros(len(x), dtype=F64), us, w)
    close(energy, 0.5 * (denoiser().residual(x) ** 2).sum(1))


# ------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("kind", ["VE", "VP"])
@pytest.mark.parametrize("residual", [False, True])
def test_fields_are_the_derivatives_of_forward(kind, residual):
    model = network(kind, residual)
    for found, expected in zip(model.fields(*batch()), ActionModel.fields(model, *batch()), strict=True):
        assert found.shape == expected.shape
        # the mode of a residual's base is searched to a tolerance
        close(found, expected, 1e-7 if residual else REL_F64)


def test_operator_gradient_against_autograd():
    model = network("VP")
    x, t, lam = batch()
    x.requires_grad_(True)
    lam.requires_grad_(True)
    (operator,) = torch.autograd.grad(model(x, t, lam).sum(), lam, create_graph=True)
    (gradient,) = torch.autograd.grad(operator.sum(), x)
    close(operator_gradient(model, x.detach(), t, lam.detach()), gradient)


def test_operator_gradient_of_a_residual_is_the_slope_of_its_operator():
    model = network("VE", True)
    x, t, lam = batch()
    found = operator_gradient(model, x, t, lam)
    direction = torch.as_tensor(np.random.default_rng(4).standard_normal(x.shape))

    def along(h: float) -> torch.Tensor:
        return model.fields(x + h * direction, t, lam)[2]

    h = 2e-6
    numeric = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
    close((found * direction).sum((1, 2)), numeric, 1e-4)


def test_float32():
    double = network()
    import copy

    single = copy.deepcopy(double).float()
    arguments = batch()
    for found, expected in zip(
        single.fields(*(a.float() for a in arguments)), double.fields(*arguments), strict=True
    ):
        assert found.dtype == torch.float32
        close(found.double(), expected, REL_F32)


@pytest.mark.parametrize("residual", [False, True])
def test_torchscript_is_eager(residual):
    model = network("VE", residual)
    script = torch.jit.script(model)
    for found, expected in zip(script.fields(*batch()), model.fields(*batch()), strict=True):
        close(found, expected)
    close(script.operator_gradient(*batch()), model.operator_gradient(*batch()))
    close(script(*batch()), model(*batch()))


def test_features_of_the_closed_form_start_against_autograd():
    """Gradients and Laplacians of the single-coordinate functions, on a molecule of four atoms."""
    graph = MolecularGraph(("H", "O", "O", "H"), ((0, 1), (1, 2), (2, 3)))
    part = ShapeNetwork(graph, (), width=4, channels=3, scale=[1.0]).requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(20, 4, 3, generator=generator, dtype=F64)
    part.initialise(x.numpy(), generator)
    x = x[:2]
    values, gradients, laplacians = part.features(x)
    weight = torch.randn(values.shape[1], generator=generator, dtype=F64)

    def total(y):
        return (part.pooled(part.embed(y)[0]) @ weight).sum()

    close(values @ weight, part.pooled(part.embed(x)[0]) @ weight)
    gradient = torch.autograd.functional.jacobian(total, x)
    close(torch.einsum("fkd,k->fd", gradients, weight), gradient.flatten(1))
    hessian = torch.autograd.functional.hessian(total, x[:1]).reshape(12, 12)
    close(laplacians[0] @ weight, hessian.trace())


# ----------------------------------------------------------------------------- symmetry


def test_moves_and_rotations_leave_the_action_alone_reflections_do_not():
    model = network()
    x, t, lam = batch()
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0]
    rotation = torch.as_tensor(rotation * np.sign(np.linalg.det(rotation)))
    action, gradient, operator = model.fields(x, t, lam)
    moved, turned, same = model.fields(x @ rotation + 0.3, t, lam)
    close(moved, action, 1e-9)
    close(same, operator, 1e-9)
    close(turned, gradient @ rotation, 1e-8)
    mirrored = model(x * torch.tensor([-1.0, 1.0, 1.0], dtype=F64), t, lam)
    assert float((mirrored - action).abs().max()) > 1e-3


def test_exchange_of_equivalent_hydrogens():
    """Any two hydrogens of a methyl group for S_0; for the operator, not the perturbed one."""
    x, t, lam = batch()
    hydrogens = {}
    for a in tiny.case().topology.atoms():
        hydrogens[a.residue.name, a.name] = a.index
    model = network()
    exchanges = (
        (("ACE", "H1"), ("ACE", "H2"), False),
        (("ALA", "HB2"), ("ALA", "HB3"), False),
        (("ALA", "HB1"), ("ALA", "HB2"), True),
    )
    for first, second, perturbed in exchanges:
        i, j = hydrogens[first], hydrogens[second]
        swapped = x.clone()
        swapped[:, [i, j]] = x[:, [j, i]]
        zero = torch.zeros_like(lam)
        close(model(swapped, t, zero), model(x, t, zero), 1e-9)
        difference = float((model(swapped, t, lam) - model(x, t, lam)).abs().max())
        assert (difference > 1e-6) == perturbed


# ------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("residual", [False, True])
def test_linear_in_lambda_without_noise_and_concave_with_it(residual):
    model = network("VE", residual)
    x, _, _ = batch()
    t = torch.zeros(len(x), dtype=F64)
    low, middle, high = (model.fields(x, t, t + lam)[2] for lam in (0.0, 0.5, 1.0))
    close(low, high)
    t = t + 0.8
    low, middle, high = (model.fields(x, t, t * 0 + lam)[2] for lam in (0.0, 0.5, 1.0))
    assert (low > middle).all()
    assert (middle > high).all()
    rise = model(x, t, t * 0 + 1) - model(x, t, t * 0)
    assert (rise <= low + 1e-9).all()  # the bracket O_1 <= S_1 - S_0 <= O_0
    assert (rise >= high - 1e-9).all()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.8])
def test_increment_is_the_difference_in_lambda(residual, noise):
    model = network("VP", residual)
    x, t, lam = batch()
    t = torch.full_like(t, noise)
    with_lam, without = model.fields(x, t, lam), model.fields(x, t, 0 * lam)
    action, gradient, operator = model.increment_fields(x, t, lam)
    np.testing.assert_allclose(action, with_lam[0] - without[0], atol=1e-8)
    np.testing.assert_allclose(gradient, with_lam[1] - without[1], atol=1e-6)
    close(operator, with_lam[2])


def test_a_residual_without_noise_is_its_base():
    model = network("VE", True)
    x, _, lam = batch()
    t = torch.zeros_like(lam)
    for found, expected in zip(model.fields(x, t, lam), tiny.model().fields(x, t, lam), strict=True):
        assert torch.equal(found, expected)


def test_an_untrained_residual_is_its_noised_base():
    x_0 = tiny.frames()[0]
    base = tiny.model()
    model = NetworkAction(tiny.graph(), tiny.case().perturbed, denoiser(), SCHEDULES["VE"],
                          base=EnvelopeAction(base, denoiser(), SCHEDULES["VE"]))  # fmt: skip
    model.base_network.initialise(x_0, torch.Generator().manual_seed(0))
    model.operator_network.initialise(x_0, torch.Generator().manual_seed(0))
    model.requires_grad_(False)
    for found, expected in zip(model.fields(*batch()), model.base.fields(*batch()), strict=True):
        assert float((found - expected).abs().max()) <= 1e-3  # kT; the corner of D


def test_envelope_is_the_posterior_mode():
    """One scalar search against the reference with full Hessians, both ends."""
    model = EnvelopeAction(tiny.model(), denoiser(), SCHEDULES["VE"])
    y, _, _ = batch(2)
    t = SCHEDULES["VE"].t_of_sigma(0.005)
    for end in (0, 1):
        want = posterior_mode(tiny.model(), y.numpy(), 0.005, lam=float(end))
        times, lam = flat(end, 2, t)
        action, gradient, operator = model.fields(y, times, lam)
        close(action, torch.as_tensor(want.action), 1e-8)
        close(-gradient, torch.as_tensor(want.score), 1e-5)
        close(operator, torch.as_tensor(want.operator), 1e-5)
        found = model.operator_gradient(y, times, lam)
        close(found, torch.as_tensor(want.operator_gradient), 1e-3)  # its Hessian is by differences


# ------------------------------------------------------------------------------ training


def fitted(seed: int = 7, **arguments: Any) -> tuple[NetworkAction, dict[str, Any]]:
    return fit_network(
        *tiny.frames(), tiny.graph(), tiny.case().perturbed, SCHEDULES["VE"],
        **{"seed": seed, "settings": SMALL, **arguments},
    )  # fmt: skip


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.flatten() for p in model.parameters()])


def test_training_lowers_the_held_out_loss():
    settings = dataclasses.replace(SMALL, n_steps=40, check_every=10, batch=8, learning_rate=0.02)
    with mock.patch.object(network_training, "_start"):  # from zero: the steps have work to do
        model, record = fitted(settings=settings)
    losses = [loss for _, loss in record["losses"]]
    assert min(losses) < losses[0] - 0.02 * abs(losses[0])
    assert record["best_step"] > 0
    _, gradient, _ = model.fields(torch.as_tensor(tiny.frames()[0][:20]), *flat(0, 20))
    assert torch.isfinite(gradient).all()


def test_same_seed_same_weights_other_seed_others():
    first, record = fitted()
    state = torch.get_rng_state()
    again, record_again = fitted()
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    assert torch.equal(weights(first), weights(again))
    assert record["losses"] == record_again["losses"]
    other, _ = fitted(seed=8)
    assert not torch.equal(weights(first), weights(other))


@pytest.mark.parametrize("residual", [False, True])
def test_resumed_is_uninterrupted(tmp_path, residual):
    settings = dataclasses.replace(SMALL, n_steps=6)
    base = {"base": tiny.model() if residual else None, "settings": settings}
    x_0, o_0, x_1, o_1 = (v[:40] for v in tiny.frames())

    def run(**more: Any) -> tuple[NetworkAction, dict[str, Any]]:
        return fit_network(x_0, o_0, x_1, o_1, tiny.graph(), tiny.case().perturbed, SCHEDULES["VE"],
                           seed=7, **base, **more)  # fmt: skip

    whole, record = run()

    def stop(done: int, total: int, loss: float) -> None:
        if done == 3:
            raise KeyboardInterrupt

    path = tmp_path / "fit.checkpoint"
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=path, progress=stop)
    assert path.exists()
    seen = []
    resumed, record_resumed = run(checkpoint=path, progress=lambda done, *_: seen.append(done))
    assert seen == [3, 4, 5, 6]  # from the evaluation after step 2
    assert torch.equal(weights(whole), weights(resumed))
    assert record["losses"] == record_resumed["losses"]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_foreign_or_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / "fit.checkpoint"
    fitted(checkpoint=path)
    with pytest.raises(ResumeError, match="other frames, settings or another seed"):
        fitted(seed=8, checkpoint=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ResumeError, match="cannot be read"):
        fitted(checkpoint=path)


def test_training_stops_early_and_keeps_the_best():
    settings = dataclasses.replace(
        SMALL, n_steps=100, check_every=1, patience=2, learning_rate=0.3, decay=0.0
    )
    _, record = fitted(settings=settings)
    assert record["steps"] == record["best_step"] + 2 < 100
    assert record["held_out_loss"] == min(loss for _, loss in record["losses"])


def test_a_bar_is_shown(capsys):
    fitted(progress=True)
    assert "training" in capsys.readouterr().out


# ------------------------------------------------------------------------------ errors


def test_errors_at_the_door():
    x_0, o_0, x_1, o_1 = tiny.frames()
    graph, sites, schedule = tiny.graph(), tiny.case().perturbed, SCHEDULES["VE"]

    def fit(a=x_0, b=o_0, c=x_1, d=o_1, s=sites, sch=schedule, **more):
        return fit_network(a, b, c, d, graph, s, sch, seed=1, **{"settings": SMALL, **more})

    bad = x_0.copy()
    bad[3, 0, 0] = np.nan
    for arguments, message in (
        ({"a": bad}, "x_0: frame 3 has a coordinate that is not finite"),
        ({"c": x_1[:, :5]}, "x_1: expected coordinates of shape"),
        ({"b": o_0[:-1]}, "o_0: expected 150 finite operator values"),
        ({"s": (99,)}, "sites: expected different atom indices below 22"),
        ({"s": ()}, "sites: expected different atom indices"),
        ({"sch": VESchedule(0.05)}, "choose a narrower one"),
        ({"settings": dataclasses.replace(SMALL, batch=0)}, "settings.batch: expected a whole number"),
        ({"settings": dataclasses.replace(SMALL, learning_rate=-1.0)}, "learning_rate > 0"),
        ({"settings": dataclasses.replace(SMALL, holdout=1.0)}, "holdout: expected a fraction"),
        ({"a": x_0[:2], "b": o_0[:2]}, "at least 5 frames"),
    ):
        with pytest.raises(InputError, match=message):
            fit(**arguments)


def test_frames_all_alike_are_refused():
    alike = np.repeat(tiny.frames()[0][:1], 10, axis=0)
    with pytest.raises(ConvergenceError, match="all alike"):
        fit_denoiser(alike, tiny.graph())


def test_a_loss_that_is_not_finite_is_refused():
    with (
        mock.patch.object(
            network_training, "_loss", lambda *a: sum(p.sum() for p in a[0].parameters()) * np.nan
        ),
        pytest.raises(ConvergenceError, match="held-out loss is nan"),
    ):
        fitted()


# ------------------------------------------------------------------------------ as a force


@pytest.mark.parametrize(("residual", "mode"), [(False, "add"), (False, "operator"), (True, "operator")])
@pytest.mark.parametrize("backend", ["torchforce", "python"])
def test_force_of_an_exported_network(tmp_path, residual, mode, backend):
    if available_backends()[backend] != "ok":
        pytest.skip(available_backends()[backend])
    case = tiny.case()
    path = tmp_path / "network.diffforce"
    model = network("VP", residual)
    export_artefact(model, path, graph=tiny.graph(), schedule=SCHEDULES["VP"], temperature=TEMPERATURE)
    loaded = load_artefact(path)
    for found, expected in zip(loaded.model.fields(*batch()), model.fields(*batch()), strict=True):
        close(found, expected)
    system = openmm.System()
    for atom in range(case.system_0.getNumParticles()):
        system.addParticle(case.system_0.getParticleMass(atom))
    force = DiffusionForce(path, topology=case.topology, mode=mode, backend=backend)
    system.addForce(force)
    context = make_context(system, temperature=TEMPERATURE, timestep=0.001, friction=1.0,
                           platform="Reference", seed=1)  # fmt: skip
    context.setPositions(tiny.frame())
    context.setParameter(force.parameter("lambda"), 0.3)
    for noise in (0.6,) if residual or mode == "add" else (0.0, 0.6):
        context.setParameter(force.parameter("noise"), noise)
        assert_forces_match_energy(context, atoms=[11], relative=1e-5)
        assert_parameter_derivative(context, force.parameter("lambda"),
                                    force.energy_derivative(context), relative=1e-5)  # fmt: skip
