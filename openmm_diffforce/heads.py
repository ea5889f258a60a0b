r"""The noised operator by a small network: four heads for a noised frame, consistent by construction.

Columns of a noised frame y give O_1 and D = O_0 - O_1 > 0, r = V_0/V_1 > 0 and s, from which follow mean
and variance of O at both ends and the work between them,

.. math:: V_\lambda = V_0 (1 + \theta\lambda)^{-1/s}, \quad \theta = r^s - 1, \quad
          V_0 = D \Big/ \int_0^1 (1+\theta\lambda)^{-1/s} d\lambda, \quad
          \Delta S = O_1 + D \, \frac{\int_0^1 \lambda (1+\theta\lambda)^{-1/s} d\lambda}
          {\int_0^1 (1+\theta\lambda)^{-1/s} d\lambda}

(:func:`~openmm_diffforce.closure.heads_to_moments`), so that O_1 <= Delta S <= O_0 and dO/dlambda = -V
hold for every weight of the network. It is fitted at both ends by the Gaussian negative log-likelihood

.. math:: \ell = \tfrac12 \left\langle (O - O_k)^2/V_k + \ln V_k \right\rangle_{k = 0, 1}

which asks for two moments of O and nothing else: an operator with a heavy tail is described badly by
them, and Delta f is then off by kT while the networks agree among each other
(``benchmarks/results/bridge.md``). As a summary of the noised frame only the order of the works counts.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .closure import HeadMoments, heads_to_moments, tweedie_closure
from .errors import ConvergenceError, InputError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Tensor = torch.Tensor

N_HIDDEN = 24
"""Width of the two hidden layers, beside which a linear layer goes straight to the heads."""

EDGE = 0.002
"""Quantile of a column beyond which it is flat."""

N_BATCH = 512
MAX_STEPS = 600
LEARNING_RATE = 5e-3
CHECK_EVERY = 20
"""Steps between two looks at the frames that decide when to stop ..."""

PATIENCE = 6
"""... and looks without a gain after which a network stops."""

LONGEST = 15.0
"""The logarithms of D and r stay within this of those of the end states."""


@dataclass(frozen=True)
class Heads:
    """What :func:`cross_fitted_heads` returns.

    Attributes
    ----------
    moments : HeadMoments
        Of every row, by the network that saw nothing of its fold.
    by_fold : tuple of HeadMoments
        Of every row, by the network of every fold: that which saw nothing of fold k.
    loss : float
        Mean negative log-likelihood of the rows, each by the network that did not see it, both ends
        weighing alike.
    constant_loss : float
        The same of heads that do not look at the frame: moments of the end states.
    n_steps : tuple of int
        Step at which the network of every fold was best.
    """

    moments: HeadMoments
    by_fold: tuple[HeadMoments, ...]
    loss: float
    constant_loss: float
    n_steps: tuple[int, ...]


def cross_fitted_heads(
    columns: FloatArray,
    operator: FloatArray,
    end: IntArray,
    weight: FloatArray,
    block: IntArray,
    *,
    generator: np.random.Generator,
) -> Heads:
    """Heads of every row by a network that saw nothing of the row's fold.

    Parameters
    ----------
    columns : numpy.ndarray, shape (n, n_columns)
        Of noised frames.
    operator : numpy.ndarray, shape (n,)
        O of the frames that they came from [kT].
    end : numpy.ndarray of int, shape (n,)
        0 or 1.
    weight : numpy.ndarray, shape (n,)
    block : numpy.ndarray of int, shape (n,)
        Two blocks per fold, ``summary.fold_of(n_frames, 2 * n_folds)``: fold k is 2k and 2k + 1. The
        network of fold k learns from all others but block 2k + 3 (modulo their number), which decides
        when it stops. Copies of one frame share a block.
    generator : numpy.random.Generator
        Of the first weights and the batches.

    Returns
    -------
    Heads

    Raises
    ------
    InputError
        For arrays that do not belong together or are not finite, an end other than 0 and 1, or a fold
        without rows of both ends to learn from and to stop by.
    ConvergenceError
        If a network predicts numbers that are not finite.

    Notes
    -----
    Before the first step the heads are the Tweedie closure of the end states' moments; a network that
    finds nothing better on its stopping block stays there. Deterministic for a given state of
    ``generator`` and number of threads.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = np.concatenate([rng.normal(0.0, 1.0, 800), rng.normal(2.0, 1.0, 800)])
    >>> found = cross_fitted_heads(
    ...     (x + rng.normal(size=1600))[:, None], 2.0 - 2.0 * x, np.repeat([0, 1], 800), np.ones(1600),
    ...     np.tile(np.arange(800) * 8 // 800 % 4, 2), generator=rng)
    >>> bool(found.loss < found.constant_loss - 0.2)
    True
    """
    columns, operator, weight = (np.asarray(a, dtype=np.float64) for a in (columns, operator, weight))
    n_folds = _check(columns, operator, end, weight, block)
    fold = block // 2
    net = _Networks(_standardised(columns), operator, end, n_folds, generator)
    learns = np.stack([(fold != k) & (block != (2 * k + 3) % (2 * n_folds)) for k in range(n_folds)])
    stops = np.stack([block == (2 * k + 3) % (2 * n_folds) for k in range(n_folds)])
    shares = [_shares(rows, weight, end) for rows in (learns, stops)]
    net.start(shares[0])
    constant = net.heads()
    n_steps = net.fit(shares[0], shares[1], generator)
    last = net.heads()
    if not all(np.isfinite(v).all() for one in last for v in one):
        raise ConvergenceError(
            "heads: expected finite heads of every frame, found some that are not; look for single frames "
            "far outside, or use the defaults of the bridge, which need no network."
        )
    by_fold = tuple(heads_to_moments(*one) for one in last)
    rows = np.arange(len(fold))
    own = HeadMoments(
        *(np.stack([getattr(m, name) for m in by_fold])[fold, rows] for name in vars(by_fold[0]))
    )
    start = [heads_to_moments(*one) for one in constant]
    first = HeadMoments(*(np.stack([getattr(m, name) for m in start])[fold, rows] for name in vars(start[0])))
    every = _shares(np.ones((1, len(fold)), dtype=bool), weight, end)[0]
    return Heads(
        own, by_fold, _loss(own, operator, end, every), _loss(first, operator, end, every), n_steps
    )  # fmt: skip


def _check(
    columns: FloatArray, operator: FloatArray, end: IntArray, weight: FloatArray, block: IntArray
) -> int:
    n = len(operator)
    shapes = {
        "operator": operator.shape,
        "end": np.shape(end),
        "weight": weight.shape,
        "block": np.shape(block),
    }
    if columns.ndim != 2 or len(columns) != n or set(shapes.values()) != {(n,)}:
        raise InputError(
            f"heads: expected columns of shape (n, n_columns) and one value for each of its rows, found "
            f"{columns.shape} and {shapes}."
        )
    for name, value in (("columns", columns), ("operator", operator), ("weight", weight)):
        if not np.isfinite(value).all():
            bad = np.count_nonzero(~np.isfinite(value))
            raise InputError(f"{name}: expected finite numbers, found {bad} that are not.")
    if (weight < 0.0).any():
        raise InputError(f"weight: expected none below 0, found {weight.min():g}.")
    if not set(np.unique(end)) <= {0, 1}:
        raise InputError(
            f"end: expected 0 and 1, found {np.unique(end).tolist()}; heads have two end states."
        )
    if not np.issubdtype(np.asarray(block).dtype, np.integer) or (n and block.min() < 0):
        raise InputError(f"block: expected integers of at least 0, found {np.unique(block)[:5].tolist()}.")
    n_folds = int(block.max()) // 2 + 1 if n else 0
    if n_folds < 2:
        raise InputError(f"block: expected two blocks for each of at least 2 folds, found {n_folds} folds.")
    for b in range(2 * n_folds):
        if any(weight[(block == b) & (end == k)].sum() == 0.0 for k in (0, 1)):
            raise InputError(f"block: expected rows of both ends in every block, found none in block {b}.")
    return n_folds


def _standardised(columns: FloatArray) -> FloatArray:
    """Columns without what is constant, flat beyond their edges, of mean 0 and variance 1."""
    inside = np.clip(columns, *np.quantile(columns, [EDGE, 1.0 - EDGE], axis=0))
    width = inside.std(axis=0)
    kept = width > 1e-12 * np.maximum(np.abs(inside).max(axis=0, initial=0.0), 1.0)
    return np.asarray((inside[:, kept] - inside[:, kept].mean(axis=0)) / width[kept])


def _shares(rows: npt.NDArray[np.bool_], weight: FloatArray, end: IntArray) -> FloatArray:
    """Weights of every fold's rows, each end summing to one half."""
    out = np.zeros(rows.shape)
    for k in (0, 1):
        mine = rows * (weight * (end == k))
        out += 0.5 * mine / mine.sum(axis=1, keepdims=True)
    return out


def _loss(moments: HeadMoments, operator: FloatArray, end: IntArray, share: FloatArray) -> float:
    mean, variance = np.where(end == 0, (moments.o_0, moments.v_0), (moments.o_1, moments.v_1))
    return float(share @ (0.5 * ((operator - mean) ** 2 / variance + np.log(variance))))


def log_sinhc(x: Tensor) -> Tensor:
    """ln[sinh(x/2)/(x/2)], even and smooth."""
    a = x.abs()
    near = a < 0.05
    far = torch.where(near, torch.ones_like(a), a)
    return torch.where(near, a * a / 24 - a**4 / 2880, 0.5 * far - far.log() + torch.log1p(-torch.exp(-far)))


class _Networks:
    """The networks of all folds side by side: every tensor of weights has the fold as its first axis."""

    def __init__(
        self,
        columns: FloatArray,
        operator: FloatArray,
        end: IntArray,
        n_folds: int,
        generator: np.random.Generator,
    ) -> None:
        self.x, self.operator, self.end = torch.as_tensor(columns), operator, end
        n_in = columns.shape[1]

        def drawn(n_from: int, n_to: int) -> Tensor:
            values = generator.standard_normal((n_folds, n_from, n_to)) / math.sqrt(max(n_from, 1))
            return torch.as_tensor(values)

        def zero(*shape: int) -> Tensor:
            return torch.zeros((n_folds, *shape), dtype=torch.float64)

        self.weights = [
            drawn(n_in, N_HIDDEN), zero(1, N_HIDDEN), drawn(N_HIDDEN, N_HIDDEN), zero(1, N_HIDDEN),
            zero(N_HIDDEN, 4), zero(n_in, 4), zero(1, 4),
        ]  # fmt: skip

    def start(self, share: FloatArray) -> None:
        """Constants of the heads: Tweedie's closure of the moments of the ends."""
        o, v = np.zeros((2, len(share))), np.zeros((2, len(share)))
        for k in (0, 1):
            w = 2.0 * share * (self.end == k)
            o[k] = w @ self.operator
            v[k] = (w * (self.operator - o[k][:, None]) ** 2).sum(axis=1)
        v = np.maximum(v, 1e-9 * np.maximum(v.max(), 1e-9))
        found = tweedie_closure(o[0], o[1], v[0], v[1])
        d, v_0, v_1 = found.moments.T
        s = np.clip(found.s, 0.0, 1.0)  # infinite for a Gaussian, where any will do
        values = np.stack([o[1], np.log(d), np.log(v_0 / v_1), s], axis=1)
        self.constant = torch.as_tensor(values)[:, None, :]
        scale = np.stack([np.sqrt(v_1), *np.ones((3, len(share)))], axis=1)
        self.scale = torch.as_tensor(scale)[:, None, :]

    def raw(self, x: Tensor) -> Tensor:
        """O_1, ln D, ln r and s, shape (n_folds, n, 4)."""
        into, b_into, across, b_across, out, straight, b_out = self.weights
        hidden = torch.nn.functional.silu(x @ into + b_into)
        hidden = torch.nn.functional.silu(hidden @ across + b_across)
        change = hidden @ out + x @ straight + b_out
        bounded = torch.cat(
            [change[..., :1], LONGEST * torch.tanh(change[..., 1:3] / LONGEST), change[..., 3:]], -1
        )
        return self.constant + self.scale * bounded

    def loss(self, x: Tensor, operator: Tensor, first: Tensor, share: Tensor) -> Tensor:
        """Of every fold; ``first`` is true at end 0."""
        o_1, log_d, log_r, s = self.raw(x).unbind(-1)
        log_v_1 = log_d - 0.5 * log_r + log_sinhc(s * log_r) - log_sinhc((s - 1.0) * log_r)
        mean = torch.where(first, o_1 + log_d.exp(), o_1)
        log_v = torch.where(first, log_v_1 + log_r, log_v_1)
        return (share * 0.5 * ((operator - mean) ** 2 * torch.exp(-log_v) + log_v)).sum(-1)

    def fit(self, learn: FloatArray, stop: FloatArray, generator: np.random.Generator) -> tuple[int, ...]:
        """Adam on batches; every network keeps the weights that its stopping block liked best."""
        n_folds, n = learn.shape
        o, first = torch.as_tensor(self.operator), torch.as_tensor(self.end == 0)
        judges = np.flatnonzero(stop.sum(axis=0))
        share, judge = torch.as_tensor(learn), torch.as_tensor(stop[:, judges])
        at = torch.as_tensor(judges)

        def held_out() -> Tensor:
            with torch.no_grad():
                return self.loss(self.x[at], o[at], first[at], judge)

        best, kept = held_out(), [w.clone() for w in self.weights]
        best_step, quiet = torch.zeros(n_folds, dtype=torch.int64), torch.zeros(n_folds, dtype=torch.int64)
        for w in self.weights:
            w.requires_grad_()
        optimiser = torch.optim.Adam(self.weights, lr=LEARNING_RATE)
        for step in range(1, MAX_STEPS + 1):
            for group in optimiser.param_groups:
                group["lr"] = LEARNING_RATE * (1.0 - (step - 1) / MAX_STEPS)
            batch = torch.as_tensor(generator.choice(n, min(N_BATCH, n), replace=False))
            loss = self.loss(self.x[batch], o[batch], first[batch], share[:, batch]).sum() * (n / len(batch))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            if step % CHECK_EVERY == 0:
                now = held_out()
                gain = (now < best - 1e-6) & (quiet < PATIENCE)  # a network that has stopped stays so
                quiet = torch.where(gain, torch.zeros_like(quiet), quiet + 1)
                best, best_step = torch.where(gain, now, best), torch.where(gain, step, best_step)
                for keep, w in zip(kept, self.weights, strict=True):
                    keep[gain] = w.detach()[gain]
                if bool((quiet >= PATIENCE).all()):
                    break
        self.weights = kept
        return tuple(best_step.tolist())

    def heads(self) -> list[tuple[FloatArray, FloatArray, FloatArray, FloatArray]]:
        """O_1, D, r and s of every row by every network."""
        with torch.no_grad():
            found = self.raw(self.x).numpy()
        found = np.broadcast_to(found, (len(found), len(self.operator), 4))
        return [(one[:, 0], np.exp(one[:, 1]), np.exp(one[:, 2]), one[:, 3]) for one in found]
