"""One's own molecule from the command line: init, sample, fit, export, simulate, windows."""

import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import openmm
import pytest
import torch
import yaml
from openmm import app
from typer.testing import CliRunner

from openmm_diffforce import cli, training
from openmm_diffforce.alanine import alanine_case
from openmm_diffforce.alchemy import EndStatePair
from openmm_diffforce.analysis import load_trajectory
from openmm_diffforce.artefact import load_artefact
from openmm_diffforce.config import ProjectSettings, load_settings, read_system
from openmm_diffforce.errors import IncompatibleSystemError

SHORT = {
    "sample": {"n_frames": 300, "n_test": 20, "interval": 40, "n_equil": 1000},
    "fit": {"n_draws": 1},
    "simulate": {"n_frames": 3, "interval": 5, "n_equil": 10},
    "windows": {"n_frames": 12, "interval": 5, "n_equil": 10, "states": {"n": 2}},
    "backend": "python",
}


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def ok(*arguments: Any) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return str(result.output)


def shorten(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **SHORT, **changes}))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A PDB file and the two end states of F1 as System XML, as a user would have them."""
    folder = tmp_path_factory.mktemp("own")
    case = alanine_case("F1")
    with open(folder / "start.pdb", "w") as stream:
        app.PDBFile.writeFile(case.topology, case.positions * openmm.unit.nanometer, stream)
    for k, system in enumerate((case.system_0, case.system_1)):
        (folder / f"state_{k}.xml").write_text(openmm.XmlSerializer.serialize(system))
    return folder


@pytest.fixture(scope="module")
def project(files) -> Path:
    """A project that went through sample and fit."""
    path = files / "sub" / "project.yaml"
    path.parent.mkdir()
    ok("init", path, "--topology", files / "start.pdb", "--end-states", files / "state_0.xml",
       files / "state_1.xml", "--quiet")  # fmt: skip
    shorten(path)
    ok("sample", path, "--quiet")
    with mock.patch.dict(training.N_COEFS, dict.fromkeys(training.N_COEFS, 5)):
        quality = json.loads(ok("fit", path, "--json"))
    assert quality["operator_r2"] > 0.99
    assert quality["force_r2"] > 0.5
    return path


def test_sampled_both_ends(project):
    ends = project.parent / "runs" / "ends"
    x = [load_trajectory(ends / f"window_{k:03d}.dcd", ends / "topology.pdb").xyz for k in (0, 1)]
    assert x[0].shape == x[1].shape == (320, 22, 3)
    assert not np.allclose(x[0][0], x[1][0])
    loud = invoke("sample", project)
    assert "640/640 frames" in loud.stderr
    assert loud.stdout.splitlines()[1] == str(ends.resolve())
    again = json.loads(ok("sample", project, "--json"))
    assert again["n_steps"] == 0  # all was there already


def test_the_model_file_knows_its_sites_and_was_examined(project):
    artefact = load_artefact(project.parent / "runs" / "model.diffforce")
    assert tuple(artefact.metadata["training"]["sites"]) == alanine_case("F1").perturbed
    findings = {f["name"]: f["status"] for f in artefact.metadata["examination"]}
    assert findings["equipartition ratio"] == "ok"


@pytest.mark.parametrize("mode", ["operator", "replace"])
def test_simulate(project, mode, tmp_path):
    content = yaml.safe_load(project.read_text())
    content["simulate"]["mode"] = mode
    path = project.parent / f"{mode}.yaml"
    path.write_text(yaml.safe_dump(content))
    result = invoke("simulate", path, "--json")
    if mode == "replace":  # the same folder holds the other run by now
        assert result.exit_code == 1
        assert "expected a run with the same settings" in result.output
        return
    run = json.loads(result.output)
    assert run["n_frames"] == 3
    assert load_trajectory(run["trajectories"][0], run["topology"]).n_frames == 3


def test_windows_of_a_project(project):
    run = json.loads(ok("windows", project, "--json"))
    assert (run["n_states"], run["n_frames"]) == (2, 24)
    assert Path(run["out_dir"]) == (project.parent / "runs" / "windows").resolve()


def test_estimate_of_a_project_has_the_end_correction(project):
    options = ("--no-decorrelate", "--min-overlap", 0)
    ok("windows", project, "--quiet")
    found = json.loads(ok("estimate", project, "--json", *options))
    correction = found["end_correction"]
    assert correction["correction_0"] is None  # operator mode: at lambda = 0 it is the force field itself
    assert correction["correction_1"]["n_forward"] == 12
    assert correction["correction_1"]["n_reverse"] == 20  # the held-out frames
    mbar, corrected = found["estimates"]["MBAR"], correction["corrected"]
    shift = correction["correction_1"]["delta_f"]
    assert corrected["kT"]["value"] == pytest.approx(mbar["kT"]["value"] + shift)
    folder = project.parent / "runs" / "windows"
    text = ok("estimate", project, *options)
    assert "MBAR + end correction" in text
    assert "force field's end state 1" in text
    assert "end correction" not in ok("estimate", folder, *options)
    result = invoke("estimate", project, "--no-decorrelate", "--min-overlap", 50)
    assert result.exit_code == 1


def test_no_end_correction_without_both_ends_of_lambda(project, tmp_path):
    content = yaml.safe_load(project.read_text())
    content["windows"]["states"] = [{"diffforce_lambda": 0.0}, {"diffforce_lambda": 0.5}]
    content["out_dir"] = str(tmp_path)
    path = project.parent / "half.yaml"
    path.write_text(yaml.safe_dump(content))
    (tmp_path / "model.diffforce").write_bytes((project.parent / "runs" / "model.diffforce").read_bytes())
    result = invoke("estimate", path)
    assert "expected a finished run of windows, found none; run windows first" in result.output
    ok("windows", path, "--quiet")
    result = invoke("estimate", path, "--no-decorrelate", "--min-overlap", 0)
    assert result.exit_code == 1
    assert "expected windows from lambda 0 to 1, found [0.0] to [0.5]" in result.output


def test_simulate_as_diffusion(project, tmp_path):
    """The advice comes first, an unstable step is refused; the run goes on where it was."""
    content = yaml.safe_load(project.read_text())
    content["simulate"] |= {"mode": "replace", "integrator": "diffusion", "timestep": 2e-5, "friction": 50.0}
    path, folder = project.parent / "diffusion.yaml", project.parent / "runs" / "simulation"
    path.write_text(yaml.safe_dump(content))
    shutil.rmtree(folder, ignore_errors=True)
    result = invoke("simulate", path, "--json")
    assert result.exit_code == 0, result.output
    assert "time step 2e-05 ps:" in result.stderr
    run = json.loads(result.stdout)
    assert (run["n_frames"], run["n_steps"]) == (3, 25)
    assert json.loads(ok("simulate", path, "--json", "--quiet"))["n_steps"] == 0
    kept = json.loads((folder / "settings.json").read_text())["settings"]
    assert (kept["integrator"], kept["timestep"], kept["friction"]) == ("diffusion", 2e-5, 50.0)
    content["simulate"]["integrator"] = "langevin"
    path.write_text(yaml.safe_dump(content))
    assert "integrator" in invoke("simulate", path).output
    shutil.rmtree(folder)
    # With the project's own step (1 fs) and friction (1/ps) it would run away.
    content["simulate"] |= {"integrator": "diffusion", "timestep": None, "friction": None}
    path.write_text(yaml.safe_dump(content))
    result = invoke("simulate", path)
    assert result.exit_code == 1
    assert "unstable" in result.stderr
    assert "step_size: expected less than" in result.stderr
    assert not folder.exists()


def test_a_fit_is_done_once_and_never_from_frames_of_other_settings(project):
    path = project.parent / "runs" / "model.diffforce"
    before = path.read_bytes()
    ok("fit", project, "--quiet")
    assert path.read_bytes() == before  # windows belong to one file
    path.write_bytes(before[:-1])
    with mock.patch.dict(training.N_COEFS, dict.fromkeys(training.N_COEFS, 5)):
        ok("fit", project, "--quiet")
    load_artefact(path)
    path.write_bytes(before)
    content = yaml.safe_load(project.read_text())
    content["temperature"] = 310.0
    other = project.parent / "warm.yaml"
    other.write_text(yaml.safe_dump(content))
    result = invoke("fit", other)
    assert result.exit_code == 1
    assert "temperature (300.0 there, 310.0 now)" in result.output
    assert path.read_bytes() == before


def test_a_full_disk_is_one_sentence_and_loses_nothing(project, monkeypatch):
    model = project.parent / "runs" / "model.diffforce"
    before = model.read_bytes()
    original = os.fsync

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = invoke("fit", project)
    monkeypatch.setattr(os, "fsync", original)
    assert result.exit_code == 1
    assert result.stderr.startswith("diffforce: No space left on device; what was finished is kept")
    assert "While writing" in result.stderr
    assert "Traceback" not in result.output
    assert model.read_bytes() == before
    assert ok("fit", project, "--quiet")


@pytest.mark.parametrize("sampler", ["exchange", "expanded"])
def test_other_samplers_of_a_project(project, tmp_path, sampler):
    content = yaml.safe_load(project.read_text())
    content["windows"] |= {"sampler": sampler, "states": {"n": 3}, "n_adapt": 20}
    content["out_dir"] = str(tmp_path)
    path = project.parent / f"{sampler}.yaml"
    path.write_text(yaml.safe_dump(content))
    (tmp_path / "model.diffforce").write_bytes((project.parent / "runs" / "model.diffforce").read_bytes())
    run = json.loads(ok("windows", path, "--json"))
    assert (run["n_states"], run["n_frames"]) == (3, 36)
    assert run["n_steps"] == (3 * (10 + 12 * 5) if sampler == "exchange" else 10 + (20 + 36) * 5)
    if sampler == "exchange":
        assert "MBAR" in ok("estimate", tmp_path / "windows", "--no-decorrelate", "--min-overlap", "0")


def test_stages_in_order(files, tmp_path):
    path = tmp_path / "p.yaml"
    ok(
        "init",
        path,
        "--topology",
        files / "start.pdb",
        "--end-states",
        files / "state_0.xml",
        files / "state_1.xml",
    )
    shorten(path)
    for stage, advice in (
        ("fit", "run sample first"),
        ("simulate", "run fit first"),
        ("windows", "run fit first"),
    ):
        result = invoke(stage, path)
        assert result.exit_code == 1
        assert advice in result.output


def test_a_force_field_and_a_pdb_file(files, tmp_path):
    """One state only: a base action, no operator, no windows."""
    path = tmp_path / "p.yaml"
    ok("init", path, "--topology", files / "start.pdb", "--forcefield", "amber14/protein.ff14SB.xml")
    assert "windows:" not in path.read_text()
    shorten(path, simulate={"n_frames": 2, "interval": 2, "n_equil": 2, "mode": "replace"})
    ok("sample", path, "--quiet")
    with mock.patch.dict(training.N_COEFS, dict.fromkeys(training.N_COEFS, 5)):
        assert "operator" not in ok("fit", path).replace("held-out", "").split("Now:")[0]
    ok("simulate", path, "--quiet")
    result = invoke("windows", path)
    assert result.exit_code == 1
    assert "expected two end states" in result.output
    shorten(path, simulate={"n_frames": 2})
    assert "simulate.mode: expected replace where there is one System" in invoke("simulate", path).output


# ------------------------------------------------------------------ Amber topologies


def water_prmtop(charge: float = -0.8) -> str:
    """Flexible water, written by hand in the prmtop format (charges times 18.2223, kcal/mol, Angstrom)."""
    hydrogen = -charge / 2 * 18.2223
    sections = [
        ("TITLE", "20a4", ["water"]),
        ("POINTERS", "10I8", [3, 2, 2, 0, 1, 0, 0, 0, 0, 0, 4, 1, 0, 1, 0, 1, 1, 0, 2, 1, *8 * [0], 3, 0, 0]),
        ("ATOM_NAME", "20a4", ["O   H1  H2  "]),
        ("CHARGE", "5E16.8", [charge * 18.2223, hydrogen, hydrogen]),
        ("ATOMIC_NUMBER", "10I8", [8, 1, 1]),
        ("MASS", "5E16.8", [16.0, 1.008, 1.008]),
        ("ATOM_TYPE_INDEX", "10I8", [1, 2, 2]),
        ("NUMBER_EXCLUDED_ATOMS", "10I8", [2, 1, 1]),
        ("NONBONDED_PARM_INDEX", "10I8", [1, 2, 2, 3]),
        ("RESIDUE_LABEL", "20a4", ["WAT "]),
        ("RESIDUE_POINTER", "10I8", [1]),
        ("BOND_FORCE_CONSTANT", "5E16.8", [553.0]),
        ("BOND_EQUIL_VALUE", "5E16.8", [0.9572]),
        ("ANGLE_FORCE_CONSTANT", "5E16.8", [100.0]),
        ("ANGLE_EQUIL_VALUE", "5E16.8", [1.8242]),
        ("DIHEDRAL_FORCE_CONSTANT", "5E16.8", []),
        ("DIHEDRAL_PERIODICITY", "5E16.8", []),
        ("DIHEDRAL_PHASE", "5E16.8", []),
        ("SCEE_SCALE_FACTOR", "5E16.8", []),
        ("SCNB_SCALE_FACTOR", "5E16.8", []),
        ("SOLTY", "5E16.8", [0.0, 0.0]),
        ("LENNARD_JONES_ACOEF", "5E16.8", [581935.5, 0.0, 0.0]),
        ("LENNARD_JONES_BCOEF", "5E16.8", [594.8, 0.0, 0.0]),
        ("BONDS_INC_HYDROGEN", "10I8", [0, 3, 1, 0, 6, 1]),
        ("BONDS_WITHOUT_HYDROGEN", "10I8", []),
        ("ANGLES_INC_HYDROGEN", "10I8", [3, 0, 6, 1]),
        ("ANGLES_WITHOUT_HYDROGEN", "10I8", []),
        ("DIHEDRALS_INC_HYDROGEN", "10I8", []),
        ("DIHEDRALS_WITHOUT_HYDROGEN", "10I8", []),
        ("EXCLUDED_ATOMS_LIST", "10I8", [2, 3, 3, 0]),
        ("HBOND_ACOEF", "5E16.8", []),
        ("HBOND_BCOEF", "5E16.8", []),
        ("AMBER_ATOM_TYPE", "20a4", ["OW  HW  HW  "]),
    ]  # fmt: skip
    lines = ["%VERSION  VERSION_STAMP = V0001.000  DATE = 01/01/26  00:00:00"]
    for name, form, values in sections:
        lines += [f"%FLAG {name}", f"%FORMAT({form})"]
        if form == "20a4":
            lines += values
            continue
        width, per_line = (8, 10) if form == "10I8" else (16, 5)
        texts = [f"{v:{width}d}" if form == "10I8" else f"{v:{width}.8E}" for v in values]
        lines += ["".join(texts[k : k + per_line]) for k in range(0, len(texts), per_line)] or [""]
    return "\n".join(lines) + "\n"


WATER_PDB = """\
ATOM      1  O   WAT A   1       0.000   0.000   0.000  1.00  0.00           O
ATOM      2  H1  WAT A   1       0.957   0.000   0.000  1.00  0.00           H
ATOM      3  H2  WAT A   1      -0.240   0.927   0.000  1.00  0.00           H
CONECT    1    2    3
END
"""


def test_two_prmtop_files(tmp_path):
    (tmp_path / "water.pdb").write_text(WATER_PDB)
    for k, charge in enumerate((-0.8, -0.4)):
        (tmp_path / f"{k}.prmtop").write_text(water_prmtop(charge))
    path = tmp_path / "p.yaml"
    ok("init", path, "--topology", tmp_path / "water.pdb", "--prmtop", tmp_path / "0.prmtop", "--prmtop",
       tmp_path / "1.prmtop")  # fmt: skip
    settings = load_settings(path, ProjectSettings)
    parts = read_system(settings.system, settings.topology, 300.0)
    assert parts.pair.perturbed_atoms == (0, 1, 2)
    bond = next(f for f in parts.system.getForces() if isinstance(f, openmm.HarmonicBondForce))
    assert bond.getNumBonds() == 2
    assert parts.system.getNumConstraints() == 0


# ------------------------------------------------------------------ what init writes and refuses


def test_a_template_is_complete_and_is_its_own_default(tmp_path):
    path = tmp_path / "project.yaml"
    ok("init", path)
    text = path.read_text()
    for name, section in ProjectSettings.model_fields.items():
        if name != "topology":
            assert f"{name}:" in text
        for key in getattr(section.default, "model_fields_set", ()) or ():
            assert f"  {key}:" in text
    content = yaml.safe_load(text)
    read = load_settings(path, ProjectSettings)
    assert content["restrain_phi"] is True
    bare = ProjectSettings(system={"alanine": "F1"}, restrain_phi=True, out_dir=tmp_path / "runs")
    assert read == bare
    assert all(len(line) < 140 for line in text.splitlines())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--topology", "a.pdb"), "expected --end-states, --prmtop or --forcefield"),
        (("--forcefield", "amber14-all.xml"), "expected --topology"),
        (
            ("--topology", "a.pdb", "--forcefield", "x.xml", "--prmtop", "y"),
            "expected one source of the System",
        ),
    ],
)
def test_init_refuses(tmp_path, options, message):
    result = invoke("init", tmp_path / "p.yaml", *options)
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "p.yaml").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("0.957", "  nan"), "expected finite coordinates, found [nan"),
        (lambda text: "", "expected a PDB file with atoms"),
        (lambda text: "END\n", "expected a PDB file with atoms"),
        (lambda text: "\n".join(text.splitlines()[1:]), "expected the 3 atoms of"),
        (None, "expected a readable PDB file, found No such file"),
    ],
)  # fmt: skip
def test_init_reads_what_it_is_given(tmp_path, change, message):
    (tmp_path / "w.prmtop").write_text(water_prmtop())
    if change is not None:
        (tmp_path / "w.pdb").write_text(change(WATER_PDB))
    arguments = ("init", tmp_path / "p.yaml", "--topology", tmp_path / "w.pdb", "--prmtop")
    result = invoke(*arguments, tmp_path / "w.prmtop")
    assert result.exit_code == 1
    assert message in result.output
    if change is not None:
        (tmp_path / "w.pdb").write_text(WATER_PDB)
        too_many = [part for _ in range(2) for part in ("--prmtop", tmp_path / "w.prmtop")]
        result = invoke(*arguments, tmp_path / "w.prmtop", *too_many)
        assert "init: prmtop: expected at most 2, found 3" in result.output
    assert not (tmp_path / "p.yaml").exists()


def test_init_never_overwrites(tmp_path):
    (tmp_path / "p.yaml").write_text("mine")
    result = invoke("init", tmp_path / "p.yaml")
    assert result.exit_code == 1
    assert "exists already" in result.output
    assert (tmp_path / "p.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"system": {"alanine": "F1", "xml": "a.xml"}}, "expected exactly one of"),
        ({"system": {"xml": "a.xml"}}, "expected topology"),
        ({"system": {"prmtop": ["a", "b", "c"]}, "topology": "w.pdb"}, "system.prmtop: expected"),
        ({"system": {"forcefield": ["nothing.xml"]}, "topology": "w.pdb"}, "cannot describe it"),
        ({"system": {"prmtop": ["w.pdb"]}, "topology": "w.pdb"}, "expected an Amber prmtop file"),
        ({"system": {"prmtop": ["none.prmtop"]}, "topology": "w.pdb"}, "expected a readable prmtop file"),
        (
            {"system": {"end_states": ["w.pdb", "w.pdb"]}, "topology": "w.pdb"},
            "expected an OpenMM System as XML",
        ),
        ({"sample": {"frames": 10}}, "sample.frames: unknown key"),
        (
            {"windows": {"sampler": "gibbs"}},
            "windows.sampler: expected 'independent', 'exchange' or 'expanded'",
        ),
        (
            {"windows": {"sampler": "expanded", "n_workers": 2}},
            "windows: n_workers: sampler expanded runs in",
        ),
        ({"windows": {"exchange": True}}, "windows.exchange: unknown key; allowed: states"),
        ({"simulate": {"lam": 1.5}}, "simulate.lam: expected less than or equal to 1"),
        ({"temperature": "warm"}, "temperature: expected a valid number"),
        ({"fit": {"sites": [-1]}}, "fit.sites.0: expected greater than or equal to 0"),
    ],
)
def test_bad_projects(tmp_path, change, message):
    (tmp_path / "w.pdb").write_text(WATER_PDB)
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump({"system": {"alanine": "F1"}, "out_dir": "runs", **change}))
    result = invoke("sample", path, "--quiet")
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert not list(tmp_path.glob("runs/*/window*"))


def test_sites_follow_from_nonbonded_parameters_alone():
    case = alanine_case("F1")
    assert case.pair.perturbed_atoms == case.perturbed
    same = EndStatePair(case.system_0, case.system_0, case.topology, 300.0)
    with pytest.raises(IncompatibleSystemError, match="no atom's nonbonded parameters differ"):
        _ = same.perturbed_atoms
    other = openmm.XmlSerializer.clone(case.system_1)
    bond = next(f for f in other.getForces() if isinstance(f, openmm.HarmonicBondForce))
    a, b, length, k = bond.getBondParameters(0)
    bond.setBondParameters(0, a, b, length * 1.01, k)
    with pytest.raises(IncompatibleSystemError, match=r"HarmonicBondForce differs too; say which atoms"):
        _ = EndStatePair(case.system_0, other, case.topology, 300.0).perturbed_atoms


# ------------------------------------------------------------------ export


class Spring(torch.nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
        d = x[:, 1:] - x[:, :1]
        return 5e3 * (1 + lam) * ((d * d).sum(2) - 0.0096).pow(2).sum(1)


def test_export_of_your_own_module(tmp_path):
    (tmp_path / "w.pdb").write_text(WATER_PDB)
    torch.jit.script(Spring()).save(str(tmp_path / "m.pt"))
    out = ok("export", tmp_path / "m.pt", tmp_path / "m.diffforce", "--topology", tmp_path / "w.pdb",
             "--temperature", 300)  # fmt: skip
    assert "gradient of the action" in out
    assert load_artefact(tmp_path / "m.diffforce").metadata["modes"] == ["add", "operator"]


def test_export_refuses_what_is_no_module(tmp_path):
    (tmp_path / "w.pdb").write_text(WATER_PDB)
    for name in ("w.pdb", "none.pt"):
        result = invoke("export", tmp_path / name, tmp_path / "m", "--topology", tmp_path / "w.pdb",
                        "--temperature", 300)  # fmt: skip
        assert result.exit_code == 1
        assert "expected a TorchScript module" in result.output
    assert not (tmp_path / "m").exists()
