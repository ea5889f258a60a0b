"""The command line: ``diffforce --help``.

Heavy imports happen inside the commands, so that help is instant and a broken installation can
still be examined with ``diffforce doctor``.
"""

import json
import logging
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from . import __version__
from .errors import DiffForceError

STYLES = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red"}


class _Commands(TyperGroup):
    """Turns the package's own errors into one message on stderr and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DiffForceError as err:
            if ctx.params.get("debug"):
                raise
            notes = "".join(f"\n{note}" for note in getattr(err, "__notes__", []))
            typer.echo(f"diffforce: {err}{notes}", err=True)
            raise typer.Exit(1) from err
        except KeyboardInterrupt as err:
            typer.echo(f"diffforce: {err or 'stopped'}", err=True)
            raise typer.Exit(130) from err


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
    app()


def _console() -> Console:
    # Piped output is 80 columns wide, as rich does for no terminal; a terminal has its own width.
    return Console(highlight=False)


# ---------------------------------------------------------------------------------------- demo


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that is made.")] = Path("demo"),
    config: Annotated[Path | None, typer.Option(help="YAML file with settings of the demonstration.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Under a minute; the numbers mean little.")] = False,
    seed: Annotated[int | None, typer.Option(help="Every random number follows from it.")] = None,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
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
    record = run_demo(out, settings=settings, progress=progress)
    page = record.parent / "report.html"
    if not page.exists():
        page = report_from_record(record)
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
def doctor() -> None:
    """What is installed, what works, and the cure for what does not."""
    findings = examine()
    table = Table("", "part", "found", title=f"openmm_diffforce {__version__}", title_justify="left")
    for finding in findings:
        table.add_row(Text(finding.status, STYLES[finding.status]), Text(finding.name), Text(finding.found))
    console = _console()
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
    artefact: Annotated[Path, typer.Argument(help="File written by export_artefact.")],
    as_json: Annotated[bool, typer.Option("--json", help="All metadata as JSON.")] = False,
) -> None:
    """What a model file holds; a damaged or foreign one is refused."""
    from .artefact import load_artefact

    loaded = load_artefact(artefact)
    if as_json:
        typer.echo(json.dumps({**loaded.metadata, "sha256": loaded.sha256}, indent=1))
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


# ------------------------------------------------------------------------------------- windows


@app.command()
def windows(
    config: Annotated[Path, typer.Argument(help="YAML file; examples/README.md has one.")],
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Run lambda windows; call it again to go on after a Ctrl-C or a crash."""
    from .config import WindowsSettings, load_settings, window_arguments
    from .windows import run_windows

    settings = load_settings(config, WindowsSettings)
    run = run_windows(**window_arguments(settings), progress=progress)
    typer.echo(
        f"{len(run.states)} windows, {len(run.u_nk)} frames, {run.n_steps} steps in "
        f"{run.seconds:.1f} s\n{run.out_dir}\n"
        f"Now: diffforce estimate {run.out_dir}"
    )


# ------------------------------------------------------------------------------------ estimate


@app.command()
def estimate(
    run: Annotated[Path, typer.Argument(help="Folder of a window run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
    decorrelate: Annotated[
        bool, typer.Option(help="Use only frames that are independent of each other.")
    ] = True,
    min_overlap: Annotated[
        float | None, typer.Option(help="Gate on neighbouring windows; 0 insists.")
    ] = None,
) -> None:
    """Free-energy difference of a window run by MBAR, BAR and TI, behind an overlap gate."""
    from .constants import DHDL_FILE, U_NK_FILE
    from .estimate import MIN_OVERLAP, estimate_free_energy, read_replicas, read_table

    dhdl = read_table(run / DHDL_FILE) if (run / DHDL_FILE).exists() else None
    result = estimate_free_energy(
        read_table(run / U_NK_FILE),
        dhdl,
        replica=read_replicas(run),
        decorrelate=decorrelate,
        min_overlap=MIN_OVERLAP if min_overlap is None else min_overlap,
    )
    if as_json:
        from .record import plain

        typer.echo(json.dumps(plain(result.to_dict()), indent=1))
        return
    console = _console()
    console.print(_estimate_table(result))
    console.print(_state_table(result))


def _estimate_table(result: Any) -> Table:
    from .report import with_error

    table = Table(title=f"Delta f at {result.temperature:g} K", title_justify="left")
    table.add_column("estimator")
    units = ("kT", "kJ/mol", "kcal/mol")
    for unit in units:
        table.add_column(unit, justify="right")
    for name, one in result.estimates.items():
        table.add_row(Text(name), *(Text(with_error(*one.to(u))) for u in units))
    return table


def _state_table(result: Any) -> Table:
    from .report import with_error

    table = Table(title="Windows", title_justify="left")
    for name in ("state", "f [kT]", "frames", "used", "g", "overlap with next"):
        table.add_column(name, justify="right")
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


# -------------------------------------------------------------------------------------- report


@app.command()
def report(
    record: Annotated[Path, typer.Argument(help="record.json of a demonstration.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file; report.html beside the record if omitted.")
    ] = None,
) -> None:
    """Make the HTML page of a record again."""
    from .report import report_from_record

    typer.echo(report_from_record(record, out))


if __name__ == "__main__":
    sys.exit(main())  # type: ignore[func-returns-value]
