r"""Rotations: exponential and logarithm, and the isotropic Gaussian IGSO3 on SO(3).

IGSO3(sigma) is the heat kernel exp(sigma^2/2 Laplacian) at the identity: Brownian motion stopped at
time sigma^2. With the angle omega of a rotation, relative to the normalised Haar measure,

.. math:: f_\sigma(\omega) = \sum_{l=0}^{\infty} (2l+1)\, e^{-l(l+1)\sigma^2/2}\,
          \frac{\sin((l+\tfrac12)\omega)}{\sin(\omega/2)}
          = \frac{\sqrt{2\pi}\, e^{\sigma^2/8}}{\sigma^3 \sin(\omega/2)}
          \sum_{k=-\infty}^{\infty} (-1)^k (\omega - 2\pi k)\, e^{-(\omega - 2\pi k)^2/2\sigma^2} ,

the second form by Poisson summation. The first converges fast for large sigma, the second for small;
at ``SWITCH`` both are exact to rounding. For small sigma the rotation vector is normal, N(0, sigma^2 1).

Angles are in rad. Everything is float64 and works on any leading shape. Derivatives are along
exp(eps e_i) R, in the space frame; these fields are divergence-free for the Haar measure.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import chdtri, erf

from ..errors import ConvergenceError, InputError

FloatArray = npt.NDArray[np.float64]

SWITCH = 1.5
"""sigma [rad] from which the series in l is used; both forms are exact to rounding there."""

N_SERIES = 9
"""Terms of the series in l: the next one is below 1e-40 at ``SWITCH``."""

N_IMAGES = 2
"""Images on either side in the Poisson sum: the next one is below 1e-22 at ``SWITCH``."""

ONE_IMAGE = 0.9
"""sigma [rad] up to which one image is enough: the next one is below 1e-21 there."""

MAX_STEPS = 100
"""Newton or bisection steps that invert the CDF; about six do."""


def _real(name: str, value: Any, tail: tuple[int, ...]) -> FloatArray:
    try:
        out = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as err:
        raise InputError(f"{name}: expected an array of real numbers, found {err}.") from err
    if tail and out.shape[-len(tail) :] != tail:
        shape = ", ".join(str(n) for n in tail)
        raise InputError(f"{name}: expected shape (..., {shape}), found {out.shape}.")
    if not np.isfinite(out).all():
        raise InputError(
            f"{name}: expected finite numbers, found {np.count_nonzero(~np.isfinite(out))} that are not."
        )
    return out


def _sigma(sigma: Any) -> FloatArray:
    out = _real("sigma", sigma, ())
    if (out <= 0).any():
        raise InputError(f"sigma: expected widths > 0 [rad], found {float(out.min()):g}.")
    return out


def _angle(omega: Any) -> FloatArray:
    out = _real("omega", omega, ())
    if (out < 0).any() or (out > np.pi * (1 + 1e-12)).any():
        raise InputError(
            f"omega: expected angles in [0, pi] rad, found {float(out.min()):g} to {float(out.max()):g}; "
            "degrees? np.radians converts them."
        )
    return np.minimum(out, np.pi)


def hat(vector: Any) -> FloatArray:
    """Skew matrix of a vector: ``hat(a) @ b`` is the cross product a x b.

    Parameters
    ----------
    vector : array_like, shape (..., 3)

    Returns
    -------
    numpy.ndarray, shape (..., 3, 3)

    Raises
    ------
    InputError
        If the last axis is not 3 or a number is not finite.

    Examples
    --------
    >>> hat([1.0, 2.0, 3.0]) @ [1.0, 0.0, 0.0]
    array([ 0.,  3., -2.])
    """
    v = _real("vector", vector, (3,))
    out = np.zeros((*v.shape, 3))
    out[..., 2, 1], out[..., 0, 2], out[..., 1, 0] = v[..., 0], v[..., 1], v[..., 2]
    return out - out.swapaxes(-1, -2)


def vee(matrix: Any) -> FloatArray:
    """Vector of the skew part of a matrix, the inverse of :func:`hat`.

    Parameters
    ----------
    matrix : array_like, shape (..., 3, 3)

    Returns
    -------
    numpy.ndarray, shape (..., 3)

    Raises
    ------
    InputError
        If the last axes are not (3, 3) or a number is not finite.

    Examples
    --------
    >>> vee(hat([1.0, 2.0, 3.0]))
    array([1., 2., 3.])
    """
    m = _real("matrix", matrix, (3, 3))
    skew = m - m.swapaxes(-1, -2)
    return 0.5 * np.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], axis=-1)


def _sinc(x: FloatArray) -> FloatArray:
    """sin(x)/x."""
    return np.sinc(x / np.pi)


def exp(vector: Any) -> FloatArray:
    r"""Rotation by the angle \|v\| about v.

    .. math:: e^{\hat v} = 1 + \frac{\sin\omega}{\omega} \hat v
              + \frac12 \left(\frac{\sin(\omega/2)}{\omega/2}\right)^2 \hat v^2, \quad \omega = |v|

    Parameters
    ----------
    vector : array_like, shape (..., 3)
        Rotation vectors [rad], of any length.

    Returns
    -------
    numpy.ndarray, shape (..., 3, 3)

    Raises
    ------
    InputError
        If the last axis is not 3 or a number is not finite.

    Examples
    --------
    >>> (exp([0.0, 0.0, np.pi / 2]) @ [1.0, 0.0, 0.0]).round(12)
    array([0., 1., 0.])
    """
    v = _real("vector", vector, (3,))
    omega = np.linalg.norm(v, axis=-1)[..., None, None]
    k = hat(v)
    return np.eye(3) + _sinc(omega) * k + 0.5 * _sinc(0.5 * omega) ** 2 * (k @ k)


def log(rotation: Any) -> FloatArray:
    """Rotation vector of a rotation, of length at most pi; sound at the identity and at pi.

    By the quaternion, from the largest of its four components (Shepperd). At pi exactly, where v and
    -v are the same rotation, either may come.

    Parameters
    ----------
    rotation : array_like, shape (..., 3, 3)
        Orthogonal to rounding, with determinant 1 (see :func:`check_rotations`).

    Returns
    -------
    numpy.ndarray, shape (..., 3)
        [rad].

    Raises
    ------
    InputError
        If the last axes are not (3, 3) or a number is not finite.

    References
    ----------
    S. W. Shepperd, Quaternion from rotation matrix, 1978, doi:10.2514/3.55767b.

    Examples
    --------
    >>> log(exp([0.1, -0.2, 0.3])).round(12)
    array([ 0.1, -0.2,  0.3])
    """
    r = _real("rotation", rotation, (3, 3))
    trace = np.trace(r, axis1=-2, axis2=-1)
    # 4 q q^T as a matrix: its column with the largest diagonal is q without cancellation.
    outer = np.empty((*r.shape[:-2], 4, 4))
    outer[..., 0, 0] = 1 + trace
    outer[..., 0, 1:] = outer[..., 1:, 0] = 2 * vee(r)
    outer[..., 1:, 1:] = r + r.swapaxes(-1, -2) + (1 - trace)[..., None, None] * np.eye(3)
    diagonal = np.diagonal(outer, axis1=-2, axis2=-1)
    largest = diagonal.argmax(axis=-1)[..., None, None]
    q = np.take_along_axis(outer, largest, axis=-1)[..., 0]
    q = q / np.linalg.norm(q, axis=-1, keepdims=True)
    q = np.where(q[..., :1] < 0, -q, q)
    sine = np.linalg.norm(q[..., 1:], axis=-1, keepdims=True)
    omega = 2 * np.arctan2(sine, q[..., :1])
    # omega/sine -> 2/cos(omega/2) at the identity.
    scale = np.where(sine > 1e-8, omega / np.where(sine > 1e-8, sine, 1.0), 2.0)
    return scale * q[..., 1:]


def angle(rotation: Any) -> FloatArray:
    """Angle of a rotation, in [0, pi].

    Parameters
    ----------
    rotation : array_like, shape (..., 3, 3)

    Returns
    -------
    numpy.ndarray, shape (...)
        [rad].

    Raises
    ------
    InputError
        As :func:`log`.

    Examples
    --------
    >>> float(angle(exp([0.0, 0.5, 0.0])).round(12))
    0.5
    """
    return np.linalg.norm(log(rotation), axis=-1)


def left_jacobian(vector: Any) -> FloatArray:
    r"""J of a moving rotation vector: the angular velocity in the space frame is J(v) dv/dt.

    .. math:: J(v) = 1 + \frac{1 - \cos\omega}{\omega^2} \hat v
              + \frac{\omega - \sin\omega}{\omega^3} \hat v^2

    Parameters
    ----------
    vector : array_like, shape (..., 3)
        [rad].

    Returns
    -------
    numpy.ndarray, shape (..., 3, 3)

    Raises
    ------
    InputError
        If the last axis is not 3 or a number is not finite.

    Examples
    --------
    >>> left_jacobian([0.0, 0.0, 0.0]).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    v = _real("vector", vector, (3,))
    omega = np.linalg.norm(v, axis=-1)[..., None, None]
    small = omega < 0.05
    safe = np.where(small, 1.0, omega)
    w2 = omega**2
    cubic = np.where(small, 1 / 6 - w2 / 120 + w2**2 / 5040 - w2**3 / 362880, (safe - np.sin(safe)) / safe**3)
    k = hat(v)
    return np.eye(3) + 0.5 * _sinc(0.5 * omega) ** 2 * k + cubic * (k @ k)


def left_jacobian_inverse(vector: Any) -> FloatArray:
    r"""Inverse of :func:`left_jacobian`, for \|v\| below 2 pi.

    .. math:: J^{-1}(v) = 1 - \tfrac12 \hat v
              + \frac{1}{\omega^2}\left(1 - \frac{\omega}{2}\cot\frac{\omega}{2}\right) \hat v^2

    Parameters
    ----------
    vector : array_like, shape (..., 3)
        [rad].

    Returns
    -------
    numpy.ndarray, shape (..., 3, 3)

    Raises
    ------
    InputError
        If the last axis is not 3, a number is not finite, or an angle is 2 pi or more.

    Examples
    --------
    >>> v = [0.3, -1.0, 2.0]
    >>> bool(np.allclose(left_jacobian(v) @ left_jacobian_inverse(v), np.eye(3)))
    True
    """
    v = _real("vector", vector, (3,))
    omega = np.linalg.norm(v, axis=-1)[..., None, None]
    if (omega >= 2 * np.pi).any():
        raise InputError(f"vector: expected angles below 2 pi rad, found {float(omega.max()):g}.")
    k = hat(v)
    return np.eye(3) - 0.5 * k + _over_angle(omega) * (k @ k)


def _over_angle(omega: FloatArray) -> FloatArray:
    """(1 - (omega/2) cot(omega/2))/omega^2, which is 1/12 at 0."""
    small = omega < 0.05
    safe = np.where(small, 1.0, omega)
    w2 = omega**2
    taylor = 1 / 12 + w2 / 720 + w2**2 / 30240 + w2**3 / 1209600
    return np.where(small, taylor, (1 - 0.5 * safe / np.tan(0.5 * safe)) / safe**2)


def check_rotations(rotation: Any, *, name: str = "rotation", tolerance: float = 1e-6) -> FloatArray:
    """The same rotations as float64, if they are rotations.

    Parameters
    ----------
    rotation : array_like, shape (..., 3, 3)
    name : str
        Used in the error message.
    tolerance : float
        Largest deviation of R R^T from 1 allowed.

    Returns
    -------
    numpy.ndarray, shape (..., 3, 3)

    Raises
    ------
    InputError
        If the shape is wrong, a number is not finite, or a matrix is no rotation.

    Examples
    --------
    >>> check_rotations(-np.eye(3))
    Traceback (most recent call last):
    openmm_diffforce.errors.InputError: rotation: expected rotations, found a matrix with determinant -1; ...
    """
    r = _real(name, rotation, (3, 3))
    error = np.abs(r @ r.swapaxes(-1, -2) - np.eye(3)).max(initial=0.0)
    if error > tolerance:
        raise InputError(
            f"{name}: expected rotations (R R^T = 1), found a matrix that is off by {error:.3g}; "
            "orthogonalise it by its singular vectors."
        )
    if (np.linalg.det(r) < 0).any():
        raise InputError(
            f"{name}: expected rotations, found a matrix with determinant -1; "
            "a reflection turns left-handed what it moves."
        )
    return r


def random_rotations(n: int, generator: np.random.Generator) -> FloatArray:
    """Uniform (Haar) rotations, from normalised normal quaternions.

    Parameters
    ----------
    n : int
    generator : numpy.random.Generator

    Returns
    -------
    numpy.ndarray, shape (n, 3, 3)

    Raises
    ------
    InputError
        If n is no whole number >= 0, or ``generator`` is none.

    Examples
    --------
    >>> random_rotations(2, np.random.default_rng(0)).shape
    (2, 3, 3)
    """
    q = _generator(generator).standard_normal((_count(n), 4))
    q /= np.linalg.norm(q, axis=1, keepdims=True)
    w, v = q[:, 0, None, None], q[:, 1:]
    k = hat(v)
    return np.eye(3) + 2 * w * k + 2 * (k @ k)


def _generator(generator: Any) -> np.random.Generator:
    if not isinstance(generator, np.random.Generator):
        raise InputError(
            f"generator: expected a numpy.random.Generator, found {type(generator).__name__}; pass "
            "numpy.random.default_rng(seed)."
        )
    return generator


def _count(n: Any) -> int:
    if not isinstance(n, int | np.integer) or isinstance(n, bool) or n < 0:
        raise InputError(f"n: expected a whole number >= 0, found {n!r}.")
    return int(n)


# ------------------------------------------------------------------- the two forms of the density


def _series(omega: FloatArray, sigma: FloatArray) -> tuple[FloatArray, FloatArray]:
    """f and (df/domega)/omega by the series in l."""
    density = np.zeros(np.broadcast_shapes(omega.shape, sigma.shape))
    slope = np.zeros_like(density)
    # The character is 1 + 2 sum_m cos(m omega), m = 1 .. l: no quotient that vanishes.
    character, character_slope = np.ones_like(omega), np.zeros_like(omega)
    for degree in range(N_SERIES):
        if degree:
            character = character + 2 * np.cos(degree * omega)
            character_slope = character_slope - 2 * degree**2 * _sinc(degree * omega)
        weight = (2 * degree + 1) * np.exp(-0.5 * degree * (degree + 1) * sigma**2)
        density = density + weight * character
        slope = slope + weight * character_slope
    return density, slope


def _images(omega: FloatArray, sigma: FloatArray) -> tuple[FloatArray, FloatArray]:
    """ln f and (d ln f/domega)/omega by the Poisson sum.

    f = prefactor * (omega/sin(omega/2)) exp(-omega^2/2 sigma^2) B, and B = 1 + the images,
    (-1)^k exp(-2 pi^2 k^2/sigma^2) [2 cosh(z) - (4 pi k/omega) sinh(z)], z = 2 pi k omega/sigma^2.
    """
    s2 = sigma**2
    bracket = np.ones(np.broadcast_shapes(omega.shape, sigma.shape))
    slope = np.zeros_like(bracket)
    for k in range(1, N_IMAGES + 1 if sigma.max(initial=0.0) > ONE_IMAGE else 2):
        rate = 2 * np.pi * k / s2
        z = rate * omega
        near = np.exp(-rate * (np.pi * k - omega))  # e^z and e^-z, each with the weight: no overflow
        far = np.exp(-rate * (np.pi * k + omega))
        small = z < 0.3
        safe = np.where(small, 1.0, z)
        z2 = z**2
        both = near + far
        # sinh(z)/z and (z cosh z - sinh z)/z^3, times twice the weight
        weight = 2 * np.exp(-rate * np.pi * k)
        sinhc = np.where(
            small, weight * (1 + z2 / 6 + z2**2 / 120 + z2**3 / 5040 + z2**4 / 362880), (near - far) / safe
        )
        third = np.where(
            small,
            weight * (1 / 3 + z2 / 30 + z2**2 / 840 + z2**3 / 45360 + z2**4 / 3991680),
            (both - sinhc) / safe**2,
        )
        sign = -1.0 if k % 2 else 1.0
        bracket = bracket + sign * (both - 2 * np.pi * k * rate * sinhc)
        slope = slope + sign * rate**2 * (sinhc - 2 * np.pi * k * rate * third)
    value = (
        0.125 * s2
        + 0.5 * np.log(2 * np.pi)
        - 3 * np.log(sigma)
        + np.log(2 / _sinc(0.5 * omega))
        - 0.5 * omega**2 / s2
        + np.log(bracket)
    )
    # (1/omega - cot(omega/2)/2)/omega is _over_angle.
    return value, _over_angle(omega) - 1 / s2 + slope / bracket


def _log_density_slope(omega: FloatArray, sigma: FloatArray) -> tuple[FloatArray, FloatArray]:
    """ln f and (d ln f/domega)/omega, whichever form is good."""
    omega, sigma = np.broadcast_arrays(omega, sigma)
    value, slope = np.empty(omega.shape), np.empty(omega.shape)
    wide = sigma >= SWITCH
    if wide.any():
        density, gradient = _series(omega[wide], sigma[wide])
        value[wide], slope[wide] = np.log(density), gradient / density
    if not wide.all():
        value[~wide], slope[~wide] = _images(omega[~wide], sigma[~wide])
    return value, slope


# ------------------------------------------------------------------------------------- IGSO3


def igso3_log_density(omega: Any, sigma: Any) -> FloatArray:
    r"""ln f of IGSO3 relative to the normalised Haar measure.

    The equation is that of the module: :mod:`openmm_diffforce.docking.so3`.

    Parameters
    ----------
    omega : array_like
        Angle of the rotation, in [0, pi] [rad].
    sigma : array_like
        Width [rad], broadcast with ``omega``.

    Returns
    -------
    numpy.ndarray
        Of the broadcast shape. It never underflows. The density relative to the volume element of
        rotation vectors at the identity is f/(8 pi^2).

    Raises
    ------
    InputError
        If an angle is outside [0, pi], a width is not above zero, or a number is not finite.

    Notes
    -----
    Relative error of f about 1e-13 for sigma from 1e-3 to 10. Deterministic.

    References
    ----------
    D. I. Nikolayev and T. I. Savyolova, Normal distribution on the rotation group SO(3), 1997,
    doi:10.1155/TSM.29.201.
    A. Leach, S. M. Schmon, M. T. Degiacomi and C. G. Willcocks, Denoising diffusion probabilistic
    models on SO(3) for rotational alignment, 2022 (its epsilon is sigma/sqrt(2)).

    Examples
    --------
    >>> float(igso3_log_density(1.0, 10.0))
    0.0
    """
    return _log_density_slope(_angle(omega), _sigma(sigma))[0]


def igso3_score(vector: Any, sigma: Any) -> FloatArray:
    r"""Gradient of ln f at the rotation exp(v): d/deps ln f(exp(eps e_i) exp(v)).

    .. math:: s = \frac{d \ln f_\sigma}{d\omega}\, \frac{v}{\omega}, \quad \omega = |v|

    The same in the space and in the body frame, because exp(v) leaves v alone.

    Parameters
    ----------
    vector : array_like, shape (..., 3)
        Rotation vectors, of length at most pi [rad].
    sigma : array_like
        Width [rad], broadcast with the leading shape.

    Returns
    -------
    numpy.ndarray, shape (..., 3)
        [1/rad]. -v/sigma^2 for small sigma; 0 at the identity and at pi.

    Raises
    ------
    InputError
        As :func:`igso3_log_density`, and if the last axis is not 3.

    Examples
    --------
    >>> float(igso3_score([0.0, 0.0, 0.02], 0.01)[2].round(3))
    -199.998
    """
    v = _real("vector", vector, (3,))
    slope = _log_density_slope(_angle(np.linalg.norm(v, axis=-1)), _sigma(sigma))[1]
    return slope[..., None] * v


def igso3_angle_density(omega: Any, sigma: Any) -> FloatArray:
    r"""Density of the angle alone, f (1 - cos omega)/pi on [0, pi].

    Parameters
    ----------
    omega, sigma : array_like
        As in :func:`igso3_log_density`.

    Returns
    -------
    numpy.ndarray
        [1/rad].

    Raises
    ------
    InputError
        As :func:`igso3_log_density`.

    Examples
    --------
    >>> bool(np.isclose(igso3_angle_density(2.0, 10.0), (1 - np.cos(2.0)) / np.pi))
    True
    """
    w = _angle(omega)
    return np.exp(igso3_log_density(w, sigma)) * 2 * np.sin(0.5 * w) ** 2 / np.pi


def igso3_angle_cdf(omega: Any, sigma: Any) -> FloatArray:
    r"""Probability of an angle below omega, in closed form.

    .. math:: F(\omega) = \frac1\pi \sum_l (2l+1) e^{-l(l+1)\sigma^2/2}
              \left[\frac{\sin l\omega}{l} - \frac{\sin (l+1)\omega}{l+1}\right]

    for sigma from ``SWITCH`` on (the first term of l = 0 is omega), else the Poisson sum of
    :math:`u \sin(u/2) e^{-u^2/2\sigma^2}`, u = omega - 2 pi k, integrated with error functions.

    Parameters
    ----------
    omega, sigma : array_like
        As in :func:`igso3_log_density`.

    Returns
    -------
    numpy.ndarray
        In [0, 1].

    Raises
    ------
    InputError
        As :func:`igso3_log_density`.

    Notes
    -----
    Absolute error about 1e-14.

    Examples
    --------
    >>> igso3_angle_cdf([0.0, np.pi], 0.3).round(12).tolist()
    [0.0, 1.0]
    """
    w, s = np.broadcast_arrays(_angle(omega), _sigma(sigma))
    out = np.empty(w.shape)
    wide = s >= SWITCH
    out[wide] = _cdf_series(w[wide], s[wide])
    out[~wide] = _cdf_images(w[~wide], s[~wide])
    return np.clip(out, 0.0, 1.0)


def _cdf_series(omega: FloatArray, sigma: FloatArray) -> FloatArray:
    total = omega - np.sin(omega)
    for degree in range(1, N_SERIES):
        weight = (2 * degree + 1) * np.exp(-0.5 * degree * (degree + 1) * sigma**2)
        total = total + weight * (
            np.sin(degree * omega) / degree - np.sin((degree + 1) * omega) / (degree + 1)
        )
    return total / np.pi


def _cdf_images(omega: FloatArray, sigma: FloatArray) -> FloatArray:
    out = np.empty(omega.shape)
    # Images that are left out weigh less than exp(-54), exp(-44) and exp(-54).
    for n_images, low, high in ((0, 0.0, 0.3), (1, 0.3, 1.0), (2, 1.0, SWITCH)):
        some = (sigma >= low) & (sigma < high)
        w, s = omega[some], sigma[some]
        # The primitive is odd, so that its values at omega = 0 cancel between k and -k.
        out[some] = sum(_primitive(w - 2 * np.pi * k, s) for k in range(-n_images, n_images + 1))
    return out


def _primitive(u: FloatArray, sigma: FloatArray) -> FloatArray:
    """Of 2 sqrt(2/pi) exp(sigma^2/8)/sigma^3 * u sin(u/2) exp(-u^2/2 sigma^2)."""
    root = np.sqrt(2.0) * sigma
    wave = np.sin(0.5 * u) * np.exp(0.125 * sigma**2 - (u / root) ** 2)
    return np.asarray(erf(u / root - 0.25j * root).real - 2 * np.sqrt(2 / np.pi) / sigma * wave)


def sample_igso3(sigma: Any, n: int | None = None, *, generator: np.random.Generator) -> FloatArray:
    """Rotation vectors drawn from IGSO3: the angle by its inverted CDF, the axis uniform.

    Parameters
    ----------
    sigma : array_like
        One width, or one for every draw [rad]; 0 gives the identity.
    n : int, optional
        Number of draws, where ``sigma`` is one number.
    generator : numpy.random.Generator

    Returns
    -------
    numpy.ndarray, shape (n, 3)
        Rotation vectors, of length at most pi [rad].

    Raises
    ------
    InputError
        If a width is negative or not finite, its shape is neither () nor (n,), or ``generator`` is none.
    ConvergenceError
        If the inversion fails.

    Examples
    --------
    >>> v = sample_igso3(0.1, 4, generator=np.random.default_rng(0))
    >>> v.shape
    (4, 3)
    """
    s = _real("sigma", sigma, ())
    if (s < 0).any():
        raise InputError(f"sigma: expected widths >= 0 [rad], found {float(s.min()):g}.")
    count = _count(n) if n is not None else s.size
    if s.ndim > 1 or (s.ndim == 1 and len(s) != count):
        raise InputError(f"sigma: expected one width, or one for each of {count} draws, found {s.shape}.")
    s = np.broadcast_to(s, (count,))
    u = _generator(generator).random(count)
    axis = generator.standard_normal((count, 3))
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    omega = np.zeros(count)
    some = s > 0
    omega[some] = _invert_cdf(u[some], s[some])
    return omega[:, None] * axis


def _invert_cdf(u: FloatArray, sigma: FloatArray) -> FloatArray:
    """Newton steps on the cube root of F, which is nearly straight, kept inside a bracket."""
    low, high = np.zeros_like(u), np.full_like(u, np.pi)
    goal = np.cbrt(u)
    chi = sigma * np.sqrt(chdtri(3, np.maximum(1 - u, 1e-300)))  # the limit of small sigma
    omega = np.where(chi < 2.5, chi, 0.5 * np.pi)
    active = np.arange(len(u))
    for _ in range(MAX_STEPS):
        w, s = omega[active], sigma[active]
        root = np.cbrt(igso3_angle_cdf(w, s))
        above = root > goal[active]
        high[active] = np.where(above, w, high[active])
        low[active] = np.where(above, low[active], w)
        slope = igso3_angle_density(w, s) / np.maximum(3 * root**2, 1e-300)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            newton = w - (root - goal[active]) / slope
        # Quadratic convergence: a step of 1e-8 leaves 1e-15. Comparisons are False for NaN.
        last = np.abs(newton - w) < 1e-8
        inside = (newton > low[active]) & (newton < high[active])
        middle = 0.5 * (low[active] + high[active])
        omega[active] = np.where(last, np.clip(newton, 0.0, np.pi), np.where(inside, newton, middle))
        done = last | (high[active] - low[active] < 1e-12)
        active = active[~done]
        if not len(active):
            return omega
    raise ConvergenceError(
        f"IGSO3 angles: expected the inversion within {MAX_STEPS} steps, {len(active)} of {len(u)} did not "
        "converge."
    )


# -------------------------------------------------------------------------- derivatives on the group


def lie_gradient(
    function: Callable[[FloatArray], FloatArray], rotation: Any, *, step: float = 1e-3
) -> FloatArray:
    """Space-frame gradient of a function of rotations, by central differences of fourth order.

    Component i is d/deps f(exp(eps e_i) R) at 0. For a function with more components the last axis of
    the result is the direction.

    Parameters
    ----------
    function : callable
        From rotations [n, 3, 3] to values [n, ...].
    rotation : array_like, shape (n, 3, 3)
    step : float
        h [rad].

    Returns
    -------
    numpy.ndarray, shape (n, ..., 3)

    Raises
    ------
    InputError
        If ``rotation`` has another shape.

    Examples
    --------
    >>> lie_gradient(lambda r: r[:, 1, 0], np.eye(3)[None]).round(9).tolist()
    [[0.0, 0.0, 1.0]]
    """
    r = _real("rotation", rotation, (3, 3))
    if r.ndim != 3:
        raise InputError(f"rotation: expected shape (n, 3, 3), found {r.shape}.")
    out = []
    for i in range(3):
        turns = [exp(k * step * np.eye(3)[i]) for k in (1, -1, 2, -2)]
        near, back, far, far_back = (np.asarray(function(turn @ r)) for turn in turns)
        out.append((8 * (near - back) - (far - far_back)) / (12 * step))
    return np.stack(out, axis=-1)


def lie_divergence(
    field: Callable[[FloatArray], FloatArray], rotation: Any, *, step: float = 1e-3
) -> FloatArray:
    """Divergence of a space-frame vector field on SO(3): the sum of the derivatives of v_i along e_i.

    Parameters
    ----------
    field : callable
        From rotations [n, 3, 3] to vectors [n, 3].
    rotation : array_like, shape (n, 3, 3)
    step : float
        h [rad].

    Returns
    -------
    numpy.ndarray, shape (n,)

    Raises
    ------
    InputError
        If ``rotation`` has another shape.

    Examples
    --------
    >>> v = np.array([[0.1, 0.0, 0.2]])
    >>> found = lie_divergence(lambda r: igso3_score(log(r), 0.5), exp(v))
    >>> bool(abs(found[0] - (-11.75)) < 0.05)
    True
    """
    return np.trace(lie_gradient(field, rotation, step=step), axis1=-2, axis2=-1)


def laplacian(
    function: Callable[[FloatArray], FloatArray], rotation: Any, *, step: float = 1e-2
) -> FloatArray:
    """Laplace-Beltrami operator on SO(3) by differences of fourth order along the three directions.

    Parameters
    ----------
    function : callable
        From rotations [n, 3, 3] to values [n].
    rotation : array_like, shape (n, 3, 3)
    step : float
        h [rad].

    Returns
    -------
    numpy.ndarray, shape (n,)
        The matrix elements of a rotation are eigenfunctions with eigenvalue -2.

    Raises
    ------
    InputError
        If ``rotation`` has another shape.

    Examples
    --------
    >>> r = exp(np.array([[0.3, 0.1, -0.4]]))
    >>> bool(np.allclose(laplacian(lambda q: q[:, 0, 1], r), -2 * r[:, 0, 1], rtol=1e-6))
    True
    """
    r = _real("rotation", rotation, (3, 3))
    if r.ndim != 3:
        raise InputError(f"rotation: expected shape (n, 3, 3), found {r.shape}.")
    total = np.zeros(len(r))
    middle = np.asarray(function(r))
    for i in range(3):
        turns = [exp(k * step * np.eye(3)[i]) for k in (1, -1, 2, -2)]
        near, back, far, far_back = (np.asarray(function(turn @ r)) for turn in turns)
        total += (16 * (near + back) - (far + far_back) - 30 * middle) / (12 * step**2)
    return total
