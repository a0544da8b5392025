"""Law 6 in one process: a run that is stopped anywhere and goes on from its snapshot is the run that was not stopped.

Checkpoints on disk, other processes and `kill -9` are in test_crash.py; here a checkpointer keeps snapshots in memory.
"""

import copy
import os
import signal
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ftrain as ft

X, Y = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.drop(F.relu(self.norm(self.a(x)))))


def loss_fn(model, batch):
    logits = model(batch["x"])
    noise = torch.from_numpy(np.random.rand(1)).float() if not torch.compiler.is_compiling() else torch.zeros(1)
    return F.cross_entropy(logits, batch["y"]) + 0 * noise.sum(), {"accuracy": ft.metrics.accuracy(logits, batch["y"])}


torch.manual_seed(0)
MODEL = Net()
TX = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(ft.schedules.warmup_cosine(1e-2, 3, 40)))
STEP = ft.with_ema(ft.train_step(MODEL, loss_fn, TX), 0.9)
EVAL = ft.eval_step(MODEL, lambda model, batch: {"loss": F.cross_entropy(model(batch["x"]), batch["y"])})
BATCHES = [{"x": X[i : i + 8], "y": Y[i : i + 8]} for i in range(0, 50, 8)]


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor

    def __getitem__(self, name):
        return getattr(self, name) if isinstance(name, str) else tuple.__getitem__(self, name)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 50

    def __getitem__(self, i):
        return {"x": X[i] + 0.1 * torch.randn(6), "y": Y[i]}


def generate(epoch):
    for i in np.random.permutation(len(BATCHES)):
        yield BATCHES[i]


DATA = {
    "arrays": lambda: {"data": {"x": X, "y": Y}, "batch_size": 8},
    "list": lambda: {"data": BATCHES},
    "function": lambda: {"data": generate},
    "loader": lambda: {"data": torch.utils.data.DataLoader(Rows(), batch_size=8, shuffle=True)},
    "window-step": lambda: {"data": ft.data.window(BATCHES, 3)},
    "window-carry": lambda: {"data": ft.data.window({"x": X, "y": Y}, 3, short="carry", batch_size=8)},
    "window-huge": lambda: {"data": ft.data.window(BATCHES, 10, short="carry")},
    "window-pair": lambda: {"data": ft.data.window([Pair(b["x"], b["y"]) for b in BATCHES], 3, short="carry")},
    "window-sizes": lambda: {"data": ft.data.window(BATCHES, lambda epoch: (10, 4, 2)[epoch], short="carry")},
    "window-generator": lambda: {"data": ft.data.window(generate, 3, short="carry")},
}


class Memory:
    """Keeps every snapshot in memory, and goes on from a chosen one."""

    path, on_exception, on_signal = "memory", True, True

    def __init__(self, every, found=None):
        self.every, self.found, self.shots, self.last = every, found, [], None

    def open(self, like, *, resume, facts, evaluators, optimizers):
        return self

    def save(self, shot):
        frozen = copy.deepcopy(dict(shot.notes))
        self.shots.append(
            ft.Snapshot(shot.state.copy(), copy.deepcopy(shot.position), frozen, list(shot.records), shot.ended)
        )
        self.last = shot.state.counters().step

    def undo(self, step):
        # What was kept stays, so that tests can go on from it, but counts no more.
        self.last = max((n for n in (shot.state.counters().step for shot in self.shots) if n <= step), default=None)

    def amend(self, shot):
        assert self.found.notes["pending"] is not None

    def check_metrics(self, evaluator, metrics):
        assert evaluator == "val"

    def newest(self):
        return self.last

    def load(self, step):
        return self.shots[-1].state

    def wait(self):
        return None

    def close(self, cut=False):
        return None


def patience(limit=10**9):
    """A hook with memory: how often the evaluation got worse."""

    def init(state):
        return {"best": torch.tensor(float("inf")), "bad": torch.zeros((), dtype=torch.int64)}

    def update(state, memory, event):
        better = event.metrics["val/loss"] < float(memory["best"])
        best = torch.tensor(event.metrics["val/loss"]) if better else memory["best"]
        bad = torch.zeros_like(memory["bad"]) if better else memory["bad"] + 1
        stop = f"no better for {limit} evaluations" if int(bad) >= limit else None
        drawn = {"drawn": float(np.random.rand()), "bad": float(bad)}
        return ft.Outcome(state, drawn, stop), {"best": best, "bad": bad}

    return ft.on("evaluation", ft.Hook("patience", init, update))


def run(kind, saver=None, *, epochs=3, hook=None, step=STEP, **more):
    arguments = DATA[kind]()
    options = {
        "epochs": epochs,
        "evals": {"val": ft.Evaluator(EVAL, BATCHES[:2], every=ft.every(steps=4) | ft.every(epochs=1))},
        "hooks": [hook or patience()],
        "log": ft.every(steps=3),
        "progress": False,
        "compile": False,
    }
    state = ft.init(MODEL, TX, seed=3)
    return ft.fit(state, step, arguments.pop("data"), **arguments, **options, checkpoint=saver, **more)


def rows(history):
    """Records without their clocks."""
    return [(r.step, r.epoch, r.samples, r.split, dict(r.metrics)) for r in history]


def assert_same(a, b):
    assert a.reason == b.reason
    ft.tree.check_same(a.state, b.state, root="state", what="differs")
    for (path, one), two in zip(ft.tree.items(a.state, "state"), ft.tree.leaves(b.state), strict=True):
        assert torch.equal(one, two), path
    assert rows(a.history) == rows(b.history)


@pytest.mark.filterwarnings(
    "ignore::ftrain.errors.DataWarning"
)  # that some data is read again is said in test_loaders.py
@pytest.mark.parametrize("kind", DATA)
def test_going_on_from_any_snapshot_gives_the_run_that_was_not_stopped(kind):
    whole = run(kind)
    saver = Memory(ft.every(steps=1) | ft.every(epochs=1))
    assert_same(run(kind, saver), whole)  # saving changes nothing
    assert len(saver.shots) >= 2
    for shot in saver.shots:
        assert_same(run(kind, Memory(ft.every(epochs=100), shot), resume="auto"), whole)


def test_three_times_in_an_epoch():
    whole = run("arrays")
    found = None
    for limit in (9, 11, 13):
        saver = Memory(ft.every(steps=100), found)
        part = run("arrays", saver, epochs=None, steps=limit)
        assert part.reason == "steps"
        assert part.state.counters().step == limit
        found = saver.shots[-1]
    assert_same(run("arrays", Memory(ft.every(steps=100), found), resume="auto"), whole)


def test_a_run_that_was_complete_is_given_back():
    saver = Memory(ft.every(epochs=1))
    whole = run("arrays", saver)
    calls = []
    again = run("arrays", Memory(ft.every(epochs=1), saver.shots[-1]), resume="auto", sinks=[calls.append])
    assert_same(again, whole)
    assert not calls


def test_a_hooks_stop_holds():
    saver = Memory(ft.every(epochs=100))
    stopped = run("arrays", saver, epochs=30, hook=patience(limit=1))
    assert stopped.reason == "no better for 1 evaluations"
    again = run("arrays", Memory(ft.every(epochs=1), saver.shots[-1]), epochs=30, hook=patience(limit=1), resume="auto")
    assert_same(again, stopped)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=["INT", "TERM", "USR1"])
@pytest.mark.parametrize("where", ["step", "evaluation", "hook", "data"])
def test_a_signal_ends_the_run_at_a_step_and_it_goes_on(number, where):
    """Wherever the signal comes: what is going on ends, or is left and done again."""
    reason = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGUSR1: "preempted"}[number]
    whole = run("list")
    before = signal.getsignal(number)
    saver = Memory(ft.every(epochs=100))
    calls = []

    def kill(at, n=9):
        calls.append(at)
        if at == where and calls.count(at) == n:
            os.kill(os.getpid(), number)

    def step(state, batch):
        kill("step")
        return STEP(state, batch)

    step.init = STEP.init

    def data(epoch):
        for batch in BATCHES:
            kill("data")
            yield batch

    def evaluate(state, batch):
        kill("evaluation", 3)
        return EVAL(state, batch)

    def hook(state, event):
        kill("hook", 10)
        return state

    interrupted = ft.fit(
        ft.init(MODEL, TX, seed=3),
        step,
        data,
        epochs=3,
        evals={"val": ft.Evaluator(evaluate, BATCHES[:2], every=ft.every(steps=4) | ft.every(epochs=1))},
        hooks=[hook, patience()],
        log=ft.every(steps=3),
        progress=False,
        compile=False,
        checkpoint=saver,
    )
    assert interrupted.reason == reason
    assert interrupted.state.counters().step == {"step": 9, "evaluation": 7, "hook": 7, "data": 9}[where]
    assert signal.getsignal(number) is before
    assert len(saver.shots) == 1
    assert_same(run("list", Memory(ft.every(epochs=100), saver.shots[0]), resume="auto"), whole)


@pytest.mark.parametrize(
    "until",
    [ft.until(steps=9), ft.at(9), ft.until(epochs=2), ft.until(samples=60), ft.every(steps=4) & ft.every(epochs=1)],
    ids=str,
)
def test_until_holds_for_a_run_that_goes_on(until):
    saver = Memory(ft.every(steps=1) | ft.every(epochs=1))
    whole = run("list", saver, epochs=4, until=until)
    for shot in (*saver.shots[1::3], saver.shots[-1]):
        assert_same(run("list", Memory(ft.every(epochs=9), shot), epochs=4, until=until, resume="auto"), whole)
