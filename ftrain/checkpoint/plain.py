"""Plain trees as JSON and arrays, and exactly back: the places of data, the notes of hooks, the parts of metrics.

A plain tree holds None, bool, int, float, complex, str, bytes, tensors, numpy arrays and numpy scalars, in lists, tuples and dicts
(with string and integer keys). `decode(*encode(t))` is `t`, type by type and bit by bit: NaN payloads, `-0.0`, the order of dicts.
Nothing else is accepted, so nothing that is loaded can run code.

What JSON has no words for is an object with one key that begins with `~`; a dict of the user's that has such a key is itself written
in that way, so the two cannot be taken for each other.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, explain
from .dtypes import array_of, numpy_dtype, tensor_of

__all__ = ["decode", "encode"]

_SAFE = 1 << 53  # integers beyond it are changed by other readers of JSON


def encode(tree: Any, root: str = "tree") -> tuple[Any, list[Tensor]]:
    """A plain tree as JSON, and the tensors that the JSON refers to by number.

    Args:
        tree: the plain tree.
        root: how errors call it.

    Raises:
        CheckpointError: it holds something else; the path is named.

    >>> from ftrain.checkpoint import plain
    >>> plain.encode({"batch": 3, "at": (1, float("inf"))})
    ({'batch': 3, 'at': {'~tuple': [1, {'~float': '7ff0000000000000'}]}}, [])
    """
    arrays: list[Tensor] = []
    return _encode(tree, root, arrays, ()), arrays


def decode(encoded: Any, arrays: Sequence[Tensor]) -> Any:
    """The plain tree that `encode` was given.

    Raises:
        CheckpointError: the JSON was not written by `encode`.

    >>> from ftrain.checkpoint import plain
    >>> plain.decode({"at": {"~tuple": [1, 2]}}, [])
    {'at': (1, 2)}
    """
    if isinstance(encoded, list):
        return [decode(one, arrays) for one in encoded]
    if not isinstance(encoded, dict):
        return encoded
    if len(encoded) == 1:
        ((tag, body),) = encoded.items()
        if tag.startswith("~"):
            if tag not in _TAGS:
                raise CheckpointError(
                    explain(
                        f"a plain tree has the tag {tag!r}, which is unknown.",
                        cause="it was written by a newer version of ftrain",
                    )
                )
            return _TAGS[tag](body, arrays)
    return {key: decode(one, arrays) for key, one in encoded.items()}


_TAGS: dict[str, Callable[[Any, Sequence[Tensor]], Any]] = {
    "~tuple": lambda body, arrays: tuple(decode(one, arrays) for one in body),
    "~dict": lambda body, arrays: {key: decode(one, arrays) for key, one in body},
    "~int": lambda body, _: int(body, 16),
    "~float": lambda body, _: _float(body),
    "~complex": lambda body, _: complex(*(_float(one) for one in body)),
    "~bytes": lambda body, _: base64.b64decode(body),
    "~tensor": lambda body, arrays: arrays[body],
    "~array": lambda body, arrays: array_of(arrays[body]),
    "~scalar": lambda body, arrays: array_of(arrays[body])[()],
}


def _bits(number: float) -> str:
    return struct.pack(">d", number).hex()


def _float(bits: str) -> float:
    return float(struct.unpack(">d", bytes.fromhex(bits))[0])


def _encode(node: Any, path: str, arrays: list[Tensor], above: tuple[int, ...]) -> Any:
    kind = type(node)
    if kind in _LEAVES:
        return _LEAVES[kind](node)
    if kind in (list, tuple, dict):
        if id(node) in above:
            raise CheckpointError(explain("a plain tree contains itself.", where=path))
        return _container(node, kind, path, arrays, (*above, id(node)))
    if kind is Tensor or isinstance(node, (np.ndarray, np.generic)):
        return _array(node, kind, path, arrays)
    raise _refused(node, path)


_LEAVES: dict[type, Callable[[Any], Any]] = {
    type(None): lambda node: node,
    bool: lambda node: node,
    str: lambda node: node,
    int: lambda node: node if -_SAFE < node < _SAFE else {"~int": hex(node)},
    float: lambda node: node if math.isfinite(node) else {"~float": _bits(node)},
    complex: lambda node: {"~complex": [_bits(node.real), _bits(node.imag)]},
    bytes: lambda node: {"~bytes": base64.b64encode(node).decode()},
}


def _container(node: Any, kind: type, path: str, arrays: list[Tensor], above: tuple[int, ...]) -> Any:
    if kind is not dict:
        found = [_encode(one, f"{path}[{i}]", arrays, above) for i, one in enumerate(node)]
        return found if kind is list else {"~tuple": found}
    for key in node:
        if type(key) is not str and type(key) is not int:
            raise _refused(key, f"{path}[{key!r}]", " as a key")
    pairs = [(key, _encode(one, f"{path}[{key!r}]", arrays, above)) for key, one in node.items()]
    if all(type(key) is str and not key.startswith("~") for key in node):
        return dict(pairs)
    return {"~dict": [[key, one] for key, one in pairs]}


def _array(node: Any, kind: type, path: str, arrays: list[Tensor]) -> Any:
    if kind is Tensor:
        if node.layout != torch.strided or numpy_dtype(node.dtype) is None:
            raise _refused(node, path)
        made, tag = node.detach(), "~tensor"
    else:
        exact = kind is np.ndarray or isinstance(node, np.generic)
        found = tensor_of(np.asarray(node)) if exact else None
        if found is None:
            raise _refused(node, path)
        made, tag = found, "~array" if kind is np.ndarray else "~scalar"
    arrays.append(made)
    return {tag: len(arrays) - 1}


def _refused(node: Any, path: str, role: str = "") -> CheckpointError:
    said = type(node).__name__
    if isinstance(node, (Tensor, np.ndarray, np.generic)):
        said += f" of {node.dtype}" + (f", {node.layout}" if isinstance(node, Tensor) else "")
    return CheckpointError(
        explain(
            f"a checkpoint cannot hold this{role}.",
            where=path,
            expected="None, bool, int, float, complex, str, bytes, tensors and numpy arrays in lists, tuples and dicts"
            if not role
            else "string and integer keys",
            got=said,
            cause="what is loaded must come back exactly, and must not run code",
        )
    )
