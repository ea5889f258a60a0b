r"""Does a model keep the contract? What is checked before a model is written to a file.

.. math::

    E_{p_0}[(x - \bar x) \cdot \nabla S] = 3 n_{atoms} - 3

holds at t = 0 for every action of a free molecule over its own equilibrium frames (integrate by
parts), so it tells a model in Angstrom, or in kJ/mol instead of kT, from one in the units of the
contract. A score is the gradient of a scalar only if its Jacobian J is symmetric; ``|u.Jv - v.Ju|``
for random directions u, v measures how far it is from that.
"""

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy.optimize
import torch

from ..errors import InputError, ModelError, NotConservativeError
from .action import model_dtype, model_fields
from .graph import MolecularGraph

EQUIPARTITION_RANGE = (0.5, 2.0)
"""Beyond it the equipartition ratio is reported: kJ/mol for kT gives 2.5 (at 300 K), Angstrom
for nm 0.1 or less."""

N_FRAMES = 8
"""Frames on which derivatives and invariances are tried."""

REACH, SHAKE = 0.3, 0.003
"""How far [nm] a made-up geometry may relax, and how much it is shaken then."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    name : str
    status : {"ok", "note", "fail"}
        A model with a "fail" is not exported; a "note" is for the reader.
    value, limit : float
        What was found and what is allowed (NaN: no number belongs to it).
    text : str
        One sentence for the reader.
    """

    name: str
    status: str
    value: float
    limit: float
    text: str


@dataclass(frozen=True)
class Examination:
    """What :func:`examine_model` found.

    Attributes
    ----------
    findings : tuple of Finding
    """

    findings: tuple[Finding, ...]

    @property
    def failures(self) -> tuple[Finding, ...]:
        """The findings that forbid an export."""
        return tuple(f for f in self.findings if f.status == "fail")

    def to_dict(self) -> list[dict[str, Any]]:
        """JSON-ready; a number that is not finite becomes None."""
        return [
            {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in asdict(f).items()}
            for f in self.findings
        ]

    @classmethod
    def from_dict(cls, rows: list[dict[str, Any]]) -> "Examination":
        """The examination that :meth:`to_dict` wrote, e.g. from an artefact's metadata."""
        kept: list[dict[str, Any]] = [{k: np.nan if v is None else v for k, v in row.items()} for row in rows]
        return cls(tuple(Finding(**row) for row in kept))

    def raise_for_failures(self, what: str, advice: str = "") -> None:
        """Raise for the first failure; ``advice`` follows its text.

        Raises
        ------
        NotConservativeError
            If the gradient is not that of the action.
        ModelError
            For any other failure.
        """
        for finding in self.failures:
            kind = NotConservativeError if finding.name == "gradient of the action" else ModelError
            raise kind(f"{what}: {finding.text}{advice}")

    def __str__(self) -> str:
        lines = []
        for f in self.findings:
            number = f"{f.value:.2g}" if np.isfinite(f.value) else ""
            lines.append(f"{f.status:5} {f.name:28} {number:>9}  {f.text}")
        return "\n".join(lines)


def examine_model(model: torch.nn.Module, x: Any, *, equilibrium: bool = False, seed: int = 0) -> Examination:
    """Hold a model against the contract, on frames of its molecule.

    Parameters
    ----------
    model : ActionModel, ScoreModel or TorchScript of one
    x : float array [n_frames >= 1, n_atoms, 3]
        Frames [nm]; the more like the training data, the more the numbers mean.
    equilibrium : bool
        Whether x are equilibrium frames of the base state, all atoms free: then their units are
        examined (the equipartition ratio, see the module).
    seed : int
        Of the random rotations and directions.

    Returns
    -------
    Examination

    Raises
    ------
    InputError
        If the frames are unusable.

    Notes
    -----
    Looks at t = 0 and t = 0.4, lam = 0 and 0.3. Shapes, finiteness, independence of the other
    frames of a batch, invariance under translation and rotation, derivatives against central
    differences; for a bare score the asymmetry of its Jacobian instead, which is reported and
    never refused. Costs some thirty evaluations. It cannot show that the model is right.
    """
    frames = np.asarray(x, dtype=np.float64)
    if frames.ndim != 3 or frames.shape[-1] != 3 or min(frames.shape) == 0 or not np.isfinite(frames).all():
        raise InputError(
            "x: expected finite frames [n_frames >= 1, n_atoms, 3] in nm, found "
            f"{'values that are not finite' if frames.ndim == 3 else list(frames.shape)}."
        )
    generator = np.random.default_rng(seed)
    few = frames[np.linspace(0, len(frames) - 1, min(len(frames), N_FRAMES)).astype(int)]
    if len(few) == 1:
        few = np.repeat(few, 2, axis=0)
    conservative = bool(getattr(model, "conservative", True))
    double = model_dtype(model) == torch.float64
    found: list[Finding] = []
    for t, lam in ((0.0, 0.0), (0.4, 0.3)):
        try:
            out = model_fields(model, few, t=t, lam=lam)
        except Exception as err:
            text = (
                f"fields(x, t, lam) failed on frames {list(few.shape)}: {str(err).strip().splitlines()[-1]}"
            )
            return Examination((Finding("evaluation", "fail", np.nan, np.nan, text),))
        shape = _shape_finding(out, few, conservative)
        if shape.status == "fail":
            return Examination((shape,))
        if t == 0:
            found.append(shape)
    check = _checker(found)
    loose = 1e-8 if double else 1e-3
    state = {"t": 0.4, "lam": 0.3}
    action, gradient, _ = model_fields(model, few, **state)
    size = max(float(np.sqrt((gradient**2).mean())), 1e-12)
    span = max(float(np.abs(action).max()), 1.0) if conservative else 1.0

    alone = np.concatenate([model_fields(model, frame[None], **state)[1] for frame in few])
    check("frames are independent", _rms(alone - gradient) / size, loose, "alone or in a batch",
          "a frame's gradient must not depend on the other frames of its batch")  # fmt: skip
    moved = model_fields(model, few + generator.uniform(-1, 1, 3), **state)
    rotation = np.linalg.qr(generator.standard_normal((3, 3)))[0]
    rotation *= np.sign(np.linalg.det(rotation))
    turned = model_fields(model, few @ rotation.T, **state)
    mirrored = model_fields(model, few * np.array([1.0, 1.0, -1.0]), **state)
    advice = "evaluate on differences or internal coordinates, or train on one orientation of each frame"
    for name, changed, back in (("translation", moved, np.eye(3)), ("rotation", turned, rotation)):
        miss = _rms(changed[1] @ back - gradient) / size
        if conservative:
            miss = max(miss, float(np.abs(changed[0] - action).max()) / span)
        check(f"invariance: {name}", miss, 100 * loose, f"a {name} changes nothing",
              f"a {name} must not change the physics; {advice}")  # fmt: skip
    handed = _rms(mirrored[1] * np.array([1.0, 1.0, -1.0]) - gradient) / size
    found.append(Finding(
        "mirror images", "note", handed, np.nan,
        "are told apart" if handed > 100 * loose else "look the same to this model: it cannot keep a "
        "chiral centre from turning over",
    ))  # fmt: skip

    step = 1e-5 if double else 1e-3
    direction = _unit(generator.standard_normal(few.shape))
    if conservative:
        numeric = _slope(lambda s: model_fields(model, few + s * direction, **state)[0], step)
        analytic = (gradient * direction).sum((1, 2))
        check("gradient of the action", float(np.abs(numeric - analytic).max()) / (size * few[0].size**0.5),
              1e-4 if double else 0.1, "dS/dx is the derivative of S",
              "dS/dx is not the derivative of S: wrap a bare score in "
              "ScoreModel, or mend fields()")  # fmt: skip
        operator = model_fields(model, few, **state)[2]
        numeric = _slope(lambda s: model_fields(model, few, t=0.4, lam=0.3 + s)[0], 10 * step)
        scale = max(float(np.abs(operator).max()), 1e-3 * span, 1e-9)
        check("derivative in lambda", float(np.abs(numeric - operator).max()) / scale,
              1e-4 if double else 0.1, "dS/dlam is the derivative of S",
              "dS/dlam is not the derivative of S")  # fmt: skip
    else:
        other = _unit(generator.standard_normal(few.shape))
        j_u = _slope(lambda s: model_fields(model, few + s * direction, **state)[1], 10 * step)
        j_v = _slope(lambda s: model_fields(model, few + s * other, **state)[1], 10 * step)
        skew = np.abs((other * j_u).sum((1, 2)) - (direction * j_v).sum((1, 2))).max()
        found.append(Finding(
            "asymmetry of the Jacobian", "note", float(skew / (np.sqrt((j_u**2).sum((1, 2)).mean()) + 1e-12)),
            0.0, "0 for a score that has an energy; this model is declared without one",
        ))  # fmt: skip
    if equilibrium and len(frames) >= 20:
        clean = model_fields(model, frames)[1]
        centred = frames - frames.mean(axis=1, keepdims=True)
        ratio = float((centred * clean).sum((1, 2)).mean() / (frames[0].size - 3))
        low, high = EQUIPARTITION_RANGE
        fine = low <= ratio <= high
        found.append(Finding(
            "equipartition ratio", "ok" if fine else "note", ratio, np.nan,
            "1 for an action in kT over nm on its own equilibrium frames"
            + ("" if fine else ": look at the units (nm, kT), at the temperature and at the frames"),
        ))  # fmt: skip
    return Examination(tuple(found))


def made_up_frames(model: torch.nn.Module, graph: MolecularGraph) -> np.ndarray:
    """Two geometries [2, n_atoms, 3] nm to examine a model on where there are no frames of the molecule.

    Random chains, made of the graph alone, then taken downhill on the model's clean action and
    shaken by 3 pm: far from the training data a noised model can have several modes for one frame,
    and a rotation or a small step would tell them apart. A model without a usable action keeps the
    random chains.

    Notes
    -----
    Deterministic.
    """
    generator = np.random.default_rng(0)
    frames = [_downhill(model, _random_chain(graph, seed)) for seed in (1, 2)]
    return np.stack([x + SHAKE * generator.standard_normal(x.shape) for x in frames])


def _downhill(model: torch.nn.Module, start: np.ndarray) -> np.ndarray:
    """A hundred steps of minimisation, no atom by more than :data:`REACH` along an axis."""
    if not bool(getattr(model, "conservative", True)):
        return start

    def action(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient, _ = model_fields(model, x.reshape(1, *start.shape))
        return float(value[0]), gradient.ravel()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = scipy.optimize.minimize(
                action, start.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 100},
                bounds=[(v - REACH, v + REACH) for v in start.ravel()],
            )  # fmt: skip
        except Exception:  # a model that cannot be evaluated: the examination says so, with its reason
            return start
    x = np.asarray(found.x).reshape(start.shape)
    return x if np.isfinite(x).all() else start


def _random_chain(graph: MolecularGraph, seed: int) -> np.ndarray:
    """Atoms [n_atoms, 3] 0.12 nm from a bonded neighbour in random directions, the roomiest of 200."""
    generator = np.random.default_rng(seed)
    near = graph.neighbours()
    best, widest = np.zeros((graph.n_atoms, 3)), -1.0
    for _ in range(200):
        x = np.full((graph.n_atoms, 3), np.nan)
        for root in range(graph.n_atoms):
            if np.isnan(x[root, 0]):
                x[root] = 0.3 * root * np.eye(3)[0]
            queue = [root]
            while queue:
                atom = queue.pop()
                for k in near[atom]:
                    if np.isnan(x[k, 0]):
                        step = generator.standard_normal(3)
                        x[k] = x[atom] + 0.12 * step / np.linalg.norm(step)
                        queue.append(k)
        distances = np.linalg.norm(x[:, None] - x, axis=-1) + 10 * np.eye(len(x))
        if (closest := float(distances.min())) > widest:
            best, widest = x, closest
    return best


def _checker(found: list[Finding]) -> Callable[[str, float, float, str, str], None]:
    def check(name: str, value: float, limit: float, fine: str, cure: str) -> None:
        good = bool(np.isfinite(value) and value <= limit)
        text = fine if good else f"{name}: expected at most {limit:.2g}, found {value:.2g}; {cure}."
        found.append(Finding(name, "ok" if good else "fail", value, limit, text))

    return check


def _shape_finding(out: tuple[np.ndarray, ...], x: np.ndarray, conservative: bool) -> Finding:
    n = len(x)
    wanted = (("S", (n,)), ("dS/dx", x.shape), ("dS/dlam", (n,)))
    problem = ""
    for (name, shape), value in zip(wanted, out, strict=True):
        if value.shape != shape:
            problem = f"expected {name} of shape {shape}, found {value.shape}; mend fields()."
        elif not np.isfinite(value).all() and not (name == "S" and not conservative):
            problem = f"{name} is not finite at a finite geometry; mend the model."
        if problem:
            break
    return Finding("shapes, finite values", "fail" if problem else "ok", np.nan, np.nan,
                   problem or f"S [{n}], dS/dx {list(x.shape)}, dS/dlam [{n}]")  # fmt: skip


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).mean()))


def _unit(v: np.ndarray) -> np.ndarray:
    """Random directions scaled to one atomic displacement per atom."""
    return np.asarray(v / np.sqrt((v**2).mean(axis=(1, 2), keepdims=True)))


def _slope(value: Callable[[float], np.ndarray], step: float) -> np.ndarray:
    """Fourth-order central difference at 0."""
    near = value(step) - value(-step)
    far = value(2 * step) - value(-2 * step)
    return np.asarray((8 * near - far) / (12 * step))
