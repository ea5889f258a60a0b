"""The command line: ``diffforce --help``.

Heavy imports happen inside the commands, so that help is instant and a broken installation can
still be examined with ``diffforce doctor``.
"""

import contextlib
import errno
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from . import __version__
from .errors import DiffForceError

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}
"""A disk that is full, forbidden or broken: no error of this package, and no traceback."""

STYLES = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red"}


class _Commands(TyperGroup):
    """Turns the package's own errors into one message on stderr and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DiffForceError as err:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"diffforce: {err}{_notes(err)}", err=True)
            raise typer.Exit(1) from err
        except OSError as err:
            if err.errno not in DISK_ERRORS or ctx.params.get("debug"):
                raise
            where = f" ({err.filename})" if err.filename else ""
            typer.echo(
                f"diffforce: {err.strerror or err}{where}; what was finished is kept: see to the disk, and "
                f"call the same command again.{_notes(err)}",
                err=True,
            )
            raise typer.Exit(1) from err
        except KeyboardInterrupt as err:
            typer.echo(f"diffforce: {str(err) or 'stopped'}", err=True)
            raise typer.Exit(130) from err


def _notes(err: BaseException) -> str:
    return "".join(f"\n{note}" for note in getattr(err, "__notes__", []))


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="A diffusion model of a molecule, used as a force in OpenMM.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"openmm_diffforce {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """A diffusion model of a molecule, used as a force in OpenMM."""
    # pymbar advertises JAX and warns about its own method on every import.
    logging.getLogger("pymbar").setLevel(logging.ERROR)


def main() -> None:
    """Entry point of the ``diffforce`` command."""
    # A user wants the sentence, not the line of this package that said it.
    warnings.showwarning = lambda message, *_args, **_kwargs: typer.echo(f"diffforce: {message}", err=True)
    app()


def _console() -> Console:
    # Piped output is 80 columns wide, as rich does for no terminal; a terminal has its own width.
    # What stands in brackets is text, as in "f [kT]" or a folder's name, not markup.
    return Console(highlight=False, markup=False)


Quiet = Annotated[bool, typer.Option("--quiet", help="The result alone: no progress bars, no advice.")]
AsJson = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")]

# ---------------------------------------------------------------------------------------- demo


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that is made.")] = Path("demo"),
    config: Annotated[Path | None, typer.Option(help="YAML file with settings of the demonstration.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Under a minute; the numbers mean little.")] = False,
    seed: Annotated[int | None, typer.Option(help="Every random number follows from it.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that share the windows; two if there are two cores.")
    ] = None,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train on alanine dipeptide, run lambda windows, write a report (about five minutes)."""
    from .config import DemoSettings, check_settings, load_settings
    from .demo import run_demo
    from .errors import InputError
    from .report import report_from_record

    if config is not None and quick:
        raise InputError("demo: expected --config or --quick, found both; quick has settings.")
    if config is not None:
        settings = load_settings(config, DemoSettings)
    else:
        settings = DemoSettings.quick() if quick else DemoSettings()
    if seed is not None:
        settings = check_settings(DemoSettings, {**settings.model_dump(), "seed": seed}, "--seed")
    if workers is not None or config is None:
        workers = workers or min(2, os.cpu_count() or 1)
        settings = check_settings(DemoSettings, {**settings.model_dump(), "n_workers": workers}, "--workers")
    record = run_demo(out, settings=settings, progress=progress and not (quiet or as_json))
    page = record.parent / "report.html"
    if not page.exists():
        page = report_from_record(record)
    if as_json:
        typer.echo(record.read_text(encoding="utf-8"))
        return
    if not quiet:
        _print_record(record)
    typer.echo(f"\nReport: {page}\nRecord: {record}")


def _print_record(path: Path) -> None:
    """Verdict, Delta f and checks of a record, in the terminal."""
    from .record import read_json
    from .report import check_record, with_error

    record, console = check_record(read_json(path)), _console()
    if record.checks:
        table = Table("", "check", "found", "asked for", title="Checks", title_justify="left")
        for check in record.checks:
            found = f"{check.value:.4g}" if isinstance(check.value, float) else str(check.value)
            table.add_row(
                Text(check.status, STYLES[check.status]),
                Text(check.name),
                Text("n/a" if check.value is None else found),
                Text(check.threshold),
            )
        console.print(table)
    if record.headline:
        value = with_error(record.headline.value, record.headline.error)
        console.print(Text(f"Delta f = {value} kT ({record.headline.method})", "bold"))
    verdict = record.overall()
    console.print(Text(verdict.status, STYLES[verdict.status]), Text(verdict.text))


# -------------------------------------------------------------------------------------- doctor


@dataclass(frozen=True)
class Finding:
    """One line of ``diffforce doctor``.

    Attributes
    ----------
    name : str
    status : {"PASS", "WARN", "FAIL"}
        FAIL only for what the base installation needs.
    found : str
    cure : str
        Command or sentence that mends it.
    """

    name: str
    status: str
    found: str
    cure: str = ""


def _python() -> Finding:
    return Finding("Python", "PASS", f"{platform.python_version()}, {platform.machine()}")


def _openmm() -> Finding:
    import openmm

    count = openmm.Platform.getNumPlatforms()
    names = [openmm.Platform.getPlatform(k).getName() for k in range(count)]
    version = openmm.Platform.getOpenMMVersion()
    found = f"{version}; platforms: {', '.join(names)}"
    if "Reference" not in names:
        return Finding("OpenMM", "FAIL", found, "pip install --force-reinstall openmm")
    if not hasattr(openmm, "PythonForce"):
        return Finding("OpenMM", "FAIL", found, "pip install 'openmm>=8.6.1,<8.7'")
    # A platform for hardware that is absent fails to load: normal, not an error.
    return Finding("OpenMM", "PASS", found)


def _torch() -> Finding:
    import torch

    numbers = tuple(int(v) for v in torch.__version__.split("+")[0].split(".")[:2])
    if numbers < (2, 9):
        return Finding("PyTorch", "FAIL", torch.__version__, "pip install 'torch>=2.9'")
    return Finding("PyTorch", "PASS", torch.__version__)


def _library() -> Finding:
    import torch

    from . import ops

    ops.load()
    # A bond of 0.13 nm on a spline whose coefficients are all 1: action 1, no force.
    x = torch.tensor([[[0.0, 0.0, 0.0], [0.13, 0.0, 0.0]]], dtype=torch.float64)
    arguments = {
        "atoms": torch.tensor([[0, 1, -1, -1]]),
        "cls": torch.tensor([0]),
        "kind": torch.tensor([ops.DISTANCE]),
        "grid": torch.tensor([[[0.1, 0.02, 0.0]]] * 2, dtype=torch.float64),
        "offsets": torch.tensor([0, 6]),
        "coef": torch.ones(2, 6, dtype=torch.float64),
        "sigma_knots": torch.tensor([0.0, 0.05], dtype=torch.float64),
    }
    value, gradient, _ = ops.internal_action(x, torch.zeros(1, dtype=torch.float64), **arguments)
    if abs(value.item() - 1.0) > 1e-12 or gradient.abs().max() > 1e-9:
        return Finding(
            "compiled library",
            "FAIL",
            f"{ops.library_path().name} loads but computes {value.item()} instead of 1",
            "build it again: pip install --force-reinstall --no-deps .",
        )
    return Finding("compiled library", "PASS", f"{ops.library_path().name} loads and computes")


def _torchforce() -> Finding:
    from .force import available_backends

    state = available_backends()["torchforce"]
    if state == "ok":
        return Finding("backend torchforce", "PASS", "openmmtorch imports")
    return Finding(
        "backend torchforce",
        "WARN",
        f"not usable ({state.split(';')[0]}); backend python works without it",
        "pip install 'openmm-diffforce[torchforce]' (openmmtorch 1.5 needs torch 2.9)",
    )


def _python_backend() -> Finding:
    from .force import available_backends

    state = available_backends()["python"]
    if state == "ok":
        return Finding("backend python", "PASS", "OpenMM's PythonForce is there")
    return Finding("backend python", "FAIL", state, "pip install 'openmm>=8.6.1,<8.7'")


def _analysis() -> Finding:
    import alchemlyb
    import mdtraj
    import pymbar

    modules = (pymbar, alchemlyb, mdtraj)
    found = ", ".join(f"{m.__name__} {getattr(m, '__version__', '?')}" for m in modules)
    return Finding("analysis", "PASS", found)


def _gpu() -> Finding:
    import openmm
    import torch

    platforms = {openmm.Platform.getPlatform(k).getName() for k in range(openmm.Platform.getNumPlatforms())}
    if not torch.cuda.is_available():
        return Finding("GPU", "PASS", "none for PyTorch; everything runs on the CPU")
    name = torch.cuda.get_device_name(0)
    if not platforms & {"CUDA", "HIP", "OpenCL"}:
        return Finding("GPU", "WARN", f"{name}, but OpenMM has no GPU platform",
                       "pip install 'openmm[cuda12]'")  # fmt: skip
    return Finding("GPU", "PASS", name)


def _nvcc() -> Finding:
    path = shutil.which("nvcc")
    if path is None:
        return Finding("CUDA compiler", "PASS", "none; only needed to build the CUDA kernels")
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    last = text.strip().splitlines()[-1] if text.strip() else "no version"
    return Finding("CUDA compiler", "PASS", last)


EXAMINATIONS: tuple[tuple[str, Callable[[], Finding], str], ...] = (
    ("Python", _python, ""),
    ("OpenMM", _openmm, "pip install 'openmm>=8.6.1,<8.7'"),
    ("PyTorch", _torch, "pip install 'torch>=2.9'"),
    ("compiled library", _library, "build it: pip install . in a clone of openmm_diffforce"),
    ("backend python", _python_backend, "pip install 'openmm>=8.6.1,<8.7'"),
    ("backend torchforce", _torchforce, "pip install 'openmm-diffforce[torchforce]'"),
    ("analysis", _analysis, "pip install pymbar alchemlyb mdtraj"),
    ("GPU", _gpu, ""),
    ("CUDA compiler", _nvcc, ""),
)
"""Name, examination, cure if it cannot even be carried out."""


def examine() -> list[Finding]:
    """Look at every part of the installation; an examination that fails is a finding."""
    out = []
    for name, look, cure in EXAMINATIONS:
        try:
            out.append(look())
        except Exception as err:  # whatever is broken here is the answer that was asked for
            first = str(err).splitlines()[0] if str(err) else type(err).__name__
            status = "WARN" if name in ("GPU", "CUDA compiler", "backend torchforce") else "FAIL"
            out.append(Finding(name, status, first, cure))
    return out


@app.command()
def doctor(quiet: Quiet = False, as_json: AsJson = False) -> None:
    """What is installed, what works, and the cure for what does not."""
    findings = examine()
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
        raise typer.Exit(any(finding.status == "FAIL" for finding in findings))
    table = Table("", "part", "found", title=f"openmm_diffforce {__version__}", title_justify="left")
    for finding in findings:
        table.add_row(Text(finding.status, STYLES[finding.status]), Text(finding.name), Text(finding.found))
    console = _console()
    if not quiet:
        console.print(table)
    for finding in findings:
        if finding.cure:
            console.print(Text(f"{finding.name}: {finding.cure}"), soft_wrap=True)
    if any(finding.status == "FAIL" for finding in findings):
        console.print(Text("The base installation does not work.", STYLES["FAIL"]))
        raise typer.Exit(1)
    console.print("The base installation works.")


# ------------------------------------------------------------------------------------- inspect


@app.command()
def inspect(
    artefact: Annotated[Path, typer.Argument(help="Model file, written by fit, export or export_artefact.")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """What a model file holds; a damaged or foreign one is refused."""
    from .artefact import load_artefact
    from .docking.model_file import is_docking_model

    if is_docking_model(artefact):
        _inspect_docking(artefact, quiet, as_json)
        return
    loaded = load_artefact(artefact)
    if as_json:
        typer.echo(json.dumps({**loaded.metadata, "sha256": loaded.sha256}, indent=1))
        return
    if quiet:
        typer.echo(loaded.sha256)
        return
    m = loaded.metadata
    low, high = m["lambda_range"]
    schedule = dict(m["schedule"])
    kind = schedule.pop("schedule")
    table = Table("", "", title=str(artefact), title_justify="left", show_header=False)
    rows = {
        "format": str(m["format_version"]),
        "SHA-256": loaded.sha256,
        "modes": ", ".join(m["modes"]),
        "temperature": f"{m['temperature']:g} K",
        "noise schedule": f"{kind}({', '.join(f'{k}={v:g}' for k, v in schedule.items())})",
        "lambda": f"{low:g} to {high:g}",
        "numbers": m["dtype"],
        "units": ", ".join(f"{k} {v}" for k, v in m["units"].items()),
        "written by": ", ".join(f"{k} {v}" for k, v in m["versions"].items()),
        "atoms": f"{len(m['elements'])}, {len(m['bonds'])} bonds (hash {m['bonds_hash'][:12]}...)",
        "order of atoms": " ".join(
            f"{i}:{e}({n})" if n else f"{i}:{e}"
            for i, (e, n) in enumerate(zip(m["elements"], m["atom_names"], strict=True))
        ),
    }
    if m["training"]:
        frames, seed = m["training"].get("n_frames"), m["training"].get("seed")
        rows["training"] = (
            f"{m['training'].get('model', 'model')}, frames {frames}, seed {seed} "
            "(--json prints the whole record)"
        )
    for name, text in rows.items():
        table.add_row(Text(name), Text(text, overflow="fold"))
    _console().print(table)


def _inspect_docking(path: Path, quiet: bool, as_json: bool) -> None:
    """The same for a docking model."""
    from .docking.model_file import read_docking_file

    metadata, arrays, digest = read_docking_file(path)
    if as_json:
        typer.echo(json.dumps({**metadata, "sha256": digest}, indent=1))
        return
    if quiet:
        typer.echo(digest)
        return
    training = metadata["training"]
    settings = training.get("settings", {})
    table = Table("", "", title=str(path), title_justify="left", show_header=False)
    for name, text in {
        "kind": metadata["kind"],
        "format": str(metadata["format_version"]),
        "SHA-256": digest,
        "noise levels": ", ".join(f"{s:g} nm" for s in arrays["sigmas"]),
        "distances": ", ".join(metadata["sites"]),
        "network residual": f"{len(arrays['residual_bias'])} units" if "residual_bias" in arrays else "none",
        "units": ", ".join(f"{k} {v}" for k, v in metadata["units"].items()),
        "written by": ", ".join(f"{k} {v}" for k, v in metadata["versions"].items()),
        "fitted to": ", ".join(training.get("trained_on", [])),
        "fit": ", ".join(
            f"{k} {settings[k]}"
            for k in ("ridge", "decoy_weight", "n_noised", "network_weight")
            if k in settings
        ),
    }.items():
        table.add_row(Text(name), Text(text, overflow="fold"))
    _console().print(table)


# ------------------------------------------------------------- one's own molecule, stage by stage

Project = Annotated[Path, typer.Argument(help="Project file; diffforce init writes a commented one.")]


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="Project file to write.")] = Path("project.yaml"),
    topology: Annotated[Path | None, typer.Option(help="PDB file: topology and start.")] = None,
    end_states: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two System XML files of the same particles.")
    ] = None,
    prmtop: Annotated[
        list[Path] | None, typer.Option(help="Amber topology; twice for two end states.")
    ] = None,
    forcefield: Annotated[
        list[str] | None, typer.Option(help="OpenMM force-field file for the PDB file; repeat for more.")
    ] = None,
    for_bridge: Annotated[
        bool, typer.Option("--bridge", help="A file for diffforce bridge: you have trajectories already.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a commented project file for your own molecule (or for alanine dipeptide)."""
    from .config import (
        BridgeSettings,
        ProjectSettings,
        SystemSettings,
        bridge_template,
        check_settings,
        load_settings,
        project_template,
        read_system,
    )
    from .errors import InputError
    from .record import atomic_path

    given = {"end_states": end_states, "prmtop": prmtop, "forcefield": forcefield}
    named = [k for k, v in given.items() if v]
    if len(named) > 1:
        options = ", ".join("--" + k.replace("_", "-") for k in named)
        raise InputError(f"init: expected one source of the System, found {options}.")
    if named and topology is None:
        raise InputError("init: expected --topology (a PDB file) beside the System, found none.")
    if topology is not None and not named:
        raise InputError(
            "init: expected --end-states, --prmtop or --forcefield beside --topology, found none."
        )
    if file.exists():
        raise InputError(f"{file}: exists already; choose another name or remove it.")
    folder = file.resolve().parent

    def seen_from_file(path: Any) -> str:
        return os.path.relpath(Path(path).resolve(), folder)

    source: Any = "F1"
    if named:
        # Files that are missing or do not fit are found here, not after the file was edited.
        parts = read_system(
            check_settings(SystemSettings, {named[0]: given[named[0]]}, "init"), topology, 300.0
        )
        if for_bridge and parts.pair is None:
            raise InputError("init: expected two end states for a bridge, found one System.")
        source = [v if named[0] == "forcefield" else seen_from_file(v) for v in given[named[0]] or ()]
    template = bridge_template if for_bridge else project_template
    text = template(
        named[0] if named else "alanine", source, None if topology is None else seen_from_file(topology)
    )
    try:
        with atomic_path(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as err:
        raise InputError(f"{file}: cannot be written ({err.strerror}).") from err
    load_settings(file, BridgeSettings if for_bridge else ProjectSettings)
    if as_json:
        typer.echo(json.dumps({"bridge" if for_bridge else "project": str(file)}, indent=1))
        return
    typer.echo(file)
    if not quiet and for_bridge:
        typer.echo(f"Now: name your trajectories in it, then diffforce bridge {file}")
    elif not quiet:
        typer.echo(f"Now: diffforce sample {file}")


@app.command()
def sample(project: Project, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Sample the end states; call it again to go on after a Ctrl-C or a crash."""
    from .config import ProjectSettings, load_settings
    from .project import sample_project

    run = sample_project(load_settings(project, ProjectSettings), progress=not (quiet or as_json))
    then = f"diffforce fit {project}"
    if len(run.states) == 2:
        then += f", or diffforce bridge {project} (Delta f from these frames)"
    _say_run(run, then, quiet, as_json)


@app.command()
def fit(project: Project, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Fit base action and operator to the sampled frames, and write the model file."""
    from .config import ProjectSettings, load_settings
    from .project import fit_project

    settings = load_settings(project, ProjectSettings)
    console = Console(stderr=True, quiet=quiet or as_json)
    with console.status("score matching and regression"):
        path, quality = fit_project(settings)
    if as_json:
        typer.echo(json.dumps({"model": str(path), **quality}, indent=1))
        return
    table = Table("held-out R^2", "found", title=str(path), title_justify="left")
    for key, text in (("force_r2", "force"), ("action_r2", "base action"), ("operator_r2", "operator"),
                      ("operator_gradient_r2", "gradient of the operator")):  # fmt: skip
        if key in quality:
            table.add_row(text, f"{quality[key]:.4f}")
    _console().print(table)
    if not quiet:
        typer.echo(f"Now: diffforce simulate {project}, or diffforce windows {project}")


@app.command()
def export(
    module: Annotated[Path, typer.Argument(help="TorchScript file (torch.jit.save) of your module.")],
    out: Annotated[Path, typer.Argument(help="Model file to write.")],
    topology: Annotated[Path, typer.Option(help="PDB file of the molecule, in the module's order of atoms.")],
    temperature: Annotated[float, typer.Option(help="Of the training ensembles, in K.")],
    sigma_max: Annotated[float, typer.Option(help="Noise at t = 1 of the VE schedule, in nm.")] = 0.05,
    score: Annotated[
        bool, typer.Option("--score", help="module(x, t) -> score: a force, never an energy.")
    ] = False,
    operator: Annotated[bool, typer.Option(help="Whether the action depends on lambda.")] = True,
    frames: Annotated[
        Path | None, typer.Option(help="Trajectory of equilibrium frames to examine the model on.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Make a model file of your own module(x, t, lam) -> S; it is examined first."""
    import numpy as np

    from .analysis import load_trajectory
    from .artefact import export_artefact, load_artefact
    from .config import read_pdb
    from .models.action import AutogradAction, ScoreModel, load_module
    from .models.examine import Examination
    from .schedule import VESchedule
    from .systems import graph_from_topology

    loaded = load_module(module)
    model = ScoreModel(loaded) if score else AutogradAction(loaded, has_operator=operator)
    x = None if frames is None else load_trajectory(frames, topology).xyz.astype(np.float64)
    export_artefact(
        model, out, graph=graph_from_topology(read_pdb(topology).topology), schedule=VESchedule(sigma_max),
        temperature=temperature, training={"model": str(module)}, frames=x,
    )  # fmt: skip
    found = load_artefact(out).metadata["examination"]
    if as_json:
        typer.echo(json.dumps({"model": str(out), "examination": found}, indent=1))
        return
    if not quiet:
        typer.echo(str(Examination.from_dict(found)))
    typer.echo(out)


@app.command()
def energy(
    artefact: Annotated[Path, typer.Argument(help="Model file, written by fit, export or export_artefact.")],
    frames: Annotated[Path, typer.Argument(help="Trajectory: anything that mdtraj reads.")],
    topology: Annotated[Path, typer.Option(help="PDB file of the molecule, in the model's order of atoms.")],
    method: Annotated[
        str,
        typer.Option(
            help="action (the model's own S at no noise), flow, stratonovich, ito, backward_ito, mmse."
        ),
    ] = "action",
    steps: Annotated[
        int | None, typer.Option(help="Noise steps; by default as many as the method needs.")
    ] = None,
    paths: Annotated[int | None, typer.Option(help="Paths per frame, where the method draws them.")] = None,
    probes: Annotated[
        int | None, typer.Option(help="Hutchinson probes for the divergence; by default it is exact.")
    ] = None,
    sigma_min: Annotated[float, typer.Option(help="Noise at which to begin, in nm.")] = 0.0,
    prior: Annotated[
        Path | None,
        typer.Option(help="Trajectory whose moments the prior has; by default the frames themselves."),
    ] = None,
    lam: Annotated[float, typer.Option("--lambda", help="Alchemical coordinate of the model.")] = 0.0,
    reference_frame: Annotated[int | None, typer.Option(help="Frame whose energy is zero.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="For kJ/mol, in K; by default that of the model.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Every random number follows from it.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Table to write: .csv or .parquet.")] = None,
    insist: Annotated[
        bool, typer.Option("--insist", help="Take p_T for a Gaussian even where the noise ends too early.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Energies of frames under a model, -ln p_0 or its action, as a table."""
    from .analysis import load_trajectory
    from .artefact import load_artefact
    from .config import read_pdb
    from .energy import METHODS, action_energy, energies_of_model
    from .errors import InputError
    from .systems import graph_from_topology

    if method not in ("action", *METHODS):
        raise InputError(f"--method: expected one of action, {', '.join(METHODS)}, found {method!r}.")
    if out is not None and out.suffix not in (".csv", ".parquet"):
        raise InputError(f"--out: expected a name that ends in .csv or .parquet, found {out}.")
    loaded = load_artefact(artefact)
    graph = graph_from_topology(read_pdb(topology).topology)
    if (graph.elements, graph.bonds_hash()) != (loaded.graph.elements, loaded.graph.bonds_hash()):
        raise InputError(
            f"{topology}: expected the molecule of {artefact} ({loaded.graph.n_atoms} atoms, elements and "
            f"bonds in its order), found another ({graph.n_atoms} atoms); diffforce inspect {artefact} "
            "lists them."
        )
    x = load_trajectory(frames, topology).xyz
    if method == "action":
        result = action_energy(loaded, x, lam=lam)
    else:
        moments = None if prior is None else load_trajectory(prior, topology).xyz
        with _stages(quiet or as_json) as progress:
            result = energies_of_model(
                loaded, x, method=method, n_steps=steps, n_paths=paths, n_probes=probes, sigma_min=sigma_min,
                prior_frames=moments, lam=lam, seed=seed, insist=insist,
                progress=lambda done, total: progress(method, done, total),
            )  # fmt: skip
    kelvin = loaded.temperature if temperature is None else temperature
    table = result.to_frame(temperature=kelvin, reference=reference_frame)
    if out is not None:
        result.write(out, temperature=kelvin, reference=reference_frame)
    if as_json:
        from .record import plain

        rows = {name: [None if v != v else v for v in table[name].tolist()] for name in table}
        typer.echo(json.dumps(plain({**table.attrs, "table": str(out) if out else None, **rows}), indent=1))
        return
    if out is not None:
        typer.echo(out)
    if quiet and out is not None:
        return
    _print_energies(table, quiet)


MOST_ROWS = 20
"""Frames of a table that are shown; a file has them all."""


def _print_energies(table: Any, quiet: bool) -> None:
    console = _console()
    a = table.attrs
    zero = "" if a["reference_frame"] is None else f", zero at frame {a['reference_frame']}"
    shown = Table(title=f"{a['method']}: energies of {len(table)} frames{zero}", title_justify="left")
    for name in ("frame", "E [kT]", "E [kJ/mol]", "error [kT]", "steps [kT]"):
        shown.add_column(Text(name), justify="right")
    for number, row in table.head(MOST_ROWS).iterrows():
        values = [row[c] for c in ("standard_error_kT", "discretisation_kT")]
        cells = ["-" if v != v else f"{v:.2g}" for v in values]
        shown.add_row(str(number), f"{row['energy_kT']:.3f}", f"{row['energy_kJ_mol']:.3f}", *cells)
    console.print(shown)
    if len(table) > MOST_ROWS:
        console.print(f"... and {len(table) - MOST_ROWS} more; --out TABLE.csv writes them all.")
    if not quiet and a["method"] != "action":
        console.print(
            f"d = {a['n_dim']}, {a['n_steps']} steps up to {a['sigma_max']:.3g} nm, {a['n_score']} scores, "
            f"{a['n_products']} Jacobian products."
        )


@app.command()
def simulate(project: Project, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Dynamics with the learned force; call it again to go on after a Ctrl-C or a crash."""
    from .config import ProjectSettings, load_settings
    from .project import simulate_project

    run = simulate_project(
        load_settings(project, ProjectSettings), progress=not (quiet or as_json),
        say=None if quiet else lambda text: typer.echo(text, err=True),
    )  # fmt: skip
    _say_run(run, "", quiet, as_json)


@app.command()
def windows(
    config: Annotated[Path, typer.Argument(help="Project file, or a YAML file of one run (examples/).")],
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run lambda windows; call it again to go on after a Ctrl-C or a crash."""
    from .config import ProjectSettings, load_run, window_arguments
    from .project import run_sampler, windows_project

    bar = progress and not (quiet or as_json)
    settings = load_run(config)
    if isinstance(settings, ProjectSettings):
        run = windows_project(settings, progress=bar)
    else:
        run = run_sampler(settings, **window_arguments(settings), progress=bar)
    then = config if isinstance(settings, ProjectSettings) else run.out_dir
    _say_run(run, f"diffforce estimate {then}", quiet, as_json)


def _say_run(run: Any, then: str, quiet: bool, as_json: bool) -> None:
    """Where a run is and what to do next."""
    if as_json:
        typer.echo(json.dumps({
            "out_dir": str(run.out_dir), "n_states": len(run.states), "n_frames": len(run.u_nk),
            "n_steps": run.n_steps, "seconds": run.seconds, "topology": str(run.topology),
            "trajectories": [str(p) for p in run.trajectories],
        }, indent=1))  # fmt: skip
        return
    if not quiet:
        what = "window" if len(run.states) == 1 else "windows"
        typer.echo(
            f"{len(run.states)} {what}, {len(run.u_nk)} frames, {run.n_steps} steps in {run.seconds:.1f} s"
        )
    typer.echo(run.out_dir)
    if then and not quiet:
        typer.echo(f"Now: {then}")


# ------------------------------------------------------------------------------------ estimate


@app.command()
def estimate(
    run: Annotated[
        Path,
        typer.Argument(help="Folder of a window run, or a project file: then with the end correction."),
    ],
    decorrelate: Annotated[
        bool, typer.Option(help="Use only frames that are independent of each other.")
    ] = True,
    min_overlap: Annotated[
        float | None, typer.Option(help="Gate on neighbouring windows; 0 insists.", show_default="0.03")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Free-energy difference of a window run by MBAR, BAR and TI, behind an overlap gate."""
    from .config import ProjectSettings, load_settings
    from .constants import DHDL_FILE, U_NK_FILE
    from .estimate import MIN_OVERLAP, estimate_free_energy, read_replicas, read_table
    from .project import correct_end, finished_windows
    from .record import plain

    options: dict[str, Any] = {
        "decorrelate": decorrelate, "min_overlap": MIN_OVERLAP if min_overlap is None else min_overlap
    }  # fmt: skip
    project = load_settings(run, ProjectSettings) if run.is_file() else None
    if project is not None:
        windows_run = finished_windows(project)
        tables, folder = (windows_run.u_nk, windows_run.dHdl), windows_run.out_dir
    else:
        dhdl = read_table(run / DHDL_FILE) if (run / DHDL_FILE).exists() else None
        tables, folder = (read_table(run / U_NK_FILE), dhdl), run
    result = estimate_free_energy(*tables, replica=read_replicas(folder), **options)
    correction = None if project is None else correct_end(project, windows_run, result, **options)
    if as_json:
        corrected = {} if correction is None else {"end_correction": correction.to_dict()}
        typer.echo(json.dumps(plain({**result.to_dict(), **corrected}), indent=1))
        return
    console = _console()
    rows = result.estimates
    if correction is not None:
        rows = {**rows, correction.corrected.method: correction.corrected}
    console.print(_estimate_table(result.temperature, rows))
    if quiet:
        return
    console.print(_state_table(result))
    if correction is not None:
        console.print(
            f"Overlap of the learned and the force field's end state 1: {correction.min_overlap:.3f}"
        )


def _estimate_table(temperature: float, estimates: dict[str, Any]) -> Table:
    return _units_table(f"Delta f at {temperature:g} K", "estimator", list(estimates.items()))


def _state_table(result: Any) -> Table:
    from .report import with_error

    table = Table(title="Windows", title_justify="left")
    for name in ("state", "f [kT]", "frames", "used", "g", "overlap with next"):
        table.add_column(Text(name), justify="right")
    for k, state in enumerate(result.states):
        label = ", ".join(f"{v:g}" for v in (state if isinstance(state, tuple) else (state,)))
        table.add_row(
            Text(label),
            Text("0" if k == 0 else with_error(result.f_k[k], result.d_f_k[k])),
            str(result.n_frames[k]),
            str(result.n_decorrelated[k]),
            f"{result.inefficiency[k]:.1f}",
            f"{result.neighbour_overlap[k]:.3f}" if k < len(result.neighbour_overlap) else "",
        )
    return table


@app.command()
def density(
    run: Annotated[Path, typer.Argument(help="Folder of a window run with linear mixing.")],
    ends: Annotated[bool, typer.Option("--ends", help="Use the first and the last state alone.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Free-energy difference from the density of the operator; states need not overlap."""
    from .audit import audit_density
    from .constants import U_NK_FILE
    from .density import fit_operator_density
    from .estimate import Estimate, read_table, state_operators

    states = state_operators(read_table(run / U_NK_FILE))
    chosen = (0, len(states.lams) - 1) if ends else range(len(states.lams))
    lams = [float(states.lams[k]) for k in chosen]
    operators = [states.operators[k] for k in chosen]
    found = fit_operator_density(operators, lams)
    audit = audit_density(found, operators, lams)
    if as_json:
        typer.echo(json.dumps({**found.to_dict(), "lams": lams, **audit.to_dict()}, indent=1))
        return
    value = Estimate("density", found.delta_f, found.d_delta_f, states.temperature)
    console = _console()
    console.print(
        _units_table(f"Delta f at {states.temperature:g} K", "from", [("density of the operator", value)])
    )
    if quiet:
        console.print(Text(f"Audit: {audit.verdict}", STYLES[audit.verdict]))
        return
    rows = Table(title="States", title_justify="left")
    for name in ("lambda", "frames", "g", "mean O [kT]", "chi2 / dof"):
        rows.add_column(Text(name), justify="right")
    for i, k in enumerate(chosen):
        rows.add_row(
            f"{lams[i]:.4g}", str(found.n_frames[i]), f"{found.inefficiency[i]:.1f}",
            f"{states.operators[k].mean():.3g}", f"{found.chi2[i]:.2f}",
        )  # fmt: skip
    console.print(rows)
    _print_audit(audit)


def _gate_table(audit: Any) -> Table:
    table = Table(title=f"Audit: {audit.verdict}", title_justify="left")
    for name in ("gate", "found", "expected", "status"):
        table.add_column(Text(name), justify="left" if name == "gate" else "right")
    for gate in audit.gates:
        status = Text(gate.status, style=STYLES[gate.status])
        table.add_row(Text(gate.name), f"{gate.value:.3g}", Text(gate.threshold), status)
    return table


# -------------------------------------------------------------------------------------- bridge

EXIT_STATUS = {"PASS": 0, "WARN": 3, "FAIL": 4}
"""Exit status of ``diffforce audit`` and ``diffforce ddf``; 1 is an error, 2 a wrong command line."""

Insist = Annotated[bool, typer.Option("--insist", help="Show the number even where the audit fails.")]


@app.command()
def bridge(
    source: Annotated[
        Path, typer.Argument(help="YAML file (examples/bridge.yaml), project file, or folder of windows.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for bridge.json and report.html.")] = None,
    atoms: Annotated[str | None, typer.Option(help="Atoms to noise, from 0: 10,11.")] = None,
    seed: Annotated[int | None, typer.Option(help="Every random number follows from it.")] = None,
    spot: Annotated[
        int | None, typer.Option(help="Noised frames per end for a check by posterior MD; 0 for none.")
    ] = None,
    insist: Insist = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Delta f from two end states that need not overlap, with an audit (and a page)."""
    from .bridge_run import bridge_settings, run_bridge
    from .config import BridgeSettings, check_settings

    settings = bridge_settings(source)
    changes: dict[str, Any] = {"out": out, "seed": seed, "spot": spot}
    if atoms is not None:
        changes["atoms"] = tuple(atoms.replace(",", " ").split())
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes:
        settings = check_settings(BridgeSettings, settings.model_dump() | changes, "options")
    with _stages(quiet or as_json) as progress:
        run = run_bridge(settings, insist=insist, progress=progress)
    if as_json:
        typer.echo(run.record.read_text(encoding="utf-8"), nl=False)
        return
    _print_bridge(run, insist=insist, quiet=quiet)
    if quiet:
        return
    typer.echo(f"\nReport: {run.page}\nRecord: {run.record}")


@contextlib.contextmanager
def _stages(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar with ETA for every stage, on stderr."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description:14}"), BarColumn(), MofNCompleteColumn(), TextColumn("ETA"),
        TimeRemainingColumn(), console=Console(stderr=True, quiet=quiet), disable=quiet,
    )  # fmt: skip
    tasks: dict[str, Any] = {}
    with bar:

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        # Levels take seconds each: the bar stands there from the start.
        yield report


def _units_table(title: str, first: str, rows: list[tuple[str, Any]]) -> Table:
    """Estimates in kT, kJ/mol and kcal/mol."""
    from .report import with_error

    table = Table(title=title, title_justify="left")
    table.add_column(first)
    units = ("kT", "kJ/mol", "kcal/mol")
    for unit in units:
        table.add_column(unit, justify="right")
    for name, value in rows:
        table.add_row(Text(name), *(Text(with_error(*value.to(u))) for u in units))
    return table


def _print_bridge(run: Any, *, insist: bool, quiet: bool) -> None:
    """Readout without a model, noise levels, Delta f, audit: in the order of growing trust."""
    from .estimate import Estimate
    from .report import with_error

    console, result, kelvin = _console(), run.result, run.inputs.temperature
    withheld = run.audit.verdict == "FAIL" and not insist
    values = [("noisy operator bridge", Estimate("", result.delta_f, result.d_delta_f, kelvin))]
    if run.spot is not None:
        values.append(("posterior MD", Estimate("", run.spot.delta_f, run.spot.d_delta_f, kelvin)))
    headline = _units_table("Delta f", "", values)
    if quiet:
        if not withheld:
            console.print(headline)
        console.print(Text(f"Audit: {run.audit.verdict}", STYLES[run.audit.verdict]))
        return
    console.print(
        _units_table(f"Readouts without noise, {kelvin:g} K", "from", [
            ("two moments of O", Estimate("", result.readout.delta_f,
                                                     result.readout.d_delta_f, kelvin)),
            ("density of O", Estimate("", result.density.delta_f, result.density.d_delta_f, kelvin)),
        ])
    )  # fmt: skip
    table = Table(title=f"Noise levels ({result.closure})", title_justify="left")
    for name in ("", "sigma [nm]", "Delta f [kT]", "overlap", "eff. frames", "R^2"):
        table.add_column(Text(name), justify="right")
    for k, level in enumerate(result.levels):
        table.add_row(
            Text("*" if k == result.chosen else ""), f"{level.sigma:.3g}",
            Text(with_error(level.delta_f, level.d_delta_f)), f"{level.overlap:.3f}", f"{level.ess:.3g}",
            f"{level.r_squared:.2f}", style="bold" if k == result.chosen else "",
        )  # fmt: skip
    console.print(table)
    if not withheld:
        console.print(headline)
    _print_audit(run.audit)
    if run.audit.verdict != "PASS":
        console.print(f"A window between would tell most at lambda {result.density.next_lam:.2g}.")
    if withheld:
        console.print("Delta f is withheld, because gates failed; --insist shows it.", style=STYLES["FAIL"])


def _print_audit(audit: Any) -> None:
    console = _console()
    console.print(_gate_table(audit))
    for gate in audit.gates:
        if gate.advice:
            console.print(Text(f"{gate.status} {gate.name}: {gate.advice}", STYLES[gate.status]))


@app.command()
def audit(
    result: Annotated[Path, typer.Argument(help="bridge.json, or its folder.")],
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the verdict alone.")] = False,
    as_json: AsJson = False,
) -> None:
    """The gates of a bridge; exit status 0 for PASS, 3 for WARN, 4 for FAIL (1: an error)."""
    from .bridge_run import audit_of, read_bridge

    found = audit_of(read_bridge(result))
    if as_json:
        from .record import plain

        typer.echo(json.dumps(plain(found.to_dict()), indent=1))
    elif quiet:
        typer.echo(found.verdict)
    else:
        _print_audit(found)
    raise typer.Exit(EXIT_STATUS[found.verdict])


@app.command()
def ddf(
    bound: Annotated[Path, typer.Argument(help="bridge.json of the first leg, or its folder.")],
    solvent: Annotated[Path, typer.Argument(help="The same change in the other surroundings.")],
    insist: Insist = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Delta Delta F of two legs (first less second); the worse verdict is the exit status."""
    from .bridge_run import read_leg
    from .legs import combine_legs

    legs = [read_leg(bound), read_leg(solvent)]
    difference = combine_legs(*legs)
    withheld = difference.verdict == "FAIL" and not insist
    if as_json:
        shown = None if withheld else difference.estimate.to_dict()
        typer.echo(json.dumps({"verdict": difference.verdict, "ddf": shown, "legs": [
            {"name": leg.name, "verdict": leg.verdict, **leg.estimate.to_dict()} for leg in legs
        ]}, indent=1))  # fmt: skip
    else:
        rows = [] if quiet else [
            (f"{leg.verdict} {name}", leg.estimate)
            for name, leg in zip(("first", "second"), legs, strict=True)
        ]  # fmt: skip
        if not withheld:
            rows.append(("first - second", difference.estimate))
        console = _console()
        if rows:
            console.print(_units_table("Delta Delta F", "leg", rows))
        console.print(Text(f"Verdict of both: {difference.verdict}", STYLES[difference.verdict]))
        if withheld:
            console.print("The difference is withheld, because a leg failed its audit; --insist shows it.")
    raise typer.Exit(EXIT_STATUS[difference.verdict])


# ------------------------------------------------------------------------------------- docking


@app.command("dock-fit")
def dock_fit(
    folder: Annotated[Path, typer.Argument(help="Folder with native complexes, NAME.pdb or NAME.pdb.gz.")],
    out: Annotated[Path, typer.Option(help="File of the model.")] = Path("model.docking"),
    only: Annotated[
        str, typer.Option(help="Names of the complexes to use, separated by commas; all if omitted.")
    ] = "",
    together: Annotated[
        str, typer.Option(help="Names of related complexes, left out together in the cross-validation.")
    ] = "",
    receptor: Annotated[str, typer.Option(help="Chains of the receptor.")] = "A",
    ligand: Annotated[str, typer.Option(help="Chains of the ligand, which moves.")] = "B",
    network: Annotated[
        int, typer.Option(min=0, help="Units of a network that corrects the pair splines; 0 for none.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Every random number follows from it.")] = 1,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Fit a docking energy to native complexes (about ten seconds of one core each)."""
    from .docking.dock_run import run_docking_fit, structure_files
    from .docking.learning import DockingFit

    files = structure_files(folder, [n.strip() for n in only.split(",")] if only else None)
    with _stages(quiet or as_json) as report:
        run = run_docking_fit(
            files, out, receptor=receptor, ligand=ligand, seed=seed, progress=report,
            together=[n.strip() for n in together.split(",")] if together else (),
            settings=DockingFit(network=network),
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps({"model": str(run.path), "sha256": run.sha256, "names": list(run.names),
                               "cross_validation": [asdict(h) for h in run.held_out]}, indent=1))  # fmt: skip
        return
    if not quiet and run.held_out:
        table = Table(title="Complexes left out", title_justify="left")
        for name in ("noise [nm]", "score R^2", "AUC", "rank correlation", "best decoy near-native"):
            table.add_column(name, justify="right")
        for h in run.held_out:
            levels = f"{h.sigmas[0]:g}" + (f" to {h.sigmas[-1]:g}, mean" if len(h.sigmas) > 1 else "")
            table.add_row(levels, *(f"{v:.2f}" for v in (h.score_r2, h.auc, h.spearman, h.top)))
        _console().print(table)
    for note in run.notes if not quiet else ():
        typer.echo(note)
    typer.echo(f"{run.path}: fitted to {len(run.names)} complexes")


@app.command("dock-score")
def dock_score(
    structures: Annotated[
        list[Path], typer.Argument(help="One PDB file with both partners, or two: receptor and ligand.")
    ],
    model: Annotated[Path, typer.Option(help="Model file, written by diffforce dock-fit.")],
    receptor: Annotated[
        str | None, typer.Option(help="Chains of the receptor, in one file with both; A if omitted.")
    ] = None,
    ligand: Annotated[
        str | None, typer.Option(help="Chains of the ligand, in one file with both; B if omitted.")
    ] = None,
    native: Annotated[
        bool, typer.Option("--native", help="Two files lie in the frame of their known complex.")
    ] = False,
    poses: Annotated[
        Path | None,
        typer.Option(help="Multi-model PDB or trajectory with poses; decoys are made if omitted."),
    ] = None,
    topology: Annotated[Path | None, typer.Option(help="PDB file of a trajectory's atoms.")] = None,
    decoys: Annotated[int, typer.Option(min=2, help="Number of decoys.")] = 200,
    physics: Annotated[
        int, typer.Option(min=0, help="Score so many of the best by the force field too (about 1 s each).")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Every random number follows from it.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for table, page and best poses.")] = Path("docking"),
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Score poses of two proteins by a learned docking energy."""
    from .docking.complex import read_complex, read_partners
    from .docking.dock_run import read_poses, run_docking
    from .docking.model_file import load_docking_model
    from .errors import InputError

    if len(structures) not in (1, 2):
        raise InputError(f"structures: expected one file or two, found {len(structures)}.")
    if len(structures) == 2 and (receptor or ligand):
        raise InputError("--receptor, --ligand: expected with one file that holds both partners, found two.")
    if len(structures) == 1 and native:
        raise InputError("--native: expected with two files, found one; a complex in one file is native.")
    if topology is not None and poses is None:
        raise InputError("--topology: expected with --poses, found it alone.")
    loaded = load_docking_model(model)
    if len(structures) == 1:
        both = read_complex(structures[0], receptor=receptor or "A", ligand=ligand or "B")
    else:
        both = read_partners(*structures, native=native)
    given = read_poses(poses, both, topology=topology) if poses is not None else None
    inputs = {f"structure_{k}": p for k, p in enumerate(structures, 1)} | {"model": model}
    inputs |= {n: p for n, p in (("poses", poses), ("topology", topology)) if p is not None}
    with _stages(quiet or as_json) as report:
        run = run_docking(
            both, loaded, out, poses=given, n_decoys=decoys, seed=seed, physics=physics, inputs=inputs,
            progress=report,
        )  # fmt: skip
    if as_json:
        typer.echo((run.folder / "docking.json").read_text(encoding="utf-8"))
        return
    if not quiet:
        table = Table(title=f"Best of {len(run.order)} poses of {both.name}", title_justify="left")
        for name in ("pose", *run.scores, *run.columns):
            table.add_column(name, justify="right")
        for k in run.order[:5]:
            values = [v[k] for v in (*run.scores.values(), *run.columns.values())]
            table.add_row(str(k), *(f"{v:.3g}" for v in values))
        _console().print(table)
        for note in both.notes:
            typer.echo(note)
    typer.echo(f"Report: {run.page}\nTable: {run.table}")


# -------------------------------------------------------------------------------------- report


@app.command()
def report(
    record: Annotated[
        Path, typer.Argument(help="record.json of a demonstration or run, or bridge.json of a bridge.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="HTML file; report.html beside the record if omitted.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Make the HTML page of a record again."""
    from .report import report_from_record

    page = report_from_record(record, out)
    typer.echo(json.dumps({"report": str(page)}, indent=1) if as_json else page)


if __name__ == "__main__":
    sys.exit(main())  # type: ignore[func-returns-value]
