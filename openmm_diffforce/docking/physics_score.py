r"""A force field as a docking score: amber14 with OBC2, on the residues at the interface of each pose.

Hydrogens and missing side-chain atoms are added once to each partner. For every pose the residues with a
heavy atom within 1 nm of the partner are cut out, minimised for a few steps together, and the score is

.. math:: E(\text{both}) - E(\text{receptor part}) - E(\text{ligand part})

[kJ/mol] at those coordinates: parts of different size are comparable, and bonds that were cut cancel.
"""

import io
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, MissingDependencyError, ResumeError
from ..record import read_json, settings_hash, write_json
from .complex import Complex, FloatArray, IntArray, Partner, pdb_text
from .contacts import near_pairs, placed
from .poses import Poses

SHELL = 1.0
"""Residues within this distance of the partner are kept [nm]."""

CUTOFF = 1.2
"""Of the nonbonded forces [nm]."""

MAX_STEPS = 20
"""Of the minimiser."""

BROKEN = 0.25
"""A bond longer than this [nm] is a gap in the chain, and left out."""

FORCE_FIELD = ("amber14-all.xml", "implicit/obc2.xml")


@dataclass(frozen=True)
class _Body:
    """One partner with all atoms and its parameters, in the frame of its Partner."""

    x: FloatArray
    residue: IntArray
    heavy: Any
    masses: FloatArray
    charge: FloatArray
    sigma: FloatArray
    epsilon: FloatArray
    radius: FloatArray
    screen: FloatArray
    bonds: list[tuple[tuple[int, ...], tuple[float, ...]]]
    angles: list[tuple[tuple[int, ...], tuple[float, ...]]]
    torsions: list[tuple[tuple[int, ...], tuple[float, ...]]]
    exceptions: list[tuple[tuple[int, ...], tuple[float, ...]]]


def _fixed(partner: Partner, role: str) -> tuple[Any, Any, str]:
    """Topology and positions with every atom, and a note on what was added."""
    import openmm
    from openmm import app

    try:
        import pdbfixer
    except ImportError as err:
        raise MissingDependencyError(
            "physics score: structures lack hydrogens and often side-chain atoms; pdbfixer adds them: "
            "pip install pdbfixer, or pip install 'openmm-diffforce[docking]'."
        ) from err
    fixer = pdbfixer.PDBFixer(pdbfile=io.StringIO(pdb_text(partner) + "END\n"))
    fixer.missingResidues = {}  # gaps stay gaps
    fixer.findMissingAtoms()
    missing = sum(len(v) for v in fixer.missingAtoms.values())
    note = f"{role}: {missing} heavy atoms added in {len(fixer.missingAtoms)} residues"
    fixer.addMissingAtoms(seed=1)
    modeller = app.Modeller(fixer.topology, fixer.positions)
    # Placed by geometry; the force field would take minutes for what the minimiser does for each pose.
    # OpenMM starts them at random places of Python's own generator: the same for every call, and put back.
    state = random.getstate()
    random.seed(0)
    try:
        modeller.addHydrogens(platform=openmm.Platform.getPlatform("CPU"))
    finally:
        random.setstate(state)
    return modeller.topology, modeller.positions, note


def _body(partner: Partner, role: str) -> tuple[_Body, str]:
    import openmm
    from openmm import app, unit

    topology, positions, note = _fixed(partner, role)
    system = app.ForceField(*FORCE_FIELD).createSystem(
        topology, nonbondedMethod=app.NoCutoff, constraints=None, rigidWater=False
    )
    x = np.array(positions.value_in_unit(unit.nanometer), dtype=np.float64)
    n = len(x)
    # pdbfixer keeps the order of residues, and numbers them from zero.
    residue = np.array([a.residue.index for a in topology.atoms()])
    if residue[-1] + 1 != partner.n_residues:
        raise InputError(
            f"{role}: expected {partner.n_residues} residues after the repair, found {residue[-1] + 1}."
        )
    heavy = np.array([a.element is not app.element.hydrogen for a in topology.atoms()])
    masses = np.array([system.getParticleMass(k).value_in_unit(unit.dalton) for k in range(n)])
    columns = np.zeros((5, n))
    bonds: list[Any] = []
    angles: list[Any] = []
    torsions: list[Any] = []
    exceptions: list[Any] = []
    broken = set()
    for force in system.getForces():
        if isinstance(force, openmm.HarmonicBondForce):
            for k in range(force.getNumBonds()):
                i, j, *p = force.getBondParameters(k)
                if np.linalg.norm(x[i] - x[j]) > BROKEN:
                    broken.add((i, j))
                else:
                    bonds.append(((i, j), tuple(v._value for v in p)))
    for force in system.getForces():
        if isinstance(force, openmm.HarmonicAngleForce):
            for k in range(force.getNumAngles()):
                *atoms, a, b = force.getAngleParameters(k)
                angles.append((tuple(atoms), (a._value, b._value)))
        elif isinstance(force, openmm.PeriodicTorsionForce):
            for k in range(force.getNumTorsions()):
                *atoms, m, a, b = force.getTorsionParameters(k)
                torsions.append((tuple(atoms), (m, a._value, b._value)))
        elif isinstance(force, openmm.NonbondedForce):
            columns[:3] = np.array([[v._value for v in force.getParticleParameters(k)] for k in range(n)]).T
            for k in range(force.getNumExceptions()):
                i, j, *p = force.getExceptionParameters(k)
                exceptions.append(((i, j), tuple(v._value for v in p)))
        elif isinstance(force, openmm.CustomGBForce):
            # Parameters: charge, radius less the offset of 0.009 nm, and that times the screening factor.
            rows = np.array([force.getParticleParameters(k)[1:3] for k in range(n)])
            columns[3], columns[4] = rows[:, 0] + 0.009, rows[:, 1] / rows[:, 0]
        elif isinstance(force, openmm.GBSAOBCForce):
            for k in range(n):
                _, r, s = force.getParticleParameters(k)
                columns[3, k], columns[4, k] = r._value, s
    if not (columns[3] > 0).all():
        raise InputError(f"{role}: expected a generalized Born radius for every atom, found none.")
    if broken:
        gone = {frozenset(pair) for pair in broken}

        def whole(atoms: tuple[int, ...]) -> bool:
            return not any(frozenset(p) in gone for p in pairwise(atoms))

        angles = [t for t in angles if whole(t[0])]
        torsions = [t for t in torsions if whole(t[0])]
        note += f", {len(broken)} gaps in the chain"
    charge, sigma, epsilon, radius, screen = columns
    body = _Body(
        x, residue, heavy, masses, charge, sigma, epsilon, radius, screen, bonds, angles, torsions, exceptions
    )  # fmt: skip
    return body, note


class PhysicsScore:
    """Interaction energy of poses of one complex by the force field.

    Parameters
    ----------
    complex_ : Complex
    platform : str
        OpenMM platform; one thread is used.

    Attributes
    ----------
    notes : tuple of str
        Atoms that were added, gaps that were found.

    Raises
    ------
    MissingDependencyError
        If pdbfixer is not installed.
    InputError
        If the force field cannot describe a partner.
    """

    def __init__(self, complex_: Complex, *, platform: str = "CPU") -> None:
        import openmm

        self.complex_ = complex_
        self.platform = openmm.Platform.getPlatform(platform)
        self._properties = {"Threads": "1"} if platform == "CPU" else {}
        try:
            self._bodies, notes = zip(
                *(_body(p, r) for p, r in ((complex_.receptor, "receptor"), (complex_.ligand, "ligand"))),
                strict=True,
            )
        except (ValueError, KeyError, openmm.OpenMMException) as err:
            if isinstance(err, InputError):
                raise
            raise InputError(
                f"{complex_.name}: expected residues that amber14 knows, found otherwise ({err}); mend the "
                "structure, or leave the residue out."
            ) from err
        self.notes = tuple(notes)

    def energy(self, poses: Poses) -> FloatArray:
        """Score of every pose [kJ/mol], shape (n_poses,)."""
        return np.array([self._one(pose) for pose in poses])

    def __call__(self, complex_: Complex, poses: Poses) -> FloatArray:
        """The same, as a score: ``complex_`` may be the same complex in other frames."""
        if complex_.receptor.labels != self.complex_.receptor.labels or (
            complex_.ligand.labels != self.complex_.ligand.labels
        ):
            raise InputError(
                f"physics score: expected poses of {self.complex_.name}, found those of {complex_.name}."
            )
        return self.energy(_in_frame_of(self.complex_, complex_, poses))

    def _one(self, pose: Poses) -> float:
        import openmm
        from openmm import unit

        a, b = self._bodies
        moved = placed(b.x, self.complex_.ligand.centre, pose)[0]
        near = near_pairs(a.x[a.heavy], moved[b.heavy][None], SHELL)
        if not len(near.pose):
            return 0.0
        use = [
            np.isin(body.residue, np.unique(body.residue[body.heavy][hit]))
            for body, hit in ((a, near.receptor), (b, near.ligand))
        ]
        x = np.concatenate([a.x[use[0]], moved[use[1]]])
        n_first = int(use[0].sum())
        context = self._context([(a, use[0]), (b, use[1])])
        context.setPositions(x)
        openmm.LocalEnergyMinimizer.minimize(context, 10.0, MAX_STEPS)
        state = context.getState(getPositions=True, getEnergy=True)
        x = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        total = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
        del context
        for part, where in (((a, use[0]), slice(None, n_first)), ((b, use[1]), slice(n_first, None))):
            alone = self._context([part])
            alone.setPositions(x[where])
            state = alone.getState(getEnergy=True)
            total -= state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
            del alone
        return float(total)

    def _context(self, parts: Sequence[tuple[_Body, Any]]) -> Any:
        import openmm

        system = openmm.System()
        bond, angle = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
        torsion, nonbonded = openmm.PeriodicTorsionForce(), openmm.NonbondedForce()
        born = openmm.GBSAOBCForce()
        for force in (nonbonded, born):
            force.setNonbondedMethod(force.CutoffNonPeriodic)
            force.setCutoffDistance(CUTOFF)
        nonbonded.setReactionFieldDielectric(1.0)
        for body, use in parts:
            at = np.flatnonzero(use)
            start = system.getNumParticles()
            index = np.full(len(use), -1)
            index[at] = start + np.arange(len(at))
            for k in at:
                system.addParticle(body.masses[k])
                nonbonded.addParticle(body.charge[k], body.sigma[k], body.epsilon[k])
                born.addParticle(body.charge[k], body.radius[k], body.screen[k])
            for add, terms in (
                (bond.addBond, body.bonds), (angle.addAngle, body.angles),
                (torsion.addTorsion, body.torsions), (nonbonded.addException, body.exceptions),
            ):  # fmt: skip
                for atoms, values in terms:
                    new = index[list(atoms)]
                    if (new >= 0).all():
                        add(*(int(k) for k in new), *values)
        for force in (bond, angle, torsion, nonbonded, born):
            system.addForce(force)
        return openmm.Context(system, openmm.VerletIntegrator(0.001), self.platform, self._properties)


def _in_frame_of(home: Complex, other: Complex, poses: Poses) -> Poses:
    """Poses of ``other`` (the same complex, its partners turned and shifted) written for ``home``."""
    back = Poses.from_coordinates(other.receptor.ca, home.receptor.ca[None], centre=np.zeros(3))
    turn, shift = back.rotation[0], back.translation[0]
    # World of other -> world of home, applied to ligands at other's poses.
    c = other.ligand.centre
    own = Poses.from_coordinates(
        home.ligand.ca, other.ligand.ca[None], centre=home.ligand.centre
    ).rotation[0]  # fmt: skip
    centre = (c + poses.translation) @ turn.T + shift
    return Poses(turn @ poses.rotation @ own, centre - home.ligand.centre)


@dataclass(frozen=True)
class PhysicsRun:
    """What :func:`physics_scores` returns.

    Attributes
    ----------
    values : numpy.ndarray
        Scores of the first poses [kJ/mol]; fewer than there are poses if the budget was spent.
    seconds : float
        Processor time of all scores in the file.
    """

    values: FloatArray
    seconds: float


def physics_scores(
    score: PhysicsScore,
    poses: Poses,
    *,
    path: str | os.PathLike[str],
    budget: float = np.inf,
    progress: Any = None,
) -> PhysicsRun:
    """Scores of poses one after the other, kept in a file: what it holds is not computed again.

    Parameters
    ----------
    score : PhysicsScore
    poses : Poses
    path : path-like
        JSON file of this structure's scores, of these poses or others; written after every tenth.
    budget : float
        Stop after this processor time [s].
    progress : callable, optional
        Called with (what, done, of how many).

    Returns
    -------
    PhysicsRun

    Raises
    ------
    ResumeError
        If the file holds scores of another structure, or by other settings.
    """
    one = score.complex_
    key = settings_hash({
        "structure": [[p.atoms.round(6), p.atom_names, p.atom_residues, p.types]
                      for p in (one.receptor, one.ligand)],
        "shell": SHELL, "cutoff": CUTOFF, "steps": MAX_STEPS, "force_field": FORCE_FIELD,
    })  # fmt: skip
    labels = [settings_hash({"rotation": p.rotation.round(9), "tau": p.translation.round(9)}) for p in poses]
    known: dict[str, float] = {}
    seconds = 0.0
    if Path(path).exists():
        found = read_json(path)
        if found.get("key") != key:
            raise ResumeError(
                f"{path}: expected scores of {one.name} by these settings, found those of another structure "
                "or other settings; give another file or folder, or delete it."
            )
        known, seconds = found["values"], found["seconds"]
    began = time.process_time()

    def keep() -> float:
        spent = seconds + time.process_time() - began
        write_json(path, {"key": key, "complex": one.name, "values": known, "seconds": spent})
        return spent

    values: list[float] = []
    fresh = 0
    for label, pose in zip(labels, poses, strict=True):
        if label not in known:
            if seconds + time.process_time() - began >= budget:
                break
            known[label] = score._one(pose)
            fresh += 1
            if fresh % 10 == 0:
                keep()
        values.append(known[label])
        if progress is not None:
            progress("force field", len(values), len(poses))
    return PhysicsRun(np.array(values), keep())
