"""Lambda windows under the learned operator and under the classical one.

    python examples/02_lambda_windows.py example_01/alanine.diffforce [--out example_02]

Needs the file of 01_learned_force.py. Stop it with Ctrl-C and start it again: it goes on where it
was.
"""

import argparse
from pathlib import Path

import openmm_diffforce as df
from openmm_diffforce.systems import clone_system

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("artefact", type=Path)
parser.add_argument("--windows", type=int, default=5)
parser.add_argument("--frames", type=int, default=500, help="frames per window, one every 0.1 ps")
parser.add_argument("--out", type=Path, default=Path("example_02"))
arguments = parser.parse_args()

case = df.alanine_case("F1", restrain_phi=True)
force = df.DiffusionForce(arguments.artefact, topology=case.topology, mode="operator", temperature=300.0)
learned_system = clone_system(case.system_0)
learned_system.addForce(force)

for name, system, parameter, learned in (
    ("learned", learned_system, force.parameter("lambda"), force),
    ("classical", case.pair.linear_system(), "lambda", None),
):
    run = df.run_windows(
        system, case.topology, case.positions,
        df.lambda_states(arguments.windows, parameter=parameter),
        temperature=300.0, out_dir=arguments.out / name, n_frames=arguments.frames, n_equil=5000,
        seed=7, learned=learned,
    )  # fmt: skip
    print(f"{name}: {len(run.u_nk)} frames in {run.out_dir}; {run.n_steps} steps, {run.seconds:.0f} s")
