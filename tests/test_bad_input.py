"""Bad input gets a clear error, before any work: the text says what, where, expected, got and the fix, and nothing is lost."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ftrain as ft
from ftrain import errors
from ftrain.errors import FtrainError

# -- the subject: one small model, and every way in ---------------------------------------------------------------------------

BATCH = {"x": torch.linspace(-1, 1, 12).view(4, 3), "y": torch.ones(4, 1)}
DATA = [BATCH] * 3
OUTER = nn.Linear(3, 1)  # what a loss_fn must not reach past its argument


def mse(model: Any, batch: Any) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean()


def subject(loss_fn: Callable[..., Any] = mse, tx: Any = None) -> tuple[Any, Any]:
    """`(state, step)` for a linear model with a loss."""
    model, tx = nn.Linear(3, 1), ft.optim.sgd(0.1) if tx is None else tx
    return ft.init(model, tx, seed=3), ft.train_step(model, loss_fn, tx)


def eval_subject(metric_fn: Callable[..., Any] = lambda model, batch: {"loss": mse(model, batch)}) -> tuple[Any, Any]:
    model = nn.Linear(3, 1)
    return ft.init(model, ft.optim.sgd(0.1), seed=3), ft.eval_step(model, metric_fn)


TRAIN = subject()[1]
EVAL = eval_subject()[1]  # made here: a module draws its first numbers from the global generator


def fit(state: Any, step: Any, data: Any, **kw: Any) -> Any:
    return ft.fit(state, step, data, **{"progress": False, "compile": False, **kw})


AOT = {"backend": "aot_eager"}
BARE: dict[str, Callable[[Any, Any, Any], Any]] = {"step": lambda state, step, batch: step(state, batch)}
COMPILED: dict[str, Callable[[Any, Any, Any], Any]] = {
    "compiled": lambda state, step, batch: ft.compile(step, donate=False, **AOT)(state, batch),
    "compiled-donated": lambda state, step, batch: ft.compile(step, donate=True, **AOT)(state, batch),
    "compiled-whole": lambda state, step, batch: ft.compile(step, rung="step", **AOT)(state, batch),
    "compiled-loss": lambda state, step, batch: ft.compile(step, rung="loss", **AOT)(state, batch),
}
LOOPS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "loop": lambda state, step, batch: next(ft.loop(state, step, [batch])),
    "loop-compiled": lambda state, step, batch: next(ft.loop(state, ft.compile(step, **AOT), [batch])),
}
FITS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "fit-eager": lambda state, step, batch: fit(state, step, [batch]),
    "fit-auto": lambda state, step, batch: fit(state, step, [batch], compile="auto", **AOT),
    "fit-whole": lambda state, step, batch: fit(state, step, [batch], compile=True, **AOT),
    "fit-donate": lambda state, step, batch: fit(state, step, [batch], compile="auto", donate=True, **AOT),
}


def ways(*tables: dict[str, Any]) -> Any:
    rows = {name: way for table in tables for name, way in table.items()}
    return pytest.mark.parametrize("way", list(rows.values()), ids=list(rows))


def same(a: Any, b: Any) -> bool:
    pairs = zip(ft.tree.leaves(a), ft.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


Refused = Callable[..., AbstractContextManager[pytest.ExceptionInfo[Exception]]]


@pytest.fixture
def refused(rng_guard: Callable[[], AbstractContextManager[None]]) -> Refused:
    """`with refused(state, Error, *parts): ...`: ftrain's own error with these parts in its text, and nothing lost by it."""

    @contextmanager
    def check(state: Any, kind: type[Exception], *parts: str) -> Iterator[Any]:
        kept = None if state is None else state.copy()
        with rng_guard(), pytest.raises(kind) as caught:
            yield caught
        assert isinstance(caught.value, FtrainError), f"{type(caught.value).__name__} is not an error of ftrain"
        message = str(caught.value)
        for part in parts:
            assert part in message, f"{part!r} is not in:\n{message}"
        if kept is not None:
            assert same(kept, state), "the caller's state has other values than before"

    return check


class Calls:
    """A step (or hook, or sink) that counts its calls."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.n = 0

    def __call__(self, *args: Any) -> Any:
        self.n += 1
        return self.fn(*args)


# -- data -----------------------------------------------------------------------------------------------------------------------


def loader(n: int, **kw: Any) -> Any:
    rows = [{"x": torch.zeros(3), "y": torch.zeros(1)}] * n
    return torch.utils.data.DataLoader(rows, batch_size=4, **kw)


NO_BATCHES: dict[str, tuple[Any, dict[str, Any]]] = {
    "list": ([], {}),
    "tuple": ((), {}),
    "generator": (lambda: iter(()), {"steps": 5}),
    "loader": (lambda: loader(0), {}),
    "drop_last": (lambda: loader(3, drop_last=True), {}),
    "function": (lambda: lambda epoch: [], {"epochs": 2}),
    "arrays": ({"x": torch.zeros(0, 3), "y": torch.zeros(0, 1)}, {"batch_size": 4}),
}


@pytest.mark.parametrize("name", NO_BATCHES)
@pytest.mark.parametrize("call", [fit, lambda *a, **kw: list(ft.loop(*a, **kw))], ids=["fit", "loop"])
def test_no_batches_at_all(name: str, call: Any, refused: Refused) -> None:
    data, kw = NO_BATCHES[name]
    state, step = subject()
    step = Calls(step)
    with refused(state, errors.DataError, "no batches", "expected: at least one batch"):
        call(state, step, data() if callable(data) else data, **kw)
    assert step.n == 0


def test_the_text_for_no_batches() -> None:
    state, step = subject()
    with pytest.raises(errors.DataError) as caught:
        fit(state, step, loader(3, drop_last=True))
    assert str(caught.value) == (
        "ft.fit: the data has no batches.\n"
        "  expected: at least one batch\n"
        "  got:      length 0\n"
        "  cause:    an empty dataset, or a loader with drop_last=True and fewer samples than a batch"
    )


@pytest.mark.parametrize("data", [[], lambda epoch: []], ids=["list", "function"])
def test_no_batches_to_evaluate_or_predict(data: Any, refused: Refused) -> None:
    state, step = eval_subject()
    with refused(state, errors.DataError, "ft.evaluate", "no batches", "at least one batch"):
        ft.evaluate(state, step, data, compile=False)
    with refused(state, errors.DataError, "ft.predict", "no batches"):
        list(ft.predict(state, step, data, compile=False))


def test_an_evaluator_without_batches_is_found_before_training(refused: Refused) -> None:
    state, step = subject()
    step = Calls(step)
    evals = {"val": ft.Evaluator(EVAL, [])}
    with refused(state, errors.DataError, "'val'", "no batches"):
        fit(state, step, DATA, evals=evals)
    assert step.n == 0, "an epoch was trained before the evaluator was found to be empty"


def test_an_iterator_that_is_at_its_end_in_the_second_epoch(refused: Refused) -> None:
    state, step = subject()
    epochs = [DATA, []]
    with refused(state, errors.DataError, "no batches in epoch 1"):
        fit(state, step, lambda epoch: epochs[epoch], epochs=2)


def test_arrays_of_unequal_length(refused: Refused) -> None:
    state, step = subject()
    data = {"x": torch.zeros(8, 3), "y": np.zeros((7, 1), dtype=np.float32)}
    with refused(state, errors.DataError, "differ in length", "data['y']", "8 samples, as data['x']", "7"):
        fit(state, step, data, batch_size=4)


@pytest.mark.parametrize("data", [BATCH, BATCH["x"], BATCH["x"].numpy()], ids=["dict", "tensor", "numpy"])
def test_arrays_without_batch_size(data: Any, refused: Refused) -> None:
    state, step = subject()
    with refused(
        state, errors.DataError, "arrays, not batches", "batch_size=", "ft.fit(state, step, data, batch_size=64)"
    ):
        fit(state, step, data)
    with refused(state, errors.DataError, "ft.loop", "batch_size="):
        next(ft.loop(state, step, data))
    with refused(state, errors.DataError, "ft.evaluate", "batch_size="):
        ft.evaluate(state, EVAL, data, compile=False)


@pytest.mark.parametrize("size", [0, -4, 2.5, True, "4"])
def test_a_batch_size_that_is_no_number_of_samples(size: Any, refused: Refused) -> None:
    state, step = subject()
    with refused(state, errors.DataError, f"batch_size={size!r}", "an integer >= 1"):
        fit(state, step, BATCH, batch_size=size)


@pytest.mark.parametrize("data", [loader(8), {"x": 3.0}, {"x": torch.zeros(())}], ids=["loader", "number", "0-d"])
def test_a_batch_size_goes_with_arrays_only(data: Any, refused: Refused) -> None:
    state, step = subject()
    with refused(state, errors.DataError, "batch_size= goes with arrays", "got:"):
        fit(state, step, data, batch_size=4)


@pytest.mark.parametrize("data", [None, 5, object()])
def test_data_that_cannot_be_iterated(data: Any, refused: Refused) -> None:
    state, step = subject()
    with refused(state, errors.DataError, "cannot be iterated", f"got:      {type(data).__name__}"):
        fit(state, step, data)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        yield BATCH


def test_a_torch_dataset_is_given_without_a_loader(refused: Refused) -> None:
    state, step = subject()
    fixes = ("DataLoader(dataset, batch_size=64)\n", "DataLoader(dataset, batch_size=None)   # where it gives batches")
    with refused(state, errors.DataError, "cannot be iterated", "got:      Stream", *fixes) as found:
        fit(state, step, Stream())
    assert "shuffle=True" not in str(found.value)  # torch refuses it for a stream
    pairs = torch.utils.data.TensorDataset(BATCH["x"])
    with refused(state, errors.DataError, "cannot be iterated", "DataLoader(dataset, batch_size=64, shuffle=True)"):
        fit(state, step, pairs)


def test_a_data_function_that_returns_no_iterable(refused: Refused) -> None:
    state, step = subject()
    with refused(state, errors.DataError, "returned no iterable", "got:      int"):
        fit(state, step, lambda epoch: 5, epochs=1)


def test_an_iterator_with_two_epochs(refused: Refused) -> None:
    state, step = subject()
    step, batches = Calls(step), iter(DATA)
    with refused(state, errors.DataError, "epochs=2", "iterator", "lambda epoch: make_batches()"):
        fit(state, step, batches, epochs=2)
    assert step.n == 0
    assert len(list(batches)) == len(DATA), "a batch was taken from the user's iterator"


def test_neither_epochs_nor_steps_on_endless_data(refused: Refused) -> None:
    state, step = subject()
    step, batches = Calls(step), itertools.repeat(BATCH)
    with refused(state, errors.LimitError, "neither epochs nor steps", "epochs=, steps= or until=", "steps=1000"):
        fit(state, step, batches)
    with refused(state, errors.LimitError, "neither epochs nor steps"):
        fit(state, step, lambda epoch: itertools.repeat(BATCH))
    assert step.n == 0


LIMITS = [
    ("epochs", 0),
    ("epochs", -1),
    ("epochs", 1.5),
    ("epochs", True),
    ("epochs", "3"),
    ("steps", 0),
    ("steps", -7),
]


@pytest.mark.parametrize(("name", "n"), LIMITS)
@pytest.mark.parametrize("what", ["ft.fit", "ft.loop"])
def test_a_limit_that_makes_no_sense(name: str, n: Any, what: str, refused: Refused) -> None:
    state, step = subject()
    step = Calls(step)
    call: Any = fit if what == "ft.fit" else lambda *a, **kw: next(ft.loop(*a, **kw))
    with refused(state, errors.LimitError) as caught:
        call(state, step, DATA, **{name: n})
    assert str(caught.value) == (
        f"{what}: {name}={n!r} makes no sense.\n"
        f"  expected: an integer >= 1\n"
        f"  got:      {n!r}\n"
        f"  fix:      {what}(state, step, data, {name}=1)"
    )
    assert step.n == 0


@pytest.mark.parametrize("until", [5, "10 minutes", lambda: True])
def test_until_wants_a_cadence(until: Any, refused: Refused) -> None:
    state, step = subject()
    with refused(state, errors.LimitError, "until=", "ft.until(...)", "until=ft.until(seconds=600)"):
        fit(state, step, DATA, until=until)


class _Endless(Exception):
    """The run did not stop where it was told to."""


@pytest.mark.parametrize("until", [ft.at(3), ft.every(steps=3), ft.until(steps=3)], ids=str)
def test_until_stops_or_says_why_it_would_not(until: Any) -> None:
    state, step = subject()

    def counted(state: Any, batch: Any) -> Any:
        if calls.n > 20:
            raise _Endless(f"until={until!r}: still running after 20 steps")
        return step(state, batch)

    calls = Calls(counted)
    try:
        assert fit(state, calls, DATA, until=until).state.counters().step == 3
    except errors.LimitError as error:
        assert "until=" in str(error)  # noqa: PT017 - either outcome is right, an endless run is not


# -- batches --------------------------------------------------------------------------------------------------------------------

STRINGS: dict[str, tuple[Any, str]] = {
    "nested": ({**BATCH, "name": ["a", "b"]}, "batch['name'][0]"),
    "leaf": ({**BATCH, "id": "a"}, "batch['id']"),
    "tuple": ((BATCH["x"], "a"), "batch[1]"),
    "numpy": ({**BATCH, "id": np.array(["a"])}, "batch['id']"),
    "bytes": ({**BATCH, "id": b"a"}, "batch['id']"),
}


@pytest.mark.parametrize("name", STRINGS)
@ways(LOOPS, {"fit-eager": FITS["fit-eager"], "fit-auto": FITS["fit-auto"]})
def test_a_batch_with_a_string_in_it(way: Any, name: str, refused: Refused) -> None:
    batch, path = STRINGS[name]
    state, step = subject()
    with refused(state, errors.BatchError, "cannot be a tensor", f"where:    {path}\n", "collate_fn"):
        way(state, step, batch)


@ways(LOOPS, {"fit-eager": FITS["fit-eager"], "fit-auto": FITS["fit-auto"]})
def test_a_batch_that_is_none(way: Any, refused: Refused) -> None:
    state, step = subject()
    with refused(state, errors.BatchError, "the data gave None", "ft.data.source(...).filter(...)"):
        way(state, step, None)


@pytest.mark.parametrize("name", STRINGS)
@ways(BARE, {"compiled": COMPILED["compiled"]})
def test_a_batch_with_a_string_in_a_bare_step(way: Any, name: str, refused: Refused) -> None:
    batch, path = STRINGS[name]
    state, step = subject()
    with refused(state, errors.BatchError, "not a tensor", f"where:    {path}\n", "a tensor on cpu"):
        way(state, step, batch)


def test_an_evaluation_batch_with_a_string(refused: Refused) -> None:
    state, step = eval_subject()
    with refused(state, errors.BatchError, "batch['id']"):
        ft.evaluate(state, step, [{**BATCH, "id": "a"}], compile=False)
    with refused(state, errors.BatchError, "batch['id']"):
        step(state, {**BATCH, "id": "a"})


ELSEWHERE = {**BATCH, "y": torch.ones(4, 1, device="meta")}


@ways(BARE, COMPILED)
def test_a_batch_on_another_device(way: Any, refused: Refused) -> None:
    state, step = subject()
    with refused(state, errors.BatchError) as caught:
        way(state, step, ELSEWHERE)
    assert str(caught.value) == (
        "the batch lies on another device than the state.\n"
        "  where:    batch['y']\n"
        "  expected: a tensor on cpu\n"
        "  got:      float32[4, 1] on meta\n"
        "  fix:      batch['y'].to(\"cpu\")   # ft.fit and ft.loop move batches by themselves"
    )


@pytest.mark.parametrize("donate", [True, False])
def test_a_batch_on_another_device_after_good_ones(donate: bool, refused: Refused) -> None:
    state, step = subject()
    step = ft.compile(step, donate=donate, **AOT)
    state, _ = step(state, BATCH)
    with refused(state, errors.BatchError, "another device", "batch['y']", "on cpu", "on meta"):
        step(state, ELSEWHERE)
    with refused(state, errors.BatchError, "not a tensor", "batch['y']", "float"):
        step(state, {**BATCH, "y": 1.0})
    state, _ = step(state, BATCH)
    assert state.counters().step == 2
    assert step.recompiles == []


def test_an_evaluation_batch_on_another_device(refused: Refused) -> None:
    state, step = eval_subject()
    for one in (step, ft.compile(step, **AOT)):
        with refused(state, errors.BatchError, "another device", "batch['y']", "on cpu", "on meta"):
            one(state, ELSEWHERE)


# -- the loss -------------------------------------------------------------------------------------------------------------------

TRAIN_WAYS = (BARE, COMPILED, LOOPS, FITS)


@ways(*TRAIN_WAYS)
def test_a_loss_that_is_not_a_scalar(way: Any, refused: Refused) -> None:
    state, step = subject(lambda model, batch: (model(batch["x"]) - batch["y"]).square())
    with refused(state, errors.LossError) as caught:
        way(state, step, BATCH)
    assert str(caught.value) == (
        "the loss is not a scalar.\n"
        "  expected: a 0-d tensor\n"
        "  got:      float32[4, 1] on cpu\n"
        "  fix:      return loss.mean()   # or ft.metrics.Mean.of(loss, mask)"
    )


LOSSES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "float": (lambda loss: 1.0, ("returned no loss", "a 0-d tensor", "got:      float")),
    "none": (lambda loss: None, ("returned no loss", "NoneType")),
    "dict": (lambda loss: {"loss": loss}, ("returned no loss", "dict")),
    "three": (lambda loss: (loss, {}, {}), ("not (loss, metrics)", "3 entries", "return loss, {}")),
    "integer": (lambda loss: loss.detach().to(torch.int64), ("not a floating-point number", "int64[]")),
    "mean": (lambda loss: ft.metrics.Mean(loss.expand(4), loss.expand(4)), ("total of the loss", "float32[4]")),
    "weight": (lambda loss: ft.metrics.Mean(loss, 4.0), ("weight of the loss", "float")),
}


@pytest.mark.parametrize("name", LOSSES)
@ways(BARE, {"fit-auto": FITS["fit-auto"], "compiled-whole": COMPILED["compiled-whole"]})
def test_a_loss_of_another_form(way: Any, name: str, refused: Refused) -> None:
    change, parts = LOSSES[name]
    state, step = subject(lambda model, batch: change(mse(model, batch)))
    with refused(state, errors.LossError, *parts):
        way(state, step, BATCH)


def _no_grad(model: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        return mse(model, batch)


UNCONNECTED: dict[str, Callable[..., Any]] = {
    "detached": lambda model, batch: mse(model, batch).detach(),
    "no_grad": _no_grad,
    "batch only": lambda model, batch: batch["x"].mean(),
}


@pytest.mark.parametrize("name", UNCONNECTED)
@ways(*TRAIN_WAYS)
def test_a_loss_that_is_not_connected(way: Any, name: str, refused: Refused) -> None:
    state, step = subject(UNCONNECTED[name])
    parts = (
        "not connected to any parameter",
        "depends on some of: weight, bias",
        "without a gradient",
        "model(batch['x'])",
    )
    with refused(state, errors.LossError, *parts):
        way(state, step, BATCH)


class Task:
    """A user's class that keeps the outer model: its methods can reach it past the argument."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def loss_fn(self, model: Any, batch: Any) -> Tensor:
        return mse(self.model, batch)

    def __call__(self, model: Any, batch: Any) -> Tensor:
        return mse(self.model, batch)


def _other(net: Any, model: Any, batch: Any) -> Tensor:
    return mse(net, batch)


def _in_a_list(found: list[nn.Module]) -> Callable[..., Any]:
    return lambda model, batch: mse(found[0], batch)


HIDDEN: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "attribute of self": lambda outer: Task(outer).loss_fn,
    "callable object": Task,
    "partial": lambda outer: partial(_other, outer),
    "in a list": lambda outer: _in_a_list([outer]),
    "default argument": lambda outer: lambda model, batch, net=outer: mse(net, batch),
    "another module": lambda outer: _in_a_list([nn.Linear(3, 1)]),
}


@pytest.mark.parametrize("name", HIDDEN)
@ways(BARE, {"fit-auto": FITS["fit-auto"], "fit-whole": FITS["fit-whole"]})
def test_a_loss_that_hangs_on_other_numbers_than_the_states(way: Any, name: str, refused: Refused) -> None:
    model, tx = nn.Linear(3, 1), ft.optim.sgd(0.1)
    state, loss_fn = ft.init(model, tx), HIDDEN[name](model)
    with refused(state, FtrainError) as caught:
        way(state, ft.train_step(model, loss_fn, tx), BATCH)
    assert re.search("instead of its argument|not connected to any parameter", str(caught.value))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("way", FITS.values(), ids=list(FITS))
def test_a_loss_that_is_not_finite_at_the_first_step(way: Any, value: float) -> None:
    state, step = subject(lambda model, batch: mse(model, batch) * value)
    kept = state.copy()
    with pytest.raises(errors.LossError) as caught:
        way(state, step, BATCH)
    assert str(caught.value).startswith(
        f"the loss is {value} at the first step.\n  where:    step 1, the first batch\n"
    )
    assert "expected: a finite number" in str(caught.value)
    if way is not FITS["fit-donate"]:
        assert same(kept, state)


def test_a_loss_that_is_nan_is_found_before_anything_is_recorded() -> None:
    state, step = subject(lambda model, batch: mse(model, batch) * float("nan"))
    hook, sink = Calls(lambda state, event: state), Calls(lambda record: None)
    with pytest.raises(errors.LossError, match="nan at the first step"):
        fit(state, step, DATA, hooks=[ft.on("step", hook)], sinks=[sink], log=ft.every(steps=1))
    # The hooks of the step are asked first: one of them may leave the batch out.
    assert (hook.n, sink.n) == (1, 0)


# -- metrics --------------------------------------------------------------------------------------------------------------------

METRICS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "vector": (
        {"acc": torch.zeros(4)},
        ("'acc' is neither a scalar nor a metric", "metrics['acc']", "float32[4] on cpu"),
    ),
    "nested": ({"a": {"b": torch.zeros(2)}}, ("'a/b' is neither", "float32[2] on cpu")),
    "string": ({"acc": "high"}, ("'acc' is neither", "got:      str")),
    "none": ({"acc": None}, ("'acc' is neither", "NoneType")),
    "list": ({"acc": [1.0]}, ("'acc' is neither", "got:      list")),
    "no dict": (torch.zeros(()), ("must be a dict of metrics", "float32[] on cpu")),
    "twice": ({"a/b": 1.0, "a": {"b": 2.0}}, ("'a/b' twice",)),
}


@pytest.mark.parametrize("name", METRICS)
@ways(BARE, FITS, {"compiled": COMPILED["compiled"], "compiled-whole": COMPILED["compiled-whole"]})
def test_a_metric_that_is_none(way: Any, name: str, refused: Refused) -> None:
    metrics, parts = METRICS[name]
    state, step = subject(lambda model, batch: (mse(model, batch), metrics))
    with refused(state, errors.MetricError, "the metrics that loss_fn returned", *parts):
        way(state, step, BATCH)


EVALUATED: dict[str, Callable[[Any, Any], Any]] = {
    "step": lambda state, step: step(state, BATCH),
    "evaluate": lambda state, step: ft.evaluate(state, step, DATA, compile=False),
    "evaluate-auto": lambda state, step: ft.evaluate(state, step, DATA, compile="auto", **AOT),
    "evaluate-whole": lambda state, step: ft.evaluate(state, step, DATA, compile=True, **AOT),
    "fit": lambda state, step: fit(state, TRAIN, DATA, evals={"val": ft.Evaluator(step, DATA)}),
}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("way", EVALUATED.values(), ids=list(EVALUATED))
def test_an_evaluation_metric_that_is_none(way: Any, name: str, refused: Refused) -> None:
    metrics, parts = METRICS[name]
    state, step = eval_subject(lambda model, batch: metrics)
    with refused(state, errors.MetricError, "the metrics that metric_fn returned", *parts):
        way(state, step)


@ways(FITS, LOOPS, COMPILED)
def test_a_metric_of_a_hand_written_step(way: Any, refused: Refused) -> None:
    state, _ = subject()
    with refused(state, errors.MetricError, "that the step returned", "'acc' is neither", "float32[4] on cpu"):
        way(state, lambda state, batch: (state.advance(4), {"acc": torch.zeros(4)}), BATCH)


# -- what a step returns --------------------------------------------------------------------------------------------------------


def _params(state: Any, **changes: Any) -> Any:
    return state.replace(params={**state.params, **changes})


OTHER_STATES: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "shape": (
        lambda s: _params(s, bias=torch.zeros(2)),
        ("where:    state.params['bias']", "float32[1] on cpu", "float32[2] on cpu"),
    ),
    "dtype": (
        lambda s: _params(s, weight=s.params["weight"].double()),
        ("where:    state.params['weight']", "float32[1, 3] on cpu", "float64[1, 3] on cpu"),
    ),
    "counter": (lambda s: s.replace(step=s.step.float()), ("state.step", "int64[] on cpu", "float32[] on cpu")),
    "missing": (lambda s: s.replace(params={"weight": s.params["weight"]}), ("state.params", "['bias']", "missing")),
    "extra": (lambda s: s.replace(extra={"ema": torch.zeros(1)}), ("state.extra", "extra ['ema']")),
    "no tensor": (lambda s: _params(s, bias=0.0), ("state.params['bias']", "float32[1] on cpu", "float")),
    "opt": (lambda s: s.replace(opt=(s.opt,)), ("where:    state.opt", "tuple")),
    "device": (lambda s: _params(s, bias=torch.zeros(1, device="meta")), ("state.params['bias']", "on cpu", "on meta")),
}


@pytest.mark.parametrize("name", OTHER_STATES)
@ways(LOOPS, FITS, {k: v for k, v in COMPILED.items() if k != "compiled-loss"})  # a hand-written step has no loss rung
def test_a_step_that_returns_another_state(way: Any, name: str, refused: Refused) -> None:
    change, parts = OTHER_STATES[name]
    state, _ = subject()

    def step(state: Any, batch: Any) -> Any:
        return change(state.advance(4)), {}

    what = "the step returned a state that is not like the one it was given."
    with refused(state, errors.StructureError, what, "state.replace(params=...)", *parts):
        way(state, step, BATCH)


def test_the_text_for_a_state_of_another_shape() -> None:
    state, _ = subject()
    with pytest.raises(errors.StructureError) as caught:
        fit(state, lambda state, batch: (_params(state, bias=torch.zeros(2)), {}), DATA)
    assert str(caught.value) == (
        "the step returned a state that is not like the one it was given.\n"
        "  where:    state.params['bias']\n"
        "  expected: float32[1] on cpu\n"
        "  got:      float32[2] on cpu\n"
        "  fix:      state.replace(params=...)   # with leaves of the same structure, shape, dtype and device"
    )


NO_RESULT: dict[str, tuple[Callable[[Any], Any], str]] = {
    "none": (lambda state: None, "NoneType"),
    "state": (lambda state: state, "TrainState"),
    "metrics first": (lambda state: ({}, state), "tuple"),
    "three": (lambda state: (state, {}, {}), "tuple of 3"),
}


@pytest.mark.parametrize("name", NO_RESULT)
@ways(LOOPS, FITS)
def test_a_step_that_returns_no_state_and_metrics(way: Any, name: str, refused: Refused) -> None:
    change, got = NO_RESULT[name]
    state, _ = subject()
    with refused(state, errors.StateError, "did not return (state, metrics)", "(TrainState, dict of metrics)", got):
        way(state, lambda state, batch: change(state), BATCH)


def test_a_state_of_another_optimizer(refused: Refused) -> None:
    _, step = subject(tx=ft.optim.adam(0.1))
    state, _ = subject(tx=ft.optim.sgd(0.1, momentum=0.9))
    for way in (*BARE.values(), *FITS.values()):
        with refused(state, FtrainError, "state.opt"):
            way(state, step, BATCH)


@ways(BARE, FITS, {"compiled": COMPILED["compiled"]})
def test_a_state_of_another_model(way: Any, refused: Refused) -> None:
    tx = ft.optim.sgd(0.1)
    _, step = subject(tx=tx)
    named = ft.init(nn.Sequential(nn.Linear(3, 1)), tx)
    parts = ("does not belong to the model Linear", "missing: bias, weight", "0.bias, 0.weight", "ft.init(model, tx)")
    with refused(named, errors.StructureError, *parts):
        way(named, step, BATCH)
    wider = ft.init(nn.Linear(5, 1), tx)
    with refused(wider, errors.StructureError, "does not belong to the model Linear", "weight", "3", "5"):
        way(wider, step, BATCH)


@pytest.mark.parametrize("step", [None, 5, "step"])
def test_a_step_that_is_no_function(step: Any, refused: Refused) -> None:
    state, _ = subject()
    with refused(state, errors.StateError, "step", "a function", type(step).__name__):
        fit(state, step, DATA)
    with refused(state, errors.StateError, "ft.loop wants a step as its second argument", type(step).__name__):
        next(ft.loop(state, step, DATA))
    with refused(state, FtrainError, type(step).__name__):
        ft.evaluate(state, step, DATA, compile=False)


def test_a_state_sent_to_the_loop(refused: Refused) -> None:
    state, step = subject()
    for sent, kind, parts in (
        ({"w": 1}, errors.StateError, ("ticks.send wants a TrainState", "dict")),
        (_params(state, bias=torch.zeros(2)), errors.StructureError, ("sent to the loop", "state.params['bias']")),
    ):
        ticks = ft.loop(state, step, DATA)
        next(ticks)
        with refused(state, kind, *parts):
            ticks.send(sent)


# -- something that is no state -------------------------------------------------------------------------------------------------

NO_STATES: dict[str, Any] = {
    "dict": {"w": torch.zeros(1)},
    "module": OUTER,
    "none": None,
    "params": {},
    "tensor": torch.ones(1),
}
STATE_WAYS: dict[str, Callable[[Any, Any, Any], Any]] = {
    **BARE,
    **COMPILED,
    **LOOPS,
    **FITS,
    "evaluate": lambda state, step, batch: ft.evaluate(state, EVAL, [batch], compile=False),
    "predict": lambda state, step, batch: list(ft.predict(state, EVAL, [batch], compile=False)),
    "eval step": lambda state, step, batch: EVAL(state, batch),
    "to_module": lambda state, step, batch: ft.to_module(OUTER, state),
}


@pytest.mark.parametrize("name", NO_STATES)
@ways(STATE_WAYS)
def test_something_that_is_no_state(way: Any, name: str, refused: Refused) -> None:
    value = NO_STATES[name]
    _, step = subject()
    parts = (
        "wants a TrainState as its first argument",
        "expected: TrainState",
        f"got:      {type(value).__name__}",
        "ft.init(",
    )
    with refused(None, errors.StateError, *parts):
        way(value, step, BATCH)


def test_the_text_for_a_module_in_place_of_a_state() -> None:
    _, step = subject()
    with pytest.raises(errors.StateError) as caught:
        fit(OUTER, step, DATA)
    assert str(caught.value) == (
        "ft.fit wants a TrainState as its first argument.\n"
        "  expected: TrainState\n"
        "  got:      Linear\n"
        "  fix:      state = ft.init(model, tx, seed=0)   # `model` is the module that you passed"
    )


@pytest.mark.parametrize("donate", [True, False])
def test_no_state_after_good_ones(donate: bool, refused: Refused) -> None:
    state, step = subject()
    step = ft.compile(step, donate=donate, **AOT)
    state, _ = step(state, BATCH)
    for value in NO_STATES.values():
        with refused(state, errors.StateError, "wants a TrainState", type(value).__name__):
            step(value, BATCH)
    assert step(state, BATCH)[0].counters().step == 2


def test_a_state_with_counters_of_another_kind(refused: Refused) -> None:
    state, step = subject()
    doubled = ft.tree.map(lambda leaf: leaf.double(), state)
    stacked = ft.tree.map(lambda leaf: torch.stack([leaf, leaf]), state)
    for other in (doubled, stacked):
        for way in (*BARE.values(), *FITS.values()):
            with refused(other, FtrainError, "state."):
                way(other, step, BATCH)


# -- models ---------------------------------------------------------------------------------------------------------------------

SGD = ft.optim.sgd(0.1)


def frozen() -> nn.Module:
    return nn.Linear(3, 1).requires_grad_(False)


NOTHING: dict[str, tuple[Any, Any, str]] = {
    "no parameters": (nn.Tanh(), None, "a module without parameters"),
    "all frozen": (frozen(), None, "2 parameters, all frozen"),
    "predicate": (nn.Linear(3, 1), lambda path, p: False, "expected: at least one parameter"),
    "frozen and chosen": (frozen(), "*", "all frozen"),
    "no patterns": (nn.Linear(3, 1), [], "has no trainable parameters"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_model_with_no_trainable_parameters(name: str, refused: Refused) -> None:
    model, trainable, got = NOTHING[name]
    parts = (f"{type(model).__name__} has no trainable parameters", "requires_grad=True", got, "requires_grad_(True)")
    with refused(None, errors.ModelError, *parts):
        ft.init(model, SGD, trainable=trainable)


def test_a_pattern_that_matches_nothing(refused: Refused) -> None:
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1))
    for trainable in ("head.*", ["0.*", "head.*"], ("head.*",)):
        with refused(None, errors.ModelError) as caught:
            ft.init(model, SGD, trainable=trainable)
        assert str(caught.value) == (
            "ft.init: the pattern trainable='head.*' matches no parameter.\n"
            "  expected: a pattern for some of: 0.weight, 0.bias, 1.weight, 1.bias\n"
            '  fix:      trainable="0*"'
        )
    with refused(None, errors.ModelError, "mask='head.*' matches no parameter", "0.weight"):
        ft.init(model, ft.optim.adamw(0.1, mask="head.*"))


def test_lazy_modules(refused: Refused) -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    made: dict[str, Callable[[], Any]] = {
        "ft.init": lambda: ft.init(model, SGD),
        "ft.train_step": lambda: ft.train_step(model, mse, SGD),
        "ft.bind": lambda: ft.bind(model, mse),
        "ft.eval_step": lambda: ft.eval_step(model, lambda model, batch: {}),
        "ft.predict_step": lambda: ft.predict_step(model),
    }
    for make in made.values():
        with refused(None, errors.ModelError, "lazy", "model.0.weight", "more", "model(example_input)"):
            make()
    assert isinstance(model[0].weight, nn.UninitializedParameter)


MODEL_ARGUMENTS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "init order": (lambda: ft.init(SGD, OUTER), ("a module as its first argument", "Transform")),
    "init torch.optim": (
        lambda: ft.init(OUTER, torch.optim.SGD(OUTER.parameters(), lr=0.1)),
        ("wants an optimizer", "Transform(init, update)", "got:      SGD", "holds state of its own", "ft.optim.adamw"),
    ),
    "init factory": (lambda: ft.init(OUTER, ft.optim.adam), ("wants an optimizer", "function")),
    "init none": (lambda: ft.init(OUTER, None), ("wants an optimizer", "NoneType")),
    "step order": (lambda: ft.train_step(mse, OUTER, SGD), ("wants a module", "function")),
    "step torch.optim": (
        lambda: ft.train_step(OUTER, _net, torch.optim.SGD(OUTER.parameters(), lr=0.1)),
        ("wants an optimizer", "got:      SGD"),
    ),
    "step number": (lambda: ft.train_step(OUTER, _net, 0.1), ("wants an optimizer", "float")),
    "no loss": (
        lambda: ft.train_step(OUTER, None, SGD),
        ("loss_fn is not a function", "loss_fn(model, batch)", "NoneType"),
    ),
    "one argument": (
        lambda: ft.train_step(OUTER, lambda batch: 0.0, SGD),
        ("takes other arguments", "loss_fn(model, batch, rng)", "(batch)", "def loss_fn(model, batch)"),
    ),
    "four arguments": (
        lambda: ft.train_step(OUTER, lambda a, b, c, d: 0, SGD),
        ("takes other arguments", "(a, b, c, d)"),
    ),
    "keyword only": (lambda: ft.train_step(OUTER, _keyword, SGD), ("takes other arguments", "scale")),
    "metric_fn": (lambda: ft.eval_step(OUTER, lambda batch: {}), ("metric_fn takes other arguments", "(batch)")),
    "predict": (lambda: ft.predict_step(OUTER, 5), ("not a function", "int")),
    "eval model": (lambda: ft.eval_step(mse, OUTER), ("wants a module", "function")),
}


def _net(net: Any, batch: Any) -> Tensor:
    return mse(net, batch)


def _keyword(net: Any, batch: Any, *, scale: float) -> Tensor:
    return mse(net, batch) * scale


@pytest.mark.parametrize("name", MODEL_ARGUMENTS)
def test_wrong_arguments_for_a_state_or_step(name: str, refused: Refused) -> None:
    make, parts = MODEL_ARGUMENTS[name]
    with refused(None, FtrainError, *parts):
        make()


def test_a_device_that_is_not_supported(refused: Refused) -> None:
    with refused(None, errors.DeviceError) as caught:
        ft.init(OUTER, SGD, device="mps")
    assert str(caught.value) == (
        "ft.init: the device 'mps' is not supported.\n"
        "  expected: cpu or cuda\n"
        "  got:      mps\n"
        "  cause:    MPS has no float64 and no int64 reductions, which counters and metrics need\n"
        '  fix:      ft.init(model, tx, device="cpu")'
    )
    for device in ("xpu", torch.device("mps")):
        with refused(None, errors.DeviceError, "is not supported", "cpu or cuda", str(device)):
            ft.init(OUTER, SGD, device=device)
    with refused(None, errors.DeviceError, "gpu", "cpu or cuda"):
        ft.init(OUTER, SGD, device="gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message for a machine without CUDA")
def test_cuda_without_cuda(refused: Refused) -> None:
    with refused(None, errors.DeviceError, "cuda"):
        ft.init(OUTER, SGD, device="cuda")


def test_a_model_on_several_devices(refused: Refused) -> None:
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1, device="meta"))
    with refused(None, errors.DeviceError, "several devices", "0.weight on cpu", "1.weight on meta", "device="):
        ft.init(model, SGD)


def test_an_unknown_field(refused: Refused) -> None:
    state, _ = subject()
    with refused(
        state, errors.StateError, "unknown field 'ema'", "params, frozen", "extra={**state.extra, 'ema': value}"
    ):
        state.replace(ema=1)


# -- functions that reach the outer model ---------------------------------------------------------------------------------------


def _by_global(model: Any, batch: Any) -> Tensor:
    return mse(OUTER, batch)


def _by_global_in_a_nested_function(model: Any, batch: Any) -> Tensor:
    def inner() -> Tensor:
        return mse(OUTER, batch)

    return inner()


def _closure(outer: nn.Module) -> Callable[..., Any]:
    return lambda model, batch: mse(outer, batch)


def _mixed(outer: nn.Module) -> Callable[..., Any]:
    return lambda net, batch: mse(net, batch) + outer(batch["x"]).mean()


def _part(outer: Any) -> Callable[..., Any]:
    head = outer[0] if isinstance(outer, nn.Sequential) else outer
    return lambda model, batch: head(batch["x"]).mean()


def _parameter(outer: nn.Module) -> Callable[..., Any]:
    weight = next(outer.parameters())
    return lambda model, batch: mse(model, batch) + weight.sum()


OUTER_USES: dict[str, tuple[Any, Callable[[Any], Any], tuple[str, ...]]] = {
    "closure": (
        nn.Linear(3, 1),
        _closure,
        ("the outer model ('outer')", "its argument ('model')", "out = model(batch)"),
    ),
    "mixed": (nn.Linear(3, 1), _mixed, ("the outer model ('outer')", "its argument ('net')")),
    "global": (OUTER, lambda outer: _by_global, ("the outer model ('OUTER')", "its argument ('model')")),
    "nested": (OUTER, lambda outer: _by_global_in_a_nested_function, ("the outer model ('OUTER')",)),
    "part": (nn.Sequential(nn.Linear(3, 1)), _part, ("('head')", "its argument ('model')")),
    "parameter": (nn.Linear(3, 1), _parameter, ("a parameter of the outer model ('weight')", "its argument ('model')")),
}


@pytest.mark.parametrize("name", OUTER_USES)
def test_a_function_that_uses_the_outer_model(name: str, refused: Refused) -> None:
    model, make, parts = OUTER_USES[name]
    fn = make(model)
    kept = [p.detach().clone() for p in model.parameters()]
    common = ("instead of its argument", __name__.rpartition(".")[2], "keeps its first numbers")
    with refused(None, errors.ModelError, "loss_fn uses", *common, *parts):
        ft.train_step(model, fn, SGD)
    with refused(None, errors.ModelError, "loss_fn uses", *common, *parts):
        ft.bind(model, fn)
    with refused(None, errors.ModelError, "metric_fn uses", *common, *parts):
        ft.eval_step(model, fn)
    with refused(None, errors.ModelError, "instead of its argument", *parts):
        ft.predict_step(model, fn)
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))


def _gradient_penalty(model: Any, batch: Any) -> Tensor:
    x = batch["x"].clone().requires_grad_(True)
    loss = mse(model, {**batch, "x": x})
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + gradient.square().sum()


def _teacher_without_no_grad(model: Any, batch: Any) -> Tensor:
    return (model(batch["x"]) - OUTER(batch["x"])).square().mean()


def _teacher(model: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        target = OUTER(batch["x"])
    return (model(batch["x"]) - target).square().mean()


ALLOWED = {"penalty": _gradient_penalty, "teacher": _teacher, "teacher without no_grad": _teacher_without_no_grad}


@pytest.mark.parametrize("name", ALLOWED)
@ways(BARE, {"fit-auto": FITS["fit-auto"], "fit-whole": FITS["fit-whole"]})
def test_other_leaves_with_a_gradient_may_be_used(way: Any, name: str) -> None:
    state, step = subject(ALLOWED[name])
    way(state, step, BATCH)
    assert all(p.grad is None for p in OUTER.parameters())


# -- errors in the user's own code ----------------------------------------------------------------------------------------------


class Boom(Exception):
    """The user's own error."""


def _fails_at(n: int, fn: Callable[..., Any], kind: type[BaseException] = Boom) -> Callable[..., Any]:
    count = itertools.count(1)

    def call(*args: Any) -> Any:
        if next(count) == n:
            raise kind("mine")
        return fn(*args)

    return call


def _batches(n: int) -> Iterator[Any]:
    yield from [BATCH] * n
    raise Boom("mine")


def _loss(model: Any, batch: Any) -> Tensor:
    raise Boom("mine")


class Sink:
    """A sink that fails at its n-th record, and remembers how it was closed."""

    def __init__(self, n: int) -> None:
        self.fails, self.status = _fails_at(n, lambda record: None), ""

    def __call__(self, record: Any) -> None:
        self.fails(record)

    def close(self, status: str) -> None:
        self.status = status


def _run(where: str, **kw: Any) -> Any:
    """A fit of 2 epochs of 3 batches in which the user's code fails; gives the state and a call."""
    state, step = subject(_loss if where == "loss" else mse)
    keep: dict[str, Any] = {"epochs": 2, "log": ft.every(steps=1), **kw}
    data: Any = DATA
    if where == "iterator":
        data, keep["epochs"] = _batches(2), None
        keep["steps"] = 9
    elif where == "data function":
        data = _fails_at(2, lambda epoch: DATA)
    elif where == "sink":
        keep["sinks"] = [Sink(2)]
    elif where == "hook":
        keep["hooks"] = [ft.on("step", _fails_at(2, lambda state, event: state))]
    elif where == "eval step":
        keep["evals"] = {"val": ft.Evaluator(eval_subject(_loss)[1], DATA)}
    elif where == "eval data":
        keep["evals"] = {"val": ft.Evaluator(EVAL, lambda epoch: _batches(1))}
    return state, partial(fit, state, step, data, **keep)


# where it is raised, and what the note says of step and epoch
PLACES = {
    "loss": r"before the first step",
    "iterator": r"step 2\b.*epoch 0",
    "data function": r"step 3\b.*epoch 0",
    "sink": r"step 2\b.*epoch 0",
    "hook": r"step 2\b.*epoch 0",
    "eval step": r"step 3\b.*epoch 0",
    "eval data": r"step 3\b.*epoch 0",
}
MODES: dict[str, dict[str, Any]] = {
    "eager": {"compile": False},
    "auto": {"compile": "auto", **AOT},
    "whole": {"compile": True, **AOT},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", PLACES)
def test_an_error_of_the_users_code_comes_through(place: str, mode: str, rng_guard: Any) -> None:
    state, call = _run(place, **MODES[mode])
    kept = state.copy()
    with rng_guard(), pytest.raises(Boom) as caught:
        call()
    assert (type(caught.value), str(caught.value)) == (Boom, "mine")
    notes = caught.value.__notes__
    assert len(notes) == 1, notes
    assert notes[0].startswith("ftrain: raised in ft.fit")
    assert re.search(PLACES[place], notes[0]), notes[0]
    assert same(kept, state)


def test_an_error_of_a_later_step_comes_through() -> None:
    state, step = subject(_fails_at(5, mse))
    with pytest.raises(Boom) as caught:
        fit(state, step, DATA, epochs=2)
    assert re.search(r"step 4\b.*epoch 1", caught.value.__notes__[0])


def test_an_interrupt_comes_through(rng_guard: Any) -> None:
    state, step = subject()
    sink = Sink(99)
    hook = ft.on("step", _fails_at(2, lambda state, event: state, KeyboardInterrupt))
    with rng_guard(), pytest.raises(KeyboardInterrupt) as caught:
        fit(state, step, DATA, hooks=[hook], sinks=[sink])
    assert "step 2" in caught.value.__notes__[0]
    assert sink.status == "interrupted"
    assert fit(state, step, DATA).state.counters().step == 3


def test_the_note_of_a_donated_run_does_not_promise_the_state() -> None:
    state, step = subject()
    with pytest.raises(Boom) as caught:
        fit(state, step, _batches(2), steps=9, donate=True, **MODES["auto"])
    assert "unchanged" not in caught.value.__notes__[0]
    with pytest.raises(errors.DonatedStateError):
        _ = state.params


def test_a_sink_that_fails_when_it_is_closed() -> None:
    class Bad(Sink):
        def close(self, status: str) -> None:
            raise Boom("closing")

    state, step = subject()
    good = Sink(99)
    with pytest.raises(Boom, match="closing"):
        fit(state, step, DATA, sinks=[Bad(99), good])
    assert good.status == "epochs", "a sink was left open by the failure of another"
    with pytest.raises(Boom, match="mine"):  # the first error is the one to see
        fit(state, step, DATA, sinks=[Bad(1)])


def test_an_error_in_loop_and_evaluate_comes_through(rng_guard: Any) -> None:
    state, step = subject(_loss)
    for one in (step, ft.compile(step, **AOT)):
        kept = state.copy()
        with rng_guard(), pytest.raises(Boom, match=r"^mine$"):
            list(ft.loop(state, one, DATA))
        assert same(kept, state)
    state, step = eval_subject(_loss)
    for kw in MODES.values():
        with rng_guard(), pytest.raises(Boom, match=r"^mine$"):
            ft.evaluate(state, step, DATA, **kw)


# -- hooks ----------------------------------------------------------------------------------------------------------------------


def _forgot(state: Any, event: Any) -> Any:
    return None


def _grows(state: Any, event: Any) -> Any:
    return _params(state, bias=torch.zeros(2))


def _memory(update: Callable[..., Any], name: str = "memory") -> Any:
    return ft.Hook(name, lambda state: {"n": torch.zeros(())}, update)


HOOKS: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "none": (
        _forgot,
        errors.HookError,
        (
            "the hook '_forgot' returned no state at a 'start' event",
            "NoneType",
            "forgot to return state?",
            "return state",
        ),
    ),
    "metrics": (lambda state, event: {"a": 1}, errors.HookError, ("returned no state", "dict")),
    "outcome of none": (lambda state, event: ft.Outcome(None), errors.HookError, ("returned no state", "NoneType")),
    "shape": (
        _grows,
        errors.StructureError,
        ("the hook '_grows'", "'start' event", "state.params['bias']", "float32[1] on cpu", "float32[2] on cpu"),
    ),
    "structure": (
        lambda state, event: state.replace(extra={"a": torch.ones(1)}),
        errors.StructureError,
        ("state.extra",),
    ),
    "metric": (
        lambda state, event: ft.Outcome(state, {"a": torch.zeros(2)}),
        errors.MetricError,
        ("metric that is not a number", "a", "float32[2]"),
    ),
    "no pair": (
        _memory(lambda state, memory, event: state),
        errors.HookError,
        ("the hook 'memory' did not return (state, memory)", "'start' event", "TrainState", "return state, memory"),
    ),
    "memory": (
        _memory(lambda state, memory, event: (state, {"n": torch.zeros(2)})),
        errors.StructureError,
        ("changed the form of its memory", "state.extra['memory']['n']", "float32[] on cpu", "float32[2] on cpu"),
    ),
    "memory none": (
        _memory(lambda state, memory, event: (None, memory)),
        errors.HookError,
        ("the hook 'memory' returned no state", "NoneType"),
    ),
}


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("mode", ["eager", "auto"])
def test_a_hook_that_returns_something_else(name: str, mode: str, refused: Refused) -> None:
    hook, kind, parts = HOOKS[name]
    state, step = subject()
    step = Calls(step)
    with refused(state, kind, *parts):
        fit(state, step, DATA, hooks=[hook], **MODES[mode])
    assert step.n == 0


HOOK_LISTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "number": ([_memory(lambda s, m, e: (s, m)), 5], ("hooks[1]", "ft.Hook(name, init, update)", "int")),
    "same name": ([_memory(lambda s, m, e: (s, m))] * 2, ("two hooks", "'memory'", "a name of its own")),
    "no list": (lambda state, event: state, ("hooks",)),
}


@pytest.mark.parametrize("name", HOOK_LISTS)
def test_wrong_hooks(name: str, refused: Refused) -> None:
    hooks, parts = HOOK_LISTS[name]
    state, step = subject()
    with refused(state, FtrainError, *parts):
        fit(state, step, DATA, hooks=hooks)


def test_on_wants_a_kind_of_event_or_a_cadence(refused: Refused) -> None:
    with refused(None, errors.HookError, "no events of kind 'epochs'", "start, step, evaluation, epoch, end"):
        ft.on("epochs", _forgot)
    with refused(None, errors.HookError, "a kind of event or a cadence", "got:      5"):
        ft.on(5, _forgot)


# -- evaluators, sinks and the other arguments of fit ---------------------------------------------------------------------------


def _evaluator(**kw: Any) -> Any:
    return ft.Evaluator(**{"step": EVAL, "data": DATA, **kw})


EVALS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "step": ({"val": EVAL}, ("evals['val'] is no evaluator", "ft.Evaluator(step, data)", "EvalStep")),
    "pair": ({"val": (EVAL, DATA)}, ("evals['val'] is no evaluator", "tuple", "fix:")),
    "train": ({"train": _evaluator()}, ("cannot be called 'train'",)),
    "slash": ({"a/b": _evaluator()}, ("cannot be called 'a/b'", 'a name without "/"')),
    "every": ({"val": _evaluator(every=5)}, ("evals['val'].every is no cadence", "ft.every(epochs=1)", "got:      5")),
    "iterator": ({"val": _evaluator(data=iter(DATA))}, ("'val'", "iterator", "at its end after one evaluation")),
    "arrays": ({"val": _evaluator(data=BATCH)}, ("'val'", "arrays, not batches", "batch_size=")),
    "no data": ({"val": _evaluator(data=None)}, ("'val'", "cannot be iterated", "NoneType")),
    "no step": ({"val": _evaluator(step=None)}, ("val", "NoneType")),
    "list": ([_evaluator()], ("evals", "list")),
    "bare": (_evaluator(), ("evals", "Evaluator")),
}


@pytest.mark.parametrize("name", EVALS)
def test_wrong_evaluators(name: str, refused: Refused) -> None:
    evals, parts = EVALS[name]
    state, step = subject()
    step = Calls(step)
    with refused(state, FtrainError, *parts):
        fit(state, step, DATA, evals=evals)
    assert step.n == 0


@pytest.mark.parametrize(
    "way", [w for k, w in EVALUATED.items() if k != "step"], ids=[k for k in EVALUATED if k != "step"]
)
def test_a_train_step_in_place_of_an_evaluation_step(way: Any, refused: Refused) -> None:
    state, step = subject()
    kind, text = errors.MetricError, "returned a tuple, not metrics"
    if way is EVALUATED["fit"]:  # which looks at the step before the first epoch
        kind, text = errors.DataError, "its step is one that trains"
    with refused(state, kind, text, "ft.eval_step(model, metric_fn"):
        way(state, step)


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "log": ({"log": 5}, "log"),
    "sinks function": ({"sinks": lambda record: None}, "sinks"),
    "sinks none": ({"sinks": [None]}, "sinks"),
    "progress": ({"progress": 5}, "progress"),
    "compile": ({"compile": "fast"}, "compile='fast'"),
    "compile list": ({"compile": []}, "compile=[]"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_options_of_fit(name: str, refused: Refused) -> None:
    kw, part = OPTIONS[name]
    state, step = subject()
    step = Calls(step)
    with refused(state, FtrainError, part):
        fit(state, step, DATA, **kw)
    assert step.n == 0


# -- compile --------------------------------------------------------------------------------------------------------------------

COMPILES: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "rung": (lambda step: ft.compile(step, rung="whole"), ("unknown rung 'whole'", "auto, step, loss or eager")),
    "mode": (
        lambda step: ft.compile(step, backend="eager", mode="max-autotune"),
        ("are Inductor's", "backend='eager'"),
    ),
    "options": (lambda step: ft.compile(step, backend="eager", options={"a": 1}), ("are Inductor's",)),
    "twice": (lambda step: ft.compile(ft.compile(step)), ("compiled already", "ft.compile(step.step, ...)")),
    "no function": (lambda step: ft.compile(5), ("int",)),
    "backend": (lambda step: ft.compile(step, backend="inductr"), ("inductr",)),
    "unknown mode": (lambda step: ft.compile(step, mode="max"), ("max",)),
    "unknown option": (lambda step: ft.compile(step, options={"nope": 1}), ("nope",)),
}


@pytest.mark.parametrize("name", COMPILES)
def test_wrong_arguments_of_compile(name: str, refused: Refused) -> None:
    make, parts = COMPILES[name]
    with refused(None, errors.CompileError, *parts):
        make(TRAIN)


@pytest.mark.parametrize("compile", [True, "auto"])
def test_fit_with_an_unknown_backend(compile: Any, refused: Refused) -> None:
    state, step = subject()
    with refused(state, errors.CompileError, "inductr"):
        fit(state, step, DATA, compile=compile, backend="inductr")


def test_a_step_that_does_not_compile_whole(refused: Refused) -> None:
    state, step = subject(lambda model, batch: mse(model, batch) * (1.0 if mse(model, batch) > 0 else 2.0))
    for call in (
        ft.compile(step, rung="step", **AOT),
        lambda state, batch: fit(state, step, [batch], **MODES["whole"]),
    ):
        with refused(
            state, errors.CompileError, "does not compile as the whole step in one graph", "got:", "ft.compile(step)"
        ):
            call(state, BATCH)


# -- time, optimizers, schedules ------------------------------------------------------------------------------------------------

TIMES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "every nothing": (ft.every, ("ft.every wants exactly one unit", "steps=, epochs=", "got:      none")),
    "every both": (lambda: ft.every(steps=1, epochs=2), ("exactly one unit", "steps=1, epochs=2")),
    "every zero": (
        lambda: ft.every(steps=0),
        ("ft.every(steps=0) makes no sense", "a positive integer", "ft.every(steps=1)"),
    ),
    "every half": (lambda: ft.every(epochs=0.5), ("ft.every(epochs=0.5)", "a positive integer")),
    "every text": (lambda: ft.every(steps="1"), ("ft.every(steps='1')",)),
    "until nan": (lambda: ft.until(seconds=float("nan")), ("ft.until(seconds=nan)", "a positive number")),
    "until negative": (lambda: ft.until(seconds=-1), ("ft.until(seconds=-1)", "a positive number")),
    "until inf": (lambda: ft.until(seconds=float("inf")), ("ft.until(seconds=inf)",)),
    "until true": (lambda: ft.until(samples=True), ("ft.until(samples=True)",)),
    "at negative": (lambda: ft.at(-1), ("ft.at: -1 is not a step", "an integer >= 0", "ft.at(0)")),
    "at float": (lambda: ft.at(1.0), ("ft.at: 1.0 is not a step",)),
}


@pytest.mark.parametrize("name", TIMES)
def test_wrong_times(name: str, refused: Refused) -> None:
    make, parts = TIMES[name]
    with refused(None, errors.LimitError, *parts):
        make()


def test_a_cadence_joined_with_something_else() -> None:
    for join in (lambda: ft.every(steps=1) | 5, lambda: ft.until(steps=1) & None):
        with pytest.raises(TypeError, match=r"cannot join a cadence and (5|None)"):
            join()


NOT_HYPER: dict[str, Callable[[], Any]] = {
    "lr=": lambda: ft.optim.adam("0.1"),
    "lr=None": lambda: ft.optim.sgd(None),
    "lr=True": lambda: ft.optim.adamw(True),
    "max_norm='1'": lambda: ft.optim.clip_by_global_norm("1"),
    "value=None": lambda: ft.schedules.constant(None),
    "peak='a'": lambda: ft.schedules.warmup_cosine("a", 1, 2),
}
NEGATIVE: dict[str, Callable[[], Any]] = {
    "lr=-0.1 is negative": lambda: ft.optim.sgd(-0.1),
    "lr=nan is not a number": lambda: ft.optim.adam(float("nan")),
    "momentum=-1": lambda: ft.optim.sgd(0.1, momentum=-1),
    "weight_decay=-0.1": lambda: ft.optim.adamw(0.1, weight_decay=-0.1),
    "b1=-0.9": lambda: ft.optim.adam(0.1, b1=-0.9),
    "eps=-1e-08": lambda: ft.optim.adam(0.1, eps=-1e-8),
    "max_norm=-1.0": lambda: ft.optim.clip_by_global_norm(-1.0),
    "value=-0.1": lambda: ft.schedules.constant(-0.1),
    "peak=-0.1": lambda: ft.schedules.warmup_cosine(-0.1, 1, 2),
    "warmup_steps=-1": lambda: ft.schedules.warmup_cosine(0.1, -1, 2),
    "lr=-1.0": lambda: ft.optim.inject(ft.optim.adam)(lr=-1.0),
}


@pytest.mark.parametrize("text", NOT_HYPER)
def test_a_hyper_parameter_that_is_none(text: str) -> None:
    with pytest.raises(TypeError, match=re.escape(text)) as caught:
        NOT_HYPER[text]()
    assert "is not a hyper-parameter.\n  expected: a number >= 0, a 0-d tensor or a schedule\n" in str(caught.value)
    assert "fix:" in str(caught.value)


@pytest.mark.parametrize("text", NEGATIVE)
def test_a_hyper_parameter_out_of_range(text: str, refused: Refused) -> None:
    with refused(None, errors.LimitError, text, "expected: a number >= 0", "fix:"):
        NEGATIVE[text]()


def test_a_schedule_without_a_decay(refused: Refused) -> None:
    parts = (
        "the decay has no length",
        "total_steps > warmup_steps (10)",
        "total_steps=10",
        "warmup_cosine(0.1, 10, 100)",
    )
    with refused(None, errors.LimitError, *parts):
        ft.schedules.warmup_cosine(0.1, 10, 10)


def test_a_chain_of_something_else() -> None:
    for position, wrong in ((0, [ft.optim.sgd(0.1)]), (1, None), (1, torch.optim.SGD)):
        args = (wrong,) if position == 0 else (ft.optim.sgd(0.1), wrong)
        with pytest.raises(TypeError, match=r"ft\.optim\.chain wants transforms") as caught:
            ft.optim.chain(*args)
        assert f"where:    argument {position}\n  expected: Transform(init, update)" in str(caught.value)
        assert "fix:" in str(caught.value)


# -- donated states -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def donated() -> tuple[Any, Any, Any]:
    """`(gone, new, step)`: a state that was given away, the one that came back, and the compiled step."""
    state, step = subject()
    step = ft.compile(step, donate=True, **AOT)
    new, _ = step(state, BATCH)
    return state, new, step


USES: dict[str, Callable[[Any, Any], Any]] = {
    "params": lambda state, step: state.params,
    "step": lambda state, step: state.step,
    "counters": lambda state, step: state.counters(),
    "device": lambda state, step: state.device,
    "copy": lambda state, step: state.copy(),
    "replace": lambda state, step: state.replace(extra={}),
    "advance": lambda state, step: state.advance(4),
    "tree": lambda state, step: ft.tree.leaves(state),
    "bare step": lambda state, step: step.step(state, BATCH),
    "compiled step": lambda state, step: step(state, BATCH),
    "fit": lambda state, step: fit(state, step, DATA),
    "loop": lambda state, step: next(ft.loop(state, step, DATA)),
    "evaluate": lambda state, step: ft.evaluate(state, EVAL, DATA, compile=False),
    "predict": lambda state, step: list(ft.predict(state, EVAL, DATA, compile=False)),
    "to_module": lambda state, step: ft.to_module(OUTER, state),
}


@pytest.mark.parametrize("use", USES)
def test_a_donated_state_used_again(use: str, donated: Any, refused: Refused) -> None:
    gone, new, step = donated
    parts = (
        "of a state whose memory was given to a compiled step at step 0",
        "donate=True",
        "state.copy()",
        "donate=False",
    )
    with refused(new, errors.DonatedStateError, *parts):
        USES[use](gone, step)


def test_the_text_for_a_donated_state(donated: Any) -> None:
    gone, _, _ = donated
    with pytest.raises(errors.DonatedStateError) as caught:
        _ = gone.params
    assert str(caught.value) == (
        "reading state.params of a state whose memory was given to a compiled step at step 0.\n"
        "  cause:    ft.compile(step, donate=True) overwrites its input, so only the state that it returned is valid\n"
        "  fix:      state, metrics = step(state, batch)      # go on with the returned state\n"
        "            kept = state.copy()                      # or copy before the step what must survive it\n"
        "            step = ft.compile(step, donate=False)    # or compile without donation"
    )
    assert repr(gone) == "TrainState(donated at step 0)"


@pytest.mark.parametrize("rung", ["step", "loss", "eager"])
def test_a_sibling_of_a_donated_state(rung: Any, refused: Refused) -> None:
    state, step = subject()
    compiled = ft.compile(step, donate=True, rung=rung, **AOT)
    state, _ = compiled(state, BATCH)
    sibling = state.replace(extra={})
    new, _ = compiled(state, BATCH)
    kept = new.copy()
    uses = [
        (k, v) for k, v in USES.items() if k in ("bare step", "compiled step", "fit", "loop", "evaluate", "to_module")
    ]
    for _, use in uses:
        with refused(new, errors.DonatedStateError, "overwritten after it was made", ".replace", "state.copy()"):
            use(sibling, compiled)
    assert same(kept, new)


def test_fit_leaves_the_callers_state_and_donates_when_told() -> None:
    state, step = subject()
    kept = state.copy()
    result = fit(state, step, DATA, **MODES["auto"])
    assert same(kept, state)
    assert result.state.counters().step == 3
    fit(state, step, DATA, donate=True, **MODES["auto"])
    with pytest.raises(
        errors.DonatedStateError, match=r"reading state\.params of a state whose memory was given .* at step 0"
    ):
        _ = state.params
