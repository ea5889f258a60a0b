import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np
import openmm as mm
import pandas as pd
import pytest

from openmm_diffforce.alanine import alanine_case
from openmm_diffforce.alchemy import lambda_states
from openmm_diffforce.errors import ConvergenceError, IncompatibleSystemError, InputError, ResumeError
from openmm_diffforce.force import DiffusionForce
from openmm_diffforce.systems import clone_system, potential_energies
from openmm_diffforce.windows import run_windows

from . import tiny
from .test_systems import spring_system, topology_of

SMALL = {"n_frames": 6, "interval": 20, "n_equil": 50, "progress": False, "temperature": 300.0}
START = np.array([[0, 0, 0], [0.15, 0, 0]])


def two_springs() -> mm.System:
    """U = 1/2 (k0 + (k1 - k0) lambda) (r - 0.15)^2."""
    system = spring_system(0.0)
    force = mm.CustomBondForce("0.5*(1000 + 3000*lambda)*(r-0.15)^2")
    force.addGlobalParameter("lambda", 0.0)
    force.addEnergyParameterDerivative("lambda")
    force.addBond(0, 1)
    system.addForce(force)
    return system


def run(folder: Path, system: mm.System | None = None, **kwargs: Any) -> Any:
    args: dict[str, Any] = {**SMALL, "states": lambda_states(3), "positions": START, **kwargs}
    return run_windows(
        system or two_springs(), kwargs.pop("topology", topology_of(2)),
        args.pop("positions"), args.pop("states"), out_dir=folder,
        **{k: v for k, v in args.items() if k != "topology"},
    )  # fmt: skip


def test_tables_are_what_alchemlyb_reads(tmp_path: Path) -> None:
    from alchemlyb.estimators import BAR, MBAR, TI
    from alchemlyb.parsing.parquet import extract_dHdl, extract_u_nk

    result = run(tmp_path, n_frames=200)
    u_nk = extract_u_nk(str(tmp_path / "u_nk.parquet"), T=300.0)
    dhdl = extract_dHdl(str(tmp_path / "dHdl.parquet"), T=300.0)
    pd.testing.assert_frame_equal(u_nk, result.u_nk)
    pd.testing.assert_frame_equal(dhdl, result.dHdl)
    assert u_nk.attrs == {"temperature": 300.0, "energy_unit": "kT"}
    assert list(u_nk.columns) == [0.0, 0.5, 1.0]
    assert u_nk.index.names == ["time", "lambdas"]
    for estimator, table in ((MBAR(), u_nk), (BAR(), u_nk), (TI(), dhdl)):
        found = estimator.fit(table).delta_f_.iloc[0, -1]
        assert found == pytest.approx(0.5 * np.log(4.0), abs=0.6)
    # A table by hand: u = beta k/2 (r - r0)^2 from the trajectory itself.
    x = md.load(str(result.trajectories[1]), top=str(result.topology)).xyz
    r = np.linalg.norm(x[:, 1] - x[:, 0], axis=1)
    rows = u_nk.xs(0.5, level="lambdas")
    for lam in (0.0, 0.5, 1.0):
        expected = 0.5 * (1000 + 3000 * lam) * (r - 0.15) ** 2 / 2.494339
        assert np.allclose(rows[lam], expected, atol=2e-3)
    slope = 1500 * (r - 0.15) ** 2 / 2.494339
    assert np.allclose(dhdl.xs(0.5, level="lambdas")["dHdl"], slope, atol=2e-3)
    assert rows.index[0] == pytest.approx(0.02)
    assert json.loads((tmp_path / "record.json").read_text())["settings"]["n_frames"] == 200


@pytest.mark.parametrize("suffix", ["dcd", "xtc", None])
def test_trajectory_formats(tmp_path: Path, suffix: str | None) -> None:
    result = run(tmp_path, trajectory=suffix)
    assert len(result.trajectories) == (3 if suffix else 0)
    for path in result.trajectories:
        assert md.load(str(path), top=str(result.topology)).n_frames == 6


def test_classical_linear_system_windows(tmp_path: Path) -> None:
    case = alanine_case("F1", restrain_phi=True)
    mixed = case.pair.linear_system()
    result = run(tmp_path, mixed, topology=case.topology, positions=case.positions)
    # For a linear path dH/dlambda is u(1) - u(0) of the same frame.
    u = result.u_nk.to_numpy()
    assert np.allclose(result.dHdl["dHdl"], u[:, 2] - u[:, 0], rtol=1e-9, atol=1e-8)
    x = md.load(str(result.trajectories[0]), top=str(result.topology)).xyz
    u_0 = potential_energies(case.system_0, x) / case.pair.kT
    assert np.allclose(u_0, u[:6, 0], atol=1e-2)


def test_several_parameters(tmp_path: Path) -> None:
    from alchemlyb.estimators import MBAR, TI
    from alchemlyb.parsing.parquet import extract_u_nk

    system = spring_system(1000.0)
    force = mm.CustomBondForce("500*a*(r-0.15)^2 + 20*b*r")
    for name in ("a", "b"):
        force.addGlobalParameter(name, 0.0)
        force.addEnergyParameterDerivative(name)
    force.addBond(0, 1)
    system.addForce(force)
    states = [{"a": 0.0, "b": 0.0}, {"b": 0.0, "a": 1.0}, {"a": 1.0, "b": 1.0}]
    result = run(tmp_path, system, states=states, n_frames=50)
    u_nk = extract_u_nk(str(tmp_path / "u_nk.parquet"), T=300.0)
    assert list(u_nk.columns) == [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)]
    assert MBAR().fit(u_nk).delta_f_.shape == (3, 3)
    assert TI().fit(result.dHdl).delta_f_.shape == (3, 3)


def test_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first = run(tmp_path)
    assert first.n_steps == 3 * (50 + 6 * 20)
    again = run(tmp_path)
    assert again.n_steps == 0
    pd.testing.assert_frame_equal(first.u_nk, again.u_nk)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"n_frames": 7}, "n_frames"),
        ({"temperature": 301.0}, "temperature"),
        ({"seed": 1}, "seed"),
        ({"states": lambda_states(4)}, "states"),
        ({"system": spring_system()}, "system_sha256"),
        ({"positions": START + 0.01}, "positions"),
        ({"trajectory": "xtc"}, "trajectory"),
    ],
)
def test_altered_settings_are_refused(tmp_path: Path, change: dict, word: str) -> None:
    run(tmp_path)
    with pytest.raises(ResumeError, match=word):
        run(tmp_path, **change)


def test_altered_or_foreign_files_are_refused(tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / "settings.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 5'))
    with pytest.raises(ResumeError, match="unaltered"):
        run(tmp_path, seed=5)
    path.unlink()
    with pytest.raises(ResumeError, match="beside the windows"):
        run(tmp_path)
    path.write_text("{")
    with pytest.raises(ResumeError, match="settings of a run"):
        run(tmp_path)


def test_a_run_that_never_began_may_be_begun_otherwise(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"parameter 'mu': expected one of .* \(lambda\)"):
        run(tmp_path, states=lambda_states(2, parameter="mu"))
    assert run(tmp_path).n_steps > 0
    with pytest.raises(ResumeError, match="seed"):
        run(tmp_path, seed=1)


def test_damaged_window_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / "window_001.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ResumeError, match="damaged"):
        run(tmp_path)
    path.unlink()
    assert run(tmp_path).n_steps == 50 + 6 * 20


class Stop(Exception):
    pass


def stop_after(n: int) -> Any:
    def progress(done: int, total: int) -> None:
        if done >= n:
            raise Stop

    return progress


def test_resumed_run_is_bit_by_bit_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", checkpoint_seconds=1e-9)
    with pytest.raises(Stop):
        run(tmp_path / "cut", checkpoint_seconds=1e-9, progress=stop_after(9))
    assert list((tmp_path / "cut" / "window_001.parts").iterdir())
    resumed = run(tmp_path / "cut")
    assert 0 < resumed.n_steps < whole.n_steps
    pd.testing.assert_frame_equal(whole.u_nk, resumed.u_nk, check_exact=True)
    pd.testing.assert_frame_equal(whole.dHdl, resumed.dHdl, check_exact=True)
    for a, b in zip(whole.trajectories, resumed.trajectories, strict=True):
        assert np.array_equal(md.load(str(a), top=str(whole.topology)).xyz,
                              md.load(str(b), top=str(whole.topology)).xyz)  # fmt: skip
    assert not list((tmp_path / "cut").glob("*.parts"))
    assert not [p for p in (tmp_path / "cut").rglob(".*") if p.name != ".lock"]


def test_ctrl_c_loses_nothing(tmp_path: Path) -> None:
    def press(done: int, total: int) -> None:
        if done == 9:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="same call resumes"):
        run(tmp_path, progress=press, checkpoint_seconds=1e9)
    assert run(tmp_path).n_steps == (18 - 10) * 20 + 50  # the frame under way was finished


def test_missing_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(tmp_path, checkpoint_seconds=1e-9, progress=stop_after(4))
    parts = sorted((tmp_path / "window_000.parts").glob("*.npz"))
    parts[-1].write_bytes(b"PK not a zip")
    with pytest.raises(ResumeError, match="damaged"):
        run(tmp_path)
    parts[-1].unlink()
    assert len(run(tmp_path).u_nk) == 18


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.test_windows import run
run(Path(sys.argv[1]), n_frames=400, interval=2000, checkpoint_seconds=0.05)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_killed_process_leaves_a_resumable_run(tmp_path: Path, number: signal.Signals) -> None:
    root = str(Path(__file__).parents[1])
    script = SCRIPT.format(root=root)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    parts = tmp_path / "run" / "window_000.parts"
    deadline = time.monotonic() + 60
    while len(list(parts.glob("part_*.npz"))) < 3:
        assert time.monotonic() < deadline, "the run never saved a part"
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    if number == signal.SIGINT:
        assert b"same call resumes" in err
    saved = list((tmp_path / "run").glob("window_*"))
    assert saved
    whole = run(tmp_path / "whole", n_frames=400, interval=2000)
    resumed = run(tmp_path / "run", n_frames=400, interval=2000)
    assert resumed.n_steps < whole.n_steps
    pd.testing.assert_frame_equal(whole.u_nk, resumed.u_nk, check_exact=True)


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    import fcntl

    run(tmp_path)
    with open(tmp_path / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ResumeError, match="locked"):
            run(tmp_path)


def test_blow_up_keeps_what_was_computed(tmp_path: Path) -> None:
    system = two_springs()
    stiff = mm.CustomBondForce("1e12*max(0, lambda-0.9)*(r-0.15)^4")
    stiff.addGlobalParameter("lambda", 0.0)
    stiff.addEnergyParameterDerivative("lambda")
    stiff.addBond(0, 1)
    system.addForce(stiff)
    with pytest.raises(ConvergenceError, match="unstable") as info:
        run(tmp_path, system, minimize=False, timestep=0.02, n_equil=5000)
    assert any("kept" in n for n in info.value.__notes__)
    assert (tmp_path / "window_000.npz").exists()


def test_wrong_derivative_is_found(tmp_path: Path) -> None:
    system = two_springs()
    silent = mm.CustomBondForce("300*lambda*r")  # no addEnergyParameterDerivative
    silent.addGlobalParameter("lambda", 0.0)
    silent.addBond(0, 1)
    system.addForce(silent)
    with pytest.raises(InputError, match="finite difference"):
        run(tmp_path / "a", system)
    assert run(tmp_path / "b", system, dhdl=False).dHdl is None


def test_no_derivative_is_said(tmp_path: Path) -> None:
    system = spring_system()
    force = mm.CustomBondForce("lambda*r")
    force.addGlobalParameter("lambda", 0.0)
    force.addBond(0, 1)
    system.addForce(force)
    with pytest.raises(InputError, match="addEnergyParameterDerivative"):
        run(tmp_path, system)


class PythonLearned:
    """A learned force as PythonForce: OpenMM knows no derivative of it."""

    backend = "python"

    def __init__(self, k: float = 300.0) -> None:
        self.k = k
        self.force = mm.PythonForce(self.evaluate, {"diffforce_lambda": 0.0})

    def evaluate(self, state: mm.State) -> tuple[float, np.ndarray]:
        lam = state.getParameters()["diffforce_lambda"]
        x = state.getPositions(asNumpy=True)._value
        d = x[1] - x[0]
        f = -self.k * lam * d
        return 0.5 * self.k * lam * float(d @ d), np.array([-f, f])

    def parameter(self, name: str) -> str:
        return f"diffforce_{name}"

    def energy_derivative(self, context: mm.Context, parameter: str = "lambda") -> float:
        x = context.getState(positions=True).getPositions(asNumpy=True)._value
        d = x[1] - x[0]
        return 0.5 * self.k * float(d @ d)

    def manifest(self) -> dict[str, Any]:
        return {"artefact": "/somewhere", "sha256": f"k={self.k}"}


def test_learned_force_with_its_own_derivative(tmp_path: Path) -> None:
    def build(k: float) -> tuple[mm.System, PythonLearned]:
        system, learned = spring_system(), PythonLearned(k)
        system.addForce(learned.force)
        return system, learned

    states = lambda_states(3, parameter="diffforce_lambda")
    system, learned = build(300.0)
    result = run(tmp_path, system, states=states, learned=learned)
    u = result.u_nk.to_numpy()
    assert np.allclose(result.dHdl["dHdl"], u[:, 2] - u[:, 0], atol=1e-8)
    with pytest.raises(InputError, match="learned"):
        run(tmp_path, system, states=states)
    system, learned = build(301.0)
    with pytest.raises(ResumeError, match="system_sha256"):
        run(tmp_path, system, states=states, learned=learned)


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"positions": np.full((2, 3), np.nan)}, "positions"),
        ({"positions": np.zeros((3, 3))}, "positions"),
        ({"positions": np.zeros((2, 2, 3))}, "one per state"),
        ({"states": []}, "states"),
        ({"states": [{"lambda": 0.0}, {"mu": 1.0}]}, "states"),
        ({"states": lambda_states(2, parameter="mu")}, "mu"),
        ({"n_frames": 0}, "n_frames"),
        ({"interval": 0}, "interval"),
        ({"n_equil": -1}, "n_equil"),
        ({"timestep": -0.001}, "timestep"),
        ({"temperature": 0.0}, "temperature"),
        ({"trajectory": "gro"}, "trajectory"),
        ({"platform": "Abacus"}, "platform"),
        ({"seed": -3}, "seed"),
        ({"checkpoint_seconds": 0.0}, "checkpoint"),
        ({"topology": topology_of(3)}, "topology"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, bad: dict, word: str) -> None:
    with pytest.raises(InputError, match=word):
        run(tmp_path, **bad)


def test_out_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="out_dir"):
        run(tmp_path / "file")


def test_a_learned_force_is_held_against_the_run(tmp_path: Path) -> None:
    """Constraints under a learned base action are found before the first step of a run."""
    case = tiny.case()
    force = DiffusionForce(tiny.export(tmp_path / "m"), topology=case.topology, mode="add", backend="python")
    system = clone_system(case.system_0)
    system.addConstraint(0, 1, 0.109)
    system.addForce(force)
    with pytest.raises(IncompatibleSystemError, match="constraints=None"):
        run_windows(
            system, case.topology, case.positions, lambda_states(2, parameter=force.parameter("lambda")),
            temperature=300.0, out_dir=tmp_path / "run", n_frames=2, interval=2, n_equil=2, learned=force,
            progress=False,
        )  # fmt: skip
    assert not list((tmp_path / "run").glob("window_*.npz"))
