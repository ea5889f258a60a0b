"""The numbers of the network model: alone, and as a residual on the physical model.

    python benchmarks/network.py --out runs/network [--only sample,alone,residual,fields,steps]

Frames are sampled in the run, with seeds used nowhere else; references (force field, posterior MD)
are computed on them. Settings are the defaults of ``NetworkSettings`` and of ``RESIDUAL``, fixed
beforehand on other frames; every network is trained with each of ``SEEDS``. Every part writes
``<out>/<part>.json`` and is skipped if that exists; the table goes to
``benchmarks/results/network.md``.
"""

import time
from pathlib import Path

import numpy as np
from parts import (
    N_BOOTSTRAP,
    field_errors,
    field_rows,
    model_noised_fields,
    posterior_reference,
    reference_noise,
    run_parts,
    standard_error,
)

from openmm_diffforce.alanine import TEMPERATURE, alanine_case
from openmm_diffforce.artefact import export_artefact, load_artefact
from openmm_diffforce.demo import KT
from openmm_diffforce.force import DiffusionForce
from openmm_diffforce.models.action import model_fields
from openmm_diffforce.network_training import RESIDUAL, NetworkSettings, fit_network
from openmm_diffforce.project import fit_quality
from openmm_diffforce.schedule import VESchedule
from openmm_diffforce.systems import (
    clone_system,
    forces,
    graph_from_topology,
    make_context,
    sample,
    start_context,
)
from openmm_diffforce.training import fit_physical_model

SEED = 4100
SEEDS = (1, 2, 3)
"""Of the training; frames and references are the same for all."""

SETTINGS = {"alone": NetworkSettings(), "residual": RESIDUAL}
N_FRAMES, N_TEST, INTERVAL = 3000, 1000, 500
SIGMAS = (0.005, 0.01, 0.02)
N_Y, N_POSTERIOR = 48, 1000
SCHEDULE = VESchedule(0.02)
WIDE = VESchedule(0.05)
"""The physical model's own noise levels."""


def case_and_graph():
    case = alanine_case("F1", restrain_phi=True)
    return case, graph_from_topology(case.topology)


def frames(out: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(out / "frames.npz") as kept:
        return kept["x_0"], kept["x_1"]


def training_data(out: Path) -> tuple:
    case, _ = case_and_graph()
    x = [v[:N_FRAMES] for v in frames(out)]
    o = [case.pair.operator_values(v) for v in x]
    return x[0], o[0], x[1], o[1]


def sample_part(out: Path) -> dict:
    """Fresh frames of both ends."""
    case, _ = case_and_graph()
    x = [
        sample(
            system,
            case.topology,
            case.positions,
            temperature=TEMPERATURE,
            n_frames=N_FRAMES + N_TEST,
            interval=INTERVAL,
            timestep=0.001,
            friction=1.0,
            n_equil=20000,
            seed=SEED + end,
        )
        for end, system in enumerate((case.system_0, case.system_1))
    ]
    np.savez(out / "frames.npz", x_0=x[0], x_1=x[1])
    return {"n_frames": N_FRAMES, "n_test": N_TEST, "interval_fs": INTERVAL, "seed": SEED}


def force_error(case, model, x: np.ndarray) -> float:
    """Standard error of the held-out force R^2, by the bootstrap over frames in 20 blocks."""
    truth = forces(case.system_0, x)
    miss = ((-KT * model_fields(model, x)[1] - truth) ** 2).sum((1, 2)).reshape(20, -1).sum(1)
    total = ((truth - truth.mean()) ** 2).sum((1, 2)).reshape(20, -1).sum(1)
    draws = np.random.default_rng(SEED).integers(0, 20, (500, 20))
    return float(np.std(1 - miss[draws].sum(1) / total[draws].sum(1)))


def measured(out: Path, name: str, model, record: dict, cpu_seconds: float, schedule=SCHEDULE) -> dict:
    """Export a model as ``name``, and judge at t = 0 what comes back from the file."""
    case, graph = case_and_graph()
    path = out / f"{name}.diffforce"
    export_artefact(model, path, graph=graph, schedule=schedule, temperature=TEMPERATURE, training=record)
    loaded = load_artefact(path).model
    test = tuple(v[N_FRAMES:] for v in frames(out))
    row = {
        "cpu_seconds": cpu_seconds,
        **fit_quality(loaded, case.system_0, case.pair, test),
        "force_r2_se": force_error(case, loaded, test[0]),
    }
    print(f"  {name}: {row}", flush=True)
    return row


def trained(out: Path, kind: str, base=None) -> tuple[list[dict], object]:
    """A network at each training seed; the rows, and the last model."""
    case, graph = case_and_graph()
    data = training_data(out)
    rows = []
    for seed in SEEDS:
        started = time.process_time()
        model, record = fit_network(
            *data, graph, case.perturbed, SCHEDULE, seed=seed, base=base, settings=SETTINGS[kind]
        )
        cpu = time.process_time() - started
        rows.append(
            {
                "model": kind,
                "seed": seed,
                **{k: record[k] for k in ("steps", "best_step", "losses", "n_weights")},
                **measured(out, f"{kind}_{seed}", model, record, cpu),
            }
        )
    return rows, model


def alone(out: Path) -> dict:
    """The network alone."""
    return {"rows": trained(out, "alone")[0]}


def residual(out: Path) -> dict:
    """The physical model, its envelope (what a residual starts from), and the residual on it."""
    case, graph = case_and_graph()
    started = time.process_time()
    physical, record = fit_physical_model(*training_data(out), graph, case.perturbed, WIDE, seed=SEED)
    cpu = time.process_time() - started
    row = {"model": "physical", **measured(out, "physical", physical, record, cpu, WIDE)}
    rows, model = trained(out, "residual", base=physical)
    export_artefact(
        model.base, out / "envelope.diffforce", graph=graph, schedule=SCHEDULE, temperature=TEMPERATURE
    )
    return {"rows": [row, *rows]}


def fields(out: Path) -> dict:
    """Noised fields of every artefact, by its own methods, against posterior MD at held-out frames."""
    case, _ = case_and_graph()
    generator = np.random.default_rng(SEED)
    names = {"physical": ["physical"], "envelope": ["envelope"]}
    names |= {kind: [f"{kind}_{seed}" for seed in SEEDS] for kind in ("residual", "alone")}
    artefacts = {k: [load_artefact(out / f"{name}.diffforce") for name in v] for k, v in names.items()}
    rows = []
    for sigma in SIGMAS:
        for end in (0, 1):
            y, truth = posterior_reference(
                case, end, frames(out)[end][N_FRAMES:], sigma, generator,
                n_y=N_Y, n_samples=N_POSTERIOR, seed=SEED + end,
            )  # fmt: skip
            draws = generator.integers(0, N_Y, (N_BOOTSTRAP, N_Y))
            for kind, each in artefacts.items():
                got = [model_noised_fields(a.model, y, a.schedule.t_of_sigma(sigma), end) for a in each]
                row = {"sigma_nm": sigma, "end": end, "model": kind}
                row |= {"reference_noise": reference_noise(truth), **field_errors(got, truth, draws)}
                rows.append(row)
                print(f"  {row}", flush=True)
    return {"rows": rows}


def steps(out: Path) -> dict:
    """Microseconds per MD step on the learned operator, PythonForce, with and without noise."""
    case, _ = case_and_graph()
    found = {}
    files = {name: name for name in ("physical", "envelope")}
    files |= {kind: f"{kind}_{SEEDS[0]}" for kind in ("residual", "alone")}
    for name, file in files.items():
        for sigma in (0.0, 0.01):
            system = clone_system(case.system_0)
            force = DiffusionForce(
                out / f"{file}.diffforce", topology=case.topology, mode="operator", backend="python"
            )
            system.addForce(force)
            context = make_context(
                system, temperature=TEMPERATURE, timestep=0.001, friction=1.0, platform="Reference", seed=SEED
            )
            start_context(context, case.positions, seed=SEED, temperature=TEMPERATURE, minimize=True)
            context.setParameter(force.parameter("noise"), force.artefact.schedule.t_of_sigma(sigma))
            context.setParameter(force.parameter("lambda"), 0.5)
            context.getIntegrator().step(20)
            times = []
            for _ in range(5):
                started = time.perf_counter()
                context.getIntegrator().step(20)
                times.append((time.perf_counter() - started) / 20 * 1e6)
            found[f"{name}, sigma {sigma} nm"] = float(np.median(times))
    return found


PARTS = {"sample": sample_part, "alone": alone, "residual": residual, "fields": fields, "steps": steps}


def over_seeds(rows: list[dict], key: str, digits: int) -> str:
    """Mean and its standard error over the training seeds; one number where there is one seed."""
    values = [r[key] for r in rows]
    error = f" +- {standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{error}"


def table(found: dict[str, dict]) -> list[str]:
    """What is in hand, as lines of markdown."""
    lines = [
        "# The network model, measured",
        "",
        f"Alanine dipeptide F1, amber14, vacuum, 300 K; {N_FRAMES} training and {N_TEST} held-out frames per",
        f"end, {INTERVAL} fs apart, sampled in the run with seed {SEED}; training seeds {SEEDS}.",
        "`python benchmarks/network.py --out runs/network` prints it. Settings were fixed beforehand on",
        "other frames (other seeds) of the same molecule.",
    ]
    groups: dict[str, list[dict]] = {}
    for row in (r for part in ("residual", "alone") for r in found.get(part, {}).get("rows", [])):
        groups.setdefault(row["model"], []).append(row)
    if groups:
        frame_error = max(r["force_r2_se"] for rows in groups.values() for r in rows)
        lines += [
            "",
            "## Held out, t = 0",
            "",
            "physical: the closed-form fit. residual: a network on it, its base where there is no noise.",
            "alone: a network without it (target: force R^2 >= 0.9 in 300 CPU seconds). Mean +- its",
            "standard error over the training seeds; the held-out frames add at most",
            f"{frame_error:.4f} to that of force R^2. CPU seconds are those of the training; a residual's",
            "do not hold its base's.",
            "",
            "| model | force R^2 | S_0 R^2 | O R^2 | grad O R^2 | CPU seconds |",
            "|---|---|---|---|---|---|",
        ]
        columns = {
            "force_r2": 4, "action_r2": 3, "operator_r2": 5, "operator_gradient_r2": 4, "cpu_seconds": 0,
        }  # fmt: skip
        for name, rows in groups.items():
            cells = " | ".join(over_seeds(rows, key, digits) for key, digits in columns.items())
            lines.append(f"| {name} | {cells} |")
    if "residual" in groups:
        best = "; ".join(
            f"seed {r['seed']}: {r['best_step']} ({r['losses'][0][1]:.5f} at step 0, "
            f"{min(v for _, v in r['losses']):.5f} at its best)"
            for r in groups["residual"]
        )
        lines += ["", f"Best step of the residual's training, and the held-out loss: {best}."]
    if "fields" in found:
        lines += [
            "",
            f"## Noised fields at y, by the artefact's own methods, against posterior MD ({N_Y} frames)",
            "",
            "physical: its noised tables. envelope: the physical model's clean action, noised by its",
            "posterior's mode; what a residual starts from. residual, alone: mean over the training seeds.",
            "+-: bootstrap over frames, and the standard error over seeds, added in squares.",
            "",
            *field_rows(found["fields"]["rows"], "model"),
        ]
    if "steps" in found:
        lines += ["", "## An MD step with the learned operator (PythonForce, Reference platform)", ""]
        lines += ["| | us |", "|---|---|"]
        lines += [f"| {name} | {us:.0f} |" for name, us in found["steps"].items()]
    return lines


if __name__ == "__main__":
    run_parts("network", __doc__, PARTS, table)
