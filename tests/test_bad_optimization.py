"""What careless and hostile use of the optimization algebra gets: the right numbers, or an error that says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ftrain as ft
from ftrain.errors import (
    ArgumentError,
    BatchError,
    CompileError,
    DataError,
    FtrainError,
    HookError,
    LimitError,
    ModelError,
    StateError,
    StructureError,
)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def cross_entropy(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


BATCH = {"x": torch.linspace(-2, 2, 64).view(16, 4).sin(), "y": torch.arange(16) % 3}
SGD = ft.optim.sgd(0.1)  # whose steps show a wrong factor, which those of Adam hide


def gradient(model: nn.Module | None = None, loss_fn: Any = cross_entropy) -> Any:
    return ft.value_and_grad(ft.bind(mlp() if model is None else model, loss_fn))


def moved(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


# -- wrappers around wrappers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_loss_scale_around_accumulation_does_not_change_the_gradient(k: int, compiled: bool) -> None:
    model = mlp()
    state = ft.init(model, SGD)
    step: Any = ft.make_step(ft.with_loss_scale(ft.with_accumulation(gradient(model), k)), SGD)
    state = step.init(state)
    plain, _ = ft.make_step(gradient(model), SGD)(state, BATCH)
    run = ft.compile(step, donate=False, rung="step", backend="eager") if compiled else step
    scaled, _ = run(state, BATCH)
    assert moved(scaled.params, plain.params) < 1e-5 * moved(plain.params, state.params)


# -- states that do not suit --------------------------------------------------------------------------------------------------


def test_a_state_that_did_not_suit_does_not_spoil_the_step_for_the_next_one() -> None:
    model, tx = mlp(), ft.optim.adamw(1e-3)
    step = ft.train_step(model, cross_entropy, tx)
    with pytest.raises(StructureError, match="does not belong to the model Sequential"):
        step(ft.init(nn.Linear(4, 3), tx), BATCH)
    assert step(ft.init(model, tx), BATCH)[0].counters().step == 1


def test_one_step_serves_states_that_train_other_parameters() -> None:
    model, tx = mlp(), ft.optim.adamw(1e-3)
    step = ft.train_step(model, cross_entropy, tx)
    some, everything = ft.init(model, tx, trainable="2.*"), ft.init(model, tx)
    for state in (everything, some, everything):
        new, _ = step(state, BATCH)
        assert moved(new.params, state.params) > 0
    with pytest.raises(StructureError, match=r"made with another optimizer(.|\n)*state\.opt"):
        step(some.replace(opt=ft.optim.sgd(0.1, momentum=0.9).init(some.params)), BATCH)


# -- arguments that are another kind of thing ---------------------------------------------------------------------------------

ARGUMENTS = {
    "a learning rate that is a text": lambda: ft.optim.sgd("0.1"),  # type: ignore[arg-type]
    "a decay of averages that is nothing": lambda: ft.with_ema(ft.train_step(mlp(), cross_entropy, SGD), None),  # type: ignore[arg-type]
    "an optimizer that was not called": lambda: ft.optim.chain(ft.optim.clip(1.0), ft.optim.adam),  # type: ignore[arg-type]
    "a schedule in place of a number": lambda: ft.schedules.linear(ft.schedules.constant(0.1), 0.0, 10),  # type: ignore[arg-type]
    "a text in place of schedules": lambda: ft.schedules.join("ab", [1]),
    "a number in place of a schedule": lambda: ft.optim.scale_by_schedule(0.1),  # type: ignore[arg-type]
    "a metric without a name": lambda: ft.hooks.plateau(None),  # type: ignore[arg-type]
    "a cadence and a number": lambda: ft.every(steps=5) | 5,
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_error_of_an_argument_is_one_of_ftrains(name: str) -> None:
    with pytest.raises(ArgumentError, match=r"expected:|got:"):
        ARGUMENTS[name]()


# -- functions of another level -----------------------------------------------------------------------------------------------

LOSS = ft.bind(mlp(), cross_entropy)
THINGS: dict[str, Any] = {
    "a loss": LOSS,
    "a gradient": ft.value_and_grad(LOSS),
    "a step": ft.train_step(mlp(), cross_entropy, SGD),
    "an optimizer": SGD,
    "a module": mlp(),
    "nothing": None,
}
WANTS: dict[str, tuple[str, Any]] = {
    "ft.with_precision": ("a loss", lambda fn: ft.with_precision(fn, "bf16-mixed")),
    "ft.value_and_grad": ("a loss", ft.value_and_grad),
    "ft.with_accumulation": ("a gradient", lambda fn: ft.with_accumulation(fn, 2)),
    "ft.with_sam": ("a gradient", ft.with_sam),
    "ft.with_grad_stats": ("a gradient", ft.with_grad_stats),
    "ft.with_loss_scale": ("a gradient", ft.with_loss_scale),
    "ft.make_step": ("a gradient", lambda fn: ft.make_step(fn, SGD)),
    "ft.make_update": ("a gradient", lambda fn: ft.make_update(fn, SGD)),
    "ft.with_ema": ("a step", ft.with_ema),
    "ft.with_swa": ("a step", lambda fn: ft.with_swa(fn, start=1)),
    "ft.compile": ("a step", ft.compile),
}


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("what", WANTS)
def test_a_function_of_another_level_is_refused_when_the_wrapper_is_made(what: str, thing: str) -> None:
    wanted, make = WANTS[what]
    if thing == wanted:
        make(THINGS[thing])
        return
    with pytest.raises(
        FtrainError, match=rf"{what} wants a (function of the \w+ level|step)(.|\n)*expected:(.|\n)*got:"
    ):
        make(THINGS[thing])


def test_as_step_refuses_what_counts_steps_by_itself() -> None:
    model = mlp()
    step, state = ft.train_step(model, cross_entropy, SGD), ft.init(model, SGD)
    for known in (step, ft.compile(step, rung="eager"), ft.with_ema(step)):
        with pytest.raises(ArgumentError, match=r"is a step already(.|\n)*counted twice(.|\n)*ft\.as_step\(update"):
            ft.as_step(known)
    with pytest.raises(StateError, match=r"counted its steps itself(.|\n)*Counters\(step=1"):
        ft.as_step(lambda state, batch: (step(state, batch)[0], {}))(state, BATCH)
    with pytest.raises(StateError, match=r"did not return \(state, metrics\)(.|\n)*got: +dict"):
        ft.as_step(lambda state, batch: {})(state, BATCH)
    update = ft.make_update(gradient(model), SGD)
    new, _ = ft.as_step(update, uses=(one for one in [update]))(state, BATCH)
    assert new.counters().step == 1


def test_an_average_of_a_function_that_is_no_step() -> None:
    model = mlp()
    step = ft.with_ema(ft.eval_step(model, lambda model, batch: {"loss": cross_entropy(model, batch)}))  # type: ignore[arg-type]
    with pytest.raises(StateError, match=r"did not return \(state, metrics\)(.|\n)*got: +dict"):
        step(step.init(ft.init(model, SGD)), BATCH)


def test_two_averages_in_one_step_have_names_of_their_own() -> None:
    step = ft.train_step(mlp(), cross_entropy, SGD)
    for inner in (ft.with_ema(step), ft.with_swa(step, start=1, name="ema")):
        with pytest.raises(LimitError, match=r"under the name 'ema' already(.|\n)*ft\.with_ema\(step, \.\.\., name="):
            ft.with_ema(inner)
    scaled = ft.make_step(ft.with_loss_scale(gradient(), name="kept"), SGD)
    with pytest.raises(LimitError, match="under the name 'kept' already"):
        ft.with_swa(scaled, start=1, name="kept")
    for name in (None, "", 3):
        with pytest.raises(ArgumentError, match="is no name"):
            ft.with_ema(step, name=name)  # type: ignore[arg-type]


def test_an_average_of_other_parameters() -> None:
    model = mlp()
    step = ft.with_ema(ft.train_step(model, cross_entropy, SGD))
    kept = step.init(ft.init(model, SGD)).extra
    with pytest.raises(StructureError, match=r"'ema' is of other parameters(.|\n)*extra=\{\}"):
        step(ft.init(model, SGD, trainable="2.*").replace(extra=kept), BATCH)


# A guard inside of what calls it several times: the step would look at its last word alone, and write inf into parameters.
@pytest.mark.parametrize("wrap", [lambda g: ft.with_accumulation(g, 4), ft.with_sam], ids=["accumulation", "SAM"])
def test_a_loss_scale_stands_outside(wrap: Any) -> None:
    with pytest.raises(
        LimitError, match=r"stands inside of ft\.with_loss_scale(.|\n)*fix: +grad = ft\.with_loss_scale\(ft\.with_"
    ):
        wrap(ft.with_loss_scale(gradient()))
    with pytest.raises(LimitError, match=r"scaled already(.|\n)*'one'"):
        ft.with_loss_scale(ft.with_grad_stats(ft.with_loss_scale(gradient(), name="one")), name="two")


@pytest.mark.parametrize(
    "wrong",
    [
        {"init_scale": float("inf")},
        {"init_scale": lambda step: step},
        {"growth_interval": "2"},
        {"growth_interval": 1.5},
    ],
    ids=lambda options: next(iter(options)) + str(callable(next(iter(options.values())))),
)
def test_a_loss_scale_of_numbers_that_are_none(wrong: Any) -> None:
    with pytest.raises(LimitError, match=r"makes no sense(.|\n)*expected:"):
        ft.with_loss_scale(gradient(), **wrong)


# -- data ---------------------------------------------------------------------------------------------------------------------

LIST = [{name: leaf.roll(i, 0) for name, leaf in BATCH.items()} for i in range(5)]


def metric_fn(model: Any, batch: Any) -> dict[str, Tensor]:
    return {"loss": cross_entropy(model, batch)}


@pytest.mark.parametrize("short", ["step", "drop", "carry"])
def test_what_takes_no_steps_sees_all_batches_of_windows(short: Any) -> None:
    model = mlp()
    state, step = ft.init(model, SGD), ft.eval_step(model, metric_fn)
    windows = ft.data.window(LIST, 2, short=short)
    assert ft.evaluate(state, step, windows, compile=False) == ft.evaluate(state, step, LIST, compile=False)
    forward = ft.predict_step(model, lambda model, batch: model(batch["x"]))
    assert len(list(ft.predict(state, forward, windows, compile=False))) == len(LIST)
    evals = {"a": ft.Evaluator(step, windows), "b": ft.Evaluator(step, LIST)}
    train = ft.train_step(model, cross_entropy, SGD)
    history = ft.fit(state, train, LIST, evals=evals, compile=False, progress=False).history
    assert history["a/loss"] == history["b/loss"]
    with pytest.raises(BatchError, match=r"window of batches stands where one batch(.|\n)*Window of 2 batches"):
        step(state, ft.data.Window((BATCH, BATCH)))


def test_a_windows_own_batch_size_is_looked_at() -> None:
    state, step = ft.init(mlp(), SGD), ft.train_step(mlp(), cross_entropy, SGD)
    with pytest.raises(DataError, match="batch_size=0 is not a number of samples"):
        next(ft.loop(state, step, ft.data.window(BATCH, 2, batch_size=0)))
    with pytest.raises(DataError, match=r"cannot be called with an epoch(.|\n)*got: +<lambda>\(\)"):
        ft.data.window(LIST, lambda: 2)  # type: ignore[misc,arg-type]
    with pytest.raises(DataError, match=r"already(.|\n)*window\(list, 2, short='step'\)$"):
        ft.data.window(ft.data.window(LIST, 2), 2)


@pytest.mark.parametrize("uneven", ["raise", "split"])
def test_accumulation_of_nothing(uneven: Any) -> None:
    model = mlp()
    state, empty = ft.init(model, SGD), {name: leaf[:0] for name, leaf in BATCH.items()}
    step = ft.make_step(ft.with_accumulation(gradient(model), 2, uneven=uneven), SGD)
    with pytest.raises(BatchError, match=r"nothing to take a gradient of(.|\n)*batch\['x'\]"):
        step(state, empty)
    with pytest.raises(BatchError, match="a window without batches"):
        step(state, ft.data.Window(()))


# -- models -------------------------------------------------------------------------------------------------------------------


class Bag(nn.Module):
    """An embedding with sparse gradients, and a parameter without elements."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4, sparse=sparse), nn.Linear(4, 3)
        self.nothing = nn.Parameter(torch.zeros(0, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))


IDS = {"x": torch.arange(16) % 5, "y": BATCH["y"]}


@pytest.mark.parametrize("tx", [SGD, ft.optim.adamw(1e-3)], ids=["sgd", "adamw"])
def test_sparse_gradients_are_refused_by_name(tx: Any) -> None:
    model = Bag(sparse=True)
    step, state = ft.train_step(model, cross_entropy, tx), ft.init(model, tx)
    for _ in range(2):  # not only the first time
        with pytest.raises(ModelError, match=r"a gradient is sparse(.|\n)*table\.weight(.|\n)*nn\.Embedding\(n, d\)"):
            step(state, IDS)


def test_statistics_of_a_parameter_without_elements_are_left_out() -> None:
    model = Bag(sparse=False)
    grad = ft.with_grad_stats(gradient(model), statistics=("norm", "mean", "std", "max", "zeros"))
    _, metrics = ft.make_step(grad, SGD)(ft.init(model, SGD), IDS)
    assert "grad_max/table.weight" in metrics
    assert not any("nothing" in name for name in metrics)


def test_update_bn_that_would_forget_what_was_known() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    state = ft.init(model, SGD)
    with pytest.raises(ModelError, match=r"no batch norm saw a batch(.|\n)*fn=lambda model, batch"):
        ft.update_bn(model, state, LIST, lambda model, batch: batch["x"].sum())
    with pytest.raises(StructureError, match="does not belong to the model"):
        ft.update_bn(nn.Sequential(nn.BatchNorm1d(4)), state, LIST, lambda model, batch: model(batch["x"]))
    with pytest.raises(ModelError, match="wants a module as its first argument"):
        ft.update_bn(state, model, LIST)  # type: ignore[arg-type]
    with pytest.raises(TypeError) as caught:
        ft.update_bn(model, state, LIST)  # batches are dicts
    assert "fn=lambda model, batch" in caught.value.__notes__[0]
    windows = ft.data.window(LIST, 2)
    known = ft.update_bn(model, state, windows, lambda model, batch: model(batch["x"]))
    assert int(known.buffers["1.num_batches_tracked"]) == len(LIST)


# -- averages -----------------------------------------------------------------------------------------------------------------


def test_an_average_made_in_inference_mode_can_be_trained_on() -> None:
    model = mlp()
    step = ft.with_swa(ft.with_ema(ft.train_step(model, cross_entropy, SGD)), start=0)
    state = step.init(ft.init(model, SGD))
    with torch.inference_mode():
        new, _ = step(state, BATCH)
    assert not any(leaf.is_inference() for leaf in ft.tree.leaves(new))
    step(new, BATCH)


def test_the_nearest_average_is_suggested() -> None:
    model = mlp()
    step = ft.with_ema(ft.train_step(model, cross_entropy, SGD))
    state = step.init(ft.init(model, SGD))
    with pytest.raises(StateError, match=r"no averaged parameters 'emma'(.|\n)*fix: +params='ema'"):
        ft.eval_step(model, metric_fn, params="emma")(state, BATCH)


def test_a_hook_does_not_take_the_memory_of_a_wrapper_for_its_own() -> None:
    model, tx = mlp(), ft.optim.inject(ft.optim.sgd)(lr=0.1)
    step = ft.with_ema(ft.train_step(model, cross_entropy, tx))
    hook = ft.hooks.plateau("val/loss", name="ema")
    with pytest.raises(HookError, match=r"under the name 'ema', and so does a hook"):
        ft.fit(ft.init(model, tx), step, LIST, hooks=[hook], compile=False, progress=False)


# -- hyper-parameters ---------------------------------------------------------------------------------------------------------


def test_a_schedule_that_gives_a_number() -> None:
    params = {"w": torch.ones(2)}
    for tx in (
        ft.optim.sgd(lambda step: 0.1 if step < 3 else 0.01),  # type: ignore[arg-type,return-value]
        ft.optim.inject(ft.optim.adamw)(lr=lambda step: 0.1),
    ):
        with pytest.raises(ArgumentError, match=r"did not give a tensor(.|\n)*got: +float(.|\n)*torch\.where"):
            tx.init(params)


def chained(lr: Any) -> ft.Transform:
    return ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.masked(ft.optim.adamw(lr), "*.weight"))


def grouped(lr: Any) -> ft.Transform:
    return ft.optim.partition({"2.*": "new", "*": "old"}, {"new": ft.optim.adamw(lr), "old": ft.optim.sgd(lr)})


@pytest.mark.parametrize("make", [chained, grouped, ft.optim.muon])
def test_injection_into_what_is_put_together_stays_in_one_graph(make: Any) -> None:
    model, tx = mlp(), ft.optim.inject(make)(lr=0.1)
    step, state = ft.train_step(model, cross_entropy, tx), ft.init(model, tx)
    fast = ft.compile(step, backend="eager", donate=False, rung="step")
    new, _ = fast(state, BATCH)
    expected, _ = step(state, BATCH)
    assert moved(new.params, expected.params) < 2e-3 * moved(expected.params, state.params)  # Muon computes in bfloat16


def test_a_setting_of_a_group_that_no_optimizer_reads() -> None:
    for typo, near in (("lrr", "lr"), ("weight_decy", "weight_decay")):
        with pytest.raises(
            LimitError, match=rf"SGD knows no setting '{typo}'(.|\n)*groups\['2\.\*'\](.|\n)*'{near}': 0\.5"
        ):
            ft.optim.from_torch(torch.optim.SGD, lr=0.1, groups={"2.*": {typo: 0.5}})
    ft.optim.from_torch(Theirs, groups={"2.*": {"rank": 4}})
    with pytest.raises(LimitError, match=r"Theirs knows no setting 'lrr'"):
        ft.optim.from_torch(Theirs, groups={"2.*": {"lrr": 4}})


class Theirs(torch.optim.Optimizer):
    """Reads a setting of its groups that its constructor has no argument for."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad * group["lr"] / group.get("rank", 1))


def test_a_vmapped_step_of_an_optimizer_of_torch_says_that_it_cannot() -> None:
    model, tx = mlp(), ft.optim.from_torch(torch.optim.SGD, lr=0.1)
    step, state = ft.train_step(model, cross_entropy, tx), ft.init(model, tx)
    structure = ft.tree.structure(state)

    def flat(leaves: list[Tensor]) -> list[Tensor]:
        return ft.tree.leaves(step(ft.tree.unflatten(structure, leaves), BATCH)[0])

    with pytest.raises(
        CompileError, match=r"torch\.optim's SGD changes tensors in place, so it cannot run inside vmap"
    ):
        torch.func.vmap(flat)([torch.stack([leaf, leaf]) for leaf in ft.tree.leaves(state)])
