"""The ladder, donation, recompilation: what `ft.compile` promises beyond the laws."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ftrain as ft
from ftrain.errors import CompileError, CompileWarning, DonatedStateError, RecompileWarning

from .corpus import MODELS, setup


class Checkpointed(nn.Module):
    """Recomputes its first half, with dropout in it."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.one = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 8))
        self.two = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.one, x, use_reentrant=False) if self.recompute else self.one(x)
        return self.two(h)


def checkpointed(recompute: bool) -> tuple[Any, ft.TrainState]:
    torch.manual_seed(0)
    model, tx = Checkpointed(recompute), ft.optim.sgd(0.1)
    state = ft.init(model, tx)
    for leaf in model.parameters():  # the outer model's numbers are of no use to anybody
        leaf.data.fill_(float("nan"))
    return ft.train_step(model, MODELS["mlp"].loss_fn, tx), state


def test_checkpointing_recomputes_with_the_states_numbers() -> None:
    batch = MODELS["mlp"].batch()
    plain, state = checkpointed(False)
    again, same = checkpointed(True)
    torch.testing.assert_close(plain(state, batch)[0].params, again(same, batch)[0].params, rtol=0, atol=0)


def test_a_model_that_checkpoints_takes_the_second_rung_and_says_why() -> None:
    step, state = checkpointed(True)
    batch = MODELS["mlp"].batch()
    fast = ft.compile(step, backend="aot_eager", donate=False)
    with pytest.warns(CompileWarning, match="loss and update compiled apart.*activation checkpointing"):
        new, _ = fast(state, batch)
    assert (fast.rung, fast.compiles) == ("loss", 2)
    assert "activation checkpointing" in fast.reason
    expected, _ = step(state, batch)
    torch.testing.assert_close(new.params, expected.params)
    before = fast.compiles
    fast(new, batch)
    fast(state, batch)
    assert fast.compiles == before


def branching(model: nn.Module, batch: Any) -> Tensor:
    loss = F.cross_entropy(model(batch["x"]), batch["y"])
    return loss * 2 if loss > 100 else loss


def test_control_flow_on_values_runs_eagerly_with_one_warning() -> None:
    case, tx = MODELS["frozen"], ft.optim.sgd(0.1)
    model = case.model()
    step, state = ft.train_step(model, branching, tx), ft.init(model, tx)
    fast = ft.compile(step, backend="eager", donate=False)
    with pytest.warns(CompileWarning):
        new, _ = fast(state, case.batch())
    fast(new, case.batch())  # no second warning: warnings are errors here
    assert fast.rung == "eager"
    assert torch.equal(new.params["head.bias"], step(state, case.batch())[0].params["head.bias"])


def test_a_named_rung_raises_instead_of_descending() -> None:
    case, tx = MODELS["frozen"], ft.optim.sgd(0.1)
    model = case.model()
    state, step = ft.init(model, tx), ft.train_step(model, branching, tx)
    with pytest.raises(CompileError, match="does not compile as the whole step in one graph"):
        ft.compile(step, backend="eager", rung="step")(state, case.batch())
    with pytest.raises(CompileError, match="does not compile as the whole step"):
        ft.fit(state, step, case.batches(2), compile=True, backend="eager", progress=False)
    step, state = setup("mlp")[1:]
    assert ft.compile(step, backend="eager", rung="loss", donate=False)(state, MODELS["mlp"].batch())[0].step == 1


def test_without_a_compiler_there_is_one_warning_and_the_run_is_eager(tmp_path: Any) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent("""
        import warnings, torch, ftrain as ft
        model, tx = torch.nn.Linear(3, 1), ft.optim.sgd(0.1)
        step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            evals = {"val": ft.Evaluator(ft.eval_step(model, lambda m, b: {"x": m(b).mean()}), [torch.ones(4, 3)])}
            result = ft.fit(ft.init(model, tx), step, [torch.ones(4, 3)] * 3, evals=evals, progress=False)
        own = [w for w in caught if issubclass(w.category, ft.errors.CompileWarning)]
        print(len(own), result.state.counters().step, str(own[0].message))
        """)
    )
    env = {**os.environ, "CXX": "/nonexistent/g++", "PATH": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    out = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=True).stdout
    assert out.startswith("1 3 ft.compile runs eager, nothing compiled")
    assert "no C++ compiler was found" in out


def test_a_donated_state_says_when_it_was_consumed_and_shows_the_way_out() -> None:
    case, step, state = setup("mlp")
    fast = ft.compile(step, backend="eager")
    one, _ = fast(state.copy(), case.batch())
    two, _ = fast(one, case.batch())
    with pytest.raises(DonatedStateError) as caught:
        _ = one.params
    assert str(caught.value) == (
        "reading state.params of a state whose memory was given to a compiled step at step 1.\n"
        "  cause:    ft.compile(step, donate=True) overwrites its input, so only the state that it returned is valid\n"
        "  fix:      state, metrics = step(state, batch)      # go on with the returned state\n"
        "            kept = state.copy()                      # or copy before the step what must survive it\n"
        "            step = ft.compile(step, donate=False)    # or compile without donation"
    )
    for use in (
        lambda: fast(one, case.batch()),
        lambda: step(one, case.batch()),
        lambda: ft.fit(one, step, [case.batch()]),
    ):
        with pytest.raises(DonatedStateError, match="at step 1"):
            use()
    assert repr(one) == "TrainState(donated at step 1)"
    assert two.counters().step == 2


def test_a_sibling_of_a_donated_state_is_found_out() -> None:
    case, step, state = setup("mlp")
    sibling = state.replace(params=dict(state.params))
    ft.compile(step, backend="eager")(state, case.batch())
    with pytest.raises(DonatedStateError, match="shares leaves with it"):
        step(sibling, case.batch())


@pytest.mark.parametrize("rung", ["step", "eager"])
def test_donation_of_a_step_that_moves_leaves_around(rung: Any) -> None:
    """A new leaf may be another old one: the memory is written only when all values stand."""

    def rotate(state: ft.TrainState, batch: Any) -> Any:
        a, b = state.params["one.weight"], state.params["trunk.weight"][:3, :6]
        del b
        extra = {"before": a, "twice": state.extra["before"]}
        return state.advance(8, params={**state.params, "one.weight": a + 1}, extra=extra), {"x": a.sum()}

    case, _, state = setup("two_heads")
    a = state.params["one.weight"]
    state = state.replace(extra={"before": torch.zeros_like(a), "twice": torch.zeros_like(a)})
    fast = ft.compile(rotate, backend="aot_eager", rung=rung)
    expected, found = state, state.copy()
    for _ in range(3):
        expected, _ = rotate(expected, case.batch())
        found, _ = fast(found, case.batch())
    for (path, one), two in zip(ft.tree.items(expected, "state"), ft.tree.leaves(found), strict=True):
        assert torch.equal(one, two), path


def test_a_recompilation_names_what_changed() -> None:
    case, step, state = setup("mlp")
    fast = ft.compile(step, backend="eager", donate=False)
    fast(state, case.batch(8))
    fast(state, case.batch(5))  # a short last batch: expected
    batch = case.batch(8)
    turned = {**batch, "x": batch["x"].t().contiguous().t()}
    with pytest.warns(
        RecompileWarning,
        match=r"at call 3: batch\['x'\] changed from float32\[8, 6\].*stride \(6, 1\) to .*stride \(1, 8\)",
    ):
        fast(state, turned)
    assert [r.leaf for r in fast.recompiles] == ["batch['x']", "batch['x']"]


def test_a_global_that_changes_is_seen() -> None:
    scope: dict[str, Any] = {"F": F, "SCALE": 1.0}
    exec("def loss_fn(model, batch):\n    return F.cross_entropy(model(batch['x']), batch['y']) * SCALE", scope)
    case, tx = MODELS["frozen"], ft.optim.sgd(0.1)
    model = case.model()
    fast = ft.compile(ft.train_step(model, scope["loss_fn"], tx), backend="eager", donate=False)
    state = ft.init(model, tx)
    one = float(fast(state, case.batch())[1]["loss"].compute())
    scope["SCALE"] = 3.0
    with pytest.warns(RecompileWarning, match="SCALE"):
        three = float(fast(state, case.batch())[1]["loss"].compute())
    assert three == pytest.approx(3 * one)


class Annealed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)
        self.inner.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.inner.calls += 1
        return self.inner(x) * self.inner.calls


def test_an_attribute_of_a_submodule_that_the_forward_changes_is_seen() -> None:
    case, tx = MODELS["frozen"], ft.optim.sgd(0.0)
    model = Annealed()
    eager, fast = (ft.train_step(model, case.loss_fn, tx) for _ in range(2))
    fast = ft.compile(fast, backend="eager", donate=False)
    state = ft.init(model, tx)
    a = [float(eager(state, case.batch())[1]["loss"].compute()) for _ in range(3)]
    with pytest.warns(RecompileWarning):
        b = [float(fast(state, case.batch())[1]["loss"].compute()) for _ in range(3)]
    assert a == pytest.approx(b)
    assert len(set(a)) == 3


def test_dynamo_reset_between_calls_does_no_harm() -> None:
    case, step, state = setup("mlp")
    fast = ft.compile(step, backend="eager")
    state, _ = fast(state, case.batch())
    torch._dynamo.reset()
    new, _ = fast(state, case.batch())
    assert int(new.step) == 2


class Straight(torch.autograd.Function):
    """Rounds; the gradient goes straight through, doubled. Applied directly to a parameter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_custom_function_on_a_parameter_keeps_its_backward(backend: str) -> None:
    model, tx = nn.Linear(4, 1, bias=False), ft.optim.sgd(1.0)
    step = ft.train_step(model, lambda model, batch: F.linear(batch, Straight.apply(model.weight)).mean(), tx)
    state, batch = ft.init(model, tx), torch.ones(2, 4)
    for one in (step, ft.compile(step, backend=backend, donate=False)):
        new, _ = one(state, batch)
        torch.testing.assert_close(new.params["weight"], state.params["weight"] - 2)


def test_an_exception_in_a_program_leaves_no_half_written_state() -> None:
    def lookup(model: nn.Module, batch: Any) -> Tensor:
        return model(batch).mean()

    model, tx = nn.Embedding(4, 2), ft.optim.sgd(0.1)
    fast = ft.compile(ft.train_step(model, lookup, tx), backend="eager")
    state, _ = fast(ft.init(model, tx), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(IndexError):
        fast(state, torch.full((3,), 9))
    with pytest.raises(DonatedStateError, match="at step 1"):
        _ = state.params


def test_a_second_fit_of_a_bound_method_is_its_own() -> None:
    case = MODELS["frozen"]

    class Holder:
        def __init__(self, lr: float) -> None:
            self.tx = ft.optim.sgd(lr)
            self.inner = ft.train_step(case.model(), case.loss_fn, self.tx)

        def step(self, state: Any, batch: Any) -> Any:
            return self.inner(state, batch)

    still, moving = Holder(0.0), Holder(0.5)
    state = ft.init(case.model(), still.tx)
    one, two = (ft.fit(state, h.step, case.batches(2), progress=False, backend="eager").state for h in (still, moving))
    assert torch.equal(one.params["head.weight"], state.params["head.weight"])
    assert not torch.equal(two.params["head.weight"], state.params["head.weight"])


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_donated_scalar_is_written(dtype: torch.dtype, backend: str) -> None:
    """AOTAutograd (2.13) loses what is written into a 0-d float64 input on a CPU, unless it is written through a view."""

    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(2.0, dtype=dtype))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a * x

    model = Scalar()
    tx = ft.optim.inject(ft.optim.sgd)(lr=ft.schedules.linear(0.1, 0.3, 4))
    step = ft.train_step(model, lambda m, b: m(b).square().mean(), tx)
    one = ft.init(model, tx)
    two, fast = one.copy(), ft.compile(step, backend=backend, rung="step")
    for _ in range(3):
        one, _ = step(one, torch.ones(4, dtype=dtype))
        two, _ = fast(two, torch.ones(4, dtype=dtype))
    assert float(one.params["a"].detach()) < 1.0
    torch.testing.assert_close(two.params["a"], one.params["a"])
    torch.testing.assert_close(two.opt.hyper["lr"], one.opt.hyper["lr"])


def test_an_eager_call_between_compiled_ones_compiles_nothing() -> None:
    model, tx = nn.Linear(2, 1), ft.optim.sgd(0.1)
    step = ft.train_step(model, lambda m, b: m(b).square().mean(), tx)
    fast = ft.compile(step, backend="eager", donate=False)
    state = ft.init(model, tx)
    fast(state, torch.ones(4, 2))
    step(state, torch.ones(4, 2))
    fast(state, torch.ones(4, 2))
    assert (fast.compiles, fast.recompiles) == (1, [])


def test_an_lstm_compiles_where_torchs_flags_are_frozen() -> None:
    case = MODELS["lstm"]
    model, tx = case.model(), ft.optim.sgd(0.1)
    before = (torch.backends.mkldnn.enabled, torch.backends.mkldnn.deterministic, torch.backends.mkldnn.allow_tf32)
    frozen = torch.backends.flags_frozen()
    torch.backends.disable_global_flags()  # what importing torch.testing._internal.common_utils does
    try:
        fast = ft.compile(ft.train_step(model, case.loss_fn, tx), backend="aot_eager", rung="step")
        fast(ft.init(model, tx), case.batch())
    finally:
        torch.backends.__allow_nonbracketed_mutation_flag = not frozen
    assert fast.compiles == 1
    assert before == (
        torch.backends.mkldnn.enabled,
        torch.backends.mkldnn.deterministic,
        torch.backends.mkldnn.allow_tf32,
    )
