"""The loop, fit, hooks, units of time, data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import ftrain as ft

from .corpus import MODELS, setup


def fit(*args: Any, **kwargs: Any) -> ft.Result:
    return ft.fit(*args, **{"progress": False, "compile": False, **kwargs})


# -- loop -----------------------------------------------------------------------------------------------------------------------------


def test_the_loop_is_a_fold_and_counts() -> None:
    case, step, state = setup("mlp")
    by_hand = state
    for tick, batch in zip(ft.loop(state, step, case.batches(3), epochs=2), case.batches(3) * 2, strict=True):
        by_hand, _ = step(by_hand, batch)
        assert torch.equal(tick.state.params["0.weight"], by_hand.params["0.weight"])
        assert (tick.step, tick.samples) == (by_hand.counters().step, by_hand.counters().samples)
    assert tick.epoch == 1
    assert tick.batch == 2


def test_a_consumer_may_send_another_state() -> None:
    case, step, state = setup("mlp")
    ticks = ft.loop(state, step, case.batches(2))
    first = next(ticks)
    zeros = ft.tree.map(torch.zeros_like, first.state.params)
    assert ticks.send(first.state.replace(params=zeros)).step == 1
    second = next(ticks)
    expected, _ = step(first.state.replace(params=zeros), case.batch(seed=1))
    assert torch.equal(second.state.params["3.bias"], expected.params["3.bias"])
    with pytest.raises(ft.errors.StructureError, match="sent to the loop"):
        ticks.send(first.state.replace(params={}))


def test_a_loop_over_endless_data_is_left_by_its_consumer() -> None:
    case, step, state = setup("mlp")
    closed: list[bool] = []

    def forever(epoch: int) -> Any:
        try:
            while True:
                yield case.batch()
        finally:
            closed.append(True)

    ticks = ft.loop(state, step, forever)
    assert [next(ticks).step for _ in range(3)] == [1, 2, 3]
    ticks.close()
    assert closed == [True]


@pytest.mark.parametrize(
    ("limits", "steps", "reason"),
    [
        ({}, 3, "epochs"),
        ({"epochs": 2}, 6, "epochs"),
        ({"steps": 4}, 4, "steps"),
        ({"steps": 3}, 3, "steps"),
        ({"epochs": 2, "steps": 4}, 4, "steps"),
        ({"until": ft.until(samples=20)}, 3, "until"),
        ({"until": ft.at(2)}, 2, "until"),
        ({"until": ft.until(steps=2) & ft.until(epochs=2)}, 6, "until"),
        ({"epochs": 9, "until": ft.until(seconds=1e-9)}, 1, "until"),
    ],
    ids=str,
)
def test_limits(limits: dict[str, Any], steps: int, reason: str) -> None:
    case, step, state = setup("mlp")
    result = fit(state, step, case.batches(3), **limits)
    assert (result.state.counters().step, result.reason) == (steps, reason)


def test_fit_goes_on_where_a_state_is() -> None:
    case, step, state = setup("mlp")
    arrays = case.batch(24)
    whole = fit(state, step, arrays, batch_size=8, epochs=4)
    half = fit(state, step, arrays, batch_size=8, epochs=2)
    rest = fit(half.state, step, arrays, batch_size=8, epochs=2)
    assert rest.state.counters() == whole.state.counters() == (12, 4, 96, 0)
    assert all(torch.equal(a, b) for a, b in zip(*map(ft.tree.leaves, (whole.state, rest.state)), strict=True))
    assert rest.history[-1].epoch == 4


# -- data -----------------------------------------------------------------------------------------------------------------------------


def test_the_forms_of_data_give_the_same_batches() -> None:
    case, step, state = setup("mlp")
    rows = case.batch(12)
    batches = [{k: v[i : i + 4] for k, v in rows.items()} for i in (0, 4, 8)]
    forms: dict[str, Any] = {
        "list": batches,
        "callable": lambda epoch: iter(batches),
        "loader": DataLoader(list(range(3)), batch_size=None, collate_fn=lambda i: batches[i]),
        "generator": (b for b in batches),
        "numpy": [{k: v.numpy() for k, v in b.items()} for b in batches],
    }
    found = {name: fit(state, step, data, steps=3).state for name, data in forms.items()}
    found["arrays"] = fit(state, step, rows, batch_size=4, shuffle=False).state
    found["numpy arrays"] = fit(state, step, {k: v.numpy() for k, v in rows.items()}, batch_size=4, shuffle=False).state
    for name, one in found.items():
        assert torch.equal(one.params["0.weight"], found["list"].params["0.weight"]), name


def test_shuffled_arrays_visit_each_sample_once_an_epoch_in_another_order() -> None:
    epochs = ft.data.as_epochs((torch.arange(10), torch.arange(10) * 2), batch_size=4, shuffle=True, seed=1)
    one, two = (list(epochs(e)) for e in (0, 1))
    assert [len(b[0]) for b in one] == [4, 4, 2]
    order = [torch.cat([b[0] for b in epoch]).tolist() for epoch in (one, two)]
    assert sorted(order[0]) == sorted(order[1]) == list(range(10))
    assert order[0] != order[1]
    assert all(torch.equal(b[1], b[0] * 2) for b in one)
    again = ft.data.as_epochs((torch.arange(10), torch.arange(10)), batch_size=4, shuffle=True, seed=1)
    assert torch.cat([b[0] for b in again(0)]).tolist() == order[0]


def test_a_loaders_workers_and_generators_end_with_the_run() -> None:
    case, step, state = setup("mlp")
    closed: list[int] = []

    def batches(epoch: int) -> Any:
        try:
            yield from case.batches(5)
        finally:
            closed.append(epoch)

    def failing(state: Any, event: Any) -> Any:
        if event.step == 2:
            raise RuntimeError("stop here")
        return state

    with pytest.raises(RuntimeError, match="stop here"):
        fit(state, step, batches, epochs=2, hooks=[failing])
    assert closed == [0]


# -- evaluate, predict ----------------------------------------------------------------------------------------------------------------


def test_the_short_last_batch_counts_as_much_as_it_has_samples() -> None:
    case, _, state = setup("mlp")
    metric = ft.eval_step(
        case.model(),
        lambda model, batch: {"first": batch["x"][:, 0].mean(), "n": ft.metrics.Sum(batch["x"][:, 0].new_ones(()))},
    )
    rows = case.batch(11)
    found = ft.evaluate(state, metric, rows, batch_size=4, compile=False)
    assert found["first"] == pytest.approx(float(rows["x"][:, 0].double().mean()), rel=1e-6)
    assert found["n"] == 3.0


def test_predictions_come_in_order_and_batches_have_keys_of_their_own() -> None:
    case, _, state = setup("mlp")
    model = case.model()
    out = list(
        ft.predict(state, ft.predict_step(model, lambda m, b: (m(b["x"]), b["y"])), case.batches(3), compile=False)
    )
    assert torch.equal(torch.cat([y for _, y in out]), torch.cat([b["y"] for b in case.batches(3)]))
    noise = ft.predict_step(model, lambda m, b, rng: ft.rng.uniform(rng))
    one, two = ([float(x) for x in ft.predict(state, noise, case.batches(3), compile=False)] for _ in range(2))
    assert one == two
    assert len(set(one)) == 3


# -- hooks and the order of things ------------------------------------------------------------------------------------------------------


def test_the_order_of_events_is_this_list() -> None:
    case, step, state = setup("mlp")
    seen: list[str] = []

    def hook(state: Any, event: ft.Event) -> Any:
        seen.append(f"{event.kind} {event.step}")
        return state

    class Sink:
        def __call__(self, record: ft.Record) -> None:
            seen.append(f"{record.split} record {record.step}")

        def close(self, status: str) -> None:
            seen.append(f"closed {status}")

    evals = {
        "val": ft.Evaluator(
            ft.eval_step(case.model(), lambda m, b: {"x": b["x"].mean()}),
            case.batches(1),
            every=ft.every(epochs=1) | ft.at(0),
        )
    }
    fit(state, step, case.batches(2), epochs=1, evals=evals, hooks=[hook], sinks=[Sink()], log=ft.every(steps=1))
    assert seen == [
        "start 0", "evaluation 0", "val record 0",
        "step 1", "train record 1",
        "step 2", "epoch 2", "evaluation 2", "train record 2", "val record 2",
        "end 2", "closed epochs",
    ]  # fmt: skip


def test_hooks_change_the_state_return_metrics_and_stop() -> None:
    case, step, state = setup("mlp")

    def halve(state: ft.TrainState, event: ft.Event) -> Any:
        return ft.Outcome(
            state.replace(params=ft.tree.map(lambda p: p / 2, state.params)), metrics={"halved": event.step}
        )

    def stop(state: ft.TrainState, event: ft.Event) -> Any:
        return ft.Outcome(state, stop="enough")

    result = fit(
        state,
        step,
        case.batches(5),
        hooks=[ft.on(ft.every(steps=2), halve), ft.on(ft.at(4), stop)],
        log=ft.every(steps=1),
    )
    assert (result.reason, result.state.counters().step) == ("enough", 4)
    assert result.history["halved"].tolist() == [2.0, 4.0]
    by_hand = state
    for i, batch in enumerate(case.batches(4), start=1):
        by_hand, _ = step(by_hand, batch)
        if i % 2 == 0:
            by_hand = by_hand.replace(params=ft.tree.map(lambda p: p / 2, by_hand.params))
    assert torch.equal(result.state.params["3.weight"], by_hand.params["3.weight"])


@pytest.mark.parametrize("compile", [False, "auto"])
def test_a_hook_with_memory_keeps_it_in_the_state(compile: Any) -> None:
    case, step, state = setup("mlp")

    def update(state: ft.TrainState, memory: Any, event: ft.Event) -> Any:
        return state, {"calls": memory["calls"] + 1}

    hook = ft.Hook("counter", lambda state: {"calls": torch.zeros((), dtype=torch.int64)}, update)
    kwargs: dict[str, Any] = {"hooks": [ft.on("step", hook)], "compile": compile, "backend": "eager"}
    result = fit(state, step, case.batches(3), **kwargs)
    assert int(result.state.extra["counter"]["calls"]) == 3
    again = fit(result.state, step, case.batches(3), **kwargs)
    assert int(again.state.extra["counter"]["calls"]) == 6


def test_a_hook_that_does_not_fire_changes_nothing() -> None:
    case, step, state = setup("mlp")
    plain = fit(state, step, case.batches(3))
    hooked = fit(state, step, case.batches(3), hooks=[ft.on(ft.every(steps=100), lambda s, e: s.replace(params={}))])
    assert all(torch.equal(a, b) for a, b in zip(*map(ft.tree.leaves, (plain.state, hooked.state)), strict=True))


def test_records_and_history_are_those_of_the_steps() -> None:
    case, step, state = setup("mlp")
    seen: list[ft.Record] = []
    result = fit(state, step, case.batches(5), sinks=[seen.append], log=ft.every(steps=2))
    assert list(result.history) == seen
    assert [r.step for r in seen] == [2, 4, 5]
    losses, by_hand = [], state
    for batch in case.batches(5):
        by_hand, found = step(by_hand, batch)
        losses.append(float(found["loss"].compute()))
    expected = [sum(losses[:2]) / 2, sum(losses[2:4]) / 2, losses[4]]
    assert result.history["loss"].tolist() == pytest.approx(expected, rel=1e-6)


def test_every_sink_is_closed_and_user_errors_carry_the_place() -> None:
    case, step, state = setup("mlp")
    statuses: list[str] = []

    class Sink:
        def __call__(self, record: ft.Record) -> None:
            if record.step == 2:
                raise OSError("disk full")

        def close(self, status: str) -> None:
            statuses.append(status)

    with pytest.raises(OSError, match="disk full") as caught:
        fit(state, step, case.batches(4), sinks=[Sink(), Sink()], log=ft.every(steps=1))
    assert statuses == ["error", "error"]
    assert caught.value.__notes__ == [
        "ftrain: raised in ft.fit, after step 2 was complete (epoch 0, batch 1). The state given to ft.fit is unchanged."
    ]


# -- the compiled step in the loop ------------------------------------------------------------------------------------------------------


def test_fit_copies_once_and_donate_skips_it() -> None:
    case, step, state = setup("mlp")
    address = state.params["0.weight"].data_ptr()
    assert fit(state, step, case.batches(2)).state.params["0.weight"].data_ptr() != address
    mine = state.copy()
    where = mine.params["0.weight"].data_ptr()
    assert fit(mine, step, case.batches(2), donate=True).state.params["0.weight"].data_ptr() == where
    with pytest.raises(ft.errors.DonatedStateError, match="at step 0"):
        _ = mine.params


def test_two_loops_interleaved_do_not_meet() -> None:
    case, step, state = setup("mlp")
    fast = ft.compile(step, backend="eager")
    alone = [float(t.metrics["loss"].compute()) for t in ft.loop(state.copy(), fast, case.batches(3))]
    one, two = ft.loop(state.copy(), fast, case.batches(3)), ft.loop(state.copy(), fast, case.batches(3))
    together = [[float(t.metrics["loss"].compute()) for t in pair] for pair in zip(one, two, strict=True)]
    assert together == [[a, a] for a in alone]


def test_a_step_vmaps_over_stacked_states() -> None:
    case = MODELS["two_heads"]
    model, tx = case.model(), ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(1e-2))
    step = ft.train_step(model, case.loss_fn, tx)
    states = [ft.init(case.make(), tx, seed=i) for i in range(3)]
    structure, batch = ft.tree.structure(states[0]), case.batch()
    stacked = [torch.stack(row) for row in zip(*map(ft.tree.leaves, states), strict=True)]

    def flat(leaves: list[torch.Tensor]) -> list[torch.Tensor]:
        return ft.tree.leaves(step(ft.tree.unflatten(structure, leaves), batch)[0])

    together = torch.func.vmap(flat)(stacked)
    for i, state in enumerate(states):
        alone = ft.tree.leaves(step(state, batch)[0])
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(b[i], a, rtol=1e-5, atol=1e-6)
