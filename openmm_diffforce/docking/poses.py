r"""Poses of a rigid ligand: a rotation and a translation, many at once.

A pose (R, tau) moves the reference coordinates of a ligand with centre c,

.. math:: x = R\,(x_{ref} - c) + c + \tau .

Lengths are in nm, angles in rad, arrays float64; nothing here needs OpenMM or torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from . import so3
from .so3 import FloatArray


def check_coordinates(name: str, value: Any, ndim: int) -> FloatArray:
    """Finite coordinates with ``ndim`` axes, none of them empty and the last one of length 3."""
    x = so3._real(name, value, (3,))
    if x.ndim != ndim or not all(x.shape):
        want = ("(3)", "(n_atoms, 3)", "(n, n_atoms, 3)")[ndim - 1]
        raise InputError(f"{name}: expected shape {want}, found {x.shape}.")
    return x


@dataclass(frozen=True, eq=False)
class Poses:
    """Poses of one rigid ligand: x = R (x_ref - c) + c + tau.

    Parameters
    ----------
    rotation : array_like, shape (n, 3, 3)
        R.
    translation : array_like, shape (n, 3)
        tau [nm].

    Raises
    ------
    InputError
        If shapes do not fit, a number is not finite, or a matrix is no rotation.

    Notes
    -----
    Reference coordinates and centre are not held here: the same poses move any atoms of the ligand.
    n may be 0 (a selection that left none); what evaluates poses asks for at least one.

    Examples
    --------
    >>> pose = Poses(so3.exp([[0.0, 0.0, np.pi]]), [[1.0, 0.0, 0.0]])
    >>> pose.apply([[0.1, 0.0, 0.0], [-0.1, 0.0, 0.0]], [0.0, 0.0, 0.0]).round(12)[0, :, 0]
    array([0.9, 1.1])
    """

    rotation: FloatArray
    translation: FloatArray

    def __post_init__(self) -> None:
        rotation = so3.check_rotations(self.rotation, name="Poses.rotation")
        translation = so3._real("Poses.translation", self.translation, (3,))
        if rotation.ndim != 3 or translation.shape != (len(rotation), 3):
            raise InputError(
                f"Poses: expected rotation (n, 3, 3) and translation (n, 3), found {rotation.shape} and "
                f"{translation.shape}."
            )
        object.__setattr__(self, "rotation", rotation)
        object.__setattr__(self, "translation", translation)

    def __len__(self) -> int:
        return len(self.translation)

    def __getitem__(self, index: Any) -> "Poses":
        """A slice, a mask, an array of indices or one index; always Poses."""
        if isinstance(index, int | np.integer) and not isinstance(index, bool):
            index = [index]
        return Poses(self.rotation[index], self.translation[index])

    def __iter__(self) -> Iterator["Poses"]:
        return (self[i] for i in range(len(self)))

    @classmethod
    def identity(cls, n: int = 1) -> "Poses":
        """n times the reference itself."""
        n = so3._count(n)
        return cls(np.broadcast_to(np.eye(3), (n, 3, 3)).copy(), np.zeros((n, 3)))

    @classmethod
    def concatenate(cls, many: Any) -> "Poses":
        """One after the other."""
        many = list(many)
        if not many:
            raise InputError("Poses.concatenate: expected at least one Poses, found none.")
        return cls(np.concatenate([p.rotation for p in many]), np.concatenate([p.translation for p in many]))

    @classmethod
    def from_coordinates(
        cls, x_ref: Any, x: Any, *, centre: Any = None, tolerance: float | None = 1e-3
    ) -> "Poses":
        """Poses that superpose the reference on given coordinates (least squares; Kabsch).

        Parameters
        ----------
        x_ref : array_like, shape (n_atoms, 3)
            [nm], at least three atoms that are not on one line.
        x : array_like, shape (n, n_atoms, 3)
            The same atoms, moved [nm].
        centre : array_like, shape (3,), optional
            c [nm]; the mean of ``x_ref`` by default.
        tolerance : float, optional
            Largest root mean square deviation allowed [nm]; None allows any.

        Returns
        -------
        Poses

        Raises
        ------
        InputError
            If shapes do not fit, atoms are on a line, or the deviation is larger than ``tolerance``.

        References
        ----------
        W. Kabsch, A solution for the best rotation to relate two sets of vectors, 1976,
        doi:10.1107/S0567739476001873.
        """
        ref = check_coordinates("x_ref", x_ref, 2)
        moved = check_coordinates("x", x, 3)
        if moved.shape[1:] != ref.shape or len(ref) < 3:
            raise InputError(
                f"Poses.from_coordinates: expected x of shape (n, n_atoms, 3) with the atoms of x_ref, at "
                f"least three; found {moved.shape} and {ref.shape}."
            )
        c = ref.mean(axis=0) if centre is None else check_coordinates("centre", centre, 1)
        own = ref - ref.mean(axis=0)
        spread = np.linalg.svd(own, compute_uv=False)
        if spread[1] < 1e-6 * max(spread[0], 1e-12):
            raise InputError(
                "Poses.from_coordinates: expected atoms that span a plane, found them on a line."
            )
        mean = moved.mean(axis=1)
        u, _, vt = np.linalg.svd(np.einsum("nai,aj->nij", moved - mean[:, None], own))
        u[:, :, 2] *= np.sign(np.linalg.det(u @ vt))[:, None]
        rotation = u @ vt
        out = cls(rotation, mean - c - np.einsum("nij,j->ni", rotation, ref.mean(axis=0) - c))
        if tolerance is not None:
            worst = np.sqrt(((out.apply(ref, c) - moved) ** 2).sum(axis=-1).mean(axis=-1)).max()
            if worst > tolerance:
                raise InputError(
                    f"Poses.from_coordinates: expected rigid copies of x_ref within {tolerance:g} nm, found "
                    f"a deviation of {worst:.3g} nm; same atoms, same order? tolerance=None takes it anyway."
                )
        return out

    def apply(self, x_ref: Any, centre: Any) -> FloatArray:
        """Coordinates of the ligand in every pose.

        Parameters
        ----------
        x_ref : array_like, shape (n_atoms, 3)
            [nm].
        centre : array_like, shape (3,)
            c [nm].

        Returns
        -------
        numpy.ndarray, shape (n, n_atoms, 3)
            [nm].

        Raises
        ------
        InputError
            If a shape is wrong or a number is not finite.
        """
        ref, c = check_coordinates("x_ref", x_ref, 2), check_coordinates("centre", centre, 1)
        return (ref - c) @ self.rotation.swapaxes(1, 2) + (c + self.translation)[:, None]

    def compose(self, other: "Poses") -> "Poses":
        """First ``other``, then this: both about the reference centre c; one of them may be single."""
        turned = (self.rotation @ other.translation[..., None])[..., 0]
        return Poses(self.rotation @ other.rotation, turned + self.translation)

    def inverse(self) -> "Poses":
        """The poses that take these back to the reference."""
        back = self.rotation.swapaxes(1, 2)
        return Poses(back, -(back @ self.translation[..., None])[..., 0])

    def perturbed(self, rotation_vector: Any, shift: Any) -> "Poses":
        """Rotated in the space frame about the ligand's own centre, and shifted.

        R becomes exp(omega) R, tau becomes tau + shift: the step of noising, sampler and flow.

        Parameters
        ----------
        rotation_vector : array_like, shape (n, 3) or (3,)
            omega [rad].
        shift : array_like, shape (n, 3) or (3,)
            [nm].

        Returns
        -------
        Poses
        """
        return Poses(so3.exp(rotation_vector) @ self.rotation, self.translation + shift)

    def moved(self, rotation: Any, translation: Any, centre: Any) -> "Poses":
        """What the poses become when the whole complex is moved, x -> Q x + b.

        Parameters
        ----------
        rotation : array_like, shape (3, 3)
            Q.
        translation : array_like, shape (3,)
            b [nm].
        centre : array_like, shape (3,)
            c [nm] of the reference, which stays where it is.

        Returns
        -------
        Poses
            Scores of an invariant density turn with Q.
        """
        q = so3.check_rotations(rotation)
        b, c = check_coordinates("translation", translation, 1), check_coordinates("centre", centre, 1)
        return Poses(q @ self.rotation, (c + self.translation) @ q.T + b - c)

    def repeat(self, n: int) -> "Poses":
        """Every pose n times in a row."""
        n = so3._count(n)
        return Poses(np.repeat(self.rotation, n, axis=0), np.repeat(self.translation, n, axis=0))


def some_poses(poses: Any, name: str = "poses") -> Poses:
    """The same poses, if they are poses and there is at least one."""
    if not isinstance(poses, Poses):
        raise InputError(f"{name}: expected Poses, found {type(poses).__name__}.")
    if not len(poses):
        raise InputError(f"{name}: expected at least one pose, found none.")
    return poses
