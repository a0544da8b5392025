"""`ft.debug`: steps run eagerly, keep their states, and say what they were given when they fail."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ftrain as ft
from ftrain.errors import ArgumentError, DonatedStateError
from ftrain.steps.watching import WATCHER, watching

TX = ft.optim.sgd(0.1, momentum=0.9)
DATA = [
    {"x": torch.randn(6, 4, generator=torch.Generator().manual_seed(i)), "y": torch.arange(6) % 3} for i in range(4)
]


class Net(nn.Module):
    """Tells whether it runs eagerly, and fails where a batch asks for it."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x):
        if not torch.compiler.is_compiling():
            CALLS.append(tuple(x.shape))
        return self.b(F.relu(self.norm(self.a(x))))


CALLS = []
MODEL = Net()


def loss_fn(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"])


def make(wrap=lambda step: step):
    CALLS.clear()
    step = wrap(ft.train_step(MODEL, loss_fn, TX))
    state = step.init(ft.init(MODEL, TX, seed=0))
    return step, state


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(ft.tree.leaves(a), ft.tree.leaves(b), strict=True))


def fit(state, step, **more):
    val = ft.Evaluator(ft.eval_step(MODEL, lambda model, batch: {"loss": loss_fn(model, batch)}), DATA[:1])
    return ft.fit(state, step, DATA, **{"progress": False, "backend": "eager", "evals": {"val": val}, **more})


# -- eager, not donated -------------------------------------------------------------------------------------------------------


def test_fit_runs_eagerly_inside_and_compiled_outside():
    step, state = make()
    with ft.debug():
        inside = fit(state, step)
    assert CALLS == [(6, 4)] * 5  # four steps and an evaluation
    CALLS.clear()
    outside = fit(state, step)
    assert CALLS == []
    for name in state.params:
        torch.testing.assert_close(inside.state.params[name], outside.state.params[name])
    assert inside.history["val/loss"] == pytest.approx(outside.history["val/loss"])


def test_debug_is_what_eager_is_bitwise():
    step, state = make(lambda step: ft.with_ema(step, 0.9))
    plain = fit(state, step, compile=False)
    with ft.debug(anomaly=False):
        inside = fit(state, step)
    assert equal(plain.state, inside.state)
    assert [r.metrics for r in plain.history] == [r.metrics for r in inside.history]


def test_a_step_that_is_compiled_already_runs_eagerly_and_keeps_its_programs():
    step, state = make()
    fast = ft.compile(step, backend="eager")
    state, _ = fast(state, DATA[0])
    assert fast.compiles == 1
    CALLS.clear()
    with ft.debug():
        new, metrics = fast(state, DATA[1])
        assert CALLS == [(6, 4)]
        other = ft.compile(step, backend="eager")
        other(state, DATA[1])
    assert (other.rung, other.compiles) == (None, 0)
    # The state before is valid still, and the same step outside gives the same.
    kept = state.copy()
    CALLS.clear()
    again, _ = fast(state, DATA[1])
    assert CALLS == []
    assert fast.compiles == 1
    assert fast.recompiles == []
    for name in kept.params:
        torch.testing.assert_close(new.params[name], again.params[name])
    assert float(metrics["loss"].compute()) > 0
    with pytest.raises(DonatedStateError):
        _ = state.params


def test_all_states_of_a_run_stay_valid():
    step, state = make()
    kept, copies = [], []

    def keep(state, event):
        if event.kind == "step":
            kept.append(state)
            copies.append(state.copy())
        return state

    with ft.debug():
        ft.fit(state, step, DATA, hooks=[keep], progress=False, backend="eager")
    assert len(kept) == 4
    for state, copied in zip(kept, copies, strict=True):
        assert equal(state, copied)


def test_loop_and_evaluate_and_what_the_model_compiles_itself():
    step, state = make()
    seen = []
    inner = torch.compile(lambda x: x + 0 * (seen.append(1) or 0), backend="eager")
    with ft.debug():
        fast = ft.compile(step, backend="eager")
        for tick in ft.loop(state, fast, DATA):
            assert tick.state.step == tick.step
        assert CALLS == [(6, 4)] * 4
        reader = ft.eval_step(MODEL, lambda model, batch: {"loss": loss_fn(model, batch)})
        ft.evaluate(state, reader, DATA[:1], backend="eager")
        assert CALLS == [(6, 4)] * 5
        inner(torch.ones(1))
        inner(torch.ones(1))
    assert len(seen) == 2


def test_inside_inference_mode():
    step, state = make()
    with torch.inference_mode(), ft.debug():
        new, _ = ft.compile(step, backend="eager")(state, DATA[0])
    assert not new.params["a.weight"].is_inference()


# -- what an error says -------------------------------------------------------------------------------------------------------


def note(error):
    found = [one for one in error.__notes__ if one.startswith("ftrain: what the step was given")]
    assert len(found) == 1, error.__notes__
    return found[0]


WAYS = {
    "fit": lambda step, state, batch: ft.fit(state, step, [DATA[0], batch], progress=False, backend="eager"),
    "compiled": lambda step, state, batch: ft.compile(step, backend="eager")(state, batch),
    "eager": lambda step, state, batch: ft.compile(step, rung="eager")(state, batch),
    "bare": lambda step, state, batch: step(state, batch),
    "loop": lambda step, state, batch: list(ft.loop(state, step, [batch])),
    "evaluate": lambda step, state, batch: ft.evaluate(
        state, ft.eval_step(MODEL, lambda model, batch: {"l": loss_fn(model, batch)}), [batch], backend="eager"
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_error_says_what_the_step_was_given(way):
    step, state = make()
    wrong = {"x": torch.ones(2, 7), "y": torch.arange(2), "mask": torch.tensor([True, False])}
    with ft.debug(), pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        WAYS[way](step, state, wrong)
    text = note(caught.value)
    at = 1 if way == "fit" else 0
    assert f"(step {at}, epoch 0)" in text
    for path, what in (
        ("state.params['a.weight']", "float32[5, 4] on cpu"),
        ("state.buffers['norm.running_mean']", "float32[5] on cpu"),
        ("state.opt", f"{len(ft.tree.leaves(state.opt))} tensors"),
        ("batch['x']", "float32[2, 7] on cpu"),
        ("batch['y']", "int64[2] on cpu"),
        ("batch['mask']", "bool[2] on cpu"),
    ):
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [path]]
        assert what in line
    assert "all finite, 1 to 1" in text
    assert "0 to 1" in text
    assert "1 of 2 true" in text
    assert text.endswith("every leaf is finite")


def test_shapes_off_and_outside_say_nothing():
    step, state = make()
    wrong = {"x": torch.ones(2, 7), "y": torch.arange(2)}
    with ft.debug(shapes=False), pytest.raises(RuntimeError) as caught:
        step(state, wrong)
    assert not hasattr(caught.value, "__notes__")
    with pytest.raises(RuntimeError) as caught:
        step(state, wrong)
    assert not hasattr(caught.value, "__notes__")


def test_the_first_leaf_that_is_not_finite_is_named():
    def failing(model, batch):
        raise ZeroDivisionError("as planned")

    step, state = ft.train_step(MODEL, failing, TX), ft.init(MODEL, TX)
    x = torch.ones(2, 4)
    x[0, 0], x[0, 1], x[1, 1], x[1, 2] = float("nan"), float("inf"), -float("inf"), -3.0
    with ft.debug(), pytest.raises(ZeroDivisionError) as caught:
        step(state, {"x": x})
    assert "3 of 8 not finite (1 nan, 2 inf), else -3 to 1" in note(caught.value)
    assert note(caught.value).endswith("the first that is not finite: batch['x']")
    opt = ft.tree.map(lambda leaf: torch.full_like(leaf, torch.inf) if leaf.is_floating_point() else leaf, state.opt)
    with ft.debug(), pytest.raises(ZeroDivisionError) as caught:
        step(state.replace(opt=opt), {"x": x})
    first = next(path for path, leaf in ft.tree.items(opt, "state.opt") if leaf.is_floating_point())
    assert note(caught.value).endswith(f"the first that is not finite: {first}")


def test_long_lists_are_cut_but_not_what_is_bad():
    def failing(model, batch):
        raise ZeroDivisionError("as planned")

    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(100)])
    step, state = ft.train_step(model, failing, ft.optim.sgd(0.1)), ft.init(model, ft.optim.sgd(0.1))
    names = list(state.params)
    state = state.replace(params={**state.params, "99.weight": torch.full((1, 1), torch.nan)})
    with ft.debug(), pytest.raises(ZeroDivisionError) as caught:
        step(state, {f"{i:03}": torch.ones(1) for i in range(60)})
    text = note(caught.value)
    assert len(names) == 200
    assert text.count("state.params") == 41 + 1  # with the last line
    assert "... 159 more, all finite" in text
    assert "... 20 more, all finite" in text
    assert text.endswith("the first that is not finite: state.params['99.weight']")


@pytest.mark.parametrize(
    "leaf",
    [torch.empty(0), torch.ones(2, dtype=torch.complex64), torch.ones(2).to(torch.float8_e4m3fn), torch.ones(2).half()],
    ids=str,
)
def test_odd_leaves(leaf):
    def failing(model, batch):
        raise ZeroDivisionError("as planned")

    step, state = ft.train_step(MODEL, failing, TX), ft.init(MODEL, TX)
    with ft.debug(), pytest.raises(ZeroDivisionError) as caught:
        step(state, leaf)
    assert ("empty" if not leaf.numel() else "all finite, ") in note(caught.value).splitlines()[-2]


def test_a_state_that_cannot_be_read_does_not_hide_the_error():
    step, state = make()
    fast = ft.compile(step, backend="eager")
    fast(state, DATA[0])
    with ft.debug(), pytest.raises(DonatedStateError, match="memory was given") as caught:
        fast(state, DATA[0])
    assert "cannot be read: DonatedStateError" in note(caught.value)


def test_an_error_of_a_frozen_class_gets_its_note():
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class Odd(Exception):
        why: str

    def failing(model, batch):
        raise Odd("as planned")

    step, state = ft.train_step(MODEL, failing, TX), ft.init(MODEL, TX)
    with ft.debug(), pytest.raises(Odd) as caught:
        step(state, DATA[0])
    assert "batch['x']" in note(caught.value)


# -- anomalies ----------------------------------------------------------------------------------------------------------------


def nan_in_backward(model, batch):
    return (model(batch["x"]).sum() * 0).sqrt()  # 0 at 0, with an infinite slope, times 0


def test_an_anomaly_is_found_where_it_arises():
    step, state = ft.train_step(MODEL, nan_in_backward, TX), ft.init(MODEL, TX)
    with ft.debug(), pytest.warns(UserWarning, match="(?s)Error detected in .*nan_in_backward"):  # noqa: SIM117
        with pytest.raises(RuntimeError, match="returned nan values") as caught:
            ft.fit(state, step, DATA, progress=False, backend="eager")
    assert "batch['x']" in note(caught.value)
    with ft.debug(anomaly=False):
        new, _ = step(state, DATA[0])
    assert new.params["a.weight"].isnan().any()


# -- put back -----------------------------------------------------------------------------------------------------------------


def settings():
    from torch._dynamo.eval_frame import _stance

    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled(), _stance.stance, WATCHER.get()


def test_everything_is_put_back():
    before = settings()
    assert before == (False, True, "default", None)
    context = ft.debug()
    with context:
        inside = settings()
        assert inside[:3] == (True, True, "force_eager")
        assert inside[3] is not None
        with ft.debug(anomaly=False):
            assert settings()[0] is False
            with context:
                assert settings()[0] is True
            assert settings()[0] is False
        assert settings() == inside
    assert settings() == before
    with pytest.raises(KeyError), context:
        raise KeyError
    assert settings() == before
    with torch.autograd.set_detect_anomaly(True, check_nan=False), warnings.catch_warnings():
        with ft.debug():
            assert torch.is_anomaly_check_nan_enabled()
        assert (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()) == (True, False)


def test_as_a_decorator():
    step, state = make()

    @ft.debug()
    def run():
        ft.compile(step, backend="eager")(state, DATA[0])

    run()
    assert CALLS == [(6, 4)]
    assert WATCHER.get() is None


def test_an_error_inside_two_contexts_has_one_note():
    step, state = make()
    with ft.debug(), ft.debug(), pytest.raises(RuntimeError) as caught:
        ft.compile(step, backend="eager")(state, {"x": torch.ones(2, 7), "y": torch.arange(2)})
    assert "batch['x']" in note(caught.value)


def test_a_watcher_inside_another_sees_the_step_first():
    step, state = make()
    order = []

    def watcher(name):
        def watch(step, state, batch):
            order.append(name)
            return step(state, batch)

        return watch

    with watching(watcher("outer")), watching(watcher("inner")):
        step(state, DATA[0])
    step(state, DATA[0])
    # The outer one is given the step that the inner one calls; the step inside of a step is no call of its own.
    assert order == ["inner", "outer"]


@pytest.mark.parametrize("name", ["anomaly", "shapes"])
def test_bad_input(name):
    with pytest.raises(ArgumentError, match=rf"ft.debug: {name}= is a bool"):
        ft.debug(**{name: 1})
