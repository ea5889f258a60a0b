"""Delta F of the windows, its overlap, and the backbone angles; with alchemlyb and mdtraj themselves too.

    python examples/03_analyse.py example_02

Needs the folder of 02_lambda_windows.py.
"""

import argparse
from pathlib import Path

import mdtraj as md
from alchemlyb.estimators import MBAR

from openmm_diffforce import analysis
from openmm_diffforce.constants import DHDL_FILE, U_NK_FILE
from openmm_diffforce.estimate import estimate_free_energy, read_table
from openmm_diffforce.windows import TOPOLOGY_FILE

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", type=Path)
parser.add_argument(
    "--min-samples", type=int, default=2, help="independent frames asked of a window, on average"
)
arguments = parser.parse_args()

angles = {}
for name in ("learned", "classical"):
    run = arguments.folder / name
    u_nk, dhdl = read_table(run / U_NK_FILE), read_table(run / DHDL_FILE)
    result = estimate_free_energy(u_nk, dhdl, min_samples=arguments.min_samples)
    print(f"{name}: smallest overlap of neighbours {result.min_overlap:.2f}, "
          f"independent frames {result.n_decorrelated.sum()} of {result.n_frames.sum()}")  # fmt: skip
    for one in result.estimates.values():
        value, error = one.to("kcal/mol")
        print(f"  {one.method:5s} {one.delta_f:8.3f} +- {one.d_delta_f:.3f} kT"
              f"   {value:8.3f} +- {error:.3f} kcal/mol")  # fmt: skip
    # The tables are alchemlyb's own form: its estimators take them as they are (here on all frames).
    f = MBAR().fit(u_nk).delta_f_
    print(f"  alchemlyb's MBAR on all frames: {f.iloc[0, -1]:.3f} kT")
    # The trajectories are mdtraj's (and any other reader's).
    trajectory = md.load(str(run / "window_000.dcd"), top=str(run / TOPOLOGY_FILE))
    print(f"  radius of gyration at lambda = 0: {md.compute_rg(trajectory).mean():.4f} nm")
    angles[name] = analysis.phi_psi(trajectory)

divergence = analysis.jensen_shannon(angles["learned"], angles["classical"], bins=12)
print(f"phi/psi at lambda = 0, Jensen-Shannon divergence: {divergence:.3f} nats")
figure = analysis.phi_psi_figure(angles)
figure.savefig(arguments.folder / "phi_psi.png", dpi=150)
print(f"wrote {arguments.folder / 'phi_psi.png'}")
