"""Replace a peptide's own interactions by a learned action, in a small water cluster.

    python examples/04_replace_interactions.py example_01/alanine.diffforce [--waters 20]

Needs the file of 01_learned_force.py. Bonds, angles, torsions and pairs inside the peptide are
taken out of the classical System; everything between peptide and water, and in the water, stays.
"""

import argparse
from pathlib import Path

import numpy as np
import openmm
from openmm import app, unit

import openmm_diffforce as df
from openmm_diffforce.constants import LEARNED_GROUP
from openmm_diffforce.systems import potential_energies, remove_subset_terms

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("artefact", type=Path)
parser.add_argument("--waters", type=int, default=20)
parser.add_argument("--steps", type=int, default=2000, help="MD steps of 0.5 fs")
arguments = parser.parse_args()

# 1. The peptide and the water nearest to it, flexible: a base action has no constraints.
case = df.alanine_case("F1")
peptide = list(range(case.topology.getNumAtoms()))
force_field = app.ForceField("amber14/protein.ff14SB.xml", "amber14/tip3p.xml")
modeller = app.Modeller(case.topology, case.positions * unit.nanometer)
modeller.addSolvent(force_field, boxSize=openmm.Vec3(2.2, 2.2, 2.2) * unit.nanometer)
x = np.array(modeller.positions.value_in_unit(unit.nanometer))
waters = [r for r in modeller.topology.residues() if r.name == "HOH"]
waters.sort(key=lambda r: np.linalg.norm(x[peptide] - x[next(r.atoms()).index], axis=1).min())
modeller.delete(waters[arguments.waters :])
modeller.topology.setPeriodicBoxVectors(None)
topology = modeller.topology
positions = np.array(modeller.positions.value_in_unit(unit.nanometer))
system = force_field.createSystem(topology, nonbondedMethod=app.NoCutoff, constraints=None, rigidWater=False)

# 2. What will be replaced, and what it weighs here. mix does this itself; it is shown for the eye.
terms = remove_subset_terms(system, peptide)
for name, count in terms.removed.items():
    print(f"taken out of {name}: {count} terms")
whole, rest = (float(potential_energies(s, positions)[0]) for s in (system, terms.system))
print(f"classical {whole:.2f} kJ/mol = {rest:.2f} with and in water + {whole - rest:.2f} inside")

# 3. The learned action in its place; lambda_interpolate crosses over, 0 classical, 1 learned.
force = df.DiffusionForce(arguments.artefact, topology=topology, atoms=peptide, temperature=300.0)
mixed = df.mix(system, topology, force, interpolate=True)
integrator = openmm.LangevinMiddleIntegrator(300 * unit.kelvin, 1 / unit.picosecond, 0.5 * unit.femtosecond)
integrator.setRandomNumberSeed(1)
simulation = app.Simulation(topology, mixed, integrator, openmm.Platform.getPlatformByName("Reference"))
simulation.context.setPositions(positions)
force.check(simulation.context)
simulation.context.setParameter("lambda_interpolate", 0.0)
simulation.minimizeEnergy(maxIterations=200)
simulation.context.setParameter("lambda_interpolate", 1.0)
simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, 2)

# 4. A short run under the learned action. Its zero of energy is its own: compare changes.
learned, classical = [], []
for _ in range(20):
    simulation.step(arguments.steps // 20)
    state = simulation.context.getState(positions=True)
    x = np.array(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer))
    own = simulation.context.getState(energy=True, groups={LEARNED_GROUP}).getPotentialEnergy()
    learned.append(own.value_in_unit(unit.kilojoule_per_mole))
    classical.append(float(potential_energies(system, x)[0] - potential_energies(terms.system, x)[0]))
print(f"inside, classical: standard deviation {np.std(classical):.1f} kJ/mol over the run")
print(f"inside, learned:   standard deviation {np.std(learned):.1f} kJ/mol")
print(f"learned - classical: standard deviation {np.std(np.subtract(learned, classical)):.1f} kJ/mol")
