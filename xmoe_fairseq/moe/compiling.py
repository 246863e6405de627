"""Keep ``torch.compile`` out of a function."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch._compile import _disable_dynamo  # as torch's own optimisers are kept out

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def not_compiled(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorator: as ``torch.compiler.disable``, a graph break, but it imports the compiler only while one compiles.

    ``torch.compiler.disable`` imports it at once, which adds a second to the three that loading a model takes.
    """
    apart = _disable_dynamo(function)

    @wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        return apart(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return call
