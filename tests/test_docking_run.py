"""Fit and score from files: folders, poses, page, command line, the force field."""

import csv
import gzip
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from openmm_diffforce.cli import app
from openmm_diffforce.docking import physics_score
from openmm_diffforce.docking.complex import RESIDUES, Complex, pdb_text, read_complex, read_partners
from openmm_diffforce.docking.decoys import make_decoys, reposed
from openmm_diffforce.docking.dock_run import (
    _found,
    pose_distances,
    read_poses,
    run_docking,
    run_docking_fit,
    structure_files,
)
from openmm_diffforce.docking.learning import DockingFit
from openmm_diffforce.docking.metrics import ligand_rmsd
from openmm_diffforce.docking.pages import funnel_figure, standardised, write_docking_page
from openmm_diffforce.docking.physics_score import PhysicsScore, physics_scores
from openmm_diffforce.docking.poses import Poses
from openmm_diffforce.docking.so3 import exp
from openmm_diffforce.errors import InputError, MissingDependencyError, ResumeError

from .tiny_complex import bundle, tiny_complex

SETTINGS = DockingFit(sigmas=(0.1, 0.4), n_noised=30, n_sets=1, n_decoys=40)


def write(path: Path, *parts: object) -> Path:
    path.write_text("".join(pdb_text(p) for p in parts) + "END\n")  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four complexes, two separate partners, and a model of the first three."""
    folder = tmp_path_factory.mktemp("docking")
    for k in range(4):
        one = tiny_complex(k)
        write(folder / f"tiny{k}.pdb", one.receptor, one.ligand)
    (folder / "apart").mkdir()
    write(folder / "apart" / "r.pdb", tiny_complex(3).receptor)
    write(folder / "apart" / "l.pdb", tiny_complex(3).ligand)
    run_docking_fit(
        structure_files(folder, ["tiny0", "tiny1", "tiny2"]), folder / "m.docking", settings=SETTINGS
    )
    return folder


def test_files_of_a_folder(home: Path, tmp_path: Path) -> None:
    assert [p.name for p in structure_files(home)] == [f"tiny{k}.pdb" for k in range(4)]
    with pytest.raises(InputError, match="found none for nine"):
        structure_files(home, ["tiny0", "nine"])
    with pytest.raises(InputError, match="at least two complexes, found 0"):
        structure_files(tmp_path)
    for name in ("one.b.pdb", "one.c.pdb"):
        write(tmp_path / name, tiny_complex(0).receptor, tiny_complex(0).ligand)
    assert len(structure_files(tmp_path, ["one.b", "one.c"])) == 2
    assert read_complex(tmp_path / "one.b.pdb").name == "one.b"
    (tmp_path / "one.b.pdb.gz").write_bytes(gzip.compress((tmp_path / "one.b.pdb").read_bytes()))
    with pytest.raises(InputError, match="expected one file of each structure"):
        structure_files(tmp_path)
    with pytest.raises(InputError, match="together: expected names of complexes, found nine"):
        run_docking_fit(structure_files(home), tmp_path / "m", together=["nine"])


def test_a_run_from_files_to_page(home: Path, tmp_path: Path) -> None:
    one = read_complex(home / "tiny3.pdb")
    run = run_docking(one, home / "m.docking", tmp_path / "out", n_decoys=40, seed=2)
    rows = list(csv.DictReader(run.table.read_text().splitlines()))
    assert len(rows) == 40
    energy = [float(r["learned energy [kT]"]) for r in rows]
    assert energy == sorted(energy)
    assert int(rows[0]["pose"]) == run.order[0]
    decoys = make_decoys(one, 40, seed=2)
    assert float(rows[0]["ligand RMSD [nm]"]) == pytest.approx(decoys.rmsd[run.order[0]], rel=1e-5)
    assert run.measures["learned energy [kT]"]["auc"] > 0.8
    page = run.page.read_text()
    assert "Docking scores of tiny3" in page
    assert page.count("data:image/png;base64,") == 1
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "no test" not in page
    record = json.loads((run.folder / "docking.json").read_text())
    assert record["settings"]["n_poses"] == 40
    assert record["measures"] == run.measures
    # The best poses come back from their file, and score the same as what is given.
    best = read_poses(run.folder / "best.pdb", one)
    assert ligand_rmsd(one, best) == pytest.approx(decoys.rmsd[run.order[:10]], abs=1e-3)
    again = run_docking(one, home / "m.docking", tmp_path / "again", poses=best)
    assert again.order[0] == 0
    assert again.scores["learned energy [kT]"] == pytest.approx(energy[:10], abs=0.2)


def test_a_complex_of_the_training_is_no_test(home: Path, tmp_path: Path) -> None:
    run = run_docking(read_complex(home / "tiny0.pdb"), home / "m.docking", tmp_path, n_decoys=20)
    assert "its scores here are no test" in run.page.read_text()


def test_two_partners_without_a_known_complex(home: Path, tmp_path: Path) -> None:
    both = read_partners(home / "apart" / "r.pdb", home / "apart" / "l.pdb")
    with pytest.raises(InputError, match="or poses of your own"):
        run_docking(both, home / "m.docking", tmp_path)
    poses = make_decoys(tiny_complex(3), 20, seed=1).poses
    run = run_docking(both, home / "m.docking", tmp_path, poses=poses)
    assert list(run.columns) == ["RMSD to the best [nm]"]
    assert run.columns["RMSD to the best [nm]"][run.order[0]] == pytest.approx(0, abs=1e-7)
    assert not run.measures


def test_ties_are_said() -> None:
    assert [_found(v) for v in (0.0, 1.0, 0.25)] == ["no", "yes", "25% (ties)"]


def test_distances_between_poses() -> None:
    one = tiny_complex(0)
    g = np.random.default_rng(0)
    poses = Poses(exp(g.standard_normal((4, 3))), g.standard_normal((4, 3)))
    x = poses.apply(one.ligand.ca, one.ligand.centre)
    want = np.sqrt(((x - x[2]) ** 2).sum(axis=2).mean(axis=1))
    assert pose_distances(one.ligand, poses, poses[2]) == pytest.approx(want, abs=1e-7)


def test_poses_from_other_frames(home: Path, tmp_path: Path) -> None:
    """Frames with the receptor are superposed on it; the ligand alone is taken as it lies."""
    one = read_complex(home / "tiny3.pdb")
    poses = make_decoys(one, 12, seed=4).poses[:3]
    q, shift = exp(np.array([0.4, 1.0, -0.3])), np.array([1.0, -2.0, 0.5])
    whole, alone = [], []
    for k, pose in enumerate(poses):
        ligand = one.ligand.moved(pose.rotation[0], pose.translation[0])
        moved = [p.moved(q, p.centre @ q.T + shift - p.centre) for p in (one.receptor, ligand)]
        for lines, parts in ((whole, moved), (alone, [ligand])):
            lines.append(f"MODEL     {k + 1:4d}\n{''.join(pdb_text(p) for p in parts)}ENDMDL\n")
    for name, lines in (("whole.pdb", whole), ("alone.pdb", alone)):
        (tmp_path / name).write_text("".join(lines))
        found = read_poses(tmp_path / name, one)
        assert found.translation == pytest.approx(poses.translation, abs=2e-4)
        assert found.rotation == pytest.approx(poses.rotation, abs=5e-4)


def test_poses_that_cannot_be_read(home: Path, tmp_path: Path) -> None:
    one = read_complex(home / "tiny3.pdb")
    with pytest.raises(InputError, match="expected a readable PDB file"):
        read_poses(tmp_path / "none.pdb", one)
    (tmp_path / "empty.pdb").write_text("hello\n")
    (tmp_path / "empty.dcd").write_bytes(b"")
    with pytest.raises(InputError, match="expected ATOM records of a protein, found none"):
        read_poses(tmp_path / "empty.pdb", one)
    with pytest.raises(InputError, match="expected a multi-model PDB file, or a trajectory"):
        read_poses(tmp_path / "empty.dcd", one, topology=home / "tiny3.pdb")
    (tmp_path / "bad.pdb.gz").write_bytes(gzip.compress(b"ATOM" * 4000)[:-30] + b"x" * 30)
    with pytest.raises(InputError, match="expected a readable PDB file"):
        read_poses(tmp_path / "bad.pdb.gz", one)
    with pytest.raises(InputError, match="expected C-alpha of all 24 residues of the ligand"):
        read_poses(home / "apart" / "r.pdb", one)
    bent = one.ligand.moved(np.eye(3), np.zeros(3))
    bent.atoms[: len(bent.atoms) // 2] += 1.0
    with pytest.raises(InputError, match="expected rigid poses of the ligand of tiny3"):
        read_poses(write(tmp_path / "bent.pdb", bent), one)


def without_residues(text: str, gone: list[str]) -> str:
    """PDB lines without residues, named by columns 22 to 27."""
    return "".join(v for v in text.splitlines(keepends=True) if v[21:27] not in gone)


def test_the_receptor_of_poses_must_be_that_of_the_complex(home: Path, tmp_path: Path) -> None:
    one = read_complex(home / "tiny3.pdb")
    shift = np.array([2.0, 0.0, 0.0])
    text = "".join(pdb_text(p.moved(np.eye(3), shift)) for p in (one.receptor, one.ligand))
    some = without_residues(text, ["A   5 "])  # one residue less: superposed on the others
    (tmp_path / "some.pdb").write_text(some)
    assert read_poses(tmp_path / "some.pdb", one).translation == pytest.approx(np.zeros((1, 3)), abs=1e-3)
    few = without_residues(text, [f"A{k:4d} " for k in range(4, 900)])
    (tmp_path / "few.pdb").write_text(few)
    with pytest.raises(InputError, match="residues, or none of them, found 3"):
        read_poses(tmp_path / "few.pdb", one)
    stretched = replace(one.receptor, atoms=one.receptor.atoms * [1.0, 1.0, 1.6])
    with pytest.raises(InputError, match="found one that differs by"):
        read_poses(write(tmp_path / "other.pdb", stretched, one.ligand), one)


def test_insertion_codes_are_told_apart(tmp_path: Path) -> None:
    one = tiny_complex(3)
    text = "".join(pdb_text(p) for p in (one.receptor, one.ligand))
    text = text.replace("B   6 ", "B   5A")
    (tmp_path / "codes.pdb").write_text(text)
    found = read_complex(tmp_path / "codes.pdb")
    assert "B:5A" in found.ligand.labels
    assert read_poses(tmp_path / "codes.pdb", found).translation == pytest.approx(0.0, abs=1e-3)


# ----------------------------------------------------------------------------------------- pages


def test_figures_and_pages(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one panel"):
        funnel_figure([])
    assert np.median(standardised([1.0, 2.0, 5.0])) == 0
    assert np.isfinite(standardised(np.ones(4))).all()
    figure = funnel_figure([{"title": str(k), "rmsd": [0.1, 1.0], "score": [0.0, 1.0]} for k in range(7)])
    assert sum(a.axison for a in figure.axes) == 7
    page = write_docking_page(
        tmp_path / "p.html", title="<b>", lead="lead", facts={"a": "b"}, figures=[], notes=["n"],
        tables=[{"title": "T", "head": ["x", "y"], "rows": [["row", float("nan")], [1, 0.12345]]}],
    )  # fmt: skip
    text = page.read_text()
    assert "&lt;b&gt;" in text
    assert "nan" not in text
    assert '<td class="n">n/a</td>' in text
    assert '<td class="n">0.123</td>' in text


# ---------------------------------------------------------------------------------- command line


def test_the_commands(home: Path, tmp_path: Path) -> None:
    call = CliRunner().invoke
    fitted = tmp_path / "m.docking"
    small = DockingFit(sigmas=(0.1,), n_noised=10, n_sets=1, n_decoys=20)
    with pytest.MonkeyPatch.context() as m:
        m.setattr("openmm_diffforce.docking.dock_run.DockingFit", lambda: small)
        done = call(app, ["dock-fit", str(home), "--out", str(fitted), "--together", "tiny0,tiny1", "--only",
                          "tiny0,tiny1,tiny2"])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "fitted to 3 complexes" in done.output
    done = call(app, ["inspect", str(fitted)])
    assert done.exit_code == 0, done.output
    assert "diffforce-docking" in done.output
    assert "tiny0, tiny1, tiny2" in done.output
    out = tmp_path / "out"
    with_model = ["--model", str(home / "m.docking")]
    done = call(
        app, ["dock-score", str(home / "tiny3.pdb"), *with_model, "--decoys", "20", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert "Best of 20 poses of tiny3" in done.output
    two = [str(home / "apart" / name) for name in ("r.pdb", "l.pdb")]
    given = ["--poses", str(out / "best.pdb"), "--out", str(tmp_path / "two"), "--json"]
    done = call(app, ["dock-score", *two, *with_model, *given])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["settings"]["n_poses"] == 10
    assert (record["settings"]["receptor"], record["settings"]["ligand"]) == ("A", "B")
    assert {"structure_1", "structure_2", "model", "poses", "best"} <= set(record["files_sha256"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny3.pdb", "--ligand", "C"], "expected chain C for the ligand, found A, B"),
        (["tiny3.pdb", "--ligand", "A"], "without a common chain"),
        (["apart/r.pdb", "apart/l.pdb"], "found two partners"),
        (["apart/r.pdb", "apart/l.pdb", "tiny3.pdb"], "expected one file or two, found 3"),
        (["none.pdb"], "expected a readable PDB file"),
        (["tiny3.pdb", "--poses", "apart/r.pdb"], "expected C-alpha of all 24 residues"),
        (["tiny3.pdb", "--model", "tiny3.pdb"], "another kind of"),
        (["apart/r.pdb", "apart/l.pdb", "--receptor", "A"], "expected with one file that holds both"),
        (["tiny3.pdb", "--native"], "expected with two files, found one"),
        (["tiny3.pdb", "--topology", "tiny3.pdb"], "expected with --poses, found it alone"),
    ],
)
def test_bad_calls_are_one_sentence(home: Path, arguments: list[str], message: str) -> None:
    paths = [str(home / a) if a.endswith(".pdb") else a for a in arguments]
    if "--model" not in paths:
        paths += ["--model", str(home / "m.docking")]
    done = CliRunner().invoke(app, ["dock-score", *paths, "--out", str(home / "bad")])
    assert done.exit_code == 1
    assert message in done.output.replace("\n", " ")
    assert "Traceback" not in done.output


def test_a_folder_that_cannot_be_made_is_said_first(home: Path) -> None:
    with pytest.raises(InputError, match="expected a folder that can be made"):
        run_docking(read_complex(home / "tiny3.pdb"), home / "m.docking", home / "m.docking")


# ----------------------------------------------------------------------------------- force field


@cache
def peptides() -> Complex:
    """Two helices of alanine with a glutamate that must be completed, 1 nm apart."""
    alanine, glutamate = RESIDUES.index("ALA"), RESIDUES.index("GLU")
    types = np.array([alanine] * 8)
    other = types.copy()
    other[4] = glutamate
    return Complex("peptides", bundle([(0.0, 0.0)], 8, types, "A"), bundle([(1.0, 0.0)], 8, other, "B"))


def test_the_force_field_scores_a_pair_of_peptides() -> None:
    pytest.importorskip("pdbfixer")
    one = peptides()
    score = PhysicsScore(one, platform="Reference")
    assert "4 heavy atoms added in 1 residues" in score.notes[1]
    poses = Poses(np.stack([np.eye(3)] * 3), [[0, 0, 0], [-0.75, 0, 0], [5.0, 0, 0]])
    energy = score.energy(poses)
    assert energy[0] < 0  # they attract where they touch
    assert energy[1] > energy[0] + 100  # a clash
    assert energy[2] == 0  # out of sight
    hidden, same = reposed(one, poses, np.random.default_rng(1))
    assert score(hidden, same)[[0, 2]] == pytest.approx(energy[[0, 2]], abs=1.0)
    with pytest.raises(InputError, match="expected poses of peptides, found those of tiny0"):
        score(tiny_complex(0), poses)


def test_the_interaction_is_the_difference_of_whole_energies() -> None:
    """Without minimisation and with everything in sight: against OpenMM's own system of both."""
    pytest.importorskip("pdbfixer")
    from openmm import Context, LangevinIntegrator, app, unit

    one = peptides()
    score = PhysicsScore(one, platform="Reference")
    a, b = score._bodies
    field = app.ForceField(*physics_score.FORCE_FIELD)
    parts = [physics_score._fixed(p, "") for p in (one.receptor, one.ligand)]

    def energy(topologies: list) -> float:
        modeller = app.Modeller(*topologies[0][:2])
        for t in topologies[1:]:
            modeller.add(*t[:2])
        system = field.createSystem(
            modeller.topology, nonbondedMethod=app.CutoffNonPeriodic,
            nonbondedCutoff=physics_score.CUTOFF * unit.nanometer, constraints=None,
        )  # fmt: skip
        for force in system.getForces():
            if hasattr(force, "setReactionFieldDielectric"):
                force.setReactionFieldDielectric(1.0)
        context = Context(system, LangevinIntegrator(300, 1, 0.001), score.platform)
        context.setPositions(modeller.positions)
        return context.getState(getEnergy=True).getPotentialEnergy()._value

    want = energy(parts) - energy(parts[:1]) - energy(parts[1:])
    both = score._context([(a, np.ones(len(a.x), bool)), (b, np.ones(len(b.x), bool))])
    both.setPositions(np.concatenate([a.x, b.x]))
    found = both.getState(getEnergy=True).getPotentialEnergy()._value
    for body in (a, b):
        alone = score._context([(body, np.ones(len(body.x), bool))])
        alone.setPositions(body.x)
        found -= alone.getState(getEnergy=True).getPotentialEnergy()._value
    assert found == pytest.approx(want, abs=0.5)


def test_force_field_scores_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted:
        complex_ = peptides()
        calls = 0

        def _one(self, pose: Poses) -> float:
            self.calls += 1
            return float(pose.translation[0, 0])

    poses = Poses(np.stack([np.eye(3)] * 5), np.arange(15.0).reshape(5, 3))
    score = Counted()
    done = physics_scores(score, poses, path=tmp_path / "p.json", budget=0.0)  # type: ignore[arg-type]
    assert len(done.values) == 0
    monkeypatch.setattr(Counted, "_one", lambda self, pose: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        physics_scores(score, poses, path=tmp_path / "p.json")  # type: ignore[arg-type]
    monkeypatch.undo()
    done = physics_scores(score, poses, path=tmp_path / "p.json")  # type: ignore[arg-type]
    assert done.values.tolist() == [0.0, 3.0, 6.0, 9.0, 12.0]
    calls = score.calls
    assert physics_scores(score, poses, path=tmp_path / "p.json").values.tolist() == done.values.tolist()  # type: ignore[arg-type]
    assert score.calls == calls
    # Others in the same file: what is there is not computed again.
    more = Poses(np.stack([np.eye(3)] * 2), np.array([[3.0, 4.0, 5.0], [7.0, 0.0, 0.0]]))
    assert physics_scores(score, more, path=tmp_path / "p.json").values.tolist() == [3.0, 7.0]  # type: ignore[arg-type]
    assert score.calls == calls + 1
    score.complex_ = replace(
        peptides(), ligand=replace(peptides().ligand, atoms=peptides().ligand.atoms + 0.01)
    )
    with pytest.raises(ResumeError, match="those of another structure"):
        physics_scores(score, poses, path=tmp_path / "p.json")  # type: ignore[arg-type]


def test_without_pdbfixer_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pdbfixer", None)
    with pytest.raises(MissingDependencyError, match="pip install pdbfixer"):
        PhysicsScore(peptides())
