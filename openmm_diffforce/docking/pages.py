"""Funnel plots and the HTML page of scored poses."""

import base64
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis import figure_bytes, new_figure
from ..errors import InputError
from ..page import page_environment
from ..record import atomic_path
from .scoring import MEASURES, Summary

BLUE, BROWN, GREY, GREEN = "#1f5f8b", "#8a5a20", "#59626b", "#1d7044"

LABELS = {
    "auc": "area under the curve", "spearman": "rank correlation", "enrichment": "enrichment, best 5 %",
    "top": "best decoy near-native", "top_ten": "one of the best ten near-native",
}  # fmt: skip


def standardised(score: Any) -> Any:
    """Score less its median, over its interquartile range: scores of any unit in one picture."""
    s = np.asarray(score, dtype=np.float64)
    low, middle, high = np.percentile(s, [25, 50, 75])
    return (s - middle) / max(high - low, 1e-12)


def funnel_figure(
    panels: Sequence[Mapping[str, Any]], *, near_rmsd: float | None = 0.5, n_columns: int = 5
) -> Any:
    """Score against RMSD, one panel each.

    Parameters
    ----------
    panels : sequence of mapping
        With ``title``, ``rmsd`` [nm], ``score``; and ``label`` of the RMSD, if it is not the ligand's to
        the native pose.
    near_rmsd : float, optional
        Poses up to this RMSD are near-native [nm]; they are drawn in another colour.
    n_columns : int

    Returns
    -------
    matplotlib.figure.Figure
        The lowest score of every panel has a ring. Scores beyond four interquartile ranges above the
        median are drawn at that height.
    """
    if not panels:
        raise InputError("funnel figure: expected at least one panel, found none.")
    n_columns = min(n_columns, len(panels))
    n_rows = math.ceil(len(panels) / n_columns)
    figure, _ = new_figure(n_columns, width=2.25, height=2.2 * n_rows + 0.2)
    figure.clear()
    grid = figure.subplots(n_rows, n_columns, squeeze=False)
    for k, axes in enumerate(grid.flat):
        if k >= len(panels):
            axes.set_axis_off()
            continue
        one = panels[k]
        rmsd, score = np.asarray(one["rmsd"], dtype=float), standardised(one["score"])
        shown = np.minimum(score, 4.0)
        near = rmsd <= near_rmsd if near_rmsd is not None else np.zeros(len(rmsd), dtype=bool)
        axes.scatter(rmsd[~near], shown[~near], s=6, color=GREY, alpha=0.55, linewidths=0)
        axes.scatter(rmsd[near], shown[near], s=12, color=GREEN, linewidths=0)
        best = int(np.argmin(score))
        axes.scatter(
            rmsd[best], shown[best], s=60, facecolors="none", edgecolors=GREEN if near[best] else BROWN,
            linewidths=1.4,
        )  # fmt: skip
        if near_rmsd is not None:
            axes.axvline(near_rmsd, color=GREEN, linewidth=0.8, linestyle="--")
        axes.set_title(one["title"], fontsize=9)
        axes.tick_params(labelsize=7)
        if k // n_columns == n_rows - 1 or k + n_columns >= len(panels):
            axes.set_xlabel(one.get("label", "ligand RMSD [nm]"), fontsize=8)
        if k % n_columns == 0:
            axes.set_ylabel("score, standardised", fontsize=8)
    return figure


def success_figure(summary: Summary, scores: Sequence[str] | None = None) -> Any:
    """Area under the curve and rank correlation of every score, complex by complex."""
    names = list(scores or summary.values["auc"])
    figure, columns = new_figure(2, width=3.9, height=0.42 * len(names) + 1.3)
    for axes, measure, level in zip(columns, ("auc", "spearman"), (0.5, 0.0), strict=True):
        for y, name in enumerate(reversed(names)):
            v = summary.values[measure][name]
            axes.plot(v, np.full(len(v), y), "o", color=GREY, markersize=4, alpha=0.5, markeredgewidth=0)
            mean, error = summary.mean(name, measure)
            axes.errorbar(
                [mean], [y], xerr=[error], fmt="o", color=BLUE if name == names[0] else BROWN, capsize=3,
                markersize=6,
            )  # fmt: skip
        axes.axvline(level, color=GREY, linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(names)), list(reversed(names)) if measure == "auc" else [""] * len(names))
        axes.set_xlabel(LABELS[measure])
    return figure


def success_rows(summary: Summary) -> list[dict[str, Any]]:
    """One row for each score: the mean of every measure and its standard error over complexes."""
    rows = []
    for name in summary.values["auc"]:
        row: dict[str, Any] = {"score": name}
        for m in MEASURES:
            row[m], row[f"{m}_error"] = summary.mean(name, m)
        rows.append(row)
    return rows


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if math.isfinite(value) else "n/a"
    return str(value)


def write_docking_page(
    path: str | os.PathLike[str],
    *,
    title: str,
    lead: str,
    facts: Mapping[str, str],
    tables: Sequence[Mapping[str, Any]],
    figures: Sequence[tuple[Any, str]],
    notes: Sequence[str] = (),
) -> Path:
    """Write one HTML page that needs no other file.

    Parameters
    ----------
    path : path-like
    title, lead : str
        Heading, and the result in a sentence.
    facts : mapping
        Name -> what is so.
    tables : sequence of mapping
        With ``title``, ``head`` and ``rows``; a number is set right.
    figures : sequence of (matplotlib Figure, str)
        And their captions.
    notes : sequence of str

    Returns
    -------
    pathlib.Path
    """
    pictures = [
        (base64.b64encode(figure_bytes(f, file_format="png", dpi=130)).decode("ascii"), caption)
        for f, caption in figures
    ]
    text = (
        page_environment({"cell": _cell})
        .get_template("docking.html.j2")
        .render(
            title=title,
            lead=lead,
            facts=dict(facts),
            tables=list(tables),
            pictures=pictures,
            notes=list(notes),
        )
    )
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")
    return Path(path)
