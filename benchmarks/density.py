"""Delta f without overlap: the density of the operator beside BAR, EXP and moments.

``python benchmarks/density.py --out runs/density`` runs what is missing and writes results/density.md.
Toys have exact answers. Alanine's reference is MBAR over windows of their own from the same call; the
density sees two end states alone, or them and two windows between.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from parts import Part, run_parts
from rich.progress import track
from scipy.special import logsumexp

from openmm_diffforce.alanine import TEMPERATURE, alanine_case
from openmm_diffforce.closure import moment_readout
from openmm_diffforce.constants import U_NK_FILE
from openmm_diffforce.density import fit_operator_density
from openmm_diffforce.estimate import bar_between, estimate_free_energy, read_table, state_operators
from openmm_diffforce.windows import run_windows

SEED = 900
N_TOYS = 200
N_TOY_FRAMES = 1000
N_SETS = 5
"""Independent runs of every alanine case."""
N_WINDOW = 1000
N_ENDS = (1000, 3000)
INTERVAL = 1000
"""Steps of 1 fs between frames: methyl rotamers decorrelate in 16 ps."""

Sample = tuple[np.ndarray, np.ndarray, float]


def shifted(generator: np.random.Generator) -> Sample:
    """Two harmonic wells six widths apart."""
    x = generator.standard_normal((2, N_TOY_FRAMES))
    return 6 * x[0] + 18, 6 * (x[1] - 6) + 18, 0.0


def widened(generator: np.random.Generator) -> Sample:
    """A harmonic well, variance 1 -> 25."""
    x = generator.standard_normal((2, N_TOY_FRAMES))
    return -0.48 * x[0] ** 2, -0.48 * (5 * x[1]) ** 2, -float(np.log(5))


def on_a_line(action: Callable[[Any], Any], operator: Callable[[Any], Any]) -> Callable[..., Sample]:
    r = np.linspace(-3, 3, 400001)
    r = r[np.isfinite(operator(r))]
    weights = [np.exp(-action(r) - lam * operator(r)) for lam in (0, 1)]
    cumulative = [np.cumsum(w) / w.sum() for w in weights]
    exact = -float(np.log(weights[1].sum() / weights[0].sum()))

    def draw(generator: np.random.Generator) -> Sample:
        ends = [operator(r[np.searchsorted(c, generator.random(N_TOY_FRAMES))]) for c in cumulative]
        return ends[0], ends[1], exact

    return draw


def well(x: Any) -> Any:
    return 3 * (x**2 - 1) ** 2


TOYS = {
    "Gaussians 6 sigma apart": shifted,
    "Gaussian 1 -> 25": widened,
    "double well, linear operator": on_a_line(well, lambda x: 4 * x),
    "double well, quadratic operator": on_a_line(well, lambda x: 10 * (x + 1) ** 2),
    "steric r^-12": on_a_line(
        lambda x: 50 * (x - 0.6) ** 2, lambda x: np.where(x > 0.15, (0.7 / np.maximum(x, 0.15)) ** 12, np.inf)
    ),
}


def methods(
    o_0: np.ndarray, o_1: np.ndarray, generator: np.random.Generator, *, correlated: bool = False
) -> dict[str, Any]:
    """Every estimate from the operator on two end states: value, error, and what judges it."""
    found = fit_operator_density([o_0, o_1], inefficiency=None if correlated else (1, 1), n_lam=3)
    bar = bar_between(o_0, -o_1, decorrelate=correlated, min_overlap=0)
    readout = moment_readout(o_0, o_1, generator=generator, block=math.ceil(max(found.inefficiency)))
    forward = -(logsumexp(-o_0) - np.log(len(o_0)))
    reverse = logsumexp(o_1) - np.log(len(o_1))
    return {
        "density": (found.delta_f, found.d_delta_f, float(found.chi2.max())),
        "BAR": (bar.delta_f, bar.d_delta_f, bar.overlap),
        "Tweedie on moments": (readout.delta_f, readout.d_delta_f),
        "EXP forward": (float(forward), None),
        "EXP reverse": (float(reverse), None),
    }


def toys(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, draw in TOYS.items():
        generator = np.random.default_rng(SEED)
        rows: dict[str, list[Any]] = {}
        for _ in track(range(N_TOYS), name):
            o_0, o_1, exact = draw(generator)
            for method, value in methods(o_0, o_1, generator).items():
                rows.setdefault(method, []).append(value)
        found[name] = {"exact": exact, "rows": rows}
    return found


def operators(name: str, out: Path, seed: int, lams_of: Sequence[int], n_frames: int) -> tuple[Any, Any]:
    """Independent windows under the force field: the table, and O of every state."""
    case = alanine_case(name, restrain_phi=True)
    states = [case.states[k] for k in lams_of]
    folder = out / f"{name}_{seed}_{len(states)}"
    run_windows(
        case.pair.linear_system(), case.topology, case.positions, states, n_frames=n_frames,
        interval=INTERVAL, n_equil=20000, temperature=TEMPERATURE, timestep=0.001, friction=1.0,
        seed=seed, trajectory=None, out_dir=folder, progress=False,
    )  # fmt: skip
    table = read_table(folder / U_NK_FILE)
    return table, state_operators(table).operators


def alanine(name: str) -> Part:
    def run(out: Path) -> dict[str, Any]:
        states = alanine_case(name).states
        k = len(states)
        between = [k // 3, 2 * k // 3]
        table, o_k = operators(name, out, SEED, range(k), N_WINDOW)
        mbar = estimate_free_energy(table, min_overlap=0).estimates["MBAR"]
        lams = [s["lambda"] for s in states]
        everything = fit_operator_density(o_k, lams)
        found: dict[str, Any] = {
            "reference": (mbar.delta_f, mbar.d_delta_f), "n_windows": k,
            "between": [lams[b] for b in between],
            "all": (everything.delta_f, everything.d_delta_f, everything.chi2.max()), "sets": [],
        }  # fmt: skip
        for set_ in track(range(1, N_SETS + 1), name):
            ends = operators(name, out, SEED + set_, (0, k - 1), max(N_ENDS))[1]
            middle = operators(name, out, SEED + 100 + set_, between, min(N_ENDS))[1]
            row: dict[str, Any] = {}
            for n in N_ENDS:
                some = [one[:n] for one in ends]
                for method, value in methods(
                    *some, np.random.default_rng(SEED + set_), correlated=True
                ).items():
                    row[f"{method}, {n} per end"] = value
            four = [ends[0][: min(N_ENDS)], *middle, ends[1][: min(N_ENDS)]]
            density = fit_operator_density(four, (0.0, *found["between"], 1.0))
            row[f"density, 4 windows of {min(N_ENDS)}"] = (
                density.delta_f,
                density.d_delta_f,
                density.chi2.max(),
            )
            found["sets"].append(row)
            print(name, set_, {m: np.round(v, 2).tolist() for m, v in row.items()}, flush=True)
        return found

    return run


PARTS: dict[str, Part] = {"toys": toys, **{name: alanine(name) for name in ("F1", "Br3", "I3")}}


def row(method: str, values: Any, exact: float) -> str:
    value, error = np.array([v[:2] for v in values], dtype=float).T
    miss = value - exact
    text = f"| {method} | {miss.mean():+.2f} | {np.sqrt((miss**2).mean()):.2f} |"
    if np.isnan(error).any():
        return text + " | |"
    inside = [f"{(np.abs(miss) < k * error).mean():.2f}" for k in (1, 2)]
    return text + f" {error.mean():.2f} | {', '.join(inside)} |"


def table(found: dict[str, Any]) -> list[str]:
    lines = [
        "# Delta f without overlap", "",
        f"`python benchmarks/density.py --out runs/density` prints it; seed {SEED}; kT everywhere. Error:",
        "root mean square of estimate minus exact or reference. Stated: mean of the estimator's own errors.",
        "Covered: share of runs within one and two of them (0.68 and 0.95 expected).", "",
    ]  # fmt: skip
    head = ["| method | bias | error | stated | covered |", "|---|---|---|---|---|"]
    for name, part in found.get("toys", {}).items():
        lines += [
            f"## {name}: {N_TOYS} repeats of {N_TOY_FRAMES} frames per end, exact {part['exact']:.3f}",
            "",
        ]
        lines += head + [row(m, rows, part["exact"]) for m, rows in part["rows"].items()] + [""]
    for name in ("F1", "Br3", "I3"):
        if name not in found:
            continue
        part = found[name]
        value, error = part["reference"]
        between = " and ".join(f"{b:.3g}" for b in part["between"])
        lines += [
            f"## Alanine {name}: {len(part['sets'])} independent runs", "",
            f"Reference: MBAR over {part['n_windows']} windows of {N_WINDOW} frames, "
            f"{value:.2f} +- {error:.2f}; the density of all of them "
            f"{part['all'][0]:.2f} +- {part['all'][1]:.2f}. Frames {INTERVAL / 1000:g} ps "
            f"apart; the two windows between are at lambda {between}.",
            "",
        ]  # fmt: skip
        lines += head + [row(m, [s[m] for s in part["sets"]], value) for m in part["sets"][0]] + [""]
    return lines


if __name__ == "__main__":
    run_parts("density", __doc__ or "", PARTS, table)
