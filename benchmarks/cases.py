"""F1, Br3 and I3: windows and replica exchange, under the force field and under a learned operator.

``python benchmarks/cases.py --out runs/cases`` runs what is missing and writes results/cases.md;
``--short`` takes the reduced lengths. The classical rows are the reference: they come from the
same call, force field and restraint as the learned ones.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmm_diffforce import analysis, demo
from openmm_diffforce.alanine import TEMPERATURE, AlanineCase, alanine_case
from openmm_diffforce.artefact import export_artefact, load_artefact
from openmm_diffforce.config import DemoSettings
from openmm_diffforce.errors import DiffForceError
from openmm_diffforce.estimate import end_correction, estimate_free_energy
from openmm_diffforce.exchange import run_replica_exchange
from openmm_diffforce.force import DiffusionForce
from openmm_diffforce.models.physics import base_tables, outside_fraction
from openmm_diffforce.record import read_json, versions, write_json
from openmm_diffforce.schedule import VESchedule
from openmm_diffforce.systems import clone_system, graph_from_topology
from openmm_diffforce.training import fit_physical_model
from openmm_diffforce.windows import run_windows

CASES = ("F1", "Br3", "I3")
SEED = 11


@dataclass(frozen=True)
class Lengths:
    """Steps of 1 fs."""

    n_train: int
    n_test: int
    train_interval: int
    n_equil: int
    n_frames: int
    interval: int


FULL = Lengths(n_train=3000, n_test=1000, train_interval=400, n_equil=10000, n_frames=2000, interval=500)
"""Windows and replicas of 1 ns: hours with the learned operator."""

SHORT = Lengths(n_train=3000, n_test=500, train_interval=400, n_equil=10000, n_frames=200, interval=500)
"""Windows and replicas of 100 ps: a quarter of an hour per case."""


def fitted(case: AlanineCase, lengths: Lengths, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The model of this case, fitted to frames of both ends; and its quality on held-out frames."""
    settings = DemoSettings(
        seed=SEED, n_frames=lengths.n_train, n_test=lengths.n_test, interval=lengths.train_interval,
        n_equil=lengths.n_equil,
    )  # fmt: skip
    ends = [demo.sample_end(case, end, settings, folder, None) for end in (0, 1)]
    train = [x[: lengths.n_train] for x in ends]
    path = folder / f"alanine_{case.name}.diffforce"
    if not path.exists():
        graph, schedule = graph_from_topology(case.topology), VESchedule(settings.sigma_max)
        model, training = fit_physical_model(
            train[0], case.pair.operator_values(train[0]), train[1], case.pair.operator_values(train[1]),
            graph, case.perturbed, schedule, seed=SEED, n_draws=settings.n_draws,
        )  # fmt: skip
        export_artefact(
            model, path, graph=graph, schedule=schedule, temperature=TEMPERATURE, training=training
        )
    test = (ends[0][lengths.n_train :], ends[1][lengths.n_train :])
    return path, demo.fit_quality(load_artefact(path).model, case.system_0, case.pair, test)


def run_part(
    case: AlanineCase, operator: str, method: str, lengths: Lengths, folder: Path, model: Path, n_workers: int
) -> dict[str, Any]:
    """One run and its estimate; an error of the package is a result too, and is written down."""
    learned, parameter = None, "lambda"
    if operator == "learned":
        system = clone_system(case.system_0)
        learned = DiffusionForce(model, topology=case.topology, mode="operator", temperature=TEMPERATURE)
        system.addForce(learned)
        parameter = learned.parameter("lambda")
    else:
        system = case.pair.linear_system()
    common: dict[str, Any] = {
        "temperature": TEMPERATURE, "out_dir": folder / f"{method}_{operator}", "learned": learned,
        "n_equil": lengths.n_equil, "seed": SEED + (2 if learned else 1), "progress": False,
    }  # fmt: skip
    states = [{parameter: s["lambda"]} for s in case.states]
    started = time.monotonic()
    try:
        if method == "windows":
            run: Any = run_windows(
                system, case.topology, case.positions, states, n_frames=lengths.n_frames,
                interval=lengths.interval, n_workers=n_workers, **common,
            )  # fmt: skip
            estimate = estimate_free_energy(run.u_nk, run.dHdl)
        else:
            run = run_replica_exchange(
                system, case.topology, case.positions, states, n_iterations=lengths.n_frames,
                steps_per_iteration=lengths.interval, **common,
            )  # fmt: skip
            estimate = estimate_free_energy(run.u_nk, run.dHdl, replica=run.replica)
    except DiffForceError as err:
        return {"error": f"{type(err).__name__}: {err}"}
    found = {"estimate": estimate.to_dict(), "seconds": time.monotonic() - started}
    if method == "exchange":
        found["swaps"] = run.swaps.to_dict()
    found |= judge_last(case, run.trajectories[-1], model)
    found["last"] = estimate.estimates["MBAR"].delta_f, estimate.estimates["MBAR"].d_delta_f
    return found


def judge_last(case: AlanineCase, trajectory: Path, model: Path) -> dict[str, Any]:
    """Of the frames at lambda = 1: classical less learned O, and the share outside the training range."""
    x = analysis.load_trajectory(trajectory, trajectory.parent / "topology.pdb").xyz.astype(np.float64)
    artefact = load_artefact(model)
    learned_operator = demo.model_fields(artefact.model, x)[2]
    return {
        "gap": (case.pair.operator_values(x) - learned_operator).tolist(),
        "outside": outside_fraction(x, base_tables(artefact.model, artefact.graph))[0],
    }


def corrected(found: dict[str, Any], method: str) -> str:
    """Learned windows and the step from the learned end state 1 to the classical one."""
    from openmm_diffforce.estimate import Estimate

    runs = [found.get(f"{method} {operator}", {}) for operator in ("learned", "classical")]
    if not all("gap" in r for r in runs):
        return "-"
    gap = [np.array(r["gap"]) for r in runs]
    try:
        one = end_correction(Estimate("MBAR", *runs[0]["last"], TEMPERATURE), work_1=(gap[0], -gap[1]))
    except DiffForceError as err:
        return f"{type(err).__name__}"
    return f"{one.corrected.delta_f:.2f} +- {one.corrected.d_delta_f:.2f} (end overlap {one.min_overlap:.3f})"


def table(out: Path, lengths: Lengths, name: str) -> str:
    """What is in hand, as markdown."""
    ps = lengths.n_frames * lengths.interval * 1e-3
    lines = [
        "# F1, Br3, I3: windows and replica exchange",
        "",
        "Alanine dipeptide, amber14, vacuum, 300 K, phi within 120 degrees of -120, linear mixing, 1 fs.",
        f"Lengths: {name} ({ps:g} ps per window or replica, {lengths.n_equil} steps of equilibration, "
        f"{lengths.n_train} training frames per end state {lengths.train_interval} steps apart); "
        f"seed {SEED}.",
        f"`python benchmarks/cases.py{' --short' if name == 'SHORT' else ''}` writes this file. Delta f in "
        "kT with one standard error;",
        "errors of exchange follow replicas. The classical rows are the reference of the learned ones.",
        "Outside: share of the frames at lambda = 1 that leave the training range of the base action. A few",
        "percent are usual; where it is large, a learned run fell into a hole of the learned operator",
        "(a contact that no training frame had): its own MBAR is then that of another Hamiltonian, and the",
        "end correction, by its overlap, tells. Seconds are wall-clock, of the last call where a run was",
        "resumed.",
        "",
    ]
    for case in CASES:
        path = out / case / f"results_{name}.json"
        if not path.exists():
            continue
        found = read_json(path)
        q = found["fit"]
        lines += [
            f"## {case}",
            "",
            f"Held-out R^2: force {q['force_r2']:.4f}, base action {q['action_r2']:.4f}, operator "
            f"{q['operator_r2']:.5f}, its gradient {q['operator_gradient_r2']:.4f}.",
            "",
            "| run | MBAR | BAR | TI | smallest neighbour overlap | smallest / mean neighbour acceptance | "
            "round trips | mixing time [iterations] | outside | seconds |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for key, r in found.items():
            if key == "fit":
                continue
            if "error" in r:
                lines.append(f"| {key} | {r['error']} | | | | | | | | |")
                continue
            e = r["estimate"]
            cells = [
                f"{e['estimates'][m]['kT']['value']:.2f} +- {e['estimates'][m]['kT']['error']:.2f}"
                for m in ("MBAR", "BAR", "TI")
            ]
            swap = ["-", "-", "-"]
            if "swaps" in r:
                s = r["swaps"]
                near = np.diagonal(np.array(s["acceptance"], dtype=float), 1)
                mixing = f"{s['mixing_time']:.0f}" if s["mixing_time"] else "infinite"
                swap = [f"{near.min():.2f} / {near.mean():.2f}", f"{sum(s['round_trips'])}", mixing]
            lines.append(
                f"| {key} | {' | '.join(cells)} | {e['min_overlap']:.3f} | {' | '.join(swap)} | "
                f"{r['outside']:.1%} | {r['seconds']:.0f} |"
            )
        lines.append("")
        for method in ("windows", "exchange"):
            lines.append(f"Learned {method} with end correction: {corrected(found, method)}.  ")
        lines.append("")
    lines += ["Versions: " + ", ".join(f"{k} {v}" for k, v in versions().items() if v), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/cases"))
    parser.add_argument("--short", action="store_true", help="reduced lengths")
    parser.add_argument("--only", default=",".join(CASES), help="comma-separated cases")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the windows")
    parser.add_argument("--table", type=Path, default=Path(__file__).parent / "results" / "cases.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lengths, name = (SHORT, "SHORT") if options.short else (FULL, "FULL")
    for case_name in options.only.split(","):
        folder = options.out / case_name / name.lower()
        folder.mkdir(parents=True, exist_ok=True)
        path = options.out / case_name / f"results_{name}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        case = alanine_case(case_name, restrain_phi=True)
        print(f"{case_name}: fit ({asdict(lengths)})", flush=True)
        model, quality = fitted(case, lengths, folder)
        found["fit"] = quality
        for operator in ("classical", "learned"):
            for method in ("windows", "exchange"):
                key = f"{method} {operator}"
                if key not in found:
                    print(f"{case_name}: {key}", flush=True)
                    found[key] = run_part(case, operator, method, lengths, folder, model, options.workers)
                    write_json(path, found)
    text = table(options.out, lengths, name)
    options.table.parent.mkdir(parents=True, exist_ok=True)
    options.table.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
