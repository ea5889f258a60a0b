"""The record of a run as one page: self-contained HTML, readable without knowing the package.

The record is a JSON object; :class:`Record` says what it may hold. Energies in it are in kT; the
page converts them with ``system.temperature``.
"""

import base64
import html
import io
import math
import os
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from .constants import EXCHANGE_FILE
from .errors import InputError
from .estimate import MIN_OVERLAP
from .page import page_environment
from .record import atomic_path, plain, read_json
from .units import KJ_PER_KCAL, thermal_energy

Status = Literal["PASS", "WARN", "FAIL"]
Number = float | None  # None stands for NaN, which JSON lacks

MINUS = "\N{MINUS SIGN}"

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

CAPTIONS = {
    "delta_f": "Free-energy differences of the routes in the table, with one standard error.",
    "f_k": "Free energy along lambda, from the learned and from the classical windows.",
    "operator": "Learned against exact operator O = (U1 - U0)/kT on held-out frames.",
    "force": "Learned against exact force components on held-out frames.",
    "overlap_learned": "Overlap of the learned windows.",
    "overlap_classical": "Overlap of the classical windows.",
    "replicas": "Replicas on their way through the states.",
    "dhdl": "Mean dH/dlambda of each window; the area under the curve is TI's Delta f.",
    "phi_psi": "Backbone angles phi and psi: sampled by the classical force field and by the "
    "learned base action alone.",
    "phi_psi_learned": "Backbone angles phi and psi sampled by the learned base action alone.",
    "phi_psi_classical": "Backbone angles phi and psi sampled by the classical force field.",
    "noise_levels": "Quality of the learned fields at each noise level.",
    "bridge_plateau": "Δf against the noise. Where the levels agree within their errors, the choice of the "
    "level does not matter. At the left the limit without noise, at the right that of infinite noise.",
    "bridge_overlap": "How much the blurred end states overlap (1: they are one), and how many independent "
    "frames carry the average of the work, in the worse direction. Grey lines: thresholds of the audit.",
    "bridge_work": "Work from state 0 to state 1 on blurred frames of either, at the chosen level. The two "
    "curves cross at Δf if work and frames belong together.",
    "bridge_calibration": "Is O as uncertain, given the blurred frame, as it was predicted to be? 1 is "
    "right, more is overconfident, the grey band is what one hopes for.",
    "bridge_spread": "Δf at the chosen level with each fifth of the frames left out, and by other ways to "
    "close the gap between the states (open: rough ones, for comparison). Grey: one standard error.",
}
"""Captions of figures with these names; their order is the order on the page."""


class Section(BaseModel):
    """Part of a record. Unknown keys are kept and not shown."""

    model_config = ConfigDict(extra="allow")


class Value(Section):
    """A number with its standard error [kT unless said otherwise]."""

    value: Number
    error: Number = None


class Verdict(Section):
    """What it all comes to."""

    status: Status
    text: str


class Headline(Value):
    """The free-energy difference that is shown first [kT]."""

    method: str
    meaning: str = ""


class SystemSection(Section):
    """What was simulated."""

    name: str
    temperature: float = Field(gt=0)
    description: str = ""
    n_atoms: int | None = None
    force_field: str = ""
    perturbation: str = ""
    platform: str = ""


class End(Section):
    """Samples of one end state."""

    name: str
    n_frames: int
    interval_ps: Number = None
    length_ps: Number = None
    seconds: Number = None


class Sampling(Section):
    """Training data."""

    ends: list[End] = []


class Level(Section):
    """Held-out quality of the fields at one noise level; R^2 of 1 is perfect."""

    sigma_nm: float
    force_r2: Number = None
    action_r2: Number = None
    operator_r2: Number = None
    operator_gradient_r2: Number = None


class Fit(Section):
    """The fit."""

    n_train: int | None = None
    n_test: int | None = None
    cpu_seconds: Number = None
    levels: list[Level] = []


class Swaps(Section):
    """How walkers moved between states: ``SwapStatistics.to_dict()``."""

    n_iterations: int
    n_replicas: int
    transition: list[list[Number]]
    round_trips: list[int]
    acceptance: list[list[Number]] | None = None
    occupancy: list[Number] = []
    second_eigenvalue: Number = None
    mixing_time: Number = None
    inefficiency: Number = None


class Windows(Section):
    """One set of lambda windows; ``estimate`` is ``FreeEnergyEstimate.to_dict()``."""

    estimate: dict[str, Any]
    label: str = ""
    n_windows: int | None = None
    length_ps: Number = None
    n_steps: int | None = None
    seconds: Number = None
    swaps: Swaps | None = None


class BothWindows(Section):
    """Windows under the learned operator and under the classical one."""

    learned: Windows | None = None
    classical: Windows | None = None


class Paired(Section):
    """The same classical frames under both operators [kT]."""

    learned: Value
    classical: Value
    difference: Value
    n_frames: int | None = None


class BaseAction(Section):
    """Dynamics on the learned base action alone."""

    length_ps: Number = None
    jsd: Number = None
    jsd_baseline: Number = None
    temperature_conf: Value | None = None
    wall_fraction: Number = None
    nve_drift: dict[str, Value] = {}


class BridgeLevel(Section):
    """The bridge at one noise level; ``NoiseLevel`` has the fields."""

    sigma: float
    delta_f: Number
    d_delta_f: Number = None
    overlap: Number = None
    ess: Number = None
    r_squared: Number = None


class Bridge(Section):
    """A noisy operator bridge: ``BridgeResult.to_dict()``, and plain BAR on the same frames."""

    delta_f: Number
    d_delta_f: Number = None
    chosen: int = Field(ge=0)
    levels: list[BridgeLevel] = Field(min_length=1)
    density: dict[str, Any]
    readout: dict[str, Any]
    bar: dict[str, Any] | None = None
    posterior: dict[str, Any] | None = None
    lams: list[float] = [0.0, 1.0]
    n_frames: list[int] = []
    inefficiency: list[float] = []
    noised: list[str] = []

    @pydantic.model_validator(mode="after")
    def _one_is_chosen(self) -> "Bridge":
        if self.chosen >= len(self.levels):
            raise ValueError(f"chosen: expected one of {len(self.levels)} levels, found {self.chosen}")
        return self


class Check(Section):
    """One gate."""

    name: str
    value: float | str | None
    threshold: str
    status: Status
    advice: str = ""


class Record(Section):
    """All of ``record.json``; every section but ``what`` may be absent."""

    what: str
    title: str = ""
    summary: str = ""
    verdict: Verdict | None = None
    headline: Headline | None = None
    system: SystemSection | None = None
    sampling: Sampling | None = None
    fit: Fit | None = None
    artefact: dict[str, Any] = {}
    windows: BothWindows | None = None
    paired: Paired | None = None
    end_correction: dict[str, Any] | None = None
    base_action: BaseAction | None = None
    swaps: Swaps | None = None
    bridge: Bridge | None = None
    checks: list[Check] = []
    provenance: dict[str, Any] = {}
    timing: dict[str, Number] = {}
    figures: dict[str, str] = {}
    captions: dict[str, str] = {}

    def overall(self) -> Verdict:
        """The verdict, or the worst status of the checks in words."""
        if self.verdict is not None:
            return self.verdict
        n = {s: sum(c.status == s for c in self.checks) for s in ("PASS", "WARN", "FAIL")}
        if not self.checks:
            return Verdict(status="WARN", text="Nothing was checked.")
        if n["FAIL"]:
            return Verdict(status="FAIL", text=f"{n['FAIL']} of {len(self.checks)} checks failed.")
        if n["WARN"]:
            return Verdict(status="WARN", text=f"{n['WARN']} of {len(self.checks)} checks gave a warning.")
        return Verdict(status="PASS", text=f"All {len(self.checks)} checks passed.")


def check_record(record: Mapping[str, Any]) -> Record:
    """A record's content, checked.

    Raises
    ------
    InputError
        If a section lacks what it must have, or a value is of another type; the message names it.

    Examples
    --------
    >>> check_record({"what": "demo"}).overall().text
    'Nothing was checked.'
    """
    try:
        return Record.model_validate(plain(record))
    except pydantic.ValidationError as err:
        if "what" not in record:
            raise InputError(
                "record: expected the record.json of a demonstration or a run, found JSON without its key "
                "what."
            ) from err
        lines = [
            f"record: {'.'.join(map(str, e['loc']))}: {e['msg']}, found {e['input']!r:.60}"
            for e in err.errors(include_url=False)
        ]
        raise InputError("\n".join(lines)) from err


# ------------------------------------------------------------------------------------- numbers


def with_error(value: float | None, error: float | None = None) -> str:
    """A number to two digits of its error, with a real minus sign.

    Examples
    --------
    >>> with_error(1.23456, 0.0712)
    '1.235 ± 0.071'
    >>> with_error(-10.0)
    '−10.00'
    """
    if value is None or not math.isfinite(value):
        return "n/a"
    if error is None or not math.isfinite(error) or error <= 0:
        return f"{value:.2f}".replace("-", MINUS)
    digits = min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}".replace("-", MINUS)


def _number(value: Any, digits: int = 3) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "n/a"
    return f"{value:.{digits}g}".replace("-", MINUS)


def _r2(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}".replace("-", MINUS)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "n/a"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _units(value: float | None, error: float | None, kT: float | None) -> dict[str, str]:
    """kT, kJ/mol, kcal/mol."""
    factors = {"kT": 1.0}
    if kT is not None:
        factors |= {"kJ/mol": kT, "kcal/mol": kT / KJ_PER_KCAL}
    return {
        name: with_error(None if value is None else value * factor, None if error is None else error * factor)
        for name, factor in factors.items()
    }


# -------------------------------------------------------------------------------------- tables


def _kt(entry: Any) -> tuple[float | None, float | None]:
    """Value and error [kT] of ``Estimate.to_dict()``."""
    pair = (entry or {}).get("kT") or {}
    return pair.get("value"), pair.get("error")


def _routes(record: Record, kT: float | None) -> list[dict[str, Any]]:
    """Every way to Delta f that the record holds, for the table and the picture."""
    rows: list[dict[str, Any]] = []

    def add(group: str, name: str, value: Any, error: Any, note: str = "", mark: str = "") -> None:
        rows.append(
            {"group": group, "name": name, "value": value, "error": error, "note": note,
             "mark": mark, "text": _units(value, error, kT)}
        )  # fmt: skip

    both = record.windows
    for key in ("learned", "classical"):
        one = getattr(both, key) if both else None
        if one is None:
            continue
        for method, entry in one.estimate.get("estimates", {}).items():
            overlap = one.estimate.get("min_overlap")
            note = f"smallest overlap of neighbours {overlap:.3f}" if overlap is not None else ""
            add(
                f"Windows, {one.label or key}", method, *_kt(entry),
                note if method == "MBAR" else "", key,
            )  # fmt: skip
    if record.paired:
        note = f"{record.paired.n_frames:,} frames" if record.paired.n_frames else ""
        for key in ("learned", "classical"):
            entry = getattr(record.paired, key)
            add("Same classical frames", f"{key} operator", entry.value, entry.error, note, key)
    if record.bridge and rows:
        for one in bridge_readouts(record.bridge):
            if one["key"] != "readout":
                add("End states alone", one["name"], one["value"], one["error"], one["note"], "classical")
    if record.end_correction:
        overlap = record.end_correction.get("min_overlap")
        note = f"overlap with the classical end {overlap:.3f}" if overlap is not None else ""
        add(
            "End correction", "learned, to the force field",
            *_kt(record.end_correction.get("corrected")), note, "learned",
        )  # fmt: skip
    return rows


def bridge_readouts(bridge: Bridge) -> list[dict[str, Any]]:
    """What the frames of a bridge give on the way: name, value, error [kT] and a note, simplest first."""
    rows = [
        {"name": "two moments of O", "key": "readout", "value": bridge.readout.get("delta_f"),
         "error": bridge.readout.get("d_delta_f"), "note": "no model; its assumption is not in the error"},
        {"name": "density of O", "key": "density", "value": bridge.density.get("delta_f"),
         "error": bridge.density.get("d_delta_f"), "note": "limit of infinite noise"},
    ]  # fmt: skip
    if bridge.bar:
        overlap, error = bridge.bar.get("overlap") or 0.0, bridge.bar.get("d_delta_f")
        poor = overlap < MIN_OVERLAP
        note = f"limit of no noise; overlap {overlap:.2g}" + (": not to be trusted" if poor else "")
        rows.append({"name": "plain BAR", "key": "bar", "value": bridge.bar.get("delta_f"),
                     "error": None if poor else error, "note": note})  # fmt: skip
    level = bridge.levels[bridge.chosen]
    rows.append({"name": "bridge", "key": "bridge", "value": bridge.delta_f, "error": bridge.d_delta_f,
                 "note": f"at noise {level.sigma:.2g} nm, where its error is smallest"})  # fmt: skip
    if bridge.posterior:
        found = bridge.posterior
        rows.append({"name": "posterior MD", "key": "posterior", "value": found["delta_f"],
                     "error": found["d_delta_f"],
                     "note": f"no model: {found['n_y']} noised frames per end, {found['n_forces']:,} "
                             "force evaluations"})  # fmt: skip
    return rows


def _differences(record: Record, kT: float | None) -> list[dict[str, Any]]:
    """Learned minus classical, independent and paired."""
    rows = []
    both = record.windows
    if both and both.learned and both.classical:
        a, b = (_kt(w.estimate.get("estimates", {}).get("MBAR")) for w in (both.learned, both.classical))
        if None not in (a[0], b[0]):
            difference = a[0] - b[0]  # type: ignore[operator]
            error = math.hypot(a[1] or 0.0, b[1] or 0.0)
            note = f"{abs(difference) / error:.1f} combined standard errors" if error else ""
            rows.append(
                {"name": "independent windows (MBAR)", "note": note,
                 "text": _units(difference, error, kT)}
            )  # fmt: skip
    if record.paired:
        d = record.paired.difference
        rows.append(
            {"name": "same frames (paired)", "note": "sampling noise cancels",
             "text": _units(d.value, d.error, kT)}
        )  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------ pictures

_COLOURS = {"learned": "#1f5f8b", "classical": "#8a5a20", "": "#444444"}


def _forest(rows: Sequence[Mapping[str, Any]]) -> str:
    """All routes on one axis: points with one standard error (SVG)."""
    rows = [r for r in rows if r["value"] is not None]
    if len(rows) < 2:
        return ""
    low = min(r["value"] - 2 * (r["error"] or 0) for r in rows)
    high = max(r["value"] + 2 * (r["error"] or 0) for r in rows)
    pad = 0.08 * (high - low) or 0.1
    low, high = low - pad, high + pad
    left, right, row_height = 330, 700, 22
    height = row_height * len(rows) + 48

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    out = [
        f'<svg viewBox="0 0 720 {height}" role="img" aria-label="Delta f of every route" '
        'xmlns="http://www.w3.org/2000/svg" font-size="12">'
    ]
    for tick in _ticks(low, high):
        x = place(tick)
        out.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 40}" stroke="#dddddd"/>'
            f'<text x="{x:.1f}" y="{height - 24}" text-anchor="middle" fill="#444">'
            f"{_number(tick, 4)}</text>"
        )
    for k, row in enumerate(rows):
        y = 14 + k * row_height
        colour = _COLOURS[row["mark"]]
        error = row["error"] or 0.0
        label = html.escape(f"{row['group']}: {row['name']}")
        out.append(f'<text x="{left - 14}" y="{y + 4}" text-anchor="end" fill="#222">{label}</text>')
        out.append(
            f'<line x1="{place(row["value"] - error):.1f}" x2="{place(row["value"] + error):.1f}" '
            f'y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>'
        )
        x = place(row["value"])
        shape = (
            f'<rect x="{x - 4:.1f}" y="{y - 4}" width="8" height="8" fill="{colour}"/>'
            if row["mark"] == "classical"
            else f'<circle cx="{x:.1f}" cy="{y}" r="4.5" fill="{colour}"/>'
        )
        out.append(shape)
    out.append(
        f'<text x="{(left + right) / 2}" y="{height - 6}" text-anchor="middle" fill="#222">'
        "Δf [kT], bars: one standard error</text></svg>"
    )
    return "".join(out)


def _ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw)
    first = math.ceil(low / step)
    return [k * step for k in range(first, math.floor(high / step) + 1)]


def _state_label(state: Any) -> str:
    if isinstance(state, list):
        return "/".join(_state_label(v) for v in state)
    return f"{state:.3g}" if isinstance(state, int | float) else str(state)


def _matrix(matrix: Any, states: Any, title: str, across: str = "state evaluated (λ)") -> str:
    """An overlap or transition matrix as shaded squares with their numbers (SVG)."""
    n = len(matrix or [])
    if n < 2 or any(len(row) != n for row in matrix):
        return ""
    cell, margin = (34, 44) if n <= 12 else (24, 44)
    size = n * cell + margin
    show = n <= 12
    labels = [html.escape(_state_label(s)) for s in (states or range(n))]
    top = max((v or 0.0) for row in matrix for v in row) or 1.0
    out = [
        f'<svg viewBox="0 0 {size + 6} {size + 6}" role="img" '
        f'style="max-width: {size * 1.2:.0f}px" aria-label="{html.escape(title)}" '
        'xmlns="http://www.w3.org/2000/svg" font-size="10">'
    ]
    for i, row in enumerate(matrix):
        at = margin + (i + 0.5) * cell
        for x, y, anchor in ((margin - 6, at + 3.5, "end"), (at, margin - 8, "middle")):
            out.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{labels[i]}</text>')
        for j, value in enumerate(row):
            p = min(1.0, max(0.0, value or 0.0))
            x, y = margin + j * cell, margin + i * cell
            # White to dark blue; the text turns white where the square is dark.
            shade = min(1.0, p / top) ** 0.8
            rgb = tuple(round(255 + shade * (c - 255)) for c in (23, 78, 120))
            out.append(
                f'<rect x="{x}" y="{y}" width="{cell}" height="{cell}" fill="rgb{rgb}" stroke="#ffffff"/>'
            )
            if show and p >= 0.005:
                ink = "#ffffff" if shade > 0.5 else "#222222"
                out.append(
                    f'<text x="{x + cell / 2}" y="{y + cell / 2 + 3.5}" text-anchor="middle" '
                    f'fill="{ink}">{f"{p:.2f}".removeprefix("0")}</text>'
                )
    out.append(
        f'<text x="{margin + n * cell / 2}" y="12" text-anchor="middle" fill="#333">'
        f"{html.escape(across)}</text></svg>"
    )
    return "".join(out)


def _exchanges(record: Record) -> list[dict[str, Any]]:
    """Every run with exchange that the record holds, for the table and the pictures."""
    both = record.windows
    found: list[tuple[str, Swaps, Any]] = []
    for key in ("learned", "classical"):
        one = getattr(both, key) if both else None
        if one is not None and one.swaps is not None:
            found.append((f"Exchange, {one.label or key}", one.swaps, one.estimate.get("states")))
    if record.swaps is not None:
        settings = (record.model_extra or {}).get("settings") or {}
        states = [list(s.values()) for s in settings.get("states") or []]
        labels = [s[0] if len(s) == 1 else s for s in states]
        found.append((record.what, record.swaps, labels or None))
    rows = []
    for title, swaps, states in found:
        near = [row[k + 1] for k, row in enumerate((swaps.acceptance or [])[:-1])]
        known = [p for p in near if p is not None]
        trips = swaps.round_trips
        rows.append({
            "title": title, "swaps": swaps,
            "acceptance": f"{min(known):.2f} / {sum(known) / len(known):.2f}" if known else "n/a",
            "trips": f"{sum(trips):,}", "fewest": f"{min(trips):,}" if trips else "n/a",
            "apart": swaps.mixing_time is None,
            "svg": _matrix(swaps.transition, states, f"{title}: moves between states", "next state (λ)"),
        })  # fmt: skip
    return rows


def _image(name: str, figure: Any) -> tuple[str, bytes]:
    """Kind (``"png"`` or ``"svg"``) and bytes of a figure."""
    if isinstance(figure, bytes | bytearray):
        data = bytes(figure)
        if data.startswith(PNG_MAGIC):
            return "png", data
        if data.lstrip().startswith((b"<?xml", b"<svg")):
            return "svg", data
        raise InputError(f"figure {name}: expected PNG or SVG bytes, found {data[:8]!r}...")
    if not hasattr(figure, "savefig"):
        raise InputError(
            f"figure {name}: expected a matplotlib Figure, or PNG or SVG bytes, found "
            f"{type(figure).__name__}."
        )
    buffer = io.BytesIO()
    # Without metadata the same figure gives the same bytes.
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    return "png", buffer.getvalue()


def _aspect(kind: str, image: bytes) -> float:
    """Width over height; 1 where the file does not say."""
    if kind == "png" and len(image) >= 24:
        width, height = struct.unpack(">II", image[16:24])  # of the IHDR chunk, always first
        return float(width / height) if height else 1.0
    return 1.0


def _figures(record: Record, figures: Mapping[str, Any]) -> list[dict[str, str]]:
    order = {name: k for k, name in enumerate(CAPTIONS)}
    out = []
    for name in sorted(figures, key=lambda n: (order.get(n, len(order)), n)):
        kind, image = _image(name, figures[name])
        mime = {"png": "image/png", "svg": "image/svg+xml"}[kind]
        data = base64.b64encode(image).decode("ascii")
        caption = record.captions.get(name) or CAPTIONS.get(name) or name.replace("_", " ")
        wide = "wide" if _aspect(kind, image) > 1.6 else ""
        out.append({"name": name, "src": f"data:{mime};base64,{data}", "caption": caption, "wide": wide})
    return out


# ---------------------------------------------------------------------------------------- page


def render_report(record: Mapping[str, Any], figures: Mapping[str, Any] | None = None) -> str:
    """The page as text.

    Parameters
    ----------
    record : dict
        See :class:`Record`.
    figures : mapping, optional
        name -> matplotlib Figure, or PNG or SVG bytes; :data:`CAPTIONS` knows some names.
        The page draws ``delta_f`` and ``overlap_*`` itself where the record has the numbers.

    Returns
    -------
    str
        HTML that needs no other file and no network.

    Raises
    ------
    InputError
        If the record or a figure is malformed.
    """
    content = check_record(record)
    kT = thermal_energy(content.system.temperature) if content.system else None
    routes = _routes(content, kT)
    headline = None
    if content.headline:
        headline = {
            "method": content.headline.method,
            "meaning": content.headline.meaning,
            "text": _units(content.headline.value, content.headline.error, kT),
        }
    overlaps = []
    for key in ("learned", "classical"):
        one = getattr(content.windows, key) if content.windows else None
        if one is not None:
            title = f"Windows, {one.label or key}"
            svg = _matrix(one.estimate.get("overlap"), one.estimate.get("states"), title)
            if svg:
                overlaps.append({"title": title, "svg": svg})
    forest = _forest(routes)
    # What the page draws itself from the numbers of the record is not shown twice.
    drawn = {"delta_f"} if forest else set()
    drawn |= {"overlap_learned", "overlap_classical"} if overlaps else set()
    filters = {
        "number": _number, "r2": _r2, "duration": _duration,
        "pm": lambda v: "n/a" if v is None else with_error(v.value, v.error),
        "pair": lambda pair: with_error(*pair),
        "relation": lambda text: text.replace("<=", "≤").replace(">=", "≥"),
    }  # fmt: skip
    return (
        page_environment(filters)
        .get_template("report.html.j2")
        .render(
            record=content,
            title=content.title or f"openmm_diffforce: {content.what}",
            verdict=content.overall(),
            headline=headline,
            routes=routes,
            differences=_differences(content, kT),
            forest=forest,
            overlaps=overlaps,
            exchanges=_exchanges(content),
            bridge_names=[n for n in CAPTIONS if n.startswith("bridge_")] if content.bridge else [],
            bridge_rows=[
                row | {"text": _units(row["value"], row["error"], kT)}
                for row in (bridge_readouts(content.bridge) if content.bridge else [])
            ],
            figures=_figures(content, {k: v for k, v in (figures or {}).items() if k not in drawn}),
            raw=_shortened(plain(record)),
        )
    )


def _shortened(value: Any) -> Any:
    """A record for reading: of long lists of numbers only the length."""
    if isinstance(value, dict):
        return {k: _shortened(v) for k, v in value.items()}
    if isinstance(value, list):
        if len(value) > 200 and not any(isinstance(v, list | dict) for v in value):
            return f"{len(value)} values"
        return [_shortened(v) for v in value]
    return value


def write_report(
    record: Mapping[str, Any],
    figures: Mapping[str, Any] | None,
    path: str | os.PathLike[str],
) -> Path:
    """Write :func:`render_report`'s page to a file, whole or not at all.

    Raises
    ------
    InputError
        If the record or a figure is malformed.
    """
    path = Path(path)
    text = render_report(record, figures)
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def save_figures(figures: Mapping[str, Any], folder: str | os.PathLike[str]) -> dict[str, str]:
    """Save figures under ``folder/figures``.

    Parameters
    ----------
    figures : mapping
        name -> matplotlib Figure, or PNG or SVG bytes.
    folder : path-like
        Folder of ``record.json``.

    Returns
    -------
    dict
        name -> path relative to ``folder``: what ``record["figures"]`` holds.
    """
    target = Path(folder) / "figures"
    target.mkdir(parents=True, exist_ok=True)
    out = {}
    for name, figure in figures.items():
        kind, image = _image(name, figure)
        with atomic_path(target / f"{name}.{kind}") as part:
            part.write_bytes(image)
        out[name] = f"figures/{name}.{kind}"
    return out


def _replica_figure(path: Path) -> Any:
    """Drawn from the run's own file: the walks are too long for a record."""
    import numpy as np

    from .analysis import replica_figure

    try:
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as found:
            return replica_figure(found["state"])
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as err:
        raise InputError(f"{path}: expected the walks of an exchange run, found {err}.") from err


def _bridge_figures(bridge: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Drawn from the record's own numbers."""
    from .bridge_figures import figures_of_bridge

    try:
        return figures_of_bridge(bridge)
    except (KeyError, TypeError, ValueError, IndexError) as err:
        raise InputError(
            f"{path}: expected the numbers of a bridge, found {type(err).__name__}: {err}."
        ) from err


def report_from_record(
    record_path: str | os.PathLike[str], path: str | os.PathLike[str] | None = None
) -> Path:
    """Make the page from ``record.json`` and the figures that it names.

    Parameters
    ----------
    record_path : path-like
    path : path-like, optional
        ``report.html`` beside the record if omitted.

    Returns
    -------
    pathlib.Path
        The page.

    Raises
    ------
    InputError
        If the record or one of its figures cannot be read.
    """
    record_path = Path(record_path)
    record = read_json(record_path)
    content = check_record(record)
    figures: dict[str, Any] = {}
    walks = record_path.parent / EXCHANGE_FILE
    if content.swaps is not None and walks.exists():
        figures["replicas"] = _replica_figure(walks)
    if content.bridge is not None and "bridge_plateau" not in content.figures:
        figures |= _bridge_figures(record["bridge"], record_path)
    for name, relative in content.figures.items():
        file = (record_path.parent / relative).resolve()
        if not file.is_relative_to(record_path.parent.resolve()):
            raise InputError(f"figure {name}: expected a file beside the record, found {relative}.")
        try:
            figures[name] = file.read_bytes()
        except OSError as err:
            raise InputError(f"figure {name}: cannot read {file} ({err.strerror}).") from err
    return write_report(record, figures, path or record_path.parent / "report.html")
