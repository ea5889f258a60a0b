"""OpenMM reporters: is a simulation still where its model was trained?"""

import os
import warnings
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import openmm as mm
import torch

from .constants import NOISE
from .errors import DomainError, InputError
from .force import DiffusionForce
from .models.graph import MolecularGraph
from .models.physics import BaseTables, base_tables, internal_values
from .ops import TORSION
from .systems import FloatArray, check_positive

ACTIONS = ("warn", "stop", "record")

MIN_FRAMES = 20
"""Frames before a fraction is judged."""


@dataclass(frozen=True)
class Excursion:
    """One coordinate outside its training range.

    Attributes
    ----------
    role : str
        Feature class: bond, angle, 1-3, 1-4, nonbonded.
    atoms : tuple of str
        Names (indices where there are none).
    value, low, high : float
        [nm] or [rad]: found, and the range of the training frames.
    """

    role: str
    atoms: tuple[str, ...]
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        what = "rad" if self.role == "angle" else "nm"
        return (
            f"{self.role} {'-'.join(self.atoms)} at {self.value:.4g} {what} "
            f"(trained {self.low:.4g} to {self.high:.4g})"
        )


class DomainReporter:
    """Fraction of frames outside the training range of each feature class of a physical model.

    Add it to ``simulation.reporters``. Outside that range a model extrapolates, and nothing else
    in a simulation says so.

    Parameters
    ----------
    force : DiffusionForce
        Of a PhysicalModel, or of a model that holds one.
    report_interval : int
        Steps between looks.
    file : path or text stream, optional
        CSV: one row per look.
    threshold : float
        Fraction of frames outside, in (0, 1], above which ``action`` is taken. The force field
        that a model was trained on is itself outside in some percent of the frames of a new run.
    action : {"warn", "stop", "record"}
        Beyond the threshold: warn once, raise DomainError, or only record.
    min_frames : int
        Looks before the fraction is judged.

    Attributes
    ----------
    n_frames : int
    n_outside : dict of str to int
        Frames outside, per feature class, and under ``"any"``.
    rows : list of dict
        What the CSV holds: step, time_ps, ``any`` and each feature class (1 outside, 0 inside).
    last : Excursion or None
        The widest one of the last frame that was outside, in widths of its range.

    Raises
    ------
    InputError
        For a model without ranges (only PhysicalModel has them), or arguments out of range.

    Notes
    -----
    The range is that of the noise level nearest to the force's noise parameter. Torsions are
    periodic and have no outside. Of a model that holds a PhysicalModel (a residual network on top of
    one) that part is judged.

    Examples
    --------
    >>> # simulation.reporters.append(DomainReporter(force, 1000, file="domain.csv", action="stop"))
    """

    def __init__(
        self,
        force: DiffusionForce,
        report_interval: int,
        *,
        file: str | os.PathLike[str] | TextIO | None = None,
        threshold: float = 0.2,
        action: str = "warn",
        min_frames: int = MIN_FRAMES,
    ) -> None:
        if not isinstance(force, DiffusionForce):
            raise InputError(f"force: expected a DiffusionForce, found {type(force).__name__}.")
        if action not in ACTIONS:
            raise InputError(f"action: expected one of {ACTIONS}, found {action!r}.")
        if not check_positive("threshold", threshold) <= 1:
            raise InputError(f"threshold: expected a fraction in (0, 1], found {threshold!r}.")
        self.interval = check_positive("report_interval", report_interval, integer=True)
        self.min_frames = check_positive("min_frames", min_frames, integer=True)
        self.force, self.threshold, self.action = force, float(threshold), action
        graph = force.artefact.graph
        self._base = _physical_tables(force.artefact.model, graph)
        self._labels = graph.names or tuple(map(str, range(graph.n_atoms)))
        self._parent = _parents(graph)
        role = np.array(self._base.coordinates.role)
        judged = self._base.coordinates.kind != TORSION
        self.roles = tuple(sorted(set(role[judged].tolist())))
        self._role_of = role[self._base.coordinates.cls]
        self.n_frames = 0
        self.n_outside = dict.fromkeys(("any", *self.roles), 0)
        self.rows: list[dict[str, float]] = []
        self.last: Excursion | None = None
        self._warned = False
        self._owned = isinstance(file, str | os.PathLike)
        try:
            # Kept open over the life of the reporter, as OpenMM's own reporters do.
            self._file: Any = open(file, "w", encoding="utf-8") if self._owned else file  # type: ignore[arg-type]  # noqa: SIM115
        except OSError as err:
            raise InputError(f"file: expected a path that can be written, found {err}.") from err
        self._write(["step", "time_ps", "any", *self.roles, "fraction_any"])

    def __del__(self) -> None:
        if getattr(self, "_owned", False) and getattr(self, "_file", None) is not None:
            self._file.close()

    @property
    def fractions(self) -> dict[str, float]:
        """Fraction of frames outside so far, per feature class and under ``"any"``."""
        return {key: n / max(self.n_frames, 1) for key, n in self.n_outside.items()}

    def describeNextReport(self, simulation: Any) -> dict[str, Any]:
        """What OpenMM asks a reporter: when, and what is needed."""
        steps = self.interval - simulation.currentStep % self.interval
        return {"steps": steps, "periodic": False, "include": ["positions"]}

    def report(self, simulation: Any, state: mm.State) -> None:
        """Look at one frame.

        Raises
        ------
        DomainError
            If ``action`` is "stop" and the fraction is above the threshold.
        """
        x = np.array(state.getPositions(asNumpy=True)._value, dtype=np.float64)[self.force.atoms]
        if self.force.usesPeriodicBoundaryConditions():  # type: ignore[attr-defined]
            x = _whole(x, np.array(state.getPeriodicBoxVectors(asNumpy=True)._value), self._parent)
        outside, excursion = self._judge(x, simulation.context.getParameter(self.force.parameter(NOISE)))
        row: dict[str, float] = {
            "step": int(simulation.currentStep),
            "time_ps": float(state.getTime()._value),
            **outside,
        }
        self.n_frames += 1
        for key, value in outside.items():
            self.n_outside[key] += value
        self.rows.append(row)
        self.last = excursion or self.last
        self._write([f"{v:g}" if isinstance(v, float) else str(v) for v in row.values()]
                    + [f"{self.fractions['any']:.6g}"])  # fmt: skip
        self._act(int(row["step"]))

    def _judge(self, x: FloatArray, noise: float) -> tuple[dict[str, int], Excursion | None]:
        base = self._base
        sigma = float(self.force.artefact.schedule.noise_to_signal(noise))
        knot = int(abs(base.sigma_knots - sigma).argmin())
        q = internal_values(x[None], base.coordinates)[0]
        cls = base.coordinates.cls
        low, high = base.domain(knot)
        beyond = np.maximum(low[cls] - q, q - high[cls]) / base.grid[knot, cls, 1]
        out = (beyond > 0) | ~np.isfinite(q)
        found = {"any": int(out.any())} | {r: int(out[self._role_of == r].any()) for r in self.roles}
        if not out.any():
            return found, None
        i = int(np.where(out, beyond, -np.inf).argmax())
        atoms = [int(a) for a in base.coordinates.atoms[i] if a >= 0]
        return found, Excursion(
            str(self._role_of[i]), tuple(self._labels[a] for a in atoms), float(q[i]),
            float(low[cls[i]]), float(high[cls[i]]),
        )  # fmt: skip

    def _act(self, step: int) -> None:
        fraction = self.fractions["any"]
        if self.n_frames < self.min_frames or fraction <= self.threshold or self.action == "record":
            return
        worst = max(self.roles, key=lambda r: self.n_outside[r])
        text = (
            f"step {step}: expected at most {self.threshold:.0%} of the frames outside the model's "
            f"training range, found {fraction:.0%} of {self.n_frames} (most often {worst}, "
            f"{self.fractions[worst]:.0%}), e.g. {self.last}; the model extrapolates there: train it on "
            "frames like these (a longer run, or several starts), restrain the simulation, or compare "
            "with the classical force field."
        )
        if self.action == "stop":
            raise DomainError(text)
        if not self._warned:
            self._warned = True
            warnings.warn(text, stacklevel=2)

    def _write(self, cells: list[str]) -> None:
        if self._file is not None:
            self._file.write(",".join(cells) + "\n")
            self._file.flush()


def _physical_tables(model: torch.nn.Module, graph: MolecularGraph) -> BaseTables:
    """Tables of the physical model, which may be a part of another one (a residual network's base)."""
    for part in model.modules():
        if "base_sigma" in dict(part.named_buffers(recurse=False)):
            return base_tables(part, graph)
    try:
        return base_tables(model, graph)
    except InputError as err:
        raise InputError(
            "force: expected a model that is or holds a PhysicalModel, whose splines have a training "
            f"range, found {type(model).__name__}; other models do not say where they were trained."
        ) from err


def _parents(graph: MolecularGraph) -> list[tuple[int, int]]:
    """(atom, its parent) in an order in which parents come first."""
    near, seen, order = graph.neighbours(), set(), []
    for root in range(graph.n_atoms):
        queue = [] if root in seen else [root]
        seen.add(root)
        while queue:
            atom = queue.pop(0)
            for k in near[atom]:
                if k not in seen:
                    seen.add(k)
                    order.append((k, atom))
                    queue.append(k)
    return order


def _whole(x: FloatArray, box: npt.NDArray[np.float64], order: list[tuple[int, int]]) -> FloatArray:
    """Molecules made whole along bonds, as the force does it."""
    for atom, parent in order:
        for axis in (2, 1, 0):
            x[atom] -= np.round((x[atom] - x[parent])[axis] / box[axis, axis]) * box[axis]
    return x


__all__ = ["DomainReporter", "Excursion"]
