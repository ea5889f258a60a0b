"""The demonstration in small: everything runs, is written, resumes, and refuses another's folder."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from openmm_diffforce import demo, project, training
from openmm_diffforce.config import DemoSettings
from openmm_diffforce.errors import ResumeError
from openmm_diffforce.estimate import Estimate


@pytest.mark.slow
def test_demo_runs_resumes_and_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Coarse splines: the fit of 100 frames takes a second, and its quality is not the matter here.
    monkeypatch.setattr(training, "N_COEFS", dict.fromkeys(training.N_COEFS, 6))
    settings = DemoSettings.quick(n_frames=100, n_test=50, n_equil=500, seed=5)
    record = json.loads(demo.run_demo(tmp_path, settings=settings, progress=False).read_text())
    for name in ("learned", "classical"):
        estimates = record["windows"][name]["estimate"]["estimates"]
        assert all(np.isfinite(e["kT"]["value"]) for e in estimates.values())
    assert record["fit"]["levels"][0]["operator_r2"] > 0.95
    assert {c["status"] for c in record["checks"]} <= {"PASS", "WARN", "FAIL"}
    assert sum(c["name"].startswith("noisy operator bridge") for c in record["checks"]) == 1
    page = (tmp_path / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert len(page) > 10_000
    assert (tmp_path / "end_0.dcd").stat().st_size > 0

    again = json.loads(demo.run_demo(tmp_path, settings=settings, progress=False).read_text())
    assert again["windows"]["learned"]["n_steps"] == 0
    assert again["artefact"]["sha256"] == record["artefact"]["sha256"]
    assert again["headline"]["value"] == record["headline"]["value"]

    with pytest.raises(ResumeError, match="other settings"):
        demo.run_demo(tmp_path, settings=settings.model_copy(update={"seed": 6}), progress=False)


def test_r_squared_of_the_mean_is_zero() -> None:
    truth = np.array([1.0, 2.0, 4.0])
    assert project.r_squared(np.full(3, truth.mean()), truth) == pytest.approx(0.0)
    assert project.r_squared(truth, truth) == 1.0


def gaussian_case(n: int) -> tuple[Any, list[np.ndarray], Estimate]:
    """Two atoms at a distance that is Gaussian in both states, with the least of what a case has."""
    rng = np.random.default_rng(0)
    frames = []
    for k in (0, 1):
        x = np.zeros((n, 2, 3))
        x[:, 1, 0] = rng.normal(5.0 + 1.5 * k, 1.0, n)
        frames.append(x)
    atoms = [SimpleNamespace(index=k, name=f"X{k}") for k in (0, 1)]
    case = SimpleNamespace(
        pair=SimpleNamespace(operator_values=lambda x: 1.125 - 1.5 * (x[:, 1, 0] - 5.0)),
        perturbed=(1,), positions=frames[0][0], topology=SimpleNamespace(atoms=lambda: atoms),
    )  # fmt: skip
    return case, frames, Estimate("MBAR", 0.0, 0.1, 300.0)


def test_the_bridge_of_the_ends_is_a_section_and_two_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "BRIDGE_FRAMES", 250)
    two_levels = partial(demo.noisy_operator_bridge, sigmas=(0.5, 1.0))
    monkeypatch.setattr(demo, "noisy_operator_bridge", two_levels)
    case, frames, reference = gaussian_case(1000)
    seen: list[tuple[int, int]] = []
    bridge, checks = demo.bridge_ends(case, frames, reference, 3, lambda a, b: seen.append((a, b)))
    assert bridge is not None
    assert bridge["n_frames"] == [250, 250]
    assert bridge["noised"] == ["X1"]
    assert abs(bridge["delta_f"]) < 4 * bridge["d_delta_f"]
    assert [c["status"] for c in checks][1] == "PASS"
    assert checks[1]["value"] < 3
    assert seen[-1] == (2, 2)
    far = Estimate("MBAR", 5.0, 0.1, 300.0)
    assert demo.bridge_ends(case, frames, far, 3)[1][1]["status"] == "FAIL"


def test_too_few_frames_for_a_bridge_are_a_warning() -> None:
    case, frames, reference = gaussian_case(15)
    bridge, (check,) = demo.bridge_ends(case, frames, reference, 3)
    assert bridge is None
    assert (check["status"], check["value"]) == ("WARN", "not possible")
    assert "independent frames" in check["advice"]
