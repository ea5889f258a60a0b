"""Delta F from the two end states alone: no windows between them, and an audit of the number.

    python examples/07_bridge.py [--frames 1000] [--out example_07]

Samples alanine dipeptide before and after a methyl hydrogen became fluorine-like, and bridges the two
ensembles. The page to look at afterwards is example_07/bridge/report.html.
"""

import argparse
from pathlib import Path

import openmm_diffforce as df
from openmm_diffforce.bridge_run import run_bridge
from openmm_diffforce.config import BridgeSettings

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--frames", type=int, default=1000, help="frames of each end state")
parser.add_argument("--interval", type=int, default=400, help="MD steps of 1 fs between frames")
parser.add_argument("--out", type=Path, default=Path("example_07"))
arguments = parser.parse_args()

# 1. What you bring: one trajectory of each end state. Here they are made, as two windows at lambda 0
#    and 1; yours may come from any program that writes DCD, XTC, PDB or HDF5.
case = df.alanine_case("F1", restrain_phi=True)
ends = df.run_windows(
    case.pair.linear_system(), case.topology, case.positions, df.lambda_states(2), temperature=300.0,
    out_dir=arguments.out / "ends", n_frames=arguments.frames, interval=arguments.interval, seed=7,
)  # fmt: skip
print(f"{len(ends.u_nk)} frames of two end states, {ends.seconds:.0f} s")

# 2. The bridge. For your own molecule: system={"end_states": ("state_0.xml", "state_1.xml")} and
#    topology="molecule.pdb". The same as a file: examples/bridge.yaml.
settings = BridgeSettings(
    system={"alanine": "F1"}, trajectories=ends.trajectories, temperature=300.0, seed=7,
    out=arguments.out / "bridge",
)  # fmt: skip
run = run_bridge(settings)
result = run.result
print(f"noise on {', '.join(run.inputs.noised)}")
print(f"two moments of O alone: {result.readout.delta_f:.2f} +- {result.readout.d_delta_f:.2f} kT")
print("sigma [nm]    Delta f [kT]   overlap")
for level in result.levels:
    mark = "*" if level is result.level else " "
    print(f"{mark} {level.sigma:.4f}   {level.delta_f:7.2f} +- {level.d_delta_f:.2f}   {level.overlap:.2f}")

# 3. The audit, before the number. A FAIL means: do not use it.
for gate in run.audit.gates:
    print(f"{gate.status}  {gate.name}: {gate.value:.3g} ({gate.threshold})  {gate.advice}")
print(f"verdict {run.audit.verdict}: Delta f = {result.delta_f:.2f} +- {result.d_delta_f:.2f} kT")
print(f"wrote {run.page}")
