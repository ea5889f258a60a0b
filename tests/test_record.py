from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from openmm_diffforce import record
from openmm_diffforce.errors import InputError


def test_atomic_path_leaves_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write_half() -> None:
        with record.atomic_path(target) as part:
            part.write_text("half")
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        write_half()
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    with record.atomic_path(target) as part:
        part.write_text("new")
    assert target.read_text() == "new"


def test_json_round_trip_of_what_results_hold(tmp_path: Path) -> None:
    @dataclass
    class Result:
        value: np.ndarray
        flag: np.bool_

    path = tmp_path / "r.json"
    record.write_json(path, {"r": Result(np.array([1.0, np.inf]), np.bool_(True)), "p": tmp_path})
    assert record.read_json(path) == {"r": {"value": [1.0, None], "flag": True}, "p": str(tmp_path)}


def test_settings_hash_sees_every_change() -> None:
    base = record.settings_hash({"a": 1.0, "b": [1, 2]})
    assert base != record.settings_hash({"a": 1.0 + 1e-15, "b": [1, 2]})
    assert base != record.settings_hash({"a": 1.0, "b": [2, 1]})


def test_record_holds_hashes_and_versions(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("abc")
    made = record.make_record("x", {"n": 1}, seed=7, files={"input": path})
    assert made["files_sha256"]["input"].startswith("ba7816bf")
    assert made["versions"]["openmm"]
    assert made["seed"] == 7
    assert str(tmp_path) not in str(made)


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_bad_json_is_said(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(InputError, match="expected"):
        record.read_json(path)


def test_missing_and_foreign() -> None:
    with pytest.raises(InputError, match="readable"):
        record.file_hash("no-such-file")
    with pytest.raises(InputError, match="readable"):
        record.read_json("no-such-file")
    with pytest.raises(InputError, match="to_dict"):
        record.plain(object())
