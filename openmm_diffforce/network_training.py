r"""Gradient fits of the network model: denoising score matching with operator regression.

.. math::

    J = E\left[w(\tau) \left(\tfrac12 |\nabla S|^2 - \nabla S \cdot \epsilon / \tau\right) / 3 n\right]
        + E\left[(O_{t,\lambda}(y) - O(x))^2\right] / \mathrm{Var}(O),
    \qquad y = x + \tau \epsilon

over frames x of both ends (lambda = 0 and 1), with the model's S and O at that lambda and noise
levels log-uniform in [:data:`TAU_MIN`, the schedule's largest]. Every draw of noise comes with
its mirror image: the mean of ``grad S . eps / tau`` over the two tends to the Laplacian of
implicit score matching as tau -> 0, where that of one draw has no finite variance. The weight
``w = tau^2 + s^2``, s^-2 the mean square of the stiff score per coordinate, gives every level a
comparable say.

A network alone starts from a solved problem: its additive layers at t = 0, in which it is linear,
come from the normal equations of implicit score matching (base action, end 0) and of least squares
(operator, both ends). The gradient steps then couple coordinates and learn the noise.

A residual trains on a fixed set of noised frames, because its base costs a search for a mode each.

This module stands beside ``training.py``, which holds the closed-form fits.

References
----------
P. Vincent, A connection between score matching and denoising autoencoders, Neural Comput. 23
(2011), doi:10.1162/NECO_a_00142.
T. Karras et al., Elucidating the design space of diffusion-based generative models, 2022,
arXiv:2206.00364 (noise-level weights).
arXiv:2606.30687 (the noised operator as a conditional mean).
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
import torch

from .errors import ConvergenceError, InputError, ResumeError
from .models.envelope import EnvelopeAction
from .models.graph import MolecularGraph, internal_coordinates
from .models.network import NetworkAction
from .models.physics import PhysicalModel, internal_values
from .models.stiff import STIFF_SINE, StiffDenoiser, chosen_coordinates
from .ops import TORSION
from .record import atomic_path
from .schedule import NoiseSchedule
from .training import _best_penalty, _blocks, _roughness, check_ends, check_frames

Tensor = torch.Tensor

TAU_MIN = 0.0015
"""Smallest noise of the fit of a network alone [nm]."""

RESIDUAL_TAU_MIN = 0.003
"""Smallest noise of the fit of a residual [nm]; below, it fades out by construction."""

START_FRAMES = 2000
"""Frames, about, that the closed-form start of a network alone looks at."""

CHECKPOINT_VERSION = 1


@dataclass(frozen=True)
class NetworkSettings:
    """How a network is built and trained.

    Attributes
    ----------
    width, channels : int
        Hidden units; functions per coordinate.
    n_steps : int
        Adam steps.
    batch : int
        Mirrored pairs of noised frames per step, of both ends together.
    learning_rate : float
        Falls to zero along a cosine.
    decay : float
        Of the moving average of the weights, per step.
    holdout : float
        Contiguous fraction of the frames on which the best weights are chosen.
    check_every : int
        Steps between evaluations on the held-out frames (and checkpoints).
    patience : int
        Evaluations without a better held-out loss after which training stops.
    n_draws : int
        Noised copies of each frame of a residual (its base is evaluated once per copy).
    """

    width: int = 64
    channels: int = 6
    n_steps: int = 1000
    batch: int = 32
    learning_rate: float = 2e-3
    decay: float = 0.99
    holdout: float = 0.2
    check_every: int = 250
    patience: int = 3
    n_draws: int = 1


RESIDUAL = NetworkSettings(width=32, channels=3, n_steps=300, learning_rate=5e-4, check_every=50)
"""Settings for a residual: it has less to learn, from targets that are mostly noise."""


def fit_denoiser(x: Any, graph: MolecularGraph, *, n_steps: int = 3) -> StiffDenoiser:
    r"""Harmonic prior of the stiff coordinates by implicit score matching, in closed form.

    .. math:: S = \sum_c \tfrac{k_c}{2} \sum_{i \in c} (q_i - \bar q_c)^2, \qquad k_c \ge 0

    Stiff are all bonds and (cosines of) angles, and those classes of torsions and impropers whose
    root mean square sine is below :data:`~openmm_diffforce.models.stiff.STIFF_SINE`: planar
    groups and double bonds. The class means are its centres.

    Parameters
    ----------
    x : float array [n_frames, n_atoms, 3]
        Equilibrium frames [nm].
    graph : MolecularGraph
    n_steps : int
        Gauss-Newton steps of the denoiser.

    Returns
    -------
    StiffDenoiser

    Raises
    ------
    InputError
        If frames are unusable.
    ConvergenceError
        If the frames are all alike, or the molecule has no bonds.

    Notes
    -----
    Deterministic.
    """
    x = check_frames(x, graph.n_atoms)
    found = internal_coordinates(graph)
    role, kind = np.array(found.role)[found.cls], found.kind[found.cls]
    if "bond" not in role:
        raise ConvergenceError("fit_denoiser: expected bonds in the molecular graph, found none.")
    turns = np.flatnonzero(kind == TORSION)
    sine = np.sin(internal_values(x, found, select=turns))
    chosen = [np.flatnonzero(role == "bond"), np.flatnonzero(role == "angle"), turns[:0]]
    for c in np.unique(found.cls[turns]):
        members = found.cls[turns] == c
        if np.sqrt((sine[:, members] ** 2).mean()) < STIFF_SINE:
            chosen.append(turns[members])
    rows = np.concatenate(chosen)
    coordinates = chosen_coordinates(found.atoms[rows], kind[rows], graph.n_atoms)
    _, cls = np.unique(found.cls[rows], return_inverse=True)
    n_classes = int(cls.max()) + 1
    place = torch.as_tensor(cls)
    pool = torch.zeros(n_classes, len(cls), dtype=torch.float64)
    pool[place, torch.arange(len(cls))] = 1.0
    frames = torch.as_tensor(x)
    centre = ((pool @ coordinates.values(frames).mean(0)) / pool.sum(1))[place]
    normal = torch.zeros(n_classes, n_classes, dtype=torch.float64)
    right = torch.zeros(n_classes, dtype=torch.float64)
    for part in frames.split(250):
        jacobian = coordinates.jacobian(part)
        q = coordinates.values(part)
        away = q - centre
        slope = torch.matmul(pool, jacobian * away[..., None])
        normal += torch.einsum("fid,fjd->ij", slope, slope)
        square = (jacobian * jacobian).sum(-1)
        right += pool @ (square + away * coordinates.laplacian(part)).sum(0)
    size = normal.diagonal().sqrt()
    if not bool(torch.isfinite(size).all()) or float(size.min()) <= 0:
        raise ConvergenceError("fit_denoiser: a stiff coordinate does not move; are the frames all alike?")
    try:
        lower = np.linalg.cholesky((normal / size[:, None] / size).numpy())
    except np.linalg.LinAlgError as err:
        raise ConvergenceError("fit_denoiser: the normal equations are singular; give more frames.") from err
    solved, _ = scipy.optimize.nnls(lower.T, np.linalg.solve(lower, (right / size).numpy()))
    stiffness = torch.as_tensor(solved) / size
    return StiffDenoiser(coordinates, stiffness[place], centre, n_steps)


def _start(model: NetworkAction, x: list[np.ndarray], o: list[np.ndarray], holdout: float) -> None:
    """Solve the additive layers of a network alone in closed form, at t = 0.

    Implicit score matching for the base action on frames of end 0, least squares for the operator on
    both ends; the ridge is chosen on the last fraction of the frames.
    """

    def smooth(n_classes: int) -> np.ndarray:
        m = model.channels
        return np.kron(np.eye(n_classes), _roughness(m) + 1e-3 * np.eye(m))

    network = model.base_network
    chosen = x[0][:: max(1, len(x[0]) // START_FRAMES)]
    sums = []
    with torch.no_grad():
        for part in (~_blocks(len(chosen), holdout), _blocks(len(chosen), holdout)):
            size = len(network.additive)
            normal, right = (
                torch.zeros(size, size, dtype=torch.float64),
                torch.zeros(size, dtype=torch.float64),
            )
            for frames in torch.as_tensor(chosen[part]).split(40):
                _, gradient, laplacian = network.features(frames)
                stiff = model.denoiser.residual(frames)
                prior = model.denoiser.coordinates.pullback(frames, model.denoiser.root * stiff)
                right += (laplacian - torch.matmul(gradient, prior.flatten(1)[:, :, None])[:, :, 0]).sum(0)
                single = gradient.transpose(0, 1).flatten(1)
                normal += single @ single.t()
            sums.append((normal.numpy() / part.sum(), right.numpy() / part.sum()))
        block = np.repeat(np.arange(network.n_classes), model.channels)
        solved, _ = _best_penalty(*sums[0], *sums[1], 10.0 * smooth(network.n_classes), block, 0.0)
        network.additive[:, 0] = torch.as_tensor(solved) / network.scale[0]

        network = model.operator_network
        held = np.concatenate([_blocks(len(v), holdout) for v in x])
        frames = torch.as_tensor(np.concatenate(x))
        design = torch.cat([network.pooled(network.embed(f)[0]) for f in frames.split(250)]).numpy()
        centre, values = design[~held].mean(0), np.concatenate(o)
        mean = values[~held].mean()
        pieces = []
        for part in (~held, held):
            away = design[part] - centre
            pieces.append((away.T @ away / part.sum(), away.T @ (values[part] - mean) / part.sum()))
        block = np.repeat(np.arange(network.n_classes), model.channels)
        solved, _ = _best_penalty(*pieces[0], *pieces[1], smooth(network.n_classes), block, 0.0)
        network.additive[:, 0] = torch.as_tensor(solved) / network.scale[0]
        model.operator_offset = float(mean - centre @ solved)


@dataclass
class _Data:
    """Clean frames of both ends, or noised ones with what the base says of them."""

    x: Tensor
    o: Tensor
    lam: Tensor
    # of a residual only:
    epsilon: Tensor | None = None
    tau: Tensor | None = None
    base_gradient: Tensor | None = None
    base_operator: Tensor | None = None

    def part(self, rows: Tensor) -> "_Data":
        return _Data(*(None if v is None else v[rows] for v in vars(self).values()))  # type: ignore[arg-type]


class _Fit:
    """The state of one fit: everything that a checkpoint must hold."""

    def __init__(self, model: NetworkAction, settings: NetworkSettings, generator: torch.Generator) -> None:
        self.model = model
        self.settings = settings
        self.generator = generator
        self.weights = [p for _, p in sorted(model.named_parameters())]
        self.optimiser = torch.optim.Adam(self.weights, lr=settings.learning_rate)
        self.mean = [p.detach().clone() for p in self.weights]
        self.best = [p.detach().clone() for p in self.weights]
        self.best_loss = float("inf")
        self.best_step = 0
        self.step = 0
        self.cpu_seconds = 0.0
        self.losses: list[list[float]] = []
        self.done = False

    _PLAIN = ("best_loss", "best_step", "step", "cpu_seconds", "losses", "done")

    def state(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in self._PLAIN},
            "weights": [p.detach() for p in self.weights], "mean": self.mean, "best": self.best,
            "optimiser": self.optimiser.state_dict(), "generator": self.generator.get_state(),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        for name in self._PLAIN:
            setattr(self, name, state[name])
        self.mean, self.best = state["mean"], state["best"]
        self.use(state["weights"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])

    def use(self, weights: list[Tensor]) -> None:
        """Put values into the model."""
        with torch.no_grad():
            for p, value in zip(self.weights, weights, strict=True):
                p.copy_(value)


def _noise(data: _Data, top: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Standard normal noise shaped like the frames, and log-uniform noise levels."""
    n = len(data.x)
    epsilon = torch.randn(data.x.shape, generator=generator, dtype=torch.float64)
    low = RESIDUAL_TAU_MIN if data.base_operator is not None else TAU_MIN
    spread = torch.rand(n, generator=generator, dtype=torch.float64)
    return epsilon, low * (top / low) ** spread


def _loss(
    model: NetworkAction, data: _Data, epsilon: Tensor, tau: Tensor, stiff: float, unit: float
) -> Tensor:
    """J of a batch at the given noise; a residual's batch brings its own, mirrored already."""
    if data.base_gradient is None:
        y = torch.cat([data.x + tau[:, None, None] * epsilon, data.x - tau[:, None, None] * epsilon])
        epsilon, tau = torch.cat([epsilon, -epsilon]), torch.cat([tau, tau])
        o, lam = torch.cat([data.o, data.o]), torch.cat([data.lam, data.lam])
    else:
        y, o, lam = data.x, data.o, data.lam
    _, gradient, operator = model.own_fields(y, tau, lam)
    if data.base_gradient is not None and data.base_operator is not None:
        gradient = gradient + data.base_gradient
        operator = operator + data.base_operator
    match = (0.5 * gradient * gradient - gradient * epsilon / tau[:, None, None]).mean((1, 2))
    return ((tau * tau + stiff * stiff) * match).mean() + ((operator - o) ** 2).mean() / unit**2


def _settings_hash(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else json.dumps(part).encode())
    return digest.hexdigest()


def _save(path: Path, fit: _Fit, digest: str) -> None:
    with atomic_path(path) as temporary:
        torch.save({"version": CHECKPOINT_VERSION, "settings": digest, **fit.state()}, temporary)


def _load(path: Path, fit: _Fit, digest: str) -> None:
    try:
        state = torch.load(path, weights_only=True)
        version, found = state["version"], state["settings"]
    except Exception as err:
        raise ResumeError(
            f"checkpoint {path}: cannot be read ({type(err).__name__}); remove it to train afresh."
        ) from err
    if version != CHECKPOINT_VERSION or found != digest:
        raise ResumeError(
            f"checkpoint {path}: was written with other frames, settings or another seed; remove it or "
            "choose another path."
        )
    fit.restore(state)


def fit_network(
    x_0: Any, o_0: Any, x_1: Any, o_1: Any,
    graph: MolecularGraph, sites: Sequence[int], schedule: NoiseSchedule,
    *,
    seed: int,
    base: PhysicalModel | None = None,
    settings: NetworkSettings | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int, float], None] | bool = False,
) -> tuple[NetworkAction, dict[str, Any]]:  # fmt: skip
    """Train a network model, alone or as a residual on a physical model.

    Parameters
    ----------
    x_0, x_1 : float arrays [n_frames, n_atoms, 3]
        Equilibrium frames of both ends [nm].
    o_0, o_1 : float arrays [n_frames]
        O(x) = beta (U_1 - U_0) on them [kT].
    graph : MolecularGraph
    sites : sequence of int
        Perturbed atoms.
    schedule : VESchedule or VPSchedule
    seed : int
        Of weights, noise and batches.
    base : PhysicalModel, optional
        Train a residual on this model's noised action (:class:`EnvelopeAction`); None trains a
        network alone.
    settings : NetworkSettings, optional
        Default ``NetworkSettings()``, for a residual :data:`RESIDUAL`.
    checkpoint : path-like, optional
        State of the training, written whole at every evaluation, so that Ctrl-C loses at most
        ``check_every`` steps. If it exists, training goes on from it and ends where it would
        have ended.
    progress : callable or bool
        Called as ``progress(n_done, n_steps, held_out_loss)`` after every step; True shows a bar
        with the time left.

    Returns
    -------
    model : NetworkAction
        With the moving average of the weights at the best held-out loss.
    record : dict
        JSON-ready training record.

    Raises
    ------
    InputError
        If frames, operator values, sites or settings are unusable.
    ConvergenceError
        If the loss is not finite.
    ResumeError
        If the checkpoint is damaged or belongs to another fit.

    Notes
    -----
    Deterministic for a seed, a number of threads and a machine. Frames are assumed to be
    equilibrium frames in the order of time; the last fifth of each end is held out. As a residual,
    step 0 (no correction) competes for the best held-out loss like every other.
    """
    settings = settings or (NetworkSettings() if base is None else RESIDUAL)
    _check_settings(settings)
    frames, values = check_ends(x_0, o_0, x_1, o_1, graph.n_atoms)
    started = time.process_time()
    both = np.concatenate(values)
    unit = max(float(both.std()), 1e-3)
    generator = torch.Generator().manual_seed(int(seed))
    held = [_blocks(len(x), settings.holdout) for x in frames]
    seen = np.concatenate([x[~h] for x, h in zip(frames, held, strict=True)])
    denoiser = fit_denoiser(frames[0][~held[0]], graph)
    envelope = None if base is None else EnvelopeAction(base, denoiser, schedule)
    model = NetworkAction(
        graph, sites, denoiser, schedule, base=envelope, width=settings.width,
        channels=settings.channels, operator_mean=float(both.mean()), operator_spread=unit,
    )  # fmt: skip
    model.base_network.initialise(seen, generator)
    model.operator_network.initialise(seen, generator)
    if base is None:
        _start(
            model, [x[~h] for x, h in zip(frames, held, strict=True)],
            [o[~h] for o, h in zip(values, held, strict=True)], settings.holdout,
        )  # fmt: skip
    top = float(schedule.noise_to_signal(1.0))
    with torch.no_grad():
        clean = torch.as_tensor(frames[0][~held[0]])
        pull = denoiser.coordinates.pullback(clean, denoiser.root * denoiser.residual(clean))
        stiff = float((pull * pull).mean()) ** -0.5

    def gathered(keep: list[np.ndarray]) -> _Data:
        return _Data(
            torch.as_tensor(np.concatenate([x[k] for x, k in zip(frames, keep, strict=True)])),
            torch.as_tensor(np.concatenate([o[k] for o, k in zip(values, keep, strict=True)])),
            torch.as_tensor(np.concatenate([np.full(k.sum(), float(e)) for e, k in enumerate(keep)])),
        )

    train, test = gathered([~h for h in held]), gathered(held)
    if envelope is not None:
        train = _with_base(train, envelope, settings.n_draws, top, generator)
        test = _with_base(test, envelope, settings.n_draws, top, generator)
        test_noise = (test.epsilon, test.tau)
    else:
        test_noise = _noise(test, top, generator)
    fit = _Fit(model, settings, generator)
    fit.cpu_seconds = time.process_time() - started
    path = None if checkpoint is None else Path(checkpoint)
    digest = _settings_hash(
        *frames, *values, list(graph.elements), [list(b) for b in graph.bonds], [int(s) for s in sites],
        schedule.to_json(), int(seed), asdict(settings), base is not None,
    )  # fmt: skip
    if path is not None and path.exists():
        _load(path, fit, digest)

    def held_out_loss() -> float:
        """Of the moving average, at fixed noise."""
        kept = [p.detach().clone() for p in fit.weights]
        fit.use(fit.mean)
        with torch.no_grad():
            total = 0.0
            for rows in torch.arange(len(test.x)).split(256):
                part = test.part(rows)
                epsilon, tau = test_noise[0][rows], test_noise[1][rows]  # type: ignore[index]
                total += float(_loss(model, part, epsilon, tau, stiff, unit).detach()) * len(rows)
        fit.use(kept)
        return total / len(test.x)

    def evaluate() -> None:
        loss = held_out_loss()
        if not np.isfinite(loss):
            raise ConvergenceError(
                f"fit_network: the held-out loss is {loss} after {fit.step} steps; lower learning_rate."
            )
        fit.losses.append([fit.step, loss])
        if loss < fit.best_loss:
            fit.best_loss, fit.best_step = loss, fit.step
            fit.best = [m.clone() for m in fit.mean]
        checks = (fit.step - fit.best_step) // settings.check_every
        fit.done = fit.step >= settings.n_steps or checks >= settings.patience

    def one_step() -> None:
        """One batch: gradient step, and the running mean of the weights."""
        s = settings
        rows = torch.randint(len(train.x), (s.batch,), generator=generator)
        if train.epsilon is not None and train.tau is not None:
            # rows of a pool come in mirrored pairs: take whole pairs
            rows = torch.cat([rows // 2 * 2, rows // 2 * 2 + 1])
            part = train.part(rows)
            epsilon, tau = train.epsilon[rows], train.tau[rows]
        else:
            part = train.part(rows)
            epsilon, tau = _noise(part, top, generator)
        for group in fit.optimiser.param_groups:
            rise = min(1.0, (fit.step + 1) / 50)
            group["lr"] = s.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * fit.step / s.n_steps))
        fit.optimiser.zero_grad()
        loss = _loss(model, part, epsilon, tau, stiff, unit)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(fit.weights, 10.0)
        fit.optimiser.step()
        fit.step += 1
        decay = min(s.decay, fit.step / (fit.step + 10.0))  # forget the start fast
        with torch.no_grad():
            for m, p in zip(fit.mean, fit.weights, strict=True):
                m.mul_(decay).add_(p, alpha=1 - decay)

    with _shown(progress) as show:
        if not fit.losses:
            evaluate()
        while not fit.done:
            begun = time.process_time()
            one_step()
            due = fit.step % settings.check_every == 0 or fit.step >= settings.n_steps
            if due:
                evaluate()
            fit.cpu_seconds += time.process_time() - begun
            if due and path is not None:
                _save(path, fit, digest)
            show(fit.step, settings.n_steps, fit.losses[-1][1])
    fit.use(fit.best)
    model.eval().requires_grad_(False)
    return model, {
        "model": "NetworkAction", "residual": base is not None, "seed": int(seed),
        "settings": asdict(settings), "n_frames": [len(x) for x in frames],
        "sites": [int(s) for s in sites], "steps": fit.step, "best_step": fit.best_step,
        "held_out_loss": fit.best_loss, "losses": fit.losses, "cpu_seconds": fit.cpu_seconds,
        "n_weights": int(sum(p.numel() for p in fit.weights)),
    }  # fmt: skip


def _with_base(
    data: _Data, base: EnvelopeAction, n_draws: int, top: float, generator: torch.Generator
) -> _Data:
    """Mirrored pairs of noised frames, next to each other, with the base's fields at them."""
    rows = torch.arange(len(data.x)).repeat(n_draws)
    part = data.part(rows)
    part.base_operator = part.o  # marks a residual's noise range
    epsilon, tau = _noise(part, top, generator)

    def twin(plus: Tensor, minus: Tensor) -> Tensor:
        return torch.stack([plus, minus], dim=1).flatten(0, 1)

    y = twin(part.x + tau[:, None, None] * epsilon, part.x - tau[:, None, None] * epsilon)
    tau, lam = twin(tau, tau), twin(part.lam, part.lam)
    slope, operator = torch.empty_like(y), torch.empty_like(tau)
    with torch.no_grad():
        for at in torch.arange(len(y)).split(256):
            slope[at], operator[at] = base.noised_fields(y[at], tau[at], lam[at])[1:]
    return _Data(y, twin(part.o, part.o), lam, twin(epsilon, -epsilon), tau, slope, operator)


@contextmanager
def _shown(progress: Callable[[int, int, float], None] | bool) -> Iterator[Callable[[int, int, float], None]]:
    """The caller's function, a bar, or nothing."""
    if callable(progress):
        yield progress
    elif progress:
        from rich.progress import Progress, TextColumn

        with Progress(
            *Progress.get_default_columns(), TextColumn("held-out loss {task.fields[loss]:.4f}")
        ) as bar:
            task = bar.add_task("training", total=None, loss=float("nan"))
            yield lambda done, total, loss: bar.update(task, completed=done, total=total, loss=loss)
    else:
        yield lambda done, total, loss: None


def _check_settings(settings: NetworkSettings) -> None:
    for name in ("width", "channels", "n_steps", "batch", "check_every", "patience", "n_draws"):
        value = getattr(settings, name)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"settings.{name}: expected a whole number >= 1, found {value!r}.")
    if not settings.learning_rate > 0 or not 0 <= settings.decay < 1:
        raise InputError(
            "settings: expected learning_rate > 0 and 0 <= decay < 1, found "
            f"{settings.learning_rate!r} and {settings.decay!r}."
        )
