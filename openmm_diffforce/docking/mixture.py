r"""A mixture of blurred poses: a distribution on R^3 x SO(3) with everything known at every noise level.

For tests, of this package and of your own models and samplers: density, scores, samples, exactly.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import logsumexp

from ..errors import InputError
from . import so3
from .poses import Poses, some_poses
from .rigid import RigidSchedule, Scores, check_schedule, times_of
from .so3 import FloatArray


@dataclass(frozen=True, eq=False)
class PoseMixture:
    r"""Mixture of normal x IGSO3 about given poses, noised by a schedule; it is a score model too.

    .. math:: p_t(R, \tau) = \sum_k w_k\, N\left(\tau;\, \tau_k,\, a_k^2 + \sigma_{tr}(t)^2\right)\,
              f_{\sqrt{b_k^2 + \sigma_{rot}(t)^2}}\left(\mathrm{angle}(R R_k^T)\right)

    Normal and IGSO3 are heat kernels, so that the noised mixture is a mixture again, exactly.

    ======  ====================
    symbol  code
    ======  ====================
    w_k     ``weights``
    R_k     ``centres.rotation``
    tau_k   ``centres.translation``
    a_k     ``spread_tr``
    b_k     ``spread_rot``
    ======  ====================

    Parameters
    ----------
    centres : Poses
        Of the components.
    weights : array_like, shape (n_components,)
        Above zero; they are normalised.
    spread_tr, spread_rot : array_like, shape () or (n_components,)
        Standard deviation per direction [nm], [rad]; above zero.
    schedule : RigidSchedule

    Raises
    ------
    InputError
        If shapes do not fit, or a weight or spread is not above zero.

    Examples
    --------
    >>> model = PoseMixture(Poses.identity(1), [1.0], 0.1, 0.2, RigidSchedule())
    >>> tr, rot, energy = model(Poses.identity(1).perturbed([0.0, 0.0, 0.0], [0.01, 0.0, 0.0]), np.zeros(1))
    >>> tr.round(9).tolist()
    [[-1.0, 0.0, 0.0]]
    """

    centres: Poses
    weights: FloatArray
    spread_tr: FloatArray
    spread_rot: FloatArray
    schedule: RigidSchedule

    def __post_init__(self) -> None:
        n = len(some_poses(self.centres, "centres"))
        check_schedule(self.schedule)
        for name in ("weights", "spread_tr", "spread_rot"):
            value = so3._real(f"PoseMixture.{name}", getattr(self, name), ())
            if value.shape not in ((), (n,)) or (name == "weights" and value.shape != (n,)):
                raise InputError(
                    f"PoseMixture.{name}: expected one number for each of {n} centres, found {value.shape}."
                )
            if (value <= 0).any():
                raise InputError(
                    f"PoseMixture.{name}: expected numbers above zero, found {float(value.min()):g}."
                )
            value = np.broadcast_to(value, (n,)).copy()
            object.__setattr__(self, name, value / value.sum() if name == "weights" else value)

    def _components(self, poses: Poses, t: Any) -> tuple[FloatArray, FloatArray, FloatArray]:
        """ln w_k p_k [n, k], and its gradients [n, k, 3]."""
        t = times_of(t, len(some_poses(poses)))[:, None]
        variance = self.spread_tr**2 + self.schedule.sigma_tr(t) ** 2
        sigma = np.sqrt(self.spread_rot**2 + self.schedule.sigma_rot(t) ** 2)
        away = poses.translation[:, None] - self.centres.translation
        vector = so3.log(poses.rotation[:, None] @ self.centres.rotation.swapaxes(1, 2))
        angle = np.minimum(np.linalg.norm(vector, axis=-1), np.pi)
        value, slope = so3._log_density_slope(angle, sigma)
        value = value - 0.5 * (away**2).sum(axis=-1) / variance - 1.5 * np.log(2 * np.pi * variance)
        return value + np.log(self.weights), -away / variance[..., None], slope[..., None] * vector

    def log_density(self, poses: Poses, t: Any = 0.0) -> FloatArray:
        """ln p_t [n], relative to Lebesgue [nm^-3] x Haar."""
        return np.asarray(logsumexp(self._components(poses, t)[0], axis=1))

    def __call__(self, poses: Poses, t: FloatArray) -> Scores:
        """Scores and -ln p_t, as the contract of score models has it."""
        value, tr, rot = self._components(poses, t)
        total = logsumexp(value, axis=1)
        share = np.exp(value - total[:, None])[..., None]
        return (share * tr).sum(axis=1), (share * rot).sum(axis=1), -total

    def sample(self, n: int, *, t: float = 0.0, generator: np.random.Generator) -> tuple[Poses, Any]:
        """n exact draws at noise level t, and the component of each.

        Parameters
        ----------
        n : int
        t : float
        generator : numpy.random.Generator

        Returns
        -------
        poses : Poses
        component : numpy.ndarray of int, shape (n,)
        """
        which = so3._generator(generator).choice(len(self.weights), so3._count(n), p=self.weights)
        spread_tr = np.sqrt(self.spread_tr[which] ** 2 + float(self.schedule.sigma_tr(t)) ** 2)
        spread_rot = np.sqrt(self.spread_rot[which] ** 2 + float(self.schedule.sigma_rot(t)) ** 2)
        shift = spread_tr[:, None] * generator.standard_normal((len(which), 3))
        turn = so3.sample_igso3(spread_rot, generator=generator)
        return self.centres[which].perturbed(turn, shift), which
