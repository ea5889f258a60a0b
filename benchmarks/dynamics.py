"""Diffusion sampling as dynamics: the adapter step, its bias, memory, paths, independent starts.

    python benchmarks/dynamics.py --out runs/dynamics [--only train,adapter,bias,memory,paths,starts]

Every part writes ``<out>/<part>.json`` and is skipped if that exists; the table goes to
``benchmarks/results/dynamics.md``, figures beside it. ``train`` comes first: one model, fitted to
amber14 snapshots whose order was shuffled. References are computed in the same run; settings
stand here, and nothing is tuned on the results.
"""

from pathlib import Path
from typing import Any
from unittest import mock

import mdtraj as md
import numpy as np
import openmm
import torch
from parts import run_parts

from openmm_diffforce import analysis, sampler, training
from openmm_diffforce.alanine import TEMPERATURE, AlanineCase, alanine_case
from openmm_diffforce.artefact import export_artefact, load_artefact
from openmm_diffforce.demo import learned_base_system
from openmm_diffforce.errors import ConvergenceError
from openmm_diffforce.langevin import DiffusionLangevinIntegrator, independent_then_dynamics
from openmm_diffforce.models.action import model_fields
from openmm_diffforce.models.physics import PhysicalModel
from openmm_diffforce.path_kl import path_divergence
from openmm_diffforce.project import r_squared
from openmm_diffforce.schedule import VESchedule
from openmm_diffforce.scores import noise_grid, score_of
from openmm_diffforce.step_size import advise_integrator, advise_step, curvature_spectrum
from openmm_diffforce.systems import clone_system, forces, graph_from_topology, potential_energies, sample
from openmm_diffforce.testing import GaussianMixture
from openmm_diffforce.units import thermal_energy

SEED = 50
KT = thermal_energy(TEMPERATURE)
RESULTS = Path(__file__).parent / "results"

# train
N_TRAIN, N_TEST, INTERVAL = 3000, 1000, 300
SIGMA_MAX = 0.05
CAPACITIES = ((100, None), (300, None), (1000, None), (3000, None), (3000, 5), (3000, 4))
"""Training frames, and spline coefficients of every class (None: the defaults, 6 to 14)."""

# Dynamics: overdamped, mass-weighted mobilities.
FRICTION = 50.0
STEP = 1e-4
"""[ps]; chosen by the advisor on training frames: stiffest mode at D dt kappa = 0.8 of 2."""

# adapter
N_REPEATS = 3000

# bias
BIAS_STEPS = (2.5e-5, 5e-5, 1e-4, 1.5e-4, 2e-4)
UNSTABLE_STEP = 4e-4
BIAS_STARTS, BIAS_EQUIL, BIAS_FRAMES, BIAS_INTERVAL = 250, 400, 20, 30
"""Short runs from many held-out frames: the stiff modes, which carry the bias, relax in tens of steps,
and the slow ones stay as they were drawn. (A single run of 24 ps is one relaxation time of psi: its
energy was that of the basins it met.)"""

# memory
EQUAL_MASS = 12.0
"""[Da] of every atom: equal mobilities, with which slow torsions move farthest in a stable step.
The masses of overdamped dynamics are mobilities alone; both dynamics have these."""
MEMORY_STEP = 3.5e-4
"""[ps]; by the advisor, as ``STEP``."""
N_LEARNED, N_CLASSICAL = 10, 20
N_MEMORY_STARTS = 15
"""Held-out frames, one in three for the learned runs, taken in turn."""
MEMORY_FRAMES, MEMORY_INTERVAL = 2000, 100
"""70 ps a run. (Two shorter tries: 4 and 8 runs of 20 ps with the mobilities above; then half as many
runs as now. C5, visited once or twice in a run, decides the long lags.)"""
N_LAGS = 571
"""20 ps."""
LAGS = (14, 29, 57, 143, 286)
"""0.5, 1, 2, 5, 10 ps."""
SHORT_LAGS = (1, 3, 7, 14, 29)
"""0.035 to 1 ps, within the basin."""

# paths
N_PATH_FRAMES = 500
PATH_STEPS = (2.5e-5, 5e-5, 1e-4, 2e-4)

# starts
N_STARTS = 100
START_SIGMA, START_LAST, START_LEVELS = 0.01, 0.0005, 100
START_STEP = 2.5e-5
START_FRAMES, START_INTERVAL = 10, 100


def _case() -> AlanineCase:
    return alanine_case("F1", restrain_phi=True)


def _frames(out: Path) -> tuple[np.ndarray, np.ndarray]:
    """Training frames in shuffled order, and test frames."""
    with np.load(out / "frames.npz") as kept:
        return kept["train"], kept["test"]


def _model_path(out: Path, n: int, n_coefs: int | None) -> Path:
    return out / f"model_{n}_{n_coefs or 'default'}.diffforce"


def train(out: Path) -> dict:
    """The frames, the models of every capacity, and how they do on held-out frames."""
    case = _case()
    x = sample(
        case.system_0,
        case.topology,
        case.positions,
        temperature=TEMPERATURE,
        n_frames=N_TRAIN + N_TEST,
        interval=INTERVAL,
        seed=SEED,
    )
    shuffled = np.random.default_rng(SEED).permutation(N_TRAIN)
    np.savez(out / "frames.npz", train=x[:N_TRAIN][shuffled], test=x[N_TRAIN:])
    frames, test = _frames(out)
    graph, schedule = graph_from_topology(case.topology), VESchedule(SIGMA_MAX)
    truth = forces(case.system_0, test)
    rows = []
    for n, n_coefs in CAPACITIES:
        main = (n, n_coefs) == (N_TRAIN, None)
        # Only the model of the other parts needs more than clean tables.
        knots = training.default_knots(schedule) if main else (0.0, SIGMA_MAX)
        changed = {} if n_coefs is None else dict.fromkeys(training.N_COEFS, n_coefs)
        with mock.patch.dict(training.N_COEFS, changed):
            fit = training.fit_base_action(
                frames[:n], graph, sigma_knots=knots, generator=np.random.default_rng(SEED), n_draws=1
            )
        model = PhysicalModel(fit.tables, None, schedule)
        export_artefact(
            model,
            _model_path(out, n, n_coefs),
            graph=graph,
            schedule=schedule,
            temperature=TEMPERATURE,
            frames=frames[:n],
        )
        learned = -KT * model_fields(model, test)[1]
        rows.append(
            {"n": n, "n_coefs": fit.record["n_coefs"], "per_class": n_coefs, "r2": r_squared(learned, truth)}
        )
        print(f"  {rows[-1]}", flush=True)
    return {"rows": rows}


def _brownian(step: float, seed: int) -> openmm.Integrator:
    integrator = openmm.BrownianIntegrator(TEMPERATURE, FRICTION, step)
    integrator.setRandomNumberSeed(seed)
    return integrator


def _adapter(step: float, seed: int, **options: Any) -> DiffusionLangevinIntegrator:
    return DiffusionLangevinIntegrator(TEMPERATURE, FRICTION, step, seed=seed, **options)


def _reference() -> openmm.Platform:
    return openmm.Platform.getPlatformByName("Reference")


def _positions(context: openmm.Context) -> np.ndarray:
    return np.array(context.getState(positions=True).getPositions(asNumpy=True)._value)


def adapter(out: Path) -> dict:
    """The same noise gives the same positions; BrownianIntegrator's steps in distribution."""
    case = _case()
    system, x_0 = case.system_0, _frames(out)[1][0]
    free = openmm.System()
    for i in range(system.getNumParticles()):
        free.addParticle(system.getParticleMass(i))
    integrator = _adapter(STEP, SEED)
    context = openmm.Context(free, integrator, _reference())
    context.setPositions(np.zeros_like(x_0))
    k = integrator.getStiffness(free)[:, None]
    noise, before = [], np.zeros_like(x_0)
    for _ in range(1000):
        integrator.step(1)
        noise.append((_positions(context) - before) * np.sqrt(k))
        before = _positions(context)
    integrator = _adapter(STEP, SEED)
    context = openmm.Context(system, integrator, _reference())
    context.setPositions(x_0)
    worst, x = 0.0, x_0
    for xi in noise:
        score = np.array(context.getState(forces=True).getForces(asNumpy=True)._value) / KT
        x = sampler.harmonic_adapter_step(_positions(context), score, k, xi)
        integrator.step(1)
        worst = max(worst, float(np.abs(_positions(context) - x).max()))
    # Steps from one frame: their mean and variance in every coordinate.
    k = np.broadcast_to(k, x_0.shape)
    want = forces(system, x_0)[0] / KT / (2 * k)
    found: dict[str, Any] = {"same_noise": worst}
    for name, integrator in (("adapter", _adapter(STEP, 1)), ("brownian", _brownian(STEP, 2))):
        context = openmm.Context(system, integrator, _reference())
        moved = np.empty((N_REPEATS, *x_0.shape))
        for r in range(N_REPEATS):
            context.setPositions(x_0)
            integrator.step(1)
            moved[r] = _positions(context) - x_0
        z_mean = (moved.mean(axis=0) - want) * np.sqrt(k * N_REPEATS)
        z_variance = ((moved - want).var(axis=0) * k - 1) / np.sqrt(2 / N_REPEATS)
        for what, z in (("mean", z_mean), ("variance", z_variance)):
            found[f"{name}_{what}"] = {
                "chi2": float((z**2).sum()),
                "n": z.size,
                "largest": float(np.abs(z).max()),
            }
    return found


def _energy_mean(system: openmm.System, integrator: Any, starts: np.ndarray) -> dict[str, Any]:
    """Mean reduced potential energy over short runs, its error over these, acceptance rate."""
    context = openmm.Context(system, integrator, _reference())
    u = np.empty((len(starts), BIAS_FRAMES))
    for k, x in enumerate(starts):
        context.setPositions(x)
        integrator.step(BIAS_EQUIL)
        for i in range(BIAS_FRAMES):
            integrator.step(BIAS_INTERVAL)
            u[k, i] = context.getState(energy=True).getPotentialEnergy()._value / KT
    each = u.mean(axis=1)
    rate = integrator.acceptance_rate if getattr(integrator, "metropolis", False) else None
    return {
        "mean": float(each.mean()),
        "error": float(each.std(ddof=1) / np.sqrt(len(each))),
        "acceptance": rate,
    }


def bias(out: Path) -> dict:
    """Predicted and measured excess of the potential energy: four Gaussian modes, alanine."""
    random, kappa, d = np.random.default_rng(SEED), np.array([100.0, 400.0, 900.0, 1000.0]), 1.0
    toy = []
    for a in (0.2, 0.5, 1.0, 1.5, 1.9):
        step = a / (d * kappa.max())
        advice = advise_step(lambda x: -kappa * x, np.zeros((1, 4)), d, step)
        x = random.standard_normal((20000, 4)) / np.sqrt(kappa)
        for _ in range(int(np.ceil(8 / (d * step * kappa.min())))):
            noise = random.standard_normal(x.shape)
            x = sampler.harmonic_adapter_step(x, -kappa * x, 1 / (2 * d * step), noise)
        u = 0.5 * (kappa * x**2).sum(axis=1)
        toy.append(
            {
                "a": a,
                "predicted": advice.energy_bias,
                "measured": float(u.mean() - 2.0),
                "error": float(u.std() / np.sqrt(len(u))),
            }
        )
    case = _case()
    frames, test = _frames(out)
    systems = {
        "amber14": case.system_0,
        "learned": learned_base_system(case, _model_path(out, N_TRAIN, None)),
    }
    # The frames of train in the order of their run: LangevinMiddle has no such bias where it is harmonic.
    in_order = np.empty_like(frames)
    in_order[np.random.default_rng(SEED).permutation(N_TRAIN)] = frames
    u = potential_energies(case.system_0, np.concatenate([in_order, test])) / KT
    blocks = u[: len(u) // 20 * 20].reshape(20, -1).mean(axis=1)
    reference = {"mean": float(u.mean()), "error": float(blocks.std(ddof=1) / np.sqrt(20))}
    print(f"  reference {reference}", flush=True)
    rows, starts = [], test[:: N_TEST // BIAS_STARTS]
    for step in (*BIAS_STEPS, UNSTABLE_STEP):
        row: dict[str, Any] = {"step": step}
        for name, system in systems.items():
            integrator = _adapter(step, SEED)
            advice = advise_integrator(integrator, system, frames[:20])
            row[name] = {
                "a": advice.stiffness, "limit": advice.limit, "verdict": advice.verdict,
                "predicted": advice.energy_bias if advice.verdict != "unstable" else None,
                "suggested": advice.suggested, "text": str(advice),
            }  # fmt: skip
        try:
            row["raw"] = _energy_mean(case.system_0, _adapter(step, SEED + 2), starts)
        except (openmm.OpenMMException, ConvergenceError) as err:
            row["raw"] = {"mean": float("inf"), "error": 0.0, "said": str(err)}
        if not np.isfinite(row["raw"]["mean"]):
            row["raw"] = None  # JSON has no infinity
        if step in (5e-5, 1e-4):
            mala = _adapter(step, SEED + 3, metropolis=True, system=case.system_0)
            row["mala"] = _energy_mean(case.system_0, mala, starts)
        rows.append(row)
        print(f"  {row}", flush=True)
    spectrum = curvature_spectrum(
        lambda x: forces(case.system_0, x) / KT, frames[:20], _adapter(STEP, 0).diffusion(case.system_0)
    )
    grid = np.linspace(0, 0.95 * 2 / spectrum.largest.max(), 40)
    figure, (left, right) = analysis.new_figure(2)
    a = np.linspace(0, 1.93, 60)
    law = [(0.5 / (1 - 0.5 * v * kappa / kappa.max()) - 0.5).sum() for v in a]
    left.plot(a, law, color="0.4", label="predicted")
    left.errorbar(
        [r["a"] for r in toy],
        [r["measured"] for r in toy],
        [r["error"] for r in toy],
        fmt="o",
        label="measured",
    )
    left.set(
        xlabel="D dt kappa of the stiffest mode", ylabel="excess energy [kT]", title="four Gaussian modes"
    )
    right.plot(grid * 1e3, [spectrum.energy_bias(v) for v in grid], color="0.4", label="predicted")
    seen = [r for r in rows if r["raw"]]
    right.errorbar(
        [r["step"] * 1e3 for r in seen],
        [r["raw"]["mean"] - reference["mean"] for r in seen],
        [np.hypot(r["raw"]["error"], reference["error"]) for r in seen],
        fmt="o",
        label="measured",
    )
    tamed = [r for r in rows if "mala" in r]
    right.errorbar(
        [r["step"] * 1e3 for r in tamed],
        [r["mala"]["mean"] - reference["mean"] for r in tamed],
        [np.hypot(r["mala"]["error"], reference["error"]) for r in tamed],
        fmt="s",
        label="with Metropolis",
    )
    right.axhline(0, color="0.8", zorder=0)
    right.set(xlabel="time step [fs]", title=f"alanine, amber14, friction {FRICTION:g}/ps")
    left.legend(frameon=False)
    right.legend(frameon=False)
    (RESULTS / "dynamics_bias.png").write_bytes(analysis.figure_bytes(figure, file_format="png", dpi=100))
    return {"toy": toy, "reference": reference, "rows": rows}


def _observables(x: np.ndarray, case: AlanineCase) -> dict[str, np.ndarray]:
    """phi and psi as (cos, sin), and the C7 hydrogen bond O(ACE)...H(NME) [nm], per frame."""
    trajectory = analysis.trajectory_of(x, case.topology)
    angles = analysis.phi_psi(trajectory)
    top = trajectory.topology
    pair = [top.select("resname ACE and name O")[0], top.select("resname NME and name H")[0]]
    return {
        "phi": np.stack([np.cos(angles[:, 0]), np.sin(angles[:, 0])], axis=1),
        "psi": np.stack([np.cos(angles[:, 1]), np.sin(angles[:, 1])], axis=1),
        "O...H": md.compute_distances(trajectory, [pair]).astype(float),
        "angles": angles,
    }


def _displacements(angles: np.ndarray) -> np.ndarray:
    """Sums of squared changes of phi and psi [degrees^2] after each short lag, from frames in C7eq,
    and how many: [lag, (phi, psi, count)]. A run may hold none."""
    phi, psi = np.degrees(angles).T
    inside = (phi > -120) & (phi < 0) & (psi > -30) & (psi < 110)
    found = []
    for lag in SHORT_LAGS:
        change = np.degrees(angles[lag:] - angles[:-lag])[inside[:-lag]]
        change = (change + 180) % 360 - 180
        found.append([*(change**2).sum(axis=0), len(change)])
    return np.array(found)


def _pooled(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [lag, angle] over runs [run, lag, (phi, psi, count)], and its jackknife error over these."""

    def mean(v: np.ndarray) -> np.ndarray:
        total = v.sum(axis=0)
        return total[:, :2] / total[:, 2:]

    left_out = np.array([mean(np.delete(sums, r, axis=0)) for r in range(len(sums))])
    return mean(sums), np.sqrt((len(sums) - 1) * left_out.var(axis=0))


def memory(out: Path) -> dict:
    """The claim: a model that saw shuffled snapshots alone moves with the force field's memory."""
    case = _case()
    _, test = _frames(out)
    system = clone_system(case.system_0)
    learned = learned_base_system(case, _model_path(out, N_TRAIN, None))
    for one in (system, learned):
        for i in range(one.getNumParticles()):
            one.setParticleMass(i, EQUAL_MASS)
    # Starts: held-out frames, spread over the test run; others for either dynamics.
    spread = np.linspace(0, N_TEST - 1, N_MEMORY_STARTS).astype(int)
    starts = {"learned": spread[::3], "amber14": np.delete(spread, np.s_[::3])}
    n_runs = {"learned": N_LEARNED, "amber14": N_CLASSICAL}
    frames: dict[str, Any] = {}
    for name, one in (("learned", learned), ("amber14", system)):
        make = _brownian if name == "amber14" else _adapter
        runs = []
        for k in range(n_runs[name]):
            start = starts[name][k % len(starts[name])]
            path = out / f"memory_{name}_{k}.npz"
            if not path.exists():
                x = independent_then_dynamics(
                    one,
                    test[start],
                    make(MEMORY_STEP, SEED + 100 * k + (name == "amber14")),
                    n_frames=MEMORY_FRAMES,
                    interval=MEMORY_INTERVAL,
                    n_equil=20 * MEMORY_INTERVAL,
                ).frames[0]
                np.savez(path, x=x.astype(np.float32))
                print(f"  {name}: run {k + 1} of {n_runs[name]}", flush=True)
            with np.load(path) as kept:
                runs.append(kept["x"].astype(np.float64))
        frames[name] = np.array(runs)
    interval = MEMORY_STEP * MEMORY_INTERVAL
    seen = {name: [_observables(run, case) for run in x] for name, x in frames.items()}
    curves, rows = {}, {}
    for what in ("phi", "psi", "O...H"):
        for name in seen:
            series = np.array([run[what] for run in seen[name]])
            curves[what, name] = analysis.autocorrelation(series, N_LAGS, interval=interval)
        one, two = curves[what, "learned"], curves[what, "amber14"]
        lags = list(LAGS)
        z = (one.correlation - two.correlation)[lags] / np.hypot(one.error, two.error)[lags]
        rows[what] = {
            "learned": [one.time, one.time_error],
            "amber14": [two.time, two.time_error],
            "lags_ps": [float(one.lag[k]) for k in lags],
            "z": z.tolist(),
            "curve_learned": one.correlation[lags].tolist(),
            "curve_amber14": two.correlation[lags].tolist(),
        }
    short = {
        name: _pooled(np.array([_displacements(run["angles"]) for run in runs]))
        for name, runs in seen.items()
    }
    moves = [
        {
            "angle": ("phi", "psi")[i],
            "lag_ps": lag * interval,
            **{name: [float(v[j, i]), float(e[j, i])] for name, (v, e) in short.items()},
        }
        for i in range(2)
        for j, lag in enumerate(SHORT_LAGS)
    ]
    figure, axes = analysis.new_figure(3, width=3.6)
    for ax, what in zip(axes, ("phi", "psi", "O...H"), strict=True):
        for name, label in (("amber14", "amber14, Brownian"), ("learned", "learned from snapshots")):
            c = curves[what, name]
            ax.plot(c.lag, c.correlation, label=f"{label} ({c.n_runs} runs)")
            ax.fill_between(c.lag, c.correlation - c.error, c.correlation + c.error, alpha=0.25)
        ax.axhline(0, color="0.8", zorder=0)
        ax.set(xlabel="lag [ps]", title=what)
    axes[0].set_ylabel("autocorrelation")
    axes[0].legend(frameon=False, fontsize=7)
    (RESULTS / "dynamics_memory.png").write_bytes(analysis.figure_bytes(figure, file_format="png", dpi=100))
    angles = {name: [run["angles"] for run in runs] for name, runs in seen.items()}
    halves = [np.concatenate(angles["amber14"][k::2]) for k in range(2)]  # each as long as learned
    hot = {}
    for name, one in (("learned", learned), ("amber14", system)):
        every = frames[name].reshape(-1, *test.shape[1:])[
            :: max(1, frames[name].shape[0] * MEMORY_FRAMES // 300)
        ]
        for method in ("laplacian", "virial"):
            t = analysis.configurational_temperature(every, lambda f, s=one: forces(s, f), method=method)
            hot[f"{name}, {method}"] = [t.temperature, t.error]
    pooled = {name: np.concatenate(runs) for name, runs in angles.items()}
    return {
        "rows": rows,
        "moves": moves,
        "c5": {
            name: [float(np.mean(v)), float(np.std(v, ddof=1) / np.sqrt(len(v)))]
            for name, v in (
                (name, [(np.abs(np.degrees(run["angles"][:, 1])) > 110).mean() for run in runs])
                for name, runs in seen.items()
            )
        },
        "jsd_learned": [analysis.jensen_shannon(pooled["learned"], h) for h in halves],
        "jsd_amber14": [analysis.jensen_shannon(*halves)],
        "temperature": hot,
        "runs": {name: len(x) for name, x in frames.items()},
    }


def paths(out: Path) -> dict:
    """Divergence of paths: a Gaussian with exact terms, and alanine by capacity and step."""
    random, n = np.random.default_rng(SEED), 20000
    kappa, d = 100.0, 0.1
    toy = []
    for wrong in (1.0, 1.1, 1.3):
        for step in (0.005, 0.02, 0.05):
            k = wrong * kappa
            v = 1 / (k * (1 - d * step * k / 2))
            x = np.sqrt(v) * random.standard_normal((n, 1))
            found = path_divergence(lambda x, k=k: -k * x, lambda x: -kappa * x, x, d, step, generator=random)
            toy.append(
                {
                    "wrong": wrong,
                    "a": d * step * kappa,
                    "score": found.score,
                    "score_exact": 0.25 * d * (k - kappa) ** 2 * v,
                    "discretisation": found.discretisation,
                    "discretisation_exact": 0.25 * d * kappa**2 * (d**2 * step**2 / 3 * k**2 * v + d * step),
                }
            )
    case = _case()
    _, test = _frames(out)
    diffusion = _adapter(STEP, 0).diffusion(case.system_0)

    def reference(x: np.ndarray) -> np.ndarray:
        return forces(case.system_0, x) / KT

    # The mixed System has the restraint of the reference; a model alone does not.
    def learned_score(path: Path) -> Any:
        system = learned_base_system(case, path)
        return lambda x: forces(system, x) / KT

    pick = np.linspace(0, N_TEST - 1, N_PATH_FRAMES).astype(int)
    rows = []
    for size, n_coefs in CAPACITIES:
        score = learned_score(_model_path(out, size, n_coefs))
        row: dict[str, Any] = {"n": size, "per_class": n_coefs, "terms": []}
        for step in PATH_STEPS:
            found = path_divergence(
                score, reference, test[pick], diffusion, step, generator=np.random.default_rng(SEED)
            )
            row["terms"].append(
                {
                    "step": step,
                    "score": found.score,
                    "discretisation": found.discretisation,
                    "total": found.total,
                }
            )
        rows.append(row)
        print(f"  {row}", flush=True)
    own = None
    own_runs = sorted(out.glob("memory_learned_*.npz"))
    if own_runs:
        x = np.concatenate([np.load(path)["x"].astype(np.float64) for path in own_runs])
        found = path_divergence(
            learned_score(_model_path(out, N_TRAIN, None)), reference, x[:: len(x) // N_PATH_FRAMES],
            KT / (EQUAL_MASS * FRICTION), MEMORY_STEP, generator=np.random.default_rng(SEED),
        )  # fmt: skip
        own = {"score": found.score, "discretisation": found.discretisation, "total": found.total}
    return {"toy": toy, "rows": rows, "own": own}


def _mixture() -> tuple[np.ndarray, np.ndarray, float]:
    return np.array([[-0.1, 0.0], [0.1, 0.02]]), np.array([0.3, 0.7]), 0.02


def _log_density(x: np.ndarray, variance: float) -> np.ndarray:
    centres, weights, _ = _mixture()
    away = ((centres - x[:, None]) ** 2).sum(axis=2)
    return np.log((weights * np.exp(-away / (2 * variance))).sum(axis=1) / (2 * np.pi * variance))


def starts(out: Path) -> dict:
    """Independent samples by diffusion, dynamics from each, reweighting to the force field."""
    centres, weights, width = _mixture()
    schedule, random, n = VESchedule(1.0), np.random.default_rng(SEED), 2000

    mixture = GaussianMixture(centres, width**2, weights=weights)

    def score(x: np.ndarray) -> np.ndarray:
        clean = mixture.score(schedule)
        return clean(torch.as_tensor(x), torch.zeros(len(x), dtype=torch.float64)).numpy()

    y = sampler.prior_frames((n, 2), schedule, 1.0, generator=random, prior=mixture.prior())
    times = noise_grid(schedule, 300, kind="log", sigma_min=0.004)
    found = sampler.reverse_sde(
        mixture.score(schedule), y, schedule, times=times, generator=random, final="keep"
    )
    x, step = found.samples, 0.1 * width**2
    from_one = np.tile(centres[1], (n, 1))
    for _ in range(500):  # the dynamics, from diffusion's samples and from a single basin
        x = sampler.harmonic_adapter_step(x, score(x), 1 / (2 * step), random.standard_normal(x.shape))
        from_one = sampler.harmonic_adapter_step(
            from_one, score(from_one), 1 / (2 * step), random.standard_normal(x.shape)
        )
    # Another energy: the left basin 1 kT deeper, the whole shifted.
    target = -_log_density(x, width**2) - 1.0 * (x[:, 0] < 0) + 0.5 * ((x[:, 1] - 0.01) / 0.03) ** 2
    weighed = sampler.reweight_samples(target, -_log_density(x, width**2))
    grid = np.stack(np.meshgrid(np.linspace(-0.25, 0.25, 401), np.linspace(-0.15, 0.15, 401)), -1)
    g = grid.reshape(-1, 2)
    p = np.exp(_log_density(g, width**2) + 1.0 * (g[:, 0] < 0) - 0.5 * ((g[:, 1] - 0.01) / 0.03) ** 2)
    toy = {
        "left_diffusion": [float((found.samples[:, 0] < 0).mean()), float(np.sqrt(0.21 / n))],
        "left_dynamics": [float((x[:, 0] < 0).mean()), float(np.sqrt(0.21 / n))],
        "left_one_basin": float((from_one[:, 0] < 0).mean()),
        "calls": found.calls,
        "ess": weighed.effective_samples / n,
        "left_reweighted": weighed.average((x[:, 0] < 0).astype(float)),
        "left_target": float(p[g[:, 0] < 0].sum() / p.sum()),
    }
    case = _case()
    frames, test = _frames(out)
    artefact = load_artefact(_model_path(out, N_TRAIN, None))
    learned = learned_base_system(case, artefact.path)
    times = noise_grid(
        artefact.schedule, START_LEVELS, kind="log", sigma_min=START_LAST, sigma_max=START_SIGMA
    )
    random = np.random.default_rng(SEED)
    clean = frames[:N_STARTS] - frames[:N_STARTS].mean(axis=1, keepdims=True)
    y = sampler.noise_frames(clean, artefact.schedule, times[-1], generator=random)
    local = sampler.predictor_corrector(
        score_of(artefact.model), y, artefact.schedule, times=times, generator=random,
        final="denoise",
    )  # fmt: skip
    mala = _adapter(START_STEP, SEED, metropolis=True, system=learned)
    runs = independent_then_dynamics(
        learned,
        local.samples,
        mala,
        n_frames=START_FRAMES,
        interval=START_INTERVAL,
    )

    def reduced(system: openmm.System, x: np.ndarray) -> np.ndarray:
        return potential_energies(system, x) / KT

    stages = {}
    for name, x in (
        ("noised", y),
        ("denoised", local.samples),
        *((f"after {k * START_INTERVAL} steps", runs.frames[:, k - 1]) for k in (1, 5, START_FRAMES)),
        ("held-out amber14 frames", test[:: N_TEST // N_STARTS]),
    ):
        u, s = reduced(case.system_0, x), reduced(learned, x)
        try:
            w = sampler.reweight_samples(u, s, min_effective=0)
            ess = w.effective_samples
            energy = w.average(u)
        except ValueError:
            ess, energy = None, None
        stages[name] = {
            "u": [float(u.mean()), float(u.std(ddof=1) / np.sqrt(len(u)))],
            "s": [float(s.mean()), float(s.std(ddof=1) / np.sqrt(len(s)))],
            "ess": ess,
            "u_reweighted": energy,
        }
        print(f"  {name} {stages[name]}", flush=True)
    return {
        "toy": toy, "stages": stages, "calls": local.calls, "acceptance": runs.acceptance_rate,
    }  # fmt: skip


PARTS = {f.__name__: f for f in (train, adapter, bias, memory, paths, starts)}


def _pm(pair: Any, digits: int = 2) -> str:
    return f"{pair[0]:.{digits}f} +- {pair[1]:.{digits}f}"


def _adapter_lines(a: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "## The adapter step is overdamped Langevin dynamics",
        "",
        "Same noise, 1000 steps inside OpenMM against `harmonic_adapter_step`: largest difference of a",
        f"coordinate {a['same_noise']:.1e} nm. {N_REPEATS} steps from one frame, against N(x + s/(2k), 1/k)",
        "in each of the 66 coordinates (sum of squared z-scores, expected 66 +- 11):",
        "",
        "| | mean: chi^2, largest z | variance: chi^2, largest z |",
        "|---|---|---|",
    ]
    for name, label in (("adapter", "DiffusionLangevinIntegrator"), ("brownian", "BrownianIntegrator")):
        each = [a[f"{name}_{what}"] for what in ("mean", "variance")]
        lines.append(
            f"| {label} | " + " | ".join(f"{v['chi2']:.0f}, {v['largest']:.1f}" for v in each) + " |"
        )
    return lines


def _bias_lines(b: dict[str, Any]) -> list[str]:
    base = b["reference"]
    lines = [
        "",
        "## What a time step costs: predicted before the run, measured after it",
        "",
        "![Predicted and measured excess energy](dynamics_bias.png)",
        "",
        "Four Gaussian modes, 20000 chains:",
        "",
        "| D dt kappa of the stiffest | excess energy predicted [kT] | measured [kT] |",
        "|---|---|---|",
    ]
    for r in b["toy"]:
        lines.append(f"| {r['a']} | {r['predicted']:.3f} | {r['measured']:.3f} +- {r['error']:.3f} |")
    lines += [
        "",
        "Alanine, amber14. Reference: the frames of the fit (LangevinMiddle, 1 fs), <U> = "
        f"{_pm([base['mean'], base['error']])} kT.",
        "The advisor saw 20 training frames, with the Hessian of amber14 (in brackets: of the learned one).",
        f"Measured: {BIAS_STARTS} runs of {BIAS_EQUIL + BIAS_FRAMES * BIAS_INTERVAL} steps from as many "
        "held-out frames.",
        "",
        "| step [fs] | D dt kappa | verdict | excess predicted [kT] | measured [kT] | with Metropolis [kT] "
        "| accepted |",
        "|---|---|---|---|---|---|---|",
    ]

    def excess(run: dict[str, Any] | None) -> str:
        if run is None:
            return "runs away"
        return f"{run['mean'] - base['mean']:+.2f} +- {np.hypot(run['error'], base['error']):.2f}"

    for r in b["rows"]:
        known, learned = r["amber14"], r["learned"]
        said = ["unstable" if v["predicted"] is None else f"{v['predicted']:.2f}" for v in (known, learned)]
        tamed = f"{excess(r['mala'])} | {r['mala']['acceptance']:.2f}" if "mala" in r else "- | -"
        lines.append(
            f"| {r['step'] * 1e3:g} | {known['a']:.2f} ({learned['a']:.2f}) | {known['verdict']} | "
            f"{said[0]} ({said[1]}) | {excess(r['raw'])} | {tamed} |"
        )
    return lines


def _memory_lines(m: dict[str, Any]) -> list[str]:
    length, longest = (n * MEMORY_INTERVAL * MEMORY_STEP for n in (MEMORY_FRAMES, N_LAGS))
    runs = m["runs"]
    lines = [
        "",
        "## Trained on shuffled snapshots, run as dynamics",
        "",
        "![Autocorrelation of phi, psi and a distance](dynamics_memory.png)",
        "",
        f"{runs['learned']} runs of the learned force (DiffusionLangevinIntegrator) and {runs['amber14']} of "
        "amber14 (BrownianIntegrator),",
        f"{length:g} ps each at {MEMORY_STEP * 1e3:g} fs, from held-out frames; equal mobilities (every mass "
        f"{EQUAL_MASS:g} Da). Relaxation time:",
        f"integral of the autocorrelation to {longest:.0f} ps; errors by the jackknife",
        "over runs. O...H: from O of ACE to H of NME.",
        "",
        "| | learned [ps] | amber14 [ps] | z of the difference | z of the curves at "
        + ", ".join(f"{v:.1f}" for v in m["rows"]["phi"]["lags_ps"])
        + " ps |",
        "|---|---|---|---|---|",
    ]
    for what, r in m["rows"].items():
        one, two = r["learned"], r["amber14"]
        z = (one[0] - two[0]) / np.hypot(one[1], two[1])
        each = ", ".join(f"{v:+.1f}" for v in r["z"])
        lines.append(f"| {what} | {_pm(one, 1)} | {_pm(two, 1)} | {z:+.1f} | {each} |")
    lines += [
        "",
        "The long lags hang on C5, visited once or twice in a run and left after 20 ps: "
        f"{_pm(m['c5']['learned'])} of the frames have",
        f"|psi| > 110 degrees in the learned runs, {_pm(m['c5']['amber14'])} in amber14's. Within C7eq there "
        "is more to compare:",
        "the mean squared change of an angle after a lag [degrees^2].",
        "",
        "| | lag [ps] | learned | amber14 | z |",
        "|---|---|---|---|---|",
    ]
    for r in m["moves"]:
        one, two = r["learned"], r["amber14"]
        z = (one[0] - two[0]) / np.hypot(one[1], two[1])
        lines.append(f"| {r['angle']} | {r['lag_ps']:.3f} | {_pm(one, 1)} | {_pm(two, 1)} | {z:+.1f} |")
    each = ", ".join(f"{v:.4f}" for v in m["jsd_learned"])
    lines += [
        "",
        "Jensen-Shannon divergence of (phi, psi): learned to two sets of amber14 runs, each as long, "
        f"{each}; between these",
        f"{m['jsd_amber14'][0]:.4f} nats. Configurational temperature (the step heats stiff modes in both):",
        "; ".join(f"{name} {_pm(v, 0)} K" for name, v in m["temperature"].items()) + ".",
    ]
    return lines


def _path_lines(p: dict[str, Any], fits: list[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "## Divergence of paths: score error and discretisation error apart",
        "",
        "A Gaussian mode (nats per ps; exact terms in brackets):",
        "",
        "| stiffness learned / true | D dt kappa | score | discretisation |",
        "|---|---|---|---|",
    ]
    for r in p["toy"]:
        lines.append(
            f"| {r['wrong']} | {r['a']:.2f} | {_pm(r['score'], 4)} ({r['score_exact']:.4f}) | "
            f"{_pm(r['discretisation'], 3)} ({r['discretisation_exact']:.3f}) |"
        )
    lines += [
        "",
        f"Alanine, nats per ps, {N_PATH_FRAMES} held-out frames. The score error is the model's, whatever "
        "the step; the",
        "discretisation error is amber14's own, whatever the model; the total holds their cross term.",
        "",
        "| training frames | coefficients | force R^2 | score error | "
        + " | ".join(f"total, {1 / s:.0f} steps/ps" for s in PATH_STEPS)
        + " |",
        "|---|---|---|---|" + "---|" * len(PATH_STEPS),
    ]
    quality = {(r["n"], r["per_class"]): r for r in fits}
    for r in p["rows"]:
        q = quality.get((r["n"], r["per_class"]))
        known = f"{q['n_coefs']} | {q['r2']:.4f}" if q else "- | -"
        totals = " | ".join(_pm(t["total"], 0) for t in r["terms"])
        lines.append(f"| {r['n']} | {known} | {_pm(r['terms'][0]['score'], 0)} | {totals} |")
    whole = next(r for r in p["rows"] if r["n"] == N_TRAIN and r["per_class"] is None)
    steps = " | ".join(_pm(t["discretisation"], 0) for t in whole["terms"])
    lines.append(f"| discretisation alone | | | 0 | {steps} |")
    if p["own"]:
        o = p["own"]
        lines += [
            "",
            f"On frames of the learned dynamics above ({MEMORY_STEP * 1e3:g} fs, equal mobilities): score",
            f"{_pm(o['score'], 0)}, discretisation {_pm(o['discretisation'], 0)}, "
            f"total {_pm(o['total'], 0)}.",
        ]
    return lines


def _start_lines(s: dict[str, Any]) -> list[str]:
    t = s["toy"]
    lines = [
        "",
        "## Independent samples by diffusion, dynamics from each, reweighting",
        "",
        "Two basins in the plane, weights 0.3 and 0.7, a barrier that 500 steps of dynamics do not cross; "
        "2000 samples:",
        "",
        "| | weight of the left basin |",
        "|---|---|",
        f"| reverse SDE from the prior ({t['calls']} calls) | {_pm(t['left_diffusion'], 3)} |",
        f"| the same after 500 steps of dynamics | {_pm(t['left_dynamics'], 3)} |",
        f"| dynamics alone, started in the right basin | {t['left_one_basin']:.3f} |",
        f"| reweighted to another energy ({t['ess']:.0%} effective samples; exact {t['left_target']:.3f}) | "
        f"{_pm(t['left_reweighted'], 3)} |",
        "",
        f"Alanine: {N_STARTS} training frames noised to {START_SIGMA} nm and denoised ({s['calls']} calls, "
        "predictor-corrector),",
        f"then Metropolis-corrected dynamics on the learned action at {START_STEP * 1e3:g} fs "
        f"({s['acceptance']:.0%} accepted), reweighted to amber14:",
        "",
        f"| | U(amber14) [kT] | effective samples of {N_STARTS} | U reweighted [kT] |",
        "|---|---|---|---|",
    ]
    for name, r in s["stages"].items():
        sampled = name.startswith("after")
        ess = f"{r['ess']:.0f} | {_pm(r['u_reweighted'], 1)}" if sampled else "- | -"
        lines.append(f"| {name} | {_pm(r['u'], 1)} | {ess} |")
    return lines


def table(found: dict[str, Any]) -> list[str]:
    lines = [
        "# Diffusion sampling as dynamics",
        "",
        "`python benchmarks/dynamics.py`. Alanine dipeptide in vacuum, amber14, 300 K, phi kept out of C7ax;",
        f"one model fitted to {N_TRAIN} snapshots in shuffled order (seed {SEED}). Overdamped dynamics,",
        f"mobilities 1/(m friction), friction {FRICTION:g}/ps, Reference platform; standard errors.",
    ]
    if "adapter" in found:
        lines += _adapter_lines(found["adapter"])
    if "bias" in found:
        lines += _bias_lines(found["bias"])
    if "memory" in found:
        lines += _memory_lines(found["memory"])
    if "paths" in found:
        lines += _path_lines(found["paths"], found.get("train", {}).get("rows", []))
    if "starts" in found:
        lines += _start_lines(found["starts"])
    return lines


if __name__ == "__main__":
    run_parts("dynamics", __doc__, PARTS, table)
