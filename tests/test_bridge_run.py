"""The bridge as a job: every source of inputs in YAML, what is written, the verdict in words."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pytest
from openmm import app, unit

from openmm_diffforce import heads
from openmm_diffforce.audit import Audit, Gate
from openmm_diffforce.bridge_run import (
    audit_of,
    bridge_settings,
    read_bridge,
    read_inputs,
    read_leg,
    run_bridge,
    verdict_text,
)
from openmm_diffforce.config import BridgeSettings, check_settings
from openmm_diffforce.errors import InputError

from . import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that a user may bring of F1: Systems, PDB, trajectories, a run of windows."""
    out = tmp_path_factory.mktemp("inputs")
    case = tiny.case()
    for k, system in enumerate((case.system_0, case.system_1)):
        (out / f"{k}.xml").write_text(openmm.XmlSerializer.serialize(system))
    tiny.save_ends(out, 30)
    with open(out / "top.pdb", "w") as handle:
        app.PDBFile.writeFile(case.topology, case.positions * unit.nanometer, handle)
    tiny.save_run(out / "run", 2, 10)
    return out


SOURCES = {
    "Systems": "system: {end_states: [0.xml, 1.xml]}\ntopology: top.pdb\n"
    "trajectories: [0.dcd, 1.dcd]\ntemperature: 300\n",
    "alanine": "system: {alanine: F1}\ntrajectories: [0.dcd, 1.dcd]\ntemperature: 300\n",
    "segments": "system: {alanine: F1}\ntrajectories: [[0.dcd], 1.dcd]\n",
    "table": "u_nk: run/u_nk.parquet\ntopology: top.pdb\natoms: [10, 11]\n"
    "trajectories: [run/window_000.dcd, run/window_001.dcd]\n",
    "run": "run: run\natoms: [10, 11]\ntemperature: 300\n",
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source(folder: Path, source: str) -> None:
    (folder / f"{source}.yaml").write_text(SOURCES[source] + "skip: 2\n")
    seen: list[str] = []
    found = read_inputs(
        bridge_settings(folder / f"{source}.yaml"), progress=lambda what, done, total: seen.append(what)
    )
    assert found.atoms == (10, 11)
    assert found.temperature == 300.0
    assert set(seen) == {"reading frames"}
    for x, o in zip(found.frames, found.operators, strict=True):
        assert len(o) == len(x) == (8 if source in ("table", "run") else 28)
        np.testing.assert_allclose(o, tiny.case().pair.operator_values(x), atol=0.01)


def test_the_tables_temperature_is_the_runs(folder: Path) -> None:
    settings = BridgeSettings(run=folder / "run", temperature=310.0)
    with pytest.raises(InputError, match="expected 300 K, which u_nk says, found 310 K"):
        read_inputs(settings)


def test_heads_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "MAX_STEPS", 40)
    rng = np.random.default_rng(1)
    x = [rng.normal(2.0 * lam, 1.0, (100, 1)) for lam in (0, 1)]
    np.savez(tmp_path / "a.npz", x_0=x[0], x_1=x[1], o_0=2 - 2 * x[0][:, 0], o_1=2 - 2 * x[1][:, 0])
    (tmp_path / "a.yaml").write_text(
        "arrays: a.npz\nsigmas: [1.0]\nn_copies: 1\nn_bootstrap: 0\nclosure: heads\nsummary: heads\n"
    )
    monkeypatch.chdir(tmp_path)
    run = run_bridge(bridge_settings(tmp_path / "a.yaml"))
    assert (run.result.closure, run.result.summary) == ("heads", "heads")
    assert run.result.level.closures["tweedie"] == run.result.level.delta_f
    assert run.page.exists()


def test_one_system_is_no_pair(folder: Path) -> None:
    settings = BridgeSettings(
        system={"xml": folder / "0.xml"}, topology=folder / "top.pdb", trajectories=(folder / "0.dcd",) * 2,
        temperature=300.0,
    )  # fmt: skip
    with pytest.raises(InputError, match="expected two end states, found one System"):
        read_inputs(settings)


def test_windows_between_are_taken_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    lams = (0.0, 0.5, 1.0)
    arrays: dict[str, Any] = {"lams": lams, "temperature": 310.0}
    for k, lam in enumerate(lams):
        x = rng.normal(2.0 * lam, 1.0, (200, 1))
        arrays |= {f"x_{k}": x, f"o_{k}": 2.0 - 2.0 * x[:, 0]}
    np.savez(tmp_path / "a.npz", **arrays)
    run = run_bridge(BridgeSettings(
        arrays=tmp_path / "a.npz", sigmas=(0.7,), n_copies=1, n_bootstrap=0, out=tmp_path / "out"
    ))  # fmt: skip
    assert abs(run.result.delta_f) < 4 * run.result.d_delta_f
    record = read_bridge(tmp_path / "out")
    assert record.bridge is not None
    assert record.bridge.lams == list(lams)
    assert record.bridge.bar is not None
    assert abs(record.bridge.bar["delta_f"]) < 4 * record.bridge.bar["d_delta_f"]
    assert "1 window between them" in record.summary
    assert audit_of(record) == run.audit
    leg = read_leg(tmp_path / "out" / "bridge.json")
    assert (leg.estimate.delta_f, leg.estimate.temperature) == (run.result.delta_f, 310.0)
    # What is written is written whole: nothing else is left behind.
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"bridge.json", "report.html"}
    assert json.loads(run.record.read_text())["provenance"]["settings"]["sigmas"] == [0.7]


def test_a_spot_check_by_posterior_md(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    run = run_bridge(
        BridgeSettings(
            system={"end_states": [folder / "0.xml", folder / "1.xml"]}, topology=folder / "top.pdb",
            trajectories=(folder / "0.dcd", folder / "1.dcd"), temperature=300.0, sigmas=(0.01, 0.02),
            n_copies=1, n_bootstrap=0, spot=2, out=tmp_path,
        ),
        progress=lambda what, done, total: said.append(what),
    )  # fmt: skip
    assert list(dict.fromkeys(said)) == ["reading frames", "noise levels", "posterior MD"]
    assert run.spot is not None
    assert {g.name for g in run.audit.gates} >= {"posterior MD: Delta f [kT]"}
    record = read_bridge(tmp_path)
    assert record.bridge is not None
    assert record.bridge.posterior is not None
    assert record.bridge.posterior["n_forces"] == run.spot.n_forces > 0
    assert "posterior MD" in run.page.read_text()
    assert audit_of(record) == run.audit


def test_a_spot_check_needs_the_systems(folder: Path) -> None:
    with pytest.raises(InputError, match="spot: posterior MD needs both Systems"):
        check_settings(BridgeSettings, {"run": folder / "run", "spot": 20}, "here")


def test_the_verdict_in_words() -> None:
    gates = [Gate(n, 1.0, "<= 2", "PASS", "") for n in ("a", "b")]
    assert "All 2 checks passed" in verdict_text(Audit(tuple(gates)), withheld=False)
    gates.append(Gate("c", 3.0, "<= 2", "WARN", "sample longer"))
    warned = verdict_text(Audit(tuple(gates)), withheld=False)
    assert warned.startswith("1 of 3 checks gave a warning (c)")
    assert "Advice: sample longer." in warned
    gates += [Gate(n, 9.0, "<= 2", "FAIL", "add a window") for n in "defg"]
    failed = verdict_text(Audit(tuple(gates)), withheld=True)
    assert failed.startswith("4 of 7 checks failed (d; e; f; ...): do not use the number. It is not shown")
    assert "because you insisted" in verdict_text(Audit(tuple(gates)), withheld=False)
