"""End-state pairs, the operator O = beta (U_1 - U_0) per frame, and lambda paths between them."""

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import openmm as mm
from openmm import unit

from .constants import LAMBDA
from .errors import IncompatibleSystemError, InputError
from .systems import (
    BOOKKEEPING_FORCES,
    FloatArray,
    check_frames,
    check_positive,
    check_same_particles,
    check_topology,
    clone_system,
    constrained_atoms,
    coulomb_constant,
    evaluate_frames,
    force_type,
    require_classical,
)
from .units import thermal_energy, to_md

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EndStatePair:
    r"""Two Hamiltonians of the same particles at one temperature.

    .. math:: O(x) = \beta\,(U_1(x) - U_0(x)), \qquad S_\lambda = S_0 + \lambda O

    ======  =========================  ==================
    symbol  code                       unit
    ======  =========================  ==================
    U_0     ``system_0``               kJ/mol
    U_1     ``system_1``               kJ/mol
    beta    ``1 / pair.kT``            mol/kJ
    O       ``operator_values(x)``     1
    ======  =========================  ==================

    Parameters
    ----------
    system_0, system_1 : openmm.System
        Of classical forces, with the same particles, masses, constraints and box. Copies are
        kept: what happens to the originals later does not matter.
    topology : openmm.app.Topology
    temperature : float or Quantity
        [K].

    Raises
    ------
    IncompatibleSystemError
        If the Systems are not of the same particles, or hold unknown or learned forces.
    InputError, UnitsError
        For a topology or temperature that does not fit.

    Examples
    --------
    >>> import openmm, openmm.app
    >>> def spring(k):
    ...     system = openmm.System()
    ...     _ = [system.addParticle(1.0) for _ in range(2)]
    ...     bond = openmm.HarmonicBondForce()
    ...     _ = bond.addBond(0, 1, 0.1, k)
    ...     _ = system.addForce(bond)
    ...     return system
    >>> topology = openmm.app.Topology()
    >>> residue = topology.addResidue("X", topology.addChain())
    >>> _ = [topology.addAtom("H", openmm.app.element.hydrogen, residue) for _ in range(2)]
    >>> pair = EndStatePair(spring(100.0), spring(300.0), topology, 300.0)
    >>> (pair.operator_values([[[0, 0, 0], [0.2, 0, 0]]]) * pair.kT).round(6).tolist()
    [1.0]
    """

    system_0: mm.System
    system_1: mm.System
    topology: Any
    temperature: Any

    def __post_init__(self) -> None:
        thermal_energy(self.temperature)
        kelvin = float(to_md(self.temperature, unit.kelvin, name="temperature"))
        for name in ("system_0", "system_1"):
            require_classical(getattr(self, name), name=name)
        check_same_particles(self.system_0, self.system_1)
        check_topology(self.topology, self.system_0)
        object.__setattr__(self, "temperature", kelvin)
        object.__setattr__(self, "system_0", clone_system(self.system_0))
        object.__setattr__(self, "system_1", clone_system(self.system_1))

    @classmethod
    def from_parameter(
        cls,
        system: mm.System,
        topology: Any,
        parameter: str,
        *,
        temperature: Any,
        value_0: float = 0.0,
        value_1: float = 1.0,
    ) -> "EndStatePair":
        """The pair that one System with a context parameter holds.

        Parameters
        ----------
        system : openmm.System
            With a force that defines ``parameter``.
        topology : openmm.app.Topology
        parameter : str
            Name of the context parameter.
        temperature : float or Quantity
            [K].
        value_0, value_1 : float
            Its values at the end states.

        Raises
        ------
        InputError
            If no force defines the parameter.

        Notes
        -----
        :meth:`linear_system` refuses such a pair: the System's own path is the one to use.
        """
        ends = []
        for value in (value_0, value_1):
            if not (isinstance(value, int | float) and math.isfinite(value)):
                raise InputError(f"{parameter}: expected finite end values, found {value!r}.")
            end = clone_system(system)
            if _set_default_parameter(end, parameter, float(value)) == 0:
                raise InputError(
                    f"parameter: no force of the System defines {parameter!r}; found "
                    f"{sorted(_default_parameters(system))}."
                )
            ends.append(end)
        return cls(ends[0], ends[1], topology, temperature)

    @property
    def kT(self) -> float:
        """Thermal energy [kJ/mol]."""
        return thermal_energy(self.temperature)

    @property
    def n_atoms(self) -> int:
        """Number of particles."""
        return int(self.system_0.getNumParticles())

    @property
    def constrained_atoms(self) -> tuple[int, ...]:
        """Atoms in constraints: a base action over them is refused, an operator may see them."""
        return constrained_atoms(self.system_0)

    @property
    def perturbed_atoms(self) -> tuple[int, ...]:
        """Atoms whose own nonbonded parameters differ between the end states: the operator's sites.

        Raises
        ------
        IncompatibleSystemError
            If anything else differs (bonded terms, other forces), or nothing does: then the sites
            of a pair operator do not follow from the Systems.
        """
        found: set[int] = set()
        for force_0, force_1 in _matched_forces(self.system_0, self.system_1):
            if force_0 is None or force_1 is None or force_type(force_0) != "NonbondedForce":
                if force_0 and force_1 and _equal(force_0, force_1):
                    continue
                raise IncompatibleSystemError(
                    "end states: the sites of the perturbation follow from NonbondedForce alone, and "
                    f"{force_type(force_0 or force_1)} differs too; say which atoms are its sites."
                )
            for i in range(self.n_atoms):
                if force_0.getParticleParameters(i) != force_1.getParticleParameters(i):
                    found.add(i)
        if not found:
            raise IncompatibleSystemError(
                "end states: no atom's nonbonded parameters differ; are the two Systems the same?"
            )
        return tuple(sorted(found))

    @property
    def changed_atoms(self) -> tuple[int, ...]:
        """Atoms of every term that differs: nonbonded parameters, bonds, angles, torsions.

        Where only nonbonded parameters differ these are :attr:`perturbed_atoms`.

        Raises
        ------
        IncompatibleSystemError
            If a force of another kind differs, or nothing does.
        """
        found: set[int] = set()
        for force_0, force_1 in _matched_forces(self.system_0, self.system_1):
            if force_0 is not None and force_1 is not None and _equal(force_0, force_1):
                continue
            name = force_type(force_0 or force_1)
            if name in _BONDED:
                terms = [
                    Counter(_bonded_terms(f, *_BONDED[name][:2])) if f is not None else Counter()
                    for f in (force_0, force_1)
                ]
                found |= {a for term in (terms[0] - terms[1]) | (terms[1] - terms[0]) for a in term[0]}
            elif name == "NonbondedForce" and force_0 is not None and force_1 is not None:
                found |= _changed_nonbonded(force_0, force_1)
            elif name not in BOOKKEEPING_FORCES:
                raise IncompatibleSystemError(
                    f"end states: {name} differs, which does not say what atoms change; say which."
                )
        if not found:
            raise IncompatibleSystemError(
                "end states: no atom's parameters differ; are the two Systems the same?"
            )
        return tuple(sorted(found))

    def reduced_potentials(
        self, x_nad: Any, *, box: Any = None, platform: str | None = "Reference"
    ) -> FloatArray:
        """u_0 and u_1 of every frame [kT], shape (n_frames, 2).

        Parameters
        ----------
        x_nad : array_like, shape (n_frames, n_atoms, 3)
            [nm].
        box : array_like, optional
            [nm], shape (3, 3) or (n_frames, 3, 3).
        platform : str, optional
            The Reference platform works in float64: the difference of two large energies needs it.

        Raises
        ------
        InputError, UnitsError
            For positions that do not fit.
        """
        x = check_frames(x_nad, self.n_atoms)
        both = [evaluate_frames(s, x, box=box, platform=platform)[0] for s in (self.system_0, self.system_1)]
        return np.stack(both, axis=1) / self.kT

    def operator_values(
        self, x_nad: Any, *, box: Any = None, platform: str | None = "Reference"
    ) -> FloatArray:
        """O = beta (U_1 - U_0) of every frame [kT], shape (n_frames,).

        Arguments and errors as for :meth:`reduced_potentials`.
        """
        u = self.reduced_potentials(x_nad, box=box, platform=platform)
        return u[:, 1] - u[:, 0]

    def operator_gradients(
        self, x_nad: Any, *, box: Any = None, platform: str | None = "Reference"
    ) -> FloatArray:
        """grad O = beta (F_0 - F_1) of every frame [1/nm], shape (n_frames, n_atoms, 3).

        Arguments and errors as for :meth:`reduced_potentials`.
        """
        x = check_frames(x_nad, self.n_atoms)
        found = []
        for system in (self.system_0, self.system_1):
            f = evaluate_frames(system, x, box=box, platform=platform, with_forces=True)[1]
            assert f is not None  # for the type checker: with_forces is set
            found.append(f)
        return (found[0] - found[1]) / self.kT

    def linear_system(self, *, parameter: str = LAMBDA) -> mm.System:
        r"""One System with U = (1 - lambda) U_0 + lambda U_1, exactly, and dU/dlambda.

        Terms that both ends share stay as they are. Bonded terms of one end only are scaled by
        ``1 - lambda`` or ``lambda``. A NonbondedForce without cutoff stays U_0's, and only the
        pairs that change are corrected: with Lorentz-Berthelot parameters the difference of two
        pair energies is

        .. math:: \lambda\left(\frac{\Delta q}{4\pi\epsilon_0 r} + \frac{\Delta C_{12}}{r^{12}}
                  - \frac{\Delta C_6}{r^6}\right)

        which a CustomBondForce computes at nearly classical speed. Everything else (PME, GB,
        custom forces that differ) is held twice in a CustomCVForce: as exact, but slower.

        Parameters
        ----------
        parameter : str
            Name of the context parameter; its default value is 0.

        Returns
        -------
        openmm.System
            Context parameter ``parameter`` in [0, 1], with an energy derivative.

        Raises
        ------
        IncompatibleSystemError
            If the ends differ in a thermostat, barostat or centre-of-mass remover, if they use
            a context parameter with two different defaults, or if ``parameter`` is taken.
        """
        if not isinstance(parameter, str) or not parameter.isidentifier():
            raise InputError(f"parameter: expected an identifier, found {parameter!r}.")
        _check_parameters(self.system_0, self.system_1, parameter)
        mixed = clone_system(self.system_0)
        for i in reversed(range(mixed.getNumForces())):
            mixed.removeForce(i)
        for force_0, force_1 in _matched_forces(self.system_0, self.system_1):
            for force in _mix_forces(force_0, force_1, parameter):
                mixed.addForce(force)
        if parameter not in _default_parameters(mixed):
            raise IncompatibleSystemError(
                "end states: expected two different Hamiltonians, found no difference between "
                "them; there is nothing to mix."
            )
        return mixed


def _default_parameters(system: mm.System) -> dict[str, float]:
    context = mm.Context(system, mm.VerletIntegrator(0.001), mm.Platform.getPlatformByName("Reference"))
    return dict(context.getParameters())


def _set_default_parameter(system: mm.System, parameter: str, value: float) -> int:
    n_set = 0
    for force in system.getForces():
        if not hasattr(force, "getNumGlobalParameters"):
            continue
        for i in range(force.getNumGlobalParameters()):
            if force.getGlobalParameterName(i) == parameter:
                force.setGlobalParameterDefaultValue(i, value)
                n_set += 1
    return n_set


def _check_parameters(system_0: mm.System, system_1: mm.System, parameter: str) -> None:
    found_0, found_1 = _default_parameters(system_0), _default_parameters(system_1)
    for name in sorted(found_0.keys() & found_1.keys()):
        if found_0[name] != found_1[name]:
            raise IncompatibleSystemError(
                f"end states: context parameter {name!r} has the defaults {found_0[name]} and "
                f"{found_1[name]}, which one System cannot hold; run windows over {name!r} itself "
                f"(states [{{{name!r}: {found_0[name]}}}, ..., {{{name!r}: {found_1[name]}}}])."
            )
    if parameter in found_0 or parameter in found_1:
        raise IncompatibleSystemError(
            f"parameter: {parameter!r} is a context parameter of an end state already; choose another name."
        )


def _matched_forces(
    system_0: mm.System, system_1: mm.System
) -> list[tuple[mm.Force | None, mm.Force | None]]:
    """Pairs of forces: equal ones first, then by type in order; None where one end has none."""
    left = list(system_0.getForces())
    right = list(system_1.getForces())
    xml = {id(f): mm.XmlSerializer.serialize(f) for f in [*left, *right]}
    pairs: list[tuple[mm.Force | None, mm.Force | None]] = []
    for equal in (True, False):
        for force in list(left):
            for other in right:
                same = xml[id(force)] == xml[id(other)]
                if same if equal else force_type(force) == force_type(other):
                    pairs.append((force, other))
                    left.remove(force)
                    right.remove(other)
                    break
    pairs += [(f, None) for f in left] + [(None, f) for f in right]
    return pairs


def _equal(force_0: mm.Force, force_1: mm.Force) -> bool:
    return bool(mm.XmlSerializer.serialize(force_0) == mm.XmlSerializer.serialize(force_1))


def _mix_forces(force_0: mm.Force | None, force_1: mm.Force | None, parameter: str) -> list[mm.Force]:
    one = force_0 if force_0 is not None else force_1
    assert one is not None  # pairs are never empty
    name = force_type(one)
    if force_0 is not None and force_1 is not None:
        if mm.XmlSerializer.serialize(force_0) == mm.XmlSerializer.serialize(force_1):
            return [copy.deepcopy(force_0)]
        same_box = (
            name not in BOOKKEEPING_FORCES
            and force_0.usesPeriodicBoundaryConditions() == force_1.usesPeriodicBoundaryConditions()
        )
        if name in _BONDED and same_box:
            return _mix_bonded(force_0, force_1, parameter)
        if name == "NonbondedForce" and _plain_nonbonded(force_0) and _plain_nonbonded(force_1):
            return _mix_nonbonded(force_0, force_1, parameter)
    if name in BOOKKEEPING_FORCES:
        raise IncompatibleSystemError(
            f"end states: expected the same {name} in both, found "
            f"{'different settings' if force_0 and force_1 else 'it in one only'}; remove it from "
            "both and add it to the mixed System."
        )
    return [_mix_as_collective_variables(force_0, force_1, parameter)]


def _finish(mixed: Any, like: mm.Force, parameter: str, name: str) -> mm.Force:
    mixed.addGlobalParameter(parameter, 0.0)
    mixed.addEnergyParameterDerivative(parameter)
    mixed.setForceGroup(like.getForceGroup())
    mixed.setName(name)
    return mixed


def _mix_as_collective_variables(
    force_0: mm.Force | None, force_1: mm.Force | None, parameter: str
) -> mm.Force:
    terms = []
    if force_0 is not None:
        terms.append(f"(1-{parameter})*u0")
    if force_1 is not None:
        terms.append(f"{parameter}*u1")
    mixed = mm.CustomCVForce(" + ".join(terms))
    like = force_0 if force_0 is not None else force_1
    assert like is not None  # pairs are never empty
    for name, force in (("u0", force_0), ("u1", force_1)):
        if force is not None:
            inner = copy.deepcopy(force)
            inner.setForceGroup(0)
            if isinstance(inner, mm.NonbondedForce):
                inner.setReciprocalSpaceForceGroup(-1)
            mixed.addCollectiveVariable(name, inner)
    return _finish(mixed, like, parameter, f"linear mix of {force_type(like)}")


# Bonded forces: how to read a term as (atoms, parameters), and the same energy as an expression.
_BONDED = {
    "HarmonicBondForce": ("Bond", 2, mm.CustomBondForce, "0.5*k*(r-r0)^2", ("r0", "k")),
    "HarmonicAngleForce": ("Angle", 3, mm.CustomAngleForce, "0.5*k*(theta-t0)^2", ("t0", "k")),
    "PeriodicTorsionForce": (
        "Torsion", 4, mm.CustomTorsionForce, "k*(1+cos(n*theta-phase))", ("n", "phase", "k"),
    ),
}  # fmt: skip


def _mix_bonded(force_0: Any, force_1: Any, parameter: str) -> list[mm.Force]:
    what, n_atoms, custom_class, expression, names = _BONDED[force_type(force_0)]
    terms = [Counter(_bonded_terms(f, what, n_atoms)) for f in (force_0, force_1)]
    shared = terms[0] & terms[1]
    base = type(force_0)()
    base.setUsesPeriodicBoundaryConditions(force_0.usesPeriodicBoundaryConditions())
    base.setForceGroup(force_0.getForceGroup())
    for term in shared.elements():
        getattr(base, f"add{what}")(*term[0], *term[1])
    mixed = custom_class(f"(on1*{parameter} + (1-on1)*(1-{parameter}))*{expression}")
    mixed.setUsesPeriodicBoundaryConditions(force_0.usesPeriodicBoundaryConditions())
    for name in ("on1", *names):
        getattr(mixed, f"addPer{what}Parameter")(name)
    n_own = 0
    for on1 in (0, 1):
        for atoms, values in (terms[on1] - shared).elements():
            getattr(mixed, f"add{what}")(*atoms, [float(on1), *values])
            n_own += 1
    if n_own == 0:  # the same terms in another order
        return [base]
    found = [_finish(mixed, force_0, parameter, f"linear mix of {force_type(force_0)}")]
    return [base, *found] if shared else found


def _bonded_terms(force: Any, what: str, n_atoms: int) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    found = []
    for i in range(getattr(force, f"getNum{what}s")()):
        fields = getattr(force, f"get{what}Parameters")(i)
        values = tuple(
            v if isinstance(v, int) else float(v.value_in_unit_system(unit.md_unit_system))
            for v in fields[n_atoms:]
        )
        found.append((tuple(int(a) for a in fields[:n_atoms]), values))
    return found


def _changed_nonbonded(force_0: Any, force_1: Any) -> set[int]:
    """Atoms with other parameters of their own, and pairs of exceptions that none of them explains."""
    found = {
        i for i in range(force_0.getNumParticles())
        if force_0.getParticleParameters(i) != force_1.getParticleParameters(i)
    }  # fmt: skip
    exceptions: list[dict[frozenset[int], tuple[float, ...]]] = []
    for force in (force_0, force_1):
        rows = [force.getExceptionParameters(i) for i in range(force.getNumExceptions())]
        exceptions.append({frozenset((int(r[0]), int(r[1]))): tuple(v._value for v in r[2:]) for r in rows})
    for pair in exceptions[0].keys() | exceptions[1].keys():
        if not pair & found and exceptions[0].get(pair) != exceptions[1].get(pair):
            found |= pair
    return found


def _plain_nonbonded(force: mm.NonbondedForce) -> bool:
    return (
        force.getNonbondedMethod() == mm.NonbondedForce.NoCutoff
        and force.getNumParticleParameterOffsets() == 0
        and force.getNumExceptionParameterOffsets() == 0
    )


def _pair_coefficients(force: mm.NonbondedForce) -> tuple[FloatArray, FloatArray, FloatArray]:
    """q_i q_j [e^2], C12 and C6 of every pair, exceptions included, each (n, n)."""
    n = force.getNumParticles()
    rows = [force.getParticleParameters(i) for i in range(n)]
    q, sigma, eps = (np.array([float(r[k]._value) for r in rows]) for k in range(3))
    qq = np.outer(q, q)
    s6 = (0.5 * (sigma[:, None] + sigma[None, :])) ** 6
    e4 = 4.0 * np.sqrt(np.outer(eps, eps))
    c12, c6 = e4 * s6**2, e4 * s6
    for i in range(force.getNumExceptions()):
        a, b, pair_qq, pair_sigma, pair_eps = force.getExceptionParameters(i)
        six = float(pair_sigma._value) ** 6
        four = 4.0 * float(pair_eps._value)
        for table, value in ((qq, float(pair_qq._value)), (c12, four * six**2), (c6, four * six)):
            table[a, b] = table[b, a] = value
    return qq, c12, c6


def _mix_nonbonded(force_0: mm.NonbondedForce, force_1: mm.NonbondedForce, parameter: str) -> list[mm.Force]:
    deltas = [b - a for a, b in zip(_pair_coefficients(force_0), _pair_coefficients(force_1), strict=True)]
    # A common atom's pair may differ in the last bit: that is a difference too, and is kept.
    changed = np.argwhere(np.triu((deltas[0] != 0) | (deltas[1] != 0) | (deltas[2] != 0), 1))
    mixed = mm.CustomBondForce(f"{parameter}*(dqq/r + dc12*s^2 - dc6*s); s=1/r^6")
    for name in ("dqq", "dc12", "dc6"):
        mixed.addPerBondParameter(name)
    for a, b in changed:
        mixed.addBond(
            int(a),
            int(b),
            [coulomb_constant() * deltas[0][a, b], deltas[1][a, b], deltas[2][a, b]],
        )
    if len(changed) == 0:  # they differ in cutoff settings that NoCutoff ignores
        return [copy.deepcopy(force_0)]
    return [
        copy.deepcopy(force_0),
        _finish(mixed, force_0, parameter, "linear mix of NonbondedForce"),
    ]


def lambda_states(n: int, power: float = 1.0, *, parameter: str = LAMBDA) -> list[dict[str, float]]:
    """States from lambda = 0 to 1, ``lambda_k = (k / (n - 1)) ** power``.

    Parameters
    ----------
    n : int
        Number of states, at least 2.
    power : float
        Above 1 the states crowd near lambda = 0, where steric changes need them.
    parameter : str
        Context parameter.

    Returns
    -------
    list of dict
        One ``{parameter: value}`` per state.

    Raises
    ------
    InputError
        For fewer than two states or a power that is not above zero.

    Examples
    --------
    >>> lambda_states(3, power=2.0)
    [{'lambda': 0.0}, {'lambda': 0.25}, {'lambda': 1.0}]
    """
    if check_positive("n", n, integer=True) < 2:
        raise InputError(f"n: expected at least 2 states, found {n}.")
    check_positive("power", power)
    return [{parameter: (k / (n - 1)) ** power} for k in range(n)]


def perturb_nonbonded(
    system: mm.System,
    changes: Mapping[int, tuple[float, float, float]],
    *,
    neutralize_on: int | None = None,
    coulomb_14: float = 1.0 / 1.2,
    lj_14: float = 0.5,
) -> mm.System:
    """A copy of a System with other charges and Lennard-Jones parameters on some atoms.

    1-4 exceptions of the changed atoms follow by Lorentz-Berthelot rules and the given factors;
    exclusions stay.

    Parameters
    ----------
    system : openmm.System
        With exactly one NonbondedForce.
    changes : mapping
        atom -> (charge [e], sigma [nm], epsilon [kJ/mol]).
    neutralize_on : int, optional
        Atom whose charge absorbs the difference, so that the total stays.
    coulomb_14, lj_14 : float
        1-4 factors (amber's by default).

    Returns
    -------
    openmm.System

    Raises
    ------
    InputError
        For unknown atoms or numbers that are not finite.
    IncompatibleSystemError
        If there is not exactly one NonbondedForce, if it has parameter offsets, or if an
        exception of a changed atom does not follow the given 1-4 factors.
    """
    out = clone_system(system)
    found = [f for f in out.getForces() if isinstance(f, mm.NonbondedForce)]
    if len(found) != 1 or found[0].getNumParticleParameterOffsets():
        raise IncompatibleSystemError(
            f"expected one NonbondedForce without parameter offsets, found {len(found)}."
        )
    force = found[0]
    n = force.getNumParticles()
    rows = [[float(v._value) for v in force.getParticleParameters(i)] for i in range(n)]
    old = [tuple(r) for r in rows]
    for atom, values in changes.items():
        if not 0 <= int(atom) < n:
            raise InputError(f"changes: expected atoms in [0, {n}), found {atom}.")
        if len(values) != 3 or not all(math.isfinite(v) for v in values):
            raise InputError(f"changes: expected (q, sigma, epsilon) for {atom}, found {values}.")
        if values[1] <= 0 or values[2] < 0:
            raise InputError(f"changes: expected sigma > 0 and epsilon >= 0 for {atom}, found {values}.")
        rows[int(atom)] = [float(v) for v in values]
    touched = {int(a) for a in changes}
    if neutralize_on is not None:
        if not 0 <= neutralize_on < n or neutralize_on in touched:
            raise InputError(f"neutralize_on: expected an unchanged atom in [0, {n}), found {neutralize_on}.")
        rows[neutralize_on][0] -= sum(rows[a][0] - old[a][0] for a in touched)
        touched.add(neutralize_on)
    for atom in touched:
        force.setParticleParameters(atom, *rows[atom])
    for i in range(force.getNumExceptions()):
        a, b, qq, _, eps = force.getExceptionParameters(i)
        if not {a, b} & touched:
            continue
        if qq._value == 0 and eps._value == 0:
            if old[a][0] * old[b][0] == 0 and old[a][2] * old[b][2] == 0:
                raise IncompatibleSystemError(
                    f"pair {a}-{b}: expected to tell an exclusion from a 1-4 pair, found an atom "
                    "without charge and epsilon; set the exceptions by hand."
                )
            continue
        for what, now, expected in (
            ("charge product", qq._value, coulomb_14 * old[a][0] * old[b][0]),
            ("epsilon", eps._value, lj_14 * math.sqrt(old[a][2] * old[b][2])),
        ):
            if not math.isclose(now, expected, rel_tol=1e-4, abs_tol=1e-6):
                raise IncompatibleSystemError(
                    f"pair {a}-{b}: expected a 1-4 {what} of {expected:.6g} from the 1-4 factors, "
                    f"found {now:.6g}; pass this force field's coulomb_14 and lj_14."
                )
        force.setExceptionParameters(
            i, a, b,
            coulomb_14 * rows[a][0] * rows[b][0],
            0.5 * (rows[a][1] + rows[b][1]),
            lj_14 * math.sqrt(rows[a][2] * rows[b][2]),
        )  # fmt: skip
    return out


def state_values(states: Sequence[Mapping[str, float]]) -> tuple[tuple[str, ...], FloatArray]:
    """Check lambda states: names of their parameters, and values (n_states, n_parameters).

    Raises
    ------
    InputError
        If there are none, if their parameters differ, if two are equal, or a value is not finite.

    Examples
    --------
    >>> state_values([{"lambda": 0.0}, {"lambda": 1.0}])[0]
    ('lambda',)
    """
    if len(states) == 0 or not all(isinstance(s, Mapping) and len(s) > 0 for s in states):
        raise InputError(
            "states: expected a list of {context parameter: value}, e.g. lambda_states(11), found "
            f"{states!r}."
        )
    names = tuple(states[0])
    for k, state in enumerate(states):
        if set(state) != set(names):
            raise InputError(
                f"states: expected the parameters {sorted(names)} in every state, found "
                f"{sorted(state)} in state {k}."
            )
        for name, value in state.items():
            good = isinstance(value, int | float | np.floating) and math.isfinite(value)
            if not good:
                raise InputError(f"states: state {k} has {name} = {value!r}, not a finite number.")
    values = np.array([[float(s[name]) for name in names] for s in states])
    if len(np.unique(values, axis=0)) != len(values):
        raise InputError(f"states: expected different states, found a repeated one in {states!r}.")
    return names, values
