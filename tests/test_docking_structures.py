"""Complexes, metrics, decoys: reading, checks, known numbers, protocol, invariance."""

import gzip
from pathlib import Path

import mdtraj
import numpy as np
import pytest
from scipy.stats import kstest

from openmm_diffforce.docking import decoys as decoys_module
from openmm_diffforce.docking.complex import (
    RESIDUES,
    Complex,
    check_interface,
    pdb_text,
    read_complex,
    read_partners,
)
from openmm_diffforce.docking.contacts import CB, clash_counts, clash_tree, count_pairs, placed
from openmm_diffforce.docking.decoys import make_decoys, reposed
from openmm_diffforce.docking.metrics import (
    dockq,
    least_rmsd,
    ligand_rmsd,
    pose_metrics,
    quality,
    superposition,
)
from openmm_diffforce.docking.poses import Poses
from openmm_diffforce.docking.so3 import exp
from openmm_diffforce.errors import ConvergenceError, InputError

from .tiny_complex import tiny_complex


def written(path: Path, one: Complex, change: object = None) -> Path:
    text = pdb_text(one.receptor) + pdb_text(one.ligand) + "END\n"
    path.write_text(change(text) if callable(change) else text)
    return path


# ------------------------------------------------------------------------------------- reading


def test_a_complex_survives_its_file(tmp_path: Path) -> None:
    one = tiny_complex(0)
    found = read_complex(written(tmp_path / "one.pdb", one))
    assert found.name == "one"
    for a, b in ((found.receptor, one.receptor), (found.ligand, one.ligand)):
        assert a.labels == b.labels
        assert (a.types == b.types).all()
        assert np.abs(a.atoms - b.atoms).max() < 1e-4
        # Glycine has no C-beta in the file: it is put back where it was.
        assert np.abs(a.sites - b.sites).max() < 3e-4
        # Atoms up to C-beta: every side chain but alanine's and glycine's none is cut, and it is said.
        names = [RESIDUES[t] for t in a.types]
        cut = len(names) - names.count("ALA") - names.count("GLY")
        assert f"{cut} of {len(names)} side chains lack atoms" in a.notes[0]
        assert (a.side_chains[1] == np.array([n == "ALA" for n in names])).all()
    packed = tmp_path / "two.pdb.gz"
    packed.write_bytes(gzip.compress((tmp_path / "one.pdb").read_bytes()))
    assert (read_complex(packed).ligand.atoms == found.ligand.atoms).all()


def test_mdtraj_and_two_files_read_the_same(tmp_path: Path) -> None:
    one = tiny_complex(1)
    path = written(tmp_path / "one.pdb", one)
    direct, by_mdtraj = read_complex(path), read_complex(mdtraj.load(str(path)))
    assert np.abs(direct.ligand.sites - by_mdtraj.ligand.sites).max() < 1e-5
    assert direct.receptor.labels == by_mdtraj.receptor.labels
    for name, part in (("r.pdb", one.receptor), ("l.pdb", one.ligand)):
        (tmp_path / name).write_text(pdb_text(part))
    two = read_partners(tmp_path / "r.pdb", tmp_path / "l.pdb", native=True)
    assert two.native
    assert (two.ligand.atoms == direct.ligand.atoms).all()


def test_hydrogens_and_alternates_are_left_out(tmp_path: Path) -> None:
    one = tiny_complex(0)

    def change(text: str) -> str:
        first = text.splitlines()[0]
        hydrogen = first[:12] + " H  " + first[16:76] + " H"
        other = first[:16] + "B" + first[17:]
        return "\n".join([hydrogen, other, text])

    found = read_complex(written(tmp_path / "one.pdb", one, change))
    assert len(found.receptor.atoms) == len(one.receptor.atoms)


@pytest.mark.parametrize(
    ("change", "chains", "message"),
    [
        (lambda t: t.replace(" B ", " A "), ("A", "B"), "expected chain B for the ligand, found A"),
        (None, ("A", "AB"), "without a common chain, found A in both"),
        (None, ("A", ""), r"expected chain \(none given\) for the ligand"),
        (lambda t: t + t, ("A", "B"), "expected every residue id once, found A:1 again"),
        (lambda t: t.replace(" CA ", " XX "), ("A", "B"), "expected residues with a C-alpha, found none in"),
        (lambda t: "HEADER\n", ("A", "B"), "expected ATOM records of a protein, found none"),
        (lambda t: t[:30] + "     nan" + t[38:], ("A", "B"), "line 1: expected finite coordinates"),
        (lambda t: t[:30] + "    what" + t[38:], ("A", "B"), "line 1: expected three coordinates"),
    ],
)  # fmt: skip
def test_bad_structures_are_refused(tmp_path: Path, change: object, chains: tuple, message: str) -> None:
    path = written(tmp_path / "one.pdb", tiny_complex(0), change)
    with pytest.raises(InputError, match=message):
        read_complex(path, receptor=chains[0], ligand=chains[1])


def test_missing_files_and_empty_interfaces(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a readable PDB file"):
        read_complex(tmp_path / "none.pdb")
    one = tiny_complex(0)
    apart = Complex("apart", one.receptor, one.ligand.moved(np.eye(3), np.array([5.0, 0, 0])))
    with pytest.raises(InputError, match="found an empty interface"):
        read_complex(written(tmp_path / "apart.pdb", apart))
    with pytest.raises(InputError, match="empty interface"):
        check_interface(apart)
    for name, part in (("r.pdb", apart.receptor), ("l.pdb", apart.ligand)):
        (tmp_path / name).write_text(pdb_text(part))
    assert not read_partners(tmp_path / "r.pdb", tmp_path / "l.pdb").native  # allowed: no known complex


def test_a_residue_without_ca_is_left_out_and_said(tmp_path: Path) -> None:
    one = tiny_complex(0)

    def change(text: str) -> str:
        lines = text.splitlines()
        return "\n".join(v for v in lines if not (v[12:16] == " CA " and v[21:26] == "A   2"))

    found = read_complex(written(tmp_path / "one.pdb", one, change))
    assert found.receptor.n_residues == one.receptor.n_residues - 1
    assert "left out 1 residues without a C-alpha" in found.notes[0]


def test_other_atoms_and_places_of_a_residue(tmp_path: Path) -> None:
    """Selenium of MSE is MET's sulfur; a residue that is all location B is kept; C-alpha alone is said."""
    one = tiny_complex(0)

    def change(text: str) -> str:
        lines = []
        for v in text.splitlines():
            if v[21:26] == "A   2":
                v = v[:16] + "B" + v[17:]
            if v[21:26] == "A   3":
                v = f"{v[:17]}MSE{v[20:]}"
                if v[12:16] == " CB ":
                    lines.append(f"{v[:12]}SE  {v[16:76]}SE")
            if v[21:26] != "B   4" or v[12:16] == " CA ":
                lines.append(v)
        return "\n".join(lines)

    found = read_complex(written(tmp_path / "one.pdb", one, change))
    assert found.receptor.n_residues == one.receptor.n_residues
    names = {
        n for n, r in zip(found.receptor.atom_names, found.receptor.atom_residues, strict=True) if r == 2
    }
    assert "SD" in names
    assert "SE" not in names
    assert "1 residues have neither C-beta nor N and C" in found.ligand.notes[0]


# ------------------------------------------------------------------------------------- metrics


def some_poses(n: int, seed: int = 0, size: float = 0.3) -> Poses:
    g = np.random.default_rng(seed)
    return Poses(exp(size * g.standard_normal((n, 3))), size * g.standard_normal((n, 3)))


def test_ligand_rmsd_is_that_of_the_coordinates() -> None:
    one, poses = tiny_complex(0), some_poses(5)
    x = placed(one.ligand.ca, one.ligand.centre, poses)
    direct = np.sqrt(((x - one.ligand.ca) ** 2).sum(axis=2).mean(axis=1))
    assert ligand_rmsd(one, poses) == pytest.approx(direct, abs=1e-12)


def test_superposition_finds_the_least_rmsd() -> None:
    g = np.random.default_rng(0)
    fixed = g.standard_normal((7, 3))
    rotation = exp(np.array([0.3, -0.8, 0.5]))
    moving = (fixed - [1, 2, 3]) @ rotation
    r, shift = superposition(moving, fixed)
    assert moving @ r.T + shift == pytest.approx(fixed, abs=1e-12)
    noisy = np.stack([moving, moving + 0.1 * g.standard_normal((7, 3)), moving * [1, 1, -1]])
    found = least_rmsd(noisy, fixed)
    assert found[0] == pytest.approx(0.0, abs=1e-7)
    r, shift = superposition(noisy[1], fixed)
    direct = np.sqrt(((noisy[1] @ r.T + shift - fixed) ** 2).sum(axis=1).mean())
    assert found[1] == pytest.approx(direct, abs=1e-10)
    assert found[2] > 0.1  # a mirror image is not superposed


def test_metrics_of_the_native_pose_and_of_one_far_away() -> None:
    one = tiny_complex(0)
    poses = Poses(np.stack([np.eye(3)] * 2), [[0, 0, 0], [9.0, 0, 0]])
    m = pose_metrics(one, poses)
    assert m.dockq[0] == pytest.approx(1.0, abs=1e-6)
    assert m.fraction_native.tolist() == [1.0, 0.0]
    assert m.ligand_rmsd[1] == pytest.approx(9.0)
    assert m.backbone_rmsd[1] == pytest.approx(9.0)
    assert m.dockq[1] < 0.02
    # By hand for one pose in between.
    m = pose_metrics(one, some_poses(1, size=0.1))
    atoms = placed(one.ligand.atoms, one.ligand.centre, some_poses(1, size=0.1))[0]

    def contacts(x: np.ndarray) -> set[tuple[int, int]]:
        i, j = np.nonzero(np.linalg.norm(one.receptor.atoms[:, None] - x, axis=-1) < 0.5)
        return set(zip(one.receptor.atom_residues[i], one.ligand.atom_residues[j], strict=True))

    now, then = contacts(atoms), contacts(one.ligand.atoms)
    assert 0 < m.fraction_native[0] < 1
    assert m.fraction_native[0] == pytest.approx(len(now & then) / len(then))


def test_dockq_as_published() -> None:
    # Formula and cutoffs of doi:10.1371/journal.pone.0161879, in Angstrom.
    f, i, ligand = 0.3, 2.5, 6.0
    want = (f + 1 / (1 + (i / 1.5) ** 2) + 1 / (1 + (ligand / 8.5) ** 2)) / 3
    assert float(dockq(f, i / 10, ligand / 10)) == pytest.approx(want)
    assert [quality(q) for q in (0.22, 0.23, 0.49, 0.80)] == ["incorrect", "acceptable", "medium", "high"]


# -------------------------------------------------------------------------------------- decoys


@pytest.fixture(scope="module")
def decoys() -> tuple[Complex, decoys_module.Decoys]:
    one = tiny_complex(0)
    return one, make_decoys(one, 60, seed=3)


def test_decoys_follow_the_protocol(decoys: tuple) -> None:
    one, found = decoys
    assert found.near.sum() == 3
    assert found.rmsd == pytest.approx(ligand_rmsd(one, found.poses), abs=1e-9)
    assert found.rmsd.min() > decoys_module.NATIVE
    assert kstest((found.rmsd[~found.near] - 0.5) / 2.5, "uniform").statistic < 1.5 / 57  # stratified
    sites = placed(one.ligand.sites, one.ligand.centre, found.poses)
    clashes = clash_counts(clash_tree(one.receptor), sites, decoys_module.CLASH_DISTANCE)
    assert clashes.max() <= decoys_module.MAX_CLASHES
    touching = count_pairs(one.receptor.sites[:, CB], sites[:, :, CB], decoys_module.CONTACT_DISTANCE)
    assert touching.min() >= decoys_module.MIN_CONTACTS


def test_clashes_are_counted_as_by_hand(decoys: tuple) -> None:
    one, found = decoys
    poses = found.poses[[0, 30]]
    poses = Poses(poses.rotation, poses.translation - [0.3, 0, 0])
    sites = placed(one.ligand.sites, one.ligand.centre, poses)
    d = np.linalg.norm(
        one.receptor.sites[None, :, None, [1, 3], None] - sites[:, None, :, None, [1, 3]], axis=-1
    )
    want = (d < 0.4).any(axis=(1, 3, 4)).sum(axis=1)
    assert want[0] > 0
    assert clash_counts(clash_tree(one.receptor), sites, 0.4).tolist() == want.tolist()


def test_decoys_follow_their_seed(decoys: tuple) -> None:
    one, found = decoys
    again = make_decoys(one, 60, seed=3)
    assert (again.poses.translation == found.poses.translation).all()
    assert not np.allclose(make_decoys(one, 60, seed=4).rmsd, found.rmsd)


def test_reposing_moves_everything_and_changes_nothing(decoys: tuple) -> None:
    one, found = decoys
    hidden, poses = reposed(one, found.poses, np.random.default_rng(5))
    assert not hidden.native
    assert np.abs(hidden.receptor.ca - one.receptor.ca).min() > 0.01
    assert not np.allclose(poses.rotation, found.poses.rotation, atol=0.1)
    a, b = (
        np.linalg.norm(
            c.receptor.ca[None, :, None] - placed(c.ligand.ca, c.ligand.centre, p)[:, None], axis=-1
        )
        for c, p in ((one, found.poses), (hidden, poses))
    )
    assert a == pytest.approx(b, abs=1e-10)


def test_parts_that_no_slide_reaches_are_filled_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    one = tiny_complex(0)
    monkeypatch.setattr(decoys_module, "_MAX_BATCHES", 0)
    found = make_decoys(one, 12, seed=1, near_rmsd=0.1, near_share=0.05, max_rmsd=1.2)
    sites = placed(one.ligand.sites, one.ligand.centre, found.poses)
    clashes = clash_counts(clash_tree(one.receptor), sites, decoys_module.CLASH_DISTANCE)
    assert clashes.max() <= decoys_module.MAX_CLASHES
    monkeypatch.setattr(decoys_module, "_UNSLID_BATCHES", 0)
    with pytest.raises(ConvergenceError, match=r"found none in 12, e\.g\. 0\.02 to 0\.10"):
        make_decoys(one, 12, seed=1, near_rmsd=0.1, near_share=0.05, max_rmsd=1.2)


def test_decoys_that_cannot_be(decoys: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = decoys
    loose = Complex("loose", one.receptor, one.ligand, native=False)
    with pytest.raises(InputError, match="expected a complex with a known native pose"):
        make_decoys(loose, 10, seed=1)
    with pytest.raises(InputError, match="RMSD and DockQ need a structure"):
        ligand_rmsd(loose, Poses.identity())
    for bad in ({"n_decoys": 1}, {"near_share": 1.0}, {"max_rmsd": 0.4}, {"near_rmsd": float("nan")}):
        with pytest.raises(InputError, match="decoys: expected n_decoys >= 2"):
            make_decoys(one, **{"n_decoys": 10, "seed": 1, **bad})
    monkeypatch.setattr(decoys_module, "_MAX_BATCHES", 2)
    monkeypatch.setattr(decoys_module, "_UNSLID_BATCHES", 1)
    with pytest.raises(ConvergenceError, match="ask for fewer decoys, or for a smaller max_rmsd"):
        make_decoys(one, 10, seed=1, max_rmsd=40.0)
