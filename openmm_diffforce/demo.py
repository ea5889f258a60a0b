"""The main job end to end, on alanine dipeptide in vacuum.

Sample both end states of a perturbation, fit base action and operator, export them, run lambda
windows under the learned and under the classical operator, run dynamics on the learned base
action alone, and compare. The benchmarks run the same stages for longer.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch

from . import analysis
from .alanine import TEMPERATURE, AlanineCase, alanine_case
from .alchemy import lambda_states
from .artefact import Artefact
from .config import DemoSettings
from .constants import RECORD_FILE
from .errors import ResumeError
from .estimate import end_correction, estimate_free_energy, reweight, standard_score
from .force import DiffusionForce, mix
from .models.action import model_fields
from .models.physics import base_tables, outside_fraction
from .project import fit_model, fit_quality, fit_seconds
from .record import atomic_path, make_record, settings_hash, write_json
from .report import save_figures, write_report
from .runs import make_folder
from .systems import (
    FloatArray,
    clone_system,
    forces,
    make_context,
    sample,
    start_context,
    step_checked,
)
from .units import thermal_energy
from .windows import run_windows

ARTEFACT_FILE = "alanine_F1.diffforce"
"""The fitted model."""

KT = thermal_energy(TEMPERATURE)

BASE_OVERLAP = 0.9
PAIRED_KT = 0.05
FORCE_R2 = 0.99
ACTION_R2 = 0.95
JSD_EXCESS = 0.02
"""Thresholds of the demonstration's checks; the longer benchmarks use the same."""


@dataclass
class Timing:
    """Wall-clock and CPU seconds of each stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is inside."""
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started


def sample_end(
    case: AlanineCase, end: int, settings: DemoSettings, folder: Path,
    progress: Callable[[int, int], None] | None,
) -> FloatArray:  # fmt: skip
    """Frames of an end state: training frames, then held-out ones. Kept in ``folder``."""
    wanted = {
        "end": end, "perturbation": case.name, "seed": settings.seed,
        "n": settings.n_frames + settings.n_test, "interval": settings.interval,
        "n_equil": settings.n_equil, "timestep": settings.timestep, "friction": settings.friction,
    }  # fmt: skip
    n_wanted = settings.n_frames + settings.n_test
    digest = settings_hash(wanted)
    path = folder / f"end_{end}.npz"
    if path.exists():
        with np.load(path) as kept:
            if str(kept["settings"]) != digest:
                raise ResumeError(
                    f"{path}: was sampled with other settings; choose another folder or remove it."
                )
            return np.array(kept["x"])
    x = sample(
        (case.system_0, case.system_1)[end], case.topology, case.positions,
        temperature=TEMPERATURE, n_frames=n_wanted, interval=settings.interval,
        timestep=settings.timestep, friction=settings.friction, n_equil=settings.n_equil,
        seed=settings.seed + 100 * (end + 1), progress=progress,
    )  # fmt: skip
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, x=x, settings=digest)
    analysis.trajectory_of(x, case.topology).save_dcd(str(folder / f"end_{end}.dcd"))
    return x


def learned_base_system(case: AlanineCase, artefact: Path, *, backend: str = "auto") -> openmm.System:
    """The molecule on the learned base action alone (and the restraint its data were sampled in)."""
    force = DiffusionForce(
        artefact, topology=case.topology, mode="add", temperature=TEMPERATURE, backend=backend
    )
    return mix(case.system_0, case.topology, force)


def nve_drift(
    system: openmm.System, starts: FloatArray, *, timestep: float, n_steps: int, seed: int
) -> tuple[float, float]:
    """Slope of the total energy along Verlet dynamics, and its standard error [kJ/mol/ns].

    The mean over the ``starts`` [n_starts >= 2, n_atoms, 3] of slopes fitted every 20 steps; the
    error is that of their mean. (One start alone shows how energy moves between its modes.)
    """
    context = make_context(system, temperature=TEMPERATURE, timestep=timestep, friction=1.0,
                           platform=None, seed=seed)  # fmt: skip
    integrator = openmm.VerletIntegrator(timestep)
    verlet = openmm.Context(system, integrator, context.getPlatform())
    time_ns = np.arange(n_steps // 20) * 20 * timestep * 1e-3
    slopes = []
    for k, x in enumerate(starts):
        start_context(context, x, seed=seed + k, temperature=TEMPERATURE, minimize=False)
        verlet.setPositions(context.getState(positions=True).getPositions())
        verlet.setVelocities(context.getState(velocities=True).getVelocities())
        total = np.empty(len(time_ns))
        for n in range(len(total)):
            step_checked(integrator, 20, "NVE")
            state = verlet.getState(energy=True)
            total[n] = (state.getPotentialEnergy() + state.getKineticEnergy())._value
        slopes.append(np.polyfit(time_ns, total, 1)[0])
    return float(np.mean(slopes)), float(np.std(slopes, ddof=1) / np.sqrt(len(slopes)))


def _check(
    name: str, value: float, threshold: str, good: bool, advice: str, *, warn: bool = False
) -> dict[str, Any]:
    status = "PASS" if good else ("WARN" if warn else "FAIL")
    return {"name": name, "value": value, "threshold": threshold, "status": status,
            "advice": "" if good else advice}  # fmt: skip


def run_demo(out_dir: Path | str, *, settings: DemoSettings | None = None, progress: bool = True) -> Path:
    """Run the demonstration and write its report.

    Parameters
    ----------
    out_dir : path
        Folder for frames, artefact, windows, figures, ``record.json`` and ``report.html``. A run
        in it with the same settings is resumed where it stopped.
    settings : DemoSettings, optional
    progress : bool
        Show progress with an ETA.

    Returns
    -------
    pathlib.Path
        ``record.json``; ``report.html`` lies beside it.

    Raises
    ------
    ResumeError
        If the folder holds a run with other settings.
    DiffForceError
        From any stage, with its own message.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    settings = settings or DemoSettings()
    folder = make_folder(out_dir)
    # One molecule is too small for more threads: they cost more than they compute.
    torch.set_num_threads(1)
    console = Console(quiet=not progress, stderr=True)
    timing = Timing()
    case = alanine_case("F1", restrain_phi=True)
    n_train = settings.n_frames

    def bar() -> Progress:
        return Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(), console=console, disable=not progress,
        )  # fmt: skip

    frames = []
    ps = settings.interval * settings.timestep
    console.print(
        f"[bold]1/6[/] sampling both ends: {n_train} + {settings.n_test} frames, "
        f"{ps * (n_train + settings.n_test):.0f} ps each"
    )
    ends = []
    for end in (0, 1):
        with timing.stage(f"sample end {end}"), bar() as shown:
            task = shown.add_task(f"end state {end}", total=n_train + settings.n_test)

            def report(done: int, total: int, *, task: Any = task, shown: Progress = shown) -> None:
                shown.update(task, completed=done)

            frames.append(sample_end(case, end, settings, folder, report))
        ends.append({"name": f"end state {end}", "n_frames": len(frames[end]), "interval_ps": ps,
                     "length_ps": ps * len(frames[end]),
                     "seconds": timing.seconds[f"sample end {end}"]})  # fmt: skip
    train = [x[:n_train] for x in frames]
    test = (frames[0][n_train:], frames[1][n_train:])

    console.print("[bold]2/6[/] fitting base action and operator at every noise level")
    artefact_path = folder / ARTEFACT_FILE
    with timing.stage("fit"), console.status("score matching and regression"):
        artefact = fit_model(
            train, case.pair, case.topology, artefact_path, sites=case.perturbed,
            sigma_max=settings.sigma_max, n_draws=settings.n_draws, seed=settings.seed,
            temperature=TEMPERATURE,
        )  # fmt: skip
    quality = fit_quality(artefact.model, case.system_0, case.pair, test)

    states = lambda_states(settings.n_windows)
    window_ps = settings.window_frames * settings.window_interval * settings.timestep
    classical_system = case.pair.linear_system()
    learned_system = clone_system(case.system_0)
    learned_force = DiffusionForce(artefact_path, topology=case.topology, mode="operator",
                                   temperature=TEMPERATURE)  # fmt: skip
    learned_system.addForce(learned_force)
    (folder / "classical.xml").write_text(openmm.XmlSerializer.serialize(case.system_0))
    write_json(folder / "force.json", learned_force.manifest())
    runs, estimates = {}, {}
    for step, name in ((3, "classical"), (4, "learned")):
        console.print(f"[bold]{step}/6[/] {len(states)} windows of {window_ps:.0f} ps, {name} operator")
        learned = name == "learned"
        with timing.stage(f"{name} windows"):
            runs[name] = run_windows(
                learned_system if learned else classical_system, case.topology, case.positions,
                [{learned_force.parameter("lambda"): s["lambda"]} for s in states] if learned else states,
                temperature=TEMPERATURE, out_dir=folder / f"windows_{name}",
                n_frames=settings.window_frames, interval=settings.window_interval,
                n_equil=settings.n_equil, timestep=settings.timestep, friction=settings.friction,
                seed=settings.seed + (2000 if learned else 1000), trajectory="dcd",
                learned=learned_force if learned else None, progress=progress,
                n_workers=settings.n_workers,
            )  # fmt: skip
        estimates[name] = estimate_free_energy(runs[name].u_nk, runs[name].dHdl)

    # The same classical frames under both operators: what remains is the operator's own error.
    x_windows = {name: _window_frames(run) for name, run in runs.items()}
    u = runs["classical"].u_nk.to_numpy()
    o_learned = model_fields(artefact.model, x_windows["classical"])[2]
    both = reweight(runs["classical"].u_nk, np.stack([u[:, 0], u[:, -1], u[:, 0] + o_learned], axis=1))
    differences = {
        "classical": both.contrast([-1, 1, 0]),
        "learned": both.contrast([-1, 0, 1]),
        "difference": both.contrast([0, -1, 1]),
    }
    paired: dict[str, Any] = {
        **{name: {"value": value, "error": error} for name, (value, error) in differences.items()},
        "n_frames": both.n_frames,
    }
    last = {name: x[-settings.window_frames:] for name, x in x_windows.items()}  # fmt: skip
    gap = {name: case.pair.operator_values(x) - model_fields(artefact.model, x)[2]
           for name, x in last.items()}  # fmt: skip
    correction = end_correction(estimates["learned"], work_1=(gap["learned"], -gap["classical"]))

    length = settings.base_frames * settings.base_interval * settings.timestep
    console.print(f"[bold]5/6[/] {length:.0f} ps on the learned base action alone")
    base_system = learned_base_system(case, artefact_path)
    with timing.stage("base action"), bar() as shown:
        task = shown.add_task("learned dynamics", total=settings.base_frames)
        base_x = sample(
            base_system, case.topology, case.positions, temperature=TEMPERATURE,
            n_frames=settings.base_frames, interval=settings.base_interval,
            timestep=settings.timestep, friction=settings.friction, n_equil=settings.n_equil,
            seed=settings.seed + 3000, progress=lambda done, _: shown.update(task, completed=done),
        )  # fmt: skip
        base_action, angles = _judge_base(case, artefact, base_system, base_x, frames[0], settings)
    base_action["length_ps"] = length

    console.print("[bold]6/6[/] figures and report")
    agreement = abs(
        standard_score(estimates["learned"].estimates["MBAR"], estimates["classical"].estimates["MBAR"])
    )
    excess = base_action["jsd"] - base_action["jsd_baseline"]
    checks = [
        _check("learned and classical operator on the same frames", abs(paired["difference"]["value"]),
               f"<= {PAIRED_KT} kT", abs(paired["difference"]["value"]) <= PAIRED_KT,
               "give the fit more frames of both ends"),
        _check("independent window runs, combined standard errors apart", agreement, "<= 3",
               agreement <= 3, "run longer windows"),
        _check("end correction: overlap of learned and classical end state", correction.min_overlap,
               f">= {BASE_OVERLAP}", correction.min_overlap >= BASE_OVERLAP,
               "the learned end state is another one: fit with more frames of end state 1"),
        _check("held-out force R^2", quality["force_r2"], f">= {FORCE_R2}",
               quality["force_r2"] >= FORCE_R2, "give the fit more frames"),
        _check("held-out base action R^2", quality["action_r2"], f">= {ACTION_R2}",
               quality["action_r2"] >= ACTION_R2, "give the fit more frames"),
        _check("phi/psi divergence beyond that of two amber14 runs [nats]", excess,
               f"<= {JSD_EXCESS} at full length", excess <= JSD_EXCESS,
               "a run of this length is dominated by its own noise: see the benchmarks", warn=True),
    ]  # fmt: skip
    figures = {
        "delta_f": analysis.delta_f_figure(
            {f"{name} windows, {m}": (e.delta_f, e.d_delta_f)
             for name, est in estimates.items() for m, e in est.estimates.items()}
            | {"learned, end-corrected": (correction.corrected.delta_f, correction.corrected.d_delta_f)},
            reference="classical windows, MBAR",
        ),
        "operator": _operator_figure(case, artefact.model, test),
        "overlap_learned": analysis.overlap_figure(
            estimates["learned"].overlap, [s["lambda"] for s in states]
        ),
        "dhdl": analysis.dhdl_figure({name: _mean_dhdl(run.dHdl) for name, run in runs.items()}),
        "phi_psi": analysis.phi_psi_figure(angles, bins=36),
    }  # fmt: skip
    record = {
        "what": "demo",
        "title": "A diffusion model as a force: alanine dipeptide, one hydrogen becomes fluorine-like",
        "summary": "A base action and an alchemical operator were learned from frames of two end "
                   "states, used as forces in OpenMM, and compared with the force field.",
        "headline": {
            "method": f"MBAR over {len(states)} windows under the learned operator, end-corrected",
            "value": correction.corrected.delta_f, "error": correction.corrected.d_delta_f,
            "meaning": "reduced free energy of end state 1 less that of end state 0, for amber14",
        },
        "system": {
            "name": "ACE-ALA-NME in vacuum", "n_atoms": len(case.positions),
            "temperature": TEMPERATURE, "force_field": "amber14", "platform": "Reference",
            "perturbation": "F1: HB1 -> q -0.22 e, sigma 0.312 nm, epsilon 0.255 kJ/mol; "
                            "C-beta keeps the total charge",
            "description": "phi restrained to within 120 degrees of -120 (flat bottom) in every run",
        },
        "sampling": {"ends": ends},
        "fit": {"n_train": 2 * n_train, "n_test": len(test[0]), "levels": [quality],
                "cpu_seconds": fit_seconds(artefact.metadata["training"])},
        "artefact": {"file": ARTEFACT_FILE, "sha256": artefact.sha256, "bytes": artefact_path.stat().st_size,
                     "modes": artefact.metadata["modes"], "dtype": artefact.metadata["dtype"]},
        "windows": {
            name: {"label": f"{name} operator", "estimate": estimates[name].to_dict(),
                   "n_windows": len(states), "length_ps": window_ps, "n_steps": run.n_steps,
                   "seconds": run.seconds}
            for name, run in runs.items()
        },
        "paired": paired,
        "end_correction": correction.to_dict(),
        "base_action": base_action,
        "checks": checks,
        "provenance": make_record("demo", settings.model_dump(), seed=settings.seed,
                                  files={"artefact": artefact_path}),
        "timing": timing.seconds,
        "figures": save_figures(figures, folder),
    }  # fmt: skip
    path = folder / RECORD_FILE
    write_json(path, record)
    write_report(record, figures, folder / "report.html")
    return path


def _window_frames(run: Any) -> FloatArray:
    """Frames of all windows in the order of u_nk's rows [nm], float64."""
    return np.concatenate(
        [analysis.load_trajectory(p, run.topology).xyz.astype(np.float64) for p in run.trajectories]
    )


def _judge_base(
    case: AlanineCase, artefact: Artefact, system: openmm.System, x: FloatArray,
    reference: FloatArray, settings: DemoSettings,
) -> tuple[dict[str, Any], dict[str, FloatArray]]:  # fmt: skip
    """What the dynamics on the learned base action looks like beside amber14."""
    n = min(len(x), len(reference) // 2)
    angles = {
        name: analysis.phi_psi(analysis.trajectory_of(part, case.topology))
        for name, part in (
            ("learned", x), ("amber14", reference), ("a", reference[:n]), ("b", reference[-n:]),
        )
    }  # fmt: skip
    temperature = analysis.configurational_temperature(
        x[:: max(1, len(x) // 100)], lambda frames: forces(system, frames)
    )
    starts = x[:: max(1, len(x) // 4)][:4]
    drift = {}
    for name, s in (("learned", system), ("classical", case.system_0)):
        value, error = nve_drift(
            s, starts, timestep=0.5 * settings.timestep, n_steps=4000, seed=settings.seed + 4000
        )
        drift[name] = {"value": value, "error": error}
    everywhere, per_role = outside_fraction(x, base_tables(artefact.model, artefact.graph))
    return {
        "jsd": analysis.jensen_shannon(angles["learned"][-n:], angles["b"]),
        "jsd_baseline": analysis.jensen_shannon(angles["a"], angles["b"]),
        "temperature_conf": {"value": temperature.temperature, "error": temperature.error},
        "wall_fraction": everywhere,
        "wall_fraction_by_role": per_role,
        "nve_drift": drift,
    }, {"amber14": angles["amber14"], "learned base action": angles["learned"]}


def _mean_dhdl(table: Any) -> tuple[list[float], list[float], list[float]]:
    """lambda, mean dH/dlambda and its standard error from blocks of ten."""
    column = table.columns[0]
    groups = table[column].groupby(level=1, sort=True)
    lam, mean, error = [], [], []
    for key, values in groups:
        blocks = np.array([b.mean() for b in np.array_split(values.to_numpy(), 10)])
        lam.append(float(key))
        mean.append(float(values.mean()))
        error.append(float(blocks.std(ddof=1) / np.sqrt(len(blocks))))
    return lam, mean, error


def _operator_figure(case: AlanineCase, model: Any, test: tuple[FloatArray, FloatArray]) -> Any:
    """Learned against classical O on held-out frames of both ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for end, x in enumerate(test):
        axes.plot(case.pair.operator_values(x), model_fields(model, x)[2], ".", markersize=2,
                  label=f"end state {end}")  # fmt: skip
    limits = axes.get_xlim()
    axes.plot(limits, limits, color="0.4", linewidth=0.8)
    axes.set_xlabel("O from the force field [kT]")
    axes.set_ylabel("learned O [kT]")
    axes.legend(markerscale=5, frameon=False)
    return figure
