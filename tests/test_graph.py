"""The molecular graph: symmetry classes and internal coordinates, checked on small molecules."""

import numpy as np
import pytest

from openmm_diffforce.errors import InputError
from openmm_diffforce.models.graph import (
    MolecularGraph,
    internal_coordinates,
    operator_pairs,
    rotatable_bonds,
)

# ethane: C0 C1, hydrogens 2-4 on C0, 5-7 on C1
ETHANE = MolecularGraph(("C", "C", *"HHHHHH"), ((0, 1), (0, 2), (0, 3), (0, 4), (1, 5), (1, 6), (1, 7)))


def test_classes_of_ethane():
    classes = ETHANE.atom_classes()
    assert classes[0] == classes[1]
    assert len(set(classes[2:].tolist())) == 1
    assert classes[0] != classes[2]


def test_classes_do_not_depend_on_atom_order():
    order = np.random.default_rng(3).permutation(8)
    place = np.argsort(order)
    shuffled = MolecularGraph(
        tuple(ETHANE.elements[i] for i in order),
        tuple((place[i], place[j]) for i, j in ETHANE.bonds),
    )
    a, b = ETHANE.atom_classes(), shuffled.atom_classes()
    same = a[:, None] == a[None, :]
    assert np.array_equal(same[np.ix_(order, order)], b[:, None] == b[None, :])


def test_counts_of_ethane():
    c = internal_coordinates(ETHANE)
    role = np.array(c.role)[c.cls]
    counts = {r: int((role == r).sum()) for r in set(role)}
    assert counts == {"bond": 7, "angle": 12, "torsion": 9, "1-3": 12, "1-4": 9}
    assert c.n_classes == 2 + 2 + 1 + 2 + 1  # bonds, angles, torsions, 1-3, 1-4


def test_improper_where_neighbours_differ():
    # formamide-like centre: C0 with O1, N2, H3
    graph = MolecularGraph(("C", "O", "N", "H"), ((0, 1), (0, 2), (0, 3)))
    c = internal_coordinates(graph)
    assert c.role.count("improper") == 1
    assert c.atoms[np.array(c.role)[c.cls] == "improper"][0, 2] == 0


def test_separations():
    s = ETHANE.separations()
    assert s[2, 5] == 3
    assert s[2, 3] == 2
    two = MolecularGraph(("C", "C"), ())
    assert two.separations()[0, 1] == 2  # n_atoms means unconnected


def test_operator_pairs_exclude_close_and_count_site_pairs_once():
    env, pair_type, label = operator_pairs(ETHANE, [2, 5])
    assert env.tolist() == list(range(8))
    assert (pair_type[0, [0, 1, 2, 3, 4]] == -1).all()
    assert pair_type[0, 5] >= 0
    assert pair_type[1, 2] == -1  # counted above
    assert pair_type[0, 6] == pair_type[0, 7]
    assert len(label) == len(set(pair_type[pair_type >= 0].tolist()))


@pytest.mark.parametrize("sites", [[], [0, 0], [-1], [8]])
def test_bad_sites(sites):
    with pytest.raises(InputError, match="sites"):
        operator_pairs(ETHANE, sites)


def test_site_without_pairs_is_refused():
    water = MolecularGraph(("O", "H", "H"), ((0, 1), (0, 2)))
    with pytest.raises(InputError, match="three bonds"):
        operator_pairs(water, [1])


@pytest.mark.parametrize(("elements", "bonds"), [((), ()), (("C",), ((0, 0),)), (("C", "H"), ((0, 2),))])
def test_bad_graphs(elements, bonds):
    with pytest.raises(InputError):
        MolecularGraph(elements, bonds)


def test_hash_sees_elements_bonds_and_order():
    a = MolecularGraph(("C", "H"), ((0, 1),)).bonds_hash()
    assert a == MolecularGraph(("C", "H"), ((1, 0),), ("X", "Y")).bonds_hash()
    assert a != MolecularGraph(("H", "C"), ((0, 1),)).bonds_hash()
    assert a != MolecularGraph(("C", "H"), ()).bonds_hash()


def test_rotatable_bonds():
    axis, moved = rotatable_bonds(ETHANE)
    assert axis.tolist() == [[0, 1]]
    assert np.flatnonzero(moved[0]).tolist() == [1, 5, 6, 7]


@pytest.mark.parametrize(
    ("elements", "bonds", "expected"),
    [
        ("CCC", ((0, 1), (1, 2), (0, 2)), []),  # a ring cannot turn
        ("CCCCO", ((0, 1), (1, 2), (0, 2), (2, 3), (3, 4)), [[2, 3]]),  # its substituent can
        ("OHH", ((0, 1), (0, 2)), []),  # an end atom has nothing to turn
        ("HOOHHOOH", ((0, 1), (1, 2), (2, 3), (4, 5), (5, 6), (6, 7)), [[1, 2], [5, 6]]),  # two molecules
    ],
)
def test_where_nothing_turns(elements, bonds, expected):
    axis, moved = rotatable_bonds(MolecularGraph(tuple(elements), bonds))
    assert axis.tolist() == expected
    assert moved.shape == (len(expected), len(elements))
    for (i, j), m in zip(axis, moved, strict=True):
        assert m[j]
        assert not m[i]
