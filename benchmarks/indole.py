"""185L/indole: five changes of C6-H in a protein pocket, by windows of their own and by two end states.

``python benchmarks/indole.py --out runs/indole`` builds the end states, samples the windows that are
missing, holds energies against those of the scripts that came with the structures, and writes
results/indole.md. Sampling takes three hours of one core; ``--workers`` shares it out, ``--seconds`` ends
it early, and ``indole_sample.py`` does it on a machine that has OpenMM alone (BUNDLE is
``runs/indole/bundle``; its windows go to ``runs/indole/windows``). ``indole_systems.py`` says what the
cases are, and where the structures come from.
"""

import argparse
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm as mm
import pandas as pd
from bridge import AUDIT_HEAD, audit_row, methods, verdict
from indole_sample import sample
from indole_systems import (
    N_STATES,
    TEMPERATURE,
    VARIANTS,
    IndoleCase,
    compare_with_scripts,
    data_folder,
    indole_case,
    sampling_system,
)
from rich.progress import track

from openmm_diffforce.constants import LAMBDA
from openmm_diffforce.density import fit_operator_density
from openmm_diffforce.estimate import FreeEnergyEstimate, estimate_free_energy
from openmm_diffforce.record import versions, write_json
from openmm_diffforce.summary import PairDistances

N_CHECKED = 5
"""Frames of each end state whose energies are compared."""


@dataclass(frozen=True)
class Lengths:
    """Steps and frames of the windows of a case.

    Attributes
    ----------
    n_equil, interval : int
        Steps.
    n_frames, n_frames_end : int
        Of a window between, and of an end state.
    delay : int
        Seeds of this case come so many seeds after those of the others.
    """

    n_equil: int
    interval: int
    n_frames: int
    n_frames_end: int
    delay: int = 0


LENGTHS = {
    "c6_bonded": Lengths(n_equil=8000, interval=200, n_frames=200, n_frames_end=500),
    "r8_bonded": Lengths(n_equil=5000, interval=100, n_frames=250, n_frames_end=1000),
    "r6_clX": Lengths(n_equil=5000, interval=100, n_frames=500, n_frames_end=1000),
    "c6_nb": Lengths(n_equil=8000, interval=200, n_frames=80, n_frames_end=500, delay=1),
    "r6_nbX": Lengths(n_equil=5000, interval=100, n_frames=150, n_frames_end=500, delay=1),
}


def timestep_ps(name: str) -> float:
    """Of the Langevin integrator [ps]."""
    return 0.002 if VARIANTS[name].rigid else 0.004


def write_bundle(bundle: Path, cases: dict[str, IndoleCase]) -> None:
    """What ``indole_sample.py`` reads: Systems, positions, settings."""
    bundle.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {}
    for name, case in cases.items():
        (bundle / f"{name}.xml").write_text(mm.XmlSerializer.serialize(sampling_system(case)))
        np.save(bundle / f"{name}.npy", case.positions)
        settings[name] = {
            "parameter": LAMBDA, "lams": [s[LAMBDA] for s in case.states], "temperature": TEMPERATURE,
            "timestep_ps": timestep_ps(name), "friction_per_ps": 2.0 if VARIANTS[name].rigid else 1.0,
            "moving": list(case.moving), "noised": list(case.noised), "ligand": list(case.ligand),
            **vars(LENGTHS[name]),
        }  # fmt: skip
    write_json(bundle / "cases.json", settings)


def windows(out: Path, name: str) -> dict[tuple[int, int], Path]:
    """(seed, window) -> file of the windows that are there."""
    found = {}
    for path in sorted((out / "windows").glob(f"{name}_s*_*.npz")):
        seed, k = path.stem.rsplit("_s", 1)[1].split("_")
        found[int(seed), int(k)] = path
    return found


def window_operators(out: Path, name: str, seeds: Collection[int] | None = None) -> list[list[np.ndarray]]:
    """O [kT] of every window, and in it of every seed (all that are there by default)."""
    found: list[list[np.ndarray]] = [[] for _ in range(N_STATES)]
    for (seed, k), path in windows(out, name).items():
        if seeds is None or seed in seeds:
            with np.load(path) as arrays:
                found[k].append(arrays["operator"])
    return found


def end_frames(
    out: Path, name: str, end: int, seeds: Collection[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Frames of end state H (0) or X (1), and O on them.

    Parameters
    ----------
    out : Path
        Folder of the benchmark, with ``windows/`` in it.
    name : str
        Case.
    end : int
    seeds : collection of int, optional
        All that are there by default.

    Returns
    -------
    x : numpy.ndarray, shape (n_frames, n_moving, 3)
        float32 [nm], particles ``IndoleCase.moving``; ``IndoleCase.frames`` puts the fixed ones around.
    operator : numpy.ndarray, shape (n_frames,)
        [kT]; seeds one after the other, each in time order.
    """
    x, operator = [], []
    for (seed, k), path in windows(out, name).items():
        if k == end * (N_STATES - 1) and (seeds is None or seed in seeds):
            with np.load(path) as arrays:
                x.append(arrays["x"])
                operator.append(arrays["operator"])
    return np.concatenate(x), np.concatenate(operator)


def check(out: Path, folder: Path, cases: dict[str, IndoleCase]) -> dict[str, Any]:
    """Deviations from the scripts at frames of both ends, and of the stored O from U_X - U_H."""
    found = {}
    for name, case in track(cases.items(), "check"):
        ends = [end_frames(out, name, end) for end in (0, 1)]
        pick = [np.linspace(0, len(x) - 1, N_CHECKED).astype(int) for x, _ in ends]
        x = np.concatenate([case.frames(x[i]) for (x, _), i in zip(ends, pick, strict=True)])
        stored = np.concatenate([o[i] for (_, o), i in zip(ends, pick, strict=True)])
        found[name] = compare_with_scripts(case, folder, x)
        exact = case.pair.operator_values(x)
        found[name]["stored"] = float((np.abs(stored - exact) / np.maximum(1.0, np.abs(exact))).max())
    return found


def mbar(operators: list[list[np.ndarray]], lams: Sequence[float]) -> FreeEnergyEstimate:
    """MBAR over windows from O alone, with BAR, overlaps and inefficiencies beside it."""
    o_k = [np.concatenate(o) for o in operators]
    index = [(float(i), lam) for o, lam in zip(o_k, lams, strict=True) for i in range(len(o))]
    table = pd.DataFrame(
        np.concatenate(o_k)[:, None] * np.array(lams),
        index=pd.MultiIndex.from_tuples(index, names=["time", "lambda"]),
        columns=list(lams),
    )
    table.attrs = {"temperature": TEMPERATURE, "energy_unit": "kT"}
    return estimate_free_energy(table)


def in_the_pocket(x: Sequence[np.ndarray], noised: Sequence[int]) -> Callable[[np.ndarray], np.ndarray]:
    """Columns for the bridge: distances, and coordinates, which mean something where others are fixed."""
    distances = PairDistances.of(x, noised)
    return lambda y: np.concatenate([distances(y), y[:, list(noised)].reshape(len(y), -1)], axis=1)


def analyse(out: Path, cases: dict[str, IndoleCase]) -> dict[str, Any]:
    """The reference of every case, and what its two end states alone say."""
    found: dict[str, Any] = {}
    for name, case in track(cases.items(), "analysis"):
        lams = [s[LAMBDA] for s in case.states]
        there = windows(out, name)
        seeds = [s for s in sorted({s for s, _ in there}) if all((s, k) in there for k in range(N_STATES))]
        o_k = window_operators(out, name)
        if not seeds:
            continue
        pooled = mbar(o_k, lams)
        step_ns = 1e-3 * LENGTHS[name].interval * timestep_ps(name)
        result: dict[str, Any] = {
            "mbar": _value(pooled.estimates["MBAR"]), "bar": _value(pooled.estimates["BAR"]),
            "n_windows": len(there), "ns": step_ns * int(pooled.n_frames.sum()),
            "overlap": float(pooled.neighbour_overlap.min()),
            "inefficiency": float(pooled.inefficiency.max()), "seeds": {},
        }  # fmt: skip
        ends: dict[str, Collection[int] | None] = {"all": None}
        for s in seeds:
            one = window_operators(out, name, [s])
            result["seeds"][str(s)] = _value(mbar(one, lams).estimates["MBAR"])
            ends[str(s)] = [s]
        result["spread"] = [float(np.concatenate(o_k[k]).std()) for k in (0, -1)]
        result["n_ends"], result["ends"] = {}, {}
        # A site that follows its atoms would tell what noise hides.
        seen = [i for i, m in enumerate(case.moving) if not case.pair.system_0.isVirtualSite(m)]
        noised = [seen.index(case.moving.index(i)) for i in case.noised]
        for key, some_seeds in ends.items():
            both = [end_frames(out, name, end, some_seeds) for end in (0, 1)]
            x, o = [v[:, seen].astype(np.float64) for v, _ in both], [v for _, v in both]
            result["n_ends"][key] = [len(v) for v in o]
            result["ends"][key] = methods(
                x, o, 0, correlated=True, atoms=noised, features=in_the_pocket(x, noised)
            )  # fmt: skip
        between = (0, 6, 12, N_STATES - 1)
        some = fit_operator_density([np.concatenate(o_k[k]) for k in between], [lams[k] for k in between])
        result["between"] = [lams[k] for k in between[1:-1]]
        result["ends"]["all"]["density, two windows between"] = some.delta_f, some.d_delta_f, some.chi2.max()
        found[name] = result
    return found


def _value(estimate: Any) -> tuple[float, float]:
    return float(estimate.delta_f), float(estimate.d_delta_f)


METHODS = (
    "bridge",
    "density",
    "density, two windows between",
    "BAR",
    "Tweedie on moments",
    "EXP forward",
    "EXP reverse",
)


def table(checks: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """The results as markdown."""
    lines = [
        "# 185L / indole", "",
        "`python benchmarks/indole.py --out runs/indole` writes this file. C6-H of indole in the pocket of",
        "T4 lysozyme L99A; U = (1 - lambda) U_H + lambda U_X, vacuum, no cutoff, 300 K. `c6`: side chains",
        "within 6 A move (4 fs steps); `r6`, `r8`: indole alone moves (2 fs). `nb`, `nbX`: charges",
        "and Lennard-Jones parameters of F, on H6 or 1.35 A from C6; `clX`: of Cl, 1.74 A from C6;",
        "`bonded`: all of 6-fluoroindole's force field. Values in kT, with one standard error.", "",
        "## Reference: MBAR over 19 windows", "",
        "Every window starts from the minimised structure with a seed of its own. Scatter: standard error",
        "of the mean of the seeds, from them alone. A further seed without all of its windows counts in",
        "the pooled values only. Spread: standard deviation of O in H and in X.", "",
        "| case | MBAR | BAR of neighbours | seeds | scatter | smallest neighbour overlap "
        "| largest inefficiency | spread of O | windows, ns in all |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, r in found.items():
        seeds = [v for v, _ in r["seeds"].values()]
        scatter = f"{np.std(seeds, ddof=1) / np.sqrt(len(seeds)):.2f}" if len(seeds) > 1 else "-"
        each = ", ".join(f"{v:.2f} +- {e:.2f}" for v, e in r["seeds"].values())
        lines.append(
            f"| `{name}` | {r['mbar'][0]:.2f} +- {r['mbar'][1]:.2f} | {r['bar'][0]:.2f} +- {r['bar'][1]:.2f} "
            f"| {each} | {scatter} | {r['overlap']:.2f} | {r['inefficiency']:.1f} "
            f"| {r['spread'][0]:.1f}, {r['spread'][1]:.1f} | {r['n_windows']}, {r['ns']:.1f} |"
        )
    lines += [
        "", "## From two end states alone", "",
        "Miss: estimate less MBAR, of all frames; z: by the errors of both. Seeds: root mean square miss of",
        "single seeds, and their mean stated error. Overlap: BAR's, of the two end states; below 0.03",
        "`bar_between` refuses, and what is printed for it then is worth nothing.", "",
    ]  # fmt: skip
    for name, r in found.items():
        between = " and ".join(f"{v:.3g}" for v in r["between"])
        n = r["n_ends"]["all"]
        lines += [
            f"### `{name}`: {n[0]} and {n[1]} frames, overlap {r['ends']['all']['BAR'][2]:.1g}; "
            f"windows between at lambda {between}", "",
            "| method | estimate | miss | z | seeds: miss | seeds: stated |", "|---|---|---|---|---|---|",
        ]  # fmt: skip
        lines += [_method_row(method, r) for method in METHODS] + [""]
        said = [verdict(r["ends"][key]["bridge"][2]["gates"]) for key in ("all", *r["seeds"])]
        lines += [f"Audit of the bridge: {said[0]}; of the seeds: {', '.join(said[1:])}.", ""]
    judged = [
        (r["ends"][key]["bridge"][0] - r["mbar"][0], r["mbar"][1], r["ends"][key]["bridge"][2])
        for r in found.values()
        for key in r["ends"]
    ]
    lines += ["## The audit of the bridge, over all cases, seeds and their pools", "", *AUDIT_HEAD]
    lines += [audit_row("none used for the thresholds but that of normal scores", judged), ""]
    lines += [
        "## Energies against the scripts of the structures", "",
        f"Largest deviations [kJ/mol] at {N_CHECKED} frames of each end. Sampling: the System of the windows",
        "from the complete end states, and from linearity. Stored: O of the windows (CPU platform) from O of",
        "the kept frames (single precision), relative.", "",
        "| case | O | U_H | sampling: O | linearity | stored |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, c in checks.items():
        cells = (c[k] for k in ("operator", "energy", "sampling", "linear", "stored"))
        lines.append(f"| `{name}` | " + " | ".join(f"{v:.0e}" for v in cells) + " |")
    return lines


def _method_row(method: str, result: dict[str, Any]) -> str:
    value, error = result["ends"]["all"][method][:2]
    reference, d_reference = result["mbar"]
    miss = value - reference
    text = f"| {method} | {value:.2f}"
    text += f" | {miss:+.2f} | - |" if error is None else (
        f" +- {error:.2f} | {miss:+.2f} | {miss / np.hypot(error, d_reference):+.1f} |"
    )  # fmt: skip
    single = [result["ends"][s][method] for s in result["seeds"] if method in result["ends"][s]]
    if not single:
        return text + " - | - |"
    rms = np.sqrt(np.mean([(v[0] - reference) ** 2 for v in single]))
    stated = "-" if error is None else f"{np.mean([v[1] for v in single]):.2f}"
    return text + f" {rms:.2f} | {stated} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/indole"))
    parser.add_argument("--data", type=Path, help="folder with 185l_indole in it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of sampling, at most")
    parser.add_argument("--table", type=Path, default=Path(__file__).parent / "results" / "indole.md")
    options = parser.parse_args()
    folder = data_folder(options.data)
    cases = {name: indole_case(name, folder) for name in VARIANTS}
    bundle, out = options.out / "bundle", options.out / "windows"
    write_bundle(bundle, cases)
    sample(bundle, out, workers=options.workers, seconds=options.seconds, seeds=options.seeds)
    found = {"analysis": analyse(options.out, cases)}
    found["check"] = check(options.out, folder, {name: cases[name] for name in found["analysis"]})
    for name, value in found.items():
        write_json(options.out / f"{name}.json", value)
    used = ", ".join(f"{k} {v}" for k, v in versions().items() if v)
    text = "\n".join([*table(found["check"], found["analysis"]), "", f"Versions: {used}", ""])
    options.table.parent.mkdir(parents=True, exist_ok=True)
    options.table.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
