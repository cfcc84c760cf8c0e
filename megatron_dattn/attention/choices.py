"""Values that an axis does not have: a misspelt one would be taken for one of the others."""

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints


def unknown_values(axes: Any, section: str = "") -> Iterator[str]:
    """What is wrong with the values of a dataclass whose fields are choices or flags.

    Args:
        section: what stands before the fields' names, "t2v." for instance.
    """
    for name, hint in get_type_hints(type(axes)).items():
        value = getattr(axes, name)
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        if choices and value not in choices:
            known = ", ".join(repr(choice) for choice in choices)
            yield f"{section}{name} is one of {known}; it is {value!r}"
        if hint is bool and not isinstance(value, bool):
            yield f"{section}{name} is True or False; it is {value!r}"
