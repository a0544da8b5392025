"""`diff`: where two states, or any two trees, differ.

Laws
----
- `diff(a, a)` is empty; `bool(diff(a, b)) == bool(diff(b, a))`.
- By default two tensors are the same if their bits are (a NaN is the same as any other NaN); with `rtol` or `atol` an element is
  the same if `|a - b| <= atol + rtol * |b|`.
- Neither tree is changed or copied; only the elements that differ are looked at closely.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .. import tree
from ..errors import ArgumentError, StructureError, explain
from ..state import TrainState, check_state
from .fakes import is_abstract

__all__ = ["Change", "Diff", "diff"]

_SHOWN = 12
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Kind = Literal["missing", "extra", "structure", "type", "shape", "dtype", "device", "values"]


@dataclass(frozen=True)
class Change:
    """One leaf that differs.

    Attributes:
        path: where, as code.
        kind: `"missing"` (only in the first tree), `"extra"` (only in the second), `"structure"`, `"type"`, `"shape"`, `"dtype"`,
            `"device"`, or `"values"`.
        a: the leaf in the first tree, in words: its form, or its value at `first`.
        b: the leaf in the second tree.
        count: how many elements differ.
        size: of how many.
        max_abs: the largest |a - b|; infinite where one of the two is no finite number.
        max_rel: the largest |a - b| / max(|a|, |b|).
        first: index of the first element that differs.

    >>> import torch, ftrain as ft
    >>> ft.diff([torch.zeros(2)], [torch.zeros(3)]).changes[0].kind
    'shape'
    """

    path: str
    kind: Kind
    a: str
    b: str
    count: int = 0
    size: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    first: tuple[int, ...] | None = None

    def __str__(self) -> str:
        if self.kind in ("missing", "extra"):
            return f"{self.path}  {self.kind}: {self.a if self.kind == 'missing' else self.b}"
        if self.kind != "values":
            return f"{self.path}  {self.kind}: {self.a} -> {self.b}"
        if not self.size:
            return f"{self.path}  {self.a} -> {self.b}"
        if self.first == ():
            return f"{self.path}  {self.a} -> {self.b}  (abs {self.max_abs:.2g}, rel {self.max_rel:.2g})"
        return (
            f"{self.path}  {self.count} of {self.size} elements, max abs {self.max_abs:.2g}, max rel {self.max_rel:.2g}, "
            f"first at {list(self.first or ())}: {self.a} -> {self.b}"
        )


@dataclass(frozen=True, repr=False)
class Diff:
    """What differs between two trees; true if anything does. Made by `ftrain.diff`.

    Attributes:
        changes: the leaves that differ: first those of another form, then the others by the size of the difference.
        leaves: how many leaves the two trees have together, each path once.

    >>> import torch, ftrain as ft
    >>> bool(ft.diff({"w": torch.ones(2)}, {"w": torch.ones(2)}))
    False
    """

    changes: tuple[Change, ...]
    leaves: int

    def __bool__(self) -> bool:
        return bool(self.changes)

    def __len__(self) -> int:
        return len(self.changes)

    def __iter__(self) -> Iterator[Change]:
        return iter(self.changes)

    def __repr__(self) -> str:
        if not self.changes:
            return f"Diff(no difference in {self.leaves} leaves)"
        lines = [f"Diff({len(self.changes)} of {self.leaves} leaves differ)"]
        lines += [f"  {change}" for change in self.changes[:_SHOWN]]
        if len(self.changes) > _SHOWN:
            lines.append(f"  ... and {len(self.changes) - _SHOWN} more, in .changes")
        return "\n".join(lines)


def diff(state_a: Any, state_b: Any, *, rtol: float = 0.0, atol: float = 0.0) -> Diff:
    """Compare two states leaf by leaf: what is the same, what differs and by how much, what is missing.

    Args:
        state_a: a `TrainState`, or any tree of tensors, arrays and numbers.
        state_b: what it is compared with.
        rtol: relative tolerance, by the element of `state_b`.
        atol: absolute tolerance. With both 0 the bits decide; NaN is the same as NaN.

    Returns:
        A `Diff`: true if anything differs; its text shows the largest differences.

    Raises:
        ArgumentError: a negative tolerance, a module in place of a state, or leaves without values (`meta`).
        DonatedStateError: a state whose memory is gone.

    >>> import torch, ftrain as ft
    >>> a = ft.init(torch.nn.Linear(2, 1, bias=False), ft.optim.sgd(0.1))
    >>> b = a.replace(params={"weight": a.params["weight"] + torch.tensor([[0.0, 1.0]])}, step=a.step + 3)
    >>> found = ft.diff(a, b)
    >>> [(change.path, change.count, round(change.max_abs, 3)) for change in found]
    [('state.step', 1, 3.0), ("state.params['weight']", 1, 1.0)]
    >>> bool(found), bool(ft.diff(a, b, atol=3))
    (True, False)
    """
    for name, value in (("rtol", rtol), ("atol", atol)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ArgumentError(explain(f"ft.diff: {name}={value!r} is no tolerance.", expected="a number >= 0"))
    for one in (state_a, state_b):
        _check(one)
    root = "state" if isinstance(state_a, TrainState) or isinstance(state_b, TrainState) else "tree"
    left, right = dict(tree.items(state_a, root)), dict(tree.items(state_b, root))
    changes: list[Change] = []
    for path, a in left.items():
        change = _compare(path, a, right[path], rtol, atol) if path in right else _gone(path, a, "missing")
        if change is not None:
            changes.append(change)
    changes += [_gone(path, b, "extra") for path, b in right.items() if path not in left]
    if left.keys() == right.keys() and not tree.same_structure(state_a, state_b):
        changes.append(_structure(state_a, state_b, root))
    changes.sort(key=lambda change: (change.kind == "values", -change.max_abs, -change.max_rel))
    return Diff(tuple(changes), len(left.keys() | right.keys()))


def _check(one: Any) -> None:
    if isinstance(one, nn.Module):
        raise ArgumentError(
            explain(
                "ft.diff compares states and other trees, and this is a module.",
                got=type(one).__name__,
                fix="ft.diff(a.state_dict(), b.state_dict())",
            )
        )
    if isinstance(one, TrainState):
        check_state(one, "ft.diff")
    for path, leaf in tree.items(one, "state" if isinstance(one, TrainState) else "tree"):
        if is_abstract(leaf):
            raise ArgumentError(
                explain(
                    "ft.diff compares values, and this leaf has none.",
                    where=path,
                    got=tree.describe(leaf),
                    fix="ft.tree.check_same(a, b, root='state', what='...')   # compares structure, shapes and dtypes",
                )
            )


def _gone(path: str, leaf: Any, kind: Literal["missing", "extra"]) -> Change:
    said = tree.describe(leaf)
    return Change(path, kind, said if kind == "missing" else "", said if kind == "extra" else "")


def _structure(a: Any, b: Any, root: str) -> Change:
    """The same leaves in other containers: a list for a tuple, None for an empty dict."""
    try:
        tree.check_same(a, b, root=root, what="")
    except StructureError as error:
        facts = dict(line.strip().split(":", 1) for line in str(error).splitlines() if ":" in line)
        where, one, two = (facts.get(key, "").strip() for key in ("where", "expected", "got"))
        if one == two:
            one, two = str(tree.structure(a)), str(tree.structure(b))
        return Change(where or root, "structure", one, two)
    raise AssertionError("two structures differ and are the same")


def _compare(path: str, a: Any, b: Any, rtol: float, atol: float) -> Change | None:
    a, b = _as_tensor(a), _as_tensor(b)
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        if type(a) is not type(b):
            return Change(path, "type", tree.describe(a), tree.describe(b))
        return None if _same(a, b, rtol, atol) else Change(path, "values", repr(a), repr(b))
    forms: tuple[tuple[Kind, Callable[[Tensor], Any]], ...] = (
        ("shape", lambda t: tuple(t.shape)),
        ("dtype", lambda t: t.dtype),
        ("device", lambda t: t.device),
    )
    for kind, form in forms:
        if form(a) != form(b):
            return Change(path, kind, str(form(a)), str(form(b)))
    return _values(path, a.detach(), b.detach(), rtol, atol)


def _as_tensor(leaf: Any) -> Any:
    if isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind in "biufc":
        return torch.as_tensor(np.asarray(leaf))
    return leaf


def _same(a: Any, b: Any, rtol: float, atol: float) -> bool:
    if isinstance(a, float):
        if math.isnan(a) or math.isnan(b):
            return math.isnan(a) and math.isnan(b)
        return bool(a == b or abs(a - b) <= atol + rtol * abs(b))
    return bool(np.all(a == b))


def _values(path: str, a: Tensor, b: Tensor, rtol: float, atol: float) -> Change | None:
    differs = _differing(a, b, rtol, atol)
    if not bool(differs.any()):
        return None
    one, two = a[differs], b[differs]
    wide = torch.complex128 if a.is_complex() else torch.float64
    x, y = one.to(wide), two.to(wide)
    gap = (x - y).abs()
    largest = torch.maximum(x.abs(), y.abs())
    relative = torch.where(largest > 0, gap / largest, 0.0)
    at = tuple(differs.nonzero()[0].tolist())
    return Change(
        path,
        "values",
        _number(one[0]),
        _number(two[0]),
        count=int(differs.sum()),
        size=a.numel(),
        max_abs=float(gap.nan_to_num(nan=math.inf).max()),
        max_rel=float(relative.nan_to_num(nan=math.inf).max()),
        first=at,
    )


def _differing(a: Tensor, b: Tensor, rtol: float, atol: float) -> Tensor:
    """Which elements differ, as bool of the tensors' shape."""
    if a.is_complex():
        parts = _differing(torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj()), 0.0, 0.0)
        apart = parts.any(-1)
    elif a.dtype == torch.bool or not a.is_floating_point():
        apart = a != b
    else:
        bits = _BITS[a.element_size()]
        x, y = (t.resolve_neg().contiguous().view(bits) for t in (a, b))
        apart = (x != y) & ~(_nan(a) & _nan(b))
    if not (rtol or atol) or not bool(apart.any()):
        return apart
    x, y = (t[apart].to(torch.complex128 if t.is_complex() else torch.float64) for t in (a, b))
    near = (x == y) | ((x - y).abs() <= atol + rtol * y.abs())
    left = apart.clone()
    left[apart] = ~near
    return left


def _nan(t: Tensor) -> Tensor:
    return (t if t.element_size() > 1 else t.float()).isnan()  # 8-bit floats have no comparisons of their own


def _number(t: Tensor) -> str:
    value = t.item()
    return f"{value:.6g}" if isinstance(value, float) else str(value)
