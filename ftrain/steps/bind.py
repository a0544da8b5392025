"""From the user's `loss_fn(model, batch)` to a pure function of tensors: the loss level.

Laws
----
- The user's function gets the real module, so that any method and attribute works; its tensors are the state's.
- The loss is a `Mean`: a scalar that the user returned counts for as many samples as the batch has, padding left out.
- Buffers that the forward pass changed come back as values; nothing that went in is changed.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from .. import tree
from ..data import Window
from ..errors import BatchError, LossError, ModelError, explain
from ..metrics import Mean, Metric, normalise
from ..types import Batch, Params
from .regions import region
from .skeleton import Installed, Skeleton

__all__ = ["Bound", "batch_size", "bind", "check_closure", "padding", "takes_rng"]


def batch_size(batch: Batch) -> int:
    """How many samples a batch has: the length of the first dimension of its first tensor that has one; a window's, in all.

    >>> import torch
    >>> from ftrain.steps.bind import batch_size
    >>> batch_size({"x": torch.zeros(16, 3), "scale": torch.ones(())})
    16
    """
    if isinstance(batch, Window):
        return sum(batch_size(one) for one in batch.batches)
    if type(batch) is dict and batch:  # the usual batch, without the cost of a general tree
        leaf = next(iter(batch.values()))
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            return leaf.shape[0]
    for leaf in tree.leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            return leaf.shape[0]
    return 1


def padding(batch: Batch) -> Tensor | None:
    """The mask of a padded batch (see `ft.data.Source.batch`): its entry `"mask"`, where that is a bool for each sample.

    >>> import torch
    >>> from ftrain.steps.bind import padding
    >>> padding({"x": torch.zeros(2, 3), "mask": torch.tensor([True, False])}), padding({"x": torch.zeros(2, 3)})
    (tensor([ True, False]), None)
    """
    mask = batch.get("mask") if isinstance(batch, dict) else None
    if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim == 1 and mask.shape[0] == batch_size(batch):
        return mask
    return None


class Bound:
    """A loss function bound to a module: `(params, buffers, batch, rng) -> (loss, (metrics, buffers))`. Made by `bind`."""

    def __init__(self, skeleton: Skeleton, loss_fn: Callable[..., Any], wants_rng: bool) -> None:
        self.skeleton = skeleton
        self.loss_fn = loss_fn
        self.wants_rng = wants_rng

    def __repr__(self) -> str:
        return f"bind({type(self.skeleton.module).__name__}, {getattr(self.loss_fn, '__name__', self.loss_fn)})"

    def outer(self, tensor: Tensor) -> str | None:
        """The name that a tensor has in the module from which this was made, if it is one of its parameters."""
        reference, name = self.skeleton.outer.get(id(tensor), (None, None))
        return name if reference is not None and reference() is tensor else None

    def scope(self, params: Params, buffers: Params) -> AbstractContextManager[nn.Module]:
        """The module with these leaves in place, as a context; hold it open until the backward has finished."""
        self.skeleton.check(params, buffers)
        return Installed(self.skeleton, params, buffers, calls=False)

    def __call__(self, params: Params, buffers: Params, batch: Batch, rng: Tensor) -> Any:
        return region(self, self._call)(params, buffers, batch, rng)

    def _call(
        self, params: Params, buffers: Params, batch: Batch, rng: Tensor
    ) -> tuple[Mean, tuple[dict[str, Metric], Params]]:
        if isinstance(batch, Window):
            raise BatchError(
                explain(
                    "a window of batches stands where one batch is needed.",
                    expected="a batch",
                    got=f"ft.data.Window of {len(batch.batches)} batches",
                    cause="a gradient made by hand, without accumulation",
                    fix="grad = ft.with_accumulation(ft.value_and_grad(loss))   # as in ft.train_step",
                )
            )
        self.skeleton.check(params, buffers)
        installed = Installed(self.skeleton, params, buffers)
        with installed as model:
            out = self.loss_fn(model, batch, rng) if self.wants_rng else self.loss_fn(model, batch)
            new_buffers = installed.buffers()
        installed.check_unwritten()
        loss, metrics = _unpack(out)
        mask = padding(batch)
        weight: float | Tensor
        if mask is not None:
            weight = mask.sum()  # stays on the device
        else:
            weight = float(batch_size(batch)) if not torch.compiler.is_compiling() else batch_size(batch)
        mean = _as_mean(loss, weight)
        named = normalise(metrics, mean.weight, "the metrics that loss_fn returned")
        return mean, (named, new_buffers)


def bind(model: nn.Module, loss_fn: Callable[..., Any], *, train: bool = True) -> Bound:
    """Make a loss-level function from a module and `loss_fn(model, batch)` or `loss_fn(model, batch, rng)`.

    Args:
        model: the module; copied without its numbers, never changed.
        loss_fn: ordinary PyTorch. Returns a loss or `(loss, metrics)`; the loss is a scalar mean, whose weight is the batch
            size (the sum of `batch["mask"]` for padded batches), or `ft.metrics.Mean(total, weight)`. A third argument receives this step's key (see `ftrain.rng`).
        train: training mode, as the user set it for each submodule; False: evaluation mode for all.

    Returns:
        `(params, buffers, batch, rng) -> (loss, (metrics, buffers))`, with a `scope(params, buffers)`.

    Raises:
        ModelError: `loss_fn` takes other arguments, or uses the outer model instead of its argument.

    >>> import torch, ftrain as ft
    >>> model = torch.nn.Linear(3, 1)
    >>> loss = ft.bind(model, lambda model, batch: model(batch).square().mean())
    >>> state = ft.init(model, ft.optim.sgd(0.1))
    >>> value, (metrics, buffers) = loss(state.params, state.buffers, torch.zeros(5, 3), ft.rng.key(0))
    >>> value.weight
    tensor(5.)
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            explain(
                "ft.bind wants a module.",
                expected="torch.nn.Module",
                got=type(model).__name__,
                fix="ft.bind(model, loss_fn)",
            )
        )
    wants_rng = takes_rng(loss_fn, 2, "loss_fn", "loss_fn(model, batch) or loss_fn(model, batch, rng)")
    check_closure(model, loss_fn, "loss_fn")
    return Bound(Skeleton(model, train=train), loss_fn, wants_rng)


def takes_rng(fn: Callable[..., Any], needed: int, name: str, form: str) -> bool:
    """Whether a user's function declares one more positional argument than it must.

    Raises:
        ModelError: it takes fewer, or needs more.
    """
    if not callable(fn):
        raise ModelError(explain(f"{name} is not a function.", expected=form, got=type(fn).__name__))
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # a builtin without a signature: called in the short form
        return False
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in places if p.default is p.empty]
    star = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    keyword = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if (len(places) < needed and not star) or len(required) > needed + 1 or keyword:
        raise ModelError(
            explain(
                f"{name} takes other arguments than it will be given.",
                expected=form,
                got=f"{getattr(fn, '__name__', name)}({', '.join(p.name for p in parameters)})",
                fix=f"def {name}(model, batch): ...",
            )
        )
    if len(required) == needed + 1:
        return True
    return len(places) > needed and places[needed].name in ("rng", "key")


def check_closure(model: nn.Module, fn: Callable[..., Any], name: str) -> None:
    """Raise when a user's function reaches the outer model (or a part of it) past its argument.

    Such a function would compute with the numbers that the module had when it was made, and would get no gradient.
    """
    inner = inspect.unwrap(getattr(fn, "__func__", fn))
    code = getattr(inner, "__code__", None)
    if not isinstance(code, CodeType):
        return
    outer: dict[str, Any] = {}
    for key, cell in zip(code.co_freevars, getattr(inner, "__closure__", None) or (), strict=False):
        try:
            outer[key] = cell.cell_contents
        except ValueError:  # a cell that is not filled yet
            continue
    everything = getattr(inner, "__globals__", {})
    outer |= {key: everything[key] for key in _globals_read(code) if key in everything}
    own = {id(leaf) for leaf in (*model.parameters(), *model.buffers())}
    for key, value in outer.items():
        found = isinstance(value, nn.Module) and any(id(p) in own for p in (*value.parameters(), *value.buffers()))
        if found or (isinstance(value, Tensor) and id(value) in own):
            argument = next(iter(inspect.signature(fn).parameters), "model")
            what = "the outer model" if isinstance(value, nn.Module) else "a parameter of the outer model"
            raise ModelError(
                explain(
                    f"{name} uses {what} ({key!r}) instead of its argument ({argument!r}).",
                    where=f"{getattr(fn, '__name__', name)} in {code.co_filename}:{code.co_firstlineno}",
                    cause="the outer model keeps its first numbers: only the argument holds those of the state",
                    fix=f"def {getattr(fn, '__name__', name)}(model, batch):\n    out = model(batch)   # not {key}",
                )
            )


def _globals_read(code: CodeType) -> set[str]:
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _globals_read(constant)
    return names


def _unpack(out: Any) -> tuple[Any, Any]:
    if isinstance(out, tuple) and not isinstance(out, Metric):
        if len(out) != 2:
            raise LossError(
                explain(
                    "loss_fn returned a tuple that is not (loss, metrics).",
                    got=f"{len(out)} entries",
                    fix="return loss, {}",
                )
            )
        return out
    return out, {}


def _as_mean(loss: Any, weight: float | Tensor) -> Mean:
    if isinstance(loss, Mean):
        for part, value in (("total", loss.total), ("weight", loss.weight)):
            if not (isinstance(value, Tensor) and value.ndim == 0):
                raise LossError(
                    explain(
                        f"the {part} of the loss is not a 0-d tensor.",
                        got=tree.describe(value),
                        fix="ft.metrics.Mean.of(losses, mask)",
                    )
                )
        return Mean(loss.total, loss.weight.detach())
    if not isinstance(loss, Tensor):
        raise LossError(
            explain(
                "loss_fn returned no loss.",
                expected="a 0-d tensor, ft.metrics.Mean(total, weight), or (loss, metrics)",
                got=tree.describe(loss),
                fix="return loss",
            )
        )
    if loss.ndim != 0:
        raise LossError(
            explain(
                "the loss is not a scalar.",
                expected="a 0-d tensor",
                got=tree.describe(loss),
                fix="return loss.mean()   # or ft.metrics.Mean.of(loss, mask)",
            )
        )
    if not loss.is_floating_point():
        raise LossError(explain("the loss is not a floating-point number.", got=tree.describe(loss)))
    if loss.dtype in (torch.float16, torch.bfloat16):  # too few digits for a sum over a batch
        loss = loss.float()
    if isinstance(weight, Tensor):
        weights = weight.to(loss.dtype)
    else:
        weights = torch.full_like(loss, weight, requires_grad=False).detach()
    return Mean(loss * weights, weights)
