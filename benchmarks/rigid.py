"""Rigid-body diffusion held to exact answers: IGSO3, reverse sampling, and -ln p0 by method and steps.

``python benchmarks/rigid.py [--out runs/rigid] [--only igso3,sampling,energies,learned]`` does the parts
that are missing in the output folder and writes benchmarks/results/rigid.md.

Exact answers: IGSO3 from its series with 40 digits; mixtures of poses (normal x IGSO3), which stay
mixtures under noise. Every number is over ``SEEDS`` random mixtures, with the standard error of the mean.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
from parts import run_parts, standard_error
from scipy.stats import kstest

from openmm_diffforce.docking import so3
from openmm_diffforce.docking.adapter import DFMDOCK_SCHEDULE
from openmm_diffforce.docking.mixture import PoseMixture
from openmm_diffforce.docking.poses import Poses
from openmm_diffforce.docking.rigid import PosePrior, RigidSchedule
from openmm_diffforce.docking.rigid_energy import PoseEnergyResult, pose_flow_energy, pose_path_energy
from openmm_diffforce.docking.rigid_sampler import sample_poses

SEEDS = (0, 1, 2, 3, 4)
SCHEDULES = {"power": RigidSchedule(), "DFMDock": DFMDOCK_SCHEDULE}
N_COMPONENTS = 4
N_POSES = 10
T_DECOYS = {"power": 0.4, "DFMDock": 0.6}
"""Noise at which decoys are scored: sigma 0.32 and 0.31 nm."""

SIGMAS = (0.001, 0.01, 0.1, 0.5, 1.0, 1.49, 1.51, 3.0)
SAMPLER_STEPS = (10, 20, 40, 80)
FLOW_STEPS = (10, 20, 40, 80)
PATH_STEPS = (4, 8, 16, 32)


def mixture(seed: int, schedule: RigidSchedule) -> PoseMixture:
    """A binding mode and three others, spread over a nanometre."""
    rng = np.random.default_rng(seed)
    centres = Poses(so3.random_rotations(N_COMPONENTS, rng), rng.normal(0.0, 1.0, (N_COMPONENTS, 3)))
    weights = rng.dirichlet(np.full(N_COMPONENTS, 3.0))
    spread = rng.uniform(0.08, 0.2, (2, N_COMPONENTS))
    return PoseMixture(centres, weights, *spread, schedule)


# ------------------------------------------------------------------------------------------ parts


def exact_igso3(omega: float, sigma: float) -> tuple[float, float]:
    """ln f and d ln f/d omega with 40 digits: by the series, or by images where the series is long."""
    mpmath.mp.dps = 40
    s = mpmath.mpf(sigma)

    def ln_f(w: Any) -> Any:
        if sigma >= 0.5:
            terms = (
                (2 * k + 1) * mpmath.exp(-k * (k + 1) * s**2 / 2) * mpmath.sin((k + mpmath.mpf(1) / 2) * w)
                for k in range(60)
            )
            return mpmath.log(mpmath.fsum(terms) / mpmath.sin(w / 2))
        images = ((-1) ** k * (w - 2 * mpmath.pi * k) for k in range(-3, 4))
        weights = (mpmath.exp(-((w - 2 * mpmath.pi * k) ** 2 - w**2) / (2 * s**2)) for k in range(-3, 4))
        total = mpmath.fsum(a * b for a, b in zip(images, weights, strict=True))
        front = mpmath.sqrt(2 * mpmath.pi) * mpmath.exp(s**2 / 8) / s**3
        return mpmath.log(front * total / mpmath.sin(w / 2)) - w**2 / (2 * s**2)

    return float(ln_f(mpmath.mpf(omega))), float(mpmath.diff(ln_f, mpmath.mpf(omega)))


def igso3(out: Path) -> dict[str, Any]:
    rows = []
    x, w = np.polynomial.legendre.leggauss(300)
    for sigma in SIGMAS:
        top = min(np.pi, 12 * sigma)
        omega, weight = 0.5 * top * (x + 1), 0.5 * top * w
        angles = np.array([1e-6, *(np.array([0.01, 0.1, 0.3, 0.6, 0.9]) * top)])
        exact = np.array([exact_igso3(float(a), sigma) for a in angles])
        score = so3.igso3_score(np.outer(angles, [0.0, 0.0, 1.0]), sigma)[:, 2]
        u = np.random.default_rng(0).random(2000)
        widths = np.full(2000, sigma)
        samples = [so3.sample_igso3(sigma, 4000, generator=np.random.default_rng(seed)) for seed in SEEDS]
        p = [
            kstest(np.linalg.norm(v, axis=1), partial(so3.igso3_angle_cdf, sigma=sigma)).pvalue
            for v in samples
        ]
        rows.append(
            {
                "sigma": sigma,
                "normalisation": abs(float(weight @ so3.igso3_angle_density(omega, sigma)) - 1),
                "ln_f": float(np.abs(so3.igso3_log_density(angles, sigma) - exact[:, 0]).max()),
                "score": float(np.abs(score / exact[:, 1] - 1).max()),
                "inversion": float(np.abs(so3.igso3_angle_cdf(so3._invert_cdf(u, widths), sigma) - u).max()),
                "ks": sorted(float(v) for v in p),
            }
        )
    return {"rows": rows}


def mean_square_angle(sigma: float) -> float:
    """E omega^2 of IGSO3: 3 sigma^2 less the curvature."""
    x, w = np.polynomial.legendre.leggauss(200)
    top = min(np.pi, 12 * sigma)
    omega = 0.5 * top * (x + 1)
    return float(0.5 * top * w @ (omega**2 * so3.igso3_angle_density(omega, sigma)))


def sampling(out: Path) -> dict[str, Any]:
    """2000 samples from the exact start: weights, and variances relative to the exact ones."""
    rows = []
    for name, schedule in SCHEDULES.items():
        for method in ("sde", "ode"):
            for n_steps in SAMPLER_STEPS:
                chi2, tr, rot = [], [], []
                for seed in SEEDS:
                    rng = np.random.default_rng(100 + seed)
                    model = mixture(seed, schedule)
                    start, _ = model.sample(2000, t=1.0, generator=rng)
                    found = sample_poses(
                        model, start, schedule=schedule, generator=rng, method=method, n_steps=n_steps
                    ).poses
                    which = model._components(found, 0.0)[0].argmax(axis=1)
                    counts = np.bincount(which, minlength=N_COMPONENTS)
                    expected = 2000 * model.weights
                    chi2.append(float(((counts - expected) ** 2 / expected).sum() / (N_COMPONENTS - 1)))
                    away = found.translation - model.centres.translation[which]
                    turn = so3.log(found.rotation @ model.centres.rotation[which].swapaxes(1, 2))
                    tr.append(float(((away / model.spread_tr[which, None]) ** 2).mean()))
                    square = np.array([mean_square_angle(b) for b in model.spread_rot])
                    rot.append(float(((turn**2).sum(axis=1) / square[which]).mean()))
                row = {"schedule": name, "method": method, "n_steps": n_steps}
                for key, values in (("chi2", chi2), ("var_tr", tr), ("var_rot", rot)):
                    row |= {key: float(np.mean(values)), f"{key}_se": standard_error(values)}
                rows.append(row)
    return {"rows": rows}


Method = Callable[..., PoseEnergyResult]


def methods() -> list[tuple[str, int, Method]]:
    out: list[tuple[str, int, Method]] = []
    for n in FLOW_STEPS:
        out.append(("flow, RK4", n, partial(pose_flow_energy, n_steps=n)))
    for path in ("noising", "standing"):
        for n in PATH_STEPS:
            out.append((f"{path} path", n, partial(pose_path_energy, path=path, n_steps=n)))
    return out


def run_method(method: Method, model: Any, poses: Poses, seed: int, **given: Any) -> PoseEnergyResult:
    if method.keywords.get("path") == "noising":  # type: ignore[attr-defined]
        given |= {"generator": np.random.default_rng(300 + seed), "n_paths": 2}
    return method(model, poses, **given)


def energies(out: Path) -> dict[str, Any]:
    """Samples at t = 0, and decoys at random (normal, 1.5 nm; any orientation) at a noise level."""
    rows = []
    for name, schedule in SCHEDULES.items():
        for kind in ("samples", "decoys"):
            t_min = T_DECOYS[name] if kind == "decoys" else 0.0
            for label, n_steps, method in methods():
                rms, worst, stated, covered, cost, seconds = [], [], [], [], 0.0, 0.0
                for seed in SEEDS:
                    rng = np.random.default_rng(200 + seed)
                    model = mixture(seed, schedule)
                    poses = (
                        PosePrior(np.zeros(3), 1.5**2 * np.eye(3)).sample(N_POSES, generator=rng)
                        if kind == "decoys"
                        else model.sample(N_POSES, generator=rng)[0]
                    )
                    exact = model.log_density(poses, t_min)
                    begin = time.perf_counter()
                    try:
                        found = run_method(
                            method, model, poses, seed, schedule=schedule, t_min=t_min,
                            prior=partial(model.log_density, t=1.0),
                        )  # fmt: skip
                    except Exception as err:  # a row of its own: turned by more than pi in a step
                        rows.append(
                            {"schedule": name, "poses": kind, "method": label, "n_steps": n_steps,
                             "refused": type(err).__name__}
                        )  # fmt: skip
                        break
                    seconds += time.perf_counter() - begin
                    error = np.abs(found.ln_p0 - exact)
                    rms.append(float(np.sqrt((error**2).mean())))
                    worst.append(float(error.max()))
                    stated.append(float(np.median(found.discretisation_error)))
                    covered.append(
                        float((error <= found.discretisation_error + 2 * found.standard_error + 1e-4).mean())
                    )
                    cost = found.n_evaluations / N_POSES
                else:
                    row = {"schedule": name, "poses": kind, "method": label, "n_steps": n_steps}
                    for key, values in (("rms", rms), ("worst", worst), ("covered", covered)):
                        row |= {key: float(np.mean(values)), f"{key}_se": standard_error(values)}
                    rows.append(
                        row
                        | {"stated": float(np.mean(stated)), "cost": cost, "seconds": seconds / len(SEEDS)}
                    )
    return {"rows": rows}


def rough(model: PoseMixture, size: float, seed: int) -> Callable[..., Any]:
    """Scores with an error that is the gradient of nothing: smooth random fields, relative ``size``."""
    rng = np.random.default_rng(400 + seed)
    frequency, phase = rng.normal(0.0, 1.0, (6, 12)), rng.uniform(0, 2 * np.pi, 6)

    def scores(poses: Poses, t: np.ndarray) -> Any:
        tr, rot, _ = model(poses, t)
        at = np.concatenate([poses.translation, poses.rotation.reshape(-1, 9)], axis=1)
        field = size * np.sin(at @ frequency.T + phase)
        scale_tr = 1 / np.sqrt(0.14**2 + model.schedule.sigma_tr(t) ** 2)[:, None]
        scale_rot = 1 / np.sqrt(0.14**2 + model.schedule.sigma_rot(t) ** 2)[:, None]
        return tr + scale_tr * field[:, :3], rot + scale_rot * field[:, 3:], None

    return scores


def learned(out: Path) -> dict[str, Any]:
    """Energies from scores with errors: how wrong each method is, and whether the spread says so."""
    rows = []
    schedule = SCHEDULES["power"]
    for size in (0.05, 0.2):
        for label, method in (
            ("flow, RK4", partial(pose_flow_energy, n_steps=40)),
            ("noising path", partial(pose_path_energy, path="noising", n_steps=16, n_paths=4)),
            ("standing path", partial(pose_path_energy, path="standing", n_steps=32)),
        ):
            rms, rank, spread = [], [], []
            for seed in SEEDS:
                rng = np.random.default_rng(200 + seed)
                model = mixture(seed, schedule)
                poses, _ = model.sample(2 * N_POSES, generator=rng)
                given = {"generator": np.random.default_rng(300 + seed)} if "noising" in label else {}
                found = method(
                    rough(model, size, seed), poses, schedule=schedule,
                    prior=partial(model.log_density, t=1.0), **given,
                )  # fmt: skip
                exact = model.log_density(poses)
                error = found.ln_p0 - exact
                rms.append(float(np.sqrt(((error - error.mean()) ** 2).mean())))
                rank.append(float(np.corrcoef(found.ln_p0, exact)[0, 1]))
                spread.append(float(np.sqrt((found.standard_error**2).mean())))
            row: dict[str, Any] = {"size": size, "method": label}
            for key, values in (("rms", rms), ("correlation", rank), ("spread", spread)):
                row |= {key: float(np.mean(values)), f"{key}_se": standard_error(values)}
            rows.append(row)
    return {"rows": rows}


# ------------------------------------------------------------------------------------------ table


def pm(row: dict[str, Any], key: str, digits: int = 3) -> str:
    return f"{row[key]:.{digits}g} ± {row[key + '_se']:.1g}"


def table(found: dict[str, Any]) -> list[str]:
    lines = [
        "# Rigid-body diffusion",
        "",
        f"Made by `python benchmarks/rigid.py`. Five random mixtures of {N_COMPONENTS} poses "
        "(spreads 0.08 to 0.2 nm and rad), fixed seeds; mean ± standard error over the mixtures. "
        "Schedules: `power` is the default (2 nm, 1.5 rad), `DFMDock` that of the published model "
        "(3 nm, 1.5 rad).",
    ]
    if "igso3" in found:
        lines += [
            "",
            "## IGSO3",
            "",
            "Largest absolute error of ln f and relative error of the score, against 40 digits, "
            "from 1e-6 rad to 0.9 of the range; error of the normalisation (quadrature) and of the "
            "inverted CDF; Kolmogorov-Smirnov p of 4000 angles, five seeds, sorted "
            "(the same uniform numbers for every sigma).",
            "",
            "| sigma [rad] | ln f | score | normalisation | inversion | p |",
            "|---|---|---|---|---|---|",
        ]
        for r in found["igso3"]["rows"]:
            ks = ", ".join(f"{p:.2f}" for p in r["ks"])
            lines.append(
                f"| {r['sigma']} | {r['ln_f']:.1e} | {r['score']:.1e} | {r['normalisation']:.1e} | "
                f"{r['inversion']:.1e} | {ks} |"
            )
    if "sampling" in found:
        lines += [
            "",
            "## Reverse sampling",
            "",
            "2000 samples from the exact noised start; a step is two evaluations of the scores. chi2 per "
            "degree of freedom of the weights, and variances of translation and rotation relative to the "
            "exact ones: all should be 1, the variances within a statistical 0.008.",
            "",
            "| schedule | method | steps | chi2 | variance, translation | variance, rotation |",
            "|---|---|---|---|---|---|",
        ]
        for r in found["sampling"]["rows"]:
            lines.append(
                f"| {r['schedule']} | {r['method']} | {r['n_steps']} | {pm(r, 'chi2', 2)} | "
                f"{pm(r, 'var_tr', 4)} | {pm(r, 'var_rot', 4)} |"
            )
    if "energies" in found:
        lines += [
            "",
            "## -ln p0 by method and steps, exact scores",
            "",
            f"{N_POSES} poses a mixture; exact scores and the exact end, so that every error is that "
            "of the method. `samples` of the mixture, at t = 0; `decoys` at random over 1.5 nm and "
            "all orientations, at sigma 0.3 nm. Errors in kT: root mean square and largest. "
            "`covered`: share of poses whose error is within the stated one (discretisation plus "
            "two standard errors). Evaluations of the scores a pose (13 for a divergence by "
            "differences; two paths for `noising`).",
            "",
            "| schedule | poses | method | steps | rms [kT] | largest [kT] | covered | evaluations |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for r in found["energies"]["rows"]:
            head = f"| {r['schedule']} | {r['poses']} | {r['method']} | {r['n_steps']} | "
            if "refused" in r:
                lines.append(head + "refused: a rotation by more than pi in one step | | | |")
            else:
                lines.append(
                    head + f"{pm(r, 'rms', 2)} | {pm(r, 'worst', 2)} | {pm(r, 'covered', 2)} | "
                    f"{r['cost']:.0f} |"
                )
    if "learned" in found:
        lines += [
            "",
            "## -ln p0 from scores with errors",
            "",
            f"{2 * N_POSES} samples a mixture, schedule `power`. Smooth random fields that are the "
            "gradient of nothing are added to the scores, `size` in units of 1/width of the noised "
            "components. Error of -ln p0 after its mean is removed, correlation with the exact one, "
            "and the stated standard error (spread over four paths; a flow has none). An error "
            "that all paths share does not show in the spread.",
            "",
            "| size | method | rms error [kT] | correlation | stated error [kT] |",
            "|---|---|---|---|---|",
        ]
        for r in found["learned"]["rows"]:
            stated = pm(r, "spread", 2) if r["spread"] else "-"
            lines.append(
                f"| {r['size']} | {r['method']} | {pm(r, 'rms', 2)} | {pm(r, 'correlation')} | {stated} |"
            )
    return lines


PARTS = {"igso3": igso3, "sampling": sampling, "energies": energies, "learned": learned}

if __name__ == "__main__":
    run_parts("rigid", __doc__ or "", PARTS, table)
