"""Refuses values that a node's own inputs do not allow. They come through links and the API.

ComfyUI itself checks nothing that comes through a link, NaN nowhere, and choices only in versions newer than 0.3.75.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from numbers import Integral, Real
from typing import Any

from comfy_api.latest import io


def checked(execute: Callable) -> Callable:
    """A node's `execute` that first raises ValueError for a value that its schema does not allow, naming the input."""
    names = list(inspect.signature(execute).parameters)[1:]

    @wraps(execute)
    def check_and_execute(cls, *args, **kwargs):
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        for accepted in cls.define_schema().inputs:
            if accepted.id in values and (problem := problem_with(accepted, values[accepted.id])):
                raise ValueError(f"{accepted.id} is {values[accepted.id]!r:.100}; {problem}.")
        return execute(cls, *args, **kwargs)

    return check_and_execute


def problem_with(accepted: io.Input, value: Any) -> str | None:
    """What to choose instead of a value that an input does not allow."""
    if isinstance(accepted, (io.Int.Input, io.Float.Input)):
        whole = isinstance(accepted, io.Int.Input)
        if isinstance(value, Integral if whole else Real) and accepted.min <= value <= accepted.max:
            return None
        return f"it must be a {'whole ' * whole}number from {accepted.min} to {accepted.max}"
    if isinstance(accepted, io.Combo.Input):
        return None if value in accepted.options else f"choose one of: {', '.join(accepted.options)}"
    if isinstance(accepted, io.String.Input):
        return None if isinstance(value, str) else "it must be a text"
    is_missing = value is None and not accepted.optional
    is_socket = not isinstance(accepted, io.Boolean.Input)
    return "connect a node to it" if is_socket and (is_missing or isinstance(value, (str, Real))) else None
