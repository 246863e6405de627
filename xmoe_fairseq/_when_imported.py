"""Run a function right after a module's first import, for `xmoe_fairseq.__init__`."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, act: Callable[[], None]) -> None:
    """Call ``act()`` once: now if the module ``name`` is imported already, else at the end of its first import."""
    if sys.modules.get(name) is not None:
        act()
    else:
        sys.meta_path.insert(0, _Watcher(name, act))  # type: ignore[arg-type]


class _Watcher:
    """A finder of sys.meta_path that finds one module as other finders do and adds a step to the end of its execution.

    It has no base class of importlib.abc, whose import takes longer than everything else in ``xmoe --help``.
    """

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self.name, self.act, self.is_asking_others = name, act, False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name or self.is_asking_others:
            return None
        self.is_asking_others = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.is_asking_others = False
        if spec is not None and spec.loader is not None:
            self._add_step(spec.loader)
        return spec

    def _add_step(self, loader: object) -> None:
        execute = loader.exec_module  # type: ignore[attr-defined]

        def exec_module(module: ModuleType) -> None:
            # The collector would walk the growing heap again and again and find nothing: a fifth of fairseq's import.
            was_enabled = gc.isenabled()
            gc.disable()
            try:
                execute(module)
            finally:
                if was_enabled:
                    gc.enable()
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.act()

        loader.exec_module = exec_module  # type: ignore[attr-defined]
