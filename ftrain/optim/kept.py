"""What an optimizer of torch keeps, as a pytree of tensors, and back.

An optimizer keeps things in three places: a dict for each parameter (`optimizer.state[p]`), entries that it writes into its
parameter groups, and attributes that it writes on itself. `Kept` holds the three. In the latter two, what counts is what a step
has changed, and the numbers that no constructor has an argument for (a step size that the optimizer finds by itself, say).

Laws
----
- `write(o, read(o, ...), ...)` leaves `o` as it is: tensors keep dtype and device, Python numbers their type.
- What is read shares no memory with the optimizer, and the optimizer shares none with what is written to it.
- Something that is neither a tensor, a number, None nor a container of those raises, with its place.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..errors import ModelError, explain

__all__ = ["Bool", "Float", "Int", "Kept", "Snapshot", "read", "snapshot", "write"]

Values = dict[str, Any]


class Bool(NamedTuple):
    """A Python bool: bool () on the CPU."""

    value: Tensor


class Int(NamedTuple):
    """A Python int: int64 () on the CPU."""

    value: Tensor


class Float(NamedTuple):
    """A Python float: float64 () on the CPU."""

    value: Tensor


_NUMBERS: dict[type, tuple[Any, torch.dtype]] = {
    bool: (Bool, torch.bool),
    int: (Int, torch.int64),
    float: (Float, torch.float64),
}


class Kept(NamedTuple):
    """`slots`: by parameter; `groups`: by parameter group; `own`: the optimizer's attributes. Each a dict of named values."""

    slots: dict[str, Values]
    groups: dict[str, Values]
    own: Values


class Snapshot(NamedTuple):
    """Groups and attributes of an optimizer at one time: each value, and the version of its memory if it is a tensor."""

    groups: list[dict[str, tuple[Any, int]]]
    own: dict[str, tuple[Any, int]]


def snapshot(optimizer: torch.optim.Optimizer) -> Snapshot:
    """What stands in the groups and attributes now.

    >>> import torch
    >>> from ftrain.optim.kept import snapshot
    >>> snapshot(torch.optim.SGD([torch.zeros(1)], lr=0.1)).groups[0]["lr"]
    (0.1, 0)
    """
    return Snapshot(
        [_versions(_settings(group)) for group in optimizer.param_groups], _versions(_attributes(optimizer))
    )


def read(
    optimizer: torch.optim.Optimizer,
    params: Mapping[str, Tensor],
    groups: Iterable[str],
    before: Snapshot,
    also: Kept | None = None,
) -> Kept:
    """What an optimizer keeps after a step.

    Args:
        optimizer: the optimizer.
        params: its parameters by name.
        groups: names for its parameter groups, in their order.
        before: a snapshot from before the step.
        also: earlier knowledge: the entries of groups and attributes that count although this step left them as they were.

    Raises:
        ModelError: a value that cannot be kept as a tensor.

    >>> import torch
    >>> from ftrain.optim.kept import read, snapshot
    >>> w = torch.zeros(1, requires_grad=True)
    >>> optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    >>> before, w.grad = snapshot(optimizer), torch.ones(1)
    >>> optimizer.step()
    >>> read(optimizer, {"w": w}, ["all"], before)
    Kept(slots={'w': {'momentum_buffer': tensor([1.])}}, groups={'all': {}}, own={})
    """
    kind = type(optimizer).__name__
    known = {id(p) for p in params.values()}
    for key, value in optimizer.state.items():
        if id(key) not in known:
            raise _cannot_keep(kind, f"optimizer.state[{key!r}]", value)
    slots = {
        name: _encode(dict(optimizer.state.get(p, {})), f"optimizer.state[{name!r}]", kind)
        for name, p in params.items()
    }
    names = list(groups)
    found = {}
    for name, settings, old in zip(names, optimizer.param_groups, before.groups, strict=True):
        keys = _counts(type(optimizer), old, _settings(settings)) | (also.groups[name].keys() if also else set())
        found[name] = _encode({key: settings.get(key) for key in sorted(keys)}, f"param_groups[{name!r}]", kind)
    attributes = _attributes(optimizer)
    keys = _counts(type(optimizer), before.own, attributes) | (also.own.keys() if also else set())
    own = _encode({key: attributes.get(key) for key in sorted(keys)}, "vars(optimizer)", kind)
    return Kept(slots, found, own)


def write(optimizer: torch.optim.Optimizer, kept: Kept, params: Mapping[str, Tensor], groups: Iterable[str]) -> None:
    """Give an optimizer copies of what another one kept.

    >>> import torch
    >>> from ftrain.optim.kept import Kept, write
    >>> w = torch.zeros(1, requires_grad=True)
    >>> optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    >>> write(optimizer, Kept({"w": {"momentum_buffer": torch.ones(1)}}, {"all": {}}, {}), {"w": w}, ["all"])
    >>> optimizer.state[w]
    {'momentum_buffer': tensor([1.])}
    """
    optimizer.state.clear()
    for name, p in params.items():
        if kept.slots[name]:
            optimizer.state[p] = _decode(kept.slots[name])
    for name, settings in zip(groups, optimizer.param_groups, strict=True):
        settings.update(_decode(kept.groups[name]))
    vars(optimizer).update(_decode(kept.own))


# -- what counts ------------------------------------------------------------------------------------------------------------


def _settings(group: Values) -> Values:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


@functools.cache
def _base() -> frozenset[str]:
    """The attributes that every optimizer of torch has. Found when first needed: to make one imports all of torch.compile."""
    return frozenset(vars(torch.optim.SGD([torch.zeros(1)], lr=0.1)))


@functools.cache
def _arguments(kind: type) -> frozenset[str]:
    """The names that the constructors of a class and of its bases take."""
    inits = [vars(base)["__init__"] for base in kind.__mro__ if base is not object and "__init__" in vars(base)]
    return frozenset(name for init in inits for name in inspect.signature(init).parameters)


def _attributes(optimizer: torch.optim.Optimizer) -> Values:
    """An optimizer's own attributes, without those of the base class."""
    return {key: value for key, value in vars(optimizer).items() if key not in _base()}


def _versions(values: Values) -> dict[str, tuple[Any, int]]:
    return {key: (value, value._version if isinstance(value, Tensor) else 0) for key, value in values.items()}


_NOTHING = object()


def _counts(kind: type, before: dict[str, tuple[Any, int]], now: Values) -> set[str]:
    found = {key for key, value in now.items() if type(value) in (int, float) and key not in _arguments(kind)}
    return found | _changed(before, now)


def _changed(before: dict[str, tuple[Any, int]], now: Values) -> set[str]:
    """The names of the values that are new or not what they were. Numbers are compared, other things by identity."""
    changed = set()
    for key, value in now.items():
        was, version = before.get(key, (_NOTHING, 0))
        if type(value) in _NUMBERS and type(was) is type(value):
            if value != was and not (value != value and was != was):  # noqa: PLR0124 - a NaN stays a NaN
                changed.add(key)
        elif value is not was or (isinstance(value, Tensor) and value._version != version):
            changed.add(key)
    return changed


# -- values and leaves --------------------------------------------------------------------------------------------------------


def _encode(values: Any, where: str, kind: str) -> Any:
    """A value as a tree of tensors that share no memory with it."""
    if isinstance(values, Tensor):
        return values.detach().clone()
    if type(values) in _NUMBERS:
        make, dtype = _NUMBERS[type(values)]
        return make(torch.tensor(values, dtype=dtype))
    if values is None:
        return None
    if isinstance(values, dict):
        return {key: _encode(value, f"{where}[{key!r}]", kind) for key, value in values.items()}
    if type(values) in (list, tuple):
        return type(values)([_encode(value, f"{where}[{i}]", kind) for i, value in enumerate(values)])
    raise _cannot_keep(kind, where, values)


def _decode(values: Any) -> Any:
    """The value that a tree stands for, in memory of its own."""
    if isinstance(values, (Bool, Int, Float)):
        return values.value.item()  # sync: a tensor on the CPU, so no device is waited for
    if isinstance(values, Tensor):
        return values.clone()
    if isinstance(values, dict):
        return {key: _decode(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)([_decode(value) for value in values])
    return values


def _cannot_keep(kind: str, where: str, value: Any) -> ModelError:
    return ModelError(
        explain(
            f"ft.optim.from_torch: {kind} keeps something that a state of tensors cannot hold.",
            where=where,
            expected="a tensor, a number, None, or lists, tuples and dicts of those",
            got=tree.describe(value),
            fix="write it as a transform: ft.optim.Transform(init, update), as in ftrain/optim/rules/sgd.py",
        )
    )
