"""Equilibrium frames of a molecule one of whose methyl groups is perturbed.

The methyl group turns once in 100 to 500 ps, too seldom for a short run: between segments of dynamics
it is redrawn from its three images by their Boltzmann weights (Gibbs sampling, exact).
"""

from collections.abc import Sequence

import numpy as np

from openmm_diffforce.alanine import TEMPERATURE, AlanineCase
from openmm_diffforce.alchemy import LAMBDA
from openmm_diffforce.systems import sample


def methyl_images(x: np.ndarray, hydrogens: Sequence[int]) -> np.ndarray:
    """Frame x and its two copies in which the hydrogens change places in a circle: [3, n_atoms, 3]."""
    out = np.repeat(x[None], 3, axis=0)
    for k in (1, 2):
        out[k, list(hydrogens)] = x[np.roll(hydrogens, k)]
    return out


def hydrogens_of(
    case: AlanineCase, residue: str = "ALA", names: Sequence[str] = ("HB1", "HB2", "HB3")
) -> list[int]:
    found = [(a.residue.name, a.name) for a in case.topology.atoms()]
    return [found.index((residue, name)) for name in names]


def sampled(
    case: AlanineCase,
    lam: float,
    n_frames: int,
    seed: int | Sequence[int],
    *,
    hydrogens: Sequence[int],
    interval: int,
    segment: int,
) -> np.ndarray:
    """Frames of the state lam, ``interval`` steps of 1 fs apart, the methyl redrawn every ``segment``."""
    if lam in (0, 1):
        system = (case.system_0, case.system_1)[int(lam)]
    else:
        system = case.pair.linear_system()
        for force in system.getForces():
            for i in range(force.getNumGlobalParameters() if hasattr(force, "getNumGlobalParameters") else 0):
                if force.getGlobalParameterName(i) == LAMBDA:
                    force.setGlobalParameterDefaultValue(i, float(lam))
    generator = np.random.default_rng(seed)
    x, found = case.positions, []
    for k in range(-(-n_frames // segment)):
        found.append(
            sample(
                system, case.topology, x, temperature=TEMPERATURE, n_frames=segment, interval=interval,
                n_equil=20000 if k == 0 else 0, minimize=k == 0, seed=int(generator.integers(2**31)),
                platform="Reference",
            )
        )  # fmt: skip
        images = methyl_images(found[-1][-1], hydrogens)
        u = case.pair.reduced_potentials(images) @ np.array([1.0 - lam, lam])
        weight = np.exp(u.min() - u)
        x = images[generator.choice(3, p=weight / weight.sum())]
    return np.concatenate(found)[:n_frames]
