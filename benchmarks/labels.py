"""Labels only: what a classifier of frames says about Delta f, beside the operator that it never saw.

``python benchmarks/labels.py --out runs/labels`` runs what is missing and writes results/labels.md.
The toy has exact answers. Alanine's reference is the operator itself on the same frames, and BAR
over the frames of all runs. The classifier sees coordinates and labels; energies only judge it.
"""

from pathlib import Path
from typing import Any

import numpy as np
from methyl import hydrogens_of, sampled
from parts import Part, run_parts, standard_error
from rich.progress import track

from openmm_diffforce.alanine import AlanineCase, alanine_case
from openmm_diffforce.audit import audit_labels
from openmm_diffforce.density import fit_operator_density
from openmm_diffforce.estimate import MIN_OVERLAP, bar_between
from openmm_diffforce.labels import LabelReadout, fit_labels
from openmm_diffforce.pair_features import pair_splines
from openmm_diffforce.project import r_squared
from openmm_diffforce.systems import graph_from_topology

SEED = 1300
N_RUNS = 5
N_FRAMES = {"F1": 2500, "Br3": 800}
"""Frames per end state, 1 ps apart."""
INTERVAL = 1000
SEGMENT = 10
"""Frames between two moves of the methyl group."""
N_ANCHORS = 8
BECOMES = {"F1": "F", "Br3": "Br"}
"""What the perturbed hydrogens turn into."""

N_TOYS = 100
N_TOY_FRAMES = 4000
TOY_SIGMAS = (0.0, 0.1, 0.2, 0.3, 1.0)
DISTANCE, WIDTH = 2.0, 0.6


def toy_exact(sigma: float) -> tuple[float, float]:
    """Centered Delta f and scale of N(0, 1) -> N(2, 0.6^2) at a noise level."""
    v, w = 1 + sigma**2, WIDTH**2 + sigma**2
    forward = 0.5 * ((v + DISTANCE**2) / w - 1 + np.log(w / v))
    backward = 0.5 * ((w + DISTANCE**2) / v - 1 + np.log(v / w))
    return 0.5 * (backward - forward), forward + backward


def flags(found: LabelReadout) -> dict[str, Any]:
    audit = audit_labels(found)
    return {
        "verdict": audit.verdict,
        "gates": {g.name: [g.value, g.status] for g in audit.gates if np.isfinite(g.value)},
        "flagged": [f"{g.name} {g.status}" for g in audit.gates if g.status != "PASS"],
    }


def numbers(found: LabelReadout) -> dict[str, Any]:
    return {
        "curve": [[c.sigma, c.centered, c.d_centered, c.scale, c.d_scale] for c in found.curve],
        "extrapolated": found.extrapolated, "roughness": found.roughness, "ridge": found.ridge,
        "inefficiency": found.inefficiency, **flags(found),
    }  # fmt: skip


def toy(out: Path) -> dict[str, Any]:
    rows = []
    for run in track(range(N_TOYS), "toy"):
        generator = np.random.default_rng([SEED, run])
        x_0, x_1 = generator.standard_normal((2, N_TOY_FRAMES, 1))
        rows.append(
            numbers(
                fit_labels(
                    x_0, DISTANCE + WIDTH * x_1, lambda y: np.concatenate([y, y**2], axis=1),
                    sigmas=TOY_SIGMAS, generator=generator,
                )
            )
        )  # fmt: skip
    return {"rows": rows}


def end_frames(case: AlanineCase, seed: int, out: Path) -> list[np.ndarray]:
    """Frames of both ends, kept in ``out`` so that a stopped benchmark goes on where it was."""
    path = out / f"{case.name}_{seed}.npz"
    if not path.exists():
        ends = [
            sampled(
                case, end, N_FRAMES[case.name], [seed, end], hydrogens=hydrogens_of(case),
                interval=INTERVAL, segment=SEGMENT,
            )
            for end in (0, 1)
        ]  # fmt: skip
        np.savez(path, x_0=ends[0], x_1=ends[1])
    with np.load(path) as kept:
        return [kept["x_0"], kept["x_1"]]


def alanine(name: str) -> Part:
    def run(out: Path) -> dict[str, Any]:
        case = alanine_case(name, restrain_phi=True)
        graph = graph_from_topology(case.topology)
        becomes = [BECOMES[name] if graph.elements[s] == "H" else "C" for s in case.perturbed]
        rows, operators = [], []
        for seed in track(range(SEED + 1, SEED + 1 + N_RUNS), name):
            ends = end_frames(case, seed, out)
            o = [case.pair.operator_values(x) for x in ends]
            found = fit_labels(
                *ends, pair_splines(*ends, graph, case.perturbed, becomes),
                generator=np.random.default_rng(seed),
            )  # fmt: skip
            some = np.linspace(0, len(o[0]) - 1, N_ANCHORS // 2).astype(int)
            anchored = found.anchored(*(np.concatenate([v[some] for v in both]) for both in (ends, o)))
            g, truth = np.concatenate([found.g_0, found.g_1]), np.concatenate(o)
            g, centred = g - g.mean(), truth - truth.mean()
            rows.append(
                {
                    "seed": seed, **numbers(anchored), "r2": r_squared(g, centred),
                    "slope": float(g @ centred / (centred @ centred)),
                    "correlation": float(np.corrcoef(g, centred)[0, 1]),
                    "within": [
                        float(np.corrcoef(*two)[0, 1]) for two in zip((found.g_0, found.g_1), o, strict=True)
                    ],
                    "o_means": [float(v.mean()) for v in o],
                    "delta_f": anchored.delta_f, "d_delta_f": anchored.d_delta_f,
                    "anchor_spread": anchored.anchor_spread, "labels_alone": flags(found),
                }
            )  # fmt: skip
            operators.append(o)
        pooled = [np.concatenate(end) for end in zip(*operators, strict=True)]
        bar = bar_between(pooled[0], -pooled[1], min_overlap=0)
        reference = ("BAR", bar.delta_f, bar.d_delta_f)
        if bar.overlap < MIN_OVERLAP:
            density = fit_operator_density(pooled, n_lam=3)
            reference = ("density of the operator", density.delta_f, density.d_delta_f)
        return {
            "rows": rows, "reference": reference, "overlap": bar.overlap, "n_frames": N_FRAMES[name],
            "o_means": [float(v.mean()) for v in pooled],
        }  # fmt: skip

    return run


PARTS: dict[str, Part] = {"toy": toy, "F1": alanine("F1"), "Br3": alanine("Br3")}


def toy_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"## Toy: N(0, 1) becomes N({DISTANCE:g}, {WIDTH:g}^2)",
        "",
        f"{len(rows)} repeats of {N_TOY_FRAMES} frames per end.",
        "",
        "| sigma | centered, exact | bias | error | stated | scale, exact | bias | error | stated |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    curves = np.array([r["curve"] for r in rows])
    for k, sigma in enumerate(TOY_SIGMAS):
        cells = []
        for exact, value, stated in zip(
            toy_exact(sigma), curves[:, k, 1::2].T, curves[:, k, 2::2].T, strict=True
        ):
            miss = value - exact
            cells.append(
                f"{exact:.2f} | {miss.mean():+.3f} | {np.sqrt((miss**2).mean()):.3f} | {stated.mean():.3f}"
            )
        lines.append(f"| {sigma:g} | {' | '.join(cells)} |")
    verdicts = [r["verdict"] for r in rows]
    counts = ", ".join(f"{v} {verdicts.count(v)}" for v in ("PASS", "WARN", "FAIL"))
    return [*lines, "", f"Audit: {counts}.", ""]


def alanine_table(name: str, part: dict[str, Any]) -> list[str]:
    rows, (method, delta_f, error) = part["rows"], part["reference"]
    mean_0, mean_1 = part["o_means"]
    centered, scale = delta_f - 0.5 * (mean_0 + mean_1), mean_0 - mean_1
    lines = [
        f"## Alanine {name}: {len(rows)} independent runs of {part['n_frames']} frames per end", "",
        f"Reference, from the energies of all runs together: overlap {part['overlap']:.1e}, Delta f "
        f"{delta_f:.2f} +- {error:.2f} ({method}); centered {centered:.2f}, scale {scale:.2f}.", "",
        "| seed | independent frames, fewer end | R^2 | slope | correlation | in end 0, 1 | centered | "
        "miss | miss, same frames | scale | anchored Delta f | spread of anchors |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    misses, same = [], []
    for r in rows:
        _, value, d_value, width, d_width = r["curve"][0]
        misses.append(value - centered)
        same.append(value - (delta_f - 0.5 * sum(r["o_means"])))
        lines.append(
            f"| {r['seed']} | {r['gates']['independent frames per end'][0]:.0f} | "
            f"{r['r2']:.3f} | {r['slope']:.2f} | {r['correlation']:.3f} | "
            f"{r['within'][0]:.2f}, {r['within'][1]:.2f} | "
            f"{value:.2f} +- {d_value:.2f} | "
            f"{misses[-1]:+.2f} | {same[-1]:+.2f} | {width:.2f} +- {d_width:.2f} | "
            f"{r['delta_f']:.2f} +- {r['d_delta_f']:.2f} | {r['anchor_spread']:.2f} |"
        )
    summary = [
        f"{label} {np.mean(v):.3f} +- {standard_error(v):.3f} (worst {min(v):.3f})"
        for label, v in (("R^2", [r["r2"] for r in rows]), ("correlation", [r["correlation"] for r in rows]))
    ]
    reached = {
        "R^2 >= 0.95": [r["r2"] >= 0.95 for r in rows],
        "centered within 0.2 kT": [abs(miss) <= 0.2 for miss in misses],
        "correlation >= 0.9": [r["correlation"] >= 0.9 for r in rows],
    }
    counts = ", ".join(f"{k}: {sum(v)} of {len(v)}" for k, v in reached.items())
    rms = [float(np.sqrt(np.mean(np.square(v)))) for v in (misses, same)]
    lines += [
        "", f"Mean and its error: {', '.join(summary)}. Centered Delta f misses by {rms[0]:.2f} kT (rms; "
        f"mean {np.mean(misses):+.2f}), on the same frames by {rms[1]:.2f} (mean {np.mean(same):+.2f}). "
        f"Runs that reach {counts}.", "",
        "Curve, means over the runs:", "", "| sigma [nm] | centered | scale |", "|---|---|---|",
    ]  # fmt: skip
    curves = np.array([r["curve"] for r in rows]).mean(axis=0)
    lines += [f"| {c[0]:g} | {c[1]:.2f} | {c[3]:.2f} |" for c in curves]
    end = np.mean([r["extrapolated"] for r in rows], axis=0)
    lines += [
        f"| -> 0 | {end[0]:.2f} | {end[1]:.2f} |",
        "",
        "What the flags said, without and with anchors:",
        "",
    ]
    for r in rows:
        alone = r["labels_alone"]
        more = [flag for flag in r["flagged"] if flag not in alone["flagged"]]
        lines.append(
            f"- {r['seed']}: {alone['verdict']} ({', '.join(alone['flagged']) or 'nothing'}); "
            f"{r['verdict']} ({', '.join(more) or 'nothing more'})"
        )
    return [*lines, ""]


def table(found: dict[str, Any]) -> list[str]:
    lines = [
        "# Labels only", "",
        f"`python benchmarks/labels.py --out runs/labels` prints it; seeds from {SEED}; kT everywhere.",
        "Error: root mean square of estimate minus exact. Stated: mean of the estimator's own errors. R^2",
        "and slope: cross-fitted g_0 of every frame against its O, the mean over both ends removed. Miss:",
        "centered Delta f against the reference; on the same frames, against the reference's Delta f less",
        f"the run's own mean O, which leaves the classifier's part. Anchors: {N_ANCHORS} frames of the run.",
        "Defaults were fixed on other seeds.", "",
    ]  # fmt: skip
    if "toy" in found:
        lines += toy_table(found["toy"]["rows"])
    for name in ("F1", "Br3"):
        if name in found:
            lines += alanine_table(name, found[name])
    return lines


if __name__ == "__main__":
    run_parts("labels", __doc__ or "", PARTS, table)
