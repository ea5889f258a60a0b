"""Noise schedules: limits, consistency of the SDE coefficients, round trips, bad input."""

import numpy as np
import pytest
import torch
from openmm import unit

from openmm_diffforce.errors import InputError, UnitsError
from openmm_diffforce.schedule import VESchedule, VPSchedule, alpha_sigma, schedule_from_json

SCHEDULES = [VESchedule(), VESchedule(0.2), VPSchedule(), VPSchedule(0.3, 5.0, 0.05)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_t_zero_is_exactly_clean(schedule):
    assert float(schedule.alpha(0.0)) == 1.0
    assert float(schedule.sigma(0.0)) == 0.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_drift_and_diffusion_belong_to_alpha_and_sigma(schedule):
    t = torch.linspace(0.05, 1.0, 30, dtype=torch.float64)
    h = 1e-6
    upper, lower = (t + h).clamp(max=1.0), t - h
    width = upper - lower
    middle = 0.5 * (upper + lower)
    d_log_alpha = (schedule.alpha(upper).log() - schedule.alpha(lower).log()) / width
    d_variance = (schedule.sigma(upper) ** 2 - schedule.sigma(lower) ** 2) / width
    drift = schedule.drift(middle)
    g2 = d_variance - 2 * drift * schedule.sigma(middle) ** 2
    torch.testing.assert_close(d_log_alpha, drift, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(g2, schedule.diffusion(middle) ** 2, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_t_of_sigma_inverts_noise_to_signal(schedule):
    for t in (0.0, 1e-3, 0.1, 0.5, 1.0):
        assert schedule.t_of_sigma(float(schedule.noise_to_signal(t))) == pytest.approx(t, abs=1e-9)


def test_sigma_may_be_a_quantity():
    assert VESchedule(0.05).t_of_sigma(0.5 * unit.angstrom) == pytest.approx(1.0)
    with pytest.raises(UnitsError, match="sigma"):
        VESchedule().t_of_sigma(1.0 * unit.kelvin)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_json_round_trip(schedule):
    assert schedule_from_json(schedule.to_json()) == schedule


def test_compiles_in_torchscript():
    script = torch.jit.script(alpha_sigma)
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    for schedule in SCHEDULES:
        for got, want in zip(
            script(*schedule.script_args(), t),
            (schedule.alpha(t), schedule.sigma(t)),
            strict=True,
        ):
            assert torch.equal(got, want)


@pytest.mark.parametrize("t", [-0.1, 1.1, float("nan")])
def test_times_outside_are_refused(t):
    with pytest.raises(InputError, match="diffusion times"):
        VESchedule().sigma(t)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), "a"])
def test_bad_parameters_are_refused(value):
    with pytest.raises(InputError, match="sigma_max"):
        VESchedule(value)


@pytest.mark.parametrize("text", ["", "{}", '{"schedule": "Other"}', '{"schedule": "VESchedule", "x": 1}'])
def test_foreign_json_is_refused(text):
    with pytest.raises(InputError, match="noise schedule"):
        schedule_from_json(text)


def test_sigma_beyond_the_schedule_is_refused():
    with pytest.raises(InputError, match="sigma"):
        VESchedule(0.05).t_of_sigma(0.06)


def test_fields_are_frozen():
    with pytest.raises(AttributeError):
        VESchedule().sigma_max = 1.0
    assert np.isclose(VESchedule().sigma_max, 0.05)
