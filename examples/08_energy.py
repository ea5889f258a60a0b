"""Read energies out of scores: -ln p_0 of a mixture by every method, and of a molecule's model.

    python examples/08_energy.py [--frames 600] [--out example_08]

First a Gaussian mixture whose score at every noise is known, so that each method can be held to
the exact energy. Then a score network of your own kind: a callable (y, t) -> s is all that is
needed. Last a molecule: the action that a physical model learned from frames alone, against the
force field's energy of frames that it has not seen.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import openmm_diffforce as df
from openmm_diffforce.energy import action_energy
from openmm_diffforce.models import PhysicalModel
from openmm_diffforce.systems import potential_energies, sample
from openmm_diffforce.testing import GaussianMixture
from openmm_diffforce.training import fit_base_action
from openmm_diffforce.units import thermal_energy

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--frames", type=int, default=600, help="frames to learn from")
parser.add_argument("--out", type=Path, default=Path("example_08"))
arguments = parser.parse_args()
arguments.out.mkdir(parents=True, exist_ok=True)

# 1. Two wells on a line. The prior is the Gaussian with the data's moments: better than the standard one.
mixture = GaussianMixture([[-1.0], [1.2]], [[[0.04]], [[0.16]]], weights=[0.3, 0.7])
schedule = df.VPSchedule(length=1.0)
x = np.array([[-1.2], [-1.0], [0.0], [0.6], [1.2]])
exact = mixture.log_density(x)
score, generator = mixture.score(schedule), np.random.default_rng(1)
for method, settings in {
    "flow": {"n_steps": 40},
    "stratonovich": {"n_steps": 200, "path": "mean"},
    "ito": {"n_steps": 500, "n_paths": 8},
    "backward_ito": {"n_steps": 500, "n_paths": 8},
    "mmse": {"n_steps": 100, "n_paths": 100},
}.items():
    found = df.learned_energy(
        score, x, schedule, method=method, prior=mixture.prior(), generator=generator, **settings
    )
    error = np.abs(found.log_density - exact).max()
    print(
        f"{method:13s} worst error {error:.4f} kT, stated {found.standard_error.max():.4f}, "
        f"{found.n_score // len(x)} scores a frame"
    )

# 2. While a reverse SDE makes samples it can say how probable each is.
made = df.sample_with_energy(
    score, (1,), schedule, n_frames=200, n_steps=800, prior=mixture.prior(), generator=generator
)
error = made.energy.log_density - mixture.log_density(made.x)
print(f"reverse       {len(error)} samples, mean error {error.mean():+.3f} kT, spread {error.std():.3f}")


# 3. A score without autograd is differentiated by differences.
def bare(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return score(y, t).detach()


found = df.learned_energy(bare, x, schedule, prior=mixture.prior(), difference=1e-4)
print(f"by differences: worst error {np.abs(found.log_density - exact).max():.4f} kT")

# 4. A molecule: the clean action that was learned without one energy.
case = df.alanine_case("F1", restrain_phi=True)
graph = df.graph_from_topology(case.topology)
frames = sample(case.system_0, case.topology, case.positions, temperature=300.0,
                n_frames=arguments.frames + 50, interval=100, seed=1)  # fmt: skip
train, test = frames[: arguments.frames], frames[arguments.frames :]
fit = fit_base_action(train, graph, sigma_knots=(0.0, 0.002), generator=np.random.default_rng(2), n_draws=1)
result = action_energy(PhysicalModel(fit.tables, None, df.VESchedule(0.002)), test)
table = result.to_frame(temperature=300.0, reference=0)
table["amber14_kT"] = potential_energies(case.system_0, test) / thermal_energy(300.0)
table["amber14_kT"] -= table["amber14_kT"].iloc[0]
print(table[["energy_kT", "energy_kJ_mol", "amber14_kT"]].head().round(2).to_string())
correlation = np.corrcoef(table["energy_kT"], table["amber14_kT"])[0, 1]
print(f"{len(test)} frames: squared correlation with amber14 {correlation**2:.3f}")
result.write(arguments.out / "energies.csv", temperature=300.0, reference=0)
