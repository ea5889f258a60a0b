"""Every gate has an input that must fail it, and a good run passes them all."""

import json

import numpy as np
import pytest

from openmm_diffforce.audit import GATES, Audit, audit_density, judge
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


@pytest.mark.parametrize("name", GATES)
def test_every_gate_has_three_answers(name):
    gate = GATES[name]
    middle = 0.5 * (gate.good + gate.bad)
    beyond = gate.bad / 2 if gate.larger_is_better else 2 * gate.bad
    assert [judge(name, v).status for v in (gate.good, middle, beyond)] == ["PASS", "WARN", "FAIL"]
    assert judge(name, float("nan")).status == "FAIL"
    assert judge(name, beyond).advice.startswith(gate.advice)


def test_an_unknown_gate():
    with pytest.raises(InputError, match="expected one of stated error"):
        judge("luck", 1.0)
