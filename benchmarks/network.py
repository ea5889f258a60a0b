"""The numbers of the network model: alone, and as a residual on the physical model.

    python benchmarks/network.py --out runs/network [--only sample,alone,residual,fields,steps]

Frames are sampled in the run, with seeds used nowhere else; references (force field, posterior MD)
are computed on them. Settings are the defaults of ``NetworkSettings`` and of ``RESIDUAL``, fixed
beforehand on other frames. Every part writes ``<out>/<part>.json`` and is skipped if that exists;
the table goes to ``benchmarks/results/network.md``.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from openmm_diffforce.alanine import TEMPERATURE, alanine_case
from openmm_diffforce.artefact import export_artefact, load_artefact
from openmm_diffforce.demo import KT
from openmm_diffforce.force import DiffusionForce
from openmm_diffforce.models import operator_gradient
from openmm_diffforce.models.action import model_fields
from openmm_diffforce.network_training import RESIDUAL, fit_network
from openmm_diffforce.posterior import posterior_moments
from openmm_diffforce.project import fit_quality, r_squared
from openmm_diffforce.record import versions, write_json
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
SEEDS = (1,)
N_FRAMES, N_TEST, INTERVAL = 3000, 1000, 500
SIGMAS = (0.005, 0.01, 0.02)
N_Y, N_POSTERIOR = 12, 1000
SCHEDULE = VESchedule(0.02)


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


def quality(case, out: Path, model) -> dict:
    test = tuple(v[N_FRAMES:] for v in frames(out))
    return {
        **fit_quality(model, case.system_0, case.pair, test),
        "force_r2_se": force_error(case, model, test[0]),
    }


def alone(out: Path) -> dict:
    """The network alone, at each training seed."""
    case, graph = case_and_graph()
    rows = []
    for seed in SEEDS:
        started = time.process_time()
        model, record = fit_network(*training_data(out), graph, case.perturbed, SCHEDULE, seed=seed)
        cpu = time.process_time() - started
        export_artefact(
            model,
            out / f"alone_{seed}.diffforce",
            graph=graph,
            schedule=SCHEDULE,
            temperature=TEMPERATURE,
            training=record,
        )
        loaded = load_artefact(out / f"alone_{seed}.diffforce").model
        rows.append(
            {
                "seed": seed,
                "cpu_seconds": cpu,
                "steps": record["steps"],
                "n_weights": record["n_weights"],
                **quality(case, out, loaded),
            }
        )
        print(f"  {rows[-1]}", flush=True)
    return {"rows": rows}


def residual(out: Path) -> dict:
    """The physical model, and the residual on it at each training seed, at t = 0."""
    case, graph = case_and_graph()
    data = training_data(out)
    started = time.process_time()
    wide = VESchedule(0.05)  # the physical model's own noise levels
    physical, record = fit_physical_model(*data, graph, case.perturbed, wide, seed=SEED)
    cpu = time.process_time() - started
    export_artefact(
        physical,
        out / "physical.diffforce",
        graph=graph,
        schedule=wide,
        temperature=TEMPERATURE,
        training=record,
    )
    rows = [{"model": "physical", "cpu_seconds": cpu, **quality(case, out, physical)}]
    for seed in SEEDS:
        started = time.process_time()
        model, record = fit_network(
            *data, graph, case.perturbed, SCHEDULE, seed=seed, base=physical, settings=RESIDUAL
        )
        cpu = time.process_time() - started
        export_artefact(
            model,
            out / f"residual_{seed}.diffforce",
            graph=graph,
            schedule=SCHEDULE,
            temperature=TEMPERATURE,
            training=record,
        )
        export_artefact(
            model.base, out / "envelope.diffforce", graph=graph, schedule=SCHEDULE, temperature=TEMPERATURE
        )
        rows.append(
            {
                "model": f"residual, seed {seed}",
                "cpu_seconds": cpu,
                "best_step": record["best_step"],
                "losses": record["losses"],
                **quality(case, out, load_artefact(out / f"residual_{seed}.diffforce").model),
            }
        )
        print(f"  {rows[-1]}", flush=True)
    return {"rows": rows}


def fields(out: Path) -> dict:
    """Noised fields of every artefact, by its own methods, against posterior MD at held-out frames."""
    case, _ = case_and_graph()
    generator = np.random.default_rng(SEED)
    names = ["physical", "envelope", *(f"{kind}_{s}" for kind in ("residual", "alone") for s in SEEDS)]
    artefacts = {name: load_artefact(out / f"{name}.diffforce") for name in names}
    rows = []
    for sigma in SIGMAS:
        for end, system in enumerate((case.system_0, case.system_1)):
            held_out = frames(out)[end][N_FRAMES:]
            pick = generator.choice(len(held_out), N_Y, replace=False)
            y = held_out[pick] + sigma * generator.standard_normal((N_Y, *held_out.shape[1:]))
            truth = posterior_moments(
                system,
                y,
                sigma,
                operator=case.pair.operator_values,
                temperature=TEMPERATURE,
                n_samples=N_POSTERIOR,
                seed=SEED + end,
            )
            noise = float((truth.operator_gradient_error**2).mean() / truth.operator_gradient.var())
            draws = generator.integers(0, N_Y, (500, N_Y))
            for name, artefact in artefacts.items():
                t = artefact.schedule.t_of_sigma(sigma)
                _, gradient, operator = model_fields(artefact.model, y, t=t, lam=float(end))
                where = (torch.full((N_Y,), v, dtype=torch.float64) for v in (t, float(end)))
                slope = operator_gradient(artefact.model, torch.as_tensor(y), *where).numpy()
                row = {"sigma_nm": sigma, "end": end, "model": name, "reference_noise": noise}
                for field, value in (
                    ("score", -gradient),
                    ("operator", operator),
                    ("operator_gradient", slope),
                ):
                    want = getattr(truth, field)
                    row[field] = r_squared(value, want)
                    miss = ((value - want) ** 2).reshape(N_Y, -1).sum(axis=1)
                    total = ((want - want.mean()) ** 2).reshape(N_Y, -1).sum(axis=1)
                    row[f"{field}_se"] = float(np.std(1 - miss[draws].sum(1) / total[draws].sum(1)))
                rows.append(row)
                print(f"  {row}", flush=True)
    return {"rows": rows}


def steps(out: Path) -> dict:
    """Microseconds per MD step on the learned operator, PythonForce, with and without noise."""
    case, _ = case_and_graph()
    found = {}
    for name in ("physical", f"alone_{SEEDS[0]}", "envelope", f"residual_{SEEDS[0]}"):
        for sigma in (0.0, 0.01):
            system = clone_system(case.system_0)
            force = DiffusionForce(
                out / f"{name}.diffforce", topology=case.topology, mode="operator", backend="python"
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


def table(found: dict[str, dict]) -> str:
    """What is in hand, as markdown."""
    lines = [
        "# The network model, measured",
        "",
        f"Alanine dipeptide F1, amber14, vacuum, 300 K; {N_FRAMES} training and {N_TEST} held-out frames per",
        f"end, {INTERVAL} fs apart, sampled in the run with seed {SEED}; training seeds {SEEDS}.",
        "`python benchmarks/network.py --out runs/network` prints it. Settings were fixed beforehand on",
        "other frames (other seeds) of the same molecule.",
        "",
    ]
    head = "force R^2 | S_0 R^2 | O R^2 | grad O R^2 | CPU seconds |"

    def cells(r: dict) -> str:
        return (
            f"{r['force_r2']:.4f} +- {r['force_r2_se']:.4f} | {r['action_r2']:.3f} | "
            f"{r['operator_r2']:.5f} | {r['operator_gradient_r2']:.4f} | {r['cpu_seconds']:.0f} |"
        )

    rule = "|---|---|---|---|---|---|"
    if "alone" in found:
        lines += ["## Network alone, held out, t = 0 (target: force R^2 >= 0.9 in 300 CPU seconds)", ""]
        lines += [f"| seed | {head}", rule]
        lines += [f"| {r['seed']} | {cells(r)}" for r in found["alone"]["rows"]]
    if "residual" in found:
        lines += ["", "## Physical model and residual on it, held out, t = 0", "", f"| model | {head}", rule]
        lines += [f"| {r['model']} | {cells(r)}" for r in found["residual"]["rows"]]
        best = ", ".join(
            f"{r['model']}: {r['best_step']} (held-out loss {r['losses'][0][1]:.5f} at step 0, "
            f"{min(v for _, v in r['losses']):.5f} at its best)"
            for r in found["residual"]["rows"]
            if "best_step" in r
        )
        lines += ["", f"Best step of the residual's training: {best}."]
    if "fields" in found:
        lines += [
            "",
            f"## Noised fields at y, by the artefact's own methods, against posterior MD ({N_Y} frames)",
            "",
            "physical: its noised tables. envelope: the physical model's clean action, noised by its",
            "posterior's mode; what a residual starts from. +-: bootstrap over frames.",
            "",
            "| sigma [nm] | end | model | score R^2 | O R^2 | grad O R^2 | noise of the reference's grad O |",
            "|---|---|---|---|---|---|---|",
        ]
        for r in found["fields"]["rows"]:
            values = " | ".join(
                f"{r[name]:.3f} +- {r[name + '_se']:.3f}"
                for name in ("score", "operator", "operator_gradient")
            )
            lines.append(
                f"| {r['sigma_nm']} | {r['end']} | {r['model']} | {values} | {r['reference_noise']:.3f} |"
            )
    if "steps" in found:
        lines += ["", "## An MD step with the learned operator (PythonForce, Reference platform)", ""]
        lines += ["| | us |", "|---|---|"]
        lines += [f"| {name} | {us:.0f} |" for name, us in found["steps"].items()]
    lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in versions().items() if v), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/network"))
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts")
    parser.add_argument("--table", type=Path, default=Path(__file__).parent / "results" / "network.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only.split(","):
        path = options.out / f"{name}.json"
        if not path.exists():
            print(f"{name} ...", flush=True)
            write_json(path, PARTS[name](options.out))
    found = {n: json.loads(p.read_text()) for n in PARTS if (p := options.out / f"{n}.json").exists()}
    options.table.parent.mkdir(parents=True, exist_ok=True)
    options.table.write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
