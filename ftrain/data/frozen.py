"""The state that a user's loader gave, as a plain tree of its own memory, and back.

Laws
----
- `thaw(freeze(state))` equals `state`, type by type (a subclass of dict comes back as a dict).
- What `freeze` gave does not change when the loader goes on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from .. import tree
from ..errors import DataError, explain

__all__ = ["freeze", "thaw"]

_TAG = "ftrain.kind"  # of what plain trees have no word for: sets, and dicts with keys other than str and int
_SIMPLE = (type(None), bool, int, float, complex, str, bytes)


def freeze(state: Any, root: str, what: str) -> Any:
    """A state as a plain tree that shares no memory with it.

    Args:
        state: dicts, lists, tuples and sets of tensors, numpy arrays and scalars, numbers, strings, bytes, None.
        root: how errors call it, as code.
        what: how errors call the caller.

    Raises:
        DataError: it holds something else; the path is named.

    >>> from ftrain.data.frozen import freeze, thaw
    >>> frozen = freeze({"seen": {3, 1}}, "state", "ft.fit")
    >>> frozen
    {'seen': {'ftrain.kind': 'set', 'of': [1, 3]}}
    >>> thaw(frozen)
    {'seen': {1, 3}}
    """
    numeric = isinstance(state, (np.ndarray, np.generic)) and state.dtype.kind in "biufc"
    if type(state) in _SIMPLE or (isinstance(state, np.generic) and numeric):
        return state
    if isinstance(state, Tensor) or numeric:
        return state.detach().to("cpu", copy=True) if isinstance(state, Tensor) else state.copy()
    if type(state) in (list, tuple):
        return type(state)([freeze(one, f"{root}[{i}]", what) for i, one in enumerate(state)])
    if isinstance(state, dict):
        if all(type(key) in (str, int) for key in state) and _TAG not in state:
            return {key: freeze(one, f"{root}[{key!r}]", what) for key, one in state.items()}
        pairs = [
            (freeze(key, f"{root}.keys()", what), freeze(one, f"{root}[{key!r}]", what)) for key, one in state.items()
        ]
        return {_TAG: "dict", "of": pairs}
    if type(state) in (set, frozenset):
        # sorted, so that equal states give equal checkpoints
        found = sorted(state, key=lambda one: (type(one).__name__, repr(one)))
        return {_TAG: type(state).__name__, "of": [freeze(one, f"{root}{{...}}", what) for one in found]}
    raise DataError(
        explain(
            f"{what}: the state of the loader cannot be saved.",
            where=root,
            expected="tensors, numpy arrays, numbers, strings and bytes, in dicts, lists, tuples and sets",
            got=tree.describe(state),
            cause="a state_dict() of the dataset, the sampler or the loader that returns an object of Python",
            fix="return what the object is made of, and make it again in load_state_dict()",
        )
    )


def thaw(frozen: Any) -> Any:
    """The state that `freeze` was given, with memory of its own."""
    if isinstance(frozen, Tensor):
        return frozen.clone()
    if isinstance(frozen, np.ndarray):
        return frozen.copy()
    if isinstance(frozen, (list, tuple)):
        return type(frozen)([thaw(one) for one in frozen])
    if isinstance(frozen, dict):
        kind = frozen.get(_TAG)
        if kind is None:
            return {key: thaw(one) for key, one in frozen.items()}
        of = thaw(frozen["of"])
        return {"dict": dict, "set": set, "frozenset": frozenset}[kind](of)
    return frozen
