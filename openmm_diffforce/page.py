"""The frame of every HTML page: one jinja2 environment for the package's templates."""

from collections.abc import Callable, Mapping
from typing import Any


def page_environment(filters: Mapping[str, Callable[..., Any]]) -> Any:
    """Templates of the package; what is missing in a record is an error, what is text is escaped.

    Parameters
    ----------
    filters : mapping
        Name -> function, added to jinja2's own.

    Returns
    -------
    jinja2.Environment
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("openmm_diffforce", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment
