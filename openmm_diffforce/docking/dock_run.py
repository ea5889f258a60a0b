"""What ``diffforce dock-fit`` and ``diffforce dock-score`` do: files in, a folder with the results out."""

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..record import atomic_path, make_record, write_json
from .complex import Complex, FloatArray, Partner, pdb_models, pdb_text, read_complex, structure_name
from .decoys import make_decoys
from .learning import DockingFit, HeldOut, cross_validate, fit_docking_model, prepare_docking_data
from .metrics import least_rmsd, pose_metrics, quality, superposition
from .model_file import load_docking_model, save_docking_model
from .pages import LABELS, funnel_figure, write_docking_page
from .physics_score import PhysicsScore, physics_scores
from .poses import Poses
from .potentials import contact_count_score
from .residue_model import ResidueModel
from .scoring import MEASURES, Score, energy_head, measures_of, score_poses

Progress = Callable[[str, int, int], None]

N_BEST = 10
"""Poses that are written to best.pdb."""

LEARNED, COUNT, FORCE_FIELD = "learned energy [kT]", "contact count", "force field [kJ/mol]"


# ------------------------------------------------------------------------------------------- fit


def structure_files(folder: str | os.PathLike[str], names: Sequence[str] | None = None) -> list[Path]:
    """PDB files of a folder (``NAME.pdb`` or ``NAME.pdb.gz``), in the order of their names.

    Raises
    ------
    InputError
        If there is no such folder, it holds fewer than two structures, or one of ``names`` is missing.
    """
    where = Path(folder)
    found: dict[str, Path] = {}
    for path in sorted([*where.glob("*.pdb"), *where.glob("*.pdb.gz")]):
        if (name := structure_name(path)) in found:
            raise InputError(f"{where}: expected one file of each structure, found {found[name]} and {path}.")
        found[name] = path
    if names is not None and (missing := [n for n in names if n not in found]):
        raise InputError(f"{where}: expected a structure for each name, found none for {', '.join(missing)}.")
    chosen = list(found.values()) if names is None else [found[n] for n in names]
    if len(chosen) < 2:
        raise InputError(
            f"{where}: expected a folder with PDB files of at least two complexes, found {len(chosen)}."
        )
    return chosen


@dataclass(frozen=True)
class DockingFitRun:
    """What :func:`run_docking_fit` returns.

    Attributes
    ----------
    path : pathlib.Path
        The model's file.
    sha256 : str
    names : tuple of str
        Complexes it was fitted to.
    held_out : tuple of HeldOut
        :func:`~.learning.cross_validate`.
    notes : tuple of str
        What was left out or mended on reading.
    """

    path: Path
    sha256: str
    names: tuple[str, ...]
    held_out: tuple[HeldOut, ...]
    notes: tuple[str, ...]


def run_docking_fit(
    files: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    receptor: str = "A",
    ligand: str = "B",
    together: Sequence[str] = (),
    settings: DockingFit | None = None,
    seed: int = 1,
    progress: Progress | None = None,
) -> DockingFitRun:
    """Fit the residue model to complexes in files, and write it.

    Parameters
    ----------
    files : sequence of path-like
        Native complexes.
    out : path-like
        The model's file.
    receptor, ligand : str
        Chains, the same in all files.
    together : sequence of str
        Names of related complexes, left out together in the cross-validation.
    settings : DockingFit, optional
    seed : int
    progress : callable, optional

    Returns
    -------
    DockingFitRun

    Raises
    ------
    InputError
        If a structure cannot be used.
    """
    settings = settings or DockingFit()
    complexes = [read_complex(f, receptor=receptor, ligand=ligand) for f in files]
    names = [c.name for c in complexes]
    if unknown := sorted(set(together) - set(names)):
        raise InputError(f"together: expected names of complexes, found {', '.join(unknown)}.")
    data = prepare_docking_data(complexes, settings, seed=seed, progress=progress)
    clusters = [-1 if n in together else k for k, n in enumerate(names)]
    held_out = cross_validate(data, settings, clusters) if len(set(clusters)) > 1 else ()
    model = fit_docking_model(settings=settings, data=data, seed=seed)
    notes = tuple(note for c in complexes for note in c.notes)
    model.metadata["cross_validation"] = [vars(h) for h in held_out]
    model.metadata["notes"] = list(notes)
    digest = save_docking_model(model, out)
    return DockingFitRun(Path(out), digest, tuple(names), held_out, notes)


# ----------------------------------------------------------------------------------------- poses


MAX_RECEPTOR_RMSD = 0.2
"""A receptor in a file of poses that differs by more [nm] is another one."""


def _pdb_frames(path: Path) -> tuple[dict[str, int], FloatArray]:
    """C-alpha of every model of a PDB file: residue label -> column, and positions [n_models, n, 3]."""
    tables: list[dict[str, tuple[float, float, float]]] = []
    for k, model in enumerate(pdb_models(path), 1):
        table: dict[str, tuple[float, float, float]] = {}
        for chain, number, _, atom, xyz in model:
            if atom == "CA":
                if (label := f"{chain}:{number}") in table:
                    raise InputError(
                        f"{path}, model {k}: expected every residue id once, found {label} again; give "
                        "receptor and ligand chain letters of their own, here and in their structures."
                    )
                table[label] = xyz
        tables.append(table)
    for k, table in enumerate(tables, 1):
        if set(table) != set(tables[0]):
            raise InputError(
                f"{path}, model {k}: expected the {len(tables[0])} residues of the first model, found others."
            )
    labels = {label: k for k, label in enumerate(tables[0])}
    x = np.array([[table[label] for label in labels] for table in tables], dtype=np.float64)
    return labels, x


def _trajectory_frames(source: Any, topology: Any) -> tuple[dict[str, int], FloatArray]:
    """The same of a trajectory; mdtraj keeps no insertion codes."""
    import mdtraj

    try:
        frames = (
            mdtraj.load(os.fspath(source))
            if topology is None
            else mdtraj.load(os.fspath(source), top=os.fspath(topology))
        )
        atoms = [a for a in frames.topology.atoms if a.name == "CA"]
    except Exception as err:  # mdtraj's readers raise whatever their formats do
        raise InputError(
            f"{source}: expected a multi-model PDB file, or a trajectory with its topology (--topology), "
            f"found something else ({err})."
        ) from err
    labels: dict[str, int] = {}
    for k, atom in enumerate(atoms):
        chain = getattr(atom.residue.chain, "chain_id", None) or "_"
        label = f"{chain.strip() or '_'}:{atom.residue.resSeq}"
        if label in labels:
            raise InputError(f"{source}: expected every residue id once, found {label} again.")
        labels[label] = k
    x = np.asarray(frames.xyz[:, [a.index for a in atoms]], dtype=np.float64)
    if bad := np.flatnonzero(~np.isfinite(x).all(axis=(1, 2))).tolist():
        raise InputError(f"{source}, frame {bad[0]}: expected finite coordinates, found others.")
    return labels, x


def read_poses(
    source: str | os.PathLike[str], complex_: Complex, *, topology: str | os.PathLike[str] | None = None
) -> Poses:
    """Poses of the ligand from the frames of a structure file or trajectory.

    Parameters
    ----------
    source : path-like
        Multi-model PDB, or a trajectory that mdtraj reads.
    complex_ : Complex
    topology : path-like, optional
        PDB file of a trajectory's atoms.

    Returns
    -------
    Poses

    Raises
    ------
    InputError
        If the file cannot be read, lacks residues of the ligand, the ligand is not rigid in it, or its
        receptor is another one: less than half of the residues are in common, or their C-alpha differ
        by more than 0.2 nm (RMSD).

    Notes
    -----
    Residues are found by chain and number. Residues of the receptor in the frames are superposed on those
    of ``complex_``; without any, frames must be in its frame.
    """
    path = Path(source)
    is_pdb = topology is None and path.name.endswith((".pdb", ".pdb.gz", ".ent", ".ent.gz"))
    labels, frames = _pdb_frames(path) if is_pdb else _trajectory_frames(source, topology)
    ligand, receptor = complex_.ligand, complex_.receptor
    if lost := [n for n in ligand.labels if n not in labels]:
        raise InputError(
            f"{source}: expected C-alpha of all {ligand.n_residues} residues of the ligand "
            f"({ligand.labels[0]} to {ligand.labels[-1]}), found none for {len(lost)}, e.g. {lost[0]}."
        )
    x = frames[:, [labels[n] for n in ligand.labels]]
    # Partners of two files may share labels: those are the ligand's.
    common = [k for k, n in enumerate(receptor.labels) if n in labels and n not in ligand.labels]
    if common:
        if len(common) < max(3, receptor.n_residues / 2):
            raise InputError(
                f"{source}: expected the receptor's {receptor.n_residues} residues, or none of them, found "
                f"{len(common)}; leave the receptor out if the ligand is in the frame of the structures."
            )
        fixed = receptor.ca[common]
        there = frames[:, [labels[receptor.labels[m]] for m in common]]
        off = least_rmsd(there, fixed)
        if len(other := np.flatnonzero(off > MAX_RECEPTOR_RMSD)):
            raise InputError(
                f"{source}, pose {other[0]}: expected the receptor of {complex_.name}, found one that "
                f"differs by {off[other[0]]:.2f} nm (RMSD of C-alpha; at most {MAX_RECEPTOR_RMSD} nm)."
            )
        for k, frame in enumerate(there):
            rotation, shift = superposition(frame, fixed)
            x[k] = x[k] @ rotation.T + shift
    # A PDB file keeps three decimals of an Angstrom, XTC of a nanometre.
    try:
        return Poses.from_coordinates(ligand.ca, x, centre=ligand.centre, tolerance=0.01)
    except InputError as err:
        raise InputError(f"{source}: expected rigid poses of the ligand of {complex_.name}; {err}") from err


def pose_distances(partner: Partner, poses: Poses, to: Poses) -> FloatArray:
    """RMSD [nm] of the C-alpha in every pose from one pose, shape (n_poses,)."""
    x = partner.ca - partner.centre
    second = x.T @ x / len(x)
    turn = np.swapaxes(poses.rotation, 1, 2) @ to.rotation[0]
    square = 2 * (np.trace(second) - np.einsum("nij,ij->n", turn, second))
    return np.sqrt(np.maximum(square, 0.0) + ((poses.translation - to.translation) ** 2).sum(axis=1))


# ----------------------------------------------------------------------------------------- score


@dataclass(frozen=True)
class DockRun:
    """What :func:`run_docking` returns.

    Attributes
    ----------
    folder, page, table : pathlib.Path
        Everything, the HTML page, and the table of all poses.
    order : numpy.ndarray of int
        Poses from best to worst learned energy.
    scores : dict
        Name -> numpy.ndarray, shape (n_poses,).
    columns : dict
        Ligand RMSD, interface RMSD, native contacts and DockQ of every pose, where the complex is known.
    measures : dict
        Score -> how well it tells near-native poses apart, where there are poses of both kinds.
    """

    folder: Path
    page: Path
    table: Path
    order: Any
    scores: dict[str, FloatArray]
    columns: dict[str, FloatArray]
    measures: dict[str, dict[str, float]]


def run_docking(
    complex_: Complex,
    model: ResidueModel | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    poses: Poses | None = None,
    n_decoys: int = 200,
    seed: int = 1,
    physics: int = 0,
    near_rmsd: float = 0.5,
    inputs: Mapping[str, str | os.PathLike[str]] | None = None,
    progress: Progress | None = None,
) -> DockRun:
    """Score poses of one complex and write table, figure, page and the best poses.

    Parameters
    ----------
    complex_ : Complex
    model : ResidueModel or path-like
    out : path-like
        Folder, made if it is not there.
    poses : Poses, optional
        Decoys are made otherwise, which needs the native pose.
    n_decoys, seed : int
        Of the decoys.
    physics : int
        Number of poses, best learned energy first, that the force field scores too.
    near_rmsd : float
        [nm]
    inputs : mapping of str to path-like, optional
        Files that structures and poses came from; their SHA-256 goes into docking.json.
    progress : callable, optional

    Returns
    -------
    DockRun

    Raises
    ------
    InputError
        If there are no poses and none can be made, a number makes no sense, or the folder cannot be made.
    ModelError
        If the model cannot be loaded.
    """
    if not (isinstance(physics, int) and physics >= 0):
        raise InputError(f"physics: expected a number of poses >= 0, found {physics!r}.")
    loaded = model if isinstance(model, ResidueModel) else load_docking_model(model)
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise InputError(f"{folder}: expected a folder that can be made, found {err}.") from err
    made = poses is None
    if poses is None:
        poses = make_decoys(complex_, n_decoys, seed=seed).poses
    scores: dict[str, Score] = {LEARNED: energy_head(loaded), COUNT: contact_count_score}
    found: dict[str, FloatArray] = {}
    for k, (name, score) in enumerate(scores.items()):
        found |= score_poses(complex_, poses, {name: score}, seed=seed)
        if progress is not None:
            progress("scores", k + 1, len(scores))
    order = np.argsort(found[LEARNED], kind="stable")
    notes = list(complex_.notes)
    if physics:
        some = order[:physics]
        force_field = PhysicsScore(complex_)
        run = physics_scores(
            force_field, poses[some], path=folder / "force_field.json", progress=progress
        )  # fmt: skip
        found[FORCE_FIELD] = np.full(len(poses), np.nan)
        found[FORCE_FIELD][some] = run.values
        notes += force_field.notes
    columns: dict[str, FloatArray] = {}
    if complex_.native:
        m = pose_metrics(complex_, poses)
        columns = {
            "ligand RMSD [nm]": m.ligand_rmsd, "interface RMSD [nm]": m.interface_rmsd,
            "native contacts": m.fraction_native, "DockQ": m.dockq,
        }  # fmt: skip
    else:
        columns = {"RMSD to the best [nm]": pose_distances(complex_.ligand, poses, poses[order[:1]])}
    measures: dict[str, dict[str, float]] = {}
    if complex_.native:
        near = columns["ligand RMSD [nm]"] <= near_rmsd
        if near.any() and not near.all():
            measures = {
                n: measures_of(v, columns["ligand RMSD [nm]"], near)
                for n, v in found.items()
                if np.isfinite(v).all()
            }
    table = _write_table(folder / "scores.csv", order, found, columns)
    _write_best(folder / "best.pdb", complex_, poses[order[:N_BEST]], found[LEARNED][order[:N_BEST]])
    page = _write_page(
        folder / "report.html", complex_, loaded, order, found, columns, measures, notes, made, near_rmsd
    )
    record = make_record(
        "dock-score",
        {"complex": complex_.name, "receptor": chains_of(complex_.receptor),
         "ligand": chains_of(complex_.ligand), "native": complex_.native, "n_poses": len(poses),
         "poses": "decoys" if made else "given", "physics": physics, "near_rmsd": near_rmsd,
         "model_sha256": loaded.metadata.get("sha256")},
        seed=seed, files={**(inputs or {}), "scores": table, "best": folder / "best.pdb"},
    )  # fmt: skip
    write_json(folder / "docking.json", {**record, "measures": measures, "notes": notes})
    return DockRun(folder, page, table, order, found, columns, measures)


def chains_of(partner: Partner) -> str:
    """Chain letters of a partner, in the order of its residues."""
    return "".join(dict.fromkeys(label.split(":")[0] for label in partner.labels))


def _write_table(
    path: Path, order: Any, scores: dict[str, FloatArray], columns: dict[str, FloatArray]
) -> Path:
    with atomic_path(path) as part, open(part, "w", newline="", encoding="utf-8") as handle:
        rows = csv.writer(handle)
        rows.writerow(["pose", *scores, *columns])
        for k in order:
            values = [v[k] for v in (*scores.values(), *columns.values())]
            rows.writerow([int(k), *("" if np.isnan(v) else f"{v:.6g}" for v in values)])
    return path


def _write_best(path: Path, complex_: Complex, poses: Poses, energy: FloatArray) -> None:
    lines = []
    for k, pose in enumerate(poses):
        ligand = complex_.ligand.moved(pose.rotation[0], pose.translation[0])
        lines.append(f"MODEL     {k + 1:4d}\nREMARK 950 LEARNED ENERGY {energy[k]:.3f} KT\n")
        lines.append(pdb_text(complex_.receptor))
        lines.append(pdb_text(ligand, serial=len(complex_.receptor.atoms) + 2))
        lines.append("ENDMDL\n")
    with atomic_path(path) as part:
        part.write_text("".join([*lines, "END\n"]), encoding="ascii")


def _found(share: float) -> str:
    """Whether a near-native pose is among the best; ties may leave it open."""
    return {0.0: "no", 1.0: "yes"}.get(share, f"{share:.0%} (ties)")


def _write_page(
    path: Path, complex_: Complex, model: ResidueModel, order: Any, scores: dict[str, FloatArray],
    columns: dict[str, FloatArray], measures: dict[str, dict[str, float]], notes: list[str], made: bool,
    near_rmsd: float,
) -> Path:  # fmt: skip
    known = complex_.native
    label, rmsd = next(iter(columns.items()))
    panels = [
        {"title": n, "rmsd": rmsd[np.isfinite(v)], "score": v[np.isfinite(v)], "label": label}
        for n, v in scores.items()
    ]
    best = int(order[0])
    lead = f"Best of {len(rmsd)} poses: number {best}, learned energy {scores[LEARNED][best]:.2f} kT"
    if known:
        lead += (
            f", ligand RMSD {rmsd[best]:.2f} nm, DockQ {columns['DockQ'][best]:.2f} "
            f"({quality(float(columns['DockQ'][best]))})"
        )
    rows = [
        [int(k), *(float(v[k]) for v in (*scores.values(), *columns.values()))] for k in order[:N_BEST]
    ]  # fmt: skip
    tables = [{"title": f"Best {len(rows)} poses", "head": ["pose", *scores, *columns], "rows": rows}]
    if measures:
        tables.append({
            "title": "Near-native poses told apart", "head": ["score", *(LABELS[m] for m in MEASURES)],
            "rows": [
                [n, *(_found(v[m]) if m.startswith("top") else v[m] for m in MEASURES)]
                for n, v in measures.items()
            ],
        })  # fmt: skip
    trained = model.metadata.get("trained_on", [])
    facts = {
        "Complex": f"{complex_.name}: receptor of {complex_.receptor.n_residues} residues, ligand of "
        f"{complex_.ligand.n_residues}",
        "Poses": "decoys by rigid moves of the ligand" if made else "given",
        "Model": f"fitted to {len(trained)} complexes: {', '.join(trained)}",
        "SHA-256 of the model": str(model.metadata.get("sha256", "not from a file")),
        "Files": "scores.csv (all poses), best.pdb (the best), docking.json (record)",
    }
    if complex_.name in trained:
        notes = [*notes, "The model was fitted to this complex: its scores here are no test."]
    return write_docking_page(
        path, title=f"Docking scores of {complex_.name}", lead=lead + ".", facts=facts, tables=tables,
        figures=[(funnel_figure(panels, near_rmsd=near_rmsd if known else None, n_columns=3),
                  f"Score against {label}; the ring is the pose with the lowest score.")],
        notes=notes,
    )  # fmt: skip
