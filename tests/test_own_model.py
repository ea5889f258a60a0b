"""Your own module as a model: wrapped, examined, exported, and run in OpenMM by both backends."""

import json

import numpy as np
import openmm
import pytest
import torch
from openmm import app

from openmm_diffforce.artefact import export_artefact, load_artefact
from openmm_diffforce.errors import InputError, ModelError, NotConservativeError
from openmm_diffforce.exchange import run_expanded_ensemble, run_replica_exchange
from openmm_diffforce.force import DiffusionForce, available_backends
from openmm_diffforce.models.action import ActionModel, AutogradAction, ScoreModel, model_fields
from openmm_diffforce.models.examine import SHAKE, _random_chain, examine_model, made_up_frames
from openmm_diffforce.models.graph import MolecularGraph
from openmm_diffforce.schedule import VESchedule
from openmm_diffforce.testing import assert_forces_match_energy, assert_parameter_derivative
from openmm_diffforce.windows import run_windows

WATER = MolecularGraph(("O", "H", "H"), ((0, 1), (0, 2)), ("O", "H1", "H2"))
X = np.array([[0.0, 0.0, 0.0], [0.096, 0.0, 0.0], [-0.024, 0.093, 0.0]])
BACKENDS = [
    pytest.param(name, marks=pytest.mark.torchforce if name == "torchforce" else ())
    for name in ("torchforce", "python")
]
Tensor = torch.Tensor


def length(d: Tensor) -> Tensor:
    return (d * d).sum(1).sqrt()


class Distances(torch.nn.Module):
    """A small network of the three distances, softened with t, scaled with lam."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(
            dtype
        )

    def forward(self, x: Tensor, t: Tensor, lam: Tensor) -> Tensor:
        d = torch.stack([length(x[:, 0] - x[:, 1]), length(x[:, 0] - x[:, 2]),
                         length(x[:, 1] - x[:, 2])], dim=1)  # fmt: skip
        spring = 2e4 * ((d[:, :2] - 0.096) ** 2).sum(1) + 500.0 * (d[:, 2] - 0.15) ** 2
        return spring / (1 + t) + (1 + lam) * self.net(10 * d).squeeze(1)


class Squeeze(torch.nn.Module):
    """A score that is no gradient: a spring in the plane of the molecule plus a swirl about it."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        u, v = x[:, 1] - x[:, 0], x[:, 2] - x[:, 0]
        normal = torch.linalg.cross(u, v) * 1e2
        swirl = torch.linalg.cross(normal[:, None].expand_as(x), x)
        return -1e3 * x + 1e3 * swirl


def topology() -> app.Topology:
    top = app.Topology()
    residue = top.addResidue("HOH", top.addChain())
    atoms = [top.addAtom(n, app.Element.getBySymbol(n[0]), residue) for n in WATER.names]
    for i, j in WATER.bonds:
        top.addBond(atoms[i], atoms[j])
    return top


def export(path, model, **options):
    export_artefact(model, path, graph=WATER, schedule=VESchedule(0.02), temperature=300.0, **options)
    return path


def context_of(path, mode, backend):
    system = openmm.System()
    for mass in (16.0, 1.0, 1.0):
        system.addParticle(mass)
    force = DiffusionForce(path, topology=topology(), mode=mode, backend=backend)
    system.addForce(force)
    context = openmm.Context(
        system,
        openmm.LangevinMiddleIntegrator(300, 1, 0.0005),
        openmm.Platform.getPlatformByName("Reference"),
    )
    context.setPositions(X)
    return context, force


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return export(tmp_path_factory.mktemp("own") / "own.diffforce", Distances())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["add", "operator"])
def test_a_plain_module_becomes_a_force(path, mode, backend):
    context, force = context_of(path, mode, backend)
    for lam, noise in ((0.0, 0.0), (0.7, 0.5)):
        context.setParameter(force.parameter("lambda"), lam)
        context.setParameter(force.parameter("noise"), noise)
        if mode == "add" or lam > 0:
            assert_forces_match_energy(context)
        assert_parameter_derivative(context, force.parameter("lambda"), force.energy_derivative(context))
    force.check(context)
    context.getIntegrator().step(200)  # TorchScript's optimised plan, after profiling
    assert_forces_match_energy(context)


class Transposed(ActionModel):
    """A gradient that lies transposed in memory, as einsum and permute leave it."""

    def forward(self, x: Tensor, t: Tensor, lam: Tensor) -> Tensor:
        return self.fields(x, t, lam)[0]

    @torch.jit.export
    def fields(self, x: Tensor, t: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d = x - x.mean(1, keepdim=True)
        gradient = (100 * d).transpose(1, 2).contiguous().transpose(1, 2)
        return 50 * (d * d).sum((1, 2)), gradient, torch.zeros_like(lam)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_in_memory_does_not_matter(tmp_path, backend):
    context, _ = context_of(export(tmp_path / "m", Transposed()), "add", backend)
    assert_forces_match_energy(context)


def test_wrapped_by_hand_or_by_the_export_it_is_the_same(path, tmp_path):
    artefact = load_artefact(path)
    by_hand = load_artefact(export(tmp_path / "m", AutogradAction(Distances())))
    for a, b in zip(*(model_fields(m.model, X[None], t=0.3, lam=0.4) for m in (artefact, by_hand)),
                    strict=True):  # fmt: skip
        np.testing.assert_array_equal(a, b)
    direct = model_fields(AutogradAction(Distances()), X[None], t=0.3, lam=0.4)
    for a, b in zip(direct, model_fields(artefact.model, X[None], t=0.3, lam=0.4), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    assert artefact.metadata["conservative"] is True
    assert not any(p.requires_grad for p in artefact.model.parameters())


def test_no_grad_gives_one_clear_error(path):
    zero = torch.zeros(1, dtype=torch.float64)
    with torch.no_grad(), pytest.raises(Exception, match=r"outside torch\.no_grad"):
        load_artefact(path).model.fields(torch.as_tensor(X[None]), zero, zero)


def test_a_module_that_does_not_compile_is_told_where(tmp_path):
    class NoP(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, lam: Tensor) -> Tensor:
            return x.norm(dim=1).sum(1)

    with pytest.raises(ModelError, match=r"test_own_model\.py.*, line \d+.*return x\.norm\(dim=1\)"):
        export(tmp_path / "m", NoP())


def test_a_module_without_lambda_has_mode_add_only(tmp_path):
    path = export(tmp_path / "m", AutogradAction(Distances(), has_operator=False))
    with pytest.raises(ModelError, match='use mode="add"'):
        DiffusionForce(path, topology=topology(), mode="operator")


def test_a_traced_module(tmp_path):
    two = torch.as_tensor(np.stack([X, 1.1 * X]))
    zero = torch.zeros(2, dtype=torch.float64)
    traced = torch.jit.trace(Distances(), (two, zero, zero))
    path = export(tmp_path / "m", AutogradAction(traced))
    for a, b in zip(*(model_fields(m, np.repeat(X[None], 5, 0)) for m in
                      (load_artefact(path).model, AutogradAction(Distances()))), strict=True):  # fmt: skip
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------ a bare score


@pytest.fixture(scope="module")
def score_path(tmp_path_factory):
    return export(tmp_path_factory.mktemp("score") / "swirl.diffforce", ScoreModel(Squeeze()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bare_score_is_a_force(score_path, backend):
    context, force = context_of(score_path, "add", backend)
    state = context.getState(forces=True, energy=True)
    kt = 300.0 * 0.00831446261815324
    expected = kt * Squeeze()(torch.as_tensor(X[None]), torch.zeros(1)).numpy()[0]
    np.testing.assert_allclose(state.getForces(asNumpy=True)._value, expected, rtol=1e-6)
    assert np.isnan(state.getPotentialEnergy()._value)
    assert not force.conservative
    context.getIntegrator().step(10)
    assert np.isfinite(context.getState(positions=True).getPositions(asNumpy=True)._value).all()


def test_a_bare_score_is_never_an_energy(score_path, tmp_path):
    with pytest.raises(ModelError, match="no operator"):
        DiffusionForce(score_path, topology=topology(), mode="operator")
    context, force = context_of(score_path, "add", "python")
    with pytest.raises(NotConservativeError, match="dE/dlambda"):
        force.energy_derivative(context)
    system = context.getSystem()
    with pytest.raises(NotConservativeError, match=r"reduced potentials.*swirl\.diffforce"):
        run_windows(
            system, topology(), X, [{force.parameter("lambda"): v} for v in (0.0, 1.0)], temperature=300.0,
            out_dir=tmp_path / "run", n_frames=2, learned=force, progress=False,
        )  # fmt: skip
    for sampler in (run_replica_exchange, run_expanded_ensemble):
        with pytest.raises(NotConservativeError, match="reduced potentials"):
            sampler(
                system, topology(), X, [{force.parameter("lambda"): v} for v in (0.0, 1.0)],
                temperature=300.0, out_dir=tmp_path / "run", n_iterations=2, learned=force, progress=False,
            )  # fmt: skip
    assert not (tmp_path / "run").exists()
    system = openmm.System()
    for mass in (16.0, 1.0, 1.0):
        system.addParticle(mass)
    force = DiffusionForce(score_path, topology=topology(), mode="add", backend="python")
    system.addForce(force)
    system.setDefaultPeriodicBoxVectors(*np.eye(3) * 3)
    box = openmm.NonbondedForce()
    box.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    for _ in range(3):
        box.addParticle(0, 0.1, 0)
    system.addForce(box)
    system.addForce(openmm.MonteCarloBarostat(1, 300))
    context = openmm.Context(system, openmm.LangevinMiddleIntegrator(300, 1, 0.0005),
                             openmm.Platform.getPlatformByName("Reference"))  # fmt: skip
    with pytest.raises(NotConservativeError, match="MonteCarloBarostat"):
        force.check(context)


# ------------------------------------------------------------------ the examination


class Centred(ActionModel):
    """Base of broken models: fields by hand."""

    def forward(self, x: Tensor, t: Tensor, lam: Tensor) -> Tensor:
        return self.fields(x, t, lam)[0]

    def fields(self, x: Tensor, t: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError


class Moves(Centred):
    @torch.jit.export
    def fields(self, x: Tensor, t: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return 50 * (x * x).sum((1, 2)), 100 * x, torch.zeros_like(lam)


class Turns(Centred):
    @torch.jit.export
    def fields(self, x: Tensor, t: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = (x - x.mean(1, keepdim=True)) * torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype)
        return 50 * (x * x).sum((1, 2)), 100 * x * torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype), 0 * lam


class WrongFactor(Centred):
    """The upstream classic: E = k x^2 with F = -k x."""

    @torch.jit.export
    def fields(self, x: Tensor, t: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x - x.mean(1, keepdim=True)
        return 100 * (x * x).sum((1, 2)), 100 * x, torch.zeros_like(lam)


class WrongLambda(Centred):
    @torch.jit.export
    def fields(self, x: Tensor, t: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x - x.mean(1, keepdim=True)
        square = 50 * (x * x).sum((1, 2))
        return square * (1 + lam * lam), 100 * x * (1 + lam * lam)[:, None, None], square


class MixesFrames(Centred):
    @torch.jit.export
    def fields(self, x: Tensor, t: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x - x.mean(1, keepdim=True)
        x = x - x.mean(0, keepdim=True)  # a batch norm left in training mode does this
        return 50 * (x * x).sum((1, 2)), 100 * x, torch.zeros_like(lam)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (Moves, ModelError, "invariance: translation: expected at most"),
        (Turns, ModelError, "invariance: rotation: expected at most"),
        (WrongFactor, NotConservativeError, "dS/dx is not the derivative of S"),
        (WrongLambda, ModelError, "dS/dlam is not the derivative of S"),
        (MixesFrames, ModelError, "other frames of its batch"),
    ],
)
def test_what_an_export_refuses(tmp_path, model, error, message):
    with pytest.raises(error, match=message):
        export(tmp_path / "m", model())
    assert not list(tmp_path.iterdir())


class GoodAtHome(torch.nn.Module):
    """Springs; an open molecule feels its orientation, as a search that finds now this mode, now that."""

    def forward(self, x: Tensor, t: Tensor, lam: Tensor) -> Tensor:
        a, b, c = x[:, 1] - x[:, 0], x[:, 2] - x[:, 0], x[:, 1] - x[:, 2]
        spring = (length(a) - 0.096) ** 2 + (length(b) - 0.096) ** 2 + 0.1 * (length(c) - 0.12) ** 2
        strange = torch.relu(length(c) - 0.15) * c[:, 0]
        return 1e4 * (1 + lam) * (spring + strange**2)


def test_without_frames_the_examination_finds_a_geometry_of_its_own(tmp_path):
    chains = np.stack([_random_chain(WATER, seed) for seed in (1, 2)])
    model = AutogradAction(GoodAtHome())
    assert [f.name for f in examine_model(model, chains).failures] == ["invariance: rotation"]
    export(tmp_path / "m", model)
    frames = made_up_frames(model, WATER)
    np.testing.assert_array_equal(frames, made_up_frames(model, WATER))
    np.testing.assert_allclose(np.linalg.norm(frames[:, 1] - frames[:, 0], axis=-1), 0.096, atol=0.015)


@pytest.mark.parametrize("how", ["raises", "is NaN", "has no energy"])
def test_a_model_that_cannot_be_followed_downhill_is_examined_where_it_is(how):
    class Broken(Centred):
        conservative = how != "has no energy"

        def fields(self, x: Tensor, t: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if how == "raises":
                raise RuntimeError("no")
            return torch.full_like(lam, torch.nan), torch.full_like(x, torch.nan), lam

    chains = np.stack([_random_chain(WATER, seed) for seed in (1, 2)])
    np.testing.assert_allclose(made_up_frames(Broken(), WATER), chains, atol=6 * SHAKE)


def test_a_refusal_at_a_made_up_geometry_says_that_it_was_one(tmp_path):
    with pytest.raises(ModelError, match=r"made-up geometry: with equilibrium frames"):
        export(tmp_path / "m", Turns())
    with pytest.raises(ModelError) as caught:
        export(tmp_path / "m", Turns(), frames=X[None].repeat(2, 0))
    assert "made-up" not in str(caught.value)


def equilibrium(n: int) -> np.ndarray:
    """Exact frames of S = 50 |x - mean|^2."""
    x = np.random.default_rng(4).standard_normal((n, 3, 3)) / 10
    return x - x.mean(axis=1, keepdims=True)


class Gaussian(torch.nn.Module):
    def __init__(self, factor: float = 1.0, unit: float = 1.0) -> None:
        super().__init__()
        self.factor, self.unit = factor, unit

    def forward(self, x: Tensor, t: Tensor, lam: Tensor) -> Tensor:
        x = (x - x.mean(1, keepdim=True)) / self.unit
        return self.factor * 50 * (x * x).sum((1, 2))


@pytest.mark.parametrize(
    ("factor", "unit", "status"), [(1.0, 1.0, "ok"), (2.494, 1.0, "note"), (1.0, 10.0, "note")]
)
def test_units_show_in_the_equipartition_ratio(factor, unit, status):
    found = examine_model(AutogradAction(Gaussian(factor, unit)), equilibrium(400), equilibrium=True)
    finding = {f.name: f for f in found.findings}["equipartition ratio"]
    assert finding.status == status
    assert finding.value == pytest.approx(factor / unit**2, rel=0.1)
    assert not found.failures
    assert ("look at the units" in str(found)) == (status == "note")


def test_a_score_says_how_far_from_a_gradient_it_is():
    frames = np.repeat(X[None], 3, 0) + 0.005 * np.random.default_rng(0).standard_normal((3, 3, 3))

    class Pull(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return -100.0 * (x - x.mean(1, keepdim=True))

    skew = [
        {f.name: f.value for f in examine_model(ScoreModel(m), frames).findings}["asymmetry of the Jacobian"]
        for m in (Pull(), Squeeze())
    ]
    assert skew[0] < 1e-8
    assert skew[1] > 1e-2


def test_mirror_images_are_reported():
    x = np.random.default_rng(0).standard_normal((2, 4, 3)) * 0.1

    class Volume(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, lam: Tensor) -> Tensor:
            a, b, c = x[:, 1] - x[:, 0], x[:, 2] - x[:, 0], x[:, 3] - x[:, 0]
            return 1e3 * (a * torch.linalg.cross(b, c)).sum(1)

    for model, text in ((Volume(), "are told apart"), (Gaussian(), "look the same")):
        assert text in str(examine_model(AutogradAction(model), x))


def test_float32_is_held_to_its_own_precision(tmp_path):
    frames = np.stack([X, 1.05 * X])
    path = export(tmp_path / "m", Distances(torch.float32), frames=frames)
    assert load_artefact(path).metadata["dtype"] == "float32"


def test_the_file_keeps_what_was_found(path):
    findings = load_artefact(path).metadata["examination"]
    json.dumps(findings, allow_nan=False)
    assert {"gradient of the action", "invariance: rotation", "mirror images"} <= {
        f["name"] for f in findings
    }


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 4, 3)), np.zeros((3, 3)), np.full((1, 3, 3), np.nan), np.zeros((0, 3, 3))]
)
def test_bad_frames(tmp_path, frames):
    with pytest.raises(InputError, match=r"frames: expected shape|x: expected finite"):
        export(tmp_path / "m", Distances(), frames=frames)


def test_backends_are_what_the_tests_think():
    assert set(available_backends()) == {"torchforce", "python"}
