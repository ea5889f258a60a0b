r"""MBAR between discrete states: counts of frames in bins, and an action for every bin and state.

Bins of a summary are states of a kernel like any other, so that MBAR over frames is a sum over bins,

.. math:: \sum_b \frac{N_b \, n_k e^{f_k - S_k(b)}}{\sum_l n_l e^{f_l - S_l(b)}} = n_k ,

with N_b frames in bin b, n_k of state k; BAR is the case of two states. A bin may be a single frame.
Arrays in, arrays out.
"""

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp

from .errors import ConvergenceError

FloatArray = npt.NDArray[np.float64]

LONGEST_STEP = 1e3
"""Of Newton's method [kT]."""


def solve_mbar(counts: FloatArray, actions: FloatArray) -> tuple[FloatArray, FloatArray]:
    """f_k - f_0 and p_k(b) [n_bins, n_states] from counts and actions of bins; BAR for two states.

    Stationary: sum_b N_b p_k(b) = N_k. The negative log likelihood is convex in f; damped Newton.
    """
    n_k, n_b = counts.sum(axis=0), counts.sum(axis=1)
    log_n, floor = np.log(n_k), n_k.min() * np.eye(len(n_k) - 1)

    def value(f: FloatArray) -> float:
        return float(n_b @ logsumexp(log_n + f - actions, axis=1) - n_k @ f)

    f = np.average(actions, axis=0, weights=n_b)
    now, damping = value(f), 0.0
    for _ in range(200):
        log_p = log_n + f - actions
        p = np.exp(log_p - logsumexp(log_p, axis=1, keepdims=True))
        gradient = n_b @ p - n_k
        step = np.zeros(len(f))
        step[1:] = -np.linalg.solve(_curvature(counts, p) + damping * floor, gradient[1:])
        step *= min(1.0, LONGEST_STEP / max(np.abs(step).max(), 1e-300))
        new = value(f + step)
        if new <= now + 1e-12 * abs(now):
            f, now, damping = f + step, new, 0.1 * damping
            if np.abs(step).max() < 1e-10:
                return f - f[0], p
        else:
            damping = max(10.0 * damping, 1e-6)
            if damping > 1e12:
                break
    raise ConvergenceError(
        "bridge: expected BAR between the noised states to converge, found none; they do not overlap at "
        "all: use larger noise levels, or add a window."
    )


def _curvature(counts: FloatArray, p: FloatArray) -> FloatArray:
    """Second derivative by f of all states but the first. Where states do not overlap at all it would be
    zero: a trace of their size keeps it invertible, and the errors finite and huge."""
    n_b = counts.sum(axis=1)
    full = np.diag(n_b @ p) - (p * n_b[:, None]).T @ p
    return np.asarray(full[1:, 1:] + 1e-12 * counts.sum(axis=0).min() * np.eye(p.shape[1] - 1))


def slope_by_actions(counts: FloatArray, p: FloatArray) -> FloatArray:
    """d Delta f / d actions, shape (n_bins, n_states): implicit differentiation of MBAR's equations."""
    a = np.zeros(p.shape[1])
    unit = np.zeros(p.shape[1] - 1)
    unit[-1] = 1.0
    a[1:] = np.linalg.solve(_curvature(counts, p), unit)
    return np.asarray(counts.sum(axis=1)[:, None] * p * (a - (p @ a)[:, None]))


def influence_of_counts(counts: FloatArray, p: FloatArray) -> FloatArray:
    """First-order effect of one more frame in a bin on Delta f, up to a constant per state."""
    return np.asarray(-np.linalg.solve(_curvature(counts, p), p[:, 1:].T)[-1])


def overlap_of_two(log_p: FloatArray, counts: FloatArray) -> float:
    """A = int 2 p q/(p + q) of two states from both of them; ln p, ln q up to what they share."""
    share = 2.0 * np.exp(log_p[:, ::-1] - np.logaddexp(*log_p.T)[:, None])
    return float((share * counts).sum() / counts.sum())
