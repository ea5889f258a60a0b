"""T4 lysozyme L99A with indole, C6-H -> C6-X: end states of five cases, and one fast System between them.

=============  =========  ============================================================  ==============
case           pocket     end state X                                                   lambda_k
=============  =========  ============================================================  ==============
``c6_nb``      flexible   fluorine's charges and LJ on H6                               k/18
``c6_bonded``  flexible   6-fluoroindole's force field: bond and angles of C-F too      k/18
``r8_bonded``  rigid      the same                                                      k/18
``r6_clX``     rigid      chlorine's charges and LJ on a site at 0.174 nm               (k/18)^5
``r6_nbX``     rigid      fluorine's on a site at 0.135 nm                              (k/18)^2
=============  =========  ============================================================  ==============

``c6``, ``r6``, ``r8``: the cut-out of 6 or 8 Angstrom around the ligand. Flexible: indole and the side
chains within 6 Angstrom move, their X-H bonds are constrained, hydrogens weigh 3 Da (4 fs steps). Rigid:
indole alone moves, unconstrained (2 fs). Vacuum, no cutoff, U = (1 - lambda) U_H + lambda U_X.

The structures are not part of this project. They are read from a folder (``--data``, the environment
variable DIFFFORCE_DATA, or ``../shared/data``) with ``185l_indole/`` in it.
"""

import copy
import importlib
import os
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm as mm
from openmm import app, unit

from openmm_diffforce.alchemy import EndStatePair, lambda_states
from openmm_diffforce.constants import LAMBDA
from openmm_diffforce.errors import InputError
from openmm_diffforce.systems import (
    FloatArray,
    coulomb_constant,
    evaluate_frames,
    particle_masses,
    virtual_sites,
)

TEMPERATURE = 300.0
"""[K]."""
N_STATES = 19
LIGAND = "IND"
HYDROGEN_MASS = 3.0
"""[Da], taken from the heavy atom in the flexible pocket; the least mass in the rigid one."""
SUBSTITUENT_MASS = 19.0
"""[Da], of H6 where it is not constrained."""
POCKET_NM = 0.6
BACKBONE = frozenset({"N", "CA", "C", "O", "H", "HA", "HA2", "HA3", "H1", "H2", "H3", "OXT"})
CAPS = frozenset({"ACE", "NME"})
NO_INTERACTION = (0.0, 0.3, 0.0)
"""Charge, sigma [nm] and epsilon of a particle that is switched off."""


@dataclass(frozen=True)
class Variant:
    """How one case is made; see the table above.

    Attributes
    ----------
    cluster : str
        PDB file of the cut-out.
    end_x : str
        Force-field file of the ligand in end state X.
    rigid : bool
        The ligand alone moves.
    substituent : str, optional
        Element in place of H6 in ``end_x``, with its own bonded terms; none: H6 is reparametrised.
    site_nm : float, optional
        Distance of the interaction site from C6 along the C6-H6 ray, for a bond of equilibrium length.
    power : float
        ``lambda_k = (k / 18)^power``.
    """

    cluster: str
    end_x: str
    rigid: bool
    substituent: str | None = None
    site_nm: float | None = None
    power: float = 1.0


VARIANTS = {
    "c6_bonded": Variant("cluster_6A.pdb", "6-fluoroindole_full.xml", rigid=False, substituent="F"),
    "r8_bonded": Variant("cluster_8A.pdb", "6-fluoroindole_full.xml", rigid=True, substituent="F"),
    "r6_clX": Variant("cluster_6A.pdb", "6-chloroindole_nb.xml", rigid=True, site_nm=0.174, power=5.0),
    "c6_nb": Variant("cluster_6A.pdb", "6-fluoroindole_nb.xml", rigid=False),
    "r6_nbX": Variant("cluster_6A.pdb", "6-fluoroindole_nb.xml", rigid=True, site_nm=0.135, power=2.0),
}


@dataclass(frozen=True)
class IndoleCase:
    """One case, built.

    Attributes
    ----------
    name : str
    topology : openmm.app.Topology
        In the order of the PDB file; the site, where there is one, last.
    positions : numpy.ndarray, shape (n_particles, 3)
        [nm].
    system_h, system_x : openmm.System
        Complete force fields, with equal masses (0: fixed), constraints and virtual site.
    moving : tuple of int
        Particles that move, the site included.
    noised : tuple of int
        Those of them that are neither constrained nor a site: noise acts here.
    ligand : tuple of int
        The 16 atoms of the ligand.
    states : list of dict
        The 19 lambda states.
    """

    name: str
    topology: Any
    positions: FloatArray
    system_h: mm.System
    system_x: mm.System
    moving: tuple[int, ...]
    noised: tuple[int, ...]
    ligand: tuple[int, ...]
    states: list[dict[str, float]]

    @property
    def pair(self) -> EndStatePair:
        """The end states at 300 K."""
        return EndStatePair(self.system_h, self.system_x, self.topology, TEMPERATURE)

    def frames(self, x_moving: Any) -> FloatArray:
        """Positions of all particles [nm] from those of the moving ones, (n_frames, n_moving, 3).

        A virtual site is taken from its parents: single precision is not enough for its place.
        """
        x = np.repeat(self.positions[None], len(x_moving), axis=0)
        x[:, list(self.moving)] = x_moving
        for i in virtual_sites(self.system_h):
            site = self.system_h.getVirtualSite(i)
            x[:, i] = sum(site.getWeight(k) * x[:, site.getParticle(k)] for k in range(2))
        return x


def data_folder(given: str | os.PathLike[str] | None = None) -> Path:
    """The folder ``185l_indole`` of the structures.

    Parameters
    ----------
    given : path, optional
        The data directory; else DIFFFORCE_DATA, else ``shared/data`` beside the project.

    Raises
    ------
    InputError
        If a file that a case needs is not there; says which, and how to make it.
    """
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(given or os.environ.get("DIFFFORCE_DATA") or beside) / "185l_indole"
    needed = {"indole.xml"} | {n for v in VARIANTS.values() for n in (v.cluster, v.end_x)}
    for name in sorted(needed):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder / name}: not found. It is made from PDB entry 185L (185l.pdb of rcsb.org) by the "
                "scripts in 185l_indole/build, in the order of that folder's README; then name the folder "
                "that holds 185l_indole with --data or DIFFFORCE_DATA."
            )
    return folder


def indole_case(name: str, folder: Path) -> IndoleCase:
    """Build a case from the structures and parameters in ``folder`` (:func:`data_folder`).

    Raises
    ------
    InputError
        For an unknown name.
    """
    if name not in VARIANTS:
        raise InputError(f"case: expected one of {sorted(VARIANTS)}, found {name!r}.")
    variant = VARIANTS[name]
    pdb = app.PDBFile(str(folder / variant.cluster))
    topology = pdb.topology
    x = np.array(pdb.getPositions(asNumpy=True).value_in_unit(unit.nanometer))
    ends = [
        _force_field(topology, folder / "indole.xml"),
        _force_field(_substituted(topology, variant.substituent), folder / variant.end_x),
    ]
    ligand = {a.name: a.index for a in topology.atoms() if a.residue.name == LIGAND}
    c6, h6 = ligand["C6"], ligand["H6"]
    if variant.site_nm is not None:
        weight = variant.site_nm / _bond_length(ends[0], c6, h6)
        _add_site(ends, c6, h6, weight)
        topology = copy.deepcopy(topology)
        topology.addAtom("X6", None, topology.addResidue("SIT", topology.addChain()))
        x = np.vstack([x, (1 - weight) * x[c6] + weight * x[h6]])
    mobile = set(ligand.values())
    if not variant.rigid:
        mobile |= _side_chains(topology, x)
    masses = particle_masses(ends[0])
    constrained: dict[tuple[int, int], float] = {}
    if variant.rigid:
        masses = np.maximum(masses, HYDROGEN_MASS)
    else:
        free = {h6} if variant.substituent else set()
        constrained = _hydrogen_bonds(topology, ends[0], mobile, free)
        for heavy, light in constrained:
            masses[heavy] -= HYDROGEN_MASS - masses[light]
            masses[light] = HYDROGEN_MASS
    if variant.rigid or variant.substituent:
        masses[h6] = SUBSTITUENT_MASS
    for system in ends:
        for i in range(system.getNumParticles()):
            system.setParticleMass(i, masses[i] if i in mobile else 0.0)
        _constrain(system, constrained)
    held = {i for pair in constrained for i in pair}
    site = set(range(pdb.topology.getNumAtoms(), len(x)))
    return IndoleCase(
        name=name,
        topology=topology,
        positions=x,
        system_h=ends[0],
        system_x=ends[1],
        moving=tuple(sorted(mobile | site)),
        noised=tuple(sorted(mobile - held)),
        ligand=tuple(sorted(ligand.values())),
        states=lambda_states(N_STATES, variant.power),
    )


def _force_field(topology: Any, ligand: Path) -> mm.System:
    return app.ForceField("amber14-all.xml", str(ligand)).createSystem(
        topology, nonbondedMethod=app.NoCutoff, constraints=None, removeCMMotion=False
    )


def _substituted(topology: Any, element: str | None) -> Any:
    """The topology with another element in place of H6, and its name."""
    if element is None:
        return topology
    out = copy.deepcopy(topology)
    (atom,) = (a for a in out.atoms() if a.residue.name == LIGAND and a.name == "H6")
    atom.name, atom.element = f"{element}6", app.Element.getBySymbol(element)
    return out


def _only(system: mm.System, kind: type) -> Any:
    (force,) = (f for f in system.getForces() if isinstance(f, kind))
    return force


def _bonds(system: mm.System) -> list[tuple[int, int, float, float]]:
    """Atoms, length [nm] and k [kJ/mol/nm^2] of the harmonic bonds."""
    force = _only(system, mm.HarmonicBondForce)
    rows = [force.getBondParameters(i) for i in range(force.getNumBonds())]
    return [(a, b, float(r._value), float(k._value)) for a, b, r, k in rows]


def _bond_length(system: mm.System, a: int, b: int) -> float:
    return next(r for i, j, r, _ in _bonds(system) if {i, j} == {a, b})


def _side_chains(topology: Any, x: FloatArray) -> set[int]:
    """Side-chain atoms of residues with a heavy atom near the ligand's; prolines stay."""
    heavy = {r: [a.index for a in r.atoms() if a.element.symbol != "H"] for r in topology.residues()}
    centre = x[next(idx for r, idx in heavy.items() if r.name == LIGAND)]
    found: set[int] = set()
    for residue, idx in heavy.items():
        if residue.name in CAPS | {LIGAND, "PRO"}:
            continue
        if np.linalg.norm(x[idx][:, None] - centre[None], axis=2).min() <= POCKET_NM:
            found |= {a.index for a in residue.atoms() if a.name not in BACKBONE}
    return found


def _hydrogen_bonds(
    topology: Any, system: mm.System, mobile: Collection[int], free: Collection[int]
) -> dict[tuple[int, int], float]:
    """(heavy atom, hydrogen) -> length [nm] of the bonds between mobile atoms."""
    light = {a.index for a in topology.atoms() if a.element is not None and a.element.symbol == "H"}
    found = {}
    for a, b, length, _ in _bonds(system):
        heavy, hydrogen = (a, b) if b in light else (b, a)
        if hydrogen in light and hydrogen not in free and {a, b} <= set(mobile):
            found[heavy, hydrogen] = length
    return found


def _constrain(system: mm.System, constrained: dict[tuple[int, int], float]) -> None:
    """Constraints in place of bond terms."""
    force = _only(system, mm.HarmonicBondForce)
    for i in range(force.getNumBonds()):
        a, b, length, _ = force.getBondParameters(i)
        if (a, b) in constrained or (b, a) in constrained:
            force.setBondParameters(i, a, b, length, 0.0)
    for (a, b), length in constrained.items():
        system.addConstraint(a, b, length)


def _add_site(ends: list[mm.System], c6: int, h6: int, weight: float) -> None:
    """A site on the C6-H6 ray, silent in H; in X it has H6's interactions, and H6 none."""
    for end, system in enumerate(ends):
        site = system.addParticle(0.0)
        system.setVirtualSite(site, mm.TwoParticleAverageSite(c6, h6, 1 - weight, weight))
        force = _only(system, mm.NonbondedForce)
        force.addParticle(*(force.getParticleParameters(h6) if end else NO_INTERACTION))
        if end:
            force.setParticleParameters(h6, *NO_INTERACTION)
        for i in range(force.getNumExceptions()):
            a, b, *values = force.getExceptionParameters(i)
            if h6 in (a, b):
                force.addException(site, b if a == h6 else a, *(values if end else NO_INTERACTION))
                if end:
                    force.setExceptionParameters(i, a, b, *NO_INTERACTION)
        force.addException(site, h6, *NO_INTERACTION)


def sampling_system(case: IndoleCase, parameter: str = LAMBDA) -> mm.System:
    r"""One System with U = (1 - lambda) U_H + lambda U_X + constant, for fast windows on a CPU.

    Terms between fixed particles alone are left out: they are the constant. The pairs of a rigid
    pocket are listed one by one:

    .. math:: U = \sum_{ij} \frac{q_{ij} + \lambda\,\Delta q_{ij}}{4\pi\epsilon_0 r}
              + \frac{C_{12} + \lambda\,\Delta C_{12}}{r^{12}} - \frac{C_6 + \lambda\,\Delta C_6}{r^6}

    In a flexible pocket a NonbondedForce has all charges, and the list only the pairs whose
    Lennard-Jones energy changes. It stays linear because pairs of two changing charges are exceptions.

    Parameters
    ----------
    case : IndoleCase
    parameter : str
        Name of the context parameter; its default value is 0.

    Returns
    -------
    openmm.System
    """
    mixed = case.pair.linear_system(parameter=parameter)
    moving = set(case.moving)
    kept = []
    for force in mixed.getForces():
        if type(force) in _BONDED:
            kept.append(_moving_terms(force, moving))
        elif not isinstance(force, mm.NonbondedForce) and force.getName() != "linear mix of NonbondedForce":
            kept.append(copy.deepcopy(force))
    ends = [_only(s, mm.NonbondedForce) for s in (case.system_h, case.system_x)]
    if VARIANTS[case.name].rigid:
        kept.append(_listed_pairs(ends, moving, parameter))
    else:
        kept += _mixed_pocket(ends, moving, set(case.ligand), parameter)
    for i in reversed(range(mixed.getNumForces())):
        mixed.removeForce(i)
    for force in kept:
        mixed.addForce(force)
    return mixed


_BONDED = {
    mm.HarmonicBondForce: ("Bond", 2),
    mm.HarmonicAngleForce: ("Angle", 3),
    mm.PeriodicTorsionForce: ("Torsion", 4),
}


def _moving_terms(force: Any, moving: set[int]) -> mm.Force:
    """The bonded terms that a moving particle has a part in, and that are not switched off."""
    what, n_atoms = _BONDED[type(force)]
    out = type(force)()
    for i in range(getattr(force, f"getNum{what}s")()):
        term = getattr(force, f"get{what}Parameters")(i)
        if moving.intersection(term[:n_atoms]) and term[-1]._value != 0:
            getattr(out, f"add{what}")(*term)
    return out


Pair = tuple[int, int]


def _pair_terms(force: mm.NonbondedForce, pairs: list[Pair]) -> FloatArray:
    """Charge product / (4 pi eps_0), C12 and C6 of pairs (a < b), exceptions included: (n_pairs, 3)."""
    own = [[v._value for v in force.getParticleParameters(i)] for i in range(force.getNumParticles())]
    exceptions = {}
    for i in range(force.getNumExceptions()):
        a, b, *values = force.getExceptionParameters(i)
        exceptions[min(a, b), max(a, b)] = [v._value for v in values]
    out = np.empty((len(pairs), 3))
    for row, (a, b) in zip(out, pairs, strict=True):
        if (a, b) in exceptions:
            qq, sigma, epsilon = exceptions[a, b]
        else:
            qq = own[a][0] * own[b][0]
            sigma, epsilon = 0.5 * (own[a][1] + own[b][1]), np.sqrt(own[a][2] * own[b][2])
        row[:] = coulomb_constant() * qq, 4 * epsilon * sigma**12, 4 * epsilon * sigma**6
    return out


def _bond_list(
    expression: str, pairs: list[Pair], columns: dict[str, FloatArray], parameter: str
) -> mm.Force:
    force = mm.CustomBondForce(expression.format(lam=parameter) + "; s=1/r^6")
    force.addGlobalParameter(parameter, 0.0)
    for name in columns:
        force.addPerBondParameter(name)
    for pair, values in zip(pairs, np.column_stack(list(columns.values())), strict=True):
        if values.any():
            force.addBond(*pair, values)
    return force


def _listed_pairs(ends: list[mm.NonbondedForce], moving: set[int], parameter: str) -> mm.Force:
    """All pairs with a moving particle."""
    n = ends[0].getNumParticles()
    pairs = [(a, b) for a in range(n) for b in range(a + 1, n) if a in moving or b in moving]
    h, x = (_pair_terms(force, pairs) for force in ends)
    columns = dict(zip(("qq", "c12", "c6"), h.T, strict=True))
    columns |= dict(zip(("dqq", "dc12", "dc6"), (x - h).T, strict=True))
    expression = "(qq+{lam}*dqq)/r + (c12+{lam}*dc12)*s^2 - (c6+{lam}*dc6)*s"
    return _bond_list(expression, pairs, columns, parameter)


def _mixed_pocket(
    ends: list[mm.NonbondedForce], moving: set[int], ligand: set[int], parameter: str
) -> list[mm.Force]:
    """Charges of both ends in one NonbondedForce, and the Lennard-Jones pairs that change."""
    force = copy.deepcopy(ends[0])
    n = force.getNumParticles()
    force.addGlobalParameter(parameter, 0.0)
    for i in sorted(ligand):
        charge, charge_x = (end.getParticleParameters(i)[0] for end in ends)
        force.addParticleParameterOffset(parameter, i, charge_x - charge, 0.0, 0.0)
    fixed = sorted(set(range(n)) - moving)
    for k, a in enumerate(fixed):
        for b in fixed[k + 1 :]:
            force.addException(a, b, *NO_INTERACTION, replace=True)
    inside = [(a, b) for a in sorted(ligand) for b in sorted(ligand) if a < b]
    h, x = (_pair_terms(end, inside) for end in ends)
    for (a, b), (qq, c12, c6), (qq_x, _, _) in zip(inside, h, x, strict=True):
        sigma, epsilon = ((c12 / c6) ** (1 / 6), 0.25 * c6**2 / c12) if c12 else NO_INTERACTION[1:]
        index = force.addException(a, b, qq / coulomb_constant(), sigma, epsilon, replace=True)
        change = (qq_x - qq) / coulomb_constant()
        force.addExceptionParameterOffset(parameter, index, change, 0.0, 0.0)
    pairs = [(a, b) for a in range(n) for b in range(a + 1, n) if a in ligand or b in ligand]
    h, x = (_pair_terms(end, pairs)[:, 1:] for end in ends)
    columns = dict(zip(("dc12", "dc6"), (x - h).T, strict=True))
    return [force, _bond_list("{lam}*(dc12*s^2 - dc6*s)", pairs, columns, parameter)]


def compare_with_scripts(case: IndoleCase, folder: Path, x_nad: FloatArray) -> dict[str, float]:
    """Hold a case against the scripts that came with the structures, at given frames.

    Parameters
    ----------
    case : IndoleCase
    folder : Path
        With ``build/alchemy.py`` and ``build/rigid.py``.
    x_nad : numpy.ndarray, shape (n_frames, n_particles, 3)
        [nm].

    Returns
    -------
    dict
        Largest deviations [kJ/mol]: ``operator`` of U_X - U_H and ``energy`` of U_H (up to a constant)
        from the scripts; ``sampling`` of U_X - U_H in the sampling System from the complete one,
        ``linear`` of it from linearity, ``constant`` of its U_H from U_H. ``mass``: [Da]. ``constraints``:
        pairs that only one of the two constrains.
    """
    variant = VARIANTS[case.name]
    script, order = _script_system(case, variant, folder)
    own = [evaluate_frames(s, x_nad)[0] for s in (case.system_h, case.system_x)]
    theirs = [evaluate_frames(script, x_nad[:, order], parameters={"lam": v})[0] for v in (0.0, 1.0)]
    fast = sampling_system(case)
    low, between, high = (evaluate_frames(fast, x_nad, parameters={LAMBDA: v})[0] for v in (0.0, 0.375, 1.0))
    masses = particle_masses(case.system_h)[order]
    pairs = [
        {frozenset(map(int, s.getConstraintParameters(i)[:2])) for i in range(s.getNumConstraints())}
        for s in (case.system_h, script)
    ]
    return {
        "operator": float(np.abs(theirs[1] - theirs[0] - (own[1] - own[0])).max()),
        "energy": float(np.ptp(theirs[0] - own[0])),
        "sampling": float(np.abs(high - low - (own[1] - own[0])).max()),
        "linear": float(np.abs(between - 0.625 * low - 0.375 * high).max()),
        "constant": float(np.ptp(low - own[0])),
        "mass": float(np.abs(particle_masses(script) - masses).max()),
        "constraints": float(len(pairs[0] ^ pairs[1])),
    }


def _script_system(case: IndoleCase, variant: Variant, folder: Path) -> tuple[mm.System, list[int]]:
    """The System of the scripts, and our particle for each of theirs."""
    reparametrised = variant.end_x.replace("_full", "_nb")
    files = [str(folder / name) for name in (variant.cluster, "indole.xml", reparametrised)]
    bonded = str(folder / variant.end_x) if variant.substituent else None
    sites = virtual_sites(case.system_h)
    others = sorted(set(range(len(case.positions))) - {*case.ligand, *sites})
    sys.path.insert(0, str(folder / "build"))
    try:
        scripts = importlib.import_module("rigid" if variant.rigid else "alchemy")
        if variant.rigid:
            system = scripts.make_rigid(*files, cx_nm=variant.site_nm, bonded_B=bonded)[0]
            return system, [*case.ligand, *sites, *others]
        return scripts.make(*files, bonded_B=bonded)[2], list(range(len(case.positions)))
    finally:
        sys.path.remove(str(folder / "build"))
