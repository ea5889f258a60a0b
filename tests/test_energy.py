"""Energies from scores: every method against exact answers, orders, errors, constants, doors."""

import json
import math
from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np
import pandas as pd
import pytest
import torch
from openmm import app, unit
from typer.testing import CliRunner

from openmm_diffforce import cli, scores
from openmm_diffforce.artefact import export_artefact, load_artefact
from openmm_diffforce.energy import (
    METHODS,
    EnergyResult,
    action_energy,
    energies_of_model,
    learned_energy,
    sample_with_energy,
)
from openmm_diffforce.errors import InputError, ModelError, NotConservativeError, UnitsError
from openmm_diffforce.models.action import ActionModel, AutogradAction, ScoreModel, model_fields
from openmm_diffforce.models.graph import MolecularGraph
from openmm_diffforce.schedule import VESchedule, VPSchedule
from openmm_diffforce.scores import GRIDS, GaussianPrior, matched_prior, noise_grid, score_of
from openmm_diffforce.testing import GaussianMixture
from openmm_diffforce.units import thermal_energy

from . import tiny

SCHEDULES: dict[str, Any] = {"VE": VESchedule(10.0), "VP": VPSchedule(length=1.0)}
MIXTURE = GaussianMixture([[-1.0], [1.2]], [[[0.04]], [[0.16]]], weights=[0.3, 0.7])
GAUSSIAN = GaussianMixture([[0.4, -0.2]], [[[0.5, 0.2], [0.2, 0.3]]])
X = np.linspace(-1.6, 2.2, 9)[:, None]
PLANE = np.array([[0.0, 0.0], [1.0, -1.0], [-0.8, 0.5]])


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def solve(mixture: GaussianMixture, x: Any, schedule: Any, **arguments: Any) -> tuple[EnergyResult, Any]:
    """The result with the exact score and the matched prior, and its error."""
    arguments = {"prior": mixture.prior(), **arguments}
    found = learned_energy(mixture.score(schedule), x, schedule, **arguments)
    return found, found.log_density - mixture.log_density(x)


# ----------------------------------------------------------------------------- exact answers


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(
    "arguments",
    [
        {"solver": "heun", "n_steps": 100},
        {"solver": "rk4", "n_steps": 50},
        {"method": "stratonovich", "path": "noising", "n_paths": 2, "generator": rng()},
        {"method": "stratonovich", "path": "mean"},
        {"method": "stratonovich", "path": "flow"},
    ],
)
def test_smooth_methods_are_exact_on_a_gaussian(kind: str, arguments: Any) -> None:
    # of a Gaussian the noised Gaussian is the matched prior: nothing but the steps errs
    found, error = solve(GAUSSIAN, PLANE, SCHEDULES[kind], **arguments)
    assert np.abs(error).max() < 2e-2
    assert found.n_dim == 2
    assert not np.allclose(found.log_density, found.log_density[0])


@pytest.mark.parametrize("kind", SCHEDULES)
def test_flow_and_stratonovich_on_the_mixture(kind: str) -> None:
    # What the Gaussian at sigma = 10 misses of the mixture's third moment is 0.006 (VE).
    limit = {"VP": 1e-3, "VE": 1e-2}[kind]
    for arguments in (
        {"n_steps": 50},
        {"method": "stratonovich", "n_steps": 400, "n_paths": 2, "generator": rng()},
        {"method": "stratonovich", "n_steps": 100, "path": "mean", "extrapolate": True},
    ):
        _, error = solve(MIXTURE, X, SCHEDULES[kind], **arguments)
        assert np.abs(error).max() < limit, arguments


@pytest.mark.parametrize("method", ["ito", "backward_ito"])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_ito_sums_within_their_own_error(kind: str, method: str) -> None:
    found, error = solve(
        MIXTURE, X, SCHEDULES[kind], method=method, n_steps=500, n_paths=24, generator=rng(3)
    )
    z = error / found.standard_error
    assert np.abs(z).max() < 4
    assert 0.5 < math.sqrt((z**2).mean()) < 1.7
    assert (found.standard_error > 0.01).all()
    # ... and one path knows its own error, without a second one
    x = np.repeat(X[[1, 6]], 100, axis=0)
    found, error = solve(MIXTURE, x, SCHEDULES[kind], method=method, n_steps=300, generator=rng(4))
    z = error / found.standard_error
    assert 0.85 < math.sqrt((z**2).mean()) < 1.15
    bias = np.abs(found.discretisation.mean())
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(len(z)) + bias


def test_mmse_within_its_own_error() -> None:
    for schedule in SCHEDULES.values():
        found, error = solve(
            MIXTURE, X, schedule, method="mmse", n_steps=100, n_paths=100, generator=rng(5)
        )  # fmt: skip
        z = error / found.standard_error
        assert np.abs(z).max() < 4
        assert math.sqrt((z**2).mean()) < 1.7
    _, error = solve(GAUSSIAN, PLANE, SCHEDULES["VE"], method="mmse", n_paths=2, generator=rng(6))
    assert np.abs(error).max() < 1e-9  # against itself
    # what lies below the first noise, 0.5 kT in the narrow well here, is that of the first noise
    found, error = solve(
        MIXTURE, X[:1] * 0 - 1.0, SCHEDULES["VE"], method="mmse", sigma_min=0.15, n_steps=60, n_paths=1000,
        generator=rng(6),
    )  # fmt: skip
    assert abs(error[0]) < 0.25
    assert found.standard_error[0] < 0.05


@pytest.mark.parametrize("kind", SCHEDULES)
def test_reverse_sde_makes_samples_and_their_energies(kind: str) -> None:
    schedule = SCHEDULES[kind]
    made = sample_with_energy(
        MIXTURE.score(schedule), (1,), schedule, n_frames=400, n_steps=500, prior=MIXTURE.prior(),
        generator=rng(7),
    )  # fmt: skip
    error = made.energy.log_density - MIXTURE.log_density(made.x)
    z = error / made.energy.standard_error
    assert 0.85 < math.sqrt((z**2).mean()) < 1.15
    assert abs(z.mean()) < 0.25  # steps of the reverse SDE have a bias of their own
    low = float((made.x[:, 0] < 0).mean())
    assert abs(low - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 400)
    assert made.energy.method == "reverse"
    assert made.x.shape == (400, 1)


def test_a_missing_stochastic_integral_would_be_seen() -> None:
    """On other paths than the flow the integral of the score is several kT."""
    schedule = SCHEDULES["VP"]
    found, error = solve(MIXTURE, X, schedule, method="stratonovich", path="mean")
    assert np.abs(error).max() < 1e-2
    straight = np.linspace(0, 1, 401)[:, None, None] * (2.0 - X) + X  # to a place without any data
    t = noise_grid(schedule, 400)
    straight *= schedule.alpha(t).numpy()[:, None, None]
    found, error = solve(MIXTURE, X, schedule, method="stratonovich", path=straight, grid=t)
    assert np.abs(error).max() < 1e-2
    assert found.n_paths == 1


# ------------------------------------------------------------------------- orders, step halving


def test_orders_of_the_solvers() -> None:
    for solver, order in (("heun", 2), ("rk4", 4)):
        miss = []
        for n in (30, 60):
            _, error = solve(GAUSSIAN, PLANE, SCHEDULES["VP"], solver=solver, n_steps=n, halving=False)
            miss.append(np.abs(error).max())
        slopes = np.log2(np.array(miss[:-1]) / np.array(miss[1:]))
        assert slopes[-1] == pytest.approx(order, abs=0.35), (solver, miss)


@pytest.mark.parametrize(
    ("arguments", "order"),
    [
        ({"solver": "heun", "n_steps": 80}, 2),
        ({"solver": "rk4", "n_steps": 40}, 4),
        ({"method": "stratonovich", "path": "mean", "n_steps": 200}, 2),
    ],
)
def test_step_halving_knows_the_error(arguments: Any, order: int) -> None:
    schedule = SCHEDULES["VP"]
    found, _ = solve(MIXTURE, X, schedule, **arguments)
    fine, _ = solve(MIXTURE, X, schedule, method="flow", n_steps=160, halving=False)
    left = fine.log_density - found.log_density
    worst = np.abs(left).max()
    assert np.abs(found.discretisation).max() == pytest.approx(worst, rel=0.6)
    better, _ = solve(MIXTURE, X, schedule, extrapolate=True, **arguments)
    assert np.abs(fine.log_density - better.log_density).max() < 0.5 * worst
    np.testing.assert_allclose(better.log_density, found.log_density + found.discretisation)
    without, _ = solve(MIXTURE, X, schedule, halving=False, **arguments)
    assert np.isnan(without.discretisation).all()
    np.testing.assert_array_equal(without.log_density, found.log_density)


@pytest.mark.parametrize(
    "arguments", [{"solver": "heun", "n_steps": 240}, {"method": "stratonovich", "path": "mean"}]
)
def test_step_halving_is_right_where_steps_are_small(arguments: Any) -> None:
    found, error = solve(GAUSSIAN, PLANE, SCHEDULES["VP"], **arguments)
    np.testing.assert_allclose(found.discretisation, -error, rtol=0.12, atol=1e-7)


def test_brownian_stratonovich_has_a_bias_that_halving_takes_out() -> None:
    arguments = {"method": "stratonovich", "path": "brownian", "n_steps": 300, "n_paths": 64}
    _, error = solve(MIXTURE, X, SCHEDULES["VP"], generator=rng(8), **arguments)
    _, less = solve(MIXTURE, X, SCHEDULES["VP"], generator=rng(8), extrapolate=True, **arguments)
    assert np.abs(less).mean() < 0.5 * np.abs(error).mean()
    assert np.abs(error).max() < 0.1


# ------------------------------------------------------------------------ divergence, batches


def test_hutchinson_is_exact_in_mean_and_knows_its_error() -> None:
    schedule = SCHEDULES["VE"]
    x = np.repeat(PLANE[:1], 200, axis=0)
    common = {"n_steps": 20, "halving": False}
    exact, _ = solve(GAUSSIAN, x[:1], schedule, **common)
    found, _ = solve(GAUSSIAN, x, schedule, divergence="hutchinson", n_probes=4, generator=rng(9), **common)
    error = found.log_density - exact.log_density
    # the off-diagonal half of the Jacobian is all that random signs add
    assert found.standard_error.mean() > 0.02
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(len(x))
    assert math.sqrt((found.standard_error**2).mean()) == pytest.approx(error.std(), rel=0.15)
    assert found.n_products == 4 * found.n_score
    diagonal = GaussianMixture([[0.0, 0.0]], [[[0.5, 0.0], [0.0, 0.3]]])
    found, _ = solve(diagonal, PLANE, schedule, divergence="hutchinson", generator=rng(9), **common)
    assert found.standard_error.max() < 1e-9


def test_differences_stand_in_for_autograd() -> None:
    schedule = SCHEDULES["VP"]
    by_autograd, _ = solve(GAUSSIAN, PLANE, schedule, n_steps=10)
    score = GAUSSIAN.score(schedule)
    dead = learned_energy(
        lambda y, t: score(y.detach(), t).detach(), PLANE, schedule, prior=GAUSSIAN.prior(), n_steps=10,
        difference=1e-4,
    )  # fmt: skip
    np.testing.assert_allclose(dead.log_density, by_autograd.log_density, atol=1e-7)


@pytest.mark.parametrize(
    "arguments",
    [
        {"n_steps": 10, "divergence": "hutchinson"},
        {"n_steps": 20, "method": "stratonovich", "n_paths": 3},
        {"n_steps": 40, "method": "ito", "n_paths": 3, "divergence": "hutchinson"},
        {"n_steps": 40, "method": "backward_ito", "n_paths": 2},
        {"n_steps": 10, "method": "mmse", "n_paths": 3},
    ],
)
def test_batches_change_nothing(arguments: Any) -> None:
    two = GaussianMixture([[-0.5, 0.0], [0.8, 0.3]], 0.2)
    results = [
        solve(two, PLANE, SCHEDULES["VE"], batch_size=size, generator=rng(10), **arguments)[0]
        for size in (1, 4, 1000)
    ]
    for one in results[1:]:
        for name in ("log_density", "standard_error", "discretisation", "truncation"):
            np.testing.assert_allclose(
                getattr(one, name), getattr(results[0], name), rtol=1e-12, atol=1e-12
            )  # fmt: skip
        assert one.n_score == results[0].n_score
    other = solve(two, PLANE, SCHEDULES["VE"], generator=rng(11), **arguments)[0]
    assert not np.allclose(other.log_density, results[0].log_density, atol=1e-12)


def test_many_rows_and_few_are_differentiated_alike() -> None:
    """Few rows go into one call with a copy for each direction, many into one graph."""
    few, _ = solve(GAUSSIAN, PLANE, SCHEDULES["VE"], n_steps=4)
    x = np.tile(PLANE, (700, 1))
    assert len(x) > scores.ROWS_AT_ONCE
    many, _ = solve(GAUSSIAN, x, SCHEDULES["VE"], n_steps=4, batch_size=len(x))
    np.testing.assert_allclose(many.log_density, np.tile(few.log_density, 700), rtol=1e-12)
    assert many.n_products == 700 * few.n_products
    assert many.n_score == 700 * few.n_score


def test_counts_of_score_calls() -> None:
    schedule = SCHEDULES["VE"]
    rk4, _ = solve(GAUSSIAN, PLANE, schedule, n_steps=10, halving=False)
    assert (rk4.n_score, rk4.n_products) == (3 * 40, 3 * 40 * 2)
    heun, _ = solve(GAUSSIAN, PLANE, schedule, n_steps=10, solver="heun")
    assert heun.n_score == 3 * 30
    back, _ = solve(GAUSSIAN, PLANE, schedule, n_steps=10, method="backward_ito", generator=rng())
    assert (back.n_score, back.n_products) == (3 * 11, 0)


def test_float32_scores() -> None:
    schedule = SCHEDULES["VE"]
    seen = set()
    score = GAUSSIAN.score(schedule)

    def single(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.add((y.dtype, t.dtype))
        return score(y, t)

    found = learned_energy(single, PLANE, schedule, prior=GAUSSIAN.prior(), dtype=torch.float32)
    assert seen == {(torch.float32, torch.float32)}
    np.testing.assert_allclose(found.log_density, GAUSSIAN.log_density(PLANE), atol=1e-3)


# -------------------------------------------------------------------------- molecules, priors


N_ATOMS = 4


def gaussian_molecule() -> tuple[GaussianMixture, np.ndarray, np.ndarray]:
    """A Gaussian of 3 n coordinates, frames without their mean, ln p in the mean-free subspace."""
    generator = rng(12)
    root = 0.1 * generator.standard_normal((N_ATOMS, N_ATOMS))
    centre = np.eye(N_ATOMS) - 1 / N_ATOMS
    gram = centre @ (root @ root.T + 0.004 * np.eye(N_ATOMS)) @ centre  # nothing of the mean
    whole = GaussianMixture(np.zeros((1, 3 * N_ATOMS)), np.kron(gram + 0.3 / N_ATOMS, np.eye(3))[None])
    x = whole.sample(5, generator).reshape(5, N_ATOMS, 3)
    inside = x - x.mean(axis=1, keepdims=True)
    eigen = np.linalg.eigvalsh(gram)[1:]  # by hand: without the zero
    square = np.einsum("fia,ij,fja->f", inside, np.linalg.pinv(gram), inside)
    exact = -0.5 * square - 1.5 * np.log(2 * math.pi * eigen).sum()
    return whole, x, exact


@pytest.mark.parametrize("kind", SCHEDULES)
def test_mean_free_constants(kind: str) -> None:
    schedule = {"VE": VESchedule(2.0), "VP": VPSchedule(length=0.3)}[kind]
    whole, x, exact = gaussian_molecule()
    score = whole.score(schedule)  # knows nothing of the subspace
    prior = GaussianPrior(whole.prior().mean, whole.prior().covariance)
    for arguments in (
        {"n_steps": 40},
        {"method": "stratonovich", "path": "mean", "n_steps": 200},
        {"method": "mmse", "n_paths": 2, "generator": rng()},
    ):
        found = learned_energy(score, x, schedule, prior=prior, **arguments)
        assert found.n_dim == 3 * N_ATOMS - 3
        np.testing.assert_allclose(found.log_density, exact, atol=1e-2)
    moved = learned_energy(score, x + np.array([5.0, -3.0, 2.0]), schedule, prior=prior, n_steps=40)
    np.testing.assert_allclose(moved.log_density, exact, atol=1e-2)
    found = learned_energy(
        score, x, schedule, prior=prior, n_steps=40, divergence="hutchinson", n_probes=20, generator=rng()
    )
    assert (np.abs(found.log_density - exact) < 4 * found.standard_error + 5e-3).all()
    found = learned_energy(
        score, x, schedule, prior=prior, method="ito", n_steps=200, n_paths=10, generator=rng()
    )
    assert (np.abs(found.log_density - exact) < 5 * found.standard_error).all()
    free = learned_energy(score, x, schedule, prior=prior, mean_free=False, n_steps=40)
    np.testing.assert_allclose(free.log_density, whole.log_density(x), atol=1e-2)
    assert free.n_dim == 3 * N_ATOMS


def test_density_of_relative_positions() -> None:
    """The constant that the documentation gives: n^(3/2) between the two volumes."""
    whole, x, exact = gaussian_molecule()
    relate = np.kron(np.column_stack([-np.ones(N_ATOMS - 1), np.eye(N_ATOMS - 1)]), np.eye(3))
    c = relate @ whole.covariances[0] @ relate.T
    relative = GaussianMixture(np.zeros((1, len(c))), c[None])
    r = (x[:, 1:] - x[:, :1]).reshape(len(x), -1)
    np.testing.assert_allclose(relative.log_density(r), exact - 1.5 * math.log(N_ATOMS), atol=1e-9)


def test_sampling_a_molecule_keeps_its_mean() -> None:
    whole, _, _ = gaussian_molecule()
    schedule = VESchedule(2.0)
    made = sample_with_energy(
        whole.score(schedule), (N_ATOMS, 3), schedule, n_frames=200, n_steps=200, prior=whole.prior(),
        generator=rng(13),
    )  # fmt: skip
    assert np.abs(made.x.mean(axis=1)).max() < 1e-12
    assert made.energy.n_dim == 3 * N_ATOMS - 3
    # <|x|^2> of a Gaussian, and <ln p> = -entropy
    want = whole.prior().covariance
    centre = np.kron(np.eye(N_ATOMS) - 1 / N_ATOMS, np.eye(3))
    inside = centre @ want @ centre
    square = (made.x**2).sum((1, 2))
    assert abs(square.mean() - np.trace(inside)) < 4 * square.std() / math.sqrt(200) + 0.01 * np.trace(inside)


def test_matched_priors() -> None:
    generator = rng(14)
    prior = matched_prior(GAUSSIAN.sample(20000, generator))
    np.testing.assert_allclose(prior.mean, [0.4, -0.2], atol=0.03)
    np.testing.assert_allclose(prior.covariance, GAUSSIAN.covariances[0], atol=0.03)
    assert matched_prior([[0.0, 0.0], [2.0, 4.0]], isotropic=True).covariance == pytest.approx(2.5)
    whole, _, _ = gaussian_molecule()
    frames = whole.sample(4000, generator).reshape(-1, N_ATOMS, 3)
    prior = matched_prior(frames)
    centre = np.kron(np.eye(N_ATOMS) - 1 / N_ATOMS, np.eye(3))
    want = centre @ whole.covariances[0] @ centre
    np.testing.assert_allclose(prior.covariance, want, atol=0.05 * want.max())
    turned = frames @ np.linalg.qr(generator.standard_normal((3, 3)))[0]
    np.testing.assert_allclose(matched_prior(turned).covariance, prior.covariance, atol=1e-12)
    even = matched_prior(frames, isotropic=True)
    assert even.covariance == pytest.approx(np.trace(prior.covariance) / (3 * N_ATOMS - 3))


def test_truncation_says_what_lies_below_sigma_min() -> None:
    schedule = SCHEDULES["VE"]
    for tau in (0.02, 0.04):
        found, error = solve(MIXTURE, X, schedule, sigma_min=tau, n_steps=100)
        assert found.sigma_min == pytest.approx(tau)
        noised = GaussianMixture(MIXTURE.means, MIXTURE.covariances + tau**2, weights=MIXTURE.weights)
        np.testing.assert_allclose(found.log_density, noised.log_density(X), atol=1e-2)
        np.testing.assert_allclose(-error, found.truncation, atol=6e-3 + 0.1 * np.abs(error).max())
    vp = SCHEDULES["VP"]
    found, error = solve(MIXTURE, X, vp, sigma_min=0.04, n_steps=100)
    clean = np.log(float(vp.alpha(vp.t_of_sigma(0.04))))
    np.testing.assert_allclose(-error - clean, found.truncation, atol=2e-3 + 0.1 * np.abs(error).max())
    assert not solve(MIXTURE, X, schedule, n_steps=10)[0].truncation.any()


# --------------------------------------------------------------------------- models, tables


def test_scores_of_models() -> None:
    model = tiny.model()
    x = tiny.frames()[0][:2]
    score = score_of(model)
    y, t = torch.as_tensor(x), torch.full((2,), 0.3, dtype=torch.float64)
    _, gradient, _ = model_fields(model, x, t=0.3)
    np.testing.assert_allclose(score(y, t).numpy(), -gradient, rtol=1e-12)
    v = torch.as_tensor(rng(15).standard_normal(x.shape))
    moved = (score(y + 1e-6 * v, t) - score(y - 1e-6 * v, t)) / 2e-6
    exact = score.product(y, t, v)  # type: ignore[attr-defined]
    np.testing.assert_allclose(exact, moved, atol=1e-4 * float(exact.abs().max()))
    # A model without Hessian products is differentiated by differences; one that needs autograd, by it.
    bare = score_of(Springs())
    assert float((bare.product(y, t, v) - SPRING.score(y, t, v)).abs().max()) < 1e-5  # type: ignore[attr-defined]
    twice = score_of(AutogradAction(SpringModule()))
    at = y.clone().requires_grad_(True)
    (pull,) = torch.autograd.grad((twice(at, t) * v).sum(), at)
    np.testing.assert_allclose(pull, SPRING.score(y, t, v), atol=1e-9)
    single = score_of(AutogradAction(SpringModule().float()))(y, t)
    assert single.dtype == torch.float64
    np.testing.assert_allclose(single, SPRING.score(y, t, y), rtol=1e-5)
    with pytest.raises(InputError, match="expected a model of this package"):
        score_of(lambda y, t: y)
    with pytest.raises(InputError, match="step: expected a finite number above 0"):
        score_of(model, step=0.0)


class SpringModule(torch.nn.Module):
    """S = 50 |y - its mean|^2: a Gaussian in the mean-free subspace at any noise."""

    def __init__(self) -> None:
        super().__init__()
        self.k = torch.nn.Parameter(torch.tensor(50.0, dtype=torch.float64))

    def forward(self, x: torch.Tensor, t: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
        return self.k * ((x - x.mean(1, keepdim=True)) ** 2).sum((1, 2))


class Springs(ActionModel):
    def forward(self, x: torch.Tensor, t: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
        return 50.0 * ((x - x.mean(1, keepdim=True)) ** 2).sum((1, 2))


class SPRING:
    @staticmethod
    def score(y: torch.Tensor, t: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return -100.0 * (v - v.mean(1, keepdim=True))


def test_a_score_with_a_divergence_of_its_own() -> None:
    class Own:
        def __init__(self) -> None:
            self.inner = GAUSSIAN.score(SCHEDULES["VE"])

        def __call__(self, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.inner(y, t).detach()

        def divergence(self, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            spread = torch.as_tensor(np.linalg.eigvalsh(GAUSSIAN.covariances[0]))
            return -(1 / (spread + (10.0 * t**2)[:, None] ** 2)).sum(1)

    with_it = learned_energy(Own(), PLANE, SCHEDULES["VE"], prior=GAUSSIAN.prior())
    by_autograd, _ = solve(GAUSSIAN, PLANE, SCHEDULES["VE"])
    np.testing.assert_allclose(with_it.log_density, by_autograd.log_density, atol=1e-9)


def result(**changes: Any) -> EnergyResult:
    values = {
        "log_density": np.array([1.0, 2.0, -1.0]), "standard_error": np.array([0.1, 0.2, 0.3]),
        "discretisation": np.array([0.01, -0.02, np.nan]), "truncation": np.zeros(3), "method": "flow",
        "n_dim": 3, "n_steps": 4, "n_paths": 1, "sigma_min": 0.0, "sigma_max": 1.0, "extrapolated": False,
        "n_score": 7, "n_products": 8,
    }  # fmt: skip
    return EnergyResult(**{**values, **changes})


def test_units_and_reference_frames() -> None:
    one = result()
    np.testing.assert_allclose(one.energies(), [-1, -2, 1])
    np.testing.assert_allclose(one.energies(reference=1), [1, 0, 3])
    np.testing.assert_allclose(one.energies(reference=-1), [-2, -3, 0])
    kt = thermal_energy(310.0)
    np.testing.assert_allclose(one.energies(temperature=310.0 * unit.kelvin, reference=1), [kt, 0, 3 * kt])
    for reference in (3, -4, 0.0, True, "0"):
        with pytest.raises(InputError, match="reference: expected"):
            one.energies(reference=reference)  # type: ignore[arg-type]
    for temperature in (0.0, -1.0, float("nan"), 1.0 * unit.nanometer, "warm"):
        with pytest.raises(UnitsError):
            one.energies(temperature=temperature)


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_tables_on_disk(tmp_path: Any, ending: str) -> None:
    one = result()
    path = one.write(tmp_path / f"table{ending}", temperature=300.0, reference=0)
    back = pd.read_csv(path, index_col="frame") if ending == ".csv" else pd.read_parquet(path)
    pd.testing.assert_frame_equal(back, one.to_frame(temperature=300.0, reference=0), check_index_type=False)
    assert list(back) == [
        "log_density", "energy_kT", "energy_kJ_mol", "standard_error_kT", "discretisation_kT",
        "truncation_kT",
    ]  # fmt: skip
    np.testing.assert_allclose(back["energy_kT"], [0, -1, 2])
    assert back["discretisation_kT"].iloc[0] == -0.01  # of the energy
    if ending == ".parquet":
        assert back.attrs["temperature"] == 300.0
        assert back.attrs["method"] == "flow"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(InputError, match=r"ends in \.csv or \.parquet"):
        one.write(tmp_path / "table.xlsx")


def test_progress_ends_at_its_total() -> None:
    for method in METHODS:
        seen: list[tuple[int, int]] = []
        solve(
            GAUSSIAN, PLANE, SCHEDULES["VE"], method=method, n_steps=4, generator=rng(), batch_size=2,
            progress=lambda *a, seen=seen: seen.append(a),
        )  # fmt: skip
        assert seen[-1][0] == seen[-1][1]
        assert all(a <= b for a, b in seen)
        assert [a for a, _ in seen] == sorted(a for a, _ in seen)


# ---------------------------------------------------------------------------------- bad input


GOOD: dict[str, Any] = {"x": PLANE, "schedule": VESchedule(10.0), "generator": rng()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((0, 2))}, "x: expected shape"),
        ({"x": np.zeros(3)}, "x: expected shape"),
        ({"x": np.zeros((2, 3, 2))}, "x: expected shape"),
        ({"x": [[np.nan, 0.0]]}, "x: expected finite numbers"),
        ({"x": [["a", "b"]]}, "x: expected an array of real numbers"),
        ({"x": np.zeros((2, 1, 3))}, "mean_free: expected"),
        ({"mean_free": True}, "mean_free: expected"),
        ({"score": 3.0}, "score: expected a callable"),
        ({"score": lambda y, t: y[:, :1]}, "score: expected a tensor of shape"),
        ({"score": lambda y, t: y.detach().numpy()}, "score: expected a tensor of shape"),
        ({"score": lambda y, t: -y.detach()}, "that autograd can differentiate"),
        ({"schedule": "VE"}, "schedule: expected VESchedule"),
        ({"method": "magic"}, "method: expected one of flow"),
        ({"solver": "euler"}, "solver: expected one of heun"),
        ({"n_steps": 5}, "n_steps: expected an even number"),
        ({"n_steps": 0}, "n_steps: expected an integer >= 2"),
        ({"n_steps": 4.0}, "n_steps: expected an integer"),
        ({"n_paths": 2}, "n_paths: expected 1"),
        ({"n_paths": 0, "method": "ito"}, "n_paths: expected an integer >= 1"),
        ({"grid": "cubic"}, "grid: expected one of"),
        ({"grid": "log"}, "expected sigma_min > 0 for a logarithmic grid"),
        ({"grid": [0.0, 0.5, 0.4]}, "grid: expected increasing times"),
        ({"grid": [0.0, 0.5, 0.7, 1.0]}, "even number of steps"),
        ({"grid": [0.0, 0.5, 1.5]}, "grid: expected increasing times"),
        ({"sigma_min": -0.1}, "sigma: expected a noise level in"),
        ({"sigma_max": 11.0}, "sigma: expected a noise level in"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_max: expected more noise"),
        ({"prior": "flat"}, "prior: expected 'standard' or a GaussianPrior"),
        ({"prior": GaussianPrior(np.zeros(3))}, "prior: expected 2 dimensions"),
        ({"divergence": "guess"}, "divergence: expected one of exact"),
        ({"divergence": "hutchinson", "n_probes": 1}, "n_probes: expected two or more"),
        ({"divergence": "hutchinson", "generator": None}, "generator: expected a numpy"),
        ({"method": "ito", "generator": np.random}, "generator: expected a numpy"),
        ({"difference": -1.0}, "difference: expected a finite number above 0"),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1"),
        ({"dtype": torch.int64}, "dtype: expected torch.float64"),
        ({"path": "mean"}, "path: expected it with method 'stratonovich'"),
        ({"method": "stratonovich", "path": "scenic"}, "path: expected one of noising"),
        ({"method": "stratonovich", "path": np.zeros((3, 3, 2))}, "path: expected shape"),
        ({"method": "stratonovich", "path": np.ones((5, 3, 2)), "n_steps": 4}, "path: expected it to begin"),
        ({"method": "ito", "extrapolate": True}, "extrapolate: expected method flow"),
        ({"halving": False, "extrapolate": True}, "extrapolate: expected halving=True"),
        ({"method": "mmse"}, "prior: expected a covariance that is not singular"),
    ],
)
def test_bad_input(changes: Any, message: str) -> None:
    arguments = {**GOOD, "score": GAUSSIAN.score(VESchedule(10.0)), **changes}
    score, x, schedule = (arguments.pop(k) for k in ("score", "x", "schedule"))
    with pytest.raises(InputError, match=message):
        learned_energy(score, x, schedule, **arguments)


def test_wrong_units_and_broken_scores() -> None:
    score = GAUSSIAN.score(VESchedule(10.0))
    with pytest.raises(UnitsError):
        learned_energy(score, PLANE * unit.kelvin, VESchedule(10.0))
    by_unit = learned_energy(score, (10 * PLANE) * unit.angstrom, VESchedule(10.0), n_steps=4)
    np.testing.assert_allclose(
        by_unit.log_density, learned_energy(score, PLANE, VESchedule(10.0), n_steps=4).log_density
    )
    with pytest.raises(ModelError, match="start at a sigma_min > 0"):
        learned_energy(lambda y, t: -y / t[:, None], PLANE, VESchedule(10.0))
    with pytest.raises(ModelError, match="at t = 1 "):
        learned_energy(lambda y, t: -y + 0 / (1 - t[:, None]), PLANE, VESchedule(10.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 2)), 0.0), "prior: expected a mean of shape"),
        ((np.zeros(2), np.eye(3)), "prior: expected one dimension"),
        ((0.0, -1.0), "no eigenvalue below 0"),
        ((0.0, [[1.0, 2.0], [2.0, 1.0]]), "no eigenvalue below 0"),
        ((0.0, [[1.0, 2.0], [0.0, 1.0]]), "symmetric"),
        ((np.nan, 1.0), "prior mean: expected finite"),
    ],
)
def test_impossible_priors(arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GaussianPrior(*arguments)


@pytest.mark.parametrize("frames", [np.zeros((1, 3)), np.zeros((3, 2, 2)), np.zeros(3), [[np.inf], [1.0]]])
def test_frames_without_moments(frames: Any) -> None:
    with pytest.raises(InputError, match="frames: expected"):
        matched_prior(frames)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (4, 2)}, "shape: expected"),
        ({"shape": 3}, "shape: expected"),
        ({"n_frames": 0}, "n_frames: expected"),
        ({"n_steps": 7}, "n_steps: expected an even number"),
        ({"generator": 3}, "generator: expected"),
    ],
)
def test_bad_input_of_sampling(changes: Any, message: str) -> None:
    arguments = {"shape": (2,), "n_frames": 2, "generator": rng(), **changes}
    with pytest.raises(InputError, match=message):
        sample_with_energy(
            GAUSSIAN.score(VESchedule(10.0)), arguments.pop("shape"), VESchedule(10.0), **arguments
        )  # fmt: skip


def test_grids() -> None:
    for schedule in SCHEDULES.values():
        for kind in GRIDS:
            t = noise_grid(schedule, 10, kind=kind, sigma_min=0.01, sigma_max=5.0)
            tau = schedule.noise_to_signal(t).numpy()
            assert (np.diff(t) > 0).all()
            np.testing.assert_allclose(tau[[0, -1]], [0.01, 5.0], rtol=1e-6)
            if kind == "log":
                np.testing.assert_allclose(np.diff(np.log(tau)), np.log(500) / 10, rtol=1e-6)
            elif kind == "karras":
                np.testing.assert_allclose(np.diff(tau ** (1 / 7)), (5 ** (1 / 7) - 0.01 ** (1 / 7)) / 10)
            else:
                power = 1 if kind == "linear" else 0.5
                np.testing.assert_allclose(np.diff((t - t[0]) ** power), (t[-1] - t[0]) ** power / 10)


# -------------------------------------------------------------------------------- testing.py


def test_the_mixture_itself() -> None:
    two = GaussianMixture([[0.0, 1.0], [1.0, -1.0]], [np.eye(2), [[0.5, 0.2], [0.2, 0.3]]], weights=[1, 3])
    step, n = 0.1, 121
    axis = np.linspace(-6, 6, n)
    points = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    for schedule, t in ((VESchedule(1.0), 0.8), (VPSchedule(length=1.0), 0.3)):
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        log_p = two.log_density(points, alpha=alpha, sigma=sigma)
        assert np.exp(log_p).sum() * step**2 == pytest.approx(1.0, abs=1e-3)
        times = torch.full((len(points),), t, dtype=torch.float64)
        s = two.score(schedule)(torch.as_tensor(points), times).numpy().reshape(n, n, 2)
        slope = np.gradient(log_p.reshape(n, n), step)
        np.testing.assert_allclose(s[40:80, 40:80, 0], slope[1][40:80, 40:80], atol=0.03)
        np.testing.assert_allclose(s[40:80, 40:80, 1], slope[0][40:80, 40:80], atol=0.03)
    x = two.sample(40000, rng(16))
    prior = two.prior()
    np.testing.assert_allclose(x.mean(axis=0), prior.mean, atol=0.03)
    np.testing.assert_allclose(np.cov(x.T), prior.covariance, atol=0.05)
    for arguments in (
        ([0.0], 1.0), ([[0.0]], -1.0), ([[0.0]], np.eye(2)), ([[np.nan]], 1.0),
        ([[0.0, 0.0]], [[[1.0, 2.0], [0.0, 1.0]]]),
    ):  # fmt: skip
        with pytest.raises(InputError):
            GaussianMixture(*arguments)
    with pytest.raises(InputError, match="weights"):
        GaussianMixture([[0.0]], 1.0, weights=[0.0])


# ------------------------------------------------------------------------------ command line


class NoisedWater(torch.nn.Module):
    """Three atoms, each coordinate N(0, 0.01 nm^2) about their mean, noised by VESchedule(1): exact."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
        variance = 0.01 + (t * t) ** 2
        x = x - x.mean(1, keepdim=True)
        return 0.5 * (x * x).sum((1, 2)) / variance + 3.0 * torch.log(variance)


class NoisedWaterScore(torch.nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return -(x - x.mean(1, keepdim=True)) / (0.01 + (t * t) ** 2)[:, None, None]


def water_files(folder: Path, *, sigma_max: float = 1.0, score: bool = False) -> tuple[Path, Path, Path]:
    """Artefact, trajectory of five frames and PDB file."""
    graph = MolecularGraph(("O", "H", "H"), ((0, 1), (0, 2)), ("O", "H1", "H2"))
    model = ScoreModel(NoisedWaterScore()) if score else AutogradAction(NoisedWater(), has_operator=False)
    export_artefact(
        model, folder / "water.diffforce", graph=graph, schedule=VESchedule(sigma_max), temperature=310.0
    )
    topology = app.Topology()
    residue = topology.addResidue("HOH", topology.addChain())
    atoms = [topology.addAtom(name, app.Element.getBySymbol(name[0]), residue) for name in ("O", "H1", "H2")]
    topology.addBond(atoms[0], atoms[1])
    topology.addBond(atoms[0], atoms[2])
    x = 0.1 * rng(17).standard_normal((5, 3, 3)) + 1.0
    with (folder / "water.pdb").open("w") as handle:
        app.PDBFile.writeFile(topology, x[0] * unit.nanometer, handle)
    md.Trajectory(x, md.Topology.from_openmm(topology)).save_dcd(str(folder / "water.dcd"))
    return folder / "water.diffforce", folder / "water.dcd", folder / "water.pdb"


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, ["energy", *(str(a) for a in arguments)])


def test_command_line(tmp_path: Path) -> None:
    artefact, frames, pdb = water_files(tmp_path)
    x = md.load_dcd(str(frames), top=str(pdb)).xyz.astype(float)
    action = 50.0 * ((x - x.mean(axis=1, keepdims=True)) ** 2).sum((1, 2))
    out = tmp_path / "energies.parquet"
    done = invoke(artefact, frames, "--topology", pdb, "--reference-frame", 1, "--out", out)
    assert done.exit_code == 0, done.output
    table = pd.read_parquet(out)
    np.testing.assert_allclose(table["energy_kT"], action - action[1], atol=1e-5)
    np.testing.assert_allclose(
        table["energy_kJ_mol"], thermal_energy(310.0) * (action - action[1]), atol=1e-4
    )
    assert "action: energies of 5 frames, zero at frame 1" in done.output
    for method in METHODS:
        arguments = ("--method", method, "--steps", 200 if method in ("ito", "backward_ito") else 40)
        done = invoke(artefact, frames, "--topology", pdb, "--json", *arguments, "--seed", 3)
        assert done.exit_code == 0, done.output
        found = json.loads(done.output)
        assert found["method"] == method
        assert found["n_dim"] == 6
        assert found["temperature"] == 310.0
        exact = action + 3.0 * math.log(2 * math.pi * 0.01)
        allowed = 0.05 + 4 * np.array(found["standard_error_kT"], dtype=float)
        # the prior is that of five frames: it is nothing beside the noise at the end
        assert (np.abs(np.array(found["energy_kT"]) - exact) < allowed + 0.1).all(), method
        assert found["n_paths"] == (1 if method == "flow" else 8)
    done = invoke(
        artefact, frames, "--topology", pdb, "--method", "flow", "--probes", 4, "--prior", frames, "--quiet",
        "--out", tmp_path / "e.csv", "--temperature", 300,
    )  # fmt: skip
    assert done.output.strip() == str(tmp_path / "e.csv")
    assert (pd.read_csv(tmp_path / "e.csv")["standard_error_kT"] > 0).all()


def test_command_line_refuses(tmp_path: Path) -> None:
    artefact, frames, pdb = water_files(tmp_path)
    good = (artefact, frames, "--topology", pdb)
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    narrow_artefact = water_files(narrow, sigma_max=0.1)[0]
    for arguments, message in (
        ((*good, "--method", "magic"), "--method: expected one of action, flow"),
        ((*good, "--out", tmp_path / "t.xlsx"), "--out: expected a name that ends in"),
        ((*good, "--method", "flow", "--steps", "3"), "n_steps: expected an even number"),
        ((*good, "--method", "ito", "--paths", "0"), "n_paths: expected an integer >= 1"),
        ((*good, "--reference-frame", "9"), "reference: expected a frame below 5"),
        ((*good, "--temperature", "-1"), "temperature: expected a finite number > 0"),
        ((*good, "--method", "flow", "--sigma-min", "3"), "sigma: expected a noise level in"),
        ((artefact, tmp_path / "none.dcd", "--topology", pdb), "none.dcd"),
        ((artefact, frames, "--topology", tmp_path / "none.pdb"), "none.pdb"),
        ((tmp_path / "none", frames, "--topology", pdb), "cannot be read"),
        ((narrow_artefact, frames, "--topology", pdb, "--method", "flow"), "model: expected noise up to 2"),
    ):
        done = invoke(*arguments)
        assert done.exit_code == 1, (arguments, done.output)
        assert message in done.output.replace("\n", " "), (arguments, done.output)
    insisted = invoke(
        narrow_artefact, frames, "--topology", pdb, "--method", "flow", "--steps", 4, "--insist"
    )
    assert insisted.exit_code == 0


def test_another_molecule_is_refused(tmp_path: Path) -> None:
    artefact, frames, _ = water_files(tmp_path)
    case = tiny.case()
    pdb = tmp_path / "alanine.pdb"
    with pdb.open("w") as handle:
        app.PDBFile.writeFile(case.topology, case.positions * unit.nanometer, handle)
    done = invoke(artefact, frames, "--topology", pdb)
    assert done.exit_code == 1
    assert "expected the molecule of" in done.output


def test_models_and_what_they_cannot_give(tmp_path: Path) -> None:
    artefact, frames, pdb = water_files(tmp_path, score=True)
    loaded, x = load_artefact(artefact), md.load_dcd(str(frames), top=str(pdb)).xyz
    with pytest.raises(NotConservativeError, match="a bare score"):
        action_energy(loaded, x)
    found = energies_of_model(loaded, x, n_steps=40)
    other = tmp_path / "action"
    other.mkdir()
    by_action = energies_of_model(load_artefact(water_files(other)[0]), x, n_steps=40)
    np.testing.assert_allclose(found.log_density, by_action.log_density, atol=1e-5)
    for x_bad, message in (
        (x[:1], "two frames or more"), (x[:, :2], "prior|x: expected|atoms"), (x[0], "x: expected shape"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            energies_of_model(loaded, x_bad, prior_frames=x if len(x_bad) == len(x) else None)
    with pytest.raises(InputError, match="x: expected"):
        action_energy(tiny.model(), x)
