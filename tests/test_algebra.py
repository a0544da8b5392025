"""The algebra of transforms: what pieces and wrappers do to each other. A new piece is a row of `PIECES` in the corpus."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ftrain as ft
from ftrain import tree
from ftrain.errors import HookError, LimitError, LossError, ModelError
from ftrain.optim import masks
from ftrain.optim.transform import takes_value_fn

from .corpus import MODELS, OPTIMIZERS, PIECES

Params = dict[str, Tensor]
SHAPES: dict[str, tuple[int, ...]] = {
    "body.norm.weight": (4, 4),
    "body.weight": (3, 4),
    "body.bias": (3,),
    "head.weight": (2, 3, 2, 2),
    "head.scale": (),
}
CHAINED = [name for name in PIECES if name not in ("master_weights", "stochastic_rounding")]


def leaves(seed: int, dtype: torch.dtype = torch.float64) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for k, shape in SHAPES.items()}


def run(tx: ft.Transform, steps: int = 3, params: Any = None, update: Any = None) -> tuple[Any, Any]:
    """Parameters and state after some steps with gradients that are a function of the step."""
    params = leaves(100) if params is None else params
    state = tx.init(params)
    for step in range(steps):
        updates, state = (update or tx.update)(leaves(step), state, params)
        params = ft.optim.apply_updates(params, updates)
    return params, state


def same(a: Any, b: Any) -> None:
    """Bit for bit, and something is compared."""
    found = list(zip(tree.leaves(a), tree.leaves(b), strict=True))
    assert found
    assert all(torch.equal(x, y) for x, y in found)


def graph(fn: Callable[..., Any], backend: Any = "eager") -> Callable[..., Any]:
    """The function in one graph, or an error."""
    torch._dynamo.reset()
    return torch.compile(fn, backend=backend, fullgraph=True)


def moved(params: Params) -> bool:
    return not all(torch.equal(p, q) for p, q in zip(params.values(), leaves(100).values(), strict=True))


# ------------------------------------------------------------------------------------------------------- all the pieces


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", PIECES)
def test_a_piece_keeps_the_form_of_all_it_is_given_and_changes_none_of_it(name: str, dtype: torch.dtype) -> None:
    tx, params, grads = PIECES[name](), leaves(1, dtype), leaves(2, dtype)
    state = tx.init(params)
    kept = tree.map(torch.clone, (params, grads, state))
    updates, after = tx.update(grads, state, params)
    same(kept, (params, grads, state))
    assert list(updates) == list(grads)
    for key, grad in grads.items():
        assert updates[key].shape == grad.shape
        assert updates[key].dtype == grad.dtype or (dtype == torch.bfloat16 and updates[key].dtype == torch.float32)
    tree.check_same(state, after, root="state", what="the update changed the form of the state.")


@pytest.mark.parametrize("name", PIECES)
def test_a_piece_makes_its_state_on_meta_tensors(name: str) -> None:
    tx, params = PIECES[name](), leaves(1)
    real, meta = tx.init(params), tx.init({key: p.to("meta") for key, p in params.items()})
    assert tree.same_structure(real, meta)
    assert [(x.shape, x.dtype) for x in tree.leaves(real)] == [(x.shape, x.dtype) for x in tree.leaves(meta)]


@pytest.mark.parametrize("name", PIECES)
def test_a_piece_in_one_graph(name: str) -> None:
    tx = PIECES[name]()
    compiled = graph(tx.update)
    for one, two in zip(tree.leaves(run(tx)), tree.leaves(run(tx, update=compiled)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", PIECES)
def test_a_piece_under_vmap(name: str) -> None:
    tx, rows = PIECES[name](), [(leaves(k), leaves(k + 10)) for k in range(3)]
    each = [tx.update(grads, tx.init(params), params) for grads, params in rows]
    grads, params = (tree.map(lambda *x: torch.stack(x), *column) for column in zip(*rows, strict=True))
    together = torch.func.vmap(lambda g, p: tx.update(g, tx.init(p), p))(grads, params)
    for k, one in enumerate(each):
        for x, y in zip(tree.leaves(one), tree.leaves(together), strict=True):
            torch.testing.assert_close(y[k], x, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", PIECES)
def test_a_piece_reads_nothing_on_the_host(name: str) -> None:
    tx, params = PIECES[name](), leaves(1)
    state = tx.init(params)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        tx.update(leaves(2), state, params)
    seen = {event.key: event.count for event in profile.key_averages()}
    assert seen or name == "identity"
    assert "aten::_local_scalar_dense" not in seen


@given(st.lists(st.sampled_from(CHAINED), min_size=3, max_size=5), st.data())
def test_chain_is_associative_and_identity_neutral(names: list[str], data: st.DataObject) -> None:
    pieces = [PIECES[name]() for name in names]
    i = data.draw(st.integers(0, len(pieces)))
    j = data.draw(st.integers(i, len(pieces)))
    chain = ft.optim.chain
    whole = run(chain(*pieces))
    same(whole, run(chain(chain(*pieces[:i]), chain(*pieces[i:j]), chain(*pieces[j:]))))
    same(whole, run(chain(*pieces[:i], ft.optim.identity(), *pieces[i:])))


def test_chain_is_not_commutative() -> None:
    clip, noise = PIECES["clip_by_global_norm"](), PIECES["add_noise"]()
    one, two = run(ft.optim.chain(clip, noise))[0], run(ft.optim.chain(noise, clip))[0]
    assert not torch.equal(one["body.weight"], two["body.weight"])


WRONG: dict[str, tuple[Any, str]] = {
    "a function of ours": (ft.optim.adamw, r"`adamw` makes one when it is called[\s\S]*ft\.optim\.adamw\(\.\.\.\)"),
    "an optimizer of torch": (torch.optim.SGD, r"ft\.optim\.from_torch\(torch\.optim\.SGD, lr=\.\.\.\)"),
    "a number": (0.1, r"got: +float[\s\S]*ft\.optim\.\w+\(ft\.optim\.adamw\(3e-4\)\)"),
}
WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "skip_nonfinite": ft.optim.skip_nonfinite,
    "master_weights": ft.optim.master_weights,
    "stochastic_rounding": ft.optim.stochastic_rounding,
    "masked": lambda tx: ft.optim.masked(tx, "*"),
    "conditionally_mask": lambda tx: ft.optim.conditionally_mask(tx, lambda t: t >= 0),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_is_wrapped_must_be_a_transform(wrapper: str, wrong: str) -> None:
    value, text = WRONG[wrong]
    with pytest.raises(TypeError, match=rf"ft\.optim\.{wrapper} wants a transform\.[\s\S]*{text}"):
        WRAPPERS[wrapper](value)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_that_has_nothing_to_do_is_its_inner_transform(wrapper: str, optimizer: str) -> None:
    inner = OPTIMIZERS[optimizer]()
    params, _ = run(inner)
    assert moved(params)
    same(params, run(WRAPPERS[wrapper](OPTIMIZERS[optimizer]()))[0])


def _searching() -> ft.Transform:
    """A transform that asks for the loss: its update is the difference between two gradients, times the loss."""

    def update(grads: Any, state: Any, params: Any, /, *, value_fn: Any = None) -> tuple[Any, Any]:
        value, there = value_fn(tree.map(lambda p: p + 1.0, params))
        return tree.map(lambda g, h: (h - g) * value.to(g.dtype), grads, there), state

    return ft.Transform(lambda params: (), update)


AROUND: dict[str, tuple[Callable[[ft.Transform], ft.Transform], set[str]]] = {
    "chain": (lambda tx: ft.optim.chain(ft.optim.identity(), tx), set(SHAPES)),
    "inject": (lambda tx: ft.optim.inject(lambda: tx)(), set(SHAPES)),
    "skip_nonfinite": (ft.optim.skip_nonfinite, set(SHAPES)),
    "master_weights": (ft.optim.master_weights, set(SHAPES)),
    "stochastic_rounding": (ft.optim.stochastic_rounding, set(SHAPES)),
    "masked": (lambda tx: ft.optim.masked(tx, "body.*"), {name for name in SHAPES if name.startswith("body")}),
    "conditionally_mask": (lambda tx: ft.optim.conditionally_mask(tx, lambda t: t >= 0), set(SHAPES)),
    "partition": (
        lambda tx: ft.optim.partition({"body.*": "a", "*": "b"}, {"a": tx, "b": ft.optim.set_to_zero()}),
        {name for name in SHAPES if name.startswith("body")},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", AROUND)
def test_a_wrapper_hands_the_loss_on_to_who_asks_for_it(name: str, dtype: torch.dtype) -> None:
    wrap, touched = AROUND[name]
    tx, params = wrap(_searching()), leaves(1, dtype)
    seen: list[Params] = []

    def value_fn(at: Params, /) -> tuple[Tensor, Params]:
        seen.append(at)
        assert all(at[key].dtype == dtype for key in params)
        return torch.tensor(2.0), {key: 3.0 * p for key, p in at.items()}

    grads = {key: 3.0 * p for key, p in params.items()}
    assert takes_value_fn(tx)
    assert not takes_value_fn(wrap(ft.optim.sgd(0.1)))
    updates, _ = tx.update(grads, tx.init(params), params, value_fn=value_fn)
    assert len(seen) == 1
    for key, p in params.items():
        torch.testing.assert_close(seen[0][key], p + 1.0 if key in touched else p, rtol=1e-2, atol=0)
        if key in touched:  # (3 (p + 1) - 3 p) * 2
            torch.testing.assert_close(updates[key].double(), torch.full_like(p, 6.0).double(), rtol=0.1, atol=0)


# --------------------------------------------------------------------------------------------------------------- masks


@given(
    st.text("ab.*?[]!-\\'", min_size=1, max_size=6),
    st.lists(st.text("ab.[]'-!", min_size=1, max_size=5), min_size=1, max_size=4),
)
def test_the_pattern_of_a_trace_is_that_of_fnmatch(pattern: str, names: list[str]) -> None:
    def matches(how: Callable[[str], bool]) -> list[bool] | None:
        try:
            return [how(name) for name in names]
        except re.error:
            return None

    expected = matches(lambda name: fnmatch.fnmatchcase(name, pattern))
    inverted = re.search(r"[^\[!]-", pattern)  # fnmatch drops empty ranges such as [b-a], on which `re` is an error
    if not inverted:
        assert matches(lambda name: re.fullmatch(masks.regex(pattern), name) is not None) == expected


@given(st.lists(st.booleans(), min_size=len(SHAPES), max_size=len(SHAPES)))
def test_a_mask_says_the_same_in_each_of_its_forms(chosen: list[bool]) -> None:
    params = leaves(0)
    wanted = {name for name, one in zip(sorted(params), chosen, strict=True) if one}
    forms: list[Any] = [{name: name in wanted for name in params}, lambda path, p: path in wanted]
    if wanted:
        forms += [sorted(wanted), frozenset(wanted)]
    for form in forms:
        assert masks.resolve(form, params, "test: mask") == chosen
    part = masks.take(params, chosen)
    assert list(part) == [name for name in params if name in wanted]
    same(masks.put(params, part), params)
    gone = masks.put(params, {name: p * 0.0 for name, p in part.items()})
    assert {name for name, p in gone.items() if not p.any()} == wanted


def test_masks_of_a_general_tree() -> None:
    params = {"a": [torch.ones(2, 2), torch.ones(2)], "b": (torch.ones(1),)}
    assert masks.names(params) == ["params['a'][0]", "params['a'][1]", "params['b'][0]"]
    assert masks.resolve("params['a'][1]", params, "test: mask") == [False, True, False]
    assert masks.resolve("*'a'*", params, "test: mask") == [True, True, False]
    assert masks.resolve({"a": [True, False], "b": (True,)}, params, "test: mask") == [True, False, True]
    part = masks.take(params, [False, True, True])
    assert list(part) == ["params['a'][1]", "params['b'][0]"]
    same(masks.put(params, part), params)
    tx = ft.optim.masked(ft.optim.sgd(1.0, momentum=0.9), "*[[]1]")
    compiled = graph(tx.update)
    for update in (tx.update, compiled):
        updates, state = update(params, tx.init(params), params)
        assert [float(x.flatten()[0]) for x in tree.leaves(updates)] == [1.0, -1.0, 1.0]
        assert list(state.momentum) == ["params['a'][1]"]


def test_the_parameters_that_do_not_decay() -> None:
    def decaying(model: torch.nn.Module) -> list[str]:
        return [name for name, p in model.named_parameters() if ft.optim.no_bias_or_norm(name, p)]

    assert set(decaying(MODELS["gpt"].model())) == {
        "token.weight",
        "place.weight",
        *(f"blocks.{k}.{name}.weight" for k in (0, 1) for name in ("attention.qkv", "attention.out", "mlp.0", "mlp.2")),
    }
    assert decaying(MODELS["conv_bn"].model()) == ["body.0.weight", "body.3.weight", "head.weight"]
    assert decaying(MODELS["lstm"].model()) == ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "head.weight"]
    matrix = torch.ones(2, 2)
    for path in (
        "norm.weight",
        "q_norm.weight",
        "LayerNorm.weight",
        "bn1.w",
        "ln_f.g",
        "x.bias",
        "relative_bias_table",
    ):
        assert not ft.optim.no_bias_or_norm(path, matrix), path
    for path in ("normal.weight", "abnormality", "biased.kernel", "lnet.weight", "params['w']"):
        assert ft.optim.no_bias_or_norm(path, matrix), path


NO_MASKS: dict[str, tuple[Any, str]] = {
    "pattern": ("haed.*", r"='haed\.\*' matches no parameter\.[\s\S]*body\.bias, [\s\S]*fix: +mask=\"head\.\*\""),
    "one of several": (
        ["head.*", "*.wieght"],
        r"='\*\.wieght' matches no parameter[\s\S]*fix: +mask=\"\*\.weight\"",
    ),
    "tree": (
        {"w": True},
        r"neither a pattern, a predicate, nor a tree[\s\S]*got: +dict with 1 leaves \(bool\): mask\['w'\]",
    ),
    "tree of numbers": (dict.fromkeys(SHAPES, 1), r"a tree of bools[\s\S]*dict with 5 leaves \(int\)"),
    "nothing": (None, r"got: +None"),
    "function of one": (
        lambda params: params,
        r"cannot be called with \(path, leaf\)[\s\S]*lambda path, p: p\.ndim >= 2",
    ),
    "values": (lambda path, p: p.sum() > 0, r"answers with a tensor[\s\S]*where: +body\.bias[\s\S]*conditionally_mask"),
}
MASKED: dict[str, Callable[[Any], ft.Transform]] = {
    "masked": lambda mask: ft.optim.masked(ft.optim.sgd(0.1), mask),
    "freeze": ft.optim.freeze,
    "adamw": lambda mask: ft.optim.adamw(0.1, mask=mask),
    "add_decayed_weights": lambda mask: ft.optim.add_decayed_weights(0.1, mask=mask),
}


@pytest.mark.parametrize("where", MASKED)
@pytest.mark.parametrize("wrong", NO_MASKS)
def test_a_mask_that_makes_no_sense(wrong: str, where: str) -> None:
    mask, text = NO_MASKS[wrong]
    if mask is None and where in ("adamw", "add_decayed_weights"):
        return  # their default: all
    with pytest.raises(ModelError, match=rf"^{where}: mask[\s\S]*{text}"):
        MASKED[where](mask).init(leaves(0))


def test_masked_works_on_the_chosen_leaves_and_lets_the_others_pass() -> None:
    inner = ft.optim.adamw(0.1)
    tx, grads, params = ft.optim.masked(inner, "body.*"), leaves(0), leaves(1)
    updates, state = tx.update(grads, tx.init(params), params)
    body = {name: p for name, p in params.items() if name.startswith("body")}
    alone, _ = inner.update({name: grads[name] for name in body}, inner.init(body), body)
    same({name: updates[name] for name in body}, alone)
    same({k: g for k, g in updates.items() if k not in body}, {k: g for k, g in grads.items() if k not in body})
    assert list(state.mu) == list(body)
    nothing = ft.optim.masked(inner, lambda path, p: False)
    assert nothing.init(params) == ()
    same(nothing.update(grads, (), params)[0], grads)


def test_frozen_leaves_do_not_move() -> None:
    params, _ = run(ft.optim.chain(ft.optim.adamw(0.1), ft.optim.freeze(["body.weight", "head.*"])))
    still = {name for name, p in leaves(100).items() if torch.equal(p, params[name])}
    assert still == {"body.weight", "head.weight", "head.scale"}
    assert not moved(run(ft.optim.chain(ft.optim.adamw(0.1), ft.optim.set_to_zero()))[0])


def test_an_unfreeze_schedule() -> None:
    body = ft.optim.conditionally_mask(ft.optim.adamw(ft.schedules.warmup_cosine(0.1, 2, 9)), lambda t: t >= 3)
    tx = ft.optim.partition({"body.*": "body", "*": "head"}, {"body": body, "head": ft.optim.adamw(0.1)})
    params = leaves(100)
    state = tx.init(params)
    for step in range(6):
        updates, state = tx.update(leaves(step), state, params)
        assert bool(updates["head.weight"].any())
        assert bool(updates["body.weight"].any()) == (step >= 4), step  # its own warm-up begins with 0 at step 3
        assert bool(state["body"].active) == (step >= 3)
        params = ft.optim.apply_updates(params, updates)
    assert state["body"].count == 6
    assert state["body"].inner.count == 3
    assert state["head"].count == 6


def test_a_condition_must_give_one_bool_on_the_device() -> None:
    for wrong, got in ((lambda t: True, "bool"), (lambda t: t, r"int64\[\]"), (lambda t: (t > 1)[None], r"bool\[1\]")):
        tx = ft.optim.conditionally_mask(ft.optim.sgd(0.1), wrong)
        with pytest.raises(ModelError, match=rf"does not give one bool[\s\S]*got: +{got}[\s\S]*lambda t: t >= 1000"):
            tx.init(leaves(0))


# -------------------------------------------------------------------------------------------------------------- groups


def _two() -> dict[str, ft.Transform]:
    clip = ft.optim.clip_by_global_norm(0.5)
    return {"body": ft.optim.chain(clip, ft.optim.adamw(0.1)), "head": ft.optim.sgd(0.2, momentum=0.9)}


LABELS: dict[str, Any] = {
    "patterns": {"body.*": "body", "*": "head"},
    "function": lambda path, p: path.partition(".")[0],
    "tree": {name: name.partition(".")[0] for name in SHAPES},
}


@pytest.mark.parametrize("labels", LABELS)
def test_each_group_is_updated_as_if_it_were_alone(labels: str) -> None:
    tx = ft.optim.partition(LABELS[labels], _two())
    params, state = run(tx)
    assert sorted(ft.optim.metrics(state)) == ["grad_norm/body", "lr/body", "lr/head"]
    assert sorted(tx.select(params)) == ["body", "head"]
    for label, one in _two().items():
        own = {name: p for name, p in leaves(100).items() if name.startswith(label)}
        assert list(tx.select(params)[label]) == list(own)
        inner = one.init(own)
        for step in range(3):
            grads = {name: g for name, g in leaves(step).items() if name in own}
            updates, inner = one.update(grads, inner, own)
            own = ft.optim.apply_updates(own, updates)
        same((own, inner), (tx.select(params)[label], state[label]))


def test_a_partition_in_a_hand_written_step_updates_one_group() -> None:
    tx = ft.optim.partition(LABELS["patterns"], _two())
    params, grads = leaves(0), leaves(1)
    state = tx.init(params)

    def head(grads: Params, state: Any, params: Params) -> tuple[Params, Any]:
        own = tx.select(params)["head"]
        updates, new = tx.transforms["head"].update(tx.select(grads)["head"], state["head"], own)
        return tx.merge(params, ft.optim.apply_updates(own, updates)), {**state, "head": new}

    new, after = head(grads, state, params)
    assert {name for name in params if not torch.equal(new[name], params[name])} == {"head.weight", "head.scale"}
    same(after["body"], state["body"])
    same(graph(head)(grads, state, params), (new, after))


def test_one_label_for_all_is_the_transform_itself() -> None:
    for name, make in OPTIMIZERS.items():
        params, state = run(ft.optim.partition({"*": "all"}, {"all": make()}))
        same((params, state["all"]), run(make()))
        assert moved(params), name


def test_a_partition_is_a_transform() -> None:
    tx = ft.optim.partition({"*": "all"}, {"all": ft.optim.sgd(0.1)})
    assert isinstance(tx, ft.Transform)
    init, update = tx
    assert (init, update) == (tx.init, tx.update)
    same(run(ft.optim.chain(ft.optim.clip(0.1), tx))[0], run(ft.optim.chain(ft.optim.clip(0.1), ft.optim.sgd(0.1)))[0])


def test_groups_against_the_parameter_groups_of_torch() -> None:
    tx = ft.optim.partition(
        {"*.bias": "no_decay", "head.*": "head", "*": "body"},
        {
            "no_decay": ft.optim.adamw(1e-2, weight_decay=0.0),
            "head": ft.optim.adamw(1e-1, weight_decay=0.1),
            "body": ft.optim.adamw(1e-2, weight_decay=0.1),
        },
    )
    got, _ = run(tx, steps=10)
    params = {name: torch.nn.Parameter(p) for name, p in leaves(100).items()}
    groups = [
        {"params": [params["body.bias"]], "weight_decay": 0.0},
        {"params": [p for name, p in params.items() if name.startswith("head")], "lr": 1e-1},
        {"params": [params["body.weight"], params["body.norm.weight"]]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
    for step in range(10):
        for name, g in leaves(step).items():
            params[name].grad = g
        optimizer.step()
    for name, p in params.items():
        torch.testing.assert_close(got[name], p.detach(), rtol=1e-12, atol=1e-14)


def test_a_group_may_be_empty_if_one_says_so() -> None:
    transforms = {"2d": ft.optim.sgd(0.1), "7d": ft.optim.adam(0.1)}
    labels = lambda path, p: "7d" if p.ndim == 7 else "2d"  # noqa: E731 - a value
    tx = ft.optim.partition(labels, transforms, allow_empty=True)
    params, state = run(tx)
    same(params, run(ft.optim.sgd(0.1))[0])
    assert state["7d"] == ()
    assert tx.select(params)["7d"] == {}
    with pytest.raises(ModelError, match=r"no leaf has the label '7d'[\s\S]*allow_empty=True"):
        ft.optim.partition(labels, transforms).init(leaves(0))
    rest = ft.optim.partition(
        {"body.*": "b", "head.*": "h", "*": "rest"}, dict.fromkeys(["b", "h", "rest"], ft.optim.sgd(0.1))
    )
    assert rest.init(leaves(0))["rest"] == ()  # what a default leaves over may be nothing


SGD = ft.optim.sgd(0.1)
NO_PARTITION: dict[str, tuple[Callable[[], Any], str]] = {
    "swapped": (
        lambda: ft.optim.partition({"a": SGD, "b": SGD}, {"body.*": "a", "*": "b"}),
        r"wants the labels first[\s\S]*got: +partition\(transforms, labels\)[\s\S]*other order than in optax[\s\S]*fix: ",
    ),
    "swapped function": (
        lambda: ft.optim.partition({"a": SGD}, lambda path, p: "a"),
        r"got: +partition\(transforms, labels\)",
    ),
    "no transforms": (
        lambda: ft.optim.partition({"*": "a"}, {}),
        r"wants the labels first[\s\S]*transforms=\{\}",
    ),
    "a number": (
        lambda: ft.optim.partition({"a.*": "a", "*": "b"}, {"a": SGD, "b": 0.1}),
        r"what the label 'b' has is no transform\.\n +where: +transforms\['b'\][\s\S]*got: +0\.1",
    ),
    "a function": (
        lambda: ft.optim.partition({"*": "a"}, {"a": ft.optim.adamw}),
        r"label 'a' has is no transform[\s\S]*got: +adamw[\s\S]*when it is called",
    ),
    "an optimizer of torch": (
        lambda: ft.optim.partition({"*": "a"}, {"a": torch.optim.SGD}),
        r"label 'a' has is no transform[\s\S]*got: +SGD[\s\S]*from_torch",
    ),
    "label without transform": (
        lambda: ft.optim.partition({"body.*": "bdoy", "*": "head"}, {"body": SGD, "head": SGD}),
        r"label 'bdoy' has no transform\.[\s\S]*labels\['body\.\*'\][\s\S]*one of: body, head[\s\S]*fix: +label 'body'",
    ),
    "transform without label": (
        lambda: ft.optim.partition({"*": "body"}, {"body": SGD, "head": SGD}),
        r"no leaf has the label 'head'[\s\S]*labels that are used: body",
    ),
    "pattern": (
        lambda: ft.optim.partition({"haed.*": "a", "*": "b"}, {"a": SGD, "b": SGD}).init(leaves(0)),
        r"labels='haed\.\*' matches no parameter[\s\S]*head\.\*",
    ),
    "shadowed": (
        lambda: ft.optim.partition({"head.*": "a", "head.weight": "b", "*": "a"}, {"a": SGD, "b": SGD}).init(leaves(0)),
        r"no leaf has the label 'b'",
    ),
    "leaf without label": (
        lambda: ft.optim.partition({"body.*": "a"}, {"a": SGD}).init(leaves(0)),
        r"leaves without a label\.[\s\S]*where: +head\.scale, head\.weight[\s\S]*\"\*\": 'a'",
    ),
    "function": (
        lambda: ft.optim.partition(lambda path, p: "haed", {"head": SGD}).init(leaves(0)),
        r"label 'haed' has no transform[\s\S]*where: +body\.bias[\s\S]*label 'head'",
    ),
    "tree": (
        lambda: ft.optim.partition({"w": ("a",)}, {"a": SGD}).init(leaves(0)),
        r"tree of labels has another structure[\s\S]*body\.bias",
    ),
}


@pytest.mark.parametrize("case", NO_PARTITION)
def test_a_partition_that_makes_no_sense(case: str) -> None:
    make, text = NO_PARTITION[case]
    with pytest.raises(ModelError, match=text):
        make()


# ------------------------------------------------------------------------------------------------------------- skipping


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@given(st.lists(st.sampled_from([None, torch.inf, -torch.inf, torch.nan]), min_size=1, max_size=6), st.data())
def test_a_run_with_bad_gradients_is_the_run_without_them(
    optimizer: str, plan: list[float | None], data: st.DataObject
) -> None:
    tx = ft.optim.skip_nonfinite(OPTIMIZERS[optimizer]())
    inner = OPTIMIZERS[optimizer]()
    params = good = leaves(100)
    state, expected = tx.init(params), inner.init(good)
    consecutive = 0
    for step, bad in enumerate(plan):
        grads = leaves(step)
        if bad is None:
            updates, expected = inner.update(grads, expected, good)
            good = ft.optim.apply_updates(good, updates)
        else:
            name = data.draw(st.sampled_from(sorted(grads)))
            flat = grads[name].flatten().clone()
            flat[data.draw(st.integers(0, len(flat) - 1))] = bad
            grads[name] = flat.reshape(grads[name].shape)
        updates, state = tx.update(grads, state, params)
        params = ft.optim.apply_updates(params, updates)
        consecutive = 0 if bad is None else consecutive + 1
        assert (int(state.consecutive), bool(state.finite)) == (consecutive, bad is None)
    same((params, state.inner), (good, expected))
    assert int(state.skipped) == sum(bad is not None for bad in plan)
    assert ft.optim.metrics(state)["skipped"] is state.skipped


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_skip_in_one_graph_is_no_new_graph(backend: str) -> None:
    tx = ft.optim.skip_nonfinite(ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(0.1)))
    graphs: list[Any] = []

    def counting(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return torch._dynamo.lookup_backend(backend)(module, inputs)

    compiled = graph(tx.update, counting)
    first = 0
    # In float32: dynamo (2.13) takes a graph input of float64, 0-d, on a CPU for a number, and compiles anew when it is NaN.
    params = leaves(100, torch.float32)
    state = tx.init(params)
    for step in range(4):
        grads = {k: g * torch.nan if step == 2 else g for k, g in leaves(step, torch.float32).items()}
        updates, state = compiled(grads, state, params)
        first = first or len(graphs)  # dynamo may analyse the first call twice
        assert all(bool(u.any()) == (step != 2) for u in updates.values())
    assert int(state.skipped) == 1
    assert int(state.inner[1].count) == 3
    assert len(graphs) == first


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64], ids=lambda d: str(d)[6:]
)
def test_all_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    whole = {"n": torch.tensor(3), "b": torch.tensor(True), "e": torch.zeros(0, dtype=dtype)}
    fine = {**whole, "x": torch.full((1000,), largest, dtype=dtype), "s": torch.tensor(-largest, dtype=dtype)}
    assert ft.optim.all_finite(fine)  # also where a sum of squares would overflow
    assert ft.optim.all_finite(whole)
    for bad in (torch.inf, -torch.inf, torch.nan):
        for name in ("x", "s"):
            spoilt = fine | {
                name: torch.where(torch.arange(fine[name].numel()).reshape(fine[name].shape) == 0, bad, fine[name])
            }
            assert not ft.optim.all_finite(spoilt)
            assert ft.optim.all_finite(spoilt).dtype == torch.bool
            assert not torch.func.vmap(ft.optim.all_finite)({name: spoilt[name].reshape(1, -1)})[0]


def test_select_takes_leaves_of_every_kind() -> None:
    new = {"f": torch.ones(2), "i": torch.tensor(1), "b": torch.tensor(True), "h": torch.ones(1, dtype=torch.bfloat16)}
    old = {
        "f": torch.zeros(2),
        "i": torch.tensor(0),
        "b": torch.tensor(False),
        "h": torch.zeros(1, dtype=torch.bfloat16),
    }
    for flag, expected in ((True, new), (False, old)):
        got = ft.optim.select(torch.tensor(flag), new, old)
        same(got, expected)
        assert [x.dtype for x in got.values()] == [x.dtype for x in new.values()]


def _planted(bad: set[int], count: int = 6) -> tuple[Any, Any, list[Tensor]]:
    """State, step and batches of which some have an infinite gradient."""
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    tx = ft.optim.skip_nonfinite(ft.optim.adam(1e-2))
    step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 2, generator=generator) * (1e30 if k in bad else 1.0) for k in range(count)]
    return ft.init(model, tx), step, batches


def _fit(bad: set[int], hooks: list[Any], state: Any = None, count: int = 6) -> ft.Result:
    fresh, step, batches = _planted(bad, count)
    return ft.fit(state or fresh, step, batches, hooks=hooks, progress=False, compile=False)


def test_the_policy_skip_goes_on() -> None:
    result = _fit({1, 3}, [])
    assert result.reason == "epochs"
    assert result.history["skipped"][-1] > 0
    assert int(result.state.opt.skipped) == 2
    _, step, batches = _planted(set())
    good = ft.fit(_planted(set())[0], step, [batches[k] for k in (0, 2, 4, 5)], progress=False, compile=False)
    same(result.state.params, good.state.params)


def test_the_policy_raise_says_how_many() -> None:
    hook = ft.hooks.nonfinite("raise", every=ft.every(steps=4))
    with pytest.raises(
        LossError, match=r"2 steps were skipped[\s\S]*up to step 4[\s\S]*learning rate[\s\S]*skip_nonfinite"
    ):
        _fit({1, 3}, [hook])
    with pytest.raises(LossError, match=r"1 step was skipped, because its gradient was not finite"):
        _fit({5}, [hook])  # after the last look of the cadence: seen at the end
    _fit({5}, [ft.hooks.nonfinite("raise", every=ft.every(steps=2), allow=1)])


def test_the_policy_stop_ends_the_run_with_a_reason() -> None:
    result = _fit({1}, [ft.hooks.nonfinite("stop", every=ft.every(steps=3))])
    assert result.reason == "nonfinite: 1 step was skipped because its gradient was not finite"
    assert result.state.counters().step == 3
    again = _fit({1}, [ft.hooks.nonfinite("stop", every=ft.every(steps=3))], state=result.state)
    assert again.reason.startswith("nonfinite: 1 step")  # counted from the last look on, not once more
    assert again.state.counters().step == 6


def test_the_hook_reads_the_counts_at_its_cadence_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Tensor] = []
    read = Tensor.__int__
    monkeypatch.setattr(Tensor, "__int__", lambda self: looks.append(self) or read(self))
    _fit(set(), [ft.hooks.nonfinite("raise", every=ft.every(steps=5))], count=12)
    assert len(looks) == 3  # after steps 5 and 10, and at the end


def test_the_hook_counts_the_steps_that_a_loss_scale_skipped() -> None:
    model, tx = torch.nn.Linear(2, 1), ft.optim.adam(1e-2)
    grad = ft.value_and_grad(ft.bind(model, lambda model, batch: model(batch).square().mean()))
    step = ft.make_step(ft.with_loss_scale(grad), tx)
    state = step.init(ft.init(model, tx))
    with pytest.raises(LossError, match=r"1 step was skipped"):
        ft.fit(
            state,
            step,
            [torch.ones(4, 2), torch.full((4, 2), 1e30)],
            hooks=[ft.hooks.nonfinite("raise")],
            progress=False,
            compile=False,
        )


def test_the_hook_wants_something_to_count() -> None:
    model, tx = torch.nn.Linear(2, 1), ft.optim.sgd(0.1)
    step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    hooks = [ft.hooks.nonfinite("raise")]
    with pytest.raises(
        HookError, match=r"nothing in the state counts skipped steps[\s\S]*tx = ft\.optim\.skip_nonfinite"
    ):
        ft.fit(ft.init(model, tx), step, [torch.ones(2, 2)], hooks=hooks, progress=False, compile=False)
    with pytest.raises(LimitError, match=r"no policy 'skip'[\s\S]*without the hook[\s\S]*fix: "):
        ft.hooks.nonfinite("skip")
    with pytest.raises(LimitError, match=r"allow= is a count[\s\S]*got: +-1"):
        ft.hooks.nonfinite("stop", allow=-1)
    with pytest.raises(LimitError, match=r"every= is no cadence[\s\S]*got: +50"):
        ft.hooks.nonfinite("stop", every=50)


def test_a_hook_at_several_moments() -> None:
    seen: list[tuple[str, int]] = []

    def hook(state: Any, event: ft.Event) -> Any:
        seen.append((event.kind, event.step))
        return state

    _fit(set(), [ft.on(("start", ft.every(steps=4), "end"), hook)])
    assert seen == [("start", 0), ("step", 4), ("end", 6)]
    with pytest.raises(HookError, match=r"no events of kind 'ends'"):
        ft.on(("start", "ends"), hook)


# ----------------------------------------------------------------------------------------------------------- the pieces


def _optax(make: Callable[[Any], Any]) -> Params:
    """Parameters after three steps of an optax transform, in float64."""
    import jax
    import jax.numpy as jnp
    import optax

    with jax.enable_x64(True):
        tx = make(optax)
        params = {name: jnp.asarray(p.numpy()) for name, p in leaves(100).items()}
        state = tx.init(params)
        for step in range(3):
            grads = {name: jnp.asarray(g.numpy()) for name, g in leaves(step).items()}
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return {name: torch.from_numpy(np.array(p)) for name, p in params.items()}


def _body(params: Any) -> Any:
    return {name: name.startswith("body") for name in params}


def _halving(t: Any) -> Any:
    return 0.5 / (1.0 + t)


_schedule = ft.schedules.ScheduleFn(_halving, "halving")

OPTAX: dict[str, tuple[Callable[[], ft.Transform], Callable[[Any], Any]]] = {
    "scale": (lambda: ft.optim.scale(-0.3), lambda o: o.scale(-0.3)),
    "scale_by_learning_rate": (lambda: ft.optim.scale_by_learning_rate(0.3), lambda o: o.scale_by_learning_rate(0.3)),
    "scale_by_schedule": (lambda: ft.optim.scale_by_schedule(_schedule), lambda o: o.scale_by_schedule(_halving)),
    "centralize": (ft.optim.centralize, lambda o: o.centralize()),
    "add_decayed_weights": (
        lambda: ft.optim.add_decayed_weights(0.2, "body.*"),
        lambda o: o.add_decayed_weights(0.2, _body),
    ),
    "add_decayed_weights scheduled": (
        lambda: ft.optim.add_decayed_weights(_schedule),
        lambda o: o.add_decayed_weights(_halving),
    ),
    "masked": (
        lambda: ft.optim.masked(ft.optim.adam(0.1), "body.*"),
        lambda o: o.masked(o.adam(0.1), _body),
    ),
    "partition": (
        lambda: ft.optim.partition({"body.*": "a", "*": "b"}, {"a": ft.optim.adam(0.1), "b": ft.optim.sgd(0.1)}),
        lambda o: o.partition(
            {"a": o.adam(0.1), "b": o.sgd(0.1)},
            lambda params: {name: "a" if name.startswith("body") else "b" for name in params},
        ),
    ),
    "conditionally_mask": (
        lambda: ft.optim.conditionally_mask(ft.optim.adam(0.1), lambda t: t != 1),
        lambda o: o.conditionally_mask(o.adam(0.1), lambda t: t != 1),
    ),
    "freeze": (
        lambda: ft.optim.chain(ft.optim.adam(0.1), ft.optim.freeze("body.*")),
        lambda o: o.chain(o.adam(0.1), o.masked(o.set_to_zero(), _body)),
    ),
    "a chain": (
        lambda: ft.optim.chain(
            ft.optim.clip(0.8),
            ft.optim.centralize(),
            ft.optim.add_decayed_weights(0.1),
            ft.optim.scale_by_learning_rate(_schedule),
        ),
        lambda o: o.chain(o.clip(0.8), o.centralize(), o.add_decayed_weights(0.1), o.scale_by_learning_rate(_halving)),
    ),
}


@pytest.mark.parametrize("name", OPTAX)
def test_a_piece_is_that_of_optax(name: str) -> None:
    make, theirs = OPTAX[name]
    got, _ = run(make())
    assert moved(got)
    for key, expected in _optax(theirs).items():
        torch.testing.assert_close(got[key], expected, rtol=1e-10, atol=1e-12)


def test_the_noise_has_the_variance_of_optax_and_dies_out() -> None:
    import jax
    import optax

    eta, gamma, shape = 0.5, 0.55, (200, 200)
    zeros = {"a": torch.zeros(shape, dtype=torch.float64), "b": torch.zeros(shape)}
    tx, theirs = ft.optim.add_noise(eta, gamma, seed=1), optax.add_noise(eta, gamma, key=1)
    state, other = tx.init(zeros), theirs.init({"a": jax.numpy.zeros(shape)})
    seen: list[Tensor] = []
    for t in (1, 2, 3):
        noise, state = tx.update(zeros, state, zeros)
        reference, other = theirs.update({"a": jax.numpy.zeros(shape)}, other)
        variance = float(noise["a"].var())
        assert variance == pytest.approx(eta / t**gamma, rel=0.03)
        assert variance == pytest.approx(float(reference["a"].var()), rel=0.05)
        assert abs(float(noise["a"].mean())) < 0.02
        seen += [noise["a"], noise["b"].double()]
    for i, one in enumerate(seen):  # no two leaves and no two steps have noise in common
        for two in seen[:i]:
            assert abs(float(torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1])) < 0.02
    first = tx.update(zeros, tx.init(zeros), zeros)[0]
    same(first["a"], seen[0])

    two = ft.optim.add_noise(eta, gamma, seed=2)
    assert not torch.equal(two.update(zeros, two.init(zeros), zeros)[0]["a"], seen[0])


NO_PIECES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "scale": (lambda: ft.optim.scale("2"), TypeError, r"scale: '2' is not a factor[\s\S]*fix: +scale\(0\.5\)"),
    "scale schedule": (lambda: ft.optim.scale(_halving), TypeError, r"fix: +scale_by_schedule\(schedule\)"),
    "scale_by_schedule": (lambda: ft.optim.scale_by_schedule(0.1), TypeError, r"no function of the step"),
    "rate": (lambda: ft.optim.scale_by_learning_rate(-0.1), LimitError, r"lr=-0\.1 is negative"),
    "decay": (lambda: ft.optim.add_decayed_weights(-0.1), LimitError, r"weight_decay=-0\.1 is negative"),
    "eta": (lambda: ft.optim.add_noise(-1.0, 0.55), LimitError, r"eta=-1\.0 is negative"),
    "seed": (lambda: ft.optim.add_noise(1.0, 0.55, seed=0.5), LimitError, r"0\.5 is no seed"),
}


@pytest.mark.parametrize("case", NO_PIECES)
def test_a_piece_that_makes_no_sense(case: str) -> None:
    make, kind, text = NO_PIECES[case]
    with pytest.raises(kind, match=text):
        make()


# ------------------------------------------------------------------------------------------------------ names, injection


def test_the_table_of_names_is_the_package() -> None:
    known = ft.optim.optimizers()
    assert {
        "sgd",
        "adam",
        "adamw",
        "adamax",
        "nadam",
        "radam",
        "adagrad",
        "adadelta",
        "rmsprop",
        "rprop",
        "asgd",
    } <= set(known)
    assert {"adafactor", "lion", "lamb", "muon", "lbfgs"} <= set(known)
    assert not {"chain", "clip", "scale_by_learning_rate", "from_torch", "inject", "make"} & set(known)
    for name, factory in known.items():
        assert factory is getattr(ft.optim, name)
    same(run(ft.optim.make("adamw", lr=0.1, weight_decay=0.3))[0], run(ft.optim.adamw(0.1, weight_decay=0.3))[0])


NO_NAMES: dict[str, tuple[Callable[[], Any], str]] = {
    "name": (
        lambda: ft.optim.make("adamww", lr=0.1),
        r"no optimizer 'adamww'\.[\s\S]*one of: [\s\S]*sgd[\s\S]*make\(\"adamw\"",
    ),
    "case": (lambda: ft.optim.make("Lion", lr=0.1), r"fix: +ft\.optim\.make\(\"lion\""),
    "no string": (lambda: ft.optim.make(3, lr=0.1), r"no optimizer 3"),
    "hyper": (
        lambda: ft.optim.make("sgd", lr=0.1, momentun=0.9),
        r"no argument 'momentun'[\s\S]*lr, momentum[\s\S]*momentum=\.\.\.",
    ),
    "synonym": (lambda: ft.optim.make("adam", learning_rate=0.1), r"no argument 'learning_rate'[\s\S]*lr=\.\.\."),
    "missing": (lambda: ft.optim.make("adam", b1=0.5), r"'adam' needs lr\.[\s\S]*got: +b1=0\.5"),
}


@pytest.mark.parametrize("case", NO_NAMES)
def test_a_name_that_is_none(case: str) -> None:
    make, text = NO_NAMES[case]
    with pytest.raises(ModelError, match=text):
        make()


def _family(lr: float, *, decay: float = 0.0, order: int = 2, nesterov: bool = False, **more: Any) -> ft.Transform:
    """An optimizer that forwards arguments; `order` must stay a Python number."""
    assert type(order) is int
    assert type(nesterov) is bool
    return ft.optim.sgd(lr, weight_decay=decay, nesterov=nesterov, **more)


INJECTED: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], set[str]]] = {
    "by place": (ft.optim.adamw, (0.1, 0.8), {}, {"lr", "b1"}),
    "by name": (ft.optim.adamw, (), {"lr": 0.1, "weight_decay": 0}, {"lr", "weight_decay"}),
    "tensor": (ft.optim.sgd, (torch.tensor(0.1, dtype=torch.float64),), {}, {"lr"}),
    "schedule": (ft.optim.sgd, (_schedule,), {"momentum": 0.9}, {"lr", "momentum"}),
    "keyword-only": (
        _family,
        (0.1,),
        {"decay": 0.1, "order": 3, "nesterov": True, "momentum": 0.9},
        {"lr", "decay", "momentum"},
    ),
    "partial": (
        functools.partial(_family, 0.1, order=4, momentum=0.9),
        (),
        {"decay": 0.2},
        {"lr", "decay", "momentum"},
    ),
    "partial of partial": (
        functools.partial(functools.partial(ft.optim.adamw, b1=0.8), b1=0.7),
        (0.1,),
        {},
        {"lr", "b1"},
    ),
    "structure": (ft.optim.adamw, (0.1,), {"mask": "*.weight", "amsgrad": True}, {"lr"}),
}


@pytest.mark.parametrize("case", INJECTED)
def test_injected_numbers_are_leaves(case: str) -> None:
    factory, args, kwargs, names = INJECTED[case]
    tx, plain = ft.optim.inject(factory)(*args, **kwargs), factory(*args, **kwargs)
    params, state = run(tx)
    assert set(state.hyper) == names
    assert all(value.dtype == torch.float64 and value.ndim == 0 for value in state.hyper.values())
    for key, expected in run(plain)[0].items():
        torch.testing.assert_close(params[key], expected, rtol=1e-12, atol=1e-14)
    compiled = graph(tx.update)
    for key, one in run(tx, update=compiled)[0].items():
        torch.testing.assert_close(one, params[key], rtol=1e-12, atol=1e-14)


def test_an_injected_number_can_be_replaced_wherever_it_came_from() -> None:
    tx = ft.optim.inject(functools.partial(_family, 1.0, decay=0.5))(momentum=0.0)
    params, zeros = leaves(0), tree.map(torch.zeros_like, leaves(0))
    state = tx.init(params)
    for decay in (0.5, 0.25):
        state = state._replace(hyper={**state.hyper, "decay": torch.tensor(decay, dtype=torch.float64)})
        updates, _ = tx.update(zeros, state, params)
        for key, p in params.items():
            torch.testing.assert_close(updates[key], -decay * p)


def test_sizes_are_not_injected() -> None:
    assert set(ft.optim.inject(ft.optim.lbfgs)(1.0, max_iter=5, max_eval=6, history_size=7).init(leaves(0)).hyper) == {
        "lr"
    }


@pytest.mark.parametrize(
    ("tx", "grad"),
    [
        (ft.optim.set_to_zero(), 1.0),
        (ft.optim.freeze("*"), 1.0),
        (ft.optim.conditionally_mask(ft.optim.sgd(0.1), lambda t: t > 5), 1.0),
        (ft.optim.skip_nonfinite(ft.optim.sgd(0.1)), torch.nan),
    ],
    ids=["set_to_zero", "freeze", "conditionally_mask", "skip_nonfinite"],
)
def test_what_is_held_still_keeps_the_sign_of_zero(tx: ft.Transform, grad: float) -> None:
    params = {"w": torch.tensor([-0.0, 0.0, -1.0, 1.0])}
    updates, _ = tx.update({"w": torch.full((4,), grad)}, tx.init(params), params)
    new = ft.optim.apply_updates(params, updates)["w"]
    assert torch.equal(new.view(torch.int32), params["w"].view(torch.int32))
