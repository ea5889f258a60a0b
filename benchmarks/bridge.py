"""Delta f without overlap: the noisy operator bridge and its limits beside BAR, EXP and moments.

``python benchmarks/bridge.py --out runs/bridge`` runs what is missing and writes results/bridge.md.
Toys have exact answers. The reference of alanine's cases and of random perturbations is MBAR over
windows of their own from the same call; the bridge sees two end states alone, or them and two windows
between. Every estimate is kept with its audit, and the audit is judged at the end.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from methyl import hydrogens_of, sampled
from parts import Part, operator_mbar, run_parts
from rich.progress import track
from scipy.special import logsumexp

from openmm_diffforce.alanine import AlanineCase, alanine_case, alanine_dipeptide
from openmm_diffforce.alchemy import lambda_states, perturb_nonbonded
from openmm_diffforce.audit import BRIDGE_GATES, Audit, audit_bridge, judge
from openmm_diffforce.bridge import BridgeResult, default_levels, noisy_operator_bridge
from openmm_diffforce.errors import DiffForceError
from openmm_diffforce.estimate import bar_between
from openmm_diffforce.pair_features import PairOperator
from openmm_diffforce.record import atomic_path, plain, write_json
from openmm_diffforce.summary import PairDistances
from openmm_diffforce.systems import graph_from_topology

SEED = 900
N_TOYS, N_TOYS_KEPT = 200, 20
"""Repeats of a toy; so many of them are kept at a time."""
N_TOY_FRAMES = 1000
N_SETS = 5
"""Independent runs of every alanine case."""
N_REFERENCE, N_BETWEEN = 1500, 1000
N_ENDS = (1000, 6000)
INTERVAL = 200
"""Steps of 1 fs between frames; inefficiencies are estimated, not assumed."""
SEGMENT = 50
"""Frames between two moves of the methyl group."""
SPACED = 2000
"""Steps between frames of ``F1_spaced``: the same number of frames from ten times the time."""
SHORT_CASES, SHORT_LENGTHS, SHORT_RUNS, N_SHORT = ("Br3", "I3"), (100, 200), 3, 5
"""Starved runs: N_SHORT disjoint blocks of every length from each of the first runs of these cases."""
SUPERVISED_CASES, N_SUPERVISED, N_SUPERVISED_LEVELS = ("F1", "Br3", "I3"), 3, 4
"""A network and the pair operator beside the defaults: so many runs of these cases, N_ENDS[0] frames."""
N_RANDOM = 20
N_RANDOM_WINDOWS, N_RANDOM_REFERENCE, N_RANDOM_ENDS = 9, 500, 1000

Sample = tuple[list[np.ndarray], list[np.ndarray], float]


# ------------------------------------------------------------------------------------------- toys


def shifted(generator: np.random.Generator) -> Sample:
    """Two harmonic wells six widths apart."""
    x = [generator.normal(m, 1.0, (N_TOY_FRAMES, 1)) for m in (0.0, 6.0)]
    return x, [18 - 6 * v[:, 0] for v in x], 0.0


def widened(generator: np.random.Generator) -> Sample:
    """A harmonic well, variance 1 -> 25."""
    x = [generator.normal(0.0, s, (N_TOY_FRAMES, 1)) for s in (1.0, 5.0)]
    return x, [-0.48 * v[:, 0] ** 2 for v in x], -math.log(5)


def on_a_line(action: Callable[[Any], Any], operator: Callable[[Any], Any]) -> Callable[..., Sample]:
    r = np.linspace(-3, 3, 400001)
    r = r[np.isfinite(operator(r))]
    weights = [np.exp(-action(r) - lam * operator(r)) for lam in (0, 1)]
    cumulative = [np.cumsum(w) / w.sum() for w in weights]
    exact = -float(np.log(weights[1].sum() / weights[0].sum()))

    def draw(generator: np.random.Generator) -> Sample:
        x = [r[np.searchsorted(c, generator.random(N_TOY_FRAMES))][:, None] for c in cumulative]
        return x, [operator(v[:, 0]) for v in x], exact

    return draw


def well(x: Any) -> Any:
    return 3 * (x**2 - 1) ** 2


TOYS = {
    "shifted": ("Gaussians 6 sigma apart", shifted),
    "widened": ("Gaussian, variance 1 -> 25", widened),
    "linear": ("double well, linear operator", on_a_line(well, lambda x: 4 * x)),
    "quadratic": ("double well, quadratic operator", on_a_line(well, lambda x: 10 * (x + 1) ** 2)),
    "steric": (
        "steric r^-12",
        on_a_line(
            lambda x: 50 * (x - 0.6) ** 2,
            lambda x: np.where(x > 0.15, (0.7 / np.maximum(x, 0.15)) ** 12, np.inf),
        ),
    ),
    "both": (
        "Gaussians shifted and widened",
        on_a_line(lambda x: 8 * (x + 0.5) ** 2, lambda x: 4 * (x - 0.5) ** 2 - 8 * (x + 0.5) ** 2 + 3),
    ),
}


def methods(
    x: list[np.ndarray],
    o: list[np.ndarray],
    seed: int,
    *,
    correlated: bool,
    atoms: Any = None,
    features: Any = None,
) -> dict[str, Any]:
    """Every estimate from two end states: value, error and what judges it."""
    found = noisy_operator_bridge(
        x, o, generator=np.random.default_rng(seed), atoms=atoms, features=features,
        inefficiency=None if correlated else (1, 1),
    )  # fmt: skip
    bar = bar_between(o[0], -o[1], decorrelate=correlated, min_overlap=0)
    return {
        "bridge": judged(found),
        "density": (found.density.delta_f, found.density.d_delta_f),
        "BAR": (bar.delta_f, bar.d_delta_f, bar.overlap),
        "Tweedie on moments": (found.readout.delta_f, found.readout.d_delta_f),
        "EXP forward": (-float(logsumexp(-o[0]) - np.log(len(o[0]))), None),
        "EXP reverse": (float(logsumexp(o[1]) - np.log(len(o[1]))), None),
    }


def judged(found: BridgeResult) -> tuple[float, float, dict[str, Any]]:
    """Value, error, and the audit with what it was made from."""
    audit = audit_bridge(found)
    gates = {g.name: g.value for g in audit.gates}
    return (
        found.delta_f,
        found.d_delta_f,
        {"verdict": audit.verdict, "gates": gates, "sigma": found.level.sigma},
    )


def toy(name: str) -> Part:
    def run(out: Path) -> dict[str, Any]:
        draw = TOYS[name][1]
        generator = np.random.default_rng(SEED)
        rows: dict[str, list[Any]] = {}
        exact = 0.0
        for first in range(0, N_TOYS, N_TOYS_KEPT):
            kept = out / f"{name}_from_{first}.json"
            drawn = [draw(generator) for _ in range(N_TOYS_KEPT)]
            exact = drawn[0][2]
            if not kept.exists():
                some: dict[str, list[Any]] = {}
                for k, (x, o, _) in enumerate(track(drawn, f"{name} {first}"), start=first):
                    for method, value in methods(x, o, SEED + k, correlated=False).items():
                        some.setdefault(method, []).append(value)
                write_json(kept, plain(some))
            for method, values in json.loads(kept.read_text()).items():
                rows.setdefault(method, []).extend(values)
        return {"exact": exact, "rows": rows}

    return run


# -------------------------------------------------------------------------------------- molecules


def frames_of(
    case: AlanineCase, lam: float, n_frames: int, seed: int, hydrogens: Sequence[int], path: Path,
    spacing: int = INTERVAL,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Frames of a state and O on them, kept in ``path``."""
    if not path.exists():
        key = [seed, round(1e6 * lam)]
        x = sampled(
            case, lam, n_frames, key, hydrogens=hydrogens, interval=spacing,
            segment=SEGMENT * INTERVAL // spacing,
        )  # fmt: skip
        with atomic_path(path) as part, open(part, "wb") as handle:
            np.savez(handle, x=x, o=case.pair.operator_values(x))
    with np.load(path) as kept:
        return kept["x"], kept["o"]


def reference(
    case: AlanineCase, n_frames: int, seed: int, hydrogens: Sequence[int], stem: Path,
    spacing: int = INTERVAL,
) -> tuple[float, float]:  # fmt: skip
    lams = [s["lambda"] for s in case.states]
    o_k = []
    for k, lam in enumerate(lams):
        path = stem.with_name(f"{stem.name}_window_{k}.npz")
        o_k.append(frames_of(case, lam, n_frames, seed, hydrogens, path, spacing)[1])
    return operator_mbar(lams, o_k)


def alanine(name: str, spacing: int = INTERVAL) -> Part:
    """Part ``name``; the case is what stands before an underscore."""

    def run(out: Path) -> dict[str, Any]:
        case = alanine_case(name.split("_")[0], restrain_phi=True)
        hydrogens = hydrogens_of(case)
        lams = [s["lambda"] for s in case.states]
        between = [lams[len(lams) // 3], lams[2 * len(lams) // 3]]
        found: dict[str, Any] = {
            "reference": reference(case, N_REFERENCE, SEED, hydrogens, out / name, spacing),
            "n_windows": len(lams), "between": between, "sets": [],
        }  # fmt: skip
        for k in track(range(1, N_SETS + 1), name):
            kept = out / f"{name}_set_{k}.json"
            if not kept.exists():
                four = [
                    frames_of(
                        case, lam, max(N_ENDS) if lam in (0, 1) else N_BETWEEN, SEED + k, hydrogens,
                        out / f"{name}_{k}_{lam:.3f}.npz", spacing,
                    )
                    for lam in (0.0, *between, 1.0)
                ]  # fmt: skip
                row: dict[str, Any] = {}
                for n in N_ENDS:
                    ends = four[0], four[-1]
                    some = [v[0][:n] for v in ends], [v[1][:n] for v in ends]
                    for method, value in methods(
                        *some, SEED + k, correlated=True, atoms=case.perturbed
                    ).items():
                        row[f"{method}, {n} per end"] = value
                composite = noisy_operator_bridge(
                    [v[0][:N_BETWEEN] for v in four], [v[1][:N_BETWEEN] for v in four], (0.0, *between, 1.0),
                    generator=np.random.default_rng(SEED + k), atoms=case.perturbed,
                )  # fmt: skip
                density = composite.density
                row[f"bridge, 4 windows of {N_BETWEEN}"] = judged(composite)
                row[f"density, 4 windows of {N_BETWEEN}"] = (density.delta_f, density.d_delta_f)
                row[f"MBAR, 4 windows of {N_BETWEEN}"] = operator_mbar(
                    (0.0, *between, 1.0), [v[1][:N_BETWEEN] for v in four]
                )
                write_json(kept, plain(row))
            found["sets"].append(json.loads(kept.read_text()))
            print(name, k, {m: np.round(v[:2], 2).tolist() for m, v in found["sets"][-1].items()
                            if v[1] is not None}, flush=True)  # fmt: skip
        return found

    return run


def draw(seed: int) -> tuple[AlanineCase, list[int], dict[str, Any]]:
    """A perturbation of alanine dipeptide: one to three hydrogens get drawn charges and sizes."""
    generator = np.random.default_rng(SEED + 5000 + seed)
    topology, positions, system_0 = alanine_dipeptide(restrain_phi=True)
    names = {(a.residue.name, a.name): a.index for a in topology.atoms()}
    site = ["HB", "ACE", "NME"][int(generator.integers(3))]
    groups = {
        "HB": (("HB1", "HB2", "HB3"), "ALA", "CB"), "ACE": (("H1", "H2", "H3"), "ACE", "CH3"),
        "NME": (("H1", "H2", "H3"), "NME", "C"),
    }  # fmt: skip
    hydrogens, residue, carbon = groups[site]
    chosen = hydrogens[: int(generator.integers(1, 4))]
    values = (
        float(generator.uniform(-0.3, 0.1)),
        float(generator.uniform(0.28, 0.41)),
        float(generator.uniform(0.1, 1.6)),
    )
    changed = [names[residue, h] for h in chosen]
    centre = names[residue, carbon]
    system_1 = perturb_nonbonded(system_0, dict.fromkeys(changed, values), neutralize_on=centre)
    power = 1.0 + 3.0 * (values[1] - 0.28) / 0.13
    case = AlanineCase(
        name=f"random {seed}", topology=topology, positions=positions, system_0=system_0, system_1=system_1,
        perturbed=tuple(sorted((*changed, centre))), states=lambda_states(N_RANDOM_WINDOWS, power),
    )  # fmt: skip
    return (
        case,
        [names[residue, h] for h in hydrogens],
        {"site": f"{residue} {', '.join(chosen)}", "q_sigma_epsilon": values},
    )


def random(out: Path) -> dict[str, Any]:
    """Random perturbations, each with its own reference."""
    found = []
    for seed in track(range(N_RANDOM), "random"):
        kept = out / f"random_{seed}.json"
        if not kept.exists():
            case, hydrogens, what = draw(seed)
            stem = out / f"random_{seed}"
            value = reference(case, N_RANDOM_REFERENCE, SEED + seed, hydrogens, stem)
            x, o = zip(
                *(
                    frames_of(
                        case,
                        lam,
                        N_RANDOM_ENDS,
                        SEED + 200 + seed,
                        hydrogens,
                        stem.with_name(f"random_{seed}_{lam}.npz"),
                    )
                    for lam in (0, 1)
                ),
                strict=True,
            )
            rows = methods(list(x), list(o), SEED + seed, correlated=True, atoms=case.perturbed)
            write_json(kept, plain({**what, "reference": value, "rows": rows}))
        found.append(json.loads(kept.read_text()))
        print(seed, found[-1]["reference"], found[-1]["rows"]["bridge"][:2], flush=True)
    return {"draws": found}


def ends_of(case: AlanineCase, run: int, out: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Frames and O of both ends of one of the independent runs of a case."""
    hydrogens = hydrogens_of(case)
    return [
        frames_of(case, lam, max(N_ENDS), SEED + run, hydrogens, out / f"{case.name}_{run}_{lam:.3f}.npz")
        for lam in (0.0, 1.0)
    ]


def short_run(out: Path, name: str, k: int) -> list[dict[str, Any]]:
    kept = out / f"short_{name}_{k}.json"
    if not kept.exists():
        case = alanine_case(name, restrain_phi=True)
        ends = ends_of(case, k, out)
        rows = []
        for b in range(N_SHORT):
            start = b * max(N_ENDS) // N_SHORT
            for n in SHORT_LENGTHS:
                block = slice(start, start + n)
                start += n
                x, o = zip(*((v[0][block], v[1][block]) for v in ends), strict=True)
                row: dict[str, Any] = {"case": name, "n": n, "run": k, "block": b}
                try:
                    found = noisy_operator_bridge(
                        x, o, generator=np.random.default_rng(SEED + 10 * k + b), atoms=case.perturbed
                    )
                    row["bridge"] = judged(found)
                except DiffForceError as err:
                    row["refused"] = f"{type(err).__name__}: {err}"
                rows.append(row)
        write_json(kept, plain({"rows": rows}))
    return list(json.loads(kept.read_text())["rows"])


def short(out: Path) -> dict[str, Any]:
    """Runs that are far too short, cut from those of the cases: what the audit makes of wrong numbers."""
    runs = [(name, k) for k in range(1, SHORT_RUNS + 1) for name in SHORT_CASES]
    return {"rows": [row for name, k in track(runs, "short") for row in short_run(out, name, k)]}


def supervised_run(out: Path, name: str, k: int) -> dict[str, Any]:
    kept = out / f"supervised_{name}_{k}.json"
    row: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    missing = [label for label in SUPERVISED if label not in row]
    if missing:
        case = alanine_case(name, restrain_phi=True)
        ends = ends_of(case, k, out)
        x, o = ([v[i][: N_ENDS[0]] for v in ends] for i in (0, 1))
        distances = PairDistances.of(x, case.perturbed)
        levels = default_levels([distances(one) for one in x], N_SUPERVISED_LEVELS)
        graph = graph_from_topology(case.topology)
    for label in missing:
        start = time.process_time()
        features: Any = distances
        if label == "pair operator":
            features = PairOperator.of(x, o, graph, case.perturbed, atoms=case.perturbed, beside=distances)
        found = noisy_operator_bridge(
            x, o, generator=np.random.default_rng(SEED + k), atoms=case.perturbed, sigmas=levels,
            features=features, **SUPERVISED[label],
        )  # fmt: skip
        row[label] = plain((*judged(found), time.process_time() - start))
        write_json(kept, row)
    return row


def supervised(out: Path) -> dict[str, Any]:
    """What a network and the pair operator add to the defaults, on frames of the cases."""
    return {
        name: [supervised_run(out, name, k) for k in range(1, N_SUPERVISED + 1)]
        for name in track(SUPERVISED_CASES, "supervised")
    }


SUPERVISED: dict[str, dict[str, Any]] = {
    "defaults": {}, "heads as closure": {"closure": "heads"}, "heads as summary": {"summary": "heads"},
    "pair operator": {},
}  # fmt: skip

CASES = {"F1": INTERVAL, "F1_spaced": SPACED, "Br3": INTERVAL, "I3": INTERVAL}

PARTS: dict[str, Part] = {
    **{name: toy(name) for name in TOYS},
    **{name: alanine(name, spacing) for name, spacing in CASES.items()},
    "random": random,
    "short": short,
    "supervised": supervised,
}


# ------------------------------------------------------------------------------------------ table

HEAD = ["| method | bias | error | stated | covered |", "|---|---|---|---|---|"]


def row(method: str, values: Any, exact: Any) -> str:
    value, error = np.array([v[:2] for v in values], dtype=float).T
    miss = value - exact
    text = f"| {method} | {miss.mean():+.2f} | {np.sqrt((miss**2).mean()):.2f} |"
    if np.isnan(error).any():
        return text + " | |"
    inside = [f"{(np.abs(miss) < k * error).mean():.2f}" for k in (1, 2)]
    return text + f" {error.mean():.2f} | {', '.join(inside)} |"


def verdict(gates: dict[str, float]) -> str:
    """The audit's verdict of stored gates, by the thresholds of today."""
    return Audit(
        tuple(judge(n, v, gates=BRIDGE_GATES) for n, v in gates.items() if n in BRIDGE_GATES)
    ).verdict


def runs(found: dict[str, Any]) -> list[tuple[str, int, float, float, Any]]:
    """(what, number, miss, error of the reference, audit) of every bridge."""
    out: list[tuple[str, int, float, float, Any]] = []
    for name in TOYS:
        if name in found:
            exact = found[name]["exact"]
            out += [(name, i, v[0] - exact, 0.0, v[2]) for i, v in enumerate(found[name]["rows"]["bridge"])]
    for name in CASES:
        for i, one in enumerate(found.get(name, {}).get("sets", [])):
            value, error = found[name]["reference"]
            out += [(f"{name}, {m}", i, v[0] - value, error, v[2]) for m, v in one.items() if "bridge" in m]
    for i, one in enumerate(found.get("random", {}).get("draws", [])):
        value, error = one["reference"]
        out.append(("random", i, one["rows"]["bridge"][0] - value, error, one["rows"]["bridge"][2]))
    for one in found.get("short", {}).get("rows", []):
        if "bridge" in one and one["case"] in found:
            value, error = found[one["case"]]["reference"]
            number = one["run"] + one["block"]
            out.append(("short", number, one["bridge"][0] - value, error, one["bridge"][2]))
    return out


AUDIT_HEAD = [
    "Wrong: |Delta f - reference| > max(1 kT, 3 SE of the reference). 95 % intervals (Wilson).", "",
    "| runs | right, PASS | right, WARN | right, FAIL | wrong, PASS | wrong, WARN | wrong, FAIL |",
    "|---|---|---|---|---|---|---|",
]  # fmt: skip


def audit_row(label: str, some: Sequence[tuple[Any, ...]]) -> str:
    """Right or wrong against the verdict, of rows (..., miss, error of the reference, audit)."""
    cells = []
    for wrong in (False, True):
        these = [verdict(r[-1]["gates"]) for r in some if (abs(r[-3]) > max(1.0, 3 * r[-2])) == wrong]
        cells += [interval(these.count(v), len(these)) for v in ("PASS", "WARN", "FAIL")]
    return f"| {len(some)}, {label} | " + " | ".join(cells) + " |"


def audit_table(found: dict[str, Any]) -> list[str]:
    """The audit's own test; thresholds were set with the runs of an even number in view."""
    every = runs(found)
    odd, even = ([r for r in every if r[1] % 2 == half] for half in (1, 0))
    lines = [
        "## The audit", "",
        "Thresholds were set with runs of an even number in view; the others count. The first two rows have",
        "all runs of this page, the starved ones too; the last three tell these apart.", "", *AUDIT_HEAD,
        audit_row("odd: counted", odd), audit_row("even: thresholds", even),
        audit_row("odd, not starved", [r for r in odd if r[0] != "short"]),
        audit_row("odd, starved", [r for r in odd if r[0] == "short"]),
        audit_row("even, starved", [r for r in even if r[0] == "short"]), "",
    ]  # fmt: skip
    for what, some in (("all", odd), ("not starved", [r for r in odd if r[0] != "short"])):
        passed = [abs(r[2]) <= 1 for r in some if verdict(r[4]["gates"]) == "PASS"]
        lines += [f"Within 1 kT among PASS (odd runs, {what}): {interval(sum(passed), len(passed))}.", ""]
    starved = [r for r in every if r[0] == "short"]
    if starved:
        wrong = [r[4]["gates"] for r in starved if abs(r[2]) > max(1.0, 3 * r[3])]
        blind = [
            verdict({n: v for n, v in gates.items() if not n.startswith("independent")}) for gates in wrong
        ]
        lines += [
            "Too few independent frames alone is a WARN. With the two gates that count frames left out, of",
            f"the wrong starved runs {interval(blind.count('PASS'), len(blind))} would PASS.", "",
        ]  # fmt: skip
    return lines


def supervised_rows(found: dict[str, Any]) -> list[str]:
    lines = [
        f"## A network, and the pair operator: {N_SUPERVISED} runs of {N_ENDS[0]} frames per end", "",
        f"The same frames, seeds and {N_SUPERVISED_LEVELS} noise levels for all. Heads as closure: the work",
        "of every noised frame by a cross-fitted network, fitted by the Gaussian likelihood of O. Heads as",
        "summary: the order of those works, with the density of the defaults. Pair operator: O as a sum over",
        "pairs, noised in closed form, as columns beside the defaults'. CPU-seconds with the fits.", "",
        "The distance of the network from the density came into its error and audit after the first two runs",
        "of every case: without it one wrong number of I3 (2.2 kT off) passed. Run 3 is younger.", "",
        "| case | method | bias | error | stated | covered | sigma [nm] | overlap | closures [kT] "
        "| PASS, WARN, FAIL | CPU-s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in SUPERVISED_CASES:
        if name not in found:
            continue
        for label in SUPERVISED:
            values = [one[label] for one in found["supervised"][name]]
            cells = row(label, values, found[name]["reference"][0]).strip("| ").split(" | ")
            gates = [v[2]["gates"] for v in values]
            verdicts = [verdict(g) for g in gates]
            overlap, spread = (
                np.mean([g[n] for g in gates])
                for n in ("overlap of the noised ends", "spread over closures [kT]")
            )
            sigma, seconds = (np.mean(v) for v in zip(*((v[2]["sigma"], v[3]) for v in values), strict=True))
            lines.append(
                f"| {name} | {' | '.join(cells)} | {sigma:.3f} | {overlap:.2f} | {spread:.2f} "
                f"| {', '.join(str(verdicts.count(v)) for v in ('PASS', 'WARN', 'FAIL'))} | {seconds:.0f} |"
            )
    return [*lines, ""]


def short_rows(found: dict[str, Any]) -> list[str]:
    rows = found["short"]["rows"]
    lines = [
        f"## Starved runs: {', '.join(f'{n}' for n in SHORT_LENGTHS)} frames per end", "",
        f"{N_SHORT} disjoint blocks of each length from each of the first {SHORT_RUNS} runs of these cases:",
        "there to make wrong numbers for the audit. Refused: fewer than 20 independent frames.", "",
        "| case, frames per end | runs | refused | bias | error | stated | covered | wrong "
        "| PASS, WARN, FAIL |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in SHORT_CASES:
        for n in SHORT_LENGTHS:
            some = [r for r in rows if (r["case"], r["n"]) == (name, n)]
            values = [r["bridge"] for r in some if "bridge" in r]
            reference, error = found[name]["reference"]
            wrong = sum(abs(v[0] - reference) > max(1.0, 3 * error) for v in values)
            verdicts = [verdict(v[2]["gates"]) for v in values]
            cells = row(f"{name}, {n}", values, reference).strip("| ").split(" | ")
            lines.append(
                " | ".join([f"| {cells[0]}", f"{len(some)}", f"{len(some) - len(values)}", *cells[1:]])
                + f" | {wrong} | {', '.join(str(verdicts.count(v)) for v in ('PASS', 'WARN', 'FAIL'))} |"
            )
    return [*lines, ""]


def interval(k: int, n: int) -> str:
    """k of n with Wilson's 95 % interval."""
    if n == 0:
        return "0 of 0"
    z, p = 1.96, k / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + s * half) / (1 + z * z / n) for s in (-1, 1))
    return f"{k} of {n} ({max(low, 0):.2f}-{min(high, 1):.2f})"


def table(found: dict[str, Any]) -> list[str]:
    lines = [
        "# Delta f without overlap", "",
        f"`python benchmarks/bridge.py --out runs/bridge` prints it; seed {SEED}; kT everywhere; defaults of",
        "`noisy_operator_bridge` for all. Error: root mean square of estimate minus exact or reference.",
        "Stated: mean of the estimator's own errors. Covered: share of runs within one and two of them (0.68",
        "and 0.95 expected).", "",
    ]  # fmt: skip
    for name, (title, _) in TOYS.items():
        if name not in found:
            continue
        part = found[name]
        n = len(part["rows"]["bridge"])
        lines += [f"## {title}: {n} repeats of {N_TOY_FRAMES} frames per end, exact {part['exact']:.3f}", ""]
        lines += HEAD + [row(m, rows, part["exact"]) for m, rows in part["rows"].items()] + [""]
    for name, spacing in CASES.items():
        if name not in found:
            continue
        part = found[name]
        value, error = part["reference"]
        between = " and ".join(f"{b:.3g}" for b in part["between"])
        lines += [
            f"## Alanine {name.replace('_', ', ')}: {len(part['sets'])} independent runs", "",
            f"Reference: MBAR over {part['n_windows']} windows of {N_REFERENCE} frames, {value:.2f} +- "
            f"{error:.2f}. Frames {spacing / 1000:g} ps apart; two windows between at lambda {between}.",
            "",
        ]  # fmt: skip
        lines += HEAD + [row(m, [s[m] for s in part["sets"]], value) for m in part["sets"][0]] + [""]
    if "random" in found:
        draws = found["random"]["draws"]
        lines += [
            f"## {len(draws)} random perturbations of alanine, {N_RANDOM_ENDS} frames per end", "",
            f"Reference of each: MBAR over {N_RANDOM_WINDOWS} windows of {N_RANDOM_REFERENCE} frames.", "",
        ]  # fmt: skip
        exact = np.array([d["reference"][0] for d in draws])
        lines += HEAD + [row(m, [d["rows"][m] for d in draws], exact) for m in draws[0]["rows"]] + [""]
        lines += [
            "| atoms | q, sigma, epsilon | MBAR | overlap of the ends | bridge | BAR | audit |",
            "|---|---|---|---|---|---|---|",
        ]
        for d in draws:
            ref, bridge, bar = d["reference"], d["rows"]["bridge"], d["rows"]["BAR"]
            values = ", ".join(f"{v:.3g}" for v in d["q_sigma_epsilon"])
            mbar, own = (f"{v[0]:.2f} +- {v[1]:.2f}" for v in (ref, bridge))
            lines.append(
                f"| {d['site']} | {values} | {mbar} | {bar[2]:.1g} | {own} | {bar[0]:.2f} | "
                f"{verdict(bridge[2]['gates'])} |"
            )
        lines.append("")
    if "supervised" in found:
        lines += supervised_rows(found)
    if "short" in found and all(name in found for name in SHORT_CASES):
        lines += short_rows(found)
    return lines + audit_table(found)


if __name__ == "__main__":
    run_parts("bridge", __doc__ or "", PARTS, table)
