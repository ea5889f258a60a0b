"""The indole benchmark's Systems against the scripts of its structures, and a window of it."""

import json
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import openmm as mm
import pytest

from openmm_diffforce.constants import LAMBDA
from openmm_diffforce.errors import InputError
from openmm_diffforce.systems import constrained_atoms, require_unconstrained

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import indole_sample
from indole_systems import (
    VARIANTS,
    IndoleCase,
    compare_with_scripts,
    data_folder,
    indole_case,
    sampling_system,
)

SCRIPT_TOLERANCE = 1e-5
"""[kJ/mol]."""
ROUNDING = 1e-7
"""[kJ/mol], of sums over a pocket."""


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return data_folder()
    except InputError as err:
        pytest.skip(f"needs the structures of 185L: {err}")


def distorted(case: IndoleCase, n: int) -> np.ndarray:
    """Frames with every moving atom moved a little, and the site where it belongs."""
    x = np.repeat(case.positions[None, list(case.moving)], n, axis=0)
    return case.frames(x + 0.005 * np.random.default_rng(3).standard_normal(x.shape))


@pytest.mark.parametrize("name", VARIANTS)
def test_energies_are_those_of_the_scripts_and_linear(name: str, folder: Path) -> None:
    case = indole_case(name, folder)
    found = compare_with_scripts(case, folder, distorted(case, 3))
    assert found["operator"] < SCRIPT_TOLERANCE
    assert found["energy"] < SCRIPT_TOLERANCE
    assert max(found[k] for k in ("sampling", "linear", "constant")) < ROUNDING
    assert found["mass"] == found["constraints"] == 0


def test_noise_acts_on_unconstrained_moving_atoms(folder: Path) -> None:
    flexible, rigid = indole_case("c6_bonded", folder), indole_case("r6_clX", folder)
    names = {a.index: a.name for a in flexible.topology.atoms()}
    assert {"C6", "H6"} <= {names[i] for i in flexible.noised if i in flexible.ligand}
    assert not set(flexible.noised) & set(constrained_atoms(flexible.system_h))
    assert len(flexible.moving) == 201
    assert rigid.noised == rigid.ligand
    assert len(rigid.moving) == len(rigid.ligand) + 1 == 17
    for case in (flexible, rigid):
        require_unconstrained(case.system_h, case.noised)


def test_windows_keep_the_operator_of_their_frames(folder: Path, tmp_path: Path) -> None:
    case = indole_case("r6_nbX", folder)
    (tmp_path / "r6_nbX.xml").write_text(mm.XmlSerializer.serialize(sampling_system(case)))
    np.save(tmp_path / "r6_nbX.npy", case.positions)
    settings = {
        "parameter": LAMBDA, "lams": [0.0, 0.5, 1.0], "temperature": 300.0, "timestep_ps": 0.002,
        "friction_per_ps": 2.0, "moving": list(case.moving), "n_equil": 50, "interval": 5,
        "n_frames": 20, "n_frames_end": 25, "delay": 0,
    }  # fmt: skip
    (tmp_path / "cases.json").write_text(json.dumps({"r6_nbX": settings}))
    over = indole_sample.run_window(tmp_path, tmp_path, "r6_nbX", 1, 0, settings, time.time() - 1)
    assert "not begun" in over
    assert len(indole_sample.jobs({"r6_nbX": settings}, 1, tmp_path)) == 3
    indole_sample.sample(tmp_path, tmp_path, seeds=1)
    assert indole_sample.jobs({"r6_nbX": settings}, 1, tmp_path) == []
    indole_sample.pack(tmp_path, tmp_path / "packed")
    with zipfile.ZipFile(tmp_path / "packed" / "r6_nbX.zip") as archive:
        assert archive.namelist() == [f"r6_nbX_s1_{k:02d}.npz" for k in range(3)]
    with np.load(indole_sample.window_path(tmp_path, "r6_nbX", 1, 1)) as between:
        assert between["operator"].shape == (20,)
        assert "x" not in between
    with np.load(indole_sample.window_path(tmp_path, "r6_nbX", 1, 2)) as end:
        assert end["x"].shape == (25, 17, 3)
        exact = case.pair.operator_values(case.frames(end["x"]))
        np.testing.assert_allclose(end["operator"], exact, rtol=1e-3, atol=1e-3)


def test_missing_structures_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"185l_indole/.* not found"):
        data_folder(tmp_path)
