r"""Stiff coordinates of a molecule, and the denoiser that undoes noise along them.

Distances, cosines of angles and signed volumes are all the shape coordinates there are here:
together they fix planarity and torsions too, none is singular, and their derivatives are a few
lines of vector algebra.

References
----------
E. B. Wilson, J. C. Decius, P. C. Cross, Molecular Vibrations, 1955 (the matrix dq/dx).
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..ops import ANGLE, DISTANCE, TORSION
from .graph import MolecularGraph, internal_coordinates

Tensor = torch.Tensor

LENGTH_FLOOR = 0.01
"""eps of the smoothed distances [nm]: keeps their derivatives finite where noise closes a bond."""


STIFF_SINE = 0.3
"""A class of torsions counts as stiff if the root mean square of its sine is below this."""


class ShapeCoordinates(torch.nn.Module):
    """Smoothed distances [nm], cosines of angles, signed volumes [nm^3]; closed-form derivatives.

    Parameters
    ----------
    pairs : int array [n_pairs, 2]
    triples : int array [n_triples, 3]
        The middle atom is the vertex.
    quads : int array [n_quads, 4]
        Atoms a, b, c, d of the volume ``(b - a) . ((c - b) x (d - c))``.
    n_atoms : int

    Notes
    -----
    Lengths are ``sqrt(r^2 + eps^2)``, in the cosines too. Inside, vectors are [n_frames, 3, n]:
    the components are few, what runs fast comes last.
    """

    edges: Tensor

    def __init__(self, pairs: np.ndarray, triples: np.ndarray, quads: np.ndarray, n_atoms: int) -> None:
        super().__init__()

        def difference(last: np.ndarray, first: np.ndarray) -> Tensor:
            out = torch.zeros(n_atoms, len(first), dtype=torch.float64)
            columns = torch.arange(len(first))
            out[torch.as_tensor(last), columns] = 1.0
            out[torch.as_tensor(first), columns] -= 1.0
            return out

        self.floor = LENGTH_FLOOR**2
        self.n_pairs = len(pairs)
        self.n_triples = len(triples)
        self.n_coordinates = len(pairs) + len(triples) + len(quads)
        arms = [difference(triples[:, k], triples[:, 1]) for k in (0, 2)]
        steps = [difference(quads[:, k + 1], quads[:, k]) for k in range(3)]
        edges = [difference(pairs[:, 0], pairs[:, 1]), *arms, *steps]
        self.sizes = [e.shape[1] for e in edges]
        self.register_buffer("edges", torch.cat(edges, dim=1))

    def _edges(self, x: Tensor) -> list[Tensor]:
        """Vectors of the pairs, the two arms of the triples, the three bonds of the quads."""
        return torch.matmul(x.transpose(1, 2), self.edges).split(self.sizes, dim=2)

    def _to_atoms(self, parts: list[Tensor]) -> Tensor:
        # TorchForce reads forces by their memory: a transposed view would come out scrambled
        return torch.matmul(torch.cat(parts, dim=2), self.edges.t()).transpose(1, 2).contiguous()

    def _length(self, d: Tensor) -> Tensor:
        return torch.sqrt((d * d).sum(1, keepdim=True) + self.floor)

    def _parts(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of distances, cosines and volumes, each [n_frames, 1, n]."""
        m, k = self.n_pairs, self.n_pairs + self.n_triples
        return weight[:, None, :m], weight[:, None, m:k], weight[:, None, k:]

    def values(self, x: Tensor) -> Tensor:
        """Coordinates [n_frames, n_coordinates] of frames [n_frames, n_atoms, 3]."""
        d, u, v, b1, b2, b3 = self._edges(x)
        cosine = (u * v).sum(1, keepdim=True) / (self._length(u) * self._length(v))
        volume = (b1 * torch.linalg.cross(b2, b3, dim=1)).sum(1, keepdim=True)
        return torch.cat([self._length(d), cosine, volume], dim=2)[:, 0]

    def _slopes(self, edges: list[Tensor]) -> list[Tensor]:
        """Derivative of every coordinate in its own edges."""
        d, u, v, b1, b2, b3 = edges
        p, q = self._length(u), self._length(v)
        n, m = u / p, v / q
        c = (n * m).sum(1, keepdim=True)
        return [d / self._length(d), (m - c * n) / p, (n - c * m) / q,
                torch.linalg.cross(b2, b3, dim=1), torch.linalg.cross(b3, b1, dim=1),
                torch.linalg.cross(b1, b2, dim=1)]  # fmt: skip

    def pullback(self, x: Tensor, weight: Tensor) -> Tensor:
        """Gradient of ``sum_i weight_i q_i`` [n_frames, n_atoms, 3]."""
        s = self._slopes(self._edges(x))
        a, b, g = self._parts(weight)
        return self._to_atoms([s[0] * a, s[1] * b, s[2] * b, s[3] * g, s[4] * g, s[5] * g])

    def push(self, x: Tensor, v: Tensor) -> Tensor:
        """Derivative of the coordinates along v [n_frames, n_coordinates]."""
        s = self._slopes(self._edges(x))
        w = self._edges(v)
        return torch.cat([
            (s[0] * w[0]).sum(1),
            (s[1] * w[1] + s[2] * w[2]).sum(1),
            (s[3] * w[3] + s[4] * w[4] + s[5] * w[5]).sum(1),
        ], dim=1)  # fmt: skip

    def jacobian(self, x: Tensor) -> Tensor:
        """dq/dx [n_frames, n_coordinates, 3 n_atoms]."""
        s = self._slopes(self._edges(x))
        e = self.edges.t().split(self.sizes, dim=0)
        each = [e[k][:, :, None] * s[k].transpose(1, 2)[:, :, None] for k in range(6)]
        return torch.cat([each[0], each[1] + each[2], each[3] + each[4] + each[5]], dim=1).flatten(2)

    def laplacian(self, x: Tensor) -> Tensor:
        """Sum of the second derivatives [n_frames, n_coordinates]."""
        d, u, v, _, _, _ = self._edges(x)
        r, p, q = self._length(d), self._length(u), self._length(v)
        n, m, o = d / r, u / p, v / q
        c = (m * o).sum(1)
        a, b = (m * m).sum(1), (o * o).sum(1)  # 1 but for the smoothing
        p, q = p[:, 0], q[:, 0]
        own = -c * (5.0 - 3.0 * a) / (p * p) - c * (5.0 - 3.0 * b) / (q * q)
        cosine = 2.0 * own + 2.0 * (3.0 - a - b + c * c) / (p * q)
        # a volume is linear in each of its atoms
        none = torch.zeros(x.shape[0], self.sizes[5], dtype=x.dtype)
        return torch.cat([2.0 * (3.0 - (n * n).sum(1)) / r[:, 0], cosine, none], dim=1)

    def curvature(self, x: Tensor, weight: Tensor, v: Tensor) -> Tensor:
        """Hessian of ``sum_i weight_i q_i`` times a direction v [n_frames, n_atoms, 3]."""
        d, u, w, b1, b2, b3 = self._edges(x)
        dd, du, dw, v1, v2, v3 = self._edges(v)
        a, b, g = self._parts(weight)
        r, p, q = self._length(d), self._length(u), self._length(w)
        k, n, m = d / r, u / p, w / q
        c = (n * m).sum(1, keepdim=True)
        dp, dq = (n * du).sum(1, keepdim=True), (m * dw).sum(1, keepdim=True)
        dn, dm = (du - n * dp) / p, (dw - m * dq) / q
        dc = (dn * m + n * dm).sum(1, keepdim=True)
        return self._to_atoms([
            (dd - k * (k * dd).sum(1, keepdim=True)) * (a / r),
            ((dm - c * dn - dc * n) - (m - c * n) * (dp / p)) * (b / p),
            ((dn - c * dm - dc * m) - (n - c * m) * (dq / q)) * (b / q),
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
) -> tuple[ShapeCoordinates, np.ndarray, np.ndarray]:
    """All distances, cosines of angles, and volumes of torsions and impropers, of a graph.

    Atoms of ``sites`` are kept apart from those that the graph makes them equivalent to.

    Returns
    -------
    coordinates : ShapeCoordinates
    cls : int64 array [n_coordinates]
        Symmetry class of each coordinate.
    role : array of str [n_coordinates]
        "bond", "1-3", "1-4", "nonbonded", "angle", "torsion" or "improper".
    """
    elements = tuple(f"{e}*{k}" if k in sites else e for k, e in enumerate(graph.elements))
    found = internal_coordinates(MolecularGraph(elements, graph.bonds))
    kind = found.kind[found.cls]
    order = np.concatenate([np.flatnonzero(kind == k) for k in (DISTANCE, ANGLE, TORSION)])
    return (
        chosen_coordinates(found.atoms[order], kind[order], graph.n_atoms),
        np.unique(found.cls[order], return_inverse=True)[1].astype(np.int64),
        np.array(found.role)[found.cls[order]],
    )


def chosen_coordinates(atoms: np.ndarray, kind: np.ndarray, n_atoms: int) -> ShapeCoordinates:
    """Coordinates of the rows of ``InternalCoordinates.atoms``, distances first, torsions last."""
    return ShapeCoordinates(
        atoms[kind == DISTANCE][:, :2], atoms[kind == ANGLE][:, :3], atoms[kind == TORSION], n_atoms
    )
