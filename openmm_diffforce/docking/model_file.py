"""One file that holds a docking model and everything needed to trust and use it.

A zip archive with ``tables.npz`` and ``metadata.json``; the archive's comment is the SHA-256 of all bytes
before it, so that a change of any byte is found on loading.
"""

import hashlib
import io
import json
import os
import platform
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import InputError, ModelError
from ..record import atomic_path, plain
from .complex import RESIDUES
from .residual import N_OWN, N_SHAPE, HiddenLayer, Residual
from .residue_model import N_TYPES, SITES, ResidueModel
from .rigid import RigidSchedule

KIND = "diffforce-docking"
"""What ``metadata["kind"]`` says."""

FORMAT_VERSION = 2
"""Version of the file format; other versions are refused."""

_DIGEST = 64
_RESIDUAL = "residual_"
"""What the names of a network's arrays begin with; a file without them holds the closed form alone."""
_UNITS = {"length": "nm", "angle": "rad", "energy": "kT"}
_REQUIRED = frozenset({
    "kind", "format_version", "units", "residues", "sites", "schedule", "versions", "training",
})  # fmt: skip


def _sites() -> dict[str, list[float]]:
    return {name: [s.low, s.step, s.n] for name, s in SITES.items()}


def save_docking_model(model: ResidueModel, path: str | os.PathLike[str]) -> str:
    """Write a model to one file.

    Parameters
    ----------
    model : ResidueModel
    path : path-like
        Written to a temporary name beside it and renamed.

    Returns
    -------
    str
        SHA-256 of the content.

    Raises
    ------
    ModelError
        If a table is not finite, the residual is no network of this package, or the file cannot be written.
    """
    arrays = {"sigmas": model.sigmas, "lengths": model.lengths, **model.tables}
    if isinstance(model.residual, Residual):
        arrays |= {
            _RESIDUAL + k: v for k, v in {**vars(model.residual.hidden), "out": model.residual.out}.items()
        }
    elif model.residual is not None:
        raise ModelError(
            f"docking model: expected a Residual or none, found {type(model.residual).__name__}, which this "
            "file format does not hold."
        )
    if bad := [k for k, v in arrays.items() if not np.isfinite(v).all()]:
        raise ModelError(f"docking model: expected finite numbers, found others in {', '.join(bad)}.")
    metadata = {
        "kind": KIND, "format_version": FORMAT_VERSION, "units": _UNITS, "residues": list(RESIDUES),
        "sites": _sites(), "schedule": json.loads(model.schedule.to_json()),
        "training": plain(model.metadata),
        "versions": {"openmm_diffforce": __version__, "numpy": np.__version__,
                     "python": platform.python_version()},
    }  # fmt: skip
    tables, body = io.BytesIO(), io.BytesIO()
    np.savez(tables, allow_pickle=False, **{k: np.asarray(v) for k, v in arrays.items()})
    with zipfile.ZipFile(body, "w") as archive:
        # Without dates: the same content is the same file.
        archive.writestr(zipfile.ZipInfo("metadata.json"), json.dumps(metadata, indent=1, allow_nan=False))
        archive.writestr(zipfile.ZipInfo("tables.npz"), tables.getvalue(), zipfile.ZIP_DEFLATED)
        archive.comment = b"0" * _DIGEST
    content = body.getvalue()[:-_DIGEST]
    digest = hashlib.sha256(content).hexdigest()
    try:
        with atomic_path(path) as part:
            part.write_bytes(content + digest.encode())
    except OSError as err:
        raise ModelError(
            f"docking model: cannot write {path} ({err}); the old file, if any, is intact."
        ) from err
    return digest


def is_docking_model(path: str | os.PathLike[str]) -> bool:
    """Whether a file says that it is one; it may still be damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read("metadata.json")).get("kind") == KIND
    except (
        OSError,
        zipfile.BadZipFile,
        KeyError,
        ValueError,
        AttributeError,
        RuntimeError,
        NotImplementedError,
    ):
        return False


def read_docking_file(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Metadata, arrays and digest of a file that passed the checks.

    Raises
    ------
    ModelError
        If it is missing, truncated, altered, foreign, or of another version.
    """
    advice = "write the model again with diffforce dock-fit, or fetch an intact copy"
    try:
        content = Path(path).read_bytes()
    except OSError as err:
        raise ModelError(f"docking model {path}: cannot be read ({err.strerror}).") from err
    if not content.startswith(b"PK") or len(content) <= _DIGEST:
        raise ModelError(
            f"docking model {path}: expected a file written by diffforce dock-fit, found another kind of "
            "file."
        )
    digest = content[-_DIGEST:].decode("ascii", "replace")
    if hashlib.sha256(content[:-_DIGEST]).hexdigest() != digest:
        raise ModelError(
            f"docking model {path}: the content does not match its SHA-256 (truncated or altered); {advice}."
        )
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            metadata = json.loads(archive.read("metadata.json"))
            if not isinstance(metadata, dict) or metadata.get("kind") != KIND:
                raise ModelError(
                    f"docking model {path}: expected a docking model, found the artefact of a molecule; "
                    "diffforce inspect says what it holds."
                )
            with np.load(io.BytesIO(archive.read("tables.npz")), allow_pickle=False) as kept:
                arrays = {name: kept[name] for name in kept.files}
    except (zipfile.BadZipFile, KeyError, ValueError) as err:
        raise ModelError(f"docking model {path}: not readable ({err}); {advice}.") from err
    if (version := metadata.get("format_version")) != FORMAT_VERSION:
        raise ModelError(
            f"docking model {path}: expected format version {FORMAT_VERSION}, found {version!r}; write it "
            "again with this version of openmm_diffforce."
        )
    if missing := sorted(_REQUIRED - set(metadata)):
        raise ModelError(f"docking model {path}: metadata lacks {', '.join(missing)}; {advice}.")
    for name, want in (("units", _UNITS), ("residues", list(RESIDUES)), ("sites", _sites())):
        if metadata[name] != want:
            raise ModelError(
                f"docking model {path}: expected {name} {want}, found {metadata[name]}; {advice}."
            )
    return metadata, arrays, digest


def load_docking_model(path: str | os.PathLike[str]) -> ResidueModel:
    """Load and check a docking model; ``metadata["sha256"]`` is its digest.

    Raises
    ------
    ModelError
        If the file is missing, truncated, altered, foreign, of another version, or inconsistent.
    """
    metadata, arrays, digest = read_docking_file(path)
    try:
        sigmas = arrays["sigmas"]
        n = len(sigmas)
        shapes: dict[str, tuple[int, ...]] = {"sigmas": (n,), "lengths": (N_TYPES,)} | {
            name: (n, N_TYPES, N_TYPES, s.n) for name, s in SITES.items()
        }
        residual = None
        if any(name.startswith(_RESIDUAL) for name in arrays):
            hidden = HiddenLayer(*(arrays[_RESIDUAL + f.name] for f in fields(HiddenLayer)))
            residual, width = Residual(hidden, arrays[_RESIDUAL + "out"]), hidden.bias.size
            inner = {"shape": (N_SHAPE, width), "first": (N_OWN, width), "second": (N_OWN, width),
                     "bias": (width,), "out": (n, width)}  # fmt: skip
            shapes |= {_RESIDUAL + k: v for k, v in inner.items()}
        if bad := [k for k, shape in shapes.items() if arrays[k].shape != shape]:
            raise ModelError(f"docking model {path}: expected other shapes of {', '.join(bad)}.")
        schedule = RigidSchedule.from_json(json.dumps(metadata["schedule"]))
    except (KeyError, TypeError, InputError) as err:
        raise ModelError(f"docking model {path}: its parts do not belong together ({err}).") from err
    return ResidueModel(
        sigmas, {s: arrays[s] for s in SITES}, arrays["lengths"], schedule,
        {**metadata["training"], "sha256": digest, "versions": metadata["versions"]}, residual,
    )  # fmt: skip
