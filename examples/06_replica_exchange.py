"""Replica exchange between lambda windows: Delta F, and how well the replicas mixed.

    python examples/06_replica_exchange.py [--iterations 300] [--out example_06]

The methyl hydrogens of alanine dipeptide grow to the size of bromine atoms. A molecule that is
stuck in one window gets out in another: after each iteration pairs of replicas may exchange their
lambda. Stop it with Ctrl-C and start it again: it goes on where it was.
"""

import argparse
from pathlib import Path

import openmm_diffforce as df
from openmm_diffforce.estimate import estimate_free_energy

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--windows", type=int, default=8)
parser.add_argument("--iterations", type=int, default=300, help="exchanges, and frames of each window")
parser.add_argument("--steps", type=int, default=250, help="MD steps of 1 fs between exchanges")
parser.add_argument("--equil", type=int, default=5000, help="MD steps of each replica thrown away first")
parser.add_argument(
    "--min-samples", type=int, default=2, help="independent frames asked of a window, on average"
)
parser.add_argument("--out", type=Path, default=Path("example_06"))
arguments = parser.parse_args()

# 1. The windows, under the force field itself: U = (1 - lambda) U_0 + lambda U_1. Atoms that grow
#    need them close together near lambda = 0, which is what the power does.
case = df.alanine_case("Br3", restrain_phi=True)
states = df.lambda_states(arguments.windows, 3.0)

# 2. One replica for each window, in one OpenMM Context.
run = df.run_replica_exchange(
    case.pair.linear_system(), case.topology, case.positions, states,
    temperature=300.0, out_dir=arguments.out, n_iterations=arguments.iterations,
    steps_per_iteration=arguments.steps, n_equil=arguments.equil, seed=7,
)  # fmt: skip
print(f"{len(run.u_nk)} frames in {run.out_dir}; {run.n_steps} steps, {run.seconds:.0f} s")

# 3. Delta F by MBAR. A replica takes what it remembers along from window to window: errors must
#    follow replicas, which is what `replica` is for.
result = estimate_free_energy(run.u_nk, replica=run.replica, min_samples=arguments.min_samples)
value, error = result.to("kcal/mol")
print(f"MBAR {result.delta_f:.3f} +- {result.d_delta_f:.3f} kT, {value:.3f} +- {error:.3f} kcal/mol, "
      f"from {result.n_decorrelated.sum()} independent frames of {result.n_frames.sum()}")  # fmt: skip

# 4. Neighbours. Where overlap is small exchanges are rare: put a window in between.
print("lambda            overlap  accepted")
neighbours = zip(result.neighbour_overlap, run.swaps.neighbour_acceptance, strict=True)
for k, (overlap, accepted) in enumerate(neighbours):
    print(f"{result.states[k]:.4f} - {result.states[k + 1]:.4f}   {overlap:6.2f}    {accepted:6.2f}")

# 5. Did the replicas travel? From one end of lambda to the other and back is one round trip. Without
#    a few of them these were hardly more than independent windows: a run should be many mixing times
#    long, and the time counts lambda alone, not what is slow in the molecule.
swaps = run.swaps
print(f"round trips of each replica: {swaps.round_trips.tolist()}, {swaps.round_trips.sum()} in all")
print(f"mixing time of lambda: at least {swaps.mixing_time:.0f} of {arguments.iterations} iterations")
