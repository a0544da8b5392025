"""The parameters in a checkpoint, read a few at a time: for an export that needs neither the state nor its memory."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, StateError, StructureError, explain
from .dtypes import dtype_named
from .names import ties
from .packing import nest
from .paths import escape, some
from .safefile import Spec
from .store import Store

__all__ = ["Stored"]

AT_ONCE = 64 << 20  # bytes; a tensor that is larger is read alone


class Stored:
    """The parameters and buffers of one checkpoint. A context, in which its folder is open to be read.

    Args:
        path: the folder of the checkpoints.
        step: which: its number, or `"latest"`.
        params: the name of averaged parameters, or None.
        what: opens the message of an error.

    Raises:
        CheckpointError: there is no such checkpoint, or it does not hold a state.
        StateError: the state in it has no such average.
    """

    def __init__(self, path: str | os.PathLike[str], step: int | str, params: str | None, what: str) -> None:
        self.what = what
        self._store = Store(path, write=False)
        try:
            self._step = self._choose(step)
            self._leaves = self._store.describe(self._step)
            self._own = {**self._under("params"), **self._under("frozen"), **self._under("buffers")}  # path by name
            if not self._under("params") or "step" not in self._leaves:
                raise CheckpointError(
                    explain(
                        f"{what}: the checkpoint does not hold a TrainState.",
                        where=f"step {self._step} of {self._store.path}",
                        expected="params/..., step, ...",
                        got=some(self._leaves),
                    )
                )
            self._at = self._own if params is None else self._averaged(params)
        except BaseException:
            self._store.close()
            raise

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._store.close()

    def specs(self, model: nn.Module | None) -> dict[str, Spec]:
        """Dtype and shape of each tensor by its name; with a module, the names of its `state_dict()`.

        Raises:
            StructureError: the checkpoint is of another model.
        """
        if model is None:
            return {name: self._spec(name) for name in self._own}
        own: dict[str, Tensor] = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
        different = [name for name in self._own if name not in own]
        different += [n for n, one in own.items() if n not in self._own or tuple(one.shape) != self._spec(n).shape]
        if different:
            raise StructureError(
                explain(
                    f"{self.what}: the checkpoint is not of the model {type(model).__name__}.",
                    where=some(different),
                    expected="the names and shapes of the model's parameters and buffers",
                    got=f"those of step {self._step} of {self._store.path}",
                )
            )
        for other, first in ties(model).items():
            self._own[other], self._at[other] = self._own[first], self._at[first]
        return {name: self._spec(name) for name in model.state_dict() if name in self._own}

    def tensors(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of these names, in this order.

        Raises:
            CheckpointError: the checkpoint is damaged.
        """
        batch: list[str] = []
        size = 0
        for name in names:
            dtype, shape = self._spec(name)
            more = math.prod(shape) * dtype.itemsize
            if batch and size + more > AT_ONCE:
                yield from self._read(batch)
                batch, size = [], 0
            batch.append(name)
            size += more
        yield from self._read(batch)

    def _read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        keys = {name: tuple(_unescape(key) for key in self._at[name].split("/")) for name in names}
        empty = {}
        for name in names:
            dtype, shape = self._leaves[self._at[name]]
            empty[keys[name]] = torch.empty(shape, dtype=dtype_named(dtype), device="meta")
        found, _ = self._store.load(self._step, nest(empty.items()), strict=False)  # all else stays where it is
        for name in names:
            one = found
            for key in keys[name]:
                one = one[key]
            yield name, one.to(self._spec(name).dtype)

    def _spec(self, name: str) -> Spec:
        dtype, shape = self._leaves[self._own[name]]  # averages are of the dtype of what they are an average of
        return Spec(dtype_named(dtype), shape)

    def _under(self, part: str) -> dict[str, str]:
        """The names right under a part of the state, with their paths."""
        start = part + "/"
        found = {path[len(start) :]: path for path in self._leaves if path.startswith(start)}
        return {_unescape(name): path for name, path in found.items()}

    def _averaged(self, params: str) -> dict[str, str]:
        """The same names with the paths of the averages; `Average` is a tuple of parameters, buffers and a count."""
        root = f"extra/{escape(params)}"
        means = {**self._under(f"{root}/params"), **self._under(f"{root}/buffers")}
        wanted = {**self._under("params"), **self._under("buffers")}
        if means.keys() != wanted.keys():
            known = dict.fromkeys(path.split("/")[1] for path in self._leaves if path.startswith("extra/"))
            raise StateError(
                explain(
                    f"{self.what}: the checkpoint has no averaged parameters {params!r}.",
                    where=f"step {self._step} of {self._store.path}",
                    expected=f"one of what is in state.extra: {some(known)}",
                    got=f"params={params!r}",
                )
            )
        return {**self._own, **means}

    def _choose(self, step: int | str) -> int:
        saved = self._store.saved
        if not saved:
            raise self._store.nothing()
        chosen = saved[-1] if saved and step == "latest" else step
        if isinstance(chosen, bool) or chosen not in saved:
            raise CheckpointError(
                explain(
                    f"{self.what}: there is no checkpoint of step {step!r}.",
                    where=self._store.path,
                    expected=f"'latest', or one of {', '.join(map(str, saved))}",
                    got=f"step={step!r}",
                )
            )
        return int(chosen)


def _unescape(key: str) -> str:
    """What `escape` wrote."""
    text = "#" + key[2:] if key.startswith("~2") else key
    return text.replace("~1", "/").replace("~0", "~")
