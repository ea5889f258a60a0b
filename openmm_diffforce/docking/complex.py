r"""Protein complexes at the level of residues: what the docking scores look at.

A :class:`Complex` is a receptor that stays and a ligand that moves as a rigid body. Every residue keeps
its type and its N, C-alpha, C and C-beta; heavy atoms are kept too, for metrics and for writing files.
Lengths are in nm.
"""

import gzip
import itertools
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

RESIDUES = (
    "ALA", "ARG", "ASN", "ASP", "CYS", "GLN", "GLU", "GLY", "HIS", "ILE",
    "LEU", "LYS", "MET", "PHE", "PRO", "SER", "THR", "TRP", "TYR", "VAL",
)  # fmt: skip
"""Residue types in the order of their index."""

ALIASES = {
    "MSE": "MET", "HID": "HIS", "HIE": "HIS", "HIP": "HIS", "HSD": "HIS", "HSE": "HIS", "HSP": "HIS",
    "CYX": "CYS", "CYM": "CYS", "SEC": "CYS", "ASH": "ASP", "GLH": "GLU", "LYN": "LYS",
}  # fmt: skip
"""Other names of a residue type."""

RENAMED = {("MSE", "SE"): "SD", ("SEC", "SE"): "SG"}
"""Atoms of those that are another element in the type they are taken for."""

BACKBONE = frozenset({"N", "CA", "C", "O", "OXT"})
"""Heavy atoms that are no side chain."""

SIDE_CHAIN_ATOMS = np.array([1, 7, 4, 4, 2, 5, 5, 0, 6, 4, 4, 5, 4, 7, 3, 2, 3, 10, 8, 3])
"""Heavy atoms of a whole side chain, by residue type."""

SITES = ("N", "CA", "C", "CB")
"""Atoms of ``Partner.sites``."""

SPHERE = 1.3
"""Radius of the half sphere of the burial [nm]."""

INTERFACE = 1.0
"""C-beta distance [nm] below which two residues of the partners are at the interface."""

_INDEX = {name: k for k, name in enumerate(RESIDUES)}


@dataclass(frozen=True)
class Partner:
    """One rigid body: the residues of a receptor or of a ligand.

    Attributes
    ----------
    types : numpy.ndarray of int, shape (n_residues,)
        Index into :data:`RESIDUES`.
    sites : numpy.ndarray, shape (n_residues, 4, 3)
        N, C-alpha, C, C-beta [nm]; a C-beta that is missing (glycine) is placed by the backbone.
    labels : tuple of str
        ``chain:number`` of every residue.
    atoms : numpy.ndarray, shape (n_atoms, 3)
        Heavy atoms [nm].
    atom_names, atom_residues : tuple of str, numpy.ndarray of int, shape (n_atoms,)
        Name of every heavy atom, and the residue it belongs to.
    notes : tuple of str
        What was left out or mended on reading.
    """

    types: IntArray
    sites: FloatArray
    labels: tuple[str, ...]
    atoms: FloatArray
    atom_names: tuple[str, ...]
    atom_residues: IntArray
    notes: tuple[str, ...] = ()

    @property
    def n_residues(self) -> int:
        """Number of residues."""
        return len(self.types)

    @property
    def ca(self) -> FloatArray:
        """C-alpha positions [nm], shape (n_residues, 3)."""
        return self.sites[:, 1]

    @property
    def centre(self) -> FloatArray:
        """Mean of the C-alpha [nm]: the point about which a rigid body is turned."""
        return self.ca.mean(axis=0)

    @cached_property
    def directions(self) -> FloatArray:
        """Unit vectors from C-alpha to C-beta, shape (n_residues, 3); zero where both are one point."""
        ray = self.sites[:, 3] - self.ca
        return ray / np.maximum(np.linalg.norm(ray, axis=1, keepdims=True), 1e-9)

    @cached_property
    def burial(self) -> FloatArray:
        """C-alpha within :data:`SPHERE` of each residue's, on the side of its C-beta, shape (n_residues,)."""
        away = self.ca - self.ca[:, None]
        distance = np.linalg.norm(away, axis=2)
        above = np.einsum("ijk,ik->ij", away, self.directions) > 0
        return np.asarray((above & (distance < SPHERE)).sum(axis=1), dtype=np.float64)

    @cached_property
    def side_chains(self) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
        """Mean of every side chain's heavy atoms [nm], shape (n_residues, 3), and which ones are whole.

        Means of no atoms are zero; a glycine, which has none, is not whole.
        """
        side = np.array([name not in BACKBONE for name in self.atom_names])
        owner = self.atom_residues[side]
        n = np.bincount(owner, minlength=self.n_residues)
        total = [np.bincount(owner, self.atoms[side, k], minlength=self.n_residues) for k in range(3)]
        whole = (n > 0) & (n >= SIDE_CHAIN_ATOMS[self.types])
        return np.stack(total, axis=1) / np.maximum(n, 1)[:, None], whole

    def moved(self, rotation: FloatArray, translation: FloatArray) -> "Partner":
        """The same partner at R (x - c) + c + tau."""
        c = self.centre

        def move(x: FloatArray) -> FloatArray:
            return (x - c) @ rotation.T + c + translation

        return Partner(
            self.types, move(self.sites), self.labels, move(self.atoms), self.atom_names,
            self.atom_residues, self.notes,
        )  # fmt: skip


@dataclass(frozen=True)
class Complex:
    """Receptor and ligand in one frame; the ligand's coordinates are pose zero.

    Attributes
    ----------
    name : str
    receptor, ligand : Partner
    native : bool
        Whether the ligand's coordinates are the known complex, so that RMSD to it means something.
    """

    name: str
    receptor: Partner
    ligand: Partner
    native: bool = True
    notes: tuple[str, ...] = field(default=())


def place_cb(n: FloatArray, ca: FloatArray, c: FloatArray) -> FloatArray:
    """C-beta of an ideal L-amino acid from its backbone, arrays [..., 3] in nm.

    Examples
    --------
    >>> import numpy as np
    >>> n, ca, c = np.array([[0.1458, 0, 0], [0, 0, 0], [-0.0551, 0.142, 0]])
    >>> round(float(np.linalg.norm(place_cb(n, ca, c) - ca)), 3)
    0.153
    """
    b, v = ca - n, c - ca
    # Coefficients for Angstrom; the cross product carries a square of the length.
    return ca - 5.8273431 * np.cross(b, v) + 0.56802827 * b - 0.54067466 * v


def _pdb_lines(path: Path) -> list[str]:
    try:
        opener: Any = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="ascii", errors="replace") as handle:
            return list(handle)
    except (OSError, EOFError, zlib.error) as err:
        raise InputError(f"{path}: expected a readable PDB file, found {err}.") from err


Atom = tuple[str, str, str, str, tuple[float, float, float]]
"""Chain, residue id, residue name, atom name, position [nm]."""


def pdb_models(path: Path) -> list[list[Atom]]:
    """Heavy protein atoms of every model of a PDB file.

    Of alternate locations the first that a residue names is kept.

    Raises
    ------
    InputError
        If the file cannot be read, holds no protein, or a coordinate is not a finite number.
    """
    models: list[list[Atom]] = [[]]
    chosen: dict[tuple[str, str], str] = {}
    for number, line in enumerate(_pdb_lines(path), 1):
        if line.startswith("ENDMDL"):
            models.append([])
            chosen.clear()
        name = line[17:20].strip()
        if not (line.startswith("ATOM") or (line.startswith("HETATM") and name in ALIASES)):
            continue
        atom, element = line[12:16].strip(), line[76:78].strip()
        if element in ("H", "D") or (not element and atom.lstrip("0123456789").startswith(("H", "D"))):
            continue
        chain, residue = line[21].strip() or "_", line[22:27].strip()
        if line[16] != " " and chosen.setdefault((chain, residue), line[16]) != line[16]:
            continue
        try:
            x, y, z = (float(line[k : k + 8]) / 10.0 for k in (30, 38, 46))
        except ValueError as err:
            raise InputError(f"{path}, line {number}: expected three coordinates, found {err}.") from err
        if not np.isfinite((x, y, z)).all():
            raise InputError(f"{path}, line {number}: expected finite coordinates, found {x, y, z}.")
        models[-1].append((chain, residue, name, atom, (x, y, z)))
    if not (found := [m for m in models if m]):
        raise InputError(f"{path}: expected ATOM records of a protein, found none.")
    return found


def _topology_atoms(trajectory: Any) -> list[Atom]:
    """The same from the first frame of an mdtraj Trajectory."""
    found: list[Atom] = []
    for atom, xyz in zip(trajectory.topology.atoms, trajectory.xyz[0], strict=True):
        if atom.element is not None and atom.element.symbol in ("H", "D", "VS"):
            continue
        residue = atom.residue
        chain = getattr(residue.chain, "chain_id", None) or chr(ord("A") + residue.chain.index % 26)
        if residue.name in _INDEX or residue.name in ALIASES:
            x, y, z = (float(v) for v in xyz)
            found.append((chain, str(residue.resSeq), residue.name, atom.name, (x, y, z)))
    if not found:
        raise InputError("trajectory: expected a protein, found no amino acid.")
    return found


def _partner(atoms: Sequence[Atom], where: str) -> Partner:
    types: list[int] = []
    sites: list[list[FloatArray]] = []
    labels: list[str] = []
    kept: list[tuple[float, float, float]] = []
    names: list[str] = []
    owners: list[int] = []
    notes: list[str] = []
    seen: set[str] = set()
    unknown: dict[str, int] = {}
    without_ca = bare = 0
    for (chain, number, name), group in itertools.groupby(atoms, key=lambda a: a[:3]):
        label, members = f"{chain}:{number}", {RENAMED.get((name, a[3]), a[3]): a[4] for a in group}
        if label in seen:
            raise InputError(
                f"{where}: expected every residue id once, found {label} again ({name}); give "
                "chains that were merged under one letter letters of their own, or renumber them."
            )
        seen.add(label)
        kind = _INDEX.get(ALIASES.get(name, name))
        if kind is None:
            unknown[name] = unknown.get(name, 0) + 1
            continue
        if "CA" not in members:
            without_ca += 1
            continue
        at = {k: np.array(v) for k, v in members.items()}
        ca = at["CA"]
        whole = "N" in at and "C" in at
        cb = at.get("CB")
        if cb is None:
            cb = place_cb(at["N"], ca, at["C"]) if whole else ca
            bare += not whole
        sites.append([at.get("N", ca), ca, at.get("C", ca), cb])
        for atom, xyz in members.items():
            kept.append(xyz)
            names.append(atom)
            owners.append(len(types))
        types.append(kind)
        labels.append(label)
    if not types:
        raise InputError(
            f"{where}: expected residues with a C-alpha, found none in {len(seen)} residues; the file "
            "must hold a protein with at least its backbone."
        )
    if unknown:
        notes.append(f"{where}: left out {', '.join(f'{v} {k}' for k, v in unknown.items())}")
    if without_ca:
        notes.append(f"{where}: left out {without_ca} residues without a C-alpha")
    if bare:
        notes.append(
            f"{where}: {bare} residues have neither C-beta nor N and C to place it; it is put at the "
            "C-alpha, and native contacts and DockQ, which count heavy atoms, mean little"
        )
    found = Partner(
        np.array(types), np.array(sites, dtype=np.float64), tuple(labels), np.array(kept, dtype=np.float64),
        tuple(names), np.array(owners),
    )  # fmt: skip
    cut = ~found.side_chains[1] & (SIDE_CHAIN_ATOMS[found.types] > 0)
    if cut.any():
        notes.append(
            f"{where}: {cut.sum()} of {len(cut)} side chains lack atoms; the mean places of their types "
            "are taken for their centres"
        )
    return replace(found, notes=tuple(notes))


def structure_name(path: str | os.PathLike[str]) -> str:
    """Name of a structure: that of its file without .pdb, .ent and .gz.

    Examples
    --------
    >>> structure_name("data/1ABC.b.pdb.gz")
    '1ABC.b'
    """
    name = Path(path).name
    for ending in (".gz", ".pdb", ".ent"):
        name = name.removesuffix(ending)
    return name


def _atoms_of(source: Any) -> tuple[list[Atom], str]:
    if hasattr(source, "topology") and hasattr(source, "xyz"):
        return _topology_atoms(source), "trajectory"
    path = Path(os.fspath(source))
    return pdb_models(path)[0], path.name


def _chosen(atoms: list[Atom], chains: str, where: str, role: str) -> list[Atom]:
    present = list(dict.fromkeys(a[0] for a in atoms))
    if not chains or (missing := [c for c in chains if c not in present]):
        raise InputError(
            f"{where}: expected chain{'s' if len(chains) > 1 else ''} "
            f"{', '.join(chains) or '(none given)'} for the {role}, found {', '.join(present)}; "
            "name chains that are there" + (f" (missing: {', '.join(missing)})." if chains else ".")
        )
    return [a for a in atoms if a[0] in chains]


def read_complex(
    source: Any,
    *,
    receptor: str = "A",
    ligand: str = "B",
    name: str | None = None,
) -> Complex:
    """Read a complex with both partners from one structure.

    Parameters
    ----------
    source : path-like or mdtraj.Trajectory
        PDB file (``.pdb``, ``.pdb.gz``; its first model), or the first frame of a trajectory.
    receptor, ligand : str
        Letters of their chains, e.g. ``"HL"`` and ``"A"``; a blank chain is ``"_"``.
    name : str, optional
        Otherwise the file's.

    Returns
    -------
    Complex
        With ``native=True``: its pose is the reference of every RMSD.

    Raises
    ------
    InputError
        If the file cannot be read; a chain is missing or belongs to both partners; a residue id
        appears twice; a partner has no C-alpha; or the partners do not touch (no two C-beta within
        1 nm).

    Notes
    -----
    Hydrogens and alternate locations other than a residue's first are left out; so are residues of an
    unknown name or without a C-alpha, and ``notes`` says which.
    """
    if both := sorted(set(receptor) & set(ligand)):
        raise InputError(
            f"chains: expected receptor and ligand without a common chain, found {', '.join(both)} in both "
            f"{receptor!r} and {ligand!r}."
        )
    atoms, where = _atoms_of(source)
    roles = {"receptor": receptor, "ligand": ligand}
    chosen = {role: _chosen(atoms, chains, where, role) for role, chains in roles.items()}
    parts = [_partner(some, f"{where}, {role}") for role, some in chosen.items()]
    found = Complex(
        name or structure_name(where), parts[0], parts[1], notes=parts[0].notes + parts[1].notes
    )  # fmt: skip
    check_interface(found)
    return found


def read_partners(receptor: Any, ligand: Any, *, name: str | None = None, native: bool = False) -> Complex:
    """Read receptor and ligand from two structures, each whole.

    Parameters
    ----------
    receptor, ligand : path-like or mdtraj.Trajectory
    name : str, optional
    native : bool
        Say so if the two files lie in the frame of their known complex; then they must touch.

    Returns
    -------
    Complex

    Raises
    ------
    InputError
        As :func:`read_complex`; chain letters may be the same in both files.
    """
    parts, names = [], []
    for source, role in ((receptor, "receptor"), (ligand, "ligand")):
        atoms, where = _atoms_of(source)
        parts.append(_partner(atoms, f"{where}, {role}"))
        names.append(structure_name(where))
    found = Complex(
        name or "-".join(names), parts[0], parts[1], native=native, notes=parts[0].notes + parts[1].notes
    )
    if native:
        check_interface(found)
    return found


def check_interface(complex_: Complex) -> int:
    """Number of residue pairs at the interface; none is an error.

    Raises
    ------
    InputError
        If no two C-beta of the partners are within 1 nm.
    """
    d = np.linalg.norm(
        complex_.receptor.sites[:, None, 3] - complex_.ligand.sites[None, :, 3], axis=-1
    )  # fmt: skip
    n_pairs = int(np.count_nonzero(d < INTERFACE))
    if not n_pairs:
        raise InputError(
            f"{complex_.name}: expected partners that touch, found an empty interface (no two C-beta within "
            f"{INTERFACE:g} nm; the closest are {d.min():.2f} nm apart); check the chains, or read the "
            "partners as two structures without a known complex."
        )
    return n_pairs


def pdb_text(partner: Partner, *, serial: int = 1) -> str:
    """ATOM records of a partner's heavy atoms.

    Raises
    ------
    InputError
        If a coordinate does not fit the columns of a PDB file.
    """
    lines = []
    for k, (xyz, atom, owner) in enumerate(
        zip(partner.atoms * 10.0, partner.atom_names, partner.atom_residues, strict=True), serial
    ):
        if not np.abs(xyz).max() < 1000.0:
            raise InputError(f"PDB file: expected coordinates below 100 nm, found {xyz / 10} nm.")
        chain, number = partner.labels[owner].split(":")
        residue = RESIDUES[partner.types[owner]]
        digits = number if number[-1].isalpha() else f"{number} "
        shown = atom if len(atom) == 4 else f" {atom:<3}"
        lines.append(
            f"ATOM  {k % 100000:5d} {shown:4s} {residue:3s} {'' if chain == '_' else chain:1s}{digits:>5s}   "
            f"{xyz[0]:8.3f}{xyz[1]:8.3f}{xyz[2]:8.3f}  1.00  0.00          {atom[0]:>2s}"
        )
    return "\n".join([*lines, "TER", ""])
