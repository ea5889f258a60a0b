"""Labels only: what a classifier of frames says about Delta f, beside the operator that it never saw.

``python benchmarks/labels.py --out runs/labels`` runs what is missing and writes results/labels.md.
The toy has exact answers. Alanine's reference is the operator itself on the same frames, and BAR
over the frames of all runs. The classifier sees coordinates and labels; energies only judge it.
"""

from pathlib import Path

import numpy as np

from openmm_diffforce.alanine import TEMPERATURE, AlanineCase
from openmm_diffforce.systems import sample

SEED = 1300
N_RUNS = 5
N_FRAMES = {"F1": 3000, "Br3": 1500}
"""Frames per end state, 1 ps apart."""
INTERVAL = 1000
SEGMENT = 10
"""Frames between two moves of the methyl group."""


def methyl_images(case: AlanineCase, x: np.ndarray) -> np.ndarray:
    """Frame x and its two copies in which HB1, HB2, HB3 change places in a circle: [3, n_atoms, 3]."""
    names = [(a.residue.name, a.name) for a in case.topology.atoms()]
    hydrogens = [names.index(("ALA", f"HB{k}")) for k in (1, 2, 3)]
    out = np.repeat(x[None], 3, axis=0)
    for k in (1, 2):
        out[k, hydrogens] = x[np.roll(hydrogens, k)]
    return out


def sampled(case: AlanineCase, end: int, n_frames: int, seed: int) -> np.ndarray:
    """Equilibrium frames of one end.

    The methyl group turns once in 100 to 500 ps, too seldom for a short run: between segments of
    dynamics it is redrawn from its three images by their Boltzmann weights (Gibbs sampling, exact).
    """
    system = (case.system_0, case.system_1)[end]
    generator = np.random.default_rng([seed, end])
    x, found = case.positions, []
    for k in range(n_frames // SEGMENT):
        found.append(
            sample(
                system, case.topology, x, temperature=TEMPERATURE, n_frames=SEGMENT, interval=INTERVAL,
                n_equil=20000 if k == 0 else 0, minimize=k == 0, seed=int(generator.integers(2**31)),
                platform="Reference",
            )
        )  # fmt: skip
        images = methyl_images(case, found[-1][-1])
        u = case.pair.reduced_potentials(images)[:, end]
        weight = np.exp(u.min() - u)
        x = images[generator.choice(3, p=weight / weight.sum())]
    return np.concatenate(found)


def end_frames(case: AlanineCase, seed: int, out: Path) -> list[np.ndarray]:
    """Frames of both ends, kept in ``out`` so that a stopped benchmark goes on where it was."""
    path = out / f"{case.name}_{seed}.npz"
    if not path.exists():
        ends = [sampled(case, end, N_FRAMES[case.name], seed) for end in (0, 1)]
        np.savez(path, x_0=ends[0], x_1=ends[1])
    with np.load(path) as kept:
        return [kept["x_0"], kept["x_1"]]
