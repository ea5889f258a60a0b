"""ACE-ALA-NME in vacuum, amber14, with the perturbations that the documentation measures.

Flexible bonds, no cutoff, 300 K. The methyl hydrogens of alanine change into something else and
the C-beta takes the charge that keeps the total.

========  ===============  ======  ==========  ================  =======  =====
name      atoms            q [e]   sigma [nm]  epsilon [kJ/mol]  windows  power
========  ===============  ======  ==========  ================  =======  =====
``F1``    HB1              -0.22   0.312       0.255             11       1
``Br3``   HB1, HB2, HB3    -0.10   0.395       1.34              19       3
``I3``    HB1, HB2, HB3    -0.10   0.420       1.70              19       3.5
========  ===============  ======  ==========  ================  =======  =====
"""

from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import openmm as mm
from openmm import app, unit

from .alchemy import EndStatePair, lambda_states, perturb_nonbonded
from .errors import InputError
from .systems import FloatArray, add_flat_bottom_torsion

TEMPERATURE = 300.0
"""[K]."""

PHI_CENTRE_DEG = -120.0
PHI_HALF_WIDTH_DEG = 120.0
"""The flat-bottom restraint keeps phi within 120 degrees of -120: C7ax is otherwise visited by
chance, and two runs that differ in it do not compare."""

PERTURBATIONS: dict[str, tuple[tuple[str, ...], tuple[float, float, float], int, float]] = {
    "F1": (("HB1",), (-0.22, 0.312, 0.255), 11, 1.0),
    "Br3": (("HB1", "HB2", "HB3"), (-0.10, 0.395, 1.34), 19, 3.0),
    "I3": (("HB1", "HB2", "HB3"), (-0.10, 0.42, 1.70), 19, 3.5),
}
"""name -> (atoms, (q [e], sigma [nm], epsilon [kJ/mol]), windows, power of the lambda states)."""


@dataclass(frozen=True)
class AlanineCase:
    """One perturbation of alanine dipeptide.

    Attributes
    ----------
    name : str
    topology : openmm.app.Topology
    positions : numpy.ndarray, shape (22, 3)
        C7eq minimum [nm].
    system_0, system_1 : openmm.System
        End states (with the phi restraint in both, if asked for).
    perturbed : tuple of int
        Atoms whose parameters change, C-beta included.
    states : list of dict
        The lambda states of the table above.
    """

    name: str
    topology: Any
    positions: FloatArray
    system_0: mm.System
    system_1: mm.System
    perturbed: tuple[int, ...]
    states: list[dict[str, float]]

    @property
    def pair(self) -> EndStatePair:
        """The end states at 300 K."""
        return EndStatePair(self.system_0, self.system_1, self.topology, TEMPERATURE)


def alanine_dipeptide(*, restrain_phi: bool = False) -> tuple[Any, FloatArray, mm.System]:
    """Topology, positions [nm] and amber14 System of ACE-ALA-NME in vacuum.

    Parameters
    ----------
    restrain_phi : bool
        Add the flat-bottom restraint on phi.

    Returns
    -------
    topology : openmm.app.Topology
    positions : numpy.ndarray, shape (22, 3)
    system : openmm.System
        No cutoff, no constraints.

    Examples
    --------
    >>> topology, positions, system = alanine_dipeptide()
    >>> positions.shape, system.getNumConstraints()
    ((22, 3), 0)
    """
    path = resources.files("openmm_diffforce") / "data" / "alanine_dipeptide.pdb"
    with resources.as_file(path) as name:
        pdb = app.PDBFile(str(name))
    system = app.ForceField("amber14/protein.ff14SB.xml").createSystem(
        pdb.topology, nonbondedMethod=app.NoCutoff, constraints=None, rigidWater=False
    )
    if restrain_phi:
        add_flat_bottom_torsion(system, phi_atoms(pdb.topology), PHI_CENTRE_DEG, PHI_HALF_WIDTH_DEG)
    positions = np.array(pdb.getPositions(asNumpy=True).value_in_unit(unit.nanometer))
    return pdb.topology, positions, system


def phi_atoms(topology: Any) -> tuple[int, int, int, int]:
    """Atoms of phi: C(ACE), N, CA, C of the alanine."""
    return _named(topology, ("ACE", "C"), ("ALA", "N"), ("ALA", "CA"), ("ALA", "C"))  # type: ignore[return-value]


def psi_atoms(topology: Any) -> tuple[int, int, int, int]:
    """Atoms of psi: N, CA, C of the alanine, N(NME)."""
    return _named(topology, ("ALA", "N"), ("ALA", "CA"), ("ALA", "C"), ("NME", "N"))  # type: ignore[return-value]


def _named(topology: Any, *names: tuple[str, str]) -> tuple[int, ...]:
    index = {(a.residue.name, a.name): a.index for a in topology.atoms()}
    try:
        return tuple(index[n] for n in names)
    except KeyError as err:
        raise InputError(f"topology: expected ACE-ALA-NME, found no atom {err}.") from err


def alanine_case(name: str = "F1", *, restrain_phi: bool = False) -> AlanineCase:
    """Build one of the perturbations ``F1``, ``Br3``, ``I3``.

    Parameters
    ----------
    name : str
        A key of :data:`PERTURBATIONS`.
    restrain_phi : bool
        Add the flat-bottom restraint on phi to both end states.

    Returns
    -------
    AlanineCase

    Raises
    ------
    InputError
        For an unknown name.

    Examples
    --------
    >>> case = alanine_case("F1")
    >>> case.pair.operator_values(case.positions).shape
    (1,)
    """
    if name not in PERTURBATIONS:
        raise InputError(f"name: expected one of {sorted(PERTURBATIONS)}, found {name!r}.")
    atoms, values, n_windows, power = PERTURBATIONS[name]
    topology, positions, system_0 = alanine_dipeptide(restrain_phi=restrain_phi)
    changed = _named(topology, *(("ALA", a) for a in atoms))
    (c_beta,) = _named(topology, ("ALA", "CB"))
    system_1 = perturb_nonbonded(system_0, dict.fromkeys(changed, values), neutralize_on=c_beta)
    return AlanineCase(
        name=name,
        topology=topology,
        positions=positions,
        system_0=system_0,
        system_1=system_1,
        perturbed=tuple(sorted((*changed, c_beta))),
        states=lambda_states(n_windows, power),
    )
