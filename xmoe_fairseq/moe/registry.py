"""Names to classes: the routers with their settings, and the kinds of layer.

``MoEConfig`` reads the settings and the checks here, ``build_layer`` the classes. Each class registers itself where it
is defined, so that neither of them imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from .settings import Setting


class RouterType(Protocol):
    """The part of a router class that is used without an instance; ``routers/router.py`` has the base class."""

    settings: tuple[Setting, ...]
    unused: tuple[str, ...]
    weights_by_softmax: bool

    def __call__(self, config: Any) -> Any: ...

    def check(self, config: Any) -> None: ...

    def num_gates(self, config: Any) -> int: ...

    def state_shapes(self, config: Any) -> dict[str, tuple[int, ...]]: ...

    def experts_wanted(self, config: Any) -> float | None: ...


class LayerType(Protocol):
    """The part of a layer class that is used without an instance."""

    own_defaults: dict[str, Any]

    def __call__(self, config: Any) -> Any: ...

    def check(self, config: Any) -> None: ...

    def state_shapes(self, config: Any) -> dict[str, tuple[int, ...]]: ...


ROUTERS: dict[str, RouterType] = {}
LAYERS: dict[str, LayerType] = {}
# Names that a router's setting cannot have: those of the settings that every layer has. MoEConfig fills it.
RESERVED: set[str] = set()
Class = TypeVar("Class", bound=type)


def register_router(name: str) -> Callable[[Class], Class]:
    """Class decorator: make ``MoEConfig(router=name)`` and ``--moe-router name`` build this router.

    Its ``settings`` become keywords of ``MoEConfig``, flags, YAML keys and part of checkpoints.

    Raises:
        ValueError: the name is taken, or the name of one of its settings.
    """

    def register(cls: Class) -> Class:
        router = cast(RouterType, cls)
        known: Any = ROUTERS.get(name)
        if known is not None and _place(known) != _place(cls):
            raise ValueError(f"router name {name!r} is taken by {'.'.join(_place(known))}; choose another")
        others = {setting.name: setting for other, setting in _declared() if other != name}
        for setting in router.settings:
            if setting.name in RESERVED:
                raise ValueError(f"router {name} declares {setting.flat}, a setting of every layer; take another name")
            if others.get(setting.name, setting) != setting:
                raise ValueError(
                    f"router {name} declares {setting.flat} in another way than router "
                    f"{routers_with(setting.name)[0]}; use that router's declaration, or another name"
                )
        ROUTERS[name] = router
        return cls

    return register


def _place(cls: Any) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def _declared() -> list[tuple[str, Setting]]:
    return [(name, setting) for name, router in ROUTERS.items() for setting in router.settings]


def router_class(name: str) -> RouterType:
    """The registered class; ValueError with the known names otherwise."""
    if name not in ROUTERS:
        raise ValueError(
            f"moe_router {name!r} is not known; choose one of {', '.join(sorted(ROUTERS))}, "
            "or register your own in the --user-dir package"
        )
    return ROUTERS[name]


def router_settings() -> dict[str, Setting]:
    """Every setting that a registered router declares, by name."""
    return {setting.name: setting for _, setting in _declared()}


def routers_with(setting: str) -> list[str]:
    """Names of the routers that have this setting."""
    return [name for name, declared in _declared() if declared.name == setting]


def register_layer(kind: str) -> Callable[[Class], Class]:
    """Class decorator: the layer that is built for configurations whose ``layer_kind`` is ``kind``."""

    def register(cls: Class) -> Class:
        LAYERS[kind] = cast(LayerType, cls)
        return cls

    return register
