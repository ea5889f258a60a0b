"""Windows on several processes: the same numbers, Ctrl-C, errors and deaths."""

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

from openmm_diffforce.errors import ConvergenceError, InputError, NotConservativeError
from openmm_diffforce.force import DiffusionForce
from openmm_diffforce.runs import check_inputs
from openmm_diffforce.systems import clone_system
from openmm_diffforce.windows import run_windows
from openmm_diffforce.workers import Recipe

from . import tiny
from .test_windows import START, PythonLearned, run, two_springs


def learned_system(folder: Path, backend: str = "python") -> tuple[mm.System, DiffusionForce]:
    path = folder / "tiny.diffforce"
    if not path.exists():
        tiny.export(path)
    system = clone_system(tiny.case().system_0)
    force = DiffusionForce(path, topology=tiny.case().topology, mode="operator", backend=backend)
    system.addForce(force)
    extra = mm.CustomExternalForce("0.5*x")  # a classical force after the learned one
    extra.addParticle(0)
    system.addForce(extra)
    return system, force


def test_two_workers_give_the_numbers_of_one_process(tmp_path: Path) -> None:
    one = run(tmp_path / "one", n_frames=20)
    progress: list[tuple[int, int]] = []
    two = run(
        tmp_path / "two", n_frames=20, n_workers=2, progress=lambda *a: progress.append(a)
    )  # fmt: skip
    assert one.n_steps == two.n_steps
    assert progress[-1] == (60, 60)
    pd.testing.assert_frame_equal(one.u_nk, two.u_nk, check_exact=True)
    pd.testing.assert_frame_equal(one.dHdl, two.dHdl, check_exact=True)
    for a, b in zip(one.trajectories, two.trajectories, strict=True):
        top = str(one.topology)
        assert np.array_equal(md.load(str(a), top=top).xyz, md.load(str(b), top=top).xyz)
    # The number of workers is no setting of the run: either finishes what the other began.
    assert run(tmp_path / "one", n_frames=20, n_workers=2).n_steps == 0


def test_a_learned_force_travels_as_its_manifest(tmp_path: Path) -> None:
    case = tiny.case()
    tables = []
    for n in (1, 2):
        system, force = learned_system(tmp_path)
        states = [{force.parameter("lambda"): v} for v in (0.0, 1.0)]
        tables.append(
            run_windows(
                system,
                case.topology,
                case.positions,
                states,
                temperature=300.0,
                n_frames=3,
                out_dir=tmp_path / f"n{n}",
                interval=5,
                n_equil=5,
                learned=force,
                n_workers=n,
                progress=False,
                trajectory=None,
            )
        )
    pd.testing.assert_frame_equal(tables[0].u_nk, tables[1].u_nk, check_exact=True)
    pd.testing.assert_frame_equal(tables[0].dHdl, tables[1].dHdl, check_exact=True)


@pytest.mark.torchforce
def test_recipe_keeps_order_groups_and_defaults(tmp_path: Path) -> None:
    case = tiny.case()
    system, force = learned_system(tmp_path, "torchforce")
    force.setForceGroup(11)
    force.setGlobalParameterDefaultValue(2, 0.5)  # scale
    inputs = check_inputs(
        system, case.topology, case.positions, [{force.parameter("lambda"): 0.5}], learned=force,
        temperature=300.0, n_equil=0, timestep=0.001, friction=1.0, platform=None, seed=0,
        minimize=False, trajectory=None, dhdl=True,
    )  # fmt: skip
    built = Recipe.of(inputs).build()
    names = [[f.getName() for f in s.getForces()] for s in (system, built.system)]
    assert names[0] == names[1]
    energies = []
    for s in (system, built.system):
        context = mm.Context(s, mm.VerletIntegrator(0.001), mm.Platform.getPlatformByName("Reference"))
        context.setPositions(tiny.frame())
        context.setParameter(force.parameter("lambda"), 1.0)
        assert context.getParameter(force.parameter("scale")) == 0.5
        energies.append([context.getState(energy=True, groups=g).getPotentialEnergy()._value
                         for g in (-1, {11})])  # fmt: skip
    assert energies[0] == energies[1]


def test_foreign_learned_force_is_refused(tmp_path: Path) -> None:
    system, learned = two_springs(), PythonLearned()
    system.addForce(learned.force)
    with pytest.raises(InputError, match="n_workers"):
        run(tmp_path, system, learned=learned, n_workers=2, states=[{"lambda": 0.0}, {"lambda": 1.0}])


def test_learned_force_without_energy_is_refused(tmp_path: Path) -> None:
    system, force = learned_system(tmp_path)
    force.artefact.metadata["conservative"] = False
    with pytest.raises(NotConservativeError, match="conservative = False"):
        run_windows(
            system, tiny.case().topology, tiny.case().positions, [{"diffforce_lambda": 0.0}],
            temperature=300.0, n_frames=2, out_dir=tmp_path / "run", learned=force,
        )  # fmt: skip


def test_an_error_in_one_worker_is_one_clear_error(tmp_path: Path) -> None:
    system = two_springs()
    stiff = mm.CustomBondForce("1e12*max(0, lambda-0.9)*(r-0.15)^4")
    stiff.addGlobalParameter("lambda", 0.0)
    stiff.addEnergyParameterDerivative("lambda")
    stiff.addBond(0, 1)
    system.addForce(stiff)
    with pytest.raises(ConvergenceError, match="unstable") as info:
        run(tmp_path, system, minimize=False, timestep=0.02, n_equil=5000, n_workers=2)
    assert any("kept" in n for n in info.value.__notes__)
    assert (tmp_path / "window_000.npz").exists()


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.test_windows import run
if __name__ == "__main__":
    run(Path(sys.argv[1]), n_frames=400, interval=2000, checkpoint_seconds=0.05, n_workers=2)
"""


def processes() -> dict[int, tuple[int, int]]:
    """Living process -> (its parent, CPU ticks)."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it ended meanwhile
            continue
        if fields[0] != "Z":
            found[int(path.parent.name)] = (int(fields[1]), int(fields[11]))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("victim", ["SIGINT", "parent", "worker"])
def test_killed_processes_leave_a_resumable_run(tmp_path: Path, victim: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(Path(__file__).parents[1])))
    with subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "run")], stderr=subprocess.PIPE,
        start_new_session=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:  # fmt: skip
        folder = tmp_path / "run"
        deadline = time.monotonic() + 120
        while len(list(folder.glob("window_*.parts/part_*.npz"))) < 3:
            assert time.monotonic() < deadline, "the run never saved parts"
            assert process.poll() is None, "the run ended too soon"
            time.sleep(0.02)
        children = {pid: ticks for pid, (parent, ticks) in processes().items() if parent == process.pid}
        if victim == "SIGINT":
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        elif victim == "parent":
            process.kill()
        else:
            os.kill(max(children, key=lambda pid: children[pid]), signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    if victim == "SIGINT":
        assert b"same call resumes" in err
    if victim == "worker":
        assert b"WorkerError" in err
    while children.keys() & processes().keys():
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.02)
    resumed = run(folder, n_frames=400, interval=2000)
    assert resumed.n_steps < 3 * (50 + 400 * 2000)
    if victim == "SIGINT":
        whole = run(tmp_path / "whole", n_frames=400, interval=2000)
        pd.testing.assert_frame_equal(whole.u_nk, resumed.u_nk, check_exact=True)


@pytest.mark.parametrize("n", [0, -1, 1.5])
def test_bad_number_of_workers(tmp_path: Path, n: Any) -> None:
    with pytest.raises(InputError, match="n_workers"):
        run(tmp_path, n_workers=n, positions=START)
