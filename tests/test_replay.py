"""`ft.replay`: a step of a run, done again from the nearest checkpoint, to the last bit."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ftrain as ft
from ftrain.errors import ArgumentError, CheckpointError, LimitError, ReplayWarning, RestoreError
from ftrain.optim import apply_updates
from ftrain.steps.watching import watching

X, Y = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.drop(F.relu(self.norm(self.a(x)))))


def loss_fn(model, batch):
    logits = model(batch["x"])
    return F.cross_entropy(logits, batch["y"]), {"accuracy": ft.metrics.accuracy(logits, batch["y"])}


torch.manual_seed(0)
MODEL = Net()
TX = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.inject(ft.optim.adam)(lr=1e-2))
PLAIN = ft.train_step(MODEL, loss_fn, TX)
STEP = ft.with_ema(PLAIN, 0.9)
STATE = ft.init(MODEL, TX, seed=3)
DATA = {"x": X, "y": Y}
EVAL = ft.eval_step(MODEL, lambda model, batch: {"loss": F.cross_entropy(model(batch["x"]), batch["y"])})


def tremble():
    """A hook with memory, which changes the state from what an evaluation gave and from what it draws."""

    def init(state):
        return {"calls": torch.zeros((), dtype=torch.int64)}

    def update(state, memory, event):
        moved = {name: p + 1e-4 * torch.rand(p.shape) * event.metrics["val/loss"] for name, p in state.params.items()}
        return state.replace(params=moved), {"calls": memory["calls"] + 1}

    return ft.on("evaluation", ft.Hook("tremble", init, update))


def common(**more):
    val = ft.Evaluator(EVAL, [DATA], every=ft.every(steps=4))
    return {
        "batch_size": 8,
        "evals": {"val": val},
        "hooks": [tremble()],
        "compile": False,
        **more,
    }


def run(folder, step=STEP, data=DATA, every=7, **more):
    """A run that keeps all its states: what it was given before each step, and what it had after."""
    after, before = {}, {}

    def look(state, event):
        if event.kind == "step":
            after[event.step] = state.copy()
        return state

    def keep(called, state, batch):
        if isinstance(called, ft.CompiledStep) and called.step is not EVAL:
            before[state.counters().step + 1] = (state.copy(), ft.tree.map(torch.clone, batch))
        return called(state, batch)

    options = common(**more)
    hooks = [look, *options.pop("hooks")]
    ckpt = ft.Checkpoints(folder, every=ft.every(steps=every), keep=None, background=False)
    with watching(keep):
        result = ft.fit(
            STATE, step, data, steps=24, hooks=hooks, log=ft.every(steps=1), checkpoint=ckpt, progress=False, **options
        )
    return result, before, after


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return (folder, *run(folder))


def same(a, b):
    for (path, x), y in zip(ft.tree.items(a, "state"), ft.tree.leaves(b), strict=True):
        assert torch.equal(x, y), path


def loss_at(result, step):
    return next(r.metrics["loss"] for r in result.history if r.split == "train" and r.step == step)


# -- to the last bit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [8, 11, 14, 15, 22, 24])
def test_a_step_is_done_again_bit_by_bit(original, at):
    folder, result, before, after = original
    files = listing(folder)
    torch.manual_seed(11)
    drawn = torch.get_rng_state()
    found = ft.replay(folder, at, STATE, STEP, DATA, **common())
    assert listing(folder) == files
    assert torch.equal(torch.get_rng_state(), drawn)
    assert found.step == at
    assert found.checkpoint == (at - 1) // 7 * 7
    same(found.state_before, before[at][0])
    same(found.batch, before[at][1])
    same(found.state_after, after[at])
    assert found.state_after.counters().step == at
    assert float(found.metrics["loss"].compute()) == pytest.approx(loss_at(result, at), rel=1e-7)
    assert (found.recorded, found.agrees) == (loss_at(result, at), True)
    assert {"loss", "accuracy", "lr", "grad_norm"} <= set(found.metrics)
    assert STATE.counters().step == 0


def listing(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_the_gradients_make_the_update(original):
    folder, _, _, after = original
    found = ft.replay(ft.Checkpoints(folder), 11, STATE, STEP, DATA, **common())
    assert found.note is None
    assert found.gradients.keys() == STATE.params.keys()
    before = found.state_before
    updates, opt = TX.update(found.gradients, before.opt, before.params)
    same(apply_updates(before.params, updates), after[11].params)
    same(opt, after[11].opt)
    # They are those of this step: its dropout, its batch.
    other = ft.replay(folder, 12, STATE, STEP, DATA, **common())
    assert not torch.equal(other.gradients["a.weight"], found.gradients["a.weight"])


def test_the_hooks_matter(original):
    """Without what the hook does to the state, the steps after an evaluation are others; and its memory would be missing."""
    folder, _, _, after = original
    with pytest.raises(RestoreError, match=r"(?s)the checkpoint is of another run.*tremble") as caught:
        ft.replay(folder, 11, STATE, STEP, DATA, **common(hooks=[]))
    assert "step 7" in str(caught.value)
    with pytest.warns(ReplayWarning, match=r"(?s)step 11 does not come out as it was recorded.*hooks or evaluators"):
        quiet = ft.replay(folder, 11, STATE, STEP, DATA, **common(evals={}))  # no evaluation at step 8
    assert quiet.agrees is False
    assert not torch.equal(quiet.state_after.params["a.weight"], after[11].params["a.weight"])


def test_values_can_be_used_again_and_are_not_the_runs(original):
    folder, *_ = original
    found = ft.replay(folder, 11, STATE, STEP, DATA, **common())
    new, metrics = STEP(found.state_before, found.batch)
    same(new, found.state_after)
    assert float(metrics["loss"].compute()) == float(found.metrics["loss"].compute())
    module = ft.to_module(MODEL, found.state_before)
    assert module(found.batch["x"]).shape == (8, 3)
    text = repr(found)
    assert text.startswith("Replay(step=11, from the checkpoint of step 7)")
    assert "batch['x']: float32[8, 6] on cpu" in text
    assert "gradients  6 tensors, norm " in text
    assert f"loss={float(found.metrics['loss'].compute()):.6g}" in text


def test_a_run_that_was_resumed(tmp_path):
    """Replaying asks nothing of how many processes a run had."""
    whole, _, after = run(tmp_path / "whole")
    ckpt = ft.Checkpoints(tmp_path / "parts", every=ft.every(steps=7), keep=None)
    for steps in (10, 24):
        ft.fit(STATE, STEP, DATA, steps=steps, checkpoint=ckpt, resume="auto", progress=False, **common())
    found = ft.replay(tmp_path / "parts", 20, STATE, STEP, DATA, **common())
    same(found.state_after, after[20])
    assert whole.reason == "steps"


def test_while_the_run_goes_on(tmp_path):
    """The folder has a writer, and a reader does not mind."""
    seen = []

    def look(state, event):
        if event.kind == "step" and event.step == 10:
            seen.append(ft.replay(tmp_path, 9, STATE, PLAIN, DATA, **common(hooks=[], evals={})))
        return state

    kept = {}

    def keep(state, event):
        if event.kind == "step":
            kept[event.step] = state.copy()
        return state

    ckpt = ft.Checkpoints(tmp_path, every=ft.every(steps=7), keep=None, background=False)
    ft.fit(
        STATE, PLAIN, DATA, steps=12, hooks=[keep, look], batch_size=8, compile=False, checkpoint=ckpt, progress=False
    )
    same(seen[0].state_after, kept[9])


# -- compiled -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "at"), [("eager", 9), ("aot_eager", 14)])  # step 14 is of a short batch
def test_compiled_alike_it_is_bitwise(tmp_path, backend, at):
    step = ft.with_ema(ft.train_step(MODEL, loss_fn, TX), 0.9)
    more = {"compile": True, "backend": backend, "hooks": [], "evals": {}}
    _, before, after = run(tmp_path, step, **more)
    fresh = ft.with_ema(ft.train_step(MODEL, loss_fn, TX), 0.9)  # compiled anew
    found = ft.replay(tmp_path, at, STATE, fresh, DATA, **common(**more))
    same(found.state_before, before[at][0])
    same(found.state_after, after[at])
    assert found.note is None
    updates, _ = TX.update(found.gradients, found.state_before.opt, found.state_before.params)
    made = apply_updates(found.state_before.params, updates)
    for name, leaf in made.items():
        torch.testing.assert_close(leaf, after[at].params[name], rtol=1e-5, atol=1e-5)


def test_a_compiled_step_that_is_passed_is_used(tmp_path):
    fast = ft.compile(ft.train_step(MODEL, loss_fn, TX), backend="eager")
    more = {"hooks": [], "evals": {}}
    _, _, after = run(tmp_path, fast, **more)
    found = ft.replay(tmp_path, 11, STATE, fast, DATA, **common(**more))
    same(found.state_after, after[11])
    assert fast.compiles == 2  # for the first batch, and for the short one; none for the replay


def test_a_batch_goes_to_the_first_program_that_takes_it():
    """Not to the newest, which was compiled for all sizes: else rounding would depend on what the step was used for before."""
    ran = []

    def backend(graph, inputs):
        number = backend.made
        backend.made += 1

        def run(*args):
            ran.append(number)
            return graph(*args)

        return run

    backend.made = 0
    fast, state = ft.compile(ft.train_step(MODEL, loss_fn, TX), backend=backend), STATE.copy()
    for rows in (8, 8, 2, 8, 3, 8):
        state, _ = fast(state, {"x": X[:rows], "y": Y[:rows]})
    assert ran == [0, 0, 1, 0, 1, 0]


def test_other_draws_of_a_gradient_alone_are_said(tmp_path, monkeypatch):
    from ftrain.inspect import replaying

    fast = ft.compile(ft.train_step(MODEL, loss_fn, TX), backend="eager")
    _, _, after = run(tmp_path, fast, hooks=[], evals={})
    monkeypatch.setattr(
        replaying._Gradient, "__call__", lambda self, state, batch: {"grads": {}, "loss": state.seed * 0.5}
    )
    found = ft.replay(tmp_path, 11, STATE, fast, DATA, **common(hooks=[], evals={}))
    same(found.state_after, after[11])
    assert found.gradients is None
    assert "draws other random numbers" in found.note
    assert "gradients  none: in a graph of its own" in repr(found)


# -- steps of other kinds -----------------------------------------------------------------------------------------------------


def test_a_step_written_by_hand_has_no_gradient(tmp_path):
    update = ft.make_update(ft.value_and_grad(ft.bind(MODEL, loss_fn)), TX)

    def twice(state, batch):
        state, _ = update(state, batch)
        return update(state, batch)

    def bare(state, batch):
        new, metrics = PLAIN(state, batch)
        return new, metrics

    for name, step in (("as_step", ft.as_step(twice, uses=[update])), ("bare", bare)):
        _, _, after = run(tmp_path / name, step, hooks=[], evals={})
        found = ft.replay(tmp_path / name, 10, STATE, step, DATA, **common(hooks=[], evals={}))
        same(found.state_after, after[10])
        assert found.gradients is None
        assert "is a step written by hand, which has no single gradient" in found.note


@pytest.mark.parametrize(
    "make",
    [
        lambda: ft.with_swa(ft.with_ema(ft.train_step(MODEL, loss_fn, TX), 0.5), start=2),
        lambda: ft.train_step(MODEL, loss_fn, TX, accumulate=2),
        lambda: ft.make_step(ft.with_loss_scale(ft.value_and_grad(ft.bind(MODEL, loss_fn))), TX),
    ],
    ids=["averages", "accumulated", "loss-scale"],
)
def test_gradients_through_wrappers(tmp_path, make):
    data = [{"x": X[i : i + 8], "y": Y[i : i + 8]} for i in range(0, 48, 8)]
    more = {"hooks": [], "evals": {}, "batch_size": None}
    step = make()
    _, _, after = run(tmp_path, step, data, **more)
    found = ft.replay(tmp_path, 10, STATE, step, data, **common(**more))
    same(found.state_after, after[10])
    updates, _ = TX.update(found.gradients, found.state_before.opt, found.state_before.params)
    same(apply_updates(found.state_before.params, updates), after[10].params)


def test_a_window_is_a_batch(tmp_path):
    data = ft.data.window([{"x": X[i : i + 8], "y": Y[i : i + 8]} for i in range(0, 48, 8)], 2)
    more = {"hooks": [], "evals": {}, "batch_size": None}
    step = ft.train_step(MODEL, loss_fn, TX)
    _, before, after = run(tmp_path, step, data, **more)
    found = ft.replay(tmp_path, 10, STATE, step, data, **common(**more))
    same(found.batch, before[10][1])
    same(found.state_after, after[10])


def test_under_debug(original):
    folder, _, _, after = original
    with ft.debug():
        found = ft.replay(folder, 11, STATE, STEP, DATA, **common())
    same(found.state_after, after[11])
    assert found.gradients is not None


def test_an_error_in_the_step_comes_through(original):
    """What one replays a step for."""
    folder, *_ = original

    def failing(model, batch):
        if float(batch["x"][0, 0]) == float(marked[0, 0]):
            raise ZeroDivisionError("as planned")
        return loss_fn(model, batch)

    marked = ft.replay(folder, 11, STATE, STEP, DATA, **common()).batch["x"]
    step = ft.with_ema(ft.train_step(MODEL, failing, TX), 0.9)
    with pytest.raises(ZeroDivisionError), ft.debug():
        ft.replay(folder, 11, STATE, step, DATA, **common())


# -- what is wrong ------------------------------------------------------------------------------------------------------------


def test_no_checkpoint_before_the_step(original, tmp_path):
    folder, *_ = original
    late = ft.restore(folder, like=ft.replay(folder, 8, STATE, STEP, DATA, **common()).state_before)
    with pytest.raises(
        CheckpointError,
        match=r"(?s)no checkpoint before step 7.*below 7, or the state.*steps 7, 14, 21, 24, and a state that has taken 24",
    ) as caught:
        ft.replay(folder, 7, late, STEP, DATA, **common())
    assert "ft.at(0)" in str(caught.value)
    with pytest.raises(CheckpointError, match="there are no checkpoints"):
        ft.replay(tmp_path, 7, STATE, STEP, DATA, **common())
    ft.save(tmp_path / "by hand", STATE)
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint before step 7.*states that ft.save put there"):
        ft.replay(tmp_path / "by hand", 7, STATE, STEP, DATA, **common())


@pytest.mark.parametrize("at", [1, 4, 5, 7])
def test_a_step_before_the_first_checkpoint_begins_with_the_state(original, at):
    folder, result, before, after = original
    files = listing(folder)
    kept = STATE.copy()
    found = ft.replay(folder, at, STATE, STEP, DATA, **common())
    assert listing(folder) == files
    same(STATE, kept)
    assert found.checkpoint is None
    same(found.state_before, before[at][0])
    same(found.batch, before[at][1])
    same(found.state_after, after[at])
    assert (found.recorded, found.agrees) == (loss_at(result, at), True)
    assert repr(found).startswith(f"Replay(step={at}, from the state that was passed)")
    assert f"recorded   loss={loss_at(result, at):.6g}, the same" in repr(found)


def test_before_the_first_checkpoint_it_is_the_same_run_that_is_asked_for(original):
    folder, *_ = original
    with pytest.raises(RestoreError, match="seed: 3 in the checkpoint, 4 now"):
        ft.replay(folder, 5, ft.init(MODEL, TX, seed=4), STEP, DATA, **common())
    with pytest.raises(RestoreError, match="data batch_size: 8 in the checkpoint, 4 now"):
        ft.replay(folder, 5, STATE, STEP, DATA, **common(batch_size=4))
    later = ft.replay(folder, 2, STATE, STEP, DATA, **common()).state_after
    with pytest.raises(RestoreError, match=r"(?s)not the state with which the run began.*taken 0 steps.*taken 2"):
        ft.replay(folder, 5, later, STEP, DATA, **common())
    with pytest.raises(LimitError, match=r"(?s)the run ends before step 7.*a step up to 3"):
        ft.replay(folder, 7, STATE, STEP, DATA, steps=3, **common())


def test_a_damaged_later_checkpoint_does_not_matter_to_the_first_steps(tmp_path):
    _, _, after = run(tmp_path, hooks=[], evals={})
    for file in (tmp_path / "7").rglob("*"):
        if file.is_file() and "/d/" in str(file):
            file.write_bytes(b"\0" * file.stat().st_size)
    found = ft.replay(tmp_path, 5, STATE, STEP, DATA, **common(hooks=[], evals={}))
    same(found.state_after, after[5])


def test_a_run_whose_first_state_had_taken_steps(tmp_path):
    model, tx = nn.Linear(6, 3), ft.optim.sgd(0.1)
    step = ft.train_step(model, lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"]), tx)
    more = {"batch_size": 8, "compile": False}
    first = ft.fit(ft.init(model, tx, seed=3), step, DATA, steps=7, progress=False, **more).state  # all of an epoch
    kept = {}

    def keep(state, event):
        kept[event.step] = state.copy()
        return state

    ckpt = ft.Checkpoints(tmp_path, every=ft.every(steps=4), keep=None)
    log = {"log": ft.every(steps=1), "progress": False}
    ft.fit(first, step, DATA, steps=6, checkpoint=ckpt, hooks=[ft.on(ft.every(steps=1), keep)], **log, **more)
    for at in (8, 9):
        found = ft.replay(tmp_path, at, first, step, DATA, **more)
        assert (found.checkpoint, found.agrees) == (None, True)
        same(found.state_after, kept[at])


# -- the records --------------------------------------------------------------------------------------------------------------


def test_other_data_is_noticed(original):
    folder, result, *_ = original
    other = {"x": X + 1e-3, "y": Y}
    with pytest.warns(ReplayWarning) as caught:
        found = ft.replay(folder, 8, STATE, STEP, other, **common())
    (one,) = caught
    assert one.filename == __file__
    now = float(found.metrics["loss"].compute())
    text = str(one.message)
    assert text.startswith("ft.replay: step 8 does not come out as it was recorded.")
    assert f"expected: loss {loss_at(result, 8)!r}" in text
    assert f"{now:.6g}"[:6] in text.partition("got:")[2]
    for cause in ("other data", "compile= or backend=", "a hook that goes by the clock"):
        assert cause in text
    assert "another first state" not in text
    assert (found.recorded, found.agrees) == (loss_at(result, 8), False)
    assert "another one than here" in repr(found)


def test_another_first_state_is_noticed(original):
    folder, *_ = original
    other = STATE.replace(params={name: p * 1.01 for name, p in STATE.params.items()})
    with pytest.warns(ReplayWarning, match=r"(?s)step 3 does not.*another first state"):
        assert ft.replay(folder, 3, other, STEP, DATA, **common()).agrees is False


def test_records_of_several_steps_and_of_none_are_not_compared(tmp_path):
    ckpt = ft.Checkpoints(tmp_path, every=ft.every(steps=4), keep=None)
    more = common(hooks=[], evals={})
    ft.fit(STATE, STEP, DATA, steps=12, log=ft.every(steps=3), checkpoint=ckpt, progress=False, **more)
    # The records are of steps 1-3, 4-6, 7 alone (the end of an epoch), 8-9, and 10-12.
    found = {at: ft.replay(tmp_path, at, STATE, STEP, DATA, **more) for at in (1, 3, 5, 6, 7, 9, 12, 14)}
    assert {at: one.agrees for at, one in found.items()} == dict.fromkeys((1, 3, 5, 6, 9, 12, 14)) | {7: True}
    assert [one.recorded for at, one in found.items() if at != 7] == [None] * 7
    assert "recorded   no loss of this step alone, so nothing was compared" in repr(found[5])


def test_a_first_record_of_one_step_is_compared_and_nan_is_nan(tmp_path):
    def loss(model, batch):
        return model(batch["x"]).mean() * torch.where(batch["y"].sum() >= 0, math.nan, 1.0)

    first = ft.train_step(MODEL, loss_fn, TX)
    nan = ft.train_step(MODEL, loss, TX)

    def step(state, batch):
        return (first if int(state.step) == 0 else nan)(state, batch)

    more = common(hooks=[], evals={})
    ckpt = ft.Checkpoints(tmp_path, every=ft.every(steps=4), keep=None)
    ft.fit(STATE, step, DATA, steps=4, log=ft.every(steps=1), checkpoint=ckpt, progress=False, **more)
    assert ft.replay(tmp_path, 1, STATE, step, DATA, **more).agrees is True
    found = ft.replay(tmp_path, 2, STATE, step, DATA, **more)
    assert math.isnan(found.recorded)
    assert found.agrees is True


def test_steps_that_were_done_twice_are_not_compared(tmp_path):
    """A hook went back: which of the two a record is of cannot be told."""
    kept = {}

    def back(state, event):
        if event.step == 2:
            kept["state"] = state.copy()
        if event.step == 5 and "back" not in kept:
            kept["back"] = True
            return kept["state"].copy()
        return state

    more = common(hooks=[], evals={})
    ckpt = ft.Checkpoints(tmp_path, every=ft.every(steps=100), keep=None)
    hooks = [ft.on(ft.every(steps=1), back)]
    ft.fit(
        STATE, STEP, DATA, steps=6, log=ft.every(steps=1), checkpoint=ckpt, progress=False, **{**more, "hooks": hooks}
    )
    found = [ft.replay(tmp_path, at, STATE, STEP, DATA, **more) for at in (2, 4)]
    assert [one.agrees for one in found] == [True, None]


def test_records_that_cannot_be_read_are_said(tmp_path):
    _, _, after = run(tmp_path, hooks=[], evals={})
    (tmp_path / "history.jsonl").write_text("{")
    with pytest.warns(ReplayWarning, match=r"(?s)the loss of step 5 was compared with nothing.*records.*history"):
        found = ft.replay(tmp_path, 5, STATE, STEP, DATA, **common(hooks=[], evals={}))
    same(found.state_after, after[5])
    assert (found.recorded, found.agrees) == (None, None)


def test_the_first_steps_with_a_checkpoint_before_them(tmp_path):
    kept = {}

    def keep(state, event):
        if event.kind == "step":
            kept[event.step] = state.copy()
        return state

    ckpt = ft.Checkpoints(tmp_path, every=ft.at(0) | ft.every(steps=7), keep=None)
    ft.fit(STATE, STEP, DATA, steps=8, checkpoint=ckpt, progress=False, **common(hooks=[keep, tremble()]))
    for at in (1, 5, 7):
        found = ft.replay(tmp_path, at, STATE, STEP, DATA, **common())
        assert found.checkpoint == 0
        same(found.state_after, kept[at])


def test_a_step_after_the_newest_checkpoint(original):
    """The step at which a run died: later than anything that was saved."""
    folder, *_ = original
    found = ft.replay(folder, 27, STATE, STEP, DATA, **common())
    assert (found.checkpoint, found.state_after.counters().step) == (24, 27)


def test_a_step_beyond_the_end(original, tmp_path):
    folder, *_ = original
    with pytest.raises(LimitError, match=r"(?s)the run ends before step 30.*after 24.*its end after step 24: steps"):
        ft.replay(folder, 30, STATE, STEP, DATA, steps=24, **common())
    with pytest.raises(LimitError, match=r"(?s)the run ends before step 30.*its end after step 28: epochs"):
        ft.replay(folder, 30, STATE, STEP, DATA, epochs=4, **common())
    stop = ft.on(ft.at(9), lambda state, event: ft.Outcome(state, stop="enough"))
    ckpt = ft.Checkpoints(tmp_path, every=ft.every(steps=4), keep=None)
    more = common(hooks=[stop], evals={})
    ft.fit(STATE, STEP, DATA, steps=24, checkpoint=ckpt, progress=False, **more)
    with pytest.raises(LimitError, match=r"(?s)the run ends before step 12.*its end after step 9: enough"):
        ft.replay(tmp_path, 12, STATE, STEP, DATA, **more)


def test_another_run_is_refused(original):
    folder, *_ = original

    def refused(match, state=STATE, step=STEP, data=DATA, **more):
        with pytest.raises(RestoreError, match=match):
            ft.replay(folder, 11, state, step, data, **common(**more))

    refused("data batch_size: 8 in the checkpoint, 4 now", batch_size=4)
    refused("data samples|data length|data", data={"x": X[:40], "y": Y[:40]})
    refused("seed: 3 in the checkpoint, 4 now", state=ft.init(MODEL, TX, seed=4))
    refused("ema", step=PLAIN)
    other = ft.optim.sgd(0.1)
    refused("opt", state=ft.init(MODEL, other, seed=3), step=ft.with_ema(ft.train_step(MODEL, loss_fn, other), 0.9))


@pytest.mark.parametrize("at", [0, -1, 2.0, True, "11"])
def test_a_number_that_is_no_step(original, at):
    with pytest.raises(LimitError, match=r"(?s)ft.replay: at=.* is no step.*an integer >= 1"):
        ft.replay(original[0], at, STATE, STEP, DATA, **common())


def test_bad_arguments(original):
    with pytest.raises(ArgumentError, match=r"(?s)wants the checkpoints of a run.*got:.*TrainState"):
        ft.replay(STATE, 11, STATE, STEP, DATA)
    with pytest.raises(ft.errors.StateError, match="replay wants a TrainState"):
        ft.replay(original[0], 11, MODEL, STEP, DATA)
    with pytest.raises(ft.errors.StateError, match="replay"):
        ft.replay(original[0], 11, STATE, MODEL, DATA)
