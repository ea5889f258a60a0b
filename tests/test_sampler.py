"""Diffusion samplers on arrays: exact Gaussians and mixtures, the adapter step, reweighting."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from openmm import unit

from openmm_diffforce import sampler
from openmm_diffforce.errors import InputError, ModelError, PoorOverlapError, UnitsError
from openmm_diffforce.models.action import model_fields
from openmm_diffforce.schedule import VESchedule, VPSchedule
from openmm_diffforce.scores import GaussianPrior, Score, noise_grid, score_of
from openmm_diffforce.testing import GaussianMixture

from . import tiny

SCHEDULES = {"VE": VESchedule(0.5), "VP": VPSchedule(length=0.1)}
MEAN, STD = np.array([0.03, -0.01]), np.array([0.02, 0.05])
GAUSSIAN = GaussianMixture([MEAN], [np.diag(STD**2)])


def sample(kind: str, method: str, n: int, *, final: str = "keep", seed: int = 1) -> Any:
    schedule, random = SCHEDULES[kind], np.random.default_rng(seed)
    times = noise_grid(schedule, 400, kind="log", sigma_min=0.005)
    y = sampler.prior_frames((n, 2), schedule, 1.0, generator=random, prior=GAUSSIAN.prior())
    score = GAUSSIAN.score(schedule)
    if method == "flow":
        return sampler.probability_flow(score, y, schedule, times=times, final=final)
    run = {"sde": sampler.reverse_sde, "pc": sampler.predictor_corrector}[method]
    return run(score, y, schedule, times=times, generator=random, final=final)


def z_scores(x: np.ndarray, mean: Any, variance: Any) -> np.ndarray:
    """Of the means and of the variances of independent Gaussian columns."""
    n = len(x)
    return np.concatenate([
        (x.mean(axis=0) - mean) / np.sqrt(variance / n),
        (x.var(axis=0, ddof=1) / variance - 1) / np.sqrt(2 / (n - 1)),
    ])  # fmt: skip


@pytest.mark.parametrize("kind", ["VE", "VP"])
@pytest.mark.parametrize("method", ["sde", "flow", "pc"])
def test_samples_of_a_gaussian(kind: str, method: str) -> None:
    found = sample(kind, method, 3000)
    assert found.residual_noise == pytest.approx(0.005)
    # 400 steps leave a bias below the statistical error of the variance (2.6 %).
    assert np.abs(z_scores(found.samples, MEAN, STD**2 + 0.005**2)).max() < 3.5
    assert found.calls == {"sde": 400, "flow": 800, "pc": 800}[method]


def point_score(schedule: VESchedule) -> Score:
    """Of all data at MEAN."""
    return lambda y, t: -(y - torch.as_tensor(MEAN)) / schedule.sigma(t)[:, None] ** 2


def test_the_ancestral_step_is_exact_for_a_point() -> None:
    """All data at one point: whatever the grid, z at each level is N(point, tau^2)."""
    schedule, random = VESchedule(0.5), np.random.default_rng(12)
    times = noise_grid(schedule, 3, kind="log", sigma_min=0.05)
    y = sampler.prior_frames((4000, 2), schedule, 1.0, generator=random, prior=GaussianPrior(MEAN))
    found = sampler.reverse_sde(
        point_score(schedule), y, schedule, times=times, generator=random, final="keep"
    )
    assert np.abs(z_scores(found.samples, MEAN, np.full(2, 0.05**2))).max() < 3.5


def test_the_corrector_has_the_bias_it_says() -> None:
    """Along a direction without signal r = D dt kappa: variance tau^2 / (1 - r/2)."""
    schedule, random = VESchedule(0.5), np.random.default_rng(13)
    found = sampler.predictor_corrector(
        point_score(schedule),
        sampler.prior_frames((3000, 2), schedule, 1.0, generator=random, prior=GaussianPrior(MEAN)), schedule,
        times=[0.5, 1.0], generator=random, final="keep", n_corrector=12, corrector_step=0.6,
    )  # fmt: skip
    tau = float(schedule.sigma(0.5))
    assert np.abs(z_scores(found.samples, MEAN, np.full(2, tau**2 / 0.7))).max() < 3.5


def test_the_last_denoising_is_the_mean_and_narrows() -> None:
    kept, mean = (sample("VP", "sde", 50, final=f) for f in ("keep", "denoise"))
    tau = kept.residual_noise
    shrink = STD**2 / (STD**2 + tau**2)
    np.testing.assert_allclose(mean.samples, MEAN + shrink * (kept.samples - MEAN), atol=1e-12)
    assert (mean.residual_noise, mean.calls) == (0.0, kept.calls + 1)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_the_probability_flow(method: str, order: int) -> None:
    """A point of a Gaussian keeps its quantile: z - m scales with the width."""
    schedule = SCHEDULES["VE"]
    y = MEAN + np.array([[0.3, -0.4]])
    high, low = 0.5, 0.005
    exact = MEAN + (y - MEAN) * np.sqrt((STD**2 + low**2) / (STD**2 + high**2))
    errors = []
    for n in (100, 200):
        times = noise_grid(schedule, n, kind="log", sigma_min=low)
        found = sampler.probability_flow(
            GAUSSIAN.score(schedule), y, schedule, times=times, final="keep", method=method
        )
        errors.append(np.abs(found.samples - exact).max())
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("method", ["sde", "flow", "pc"])
def test_populations_of_a_mixture(method: str) -> None:
    """From the prior alone both basins get their weight, without a barrier crossed."""
    schedule, random = VESchedule(1.0), np.random.default_rng(4)
    centres, weights = np.array([[-0.1, 0.0], [0.1, 0.02]]), np.array([0.3, 0.7])
    mixture = GaussianMixture(centres, 0.02**2, weights=weights)
    score = mixture.score(schedule)
    times = noise_grid(schedule, 300, kind="log", sigma_min=0.004)
    y = sampler.prior_frames((2000, 2), schedule, 1.0, generator=random, prior=mixture.prior())
    if method == "flow":
        found = sampler.probability_flow(score, y, schedule, times=times, final="keep")
    else:
        run = {"sde": sampler.reverse_sde, "pc": sampler.predictor_corrector}[method]
        found = run(score, y, schedule, times=times, generator=random, final="keep")
    right = found.samples[:, 0] > 0
    assert abs(right.mean() - 0.7) < 3.5 * np.sqrt(0.21 / 2000)
    assert np.abs(z_scores(found.samples[right], centres[1], 0.02**2 + 0.004**2)).max() < 3.5


@pytest.mark.parametrize("method", ["sde", "flow", "pc"])
def test_a_free_molecule_stays_in_the_mean_free_subspace(method: str) -> None:
    """Four atoms of a mean-free Gaussian: d = 9, and a score with a mean does not move them."""
    schedule, random, std = VESchedule(0.3), np.random.default_rng(3), 0.03

    def score(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 100.0 - y / (std**2 + schedule.sigma(t)[:, None, None] ** 2)

    times = noise_grid(schedule, 200, kind="log", sigma_min=0.003)
    prior = GaussianPrior(0.0, std**2)
    y = sampler.prior_frames((600, 4, 3), schedule, 1.0, generator=random, prior=prior)
    if method == "flow":
        found = sampler.probability_flow(score, y, schedule, times=times, final="keep")
    else:
        run = {"sde": sampler.reverse_sde, "pc": sampler.predictor_corrector}[method]
        found = run(score, y, schedule, times=times, generator=random, final="keep")
    assert np.abs(found.samples.mean(axis=1)).max() < 1e-13
    chi2 = (found.samples**2).sum() / (std**2 + 0.003**2)
    assert abs(chi2 - 600 * 9) < 3.5 * np.sqrt(2 * 600 * 9) + 0.01 * 600 * 9


def test_noised_frames() -> None:
    schedule, random = SCHEDULES["VP"], np.random.default_rng(5)
    x = random.standard_normal((400, 5, 3))
    y = sampler.noise_frames(x * unit.nanometer, schedule, 0.4, generator=random)
    eps = (y - float(schedule.alpha(0.4)) * x) / float(schedule.sigma(0.4))
    assert np.abs(eps.mean(axis=1)).max() < 1e-12
    assert abs((eps**2).sum() - 400 * 12) < 3.5 * np.sqrt(2 * 400 * 12)


def test_the_score_of_a_model() -> None:
    x = tiny.frames()[0][:3]
    score = score_of(tiny.model(), lam=0.5)
    found = score(torch.as_tensor(x), torch.full((3,), 0.3, dtype=torch.float64))
    np.testing.assert_array_equal(found, -model_fields(tiny.model(), x, t=0.3, lam=0.5)[1])


def test_a_local_diffusion_of_a_molecule() -> None:
    """Noised to 0.004 nm and back, frames come near where they were, at a tenth of the action."""
    x, schedule, random = tiny.frames()[0][::30], tiny.SCHEDULES["VE"], np.random.default_rng(6)
    times = noise_grid(schedule, 60, kind="log", sigma_min=0.0005, sigma_max=0.004)
    y = sampler.noise_frames(x, schedule, times[-1], generator=random)
    found = sampler.reverse_sde(
        score_of(tiny.model()), y, schedule, times=times, generator=random, final="denoise"
    )
    noised, back, start = (model_fields(tiny.model(), v)[0].mean() for v in (y, found.samples, x))
    assert noised - start > 20
    assert abs(back - start) < 0.5 * (noised - start)


@pytest.mark.parametrize("per_atom", [False, True])
def test_the_adapter_is_a_step_of_overdamped_langevin_dynamics(per_atom: bool) -> None:
    """x' = x + F dt / (m gamma) + sqrt(2 kT dt / (m gamma)) xi with k = beta m gamma / (2 dt)."""
    random = np.random.default_rng(7)
    x, force, xi = random.standard_normal((3, 8, 3))
    kt, gamma, dt = 2.494, 40.0, 1.5e-3
    mass = random.uniform(1, 30, (8, 1)) if per_atom else 12.0
    euler = x + force * dt / (mass * gamma) + np.sqrt(2 * kt * dt / (mass * gamma)) * xi
    k = mass * gamma / (2 * kt * dt)
    np.testing.assert_allclose(sampler.harmonic_adapter_step(x, force / kt, k, xi), euler, atol=1e-12)
    # Unit mobility: dt = beta / (2k).
    k = 1 / (2 * kt * dt)
    euler = x + force * dt + np.sqrt(2 * kt * dt) * xi
    np.testing.assert_allclose(sampler.harmonic_adapter_step(x, force / kt, k, xi), euler, atol=1e-12)


def test_the_adapter_takes_quantities() -> None:
    plain = sampler.harmonic_adapter_step([[0.1]], [[3.0]], 50.0, [[0.2]])
    nm = unit.nanometer
    dressed = sampler.harmonic_adapter_step(
        [[1.0]] * unit.angstrom, [[0.3]] * unit.angstrom**-1, 0.5 * unit.angstrom**-2, [[0.2]]
    )
    np.testing.assert_allclose(dressed, plain, atol=1e-14)
    with pytest.raises(UnitsError, match="stiffness"):
        sampler.harmonic_adapter_step([[0.1]], [[3.0]], 50.0 * nm, [[0.2]])


def test_the_adapters_density_is_the_one_it_draws_from() -> None:
    """exp[-k/2 |d|^2 + s.d/2] has mean s/(2k) and variance 1/k: by quadrature, and by draws."""
    k, s = 80.0, 30.0
    d = np.linspace(-1.5, 1.5, 20001)
    w = np.exp(-0.5 * k * d**2 + 0.5 * s * d)
    w /= w.sum()
    mean = w @ d
    assert mean == pytest.approx(s / (2 * k), rel=1e-9)
    assert w @ (d - mean) ** 2 == pytest.approx(1 / k, rel=1e-6)
    noise = np.random.default_rng(8).standard_normal((20000, 1))
    x = sampler.harmonic_adapter_step(np.zeros((20000, 1)), np.full((20000, 1), s), k, noise)
    assert np.abs(z_scores(x, mean, np.array([1 / k]))).max() < 3.5


def test_reweighting_between_gaussians() -> None:
    random = np.random.default_rng(9)
    x = random.standard_normal(20000)
    target = 0.5 * 1.5 * (x - 0.3) ** 2
    found = sampler.reweight_samples(target, 0.5 * x**2)
    mean, error = found.average(x)
    assert abs(mean - 0.3) < 3.5 * error
    assert error < 0.02
    # Var of the mean weight: E w^2 / (E w)^2 - 1 = n / n_eff - 1.
    assert found.delta_f == pytest.approx(0.5 * np.log(1.5), abs=3.5 * found.effective_samples**-0.5)
    b, m = 1.5, 0.3  # E w^2 / (E w)^2 of N(m, 1/b) sampled from N(0, 1), in closed form
    ratio = b / np.sqrt(2 * b - 1) * np.exp((b * m) ** 2 * (2 / (2 * b - 1) - 1 / b))
    assert found.effective_samples == pytest.approx(20000 / ratio, rel=0.05)


def test_little_overlap_is_refused() -> None:
    u = np.linspace(0, 50, 100)
    with pytest.raises(PoorOverlapError, match=r"at least 20 effective samples, found 4\.\d of 100"):
        sampler.reweight_samples(u, np.zeros(100))
    assert sampler.reweight_samples(u, np.zeros(100), min_effective=0).effective_samples < 5


SCHEDULE = VESchedule(0.1)
TIMES = np.array([0.1, 0.5, 1.0])


def walk(**changes: Any) -> Callable[[], Any]:
    arguments = {
        "score": lambda y, t: -y, "y": np.zeros((2, 2)), "schedule": SCHEDULE, "times": TIMES,
        "generator": np.random.default_rng(0), "final": "keep", **changes,
    }  # fmt: skip
    return lambda: sampler.predictor_corrector(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (walk(score=3), "score: expected a callable"),
        (walk(score=lambda y, t: -y[:1]), "score: expected a tensor of shape"),
        (walk(y=np.zeros(3)), "y: expected"),
        (walk(y=np.full((2, 2), np.nan)), "y: expected finite"),
        (walk(y=np.zeros((0, 2))), "y: expected"),
        (walk(y=np.zeros((2, 5, 2))), "y: expected"),
        (walk(y="text"), "y: expected an array"),
        (walk(times=[0.5, 0.1]), "times: expected at least two increasing"),
        (walk(times=[0.5]), "times: expected at least two increasing"),
        (walk(times=[0.0, 0.5]), "times: expected a first time above 0"),
        (walk(times=[0.1, 1.5]), r"t: expected diffusion times in \[0, 1\]"),
        (walk(final="mean"), 'final: expected "denoise" or "keep"'),
        (walk(mean_free=True), "mean_free: expected"),
        (walk(n_corrector=-1), "n_corrector"),
        (walk(n_corrector=1.0), "n_corrector"),
        (walk(corrector_step=2.0), "corrector_step"),
        (lambda: sampler.probability_flow(lambda y, t: y, np.zeros((1, 1)), SCHEDULE, times=TIMES,
                                          final="keep", method="rk"), "method"),
        (lambda: sampler.prior_frames((3,), SCHEDULE, 1.0, generator=np.random.default_rng(0)), "shape"),
        (lambda: sampler.prior_frames((3, 2), SCHEDULE, 1.0, generator=np.random.default_rng(0), prior=2.0),
         "prior: expected 'standard' or a GaussianPrior"),
        (lambda: sampler.prior_frames((3, 2), SCHEDULE, 1.0, generator=np.random.default_rng(0),
                                      prior=GaussianPrior(np.zeros(3))), "prior: expected 2 dimensions"),
        (lambda: sampler.harmonic_adapter_step([[0.0]], [[0.0]], 0.0, [[0.0]]), "stiffness: expected k > 0"),
        (lambda: sampler.harmonic_adapter_step([[0.0]], [[0.0]], np.nan, [[0.0]]), "stiffness: expected fin"),
        (lambda: sampler.harmonic_adapter_step([[0.0]], [[0.0, 1.0]], 1.0, [[0.0]]), "score: expected shape"),
        (lambda: sampler.harmonic_adapter_step([[0.0]], [[0.0]], [1.0, 2.0], [[0.0]]), "stiffness"),
        (lambda: sampler.harmonic_adapter_step(np.zeros((4, 3)), np.zeros((4, 3)), np.ones(4),
                                               np.zeros((4, 3))), "stiffness"),
        (lambda: sampler.reweight_samples([], []), "u_target"),
        (lambda: sampler.reweight_samples([1.0], [1.0, 2.0]), "action: expected shape"),
        (lambda: sampler.reweight_samples([np.inf], [1.0]), "u_target: expected finite"),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_a_broken_score_is_said() -> None:
    with pytest.raises(ModelError, match="score: expected finite numbers, found others at t = 1"):
        walk(score=lambda y, t: y * np.nan)()
