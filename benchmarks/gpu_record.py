"""Record without a GPU what steps of the layer would launch on one: kernels with all that Triton compiles for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from xmoe_fairseq.moe import MoEConfig, MoELayer, kernels

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
    torch.int8: "*i8", torch.bool: "*i1",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True)
class Setting:
    """A layer and a step of it. ``mode``: train, or decode (no gradient, no capacity, no padding)."""

    config: MoEConfig
    tokens: int = 8192
    dtype: torch.dtype = torch.bfloat16
    mode: str = "train"
    autocast: bool = False
    tf32: bool = False


def named_settings() -> dict[str, Setting]:
    """The shape classes: models of the paper's tables, each router that kernels serve, dtypes, decoding."""
    translation = {
        f"{experts}x{hidden}": MoEConfig(512, experts, hidden, threshold=0.9, capacity_factor=gamma)
        for experts, hidden, gamma in ((32, 2048, 1.0), (64, 1024, 2.0), (128, 512, 4.0))
    }
    chosen = {name: Setting(config) for name, config in translation.items()}
    base = translation["64x1024"]
    for width in (768, 1024):
        for experts in (8, 16, 32, 64):
            hidden = 8 * 4 * width // experts
            shape = MoEConfig(width, experts, hidden, threshold=0.9, capacity_factor=experts / 8)
            chosen[f"lm {width} {experts}x{hidden}"] = Setting(shape)
    chosen["tiny"] = Setting(MoEConfig(128, 8, 256, threshold=0.9, capacity_factor=2.0), tokens=4096)
    for router, more in {
        "switch": {}, "top_k": {"top_k": 2}, "adamoe": {"top_k": 4, "num_null_experts": 64}, "hash": {},
    }.items():  # fmt: skip
        config = replace(base, router=router, z_loss_weight=0.0, **more)
        chosen[router] = Setting(config)
    chosen["normalised, z-loss, dropout"] = Setting(
        replace(base, normalize_weights=True, z_loss_weight=0.01, activation_dropout=0.1)
    )
    chosen["float16"] = Setting(base, dtype=torch.float16)
    chosen["float32"] = Setting(base, dtype=torch.float32)
    chosen["tf32"] = Setting(base, dtype=torch.float32, tf32=True)
    chosen["autocast"] = Setting(base, autocast=True)
    for name, config in translation.items():
        for tokens in (640, 320, 30, 5):
            chosen[f"decode {tokens} {name}"] = Setting(config, tokens=tokens, mode="decode")
    return chosen


@dataclass
class Unit:
    """A kernel with all that Triton compiles for, and whether it multiplies matrices."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    is_product: bool
    needs_tensor_cores: bool
    dtype: str
    settings: list[str]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def key(self) -> str:
        return repr((self.name, self.signature, self.constants, sorted(self.attributes), self.options))

    def tile(self) -> str:
        names = self.kernel.arg_names
        blocks = {names[place[0]]: value for place, value in self.constants.items()}
        return " ".join(f"{n.removeprefix('BLOCK_').lower()}{v}" for n, v in blocks.items() if n.startswith("BLOCK_"))


def unique_units(settings: dict[str, Setting], arch: int) -> list[Unit]:
    """The distinct kernels that steps of all settings launch on a GPU of ``arch``."""
    found: dict[str, Unit] = {}
    for name, setting in settings.items():
        for unit in record_step(name, setting, arch):
            known = found.setdefault(unit.key(), unit)
            if name not in known.settings:
                known.settings.append(name)
    return list(found.values())


def record_step(name: str, setting: Setting, arch: int) -> list[Unit]:
    """The kernels that one step of the layer would launch."""
    from xmoe_fairseq.moe.kernels import launch

    trains = setting.mode == "train"
    layer = MoELayer(setting.config)
    layer = layer if setting.autocast else layer.to(setting.dtype)
    layer.train(trains)
    x_TD = torch.zeros(setting.tokens, setting.config.embed_dim, requires_grad=trains)
    x_TD = x_TD if setting.autocast else x_TD.detach().to(setting.dtype).requires_grad_(trains)
    token = torch.arange(setting.tokens)
    calls: list[tuple[Any, ...]] = []
    torch.backends.cuda.matmul.allow_tf32 = setting.tf32
    with (
        torch.set_grad_enabled(trains),
        torch.autocast("cpu", setting.dtype, enabled=setting.autocast),
        launch.record() as recorded,
        _stopped_before_launching(calls, arch),
    ):
        y_TD, plan = layer(x_TD, token % 10 == 0 if trains else None, token)
        if trains:
            loss = y_TD.float().sum() + plan.balance_loss
            (loss if plan.z_loss is None else loss + plan.z_loss).backward()
    units = []
    for (kernel, arguments, constants), launched in zip(calls, recorded.launches, strict=True):
        unit = _unit(kernel, arguments, constants)
        unit.is_product = launched.cost.flops > 0
        unit.needs_tensor_cores = unit.is_product and not _is_exact(arguments, constants)
        unit.dtype = "tf32" if setting.tf32 else str(setting.dtype).removeprefix("torch.")
        unit.settings = [name]
        units.append(unit)
    return units


@contextmanager
def _stopped_before_launching(calls: list[tuple[Any, ...]], arch: int) -> Iterator[None]:
    """Make the layer treat CPU tensors as tensors on a GPU of ``arch``; collect its compiled launches, run none."""
    from xmoe_fairseq.moe.kernels import launch, tiles

    chosen, run, capability = kernels.chosen, launch._run_compiled, tiles.capability
    kernels.chosen = lambda *_: True
    tiles.capability = lambda: divmod(arch, 10)
    launch._run_compiled = lambda kernel, grid, arguments, constants: calls.append((kernel, arguments, constants))
    try:
        yield
    finally:
        kernels.chosen, launch._run_compiled, tiles.capability = chosen, run, capability


def _unit(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Unit:
    """Specialise arguments as Triton does: an integer of 1 is a constant, and divisibility by 16 is an attribute."""
    names = kernel.arg_names
    unspecialised = set(kernel.do_not_specialize or ())
    signature: dict[str, str] = {}
    fixed: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, (name, argument) in enumerate(zip(names, arguments, strict=False)):
        may_specialise = not {name, place} & unspecialised
        if isinstance(argument, torch.Tensor):
            signature[name] = POINTERS[argument.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(argument, float):
            signature[name] = "fp32"
        elif argument == 1 and may_specialise:
            signature[name], fixed[(place,)] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= argument < 2**31 else "i64"
            if argument % 16 == 0 and may_specialise:
                attributes[(place,)] = [["tt.divisibility", 16]]
    for name, value in constants.items():
        if name not in OPTIONS:
            signature[name], fixed[(names.index(name),)] = "constexpr", value
    options = {name: constants[name] for name in OPTIONS if name in constants}
    return Unit(kernel, signature, fixed, attributes, options, False, False, "", [])


def _is_exact(arguments: tuple[Any, ...], constants: dict[str, Any]) -> bool:
    """True if float32 operands are multiplied as float32, which tensor cores cannot do. This is the default without
    TF32, and so are the router's products under autocast."""
    precision = constants.get("PRECISION", constants.get("DOT"))
    return precision == "ieee" and arguments[0].dtype == torch.float32
