"""Corners of going on: each of these runs once ended otherwise than the run that was not stopped, or lost something."""

import json
import os
import resource
import signal
from dataclasses import dataclass, replace

import pytest

import ftrain as ft
from ftrain.checkpoint.journal import Journal
from ftrain.sinks import Record

from .test_interruption import Failing
from .test_resume import BATCHES, EVAL, MODEL, STEP, TX, Memory, assert_same

pytestmark = pytest.mark.filterwarnings("ignore::ftrain.errors.DataWarning")


def fit(saver=None, *, data=BATCHES, step=STEP, evaluate=EVAL, **more):
    options = {"epochs": 3, "log": ft.every(steps=7), "progress": False, "compile": False, **more}
    every = ft.every(steps=7) | ft.every(epochs=1)
    evals = {"val": ft.Evaluator(evaluate, BATCHES[:2], every=every)}
    return ft.fit(ft.init(MODEL, TX, seed=3), step, data, evals=evals, checkpoint=saver, **options)


def terminating(function, at):
    """A function that is sent SIGTERM at its `at`-th call."""
    calls = []

    def call(*args):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args)

    call.init = getattr(function, "init", lambda state: state)
    return call


def generate(epoch):
    yield from BATCHES


@pytest.mark.parametrize("data", [BATCHES, generate], ids=["list", "function"])
def test_left_in_the_evaluation_of_an_epochs_last_step(data):
    """Whether a step is the last one cannot be seen any more by whoever goes on, where the data does not know its length."""
    whole = fit(data=data)
    saver = Memory(ft.every(epochs=100))
    assert fit(saver, data=data, evaluate=terminating(EVAL, 1)).reason == "terminated"
    assert_same(fit(Memory(ft.every(epochs=100), saver.shots[-1]), data=data, resume="auto"), whole)


@pytest.mark.parametrize(
    "limit",
    [{"steps": 7}, {"until": ft.until(steps=14)}, {"until": ft.every(steps=7)}],
    ids=["steps", "until", "every"],
)
def test_left_after_the_last_step_of_the_last_epoch(limit):
    """The limit is reached, but the epoch is not over yet: it is evaluated and counted, as ever."""
    whole = fit(epochs=None, **limit)
    saver = Memory(ft.every(epochs=100))
    steps = whole.state.counters().step
    assert fit(saver, epochs=None, step=terminating(STEP, steps), **limit).reason == "terminated"
    assert_same(fit(Memory(ft.every(epochs=100), saver.shots[-1]), epochs=None, resume="auto", **limit), whole)


@pytest.mark.parametrize("words", ["epochs", "steps", "until", "enough"])
def test_a_hooks_words_hold_whatever_they_are(words):
    def hook(state, event):
        return ft.Outcome(state, None, words if event.step == 5 and event.kind == "step" else None)

    whole = fit(hooks=[hook])
    assert whole.reason == words
    saver = Memory(ft.every(epochs=100))
    fit(saver, hooks=[hook])
    assert_same(fit(Memory(ft.every(epochs=100), saver.shots[-1]), hooks=[hook], resume="auto"), whole)


def test_a_hooks_stop_holds_where_a_sink_fails_at_the_same_step():
    def hook(state, event):
        return ft.Outcome(state, None, "enough" if event.step == 5 and event.kind == "step" else None)

    def broken(record):
        raise OSError("connection lost")

    options = {"hooks": [hook], "log": ft.every(steps=5)}
    whole = fit(**options)
    saver = Memory(ft.every(epochs=100))
    with pytest.raises(OSError, match="connection lost"):
        fit(saver, sinks=[broken], **options)
    assert_same(fit(Memory(ft.every(epochs=100), saver.shots[-1]), resume="auto", **options), whole)


@pytest.mark.parametrize("data", [BATCHES, generate], ids=["list", "function"])
def test_the_first_step_of_an_epoch_fails_and_a_batch_was_carried_into_it(data):
    """The epoch before is the place to go on from, with what it had left over, though the next epoch has taken that already."""

    def broken(state, batch):
        if state.counters().step == 3:
            raise OSError("no more paper")
        return STEP(state, batch)

    broken.init = STEP.init
    options = {"data": ft.data.window(data, 2, short="carry")}
    whole = fit(**options)
    saver = Memory(ft.every(epochs=100))
    with pytest.raises(OSError, match="no more paper"):
        fit(saver, step=broken, **options)
    assert len(saver.shots[-1].position.data["over"]) == 1
    assert_same(fit(Memory(ft.every(epochs=100), saver.shots[-1]), resume="auto", **options), whole)


def test_more_is_carried_into_an_epoch_than_it_has_batches():
    """Windows of what was carried are due, and the epoch has nothing more that would tell how a batch is built."""

    def data(epoch):
        yield from (BATCHES[:5] if epoch == 0 else BATCHES[5:6])

    options = {"data": ft.data.window(data, lambda epoch: [6, 2, 2, 3][epoch], short="carry"), "epochs": 4}
    whole = fit(**options)
    saver = Memory(ft.every(steps=1))
    fit(saver, **options)
    assert len(saver.shots) >= 3
    for shot in saver.shots:
        second = Memory(ft.every(steps=1), replace(shot, state=shot.state.copy()))
        assert_same(fit(second, resume="auto", **options), whole)
        for later in second.shots:
            assert_same(fit(Memory(ft.every(steps=100), later), resume="auto", **options), whole)


@dataclass(frozen=True)
class Frozen(Exception):
    """An exception whose attributes cannot be set."""

    code: int


def test_an_exception_that_refuses_attributes():
    def hook(state, event):
        if event.step == 2:
            raise Frozen(3)
        return state

    with pytest.raises(Frozen) as caught:
        fit(Memory(ft.every(epochs=100)), hooks=[hook])
    assert repr(caught.value.ftrain).startswith("Failure(origin='step', at=2")
    assert any("raised in ft.fit" in note for note in caught.value.__notes__)


def test_a_failed_step_is_not_hidden_by_a_signal_where_it_has_consumed_its_state():
    class Late(Failing):
        """Fails in the step during which the signal comes."""

        def __call__(self, state, batch):
            if state.counters().step == 5:
                signal.raise_signal(signal.SIGTERM)
            return super().__call__(state, batch)

    step = ft.compile(STEP, rung="eager")
    step.__class__ = Late
    step.fail_at = 5
    saver = Memory(ft.every(steps=3))
    with pytest.raises(Exception, match="half-way") as caught:
        fit(saver, step=step)
    assert repr(caught.value.ftrain).startswith("Failure(origin='checkpoint', at=3, step=5")


def test_what_a_sinks_close_raises_carries_the_state():
    def sink(record):
        pass

    def close(status):
        raise OSError("connection lost")

    sink.close = close
    with pytest.raises(OSError, match="connection lost") as caught:
        fit(sinks=[sink])
    assert caught.value.ftrain.state.counters().step == 21


def test_the_state_of_an_exception_is_in_the_checkpoint_of_its_step(tmp_path):
    def sink(record):
        if record.split == "val" and record.epoch == 1:
            raise OSError("no more paper")

    with pytest.raises(OSError, match="no more paper") as caught:
        fit(ft.Checkpoints(tmp_path), sinks=[sink])
    failure = caught.value.ftrain
    assert (failure.at, failure.path) == (7, str(tmp_path))


def test_the_folder_of_the_process_may_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def hook(state, event):
        if event.step == 2:
            os.chdir("elsewhere")
        return state

    whole = fit()
    options = {"every": ft.every(steps=3)}
    fit(ft.Checkpoints("ein Pfad/ü", **options), hooks=[ft.on(ft.at(2), hook)], epochs=None, steps=9)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert_same(fit(ft.Checkpoints(tmp_path / "ein Pfad/ü", **options), resume="auto"), whole)


def test_a_file_of_somebody_else_is_not_emptied(tmp_path):
    mine = tmp_path / "history.jsonl"
    for text in ('{"loss": 1.0}\n', "notes\n", "no line", '{"step": 3}\n'):
        mine.write_text(text)
        with pytest.raises(ft.errors.CheckpointError, match=r"(?s)no run's records.*history\.jsonl.*checkpoints"):
            fit(ft.Checkpoints(tmp_path), resume="auto")
        assert mine.read_text() == text


@pytest.mark.parametrize("cut", [1, 5, 30, None])
def test_records_of_a_run_that_was_killed_before_its_first_checkpoint_are_emptied(tmp_path, cut):
    journal = Journal(tmp_path / "history.jsonl")
    journal.append([Record(1, 0, 8, 0.5, "train", {"loss": 2.0})], 0)
    journal.path.write_bytes(journal.path.read_bytes()[:cut])
    journal.begin()
    assert journal.path.read_bytes() == b""


def test_records_that_could_not_be_written_whole_leave_nothing_behind(tmp_path, monkeypatch):
    """A disk that is full for a moment: the save upon the exception, and all later ones, have their records."""
    whole = fit(log=ft.every(steps=1))
    append, calls = Journal.append, []

    def full(self, records, size):
        calls.append(size)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if len(calls) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, hard))
        try:
            return append(self, records, size)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(Journal, "append", full)
    ckpt = ft.Checkpoints(tmp_path, every=ft.every(steps=2))
    with pytest.raises(
        ft.errors.CheckpointError, match=r"(?s)records of the run could not be written.*File too large"
    ) as e:
        fit(ckpt, log=ft.every(steps=1))
    assert (e.value.ftrain.at, e.value.ftrain.path) == (6, str(tmp_path))
    assert_same(fit(ckpt, log=ft.every(steps=1), resume="auto"), whole)
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [record.step for record in whole.history]


def test_a_failure_waits_for_the_save_that_is_under_way():
    """A snapshot in memory that is older than the checkpoint being written is not what the exception carries."""

    class Slow(Memory):
        def wait(self):
            self.complete = True

        def newest(self):
            return super().newest() if getattr(self, "complete", False) else None

    step = ft.compile(STEP, rung="eager")
    step.__class__ = Failing
    step.fail_at = 5
    with pytest.raises(Exception, match="half-way") as caught:
        fit(Slow(ft.every(steps=5)), step=step, snapshot=ft.every(steps=4))
    assert repr(caught.value.ftrain).startswith("Failure(origin='checkpoint', at=5")
