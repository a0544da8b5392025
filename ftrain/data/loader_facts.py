"""What is known of a user's loader without iterating it: its length, the sizes of its batches, and what tells it from others."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

__all__ = ["facts_of", "has_state", "length_of", "restores", "sizes_of"]


def has_state(loader: Any) -> bool:
    """Whether a loader can be saved and restored by its own means, as torchdata's `StatefulDataLoader`."""
    return all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))


def restores(loader: Any) -> bool:
    """Whether a loader that is given its state back goes on with the batches that would have come.

    torchdata's restores a sampler without a state by iterating it again, twice: once when the iterator is made, and once when that
    takes its state. One that draws its order as soon as it is asked for an iterator then gives the order of another epoch.
    """
    if not has_state(loader):
        return False
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return True
    sampler = loader.sampler if loader.batch_sampler is None or _batches_itself(loader) else loader.batch_sampler
    known = type(sampler).__module__.partition(".")[0] in ("torch", "torchdata")  # draw late, or not at all
    return (
        known or callable(getattr(sampler, "state_dict", None)) or inspect.isgeneratorfunction(type(sampler).__iter__)
    )


def length_of(data: Any) -> int | None:
    """Batches in an epoch, where the data knows. An IterableDataset's length is a guess and does not count."""
    if isinstance(data, DataLoader) and isinstance(data.dataset, IterableDataset):
        return None
    return _len(data)


def sizes_of(data: Any) -> tuple[int, ...] | None:
    """How many samples the batches of a DataLoader have, where it batches by itself and leaves collation to the default."""
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return None
    if not _batches_itself(data) or data.collate_fn is not torch.utils.data.default_collate:
        return None
    n = _len(data.sampler)
    if n is None:
        return None
    size = int(data.batch_size or 1)
    rows = {size if n >= size else 0, 0 if data.drop_last else n % size} - {0}
    return tuple(sorted(rows, reverse=True))


def facts_of(data: Any) -> dict[str, Any]:
    """What tells a loader or other iterable from others, as JSON.

    The number of workers counts where it decides what comes in which order, or whose state is saved. A seed is not known.

    >>> import torch
    >>> from ftrain.data.loader_facts import facts_of
    >>> facts_of(torch.utils.data.DataLoader(range(10), batch_size=4, shuffle=True))
    {'kind': 'DataLoader', 'batches': 3, 'samples': 10, 'batch_size': 4, 'drop_last': False, 'sampler': 'RandomSampler'}
    """
    facts: dict[str, Any] = {"kind": type(data).__name__, "batches": length_of(data)}
    if not isinstance(data, DataLoader):
        return facts
    streamed = isinstance(data.dataset, IterableDataset)
    facts["samples"] = None if streamed else _len(data.dataset)
    if data.batch_sampler is not None and not _batches_itself(data):
        facts["batch_sampler"] = type(data.batch_sampler).__name__
    else:
        facts |= {"batch_size": data.batch_size, "drop_last": data.drop_last}
        if not streamed:
            facts["sampler"] = type(data.sampler).__name__
    if streamed or has_state(data):
        facts["workers"] = data.num_workers
    return facts


def _batches_itself(loader: Any) -> bool:
    """Whether it makes batches of the sampler's indices in torch's own way (torchdata derives a class from torch's)."""
    kind = type(loader.batch_sampler)
    return kind is BatchSampler or (issubclass(kind, BatchSampler) and kind.__module__.startswith("torchdata."))


def _len(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None
