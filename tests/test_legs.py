"""Two legs of a cycle: their difference, its error, the worse verdict."""

import pytest

from openmm_diffforce.errors import InputError
from openmm_diffforce.estimate import Estimate
from openmm_diffforce.legs import Leg, combine_legs


def leg(value: float, error: float, verdict: str = "PASS", kelvin: float = 300.0) -> Leg:
    return Leg("leg", Estimate("bridge", value, error, kelvin), verdict)  # type: ignore[arg-type]


def test_errors_add_in_squares() -> None:
    found = combine_legs(leg(-12.0, 0.3), leg(-10.0, 0.4))
    assert found.estimate.delta_f == -2.0
    assert found.estimate.d_delta_f == pytest.approx(0.5)
    assert found.verdict == "PASS"
    assert found.estimate.method == "bridge"


@pytest.mark.parametrize(
    ("a", "b", "worse"), [("PASS", "WARN", "WARN"), ("FAIL", "WARN", "FAIL"), ("WARN", "FAIL", "FAIL")]
)
def test_the_worse_verdict_is_that_of_both(a: str, b: str, worse: str) -> None:
    assert combine_legs(leg(0, 1, a), leg(0, 1, b)).verdict == worse


def test_legs_at_two_temperatures_are_refused() -> None:
    with pytest.raises(InputError, match="expected one temperature, found 300 K"):
        combine_legs(leg(0, 1), leg(0, 1, kelvin=310.0))
