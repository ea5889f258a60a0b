r"""The physical model: an action linear in generic features of the molecular graph.

.. math::

    S(x, t, \lambda) = \sum_c \sum_{i \in c} s_c(q_i(z); \tau)
        + \sum_{a \in A, b \in B} \int_0^\lambda o_{ab}(r_{ab}(z); \tau, l)\, dl + d \ln\alpha,
    \qquad z = x / \alpha_t, \quad \tau = \sigma_t / \alpha_t

=============  ==========================================================================
symbol         code
=============  ==========================================================================
q_i            bond lengths, angles, torsions, 1-4 and nonbonded distances (``graph.py``)
s_c            one cubic spline per symmetry class c and noise knot (``base``)
o_ab           the noised pair operator of the perturbed atoms A (``operator``)
tau            noise-to-signal ratio [nm]; only tau matters for a free energy
d              degrees of freedom, 3 n_atoms - 3
=============  ==========================================================================

There are no force-field parameters and no r^-12, r^-6 or 1/r columns in this basis.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import ops
from ..errors import InputError
from ..ops import ANGLE, DISTANCE, TORSION
from ..schedule import Amplitudes, NoiseSchedule
from .action import ActionModel
from .graph import InternalCoordinates, MolecularGraph, internal_coordinates

Tensor = torch.Tensor


@dataclass(frozen=True)
class BaseTables:
    """Splines of the base action S_{t,0}.

    Attributes
    ----------
    coordinates : InternalCoordinates
    sigma_knots : float64 array [n_knots]
        Noise levels [nm]; the first is 0.
    grid : float64 array [n_knots, n_classes, 3]
        (lo, spacing, wall stiffness) of every class at every noise level.
    offsets : int64 array [n_classes + 1]
        Coefficients of class c are ``offsets[c]:offsets[c+1]``.
    coef : float64 array [n_knots, n_coefs]
        B-spline coefficients [kT].
    wall_cells : int
        Intervals of the spline on either side of the data, in which the curvature passes over to the
        wall's; periodic coordinates have none.
    """

    coordinates: InternalCoordinates
    sigma_knots: np.ndarray
    grid: np.ndarray
    offsets: np.ndarray
    coef: np.ndarray
    wall_cells: int = 0

    def domain(self, knot: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Smallest and largest training value of every class at a noise knot [nm or rad].

        Periodic coordinates have no outside: -inf and inf.
        """
        first, spacing, _ = self.grid[knot].T
        cells = np.diff(self.offsets) - 3
        low, high = first + self.wall_cells * spacing, first + (cells - self.wall_cells) * spacing
        periodic = self.coordinates.kind == TORSION
        return np.where(periodic, -np.inf, low), np.where(periodic, np.inf, high)


@dataclass(frozen=True)
class OperatorTables:
    """Tables of the noised pair operator O_{t,lam}.

    Attributes
    ----------
    sites, env : int64 arrays [n_sites], [n_env]
    pair_type : int64 array [n_sites, n_env]
        -1 = excluded.
    table : float64 array [n_types, n_lambda_knots, n_sigma_knots, n_coefs]
        B-spline coefficients [kT].
    r_grid : float64 array [n_types, 2]
        (first knot, spacing) [nm].
    lam_knots, sigma_knots : float64 arrays
    r_switch, r_cutoff : float
        Smooth switch to zero [nm].
    """

    sites: np.ndarray
    env: np.ndarray
    pair_type: np.ndarray
    table: np.ndarray
    r_grid: np.ndarray
    lam_knots: np.ndarray
    sigma_knots: np.ndarray
    r_switch: float
    r_cutoff: float


class PhysicalModel(ActionModel):
    """Action linear in generic features, evaluated by the compiled kernel.

    Parameters
    ----------
    base : BaseTables
    operator : OperatorTables or None
        None gives a base action alone, S independent of lambda.
    schedule : VESchedule or VPSchedule

    Notes
    -----
    Deterministic. :meth:`fields` and :meth:`operator_gradient` return the kernel's own derivatives,
    without autograd. Everything compiles in TorchScript; autograd sees through :meth:`forward`
    (twice) in Python only.
    """

    def __init__(self, base: BaseTables, operator: OperatorTables | None, schedule: NoiseSchedule) -> None:
        super().__init__()
        ops.load()
        check_noise_range("base", base.sigma_knots, schedule)
        if operator is not None:
            check_noise_range("operator", operator.sigma_knots, schedule)
        self.amplitudes = Amplitudes(schedule)
        self.has_operator = operator is not None

        def keep(name: str, value: np.ndarray, dtype: torch.dtype) -> None:
            self.register_buffer(name, torch.as_tensor(np.ascontiguousarray(value), dtype=dtype))

        f, i = torch.float64, torch.int64
        c = base.coordinates
        for name, value, dtype in (
            ("atoms", c.atoms, i), ("cls", c.cls, i), ("kind", c.kind, i),
            ("grid", base.grid, f), ("offsets", base.offsets, i), ("coef", base.coef, f),
            ("base_sigma", base.sigma_knots, f), ("wall_cells", np.array(base.wall_cells), i),
        ):  # fmt: skip
            keep(name, value, dtype)
        n_atoms = int(c.atoms.max()) + 1
        if operator is None:  # TorchScript wants every attribute to exist
            operator = OperatorTables(
                np.zeros(1, int), np.zeros(1, int), -np.ones((1, 1), int), np.zeros((1, 2, 2, 4)),
                np.array([[0.1, 0.1]]), np.array([0.0, 1.0]),
                np.array([0.0, float(base.sigma_knots[-1])]), 0.0, 0.0,
            )  # fmt: skip
        for name, value, dtype in (
            ("sites", operator.sites, i), ("env", operator.env, i),
            ("pair_type", operator.pair_type, i), ("table", operator.table, f),
            ("r_grid", operator.r_grid, f), ("lam_knots", operator.lam_knots, f),
            ("operator_sigma", operator.sigma_knots, f), ("no_box", np.zeros(0), f),
        ):  # fmt: skip
            keep(name, value, dtype)
        self.r_switch = float(operator.r_switch)
        self.r_cutoff = float(operator.r_cutoff)
        self.n_dof = float(3 * n_atoms - 3)

    def forward(self, x: Tensor, t: Tensor, lam: Tensor) -> Tensor:
        """Reduced action S [n_frames] at noised coordinates x [n_frames, n_atoms, 3] nm."""
        alpha, sigma = self.amplitudes(t)
        z = x / alpha[:, None, None]
        tau = sigma / alpha
        if not torch.jit.is_scripting():
            return self._differentiable(z, tau, lam) + self.n_dof * torch.log(alpha)
        action = torch.ops.diffforce.internal_action(
            z, tau, self.atoms, self.cls, self.kind, self.grid, self.offsets, self.coef,
            self.base_sigma,
        )[0]  # fmt: skip
        if self.has_operator:
            action = action + torch.ops.diffforce.pair_operator(
                z, tau, lam, self.no_box, self.sites, self.env, self.pair_type, self.table,
                self.r_grid, self.lam_knots, self.operator_sigma, self.r_switch, self.r_cutoff,
                True,
            )[0]  # fmt: skip
        return action + self.n_dof * torch.log(alpha)

    @torch.jit.unused
    def _differentiable(self, z: Tensor, tau: Tensor, lam: Tensor) -> Tensor:
        """The action of z by the doors of ``ops``, which autograd sees through twice."""
        m: Any = self  # buffers are Tensors, whatever torch's types say
        action = ops.internal_action(
            z, tau, atoms=m.atoms, cls=m.cls, kind=m.kind, grid=m.grid,
            offsets=m.offsets, coef=m.coef, sigma_knots=m.base_sigma,
        )[0]  # fmt: skip
        if not m.has_operator:
            return action
        return action + ops.pair_operator(
            z, tau, lam, sites=m.sites, env=m.env, pair_type=m.pair_type, table=m.table,
            r_grid=m.r_grid, lam_knots=m.lam_knots, sigma_knots=m.operator_sigma,
            r_switch=m.r_switch, r_cutoff=m.r_cutoff, integrated=True,
        )[0]  # fmt: skip

    @torch.jit.export
    def fields(self, x: Tensor, t: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """S [n_frames], dS/dx [n_frames, n_atoms, 3] (1/nm) and dS/dlam [n_frames]."""
        alpha = torch.ones_like(t)
        if self.amplitudes.kind == 0:
            z, tau = x, self.amplitudes.sigma_max * t * t
        else:
            alpha, sigma = self.amplitudes(t)
            z, tau = x / alpha[:, None, None], sigma / alpha
        action, gradient, _ = torch.ops.diffforce.internal_action(
            z, tau, self.atoms, self.cls, self.kind, self.grid, self.offsets, self.coef,
            self.base_sigma,
        )  # fmt: skip
        d_lam = torch.zeros_like(lam)
        if self.has_operator:
            increment, increment_gradient, _, d_lam = torch.ops.diffforce.pair_operator(
                z, tau, lam, self.no_box, self.sites, self.env, self.pair_type, self.table,
                self.r_grid, self.lam_knots, self.operator_sigma, self.r_switch, self.r_cutoff,
                True,
            )  # fmt: skip
            action = action + increment
            gradient = gradient + increment_gradient
        if self.amplitudes.kind == 0:
            return action, gradient, d_lam
        return action + self.n_dof * torch.log(alpha), gradient / alpha[:, None, None], d_lam

    @torch.jit.export
    def increment_fields(self, x: Tensor, t: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """S(x,t,lam) - S(x,t,0), its x-gradient and its lam-derivative: the operator's part alone.

        What ``mode="operator"`` evaluates; cheaper than two calls of :meth:`fields`.
        """
        if self.amplitudes.kind == 0:  # VE has alpha = 1: a step is short of time for dividing by it
            increment, gradient, _, d_lam = torch.ops.diffforce.pair_operator(
                x, self.amplitudes.sigma_max * t * t, lam, self.no_box, self.sites, self.env, self.pair_type,
                self.table, self.r_grid, self.lam_knots, self.operator_sigma, self.r_switch,
                self.r_cutoff, True,
            )  # fmt: skip
            return increment, gradient, d_lam
        alpha, sigma = self.amplitudes(t)
        increment, gradient, _, d_lam = torch.ops.diffforce.pair_operator(
            x / alpha[:, None, None], sigma / alpha, lam, self.no_box, self.sites, self.env,
            self.pair_type, self.table, self.r_grid, self.lam_knots, self.operator_sigma,
            self.r_switch, self.r_cutoff, True,
        )  # fmt: skip
        return increment, gradient / alpha[:, None, None], d_lam

    @torch.jit.export
    def operator_gradient(self, x: Tensor, t: Tensor, lam: Tensor) -> Tensor:
        """Gradient of the noised operator, d2S/dx dlam [n_frames, n_atoms, 3], in 1/nm."""
        if not self.has_operator:
            return torch.zeros_like(x)
        alpha, sigma = self.amplitudes(t)
        gradient, _, _ = torch.ops.diffforce.pair_operator_hvp(
            x / alpha[:, None, None], sigma / alpha, lam, self.no_box, self.sites, self.env,
            self.pair_type, self.table, self.r_grid, self.lam_knots, self.operator_sigma,
            self.r_switch, self.r_cutoff, True, torch.zeros_like(x), torch.zeros_like(t),
            torch.ones_like(lam),
        )  # fmt: skip
        return gradient / alpha[:, None, None]

    @torch.jit.export
    def hessian_product(self, x: Tensor, t: Tensor, lam: Tensor, v: Tensor) -> Tensor:
        """Hessian of S in x times v, both [n_frames, n_atoms, 3]; v in nm gives 1/nm."""
        alpha, sigma = self.amplitudes(t)
        z, tau = x / alpha[:, None, None], sigma / alpha
        v = v / alpha[:, None, None]
        still = torch.zeros_like(t)
        out, _ = torch.ops.diffforce.internal_action_hvp(
            z, tau, self.atoms, self.cls, self.kind, self.grid, self.offsets, self.coef,
            self.base_sigma, v, still,
        )  # fmt: skip
        if self.has_operator:
            pairs, _, _ = torch.ops.diffforce.pair_operator_hvp(
                z, tau, lam, self.no_box, self.sites, self.env, self.pair_type, self.table,
                self.r_grid, self.lam_knots, self.operator_sigma, self.r_switch, self.r_cutoff, True,
                v, still, torch.zeros_like(lam),
            )  # fmt: skip
            out = out + pairs
        return out / alpha[:, None, None]


def check_noise_range(what: str, sigma_knots: np.ndarray, schedule: NoiseSchedule) -> None:
    """Noise knots must reach the schedule's noise at t = 1.

    Raises
    ------
    InputError
        If they do not.
    """
    top = float(schedule.noise_to_signal(1.0))
    if sigma_knots[-1] < top * (1 - 1e-9) and not np.isclose(sigma_knots[-1], top):
        raise InputError(
            f"{what}: expected noise knots up to sigma/alpha = {top:.6g} nm at t = 1, "
            f"found {sigma_knots[-1]:.6g}; fit more knots or narrow the schedule."
        )


def base_tables(model: torch.nn.Module, graph: MolecularGraph) -> BaseTables:
    """The base action's splines of a :class:`PhysicalModel`, fresh or loaded from an artefact.

    Raises
    ------
    InputError
        If the model is of another class, or the graph of another molecule.
    """
    coordinates = internal_coordinates(graph)
    buffers = dict(model.named_buffers())
    if "base_sigma" not in buffers or not np.array_equal(buffers["atoms"].numpy(), coordinates.atoms):
        raise InputError("base_tables: expected a PhysicalModel of this molecular graph.")
    sigma_knots, grid, offsets, coef = (
        buffers[name].numpy() for name in ("base_sigma", "grid", "offsets", "coef")
    )
    return BaseTables(coordinates, sigma_knots, grid, offsets, coef, int(buffers.get("wall_cells", 0)))


def internal_values(
    x: np.ndarray, coordinates: InternalCoordinates, *, select: np.ndarray | None = None
) -> np.ndarray:
    """Values of the internal coordinates [n_frames, n_coordinates], in nm and radians.

    ``select`` (indices) restricts them.
    """
    chosen = slice(None) if select is None else select
    a = coordinates.atoms[chosen]
    kind = coordinates.kind[coordinates.cls[chosen]]
    out = np.empty((len(x), len(a)))
    pair = kind == DISTANCE
    out[:, pair] = np.linalg.norm(x[:, a[pair, 0]] - x[:, a[pair, 1]], axis=-1)
    bend = kind == ANGLE
    u = x[:, a[bend, 0]] - x[:, a[bend, 1]]
    v = x[:, a[bend, 2]] - x[:, a[bend, 1]]
    out[:, bend] = np.arctan2(np.linalg.norm(np.cross(u, v), axis=-1), (u * v).sum(-1))
    turn = kind == TORSION
    b1 = x[:, a[turn, 1]] - x[:, a[turn, 0]]
    b2 = x[:, a[turn, 2]] - x[:, a[turn, 1]]
    b3 = x[:, a[turn, 3]] - x[:, a[turn, 2]]
    n1, n2 = np.cross(b1, b2), np.cross(b2, b3)
    out[:, turn] = np.arctan2((b1 * n2).sum(-1) * np.linalg.norm(b2, axis=-1), (n1 * n2).sum(-1))
    return out


def outside_fraction(x: np.ndarray, base: BaseTables, knot: int = 0) -> tuple[float, dict[str, float]]:
    """Fraction of frames with a coordinate outside its training range, in all and per role.

    Periodic coordinates have no outside.
    """
    q = internal_values(np.asarray(x, dtype=float), base.coordinates)
    lo, hi = base.domain(knot)
    cls = base.coordinates.cls
    out = (q < lo[cls]) | (q > hi[cls])
    role = np.array(base.coordinates.role)[cls]
    return float(out.any(axis=1).mean()), {
        str(r): float(out[:, role == r].any(axis=1).mean()) for r in sorted(set(role))
    }
