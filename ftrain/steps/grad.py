"""The grad level: from a loss to its gradient.

The gradient is `torch.autograd.grad` on detached leaves, never `torch.func.grad`: the latter drops, under compile, the backward
of a custom `autograd.Function` that is applied directly to a parameter (pytorch #193279), and refuses activation checkpointing
and DTensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import tree
from ..errors import LossError, ModelError, explain
from ..metrics import Mean, Metric
from ..optim.lists import inside_transform
from ..types import LOSS_SCALE, Batch, Engine, GradFn, LossFn, Params
from .wrap import check_level

__all__ = ["SingleDevice", "constants", "value_and_grad"]


class SingleDevice:
    """The engine for one device: plain tensors, `torch.autograd.grad`."""

    def __init__(self) -> None:
        self._looked = False

    def value_and_grad(
        self, loss_fn: LossFn, params: Params, buffers: Params, batch: Batch, rng: Tensor, /
    ) -> tuple[Params, Mean, tuple[dict[str, Metric], Params]]:
        """The gradient of `loss.total / loss.weight` with respect to `params`, and what the loss returned."""
        scale = None
        if LOSS_SCALE in buffers:
            buffers = dict(buffers)
            scale = buffers.pop(LOSS_SCALE)
        if inside_transform():
            return _transformed(loss_fn, (params, buffers, batch, rng), scale)
        leaves = {name: p if p.requires_grad else p.detach().requires_grad_() for name, p in params.items()}
        # The scope stays open until the backward has finished: activation checkpointing runs the forward again in there, and
        # would otherwise read the parameters that the module had before.
        with torch.enable_grad(), loss_fn.scope(leaves, buffers):
            loss, (metrics, new_buffers) = loss_fn(leaves, buffers, batch, rng)
            if not loss.total.requires_grad:
                raise LossError(_unconnected(leaves))
            first = not torch.compiler.is_compiling() and not self._looked
            if first:
                _check_graph(loss.total, leaves, getattr(loss_fn, "outer", None))
            mean = _mean(loss, scale)
            grads = torch.autograd.grad(mean, list(leaves.values()), materialize_grads=True)
        found = dict(zip(leaves, grads, strict=True))
        if first:
            _check_dense(found)
            self._looked = True
        return (
            found,
            Mean(loss.total.detach(), loss.weight),
            ({k: _detached(m) for k, m in metrics.items()}, new_buffers),
        )


def value_and_grad(loss_fn: LossFn, *, engine: Engine | None = None) -> GradFn:
    """Make a grad-level function from a loss-level one.

    Args:
        loss_fn: as made by `ftrain.bind`, possibly wrapped.
        engine: how gradients are computed; default: on one device.

    Returns:
        `(params, buffers, batch, rng) -> (grads, loss, (metrics, buffers))`. Parameters that the loss does not use get zeros.

    Raises:
        ArgumentError: a function of another level.
        LossError (when called): the loss depends on no parameter.

    >>> import torch, ftrain as ft
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> grad_fn = ft.value_and_grad(ft.bind(model, lambda model, batch: model(batch).mean()))
    >>> state = ft.init(model, ft.optim.sgd(0.1))
    >>> grads, loss, (metrics, buffers) = grad_fn(state.params, state.buffers, torch.full((4, 1), 3.0), ft.rng.key(0))
    >>> grads["weight"]
    tensor([[3.]])
    """
    check_level(loss_fn, "loss", "ft.value_and_grad")
    chosen = SingleDevice() if engine is None else engine

    def grad_fn(
        params: Params, buffers: Params, batch: Batch, rng: Tensor, /
    ) -> tuple[Params, Mean, tuple[dict[str, Metric], Params]]:
        return chosen.value_and_grad(loss_fn, params, buffers, batch, rng)

    return grad_fn


def constants(params: Params) -> Params:
    """Parameters without the history that they have where a compiled step made them leaves outside of its graph.

    Inside a transform of `torch.func` they stay as they are: somebody differentiates through the step.

    >>> import torch
    >>> from ftrain.steps.grad import constants
    >>> constants({"w": torch.ones(1, requires_grad=True)})
    {'w': tensor([1.])}
    """
    return params if inside_transform() else {name: p.detach() for name, p in params.items()}


def _detached(metric: Metric) -> Metric:
    if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree.leaves(metric)):
        return metric
    found: Metric = tree.map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, metric)
    return found


def _mean(loss: Mean, scale: Tensor | None) -> Tensor:
    """What is differentiated. A total of weight 0 (a batch of padding) is 0, and so is its gradient."""
    mean: Tensor = loss.total / loss.weight.clamp(min=torch.finfo(loss.weight.dtype).tiny)
    # scale: for half-precision gradients; with_loss_scale divides by it
    return mean if scale is None else mean * scale


def _transformed(
    loss_fn: LossFn, given: tuple[Params, Params, Batch, Tensor], scale: Tensor | None
) -> tuple[Params, Mean, tuple[dict[str, Metric], Params]]:
    """The same inside vmap, whose tensors cannot be made leaves: there `torch.func` differentiates."""
    params, buffers, batch, rng = given
    structure: list[Any] = []

    def scalar(own: Params) -> tuple[Tensor, list[Tensor]]:
        loss, rest = loss_fn(own, buffers, batch, rng)
        structure.append(tree.structure((loss, rest)))
        return _mean(loss, scale), tree.leaves((loss, rest))

    grads, (_, leaves) = torch.func.grad_and_value(scalar, has_aux=True)(params)
    loss, rest = tree.unflatten(structure[0], leaves)
    return grads, loss, rest


def _check_graph(loss: Tensor, leaves: Params, outer: Callable[[Tensor], str | None] | None) -> None:
    """Look once at what the loss depends on: some parameter of the state, and none from elsewhere."""
    own = {id(leaf) for leaf in leaves.values()}
    found: dict[int, Tensor] = {}
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of an AccumulateGrad node: the leaf that it stands for
        if isinstance(variable, Tensor):
            found[id(variable)] = variable
        todo.extend(following for following, _ in node.next_functions)
    for variable in found.values():
        name = outer(variable) if outer is not None else None
        if name is not None:
            raise LossError(
                explain(
                    "the loss depends on a parameter of the outer model, which no step would train.",
                    where=name,
                    expected=f"a loss that depends on the argument `model` alone, with: {', '.join(list(leaves)[:6])}",
                    cause="loss_fn uses the outer model instead of its argument; the outer one keeps its first numbers",
                    fix="def loss_fn(model, batch):\n    out = model(batch)   # this `model`, and no other",
                )
            )
    if found.keys().isdisjoint(own) and loss.grad_fn is not None and found:
        raise LossError(_unconnected(leaves))


def _check_dense(grads: Params) -> None:
    for name, g in grads.items():
        if g.layout is not torch.strided:
            raise ModelError(
                explain(
                    "a gradient is sparse, and the gradients of a step are dense.",
                    where=name,
                    expected="torch.strided",
                    got=str(g.layout),
                    cause="an embedding made with sparse=True",
                    fix="nn.Embedding(n, d)   # sparse=False, which is the default",
                )
            )


def _unconnected(leaves: Params) -> str:
    return explain(
        "the loss is not connected to any parameter.",
        expected=f"a loss that depends on some of: {', '.join(list(leaves)[:6])}",
        got="a loss without a gradient",
        cause="loss_fn computed it under torch.no_grad(), detached it, or used another model than its argument",
        fix="def loss_fn(model, batch):\n    return F.cross_entropy(model(batch['x']), batch['y'])",
    )
