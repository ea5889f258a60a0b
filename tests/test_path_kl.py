"""Divergence of paths: formulas, and the joint Gaussian of a sampled path in closed form."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from openmm import unit

from openmm_diffforce.errors import InputError, UnitsError
from openmm_diffforce.path_kl import path_divergence
from openmm_diffforce.step_size import curvature_spectrum

KAPPA, D, DT = 100.0, 0.1, 0.02
"""a = D dt kappa = 0.2."""


def reference(x: np.ndarray) -> np.ndarray:
    return -KAPPA * x


def chain_of(stiffness: float, shift: float, n: int, seed: int = 1) -> np.ndarray:
    """Stationary frames of x' = x - D dt stiffness (x - shift) + noise."""
    variance = 1 / (stiffness * (1 - D * DT * stiffness / 2))
    return shift + np.sqrt(variance) * np.random.default_rng(seed).standard_normal((n, 1))


def wrong(stiffness: float, shift: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: -stiffness * (x - shift)


def exact_terms(stiffness: float, shift: float) -> dict[str, float]:
    """Of the stationary learned chain, per time; the integrals over the step done by hand."""
    v = 1 / (stiffness * (1 - D * DT * stiffness / 2))
    # s_theta = -stiffness u, u = x - shift ~ N(0, v); s = -KAPPA (u + shift).
    square = stiffness**2 * v  # E s_theta^2
    score = 0.25 * D * ((KAPPA - stiffness) ** 2 * v + (KAPPA * shift) ** 2)
    discretisation = 0.25 * D * KAPPA**2 * (D**2 * DT**2 / 3 * square + D * DT)
    # -1/2 D E (s_theta - s)(s(x_tau) - s(x_0)), s(x_tau) - s(x_0) = -KAPPA (D tau s_theta + noise).
    cross = 0.5 * D * KAPPA * (D * DT / 2) * (-(KAPPA - stiffness) * stiffness * v)
    return {
        "score": score, "discretisation": discretisation, "cross": cross,
        "total": score + discretisation + cross,
    }  # fmt: skip


@pytest.mark.parametrize(("stiffness", "shift"), [(100.0, 0.0), (120.0, 0.0), (90.0, 0.03)])
def test_both_terms_of_a_gaussian(stiffness: float, shift: float) -> None:
    x = chain_of(stiffness, shift, 20000)
    found = path_divergence(wrong(stiffness, shift), reference, x, D, DT, generator=np.random.default_rng(2))
    for name, value in exact_terms(stiffness, shift).items():
        estimate, error = getattr(found, name)
        assert abs(estimate - value) <= 3.5 * error + 1e-12, name
        assert found.per_step()[name] == pytest.approx(estimate * DT)
    if stiffness == KAPPA:
        assert found.score == (0.0, 0.0)
    assert found.calls == 20000 * 8


def kl_of_sampled_path(x_0: float, stiffness: float, shift: float, m: int) -> float:
    """KL of m points within one step: the learned chain's bridge of noise against the true process.

    Both are Gaussian given x_0; the true one is an Ornstein-Uhlenbeck process, exactly.
    """
    h = DT / m
    decay = np.exp(-KAPPA * D * h)
    spread = (1 - decay**2) / KAPPA
    drift = -stiffness * (x_0 - shift) * D * h
    # The learned path: independent increments N(drift, 2 D h). Under the true law the next point
    # is N(decay x, spread). KL = E[ln ratio], all expectations linear or quadratic in the path.
    total = 0.0
    for k in range(m):
        mean, variance = x_0 + k * drift, 2 * D * h * k
        # residual x_{k+1} - decay x_k = drift + noise + (1 - decay) x_k
        second = (drift + (1 - decay) * mean) ** 2 + (1 - decay) ** 2 * variance + 2 * D * h
        total += -0.5 * np.log(2 * D * h / spread) - 0.5 + second / (2 * spread)
    return total


def test_girsanov_is_the_limit_of_sampled_paths() -> None:
    """The divergence of a path seen at m points grows with m to that of the whole path."""
    stiffness, shift, x_0 = 115.0, 0.02, 0.13
    values = [kl_of_sampled_path(x_0, stiffness, shift, m) for m in (200, 400)]
    limit = 2 * values[1] - values[0]
    assert values[0] < values[1] < limit * 1.001
    found = path_divergence(
        wrong(stiffness, shift),
        reference,
        np.full((20000, 1), x_0),
        D,
        DT,
        generator=np.random.default_rng(3),
    )
    value, error = found.total
    assert error < 0.01 * value
    assert abs(value * DT - limit) < 3.5 * error * DT + 0.002 * limit


def test_discretisation_is_of_first_order_and_the_score_error_of_none() -> None:
    x = chain_of(110.0, 0.0, 4000)
    found = [
        path_divergence(wrong(110.0, 0.0), reference, x, D, dt, generator=np.random.default_rng(4))
        for dt in (0.002, 0.001)
    ]
    assert found[0].score[0] == pytest.approx(found[1].score[0], rel=1e-12)
    assert found[0].discretisation[0] / found[1].discretisation[0] == pytest.approx(2.0, abs=0.05)


def test_leading_order_is_the_norm_of_the_hessian() -> None:
    """(dt/4) |D^1/2 H D^1/2|^2 per time, per-atom D, coupled atoms."""
    random = np.random.default_rng(5)
    root = random.standard_normal((6, 6))
    hessian = 50 * np.eye(6) + root @ root.T
    d = np.array([0.1, 0.3])

    def field(x: np.ndarray) -> np.ndarray:
        return -(x.reshape(len(x), -1) @ hessian).reshape(x.shape)

    x = random.multivariate_normal(np.zeros(6), np.linalg.inv(hessian), 4000).reshape(-1, 2, 3)
    dt = 1e-5
    found = path_divergence(field, field, x, d, dt, generator=random)
    rates = curvature_spectrum(field, x[:1], d).rates
    value, error = found.discretisation
    assert abs(value - 0.25 * dt * (rates**2).sum()) < 3.5 * error
    dressed = path_divergence(
        field, field, x * unit.nanometer, d * unit.nanometer**2 / unit.picosecond,
        0.01 * unit.femtosecond, generator=np.random.default_rng(6),
    )  # fmt: skip
    assert dressed.discretisation[0] == pytest.approx(value, rel=0.1)


X = np.zeros((3, 2))


def call(**changes: Any) -> Callable[[], Any]:
    arguments: dict[str, Any] = {
        "learned": reference, "reference": reference, "frames": X, "diffusion": 1.0, "step_size": 0.1,
        "generator": np.random.default_rng(0), **changes,
    }  # fmt: skip
    return lambda: path_divergence(**arguments)


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (call(step_size=0.0), InputError, "step_size"),
        (call(step_size=float("nan")), InputError, "step_size"),
        (call(step_size=1.0 * unit.kelvin), UnitsError, "step_size"),
        (call(frames=np.zeros(3)), InputError, "frames"),
        (call(frames=np.zeros((1, 2))), InputError, "frames: expected two or more"),
        (call(frames=X * np.nan), InputError, "frames"),
        (call(diffusion=-1.0), InputError, "diffusion"),
        (call(diffusion=[1.0, 1.0, 1.0]), InputError, "diffusion"),
        (call(diffusion=1.0 * unit.kelvin), UnitsError, "diffusion"),
        (call(learned=lambda x: x[:1]), InputError, "learned"),
        (call(reference=lambda x: x * np.inf + 1), InputError, "reference"),
        (call(n_nodes=0), InputError, "n_nodes"),
        (call(n_draws=1.5), InputError, "n_draws"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_bad_input(broken: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        broken()
