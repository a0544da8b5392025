"""Arithmetic on all leaves of a tree at once, so that an update rule is written once, as on one tensor.

`Leaves([a, b]) * 2 + Leaves([c, d])` is `Leaves([a * 2 + c, b * 2 + d])`, each operation one `torch._foreach_` call (one launch
for all leaves). `over` runs a rule on `Leaves` in eager mode, and on one leaf after the other under vmap, which has no rules for
the `_foreach_` calls, and under compile, where Inductor fuses the separate operations just as well and dynamo does not take
a tensor and an object of our own on the two sides of an operator.

The other operand of an operator may be a number, a 0-d tensor (a scheduled or injected hyper-parameter) or `Leaves`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import tree

__all__ = [
    "Leaves",
    "inside_transform",
    "leafwise",
    "lerp",
    "maximum",
    "minimum",
    "norms",
    "one_by_one",
    "over",
    "where",
    "wide_dtype",
]

Operand = Any  # Leaves | float | 0-d Tensor
_foreach: Any = torch  # the stubs of torch's list operations do not know all of their overloads


class Leaves:
    """A list of tensors with the arithmetic of one tensor, by `torch._foreach_` calls."""

    __slots__ = ("tensors",)

    def __init__(self, tensors: list[Tensor] | tuple[Tensor, ...]) -> None:
        self.tensors = tensors

    def __add__(self, other: Operand) -> Leaves:
        if isinstance(other, Tensor):
            # By its full name: the plain one takes a 0-d tensor for a number and reads it on the host (2.11, 2.13).
            return Leaves(torch.ops.aten._foreach_add.Tensor(self.tensors, other))
        return Leaves(_foreach._foreach_add(self.tensors, _values(other)))

    def __sub__(self, other: Operand) -> Leaves:
        if isinstance(other, Tensor):  # there is no _foreach_sub with a tensor
            return self + (-other)
        return Leaves(_foreach._foreach_sub(self.tensors, _values(other)))

    def __mul__(self, other: Operand) -> Leaves:
        return Leaves(_foreach._foreach_mul(self.tensors, _values(other)))

    def __truediv__(self, other: Operand) -> Leaves:
        return Leaves(_foreach._foreach_div(self.tensors, _values(other)))

    def __neg__(self) -> Leaves:
        return Leaves(torch._foreach_neg(self.tensors))

    def __gt__(self, other: Operand) -> Leaves:  # no list operation compares
        return Leaves([a > b for a, b in zip(self.tensors, _each(other, len(self.tensors)), strict=True)])

    def __lt__(self, other: Operand) -> Leaves:
        return Leaves([a < b for a, b in zip(self.tensors, _each(other, len(self.tensors)), strict=True)])

    def abs(self) -> Leaves:
        """Absolute value of each element."""
        return Leaves(torch._foreach_abs(self.tensors))

    def sign(self) -> Leaves:
        """-1, 0 or 1 for each element."""
        return Leaves(torch._foreach_sign(self.tensors))

    def sqrt(self) -> Leaves:
        """Square root of each element."""
        return Leaves(torch._foreach_sqrt(self.tensors))


def lerp(a: Any, b: Any, weight: Any) -> Any:
    """`a + weight (b - a)`, on tensors or `Leaves`.

    >>> import torch
    >>> from ftrain.optim.lists import lerp
    >>> lerp(torch.zeros(1), torch.ones(1), 0.25)
    tensor([0.2500])
    """
    if isinstance(a, Leaves) and not isinstance(weight, Tensor):
        return Leaves(_foreach._foreach_lerp(a.tensors, b.tensors, weight))
    return a + (b - a) * weight


def maximum(a: Any, b: Any) -> Any:
    """The larger of `a` (tensors or `Leaves`) and `b` (the same, a number or a 0-d tensor), element by element.

    >>> import torch
    >>> from ftrain.optim.lists import maximum
    >>> maximum(torch.tensor([-1.0, 2.0]), 0.0)
    tensor([0., 2.])
    """
    if not isinstance(a, Leaves):
        return torch.clamp(a, min=b)
    if isinstance(b, Tensor):  # the list operation wants a number, and would read this one on the host
        return Leaves([torch.clamp(one, min=b) for one in a.tensors])
    return Leaves(_foreach._foreach_clamp_min(a.tensors, _values(b)))


def minimum(a: Any, b: Any) -> Any:
    """The smaller of `a` (tensors or `Leaves`) and `b` (the same, a number or a 0-d tensor), element by element.

    >>> import torch
    >>> from ftrain.optim.lists import minimum
    >>> minimum(torch.tensor([-1.0, 2.0]), 0.0)
    tensor([-1.,  0.])
    """
    if not isinstance(a, Leaves):
        return torch.clamp(a, max=b)
    if isinstance(b, Tensor):
        return Leaves([torch.clamp(one, max=b) for one in a.tensors])
    return Leaves(_foreach._foreach_clamp_max(a.tensors, _values(b)))


def where(condition: Any, a: Any, b: Any) -> Any:
    """`a` where the condition holds (0-d, or element by element), else `b`; one of the two is tensors or `Leaves`.

    >>> import torch
    >>> from ftrain.optim.lists import where
    >>> where(torch.tensor([True, False]), torch.ones(2), 0.0)
    tensor([1., 0.])
    """
    found = next((one for one in (condition, a, b) if isinstance(one, Leaves)), None)
    if found is None:
        return torch.where(condition, a, b)
    columns = [_each(one, len(found.tensors)) for one in (condition, a, b)]
    return Leaves([torch.where(*row) for row in zip(*columns, strict=True)])


def leafwise(fn: Callable[..., Any], *operands: Any) -> Any:
    """`fn` of tensors, applied to tensors or to each leaf of `Leaves`: for what has no list operation (a matrix product).

    >>> import torch
    >>> from ftrain.optim.lists import Leaves, leafwise
    >>> leafwise(lambda x, a: x @ x * a, Leaves([torch.ones(2, 2), torch.ones(1, 1)]), 2.0).tensors
    [tensor([[4., 4.],
            [4., 4.]]), tensor([[2.]])]
    """
    found = next((one for one in operands if isinstance(one, Leaves)), None)
    if found is None:
        return fn(*operands)
    columns = [_each(one, len(found.tensors)) for one in operands]
    rows = [fn(*row) for row in zip(*columns, strict=True)]
    if isinstance(rows[0], tuple):
        return tuple([Leaves(list(column)) for column in zip(*rows, strict=True)])
    return Leaves(rows)


def _each(value: Operand, count: int) -> Any:
    return value.tensors if isinstance(value, Leaves) else [value] * count


def _values(other: Operand) -> Any:
    return other.tensors if isinstance(other, Leaves) else other


def inside_transform() -> bool:
    """Whether a transform of `torch.func` (vmap, grad) is at work, in eager mode or in a trace.

    >>> import torch
    >>> from ftrain.optim.lists import inside_transform
    >>> seen = []
    >>> _ = torch.func.vmap(lambda x: (seen.append(inside_transform()), x)[1])(torch.ones(2))
    >>> seen, inside_transform()
    ([True], False)
    """
    return torch._C._functorch.maybe_current_level() is not None


# dynamo (2.13) refuses the call inside of a transform ("torch.* op returned non-Tensor"); with this mark it makes the call while it
# traces, when functorch's stack stands as it will. `torch.compiler.assume_constant_result` sets the mark, and imports dynamo.
inside_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see above


def one_by_one() -> bool:
    """Whether leaves are worked on one after the other: under compile, and under vmap and its kin.

    >>> from ftrain.optim.lists import one_by_one
    >>> one_by_one()
    False
    """
    return torch.compiler.is_compiling() or inside_transform()


def wide_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """In what a reduction over values of this dtype is computed: float32 for half precision, None for their own.

    >>> import torch
    >>> from ftrain.optim.lists import wide_dtype
    >>> wide_dtype(torch.bfloat16), wide_dtype(torch.float64)
    (torch.float32, None)
    """
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else None


def norms(tensors: list[Tensor]) -> list[Tensor]:
    """The 2-norm of each tensor, 0-d, in float32 where the tensor is of half precision, else in its own (real) dtype.

    >>> import torch
    >>> from ftrain.optim.lists import norms
    >>> norms([torch.full((2,), 300.0, dtype=torch.float16)])
    [tensor(424.2641)]
    """
    dtypes = {wide_dtype(t.dtype) for t in tensors}
    if one_by_one() or len(dtypes) > 1:
        return [torch.linalg.vector_norm(t, dtype=wide_dtype(t.dtype)) for t in tensors]
    return list(torch._foreach_norm(tensors, 2, dtype=dtypes.pop())) if dtypes else []


def over(rule: Callable[..., Any], first: Any, *rest: Any, scalars: Sequence[Any] = ()) -> Any:
    """Apply a rule, written as on one tensor, to whole trees of one structure; what it returns (one or a tuple) comes back as trees.

    Args:
        rule: `rule(*leaves, *scalars)`.
        first: a tree; the results get its structure and dtypes.
        *rest: more trees of its structure.
        scalars: numbers and 0-d tensors that the rule needs for every leaf (learning rate, bias corrections ...).

    >>> import torch
    >>> from ftrain.optim.lists import over
    >>> over(lambda g, p: g * 2.0 + p, {"w": torch.ones(2)}, {"w": torch.ones(2)})
    {'w': tensor([3., 3.])}
    """
    shape = tree.structure(first)
    lists = [tree.leaves(first)] + [tree.leaves(other) for other in rest]
    for other in lists[1:]:
        tree.zip_strict(lists[0], other, "gradients, optimizer state and parameters are")
    if not lists[0]:
        return first
    refs = lists[0]
    # A 0-d leaf would be promoted by a 0-d hyper-parameter of float64, and half of the list operations refuse mixed dtypes.
    if any(leaf.ndim == 0 for leaf in lists[0]):
        lists = [[leaf.unsqueeze(0) if leaf.ndim == 0 else leaf for leaf in found] for found in lists]
    if one_by_one():
        each = _spread(scalars, lists[0])
        rows = [rule(*row, *own) for row, own in zip(zip(*lists, strict=True), each, strict=True)]
        if isinstance(rows[0], tuple):
            return tuple([tree.unflatten(shape, _as(refs, column)) for column in zip(*rows, strict=True)])
        return tree.unflatten(shape, _as(refs, rows))
    out = rule(*[Leaves(found) for found in lists], *scalars)
    if isinstance(out, tuple):
        return tuple([tree.unflatten(shape, _as(refs, one.tensors)) for one in out])
    return tree.unflatten(shape, _as(refs, out.tensors))


def _spread(scalars: Sequence[Any], leaves: list[Tensor]) -> list[list[Any]]:
    """The scalars for each leaf.

    Inductor copies the formula of a 0-d tensor into the element loop of every leaf, where two powers in float64 take longer than
    all of Adam. `as_strided` makes it compute them once, into a buffer; each leaf reads an element of its own, since leaves that
    read the same element are fused into one kernel at the end of the graph, with all gradients alive until then.
    """
    if not torch.compiler.is_compiling() or inside_transform():
        return [list(scalars) for _ in leaves]
    tensors = [value for value in scalars if isinstance(value, Tensor)]
    if not tensors:
        return [list(scalars) for _ in leaves]
    dtype = torch.float64 if any(leaf.dtype == torch.float64 for leaf in leaves) else torch.float32
    n, k = len(leaves), len(tensors)
    once = torch.as_strided(torch.stack([value.to(dtype) for value in tensors]), (k,), (1,))
    many = torch.as_strided(once.repeat(n), (k * n,), (1,)).unbind()
    found: list[list[Any]] = []
    for i in range(n):
        own = iter(many[i * k : (i + 1) * k])
        found.append([next(own) if isinstance(value, Tensor) else value for value in scalars])
    return found


def _as(refs: list[Tensor], found: Any) -> list[Tensor]:
    """In the dtypes of the first tree, and 0-d where it is."""
    found = [one.reshape(()) if ref.ndim == 0 else one for one, ref in zip(found, refs, strict=True)]
    return [one if one.dtype == ref.dtype else one.to(ref.dtype) for one, ref in zip(found, refs, strict=True)]
