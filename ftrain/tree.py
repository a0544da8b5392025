"""Pytrees: optree, bound to the namespace "ftrain".

Laws
----
- `unflatten(structure(t), leaves(t))` is `t` again.
- `map(f, t)` keeps the structure; `map(f, a, b)` refuses trees of different structure and says where they part.
- Leaves of a dict come out in the order of its sorted keys (optree's rule), never in insertion order.
- `None` is an empty subtree, not a leaf.

Everything that is a pytree node in ftrain is registered by `register` below and nowhere else, under one namespace, so that
registering can never disturb another library's use of optree.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import optree
import torch
from torch import Tensor

from .errors import StructureError, explain

__all__ = [
    "NAMESPACE",
    "check_same",
    "describe",
    "fields",
    "items",
    "leaves",
    "map",
    "paths",
    "register",
    "registered",
    "same_structure",
    "structure",
    "unflatten",
    "zip_strict",
]

NAMESPACE = "ftrain"

T = TypeVar("T")
C = TypeVar("C", bound=type)
Structure = Any  # optree.PyTreeSpec, or (inside a trace) nested tuples that compare in the same way

_fields: dict[type, tuple[str, ...]] = {}


def register(*fields: str) -> Callable[[C], C]:
    """Class decorator: make a class with these fields a pytree node; `cls(*fields)` must rebuild it.

    The children are the named attributes in this order. Attributes that are not named do not survive a `map`.
    """

    def decorate(cls: C) -> C:
        def flatten(obj: Any) -> tuple[tuple[Any, ...], None, tuple[str, ...]]:
            return tuple([getattr(obj, name) for name in fields]), None, fields

        def unflatten_(_: Any, children: Iterable[Any]) -> Any:
            return cls(*children)

        _fields[cls] = fields
        optree.register_pytree_node(cls, flatten, unflatten_, path_entry_type=optree.GetAttrEntry, namespace=NAMESPACE)
        return cls

    return decorate


def fields(cls: type) -> tuple[str, ...]:
    """The fields with which a class was registered.

    >>> from ftrain import metrics, tree
    >>> tree.fields(metrics.Mean)
    ('total', 'weight')
    """
    return _fields[cls]


def registered() -> list[type]:
    """The classes that `register` made pytree nodes.

    >>> from ftrain import metrics, tree
    >>> metrics.Mean in tree.registered()
    True
    """
    return list(_fields)


def leaves(tree: Any) -> list[Any]:
    """The leaves of a tree, in its order.

    >>> from ftrain import tree
    >>> tree.leaves({"b": 2, "a": (1, None)})
    [1, 2]
    """
    if torch.compiler.is_compiling():
        found: list[Any] = []
        _traced_flatten(tree, found)
        return found
    return optree.tree_leaves(tree, namespace=NAMESPACE)


def structure(tree: Any) -> Structure:
    """The structure of a tree without its leaves.

    >>> from ftrain import tree
    >>> tree.structure({"a": 1}) == tree.structure({"a": 2})
    True
    """
    if torch.compiler.is_compiling():
        return _traced_flatten(tree, [])
    return optree.tree_structure(tree, namespace=NAMESPACE)


def unflatten(structure: Structure, leaves: Iterable[Any]) -> Any:
    """Put leaves back into a structure.

    >>> from ftrain import tree
    >>> tree.unflatten(tree.structure({"a": 1, "b": 2}), [3, 4])
    {'a': 3, 'b': 4}
    """
    if torch.compiler.is_compiling():
        return _traced_unflatten(structure, list(leaves), [0])
    return optree.tree_unflatten(structure, leaves)


def map(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Apply `fn` to the leaves of one tree, or to the corresponding leaves of several.

    Raises:
        StructureError: the trees differ in structure; the message shows where.

    >>> from ftrain import tree
    >>> tree.map(lambda x, y: x + y, {"a": 1}, {"a": 10})
    {'a': 11}
    """
    for other in rest:
        if not same_structure(tree, other):
            raise _structure_error(tree, other, "tree", "the trees given to ftrain.tree.map differ in structure.")
    if torch.compiler.is_compiling():
        columns = [leaves(one) for one in (tree, *rest)]
        return unflatten(structure(tree), [fn(*row) for row in builtins.zip(*columns, strict=True)])
    return optree.tree_map(fn, tree, *rest, namespace=NAMESPACE)


def paths(tree: Any, root: str = "tree") -> list[str]:
    """The path of each leaf, written as the code that reaches it.

    >>> from ftrain import tree
    >>> tree.paths({"w": 1, "b": (2, 3)}, root="params")
    ["params['b'][0]", "params['b'][1]", "params['w']"]
    """
    if torch.compiler.is_compiling():
        found: list[str] = []
        _traced_paths(tree, root, found)
        return found
    return [accessor.codify(root) for accessor in optree.tree_accessors(tree, namespace=NAMESPACE)]


def items(tree: Any, root: str = "tree") -> Iterator[tuple[str, Any]]:
    """Pairs of path (as code) and leaf.

    >>> from ftrain import tree
    >>> list(tree.items({"w": 1}, root="p"))
    [("p['w']", 1)]
    """
    return builtins.zip(paths(tree, root), leaves(tree), strict=True)


def same_structure(a: Any, b: Any) -> bool:
    """Whether two trees have the same structure (leaves are not looked at).

    >>> from ftrain import tree
    >>> tree.same_structure({"a": 1}, {"b": 1})
    False
    """
    if torch.compiler.is_compiling():
        return _traced_same(structure(a), structure(b))
    return bool(structure(a) == structure(b))


def zip_strict(a: Sequence[T], b: Sequence[Any], what: str = "sequences") -> Iterator[tuple[T, Any]]:
    """`zip` that raises before the first pair when the lengths differ.

    >>> from ftrain import tree
    >>> list(tree.zip_strict([1, 2], ["a", "b"]))
    [(1, 'a'), (2, 'b')]
    """
    if len(a) != len(b):
        raise StructureError(
            explain(f"{what} of unequal length.", expected=f"{len(a)} entries", got=f"{len(b)} entries")
        )
    return builtins.zip(a, b, strict=True)


def describe(leaf: Any) -> str:
    """A leaf in a few characters: dtype, shape and device of a tensor, the type of anything else.

    >>> import torch
    >>> from ftrain import tree
    >>> tree.describe(torch.zeros(2, 3)), tree.describe("text")
    ('float32[2, 3] on cpu', 'str')
    """
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}[{', '.join(str(n) for n in leaf.shape)}] on {leaf.device}"
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return f"{type(leaf).__module__.split('.')[0]} {leaf.dtype}[{', '.join(str(n) for n in leaf.shape)}]"
    return type(leaf).__name__


def check_same(expected: Any, got: Any, *, root: str, what: str, fix: str | None = None) -> None:
    """Raise unless two trees agree in structure and their leaves in type, shape, dtype and device.

    Args:
        expected: the tree that sets the standard.
        got: the tree that is checked.
        root: the name of the tree in the error's paths, e.g. `"state"`.
        what: the sentence that opens the message.
        fix: the corrected code, for the end of the message.

    Raises:
        StructureError: with the path of the first difference as code, and both sides.

    >>> import torch
    >>> from ftrain import tree
    >>> tree.check_same({"w": torch.zeros(2)}, {"w": torch.ones(3)}, root="params", what="the params changed.")
    Traceback (most recent call last):
    ftrain.errors.StructureError: the params changed.
      where:    params['w']
      expected: float32[2] on cpu
      got:      float32[3] on cpu
    """
    if torch.compiler.is_compiling():
        same, pairs = same_structure(expected, got), builtins.zip(leaves(expected), leaves(got), strict=False)
    else:  # one walk of each tree, not two: this is asked after each hook that changes the state
        (one, first), (two, second) = (optree.tree_flatten(x, namespace=NAMESPACE) for x in (expected, got))
        same, pairs = first == second, builtins.zip(one, two, strict=False)
    if not same:
        raise _structure_error(expected, got, root, what, fix)
    if all(a is b or _alike(a, b) for a, b in pairs):
        return  # paths are written out only for a message
    for (path, a), b in builtins.zip(items(expected, root), leaves(got), strict=True):
        if not _alike(a, b):
            raise StructureError(explain(what, where=path, expected=describe(a), got=describe(b), fix=fix))


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return type(a) is type(b)


def _structure_error(a: Any, b: Any, root: str, what: str, fix: str | None = None) -> StructureError:
    where, expected, got = _first_difference(a, b, root)
    return StructureError(explain(what, where=where, expected=expected, got=got, fix=fix))


def _first_difference(a: Any, b: Any, root: str) -> tuple[str, str, str]:
    """Descend into two trees of different structure to the first node at which they part."""
    one, two = _children(a), _children(b)
    if one is None or two is None or type(a) is not type(b):
        return root, _node(a, one), _node(b, two)
    if list(one) != list(two):
        missing, extra = [k for k in one if k not in two], [k for k in two if k not in one]
        said = [f"missing {', '.join(missing)}"] if missing else []
        said += [f"extra {', '.join(extra)}"] if extra else []
        return root, f"entries {', '.join(one) or '(none)'}", "; ".join(said)
    for key in one:
        if not same_structure(one[key], two[key]):
            return _first_difference(one[key], two[key], root + key)
    return root, _node(a, one), _node(b, two)


def _children(node: Any) -> dict[str, Any] | None:
    """The children of one node by the code that reaches them from it, or None for a leaf."""
    if node is None or optree.tree_is_leaf(node, namespace=NAMESPACE):
        return None
    found = optree.tree_flatten_one_level(node, namespace=NAMESPACE)
    kind = optree.register_pytree_node.get(type(node), namespace=NAMESPACE)
    entry = optree.AutoEntry if kind is None else kind.path_entry_type
    made = [
        optree.PyTreeAccessor((entry(key, type(node), optree.PyTreeKind.CUSTOM if kind is None else kind.kind),))
        for key in found.entries
    ]
    return {accessor.codify(""): child for accessor, child in builtins.zip(made, found.children, strict=True)}


def _node(node: Any, children: dict[str, Any] | None) -> str:
    if node is None:
        return "None (an empty subtree)"
    return describe(node) if children is None else f"{type(node).__name__} with {len(children)} entries"


def tensors(tree: Any) -> list[torch.Tensor]:
    """The leaves that are tensors."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


# -- inside a trace -----------------------------------------------------------------------------------------------------------
# dynamo traces optree through substitutes of its own, which (2.13) fail on a dict made inside the trace: "does not know how to
# wrap DictMetaData". These two do the same for the containers that a state, a batch and metrics are made of.


def _traced_flatten(tree: Any, into: list[Any]) -> Any:
    """Append the leaves, in optree's order; give the structure as nested tuples `(type, keys, children, dict order)`."""
    kind = type(tree)
    if tree is None:
        return (None, (), (), ())
    if kind in _fields:
        names = _fields[kind]
        return (kind, names, tuple([_traced_flatten(getattr(tree, name), into) for name in names]), ())
    if isinstance(tree, dict):
        keys = tuple(sorted(tree))
        return (kind, keys, tuple([_traced_flatten(tree[key], into) for key in keys]), tuple(tree))
    if isinstance(tree, (tuple, list)):
        return (kind, len(tree), tuple([_traced_flatten(one, into) for one in tree]), ())
    into.append(tree)
    return "leaf"


def _traced_paths(tree: Any, path: str, into: list[str]) -> None:
    """Append the path of each leaf, as `paths` writes them."""
    kind = type(tree)
    if tree is None:
        return
    names = _fields.get(kind) or getattr(kind, "_fields", None)
    if names is not None:
        for name in names:
            _traced_paths(getattr(tree, name), f"{path}.{name}", into)
    elif isinstance(tree, dict):
        for key in sorted(tree):
            _traced_paths(tree[key], f"{path}[{key!r}]", into)
    elif isinstance(tree, (tuple, list)):
        for index, child in enumerate(tree):
            _traced_paths(child, f"{path}[{index}]", into)
    else:
        into.append(path)


def _traced_same(a: Any, b: Any) -> bool:
    """Whether two structures are the same but for the order of dicts."""
    if a == "leaf" or b == "leaf":
        return bool(a == b)
    if a[0] is not b[0] or a[1] != b[1] or len(a[2]) != len(b[2]):
        return False
    return all(_traced_same(one, two) for one, two in builtins.zip(a[2], b[2], strict=True))


def _traced_unflatten(structure: Any, leaves: list[Any], at: list[int]) -> Any:
    if structure == "leaf":
        at[0] += 1
        return leaves[at[0] - 1]
    kind, keys, children, order = structure
    if kind is None:
        return None
    made = [_traced_unflatten(child, leaves, at) for child in children]
    if kind in _fields:
        return kind(*made)
    if issubclass(kind, dict):
        by_key = dict(builtins.zip(keys, made, strict=True))
        return kind([(key, by_key[key]) for key in order])
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return kind(*made)
    return kind(made)
