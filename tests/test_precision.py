"""Precision: policies by name, what is computed in which dtype, and what is refused."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ftrain as ft
from ftrain import tree
from ftrain.errors import DeviceError, ModelError, PrecisionError
from ftrain.precision import as_policy

from .corpus import MODELS
from .test_laws import bits
from .test_parity import deterministic

ON_CPU = ["32-true", "64-true", "bf16-mixed", "bf16-true"]
NAMES = [*ON_CPU, "16-mixed", "16-true"]


@pytest.mark.parametrize("precision", ON_CPU)
@pytest.mark.parametrize("model", ["mlp", "conv_bn", "gpt", "two_heads"])
def test_every_precision_trains_every_model(model: str, precision: str) -> None:
    case = MODELS[model]
    module, tx = deterministic(case.model()), ft.optim.adam(1e-2)
    step = ft.train_step(module, case.loss_fn, tx, precision=precision)
    state = ft.init(module, tx, precision=precision)
    policy = as_policy(precision)
    floating = [leaf for leaf in tree.leaves((state.params, state.buffers)) if leaf.is_floating_point()]
    assert {leaf.dtype for leaf in floating} == {policy.param}
    start = state
    for _ in range(8):
        state, metrics = step(state, case.batch(16))
    tree.check_same(start, state, root="state", what="the step changed the form of the state.")
    assert metrics["loss"].total.dtype == policy.output
    first = float(step(start, case.batch(16))[1]["loss"].compute())
    assert float(metrics["loss"].compute()) < first


@pytest.mark.parametrize("model", ["mlp", "two_heads"])
def test_bf16_mixed_is_autocast(model: str) -> None:
    case = MODELS[model]
    module, tx = deterministic(case.model()), ft.optim.sgd(0.1)
    step = ft.train_step(module, case.loss_fn, tx, precision="bf16-mixed")
    new, metrics = step(ft.init(module, tx), case.batch())
    # without the cache of cast weights, with which the gradients of a weight that is used twice meet in bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        out = case.loss_fn(module, case.batch())
    loss = out[0] if isinstance(out, tuple) else out
    loss.backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(new.params[name], (p - 0.1 * p.grad).detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(metrics["loss"].compute(), loss.detach().float())
    plain = ft.train_step(module, case.loss_fn, tx)(ft.init(module, tx), case.batch())[0]
    assert bits(plain.params) != bits(new.params), "nothing was computed in bfloat16"


def test_float32_by_name_is_float32_without_a_name() -> None:
    case = MODELS["mlp"]
    module, tx = case.model(), ft.optim.adam(1e-2)
    one = ft.train_step(module, case.loss_fn, tx)(ft.init(module, tx), case.batch())
    two = ft.train_step(module, case.loss_fn, tx, precision=32)(ft.init(module, tx, precision="32"), case.batch())
    assert bits(one) == bits(two)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_an_autocast_of_the_callers_does_not_reach_into_a_precision_that_is_named(backend: str | None) -> None:
    case = MODELS["two_heads"]
    module, tx = case.model(), ft.optim.sgd(1.0)
    step: Any = ft.train_step(module, case.loss_fn, tx, precision="32-true")
    want, _ = step(ft.init(module, tx), case.batch())
    if backend is not None:
        step = ft.compile(step, backend=backend, donate=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = step(ft.init(module, tx), case.batch())
    # SGD: a step of Adam has the size of the learning rate whatever the gradient rounds to
    for name, p in want.params.items():
        torch.testing.assert_close(got.params[name], p, rtol=1e-5, atol=1e-7)  # bfloat16 has 3 digits


def test_float64_computes_in_float64() -> None:
    case = MODELS["two_heads"]
    module, tx = case.model(), ft.optim.adam(1e-2)
    step = ft.train_step(module, case.loss_fn, tx, precision="64-true")
    new, _ = step(ft.init(module, tx, precision="64-true"), case.batch())  # a float32 batch is converted
    double = case.model().double()
    want, _ = ft.train_step(double, case.loss_fn, tx)(ft.init(double, tx), tree.map(_double, case.batch()))
    assert bits(new.params) == bits(want.params)


def _double(leaf: torch.Tensor) -> torch.Tensor:
    return leaf.double() if leaf.is_floating_point() else leaf


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_into_one_graph(precision: str, backend: str) -> None:
    case = MODELS["two_heads"]
    module, tx = case.model(), ft.optim.adam(1e-2)
    step = ft.train_step(module, case.loss_fn, tx, precision=precision, accumulate=2)
    state = ft.init(module, tx, precision=precision)
    fast = ft.compile(step, backend=backend, donate=False)
    new, metrics = fast(state, case.batch())
    want, _ = step(state, case.batch())
    assert (fast.rung, fast.compiles) == ("step", 1)
    assert type(metrics).__name__ == "Packed"
    for name, p in want.params.items():
        torch.testing.assert_close(new.params[name], p, rtol=2e-2, atol=1e-2)


def test_evaluation_and_prediction_in_the_same_precision() -> None:
    seen: list[torch.dtype] = []
    model = nn.Linear(3, 2)

    def metric_fn(model: nn.Module, batch: torch.Tensor) -> dict[str, Any]:
        out = model(batch)
        seen.append(out.dtype)
        return {"mean": out.mean()}

    state = ft.init(model, ft.optim.sgd(0.1))
    found = ft.eval_step(model, metric_fn, precision="bf16-mixed")(state, torch.ones(4, 3))
    assert (seen, found["mean"].compute().dtype) == ([torch.bfloat16], torch.float32)
    assert ft.predict_step(model, precision="bf16-mixed")(state, torch.ones(4, 3)).dtype == torch.float32
    half = ft.init(model, ft.optim.sgd(0.1), precision="bf16-true")
    assert ft.predict_step(model, precision="bf16-true")(half, torch.ones(4, 3)).dtype == torch.float32
    with pytest.raises(PrecisionError, match="kept in another precision"):
        ft.predict_step(model, precision="bf16-true")(state, torch.ones(4, 3))


def test_a_policy_of_ones_own() -> None:
    model, tx = nn.Linear(3, 1), ft.optim.sgd(0.1)
    policy = ft.Policy(compute=torch.bfloat16, output=torch.float64)
    step = ft.train_step(model, lambda m, b: (m(b).square().mean(), {"a": m(b).mean()}), tx, precision=policy)
    _, metrics = step(ft.init(model, tx), torch.ones(4, 3))
    assert metrics["loss"].total.dtype == metrics["a"].total.dtype == torch.float64


def test_a_loss_in_half_precision_is_weighted_in_float32() -> None:
    model = nn.Linear(1, 1, bias=False).bfloat16()
    loss = ft.bind(model, lambda m, b: (m(b) * 0 + 1.0078125).mean())
    value, _ = loss(
        ft.init(model, ft.optim.sgd(0.1)).params, {}, torch.ones(257, 1, dtype=torch.bfloat16), ft.rng.key(0)
    )
    assert value.total.dtype == torch.float32
    assert float(value.total) == 257 * 1.0078125


def test_the_whole_range_of_a_batch_norm_and_dropout_model() -> None:
    case = MODELS["conv_bn"]
    module, tx = case.model(), ft.optim.sgd(0.1)
    step = ft.train_step(module, case.loss_fn, tx, precision="bf16-mixed")
    new, _ = step(ft.init(module, tx), case.batch())
    assert {b.dtype for b in new.buffers.values() if b.is_floating_point()} == {torch.float32}
    assert F.softmax(new.params["head.bias"], 0).isfinite().all()


# -- float8 -------------------------------------------------------------------------------------------------------------------


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))


def squares(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch) - batch[:, :3]).square().mean()


@pytest.mark.parametrize("precision", [None, "bf16-mixed"])
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_emulated_float8_trains_nearly_as_float32(precision: str | None, backend: str | None) -> None:
    model, tx = wide(), ft.optim.adamw(1e-2)
    loss: Any = ft.with_float8(ft.bind(model, squares), emulate=True)
    if precision is not None:
        loss = ft.with_precision(loss, precision)
    step: Any = ft.make_step(ft.value_and_grad(loss), tx)
    if backend is not None:
        step = ft.compile(step, backend=backend, donate=False)
    plain = ft.train_step(model, squares, tx)
    start = one = two = ft.init(model, tx)
    batch = torch.randn(32, 16)
    for _ in range(10):
        one, m = step(one, batch)
        two, n = plain(two, batch)
    first = float(plain(start, batch)[1]["loss"].compute())
    assert bits(one.params) != bits(two.params), "nothing was rounded to float8"
    assert float(m["loss"].compute()) == pytest.approx(float(n["loss"].compute()), rel=0.1)
    assert float(n["loss"].compute()) < 0.9 * first
    assert backend is None or (step.rung, step.compiles) == ("step", 1)
    tree.check_same(start, one, root="state", what="the step changed the form of the state.")
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear], (
        "the user's model was changed"
    )


def test_float8_takes_the_layers_that_are_chosen() -> None:
    model = wide()
    bound = ft.bind(model, squares)

    def converted(**kw: Any) -> list[str]:
        module = ft.with_float8(bound, emulate=True, **kw).skeleton.module
        return [path for path, one in module.named_modules() if type(one).__name__ == "Float8Linear"]

    assert converted() == ["0", "2"]  # sides that are multiples of 16
    assert converted(modules="2") == ["2"]
    remat = ft.with_float8(ft.with_remat(bound, "0"), emulate=True)
    state = ft.init(model, ft.optim.sgd(0.1))
    grads, *_ = ft.value_and_grad(remat)(state.params, {}, torch.randn(16, 16), ft.rng.key(0))
    assert all(bool(g.isfinite().all()) for g in grads.values())


def test_float8_says_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tx = wide(), ft.optim.sgd(0.1)
    step = ft.train_step(model, squares, tx, precision="fp8-mixed")
    for run in (step, ft.compile(step, backend="eager", donate=False)):
        with pytest.raises(
            DeviceError, match=r"float8 is not supported on this device(.|\n)*fix: +precision=\"bf16-mixed\""
        ):
            run(ft.init(model, tx), torch.ones(16, 16))
    with pytest.raises(ModelError, match=r"no linear layer is chosen(.|\n)*multiples of 16(.|\n)*\(3, 5\)"):
        ft.with_float8(ft.bind(nn.Linear(5, 3), squares))
    with pytest.raises(ModelError, match="'head' matches no module"):
        ft.with_float8(ft.bind(model, squares), "head")
    with pytest.raises(ModelError, match=r"wants what ft\.bind made"):
        ft.with_float8(ft.with_precision(ft.bind(model, squares), "bf16-mixed"))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ModelError, match=r"needs torchao(.|\n)*pip install 'ftrain\[float8\]'"):
        ft.with_float8(ft.bind(model, squares))


# -- bad input ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"), [("bf16-mxed", "bf16-mixed"), ("fp32-true", "32-true"), ("16mixed", "16-mixed")]
)
def test_an_unknown_precision_suggests_the_nearest(name: str, near: str) -> None:
    model, tx = nn.Linear(1, 1), ft.optim.sgd(0.1)
    text = rf"there is no precision '{name}'\.\n  expected: 32-true, (.|\n)*fix: +precision='{near}'"
    for make in (
        lambda: ft.train_step(model, lambda m, b: m(b).mean(), tx, precision=name),
        lambda: ft.init(model, tx, precision=name),
        lambda: ft.eval_step(model, lambda m, b: {}, precision=name),
        lambda: ft.with_precision(ft.bind(model, lambda m, b: m(b).mean()), name),
    ):
        with pytest.raises(PrecisionError, match=text):
            make()


@pytest.mark.parametrize("precision", ["16-mixed", "16-true", 16])
def test_float16_on_a_cpu_is_an_error_that_says_what_to_use(precision: Any) -> None:
    model, tx = nn.Linear(1, 1), ft.optim.sgd(0.1)
    text = r'float16 is not supported on a CPU\.(.|\n)*fix: +precision="bf16-(mixed|true)"'
    with pytest.raises(DeviceError, match=text):
        ft.init(model, tx, precision=precision)
    step = ft.train_step(model, lambda m, b: m(b).mean(), tx, precision=precision)
    state = ft.init(model.half() if precision == "16-true" else model, tx)
    state = step.init(state)
    for run in (step, ft.compile(step, backend="eager")):
        with pytest.raises(DeviceError, match=text):
            run(state, torch.ones(2, 1))
    assert int(state.step) == 0


def test_a_state_in_another_precision_than_the_step() -> None:
    model, tx = nn.Linear(1, 1), ft.optim.sgd(0.1)
    step = ft.train_step(model, lambda m, b: m(b).mean(), tx, precision="bf16-true")
    text = r"kept in another precision(.|\n)*state\.params\['weight'\](.|\n)*torch\.bfloat16\n  got: +torch\.float32"
    with pytest.raises(PrecisionError, match=text):
        step(ft.init(model, tx), torch.ones(2, 1))


@pytest.mark.parametrize(
    "kw", [{"param": torch.int64}, {"compute": "bf16"}, {"param": torch.bfloat16}, {"compute": torch.float64}]
)
def test_policies_that_make_no_sense(kw: Any) -> None:
    with pytest.raises(PrecisionError, match=r"Policy: .*(no floating dtype|not a mixed precision)"):
        ft.Policy(**kw)
