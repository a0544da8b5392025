"""`ft.dry_run`: everything of a run happens once, and nothing of it stays."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

import ftrain as ft
from ftrain import tree

QUIET = {"compile": False}


def loss_fn(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean()


def made(**given):
    torch.manual_seed(0)
    model, tx = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)), ft.optim.adamw(0.05)
    metric = ft.eval_step(model, lambda model, batch: {"loss": loss_fn(model, batch)})
    return ft.init(model, tx, seed=1), ft.train_step(model, loss_fn, tx, **given), metric


def batches(n=6, rows=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, rows, 3, generator=generator)
    return [{"x": one, "y": one.sum(1, keepdim=True)} for one in x]


class Counting:
    """Data that counts what is read of it."""

    def __init__(self, data):
        self.data, self.read = data, 0

    def __iter__(self):
        for one in self.data:
            self.read += 1
            yield one

    def __len__(self):
        return len(self.data)


class Sink:
    def __init__(self):
        self.calls = []

    def __call__(self, record):
        self.calls.append(record)

    def close(self, status):
        self.calls.append(status)


def config(metric, folder, **given):
    return {
        "epochs": 100,
        "evals": {"val": ft.Evaluator(metric, batches(4), every=ft.every(epochs=50))},
        "hooks": [ft.hooks.plateau("val/loss", "lr", patience=2)],
        "sinks": [Sink()],
        "checkpoint": ft.Checkpoints(folder, every=ft.every(steps=1000)),
        "resume": "auto",
        **QUIET,
        **given,
    }


def test_each_part_happens_and_nothing_stays(tmp_path, monkeypatch, rng_guard):
    state, step, metric = made()
    before = [leaf.clone() for leaf in tree.leaves(state)]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.chdir(tmp_path)
    train, val, sink = Counting(batches()), Counting(batches(4)), Sink()
    with rng_guard():
        tried = ft.dry_run(
            state,
            step,
            train,
            n=2,
            epochs=100,
            evals={"val": ft.Evaluator(metric, val, every=ft.every(epochs=50))},
            sinks=[sink],
            checkpoint=ft.Checkpoints(tmp_path / "run", every=ft.every(steps=1000)),
            resume="auto",
            **QUIET,
        )
    assert (train.read, val.read, tried.steps, tried.reason) == (2, 2, 2, "epochs")
    assert sorted(tried.metrics) == ["train", "val"]
    assert tried.metrics["val"].keys() == {"loss"}
    assert {"loss", "lr"} <= tried.metrics["train"].keys()
    assert sink.calls == []
    assert sorted(os.listdir(tmp_path)) == ["temporary"]
    assert list(temporary.iterdir()) == []
    assert tried.checkpoint_bytes > sum(leaf.nbytes for leaf in tree.leaves(state))
    assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves(state), strict=True))
    assert state.counters() == (0, 0, 0, 1)


def test_its_numbers_are_those_of_fit():
    state, step, metric = made()
    tried = ft.dry_run(state, step, batches(), n=3, evals={"val": ft.Evaluator(metric, batches(4))}, **QUIET)
    run = ft.fit(
        state, step, batches()[:3], evals={"val": ft.Evaluator(metric, batches(4)[:3])}, progress=False, **QUIET
    )
    assert tried.metrics["train"]["loss"] == run.history["loss"][-1]
    assert tried.metrics["val"]["loss"] == run.history["val/loss"][-1]


def test_a_run_after_it_is_as_without_it(tmp_path):
    state, step, metric = made()
    plain = ft.fit(state, step, batches(), progress=False, **QUIET).state
    state, step, metric = made()
    ft.dry_run(state, step, batches(), n=2, evals={"val": ft.Evaluator(metric, batches())}, **QUIET)
    after = ft.fit(state, step, batches(), progress=False, **QUIET).state
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(plain), tree.leaves(after), strict=True))


def test_hooks_are_called_at_all_that_they_listen_to():
    state, step, metric = made()

    def bare(state, event):
        return state

    def rare(state, event):
        return state

    def saved(state, event):
        assert Path(event.path).is_dir()
        return state

    def never(state, event):
        return state

    def late(state, event):
        return state

    def count(state, memory, event):
        return state, {"calls": memory["calls"] + 1}

    counter = ft.Hook("counter", lambda state: {"calls": torch.zeros((), dtype=torch.int64)}, count)
    hooks = [
        bare,
        ft.on(ft.every(steps=1000), rare),
        ft.on("saved", saved),
        ft.on("step", ft.when(lambda event: event.step > 100, never)),
        ft.compose(ft.on(ft.every(epochs=30), late), ft.on("epoch", counter)),
    ]
    tried = ft.dry_run(
        state, step, batches(), n=2, hooks=hooks, evals={"val": ft.Evaluator(metric, batches())}, **QUIET
    )
    heard = dict(tried.heard)
    assert heard["bare"] == ("start", "step", "step", "epoch", "evaluation", "end")
    assert heard["rare"][:2] == ("step", "step")
    assert heard["saved"][-1:] == ("saved",)
    assert heard["never"] == ("step", "step")
    assert "epoch" in heard["late"] or heard["late"] == ("step", "step")
    assert heard["counter"] == ("epoch",)


def test_a_hook_that_stops_does_not_end_it_before_the_last_part():
    state, step, metric = made()

    def stop(state, event):
        return ft.Outcome(state, stop="enough")

    tried = ft.dry_run(
        state, step, batches(), n=3, hooks=[stop], evals={"val": ft.Evaluator(metric, batches())}, **QUIET
    )
    assert tried.steps == 3
    assert "val" in tried.metrics


@pytest.mark.parametrize(
    ("data", "n", "steps"),
    [(batches(2), 5, 2), (iter(batches()), 2, 2), (lambda epoch: batches(3), 2, 2), (lambda epoch: batches(1), 4, 1)],
    ids=["short", "iterator", "function", "short function"],
)
def test_kinds_of_data(data, n, steps):
    state, step, _ = made()
    assert ft.dry_run(state, step, data, n=n, **QUIET).steps == steps


def test_arrays_windows_and_endless_sources():
    state, step, metric = made()
    whole = {name: torch.cat([one[name] for one in batches()]) for name in ("x", "y")}
    evals = {"val": ft.Evaluator(metric, whole, batch_size=16)}
    assert ft.dry_run(state, step, whole, n=2, batch_size=8, evals=evals, **QUIET).steps == 2
    windows = ft.dry_run(state, step, ft.data.window(batches(), 2), n=2, **QUIET)
    assert windows.steps == 2
    endless = ft.data.source(whole, batch_size=8, shuffle=True).repeat()
    assert ft.dry_run(state, step, endless, n=2, steps=1000, **QUIET).steps == 2
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(whole["x"], whole["y"]), 8, shuffle=True)
    tuples = ft.train_step(
        nn.Linear(3, 1), lambda model, batch: (model(batch[0]) - batch[1]).square().mean(), ft.optim.sgd(0.1)
    )
    assert ft.dry_run(ft.init(nn.Linear(3, 1), ft.optim.sgd(0.1)), tuples, loader, n=2, **QUIET).steps == 2


def test_a_compiled_step_serves_the_run_too():
    state, step, _ = made()
    fast = ft.compile(step, backend="eager")
    ft.dry_run(state, fast, batches(), n=1)
    ft.fit(state, fast, batches(), progress=False)
    assert (fast.compiles, fast.rung) == (1, "step")


def test_the_seconds_and_the_words():
    state, step, metric = made()
    tried = ft.dry_run(state, step, batches(), evals={"val": ft.Evaluator(metric, batches())}, **QUIET)
    assert list(tried.seconds) == ["data", "step", "evaluation", "hooks", "checkpoint", "restore"]
    assert all(tried.seconds[part] > 0 for part in ("data", "step", "evaluation", "checkpoint", "restore"))
    lines = repr(tried).splitlines()
    assert lines[0] == "DryRun(1 step, ended by epochs)"
    assert lines[1].startswith("  train       ")
    assert "loss" in lines[2]
    assert lines[-2] == f"  checkpoint  {tried.checkpoint_bytes} bytes, saved, restored and compared"


# ------------------------------------------------------------------------------------------------- where it goes wrong


def notes(error):
    return "\n".join(error.__notes__)


def broken(*args):
    raise OSError("no more paper")


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("hook", "in ft.dry_run, at the hook 'broken', at a 'evaluation' event"),
        ("eval step", "in ft.dry_run, at the evaluator 'val' on batch 0"),
        ("eval data", "in ft.dry_run, at the reading of data, for the evaluator 'val' on batch 1"),
        ("step", "in ft.dry_run, at the step on batch 0"),
        ("data", "in ft.dry_run, at the reading of data, for the step on batch 1"),
    ],
)
def test_an_error_says_where_it_happened(where, text):
    state, step, metric = made()
    data, evals = batches(), {"val": ft.Evaluator(metric, batches())}
    hooks = []

    def short(epoch):
        yield batches()[0]
        broken()

    if where == "hook":
        hooks = [ft.on("evaluation", broken)]
    elif where == "eval step":
        evals = {"val": ft.Evaluator(broken, batches())}
    elif where == "eval data":
        evals = {"val": ft.Evaluator(metric, short)}
    elif where == "step":
        step = broken
    else:
        data = short
    with pytest.raises(OSError, match="no more paper") as caught:
        ft.dry_run(state, step, data, n=2, evals=evals, hooks=hooks, epochs=1, **QUIET)
    assert text in notes(caught.value)
    assert notes(caught.value).count("in ft.dry_run") == 1


def test_a_checkpoint_that_cannot_be_written(monkeypatch):
    state, step, _ = made()
    monkeypatch.setattr("ftrain.checkpoint.checkpoints.RunCheckpoints.save", broken)
    with pytest.raises(OSError, match="no more paper") as caught:
        ft.dry_run(state, step, batches(), **QUIET)
    assert "in ft.dry_run, at the checkpoint" in notes(caught.value)


def test_a_checkpoint_that_comes_back_otherwise(monkeypatch):
    state, step, _ = made()
    monkeypatch.setattr("ftrain.tune.trying.restore", lambda folder, like: tree.map(lambda leaf: leaf + 1, like))
    with pytest.raises(ft.errors.CheckpointError, match="what was restored differs from what was saved"):
        ft.dry_run(state, step, batches(), **QUIET)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (
            {"n": 0},
            ft.errors.LimitError,
            r"n=0 makes no sense[\s\S]*got: +0\n +fix: +ft.dry_run\(state, step, data, n=2\)",
        ),
        (
            {"foo": 3},
            ft.errors.ArgumentError,
            r"has no argument 'foo'[\s\S]*got: +foo=3\n +fix: +ft.dry_run\(.*hooks=\.\.\.",
        ),
        ({"epoch": 1}, ft.errors.ArgumentError, r"ft.fit has no argument 'epoch'[\s\S]*epochs="),
        ({"checkpoint": "folder"}, ft.errors.ArgumentError, "is no ft.Checkpoints"),
        ({"sinks": ["file"]}, ft.errors.LimitError, "sinks= makes no sense"),
        ({"sinks": 3}, ft.errors.LimitError, "sinks= makes no sense"),
        ({"hooks": [3]}, ft.errors.HookError, "hooks"),
        ({"evals": [3]}, ft.errors.LimitError, "evals= makes no sense"),
        ({"evals": {"val": 3}}, ft.errors.DataError, "is no evaluator"),
        ({"epochs": 0}, ft.errors.LimitError, "epochs"),
        ({"epochs": 1, "at_least": ft.until(epochs=5)}, ft.errors.LimitError, "at_least"),
        ({"resume": "auto"}, ft.errors.LimitError, "resume= makes no sense"),
        ({"log": 3}, ft.errors.LimitError, "log= makes no sense"),
        ({"progress": "yes"}, ft.errors.LimitError, "progress= makes no sense"),
        ({"snapshot": 3}, ft.errors.LimitError, "snapshot= makes no sense"),
        ({"tokens": 3}, ft.errors.LimitError, "tokens= makes no sense"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_arguments_are_checked_as_fit_does(given, error, text):
    state, step, _ = made()
    with pytest.raises(error, match=text):
        ft.dry_run(state, step, batches(), **(QUIET | given))


def test_data_that_is_wrong():
    state, step, metric = made()
    with pytest.raises(ft.errors.DataError, match="no batches"):
        ft.dry_run(state, step, [], **QUIET)
    with pytest.raises(ft.errors.DataError, match="no batches"):
        ft.dry_run(state, step, batches(), evals={"val": ft.Evaluator(metric, [])}, **QUIET)


def test_overfitting_a_batch():
    torch.manual_seed(0)
    model, tx = nn.Linear(3, 1), ft.optim.adam(0.1)
    step = ft.train_step(model, loss_fn, tx)
    whole = {name: torch.cat([one[name] for one in batches()]) for name in ("x", "y")}
    seen = []

    def look(state, event):
        seen.append(event.samples)
        return state

    one = ft.data.source(whole, batch_size=8).take(1).cache().repeat()
    result = ft.fit(
        ft.init(model, tx), step, one, steps=300, hooks=[ft.on("epoch", look)], progress=False, compile=False
    )
    assert result.history["loss"][-1] < 1e-3 < result.history["loss"][0]
    assert (result.reason, result.state.counters().step, seen) == ("steps", 300, [])
    first = next(iter(one))
    assert torch.equal(first["x"], whole["x"][:8])
