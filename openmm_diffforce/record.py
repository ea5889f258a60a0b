"""What was run: versions, seeds, settings, file hashes; and files that a crash cannot halve."""

import contextlib
import hashlib
import json
import math
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError

RECORD_FORMAT = 1
"""Version of the record's layout."""

PACKAGES = (
    "openmm-diffforce",
    "openmm",
    "torch",
    "openmmtorch",
    "numpy",
    "scipy",
    "pandas",
    "pymbar",
    "alchemlyb",
    "mdtraj",
)
"""Packages whose versions a result depends on."""


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages a result depends on; None if not installed.

    Examples
    --------
    >>> versions()["numpy"] is not None
    True
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def plain(value: Any) -> Any:
    """Turn dataclasses, arrays, numpy numbers and paths into what JSON holds.

    Numbers that JSON lacks (NaN, infinity) become None.

    Raises
    ------
    InputError
        For an object of another kind.

    Examples
    --------
    >>> plain({"a": np.float64(1.0), "b": (1, float("nan"))})
    {'a': 1.0, 'b': [1, None]}
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    raise InputError(
        f"record: expected numbers, text, lists, mappings or dataclasses, found "
        f"{type(value).__name__}; give it a to_dict() and pass that."
    )


def settings_hash(settings: Mapping[str, Any]) -> str:
    """sha256 of settings, independent of the order of keys.

    Examples
    --------
    >>> settings_hash({"a": 1, "b": 2}) == settings_hash({"b": 2, "a": 1})
    True
    """
    text = json.dumps(plain(settings), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: str | os.PathLike[str]) -> str:
    """sha256 of a file.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as err:
        raise InputError(f"{path}: expected a readable file, found {err.strerror}.") from err


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` that is renamed to it when the block ends well.

    What a crash leaves is the old file or the new one, never half of one.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     target = Path(folder) / "a.txt"
    ...     with atomic_path(target) as part:
    ...         _ = part.write_text("whole")
    ...     target.read_text()
    'whole'
    """
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}.", suffix=target.suffix)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        # mkstemp makes the file private; the final one gets what open() would have given it.
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        part.replace(target)
    except OSError as err:
        err.add_note(f"While writing {target}; the old file, if there was one, is intact.")
        raise
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON atomically (:func:`plain` first); keys keep their order."""
    text = json.dumps(plain(value), indent=2, allow_nan=False)
    with atomic_path(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    InputError
        If the file cannot be read or does not hold one.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as err:
        raise InputError(f"{path}: expected a readable file, found {err.strerror}.") from err
    except ValueError as err:
        raise InputError(f"{path}: expected JSON, found something else ({err}).") from err
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def make_record(
    what: str,
    settings: Mapping[str, Any],
    *,
    seed: int | None = None,
    files: Mapping[str, str | os.PathLike[str]] | None = None,
) -> dict[str, Any]:
    """What was run, as a JSON-ready mapping.

    Parameters
    ----------
    what : str
        Name of the run.
    settings : mapping
        Everything that determines it.
    seed : int, optional
    files : mapping, optional
        name -> path of inputs and outputs; their sha256 is recorded, not their path.

    Returns
    -------
    dict
        ``format``, ``what``, ``versions``, ``machine``, ``seed``, ``settings``,
        ``settings_sha256``, ``files_sha256``.

    Raises
    ------
    InputError
        If a file cannot be read or a setting cannot be written as JSON.

    Examples
    --------
    >>> make_record("demo", {"n": 3}, seed=1)["settings"]
    {'n': 3}
    """
    return {
        "format": RECORD_FORMAT,
        "what": what,
        "versions": versions(),
        "machine": {"system": platform.system(), "processor": platform.machine()},
        "seed": seed,
        "settings": plain(settings),
        "settings_sha256": settings_hash(settings),
        "files_sha256": {name: file_hash(path) for name, path in (files or {}).items()},
    }
