"""The ground: trees, states, keys, metrics."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import warnings
from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn

import ftrain as ft
from ftrain import metrics, rng, tree
from ftrain.metrics import Collect, Last, Max, Mean, Min, Perplexity, Sum

from .corpus import Gpt, setup


class Pair(NamedTuple):
    a: Any
    b: Any


TREES = {
    "leaf": 1,
    "dict": {"b": 1, "a": (2, None)},
    "named tuple": Pair({"x": 1}, [2, 3]),
    "metrics": {"loss": Mean(1, 2), "all": Collect((3, 4))},
    "empty": {},
    "state": ft.init(nn.Linear(2, 1), ft.optim.adam(1e-3)),
}


@pytest.mark.parametrize("name", TREES)
def test_unflatten_of_structure_and_leaves_is_the_tree(name: str) -> None:
    found = TREES[name]
    again = tree.unflatten(tree.structure(found), tree.leaves(found))
    assert type(again) is type(found)
    assert tree.paths(again) == tree.paths(found)
    assert all(a is b for a, b in zip(tree.leaves(again), tree.leaves(found), strict=True))
    assert len(tree.paths(found)) == len(tree.leaves(found))


@pytest.mark.parametrize("name", TREES)
def test_inside_a_trace_trees_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = TREES[name]
    outside = tree.leaves(found)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert all(a is b for a, b in zip(tree.leaves(found), outside, strict=True))
    again = tree.unflatten(tree.structure(found), tree.leaves(found))
    assert tree.structure(again) == tree.structure(found)
    assert type(again) is type(found)


@pytest.mark.parametrize(
    ("expected", "got", "text"),
    [
        (
            {"a": {"x": 1}},
            {"a": {"y": 1}},
            "where:    t['a']\n  expected: entries ['x']\n  got:      missing ['x']; extra ['y']",
        ),
        (
            Pair(1, {"k": 2}),
            Pair(1, {"k": (2, 3)}),
            "where:    t.b['k']\n  expected: int\n  got:      tuple with 2 entries",
        ),
        ({"a": None}, {"a": 1}, "where:    t['a']\n  expected: None (an empty subtree)\n  got:      int"),
        ((1, 2), (1, 2, 3), "expected: entries [0], [1]\n  got:      extra [2]"),
        (
            {"w": torch.zeros(2)},
            {"w": torch.zeros(2, dtype=torch.int32)},
            "t['w']\n  expected: float32[2] on cpu\n  got:      int32[2] on cpu",
        ),
    ],
)
def test_a_difference_is_shown_as_code(expected: Any, got: Any, text: str) -> None:
    with pytest.raises(ft.errors.StructureError) as caught:
        tree.check_same(expected, got, root="t", what="they differ.")
    assert text in str(caught.value)


def test_map_refuses_trees_of_other_structure() -> None:
    with pytest.raises(ft.errors.StructureError, match="differ in structure"):
        tree.map(lambda a, b: a, {"x": 1}, {"y": 1})
    with pytest.raises(ft.errors.StructureError, match="expected: 1 entries"):
        tree.zip_strict([1], [1, 2])


# -- state ----------------------------------------------------------------------------------------------------------------------


def test_init_copies_and_never_touches_the_model() -> None:
    model = Gpt()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = ft.init(model, ft.optim.sgd(0.1), trainable=["blocks.*", "norm.*"])
    assert set(state.frozen) == {"token.weight", "place.weight"}
    assert all(state.params[k].data_ptr() != p.data_ptr() for k, p in model.named_parameters() if k in state.params)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert tree.leaves(ft.init(model, ft.optim.adam(1e-3), trainable="norm.*").opt.mu)[0].shape == (16,)


def test_a_state_cannot_be_assigned_and_replace_knows_its_fields() -> None:
    state = TREES["state"]
    with pytest.raises(AttributeError, match="cannot assign"):
        state.step = 3
    with pytest.raises(ft.errors.StateError, match="unknown field 'stpe'"):
        state.replace(stpe=1)
    with pytest.raises(AttributeError, match="no attribute 'parms'; it has params"):
        _ = state.parms


def test_a_state_survives_deepcopy_and_pickle() -> None:
    case, step, state = setup("mlp")
    for again in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        new, _ = step(again, case.batch())
        assert torch.equal(new.params["0.weight"], step(state, case.batch())[0].params["0.weight"])


def test_the_hosts_copy_of_the_counters_agrees_with_the_device() -> None:
    case, step, state = setup("mlp")
    state.counters()
    new, _ = step(state, case.batch())
    new = new.next_epoch()
    assert new._host is not None
    read = ft.TrainState(*[getattr(new, name) for name in tree.fields(ft.TrainState)])
    assert read._host is None
    assert read.counters() == new.counters() == (1, 1, 8, 0)


def test_to_module_gives_an_ordinary_module_with_its_own_memory() -> None:
    case, step, state = setup("gpt")
    model = case.model()
    state, _ = step(state, case.batch())
    trained = ft.to_module(model, state)
    assert trained.head.weight is trained.token.weight
    with torch.no_grad():
        trained.token.weight.zero_()
    assert state.params["token.weight"].abs().sum() > 0
    ids = case.batch()["ids"]
    again = ft.to_module(model, state).eval()
    assert torch.equal(again(ids), ft.predict_step(model, lambda m, b: m(b["ids"]))(state, {"ids": ids}))


# -- keys -----------------------------------------------------------------------------------------------------------------------


def test_keys_on_host_and_device_agree_and_are_golden() -> None:
    assert rng.fold_in_host(3, 5) == 7141676431748594730
    for seed in (0, 3, -1, 2**63 - 1, -(2**63)):
        for data in (0, 1, 7, 2**40, -5):
            assert int(rng.fold_in(rng.key(seed), data)) == rng.fold_in_host(seed, data)
            assert int(rng.fold_in(rng.key(seed), torch.tensor(data))) == rng.fold_in_host(seed, data)


def test_streams_are_distinct_and_uniform() -> None:
    keys = [rng.key(0), *rng.split(rng.key(0), 3), rng.fold_in(rng.key(0), 0), rng.fold_in(rng.key(0), 1), rng.key(1)]
    drawn = torch.stack([rng.uniform(k, (4000,), dtype=torch.float64) for k in keys])
    assert len(set(drawn[:, 0].tolist())) == len(keys)
    correlation = torch.corrcoef(drawn) - torch.eye(len(keys), dtype=torch.float64)
    assert correlation.abs().max() < 0.06
    histogram = torch.histc(drawn.flatten(), 10, 0, 1)
    expected = drawn.numel() / 10
    assert ((histogram - expected) ** 2 / expected).sum() < 28  # chi square, 9 degrees of freedom, p = 0.001
    assert drawn.min() >= 0
    assert drawn.max() < 1


@pytest.mark.inductor
def test_bits_compile() -> None:
    compiled = torch.compile(lambda key: rng.bits(key, (257,)), fullgraph=True)
    assert torch.equal(compiled(rng.key(5)), rng.bits(rng.key(5), (257,)))


def test_keys_vmap() -> None:
    keys = rng.split(rng.key(0), 4)
    rows = torch.func.vmap(lambda key: rng.normal(key, (3,)))(keys)
    assert torch.allclose(rows, torch.stack([rng.normal(key, (3,)) for key in keys]))


# -- metrics: law 12 ----------------------------------------------------------------------------------------------------------------

numbers = st.floats(-1e6, 1e6)
weights = st.floats(0, 1e3)
KINDS = {
    "mean": (Mean, st.tuples(numbers, weights)),
    "perplexity": (Perplexity, st.tuples(st.floats(0, 100), st.floats(0.5, 1e3))),
    "sum": (Sum, st.tuples(numbers)),
    "min": (Min, st.tuples(numbers)),
    "max": (Max, st.tuples(numbers)),
    "last": (Last, st.tuples(numbers)),
}


def same(a: Any, b: Any) -> bool:
    return all(
        (math.isnan(x) and math.isnan(y)) or math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-6)
        for x, y in zip(map(float, tree.leaves(a)), map(float, tree.leaves(b)), strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_merge_is_associative_and_empty_is_neutral(kind: str, data: st.DataObject) -> None:
    cls, fields = KINDS[kind]
    a, b, c = (cls(*data.draw(fields)) for _ in range(3))
    assert same(a.merge(b.merge(c)), a.merge(b).merge(c))
    assert same(a.merge(cls.empty()), a)
    assert same(cls.empty().merge(a), a)
    rows = [tuple(tree.leaves(m)) for m in (a, b, c)]
    assert same(cls.fold(*zip(*rows, strict=True)), functools.reduce(cls.merge, (a, b, c)))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_numbers_and_tensors_merge_alike(kind: str, data: st.DataObject) -> None:
    cls, fields = KINDS[kind]
    a, b = (cls(*data.draw(fields)) for _ in range(2))
    tensors = [tree.map(lambda v: torch.tensor(v, dtype=torch.float64), m) for m in (a, b)]
    assert same(a.merge(b), tensors[0].merge(tensors[1]))
    assert same(a.merge(cls.empty()), tensors[0].merge(cls.empty()))
    one, two = a.merge(b).compute(), tensors[0].merge(tensors[1]).compute()
    assert math.isclose(one, float(two), rel_tol=1e-9, abs_tol=1e-6) or math.isnan(one)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5))
def test_sharded_equals_whole_and_padding_does_not_count(n: int, parts: int, pad: int) -> None:
    generator = torch.Generator().manual_seed(n * 100 + parts)
    logits, y = torch.randn(n, 5, generator=generator), torch.randint(0, 5, (n,), generator=generator)
    for metric in (metrics.accuracy, metrics.perplexity, functools.partial(metrics.accuracy, topk=2)):
        whole = metric(logits, y)
        shards = [metric(a, b) for a, b in zip(logits.chunk(parts), y.chunk(parts), strict=True)]
        merged = functools.reduce(lambda a, b: a.merge(b), shards)
        assert float(merged.compute()) == pytest.approx(float(whole.compute()), rel=1e-5)
        mask = torch.cat([torch.ones(n), torch.zeros(pad)])
        padded = metric(
            torch.cat([logits, torch.full((pad, 5), 7.0)]), torch.cat([y, torch.zeros(pad, dtype=torch.long)]), mask
        )
        assert float(padded.compute()) == pytest.approx(float(whole.compute()), rel=1e-5)
        assert float(padded.weight) == n


def test_collect_keeps_everything_in_order() -> None:
    parts = [Collect((torch.tensor([i, i + 1]),)) for i in range(3)]
    assert Collect.fold([p.parts for p in parts]).compute().tolist() == [0, 1, 1, 2, 2, 3]
    assert Collect.empty().merge(parts[0]).compute().tolist() == [0, 1]


def test_a_masked_out_nan_does_not_count() -> None:
    assert Mean.of(torch.tensor([1.0, math.nan]), torch.tensor([1, 0])).compute() == 1.0
    with pytest.raises(ft.errors.MetricError, match="another shape"):
        Mean.of(torch.ones(3), torch.ones(2))


def test_the_meter_is_the_merge_of_what_was_added() -> None:
    from ftrain.loops.meter import Meter
    from ftrain.steps.packed import Packed

    meter, totals = Meter(), {"loss": Mean.empty(), "top": Max.empty()}
    for i in range(300):
        row = {"loss": Mean(torch.tensor(float(i)), torch.tensor(2.0)), "top": Max(torch.tensor(float(-i)))}
        if i % 3 == 0:
            meter.add(Packed(("loss", "top"), (Mean, Max), torch.tensor([float(i), 2.0, float(-i)])))
        elif i % 3 == 1:
            meter.add({**row, "ids": Collect((torch.tensor([i]),))})
        else:
            meter.add(row)
        totals = {k: totals[k].merge(tree.map(float, row[k])) for k in totals}
    found = meter.fetch()
    assert found["loss"] == totals["loss"].compute()
    assert found["top"] == totals["top"].compute()
    assert found["ids"].tolist() == list(range(1, 300, 3))
    assert not meter
    assert meter.fetch() == {}


# -- history --------------------------------------------------------------------------------------------------------------------------


def test_history_reads_like_a_table() -> None:
    rows = [ft.Record(1, 0, 8, 0.1, "train", {"loss": 2.0}), ft.Record(1, 0, 8, 0.2, "val", {"loss": 3.0})]
    history = ft.History(rows)
    assert history.names() == ["loss", "val/loss"]
    assert history["val/loss"].tolist() == [3.0]
    assert history.steps("loss").tolist() == [1]
    assert history.last() == {"loss": 2.0, "val/loss": 3.0}
    assert history.to_dict()["val/loss"] == [None, 3.0]
    assert list(history[:1]) == rows[:1]
    with pytest.raises(KeyError, match="no record has the metric 'acc'; there are: loss, val/loss"):
        _ = history["acc"]


def test_arrays_that_may_not_be_written_to_are_copied_without_a_warning() -> None:
    array = np.arange(4.0)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = ft.data.to_device({"x": array, "n": np.float32(2), "deep": [(True,)]}, torch.device("cpu"))
    batch["x"].add_(1)
    assert array.tolist() == [0.0, 1.0, 2.0, 3.0]
