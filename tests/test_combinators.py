"""Combinators of sources: any chain of them, stopped anywhere and sought by another object, gives the same remaining batches."""

from __future__ import annotations

import collections
import itertools
import multiprocessing
import pickle
import random
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

import ftrain as ft
from ftrain import tree
from ftrain.data.mixing import Mixed, length
from ftrain.errors import ArgumentError, DataError

# -- chains ---------------------------------------------------------------------------------------------------------------------------


class Noisy:
    """A map-style dataset whose items draw from all three global generators."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < self.n:
            raise IndexError(i)
        noise = torch.stack([torch.randn(()), torch.tensor(np.random.randn()).float(), torch.tensor(random.random())])
        return {"i": i, "noise": noise}


def arrays(n: int) -> ft.data.Source:
    return ft.data.source({"i": torch.arange(n), "noise": torch.linspace(0, 1, 3 * n).reshape(n, 3)})


def listed(n: int) -> ft.data.Source:
    return ft.data.source([{"i": i, "noise": np.full(3, i / 7, dtype=np.float32)} for i in range(n)])


def noisy(n: int) -> ft.data.Source:
    return ft.data.source(Noisy(n))


def plus(item: Any) -> Any:
    return {**item, "noise": item["noise"] + 1}


def jitter(item: Any, rng: np.random.Generator) -> Any:
    return {**item, "noise": torch.as_tensor(item["noise"]) * rng.random()}


def dropout(item: Any) -> Any:
    return {**item, "noise": torch.as_tensor(item["noise"]) * random.random() + np.random.randn() + torch.randn(3)}


def not_third(item: Any) -> bool:
    return bool(torch.as_tensor(item["i"]).reshape(-1)[0] % 3 != 0)


def lively(item: Any) -> bool:
    return bool(torch.as_tensor(item["noise"]).reshape(-1)[0] < 0.9)


class Growing:
    def __init__(self, source: ft.data.Source) -> None:
        self.source = source

    def __call__(self, epoch: int) -> ft.data.Source:
        return self.source.take(3 + 2 * epoch)


def raw(kind: int, n: int) -> ft.data.Source:
    return (arrays, listed, noisy)[kind](n)


Step = tuple[Any, ...]


def apply(source: ft.data.Source, step: Step) -> ft.data.Source:
    name, *args = step
    if name in ("map", "filter", "take", "skip", "repeat", "shuffle", "shard", "cache"):
        found: ft.data.Source = getattr(source, name)(*args)
        return found
    if name == "mix":
        kind, n, weights, end = args
        return ft.data.mix([source, raw(kind, n).shuffle()], weights, end=end)
    if name == "pack":
        length, pad = args
        return source.map(document).pack(length, separator=9999, parts=True, pad=pad).map(row)
    if name.startswith("zip"):
        pairs: ft.data.Source = getattr(ft.data, name)({"a": source, "b": raw(*args).shuffle()})
        return pairs.map(either)
    return {
        "endless": lambda n: source.repeat().take(n),
        "curriculum": lambda: ft.data.curriculum(Growing(source)),
        "chain": lambda kind, n: ft.data.chain([source, raw(kind, n)]),
    }[name](*args)


def first(item: Any) -> Any:
    return {**item["a"], "noise": torch.as_tensor(item["a"]["noise"]) + 10 * float(item["b"]["i"])}


def either(item: Any) -> Any:
    """Of two that may be None, where the other is longer."""
    if item["b"] is None:
        return item["a"]
    return item["b"] if item["a"] is None else first(item)


def document(item: Any) -> torch.Tensor:
    """As many tokens as the item's number says, none too; the same whatever is drawn."""
    return torch.arange(int(item["i"]) % 4) + 10 * int(item["i"])


def row(item: Any) -> Any:
    """A row of tokens as an item that can be chained on, with all that was packed in its three numbers."""
    sums = [(part.double() * torch.arange(1, len(part) + 1)).sum() for part in item.values()]
    return {"i": int(item["tokens"][0]) % 23, "noise": torch.stack(sums).float() / 1e4}


FNS = st.sampled_from([plus, jitter, dropout])
RAW = (st.integers(0, 2), st.integers(1, 9))
STEP = st.one_of(
    st.tuples(st.just("map"), FNS),
    st.tuples(st.just("filter"), st.sampled_from([not_third, lively])),
    st.tuples(st.sampled_from(["take", "skip"]), st.one_of(st.integers(1, 9), st.sampled_from([0.25, 0.5, 0.7]))),
    st.tuples(st.just("repeat"), st.integers(1, 3)),
    st.tuples(st.just("endless"), st.integers(1, 30)),
    st.tuples(st.just("shuffle"), st.sampled_from([None, 3])),
    st.tuples(st.just("shard"), st.integers(0, 1), st.just(2)),
    st.just(("cache",)),
    st.just(("curriculum",)),
    st.tuples(st.sampled_from(["chain", "zip_cycle", "zip_shortest"]), *RAW),
    st.tuples(st.just("zip_longest"), *RAW),
    st.tuples(st.just("pack"), st.integers(1, 6), st.sampled_from([None, 7])),
    st.tuples(st.just("mix"), *RAW, st.sampled_from([None, (1, 3)]), st.sampled_from(["first", "all"])),
)
OVER_BATCHES = st.one_of(
    st.tuples(st.sampled_from(["take", "skip"]), st.integers(1, 3)),
    st.tuples(st.just("shuffle"), st.none()),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("shard"), st.just(0), st.just(2)),
    st.tuples(st.just("map"), FNS.filter(lambda fn: fn is not dropout)),
    st.tuples(st.just("filter"), st.just(not_third)),
)
ON_DEVICE = st.lists(st.sampled_from(["noise", "careless"]), max_size=2)
AFTER_DEVICE = st.one_of(
    st.tuples(st.sampled_from(["take", "skip"]), st.integers(1, 3)),
    st.tuples(st.just("shuffle"), st.none()),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
)


class Plan:
    """A chain as data, so that it can be built again from nothing."""

    def __init__(self, kind: int, n: int, steps: list[Step], batch: tuple[int, str], over: list[Step]) -> None:
        self.kind, self.n, self.steps, self.batch, self.over = kind, n, steps, batch, over

    def __repr__(self) -> str:
        return f"Plan({self.kind}, {self.n}, {self.steps}, {self.batch}, {self.over})"

    def build(self) -> ft.data.Source:
        found = raw(self.kind, self.n)
        for step in self.steps:
            found = apply(found, step)
        found = found.batch(*self.batch)
        for step in self.over:
            found = apply(found, step)
        return found


PLANS = st.builds(
    Plan,
    st.integers(0, 2),
    st.integers(1, 24),
    st.lists(STEP, max_size=4),
    st.tuples(st.integers(1, 4), st.sampled_from(["keep", "drop", "pad"])),
    st.lists(OVER_BATCHES, max_size=2),
)
MOST = 8
SENSELESS = re.compile(
    "no items|no batches|shorter than one batch|differ from epoch to epoch|changes from epoch to epoch"
)


def built(plan: Plan) -> ft.data.Source:
    """The chain, where it makes sense; some of the random ones must not."""
    try:
        source = plan.build()
        epochs = source.epochs(seed=1)
        for epoch in range(4):  # a filter, a curriculum may leave less than one batch
            epochs(epoch)
    except DataError as error:
        if not SENSELESS.search(str(error)):
            raise
        assume(False)
    return source


def read(source: ft.data.Source, epoch: int, start: int = 0, seed: int = 1) -> list[Any]:
    epochs = source.epochs(seed=seed)
    reader = epochs(epoch, {"batch": start})
    try:
        return list(itertools.islice(reader, MOST - start))
    finally:
        reader.close()
        epochs.close()


def same(a: Any, b: Any) -> bool:
    if not tree.same_structure(a, b):
        return False
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert same(a, b), f"{a}\n{b}"


MANY = settings(max_examples=300, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
FEW = settings(max_examples=8, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])


@MANY
@given(PLANS, st.integers(0, 2), st.integers(0, MOST - 1))
def test_what_is_left_is_the_same_wherever_reading_begins(plan: Plan, epoch: int, start: int) -> None:
    whole = read(built(plan), epoch)
    assert_same(read(plan.build(), epoch, start), whole[start:])
    # an object that has read other things before, in another order
    used = plan.build()
    read(used, epoch + 1)
    assert_same(read(used, epoch, start), whole[start:])
    assert_same(read(used, epoch), whole)


@settings(max_examples=60, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(PLANS, ON_DEVICE, st.lists(AFTER_DEVICE, max_size=2), st.integers(0, 2), st.integers(0, MOST - 1))
def test_what_functions_on_the_device_draw_is_sought_too(
    plan: Plan, functions: list[str], over: list[Step], epoch: int, start: int
) -> None:
    def make() -> ft.data.Source:
        found = built(plan)
        for name in functions:
            found = found.map({"noise": noise, "careless": careless}[name], device=True)
        for step in over:
            found = apply(found, step)
        return found

    whole = list(itertools.islice(make().at(epoch=epoch, seed=1), MOST))
    rest = list(itertools.islice(make().at(epoch=epoch, seed=1, start=start), max(0, MOST - start)))
    assert_same(rest, whole[start:])
    if functions and len(whole) > 1 and not over:  # they did something, and another thing to each batch
        bare = list(itertools.islice(built(plan).at(epoch=epoch, seed=1), MOST))
        shifts = [(a["noise"] - b["noise"]).flatten()[0].item() for a, b in zip(whole, bare, strict=True)]
        assert len(set(shifts)) == len(shifts)
        assert all(shifts)


@MANY
@given(PLANS, st.integers(0, 2))
def test_a_length_is_how_many_there_are(plan: Plan, epoch: int) -> None:
    source = built(plan)
    epochs = source.epochs(seed=1)
    count = sum(1 for _ in epochs(epoch))
    if epochs.length is not None:
        assert count == epochs.length
    else:
        with pytest.raises(ArgumentError, match="no length"):
            len(source)
    if epochs.sizes is not None:
        assert {len(batch["noise"]) for batch in epochs(epoch)} <= set(epochs.sizes)


@FEW
@given(PLANS, st.integers(0, 2), st.integers(0, 4))
def test_a_pickle_gives_the_same(plan: Plan, epoch: int, start: int) -> None:
    source = built(plan)
    whole = read(source, epoch)
    assert_same(read(pickle.loads(pickle.dumps(source)), epoch, start), whole[start:])


@settings(max_examples=6, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(PLANS, st.integers(0, 2), st.integers(0, 4))
def test_workers_give_the_same(plan: Plan, epoch: int, start: int) -> None:
    source = built(plan)
    assert_same(read(source.load(workers=2), epoch, start), read(source, epoch)[start:])


SPAWNED = """
import torch

import ftrain as ft


def jitter(item):
    return {"i": item["i"], "noise": torch.randn(3)}


def lively(item):
    return torch.rand(()) > 0.3


class Noisy:
    def __len__(self):
        return 7

    def __getitem__(self, i):
        return {"i": i, "noise": torch.randn(())}


def read(source):
    return list(source.epochs(seed=3)(1, {"batch": 1}))


if __name__ == "__main__":
    source = ft.data.source(Noisy()).map(jitter).shuffle().filter(lively).map(jitter).batch(2)
    alone, spawned = read(source), read(source.load(workers=1, context="spawn"))
    assert alone and len(alone) == len(spawned)
    assert all(torch.equal(one[key], two[key]) for one, two in zip(alone, spawned, strict=True) for key in ("i", "noise"))
    print("the same")
"""


def test_spawned_workers_give_the_same(tmp_path: Path) -> None:
    # A script of its own, as a user has it: what is spawned imports its main module, and a suite of tests need not be importable.
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "the same\n"), done.stderr


@FEW
@given(PLANS)
def test_the_generators_of_the_user_are_left_alone(plan: Plan) -> None:
    source = built(plan)
    np.random.randn()  # leaves half of a pair behind, which is a part of the state
    before = (torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate())
    read(source, 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state(legacy=False)) == str(before[1])
    assert random.getstate() == before[2]


@given(st.integers(1, 20), st.integers(1, 5), st.integers(0, 3), st.lists(st.integers(0, 20), min_size=3, max_size=3))
def test_three_stops_in_an_epoch_read_each_sample_once(n: int, size: int, epoch: int, stops: list[int]) -> None:
    place = {"batch": 0}
    seen: list[int] = []
    for stop in [*sorted(stops), None]:
        reader = noisy(n).map(dropout).shuffle().batch(size).epochs(seed=5)(epoch, place)
        for batch in reader if stop is None else itertools.islice(reader, max(0, stop - place["batch"])):
            seen.extend(batch["i"].tolist())
        place = reader.place()
    assert sorted(seen) == list(range(n))


# -- each combinator ------------------------------------------------------------------------------------------------------------------


def ints(source: ft.data.Source, **where: int) -> list[int]:
    return [int(one) for one in source.at(**where)]


def count(n: int) -> ft.data.Source:
    return ft.data.source(torch.arange(n))


def test_orders_differ_between_epochs_seeds_and_places() -> None:
    orders = [ints(count(50).shuffle(), epoch=e, seed=s) for e in range(3) for s in range(3)]
    orders += [ints(count(50).shuffle(seed=9), epoch=e) for e in range(3)]
    orders += [ints(count(50).shuffle().shuffle())]
    pairs = ft.data.zip((count(50).shuffle(), count(50).shuffle()))
    orders += [[int(item[k]) for item in pairs] for k in (0, 1)]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_a_seed_of_its_own_beats_the_one_of_the_run() -> None:
    fixed = ft.data.source(torch.arange(20), batch_size=5, shuffle=True, seed=3).map(lambda x, rng: x + rng.random())
    assert_same(read(fixed, 0, seed=1), read(fixed, 0, seed=2))
    assert not same(read(fixed, 0)[0], read(fixed, 1)[0])
    both = ft.data.zip((ft.data.source(count(9), seed=4).shuffle(), ft.data.source(count(9), seed=4).shuffle()))
    assert all(int(a) == int(b) for a, b in both)  # asked for
    again = ft.data.source(ft.data.source(torch.arange(20), shuffle=True, seed=3), seed=7, batch_size=5)
    assert [int(x) for batch in again for x in batch] == ints(ft.data.source(torch.arange(20), shuffle=True, seed=3))


def test_functions_of_one_chain_draw_independent_numbers() -> None:
    def draw(item: Any, rng: np.random.Generator) -> list[float]:
        return [*item, rng.random()]

    data = ft.data.source([[] for _ in range(6)]).map(draw).map(draw)
    numbers = [x for e in range(2) for item in data.at(epoch=e) for x in item]
    assert len(set(numbers)) == len(numbers) == 24
    # the order of a shuffle is that without them
    mapped = count(30).map(lambda x, rng: x).shuffle()
    assert ints(mapped) == ints(count(30).shuffle())


def test_repeat_is_several_epochs() -> None:
    data = count(6).shuffle()
    assert ints(data.repeat(2), epoch=3) == ints(data, epoch=6) + ints(data, epoch=7)
    endless = data.repeat()
    assert list(itertools.islice((int(x) for x in endless.at(start=6)), 6)) == ints(data, epoch=1)
    far = next(endless.at(start=6 * 10**9 + 2))
    assert int(far) == ints(data, epoch=10**9)[2]
    growing = ft.data.curriculum(Growing(data))
    assert ints(growing.repeat(2)) == ints(growing, epoch=0) + ints(growing, epoch=1)


def test_take_and_skip_share_out_all_items() -> None:
    for n in (1, 7, 10, 33):
        for fraction in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
            assert ints(count(n).take(fraction)) + ints(count(n).skip(fraction)) == list(range(n))
    assert ints(count(3).take(9)) == [0, 1, 2]
    assert ints(count(3).skip(9)) == []
    assert len(count(10).take(0.7)) == 7  # 0.7 * 10 is less than 7


def test_shards_share_out_the_order() -> None:
    data = count(11).shuffle()
    parts = [ints(data.shard(i, 3), epoch=1) for i in range(3)]
    assert [len(part) for part in parts] == [4, 4, 3]
    woven = [x for row in itertools.zip_longest(*parts) for x in row if x is not None]
    assert woven == ints(data, epoch=1)


def test_a_filter_scans_once_where_items_do_not_depend_on_the_epoch() -> None:
    calls = collections.Counter[int]()

    def even(x: Any) -> bool:
        calls[int(x)] += 1
        return int(x) % 2 == 0

    data = count(10).shuffle().filter(even)
    for e in range(3):
        kept = ints(data, epoch=e)
        assert kept == [x for x in ints(count(10).shuffle(), epoch=e) if x % 2 == 0]
    assert len(data) == 5
    assert set(calls.values()) == {1}
    random_items = ft.data.source(torch.zeros(40)).map(lambda x, rng: x + rng.random()).filter(lambda x: bool(x < 0.5))
    sizes = [len(list(random_items.at(epoch=e))) for e in range(4)]
    assert len(set(sizes)) > 1
    assert all(float(x) < 0.5 for x in random_items.at(epoch=2))
    with pytest.raises(ArgumentError, match="its length changes from epoch to epoch"):
        len(random_items)


def test_a_cache_asks_once_and_hands_out_copies() -> None:
    calls: list[int] = []

    def made(x: Any) -> Any:
        calls.append(int(x))
        return {"x": torch.rand(2) + x}

    def spoil(item: Any) -> Any:
        item["x"].add_(100)
        return item

    data = count(5).map(made).cache()
    whole = [item["x"] for item in data.map(spoil).at(epoch=4)]
    assert calls == [0, 1, 2, 3, 4]
    assert all(torch.equal(a, b["x"]) for a, b in zip(whole, data.map(spoil), strict=True))
    assert calls == [0, 1, 2, 3, 4]
    other = count(5).map(made).cache().map(spoil)  # another process, that begins elsewhere
    assert torch.equal(other[3]["x"], whole[3])


def test_zips() -> None:
    a, b = count(2), count(5)
    with pytest.raises(
        DataError, match=r"(?s)differ in length.*\['a'\]: 2, .*\['b'\]: 5.*zip_shortest.*zip_longest.*zip_cycle"
    ):
        ft.data.zip({"a": a, "b": b})
    assert [tuple(map(int, item)) for item in ft.data.zip((b, b))] == [(i, i) for i in range(5)]
    assert [tuple(map(int, item)) for item in ft.data.zip_shortest((a, b))] == [(0, 0), (1, 1)]
    longest = [tuple(None if x is None else int(x) for x in item) for item in ft.data.zip_longest((a, b))]
    assert longest == [(0, 0), (1, 1), (None, 2), (None, 3), (None, 4)]
    cycle = ft.data.zip_cycle({"small": a.shuffle(), "large": {"deep": b}})
    found = [int(item["small"]) for item in cycle]
    assert [sorted(found[:2]), sorted(found[2:4])] == [[0, 1], [0, 1]]
    assert [int(item["large"]["deep"]) for item in cycle] == [0, 1, 2, 3, 4]
    batches = ft.data.zip({"a": b.batch(2), "b": b.batch(2)})
    assert batches.batched
    assert [x.tolist() for x in batches[2].values()] == [[4], [4]]
    endless = ft.data.zip_cycle((a, b.repeat()))
    assert [int(x) for x in next(endless.at(start=101))] == [1, 1]
    assert len(ft.data.zip_shortest((a.repeat(), b))) == 5


def test_a_chain_goes_on() -> None:
    data = ft.data.chain([count(2), count(0), count(3).shuffle(seed=1), count(2).repeat()])
    assert [int(x) for x in itertools.islice(data, 9)] == [0, 1, *ints(count(3).shuffle(seed=1)), 0, 1, 0, 1]
    both = ft.data.chain([arrays(3), listed(2)]).batch(4)
    assert both[0]["i"].tolist() == [0, 1, 2, 0]
    with pytest.raises(DataError, match=r"(?s)not the last one is endless.*sources\[0\]"):
        ft.data.chain([count(2).repeat(), count(3)])


def test_a_mixture_holds_its_shares() -> None:
    sources = [ft.data.source(torch.full((n,), k)) for k, n in enumerate((500, 4000, 90))]
    data = ft.data.mix([one.repeat() for one in sources], [5, 3, 2])
    for epoch in range(2):
        found = torch.stack(list(itertools.islice(data.at(epoch=epoch), 256 * 4)))
        for block in found.split(256):
            for k, share in enumerate((0.5, 0.3, 0.2)):
                assert abs(int((block == k).sum()) - share * 256) < 2
    assert not torch.equal(*(torch.stack(list(itertools.islice(data.at(epoch=e), 256))) for e in range(2)))
    far = 10**15 + 37
    assert torch.equal(next(data.at(start=far)), next(iter(data.at(start=far))))


def test_a_mixture_without_weights_reads_each_item_once() -> None:
    data = ft.data.mix([count(300), count(41).map(lambda x: x + 300).shuffle(), count(9).map(lambda x: x + 341)])
    orders = [ints(data, epoch=e) for e in range(2)]
    assert all(sorted(order) == list(range(350)) for order in orders)
    assert orders[0] != orders[1]
    assert [x for x in orders[0] if x < 300] == list(range(300))  # each source in its own order


def test_ends_of_a_mixture() -> None:
    a, b = count(10), count(4).map(lambda x: x + 100)
    found = collections.Counter(ints(ft.data.mix([a, b], [1, 1])))
    assert max(found.values()) == 1
    assert sum(x >= 100 for x in found) == 4
    whole = collections.Counter(ints(ft.data.mix([a, b], [1, 1], end="all")))
    assert set(whole) == {*range(10), *range(100, 104)}
    assert all(whole[x] == 1 for x in range(10))
    endless = ft.data.mix([a, b], [1, 1], end="never")
    assert [int(x) for x in itertools.islice(endless.at(start=10**6), 20)]
    with pytest.raises(ArgumentError, match="it is endless"):
        len(endless)


@given(
    st.lists(st.tuples(st.integers(1, 700), st.integers(1, 60)), min_size=1, max_size=4),
    st.sampled_from(["first", "all"]),
    st.integers(0, 2),
)
def test_the_counts_of_a_mixture(inputs: list[tuple[int, int]], end: Any, epoch: int) -> None:
    total = sum(w for _, w in inputs)
    weights = [Fraction(w, total) for _, w in inputs]
    sizes = [n for n, _ in inputs]
    needed = int(length(sizes, weights, end))
    nodes = [count(n).repeat().node for n in sizes]
    node = Mixed(nodes, sizes, weights, None, end)
    at = ft.data.node.At(3, epoch)
    seen = [collections.Counter[int]() for _ in inputs]
    for place, (source, _, indices, places) in enumerate(node.route(at, range(needed))):
        del place
        assert len(indices) == len(places)
        seen[nodes.index(source)].update(int(i) for i in indices)
    for own, counted in zip(seen, node.counts(needed), strict=True):
        assert sorted(own) == list(range(counted))  # each once, from the first on
        assert set(own.values()) <= {1}
    totals = [sum(own.values()) for own in seen]
    if end == "first":
        assert all(got <= n for got, n in zip(totals, sizes, strict=True))
        assert any(got > n for got, n in zip(node.counts(needed + 1), sizes, strict=True))
    else:
        assert all(got >= n for got, n in zip(totals, sizes, strict=True))


def test_a_curriculum_is_another_source_in_each_epoch() -> None:
    data = ft.data.curriculum(lambda epoch: count(4 if epoch < 2 else 8).shuffle()).batch(2)
    assert [sum(1 for _ in data.epochs(seed=0)(e)) for e in range(4)] == [2, 2, 4, 4]
    assert data.epochs().length is None
    with pytest.raises(DataError, match=r"(?s)gave for epoch 0 is no source.*got: +int"):
        ft.data.curriculum(lambda epoch: 3)
    wrong = ft.data.curriculum(lambda epoch: count(4) if epoch == 0 else [1])
    with pytest.raises(DataError, match="gave for epoch 1 is no source"):
        list(wrong.at(epoch=1))


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=12),
    st.integers(1, 7),
    st.integers(0, 7),
    st.integers(0, 2),
    st.integers(0, 12),
)
def test_packing_loses_nothing(sizes: list[int], width: int, flags: int, epoch: int, start: int) -> None:
    ends, pad, shuffled = bool(flags & 1), bool(flags & 2), bool(flags & 4)
    documents = [[100 * d + k for k in range(n)] for d, n in enumerate(sizes)]
    source = ft.data.source(documents)
    source = source.shuffle() if shuffled else source
    order = list(source.at(epoch=epoch))
    flat, places, numbers = [], [], []
    for d, document in enumerate(order):
        own = [*document, 9999] if ends else document
        flat += own
        places += range(len(own))
        numbers += [d] * len(own)
    rows = source.pack(width, separator=9999 if ends else None, parts=True, pad=-1 if pad else None)
    found = list(rows.at(epoch=epoch))
    whole = len(flat) if pad else len(flat) // width * width
    tokens = [int(x) for row in found for x in row["tokens"]]
    assert tokens[:whole] == flat[:whole]
    assert set(tokens[whole:]) <= {-1}
    assert all(len(row["tokens"]) == width for row in found)
    assert [int(x) for row in found for x in row["positions"]][:whole] == places[:whole]
    for r, row in enumerate(found):
        true = numbers[r * width : (r + 1) * width]
        relabelled = {d: k for k, d in enumerate(dict.fromkeys(true))}
        assert row["segments"].tolist() == [relabelled[d] for d in true] + [-1] * (width - len(true))
    plain = source.pack(width, separator=9999 if ends else None, pad=-1 if pad else None)
    assert all(torch.equal(a, b["tokens"]) for a, b in zip(plain.at(epoch=epoch), found, strict=True))
    # sought, by an object that has measured nothing yet
    fresh = ft.data.source(documents)
    fresh = fresh.shuffle() if shuffled else fresh
    fresh = fresh.pack(width, separator=9999 if ends else None, parts=True, pad=-1 if pad else None)
    rest = list(fresh.at(epoch=epoch, start=min(start, len(found))))
    assert_same(rest, found[start:])


def test_packing_says_what_is_no_document() -> None:
    with pytest.raises(DataError, match=r"(?s)item 1.*1-d array.*got: +float32\[2, 2\]"):
        list(ft.data.source([torch.arange(3), torch.zeros(2, 2)]).pack(2))
    with pytest.raises(DataError, match=r"(?s)item 0.*under 'ids'.*a dict with 'tokens'"):
        list(ft.data.source([{"tokens": [1, 2]}]).pack(2, key="ids"))
    data = ft.data.source([{"tokens": [1, 2]}, {"tokens": [3]}]).pack(3, key="tokens")
    assert [row.tolist() for row in data] == [[1, 2, 3]]
    changing = ft.data.source([0, 1]).map(lambda _: [1] * (1 + np.random.randint(1 << 30) % 97)).pack(2)
    with pytest.raises(DataError, match="another length than when the documents were measured"):
        list(changing)


# -- on the device --------------------------------------------------------------------------------------------------------------------


def noise(batch: Any, rng: torch.Tensor) -> Any:
    return {**batch, "noise": batch["noise"] + ft.rng.normal(rng, batch["noise"].shape)}


def careless(batch: Any) -> Any:
    return {**batch, "noise": batch["noise"] + torch.rand(()) + random.random() + np.random.rand()}


def test_device_maps_are_the_finish_of_the_epochs() -> None:
    data = arrays(10).batch(3).map(noise, device=True).map(careless, device=True)
    epochs = data.epochs(seed=4)
    found = [epochs.finish(batch, 2, i) for i, batch in enumerate(epochs(2))]
    assert not same(found[0], next(epochs(2)))
    random.random()
    assert same(epochs.finish(next(epochs(2, {"batch": 2})), 2, 2), found[2])
    assert_same(list(data.at(epoch=2, seed=4)), found)
    assert_same(list(data.at(epoch=2, seed=4, start=1, device="cpu")), found[1:])
    # and in a run
    seen = []

    def step(state: ft.TrainState, batch: Any) -> Any:
        seen.append(batch)
        return state.advance(3), {}

    state = ft.init(torch.nn.Linear(1, 1), ft.optim.sgd(0.1), seed=4)
    ft.fit(state, step, data, epochs=3, progress=False, compile=False)
    assert_same(seen[8:], found)
    assert_same(
        list(itertools.islice(data.take(2).repeat(2).at(seed=4), 2)),
        [data.at(seed=4).__next__(), list(data.at(seed=4))[1]],
    )


def test_what_may_stand_after_a_device_map() -> None:
    data = arrays(10).batch(3).map(noise, device=True)
    assert len(data.skip(1).shuffle().take(2).repeat(2).shard(0, 2)) == 2
    assert_same(list(data.cache()), list(data))
    for use in (
        lambda: data.map(plus),
        lambda: data.filter(not_third),
        lambda: data.batch(2),
    ):
        with pytest.raises(DataError, match=r"after a function that runs on the device|has batches already"):
            use()
    with pytest.raises(DataError, match="device=True is for batches"):
        arrays(3).map(noise, device=True)
    with pytest.raises(DataError, match=r"(?s)device stands before several sources become one.*input 1"):
        ft.data.chain([arrays(3).batch(3), data])


# -- bad input ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "error", "text"),
    [
        (lambda s: s.map(3), ArgumentError, "this is no function"),
        (lambda s: s.map(lambda a, b, c: a), ArgumentError, r"(?s)other arguments.*fn\(item, rng\)"),
        (lambda s: s.filter(lambda a, rng: True), ArgumentError, r"fn\(item\) -> bool"),
        (lambda s: list(s.filter(lambda a: "yes")), DataError, r"(?s)gave no answer.*item 0.*'yes'"),
        (lambda s: list(s.filter(lambda a: torch.ones(3))), DataError, r"array of shape \[3\]"),
        (lambda s: s.batch(0), DataError, r"(?s)n=0 makes no sense.*integer >= 1"),
        (lambda s: s.batch(2.0), ArgumentError, "n=2.0 makes no sense"),
        (lambda s: s.batch(True), ArgumentError, "n=True makes no sense"),
        (lambda s: s.batch(2, "throw"), DataError, r"(?s)no last='throw'.*'keep', 'drop', 'pad'"),
        (lambda s: s.batch(2, collate=3), ArgumentError, "collate= is no function"),
        (lambda s: s.batch(2).batch(2), DataError, r"(?s)has batches already.*ft.data.window"),
        (lambda s: len(s.batch(6, "drop")), DataError, r"(?s)shorter than one batch.*at least 6.*got: +5.*batch\(5"),
        (lambda s: s.batch(6, "drop").epochs(), DataError, "shorter than one batch"),
        (lambda s: s.shuffle("a"), ArgumentError, "seed='a' makes no sense"),
        (lambda s: s.take(-1), DataError, "neither a number of items nor a fraction"),
        (lambda s: s.take(1.5), DataError, r"float from 0 to 1"),
        (lambda s: s.skip("x"), DataError, "neither a number of items nor a fraction"),
        (lambda s: s.repeat(0), DataError, "k=0 makes no sense"),
        (lambda s: s.shard(3, 3), DataError, r"(?s)index=3 makes no sense.*from 0 to 2"),
        (lambda s: s.shuffle().cache(), DataError, r"(?s)differ from epoch to epoch.*cache\(\).shuffle"),
        (lambda s: s.pack(0), DataError, "length=0 makes no sense"),
        (lambda s: s.batch(2).pack(4), DataError, "documents, not batches"),
        (lambda s: s.load(workers=-1), DataError, "workers=-1 makes no sense"),
        (lambda s: s.load(timeout="soon"), ArgumentError, "timeout= makes no sense"),
        (lambda s: s.load(context="thread"), ArgumentError, r"(?s)cannot be started.*context='thread'"),
        (lambda s: s.repeat().shuffle(), DataError, r"(?s)source is endless.*shuffle\(...\).repeat\(\)"),
        (lambda s: s.repeat().filter(bool), DataError, "endless"),
        (lambda s: s.repeat().take(0.5), DataError, "endless"),
        (lambda s: s.repeat().repeat(2), DataError, "endless"),
        (lambda s: s.repeat().pack(2), DataError, "endless"),
        (lambda s: len(s.repeat()), ArgumentError, "it is endless"),
        (lambda s: s.epochs(), DataError, r"(?s)single items, not batches.*batch\(64\)"),
        (lambda s: s.batch(2).epochs(batch_size=3), DataError, "has batches already"),
        (lambda s: s.skip(5).batch(2).epochs(), DataError, r"(?s)no batches.*skip\(5\)"),
        (lambda s: s.filter(lambda x: False).batch(2).epochs(), DataError, r"(?s)no batches.*filter"),
        (lambda s: s[1:2], ArgumentError, r"(?s)indexed by one position.*skip\(2\).take\(3\)"),
        (lambda s: s[5], IndexError, "index 5 of a source with 5 items"),
        (lambda s: s.at(start=-1), DataError, "start=-1 makes no sense"),
        (ft.data.zip, ArgumentError, "wants"),
        (lambda s: ft.data.zip([s, [1, 2]]), ArgumentError, r"(?s)not all of these are sources"),
        (ft.data.chain, ArgumentError, "wants a list of sources"),
        (lambda s: ft.data.chain([]), DataError, "there are no sources"),
        (lambda s: ft.data.mix([s, s.batch(2)]), DataError, r"(?s)some of the sources have batches.*input 0"),
        (lambda s: ft.data.mix([s, s], [1]), DataError, r"(?s)weights make no sense.*2 positive numbers"),
        (lambda s: ft.data.mix([s, s], [1, 0]), DataError, "weights make no sense"),
        (lambda s: ft.data.mix([s, s.skip(5)]), DataError, r"(?s)has no items.*sources\[1\]"),
        (lambda s: ft.data.mix([s, s], end="now"), DataError, r"(?s)no end='now'.*'first', 'all', 'never'"),
        (ft.data.curriculum, ArgumentError, "this is no function"),
        (lambda s: ft.data.zip_cycle((s, ft.data.curriculum(lambda e: s))), DataError, "length of a source changes"),
        (lambda s: ft.data.curriculum(lambda e: s).repeat(), DataError, "its length changes from epoch to epoch"),
    ],
)
def test_bad_input(use: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        use(ft.data.source(torch.arange(5)))


def test_no_worker_is_left() -> None:
    assert not multiprocessing.active_children()
