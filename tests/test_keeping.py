"""Which checkpoints stay: the laws of keep policies, over random histories, and what bad arguments say."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ftrain as ft
from ftrain.checkpoint.keeping import Entry, Keep, best, keep
from ftrain.errors import ArgumentError, LimitError

NAN = math.nan


def history(*values: float | None, name: str = "val/loss") -> list[Entry]:
    """Entries of steps 10, 20, ... with these values of one metric; None where there is none."""
    return [Entry(10 * (i + 1), metrics={} if v is None else {name: v}) for i, v in enumerate(values)]


@st.composite
def histories(draw: st.DrawFn) -> list[Entry]:
    """Entries of a run in order: steps and epochs grow, metrics are missing at times, NaN at times, equal often."""
    steps = sorted(draw(st.sets(st.integers(0, 60), max_size=12)))
    epochs = sorted(draw(st.lists(st.integers(0, 6), min_size=len(steps), max_size=len(steps))))
    value = st.sampled_from([None, NAN, -math.inf, -1.0, 0.0, -0.0, 0.5, 1, math.inf])
    rows = draw(st.lists(st.tuples(value, value), min_size=len(steps), max_size=len(steps)))
    return [
        Entry(step, epoch, 0.5 * step, {k: v for k, v in zip(("a", "b"), row, strict=True) if v is not None})
        for step, epoch, row in zip(steps, epochs, rows, strict=True)
    ]


def _odd(entry: Entry) -> bool:
    return entry.step % 2 == 1


NUMBERS = st.integers(1, 6)
SINGLE = st.one_of(
    NUMBERS.map(lambda n: keep(latest=n)),
    st.builds(
        lambda n, by, mode: keep(best=n, by=by, mode=mode),
        NUMBERS,
        st.sampled_from("ab"),
        st.sampled_from(["min", "max"]),
    ),
    NUMBERS.map(lambda n: keep(every=n)),
    NUMBERS.map(lambda n: keep(every_epochs=n)),
    st.just(keep(where=_odd)),
)
POLICIES = st.lists(SINGLE, min_size=1, max_size=3).map(
    lambda some: Keep(tuple(p for one in some for p in one.policies))
)


# ------------------------------------------------------------------------------------------------------------------ laws


@given(POLICIES, histories(), st.randoms(use_true_random=False))
def test_a_subset_with_the_newest_whatever_the_order(policy, entries, random):
    kept = policy.kept(entries)
    steps = {entry.step for entry in entries}
    assert kept <= steps
    assert not entries or max(steps) in kept
    shuffled = list(entries)
    random.shuffle(shuffled)
    assert policy.kept(iter(shuffled)) == kept


@given(SINGLE, SINGLE, histories())
def test_or_is_union(a, b, entries):
    assert (a | b).kept(entries) == a.kept(entries) | b.kept(entries)
    assert (a | b).kept(entries) == (b | a).kept(entries)
    assert a | a == a


@given(POLICIES, histories(), st.data())
def test_what_is_dropped_never_comes_back(policy, entries, data):
    """From any part of a history to the whole of it, whichever entries are added."""
    part = [entry for entry in entries if data.draw(st.booleans())]
    dropped = {entry.step for entry in part} - policy.kept(part)
    assert not dropped & policy.kept(entries)


@given(POLICIES, histories())
def test_deleting_as_the_run_goes_leaves_what_one_look_would(policy, entries):
    there: list[Entry] = []
    for entry in entries:
        there.append(entry)
        kept = policy.kept(there)
        there = [one for one in there if one.step in kept]
    assert {one.step for one in there} == policy.kept(entries)


def test_where_what_was_dropped_would_come_back():
    """The exceptions that the module's docstring names: a kept entry vanishes, a metric is changed afterwards."""
    policy, entries = keep(best=1, by="val/loss"), history(0.1, 0.2, 0.9, 0.95)
    assert policy.kept(entries) == {10, 40}
    assert policy.kept(entries[1:]) == {20, 40}
    changed = [dataclasses.replace(entries[0], metrics={"val/loss": NAN}), *entries[1:]]
    assert policy.kept(changed) == {20, 40}


@given(histories(), NUMBERS, NUMBERS)
def test_more_is_never_less(entries, n, more):
    assert keep(latest=n).kept(entries) <= keep(latest=n + more).kept(entries)
    assert keep(best=n, by="a").kept(entries) <= keep(best=n + more, by="a").kept(entries)


@given(histories(), NUMBERS)
def test_latest_has_n(entries, n):
    assert keep(latest=n).kept(entries) == {entry.step for entry in entries[-n:]}


@given(histories(), NUMBERS, st.sampled_from(["min", "max"]))
def test_best_has_n_none_of_which_is_worse_than_another(entries, n, mode):
    """Against a definition of another kind: an entry is among the best n if fewer than n are better."""

    def better(one: Entry, two: Entry) -> bool:
        a, b = one.metrics.get("a"), two.metrics.get("a")
        if a is None or b is None:
            return one.step > two.step if a is b else b is None
        if math.isnan(a) or math.isnan(b):
            return one.step > two.step if math.isnan(a) and math.isnan(b) else math.isnan(b)
        if a == b:
            return one.step > two.step
        return a < b if mode == "min" else a > b

    wanted = {one.step for one in entries if sum(better(other, one) for other in entries) < n}
    assert len(wanted) == min(n, len(entries))
    assert keep(best=n, by="a", mode=mode).kept(entries) == wanted | {entry.step for entry in entries[-1:]}
    if any("a" in entry.metrics for entry in entries):
        assert {best(entries, "a", mode).step} == {
            one.step for one in entries if not any(better(o, one) for o in entries)
        }


@given(histories(), NUMBERS)
def test_every_epochs_has_one_an_epoch_the_first(entries, n):
    kept = [entry for entry in entries[:-1] if entry.step in keep(every_epochs=n).kept(entries)]
    assert len({entry.epoch for entry in kept}) == len(kept)
    for entry in kept:
        assert entry.epoch % n == 0
        assert entry.epoch > 0
        assert not [one for one in entries if one.epoch == entry.epoch and one.step < entry.step]
    there = {entry.epoch for entry in entries if entry.epoch and entry.epoch % n == 0}
    assert there - {entries[-1].epoch if entries else 0} <= {entry.epoch for entry in kept}


# -------------------------------------------------------------------------------------------------------------- by example


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (keep(latest=2), {50, 60}),
        (keep(latest=99), {10, 20, 30, 40, 50, 60}),
        (keep(best=1, by="val/loss"), {20, 60}),  # Orbax's best_fn with max_to_keep would delete 60
        (keep(best=2, by="val/loss"), {20, 40, 60}),  # of 20, 40 and 10: equal ones, the newer first
        (keep(best=3, by="val/loss"), {10, 20, 40, 60}),
        (keep(best=4, by="val/loss"), {10, 20, 40, 50, 60}),  # NaN only after every number
        (keep(best=5, by="val/loss"), {10, 20, 40, 50, 60}),  # and no value only after NaN: of 30 and 60 the newer
        (keep(best=6, by="val/loss"), {10, 20, 30, 40, 50, 60}),
        (keep(best=1, by="val/loss", mode="max"), {40, 60}),
        (keep(every=20), {20, 40, 60}),
        (keep(every=7), {60}),
        (keep(where=lambda entry: entry.metrics.get("val/loss", 9) < 0.3), {20, 60}),
        (keep(where=lambda entry: np.bool_(entry.step == 30)), {30, 60}),
        (keep(latest=1, best=1, by="val/loss", every=50), {20, 50, 60}),
        (keep(best=1, by="val/loss") | keep(best=1, by="val/loss", mode="max"), {20, 40, 60}),
    ],
    ids=repr,
)
def test_kept(policy, kept):
    assert policy.kept(history(0.5, 0.2, None, 0.5, NAN, None)) == kept


def test_every_epochs_keeps_the_end_of_the_epoch_not_what_follows_it():
    entries = [Entry(5, 0), Entry(10, 1), Entry(15, 1), Entry(20, 2), Entry(25, 2), Entry(30, 3)]
    assert keep(every_epochs=1).kept(entries) == {10, 20, 30}
    assert keep(every_epochs=2).kept(entries) == {20, 30}


def test_nothing_is_kept_of_nothing():
    assert keep(latest=3, best=1, by="x").kept([]) == set()


@pytest.mark.parametrize("one", [np.float32(0.1), torch.tensor(0.1), 0, True], ids=repr)
def test_a_metric_may_be_any_number(one):
    assert best(history(5.0, one, 7.0), "val/loss").step == 20
    assert keep(best=1, by="val/loss").kept(history(5.0, one, 7.0)) == {20, 30}


def test_best_entry():
    assert best(history(0.5, 0.2, NAN), "val/loss").step == 20
    assert best(history(0.5, 0.2, NAN), "val/loss", "max").step == 10
    assert best(history(0.5, 0.5, 0.6), "val/loss").step == 20
    assert best(history(NAN, None, NAN, None), "val/loss").step == 30  # the best there is


def test_it_is_a_value():
    one = ft.keep(latest=2, best=3, by="val/loss", mode="max", every=5, every_epochs=7, where=_odd)
    assert one == (
        keep(latest=2)
        | keep(best=3, by="val/loss", mode="max")
        | keep(every=5)
        | keep(every_epochs=7)
        | keep(where=_odd)
    )
    assert hash(one) == hash(ft.keep(latest=2, best=3, by="val/loss", mode="max", every=5, every_epochs=7, where=_odd))
    assert one != keep(latest=2)
    assert repr(one) == (
        "keep(latest=2) | keep(best=3, by='val/loss', mode='max') | keep(every=5) | keep(every_epochs=7) | keep(where=_odd)"
    )
    assert keep(best=1, by="x") == keep(best=1, by="x", mode="min")
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.policies = ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        Entry(1).step = 2
    assert hash(Entry(1, metrics={"a": 1.0})) == hash(Entry(1, metrics={"a": 1.0}))


# --------------------------------------------------------------------------------------------- a metric that never appears


def test_a_metric_that_its_evaluator_does_not_give_is_known_at_its_first_report():
    policy = keep(latest=1) | keep(best=1, by="val/acuracy", mode="max")
    policy.check([])
    policy.check(["loss", "test/acuracy"])  # `val` has not reported
    with pytest.raises(LimitError, match="the metric 'val/acuracy' never appears") as caught:
        policy.check(["loss", "val/loss", "val/accuracy"])
    text = str(caught.value)
    assert "one of: loss, val/accuracy, val/loss" in text
    assert "fix:      by='val/accuracy'" in text
    assert "keep(best=1, by='val/acuracy', mode='max')" in text


@pytest.mark.parametrize("by", ["los", "test/loss"], ids=str)
def test_a_metric_that_may_still_come_is_missing_at_the_end(by):
    policy = keep(best=1, by=by)
    policy.check({"loss", "val/loss"})
    with pytest.raises(LimitError, match=re.escape(f"the metric {by!r} never appears")):
        policy.check({"loss", "val/loss"}, ended=True)


def test_a_metric_that_appears_is_no_error():
    policy = keep(best=1, by="val/loss") | keep(best=1, by="loss")
    assert policy.by() == ("val/loss", "loss")
    both = policy | keep(best=9, by="loss", mode="max") | keep(best=9, by="loss")
    assert both.by() == ("val/loss", "loss")
    assert both.best() == [("val/loss", "min"), ("loss", "min"), ("loss", "max")]
    assert keep(latest=1).best() == []
    policy.check(["val/loss", "loss"], ended=True)
    keep(latest=1).check([], ended=True)


def test_no_metrics_at_all():
    with pytest.raises(LimitError, match="none, no metric was recorded at a checkpoint"):
        keep(best=1, by="val/loss").check([], ended=True)


def test_the_best_of_none():
    with pytest.raises(LimitError, match="there are no checkpoints"):
        best([], "val/loss")
    with pytest.raises(LimitError, match=r"(?s)'val/los' never appears.*2 checkpoints.*one of: val/loss"):
        best(history(0.1, 0.2), "val/los")


# ------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", ["latest", "best", "every", "every_epochs"])
@pytest.mark.parametrize("n", [0, -3, 1.5, True, "2"], ids=repr)
def test_a_number_that_makes_no_sense(name, n):
    with pytest.raises(LimitError, match=re.escape(f"ft.keep: {name}={n!r} makes no sense")) as caught:
        keep(**{name: n}, **({"by": "val/loss"} if name == "best" else {}))
    assert f"{name}={3 if n == -3 else 1}" in str(caught.value).partition("fix:")[2]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({}, LimitError, "nothing is named to be kept"),
        ({"best": 2}, LimitError, r"(?s)best=2 by which metric\?.*ft\.keep\(best=2, by=\"val/loss\"\)"),
        (
            {"latest": 1, "by": "val/loss"},
            LimitError,
            r"(?s)but not how many to keep.*ft\.keep\(best=1, by='val/loss'\)",
        ),
        ({"latest": 1, "mode": "min"}, LimitError, "but not how many to keep"),
        ({"best": 1, "by": "x", "mode": "maximum"}, LimitError, r"(?s)mode='maximum' is unknown.*mode='max'"),
        ({"best": 1, "by": "x", "mode": 3}, LimitError, "mode=3 is unknown"),
        ({"best": 1, "by": ""}, ArgumentError, "by= is the name of a metric"),
        ({"best": 1, "by": 3}, ArgumentError, "by= is the name of a metric"),
        ({"where": 3}, ArgumentError, "where=3 is no predicate"),
    ],
    ids=lambda value: repr(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        keep(**arguments)


def test_only_policies_are_joined():
    with pytest.raises(ArgumentError, match=r"keep\(latest=1\) \| 3"):
        keep(latest=1) | 3


def test_a_predicate_that_forgets_to_return_deletes_nothing():
    def forgot(entry: Entry) -> None:
        entry.step > 3  # noqa: B015  # the user's mistake

    with pytest.raises(ArgumentError, match=r"(?s)did not answer with True or False.*step 10.*None"):
        keep(where=forgot).kept(history(0.1, 0.2))


def test_a_metric_that_is_no_number():
    entries = history(0.1, np.zeros(3))
    with pytest.raises(LimitError, match=r"(?s)'val/loss' is not a number.*step 20.*ndarray"):
        keep(best=1, by="val/loss").kept(entries)
    with pytest.raises(LimitError, match="'val/loss' is not a number"):
        best(history(0.1, "low"), "val/loss")


def test_two_entries_of_one_step():
    with pytest.raises(LimitError, match=r"(?s)two checkpoints are of one step.*step 3"):
        keep(latest=1).kept([Entry(3), Entry(4), Entry(3)])


def test_an_unknown_mode_of_best():
    with pytest.raises(LimitError, match="mode='lowest' is unknown"):
        best(history(0.1), "val/loss", "lowest")
