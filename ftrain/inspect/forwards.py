"""One forward pass of a model on fake tensors, watched module by module."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from .. import rng, tree
from ..errors import ModelError, explain
from ..types import Batch
from .fakes import Fakes, reads_nothing
from .operations import counter
from .tables import shape

__all__ = ["Call", "forward"]


@dataclass
class Call:
    """What one module did in a forward pass.

    Attributes:
        output: the shapes of what it returned at its first call.
        flops: floating-point operations, its submodules' included, over all calls.
        calls: how often it was called.

    >>> from ftrain.inspect.forwards import Call
    >>> Call().calls
    0
    """

    output: str = ""
    flops: int = 0
    calls: int = 0
    _open: int = 0
    _before: int = 0


def forward(
    model: nn.Module, leaves: dict[str, Tensor], batch: Batch, fn: Callable[[nn.Module, Batch], Any] | None, what: str
) -> tuple[dict[str, Call], int, dict[str, tuple[int, ...]]]:
    """Call a private copy of the model, whose leaves are fake.

    Args:
        model: the user's module; neither it nor its hooks are touched (the copy runs the hooks that it has).
        leaves: parameters and buffers by name, in place of the model's own.
        batch: real, meta or fake.
        fn: `fn(model, batch)`; None: `model(batch)`.
        what: the public function, for messages.

    Returns:
        What each module did, by its path; the operations in all; and the shapes that lazy parameters got.
    """
    fakes = Fakes(list(leaves.values()))
    memo: dict[int, Any] = {}
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, leaf in own.items():
        if is_lazy(leaf):
            memo[id(leaf)] = _lazy_like(leaf)
        else:
            fake = fakes.leaf(leaves.get(name, leaf).detach())
            memo[id(leaf)] = nn.Parameter(fake, leaf.requires_grad) if isinstance(leaf, nn.Parameter) else fake
    try:
        private = copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            explain(
                f"{what}: {type(model).__name__} cannot be copied: {error}",
                cause="a module that stores activations or tensors with a gradient history as attributes",
                fix="keep such tensors in local variables",
            )
        ) from error
    lazy = [name for name, leaf in own.items() if is_lazy(leaf)]
    found: dict[str, Call] = {}
    operations = counter()
    for path, module in private.named_modules():
        found[path] = Call()
        _watch(module, found[path], operations)
        # By its class: the mixin alone is no module to a type checker.
        if issubclass(type(module), LazyModuleMixin):
            module.register_forward_pre_hook(functools.partial(_settle, fakes), with_kwargs=True, prepend=True)
    given = _placed(fakes, batch)
    with (
        rng.Isolated(0),
        torch.compiler.set_stance("force_eager"),
        torch.enable_grad(),
        reads_nothing(what, "the model"),
        fakes.mode,
        operations,
    ):
        private(given) if fn is None else fn(private, given)
    now = {**dict(private.named_parameters()), **dict(private.named_buffers())}
    shapes = {name: tuple(now[name].shape) for name in lazy if name in now and not is_lazy(now[name])}
    return found, operations.get_total_flops(), shapes


def _lazy_like(leaf: Any) -> Any:
    """One more tensor without a shape (they refuse to be copied), which will lie on `meta`."""
    if isinstance(leaf, UninitializedParameter):
        return UninitializedParameter(  # type: ignore[call-arg]  # its stub lacks device and dtype
            requires_grad=leaf.requires_grad, device="meta", dtype=leaf.dtype
        )
    return UninitializedBuffer(device="meta", dtype=leaf.dtype)  # type: ignore[call-arg]  # the same


def _settle(fakes: Fakes, module: Any, args: Any, kwargs: Any) -> None:
    """Give a lazy module its shapes before torch's own hook does, which cannot under a fake mode (2.13)."""
    lazy = [
        (leaves, key)
        for leaves in (module._parameters, module._buffers)
        for key, leaf in leaves.items()
        if leaf is not None and is_lazy(leaf)
    ]
    with _disable_current_modes():
        module.initialize_parameters(*args, **kwargs)
    for leaves, key in lazy:
        fake = fakes.leaf(leaves[key].detach())
        leaves[key] = nn.Parameter(fake, leaves[key].requires_grad) if leaves is module._parameters else fake


def _placed(fakes: Fakes, batch: Batch) -> Any:
    """The batch as fake tensors on the model's device: only its shapes matter here."""

    def leaf(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        return fakes.leaf(torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="meta"))

    return tree.map(leaf, batch)


def _watch(module: nn.Module, call: Call, operations: FlopCounterMode) -> None:
    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        if not call._open:
            call._before = operations.get_total_flops()
        call._open += 1

    def after(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        call._open -= 1
        call.calls += 1
        if not call._open:  # a module that calls itself counts once
            call.flops += operations.get_total_flops() - call._before
        call.output = call.output or shape(out)

    module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    module.register_forward_hook(after, with_kwargs=True)
