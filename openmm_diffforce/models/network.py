r"""The network model: a small conservative network that sees a noised frame through a denoiser.

.. math::

    S(y, t, \lambda) = B(z, \tau, \lambda) + N(\hat x, \tau)
        + \lambda A(\hat x, \tau) - \tfrac12 \lambda^2 D(\hat x, \tau) + d \ln\alpha,
    \qquad z = y / \alpha_t, \quad \tau = \sigma_t / \alpha_t

=============  ===========================================================================
symbol         code
=============  ===========================================================================
x_hat          z with the noise along stiff coordinates undone (:class:`StiffDenoiser`)
B              alone: the harmonic prior of the stiff coordinates, noised; as a residual: an
               :class:`EnvelopeAction`, the noised action of a physical model
N              the network's part of the base action (:class:`ShapeNetwork`)
A, D >= 0      the network's noised operator at lambda = 0, and its fall to lambda = 1
d              degrees of freedom, 3 n_atoms - 3
=============  ===========================================================================

Noise along stiff bonds dwarfs what the soft coordinates show of themselves, and no sum of
functions of noised distances can undo it: hence x_hat. The networks see standardised inverse distances,
cosines of angles and signed volumes of x_hat, and nothing else.

The clean limit is built in. At t = 0, x_hat = y and D = 0, so that S is linear in lambda. As a
residual N and A vanish there too: the model IS its physical base at t = 0. At t > 0 S is concave
in lambda, as the noised action of a linear mixing must be; the network's operator falls linearly
in lambda (what it would do if O given y were Gaussian).

S is invariant under translation and rotation, not under reflection: signed volumes change sign,
as chiral amino acids ask. It is invariant under the exchange of equivalent atoms of the graph; in
A and D the perturbed sites are kept apart from their equivalents.

There are no force-field parameters here: stiffnesses and centres of the prior are fitted to
coordinates. The normalisation of S_t at t > 0 is not fixed; differences in lambda are.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..errors import InputError
from ..schedule import Amplitudes, NoiseSchedule
from .action import ActionModel
from .envelope import EnvelopeAction
from .graph import MolecularGraph
from .stiff import StiffDenoiser, shape_coordinates

Tensor = torch.Tensor

GATES_NM = (0.003, 0.01, 0.03)
"""Networks see the noise through ``tau^2 / (tau^2 + s^2)`` for each s [nm] of these."""

MAX_TAU = 0.0201
"""Largest noise-to-signal ratio [nm]: beyond, three Gauss-Newton steps do not find x_hat."""

CORNER = 1e-3
"""D >= 0 is the smooth positive part of its network's output; this rounds its corner."""


class ShapeNetwork(torch.nn.Module):
    r"""Functions of standardised shape coordinates, pooled over symmetry classes.

    .. math::

        e_{ck} = \sum_{i \in c} \tfrac12 \ln(1 + e^{2 (\tilde q_i - p_{ck})}), \quad
        h = \tanh(U [e, g]), \quad h' = \tanh(U' h), \quad f = V h' + \sum_k g_k V_k e

    with q~ the standardised coordinates (inverse distances, cosines, volumes), p places evenly spread at
    first, g the noise gates and a one. The last term is a sum of functions of single coordinates, as
    classical terms are; the other couples them. The hinges e go on straight beyond the data.

    Parameters
    ----------
    graph : MolecularGraph
    sites : sequence of int
        Atoms kept apart from their equivalents.
    width, channels : int
        Hidden units, functions per coordinate.
    scale : sequence of float
        Size of each output [kT].
    """

    cls: Tensor
    shift: Tensor
    spread: Tensor
    scale: Tensor

    def __init__(
        self,
        graph: MolecularGraph,
        sites: Sequence[int],
        *,
        width: int,
        channels: int,
        scale: Sequence[float],
    ) -> None:
        super().__init__()
        self.coordinates, cls, _ = shape_coordinates(graph, sites)
        n_classes, n = int(cls.max()) + 1, len(cls)
        n_out, n_gates = len(scale), len(GATES_NM) + 1
        self.register_buffer("cls", torch.as_tensor(cls))
        self.n_classes = n_classes
        self.register_buffer("shift", torch.zeros(n, dtype=torch.float64))
        self.register_buffer("spread", torch.ones(n, dtype=torch.float64))
        self.register_buffer("scale", torch.tensor(list(scale), dtype=torch.float64))

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.zeros(*shape, dtype=torch.float64))

        size = n_classes * channels
        self.place = parameter(n_classes, channels)
        self.first = parameter(size + n_gates, width)
        self.second = parameter(width, width)
        self.bias = parameter(width)
        self.last = parameter(width, n_out)
        self.additive = parameter(size, n_gates * n_out)

    def initialise(self, x: np.ndarray, generator: torch.Generator) -> None:
        """Standardise on clean frames [n_frames, n_atoms, 3]; draw the weights.

        The last layers stay zero: an untrained network is a zero correction.
        """

        def draw(like: Tensor, size: float) -> Tensor:
            return size * torch.randn(like.shape, generator=generator, dtype=torch.float64)

        with torch.no_grad():
            q, _ = self.inputs(torch.as_tensor(x, dtype=torch.float64))
            count = torch.bincount(self.cls)
            mean = torch.bincount(self.cls, q.mean(0)) / count
            square = torch.bincount(self.cls, (q * q).mean(0)) / count
            self.shift.copy_(mean[self.cls])
            self.spread.copy_(torch.sqrt((square - mean * mean).clamp_min(1e-16))[self.cls])
            places = torch.linspace(-2.0, 3.0, self.place.shape[1], dtype=torch.float64)
            self.place.copy_(places.expand_as(self.place))
            self.first.copy_(draw(self.first, len(self.first) ** -0.5))
            self.second.copy_(draw(self.second, len(self.second) ** -0.5))

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse distances, cosines, volumes, and their slopes [n_frames, n_coordinates]."""
        q = self.coordinates.values(x)
        inverse, rest = 1.0 / q[:, : self.coordinates.n_pairs], q[:, self.coordinates.n_pairs :]
        return (
            torch.cat([inverse, rest], dim=1),
            torch.cat([-inverse * inverse, torch.ones_like(rest)], dim=1),
        )

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Hinges [n_coordinates, n_frames, channels], and slopes of the standardised coordinates."""
        q, slope = self.inputs(x)
        away = ((q - self.shift) / self.spread).t()[:, :, None] - self.place[self.cls][:, None]
        return torch.nn.functional.softplus(away, 2.0), slope / self.spread

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled functions of single coordinates, their gradients and Laplacians.

        [n_frames, n_features], [n_frames, n_features, 3 n_atoms] and [n_frames, n_features]: what a
        fit in closed form needs.
        """
        e, slope = self.embed(x)
        e = e.transpose(0, 1)
        rise = -torch.expm1(-2.0 * e)
        first = rise * slope[:, :, None]
        jacobian = self.coordinates.jacobian(x)
        square = (jacobian * jacobian).sum(-1)[:, :, None]
        # second derivative of 1/q is 2/q^3 = -2 q^-1 (1/q)'; of the others none
        q, _ = self.inputs(x)
        bend = -2.0 * q * slope
        bend[:, self.coordinates.n_pairs :] = 0.0
        second = (2.0 * rise * (1.0 - rise) * (slope * slope)[:, :, None] + rise * bend[:, :, None]) * square
        second = second + first * self.coordinates.laplacian(x)[:, :, None]

        gradient = first[..., None] * jacobian[:, :, None]
        zero = torch.zeros(len(x), self.n_classes, *gradient.shape[2:], dtype=x.dtype)
        summed = zero.index_add(1, self.cls, gradient).flatten(1, 2)
        return self.pooled(e.transpose(0, 1)), summed, self.pooled(second.transpose(0, 1))

    def pooled(self, e: Tensor) -> Tensor:
        """Sums of the hinges over each class [n_frames, n_features]."""
        zero = torch.zeros(self.n_classes, e.shape[1], e.shape[2], dtype=e.dtype)
        return zero.index_add(0, self.cls, e).transpose(0, 1).flatten(1)

    def layers(self, e: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled functions, and the two hidden layers."""
        pooled = self.pooled(e)
        h = torch.tanh(torch.matmul(torch.cat([pooled, gates], dim=1), self.first))
        return pooled, h, torch.tanh(torch.matmul(h, self.second) + self.bias)

    def output(self, pooled: Tensor, last: Tensor, gates: Tensor) -> Tensor:
        """Outputs [n_frames, n_out] in kT."""
        single = torch.matmul(pooled, self.additive).reshape(len(pooled), gates.shape[1], -1)
        return self.scale * (torch.matmul(last, self.last) + (gates[:, :, None] * single).sum(1))

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """Outputs [n_frames, n_out] at x [n_frames, n_atoms, 3] nm and gates [n_frames, n_gates]."""
        pooled, _, last = self.layers(self.embed(x)[0], gates)
        return self.output(pooled, last, gates)

    def pullback(
        self, x: Tensor, gates: Tensor, e: Tensor, slope: Tensor, h: Tensor, last: Tensor, seed: Tensor
    ) -> Tensor:  # fmt: skip
        """Gradient of ``sum_k seed_k f_k`` in x, from the values of the layers."""
        seed = seed * self.scale
        back = torch.matmul(seed, self.last.t()) * (1.0 - last * last)
        back = torch.matmul(back, self.second.t()) * (1.0 - h * h)
        pooled = torch.matmul(back, self.first[: self.additive.shape[0]].t())
        single = (gates[:, :, None] * seed[:, None, :]).flatten(1)
        pooled = pooled + torch.matmul(single, self.additive.t())
        each = pooled.reshape(len(x), self.n_classes, -1).transpose(0, 1).index_select(0, self.cls)
        each = (-torch.expm1(-2.0 * e) * each).sum(-1).t() * slope
        return self.coordinates.pullback(x, each)


def positive_part(raw: Tensor, corner: float = CORNER) -> Tensor:
    """Smooth max(raw, 0)."""
    return 0.5 * (raw + torch.sqrt(raw * raw + corner * corner))


def positive_slope(raw: Tensor, corner: float = CORNER) -> Tensor:
    """Derivative of :func:`positive_part`."""
    return 0.5 * (1.0 + raw / torch.sqrt(raw * raw + corner * corner))


class NetworkAction(ActionModel):
    """Network model of the action, alone or on top of a physical one.

    Parameters
    ----------
    graph : MolecularGraph
    sites : sequence of int
        Perturbed atoms.
    denoiser : StiffDenoiser
        From :func:`openmm_diffforce.network_training.fit_denoiser`.
    schedule : VESchedule or VPSchedule
    base : EnvelopeAction, optional
        The noised physical model that this is a residual of. None: the network alone.
    width, channels : int
        Hidden units, functions per coordinate.
    operator_mean, operator_spread : float
        Mean and standard deviation of O over the frames [kT]: where A starts from (alone), its unit.

    Raises
    ------
    InputError
        If the sites are not atoms of the graph, or the schedule goes beyond :data:`MAX_TAU`.

    Notes
    -----
    Deterministic. Weights are zero until
    :func:`~openmm_diffforce.network_training.fit_network` draws and trains them. Everything
    compiles in TorchScript with explicit derivatives; alone it also runs in float32 (``.float()``).
    """

    gate_squares: Tensor

    def __init__(
        self, graph: MolecularGraph, sites: Sequence[int], denoiser: StiffDenoiser,
        schedule: NoiseSchedule, *, base: EnvelopeAction | None = None, width: int = 64,
        channels: int = 5, operator_mean: float = 0.0, operator_spread: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        chosen = sorted({int(s) for s in sites})
        if not chosen or len(chosen) != len(list(sites)) or not 0 <= chosen[0] <= chosen[-1] < graph.n_atoms:
            raise InputError(
                f"sites: expected different atom indices below {graph.n_atoms}, found {list(sites)}."
            )
        top = float(schedule.noise_to_signal(1.0))
        if top > MAX_TAU:
            raise InputError(
                f"schedule: expected sigma/alpha <= {MAX_TAU} nm at t = 1 for a network model, found "
                f"{top:.4g}; choose a narrower one, such as VESchedule(0.02)."
            )
        self.amplitudes = Amplitudes(schedule)
        self.n_dof = float(3 * graph.n_atoms - 3)
        self.has_operator = True
        self.residual = base is not None
        self.channels = channels
        self.register_buffer("gate_squares", torch.tensor(GATES_NM, dtype=torch.float64) ** 2)
        self.denoiser = denoiser
        self.base = base
        offset = 0.0 if base is not None else float(operator_mean)
        self.operator_offset = offset
        # what is left to a residual is small: small units keep training from overshooting it
        size, unit = (1.0, 0.3 * operator_spread) if base is not None else (5.0, operator_spread)
        self.base_network = ShapeNetwork(graph, (), width=width, channels=channels, scale=[size])
        self.operator_network = ShapeNetwork(
            graph, chosen, width=width, channels=channels, scale=[float(unit)] * 2
        )

    def _gates(self, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the networks see of the noise, and the factors of (N, A) and of D."""
        square = (tau * tau)[:, None]
        gates = torch.cat([torch.ones_like(square), square / (square + self.gate_squares)], dim=1)
        noised = gates[:, 2]
        return gates, (noised if self.residual else torch.ones_like(noised)), noised

    def forward(self, x: Tensor, t: Tensor, lam: Tensor) -> Tensor:
        """Reduced action S [n_frames] at noised coordinates x [n_frames, n_atoms, 3] nm."""
        alpha, sigma = self.amplitudes(t)
        z, tau = x / alpha[:, None, None], sigma / alpha
        gates, active, noised = self._gates(tau)
        xs, _, us, w = self.denoiser.denoise(z, tau)
        found = xs[-1]
        if self.base is not None:
            action = self.base(x, t, lam)
        else:
            action = self.denoiser.energy(tau, us, w) + self.n_dof * torch.log(alpha)
        n = self.base_network(found, gates)[:, 0]
        a = self.operator_network(found, gates)
        fall = noised * positive_part(a[:, 1])
        return action + active * n + lam * (self.operator_offset + active * a[:, 0]) - 0.5 * lam * lam * fall

    def own_fields(self, z: Tensor, tau: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the model adds to its base (alone: all but d ln alpha): value, z- and lam-derivative."""
        gates, active, noised = self._gates(tau)
        xs, factors, us, w = self.denoiser.denoise(z, tau)
        found = xs[-1]
        e, slope = self.base_network.embed(found)
        pooled, h, last = self.base_network.layers(e, gates)
        n = self.base_network.output(pooled, last, gates)
        pull = self.base_network.pullback(found, gates, e, slope, h, last, active[:, None])
        e, slope = self.operator_network.embed(found)
        pooled, h, last = self.operator_network.layers(e, gates)
        a = self.operator_network.output(pooled, last, gates)
        half = -0.5 * lam * lam * noised
        seed = torch.stack([lam * active, half * positive_slope(a[:, 1])], dim=1)
        pull = pull + self.operator_network.pullback(found, gates, e, slope, h, last, seed)
        fall = noised * positive_part(a[:, 1])
        operator = self.operator_offset + active * a[:, 0]
        action = active * n[:, 0] + lam * operator - 0.5 * lam * lam * fall
        if not self.residual:
            action = action + self.denoiser.energy(tau, us, w)
        gradient = self.denoiser.pullback(tau, xs, factors, us, pull, not self.residual)
        return action, gradient, operator - lam * fall

    @torch.jit.export
    def fields(self, x: Tensor, t: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """S [n_frames], dS/dx [n_frames, n_atoms, 3] (1/nm) and dS/dlam [n_frames]."""
        if self.base is not None and not bool((t > 0).any()):
            return self.base.fields(x, t, lam)  # nothing to add, and nothing to denoise
        alpha, sigma = self.amplitudes(t)
        action, gradient, d_lam = self.own_fields(x / alpha[:, None, None], sigma / alpha, lam)
        gradient = gradient / alpha[:, None, None]
        if self.base is not None:
            below, below_x, d_below = self.base.fields(x, t, lam)
            return action + below, gradient + below_x, d_lam + d_below
        return action + self.n_dof * torch.log(alpha), gradient, d_lam

    @torch.jit.export
    def increment_fields(self, x: Tensor, t: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """S(x,t,lam) - S(x,t,0), its x-gradient and its lam-derivative: the operator's part alone."""
        if self.base is not None and not bool((t > 0).any()):
            return self.base.increment_fields(x, t, lam)  # nothing to add, and nothing to denoise
        alpha, sigma = self.amplitudes(t)
        z, tau = x / alpha[:, None, None], sigma / alpha
        gates, active, noised = self._gates(tau)
        xs, factors, us, _ = self.denoiser.denoise(z, tau)
        found = xs[-1]
        e, slope = self.operator_network.embed(found)
        pooled, h, last = self.operator_network.layers(e, gates)
        a = self.operator_network.output(pooled, last, gates)
        fall = noised * positive_part(a[:, 1])
        operator = self.operator_offset + active * a[:, 0]
        seed = torch.stack([lam * active, -0.5 * lam * lam * noised * positive_slope(a[:, 1])], dim=1)
        pull = self.operator_network.pullback(found, gates, e, slope, h, last, seed)
        gradient = self.denoiser.pullback(tau, xs, factors, us, pull, False) / alpha[:, None, None]
        action, d_lam = lam * operator - 0.5 * lam * lam * fall, operator - lam * fall
        if self.base is not None:
            below, below_x, d_below = self.base.increment_fields(x, t, lam)
            return action + below, gradient + below_x, d_lam + d_below
        return action, gradient, d_lam

    @torch.jit.export
    def operator_gradient(self, x: Tensor, t: Tensor, lam: Tensor) -> Tensor:
        """Gradient of the noised operator, d2S/dx dlam [n_frames, n_atoms, 3], in 1/nm."""
        if self.base is not None and not bool((t > 0).any()):
            return self.base.operator_gradient(x, t, lam)  # nothing to add, and nothing to denoise
        alpha, sigma = self.amplitudes(t)
        z, tau = x / alpha[:, None, None], sigma / alpha
        gates, active, noised = self._gates(tau)
        xs, factors, us, _ = self.denoiser.denoise(z, tau)
        found = xs[-1]
        e, slope = self.operator_network.embed(found)
        pooled, h, last = self.operator_network.layers(e, gates)
        a = self.operator_network.output(pooled, last, gates)
        seed = torch.stack([active, -lam * noised * positive_slope(a[:, 1])], dim=1)
        pull = self.operator_network.pullback(found, gates, e, slope, h, last, seed)
        gradient = self.denoiser.pullback(tau, xs, factors, us, pull, False) / alpha[:, None, None]
        if self.base is not None:
            gradient = gradient + self.base.operator_gradient(x, t, lam)
        return gradient
