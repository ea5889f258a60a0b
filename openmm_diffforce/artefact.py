"""The artefact: one file that holds a model and everything needed to trust and use it.

The file is a zip archive with ``model.pt`` (TorchScript) and ``metadata.json``; the archive's
comment is the SHA-256 of all bytes before it, so a change of any byte is found on loading.
"""

import contextlib
import hashlib
import io
import json
import os
import platform
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import __version__, ops
from .errors import InputError, ModelError
from .models.action import ActionModel, AutogradAction
from .models.examine import Examination, examine_model, made_up_frames
from .models.graph import MolecularGraph
from .schedule import NoiseSchedule, schedule_from_json
from .units import thermal_energy, to_md

FORMAT_VERSION = 1
"""Version of the file format; other versions are refused."""

_DIGEST = 64  # hex characters of a SHA-256
_UNITS = {"length": "nm", "energy": "kJ/mol", "action": "kT", "temperature": "K"}
_REQUIRED = frozenset({
    "format_version", "units", "elements", "atom_names", "bonds", "bonds_hash", "schedule",
    "temperature", "lambda_range", "dtype", "conservative", "modes", "versions", "training",
})  # fmt: skip


@dataclass(frozen=True)
class Artefact:
    """A loaded artefact.

    Attributes
    ----------
    model : torch.jit.ScriptModule
        With ``forward`` and ``fields`` of the model contract.
    metadata : dict
        The content of ``metadata.json``.
    sha256 : str
        Digest of the file.
    path : pathlib.Path
    """

    model: torch.jit.ScriptModule
    metadata: dict[str, Any]
    sha256: str
    path: Path

    @property
    def graph(self) -> MolecularGraph:
        """Elements, bonds and names of the molecule the model was trained on."""
        m = self.metadata
        return MolecularGraph(
            tuple(m["elements"]), tuple((i, j) for i, j in m["bonds"]), tuple(m["atom_names"])
        )

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule."""
        return schedule_from_json(json.dumps(self.metadata["schedule"]))

    @property
    def temperature(self) -> float:
        """Temperature of the training ensembles [K]."""
        return float(self.metadata["temperature"])


def export_artefact(
    model: torch.nn.Module,
    path: str | os.PathLike[str],
    *,
    graph: MolecularGraph,
    schedule: NoiseSchedule,
    temperature: Any,
    training: dict[str, Any] | None = None,
    lambda_range: Sequence[float] = (0.0, 1.0),
    frames: Any = None,
) -> str:
    """Write a model to one file, after an examination.

    Parameters
    ----------
    model : torch.nn.Module
        An :class:`~openmm_diffforce.models.action.ActionModel` with ``fields``, a
        :class:`~openmm_diffforce.models.action.ScoreModel`, or any module with the signature of
        the action, which is wrapped in :class:`~openmm_diffforce.models.action.AutogradAction`.
        Compiled with ``torch.jit.script``.
    path : path-like
        Written to a temporary name beside it and renamed.
    graph : MolecularGraph
        The molecule, in the model's atom order.
    schedule : VESchedule or VPSchedule
    temperature : float [K] or Quantity
    training : dict, optional
        JSON-ready record of the fit.
    lambda_range : pair of float
        Lambda values the model is valid for.
    frames : float array [n_frames, n_atoms, 3], optional
        Equilibrium frames of the base state [nm] on which the model is examined (units too);
        without them it is examined at a made-up geometry, taken downhill on its own action.
        Give frames where you have them. What was found is kept in the file
        (``metadata["examination"]``).

    Returns
    -------
    str
        SHA-256 of the file.

    Raises
    ------
    ModelError
        If the model does not compile, gives another shape or NaN, is not invariant under
        translation and rotation, or mixes the frames of a batch.
    NotConservativeError
        If its gradient is not the derivative of its action.
    InputError
        If the metadata is not JSON, or the frames are unusable.
    """
    from openmm import unit

    thermal_energy(temperature)
    path = Path(path)
    if getattr(type(model), "fields", ActionModel.fields) is ActionModel.fields:
        model = AutogradAction(model, has_operator=bool(getattr(model, "has_operator", True)))
    try:
        script = torch.jit.script(model.eval())
    except Exception as err:
        raise ModelError(
            f"export: expected a model that compiles in TorchScript, found {type(model).__name__} "
            f"which does not ({_compiler_says(err)}); write it in TorchScript's part of Python, or "
            "pass it through torch.jit.trace first."
        ) from err
    if not hasattr(script, "fields"):
        raise ModelError(
            f"export: expected {type(model).__name__}.fields to be compiled, found it left out; "
            "decorate it with @torch.jit.export."
        )
    dtypes = {b.dtype for b in model.buffers() if b.is_floating_point()}
    dtypes |= {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(dtypes) > 1:
        raise ModelError(f"export: expected one floating-point dtype in the model, found {dtypes}.")
    dtype = dtypes.pop() if dtypes else torch.float64
    examination = _examine(script, graph, frames)
    metadata = {
        "format_version": FORMAT_VERSION,
        "units": _UNITS,
        "elements": list(graph.elements),
        "atom_names": list(graph.names),
        "bonds": [list(b) for b in graph.bonds],
        "bonds_hash": graph.bonds_hash(),
        "schedule": json.loads(schedule.to_json()),
        "temperature": float(to_md(temperature, unit.kelvin)),
        "lambda_range": [float(v) for v in lambda_range],
        "dtype": str(dtype).removeprefix("torch."),
        "conservative": bool(getattr(model, "conservative", True)),
        "examination": examination.to_dict(),
        "modes": ["add", "operator"] if bool(getattr(model, "has_operator", True)) else ["add"],
        "versions": {"openmm_diffforce": __version__, "torch": torch.__version__,
                     "python": platform.python_version()},
        "training": training or {},
    }  # fmt: skip
    try:
        text = json.dumps(metadata, indent=1, allow_nan=False)
    except (TypeError, ValueError) as err:
        raise InputError(f"training record: expected JSON-ready values, found otherwise ({err}).") from err
    weights = io.BytesIO()
    torch.jit.save(script, weights)
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        # Without dates: the same content is the same file.
        archive.writestr(zipfile.ZipInfo("metadata.json"), text)
        archive.writestr(zipfile.ZipInfo("model.pt"), weights.getvalue(), zipfile.ZIP_DEFLATED)
        archive.comment = b"0" * _DIGEST
    content = body.getvalue()[:-_DIGEST]
    digest = hashlib.sha256(content).hexdigest()
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content + digest.encode())
        os.replace(temporary, path)
    except OSError as err:
        with contextlib.suppress(OSError):  # it may be the folder that is missing
            temporary.unlink()
        raise ModelError(f"export: cannot write {path} ({err}); the old file, if any, is intact.") from err
    return digest


def _compiler_says(err: Exception) -> str:
    """TorchScript's complaint in one line: what, and at which line of the user's source."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    where = next((line for line in lines if line.startswith("File ")), "")
    code = [lines[k - 1] for k, line in enumerate(lines) if "<--- HERE" in line and k > 0]
    return " ".join([f"{type(err).__name__}: {lines[0] if lines else ''}", where, *code[:1]]).strip()


def _examine(script: torch.jit.ScriptModule, graph: MolecularGraph, frames: Any) -> Examination:
    """What the examination says of the compiled model; a failure is an error."""
    n_atoms = graph.n_atoms
    if frames is None:
        examination = examine_model(script, made_up_frames(script, graph))
        advice = (
            " It was examined at a made-up geometry: with equilibrium frames of the molecule "
            "(frames=..., --frames) the examination says more."
        )
    else:
        if (shape := np.shape(frames))[1:] != (n_atoms, 3):
            raise InputError(f"frames: expected shape [n_frames, {n_atoms}, 3] in nm, found {list(shape)}.")
        examination, advice = examine_model(script, frames, equilibrium=True), ""
    examination.raise_for_failures("export", advice)
    return examination


def read_metadata(path: str | os.PathLike[str]) -> tuple[dict[str, Any], bytes, str]:
    """Check a file and return its metadata, the TorchScript bytes and the digest.

    Raises
    ------
    ModelError
        If the file is missing, truncated, altered, foreign, or of another format version.
    """
    path = Path(path)
    advice = "export the model again, or fetch an intact copy"
    try:
        content = path.read_bytes()
    except OSError as err:
        raise ModelError(f"artefact {path}: cannot be read ({err.strerror}).") from err
    if not content.startswith(b"PK") or len(content) <= _DIGEST:
        raise ModelError(
            f"artefact {path}: expected a file written by export_artefact, found another kind of file."
        )
    digest = content[-_DIGEST:].decode("ascii", "replace")
    if hashlib.sha256(content[:-_DIGEST]).hexdigest() != digest:
        raise ModelError(
            f"artefact {path}: the content does not match its SHA-256 (truncated, altered, or not "
            f"written by export_artefact); {advice}."
        )
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            metadata = json.loads(archive.read("metadata.json"))
            weights = archive.read("model.pt")
    except (zipfile.BadZipFile, KeyError, ValueError) as err:
        raise ModelError(f"artefact {path}: not a readable artefact ({err}); {advice}.") from err
    if not isinstance(metadata, dict):
        raise ModelError(
            f"artefact {path}: expected metadata with names, found {type(metadata).__name__}; {advice}."
        )
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise ModelError(
            f"artefact {path}: expected format version {FORMAT_VERSION}, found {version!r}; "
            "export the model again with this version of openmm_diffforce."
        )
    if missing := sorted(_REQUIRED - set(metadata)):
        raise ModelError(f"artefact {path}: metadata lacks {', '.join(missing)}; {advice}.")
    if metadata["units"] != _UNITS:
        raise ModelError(f"artefact {path}: expected units {_UNITS}, found {metadata['units']}.")
    return metadata, weights, digest


def load_artefact(path: str | os.PathLike[str]) -> Artefact:
    """Load and check an artefact.

    Raises
    ------
    ModelError
        If the file is missing, truncated, altered, foreign, of another format version, or its
        model does not load in this torch.
    MissingDependencyError
        If the compiled library is not installed.
    """
    metadata, weights, digest = read_metadata(path)
    ops.load()
    try:
        model = torch.jit.load(io.BytesIO(weights), map_location="cpu")
    except RuntimeError as err:
        raise ModelError(
            f"artefact {path}: torch {torch.__version__} cannot load the model that torch "
            f"{metadata['versions'].get('torch')} wrote ({str(err).splitlines()[0]})."
        ) from err
    for parameter in model.parameters():  # else every evaluation builds a graph for training
        parameter.requires_grad_(False)
    artefact = Artefact(model, metadata, digest, Path(path).resolve())
    if artefact.graph.bonds_hash() != metadata["bonds_hash"]:
        raise ModelError(f"artefact {path}: bonds and their hash disagree; export the model again.")
    return artefact
