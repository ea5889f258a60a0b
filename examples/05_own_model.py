"""Wrap your own torch module as a force and mix it with amber14.

    python examples/05_own_model.py [--steps 5000] [--out example_05]

Any module with the signature ``module(x, t, lam) -> S`` (x in nm, S in kT, one value a frame) can
be exported: derivatives come from autograd, in TorchScript too, so that no Python runs in an MD
step. Here S is a small untrained network of all distances, one kT or so high: put your trained
one in its place. The export examines the module first and says what it found; a module whose
energy changes when the molecule turns, or that mixes the frames of a batch, is refused.
"""

import argparse
from pathlib import Path

import openmm
import torch
from openmm import app, unit

import openmm_diffforce as df
from openmm_diffforce.systems import clone_system, sample
from openmm_diffforce.testing import assert_forces_match_energy, assert_model_contract

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=5000, help="MD steps with the module as a force")
parser.add_argument("--frames", type=int, default=200, help="frames to examine the module on")
parser.add_argument("--out", type=Path, default=Path("example_05"))
arguments = parser.parse_args()
arguments.out.mkdir(parents=True, exist_ok=True)


class DistanceNetwork(torch.nn.Module):
    """S(x, t, lam) = (1 + lam) net(distances): invariant, and smooth where no two atoms meet."""

    def __init__(self, n_atoms: int) -> None:
        super().__init__()
        self.register_buffer("pairs", torch.triu_indices(n_atoms, n_atoms, 1))
        n_pairs = n_atoms * (n_atoms - 1) // 2
        self.net = torch.nn.Sequential(torch.nn.Linear(n_pairs, 32), torch.nn.SiLU(), torch.nn.Linear(32, 1))

    def forward(self, x: torch.Tensor, t: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
        d = x[:, self.pairs[0]] - x[:, self.pairs[1]]
        return (1 + lam) * self.net((d * d).sum(-1).sqrt() * 10).squeeze(-1)


case = df.alanine_case("F1", restrain_phi=True)
graph = df.graph_from_topology(case.topology)
torch.manual_seed(5)
module = DistanceNetwork(graph.n_atoms).double()

# 1. Does it keep the contract? In your own tests this is one line.
frames = sample(case.system_0, case.topology, case.positions, temperature=300.0,
                n_frames=arguments.frames, interval=20, seed=1)  # fmt: skip
found = assert_model_contract(df.AutogradAction(module), frames)
print(found)

# 2. One file. (A bare score network is exported as df.ScoreModel(module): a force, never an energy.)
path = arguments.out / "own.diffforce"
df.export_artefact(module, path, graph=graph, schedule=df.VESchedule(0.05), temperature=300.0)

# 3. On top of amber14: U = U_amber14 + scale kT S.
force = df.DiffusionForce(path, topology=case.topology, mode="add", temperature=300.0)
system = clone_system(case.system_0)
system.addForce(force)
integrator = openmm.LangevinMiddleIntegrator(300 * unit.kelvin, 1 / unit.picosecond, 1 * unit.femtosecond)
integrator.setRandomNumberSeed(3)
simulation = app.Simulation(case.topology, system, integrator, openmm.Platform.getPlatformByName("Reference"))
simulation.context.setPositions(case.positions)
force.check(simulation.context)
error = assert_forces_match_energy(simulation.context, groups={force.getForceGroup()})
print(f"forces equal finite differences of the energy to {error:.1e}")
simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, 4)
simulation.step(arguments.steps)
energy = simulation.context.getState(energy=True, groups={force.getForceGroup()}).getPotentialEnergy()
added = energy.value_in_unit(unit.kilojoule_per_mole)
print(f"{arguments.steps} steps with {force.backend}; the module adds {added:.2f} kJ/mol")
