"""A score of alanine dipeptide from no noise to noise that has forgotten it, for -ln p_0.

Below :data:`BLEND` the posterior mode of the learned physical action (``EnvelopeAction``) gives the
score; above, a small network of all pair distances, trained here by denoising score matching.
Neither has seen an energy.
"""

import math
import time
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from openmm_diffforce.models.envelope import EnvelopeAction
from openmm_diffforce.scores import GaussianPrior, matched_prior

Tensor = torch.Tensor

SIGMA_RANGE = (0.01, 1.2)
"""Noise that the network is trained on [nm]; the larger end is where p_T is a Gaussian."""

BLEND = (0.015, 0.025)
"""The score goes from the posterior mode to the network between these noise levels [nm]."""

WIDTH, N_STEPS, BATCH, LEARNING_RATE, DECAY = 192, 3000, 256, 2e-3, 0.999
SEED = 5200


class PairScore(torch.nn.Module):
    r"""Denoiser of a free molecule: a Gaussian's, and what pairs of atoms add to it.

    .. math:: D(y, \sigma) = C (C + \sigma^2)^{-1} y
        + c_\sigma \sum_j f_{ij}(d, \sigma) (y_i - y_j) / r_{ij},
        \qquad r_{ij}^2 = \langle d_{ij}^2 \rangle + 6 \sigma^2

    C is the covariance of the training frames over all orientations and c the root mean square of what
    the Gaussian's denoiser leaves (after T. Karras et al., 2022, arXiv:2206.00364). The score is
    ``(D - y) / sigma^2``. It turns with the molecule; it does not know left from right, so that it is
    trained on frames and their mirror images alike: ln p_0 is that of the equal mixture.
    """

    def __init__(self, frames: np.ndarray, seed: int) -> None:
        super().__init__()
        prior: GaussianPrior = matched_prior(frames)
        n = frames.shape[1]
        variance, axes = np.linalg.eigh(prior.covariance[::3, ::3])
        self.n_atoms = n
        first, second = np.triu_indices(n, 1)
        square = ((frames[:, first] - frames[:, second]) ** 2).sum(2)
        for name, value in (
            ("variance", np.maximum(variance, 0.0)), ("axes", axes), ("square", square.mean(0)),
            ("spread", square.std(0)),
        ):  # fmt: skip
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32))
        self.first, self.second = torch.as_tensor(first), torch.as_tensor(second)
        n_pairs = len(first)
        generator = torch.Generator().manual_seed(seed)
        sizes = (n_pairs + 7, WIDTH, WIDTH, WIDTH, n_pairs)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in pairwise(sizes))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(
                    torch.randn(layer.weight.shape, generator=generator) / math.sqrt(layer.in_features)
                )
                layer.bias.zero_()
            self.layers[-1].weight.mul_(0.1)

    def left(self, sigma: Tensor) -> Tensor:
        """c: root mean square of x less the Gaussian's denoiser [n_frames]."""
        square = (sigma**2)[:, None]
        return torch.sqrt((self.variance * square / (self.variance + square)).sum(1) / (self.n_atoms - 1))

    def forward(self, y: Tensor, sigma: Tensor) -> Tensor:
        """D(y, sigma) [n_frames, n_atoms, 3]; y without its mean."""
        square = (sigma**2)[:, None]
        away = y[:, self.first] - y[:, self.second]
        d2 = (away * away).sum(2)
        mean, spread = self.square + 6 * square, torch.sqrt(self.spread**2 + 24 * square**2)
        level = torch.log(sigma)[:, None]
        waves = [level * 0.5, *(g(level * k) for k in (0.5, 1.0, 2.0) for g in (torch.sin, torch.cos))]
        h = torch.cat([(d2 - mean) / (spread + 0.2 * mean), *waves], dim=1)
        h = torch.nn.functional.silu(self.layers[0](h))
        for layer in self.layers[1:-1]:
            h = h + torch.nn.functional.silu(layer(h))
        f = self.layers[-1](h)[:, :, None] * away / torch.sqrt(mean)[:, :, None]
        pairs = torch.zeros_like(y).index_add(1, self.first, f).index_add(1, self.second, -f)
        kept = self.variance / (self.variance + square)
        linear = torch.einsum("ij,fj,kj,fkd->fid", self.axes, kept, self.axes, y)
        return linear + self.left(sigma)[:, None, None] * pairs


def noised(
    x: Tensor, generator: torch.Generator, sigma: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Turned-free noised copies: x and y without their mean, and sigma."""
    if sigma is None:
        low, high = (math.log(v) for v in SIGMA_RANGE)
        sigma = torch.exp(low + (high - low) * torch.rand(len(x), generator=generator))
    eps = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    eps = eps - eps.mean(1, keepdim=True)
    return x, x + sigma.to(x.dtype)[:, None, None] * eps, sigma.to(x.dtype)


def train(frames: np.ndarray, *, seed: int = SEED, n_steps: int = N_STEPS, report: Any = None) -> PairScore:
    """Denoising score matching on frames [nm]; the moving average of the weights."""
    centred = torch.as_tensor(frames - frames.mean(1, keepdims=True), dtype=torch.float32)
    model = PairScore(centred.double().numpy(), seed)
    weights = [w.data for w in model.parameters()]
    average = [w.clone() for w in weights]
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.layers.parameters(), lr=LEARNING_RATE)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps)
    started, recent = time.process_time(), []
    for step in range(n_steps):
        pick = torch.randint(len(centred), (BATCH,), generator=generator)
        x, y, sigma = noised(centred[pick], generator)
        weight = model.left(sigma)[:, None, None]
        loss = (((model(y, sigma) - x) / weight) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        fall.step()
        recent.append(float(loss.detach()))
        keep = min(DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, weights, 1 - keep)
        if report is not None and (step + 1) % 500 == 0:
            report(step + 1, float(np.mean(recent[-500:])), time.process_time() - started)
    torch._foreach_copy_(weights, average)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


class BlendedScore:
    """Posterior mode below, network above; y [nm] of a VE schedule, float64."""

    def __init__(self, envelope: EnvelopeAction, network: PairScore, sigma_max: float) -> None:
        self.envelope, self.network, self.sigma_max = envelope, network.double(), sigma_max

    def _share(self, sigma: float) -> float:
        """Of the network."""
        low, high = (math.log(v) for v in BLEND)
        u = min(max((math.log(max(sigma, 1e-12)) - low) / (high - low), 0.0), 1.0)
        return u * u * (3 - 2 * u)

    def _network(self, y: Tensor, sigma: Tensor) -> Tensor:
        y = y - y.mean(1, keepdim=True)
        return (self.network(y, sigma) - y) / (sigma**2)[:, None, None]

    def _mode(self, y: Tensor, sigma: Tensor) -> Tensor:
        return -self.envelope.noised_fields(y, sigma, torch.zeros_like(sigma))[1]

    def __call__(self, y: Tensor, t: Tensor) -> Tensor:
        sigma = self.sigma_max * t * t
        share = self._share(float(sigma[0]))
        out = torch.zeros_like(y)
        if share < 1:
            with torch.no_grad():
                out = out + (1 - share) * self._mode(y, sigma)
        if share > 0:
            out = out + share * self._network(y, sigma)
        return out

    def divergence(self, y: Tensor, t: Tensor) -> Tensor:
        """Of the score [n_frames]: the envelope's from the Hessian at the mode, the network's by autograd."""
        sigma = self.sigma_max * t * t
        share = self._share(float(sigma[0]))
        n, size = len(y), y[0].numel()
        out = torch.zeros(n, dtype=y.dtype)
        if share < 1:
            zero = torch.zeros_like(sigma)
            with torch.no_grad():
                mode = self.envelope._found(y, sigma, zero)
                hessian = self.envelope._hessian(mode, zero)
                metric = torch.eye(size, dtype=y.dtype) + (sigma**2)[:, None, None] * hessian
                out = out - (1 - share) * torch.linalg.solve(metric, hessian).diagonal(dim1=1, dim2=2).sum(1)
        if share > 0:
            for low in range(0, n, 16):
                part = y[low : low + 16]
                m = len(part)
                at = part.repeat(size, 1, 1).requires_grad_(True)
                with torch.enable_grad():
                    s = self._network(at, sigma[:1].expand(size * m)).reshape(size, m, size)
                    (pull,) = torch.autograd.grad(s.diagonal(dim1=0, dim2=2).sum(), at)
                trace = pull.reshape(size, m, size).diagonal(dim1=0, dim2=2).sum(1)
                out[low : low + 16] += share * trace.detach()
        return out
