"""Swaps between states: the decision, and statistics of walks."""

import json
import math
from typing import Any

import numpy as np
import pytest

from openmm_diffforce.errors import InputError
from openmm_diffforce.swaps import count_round_trips, exchange_states, swap_statistics


@pytest.mark.parametrize(
    "u",
    [[[0.0, 1.5], [0.3, 0.0]], [[0.0, 0.2], [2.0, 0.1]], [[0.0, -3.0], [-1.0, 0.0]]],
)
def test_acceptance_is_the_metropolis_formula(u: list[list[float]]) -> None:
    u_kl = np.array(u)
    rng = np.random.default_rng(3)
    n = 20000
    hits = sum(exchange_states(u_kl, [0, 1], rng, 1)[0] == [1, 0] for _ in range(n))
    p = min(1.0, math.exp(u_kl[0, 0] - u_kl[0, 1] + u_kl[1, 1] - u_kl[1, 0]))
    assert abs(hits / n - p) <= 4 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize(("difference", "accepted"), [(1e4, 0), (-1e4, 1), (1e300, 0), (-1e300, 1)])
def test_huge_differences_do_not_overflow(difference: float, accepted: int) -> None:
    u = np.array([[0.0, difference], [0.0, 0.0]])
    state, proposed, found = exchange_states(u, [0, 1], np.random.default_rng(0), 1)
    assert proposed[0, 1] == proposed[1, 0] == 1
    assert found[0, 1] == accepted
    assert state == ([1, 0] if accepted else [0, 1])


def test_exchange_samples_the_permutations_by_their_weight() -> None:
    """Many attempts draw assignments s from exp(-sum_i u_i,s_i): all six of three replicas."""
    rng = np.random.default_rng(5)
    u = rng.normal(size=(3, 3))
    found: dict[tuple[int, ...], int] = {}
    n, state = 6000, [0, 1, 2]
    for _ in range(n):
        state = exchange_states(u, state, rng, 9)[0]
        found[tuple(state)] = found.get(tuple(state), 0) + 1
    weight = {s: math.exp(-sum(u[i, k] for i, k in enumerate(s))) for s in found}
    total = sum(weight.values())
    assert len(found) == 6
    for s, count in found.items():
        p = weight[s] / total
        assert abs(count / n - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_round_trips_of_a_hand_written_path() -> None:
    paths = np.array(
        [
            [0, 1, 2, 3, 2, 1, 0, 3, 0, 1],  # 0-3-0 twice
            [3, 3, 2, 0, 0, 1, 3, 2, 3, 3],  # 3-0-3 once
            [1, 2, 1, 2, 1, 2, 1, 2, 1, 2],  # never at an end
            [2, 0, 1, 2, 3, 0, 3, 1, 2, 0],  # 0-3-0-3-0
        ]
    ).T
    assert count_round_trips(paths, 4).tolist() == [2, 1, 0, 2]


def test_statistics_of_a_known_chain() -> None:
    rng = np.random.default_rng(2)
    p_move = 0.2
    moves = rng.random(40000) < p_move
    path = np.cumsum(moves) % 2
    found = swap_statistics(path[:, None], 2)
    assert np.allclose(found.transition.sum(axis=1), 1.0)
    assert found.second_eigenvalue == pytest.approx(1 - 2 * p_move, abs=0.02)
    # An exponential autocorrelation mu^n has g = (1 + mu) / (1 - mu).
    assert found.inefficiency == pytest.approx(1.6 / 0.4, rel=0.2)
    apart = swap_statistics(np.array([[0, 2], [1, 3], [0, 2]]), 4)
    assert apart.second_eigenvalue == pytest.approx(1.0)
    assert apart.mixing_time == math.inf
    assert apart.to_dict()["mixing_time"] is None
    json.dumps(apart.to_dict())


@pytest.mark.parametrize("bad", [[], [[0, 3]], [[-1, 0]], [[0.5, 1.0]], [0, 1]])
def test_bad_states_of_replicas(bad: Any) -> None:
    with pytest.raises(InputError, match="state_of_replica"):
        swap_statistics(bad, 3)
