"""Frames and operators for the bridge, from what users have.

Two end-state Systems and trajectories; a window run's folder; a ``u_nk`` table and trajectories; arrays.
Each function returns the same :class:`BridgeInputs`. Trajectories are read part by part, so that a
solvated system fits into memory: O is evaluated on all atoms, and of the frames only the atoms that
the bridge looks at are kept.
"""

import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np

from .alchemy import EndStatePair
from .analysis import count_frames, iterate_trajectory
from .constants import U_NK_FILE
from .errors import IncompatibleSystemError, InputError
from .estimate import read_table, state_operators
from .runs import TOPOLOGY_FILE
from .systems import FloatArray, describe, massless_atoms, virtual_sites
from .units import thermal_energy

MOST_KEPT = 150
"""Atoms of a frame that are kept: those that come closest to the noised ones."""

MOST_NOISED = 60
"""Without the Systems nothing says which atoms change: of larger molecules the caller must."""

Evaluate = Callable[[FloatArray, FloatArray | None], FloatArray]
Progress = Callable[[int, int], None]
Trajectory = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class BridgeInputs:
    """What :func:`~openmm_diffforce.bridge.noisy_operator_bridge` takes.

    Attributes
    ----------
    frames : tuple of numpy.ndarray, each (n_frames, n_kept, 3) or (n_frames, n_coordinates)
        Of every state in time order [nm], each atom in the image nearest to the noised ones.
    operators : tuple of numpy.ndarray, each of shape (n_frames,)
        O = u_1 - u_0 on them [kT].
    lams : tuple of float
    atoms : tuple of int
        Noised atoms, as indices into the kept ones.
    temperature : float
        [K].
    noised : tuple of str
        Their names, for people.
    n_atoms : int
        Of the whole system.
    files : dict
        name -> path of what was read.
    """

    frames: tuple[FloatArray, ...]
    operators: tuple[FloatArray, ...]
    lams: tuple[float, ...]
    atoms: tuple[int, ...]
    temperature: float
    noised: tuple[str, ...]
    n_atoms: int
    files: dict[str, Path]


# ------------------------------------------------------------------------------ what is noised


def noised_atoms(pair: EndStatePair) -> tuple[int, ...]:
    """Atoms to noise by default: those that O sees, if they have a mass and no constraint.

    Raises
    ------
    InputError
        If none is left, or the Systems do not say which atoms change.

    Examples
    --------
    >>> from openmm_diffforce.alanine import alanine_case
    >>> noised_atoms(alanine_case("F1").pair)
    (10, 11)
    """
    try:
        seen = pair.changed_atoms
    except IncompatibleSystemError as err:
        raise InputError(f"atoms: expected the atoms that change, to noise them; {err}") from err
    fixed = {*pair.constrained_atoms, *virtual_sites(pair.system_0), *massless_atoms(pair.system_0)}
    free = tuple(a for a in seen if a not in fixed)
    if not free:
        raise InputError(
            f"atoms: expected an unconstrained atom with a mass among those that change, {list(seen)}, "
            "found none; name atoms to noise (constrained ones too, then what the length of their "
            "constraint says is lost), or sample without constraints."
        )
    return free


def _check_atoms(atoms: Sequence[int], n_atoms: int) -> tuple[int, ...]:
    found = tuple(int(a) for a in atoms)
    if not found or len(set(found)) != len(found) or min(found) < 0 or max(found) >= n_atoms:
        raise InputError(f"atoms: expected different indices from 0 to {n_atoms - 1}, found {list(found)}.")
    return found


def _is_solvent(residue: Any) -> bool:
    return bool(residue.is_water) or residue.n_atoms == 1


def nearest_images(
    x: FloatArray, box: FloatArray, atoms: Sequence[int], kept: Sequence[int] | None = None
) -> FloatArray:
    """Every atom in the periodic image nearest to the centre of some, molecules cut at the box or not.

    Parameters
    ----------
    x : numpy.ndarray, shape (n_frames, n_atoms, 3)
        [nm].
    box : numpy.ndarray, shape (n_frames, 3, 3)
        Box vectors as rows, in OpenMM's reduced form [nm].
    atoms : sequence of int
        Their centre is the place to look from.
    kept : sequence of int, optional
        Atoms of the result, in this order; all by default.

    Raises
    ------
    InputError
        If ``atoms`` lie further apart than a quarter of the box's width.

    Notes
    -----
    One fixed representative of each periodic configuration: noise on it is as good a kernel in one
    state as in the other. Distances are those of the nearest image up to half the width of the box.

    Examples
    --------
    >>> x = np.array([[[0.1, 0.0, 0.0], [2.9, 0.0, 0.0]]])
    >>> nearest_images(x, 3 * np.eye(3)[None], [0])[0, 1].round(6).tolist()
    [-0.1, 0.0, 0.0]
    """
    first = x[:, [atoms[0]]]
    own = first + _minimum_image(x[:, list(atoms)] - first, box)
    centre = own.mean(axis=1, keepdims=True)
    width = np.min([box[:, k, k].min() for k in range(3)])
    if np.abs(own - centre).max() > 0.25 * width:
        raise InputError(
            f"atoms: expected noised atoms that lie within a quarter of the box ({0.25 * width:.2f} nm) of "
            "their centre, found them further apart; noise the atoms of one molecule."
        )
    chosen = x if kept is None else x[:, list(kept)]
    return np.asarray(centre + _minimum_image(chosen - centre, box))


def _minimum_image(d: FloatArray, box: FloatArray) -> FloatArray:
    out = d.copy()
    for k in (2, 1, 0):
        a = box[:, None, k]
        out -= np.round(out[..., [k]] / a[..., [k]]) * a
    return out


# ----------------------------------------------------------------------------- reading frames


class _Reader:
    """Reads the frames of all states; the atoms to keep are found in the first part."""

    def __init__(
        self,
        topology: Any,
        atoms: tuple[int, ...],
        *,
        skip: int,
        stride: int,
        evaluate: Evaluate | None = None,
        periodic: bool | None = None,
    ) -> None:
        self.topology, self.atoms, self.skip, self.stride = topology, atoms, skip, stride
        self.evaluate, self.periodic = evaluate, periodic
        self.kept: list[int] | None = None

    def state(self, paths: Sequence[Path], count: Callable[[int], None]) -> tuple[FloatArray, FloatArray]:
        """Kept atoms of the chosen frames of one run, and O on them (empty without ``evaluate``)."""
        frames, operators, n = [], [np.zeros(0)], 0
        for path, part in ((p, part) for p in paths for part in iterate_trajectory(p, self.topology)):
            index = np.arange(n, n + part.n_frames)
            chosen = part[(index >= self.skip) & ((index - self.skip) % self.stride == 0)]
            n += part.n_frames
            if chosen.n_frames:
                x = np.asarray(chosen.xyz, dtype=np.float64)
                if not np.isfinite(x).all():
                    raise InputError(
                        f"{path}: expected finite coordinates, found some that are not; look for the step "
                        "at which the run blew up."
                    )
                box = self._box(chosen, path)
                if self.evaluate is not None:
                    operators.append(self.evaluate(x, box))
                frames.append(self._keep(x, box))
            count(part.n_frames)
        if not frames:
            raise InputError(
                f"{paths[0]}: expected frames after the {self.skip} that are skipped, found {n} in all."
            )
        return np.concatenate(frames), np.concatenate(operators)

    def _box(self, part: Any, path: Path) -> FloatArray | None:
        box = part.unitcell_vectors
        if self.periodic is False or (self.periodic is None and box is None):
            return None
        if box is None or not np.isfinite(box).all() or (np.linalg.det(box) <= 0).any():
            raise InputError(
                f"{path}: expected box vectors with every frame of a periodic System, found none; write the "
                "trajectory with its box."
            )
        return np.asarray(box, dtype=np.float64)

    def _keep(self, x: FloatArray, box: FloatArray | None) -> FloatArray:
        if self.kept is None:
            near = x if box is None else nearest_images(x, box, self.atoms)
            self.kept = self._closest(near)
        if box is None:
            return x[:, self.kept]
        return nearest_images(x, box, self.atoms, self.kept)

    def _closest(self, x: FloatArray) -> list[int]:
        """The noised atoms, and of the rest those that come closest; solvent molecules have no names."""
        solvent = {
            a.index for r in self.topology.residues if _is_solvent(r) for a in r.atoms
        } - set(self.atoms)  # fmt: skip
        others = [a for a in range(x.shape[1]) if a not in solvent and a not in set(self.atoms)]
        if len(others) + len(self.atoms) > MOST_KEPT:
            least = np.full(len(others), np.inf)
            for a in self.atoms:
                d = np.linalg.norm(x[:, others] - x[:, [a]], axis=-1)
                least = np.minimum(least, d.min(axis=0))
            order = np.argsort(least, kind="stable")[: max(1, MOST_KEPT - len(self.atoms))]
            others = [others[k] for k in order]
        return sorted([*others, *self.atoms])

    def inputs(self, **rest: Any) -> BridgeInputs:
        assert self.kept is not None  # a state was read
        place = {a: k for k, a in enumerate(self.kept)}
        return BridgeInputs(
            atoms=tuple(place[a] for a in self.atoms),
            noised=tuple(str(self.topology.atom(a)) for a in self.atoms),
            n_atoms=self.topology.n_atoms,
            **rest,
        )


def _check_counts(skip: int, stride: int) -> None:
    for name, number, least in (("skip", skip, 0), ("stride", stride, 1)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise InputError(f"{name}: expected an integer of at least {least}, found {number!r}.")


def _counter(segments: Sequence[Sequence[Path]], progress: Progress | None) -> Callable[[int], None]:
    if progress is None:
        return lambda n: None
    total, done = sum(count_frames(p) for paths in segments for p in paths), 0
    report = progress

    def count(n: int) -> None:
        nonlocal done
        done += n
        report(done, max(total, done))

    return count


def _check_trajectories(trajectories: Sequence[Trajectory], n_states: int, of: str) -> list[list[Path]]:
    """Files of every state: one, or the segments of one run."""
    found = [[Path(t)] if isinstance(t, str | os.PathLike) else [Path(p) for p in t] for t in trajectories]
    if len(found) != n_states:
        raise InputError(f"trajectories: expected one for each of {n_states} states{of}, found {len(found)}.")
    for k, paths in enumerate(found):
        if not paths:
            raise InputError(
                f"trajectories: expected a file or a list of segments for state {k}, found none."
            )
        for path in paths:
            if not path.is_file():
                raise InputError(f"{path}: expected a trajectory, found no such file.")
    return found


def _named(segments: Sequence[Sequence[Path]]) -> dict[str, Path]:
    return {
        f"state {k}: {p.name}" + (f" ({i + 1})" if len(paths) > 1 else ""): p
        for k, paths in enumerate(segments)
        for i, p in enumerate(paths)
    }


def inputs_from_systems(
    pair: EndStatePair,
    trajectories: Sequence[Trajectory],
    *,
    lams: Sequence[float] = (0.0, 1.0),
    topology: str | os.PathLike[str] | None = None,
    atoms: Sequence[int] | None = None,
    skip: int = 0,
    stride: int = 1,
    progress: Progress | None = None,
) -> BridgeInputs:
    """Inputs from two end-state Systems and one trajectory per state.

    Parameters
    ----------
    pair : EndStatePair
    trajectories : sequence of path-like, or of sequences of them
        What mdtraj reads (DCD, XTC, PDB, HDF5), in the order of ``lams``; a state may have several
        segments of one run.
    lams : sequence of float
        Lambda of every trajectory: 0, 1 and windows of linear mixing between them.
    topology : path-like, optional
        PDB file; by default the pair's topology.
    atoms : sequence of int, optional
        Atoms to noise; :func:`noised_atoms` by default.
    skip, stride : int
        Frames to leave out at the start of every trajectory, and the step between those taken.
    progress : callable, optional
        Called as (frames done, frames in all).

    Returns
    -------
    BridgeInputs

    Raises
    ------
    InputError
        For files that cannot be read or do not belong to the Systems, a periodic trajectory without
        its box, or Systems that leave no atom to noise.

    Notes
    -----
    XTC rounds coordinates to 0.001 nm, which O sees: prefer DCD. Frames of a periodic System are
    evaluated in their own box.
    """
    _check_counts(skip, stride)
    paths = _check_trajectories(trajectories, len(lams), "")
    read_from = md.Topology.from_openmm(pair.topology) if topology is None else _topology(Path(topology))
    if read_from.n_atoms != pair.n_atoms:
        raise InputError(
            f"{topology}: expected the {pair.n_atoms} atoms of the Systems, found {read_from.n_atoms}."
        )
    chosen = noised_atoms(pair) if atoms is None else _check_atoms(atoms, pair.n_atoms)
    reader = _Reader(
        read_from, chosen, skip=skip, stride=stride, periodic=describe(pair.system_0).periodic,
        evaluate=lambda x, box: pair.operator_values(x, box=box),
    )  # fmt: skip
    count = _counter(paths, progress)
    found = [reader.state(segments, count) for segments in paths]
    files = _named(paths) | ({} if topology is None else {"topology": Path(topology)})
    return reader.inputs(
        frames=tuple(f[0] for f in found), operators=tuple(f[1] for f in found),
        lams=tuple(float(v) for v in lams), temperature=pair.temperature, files=files,
    )  # fmt: skip


def _topology(path: Path) -> Any:
    try:
        return md.load_topology(os.fspath(path))
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, IndexError) as err:
        raise InputError(f"{path}: expected a topology that mdtraj reads, found {err}.") from err


def inputs_from_table(
    u_nk: str | os.PathLike[str],
    trajectories: Sequence[Trajectory],
    topology: str | os.PathLike[str],
    *,
    atoms: Sequence[int] | None = None,
    skip: int = 0,
    stride: int = 1,
    progress: Progress | None = None,
) -> BridgeInputs:
    """Inputs from a ``u_nk`` table of two end states (or windows) and their trajectories.

    Parameters
    ----------
    u_nk : path-like
        Parquet file in alchemlyb's standard form; states that mix linearly.
    trajectories : sequence of path-like
        One per sampled state, in the order of rising lambda; a frame for every row.
    topology : path-like
        PDB file.
    atoms, skip, stride, progress
        As for :func:`inputs_from_systems`; all atoms by default, which small molecules bear.

    Returns
    -------
    BridgeInputs

    Raises
    ------
    InputError
        If rows and frames differ in number, the states do not mix linearly, or a large system comes
        without ``atoms``.
    """
    _check_counts(skip, stride)
    table = state_operators(read_table(u_nk))
    paths = _check_trajectories(trajectories, len(table.lams), f" of {u_nk}")
    read_from = _topology(Path(topology))
    if atoms is None and read_from.n_atoms > MOST_NOISED:
        raise InputError(
            f"atoms: expected the atoms that change, to noise them; found none named, and {topology} has "
            f"{read_from.n_atoms} atoms; name them."
        )
    chosen = _check_atoms(range(read_from.n_atoms) if atoms is None else atoms, read_from.n_atoms)
    reader = _Reader(read_from, chosen, skip=skip, stride=stride)
    count = _counter(paths, progress)
    frames, operators = [], []
    for segments, lam, o in zip(paths, table.lams, table.operators, strict=True):
        x = reader.state(segments, count)[0]
        taken = o[skip::stride]
        if len(x) != len(taken):
            raise InputError(
                f"{segments[0]}: expected a frame for each of the {len(o)} rows of {u_nk} at lambda "
                f"{lam:.4g}, found {len(x)} frames where {len(taken)} rows are taken (skip {skip}, "
                f"stride {stride})."
            )
        frames.append(x)
        operators.append(taken)
    files = {"u_nk": Path(u_nk), "topology": Path(topology), **_named(paths)}
    return reader.inputs(
        frames=tuple(frames), operators=tuple(operators), lams=tuple(table.lams.tolist()),
        temperature=table.temperature, files=files,
    )  # fmt: skip


def inputs_from_run(
    folder: str | os.PathLike[str],
    *,
    atoms: Sequence[int] | None = None,
    skip: int = 0,
    stride: int = 1,
    progress: Progress | None = None,
) -> BridgeInputs:
    """Inputs from the folder that a run of lambda windows left.

    Its first and last window are the end states; those between make the bridge composite.

    Parameters
    ----------
    folder : path-like
        Of ``run_windows``, ``run_replica_exchange`` or ``run_expanded_ensemble``.
    atoms, skip, stride, progress
        As for :func:`inputs_from_table`.

    Raises
    ------
    InputError
        If it holds no finished run with trajectories.
    """
    folder = Path(folder)
    if not (folder / U_NK_FILE).is_file():
        raise InputError(f"{folder}: expected a finished run of lambda windows, found no {U_NK_FILE}.")
    paths: list[Path] = []
    for name in ("window", "state"):
        paths = paths or sorted(p for s in ("dcd", "xtc") for p in folder.glob(f"{name}_???.{s}"))
    if not paths:
        raise InputError(
            f"{folder}: expected trajectories of the windows, found none; run them with trajectory: dcd."
        )
    return inputs_from_table(
        folder / U_NK_FILE, paths, folder / TOPOLOGY_FILE, atoms=atoms, skip=skip, stride=stride,
        progress=progress,
    )  # fmt: skip


def inputs_from_arrays(
    path: str | os.PathLike[str],
    *,
    temperature: float = 300.0,
    atoms: Sequence[int] | None = None,
    skip: int = 0,
    stride: int = 1,
) -> BridgeInputs:
    """Inputs from one ``.npz`` file.

    Parameters
    ----------
    path : path-like
        With ``x_0``, ``x_1`` (frames [nm], molecules whole; or any coordinates of shape (n_frames, n))
        and ``o_0``, ``o_1`` (O = u_1 - u_0 on them [kT]); for windows ``x_2``, ``o_2``, ... and ``lams``
        of all states. ``atoms`` (to noise) and ``temperature`` [K] may be in it too.
    temperature : float
        [K]; only to convert units.
    atoms, skip, stride
        As for :func:`inputs_from_systems`; all atoms by default.

    Raises
    ------
    InputError
        If an array is missing, or frames and operators differ in number.
    """
    _check_counts(skip, stride)
    path = Path(path)
    try:
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as data:
            found = {key: data[key] for key in data.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as err:
        raise InputError(f"{path}: expected a .npz file of arrays, found {err}.") from err
    n = sum(1 for _ in _states(found))
    missing = [f"{a}_{k}" for k in range(max(n, 2)) for a in "xo" if f"{a}_{k}" not in found]
    if n > 2 and "lams" not in found:
        missing.append("lams")
    if missing:
        raise InputError(
            f"{path}: expected the arrays {', '.join(missing)}, found {', '.join(sorted(found)) or 'none'}."
        )
    lams = np.atleast_1d(found.get("lams", np.array([0.0, 1.0])))
    if len(lams) != n:
        raise InputError(f"{path}: expected a lambda for each of {n} states, found {len(lams)} in lams.")
    frames, operators = [], []
    for k in np.argsort(lams, kind="stable"):
        x, o = found[f"x_{k}"], found[f"o_{k}"]
        if o.ndim != 1 or len(o) != len(x):
            raise InputError(
                f"{path}: expected one value of o_{k} for each of {len(x)} frames of x_{k}, found shape "
                f"{o.shape}."
            )
        frames.append(np.asarray(x, dtype=np.float64)[skip::stride])
        operators.append(np.asarray(o, dtype=np.float64)[skip::stride])
    if atoms is None and "atoms" in found:
        atoms = [int(a) for a in np.atleast_1d(found["atoms"])]
    if "temperature" in found:
        temperature = float(found["temperature"])
    thermal_energy(temperature)
    if frames[0].ndim < 2:
        raise InputError(f"{path}: expected x_0 of shape (n_frames, n_atoms, 3), found {frames[0].shape}.")
    n_atoms = frames[0].shape[1]
    chosen = _check_atoms(range(n_atoms) if atoms is None else atoms, n_atoms)
    what = "atom" if frames[0].ndim == 3 else "coordinate"
    return BridgeInputs(
        frames=tuple(frames), operators=tuple(operators), lams=tuple(np.sort(lams).tolist()), atoms=chosen,
        temperature=temperature, noised=tuple(f"{what} {a}" for a in chosen), n_atoms=n_atoms,
        files={path.name: path},
    )  # fmt: skip


def _states(found: dict[str, Any]) -> Iterator[int]:
    k = 0
    while f"x_{k}" in found or f"o_{k}" in found:
        yield k
        k += 1


__all__ = [
    "BridgeInputs",
    "inputs_from_arrays",
    "inputs_from_run",
    "inputs_from_systems",
    "inputs_from_table",
    "nearest_images",
    "noised_atoms",
]
