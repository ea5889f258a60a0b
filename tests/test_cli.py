"""The command line: what it prints, what it refuses, and how."""

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

import openmm_diffforce
from openmm_diffforce import cli
from openmm_diffforce.artefact import export_artefact
from openmm_diffforce.errors import InputError, MissingDependencyError
from openmm_diffforce.models.action import ActionModel
from openmm_diffforce.models.graph import MolecularGraph
from openmm_diffforce.record import write_json
from openmm_diffforce.schedule import VESchedule

from .test_report import a_record

WINDOWS = "system: {alanine: F1}\nn_frames: 30\nn_equil: 100\ninterval: 20\nstates: {n: 2}\nout_dir: run\n"

COMMANDS = tuple(get_command(cli.app).commands)


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


class Springs(ActionModel):
    """S = k |x - mean|^2 (1 + lam)/2."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k", torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x: torch.Tensor, t: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(1, keepdim=True)
        return 0.5 * self.k * (x * x).sum((1, 2)) * (1 + lam)

    @torch.jit.export
    def fields(
        self, x: torch.Tensor, t: torch.Tensor, lam: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = x - x.mean(1, keepdim=True)
        half = 0.5 * self.k * (x * x).sum((1, 2))
        return half * (1 + lam), self.k * x * (1 + lam)[:, None, None], half


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    path = tmp_path / "water.diffforce"
    graph = MolecularGraph(("O", "H", "H"), ((0, 1), (0, 2)), ("O1", "Ha", "Hb"))
    export_artefact(Springs(), path, graph=graph, schedule=VESchedule(0.03), temperature=310.0)
    return path


def a_run(folder: Path, *, distance: float = 1.0) -> Path:
    """u_nk of three harmonic states that mix linearly, the ends ``distance`` apart."""
    generator = np.random.default_rng(0)
    lam = np.array([0.0, 0.5, 1.0])
    frames = []
    for state in lam:
        x = generator.normal(state * distance, 1.0, size=200)
        u = 0.5 * x[:, None] ** 2 + lam * (0.5 * distance**2 - distance * x[:, None])
        index = pd.MultiIndex.from_arrays([np.arange(200.0), np.full(200, state)], names=["time", "lambda"])
        frames.append(pd.DataFrame(u, index=index, columns=pd.Index(lam, name="lambda")))
    table = pd.concat(frames)
    table.attrs = {"temperature": 300.0, "energy_unit": "kT"}
    folder.mkdir(exist_ok=True)
    table.to_parquet(folder / "u_nk.parquet")
    return folder


def test_help_names_every_command_and_is_fast() -> None:
    start = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-m", "openmm_diffforce.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert time.monotonic() - start < 10  # importing torch alone takes longer on a busy machine
    for command in COMMANDS:
        assert f" {command} " in run.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_is_whole(command: str) -> None:
    """Every option and argument has its text, and none of it is taken for markup."""
    result = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "400"})
    assert result.exit_code == 0
    shown = " ".join(result.output.replace("\u2502", " ").split())
    parameters = [p for p in get_command(cli.app).commands[command].params if p.name != "help"]
    for parameter in parameters:
        text = parameter.help
        assert text, f"{command}: {parameter.name}"
        assert text in shown, f"{command}: {text}"
    assert {"quiet", "as_json"} <= {p.name for p in parameters}


def test_version() -> None:
    assert invoke("--version").output.strip() == f"openmm_diffforce {openmm_diffforce.__version__}"


def test_unknown_command_is_a_usage_error() -> None:
    assert invoke("nonsense").exit_code == 2


# -------------------------------------------------------------------------------------- doctor


def test_doctor_passes_here() -> None:
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    assert "libdiffforce.so loads and computes" in result.output
    assert "Reference" in result.output
    assert "The base installation works." in result.output


def test_doctor_reports_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise MissingDependencyError("ops: expected the compiled library, found none")

    monkeypatch.setattr("openmm_diffforce.ops.load", absent)
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "compiled library: build it: pip install ." in result.output
    assert "The base installation does not work." in result.output


def test_doctor_finds_a_library_that_computes_nonsense(monkeypatch: pytest.MonkeyPatch) -> None:
    def nonsense(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return torch.tensor([2.0]), torch.zeros(1, 2, 3), torch.zeros(1)

    monkeypatch.setattr("openmm_diffforce.ops.internal_action", nonsense)
    finding = next(f for f in cli.examine() if f.name == "compiled library")
    assert finding.status == "FAIL"
    assert finding.cure


def test_doctor_without_openmmtorch_works(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"torchforce": "No module named 'openmmtorch'; pip install x", "python": "ok"}
    monkeypatch.setattr("openmm_diffforce.force.available_backends", lambda: states)
    result = invoke("doctor")
    assert result.exit_code == 0
    assert "WARN" in result.output
    assert "openmm-diffforce[torchforce]" in result.output


# ------------------------------------------------------------------------------------- inspect


def test_inspect(artefact: Path) -> None:
    result = invoke("inspect", artefact)
    assert result.exit_code == 0
    for text in ("310 K", "VESchedule(sigma_max=0.03)", "0:O(O1) 1:H(Ha) 2:H(Hb)", "float64"):
        assert text in result.output
    metadata = json.loads(invoke("inspect", artefact, "--json").output)
    assert metadata["elements"] == ["O", "H", "H"]
    assert len(metadata["sha256"]) == 64


def test_inspect_refuses_an_altered_file(artefact: Path) -> None:
    content = bytearray(artefact.read_bytes())
    content[len(content) // 2] ^= 1
    artefact.write_bytes(content)
    result = invoke("inspect", artefact)
    assert result.exit_code == 1
    assert result.stderr.startswith("diffforce: artefact")
    assert result.stdout == ""
    assert "Traceback" not in result.output


def test_debug_shows_the_error(tmp_path: Path) -> None:
    result = invoke("--debug", "inspect", tmp_path / "none")
    assert isinstance(result.exception, openmm_diffforce.DiffForceError)


# --------------------------------------------------------------------------- windows, estimate


def test_windows_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(WINDOWS)
    result = invoke("windows", tmp_path / "w.yaml", "--no-progress")
    assert result.exit_code == 0, result.output
    assert "2 windows, 60 frames, 1400 steps" in result.output
    assert {"u_nk.parquet", "dHdl.parquet"} <= {p.name for p in (tmp_path / "run").iterdir()}
    again = invoke("windows", tmp_path / "w.yaml", "--no-progress")
    assert "60 frames, 0 steps" in again.output


@pytest.mark.parametrize(
    ("sampler", "n_steps"), [("exchange", 2 * (100 + 30 * 20)), ("expanded", 100 + (300 + 60) * 20)]
)
def test_other_samplers_from_yaml(tmp_path: Path, sampler: str, n_steps: int) -> None:
    text = WINDOWS + f"sampler: {sampler}\nn_adapt: 300\n"
    (tmp_path / "w.yaml").write_text(text)
    result = invoke("windows", tmp_path / "w.yaml", "--no-progress")
    assert result.exit_code == 0, result.output
    assert f"2 windows, 60 frames, {n_steps} steps" in result.output
    swaps = json.loads((tmp_path / "run" / "record.json").read_text())["swaps"]
    assert swaps["n_replicas"] == (2 if sampler == "exchange" else 1)
    estimate = invoke("estimate", tmp_path / "run", "--no-decorrelate", "--min-overlap", "0")
    assert "MBAR" in estimate.output
    (tmp_path / "w.yaml").write_text(text.replace(f"sampler: {sampler}", "sampler: independent"))
    other = invoke("windows", tmp_path / "w.yaml", "--no-progress")
    assert other.exit_code == 1
    assert "expected a run with the same settings" in other.stderr


def test_what_stands_in_brackets_is_text(artefact: Path, tmp_path: Path) -> None:
    renamed = artefact.rename(tmp_path / "[red]a.diffforce")
    assert "[red]a.diffforce" in "".join(invoke("inspect", renamed).output.split())
    assert "f [kT]" in invoke("estimate", a_run(tmp_path / "run")).output
    assert "mean O [kT]" in invoke("density", tmp_path / "run").output


def test_quiet_is_the_result_alone(artefact: Path, tmp_path: Path) -> None:
    assert invoke("inspect", artefact, "--quiet").output.strip() == file_hash_of_content(artefact)
    run = a_run(tmp_path / "run")
    assert "Windows" not in invoke("estimate", run, "--quiet").output
    quiet = invoke("density", run, "--quiet").output
    assert "Audit: " in quiet
    assert "States" not in quiet
    assert len(invoke("doctor", "--quiet").output.splitlines()) < 5


def file_hash_of_content(path: Path) -> str:
    return str(json.loads(invoke("inspect", path, "--json").output)["sha256"])


def test_warnings_are_sentences_without_lines_of_code(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(cli, "app", lambda: warnings.warn("mind the gap", stacklevel=2))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        cli.main()
    assert capsys.readouterr().err == "diffforce: mind the gap\n"


def test_ctrl_c_before_anything_ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("openmm_diffforce.report.report_from_record", interrupted)
    result = invoke("report", tmp_path)
    assert (result.exit_code, result.stderr) == (130, "diffforce: stopped\n")


def test_windows_refuses_an_unknown_key(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(WINDOWS + "timstep: 1\n")
    result = invoke("windows", tmp_path / "w.yaml")
    assert result.exit_code == 1
    assert "did you mean timestep?" in result.stderr


def test_windows_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**kwargs: Any) -> None:
        raise KeyboardInterrupt("stopped; the same call resumes the run")

    monkeypatch.setattr("openmm_diffforce.project.run_windows", interrupted)
    (tmp_path / "w.yaml").write_text(WINDOWS)
    result = invoke("windows", tmp_path / "w.yaml")
    assert result.exit_code == 130
    assert result.stderr == "diffforce: stopped; the same call resumes the run\n"


def test_estimate_table(tmp_path: Path) -> None:
    result = invoke("estimate", a_run(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    assert max(len(line) for line in result.output.splitlines()) <= 80
    assert "MBAR" in result.output
    assert "kcal/mol" in result.output


def test_estimate_json(tmp_path: Path) -> None:
    result = invoke("estimate", a_run(tmp_path / "run"), "--json")
    found = json.loads(result.stdout)["estimates"]["MBAR"]["kT"]
    assert abs(found["value"]) < 4 * found["error"]  # shifted harmonic wells: Delta f = 0


def test_estimate_refuses_poor_overlap(tmp_path: Path) -> None:
    result = invoke("estimate", a_run(tmp_path / "run", distance=30.0))
    assert result.exit_code == 1
    assert "overlap" in result.stderr
    assert result.stdout == ""


def test_density(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    result = invoke("density", run)
    assert result.exit_code == 0, result.output
    assert max(len(line) for line in result.output.splitlines()) <= 80
    assert "density of the operator" in result.output
    assert "Audit: PASS" in result.output
    assert "first half against second half" in result.output
    found = json.loads(invoke("density", run, "--ends", "--json").stdout)
    assert found["lams"] == [0.0, 1.0]
    assert found["verdict"] == "PASS"
    assert abs(found["delta_f"]) < 4 * found["d_delta_f"]  # shifted harmonic wells: Delta f = 0


def test_density_says_what_is_wrong(tmp_path: Path) -> None:
    result = invoke("density", a_run(tmp_path / "run", distance=30.0), "--ends")
    assert result.exit_code == 0, result.output
    assert "Audit: FAIL" in result.output
    assert "add a window" in " ".join(result.output.split())


def test_estimate_without_a_run(tmp_path: Path) -> None:
    result = invoke("estimate", tmp_path)
    assert result.exit_code == 1
    assert "u_nk.parquet" in result.stderr


# ---------------------------------------------------------------------------------- report, demo


def test_report(tmp_path: Path) -> None:
    write_json(tmp_path / "record.json", a_record())
    result = invoke("report", tmp_path / "record.json", "--out", tmp_path / "page.html")
    assert result.exit_code == 0
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    said = json.loads(invoke("report", tmp_path / "record.json", "--json").output)
    assert Path(said["report"]) == tmp_path / "report.html"


def fake_demo(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def run_demo(out_dir: Path, *, settings: Any, progress: bool) -> Path:
        seen.update(settings=settings, progress=progress)
        out_dir.mkdir(exist_ok=True)
        write_json(out_dir / "record.json", a_record())
        return out_dir / "record.json"

    monkeypatch.setattr("openmm_diffforce.demo.run_demo", run_demo)
    return seen


def test_demo_prints_verdict_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fake_demo(monkeypatch)
    result = invoke("demo", "--out", tmp_path / "d", "--quick", "--seed", 5, "--no-progress")
    assert result.exit_code == 0, result.output
    assert seen["settings"].seed == 5
    assert seen["settings"].n_windows == 3
    assert seen["progress"] is False
    assert "12.110 ± 0.070 kT" in result.output
    assert "WARN 1 of 2 checks gave a warning." in result.output
    assert (tmp_path / "d" / "report.html").exists()


def test_demo_settings_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fake_demo(monkeypatch)
    (tmp_path / "d.yaml").write_text("n_frames: 77\n")
    assert invoke("demo", "--out", tmp_path / "d", "--config", tmp_path / "d.yaml").exit_code == 0
    assert seen["settings"].n_frames == 77
    both = invoke("demo", "--quick", "--config", tmp_path / "d.yaml")
    assert both.exit_code == 1
    assert "--config or --quick" in both.stderr


def test_demo_refuses_a_seed_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_demo(monkeypatch)
    result = invoke("demo", "--out", tmp_path / "d", "--seed", -1)
    assert result.exit_code == 1
    assert "--seed: seed: expected" in result.stderr
    assert not (tmp_path / "d").exists()


def test_errors_keep_their_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> None:
        error = InputError("expected this, found that")
        error.add_note("and this is kept")
        raise error

    monkeypatch.setattr("openmm_diffforce.report.report_from_record", failing)
    assert invoke("report", tmp_path).stderr == ("diffforce: expected this, found that\nand this is kept\n")
