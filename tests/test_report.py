"""The page: what it says about a made-up record, and that it needs nothing from outside."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from openmm_diffforce.errors import InputError
from openmm_diffforce.record import make_record, write_json
from openmm_diffforce.report import (
    MINUS,
    check_record,
    render_report,
    report_from_record,
    save_figures,
    with_error,
    write_report,
)
from openmm_diffforce.units import KJ_PER_KCAL, thermal_energy

KT = thermal_energy(300.0)


def an_estimate(method: str, value: float, error: float) -> dict[str, Any]:
    scales = {"kT": 1.0, "kJ/mol": KT, "kcal/mol": KT / KJ_PER_KCAL}
    return {
        "method": method,
        **{unit: {"value": value * s, "error": error * s} for unit, s in scales.items()},
    }


def some_windows(shift: float, label: str) -> dict[str, Any]:
    n = 11
    distance = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    overlap = np.exp(-((distance / 2.2) ** 2))
    overlap /= overlap.sum(axis=1, keepdims=True)
    return {
        "label": label,
        "n_windows": n,
        "length_ps": 100.0,
        "n_steps": 1_320_000,
        "seconds": 93.0,
        "estimate": {
            "states": [k / 10 for k in range(n)],
            "estimates": {
                m: an_estimate(m, -12.09 + shift + d, 0.07 + d)
                for m, d in (("MBAR", 0.0), ("BAR", 0.01), ("TI", 0.03))
            },
            "overlap": overlap.tolist(),
            "min_overlap": 0.153,
            "n_frames": [200] * n,
            "n_decorrelated": [120] * n,
        },
    }


def a_record() -> dict[str, Any]:
    bar = {"delta_f": 0.012, "d_delta_f": 0.006, "overlap": 0.981, "d_overlap": 0.004}
    return {
        "what": "demo",
        "title": "A diffusion model of alanine dipeptide as a force in OpenMM",
        "summary": "A model was fitted to snapshots of two end states, added to OpenMM as a force, "
        "and used to compute the free-energy difference between them.",
        "headline": {
            "method": "MBAR, 11 windows under the learned operator",
            "value": -12.11,
            "error": 0.07,
            "meaning": "Free energy of end state 1 minus that of end state 0.",
        },
        "system": {
            "name": "ACE-ALA-NME",
            "description": "Alanine dipeptide in vacuum; a hydrogen becomes fluorine-like.",
            "n_atoms": 22,
            "temperature": 300.0,
            "force_field": "amber14",
            "perturbation": "F1: HB1 to q -0.22 e, sigma 0.312 nm, epsilon 0.255 kJ/mol",
            "platform": "Reference",
        },
        "sampling": {
            "ends": [
                {"name": f"end state {k}", "n_frames": 3000, "length_ps": 1500.0, "seconds": 14.0}
                for k in (0, 1)
            ]
        },
        "fit": {
            "n_train": 6000,
            "n_test": 2000,
            "cpu_seconds": 21.4,
            "levels": [
                {"sigma_nm": s, "force_r2": f, "action_r2": a, "operator_r2": o}
                for s, f, a, o in (
                    (0.0, 0.9971, 0.981, 0.9993),
                    (0.005, 0.982, None, 0.98),
                    (0.02, 0.93, None, 0.951),
                )
            ],
        },
        "artefact": {"file": "model.diffforce", "sha256": "ab" * 32, "bytes": 81234},
        "windows": {
            "learned": some_windows(-0.02, "learned operator"),
            "classical": some_windows(0.0, "classical operator"),
        },
        "paired": {
            "learned": {"value": -12.08, "error": 0.06},
            "classical": {"value": -12.09, "error": 0.06},
            "difference": {"value": 0.012, "error": 0.003},
            "n_frames": 1320,
        },
        "end_correction": {
            "learned": an_estimate("MBAR", -12.11, 0.07),
            "correction_0": None,
            "correction_1": bar,
            "corrected": an_estimate("MBAR + end correction", -12.098, 0.07),
            "min_overlap": 0.981,
        },
        "base_action": {
            "length_ps": 200.0,
            "jsd": 0.031,
            "jsd_baseline": 0.024,
            "temperature_conf": {"value": 301.2, "error": 1.9},
            "wall_fraction": 0.002,
            "nve_drift": {"learned": {"value": 0.4, "error": 0.1}, "classical": {"value": 0.5, "error": 0.1}},
        },
        "checks": [
            {
                "name": "paired difference learned - classical",
                "value": 0.012,
                "threshold": "at most 0.05 kT",
                "status": "PASS",
                "advice": "More training frames.",
            },
            {
                "name": "phi/psi divergence",
                "value": float("nan"),
                "threshold": "at most 0.02 nats",
                "status": "WARN",
                "advice": "Run longer: the demonstration is short.",
            },
        ],
        "provenance": make_record("demo", {"n_frames": 3000, "seed": 1}, seed=1),
        "timing": {"sampling": 28.0, "fit": 21.0, "learned_windows": 93.0},
    }


def some_figures() -> dict[str, Any]:
    out = {}
    generator = np.random.default_rng(0)
    for name in ("phi_psi", "operator"):
        figure, axes = plt.subplots(figsize=(4, 3.4), layout="constrained")
        axes.plot(*generator.normal(size=(2, 400)), ".", ms=3)
        axes.set(xlabel="x", ylabel="y")
        out[name] = figure
        plt.close(figure)
    return out


class Page(HTMLParser):
    """Collects text, and holds that every tag is closed in order and nothing points outside."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href"):
                assert (value or "").startswith("data:"), value
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_page_says_what_the_record_holds() -> None:
    text = Page(render_report(a_record(), some_figures())).text
    assert f"{MINUS}12.110 ± 0.070 kT" in text
    assert f"{MINUS}30.21 ± 0.17 kJ/mol" in text
    assert f"{MINUS}7.220 ± 0.042 kcal/mol" in text
    assert "1 of 2 checks gave a warning." in text
    assert "overlap with the classical end 0.981" in text
    assert "0.2 combined standard errors" in text
    assert "0.9971" in text
    assert "301.2 ± 1.9 K" in text


def test_page_needs_nothing_from_outside() -> None:
    text = render_report(a_record(), some_figures())
    without_namespace = text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|url\(|<script|@import", without_namespace)
    assert text.count("data:image/png;base64,") == 2


@pytest.mark.parametrize(
    "missing",
    [k for k in a_record() if k != "what"],
)
def test_every_section_may_be_absent(missing: str) -> None:
    record = a_record()
    del record[missing]
    Page(render_report(record))


def test_the_smallest_record() -> None:
    assert "Nothing was checked." in Page(render_report({"what": "demo"})).text


def test_text_is_escaped() -> None:
    record = a_record() | {"title": "<script>alert(1)</script>"}
    record["windows"]["learned"]["label"] = "<b>&"
    record["windows"]["learned"]["estimate"]["states"] = ["<i>"] * 11
    assert "<script" not in render_report(record)
    Page(render_report(record))


def test_a_failed_check_fails_the_page() -> None:
    record = a_record()
    record["checks"][0]["status"] = "FAIL"
    assert check_record(record).overall().status == "FAIL"
    record["verdict"] = {"status": "PASS", "text": "as the author says"}
    assert check_record(record).overall().text == "as the author says"


def test_malformed_records_are_refused() -> None:
    record = a_record()
    record["checks"][0]["status"] = "GOOD"
    with pytest.raises(InputError, match=r"checks\.0\.status"):
        render_report(record)
    with pytest.raises(InputError, match=r"expected the record\.json of a demonstration or a run"):
        render_report({"force_r2": 0.9})
    with pytest.raises(InputError, match="expected PNG or SVG bytes"):
        render_report(a_record(), {"a": b"GIF89a"})
    with pytest.raises(InputError, match="expected a matplotlib Figure"):
        render_report(a_record(), {"a": 3})


def test_svg_figures(tmp_path: Path) -> None:
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"></svg>'
    assert save_figures({"a": svg}, tmp_path) == {"a": "figures/a.svg"}
    assert "data:image/svg+xml;base64," in render_report({"what": "demo"}, {"a": svg})


def test_from_file(tmp_path: Path) -> None:
    record = a_record()
    record["figures"] = save_figures(some_figures(), tmp_path)
    write_json(tmp_path / "record.json", record)
    page = report_from_record(tmp_path / "record.json")
    assert page == tmp_path / "report.html"
    direct = write_report(
        json.loads((tmp_path / "record.json").read_text()), some_figures(), tmp_path / "b.html"
    )
    assert page.read_bytes() == direct.read_bytes()


def test_from_file_with_a_missing_or_foreign_figure(tmp_path: Path) -> None:
    write_json(tmp_path / "record.json", {"what": "demo", "figures": {"a": "figures/a.png"}})
    with pytest.raises(InputError, match="figure a: cannot read"):
        report_from_record(tmp_path / "record.json")
    write_json(tmp_path / "record.json", {"what": "demo", "figures": {"a": "../a.png"}})
    with pytest.raises(InputError, match="beside the record"):
        report_from_record(tmp_path / "record.json")


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1.0, 0.5, "1.00 ± 0.50"),
        (1.0, 12.0, "1 ± 12"),
        (-0.5, 0.0009, f"{MINUS}0.50000 ± 0.00090"),
        (None, 0.1, "n/a"),
        (2.0, float("nan"), "2.00"),
        (2.0, 0.0, "2.00"),
    ],
)
def test_with_error(value: float | None, error: float, text: str) -> None:
    assert with_error(value, error) == text


def some_swaps() -> dict[str, Any]:
    from openmm_diffforce.swaps import swap_statistics

    rng = np.random.default_rng(1)
    states = rng.permuted(np.tile(np.arange(11), (60, 1)), axis=1)
    counts = np.full((11, 11), 50)
    return swap_statistics(states, 11, proposed=counts, accepted=counts // 4).to_dict()


def test_exchange_has_its_section() -> None:
    record = a_record()
    assert "Exchange between states" not in render_report(record)
    record["windows"]["learned"]["swaps"] = swaps = some_swaps()
    page = render_report(record)
    assert "Exchange between states" in page
    assert "0.24 / 0.24" in page
    assert f"{sum(swaps['round_trips']):,}</td>" in page
    swaps["mixing_time"] = None
    assert "states never met" in render_report(record)


def test_record_of_an_exchange_run_is_a_page(tmp_path: Path) -> None:
    from .test_exchange import run

    run(tmp_path)
    page = report_from_record(tmp_path / "record.json").read_text()
    assert "Exchange between states" in page
    assert "Replicas on their way" in page
    (tmp_path / "exchange.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match="walks"):
        report_from_record(tmp_path / "record.json")
