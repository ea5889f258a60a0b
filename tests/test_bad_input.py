"""The front door: what users get wrong, each with one clear error before hours of compute.

One table, so that a reader sees at a glance what is caught. A case is a call; its error says what
was expected, what was found and, where it helps, what to do. Nothing is written or lost on the way.
"""

import builtins
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pandas as pd
import pytest
import torch
from openmm import app, unit

from openmm_diffforce import testing
from openmm_diffforce.alanine import TEMPERATURE, alanine_case
from openmm_diffforce.alchemy import EndStatePair, lambda_states, perturb_nonbonded
from openmm_diffforce.analysis import jensen_shannon, load_trajectory, phi_psi, trajectory_of
from openmm_diffforce.artefact import export_artefact, load_artefact
from openmm_diffforce.bridge_inputs import inputs_from_run, inputs_from_systems, inputs_from_table
from openmm_diffforce.bridge_run import bridge_settings, run_bridge
from openmm_diffforce.config import BridgeSettings, DemoSettings, check_settings
from openmm_diffforce.errors import (
    ConvergenceError,
    DiffForceError,
    IncompatibleSystemError,
    InputError,
    ModelError,
    NotConservativeError,
    PoorOverlapError,
    ResumeError,
    UnitsError,
)
from openmm_diffforce.estimate import bar_between, estimate_free_energy, read_table
from openmm_diffforce.force import DiffusionForce, force_from_manifest
from openmm_diffforce.models.action import AutogradAction, ScoreModel
from openmm_diffforce.models.graph import MolecularGraph
from openmm_diffforce.models.physics import PhysicalModel
from openmm_diffforce.posterior import posterior_mode, posterior_moments
from openmm_diffforce.record import read_json, write_json
from openmm_diffforce.schedule import VESchedule, VPSchedule
from openmm_diffforce.systems import clone_system, evaluate_frames, graph_from_topology, sample
from openmm_diffforce.training import fit_operator, fit_physical_model
from openmm_diffforce.windows import run_windows

from . import tiny

Case = Callable[[Path], Any]


def x_with(change: str) -> np.ndarray:
    x = tiny.frames()[0][:20].copy()
    if change == "nan":
        x[3, 4, 1] = np.nan
    if change == "angstrom":
        x *= 10
    if change == "empty":
        x = x[:0]
    return x


def windows(folder: Path, **changes: Any) -> Any:
    case = tiny.case()
    given: dict[str, Any] = {
        "system": case.pair.linear_system(), "topology": case.topology, "positions": case.positions,
        "states": lambda_states(2), "temperature": TEMPERATURE, "out_dir": folder / "run", "n_frames": 2,
        "interval": 2, "n_equil": 2, "progress": False, **changes,
    }  # fmt: skip
    return run_windows(**given)


def fit(**changes: Any) -> Any:
    x_0, o_0, x_1, o_1 = tiny.frames()
    given: dict[str, Any] = {"x_0": x_0, "o_0": o_0, "x_1": x_1, "o_1": o_1, "graph": tiny.graph(),
                             "sites": tiny.case().perturbed, "schedule": VESchedule(0.05), "seed": 1,
                             **changes}  # fmt: skip
    return fit_physical_model(**given)


def force(folder: Path, **changes: Any) -> DiffusionForce:
    path = folder / "m.diffforce"
    if not path.exists():
        tiny.export(path)
    return DiffusionForce(changes.pop("path", path), **{"topology": tiny.case().topology,
                                                        "backend": "python", **changes})  # fmt: skip


def constrained_case() -> tuple[Any, openmm.System]:
    """Alanine dipeptide with constrained bonds to hydrogen, as most users have it."""
    case = alanine_case("F1")
    system = app.ForceField("amber14/protein.ff14SB.xml").createSystem(
        case.topology, nonbondedMethod=app.NoCutoff, constraints=app.HBonds
    )
    return case, system


def checked(
    learned: DiffusionForce, system: openmm.System, *, temperature: float = 300.0, **parameters: float
) -> None:
    system.addForce(learned)
    context = openmm.Context(system, openmm.LangevinMiddleIntegrator(temperature, 1, 0.001),
                             openmm.Platform.getPlatformByName("Reference"))  # fmt: skip
    for name, value in parameters.items():
        context.setParameter(learned.parameter(name.rstrip("_")), value)
    learned.check(context)


def score_artefact(folder: Path) -> Path:
    class Pull(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return -100.0 * (x - x.mean(1, keepdim=True))

    export_artefact(ScoreModel(Pull()), folder / "score.diffforce", graph=tiny.graph(),
                    schedule=VESchedule(0.05), temperature=TEMPERATURE)  # fmt: skip
    return folder / "score.diffforce"


def table(
    n_states: int = 2, *, distance: float = 1.0, unit_of: str = "kT", temperature: float = 300.0
) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    lam = np.linspace(0, 1, n_states)
    parts = []
    for state in lam:
        x = generator.normal(state * distance, 1.0, size=100)
        index = pd.MultiIndex.from_arrays([np.arange(100.0), np.full(100, state)], names=["time", "lambda"])
        parts.append(pd.DataFrame(0.5 * (x[:, None] - lam * distance) ** 2, index=index,
                                  columns=pd.Index(lam, name="lambda")))  # fmt: skip
    out = pd.concat(parts)
    out.attrs = {"temperature": temperature, "energy_unit": unit_of}
    return out


def altered_artefact(folder: Path, change: Callable[[bytes], bytes]) -> Path:
    path = tiny.export(folder / "m.diffforce")
    path.write_bytes(change(path.read_bytes()))
    return path


def other_particles() -> openmm.System:
    system = openmm.System()
    system.addParticle(1.0)
    return system


def with_unknown_force() -> openmm.System:
    system = clone_system(tiny.case().system_1)
    system.addForce(openmm.GBSAOBCForce())
    return system


FRAMES: dict[str, tuple[Case, type[Exception], str]] = {
    "no frames": (lambda _: fit(x_0=x_with("empty"), o_0=[]), InputError, r"\[n_frames >= 1, 22, 3\]"),
    "NaN coordinate": (
        lambda _: fit(x_0=x_with("nan"), o_0=tiny.frames()[1][:20]),
        InputError,
        "frame 3 has a coordinate",
    ),
    "frames of another molecule": (
        lambda _: fit(x_1=np.zeros((5, 3, 3)), o_1=np.zeros(5)),
        InputError,
        "22, 3",
    ),
    "one operator value too few": (
        lambda _: fit(o_0=tiny.frames()[1][:-1]),
        InputError,
        "150 finite operator values",
    ),
    "NaN operator value": (lambda _: fit(o_1=np.full(150, np.nan)), InputError, "finite operator values"),
    "three frames": (lambda _: fit(x_0=x_with("")[:3], o_0=[0.0, 0, 0]), InputError, "at least 5 frames"),
    "site that is no atom": (lambda _: fit(sites=[22]), InputError, "atom indices below 22"),
    "no sites": (lambda _: fit(sites=[]), InputError, "expected different atom indices"),
    "site twice": (lambda _: fit(sites=[3, 3]), InputError, "expected different atom indices"),
    "noise levels that fall": (
        lambda _: fit(sigma_knots=(0.0, 0.02, 0.01)),
        InputError,
        "increasing noise levels",
    ),
    "noise levels that do not reach t = 1": (
        lambda _: fit(sigma_knots=(0.0, 0.01), n_draws=1),
        InputError,
        "noise knots up to sigma/alpha = 0.05",
    ),
    "sampling from frames of NaN": (
        lambda _: sample(
            tiny.case().system_0, tiny.case().topology, x_with("nan")[3], temperature=300, n_frames=1
        ),
        InputError,
        "finite|not finite",
    ),
    "coordinates without a frame axis wanted": (
        lambda _: evaluate_frames(tiny.case().system_0, np.zeros((4, 22, 2))),
        InputError,
        "3",
    ),
    "frames in Angstrom": (
        lambda _: sample(
            tiny.case().system_0,
            tiny.case().topology,
            1e4 * tiny.case().positions,
            temperature=300,
            n_frames=-1,
        ),
        InputError,
        "n_frames",
    ),
    "posterior at sigma 0": (
        lambda _: posterior_moments(
            tiny.case().system_0, x_with("")[:1], 0.0, operator=len, temperature=300.0
        ),
        InputError,
        "noise level > 0",
    ),
    "posterior mode at sigma NaN": (
        lambda _: posterior_mode(tiny.model(), x_with("")[:1], float("nan")),
        InputError,
        "noise level > 0",
    ),
}

UNITS: dict[str, tuple[Case, type[Exception], str]] = {
    "temperature in nm": (lambda p: windows(p, temperature=300 * unit.nanometer), UnitsError, "temperature"),
    "time step in kJ": (lambda p: windows(p, timestep=1 * unit.kilojoule), UnitsError, "timestep"),
    "temperature below zero": (lambda p: windows(p, temperature=-1), InputError, "temperature"),
    "temperature NaN": (lambda p: windows(p, temperature=float("nan")), InputError, "temperature"),
    "sigma_max in kT": (lambda _: VESchedule(-0.05), InputError, "sigma_max"),
    "VP without length": (lambda _: VPSchedule(length=0.0), InputError, "length"),
    "table in kJ/mol": (lambda _: estimate_free_energy(table(unit_of="kJ/mol")), UnitsError, "kT"),
    "table without units": (lambda _: estimate_free_energy(_bare(table())), UnitsError, "attrs"),
    "exported at 0 K": (
        lambda p: export_artefact(
            tiny.model(), p / "m", graph=tiny.graph(), schedule=VESchedule(0.05), temperature=0
        ),
        InputError,
        "temperature",
    ),
    "box vectors in the wrong form": (
        lambda _: evaluate_frames(tiny.case().system_0, x_with(""), box=[1, 2, 3]),
        InputError,
        "box",
    ),
}


def _bare(frame: pd.DataFrame) -> pd.DataFrame:
    frame.attrs = {}
    return frame


def _reordered(first: int, second: int) -> app.Topology:
    source = tiny.case().topology
    order = list(range(22))
    order[first], order[second] = order[second], order[first]
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    atoms = list(source.atoms())
    added = [topology.addAtom(atoms[k].name, atoms[k].element, residue) for k in order]
    place = {old: new for new, old in enumerate(order)}
    for i, j in source.bonds():
        topology.addBond(added[place[i.index]], added[place[j.index]])
    return topology


MODELS: dict[str, tuple[Case, type[Exception], str]] = {
    "no such model file": (lambda p: load_artefact(p / "none.diffforce"), ModelError, "cannot be read"),
    "a PDB for a model": (
        lambda p: load_artefact(_text(p / "m.pdb", "ATOM")),
        ModelError,
        "another kind of file",
    ),
    "truncated model file": (
        lambda p: load_artefact(altered_artefact(p, lambda b: b[:-1000])),
        ModelError,
        "SHA-256",
    ),
    "one byte changed": (
        lambda p: load_artefact(altered_artefact(p, lambda b: b[:2000] + bytes([b[2000] ^ 1]) + b[2001:])),
        ModelError,
        "SHA-256",
    ),
    "something appended": (
        lambda p: load_artefact(altered_artefact(p, lambda b: b + b"x")),
        ModelError,
        "SHA-256",
    ),
    "other order of atoms": (lambda p: force(p, topology=_reordered(0, 1)), ModelError, "expected element C"),
    "two carbons exchanged": (lambda p: force(p, topology=_reordered(0, 4)), ModelError, "bonds"),
    "another molecule": (lambda p: force(p, topology=app.Topology()), ModelError, "22"),
    "mdtraj's topology": (lambda p: force(p, topology="start.pdb"), InputError, "openmm.app.Topology"),
    "atoms beyond the topology": (lambda p: force(p, atoms=range(1, 23)), InputError, "atoms"),
    "atom twice": (lambda p: force(p, atoms=[0, *range(21)]), InputError, "atoms"),
    "unknown mode": (lambda p: force(p, mode="replace"), InputError, '"add" or "operator"'),
    "unknown backend": (lambda p: force(p, backend="cuda"), InputError, "backend"),
    "empty prefix": (lambda p: force(p, prefix=""), InputError, "prefix"),
    "unknown parameter": (lambda p: force(p).parameter("lam"), InputError, '"lambda", "noise" or "scale"'),
    "operator of a model without one": (
        lambda p: force(p, path=tiny.export(p / "base", operator=False), mode="operator"),
        ModelError,
        'mode="add"',
    ),
    "manifest of another file": (
        lambda p: force_from_manifest({**force(p).manifest(), "sha256": "0" * 64}, tiny.case().topology),
        ModelError,
        "SHA-256|sha256|another",
    ),
    "model that turns with the molecule": (
        lambda p: export_artefact(
            AutogradAction(_FirstCoordinate()),
            p / "m",
            graph=tiny.graph(),
            schedule=VESchedule(0.05),
            temperature=300,
        ),
        ModelError,
        "invariance",
    ),
    "bare score for lambda windows": (
        lambda p: _score_windows(p),
        NotConservativeError,
        "reduced potentials",
    ),
    "bare score as an operator": (
        lambda p: force(p, path=score_artefact(p), mode="operator"),
        ModelError,
        "no operator",
    ),
    "schedule beyond the fitted noise": (
        lambda _: PhysicalModel(*tiny.tables(), VESchedule(0.2)),
        InputError,
        "noise knots up to",
    ),
    "bond to an atom that is not there": (
        lambda _: MolecularGraph(("O", "H"), ((0, 2),)),
        InputError,
        "two different atoms of 2",
    ),
    "molecule without atoms": (lambda _: MolecularGraph((), ()), InputError, "at least one atom"),
    "topology without elements": (lambda _: graph_from_topology(_no_elements()), InputError, "element"),
}


class _FirstCoordinate(torch.nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
        return x[:, 0, 0] * (1 + lam)


def _no_elements() -> app.Topology:
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    topology.addAtom("X", None, residue)
    return topology


def _text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def _score_windows(folder: Path) -> Any:
    learned = force(folder, path=score_artefact(folder), mode="add")
    system = openmm.System()
    for _ in range(22):
        system.addParticle(12.0)
    system.addForce(learned)
    return windows(folder, system=system, learned=learned,
                   states=lambda_states(2, parameter=learned.parameter("lambda")))  # fmt: skip


SYSTEMS: dict[str, tuple[Case, type[Exception], str]] = {
    "constrained bonds under a base action": (
        lambda p: checked(force(p), constrained_case()[1]),
        IncompatibleSystemError,
        "constraints=None",
    ),
    "virtual site under a base action": (
        lambda p: checked(force(p), _virtual()),
        IncompatibleSystemError,
        "virtual",
    ),
    "other temperature at noise > 0": (
        lambda p: checked(force(p), clone_system(tiny.case().system_0), temperature=310.0, noise=0.5),
        IncompatibleSystemError,
        "310",
    ),
    "lambda beyond its range": (
        lambda p: checked(force(p), clone_system(tiny.case().system_0), lambda_=1.2),
        InputError,
        r"\[0, 1\]",
    ),
    "noise beyond its range": (
        lambda p: checked(force(p), clone_system(tiny.case().system_0), noise=-0.1),
        InputError,
        r"\[0, 1\]",
    ),
    "end states of other particles": (
        lambda _: EndStatePair(tiny.case().system_0, other_particles(), tiny.case().topology, 300.0),
        IncompatibleSystemError,
        "particles",
    ),
    "topology of other particles": (lambda p: windows(p, topology=app.Topology()), InputError, "22"),
    "states without the parameter": (
        lambda p: windows(p, states=[{"lambada": 0.0}, {"lambada": 1.0}]),
        InputError,
        "lambada",
    ),
    "states twice": (lambda p: windows(p, states=[{"lambda": 0.0}] * 2), InputError, "repeated"),
    "no states": (lambda p: windows(p, states=[]), InputError, "list of"),
    "lambda NaN": (
        lambda p: windows(p, states=[{"lambda": float("nan")}]),
        InputError,
        "not a finite number",
    ),
    "positions of two states for three": (
        lambda p: windows(p, positions=np.stack([tiny.case().positions] * 3)),
        InputError,
        "one per state",
    ),
    "learned force not mentioned": (lambda p: _unmentioned(p), DiffForceError, "learned"),
    "unknown platform": (lambda p: windows(p, platform="Cell"), InputError, "Cell|platform"),
    "seed below zero": (lambda p: windows(p, seed=-1), InputError, "seed"),
    "half a frame": (lambda p: windows(p, n_frames=0.5), InputError, "n_frames"),
    "trajectory as PDB": (lambda p: windows(p, trajectory="pdb"), InputError, '"dcd", "xtc"'),
    "out_dir under a file": (
        lambda p: windows(p, out_dir=_text(p / "file", "") / "run"),
        InputError,
        "folder that can be made",
    ),
    "time step that explodes": (
        lambda p: windows(p, timestep=0.1, n_equil=500),
        ConvergenceError,
        "smaller|unstable|time step",
    ),
    "run with other settings there": (lambda p: (windows(p), windows(p, seed=2)), ResumeError, "seed"),
    "atom parameters for no atom": (
        lambda _: perturb_nonbonded(tiny.case().system_0, {99: (0.0, 0.3, 0.1)}),
        InputError,
        "99",
    ),
    "one lambda state": (lambda _: lambda_states(1), InputError, "n: expected"),
}


def _virtual() -> openmm.System:
    system = clone_system(tiny.case().system_0)
    system.setParticleMass(5, 0.0)
    system.setVirtualSite(5, openmm.TwoParticleAverageSite(1, 2, 0.5, 0.5))
    return system


def _unmentioned(folder: Path) -> Any:
    learned = force(folder, mode="operator")
    system = clone_system(tiny.case().system_0)
    system.addForce(learned)
    return windows(folder, system=system, states=lambda_states(2, parameter=learned.parameter("lambda")))


ESTIMATES: dict[str, tuple[Case, type[Exception], str]] = {
    "ends without overlap": (
        lambda _: estimate_free_energy(table(distance=30.0)),
        PoorOverlapError,
        "overlap",
    ),
    "BAR without overlap": (
        lambda _: bar_between(np.full(50, 400.0), np.full(50, 400.0)),
        PoorOverlapError,
        "overlap",
    ),
    "no frames in a state": (lambda _: estimate_free_energy(table().iloc[:100]), DiffForceError, "state"),
    "NaN energies": (lambda _: estimate_free_energy(_with_nan(table())), InputError, "finite"),
    "table that is a text file": (
        lambda p: read_table(_text(p / "u_nk.parquet", "no")),
        InputError,
        "u_nk.parquet",
    ),
    "record that is no JSON": (lambda p: read_json(_text(p / "r.json", "{")), InputError, "r.json"),
    "record with NaN": (lambda p: write_json(p / "r.json", {"x": object()}), InputError, "record"),
    "angles in degrees": (
        lambda _: jensen_shannon(np.full((10, 2), 120.0), np.full((10, 2), 60.0)),
        InputError,
        "radian",
    ),
    "trajectory that is not there": (
        lambda p: load_trajectory(p / "a.dcd", p / "a.pdb"),
        InputError,
        "a.dcd|a.pdb",
    ),
    "molecule without phi": (lambda p: phi_psi(_water_trajectory()), InputError, "phi"),
    "YAML key misspelt": (
        lambda _: check_settings(DemoSettings, {"n_frame": 3}, "demo.yaml"),
        InputError,
        "did you mean n_frames",
    ),
    "harmonic states without stiffness": (
        lambda _: testing.HarmonicEndStates((0.0, 1.0), (0.0, 0.0)),
        InputError,
        "stiffnesses > 0",
    ),
    "operator from text": (
        lambda _: fit_operator(
            *[x[:3] for x in tiny.frames()], tiny.graph(), [0], generator=np.random.default_rng(0), n_draws=0
        ),
        InputError,
        "n_draws",
    ),
}


def _with_nan(frame: pd.DataFrame) -> pd.DataFrame:
    frame.iloc[3, 1] = np.nan
    return frame


def _water_trajectory() -> Any:
    import mdtraj

    topology = mdtraj.Topology()
    residue = topology.add_residue("HOH", topology.add_chain())
    topology.add_atom("O", mdtraj.element.oxygen, residue)
    return mdtraj.Trajectory(np.zeros((1, 1, 3)), topology)


def bridged(folder: Path, **changes: Any) -> Any:
    """A bridge of arrays, some of them changed or (None) left out."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"x_0": rng.normal(size=(40, 1)), "x_1": rng.normal(size=(40, 1)),
                              "o_0": rng.normal(size=40), "o_1": rng.normal(size=40), **changes}  # fmt: skip
    np.savez(folder / "a.npz", **{k: v for k, v in arrays.items() if v is not None})
    return run_bridge(BridgeSettings(arrays=folder / "a.npz", sigmas=(0.5,), out=folder / "out"))


def frames_of(folder: Path, **changes: Any) -> Any:
    """Inputs from the Systems of F1 and a trajectory that is there."""
    trajectory_of(tiny.frames()[0][:3], tiny.case().topology).save_dcd(str(folder / "a.dcd"))
    given: dict[str, Any] = {"trajectories": [folder / "a.dcd"] * 2, **changes}
    return inputs_from_systems(tiny.case().pair, **given)


BRIDGES: dict[str, tuple[Case, type[Exception], str]] = {
    "arrays without operators": (lambda p: bridged(p, o_1=None), InputError, "expected the arrays o_1"),
    "one operator too few": (
        lambda p: bridged(p, o_0=np.zeros(39)),
        InputError,
        "one value of o_0 for each of 40 frames",
    ),
    "too few frames to judge": (lambda p: bridged(p, o_0=np.arange(40.0)), InputError, "independent frames"),
    "frames that blew up": (lambda p: bridged(p, x_0=np.full((40, 1), np.nan)), InputError, "blew up"),
    "atoms that are not there": (lambda p: bridged(p, atoms=[4]), InputError, "indices from 0 to 0"),
    "arrays that are text": (
        lambda p: run_bridge(BridgeSettings(arrays=_text(p / "a.npz", "no"), out=p / "out")),
        InputError,
        "expected a .npz file",
    ),
    "one trajectory for two states": (
        lambda p: frames_of(p, trajectories=[p / "a.dcd"]),
        InputError,
        "each of 2 states, found 1",
    ),
    "trajectory missing": (
        lambda p: frames_of(p, trajectories=[p / "a.dcd", p / "b.dcd"]),
        InputError,
        "b.dcd: expected a trajectory",
    ),
    "everything skipped": (lambda p: frames_of(p, skip=3), InputError, "after the 3 that are skipped"),
    "stride of none": (lambda p: frames_of(p, stride=0), InputError, "stride: expected an integer"),
    "trajectory of other atoms": (
        lambda p: frames_of(p, trajectories=[_other_trajectory(p)] * 2),
        InputError,
        "atoms",
    ),
    "folder that is no run": (lambda p: inputs_from_run(p), InputError, "finished run of lambda windows"),
    "bridge of two sources": (
        lambda _: check_settings(BridgeSettings, {"run": "a", "arrays": "b"}, "b.yaml"),
        InputError,
        "exactly one of system, u_nk, run, arrays",
    ),
    "Systems without trajectories": (
        lambda _: check_settings(BridgeSettings, {"system": {"alanine": "F1"}}, "b.yaml"),
        InputError,
        "trajectories: expected one for each state beside system",
    ),
    "Systems without a temperature": (
        lambda _: check_settings(
            BridgeSettings,
            {"system": {"end_states": ["a", "b"]}, "topology": "t.pdb", "trajectories": ["a", "b"]},
            "b.yaml",
        ),
        InputError,
        "temperature: expected that of the trajectories",
    ),
    "large molecule without atoms": (
        lambda p: inputs_from_table(_a_table(p), [p / "a.dcd"] * 2, _a_large_molecule(p)),
        InputError,
        "atoms: expected the atoms that change",
    ),
    "windows without their lambda": (
        lambda _: check_settings(
            BridgeSettings, {"system": {"alanine": "F1"}, "trajectories": ["a", "b", "c"]}, "b.yaml"
        ),
        InputError,
        "each lambda of",
    ),
    "bridge of one System": (
        lambda p: bridge_settings(
            _text(p / "p.yaml", "system: {xml: s.xml}\ntopology: t.pdb\nfit: {n_draws: 1}\n")
        ),
        InputError,
        "t.pdb",
    ),
}


def _a_table(folder: Path) -> Path:
    table().to_parquet(folder / "u_nk.parquet")
    return folder / "u_nk.parquet"


def _a_large_molecule(folder: Path) -> Path:
    import mdtraj

    topology = mdtraj.Topology()
    residue = topology.add_residue("BIG", topology.add_chain())
    for k in range(100):
        topology.add_atom(f"C{k}", mdtraj.element.carbon, residue)
    trajectory = mdtraj.Trajectory(np.zeros((1, 100, 3)), topology)
    trajectory.save_dcd(str(folder / "a.dcd"))
    trajectory.save_pdb(str(folder / "a.pdb"))
    return folder / "a.pdb"


def _other_trajectory(folder: Path) -> Path:
    _water_trajectory().save_dcd(str(folder / "water.dcd"))
    return folder / "water.dcd"


ALL = {**FRAMES, **UNITS, **MODELS, **SYSTEMS, **ESTIMATES, **BRIDGES}


def test_there_are_many():
    assert len(ALL) == sum(map(len, (FRAMES, UNITS, MODELS, SYSTEMS, ESTIMATES, BRIDGES))) >= 40


@pytest.mark.parametrize("name", ALL)
def test_bad_input(name, tmp_path):
    call, error, message = ALL[name]
    with pytest.raises(error, match=message) as caught:
        call(tmp_path)
    text = str(caught.value)
    assert 20 < len(text) < 600, text  # a sentence, not a dump
    assert isinstance(caught.value, DiffForceError)
    # Refused at the door: no window was sampled (but by the cases that need a run to be there).
    if "settings there" not in name and "explodes" not in name:
        assert not list(tmp_path.glob("run/window_*.npz"))


# ------------------------------------------------------------------ nothing is lost


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    """Every write of a run fails from some point on: what was finished stays, and the run goes on."""
    original, room = builtins.open, [6]

    def full(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" in mode and str(tmp_path) in str(file) and "part_" in str(file):
            room[0] -= 1
            if room[0] < 0:
                raise OSError(28, "No space left on device", str(file))
        return original(file, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises((OSError, DiffForceError), match="No space left"):
        windows(tmp_path, n_frames=6, checkpoint_seconds=1e-9)
    kept = sorted(tmp_path.rglob("part_*.npz"))
    assert kept
    assert not list(tmp_path.rglob("*.tmp"))
    room[0] = 10**6
    resumed = windows(tmp_path, n_frames=6, checkpoint_seconds=1e-9)
    monkeypatch.undo()
    straight = windows(tmp_path / "straight", n_frames=6)
    pd.testing.assert_frame_equal(resumed.u_nk, straight.u_nk)
    assert resumed.n_steps < straight.n_steps


def test_a_full_disk_keeps_the_old_record(tmp_path, monkeypatch):
    write_json(tmp_path / "r.json", {"old": 1})

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises((OSError, DiffForceError), match="No space left"):
        write_json(tmp_path / "r.json", {"new": 1})
    assert json.loads((tmp_path / "r.json").read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize("box", ["orthorhombic", "triclinic"])
def test_atoms_out_of_the_box_are_made_whole(tmp_path, box):
    """Atoms of one molecule wrapped to different images: same energy, no error."""
    vectors = np.array({"orthorhombic": [[2.0, 0, 0], [0, 2.1, 0], [0, 0, 2.2]],
                        "triclinic": [[2.0, 0, 0], [0.5, 2.1, 0], [-0.6, 0.7, 2.2]]}[box])  # fmt: skip
    topology = tiny.case().topology
    try:
        topology.setPeriodicBoxVectors(vectors * unit.nanometer)
        learned = force(tmp_path, topology=topology)
    finally:
        topology.setPeriodicBoxVectors(None)
    system = openmm.System()
    for _ in range(22):
        system.addParticle(12.0)
    system.setDefaultPeriodicBoxVectors(*vectors)
    system.addForce(learned)
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    energies = []
    shifts = np.random.default_rng(0).integers(-2, 3, (22, 3)) @ vectors
    for x in (tiny.frame(), tiny.frame() + shifts):
        context.setPositions(x)
        energies.append(context.getState(energy=True).getPotentialEnergy()._value)
    assert energies[1] == pytest.approx(energies[0], rel=1e-8, abs=1e-6)
