"""Errors of a DataLoader, with the batch and the item at fault.

Laws
----
- What the user's code raises keeps its type, and gets a note that names the batch and its items.
- What torch raises when it stacks items, or when a worker dies, becomes a `DataError` that names them; its cause is kept.
- An item is only named where it is known: its index was on the stack, or the order can be made again.
"""

from __future__ import annotations

import itertools
import re
import signal
import traceback
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .. import rng, tree
from ..errors import DataError, explain
from .generators import put_generators, states_of
from .workers import fallen

__all__ = ["Failing", "clear"]

_COLLATE = "_utils/collate.py"
_WORKER = "DataLoader worker (pid"


class Failing(NamedTuple):
    """What failed.

    Attributes:
        what: how errors call the caller.
        seed: root of the streams.
        epoch: which epoch.
        loader: the user's.
        iterator: its iterator, where it has begun.
        batch: which batch of it was wanted.
        generators: the loader's own when the epoch began, where that is known.
        base: the batch at which the iterator began.
    """

    what: str
    seed: int
    epoch: int
    loader: Any
    iterator: Any
    batch: int
    generators: dict[str, Any] | None = None
    base: int = 0


def clear(error: Exception, failing: Failing) -> Exception:
    """The error to raise for one that came out of a loader: itself, maybe with a note, or a `DataError` that says more."""
    if isinstance(error, DataError) or not isinstance(failing.loader, DataLoader):
        return error
    text = str(error)
    dead = fallen(failing.iterator, error)
    if dead or text.startswith(_WORKER):
        traceback.clear_frames(
            error.__traceback__
        )  # torch tries out how many files it can open, and leaves them to the collector
        return DataError(_died(text, failing, dead))
    frames = list(_frames(error.__traceback__))
    indices, data = _fetched(frames)
    worker = re.search(r"in DataLoader worker process (\d+)", text)
    if indices is None:
        indices = _order(failing, failing.batch)
    inside = text if worker else "".join(frame.f_code.co_filename for frame, _ in frames)
    if _COLLATE in inside.replace("\\", "/"):
        return DataError(_uncollated(error, failing, indices, data))
    index = _index(frames)
    item = f", item {index!r} of the dataset" if index is not None else ""
    rest = "" if indices is None or index is not None else f", of the items {_few(indices)}"
    by = f", by worker {worker.group(1)}" if worker else ""
    error.add_note(f"ftrain: raised while batch {failing.batch} of epoch {failing.epoch} was made{by}{item}{rest}.")
    return error


# -- workers that die -------------------------------------------------------------------------------------------------------------------


def _died(text: str, failing: Failing, dead: list[tuple[int, Any]]) -> str:
    where, got, batches = "a worker", text.splitlines()[0], [failing.batch]
    for number, worker in dead[:1]:
        tasks = getattr(failing.iterator, "_task_info", {})
        waiting = [
            index + failing.base for index, task in sorted(tasks.items()) if len(task) == 1 and task[0] == number
        ]
        where, got, batches = f"worker {number} (pid {worker.pid})", _exit(worker.exitcode), waiting or batches
    # What it had made and not yet sent is lost with it, so it may have been at any of those.
    for batch in batches:
        indices = _order(failing, batch)
        where += f", batch {batch}" if indices is None else f", batch {batch} of the items {_few(indices)}"
    return explain(
        f"{failing.what}: a worker of the DataLoader died; batch {batches[0]} of epoch {failing.epoch} is missing.",
        where=where,
        got=got,
        cause="too little memory (also of /dev/shm), a crash in compiled code, or code of the dataset that ends the process",
        fix="DataLoader(..., num_workers=0)   # shows the error in this process",
    )


def _exit(code: int | None) -> str:
    if code is not None and code < 0:
        return f"it was killed by {signal.Signals(-code).name}"
    return f"it exited with code {code}"


# -- items that cannot be stacked --------------------------------------------------------------------------------------------------------


def _uncollated(error: Exception, failing: Failing, indices: Any, data: Any) -> str:
    said = str(error).strip().splitlines()[-1]
    where, expected, got = None if indices is None else f"items {_few(indices)} of the dataset", None, None
    if data is None and isinstance(indices, Sequence):
        data = _again(failing, indices)
    odd = None if data is None else _odd(data, indices)
    if odd is not None:
        where, expected, got = odd
    return explain(
        f"{failing.what}: batch {failing.batch} of epoch {failing.epoch} could not be collated.",
        where=where,
        expected=expected,
        got=got,
        cause=said,
        fix="make the items alike (pad them, leave out what is no array), or DataLoader(..., collate_fn=...)",
    )


def _again(failing: Failing, indices: Sequence[Any]) -> list[Any] | None:
    """The items, read once more in this process, since a worker keeps them to itself."""
    try:
        with rng.Isolated(failing.seed):
            return [failing.loader.dataset[index] for index in indices]
    except Exception:  # then there is another error to tell of first, and it is raised
        return None


def _odd(data: Any, indices: Any) -> tuple[str, str, str] | None:
    """Where an item differs from most, what they have there, and what it has."""
    items = list(data) if isinstance(data, (list, tuple)) else [data]
    known = isinstance(indices, Sequence) and len(indices) == len(items)
    names = [f"dataset[{indices[i]!r}]" if known else f"item {i} of the batch" for i in range(len(items))]
    leaves = [dict(_leaves(item, "")) for item in items]
    for name, found in zip(names, leaves, strict=True):
        for path, (kind, good) in found.items():
            if not good:
                return f"{name}{path}", "a tensor, numpy array, number or string, in dicts, lists or tuples", kind
    forms = [tuple((path, kind) for path, (kind, _) in found.items()) for found in leaves]
    usual = max(forms, key=forms.count)
    model = forms.index(usual)
    for name, form in zip(names, forms, strict=True):
        for (path, kind), (other_path, other) in itertools.zip_longest(form, usual, fillvalue=("", "nothing")):
            if (path, kind) != (other_path, other):
                at = f"{name}{path or other_path}"
                return at, f"{other}, as {names[model]}{other_path or path}", kind if path else "nothing"
    return None


def _leaves(item: Any, path: str) -> Iterator[tuple[str, tuple[str, bool]]]:
    """The leaves of an item as torch's collation sees them, with whether it can stack their kind."""
    if isinstance(item, dict):
        for key, value in item.items():
            yield from _leaves(value, f"{path}[{key!r}]")
    elif isinstance(item, (list, tuple)):
        for i, value in enumerate(item):
            yield from _leaves(value, f"{path}[{i}]")
    else:
        array = isinstance(item, np.ndarray) and item.dtype.kind in "biufc"
        good = array or isinstance(item, (Tensor, np.number, np.bool_, int, float, str, bytes))
        yield path, (tree.describe(item), good)


# -- which items -----------------------------------------------------------------------------------------------------------------------


def _frames(tb: TracebackType | None) -> Iterator[tuple[Any, int]]:
    return traceback.walk_tb(tb)


def _fetched(frames: list[tuple[Any, int]]) -> tuple[Any, Any]:
    """What torch's fetcher was asked for, and the items that it had when it failed, as they stand on the stack."""
    for frame, _ in frames:
        found = frame.f_locals
        if frame.f_code.co_name == "fetch" and "possibly_batched_index" in found:
            if isinstance(getattr(found.get("self"), "dataset", None), IterableDataset):
                return None, found.get("data")
            return found["possibly_batched_index"], found.get("data")
    return None, None


def _index(frames: list[tuple[Any, int]]) -> Any:
    """The index that the dataset was asked for, in this process."""
    for (frame, _), (caller, _) in zip(frames[1:], frames, strict=False):
        code = frame.f_code
        if code.co_name == "__getitem__" and caller.f_code.co_filename.replace("\\", "/").endswith("_utils/fetch.py"):
            return frame.f_locals.get(code.co_varnames[1])
    return None


def _order(failing: Failing, batch: int) -> Any:
    """The items of a batch, by making the order again; None where samplers are not torch's own, or the beginning is not known."""
    loader = failing.loader
    sampler, batches = loader.sampler, loader.batch_sampler
    ours = type(sampler).__name__ in ("SequentialSampler", "RandomSampler")
    own = all(type(one).__module__.partition(".")[0] in ("torch", "torchdata") for one in (sampler, batches or sampler))
    known = failing.generators is not None and not loader.persistent_workers  # those begin otherwise in a later epoch
    if isinstance(loader.dataset, IterableDataset) or not (ours and own and known):
        return None
    assert failing.generators is not None, "seen above"
    now = states_of(loader, failing.what)
    try:
        with rng.Isolated(rng.fold_in_host(failing.seed, failing.epoch, 0xDA7A)):
            put_generators(loader, failing.generators, failing.what)
            draws = sampler if batches is None else batches
            order = iter(draws)
            base = torch.empty((), dtype=torch.int64)
            base.random_(
                generator=loader.generator
            )  # mutates: a tensor of our own, as the loader draws its workers' seed
            if loader.num_workers:
                order = iter(draws)  # it begins twice, too
            return next(itertools.islice(order, batch, None), None)
    finally:
        put_generators(loader, now, failing.what)


def _few(indices: Any) -> str:
    if not isinstance(indices, Sequence):
        return repr(indices)
    return ", ".join([repr(one) for one in indices[:8]] + (["..."] if len(indices) > 8 else []))
