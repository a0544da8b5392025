"""Sources: what they are made of, how they are read, with and without workers, and how padding weighs."""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import pickle
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import ftrain as ft
from ftrain import tree
from ftrain.errors import ArgumentError, DataError
from ftrain.steps.bind import padding

from .corpus import setup


class Squares:
    """A map-style dataset that counts what it is asked for."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Any]:
        self.asked.append(i)
        return {"i": i, "x": np.float32(i) ** 2}


class Many(Squares):
    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        self.asked.append(tuple(indices))  # type: ignore[arg-type]
        return [{"i": i, "x": np.float32(i) ** 2} for i in indices]


class Noisy(Squares):
    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"i": i, "noise": torch.rand(2) + random.random() + np.random.randn()}


def values(batches: Any) -> list[list[int]]:
    return [batch["i"].tolist() if isinstance(batch, dict) else batch.tolist() for batch in batches]


def same(a: Any, b: Any) -> bool:
    return tree.same_structure(a, b) and all(
        torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True)
    )


def fit(state: Any, step: Any, data: Any, **kwargs: Any) -> ft.Result:
    return ft.fit(state, step, data, **{"progress": False, "compile": False, **kwargs})


# -- from what ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, 16, 33])
@pytest.mark.parametrize("size", [1, 4, 40])
def test_arrays_are_in_the_order_of_arrays_given_to_fit(n: int, size: int) -> None:
    data = {"i": torch.arange(n), "x": (np.random.rand(n, 2), torch.rand(n, 1, 3))}
    source = ft.data.source(data, batch_size=size, shuffle=True, seed=7)
    plain = ft.data.as_epochs(data, batch_size=size, shuffle=True, seed=7)
    for epoch in range(3):
        pairs = list(zip(source.epochs(seed=99)(epoch), plain(epoch), strict=True))
        assert all(same(a, b) for a, b in pairs)
        assert len(pairs) == len(source) == plain.length
    assert source.epochs().sizes == plain.sizes
    unshuffled = zip(ft.data.source(data, batch_size=size), ft.data.as_epochs(data, batch_size=size)(0), strict=True)
    assert all(same(a, b) for a, b in unshuffled)


def test_kinds_of_data_give_the_same_batches(tmp_path: Path) -> None:
    n = 11
    numbers = np.arange(n)
    mapped = np.memmap(tmp_path / "i.bin", dtype=np.int64, mode="w+", shape=(n,))
    mapped[:] = numbers
    mapped.flush()
    frozen = numbers.copy()
    frozen.flags.writeable = False
    expected = values(ft.data.source({"i": torch.arange(n)}, batch_size=3, shuffle=True, seed=1))
    for i in (
        numbers,
        frozen,
        mapped,
        np.memmap(tmp_path / "i.bin", dtype=np.int64, mode="r"),
        np.arange(2 * n)[::2] // 2,
    ):
        assert values(ft.data.source({"i": i}, batch_size=3, shuffle=True, seed=1)) == expected
        batch = next(iter(ft.data.source({"i": i}, batch_size=3)))
        batch["i"].add_(0)  # without a warning: nothing is read-only
    items = [{"i": k} for k in range(n)]
    for data in (items, Squares(n), Many(n), ft.data.source(items)):
        assert values(ft.data.source(data, batch_size=3, shuffle=True, seed=1)) == expected
    pairs = ft.data.source(TensorDataset(torch.arange(n), torch.ones(n, 2)), batch_size=3, shuffle=True, seed=1)
    assert [batch[0].tolist() for batch in pairs] == expected
    assert [batch.tolist() for batch in ft.data.source(numbers, batch_size=3, shuffle=True, seed=1)] == expected


def test_a_read_only_array_is_not_copied() -> None:
    """A memory map of a file larger than the memory must not be read as a whole."""

    class Map(np.ndarray):
        def copy(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("the whole array was copied")

    array = np.arange(100).view(Map)
    array.flags.writeable = False
    source = ft.data.source(array, batch_size=10, shuffle=True, seed=0)
    assert sorted(x for batch in source for x in batch.tolist()) == list(range(100))
    assert [batch.tolist() for batch in ft.data.source(array, batch_size=50)][1] == list(range(50, 100))


def test_getitems_is_asked_once_for_a_batch() -> None:
    data = Many(7)
    assert values(ft.data.source(data, batch_size=3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert data.asked == [(0, 1, 2), (3, 4, 5), 6]

    class Short(Many):
        def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
            return super().__getitems__(indices[1:])

    with pytest.raises(DataError, match=r"(?s)__getitems__ gave another number.*3 items, for \[0, 1, 2\].*got: +2"):
        list(ft.data.source(Short(7), batch_size=3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_dataset_of_hugging_face() -> None:
    datasets = pytest.importorskip("datasets")
    columns = {"input_ids": [[i, i + 1, i + 2] for i in range(10)], "label": list(range(10)), "w": [0.5] * 10}
    data = datasets.Dataset.from_dict(columns)
    source = ft.data.source(data, batch_size=4, shuffle=True, seed=0)
    for epoch in range(2):
        found = list(source.at(epoch=epoch))
        assert [batch["input_ids"].shape for batch in found] == [(4, 3), (4, 3), (2, 3)]
        labels = torch.cat([batch["label"] for batch in found])
        assert sorted(labels.tolist()) == list(range(10))
        assert torch.equal(torch.cat([batch["input_ids"] for batch in found])[:, 0], labels)
    assert found[0]["w"].dtype == torch.float32
    assert same(next(source.at(epoch=1, start=2)), found[2])
    tensors = ft.data.source(data.with_format("torch"), batch_size=4, shuffle=True, seed=0)
    assert all(same(a, b) for a, b in zip(tensors, source, strict=True))
    workers = source.load(workers=1)
    assert all(same(a, b) for a, b in zip(workers, source, strict=True))
    texts = ft.data.source(datasets.Dataset.from_dict({"text": ["a", "b"], "y": [1, 2]}), batch_size=2)
    with pytest.raises(DataError, match=r"(?s)cannot be collated.*item 0, item\['text'\].*got: +str.*source.map"):
        list(texts)
    splits = datasets.DatasetDict({"train": data})
    with pytest.raises(DataError, match=r"(?s)got: +DatasetDict.*source\(data\['train'\]\)"):
        ft.data.source(splits)
    packed = ft.data.source(data.select_columns(["input_ids"])).pack(8, key="input_ids")
    assert packed[0].tolist() == [0, 1, 2, 1, 2, 3, 2, 3]


def test_tokens_of_a_file(tmp_path: Path) -> None:
    flat = (np.arange(1000) * 7 % 65_000).astype(np.uint16)
    flat.tofile(tmp_path / "tokens.bin")
    np.save(tmp_path / "tokens.npy", flat.astype(np.int32))
    for where in (tmp_path / "tokens.bin", str(tmp_path / "tokens.npy"), flat, torch.from_numpy(flat.astype(np.int64))):
        data = ft.data.tokens(where, 33, stride=32)
        assert len(data) == (1000 - 33) // 32 + 1
        assert data[3].dtype == torch.int64
        assert data[3].tolist() == flat[96:129].tolist()
        batch = next(data.shuffle(seed=0).batch(4).at(epoch=1, start=2))
        starts = [int(i) for i in ft.data.order.permutation(len(data), 0, 1)[8:12]]
        assert batch.tolist() == [flat[32 * i : 32 * i + 33].tolist() for i in starts]
    file = ft.data.tokens(tmp_path / "tokens.bin", 10).batch(3)
    assert len(pickle.dumps(file)) < 2000  # not the file
    assert all(same(a, b) for a, b in zip(pickle.loads(pickle.dumps(file)), file, strict=True))
    assert all(same(a, b) for a, b in zip(file.load(workers=1), file, strict=True))
    with pytest.raises(DataError, match=r"(?s)no such file.*nothing\.bin"):
        ft.data.tokens(tmp_path / "nothing.bin", 4)
    (tmp_path / "odd.bin").write_bytes(bytes(2002))
    with pytest.raises(DataError, match=r"(?s)no row of int64 tokens.*multiple of 8 bytes.*2002 bytes"):
        ft.data.tokens(tmp_path / "odd.bin", 4, dtype=np.int64)
    with pytest.raises(DataError, match=r"(?s)fewer tokens than one window.*at least 1001.*got: +1000"):
        ft.data.tokens(flat, 1001)
    with pytest.raises(DataError, match=r"(?s)no flat array of tokens.*float64"):
        ft.data.tokens(np.zeros(9), 3)
    with pytest.raises(DataError, match="stride=0 makes no sense"):
        ft.data.tokens(flat, 3, stride=0)


def test_items_that_are_batches_already() -> None:
    batches = [{"i": torch.arange(3) + k} for k in range(4)]
    source = ft.data.source(batches, batched=True, shuffle=True, seed=0)
    assert sorted(values(source)) == values(batches)
    assert source.epochs().length == 4
    with pytest.raises(DataError, match="for a list or a dataset of batches"):
        ft.data.source(torch.arange(3), batched=True)
    with pytest.raises(DataError, match="said of a source of single items"):
        ft.data.source(ft.data.source(torch.arange(3)), batched=True)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            {"x": torch.zeros(3), "y": torch.zeros(4)},
            r"(?s)differ in length.*data\['y'\].*3 rows, as data\['x'\].*got: +4",
        ),
        ({"x": torch.zeros(3), "y": "text"}, r"(?s)data\['y'\].*got: +str"),
        ((1, 2, 3), r"(?s)data\[0\].*only a list is taken as a list of samples"),
        ({}, "holds no arrays"),
        (torch.tensor(3), "at least one dimension"),
        (np.array(["a", "b"]), "no array"),
        ("text", "no data that can be sought"),
        (3, "no data that can be sought"),
        (None, "no data that can be sought"),
        (iter([1]), r"(?s)no data that can be sought.*used as it is"),
        (DataLoader([1, 2]), r"(?s)order of its own.*loader.dataset"),
        (object(), "no data that can be sought"),
    ],
    ids=lambda one: one if isinstance(one, str) else type(one).__name__,
)
def test_what_is_no_data(data: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        ft.data.source(data)


def test_more_bad_input() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter([1])

    class Frame:
        iloc = None

        def __len__(self) -> int:
            return 1

        def __getitem__(self, name: str) -> Any: ...

    with pytest.raises(DataError, match="no data that can be sought"):
        ft.data.source(Stream())
    with pytest.raises(DataError, match=r"(?s)no data that can be sought.*to_numpy"):
        ft.data.source(Frame())
    with pytest.raises(DataError, match="go with batch_size="):
        ft.data.source([1, 2], last="drop")
    with pytest.raises(ArgumentError, match=r"seed=0\.5 makes no sense"):
        ft.data.source([1, 2], seed=0.5)


# -- collation ------------------------------------------------------------------------------------------------------------------------


def test_collation_goes_by_the_structure_of_items() -> None:
    items = [
        {"a": (i, i / 2, bool(i)), "b": [torch.full((2,), i)], "c": np.float64(i), "d": [[i, 1], [2, 3]]}
        for i in range(3)
    ]
    batch = ft.data.collate(items)
    assert [leaf.dtype for leaf in batch["a"]] == [torch.int64, torch.float32, torch.bool]
    assert batch["b"][0].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert batch["c"].dtype == torch.float64
    assert batch["d"].shape == (3, 2, 2)


@pytest.mark.parametrize(
    ("items", "text"),
    [
        ([{"x": 1}, {"x": "a"}], r"(?s)item 1, item\['x'\].*number.*got: +str.*source\.map"),
        (
            [{"x": torch.zeros(2)}] * 2 + [{"x": torch.zeros(3)}],
            r"(?s)differ in shape.*item 2, item\['x'\].*float32\[2\].*as in item 0.*got: +float32\[3\]",
        ),
        (
            [{"x": torch.zeros(2)}, {"x": torch.zeros(2, dtype=torch.int64)}],
            r"(?s)differ in dtype.*item 1.*got: +int64\[2\]",
        ),
        ([{"x": 1}, {"y": 1}], r"(?s)differ in structure.*item 1.*item\['x'\], as in item 0.*got: +item\['y'\]"),
        ([(1, [2]), (1, [2, 3])], r"(?s)differ in shape.*item 1, item\[1\]"),
        ([{"x": [[1, 2], [3]]}], r"(?s)item 0, item\['x'\].*got: +a list"),
        ([{"x": np.array(["a"])}], r"(?s)item 0, item\['x'\].*<U1"),
        ([None, None], "hold nothing that could be collated"),
        ([object()], r"(?s)item 0, item.*got: +object"),
    ],
    ids=range(9),
)
def test_items_that_cannot_be_collated(items: list[Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        list(ft.data.source(items, batch_size=3))


def test_the_index_of_a_bad_item_is_that_of_the_data() -> None:
    items: list[Any] = [{"x": 1} for _ in range(20)]
    items[13] = {"x": "thirteen"}
    with pytest.raises(DataError, match=r"item 13, item\['x'\]"):
        list(ft.data.source(items, batch_size=4))
    with pytest.raises(ValueError, match="bad luck") as caught:
        list(ft.data.source(items).map(unlucky).batch(4))
    notes = "\n".join(caught.value.__notes__)
    assert "map(unlucky) at item 13" in notes
    assert "batch 3 of epoch 0" in notes
    own = ft.data.source(items, batch_size=4, collate=lambda found: {"x": len(found)})
    assert [batch["x"] for batch in own] == [4] * 5
    with pytest.raises(ZeroDivisionError) as failed:
        list(ft.data.source(items, batch_size=4, collate=lambda found: 1 // 0))
    assert "collate=<lambda> at batch 0" in failed.value.__notes__[0]


def unlucky(item: Any) -> Any:
    if item["x"] == "thirteen":
        raise ValueError("bad luck")
    return item


def test_an_item_that_raises_stop_iteration_does_not_end_the_epoch() -> None:
    def stop(item: Any) -> Any:
        raise StopIteration

    with pytest.raises(DataError, match=r"(?s)raised StopIteration.*batch 0 of epoch 0"):
        list(ft.data.source([1, 2]).map(stop).batch(2))


# -- reading --------------------------------------------------------------------------------------------------------------------------


def test_a_source_is_a_sequence() -> None:
    source = ft.data.source({"i": torch.arange(7)}, batch_size=3)
    assert len(source) == 3
    assert source[-1]["i"].tolist() == [6]
    assert values(source) == [[0, 1, 2], [3, 4, 5], [6]] == values(source)
    assert bool(ft.data.source(torch.arange(0)))
    assert repr(source.shuffle().take(2)) == "source(arrays(['i']: int64[7] on cpu).batch(3).shuffle().take(2))"
    with pytest.raises(IndexError, match="index -4"):
        source[-4]
    loader = DataLoader(source, batch_size=None, shuffle=True)  # so others can use it, too
    assert sorted(values(loader)) == values(source)


def test_seeking_asks_for_nothing_that_stands_before() -> None:
    data = Squares(8_000_000)
    source = ft.data.source(data).map(lambda item: item).batch(4)
    for start in (10, 1_000_000):
        data.asked.clear()
        next(source.epochs()(0, {"batch": start}))
        assert data.asked == [4 * start + k for k in range(4)]
    shuffled = ft.data.source(data, batch_size=4, shuffle=True, seed=0)
    data.asked.clear()
    next(shuffled.epochs()(0, {"batch": 1_000_000}))
    assert data.asked == [int(i) for i in ft.data.order.permutation(8_000_000, 0, 0)[4_000_000:4_000_004]]
    endless = ft.data.mix([ft.data.source(data).repeat(), ft.data.source(data).repeat()], [0.3, 0.7]).batch(4)
    data.asked.clear()
    next(endless.epochs()(0, {"batch": 10**12}))
    assert len(data.asked) == 4


def test_seeking_far_takes_no_longer_than_seeking_near() -> None:
    source = ft.data.source(torch.arange(4_000_000), batch_size=2, shuffle=True, seed=0).map(lambda x: x)
    far_data = ft.data.mix([source.repeat(), source.repeat()], [1, 2])

    def seconds(data: ft.data.Source, start: int) -> float:
        epochs = data.epochs()
        next(epochs(0, {"batch": start}))  # the tables of the epoch
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            next(epochs(0, {"batch": start}))
            times.append(time.perf_counter() - begin)
        return min(times)

    for data in (source, far_data):
        assert seconds(data, 1_000_000) < 3 * seconds(data, 10) + 1e-4


def test_facts_tell_sources_apart() -> None:
    def facts(source: ft.data.Source, seed: int = 0) -> dict[str, Any]:
        found = source.epochs(seed=seed).facts
        assert json.loads(json.dumps(found)) == found
        return found

    base = ft.data.source({"x": torch.arange(10)})
    one = facts(base.shuffle().batch(2))
    assert one == facts(base.shuffle().batch(2))
    assert {key: one[key] for key in ("kind", "samples", "batch_size", "shuffle", "seed", "batches")} == {
        "kind": "arrays",
        "samples": 10,
        "batch_size": 2,
        "shuffle": True,
        "seed": 0,
        "batches": 5,
    }
    others = [
        facts(base.batch(2)),
        facts(base.shuffle().batch(3)),
        facts(base.shuffle().batch(2), seed=1),
        facts(base.take(8).shuffle().batch(2)),
        facts(base.shuffle(seed=3).batch(2)),
        facts(base.shuffle().batch(2, last="drop")),
        facts(base.map(abs).shuffle().batch(2)),
        facts(base.shuffle().batch(2).map(abs, device=True)),
        facts(ft.data.chain([base, base]).batch(2)),
        facts(ft.data.zip([base, base]).batch(2)),
        facts(ft.data.curriculum(lambda epoch: base).batch(2)),
    ]
    assert all(one != other for other in others)
    assert len({json.dumps(other) for other in others}) == len(others)


def test_fit_loop_evaluate_and_predict_take_sources() -> None:
    case, step, state = setup("mlp")
    whole = case.batch(n=30)
    arrays = fit(state, step, whole, batch_size=8, epochs=2)
    source = ft.data.source(whole, batch_size=8, shuffle=True)
    sourced = fit(state, step, source, epochs=2)
    for a, b in zip(tree.leaves(arrays.state), tree.leaves(sourced.state), strict=True):
        assert torch.equal(a, b)
    unbatched = fit(state, step, ft.data.source(whole).shuffle(), batch_size=8, epochs=2)
    assert torch.equal(unbatched.state.step, sourced.state.step)
    assert same(unbatched.state, sourced.state)
    ticks = list(ft.loop(state, step, source, epochs=2))
    assert same(ticks[-1].state.params, sourced.state.params)
    windows = fit(state, step, ft.data.window(source, 2), epochs=1)
    assert windows.state.counters().step == 2
    metric = ft.eval_step(case.model(), lambda model, batch: {"mean": next(iter(batch.values())).float().mean()})
    got = ft.evaluate(state, metric, ft.data.source(whole, batch_size=8), compile=False)
    assert got["mean"] == pytest.approx(float(next(iter(whole.values())).float().mean()), rel=1e-5)
    with pytest.raises(DataError, match=r"(?s)ft.fit: the source gives single items.*batch\(64\)"):
        fit(state, step, ft.data.source(whole))
    with pytest.raises(ft.errors.LimitError, match="no length"):
        fit(state, step, source.repeat())
    assert fit(state, step, source.repeat(), steps=9).state.counters().step == 9


def test_code_of_the_user_draws_what_belongs_to_the_position(rng_guard: Any) -> None:
    source = ft.data.source(Noisy(12)).map(lambda item: {**item, "more": torch.randn(1)}).shuffle().batch(3)
    with rng_guard():
        whole = list(source.epochs(seed=1)(2))
    for start in range(4):
        random.random()
        torch.rand(1)
        reader = source.epochs(seed=1)(2, {"batch": start})
        assert all(same(a, b) for a, b in zip(reader, whole[start:], strict=True))
    assert not same(whole[0]["noise"], next(source.epochs(seed=1)(3))["noise"])
    assert not same(whole[0]["noise"], next(source.epochs(seed=2)(2))["noise"])


# -- workers --------------------------------------------------------------------------------------------------------------------------


def children() -> int:
    gc.collect()
    return len(multiprocessing.active_children())


def whose(batch: Any) -> Any:
    return {**batch, "pid": torch.tensor(os.getpid())}


def test_workers_live_from_the_first_epoch_to_the_last() -> None:
    source = ft.data.source(Noisy(12), batch_size=2, shuffle=True, seed=0, workers=2)
    here = source.load(workers=0)
    epochs = source.map(whose).epochs()
    pids = set()
    for epoch in range(3):
        found = list(epochs(epoch))
        pids |= {int(batch.pop("pid")) for batch in found}
        assert all(same(a, b) for a, b in zip(found, here.epochs()(epoch), strict=True))
        assert children() == 2
    assert len(pids) == 2
    assert os.getpid() not in pids
    epochs.close()
    assert children() == 0
    assert len(list(epochs(0))) == 6  # they can be used again
    epochs.close()


def test_workers_are_closed_on_every_exit() -> None:
    source = ft.data.source(Noisy(40), batch_size=2, workers=2)
    assert len(list(source)) == 20  # read to the end
    assert children() == 0
    reader = source.at()
    next(reader)
    assert children() == 2
    reader.close()
    assert children() == 0
    for _ in source:  # the consumer just stops
        break
    assert children() == 0
    epochs = source.epochs()
    reader = epochs(0)
    next(reader)
    reader.close()
    assert children() == 0
    reader = epochs(0)
    next(reader)
    beside = epochs(1)  # a second reader beside the first has workers of its own
    assert same(next(beside), next(source.load(workers=0).epochs()(1)))
    assert same(next(reader), list(source.load(workers=0))[1])
    del reader, beside, epochs
    assert children() == 0


@pytest.mark.parametrize("how", ["done", "limit", "raises", "evaluates"])
def test_workers_are_closed_at_the_end_of_a_run(how: str) -> None:
    case, step, state = setup("mlp")
    source = ft.data.source(case.batch(n=32), batch_size=4, shuffle=True, workers=1)

    def fails(state: Any, batch: Any) -> Any:
        raise ValueError("in the step")

    if how == "done":
        fit(state, step, source, epochs=2)
    elif how == "limit":
        fit(state, step, source, steps=3)
    elif how == "evaluates":
        metric = ft.eval_step(case.model(), lambda model, batch: {"one": torch.ones(())})
        assert ft.evaluate(state, metric, source, compile=False) == {"one": 1.0}
    else:
        with pytest.raises(ValueError, match="in the step") as caught:
            fit(state, fails, source)
        assert not multiprocessing.active_children()
        del caught
    assert children() == 0


class Broken(Squares):
    def __getitem__(self, i: int) -> dict[str, Any]:
        if i == 5:
            raise KeyError("no such sample")
        return super().__getitem__(i)


class Killed(Squares):
    def __getitem__(self, i: int) -> dict[str, Any]:
        if i == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


class Crashed(Squares):
    def __getitem__(self, i: int) -> dict[str, Any]:
        if i == 5:
            os._exit(3)
        return super().__getitem__(i)


class Slow(Squares):
    def __getitem__(self, i: int) -> dict[str, Any]:
        if i == 5:
            time.sleep(60)
        return super().__getitem__(i)


def test_what_fails_in_a_worker_says_where() -> None:
    source = ft.data.source(Broken(8), batch_size=2, workers=1)
    reader = source.epochs()(3)
    assert values(itertools.islice(reader, 2)) == [[0, 1], [2, 3]]
    with pytest.raises(DataError) as caught:
        next(reader)
    text = str(caught.value)
    for part in ("batch 2 of epoch 3", "KeyError: 'no such sample'", "Traceback", "__getitem__(5)", "in __getitem__"):
        assert part in text
    assert reader.place() == {"batch": 2}
    assert children() == 0
    with pytest.raises(DataError, match="batch 2 of epoch 3"):  # again, not the end of the data
        next(reader)
    with pytest.raises(KeyError, match="no such sample") as here:  # in this process: the error itself
        list(source.load(workers=0))
    assert "__getitem__(5)" in here.value.__notes__[0]
    ragged = ft.data.source([{"x": torch.zeros(1 + i // 3)} for i in range(6)], batch_size=2, workers=1)
    with pytest.raises(DataError, match=r"(?s)differ in shape.*item 3, item\['x'\].*batch 1 of epoch 0.*in a worker"):
        list(ragged)


@pytest.mark.parametrize(
    ("data", "said"), [(Killed(8), "killed by SIGKILL"), (Crashed(8), "ended with code 3")], ids=["killed", "crashed"]
)
def test_a_worker_that_dies_is_an_error(data: Any, said: str) -> None:
    reader = ft.data.source(data, batch_size=2).load(workers=1, prefetch=1).epochs()(1)
    got: list[Any] = []
    with pytest.raises(DataError, match=rf"(?s)worker died.*batch \d of epoch 1.*{said}") as caught:
        got.extend(reader)
    # a batch that a worker had sent may be lost with it, since the memory is shared through the worker
    assert f"batch {len(got)} of epoch 1" in str(caught.value)
    assert len(got) in (1, 2)
    assert reader.place() == {"batch": len(got)}
    assert children() == 0


def test_a_dead_worker_does_not_interrupt_what_the_main_thread_does() -> None:
    """torch's handler would raise in the middle of a step."""
    reader = ft.data.source(Killed(8), batch_size=2, workers=1).epochs()(1)
    next(reader)
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)  # a step
    assert not multiprocessing.active_children()
    with pytest.raises(DataError, match=r"(?s)batch \d of epoch 1.*one of 1 to 2.*killed by SIGKILL"):
        list(reader)


def test_a_worker_that_does_not_answer() -> None:
    reader = ft.data.source(Slow(8), batch_size=2).load(workers=1, timeout=1.5).epochs()(0)
    assert len(list(itertools.islice(reader, 2))) == 2
    with pytest.raises(DataError, match=r"(?s)did not answer.*batch 2 of epoch 0.*timed out"):
        next(reader)
    assert children() == 0


def test_a_batch_that_cannot_be_sent_is_an_error_and_no_hang() -> None:
    def local(items: list[Any]) -> Any:
        return {"x": torch.zeros(2), "f": lambda: None}

    def history(items: list[Any]) -> Any:
        return {"x": torch.zeros(2, requires_grad=True) * 2}

    with pytest.raises(DataError, match=r"(?s)cannot leave the worker.*pickled"):
        list(ft.data.source([1, 2], batch_size=2, collate=local, workers=1))
    with pytest.raises(DataError, match=r"(?s)history of gradients.*batch\['x'\]"):
        list(ft.data.source([1, 2], batch_size=2, collate=history, workers=1))


def test_workers_leave_interrupts_to_the_main_process() -> None:
    reader = ft.data.source(Noisy(40), batch_size=2, workers=1).epochs()(0)
    next(reader)
    for child in multiprocessing.active_children():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGUSR1)
    assert len(list(reader)) == 19
    reader.close()
    del reader
    assert children() == 0


# -- padding --------------------------------------------------------------------------------------------------------------------------


def masked_loss(model: Any, batch: Any) -> Any:
    logits = model(batch["x"])
    losses = F.cross_entropy(logits, batch["y"], reduction="none")
    mask = batch.get("mask")
    return ft.metrics.Mean.of(losses, mask), {"accuracy": ft.metrics.accuracy(logits, batch["y"], mask)}


def scalar_loss(model: Any, batch: Any) -> Any:
    losses = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
    mask = batch.get("mask", torch.ones(len(losses), dtype=torch.bool))
    mean = (losses * mask).sum() / mask.sum().clamp(min=1)
    return mean, {"scalar": mean * 2}


@pytest.fixture
def classes() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(13, 3, dtype=torch.float64), "y": torch.randint(0, 4, (13,))}


def test_padded_batches_have_one_shape_and_a_mask(classes: dict[str, torch.Tensor]) -> None:
    for data in (classes, [{"x": classes["x"][i], "y": classes["y"][i]} for i in range(13)]):
        batches = list(ft.data.source(data, batch_size=5, last="pad"))
        assert [batch["mask"].tolist() for batch in batches] == [[True] * 5, [True] * 5, [True] * 3 + [False] * 2]
        assert len({tuple(batch["x"].shape) for batch in batches}) == 1
        assert torch.equal(batches[2]["x"], classes["x"][[10, 11, 12, 10, 10]])
    assert ft.data.source(classes, batch_size=5, last="pad").epochs().sizes == (5,)
    with pytest.raises(DataError, match=r"(?s)adds an entry \"mask\".*batch 0.*got: +float32\[2\].*source.map"):
        list(ft.data.source(torch.zeros(3), batch_size=2, last="pad"))
    with pytest.raises(DataError, match=r"(?s)got: +a dict with 'mask'"):
        list(ft.data.source({"mask": torch.zeros(3)}, batch_size=2, last="pad"))


@pytest.mark.parametrize("loss_fn", [masked_loss, scalar_loss])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_padding_counts_for_nothing_in_gradients_and_metrics(classes: Any, loss_fn: Any, accumulate: int) -> None:
    model = torch.nn.Linear(3, 4, dtype=torch.float64)
    state = ft.init(model, ft.optim.sgd(0.1))
    grad = ft.with_accumulation(ft.value_and_grad(ft.bind(model, loss_fn)), accumulate)
    few = {name: leaf[:3] for name, leaf in classes.items()}
    padded = ft.data.source(few, batch_size=8, last="pad")[0]
    key = ft.rng.key(0)
    whole, loss, (metrics, _) = ft.value_and_grad(ft.bind(model, loss_fn))(state.params, state.buffers, few, key)
    got, own, (found, _) = grad(state.params, state.buffers, padded, key)
    assert any(g.abs().max() > 1e-3 for g in whole.values())
    for name in whole:
        torch.testing.assert_close(got[name], whole[name], rtol=1e-12, atol=1e-12)
    assert float(own.weight) == float(loss.weight) == 3.0
    torch.testing.assert_close(own.compute(), loss.compute())
    for name, metric in metrics.items():
        torch.testing.assert_close(found[name].compute(), metric.compute())
        assert float(found[name].weight) == float(metric.weight) == 3.0


@pytest.mark.parametrize("loss_fn", [masked_loss, scalar_loss])
def test_a_padded_evaluation_is_exact(classes: Any, loss_fn: Any) -> None:
    model = torch.nn.Linear(3, 4, dtype=torch.float64)
    state = ft.init(model, ft.optim.sgd(0.1))

    def metric_fn(model: Any, batch: Any) -> Any:
        loss, metrics = loss_fn(model, batch)
        return {"loss": loss, **metrics}

    step = ft.eval_step(model, metric_fn)
    whole = ft.evaluate(state, step, [classes], compile=False)
    for size in (2, 5, 20):
        padded = ft.data.source(classes, batch_size=size, last="pad")
        assert ft.evaluate(state, step, padded, compile=False) == pytest.approx(whole, rel=1e-6)


def test_training_on_padded_batches_is_training_on_short_ones(classes: Any) -> None:
    model = torch.nn.Linear(3, 4, dtype=torch.float64)
    step = ft.train_step(model, scalar_loss, ft.optim.sgd(0.5))
    state = ft.init(model, ft.optim.sgd(0.5))
    ends = [
        fit(
            state,
            step,
            ft.data.source(classes, batch_size=5, shuffle=True, last=last),
            epochs=3,
            log=ft.every(epochs=1),
        )
        for last in ("keep", "pad")
    ]
    for name, moved in ends[0].state.params.items():
        assert (moved - state.params[name]).abs().max() > 1e-2
        torch.testing.assert_close(ends[1].state.params[name], moved, rtol=1e-12, atol=1e-12)
    for name in ("loss", "scalar"):
        assert list(ends[1].history[name]) == pytest.approx(list(ends[0].history[name]), rel=1e-6)


def test_a_mask_of_another_kind_is_no_weight() -> None:
    x = torch.zeros(4, 2)
    assert padding({"x": x, "mask": torch.ones(4)}) is None
    assert padding({"x": x, "mask": torch.ones(4, 2, dtype=torch.bool)}) is None
    assert padding({"x": x, "mask": torch.ones(3, dtype=torch.bool)}) is None
    assert padding((x, torch.ones(4, dtype=torch.bool))) is None
    assert padding({"x": x, "mask": torch.ones(4, dtype=torch.bool)}) is not None


def test_the_weight_of_padding_is_traced(classes: Any) -> None:
    """One graph for all batches of a padded epoch, with and without padding in them."""
    model = torch.nn.Linear(3, 4, dtype=torch.float64)
    step = ft.train_step(model, scalar_loss, ft.optim.sgd(0.5), accumulate=2)
    state = ft.init(model, ft.optim.sgd(0.5))
    data = ft.data.source(classes, batch_size=4, shuffle=True, last="pad")
    compiled = ft.compile(step, rung="step", backend="eager")
    ends = [fit(state, one, data, epochs=2).state for one in (step, compiled)]
    assert same(ends[0].params, ends[1].params)
    ft.testing.check_recompiles(step, state, list(data), backend="eager")
