"""Settings from YAML: every key is known, or the file is refused.

Paths in a file are relative to the file.
"""

import difflib
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from .errors import InputError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
# A bound in a field's own Field(...) is lost beside one in its annotation: a type for each bound.
Several = Annotated[int, Field(ge=2)]
Frames = Annotated[int, Field(ge=20)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]

_Model = TypeVar("_Model", bound="Settings")


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys forbidden."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DemoSettings(Settings):
    """How long the demonstration samples.

    Steps are of ``timestep`` [ps]. The defaults take about five minutes on two cores.
    """

    seed: Seed = Field(default=1, description="every random number follows from it")
    timestep: Positive = Field(default=0.001, description="ps")
    friction: Positive = Field(default=1.0, description="1/ps")
    n_frames: Frames = Field(default=3000, description="training frames per end state")
    interval: Count = Field(default=400, description="steps between training frames")
    n_equil: int = Field(default=5000, ge=0, description="steps thrown away before every run")
    n_test: Frames = Field(default=1000, description="held-out frames per end state")
    n_draws: Count = Field(default=2, description="noise draws per frame and noise level in the fit")
    sigma_max: Positive = Field(default=0.05, description="noise at t = 1 [nm]")
    n_windows: Several = Field(default=11, description="lambda windows")
    window_frames: Frames = Field(default=160, description="frames per window")
    window_interval: Count = Field(default=500, description="steps between frames of a window")
    base_frames: Frames = Field(default=400, description="frames of the run on the base action alone")
    base_interval: Count = Field(default=500, description="steps between them")
    n_workers: Count = Field(default=1, description="processes that share the windows; changes no number")

    @classmethod
    def quick(cls, **changes: Any) -> "DemoSettings":
        """Settings that exercise everything in well under a minute; their numbers mean little.

        Examples
        --------
        >>> DemoSettings.quick(seed=3).n_windows
        3
        """
        small = {
            "n_frames": 200,
            "interval": 100,
            "n_equil": 2000,
            "n_test": 100,
            "n_draws": 1,
            "n_windows": 3,
            "window_frames": 120,
            "window_interval": 250,
            "base_frames": 50,
            "base_interval": 50,
        }
        return cls(**{**small, **changes})


class SystemSettings(Settings):
    """Where the classical System comes from: exactly one of the five."""

    alanine: Literal["F1", "Br3", "I3"] | None = Field(
        default=None, description="alanine dipeptide in vacuum, one of the built-in perturbations"
    )
    end_states: tuple[Path, Path] | None = Field(
        default=None, description="two System XML files of the same particles"
    )
    xml: Path | None = Field(default=None, description="one System XML file with its own parameters")
    prmtop: tuple[Path, ...] | None = Field(
        default=None, min_length=1, max_length=2, description="one Amber topology, or two for two end states"
    )
    forcefield: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="OpenMM force-field files, for the PDB file of topology"
    )

    @model_validator(mode="after")
    def _one(self) -> "SystemSettings":
        kinds = ("alanine", "end_states", "xml", "prmtop", "forcefield")
        given = [n for n in kinds if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of {', '.join(kinds)}, found {given or 'none'}")
        return self


class ForceSettings(Settings):
    """A learned force to be added to the System."""

    artefact: Path = Field(description="file written by export_artefact")
    mode: Literal["add", "operator"] = "operator"
    backend: Literal["auto", "torchforce", "python"] = "auto"
    atoms: tuple[int, ...] | None = Field(default=None, description="particles it acts on; all if absent")


class StatesSettings(Settings):
    """Evenly spread lambda states, ``lambda = (k/(n-1))^power``."""

    n: Several = 11
    power: Positive = 1.0


class MoleculeSettings(Settings):
    """The molecule and its dynamics: what :class:`WindowsSettings` and :class:`ProjectSettings` share."""

    system: SystemSettings
    topology: Path | None = Field(default=None, description="PDB file: topology and start; not with alanine")
    restrain_phi: bool = Field(False, description="alanine only: keep phi out of C7ax")
    temperature: Positive = Field(default=300.0, description="K")
    timestep: Positive = Field(default=0.001, description="ps")
    friction: Positive = Field(default=1.0, description="1/ps")
    platform: str | None = Field(default=None, description="OpenMM platform; by size if absent")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.system.alanine is None and self.topology is None:
            raise ValueError("expected topology (a PDB file) beside the System; only alanine brings its own")
        if self.system.alanine is not None and self.topology is not None:
            raise ValueError("topology: alanine brings its own; remove this key")
        if self.system.alanine is None and self.restrain_phi:
            raise ValueError("restrain_phi belongs to alanine")
        return self


class SamplerSettings(Settings):
    """Lambda windows, and the sampler that visits them."""

    states: StatesSettings | list[dict[str, float]] = StatesSettings()
    n_frames: Count = Field(default=600, description="frames per window; expanded: on average")
    interval: Count = Field(default=500, description="steps between frames, and between changes of state")
    n_equil: int = Field(default=10000, ge=0, description="steps thrown away first")
    sampler: Literal["independent", "exchange", "expanded"] = Field(
        default="independent",
        description="independent windows; exchange: of replicas; expanded: one walker through all windows",
    )
    n_adapt: Count = Field(default=1000, description="intervals that adapt the weights (expanded only)")
    n_workers: Count = Field(default=1, description="processes that share the windows (independent only)")

    @model_validator(mode="after")
    def _one_process(self) -> Self:
        if self.sampler != "independent" and self.n_workers > 1:
            raise ValueError(f"n_workers: sampler {self.sampler} runs in one process; set it to 1")
        return self


class WindowsSettings(SamplerSettings, MoleculeSettings):
    """One run of lambda windows; :func:`window_arguments` turns it into arguments."""

    force: ForceSettings | None = None
    n_frames: Count = Field(description="frames per window; expanded: on average")
    seed: Seed = 0
    minimize: bool = True
    trajectory: Literal["dcd", "xtc"] | None = "dcd"
    out_dir: Path

    @model_validator(mode="after")
    def _states_are_named(self) -> Self:
        if self.system.xml is not None and isinstance(self.states, StatesSettings) and not self.force:
            raise ValueError(
                "states: a System from xml has parameters of its own; list the states as "
                "[{parameter: value}, ...]"
            )
        return self


class SampleSettings(Settings):
    """Sampling of the end states, for the fit."""

    n_frames: Frames = Field(default=3000, description="training frames per end state")
    n_test: Frames = Field(default=500, description="frames per end state held out to judge the fit")
    interval: Count = Field(
        default=500, description="steps between frames; as long as they take to decorrelate"
    )
    n_equil: int = Field(default=20000, ge=0, description="steps thrown away first")


class FitSettings(Settings):
    """Fit of base action and operator."""

    sites: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, description="perturbed atoms, from 0; found from the end states if absent"
    )
    sigma_max: Positive = Field(default=0.05, description="noise at t = 1 [nm]")
    n_draws: Count = Field(default=2, description="noise draws per frame and noise level")


class SimulateSettings(Settings):
    """Dynamics with the learned force."""

    mode: Literal["operator", "replace"] = Field(
        default="operator",
        description="operator: beside end state 0; replace: the learned action instead of the force field",
    )
    lam: float = Field(default=0.0, ge=0, le=1, description="lambda")
    integrator: Literal["langevin", "diffusion"] = Field(
        default="langevin", description="diffusion: overdamped, the steps of the diffusion model itself"
    )
    timestep: Positive | None = Field(
        default=None, description="ps; that of the project if absent (diffusion: about 0.00005)"
    )
    friction: Positive | None = Field(
        default=None, description="1/ps; that of the project if absent (diffusion: about 50)"
    )
    n_frames: Count = Field(default=1000, description="frames")
    interval: Count = Field(default=500, description="steps between frames")
    n_equil: int = Field(default=10000, ge=0, description="steps thrown away first")


class ProjectSettings(MoleculeSettings):
    """One molecule from end states to Delta f: what sample, fit, simulate and windows share."""

    timestep: Positive = Field(default=0.001, description="ps; bonds are flexible")
    backend: Literal["auto", "torchforce", "python"] = Field(
        default="auto", description="of the learned force"
    )
    seed: Seed = Field(default=1, description="every random number follows from it")
    trajectory: Literal["dcd", "xtc"] = Field(default="dcd", description="format of the trajectories")
    out_dir: Path = Field(default=Path("runs"), description="folder for everything that is made")
    sample: SampleSettings = SampleSettings()
    fit: FitSettings = FitSettings()
    simulate: SimulateSettings = SimulateSettings()
    windows: SamplerSettings = SamplerSettings()


class BridgeSettings(Settings):
    """The noisy operator bridge: Delta f from frames of two end states, and windows if there are."""

    system: SystemSettings | None = Field(
        default=None, description="both end states, to evaluate O on the frames of trajectories"
    )
    u_nk: Path | None = Field(default=None, description="instead: alchemlyb's u_nk (parquet) of the frames")
    run: Path | None = Field(default=None, description="instead: folder of a run of lambda windows")
    arrays: Path | None = Field(default=None, description="instead: .npz with x_0, x_1 [nm], o_0, o_1 [kT]")
    topology: Path | None = Field(default=None, description="PDB file of the trajectories")
    trajectories: tuple[Path | tuple[Path, ...], ...] | None = Field(
        default=None, min_length=2,
        description="DCD, XTC, PDB or HDF5 for each lambda, or the list of one run's segments",
    )  # fmt: skip
    lams: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        default=(0.0, 1.0), min_length=2, description="lambda of each trajectory (system only)"
    )
    temperature: Positive | None = Field(
        default=None, description="K; u_nk and run know theirs; alanine and arrays: 300 if absent"
    )
    skip: int = Field(default=0, ge=0, description="frames left out at the start of every trajectory")
    stride: Count = Field(default=1, description="every how many frames one is taken")
    atoms: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, min_length=1, description="atoms to noise, from 0; those that change if absent"
    )
    sigmas: tuple[Positive, ...] | None = Field(
        default=None, min_length=1, description="noise levels [nm]; from the frames if absent"
    )
    closure: Literal["density", "tweedie", "gamma", "heads"] = Field(
        default="density", description="how the gap between the states is bridged; heads: a network"
    )
    summary: Literal["splines", "heads"] = Field(
        default="splines", description="what a noised frame is reduced to; heads: a network's work"
    )
    n_copies: Count = Field(default=2, description="noised copies of every frame")
    n_bootstrap: int = Field(default=50, ge=0, description="resamplings behind the error; 0 for none")
    spot: int = Field(
        default=0, ge=0,
        description="noised frames per end for a check by posterior MD, 20 or more; 0 for none (system only)",
    )  # fmt: skip
    spot_sigma: Positive = Field(default=0.06, description="noise of that check, on all atoms [nm]")
    seed: Seed = Field(default=1, description="every random number follows from it")
    out: Path = Field(default=Path("bridge"), description="folder for bridge.json and report.html")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        kinds = ("system", "u_nk", "run", "arrays")
        given = [n for n in kinds if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of {', '.join(kinds)}, found {given or 'none'}")
        kind = given[0]
        if self.spot and kind != "system":
            raise ValueError(
                f"spot: posterior MD needs both Systems; expected system and trajectories, found {kind}"
            )
        if kind in ("run", "arrays"):
            if self.trajectories is not None or self.topology is not None:
                raise ValueError(f"topology, trajectories: {kind} brings its own frames; remove these keys")
            return self
        if self.trajectories is None:
            raise ValueError(f"trajectories: expected one for each state beside {kind}, found none")
        if kind == "system" and len(self.trajectories) != len(self.lams):
            raise ValueError(
                f"trajectories: expected one for each lambda of {list(self.lams)}, found "
                f"{len(self.trajectories)}"
            )
        brings_own = self.system is not None and self.system.alanine is not None
        if self.topology is None and not brings_own:
            raise ValueError(f"topology: expected a PDB file beside {kind}, found none")
        if self.temperature is None and kind == "system" and not brings_own:
            raise ValueError(
                "temperature: expected that of the trajectories [K], found none; O depends on it"
            )
        return self


def load_settings(path: str | os.PathLike[str], kind: type[_Model]) -> _Model:
    """Read a YAML file into settings of one kind.

    Parameters
    ----------
    path : path-like
    kind : type
        E.g. :class:`WindowsSettings`.

    Returns
    -------
    Settings
        Paths made absolute, relative to the file's folder.

    Raises
    ------
    InputError
        If the file cannot be read, is not YAML, or a key is unknown, missing or has a value that
        is not allowed; the message names file, key and what is allowed.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "demo.yaml"
    ...     _ = file.write_text("seed: 7")
    ...     load_settings(file, DemoSettings).seed
    7
    """
    path = Path(path)
    return _settings(kind, _keys_and_values(path), path)


def load_run(path: str | os.PathLike[str]) -> ProjectSettings | WindowsSettings:
    """Read a YAML file of lambda windows, be it a project or one run.

    A project has a section ``sample``, ``fit``, ``simulate`` or ``windows``.

    Raises
    ------
    InputError
        As :func:`load_settings`.
    """
    return _load_project_or(WindowsSettings, Path(path))


def load_bridge(path: str | os.PathLike[str]) -> ProjectSettings | BridgeSettings:
    """Read a YAML file for the bridge, be it a project (with sampled end states) or a bridge's own.

    A project has a section ``sample``, ``fit``, ``simulate`` or ``windows``.

    Raises
    ------
    InputError
        As :func:`load_settings`.
    """
    return _load_project_or(BridgeSettings, Path(path))


_PROJECT_SECTIONS = frozenset({"sample", "fit", "simulate", "windows"})


def _load_project_or(kind: type[_Model], path: Path) -> ProjectSettings | _Model:
    content = _keys_and_values(path)
    if _PROJECT_SECTIONS & set(content):
        return _settings(ProjectSettings, content, path)
    return _settings(kind, content, path)


def _keys_and_values(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise InputError(f"{path}: expected a readable YAML file, found {err.strerror}.") from err
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise InputError(f"{path}: expected YAML, found {' '.join(str(err).split())}.") from err
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys and values, found {type(content).__name__}.")
    return content


def _settings(kind: type[_Model], content: dict[str, Any], path: Path) -> _Model:
    return _absolute(check_settings(kind, content, str(path)), path.resolve().parent)


def check_settings(kind: type[_Model], content: Mapping[str, Any], where: str) -> _Model:
    """Settings from a mapping; ``where`` it comes from stands first in every message.

    Raises
    ------
    InputError
        As :func:`load_settings`.

    Examples
    --------
    >>> check_settings(StatesSettings, {"n": 3}, "here").power
    1.0
    """
    try:
        return kind.model_validate(content)
    except pydantic.ValidationError as err:
        errors = err.errors(include_url=False)
        advice = [_advice(kind, e) for e in errors if _is_meant(e, content)]
        raise InputError("\n".join(f"{where}: {line}" for line in dict.fromkeys(advice))) from err


def _advice(kind: type[BaseModel], error: Any) -> str:
    """One pydantic error as: key, expected, found, and for unknown keys the nearest ones."""
    loc = [str(part) for part in error["loc"] if not _is_union_tag(part)]
    key = ".".join(loc)
    if error["type"] == "extra_forbidden":
        allowed = _keys_at(kind, list(error["loc"][:-1]))
        near = difflib.get_close_matches(str(error["loc"][-1]), allowed, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"{key}: unknown key{hint}; allowed: {', '.join(allowed)}."
    if error["type"] == "missing":
        return f"{key}: expected a value, found none; add this key."
    if error["type"] == "value_error":
        return ": ".join(part for part in (key, f"{error['ctx']['error']}.") if part)
    if error["type"] in ("model_type", "list_type") and key.split(".")[-1] == "states":
        wanted = "{n: 11, power: 1.0} or a list of {parameter: value}"
        return f"{key}: expected {wanted}, found {error['input']!r}."
    if error["type"] in ("too_long", "too_short"):
        bound, n = ("most", "max") if error["type"] == "too_long" else ("least", "min")
        return f"{key}: expected at {bound} {error['ctx'][f'{n}_length']}, found {len(error['input'])}."
    message = error["msg"].removeprefix("Input should be ")
    return f"{key}: expected {message}, found {error['input']!r}."


def _is_meant(error: Any, content: Any) -> bool:
    """Whether an error is of the branch of a union that the value looks like: mapping or list."""
    for part in error["loc"]:
        if _is_union_tag(part):
            return not isinstance(content, dict | list) or isinstance(content, dict) == part.endswith(
                "Settings"
            )
        try:
            content = content[part]
        except (KeyError, IndexError, TypeError):
            return True
    return True


def _is_union_tag(part: Any) -> bool:
    # pydantic names the branch of a union in the location: "StatesSettings", "list[dict[...]]".
    return isinstance(part, str) and (part.endswith("Settings") or "[" in part)


def _keys_at(kind: type[BaseModel], loc: list[Any]) -> list[str]:
    for part in loc:
        if part not in kind.model_fields:
            continue
        for option in _options(kind.model_fields[part].annotation):
            if isinstance(option, type) and issubclass(option, BaseModel):
                kind = option
    return list(kind.model_fields)


def _options(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _absolute(settings: _Model, folder: Path) -> _Model:
    changes: dict[str, Any] = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, Path):
            changes[name] = folder / value
        elif isinstance(value, Settings):
            changes[name] = _absolute(value, folder)
        elif isinstance(value, tuple):
            changes[name] = _absolute_paths(value, folder)
    return settings.model_copy(update=changes)


def _absolute_paths(value: Any, folder: Path) -> Any:
    if isinstance(value, tuple):
        return tuple(_absolute_paths(v, folder) for v in value)
    return folder / value if isinstance(value, Path) else value


@dataclass(frozen=True)
class SystemParts:
    """What :func:`read_system` read.

    Attributes
    ----------
    topology : openmm.app.Topology
    positions : numpy.ndarray, shape (n_atoms, 3)
        [nm].
    system : openmm.System
        End state 0, or the only state.
    pair : EndStatePair or None
        None if there is one state only.
    """

    topology: Any
    positions: Any
    system: Any
    pair: Any


def read_system(
    settings: SystemSettings, topology: Path | None, temperature: float, restrain_phi: bool = False
) -> SystemParts:
    """Build the classical System or the pair of end states that the settings name.

    Systems from ``prmtop`` and ``forcefield`` are built without constraints: without a cutoff,
    or with PME if the topology has a box.

    Raises
    ------
    DiffForceError
        If a file is missing or does not fit the others.
    """
    from openmm import app, unit

    from .alanine import alanine_case
    from .alchemy import EndStatePair

    if settings.alanine is not None:
        case = alanine_case(settings.alanine, restrain_phi=restrain_phi)
        return SystemParts(case.topology, case.positions, case.system_0, case.pair)
    pdb = read_pdb(topology)
    positions = pdb.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    periodic = pdb.topology.getPeriodicBoxVectors() is not None
    options = {
        "nonbondedMethod": app.PME if periodic else app.NoCutoff, "constraints": None, "rigidWater": False
    }  # fmt: skip
    if settings.forcefield is not None:
        try:
            systems = [app.ForceField(*settings.forcefield).createSystem(pdb.topology, **options)]
        except Exception as err:  # as with its other readers
            raise InputError(
                f"{topology}: {' and '.join(settings.forcefield)} cannot describe it ({err})."
            ) from err
    else:
        files: tuple[Any, ...] = settings.prmtop or settings.end_states or (settings.xml,)
        systems = [_read_prmtop(p, options) if settings.prmtop else _read_system(p) for p in files]
        for path, system in zip(files, systems, strict=True):
            if (n := system.getNumParticles()) != pdb.topology.getNumAtoms():
                raise InputError(
                    f"{topology}: expected the {n} atoms of {path}, found {pdb.topology.getNumAtoms()}; "
                    "both must hold the same molecule, with its atoms in the same order."
                )
    pair = EndStatePair(systems[0], systems[1], pdb.topology, temperature) if len(systems) == 2 else None
    return SystemParts(pdb.topology, positions, systems[0], pair)


def _read_prmtop(path: Path, options: dict[str, Any]) -> Any:
    from openmm import app

    try:
        return app.AmberPrmtopFile(str(path)).createSystem(**options)
    except OSError as err:
        raise InputError(f"{path}: expected a readable prmtop file, found {err.strerror}.") from err
    except Exception as err:  # OpenMM's reader raises what its parser happens to meet
        raise InputError(
            f"{path}: expected an Amber prmtop file, found {type(err).__name__}: {err}."
        ) from err


_SOURCES = {
    "alanine": "alanine dipeptide in vacuum, built in: F1, Br3 or I3",
    "end_states": "two System XML files of the same particles: lambda = 0 and 1",
    "prmtop": "one Amber topology, or two for two end states; built without constraints",
    "forcefield": "OpenMM force-field files for the PDB file; built without constraints",
}


def _flow(content: Any) -> str:
    return yaml.safe_dump(content, default_flow_style=True, width=10**6).strip().removesuffix("...").strip()


def bridge_template(source: str, value: Any, topology: str | None) -> str:
    """The text of a commented file for the bridge; arguments as for :func:`project_template`.

    Examples
    --------
    >>> print(bridge_template("alanine", "F1", None).splitlines()[2])
    system: {alanine: F1}  # alanine dipeptide in vacuum, built in: F1, Br3 or I3
    """
    lines = [
        "# Delta F from two end states: diffforce bridge FILE.",
        "# Paths are relative to this file. Keys behind a # follow from the data, or are for another source.",
    ]
    shown: dict[str, Any] = {
        "system": {source: value}, "topology": topology, "trajectories": ["state_0.dcd", "state_1.dcd"],
        "lams": [0.0, 1.0], "temperature": 300.0,
    }  # fmt: skip
    others = {"u_nk": "u_nk.parquet", "run": "windows", "arrays": "frames.npz", "topology": "start.pdb",
              "atoms": [0, 1], "sigmas": [0.003, 0.01, 0.03]}  # fmt: skip
    for name, field in BridgeSettings.model_fields.items():
        text = _SOURCES[source] if name == "system" else field.description
        content = shown.get(name, field.default)
        if content is None:
            lines.append(f"# {name}: {_flow(others[name])}  # {text}")
        else:
            lines.append(f"{name}: {_flow(str(content) if isinstance(content, Path) else content)}  # {text}")
    return "\n".join(lines) + "\n"


def project_template(source: str, value: Any, topology: str | None) -> str:
    """The text of a commented project file: every key, its default, and what it means.

    Parameters
    ----------
    source : {"alanine", "end_states", "prmtop", "forcefield"}
        Where the System comes from, and
    value : str or list of str
        its value.
    topology : str or None
        PDB file.

    Examples
    --------
    >>> print(project_template("alanine", "F1", None).splitlines()[2])
    system: {alanine: F1}  # alanine dipeptide in vacuum, built in: F1, Br3 or I3
    """

    lines = [
        "# A project of openmm_diffforce: diffforce sample, fit, simulate, windows (in this order).",
        "# Paths are relative to this file. Every key may be left out but system and topology.",
    ]
    single = source == "forcefield" or (source == "prmtop" and len(value) == 1)
    for name, field in ProjectSettings.model_fields.items():
        if name == "system":
            lines.append(f"system: {_flow({source: value})}  # {_SOURCES[source]}")
            continue
        if name == "topology":
            if topology is not None:
                lines.append(f"topology: {_flow(topology)}  # {field.description}")
            continue
        if name == "restrain_phi" and source != "alanine":
            continue
        if name == "windows" and single:
            continue
        default = field.default
        if not isinstance(default, Settings):
            shown = str(default) if isinstance(default, Path) else default
            if name == "restrain_phi":
                shown = True
            lines.append(f"{name}: {_flow(shown)}  # {field.description}")
            continue
        lines += ["", f"{name}:  # {(type(default).__doc__ or '').splitlines()[0]}"]
        for key, part in type(default).model_fields.items():
            inner = part.default.model_dump() if isinstance(part.default, Settings) else part.default
            if name == "simulate" and key == "mode" and single:
                inner = "replace"
            text = (
                part.description
                or "evenly spread, lambda = (k/(n-1))^power; or a list of {diffforce_lambda: value}"
            )
            lines.append(f"  {key}: {_flow(inner)}  # {text}")
    return "\n".join(lines) + "\n"


def window_arguments(settings: WindowsSettings) -> dict[str, Any]:
    """Build System, topology, states and the rest: what all samplers take alike.

    Parameters
    ----------
    settings : WindowsSettings

    Returns
    -------
    dict
        ``run_sampler(settings, **window_arguments(settings))`` does the run.

    Raises
    ------
    DiffForceError
        If a file is missing or does not fit the others.
    """
    from .alchemy import lambda_states

    parameter = "lambda"
    parts = read_system(settings.system, settings.topology, settings.temperature, settings.restrain_phi)
    topology, positions = parts.topology, parts.positions
    if parts.pair is None:
        system = parts.system
    else:
        system = parts.system if settings.force else parts.pair.linear_system()
    learned = None
    if settings.force is not None:
        from .force import DiffusionForce

        learned = DiffusionForce(
            settings.force.artefact,
            topology=topology,
            atoms=settings.force.atoms,
            mode=settings.force.mode,
            temperature=settings.temperature,
            backend=settings.force.backend,
        )
        parameter = learned.parameter("lambda")
        system.addForce(learned)
    states = settings.states
    if isinstance(states, StatesSettings):
        states = lambda_states(states.n, states.power, parameter=parameter)
    return {
        "system": system,
        "topology": topology,
        "positions": positions,
        "states": states,
        "learned": learned,
        **settings.model_dump(
            include={
                "temperature", "n_equil", "timestep", "friction", "platform", "seed", "minimize",
                "trajectory", "out_dir",
            }
        ),
    }  # fmt: skip


def read_pdb(path: Path | None) -> Any:
    """An ``openmm.app.PDBFile``.

    Raises
    ------
    InputError
        If it cannot be read, or a coordinate is not finite.
    """
    import numpy as np
    from openmm import app

    try:
        with open(path or "", encoding="utf-8") as stream:  # OpenMM leaves open what it cannot read
            pdb = app.PDBFile(stream)
    except OSError as err:
        raise InputError(f"{path}: expected a readable PDB file, found {err.strerror}.") from err
    except Exception as err:  # OpenMM's reader raises what its parser happens to meet
        raise InputError(
            f"{path}: expected a PDB file with atoms, found one that cannot be read ({err})."
        ) from err
    if pdb.topology.getNumAtoms() == 0:
        raise InputError(f"{path}: expected a PDB file with atoms, found none.")
    x = np.array(pdb.getPositions(asNumpy=True)._value)
    if not np.isfinite(x).all():
        atom = list(pdb.topology.atoms())[int(np.argwhere(~np.isfinite(x))[0][0])]
        raise InputError(
            f"{path}: expected finite coordinates, found {x[atom.index].tolist()} nm for atom {atom.index} "
            f"({atom.name} of {atom.residue.name} {atom.residue.id})."
        )
    return pdb


def _read_system(path: Path | None) -> Any:
    import openmm

    assert path is not None
    try:
        system = openmm.XmlSerializer.deserialize(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise InputError(f"{path}: expected a readable System XML, found {err.strerror}.") from err
    except (openmm.OpenMMException, ValueError) as err:
        raise InputError(f"{path}: expected an OpenMM System as XML, found {err}.") from err
    if not isinstance(system, openmm.System):
        raise InputError(f"{path}: expected a System, found a {type(system).__name__}.")
    return system
