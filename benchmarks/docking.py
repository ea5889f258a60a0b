"""Docking energies side by side on the same decoys: learned, two nulls, chance, and a force field.

``python benchmarks/docking.py --data FOLDER --out runs/docking`` runs what is missing and writes
results/docking.md. The folder holds ``split.json`` (names for "train" and "test") and ``NAME.pdb.gz`` with
chains A (receptor) and B (ligand): bound complexes of the protein docking benchmark 5, as
github.com/lightdock/lightdock_bm5 has them (``data/NAME/NAME_segid.pdb``), hydrogens removed. Everything was
chosen by cross-validation on the training complexes.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from parts import Part, run_parts
from rich.progress import track

from openmm_diffforce.analysis import figure_bytes
from openmm_diffforce.docking.complex import BACKBONE, Complex, Partner, read_complex
from openmm_diffforce.docking.decoys import Decoys, make_decoys
from openmm_diffforce.docking.learning import (
    DockingData,
    DockingFit,
    cross_validate,
    fit_docking_model,
    prepare_docking_data,
)
from openmm_diffforce.docking.model_file import load_docking_model, save_docking_model
from openmm_diffforce.docking.pages import (
    LABELS,
    funnel_figure,
    success_figure,
    success_rows,
    write_docking_page,
)
from openmm_diffforce.docking.physics_score import PhysicsScore, physics_scores
from openmm_diffforce.docking.poses import Poses
from openmm_diffforce.docking.potentials import (
    contact_count_score,
    contact_energy_score,
    miyazawa_jernigan,
)
from openmm_diffforce.docking.residue_model import HEAD_SIGMAS, ResidueModel
from openmm_diffforce.docking.scoring import (
    MEASURES,
    Score,
    ScoredDecoys,
    Summary,
    chance,
    energy_head,
    flow_energy,
    path_energy,
    score_decoys,
    summarise,
)
from openmm_diffforce.record import file_hash, read_json

SEED = 1
TEST_SEEDS = (101, 102, 103)
N_DECOYS = 200
FABS = ("2VXT", "3RVW", "3V6Z", "3G6D", "4G6M")
"""Antibodies: left out together in cross-validation."""

SETTINGS = DockingFit()
HEADLINE, PRIMARY = "learned", "auc"
"""Score and measure of the claims, fixed before the test complexes were scored."""

FITS = {
    "closed form": replace(SETTINGS, decoy_weight=0.0),
    "with decoys": SETTINGS,
    "with network": replace(SETTINGS, network=64),
}
"""The second is the headline: cross-validation said that the network adds little; it is slower."""

N_FLOW = 100
"""Decoys of the first set that -ln p_0 is computed for."""

PHYSICS_SECONDS = 3600.0
"""Processor time that the force field may take."""

N_PHYSICS = 100

ACCEPTABLE = 0.23
"""Lowest DockQ of an acceptable pose."""

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "docking"


def structures(kind: str) -> list[Complex]:
    """Complexes of one side of the split."""
    split = DATA / "split.json"
    if not split.exists():
        sys.exit(f"docking benchmark: expected {split}, found none.\n{__doc__}")
    return [read_complex(DATA / f"{name}.pdb.gz") for name in json.loads(split.read_text())[kind]]


def fit(out: Path) -> dict[str, Any]:
    train = structures("train")
    clusters = [-1 if c.name in FABS else k for k, c in enumerate(train)]
    found: dict[str, Any] = {"names": [c.name for c in train]}
    prepared: dict[int, tuple[DockingData, float]] = {}
    for name, settings in FITS.items():
        if settings.network not in prepared:
            began = time.process_time()
            bar = iter(track(range(len(train)), f"training complexes, {settings.network} network units"))
            next(bar)
            made = prepare_docking_data(train, settings, seed=SEED, progress=lambda *_, b=bar: next(b, None))
            prepared[settings.network] = made, time.process_time() - began
        data, seconds = prepared[settings.network]
        began = time.process_time()
        model = fit_docking_model(settings=settings, data=data, seed=SEED)
        spent = time.process_time() - began
        digest = save_docking_model(model, out / f"{name.replace(' ', '_')}.docking")
        found[name] = {
            "cross_validation": [vars(h) for h in cross_validate(data, settings, clusters)],
            "prepare_seconds": seconds, "seconds": spent, "sha256": digest,
            "score_r2": model.metadata["score_r2"],
        }  # fmt: skip
    # The same null for every score, from the same structures.
    np.savez(out / "contact_energies.npz", e=miyazawa_jernigan(train))
    found["files"] = {c.name: file_hash(DATA / f"{c.name}.pdb.gz") for c in [*train, *structures("test")]}
    return found


def models(out: Path) -> tuple[dict[str, ResidueModel], Any]:
    files = {name: out / f"{name.replace(' ', '_')}.docking" for name in FITS}
    null = out / "contact_energies.npz"
    if missing := [p for p in (*files.values(), null) if not p.exists()]:
        sys.exit(f"docking benchmark: expected {missing[0]}, found none; run --only fit first.")
    return {name: load_docking_model(p) for name, p in files.items()}, np.load(null)["e"]


def kept(scored: ScoredDecoys) -> dict[str, Any]:
    return {
        "name": scored.name, "rmsd": scored.decoys.rmsd.round(4), "dockq": scored.dockq.round(4),
        "near_rmsd": scored.decoys.near_rmsd,
        "scores": {k: [float(f"{x:.6g}") for x in v] for k, v in scored.scores.items()},
    }  # fmt: skip


def without_side_chains(score: Score) -> Score:
    """The same score of a structure of which only the backbone and C-beta are known."""

    def bare(one: Partner) -> Partner:
        keep = np.isin(one.atom_names, sorted(BACKBONE))
        names = tuple(str(n) for n in np.array(one.atom_names)[keep])
        return replace(one, atoms=one.atoms[keep], atom_names=names, atom_residues=one.atom_residues[keep])

    return lambda c, p: score(replace(c, receptor=bare(c.receptor), ligand=bare(c.ligand)), p)


def scores(out: Path) -> dict[str, Any]:
    fitted, energies = models(out)
    model = fitted["with decoys"]
    everything = {
        HEADLINE: energy_head(model),
        "learned, S at 0.05 nm": energy_head(model, (0.05,)),
        "learned, side chains unknown": without_side_chains(energy_head(model)),
        "learned, with network": energy_head(fitted["with network"]),
        "closed form": energy_head(fitted["closed form"]),
        "contact count": contact_count_score,
        "contact energies": lambda c, p: contact_energy_score(c, p, energies),
        "chance": chance(SEED),
    }
    began = time.process_time()
    rows = []
    for one in track(structures("test"), "test complexes"):
        for seed in TEST_SEEDS:
            decoys = make_decoys(one, N_DECOYS, seed=seed)
            rows.append(kept(score_decoys(one, decoys, everything, seed=seed)))
    return {"rows": rows, "seconds": time.process_time() - began}


def flow(out: Path) -> dict[str, Any]:
    model = models(out)[0]["with decoys"]
    several = {
        HEADLINE: energy_head(model), "-ln p0, flow": flow_energy(model), "-ln p0, path": path_energy(model),
        "contact count": contact_count_score,
    }  # fmt: skip
    began = time.process_time()
    rows = []
    for one in track(structures("test"), "flow and path"):
        decoys = make_decoys(one, N_DECOYS, seed=TEST_SEEDS[0])
        rows.append(kept(score_decoys(one, decoys.every(N_DECOYS // N_FLOW), several, seed=TEST_SEEDS[0])))
    return {"rows": rows, "seconds": time.process_time() - began}


def physics(out: Path) -> dict[str, Any]:
    """One complex after the other, small ones first, until the time is spent; what is done is kept."""
    fitted, energies = models(out)
    model = fitted["with decoys"]
    rows, spent, notes = [], 0.0, []
    for one in sorted(structures("test"), key=lambda c: c.receptor.n_residues + c.ligand.n_residues):
        if spent >= PHYSICS_SECONDS:
            break
        decoys = make_decoys(one, N_DECOYS, seed=TEST_SEEDS[0]).every(N_DECOYS // N_PHYSICS)
        score = PhysicsScore(one)
        done = physics_scores(
            score, decoys.poses, path=out / f"physics_{one.name}.json", budget=PHYSICS_SECONDS - spent
        )
        spent += done.seconds
        notes.append([one.name, len(done.values), done.seconds, *score.notes])  # complete or not
        print(f"{one.name}: {len(done.values)} decoys, {done.seconds:.0f} s of processor time", flush=True)
        if len(done.values) < len(decoys.poses):
            break
        several = {
            HEADLINE: energy_head(model), "contact count": contact_count_score,
            "contact energies": lambda c, p: contact_energy_score(c, p, energies),
            "chance": chance(SEED),
        }  # fmt: skip
        scored = score_decoys(one, decoys, several, seed=TEST_SEEDS[0])
        rows.append(kept(replace(scored, scores={"force field": done.values, **scored.scores})))
    return {"rows": rows, "seconds": spent, "notes": notes, "limit": PHYSICS_SECONDS}


PARTS: dict[str, Part] = {"fit": fit, "scores": scores, "flow": flow, "physics": physics}


# ------------------------------------------------------------------------------------- table

INTRODUCTION = f"""
`python benchmarks/docking.py --data FOLDER --out runs/docking` prints it. Structures: bound complexes of the
protein docking benchmark 5, from github.com/lightdock/lightdock_bm5 (not shipped); 15 for training, 10 for
testing. {N_DECOYS} decoys in each of {len(TEST_SEEDS)} sets (seeds {TEST_SEEDS}): rigid moves of the ligand,
5 % with a ligand RMSD of at most 0.5 nm (uniform), the rest uniform to 3 nm, the native pose left out; at
most 3 ligand residues clash, at least 10 residue pairs touch; receptor and ligand are turned and shifted at
random before scoring. Errors: one standard error over complexes; in brackets that of the draw of decoys.
p: Wilcoxon's signed-rank test, one-sided, paired over complexes. Lower scores are better.

`{HEADLINE}` is the energy head: S averaged over noise levels {", ".join(map(str, HEAD_SIGMAS))} nm, fitted by
score matching and decoys of the training complexes; `closed form` is score matching alone; `with network`
has a network residual of {FITS["with network"].network} units beside the pair splines. `side chains
unknown` scores structures of which only the backbone and C-beta are left: what the side chains of the bound
state tell is then gone.

The test complexes had been scored before, by an earlier model (side chains at mean distances, levels from
0.1 nm: best decoy near-native in 3.7 of 10); what changed since was chosen on the training complexes.

![Funnels](docking.png)
"""


def scored_of(rows: list[dict[str, Any]]) -> list[ScoredDecoys]:
    """Back from the file; poses are not kept there."""
    return [
        ScoredDecoys(
            r["name"],
            Decoys(Poses.identity(len(r["rmsd"])), np.array(r["rmsd"]), r["near_rmsd"], ()),
            np.array(r["dockq"]),
            {k: np.array(v) for k, v in r["scores"].items()},
        )
        for r in rows
    ]


def success_table(summary: Summary) -> list[str]:
    lines = [
        "| score | AUC | rank correlation | enrichment, best 5 % | best near-native | one of the best ten |",
        "|---|---|---|---|---|---|",
    ]
    for name in summary.values["auc"]:
        cells = []
        for m in MEASURES:
            mean, error = summary.mean(name, m)
            draw = summary.seed_errors[m][name]
            if m.startswith("top"):
                n = len(summary.complexes)
                cells.append(f"{mean * n:.1f} of {n}" + (f" (+- {draw * n:.1f})" if draw else ""))
            else:
                cells.append(f"{mean:.3f} +- {error:.3f}" + (f" ({draw:.3f})" if draw else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def comparison_table(summary: Summary, others: list[str]) -> list[str]:
    lines = ["| measure | against | difference | complexes won | p |", "|---|---|---|---|---|"]
    for m in MEASURES[:2]:
        for other in others:
            c = summary.compare(HEADLINE, other, m)
            lines.append(
                f"| {m} | {other} | {c.mean_difference:+.3f} +- {c.standard_error:.3f} | {c.wins} of {c.n} | "
                f"{c.p_value:.4f} |"
            )
    return [*lines, ""]


def complex_table(summary: Summary, scored: list[ScoredDecoys], names: list[str]) -> list[str]:
    head = " | ".join(f"{n}: AUC, rank correlation" for n in names)
    lines = [f"| complex | {head} | best decoy by {HEADLINE}: RMSD [nm] | its DockQ |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for k, name in enumerate(summary.complexes):
        cells = " | ".join(
            f"{summary.values['auc'][n][k]:.2f}, {summary.values['spearman'][n][k]:+.2f}" for n in names
        )
        best = [(s, int(s.scores[HEADLINE].argmin())) for s in scored if s.name == name]
        rmsd = ", ".join(f"{s.decoys.rmsd[b]:.2f}" for s, b in best)
        quality = ", ".join(f"{s.dockq[b]:.2f}" for s, b in best)
        lines.append(f"| {name} | {cells} | {rmsd} | {quality} |")
    return [*lines, ""]


def fit_table(part: dict[str, Any]) -> list[str]:
    lines = [
        f"## Fit to {len(part['names'])} training complexes", "",
        "Processor time of preparation and fit: "
        + ", ".join(f"{part[n]['prepare_seconds']:.0f} + {part[n]['seconds']:.1f} s ({n})" for n in FITS)
        + ". Leave-one-out over training complexes (antibodies together): share of the noise's score that is",
        "explained on the complex left out, and how its decoys are ranked by the energy of one level, or by",
        "the mean over levels (the energy head).", "",
        "| fit | sigma [nm] | score R^2 | AUC | rank correlation | best decoy near-native |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in FITS:
        for h in part[name]["cross_validation"]:
            levels = f"{h['sigmas'][0]:g}" + (
                " to {:g}".format(h["sigmas"][-1]) if len(h["sigmas"]) > 1 else ""
            )
            lines.append(
                f"| {name} | {levels} | {h['score_r2']:.3f} | {h['auc']:.3f} | {h['spearman']:.3f} | "
                f"{h['top']:.2f} |"
            )
    return [*lines, ""]


def table(found: dict[str, Any]) -> list[str]:
    lines = ["# Docking energies", "", *INTRODUCTION.strip().splitlines(), ""]
    if "scores" in found:
        scored = scored_of(found["scores"]["rows"])
        summary = summarise(scored)
        nulls = ["contact count", "contact energies", "chance"]
        lines += [f"## Ten test complexes ({found['scores']['seconds']:.0f} s of processor time)", ""]
        lines += success_table(summary)
        lines += [f"`{HEADLINE}` against the nulls, {PRIMARY} and rank correlation:", ""]
        lines += comparison_table(summary, [*nulls, "closed form"])
        tops = summary.values["top"][HEADLINE].sum()
        each = np.array([s.decoys.near[s.scores[HEADLINE].argmin()] for s in scored]).reshape(
            -1, len(TEST_SEEDS)
        )
        worst = max(summary.compare(HEADLINE, n, PRIMARY).p_value for n in nulls)
        lines += [
            f"Asked for: p < 0.01 against both nulls and chance ({PRIMARY}): "
            f"{'reached' if worst < 0.01 else 'missed'}, largest p {worst:.4f}. "
            "Best-scored decoy near-native in at least 6 of 10: "
            f"{'reached' if tops >= 6 else 'missed'}, {tops:.1f} on average over sets "
            f"({', '.join(str(int(v)) for v in each.sum(axis=0))}).", "",
        ]  # fmt: skip
        counts = {
            name: sum(float(r.dockq[r.scores[name].argmin()] >= ACCEPTABLE) for r in scored) / len(TEST_SEEDS)
            for name in scored[0].scores
        }
        share = np.mean([(r.dockq >= ACCEPTABLE).mean() for r in scored])
        lines += [
            f"Best-scored decoy acceptable by DockQ (>= {ACCEPTABLE}; {100 * share:.0f} % of decoys are), "
            f"of 10, mean over sets: {', '.join(f'{n} {v:.1f}' for n, v in counts.items())}.", "",
        ]  # fmt: skip
        lines += complex_table(summary, scored, [HEADLINE, "contact count", "contact energies"])
    if "flow" in found:
        summary = summarise(scored_of(found["flow"]["rows"]))
        lines += [
            f"## -ln p0 ({N_FLOW} decoys of the first set)", "",
            "Along the probability flow (6 RK4 steps) and along a standing path, ending at the energy of",
            f"the largest noise: {found['flow']['seconds']:.0f} s of processor time.", "",
            *success_table(summary),
        ]  # fmt: skip
    if found.get("physics", {}).get("rows"):
        part = found["physics"]
        summary = summarise(scored_of(part["rows"]))
        n = sum(row[1] for row in part["notes"])
        lines += [
            f"## Force field ({len(part['rows'])} complexes, small ones first, {N_PHYSICS} decoys each)", "",
            "amber14 with OBC2, residues within 1 nm of the partner, cutoff 1.2 nm, 20 minimiser steps: "
            f"{n} poses in {part['seconds']:.0f} s of processor time "
            f"({part['seconds'] / max(n, 1):.1f} s a pose), limit {part['limit']:.0f} s.", "",
            *success_table(summary),
        ]  # fmt: skip
        if len(part["rows"]) > 1:
            lines += comparison_table(summary, ["force field"])
    if "fit" in found:
        lines += fit_table(found["fit"])
    return lines


def page(found: dict[str, Any], out: Path) -> None:
    """Figure of the funnels, and the HTML page of the run."""
    scored = scored_of(found["scores"]["rows"])
    first = [s for k, s in enumerate(scored) if k % len(TEST_SEEDS) == 0]
    panels = [{"title": s.name, "rmsd": s.decoys.rmsd, "score": s.scores[HEADLINE]} for s in first]
    figure, summary = funnel_figure(panels), summarise(scored)
    (Path(__file__).parent / "results" / "docking.png").write_bytes(
        figure_bytes(figure, file_format="png", dpi=80)
    )
    head = ["score", *(LABELS[m] for m in MEASURES)]

    def side_by_side(title: str, one: Summary) -> dict[str, Any]:
        return {
            "title": title, "head": head,
            "rows": [[r["score"], *(r[m] for m in MEASURES)] for r in success_rows(one)],
        }  # fmt: skip

    compared = [
        summary.compare(HEADLINE, other, m)
        for m in MEASURES[:2]
        for other in summary.values[m]
        if other in ("contact count", "contact energies", "chance")
    ]
    tables = [
        side_by_side("Scores side by side, ten complexes", summary),
        {
            "title": "Learned energy against the others, paired over complexes",
            "head": ["against", "measure", "difference", "standard error", "complexes won", "p"],
            "rows": [
                [
                    c.other,
                    LABELS[c.measure],
                    c.mean_difference,
                    c.standard_error,
                    f"{c.wins} of {c.n}",
                    c.p_value,
                ]
                for c in compared
            ],
        },
    ]
    for part, title in (("flow", "-ln p0, fewer decoys"), ("physics", "Force field, fewer decoys")):
        if found.get(part, {}).get("rows"):
            several = summarise(scored_of(found[part]["rows"]))
            tables.append(side_by_side(f"{title}, {len(several.complexes)} complexes", several))
    won, auc = summary.values["top"][HEADLINE].sum(), summary.mean(HEADLINE, "auc")
    write_docking_page(
        out / "report.html",
        title="Docking energies on ten test complexes",
        lead=f"Learned energy: area under the curve {auc[0]:.2f} +- {auc[1]:.2f}; the best-scored decoy is "
        f"near-native in {won:.1f} of 10 complexes (mean of {len(TEST_SEEDS)} sets of decoys).",
        facts={
            "Decoys": f"{N_DECOYS} in each of {len(TEST_SEEDS)} sets, rigid moves of the ligand, free of "
            "clashes and in contact",
            "Training": f"{len(found['fit']['names'])} other complexes: {', '.join(found['fit']['names'])}",
            "p": "Wilcoxon's signed-rank test, one-sided, paired over complexes",
        },
        tables=tables,
        figures=[
            (figure, "Learned energy against ligand RMSD, first set of decoys; ring: the best-scored decoy."),
            (success_figure(summary), "Every complex (grey), their mean and its standard error."),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the structures")
    parser.add_argument("--out", type=Path, default=Path("runs") / "docking")
    parser.add_argument("--physics-seconds", type=float, default=PHYSICS_SECONDS)
    options, rest = parser.parse_known_args()
    DATA, PHYSICS_SECONDS = options.data, options.physics_seconds
    sys.argv = [sys.argv[0], "--out", str(options.out), *rest]
    run_parts("docking", __doc__ or "", PARTS, table)
    kept_parts = {n: read_json(p) for n in PARTS if (p := options.out / f"{n}.json").exists()}
    if "scores" in kept_parts and "fit" in kept_parts:
        page(kept_parts, options.out)
