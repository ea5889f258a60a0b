"""Taking a System apart, exactly, and putting a learned action in the place of a molecule's terms."""

import copy
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import openmm as mm
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from openmm import app, unit
from scipy.special import erfc

from openmm_diffforce import mix
from openmm_diffforce.alanine import TEMPERATURE, alanine_dipeptide
from openmm_diffforce.alchemy import lambda_states
from openmm_diffforce.constants import CLASSICAL_GROUP, INTERPOLATE, LEARNED_GROUP
from openmm_diffforce.errors import IncompatibleSystemError, InputError, ModelError, NotConservativeError
from openmm_diffforce.force import DiffusionForce, force_from_manifest
from openmm_diffforce.models.action import ScoreModel
from openmm_diffforce.systems import (
    CONNECTIVITY,
    SubsetTerms,
    add_flat_bottom_torsion,
    coulomb_constant,
    evaluate_frames,
    remove_subset_terms,
)
from openmm_diffforce.testing import assert_forces_match_energy, assert_parameter_derivative
from openmm_diffforce.units import thermal_energy
from openmm_diffforce.windows import run_windows

from . import solvated, tiny
from .test_own_model import Distances, Squeeze
from .test_own_model import export as export_water

REL_F64 = 1e-8
"""Relative to the energy, and to the norm of the forces, of the whole System."""

BACKENDS = ["python", pytest.param("torchforce", marks=pytest.mark.torchforce)]
SOLUTE = range(solvated.N_SOLUTE)


def fields(system: mm.System, x: np.ndarray, box: Any = None) -> tuple[float, np.ndarray]:
    energies, forces, _ = evaluate_frames(system, x, box=box, with_forces=True)
    assert forces is not None
    return float(energies[0]), forces[0]


def system_of(like: mm.System, forces: Iterable[mm.Force]) -> mm.System:
    system = mm.System()
    for i in range(like.getNumParticles()):
        system.addParticle(like.getParticleMass(i))
    system.setDefaultPeriodicBoxVectors(*like.getDefaultPeriodicBoxVectors())
    for force in forces:
        system.addForce(copy.deepcopy(force))
    return system


def assert_adds_up(
    system: mm.System, x: np.ndarray, terms: SubsetTerms, inside: tuple[float, np.ndarray], box: Any = None
) -> None:
    """E_full = E_rest + E_inside, with E_inside from elsewhere; and ``terms.inside`` is that too."""
    whole, rest = fields(system, x, box), fields(terms.system, x, box)
    parts = fields(system_of(system, terms.inside), x, box)
    size = np.linalg.norm(whole[1])
    assert np.linalg.norm(inside[1]) > 1e-3 * size  # an empty inside adds up for nothing
    for found in (inside, parts):
        assert abs(whole[0] - rest[0] - found[0]) <= REL_F64 * max(abs(whole[0]), abs(found[0]))
        assert np.linalg.norm(whole[1] - rest[1] - found[1]) <= REL_F64 * size


# ------------------------------------------------------------------ dipeptide and water


def alone() -> mm.System:
    return alanine_dipeptide()[2]


def with_others(x_solute: np.ndarray, forces: np.ndarray, n: int) -> np.ndarray:
    out = np.zeros((n, 3))
    out[: len(forces)] = forces
    return out


def test_whole_molecule_in_vacuum() -> None:
    x = tiny.frame()
    system = tiny.case().system_1
    terms = remove_subset_terms(system, SOLUTE)
    assert fields(terms.system, x)[0] == 0.0
    assert not fields(terms.system, x)[1].any()
    assert_adds_up(system, x, terms, fields(system, x))
    assert terms.removed == {
        "0 HarmonicBondForce": 21, "1 PeriodicTorsionForce": 42, "2 NonbondedForce": 174,
        "4 HarmonicAngleForce": 36,
    }  # fmt: skip


def test_molecule_in_a_water_cluster() -> None:
    """What is taken out is the dipeptide as the force field builds it without water."""
    water = solvated.cluster()
    x = water.positions
    before = mm.XmlSerializer.serialize(water.system)
    terms = remove_subset_terms(water.system, SOLUTE)
    energy, forces = fields(alone(), x[: len(SOLUTE)])
    inside = (energy, with_others(x, forces, len(x)))
    assert_adds_up(water.system, x, terms, inside)
    assert mm.XmlSerializer.serialize(water.system) == before
    # One water molecule taken out of the cluster, the solute left in.
    atoms = [22, 23, 24]
    terms = remove_subset_terms(water.system, atoms)
    assert terms.removed == {"0 HarmonicBondForce": 2, "4 HarmonicAngleForce": 1}


@given(st.sets(st.integers(0, 21), min_size=1, max_size=21))
@settings(max_examples=20, deadline=None)
def test_any_part_of_a_molecule(atoms: set[int]) -> None:
    x, system = tiny.frame(), tiny.case().system_0
    terms = remove_subset_terms(system, sorted(atoms))
    whole, rest, inside = fields(system, x), fields(terms.system, x), by_hand(system, x, atoms)
    assert abs(whole[0] - rest[0] - inside[0]) <= REL_F64 * abs(whole[0])
    assert np.linalg.norm(whole[1] - rest[1] - inside[1]) <= REL_F64 * np.linalg.norm(whole[1])
    parts = fields(system_of(system, terms.inside), x)
    assert parts[0] == pytest.approx(inside[0], rel=REL_F64, abs=1e-9)


def by_hand(system: mm.System, x: np.ndarray, atoms: set[int]) -> tuple[float, np.ndarray]:
    """Energy inside from the parameters: new forces, term by term, and everything else silenced."""
    bonds, angles, torsions = mm.HarmonicBondForce(), mm.HarmonicAngleForce(), mm.PeriodicTorsionForce()
    pairs = mm.NonbondedForce()
    for force in system.getForces():
        for what, n, mine in (("Bond", 2, bonds), ("Angle", 3, angles), ("Torsion", 4, torsions)):
            if type(force) is not type(mine):
                continue
            for i in range(getattr(force, f"getNum{what}s")()):
                row = getattr(force, f"get{what}Parameters")(i)
                if atoms.issuperset(row[:n]):
                    getattr(mine, f"add{what}")(*row)
        if isinstance(force, mm.NonbondedForce):
            for i in range(force.getNumParticles()):
                pairs.addParticle(*(force.getParticleParameters(i) if i in atoms else (0, 1, 0)))
            for i in range(force.getNumExceptions()):
                a, b, *values = force.getExceptionParameters(i)
                pairs.addException(a, b, *(values if atoms.issuperset((a, b)) else (0, 1, 0)))
    return fields(system_of(system, [bonds, angles, torsions, pairs]), x)


@pytest.mark.parametrize("rigid_water", [True, False])
@pytest.mark.parametrize("shape", ["cubic", "triclinic"])
def test_molecule_in_a_periodic_box(shape: str, rigid_water: bool) -> None:
    box = solvated.box(shape, rigid_water)
    x = box.positions
    vacuum = alone()  # a force does not outlive its System
    bonded = system_of(vacuum, [f for f in vacuum.getForces() if not isinstance(f, mm.NonbondedForce)])
    energy, forces = fields(bonded, x[: len(SOLUTE)])
    nonbonded = next(f for f in box.system.getForces() if isinstance(f, mm.NonbondedForce))
    pair_energy, pair_forces = pair_sum(nonbonded, x, set(SOLUTE), np.array(solvated.BOXES[shape]))
    terms = remove_subset_terms(box.system, SOLUTE)
    inside = (energy + pair_energy, with_others(x, forces, len(x)) + pair_forces)
    assert_adds_up(box.system, x, terms, inside)


def test_atoms_wrapped_one_by_one_change_nothing() -> None:
    """Without the molecule's bonds nothing forbids it; exclusions must follow the pairs."""
    box = solvated.box("triclinic")
    terms = remove_subset_terms(box.system, SOLUTE)
    energy, forces = fields(terms.system, box.positions)
    shifts = np.zeros((len(box.positions), 3))
    shifts[: len(SOLUTE)] = np.random.default_rng(1).integers(-2, 3, (len(SOLUTE), 3))
    wrapped = fields(terms.system, box.positions + shifts @ solvated.BOXES["triclinic"])
    assert wrapped[0] == pytest.approx(energy, rel=REL_F64)
    assert np.linalg.norm(wrapped[1] - forces) <= REL_F64 * np.linalg.norm(forces)
    pairs = system_of(box.system, [f for f in terms.inside if isinstance(f, mm.CustomBondForce)])
    assert pairs.getNumForces() == 2
    found, expected = (
        fields(pairs, x)[0] for x in (box.positions + shifts @ solvated.BOXES["triclinic"], box.positions)
    )
    assert found == pytest.approx(expected, rel=REL_F64)


def test_the_molecule_stays_one_molecule() -> None:
    """Barostats scale molecules, and wrapping moves them: both read bonds."""
    for system in (solvated.cluster().system, solvated.box().system):
        terms = remove_subset_terms(system, SOLUTE)
        assert terms.system.getForce(terms.system.getNumForces() - 1).getName() == CONNECTIVITY
        found, expected = (
            {tuple(m) for m in mm.Context(s, mm.VerletIntegrator(0.001)).getMolecules()}
            for s in (terms.system, system)
        )
        assert found == expected
        assert tuple(SOLUTE) in found


# ------------------------------------------------------------------ three particles, by hand


def test_three_particles_by_hand() -> None:
    system = mm.System()
    bonds, pairs = mm.HarmonicBondForce(), mm.NonbondedForce()
    for q, sigma, eps in ((0.5, 0.3, 1.0), (-0.5, 0.3, 1.0), (1.0, 0.3, 4.0)):
        system.addParticle(1.0)
        pairs.addParticle(q, sigma, eps)
    bonds.addBond(0, 1, 0.2, 1000.0)
    bonds.addBond(1, 2, 0.2, 1000.0)
    system.addForce(bonds)
    system.addForce(pairs)
    x = np.array([[0.0, 0, 0], [0.3, 0, 0], [0.6, 0, 0]])
    k = coulomb_constant()

    def lennard_jones(r: float, eps: float) -> float:
        return 4 * eps * ((0.3 / r) ** 12 - (0.3 / r) ** 6)

    inside = 0.5 * 1000 * 0.1**2 - 0.25 * k / 0.3 + 0.0  # at r = sigma Lennard-Jones is zero
    rest = 5.0 + 0.5 * k / 0.6 + lennard_jones(0.6, 2.0) - 0.5 * k / 0.3
    terms = remove_subset_terms(system, [0, 1])
    assert fields(system, x)[0] == pytest.approx(inside + rest, rel=1e-12)
    assert fields(terms.system, x)[0] == pytest.approx(rest, rel=1e-12)
    assert fields(system_of(system, terms.inside), x)[0] == pytest.approx(inside, rel=1e-12)
    # On particle 0: the bond pulls with 100, the charge with 0.25 k / r^2, Lennard-Jones pushes.
    force = 1000 * 0.1 + 0.25 * k / 0.3**2 - 24 / 0.3
    assert fields(system_of(system, terms.inside), x)[1][0, 0] == pytest.approx(force, rel=1e-12)
    assert terms.removed == {"0 HarmonicBondForce": 1, "1 NonbondedForce": 1}


# ------------------------------------------------------------------ every force, every method

N = 8
INSIDE = {0, 2, 3, 4, 6}
X = np.random.default_rng(3).uniform(0.1, 0.9, (N, 3))
BOX = np.array([[2.0, 0, 0], [0.5, 1.9, 0], [-0.6, 0.4, 1.8]])


def bare(*forces: mm.Force, box: np.ndarray = BOX) -> mm.System:
    system = mm.System()
    for _ in range(N):
        system.addParticle(10.0)
    system.setDefaultPeriodicBoxVectors(*(mm.Vec3(*v) for v in box))
    for force in forces:
        system.addForce(force)
    return system


def harmonic_bonds(terms: list[tuple[int, ...]]) -> mm.Force:
    force = mm.HarmonicBondForce()
    for k, t in enumerate(terms):
        force.addBond(*t[:2], 0.1 + 0.01 * k, 100.0 / 3.0 + k)
    return force


def harmonic_angles(terms: list[tuple[int, ...]]) -> mm.Force:
    force = mm.HarmonicAngleForce()
    for k, t in enumerate(terms):
        force.addAngle(*t[:3], 1.0 + 0.1 * k, 100.0 / 7.0)
    return force


def torsions(terms: list[tuple[int, ...]]) -> mm.Force:
    force = mm.PeriodicTorsionForce()
    for k, t in enumerate(terms):
        force.addTorsion(*t[:4], 1 + k % 3, 0.3 * k, 10.0 / 3.0)
    return force


def ryckaert(terms: list[tuple[int, ...]]) -> mm.Force:
    force = mm.RBTorsionForce()
    for k, t in enumerate(terms):
        force.addTorsion(*t[:4], 1.0, 2.0, -3.0 + k, 0.5, 0.25, 1 / 3)
    return force


def cmap(terms: list[tuple[int, ...]]) -> mm.Force:
    force = mm.CMAPTorsionForce()
    force.addMap(4, np.random.default_rng(2).standard_normal(16).tolist())
    for t in terms:
        force.addTorsion(0, *t[:4], *t[1:5])
    return force


def custom_bonds(terms: list[tuple[int, ...]]) -> mm.Force:
    force = mm.CustomBondForce("k*(1-exp(-3*(r-r0)))^2*g; k=2*depth")
    force.addPerBondParameter("depth")
    force.addPerBondParameter("r0")
    force.addGlobalParameter("g", 1.5)
    for k, t in enumerate(terms):
        force.addBond(*t[:2], [1 / 3, 0.1 * k])
    return force


def custom_angles(terms: list[tuple[int, ...]]) -> mm.Force:
    force = mm.CustomAngleForce("k*(cos(theta)-0.1)^2")
    force.addPerAngleParameter("k")
    for k, t in enumerate(terms):
        force.addAngle(*t[:3], [k / 3])
    return force


def custom_torsions(terms: list[tuple[int, ...]]) -> mm.Force:
    force = mm.CustomTorsionForce("k*(theta-0.2)^2")
    force.addPerTorsionParameter("k")
    for k, t in enumerate(terms):
        force.addTorsion(*t[:4], [k / 3])
    return force


def compound(terms: list[tuple[int, ...]]) -> mm.Force:
    force = mm.CustomCompoundBondForce(5, "k*f(distance(p1,p5))*angle(p2,p3,p4)")
    force.addPerBondParameter("k")
    force.addTabulatedFunction("f", mm.Continuous1DFunction([1.0, 2.5, 0.3], 0.0, 2.0))
    for k, t in enumerate(terms):
        force.addBond(list(t[:5]), [k / 3])
    return force


# Inside, crossing in several ways, outside.
TERMS = [
    (0, 2, 3, 4, 6), (6, 4, 0, 2, 3), (0, 1, 2, 3, 4), (1, 5, 7, 0, 2), (5, 7, 1, 5, 0), (3, 4, 6, 0, 1),
    (2, 3, 4, 6, 0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("build", "n"),
    [
        (harmonic_bonds, 2), (harmonic_angles, 3), (torsions, 4), (ryckaert, 4), (cmap, 5),
        (custom_bonds, 2), (custom_angles, 3), (custom_torsions, 4), (compound, 5),
    ],
)  # fmt: skip
@pytest.mark.parametrize("periodic", [False, True])
def test_bonded_forces(build: Callable[..., mm.Force], n: int, periodic: bool) -> None:
    force = build(TERMS)
    force.setUsesPeriodicBoundaryConditions(periodic)
    force.setForceGroup(4)
    force.setName("mine")
    system = bare(force)
    is_inside = [INSIDE.issuperset(t[:n]) for t in TERMS]
    terms = remove_subset_terms(system, sorted(INSIDE), keep=[])
    assert terms.removed == {"0 mine": sum(is_inside)}
    rest = terms.system.getForce(0)
    assert (type(rest), rest.getName(), rest.getForceGroup()) == (type(force), "mine", 4)
    assert rest.usesPeriodicBoundaryConditions() is periodic
    x = X + np.random.default_rng(1).integers(-1, 2, X.shape) @ BOX if periodic else X
    whole, found = fields(system, x), fields(terms.system, x)
    inside = fields(system_of(system, terms.inside), x)
    assert abs(inside[0]) > 1e-6
    assert found[0] + inside[0] == pytest.approx(whole[0], rel=REL_F64)
    assert np.allclose(found[1] + inside[1], whole[1], rtol=0, atol=REL_F64 * np.linalg.norm(whole[1]))
    # By hand: the terms outside are those that remain, with their own parameters.
    assert _terms(rest) == [t for t, drop in zip(_terms(force), is_inside, strict=True) if not drop]
    assert _terms(terms.inside[0]) == [t for t, drop in zip(_terms(force), is_inside, strict=True) if drop]


def _terms(force: Any) -> list[str]:
    what = next(w for w in ("Bond", "Angle", "Torsion") if hasattr(force, f"getNum{w}s"))
    rows = (getattr(force, f"get{what}Parameters")(i) for i in range(getattr(force, f"getNum{what}s")()))
    return [str([list(v) if isinstance(v, tuple) else v for v in row]) for row in rows]


EXCEPTIONS = {(0, 2): (0.0, 0.0), (0, 3): (0.04, 0.2), (3, 5): (0.1, 0.3), (1, 7): (0.0, 0.0)}
METHODS = ["NoCutoff", "CutoffNonPeriodic", "CutoffPeriodic", "Ewald", "PME"]


def nonbonded(method: str, *, switch: bool = True, alpha: float = 0.0, correction: bool = True) -> Any:
    force = mm.NonbondedForce()
    generator = np.random.default_rng(7)
    for q in generator.uniform(-0.5, 0.5, N):
        force.addParticle(q, generator.uniform(0.1, 0.2), generator.uniform(0.2, 0.9))
    for (a, b), (qq, eps) in EXCEPTIONS.items():
        force.addException(b, a, qq, 0.2, eps)
    force.setNonbondedMethod(getattr(mm.NonbondedForce, method))
    force.setCutoffDistance(0.6)
    force.setSwitchingDistance(0.4)
    force.setUseSwitchingFunction(switch)
    force.setUseDispersionCorrection(correction)
    if alpha:
        force.setPMEParameters(alpha, 24, 24, 24)
    return force


def pair_sum(
    force: mm.NonbondedForce, x: np.ndarray, atoms: set[int], box: np.ndarray
) -> tuple[float, np.ndarray]:
    """Energy and forces of the pairs among ``atoms``, from OpenMM's manual, by central differences
    for the radial derivative."""
    method = force.getNonbondedMethod()
    nb = mm.NonbondedForce
    periodic = method in (nb.CutoffPeriodic, nb.Ewald, nb.PME)
    rc = force.getCutoffDistance().value_in_unit(unit.nanometer)
    rs = force.getSwitchingDistance().value_in_unit(unit.nanometer)
    alpha = force.getPMEParameters()[0].value_in_unit(unit.nanometer**-1) if method == nb.PME else 0.0
    alpha = alpha or math.sqrt(-math.log(2 * force.getEwaldErrorTolerance())) / rc
    dielectric = force.getReactionFieldDielectric()

    def pair(r: float, qq: float, sigma: float, eps: float, plain: bool) -> float:
        lj = 4 * eps * ((sigma / r) ** 12 - (sigma / r) ** 6)
        coulomb = coulomb_constant() * qq / r
        if plain or method == nb.NoCutoff:
            return lj + coulomb
        if force.getUseSwitchingFunction() and r > rs:
            u = (r - rs) / (rc - rs)
            lj *= 1 - 10 * u**3 + 15 * u**4 - 6 * u**5
        if r > rc:
            return coulomb * (1 - erfc(alpha * r)) if method in (nb.Ewald, nb.PME) else 0.0
        if method in (nb.CutoffNonPeriodic, nb.CutoffPeriodic):
            field = (dielectric - 1) / (2 * dielectric + 1) / rc**3 * r**2
            shift = 3 * dielectric / (2 * dielectric + 1) / rc
            coulomb = coulomb_constant() * qq * (1 / r + field - shift)
        return lj + coulomb

    known = {}
    for i in range(force.getNumExceptions()):
        a, b, *values = force.getExceptionParameters(i)
        known[frozenset((a, b))] = [v._value for v in values]
    total, out = 0.0, np.zeros_like(x)
    for a in sorted(atoms):
        for b in sorted(atoms):
            if b <= a:
                continue
            plain = frozenset((a, b)) in known
            if plain:
                values = known[frozenset((a, b))]
            else:
                one, two = ([v._value for v in force.getParticleParameters(k)] for k in (a, b))
                values = [one[0] * two[0], (one[1] + two[1]) / 2, math.sqrt(one[2] * two[2])]
            d = x[a] - x[b]
            if periodic:
                for axis in (2, 1, 0):
                    d = d - box[axis] * round(d[axis] / box[axis, axis])
            r, h = float(np.linalg.norm(d)), 1e-4
            total += pair(r, *values, plain)
            near, far = (pair(r + s, *values, plain) - pair(r - s, *values, plain) for s in (h, 2 * h))
            slope = (8 * near - far) / (12 * h)
            out[a] -= slope * d / r
            out[b] += slope * d / r
    return total, out


@pytest.mark.parametrize("switch", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_nonbonded_methods(method: str, switch: bool) -> None:
    force = nonbonded(method, switch=switch)
    box = np.diag(np.diag(BOX)) if method == "Ewald" else BOX  # OpenMM's limit
    system = bare(force, box=box)
    x = spread()
    energy, forces = pair_sum(force, x, INSIDE, box)
    terms = remove_subset_terms(system, sorted(INSIDE))
    whole, rest = fields(system, x), fields(terms.system, x)
    parts = fields(system_of(system, terms.inside), x)
    size = np.linalg.norm(whole[1])
    assert whole[0] - rest[0] == pytest.approx(energy, rel=REL_F64)
    assert parts[0] == pytest.approx(energy, rel=REL_F64)
    assert np.linalg.norm(whole[1] - rest[1] - parts[1]) <= REL_F64 * size
    assert np.linalg.norm(parts[1] - forces) <= 1e-6 * size  # the differences' own error
    assert terms.removed == {"0 NonbondedForce": 9}  # of ten pairs one was excluded


def spread() -> np.ndarray:
    """Eight points of which pairs inside are nearer and farther than cutoff and switch."""
    x = np.array([[0, 0, 0], [0.3, 0.3, 0.3], [0.35, 0, 0], [0, 0.5, 0.05], [0.1, 0.1, 0.75],
                  [0.4, 0.5, 0.1], [0.5, 0.55, 0.6], [0.7, 0.1, 0.4]])  # fmt: skip
    r = [np.linalg.norm(x[a] - x[b]) for a in INSIDE for b in INSIDE if a < b]
    assert min(r) < 0.4
    assert any(0.4 < v < 0.6 for v in r)
    assert max(r) > 0.7
    return x


def test_pme_parameters_that_the_user_chose() -> None:
    force = nonbonded("PME", alpha=2.9)
    system, x = bare(force), spread()
    terms = remove_subset_terms(system, sorted(INSIDE))
    energy = pair_sum(force, x, INSIDE, BOX)[0]
    default = pair_sum(nonbonded("PME"), x, INSIDE, BOX)[0]
    assert abs(energy - default) > 1e-4  # beyond the cutoff alpha counts
    assert fields(system, x)[0] - fields(terms.system, x)[0] == pytest.approx(energy, rel=REL_F64)
    assert fields(system_of(system, terms.inside), x)[0] == pytest.approx(energy, rel=REL_F64)


def test_the_dispersion_correction_stays() -> None:
    x = spread()
    systems = [bare(nonbonded("CutoffPeriodic", correction=c)) for c in (True, False)]
    rests = [remove_subset_terms(s, sorted(INSIDE)).system for s in systems]
    before = fields(systems[0], x)[0] - fields(systems[1], x)[0]
    assert abs(before) > 1e-3
    assert fields(rests[0], x)[0] - fields(rests[1], x)[0] == pytest.approx(before, rel=1e-9)


GROUPS: dict[str, list[tuple[set[int], set[int]]]] = {
    "no groups": [],
    "one group": [({0, 1, 2, 3}, {3, 4, 5, 6})],
    "two groups": [({0, 1, 2}, {3, 4, 5}), ({5, 7}, {1})],
    "across only": [({0, 2}, {1, 5, 7})],
}


def custom_pairs(groups: str, method: str) -> mm.CustomNonbondedForce:
    force = mm.CustomNonbondedForce("c*a1*a2*exp(-2*r); c=5/3")
    force.addPerParticleParameter("a")
    for k in range(N):
        force.addParticle([0.3 + 0.1 * k])
    for a, b in ((0, 3), (1, 7)):
        force.addExclusion(b, a)
    for one, two in GROUPS[groups]:
        force.addInteractionGroup(one, two)
    force.setNonbondedMethod(getattr(mm.CustomNonbondedForce, method))
    force.setCutoffDistance(0.6)
    force.setUseSwitchingFunction(True)
    force.setSwitchingDistance(0.5)
    force.setUseLongRangeCorrection(method == "CutoffPeriodic")
    return force


@pytest.mark.parametrize("method", ["NoCutoff", "CutoffNonPeriodic", "CutoffPeriodic"])
@pytest.mark.parametrize("groups", sorted(GROUPS))
def test_custom_nonbonded(groups: str, method: str) -> None:
    system, x = bare(custom_pairs(groups, method)), spread()
    terms = remove_subset_terms(system, sorted(INSIDE))
    whole, rest = fields(system, x), fields(terms.system, x)
    inside = fields(system_of(system, terms.inside), x)
    listed = GROUPS[groups] or [(set(range(N)), set(range(N)))]
    expected, n = 0.0, 0
    for a in sorted(INSIDE):
        for b in sorted(INSIDE):
            times = sum((a in one and b in two) or (b in one and a in two) for one, two in listed)
            if b <= a or (a, b) == (0, 3) or not times:
                continue
            n += 1
            r = float(np.linalg.norm(x[a] - x[b]))
            u = max(0.0, (r - 0.5) / 0.1)
            factor = 1.0 if method == "NoCutoff" else (r < 0.6) * (1 - 10 * u**3 + 15 * u**4 - 6 * u**5)
            expected += times * factor * 5 / 3 * (0.3 + 0.1 * a) * (0.3 + 0.1 * b) * math.exp(-2 * r)
    assert terms.removed == ({"0 CustomNonbondedForce": n} if n else {})
    assert (n == 0) == (groups == "across only")
    assert whole[0] - rest[0] == pytest.approx(expected, rel=REL_F64, abs=1e-12)
    assert inside[0] == pytest.approx(expected, rel=REL_F64, abs=1e-12)
    assert np.linalg.norm(whole[1] - rest[1] - inside[1]) <= REL_F64 * np.linalg.norm(whole[1])


# ------------------------------------------------------------------ what passes, what is kept


def test_fields_and_bookkeeping_pass() -> None:
    field = mm.CustomExternalForce("x^2")
    for k in range(N):
        field.addParticle(k, [])
    forces = [field, mm.CMMotionRemover(), mm.MonteCarloBarostat(1.0, 300.0), mm.AndersenThermostat(300, 1)]
    system = bare(*forces, nonbonded("PME"))
    terms = remove_subset_terms(system, sorted(INSIDE))
    assert terms.removed == {"4 NonbondedForce": 9}
    for i in range(4):
        old, new = (mm.XmlSerializer.serialize(s.getForce(i)) for s in (system, terms.system))
        assert old == new


def test_custom_terms_inside_need_a_word() -> None:
    force = custom_torsions(TERMS)
    force.setName("impropers")
    system = bare(force)
    with pytest.raises(IncompatibleSystemError, match=r"0 impropers.*CustomTorsionForce.*keep=\[0\]"):
        remove_subset_terms(system, sorted(INSIDE))
    for keep in ([0], ["impropers"], "impropers"):
        terms = remove_subset_terms(system, sorted(INSIDE), keep=keep)
        assert not terms.removed
        assert fields(terms.system, X)[0] == fields(system, X)[0]
    assert remove_subset_terms(system, sorted(INSIDE), keep=[]).removed == {"0 impropers": 4}
    # Not inside: no question.
    assert not remove_subset_terms(system, [0, 1]).removed


def test_own_restraints_stay() -> None:
    system = bare(torsions(TERMS))
    add_flat_bottom_torsion(system, (0, 2, 3, 4), 0.0, 10.0)
    terms = remove_subset_terms(system, sorted(INSIDE))
    assert list(terms.removed) == ["0 PeriodicTorsionForce"]
    assert terms.system.getForce(1).getNumTorsions() == 1


def gb() -> mm.Force:
    force = mm.GBSAOBCForce()
    for _ in range(N):
        force.addParticle(0.1, 0.15, 0.8)
    return force


def custom_gb() -> mm.Force:
    force = mm.CustomGBForce()
    force.addPerParticleParameter("q")
    for _ in range(N):
        force.addParticle([0.1])
    force.addEnergyTerm("q^2", mm.CustomGBForce.SingleParticle)
    return force


def centroid() -> mm.Force:
    force = mm.CustomCentroidBondForce(2, "distance(g1,g2)")
    force.addGroup([0, 2])
    force.addGroup([3, 4])
    force.addBond([0, 1], [])
    return force


def collective() -> mm.Force:
    force = mm.CustomCVForce("u")
    force.addCollectiveVariable("u", harmonic_bonds(TERMS))
    return force


def rmsd() -> mm.Force:
    return mm.RMSDForce(X, sorted(INSIDE))


@pytest.mark.parametrize("build", [gb, custom_gb, centroid, collective, rmsd])
def test_forces_that_cannot_be_divided(build: Callable[[], mm.Force]) -> None:
    force = build()
    system = bare(harmonic_bonds(TERMS), force)
    with pytest.raises(
        IncompatibleSystemError, match=rf"force 1 {force.getName()} \({type(force).__name__}\).*keep=\[1\]"
    ):
        remove_subset_terms(system, sorted(INSIDE))
    terms = remove_subset_terms(system, sorted(INSIDE), keep=[1])
    assert list(terms.removed) == ["0 HarmonicBondForce"]


def no_energy(state: mm.State) -> tuple[float, np.ndarray]:
    return 0.0, np.zeros((N, 3))


@pytest.mark.parametrize(
    "force",
    [
        mm.AmoebaMultipoleForce(), mm.AmoebaVdwForce(), mm.DrudeForce(), mm.HippoNonbondedForce(),
        mm.GayBerneForce(), mm.CustomHbondForce("distance(d1,a1)"), mm.CustomManyParticleForce(3, "0"),
        mm.ATMForce(1, 1, 1, 1, 1, 1, 1, 1, 1), mm.PythonForce(no_energy),
    ],
    ids=lambda f: type(f).__name__,
)  # fmt: skip
def test_forces_on_no_white_list(force: mm.Force) -> None:
    system = bare(copy.deepcopy(force) if not isinstance(force, mm.PythonForce) else force)
    for keep in (None, [0]):
        with pytest.raises(IncompatibleSystemError, match=type(force).__name__):
            remove_subset_terms(system, [0, 1], keep=keep)


def test_ljpme_and_offsets_are_refused() -> None:
    reciprocal_only = nonbonded("PME")
    reciprocal_only.setIncludeDirectSpace(False)
    for force in (nonbonded("LJPME"), reciprocal_only):
        with pytest.raises(IncompatibleSystemError, match="LJPME"):
            remove_subset_terms(bare(force), [0, 1])
    force = nonbonded("NoCutoff")
    force.addGlobalParameter("on", 1.0)
    force.addParticleParameterOffset("on", 0, 0.1, 0.0, 0.0)
    with pytest.raises(IncompatibleSystemError, match="offsets"):
        remove_subset_terms(bare(copy.deepcopy(force)), [0, 1])
    remove_subset_terms(bare(force), [1, 2])
    force = nonbonded("NoCutoff")
    force.addGlobalParameter("on", 1.0)
    force.addExceptionParameterOffset("on", 1, 0.1, 0.0, 0.0)  # 0-3
    with pytest.raises(IncompatibleSystemError, match="offsets"):
        remove_subset_terms(bare(copy.deepcopy(force)), [0, 3])
    remove_subset_terms(bare(force), [0, 2])


def test_singular_atoms_are_refused() -> None:
    system = bare(harmonic_bonds(TERMS))
    system.addConstraint(2, 5, 0.1)
    system.setParticleMass(7, 0.0)
    system.setVirtualSite(7, mm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    system.setParticleMass(6, 0.0)
    for atoms, message in (
        ([2, 3], "1 constrained atoms"), ([7, 3], "1 virtual-site atoms"), ([6, 3], "1 massless atoms"),
        ([0, 3], "virtual site 7: rides"),
    ):  # fmt: skip
        with pytest.raises(IncompatibleSystemError, match=message):
            remove_subset_terms(system, atoms)
    remove_subset_terms(system, [3, 4])


@pytest.mark.parametrize(
    ("atoms", "options", "message"),
    [
        ([], {}, "atoms: expected a list"), ([0.5, 1.5], {}, "atoms: expected a list"),
        ([0, 0], {}, "different indices"), ([0, N], {}, "different indices"), ([-1], {}, "different indices"),
        ([0], {"keep": [3]}, "keep: expected.*found 3; it has 0 HarmonicBondForce"),
        ([0], {"keep": ["phi"]}, "keep: expected.*found 'phi'"), ([0], {"keep": "phi"}, "found 'phi'"),
        ([0], {"keep": [-1]}, "found -1"), ([0], {"keep": [0.5]}, "found 0.5"),
        ([0], {"keep": np.array([3])}, "found.*3"), ([0], {"keep": 7}, "found 7"),
    ],
)  # fmt: skip
def test_bad_arguments(atoms: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        remove_subset_terms(bare(harmonic_bonds(TERMS)), atoms, **options)


# ------------------------------------------------------------------ mix


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.export(tmp_path_factory.mktemp("mix") / "tiny.diffforce")


@pytest.fixture(scope="module")
def learned(artefact: Path) -> Callable[..., DiffusionForce]:
    def make(topology: app.Topology, **options: Any) -> DiffusionForce:
        options = {"backend": "python", "atoms": list(SOLUTE), **options}
        return DiffusionForce(artefact, topology=topology, **options)

    return make


def context_of(system: mm.System, x: np.ndarray) -> mm.Context:
    context = mm.Context(
        system, mm.LangevinMiddleIntegrator(TEMPERATURE, 1.0, 0.0005),
        mm.Platform.getPlatformByName("Reference"),
    )  # fmt: skip
    context.setPositions(x)
    return context


def state_of(context: mm.Context, groups: Any = -1) -> tuple[float, np.ndarray]:
    state = context.getState(energy=True, forces=True, groups=groups)
    return state.getPotentialEnergy()._value, np.array(state.getForces(asNumpy=True)._value)


def assert_equal(found: tuple[float, np.ndarray], expected: tuple[float, np.ndarray]) -> None:
    size = np.linalg.norm(expected[1])
    assert size > 1.0
    assert abs(found[0] - expected[0]) <= REL_F64 * max(abs(expected[0]), size)
    assert np.linalg.norm(found[1] - expected[1]) <= REL_F64 * size


def learned_alone(make: Callable[..., DiffusionForce], x: np.ndarray, n: int) -> tuple[float, np.ndarray]:
    system = mm.System()
    for _ in SOLUTE:
        system.addParticle(1.0)
    system.addForce(make(tiny.case().topology, atoms=None))
    energy, forces = state_of(context_of(system, x[: len(SOLUTE)]))
    return energy, with_others(x, forces, n)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["cluster", "triclinic"])
def test_replaced(learned: Callable[..., DiffusionForce], backend: str, where: str) -> None:
    world = solvated.cluster() if where == "cluster" else solvated.box(where)
    x = world.positions
    before = mm.XmlSerializer.serialize(world.system)
    force = learned(world.topology, backend=backend)
    mixed = mix(world.system, world.topology, force)
    assert mm.XmlSerializer.serialize(world.system) == before
    assert force.replaced["2 NonbondedForce"] == 174
    context = context_of(mixed, x)
    force.check(context)
    rest = fields(remove_subset_terms(world.system, SOLUTE).system, x)
    action = learned_alone(learned, x, len(x))
    assert_equal(state_of(context), (rest[0] + action[0], rest[1] + action[1]))
    assert_equal(state_of(context, {LEARNED_GROUP}), action)
    if where == "cluster":
        assert_forces_match_energy(context, atoms=[0, 8, 15, 30])


@pytest.mark.parametrize("backend", BACKENDS)
def test_crossing_over(learned: Callable[..., DiffusionForce], backend: str) -> None:
    world = solvated.cluster()
    x = world.positions
    force = learned(world.topology, backend=backend, prefix="a_")
    context = context_of(mix(world.system, world.topology, force, interpolate=True), x)
    context.setParameter("a_scale", 0.7)
    twin = learned(world.topology)
    full = context_of(mix(world.system, world.topology, twin), x)
    full.setParameter("diffforce_scale", 0.7)
    ends = fields(world.system, x), state_of(full)
    assert context.getParameter(INTERPOLATE) == 1.0  # as in openmm-ml
    assert_equal(state_of(context), ends[1])
    inside = ends[1][0] - ends[0][0]
    assert abs(inside) > 1.0
    for mu in (0.0, 0.3, 1.0):
        context.setParameter(INTERPOLATE, mu)
        assert_equal(state_of(context), tuple((1 - mu) * a + mu * b for a, b in zip(*ends, strict=True)))
        state = context.getState(parameterDerivatives=True)
        slope = state.getEnergyParameterDerivatives()[INTERPOLATE]
        own = force.energy_derivative(context, INTERPOLATE)
        assert own == pytest.approx(0.7 * learned_alone(learned, x, len(x))[0], rel=1e-9)
        if backend == "python":
            slope += own
        assert slope == pytest.approx(inside, rel=1e-9)
        assert_parameter_derivative(context, INTERPOLATE, slope)
    assert force.parameter(INTERPOLATE) == INTERPOLATE
    for outside in (-0.1, 1.1, math.nan):
        context.setParameter(INTERPOLATE, outside)
        with pytest.raises(InputError, match="lambda_interpolate: expected"):
            force.check(context)
    context.setParameter(INTERPOLATE, 0.4)
    force.check(context)
    context.setParameter("a_lambda", 0.6)
    assert_parameter_derivative(context, "a_lambda", force.energy_derivative(context))
    assert_forces_match_energy(context, atoms=[0, 8, 15, 30])


@pytest.mark.parametrize("shape", ["cubic", "triclinic"])
def test_crossing_over_in_a_box(learned: Callable[..., DiffusionForce], shape: str) -> None:
    world = solvated.box(shape)
    force = learned(world.topology)
    context = context_of(mix(world.system, world.topology, force, interpolate=True), world.positions)
    context.setParameter(INTERPOLATE, 0.0)
    assert_equal(state_of(context), fields(world.system, world.positions))
    context.setParameter(INTERPOLATE, 1.0)
    plain = context_of(mix(world.system, world.topology, learned(world.topology)), world.positions)
    assert_equal(state_of(context), state_of(plain))
    molecules = {tuple(m) for m in context.getMolecules()}
    assert tuple(SOLUTE) in molecules


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_the_cpu_platform(learned: Callable[..., DiffusionForce], backend: str) -> None:
    """Where Systems of this size run: single precision, and exclusions that all forces must share."""
    world = solvated.box("cubic")
    system = copy.deepcopy(world.system)
    nonbonded = next(f for f in system.getForces() if isinstance(f, mm.NonbondedForce))
    extra = mm.CustomNonbondedForce("0.001*exp(-r)")
    for _ in range(system.getNumParticles()):
        extra.addParticle([])
    for i in range(nonbonded.getNumExceptions()):
        extra.addExclusion(*nonbonded.getExceptionParameters(i)[:2])
    extra.setNonbondedMethod(mm.CustomNonbondedForce.CutoffPeriodic)
    extra.setCutoffDistance(0.8)
    system.addForce(extra)
    found = {}
    for platform in ("Reference", "CPU"):
        mixed = mix(system, world.topology, learned(world.topology, backend=backend), interpolate=True)
        context = mm.Context(mixed, mm.VerletIntegrator(0.001), mm.Platform.getPlatformByName(platform))
        context.setPositions(world.positions)
        for mu in (0.0, 0.5, 1.0):
            context.setParameter(INTERPOLATE, mu)
            found[platform, mu] = state_of(context)
    for mu in (0.0, 0.5, 1.0):
        reference, cpu = found["Reference", mu], found["CPU", mu]
        size = np.linalg.norm(reference[1])
        assert np.linalg.norm(cpu[1] - reference[1]) <= 1e-4 * size
        assert abs(cpu[0] - reference[0]) <= 1e-3 * abs(reference[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_over_the_crossing(
    learned: Callable[..., DiffusionForce], backend: str, tmp_path: Path
) -> None:
    world = solvated.cluster()
    force = learned(world.topology, backend=backend)
    run = run_windows(
        mix(world.system, world.topology, force, interpolate=True), world.topology, world.positions,
        lambda_states(3, parameter=INTERPOLATE), temperature=TEMPERATURE, out_dir=tmp_path, n_frames=2,
        interval=5, n_equil=5, timestep=0.0005, learned=force, progress=False, seed=3,
    )  # fmt: skip
    assert run.dHdl is not None
    # The energy is linear in the parameter: differences are derivatives.
    u = run.u_nk.to_numpy()
    np.testing.assert_allclose(u[:, 2] - u[:, 0], run.dHdl.to_numpy()[:, 0], rtol=1e-8)
    np.testing.assert_allclose(u[:, 1] - u[:, 0], 0.5 * run.dHdl.to_numpy()[:, 0], rtol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interpolate", [False, True])
def test_rebuilt_from_manifest(
    learned: Callable[..., DiffusionForce], backend: str, interpolate: bool
) -> None:
    """The mixed System cannot be copied; the classical one and the manifest can."""
    world = solvated.cluster()
    force = learned(world.topology, backend=backend)
    mixed = mix(world.system, world.topology, force, interpolate=interpolate)
    manifest = json.loads(json.dumps(force.manifest()))
    twin = force_from_manifest(manifest, world.topology)
    again = mix(world.system, world.topology, twin, interpolate=interpolate)
    contexts = [context_of(s, world.positions) for s in (mixed, again)]
    if interpolate:
        for context in contexts:
            context.setParameter(INTERPOLATE, 0.4)
    assert_equal(*(state_of(c) for c in contexts))


def test_a_molecule_that_is_not_the_first(learned: Callable[..., DiffusionForce]) -> None:
    """Two dipeptides: each is replaced alone; both, one after the other."""
    topology, x, _ = alanine_dipeptide()
    modeller = app.Modeller(topology, x * unit.nanometer)
    aside = x + np.array([0.9, 0.2, 0.1])
    modeller.add(topology, aside * unit.nanometer)
    both = modeller.topology
    positions = np.concatenate([x, aside])
    system = solvated.force_field().createSystem(both, nonbondedMethod=app.NoCutoff)
    second = range(22, 44)
    whole, one = fields(system, positions), fields(alone(), x)
    rest = remove_subset_terms(remove_subset_terms(system, second).system, SOLUTE)
    only_pairs = fields(rest.system, positions)
    assert whole[0] - only_pairs[0] == pytest.approx(2 * one[0], rel=REL_F64)
    force_b = learned(both, atoms=list(second), prefix="b_")
    mixed = mix(remove_subset_terms(system, second).system, both, learned(both, prefix="a_"))
    mixed.addForce(force_b)
    context = context_of(mixed, positions)
    force_b.check(context)
    action = learned_alone(learned, x, 22)[0]
    assert state_of(context)[0] == pytest.approx(only_pairs[0] + 2 * action, rel=REL_F64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_own_models_of_one_water(backend: str, tmp_path: Path) -> None:
    """A plain module, crossed over; and a bare score, which has no energy to cross over to."""
    world, water = solvated.cluster(), [22, 23, 24]
    x = world.positions
    path = export_water(tmp_path / "own.diffforce", Distances())

    def build(path: Path) -> DiffusionForce:
        return DiffusionForce(path, topology=world.topology, atoms=water, backend=backend)

    force = build(path)
    context = context_of(mix(world.system, world.topology, force, interpolate=True), x)
    assert force.replaced == {"0 HarmonicBondForce": 2, "4 HarmonicAngleForce": 1}
    context.setParameter(INTERPOLATE, 0.0)
    assert_equal(state_of(context), fields(world.system, x))
    context.setParameter(INTERPOLATE, 0.7)
    assert_forces_match_energy(context, atoms=[22, 23, 24, 25])
    score = ScoreModel(Squeeze())
    path = export_water(tmp_path / "score.diffforce", score)
    rest = fields(remove_subset_terms(world.system, water).system, x)[1]
    found = state_of(context_of(mix(world.system, world.topology, build(path)), x))
    assert math.isnan(found[0])
    own = thermal_energy(TEMPERATURE) * Squeeze()(torch.as_tensor(x[None, water]), torch.zeros(1)).numpy()[0]
    np.testing.assert_allclose(found[1][water], rest[water] + own, rtol=1e-6, atol=1e-6)
    with pytest.raises(NotConservativeError, match=r"interpolate=True.*score\.diffforce"):
        mix(world.system, world.topology, build(path), interpolate=True)


def test_dynamics_stays_together(learned: Callable[..., DiffusionForce]) -> None:
    world = solvated.cluster()
    context = context_of(
        mix(world.system, world.topology, learned(world.topology), interpolate=True), world.positions
    )
    context.setParameter(INTERPOLATE, 0.5)
    mm.LocalEnergyMinimizer.minimize(context, 10.0, 50)
    context.setVelocitiesToTemperature(TEMPERATURE, 1)
    context.getIntegrator().step(100)
    x = np.array(context.getState(positions=True).getPositions(asNumpy=True)._value)
    for bond in tiny.case().topology.bonds():
        assert np.linalg.norm(x[bond[0].index] - x[bond[1].index]) < 0.2


# ------------------------------------------------------------------ what mix refuses


def test_mix_refuses(learned: Callable[..., DiffusionForce]) -> None:
    world = solvated.cluster()

    def attempt(error: type[Exception], message: str, **change: Any) -> None:
        arguments = {
            "system": world.system, "topology": world.topology, "force": learned(world.topology), **change
        }  # fmt: skip
        system, topology, force = (arguments.pop(k) for k in ("system", "topology", "force"))
        with pytest.raises(error, match=message):
            mix(system, topology, force, **arguments)
        if isinstance(force, DiffusionForce) and force.thisown:
            assert not force.interpolated  # a refusal leaves the force as it was
            assert not force.replaced

    attempt(InputError, r"mode: expected \"replace\".*addForce", mode="add")
    attempt(InputError, "force: expected a DiffusionForce, found HarmonicBondForce",
            force=mm.HarmonicBondForce())  # fmt: skip
    attempt(InputError, 'mode="add"', force=learned(world.topology, mode="operator"))
    attempt(InputError, "topology: expected 52 atoms", topology=tiny.case().topology)
    attempt(InputError, "topology: expected", topology="water.pdb")
    attempt(InputError, r"system: expected an openmm\.System", system="water.xml")
    attempt(InputError, "keep: expected", keep=["phi"])
    attempt(ModelError, "expected element|bonds", topology=_reversed(world.topology))
    used = learned(world.topology)
    mixed = mix(world.system, world.topology, used)
    attempt(InputError, "in no System yet", force=used)
    attempt(IncompatibleSystemError, "PythonForce", system=mixed)
    taken = copy.deepcopy(world.system)
    other = mm.CustomBondForce(f"{INTERPOLATE}*r")
    other.addGlobalParameter(INTERPOLATE, 0.5)
    other.addBond(30, 40, [])
    taken.addForce(other)
    attempt(IncompatibleSystemError, INTERPOLATE, system=taken, interpolate=True)
    declared = copy.deepcopy(world.system)
    other = mm.CustomBondForce("g*r")
    other.addGlobalParameter("g", 0.5)
    other.addEnergyParameterDerivative("g")
    other.addBond(0, 1, [])
    declared.addForce(other)
    attempt(IncompatibleSystemError, "keep=", system=declared)
    attempt(IncompatibleSystemError, "declares a derivative in g", system=declared, interpolate=True, keep=[])
    empty = mm.System()
    for i in range(world.system.getNumParticles()):
        empty.addParticle(world.system.getParticleMass(i))
    attempt(IncompatibleSystemError, "found none", system=empty, interpolate=True)
    rigid = solvated.force_field().createSystem(world.topology, constraints=app.HBonds)
    attempt(IncompatibleSystemError, "constraints=None", system=rigid)


def _reversed(topology: app.Topology) -> app.Topology:
    source = list(topology.atoms())
    out = app.Topology()
    residue = out.addResidue("X", out.addChain())
    for atom in reversed(source):
        out.addAtom(atom.name, atom.element, residue)
    return out


def test_periodic_system_needs_a_periodic_force(learned: Callable[..., DiffusionForce]) -> None:
    world = solvated.box()
    topology = copy.deepcopy(world.topology)
    topology.setPeriodicBoxVectors(None)
    force = learned(topology)
    with pytest.raises(IncompatibleSystemError, match="setPeriodicBoxVectors"):
        mix(world.system, world.topology, force)


def test_derivative_of_other_parameters_is_refused(learned: Callable[..., DiffusionForce]) -> None:
    world = solvated.cluster()
    force = learned(world.topology)
    context = context_of(mix(world.system, world.topology, force), world.positions)
    with pytest.raises(InputError, match='expected "lambda" or "lambda_interpolate"'):
        force.energy_derivative(context, "noise")
    with pytest.raises(InputError, match="parameter: expected"):
        force.energy_derivative(context, INTERPOLATE)
    assert context.getSystem().getForce(0).getForceGroup() == CLASSICAL_GROUP
