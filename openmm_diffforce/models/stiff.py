r"""Stiff coordinates of a molecule, and the denoiser that undoes noise along them.

Distances and signed volumes are all the shape coordinates there are here: together they fix bond
lengths, angles, planarity and torsions, and their derivatives are a few lines of vector algebra.

References
----------
E. B. Wilson, J. C. Decius, P. C. Cross, Molecular Vibrations, 1955 (the matrix dq/dx).
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..ops import DISTANCE, TORSION
from .graph import MolecularGraph, internal_coordinates

Tensor = torch.Tensor

LENGTH_FLOOR = 0.01
"""eps of the smoothed distances [nm]: keeps their derivatives finite where noise closes a bond."""


STIFF_SINE = 0.3
"""A class of torsions counts as stiff if the root mean square of its sine is below this."""


class ShapeCoordinates(torch.nn.Module):
    """Smoothed distances [nm] and signed volumes [nm^3], with closed-form derivatives.

    Parameters
    ----------
    pairs : int array [n_pairs, 2]
    quads : int array [n_quads, 4]
        Atoms a, b, c, d of the volume ``(b - a) . ((c - b) x (d - c))``.
    n_atoms : int

    Notes
    -----
    Inside, vectors are [n_frames, 3, n]: the components are few, what runs fast comes last.
    """

    edges: Tensor

    def __init__(self, pairs: np.ndarray, quads: np.ndarray, n_atoms: int) -> None:
        super().__init__()

        def difference(last: np.ndarray, first: np.ndarray) -> Tensor:
            out = torch.zeros(n_atoms, len(first), dtype=torch.float64)
            columns = torch.arange(len(first))
            out[torch.as_tensor(last), columns] = 1.0
            out[torch.as_tensor(first), columns] -= 1.0
            return out

        self.floor = LENGTH_FLOOR**2
        self.n_pairs = len(pairs)
        self.n_quads = len(quads)
        steps = [difference(quads[:, k + 1], quads[:, k]) for k in range(3)]
        self.register_buffer("edges", torch.cat([difference(pairs[:, 0], pairs[:, 1]), *steps], dim=1))

    def _edges(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Vectors of the pairs, and the three bonds of the quads."""
        d = torch.matmul(x.transpose(1, 2), self.edges)
        m, n = self.n_pairs, self.n_quads
        return d[:, :, :m], d[:, :, m : m + n], d[:, :, m + n : m + 2 * n], d[:, :, m + 2 * n :]

    def _to_atoms(self, parts: list[Tensor]) -> Tensor:
        # TorchForce reads forces by their memory: a transposed view would come out scrambled
        return torch.matmul(torch.cat(parts, dim=2), self.edges.t()).transpose(1, 2).contiguous()

    def values(self, x: Tensor) -> Tensor:
        """Coordinates [n_frames, n_pairs + n_quads] of frames [n_frames, n_atoms, 3]."""
        d, b1, b2, b3 = self._edges(x)
        r = torch.sqrt((d * d).sum(1) + self.floor)
        return torch.cat([r, (b1 * torch.linalg.cross(b2, b3, dim=1)).sum(1)], dim=1)

    def _unit(self, d: Tensor, b1: Tensor, b2: Tensor, b3: Tensor) -> list[Tensor]:
        """Derivatives of the coordinates in their own edges."""
        n = d / torch.sqrt((d * d).sum(1, keepdim=True) + self.floor)
        return [n, torch.linalg.cross(b2, b3, dim=1), torch.linalg.cross(b3, b1, dim=1),
                torch.linalg.cross(b1, b2, dim=1)]  # fmt: skip

    def pullback(self, x: Tensor, weight: Tensor) -> Tensor:
        """Gradient of ``sum_i weight_i q_i`` [n_frames, n_atoms, 3]."""
        d, b1, b2, b3 = self._edges(x)
        n, f1, f2, f3 = self._unit(d, b1, b2, b3)
        a, g = weight[:, None, : self.n_pairs], weight[:, None, self.n_pairs :]
        return self._to_atoms([n * a, f1 * g, f2 * g, f3 * g])

    def push(self, x: Tensor, v: Tensor) -> Tensor:
        """Derivative of the coordinates along v [n_frames, n_coordinates]."""
        d, b1, b2, b3 = self._edges(x)
        n, f1, f2, f3 = self._unit(d, b1, b2, b3)
        dv, v1, v2, v3 = self._edges(v)
        return torch.cat([(n * dv).sum(1), (f1 * v1 + f2 * v2 + f3 * v3).sum(1)], dim=1)

    def jacobian(self, x: Tensor) -> Tensor:
        """dq/dx [n_frames, n_coordinates, 3 n_atoms]."""
        d, b1, b2, b3 = self._edges(x)
        n, f1, f2, f3 = self._unit(d, b1, b2, b3)
        m, k = self.n_pairs, self.n_quads
        e = self.edges.t()[:, :, None]
        pairs = e[:m] * n.transpose(1, 2)[:, :, None]
        quads = (
            e[m : m + k] * f1.transpose(1, 2)[:, :, None]
            + e[m + k : m + 2 * k] * f2.transpose(1, 2)[:, :, None]
            + e[m + 2 * k :] * f3.transpose(1, 2)[:, :, None]
        )
        return torch.cat([pairs, quads], dim=1).flatten(2)

    def curvature(self, x: Tensor, weight: Tensor, v: Tensor) -> Tensor:
        """Hessian of ``sum_i weight_i q_i`` times a direction v [n_frames, n_atoms, 3]."""
        d, b1, b2, b3 = self._edges(x)
        dv, v1, v2, v3 = self._edges(v)
        r = torch.sqrt((d * d).sum(1, keepdim=True) + self.floor)
        n = d / r
        bent = (dv - n * (n * dv).sum(1, keepdim=True)) * (weight[:, None, : self.n_pairs] / r)
        g = weight[:, None, self.n_pairs :]
        return self._to_atoms([
            bent,
            (torch.linalg.cross(v2, b3, dim=1) + torch.linalg.cross(b2, v3, dim=1)) * g,
            (torch.linalg.cross(v3, b1, dim=1) + torch.linalg.cross(b3, v1, dim=1)) * g,
            (torch.linalg.cross(v1, b2, dim=1) + torch.linalg.cross(b1, v2, dim=1)) * g,
        ])  # fmt: skip


class StiffDenoiser(torch.nn.Module):
    r"""The most probable clean frame under a harmonic prior of stiff coordinates.

    Gauss-Newton for :math:`\min_x \tfrac12 |\hat q(x)|^2 + |x - z|^2 / (2 \tau^2)` with
    :math:`\hat q_i = \sqrt{k_i} (q_i - q_i^0)`: from x_0 = z,

    .. math::

        x_{n+1} = z - \tau^2 J^T u, \quad
        (1 + \tau^2 J J^T) u = \hat q(x_n) + J (z - x_n), \quad J = d\hat q/dx (x_n).
    """

    root: Tensor
    centre: Tensor
    one: Tensor

    def __init__(
        self, coordinates: ShapeCoordinates, stiffness: Tensor, centre: Tensor, n_steps: int = 2
    ) -> None:
        super().__init__()
        self.coordinates = coordinates
        self.n_steps = n_steps
        self.register_buffer("root", torch.sqrt(stiffness))
        self.register_buffer("centre", centre)
        self.register_buffer("one", torch.eye(len(stiffness), dtype=stiffness.dtype))

    def residual(self, x: Tensor) -> Tensor:
        """sqrt(k) (q - q0) [n_frames, n_coordinates]."""
        return self.root * (self.coordinates.values(x) - self.centre)

    def denoise(self, z: Tensor, tau: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
        """Iterates x_0 ... x_n, factors and multipliers u of every step, and w."""
        tau2 = (tau * tau)[:, None]
        xs = [z]
        factors: list[Tensor] = []
        us: list[Tensor] = []
        w = torch.zeros_like(z)
        for n in range(self.n_steps):
            x = xs[n]
            jacobian = self.root[:, None] * self.coordinates.jacobian(x)
            metric = self.one + tau2[:, :, None] * torch.matmul(jacobian, jacobian.transpose(1, 2))
            factor = torch.linalg.cholesky(metric)
            aim = self.residual(x) + torch.matmul(jacobian, (z - x).flatten(1)[:, :, None])[:, :, 0]
            u = torch.cholesky_solve(aim[:, :, None], factor)[:, :, 0]
            w = torch.matmul(u[:, None, :], jacobian)[:, 0].reshape(z.shape)
            xs.append(z - tau2[:, :, None] * w)
            factors.append(factor)
            us.append(u)
        return xs, factors, us, w

    def energy(self, tau: Tensor, us: list[Tensor], w: Tensor) -> Tensor:
        """The noised harmonic prior [n_frames]: the minimum of the last step's quadratic model."""
        u = us[-1]
        return 0.5 * (u * u).sum(1) + 0.5 * tau * tau * (w * w).sum((1, 2))

    def pullback(
        self, tau: Tensor, xs: list[Tensor], factors: list[Tensor], us: list[Tensor], g: Tensor,
        energy: bool,
    ) -> Tensor:  # fmt: skip
        """Gradient in z of a function whose gradient at x_hat is g; plus that of the energy."""
        tau2 = (tau * tau)[:, None, None]
        total = torch.zeros_like(g)
        for back in range(self.n_steps):
            n = self.n_steps - 1 - back
            x, step = xs[n], xs[n + 1] - xs[n]
            push = self.root * self.coordinates.push(x, g)
            p = torch.cholesky_solve(push[:, :, None], factors[n])[:, :, 0]
            direct = g - tau2 * self.coordinates.pullback(x, self.root * p)
            total = total + direct
            g = -tau2 * (
                self.coordinates.curvature(x, self.root * us[n], direct)
                + self.coordinates.curvature(x, self.root * p, step)
            )
            if energy and back == 0:
                # x_hat minimises the quadratic model: only the model itself moves with x_(n-1)
                total = total + self.coordinates.pullback(x, self.root * us[n])
                g = g + self.coordinates.curvature(x, self.root * us[n], step)
        return total + g

    def metric(self, x: Tensor) -> Tensor:
        """Gauss-Newton Hessian J^T J of the harmonic sum [n_frames, 3 n_atoms, 3 n_atoms]."""
        jacobian = self.root[:, None] * self.coordinates.jacobian(x)
        return torch.matmul(jacobian.transpose(1, 2), jacobian)


def shape_coordinates(
    graph: MolecularGraph, sites: Sequence[int] = ()
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All distances, and the volumes of torsions and impropers, of a graph.

    Atoms of ``sites`` are kept apart from those that the graph makes them equivalent to.

    Returns
    -------
    pairs : int64 array [n_pairs, 2]
    quads : int64 array [n_quads, 4]
    cls : int64 array [n_pairs + n_quads]
        Symmetry class of each.
    """
    elements = tuple(f"{e}*{k}" if k in sites else e for k, e in enumerate(graph.elements))
    found = internal_coordinates(MolecularGraph(elements, graph.bonds))
    kind = found.kind[found.cls]
    pairs, quads = np.flatnonzero(kind == DISTANCE), np.flatnonzero(kind == TORSION)
    _, cls = np.unique(found.cls[np.concatenate([pairs, quads])], return_inverse=True)
    return found.atoms[pairs, :2], found.atoms[quads], cls.astype(np.int64)
