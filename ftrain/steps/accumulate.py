"""Accumulation: the gradient of a large batch, from the gradients of its parts.

Laws
----
- For parts of weights w_i with losses l_i: loss `sum(w_i l_i) / sum(w_i)`, gradient `sum(w_i g_i) / sum(w_i)`, which is the loss
  and gradient of the whole batch, whatever the weights are (padding, tokens). A part of weight 0 counts for nothing.
- Metrics are merged; buffers (batch-norm statistics) go from part to part in order.
- Part i draws from the key `fold_in(rng, i)`.
- A part begins when the one before it is done, under compile too: at no time do the activations of two parts exist.
- One part is the function itself, bitwise.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import rng as keys
from .. import tree
from ..data import Window
from ..errors import BatchError, LimitError, MetricError, explain
from ..metrics import Mean, Metric
from ..optim.lists import over
from ..types import LOSS_SCALE, Batch, GradFn, Params
from .wrap import GradWrapper

__all__ = ["Accumulated", "split", "with_accumulation"]

Uneven = Literal["raise", "split"]


def split(batch: Batch, k: int, uneven: Uneven = "raise") -> list[Batch]:
    """Cut a batch into `k` parts along the first dimension of its tensors; 0-d tensors go to each part.

    Args:
        batch: any tree of tensors that have the same number of rows n.
        k: how many parts.
        uneven: where k does not divide n: `"raise"`, or `"split"` into parts whose sizes differ by at most one (n of them
            where n < k).

    Raises:
        BatchError: k does not divide n, or a tensor has another number of rows.

    >>> import torch
    >>> from ftrain.steps.accumulate import split
    >>> [part.tolist() for part in split(torch.arange(5), 2, "split")]
    [[0, 1, 2], [3, 4]]
    """
    n = _rows(batch, k)
    if n == 0:
        raise BatchError(_no_samples(f"a batch without samples, {', '.join(tree.paths(batch, root='batch'))}"))
    if n % k and uneven == "raise":
        raise BatchError(uneven_text(n, k))
    whole, rest = n // k, n % k  # dynamo (2.13) has no divmod for a number that differs from batch to batch
    sizes = [whole + 1] * rest + [whole] * (k - rest if whole else 0)
    leaves, structure = tree.leaves(batch), tree.structure(batch)
    parts, start = [], 0
    for size in sizes:
        rows = [leaf.narrow(0, start, size) if leaf.ndim else leaf for leaf in leaves]
        parts.append(tree.unflatten(structure, rows))
        start += size
    return parts


def uneven_text(n: int, k: int) -> str:
    """What is said where `k` micro-batches do not divide a batch of `n` samples."""
    below = next(d for d in range(min(k, n), 0, -1) if n % d == 0)
    return explain(
        f"accumulation: a batch of {n} samples cannot be cut into {k} equal micro-batches.",
        expected=f"a batch size that {k} divides",
        got=f"{n} samples, accumulate={k}",
        fix=f"accumulate={below}                  # divides {n}\n"
        f'ft.with_accumulation(grad, {k}, uneven="split")   # parts whose sizes differ by one; exact all the same\n'
        f'ft.data.window(data, {k}, short="step")   # groups {k} loader batches; "drop" or "carry" what is left',
    )


def _no_samples(got: str) -> str:
    return explain(
        "accumulation: there is nothing to take a gradient of.",
        expected="at least one sample",
        got=got,
        fix="leave such a batch out of the data",
    )


def _rows(batch: Batch, k: int) -> int:
    leaves = tree.leaves(batch)
    n: int | None = next((leaf.shape[0] for leaf in leaves if leaf.ndim > 0), None)
    if n is None:
        raise BatchError(
            explain(
                f"accumulation: the batch has no samples that could be cut into {k} micro-batches.",
                expected="tensors whose first dimension counts the samples",
                got="0-d tensors only" if leaves else "an empty batch",
            )
        )
    if any(leaf.ndim > 0 and leaf.shape[0] != n for leaf in leaves):
        _other_rows(batch, n)
    return n


def _other_rows(batch: Batch, n: int) -> None:
    pairs = list(tree.items(batch, root="batch"))
    first = next(path for path, leaf in pairs if leaf.ndim > 0)
    for path, leaf in pairs:
        if leaf.ndim > 0 and leaf.shape[0] != n:
            raise BatchError(
                explain(
                    "accumulation: the tensors of the batch differ in their number of rows.",
                    where=path,
                    expected=f"{n} rows, as {first}",
                    got=tree.describe(leaf),
                    cause="a tensor that belongs to the whole batch cannot be cut into micro-batches",
                    fix="keep such a tensor as a buffer of the model, or group loader batches: ft.data.window(data, k)",
                )
            )


class Accumulated(GradWrapper):
    """Made by `with_accumulation`."""

    made_by = "ft.with_accumulation"

    def __init__(self, grad_fn: GradFn, k: int, uneven: Uneven) -> None:
        super().__init__(grad_fn)
        self.refuse_guards()
        self.k = k
        self.uneven = uneven

    def check_rows(self, n: int) -> None:
        """Raise unless a batch of `n` samples can be cut."""
        if self.uneven == "raise" and n % self.k:
            raise BatchError(uneven_text(n, self.k))

    def parts(self, batch: Batch) -> list[Batch]:
        given = batch.batches if isinstance(batch, Window) else (batch,)
        if self.k == 1:
            return list(given)
        return [part for one in given for part in split(one, self.k, self.uneven)]

    def __call__(
        self, params: Params, buffers: Params, batch: Batch, rng: Tensor, /
    ) -> tuple[Params, Mean, tuple[dict[str, Metric], Params]]:
        parts = self.parts(batch)
        if not parts:
            raise BatchError(_no_samples("a window without batches"))
        if len(parts) == 1:
            return self.inner(params, buffers, parts[0], rng)
        scale = buffers.get(LOSS_SCALE)
        total: Params = {}
        loss: Any = None
        merged: dict[str, Metric] = {}
        for i, cut in enumerate(parts):
            part = _after(total, cut) if i and torch.compiler.is_compiling() else cut
            # scale: each part's loss by the same number; the engine does not hand it back
            given = buffers if scale is None else {**buffers, LOSS_SCALE: scale}
            grads, own, (metrics, buffers) = self.inner(params, given, part, keys.fold_in(rng, i))
            weight = own.weight.detach()
            if i == 0:
                # scale: each part's mean gradient times its weight ...
                total = over(_scaled, _wide(grads), scalars=(weight,))
                loss, merged = own, dict(metrics)
                continue
            total = over(_added, total, grads, scalars=(weight,))
            loss = loss.merge(own)
            if metrics.keys() != merged.keys():
                raise MetricError(_other_metrics(i, merged, metrics))
            merged = {name: merged[name].merge(metric) for name, metric in metrics.items()}
        # scale: ... and the sum by the weight of all; where that is 0, so is the sum
        weight = loss.weight.clamp(min=torch.finfo(loss.weight.dtype).tiny)
        mean = over(_divided, total, scalars=(weight,))
        return {name: mean[name].to(params[name].dtype) for name in mean}, loss, (merged, buffers)


def _other_metrics(i: int, first: dict[str, Metric], now: dict[str, Metric]) -> str:
    return explain(
        "accumulation: the micro-batches have different metrics.",
        where=f"micro-batch {i} of the batch, counted from 0",
        expected=f"those of the first: {', '.join(first) or 'none'}",
        got=", ".join(now) or "none",
        fix="return the same names from loss_fn for every batch; ft.metrics.Mean(total, weight) with weight 0 counts for nothing",
    )


def _scaled(g: Any, weight: Any) -> Any:
    return g * weight


def _added(total: Any, g: Any, weight: Any) -> Any:
    return total + g * weight


def _divided(total: Any, weight: Any) -> Any:
    return total / weight


def _after(total: Params, part: Batch) -> Batch:
    """The part itself, as values that a compiler cannot have before the sums.

    A graph has no order but that of its data, and Inductor would run forward and backward of all parts first, where that saves it
    a pass over the sums: with the activations of the whole batch, or one gradient of each part, in memory at a time (2.13). Here each
    sum is computed into a buffer (`as_strided` asks for one), and the next part is chosen by what no compiler of graphs knows to
    be false: that an element of a sum equals itself and does not.
    """
    if torch._C._functorch.maybe_current_level() is not None:
        return part
    first = [torch.as_strided(leaf, (1,), (1,)) for leaf in total.values() if leaf.numel()]
    never = torch.cat([(one == one) & (one != one) for one in first]).any()  # noqa: PLR0124 - see above
    return tree.map(lambda leaf: torch.where(never, torch.zeros_like(leaf), leaf), part)


def _wide(grads: Params) -> Params:
    """Sums of half-precision gradients are kept in float32: eight bits would lose most of the small parts."""
    return {name: g.float() if g.dtype in (torch.float16, torch.bfloat16) else g for name, g in grads.items()}


def with_accumulation(grad_fn: GradFn, k: int = 1, *, uneven: Uneven = "raise") -> Accumulated:
    """Take the gradient of a batch part by part: as many samples as you like, in the memory of one part.

    Law: `loss = sum(w_i l_i) / sum(w_i)` and the same for the gradient, with w_i the weights of the parts; so the result is that
    of the whole batch up to rounding, for unequal weights too. Half-precision gradients are summed in float32.

    Args:
        grad_fn: a grad-level function.
        k: into how many micro-batches a batch is cut. A `Window` (see `ft.data.window`) has its batches as parts, each cut
            into k.
        uneven: what happens to a batch whose size k does not divide: `"raise"`, or `"split"` into sizes that differ by one.

    Returns:
        A grad-level function.

    Raises:
        LimitError: k is not a positive integer, or an unknown policy.
        BatchError (when called): k does not divide the batch.

    >>> import torch, ftrain as ft
    >>> model = torch.nn.Linear(3, 1)
    >>> grad = ft.value_and_grad(ft.bind(model, lambda model, batch: model(batch).square().mean()))
    >>> state, batch = ft.init(model, ft.optim.sgd(0.1)), torch.randn(8, 3)
    >>> whole, *_ = grad(state.params, state.buffers, batch, ft.rng.key(0))
    >>> parts, *_ = ft.with_accumulation(grad, 4)(state.params, state.buffers, batch, ft.rng.key(0))
    >>> torch.allclose(whole["weight"], parts["weight"])
    True
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise LimitError(
            explain(
                f"accumulation: {k!r} is not a number of micro-batches.",
                expected="an integer >= 1",
                got=tree.describe(k) if not isinstance(k, int) else repr(k),
                fix="accumulate=4   # for a factor that changes with the epoch: ft.data.window(data, lambda epoch: ...)",
            )
        )
    if uneven not in get_args(Uneven):
        raise LimitError(
            explain(f"accumulation: there is no policy uneven={uneven!r}.", expected=", ".join(get_args(Uneven)))
        )
    return Accumulated(grad_fn, k, uneven)
