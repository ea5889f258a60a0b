"""Energies from scores: every method against exact answers, orders, errors, constants, doors."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from openmm_diffforce.energy import (
    EnergyResult,
    learned_energy,
    sample_with_energy,
)
from openmm_diffforce.schedule import VESchedule, VPSchedule
from openmm_diffforce.scores import GaussianPrior, matched_prior, noise_grid
from openmm_diffforce.testing import GaussianMixture

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
        {"n_steps": 60},
        {"method": "stratonovich", "path": "mean", "n_steps": 400},
        {"method": "mmse", "n_paths": 2, "generator": rng()},
    ):
        found = learned_energy(score, x, schedule, prior=prior, **arguments)
        assert found.n_dim == 3 * N_ATOMS - 3
        np.testing.assert_allclose(found.log_density, exact, atol=5e-3)
    moved = learned_energy(score, x + np.array([5.0, -3.0, 2.0]), schedule, prior=prior, n_steps=60)
    np.testing.assert_allclose(moved.log_density, exact, atol=5e-3)
    found = learned_energy(
        score, x, schedule, prior=prior, n_steps=60, divergence="hutchinson", n_probes=50, generator=rng()
    )
    assert (np.abs(found.log_density - exact) < 4 * found.standard_error + 5e-3).all()
    found = learned_energy(
        score, x, schedule, prior=prior, method="ito", n_steps=300, n_paths=20, generator=rng()
    )
    assert (np.abs(found.log_density - exact) < 4 * found.standard_error).all()
    free = learned_energy(score, x, schedule, prior=prior, mean_free=False, n_steps=60)
    np.testing.assert_allclose(free.log_density, whole.log_density(x), atol=5e-3)
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
