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
    """

    def __init__(self, pairs: np.ndarray, quads: np.ndarray, n_atoms: int) -> None:
        super().__init__()

        def difference(last: np.ndarray, first: np.ndarray) -> Tensor:
            out = torch.zeros(len(first), n_atoms, dtype=torch.float64)
            rows = torch.arange(len(first))
            out[rows, torch.as_tensor(last)] = 1.0
            out[rows, torch.as_tensor(first)] -= 1.0
            return out

        self.floor = LENGTH_FLOOR**2
        self.n_pairs = len(pairs)
        self.n_quads = len(quads)
        self.register_buffer("pair", difference(pairs[:, 0], pairs[:, 1]))
        steps = [difference(quads[:, k + 1], quads[:, k]) for k in range(3)]
        self.register_buffer("steps", torch.cat(steps))

    def _edges(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b = torch.matmul(self.steps, x)
        n = self.n_quads
        return b[:, :n], b[:, n : 2 * n], b[:, 2 * n :]

    def values(self, x: Tensor) -> Tensor:
        """Coordinates [n_frames, n_pairs + n_quads] of frames [n_frames, n_atoms, 3]."""
        d = torch.matmul(self.pair, x)
        r = torch.sqrt((d * d).sum(-1) + self.floor)
        b1, b2, b3 = self._edges(x)
        return torch.cat([r, (b1 * torch.linalg.cross(b2, b3)).sum(-1)], dim=1)

    def pullback(self, x: Tensor, weight: Tensor) -> Tensor:
        """Gradient of ``sum_i weight_i q_i`` [n_frames, n_atoms, 3]."""
        d = torch.matmul(self.pair, x)
        r = torch.sqrt((d * d).sum(-1) + self.floor)
        out = torch.matmul(self.pair.t(), d * (weight[:, : self.n_pairs] / r)[..., None])
        b1, b2, b3 = self._edges(x)
        g = weight[:, self.n_pairs :, None]
        faces = [torch.linalg.cross(b2, b3), torch.linalg.cross(b3, b1), torch.linalg.cross(b1, b2)]
        return out + torch.matmul(self.steps.t(), torch.cat([f * g for f in faces], dim=1))

    def jacobian(self, x: Tensor) -> Tensor:
        """dq/dx [n_frames, n_coordinates, 3 n_atoms]."""
        d = torch.matmul(self.pair, x)
        n = d / torch.sqrt((d * d).sum(-1, keepdim=True) + self.floor)
        pairs = self.pair[:, :, None] * n[:, :, None, :]
        b1, b2, b3 = self._edges(x)
        m = self.n_quads
        quads = (
            self.steps[:m, :, None] * torch.linalg.cross(b2, b3)[:, :, None, :]
            + self.steps[m : 2 * m, :, None] * torch.linalg.cross(b3, b1)[:, :, None, :]
            + self.steps[2 * m :, :, None] * torch.linalg.cross(b1, b2)[:, :, None, :]
        )
        return torch.cat([pairs, quads], dim=1).flatten(2)

    def push(self, x: Tensor, v: Tensor) -> Tensor:
        """Derivative of the coordinates along v [n_frames, n_coordinates]."""
        d = torch.matmul(self.pair, x)
        r = torch.sqrt((d * d).sum(-1) + self.floor)
        b1, b2, b3 = self._edges(x)
        v1, v2, v3 = self._edges(v)
        volumes = (
            v1 * torch.linalg.cross(b2, b3)
            + v2 * torch.linalg.cross(b3, b1)
            + v3 * torch.linalg.cross(b1, b2)
        )
        return torch.cat([(d * torch.matmul(self.pair, v)).sum(-1) / r, volumes.sum(-1)], dim=1)

    def curvature(self, x: Tensor, weight: Tensor, v: Tensor) -> Tensor:
        """Hessian of ``sum_i weight_i q_i`` times a direction v [n_frames, n_atoms, 3]."""
        d = torch.matmul(self.pair, x)
        dv = torch.matmul(self.pair, v)
        r = torch.sqrt((d * d).sum(-1, keepdim=True) + self.floor)
        n = d / r
        bent = (dv - n * (n * dv).sum(-1, keepdim=True)) * (weight[:, : self.n_pairs, None] / r)
        out = torch.matmul(self.pair.t(), bent)
        b1, b2, b3 = self._edges(x)
        v1, v2, v3 = self._edges(v)
        g = weight[:, self.n_pairs :, None]
        faces = [
            torch.linalg.cross(v2, b3) + torch.linalg.cross(b2, v3),
            torch.linalg.cross(v3, b1) + torch.linalg.cross(b3, v1),
            torch.linalg.cross(v1, b2) + torch.linalg.cross(b1, v2),
        ]
        return out + torch.matmul(self.steps.t(), torch.cat([f * g for f in faces], dim=1))


class StiffDenoiser(torch.nn.Module):
    r"""The most probable clean frame under a harmonic prior of stiff coordinates.

    Gauss-Newton for :math:`\min_x \tfrac12 |\hat q(x)|^2 + |x - z|^2 / (2 \tau^2)` with
    :math:`\hat q_i = \sqrt{k_i} (q_i - q_i^0)`: from x_0 = z,

    .. math::

        x_{n+1} = z - \tau^2 J^T u, \quad
        (1 + \tau^2 J J^T) u = \hat q(x_n) + J (z - x_n), \quad J = d\hat q/dx (x_n).
    """

    def __init__(
        self, coordinates: ShapeCoordinates, stiffness: Tensor, centre: Tensor, n_steps: int = 3
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
