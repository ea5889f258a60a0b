"""The demonstration in small: everything runs, is written, resumes, and refuses another's folder."""

import json
from pathlib import Path

import numpy as np
import pytest

from openmm_diffforce import demo, project, training
from openmm_diffforce.config import DemoSettings
from openmm_diffforce.errors import ResumeError


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
