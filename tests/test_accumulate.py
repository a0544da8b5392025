"""Law 4: micro-batches of unequal weight are one large batch; windows of loader batches; and what cannot be cut."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ftrain as ft
from ftrain.errors import BatchError, DataError, LimitError, MetricError

from .corpus import MODELS
from .test_laws import bits
from .test_parity import deterministic

BATCHED = [
    "mlp",
    "gpt",
    "lstm",
    "frozen",
    "two_heads",
]  # batch norm sees other statistics in a part: excepted by the law


def gradient(case: Any, model: nn.Module, **wrap: Any) -> Any:
    grad = ft.value_and_grad(ft.bind(model, case.loss_fn))
    return ft.with_accumulation(grad, **wrap) if wrap else grad


@pytest.mark.parametrize(("model", "k"), [(m, k) for m in BATCHED for k in (2, 4, 8)])
def test_parts_are_the_whole(model: str, k: int) -> None:
    case = MODELS[model]
    module = deterministic(case.model(torch.float64))
    state, batch, key = ft.init(module, ft.optim.sgd(0.1)), case.batch(8, dtype=torch.float64), ft.rng.key(0)
    given = {**state.frozen, **state.buffers}
    whole, loss, (metrics, _) = gradient(case, module)(state.params, given, batch, key)
    parts, own, (merged, _) = gradient(case, module, k=k)(state.params, given, batch, key)
    assert max(g.abs().max() for g in whole.values()) > 1e-3
    for name, g in whole.items():
        torch.testing.assert_close(parts[name], g, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(own.compute(), loss.compute(), rtol=1e-13, atol=0)
    assert float(own.weight) == float(loss.weight)
    for name, metric in metrics.items():
        torch.testing.assert_close(merged[name].compute(), metric.compute(), rtol=1e-6, atol=0)


def masked_loss(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    errors = (model(batch["x"]).squeeze(-1) - batch["y"]).square()
    return ft.metrics.Mean.of(errors, batch["mask"])


def masked_batch(counts: list[int], width: int = 6) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    mask = torch.arange(width) < torch.tensor(counts)[:, None]
    x = torch.randn(len(counts), width, 3, generator=draw, dtype=torch.float64)
    x[~mask] = 1e6  # padding that would show
    return {"x": x, "y": torch.randn(len(counts), width, generator=draw, dtype=torch.float64), "mask": mask}


@pytest.mark.parametrize("counts", [[6, 1, 2, 5], [1, 1, 0, 6], [0, 0, 3, 4], [4, 4, 4, 4]])
def test_weights_are_the_numbers_of_tokens(counts: list[int]) -> None:
    model = nn.Linear(3, 1).double()
    grad = ft.value_and_grad(ft.bind(model, masked_loss))
    state, batch = ft.init(model, ft.optim.sgd(0.1)), masked_batch(counts)
    whole, loss, _ = grad(state.params, {}, batch, ft.rng.key(0))
    parts, own, _ = ft.with_accumulation(grad, 4)(state.params, {}, batch, ft.rng.key(0))
    assert float(own.weight) == sum(counts)
    torch.testing.assert_close(own.compute(), loss.compute(), rtol=1e-12, atol=0)
    for name in whole:
        assert whole[name].abs().max() > 1e-3
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-12, atol=1e-14)


def test_a_mean_of_means_would_be_something_else() -> None:
    model = nn.Linear(3, 1).double()
    grad = ft.value_and_grad(ft.bind(model, masked_loss))
    state, batch = ft.init(model, ft.optim.sgd(0.1)), masked_batch([6, 1, 2, 5])
    whole, *_ = grad(state.params, {}, batch, ft.rng.key(0))
    rows = [grad(state.params, {}, {k: v[i : i + 1] for k, v in batch.items()}, ft.rng.key(0))[0] for i in range(4)]
    naive = sum(row["weight"] for row in rows) / 4
    assert (naive - whole["weight"]).abs().max() > 1e-2 * whole["weight"].abs().max()


def test_a_batch_of_padding_alone_has_a_gradient_of_zero() -> None:
    model = nn.Linear(3, 1).double()
    grad = ft.value_and_grad(ft.bind(model, masked_loss))
    state = ft.init(model, ft.optim.sgd(0.1))
    for fn in (grad, ft.with_accumulation(grad, 2)):
        grads, loss, _ = fn(state.params, {}, masked_batch([0, 0]), ft.rng.key(0))
        assert float(loss.weight) == 0
        assert all(bool((g == 0).all()) for g in grads.values())


@pytest.mark.parametrize("model", BATCHED)
def test_one_part_is_the_function_itself(model: str) -> None:
    case = MODELS[model]
    module = case.model()
    tx = ft.optim.adam(1e-2)
    plain = ft.make_step(gradient(case, module), tx)
    wrapped = ft.make_step(gradient(case, module, k=1), tx)
    state = ft.init(module, tx)
    assert bits(plain(state, case.batch())[0]) == bits(wrapped(state, case.batch())[0])


def test_uneven_parts_differ_by_one_and_are_exact() -> None:
    case = MODELS["two_heads"]
    module = case.model(torch.float64)
    state, batch = ft.init(module, ft.optim.sgd(0.1)), case.batch(7, dtype=torch.float64)
    grad = gradient(case, module)
    whole, *_ = grad(state.params, {}, batch, ft.rng.key(0))
    for k in (2, 3, 5, 7, 9):
        parts, loss, _ = ft.with_accumulation(grad, k, uneven="split")(state.params, {}, batch, ft.rng.key(0))
        assert float(loss.weight) == 7
        for name, g in whole.items():
            torch.testing.assert_close(parts[name], g, rtol=1e-12, atol=1e-14)


def test_each_part_draws_from_a_key_of_its_own() -> None:
    keys: list[int] = []

    def loss_fn(model: nn.Module, batch: Tensor, rng: Tensor) -> Tensor:
        keys.append(int(rng))
        return model(batch).square().mean()

    model = nn.Linear(3, 1)
    grad = ft.with_accumulation(ft.value_and_grad(ft.bind(model, loss_fn)), 4)
    params = ft.init(model, ft.optim.sgd(0.1)).params
    grad(params, {}, torch.ones(8, 3), ft.rng.key(7))
    assert keys == [ft.rng.fold_in_host(7, i) for i in range(4)]


def test_half_precision_gradients_are_summed_in_float32() -> None:
    model = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    grad = ft.value_and_grad(ft.bind(model, lambda model, batch: model(batch).float().mean()))
    # 256 parts of gradient 1, one of 257 at the end: in bfloat16 the running sum would stand still at 256
    batch = torch.ones(512, 1, dtype=torch.bfloat16)
    params = ft.init(model, ft.optim.sgd(0.1)).params
    grads, *_ = ft.with_accumulation(grad, 512)(params, {}, batch, ft.rng.key(0))
    assert grads["weight"].dtype == torch.bfloat16
    assert float(grads["weight"]) == 1.0


def test_batch_norm_statistics_go_from_part_to_part() -> None:
    model = nn.BatchNorm1d(2)
    grad = ft.with_accumulation(ft.value_and_grad(ft.bind(model, lambda m, b: m(b).square().mean())), 2)
    state, batch = ft.init(model, ft.optim.sgd(0.1)), torch.randn(8, 2)
    _, _, (_, new) = grad(state.params, state.buffers, batch, ft.rng.key(0))
    reference = nn.BatchNorm1d(2)
    reference(batch[:4]), reference(batch[4:])
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(new[name], buffer)


# -- windows ------------------------------------------------------------------------------------------------------------------


def numbered(n: int) -> list[Tensor]:
    return [torch.full((1,), float(i)) for i in range(n)]


def windows(data: Any, epochs: int) -> list[list[list[float]]]:
    source = ft.data.as_epochs(data)
    return [[[float(b) for b in w.batches] for w in source(epoch)] for epoch in range(epochs)]


def test_short_windows_by_policy() -> None:
    data = numbered(5)
    assert windows(ft.data.window(data, 2), 2) == [[[0, 1], [2, 3], [4]]] * 2
    assert windows(ft.data.window(data, 2, short="drop"), 2) == [[[0, 1], [2, 3]]] * 2
    assert windows(ft.data.window(data, 2, short="carry"), 3) == [
        [[0, 1], [2, 3]],
        [[4, 0], [1, 2], [3, 4]],
        [[0, 1], [2, 3]],
    ]
    assert windows(ft.data.window(numbered(2), 5, short="carry"), 3) == [[], [], [[0, 1, 0, 1, 0]]]


def test_what_is_carried_belongs_to_one_run() -> None:
    data = ft.data.window(numbered(3), 2, short="carry")
    assert windows(data, 2) == windows(data, 2) == [[[0, 1]], [[2, 0], [1, 2]]]


def test_the_size_may_depend_on_the_epoch() -> None:
    data = ft.data.window(numbered(4), lambda epoch: 1 + epoch)
    assert [len(epoch) for epoch in windows(data, 3)] == [4, 2, 2]


@pytest.mark.parametrize("backend", [None, "eager"])
def test_windows_train_as_large_batches_do(backend: str | None) -> None:
    case = MODELS["two_heads"]
    model, tx = case.model(torch.float64), ft.optim.adam(1e-2)
    small = case.batches(7, n=4, dtype=torch.float64)
    large = [{k: torch.cat([b[k] for b in group]) for k in group[0]} for group in (small[0:3], small[3:6], small[6:])]
    step = ft.train_step(model, case.loss_fn, tx)
    kw: dict[str, Any] = {"progress": False, **({"compile": False} if backend is None else {"backend": backend})}
    one = ft.fit(ft.init(model, tx), step, ft.data.window(small, 3), epochs=2, **kw)
    two = ft.fit(ft.init(model, tx), step, large, epochs=2, compile=False, progress=False)
    assert one.state.counters()._replace(seed=0) == two.state.counters()._replace(seed=0)
    assert one.state.counters().samples == 56
    for name, p in two.state.params.items():
        torch.testing.assert_close(one.state.params[name], p, rtol=1e-10, atol=1e-12)
    assert one.history["loss"] == pytest.approx(two.history["loss"], rel=1e-10)


def test_windows_of_arrays_know_their_length() -> None:
    data = {"x": torch.arange(10.0)}
    source = ft.data.as_epochs(ft.data.window(data, 2, batch_size=2), shuffle=False)
    assert source.length == 3
    assert [[b["x"].tolist() for b in w.batches] for w in source(0)] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9]]]


def test_accumulation_compiles_into_one_graph_and_once_more_for_a_short_window() -> None:
    case = MODELS["two_heads"]
    model, tx = case.model(), ft.optim.adam(1e-2)
    fast = ft.compile(ft.train_step(model, case.loss_fn, tx, accumulate=2), backend="eager")
    ft.fit(ft.init(model, tx), fast, ft.data.window(case.batches(5), 2), epochs=2, progress=False)
    assert (fast.rung, fast.compiles, len(fast.recompiles)) == ("step", 2, 1)


# -- bad input ----------------------------------------------------------------------------------------------------------------


def test_a_factor_that_does_not_divide_the_batch_is_said_with_both_numbers_and_the_policies() -> None:
    case = MODELS["two_heads"]
    model, tx = case.model(), ft.optim.adam(1e-2)
    step, state = ft.train_step(model, case.loss_fn, tx, accumulate=3), ft.init(model, tx)
    text = (
        r"a batch of 8 samples cannot be cut into 3 equal micro-batches\.\n.*that 3 divides\n.*8 samples, accumulate=3\n"
        r'(.|\n)*accumulate=2 (.|\n)*uneven="split"(.|\n)*short="step"(.|\n)*"drop" or "carry"'
    )
    for run in (
        lambda: step(state, case.batch(8)),
        lambda: ft.compile(step, backend="eager")(state.copy(), case.batch(8)),
        lambda: ft.fit(state, step, [case.batch(9), case.batch(8)], compile=False, progress=False),
    ):
        with pytest.raises(BatchError, match=text):
            run()
    assert int(state.step) == 0


def test_a_short_last_batch_is_found_before_the_first_step() -> None:
    model, tx = nn.Linear(2, 1), ft.optim.sgd(0.1)
    taken: list[int] = []

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        taken.append(len(batch))
        return model(batch).square().mean()

    step = ft.train_step(model, loss_fn, tx, accumulate=4)
    for call in (ft.fit, ft.loop):
        with pytest.raises(BatchError, match="a batch of 2 samples cannot be cut into 4"):
            call(ft.init(model, tx), step, torch.ones(10, 2), batch_size=8)
    assert taken == []


@pytest.mark.parametrize("k", [0, -1, 2.0, True, "2", None])
def test_a_factor_that_is_no_number(k: Any) -> None:
    model, tx = nn.Linear(2, 1), ft.optim.sgd(0.1)
    with pytest.raises(LimitError, match=r"is not a number of micro-batches\.(.|\n)*expected: an integer >= 1"):
        ft.train_step(model, lambda m, b: m(b).mean(), tx, accumulate=k)


def test_tensors_that_cannot_be_cut() -> None:
    model = nn.Linear(2, 1)
    grad = ft.with_accumulation(ft.value_and_grad(ft.bind(model, lambda m, b: m(b["x"]).mean() * b["w"].sum())), 2)
    params = ft.init(model, ft.optim.sgd(0.1)).params
    batch = {"w": torch.ones(4), "x": torch.ones(6, 2)}
    with pytest.raises(
        BatchError, match=r"differ in their number of rows\.\n  where: +batch\['x'\]\n.*4 rows, as batch\['w'\]"
    ):
        grad(params, {}, batch, ft.rng.key(0))
    with pytest.raises(BatchError, match="no samples that could be cut into 2"):
        grad(params, {}, {"w": torch.ones(())}, ft.rng.key(0))
    whole = ft.value_and_grad(ft.bind(model, lambda m, b: m(b["x"]).mean() * b["w"]))
    batch = {"w": torch.tensor(3.0), "x": torch.randn(6, 2)}  # what has no rows goes to every part
    for one, two in itertools.pairwise(
        [fn(params, {}, batch, ft.rng.key(0))[0] for fn in (whole, ft.with_accumulation(whole, 3))]
    ):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("size", [0, -2, 1.5, True, "3"])
def test_a_window_of_no_size(size: Any) -> None:
    with pytest.raises(DataError, match=r"ft\.data\.window: the size is .*\n  expected: an integer >= 1"):
        ft.data.window([torch.ones(1)], size)


def test_windows_refuse_what_they_do_not_know() -> None:
    with pytest.raises(DataError, match=r"there is no policy short='keep'\.\n  expected: step, drop, carry"):
        ft.data.window([torch.ones(1)], 2, short="keep")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="grouped into windows already"):
        ft.data.window(ft.data.window([torch.ones(1)], 2), 2)
    with pytest.raises(LimitError, match="there is no policy uneven='drop'"):
        ft.with_accumulation(lambda *a: None, 2, uneven="drop")  # type: ignore[arg-type,return-value]
    source = ft.data.as_epochs(ft.data.window(numbered(2), lambda epoch: 0))
    with pytest.raises(DataError, match="the size for epoch 0 is 0"):
        next(source(0))


def test_a_compiled_part_waits_for_the_one_before() -> None:
    """Else a compiler may run all forward passes first, and hold the activations of the whole batch."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    model, tx = nn.Linear(3, 1), ft.optim.sgd(0.1)
    step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx, accumulate=3)
    batch, state = torch.randn(6, 3), ft.init(model, tx)
    new, _ = ft.compile(step, backend=backend, donate=False, rung="step")(state, batch)
    torch.testing.assert_close(new.params, step(state, batch)[0].params)
    nodes = list(graphs[0].graph.nodes)
    gradients = [node for node in nodes if node.op == "call_function" and node.target is torch.autograd.grad]
    assert len(gradients) == 3
    for earlier, later in itertools.pairwise(gradients):
        before, todo = set(), [later]
        while todo:
            node = todo.pop()
            if node not in before:
                before.add(node)
                todo.extend(node.all_input_nodes)
        assert earlier in before


def test_parts_with_other_metrics() -> None:
    def loss_fn(model: nn.Module, batch: Tensor) -> Any:
        return model(batch).mean(), ({"low": batch.mean()} if float(batch.sum()) < 0 else {"high": batch.mean()})

    model = nn.Linear(1, 1)
    grad = ft.with_accumulation(ft.value_and_grad(ft.bind(model, loss_fn)), 2)
    text = r"different metrics\.\n  where: +micro-batch 1 (.|\n)*those of the first: low\n  got: +high"
    with pytest.raises(MetricError, match=text):
        grad(ft.init(model, ft.optim.sgd(0.1)).params, {}, torch.tensor([[-1.0], [1.0]]), ft.rng.key(0))


def test_a_window_for_a_gradient_without_accumulation() -> None:
    model, tx = nn.Linear(1, 1), ft.optim.sgd(0.1)
    step = ft.make_step(ft.value_and_grad(ft.bind(model, lambda m, b: m(b).mean())), tx)
    with pytest.raises(
        BatchError, match=r"a window of batches stands where one batch is needed(.|\n)*with_accumulation"
    ):
        step(ft.init(model, tx), ft.data.Window((torch.ones(2, 1),) * 2))


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"batch_size": 8}, (8, 2)),
        ({"batch_size": 8, "drop_last": True}, (8,)),
        ({"batch_size": 5, "shuffle": True}, (5,)),
        ({"batch_size": 16}, (10,)),
        ({"batch_size": None}, None),
        ({"batch_size": 8, "collate_fn": lambda rows: torch.stack(rows)[:4]}, None),
        ({"batch_sampler": [[0, 1, 2], [3]]}, None),
    ],
    ids=["short", "dropped", "even", "one", "none", "collated", "sampled"],
)
def test_the_batches_of_a_loader_are_known_beforehand(options: dict[str, Any], sizes: tuple[int, ...] | None) -> None:
    loader = torch.utils.data.DataLoader(torch.ones(10, 2), **options)  # type: ignore[arg-type]  # a tensor is a dataset
    assert ft.data.as_epochs(loader).sizes == sizes
    if sizes == (8, 2):
        model, tx = nn.Linear(2, 1), ft.optim.sgd(0.1)
        step = ft.train_step(model, lambda m, b: m(b).mean(), tx, accumulate=4)
        with pytest.raises(BatchError, match="a batch of 2 samples cannot be cut into 4"):
            ft.fit(ft.init(model, tx), step, loader)
