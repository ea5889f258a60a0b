"""Posterior MD and the posterior's mode, against Gaussians where everything is known."""

import numpy as np
import openmm
import pytest
import torch
from openmm import unit

from openmm_diffforce.errors import ConvergenceError, InputError
from openmm_diffforce.models.action import ActionModel
from openmm_diffforce.posterior import PosteriorMoments, posterior_mode, posterior_moments
from openmm_diffforce.units import thermal_energy

from . import tiny

TEMPERATURE = 300.0
KT = thermal_energy(TEMPERATURE)
STIFFNESS = 2000.0
"""S(x) = K |x - m|^2 / 2, K [1/nm^2]."""
SIGMA = 0.02
N_ATOMS = 2
CENTRE = np.array([[0.1, 0.0, -0.1], [0.3, 0.2, 0.0]])
SLOPE = np.array([[20.0, -10.0, 0.0], [0.0, 30.0, 5.0]])
CURVE = 600.0
"""O(x) = SLOPE . x + CURVE |x - m|^2 / 2."""


def operator(x: np.ndarray) -> np.ndarray:
    return (SLOPE * x).sum((1, 2)) + 0.5 * CURVE * ((x - CENTRE) ** 2).sum((1, 2))


def harmonic_system() -> openmm.System:
    system = openmm.System()
    force = openmm.CustomExternalForce("k/2*((x-a)^2+(y-b)^2+(z-c)^2)")
    force.addGlobalParameter("k", KT * STIFFNESS)
    for name in "abc":
        force.addPerParticleParameter(name)
    for atom in range(N_ATOMS):
        system.addParticle(12.0)
        force.addParticle(atom, CENTRE[atom].tolist())
    system.addForce(force)
    return system


def exact(y: np.ndarray, lam: float = 0.0) -> tuple[np.ndarray, ...]:
    """Score, O_t, Var(O|y) and grad O_t of K_lam = K + lam CURVE, one frame at a time."""
    stiffness = STIFFNESS + lam * CURVE
    precision = stiffness + SIGMA**-2
    mean = (stiffness * CENTRE - lam * SLOPE + y / SIGMA**2) / precision
    gradient = SLOPE + CURVE * (mean - CENTRE)  # of O at the mean
    d = 3 * N_ATOMS
    return (
        (mean - y) / SIGMA**2,
        operator(mean) + 0.5 * CURVE * d / precision,
        (gradient**2).sum((1, 2)) / precision + 0.5 * CURVE**2 * d / precision**2,
        gradient / precision / SIGMA**2,
    )


def noised_frames(n: int) -> np.ndarray:
    generator = np.random.default_rng(3)
    spread = np.sqrt(1 / STIFFNESS + SIGMA**2)
    return CENTRE + spread * generator.standard_normal((n, N_ATOMS, 3))


OPTIONS = {
    "operator": operator, "temperature": TEMPERATURE, "n_samples": 4000, "interval": 20, "n_equil": 500,
    "timestep": 0.005, "friction": 20.0, "n_blocks": 20, "seed": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def moments() -> PosteriorMoments:
    return posterior_moments(harmonic_system(), noised_frames(8), SIGMA, **OPTIONS)


@pytest.mark.parametrize("field", ["score", "operator", "operator_gradient"])
def test_moments_are_the_exact_noised_fields(moments, field):
    found, error = getattr(moments, field), getattr(moments, field + "_error")
    truth = dict(zip(("score", "operator", "variance", "operator_gradient"), exact(noised_frames(8)),
                     strict=True))[field]  # fmt: skip
    assert found.shape == error.shape == truth.shape
    z = (found - truth) / error
    assert np.abs(z).max() < 4.5
    assert np.sqrt((z**2).mean()) < 1.6
    # the test sees something: errors well below the fields themselves
    assert np.median(error) < 0.15 * np.median(np.abs(truth))


def test_variance_of_the_operator(moments):
    truth = exact(noised_frames(8))[2]
    np.testing.assert_allclose(moments.operator_variance, truth, rtol=0.15)


def test_same_seed_same_moments_other_seed_others():
    options = {**OPTIONS, "n_samples": 100, "n_equil": 10}
    y = noised_frames(1)
    a, b, c = (
        posterior_moments(harmonic_system(), y, SIGMA, **{**options, "seed": s}).score for s in (1, 1, 2)
    )
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_quantities_progress_and_an_untouched_system():
    system = harmonic_system()
    before = openmm.XmlSerializer.serialize(system)
    options = {**OPTIONS, "n_samples": 60, "n_equil": 10}
    calls: list[tuple[int, int]] = []
    found = posterior_moments(
        system, noised_frames(2), SIGMA * 10 * unit.angstrom,
        **{**options, "temperature": 300 * unit.kelvin, "timestep": 5 * unit.femtosecond},
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    expected = posterior_moments(system, noised_frames(2), SIGMA, **options)
    np.testing.assert_allclose(found.score, expected.score)
    assert calls == [(1, 2), (2, 2)]
    assert openmm.XmlSerializer.serialize(system) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.0}, "sigma: expected a noise level > 0"),
        ({"sigma": -0.1}, "sigma"),
        ({"sigma": float("nan")}, "sigma"),
        ({"sigma": 1.0 * unit.kelvin}, "sigma"),
        ({"y": np.zeros((1, 3, 3))}, "positions"),
        ({"y": np.full((1, 2, 3), np.nan)}, "positions"),
        ({"n_samples": 39}, "n_samples: expected at least two per block"),
        ({"n_blocks": 1}, "n_samples"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_bad_input(change, message):
    given = {"y": noised_frames(1), "sigma": SIGMA, **OPTIONS, **change}
    with pytest.raises(InputError, match=message):
        posterior_moments(harmonic_system(), **given)


# ------------------------------------------------------------------ the mode


class Harmonic(ActionModel):
    """S_0 + lam O of the system above."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
        d = x - torch.as_tensor(CENTRE)
        square = 0.5 * (d * d).sum((1, 2))
        return STIFFNESS * square + lam * ((torch.as_tensor(SLOPE) * x).sum((1, 2)) + CURVE * square)


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_mode_of_a_gaussian_is_its_mean(lam):
    y = noised_frames(3)
    found = posterior_mode(Harmonic(), y, SIGMA, lam=lam)
    score, _, _, gradient = exact(y, lam)
    np.testing.assert_allclose(found.score, score, atol=1e-6 * np.abs(score).max())
    np.testing.assert_allclose(found.operator_gradient, gradient, rtol=1e-5)
    np.testing.assert_allclose(found.operator, operator(found.x), rtol=1e-12)
    np.testing.assert_allclose(found.x, y + SIGMA**2 * found.score, rtol=1e-12)
    clean = Harmonic()(*(torch.as_tensor(a) for a in (found.x, np.zeros(3), np.full(3, lam)))).numpy()
    np.testing.assert_allclose(found.action, clean + ((found.x - y) ** 2).sum((1, 2)) / (2 * SIGMA**2))


def test_mode_of_a_fitted_model_is_conservative():
    """The three fields are derivatives of one scalar, by finite differences in y and lam."""
    model, sigma, lam = tiny.model(), 0.005, 0.3
    y = tiny.frame()[None] + sigma * np.random.default_rng(7).standard_normal((1, 22, 3))
    at = posterior_mode(model, y, sigma, lam=lam)
    direction = np.random.default_rng(8).standard_normal(y.shape)
    direction /= np.linalg.norm(direction)
    h = 2e-5
    up, down = (posterior_mode(model, y + s * h * direction, sigma, lam=lam) for s in (1, -1))
    slope = float((up.action - down.action)[0] / (2 * h))
    assert slope == pytest.approx(-float((at.score * direction).sum()), rel=1e-3)
    mixed = float((up.operator - down.operator)[0] / (2 * h))
    assert mixed == pytest.approx(float((at.operator_gradient * direction).sum()), rel=2e-2)
    up, down = (posterior_mode(model, y, sigma, lam=lam + s * 1e-3) for s in (1, -1))
    assert float((up.action - down.action)[0] / 2e-3) == pytest.approx(float(at.operator[0]), rel=1e-4)


def test_a_mode_that_is_not_found_says_so():
    with pytest.raises(ConvergenceError, match=r"frame 0.*use posterior MD"):
        posterior_mode(Harmonic(), noised_frames(1), SIGMA, max_iterations=1)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("inf")])
def test_mode_refuses_bad_noise(sigma):
    with pytest.raises(InputError, match="sigma"):
        posterior_mode(Harmonic(), noised_frames(1), sigma)


def test_mode_refuses_bad_frames():
    with pytest.raises(InputError, match="positions"):
        posterior_mode(Harmonic(), np.full((1, 2, 3), np.nan), SIGMA)
    with pytest.raises(InputError, match="positions"):
        posterior_mode(Harmonic(), np.zeros(6), SIGMA)
