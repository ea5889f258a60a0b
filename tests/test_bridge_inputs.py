"""Frames and operators from files: what is read, which image, which atoms."""

from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np
import openmm
import pandas as pd
import pytest
from openmm import app, unit

from openmm_diffforce.alanine import alanine_case
from openmm_diffforce.alchemy import EndStatePair, lambda_states
from openmm_diffforce.analysis import trajectory_of
from openmm_diffforce.bridge_inputs import (
    MOST_KEPT,
    inputs_from_arrays,
    inputs_from_run,
    inputs_from_systems,
    inputs_from_table,
    nearest_images,
    noised_atoms,
)
from openmm_diffforce.errors import InputError
from openmm_diffforce.estimate import read_table, state_operators
from openmm_diffforce.exchange import run_expanded_ensemble

from . import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames of both ends of F1 in several formats."""
    out = tmp_path_factory.mktemp("frames")
    tiny.save_ends(out, 40, ("dcd", "xtc", "pdb"))
    trajectory_of(tiny.frames()[0][:1], tiny.case().topology).save(str(out / "top.pdb"))
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three windows of F1."""
    out = tmp_path_factory.mktemp("run")
    tiny.save_run(out, 3, 12)
    return out


# ------------------------------------------------------------------------------------ Systems


@pytest.mark.parametrize(("suffix", "tolerance"), [("dcd", 0.01), ("pdb", 1.0), ("xtc", 5.0)])
def test_operators_of_trajectories_are_those_of_the_frames(
    folder: Path, suffix: str, tolerance: float
) -> None:
    pair = tiny.case().pair
    seen: list[tuple[int, int]] = []
    found = inputs_from_systems(
        pair, [folder / f"{k}.{suffix}" for k in (0, 1)], progress=lambda a, b: seen.append((a, b))
    )
    for k, o in enumerate(found.operators):
        assert found.frames[k].shape == (40, 22, 3)
        assert np.abs(o - tiny.frames()[2 * k + 1][:40]).max() < tolerance
    assert found.lams == (0.0, 1.0)
    assert found.atoms == pair.perturbed_atoms
    assert found.noised == ("ALA2-CB", "ALA2-HB1")
    assert found.temperature == 300.0
    assert seen[-1] == (80, 80)


def test_skip_and_stride(folder: Path) -> None:
    found = inputs_from_systems(
        tiny.case().pair, [folder / "0.dcd", folder / "1.dcd"], topology=folder / "top.pdb", skip=7, stride=5
    )
    np.testing.assert_allclose(found.frames[0], tiny.frames()[0][7:40:5], atol=1e-6)
    assert len(found.operators[1]) == 7
    assert set(found.files) == {"topology", "state 0: 0.dcd", "state 1: 1.dcd"}


def test_chunks_do_not_change_frames(tmp_path: Path) -> None:
    x = np.repeat(tiny.frames()[0], 2, axis=0)[:230]
    trajectory_of(x, tiny.case().topology).save_dcd(str(tmp_path / "a.dcd"))
    found = inputs_from_systems(tiny.case().pair, [tmp_path / "a.dcd"] * 2, skip=3, stride=7)
    np.testing.assert_allclose(found.frames[0], x[3::7], atol=1e-6)


def test_segments_are_one_run(tmp_path: Path) -> None:
    x, topology = tiny.frames()[0][:60], tiny.case().topology
    for name, part in (("a", x[:25]), ("b", x[25:]), ("all", x)):
        trajectory_of(part, topology).save_dcd(str(tmp_path / f"{name}.dcd"))
    found = inputs_from_systems(
        tiny.case().pair, [[tmp_path / "a.dcd", tmp_path / "b.dcd"], tmp_path / "all.dcd"], skip=3, stride=2
    )
    np.testing.assert_array_equal(found.frames[0], found.frames[1])
    np.testing.assert_array_equal(found.operators[0], found.operators[1])
    assert len(found.files) == 3
    with pytest.raises(InputError, match="list of segments for state 0, found none"):
        inputs_from_systems(tiny.case().pair, [[], tmp_path / "all.dcd"])


def test_constrained_atoms_are_not_noised() -> None:
    case = alanine_case("F1")
    pairs = []
    for fixed in ((11,), (10, 11)):
        ends = [openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(s))
                for s in (case.system_0, case.system_1)]  # fmt: skip
        for system in ends:
            for a in fixed:
                system.addConstraint(0, a, 0.3)
        pairs.append(EndStatePair(*ends, case.topology, 300.0))
    assert noised_atoms(pairs[0]) == (10,)
    with pytest.raises(InputError, match="unconstrained atom"):
        noised_atoms(pairs[1])


def test_bonded_changes_are_seen_too(folder: Path) -> None:
    case = tiny.case()
    system = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(case.system_0))
    bonds = next(f for f in system.getForces() if isinstance(f, openmm.HarmonicBondForce))
    a, b, r, k = bonds.getBondParameters(0)
    bonds.setBondParameters(0, a, b, r, 1.1 * k)
    pair = EndStatePair(case.system_0, system, case.topology, 300.0)
    found = inputs_from_systems(pair, [folder / "0.dcd", folder / "1.dcd"])
    assert found.atoms == tuple(sorted((a, b)))
    found = inputs_from_systems(pair, [folder / "0.dcd", folder / "1.dcd"], atoms=[4])
    assert found.atoms == (4,)


def test_other_forces_that_differ_ask_for_atoms(folder: Path) -> None:
    case = tiny.case()
    system = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(case.system_0))
    pull = openmm.CustomExternalForce("x")
    pull.addParticle(3)
    system.addForce(pull)
    pair = EndStatePair(case.system_0, system, case.topology, 300.0)
    with pytest.raises(InputError, match=r"atoms: expected the atoms that change.*CustomExternalForce"):
        inputs_from_systems(pair, [folder / "0.dcd", folder / "1.dcd"])
    found = inputs_from_systems(pair, [folder / "0.dcd", folder / "1.dcd"], atoms=[3])
    np.testing.assert_allclose(found.operators[0] * pair.kT, found.frames[0][:, 3, 0], atol=1e-6)


# ----------------------------------------------------------------------------- periodic frames


def a_box(n_waters: int = 60, width: float = 3.0) -> tuple[Any, list[openmm.System], np.ndarray]:
    """An ion whose charge changes, and waters; frames with every atom moved by box vectors."""
    topology = app.Topology()
    chain = topology.addChain()
    atoms = [topology.addAtom("CL", app.element.chlorine, topology.addResidue("LIG", chain))]
    partner = topology.addAtom("C1", app.element.carbon, atoms[0].residue)
    atoms.append(partner)
    for _ in range(n_waters):
        residue = topology.addResidue("HOH", chain)
        atoms += [topology.addAtom(n, app.element.oxygen if n == "O" else app.element.hydrogen, residue)
                  for n in ("O", "H1", "H2")]  # fmt: skip
    systems = []
    for charge in (0.0, -0.5):
        system = openmm.System()
        system.setDefaultPeriodicBoxVectors(*(np.eye(3) * width))
        force = openmm.NonbondedForce()
        force.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
        force.setCutoffDistance(1.0)
        for k, atom in enumerate(atoms):
            system.addParticle(atom.element.mass)
            q = charge if k == 0 else (-0.8 if atom.name == "O" else 0.4)
            force.addParticle(q, 0.3, 0.1)
        system.addForce(force)
        systems.append(system)
    x = np.random.default_rng(3).uniform(0, width, (12, len(atoms), 3))
    x[:, 1] = x[:, 0] + [0.05, 0.1, 0.1]
    return topology, systems, x


def save(x: np.ndarray, topology: Any, path: Path, width: float | None) -> None:
    trajectory = trajectory_of(x, topology)
    if width is not None:
        trajectory.unitcell_vectors = np.tile(np.eye(3) * width, (len(x), 1, 1)).astype(np.float32)
    trajectory.save(str(path))


def test_periodic_images_leave_operator_and_frames_alone(tmp_path: Path) -> None:
    topology, systems, x = a_box()
    pair = EndStatePair(*systems, topology, 300.0)
    moved = x + 3.0 * np.random.default_rng(4).integers(-1, 2, (*x.shape[:2], 1))
    save(x, topology, tmp_path / "a.dcd", 3.0)
    save(moved, topology, tmp_path / "b.dcd", 3.0)
    found = inputs_from_systems(pair, [tmp_path / "a.dcd", tmp_path / "b.dcd"])
    assert found.noised == ("LIG1-CL",)
    assert found.n_atoms == 182
    assert found.frames[0].shape == (12, 2, 3)  # water has no place: its molecules change theirs
    np.testing.assert_allclose(found.operators[0], found.operators[1], atol=2e-3)
    np.testing.assert_allclose(found.operators[0], pair.operator_values(x), atol=2e-3)
    relative = [f[:, 1] - f[:, 0] for f in found.frames]
    np.testing.assert_allclose(relative[0], np.tile([0.05, 0.1, 0.1], (12, 1)), atol=1e-5)
    np.testing.assert_allclose(relative[0], relative[1], atol=1e-5)


def test_a_periodic_system_needs_the_box(tmp_path: Path) -> None:
    topology, systems, x = a_box(4)
    save(x, topology, tmp_path / "a.xyz", None)
    pair = EndStatePair(*systems, topology, 300.0)
    with pytest.raises(InputError, match="box vectors with every frame"):
        inputs_from_systems(pair, [tmp_path / "a.xyz"] * 2)


def test_nearest_images_in_a_triclinic_box() -> None:
    box = np.array([[3.0, 0, 0], [1.0, 2.8, 0], [-1.0, 1.0, 2.6]])
    rng = np.random.default_rng(0)
    x = rng.uniform(-0.5, 0.5, (50, 6, 3))
    moved = x + np.einsum("fai,ij->faj", rng.integers(-2, 3, (50, 6, 3)).astype(float), box)
    found = nearest_images(moved, np.tile(box, (50, 1, 1)), [2])
    np.testing.assert_allclose(found - found[:, [2]], x - x[:, [2]], atol=1e-9)


def test_noised_atoms_all_over_the_box_are_refused() -> None:
    x = np.array([[[0.0, 0, 0], [1.2, 0, 0], [2.1, 0, 0]]])
    with pytest.raises(InputError, match="within a quarter of the box"):
        nearest_images(x, 3.0 * np.eye(3)[None], [0, 1, 2])


def test_of_a_large_molecule_the_nearest_atoms_are_kept(tmp_path: Path) -> None:
    n = MOST_KEPT + 50
    topology = md.Topology()
    residue = topology.add_residue("BIG", topology.add_chain())
    for k in range(n):
        topology.add_atom(f"C{k}", md.element.carbon, residue)
    x = np.zeros((3, n, 3))
    x[:, :, 0] = np.arange(n)[::-1] * 0.1
    md.Trajectory(x, topology).save_dcd(str(tmp_path / "a.dcd"))
    md.Trajectory(x[:1], topology).save_pdb(str(tmp_path / "a.pdb"))
    index = [(float(t), lam) for lam in (0.0, 1.0) for t in range(3)]
    table = pd.DataFrame(
        np.random.default_rng(0).normal(size=(6, 2)), columns=[0.0, 1.0],
        index=pd.MultiIndex.from_tuples(index, names=["time", "lambda"]),
    )  # fmt: skip
    table.attrs = {"temperature": 310.0, "energy_unit": "kT"}
    table.to_parquet(tmp_path / "u_nk.parquet")
    found = inputs_from_table(
        tmp_path / "u_nk.parquet", [tmp_path / "a.dcd"] * 2, tmp_path / "a.pdb", atoms=[n - 1]
    )
    assert found.frames[0].shape == (3, MOST_KEPT, 3)
    assert found.atoms == (MOST_KEPT - 1,)  # the last atom is the first along x
    assert found.frames[0][0, :, 0].max() < 0.1 * MOST_KEPT
    assert found.temperature == 310.0


# ------------------------------------------------------------------------------ runs and tables


def test_a_run_of_windows(run: Path) -> None:
    found = inputs_from_run(run, atoms=[10, 11], skip=2)
    assert found.lams == (0.0, 0.5, 1.0)
    assert [f.shape for f in found.frames] == [(10, 22, 3)] * 3
    exact = tiny.case().pair.operator_values(found.frames[1])
    np.testing.assert_allclose(found.operators[1], exact, atol=0.01)
    assert len(inputs_from_run(run).atoms) == 22


def test_an_expanded_ensemble_has_its_own_names(tmp_path: Path) -> None:
    case = tiny.case()
    run_expanded_ensemble(
        case.pair.linear_system(), case.topology, case.positions, lambda_states(2), temperature=300.0,
        out_dir=tmp_path, n_iterations=30, steps_per_iteration=5, n_adapt=50, n_equil=50, progress=False,
    )  # fmt: skip
    found = inputs_from_run(tmp_path)
    assert sum(len(o) for o in found.operators) == 30
    for x, o in zip(found.frames, found.operators, strict=True):
        np.testing.assert_allclose(o, case.pair.operator_values(x), atol=0.01)


def test_rows_and_frames_must_match(run: Path, tmp_path: Path) -> None:
    paths = [run / f"window_00{k}.dcd" for k in range(3)]
    short = md.load(str(paths[1]), top=str(run / "topology.pdb"))[:-1]
    short.save_dcd(str(tmp_path / "short.dcd"))
    with pytest.raises(InputError, match=r"each of the 12 rows .* at lambda 0.5.* found 11 frames"):
        inputs_from_table(
            run / "u_nk.parquet", [paths[0], tmp_path / "short.dcd", paths[2]], run / "topology.pdb"
        )
    with pytest.raises(InputError, match="expected one for each of 3 states"):
        inputs_from_table(run / "u_nk.parquet", paths[:2], run / "topology.pdb")


# -------------------------------------------------------------------------------------- arrays


def test_arrays(tmp_path: Path) -> None:
    x_0, o_0, x_1, o_1 = tiny.frames()
    np.savez(tmp_path / "a.npz", x_0=x_0, x_1=x_1, o_0=o_0, o_1=o_1, atoms=[10, 11], temperature=298.0)
    found = inputs_from_arrays(tmp_path / "a.npz", skip=1, stride=2)
    np.testing.assert_array_equal(found.operators[1], o_1[1::2])
    assert found.atoms == (10, 11)
    assert found.temperature == 298.0


def test_arrays_with_windows_come_in_the_order_of_lambda(tmp_path: Path) -> None:
    arrays = {f"x_{k}": np.full((3, 1), float(k)) for k in range(3)}
    arrays |= {f"o_{k}": np.full(3, float(k)) for k in range(3)}
    np.savez(tmp_path / "a.npz", lams=[0.0, 1.0, 0.5], **arrays)
    found = inputs_from_arrays(tmp_path / "a.npz")
    assert found.lams == (0.0, 0.5, 1.0)
    assert [o[0] for o in found.operators] == [0.0, 2.0, 1.0]
    np.savez(tmp_path / "b.npz", **arrays)
    with pytest.raises(InputError, match="expected the arrays lams"):
        inputs_from_arrays(tmp_path / "b.npz")


def test_state_operators_are_the_source_of_a_run(run: Path) -> None:
    """The order of trajectories is that of the states."""
    table = state_operators(read_table(run / "u_nk.parquet"))
    found = inputs_from_run(run)
    for ours, theirs in zip(found.operators, table.operators, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_units_of_frames_are_nm(folder: Path) -> None:
    found = inputs_from_systems(tiny.case().pair, [folder / "0.dcd", folder / "1.dcd"])
    bond = np.linalg.norm(found.frames[0][:, 10] - found.frames[0][:, 11], axis=-1)
    assert abs(bond.mean() - (1.09 * unit.angstrom).value_in_unit(unit.nanometer)) < 0.01
