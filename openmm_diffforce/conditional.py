r"""The density of the operator given a summary of the noised frame, tilted by lambda.

Given a bin b of the summary the operator has one density for all states,

.. math:: p_\lambda(O|b) = e^{a_b(z(O)) - \lambda O} / Z_\lambda(b), \qquad
          \Delta S_\lambda(b) = -\ln Z_\lambda(b) + \ln Z_0(b) ,

because noising does not know lambda. The curves a_b are a tensor product of cubic B-splines, smooth in
z and in b; frames of all states fit them together, by penalised maximum likelihood. In one bin this is
:func:`~openmm_diffforce.density.fit_operator_density`. Bins are a kernel like any other, so that the
noised states are discrete and BAR and MBAR between them are sums.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.interpolate import BSpline
from scipy.sparse import csr_matrix

from .density import WEAK, OperatorCoordinate, maximise_concave

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

N_COEFS = 22
"""B-splines along z."""

N_ACROSS = 5
"""B-splines along the summary."""

N_NODES = 160
"""Nodes of the integrals over z."""

N_BINS = 24
"""Bins of the summary."""

NEGLIGIBLE = 8.0
"""Log evidence below the best of a falling row of precisions, after which its rest is not tried."""

TOLERANCE = 1e-6
"""Gain in log posterior of the last Newton step."""

ROUGHNESS = tuple(10.0 ** np.arange(-1.0, 5.0))
"""Prior precisions of the third differences along z that are averaged over."""

ACROSS = (0.1, 100.0, 1e5)
"""Prior precisions of the second differences along the summary: a curve that tilts linearly is free."""


@dataclass(frozen=True)
class Fit:
    """One model of the curves: its mode.

    Attributes
    ----------
    c : numpy.ndarray, shape (N_ACROSS * N_COEFS,)
    evidence : float
        Log evidence, comparable between coordinates and precisions.
    hessian : numpy.ndarray
        Of minus the log posterior at ``c``.
    prior : numpy.ndarray
    """

    c: FloatArray
    evidence: float
    hessian: FloatArray
    prior: FloatArray


def bin_counts(bins: IntArray, state: IntArray, weight: FloatArray, n_states: int) -> FloatArray:
    """Weight of the copies in every bin and state, shape (N_BINS, n_states)."""
    flat = np.bincount(bins * n_states + state, weights=weight, minlength=N_BINS * n_states)
    return np.asarray(flat.reshape(N_BINS, n_states), dtype=np.float64)


class ConditionalDensity:
    """Curves of ln p(O | bin) over one coordinate, for frames of several states.

    Parameters
    ----------
    coordinate : OperatorCoordinate
    lams : numpy.ndarray, shape (n_states,)
    operator : numpy.ndarray, shape (n,)
        O of every noised copy of a frame [kT].
    bins : numpy.ndarray of int, shape (n,)
        Bin of its summary, below ``N_BINS``.
    state : numpy.ndarray of int, shape (n,)
    """

    def __init__(
        self,
        coordinate: OperatorCoordinate,
        lams: FloatArray,
        operator: FloatArray,
        bins: IntArray,
        state: IntArray,
    ) -> None:
        z = coordinate.z(operator)
        low, high = z.min(), z.max()
        low, high = low - 0.03 * (high - low), high + 0.03 * (high - low)
        spacing = (high - low) / (N_COEFS - 3)
        knots = low + spacing * (np.arange(N_COEFS + 4) - 3)
        self.nodes = np.linspace(low, high, N_NODES)

        def design(v: FloatArray) -> Any:
            inside = np.clip(v, knots[3], np.nextafter(knots[N_COEFS], -np.inf))
            return BSpline.design_matrix(inside, knots, 3)

        self.lams, self.z, self.bins, self.state, self.operator = lams, z, bins, state, operator
        self.wide = float(lams[int(np.argmax([np.std(operator[state == k]) for k in range(len(lams))]))])
        self._along = design(self.nodes).toarray()
        self._at = design(z)
        self._tilt = coordinate.operator(self.nodes)
        centres = (np.arange(N_BINS) + 0.5) / N_BINS
        self._across = BSpline.design_matrix(
            centres, (np.arange(N_ACROSS + 4) - 3.0) / (N_ACROSS - 3), 3
        ).toarray()
        self._jacobian = coordinate.log_slope(z) - math.log(self.nodes[1] - self.nodes[0])
        third = np.diff(np.eye(N_COEFS), 3, axis=0)
        second = np.diff(np.eye(N_ACROSS), 2, axis=0)
        self._rough = np.kron(np.eye(N_ACROSS), third.T @ third)
        self._uneven = np.kron(second.T @ second, np.eye(N_COEFS))
        width = z.std() or 1.0
        parabola = -0.5 * ((self.nodes - z.mean()) / width) ** 2
        self._start = np.tile(np.linalg.lstsq(self._along, parabola, rcond=None)[0], N_ACROSS)

    def prior(self, mu: float, across: float) -> FloatArray:
        """Prior precision of the coefficients."""
        return mu * self._rough + across * self._uneven + WEAK * np.eye(len(self._start))

    def log_z(self, c: FloatArray, lams: FloatArray) -> tuple[FloatArray, FloatArray]:
        """ln Z, shape (N_BINS, n_lam), and the probabilities of the nodes."""
        a = (self._across @ c.reshape(N_ACROSS, N_COEFS)) @ self._along.T
        tilted = a[:, None, :] - (lams - self.wide)[None, :, None] * self._tilt
        top = tilted.max(axis=-1, keepdims=True)
        p = np.exp(tilted - top)
        total = p.sum(axis=-1, keepdims=True)
        p /= total
        return (top + np.log(total))[..., 0], p

    def fit(self, weight: FloatArray, mu: float, across: float, start: FloatArray | None = None) -> Fit:
        """Mode of the posterior for copies of these weights (independent frames each stands for)."""
        prior = self.prior(mu, across)
        counts = bin_counts(self.bins, self.state, weight, len(self.lams))
        place = csr_matrix((weight, (self.bins, np.arange(len(weight)))), shape=(N_BINS, len(weight)))
        data = (self._across.T @ (place @ self._at).toarray()).ravel()
        eye, along, cross = self._across, self._along, self._across[:, :, None] * self._across[:, None, :]

        def value(c: FloatArray) -> float:
            return float(data @ c - (counts * self.log_z(c, self.lams)[0]).sum() - 0.5 * c @ prior @ c)

        def slopes(c: FloatArray) -> tuple[FloatArray, FloatArray]:
            p = self.log_z(c, self.lams)[1]
            mean = p @ along
            gradient = data - (eye.T @ (counts[..., None] * mean).sum(axis=1)).ravel() - prior @ c
            pooled = (counts[..., None] * p).sum(axis=1)
            covariance = np.matmul(along.T * pooled[:, None, :], along)
            covariance -= np.matmul(mean.transpose(0, 2, 1) * counts[:, None, :], mean)
            hessian = np.tensordot(cross, covariance, axes=(0, 0)).transpose(0, 2, 1, 3)
            return gradient, hessian.reshape(prior.shape) + prior

        c, now, hessian = maximise_concave(
            value, slopes, self._start if start is None else start, tolerance=TOLERANCE
        )
        tilt = (self.lams[self.state] - self.wide) * self.operator
        evidence = now + float(weight @ (self._jacobian - tilt))
        evidence += 0.5 * (np.linalg.slogdet(prior)[1] - np.linalg.slogdet(hessian)[1])
        return Fit(c, float(evidence), hessian, prior)

    def fits(self, weight: FloatArray) -> Iterator[tuple[Fit, float, float]]:
        """Fits over the precisions, stiff to rough; what only loses evidence is not tried."""
        best = -math.inf
        for across in ACROSS[::-1]:
            start, before = None, -math.inf
            for mu in ROUGHNESS[::-1]:
                found = self.fit(weight, mu, across, start)
                start = found.c
                yield found, mu, across
                best = max(best, found.evidence)
                if found.evidence < min(before, best - NEGLIGIBLE):
                    break
                before = found.evidence

    def actions(self, c: FloatArray) -> FloatArray:
        """S_k(b) - S_0(b) of every state, shape (N_BINS, n_states) [kT]."""
        log_z = self.log_z(c, self.lams)[0]
        return np.asarray(log_z[:, :1] - log_z)

    def error(self, fit: Fit, slope: FloatArray) -> float:
        """Posterior variance of a number whose derivative by ``actions`` is ``slope`` [N_BINS, n_states]."""
        p = self.log_z(fit.c, self.lams)[1]
        # dS_k = -dlnZ_k + dlnZ_0
        mean = p @ self._along
        per_bin = np.einsum("bk,bkc->bc", slope, mean[:, :1] - mean)
        gradient = (self._across.T @ per_bin).ravel()
        return max(float(gradient @ np.linalg.solve(fit.hessian, gradient)), 0.0)

    def moments(self, c: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Mean and variance of O in every bin and state, each of shape (N_BINS, n_states)."""
        p = self.log_z(c, self.lams)[1]
        mean = p @ self._tilt
        return mean, np.maximum(p @ self._tilt**2 - mean**2, 0.0)

    def quantile(self, c: FloatArray, chosen: IntArray) -> FloatArray:
        """Probability of a smaller O than that of every chosen copy, given its bin and state."""
        p = self.log_z(c, self.lams)[1]
        cumulative = np.cumsum(p, axis=-1) - 0.5 * p
        step = self.nodes[1] - self.nodes[0]
        at = (self.z[chosen] - self.nodes[0]) / step
        left = np.clip(at.astype(np.int64), 0, N_NODES - 2)
        rows = cumulative[self.bins[chosen], self.state[chosen]]
        i = np.arange(len(left))
        part = at - left
        return np.asarray((1 - part) * rows[i, left] + part * rows[i, left + 1])
