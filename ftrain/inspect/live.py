"""How much memory is alive while code runs: every storage from its first tensor to its last.

It is counted from the operators' outputs, so on fake tensors, which have none, as well as on real ones. What a kernel takes for
itself while it runs is not seen: little for most (tests/test_check.py: within 2% of what torch's allocator gave out), but more
than half of it all for an LSTM of oneDNN on a CPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["LiveBytes", "Memory"]


class Memory(NamedTuple):
    """Bytes at the moment at which the most are alive, by what they are.

    Attributes:
        peak: all of them.
        state: the state that went in.
        batch: the batch that went in.
        outside: tensors that belong to neither: constants and models that the step's functions hold.
        activations: made in a forward pass, or in a step that has no backward pass.
        gradients: made in a backward pass.
        update: made after the last backward pass: the new state, and what it is computed with.
        until_update: not a part of the peak, but the most that was alive until the last backward pass had ended; what is alive
            then grows with the batch, what the update needs does not.

    >>> from ftrain.inspect.live import Memory
    >>> Memory(peak=12, state=8, batch=4).gradients
    0
    """

    peak: int
    state: int = 0
    batch: int = 0
    outside: int = 0
    activations: int = 0
    gradients: int = 0
    update: int = 0
    until_update: int = 0


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own class is not typed
    """Mode that counts the bytes that are alive, and keeps how they were made up at the peak.

    >>> import torch
    >>> from ftrain.inspect.live import LiveBytes
    >>> with LiveBytes() as live:
    ...     x = torch.zeros(100)
    ...     y = (x + 1).sum()
    >>> live.now, live.peak
    (404, 804)
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the same
        self.now = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        self._by_kind: dict[tuple[str, int], int] = {}
        self._at_peak: dict[tuple[str, int], int] = {}
        self._most: dict[int, int] = {}  # the most alive, by how many backward passes had ended
        self._backwards = 0  # how many backward passes have ended
        self._in_backward = False

    def hold(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were there before."""
        for tensor in tensors:
            self._see(tensor, (kind, 0))

    def memory(self) -> Memory:
        """The peak by what it was made up of."""
        found = dict.fromkeys(Memory._fields, 0) | {"peak": self.peak}
        last = self._backwards
        found["until_update"] = max(
            (most for passed, most in self._most.items() if not last or passed < last), default=0
        )
        for (kind, passed), size in self._at_peak.items():
            found["update" if kind == "activations" and last and passed == last else kind] += size
        return Memory(**found)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        backward = torch._C._current_graph_task_id() != -1
        if self._in_backward and not backward:
            self._backwards += 1
        self._in_backward = backward
        for one in pytree.tree_leaves((args, kwargs)):
            if isinstance(one, Tensor):
                self._see(one, ("outside", 0))
        out = func(*args, **(kwargs or {}))
        kind = ("gradients", 0) if backward else ("activations", self._backwards)
        for one in pytree.tree_leaves(out):
            if isinstance(one, Tensor):
                self._see(one, kind)
        return out

    def _see(self, tensor: Tensor, kind: tuple[str, int]) -> None:
        if tensor.layout is not torch.strided:  # its parts come by as tensors of their own
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            del self._known[key]
            self.now -= size
            self._by_kind[kind] -= size

        # The Python object of a storage lives as long as the storage does, also where only C++ still holds it.
        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self._by_kind[kind] = self._by_kind.get(kind, 0) + size
        self._most[self._backwards] = max(self.now, self._most.get(self._backwards, 0))
        if self.now > self.peak:
            self.peak, self._at_peak = self.now, dict(self._by_kind)
