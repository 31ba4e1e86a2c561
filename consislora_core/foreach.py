"""One operation on each tensor of a list in a single kernel launch, which torch has under private names alone."""

import logging
from collections.abc import Sequence
from functools import cache
from itertools import repeat
from typing import Any

import torch
from torch import Tensor


def foreach(operation: str, tensors: Sequence[Tensor], *others: Any) -> Sequence[Tensor] | None:
    """A method of `Tensor`, such as mul_, on each of the tensors; the same numbers one by one where torch cannot.

    others: its arguments, each a list that goes with the tensors or one for all.
    """
    try:
        return getattr(torch, f"_foreach_{operation}")(tensors, *others)
    except (AttributeError, TypeError, NotImplementedError) as error:  # moved or changed; nothing was written yet
        _log_missing(operation, str(error).partition("\n")[0])
    columns = (other if isinstance(other, (list, tuple)) else repeat(other) for other in others)
    rows = zip(tensors, *columns, strict=False)
    return [getattr(Tensor, operation)(*row) for row in rows]


@cache
def _log_missing(operation: str, reason: str) -> None:
    logging.info("ConsisLoRA: %s runs tensor by tensor here, which makes training slower: %s", operation, reason)
