"""The pair operator: right against an analytic convolution, and fast against what else there is.

``python benchmarks/kernel.py [--out] [--quick]`` prints the error of the kernel oracle and the
times of the compiled operator, its plain-torch reference, and OpenMM's CustomNonbondedForce with
interaction groups, side by side in one run; ``--out`` writes them to benchmarks/results/kernel.md.
"""

import argparse
import itertools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.linalg import solve_banded

from openmm_diffforce import ops

F64 = torch.float64
Function = Callable[[np.ndarray], np.ndarray]

# ------------------------------------------------------------------ kernel oracle

AMPLITUDE, WIDTH = 5.0, 0.08  # a Gaussian pair function [kT, nm]
ORACLE_SIGMAS = (0.0, 0.005, 0.01, 0.02, 0.05)


def gaussian(r: np.ndarray, sigma: float = 0.0) -> np.ndarray:
    """5 exp(-r^2 / 2 w^2) and its analytic convolution with N(0, 2 sigma^2) in three dimensions."""
    variance = WIDTH**2 + 2.0 * sigma**2
    return AMPLITUDE * (WIDTH**2 / variance) ** 1.5 * np.exp(-0.5 * r**2 / variance)


def convolve(function: Function, sigma: float, r: np.ndarray) -> np.ndarray:
    r"""Convolve a pair function with N(0, 2 sigma^2) in three dimensions, numerically.

    .. math:: \bar f(r) = \frac{1}{r \tau \sqrt{2\pi}} \int_0^\infty s f(s)
              \left[e^{-(r-s)^2/2\tau^2} - e^{-(r+s)^2/2\tau^2}\right] ds, \quad \tau^2 = 2\sigma^2

    Both sites carry noise sigma, so their distance vector has twice its variance. Gauss-Legendre
    quadrature over eight tau around each r; r must be above zero.
    """
    if sigma == 0.0:
        return function(r)
    tau = math.sqrt(2.0) * sigma
    node, weight = np.polynomial.legendre.leggauss(96)
    low, high = np.maximum(r - 8 * tau, 0.0), r + 8 * tau
    s = 0.5 * (high - low)[:, None] * (node + 1.0) + low[:, None]
    near = np.exp(-0.5 * ((r[:, None] - s) / tau) ** 2)
    mirror = np.exp(-0.5 * ((r[:, None] + s) / tau) ** 2)
    integral = (s * function(s) * (near - mirror)) @ weight * 0.5 * (high - low)
    return integral / (r * tau * math.sqrt(2.0 * math.pi))


def spline_coefficients(values: np.ndarray, spacing: float) -> np.ndarray:
    """Cubic B-spline coefficients that interpolate ``values``; end slopes by differences."""
    n = len(values) + 2
    left = np.dot([-25 / 12, 4, -3, 4 / 3, -1 / 4], values[:5]) / spacing
    right = -np.dot([-25 / 12, 4, -3, 4 / 3, -1 / 4], values[:-6:-1]) / spacing
    # Slopes at the ends eliminate the outer two coefficients.
    bands = np.vstack([np.full(n - 2, 1.0), np.full(n - 2, 4.0), np.full(n - 2, 1.0)]) / 6.0
    bands[0, 1] = bands[2, -2] = 2.0 / 6.0
    rhs = values.astype(float).copy()
    rhs[0] += 2.0 * spacing * left / 6.0
    rhs[-1] -= 2.0 * spacing * right / 6.0
    inner = solve_banded((1, 1), bands, rhs)
    first, last = inner[1] - 2 * spacing * left, inner[-2] + 2 * spacing * right
    return np.concatenate([[first], inner, [last]])


def oracle_problem(spacing: float = 0.002) -> dict[str, Any]:
    """Arguments of pair_operator for one pair whose noised tables are numerical convolutions."""
    r = np.arange(0.05, 0.60001, spacing)
    rows = [spline_coefficients(convolve(gaussian, s, r), spacing) for s in ORACLE_SIGMAS]
    return {
        "sites": torch.tensor([0]),
        "env": torch.tensor([1]),
        "pair_type": torch.tensor([[0]]),
        "table": torch.tensor(np.array(rows), dtype=F64)[None, None],
        "r_grid": torch.tensor([[0.05, spacing]], dtype=F64),
        "lam_knots": torch.zeros(1, dtype=F64),
        "sigma_knots": torch.tensor(ORACLE_SIGMAS, dtype=F64),
    }


@dataclass(frozen=True)
class Oracle:
    """Largest errors over distances and noise knots, relative to the largest of the function."""

    value: float
    gradient: float
    between: float
    """Of the value half-way (in log sigma) between noise knots: the interpolation's error."""


def oracle() -> Oracle:
    """Kernel with numerically convolved tables against the analytic convolution."""
    args = oracle_problem()
    n = 401
    direction = torch.tensor([2.0, -1.0, 2.0], dtype=F64) / 3.0
    r = torch.linspace(0.051, 0.599, n, dtype=F64)
    x = torch.zeros(n, 2, 3, dtype=F64)
    x[:, 1] = r[:, None] * direction
    zero = torch.zeros(n, dtype=F64)

    def errors(sigma: float) -> tuple[float, float]:
        value, grad, *_ = ops.pair_operator(x, torch.full((n,), sigma, dtype=F64), zero, **args)
        exact = torch.tensor(gaussian(r.numpy(), sigma))
        slope = -exact * r / (WIDTH**2 + 2.0 * sigma**2)
        along = (grad[:, 1] * direction).sum(1)
        peak = AMPLITUDE / WIDTH * math.exp(-0.5)
        return (
            float((value - exact).abs().max()) / AMPLITUDE,
            float((along - slope).abs().max()) / peak,
        )

    at_knots = [errors(s) for s in ORACLE_SIGMAS]
    pairs = itertools.pairwise(ORACLE_SIGMAS[1:])
    between = max(errors(math.sqrt(a * b))[0] for a, b in pairs)
    return Oracle(max(e[0] for e in at_knots), max(e[1] for e in at_knots), between)


# ------------------------------------------------------------------ times


def median_seconds(call: Callable[[], Any], budget: float) -> float:
    """Median time of a call, from as many as fit in ``budget`` seconds, three at least."""
    call()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - start < budget and len(times) < 2000):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def pair_function(r: np.ndarray, sigma: float) -> np.ndarray:
    """A pair function for timing, with a tail: denormal numbers would be timed otherwise."""
    return gaussian(r, sigma) + 1.0 / (1.0 + r)


def problem(n_sites: int, n_env: int, n_frames: int, dtype: torch.dtype, *, periodic: bool) -> Any:
    """Sites in the middle of an environment at the density of water, 4 types of pairs."""
    g = torch.Generator().manual_seed(11)
    n = n_sites + n_env
    edge = (n_env / 100.0) ** (1.0 / 3.0)
    x = torch.rand(n, 3, generator=g, dtype=F64) * edge
    x[:n_sites] = 0.5 * edge + 0.15 * torch.randn(n_sites, 3, generator=g, dtype=F64)
    x = x + 0.002 * torch.randn(n_frames, n, 3, generator=g, dtype=F64)
    cutoff = min(1.2, 0.49 * edge)
    r = np.arange(0.1, cutoff + 0.02, 0.01)
    rows = [
        [
            [spline_coefficients((1 + k) * (1 - lam) * pair_function(r, s), 0.01) for s in ORACLE_SIGMAS]
            for lam in (0.0, 0.5, 1.0)
        ]
        for k in range(4)
    ]
    args = {
        "sites": torch.arange(n_sites),
        "env": torch.arange(n_sites, n),
        "pair_type": (torch.arange(n_sites)[:, None] + torch.arange(n_env)) % 4,
        "table": torch.tensor(np.array(rows)).to(dtype),
        "r_grid": torch.tensor([[0.1, 0.01]] * 4, dtype=dtype),
        "lam_knots": torch.tensor([0.0, 0.5, 1.0], dtype=dtype),
        "sigma_knots": torch.tensor(ORACLE_SIGMAS, dtype=dtype),
        "r_switch": cutoff - 0.2,
        "r_cutoff": cutoff,
    }
    if periodic:
        args["box"] = (edge * torch.eye(3, dtype=dtype)).expand(n_frames, 3, 3).contiguous()
    states = torch.full((n_frames,), 0.007, dtype=dtype), torch.full((n_frames,), 0.3, dtype=dtype)
    return x.to(dtype), *states, args


def openmm_context(n_sites: int, n_env: int, platform_name: str) -> tuple[Any, Any]:
    """CustomNonbondedForce with interaction groups over the same pairs; its energy is tabulated."""
    import openmm

    x, _, _, args = problem(n_sites, n_env, 1, F64, periodic=True)
    cutoff, switch = args["r_cutoff"], args["r_switch"]
    system = openmm.System()
    for _ in range(n_sites + n_env):
        system.addParticle(12.0)
    system.setDefaultPeriodicBoxVectors(*(openmm.Vec3(*row) for row in args["box"][0].tolist()))
    force = openmm.CustomNonbondedForce("(1 + kind1) * (1 - lambda) * f(r)")
    grid = np.arange(0.1, cutoff + 0.02, 0.01)
    force.addTabulatedFunction(
        "f", openmm.Continuous1DFunction(pair_function(grid, 0.007).tolist(), grid[0], grid[-1])
    )
    force.addGlobalParameter("lambda", 0.3)
    force.addEnergyParameterDerivative("lambda")
    force.addPerParticleParameter("kind")
    for i in range(n_sites + n_env):
        force.addParticle([float(i % 4)])
    force.addInteractionGroup(range(n_sites), range(n_sites, n_sites + n_env))
    force.setNonbondedMethod(openmm.CustomNonbondedForce.CutoffPeriodic)
    force.setCutoffDistance(cutoff)
    force.setUseSwitchingFunction(True)
    force.setSwitchingDistance(switch)
    system.addForce(force)
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName(platform_name)
    )
    context.setPositions(x[0].numpy())
    return context, x[0].numpy()


@dataclass(frozen=True)
class Row:
    """One line of the table: microseconds for each way of computing the same thing."""

    name: str
    times: dict[str, float]


WAYS = ("C++ float64", "C++ float32", "torch float64", "OpenMM Reference", "OpenMM CPU")


def chunked_reference(x: Any, sigma: Any, lam: Any, args: dict[str, Any]) -> None:
    """The plain-torch reference, which holds frames x pairs x 4 numbers: in chunks of frames."""
    chunk = max(1, 400_000 // args["pair_type"].numel())
    for i in range(0, x.shape[0], chunk):
        s = slice(i, i + chunk)
        ops.reference_pair_operator(x[s], sigma[s], lam[s], **args | {"box": args["box"][s]})


def measure(n_sites: int, n_env: int, n_frames: int, budget: float) -> Row:
    """Microseconds per evaluation (value, forces, dE/dlambda) of one frame, or of the batch."""
    times: dict[str, float] = {}
    for dtype, name in ((F64, "float64"), (torch.float32, "float32")):
        x, sigma, lam, args = problem(n_sites, n_env, n_frames, dtype, periodic=True)
        compiled = partial(ops.pair_operator, x, sigma, lam, **args)
        times[f"C++ {name}"] = median_seconds(compiled, budget)
        if dtype == F64:
            # What scales with frames is timed on a few: the plain ways take minutes otherwise.
            n = min(n_frames, 50)
            few = args | {"box": args["box"][:n]}
            reference = partial(chunked_reference, x[:n], sigma[:n], lam[:n], few)
            times["torch float64"] = median_seconds(reference, budget) * n_frames / n
    for name in ("Reference", "CPU"):
        context, positions = openmm_context(n_sites, n_env, name)

        def evaluate(context: Any = context, positions: Any = positions) -> None:
            for _ in range(min(n_frames, 20)):
                context.setPositions(positions)
                context.getState(getEnergy=True, getForces=True, getParameterDerivatives=True)

        # setPositions is what a new frame costs OpenMM.
        seconds = median_seconds(evaluate, budget)
        times[f"OpenMM {name}"] = seconds * n_frames / min(n_frames, 20)
    label = f"{n_sites} x {n_env:,} pairs, {n_frames:,} frame{'s' if n_frames > 1 else ''}"
    return Row(label, {k: v * 1e6 for k, v in times.items()})


def table(rows: list[Row]) -> str:
    """Markdown: microseconds, and in brackets the ratio to the compiled float64 operator."""
    lines = ["| problem | " + " | ".join(f"{w} [us]" for w in WAYS) + " |"]
    lines.append("|---|" + "---|" * len(WAYS))
    for row in rows:
        base = row.times[WAYS[0]]
        cells = [f"{row.times[w]:,.0f} ({row.times[w] / base:.2f}x)" for w in WAYS]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the oracle's errors and the table of times; write them with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", action="store_true", help="write benchmarks/results/kernel.md")
    parser.add_argument("--quick", action="store_true", help="a small table, in seconds")
    parser.add_argument("--threads", type=int, default=1, help="threads for every way of computing")
    options = parser.parse_args()
    os.environ["DIFFFORCE_NUM_THREADS"] = os.environ["OPENMM_CPU_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    found = oracle()
    lines = [
        "# Kernel oracle and times",
        "",
        "Made by `python benchmarks/kernel.py --out`. Fixed seeds; medians; one run, side by side.",
        "",
        "## Oracle: flat base, Gaussian pair function, noise on both sites",
        "",
        f"Largest error of the value {found.value:.1e} (limit 1e-6), of the gradient "
        f"{found.gradient:.1e}, relative to the function's largest; half-way between noise knots "
        f"(0.005, 0.01, 0.02, 0.05 nm) the interpolation is off by {found.between:.1e}.",
        "",
    ]
    cases = [(4, 2000, 1), (20, 20000, 1), (4, 2000, 100 if options.quick else 10000)]
    rows = [measure(*case, budget=0.5 if options.quick else 4.0) for case in cases]
    lines += [
        "## Times",
        "",
        f"One evaluation is value, forces and lambda derivative (the operator: sigma derivative "
        f"too), orthorhombic box, cutoff 1.2 nm or half the box, water's density; "
        f"{options.threads} thread(s), {platform.machine()}, torch {torch.__version__}. Batches: "
        "plain torch timed on 50 frames and OpenMM on 20, scaled.",
        "",
        table(rows),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        path = Path(__file__).parent / "results" / "kernel.md"
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(path)


if __name__ == "__main__":
    main()
