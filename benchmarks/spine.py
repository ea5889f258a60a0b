"""The numbers of the spine: learned operator, base action, noised fields, derivatives, step cost.

    python benchmarks/spine.py --out runs/spine [--only windows,base,fields,derivatives,steps]

Every part writes ``<out>/<part>.json`` and is skipped if that exists; the table goes to
``benchmarks/results/spine.md``. References are computed in the same run. Settings and thresholds
stand here and in ``openmm_diffforce.demo``; nothing is tuned on the results.
"""

import json
import time
from pathlib import Path

import numpy as np
import openmm
from parts import (
    N_BOOTSTRAP,
    field_errors,
    field_rows,
    model_noised_fields,
    posterior_reference,
    reference_noise,
    run_parts,
)

from openmm_diffforce import analysis, demo
from openmm_diffforce.alanine import TEMPERATURE, alanine_case
from openmm_diffforce.artefact import load_artefact
from openmm_diffforce.config import DemoSettings
from openmm_diffforce.force import DiffusionForce, available_backends
from openmm_diffforce.models.physics import base_tables, outside_fraction
from openmm_diffforce.posterior import posterior_mode
from openmm_diffforce.systems import clone_system, forces, make_context, sample, start_context
from openmm_diffforce.testing import assert_forces_match_energy, assert_parameter_derivative

SEED = 20
SETTINGS = DemoSettings(
    seed=SEED,
    n_frames=3000,
    n_test=3000,
    interval=500,
    window_frames=2400,
    n_workers=2,
    window_interval=500,
    base_frames=400,
    base_interval=500,
)
SIGMAS = (0.005, 0.01, 0.02)
N_Y = 30
N_POSTERIOR = 2500
BASE_FRAMES, BASE_INTERVAL = 10000, 100


def windows(out: Path) -> dict:
    """Items 1 and 2: the demonstration with longer windows."""
    record = json.loads(demo.run_demo(out / "demo", settings=SETTINGS).read_text())
    return {k: record[k] for k in ("paired", "end_correction", "fit", "windows", "checks", "timing")}


def base(out: Path) -> dict:
    """Item 5: 1 ns on the learned base action alone beside two runs of amber14."""
    case = alanine_case("F1", restrain_phi=True)
    artefact = load_artefact(out / "demo" / demo.ARTEFACT_FILE)
    learned = demo.learned_base_system(case, artefact.path)
    x, angles = {}, {}
    for k, (name, system) in enumerate(
        (("learned", learned), ("amber14 a", case.system_0), ("amber14 b", case.system_0))
    ):
        x[name] = sample(
            system,
            case.topology,
            case.positions,
            temperature=TEMPERATURE,
            n_frames=BASE_FRAMES,
            interval=BASE_INTERVAL,
            n_equil=20000,
            seed=SEED + 10 * (k + 1),
        )
        angles[name] = analysis.phi_psi(analysis.trajectory_of(x[name], case.topology))
        print(f"  {name}: sampled", flush=True)
    hot = {
        name: analysis.configurational_temperature(
            x[name][:: BASE_FRAMES // 300], lambda f, s=system: forces(s, f)
        )
        for name, system in (("learned", learned), ("amber14 a", case.system_0))
    }
    drift = {
        name: demo.nve_drift(
            system, x["amber14 a"][:: BASE_FRAMES // 8], timestep=0.0005, n_steps=40000, seed=SEED
        )
        for name, system in (("learned", learned), ("amber14", case.system_0))
    }
    outside, per_role = outside_fraction(x["learned"], base_tables(artefact.model, artefact.graph))
    amber_outside, _ = outside_fraction(x["amber14 a"], base_tables(artefact.model, artefact.graph))
    halves = {
        name: analysis.jensen_shannon(a[: BASE_FRAMES // 2], a[BASE_FRAMES // 2 :])
        for name, a in angles.items()
    }
    figure = analysis.phi_psi_figure(angles, bins=24)
    (out / "phi_psi.png").write_bytes(analysis.figure_bytes(figure, file_format="png"))
    return {
        "jsd_learned_a": analysis.jensen_shannon(angles["learned"], angles["amber14 a"]),
        "jsd_learned_b": analysis.jensen_shannon(angles["learned"], angles["amber14 b"]),
        "jsd_a_b": analysis.jensen_shannon(angles["amber14 a"], angles["amber14 b"]),
        "jsd_halves": halves,
        "configurational_temperature": {k: [v.temperature, v.error] for k, v in hot.items()},
        "nve_drift": drift,
        "wall_fraction": outside,
        "wall_fraction_by_role": per_role,
        "wall_fraction_amber14": amber_outside,
    }


def fields(out: Path) -> dict:
    """Item 3: noised score, operator and operator gradient against posterior MD."""
    case = alanine_case("F1", restrain_phi=True)
    artefact = load_artefact(out / "demo" / demo.ARTEFACT_FILE)
    generator = np.random.default_rng(SEED)
    rows = []
    for sigma in SIGMAS:
        t = artefact.schedule.t_of_sigma(sigma)
        for end in (0, 1):
            with np.load(out / "demo" / f"end_{end}.npz") as kept:
                held_out = kept["x"][SETTINGS.n_frames :]
            y, truth = posterior_reference(
                case, end, held_out, sigma, generator, n_y=N_Y, n_samples=N_POSTERIOR, seed=SEED + end
            )
            mode = posterior_mode(artefact.model, y, sigma, lam=float(end))
            draws = generator.integers(0, N_Y, (N_BOOTSTRAP, N_Y))
            for method, got in (
                ("posterior mode", (mode.score, mode.operator, mode.operator_gradient)),
                ("tables at y", model_noised_fields(artefact.model, y, t, end)),
            ):
                row = {"sigma_nm": sigma, "end": end, "method": method}
                row |= {"reference_noise": reference_noise(truth), **field_errors([got], truth, draws)}
                rows.append(row)
                print(f"  {row}", flush=True)
    return {"rows": rows}


def _system(case, path, mode: str, backend: str) -> tuple[openmm.System, DiffusionForce]:
    if mode == "operator":
        system = clone_system(case.system_0)
    else:
        system = openmm.System()
        for atom in range(case.system_0.getNumParticles()):
            system.addParticle(case.system_0.getParticleMass(atom))
    force = DiffusionForce(path, topology=case.topology, mode=mode, backend=backend)
    system.addForce(force)
    return system, force


def _backends() -> list[str]:
    return [name for name, state in available_backends().items() if state == "ok"]


def derivatives(out: Path) -> dict:
    """Item 6: forces and dE/dlambda against finite differences, for every mode and backend."""
    case = alanine_case("F1", restrain_phi=True)
    path = out / "demo" / demo.ARTEFACT_FILE
    with np.load(out / "demo" / "end_0.npz") as kept:
        x = kept["x"][SETTINGS.n_frames]
    rotation = np.linalg.qr(np.random.default_rng(SEED).standard_normal((3, 3)))[0]
    rotation *= np.sign(np.linalg.det(rotation))
    rows = []
    for backend in _backends():
        for mode in ("add", "operator"):
            system, force = _system(case, path, mode, backend)
            context = make_context(
                system, temperature=TEMPERATURE, timestep=0.001, friction=1.0, platform="Reference", seed=SEED
            )
            for noise in (0.0, 0.4):
                context.setPositions(x)
                context.setParameter(force.parameter("lambda"), 0.3)
                context.setParameter(force.parameter("noise"), noise)
                energy = []
                for moved in (x, x + 0.37, (x - x.mean(axis=0)) @ rotation):
                    context.setPositions(moved)
                    energy.append(
                        context.getState(energy=True, groups={force.getForceGroup()})
                        .getPotentialEnergy()
                        ._value
                    )
                context.setPositions(x)
                rows.append(
                    {
                        "backend": backend,
                        "mode": mode,
                        "noise": noise,
                        "forces": assert_forces_match_energy(context),
                        "dE/dlambda": assert_parameter_derivative(
                            context, force.parameter("lambda"), force.energy_derivative(context)
                        ),
                        "invariance_kJ_mol": float(np.ptp(energy)),
                    }
                )
    return {"rows": rows}


def steps(out: Path) -> dict:
    """Item 7, second half: microseconds per MD step, the variants in turn, medians of 7 rounds."""
    case = alanine_case("F1", restrain_phi=True)
    path = out / "demo" / demo.ARTEFACT_FILE
    contexts = {"amber14 alone": case.system_0}
    for backend in _backends():
        contexts[f"amber14 + learned operator, {backend}"] = _system(case, path, "operator", backend)[0]
        contexts[f"learned base action alone, {backend}"] = _system(case, path, "add", backend)[0]
    ready = {}
    for name, system in contexts.items():
        ready[name] = make_context(
            system, temperature=TEMPERATURE, timestep=0.001, friction=1.0, platform="Reference", seed=SEED
        )
        start_context(ready[name], case.positions, seed=SEED, temperature=TEMPERATURE, minimize=True)
        ready[name].getIntegrator().step(300)
    found: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(7):
        for name, context in ready.items():
            started = time.perf_counter()
            context.getIntegrator().step(1000)
            found[name].append((time.perf_counter() - started) * 1e3)
    plain = np.array(found["amber14 alone"])
    return {
        name: {"us_per_step": float(np.median(t)), "ratio": float(np.median(np.array(t) / plain))}
        for name, t in found.items()
    }


PARTS = {f.__name__: f for f in (windows, base, fields, derivatives, steps)}


def table(found: dict[str, dict]) -> list[str]:
    """What is in hand, as lines of markdown."""
    lines = [
        "# The spine, measured",
        "",
        "Alanine dipeptide F1, amber14, vacuum, 300 K, phi within "
        f"120 degrees of -120; seed {SEED}. `python benchmarks/spine.py --out runs/spine` prints it.",
        "",
    ]
    if "windows" in found:
        w = found["windows"]
        mbar = {k: w["windows"][k]["estimate"] for k in ("learned", "classical")}
        quality = w["fit"]["levels"][0]
        lines += ["## Operator and base action", "", "| quantity | value | target |", "|---|---|---|"]
        d = w["paired"]["difference"]
        lines.append(
            f"| paired Delta f, learned - classical [kT] | {d['value']:+.4f} +- {d['error']:.4f} | 0.05 |"
        )
        for name, estimate in mbar.items():
            m = estimate["estimates"]["MBAR"]["kT"]
            lines.append(
                f"| MBAR, 11 windows of {w['windows'][name]['length_ps']:.0f} ps, {name} [kT] | "
                f"{m['value']:.3f} +- {m['error']:.3f} | SE <= 0.1 |"
            )
        for check in w["checks"]:
            if isinstance(check["value"], float):
                lines.append(
                    f"| {check['name']} | {check['value']:.4f} | {check['threshold']} ({check['status']}) |"
                )
        lines.append(
            f"| operator R^2 / gradient R^2, held out | {quality['operator_r2']:.5f} / "
            f"{quality['operator_gradient_r2']:.4f} | - |"
        )
        lines.append(
            f"| CPU seconds of the fit (base action and operator) | {w['fit']['cpu_seconds']:.0f} | 60 |"
        )
    if "base" in found:
        b = found["base"]
        excess = 0.5 * (b["jsd_learned_a"] + b["jsd_learned_b"]) - b["jsd_a_b"]
        lines += [
            "",
            "## 1 ns on the learned base action alone",
            "",
            "| quantity | value | target |",
            "|---|---|---|",
        ]
        lines.append(f"| JSD to amber14 a, b [nats] | {b['jsd_learned_a']:.4f}, {b['jsd_learned_b']:.4f} | |")
        lines.append(f"| JSD of two amber14 runs [nats] | {b['jsd_a_b']:.4f} | |")
        lines.append(f"| excess [nats] | {excess:+.4f} | <= 0.02 |")
        for name, (t, e) in b["configurational_temperature"].items():
            lines.append(
                f"| configurational temperature, {name} [K] | {t:.1f} +- {e:.1f} | 300 within 3 SE |"
            )
        for name, (slope, e) in b["nve_drift"].items():
            lines.append(
                f"| NVE drift, {name}, 8 starts of 20 ps [kJ/mol/ns] | {slope:.2f} +- {e:.2f} | "
                "no worse than amber14 |"
            )
        lines.append(
            f"| steps outside the training range (amber14's own frames) | {b['wall_fraction']:.4f} "
            f"({b['wall_fraction_amber14']:.4f}) | - |"
        )
    if "fields" in found:
        lines += [
            "",
            f"## Noised fields against posterior MD ({N_Y} held-out frames per row; R^2, target 0.9)",
            "",
            "Posterior mode: of the learned clean action, per frame (`posterior_mode`). Tables at y: the",
            "artefact's noised action, what `DiffusionForce` evaluates at noise > 0; a sum of functions of",
            "noised distances cannot undo the noise along stiff bonds.",
            "",
            *field_rows(found["fields"]["rows"], "method"),
        ]
    if "derivatives" in found:
        lines += [
            "",
            "## Derivatives against finite differences (relative), invariance",
            "",
            "| backend | mode | noise | forces | dE/dlambda | spread when moved, rotated [kJ/mol] |",
            "|---|---|---|---|---|---|",
        ]
        for r in found["derivatives"]["rows"]:
            lines.append(
                f"| {r['backend']} | {r['mode']} | {r['noise']} | {r['forces']:.1e} | "
                f"{r['dE/dlambda']:.1e} | {r['invariance_kJ_mol']:.1e} |"
            )
    if "steps" in found:
        lines += [
            "",
            "## Cost of an MD step (Reference platform, one core)",
            "",
            "| | us | ratio |",
            "|---|---|---|",
        ]
        for name, r in found["steps"].items():
            lines.append(f"| {name} | {r['us_per_step']:.0f} | {r['ratio']:.2f} |")
    return lines


if __name__ == "__main__":
    run_parts("spine", __doc__, PARTS, table)
