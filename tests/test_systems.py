import math

import numpy as np
import openmm as mm
import pytest
from openmm import app, unit

from openmm_diffforce import systems as s
from openmm_diffforce.alanine import alanine_dipeptide, phi_atoms
from openmm_diffforce.errors import (
    ConvergenceError,
    IncompatibleSystemError,
    InputError,
    UnitsError,
)
from openmm_diffforce.units import MOLAR_GAS_CONSTANT


def spring_system(k: float = 1000.0, n: int = 2) -> mm.System:
    system = mm.System()
    for _ in range(n):
        system.addParticle(12.0)
    bond = mm.HarmonicBondForce()
    bond.addBond(0, 1, 0.15, k)
    system.addForce(bond)
    return system


def topology_of(n: int) -> app.Topology:
    topology = app.Topology()
    residue = topology.addResidue("X", topology.addChain())
    for _ in range(n):
        topology.addAtom("C", app.element.carbon, residue)
    return topology


def test_energy_and_force_by_hand() -> None:
    x = np.array([[[0, 0, 0], [0.2, 0, 0]], [[0, 0, 0], [0, 0.1, 0]]])
    assert s.potential_energies(spring_system(), x) == pytest.approx([1.25, 1.25], rel=1e-12)
    f = s.forces(spring_system(), x)
    assert f[0, 1] == pytest.approx([-50.0, 0, 0])
    assert f[1, 1] == pytest.approx([0, 50.0, 0])


def test_quantities_are_converted() -> None:
    x = np.array([[[0, 0, 0], [2.0, 0, 0]]]) * unit.angstrom
    assert s.potential_energies(spring_system(), x) == pytest.approx([1.25])
    with pytest.raises(UnitsError, match="positions"):
        s.potential_energies(spring_system(), np.zeros((1, 2, 3)) * unit.kelvin)


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (np.zeros((1, 3, 3)), "expected shape"),
        (np.zeros((2, 2)), "expected shape"),
        (np.full((1, 2, 3), np.nan), "finite"),
        ("abc", "array of numbers"),
    ],
)
def test_bad_positions(x: object, text: str) -> None:
    with pytest.raises(InputError, match=text):
        s.potential_energies(spring_system(), x)


def test_bad_doors() -> None:
    x = np.zeros((1, 2, 3))
    with pytest.raises(InputError, match="platform"):
        s.potential_energies(spring_system(), x, platform="Abacus")
    with pytest.raises(InputError, match="box"):
        s.potential_energies(spring_system(), x, box=np.zeros((2, 2)))
    with pytest.raises(InputError, match=r"openmm\.System"):
        s.describe("system")
    with pytest.raises(InputError, match="empty"):
        s.describe(mm.System())
    with pytest.raises(InputError, match="parameter 'lam'"):
        s.evaluate_frames(spring_system(), x, parameters={"lam": 1.0})
    bonded = np.array([[[0, 0, 0], [0.1, 0, 0]]])
    with pytest.raises(InputError, match="derivative"):
        s.evaluate_frames(spring_system(), bonded, derivative="lambda")


def test_describe_and_singular_atoms() -> None:
    system = spring_system(n=4)
    system.addConstraint(2, 0, 0.1)
    system.setParticleMass(3, 0.0)
    system.setVirtualSite(3, mm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    found = s.describe(system)
    assert found.forces == ("HarmonicBondForce",)
    assert found.constrained == (0, 2)
    assert found.virtual_sites == (3,)
    assert found.massless == ()
    assert not found.periodic
    with pytest.raises(IncompatibleSystemError, match="2 constrained atoms"):
        s.require_unconstrained(system)
    with pytest.raises(IncompatibleSystemError, match="virtual-site"):
        s.require_unconstrained(system, [1, 3])
    s.require_unconstrained(system, [1])


def test_learned_forces_are_refused_not_deserialized() -> None:
    system = spring_system()
    force = mm.PythonForce(_no_energy)
    system.addForce(force)
    with pytest.raises(IncompatibleSystemError, match="PythonForce"):
        s.clone_system(system)


def _no_energy(state: mm.State) -> tuple[float, np.ndarray]:
    return 0.0, np.zeros((2, 3))


def test_same_particles() -> None:
    one = spring_system()
    s.check_same_particles(one, spring_system(5.0))
    with pytest.raises(IncompatibleSystemError, match="number of particles"):
        s.check_same_particles(one, spring_system(n=3))
    heavy = spring_system()
    heavy.setParticleMass(1, 13.0)
    with pytest.raises(IncompatibleSystemError, match="equal masses"):
        s.check_same_particles(one, heavy)
    tied = spring_system()
    tied.addConstraint(0, 1, 0.1)
    with pytest.raises(IncompatibleSystemError, match="same constraints"):
        s.check_same_particles(one, tied)


@pytest.mark.parametrize(("phi_deg", "outside_deg"), [(-120, 0), (-1, 0), (179, 0), (60, 60)])
def test_flat_bottom_torsion(phi_deg: float, outside_deg: float) -> None:
    system = mm.System()
    for _ in range(4):
        system.addParticle(1.0)
    s.add_flat_bottom_torsion(system, (0, 1, 2, 3), -120.0, 120.0, 10.0)
    a = math.radians(phi_deg)
    # IUPAC sign: looking along 1 -> 2, positive is clockwise.
    x = np.array([[1, 0, 0], [0, 0, 0], [0, 0, 1], [math.cos(a), math.sin(a), 1]])
    expected = 0.5 * 10.0 * math.radians(outside_deg) ** 2
    assert s.potential_energies(system, x) == pytest.approx([expected], abs=1e-9)


def test_flat_bottom_torsion_refuses() -> None:
    system = spring_system(n=4)
    with pytest.raises(InputError, match="four different"):
        s.add_flat_bottom_torsion(system, (0, 1, 2, 2), 0, 10)
    with pytest.raises(InputError, match="half_width"):
        s.add_flat_bottom_torsion(system, (0, 1, 2, 3), 0, 200)
    with pytest.raises(InputError, match="k:"):
        s.add_flat_bottom_torsion(system, (0, 1, 2, 3), 0, 20, -1.0)


def test_sample_is_canonical_and_repeatable() -> None:
    # One spring: mean energy of 1/2 k (r - r0)^2 in 3D, by quadrature.
    system, kT = spring_system(1000.0), MOLAR_GAS_CONSTANT * 300.0
    start = np.array([[0, 0, 0], [0.15, 0, 0]])
    args = {"temperature": 300.0, "n_frames": 4000, "interval": 100, "n_equil": 500}
    x = s.sample(system, topology_of(2), start, friction=10.0, timestep=0.004, seed=3, **args)
    r = np.linalg.norm(x[:, 1] - x[:, 0], axis=1)
    grid = np.linspace(1e-4, 0.6, 20001)
    weight = grid**2 * np.exp(-0.5 * 1000.0 * (grid - 0.15) ** 2 / kT)
    mean = (grid * weight).sum() / weight.sum()
    sd = math.sqrt(((grid - mean) ** 2 * weight).sum() / weight.sum())
    # 100 steps of 4 fs at 10/ps leave a correlation of a few frames: 4 is a generous inflation.
    assert abs(r.mean() - mean) < 3.5 * sd * math.sqrt(4 / len(r))
    assert r.std() == pytest.approx(sd, rel=0.1)
    again = s.sample(system, topology_of(2), start, friction=10.0, timestep=0.004, seed=3,
                     **{**args, "n_frames": 5})  # fmt: skip
    assert np.array_equal(again, x[:5])
    other = s.sample(system, topology_of(2), start, friction=10.0, timestep=0.004, seed=4,
                     **{**args, "n_frames": 5})  # fmt: skip
    assert not np.allclose(other, again)


def test_sample_refuses() -> None:
    system, top, x = spring_system(), topology_of(2), np.array([[0, 0, 0], [0.15, 0, 0]])
    good = {"temperature": 300.0, "n_frames": 2, "n_equil": 0, "interval": 1}
    for bad, error in (
        ({"temperature": -1.0}, UnitsError),
        ({"n_frames": 0}, InputError),
        ({"interval": 1.5}, InputError),
        ({"n_equil": -1}, InputError),
        ({"seed": -1}, InputError),
        ({"timestep": 0.0}, InputError),
        ({"timestep": 1.0 * unit.kelvin}, UnitsError),
    ):
        with pytest.raises(error):
            s.sample(system, top, x, **{**good, **bad})
    with pytest.raises(InputError, match="topology"):
        s.sample(system, topology_of(3), x, **good)
    with pytest.raises(InputError, match="positions"):
        s.sample(system, top, np.zeros((3, 3)), **good)


def test_blow_up_is_said() -> None:
    system, top, x = spring_system(1e9), topology_of(2), np.array([[0, 0, 0], [0.16, 0, 0]])
    with pytest.raises(ConvergenceError, match="unstable"):
        s.sample(system, top, x, temperature=300.0, n_frames=1, interval=10000,
                 timestep=0.1, minimize=False)  # fmt: skip


def test_alanine_builder() -> None:
    topology, x, system = alanine_dipeptide(restrain_phi=True)
    names = [a.name for a in topology.atoms()]
    assert [names[i] for i in phi_atoms(topology)] == ["C", "N", "CA", "C"]
    assert topology.getNumBonds() == 21
    # The committed structure is a minimum of the force field (to PDB's digits), and L.
    assert abs(s.forces(system, x)).max() < 100.0
    index = {a.name: a.index for a in topology.atoms() if a.residue.name == "ALA"}
    n, ca, cb, c = (x[index[k]] for k in ("N", "CA", "CB", "C"))
    assert np.dot(np.cross(n - ca, c - ca), cb - ca) > 0
