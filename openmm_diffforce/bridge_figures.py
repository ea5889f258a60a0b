"""Pictures of a bridge, from its numbers as JSON holds them (``BridgeResult.to_dict()``).

Plain :class:`matplotlib.figure.Figure` objects: no pyplot, no global state.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .analysis import new_figure
from .audit import BRIDGE_GATES
from .estimate import MIN_OVERLAP

BLUE, BROWN, GREY, GREEN = "#1f5f8b", "#8a5a20", "#59626b", "#1d7044"


def figures_of_bridge(bridge: Mapping[str, Any]) -> dict[str, Any]:
    """Every picture that the numbers allow.

    Parameters
    ----------
    bridge : mapping
        ``BridgeResult.to_dict()``; with ``bar`` ({delta_f, d_delta_f, overlap}) plain BAR is marked too.

    Returns
    -------
    dict
        name -> matplotlib Figure: ``bridge_plateau``, ``bridge_overlap``, ``bridge_work``,
        ``bridge_calibration``, ``bridge_spread``.
    """
    found = {
        "bridge_plateau": _plateau(bridge),
        "bridge_overlap": _overlap(bridge),
        "bridge_calibration": _calibration(bridge),
        "bridge_spread": _spread(bridge),
    }
    if bridge.get("work_forward") and bridge.get("work_reverse"):
        found["bridge_work"] = _work(bridge)
    return found


def _column(bridge: Mapping[str, Any], name: str) -> Any:
    # JSON has None for what is not a number.
    return np.array([np.nan if one[name] is None else one[name] for one in bridge["levels"]], dtype=float)


def _sigma_axis(axes: Any, sigma: Any, *, extra: Sequence[float] = ()) -> None:
    axes.set_xscale("log")
    axes.set_xlabel(r"noise $\sigma$ [nm]")
    shown = sigma if len(sigma) <= 4 else sigma[:: -(-len(sigma) // 4)]
    axes.set_xticks(list(shown), [f"{s:.2g}" for s in shown])
    axes.minorticks_off()
    everything = [*sigma, *extra]
    axes.set_xlim(min(everything) / 1.35, max(everything) * 1.35)


def _chosen_line(axes: Any, bridge: Mapping[str, Any], *, label: str | None = "chosen level") -> None:
    axes.axvline(
        bridge["levels"][bridge["chosen"]]["sigma"], color=GREEN, linewidth=0.9, linestyle="--", label=label
    )


def _plateau(bridge: Mapping[str, Any]) -> Any:
    """Delta f over the noise levels, between its two limits."""
    sigma, f, d = (_column(bridge, n) for n in ("sigma", "delta_f", "d_delta_f"))
    figure, (axes,) = new_figure(width=7.4, height=3.7)
    low, high, far = sigma[0] / 2.2, sigma[-1] * 2.2, sigma[-1] * 3.6
    axes.fill_between(sigma, f - d, f + d, color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(sigma, f, "o-", color=BLUE, markersize=4, label="bridge, ± one standard error")
    k = bridge["chosen"]
    axes.errorbar(
        [sigma[k]], [bridge["delta_f"]], yerr=[bridge["d_delta_f"]], fmt="o", color=GREEN, capsize=4,
        markersize=7, label="chosen level",
    )  # fmt: skip
    extra = [high, far]
    bar = bridge.get("bar")
    if bar and bar.get("delta_f") is not None:
        extra.append(low)
        poor = (bar.get("overlap") or 0.0) < MIN_OVERLAP
        axes.errorbar(
            [low], [bar["delta_f"]], yerr=None if poor else [bar.get("d_delta_f") or 0.0], fmt="s",
            color=BROWN, capsize=3, markerfacecolor="white" if poor else BROWN,
            label=rf"$\sigma\to 0$: plain BAR (overlap {bar['overlap']:.2g}{', too little' if poor else ''})",
        )  # fmt: skip
    for x, key, mark, text in (
        (high, "density", "D", r"$\sigma\to\infty$: density of the operator"),
        (far, "readout", "^", "readout: Tweedie on end-state moments"),
    ):
        one = bridge[key]
        axes.errorbar(
            [x], [one["delta_f"]], yerr=[one["d_delta_f"] or 0.0], fmt=mark, color=GREY, capsize=3,
            markersize=5, label=text,
        )  # fmt: skip
    _sigma_axis(axes, sigma, extra=extra)
    axes.set_ylabel("Δf [kT]")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return figure


def _overlap(bridge: Mapping[str, Any]) -> Any:
    """Overlap of the noised ends, and the effective sample size of exponential averages."""
    sigma = _column(bridge, "sigma")
    figure, panels = new_figure(2, width=3.7, height=3.1)
    for axes, name, label in zip(
        panels, ("overlap", "ess"), ("overlap of the noised ends", "effective frames of EXP"),
        strict=True,
    ):  # fmt: skip
        axes.plot(sigma, _column(bridge, name), "o-", color=BLUE, markersize=4)
        _chosen_line(axes, bridge)
        _sigma_axis(axes, sigma)
        axes.set_ylabel(label)
    gate = BRIDGE_GATES["overlap of the noised ends"]
    panels[0].set_ylim(0.0, 1.05)
    for threshold in (gate.good, gate.bad):
        panels[0].axhline(threshold, color="0.6", linewidth=0.8, zorder=0)
    panels[1].set_ylim(0.0, 1.1 * np.nanmax([1.0, *_column(bridge, "ess")]))
    panels[1].legend(frameon=False, fontsize=8)
    return figure


def _edges(values: Any, low: float, high: float) -> Any:
    """Edges of a histogram: between the values, where they are few."""
    levels = np.unique(np.clip(values, low, high))
    if len(levels) < 3 or len(levels) > 60:
        return np.linspace(low, high, 46)
    middle = 0.5 * (levels[1:] + levels[:-1])
    return np.concatenate([[2 * levels[0] - middle[0]], middle, [2 * levels[-1] - middle[-1]]])


def _work(bridge: Mapping[str, Any]) -> Any:
    """Work between the noised ends, both ways; the curves cross at Delta f."""
    forward = np.array(bridge["work_forward"], dtype=float)
    reverse = -np.array(bridge["work_reverse"], dtype=float)
    figure, (axes,) = new_figure(width=4.6, height=3.3)
    both = np.concatenate([forward, reverse])
    low, high = np.quantile(both, [0.002, 0.998])
    edges = _edges(both, low, high)
    for work, colour, label in ((forward, BLUE, "frames of state 0"), (reverse, BROWN, "frames of state 1")):
        axes.hist(
            np.clip(work, low, high), edges, density=True, histtype="stepfilled", color=colour, alpha=0.25
        )
        axes.hist(np.clip(work, low, high), edges, density=True, histtype="step", color=colour, label=label)
    f = bridge["levels"][bridge["chosen"]]["delta_f"]
    axes.axvline(f, color=GREEN, linewidth=1.2, linestyle="--", label="Δf")
    axes.set_xlabel("work ΔS from state 0 to 1 [kT]")
    axes.set_ylabel("density")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _calibration(bridge: Mapping[str, Any]) -> Any:
    """How wide O is about its prediction, per state, against how wide it was predicted to be."""
    sigma = _column(bridge, "sigma")
    figure, (axes,) = new_figure(width=4.6, height=3.3)
    rows = np.array([one["calibration"] for one in bridge["levels"]], dtype=float)
    colours = [BLUE, *[GREY] * (rows.shape[1] - 2), BROWN]
    for k, lam in enumerate(bridge["lams"]):
        axes.plot(sigma, rows[:, k], "o-", color=colours[k], markersize=4, label=f"λ = {lam:.3g}")
    axes.axhline(1.0, color="0.6", linewidth=0.8)
    good = BRIDGE_GATES["normal score of O, |mean square - 1|"].good
    axes.axhspan(1 - good, 1 + good, color="0.93", zorder=0)
    _chosen_line(axes, bridge, label=None)
    _sigma_axis(axes, sigma)
    axes.set_ylabel("mean square score of O")
    axes.set_ylim(0.0, max(2.0, 1.1 * float(np.nanmax(rows))))
    if rows.shape[1] <= 6:
        axes.legend(frameon=False, fontsize=8)
    return figure


def _spread(bridge: Mapping[str, Any]) -> Any:
    """Delta f at the chosen level with each fold left out, and by other closures."""
    level = bridge["levels"][bridge["chosen"]]
    closures = {k: v for k, v in level["closures"].items() if v is not None}
    # Two that are only diagnostics would hide what matters if they are far off.
    middle, error = bridge["delta_f"], bridge["d_delta_f"]
    figure, (axes,) = new_figure(width=4.6, height=3.3)
    axes.axvspan(middle - error, middle + error, color="0.9", zorder=0)
    axes.axvline(middle, color=GREEN, linewidth=1.2, linestyle="--")
    rows = ["a fold left out", *closures]
    axes.plot(level["folds"], [0] * len(level["folds"]), "o", color=BLUE, markersize=5, alpha=0.6)
    for y, (name, value) in enumerate(closures.items(), start=1):
        rough = name in ("hermite", "trapezoid", "cumulant")
        axes.plot([value], [y], "D", color=GREY if rough else BLUE, markersize=5,
                  markerfacecolor="white" if rough else BLUE)  # fmt: skip
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("Δf [kT]")
    return figure
