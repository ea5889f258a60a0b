"""The artefact: what goes in comes out, and any other file is refused."""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openmm import unit

from openmm_diffforce.artefact import FORMAT_VERSION, export_artefact, load_artefact, read_metadata
from openmm_diffforce.errors import InputError, ModelError
from openmm_diffforce.models.action import ActionModel
from openmm_diffforce.models.graph import MolecularGraph
from openmm_diffforce.schedule import VESchedule

from . import tiny

WATER = MolecularGraph(("O", "H", "H"), ((0, 1), (0, 2)), ("OW", "HW1", "HW2"))


class Springs(ActionModel):
    """A model of the contract that is not PhysicalModel: S = k |x - mean|^2 (1 + lam) / 2."""

    def __init__(self, stiffness: float = 2.0) -> None:
        super().__init__()
        self.register_buffer("stiffness", torch.tensor(stiffness, dtype=torch.float64))

    def forward(self, x: torch.Tensor, t: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(1, keepdim=True)
        return 0.5 * self.stiffness * (1 + lam) * (x * x).sum((1, 2))

    @torch.jit.export
    def fields(
        self, x: torch.Tensor, t: torch.Tensor, lam: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = x - x.mean(1, keepdim=True)
        square = 0.5 * self.stiffness * (x * x).sum((1, 2))
        return square * (1 + lam), self.stiffness * x * (1 + lam)[:, None, None], square


def export(path: Path, model: torch.nn.Module | None = None, **options: Any) -> str:
    options = {"graph": WATER, "schedule": VESchedule(0.03), "temperature": 298.15, **options}
    return export_artefact(Springs() if model is None else model, path, **options)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    export(tmp_path / "water.diffforce", training={"seed": 3})
    return tmp_path / "water.diffforce"


def rewrite(path: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Change an artefact's members and give it the digest that belongs to them."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
        archive.comment = b"0" * 64
    content = body.getvalue()[:-64]
    path.write_bytes(content + hashlib.sha256(content).hexdigest().encode())


def edit_metadata(path: Path, **changes: Any) -> None:
    def change(members: dict[str, bytes]) -> None:
        metadata = json.loads(members["metadata.json"])
        for key, value in changes.items():
            if value is ...:
                del metadata[key]
            else:
                metadata[key] = value
        members["metadata.json"] = json.dumps(metadata).encode()

    rewrite(path, change)


# ------------------------------------------------------------------ round trip


@pytest.mark.parametrize("kind", ["VE", "VP"])
def test_round_trip_of_a_fitted_model(tmp_path, kind):
    model = tiny.model(kind)
    sha256 = export_artefact(
        model, tmp_path / "m", graph=tiny.graph(), schedule=tiny.SCHEDULES[kind], temperature=300.0
    )
    artefact = load_artefact(tmp_path / "m")
    assert artefact.sha256 == sha256
    assert artefact.graph == tiny.graph()
    assert artefact.schedule == tiny.SCHEDULES[kind]
    assert artefact.temperature == 300.0
    x = torch.as_tensor(tiny.frames()[0][:4])
    t = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)
    lam = torch.tensor([0.0, 0.3, 1.0, 0.5], dtype=torch.float64)
    for name in ("fields", "increment_fields"):
        for found, expected in zip(
            getattr(artefact.model, name)(x, t, lam), getattr(model, name)(x, t, lam), strict=True
        ):
            assert torch.equal(found, expected)
    assert torch.equal(artefact.model(x, t, lam), model(x, t, lam))


def test_any_model_of_the_contract(path):
    model = load_artefact(path).model
    x = torch.arange(9, dtype=torch.float64).reshape(1, 3, 3)
    half = torch.tensor([0.5], dtype=torch.float64)
    assert float(model.fields(x, half, half)[0]) == float(Springs()(x, half, half)) == 81.0


def test_metadata_says_everything(path):
    metadata = load_artefact(path).metadata
    assert metadata["format_version"] == FORMAT_VERSION
    assert metadata["units"] == {"length": "nm", "energy": "kJ/mol", "action": "kT", "temperature": "K"}
    assert metadata["elements"] == ["O", "H", "H"]
    assert metadata["atom_names"] == ["OW", "HW1", "HW2"]
    assert metadata["bonds"] == [[0, 1], [0, 2]]
    assert metadata["bonds_hash"] == WATER.bonds_hash()
    assert metadata["schedule"] == {"schedule": "VESchedule", "sigma_max": 0.03}
    assert metadata["temperature"] == 298.15
    assert metadata["lambda_range"] == [0.0, 1.0]
    assert metadata["dtype"] == "float64"
    assert metadata["conservative"] is True
    assert metadata["modes"] == ["add", "operator"]
    assert metadata["training"] == {"seed": 3}
    assert metadata["versions"]["torch"] == torch.__version__
    assert set(metadata["versions"]) == {"openmm_diffforce", "torch", "python"}
    assert str(path.parent) not in json.dumps(metadata)  # no machine paths in a file that travels


def test_temperature_may_be_a_quantity(tmp_path):
    export(tmp_path / "m", temperature=300 * unit.kelvin)
    assert load_artefact(tmp_path / "m").temperature == 300.0
    with pytest.raises(InputError, match="temperature"):
        export(tmp_path / "m", temperature=300 * unit.nanometer)
    with pytest.raises(InputError, match="temperature"):
        export(tmp_path / "m", temperature=0.0)


def test_a_model_without_operator_says_so(tmp_path):
    path = tiny.export(tmp_path / "base", operator=False)
    assert load_artefact(path).metadata["modes"] == ["add"]


def test_same_content_is_the_same_file(tmp_path, path):
    again = export(tmp_path / "again", training={"seed": 3})
    assert again == load_artefact(path).sha256
    assert path.read_bytes() == (tmp_path / "again").read_bytes()
    assert export(tmp_path / "other", training={"seed": 4}) != again
    assert export(tmp_path / "other", Springs(2.1), training={"seed": 3}) != again


def test_float32_models_say_so(tmp_path):
    export(tmp_path / "single", Springs().float())
    assert load_artefact(tmp_path / "single").metadata["dtype"] == "float32"


# ------------------------------------------------------------------ damage


def test_every_changed_byte_is_found(path):
    content = path.read_bytes()
    generator = np.random.default_rng(17)
    places = {0, 1, len(content) - 1, len(content) - 64, len(content) - 65}
    places |= set(generator.integers(0, len(content), 60).tolist())
    for place in sorted(places):
        damaged = bytearray(content)
        damaged[place] ^= int(generator.integers(1, 256))
        path.write_bytes(bytes(damaged))
        with pytest.raises(ModelError, match=r"SHA-256|another kind"):
            load_artefact(path)
    path.write_bytes(content)
    load_artefact(path)


def test_truncated_and_lengthened_files(path):
    content = path.read_bytes()
    lengths = [0, 1, 3, 64, 65, 200, len(content) // 2, len(content) - 64, len(content) - 1]
    for piece in [content[:n] for n in lengths] + [content + b"\0", content + content]:
        path.write_bytes(piece)
        with pytest.raises(ModelError, match=r"SHA-256|another kind"):
            load_artefact(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK", b"PK\x03\x04" + b"x" * 500, bytes(range(256)) * 4])
def test_foreign_files(tmp_path, content):
    (tmp_path / "foreign").write_bytes(content)
    with pytest.raises(ModelError, match="foreign"):
        load_artefact(tmp_path / "foreign")


def test_a_plain_torchscript_file_is_foreign(tmp_path):
    torch.jit.save(torch.jit.script(Springs()), tmp_path / "model.pt")
    with pytest.raises(ModelError, match="not written by export_artefact"):
        load_artefact(tmp_path / "model.pt")


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ModelError, match=r"none.*No such file"):
        load_artefact(tmp_path / "none")
    with pytest.raises(ModelError, match=r"cannot be read"):
        load_artefact(tmp_path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_format_versions(path, version):
    edit_metadata(path, format_version=version)
    with pytest.raises(ModelError, match="expected format version 1, found"):
        load_artefact(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": ...}, "metadata lacks temperature"),
        ({"schedule": ..., "elements": ...}, "metadata lacks elements, schedule"),
        ({"units": {"length": "A"}}, "expected units"),
        ({"bonds": [[0, 1]]}, "bonds and their hash disagree"),
        ({"elements": ["S", "H", "H"]}, "bonds and their hash disagree"),
    ],
)
def test_inconsistent_metadata(path, changes, message):
    edit_metadata(path)
    load_artefact(path)  # the rewriting itself is harmless
    edit_metadata(path, **changes)
    with pytest.raises(ModelError, match=message):
        load_artefact(path)


@pytest.mark.parametrize("member", ["metadata.json", "model.pt"])
def test_missing_members(path, member):
    rewrite(path, lambda members: members.pop(member))
    with pytest.raises(ModelError, match=member):
        load_artefact(path)


def test_unreadable_members(path):
    rewrite(path, lambda members: members.update({"model.pt": b"not TorchScript"}))
    assert read_metadata(path)[1] == b"not TorchScript"
    with pytest.raises(ModelError, match="cannot load the model"):
        load_artefact(path)
    rewrite(path, lambda members: members.update({"metadata.json": b"{"}))
    with pytest.raises(ModelError, match="not a readable artefact"):
        load_artefact(path)


@pytest.mark.parametrize("text", [b"[]", b"3", b'"text"', b"null"])
def test_metadata_of_another_shape(path, text):
    rewrite(path, lambda members: members.update({"metadata.json": text}))
    with pytest.raises(ModelError, match="artefact"):
        load_artefact(path)


# ------------------------------------------------------------------ export


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(ModelError, match="No space left"):
            export(path, Springs(9.0))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_crash_while_writing_leaves_the_old_file(path, monkeypatch):
    before = path.read_bytes()
    write = Path.write_bytes

    def half(self: Path, content: bytes) -> int:
        write(self, content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(KeyboardInterrupt):
        export(path, Springs(9.0))
    assert path.read_bytes() == before


def test_folders_that_are_not_there(tmp_path):
    with pytest.raises(ModelError, match="cannot write"):
        export(tmp_path / "missing" / "m.diffforce")
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot write"):
        export(tmp_path / "file" / "m.diffforce")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelError, match="cannot write"):
        export(tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


class WrongShape(Springs):
    @torch.jit.export
    def fields(
        self, x: torch.Tensor, t: torch.Tensor, lam: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return x.sum((1, 2)), x[:, :1], lam


class NotFinite(Springs):
    @torch.jit.export
    def fields(
        self, x: torch.Tensor, t: torch.Tensor, lam: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return x.sum((1, 2)), x / 0.0, lam


class Failing(Springs):
    @torch.jit.export
    def fields(
        self, x: torch.Tensor, t: torch.Tensor, lam: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return x.sum((1, 2)), x.reshape(-1, 7), lam


class Uncompilable(Springs):
    def forward(self, x, t, lam):  # type: ignore[no-untyped-def]
        return np.linalg.norm(x, axis=(1, 2))


class FieldsNotExported(ActionModel):
    def forward(self, x: torch.Tensor, t: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
        return x.sum((1, 2))

    def fields(
        self, x: torch.Tensor, t: torch.Tensor, lam: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return x.sum((1, 2)), torch.ones_like(x), torch.zeros_like(lam)


class TwoDtypes(Springs):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("other", torch.zeros(1, dtype=torch.float32))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (WrongShape, r"expected dS/dx of shape \(2, 3, 3\), found \(2, 1, 3\)"),
        (NotFinite, "dS/dx is not finite"),
        (Failing, "failed on frames"),
        (Uncompilable, "expected a model that compiles in TorchScript, found Uncompilable"),
        (FieldsNotExported, "@torch.jit.export"),
        (TwoDtypes, "one floating-point dtype"),
    ],
)
def test_models_that_break_the_contract(tmp_path, model, message):
    with pytest.raises(ModelError, match=message):
        export(tmp_path / "m", model())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("training", [{"x": object()}, {"x": float("nan")}, {"x": np.zeros(2)}])
def test_training_record_must_be_json(tmp_path, training):
    with pytest.raises(InputError, match="training record"):
        export(tmp_path / "m", training=training)
