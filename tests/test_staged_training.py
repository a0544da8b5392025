"""Hooks that change what is trained: unfreezing, pruning, averages put in place; and windows whose size changes with the epoch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.utils._python_dispatch import TorchDispatchMode

import ftrain as ft
from ftrain import errors

from .corpus import MODELS
from .test_laws import bits
from .test_resume import Memory, assert_same


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # without a bias, whose gradient is nothing but rounding before a batch norm
        self.body, self.norm, self.head = nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.body(x))))


torch.manual_seed(0)
MODEL = Net()
DATA = list(torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(1)))


def loss_fn(model: Any, batch: Any) -> Any:
    return (model(batch) - batch[:, :2]).square().mean()


def make(tx: Any, wrap: Any = None) -> tuple[Any, ft.TrainState]:
    step = ft.train_step(MODEL, loss_fn, tx)
    step = step if wrap is None else wrap(step)
    return step, step.init(ft.init(MODEL, tx, seed=0))


def run(step: Any, state: Any, hooks: Any = (), saver: Any = None, **options: Any) -> ft.Result:
    more = {"epochs": 3, "log": ft.every(steps=2), "progress": False, "compile": False, **options}
    return ft.fit(state, step, more.pop("data", DATA), hooks=list(hooks), checkpoint=saver, **more)


def same_from_any_snapshot(step: Any, state: Any, hooks: Any, **options: Any) -> ft.Result:
    """Law 6 for a run with these hooks; gives the run that was not stopped."""
    saver = Memory(ft.every(steps=1) | ft.every(epochs=1))
    whole = run(step, state, hooks(), saver, **options)
    assert len(saver.shots) >= 12
    for shot in saver.shots:
        assert_same(run(step, state, hooks(), Memory(ft.every(epochs=99), shot), resume="auto", **options), whole)
    return whole


# ------------------------------------------------------------------------------------------------------------ unfreezing

ADAMW = ft.optim.adamw(ft.schedules.warmup_cosine(1e-2, 3, 40), weight_decay=0.1)


def test_frozen_is_bitwise_unchanged_and_then_it_trains_with_a_new_optimizer() -> None:
    step, state = make(ft.optim.freezable(ADAMW, ["body.*"]))
    state.params["body.weight"][0, :2] = torch.tensor([-0.0, 0.0])
    hook = ft.hooks.unfreeze({"body.*": ft.at(5)})
    frozen = run(step, state, [hook], epochs=None, steps=4).state
    own = {name for name in state.params if name.startswith("body")}
    assert bits({n: frozen.params[n] for n in own}) == bits({n: state.params[n] for n in own})
    assert bits(frozen.opt.groups) == bits(state.opt.groups)
    assert all(not torch.equal(frozen.params[n], p) for n, p in state.params.items() if n not in own)

    # The same by other means: until step 5 as above, then two optimizers, of which one is new.
    five = run(step, state, [hook], epochs=None, steps=5).state
    assert bits({n: five.params[n] for n in own}) == bits({n: state.params[n] for n in own})
    both = ft.optim.partition({"body.*": "body", "*": "rest"}, {"body": ADAMW, "rest": ADAMW})
    other = ft.train_step(MODEL, loss_fn, both)
    new = ADAMW.init({n: p for n, p in five.params.items() if n in own})
    expected = five.replace(opt={"body": new, "rest": five.opt.rest})
    for batch in [*DATA[1:], *DATA]:
        expected, _ = other(expected, batch)
    whole = run(step, state, [hook]).state
    assert bits(whole.params) == bits(expected.params)
    assert bits((whole.opt.groups["body.*"], whole.opt.rest)) == bits((expected.opt["body"], expected.opt["rest"]))
    assert bits({n: whole.params[n] for n in own}) != bits({n: state.params[n] for n in own})


def test_a_gradient_that_is_not_finite_moves_nothing_that_is_frozen() -> None:
    tx = ft.optim.freezable(ft.optim.adamw(0.1), ["a", "b"])
    params = {"a": torch.tensor([-0.0, 1.0]), "b": torch.ones(1), "c": torch.ones(1)}
    grads = {"a": torch.tensor([math.nan, math.inf]), "b": torch.ones(1), "c": torch.ones(1)}
    state = tx.init(params)
    updates, after = tx.update(grads, state, params)
    new = ft.optim.apply_updates(params, updates)
    assert bits({n: new[n] for n in "ab"}) == bits({n: params[n] for n in "ab"})
    assert bits(after.groups) == bits(state.groups)
    assert not torch.equal(new["c"], params["c"])


def test_groups_are_let_go_one_after_the_other_and_the_run_can_be_resumed() -> None:
    step, state = make(
        ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.freezable(ADAMW, ["norm.*", "body.*"]))
    )

    def hooks() -> list[Any]:
        return [ft.hooks.unfreeze({"norm.*": ft.at(epochs=1), "body.*": ft.at(epochs=2)})]

    same_from_any_snapshot(step, state, hooks)
    moved = []
    for epochs in (1, 2, 3):
        after = run(step, state, hooks(), epochs=epochs).state
        moved.append({n.partition(".")[0] for n, p in state.params.items() if not torch.equal(p, after.params[n])})
    assert moved == [{"head"}, {"head", "norm"}, {"head", "norm", "body"}]


def test_a_hook_that_lets_nothing_go_yet_changes_nothing() -> None:
    step, state = make(ft.optim.freezable(ADAMW, "body.*"))
    assert_same(run(step, state, [ft.hooks.unfreeze({"body.*": ft.at(999)})]), run(step, state))


@pytest.mark.parametrize(
    ("wrap", "pattern", "flags"),
    [
        (lambda tx: ft.optim.skip_nonfinite(ft.optim.freezable(tx, ["body.*", "norm.*"])), "*", [True, True]),
        (lambda tx: ft.optim.freezable(tx, ["body.*", "norm.*"]), "[bn]o*.*", [True, True]),
        (lambda tx: ft.optim.freezable(tx, ["body.*", "norm.*"]), "norm.*", [False, True]),
        (
            lambda tx: ft.optim.partition(
                {"body.*": "b", "*": "r"}, {"b": ft.optim.freezable(tx, "*"), "r": ft.optim.sgd(0.1)}
            ),
            "*",
            [True],
        ),
    ],
    ids=["inside", "pattern", "one", "partition"],
)
def test_groups_are_found_however_deep_they_lie(wrap: Any, pattern: str, flags: list[bool]) -> None:
    step, state = make(wrap(ft.optim.adam(1e-2)))
    after = run(step, state, [ft.hooks.unfreeze({pattern: ft.at(2)})]).state
    found = [one for path, one in ft.tree.items(after.opt, "opt") if ".active" in path]
    assert [bool(one) for one in found] == flags


def test_an_optimizer_of_torch_is_let_go_too() -> None:
    step, state = make(ft.optim.freezable(ft.optim.from_torch(torch.optim.SGD, lr=0.1, momentum=0.9), ["body.*"]))
    own = ft.optim.freezable(ft.optim.sgd(0.1, momentum=0.9), ["body.*"])
    other, same = make(own)
    hooks = [ft.hooks.unfreeze({"body.*": ft.at(5)})]
    five = run(step, state, hooks, epochs=None, steps=5).state
    assert bits((five.params["body.weight"], five.opt.groups)) == bits((state.params["body.weight"], state.opt.groups))
    expected = run(other, same, hooks).state.params
    for name, leaf in run(step, state, hooks).state.params.items():
        torch.testing.assert_close(leaf, expected[name], rtol=1e-5, atol=1e-7)
        assert not torch.equal(leaf, state.params[name])


@pytest.mark.parametrize("tx", [ft.optim.adamw(1e-2), ft.optim.sgd(0.1)], ids=["adamw", "sgd"])
def test_freezable_laws_and_one_compilation(tx: Any) -> None:
    step, state = make(ft.optim.freezable(tx, ["body.*"]))
    ft.testing.check_step(step, state, DATA[0], backend="aot_eager")
    fast = ft.compile(step, backend="eager")
    hooks = [ft.hooks.unfreeze({"body.*": ft.at(5)})]
    whole = run(fast, state, hooks, compile=True)
    assert fast.compiles == 1
    for name, leaf in run(step, state, hooks).state.params.items():
        torch.testing.assert_close(whole.state.params[name], leaf, rtol=1e-4, atol=1e-6)
        assert not torch.equal(whole.state.params[name], state.params[name])


def test_what_always_trains_is_as_without_and_groups_may_begin_free() -> None:
    step, state = make(ft.optim.freezable(ADAMW, ["body.*"], active=True))
    plain, other = make(ADAMW)
    assert bits(run(step, state).state.params) == bits(run(plain, other).state.params)
    assert sorted(ft.optim.metrics(state.opt)) == ["lr", "lr/body.*"]


# --------------------------------------------------------------------------------------------------------------- pruning


def masked(tx: Any = None, select: Any = "*.weight") -> tuple[Any, ft.TrainState]:
    return make(tx or ft.optim.adamw(1e-2), lambda step: ft.with_mask(step, select))


def test_masks_that_hold_everywhere_are_bitwise_the_step_inside() -> None:
    step, state = masked()
    plain, other = make(ft.optim.adamw(1e-2))
    for batch in DATA:
        state, m = step(state, batch)
        other, n = plain(other, batch)
        assert bits((state.params, state.opt, state.buffers)) == bits((other.params, other.opt, other.buffers))
        assert bits(m) == bits(n)


@pytest.mark.parametrize("model", ["two_heads", "conv_bn"])
def test_laws_of_a_masked_step(model: str) -> None:
    case, tx = MODELS[model], ft.optim.adam(1e-2)
    module = case.model()
    step = ft.with_ema(ft.with_mask(ft.train_step(module, case.loss_fn, tx)), 0.9)
    state = step.init(ft.init(module, tx))
    ft.testing.check_step(step, state, case.batch(), backend="aot_eager")


@pytest.mark.parametrize("amount", [0.0, 0.3, 0.55, 1.0])
@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_values_are_those_of_torch(scope: str, amount: float) -> None:
    step, state = masked()
    hook = ft.hooks.prune(amount, when=ft.at(0), scope=scope)
    found = run(step, state, [hook], epochs=None, steps=1).state.extra["mask"]
    model = Net()
    model.load_state_dict({**state.params, **state.buffers})
    parts = [(model.body, "weight"), (model.norm, "weight"), (model.head, "weight")]
    with torch.no_grad():
        model.norm.weight += 0.01 * torch.arange(8)  # no ties, which torch resolves in its own way
    state.params["norm.weight"] += 0.01 * torch.arange(8)
    found = run(step, state, [hook], epochs=None, steps=1).state.extra["mask"]
    if scope == "global":
        torch_prune.global_unstructured(parts, pruning_method=torch_prune.L1Unstructured, amount=amount)
    else:
        for module, name in parts:
            torch_prune.l1_unstructured(module, name, amount=amount)
    assert sorted(found) == ["body.weight", "head.weight", "norm.weight"]
    for name in ("body", "norm", "head"):
        assert torch.equal(found[f"{name}.weight"], getattr(model, name).weight_mask.bool()), name


def test_what_is_pruned_stays_at_zero_and_the_metric_tells_how_much() -> None:
    step, state = masked()
    seen = []

    def watch(state: Any, event: Any) -> Any:
        masks = state.extra["mask"]
        assert all(bool((state.params[name][~mask] == 0).all()) for name, mask in masks.items())
        assert all(bool((state.params[name][mask] != 0).all()) for name, mask in masks.items())
        seen.append(ft.tree.map(torch.clone, masks))
        return state

    schedule = lambda step: 1.0 - 0.8 ** (step // 3)  # noqa: E731  # as the docstring has it
    hook = ft.hooks.prune(schedule, when=ft.every(steps=3) & ~ft.after(steps=10))
    result = run(step, state, [hook, ft.on("step", watch)], log=ft.every(steps=1))
    total = sum(leaf.numel() for leaf in seen[0].values())
    told = [(r.step, r.metrics["sparsity"]) for r in result.history if "sparsity" in r.metrics]
    assert told == [(n, round((1 - 0.8 ** (n // 3)) * total) / total) for n in (3, 6, 9)]
    zeros = [sum(int((~leaf).sum()) for leaf in masks.values()) / total for masks in seen]
    assert zeros == [0.0] * 2 + [told[0][1]] * 3 + [told[1][1]] * 3 + [told[2][1]] * 4
    for before, after in itertools.pairwise(seen):
        assert all(not bool((after[name] & ~before[name]).any()) for name in before)


def test_pruning_resumed_compiled_and_where_it_does_not_fire() -> None:
    step, state = masked()

    def hooks() -> list[Any]:
        return [ft.hooks.prune(lambda step: step / 20, when=ft.every(steps=3) | ft.at(epochs=2))]

    whole = same_from_any_snapshot(step, state, hooks)
    assert 0.3 < whole.history.last()["sparsity"] < 0.8
    assert_same(run(step, state, [ft.hooks.prune(0.5, when=ft.at(999))]), run(step, state))
    fast = ft.compile(step, backend="eager")
    compiled = run(fast, state, hooks(), compile=True)
    assert fast.compiles == 1
    assert bits(compiled.state.extra["mask"]) == bits(whole.state.extra["mask"])
    for name, mask in compiled.state.extra["mask"].items():
        assert bool((compiled.state.params[name][~mask] == 0).all())
        torch.testing.assert_close(compiled.state.params[name], whole.state.params[name], rtol=1e-4, atol=1e-6)


def test_two_of_four_and_some_of_the_parameters() -> None:
    step, state = masked()
    hook = ft.hooks.prune("2:4", when=ft.at(3), select=["body.weight", "head.weight"])
    after = run(step, state, [hook])
    masks = after.state.extra["mask"]
    assert bool(masks["norm.weight"].all())
    for name in ("body.weight", "head.weight"):
        assert bool((masks[name].reshape(-1, 4).sum(1) == 2).all())
    three = run(step, state, epochs=None, steps=3).state.params["head.weight"].abs().reshape(-1, 4)
    kept = masks["head.weight"].reshape(-1, 4)
    assert bool((torch.where(kept, three, torch.inf).amin(1) >= torch.where(kept, 0.0, three).amax(1)).all())
    assert after.history.last()["sparsity"] == 0.5


def test_where_the_part_falls_weights_come_back_at_zero() -> None:
    step, state = masked()
    amount = lambda step: torch.where(step < 5, 0.8, 0.2)  # noqa: E731
    five = run(step, state, [ft.hooks.prune(amount, when=ft.at(2) | ft.at(5))], epochs=None, steps=5)
    total = sum(mask.numel() for mask in five.state.extra["mask"].values())
    assert sum(int((~mask).sum()) for mask in five.state.extra["mask"].values()) == round(0.2 * total)
    assert sum(int((five.state.params[name] == 0).sum()) for name in five.state.extra["mask"]) == round(0.8 * total)


def test_the_lottery_ticket() -> None:
    """The recipe of the docstring."""
    step, first = masked()
    found = run(step, first, [ft.hooks.prune(0.8, when=ft.at(epochs=2))]).state
    ticket = first.replace(extra={**first.extra, "mask": found.extra["mask"]})
    ticket = ticket.replace(params={n: p * ticket.extra["mask"].get(n, 1) for n, p in ticket.params.items()})
    after = run(step, ticket).state
    for name, mask in found.extra["mask"].items():
        assert bool((after.params[name][~mask] == 0).all())
        assert torch.equal(ticket.params[name][mask], first.params[name][mask])
        assert not torch.equal(after.params[name][mask], first.params[name][mask]) or not bool(mask.any())


# -------------------------------------------------------------------------------------------------- averages put in place


def test_the_average_is_put_in_place_at_the_end_and_the_checkpoint_has_both() -> None:
    step, state = make(ft.optim.adamw(1e-2), lambda step: ft.with_ema(step, 0.9))
    plain, saver = run(step, state), Memory(ft.every(epochs=1))
    result = run(step, state, [ft.hooks.swap_average("ema")], saver)
    assert bits(result.state.params) == bits(plain.state.extra["ema"].params) != bits(plain.state.params)
    assert bits(result.state.buffers) == bits(plain.state.extra["ema"].buffers)
    assert bits((result.state.extra, result.state.opt)) == bits((plain.state.extra, plain.state.opt))
    assert bits(saver.shots[-1].state.params) == bits(plain.state.params)
    for shot in saver.shots:  # the last is that of the complete run
        again = run(step, state, [ft.hooks.swap_average("ema")], Memory(ft.every(epochs=9), shot), resume="auto")
        assert_same(again, result)
    fast = ft.compile(step, backend="eager")  # no leaf of the state shares memory with another: it can be donated
    fast(result.state.copy(), DATA[0])
    fast(run(step, state, [ft.hooks.swap_average("ema")]).state, DATA[0])


def test_training_goes_on_from_the_average() -> None:
    step, state = make(ft.optim.adamw(1e-2), lambda step: ft.with_swa(step, start=2, buffers=True))

    def hooks() -> list[Any]:
        return [ft.hooks.swap_average("swa", on=ft.at(epochs=2))]

    whole = same_from_any_snapshot(step, state, hooks)
    half = run(step, state, epochs=2).state
    half = half.replace(params=dict(half.extra["swa"].params), buffers=dict(half.extra["swa"].buffers)).copy()
    for batch in DATA:
        half, _ = step(half, batch)
    assert bits((whole.state.params, whole.state.opt)) == bits((half.params, half.opt))
    assert_same(run(step, state, [ft.hooks.swap_average("swa", on=ft.at(999))]), run(step, state))


def test_nothing_averaged_yet_nothing_put_in_place_and_dtypes_stay() -> None:
    model, tx = nn.Linear(4, 2, dtype=torch.bfloat16), ft.optim.sgd(0.1)
    step = ft.with_swa(
        ft.train_step(model, lambda model, batch: model(batch.bfloat16()).float().square().mean(), tx), start=3
    )
    state = step.init(ft.init(model, tx))
    for steps, moved in ((2, False), (4, True)):
        plain = run(step, state, epochs=None, steps=steps).state
        after = run(step, state, [ft.hooks.swap_average("swa")], epochs=None, steps=steps).state
        expected = {n: p.to(torch.bfloat16) for n, p in plain.extra["swa"].params.items()} if moved else plain.params
        assert all(torch.equal(after.params[n], p) and p.dtype == torch.bfloat16 for n, p in expected.items())
        assert moved == any(not torch.equal(after.params[n], p) for n, p in plain.params.items())


# -------------------------------------------------------------------------------------------- windows that change by epoch


def test_windows_by_epoch() -> None:
    sizes = {0: 1, 2: 2, 3: 4}
    data = ft.data.window(DATA, sizes)
    found = [[len(window.batches) for window in ft.data.as_epochs(data)(epoch)] for epoch in range(5)]
    assert found == [[1] * 4, [1] * 4, [2, 2], [4], [4]]
    assert ft.data.as_epochs(data).facts["window"] == "{0: 1, 2: 2, 3: 4}"
    step, state = make(ft.optim.adamw(1e-2))
    whole = same_from_any_snapshot(step, state, list, data=data, epochs=5)
    function = ft.data.window(DATA, lambda epoch: 1 if epoch < 2 else 2 if epoch < 3 else 4)
    assert_same(run(step, state, data=function, epochs=5), whole)
    assert whole.state.counters().step == 4 + 4 + 2 + 1 + 1


def test_a_step_is_compiled_once_for_each_size() -> None:
    step, state = make(ft.optim.adamw(1e-2))
    fast = ft.compile(step, backend="eager")
    with pytest.warns(errors.RecompileWarning):
        result = run(fast, state, data=ft.data.window(DATA, {0: 1, 2: 2, 4: 4}), epochs=6, compile=True)
    assert fast.compiles == 3
    plain = run(step, state, data=ft.data.window(DATA, {0: 1, 2: 2, 4: 4}), epochs=6)
    for name, leaf in plain.state.params.items():
        torch.testing.assert_close(result.state.params[name], leaf, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- bad input

BAD = {
    "schedule": (lambda: ft.hooks.unfreeze({}), errors.LimitError, r"wants a cadence for each group(.|\n)*got: +\{\}"),
    "no cadence": (
        lambda: ft.hooks.unfreeze({"body.*": 3}),
        errors.LimitError,
        r"got: +\{'body\.\*': 3\}(.|\n)*ft\.at\(epochs=1\)",
    ),
    "no groups": (
        lambda: ft.optim.freezable(ADAMW, []),
        errors.ModelError,
        r"freezable: groups= are different path patterns",
    ),
    "twice": (lambda: ft.optim.freezable(ADAMW, ["a", "a"]), errors.ModelError, r"got: +\['a', 'a'\]"),
    "no match": (
        lambda: make(ft.optim.freezable(ADAMW, "bdy.*")),
        errors.ModelError,
        r"freezable: groups='bdy\.\*' matches no parameter(.|\n)*groups=\"body\.\*\"",
    ),
    "taken": (
        lambda: make(ft.optim.freezable(ADAMW, ["*", "body.*"])),
        errors.ModelError,
        r"other patterns have taken all leaves of 'body\.\*'(.|\n)*the narrower pattern first",
    ),
    "no transform": (
        lambda: ft.optim.freezable(ft.optim.sgd, "a"),
        errors.ArgumentError,
        r"freezable wants a transform",
    ),
    "group": (
        lambda: run(*make(ft.optim.freezable(ADAMW, "body.*")), [ft.hooks.unfreeze({"bdy.*": ft.at(1)})]),
        errors.HookError,
        r"no group 'bdy\.\*' that could be let go(.|\n)*expected: one of: body\.\*(.|\n)*unfreeze\(\{'body\.\*': \.\.\.\}\)",
    ),
    "no freezable": (
        lambda: run(*make(ADAMW), [ft.hooks.unfreeze({"body.*": ft.at(1)})]),
        errors.HookError,
        r"expected: the state of ft\.optim\.freezable(.|\n)*freezable\(tx, \['body\.\*'\]\)",
    ),
    "amount": (
        lambda: ft.hooks.prune(1.5, when=ft.at(1)),
        errors.LimitError,
        r"amount=1\.5 makes no sense(.|\n)*not a number of them",
    ),
    "n:m": (
        lambda: ft.hooks.prune("4:2", when=ft.at(1)),
        errors.LimitError,
        r"amount='4:2' makes no sense(.|\n)*or \"2:4\"",
    ),
    "bool": (lambda: ft.hooks.prune(True, when=ft.at(1)), errors.LimitError, r"amount=True makes no sense"),
    "scope": (lambda: ft.hooks.prune(0.5, when=ft.at(1), scope="all"), errors.LimitError, r"scope='all' is unknown"),
    "when": (lambda: ft.hooks.prune(0.5, when=1), errors.LimitError, r"ft\.hooks\.prune: when= is no cadence"),
    "no masks": (
        lambda: run(*make(ADAMW), [ft.hooks.prune(0.5, when=ft.at(1))]),
        errors.HookError,
        r"the state has no masks(.|\n)*state\.extra\['mask'\](.|\n)*ft\.with_mask\(step\)",
    ),
    "select": (
        lambda: run(*masked(), [ft.hooks.prune(0.5, when=ft.at(1), select="had.*")]),
        errors.ModelError,
        r"prune: select='had\.\*' matches no parameter(.|\n)*head",
    ),
    "rows": (
        lambda: run(*masked(), [ft.hooks.prune("2:3", when=ft.at(1))]),
        errors.HookError,
        r"rows are not a multiple of 3 long(.|\n)*body\.weight",
    ),
    "schedule of numbers": (
        lambda: run(*masked(), [ft.hooks.prune(lambda step: 0.5, when=ft.at(1))]),
        errors.ArgumentError,
        r"a schedule did not give a tensor",
    ),
    "mask of a compiled step": (
        lambda: ft.with_mask(ft.compile(make(ADAMW)[0], backend="eager")),
        errors.StateError,
        r"ft\.with_mask wants a step that is not compiled yet(.|\n)*ft\.compile\(ft\.with_mask\(step\)\)",
    ),
    "mask twice": (
        lambda: ft.with_mask(masked()[0]),
        errors.LimitError,
        r"keeps something under the name 'mask' already(.|\n)*name=\"mask_2\"",
    ),
    "mask level": (
        lambda: ft.with_mask(MODEL),
        errors.ArgumentError,
        r"ft\.with_mask wants a function of the step level",
    ),
    "mask name": (lambda: ft.with_mask(make(ADAMW)[0], name=""), errors.ArgumentError, r"name='' is no name"),
    "mask nothing": (lambda: masked(select=lambda path, p: False), errors.StructureError, r"no parameter is selected"),
    "mask pattern": (
        lambda: masked(select="wieght"),
        errors.ModelError,
        r"with_mask: select='wieght' matches no parameter",
    ),
    "mask missing": (
        lambda: masked()[0](ft.init(MODEL, ft.optim.adamw(1e-2)), DATA[0]),
        errors.StateError,
        r"the state has no masks 'mask'(.|\n)*state = step\.init\(state\)",
    ),
    "mask shape": (
        lambda: masked()[0](masked()[1].replace(extra={"mask": {"body.weight": torch.ones(2)}}), DATA[0]),
        errors.StructureError,
        r"a mask does not fit its parameter(.|\n)*'body\.weight'(.|\n)*bool\[8, 4\](.|\n)*float32\[2\]",
    ),
    "average name": (lambda: ft.hooks.swap_average(3), errors.ArgumentError, r"the average has a name(.|\n)*got: +3"),
    "average on": (
        lambda: ft.hooks.swap_average(on="saved"),
        errors.HookError,
        r"on='saved' is no event at which a state can be",
    ),
    "no average": (
        lambda: run(*make(ADAMW), [ft.hooks.swap_average("ema")]),
        errors.StateError,
        r"ft\.hooks\.swap_average: the state has no averaged parameters 'ema'",
    ),
    "window keys": (
        lambda: ft.data.window(DATA, {"a": 1}),
        errors.DataError,
        r"not those of epochs(.|\n)*got: +\{'a': 1\}",
    ),
    "window begin": (
        lambda: ft.data.window(DATA, {1: 2}),
        errors.DataError,
        r"from the first epoch on(.|\n)*\{0: 1, 5: 4\}",
    ),
    "window empty": (lambda: ft.data.window(DATA, {}), errors.DataError, r"from the first epoch on"),
    "window size": (lambda: ft.data.window(DATA, {0: 1, 5: 0}), errors.DataError, r"the size from epoch 5 on is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    make_it, kind, text = BAD[case]
    with pytest.raises(kind, match=text):
        make_it()


class Reads(TorchDispatchMode):
    """Counts what is read on the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scope", ["global", "leaf", "2:4"])
def test_nothing_is_read_from_the_device(scope: str) -> None:
    tx = ft.optim.freezable(ft.optim.adamw(1e-2), "body.*")
    step, state = make(tx, lambda step: ft.with_ema(ft.with_mask(step, "*.weight")))
    amount: Any = scope if ":" in scope else lambda step: step / 10
    hooks = ft.loops.calling.Hooks(
        [
            ft.hooks.unfreeze({"body.*": ft.at(2)}),
            ft.hooks.prune(amount, when=ft.at(2), scope="global" if ":" in scope else scope),
            ft.hooks.swap_average("ema", on=ft.at(2)),
        ]
    )
    state = step(state, DATA[0])[0]
    state.counters()
    hooks.passed(ft.loops.Clock(steps=1))
    with Reads() as reads:
        after = hooks(state, ft.Event("step", 2, 0, 12, ft.loops.Clock(steps=2))).state
        assert not reads.count
        float(after.params["head.weight"].sum())
    assert reads.count == 1, "the test would not see a read"
    assert bits(after.opt.active) != bits(state.opt.active)


def test_what_is_masked_goes_before_a_weight_that_happens_to_be_zero() -> None:
    model, tx = nn.Linear(4, 1, bias=False), ft.optim.sgd(0.0)
    step = ft.with_mask(ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx))
    state = ft.init(model, tx).replace(params={"weight": torch.tensor([[0.0, 0.0, 3.0, 4.0]])})
    state = state.replace(extra={"mask": {"weight": torch.tensor([[True, False, True, True]])}})
    after = run(step, state, [ft.hooks.prune(0.25, when=ft.at(0))]).state.extra["mask"]["weight"]
    assert after.tolist() == [[True, False, True, True]]
