"""Alanine dipeptide in water, made once per test run: a cluster, a box, a triclinic box."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import openmm as mm
from openmm import app, unit

from openmm_diffforce.alanine import alanine_dipeptide

N_SOLUTE = 22

BOXES = {
    "cubic": np.diag([1.9, 1.9, 1.9]),
    "triclinic": np.array([[2.0, 0.0, 0.0], [0.4, 1.9, 0.0], [-0.5, 0.3, 1.9]]),
}


@dataclass(frozen=True)
class Solvated:
    topology: app.Topology
    positions: np.ndarray
    system: mm.System


@cache
def force_field() -> app.ForceField:
    return app.ForceField("amber14/protein.ff14SB.xml", "amber14/tip3p.xml")


@cache
def _solvated(shape: str) -> tuple[app.Topology, np.ndarray]:
    topology, x, _ = alanine_dipeptide()
    modeller = app.Modeller(topology, x * unit.nanometer)
    box = [mm.Vec3(*v) for v in BOXES[shape]] * unit.nanometer
    modeller.addSolvent(force_field(), model="tip3p", boxVectors=box)
    x = np.array([list(v) for v in modeller.positions.value_in_unit(unit.nanometer)])
    # Off its minimum, so that its inner forces are seen beside those of unrelaxed water.
    x[:N_SOLUTE] += 0.004 * np.random.default_rng(0).standard_normal((N_SOLUTE, 3))
    return modeller.topology, x


@cache
def box(shape: str = "cubic", rigid_water: bool = True) -> Solvated:
    """PME, 0.8 nm cutoff, switching function and dispersion correction."""
    topology, x = _solvated(shape)
    system = force_field().createSystem(
        topology, nonbondedMethod=app.PME, nonbondedCutoff=0.8, switchDistance=0.7, constraints=None,
        rigidWater=rigid_water,
    )  # fmt: skip
    return Solvated(topology, x, system)


@cache
def cluster(n_waters: int = 10) -> Solvated:
    """The nearest flexible waters, without a box and a cutoff."""
    topology, x = _solvated("cubic")
    modeller = app.Modeller(topology, x * unit.nanometer)
    solute = x[:N_SOLUTE]

    def distance(residue: Any) -> float:
        oxygen = x[next(residue.atoms()).index]
        return float(np.linalg.norm(solute - oxygen, axis=1).min())

    waters = sorted((r for r in topology.residues() if r.name == "HOH"), key=distance)
    modeller.delete(waters[n_waters:])
    modeller.topology.setPeriodicBoxVectors(None)
    x = np.array([list(v) for v in modeller.positions.value_in_unit(unit.nanometer)])
    system = force_field().createSystem(
        modeller.topology, nonbondedMethod=app.NoCutoff, constraints=None, rigidWater=False
    )
    return Solvated(modeller.topology, x, system)
