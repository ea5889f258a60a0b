"""Reading OpenMM Systems: what is in them, what they give at frames, whether two are one molecule.

Only Systems of classical forces are cloned here. A learned force (TorchForce, PythonForce)
cannot be deserialized by OpenMM, so it is refused by name instead of crashing.
"""

import copy
import functools
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import openmm as mm
from openmm import unit

from .constants import RESTRAINT_GROUP
from .errors import ConvergenceError, IncompatibleSystemError, InputError
from .models.graph import MolecularGraph
from .units import thermal_energy, to_md

FloatArray = npt.NDArray[np.float64]

CLASSICAL_FORCES = frozenset(
    {
        "HarmonicBondForce",
        "HarmonicAngleForce",
        "PeriodicTorsionForce",
        "RBTorsionForce",
        "CMAPTorsionForce",
        "NonbondedForce",
        "GBSAOBCForce",
        "CustomBondForce",
        "CustomAngleForce",
        "CustomTorsionForce",
        "CustomCompoundBondForce",
        "CustomCentroidBondForce",
        "CustomExternalForce",
        "CustomNonbondedForce",
        "CustomGBForce",
        "CustomCVForce",
        "RMSDForce",
    }
)
"""Forces that have an energy and survive an XML round trip."""

BOOKKEEPING_FORCES = frozenset(
    {
        "CMMotionRemover",
        "AndersenThermostat",
        "MonteCarloBarostat",
        "MonteCarloAnisotropicBarostat",
        "MonteCarloMembraneBarostat",
        "MonteCarloFlexibleBarostat",
    }
)
"""Forces without an energy: they act on momenta or on the box."""

LEARNED_FORCES = frozenset({"TorchForce", "PythonForce", "DiffusionForce"})
"""Forces that OpenMM cannot deserialize."""

SMALL_SYSTEM = 200
"""Below this many particles :func:`default_platform` is Reference."""


def force_type(force: Any) -> str:
    """OpenMM class name of a force; subclasses and foreign plugins are named by what they are.

    Examples
    --------
    >>> import openmm
    >>> force_type(openmm.HarmonicBondForce())
    'HarmonicBondForce'
    """
    if type(force).__name__ != "Force":
        return type(force).__name__
    # A plugin force without its Python module imported comes back as a bare Force.
    return str(force.getName())


@dataclass(frozen=True)
class SystemSummary:
    """What a System holds: see :func:`describe`.

    Attributes
    ----------
    n_particles : int
    forces : tuple of str
        Class names in order.
    n_constraints : int
    constrained : tuple of int
        Particles in a constraint.
    virtual_sites : tuple of int
    massless : tuple of int
        Particles of zero mass that are not virtual sites (OpenMM holds them fixed).
    periodic : bool
    unknown_forces : tuple of str
        Forces that are on no white list.
    """

    n_particles: int
    forces: tuple[str, ...]
    n_constraints: int
    constrained: tuple[int, ...]
    virtual_sites: tuple[int, ...]
    massless: tuple[int, ...]
    periodic: bool
    unknown_forces: tuple[str, ...]


def _check_system(system: Any, *, name: str = "system") -> mm.System:
    if not isinstance(system, mm.System):
        raise InputError(f"{name}: expected an openmm.System, found {type(system).__name__}.")
    if system.getNumParticles() == 0:
        raise InputError(f"{name}: expected a System with particles, found an empty one.")
    return system


def constrained_atoms(system: mm.System) -> tuple[int, ...]:
    """Indices of the particles that take part in a distance constraint, ascending.

    Examples
    --------
    >>> import openmm
    >>> system = openmm.System()
    >>> _ = [system.addParticle(1.0) for _ in range(3)]
    >>> _ = system.addConstraint(0, 2, 0.1)
    >>> constrained_atoms(system)
    (0, 2)
    """
    atoms: set[int] = set()
    for i in range(_check_system(system).getNumConstraints()):
        a, b, _ = system.getConstraintParameters(i)
        atoms |= {int(a), int(b)}
    return tuple(sorted(atoms))


def virtual_sites(system: mm.System) -> tuple[int, ...]:
    """Indices of the virtual sites, ascending."""
    n = _check_system(system).getNumParticles()
    return tuple(i for i in range(n) if system.isVirtualSite(i))


def massless_atoms(system: mm.System) -> tuple[int, ...]:
    """Indices of zero-mass particles that are not virtual sites, ascending."""
    masses = particle_masses(system)
    return tuple(i for i in range(len(masses)) if masses[i] == 0.0 and not system.isVirtualSite(i))


def particle_masses(system: mm.System) -> FloatArray:
    """Masses [Da], shape (n_particles,)."""
    n = _check_system(system).getNumParticles()
    return np.array([system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(n)])


def describe(system: mm.System) -> SystemSummary:
    """Say what a System holds; never raises for an unknown force, it names it.

    Parameters
    ----------
    system : openmm.System

    Returns
    -------
    SystemSummary

    Raises
    ------
    InputError
        If ``system`` is not a System, or has no particles.
    """
    names = tuple(force_type(f) for f in _check_system(system).getForces())
    known = CLASSICAL_FORCES | BOOKKEEPING_FORCES | LEARNED_FORCES
    return SystemSummary(
        n_particles=system.getNumParticles(),
        forces=names,
        n_constraints=system.getNumConstraints(),
        constrained=constrained_atoms(system),
        virtual_sites=virtual_sites(system),
        massless=massless_atoms(system),
        periodic=_is_periodic(system),
        unknown_forces=tuple(n for n in names if n not in known),
    )


def _is_periodic(system: mm.System) -> bool:
    for force in system.getForces():
        try:
            if force.usesPeriodicBoundaryConditions():
                return True
        except mm.OpenMMException:  # a force that cannot say does not use the box
            continue
    return False


def clone_system(system: mm.System) -> mm.System:
    """A deep copy of a System of classical forces.

    Raises
    ------
    IncompatibleSystemError
        If the System holds a force that is not on the white list: a learned force cannot be
        deserialized by OpenMM (it fails or crashes), an unknown one might not be.

    Examples
    --------
    >>> import openmm
    >>> system = openmm.System()
    >>> _ = system.addParticle(1.0)
    >>> clone_system(system).getNumParticles()
    1
    """
    require_classical(system)
    return copy.deepcopy(system)


def require_classical(system: mm.System, *, name: str = "system") -> None:
    """Refuse a System with learned or unknown forces.

    Raises
    ------
    IncompatibleSystemError
        With the names of the forces.
    """
    allowed = CLASSICAL_FORCES | BOOKKEEPING_FORCES
    foreign = [n for n in describe(_check_system(system, name=name)).forces if n not in allowed]
    if foreign:
        raise IncompatibleSystemError(
            f"{name}: expected classical forces only, found {', '.join(foreign)}; pass the System "
            "without them (a learned force is rebuilt from its artefact and added last)."
        )


def require_unconstrained(
    system: mm.System, atoms: Sequence[int] | None = None, *, name: str = "system"
) -> None:
    """Refuse constrained, virtual or massless atoms: their density is singular.

    Parameters
    ----------
    system : openmm.System
    atoms : sequence of int, optional
        The atoms that matter; all particles if omitted.
    name : str
        Used in the message.

    Raises
    ------
    IncompatibleSystemError
        With the offending atoms and the cure.
    """
    subset = set(range(_check_system(system, name=name).getNumParticles()))
    if atoms is not None:
        subset = {int(a) for a in atoms}
    for what, found, cure in (
        ("constrained", constrained_atoms(system), "create the System with constraints=None, "
         "rigidWater=False"),
        ("virtual-site", virtual_sites(system), "leave them out of the atom subset"),
        ("massless", massless_atoms(system), "give them a mass, or leave them out of the subset"),
    ):  # fmt: skip
        bad = sorted(subset & set(found))
        if bad:
            shown = f"{bad[:8]}{' ...' if len(bad) > 8 else ''}"
            raise IncompatibleSystemError(
                f"{name}: expected unconstrained massive atoms, found {len(bad)} {what} atoms "
                f"{shown}; {cure}."
            )


def check_same_particles(system_0: mm.System, system_1: mm.System) -> None:
    """Check that two Systems are two Hamiltonians of the same particles.

    Compared: number of particles, masses, constraints (pairs and lengths), virtual sites, and
    whether both use the periodic box, with equal default box vectors.

    Raises
    ------
    IncompatibleSystemError
        At the first difference, with both values.
    """
    n_0 = _check_system(system_0, name="system_0").getNumParticles()
    n_1 = _check_system(system_1, name="system_1").getNumParticles()
    if n_0 != n_1:
        raise IncompatibleSystemError(
            f"end states: expected the same number of particles, found {n_0} and {n_1}; build one "
            "System that holds the atoms of both, with dummy atoms where one lacks them."
        )
    mass_0, mass_1 = particle_masses(system_0), particle_masses(system_1)
    if not np.array_equal(mass_0, mass_1):
        i = int(np.flatnonzero(mass_0 != mass_1)[0])
        raise IncompatibleSystemError(
            f"end states: expected equal masses, found {mass_0[i]} and {mass_1[i]} Da at particle "
            f"{i}; give both the same masses (Delta f does not depend on them)."
        )
    if virtual_sites(system_0) != virtual_sites(system_1):
        raise IncompatibleSystemError(
            f"end states: expected the same virtual sites, found {virtual_sites(system_0)} and "
            f"{virtual_sites(system_1)}."
        )
    cons_0, cons_1 = _constraints(system_0), _constraints(system_1)
    if cons_0 != cons_1:
        pair = sorted(set(cons_0.items()) ^ set(cons_1.items()))[0]
        raise IncompatibleSystemError(
            f"end states: expected the same constraints, found {len(cons_0)} and {len(cons_1)}, "
            f"differing at {pair}; create both Systems with constraints=None."
        )
    periodic_0, periodic_1 = _is_periodic(system_0), _is_periodic(system_1)
    if periodic_0 != periodic_1:
        raise IncompatibleSystemError(
            f"end states: expected both periodic or neither, found {periodic_0} and {periodic_1}."
        )
    if periodic_0:
        box_0, box_1 = _default_box(system_0), _default_box(system_1)
        if not np.array_equal(box_0, box_1):
            raise IncompatibleSystemError(
                f"end states: expected equal default boxes, found {box_0.tolist()} and {box_1.tolist()} nm."
            )


def _constraints(system: mm.System) -> dict[tuple[int, int], float]:
    found = {}
    for i in range(system.getNumConstraints()):
        a, b, length = system.getConstraintParameters(i)
        found[(min(a, b), max(a, b))] = float(length.value_in_unit(unit.nanometer))
    return found


def _default_box(system: mm.System) -> FloatArray:
    vectors = system.getDefaultPeriodicBoxVectors()
    return np.array([list(v.value_in_unit(unit.nanometer)) for v in vectors])


FLAT_BOTTOM_TORSION = "flat-bottom torsion"
"""Name of the force that :func:`add_flat_bottom_torsion` adds."""

CONNECTIVITY = "connectivity of removed bonds"
"""Name of the force that :func:`remove_subset_terms` leaves behind."""

# Bonded forces: what their terms are called in OpenMM's XML.
_BONDED_TERMS = {
    "HarmonicBondForce": "Bonds",
    "HarmonicAngleForce": "Angles",
    "PeriodicTorsionForce": "Torsions",
    "RBTorsionForce": "Torsions",
    "CMAPTorsionForce": "Torsions",
    "CustomBondForce": "Bonds",
    "CustomAngleForce": "Angles",
    "CustomTorsionForce": "Torsions",
    "CustomCompoundBondForce": "Bonds",
}

# One-particle terms are a field that the molecule sits in, not an interaction inside it.
_FIELDS = frozenset({"CustomExternalForce"})

_PERIODIC_METHODS = frozenset(
    {mm.NonbondedForce.CutoffPeriodic, mm.NonbondedForce.Ewald, mm.NonbondedForce.PME}
)


@dataclass(frozen=True)
class SubsetTerms:
    """A System taken apart: see :func:`remove_subset_terms`.

    Attributes
    ----------
    system : openmm.System
        Without the terms inside the subset. Forces keep their indices; a last one without
        energy, named :data:`CONNECTIVITY`, tells OpenMM which atoms are one molecule.
    inside : tuple of openmm.Force
        The removed terms. The energy of ``system`` plus theirs is that of the original.
    removed : dict of str to int
        How many terms were taken out of each force, by ``"<index> <name>"``.
    """

    system: mm.System
    inside: tuple[mm.Force, ...]
    removed: dict[str, int]


def remove_subset_terms(
    system: mm.System, atoms: Sequence[int], *, keep: Collection[int | str] | None = None
) -> SubsetTerms:
    r"""Take the classical interactions inside an atom subset out of a System, exactly.

    .. math:: U(x) = U_{\mathrm{rest}}(x) + U_{\mathrm{inside}}(x_{\mathrm{subset}})

    ===================================  ====================================================
    force                                what is inside
    ===================================  ====================================================
    harmonic bond and angle, periodic    terms all of whose atoms are in the subset
    and RB torsion, CMAP
    NonbondedForce                       pairs and 1-4 pairs in the subset; they become
                                         exclusions. With Ewald and PME the pair's reciprocal
                                         part goes too, its periodic images stay
    CustomNonbondedForce                 pairs in the subset (and in its interaction groups)
    custom bond, angle, torsion,         terms all of whose atoms are in the subset; ``keep``
    compound bond                        must say what they are
    CustomExternalForce                  nothing: a field from outside
    thermostats, barostats, removal of   nothing
    centre-of-mass motion
    implicit solvent, centroid bonds,    cannot be divided: refused, unless in ``keep``
    RMSD, collective variables
    ===================================  ====================================================

    Terms that cross the boundary stay, and so does the long-range dispersion correction: it
    averages over all pairs of the box beyond the cutoff and does not know exclusions.

    Parameters
    ----------
    system : openmm.System
        Of classical forces; not changed.
    atoms : sequence of int
        The subset.
    keep : collection of int or str, optional
        Forces, by index or by name, that are left whole: restraints. A custom bonded term may be
        the molecule's physics (CHARMM's impropers) or a restraint on it, so without ``keep`` a
        System that has such terms inside is refused; ``keep=[]`` removes them all. What
        :func:`add_flat_bottom_torsion` added always stays.

    Returns
    -------
    SubsetTerms

    Raises
    ------
    IncompatibleSystemError
        For learned, unknown or indivisible forces, LJPME, parameter offsets on the subset, custom
        bonded terms of unknown purpose, and constrained, massless or virtual atoms in the subset
        or virtual sites that ride on it.
    InputError
        For atoms or entries of ``keep`` that the System does not have.

    Notes
    -----
    With a periodic NonbondedForce its exceptions use periodic distances afterwards. For whole
    molecules that changes nothing; for wrapped ones the exclusions stay right. Not checked: that
    the subset is smaller than half the box.

    Examples
    --------
    >>> from openmm_diffforce.alanine import alanine_dipeptide
    >>> _, x, system = alanine_dipeptide()
    >>> terms = remove_subset_terms(system, range(22))
    >>> terms.removed["0 HarmonicBondForce"], float(potential_energies(terms.system, x)[0])
    (21, 0.0)
    """
    require_classical(system)
    chosen = _check_subset(system, atoms)
    kept = _kept_forces(system, keep)
    forces: list[mm.Force] = []
    inside: list[mm.Force] = []
    removed: dict[str, int] = {}
    bonds: list[tuple[int, ...]] = []
    for i, force in enumerate(system.getForces()):
        name = force_type(force)
        label = f"{i} {force.getName()}"
        if i in kept or name in BOOKKEEPING_FORCES or name in _FIELDS:
            forces.append(copy.deepcopy(force))
            continue
        if name == "NonbondedForce":
            rest, out, n = _split_nonbonded(force, chosen, label)
        elif name == "CustomNonbondedForce":
            rest, out, n = _split_custom_nonbonded(force, chosen)
        elif name in _BONDED_TERMS:
            rest, out, terms = _split_bonded(force, chosen)
            n = len(terms)
            if n and name.startswith("Custom") and keep is None:
                raise IncompatibleSystemError(
                    f"force {label} ({name}): has {n} terms inside the subset, which may be the "
                    "molecule's own interactions or a restraint on it; say which: "
                    f"keep=[{i}] leaves the force as it is, keep=[] removes the terms."
                )
            bonds += [t for t in terms if len(t) == 2]
        else:
            raise IncompatibleSystemError(
                f"force {label} ({name}): cannot be divided into terms inside and outside a "
                f"subset; remove it from the System, or leave it whole with keep=[{i}], which is "
                "right for a restraint, and for a solvent model that the learned action lacks."
            )
        forces.append(rest)
        inside += out
        if n:
            removed[label] = n
    out_system = clone_system(system)
    for i in reversed(range(out_system.getNumForces())):
        out_system.removeForce(i)
    for force in forces:
        out_system.addForce(force)
    if bonds:
        # Barostats and wrapping look at bonds to see what a molecule is.
        connectivity = mm.HarmonicBondForce()
        connectivity.setName(CONNECTIVITY)
        for a, b in bonds:
            connectivity.addBond(a, b, 0.0, 0.0)
        out_system.addForce(connectivity)
    return SubsetTerms(system=out_system, inside=tuple(inside), removed=removed)


def _check_subset(system: mm.System, atoms: Sequence[int]) -> set[int]:
    n = system.getNumParticles()
    idx = np.asarray(atoms)
    if idx.ndim != 1 or idx.size == 0 or not np.issubdtype(idx.dtype, np.integer):
        raise InputError(f"atoms: expected a list of indices, found {atoms!r}.")
    chosen = {int(a) for a in idx}
    if len(chosen) != idx.size or min(chosen) < 0 or max(chosen) >= n:
        raise InputError(f"atoms: expected different indices in [0, {n}), found {sorted(idx.tolist())}.")
    require_unconstrained(system, sorted(chosen))
    for v in virtual_sites(system):
        site = system.getVirtualSite(v)
        if chosen & {site.getParticle(k) for k in range(site.getNumParticles())}:
            raise IncompatibleSystemError(
                f"virtual site {v}: rides on atoms of the subset, and carries part of their "
                "interactions; use a force field without it for this molecule."
            )
    return chosen


def _kept_forces(system: mm.System, keep: Collection[int | str] | None) -> set[int]:
    forces = list(system.getForces())
    kept = {i for i, f in enumerate(forces) if f.getName() == FLAT_BOTTOM_TORSION}
    if isinstance(keep, str | int):
        keep = [keep]
    for entry in keep if keep is not None else ():
        # Equal, not converted: 1.5 is no index.
        found = {i for i, f in enumerate(forces) if entry in (i, f.getName())}
        if not found:
            raise InputError(
                f"keep: expected indices or names of the System's forces, found {entry!r}; it has "
                f"{', '.join(f'{i} {f.getName()}' for i, f in enumerate(forces))}."
            )
        kept |= found
    return kept


def _split_bonded(
    force: mm.Force, chosen: set[int]
) -> tuple[mm.Force, list[mm.Force], list[tuple[int, ...]]]:
    """The force without and with nothing but its terms inside, and the atoms of those.

    Through OpenMM's own XML, because most forces have no method that removes a term, and because
    it keeps everything else of them, numbers to the last bit.
    """
    text = mm.XmlSerializer.serialize(force)
    roots = [ET.fromstring(text) for _ in range(2)]
    tag = _BONDED_TERMS[force_type(force)]
    found: list[tuple[int, ...]] = []
    for is_inside, root in enumerate(roots):
        terms = root.find(tag)
        assert terms is not None  # OpenMM writes the list even if it is empty
        for term in list(terms):
            atoms = tuple(int(v) for k, v in term.attrib.items() if re.fullmatch(r"[pab]\d+", k))
            if chosen.issuperset(atoms) != bool(is_inside):
                terms.remove(term)
            elif is_inside:
                found.append(atoms)
    rest, inside = (mm.XmlSerializer.deserialize(ET.tostring(r, encoding="unicode")) for r in roots)
    return rest, [inside] if found else [], found


def _split_nonbonded(
    force: mm.NonbondedForce, chosen: set[int], label: str
) -> tuple[mm.Force, list[mm.Force], int]:
    """Pairs inside become exclusions; their energy, as this force computes it, CustomBondForces."""
    method = force.getNonbondedMethod()
    if method == mm.NonbondedForce.LJPME or not force.getIncludeDirectSpace():
        raise IncompatibleSystemError(
            f"force {label}: with LJPME, or without direct space, an exclusion does not take a pair "
            "out exactly; create the System with PME."
        )
    rows = [[float(v._value) for v in force.getParticleParameters(i)] for i in range(force.getNumParticles())]
    known = {}
    for i in range(force.getNumExceptions()):
        a, b, *values = force.getExceptionParameters(i)
        if a in chosen and b in chosen:
            known[min(a, b), max(a, b)] = (i, [float(v._value) for v in values])
    offset = {force.getParticleParameterOffset(i)[1] for i in range(force.getNumParticleParameterOffsets())}
    own = {i for i, _ in known.values()}
    pair_offset = {
        force.getExceptionParameterOffset(i)[1] for i in range(force.getNumExceptionParameterOffsets())
    }
    if offset & chosen or pair_offset & own:
        raise IncompatibleSystemError(
            f"force {label}: has parameter offsets on atoms of the subset, so that its pairs depend on "
            "a context parameter; set the charges and Lennard-Jones parameters that are wanted."
        )
    rest = copy.deepcopy(force)
    periodic = method in _PERIODIC_METHODS
    if periodic:
        rest.setExceptionsUsePeriodicBoundaryConditions(True)
    pairs, bonded = _pair_force(force), mm.CustomBondForce(f"qq/r + {_LJ}")
    bonded.setUsesPeriodicBoundaryConditions(rest.getExceptionsUsePeriodicBoundaryConditions())
    for out in (pairs, bonded):
        out.setForceGroup(force.getForceGroup())
        for name in ("qq", "sigma", "epsilon"):
            out.addPerBondParameter(name)
    n = 0
    order = sorted(chosen)
    for k, a in enumerate(order):
        for b in order[k + 1 :]:
            if (a, b) in known:
                i, (qq, sigma, eps) = known[a, b]
                rest.setExceptionParameters(i, a, b, 0.0, sigma, 0.0)
                out = bonded
            else:
                qq = rows[a][0] * rows[b][0]
                sigma = 0.5 * (rows[a][1] + rows[b][1])
                eps = math.sqrt(rows[a][2] * rows[b][2])
                rest.addException(a, b, 0.0, sigma, 0.0)
                out = pairs
            if qq != 0.0 or eps != 0.0:
                out.addBond(a, b, [coulomb_constant() * qq, sigma, eps])
                n += 1
    return rest, [f for f in (pairs, bonded) if f.getNumBonds()], n


_LJ = "4*epsilon*((sigma/r)^12 - (sigma/r)^6)"


def _pair_force(force: mm.NonbondedForce) -> mm.CustomBondForce:
    """The energy of one pair under this force's cutoff, as a bond."""
    method = force.getNonbondedMethod()
    rc = float(force.getCutoffDistance()._value)
    lj = _LJ
    if method == mm.NonbondedForce.NoCutoff:
        coulomb = "qq/r"
    else:
        if force.getUseSwitchingFunction():
            rs = float(force.getSwitchingDistance()._value)
            lj = f"switch*{lj}; switch=1 + step(u)*u^3*(-10 + u*(15 - 6*u)); u=(r - {rs!r})/{rc - rs!r}"
        lj = f"step({rc!r} - r)*{lj}"
        if method in (mm.NonbondedForce.Ewald, mm.NonbondedForce.PME):
            # Within the cutoff the direct and reciprocal parts are all of qq/r; beyond it the
            # direct part was missing.
            alpha = float(force.getPMEParameters()[0]._value)
            if alpha == 0.0:
                alpha = math.sqrt(-math.log(2.0 * force.getEwaldErrorTolerance())) / rc
            coulomb = f"qq/r*(1 - step(r - {rc!r})*erfc({alpha!r}*r))"
        else:
            dielectric = float(force.getReactionFieldDielectric())
            k = (dielectric - 1.0) / (2.0 * dielectric + 1.0) / rc**3
            c = 3.0 * dielectric / (2.0 * dielectric + 1.0) / rc
            coulomb = f"step({rc!r} - r)*qq*(1/r + {k!r}*r^2 - {c!r})"
    out = mm.CustomBondForce(f"{coulomb} + {lj}")
    out.setUsesPeriodicBoundaryConditions(method in _PERIODIC_METHODS)
    return out


def _split_custom_nonbonded(
    force: mm.CustomNonbondedForce, chosen: set[int]
) -> tuple[mm.Force, list[mm.Force], int]:
    """Pairs inside become exclusions; the same force on an interaction group holds their energy."""
    rest, inside = copy.deepcopy(force), copy.deepcopy(force)
    inside.setUseLongRangeCorrection(False)  # an average over the box, which stays where it was
    known = {frozenset(force.getExclusionParticles(i)) for i in range(force.getNumExclusions())}
    groups = [force.getInteractionGroupParameters(i) for i in range(force.getNumInteractionGroups())]
    mine = [(set(a) & chosen, set(b) & chosen) for a, b in groups]
    for i, (left, right) in enumerate(mine):
        inside.setInteractionGroupParameters(i, left, right)
    if not groups:
        mine = [(chosen, chosen)]
        inside.addInteractionGroup(chosen, chosen)
    n = 0
    order = sorted(chosen)
    for k, a in enumerate(order):
        for b in order[k + 1 :]:
            if frozenset((a, b)) not in known:
                rest.addExclusion(a, b)
                n += any((a in one and b in two) or (b in one and a in two) for one, two in mine)
    return rest, [inside] if n else [], n


def default_platform(n_particles: int) -> str:
    """Platform that is fastest for a System of this size on a CPU.

    Below 200 particles the single-threaded Reference platform wins by an order of magnitude:
    the CPU platform pays for threads and neighbour lists at every step (22 atoms: 130k against
    8k steps/s). It also works in float64 throughout, so small runs are exactly repeatable.

    Examples
    --------
    >>> default_platform(22), default_platform(20000)
    ('Reference', 'CPU')
    """
    return "Reference" if n_particles < SMALL_SYSTEM else "CPU"


def get_platform(platform: str | None, n_particles: int) -> mm.Platform:
    """An OpenMM Platform by name, ``None`` for :func:`default_platform`.

    Raises
    ------
    InputError
        If the platform is not installed; the message lists those that are.
    """
    name = default_platform(n_particles) if platform is None else platform
    names = [mm.Platform.getPlatform(i).getName() for i in range(mm.Platform.getNumPlatforms())]
    if name not in names:
        raise InputError(f"platform: expected one of {names}, found {name!r}.")
    return mm.Platform.getPlatformByName(name)


def check_frames(x_nad: Any, n_atoms: int, *, name: str = "positions", single: bool = False) -> FloatArray:
    """Check positions at the door.

    Parameters
    ----------
    x_nad : array_like or Quantity
        [nm], shape (n_frames, n_atoms, 3); shape (n_atoms, 3) is one frame.
    n_atoms : int
    name : str
        Used in the message.
    single : bool
        Expect one frame and return shape (n_atoms, 3).

    Returns
    -------
    numpy.ndarray
        float64 [nm], shape (n_frames, n_atoms, 3), or (n_atoms, 3) if ``single``.

    Raises
    ------
    InputError
        For another shape or a number that is not finite.
    UnitsError
        For a Quantity that is not a length.
    """
    value = to_md(x_nad, unit.nanometer, name=name)
    try:
        x = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as err:
        raise InputError(f"{name}: expected an array of numbers [nm], found {err}.") from err
    if x.ndim == 2 and not single:
        x = x[None]
    want = (n_atoms, 3)
    if x.ndim != (2 if single else 3) or x.shape[-2:] != want:
        shape = f"({n_atoms}, 3)" if single else f"(n_frames, {n_atoms}, 3)"
        raise InputError(
            f"{name}: expected shape {shape} [nm], found {x.shape}; the frames must have the "
            "atoms of the System, in its order."
        )
    if not np.isfinite(x).all():
        bad = np.argwhere(~np.isfinite(x))[0].tolist()
        raise InputError(f"{name}: expected finite numbers, found {x[tuple(bad)]} at index {bad}.")
    return np.ascontiguousarray(x)


def _check_box(box: Any, n_frames: int) -> FloatArray | None:
    if box is None:
        return None
    value = np.asarray(to_md(box, unit.nanometer, name="box"), dtype=np.float64)
    if value.shape == (3, 3):
        value = np.broadcast_to(value, (n_frames, 3, 3))
    if value.shape != (n_frames, 3, 3) or not np.isfinite(value).all():
        raise InputError(
            f"box: expected finite box vectors [nm] of shape (3, 3) or ({n_frames}, 3, 3), "
            f"found shape {value.shape}."
        )
    return value


def _evaluation_context(system: mm.System, platform: str | None) -> mm.Context:
    chosen = get_platform(platform, system.getNumParticles())
    try:
        return mm.Context(system, mm.VerletIntegrator(0.001), chosen)
    except mm.OpenMMException as err:
        raise IncompatibleSystemError(
            f"OpenMM cannot make a Context of this System on platform {chosen.getName()}: {err}"
        ) from err


def evaluate_frames(
    system: mm.System,
    x_nad: Any,
    *,
    box: Any = None,
    platform: str | None = "Reference",
    groups: set[int] | None = None,
    parameters: dict[str, float] | None = None,
    with_forces: bool = False,
    derivative: str | None = None,
) -> tuple[FloatArray, FloatArray | None, FloatArray | None]:
    """Energies, and if asked forces and a parameter derivative, at given frames.

    Parameters
    ----------
    system : openmm.System
    x_nad : array_like, shape (n_frames, n_atoms, 3)
        Positions [nm]; virtual sites are taken as given.
    box : array_like, optional
        Box vectors [nm], shape (3, 3) or (n_frames, 3, 3); the System's default box if omitted.
    platform : str, optional
        OpenMM platform; ``None`` chooses by size.
    groups : set of int, optional
        Force groups; all if omitted.
    parameters : dict, optional
        Context parameters to set.
    with_forces : bool
    derivative : str, optional
        Context parameter whose exact energy derivative is wanted.

    Returns
    -------
    energies : numpy.ndarray, shape (n_frames,)
        [kJ/mol].
    forces : numpy.ndarray or None, shape (n_frames, n_atoms, 3)
        [kJ/mol/nm].
    derivatives : numpy.ndarray or None, shape (n_frames,)
        dU/dparameter [kJ/mol].

    Raises
    ------
    InputError
        For wrong shapes, unknown parameters, or a parameter without a derivative.
    """
    _check_system(system)
    x = check_frames(x_nad, system.getNumParticles())
    boxes = _check_box(box, len(x))
    if derivative is not None and derivative not in declared_derivatives(system):
        raise InputError(
            "derivative: expected a context parameter with an energy derivative, one of "
            f"{sorted(declared_derivatives(system))}, found {derivative!r}."
        )
    context = _evaluation_context(system, platform)
    for key, value in (parameters or {}).items():
        set_parameter(context, key, value)
    n = len(x)
    energies = np.empty(n)
    forces_nad = np.empty_like(x) if with_forces else None
    slopes = np.empty(n) if derivative is not None else None
    query: dict[str, Any] = {"energy": True, "forces": with_forces}
    if derivative is not None:
        query["parameterDerivatives"] = True
    if groups is not None:
        query["groups"] = groups
    for i in range(n):
        if boxes is not None:
            context.setPeriodicBoxVectors(*boxes[i])
        context.setPositions(x[i])
        state = context.getState(**query)
        energies[i] = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
        if forces_nad is not None:
            forces_nad[i] = state.getForces(asNumpy=True)._value
        if slopes is not None:
            slopes[i] = dict(state.getEnergyParameterDerivatives())[derivative]
    return energies, forces_nad, slopes


@functools.cache
def coulomb_constant() -> float:
    """1/(4 pi eps_0) [kJ nm/mol/e^2] exactly as this OpenMM has it, read off two unit charges."""
    system = mm.System()
    force = mm.NonbondedForce()
    for _ in range(2):
        system.addParticle(1.0)
        force.addParticle(1.0, 1.0, 0.0)
    system.addForce(force)
    x = np.array([[[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])
    return float(evaluate_frames(system, x)[0][0])


def declared_derivatives(system: mm.System) -> set[str]:
    """Context parameters that some force declares an energy derivative of.

    OpenMM reports 0 for a parameter that no force declares: ask here first.
    """
    found: set[str] = set()
    for force in system.getForces():
        if hasattr(force, "getNumEnergyParameterDerivatives"):
            for i in range(force.getNumEnergyParameterDerivatives()):
                found.add(str(force.getEnergyParameterDerivativeName(i)))
    return found


def set_parameter(context: mm.Context, name: str, value: float) -> None:
    """Set a context parameter, with advice instead of OpenMM's error when there is none.

    Raises
    ------
    InputError
        If no force defines it, or the value is not finite.
    """
    if not (isinstance(value, int | float | np.floating) and math.isfinite(value)):
        raise InputError(f"{name}: expected a finite number, found {value!r}.")
    try:
        context.setParameter(name, float(value))
    except mm.OpenMMException as err:
        known = ", ".join(sorted(dict(context.getParameters())))
        raise InputError(
            f"parameter {name!r}: expected one of those that the forces of this System define "
            f"({known or 'there are none'}); check the name (a learned force prefixes its own)."
        ) from err


def potential_energies(
    system: mm.System, x_nad: Any, *, box: Any = None, platform: str | None = "Reference"
) -> FloatArray:
    """Potential energy of every frame [kJ/mol], shape (n_frames,).

    See :func:`evaluate_frames` for the arguments and errors.

    Examples
    --------
    >>> import openmm
    >>> system = openmm.System()
    >>> _ = [system.addParticle(1.0) for _ in range(2)]
    >>> bond = openmm.HarmonicBondForce()
    >>> _ = bond.addBond(0, 1, 0.1, 200.0)
    >>> _ = system.addForce(bond)
    >>> potential_energies(system, [[[0, 0, 0], [0.2, 0, 0]]]).round(6).tolist()
    [1.0]
    """
    return evaluate_frames(system, x_nad, box=box, platform=platform)[0]


def forces(
    system: mm.System, x_nad: Any, *, box: Any = None, platform: str | None = "Reference"
) -> FloatArray:
    """Force on every atom of every frame [kJ/mol/nm], shape (n_frames, n_atoms, 3).

    See :func:`evaluate_frames` for the arguments and errors.
    """
    found = evaluate_frames(system, x_nad, box=box, platform=platform, with_forces=True)[1]
    assert found is not None  # for the type checker: with_forces is set
    return found


def add_flat_bottom_torsion(
    system: mm.System,
    atoms: Sequence[int],
    centre_deg: float,
    half_width_deg: float,
    k: Any = 200.0,
) -> int:
    r"""Add a flat-bottom restraint on a torsion to a System, in place.

    .. math:: U = \tfrac12 k \max(0, |\phi - \phi_0|_{2\pi} - w)^2

    Parameters
    ----------
    system : openmm.System
    atoms : four int
    centre_deg : float
        Centre of the allowed range [degrees].
    half_width_deg : float
        Half its width [degrees], in (0, 180).
    k : float or Quantity
        [kJ/mol/rad^2].

    Returns
    -------
    int
        Index of the new force; its group is ``constants.RESTRAINT_GROUP``.

    Raises
    ------
    InputError
        For wrong atoms or numbers.
    """
    _check_system(system)
    idx = [int(a) for a in atoms]
    n = system.getNumParticles()
    if len(idx) != 4 or len(set(idx)) != 4 or min(idx) < 0 or max(idx) >= n:
        raise InputError(f"atoms: expected four different indices in [0, {n}), found {idx}.")
    if not (math.isfinite(centre_deg) and math.isfinite(half_width_deg)):
        raise InputError("centre_deg, half_width_deg: expected finite degrees.")
    if not 0.0 < half_width_deg < 180.0:
        raise InputError(f"half_width_deg: expected (0, 180), found {half_width_deg}.")
    stiffness = to_md(k, unit.kilojoule_per_mole / unit.radian**2, name="k")
    if not (isinstance(stiffness, int | float) and math.isfinite(stiffness) and stiffness > 0):
        raise InputError(f"k: expected a finite number > 0 [kJ/mol/rad^2], found {k!r}.")
    force = mm.CustomTorsionForce(
        f"0.5*k*max(0, d-width)^2; d=min(delta, 2*pi-delta); delta=abs(theta-centre); pi={math.pi!r}"
    )
    for name in ("k", "centre", "width"):
        force.addPerTorsionParameter(name)
    centre = (math.radians(centre_deg) + math.pi) % (2 * math.pi) - math.pi
    force.addTorsion(*idx, [float(stiffness), centre, math.radians(half_width_deg)])
    force.setForceGroup(RESTRAINT_GROUP)
    force.setName(FLAT_BOTTOM_TORSION)
    return int(system.addForce(force))


def seed_to_int32(rng: np.random.Generator) -> int:
    """A seed for OpenMM: positive, because OpenMM takes 0 as 'choose one from the clock'."""
    return int(rng.integers(1, 2**31 - 1))


def check_positive(name: str, value: Any, *, integer: bool = False) -> Any:
    """A finite number above zero, or InputError with the name."""
    kinds: tuple[type, ...] = (int, np.integer) if integer else (int, float, np.number)
    good = isinstance(value, kinds) and not isinstance(value, bool)
    if not (good and math.isfinite(value) and value > 0):
        kind = "an integer" if integer else "a finite number"
        raise InputError(f"{name}: expected {kind} > 0, found {value!r}.")
    return int(value) if integer else float(value)


def check_topology(topology: Any, system: mm.System) -> None:
    """Refuse a topology that does not have the System's particles.

    Raises
    ------
    InputError
        If it is not an openmm.app.Topology or has another number of atoms.
    """
    if not hasattr(topology, "getNumAtoms"):
        raise InputError(
            f"topology: expected an openmm.app.Topology, found {type(topology).__name__}; an "
            "mdtraj topology converts with .to_openmm()."
        )
    if topology.getNumAtoms() != _check_system(system).getNumParticles():
        raise InputError(
            f"topology: expected {system.getNumParticles()} atoms as in the System, found "
            f"{topology.getNumAtoms()}."
        )


def check_state(context: mm.Context, what: str) -> None:
    """Raise ConvergenceError if the energy or a coordinate is no longer finite."""
    state = context.getState(energy=True, positions=True)
    energy = state.getPotentialEnergy()._value
    x = state.getPositions(asNumpy=True)._value
    if not (math.isfinite(energy) and np.isfinite(x).all()):
        raise blow_up_error(what, f"potential energy {energy} kJ/mol")


def blow_up_error(what: str, detail: str) -> ConvergenceError:
    """The one message for dynamics that became unstable."""
    return ConvergenceError(
        f"{what}: expected finite positions and energy, found {detail}: the dynamics became "
        "unstable. Minimize first, use a shorter timestep, or (a learned force) look for frames "
        "outside its training data."
    )


def sample(
    system: mm.System,
    topology: Any,
    positions: Any,
    *,
    temperature: Any,
    n_frames: int,
    interval: int = 500,
    timestep: Any = 0.001,
    friction: Any = 1.0,
    n_equil: int = 10000,
    seed: int = 0,
    platform: str | None = None,
    parameters: dict[str, float] | None = None,
    minimize: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> FloatArray:
    """Frames of one canonical ensemble, by Langevin dynamics (OpenMM's LangevinMiddle).

    Parameters
    ----------
    system : openmm.System
        May hold a learned force.
    topology : openmm.app.Topology
        Only checked against the System.
    positions : array_like, shape (n_atoms, 3)
        Start [nm].
    temperature : float or Quantity
        [K].
    n_frames, interval : int
        Frames wanted, and steps between them: choose it long enough to decorrelate.
    timestep : float or Quantity
        [ps].
    friction : float or Quantity
        [1/ps].
    n_equil : int
        Steps thrown away first.
    seed : int
        Seeds velocities and noise.
    platform : str, optional
        OpenMM platform; chosen by size if omitted.
    parameters : dict, optional
        Context parameters to set.
    minimize : bool
        Minimize the energy first.
    progress : callable, optional
        Called as ``progress(n_done, n_frames)``.

    Returns
    -------
    numpy.ndarray
        [nm], float64, shape (n_frames, n_atoms, 3).

    Raises
    ------
    InputError, UnitsError
        For bad arguments.
    ConvergenceError
        If the dynamics becomes unstable.

    Notes
    -----
    Repeatable on the Reference platform. Periodic frames are not wrapped. Nothing is saved:
    use :func:`openmm_diffforce.windows.run_windows` for runs that must survive a crash.
    """
    _check_system(system)
    check_topology(topology, system)
    x = check_frames(positions, system.getNumParticles(), single=True)
    n_frames = check_positive("n_frames", n_frames, integer=True)
    interval = check_positive("interval", interval, integer=True)
    if not isinstance(n_equil, int | np.integer) or n_equil < 0:
        raise InputError(f"n_equil: expected an integer >= 0, found {n_equil!r}.")
    rng = np.random.default_rng(check_seed(seed))
    context = make_context(
        system,
        temperature=temperature,
        timestep=timestep,
        friction=friction,
        platform=platform,
        seed=seed_to_int32(rng),
    )
    integrator = context.getIntegrator()
    for key, value in (parameters or {}).items():
        set_parameter(context, key, value)
    start_context(context, x, seed=seed_to_int32(rng), temperature=temperature, minimize=minimize)
    frames = np.empty((n_frames, system.getNumParticles(), 3))
    step_checked(integrator, int(n_equil), "sample (equilibration)")
    for i in range(n_frames):
        step_checked(integrator, interval, f"sample (frame {i})")
        frames[i] = context.getState(positions=True).getPositions(asNumpy=True)._value
        if not np.isfinite(frames[i]).all():
            raise blow_up_error(f"sample (frame {i})", "coordinates that are not finite")
        if progress is not None:
            progress(i + 1, n_frames)
    return frames


def check_seed(seed: Any) -> int:
    """A non-negative integer seed, or InputError."""
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"seed: expected an integer >= 0, found {seed!r}.")
    return int(seed)


def make_context(
    system: mm.System,
    *,
    temperature: Any,
    timestep: Any,
    friction: Any,
    platform: str | None,
    seed: int,
) -> mm.Context:
    """A Context with a seeded LangevinMiddle integrator; arguments as in :func:`sample`."""
    thermal_energy(temperature)
    kelvin = float(to_md(temperature, unit.kelvin, name="temperature"))
    dt = check_positive("timestep", to_md(timestep, unit.picosecond, name="timestep"))
    gamma = check_positive("friction", to_md(friction, unit.picosecond**-1, name="friction"))
    integrator = mm.LangevinMiddleIntegrator(kelvin, gamma, dt)
    integrator.setRandomNumberSeed(seed)
    chosen = get_platform(platform, system.getNumParticles())
    try:
        return mm.Context(system, integrator, chosen)
    except mm.OpenMMException as err:
        raise IncompatibleSystemError(
            f"OpenMM cannot make a Context of this System on platform {chosen.getName()}: {err}"
        ) from err


def start_context(context: mm.Context, x: FloatArray, *, seed: int, temperature: Any, minimize: bool) -> None:
    """Set positions, minimize if asked, draw velocities; refuse a start that is not finite."""
    context.setPositions(x)
    context.computeVirtualSites()
    context.applyConstraints(1e-6)
    try:
        check_state(context, "start")
        if minimize:
            mm.LocalEnergyMinimizer.minimize(context, 1.0, 1000)
            check_state(context, "minimization")
    except mm.OpenMMException as err:
        raise blow_up_error("start", str(err)) from err
    context.setVelocitiesToTemperature(float(to_md(temperature, unit.kelvin, name="temperature")), seed)


def step_checked(integrator: mm.Integrator, n_steps: int, what: str) -> None:
    """Integrate; OpenMM's NaN error, and a learned force's, become ConvergenceError."""
    try:
        integrator.step(n_steps)
    except mm.OpenMMException as err:
        said = str(err).strip().splitlines()
        if "nan" in str(err).lower() or "expected a finite" in str(err):
            # A learned force's error has TorchScript's traceback above what it says.
            raise blow_up_error(what, said[-1] if said else "an error without words") from err
        raise


def graph_from_topology(topology: Any, atoms: Sequence[int] | None = None) -> MolecularGraph:
    """Molecular graph of (a subset of) an OpenMM topology, bonds from the topology.

    Raises
    ------
    InputError
        If an atom has no element.
    """
    everything = list(topology.atoms())
    chosen = range(len(everything)) if atoms is None else [int(a) for a in atoms]
    place = {a: k for k, a in enumerate(chosen)}
    elements = []
    for a in chosen:
        if everything[a].element is None:
            raise InputError(f"atom {a} ({everything[a].name}): has no element in the topology.")
        elements.append(everything[a].element.symbol)
    bonds = [(place[b[0].index], place[b[1].index]) for b in topology.bonds()
             if b[0].index in place and b[1].index in place]  # fmt: skip
    return MolecularGraph(tuple(elements), tuple(bonds), tuple(everything[a].name for a in chosen))
