"""Names to classes: the routers and the kinds of layer. It imports nothing of the package.

``MoEConfig`` asks it whether a router exists, ``build_layer`` what to build; the classes enter themselves where they
are defined, so neither imports them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast


class RouterType(Protocol):
    """What the registry and ``MoEConfig`` use of a router class; ``routers/router.py`` has the base class."""

    has_null_experts: bool

    def __call__(self, config: Any) -> Any: ...

    def check(self, config: Any) -> None: ...


ROUTERS: dict[str, RouterType] = {}
LAYERS: dict[str, Callable[..., Any]] = {}
RouterClass = TypeVar("RouterClass", bound=type)
LayerClass = TypeVar("LayerClass", bound=type)


def register_router(name: str) -> Callable[[RouterClass], RouterClass]:
    """Class decorator: make ``MoEConfig(router=name)`` and ``--moe-router name`` build this router."""

    def register(cls: RouterClass) -> RouterClass:
        known: Any = ROUTERS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"router name {name!r} is taken by {known.__module__}.{known.__qualname__}; choose another"
            )
        ROUTERS[name] = cast(RouterType, cls)
        return cls

    return register


def router_class(name: str) -> RouterType:
    """The registered class; ValueError with the known names otherwise."""
    if name not in ROUTERS:
        raise ValueError(
            f"moe_router {name!r} is not known; choose one of {', '.join(sorted(ROUTERS))}, "
            "or register your own in the --user-dir package"
        )
    return ROUTERS[name]


def register_layer(kind: str) -> Callable[[LayerClass], LayerClass]:
    """Class decorator: the layer that is built for configurations whose ``layer_kind`` is ``kind``."""

    def register(cls: LayerClass) -> LayerClass:
        LAYERS[kind] = cls
        return cls

    return register
