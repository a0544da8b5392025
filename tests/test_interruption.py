"""What an exception carries, and what signals do: `error.ftrain`, checkpoints on exception, handlers put back."""

import os
import signal
import threading

import numpy as np
import psutil
import pytest
import torch

import ftrain as ft

from .test_resume import BATCHES, EVAL, MODEL, STEP, TX, Memory, assert_same, patience, run


class Trouble(Exception):
    pass


def fit(*, where, at, saver=None, step=STEP, compile=False, **more):
    """A run of three epochs in which the `at`-th call of something raises; fixed when `at` is None."""
    calls = []

    def maybe(place):
        calls.append(place)
        if place == where and calls.count(place) == at:
            raise Trouble(f"{place} {at}")

    def data(epoch):
        for batch in BATCHES:
            maybe("data")
            yield batch

    def hook(state, event):
        maybe("hook")
        return state

    def evaluate(state, batch):
        maybe("evaluation")
        return EVAL(state, batch)

    def broken(state, batch):
        maybe("step")
        return step(state, batch)

    broken.init = STEP.init
    return ft.fit(
        ft.init(MODEL, TX, seed=3),
        broken,
        data,
        epochs=3,
        evals={"val": ft.Evaluator(evaluate, BATCHES[:2], every=ft.every(steps=4) | ft.every(epochs=1))},
        hooks=[hook, patience()],
        sinks=[lambda record: maybe("sink")],
        log=ft.every(steps=3),
        progress=False,
        compile=compile,
        checkpoint=saver,
        **more,
    )


@pytest.mark.filterwarnings("ignore::ftrain.errors.DataWarning")
@pytest.mark.parametrize(
    ("where", "at", "expected"),
    [
        ("data", 10, "Failure(origin='step', at=9, step=9, epoch=1, batch=2"),
        ("data", 8, "Failure(origin='step', at=7, step=7, epoch=1, batch=0"),
        ("hook", 12, "Failure(origin='step', at=8, step=8, epoch=1, batch=0"),
        ("evaluation", 6, "Failure(origin='step', at=8, step=8, epoch=1, batch=0"),
        ("sink", 3, "Failure(origin='step', at=6, step=6, epoch=0, batch=6"),
    ],
)
def test_an_exception_carries_the_newest_state_and_the_run_goes_on_from_it(where, at, expected):
    whole = fit(where=None, at=None)
    saver = Memory(ft.every(epochs=100))
    with pytest.raises(Trouble, match=f"{where} {at}") as caught:
        fit(where=where, at=at, saver=saver)
    failure = caught.value.ftrain
    assert repr(failure).startswith(expected)
    assert failure.state.counters().step == failure.at
    assert failure.path == "memory"
    assert any("raised in ft.fit" in note for note in caught.value.__notes__)
    assert len(saver.shots) == 1
    assert_same(fit(where=None, at=None, saver=Memory(ft.every(epochs=100), saver.shots[0]), resume="auto"), whole)


def test_a_step_that_raises_has_not_consumed_its_state_where_it_is_eager():
    with pytest.raises(Trouble) as caught:
        fit(where="step", at=5)
    assert repr(caught.value.ftrain) == "Failure(origin='step', at=4, step=4, epoch=0, batch=4)"


class Failing(ft.CompiledStep):
    """A donated step that has consumed its state when it raises."""

    fail_at = None

    def __call__(self, state, batch):
        at = state.counters().step
        out = super().__call__(state, batch)
        if at == self.fail_at:
            raise Trouble("half-way")
        return out


def donated(fail_at):
    step = ft.compile(STEP, rung="eager")
    step.__class__ = Failing
    step.fail_at = fail_at
    return step


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "Failure(origin='start', at=0, step=5, epoch=0, batch=5)"),
        ({"snapshot": ft.every(steps=2)}, "Failure(origin='snapshot', at=4, step=5, epoch=0, batch=5"),
        ({"saver": True}, "Failure(origin='checkpoint', at=3, step=5, epoch=0, batch=5, path='memory')"),
        ({"donate": True}, "Failure(origin=None, at=None, step=5, epoch=0, batch=5)"),
    ],
    ids=["start", "snapshot", "checkpoint", "none"],
)
def test_where_the_donated_state_is_gone(options, expected):
    options = dict(options)
    if options.pop("saver", False):
        options["checkpoint"] = Memory(ft.every(steps=3))
    with pytest.raises(Trouble) as caught:
        ft.fit(ft.init(MODEL, TX, seed=3), donated(5), BATCHES, epochs=2, progress=False, compile=False, **options)
    failure = caught.value.ftrain
    assert repr(failure).startswith(expected)
    if failure.at is None:
        assert failure.state is None
    else:
        assert failure.state.counters().step == failure.at
        ft.loop(failure.state, STEP, BATCHES)  # it is valid


def test_a_snapshot_is_saved_and_gone_on_from():
    whole = run("list", hook=patience(), step=donated(-1))
    saver = Memory(ft.every(epochs=100))
    with pytest.raises(Trouble) as caught:
        run("list", saver, step=donated(12), snapshot=ft.every(steps=5))
    assert caught.value.ftrain.origin == "snapshot"
    assert saver.shots[-1].state.counters().step == 10
    assert_same(run("list", Memory(ft.every(epochs=100), saver.shots[-1]), resume="auto", step=donated(-1)), whole)


def test_nothing_is_saved_where_that_is_not_asked_for():
    saver = Memory(ft.every(epochs=100))
    saver.on_exception = False
    with pytest.raises(Trouble) as caught:
        fit(where="data", at=10, saver=saver)
    assert not saver.shots
    assert caught.value.ftrain.origin == "step"


def test_a_loss_that_is_wrong_from_the_start_is_not_saved():
    saver = Memory(ft.every(epochs=100))
    step = ft.train_step(MODEL, lambda model, batch: model(batch["x"]).sum() * float("nan"), TX)
    with pytest.raises(ft.errors.LossError) as caught:
        ft.fit(ft.init(MODEL, TX), step, BATCHES, progress=False, compile=False, checkpoint=saver)
    assert not saver.shots
    assert caught.value.ftrain.origin == "start"


def test_a_checkpoint_that_cannot_be_written_does_not_hide_the_error():
    class Full(Memory):
        def save(self, shot):
            raise OSError(28, "No space left on device")

    with pytest.raises(Trouble) as caught:
        fit(where="data", at=10, saver=Full(ft.every(epochs=100)))
    assert any("could not be written: [Errno 28]" in note for note in caught.value.__notes__)


# -- signals --------------------------------------------------------------------------------------------------------------------


def interrupting(times, number=signal.SIGINT):
    """A hook that sends a signal at the third step."""

    def hook(state, event):
        if event.kind == "step" and event.clock.steps == 3:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return state

    return hook


def quick(**more):
    return ft.fit(ft.init(MODEL, TX), STEP, BATCHES, epochs=9, progress=False, compile=False, **more)


def test_the_first_ctrl_c_ends_the_run_and_gives_its_result():
    statuses = []

    def sink(record):
        pass

    sink.close = statuses.append
    result = quick(hooks=[interrupting(1)], sinks=[sink])
    assert result.reason == "interrupted"
    assert result.state.counters().step == 3
    assert statuses == ["interrupted"]
    assert result.history[-1].step == 3


def test_the_second_ctrl_c_raises_at_once():
    with pytest.raises(KeyboardInterrupt) as caught:
        quick(hooks=[interrupting(2)])
    assert caught.value.ftrain.origin == "step"
    assert caught.value.ftrain.state.counters().step == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_raises_as_ever_without_signals():
    with pytest.raises(KeyboardInterrupt):
        quick(hooks=[interrupting(1)], signals=False)


def test_handlers_of_the_user_are_called_too_and_put_back():
    heard = []

    def mine(number, frame):
        heard.append(number)

    before = signal.signal(signal.SIGTERM, mine)
    try:
        assert quick(hooks=[interrupting(1, signal.SIGTERM)]).reason == "terminated"
        assert heard == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_handlers_are_put_back_after_an_exception():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(Trouble):
        fit(where="data", at=3)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        assert quick(hooks=[interrupting(1, signal.SIGUSR1)]).reason == "epochs"
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_in_a_thread_there_are_no_handlers():
    results = []
    thread = threading.Thread(target=lambda: results.append(quick()))
    thread.start()
    thread.join()
    assert results[0].reason == "epochs"


def test_an_exception_of_the_data_after_ctrl_c_is_not_raised():
    """Workers of a DataLoader get the Ctrl-C of the terminal as well, and die of it."""

    def data(epoch):
        yield from BATCHES[:3]
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly")

    result = ft.fit(ft.init(MODEL, TX), STEP, data, epochs=9, progress=False, compile=False)
    assert (result.reason, result.state.counters().step) == ("interrupted", 3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"resume": "auto"}, r'resume= makes no sense.*checkpoint=ft.Checkpoints\("run/ckpt"\), resume="auto"'),
        ({"checkpoint": "run/ckpt"}, r'checkpoint= makes no sense.*got: +str.*ft.Checkpoints\("run/ckpt"\)'),
        ({"snapshot": 100}, r"snapshot= makes no sense.*got: +int.*snapshot=ft.every\(steps=100\)"),
    ],
    ids=["resume", "checkpoint", "snapshot"],
)
def test_bad_arguments(options, text):
    with pytest.raises(ft.errors.LimitError, match=f"(?s){text}"):
        quick(**options)


@pytest.mark.parametrize(
    ("start", "kind", "text"),
    [
        (3, ft.errors.DataError, "start=3 is no position.*what tick.position.. gave"),
        (ft.Position(4), ft.errors.StateError, "not of the same moment.*a state in epoch 4.*got: +epoch 0, 0 steps"),
    ],
    ids=["number", "epoch"],
)
def test_bad_starts_of_a_loop(start, kind, text):
    with pytest.raises(kind, match=f"(?s){text}"):
        ft.loop(ft.init(MODEL, TX), STEP, BATCHES, start=start)


def test_a_last_save_that_fails_after_ctrl_c_is_not_hidden():
    class Full(Memory):
        def wait(self):
            raise ft.errors.CheckpointError("the disk is full")

    with pytest.raises(ft.errors.CheckpointError, match="the disk is full") as caught:
        quick(hooks=[interrupting(1)], checkpoint=Full(ft.every(epochs=9)))
    assert caught.value.ftrain.state.counters().step == 3


def test_a_second_sigterm_does_not_end_the_process_while_it_saves():
    class Slow(Memory):
        def wait(self):
            os.kill(os.getpid(), signal.SIGTERM)

    saver = Slow(ft.every(epochs=9))
    result = quick(hooks=[interrupting(1, signal.SIGTERM)], checkpoint=saver)
    assert result.reason == "terminated"
    assert len(saver.shots) == 1


@pytest.mark.parametrize("how", ["signal", "error"])
def test_hooks_that_drew_before_an_evaluation_that_did_not_end_are_not_called_again(how):
    def go(saver, armed, **more):
        calls = []

        def evaluate(state, batch):
            calls.append(batch)
            if armed and len(calls) == 1:
                if how == "error":
                    raise Trouble
                os.kill(os.getpid(), signal.SIGINT)
            return EVAL(state, batch)

        def draws(state, event):
            return ft.Outcome(state, {"drawn": float(np.random.rand())})

        evals = {"val": ft.Evaluator(evaluate, BATCHES[:2], every=ft.every(steps=4) | ft.every(epochs=1))}
        hooks = [ft.on("step", draws)]
        options = {"epochs": 3, "log": ft.every(steps=3), "progress": False, "compile": False}
        state = ft.init(MODEL, TX, seed=3)
        return ft.fit(state, STEP, BATCHES, evals=evals, hooks=hooks, checkpoint=saver, **options, **more)

    whole = go(None, False)
    saver = Memory(ft.every(epochs=100))
    if how == "error":
        with pytest.raises(Trouble):
            go(saver, True)
    else:
        assert go(saver, True).reason == "interrupted"
    assert_same(go(Memory(ft.every(epochs=100), saver.shots[0]), False, resume="auto"), whole)


def test_seconds_go_on_where_they_were():
    saver = Memory(ft.every(steps=2))
    first = quick(checkpoint=saver, log=ft.every(steps=1))
    again = quick(checkpoint=Memory(ft.every(epochs=9), saver.shots[0]), resume="auto", log=ft.every(steps=1))
    for history in (first.history, again.history):
        seconds = [record.seconds for record in history]
        assert seconds == sorted(seconds)
    assert saver.shots[0].position.clock.seconds >= first.history[1].seconds


def test_workers_that_persist_end_with_the_run():
    loader = torch.utils.data.DataLoader(BATCHES, batch_size=None, num_workers=1, persistent_workers=True)
    before = set(psutil.Process().children())
    for data in (loader, ft.data.window(loader, 2)):
        ft.fit(ft.init(MODEL, TX), STEP, data, epochs=2, progress=False, compile=False)
        assert set(psutil.Process().children()) == before
        with pytest.raises(Trouble):
            fit_on(data)
        assert set(psutil.Process().children()) == before
    state = STEP.init(ft.init(MODEL, TX))
    ft.evaluate(state, EVAL, loader, compile=False)
    next(ft.predict(state, ft.predict_step(MODEL, lambda m, batch: m(batch["x"])), loader, compile=False))
    ticks = ft.loop(state, STEP, loader)
    next(ticks)
    ticks.close()
    assert set(psutil.Process().children()) == before


def fit_on(data):
    def hook(state, event):
        raise Trouble

    ft.fit(ft.init(MODEL, TX), STEP, data, epochs=2, progress=False, compile=False, hooks=[ft.on("step", hook)])


def test_ctrl_c_after_another_signal_raises_at_once():
    """Somebody who does not want to wait for what SIGTERM asked for."""

    def hook(state, event):
        if event.kind == "step" and event.clock.steps == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        return state

    with pytest.raises(KeyboardInterrupt):
        quick(hooks=[hook])


def test_an_eager_donated_step_may_give_its_state_back_as_it_was():
    step = ft.compile(lambda state, batch: (state, {}), rung="eager")
    state, _ = step(ft.init(MODEL, TX), BATCHES[0])
    assert state.counters().step == 0
