"""Swaps of replicas between states: the decision, and how well walkers mix.

Arrays in, arrays out; the dynamics between two swaps is in :mod:`openmm_diffforce.exchange`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError
from .estimate import FloatArray, statistical_inefficiency

IntArray = npt.NDArray[np.int64]


def exchange_states(
    u: FloatArray, state_of_replica: Sequence[int], rng: np.random.Generator, n_attempts: int
) -> tuple[list[int], IntArray, IntArray]:
    r"""Attempt exchanges between random pairs of replicas.

    .. math:: P = \min\{1, \exp(u_{i,s_i} - u_{i,s_j} + u_{j,s_j} - u_{j,s_i})\}

    Parameters
    ----------
    u : numpy.ndarray, shape (n_replicas, n_states)
        Reduced potential of each replica in each state [kT]; finite.
    state_of_replica : sequence of int
    rng : numpy.random.Generator
    n_attempts : int

    Returns
    -------
    state_of_replica : list of int
        The new assignment.
    proposed, accepted : numpy.ndarray, shape (n_states, n_states)
        Symmetric counts.

    Notes
    -----
    Compared in log space with minus an exponential deviate, which is the logarithm of a uniform
    one: no difference of energies overflows.

    Examples
    --------
    >>> u = np.array([[0.0, -1e5], [-1e5, 0.0]])
    >>> exchange_states(u, [0, 1], np.random.default_rng(0), 1)[0]
    [1, 0]
    """
    state = [int(s) for s in state_of_replica]
    n = len(state)
    proposed = np.zeros((u.shape[1], u.shape[1]), dtype=np.int64)
    accepted = np.zeros_like(proposed)
    if n < 2:
        return state, proposed, accepted
    first = rng.integers(n, size=n_attempts)
    second = (first + rng.integers(1, n, size=n_attempts)) % n
    log_uniform = -rng.standard_exponential(n_attempts)
    for i, j, threshold in zip(first.tolist(), second.tolist(), log_uniform.tolist(), strict=True):
        a, b = state[i], state[j]
        proposed[a, b] += 1
        if threshold <= u[i, a] - u[i, b] + u[j, b] - u[j, a]:
            state[i], state[j] = b, a
            accepted[a, b] += 1
    return state, proposed + proposed.T, accepted + accepted.T


@dataclass(frozen=True)
class SwapStatistics:
    """How walkers moved through the states: see :func:`swap_statistics`.

    Attributes
    ----------
    state_of_replica : numpy.ndarray, shape (n_iterations, n_replicas)
        State that each replica's frame was sampled in.
    proposed, accepted : numpy.ndarray or None, shape (n_states, n_states)
        Attempted and accepted exchanges of each pair of states; None for an expanded ensemble.
    transition : numpy.ndarray, shape (n_states, n_states)
        Probability of going from state i to j in one iteration; rows sum to 1.
    occupancy : numpy.ndarray, shape (n_states,)
        Fraction of frames in each state.
    round_trips : numpy.ndarray, shape (n_replicas,)
        Journeys from one end of the states to the other and back.
    second_eigenvalue : float
        Of ``transition``; 1 if the states fall into parts that never met.
    inefficiency : float
        Statistical inefficiency of the state index along replicas [iterations].
    """

    state_of_replica: IntArray
    proposed: IntArray | None
    accepted: IntArray | None
    transition: FloatArray
    occupancy: FloatArray
    round_trips: IntArray
    second_eigenvalue: float
    inefficiency: float

    @property
    def acceptance(self) -> FloatArray | None:
        """Accepted fraction of the exchanges of each pair; NaN where none was attempted."""
        if self.proposed is None or self.accepted is None:
            return None
        with np.errstate(invalid="ignore"):
            return np.where(self.proposed > 0, self.accepted / self.proposed, np.nan)

    @property
    def neighbour_acceptance(self) -> FloatArray | None:
        """The same of neighbouring states, shape (n_states - 1,)."""
        found = self.acceptance
        return None if found is None else np.diagonal(found, 1).copy()

    @property
    def mixing_time(self) -> float:
        """1 / (1 - second eigenvalue) [iterations]; infinite if states never met."""
        gap = 1.0 - self.second_eigenvalue
        return 1.0 / gap if gap > 1e-12 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; infinite becomes None."""
        counts = {n: getattr(self, n) for n in ("proposed", "accepted", "acceptance")}
        return {
            "n_iterations": len(self.state_of_replica),
            "n_replicas": self.state_of_replica.shape[1],
            **{n: None if v is None else v.tolist() for n, v in counts.items()},
            "transition": self.transition.tolist(),
            "occupancy": self.occupancy.tolist(),
            "round_trips": self.round_trips.tolist(),
            "second_eigenvalue": self.second_eigenvalue,
            "mixing_time": self.mixing_time if math.isfinite(self.mixing_time) else None,
            "inefficiency": self.inefficiency,
        }


def count_round_trips(state_of_replica: Any, n_states: int) -> IntArray:
    """Journeys of each replica between the first and the last state and back.

    Parameters
    ----------
    state_of_replica : array_like, shape (n_iterations, n_replicas)
    n_states : int

    Returns
    -------
    numpy.ndarray, shape (n_replicas,)
        Half the number of passages from one end to the other, rounded down; what came before the
        first end and after the last one does not count.

    Examples
    --------
    >>> count_round_trips([[0], [1], [2], [1], [0], [1], [0], [2]], 3)
    array([1])
    """
    out = []
    for path in np.asarray(state_of_replica).T:
        ends = path[(path == 0) | (path == n_states - 1)]
        out.append(int(np.count_nonzero(np.diff(ends))) // 2)
    return np.array(out, dtype=np.int64)


def swap_statistics(
    state_of_replica: Any, n_states: int, *, proposed: Any = None, accepted: Any = None
) -> SwapStatistics:
    r"""How well walkers mix between states.

    .. math:: T_{ij} = \frac{N_{ij} + N_{ji}}{\sum_k (N_{ik} + N_{ki})}

    with :math:`N_{ij}` moves from state i to j between successive iterations. The second largest
    eigenvalue :math:`\mu_2` of T gives a lower bound of the time to mix, :math:`1/(1-\mu_2)`.

    =========  ==============================  ====
    symbol     code                            unit
    =========  ==============================  ====
    T          ``transition``                  1
    mu_2       ``second_eigenvalue``           1
    =========  ==============================  ====

    Parameters
    ----------
    state_of_replica : array_like of int, shape (n_iterations, n_replicas)
    n_states : int
    proposed, accepted : array_like of int, shape (n_states, n_states), optional

    Returns
    -------
    SwapStatistics

    Raises
    ------
    InputError
        If a state is out of range, or the array has another shape.

    Notes
    -----
    T is symmetrised because exchange obeys detailed balance. It sees the state index only: slow
    coordinates of the molecule are not in it.

    References
    ----------
    J. D. Chodera, M. R. Shirts, Replica exchange and expanded ensemble simulations as Gibbs
    sampling, 2011, doi:10.1063/1.3660669.

    Examples
    --------
    >>> swap_statistics([[0, 1], [1, 0], [0, 1]], 2).transition.tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    states = np.asarray(state_of_replica)
    if states.ndim != 2 or states.size == 0 or not np.issubdtype(states.dtype, np.integer):
        raise InputError(
            "state_of_replica: expected integers of shape (n_iterations, n_replicas), found "
            f"{states.dtype} {states.shape}."
        )
    if states.min() < 0 or states.max() >= n_states:
        raise InputError(
            f"state_of_replica: expected states in [0, {n_states}), found {states.min()} to {states.max()}."
        )
    states = states.astype(np.int64)
    counts = np.zeros((n_states, n_states))
    np.add.at(counts, (states[:-1].ravel(), states[1:].ravel()), 1.0)
    counts += counts.T
    # A state that nobody left or entered stays by itself.
    counts[np.diag_indices(n_states)] += counts.sum(axis=1) == 0
    total = counts.sum(axis=1)
    eigenvalues = np.linalg.eigvalsh(counts / np.sqrt(np.outer(total, total)))
    series = [statistical_inefficiency(path.astype(float)) for path in states.T]
    return SwapStatistics(
        state_of_replica=states,
        proposed=None if proposed is None else np.asarray(proposed, dtype=np.int64),
        accepted=None if accepted is None else np.asarray(accepted, dtype=np.int64),
        transition=counts / total[:, None],
        occupancy=np.bincount(states.ravel(), minlength=n_states) / states.size,
        round_trips=count_round_trips(states, n_states),
        second_eigenvalue=float(min(1.0, eigenvalues[-2])) if n_states > 1 else 0.0,
        inefficiency=float(np.mean(series)),
    )
