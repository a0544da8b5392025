"""The user's own loaders: read as they are, saved and restored by their own means, replayed where they have none."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from ftrain import rng
from ftrain.checkpoint import plain
from ftrain.data import Epochs, as_epochs, window
from ftrain.data.frozen import freeze, thaw
from ftrain.errors import DataError, DataWarning

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:'set_vital' is deprecated:UserWarning"
    ),  # torchdata 0.11 calls it, torch 2.13 warns of it
    pytest.mark.filterwarnings("ignore::ftrain.errors.DataWarning"),  # one test is about it
]
N, SIZE, EPOCHS = 11, 3, 3


class Noisy(Dataset[Any]):
    """Items that tell which they are, and draw from the global generators in the process that makes them."""

    def __init__(self, n: int = N, noise: bool = True) -> None:
        self.n, self.noise = n, noise

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        drawn = [float(torch.rand(())), float(np.random.randn()), random.random()] if self.noise else [0.0] * 3
        return {"i": index, "noise": torch.tensor(drawn, dtype=torch.float64)}


class Stream(IterableDataset[Any]):
    """A stream with a state: it goes on where it is, and begins again at its end."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[int]:
        while self.at < N:
            self.at += 1
            yield self.at - 1
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Ours:
    """A loader of the user's own making, with a state and a generator of numpy."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(5)
        self.order: list[int] = []
        self.at = np.int64(0)

    def __iter__(self) -> Iterator[torch.Tensor]:
        if not self.order:
            self.order = self.generator.permutation(N).tolist()
        while self.at < N:
            rows = self.order[self.at : self.at + SIZE]
            self.at += len(rows)
            yield torch.tensor([row + self.generator.random() * 0 for row in rows])
        self.order, self.at = [], np.int64(0)

    def state_dict(self) -> dict[str, Any]:
        return {"order": tuple(self.order), "at": self.at, "seen": set(self.order[: self.at]), 3: b"three"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert type(state["order"]) is tuple
        assert state["seen"] == set(state["order"][: int(state["at"])])
        self.order, self.at = list(state["order"]), state["at"]


class Random(Sampler[int]):
    """A sampler of the user's with a generator of Python, and no state."""

    def __init__(self) -> None:
        self.random = random.Random(3)

    def __iter__(self) -> Iterator[int]:
        return iter(self.random.sample(range(N), N))

    def __len__(self) -> int:
        return N


class Pairs(Random):
    """A sampler of batches, which torchdata leaves alone."""

    def __iter__(self) -> Iterator[Any]:
        order = self.random.sample(range(N), N)
        return iter([order[i : i + 2] for i in range(0, N, 2)])

    def __len__(self) -> int:
        return (N + 1) // 2


class Remembers(Random):
    """A sampler with a state of its own; the loader knows nothing of the order."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[int] = []

    def __iter__(self) -> Iterator[int]:
        if not self.left:
            self.left = self.random.sample(range(N), N)
        while self.left:
            yield self.left.pop(0)

    def state_dict(self) -> dict[str, Any]:
        return {"left": list(self.left)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.left = list(state["left"])


def _torch(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _stateful(**kw: Any) -> Callable[[], Any]:
    noise = not kw.get("num_workers")
    return lambda: StatefulDataLoader(Noisy(noise=noise), batch_size=SIZE, **kw)


def _plain(**kw: Any) -> Callable[[], Any]:
    return lambda: DataLoader(Noisy(), batch_size=SIZE, **kw)


def _huggingface() -> Any:
    import datasets

    table = datasets.Dataset.from_dict({"i": list(range(N))}).to_iterable_dataset(num_shards=2)
    return StatefulDataLoader(table, batch_size=SIZE)  # its shuffle buffer is not part of its state, and it says so


def _generator(epoch: int) -> Iterator[Any]:
    for start in range(0, N, SIZE):
        yield {"i": torch.arange(start, min(start + SIZE, N)), "noise": torch.rand(2), "epoch": epoch}


def _own(epoch: int) -> Any:
    """A function that makes a loader with a state for each epoch."""
    return StatefulDataLoader(Noisy(), batch_size=SIZE, shuffle=True, generator=_torch(epoch))


def _kept() -> Callable[[int], Any]:
    """A function that gives one loader again and again."""
    loader = StatefulDataLoader(Noisy(), batch_size=SIZE, shuffle=True, generator=_torch())
    return lambda epoch: loader


STATEFUL: dict[str, Callable[[], Any]] = {
    "in order": _stateful(),
    "shuffled": lambda: _stateful(shuffle=True, generator=_torch())(),
    "torch's sampler": lambda: StatefulDataLoader(Noisy(), SIZE, sampler=RandomSampler(Noisy())),
    "torch's sampler, own generator": lambda: StatefulDataLoader(
        Noisy(), SIZE, sampler=RandomSampler(Noisy(), generator=_torch(4))
    ),
    "with replacement": lambda: StatefulDataLoader(
        Noisy(), SIZE, sampler=RandomSampler(Noisy(), replacement=True, num_samples=40, generator=_torch(4))
    ),
    "own sampler": lambda: StatefulDataLoader(Noisy(), SIZE, sampler=Random()),
    "own sampler of batches": lambda: StatefulDataLoader(Noisy(), batch_sampler=Pairs()),
    "sampler with a state": lambda: StatefulDataLoader(Noisy(), SIZE, sampler=Remembers()),
    "distributed sampler": lambda: StatefulDataLoader(
        Noisy(), SIZE, sampler=StatefulDistributedSampler(Noisy(), num_replicas=2, rank=1, seed=3)
    ),
    "workers": lambda: _stateful(shuffle=True, generator=_torch(), num_workers=2)(),
    "workers, torch's sampler": lambda: StatefulDataLoader(
        Noisy(noise=False), SIZE, sampler=RandomSampler(Noisy(), generator=_torch(4)), num_workers=2
    ),
    "workers, rare snapshots": lambda: _stateful(
        shuffle=True, generator=_torch(), num_workers=2, snapshot_every_n_steps=3
    )(),
    "persistent workers": lambda: _stateful(shuffle=True, generator=_torch(), num_workers=2, persistent_workers=True)(),
    "dataset with a state": lambda: StatefulDataLoader(Stream(), batch_size=SIZE),
    "dataset with a state, worker": lambda: StatefulDataLoader(Stream(), batch_size=SIZE, num_workers=1),
    "hugging face": _huggingface,
    "no torchdata": Ours,
    "function that makes one": lambda: _own,
    "function that keeps one": _kept,
}
REPLAYED: dict[str, Callable[[], Any]] = {
    "plain": _plain(shuffle=True),
    "plain, own generator": lambda: _plain(shuffle=True, generator=_torch())(),
    "plain, own sampler": lambda: _plain(sampler=Random())(),
    "plain, workers": _plain(shuffle=True, num_workers=2),
    "plain, workers, own generator": lambda: _plain(shuffle=True, num_workers=2, generator=_torch())(),
    "plain, distributed": lambda: _plain(
        sampler=torch.utils.data.DistributedSampler(Noisy(), num_replicas=2, rank=0, seed=1)
    )(),
    "function": lambda: _generator,
    "function of a plain loader": lambda: lambda epoch: _plain(shuffle=True)(),
    "function of arrays": lambda: lambda epoch: [torch.rand(2) for _ in range(4)],
    "windows of a loader": lambda: window(_plain(shuffle=True)(), 2, short="carry"),
}
WINDOWS: dict[str, Callable[[], Any]] = {
    "windows": lambda: window(STATEFUL["shuffled"](), 2, short="carry"),
    "windows, workers": lambda: window(STATEFUL["workers"](), 2, short="step"),
}
ALL = STATEFUL | REPLAYED | WINDOWS
IN_ORDER = {"dataset with a state", "dataset with a state, worker", "hugging face"}


def same(a: Any, b: Any) -> bool:
    from ftrain import tree

    pairs = zip(tree.leaves(a), tree.leaves(b), strict=True)
    return tree.same_structure(a, b) and all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in pairs)


def read(epochs: Epochs, cuts: set[int], make: Callable[[], Epochs]) -> list[list[Any]]:
    """The batches of all epochs; at each cut (a number of batches) everything is thrown away and made again from the place."""
    found: list[list[Any]] = []
    place: Any = {"batch": 0}
    count = 0
    for epoch in range(EPOCHS):
        found.append([])
        reader = epochs(epoch, place)
        while True:
            if count in cuts:
                cuts = cuts - {count}
                place = through_json(reader.place())
                reader.close()
                epochs.close()
                epochs = make()
                reader = epochs(epoch, place)
            batch = next(reader, None)
            if batch is None:
                break
            found[-1].append(batch)
            count += 1
        reader.close()
        place = epochs.start()
        if -epoch - 1 in cuts:  # between two epochs
            place = through_json(place)
            epochs.close()
            epochs = make()
    epochs.close()
    return found


def through_json(place: Any) -> Any:
    encoded, arrays = plain.encode(place)
    return plain.decode(encoded, [array.clone() for array in arrays])


@pytest.mark.parametrize("kind", ALL)
def test_a_run_that_is_cut_reads_what_it_would_have_read(kind: str, rng_guard: Any) -> None:
    def make() -> Epochs:
        return as_epochs(ALL[kind](), seed=7)

    with rng_guard():
        whole = read(make(), set(), make)
        per = len(whole[0])
        assert per >= 2
        for cuts in ({1}, {2, per + 1, 2 * per + 1}, {-1}, {-1, per + 1, -2}, {per}, {per - 1, 2 * per}):
            found = read(make(), cuts, make)
            assert same(whole, found), f"cut at {sorted(cuts)}: {whole} and not {found}"
    assert same(whole[0], whole[1]) == (kind in IN_ORDER)
    if not any(word in kind for word in ("windows", "distributed", "replacement", "arrays")):
        for epoch in whole:
            rows = [b["i"] if isinstance(b, dict) else b for b in epoch]
            assert sorted(torch.cat(rows).int().tolist()) == list(range(N))
