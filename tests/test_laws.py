"""The laws of DESIGN.md over the corpus: models x optimizers x backends."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ftrain as ft
from ftrain import tree

from .corpus import ALL_OPTIMIZERS, MODELS, OPTIMIZERS, setup


def bits(state: Any) -> list[bytes]:
    return [leaf.numpy().tobytes() for leaf in tree.leaves(state)]


def trained(state: ft.TrainState) -> list[bytes]:
    """What training changes, without the loop's own counter of epochs."""
    return bits((state.params, state.frozen, state.buffers, state.opt, state.step, state.samples))


# -- laws 1, 2, 8 on eager steps: the whole product ---------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "optimizer"), list(itertools.product(MODELS, OPTIMIZERS)))
def test_eager_step_moves_keeps_its_form_is_pure_and_draws_from_its_seed(model: str, optimizer: str) -> None:
    case, step, state = setup(model, optimizer)
    ft.testing.check_moves(step, state, case.batch())
    ft.testing.check_structure(step, state, case.batch())
    ft.testing.check_pure(step, state, case.batch())
    ft.testing.check_random(step, state, case.batch())


@pytest.mark.parametrize("optimizer", [name for name in ALL_OPTIMIZERS if name not in OPTIMIZERS])
def test_eager_laws_of_the_optimizers_outside_of_the_product(optimizer: str) -> None:
    case, step, state = setup("two_heads", optimizer)
    ft.testing.check_moves(step, state, case.batch())
    ft.testing.check_structure(step, state, case.batch())
    ft.testing.check_pure(step, state, case.batch())
    ft.testing.check_random(step, state, case.batch())


# -- laws 3, 9 and donation: every model, every optimizer -----------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_compiled_step_of_every_model(model: str) -> None:
    case, step, state = setup(model, "adamw_clip_warmup")
    ft.testing.check_step(step, state, case.batch(), backend="aot_eager")
    fast = ft.compile(step, backend="eager")
    fast(state.copy(), case.batch())
    assert (fast.rung, fast.reason, fast.compiles) == ("step", None, 1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_compiled_step_of_every_optimizer(optimizer: str) -> None:
    case, step, state = setup("two_heads", optimizer)
    ft.testing.check_compiled(step, state, case.batch(), backend="eager")
    ft.testing.check_donation(step, state, case.batch(), backend="eager")


@pytest.mark.inductor
@pytest.mark.parametrize("model", ["two_heads", "conv_bn", "lstm"])
def test_inductor_agrees_with_eager(model: str) -> None:
    case, step, state = setup(model, "adamw_clip_warmup")
    ft.testing.check_compiled(step, state, case.batch(), backend="inductor")
    ft.testing.check_donation(step, state, case.batch(), backend="inductor")


@pytest.mark.inductor
def test_inductor_agrees_with_eager_on_dropout_where_it_draws_the_same_numbers() -> None:
    case, step, state = setup("mlp", "sgd")
    with torch._inductor.config.patch(fallback_random=True):
        ft.testing.check_compiled(step, state, case.batch(), backend="inductor")


@pytest.mark.inductor
def test_inductors_dropout_is_a_function_of_seed_and_step() -> None:
    case, step, state = setup("mlp", "sgd")
    fast = ft.compile(step, donate=False)
    ft.testing.check_random(fast, state, case.batch())
    ft.testing.check_pure(fast, state, case.batch())
    one = fast(state, case.batch())[1]["loss"].compute()
    two = fast(state.replace(seed=state.seed + 1), case.batch())[1]["loss"].compute()
    three = fast(state.replace(step=state.step + 1), case.batch())[1]["loss"].compute()
    assert len({float(one), float(two), float(three)}) == 3


# -- law 5: wrappers around the identity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_train_step_is_the_composition_that_its_docstring_shows(model: str) -> None:
    case, step, state = setup(model, "adam")
    tx = OPTIMIZERS["adam"]()
    by_hand = ft.make_step(ft.value_and_grad(ft.bind(case.model(), case.loss_fn)), tx)
    assert bits(step(state, case.batch())[0]) == bits(by_hand(state, case.batch())[0])


def test_an_empty_chain_and_the_identity_change_nothing() -> None:
    case = MODELS["two_heads"]
    model = case.model()
    plain = ft.optim.adam(1e-2)
    wrapped = ft.optim.chain(ft.optim.identity(), ft.optim.chain(), plain, ft.optim.clip_by_global_norm(1e9))
    one = ft.train_step(model, case.loss_fn, plain)(ft.init(model, plain), case.batch())[0]
    two = ft.train_step(model, case.loss_fn, wrapped)(ft.init(model, wrapped), case.batch())[0]
    assert bits(one.params) == bits(two.params)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_step_compiled_to_eager_is_the_step(backend: str) -> None:
    case, step, state = setup("gpt", "adam")
    for rung in ("eager", "step"):
        fast = ft.compile(step, rung=rung, backend=backend)
        assert bits(fast(state.copy(), case.batch())[0].params) == bits(step(state, case.batch())[0].params)


# -- law 7, 13: evaluation does not disturb training; fit twice is the same ------------------------------------------------------


def evaluator(case: Any, **kwargs: Any) -> ft.Evaluator:
    def noisy(model: nn.Module, batch: Any, rng: torch.Tensor) -> Any:
        torch.rand(3), np.random.rand(), random.random()  # a careless metric
        model.train()  # a careless author
        loss = case.loss_fn(model, batch)
        return {"loss": loss[0] if isinstance(loss, tuple) else loss, "noise": ft.rng.uniform(rng)}

    return ft.Evaluator(ft.eval_step(case.model(), noisy), case.batches(2), **kwargs)


@pytest.mark.parametrize("model", MODELS)
def test_evaluation_leaves_training_bitwise_as_it_is(model: str) -> None:
    case, step, state = setup(model, "adam")
    plain = ft.fit(state, step, case.batches(3), epochs=2, progress=False, compile=False)
    evals = {"val": evaluator(case, every=ft.every(steps=1) | ft.at(0))}
    watched = ft.fit(state, step, case.batches(3), epochs=2, evals=evals, progress=False, compile=False)
    assert bits(plain.state) == bits(watched.state)
    assert len(watched.history["val/loss"]) == 7


@pytest.mark.parametrize("model", ["mlp", "conv_bn"])
def test_compiled_evaluation_leaves_training_bitwise_as_it_is(model: str) -> None:
    case, step, state = setup(model, "adam")
    plain = ft.fit(state, step, case.batches(3), epochs=2, progress=False, backend="eager")
    metric = ft.eval_step(case.model(), lambda model, batch: case.loss_fn(model, batch)[1])
    evals = {"val": ft.Evaluator(metric, case.batches(2), every=ft.every(steps=1) | ft.at(0))}
    watched = ft.fit(state, step, case.batches(3), epochs=2, evals=evals, progress=False, backend="eager")
    assert bits(plain.state) == bits(watched.state)
    assert len(watched.history["val/accuracy"]) == 7


@pytest.mark.parametrize("model", MODELS)
def test_fit_twice_is_bitwise_the_same_and_leaves_the_callers_state(model: str) -> None:
    case, step, state = setup(model, "adam")
    before = bits(state)
    results = []
    for noise in (1, 2):
        torch.manual_seed(noise), np.random.seed(noise), random.seed(noise)
        results.append(ft.fit(state, step, case.batches(3), epochs=2, progress=False, compile=False))
    assert bits(results[0].state) == bits(results[1].state)
    assert [r.metrics for r in results[0].history] == [r.metrics for r in results[1].history]
    assert bits(state) == before


def test_fit_is_the_fold_of_the_step() -> None:
    case, step, state = setup("gpt", "adam")
    result = ft.fit(state, step, case.batches(5), progress=False, compile=False)
    by_hand = state
    for batch in case.batches(5):
        by_hand, _ = step(by_hand, batch)
    assert trained(result.state) == trained(by_hand)


# -- law 8: the global generators are as the user left them ------------------------------------------------------------------------


def test_every_public_call_leaves_the_global_generators_alone(rng_guard: Any) -> None:
    case = MODELS["mlp"]
    model, tx = case.model(), ft.optim.adam(1e-2)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(
            torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
        ),
        batch_size=4,
        shuffle=True,
        collate_fn=lambda rows: {"x": torch.stack([r[0] for r in rows]), "y": torch.stack([r[1] for r in rows])},
    )
    with rng_guard():
        state = ft.init(model, tx, seed=3)
        step = ft.train_step(model, case.loss_fn, tx)
        step(state, case.batch())
        fast = ft.compile(step, backend="aot_eager", donate=False)
        fast(state, case.batch())
        fast(state, case.batch())
        evals = {"val": evaluator(case)}
        ft.fit(state, step, loader, epochs=2, evals=evals, progress=False, compile=False)
        ft.evaluate(state, evals["val"].step, loader, compile=False)
        list(ft.predict(state, ft.predict_step(model, lambda m, b: m(b["x"])), loader, compile=False))
        ft.to_module(model, state)
    ticks = ft.loop(state, step, loader)
    with rng_guard():
        next(ticks)
        next(ticks)
    with rng_guard():
        ticks.close()


def test_a_shuffled_loader_is_a_function_of_seed_and_epoch() -> None:
    loader = torch.utils.data.DataLoader(torch.arange(16), batch_size=4, shuffle=True)

    def seen(seed: int) -> list[list[int]]:
        epochs = ft.data.as_epochs(loader, seed=seed)
        return [[int(x) for batch in epochs(epoch) for x in batch] for epoch in range(2)]

    torch.manual_seed(5)
    one = seen(0)
    torch.manual_seed(6)
    assert one == seen(0)
    assert one[0] != one[1]
    assert one != seen(1)
    assert sorted(one[0]) == sorted(one[1]) == list(range(16))


# -- law 9: compilations over a whole run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_one_program_and_one_more_for_a_short_last_batch(model: str) -> None:
    case, step, state = setup(model, "adamw_clip_warmup")
    batches = [*case.batches(3), case.batch(5)]
    fast = ft.compile(step, backend="eager")
    ft.fit(state, fast, batches, epochs=3, progress=False)
    assert fast.compiles == 2
    assert [r.short_batch for r in fast.recompiles] == [True]
    first = sorted(case.batch())[0]
    assert fast.recompiles[0].leaf == f"batch['{first}']"
    ft.fit(state, fast, batches, epochs=2, progress=False)
    assert fast.compiles == 2, "a second fit with the same step compiles nothing"


def test_many_steps_in_one_process_do_not_share_a_limit() -> None:
    case = MODELS["two_heads"]
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        model, tx = case.model(), ft.optim.sgd(0.1)
        fast = ft.compile(ft.train_step(model, case.loss_fn, tx), backend="eager", rung="step")
        fast(ft.init(model, tx), case.batch())
        assert (fast.rung, fast.compiles) == ("step", 1)


# -- law 10: nothing is read between log points -------------------------------------------------------------------------------------


def test_no_host_read_between_log_points(monkeypatch: pytest.MonkeyPatch) -> None:
    case, step, state = setup("mlp", "adamw_clip_warmup")  # with dropout: the generators are seeded from host integers
    fast = ft.compile(step, backend="aot_eager")
    ft.fit(state, fast, case.batches(2), progress=False)
    reads: list[str] = []
    for name in ("tolist", "numpy", "item", "cpu", "__bool__", "__float__", "__int__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *a, _real=real, _name=name, **k: (reads.append(_name), _real(self, *a, **k))[1],
        )
    counts = []

    def profiled(steps: int) -> int:
        reads.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            ft.fit(state, fast, case.batches(2), steps=steps, log=ft.every(steps=1000), progress=False)
        counts.append(len(reads))
        return sum(e.count for e in profile.key_averages() if e.key == "aten::_local_scalar_dense")

    few, many = profiled(4), profiled(40)
    assert few == many
    # the ends of the (one-batch) epochs and the log points cost the same; nothing grows with the number of steps but them
    assert counts[1] - counts[0] <= 18 + 1


# -- each check fails on a planted violation -----------------------------------------------------------------------------------------


class _Planted:
    """A correct step around which violations are planted."""

    def __init__(self) -> None:
        self.case, self.step, self.state = setup("two_heads", "sgd")
        self.batch = self.case.batch()
        self.calls = 0


def test_check_moves_finds_a_step_that_does_not_move() -> None:
    p = _Planted()
    with pytest.raises(ft.testing.LawError, match="moves: no parameter changed"):
        ft.testing.check_moves(lambda s, b: (s.replace(step=s.step + 1), {}), p.state, p.batch)
    with pytest.raises(ft.testing.LawError, match="went from 0 to 0, not one further"):
        ft.testing.check_moves(lambda s, b: (p.step(s, b)[0].replace(step=s.step), {}), p.state, p.batch)


def test_check_structure_finds_another_dtype() -> None:
    p = _Planted()

    def bad(state: Any, batch: Any) -> Any:
        new, metrics = p.step(state, batch)
        return new.replace(params={**new.params, "one.bias": new.params["one.bias"].double()}), metrics

    with pytest.raises(
        ft.testing.LawError, match=r"state\.params\['one\.bias'\](.|\n)*float32\[3\](.|\n)*float64\[3\]"
    ):
        ft.testing.check_structure(bad, p.state, p.batch)


def test_check_pure_finds_changed_input_hidden_state_and_drawn_numbers() -> None:
    p = _Planted()

    def changes_input(state: Any, batch: Any) -> Any:
        out = p.step(state, batch)
        batch["x"].mul_(2)
        return out

    def counts(state: Any, batch: Any) -> Any:
        p.calls += 1
        new, metrics = p.step(state, batch)
        return new.replace(params={k: v + p.calls for k, v in new.params.items()}), metrics

    def draws(state: Any, batch: Any) -> Any:
        random.random()
        return p.step(state, batch)

    with pytest.raises(ft.testing.LawError, match=r"changed its input: inputs\[1\]\['x'\]"):
        ft.testing.check_pure(changes_input, p.state, p.case.batch())
    with pytest.raises(ft.testing.LawError, match="two calls with the same input differ"):
        ft.testing.check_pure(counts, p.state, p.batch)
    with pytest.raises(ft.testing.LawError, match="changed the global generator of random"):
        ft.testing.check_pure(draws, p.state, p.batch)


def test_check_random_finds_global_randomness() -> None:
    p = _Planted()

    def noisy(state: Any, batch: Any) -> Any:
        new, metrics = p.step(state, batch)
        with torch.random.fork_rng():
            return new.replace(params={k: v + torch.randn_like(v) for k, v in new.params.items()}), metrics

    with pytest.raises(ft.testing.LawError, match="depends on the global generators"):
        ft.testing.check_random(noisy, p.state, p.batch)


def test_check_compiled_finds_a_step_that_is_different_when_compiled() -> None:
    p = _Planted()

    def shifty(state: Any, batch: Any) -> Any:
        new, metrics = p.step(state, batch)
        if torch.compiler.is_compiling():
            new = new.replace(params={k: v * 1.01 for k, v in new.params.items()})
        return new, metrics

    with pytest.raises(ft.testing.LawError, match=r"compiled: state\.params differs by"):
        ft.testing.check_compiled(shifty, p.state, p.batch, backend="eager")
    with pytest.raises(ft.testing.LawError, match="nothing moved"):
        ft.testing.check_compiled(lambda s, b: (s, {}), p.state, p.batch, backend="eager")


def test_check_donation_finds_other_values() -> None:
    p = _Planted()
    calls = itertools.count()

    def unstable(state: Any, batch: Any) -> Any:
        new, metrics = p.step(state, batch)
        return new.replace(params={k: v + next(calls) for k, v in new.params.items()}), metrics

    with pytest.raises(ft.testing.LawError, match="donation: other values than without"):
        ft.testing.check_donation(unstable, p.state, p.batch, backend="eager")


def test_check_recompiles_names_the_leaf() -> None:
    p = _Planted()
    batches = [
        p.case.batch(8),
        p.case.batch(5),
        {**p.case.batch(5), "y": p.case.batch(5)["y"].to(torch.int32).long().int().long()},
    ]
    with pytest.raises(ft.testing.LawError, match=r"2 programs over 3 batches, allowed are 1: batch\['x'\]"):
        ft.testing.check_recompiles(p.step, p.state, batches, backend="eager")
    ft.testing.check_recompiles(p.step, p.state, batches, backend="eager", most=2)
