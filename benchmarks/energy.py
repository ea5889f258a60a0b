"""Energies read out of diffusion models, against exact ones and against the force field.

    python benchmarks/energy.py --out runs/energy [--only exact,cost,learned,well,sample,models,flow]

Parts: a one-dimensional Gaussian mixture with its exact score (``exact``, ``cost``) and with a learned
one (``learned``); a learned two-dimensional double well (``well``); alanine dipeptide, amber14 in
vacuum (``sample``, ``models``, ``flow``). Every part writes ``<out>/<part>.json`` and is skipped
if that exists; the table goes to ``benchmarks/results/energy.md``, the pictures beside it.
"""

import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from energy_alanine import BLEND, SIGMA_RANGE, BlendedScore, train
from parts import Part, run_parts
from rich.progress import track

from openmm_diffforce.alanine import TEMPERATURE, alanine_case
from openmm_diffforce.analysis import new_figure, phi_psi, trajectory_of
from openmm_diffforce.energy import learned_energy, sample_with_energy
from openmm_diffforce.models.action import model_fields
from openmm_diffforce.models.envelope import EnvelopeAction
from openmm_diffforce.models.physics import PhysicalModel
from openmm_diffforce.network_training import NetworkSettings, fit_denoiser, fit_network
from openmm_diffforce.schedule import VESchedule, VPSchedule
from openmm_diffforce.scores import matched_prior
from openmm_diffforce.systems import graph_from_topology, potential_energies, sample
from openmm_diffforce.testing import GaussianMixture
from openmm_diffforce.training import fit_base_action
from openmm_diffforce.units import thermal_energy

RESULTS = Path(__file__).parent / "results"
SEED = 5100

MIXTURE = GaussianMixture([[-1.0], [1.2]], [[[0.04]], [[0.16]]], weights=[0.3, 0.7])
SCHEDULES = {"VP": VPSchedule(length=1.0), "VE": VESchedule(20.0)}
X = np.linspace(-1.8, 2.8, 24)[:, None]
MATTERS = 0.01
"""Where the density matters: above this share of its maximum."""

N_PATHS = 24
"""Of stochastic methods."""

WELL_STEPS, MIXTURE_STEPS, BATCH = 4000, 15000, 128
N_MIXTURE_DATA, N_WELL_DATA, N_REFERENCE = 100000, 8000, 1024
MIXTURE_SIGMA = (0.05, 10.0)

N_TRAIN, N_TEST, INTERVAL = 8000, 1000, 250
N_PHYSICAL = 3000
N_FLOW, FLOW_STEPS = 50, 16
SIGMA_TOP = SIGMA_RANGE[1]
NETWORK = NetworkSettings(n_steps=500, check_every=100)
BINS = 18


# ---------------------------------------------------------------------- the mixture, exactly

METHODS: dict[str, dict[str, Any]] = {
    "flow, RK4, matched prior": {"n_steps": 40},
    "flow, RK4, standard prior": {"n_steps": 40, "prior": "standard"},
    "flow, Heun, matched prior": {"n_steps": 160, "solver": "heun"},
    "Stratonovich, noising path": {"method": "stratonovich", "n_steps": 400, "n_paths": 4},
    "Stratonovich, mean path": {"method": "stratonovich", "path": "mean", "n_steps": 400},
    "Stratonovich, flow path": {"method": "stratonovich", "path": "flow", "n_steps": 400},
    "Stratonovich, Brownian path, halved": {
        "method": "stratonovich", "path": "brownian", "n_steps": 1000, "n_paths": N_PATHS,
        "extrapolate": True,
    },
    "forward Ito": {"method": "ito", "n_steps": 1000, "n_paths": N_PATHS},
    "backward Ito": {"method": "backward_ito", "n_steps": 1000, "n_paths": N_PATHS},
    "I-MMSE": {"method": "mmse", "n_steps": 200, "n_paths": 400},
}  # fmt: skip


def solved(kind: str, x: np.ndarray = X, **arguments: Any) -> tuple[Any, np.ndarray]:
    schedule = SCHEDULES[kind]
    arguments = {"prior": MIXTURE.prior(), "generator": np.random.default_rng(SEED), **arguments}
    found = learned_energy(MIXTURE.score(schedule), x, schedule, **arguments)
    return found, found.log_density - MIXTURE.log_density(x)


def exact(out: Path) -> dict[str, Any]:
    """Every method with the exact score."""
    rows = []
    for kind in SCHEDULES:
        for name, arguments in METHODS.items():
            found, error = solved(kind, **arguments)
            row = {
                "schedule": kind, "method": name, "n_steps": found.n_steps, "n_paths": found.n_paths,
                "worst": float(np.abs(error).max()), "rms": float(np.sqrt((error**2).mean())),
                "n_score": found.n_score // len(X), "n_products": found.n_products // len(X),
                "log_density": found.log_density,
            }  # fmt: skip
            if np.nanmax(found.standard_error) > 1e-6:
                z = error / found.standard_error
                row |= {
                    "error": float(np.median(found.standard_error)), "z_worst": float(np.abs(z).max()),
                    "z_rms": float(np.sqrt((z**2).mean())),
                }  # fmt: skip
            rows.append(row)
        made = sample_with_energy(
            MIXTURE.score(SCHEDULES[kind]), (1,), SCHEDULES[kind], n_frames=1000, n_steps=1000,
            prior=MIXTURE.prior(), generator=np.random.default_rng(SEED),
        )  # fmt: skip
        error = made.energy.log_density - MIXTURE.log_density(made.x)
        z = error / made.energy.standard_error
        rows.append(
            {
                "schedule": kind, "method": "reverse SDE, 1000 samples", "n_steps": 1000, "n_paths": 1,
                "worst": float(np.abs(error).max()), "rms": float(np.sqrt((error**2).mean())),
                "n_score": 1000, "n_products": 0, "error": float(np.median(made.energy.standard_error)),
                "z_worst": float(np.abs(z).max()), "z_rms": float(np.sqrt((z**2).mean())),
                "mean": float(error.mean()), "d_mean": float(error.std() / math.sqrt(len(error))),
                "x": made.x[:300, 0], "log_density": made.energy.log_density[:300],
            }
        )  # fmt: skip
    return {"rows": rows, "x": X[:, 0], "truth": MIXTURE.log_density(X), "paths": paths()}


def paths() -> list[dict[str, Any]]:
    """Examples of each kind of path from one frame, for the picture."""
    schedule, x, n = SCHEDULES["VP"], 0.6, 200
    t = np.linspace(0, 1, n + 1) ** 2
    alpha, sigma = (v.numpy() for v in (schedule.alpha(t), schedule.sigma(t)))
    generator = np.random.default_rng(SEED)
    score = MIXTURE.score(schedule)
    rows = [{"kind": "mean", "t": t, "y": alpha * x}]
    for _ in range(3):
        rows.append({"kind": "noising", "t": t, "y": alpha * x + sigma * generator.standard_normal()})
    for kind in ("flow", "brownian", "brownian"):
        y = [x]
        for k in range(n):
            h, f = t[k + 1] - t[k], float(schedule.drift(t[k]))
            g2 = float(schedule.diffusion(t[k])) ** 2
            if kind == "flow":
                s = float(score(torch.tensor([[y[-1]]], dtype=torch.float64), torch.tensor([t[k]])))
                y.append(y[-1] + h * (f * y[-1] - 0.5 * g2 * s))
            else:
                y.append(y[-1] + h * f * y[-1] + math.sqrt(g2 * h) * generator.standard_normal())
        rows.append({"kind": kind, "t": t, "y": y})
    return rows


def cost(out: Path) -> dict[str, Any]:
    """Error against score evaluations, VP."""
    rows = []
    kinds: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
        "flow, Heun": ({"solver": "heun"}, (10, 20, 40, 80, 160)),
        "flow, RK4": ({"solver": "rk4"}, (6, 10, 20, 40, 80)),
        "Stratonovich, noising path": (
            {"method": "stratonovich", "n_paths": 1}, (20, 40, 80, 160, 320, 640)),
        "the same, extrapolated": (
            {"method": "stratonovich", "n_paths": 1, "extrapolate": True}, (20, 40, 80, 160, 320)),
        "forward Ito": ({"method": "ito", "n_paths": 1}, (50, 200, 800, 3200)),
        "backward Ito": ({"method": "backward_ito", "n_paths": 1}, (50, 200, 800, 3200)),
        "I-MMSE, 20 noise pairs": ({"method": "mmse", "n_paths": 20}, (20, 80)),
    }  # fmt: skip
    for name, (arguments, steps) in kinds.items():
        for n in steps:
            found, error = solved("VP", n_steps=n, halving="extrapolate" in arguments, **arguments)
            rows.append(
                {
                    "method": name, "n_steps": n, "n_score": found.n_score / len(X),
                    "n_products": found.n_products / len(X), "rms": float(np.sqrt((error**2).mean())),
                }
            )  # fmt: skip
    return {"rows": rows}


# --------------------------------------------------------------------------- learned densities


class ScoreNet(torch.nn.Module):
    """s(y, t) of a VE schedule in the preconditioned form of T. Karras et al. (arXiv:2206.00364)."""

    def __init__(
        self, n_dim: int, spread: float, sigma_max: float, generator: torch.Generator, gain: float
    ) -> None:  # fmt: skip
        super().__init__()
        self.spread, self.sigma_max = spread, sigma_max
        sizes = (n_dim + 5, 64, 64, n_dim)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in pairwise(sizes))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
                layer.weight.mul_(layer.in_features**-0.5)
                layer.bias.zero_()
            if gain != 1:  # steeper functions of y to begin with, spread over it
                first = self.layers[0]
                first.weight[:, :n_dim] *= gain
                first.bias.copy_(0.5 * gain * torch.randn(first.bias.shape, generator=generator))

    def denoise(self, y: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """E[x | y]."""
        sigma = sigma[:, None]
        total = torch.sqrt(self.spread**2 + sigma**2)
        level = 0.5 * torch.log(sigma)
        waves = [level, *(f(level * k) for k in (1.0, 2.0) for f in (torch.sin, torch.cos))]
        h = torch.cat([y / total, *waves], dim=1)
        for layer in self.layers[:-1]:
            h = torch.nn.functional.silu(layer(h))
        left = sigma * self.spread / total
        return (self.spread / total) ** 2 * y + left * self.layers[-1](h)

    def forward(self, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The score."""
        sigma = self.sigma_max * t * t
        return (self.denoise(y, sigma) - y) / (sigma**2)[:, None]


def posterior_mean(
    y: torch.Tensor, sigma: torch.Tensor, own: torch.Tensor, others: torch.Tensor
) -> torch.Tensor:
    """E[x | y] over other samples and the one that was noised: a target with less noise than that one.

    Y. Xu, S. Tong, T. Jaakkola, Stable target field for reduced variance score estimation, 2023,
    arXiv:2302.00670.
    """
    away = torch.cat([((y[:, None] - others) ** 2).sum(2), ((y - own) ** 2).sum(1, keepdim=True)], dim=1)
    weight = torch.softmax(-0.5 * away / (sigma**2)[:, None], dim=1)
    return weight[:, :-1] @ others + weight[:, -1:] * own


def score_net(
    x: np.ndarray, sigma_range: tuple[float, float], n_steps: int, seed: int, *, batch: int = BATCH,
    learning_rate: float = 3e-3, gain: float = 1.0, n_reference: int = 0,
) -> ScoreNet:  # fmt: skip
    """Denoising score matching on samples x; the moving average of the weights."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.as_tensor(x)
    net = ScoreNet(x.shape[1], float(x.std()), sigma_range[1], generator, gain).double()
    weights = [w.data for w in net.parameters()]
    average = [w.clone() for w in weights]
    optimiser = torch.optim.Adam(net.parameters(), lr=learning_rate)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps)
    low, high = (math.log(v) for v in sigma_range)
    for step in range(n_steps):
        clean = data[torch.randint(len(data), (batch,), generator=generator)]
        level = torch.rand(batch, generator=generator, dtype=torch.float64)
        sigma = torch.exp(low + (high - low) * level)
        eps = sigma[:, None] * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
        left = sigma * net.spread / torch.sqrt(net.spread**2 + sigma**2)
        # opposite noise: what is odd in it cancels in the gradient
        y, sigma, clean = torch.cat([clean + eps, clean - eps]), sigma.repeat(2), clean.repeat(2, 1)
        if n_reference:
            others = data[torch.randint(len(data), (n_reference,), generator=generator)]
            clean = posterior_mean(y, sigma, clean, others)
        miss = net.denoise(y, sigma) - clean
        loss = ((miss / left.repeat(2)[:, None]) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        fall.step()
        keep = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, weights, 1 - keep)
    torch._foreach_copy_(weights, average)
    return net.eval()


def judged(error: np.ndarray, density: np.ndarray) -> dict[str, float]:
    """Errors where the density matters; the mean over p too."""
    where = density > MATTERS * density.max()
    weight = density[where] / density[where].sum()
    return {
        "n_points": int(where.sum()), "worst": float(np.abs(error[where]).max()),
        "rmse": float(np.sqrt((error[where] ** 2).mean())),
        "rmse_p": float(np.sqrt((weight * error[where] ** 2).sum())),
    }  # fmt: skip


def learned(out: Path) -> dict[str, Any]:
    """The mixture from samples alone, three sets of samples."""
    x = np.linspace(-1.9, 3.0, 50)[:, None]
    truth, rows = MIXTURE.log_density(x), []
    for seed in track(range(SEED + 1, SEED + 4), "learned mixture"):
        data = MIXTURE.sample(N_MIXTURE_DATA, np.random.default_rng(seed))
        net = score_net(
            data, MIXTURE_SIGMA, MIXTURE_STEPS, seed, learning_rate=0.01, gain=6.0, n_reference=N_REFERENCE
        )
        generator = np.random.default_rng(seed)
        common = {"prior": matched_prior(data), "sigma_min": 0.05, "generator": generator}
        for name, arguments in (
            ("flow", {"n_steps": 60}),
            ("stratonovich", {"method": "stratonovich", "n_steps": 400, "n_paths": 8}),
            ("ito", {"method": "ito", "n_steps": 500, "n_paths": 8}),
            ("backward_ito", {"method": "backward_ito", "n_steps": 500, "n_paths": 8}),
        ):  # fmt: skip
            found = learned_energy(net, x, VESchedule(MIXTURE_SIGMA[1]), **common, **arguments)
            value = found.log_density + np.nan_to_num(found.truncation)
            rows.append(
                {
                    "seed": seed, "method": name, **judged(value - truth, np.exp(truth)),
                    "log_density": value, "error": float(np.median(found.standard_error)),
                }
            )  # fmt: skip
        # what the samples themselves know: a histogram with one bin per half width of the narrow peak
        edges = np.arange(-2.0, 3.2, 0.1)
        counts = np.histogram(data[:, 0], edges)[0]
        centre = 0.5 * (edges[1:] + edges[:-1])
        with np.errstate(divide="ignore"):
            value = np.log(counts / (len(data) * 0.1))
        exact_log = MIXTURE.log_density(centre[:, None])
        rows.append({"seed": seed, "method": "histogram", **judged(value - exact_log, np.exp(exact_log))})
    return {"rows": rows, "x": x[:, 0], "truth": truth}


def well_action(x: np.ndarray) -> np.ndarray:
    """S = 5 (x^2 - 1)^2 + x/2 + 4 (y - x^2/2)^2: a bent double well."""
    return 5 * (x[:, 0] ** 2 - 1) ** 2 + 0.5 * x[:, 0] + 4 * (x[:, 1] - 0.5 * x[:, 0] ** 2) ** 2


def well(out: Path) -> dict[str, Any]:
    """A double well in the plane, from samples alone."""
    axis_x, axis_y = np.linspace(-1.8, 1.8, 41), np.linspace(-1.2, 2.4, 41)
    grid = np.stack(np.meshgrid(axis_x, axis_y, indexing="ij"), -1).reshape(-1, 2)
    fine = np.stack(np.meshgrid(np.linspace(-3, 3, 601), np.linspace(-4, 6, 601), indexing="ij"), -1)
    log_z = math.log(np.exp(-well_action(fine.reshape(-1, 2))).sum() * 0.01 * (10 / 600))
    truth, rows = -well_action(grid) - log_z, []
    where = np.exp(truth) > MATTERS * np.exp(truth).max()
    for seed in track(range(SEED + 11, SEED + 14), "double well"):
        generator = np.random.default_rng(seed)
        # exact samples: x by its marginal (y integrates to a constant), y given x
        marginal = np.linspace(-2.5, 2.5, 20001)
        weight = np.exp(-5 * (marginal**2 - 1) ** 2 - 0.5 * marginal)
        first = generator.choice(marginal, N_WELL_DATA, p=weight / weight.sum())
        second = 0.5 * first**2 + generator.standard_normal(N_WELL_DATA) / math.sqrt(8)
        data = np.column_stack([first, second])
        net = score_net(data, (0.02, 20.0), WELL_STEPS, seed)
        found = learned_energy(
            net, grid[where], VESchedule(20.0), sigma_min=0.03, n_steps=60, prior=matched_prior(data)
        )
        value = found.log_density + found.truncation
        miss = value - truth[where]
        rows.append(
            {
                "seed": seed, **judged(miss, np.exp(truth[where])),
                "steps": float(np.abs(found.discretisation).max()),
                "barrier": float(np.ptp(value)), "log_density": value,
            }
        )  # fmt: skip
    return {"rows": rows, "grid": grid[where], "truth": truth[where]}


# ------------------------------------------------------------------------------------- alanine


def case_and_graph() -> tuple[Any, Any]:
    case = alanine_case("F1", restrain_phi=True)
    return case, graph_from_topology(case.topology)


def frames(out: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training frames, held-out frames, and their force-field energies [kT]."""
    with np.load(out / "frames.npz") as kept:
        return kept["train"], kept["test"], kept["energy"]


def sample_part(out: Path) -> dict[str, Any]:
    """Frames of amber14, those to learn from and others held out; another run for the latter."""
    case, _ = case_and_graph()
    x = [
        sample(
            case.system_0, case.topology, case.positions, temperature=TEMPERATURE, n_frames=n,
            interval=INTERVAL, timestep=0.001, friction=1.0, n_equil=20000, seed=SEED + k,
        )
        for k, n in enumerate((N_TRAIN, N_TEST))
    ]  # fmt: skip
    energy = potential_energies(case.system_0, x[1]) / thermal_energy(TEMPERATURE)
    np.savez(out / "frames.npz", train=x[0], test=x[1], energy=energy)
    return {
        "n_train": N_TRAIN,
        "n_test": N_TEST,
        "interval_fs": INTERVAL,
        "energy_spread": float(energy.std()),
    }


def line(value: np.ndarray, truth: np.ndarray, seed: int = SEED) -> dict[str, float]:
    """R^2 of value against truth (means removed), slope of value on truth, with bootstrap errors."""

    def both(rows: np.ndarray) -> tuple[float, float, float]:
        v, u = value[rows] - value[rows].mean(), truth[rows] - truth[rows].mean()
        return 1 - ((v - u) ** 2).sum() / (u**2).sum(), (v @ u) / (u @ u), np.corrcoef(v, u)[0, 1] ** 2

    generator = np.random.default_rng(seed)
    n, names = len(truth), ("r2", "slope", "squared_correlation")
    at = both(np.arange(n))
    spread = np.std([both(generator.integers(0, n, n)) for _ in range(500)], axis=0)
    found = {}
    for name, a, s in zip(names, at, spread, strict=True):
        found |= {name: float(a), f"{name}_se": float(s)}
    miss = value - value.mean() - (truth - truth.mean())
    return {**found, "rmse": float(np.sqrt((miss**2).mean())), "n_frames": n}


def surface(out: Path, x: np.ndarray, log_weight: np.ndarray) -> tuple[np.ndarray, float]:
    """Share of every cell of (phi, psi) with weights, and the effective number of frames."""
    case, _ = case_and_graph()
    angles = phi_psi(trajectory_of(x, case.topology))
    weight = np.exp(log_weight - log_weight.max())
    edges = np.linspace(-math.pi, math.pi, BINS + 1)
    share = np.histogram2d(angles[:, 0], angles[:, 1], bins=(edges, edges), weights=weight)[0]
    return share / share.sum(), float(weight.sum() ** 2 / (weight**2).sum())


def surfaces_apart(a: np.ndarray, b: np.ndarray, n: int) -> float:
    """Root mean square difference of -ln(share) [kT] over cells where both have data, weighted by a."""
    where = (a * n >= 5) & (b > 0)
    difference = -np.log(b[where]) + np.log(a[where])
    weight = a[where] / a[where].sum()
    difference = difference - weight @ difference
    return float(np.sqrt(weight @ difference**2))


def physical(out: Path) -> tuple[Any, Any]:
    """The physical clean action, and its denoiser, from the training frames; made once."""
    path = out / "physical.pt"
    _, graph = case_and_graph()
    x = frames(out)[0][:: N_TRAIN // N_PHYSICAL]
    if not path.exists():
        fit = fit_base_action(
            x, graph, sigma_knots=(0.0, 0.002), generator=np.random.default_rng(SEED), n_draws=1
        )
        torch.save(PhysicalModel(fit.tables, None, VESchedule(0.002)).state_dict(), out / "tables.pt")
        torch.save(fit.tables, path)
    tables = torch.load(path, weights_only=False)
    return PhysicalModel(tables, None, VESchedule(0.002)), fit_denoiser(x, graph)


def models(out: Path) -> dict[str, Any]:
    """Clean actions against the force field on held-out frames; free-energy surfaces."""
    case, graph = case_and_graph()
    x_train, x, truth = frames(out)
    started = time.process_time()
    base, _ = physical(out)
    cpu = {"physical model": time.process_time() - started}
    started = time.process_time()
    some = x_train[:: N_TRAIN // N_PHYSICAL]
    # the network wants an operator; this one is the pair's own, and nothing below looks at it
    ends = [
        some,
        sample(
            case.system_1, case.topology, case.positions, temperature=TEMPERATURE, n_frames=500,
            interval=INTERVAL, timestep=0.001, friction=1.0, n_equil=20000, seed=SEED + 2,
        ),
    ]  # fmt: skip
    o = [case.pair.operator_values(v) for v in ends]
    network, _ = fit_network(
        ends[0], o[0], ends[1], o[1], graph, case.perturbed, VESchedule(0.02), seed=SEED, settings=NETWORK
    )
    cpu["network alone"] = time.process_time() - started
    flat, _ = surface(out, x, np.zeros(len(x)))
    rows, surfaces = [], {"amber14": flat}
    half = surface(out, x_train[:: N_TRAIN // N_TEST], np.zeros(N_TEST))[0]
    for name, model in (("physical model", base), ("network alone", network)):
        action = model_fields(model, x)[0]
        share, ess = surface(out, x, truth - action)
        surfaces[name] = share
        rows.append(
            {
                "model": name, **line(action, truth), "ess": ess, "cpu_seconds": cpu[name],
                "surface": surfaces_apart(flat, share, len(x)), "action": action,
            }
        )  # fmt: skip
    return {
        "rows": rows,
        "surfaces": surfaces,
        "two_runs": surfaces_apart(flat, half, len(x)),
        "truth": truth,
    }


def flow(out: Path) -> dict[str, Any]:
    """-ln p_0 along the probability flow on some held-out frames, with its error budget."""
    x_train, x_all, truth_all = frames(out)
    pick = np.linspace(0, len(x_all) - 1, N_FLOW).astype(int)
    x, truth = x_all[pick], truth_all[pick]
    base, denoiser = physical(out)
    envelope = EnvelopeAction(base, denoiser, VESchedule(2 * BLEND[1]))
    started = time.process_time()
    log: list[list[float]] = []
    network = train(x_train, report=lambda *a: (log.append(list(a)), print("  ", *a, flush=True)))
    train_cpu = time.process_time() - started
    schedule = VESchedule(SIGMA_TOP)
    score = BlendedScore(envelope, network, SIGMA_TOP)
    common = {"grid": "karras", "sigma_min": 0.0005, "prior": matched_prior(x_train)}
    rows = []

    def add(name: str, found: Any, cpu: float) -> None:
        value = -found.log_density - found.truncation
        rows.append(
            {
                "method": name, **line(value, truth), "cpu_seconds": cpu, "value": value,
                "n_score": found.n_score // len(x), "n_products": found.n_products // len(x),
                "steps_rms": float(found.discretisation.std()),
                "drawn_rms": float(np.sqrt(np.mean(found.standard_error**2))),
            }
        )  # fmt: skip
        print("  ", {k: v for k, v in rows[-1].items() if k != "value"}, flush=True)

    started = time.process_time()
    add(
        "flow, RK4",
        learned_energy(score, x, schedule, n_steps=FLOW_STEPS, **common),
        time.process_time() - started,
    )
    started = time.process_time()
    generator = np.random.default_rng(SEED)
    add(
        "Stratonovich, 4 noising paths",
        learned_energy(
            score, x, schedule, method="stratonovich", n_steps=24, n_paths=4, generator=generator,
            **common,
        ),
        time.process_time() - started,
    )  # fmt: skip
    action = model_fields(base, x)[0]
    return {
        "rows": rows,
        "truth": truth,
        "train_cpu": train_cpu,
        "losses": log,
        "on_same": line(action, truth),
    }


PARTS: dict[str, Part] = {
    "exact": exact, "cost": cost, "learned": learned, "well": well, "sample": sample_part, "models": models,
    "flow": flow,
}  # fmt: skip


# ----------------------------------------------------------------------------- table, pictures

BLUE, BROWN, GREEN, RED, GREY = "#1f5f8b", "#8a5a20", "#1d7044", "#a33b3b", "#59626b"
COLOURS = (BLUE, BROWN, GREEN, RED, "#6b4f9a", "#b0851f", GREY, "#2a9090", "#c05a9a")


def saved(figure: Any, name: str) -> str:
    figure.savefig(RESULTS / f"energy_{name}.png", dpi=90)
    return f"![{name}](energy_{name}.png)"


def exact_section(part: dict[str, Any], costs: dict[str, Any] | None) -> list[str]:
    lines = [
        "## One-dimensional mixture, exact score", "",
        f"0.3 N(-1, 0.2^2) + 0.7 N(1.2, 0.4^2), {len(part['x'])} points from {part['x'][0]:g} to "
        f"{part['x'][-1]:g}; VP with length 1, VE up to sigma 20; no truncation (sigma_min = 0). Errors of "
        "ln p_0 [kT]; z: error over the method's own standard error (median of these: stated). Scores and "
        "Jacobian products per frame, the step-halving run of the flow among them.", "",
        "| schedule | method | steps | paths | worst error | rms | stated | worst z | rms z | scores | "
        "products |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in part["rows"]:
        own = ["-"] * 3
        if "error" in r and "noising" not in r["method"]:  # those paths agree: their spread is rounding
            own = [f"{r['error']:.4f}", f"{r['z_worst']:.1f}", f"{r['z_rms']:.2f}"]
        lines.append(
            f"| {r['schedule']} | {r['method']} | {r['n_steps']} | {r['n_paths']} | {r['worst']:.4f} | "
            f"{r['rms']:.4f} | {' | '.join(own)} | {r['n_score']} | {r['n_products']} |"
        )
    means = [f"{r['schedule']} {r['mean']:+.4f} +- {r['d_mean']:.4f}" for r in part["rows"] if "d_mean" in r]
    lines += [
        "", f"Mean error of the reverse SDE over its samples: {', '.join(means)}: a bias of first order in "
        "the step, which halves with it.", "",
    ]  # fmt: skip
    lines += [saved(picture_of_methods(part), "methods"), ""]
    if costs:
        lines += [
            "Error against score evaluations (VP, one path, no step halving except where extrapolated):", "",
            "| method | steps | scores | products | rms error |", "|---|---|---|---|---|",
        ]  # fmt: skip
        for r in costs["rows"]:
            lines.append(
                f"| {r['method']} | {r['n_steps']} | {r['n_score']:.0f} | {r['n_products']:.0f} | "
                f"{r['rms']:.2g} |"
            )
        lines += ["", saved(picture_of_cost(costs), "cost"), ""]
    return lines


def picture_of_methods(part: dict[str, Any]) -> Any:
    figure, (left, middle, right) = new_figure(3, width=4.2)
    x, truth = np.array(part["x"]), np.array(part["truth"])
    fine = np.linspace(-1.9, 3.0, 300)
    left.plot(fine, -MIXTURE.log_density(fine[:, None]), color="black", linewidth=1, label="exact")
    rows = [r for r in part["rows"] if r["schedule"] == "VP"]
    shown = [r for r in rows if "x" not in r and "standard" not in r["method"]]
    for r, colour in zip(shown, COLOURS * 2, strict=False):
        left.plot(x, -np.array(r["log_density"]), ".", markersize=4, color=colour, label=r["method"])
        middle.plot(
            x,
            np.maximum(np.abs(np.array(r["log_density"]) - truth), 1e-6),
            ".-",
            color=colour,
            linewidth=0.6,
        )
    (reverse,) = (r for r in rows if "x" in r)
    left.plot(
        reverse["x"], -np.array(reverse["log_density"]), ".", markersize=2, color=GREY, alpha=0.4,
        label=reverse["method"], zorder=0,
    )  # fmt: skip
    left.set(xlabel="x", ylabel="energy, -ln p [kT]", title="energy profile (VP)", ylim=(-0.5, 14))
    left.legend(fontsize=5.5, frameon=False)
    middle.set(yscale="log", xlabel="x", ylabel="|error| [kT]", title="error of each method")
    styles = {"mean": (BLUE, 1.2), "noising": (GREEN, 0.9), "flow": (RED, 1.4), "brownian": (GREY, 0.6)}
    seen = set()
    for one in part["paths"]:
        colour, width = styles[one["kind"]]
        label = None if one["kind"] in seen else one["kind"]
        right.plot(one["t"], one["y"], color=colour, linewidth=width, label=label)
        seen.add(one["kind"])
    right.set(xlabel="t", ylabel="y", title="paths from x = 0.6")
    right.legend(fontsize=7, frameon=False)
    return figure


def picture_of_cost(costs: dict[str, Any]) -> Any:
    figure, (axes,) = new_figure(1, width=5.2, height=3.8)
    for name, colour in zip(dict.fromkeys(r["method"] for r in costs["rows"]), COLOURS, strict=False):
        rows = [r for r in costs["rows"] if r["method"] == name]
        axes.plot([r["n_score"] for r in rows], [r["rms"] for r in rows], "o-", markersize=3, color=colour,
                  linewidth=1, label=name)  # fmt: skip
    axes.axhline(0.01, color=GREY, linewidth=0.7, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="score evaluations per frame", ylabel="rms error [kT]")
    axes.legend(fontsize=7, frameon=False)
    return figure


def learned_section(part: dict[str, Any]) -> list[str]:
    lines = [
        "## One-dimensional mixture, learned score", "",
        f"A network of 2 x 64 units, denoising score matching on {N_MIXTURE_DATA} samples, {MIXTURE_STEPS} "
        f"steps, targets averaged over {N_REFERENCE} samples; three sets of samples. sigma_min 0.05, its "
        f"first-order truncation added. Where p > {MATTERS:g} max p. A histogram of the same samples (bins "
        "of 0.1) beside it. Two weaker trainings had been run on these samples before (rms over p 0.2 and "
        "0.08 by the flow); settings came from other samples.", "",
        "| samples | method | worst error [kT] | rms [kT] | rms over p [kT] | stated |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in part["rows"]:
        stated = f"{r['error']:.3f}" if r.get("error") else "-"
        lines.append(
            f"| {r['seed']} | {r['method']} | {r['worst']:.3f} | {r['rmse']:.3f} | {r['rmse_p']:.3f} | "
            f"{stated} |"
        )
    flow_rows = [r for r in part["rows"] if r["method"] == "flow"]
    within = [
        f"{method}: worst of {sum(r['worst'] <= 0.1 for r in rows)}, rms of "
        f"{sum(r['rmse'] <= 0.1 for r in rows)} of {len(rows)}"
        for method in ("flow", "stratonovich")
        for rows in [[r for r in part["rows"] if r["method"] == method]]
    ]
    figure, (left, right) = new_figure(2)
    x, truth = np.array(part["x"]), np.array(part["truth"])
    left.plot(x, -truth, color="black", linewidth=1.2, label="exact")
    for r, colour in zip(flow_rows, COLOURS, strict=False):
        value = np.array(r["log_density"])
        left.plot(x, -value, color=colour, linewidth=0.9, label=f"flow, samples {r['seed']}")
        right.plot(x, value - truth, color=colour, linewidth=0.9)
    where = np.exp(truth) > MATTERS * np.exp(truth).max()
    right.fill_between(x, -1, 1, where=where, color=GREY, alpha=0.12, linewidth=0)
    left.set(xlabel="x", ylabel="energy [kT]", title="learned energy", ylim=(-0.5, 12))
    left.legend(fontsize=7, frameon=False)
    right.set(xlabel="x", ylabel="error of ln p [kT]", title="error", ylim=(-1, 1))
    return [
        *lines, "",
        f"Within 0.1 kT where the density matters, {'; '.join(within)} sets of samples.", "",
        saved(figure, "learned"), "",
    ]  # fmt: skip


def well_section(part: dict[str, Any]) -> list[str]:
    lines = [
        "## Double well in the plane, learned score", "",
        f"S = 5 (x^2 - 1)^2 + x/2 + 4 (y - x^2/2)^2; {N_WELL_DATA} exact samples, a network of 2 x 64 units, "
        f"{WELL_STEPS} steps, flow by RK4 in 60 steps, sigma_min 0.03 with its truncation. Where p > "
        f"{MATTERS:g} max p: {len(part['truth'])} points, energies over {np.ptp(part['truth']):.1f} kT.", "",
        "| samples | rms error [kT] | rms over p [kT] | worst [kT] | largest step-halving estimate [kT] |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for r in part["rows"]:
        lines.append(
            f"| {r['seed']} | {r['rmse']:.3f} | {r['rmse_p']:.3f} | {r['worst']:.3f} | {r['steps']:.3f} |"
        )
    figure, (left, right) = new_figure(2)
    grid, truth = np.array(part["grid"]), np.array(part["truth"])
    value = np.array(part["rows"][0]["log_density"])
    shown = left.scatter(*grid.T, c=-value, s=9, marker="s", cmap="viridis")
    figure.colorbar(shown, ax=left, label="learned energy [kT]")
    left.set(xlabel="x", ylabel="y")
    right.plot(-truth, -value, ".", markersize=3, color=BLUE)
    ends = [min(-truth), max(-truth)]
    right.plot(ends, ends, color=GREY, linewidth=0.8)
    right.set(xlabel="exact energy [kT]", ylabel="learned [kT]")
    return [*lines, "", saved(figure, "well"), ""]


def pm(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.3f} +- {row[name + '_se']:.3f}"


def worst_frame(value: Any, truth: Any) -> float:
    """The largest error in size, medians removed."""
    miss = np.array(value) - np.array(truth)
    miss = miss - np.median(miss)
    return float(miss[np.abs(miss).argmax()])


def alanine_section(found: dict[str, Any]) -> list[str]:
    if "models" not in found:
        return []
    part, sampled = found["models"], found["sample"]
    lines = [
        "## Alanine dipeptide", "",
        f"amber14 in vacuum, 300 K, phi within 120 degrees of -120; {sampled['n_train']} frames to learn "
        f"from, {sampled['n_test']} of another run held out, {sampled['interval_fs'] / 1000:g} ps apart. "
        "Learned energy against the force field's U/kT on held-out frames, means removed (standard deviation "
        f"of U/kT: {sampled['energy_spread']:.2f}); bootstrap errors over frames, taken for independent. No "
        "energy of the force field was used in training the actions; the network's operator, which nothing "
        "here looks at, was given the end states' differences.", "",
        "| energy | frames | R^2 | slope | squared correlation | rms error [kT] |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    rows = [(f"{r['model']}, clean action", r) for r in part["rows"]]
    if "flow" in found:
        f = found["flow"]
        rows.append(("physical model, on the frames below", f["on_same"]))
        rows += [(f"-ln p_0: {r['method']}", r) for r in f["rows"]]
    for name, r in rows:
        lines.append(
            f"| {name} | {r['n_frames']} | {pm(r, 'r2')} | {pm(r, 'slope')} | "
            f"{pm(r, 'squared_correlation')} | {r['rmse']:.2f} |"
        )
    if "flow" in found:
        f = found["flow"]
        gap = np.array(f["rows"][0]["value"]) - np.array(f["rows"][1]["value"])
        lines += [
            "", f"-ln p_0: below {BLEND[0]:g} nm the score is the posterior mode of the physical model, "
            f"above {BLEND[1]:g} nm a network of pair distances up to {SIGMA_TOP:g} nm, "
            f"{f['train_cpu']:.0f} CPU s of training, final loss "
            f"{f['losses'][-1][1]:.3f} (1: the best linear denoiser).", "",
            "Error budget, rms over frames [kT]: all of it; the steps (halving estimate, mean removed); the "
            "paths (standard error). What is left is the score's: below the blend that of the physical "
            f"action, {f['on_same']['rmse']:.2f} on these frames, above it the network's. With an exact "
            f"score both methods would agree; they differ by {np.mean(gap):+.2f} kT in the mean and "
            f"{np.std(gap):.2f} about it: the network's score is not that of one density that spreads as "
            "noise spreads it.", "",
            "| method | scores per frame | products | CPU s | all | steps | paths | worst frame |",
            "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        lines += [
            f"| {r['method']} | {r['n_score']} | {r['n_products']} | {r['cpu_seconds']:.0f} | "
            f"{r['rmse']:.2f} | "
            f"{r['steps_rms']:.2f} | {r['drawn_rms']:.2f} | {worst_frame(r['value'], f['truth']):+.1f} |"
            for r in f["rows"]
        ]
    lines += [
        "", "Free-energy surface of (phi, psi): held-out frames reweighted to the learned action, against "
        "the same frames as they are; root mean square difference over cells with 5 frames or more, "
        f"weighted by their share. Two amber14 runs of {N_TEST} frames: {part['two_runs']:.2f} kT.", "",
        "| action | effective frames | difference [kT] |", "|---|---|---|",
        *(f"| {r['model']} | {r['ess']:.0f} | {r['surface']:.2f} |" for r in part["rows"]),
        "", saved(picture_of_surfaces(part, found.get("flow")), "alanine"), "",
    ]  # fmt: skip
    return lines


def picture_of_surfaces(part: dict[str, Any], flow_part: dict[str, Any] | None) -> Any:
    figure, axes = new_figure(len(part["surfaces"]) + (flow_part is not None), width=3.3, height=3.2)
    for where, (name, share) in zip(axes, part["surfaces"].items(), strict=False):
        with np.errstate(divide="ignore"):
            energy = -np.log(np.array(share, dtype=float))
        energy = np.where(np.isfinite(energy), energy - energy[np.isfinite(energy)].min(), np.nan)
        shown = where.imshow(
            energy.T, origin="lower", extent=(-180, 180, -180, 180), vmin=0, vmax=6, cmap="viridis"
        )
        where.set(title=name, xlabel="phi [degrees]", ylabel="psi [degrees]")
    figure.colorbar(shown, ax=axes[len(part["surfaces"]) - 1], label="kT", shrink=0.8)
    if flow_part is not None:
        truth, last = np.array(flow_part["truth"]), axes[-1]
        for r, colour in zip(flow_part["rows"], COLOURS, strict=False):
            value = np.array(r["value"])
            last.plot(
                truth - truth.mean(), value - value.mean(), ".", color=colour, markersize=4, label=r["method"]
            )
        ends = [min(truth - truth.mean()), max(truth - truth.mean())]
        last.plot(ends, ends, color=GREY, linewidth=0.8)
        last.set(xlabel="amber14, U/kT", ylabel="-ln p_0", title="held-out frames")
        last.legend(fontsize=6, frameon=False)
    return figure


def table(found: dict[str, Any]) -> list[str]:
    lines = [
        "# Energies out of a diffusion model", "",
        "`python benchmarks/energy.py --out runs/energy` prints it; seeds from 5100; kT everywhere. "
        "Settings were fixed on other seeds and other frames.", "",
    ]  # fmt: skip
    if "exact" in found:
        lines += exact_section(found["exact"], found.get("cost"))
    if "learned" in found:
        lines += learned_section(found["learned"])
    if "well" in found:
        lines += well_section(found["well"])
    return lines + alanine_section(found)


if __name__ == "__main__":
    run_parts("energy", __doc__ or "", PARTS, table)
