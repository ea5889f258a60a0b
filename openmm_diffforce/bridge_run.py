"""The noisy operator bridge as a job: settings in, ``bridge.json`` and a page out."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .alchemy import EndStatePair
from .audit import Audit, Gate, audit_bridge
from .bridge import BridgeResult, noisy_operator_bridge
from .bridge_inputs import (
    BridgeInputs,
    inputs_from_arrays,
    inputs_from_run,
    inputs_from_systems,
    inputs_from_table,
    noised_atoms,
)
from .config import BridgeSettings, ProjectSettings, load_bridge, read_system
from .constants import BRIDGE_FILE
from .errors import InputError, PoorOverlapError
from .estimate import Estimate, bar_between
from .legs import Leg
from .posterior_bridge import run_posterior_bridge
from .posterior_work import PosteriorBridge
from .project import ENDS_DIR
from .record import make_record, read_json, write_json
from .report import Record, check_record, report_from_record
from .systems import require_unconstrained

Progress = Callable[[str, int, int], None]
"""(what, done, in all)"""

METHOD = "noisy operator bridge"

INPUT_KEYS = frozenset({"system", "u_nk", "run", "arrays", "topology", "trajectories", "out"})
"""Settings that are paths: the record has the files' hashes instead."""


@dataclass(frozen=True)
class BridgeRun:
    """What :func:`run_bridge` returns.

    Attributes
    ----------
    inputs : BridgeInputs
    result : BridgeResult
    spot : PosteriorBridge or None
        The check by posterior MD, where it was asked for.
    audit : Audit
    record : pathlib.Path
        ``bridge.json``; the page lies beside it.
    page : pathlib.Path
    """

    inputs: BridgeInputs
    result: BridgeResult
    spot: PosteriorBridge | None
    audit: Audit
    record: Path
    page: Path


def bridge_settings(source: str | os.PathLike[str]) -> BridgeSettings:
    """Settings from what a user points at.

    Parameters
    ----------
    source : path-like
        YAML file of a bridge; project file, whose sampled end states are taken; or folder of a run of
        lambda windows.

    Raises
    ------
    InputError
        If it is none of these.
    """
    source = Path(source)
    if source.is_dir():
        return BridgeSettings(run=source)
    settings = load_bridge(source)
    if isinstance(settings, BridgeSettings):
        return settings
    return _of_project(settings)


def _of_project(project: ProjectSettings) -> BridgeSettings:
    parts = read_system(project.system, project.topology, project.temperature, project.restrain_phi)
    if parts.pair is None:
        raise InputError("bridge: expected two end states, found one System; there is nothing between.")
    atoms = project.fit.sites if project.fit.sites is not None else noised_atoms(parts.pair)
    return BridgeSettings(
        run=project.out_dir / ENDS_DIR, temperature=project.temperature, atoms=atoms, seed=project.seed,
        out=project.out_dir / "bridge",
    )  # fmt: skip


def _pair(settings: BridgeSettings) -> EndStatePair:
    assert settings.system is not None
    parts = read_system(settings.system, settings.topology, settings.temperature or 300.0)
    if parts.pair is None:
        raise InputError("system: expected two end states, found one System; there is nothing between.")
    return parts.pair


def _spot_pair(settings: BridgeSettings, inputs: BridgeInputs) -> EndStatePair:
    """End states for the spot check, checked before the bridge is computed."""
    kept = inputs.frames[0].shape[1]
    if kept != inputs.n_atoms:
        raise InputError(
            f"spot: expected frames with all {inputs.n_atoms} atoms, found {kept} kept near the noised ones; "
            "call run_posterior_bridge with atoms= for a large system, and remove this key."
        )
    pair = _pair(settings)
    require_unconstrained(pair.system_0, name="spot")
    return pair


def read_inputs(settings: BridgeSettings, *, progress: Progress | None = None) -> BridgeInputs:
    """Frames and operators that the settings name.

    Parameters
    ----------
    settings : BridgeSettings
    progress : callable, optional
        Called as ("reading frames", frames done, frames in all).

    Raises
    ------
    DiffForceError
        For files that are missing or do not belong together.
    """
    report = progress

    def count(done: int, total: int) -> None:
        if report is not None:
            report("reading frames", done, total)

    common: dict[str, Any] = {"atoms": settings.atoms, "skip": settings.skip, "stride": settings.stride}
    if settings.arrays is not None:
        return inputs_from_arrays(settings.arrays, temperature=settings.temperature or 300.0, **common)
    if settings.run is not None:
        found = inputs_from_run(settings.run, progress=count, **common)
    elif settings.u_nk is not None:
        assert settings.trajectories is not None
        assert settings.topology is not None
        found = inputs_from_table(
            settings.u_nk, settings.trajectories, settings.topology, progress=count, **common
        )
    else:
        assert settings.trajectories is not None
        return inputs_from_systems(
            _pair(settings), settings.trajectories, lams=settings.lams, topology=settings.topology,
            progress=count, **common,
        )  # fmt: skip
    if settings.temperature is not None and abs(settings.temperature - found.temperature) > 1e-6:
        raise InputError(
            f"temperature: expected {found.temperature:g} K, which u_nk says, found "
            f"{settings.temperature:g} K; remove this key."
        )
    return found


def run_bridge(
    settings: BridgeSettings, *, insist: bool = False, progress: Progress | None = None
) -> BridgeRun:
    """Read, bridge, judge, and write ``bridge.json`` and ``report.html``.

    Parameters
    ----------
    settings : BridgeSettings
    insist : bool
        Show the number as the page's headline even where the audit fails.
    progress : callable, optional
        Called as (what, done, in all): "reading frames", "noise levels", "posterior MD".

    Returns
    -------
    BridgeRun

    Raises
    ------
    DiffForceError
        From reading, the bridge or writing.
    """
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise InputError(f"out: expected a folder that can be made, found {err}.") from err
    timing: dict[str, float] = {}
    started = time.monotonic()
    inputs = read_inputs(settings, progress=progress)
    pair = _spot_pair(settings, inputs) if settings.spot else None
    timing["reading"] = time.monotonic() - started
    started = time.monotonic()
    report = progress

    def stage(what: str) -> Callable[[int, int], None] | None:
        return None if report is None else lambda done, total: report(what, done, total)

    result = noisy_operator_bridge(
        inputs.frames, inputs.operators, inputs.lams, generator=np.random.default_rng(settings.seed),
        atoms=inputs.atoms, sigmas=settings.sigmas, closure=settings.closure, summary=settings.summary,
        n_copies=settings.n_copies, n_bootstrap=settings.n_bootstrap,
        progress=stage("noise levels"),
    )  # fmt: skip
    timing["bridge"] = time.monotonic() - started
    spot = None
    if pair is not None:
        started = time.monotonic()
        spot = run_posterior_bridge(
            pair, inputs.frames[0], inputs.frames[-1], settings.spot_sigma, n_y=settings.spot,
            seed=settings.seed, progress=stage("posterior MD"),
        )  # fmt: skip
        timing["posterior MD"] = time.monotonic() - started
    audit = audit_bridge(result, spot=spot)
    record = bridge_record(inputs, result, audit, spot=spot, insist=insist) | {
        "provenance": make_record(
            "bridge", settings.model_dump(exclude=set(INPUT_KEYS)), seed=settings.seed, files=inputs.files
        ),
        "timing": timing,
    }
    path = settings.out / BRIDGE_FILE
    write_json(path, record)
    return BridgeRun(inputs, result, spot, audit, path, report_from_record(path))


def bridge_record(
    inputs: BridgeInputs,
    result: BridgeResult,
    audit: Audit,
    *,
    spot: PosteriorBridge | None = None,
    insist: bool = False,
) -> dict[str, Any]:
    """The record of a bridge, as :class:`~openmm_diffforce.report.Record` takes it.

    A FAIL leaves the headline out unless ``insist``; the number stays in the section ``bridge``.
    """
    withheld = audit.verdict == "FAIL" and not insist
    n = len(inputs.lams) - 2
    noised = ", ".join(inputs.noised[:8]) + (f" and {len(inputs.noised) - 8} more" * (len(inputs.noised) > 8))
    molecule = inputs.frames[0].ndim == 3
    what = f"{inputs.n_atoms:,} atoms" if molecule else f"{inputs.n_atoms} coordinates"
    record: dict[str, Any] = {
        "what": "bridge",
        "title": "Free energy between two end states",
        "summary": "From frames of the end states"
        + (f" and {n} window{'s' * (n > 1)} between them" if n else " alone")
        + ", without the ladder of simulations between them that is usual: the frames are blurred by noise "
        "until the states overlap, and the difference in free energy of the blurred states, which is the "
        "same, is measured. An audit says whether to believe it.",
        "verdict": {"status": audit.verdict, "text": verdict_text(audit, withheld=withheld)},
        "system": {
            "name": f"{what}; noise on {noised}", "temperature": inputs.temperature,
        },
        "bridge": bridge_section(inputs, result),
        "checks": audit.to_dict()["checks"],
    }  # fmt: skip
    if spot is not None:
        record["bridge"]["posterior"] = {
            "delta_f": spot.delta_f, "d_delta_f": spot.d_delta_f, "sigma": spot.sigma,
            "overlap": spot.overlap, "n_y": len(spot.work[0]), "n_forces": spot.n_forces,
        }  # fmt: skip
    if not withheld:
        record["headline"] = {
            "method": METHOD, "value": result.delta_f, "error": result.d_delta_f,
            "meaning": "reduced free energy of end state 1 less that of end state 0, with one standard error",
        }  # fmt: skip
    return record


def bridge_section(inputs: BridgeInputs, result: BridgeResult) -> dict[str, Any]:
    """``BridgeResult.to_dict()`` with plain BAR beside it; the work to 0.001 kT."""
    section = result.to_dict() | {"bar": _plain_bar(inputs), "noised": list(inputs.noised)}
    for name in ("work_forward", "work_reverse"):
        section[name] = np.round(getattr(result, name), 3).tolist()
    return section


def _plain_bar(inputs: BridgeInputs) -> dict[str, Any] | None:
    """BAR between neighbouring states without noise: the limit of small sigma."""
    value, variance, overlap = 0.0, 0.0, 1.0
    for k in range(len(inputs.lams) - 1):
        step = inputs.lams[k + 1] - inputs.lams[k]
        try:
            one = bar_between(step * inputs.operators[k], -step * inputs.operators[k + 1], min_overlap=0)
        except (PoorOverlapError, InputError):
            return None
        value, variance = value + one.delta_f, variance + one.d_delta_f**2
        overlap = min(overlap, one.overlap)
    return {"delta_f": value, "d_delta_f": float(np.sqrt(variance)), "overlap": overlap}


def verdict_text(audit: Audit, *, withheld: bool) -> str:
    """The audit in a sentence or two, for someone who reads nothing else."""
    n = len(audit.gates)
    bad = [g for g in audit.gates if g.status == audit.verdict]
    if audit.verdict == "PASS":
        return f"All {n} checks passed: nothing speaks against this number and its error."
    names = "; ".join(g.name for g in bad[:3]) + ("; ..." if len(bad) > 3 else "")
    advice = bad[0].advice
    if audit.verdict == "WARN":
        return (
            f"{len(bad)} of {n} checks gave a warning ({names}): use the number with care. Advice: {advice}."
        )
    kept = "It is not shown for that reason" if withheld else "It is shown because you insisted"
    return f"{len(bad)} of {n} checks failed ({names}): do not use the number. {kept}. Advice: {advice}."


def read_bridge(path: str | os.PathLike[str]) -> Record:
    """The record that :func:`run_bridge` wrote.

    Parameters
    ----------
    path : path-like
        ``bridge.json``, or its folder.

    Raises
    ------
    InputError
        If it is not the record of a bridge.
    """
    path = Path(path)
    path = path / BRIDGE_FILE if path.is_dir() else path
    record = check_record(read_json(path))
    if record.what != "bridge" or record.bridge is None or record.system is None or not record.checks:
        raise InputError(
            f"{path}: expected the result of diffforce bridge, found a record of {record.what!r}."
        )
    return record


def audit_of(record: Record) -> Audit:
    """The audit that a record holds."""
    return Audit(
        tuple(
            Gate(c.name, float("nan") if c.value is None else float(c.value), c.threshold, c.status, c.advice)
            for c in record.checks
        )
    )


def read_leg(path: str | os.PathLike[str]) -> Leg:
    """One leg of a cycle, from the result of a bridge.

    Raises
    ------
    InputError
        As :func:`read_bridge`.
    """
    record = read_bridge(path)
    assert record.bridge is not None
    assert record.system is not None
    value, error = record.bridge.delta_f, record.bridge.d_delta_f
    if value is None or error is None:
        raise InputError(f"{path}: expected Delta f with its error, found none.")
    return Leg(str(path), Estimate(METHOD, value, error, record.system.temperature), audit_of(record).verdict)
