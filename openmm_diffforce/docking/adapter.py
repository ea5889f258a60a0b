r"""An external docking score model plugs in: units, rotation convention, time; and what it is worth.

The external model is a function of one pose: backbone coordinates of receptor and ligand and a time
in, translation and rotation score and perhaps an energy out. :class:`ExternalDockingModel` makes it
the contract of :mod:`openmm_diffforce.docking.rigid`; its ``examine`` says whether the conventions fit
and whether energy and score belong together.

What DFMDock does (github.com/Graylab/DFMDock, ``score_model_mlsb.py``, ``score_net_mlsb.py``,
``so3_diffuser.py``, ``r3_diffuser.py`` at commit 74c5f1b; L.-S. Chu, S. Sarma and J. J. Gray, Unified
sampling and ranking for protein docking with DFMDock, 2024, doi:10.1101/2024.09.27.615401):

=================  ==========================================================================
in                 ``rec_pos``, ``lig_pos`` [n_residues, 3, 3]: N, CA, C in angstrom; one pose
time               ``t`` of shape [1] in [0, 1]; 1 is the noisiest, the energy is read at 0
sigma_tr           0.1 (30/0.1)^t angstrom
sigma_rot          ln[t e^1.5 + (1 - t) e^0.1] rad, IGSO3 as here: exp(-l(l+1) sigma^2/2)
noise              x -> R (x - CA mean) + CA mean + tr, the CA mean being the ligand's
tr_score           [1, 3], 1/angstrom
rot_score          [1, 3], 1/rad, a rotation vector in the space frame about the CA mean
energy             a scalar without unit, lower is better; a head of its own, not the scores' potential
=================  ==========================================================================

so that ``length_unit="angstrom"``, the defaults, and :data:`DFMDOCK_SCHEDULE` fit it::

    def dfmdock(receptor, ligand, t):
        return net({**features, "rec_pos": torch.tensor(receptor, dtype=torch.float32),
                    "lig_pos": torch.tensor(ligand, dtype=torch.float32), "t": torch.tensor([t])},
                   predict=True)

    model = ExternalDockingModel(dfmdock, receptor=receptor_nm, ligand=ligand_nm,
                                 schedule=DFMDOCK_SCHEDULE)

Its graph has edges drawn at random (torch's global generator): two calls differ, and ``examine`` says
by how much. Nothing here needs OpenMM or torch.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

import numpy as np

from ..errors import InputError, ModelError
from . import so3
from .poses import Poses, check_coordinates, some_poses
from .rigid import RigidSchedule, Scores, check_schedule, evaluate_scores, times_of
from .so3 import FloatArray

DFMDOCK_SCHEDULE = RigidSchedule(
    sigma_tr_max=3.0,
    sigma_rot_max=1.5,
    sigma_tr_min=0.01,
    sigma_rot_min=0.1,
    growth_tr="geometric",
    growth_rot="logarithmic",
)
"""Noise of the published DFMDock models, in nm; its t is their t."""

NANOMETERS = {"angstrom": 0.1, "nanometer": 1.0}
CA = 1
"""Place of the C-alpha among the atoms N, CA, C of a residue."""

MAX_EQUIVARIANCE = 1e-3
"""Relative error of turned scores that single precision explains; more is a failure."""

TOGETHER = 0.05
"""Relative residual up to which a score is said to be the gradient of an energy, or of any."""


class DockingScoreFunction(Protocol):
    """What an external model has to be."""

    def __call__(self, receptor: FloatArray, ligand: FloatArray, t: float) -> Mapping[str, Any]:
        """``tr_score`` and ``rot_score`` (3 numbers each), and ``energy`` (one number) if there is one.

        ``receptor`` [n_residues, 3, 3] and ``ligand`` [n_residues, 3, 3] are N, CA, C in the model's
        length unit.
        """


def _numbers(name: str, value: Any, size: int) -> FloatArray:
    for method in ("detach", "cpu"):  # a torch tensor, without importing torch
        value = getattr(value, method)() if hasattr(value, method) else value
    try:
        out = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as err:
        raise ModelError(f"external docking model: {name} is no array of real numbers ({err}).") from err
    if out.size != size:
        raise ModelError(
            f"external docking model: expected {size} number{'s' * (size > 1)} in {name}, found shape "
            f"{out.shape}."
        )
    if not np.isfinite(out).all():
        raise ModelError(f"external docking model: {name} is not finite: {out.ravel()}.")
    return out.reshape(size)


@dataclass(frozen=True, eq=False)
class ExternalDockingModel:
    r"""An external score model of one complex, as the contract of score models of poses.

    With the length unit u [nm], and the model's rotations about a point o,

    .. math:: s_{tr} = s'_{tr}/u, \qquad s_{rot} = Q\,s'_{rot} - (c + \tau - o) \times s_{tr}

    where the last term is zero for rotations about the ligand's own centre, and Q = R for scores in
    the body frame, else 1.

    Parameters
    ----------
    function : DockingScoreFunction
        One pose a call.
    receptor, ligand : array_like, shape (n_residues, 3, 3)
        N, CA, C [nm]; the ligand in its reference position.
    schedule : RigidSchedule
        Of the model's training, in nm.
    centre : array_like, shape (3,), optional
        c [nm]: what noise turned the ligand about; the mean of its CA by default.
    length_unit : {"angstrom", "nanometer"}
        Of coordinates and translation score.
    rotation_frame : {"space", "body"}
        Derivative along exp(eps e_i) R, or along R exp(eps e_i).
    rotation_about : {"ligand", "origin"}
        The point o: the ligand's centre, or the origin of the coordinates that the model is given.
    energy_scale : float
        kT in the model's unit of energy; ``examine`` measures it.
    time : callable, optional
        From t in [0, 1] (0 clean) to the model's own time.

    Raises
    ------
    InputError
        If shapes do not fit, a number is not finite, coordinates look like angstrom, or an option is unknown.

    Notes
    -----
    One call of ``function`` for each pose. Numpy arrays go in; numpy arrays or torch tensors come out.

    Examples
    --------
    >>> def spring(receptor, ligand, t):
    ...     away = ligand[:, 1].mean(axis=0) - receptor[:, 1].mean(axis=0)
    ...     return {"tr_score": -0.01 * away, "rot_score": [0, 0, 0], "energy": 0.005 * away @ away}
    >>> backbone = np.random.default_rng(0).normal(0.0, 0.3, (5, 3, 3))
    >>> model = ExternalDockingModel(spring, receptor=backbone, ligand=backbone,
    ...                              schedule=DFMDOCK_SCHEDULE)
    >>> tr, rot, energy = model(Poses.identity().perturbed([0, 0, 0], [1.0, 0, 0]), np.zeros(1))
    >>> float(tr[0, 0].round(9)), energy.round(9).tolist()
    (-1.0, [0.5])
    """

    function: DockingScoreFunction
    receptor: FloatArray
    ligand: FloatArray
    schedule: RigidSchedule
    centre: FloatArray | None = None
    length_unit: Literal["angstrom", "nanometer"] = "angstrom"
    rotation_frame: Literal["space", "body"] = "space"
    rotation_about: Literal["ligand", "origin"] = "ligand"
    energy_scale: float = 1.0
    time: Callable[[float], float] | None = None

    def __post_init__(self) -> None:
        for name in ("receptor", "ligand"):
            x = check_coordinates(name, getattr(self, name), 3)
            if x.shape[1] != 3:
                raise InputError(f"{name}: expected N, CA, C of every residue (n, 3, 3), found {x.shape}.")
            bond = float(np.median(np.linalg.norm(x[:, CA] - x[:, 0], axis=-1)))
            if 1.2 < bond < 1.8 and float(np.linalg.norm(x[:, 2] - x[:, CA], axis=-1).mean()) > 1.2:
                raise InputError(
                    f"{name}: expected nm, found N-CA bonds of {bond:.2f}: angstrom; divide by 10."
                )
            object.__setattr__(self, name, x)
        if self.centre is None:
            object.__setattr__(self, "centre", self.ligand[:, CA].mean(axis=0))
        else:
            object.__setattr__(self, "centre", check_coordinates("centre", self.centre, 1))
        for name, known in (
            ("length_unit", tuple(NANOMETERS)),
            ("rotation_frame", ("space", "body")),
            ("rotation_about", ("ligand", "origin")),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"{name}: expected one of {known}, found {getattr(self, name)!r}.")
        check_schedule(self.schedule)
        if not (isinstance(self.energy_scale, int | float) and math.isfinite(self.energy_scale)):
            raise InputError(f"energy_scale: expected a finite number, found {self.energy_scale!r}.")
        if not callable(self.function):
            raise InputError(f"function: expected a callable, found {type(self.function).__name__}.")

    def __call__(self, poses: Poses, t: FloatArray) -> Scores:
        """tr_score [n, 3] (1/nm), rot_score [n, 3] (1/rad), energy [n] (kT) or None.

        Raises
        ------
        ModelError
            If the function fails, leaves something out, or returns other sizes or numbers that are not
            finite.
        """
        n = len(some_poses(poses))
        times = times_of(t, n)
        unit = NANOMETERS[self.length_unit]
        centre = np.asarray(self.centre)
        x = poses.apply(self.ligand.reshape(-1, 3), centre).reshape(n, *self.ligand.shape)
        tr, rot, energies = np.empty((n, 3)), np.empty((n, 3)), []
        for k in range(n):
            own = float(times[k]) if self.time is None else float(self.time(float(times[k])))
            try:
                found = self.function(self.receptor / unit, x[k] / unit, own)
            except Exception as err:
                raise ModelError(
                    f"external docking model: failed at pose {k}, t = {times[k]:g}, with "
                    f"{type(err).__name__}: {err}"
                ) from err
            if not isinstance(found, Mapping) or not {"tr_score", "rot_score"} <= set(found):
                raise ModelError(
                    "external docking model: expected a mapping with tr_score, rot_score and perhaps energy, "
                    f"found {sorted(found) if isinstance(found, Mapping) else type(found).__name__}."
                )
            tr[k] = _numbers("tr_score", found["tr_score"], 3) / unit
            rot[k] = _numbers("rot_score", found["rot_score"], 3)
            if found.get("energy") is not None:
                energies.append(self.energy_scale * _numbers("energy", found["energy"], 1)[0])
        if energies and len(energies) != n:
            raise ModelError(
                "external docking model: expected an energy for every pose or for none, found "
                f"{len(energies)} of {n}."
            )
        if self.rotation_frame == "body":
            rot = (poses.rotation @ rot[..., None])[..., 0]
        if self.rotation_about == "origin":
            rot = rot - np.cross(centre + poses.translation, tr)
        return tr, rot, np.array(energies) if energies else None

    def moved(self, rotation: Any, translation: Any) -> "ExternalDockingModel":
        """The same model with the receptor moved, x -> Q x + b; the poses: :meth:`Poses.moved`."""
        q = so3.check_rotations(rotation)
        return replace(self, receptor=self.receptor @ q.T + check_coordinates("translation", translation, 1))

    def examine(
        self,
        poses: Poses,
        *,
        generator: np.random.Generator,
        t: float = 0.3,
        steps: tuple[float, float] = (1e-2, 1e-2),
        strict: bool = True,
    ) -> "DockingExamination":
        """Whether the conventions fit, and whether energy and score belong together.

        Every pose is evaluated twice, once with the whole complex moved at random, and at twelve
        displacements.

        Parameters
        ----------
        poses : Poses
            A few, near contact, where scores are not small.
        generator : numpy.random.Generator
            For the random motions.
        t : float
            Diffusion time.
        steps : (float, float)
            Displacements of the central differences [nm], [rad].
        strict : bool
            Raise on failures.

        Returns
        -------
        DockingExamination

        Raises
        ------
        ModelError
            If the scores do not turn with the complex, or the energy changes (``strict`` only); or if
            the model breaks the contract.
        """
        found = _examine(self, poses, generator, t, steps)
        if strict and found.failures:
            raise ModelError(f"external docking model: {'; '.join(found.failures)}.\n{found}")
        return found


@dataclass(frozen=True)
class DockingExamination:
    """What :meth:`ExternalDockingModel.examine` returns; print it.

    Attributes
    ----------
    t : float
    n_poses : int
    n_calls : int
        Calls of the external function.
    repeat : float
        Relative difference of the scores of two calls; 0 for a deterministic model.
    equivariance_tr, equivariance_rot : float
        Relative error of the scores after a random motion of the whole complex.
    invariance : float or None
        Largest change of the energy by that motion [kT].
    energy_residual : float or None
        \\|s + grad E\\|/\\|s\\| over all six directions, the translation scaled by the ligand's radius of
        gyration.
    energy_slope : float or None
        The factor on the energy that fits the scores best: kT in its unit.
    energy_residual_scaled : float or None
        The residual that is left with this factor.
    curl : float
        Antisymmetric part of the scores' derivatives, corrected for the commutators of rotations,
        relative to the derivatives: 0 for the gradient of anything.
    failures : tuple of str
        What makes the model unusable.
    verdict : str
        Whether energy and score belong together, in one sentence.
    """

    t: float
    n_poses: int
    n_calls: int
    repeat: float
    equivariance_tr: float
    equivariance_rot: float
    invariance: float | None
    energy_residual: float | None
    energy_slope: float | None
    energy_residual_scaled: float | None
    curl: float
    failures: tuple[str, ...]
    verdict: str

    def __str__(self) -> str:
        lines = []
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name not in ("failures", "verdict"):
                lines.append(f"{one.name:>22}  {'-' if value is None else format(value, '.4g')}")
        lines += [f"{'FAIL':>22}  {one}" for one in self.failures] or [f"{'conventions':>22}  fit"]
        return "\n".join([*lines, f"{'verdict':>22}  {self.verdict}"])


def _relative(found: FloatArray, want: FloatArray) -> float:
    return float(np.linalg.norm(found - want) / max(float(np.linalg.norm(want)), 1e-12))


def _examine(
    model: ExternalDockingModel,
    poses: Poses,
    generator: np.random.Generator,
    t: float,
    steps: tuple[float, float],
) -> DockingExamination:
    n = len(some_poses(poses))
    so3._generator(generator)
    if not all(isinstance(h, int | float) and 0 < h < 1 for h in steps):
        raise InputError(f"steps: expected displacements in (0, 1) nm and rad, found {steps!r}.")
    tr, rot, energy = evaluate_scores(model, poses, t)
    if float(np.linalg.norm(tr)) < 1e-9 and float(np.linalg.norm(rot)) < 1e-9:
        raise ModelError(
            "external docking model: every score is zero at these poses; take poses nearer to contact."
        )
    tr_again, rot_again, _ = evaluate_scores(model, poses, t)
    repeat = max(_relative(tr_again, tr), _relative(rot_again, rot))

    q, b = so3.random_rotations(1, generator)[0], generator.standard_normal(3)
    tr_q, rot_q, energy_q = evaluate_scores(model.moved(q, b), poses.moved(q, b, model.centre), t)
    turned_tr, turned_rot = _relative(tr_q @ q, tr), _relative(rot_q @ q, rot)
    invariance = None if energy is None or energy_q is None else float(np.abs(energy_q - energy).max())

    # Derivatives in the six directions; translations in units of the radius of gyration.
    own = model.ligand.reshape(-1, 3) - model.ligand.reshape(-1, 3).mean(axis=0)
    radius = math.sqrt((own**2).sum(axis=1).mean())
    score = np.concatenate([radius * tr, rot], axis=1)
    slopes = np.empty((n, 6, 6))  # [pose, direction i, component j]
    gradient = np.empty((n, 6))
    for i in range(6):
        h, scale = (steps[0], radius) if i < 3 else (steps[1], 1.0)
        move = np.zeros(6)
        move[i] = h
        ends = [evaluate_scores(model, poses.perturbed(k * move[3:], k * move[:3]), t) for k in (1, -1)]
        joined = [np.concatenate([radius * e[0], e[1]], axis=1) for e in ends]
        slopes[:, i] = scale * (joined[0] - joined[1]) / (2 * h)
        if energy is not None:
            gradient[:, i] = scale * (ends[0][2] - ends[1][2]) / (2 * h)  # type: ignore[operator]
    # E_i s_j - E_j s_i = -eps_ijk s_k for rotations: the derivatives along exp(eps e_i) R do not commute.
    curl = slopes - slopes.swapaxes(1, 2)
    curl[:, 3:, 3:] -= so3.hat(rot)
    curl_size = float(np.linalg.norm(curl)) / max(2 * float(np.linalg.norm(slopes)), 1e-12)

    residual = slope = scaled = None
    if energy is not None:
        residual = _relative(-gradient, score)
        square = float((gradient**2).sum())
        slope = float(-(gradient * score).sum() / square) if square > 1e-24 else 0.0
        scaled = _relative(-slope * gradient, score)
    failures = []
    allowed = MAX_EQUIVARIANCE + 3 * repeat
    for name, value in (("tr_score", turned_tr), ("rot_score", turned_rot)):
        if value > allowed:
            failures.append(
                f"{name} does not turn with the complex (relative error {value:.2g}, allowed {allowed:.2g}): "
                "look at rotation_frame, rotation_about and the model's own centring"
            )
    if invariance is not None and energy is not None:
        limit = allowed * max(1.0, float(np.abs(energy).max()))
        if invariance > limit:
            failures.append(
                f"energy changes by {invariance:.2g} kT when the complex is moved (allowed {limit:.2g})"
            )
    return DockingExamination(
        t=float(t),
        n_poses=n,
        n_calls=15 * n,
        repeat=repeat,
        equivariance_tr=turned_tr,
        equivariance_rot=turned_rot,
        invariance=invariance,
        energy_residual=residual,
        energy_slope=slope,
        energy_residual_scaled=scaled,
        curl=curl_size,
        failures=tuple(failures),
        verdict=_verdict(residual, slope, scaled, curl_size, repeat),
    )


def _verdict(
    residual: float | None, slope: float | None, scaled: float | None, curl: float, repeat: float
) -> str:
    if repeat > TOGETHER:
        return "two calls differ too much to say: make the model deterministic, or average it"
    if residual is None or slope is None or scaled is None:
        if curl <= TOGETHER:
            return "no energy; the score is the gradient of one that is not given: use pose_path_energy"
        return "no energy, and the score is not the gradient of any: likelihoods depend on the path"
    if residual <= TOGETHER:
        return "energy and score belong together: score = -grad E"
    if scaled <= TOGETHER and slope > 0:
        return f"energy and score belong together with another unit: multiply energy_scale by {slope:.4g}"
    if curl <= TOGETHER:
        return "the score is the gradient of another energy: this one may rank, but it is no -ln p"
    return (
        "the energy is a head of its own, and the score is not the gradient of any: rank by it, "
        "but it is no -ln p"
    )
