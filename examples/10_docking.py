"""A docking energy from native complexes, and the funnel of a complex that it has not seen.

    python examples/10_docking.py FOLDER COMPLEX.pdb [--receptor A] [--ligand B] [--out example_10]

FOLDER holds PDB files of native complexes, chain A the receptor and chain B the ligand in each. Decoys of
COMPLEX.pdb are scored by the learned energy and by counting contacts; example_10/report.html shows both.
"""

import argparse
from pathlib import Path

import numpy as np

from openmm_diffforce.docking.complex import read_complex
from openmm_diffforce.docking.decoys import make_decoys
from openmm_diffforce.docking.dock_run import run_docking, structure_files
from openmm_diffforce.docking.learning import DockingFit, fit_docking_model
from openmm_diffforce.docking.model_file import save_docking_model
from openmm_diffforce.docking.poses import Poses

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", type=Path, help="native complexes to learn from")
parser.add_argument("complex", type=Path, help="complex to score")
parser.add_argument("--receptor", default="A")
parser.add_argument("--ligand", default="B")
parser.add_argument("--decoys", type=int, default=200)
parser.add_argument("--noised", type=int, default=200, help="noised poses of every complex and noise level")
parser.add_argument("--out", type=Path, default=Path("example_10"))
arguments = parser.parse_args()
arguments.out.mkdir(parents=True, exist_ok=True)

# 1. The model: score matching on rigidly noised native complexes, and decoys of them.
target = read_complex(arguments.complex, receptor=arguments.receptor, ligand=arguments.ligand)
files = [f for f in structure_files(arguments.folder) if f.name.split(".")[0] != target.name]
natives = [read_complex(f) for f in files]
settings = DockingFit(n_noised=arguments.noised, n_decoys=arguments.decoys, n_sets=1)
model = fit_docking_model(natives, settings, seed=1)
print(f"fitted to {len(natives)} complexes; share of the noise's score explained, level by level:")
for sigma, r2 in zip(model.sigmas, model.metadata["score_r2"], strict=True):
    print(f"  {sigma:g} nm  {r2:.2f}")
save_docking_model(model, arguments.out / "model.docking")

# 2. It is a conservative force on the ligand: here at the native pose, and where it lets go.
energy, shift, _ = model.evaluate(target, Poses.identity(), 0.1)
print(f"native pose: S = {energy[0]:.2f} kT, |score| {np.linalg.norm(shift):.1f} per nm, ", end="")
away = Poses(np.eye(3)[None], [[20.0, 0.0, 0.0]])
print(f"20 nm away: S = {model.evaluate(target, away, 0.1)[0][0]:.2f} kT")

# 3. Decoys, and the scores side by side. The same on the command line:
#    diffforce dock-score COMPLEX.pdb --model example_10/model.docking
decoys = make_decoys(target, arguments.decoys, seed=2)
run = run_docking(target, model, arguments.out, poses=decoys.poses)
for name, found in run.measures.items():
    print(f"{name}: AUC {found['auc']:.2f}, rank correlation {found['spearman']:.2f}")
print(f"best pose: ligand RMSD {decoys.rmsd[run.order[0]]:.2f} nm")
print(f"wrote {run.page}")
