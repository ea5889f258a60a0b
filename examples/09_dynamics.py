"""A diffusion model run as molecular dynamics: which step, how far off, what it remembers.

    python examples/09_dynamics.py example_01/alanine.diffforce [--steps 40000]

Needs the file of 01_learned_force.py. Overdamped Langevin dynamics on the learned action alone, by
the harmonic adapter step of the diffusion model; a trajectory and phi/psi in example_09.
"""

import argparse
from pathlib import Path

import numpy as np
import openmm
from openmm import app, unit

import openmm_diffforce as df
from openmm_diffforce import analysis
from openmm_diffforce.systems import potential_energies, sample
from openmm_diffforce.units import thermal_energy

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("artefact", type=Path)
parser.add_argument("--steps", type=int, default=40000)
parser.add_argument("--starts", type=int, default=20, help="independent starts by diffusion")
arguments = parser.parse_args()
out = Path("example_09")
out.mkdir(exist_ok=True)
kelvin, per_ps = 300 * unit.kelvin, 50 / unit.picosecond

# 1. The learned action in place of amber14, and a few frames to look at its curvature.
case = df.alanine_case("F1", restrain_phi=True)
learned = df.DiffusionForce(arguments.artefact, topology=case.topology, temperature=kelvin)
system = df.mix(case.system_0, case.topology, learned)
frames = sample(case.system_0, case.topology, case.positions, temperature=kelvin, n_equil=3000,
                n_frames=max(20, arguments.starts), interval=300, seed=1)  # fmt: skip

# 2. What a step will do, before a run. The last one is unstable, and would be refused.
for femtoseconds in (0.02, 0.05, 0.1, 0.5):
    integrator = df.DiffusionLangevinIntegrator(kelvin, per_ps, femtoseconds * unit.femtosecond)
    advice = df.advise_integrator(integrator, system, frames[::5])
    print(advice)

# 3. Dynamics like any other in OpenMM.
step = 0.05 * unit.femtosecond
integrator = df.DiffusionLangevinIntegrator(kelvin, per_ps, step, learned=learned, seed=2)
print(f"stiffness k of the adapter: {integrator.getStiffness(system).min():.3g} 1/nm^2 and more")
simulation = app.Simulation(case.topology, system, integrator, openmm.Platform.getPlatformByName("Reference"))
simulation.context.setPositions(frames[-1])
integrator.check(simulation.context)
every = max(1, arguments.steps // 400)
simulation.reporters.append(app.DCDReporter(str(out / "dynamics.dcd"), every))
simulation.step(arguments.steps)
del simulation  # closes the trajectory
with open(out / "start.pdb", "w") as stream:
    app.PDBFile.writeFile(case.topology, case.positions * unit.nanometer, stream)
trajectory = analysis.load_trajectory(out / "dynamics.dcd", out / "start.pdb")
angles = analysis.phi_psi(trajectory)
psi = np.stack([np.cos(angles[:, 1]), np.sin(angles[:, 1])], axis=1)
halves = psi[: len(psi) // 2 * 2].reshape(2, -1, 2)
memory = analysis.autocorrelation(halves, len(halves[0]) // 4, interval=every * 5e-5)
print(f"{trajectory.n_frames} frames; psi after {memory.lag[-1]:.2f} ps: autocorrelation "
      f"{memory.correlation[-1]:.2f} +- {memory.error[-1]:.2f}")  # fmt: skip
analysis.phi_psi_figure({"learned dynamics": angles}).savefig(out / "phi_psi.png")

# 4. Independent starts: frames noised to 0.01 nm and denoised by the model, then dynamics from each,
#    with a Metropolis correction: its ensemble is exactly that of the learned action.
schedule, random = learned.artefact.schedule, np.random.default_rng(3)
times = df.noise_grid(schedule, 60, kind="log", sigma_min=0.0005, sigma_max=0.01)
clean = frames[: arguments.starts] - frames[: arguments.starts].mean(axis=1, keepdims=True)
noised = df.noise_frames(clean, schedule, times[-1], generator=random)
local = df.predictor_corrector(
    df.score_of(learned.artefact.model), noised, schedule, times=times, generator=random,
    final="denoise",
)  # fmt: skip
exact = df.DiffusionLangevinIntegrator(
    kelvin, per_ps, 0.02 * unit.femtosecond, metropolis=True, system=system, learned=learned, seed=4
)
runs = df.independent_then_dynamics(system, local.samples, exact, n_frames=5, interval=20)
print(f"{len(local.samples)} starts by diffusion ({local.calls} score calls)")
print(f"dynamics from each, accepted {runs.acceptance_rate:.2f}")

# 5. To the force field, whose energy is at hand, and how many samples that is worth.
last, kt = runs.frames[:, -1], thermal_energy(kelvin)
weighed = df.reweight_samples(
    potential_energies(case.system_0, last) / kt, potential_energies(system, last) / kt, min_effective=0
)
print(f"reweighted to amber14: {weighed.effective_samples:.1f} effective samples of {len(last)}")
