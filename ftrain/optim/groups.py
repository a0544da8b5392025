"""Groups of parameters, each with a transform of its own.

Laws
----
- `partition(labels, {"a": tx})` with one label for all computes what `tx` does.
- A group's transform sees its own leaves alone: `clip_by_global_norm` in a group takes the norm of that group.
- A group can be updated by itself, with `tx.select(params)[label]`, `tx.transforms[label]` and `state[label]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import tree
from ..errors import ModelError, explain
from ..types import Transform
from .masking import part_of
from .masks import check_patterns, matches, names, nearest, put, some, take
from .transform import forwarding, takes_value_fn

__all__ = ["Labels", "Partition", "partition"]

Labels = Any  # {pattern: label} | Callable[[str, Tensor], str] | a tree of labels

_FIX = 'ft.optim.partition({"head.*": "new", "*": "old"}, {"new": ft.optim.adamw(1e-3), "old": ft.optim.adamw(1e-5)})'


class Partition(Transform):
    """A transform that keeps its groups apart: made by `partition`.

    Attributes:
        labels: how the leaves are labelled.
        transforms: the transform of each label.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.partition({"gen.*": "gen", "*": "dis"}, {"gen": ft.optim.adam(1e-4), "dis": ft.optim.adam(4e-4)})
    >>> params = {"gen.w": torch.ones(1), "dis.w": torch.zeros(1)}
    >>> tx.select(params)["gen"], list(tx.transforms), sorted(tx.init(params))
    ({'gen.w': tensor([1.])}, ['gen', 'dis'], ['dis', 'gen'])
    """

    labels: Labels
    transforms: Mapping[str, Transform]
    _allow_empty: bool

    def select(self, params: Any) -> dict[str, dict[str, Any]]:
        """The leaves of each label, as a flat dict by path; the groups of gradients are found in the same way.

        >>> import torch, ftrain as ft
        >>> tx = ft.optim.partition(lambda path, p: f"{p.ndim}d", {"1d": ft.optim.sgd(0.1), "2d": ft.optim.sgd(0.2)})
        >>> tx.select({"w": torch.ones(1, 1), "b": torch.zeros(1)})
        {'1d': {'b': tensor([0.])}, '2d': {'w': tensor([[1.]])}}
        """
        found = _labelled(self.labels, self.transforms, params)
        return {label: take(params, [one == label for one in found]) for label in self.transforms}

    def merge(self, params: Any, part: dict[str, Any]) -> Any:
        """The tree with the leaves of one group (by path) in their places.

        >>> import torch, ftrain as ft
        >>> tx = ft.optim.partition({"a": "one", "b": "two"}, {"one": ft.optim.sgd(0.1), "two": ft.optim.sgd(0.2)})
        >>> tx.merge({"a": torch.ones(1), "b": torch.ones(1)}, {"b": torch.zeros(1)})
        {'a': tensor([1.]), 'b': tensor([0.])}
        """
        return put(params, part)


def partition(labels: Labels, transforms: Mapping[str, Transform], *, allow_empty: bool = False) -> Partition:
    """Give each group of parameters a transform of its own: learning rates, decay, or another optimizer altogether.

    Args:
        labels: `{pattern: label}`, of which the first pattern that matches a path counts, and `"*"` is the default; a function
            `(path, leaf) -> label`; or a tree of labels of the parameters' structure.
        transforms: `{label: transform}`.
        allow_empty: let a transform have no leaves: for labels that depend on shapes, when a model may have none of a kind.

    Returns:
        A `Partition`: a transform whose state is the dict of the groups' states by label, each on the flat dict of its own leaves,
        so that a group's learning rate is the metric `lr/<label>`. A group without leaves has the state `()`.

    Raises:
        ModelError: a label without a transform or a transform without a label, a pattern that matches nothing, a leaf without a
            label; all but the first two from `init`.

    Source: the idea of `optax.partition` (formerly `multi_transform`), whose arguments stand in the other order.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.partition({"head.*": "new", "*": "old"}, {"new": ft.optim.sgd(1.0), "old": ft.optim.sgd(0.1)})
    >>> params = {"body.w": torch.zeros(1), "head.w": torch.zeros(1)}
    >>> updates, state = tx.update({"body.w": torch.ones(1), "head.w": torch.ones(1)}, tx.init(params), params)
    >>> updates
    {'body.w': tensor([-0.1000]), 'head.w': tensor([-1.])}
    >>> sorted(ft.optim.metrics(state))
    ['lr/new', 'lr/old']
    """
    _check_arguments(labels, transforms)

    def init(params: Any, /) -> dict[str, Any]:
        found = _labelled(labels, transforms, params)
        groups = {label: take(params, [one == label for one in found]) for label in transforms}
        if not allow_empty:
            _check_used(labels, found, groups)
        return {label: transforms[label].init(group) if group else () for label, group in groups.items()}

    def update(grads: Any, state: Any, params: Any, more: dict[str, Any]) -> tuple[Any, Any]:
        found = _labelled(labels, transforms, params)
        new: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for label, one in transforms.items():
            chosen = [own == label for own in found]
            if not any(chosen):
                new[label] = state[label]
                continue
            given = part_of(more, params, chosen) if takes_value_fn(one) else {}
            updates, new[label] = one.update(take(grads, chosen), state[label], take(params, chosen), **given)
            merged |= updates
        return put(grads, merged), new

    both = forwarding(init, update, *transforms.values())
    if (
        torch.compiler.is_compiling()
    ):  # inside `inject`, which uses the two functions alone; dynamo (2.13) sets no attributes here
        return both  # type: ignore[return-value]  # see above
    made = Partition(*both)
    made.labels, made.transforms, made._allow_empty = labels, dict(transforms), allow_empty
    return made


def _labelled(labels: Labels, transforms: Mapping[str, Transform], params: Any) -> list[str]:
    """The label of each leaf, in the order of `tree.leaves`: a matter of paths and shapes, so constant under compile."""
    found = names(params)
    if _by_pattern(labels):
        check_patterns([pattern for pattern in labels if pattern != "*"], found, "partition: labels")
        chosen: list[Any] = [_first(labels, name) for name in found]
        missing = [name for name, label in zip(found, chosen, strict=True) if label is None]
        if missing:
            raise ModelError(
                explain(
                    "partition: leaves without a label.",
                    where=some(missing),
                    expected="a pattern that matches each path",
                    fix=f'labels={{..., "*": {next(iter(labels.values()))!r}}}   # a default',
                )
            )
    elif callable(labels):
        chosen = [labels(name, leaf) for name, leaf in zip(found, tree.leaves(params), strict=True)]
    else:
        if not tree.same_structure(labels, params):
            raise ModelError(
                explain(
                    "partition: the tree of labels has another structure than the parameters.",
                    expected=some(found),
                    got=some(tree.paths(labels, "labels")),
                    fix=_FIX,
                )
            )
        chosen = tree.leaves(labels)
    for name, label in zip(found, chosen, strict=True):
        _check_label(label, transforms, name)
    return chosen


def _first(labels: dict[str, str], name: str) -> str | None:
    for pattern, label in labels.items():
        if matches(name, (pattern,)):
            return label
    return None


def _by_pattern(labels: Labels) -> bool:
    return (
        isinstance(labels, dict)
        and bool(labels)
        and all(isinstance(pattern, str) and isinstance(label, str) for pattern, label in labels.items())
    )


def _check_arguments(labels: Labels, transforms: Any) -> None:
    swapped = isinstance(labels, Mapping) and bool(labels) and all(map(_is_transform, labels.values()))
    if swapped or not (isinstance(transforms, Mapping) and transforms):
        raise ModelError(
            explain(
                "partition wants the labels first, then the transform of each label.",
                expected="partition(labels, {label: Transform(init, update)})",
                got="partition(transforms, labels)" if swapped else f"transforms={transforms!r}",
                cause="the arguments stand in the other order than in optax" if swapped else None,
                fix=_FIX,
            )
        )
    for label, one in transforms.items():
        if not _is_transform(one):
            raise ModelError(
                explain(
                    f"partition: what the label {label!r} has is no transform.",
                    where=f"transforms[{label!r}]",
                    expected="Transform(init, update)",
                    got=getattr(one, "__name__", repr(one)),
                    cause="a function that makes an optimizer, or a class, makes one when it is called"
                    if callable(one)
                    else None,
                    fix=f"transforms={{{label!r}: ft.optim.adamw(1e-3), ...}}   # or ft.optim.from_torch(torch.optim.SGD, lr=0.1)",
                )
            )
    if _by_pattern(labels):
        for pattern, label in labels.items():
            _check_label(label, transforms, f"labels[{pattern!r}]")
        for label in transforms:
            if label not in labels.values():
                raise ModelError(_unused(label, list(labels.values())))


def _check_label(label: Any, transforms: Mapping[str, Transform], where: str) -> None:
    if label not in transforms:
        like = nearest(str(label), transforms)
        raise ModelError(
            explain(
                f"partition: the label {label!r} has no transform.",
                where=where,
                expected=f"one of: {some(list(transforms))}",
                fix=f"label {like!r}" if like else f"transforms={{..., {label!r}: ft.optim.adamw(1e-3)}}",
            )
        )


def _check_used(labels: Labels, found: list[str], groups: dict[str, dict[str, Any]]) -> None:
    default = labels.get("*") if _by_pattern(labels) else None
    for label, group in groups.items():
        if not group and label != default:  # what a default leaves over may be nothing
            raise ModelError(_unused(label, found))


def _unused(label: str, used: list[str]) -> str:
    like = nearest(label, used)
    return explain(
        f"partition: no leaf has the label {label!r}, so its transform would do nothing.",
        expected=f"labels that are used: {some(sorted(set(used))) or '(none)'}",
        cause=f"is {like!r} meant?" if like else None,
        fix=f"label some leaves {label!r}, or leave its transform out, or partition(..., allow_empty=True)",
    )


def _is_transform(value: object) -> bool:
    return callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))
