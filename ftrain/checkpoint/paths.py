"""The names under which the leaves of a tree stand in a checkpoint, and patterns over them.

A leaf's path is its keys from the root, joined with `/`: `state.params["fc.weight"]` is `params/fc.weight`, and
`state.opt[0].mu["fc.weight"]` is `opt/0/mu/fc.weight` (fields of named tuples by their names). Dots within a key are left alone. So that no two leaves of a tree can share a
path, a key that holds `~` or `/` has them written `~0` and `~1` (as JSON pointers do), a leading `#` is `~2`, and an integer key of a
dict is `#3`, apart from the string `"3"`. A tree that is a single leaf has the path `value`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import optree

from .. import tree as trees
from ..errors import CheckpointError, RestoreError, explain

__all__ = ["Rename", "Select", "chosen", "escape", "leaf_paths", "renamed", "under"]

Select = str | Iterable[str] | Callable[[str], bool]
Rename = Mapping[str, str | None] | Callable[[str], str | None]

ROOT = "value"


def escape(key: str) -> str:
    """One key as a component of a path.

    >>> from ftrain.checkpoint.paths import escape
    >>> escape("fc.weight"), escape("a/b~"), escape("#1")
    ('fc.weight', 'a~1b~0', '~21')
    """
    text = key.replace("~", "~0").replace("/", "~1")
    return "~2" + text[1:] if text.startswith("#") else text


def leaf_paths(tree: Any, what: str) -> list[str]:
    """The path of each leaf of a tree, in its order; `what` opens the message of an error.

    Raises:
        CheckpointError: a dict has a key that is neither a string nor an integer.

    >>> from ftrain.checkpoint.paths import leaf_paths
    >>> leaf_paths({"a.b": 1, "a": {"b": (2, 3)}, 7: 4}, "doctest")
    ['#7', 'a/b/0', 'a/b/1', 'a.b']
    """
    found = []
    for accessor in optree.tree_accessors(tree, namespace=trees.NAMESPACE):
        parts = []
        for step in accessor:
            key = step.entry
            if isinstance(step, optree.NamedTupleEntry):
                parts.append(step.field)
            elif isinstance(key, str):
                parts.append(escape(key))
            elif isinstance(step, optree.SequenceEntry):
                parts.append(str(key))
            elif type(key) is int:
                parts.append(f"#{key}")
            else:
                raise CheckpointError(
                    explain(
                        f"{what}: a leaf has a key that a checkpoint cannot name.",
                        where=accessor.codify("tree"),
                        expected="keys that are strings or integers",
                        got=f"{key!r} ({type(key).__name__})",
                    )
                )
        found.append("/".join(parts) if parts else ROOT)
    return found


def under(pattern: str, path: str) -> bool:
    """Whether a path matches a pattern, or lies in a subtree that does.

    >>> from ftrain.checkpoint.paths import under
    >>> under("params", "params/fc.weight"), under("params/fc.*", "params/fc.weight"), under("par", "params/fc.weight")
    (True, True, False)
    """
    return (
        fnmatch.fnmatchcase(path, pattern)
        or path.startswith(pattern + "/")
        or fnmatch.fnmatchcase(path, pattern + "/*")
    )


def chosen(select: Select | None, wanted: Iterable[str], stored: Iterable[str], what: str) -> Callable[[str], bool]:
    """The predicate that `select` stands for.

    Raises:
        RestoreError: a pattern matches no leaf, neither of `like` nor of the checkpoint.

    >>> from ftrain.checkpoint.paths import chosen
    >>> chosen("params/*", ["params/w", "step"], [], "doctest")("params/w")
    True
    """
    if select is None:
        return lambda path: True
    if callable(select):
        return select
    patterns = [select] if isinstance(select, str) else list(select)
    known = [*wanted, *stored]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise RestoreError(
                explain(
                    f"{what}: select= holds {pattern!r}.",
                    expected="patterns of leaf paths, or a predicate path -> bool",
                )
            )
        if not any(under(pattern, path) for path in known):
            raise RestoreError(
                explain(
                    f"{what}: select={pattern!r} matches no leaf.",
                    expected=f"a pattern for some of: {some(known)}",
                    fix='select="params/*"',
                )
            )
    return lambda path: any(under(pattern, path) for pattern in patterns)


def some(names: Iterable[str], most: int = 8) -> str:
    """The first few of some names, in a line."""
    names = list(dict.fromkeys(names))
    return (", ".join(names[:most]) or "(none)") + (f", ... ({len(names)} in all)" if len(names) > most else "")


def renamed(rename: Rename | None, stored: Iterable[str], what: str) -> dict[str, str]:
    """The new name of each stored path that is not dropped, as `{new: stored}`.

    A key of a mapping is a path, a subtree (`"params/old"` renames all below it), or a pattern whose `*`s stand, in order, for those of
    the value. The first key that matches counts. The value None drops the leaf.

    Raises:
        RestoreError: a key matches nothing, or two leaves get one name.

    >>> from ftrain.checkpoint.paths import renamed
    >>> renamed({"params/encoder.*": "params/backbone.*"}, ["params/encoder.0.w", "step"], "doctest")
    {'params/backbone.0.w': 'params/encoder.0.w', 'step': 'step'}
    """
    stored = list(stored)
    if rename is None:
        return {path: path for path in stored}
    made: dict[str, str] = {}
    used: set[str] = set()
    for path in stored:
        new = rename(path) if callable(rename) else _by_mapping(rename, path, used)
        if new is None:
            continue
        if not isinstance(new, str):
            raise RestoreError(
                explain(f"{what}: rename= made {new!r} of {path!r}.", expected="a path, or None to leave it out")
            )
        if new in made:
            raise RestoreError(
                explain(f"{what}: rename= gives two leaves one name.", where=new, got=f"{made[new]} and {path}")
            )
        made[new] = path
    if not callable(rename):
        for key in rename:
            if key not in used:
                raise RestoreError(
                    explain(
                        f"{what}: rename= has the key {key!r}, which matches no leaf of the checkpoint.",
                        expected=f"a path, subtree or pattern for some of: {some(stored)}",
                    )
                )
    return made


def _by_mapping(rename: Mapping[str, str | None], path: str, used: set[str]) -> str | None:
    for key, new in rename.items():
        pattern = "(.*)".join(re.escape(part) for part in key.split("*"))
        match = re.fullmatch(pattern, path) if "*" in key else None
        if not (match or path == key or path.startswith(key + "/")):
            continue
        used.add(key)
        if new is None:
            return None
        if match is None:
            return new + path[len(key) :]
        first, *rest = new.split("*")
        found = (*match.groups(), *[""] * len(rest))
        return first + "".join(text + part for text, part in zip(found, rest, strict=False))
    return path
