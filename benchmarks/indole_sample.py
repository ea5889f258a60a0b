"""Windows of the indole benchmark, from serialized Systems: needs OpenMM and numpy alone.

``python indole_sample.py BUNDLE OUT --workers 16 --seconds 500`` runs what is missing in OUT. BUNDLE is
what ``indole.py`` writes: ``cases.json``, and for each case ``<case>.xml`` (the System with its context
parameter) and ``<case>.npy`` (positions [nm]). A window is ``OUT/<case>_s<seed>_<k>.npz`` with

=============  =====================  ==================================================================
key            shape                  content
=============  =====================  ==================================================================
``operator``   (n_frames,)            O = beta (U_X - U_H) [kT]
``u_0``        (n_frames,)            beta U_H [kT], up to a constant of the case
``lam``        ()                     lambda of the window
``time_ps``    (n_frames,)            [ps], from the end of equilibration
``x``          (n_frames, n_atoms, 3) float32 [nm], particles ``moving`` of cases.json; ends only
=============  =====================  ==================================================================

When the time is over, windows that run are kept as they are: shorter, but no less right.
"""

import argparse
import json
import multiprocessing
import os
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import openmm as mm
from openmm import unit

MIN_FRAMES = 20
"""A window that is cut short below this is dropped."""


def window_path(out: Path, case: str, seed: int, k: int) -> Path:
    """Where window ``k`` of a case is kept."""
    return out / f"{case}_s{seed}_{k:02d}.npz"


def n_frames_of(settings: dict[str, Any], k: int) -> int:
    """Frames of window ``k``: end states have their own number."""
    return int(settings["n_frames_end" if k in (0, len(settings["lams"]) - 1) else "n_frames"])


def jobs(cases: dict[str, Any], seeds: int, out: Path) -> list[tuple[str, int, int]]:
    """(case, seed, k) that are missing: seed by seed, the longest windows of a case first."""
    found = []
    for rank, (case, settings) in enumerate(cases.items()):
        for seed in range(1, seeds + 1):
            for k in range(len(settings["lams"])):
                if not window_path(out, case, seed, k).exists():
                    key = seed + settings["delay"], rank, -n_frames_of(settings, k), k
                    found.append((key, (case, seed, k)))
    return [job for _, job in sorted(found)]


def save(path: Path, arrays: dict[str, Any]) -> None:
    """Write an npz file: whole, or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(part, "wb") as handle:
        np.savez(handle, **arrays)
    os.replace(part, path)


def run_window(
    bundle: Path, out: Path, case: str, seed: int, k: int, settings: dict[str, Any], deadline: float
) -> str:
    """Minimise, equilibrate and sample one window; says in a line what came out."""
    if time.time() >= deadline:
        return f"{case} seed {seed} window {k}: not begun"
    started = time.time()
    system = mm.XmlSerializer.deserialize((bundle / f"{case}.xml").read_text())
    parameter, lam = settings["parameter"], float(settings["lams"][k])
    random = int(np.random.SeedSequence([seed, k, *case.encode()]).generate_state(1)[0] % (2**31 - 1)) + 1
    temperature = settings["temperature"]
    integrator = mm.LangevinMiddleIntegrator(
        temperature, settings["friction_per_ps"], settings["timestep_ps"]
    )
    integrator.setRandomNumberSeed(random)
    platform = mm.Platform.getPlatformByName("CPU")
    context = mm.Context(system, integrator, platform, {"Threads": "1"})
    context.setPositions(np.load(bundle / f"{case}.npy"))
    context.setParameter(parameter, lam)
    context.computeVirtualSites()
    mm.LocalEnergyMinimizer.minimize(context, 10.0, 500)
    context.setVelocitiesToTemperature(temperature, random)
    integrator.step(settings["n_equil"])

    beta = 1.0 / (unit.MOLAR_GAS_CONSTANT_R * temperature * unit.kelvin).value_in_unit(
        unit.kilojoule_per_mole
    )
    last = len(settings["lams"]) - 1
    moving = settings["moving"]
    u: list[list[float]] = []
    x: list[np.ndarray] = []
    for _ in range(n_frames_of(settings, k)):
        if time.time() >= deadline:
            break
        integrator.step(settings["interval"])
        ends = []
        for value in (0.0, 1.0):
            context.setParameter(parameter, value)
            ends.append(context.getState(energy=True).getPotentialEnergy()._value)
        context.setParameter(parameter, lam)
        if not np.isfinite(ends).all():
            return f"{case} seed {seed} window {k}: energies {ends} kJ/mol; nothing kept"
        u.append(ends)
        if k in (0, last):
            x.append(context.getState(positions=True).getPositions(asNumpy=True)._value[moving])
    if len(u) < MIN_FRAMES:
        return f"{case} seed {seed} window {k}: {len(u)} frames, too few to keep"
    u_0, u_1 = beta * np.array(u).T
    step_ps = settings["interval"] * settings["timestep_ps"]
    arrays = {"operator": u_1 - u_0, "u_0": u_0, "lam": lam, "time_ps": step_ps * np.arange(1, len(u) + 1)}
    if x:
        arrays["x"] = np.array(x, dtype=np.float32)
    save(window_path(out, case, seed, k), arrays)
    return (
        f"{case} seed {seed} window {k}: {len(u)} frames, <O> {np.mean(u_1 - u_0):.2f} kT, "
        f"{time.time() - started:.0f} s"
    )


def sample(
    bundle: Path, out: Path, *, workers: int = 1, seconds: float = float("inf"), seeds: int = 3
) -> None:
    """Run the windows that are missing in ``out``, in ``workers`` processes.

    Parameters
    ----------
    bundle, out : Path
    workers : int
    seconds : float
        After so many seconds nothing is begun, and what runs is kept as it is.
    seeds : int
    """
    deadline = time.time() + seconds
    out.mkdir(parents=True, exist_ok=True)
    cases = json.loads((bundle / "cases.json").read_text())
    todo = jobs(cases, seeds, out)
    print(f"{len(todo)} windows to run", flush=True)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = [
            pool.submit(run_window, bundle, out, case, seed, k, cases[case], deadline)
            for case, seed, k in todo
        ]
        for done in as_completed(running):
            try:
                line = done.result()
            except mm.OpenMMException as err:  # one unstable window leaves the others alone
                line = f"a window failed: {err}"
            if "not begun" not in line:
                print(
                    f"{seconds - (deadline - time.time()):6.0f} s  {line}" if seconds < 1e9 else line,
                    flush=True,
                )


def pack(out: Path, folder: Path) -> None:
    """One zip file per case of the windows in ``out``."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = sorted({path.name.rsplit("_s", 1)[0] for path in out.glob("*_s*_*.npz")})
    for case in cases:
        with zipfile.ZipFile(folder / f"{case}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(out.glob(f"{case}_s*_*.npz")):
                archive.write(path, path.name)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after these")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pack", type=Path, help="folder for one zip file per case at the end")
    options = parser.parse_args()
    sample(options.bundle, options.out, workers=options.workers, seconds=options.seconds, seeds=options.seeds)
    if options.pack:
        pack(options.out, options.pack)


if __name__ == "__main__":
    main()
