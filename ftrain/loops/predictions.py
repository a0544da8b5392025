"""`write_predictions`: predictions with the ids of their samples, to a file or to a function of the user's.

Laws
----
- The rows are those of `predict`, batch after batch, bit by bit; those that pad a batch are left out.
- A batch at a time is in memory, whatever the data.
- A file is there as a whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from .. import rng, tree
from ..data.window import ungrouped
from ..errors import ArgumentError, DataError, explain
from ..state import TrainState, check_state
from ..steps.bind import batch_size as rows_of
from ..steps.bind import padding
from ..steps.compile import CompiledStep
from .evaluate import Compile, _outputs, check_count, prepare, with_params
from .formats import Array
from .tables import check_target, written

__all__ = ["write_predictions"]

WHAT = "ft.write_predictions"
Receiver = Callable[[Array, Any], object]
Ids = str | Callable[[Any], Any] | None


def write_predictions(
    to: str | os.PathLike[str] | Receiver,
    state: TrainState,
    predict_step: Callable[[TrainState, Any], Any],
    data: Any,
    *,
    batch_size: int | None = None,
    ids: Ids = None,
    params: str | None = None,
    limit: int | None = None,
    compile: Compile = "auto",
    backend: str | Callable[..., Any] = "inductor",
) -> int:
    """Predict, and write what comes out as it comes, each row with the id of its sample.

    What `ft.predict` gives, without its padding and batch by batch, so that memory does not grow with the data. A file has its name
    only when it is complete and on the disk; whatever happens until then, one that was there before stays.

    Args:
        to: where the rows go. By its ending, a path is of

            - `.npy`: the array that the predict step gives, without ids;
            - `.npz`: an array for each output, and the ids as `id`. The disk holds everything twice for a moment;
            - `.parquet`: a column for each output, and the ids as `id` (needs `pip install pyarrow`). Outputs of more than one
              dimension become lists, which may differ in length.

            In the two with columns, a tensor that is no dict's is called `output`. Or a function `(ids, outputs) -> None`, called once
            a batch with numpy arrays, which are its own: `outputs` is the tree that the predict step gives.
        state: only read.
        predict_step: `(state, batch) -> outputs`, e.g. `ft.predict_step(model)`; the first dimension of each output is the batch's.
            bfloat16 and float8, which numpy does not have, are written as float32.
        data: as for `ft.predict`.
        batch_size: for arrays: samples in a batch.
        ids: what names a sample. None: its running number in the order in which the data comes (int64), which is another sample's
            where the data is shuffled; a name: the batch's entry of that name; or a function `batch -> ids`, whose ids are a tensor,
            an array, or a list of numbers or texts.
        params: the name of averaged parameters to predict with (`"ema"`); default: the parameters themselves.
        limit: how many batches at most; None: all.
        compile: as in `fit`.
        backend: a backend of `torch.compile`.

    Returns:
        How many rows were written.

    Raises:
        ArgumentError: an argument is another kind of thing, or the ending of the path says no format.
        OutputError: the file cannot be written: no such folder, a full disk, or pyarrow is missing.
        DataError: the data has no batches, or no such ids; the outputs are not rows, one for each sample, or do not fit the format.

    >>> import tempfile, numpy as np, torch, ftrain as ft
    >>> model = torch.nn.Linear(2, 3)
    >>> state = ft.init(model, ft.optim.sgd(0.1))
    >>> step = ft.predict_step(model, lambda model, batch: {"logits": model(batch["x"])})
    >>> data = ft.data.source({"x": torch.ones(5, 2), "key": 10 * torch.arange(5)}, batch_size=2, shuffle=True, seed=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     rows = ft.write_predictions(folder + "/out.npz", state, step, data, ids="key", compile=False)
    ...     with np.load(folder + "/out.npz") as found:
    ...         print(rows, found["logits"].shape, sorted(int(key) for key in found["id"]))
    5 (5, 3) [0, 10, 20, 30, 40]
    """
    check_state(state, WHAT)
    path = _path(to, ids)
    check_count(WHAT, "limit", limit)
    state = with_params(state, predict_step, params, WHAT)
    counters = state.counters()
    source = ungrouped(data, seed=counters.seed, batch_size=batch_size, what=WHAT)
    source.check(WHAT)
    step = prepare(predict_step, compile, donate=False, backend=backend, what=WHAT)
    rows = 0

    def both(own: TrainState, batch: Any) -> tuple[Any, Any]:
        return batch, step(own, batch)

    pairs: Any = _outputs(state, cast(CompiledStep, both), source, WHAT, limit)
    try:
        # What the step or the receiver draws from numpy or random is a function of the state, and does not outlive the call.
        with (
            rng.Isolated(rng.fold_in_host(counters.seed, counters.step, 0xE7A1)),
            nullcontext(cast(Receiver, to)) if path is None else written(path, WHAT) as put,
            closing(pairs),
        ):
            for own, outputs, count in _on_host(pairs, ids):
                put(np.arange(rows, rows + count, dtype=np.int64) if own is None else own, outputs)
                rows += count
    finally:
        source.close()
    return rows


class _Batch(NamedTuple):
    """Outputs on their way to the host."""

    ids: Any
    outputs: Any
    mask: Tensor | None
    size: int  # rows, padding included
    arrived: Any  # an event of the device, or None where everything is here

    def rows(self) -> tuple[Array | None, Any, int]:
        """Ids, outputs and how many, without padding, in memory of their own."""
        if self.arrived is not None:
            self.arrived.synchronize()  # sync: one wait for a batch, while the device computes the next one
        mask = None if self.mask is None else self.mask.numpy()  # sync: none, it has arrived

        def real(leaf: Any) -> Array:
            array: Array = leaf.numpy() if isinstance(leaf, Tensor) else leaf  # sync: none, as above
            return array if mask is None else array[mask]

        count = self.size if mask is None else int(mask.sum())
        return None if self.ids is None else real(self.ids), tree.map(real, self.outputs), count


def _on_host(pairs: Iterator[tuple[Any, Any]], ids: Ids) -> Iterator[tuple[Array | None, Any, int]]:
    """Ids, outputs and their number, batch after batch. From a GPU, a batch comes while the next one is computed."""
    waiting: _Batch | None = None
    for number, (batch, outputs) in enumerate(pairs):
        found = _sent(batch, outputs, ids, number)
        if waiting is not None:
            yield waiting.rows()
        waiting = found
        if found.arrived is None:  # nothing to overlap, and the data may write the next batch over this one
            yield found.rows()
            waiting = None
    if waiting is not None:
        yield waiting.rows()


def _sent(batch: Any, outputs: Any, ids: Ids, number: int) -> _Batch:
    """Check a batch, and start its copy to the host."""
    count, where = rows_of(batch), f"batch {number}"
    for path, leaf in tree.items(outputs, root="outputs"):
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != count:
            raise DataError(
                explain(
                    f"{WHAT}: an output is not a row for each sample.",
                    where=f"{path}, {where}",
                    expected=f"a tensor with a first dimension of {count}, the samples of this batch",
                    got=tree.describe(leaf),
                    cause="a number for the whole batch, or another dimension first",
                )
            )
    if not tree.leaves(outputs):
        raise DataError(
            explain(
                f"{WHAT}: the predict step gives nothing.",
                where=where,
                got=repr(outputs),
                fix="return outputs   # from the function given to ft.predict_step",
            )
        )
    named = _ids_of(batch, ids, count, where)
    mask = padding(batch)
    on_device = [leaf for leaf in (*tree.leaves(outputs), named, mask) if isinstance(leaf, Tensor) and leaf.is_cuda]
    made = (
        _to_host(named) if isinstance(named, Tensor) else named,
        tree.map(_to_host, outputs),
        None if mask is None else _to_host(mask),
    )
    arrived: Any = None
    if on_device:
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(on_device[0].device))
    return _Batch(*made, count, arrived)


def _to_host(leaf: Tensor) -> Tensor:
    """A copy in host memory that numpy can show; from a GPU it is only begun, into pinned memory."""
    if leaf.layout is not torch.strided:
        raise DataError(
            explain(
                f"{WHAT}: an output is not dense.",
                got=f"{tree.describe(leaf)}, {leaf.layout}",
                fix="output.to_dense()",
            )
        )
    leaf = leaf.detach().resolve_conj().resolve_neg()
    if leaf.dtype not in _OF_NUMPY:
        leaf = leaf.float()
    return leaf.to("cpu", non_blocking=True, copy=True)


_OF_NUMPY = {
    *(
        torch.bool,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
    ),
    *(torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128),
}


def _ids_of(batch: Any, ids: Ids, count: int, where: str) -> Any:
    """What names the samples of a batch: a tensor or an array; None where they are numbered."""
    if ids is None:
        return None
    if callable(ids):
        found = ids(batch)
        what = "what the function ids= gave"
    else:
        if not isinstance(batch, dict) or ids not in batch:
            raise DataError(
                explain(
                    f"{WHAT}: the batch has no entry {ids!r}.",
                    where=where,
                    expected="ids= of an entry of the batch: " + ", ".join(map(repr, batch))
                    if isinstance(batch, dict)
                    else "batches that are dicts, for ids= by name",
                    got=f"ids={ids!r}" if isinstance(batch, dict) else type(batch).__name__,
                    fix="ids=lambda batch: ...   # any function of a batch",
                )
            )
        found, what = batch[ids], f"batch[{ids!r}]"
    if not isinstance(found, Tensor):
        found = np.array(found)
    if found.ndim != 1 or len(found) != count or (isinstance(found, np.ndarray) and found.dtype.kind not in "biufUS"):
        raise DataError(
            explain(
                f"{WHAT}: the ids are not one for each sample.",
                where=f"{what}, {where}",
                expected=f"numbers or texts of shape ({count},)",
                got=tree.describe(found),
            )
        )
    return found


def _path(to: Any, ids: Any) -> Path | None:
    """The file that is meant, or None for a function; raises where an argument is another kind of thing."""
    if not callable(to) and not isinstance(to, (str, os.PathLike)):
        raise ArgumentError(
            explain(
                f"{WHAT}: its first argument says where the rows go.",
                expected="a path, or a function (ids, outputs) -> None",
                got=type(to).__name__,
                fix=f'{WHAT}("predictions.parquet", state, step, data)',
            )
        )
    if ids is not None and not isinstance(ids, str) and not callable(ids):
        raise ArgumentError(
            explain(
                f"{WHAT}: ids={ids!r} makes no sense.",
                expected="None, the name of an entry of the batch, or a function of the batch",
                got=type(ids).__name__,
                fix='ids="id"',
            )
        )
    if callable(to):
        return None
    path = check_target(to, WHAT)
    if path.suffix == ".npy" and ids is not None:
        raise ArgumentError(
            explain(
                f"{WHAT}: a .npy file holds one array, and no ids beside it.",
                got=f"ids={ids!r}" if isinstance(ids, str) else "ids=",
                fix='"predictions.npz"   # or "predictions.parquet", or no ids=',
            )
        )
    return path
