r"""The noised action of any clean action, by its posterior's mode: the Moreau envelope.

.. math::

    S(y, t, \lambda) = \min_x \left[ S_\lambda(x) + \frac{|x - z|^2}{2 \tau^2} \right] + d \ln\alpha,
    \qquad z = y / \alpha_t, \quad \tau = \sigma_t / \alpha_t

==================  ===========================================  ==============
symbol              formula, x* the minimum, H its Hessian       unit
==================  ===========================================  ==============
score               (x* - z) / tau^2                             1/nm
O                   O(x*)                                        kT
grad O              (1 + tau^2 H)^-1 grad O(x*)                  kT/nm
==================  ===========================================  ==============

All are exact derivatives of the one scalar; at t = 0 it is the clean action itself. Being a
minimum of functions linear in lambda it is concave in lambda, as noising asks. What it leaves
out of the true noised action, to first order half the log-determinant of ``1 + tau^2 H``, is for
a network to learn (``network.py``) or for restrained sampling to measure (``posterior.py``).

References
----------
J. J. Moreau, Proximite et dualite dans un espace hilbertien, Bull. Soc. Math. France 93 (1965),
doi:10.24033/bsmf.1625.
"""

import torch

from ..schedule import Amplitudes, NoiseSchedule
from .action import ActionModel
from .physics import PhysicalModel
from .stiff import StiffDenoiser

Tensor = torch.Tensor


class EnvelopeAction(ActionModel):
    """A clean physical action, noised by the mode of its posterior.

    Parameters
    ----------
    base : PhysicalModel
        Only its tables at t = 0 are used.
    denoiser : StiffDenoiser
        Where the search starts, and the stiffness that it starts with; the mode is the base's.
    schedule : VESchedule or VPSchedule

    Notes
    -----
    Deterministic. BFGS steps from the denoised frame: tens of evaluations of the base per noised
    frame, none of them where t = 0. Which mode is found can change from one y to the next where
    noise blurs two basins together; there the action jumps. A search that does not end raises
    RuntimeError. Wherever the mode is found the derivatives are exact to its tolerance, 1e-9 nm.
    """

    def __init__(self, base: PhysicalModel, denoiser: StiffDenoiser, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.base = base
        self.denoiser = denoiser
        self.amplitudes = Amplitudes(schedule)
        self.has_operator = base.has_operator
        self.n_dof = base.n_dof

    def _hessian(self, x: Tensor, lam: Tensor) -> Tensor:
        """Hessian of the clean action [n_frames, 3 n_atoms, 3 n_atoms]."""
        n, size = x.shape[0], 3 * x.shape[1]
        one = torch.eye(size, dtype=x.dtype).reshape(1, size, x.shape[1], 3).expand(n, -1, -1, -1)
        columns = self.base.hessian_product(
            x[:, None].expand(-1, size, -1, -1).reshape(n * size, x.shape[1], 3),
            torch.zeros(n * size, dtype=x.dtype), lam[:, None].expand(-1, size).reshape(-1),
            one.reshape(n * size, x.shape[1], 3),
        )  # fmt: skip
        out = columns.reshape(n, size, size)
        return 0.5 * (out + out.transpose(1, 2))

    def _value(self, x: Tensor, z: Tensor, tau: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        """The function that is minimised, and its gradient."""
        action, gradient, _ = self.base.fields(x, torch.zeros_like(tau), lam)
        away = (x - z) / (tau * tau)[:, None, None]
        return action + 0.5 * (away * (x - z)).sum((1, 2)), gradient + away

    def mode(self, z: Tensor, tau: Tensor, lam: Tensor) -> Tensor:
        """x* [n_frames, n_atoms, 3] of frames z at tau > 0."""
        x = self.denoiser.denoise(z, tau)[0][-1]
        n, size = x.shape[0], 3 * x.shape[1]
        stiff = 1.0 / (tau * tau)
        hessian = self.denoiser.metric(x) + stiff[:, None, None] * torch.eye(size, dtype=x.dtype)
        # what is not stiff, the updates of BFGS learn on the way
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        value, gradient = self._value(x, z, tau, lam)
        found = x.clone()
        place = torch.arange(n)
        for _n in range(500):
            step = -torch.matmul(inverse, gradient.flatten(1)[:, :, None])[:, :, 0].reshape(x.shape)
            longest = step.abs().amax((1, 2))
            found = found.index_copy(
                0, place, x + torch.where(longest < 1e-9, 1.0, 0.0)[:, None, None] * step
            )
            on = longest >= 1e-9
            if not bool(on.all()):
                x, z, tau, lam, place = x[on], z[on], tau[on], lam[on], place[on]
                value, gradient, inverse = value[on], gradient[on], inverse[on]
                step, longest = step[on], longest[on]
                if x.shape[0] == 0:
                    return found
            # longer steps jump into another basin, with a bond turned over
            scale = torch.clamp(0.5 * tau / longest, max=1.0)
            slope = (gradient * step).sum((1, 2))
            trial = x + scale[:, None, None] * step
            ahead, ahead_gradient = self._value(trial, z, tau, lam)
            worse = ahead > value + 1e-4 * scale * slope + 1e-11 * (1.0 + value.abs())
            while bool(worse.any()) and bool((scale > 1e-6).all()):
                scale = torch.where(worse, 0.4 * scale, scale)
                trial = x + scale[:, None, None] * step
                ahead, ahead_gradient = self._value(trial, z, tau, lam)
                worse = ahead > value + 1e-4 * scale * slope + 1e-11 * (1.0 + value.abs())
            s = (trial - x).flatten(1)
            y = (ahead_gradient - gradient).flatten(1)
            sy = (s * y).sum(1)
            good = sy > 1e-10 * torch.sqrt((s * s).sum(1) * (y * y).sum(1))
            rho = torch.where(good, 1.0 / torch.where(good, sy, torch.ones_like(sy)), torch.zeros_like(sy))
            by = torch.matmul(inverse, y[:, :, None])[:, :, 0]
            rank_one = (rho + rho * rho * (y * by).sum(1))[:, None, None] * s[:, :, None] * s[:, None, :]
            cross = rho[:, None, None] * by[:, :, None] * s[:, None, :]
            inverse = inverse + rank_one - cross - cross.transpose(1, 2)
            x, value, gradient = trial, ahead, ahead_gradient
        raise RuntimeError(
            "posterior mode: the search did not end; the noised frame lies too far outside the "
            "training data, or the noise is too large for this model"
        )

    def _found(self, z: Tensor, tau: Tensor, lam: Tensor) -> Tensor:
        """The mode where there is noise, the frame itself where there is none."""
        noised = torch.nonzero(tau > 0)[:, 0]
        if noised.shape[0] == 0:
            return z
        return z.index_copy(0, noised, self.mode(z[noised], tau[noised], lam[noised]))

    def forward(self, x: Tensor, t: Tensor, lam: Tensor) -> Tensor:
        """Reduced action S [n_frames]; differentiable once."""
        alpha, sigma = self.amplitudes(t)
        z, tau = x / alpha[:, None, None], sigma / alpha
        found = self._found(z.detach(), tau.detach(), lam.detach())
        clean = tau == 0
        # the mode is a constant for the derivative (envelope theorem), except where it is y itself
        found = torch.where(clean[:, None, None], z, found)
        stiff = torch.where(clean, torch.zeros_like(tau), 0.5 / (tau * tau).clamp_min(1e-300))
        action = self.base(found, torch.zeros_like(tau), lam)
        return action + stiff * ((found - z) ** 2).sum((1, 2)) + self.n_dof * torch.log(alpha)

    def noised_fields(self, z: Tensor, tau: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """S, its z-gradient and lam-derivative at signal-scaled frames z and noise tau [nm]."""
        found = self._found(z, tau, lam)
        action, gradient, d_lam = self.base.fields(found, torch.zeros_like(tau), lam)
        # At the mode the clean gradient equals the pull towards z; the pull does not repeat the
        # search's last error times the Hessian, the gradient is right where tau is 0.
        clean = (tau == 0)[:, None, None]
        pull = (z - found) / torch.where(clean, torch.ones_like(z), (tau * tau)[:, None, None])
        action = action + 0.5 * (pull * (z - found)).sum((1, 2))
        return action, torch.where(clean, gradient, pull), d_lam

    @torch.jit.export
    def fields(self, x: Tensor, t: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """S [n_frames], dS/dx [n_frames, n_atoms, 3] (1/nm) and dS/dlam [n_frames]."""
        alpha, sigma = self.amplitudes(t)
        action, gradient, d_lam = self.noised_fields(x / alpha[:, None, None], sigma / alpha, lam)
        return action + self.n_dof * torch.log(alpha), gradient / alpha[:, None, None], d_lam

    @torch.jit.export
    def increment_fields(self, x: Tensor, t: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """S(x,t,lam) - S(x,t,0), its x-gradient and its lam-derivative; cheap without noise."""
        if not bool((t > 0).any()):
            return self.base.increment_fields(x, t, lam)
        action, gradient, d_lam = self.fields(x, t, lam)
        action_0, gradient_0, _ = self.fields(x, t, torch.zeros_like(lam))
        return action - action_0, gradient - gradient_0, d_lam

    @torch.jit.export
    def operator_gradient(self, x: Tensor, t: Tensor, lam: Tensor) -> Tensor:
        """Gradient of the noised operator, d2S/dx dlam [n_frames, n_atoms, 3], in 1/nm."""
        alpha, sigma = self.amplitudes(t)
        z, tau = x / alpha[:, None, None], sigma / alpha
        found = self._found(z, tau, lam)
        gradient = self.base.operator_gradient(found, torch.zeros_like(tau), lam)
        noised = torch.nonzero(tau > 0)[:, 0]
        if noised.shape[0] > 0:
            metric = (tau * tau)[noised, None, None] * self._hessian(found[noised], lam[noised])
            metric = metric + torch.eye(metric.shape[1], dtype=x.dtype)
            solved = torch.linalg.solve(metric, gradient[noised].flatten(1))
            gradient = gradient.index_copy(0, noised, solved.reshape(gradient[noised].shape))
        return gradient / alpha[:, None, None]
