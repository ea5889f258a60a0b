"""Units: MD units inside (nm, ps, kJ/mol, K, Da, e), Quantities only at the door.

A bare float is always in MD units. A value may also be an ``openmm.unit.Quantity``;
:func:`to_md` converts it and nothing else in the package does.
"""

import math
from typing import Any

from openmm import unit

from .errors import UnitsError

MOLAR_GAS_CONSTANT: float = unit.MOLAR_GAS_CONSTANT_R.value_in_unit(unit.kilojoule_per_mole / unit.kelvin)
"""R [kJ/mol/K]."""

KJ_PER_KCAL: float = (1.0 * unit.kilocalorie_per_mole).value_in_unit(unit.kilojoule_per_mole)
"""kJ in a kcal."""


def to_md(value: Any, dimension: unit.Unit, *, name: str = "value") -> Any:
    """Convert a float, array or Quantity to a bare number in MD units.

    Parameters
    ----------
    value : float, array_like or openmm.unit.Quantity
        A bare number is taken to be in MD units already.
    dimension : openmm.unit.Unit
        The MD unit expected, e.g. ``unit.nanometer``.
    name : str
        Used in the error message.

    Returns
    -------
    float or numpy.ndarray
        The value in ``dimension``.

    Raises
    ------
    UnitsError
        If a Quantity has another dimension.

    Examples
    --------
    >>> from openmm import unit
    >>> to_md(1.0 * unit.angstrom, unit.nanometer)
    0.1
    """
    if unit.is_quantity(value):
        if not value.unit.is_compatible(dimension):
            raise UnitsError(
                f"{name}: expected a quantity compatible with {dimension}, found {value.unit}; "
                f"pass a Quantity of that dimension, or a bare number in {dimension}."
            )
        return value.value_in_unit(dimension)
    return value


def thermal_energy(temperature: Any) -> float:
    """Thermal energy kT = R T [kJ/mol].

    Parameters
    ----------
    temperature : float [K] or openmm.unit.Quantity

    Returns
    -------
    float
        kT [kJ/mol].

    Raises
    ------
    UnitsError
        If the temperature is not a finite number above zero, or has another dimension.

    Examples
    --------
    >>> round(thermal_energy(300.0), 4)
    2.4943
    """
    kelvin = to_md(temperature, unit.kelvin, name="temperature")
    if not (isinstance(kelvin, int | float) and math.isfinite(kelvin) and kelvin > 0):
        raise UnitsError(f"temperature: expected a finite number > 0 [K], found {kelvin!r}.")
    return MOLAR_GAS_CONSTANT * float(kelvin)
