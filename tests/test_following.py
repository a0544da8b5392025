"""`evaluate_checkpoints`: results are those of `fit`, the folder is only read, and nothing that is there is missed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

import ftrain as ft
from ftrain.checkpoint import store as stores
from ftrain.errors import (
    ArgumentError,
    CheckpointError,
    CheckpointWarning,
    DataError,
    LimitError,
    RestoreError,
    StateError,
)
from ftrain.inspect.appearing import Appearing

EAGER = {"compile": False}
QUIET = {"compile": False, "progress": False}


def told(record: ft.Record) -> tuple:
    """What a record says, but for the clock of the process."""
    return record.step, record.epoch, record.samples, record.tokens, record.split, dict(record.metrics)


class Run:
    """A small run with everything in which an evaluation could differ: noise, dropout, batch norm, averages, shuffling."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
        self.tx = ft.optim.adamw(0.05)
        x = torch.randn(40, 3)
        self.data = ft.data.source({"x": x, "y": x.sum(dim=1, keepdim=True)}, batch_size=8, shuffle=True)
        self.step = ft.with_ema(ft.train_step(self.model, self.loss, self.tx), 0.9)
        self.state = self.step.init(ft.init(self.model, self.tx, seed=7))
        held_out = ft.data.source({"x": x.flip(0), "y": x.sum(dim=1, keepdim=True)}, batch_size=16, shuffle=True)
        score = ft.eval_step(self.model, self.score)
        every = ft.every(steps=3) | ft.every(epochs=1)
        self.evals = {
            "val": ft.Evaluator(score, held_out, every=every),
            "ema": ft.Evaluator(score, held_out, every=every, params="ema", limit=2),
            "frac": ft.Evaluator(score, held_out, every=every & ~ft.every(fraction=0.1), sanity=1),
        }

    @staticmethod
    def loss(model, batch):
        return (model(batch["x"]) - batch["y"]).square().mean()

    @staticmethod
    def score(model, batch, rng):
        out = torch.nn.functional.dropout(model(batch["x"]), 0.5) + 0.1 * ft.rng.normal(rng, batch["y"].shape)
        return {"loss": (out - batch["y"]).square().mean(), "all": ft.metrics.Collect((out,))}

    def fit(self, path, evals=None, **options):
        ckpt = ft.Checkpoints(path, every=ft.every(steps=3) | ft.every(epochs=1), keep=options.pop("keep", None))
        given = {"epochs": 2, "evals": evals, "checkpoint": ckpt, "tokens": lambda batch: 10, **QUIET, **options}
        return ft.fit(self.state, self.step, self.data, **given)


@pytest.fixture
def run():
    return Run()


@pytest.fixture
def small():
    """A model that is quick to save, with states of any step."""
    model = torch.nn.Linear(1, 1)
    state = ft.init(model, ft.optim.sgd(0.1))
    score = ft.eval_step(model, lambda model, batch: {"loss": model(batch).square().mean()})

    def save(path, step):
        ft.save(
            path, state.replace(step=torch.tensor(step), params={**state.params, "bias": torch.tensor([1.0 * step])})
        )

    return state, {"val": ft.Evaluator(score, [torch.zeros(4, 1)])}, save


def value(step: int) -> float:
    return float(step) ** 2


def snapshot(folder: Path) -> dict[str, tuple]:
    """All that is in a folder: names, contents, times."""
    found = {}
    for one in sorted(folder.rglob("*")):
        stat = one.stat()
        found[str(one)] = (stat.st_mtime_ns, stat.st_ino, one.read_bytes() if one.is_file() else b"")
    return found


def drain(records) -> tuple[list[ft.Record], str]:
    found = []
    while True:
        try:
            found.append(next(records))
        except StopIteration as ended:
            return found, ended.value


# --------------------------------------------------------------------------------------------------------------- the results


def same(a: tuple, b: tuple) -> bool:
    metrics = a[-1], b[-1]
    return (
        a[:-1] == b[:-1]
        and metrics[0].keys() == metrics[1].keys()
        and all(
            torch.equal(one, metrics[1][name]) if isinstance(one, torch.Tensor) else one == metrics[1][name]
            for name, one in metrics[0].items()
        )
    )


def test_results_are_those_of_fit_bit_by_bit(tmp_path, run, rng_guard):
    kept = run.fit(tmp_path / "ckpt", run.evals).history
    wanted = [told(record) for record in kept if record.split in ("val", "ema", "frac")]
    evals = {name: run.evals[name] for name in ("val", "ema")}
    before = snapshot(tmp_path)
    with rng_guard():
        records, reason = drain(ft.evaluate_checkpoints(tmp_path / "ckpt", run.state, evals, **EAGER))
    assert reason == "complete"
    assert snapshot(tmp_path) == before
    found = [told(record) for record in records]
    wanted = [one for one in wanted if one[4] != "frac"]
    assert [one[0] for one in found] == [3, 3, 5, 5, 6, 6, 9, 9, 10, 10]
    assert len({one[-1]["loss"] for one in found}) == 10
    assert all(same(*pair) for pair in zip(found, wanted, strict=True))
    seconds = [record.seconds for record in records]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_the_cadence_and_the_trial_are_not_looked_at(tmp_path, run):
    run.fit(tmp_path)
    evals = {"frac": run.evals["frac"]}
    records = list(ft.evaluate_checkpoints(tmp_path, run.state, evals, **EAGER))
    assert [record.step for record in records] == [3, 5, 6, 9, 10]


def test_a_compiled_evaluation_is_that_of_a_compiled_fit(tmp_path, run):
    evals = {"val": run.evals["val"]}
    how = {"compile": "auto", "backend": "eager"}
    kept = run.fit(tmp_path, evals, **how).history
    records = list(ft.evaluate_checkpoints(tmp_path, run.state, evals, **how))
    assert [r.metrics["loss"] for r in records] == list(kept["val/loss"])


def test_like_may_be_abstract_and_without_what_is_not_evaluated(tmp_path, run):
    run.fit(tmp_path)
    evals = {"val": run.evals["val"]}
    wanted = [told(record) for record in ft.evaluate_checkpoints(tmp_path, run.state, evals, **EAGER)]
    abstract = ft.tree.map(lambda leaf: leaf.to("meta"), run.state)
    found = [told(record) for record in ft.evaluate_checkpoints(tmp_path, abstract, evals, **EAGER)]
    assert all(same(*pair) for pair in zip(found, wanted, strict=True))
    # Another optimizer, no average, another seed: only what is selected comes from the checkpoint, and the counters.
    other = ft.init(run.model, ft.optim.sgd(0.1), seed=99)
    taken = ft.evaluate_checkpoints(tmp_path, other, evals, select=["params", "buffers"], **EAGER)
    found = [told(record) for record in taken]
    assert all(same(*pair) for pair in zip(found, wanted, strict=True))


def test_rename_and_cast(tmp_path, run):
    run.fit(tmp_path)
    evals = {"val": run.evals["val"]}
    wanted = [r.metrics["loss"] for r in ft.evaluate_checkpoints(tmp_path, run.state, evals, **EAGER)]
    model = torch.nn.Sequential()
    model.add_module("body", run.model)
    other = ft.init(model.double(), ft.optim.sgd(0.1))

    def score(model, batch, rng):
        return {"loss": Run.score(lambda x: model(x.double()).float(), batch, rng)["loss"]}

    records = ft.evaluate_checkpoints(
        tmp_path,
        other,
        {"val": ft.Evaluator(ft.eval_step(model, score), run.evals["val"].data)},
        select=["params", "buffers"],
        rename={"params/*": "params/body.*", "buffers/*": "buffers/body.*"},
        cast=True,
        **EAGER,
    )
    assert [r.metrics["loss"] for r in records] == pytest.approx(wanted, rel=1e-5)


# ------------------------------------------------------------------------------------------------------- which checkpoints


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({}, [2, 4, 10]),
        ({"steps": "all", "after": 2}, [4, 10]),
        ({"steps": "latest"}, [10]),
        ({"steps": "latest", "after": 10}, []),
        ({"steps": [10, 2]}, [2, 10]),
        ({"steps": range(2, 5, 2)}, [2, 4]),
        ({"steps": [2, 10], "after": 4}, [10]),
    ],
    ids=str,
)
def test_which(tmp_path, small, asked, wanted):
    state, evals, save = small
    for step in (2, 4, 10):
        save(tmp_path, step)
    records, reason = drain(ft.evaluate_checkpoints(tmp_path, state, evals, **asked, **EAGER))
    assert reason == "complete"
    assert [(record.step, record.metrics["loss"]) for record in records] == [(step, value(step)) for step in wanted]


def test_the_best(tmp_path, small):
    state, evals, _ = small
    for step, loss in ((1, 0.5), (2, 0.1), (3, 0.3)):
        ft.save(tmp_path, state.replace(step=torch.tensor(step)), metrics={"loss": loss, "accuracy": loss})

    def steps(**asked):
        return [r.step for r in ft.evaluate_checkpoints(tmp_path, state, evals, steps="best", **asked, **EAGER)]

    assert steps(by="loss") == [2]
    assert steps(by="accuracy", mode="max") == [1]
    with pytest.raises(RestoreError, match="by which metric"):
        steps()


# ------------------------------------------------------------------------------------------------------------------ following

FOLLOW = {"follow": True, "poll": 0.01, **EAGER}


def test_what_appears_between_two_records_is_evaluated(tmp_path, small):
    state, evals, save = small
    records = ft.evaluate_checkpoints(tmp_path / "later", state, evals, until=ft.until(steps=9), **FOLLOW)
    save(tmp_path / "later", 1)  # the folder did not exist
    assert next(records).step == 1
    save(tmp_path / "later", 4)
    save(tmp_path / "later", 2)
    assert [next(records).step for _ in range(2)] == [2, 4]
    threading.Timer(0.2, save, (tmp_path / "later", 9)).start()
    found, reason = drain(records)
    assert [(record.step, record.metrics["loss"]) for record in found] == [(9, 81.0)]
    assert reason == "until"


def test_the_latest_passes_over_what_was_overtaken(tmp_path, small):
    state, evals, save = small
    records = ft.evaluate_checkpoints(tmp_path, state, evals, steps="latest", until=ft.until(steps=5), **FOLLOW)
    for step in (1, 2):
        save(tmp_path, step)
    assert next(records).step == 2
    for step in (3, 4, 5):
        save(tmp_path, step)
    assert [record.step for record in records] == [5]


def test_it_ends_after_a_while_without_news(tmp_path, small):
    state, evals, save = small
    save(tmp_path, 1)
    records = ft.evaluate_checkpoints(tmp_path, state, evals, timeout=2, **FOLLOW)
    assert next(records).step == 1
    time.sleep(2.5)  # the consumer's own time does not count
    threading.Timer(0.15, save, (tmp_path, 2)).start()
    assert next(records).step == 2
    began = time.monotonic()
    assert drain(records) == ([], "timeout")
    assert 2 <= time.monotonic() - began < 20


def test_the_last_look_is_after_the_last_wait(tmp_path, small, monkeypatch):
    """What appears in the very last moment is not missed."""
    state, evals, save = small
    records = ft.evaluate_checkpoints(tmp_path, state, evals, timeout=0.05, **FOLLOW | {"poll": 10})
    real = time.sleep

    def sleep(seconds):
        real(seconds)
        if not (tmp_path / "3").exists():
            save(tmp_path, 3)

    monkeypatch.setattr("ftrain.inspect.following.time.sleep", sleep)
    found, reason = drain(records)
    assert ([record.step for record in found], reason) == ([3], "timeout")


def test_it_ends_when_a_hook_ended_the_run(tmp_path, run):
    def stop(state, event):
        return ft.Outcome(state, stop="enough") if event.kind == "step" and event.step == 4 else state

    assert run.fit(tmp_path, hooks=[stop]).reason == "enough"
    records, reason = drain(ft.evaluate_checkpoints(tmp_path, run.state, {"val": run.evals["val"]}, **FOLLOW))
    assert [record.step for record in records] == [3, 4]
    assert reason == "enough"


def test_it_ends_when_all_that_were_named_were_evaluated(tmp_path, small):
    state, evals, save = small
    save(tmp_path, 1)
    records = ft.evaluate_checkpoints(tmp_path, state, evals, steps=[1, 3], **FOLLOW)
    assert next(records).step == 1
    save(tmp_path, 2)
    save(tmp_path, 3)
    found, reason = drain(records)
    assert ([record.step for record in found], reason) == ([3], "complete")
    # One that was named and has been overtaken will not come: it was deleted, or never was.
    shutil.rmtree(tmp_path / "2")
    with pytest.warns(CheckpointWarning, match="step 2 was deleted before it was read"):
        found, reason = drain(ft.evaluate_checkpoints(tmp_path, state, evals, steps=[2, 3], **FOLLOW))
    assert ([record.step for record in found], reason) == ([3], "complete")


def test_one_that_was_made_anew_is_another(tmp_path, small):
    state, evals, save = small
    save(tmp_path, 1)
    save(tmp_path, 2)
    records = ft.evaluate_checkpoints(tmp_path, state, evals, until=ft.until(steps=3), **FOLLOW)
    assert [next(records).metrics["loss"] for _ in range(2)] == [1.0, 4.0]
    with stores.Store(tmp_path, write=True) as store:
        store.delete(2)
    anew = state.replace(step=torch.tensor(2), params={**state.params, "bias": torch.tensor([5.0])})
    ft.save(tmp_path, anew, position=ft.Position(0, clock=ft.loops.Clock(2, seconds=8.0)))
    assert [(one.metrics["loss"], one.seconds) for one in [next(records)]] == [(25.0, 8.0)]
    save(tmp_path, 3)
    assert [record.metrics["loss"] for record in records] == [9.0]


def test_nothing_is_given_twice_while_a_run_writes(tmp_path, run):
    """Looks as fast as can be, from another thread: each checkpoint is due once, and its values are right."""
    found, looked, over = [], 0, threading.Event()

    def look():
        nonlocal looked
        appearing = Appearing(tmp_path, "all")
        while True:
            last = over.is_set()
            for step in appearing.due():
                one = appearing.load(step, run.state)
                found.append((step, None if one is None else one.state.counters().step))
            looked += 1
            if last:
                return

    thread = threading.Thread(target=look)
    thread.start()
    run.fit(tmp_path, epochs=4)
    over.set()
    thread.join()
    steps = [3, 5, 6, 9, 10, 12, 15, 18, 20]
    assert found == [(step, step) for step in steps]
    assert looked > 20


# -------------------------------------------------------------------------------------------------- deleted, and damaged


@pytest.mark.parametrize("follow", [False, True])
def test_one_that_is_deleted_while_it_is_read_is_left_out(tmp_path, small, monkeypatch, follow):
    state, evals, save = small
    for step in (1, 2, 3):
        save(tmp_path, step)
    real = stores.read

    def read(folder, *rest):
        if folder.parent.name == "2":
            (tmp_path / ".trash").mkdir()
            folder.parent.rename(tmp_path / ".trash" / "2")
        return real(folder, *rest)

    monkeypatch.setattr(stores, "read", read)
    more = FOLLOW | {"until": ft.until(steps=3)} if follow else EAGER
    with pytest.warns(CheckpointWarning, match=r"step 2 was deleted before it was read(.|\n)*keep=") as caught:
        records = list(ft.evaluate_checkpoints(tmp_path, state, evals, **more))
    assert [record.step for record in records] == [1, 3]
    assert len(caught) == 1


def test_a_damaged_one_is_left_out_or_an_error_where_it_was_named(tmp_path, small):
    state, evals, save = small
    for step in (1, 2, 3):
        save(tmp_path, step)
    record = tmp_path / "1" / "document" / "metadata"
    record.write_text(record.read_text().replace('"step": 1', '"step": 7'))
    for file in (tmp_path / "2" / "arrays").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.unlink()
    with pytest.warns(CheckpointWarning) as caught:
        records, reason = drain(ft.evaluate_checkpoints(tmp_path, state, evals, timeout=0.1, **FOLLOW))
    assert ([record.step for record in records], reason) == ([3], "timeout")
    assert len(caught) == 2  # each is said once, however often it is looked
    assert ["step 1 is damaged" in str(one.message) for one in caught] == [True, False]
    assert "step 2 is damaged" in str(caught[1].message)
    for step in (1, 2):
        with pytest.raises(CheckpointError, match="damaged"):
            list(ft.evaluate_checkpoints(tmp_path, state, evals, steps=[step, 3], **EAGER))


# ------------------------------------------------------------------------------------------------------- sinks and signals


class Sink:
    def __init__(self) -> None:
        self.records: list[ft.Record] = []
        self.closed: list[str] = []

    def __call__(self, record):
        self.records.append(record)

    def close(self, status):
        self.closed.append(status)


def test_sinks_are_called_and_closed(tmp_path, small):
    state, evals, save = small
    save(tmp_path, 1)
    save(tmp_path, 2)
    sink = Sink()
    records = list(ft.evaluate_checkpoints(tmp_path, state, evals, sinks=[sink], **EAGER))
    assert sink.records == records
    assert sink.closed == ["complete"]
    left = Sink()
    for _ in (records := ft.evaluate_checkpoints(tmp_path, state, evals, sinks=[left], **EAGER)):
        break
    records.close()
    assert (len(left.records), left.closed) == (1, ["closed"])
    broken = Sink()

    def fail(record):
        raise OSError("no more paper")

    with pytest.raises(OSError, match="no more paper"):
        list(ft.evaluate_checkpoints(tmp_path, state, evals, sinks=[fail, broken], **EAGER))
    assert (broken.records, broken.closed) == ([], ["error"])


def test_ctrl_c_leaves_what_was_begun(tmp_path, small):
    state, _, save = small
    save(tmp_path, 1)
    save(tmp_path, 2)
    calls = []

    def score(state, batch):
        calls.append(state.counters().step)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return {"loss": batch.mean()}

    before, sink = signal.getsignal(signal.SIGINT), Sink()
    evals = {"val": ft.Evaluator(score, [torch.zeros(1)] * 4)}
    records = ft.evaluate_checkpoints(tmp_path, state, evals, sinks=[sink], **EAGER)
    assert next(records).step == 1
    assert signal.getsignal(signal.SIGINT) is before
    assert drain(records) == ([], "interrupted")
    assert len(calls) == 5
    assert sink.closed == ["interrupted"]
    assert signal.getsignal(signal.SIGINT) is before
    calls[:] = range(10)
    assert [r.step for r in ft.evaluate_checkpoints(tmp_path, state, evals, after=1, **EAGER)] == [2]


def test_without_signals_ctrl_c_is_pythons(tmp_path, small):
    state, _, save = small
    save(tmp_path, 1)

    def score(state, batch):
        os.kill(os.getpid(), signal.SIGINT)
        return {"loss": batch.mean()}

    sink = Sink()
    evals = {"val": ft.Evaluator(score, [torch.zeros(1)])}
    with pytest.raises(KeyboardInterrupt):
        list(ft.evaluate_checkpoints(tmp_path, state, evals, sinks=[sink], signals=False, **EAGER))
    assert sink.closed == ["interrupted"]


# ------------------------------------------------------------------------------------------------------------ two processes

SHARED = """
import json, os, signal, sys, time, torch, ftrain as ft
torch.set_num_threads(1)
path, out = sys.argv[1], sys.argv[2]
torch.manual_seed(0)
model, tx = torch.nn.Linear(3, 1), ft.optim.adamw(0.1)
x = torch.randn(32, 3)
state = ft.init(model, tx, seed=5)
def score(model, batch, rng):
    return {"loss": (model(batch) + ft.rng.normal(rng, (len(batch), 1))).square().mean()}
evals = {"val": ft.Evaluator(ft.eval_step(model, score), ft.data.source(x, batch_size=8, shuffle=True),
                             every=ft.every(steps=2))}
def append(record):
    with open(out, "a") as file:
        file.write(json.dumps({"step": record.step, **record.named()}) + "\\n")
"""

TRAINER = (
    SHARED
    + """
def slowly(state, event):
    time.sleep(float(sys.argv[3]))
    return state
step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
ckpt = ft.Checkpoints(path, every=ft.every(steps=2), keep=ft.keep(latest=int(sys.argv[4])))
result = ft.fit(state, step, ft.data.source(x, batch_size=4), steps=int(sys.argv[5]), evals=evals, checkpoint=ckpt,
                hooks=[ft.on("step", slowly)], progress=False, compile=False)
for record in result.history:
    if record.split == "val":
        append(record)
"""
)

FOLLOWER = (
    SHARED
    + """
import warnings
warnings.simplefilter("always")
records = ft.evaluate_checkpoints(path, state, evals, follow=True, poll=0.02, sinks=[append], compile=False,
                                  until=ft.until(steps=int(sys.argv[3])))
print("ready", flush=True)
while True:
    try:
        next(records)
    except StopIteration as ended:
        print(ended.value)
        break
"""
)


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("keep", "pause", "steps"), [(100, 0.01, 12), (1, 0.0, 60)], ids=["all kept", "deleted"])
def test_a_process_follows_a_run_of_another(tmp_path, keep, pause, steps):
    follower = start(FOLLOWER, tmp_path / "ckpt", tmp_path / "follower.jsonl", steps)
    assert follower.stdout is not None
    assert follower.stdout.readline() == "ready\n"
    trainer = start(TRAINER, tmp_path / "ckpt", tmp_path / "trainer.jsonl", pause, keep, steps)
    _, trouble = trainer.communicate(timeout=120)
    assert trainer.returncode == 0, trouble
    out, trouble = follower.communicate(timeout=120)
    assert (follower.returncode, out) == (0, "until\n"), trouble
    wanted, found = rows(tmp_path / "trainer.jsonl"), rows(tmp_path / "follower.jsonl")
    assert len(wanted) == steps // 2
    assert len({row["val/loss"] for row in wanted}) == steps // 2
    if keep == 100:
        assert found == wanted
        assert "Warning" not in trouble
    else:  # those that were still there when it came to them: right, in order, and the last for certain
        by_step = {row["step"]: row for row in wanted}
        assert found == [by_step[row["step"]] for row in found]
        assert [row["step"] for row in found] == sorted({row["step"] for row in found})
        assert found[-1] == wanted[-1]
        assert "Traceback" not in trouble


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_process_that_waits_ends_upon_a_signal(tmp_path, number, reason):
    follower = start(FOLLOWER, tmp_path / "nothing", tmp_path / "out.jsonl", 5)
    assert follower.stdout is not None
    assert follower.stdout.readline() == "ready\n"
    time.sleep(0.3)
    follower.send_signal(number)
    out, trouble = follower.communicate(timeout=20)
    assert (follower.returncode, out, trouble) == (0, f"{reason}\n", "")
    assert not (tmp_path / "nothing").exists()


def test_it_reads_beside_a_writer_in_the_same_process(tmp_path, run):
    """The writer's lock is held all the while; a reader needs none."""
    found = []

    def look(record):
        if record.split == "train":
            saved = ft.Checkpoints(tmp_path).entries()
            records = ft.evaluate_checkpoints(tmp_path, run.state, {"val": run.evals["val"]}, **EAGER) if saved else ()
            found.append([one.step for one in records])

    run.fit(tmp_path, sinks=[look], epochs=3)
    assert found[-1][:3] == [3, 5, 6]


# -------------------------------------------------------------------------------------------------------------- bad input


def test_no_checkpoints(tmp_path, small):
    state, evals, _ = small
    for path, text in ((tmp_path / "gone", "no such folder"), (tmp_path, "there are no checkpoints")):
        with pytest.raises(CheckpointError, match=text):
            ft.evaluate_checkpoints(path, state, evals, **EAGER)
    (tmp_path / "file").write_text("")
    for follow in (False, True):
        with pytest.raises(CheckpointError, match="is a file"):
            ft.evaluate_checkpoints(tmp_path / "file", state, evals, follow=follow, **EAGER)


def test_the_checkpoint_itself_is_no_folder_of_checkpoints(tmp_path, small):
    state, evals, save = small
    save(tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"this is the checkpoint itself(.|\n)*step=4"):
        ft.evaluate_checkpoints(tmp_path / "4", state, evals, **EAGER)


def test_no_such_step(tmp_path, small):
    state, evals, save = small
    save(tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"there is no checkpoint of step 5(.|\n)*one of 4"):
        ft.evaluate_checkpoints(tmp_path, state, evals, steps=[4, 5], **EAGER)


def test_another_kind_of_state(tmp_path, small):
    _, evals, save = small
    save(tmp_path, 4)
    other = ft.init(torch.nn.Linear(2, 1), ft.optim.adam(0.1))
    sink = Sink()
    with pytest.raises(RestoreError, match=r"does not fit(.|\n)*opt/(.|\n)*params/weight: shape \[1, 1\]"):
        list(ft.evaluate_checkpoints(tmp_path, other, evals, sinks=[sink], **EAGER))
    assert (sink.records, sink.closed) == ([], ["error"])


BAD = {
    "like": ({"like": {"w": 1}}, StateError, "ft.evaluate_checkpoints wants a TrainState"),
    "no evals": ({"evals": {}}, ArgumentError, r"evals= makes no sense(.|\n)*ft.Evaluator"),
    "kind of evals": ({"evals": [1]}, ArgumentError, r"evals= makes no sense(.|\n)*list"),
    "an eval": ({"evals": {"val": print}}, ArgumentError, r"evals= makes no sense(.|\n)*'val': 'builtin_"),
    "steps": ({"steps": "newest"}, ArgumentError, r"steps= makes no sense(.|\n)*'newest'"),
    "no steps": ({"steps": []}, ArgumentError, r"steps= makes no sense"),
    "one step": ({"steps": 3}, ArgumentError, r"steps= makes no sense(.|\n)*got: +3"),
    "after": ({"after": "3"}, ArgumentError, r"after= makes no sense"),
    "by": ({"by": "loss"}, ArgumentError, r"go with steps=\"best\""),
    "best and follow": ({"steps": "best", "follow": True}, ArgumentError, r"does not follow"),
    "follow": ({"follow": 1}, ArgumentError, r"follow= makes no sense"),
    "until": ({"follow": True, "until": 100}, ArgumentError, r"until= makes no sense(.|\n)*ft.until\(steps=1000\)"),
    "fraction": ({"follow": True, "until": ft.until(fraction=0.5)}, LimitError, r"fraction of an epoch"),
    "timeout": ({"follow": True, "timeout": 0}, LimitError, r"timeout=0 makes no sense"),
    "poll": ({"follow": True, "poll": float("nan")}, LimitError, r"poll=nan makes no sense"),
    "until alone": ({"until": ft.until(steps=3)}, ArgumentError, r"until= goes with follow=True"),
    "timeout alone": ({"timeout": 3}, ArgumentError, r"timeout= goes with follow=True"),
    "poll alone": ({"poll": 3}, ArgumentError, r"poll= goes with follow=True"),
    "sinks": ({"sinks": print}, ArgumentError, r"sinks= makes no sense(.|\n)*sinks=\[print\]"),
    "select": ({"select": "parms"}, RestoreError, r"select='parms' matches no leaf"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path, small, case):
    state, evals, save = small
    save(tmp_path, 4)
    asked, error, text = BAD[case]
    given = {"like": state, "evals": evals, **asked}
    with pytest.raises(error, match=text):
        list(ft.evaluate_checkpoints(tmp_path, **given, **EAGER))


def test_bad_evaluators_are_found_before_anything_is_read(tmp_path, small):
    state, evals, _ = small
    step = evals["val"].step
    for one, error, text in (
        (ft.Evaluator(step, iter([torch.zeros(1, 1)])), DataError, "an iterator"),
        (ft.Evaluator(step, []), DataError, "no batches"),
        (ft.Evaluator(step, [torch.zeros(1, 1)], params="ema"), StateError, "no averaged parameters 'ema'"),
        (ft.Evaluator(step, [torch.zeros(1, 1)], limit=0), LimitError, "limit=0"),
    ):
        with pytest.raises(error, match=text):
            ft.evaluate_checkpoints(tmp_path / "not yet", state, {"val": one}, follow=True, **EAGER)


def test_the_warning_for_a_deleted_one_is_shown_each_time(tmp_path, small):
    """Python shows a warning of one text once; the step is in the text."""
    state, _, save = small
    save(tmp_path, 1)
    save(tmp_path, 2)
    found = Appearing(tmp_path, "all")
    due = found.due()
    shutil.rmtree(tmp_path / "1")
    shutil.rmtree(tmp_path / "2")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert [found.load(step, state) for step in due] == [None, None]
    assert len(caught) == 2
