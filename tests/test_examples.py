"""The examples run, in small form, one on the output of the other."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import openmm_diffforce
from openmm_diffforce.bridge_run import run_bridge
from openmm_diffforce.config import (
    BridgeSettings,
    StatesSettings,
    WindowsSettings,
    load_settings,
    window_arguments,
)
from openmm_diffforce.docking.complex import pdb_text
from openmm_diffforce.exchange import ExchangeRun
from openmm_diffforce.project import run_sampler

from . import tiny
from .tiny_complex import tiny_complex

PACKAGE_HOME = str(Path(openmm_diffforce.__file__).resolve().parents[1])
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(folder: Path, name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PACKAGE_HOME},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_four_examples(tmp_path: Path) -> None:
    out = run(tmp_path, "01_learned_force.py", "--frames", "200", "--steps", "100")
    assert "dE/dlambda learned" in out
    # The learned derivative is the force field's, to a few percent, from 200 frames already.
    learned, exact = (float(out.split(word)[1].split()[0]) for word in ("learned", "exact"))
    assert learned == pytest.approx(exact, rel=0.1, abs=2.0)
    out = run(
        tmp_path, "02_lambda_windows.py", "example_01/alanine.diffforce", "--windows", "3", "--frames", "60"
    )
    assert "classical: 180 frames" in out
    out = run(tmp_path, "03_analyse.py", "example_02", "--min-samples", "1")
    assert out.count("alchemlyb's MBAR on all frames") == 2
    ours, theirs = (float(out.split(w)[1].split()[0]) for w in ("  MBAR ", "on all frames:"))
    assert theirs == pytest.approx(ours, abs=2.0)
    assert (tmp_path / "example_02" / "phi_psi.png").exists()
    out = run(
        tmp_path, "04_replace_interactions.py", "example_01/alanine.diffforce", "--waters", "6",
        "--steps", "400",
    )  # fmt: skip
    assert "taken out of 2 NonbondedForce: 174 terms" in out
    # The learned action follows the classical one through the run, from 200 frames already.
    classical, difference = (
        float(out.split(w)[1].split()[2]) for w in ("inside, classical:", "- classical:")
    )
    assert difference < classical


def test_a_model_of_your_own(tmp_path: Path) -> None:
    out = run(tmp_path, "05_own_model.py", "--steps", "20", "--frames", "10")
    assert "the module adds" in out
    assert "fail" not in out
    error = float(out.split("finite differences of the energy to ")[1].split()[0])
    assert error < 1e-6


@pytest.mark.slow
def test_replica_exchange_and_its_yaml_are_one_run(tmp_path: Path) -> None:
    small = ("--windows", "6", "--iterations", "30", "--steps", "50", "--equil", "500", "--min-samples", "1")
    out = run(tmp_path, "06_replica_exchange.py", *small)
    assert "180 frames in example_06" in out
    estimate, error = (float(v) for v in out.split("MBAR ")[1].split(" kT")[0].split(" +- "))
    # benchmarks/results/cases.md has 16.8 from longer runs.
    assert abs(estimate - 16.8) < 4 * math.hypot(error, 0.25)
    table = re.findall(r"^\d\.\d{4} - \d\.\d{4} +(\S+) +(\S+)$", out, re.MULTILINE)
    assert len(table) == 5
    assert all(0 < float(v) <= 1 for row in table for v in row)
    assert "round trips of each replica: [" in out

    # The same lengths in the file: it finds the run finished. Another setting would be refused.
    text = (EXAMPLES / "exchange.yaml").read_text()
    for long, short in (
        ("n: 8", "n: 6"),
        ("n_frames: 300 ", "n_frames: 30 "),
        ("interval: 250 ", "interval: 50 "),
        ("n_equil: 5000", "n_equil: 500"),
        ("../example_06", "example_06"),
    ):
        assert text.count(long) == 1
        text = text.replace(long, short)
    (tmp_path / "exchange.yaml").write_text(text)
    settings = load_settings(tmp_path / "exchange.yaml", WindowsSettings)
    again = run_sampler(settings, **window_arguments(settings), progress=False)
    assert isinstance(again, ExchangeRun)
    assert again.out_dir.resolve() == (tmp_path / "example_06").resolve()
    assert f"{again.swaps.round_trips.tolist()}" in out


def test_the_exchange_file_has_the_defaults_of_the_page() -> None:
    settings = load_settings(EXAMPLES / "exchange.yaml", WindowsSettings)
    assert isinstance(settings.states, StatesSettings)
    assert settings.sampler == "exchange"
    page = (EXAMPLES / "06_replica_exchange.py").read_text()
    defaults = {k: int(v) for k, v in re.findall(r'"--(\w+)", type=int, default=(\d+)', page)}
    assert defaults == {
        "windows": settings.states.n, "iterations": settings.n_frames, "steps": settings.interval,
        "equil": settings.n_equil,
    }  # fmt: skip


@pytest.mark.slow
def test_the_bridge_and_its_yaml_are_one_run(tmp_path: Path) -> None:
    out = run(tmp_path, "07_bridge.py", "--frames", "800")
    assert "noise on ALA2-CB, ALA2-HB1" in out
    assert "dcdplugin" not in out
    estimate, error = (float(v) for v in out.split("Delta f = ")[1].split(" kT")[0].split(" +- "))
    # benchmarks/results/cases.md has -12.1 from windows.
    assert abs(estimate + 12.1) < 4 * math.hypot(error, 0.1)
    page = (tmp_path / "example_07" / "bridge" / "report.html").read_text()
    assert "Bridge between the end states" in page
    # The file beside it gives the same number from the same frames.
    text = (EXAMPLES / "bridge.yaml").read_text()
    assert text.count("../example_07") == 3
    (tmp_path / "bridge.yaml").write_text(text.replace("../example_07", "example_07"))
    first = json.loads((tmp_path / "example_07" / "bridge" / "bridge.json").read_text())
    again = run_bridge(load_settings(tmp_path / "bridge.yaml", BridgeSettings))
    assert again.result.delta_f == first["bridge"]["delta_f"]


def test_docking(tmp_path: Path) -> None:
    for k in range(4):
        one = tiny_complex(k)
        text = pdb_text(one.receptor) + pdb_text(one.ligand) + "END\n"
        (tmp_path / f"tiny{k}.pdb").write_text(text)
    out = run(tmp_path, "10_docking.py", ".", "tiny3.pdb", "--decoys", "40", "--noised", "30")
    assert "fitted to 3 complexes" in out  # not to the one it scores
    assert "20 nm away: S = 0.00 kT" in out
    learned, count = (float(v) for v in re.findall(r": AUC (\S+),", out))
    assert learned > 0.8
    assert 0 <= count <= 1
    assert "Docking scores of tiny3" in (tmp_path / "example_10" / "report.html").read_text()


def test_the_bridge_file_is_valid() -> None:
    settings = load_settings(EXAMPLES / "bridge.yaml", BridgeSettings)
    assert settings.trajectories is not None
    assert settings.trajectories[0].name == "window_000.dcd"


def test_dynamics_on_a_learned_action(tmp_path: Path) -> None:
    """On the tests' own small model: its numbers mean little."""
    model = tiny.export(tmp_path / "tiny.diffforce", operator=False)
    out = run(tmp_path, "09_dynamics.py", str(model), "--steps", "400", "--starts", "8")
    assert out.count("time step ") == 4
    assert "time step 0.0005 ps: unstable" in out
    assert "400 frames; psi after" in out
    accepted = float(out.split("accepted ")[1].split()[0])
    assert 0.3 < accepted <= 1
    effective = float(out.split("reweighted to amber14: ")[1].split()[0])
    assert 1 <= effective <= 8
    assert (tmp_path / "example_09" / "phi_psi.png").exists()


def test_energies_out_of_scores(tmp_path: Path) -> None:
    out = run(tmp_path, "08_energy.py", "--frames", "200")
    worst = {line.split()[0]: float(line.split("worst error ")[1].split()[0]) for line in out.splitlines()
             if "worst error" in line}  # fmt: skip
    assert worst["flow"] < 0.001
    assert worst["stratonovich"] < 0.01
    assert max(worst.values()) < 1.0
    assert float(out.split("amber14 ")[-1].split()[0]) > 0.6
    table = (tmp_path / "example_08" / "energies.csv").read_text().splitlines()
    assert len(table) == 51


@pytest.mark.slow
def test_the_python_in_readme_runs(tmp_path: Path) -> None:
    text = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 1
    small = blocks[0]
    for long, short in (
        ("n_frames=1000", "n_frames=150"),
        ("n_frames=2000", "n_frames=60"),
        ("run.dHdl)", "run.dHdl, min_samples=1)"),
        ("seed=1,\n", "seed=1, n_draws=1,\n"),
    ):
        assert small.count(long) == 1
        small = small.replace(long, short)
    (tmp_path / "readme.py").write_text(small)
    out = run(tmp_path, str(tmp_path / "readme.py"))
    assert "MBAR: -1" in out
    assert "smallest overlap" in out


def test_the_yaml_file_is_valid() -> None:
    settings = load_settings(EXAMPLES / "windows.yaml", WindowsSettings)
    assert settings.force is not None
    assert settings.force.mode == "operator"
