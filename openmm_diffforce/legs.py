"""Two legs of a thermodynamic cycle: Delta Delta F with its error, and whether to believe it."""

import math
from dataclasses import dataclass

from .audit import Status
from .errors import InputError
from .estimate import Estimate

_WORSE = ("PASS", "WARN", "FAIL")


@dataclass(frozen=True)
class Leg:
    """A free energy with the verdict on it.

    Attributes
    ----------
    name : str
    estimate : Estimate
    verdict : str
        PASS, WARN or FAIL.
    """

    name: str
    estimate: Estimate
    verdict: Status


def combine_legs(bound: Leg, solvent: Leg) -> Leg:
    r"""The difference of two independent legs, with the worse of their verdicts.

    .. math:: \Delta\Delta f = \Delta f_{bound} - \Delta f_{solvent}, \qquad
              \epsilon^2 = \epsilon_{bound}^2 + \epsilon_{solvent}^2

    Parameters
    ----------
    bound, solvent : Leg
        The same change in two surroundings, at one temperature.

    Returns
    -------
    Leg

    Raises
    ------
    InputError
        If the temperatures differ.

    Notes
    -----
    Assumed and not checked: the legs are independent, and make the same change in the same direction.

    Examples
    --------
    >>> legs = [Leg(n, Estimate("bridge", f, d, 300.0), "PASS") for n, f, d in (("a", 5, 0.3), ("b", 2, 0.4))]
    >>> found = combine_legs(*legs).estimate
    >>> found.delta_f, found.d_delta_f
    (3, 0.5)
    """
    a, b = bound.estimate, solvent.estimate
    if not math.isclose(a.temperature, b.temperature, rel_tol=1e-6):
        raise InputError(
            f"legs: expected one temperature, found {a.temperature:g} K ({bound.name}) and "
            f"{b.temperature:g} K ({solvent.name}); kT differs between them."
        )
    error = math.hypot(a.d_delta_f, b.d_delta_f)
    method = a.method if a.method == b.method else f"{a.method}, {b.method}"
    verdict = max(bound.verdict, solvent.verdict, key=_WORSE.index)
    name = f"{bound.name} - {solvent.name}"
    return Leg(name, Estimate(method, a.delta_f - b.delta_f, error, a.temperature), verdict)
