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
from functools import partial
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

import ftrain as ft
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


def _made(kind: Any, noise: bool, **kw: Any) -> Any:
    """A loader as a script would make it: with generators and samplers of its own."""
    made = {key: value() if callable(value) else value for key, value in kw.items()}
    return kind(Noisy(noise=noise), batch_size=SIZE, **made)


def _stateful(**kw: Any) -> Callable[[], Any]:
    # what is drawn inside of workers is not part of torchdata's state
    return partial(_made, StatefulDataLoader, not kw.get("num_workers"), **kw)


def _plain(**kw: Any) -> Callable[[], Any]:
    return partial(_made, DataLoader, True, **kw)


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
    "shuffled": _stateful(shuffle=True, generator=_torch),
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
    "workers": _stateful(shuffle=True, generator=_torch, num_workers=2),
    "workers, torch's sampler": lambda: StatefulDataLoader(
        Noisy(noise=False), SIZE, sampler=RandomSampler(Noisy(), generator=_torch(4)), num_workers=2
    ),
    "workers, rare snapshots": _stateful(shuffle=True, generator=_torch, num_workers=2, snapshot_every_n_steps=3),
    "persistent workers": _stateful(shuffle=True, generator=_torch, num_workers=2, persistent_workers=True),
    "dataset with a state": lambda: StatefulDataLoader(Stream(), batch_size=SIZE),
    "dataset with a state, worker": lambda: StatefulDataLoader(Stream(), batch_size=SIZE, num_workers=1),
    "hugging face": _huggingface,
    "no torchdata": Ours,
    "function that makes one": lambda: _own,
    "function that keeps one": _kept,
}
REPLAYED: dict[str, Callable[[], Any]] = {
    "plain": _plain(shuffle=True),
    "plain, own generator": _plain(shuffle=True, generator=_torch),
    "plain, own sampler": _plain(sampler=Random),
    "plain, workers": _plain(shuffle=True, num_workers=2),
    "plain, workers, own generator": _plain(shuffle=True, num_workers=2, generator=_torch),
    "plain, distributed": _plain(
        sampler=lambda: torch.utils.data.DistributedSampler(Noisy(), num_replicas=2, rank=0, seed=1)
    ),
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


@pytest.mark.parametrize("kind", ["shuffled", "workers", "sampler with a state", "plain, own generator"])
def test_the_same_loader_goes_back_to_a_place(kind: str) -> None:
    epochs = as_epochs(ALL[kind](), seed=7)
    reader = epochs(0)
    first = next(reader)
    place = through_json(reader.place())
    rest = list(reader)
    again = list(epochs(0, place))
    assert same(rest, again)
    assert not same(first, again[0])
    epochs.close()


@pytest.mark.parametrize("kind", ["shuffled", "workers", "plain", "windows", "no torchdata"])
def test_after_more_the_place_is_still_that_of_the_batches_handed_out(kind: str) -> None:
    def make() -> Epochs:
        return as_epochs(ALL[kind](), seed=7)

    whole = list(make()(0))
    for n in range(len(whole) + 1):
        reader = make()(0)
        for _ in range(n):
            next(reader)
        assert reader.more() == (n < len(whole))
        place = through_json(reader.place())
        assert place["batch"] == n
        assert same(list(make()(0, place)), whole[n:])
        assert same(list(reader), whole[n:])


# -- replaying ----------------------------------------------------------------------------------------------------------------------------


def test_a_replay_says_so_once_and_how_to_avoid_it() -> None:
    epochs = as_epochs(ALL["plain"](), seed=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        list(epochs(0))
        list(epochs(1, {"batch": 0}))
    with pytest.warns(DataWarning) as caught:
        list(epochs(0, {"batch": 2}))
    assert len(caught) == 1
    for text in ("ft.fit: 2 batches of epoch 0 are read again", "DataLoader", "ft.data.source(", "StatefulDataLoader"):
        assert text in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        list(epochs(1, {"batch": 1}))


def test_numbers_drawn_in_the_workers_of_a_loader_with_a_state_are_told_of_once() -> None:
    def make() -> Epochs:
        return as_epochs(_made(StatefulDataLoader, True, shuffle=True, num_workers=2, generator=_torch), seed=7)

    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        whole = list(make()(0))
        reader = make()(0)
        next(reader)
        place = through_json(reader.place())
        reader.close()
        restored = make()
    with pytest.warns(DataWarning) as caught:
        rest = list(restored(0, place))
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "\n" not in text
    for part in (
        "ft.fit: StatefulDataLoader",
        "numbers that are drawn in its workers begin anew",
        "ft.data.source(dataset, ..., workers=n) goes on exactly",
    ):
        assert part in text
    # what the warning says is so: the same items, with other numbers
    assert same([batch["i"] for batch in rest], [batch["i"] for batch in whole[1:]])
    assert not same(rest, whole[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        list(restored(0, place))  # once
        at_an_end = make()
        list(at_an_end(0))
        start = through_json(at_an_end.start())
        list(make()(1, start))  # between two epochs nothing begins anew
    # what it recommends is so, too
    data = ft.data.source(Noisy(), batch_size=SIZE, shuffle=True, workers=2).epochs(seed=7)
    assert same(list(data(0, {"batch": 1})), list(data(0))[1:])


def test_what_can_be_sought_is_not_replayed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        for make in (
            lambda: [1, 2, 3, 4],
            lambda: lambda epoch: [1, 2, 3, 4],
            lambda: lambda epoch: window([1, 2, 3, 4], 1),
        ):
            found = list(as_epochs(make())(0, {"batch": 3}))
            assert [getattr(one, "batches", (one,))[0] for one in found] == [4]
        state = as_epochs(ALL["shuffled"](), seed=7)
        reader = state(0)
        next(reader)
        list(as_epochs(ALL["shuffled"](), seed=7)(0, reader.place()))


def test_a_function_is_called_once_for_an_epoch_and_its_datas_own_finish_is_applied() -> None:
    calls: list[int] = []
    inner = Epochs(lambda epoch, place: iter(range(place["batch"], 4)), 4, finish=lambda b, epoch, i: (b, epoch, i))

    def data(epoch: int) -> Any:
        calls.append(epoch)
        return inner if epoch else [10, 11]

    epochs = as_epochs(data)
    assert epochs.finish is not None
    assert [epochs.finish(batch, 0, i) for i, batch in enumerate(epochs(0))] == [10, 11]
    assert [epochs.finish(batch, 1, i) for i, batch in enumerate(epochs(1, {"batch": 2}), 2)] == [(2, 1, 2), (3, 1, 3)]
    assert calls == [0, 1]


def test_an_iterator_is_read_from_its_beginning_with_a_warning() -> None:
    with pytest.warns(DataWarning, match="which is taken to be at its beginning"):
        assert list(as_epochs(iter(range(5)))(0, {"batch": 3})) == [3, 4]


@pytest.mark.parametrize(
    "make",
    [lambda: DataLoader(range(4)), lambda: iter(range(4)), lambda: [0, 1, 2, 3], lambda: lambda epoch: iter(range(4))],
)
def test_data_that_has_become_shorter(make: Any) -> None:
    list(as_epochs(make())(0, {"batch": 4}))
    with pytest.raises(DataError) as caught:
        list(as_epochs(make())(0, {"batch": 6}))
    for text in ("ended before the place", "epoch 0", "at least 6 batches", "got:      4 batches"):
        assert text in str(caught.value)


def test_batches_left_out_after_an_error_are_counted_too() -> None:
    with pytest.raises(DataError, match="at least 6 batches"):
        as_epochs([0, 1, 2, 3])(0, {"batch": 6, "skip": 6})


# -- states -------------------------------------------------------------------------------------------------------------------------------


def test_states_are_frozen_exactly_and_share_no_memory() -> None:
    tensor, array = torch.arange(3), np.arange(3.0)
    state = {
        "t": tensor, "a": array, 5: (1, [2.5, None, True]), "set": {3, 1}, "frozen": frozenset("ab"), "bytes": b"x",
        "np": np.float32(1.5), "keys": {(1, 2): "pair", None: 0}, "ftrain.kind": "set",
    }  # fmt: skip
    frozen = freeze(state, "state", "ft.fit")
    copied = through_json(frozen)
    tensor += 1
    array += 1
    back = thaw(copied)
    assert torch.equal(back.pop("t"), torch.arange(3))
    assert np.array_equal(back.pop("a"), np.arange(3.0))
    del state["t"], state["a"]
    assert back == state
    assert type(back["np"]) is np.float32
    assert type(back["keys"]) is dict
    thawed = thaw(frozen)
    thawed["t"] += 5
    assert torch.equal(frozen["of"][0][1], torch.arange(3))


class _Opaque(Ours):
    def state_dict(self) -> dict[str, Any]:
        return {"rows": [1, object()]}


def test_a_state_that_cannot_be_saved_is_an_error_only_when_it_is_asked_for() -> None:
    epochs = as_epochs(_Opaque())
    assert len(list(epochs(0))) == 4
    reader = epochs(0)
    next(reader)
    for ask in (reader.place, epochs.start):
        with pytest.raises(DataError) as caught:
            ask()
        for text in ("state of the loader cannot be saved", "loader.state_dict()['rows'][1]", "got:      object"):
            assert text in str(caught.value)


def test_a_loader_that_cannot_take_its_state_back() -> None:
    reader = as_epochs(ALL["workers"]())(0)
    next(reader)
    place = reader.place()
    reader.close()
    with pytest.raises(DataError) as caught:
        next(as_epochs(_stateful(shuffle=True, generator=_torch)())(0, place))
    for text in ("could not take back the state", "epoch 0, after 1 batches", "num_workers", "StatefulDataLoader"):
        assert text in str(caught.value)
    assert caught.value.__cause__ is not None
    plain_reader = as_epochs(ALL["plain, own generator"]())(0)
    next(plain_reader)
    with pytest.raises(DataError, match=r"loader\.generator"):
        next(as_epochs(ALL["plain"]())(0, plain_reader.place()))


def test_the_streams_can_be_saved_while_they_are_used(rng_guard: Any) -> None:
    def draw() -> list[float]:
        return [float(torch.rand(())), float(np.random.randn()), random.random(), random.gauss(0, 1)]

    np.random.randn()  # the user's own: half of a pair is kept
    streams = rng.Isolated(3)
    with rng_guard():
        with streams:
            draw()
            inside = through_json(streams.state())
            follows = draw()
        outside = through_json(streams.state())
        with streams:
            later = draw()
        for kept, expected in ((inside, follows), (outside, later)):
            other = rng.Isolated(99)
            other.take(kept)
            with other:
                assert draw() == expected
        again = rng.Isolated(99)
        with again:
            draw()
            again.take(inside)
            assert draw() == follows
        streams.take(outside)
        with streams:
            assert draw() == later


# -- facts --------------------------------------------------------------------------------------------------------------------------------


def test_facts() -> None:
    def facts(data: Any) -> dict[str, Any]:
        return as_epochs(data).facts

    assert facts([1, 2]) == {"kind": "list", "batches": 2}
    assert facts(lambda epoch: [1]) == {"kind": "function"}
    assert facts(_generator(0)) == {"kind": "generator", "batches": None}
    assert facts(DataLoader(range(10), 4, shuffle=True, drop_last=True, num_workers=2)) == {
        "kind": "DataLoader", "batches": 2, "samples": 10, "batch_size": 4, "drop_last": True, "sampler": "RandomSampler",
    }  # fmt: skip
    assert facts(StatefulDataLoader(range(10), 4, num_workers=2)) == {
        "kind": "StatefulDataLoader", "batches": 3, "samples": 10, "batch_size": 4, "drop_last": False,
        "sampler": "SequentialSampler", "workers": 2,
    }  # fmt: skip
    assert facts(DataLoader(Noisy(), batch_sampler=Pairs())) == {
        "kind": "DataLoader", "batches": 6, "samples": N, "batch_sampler": "Pairs",
    }  # fmt: skip
    assert facts(DataLoader(Stream(), 2)) == {
        "kind": "DataLoader", "batches": None, "samples": None, "batch_size": 2, "drop_last": False, "workers": 0,
    }  # fmt: skip


# -- errors -------------------------------------------------------------------------------------------------------------------------------


class Faulty(Noisy):
    """One item is faulty in some way."""

    def __init__(self, fault: str, at: int = 7) -> None:
        super().__init__(noise=False)
        self.fault, self.at = fault, at

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {"x": torch.zeros(3), "y": {"label": index}}
        if index == self.at:
            if self.fault == "raises":
                raise KeyError(f"no row {index}")
            if self.fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "exits":
                os._exit(3)
            item |= {
                "shape": {"x": torch.zeros(2)},
                "missing": {"y": {}},
                "object": {"y": {"label": object()}},
                "none": {"x": None},
            }[self.fault]
        return item


SEED = 5  # with which item 7 is not the first of its batch, for torch leaves out what the first has not, nor one of two
WORKERS = pytest.mark.parametrize("workers", [0, 2])
KINDS = pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])


def _first_error(loader: Any, error: type[Exception] = DataError) -> tuple[Exception, int]:
    """The error that a loader ends with, and the batch at which it came."""
    reader = as_epochs(loader, seed=5)(0)
    try:
        with pytest.raises(error) as caught:
            list(reader)
        return caught.value, reader.read
    finally:
        reader.close()


@KINDS
@WORKERS
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(
    "fault",
    {
        "shape": ("where:    dataset[7]['x']", "float32[3] on cpu, as dataset[", "got:      float32[2] on cpu"),
        "missing": ("where:    dataset[7]['y']['label']", "expected: int, as dataset[", "got:      nothing"),
        "object": ("where:    dataset[7]['y']['label']", "got:      object"),
        "none": ("where:    dataset[7]['x']", "got:      NoneType"),
    }.items(),
    ids=lambda fault: fault[0],
)
def test_an_item_that_cannot_be_collated(
    kind: Any, workers: int, shuffle: bool, fault: tuple[str, Any], rng_guard: Any
) -> None:
    generator = _torch(SEED)
    loader = kind(Faulty(fault[0]), SIZE, shuffle=shuffle, num_workers=workers, generator=generator)
    with rng_guard():
        error, batch = _first_error(loader)
    for text in (f"batch {batch} of epoch 0 could not be collated", *fault[1], "cause:", "collate_fn="):
        assert text in str(error)
    assert error.__cause__ is not None
    assert not psutil.Process().children(recursive=True)


@KINDS
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_an_item_that_raises(kind: Any, workers: int, shuffle: bool) -> None:
    loader = kind(Faulty("raises"), SIZE, shuffle=shuffle, num_workers=workers, generator=_torch(1))
    good = kind(Noisy(noise=False), SIZE, shuffle=shuffle, num_workers=workers, generator=_torch(1))
    order = [b["i"].tolist() for b in as_epochs(good, seed=5)(0)]
    error, batch = _first_error(loader, KeyError)
    assert "no row 7" in str(error)
    (note,) = error.__notes__
    assert f"batch {batch} of epoch 0" in note
    assert 7 in order[batch]
    if workers == 0:
        assert "item 7 of the dataset" in note
    else:
        assert f"of the items {', '.join(map(str, order[batch]))}" in note
        assert f"by worker {batch % workers}" in note
        assert "Original Traceback" in str(error)


@KINDS
@pytest.mark.parametrize(
    ("fault", "text"), [("killed", "it was killed by SIGKILL"), ("exits", "it exited with code 3")]
)
def test_a_worker_that_dies(kind: Any, fault: str, text: str) -> None:
    loader = kind(Faulty(fault), SIZE, num_workers=2)
    error, batch = _first_error(loader)
    for words in (
        "a worker of the DataLoader died; batch ", " of epoch 0 is missing", "worker 0 (pid ",
        "batch 2 of the items 6, 7, 8", text, "num_workers=0",
    ):  # fmt: skip
        assert words in str(error), error
    assert batch <= 2
    assert isinstance(error.__cause__, (RuntimeError, EOFError, OSError))  # of torch, or of the pipe that broke
    assert not psutil.Process().children(recursive=True)


@KINDS
def test_a_worker_that_dies_between_two_batches_interrupts_no_step(kind: Any) -> None:
    reader = as_epochs(kind(Noisy(200, noise=False), SIZE, num_workers=2))(0)
    try:
        next(reader)
        for child in psutil.Process().children():
            child.kill()
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # leaves its status to torch
        for _ in range(1000):  # a step: torch's handler of SIGCHLD would raise in here
            torch.zeros(10).sum()
        with pytest.raises(DataError, match="it was killed by SIGKILL") as caught:
            next(reader)
        assert "batch 1 of epoch 0 is missing" in str(caught.value) or "worker 0" in str(caught.value)
        assert reader.place()["batch"] == 1
    finally:
        reader.close()
    assert _workers() == 0


def test_errors_of_other_iterables_get_no_note() -> None:
    def data(epoch: int) -> Iterator[int]:
        yield 1
        raise ValueError("mine")

    error, _ = _first_error(data, ValueError)
    assert not hasattr(error, "__notes__")


@pytest.mark.parametrize("workers", [0, 2])
def test_after_an_error_the_place_is_before_the_batch_that_failed(workers: int) -> None:
    def loader(fault: str) -> Any:
        return StatefulDataLoader(Faulty(fault), SIZE, shuffle=True, generator=_torch(1), num_workers=workers)

    whole = [b["x"].shape for b in as_epochs(StatefulDataLoader(Faulty("raises", -1), SIZE), seed=5)(0)]
    reader = as_epochs(loader("raises"), seed=5)(0)
    with pytest.raises(KeyError):
        list(reader)
    place = through_json(reader.place())
    assert place == {"batch": reader.read, **({"skip": reader.read} if reader.read else {})}
    reader.close()
    good = StatefulDataLoader(Faulty("raises", -1), SIZE, shuffle=True, generator=_torch(1), num_workers=workers)
    assert len(list(as_epochs(good, seed=5)(0, place))) == len(whole) - reader.read


# -- workers end --------------------------------------------------------------------------------------------------------------------------


def _workers() -> int:
    return sum(child.status() != psutil.STATUS_ZOMBIE for child in psutil.Process().children(recursive=True))


@KINDS
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("leave", ["end", "break", "error"])
def test_workers_have_ended(kind: Any, persistent: bool, leave: str) -> None:
    loader = kind(Noisy(noise=False), SIZE, num_workers=2, persistent_workers=persistent)
    epochs = as_epochs(loader)
    held: list[BaseException] = []  # a traceback that is kept keeps the iterator
    for epoch in range(2):
        reader = epochs(epoch)
        try:
            for i, _ in enumerate(reader):
                assert _workers() == 2
                if i == 1 and leave == "break":
                    break
                if i == 1 and leave == "error":
                    raise ValueError("mine")
        except ValueError as error:
            held.append(error)
        finally:
            reader.close()
        assert _workers() == (2 if persistent and leave == "end" else 0)
    epochs.close()
    assert _workers() == 0
    assert len(list(epochs(2))) == 4, "the loader can be used again"
    epochs.close()
    assert _workers() == 0


def test_ctrl_c_is_for_the_main_process_alone() -> None:
    """A terminal sends it to all processes of the group; the workers wait for the main one to end them."""
    code = """
        import os, sys, time, psutil, torch, signal
        from torch.utils.data import DataLoader
        from ftrain.data import as_epochs
        torch.set_num_threads(1)
        class Slow(torch.utils.data.Dataset):
            def __len__(self): return 1000
            def __getitem__(self, i):
                time.sleep(0.02)
                return i
        heard = []
        signal.signal(signal.SIGINT, lambda *_: heard.append(1))   # as fit does: a flag
        reader = as_epochs(DataLoader(Slow(), 2, num_workers=2))(0)
        for i, _ in enumerate(reader):
            if i == 3:
                print("ready", flush=True)
            if heard:
                break
        for _ in range(5):
            next(reader)                                           # the workers are still there
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("again", flush=True)
        try:
            for _ in reader: pass
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        finally:
            reader.close()
        print(len(psutil.Process().children()), flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
        try:
            assert child.stdout is not None
            for word in ("ready", "again"):
                assert child.stdout.readline().strip() == word
                time.sleep(0.1)
                os.killpg(child.pid, signal.SIGINT)
            assert child.stdout.read().split() == ["interrupted", "0"]
            assert child.wait(20) == 0
        finally:
            child.kill()


# -- a whole run --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shuffled", "workers", "plain, own generator", "function", "windows"])
def test_a_loop_resumed_three_times_in_the_middle_of_an_epoch(kind: str) -> None:
    """State and position go through a new process's worth of forgetting: loader, step and state are made again."""
    model = torch.nn.Linear(2, 1)
    tx = ft.optim.sgd(0.05)

    def loss_fn(model: Any, batch: Any) -> Any:
        seen.extend(int(i) for i in batch["i"])
        x = torch.stack([batch["i"].float(), batch["noise"].flatten()[0].float().expand(len(batch["i"]))], dim=1)
        return model(x).square().mean() / 100

    seen: list[int] = []
    start = ft.init(model, tx, seed=3)
    step = ft.train_step(model, loss_fn, tx)
    for tick in ft.loop(start, step, ALL[kind](), epochs=EPOCHS):
        whole = tick.state
    once, seen[:] = list(seen), []
    state, position = start, None
    for stop in (1, 3, 5, None) if kind == "windows" else (1, 5, 7, None):
        for tick in ft.loop(state, step, ALL[kind](), epochs=EPOCHS, start=position):
            if stop is not None and tick.step >= stop:
                state, position = tick.state, ft.Position.of(through_json(tick.position().plain()))
                break
    assert seen == once
    for epoch in range(EPOCHS if kind != "windows" else 0):
        assert sorted(seen[epoch * N : (epoch + 1) * N]) == list(range(N))
    assert torch.equal(tick.state.params["weight"], whole.params["weight"])
    assert not torch.equal(whole.params["weight"], start.params["weight"])
    assert _workers() == 0
