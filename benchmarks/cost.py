"""What a Delta f costs: RMSE against force evaluations, for the bridge, the density and MBAR.

``python benchmarks/cost.py --out runs/cost --frames runs/bridge`` writes results/cost.md and cost.svg.
The frames are those that bridge.py keeps in ``--frames``; what is missing is sampled into ``--out``, or,
with ``--no-sampling``, left out. Every budget buys windows that begin from the start structure: 20000
steps of equilibration each, then frames.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from bridge import INTERVAL, N_BETWEEN, N_ENDS, N_REFERENCE, N_SETS, SEED, SEGMENT, frames_of
from methyl import hydrogens_of
from parts import Part, operator_mbar, run_parts
from rich.progress import track

from openmm_diffforce.alanine import AlanineCase, alanine_case
from openmm_diffforce.audit import SPOT_GATES, judge, spot_check
from openmm_diffforce.bridge import noisy_operator_bridge
from openmm_diffforce.density import fit_operator_density
from openmm_diffforce.errors import ConvergenceError, InputError, PoorOverlapError
from openmm_diffforce.estimate import bar_between
from openmm_diffforce.posterior_bridge import run_posterior_bridge
from openmm_diffforce.record import plain, write_json

CASES = ("F1", "Br3", "I3")
N_EQUIL = 20000
"""Steps thrown away at the start of every window."""
BUDGETS = (220_000, 440_000, 880_000, 1_600_000, 2_440_000)
"""Steps over all windows of one estimate."""
N_WINDOWS = (2, 3, 5, 9, 19)
MAX_REPEATS = 20
MAX_BRIDGES = 5
MIN_FRAMES = 15
POSTERIOR: dict[str, Any] = {
    "sigma": 0.06, "n_y": 40, "n_samples": 60, "n_equil": 500, "lams": 5, "work": "bar",
}  # fmt: skip
N_POSTERIOR_FRAMES = 1000
"""Frames of each end from which posterior MD picks its n_y."""

FRAMES: list[Path] = []
SAMPLING = [True]

Frames = dict[float, list[tuple[np.ndarray, np.ndarray]]]
"""lambda -> independent runs of (x, O)."""


def frames_per_window(budget: int, n_windows: int) -> int:
    """What a budget buys each window after its equilibration."""
    return (budget // n_windows - N_EQUIL) // INTERVAL


def evaluations(n_windows: int, n_frames: int) -> tuple[int, int]:
    """Force and energy evaluations of windows of so many frames: steps; O, and the methyl's images.

    O takes both ends' energies; a move of the methyl group those of three images. The minimizer of the
    start (once per window) is not in it.
    """
    steps = N_EQUIL + INTERVAL * n_frames
    return n_windows * steps, n_windows * (2 * n_frames + 6 * -(-n_frames // SEGMENT))


def kept(
    case: AlanineCase, stem: str, lam: float, n: int, seed: int, out: Path
) -> tuple[np.ndarray, np.ndarray] | None:
    for folder in [*FRAMES, out]:
        if (folder / stem).exists():
            with np.load(folder / stem) as found:
                return found["x"], found["o"]
    if not SAMPLING[0]:
        return None
    return frames_of(case, lam, n, seed, hydrogens_of(case), out / stem)


def windows_of(case: AlanineCase, out: Path) -> tuple[list[float], list[np.ndarray]]:
    """The lambdas and O of the windows of the reference."""
    lams = [s["lambda"] for s in case.states]
    found = [
        kept(case, f"{case.name}_window_{k}.npz", lam, N_REFERENCE, SEED, out) for k, lam in enumerate(lams)
    ]
    missing = [k for k, f in enumerate(found) if f is None]
    if missing:
        raise SystemExit(f"{case.name}: expected the frames of all windows, found none of {missing}.")
    return lams, [f[1] for f in found if f is not None]


def sets_of(case: AlanineCase, out: Path) -> tuple[list[float], list[list[tuple[np.ndarray, np.ndarray]]]]:
    """Independent sets of both ends and of two windows between, those that are complete."""
    lams = [s["lambda"] for s in case.states]
    four = [0.0, lams[len(lams) // 3], lams[2 * len(lams) // 3], 1.0]
    sets = []
    for k in range(1, N_SETS + 1):
        n = [max(N_ENDS) if lam in (0, 1) else N_BETWEEN for lam in four]
        found = [
            kept(case, f"{case.name}_{k}_{lam:.3f}.npz", lam, size, SEED + k, out)
            for lam, size in zip(four, n, strict=True)
        ]
        one = [f for f in found if f is not None]
        if len(one) == len(four):
            sets.append(one)
    return four, sets


def blocks(n: int, size: int) -> list[slice]:
    return [slice(i * size, (i + 1) * size) for i in range(n // size)]


@dataclass(frozen=True)
class Task:
    """One estimator at one budget, and the repeats that the frames allow."""

    method: str
    n_windows: int
    n_frames: int
    repeats: list[Callable[[], float]]


def density_of(o: Sequence[np.ndarray], lams: Sequence[float]) -> float:
    return fit_operator_density(list(o), list(lams), n_lam=3).delta_f


def mbar_of(o: Sequence[np.ndarray], lams: Sequence[float]) -> float:
    """Every frame is used: subsampling would mend the error bar, which is not asked here."""
    if len(o) == 2:
        return bar_between(o[0], -o[1], decorrelate=False, min_overlap=0).delta_f
    return operator_mbar(lams, o, subsample=False)[0]


def bridge_of(x: Sequence[np.ndarray], o: Sequence[np.ndarray], atoms: Sequence[int], seed: int) -> float:
    return noisy_operator_bridge(
        list(x), list(o), generator=np.random.default_rng(seed), atoms=atoms, n_bootstrap=0
    ).delta_f


def tasks_of(case: AlanineCase, out: Path) -> tuple[list[Task], dict[str, Any]]:
    lams, windows = windows_of(case, out)
    four, sets = sets_of(case, out)
    print(f"{case.name}: {len(windows)} windows, {len(sets)} sets", flush=True)
    pooled: dict[float, list[np.ndarray]] = {lam: [o] for lam, o in zip(lams, windows, strict=True)}
    for one in sets:
        for lam, (_, o) in zip(four, one, strict=True):
            pooled[lam].append(o)
    value, error = operator_mbar(lams, [np.concatenate(pooled[lam]) for lam in lams])
    tasks: list[Task] = []

    def add(method: str, n_windows: int, n: int, repeats: list[Callable[[], float]], most: int) -> None:
        if n >= MIN_FRAMES and len(repeats) >= 2:
            # Spread over the runs, not the first blocks of them.
            pick = np.unique(np.linspace(0, len(repeats) - 1, min(most, len(repeats))).round().astype(int))
            tasks.append(Task(method, n_windows, n, [repeats[i] for i in pick]))

    for budget in BUDGETS:
        for n_windows in sorted({w for w in (*N_WINDOWS, len(lams)) if w <= len(lams)}):
            n = frames_per_window(budget, n_windows)
            if n < MIN_FRAMES:
                continue
            idx = np.linspace(0, len(lams) - 1, n_windows).round().astype(int)
            some = [lams[i] for i in idx]
            if n_windows == 2:
                sources = [[one[0][1], one[-1][1]] for one in sets]
            else:
                sources = [[windows[i] for i in idx]]
            add(
                f"MBAR, {n_windows} windows", n_windows, n,
                [lambda o=[v[b] for v in s], at=some: mbar_of(o, at)
                 for s in sources for b in blocks(min(len(v) for v in s), n)],
                MAX_REPEATS,
            )  # fmt: skip
        n = frames_per_window(budget, 2)
        cuts = [(k, one, b) for k, one in enumerate(sets) for b in blocks(len(one[0][1]), n)]
        ends = [([one[0][0][b], one[-1][0][b]], [one[0][1][b], one[-1][1][b]], k) for k, one, b in cuts]
        add("density, 2 ends", 2, n, [lambda o=o: density_of(o, (0, 1)) for _, o, _ in ends], MAX_REPEATS)
        add(
            "bridge, 2 ends", 2, n,
            [lambda x=x, o=o, k=k: bridge_of(x, o, case.perturbed, SEED + k) for x, o, k in ends],
            MAX_BRIDGES,
        )  # fmt: skip
        n = frames_per_window(budget, 4)
        quads = [[v[1][b] for v in one] for one in sets for b in blocks(N_BETWEEN, n)]
        add("density, 4 windows", 4, n, [lambda o=o: density_of(o, four) for o in quads], MAX_REPEATS)
        add("MBAR, 4 windows", 4, n, [lambda o=o: mbar_of(o, four) for o in quads], MAX_REPEATS)
    n_all = sum(len(o) for parts in pooled.values() for o in parts)
    return tasks, {"reference": (value, error), "n_windows": len(lams), "n_sets": len(sets), "n_all": n_all}


def answer(one: Callable[[], float]) -> float | None:
    """An estimate, or None where the method refuses: too few independent frames, no overlap."""
    try:
        return one()
    except (InputError, ConvergenceError, PoorOverlapError):
        return None


def case_part(name: str) -> Part:
    def run(out: Path) -> dict[str, Any]:
        case = alanine_case(name, restrain_phi=True)
        tasks, found = tasks_of(case, out)
        rows = []
        for task in track(tasks, name):
            path = out / f"{name}_{task.method.replace(', ', '_').replace(' ', '_')}_{task.n_frames}.json"
            if not path.exists():
                start = time.process_time()
                answers = [answer(one) for one in task.repeats]
                seconds = (time.process_time() - start) / len(answers)
                values = [v for v in answers if v is not None]
                forces, energies = evaluations(task.n_windows, task.n_frames)
                write_json(path, plain({
                    "method": task.method, "n_frames": task.n_frames, "forces": forces, "energies": energies,
                    "values": values, "refused": len(answers) - len(values), "seconds": seconds,
                }))  # fmt: skip
            rows.append(json.loads(path.read_text()))
            print(name, task.method, rows[-1]["forces"], *cells(rows[-1], found["reference"][0]), flush=True)
        return {**found, "rows": rows}

    return run


def posterior_part(name: str) -> Part:
    def run(out: Path) -> dict[str, Any]:
        """Posterior MD on each set: all that it costs, the frames that it starts from included."""
        case = alanine_case(name, restrain_phi=True)
        runs = []
        for k, one in enumerate(track(sets_of(case, out)[1], name)):
            path = out / f"{name}_posterior_{k + 1}.json"
            if not path.exists():
                start = time.process_time()
                found = run_posterior_bridge(
                    case.pair, one[0][0][:N_POSTERIOR_FRAMES], one[-1][0][:N_POSTERIOR_FRAMES],
                    seed=SEED + k, platform="Reference", **POSTERIOR,
                )  # fmt: skip
                seconds = time.process_time() - start
                bridge = noisy_operator_bridge(
                    [one[e][0][:N_POSTERIOR_FRAMES] for e in (0, -1)],
                    [one[e][1][:N_POSTERIOR_FRAMES] for e in (0, -1)],
                    generator=np.random.default_rng(SEED + k), atoms=case.perturbed,
                )  # fmt: skip
                forces, energies = evaluations(2, N_POSTERIOR_FRAMES)
                write_json(path, plain({
                    "value": found.delta_f, "error": found.d_delta_f, "d_work": found.d_work,
                    "overlap": found.overlap, "closures": found.closures, "lams": found.lams,
                    "bounds": (found.bound_lower, found.bound_upper),
                    "forces": found.n_forces + forces,
                    # O of the frames that it starts from is in both numbers.
                    "energies": found.n_energies + energies - 4 * N_POSTERIOR_FRAMES,
                    "forces_posterior": found.n_forces, "seconds": seconds,
                    "bridge": (bridge.delta_f, bridge.d_delta_f),
                    "gates": {g.name: g.value for g in spot_check(bridge, found)},
                }))  # fmt: skip
            runs.append(json.loads(path.read_text()))
            print(name, "posterior MD", runs[-1]["value"], runs[-1]["error"], flush=True)
        return {"runs": plain(runs), "settings": POSTERIOR, "n_frames": N_POSTERIOR_FRAMES}

    return run


# ------------------------------------------------------------------------------- table and figure


def rmse(values: Sequence[float], reference: float) -> tuple[float, float]:
    """Root mean square error and its own relative error, as of independent normal repeats."""
    miss = np.asarray(values) - reference
    return float(np.sqrt((miss**2).mean())), 1 / math.sqrt(2 * len(miss))


def cells(row: dict[str, Any], reference: float) -> tuple[str, str, str]:
    """Repeats, bias and RMSE of a row."""
    values, refused = row["values"], row["refused"]
    repeats = str(len(values)) + (f" ({refused} refused)" if refused else "")
    if not values:
        return repeats, "", ""
    size, relative = rmse(values, reference)
    return repeats, f"{np.mean(values) - reference:+.2f}", f"{size:.2f} +- {relative * size:.2f}"


def table(found: dict[str, Any]) -> list[str]:
    lines = [
        "# Cost: RMSE against force evaluations", "",
        "`python benchmarks/cost.py --out runs/cost --frames runs/bridge` prints it; kT everywhere.", "",
        *wrap(
            f"A force evaluation is a step of 1 fs; every window pays {N_EQUIL} of equilibration, frames are "
            f"{INTERVAL} steps apart. Energy evaluations: two per frame for O, six per move of the methyl "
            "group; the minimizer of a window's start is counted in neither. CPU-seconds: of the estimator "
            "alone, per estimate; nothing is trained beforehand, the bridge's own fits are in it.", 108,
        ), "",
        *wrap(
            "Repeats of two and four windows are disjoint blocks of independent sets of runs; those of other "
            "numbers disjoint blocks of one long run of every window, which start better equilibrated than "
            "what they are charged for. RMSE is against MBAR of all frames, with the error that so many "
            "normal repeats would have; that reference shares the blocks' frames, so that an RMSE near its "
            "error means no more than that. Where fewer than two blocks fit there is no row; a repeat is "
            "refused where its frames are too few to be independent or do not overlap.", 108,
        ), "",
    ]  # fmt: skip
    for name in CASES:
        if name not in found:
            continue
        part = found[name]
        value, error = part["reference"]
        lines += [
            f"## Alanine {name}", "",
            f"Reference: MBAR of {part['n_windows']} windows, {part['n_all']} frames with those of "
            f"{part['n_sets']} sets: {value:.2f} +- {error:.2f}.", "",
            "| method | frames per window | forces | energies | repeats | bias | RMSE | CPU-s |",
            "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for r in sorted(part["rows"], key=lambda r: (r["method"], r["forces"])):
            lines.append(
                f"| {r['method']} | {r['n_frames']} | {r['forces']:,} | {r['energies']:,} "
                f"| {' | '.join(cells(r, value))} | {r['seconds']:.2g} |"
            )
        lines.append("")
        post = found.get(f"{name}_posterior", {"runs": []})
        if post["runs"]:
            lines += posterior_rows(post, value)
    figure(found)
    return [*lines, "![RMSE against force evaluations](cost.svg)"] if found else lines


def posterior_rows(post: dict[str, Any], reference: float) -> list[str]:
    s, runs = post["settings"], post["runs"]
    size, relative = rmse([r["value"] for r in runs], reference)
    lines = [
        *wrap(
            f"Posterior MD as an estimator of its own: {s['n_y']} noised frames per end (sigma "
            f"{s['sigma']} nm on all atoms), out of {post['n_frames']} sampled; {s['lams']} lambdas of "
            f"{s['n_samples']} samples, works by {s['work']}. RMSE of {len(runs)} sets: {size:.2f} +- "
            f"{relative * size:.2f}.", 108,
        ), "",
        "| set | Delta f | stated | from the works | overlap | mean works | Tweedie | posterior forces "
        "| all forces | energies | CPU-s, MD too |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for k, r in enumerate(runs):
        low, high = r["bounds"]
        lines.append(
            f"| {k + 1} | {r['value']:.2f} | {r['error']:.2f} | {r['d_work']:.2f} | {r['overlap']:.2f} "
            f"| {low:.1f}, {high:.1f} | {r['closures']['tweedie']:.2f} | {r['forces_posterior']:,} "
            f"| {r['forces']:,} | {r['energies']:,} | {r['seconds']:.0f} |"
        )
    names = [name.removeprefix("posterior MD: ") for name in runs[0]["gates"]]
    lines += [
        "", f"The same as spot check of the bridge on the same {post['n_frames']} frames per end:", "",
        f"| set | bridge | {' | '.join(names)} |", "|---|---|" + "---|" * len(names),
    ]  # fmt: skip
    for k, r in enumerate(runs):
        cells = " | ".join(
            f"{value:.2f} {judge(gate, value, gates=SPOT_GATES).status}" for gate, value in r["gates"].items()
        )
        lines.append(f"| {k + 1} | {r['bridge'][0]:.2f} +- {r['bridge'][1]:.2f} | {cells} |")
    return [*lines, ""]


def figure(found: dict[str, Any]) -> None:
    """results/cost.svg: a panel per case."""
    import matplotlib.pyplot as plt

    names = [n for n in CASES if n in found]
    if not names:
        return
    with plt.rc_context({"svg.hashsalt": "cost", "font.size": 9}):
        fig, axes = plt.subplots(
            1, len(names), figsize=(2.2 + 4.0 * len(names), 4.2), squeeze=False, layout="constrained"
        )
        for axis, name in zip(axes[0], names, strict=True):
            part = found[name]
            value, error = part["reference"]
            answered = [r for r in part["rows"] if r["values"]]
            methods = sorted({r["method"] for r in answered}, key=_order)
            windows = [m for m in methods if m.startswith("MBAR")]
            for method in methods:
                rows = sorted((r for r in answered if r["method"] == method), key=lambda r: r["forces"])
                size, relative = np.array([rmse(r["values"], value) for r in rows]).T
                if method.startswith("MBAR"):
                    shade = 0.75 - 0.65 * windows.index(method) / max(len(windows) - 1, 1)
                    style: dict[str, Any] = {"color": str(shade), "marker": ".", "lw": 1}
                else:
                    style = {
                        "color": {"bridge": "C3", "densit": "C0"}[method[:6]],
                        "marker": "o" if "2" in method else "s", "lw": 1.8,
                    }  # fmt: skip
                low = np.minimum(relative, 0.9) * size
                axis.errorbar(
                    [r["forces"] for r in rows], size, (low, relative * size), label=method, **style
                )
            post = found.get(f"{name}_posterior", {"runs": []})["runs"]
            if post:
                size_one, relative_one = rmse([r["value"] for r in post], value)
                axis.errorbar(
                    [np.mean([r["forces"] for r in post])], [size_one], [min(relative_one, 0.9) * size_one],
                    label="posterior MD, 2 ends", color="C2", marker="D", ls="none",
                )  # fmt: skip
            axis.axhspan(1e-3, error, color="0.92", lw=0, label="error of the reference")
            axis.set(
                xscale="log", yscale="log", title=f"alanine {name}", xlabel="force evaluations [million]",
                ylabel="RMSE of Delta f [kT]", ylim=(0.5 * error, None),
            )  # fmt: skip
            axis.set_xticks([2e5, 5e5, 1e6, 2e6], labels=["0.2", "0.5", "1", "2"])
            axis.set_xticks([], minor=True)
        axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
        path = Path(__file__).parent / "results" / "cost.svg"
        fig.savefig(path, metadata={"Date": None})
        plt.close(fig)
        text = path.read_text()
        path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")


def _order(method: str) -> tuple[int, int]:
    number = int(next(w for w in method.split() if w.isdigit()))
    return (("bridge", "densit", "MBAR, ").index(method[:6]), number)


PARTS: dict[str, Part] = {
    **{name: case_part(name) for name in CASES},
    **{f"{name}_posterior": posterior_part(name) for name in CASES},
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--frames", type=Path, action="append", default=[])
    parser.add_argument("--no-sampling", action="store_true")
    own, rest = parser.parse_known_args()
    FRAMES.extend(own.frames)
    SAMPLING[0] = not own.no_sampling
    sys.argv[1:] = rest
    run_parts("cost", __doc__ or "", PARTS, table)
