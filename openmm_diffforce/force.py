"""From an artefact to an ``openmm.Force``.

``DiffusionForce`` is an OpenMM force: add it to a System like any other. Two backends carry the
same numbers: ``torchforce`` (openmm-torch's TorchForce, TorchScript without Python in the step)
and ``python`` (OpenMM's PythonForce, any torch). Both evaluate explicit derivatives from the
model's ``fields``; autograd does not run in a step.
"""

import logging
import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import openmm
import torch
from openmm import app, unit

from .artefact import Artefact, load_artefact
from .constants import (
    CLASSICAL_GROUP,
    DEFAULT_PREFIX,
    INTERPOLATE,
    LAMBDA,
    LEARNED_GROUP,
    NOISE,
    SCALE,
)
from .errors import (
    IncompatibleSystemError,
    InputError,
    MissingDependencyError,
    ModelError,
    NotConservativeError,
)
from .models.graph import MolecularGraph
from .schedule import Amplitudes
from .systems import (
    LEARNED_FORCES,
    SubsetTerms,
    check_topology,
    describe,
    force_type,
    remove_subset_terms,
)
from .units import MOLAR_GAS_CONSTANT, thermal_energy, to_md

Tensor = torch.Tensor

MANIFEST_VERSION = 1
"""Version of the dictionary that :meth:`DiffusionForce.manifest` returns."""

TEMPERATURE_TOLERANCE = 0.01
"""Temperatures closer than this [K] count as equal."""


class _Evaluator(torch.nn.Module):
    """Energy [kJ/mol], forces and parameter derivatives of a model on one set of positions.

    The one place where a model meets MD: atom subset, whole molecules across a periodic box,
    y = alpha x with its chain rule, and kT.
    """

    atoms: Tensor
    parent: Tensor
    path: Tensor

    def __init__(self, artefact: Artefact, atoms: np.ndarray, mode: str) -> None:
        super().__init__()
        self.model = artefact.model
        self.kt = thermal_energy(artefact.temperature)
        self.amplitudes = Amplitudes(artefact.schedule)
        self.use_double = artefact.metadata["dtype"] == "float64"
        self.operator = mode == "operator"
        self.register_buffer("atoms", torch.as_tensor(atoms, dtype=torch.int64))
        parent, path = _spanning_tree(artefact.graph)
        self.register_buffer("parent", parent)
        self.register_buffer("path", path)

    def whole(self, x: Tensor, box: Tensor) -> Tensor:
        """Undo periodic wrapping along bonds; lattice shifts are constants for the gradient."""
        d = x - x[self.parent]
        shift_c = torch.round(d[:, 2] / box[2, 2])
        d = d - shift_c[:, None] * box[2]
        shift_b = torch.round(d[:, 1] / box[1, 1])
        d = d - shift_b[:, None] * box[1]
        shift_a = torch.round(d[:, 0] / box[0, 0])
        shifts = self.path @ torch.stack([shift_a, shift_b, shift_c], dim=1)
        return x - shifts @ box

    def evaluate(
        self, x: Tensor, lam: float, noise: float, scale: float
    ) -> tuple[float, Tensor, float, float]:
        """E, forces [n_atoms, 3], dE/dlambda, dE/dscale for the model's atoms x [n_atoms, 3].

        Scalars are Python's: a torch operation costs microseconds in an MD step, these do not.
        """
        factor = scale * self.kt
        slope = -factor
        t = torch.full([1], noise, dtype=x.dtype)
        y = x.unsqueeze(0)
        if self.amplitudes.kind != 0:
            alpha = float(self.amplitudes(t)[0])
            y = alpha * y
            slope = slope * alpha
        lam_tensor = torch.full([1], lam, dtype=x.dtype)
        if self.operator:
            action, gradient, d_lam = self.increment(y, t, lam_tensor)
        else:
            action, gradient, d_lam = self.model.fields(y, t, lam_tensor)
        unscaled = self.kt * float(action)
        return scale * unscaled, slope * gradient[0], factor * float(d_lam), unscaled

    def increment(self, y: Tensor, noise: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """S(y, t, lam) - S(y, t, 0), for any model of the contract."""
        action, gradient, d_lam = self.model.fields(y, noise, lam)
        action_0, gradient_0, _ = self.model.fields(y, noise, torch.zeros_like(lam))
        return action - action_0, gradient - gradient_0, d_lam


class _PairEvaluator(_Evaluator):
    """The same for a model that knows its own increment, without the base action's cost."""

    def increment(self, y: Tensor, noise: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.model.increment_fields(y, noise, lam)


class _TorchForceModule(torch.nn.Module):
    """What TorchForce runs: (positions, [box,] lambda, noise, scale[, interpolate]) -> (E, forces)."""

    def __init__(self, evaluator: torch.jit.ScriptModule, every_atom: bool) -> None:
        super().__init__()
        self.evaluator = evaluator
        self.every_atom = every_atom  # then no gather and no scatter is needed

    def chosen(self, positions: Tensor) -> Tensor:
        x = positions
        if not self.every_atom:
            x = x[self.evaluator.atoms]
        if self.evaluator.use_double:
            return x.double()
        return x.float()

    def finish(
        self, positions: Tensor, x: Tensor, lam: Tensor, noise: Tensor, scale: Tensor,
        interpolate: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Energy with the derivatives that TorchForce asks for, and forces on all positions."""
        lam_value = float(lam)
        factor = float(scale)
        if interpolate is not None:
            factor = factor * float(interpolate)
        energy, forces, d_lam, unscaled = self.evaluator.evaluate(x, lam_value, float(noise), factor)
        out = forces.to(positions.dtype).contiguous()  # TorchForce reads raw memory, row by row
        if not self.every_atom:
            out = torch.zeros_like(positions)
            out[self.evaluator.atoms] = forces.to(positions.dtype)
        # TorchForce differentiates the energy with respect to lambda after freezing, which drops
        # detach(): the derivative enters as an explicit linear term of value zero.
        total = (lam - lam_value) * d_lam + energy
        if interpolate is not None:
            total = total + (interpolate - float(interpolate)) * (float(scale) * unscaled)
        return total, out


class _OpenModule(_TorchForceModule):
    def forward(
        self, positions: Tensor, lam: Tensor, noise: Tensor, scale: Tensor,
        interpolate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        positions = positions.data
        return self.finish(positions, self.chosen(positions), lam, noise, scale, interpolate)


class _PeriodicModule(_TorchForceModule):
    def forward(
        self, positions: Tensor, box: Tensor, lam: Tensor, noise: Tensor, scale: Tensor,
        interpolate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        positions = positions.data
        x = self.chosen(positions)
        x = self.evaluator.whole(x, box.to(x.dtype))
        return self.finish(positions, x, lam, noise, scale, interpolate)


def _spanning_tree(graph: MolecularGraph) -> tuple[Tensor, Tensor]:
    """Parent of every atom, and the 0/1 matrix of which atoms lie on its path to the root."""
    near = graph.neighbours()
    parent = list(range(graph.n_atoms))
    path = np.zeros((graph.n_atoms, graph.n_atoms))
    seen: set[int] = set()
    for root in range(graph.n_atoms):
        queue = [root] if root not in seen else []
        seen.add(root)
        while queue:
            atom = queue.pop(0)
            for k in near[atom]:
                if k not in seen:
                    seen.add(k)
                    parent[k] = atom
                    path[k] = path[atom]
                    path[k, k] = 1.0
                    queue.append(k)
    return torch.tensor(parent), torch.tensor(path)


class _PythonComputation:
    """What PythonForce calls. Holds the evaluator, and evaluates derivatives on request."""

    def __init__(self, evaluator: _Evaluator, prefix: str, periodic: bool, subset: bool) -> None:
        self.evaluator = evaluator
        self.prefix = prefix
        self.periodic = periodic
        self.subset = subset  # OpenMM hands over the subset's positions already
        self.interpolate = False

    def fields(self, state: openmm.State, whole_system: bool = False) -> tuple[float, Tensor, float, float]:
        """E, forces, dE/dlambda, dE/dlambda_interpolate."""
        e = self.evaluator
        dtype = torch.float64 if e.use_double else torch.float32
        values = state.getParameters()
        x = torch.as_tensor(state.getPositions(asNumpy=True)._value, dtype=dtype)
        if whole_system and self.subset:
            x = x[e.atoms]
        if self.periodic:
            vectors = state.getPeriodicBoxVectors(asNumpy=True)._value
            x = e.whole(x, torch.as_tensor(np.array(vectors), dtype=dtype))
        lam, noise, scale = (values[self.prefix + name] for name in (LAMBDA, NOISE, SCALE))
        # The classical part of a crossing over declares the parameter; every force may read it.
        factor = scale * values[INTERPOLATE] if self.interpolate else scale
        energy, forces, d_lam, unscaled = e.evaluate(x, lam, noise, factor)
        return energy, forces, d_lam, scale * unscaled

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        energy, forces, _, _ = self.fields(state)
        return energy, forces.numpy().astype(np.float64, copy=False)


class DiffusionForce:
    r"""A learned action as an OpenMM force.

    .. math::

        \text{add:}\quad U = c\, k_B T\, S(\alpha_t x, t, \lambda) \qquad
        \text{operator:}\quad U = c\, k_B T\, [S(\alpha_t x, t, \lambda) - S(\alpha_t x, t, 0)]

    ==========  =======================================  ===========================
    symbol      code                                     unit
    ==========  =======================================  ===========================
    lambda      context parameter ``<prefix>lambda``     1, default 0
    t           context parameter ``<prefix>noise``      1, default 0 (exactly clean)
    c           context parameter ``<prefix>scale``      1, default 1
    kT          of the artefact, at any simulation T     kJ/mol
    ==========  =======================================  ===========================

    The object IS an ``openmm.Force`` (TorchForce or PythonForce) in force group
    ``constants.LEARNED_GROUP``: pass it to ``system.addForce``, or to :func:`mix`, which takes the
    molecule's classical interactions out and says in ``replaced`` what it took.

    Parameters
    ----------
    path : path-like
        Artefact written by :func:`openmm_diffforce.artefact.export_artefact`.
    topology : openmm.app.Topology
        Elements and bonds of the chosen atoms must be the artefact's, in its order. If it has box
        vectors the force is periodic: molecules are made whole along bonds.
    atoms : sequence of int, optional
        The atoms the model acts on, in the artefact's order; default: all atoms of the topology.
    mode : {"add", "operator"}
        "add" the whole action; "operator" only its change with lambda, on top of a classical
        base state.
    temperature : float [K] or Quantity, optional
        Simulation temperature, compared with the artefact's: a different one warns.
    prefix : str
        Of the context parameters, so that two learned forces can live in one System.
    backend : {"auto", "torchforce", "python"}
        "auto" takes TorchForce where openmm-torch imports, and PythonForce elsewhere.

    Raises
    ------
    ModelError
        If the artefact is unusable or belongs to another molecule.
    InputError
        If mode, backend, atoms or prefix are unusable.
    MissingDependencyError
        If ``backend="torchforce"`` and openmm-torch does not import.

    Notes
    -----
    The temperature of the simulation is not known here: call :meth:`check` with the Context.
    A System that holds a TorchForce must not be deserialized or copied; keep the System without
    it and rebuild the force from :meth:`manifest`. OpenMM's own parameter derivatives (those of a
    State, and ``deriv(energy, ...)`` in a CustomIntegrator) contain this force with the backend
    torchforce only; :meth:`energy_derivative` has it with both.
    """

    artefact: Artefact
    backend: str
    mode: str
    prefix: str
    atoms: np.ndarray
    interpolated: bool = False
    _declared: frozenset[str] = frozenset()  # whose derivatives OpenMM gets from this force
    replaced: Mapping[str, int] = MappingProxyType({})

    def __new__(cls, *args: Any, backend: str = "auto", **kwargs: Any) -> "DiffusionForce":
        if cls is not DiffusionForce:
            return super().__new__(cls)
        return object.__new__(_backend_class(backend))

    def _prepare(
        self, path: str | os.PathLike[str], topology: app.Topology,
        atoms: Sequence[int] | None, mode: str, temperature: Any, prefix: str,
    ) -> tuple[_Evaluator, bool]:  # fmt: skip
        if mode not in ("add", "operator"):
            raise InputError(f'mode: expected "add" or "operator", found {mode!r}.')
        if not isinstance(prefix, str) or not prefix:
            raise InputError(f"prefix: expected a non-empty text, found {prefix!r}.")
        if not isinstance(topology, app.Topology):
            raise InputError(
                f"topology: expected an openmm.app.Topology, found {type(topology).__name__}; "
                "an mdtraj topology converts with .to_openmm()."
            )
        artefact = load_artefact(path)
        if mode not in artefact.metadata["modes"]:
            raise ModelError(
                f"artefact {artefact.path}: has no operator (its action does not depend on "
                'lambda); use mode="add", or fit and export a model with an operator.'
            )
        chosen = _matched_atoms(artefact, topology, atoms)
        if temperature is not None:
            kelvin = float(to_md(temperature, unit.kelvin, name="temperature"))
            thermal_energy(kelvin)
            if abs(kelvin - artefact.temperature) > TEMPERATURE_TOLERANCE:
                warnings.warn(
                    f"DiffusionForce: the model was trained at {artefact.temperature:g} K and will "
                    f"be used at {kelvin:g} K; its energy stays kT_train * S.",
                    stacklevel=4,
                )
        self.artefact, self.mode, self.prefix, self.atoms = artefact, mode, prefix, chosen
        pair = mode == "operator" and hasattr(artefact.model, "increment_fields")
        evaluator = (_PairEvaluator if pair else _Evaluator)(artefact, chosen, mode)
        return evaluator, topology.getPeriodicBoxVectors() is not None

    def parameter(self, name: str) -> str:
        """Context parameter of ``"lambda"``, ``"noise"``, ``"scale"`` or ``"lambda_interpolate"``.

        Raises
        ------
        InputError
            If the name is another, or the force was not mixed with ``interpolate=True``.
        """
        if name == INTERPOLATE and self.interpolated:
            return INTERPOLATE
        if name not in (LAMBDA, NOISE, SCALE):
            raise InputError(f'parameter: expected "lambda", "noise" or "scale", found {name!r}.')
        return self.prefix + name

    @property
    def conservative(self) -> bool:
        """Whether the model has an energy (a bare score has none, and reports NaN)."""
        return bool(self.artefact.metadata["conservative"])

    def require_energy(self, what: str) -> None:
        """Refuse a model without an energy.

        Raises
        ------
        NotConservativeError
            If the model is a bare score; ``what`` names the use in the message.
        """
        if not self.conservative:
            raise NotConservativeError(
                f"{what}: needs an energy, and {self.artefact.path.name} holds a bare score (conservative = "
                "False), which has none; use it for dynamics alone, or fit a conservative model."
            )

    def energy_derivative(self, context: openmm.Context, parameter: str = LAMBDA) -> float:
        """dE/dparameter of this force alone [kJ/mol] at the state of ``context``, exact.

        Parameters
        ----------
        context : openmm.Context
        parameter : {"lambda", "lambda_interpolate"}
            The latter for a force that :func:`mix` crosses over: c kT S, also at its value 0.

        Raises
        ------
        InputError
            For another parameter.
        NotConservativeError
            If the model is a bare score.

        Notes
        -----
        With the backend torchforce no other force that declares the parameter may be in this
        force's group: OpenMM reports the sum of a group.
        """
        self.require_energy(f"dE/d{parameter}")
        if parameter not in (LAMBDA, INTERPOLATE):
            raise InputError(
                f'parameter: expected "lambda" or "lambda_interpolate", found {parameter!r}; the '
                "energy is linear in scale, and has no simple derivative in noise."
            )
        return self._derivative(context, self.parameter(parameter))

    def _derivative(self, context: openmm.Context, name: str) -> float:
        raise NotImplementedError

    def _cross_over(self) -> None:
        """Scale the energy with the context parameter ``lambda_interpolate`` as well."""
        self.interpolated = True

    def check(self, context: openmm.Context) -> None:
        """Hold the force against the simulation that it is in.

        Raises
        ------
        NotConservativeError
            If the model is a bare score and the System has a barostat.
        IncompatibleSystemError
            If the temperature differs from the training temperature at noise > 0, if another
            learned force in the System has the same prefix, if a CustomIntegrator asks for a
            derivative that the backend does not give it, or, in mode "add", if constraints,
            virtual sites or massless particles lie among the model's atoms.
        InputError
            If lambda, noise or lambda_interpolate is outside its range.

        Warns
        -----
        UserWarning
            If the temperature differs at noise = 0.
        """
        for other in context.getSystem().getForces():
            if "Barostat" in type(other).__name__:
                self.require_energy(type(other).__name__)
        noise = context.getParameter(self.parameter(NOISE))
        lam = context.getParameter(self.parameter(LAMBDA))
        low, high = self.artefact.metadata["lambda_range"]
        if not low <= lam <= high:
            raise InputError(
                f"{self.parameter(LAMBDA)}: expected a value in [{low:g}, {high:g}] (the range the "
                f"model was fitted on), found {lam:g}."
            )
        if not 0 <= noise <= 1:
            raise InputError(f"{self.parameter(NOISE)}: expected a value in [0, 1], found {noise:g}.")
        if self.interpolated and not 0 <= context.getParameter(INTERPOLATE) <= 1:
            raise InputError(
                f"{INTERPOLATE}: expected a value in [0, 1], 0 classical and 1 learned, found "
                f"{context.getParameter(INTERPOLATE):g}."
            )
        kelvin = _bath_temperature(context)
        if kelvin is not None and abs(kelvin - self.artefact.temperature) > TEMPERATURE_TOLERANCE:
            message = (
                f"the integrator runs at {kelvin:g} K, the model was trained at "
                f"{self.artefact.temperature:g} K"
            )
            if noise > 0:
                raise IncompatibleSystemError(
                    f"{message}; a noised action has a meaning at its own temperature only: "
                    "set the integrator's temperature, or noise to 0."
                )
            warnings.warn(f"{message}; its energy stays kT_train * S.", stacklevel=2)
        self._check_integrator(context.getIntegrator())
        system = context.getSystem()
        self._check_prefix(system)
        if self.mode == "add":
            self._check_singular(system)

    def _check_integrator(self, integrator: openmm.Integrator) -> None:
        if not isinstance(integrator, openmm.CustomIntegrator):
            return
        # What nobody declares a derivative of, OpenMM takes for constant.
        silent = {self.parameter(n) for n in (LAMBDA, NOISE, SCALE) if n not in self._declared}
        if self.interpolated and INTERPOLATE not in self._declared:
            silent.add(INTERPOLATE)
        for i in range(integrator.getNumComputations()):
            expression = integrator.getComputationStep(i)[2]
            asked = re.findall(r"deriv\(\s*energy\d*\s*,\s*(\w+)", expression)
            if silent.intersection(asked):
                raise IncompatibleSystemError(
                    f"the CustomIntegrator computes {expression!r}, and OpenMM takes this force's part "
                    f"of it for 0 with backend {self.backend!r}; deriv() works for lambda with "
                    'backend="torchforce", energy_derivative(context) between steps with both.'
                )

    def _check_prefix(self, system: openmm.System) -> None:
        name = self.parameter(LAMBDA)
        sharing = sum(
            1 for f in system.getForces() if force_type(f) in LEARNED_FORCES and name in _global_parameters(f)
        )
        if sharing > 1:
            raise IncompatibleSystemError(
                f"found {sharing} learned forces with the prefix {self.prefix!r} in one System; OpenMM "
                "would drive them all with one set of parameters: give each its own prefix=..."
            )

    def _check_singular(self, system: openmm.System) -> None:
        mine = {int(a) for a in self.atoms}
        constrained = sum(
            1 for k in range(system.getNumConstraints())
            if mine & set(system.getConstraintParameters(k)[:2])
        )  # fmt: skip
        frozen = sum(
            1 for a in mine
            if system.isVirtualSite(a) or system.getParticleMass(a).value_in_unit(unit.dalton) == 0
        )  # fmt: skip
        if constrained or frozen:
            raise IncompatibleSystemError(
                f"a base action over constrained coordinates means nothing: found {constrained} "
                f"constraints and {frozen} massless or virtual particles among the model's atoms; "
                "build the System with constraints=None and rigidWater=False for them."
            )

    def manifest(self) -> dict[str, Any]:
        """JSON-ready recipe that :func:`force_from_manifest` rebuilds the force from."""
        return {
            "manifest_version": MANIFEST_VERSION,
            "artefact": str(self.artefact.path),
            "sha256": self.artefact.sha256,
            "atoms": [int(a) for a in self.atoms],
            "mode": self.mode,
            "prefix": self.prefix,
            "backend": self.backend,
            "interpolated": self.interpolated,
        }


def _bath_temperature(context: openmm.Context) -> float | None:
    """Temperature [K] of the integrator or Andersen's thermostat, if there is one to be seen."""
    integrator = context.getIntegrator()
    if isinstance(integrator, openmm.CompoundIntegrator):
        integrator = integrator.getIntegrator(integrator.getCurrentIntegrator())
    if hasattr(integrator, "getTemperature"):
        return float(integrator.getTemperature().value_in_unit(unit.kelvin))
    if isinstance(integrator, openmm.CustomIntegrator):
        # The name that MTSLangevinIntegrator, aMD and openmmtools give it.
        for i in range(integrator.getNumGlobalVariables()):
            if integrator.getGlobalVariableName(i) == "kT":
                return float(integrator.getGlobalVariable(i)) / MOLAR_GAS_CONSTANT
    return dict(context.getParameters()).get(openmm.AndersenThermostat.Temperature())


def force_from_manifest(
    manifest: dict[str, Any], topology: app.Topology, *, backend: str | None = None
) -> DiffusionForce:
    """Rebuild a force from :meth:`DiffusionForce.manifest`.

    Parameters
    ----------
    manifest : dict
    topology : openmm.app.Topology
    backend : str, optional
        Another backend than the manifest's.

    Raises
    ------
    InputError
        If the manifest is of another version or lacks an entry.
    ModelError
        If the artefact is not the one the manifest was written for.
    """
    if manifest.get("manifest_version") != MANIFEST_VERSION:
        raise InputError(
            f"manifest: expected version {MANIFEST_VERSION}, found "
            f"{manifest.get('manifest_version')!r}; write it again with this version."
        )
    try:
        force = DiffusionForce(
            manifest["artefact"], topology=topology, atoms=manifest["atoms"],
            mode=manifest["mode"], prefix=manifest["prefix"],
            backend=backend or manifest["backend"],
        )  # fmt: skip
        expected = manifest["sha256"]
    except KeyError as err:
        raise InputError(f"manifest: lacks the entry {err}.") from err
    if force.artefact.sha256 != expected:
        raise ModelError(
            f"artefact {manifest['artefact']}: expected SHA-256 {expected[:12]}..., found "
            f"{force.artefact.sha256[:12]}...; it was exported anew since the manifest was written."
        )
    if manifest.get("interpolated", False):
        force._cross_over()
    return force


def mix(
    system: openmm.System,
    topology: app.Topology,
    force: DiffusionForce,
    *,
    mode: str = "replace",
    interpolate: bool = False,
    keep: Collection[int | str] | None = None,
) -> openmm.System:
    r"""A System in which a learned action replaces a molecule's classical interactions.

    .. math:: U = U_{\mathrm{classical}} - U_{\mathrm{inside}} + c\, k_B T\, S
        \qquad\text{or}\qquad
        U = U_{\mathrm{classical}} - \mu\, U_{\mathrm{inside}} + \mu\, c\, k_B T\, S

    ==========  =================================================  =========
    symbol      code                                               unit
    ==========  =================================================  =========
    U_inside    ``remove_subset_terms(system, atoms).inside``      kJ/mol
    c kT S      ``force``                                          kJ/mol
    mu          context parameter ``lambda_interpolate``           1, default 1
    ==========  =================================================  =========

    All coupling to the rest of the System stays classical. With ``interpolate`` the System is
    fully classical at ``lambda_interpolate`` = 0 and fully mixed at 1 (the meaning it has in
    openmm-ml's ``createMixedSystem``).

    Parameters
    ----------
    system : openmm.System
        Of classical forces; it is not changed.
    topology : openmm.app.Topology
        Of ``system``.
    force : DiffusionForce
        With ``mode="add"``. The new System takes it over; ``force.replaced`` says afterwards what
        was taken out for it.
    mode : {"replace"}
        To put an action on top of all classical terms, use ``system.addForce(force)``.
    interpolate : bool
        Cross over with ``lambda_interpolate``. The removed terms are then in a CustomCVForce in
        force group ``constants.CLASSICAL_GROUP``; the learned force keeps its group.
    keep : collection of int or str, optional
        Classical forces, by index or name, that stay whole: restraints. See
        :func:`openmm_diffforce.systems.remove_subset_terms`.

    Returns
    -------
    openmm.System
        Forces keep their indices; the learned force is the last.

    Raises
    ------
    InputError
        For arguments that do not fit, or a force that is in a System already.
    ModelError
        If the topology's atoms are not the model's molecule.
    NotConservativeError
        If a bare score is to be crossed over: there is no energy to cross over to.
    IncompatibleSystemError
        If the terms inside cannot be taken out exactly: see
        :func:`openmm_diffforce.systems.remove_subset_terms`; if the System is periodic and the
        force is not; or, with ``interpolate``, if a force of the System uses
        ``lambda_interpolate`` already or the removed terms declare parameter derivatives.

    Notes
    -----
    dU/dmu: ``context.getState(parameterDerivatives=True)`` has it whole with the backend
    torchforce; with the backend python it holds the classical part, and
    ``force.energy_derivative(context, "lambda_interpolate")`` the learned one: add them.

    The result holds a learned force, so it must not be copied or deserialized. Keep ``system`` and
    ``force.manifest()``, and mix again. For a second molecule, apply ``remove_subset_terms`` for
    it first, mix, and add its force to the result.

    Classical terms are not noised: at noise > 0 the mixed energy is a smoothed Hamiltonian, and
    free energies of the molecule in its surroundings mean something at noise = 0 only.

    With a barostat start from whole molecules: OpenMM moves the atoms of one as they are stored.

    Not checked: that classical and learned action describe the molecule in the same environment
    (a model fitted in vacuum has no polarization by water).

    Examples
    --------
    Hydrogen's spring gives way to an action that was fitted to snapshots of it.

    >>> import tempfile
    >>> from openmm_diffforce import MolecularGraph, PhysicalModel, VESchedule, export_artefact
    >>> from openmm_diffforce.training import fit_base_action
    >>> random = np.random.default_rng(0)
    >>> x = np.array([[0, 0, 0], [0.074, 0, 0]]) + 0.003 * random.standard_normal((200, 2, 3))
    >>> graph, schedule = MolecularGraph(("H", "H"), ((0, 1),)), VESchedule(0.02)
    >>> fit = fit_base_action(x, graph, sigma_knots=(0.0, 0.02), generator=random, n_draws=1)
    >>> topology, system, spring = app.Topology(), openmm.System(), openmm.HarmonicBondForce()
    >>> residue = topology.addResidue("H2", topology.addChain())
    >>> a, b = (topology.addAtom(n, app.element.hydrogen, residue) for n in ("H1", "H2"))
    >>> _ = topology.addBond(a, b), system.addParticle(1.0), system.addParticle(1.0)
    >>> _ = spring.addBond(0, 1, 0.074, 3e5), system.addForce(spring)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = folder + "/h2.diffforce"
    ...     _ = export_artefact(
    ...         PhysicalModel(fit.tables, None, schedule), path, graph=graph, schedule=schedule,
    ...         temperature=300.0,
    ...     )
    ...     force = DiffusionForce(path, topology=topology)
    >>> mixed = mix(system, topology, force)
    >>> dict(force.replaced), mixed.getForce(0).getNumBonds(), system.getForce(0).getNumBonds()
    ({'0 HarmonicBondForce': 1}, 0, 1)
    """
    if mode != "replace":
        raise InputError(
            f'mode: expected "replace", found {mode!r}; to add an action or operator on top of the '
            "classical terms, use system.addForce(force)."
        )
    if not isinstance(force, DiffusionForce):
        raise InputError(f"force: expected a DiffusionForce, found {type(force).__name__}.")
    if force.mode != "add":
        raise InputError(
            'force: expected one with mode="add", found mode="operator", which is only the change of '
            "an action and cannot replace a molecule's interactions."
        )
    if not force.thisown:  # type: ignore[attr-defined]
        raise InputError("force: expected one that is in no System yet; build another for this System.")
    if force.interpolated and not interpolate:
        raise InputError("force: its manifest is that of a crossing over; mix with interpolate=True.")
    check_topology(topology, system)
    _matched_atoms(force.artefact, topology, [int(a) for a in force.atoms])
    terms = remove_subset_terms(system, [int(a) for a in force.atoms], keep=keep)
    if describe(system).periodic and not force.usesPeriodicBoundaryConditions():  # type: ignore[attr-defined]
        raise IncompatibleSystemError(
            "the System is periodic and the learned force is not; give the topology its box vectors "
            "(topology.setPeriodicBoxVectors) before the force is built."
        )
    if interpolate:
        force.require_energy("mix(interpolate=True)")
        terms.system.addForce(_crossing_force(system, terms))
        if not force.interpolated:  # one from the manifest of a crossing over is so already
            force._cross_over()
    force.replaced = MappingProxyType(dict(terms.removed))
    terms.system.addForce(force)
    return terms.system


def _crossing_force(system: openmm.System, terms: SubsetTerms) -> openmm.CustomCVForce:
    """(1 - lambda_interpolate) times the energy of the removed terms."""
    for force in system.getForces():
        if INTERPOLATE in _global_parameters(force):
            raise IncompatibleSystemError(
                f"force {force.getName()}: uses the context parameter {INTERPOLATE} already; rename it."
            )
    for inside in terms.inside:
        if getattr(inside, "getNumEnergyParameterDerivatives", lambda: 0)():
            raise IncompatibleSystemError(
                f"force {inside.getName()}: declares a derivative in "
                f"{inside.getEnergyParameterDerivativeName(0)}, which would be wrong while its terms "
                "are crossed over; mix with interpolate=False, or create it without."
            )
    if not terms.inside:
        raise IncompatibleSystemError(
            "interpolate: expected classical terms inside the molecule to cross over from, found none."
        )
    names = [f"u{k}" for k in range(len(terms.inside))]
    crossing = openmm.CustomCVForce(f"(1-{INTERPOLATE})*({' + '.join(names)})")
    for name, inside in zip(names, terms.inside, strict=True):
        inside.setForceGroup(0)
        crossing.addCollectiveVariable(name, inside)
    crossing.addGlobalParameter(INTERPOLATE, 1.0)
    crossing.addEnergyParameterDerivative(INTERPOLATE)
    crossing.setForceGroup(CLASSICAL_GROUP)
    crossing.setName("classical terms crossed over")
    return crossing


def _global_parameters(force: openmm.Force) -> set[str]:
    """Names of the context parameters that a force from a System defines."""
    if isinstance(force, openmm.PythonForce):
        return set(force.getGlobalParameters())
    if type(force) is openmm.Force and available_backends()["torchforce"] == "ok":
        torchforce = _load_openmmtorch().TorchForce
        if torchforce.isinstance(force):
            force = torchforce.cast(force)
    n = force.getNumGlobalParameters() if hasattr(force, "getNumGlobalParameters") else 0
    return {force.getGlobalParameterName(i) for i in range(n)}


def available_backends() -> dict[str, str]:
    """Backends of :class:`DiffusionForce`: ``"ok"``, or the sentence that says what is missing."""
    out = {"python": "ok" if hasattr(openmm, "PythonForce") else "needs OpenMM 8.4 or newer"}
    try:
        _load_openmmtorch()
        out["torchforce"] = "ok"
    except (ImportError, OSError, openmm.OpenMMException) as err:
        reason = str(err).splitlines()[0] if str(err) else type(err).__name__
        out["torchforce"] = f"{reason}; pip install 'openmm-diffforce[torchforce]'"
    return out


_PLUGINS_LOADED = False


def _load_openmmtorch() -> Any:
    """Import openmm-torch, and load its kernels if OpenMM could not.

    OpenMM loads its plugins when it is imported; those of openmm-torch need torch's libraries in
    the process, so they fail where ``import openmm`` came before ``import torch``. This module
    imports torch: by now they load.
    """
    global _PLUGINS_LOADED
    quiet_before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it imports OpenMM by its old name, which warns on the root logger
    try:
        import openmmtorch
    finally:
        logging.disable(quiet_before)
    if not _PLUGINS_LOADED:
        for failure in openmm.Platform.getPluginLoadFailures():
            if "OpenMMTorchReference" in failure:
                folder = Path(openmm.version.openmm_library_path) / "plugins"
                openmm.Platform.loadPluginLibrary(str(folder / "libOpenMMTorchReference.so"))
        _PLUGINS_LOADED = True
    return openmmtorch


def _matched_atoms(artefact: Artefact, topology: app.Topology, atoms: Sequence[int] | None) -> np.ndarray:
    """Check elements and bonds of the chosen atoms against the artefact."""
    all_atoms = list(topology.atoms())
    n = artefact.graph.n_atoms
    chosen = np.arange(len(all_atoms)) if atoms is None else np.asarray(atoms)
    if chosen.ndim != 1 or len(chosen) != n or not np.issubdtype(chosen.dtype, np.integer):
        hint = "; pass atoms=[...] with the atoms that it acts on" if atoms is None else ""
        raise ModelError(f"atoms: expected the {n} atoms of the artefact, found {chosen.size}{hint}.")
    if len(set(chosen.tolist())) != n or chosen.min() < 0 or chosen.max() >= len(all_atoms):
        raise InputError(f"atoms: expected different indices below {len(all_atoms)}, found {atoms}.")
    for k, a in enumerate(chosen):
        element = all_atoms[a].element
        symbol = "none" if element is None else element.symbol
        if symbol != artefact.graph.elements[k]:
            raise ModelError(
                f"atom {a} ({all_atoms[a].name}): expected element {artefact.graph.elements[k]} at "
                f"place {k} of the artefact, found {symbol}; the order of atoms must be the "
                "artefact's (diffforce inspect prints it)."
            )
    place = {int(a): k for k, a in enumerate(chosen)}
    bonds = set()
    for bond in topology.bonds():
        i, j = bond[0].index, bond[1].index
        if (i in place) != (j in place):
            raise ModelError(
                f"bond {i}-{j} crosses the boundary of the chosen atoms; the model acts on whole molecules."
            )
        if i in place:
            bonds.add(tuple(sorted((place[i], place[j]))))
    if bonds != set(artefact.graph.bonds):
        other = sorted(bonds ^ set(artefact.graph.bonds))[:5]
        raise ModelError(
            f"bonds: the topology and the artefact differ, first at {other} (places in the "
            "artefact); it was trained on another molecule, or the topology lacks bonds."
        )
    return chosen.astype(np.int64)


def _backend_class(backend: str) -> type[DiffusionForce]:
    available = available_backends()
    if backend == "auto":
        backend = "torchforce" if available["torchforce"] == "ok" else "python"
    if backend not in available:
        raise InputError(f'backend: expected "auto", "torchforce" or "python", found {backend!r}.')
    if available[backend] != "ok":
        raise MissingDependencyError(f'backend "{backend}": {available[backend]}.')
    return _torchforce_class() if backend == "torchforce" else _PythonDiffusionForce


class _PythonDiffusionForce(DiffusionForce, openmm.PythonForce):
    """DiffusionForce on OpenMM's PythonForce."""

    backend = "python"

    def __init__(
        self, path: str | os.PathLike[str], *, topology: app.Topology,
        atoms: Sequence[int] | None = None, mode: str = "add", temperature: Any = None,
        prefix: str = DEFAULT_PREFIX, backend: str = "auto",
    ) -> None:  # fmt: skip
        evaluator, periodic = self._prepare(path, topology, atoms, mode, temperature, prefix)
        subset = atoms is not None
        self._computation = _PythonComputation(evaluator, prefix, periodic, subset)
        openmm.PythonForce.__init__(
            self,
            self._computation,
            {prefix + LAMBDA: 0.0, prefix + NOISE: 0.0, prefix + SCALE: 1.0},
        )
        if subset:
            self.setParticles([int(a) for a in self.atoms])
        self.setUsesPeriodicBoundaryConditions(periodic)
        self.setForceGroup(LEARNED_GROUP)
        self.setName("DiffusionForce")

    def _derivative(self, context: openmm.Context, name: str) -> float:
        state = context.getState(positions=True, parameters=True)
        _, _, d_lam, d_interpolate = self._computation.fields(state, whole_system=True)
        return d_interpolate if name == INTERPOLATE else d_lam

    def _cross_over(self) -> None:
        super()._cross_over()
        self._computation.interpolate = True


_TORCHFORCE_CLASS: type[DiffusionForce] | None = None


def _torchforce_class() -> type[DiffusionForce]:
    """The TorchForce backend, defined on first use because openmm-torch is optional."""
    global _TORCHFORCE_CLASS
    if _TORCHFORCE_CLASS is not None:
        return _TORCHFORCE_CLASS
    openmmtorch = _load_openmmtorch()

    class _TorchDiffusionForce(DiffusionForce, openmmtorch.TorchForce):  # type: ignore[name-defined,misc]
        """DiffusionForce on openmm-torch's TorchForce."""

        backend = "torchforce"
        _declared = frozenset({LAMBDA, INTERPOLATE})

        def __init__(
            self, path: str | os.PathLike[str], *, topology: app.Topology,
            atoms: Sequence[int] | None = None, mode: str = "add", temperature: Any = None,
            prefix: str = DEFAULT_PREFIX, backend: str = "auto",
        ) -> None:  # fmt: skip
            evaluator, periodic = self._prepare(path, topology, atoms, mode, temperature, prefix)
            script = torch.jit.script(evaluator.eval())
            every_atom = np.array_equal(self.atoms, np.arange(topology.getNumAtoms()))
            wrapper = (_PeriodicModule if periodic else _OpenModule)(script, every_atom)
            openmmtorch.TorchForce.__init__(self, torch.jit.script(wrapper.eval()))
            self.setOutputsForces(True)
            for name, value in ((LAMBDA, 0.0), (NOISE, 0.0), (SCALE, 1.0)):
                self.addGlobalParameter(prefix + name, value)
            self.addEnergyParameterDerivative(prefix + LAMBDA)
            self.setUsesPeriodicBoundaryConditions(periodic)
            self.setForceGroup(LEARNED_GROUP)
            self.setName("DiffusionForce")

        def _derivative(self, context: openmm.Context, name: str) -> float:
            state = context.getState(parameterDerivatives=True, groups={self.getForceGroup()})
            return float(state.getEnergyParameterDerivatives()[name])

        def _cross_over(self) -> None:
            super()._cross_over()
            self.addGlobalParameter(INTERPOLATE, 1.0)
            self.addEnergyParameterDerivative(INTERPOLATE)

    _TORCHFORCE_CLASS = _TorchDiffusionForce
    return _TORCHFORCE_CLASS
