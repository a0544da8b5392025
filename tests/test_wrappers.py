"""Wrappers: each around the identity is the function itself, and every one goes with every other, in one graph."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ftrain as ft
from ftrain import tree
from ftrain.errors import ArgumentError, CompileWarning, MetricError, ModelError, StateError

from .corpus import MODELS, Gpt, _language
from .test_laws import bits
from .test_parity import deterministic

# -- law 5: around the identity -----------------------------------------------------------------------------------------------

NEUTRAL: dict[str, Callable[[Any], Any]] = {
    "accumulation of one": lambda loss: ft.with_accumulation(ft.value_and_grad(loss), 1),
    "SAM of radius zero": lambda loss: ft.with_sam(ft.value_and_grad(loss), rho=0.0),
    "a loss scale": lambda loss: ft.with_loss_scale(ft.value_and_grad(loss), init_scale=2.0**8),
    "statistics": lambda loss: ft.with_grad_stats(ft.value_and_grad(loss)),
    "float32 by name": lambda loss: ft.value_and_grad(ft.with_precision(loss, "32-true")),
    "rematerialisation": lambda loss: ft.value_and_grad(ft.with_remat(loss, lambda path, module: "." not in path)),
    "a wrapper of the user's": lambda loss: users(ft.with_loss_scale(ft.value_and_grad(loss), init_scale=2.0**8)),
}


def users(grad_fn: Any) -> Any:
    @functools.wraps(grad_fn)
    def wrapper(*args: Any) -> Any:
        return grad_fn(*args)

    return wrapper


@pytest.mark.parametrize("wrap", NEUTRAL)
@pytest.mark.parametrize("model", [m for m in MODELS if m != "lstm"])
def test_a_wrapper_around_the_identity(model: str, wrap: str) -> None:
    case = MODELS[model]
    # SAM takes a second gradient, for which dropout draws anew; with radius zero it is the same only without dropout
    module = deterministic(case.model()) if wrap.startswith("SAM") else case.model()
    tx = ft.optim.adam(1e-2)
    plain = ft.make_step(ft.value_and_grad(ft.bind(module, case.loss_fn)), tx)
    step = ft.make_step(NEUTRAL[wrap](ft.bind(module, case.loss_fn)), tx)
    one = ft.init(module, tx)
    two = step.init(one)
    for batch in case.batches(3):
        one, m = plain(one, batch)
        two, n = step(two, batch)
    assert bits((one.params, one.opt, one.buffers)) == bits((two.params, two.opt, two.buffers))
    assert {k: float(v.compute()) for k, v in m.items()} == {k: float(n[k].compute()) for k in m}


# -- every wrapper with every other -------------------------------------------------------------------------------------------

WRAPPERS = ["precision", "accumulation", "SAM", "statistics", "loss scale", "clip", "skip", "decay", "EMA", "SWA"]
ORDER = "loss: precision; gradient: accumulation, SAM, statistics, loss scale; update: skip(clip, optimizer); step: EMA, SWA"


def two_optimizers(on: set[str]) -> ft.Transform:
    """Groups with optimizers of their own, inside of what is on."""
    groups = {"trunk": ft.optim.adamw(1e-2), "heads": ft.optim.sgd(0.05, momentum=0.9)}
    tx: Any = ft.optim.partition({"trunk.*": "trunk", "*": "heads"}, groups)
    if "decay" in on:
        tx = ft.optim.chain(ft.optim.add_decayed_weights(1e-2, mask=ft.optim.no_bias_or_norm), tx)
    if "clip" in on:
        tx = ft.optim.chain(ft.optim.clip_by_global_norm(0.5), tx)
    return ft.optim.skip_nonfinite(tx) if "skip" in on else tx


def gradient(loss: Any, on: set[str], name: str = "loss_scale") -> Any:
    if "precision" in on:
        loss = ft.with_precision(loss, "bf16-mixed")
    grad: Any = ft.value_and_grad(loss)
    if "accumulation" in on:
        grad = ft.with_accumulation(grad, 2)
    if "SAM" in on:
        grad = ft.with_sam(grad, 0.01)
    if "statistics" in on:
        grad = ft.with_grad_stats(grad, "trunk.*", statistics=("norm", "zeros"))
    if "loss scale" in on:
        grad = ft.with_loss_scale(grad, init_scale=2.0**8, name=name)
    return grad


def averaged(step: Any, on: set[str]) -> Any:
    if "EMA" in on:
        step = ft.with_ema(step, 0.9)
    return ft.with_swa(step, start=1) if "SWA" in on else step


def check(step: Any, state: Any, batches: list[Any], rung: str = "step") -> None:
    state = step.init(state)
    fast = ft.compile(step, backend="eager", donate=False)
    one = two = state
    for batch in batches:
        one, metrics = step(one, batch)
        two, own = fast(two, batch)
        assert metrics.keys() == own.keys()
    assert fast.rung == rung
    assert rung != "step" or fast.compiles == 1
    tree.check_same(state, one, root="state", what="the step changed the form of the state.")
    for (path, a), b, start in zip(tree.items(one, "state"), tree.leaves(two), tree.leaves(state), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-5, msg=lambda text, path=path: f"{path}: {text}")
        del start
    assert bits(one.params) != bits(state.params)


@pytest.mark.parametrize("pair", list(itertools.combinations(WRAPPERS, 2)), ids="+".join)
def test_every_pair_with_two_optimizers_in_one_graph(pair: tuple[str, str]) -> None:
    case, on = MODELS["two_heads"], set(pair)
    model, tx = case.model(), two_optimizers(on)
    step = averaged(ft.make_step(gradient(ft.bind(model, case.loss_fn), on), tx), on)
    check(step, ft.init(model, tx), case.batches(2))


@pytest.mark.parametrize("model", ["two_heads", "mlp", "conv_bn"])
def test_all_at_once(model: str) -> None:
    case, on = MODELS[model], set(WRAPPERS) - {"statistics"}
    module = deterministic(case.model())
    tx = ft.optim.skip_nonfinite(ft.optim.chain(ft.optim.clip_by_global_norm(0.5), ft.optim.adamw(1e-2)))
    step = averaged(ft.make_step(gradient(ft.bind(module, case.loss_fn), on), tx), on)
    check(step, ft.init(module, tx), case.batches(2))


def test_all_at_once_in_a_step_of_two_updates() -> None:
    case, on = MODELS["two_heads"], set(WRAPPERS)
    model = case.model()
    groups = {
        "trunk": ft.optim.chain(ft.optim.clip_by_global_norm(0.5), ft.optim.adamw(1e-2)),
        "heads": ft.optim.skip_nonfinite(ft.optim.sgd(0.05, momentum=0.9)),
    }
    tx = ft.optim.partition({"trunk.*": "trunk", "*": "heads"}, groups)
    bound = ft.bind(model, case.loss_fn)
    trunk = ft.make_update(gradient(bound, on, "scale_trunk"), tx, only="trunk")
    heads = ft.make_update(gradient(bound, on - {"statistics"}, "scale_heads"), tx, only="heads")

    def both(state: ft.TrainState, batch: Any) -> Any:
        state, one = trunk(state, batch)
        state, two = heads(state, batch)
        return state, {**two, **one}

    step = averaged(ft.as_step(both, uses=[trunk, heads]), on)
    check(step, ft.init(model, tx), case.batches(2))
    assert set(step.init(ft.init(model, tx)).extra) == {"scale_trunk", "scale_heads", "ema", "swa"}


@pytest.mark.parametrize("other", [w for w in WRAPPERS if w != "SWA"])
def test_rematerialisation_with_every_other_on_the_second_rung(other: str) -> None:
    case, on = MODELS["two_heads"], {other}
    model, tx = case.model(), two_optimizers(on)
    loss = ft.with_remat(ft.bind(model, case.loss_fn), "trunk")
    step = averaged(ft.make_step(gradient(loss, on), tx), on)
    with pytest.warns(CompileWarning, match="activation checkpointing"):
        check(step, ft.init(model, tx), case.batches(2), rung="loss")


def test_train_step_is_the_composition_of_its_docstring_with_everything_on() -> None:
    case = MODELS["gpt"]
    model, tx = case.model(), ft.optim.adamw(1e-2)
    step = ft.train_step(model, case.loss_fn, tx, precision="bf16-mixed", accumulate=4, remat="blocks.*")
    loss = ft.with_precision(ft.with_remat(ft.bind(model, case.loss_fn), "blocks.*"), "bf16-mixed")
    by_hand = ft.make_step(ft.with_accumulation(ft.value_and_grad(loss), 4), tx)
    one = two = ft.init(model, tx)
    for batch in case.batches(2):
        one, two = step(one, batch)[0], by_hand(two, batch)[0]
    assert bits(one) == bits(two)


# -- rematerialisation --------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = nn.Linear(4, 4), []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(torch.is_grad_enabled())
        return torch.tanh(self.inner(x))


def test_chosen_modules_run_again_in_the_backward_pass() -> None:
    model = nn.Sequential(Counting(), Counting())
    for pattern, counts in (("0", (2, 1)), (("0", "1"), (2, 2)), (lambda path, module: path == "1", (1, 2))):
        loss = ft.with_remat(ft.bind(model, lambda m, b: m(b).square().mean()), pattern)
        step = ft.make_step(ft.value_and_grad(loss), ft.optim.sgd(0.1))
        blocks = list(loss.skeleton.module)
        step(ft.init(model, ft.optim.sgd(0.1)), torch.randn(2, 4))
        assert tuple(len(block.calls) for block in blocks) == counts
    assert all(not block.calls for block in model), "the user's module was used"


def test_dropout_in_a_recomputed_block_draws_the_same_again() -> None:
    model, tx = Gpt(dropout=0.3), ft.optim.sgd(0.1)
    batch = MODELS["gpt"].batch()
    plain, _ = ft.train_step(model, _language, tx)(ft.init(model, tx), batch)
    again, _ = ft.train_step(model, _language, tx, remat="blocks.*")(ft.init(model, tx), batch)
    assert bits(plain) == bits(again)


def test_batch_norm_in_a_recomputed_block_counts_once() -> None:
    case = MODELS["conv_bn"]
    model, tx = case.model(), ft.optim.sgd(0.1)
    plain, _ = ft.train_step(model, case.loss_fn, tx)(ft.init(model, tx), case.batch())
    again, _ = ft.train_step(model, case.loss_fn, tx, remat="body")(ft.init(model, tx), case.batch())
    assert bits(plain) == bits(again)
    assert int(again.buffers["body.1.num_batches_tracked"]) == 1


@pytest.mark.inductor
def test_rematerialisation_by_inductor() -> None:
    case = MODELS["gpt"]
    # Not Adam: the gradient of the keys' biases is zero but for rounding, which it would blow up to the size of a step.
    model, tx = deterministic(case.model()), ft.optim.sgd(0.1)
    step = ft.train_step(model, case.loss_fn, tx, remat="blocks.*")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompileWarning)
        ft.testing.check_compiled(step, ft.init(model, tx), case.batch(), backend="inductor")


@pytest.mark.parametrize(("pattern", "near"), [("block.*", "blocks"), (["blocks.*", "hed"], "head")])
def test_a_pattern_without_a_module(pattern: Any, near: str) -> None:
    model = Gpt()
    with pytest.raises(
        ModelError, match=rf"matches no module\.\n  expected: a pattern for some of(.|\n)*fix: .*\"{near}"
    ):
        ft.train_step(model, _language, ft.optim.sgd(0.1), remat=pattern)


def test_rematerialisation_comes_first() -> None:
    loss = ft.with_precision(ft.bind(nn.Linear(1, 1), lambda m, b: m(b).mean()), "bf16-mixed")
    with pytest.raises(ModelError, match=r"wants what ft\.bind made(.|\n)*got: +Precise"):
        ft.with_remat(loss, "*")  # type: ignore[arg-type]


# -- SAM and statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_is_its_equation(adaptive: bool) -> None:
    case, rho = MODELS["two_heads"], 0.1
    reference = case.model(torch.float64)
    model = copy.deepcopy(reference)
    tx = ft.optim.sgd(0.1)
    step = ft.make_step(ft.with_sam(ft.value_and_grad(ft.bind(model, case.loss_fn)), rho, adaptive=adaptive), tx)
    state = ft.init(model, tx)
    for batch in case.batches(5, dtype=torch.float64):
        state, metrics = step(state, batch)
        params = list(reference.parameters())
        loss = case.loss_fn(reference, batch)
        grads = torch.autograd.grad(loss, params)
        assert float(metrics["loss"].compute()) == pytest.approx(loss.item(), rel=1e-12)
        with torch.no_grad():
            size = [p.abs() if adaptive else torch.ones_like(p) for p in params]
            norm = torch.stack([(s * g).norm() for s, g in zip(size, grads, strict=True)]).norm() + 1e-12
            climb = [rho * s * s * g / norm for s, g in zip(size, grads, strict=True)]
            for p, e in zip(params, climb, strict=True):
                p.add_(e)
        grads = torch.autograd.grad(case.loss_fn(reference, batch), params)
        with torch.no_grad():
            for p, e, g in zip(params, climb, grads, strict=True):
                p.sub_(e)
                p.sub_(0.1 * g)
    for name, p in reference.named_parameters():
        torch.testing.assert_close(state.params[name], p.detach(), rtol=1e-10, atol=1e-12)


def test_sam_refuses_a_schedule() -> None:
    with pytest.raises(ArgumentError, match=r"rho is neither a number nor a 0-d tensor(.|\n)*no count of updates"):
        ft.with_sam(ft.value_and_grad(ft.bind(nn.Linear(1, 1), lambda m, b: m(b).mean())), ft.schedules.constant(0.1))


def test_statistics_are_those_of_the_gradient() -> None:
    case = MODELS["mlp"]
    model = case.model()
    grad = ft.value_and_grad(ft.bind(model, case.loss_fn))
    measured = ft.with_grad_stats(grad, statistics=("norm", "mean", "std", "max", "zeros"))
    state, key = ft.init(model, ft.optim.sgd(0.1)), ft.rng.key(0)
    torch.manual_seed(0)
    grads, *_ = grad(state.params, {}, case.batch(), key)
    torch.manual_seed(0)
    same, _, (metrics, _) = measured(state.params, {}, case.batch(), key)
    assert bits(grads) == bits(same)
    for name, g in grads.items():
        want = {
            "norm": g.norm(),
            "mean": g.mean(),
            "std": g.var(correction=0).sqrt(),
            "max": g.abs().max(),
            "zeros": (g == 0).float().mean(),
        }
        for statistic, value in want.items():
            torch.testing.assert_close(metrics[f"grad_{statistic}/{name}"].compute(), value)
    with pytest.raises(MetricError, match=r"there is no statistic 'median'\.\n  expected: norm, mean"):
        ft.with_grad_stats(grad, statistics=("median",))
    with pytest.raises(ModelError, match="with_grad_stats"):
        ft.with_grad_stats(grad, "nothing.*")(state.params, {}, case.batch(), key)


def test_what_the_optimizer_reports_is_among_the_metrics() -> None:
    case = MODELS["two_heads"]
    model = case.model()
    schedule = ft.schedules.warmup_cosine(1e-2, 2, 10)
    tx = ft.optim.chain(
        ft.optim.clip_by_global_norm(0.5),
        ft.optim.partition(
            {"trunk.*": "trunk", "*": "heads"}, {"trunk": ft.optim.adamw(schedule), "heads": ft.optim.sgd(0.5)}
        ),
    )
    step = ft.train_step(model, case.loss_fn, tx)
    grad = ft.value_and_grad(ft.bind(model, case.loss_fn))
    state = ft.init(model, tx)
    for number, batch in enumerate(case.batches(4)):
        norm = ft.optim.global_norm(grad(state.params, {}, batch, ft.rng.key(0))[0])
        state, metrics = step(state, batch)
        found = {name: float(metric.compute()) for name, metric in metrics.items()}
        assert found["lr/trunk"] == pytest.approx(float(schedule(torch.tensor(number))), rel=1e-6)
        assert found["lr/heads"] == 0.5
        assert found["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    result = ft.fit(ft.init(model, tx), step, case.batches(4), compile=False, progress=False, log=ft.every(steps=1))
    assert result.history["lr/trunk"] == pytest.approx([float(schedule(torch.tensor(n))) for n in range(4)], rel=1e-6)


def test_as_step_wants_updates() -> None:
    with pytest.raises(StateError, match=r"uses= holds something that is no update(.|\n)*ft\.make_update"):
        ft.as_step(lambda state, batch: (state, {}), uses=[torch.nn.Linear(1, 1)])
