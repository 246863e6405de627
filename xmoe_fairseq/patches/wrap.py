"""Wrap functions and methods of fairseq at run time under a name; this package changes fairseq in no other way.

A wrapper is ``wrapper(original, *args, **kwargs)``. Its name stands in docs/patches.md and on the wrapped function, so
that it can be looked up from a traceback or a debugger.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

# Name of every installed patch -> the function that it wraps, such as "fairseq.trainer.Trainer.state_dict".
INSTALLED: dict[str, list[str]] = {}


def wrap(owner: Any, attribute: str, name: str, wrapper: Callable[..., Any]) -> None:
    """Let ``wrapper`` run in place of ``owner.attribute``; a second call under the same name changes nothing.

    Args:
        owner: a module or a class. A static method stays static; a class method is not supported.
        name: the patch's name in docs/patches.md.
        wrapper: called with the original function, followed by the caller's arguments.
    """
    original = getattr(owner, attribute)
    if name in patches_of(original):
        return

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    patched.xmoe_patches = (*patches_of(original), name)  # type: ignore[attr-defined]
    is_static = isinstance(inspect.getattr_static(owner, attribute), staticmethod)
    setattr(owner, attribute, staticmethod(patched) if is_static else patched)
    where = owner.__name__ if inspect.ismodule(owner) else f"{owner.__module__}.{owner.__qualname__}"
    INSTALLED.setdefault(name, []).append(f"{where}.{attribute}")


def patches_of(function: Any) -> tuple[str, ...]:
    """The names of the patches around ``function``, the innermost first."""
    return getattr(function, "xmoe_patches", ())


def training_loops() -> Iterator[ModuleType]:
    """The loaded modules of fairseq_cli.train, which is imported before or after this package or runs as a script."""
    for name in ("fairseq_cli.train", "__main__"):
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "validate_and_save") and hasattr(module, "should_stop_early"):
            yield module
