"""Rotations and IGSO3, held to closed forms, quadrature and samples."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from scipy.stats import kstest

from openmm_diffforce.docking import so3
from openmm_diffforce.errors import ConvergenceError, InputError

SIGMAS = (1e-3, 0.01, 0.05, 0.3, 0.7, 1.0, 1.4999, 1.5, 2.0, 5.0, 10.0)


def vectors(n: int, seed: int = 0) -> np.ndarray:
    """Directions at random, angles from 1e-9 to pi."""
    generator = np.random.default_rng(seed)
    axis = generator.standard_normal((n, 3))
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    angle = np.concatenate([[0.0, np.pi, np.pi - 1e-9, 1e-9, 1e-5, 0.049, 0.051], np.linspace(0, np.pi, n)])
    return axis * angle[:n, None]


def quadrature(top: float, n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    x, w = np.polynomial.legendre.leggauss(n)
    return 0.5 * top * (x + 1), 0.5 * top * w


# ------------------------------------------------------------------------------------- rotations


def test_exp_and_log_are_those_of_scipy_and_inverse_to_each_other():
    v = vectors(200)
    r = so3.exp(v)
    np.testing.assert_allclose(r, Rotation.from_rotvec(v).as_matrix(), atol=2e-15)
    back = so3.log(r)
    np.testing.assert_allclose(so3.exp(back), r, atol=2e-15)
    inside = np.linalg.norm(v, axis=1) < np.pi - 1e-6
    np.testing.assert_allclose(back[inside], v[inside], atol=1e-14)
    np.testing.assert_allclose(so3.angle(r), np.linalg.norm(v, axis=1), atol=1e-14)


@pytest.mark.parametrize("axis", np.vstack([np.eye(3), -np.eye(3), [[0.6, 0.0, 0.8], [0.0, -0.6, 0.8]]]))
def test_log_at_pi_and_beyond(axis):
    found = so3.log(so3.exp(np.pi * axis))
    assert np.linalg.norm(found) == pytest.approx(np.pi, abs=1e-14)
    np.testing.assert_allclose(np.abs(found @ axis), np.pi, atol=1e-14)
    np.testing.assert_allclose(so3.log(so3.exp((np.pi + 0.1) * axis)), (0.1 - np.pi) * axis, atol=1e-13)


def test_log_keeps_small_angles_to_full_precision():
    v = np.array([3e-12, -4e-12, 0.0])
    np.testing.assert_allclose(so3.log(so3.exp(v)), v, rtol=1e-12)


def test_hat_and_vee():
    a, b = vectors(20), vectors(20, 1)
    np.testing.assert_allclose((so3.hat(a) @ b[..., None])[..., 0], np.cross(a, b), atol=1e-15)
    np.testing.assert_array_equal(so3.vee(so3.hat(a)), a)


def test_left_jacobian_is_the_derivative_of_exp():
    v, dv = vectors(60), 1e-6 * vectors(60, 1)
    turned = so3.log(so3.exp(v + 0.5 * dv) @ so3.exp(v - 0.5 * dv).swapaxes(1, 2))
    np.testing.assert_allclose(turned, (so3.left_jacobian(v) @ dv[..., None])[..., 0], atol=1e-15)
    product = so3.left_jacobian(v) @ so3.left_jacobian_inverse(v)
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(3), product.shape), atol=1e-12)


def test_random_rotations_are_uniform():
    r = so3.random_rotations(20000, np.random.default_rng(0))
    so3.check_rotations(r, tolerance=1e-13)
    # E[R] = 0, E[R_ij R_kl] = delta_ik delta_jl / 3; F(omega) = (omega - sin omega)/pi
    assert np.abs(r.mean(axis=0)).max() < 4 * np.sqrt(1 / 3 / 20000)
    assert kstest(so3.angle(r), lambda w: (w - np.sin(w)) / np.pi).pvalue > 0.01


# ----------------------------------------------------------------------------------------- IGSO3


@pytest.mark.parametrize("sigma", SIGMAS)
def test_igso3_is_normalised_and_its_cdf_is_its_integral(sigma):
    top = min(np.pi, 12 * sigma)
    omega, weight = quadrature(top)
    assert weight @ so3.igso3_angle_density(omega, sigma) == pytest.approx(1.0, abs=1e-12)
    for part in (0.1, 0.4, 0.9):
        omega, weight = quadrature(part * top)
        integral = weight @ so3.igso3_angle_density(omega, sigma)
        assert so3.igso3_angle_cdf(part * top, sigma) == pytest.approx(integral, abs=1e-12)
    assert so3.igso3_angle_cdf([0.0, np.pi], sigma).tolist() == pytest.approx([0.0, 1.0], abs=1e-13)


def test_both_forms_agree_where_they_meet():
    omega = np.concatenate([[0.0, 1e-9, 1e-5], np.linspace(1e-3, np.pi, 100)])
    for sigma in (1.2, 1.5, 1.8):
        density, slope = so3._series(omega, np.full_like(omega, sigma))
        value, ratio = so3._images(omega, np.full_like(omega, sigma))
        np.testing.assert_allclose(np.log(density), value, atol=3e-14)
        np.testing.assert_allclose(slope / density, ratio, atol=3e-14)


def test_limits():
    # small sigma: normal in the tangent space, with the volume 8 pi^2 of SO(3)
    v = 0.01 * np.array([[1.0, 0.0, 0.0], [0.3, -2.0, 0.5]])
    normal = np.log(8 * np.pi**2) - 1.5 * np.log(2 * np.pi * 1e-4) - 0.5 * (v**2).sum(axis=1) / 1e-4
    np.testing.assert_allclose(so3.igso3_log_density(so3.angle(so3.exp(v)), 0.01), normal, atol=1e-4)
    np.testing.assert_allclose(so3.igso3_score(v, 0.01), -v / 1e-4, rtol=1e-4, atol=1e-6)
    # far out in the tail nothing underflows
    assert so3.igso3_log_density(np.pi, 1e-3) == pytest.approx(-0.5 * np.pi**2 / 1e-6, rel=1e-4)
    # large sigma: uniform, with the slowest mode left over, 3 exp(-sigma^2) (1 + 2 cos omega)
    omega = np.array([0.0, 1.0, 3.0])
    np.testing.assert_allclose(
        so3.igso3_log_density(omega, 4.0), 3 * np.exp(-16.0) * (1 + 2 * np.cos(omega)), rtol=1e-6
    )
    assert np.abs(so3.igso3_score(so3.log(so3.exp([0.0, np.pi, 0.0])), 0.5)).max() < 1e-12


@pytest.mark.parametrize("sigma", [0.02, 0.3, 1.0, 1.49, 1.51, 3.0])
def test_the_score_is_the_gradient_of_the_log_density(sigma):
    axis = vectors(40)[10:]
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    v = axis * np.linspace(0.02, min(3.1, 5 * sigma), len(axis))[:, None]
    gradient = so3.lie_gradient(
        lambda r: so3.igso3_log_density(so3.angle(r), sigma), so3.exp(v), step=1e-3 * min(1.0, sigma / 0.3)
    )
    found = so3.igso3_score(v, sigma)
    error = np.linalg.norm(gradient - found, axis=1) / np.linalg.norm(found, axis=1)
    assert np.median(error) < 1e-8
    assert error.max() < 1e-6


@pytest.mark.parametrize("sigma", [0.3, 1.45, 2.0])
def test_the_heat_equation(sigma):
    """df/d(sigma^2) = Laplacian f / 2: the width means what it says."""
    r = so3.exp(vectors(40)[8:30])

    def density(width):
        return np.exp(so3.igso3_log_density(so3.angle(r), width))

    h = 1e-3
    widths = [np.sqrt(sigma**2 + k * h) for k in (1, -1, 2, -2)]
    near, back, far, far_back = map(density, widths)
    slope = (8 * (near - back) - (far - far_back)) / (12 * h)
    lap = so3.laplacian(lambda q: np.exp(so3.igso3_log_density(so3.angle(q), sigma)), r)
    np.testing.assert_allclose(slope, 0.5 * lap, rtol=2e-5, atol=2e-6 * density(sigma).max())


def test_divergence_of_the_score_is_the_laplacian():
    r = so3.exp(vectors(30)[8:20])
    found = so3.lie_divergence(lambda q: so3.igso3_score(so3.log(q), 0.8), r)
    want = so3.laplacian(lambda q: so3.igso3_log_density(so3.angle(q), 0.8), r)
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_divergence_integrates_to_zero_over_the_group():
    """The space-frame fields are divergence-free: a field's divergence has mean zero."""
    r = so3.random_rotations(40000, np.random.default_rng(3))

    def field(q):
        return np.stack([q[:, 0, 1] ** 2, q[:, 1, 1] * q[:, 2, 0], np.exp(q[:, 2, 2])], axis=1)

    found = so3.lie_divergence(field, r)
    assert abs(found.mean()) < 3.5 * found.std() / np.sqrt(len(r))
    assert found.std() > 0.1


@pytest.mark.parametrize("sigma", [0.01, 0.25, 0.8, 1.3, 1.6, 4.0])
def test_samples_have_the_angle_distribution(sigma):
    v = so3.sample_igso3(sigma, 4000, generator=np.random.default_rng(11))
    omega = np.linalg.norm(v, axis=1)
    assert kstest(omega, lambda w: so3.igso3_angle_cdf(w, sigma)).pvalue > 0.01
    assert np.abs(v.mean(axis=0)).max() < 4 * omega.std() / np.sqrt(4000) + 4 * sigma / np.sqrt(4000)


def test_inversion_is_exact():
    generator = np.random.default_rng(5)
    sigma = np.exp(generator.uniform(np.log(1e-3), np.log(10.0), 3000))
    u = generator.random(3000)
    u[:6] = 0.0, 1e-15, 1e-9, 1 - 1e-9, 1 - 1e-15, np.nextafter(1.0, 0.0)
    np.testing.assert_allclose(so3.igso3_angle_cdf(so3._invert_cdf(u, sigma), sigma), u, atol=1e-13)
    assert np.linalg.norm(so3.sample_igso3(0.0, 3, generator=generator)) == 0


@pytest.mark.parametrize(("s_1", "s_2"), [(0.1, 0.2), (0.6, 0.9), (1.3, 1.0)])
def test_semigroup(s_1, s_2):
    """IGSO3(s_1) after IGSO3(s_2) is IGSO3 of the root of the sum of squares."""
    generator = np.random.default_rng(21)
    first, second = (so3.sample_igso3(s, 4000, generator=generator) for s in (s_1, s_2))
    omega = so3.angle(so3.exp(first) @ so3.exp(second))
    assert kstest(omega, lambda w: so3.igso3_angle_cdf(w, np.hypot(s_1, s_2))).pvalue > 0.01
    assert kstest(omega, lambda w: so3.igso3_angle_cdf(w, max(s_1, s_2))).pvalue < 1e-4


def test_semigroup_by_quadrature():
    """The convolution of two densities at one angle, without sampling."""
    s_1, s_2, at = 0.5, 0.4, 0.7
    omega, weight = quadrature(np.pi, 200)
    cosine, cos_weight = np.polynomial.legendre.leggauss(60)
    axis = np.stack([np.sqrt(1 - cosine**2), 0 * cosine, cosine], axis=1)
    q = so3.exp(omega[:, None, None] * axis)
    rest = so3.angle(so3.exp([0.0, 0.0, at]) @ q.swapaxes(-1, -2))
    density = np.exp(so3.igso3_log_density(rest, s_2)) @ (0.5 * cos_weight)
    found = weight @ (so3.igso3_angle_density(omega, s_1) * density)
    assert np.log(found) == pytest.approx(so3.igso3_log_density(at, np.hypot(s_1, s_2)), abs=1e-9)


# ------------------------------------------------------------------------------------- bad input

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: so3.hat([1.0, 2.0]), r"vector: expected shape \(\.\.\., 3\), found \(2,\)"),
        (lambda: so3.vee(np.eye(2)), r"matrix: expected shape"),
        (lambda: so3.exp([np.nan, 0.0, 0.0]), "vector: expected finite numbers, found 1"),
        (lambda: so3.exp(["a", "b", "c"]), "vector: expected an array of real numbers"),
        (lambda: so3.log(np.eye(4)), r"rotation: expected shape \(\.\.\., 3, 3\)"),
        (lambda: so3.left_jacobian_inverse([0.0, 7.0, 0.0]), "angles below 2 pi"),
        (lambda: so3.check_rotations(2 * np.eye(3)), "off by 3"),
        (lambda: so3.check_rotations(np.diag([1.0, 1.0, -1.0])), "determinant -1"),
        (lambda: so3.random_rotations(1.5, RNG), "n: expected a whole number >= 0, found 1.5"),
        (lambda: so3.igso3_log_density(90.0, 1.0), "degrees"),
        (lambda: so3.igso3_log_density(-0.1, 1.0), r"angles in \[0, pi\]"),
        (lambda: so3.igso3_log_density(0.1, 0.0), "sigma: expected widths > 0"),
        (lambda: so3.igso3_score([4.0, 0.0, 0.0], 1.0), r"angles in \[0, pi\]"),
        (lambda: so3.igso3_score([0.1, 0.0, 0.0], np.inf), "sigma: expected finite"),
        (lambda: so3.igso3_angle_cdf(1.0, -1.0), "sigma: expected widths > 0"),
        (lambda: so3.sample_igso3(-1.0, 3, generator=RNG), "sigma: expected widths >= 0"),
        (lambda: so3.sample_igso3([0.1, 0.2], 3, generator=RNG), "one for each of 3 draws"),
        (lambda: so3.lie_gradient(so3.angle, np.eye(3)), r"rotation: expected shape \(n, 3, 3\)"),
        (lambda: so3.laplacian(so3.angle, np.eye(3)), r"rotation: expected shape \(n, 3, 3\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_an_inversion_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(so3, "MAX_STEPS", 1)
    with pytest.raises(ConvergenceError, match="3 of 3 did not converge"):
        so3.sample_igso3(0.5, 3, generator=np.random.default_rng(0))
