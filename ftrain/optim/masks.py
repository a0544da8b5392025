"""One language for choosing leaves, used wherever some parameters are treated in another way than others.

A mask is one of

- a pattern for paths, as in `fnmatch`: `"*.weight"`; a path itself is a pattern for itself;
- several patterns: a leaf is chosen when one of them matches;
- a predicate `(path, leaf) -> bool`, which may look at shape and dtype but not at values;
- a tree of bools of the parameters' structure.

The path of a leaf is its key where the tree is a flat dict, as parameters are everywhere in ftrain, else the code that reaches it
(`params['a'][0]`, see `ftrain.tree.paths`).

Laws
----
- `resolve(mask, params, what)` depends on paths, shapes and dtypes alone, so it is constant under `torch.compile`.
- `put(t, take(t, chosen))` is `t`; what is taken is a flat dict by path, whatever `t` is.
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import tree
from ..errors import ModelError, explain

__all__ = [
    "Mask",
    "check_patterns",
    "matches",
    "names",
    "nearest",
    "no_bias_or_norm",
    "put",
    "regex",
    "resolve",
    "some",
    "take",
]

Mask = Any  # str | Iterable[str] | Callable[[str, Tensor], bool] | a tree of bools

_BIAS = re.compile(r"\w*bias(es)?(_\w+)?", re.IGNORECASE)
_NORM = re.compile(r"(\w*norm|bn|ln)\d*(_\w+)?", re.IGNORECASE)


def no_bias_or_norm(path: str, leaf: Tensor) -> bool:
    """A predicate for weight decay: False for biases and for the parameters of normalisation layers.

    Those are the leaves with fewer than two dimensions, and those with a part of their path named like a bias (`bias`,
    `relative_position_bias`) or like a norm (`norm1`, `layer_norm`, `bn2`, `ln_f`).

    >>> import torch, ftrain as ft
    >>> model = torch.nn.TransformerEncoderLayer(4, 2, 8)
    >>> [name for name, p in model.named_parameters() if ft.optim.no_bias_or_norm(name, p)]
    ['self_attn.in_proj_weight', 'self_attn.out_proj.weight', 'linear1.weight', 'linear2.weight']
    >>> ft.optim.no_bias_or_norm("blocks.0.norm1.weight", torch.ones(4, 4))
    False
    """
    if leaf.ndim < 2:
        return False
    parts = [part for part in re.split(r"\W+", path) if part]
    return not any(_BIAS.fullmatch(part) or _NORM.fullmatch(part) for part in parts)


def names(params: Any) -> list[str]:
    """The path of each leaf, in the order of `tree.leaves`: the key in a flat dict, else the code that reaches it.

    >>> import torch
    >>> from ftrain.optim.masks import names
    >>> names({"b.weight": torch.ones(1), "a.bias": torch.ones(1)})
    ['a.bias', 'b.weight']
    >>> names([torch.ones(1)])
    ['params[0]']
    """
    return sorted(params) if _flat(params) else tree.paths(params, root="params")


def resolve(mask: Mask, params: Any, what: str) -> list[bool]:
    """Whether each leaf is chosen, in the order of `tree.leaves`.

    Args:
        mask: patterns, a predicate or a tree of bools, see the module.
        params: the tree whose leaves are chosen from.
        what: whose argument the mask is, for messages: `"adamw: mask"`.

    Raises:
        ModelError: a pattern that matches nothing, a tree of another structure, or something that is no mask.

    >>> import torch
    >>> from ftrain.optim.masks import resolve
    >>> resolve("*.weight", {"a.weight": torch.ones(1), "a.bias": torch.ones(1)}, "freeze: mask")
    [False, True]
    """
    found = names(params)
    patterns = _patterns(mask)
    if patterns is not None:
        check_patterns(patterns, found, what)
        return [matches(name, patterns) for name in found]
    if callable(mask):
        _check_predicate(mask, what)
        return [_answer(mask(name, leaf), name, what) for name, leaf in zip(found, tree.leaves(params), strict=True)]
    chosen = tree.leaves(mask)
    if not tree.same_structure(mask, params) or not all(isinstance(one, bool) for one in chosen):
        raise ModelError(
            explain(
                f"{what} is neither a pattern, a predicate, nor a tree of bools like the parameters.",
                expected=f"a tree of bools with the leaves {some(found)}",
                got=_shown(mask),
                fix=f'{_argument(what)}="{_close("*.weight", found)}"   # or lambda path, p: p.ndim >= 2',
            )
        )
    return chosen


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns matches this path. A path matches itself, although its brackets have a meaning in `fnmatch`.

    >>> from ftrain.optim.masks import matches
    >>> matches("params['w'][0]", ["params['w'][0]"]), matches("head.weight", ["*.bias", "head.*"])
    (True, True)
    """
    if torch.compiler.is_compiling():  # dynamo (2.13) cannot trace fnmatch.translate
        return any(name == pattern or re.fullmatch(regex(pattern), name) is not None for pattern in patterns)
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def regex(pattern: str) -> str:
    """What `fnmatch.translate` gives, made of operations that dynamo traces.

    >>> import re
    >>> from ftrain.optim.masks import regex
    >>> re.fullmatch(regex("layers.[0-3].*"), "layers.2.weight") is not None
    True
    """
    made = "(?s)"
    for part in re.split(r"(\*|\?|\[!?\]?[^\]]*\])", pattern):
        if part in ("*", "?"):
            made += ".*" if part == "*" else "."
        elif part[:1] == "[" and part[-1:] == "]" and len(part) > 2:
            negated = part[1] == "!"
            body = part[2 if negated else 1 : -1]
            for special in "\\[&~|^":  # "\\" first
                body = body.replace(special, "\\" + special)
            made += f"[{'^' if negated else ''}{body}]"
        else:
            made += re.escape(part)
    return made


def check_patterns(patterns: Sequence[str], found: Sequence[str], what: str) -> None:
    """Raise a `ModelError` for a pattern that matches none of the paths.

    >>> from ftrain.optim.masks import check_patterns
    >>> check_patterns(["haed.*"], ["body.weight", "head.weight"], "freeze: mask")
    Traceback (most recent call last):
    ftrain.errors.ModelError: freeze: mask='haed.*' matches no parameter.
      expected: a pattern for some of: body.weight, head.weight
      fix:      mask="head.*"
    """
    if torch.compiler.is_compiling():  # seen by `init` before
        return
    for pattern in patterns:
        if not any(matches(name, (pattern,)) for name in found):
            raise ModelError(
                explain(
                    f"{what}={pattern!r} matches no parameter.",
                    expected=f"a pattern for some of: {some(found)}",
                    fix=f'{_argument(what)}="{_close(pattern, found)}"',
                )
            )


def take(params: Any, chosen: Sequence[bool]) -> dict[str, Any]:
    """The chosen leaves as a flat dict by path, in the order of the parameters' own dict where they are one.

    >>> import torch
    >>> from ftrain.optim.masks import take
    >>> take({"b": torch.ones(1), "a": torch.zeros(1)}, [True, False])
    {'a': tensor([0.])}
    """
    kept = {name for name, one in tree.zip_strict(names(params), chosen, "parameters and their mask are") if one}
    if _flat(params):
        return {name: leaf for name, leaf in params.items() if name in kept}
    return {name: leaf for name, leaf in zip(names(params), tree.leaves(params), strict=True) if name in kept}


def put(params: Any, part: dict[str, Any]) -> Any:
    """The tree with the leaves of a part, as made by `take`, in their places.

    >>> import torch
    >>> from ftrain.optim.masks import put
    >>> put([torch.ones(1), torch.ones(1)], {"params[1]": torch.zeros(1)})
    [tensor([1.]), tensor([0.])]
    """
    if _flat(params):
        return {name: part.get(name, leaf) for name, leaf in params.items()}
    merged = [part.get(name, leaf) for name, leaf in zip(names(params), tree.leaves(params), strict=True)]
    return tree.unflatten(tree.structure(params), merged)


def some(found: Sequence[str], most: int = 6) -> str:
    """The first names of a list, and how many there are.

    >>> from ftrain.optim.masks import some
    >>> some(["a", "b", "c"], most=2)
    'a, b, ... (3 in all)'
    """
    return ", ".join(found[:most]) + (f", ... ({len(found)} in all)" if len(found) > most else "")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like this one, if any is.

    >>> from ftrain.optim.masks import nearest
    >>> nearest("amad", ["sgd", "adam", "adamw"])
    'adam'
    """
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return found[0] if found else None


def _flat(params: Any) -> bool:
    return isinstance(params, dict) and all(
        isinstance(key, str) and isinstance(leaf, Tensor) for key, leaf in params.items()
    )


def _patterns(mask: Mask) -> list[str] | None:
    if isinstance(mask, str):
        return [mask]
    if isinstance(mask, (list, tuple, set, frozenset)) and mask and all(isinstance(one, str) for one in mask):
        return sorted(mask) if isinstance(mask, (set, frozenset)) else list(mask)
    return None


def _check_predicate(mask: Callable[..., Any], what: str) -> None:
    if torch.compiler.is_compiling():  # seen by `init` before
        return
    try:
        inspect.signature(mask).bind("path", None)
    except TypeError:
        raise ModelError(
            explain(
                f"{what} is a function that cannot be called with (path, leaf).",
                expected="a predicate (path, leaf) -> bool",
                got=_shown(mask),
                fix=f"{_argument(what)}=lambda path, p: p.ndim >= 2",
            )
        ) from None
    except ValueError:  # a callable without a signature, as some in C
        return


def _answer(value: Any, name: str, what: str) -> bool:
    if isinstance(value, Tensor):
        raise ModelError(
            explain(
                f"{what} answers with a tensor.",
                where=name,
                expected="a bool, known from path, shape and dtype alone",
                got=tree.describe(value),
                cause="a mask is fixed; what depends on values or on the step is `conditionally_mask`",
            )
        )
    return bool(value)


def _close(pattern: str, found: Sequence[str]) -> str:
    """The pattern for one of these paths that is most like the one that was written."""
    known = list(found)
    for name in found:
        head, dot, last = name.rpartition(".")
        if dot:
            known += [f"{head}.*", f"*.{last}", f"{name.partition('.')[0]}.*"]
    return nearest(pattern, dict.fromkeys(known)) or "*"


def _argument(what: str) -> str:
    return what.rpartition(" ")[2]


def _shown(mask: Any) -> str:
    if callable(mask):
        return getattr(mask, "__name__", type(mask).__name__) + _signature(mask)
    leaves = tree.leaves(mask)
    if isinstance(mask, (dict, list, tuple)):
        kinds = sorted({type(leaf).__name__ for leaf in leaves})
        return f"{type(mask).__name__} with {len(leaves)} leaves ({', '.join(kinds)}): {some(tree.paths(mask, 'mask'))}"
    return repr(mask)


def _signature(fn: Callable[..., Any]) -> str:
    try:
        return str(inspect.signature(fn))
    except (TypeError, ValueError):
        return "(...)"
