r"""Fit of the network residual: the closed form stays, gradient steps learn what it misses.

.. math:: L(\theta) = \Big\langle \tfrac12 \big\langle \sigma_{tr}^2 |s_{tr} - s^*_{tr}|^2
          + \sigma_{rot}^2 |s_{rot} - s^*_{rot}|^2 \big\rangle / 6
          + w\, \mathrm{KL}(q_m \| \pi_m) \Big\rangle_{m, \sigma}

the loss of :mod:`~.learning` without its ridge, over complexes m and noise levels sigma together, with
s = -grad S and pi = exp(-S) / Z of the corrected energy S. Derivatives of a pair's distances and cosines by
shift and turn are computed once, so that no coordinates are in the graph:

.. math:: \frac{\partial S}{\partial q} = \sum_{pairs} \sum_{r} \frac{\partial u}{\partial r}
          \frac{\partial r}{\partial q}

The last layer begins at zero: training starts from the closed form. Decoupled weight decay (AdamW) and the
number of steps keep it near.

References
----------
I. Loshchilov and F. Hutter, Decoupled weight decay regularization, 2019, arXiv:1711.05101.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..errors import ConvergenceError, InputError
from .complex import Complex, FloatArray
from .learning import DockingData, DockingFit, Progress, noised_copies, score_widths
from .residual import PairTable, Residual, pair_energies, pair_table, weight_shapes
from .residue_model import ResidueModel
from .rigid import Poses


@dataclass(frozen=True)
class ResidualFit:
    """Settings of the network and its training.

    Attributes
    ----------
    width : int
        Hidden units of a layer.
    n_steps : int
    batch : int
        Complexes of a step.
    n_noised : int
        Noised poses of each complex and level of a step.
    learning_rate : float
        Of AdamW; falls to zero along a cosine.
    weight_decay : float
    """

    width: int = 16
    n_steps: int = 300
    batch: int = 3
    n_noised: int = 20
    learning_rate: float = 3e-3
    weight_decay: float = 1.0

    def __post_init__(self) -> None:
        for name in ("width", "n_steps", "batch", "n_noised"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise InputError(f"{name}: expected a whole number >= 1, found {value!r}.")
        for name, least in (("learning_rate", 1e-12), ("weight_decay", 0.0)):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and np.isfinite(value) and value >= least):
                raise InputError(f"{name}: expected a finite number >= {least:g}, found {value!r}.")


@dataclass(frozen=True)
class ResidualData:
    """Pairs of one training complex, whatever the closed form.

    Attributes
    ----------
    decoys : PairTable
        Of all its decoys, set after set.
    noised : PairTable
        Of its noised poses, with slopes; pose k is of level k mod n_levels.
    noised_poses : Poses
    score : numpy.ndarray, shape (n_poses, 6)
        Score of the noise in units of its width.
    """

    decoys: PairTable
    noised: PairTable
    noised_poses: Poses
    score: FloatArray


def _single(table: PairTable) -> PairTable:
    """In single precision, which halves the memory and the time of training."""
    names = ("raw", "receptor_own", "ligand_own", "slopes")
    return replace(
        table, **{k: v.astype(np.float32) for k in names if (v := getattr(table, k)) is not None}
    )  # fmt: skip


def prepare_residual_data(
    complexes: Sequence[Complex],
    data: DockingData,
    settings: DockingFit | None = None,
    *,
    seed: int,
    progress: Progress | None = None,
) -> tuple[ResidualData, ...]:
    """Pairs of decoys and noised poses of the training complexes.

    Parameters
    ----------
    complexes : sequence of Complex
    data : DockingData
        From :func:`~.learning.prepare_docking_data` of the same complexes, settings and seed.
    settings : DockingFit, optional
    seed : int
    progress : callable, optional

    Returns
    -------
    tuple of ResidualData

    Raises
    ------
    InputError
        If the data are not of these complexes.

    Notes
    -----
    About 30 MB for a complex with the defaults.
    """
    settings = settings or DockingFit()
    if (names := tuple(c.name for c in complexes)) != data.names:
        raise InputError(
            f"residual fit: expected the complexes of the data, {', '.join(data.names)}, found "
            f"{', '.join(names)}."
        )
    levels, out = range(len(settings.sigmas)), []
    for k, one in enumerate(complexes):
        found = [noised_copies(one, settings, m, seed) for m in levels]
        poses = Poses(*(np.stack([getattr(f.poses, name) for f in found], axis=1).reshape(-1, *shape)
                        for name, shape in (("rotation", (3, 3)), ("translation", (3,)))))  # fmt: skip
        score = [np.concatenate([f.tr_target, f.rot_target], axis=1) * score_widths(settings, m)
                 for m, f in zip(levels, found, strict=True)]  # fmt: skip
        decoys = Poses.concatenate([d.poses for d in data.decoys[k]])
        out.append(ResidualData(
            _single(pair_table(one, decoys, data.lengths, gradient=False)),
            _single(pair_table(one, poses, data.lengths, gradient=True)),
            poses, np.stack(score, axis=1).reshape(-1, 6),
        ))  # fmt: skip
        if progress is not None:
            progress("pairs of residues", k + 1, len(complexes))
    return tuple(out)


@dataclass(frozen=True)
class _Lesson:
    """One complex with what the closed form says of it, in torch."""

    data: ResidualData
    widths: Any  # [n_levels, 6]
    missed: Any  # [n_noised * n_levels, 6]: score of the noise less that of the closed form, in widths
    energy: Any  # [n_decoys, n_levels]
    target: Any  # [n_decoys, n_levels]


def _lesson(
    model: ResidueModel, one: Complex, data: DockingData, k: int, pairs: ResidualData, settings: DockingFit
) -> _Lesson:
    import torch

    n = len(pairs.noised_poses) // len(settings.sigmas)
    sigma = np.tile(settings.sigmas, n)
    _, shift, turn = model.evaluate(one, pairs.noised_poses, sigma)
    assert shift is not None
    assert turn is not None
    widths = np.stack([score_widths(settings, m) for m in range(len(settings.sigmas))])
    missed = pairs.score - np.concatenate([shift, turn], axis=1) * np.tile(widths, (n, 1))
    decoys = Poses.concatenate([d.poses for d in data.decoys[k]])
    energy = [model.evaluate(one, decoys, s, gradient=False)[0] for s in settings.sigmas]
    target = [level.target for level in data.levels[k]]
    arrays = widths, missed, np.stack(energy, axis=1), np.stack(target, axis=1)
    return _Lesson(pairs, *(torch.as_tensor(v, dtype=torch.float32) for v in arrays))


def _rows(table: PairTable, begin: int, end: int) -> tuple[Any, ...]:
    """Poses ``begin`` to ``end`` in torch: pose of every pair, raw, what both residues bring, slopes."""
    import torch

    rows = slice(int(table.start[begin]), int(table.start[end]))
    pose = np.repeat(np.arange(end - begin), np.diff(table.start[begin : end + 1]))
    parts = (pose, table.raw[rows], table.receptor_own[table.receptor[rows]],
             table.ligand_own[table.ligand[rows]])  # fmt: skip
    return (*map(torch.as_tensor, parts), None if table.slopes is None else table.slopes[rows])


def score_loss(weights: Any, lesson: _Lesson, begin: int, end: int) -> Any:
    """Mean of half the squared error of scores, noised poses ``begin`` to ``end``."""
    import torch

    pose, raw, receptor, ligand, slopes = _rows(lesson.data.noised, begin, end)
    level = torch.arange(begin, end) % len(lesson.widths)
    with torch.enable_grad():
        raw.requires_grad_()
        u = pair_energies(weights, raw, receptor, ligand).gather(1, level[pose][:, None])
        (pull,) = torch.autograd.grad(u.sum(), raw, create_graph=True)
    push = (pull[:, :, None] * torch.as_tensor(slopes)).sum(dim=1)
    total = torch.zeros(end - begin, 6, dtype=raw.dtype).index_add(0, pose, push)
    return 0.5 * ((lesson.missed[begin:end] + total * lesson.widths[level]) ** 2).mean()


def decoy_energies(weights: Any, lesson: _Lesson) -> Any:
    """Corrected energies of all decoys at every level."""
    import torch

    pose, raw, receptor, ligand, _ = _rows(lesson.data.decoys, 0, len(lesson.energy))
    u = pair_energies(weights, raw, receptor, ligand)
    return lesson.energy + torch.zeros_like(lesson.energy).index_add(0, pose, u)


def decoy_loss(weights: Any, lesson: _Lesson) -> Any:
    """KL(q || pi) over the decoys, mean over levels, without the entropy of q."""
    log_pi = (-decoy_energies(weights, lesson)).log_softmax(dim=0)
    return -(lesson.target * log_pi).sum(dim=0).mean()


def _initial(settings: ResidualFit, n_levels: int, generator: np.random.Generator) -> dict[str, Any]:
    import torch

    shapes = weight_shapes(settings.width, n_levels)
    out = {}
    for name, shape in shapes.items():
        flat = len(shape) == 1 or name == "out"
        value = np.zeros(shape) if flat else generator.standard_normal(shape) / np.sqrt(shape[0])
        out[name] = torch.tensor(value, dtype=torch.float32, requires_grad=True)
    return out


class _Training:
    """Weights, optimiser and the order of complexes."""

    def __init__(
        self, lessons: Sequence[_Lesson], decoy_weight: float, settings: ResidualFit, seed: int
    ) -> None:
        import torch

        self.lessons, self.decoy_weight, self.settings = lessons, decoy_weight, settings
        self.generator = np.random.default_rng((seed, 0x7265))
        self.weights = _initial(settings, len(lessons[0].widths), self.generator)
        self.optimiser = torch.optim.AdamW(self.weights.values(), weight_decay=settings.weight_decay)
        self.order: list[int] = []
        self.done = 0

    def _loss(self, lesson: _Lesson) -> Any:
        """Of one complex: a run of its noised poses, all its decoys."""
        n_levels = len(lesson.widths)
        n = len(lesson.missed) // n_levels
        some = min(self.settings.n_noised, n)
        begin = int(self.generator.integers(n - some + 1)) * n_levels
        loss = score_loss(self.weights, lesson, begin, begin + some * n_levels)
        if self.decoy_weight:
            loss = loss + self.decoy_weight * decoy_loss(self.weights, lesson)
        return loss

    def step(self) -> float:
        """One step; the mean loss of its complexes before it."""
        fall = 0.5 * (1 + np.cos(np.pi * self.done / self.settings.n_steps))
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.learning_rate * fall
        self.optimiser.zero_grad()
        total = 0.0
        batch = min(self.settings.batch, len(self.lessons))
        for _ in range(batch):
            if not self.order:
                self.order = self.generator.permutation(len(self.lessons)).tolist()
            loss = self._loss(self.lessons[self.order.pop()]) / batch
            loss.backward()
            total += float(loss.detach())
        self.optimiser.step()
        self.done += 1
        return total


def fit_residual(
    model: ResidueModel,
    complexes: Sequence[Complex],
    data: DockingData,
    settings: DockingFit | None = None,
    network: ResidualFit | None = None,
    *,
    seed: int,
    progress: Progress | None = None,
) -> ResidueModel:
    """Train a residual on top of a fitted closed form.

    Parameters
    ----------
    model : ResidueModel
        From :func:`~.learning.fit_docking_model`; a residual that it has is replaced.
    complexes : sequence of Complex
    data : DockingData
        Of these complexes, by the same settings and seed.
    settings : DockingFit, optional
    network : ResidualFit, optional
    seed : int
    progress : callable, optional

    Returns
    -------
    ResidueModel
        The same closed form with a residual; ``metadata["residual"]`` holds its settings and the mean loss of
        the first and the last tenth of the steps.

    Raises
    ------
    InputError
        If the data are not of these complexes, or the model is of other noise levels.
    ConvergenceError
        If the loss becomes infinite.
    """
    settings, network = settings or DockingFit(), network or ResidualFit()
    pairs = prepare_residual_data(complexes, data, settings, seed=seed, progress=progress)
    if tuple(model.sigmas) != settings.sigmas:
        raise InputError(
            f"residual fit: expected a model of the noise levels {settings.sigmas}, found "
            f"{tuple(model.sigmas.tolist())}."
        )
    closed = replace(model, residual=None)
    lessons = [_lesson(closed, one, data, k, p, settings)
               for k, (one, p) in enumerate(zip(complexes, pairs, strict=True))]  # fmt: skip
    training = _Training(lessons, settings.decoy_weight, network, seed)
    losses = []
    for k in range(network.n_steps):
        losses.append(training.step())
        if not np.isfinite(losses[-1]):
            raise ConvergenceError(
                f"residual fit: expected a finite loss, found {losses[-1]} in step {k + 1}; lower the learning "
                "rate."
            )
        if progress is not None:
            progress("network", k + 1, network.n_steps)
    some = max(network.n_steps // 10, 1)
    record = {"settings": asdict(network), "seed": seed,
              "loss": [float(np.mean(losses[:some])), float(np.mean(losses[-some:]))]}  # fmt: skip
    weights = {k: v.detach().numpy().astype(np.float64) for k, v in training.weights.items()}
    return replace(closed, residual=Residual(weights), metadata={**model.metadata, "residual": record})
