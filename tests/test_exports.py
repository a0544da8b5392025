"""Parameters to and from safetensors and torch's state dicts: plain torch reads what is written, and every bit comes back."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import stat
import struct
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import ftrain as ft
from ftrain.checkpoint import from_safetensors, from_torch, to_safetensors, to_torch
from ftrain.checkpoint.safefile import DTYPES
from ftrain.checkpoint.store import Store
from ftrain.errors import (
    ArgumentError,
    CheckpointError,
    DonatedStateError,
    RestoreError,
    RestoreWarning,
    StateError,
    StructureError,
)

from .corpus import Conv, Frozen, Gpt, Lstm

# ------------------------------------------------------------------------------------------------------------- the corpus


class Buffers(nn.Module):
    """Buffers of every sort: saved and not, tied, of integers, bools, without dimensions, empty."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("cache", torch.randn(5), persistent=False)
        self.register_buffer("again", self.mask)


class Twice(nn.Module):
    """A module used under two names, and a matrix tied to another of a name that comes earlier in the alphabet."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.two = self.one
        self.embed = nn.Linear(3, 3, bias=False)
        self.decode = nn.Linear(3, 3, bias=False)
        self.decode.weight = self.embed.weight


class Extra(nn.Module):
    """Extra state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.note: Any = {"version": 3, "names": ["a", "b"]}

    def get_extra_state(self) -> Any:
        return self.note

    def set_extra_state(self, state: Any) -> None:
        self.note = state


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 2),
    "conv": Conv,
    "gpt": Gpt,
    "lstm": Lstm,
    "frozen": Frozen,
    "buffers": Buffers,
    "twice": Twice,
    "extra": Extra,
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
    "bf16": lambda: nn.Linear(3, 2).bfloat16(),
    "one_parameter": lambda: nn.ParameterList([torch.zeros(())]),
}
NAMES_OF_THEIR_OWN = {
    "buffers",
    "gpt",
    "twice",
    "extra",
}  # without model=, plain torch wants other names than the state's


def bits(tensor: Tensor) -> bytes:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def same(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape, bits(a)) == (b.dtype, b.shape, bits(b))


def everything(state: ft.TrainState) -> dict[str, Tensor]:
    return {**state.params, **state.frozen, **state.buffers}


def trained(model: nn.Module, seed: int = 1) -> ft.TrainState:
    """A state of this model whose numbers are not the model's, NaN among them."""
    state = ft.init(model, ft.optim.adam(0.1))
    generator = torch.Generator().manual_seed(seed)

    def other(leaf: Tensor) -> Tensor:
        raw = torch.randint(0, 256, (leaf.numel() * leaf.element_size(),), generator=generator, dtype=torch.uint8)
        return (raw % 2 if leaf.dtype == torch.bool else raw).view(leaf.dtype).reshape(leaf.shape)

    return state.replace(
        params={k: other(v) for k, v in state.params.items()},
        frozen={k: other(v) for k, v in state.frozen.items()},
        buffers={k: other(v) for k, v in state.buffers.items()},
    )


def of(**tensors: Tensor) -> ft.TrainState:
    """A state with these parameters."""
    return ft.init(nn.Linear(1, 1), ft.optim.sgd(0.1)).replace(params=tensors)


Export = Callable[..., None]
Import = Callable[..., ft.TrainState]
BOTH = pytest.mark.parametrize(
    ("export", "restore"), [(to_safetensors, from_safetensors), (to_torch, from_torch)], ids=["safetensors", "torch"]
)


# --------------------------------------------------------------------------------------------------- plain torch reads it


@pytest.mark.parametrize("name", MODELS)
def test_load_state_dict_takes_it_strictly(tmp_path, name, rng_guard):
    model = MODELS[name]()
    state = trained(model)
    before = {key: one for key, one in model.state_dict().items() if isinstance(one, Tensor)}
    numbers = {key: bits(one) for key, one in before.items()}
    with rng_guard():
        to_torch(tmp_path / "m.pt", state, model=model)
    assert numbers == {key: bits(one) for key, one in before.items()}  # the user's module is as it was
    fresh = MODELS[name]()
    loaded = torch.load(tmp_path / "m.pt", weights_only=True)
    assert list(loaded) == list(model.state_dict())
    assert loaded._metadata == model.state_dict()._metadata
    assert str(fresh.load_state_dict(loaded, strict=True)) == "<All keys matched successfully>"
    now, saved = dict(fresh.named_parameters()) | dict(fresh.named_buffers()), fresh.state_dict()
    for key, leaf in everything(state).items():
        assert same(now[key], leaf) == (key in saved), key


@pytest.mark.parametrize("name", [name for name in MODELS if name != "extra"])
def test_load_model_of_safetensors_takes_it_strictly(tmp_path, name):
    model = MODELS[name]()
    state = trained(model)
    to_safetensors(tmp_path / "m.safetensors", state, model=model, metadata={"note": "ours"})
    fresh = MODELS[name]()
    assert safetensors.torch.load_model(fresh, tmp_path / "m.safetensors", strict=True) == (set(), [])
    now, saved = dict(fresh.named_parameters()) | dict(fresh.named_buffers()), fresh.state_dict()
    for key, leaf in everything(state).items():
        assert same(now[key], leaf) == (key in saved), key
    # It is what safetensors' own save_model writes of that module.
    safetensors.torch.save_model(ft.to_module(model, state), tmp_path / "theirs", metadata={"note": "ours"})
    ours, theirs = (safetensors.safe_open(tmp_path / file, "pt") for file in ("m.safetensors", "theirs"))
    assert ours.metadata() == theirs.metadata()
    assert set(ours.keys()) == set(theirs.keys())
    assert all(same(ours.get_tensor(key), theirs.get_tensor(key)) for key in theirs.keys())  # noqa: SIM118


@BOTH
@pytest.mark.parametrize("name", MODELS)
def test_it_comes_back_bit_for_bit(tmp_path, export, restore, name):
    model = MODELS[name]()
    state = trained(model)
    if name == "extra" and export is to_safetensors:
        with pytest.raises(CheckpointError, match=r"(?s)an entry that is no tensor.*_extra_state.*dict.*to_torch"):
            export(tmp_path / "m", state, model=model)
        return
    for kept in (None, model):
        export(tmp_path / "m", state, model=kept)
        like = trained(model, seed=2)
        back = restore(tmp_path / "m", like, model=kept)
        saved = model.state_dict()
        for key, leaf in everything(back).items():
            written = kept is None or key in saved
            assert same(leaf, everything(state if written else like)[key]), key
        assert back.opt is like.opt
        assert back.params.keys() == like.params.keys()
        assert back.frozen.keys() == like.frozen.keys()
        assert ft.tree.same_structure(back, like)


@BOTH
@pytest.mark.parametrize("name", ["gpt", "twice"])
def test_ties_are_understood_without_the_module(tmp_path, export, restore, name):
    """In a file that was written with it: torch's tensors share memory, safetensors' metadata says what was dropped."""
    model = MODELS[name]()
    state = trained(model)
    export(tmp_path / "m", state, model=model)
    back = restore(tmp_path / "m", trained(model, seed=2))
    assert all(same(leaf, state.params[key]) for key, leaf in back.params.items())


@pytest.mark.parametrize("name", sorted(set(MODELS) - NAMES_OF_THEIR_OWN))
def test_without_the_module_where_its_names_are_the_states(tmp_path, name):
    model = MODELS[name]()
    to_torch(tmp_path / "m.pt", trained(model))
    model.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True), strict=True)
    to_safetensors(tmp_path / "m.safetensors", trained(model))
    safetensors.torch.load_model(model, tmp_path / "m.safetensors", strict=True)


@BOTH
def test_what_plain_torch_wrote_is_read(tmp_path, export, restore):
    model = Gpt()
    if restore is from_torch:
        torch.save(model.state_dict(), tmp_path / "m")
    else:
        safetensors.torch.save_model(model, tmp_path / "m")
    for kept in (None, model):
        back = restore(tmp_path / "m", trained(model), model=kept)
        assert all(same(back.params[key], leaf) for key, leaf in model.named_parameters())


def test_a_file_of_an_old_torch(tmp_path):
    """Its format has no zip around it, so it cannot be mapped."""
    model = nn.Linear(3, 2)
    torch.save(model.state_dict(), tmp_path / "m", _use_new_zipfile_serialization=False)
    assert same(from_torch(tmp_path / "m", trained(model)).params["weight"], model.weight)


# -------------------------------------------------------------------------------------------------------------- the bits

RAW = torch.arange(256, dtype=torch.uint8)
SAMPLES: dict[str, Tensor] = {
    **{name: RAW.view(dtype) for name, dtype in DTYPES.items() if dtype != torch.bool},
    "BOOL": RAW % 2 == 1,
    "no_dimensions": torch.tensor(float("nan")),
    "no_dimensions_bf16": torch.tensor(1.5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "empty_int": torch.zeros(2, 0, dtype=torch.int64),
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "every_second": torch.arange(12)[::2],
    "expanded": torch.ones(1).expand(5),
    "conjugated": torch.complex(torch.ones(3), torch.arange(3.0)).conj(),
    "negated": torch.complex(torch.ones(3), torch.arange(3.0)).conj().imag,
    "nan_payload": torch.tensor([0x7FC12345, -1, 0x7F812345], dtype=torch.int32).view(torch.float32),
    "channels_last": torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
}


@BOTH
def test_every_dtype_and_layout_round_trips(tmp_path, export, restore):
    export(tmp_path / "m", of(**SAMPLES))
    back = restore(tmp_path / "m", of(**{name: torch.zeros_like(one.contiguous()) for name, one in SAMPLES.items()}))
    for name, one in SAMPLES.items():
        assert same(back.params[name], one), name
    read = (
        safetensors.torch.load_file(tmp_path / "m")
        if export is to_safetensors
        else torch.load(tmp_path / "m", weights_only=True)
    )
    for name, one in SAMPLES.items():
        if one.dtype != torch.float8_e8m0fnu or export is to_torch:
            assert same(read[name], one), name


def test_a_safetensors_file_is_the_bytes_that_the_package_writes(tmp_path):
    tensors = {"b": torch.randn(3, 2), "a": torch.randn(()), 'é "quoted"': torch.zeros(0, 3), "c": torch.arange(3)}
    to_safetensors(tmp_path / "m", of(**tensors), metadata={"written by": "é"})
    assert (tmp_path / "m").read_bytes() == safetensors.torch.save(tensors, metadata={"written by": "é"})


def test_complex128_is_for_torch(tmp_path):
    state = of(w=torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(CheckpointError, match=r"(?s)has no such dtype.*w: complex128.*complex64.*to_torch"):
        to_safetensors(tmp_path / "m", state)
    assert os.listdir(tmp_path) == []
    to_torch(tmp_path / "m", state)
    assert same(from_torch(tmp_path / "m", state).params["w"], state.params["w"])


def test_tied_tensors_share_memory_in_a_file_of_torch(tmp_path):
    model = Gpt()
    to_torch(tmp_path / "m", trained(model), model=model)
    loaded = torch.load(tmp_path / "m", weights_only=True)
    assert loaded["head.weight"].data_ptr() == loaded["token.weight"].data_ptr()


def test_a_part_of_a_large_memory_is_not_written_as_a_whole(tmp_path):
    """torch.save writes the storage, whatever part of it the tensor is."""
    large = torch.zeros(1_000_000)
    to_torch(tmp_path / "m", of(a=large[:3], b=large[5:7]))
    assert (tmp_path / "m").stat().st_size < 10_000
    to_safetensors(tmp_path / "s", of(a=large[:3], b=large[5:7]))
    assert (tmp_path / "s").stat().st_size < 1000


@BOTH
def test_leaves_that_share_memory_by_chance_are_two(tmp_path, export, restore):
    one = torch.arange(4.0)
    export(tmp_path / "m", of(a=one, b=one))
    read = (
        safetensors.torch.load_file(tmp_path / "m")
        if export is to_safetensors
        else torch.load(tmp_path / "m", weights_only=True)
    )
    assert same(read["a"], one)
    assert same(read["b"], one)
    assert read["a"].data_ptr() != read["b"].data_ptr()


@BOTH
def test_averaged_parameters(tmp_path, export, restore):
    model, tx = Conv(), ft.optim.sgd(0.5)
    step = ft.with_ema(ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx), decay=0.5)
    state = step.init(ft.init(model, tx))
    for seed in range(3):
        state, _ = step(state, torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(seed)))
    export(tmp_path / "m", state, model=model, params="ema")
    back = restore(tmp_path / "m", state, model=model)
    averaged = ft.to_module(model, state, params="ema").state_dict()
    assert all(same(leaf, averaged[key]) for key, leaf in everything(back).items())
    assert not same(back.params["head.weight"], state.params["head.weight"])
    assert back.extra["ema"] is state.extra["ema"]
    with pytest.raises(StateError, match=r"(?s)no averaged parameters 'swa'.*one of: ema"):
        export(tmp_path / "m", state, params="swa")


def test_master_weights_follow_what_is_imported(tmp_path):
    """The optimizer's float32 copy of the parameters is not what the run goes on from."""
    model = nn.Linear(2, 2, bias=False).bfloat16()
    tx = ft.optim.master_weights(ft.optim.sgd(0.0))
    step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    state = ft.init(model, tx)
    torch.save({"weight": torch.full((2, 2), 3.0, dtype=torch.bfloat16)}, tmp_path / "m")
    new, _ = step(from_torch(tmp_path / "m", state), torch.ones(4, 2, dtype=torch.bfloat16))
    assert new.params["weight"].eq(3).all()


# ------------------------------------------------------------------------------------------------------- what does not fit


def _write(restore: Import, path: Path, tensors: dict[str, Any], **metadata: str) -> Path:
    if restore is from_torch:
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path, metadata=metadata or None)
    return path


@BOTH
def test_all_differences_are_listed_and_nothing_is_taken(tmp_path, export, restore):
    like = of(a=torch.zeros(2), b=torch.zeros(2, 3), c=torch.zeros(2), d=torch.zeros(1), e=torch.zeros(3))
    path = _write(
        restore,
        tmp_path / "m",
        {
            "b": torch.ones(3, 2),
            "c": torch.ones(2).double(),
            "d": torch.ones(1),
            "e": torch.ones(4).int(),
            "x": torch.ones(1),
        },
    )
    with pytest.raises(RestoreError) as caught:
        restore(path, like)
    text = str(caught.value)
    for line in (
        "6 differences",
        "missing in the checkpoint: a",
        "only in the checkpoint: x",
        "b: shape [3, 2] in the checkpoint, [2, 3] in like",
        "c: dtype float64 in the checkpoint, float32 in like",
        "e: shape [4] in the checkpoint, [3] in like",
        "e: dtype int32 in the checkpoint, float32 in like",
        "strict=False takes what fits",
        "cast=True converts dtypes",
        "model=model",
        str(path),
    ):
        assert line in text
    assert all(leaf.eq(0).all() for leaf in like.params.values())
    with pytest.warns(RestoreWarning, match=r"(?s)1 tensors of .* were taken.*missing in the checkpoint: a"):
        back = restore(path, like, strict=False)
    assert {key: bool(leaf.eq(1).all()) for key, leaf in back.params.items()} == {
        "a": False,
        "b": False,
        "c": False,
        "d": True,
        "e": False,
    }
    with pytest.warns(RestoreWarning, match="2 tensors"):
        back = restore(path, like, strict=False, cast=True)
    assert same(back.params["c"], torch.ones(2))


@BOTH
def test_that_nothing_fits_is_an_error_even_where_not_strict(tmp_path, export, restore):
    with pytest.raises(RestoreError, match="2 differences"):
        restore(_write(restore, tmp_path / "m", {"x": torch.ones(1)}), of(a=torch.zeros(1)), strict=False)


@BOTH
def test_a_complex_tensor_is_not_cast_to_a_real_one(tmp_path, export, restore):
    path = _write(restore, tmp_path / "m", {"w": torch.ones(2, dtype=torch.complex64)})
    with pytest.raises(RestoreError, match="dtype complex64 in the checkpoint, float32 in like"):
        restore(path, of(w=torch.zeros(2)), cast=True)


@BOTH
@pytest.mark.parametrize(
    "rename",
    [
        {"old.*": "new.*", "unused": None},
        lambda name: None if name == "unused" else name.replace("old.", "new."),
        {"old.fc.weight": "new.fc.weight", "old.fc.bias": "new.fc.bias", "un*": None},
    ],
    ids=["patterns", "function", "names"],
)
def test_rename(tmp_path, export, restore, rename):
    model = nn.ModuleDict({"new": nn.ModuleDict({"fc": nn.Linear(2, 2)})})
    stored = {"old.fc.weight": torch.ones(2, 2), "old.fc.bias": torch.full((2,), 2.0), "unused": torch.ones(1)}
    back = restore(_write(restore, tmp_path / "m", stored), trained(model), rename=rename)
    assert same(back.params["new.fc.weight"], stored["old.fc.weight"])
    assert same(back.params["new.fc.bias"], stored["old.fc.bias"])


@BOTH
def test_a_rename_that_matches_nothing(tmp_path, export, restore):
    path = _write(restore, tmp_path / "m", {"w": torch.ones(1)})
    with pytest.raises(RestoreError, match=r"rename= has the key 'encoder\.\*', which matches no leaf"):
        restore(path, of(w=torch.zeros(1)), rename={"encoder.*": "*"})


@BOTH
def test_tied_names_must_agree(tmp_path, export, restore):
    model = Gpt()
    like = trained(model)
    tensors = {
        key: one.clone() for key, one in model.state_dict().items()
    }  # in memory of their own: a file without ties
    back = restore(_write(restore, tmp_path / "m", tensors), like, model=model)
    assert same(back.params["token.weight"], model.token.weight)
    tensors["head.weight"][0, 0] += 1
    with pytest.raises(
        RestoreError,
        match=r"(?s)1 difference\..*token.weight and head.weight are one tensor in the model, and differ.*rename=",
    ):
        restore(_write(restore, tmp_path / "m", tensors), like, model=model)
    with pytest.raises(RestoreError, match="one tensor in the model, and differ"):  # which of the two, nobody can say
        restore(tmp_path / "m", like, model=model, strict=False)
    del tensors["token.weight"]  # the state's own name for it
    back = restore(_write(restore, tmp_path / "m", tensors), like, model=model)
    assert same(back.params["token.weight"], tensors["head.weight"])
    with pytest.raises(
        RestoreError, match=r"(?s)missing in the checkpoint: token.weight.*only in the checkpoint: head.weight"
    ):
        restore(tmp_path / "m", like)


@BOTH
def test_buffers_that_are_not_saved_are_missing_without_the_module(tmp_path, export, restore):
    model = Buffers()
    export(tmp_path / "m", trained(model), model=model)
    with pytest.raises(RestoreError, match=r"(?s)missing in the checkpoint: cache.*model=model"):
        restore(tmp_path / "m", trained(model))


@BOTH
def test_what_comes_back_has_memory_of_its_own(tmp_path, export, restore):
    like = of(w=torch.zeros(1000))
    export(tmp_path / "m", of(w=torch.ones(1000)))
    back = restore(tmp_path / "m", like)
    size = (tmp_path / "m").stat().st_size
    with (tmp_path / "m").open("r+b") as file:  # in place, under whatever is mapped
        file.write(b"\0" * size)
    assert back.params["w"].eq(1).all()
    assert not back.params["w"].requires_grad
    like.params["w"].add_(5)
    assert back.params["w"].eq(1).all()


# ----------------------------------------------------------------------------------------------- files of other kinds


def test_a_pickle_that_would_run_code_does_not(tmp_path):
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    for legacy in (False, True):
        torch.save({"weight": torch.ones(1), "evil": Evil()}, tmp_path / "m", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(
            CheckpointError, match=r"(?s)holds more than tensors and plain values, and none of it is run.*system"
        ) as caught:
            from_torch(tmp_path / "m", of(weight=torch.zeros(1)))
        assert not (tmp_path / "ran").exists()
        assert "weights_only" not in str(caught.value)  # torch's own text says how to run it
    torch.load(tmp_path / "m", weights_only=False)  # the file does what it is meant to
    assert (tmp_path / "ran").exists()


def test_a_module_that_was_pickled_whole(tmp_path):
    torch.save(nn.Linear(1, 1), tmp_path / "m")
    with pytest.raises(
        CheckpointError, match=r"(?s)none of it is run.*Linear.*torch\.save\(model\.state_dict\(\), path\)"
    ):
        from_torch(tmp_path / "m", of(weight=torch.zeros(1)))


def test_a_state_dict_inside_of_a_checkpoint(tmp_path):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    torch.save({"epoch": 3, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "m")
    assert same(from_torch(tmp_path / "m", trained(model), key="state_dict").params["weight"], model.weight)
    with pytest.raises(
        RestoreError, match=r"(?s)this is no state dict.*entries 'epoch', 'state_dict', 'optimizer'.*key='state_dict'"
    ):
        from_torch(tmp_path / "m", trained(model))
    with pytest.raises(RestoreError, match=r"(?s)no entry 'model'.*entries 'epoch', 'state_dict'"):
        from_torch(tmp_path / "m", trained(model), key="model")
    with pytest.raises(RestoreError, match=r"(?s)this is no state dict.*int"):
        from_torch(tmp_path / "m", trained(model), key="epoch")


def test_a_list_is_no_state_dict(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "m")
    with pytest.raises(RestoreError, match=r"(?s)this is no state dict.*got: +list"):
        from_torch(tmp_path / "m", of(weight=torch.zeros(1)))


def test_what_is_no_tensor_is_a_difference(tmp_path):
    torch.save({"weight": torch.ones(1), "note": "text"}, tmp_path / "m")
    with pytest.raises(RestoreError, match="only in the checkpoint: note"):
        from_torch(tmp_path / "m", of(weight=torch.zeros(1)))
    torch.save({"weight": torch.ones(1), "bias": torch.ones(1).to_sparse()}, tmp_path / "m")
    with pytest.raises(RestoreError, match="bias: dtype no dense tensor in the checkpoint, float32 in like"):
        from_torch(tmp_path / "m", of(weight=torch.zeros(1), bias=torch.zeros(1)))


@BOTH
def test_a_file_cut_short(tmp_path, export, restore):
    state = of(w=torch.ones(1000))
    export(tmp_path / "m", state)
    whole = (tmp_path / "m").read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "m").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="damaged") as caught:
            restore(tmp_path / "m", state)
        assert str(tmp_path / "m") in str(caught.value)


def test_a_safetensors_file_whose_header_lies(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}).encode()
    (tmp_path / "m").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(CheckpointError, match="no safetensors file, or a damaged one"):
        from_safetensors(tmp_path / "m", of(w=torch.zeros(1000)))


def test_the_other_format(tmp_path):
    state = of(w=torch.ones(3))
    to_torch(tmp_path / "t", state)
    to_safetensors(tmp_path / "s", state)
    with pytest.raises(CheckpointError, match="from_torch"):
        from_safetensors(tmp_path / "t", state)
    with pytest.raises(CheckpointError, match="from_safetensors"):
        from_torch(tmp_path / "s", state)


@BOTH
def test_no_file(tmp_path, export, restore):
    with pytest.raises(CheckpointError, match=r"(?s)there is no such file.*nowhere"):
        restore(tmp_path / "nowhere", of(w=torch.ones(3)))
    with pytest.raises(CheckpointError, match=r"(?s)there is no such file.*a folder.*ft\.restore"):
        restore(tmp_path, of(w=torch.ones(3)))


# ------------------------------------------------------------------------------------------------- as a whole or not at all


@contextmanager
def full_disk(size: int = 20_000) -> Iterator[None]:
    """Files can grow to this size only; what is more is an error of the system, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


@BOTH
def test_a_full_disk_leaves_the_old_file(tmp_path, export, restore):
    small, large = of(w=torch.ones(3)), of(w=torch.ones(100_000))
    export(tmp_path / "m", small)
    before = (tmp_path / "m").read_bytes()
    with (
        full_disk(),
        pytest.raises(CheckpointError, match=r"(?s)cannot be written.*OSError: File too large.*is as it was"),
    ):
        export(tmp_path / "m", large)
    assert (tmp_path / "m").read_bytes() == before
    assert os.listdir(tmp_path) == ["m"]
    export(tmp_path / "m", large)
    assert restore(tmp_path / "m", large).params["w"].numel() == 100_000


@BOTH
def test_a_read_only_folder(export, restore):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        export(path, of(w=torch.ones(3)))
        before = path.read_bytes()
        os.chmod(folder, 0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # the superuser may write anywhere
        try:
            with pytest.raises(CheckpointError, match=r"(?s)cannot be written.*PermissionError.*is as it was"):
                export(path, of(w=torch.zeros(3)))
        finally:
            os.seteuid(user)
            os.chmod(folder, 0o700)
        assert path.read_bytes() == before
        assert os.listdir(folder) == ["m"]


@BOTH
def test_an_interruption_leaves_the_old_file(tmp_path, export, restore, monkeypatch):
    export(tmp_path / "m", of(w=torch.ones(3)))
    before = (tmp_path / "m").read_bytes()

    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "m", of(w=torch.zeros(3)))
    assert (tmp_path / "m").read_bytes() == before
    assert os.listdir(tmp_path) == ["m"]


@BOTH
def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, export, restore, monkeypatch):
    happened: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda handle: (happened.append("sync " + stat.filemode(os.fstat(handle).st_mode)[0]), fsync(handle)),
    )
    monkeypatch.setattr(Path, "replace", lambda self, target: (happened.append("name"), replace(self, target)))
    export(tmp_path / "m", of(w=torch.ones(3)))
    assert happened == ["sync -", "name", "sync d"]


@BOTH
def test_links_and_rights_are_kept(tmp_path, export, restore):
    (tmp_path / "real").mkdir()
    export(tmp_path / "real" / "m", of(w=torch.ones(3)))
    os.chmod(tmp_path / "real" / "m", 0o640)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "m")
    export(tmp_path / "link", of(w=torch.zeros(3)))
    assert (tmp_path / "link").is_symlink()
    assert restore(tmp_path / "real" / "m", of(w=torch.ones(3))).params["w"].eq(0).all()
    assert (tmp_path / "real" / "m").stat().st_mode & 0o777 == 0o640


@BOTH
def test_a_new_file_has_the_rights_of_any_new_file(tmp_path, export, restore):
    export(tmp_path / "m", of(w=torch.ones(3)))
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "m").stat().st_mode == (tmp_path / "other").stat().st_mode


# ------------------------------------------------------------------------------------------------- from a checkpoint


@pytest.fixture
def run(tmp_path):
    """A folder of two checkpoints of a run with averages, its model, and its states by step."""
    model, tx = Conv(), ft.optim.adam(0.1)
    step = ft.with_ema(ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx), decay=0.5)
    state, states = step.init(ft.init(model, tx)), {}
    store = Store(tmp_path / "run", write=True)
    for number in range(1, 3):
        state, _ = step(state, torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(number)))
        states[number] = state
        store.save(number, state, {}, block=True)
    store.close()
    return tmp_path / "run", model, states


@pytest.mark.parametrize("params", [None, "ema"])
def test_a_checkpoint_exports_as_its_state_does(tmp_path, run, params, monkeypatch):
    folder, model, states = run
    monkeypatch.setattr("ftrain.checkpoint.streaming.AT_ONCE", 100)  # bytes, so that it takes several turns
    for kept in (None, model):
        to_safetensors(tmp_path / "state", states[2], model=kept, params=params)
        to_safetensors(tmp_path / "checkpoint", folder, model=kept, params=params)
        assert (tmp_path / "checkpoint").read_bytes() == (tmp_path / "state").read_bytes()
    to_safetensors(tmp_path / "state", states[1], params=params)
    to_safetensors(tmp_path / "checkpoint", str(folder), step=1, params=params)
    assert (tmp_path / "checkpoint").read_bytes() == (tmp_path / "state").read_bytes()


def assert_same_files(one, two):
    """Both hold the same state dict: names, numbers, what shares memory, versions of modules, and size."""
    ours, theirs = (torch.load(path, weights_only=True) for path in (one, two))
    assert ours.keys() == theirs.keys()
    assert getattr(ours, "_metadata", None) == getattr(theirs, "_metadata", None)
    for name, leaf in ours.items():
        assert same(leaf, theirs[name]) if isinstance(leaf, torch.Tensor) else leaf == theirs[name], name
    memory = [
        {leaf.untyped_storage().data_ptr() for leaf in found.values() if hasattr(leaf, "shape")}
        for found in (ours, theirs)
    ]
    assert len(memory[0]) == len(memory[1])


@pytest.mark.parametrize("params", [None, "ema"])
def test_a_checkpoint_exports_to_torch_as_its_state_does(tmp_path, run, params):
    folder, model, states = run
    for kept in (None, model):
        to_torch(tmp_path / "state", states[2], model=kept, params=params)
        to_torch(tmp_path / "checkpoint", folder, model=kept, params=params)
        assert_same_files(tmp_path / "checkpoint", tmp_path / "state")
    to_torch(tmp_path / "state", states[1], model=model, params=params)
    assert not same(
        *(torch.load(tmp_path / one, weights_only=True)["body.0.weight"] for one in ("state", "checkpoint"))
    )
    to_torch(tmp_path / "checkpoint", str(folder), step=1, model=model, params=params)
    assert_same_files(tmp_path / "checkpoint", tmp_path / "state")
    with pytest.raises(
        CheckpointError, match=r"(?s)to_torch: there is no checkpoint of step 5.*'latest', or one of 1, 2"
    ):
        to_torch(tmp_path / "m", folder, step=5)
    with pytest.raises(ArgumentError, match=r"(?s)to_torch: step= is about a folder.*a state, and step=1"):
        to_torch(tmp_path / "m", states[1], step=1)


@pytest.mark.parametrize("make", [Gpt, Buffers, Twice, Frozen, Extra], ids=lambda make: make.__name__)
def test_a_checkpoint_of_any_model_exports_to_torch(tmp_path, make):
    model = make()
    state = trained(model)
    with Store(tmp_path / "run", write=True) as store:
        store.save(7, state, {}, block=True)
    before = {name: leaf.clone() for name, leaf in itertools.chain(model.named_parameters(), model.named_buffers())}
    to_torch(tmp_path / "state", state, model=model)
    to_torch(tmp_path / "checkpoint", tmp_path / "run", model=model)
    assert_same_files(tmp_path / "checkpoint", tmp_path / "state")
    fresh = make()
    fresh.load_state_dict(torch.load(tmp_path / "checkpoint", weights_only=True))
    assert all(
        same(leaf, before[name]) for name, leaf in itertools.chain(model.named_parameters(), model.named_buffers())
    )


@pytest.mark.parametrize("make", [Gpt, Buffers, Twice, Frozen], ids=lambda make: make.__name__)
def test_a_checkpoint_of_a_model_with_ties(tmp_path, make):
    model = make()
    state = trained(model)
    store = Store(tmp_path / "run", write=True)
    store.save(7, state, {}, block=True)
    store.close()
    with torch.device("meta"):
        hollow = make()
    for kept in (None, model, hollow):  # its numbers are not asked for
        to_safetensors(tmp_path / "checkpoint", tmp_path / "run", model=kept)
        to_safetensors(tmp_path / "state", state, model=model if kept is not None else None)
        ours, theirs = (safetensors.safe_open(tmp_path / file, "pt") for file in ("checkpoint", "state"))
        assert ours.metadata() == theirs.metadata()
        assert (tmp_path / "checkpoint").stat().st_size == (tmp_path / "state").stat().st_size
        assert all(same(ours.get_tensor(key), theirs.get_tensor(key)) for key in theirs.keys())  # noqa: SIM118


def test_a_checkpoint_that_is_not_there(tmp_path, run):
    folder, _, _ = run
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint of step 5.*'latest', or one of 1, 2"):
        to_safetensors(tmp_path / "m", folder, step=5)
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoints.*no such folder"):
        to_safetensors(tmp_path / "m", tmp_path / "nowhere")
    with pytest.raises(StateError, match=r"(?s)no averaged parameters 'swa'.*ema"):
        to_safetensors(tmp_path / "m", folder, params="swa")
    with pytest.raises(StructureError, match=r"(?s)not of the model Linear.*body"):
        to_safetensors(tmp_path / "m", folder, model=nn.Linear(1, 1))
    assert not (tmp_path / "m").exists()


def test_a_checkpoint_of_something_else(tmp_path):
    store = Store(tmp_path / "run", write=True)
    store.save(1, {"w": torch.ones(2)}, {}, block=True)
    store.close()
    with pytest.raises(CheckpointError, match=r"(?s)does not hold a TrainState.*got: +w"):
        to_safetensors(tmp_path / "m", tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------- bad input


@BOTH
def test_bad_arguments(tmp_path, export, restore):
    state = of(w=torch.ones(3))
    with pytest.raises(CheckpointError, match=r"(?s)there is no such folder.*nowhere.*os\.makedirs"):
        export(tmp_path / "nowhere" / "m", state)
    with pytest.raises(CheckpointError, match="a folder is no file to write to"):
        export(tmp_path, state)
    with pytest.raises(StateError, match=r"ft\.checkpoint\.to_\w+ wants a TrainState"):
        export(tmp_path / "m", {"w": torch.ones(3)})
    with pytest.raises(ArgumentError, match=r"(?s)model= is the module.*got: +dict"):
        export(tmp_path / "m", state, model={})
    with pytest.raises(StructureError, match="does not belong to the model Linear"):
        export(tmp_path / "m", state, model=nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match=r"(?s)cannot be exported.*w\n.*sparse_coo"):
        export(tmp_path / "m", of(w=torch.ones(3).to_sparse()))
    with pytest.raises(CheckpointError, match=r"(?s)cannot be exported.*on meta"):
        export(tmp_path / "m", of(w=torch.ones(3, device="meta")))
    export(tmp_path / "m", state)
    with pytest.raises(StateError, match=r"ft\.checkpoint\.from_\w+ wants a TrainState"):
        restore(tmp_path / "m", {"w": torch.ones(3)})
    with pytest.raises(ArgumentError, match="model= is the module"):
        restore(tmp_path / "m", state, model=3)
    with pytest.raises(RestoreError, match="on the meta device"):
        restore(tmp_path / "m", ft.init(nn.Linear(1, 1), ft.optim.sgd(0.1), device="meta"))


def test_bad_arguments_of_safetensors_alone(tmp_path):
    state = of(w=torch.ones(3))
    with pytest.raises(ArgumentError, match=r"(?s)metadata\['epoch'\].*3.*json\.dumps"):
        to_safetensors(tmp_path / "m", state, metadata={"epoch": 3})
    with pytest.raises(ArgumentError, match=r"(?s)step= is about a folder of checkpoints.*step=3"):
        to_safetensors(tmp_path / "m", state, step=3)
    with pytest.raises(CheckpointError, match="reserves the name '__metadata__'"):
        to_safetensors(tmp_path / "m", of(__metadata__=torch.ones(1)))
    assert os.listdir(tmp_path) == []


def test_extra_state_that_could_not_be_read_back(tmp_path):
    model = Extra()
    model.note = {"names": [object()]}
    with pytest.raises(CheckpointError, match=r"(?s)would refuse.*_extra_state\['names'\]\[0\].*object"):
        to_torch(tmp_path / "m", trained(model), model=model)
    model.note = OrderedDict(a=(1, 2.5, None, True, "x", torch.ones(2)))
    to_torch(tmp_path / "m", trained(model), model=model)
    assert torch.load(tmp_path / "m", weights_only=True)["_extra_state"]["a"][:5] == (1, 2.5, None, True, "x")


@BOTH
def test_a_donated_state(tmp_path, export, restore):
    model, tx = nn.Linear(2, 1), ft.optim.sgd(0.1)
    step = ft.compile(ft.train_step(model, lambda model, batch: model(batch).mean(), tx), donate=True, backend="eager")
    old = ft.init(model, tx)
    new, _ = step(old, torch.ones(3, 2))
    with pytest.raises(DonatedStateError):
        export(tmp_path / "m", old)
    export(tmp_path / "m", new)
    with pytest.raises(DonatedStateError):
        restore(tmp_path / "m", old)


def test_no_warning_where_all_fits(tmp_path):
    to_torch(tmp_path / "m", of(w=torch.ones(3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_torch(tmp_path / "m", of(w=torch.ones(3)), strict=False)
