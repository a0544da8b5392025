"""`ft.summary`: numbers against hand counts, and that the model stays as it was."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ftrain as ft
from ftrain.errors import ArgumentError, InspectError, ModelError, StructureError


def rows(found):
    return {row.path: row for row in found.rows}


def state_of(model, **kwargs):
    return ft.init(model, ft.optim.adam(1e-3), **kwargs)


def test_mlp():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    state = state_of(model)
    found = ft.summary(state, model, torch.ones(32, 8))
    total = 8 * 16 + 16 + 16 * 4 + 4
    assert (found.parameters, found.trainable, found.frozen, found.buffers) == (total, total, 0, 0)
    assert found.model_bytes == 4 * total
    assert found.dtypes == {"float32": 4 * total}
    assert found.optimizer_bytes == sum(t.numel() * t.element_size() for t in ft.tree.leaves(state.opt))
    assert found.flops == 2 * 32 * (8 * 16 + 16 * 4)
    by = rows(found)
    assert [(by[p].parameters, by[p].output, by[p].flops) for p in ("0", "1", "2")] == [
        (144, "[32, 16]", 2 * 32 * 8 * 16),
        (0, "[32, 16]", 0),
        (68, "[32, 4]", 2 * 32 * 16 * 4),
    ]
    assert {row.calls for row in found.rows} == {1}


def test_cnn_with_batch_norm():
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 36, 2))
    found = ft.summary(state_of(model), model, torch.ones(5, 3, 8, 8))
    assert found.parameters == 3 * 6 * 9 + 12 + 6 * 36 * 2 + 2
    assert found.buffers == 6 + 6 + 1
    assert found.model_bytes == 4 * found.parameters + 4 * 12 + 8
    assert found.dtypes == {"float32": 4 * found.parameters + 48, "int64": 8}
    assert rows(found)["0"].output == "[5, 6, 6, 6]"
    assert rows(found)["0"].flops == 2 * 5 * 36 * 27 * 6
    assert rows(found)["1"].bytes == 4 * 12 + 4 * 12 + 8
    assert found.flops == 2 * 5 * 36 * 27 * 6 + 2 * 5 * 216 * 2


def test_transformer_block():
    width, heads, inner, rows_, length = 16, 4, 32, 3, 5
    model = nn.TransformerEncoderLayer(width, heads, inner, batch_first=True)
    found = ft.summary(state_of(model), model, torch.ones(rows_, length, width))
    attention = 4 * width * width + 4 * width
    assert found.parameters == attention + 2 * width * inner + inner + width + 4 * width
    tokens = rows_ * length
    linear = 2 * tokens * (4 * width * width + 2 * width * inner)
    assert found.flops == linear + 2 * 2 * tokens * length * width
    assert rows(found)["linear1"].flops == 2 * tokens * width * inner
    assert rows(found)["self_attn"].output == "([3, 5, 16], None)"
    assert rows(found)["self_attn.out_proj"].notes == ("never called",)  # torch uses its weight without it


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.inner = nn.Linear(4, 4, bias=False)
        self.out = nn.Linear(4, 10, bias=False)
        self.out.weight = self.embed.weight
        self.spare = nn.Linear(3, 3)

    def forward(self, x):
        return self.out(self.inner(self.inner(self.embed(x))))


def test_tied_embeddings_repeated_calls_and_spare_modules():
    model = Tied()
    found = ft.summary(state_of(model), model, torch.zeros(2, 3, dtype=torch.int64))
    assert found.parameters == 40 + 16 + 12
    by = rows(found)
    assert (by["embed"].parameters, by["out"].parameters) == (40, 0)
    assert by["out"].notes == ("weight is embed.weight",)
    assert (by["inner"].calls, by["inner"].flops, by["inner"].notes) == (2, 2 * 2 * 6 * 16, ("called 2 times",))
    assert (by["spare"].calls, by["spare"].notes, by["spare"].output) == (0, ("never called",), "")
    assert found.flops == 2 * 6 * (2 * 16 + 40)
    assert sum(by[p].parameters for p in ("embed", "inner", "out", "spare")) == found.parameters


def test_one_module_under_two_names():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    found = ft.summary(None, model, torch.ones(1, 4), fn=lambda model, x: model["b"](model["a"](x)))
    assert found.parameters == 20
    assert rows(found)["a"].notes == ("also b", "called 2 times")
    assert "b" not in rows(found)


class Lora(nn.Module):
    def __init__(self, base, rank):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("with_state", [True, False])
def test_a_frozen_base_with_adapters_in_two_dtypes(with_state):
    model = nn.Sequential(Lora(nn.Linear(8, 8), 2))
    model[0].base.bfloat16()
    model[0].down.bfloat16()
    model[0].up.bfloat16()
    model.append(nn.Linear(8, 2).bfloat16())
    model[1].float()
    state = state_of(model) if with_state else None
    found = ft.summary(state, model, depth=2)
    assert (found.trainable, found.frozen) == (32 + 18, 72)
    assert found.dtypes == {"bfloat16": 2 * (72 + 32), "float32": 4 * 18}
    assert rows(found)["0.base"].notes == ("frozen",)
    assert (rows(found)["0"].parameters, rows(found)["0"].trainable) == (104, 32)
    assert "32 trainable" not in repr(found)
    assert "122 (50 trainable, 72 frozen)" in repr(found)
    if with_state:
        # Adam: two moments of what is trained, and counters
        assert 2 * (2 * 32 + 4 * 18) <= found.optimizer_bytes <= 2 * (2 * 32 + 4 * 18) + 64
    else:
        assert found.optimizer_bytes == 0


def test_the_state_says_what_is_trained_and_in_which_dtype():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    found = ft.summary(state_of(model, trainable="1.*", precision="bf16-true"), model)
    assert (found.trainable, found.frozen) == (10, 20)
    assert found.dtypes == {"bfloat16": 60}
    assert rows(found)["0"].notes == ("frozen",)


def test_lstm():
    model = nn.LSTM(5, 7, num_layers=2, batch_first=True)
    found = ft.summary(state_of(model), model, torch.ones(2, 6, 5))
    assert found.parameters == 28 * (5 + 7) + 2 * 28 + 28 * (7 + 7) + 2 * 28
    assert found.flops == 2 * 12 * 28 * ((5 + 7) + (7 + 7))
    assert found.rows[0].output == "([2, 6, 7], ([2, 2, 7], [2, 2, 7]))"


class OnDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, batch):
        return {"out": self.layer(batch["x"]), "pair": (batch["y"], None)}

    def encode(self, x, scale):
        return self.layer(x) * scale


def test_dicts_in_and_out_and_calls_of_other_kinds():
    model = OnDict()
    batch = {"x": torch.ones(4, 3), "y": torch.ones(4)}
    assert ft.summary(None, model, batch).rows[0].output == "{out: [4, 2], pair: ([4], None)}"
    found = ft.summary(None, model, batch, fn=lambda model, batch: model.encode(batch["x"], scale=2) @ torch.ones(2, 5))
    assert found.flops == 2 * 4 * 3 * 2 + 2 * 4 * 2 * 5  # what happens outside of modules counts in the total
    assert (rows(found)[""].calls, rows(found)["layer"].calls) == (0, 1)


def test_lazy_parameters():
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyBatchNorm1d(), nn.Linear(4, 2))
    without = ft.summary(None, model)
    assert (without.parameters, without.flops) == (10, None)
    assert without.lazy["0.weight"] is None
    assert "0.weight: no shape yet" in repr(without)
    found = ft.summary(None, model, torch.ones(3, 7))
    assert (found.lazy["0.weight"], found.lazy["2.running_mean"]) == ((4, 7), (4,))
    assert found.flops == 2 * 3 * (7 * 4 + 4 * 2)
    assert "this batch gives it [4, 7]" in repr(found)
    assert rows(found)["0"].notes == ("lazy",)
    assert isinstance(model[0].weight, nn.parameter.UninitializedParameter)
    assert type(model[0]) is nn.LazyLinear


def test_the_model_and_everything_else_stay_as_they_were():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.LSTM(4, 4))
    model[2].eval()
    heard = []
    model[0].register_forward_hook(lambda module, args, out: heard.append(type(out)))
    state = state_of(model)
    kept, weights = state.copy(), {name: value.clone() for name, value in model.state_dict().items()}
    ids = [id(p) for p in (*model.parameters(), *model.buffers(), *model.modules())]
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    batch = torch.randn(3, 4)
    held = batch.clone()
    before = (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate())
    found = ft.summary(state, model, batch)
    assert rows(found)["2"].notes == ("in evaluation mode",)
    assert (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()) == before
    assert [id(p) for p in (*model.parameters(), *model.buffers(), *model.modules())] == ids
    assert [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert [m.training for m in model.modules()] == [True, True, True, False, True]
    assert not ft.diff(dict(model.state_dict()), weights)
    assert not ft.diff(state, kept)
    assert not ft.diff(batch, held)
    assert torch.Tensor not in heard, "the forward pass was computed"
    assert all(p.grad is None for p in model.parameters())


def test_depth_text_and_html():
    model = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)), nn.Linear(2, 2))
    assert [row.path for row in ft.summary(None, model, depth=0).rows] == [""]
    assert [row.path for row in ft.summary(None, model, depth=1).rows] == ["", "0", "1"]
    deep = ft.summary(None, model, depth=9)
    assert len(deep.rows) == 6
    text = repr(deep)
    assert "\n      0  Linear " in text
    assert "FLOP" not in text
    html = ft.summary(None, model, torch.ones(1, 2))._repr_html_()
    assert html.startswith("<table><tr><th>module</th>")
    assert "<td>[1, 2]</td>" in html
    assert "18 trainable" in html


def test_a_meta_model_and_a_meta_batch():
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(1000, 512), nn.Linear(512, 1000))
    found = ft.summary(state_of(model), model, torch.zeros(2, 8, dtype=torch.int64, device="meta"))
    assert found.parameters == 1000 * 512 * 2 + 1000
    assert found.flops == 2 * 16 * 512 * 1000


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        out = self.layer(x)
        return out if out.max() > 0 else -out  # HERE


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: ft.summary(None, Reads(), torch.ones(1, 2)),
            InspectError,
            r"the model reads the value(.|\n)*in forward(.|\n)*HERE",
        ),
        (lambda: ft.summary(nn.Linear(1, 1), torch.ones(1)), ModelError, "wants a module as its second argument"),
        (
            lambda: ft.summary(state_of(nn.Linear(2, 1)), nn.Linear(3, 1)),
            StructureError,
            r"where:    weight\n(.|\n)*\[1, 3\]",
        ),
        (lambda: ft.summary(state_of(nn.Linear(2, 1)), Tied()), StructureError, r"missing: embed\.weight"),
        (
            lambda: ft.summary(None, nn.Linear(2, 1), depth=-3),
            ft.errors.LimitError,
            r"depth=-3 makes(.|\n)*an integer >= 0\n +got: +-3\n +fix: +ft.summary\(state, model, depth=2\)",
        ),
        (lambda: ft.summary(None, nn.Linear(2, 1), depth=1.5), ArgumentError, "depth=1.5"),
        (lambda: ft.summary(None, nn.Linear(2, 1), fn=F.relu), ArgumentError, "no batch"),
        (lambda: ft.summary({}, nn.Linear(2, 1)), ft.errors.StateError, "ft.summary wants a TrainState"),
    ],
    ids=["reads", "no module", "shape", "names", "depth", "depth-kind", "fn", "state"],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x, y):
        return self.layer(x) + y


class Reshapes(nn.Module):
    def forward(self, x):
        return x.flatten(1)


@pytest.mark.parametrize(
    ("model", "batch", "fix"),
    [
        (nn.Linear(3, 1), {"y": torch.ones(2), "x": torch.ones(2, 3)}, 'model(batch["x"])'),
        (nn.Linear(3, 1), {"wave": torch.ones(2, 3)}, 'model(batch["wave"])'),
        (nn.Linear(3, 1), (torch.ones(2, 3), torch.ones(2)), "model(batch[0])"),
        (Reshapes(), [torch.ones(2, 3, 3)], "model(batch[0])"),
        (Two(), {"y": torch.ones(2, 1), "x": torch.ones(2, 3)}, "model(**batch)"),
        (Two(), (torch.ones(2, 3), torch.ones(2, 1)), "model(*batch)"),
    ],
    ids=["dict", "any name", "tuple", "attribute", "keywords", "positions"],
)
def test_a_batch_that_forward_does_not_take_shows_how_to_call_it(model, batch, fix):
    with pytest.raises(ArgumentError, match="the model does not take the batch as its one argument") as caught:
        ft.summary(None, model, batch)
    text = str(caught.value)
    assert f"fix:      ft.summary(state, model, batch, fn=lambda model, batch: {fix})" in text
    assert f"{type(model).__name__}.forward(" in text
    assert "model(batch), with" in text
    assert next(f"{path}: float32[" for path, _ in ft.tree.items(batch, "batch")) in text
    assert isinstance(caught.value.__cause__, (TypeError, AttributeError))
    call = eval(f"lambda model, batch: {fix}")  # what is shown works
    assert ft.summary(None, model, batch, fn=call).rows[0].calls == 1


def test_a_forward_of_two_arguments_and_one_tensor():
    with pytest.raises(ArgumentError, match=r"Two.forward\(x, y\)(.|\n)*missing 1 required(.|\n)*fn=lambda"):
        ft.summary(None, Two(), torch.ones(2, 3))


class TakesDict(nn.Module):
    def forward(self, batch):
        return batch["x"] @ 3.0


def test_an_error_inside_of_a_forward_that_takes_the_batch_stays_as_it_is():
    with pytest.raises(TypeError) as caught:
        ft.summary(None, TakesDict(), {"x": torch.ones(2, 3)})
    assert not isinstance(caught.value, ArgumentError)
    assert "in the model (TakesDict), at " in caught.value.__notes__[0]
    assert "batch['x']: float32[2, 3]" in caught.value.__notes__[0]


def test_wrong_shapes_are_told_with_the_module_and_the_batch():
    model = nn.Sequential(nn.Linear(8, 4), nn.Sequential(nn.ReLU(), nn.Linear(5, 1)))
    with pytest.raises(RuntimeError) as caught:
        ft.summary(None, model, torch.ones(2, 8))
    (note,) = caught.value.__notes__
    assert note == "ftrain: raised in ft.summary, in the module '1.1' (Linear)\n  batch: float32[2, 8]"
