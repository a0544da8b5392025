"""`ft.profile`: some steps of a run under torch's profiler, and nothing at the others; and `ft.inspect.split`."""

import json
import math

import pytest
import torch

import ftrain as ft
from ftrain.data.spans import LISTENER
from ftrain.errors import ArgumentError, DataError, HookError, LimitError, ProfileWarning
from ftrain.inspect import Split, split
from ftrain.loops.cadences import Clock
from ftrain.loops.calling import Hooks
from ftrain.steps.watching import WATCHER

MODEL, TX = torch.nn.Linear(3, 1), ft.optim.sgd(0.1)
STEP = ft.train_step(MODEL, lambda model, batch: model(batch).square().mean(), TX)
EVAL = ft.eval_step(MODEL, lambda model, batch: {"loss": model(batch).mean()})
STATE = ft.init(MODEL, TX, seed=0)
DATA = [torch.ones(4, 3)] * 8


def fit(*hooks, data=DATA, **more):
    options = {"progress": False, "compile": False, **more}
    return ft.fit(STATE, STEP, data, hooks=list(hooks), **options)


def names(folder):
    return sorted(file.name for file in folder.iterdir()) if folder.exists() else []


def calls(folder, name):
    """How often each range of ours is in a trace."""
    events = json.loads((folder / name).read_text())["traceEvents"]
    found = {}
    for event in events:
        if (
            str(event.get("name")).startswith("ftrain: ")
            and event.get("ph") == "X"
            and event["cat"] != "gpu_user_annotation"
        ):
            found[event["name"]] = found.get(event["name"], 0) + 1
    return found


def idle():
    return not torch.autograd._profiler_enabled() and WATCHER.get() is None and LISTENER.get() is None


@pytest.fixture(autouse=True)
def nothing_stays_open():
    yield
    assert idle()


# -- which steps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "windows"),
    [
        ({"at": (3, 5)}, [(3, 5)]),
        ({"at": 2}, [(2, 2)]),
        ({"at": 2, "steps": 3}, [(2, 4)]),
        ({"at": (1, 2)}, [(1, 2)]),
        ({"at": (8, 8)}, [(8, 8)]),
        ({"at": ft.at(0)}, [(1, 1)]),
        ({"at": ft.every(steps=3), "steps": 2}, [(4, 5), (7, 8)]),
        ({"at": ft.every(steps=2), "steps": 2}, [(3, 4), (5, 6), (7, 8)]),  # one after the other
        ({"at": ft.at(1) | ft.at(2), "steps": 3}, [(2, 4)]),  # what fires among them begins nothing
        ({"at": ft.every(fraction=0.25)}, [(3, 3), (5, 5), (7, 7)]),
    ],
    ids=str,
)
def test_the_steps_that_are_profiled(tmp_path, arguments, windows):
    fit(ft.profile(**arguments, path=tmp_path))
    stems = [f"{first}-{last}" for first, last in windows]
    assert names(tmp_path) == sorted(
        f"{kind}_{stem}.{end}" for stem in stems for kind, end in (("ops", "txt"), ("split", "json"), ("trace", "json"))
    )
    for (first, last), stem in zip(windows, stems, strict=True):
        assert calls(tmp_path, f"trace_{stem}.json")["ftrain: step"] == last - first + 1
        found = json.loads((tmp_path / f"split_{stem}.json").read_text())
        assert (found["first"], found["complete"], found["error"]) == (first, last - first + 1, None)


def test_across_epochs_and_at_an_epochs_end(tmp_path):
    fit(ft.profile(at=(3, 5), path=tmp_path / "a"), data=DATA[:4], epochs=2)
    assert calls(tmp_path / "a", "trace_3-5.json")["ftrain: step"] == 3
    fit(ft.profile(at=ft.every(epochs=1), path=tmp_path / "b"), data=DATA[:4], epochs=2)
    assert "trace_5-5.json" in names(tmp_path / "b")


def test_at_other_steps_it_is_not_called():
    hooks = Hooks([ft.profile(at=(10, 13))])
    assert not hooks.steady
    assert [m.step for m in hooks.moments(Clock(steps=0))] == [9]
    assert not any(hooks.listens("step", Clock(steps=n)) for n in (1, 5, 8))
    assert not hooks.listens("start", Clock())
    assert hooks.listens("step", Clock(steps=9))
    assert not hooks.listens("evaluation", Clock(steps=9))


def test_the_run_is_what_it_is_without(tmp_path):
    plain = fit()
    profiled = fit(ft.profile(at=(2, 4), path=tmp_path, memory=True, shapes=True))
    for a, b in zip(ft.tree.leaves(plain.state), ft.tree.leaves(profiled.state), strict=True):
        assert torch.equal(a, b)
    assert [r.metrics for r in plain.history] == [r.metrics for r in profiled.history]


def test_a_compiled_step_is_not_compiled_again(tmp_path):
    fast = ft.compile(ft.train_step(MODEL, lambda model, batch: model(batch).square().mean(), TX), backend="eager")
    ft.fit(STATE, fast, DATA, hooks=[ft.profile(at=(3, 5), path=tmp_path)], progress=False)
    assert fast.compiles == 1
    assert calls(tmp_path, "trace_3-5.json")["ftrain: step"] == 3


def test_the_same_hook_in_two_runs(tmp_path):
    hook = ft.profile(at=(2, 3), path=tmp_path)
    for _ in range(2):
        fit(hook)
        files = names(tmp_path)
        assert len(files) == 3
        for file in files:
            (tmp_path / file).unlink()
    with pytest.warns(ProfileWarning, match="nothing was profiled"):
        fit(hook, data=DATA[:1])
    fit(hook)
    assert len(names(tmp_path)) == 3


def test_two_hooks_with_other_steps(tmp_path):
    fit(ft.profile(at=(2, 3), path=tmp_path), ft.profile(at=(5, 6), path=tmp_path))
    assert {"trace_2-3.json", "trace_5-6.json"} <= set(names(tmp_path))


# -- what is written ----------------------------------------------------------------------------------------------------------


def test_the_table_and_the_options(tmp_path):
    fit(ft.profile(at=(2, 3), path=tmp_path / "a"))
    assert "aten::addmm" in (tmp_path / "a" / "ops_2-3.txt").read_text()
    fit(ft.profile(at=(2, 3), path=tmp_path / "b", trace=False, memory=True, rows=2))
    assert names(tmp_path / "b") == ["memory_2-3.txt", "ops_2-3.txt", "split_2-3.json"]
    text = (tmp_path / "b" / "memory_2-3.txt").read_text()
    assert "Self CPU Mem" in text
    rows = [
        line for line in (tmp_path / "b" / "ops_2-3.txt").read_text().splitlines() if "us " in line or "ms " in line
    ]
    assert len(rows) == 2
    fit(ft.profile(at=(2, 3), path=tmp_path / "c", shapes=True, stacks=True))
    assert "[4, 3]" in (tmp_path / "c" / "ops_2-3.txt").read_text()
    stacks = json.loads((tmp_path / "c" / "trace_2-3.json").read_text())["traceEvents"]
    assert any(event.get("cat") == "python_function" for event in stacks)
    plain = json.loads((tmp_path / "a" / "trace_2-3.json").read_text())["traceEvents"]
    assert not any(event.get("cat") == "python_function" for event in plain)


def busy(seconds):
    import time

    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_the_split_says_where_the_time_went(tmp_path):
    """Each part is made slow by a known time, and gets that time."""

    def data(epoch):
        for batch in DATA:
            busy(0.02)
            yield batch

    def slow_step(state, batch):
        busy(0.03)
        return STEP(state, batch)

    def slow_data(epoch):
        busy(0.05)
        yield DATA[0]

    def hook(state, event):
        busy(0.01)
        return state

    val = ft.Evaluator(EVAL, slow_data, every=ft.every(steps=2))
    options = {"hooks": [ft.on("step", hook), ft.profile(at=(3, 6), path=tmp_path)], "evals": {"val": val}}
    result = ft.fit(
        STATE,
        slow_step,
        data,
        steps=8,
        sinks=[lambda record: busy(0.015)],
        log=ft.every(steps=2),
        checkpoint=ft.Checkpoints(tmp_path / "ckpt", every=ft.every(steps=4), background=False),
        progress=False,
        compile=False,
        **options,
    )
    found = json.loads((tmp_path / "split_3-6.json").read_text())
    parts = found["parts"]
    assert found["seconds"] == pytest.approx(sum(parts.values()), rel=1e-6)
    # From the hooks of step 2 on, before its evaluation and records, to those of step 6, in which the profile ends.
    least = {"data": 4 * 0.02, "step": 4 * 0.03, "evaluation": 2 * 0.05, "hooks": 4 * 0.01, "sinks": 4 * 0.015}
    for part, seconds in least.items():
        assert 0.95 * seconds <= parts[part] <= seconds + 0.3, (part, parts)
    assert parts["checkpoint"] > 0
    assert set(parts) == {"data", "step", "evaluation", "hooks", "checkpoint", "sinks", "other"}
    # And of the whole run, from its records.
    whole = split(result.history)
    assert whole.seconds["data"] >= 8 * 0.02 * 0.95
    assert whole.seconds["evaluation"] >= 4 * 0.05 * 0.95
    assert whole.seconds["step"] >= 8 * 0.03 * 0.95


def test_evaluation_and_checkpoint_are_ranges_of_the_trace(tmp_path):
    val = ft.Evaluator(EVAL, DATA[:3], every=ft.every(steps=4))
    ckpt = ft.Checkpoints(tmp_path / "ckpt", every=ft.every(steps=4), background=False)
    fit(ft.profile(at=(3, 6), path=tmp_path), evals={"val": val}, checkpoint=ckpt)
    found = calls(tmp_path, "trace_3-6.json")
    assert found["ftrain: evaluation"] >= 1
    assert found["ftrain: checkpoint"] >= 1
    assert found["ftrain: step"] == 4 + 3
    assert found["ftrain: data"] == 4 + 3 + 1  # with the end of the evaluation's
    split_ = json.loads((tmp_path / "split_3-6.json").read_text())["parts"]
    assert split_["evaluation"] > 0


def test_a_hook_that_evaluates_counts_as_a_hook(tmp_path):
    def slow(model, batch):
        busy(0.05)
        return {"loss": model(batch).mean()}

    reader = ft.eval_step(MODEL, slow)
    look = ft.on(ft.at(3), lambda state, event: ft.evaluate(state, reader, DATA[:2], compile=False) and state)
    fit(look, ft.profile(at=(3, 4), path=tmp_path))
    parts = json.loads((tmp_path / "split_3-4.json").read_text())["parts"]
    assert 0.09 < parts["hooks"] < 0.5
    assert parts["step"] < 0.05


# -- what goes wrong ----------------------------------------------------------------------------------------------------------


def test_steps_that_are_not_reached_are_said(tmp_path):
    with pytest.warns(
        ProfileWarning, match=r"nothing was profiled: the run was over after step 8, before steps 20 to 23"
    ):
        fit(ft.profile(at=(20, 23), path=tmp_path / "none"))
    with pytest.warns(ProfileWarning, match=r"over after step 8, before steps 9 to 9"):
        fit(ft.profile(at=9, path=tmp_path / "none"))
    with pytest.warns(ProfileWarning, match=r"before 2 steps after every\(steps=100\)"):
        fit(ft.profile(at=ft.every(steps=100), steps=2, path=tmp_path / "none"))
    assert names(tmp_path / "none") == []
    with pytest.warns(ProfileWarning, match=r"over after step 8, so only 2 of 4 steps \(7 to 10\) were profiled"):
        fit(ft.profile(at=(7, 10), path=tmp_path))
    assert "trace_7-8.json" in names(tmp_path)


def test_a_run_that_goes_on(tmp_path):
    """Among the steps: the rest of them. Behind them: nothing, and nothing is said, as the process before has seen them."""
    ckpt = ft.Checkpoints(tmp_path / "ckpt", every=ft.every(steps=4))
    fit(checkpoint=ckpt, steps=4)
    fit(ft.profile(at=(3, 6), path=tmp_path / "among"), checkpoint=ckpt, resume="auto", steps=7)
    assert "trace_6-6.json" in names(tmp_path / "among")
    fit(ft.profile(at=(3, 6), path=tmp_path / "behind"), checkpoint=ckpt, resume="auto", steps=8)
    assert names(tmp_path / "behind") == []


@pytest.mark.parametrize("where", ["first", "middle", "hook"])
def test_an_exception_closes_it(tmp_path, where):
    bad = {"first": 2, "middle": 4, "hook": 4}[where]

    def breaking(state, batch):
        if where != "hook" and state.counters().step + 1 == bad:
            raise ZeroDivisionError("as planned")
        return STEP(state, batch)

    def hook(state, event):
        if where == "hook" and event.step == bad:
            raise ZeroDivisionError("as planned")
        return state

    profile = ft.profile(at=(2, 6), path=tmp_path, memory=True)
    with pytest.raises(ZeroDivisionError) as caught:
        ft.fit(STATE, breaking, DATA, hooks=[ft.on("step", hook), profile], progress=False, compile=False)
    assert idle()
    assert not any("hook failed" in note for note in caught.value.__notes__)
    (file,) = [file for file in tmp_path.iterdir() if file.name.startswith("split_")]
    found = json.loads(file.read_text())
    assert found["error"] == "ZeroDivisionError('as planned')"
    assert found["complete"] == {"first": 0, "middle": 2, "hook": 3}[where]
    fit(ft.profile(at=(2, 3), path=tmp_path / "again"))
    assert len(names(tmp_path / "again")) == 3


def test_another_profiler_is_refused(tmp_path):
    with pytest.raises(HookError, match="another profiler is active"), torch.profiler.profile():
        fit(ft.profile(at=(2, 3), path=tmp_path))
    with pytest.raises(HookError, match=r"(?s)another profiler.*whose steps overlap"):
        fit(ft.profile(at=(2, 5), path=tmp_path), ft.profile(at=(4, 6), path=tmp_path))


@pytest.mark.parametrize("at", [0, -1, (0, 3), (5, 4), (1, 2, 3), (1,), (), "10", 2.5, True, (1, 2.0), None], ids=repr)
def test_windows_that_make_no_sense(at):
    with pytest.raises(LimitError, match=r"(?s)ft.profile: at=.* makes no sense.*ft.profile\(at=\(10, 13\)\)"):
        ft.profile(at=at)


def test_other_bad_arguments(tmp_path):
    for steps in (0, -1, 1.5, True, "2"):
        with pytest.raises(LimitError, match=r"steps=.* makes no sense"):
            ft.profile(at=2, steps=steps)
    with pytest.raises(LimitError, match=r"(?s)steps= goes with one step or a cadence.*ft.profile\(at=2, steps=3\)"):
        ft.profile(at=(2, 3), steps=3)
    with pytest.raises(LimitError, match="rows= is a count"):
        ft.profile(rows=0)
    for name in ("trace", "memory", "shapes", "stacks"):
        with pytest.raises(ArgumentError, match=f"{name}= is a bool"):
            ft.profile(**{name: 1})
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ArgumentError, match=r"(?s)is no folder.*a file"):
        ft.profile(path=file)
    with pytest.raises(ArgumentError, match=r"(?s)is no folder.*int"):
        ft.profile(path=3)


# -- the split of a history ---------------------------------------------------------------------------------------------------


def record(**spent):
    return ft.Record(1, 0, 1, 1.0, "train", {}, spent=spent)


def test_split_adds_up():
    found = split([record(data=1.0, step=2.0), ft.Record(1, 0, 1, 1.0, "val", {}), record(data=0.5, step=0.5)])
    assert found == Split({"data": 1.5, "step": 2.5})
    assert found.total == 4.0
    assert found.share("data") == 0.375
    assert repr(found).splitlines() == ["Split(4 s)", "  step    62.5 %  2.5 s", "  data    37.5 %  1.5 s"]
    assert math.isclose(sum(found.share(part) for part in found.seconds), 1.0)
    assert Split({"data": 0.0}).share("data") == 0.0


def test_split_of_a_run_is_its_time():
    result = fit(log=ft.every(steps=2))
    found = split(result.history)
    last = [one for one in result.history if one.split == "train"][-1]
    assert found.total == pytest.approx(last.seconds, abs=0.02)
    assert found.seconds["data"] == pytest.approx(sum(one.waited for one in result.history))
    part = split(result.history[2:])
    assert part.total < found.total


@pytest.mark.parametrize("history", [[], [ft.Record(1, 0, 1, 1.0, "val", {})], 3, None], ids=repr)
def test_split_of_nothing(history):
    with pytest.raises(DataError, match=r"no record says where the time went"):
        split(history)
