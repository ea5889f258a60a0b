"""Fit a diffusion model to snapshots of alanine dipeptide and run it beside amber14.

    python examples/01_learned_force.py [--frames 1000] [--out example_01]

Two end states (the second has a fluorine-like hydrogen) are sampled with amber14. From the
snapshots alone the base action is fitted; with the energy difference of each snapshot also the
operator. Both go into one file, which then acts as an OpenMM force.
"""

import argparse
from pathlib import Path

import numpy as np
import openmm
from openmm import app, unit

import openmm_diffforce as df
from openmm_diffforce.systems import clone_system, sample

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--frames", type=int, default=1000, help="training frames per end state")
parser.add_argument("--steps", type=int, default=2000, help="MD steps with the learned force")
parser.add_argument("--out", type=Path, default=Path("example_01"))
arguments = parser.parse_args()
arguments.out.mkdir(parents=True, exist_ok=True)

# 1. Snapshots of both ends, from any source; here short runs with amber14 in vacuum.
case = df.alanine_case("F1", restrain_phi=True)
x_0, x_1 = (
    sample(
        system, case.topology, case.positions, temperature=300.0, n_frames=arguments.frames, interval=100,
        seed=seed,
    )
    for seed, system in ((1, case.system_0), (2, case.system_1))
)  # fmt: skip

# 2. Closed-form fits of base action and noised operator.
graph = df.graph_from_topology(case.topology)
schedule = df.VESchedule(sigma_max=0.05)
model, training = df.fit_physical_model(
    x_0, case.pair.operator_values(x_0), x_1, case.pair.operator_values(x_1),
    graph, case.perturbed, schedule, seed=1, sigma_knots=(0.0, 0.01, 0.05),
)  # fmt: skip

# 3. One file that holds model, units, elements, bonds, schedule and how it was made.
artefact = arguments.out / "alanine.diffforce"
df.export_artefact(
    model, artefact, graph=graph, schedule=schedule, temperature=300.0, training=training, frames=x_0
)
print(f"wrote {artefact}; look at it with: diffforce inspect {artefact}")

# 4. The learned operator on top of amber14: lambda turns one end state into the other.
force = df.DiffusionForce(artefact, topology=case.topology, mode="operator", temperature=300.0)
system = clone_system(case.system_0)
system.addForce(force)
integrator = openmm.LangevinMiddleIntegrator(300 * unit.kelvin, 1 / unit.picosecond, 1 * unit.femtosecond)
integrator.setRandomNumberSeed(3)
simulation = app.Simulation(case.topology, system, integrator, openmm.Platform.getPlatformByName("Reference"))
simulation.context.setPositions(case.positions)
simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, 4)
simulation.context.setParameter(force.parameter("lambda"), 1.0)
force.check(simulation.context)
simulation.step(arguments.steps)

# 5. Learned against exact, at the last frame.
state = simulation.context.getState(positions=True)
x = np.asarray(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer))
learned = force.energy_derivative(simulation.context)
exact = float(case.pair.operator_values(x)[0]) * case.pair.kT
print(f"backend {force.backend}: dE/dlambda learned {learned:.2f} kJ/mol, exact {exact:.2f} kJ/mol")
