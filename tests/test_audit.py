"""Every gate has an input that must fail it, and a good run passes them all."""

import json
from dataclasses import replace

import numpy as np
import pytest

from openmm_diffforce.audit import BRIDGE_GATES, GATES, LABEL_GATES, Audit, audit_bridge, audit_density, judge
from openmm_diffforce.bridge import BridgeResult, noisy_operator_bridge
from openmm_diffforce.density import fit_operator_density
from openmm_diffforce.errors import InputError


def audited(operators: list[np.ndarray], lams=(0.0, 1.0), **options) -> Audit:
    return audit_density(fit_operator_density(operators, lams, **options), operators, lams)


def status(audit: Audit, name: str) -> str:
    return {g.name: g.status for g in audit.gates}[name]


def gaussians(shift: float, n: int, seed: int = 0) -> list[np.ndarray]:
    """O of two harmonic wells ``shift`` widths apart: Delta f = 0."""
    generator = np.random.default_rng(seed)
    return [shift * generator.standard_normal(n) + end * 0.5 * shift**2 for end in (1, -1)]


def test_a_good_run_passes_every_gate():
    audit = audited(gaussians(1.5, 2000, seed=1))
    assert audit.verdict == "PASS", audit
    assert {g.name for g in audit.gates} == set(GATES)
    assert not any(g.advice for g in audit.gates)
    json.dumps(audit.to_dict(), allow_nan=False)


def test_a_gap_too_wide_fails_and_says_where_a_window_helps():
    generator = np.random.default_rng(1)
    audit = audited([generator.gamma(2.0, 2000.0, 200), generator.gamma(2.0, 1.0, 200)])
    gate = next(g for g in audit.gates if g.name == "stated error [kT]")
    assert gate.status == "FAIL"
    assert gate.value > 1
    assert "one at lambda 0." in gate.advice
    assert audit.verdict == "FAIL"
    assert "density against BAR [SE]" not in {g.name for g in audit.gates}  # BAR knows nothing here


def test_too_few_independent_frames_fail():
    operators = gaussians(0.5, 60)
    audit = audited(operators, inefficiency=(3.0, 3.0))
    assert status(audit, "independent frames per state") == "WARN"
    assert "first half against second half [SE]" not in {g.name for g in audit.gates}
    assert judge("independent frames per state", 19.0).status == "FAIL"


def test_states_that_are_no_tilts_of_one_density_fail():
    o = gaussians(1.5, 3000)
    o[1] = 0.5 * (o[1] - o[1].mean()) + o[1].mean()
    audit = audited(o)
    assert status(audit, "chi2 of the states") == "FAIL"
    assert audit.verdict == "FAIL"


def test_a_run_that_drifts_fails():
    o = gaussians(1.0, 1000)
    o = [v + np.where(np.arange(1000) < 500, 0.6, -0.6) for v in o]  # both ends move together: still tilts
    audit = audited(o, inefficiency=(1.0, 1.0))
    assert status(audit, "first half against second half [SE]") == "FAIL"


def test_a_density_that_contradicts_bar_fails():
    operators = gaussians(1.0, 1000)
    found = fit_operator_density(operators)
    wrong = type(found)(**{**{k: getattr(found, k) for k in found.__dataclass_fields__},
                           "f_lam": found.f_lam + 0.5 * found.lam})  # fmt: skip
    assert status(audit_density(found, operators), "density against BAR [SE]") == "PASS"
    assert status(audit_density(wrong, operators), "density against BAR [SE]") == "FAIL"


def test_windows_between_are_audited_too():
    generator = np.random.default_rng(3)
    lams = (0.0, 0.02, 1.0)
    operators = [generator.gamma(2.0, 50 / (1 + 50 * lam), 1500) for lam in lams]
    audit = audited(operators, lams)
    assert audit.verdict == "PASS", audit


@pytest.mark.parametrize(("table", "name"), [(t, n) for t in (GATES, BRIDGE_GATES, LABEL_GATES) for n in t])
def test_every_gate_has_three_answers(table, name):
    gate = table[name]
    middle = 0.5 * (gate.good + gate.bad)
    beyond = gate.bad / 2 if gate.larger_is_better else 2 * gate.bad
    found = [judge(name, v, gates=table) for v in (gate.good, middle, beyond, float("nan"))]
    assert [g.status for g in found] == ["PASS", "WARN", "FAIL", "FAIL"]
    assert found[2].advice.startswith(gate.advice)


def test_an_unknown_gate():
    with pytest.raises(InputError, match="expected one of stated error"):
        judge("luck", 1.0)


# ----------------------------------------------------------------------------------- the bridge


def bridged(x: list[np.ndarray], o: list[np.ndarray], **options) -> BridgeResult:
    options = {"inefficiency": [1.0] * len(o), "n_bootstrap": 0} | options
    return noisy_operator_bridge(x, o, generator=np.random.default_rng(0), **options)


def wells(shift: float, n: int, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    generator = np.random.default_rng(seed)
    x = [generator.normal(m, 1.0, (n, 1)) for m in (0.0, shift)]
    return x, [0.5 * shift**2 - shift * v[:, 0] for v in x]


@pytest.fixture(scope="module")
def good_bridge() -> BridgeResult:
    return bridged(*wells(1.5, 2000, seed=1), n_bootstrap=5)


def test_a_good_bridge_passes_every_gate(good_bridge):
    audit = audit_bridge(good_bridge)
    assert audit.verdict == "PASS", audit
    assert {g.name for g in audit.gates} == set(BRIDGE_GATES)
    json.dumps(audit.to_dict(), allow_nan=False)


def test_an_operator_of_the_wrong_sign_fails():
    x, o = wells(2.0, 2000)
    audit = audit_bridge(bridged(x, [-v for v in o]))
    assert status(audit, "inverted bracket") == "FAIL"


def test_a_gap_too_wide_fails_the_bridge():
    generator = np.random.default_rng(1)
    r = [generator.gamma(2.0, s, 150) for s in (20000.0, 1.0)]
    audit = audit_bridge(bridged([np.log(v)[:, None] for v in r], r))
    assert status(audit, "stated error [kT]") == "FAIL"


def test_states_that_are_no_tilts_fail_the_bridge():
    x, o = wells(1.5, 3000)
    o[1] = 0.5 * (o[1] - o[1].mean()) + o[1].mean()
    assert status(audit_bridge(bridged(x, o)), "chi2 of the states") == "FAIL"


def test_a_run_that_drifts_fails_the_bridge():
    x, o = wells(1.0, 1000)
    fold = (np.arange(1000) // 100) % 5
    o = [v + np.where(fold == 0, 8.0, 0.0) for v in o]
    audit = audit_bridge(bridged(x, o))
    assert audit.verdict == "FAIL"


def test_too_few_frames_fail_the_bridge():
    audit = audit_bridge(bridged(*wells(1.0, 60), inefficiency=(3.0, 3.0)))
    assert status(audit, "independent frames per state") == "WARN"


@pytest.mark.parametrize(
    ("gate", "change"),
    [
        ("overlap of the noised ends", {"overlap": 0.0}),
        ("overlap above one", {"overlap": 1.5}),
        ("spread over models [kT]", {"d_models": 9.0}),
        ("spread over folds [kT]", {"d_folds": 9.0}),
        ("spread over closures [kT]", {"closures": {"density": 0.0, "tweedie": 0.0, "gamma": 99.0}}),
        ("normal score of O, |mean square - 1|", {"calibration": (1.0, 3.0)}),
        ("independent frames in the overlap", {"overlap": 0.001}),
        ("hysteresis [kT]", {"exp_forward": 50.0, "exp_reverse": -50.0}),
        ("normalisation [kT]", {"normalisation": -20.0, "d_normalisation": 0.1}),
    ],
)
def test_a_level_that_contradicts_itself_fails(good_bridge, gate, change):
    levels = list(good_bridge.levels)
    levels[good_bridge.chosen] = replace(good_bridge.level, **change)
    assert status(audit_bridge(replace(good_bridge, levels=tuple(levels))), gate) == "FAIL"


def test_a_curve_without_a_plateau_fails(good_bridge):
    assert status(audit_bridge(replace(good_bridge, plateau=4.0)), "noise plateau [kT]") == "FAIL"
    far = replace(good_bridge, delta_f=good_bridge.delta_f + 5.0)
    assert status(audit_bridge(far), "bridge against density of O [SE]") == "FAIL"
