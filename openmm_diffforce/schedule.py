r"""Noise schedules: how far a frame is noised at diffusion time t.

.. math:: y = \alpha_t x + \sigma_t \epsilon, \qquad \epsilon \sim N(0, 1)

t = 0 is exactly clean (sigma = 0, alpha = 1). The forward SDE is
``dy = f(t) y dt + g(t) dW`` with ``f = d ln(alpha)/dt`` and
``g^2 = d(sigma^2)/dt - 2 f sigma^2``.

Both schedules are frozen dataclasses; their functions are written with plain arithmetic
on tensors, so that they compile in TorchScript (:func:`alpha_sigma`).
"""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from openmm import unit

from .errors import InputError
from .units import to_md

Tensor = torch.Tensor


def alpha_sigma(kind: int, sigma_max: float, beta_min: float, beta_max: float, length: float,
                t: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Signal and noise amplitudes, as one function that TorchScript can compile.

    ``kind`` 0 is VE, 1 is VP; the parameters are those of :class:`VESchedule` and
    :class:`VPSchedule`. Returns ``alpha`` (dimensionless) and ``sigma`` [nm], shaped like ``t``.
    """
    if kind == 0:
        return torch.ones_like(t), sigma_max * t * t
    integral = beta_min * t + 0.5 * (beta_max - beta_min) * t * t
    alpha = torch.exp(-0.5 * integral)
    # -expm1 keeps sigma accurate where alpha -> 1; sigma ~ sqrt(t) there, and exactly 0 at t = 0.
    return alpha, length * torch.sqrt(-torch.expm1(-integral))


class _Schedule:
    """What VE and VP share: everything follows from ``script_args`` and ``alpha_sigma``."""

    kind: int

    def script_args(self) -> tuple[int, float, float, float, float]:
        """The arguments of :func:`alpha_sigma` before ``t``."""
        raise NotImplementedError

    def _check_t(self, t: Any) -> Tensor:
        t = torch.as_tensor(t, dtype=None if isinstance(t, torch.Tensor) else torch.float64)
        if not bool(torch.isfinite(t).all()) or bool((t < 0).any()) or bool((t > 1).any()):
            raise InputError(f"t: expected diffusion times in [0, 1], found {t}.")
        return t

    def alpha(self, t: Any) -> Tensor:
        """Signal amplitude alpha(t), dimensionless, shaped like ``t``."""
        return alpha_sigma(*self.script_args(), self._check_t(t))[0]

    def sigma(self, t: Any) -> Tensor:
        """Noise amplitude sigma(t) [nm], shaped like ``t``."""
        return alpha_sigma(*self.script_args(), self._check_t(t))[1]

    def noise_to_signal(self, t: Any) -> Tensor:
        """sigma/alpha [nm]: the only combination that a free energy depends on."""
        alpha, sigma = alpha_sigma(*self.script_args(), self._check_t(t))
        return sigma / alpha

    def drift(self, t: Any) -> Tensor:
        """f(t) = d ln(alpha)/dt of the forward SDE dy = f y dt + g dW."""
        raise NotImplementedError

    def diffusion(self, t: Any) -> Tensor:
        """g(t) [nm] of the forward SDE, g^2 = d(sigma^2)/dt - 2 f sigma^2."""
        raise NotImplementedError

    def t_of_sigma(self, sigma: Any) -> float:
        """Diffusion time at which the noise-to-signal ratio sigma/alpha is ``sigma`` [nm]."""
        raise NotImplementedError

    def to_json(self) -> str:
        """JSON text; :func:`schedule_from_json` reads it back."""
        return json.dumps({"schedule": type(self).__name__, **asdict(self)})  # type: ignore[call-overload]

    def _checked_sigma(self, sigma: Any) -> float:
        value = float(to_md(sigma, unit.nanometer, name="sigma"))
        top = float(self.noise_to_signal(1.0))
        if not (math.isfinite(value) and 0.0 <= value <= top * (1 + 1e-12)):
            raise InputError(
                f"sigma: expected a noise level in [0, {top:.6g}] nm, found {value!r}; "
                "make the schedule wider or ask for less noise."
            )
        return value


def _positive(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise InputError(f"{name}: expected a finite number > 0, found {value!r}.")


@dataclass(frozen=True)
class VESchedule(_Schedule):
    r"""Variance exploding: alpha = 1, sigma(t) = sigma_max t^2.

    Parameters
    ----------
    sigma_max : float
        Noise at t = 1 [nm].

    Raises
    ------
    InputError
        If ``sigma_max`` is not a finite number above zero.

    References
    ----------
    Y. Song et al., Score-based generative modeling through stochastic differential equations,
    2021, arXiv:2011.13456 (the family; the quadratic time grid is this package's).

    Examples
    --------
    >>> float(VESchedule(sigma_max=0.05).sigma(0.5))
    0.0125
    """

    sigma_max: float = 0.05
    kind = 0

    def __post_init__(self) -> None:
        _positive("sigma_max", self.sigma_max)

    def script_args(self) -> tuple[int, float, float, float, float]:
        return 0, self.sigma_max, 0.0, 0.0, 1.0

    def drift(self, t: Any) -> Tensor:
        return torch.zeros_like(self._check_t(t))

    def diffusion(self, t: Any) -> Tensor:
        return 2.0 * self.sigma_max * self._check_t(t) ** 1.5

    def t_of_sigma(self, sigma: Any) -> float:
        return min(1.0, math.sqrt(self._checked_sigma(sigma) / self.sigma_max))


@dataclass(frozen=True)
class VPSchedule(_Schedule):
    r"""Variance preserving: alpha = exp(-1/2 int beta dt), sigma = length sqrt(1 - alpha^2).

    The noise rate is linear, ``beta(t) = beta_min + (beta_max - beta_min) t``.

    Parameters
    ----------
    beta_min, beta_max : float
        Noise rate at t = 0 and t = 1 (dimensionless, as t is).
    length : float
        The length l [nm] that gives sigma its unit.

    Raises
    ------
    InputError
        If a parameter is not a finite number above zero.

    References
    ----------
    Y. Song et al., Score-based generative modeling through stochastic differential equations,
    2021, arXiv:2011.13456.

    Examples
    --------
    >>> s = VPSchedule()
    >>> float(s.alpha(0.0)), float(s.sigma(0.0))
    (1.0, 0.0)
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    length: float = 0.1
    kind = 1

    def __post_init__(self) -> None:
        for name in ("beta_min", "beta_max", "length"):
            _positive(name, getattr(self, name))

    def script_args(self) -> tuple[int, float, float, float, float]:
        return 1, 0.0, self.beta_min, self.beta_max, self.length

    def drift(self, t: Any) -> Tensor:
        t = self._check_t(t)
        return -0.5 * (self.beta_min + (self.beta_max - self.beta_min) * t)

    def diffusion(self, t: Any) -> Tensor:
        # sigma^2 = l^2 (1 - alpha^2) gives g^2 = l^2 beta(t).
        return self.length * torch.sqrt(-2.0 * self.drift(t))

    def t_of_sigma(self, sigma: Any) -> float:
        # (sigma/alpha)^2 = l^2 (exp(I) - 1)  =>  I = log1p((sigma/l)^2), a quadratic in t.
        target = math.log1p((self._checked_sigma(sigma) / self.length) ** 2)
        half_slope = 0.5 * (self.beta_max - self.beta_min)
        root = math.sqrt(self.beta_min**2 + 4.0 * half_slope * target)
        return min(1.0, 2.0 * target / (self.beta_min + root))


NoiseSchedule = VESchedule | VPSchedule


class Amplitudes(torch.nn.Module):
    """alpha(t) and sigma(t) of a schedule as a part of models, in TorchScript too.

    Parameters
    ----------
    schedule : VESchedule or VPSchedule

    Examples
    --------
    >>> script = torch.jit.script(Amplitudes(VESchedule(0.05)))
    >>> [float(v) for v in script(torch.tensor(0.5, dtype=torch.float64))]
    [1.0, 0.0125]
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        kind, sigma_max, beta_min, beta_max, length = schedule.script_args()
        self.kind = kind
        self.sigma_max = float(sigma_max)
        self.beta_min = float(beta_min)
        self.beta_max = float(beta_max)
        self.length = float(length)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha (dimensionless) and sigma [nm], shaped like ``t``; t in [0, 1] is not checked."""
        return alpha_sigma(self.kind, self.sigma_max, self.beta_min, self.beta_max, self.length, t)


def schedule_from_json(text: str) -> NoiseSchedule:
    """Read a schedule back from :meth:`VESchedule.to_json`.

    Raises
    ------
    InputError
        If the text does not describe a known schedule.

    Examples
    --------
    >>> schedule_from_json(VESchedule().to_json()) == VESchedule()
    True
    """
    try:
        fields = json.loads(text)
        cls = {"VESchedule": VESchedule, "VPSchedule": VPSchedule}[fields.pop("schedule")]
        return cls(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise InputError(
            f"noise schedule: expected JSON of VESchedule or VPSchedule, found {text!r} ({err})."
        ) from err
