"""Gates: whether to believe a free energy. A number, a threshold, a status, one sentence of advice.

All thresholds are in :data:`GATES` (density of the operator), :data:`BRIDGE_GATES`, :data:`SPOT_GATES`
(posterior MD beside the bridge) and :data:`LABEL_GATES`.
A FAIL of any gate is a FAIL of the number.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from .bridge import BridgeResult
from .density import OperatorDensity, fit_operator_density
from .errors import InputError
from .estimate import MIN_OVERLAP, bar_between
from .labels import LabelReadout
from .posterior_work import PosteriorBridge

Status = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Threshold:
    """PASS up to ``good``, FAIL beyond ``bad``, WARN between; where larger is better the other way round."""

    good: float
    bad: float
    advice: str
    larger_is_better: bool = False


GATES: dict[str, Threshold] = {
    "stated error [kT]": Threshold(
        0.5, 1.0, "the states are too far apart for what was sampled: sample longer, or add a window"
    ),
    "spread over coordinates [kT]": Threshold(
        0.25, 0.5, "the gap between the states is bridged by an assumption: add a window"
    ),
    "independent frames per state": Threshold(
        100.0, 20.0, "the least sampled state decides: sample it longer", larger_is_better=True
    ),
    "chi2 of the states": Threshold(
        1.8, 2.5, "the states are not tilts of one density: look for windows that are not in equilibrium"
    ),
    "first half against second half [SE]": Threshold(
        2.0, 4.0, "the halves of the runs disagree: something relaxes; equilibrate and sample longer"
    ),
    "density against BAR [SE]": Threshold(
        2.0, 4.0, "where states overlap BAR needs no assumption: use BAR, and look at the histograms of O"
    ),
}
"""Gates of Delta f from the density of the operator."""

BRIDGE_GATES: dict[str, Threshold] = {
    "stated error [kT]": Threshold(1.0, 2.0, "sample the ends longer, or add a window between them"),
    "independent frames per state": Threshold(
        100.0, 20.0, "the least sampled state decides: sample it longer", larger_is_better=True
    ),
    "overlap of the noised ends": Threshold(
        0.1, 0.03, "the noised ends hardly meet: larger noise, or a window between", larger_is_better=True
    ),
    "overlap above one": Threshold(
        0.05, 0.2, "overlap cannot exceed one: the work contradicts the frames; add a window between"
    ),
    "noise plateau [kT]": Threshold(
        0.5, 1.0, "Delta f moves with the noise: no level can be trusted; add a window between"
    ),
    "spread over folds [kT]": Threshold(
        0.75, 1.5, "parts of the runs disagree: something relaxes; equilibrate and sample longer"
    ),
    "spread over models [kT]": Threshold(
        0.25, 0.5, "the gap between the ends is bridged by an assumption: add a window"
    ),
    "spread over closures [kT]": Threshold(
        2.0, 4.0, "the shape of the conditional law decides: add a window between"
    ),
    "normal score of O, |mean square - 1|": Threshold(
        0.25, 0.5, "O does not follow its predicted law on frames left out: look for outliers and drift"
    ),
    "inverted bracket": Threshold(
        0.01, 0.05, "at equal y, O is larger at the last state than at the first: wrong sign or wrong frames"
    ),
    "bridge against density of O [SE]": Threshold(
        1.5, 3.0, "with and without noise the answers differ: something relaxes, or O and frames do not match"
    ),
    "chi2 of the states": Threshold(
        1.8, 2.5, "the states are not tilts of one density: look for states that are not in equilibrium"
    ),
    "independent frames in the overlap": Threshold(
        20.0,
        5.0,
        "few frames are where the noised ends meet: larger noise, longer runs",
        larger_is_better=True,
    ),
    "hysteresis [kT]": Threshold(
        8.0,
        20.0,
        "forward and reverse averages differ: the noised ends hardly meet; larger noise, or a window",
    ),
    "normalisation [kT]": Threshold(
        4.0, 10.0, "the mean of exp(-work) is far from exp(-Delta f): larger noise, or a window between"
    ),
}
"""Gates of the noisy operator bridge."""

SPOT_GATES: dict[str, Threshold] = {
    "posterior MD: Delta f [kT]": Threshold(
        0.5, 1.5, "posterior MD, which has no model, finds another number: add a window, or take its number"
    ),
    "posterior MD: Delta f outside the mean works [kT]": Threshold(
        0.5, 1.5, "Delta f must lie between the mean works at the noised frames of the two ends"
    ),
    "posterior MD: stated error [kT]": Threshold(
        0.75, 1.5, "the spot check sees no better than this: take more noised frames, or longer posteriors"
    ),
    "posterior MD: overlap of the noised ends": Threshold(
        0.1, 0.03, "the spot check's noised ends hardly meet: larger noise", larger_is_better=True
    ),
    "posterior MD: work by two closures [kT]": Threshold(
        0.5, 1.0, "the works depend on how lambda is integrated: more lambdas, or longer posteriors"
    ),
}
"""Gates of the bridge held to posterior MD; the last three judge the spot check itself."""


LABEL_GATES: dict[str, Threshold] = {
    "independent frames per end": Threshold(
        100.0, 20.0, "the less sampled end decides: sample it longer", larger_is_better=True
    ),
    "overlap of the ends": Threshold(
        0.1, 0.03, "labels cannot tell how far apart the ends are: add an end between", larger_is_better=True
    ),
    "contested frames": Threshold(
        100.0,
        20.0,
        "too few frames are in doubt, and they fix the size of g: sample longer, or take closer ends",
        larger_is_better=True,
    ),
    "gain over chance [SE]": Threshold(
        4.0,
        2.0,
        "the features do not see the labels: the ends are alike, or other features are needed",
        larger_is_better=True,
    ),
    "calibration of the logit, |slope - 1|": Threshold(
        0.15, 0.4, "the size of g is not what held-out labels say: more frames, or fewer features"
    ),
    "stated error [kT]": Threshold(0.25, 0.5, "sample longer"),
    "spread over folds [kT]": Threshold(
        0.25, 0.5, "parts of the runs disagree: something relaxes; equilibrate and sample longer"
    ),
    "clean against extrapolated [kT]": Threshold(
        0.5, 1.0, "the curve does not lead to its clean end: less noise, or features that bend less"
    ),
    "spread of anchors [kT]": Threshold(
        0.5, 1.0, "O - g differs between anchors: the labels taught another operator (or give two anchors)"
    ),
}
"""Gates of a readout from labels; the last two where there is a curve, and where there are anchors."""


@dataclass(frozen=True)
class Gate:
    """One gate, judged.

    Attributes
    ----------
    name : str
        A key of its table of gates.
    value : float
    threshold : str
    status : str
        PASS, WARN or FAIL.
    advice : str
        Empty for a PASS.
    """

    name: str
    value: float
    threshold: str
    status: Status
    advice: str


@dataclass(frozen=True)
class Audit:
    """Gates and their verdict."""

    gates: tuple[Gate, ...]

    @property
    def verdict(self) -> Status:
        """The worst status of all gates."""
        found = {g.status for g in self.gates}
        return "FAIL" if "FAIL" in found else "WARN" if "WARN" in found else "PASS"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the gates as the report takes its checks."""
        return {"verdict": self.verdict, "checks": [asdict(g) for g in self.gates]}


def judge(name: str, value: float, *, gates: Mapping[str, Threshold] = GATES, more_advice: str = "") -> Gate:
    """Hold a number to its gate.

    Parameters
    ----------
    name : str
        A key of ``gates``.
    value : float
        A number that is not finite fails.
    gates : mapping of str to Threshold
    more_advice : str
        Added to the gate's own.

    Raises
    ------
    InputError
        If there is no such gate.

    Examples
    --------
    >>> judge("stated error [kT]", 0.7).status
    'WARN'
    """
    if name not in gates:
        raise InputError(f"gate: expected one of {', '.join(gates)}; found {name!r}.")
    gate = gates[name]
    sign = -1.0 if gate.larger_is_better else 1.0
    status: Status = "FAIL"
    if math.isfinite(value):
        if sign * value <= sign * gate.good:
            status = "PASS"
        elif sign * value <= sign * gate.bad:
            status = "WARN"
    relation = ">=" if gate.larger_is_better else "<="
    advice = "" if status == "PASS" else gate.advice + more_advice
    return Gate(name, float(value), f"{relation} {gate.good:g}", status, advice)


def audit_density(
    found: OperatorDensity, operators: Sequence[Any], lams: Sequence[float] = (0.0, 1.0)
) -> Audit:
    """Judge a :func:`fit_operator_density` by the frames that it came from.

    Parameters
    ----------
    found : OperatorDensity
    operators, lams
        As given to :func:`fit_operator_density`.

    Returns
    -------
    Audit
        BAR is asked only where all neighbouring states overlap; the halves only where each has
        frames enough for a fit of its own.

    Notes
    -----
    Smoothness in the gap cannot be tested from the frames; the gates see what depends on it (the
    stated error and the spread over coordinates), not whether it is true. Deterministic.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> o = [rng.normal(2.0, 2.0, 500), rng.normal(-2.0, 2.0, 500)]
    >>> audit_density(fit_operator_density(o), o).verdict
    'PASS'
    """
    series = [np.asarray(o, dtype=np.float64) for o in operators]
    place = f" (one at lambda {found.next_lam:.2g} tells most)"
    gates = [
        judge("stated error [kT]", found.d_delta_f, more_advice=place),
        judge("spread over coordinates [kT]", found.d_models, more_advice=place),
        judge(
            "independent frames per state",
            min(n / g for n, g in zip(found.n_frames, found.inefficiency, strict=True)),
        ),
        judge("chi2 of the states", float(found.chi2.max())),
    ]
    try:
        first, second = (
            fit_operator_density(
                [o[half * len(o) // 2 : (half + 1) * len(o) // 2] for o in series],
                lams, inefficiency=found.inefficiency, n_lam=3,
            )
            for half in (0, 1)
        )  # fmt: skip
    except InputError:
        pass  # too few frames to halve: the gate on frames says so
    else:
        error = math.hypot(first.d_delta_f, second.d_delta_f)
        gap = abs(first.delta_f - second.delta_f)
        gates.append(judge("first half against second half [SE]", gap / error if error > 0 else 0.0))
    bars = []
    for k in range(len(series) - 1):
        step = lams[k + 1] - lams[k]
        bars.append(bar_between(step * series[k], -step * series[k + 1], min_overlap=0))
    if min(b.overlap for b in bars) >= MIN_OVERLAP:
        covered = np.interp([lams[0], lams[-1]], found.lam, found.f_lam)
        miss = abs(float(covered[1] - covered[0]) - sum(b.delta_f for b in bars))
        error = math.sqrt(sum(b.d_delta_f**2 for b in bars))
        gates.append(judge("density against BAR [SE]", miss / error if error > 0 else 0.0))
    return Audit(tuple(gates))


def spot_check(found: BridgeResult, spot: PosteriorBridge) -> tuple[Gate, ...]:
    r"""Hold a bridge to posterior MD, which knows the work at single noised frames without a model.

    What is held to what:

    - Delta f: it is the same at every noise level and for every kernel, so that the two numbers compare
      whatever the ``sigma`` and the ``atoms`` of the posterior MD. The same level
      (``found.level.sigma``) checks the bridge where it claims to know. The gate is their difference
      beyond its standard error.
    - Both ends: without a model, :math:`\langle\Delta S\rangle_1 \le \Delta f \le \langle\Delta
      S\rangle_0` over the noised frames of end 1 and of end 0. The gate is how far the bridge's
      Delta f lies outside, beyond two standard errors of that mean.

    Single works do not compare: the bridge's is that of a bin b of a summary,
    :math:`e^{-\Delta S(b)} = E_0[e^{-\Delta S(y)}|b]`, the posterior's that of one y.

    Parameters
    ----------
    found : BridgeResult
    spot : PosteriorBridge
        :func:`openmm_diffforce.posterior_bridge.run_posterior_bridge` of frames of the same ends.

    Returns
    -------
    tuple of Gate
        The last three judge the spot check: a blind one must not pass a bridge. Works by BAR
        (or the density) and by Tweedie are compared where both were made.

    Notes
    -----
    NOT checked: that ``spot`` is of the same two ends. Its y come from the same frames as the bridge's,
    as a rule: a basin that the frames never saw is missing in both. Deterministic.
    """
    error = math.hypot(found.d_delta_f, spot.d_delta_f)
    below = spot.bound_lower - 2.0 * spot.d_bound_lower - found.delta_f
    above = found.delta_f - spot.bound_upper - 2.0 * spot.d_bound_upper
    values = {
        "posterior MD: Delta f [kT]": max(abs(found.delta_f - spot.delta_f) - error, 0.0),
        "posterior MD: Delta f outside the mean works [kT]": max(below, above, 0.0),
        "posterior MD: stated error [kT]": spot.d_delta_f,
        "posterior MD: overlap of the noised ends": spot.overlap,
    }
    if len(spot.closures) > 1:
        values["posterior MD: work by two closures [kT]"] = float(np.ptp(list(spot.closures.values())))
    return tuple(judge(name, value, gates=SPOT_GATES) for name, value in values.items())


def audit_bridge(found: BridgeResult, *, spot: PosteriorBridge | None = None) -> Audit:
    """Judge a :func:`~openmm_diffforce.bridge.noisy_operator_bridge` by what it saw of itself.

    Parameters
    ----------
    found : BridgeResult
    spot : PosteriorBridge, optional
        Posterior MD between the same ends: its gates (:func:`spot_check`) are added.

    Returns
    -------
    Audit
        Of the chosen noise level, and of the curve around it.

    Notes
    -----
    The last two gates are of exponential averages, which BAR does not use: they are wide, since right
    numbers of ends far apart show several kT there. A single noise level has no plateau to ask for.
    How smooth the conditional density is where no state was sampled cannot be tested from the frames;
    the gates see what depends on it. Thresholds were set on half of the runs of
    ``benchmarks/bridge.py`` and are counted there on the other half. Deterministic.

    Examples
    --------
    >>> from openmm_diffforce.bridge import noisy_operator_bridge
    >>> rng = np.random.default_rng(0)
    >>> x = [rng.normal(0.0, 1.0, (400, 1)), rng.normal(1.5, 1.0, (400, 1))]
    >>> o = [1.125 - 1.5 * v[:, 0] for v in x]
    >>> audit_bridge(noisy_operator_bridge(x, o, generator=rng, inefficiency=[1, 1])).verdict
    'PASS'
    """
    level = found.level
    independent = [n / g for n, g in zip(found.n_frames, found.inefficiency, strict=True)]
    closures = [level.closures[k] for k in ("density", "tweedie", "gamma") if k in level.closures]
    error = math.hypot(found.d_delta_f, found.density.d_delta_f)
    values = {
        "stated error [kT]": found.d_delta_f,
        "independent frames per state": min(independent),
        "overlap of the noised ends": level.overlap,
        "overlap above one": max(level.overlap - 1.0, 0.0),
        "noise plateau [kT]": found.plateau,
        "spread over folds [kT]": level.d_folds,
        "spread over models [kT]": level.d_models,
        "spread over closures [kT]": float(np.ptp(closures)),
        "normal score of O, |mean square - 1|": max(abs(c - 1.0) for c in level.calibration),
        "inverted bracket": level.inverted,
        "bridge against density of O [SE]": abs(found.delta_f - found.density.delta_f) / error,
        "chi2 of the states": float(found.density.chi2.max()),
        "independent frames in the overlap": level.overlap * min(independent),
        "hysteresis [kT]": abs(level.exp_forward - level.exp_reverse),
        "normalisation [kT]": max(abs(level.normalisation) - 2.0 * level.d_normalisation, 0.0),
    }
    if len(found.levels) == 1:
        del values["noise plateau [kT]"]
    gates = tuple(judge(name, value, gates=BRIDGE_GATES) for name, value in values.items())
    return Audit(gates if spot is None else (*gates, *spot_check(found, spot)))


def audit_labels(found: LabelReadout) -> Audit:
    """Judge a :func:`openmm_diffforce.labels.fit_labels` by what it saw of itself.

    Parameters
    ----------
    found : LabelReadout

    Returns
    -------
    Audit
        The curve is asked where there are two noised levels, anchors where there are any; a single
        anchor has no spread, and fails.

    Notes
    -----
    Whether the features can represent the operator shows in the anchors only, and only if they are
    spread over both ends. Deterministic.

    Examples
    --------
    >>> from openmm_diffforce.labels import fit_labels
    >>> rng = np.random.default_rng(0)
    >>> ends = rng.normal(0, 1, (2000, 1)), rng.normal(-2, 1, (2000, 1))
    >>> audit_labels(fit_labels(*ends, generator=rng)).verdict
    'PASS'
    """
    values = {
        "independent frames per end": min(
            n / g for n, g in zip(found.n_frames, found.inefficiency, strict=True)
        ),
        "overlap of the ends": found.overlap,
        "contested frames": found.contested,
        "gain over chance [SE]": found.gain / found.d_gain if found.d_gain > 0 else 0.0,
        "calibration of the logit, |slope - 1|": abs(found.calibration - 1),
        "stated error [kT]": found.d_centered,
        "spread over folds [kT]": float(np.std(found.fold_centered, ddof=1)),
    }
    if found.extrapolated is not None:
        clean = found.centered, found.scale
        values["clean against extrapolated [kT]"] = float(
            np.abs(np.subtract(found.extrapolated, clean)).max()
        )
    if found.delta_f is not None:
        spread = found.anchor_spread
        values["spread of anchors [kT]"] = math.nan if spread is None else spread
    return Audit(tuple(judge(name, value, gates=LABEL_GATES) for name, value in values.items()))
