"""One forward pass of a model on fake tensors, watched module by module."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from .. import rng, tree
from ..errors import ArgumentError, FtrainError, ModelError, explain
from ..types import Batch
from .circumstances import described, with_circumstances
from .fakes import Fakes, reads_nothing
from .operations import counter
from .tables import shape

__all__ = ["Call", "forward"]


_INPUTS = ("x", "input", "inputs", "input_ids", "image", "images")  # how batches call what a model is given


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

    Raises:
        ArgumentError: the model does not take the batch as it is, and there is no `fn`.
        InspectError: it reads a value.
        Whatever the model raises, with a note that says where, and what the batch was like.
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
        _noted(batch, what),
        rng.Isolated(0),
        torch.compiler.set_stance("force_eager"),
        torch.enable_grad(),
        reads_nothing(what, "the model"),
        fakes.mode,
        operations,
    ):
        _call(private, given, fn, what)
    now = {**dict(private.named_parameters()), **dict(private.named_buffers())}
    shapes = {name: tuple(now[name].shape) for name in lazy if name in now and not is_lazy(now[name])}
    return found, operations.get_total_flops(), shapes


@contextmanager
def _noted(batch: Batch, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        with_circumstances(error, batch, what)
        raise


def _call(model: nn.Module, batch: Any, fn: Callable[[nn.Module, Batch], Any] | None, what: str) -> None:
    """Call the model as the user says; where nothing was said and it does not take the batch as it is, say what to say.

    Raises:
        ArgumentError: `forward` takes other arguments, or fails with what is no tensor in the place of one.
    """
    if fn is not None:
        fn(model, batch)
        return
    try:
        model(batch)
    except (TypeError, AttributeError) as error:
        # An operator, or an attribute, names the type that it cannot use: "must be Tensor, not dict".
        kind = type(batch).__name__
        unsuited = not isinstance(batch, Tensor) and re.search(rf"\b{re.escape(kind)}\b", str(error)) is not None
        if isinstance(error, FtrainError) or not (unsuited or not _binds(model, batch)):
            raise
        raise ArgumentError(
            explain(
                f"{what}: the model does not take the batch as its one argument.",
                where=f"{type(model).__name__}.forward{_signature(model)}",
                expected="a forward that takes the batch as it is, or fn=, which says how the model is called",
                got="model(batch), with\n" + "\n".join(line.strip() for line in described(batch)),
                cause=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
                fix=f"{what}(state, model, batch, fn=lambda model, batch: {_how(model, batch)})",
            )
        ) from error


def _binds(model: nn.Module, *args: Any, **kwargs: Any) -> bool:
    """Whether forward takes these arguments, as far as its signature tells."""
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        return True
    return True


def _signature(model: nn.Module) -> str:
    try:
        return str(inspect.signature(model.forward))
    except (TypeError, ValueError):  # it has none
        return "(...)"


def _how(model: nn.Module, batch: Any) -> str:
    """A call of the model with this batch that its forward takes."""
    if isinstance(batch, Mapping) and batch:
        names = [name for name in batch if isinstance(name, str)]
        if len(names) == len(batch) and _binds(model, **batch):
            return "model(**batch)"
        known = inspect.signature(model.forward).parameters
        tensors = [name for name, leaf in batch.items() if isinstance(leaf, Tensor)]
        likely = [name for name in names if name in known] + [name for name in _INPUTS if name in batch]
        name = (likely or tensors or list(batch))[0]
        return f'model(batch["{name}"])' if isinstance(name, str) else f"model(batch[{name!r}])"
    if isinstance(batch, Sequence) and batch:
        return "model(*batch)" if len(batch) > 1 and _binds(model, *batch) else "model(batch[0])"
    return "model(batch.x, ...)" if not isinstance(batch, Tensor) else "model(batch, ...)"


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
