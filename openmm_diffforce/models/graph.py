"""The molecular graph: internal coordinates and the symmetry that ties their weights.

Only elements and bonds go in. No force field, no atom types, no coordinates.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from ..errors import InputError
from ..ops import ANGLE, DISTANCE, TORSION


@dataclass(frozen=True)
class MolecularGraph:
    """Elements and bonds of one molecule (or of several, unconnected).

    Parameters
    ----------
    elements : sequence of str
        Element symbols, one per atom.
    bonds : sequence of (int, int)
        Bonded pairs of atom indices.
    names : sequence of str, optional
        Atom names, for messages and checks only; they never tie or split weights.

    Raises
    ------
    InputError
        If there are no atoms, or a bond names an atom that is not there or itself.

    Examples
    --------
    >>> water = MolecularGraph(("O", "H", "H"), ((0, 1), (0, 2)))
    >>> water.atom_classes().tolist()
    [0, 1, 1]
    """

    elements: tuple[str, ...]
    bonds: tuple[tuple[int, int], ...]
    names: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        n = len(self.elements)
        if n == 0:
            raise InputError("molecular graph: expected at least one atom, found none.")
        bonds = sorted({(min(i, j), max(i, j)) for i, j in self.bonds})
        for i, j in bonds:
            if not (0 <= i < j < n):
                raise InputError(f"bond ({i}, {j}): expected two different atoms of {n}.")
        if self.names and len(self.names) != n:
            raise InputError(f"names: expected {n} atom names, found {len(self.names)}.")
        object.__setattr__(self, "elements", tuple(self.elements))
        object.__setattr__(self, "bonds", tuple((int(i), int(j)) for i, j in bonds))
        object.__setattr__(self, "names", tuple(self.names))

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return len(self.elements)

    def neighbours(self) -> list[list[int]]:
        """Bonded neighbours of every atom, ascending."""
        out: list[list[int]] = [[] for _ in self.elements]
        for i, j in self.bonds:
            out[i].append(j)
            out[j].append(i)
        return [sorted(a) for a in out]

    def atom_classes(self) -> np.ndarray:
        """Symmetry class of every atom [n_atoms], by colour refinement of the graph.

        Atoms that an automorphism exchanges always share a class. (Colour refinement can also
        merge atoms that no automorphism exchanges, in regular graphs; that ties more weights
        than symmetry asks, never fewer.)
        """
        colour: list[str] = list(self.elements)
        near = self.neighbours()
        n_classes = len(set(colour))
        while True:
            refined = [json.dumps([colour[i], sorted(colour[j] for j in near[i])])
                       for i in range(self.n_atoms)]  # fmt: skip
            colour = [hashlib.sha256(c.encode()).hexdigest() for c in refined]
            if len(set(colour)) == n_classes:
                break
            n_classes = len(set(colour))
        first: dict[str, int] = {}
        return np.array([first.setdefault(c, len(first)) for c in colour])

    def separations(self) -> np.ndarray:
        """Number of bonds between every two atoms [n_atoms, n_atoms]; n_atoms if unconnected."""
        n = self.n_atoms
        near = self.neighbours()
        out = np.full((n, n), n, dtype=int)
        for start in range(n):
            out[start, start] = 0
            shell = [start]
            depth = 0
            while shell:
                depth += 1
                nxt = [k for a in shell for k in near[a] if out[start, k] == n and k != start]
                for k in nxt:
                    out[start, k] = depth
                shell = list(dict.fromkeys(nxt))
        return out

    def bonds_hash(self) -> str:
        """SHA-256 of elements and bonds in this atom order."""
        return hashlib.sha256(json.dumps([self.elements, self.bonds]).encode()).hexdigest()


@dataclass(frozen=True)
class InternalCoordinates:
    """Internal coordinates of a molecule, grouped in symmetry classes.

    Attributes
    ----------
    atoms : int64 array [n_coordinates, 4]
        Atom indices, padded with -1.
    cls : int64 array [n_coordinates]
        Class of each coordinate.
    kind : int64 array [n_classes]
        DISTANCE, ANGLE or TORSION.
    role : tuple of str, n_classes long
        "bond", "angle", "torsion", "improper", "1-3", "1-4" or "nonbonded".
    label : tuple of str, n_classes long
        Readable, e.g. ``"bond C-H #3"``.
    """

    atoms: np.ndarray
    cls: np.ndarray
    kind: np.ndarray
    role: tuple[str, ...]
    label: tuple[str, ...]

    @property
    def n_classes(self) -> int:
        """Number of symmetry classes."""
        return len(self.kind)


def internal_coordinates(graph: MolecularGraph) -> InternalCoordinates:
    """Bonds, angles, proper torsions, impropers, 1-4 and nonbonded pairs of a graph.

    Coordinates that a graph symmetry exchanges share a class, hence their weights. Pairs are
    classed by the classes of their atoms and by whether they are three bonds apart or more.
    An improper (the torsion a-b-centre-c) is defined at every centre with exactly three
    neighbours of three different classes, ordered by class.
    """
    cls_of = graph.atom_classes()
    near = graph.neighbours()
    separation = graph.separations()
    found: dict[tuple, list[tuple[int, ...]]] = {}

    def add(role: str, kind: int, atoms: tuple[int, ...]) -> None:
        colours = tuple(int(cls_of[a]) for a in atoms)
        if role != "improper" and colours[::-1] < colours:
            atoms, colours = atoms[::-1], colours[::-1]
        found.setdefault((role, kind, colours), []).append(atoms)

    for i, j in graph.bonds:
        add("bond", DISTANCE, (i, j))
    for j in range(graph.n_atoms):
        for i, k in combinations(near[j], 2):
            add("angle", ANGLE, (i, j, k))
    for j, k in graph.bonds:
        for i in near[j]:
            for last in near[k]:
                if i != k and last != j and i != last:
                    add("torsion", TORSION, (i, j, k, last))
    for centre in range(graph.n_atoms):
        if len(near[centre]) == 3 and len({int(cls_of[a]) for a in near[centre]}) == 3:
            a, b, c = sorted(near[centre], key=lambda n: int(cls_of[n]))
            add("improper", TORSION, (a, b, centre, c))
    for i, j in combinations(range(graph.n_atoms), 2):
        if separation[i, j] >= 2:
            role_of = {2: "1-3", 3: "1-4"}
            add(role_of.get(int(separation[i, j]), "nonbonded"), DISTANCE, (i, j))

    atoms, cls, kind, role, label = [], [], [], [], []
    for number, ((r, k, _), members) in enumerate(found.items()):
        kind.append(k)
        role.append(r)
        label.append(f"{r} {'-'.join(graph.elements[a] for a in members[0])} #{number}")
        for member in members:
            atoms.append([*member, *([-1] * (4 - len(member)))])
            cls.append(number)
    return InternalCoordinates(
        atoms=np.array(atoms, dtype=np.int64).reshape(-1, 4),
        cls=np.array(cls, dtype=np.int64),
        kind=np.array(kind, dtype=np.int64),
        role=tuple(role),
        label=tuple(label),
    )


def rotatable_bonds(graph: MolecularGraph) -> tuple[np.ndarray, np.ndarray]:
    """Bonds about which one side of the molecule can turn rigidly, and that side.

    A bond qualifies if it is in no ring and both its atoms have further neighbours. Turning the
    moved side about it leaves every bond, angle and improper as it is.

    Returns
    -------
    axis : int64 array [n_rotations, 2]
        The bond's atoms: fixed side first.
    moved : bool array [n_rotations, n_atoms]
        The atoms beyond ``axis[:, 1]``, that atom included (it lies on the axis).

    Examples
    --------
    >>> peroxide = MolecularGraph(("H", "O", "O", "H"), ((0, 1), (1, 2), (2, 3)))
    >>> axis, moved = rotatable_bonds(peroxide)
    >>> axis.tolist(), moved.astype(int).tolist()
    ([[1, 2]], [[0, 0, 1, 1]])
    """
    near = graph.neighbours()
    axis: list[tuple[int, int]] = []
    moved: list[np.ndarray] = []
    for i, j in graph.bonds:
        if len(near[i]) < 2 or len(near[j]) < 2:
            continue
        side = {j}
        stack = [j]
        while stack:
            a = stack.pop()
            beyond = [b for b in near[a] if b not in side and (a, b) != (j, i)]
            side.update(beyond)
            stack.extend(beyond)
        if i not in side:
            axis.append((i, j))
            moved.append(np.isin(np.arange(graph.n_atoms), list(side)))
    return (
        np.array(axis, dtype=np.int64).reshape(-1, 2),
        np.array(moved, dtype=bool).reshape(-1, graph.n_atoms),
    )


def operator_pairs(
    graph: MolecularGraph, sites: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Pairs between the sites of a perturbation and the rest of the molecule, and their types.

    Each site is a type of its own (a perturbation breaks the symmetry among equivalent atoms);
    environment atoms are typed by symmetry class and by whether they are three bonds away.
    Pairs closer than three bonds are excluded, pairs among sites are counted once.

    Returns
    -------
    env : int64 array [n_env]
        Environment atoms: every atom of the molecule.
    pair_type : int64 array [n_sites, n_env]
        Type of each pair, -1 = excluded.
    label : tuple of str
        One readable name per type.

    Raises
    ------
    InputError
        If there are no sites, or they are repeated or out of range.
    """
    sites = [int(s) for s in sites]
    n = graph.n_atoms
    if not sites or len(set(sites)) != len(sites) or min(sites) < 0 or max(sites) >= n:
        raise InputError(f"sites: expected different atom indices below {n}, found {sites}.")
    cls_of = graph.atom_classes()
    separation = graph.separations()
    types: dict[tuple, int] = {}
    labels: list[str] = []
    pair_type = np.full((len(sites), n), -1, dtype=np.int64)
    for a, site in enumerate(sites):
        for b in range(n):
            if separation[site, b] < 3 or (b in sites and b < site):
                continue
            other = ("site", b) if b in sites else ("class", int(cls_of[b]))
            key = (site, other, bool(separation[site, b] == 3))
            if key not in types:
                types[key] = len(types)
                where = "1-4" if key[2] else "nonbonded"
                labels.append(f"{where} {graph.elements[site]}{site}-{graph.elements[b]}")
            pair_type[a, b] = types[key]
    if not types:
        raise InputError(
            "sites: every pair with the rest of the molecule is closer than three bonds; "
            "a pair operator has nothing to act on."
        )
    return np.arange(n, dtype=np.int64), pair_type, tuple(labels)
