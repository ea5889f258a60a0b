"""Heads of a network: exact where two moments are all, cross-fitted, stopped in time, and judged."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from openmm_diffforce import bridge, heads
from openmm_diffforce.audit import audit_bridge
from openmm_diffforce.bridge import noisy_operator_bridge
from openmm_diffforce.errors import ConvergenceError, InputError
from openmm_diffforce.heads import cross_fitted_heads, log_sinhc
from openmm_diffforce.summary import fold_of


def blocks(n: int, n_folds: int = 5) -> np.ndarray:
    return np.tile(fold_of(n, 2 * n_folds), 2)


def gaussian(n: int, shift: float, sigma: float, seed: int = 0) -> dict[str, Any]:
    """Ends N(0, 1) and N(shift, 1), noised; with them the exact Delta S(y)."""
    generator = np.random.default_rng(seed)
    x = np.concatenate([generator.normal(k * shift, 1.0, n) for k in (0, 1)])
    y = x + sigma * generator.standard_normal(2 * n)
    v = 1.0 + sigma**2
    return {
        "columns": y[:, None], "operator": 0.5 * shift**2 - shift * x, "end": np.repeat([0, 1], n),
        "weight": np.ones(2 * n), "block": blocks(n), "exact": (0.5 * shift**2 - shift * y) / v,
    }  # fmt: skip


def gamma(n: int, seed: int = 0) -> dict[str, Any]:
    """O|y is gamma of shape 4 and scale t(y) at end 0, t/(1 + t) at end 1: Delta S = 4 ln(1 + t)."""
    generator = np.random.default_rng(seed)
    grid = np.linspace(0.0, 1.0, 2001)
    weights = [np.ones_like(grid), (1.0 + np.exp(2.0 * grid)) ** -4]
    y = np.concatenate([generator.choice(grid, n, p=w / w.sum()) for w in weights])
    t = np.exp(2.0 * y)
    scale = np.where(np.arange(2 * n) < n, t, t / (1.0 + t))
    return {
        "columns": y[:, None], "operator": scale * generator.gamma(4.0, size=2 * n),
        "end": np.repeat([0, 1], n), "weight": np.ones(2 * n), "block": blocks(n),
        "exact": 4.0 * np.log1p(t),
    }  # fmt: skip


def fitted(data: dict[str, Any], seed: int = 1) -> heads.Heads:
    arguments = {k: v for k, v in data.items() if k != "exact"}
    return cross_fitted_heads(**arguments, generator=np.random.default_rng(seed))


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps, for what does not ask how good the networks are."""
    monkeypatch.setattr(heads, "MAX_STEPS", 60)


@pytest.mark.parametrize(
    ("data", "limit"),
    [(gaussian(1500, 3.0, 1.0), 0.35), (gaussian(1500, 2.0, 0.3), 0.25), (gamma(4000), 0.45)],
)
def test_exact_work(data: dict[str, Any], limit: float) -> None:
    found = fitted(data)
    miss = found.moments.delta - data["exact"]
    assert np.sqrt(np.mean(miss**2)) < limit
    assert np.sqrt(np.mean(miss**2)) < 0.35 * data["exact"].std()
    assert found.loss < found.constant_loss - 0.05
    assert (found.moments.o_1 <= found.moments.delta).all()
    assert (found.moments.delta <= found.moments.o_0).all()


def test_the_loss_is_that_of_the_moments() -> None:
    """What is trained on (torch) and what is returned (numpy) are one parametrisation."""
    data = gaussian(200, 2.0, 0.5)
    net = heads._Networks(data["columns"], data["operator"], data["end"], 2, np.random.default_rng(0))
    net.start(np.full((2, 400), 1 / 400))
    generator = torch.Generator().manual_seed(3)
    net.weights = [w + 0.3 * torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in net.weights]
    share = np.random.default_rng(1).random(400)
    found = net.loss(
        net.x, torch.as_tensor(data["operator"]), torch.as_tensor(data["end"] == 0), torch.as_tensor(share)
    )
    for k, one in enumerate(net.heads()):
        moments = heads.heads_to_moments(*one)
        assert float(found[k]) == pytest.approx(heads._loss(moments, data["operator"], data["end"], share))


def test_log_sinhc_is_smooth_and_even() -> None:
    x = torch.tensor([-700.0, -3.0, -0.051, 0.0, 0.049, 0.051, 3.0, 700.0], dtype=torch.float64)
    half = np.maximum(np.abs(x.numpy()) / 2, 1e-300)
    with np.errstate(over="ignore"):
        exact = np.where(half > 300, half - np.log(2 * half), np.log(np.sinh(np.minimum(half, 300)) / half))
    assert np.allclose(log_sinhc(x).numpy(), exact, rtol=1e-9, atol=1e-12)
    x = torch.linspace(-1, 1, 41, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_sinhc, x)


def test_a_network_does_not_see_its_fold(brief: None) -> None:
    data = gaussian(200, 2.0, 0.5)
    own = data["block"] // 2 == 3
    changed = data | {"operator": np.where(own, data["operator"] ** 2 + 7.0, data["operator"])}
    one, other = fitted(data), fitted(changed)
    for name in vars(one.moments):
        assert np.array_equal(getattr(one.moments, name)[own], getattr(other.moments, name)[own])
        assert np.array_equal(getattr(one.by_fold[3], name), getattr(other.by_fold[3], name))
    assert not np.allclose(one.moments.delta[~own], other.moments.delta[~own])
    # The block that stops it is not its own, and is not learned from: moved, the start stays.
    judge = data["block"] == (2 * 3 + 3) % 10
    moved = data | {"operator": np.where(judge, data["operator"][::-1], data["operator"])}
    assert fitted(moved).n_steps[3] < one.n_steps[3]


def test_what_cannot_be_learned_is_not_learned() -> None:
    generator = np.random.default_rng(4)
    data = gaussian(150, 1.0, 0.5) | {"columns": generator.normal(size=(300, 40))}
    found = fitted(data)
    assert max(found.n_steps) <= 40 < heads.MAX_STEPS
    assert found.loss < found.constant_loss + 0.05


def test_without_a_stop_it_learns_by_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: networks judged by the rows that they learn from go on, and lose."""
    generator = np.random.default_rng(4)
    monkeypatch.setattr(heads, "MAX_STEPS", 200)
    data = gaussian(150, 1.0, 0.5) | {"columns": generator.normal(size=(300, 40))}
    fit = heads._Networks.fit
    monkeypatch.setattr(heads._Networks, "fit", lambda self, learn, stop, g: fit(self, learn, learn, g))
    found = fitted(data)
    assert min(found.n_steps) > 100
    assert found.loss > found.constant_loss + 0.2


def test_it_is_deterministic(brief: None) -> None:
    data = gaussian(100, 2.0, 0.5)
    one, same, other = fitted(data, 1), fitted(data, 1), fitted(data, 2)
    assert np.array_equal(one.moments.delta, same.moments.delta)
    assert (one.loss, one.n_steps) == (same.loss, same.n_steps)
    assert not np.array_equal(one.moments.delta, other.moments.delta)


def test_two_folds_and_columns_that_say_nothing(brief: None) -> None:
    data = gaussian(100, 2.0, 0.5) | {"columns": np.ones((200, 2)), "block": blocks(100, 2)}
    found = fitted(data)
    assert len(found.by_fold) == 2
    assert all(one.delta.std() < 1e-9 for one in found.by_fold)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": np.ones(200)}, r"columns of shape \(n, n_columns\)"),
        ({"columns": np.ones((199, 1))}, "one value for each of its rows"),
        ({"operator": np.ones(199)}, "one value for each of its rows"),
        ({"columns": np.full((200, 1), np.nan)}, "columns: expected finite numbers, found 200"),
        ({"operator": np.full(200, np.inf)}, "operator: expected finite numbers"),
        ({"weight": -np.ones(200)}, "weight: expected none below 0, found -1"),
        ({"end": np.repeat([0, 2], 100)}, r"end: expected 0 and 1, found \[0, 2\]"),
        ({"end": np.zeros(200, int)}, "rows of both ends in every block"),
        ({"block": np.zeros(200, int)}, "at least 2 folds, found 1"),
        ({"block": np.full(200, 2.5)}, "block: expected integers"),
        ({"block": blocks(100) - 1}, "block: expected integers of at least 0"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fitted(gaussian(100, 1.0, 0.5) | change)


def test_heads_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, *_: Any) -> tuple[int, ...]:
        self.constant = torch.full_like(self.constant, torch.nan)
        return (0,) * 5

    monkeypatch.setattr(heads._Networks, "fit", broken)
    with pytest.raises(ConvergenceError, match="heads: expected finite heads of every frame"):
        fitted(gaussian(100, 1.0, 0.5))


# ------------------------------------------------------------------------------- in the bridge


def bridged(shift: float, n: int, **options: Any) -> bridge.BridgeResult:
    generator = np.random.default_rng(5)
    x = [generator.normal(k * shift, 1.0, (n, 1)) for k in (0, 1)]
    o = [0.5 * shift**2 - shift * v[:, 0] for v in x]
    options = {"sigmas": [1.0], "n_bootstrap": 5, "n_copies": 1} | options
    return noisy_operator_bridge(x, o, generator=np.random.default_rng(6), inefficiency=(1, 1), **options)


@pytest.mark.parametrize("options", [{"closure": "heads"}, {"summary": "heads"}])
def test_delta_f_by_heads(options: dict[str, Any]) -> None:
    found = bridged(3.0, 800, **options)
    assert abs(found.delta_f) < 3 * found.d_delta_f < 1.5
    assert {"closure": found.closure, "summary": found.summary} == (
        {"closure": "density", "summary": "splines"} | options
    )
    assert found.level.r_squared > 0.5
    assert all(0.8 < c < 1.25 for c in found.level.calibration)
    assert 0.1 < found.level.overlap < 1.0
    # The error is not that of the frames alone.
    assert found.d_delta_f > 1.2 * found.level.d_sampling
    assert len(found.work_forward) == len(found.work_reverse) == 800
    assert audit_bridge(found).verdict != "FAIL"


def test_closures_of_the_heads(brief: None) -> None:
    level = bridged(2.0, 400, closure="heads").level
    assert level.closures["tweedie"] == level.delta_f
    assert set(level.closures) == {"density", "tweedie", "gamma", "hermite", "trapezoid"}
    assert level.d_models == abs(level.delta_f - level.closures["density"])
    assert level.d_delta_f >= level.d_models
    assert len(level.folds) == 5


def test_wrong_heads_fail_the_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bridge._heads_of
    monkeypatch.setattr(heads, "MAX_STEPS", 150)
    assert audit_bridge(bridged(2.0, 400, closure="heads")).verdict != "FAIL"

    def too_sure(*arguments: Any) -> heads.Heads:
        found = right(*arguments)
        return replace(found, moments=replace(found.moments, v_0=0.3 * found.moments.v_0))

    def shifted(*arguments: Any) -> heads.Heads:
        found = right(*arguments)
        by_fold = tuple(replace(one, delta=one.delta + 3.0) for one in found.by_fold)
        return replace(
            found, moments=replace(found.moments, delta=found.moments.delta + 3.0), by_fold=by_fold
        )

    for wrong, gate in (
        (too_sure, "normal score of O, |mean square - 1|"), (shifted, "spread over models [kT]"),
    ):  # fmt: skip
        monkeypatch.setattr(bridge, "_heads_of", wrong)
        audit = audit_bridge(bridged(2.0, 400, closure="heads"))
        assert audit.verdict == "FAIL"
        assert {g.name: g.status for g in audit.gates}[gate] == "FAIL"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"summary": "best"}, "summary: expected splines or heads, found 'best'"),
        ({"closure": "head"}, "closure: expected density, tweedie, gamma or heads, found 'head'"),
    ],
)
def test_names_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bridged(1.0, 100, **options)


def test_heads_have_two_end_states() -> None:
    x = [np.random.default_rng(k).normal(size=(100, 1)) for k in range(3)]
    for options in ({"closure": "heads"}, {"summary": "heads"}):
        with pytest.raises(InputError, match="heads: expected two end states, found 3 states"):
            noisy_operator_bridge(
                x, [v[:, 0] for v in x], (0.0, 0.5, 1.0), generator=np.random.default_rng(0), **options
            )
