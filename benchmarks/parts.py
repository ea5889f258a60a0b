"""What benchmarks in parts share: the command line, MBAR of O, noised fields against posterior MD.

A part is a function ``part(out) -> dict``. Its result is kept as ``<out>/<part>.json``, so that a
benchmark that was stopped goes on where it was.
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmm_diffforce.alanine import TEMPERATURE, AlanineCase
from openmm_diffforce.estimate import bar_between, statistical_inefficiency
from openmm_diffforce.models import operator_gradient
from openmm_diffforce.models.action import model_fields
from openmm_diffforce.posterior import PosteriorMoments, posterior_moments
from openmm_diffforce.project import r_squared
from openmm_diffforce.record import versions, write_json

FIELDS = ("score", "operator", "operator_gradient")
N_BOOTSTRAP = 500

Part = Callable[[Path], dict[str, Any]]


def run_parts(
    name: str, description: str, parts: Mapping[str, Part], table: Callable[[dict[str, Any]], list[str]]
) -> None:
    """The command line: do the parts that are missing, and write the table of all that are there."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs") / name)
    parser.add_argument("--only", default=",".join(parts), help="comma-separated parts")
    parser.add_argument("--table", type=Path, default=Path(__file__).parent / "results" / f"{name}.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for part in options.only.split(","):
        path = options.out / f"{part}.json"
        if not path.exists():
            print(f"{part} ...", flush=True)
            write_json(path, parts[part](options.out))
    found = {n: json.loads(p.read_text()) for n in parts if (p := options.out / f"{n}.json").exists()}
    used = ", ".join(f"{k} {v}" for k, v in versions().items() if v)
    text = "\n".join([*table(found), "", f"Versions: {used}", ""])
    options.table.parent.mkdir(parents=True, exist_ok=True)
    options.table.write_text(text)
    print(text)


def operator_mbar(
    lams: Sequence[float], operators: Sequence[np.ndarray], *, subsample: bool = True
) -> tuple[float, float]:
    """pymbar's Delta f of windows of linear mixing and its error: O of their frames is all it needs.

    Frames are subsampled by the inefficiency of O, for the sake of the error, unless told otherwise.
    """
    import pymbar

    some = [o[:: math.ceil(statistical_inefficiency(o))] if subsample else o for o in operators]
    # BAR along the chain is a start from which the solver does not get lost.
    steps = [
        bar_between(h * a, -h * b, decorrelate=False, min_overlap=0).delta_f
        for h, a, b in zip(np.diff(lams), some[:-1], some[1:], strict=True)
    ]
    u_kn = np.multiply.outer(np.asarray(lams), np.concatenate(some))
    solved = pymbar.MBAR(
        u_kn, [len(o) for o in some], initial_f_k=np.cumsum([0.0, *steps]), solver_protocol="robust"
    )
    found = solved.compute_free_energy_differences()
    return float(found["Delta_f"][0, -1]), float(found["dDelta_f"][0, -1])


def posterior_reference(
    case: AlanineCase,
    end: int,
    held_out: np.ndarray,
    sigma: float,
    generator: np.random.Generator,
    *,
    n_y: int,
    n_samples: int,
    seed: int,
) -> tuple[np.ndarray, PosteriorMoments]:
    """Noised copies y of ``n_y`` held-out frames of one end, and the fields there by posterior MD."""
    pick = generator.choice(len(held_out), n_y, replace=False)
    y = held_out[pick] + sigma * generator.standard_normal((n_y, *held_out.shape[1:]))
    return y, posterior_moments(
        case.system_1 if end else case.system_0,
        y,
        sigma,
        operator=case.pair.operator_values,
        temperature=TEMPERATURE,
        n_samples=n_samples,
        seed=seed,
    )


def reference_noise(truth: PosteriorMoments) -> float:
    """Share of the variance of the reference's grad O that is its own statistical error."""
    return float((truth.operator_gradient_error**2).mean() / truth.operator_gradient.var())


def model_noised_fields(model: Any, y: np.ndarray, t: float, end: int) -> tuple[np.ndarray, ...]:
    """Score, O and grad O by the model's own methods, in the order of ``FIELDS``."""
    _, gradient, operator = model_fields(model, y, t=t, lam=float(end))
    where = (torch.full((len(y),), v, dtype=torch.float64) for v in (t, float(end)))
    return -gradient, operator, operator_gradient(model, torch.as_tensor(y), *where).numpy()


def bootstrap_r_squared(value: np.ndarray, want: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """R^2 of each resampling of the frames, draws [n_draws, n_frames]."""
    miss = ((value - want) ** 2).reshape(len(want), -1).sum(axis=1)
    total = ((want - want.mean()) ** 2).reshape(len(want), -1).sum(axis=1)
    return 1 - miss[draws].sum(axis=1) / total[draws].sum(axis=1)


def field_errors(
    got: list[tuple[np.ndarray, ...]], truth: PosteriorMoments, draws: np.ndarray
) -> dict[str, float]:
    """R^2 of each field, the mean over models that differ in their training seed, and its error.

    The error is that of the frames, by the bootstrap, and that of the seeds where there are
    several, added in squares.
    """
    found = {}
    for k, name in enumerate(FIELDS):
        want = getattr(truth, name)
        each = [r_squared(one[k], want) for one in got]
        resampled = np.mean([bootstrap_r_squared(one[k], want, draws) for one in got], axis=0)
        found[name] = float(np.mean(each))
        found[f"{name}_se"] = float(np.hypot(np.std(resampled), standard_error(each)))
    return found


def standard_error(values: list[float]) -> float:
    """Of the mean; 0 for a single value."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def field_rows(rows: list[dict[str, Any]], label: str) -> list[str]:
    """The table of noised fields; ``label`` is the key that tells rows of one level apart."""
    head = (
        f"| sigma [nm] | end | {label} | score R^2 | O R^2 | grad O R^2 | noise of the reference's grad O |"
    )
    lines = [head, "|---|---|---|---|---|---|---|"]
    for r in rows:
        cells = " | ".join(f"{r[name]:.3f} +- {r[name + '_se']:.3f}" for name in FIELDS)
        lines.append(f"| {r['sigma_nm']} | {r['end']} | {r[label]} | {cells} | {r['reference_noise']:.3f} |")
    return lines
