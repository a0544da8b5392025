"""`ft.save`, `ft.restore`, what differs, plain trees, and the format on the disk."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import warnings
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import nn

import ftrain as ft
from ftrain.checkpoint import Report, compare, plain, record
from ftrain.checkpoint.store import Store
from ftrain.errors import CheckpointError, DonatedStateError, LimitError, RestoreError, RestoreWarning


def bits(leaf):
    """The bytes of a tensor's numbers."""
    return leaf.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if leaf.numel() else b""


def same(a, b):
    """Bitwise equal trees of one structure."""
    pairs = zip(ft.tree.leaves(a), ft.tree.leaves(b), strict=True)
    return ft.tree.same_structure(a, b) and all(x.dtype == y.dtype and bits(x) == bits(y) for x, y in pairs)


def make_state(seed=0, tx=None, width=5):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    return ft.init(model, tx or ft.optim.adamw(1e-2), seed=seed)


def trained(seed=0):
    """A state that has moved: an optimizer's moments, statistics, counters."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    tx = ft.optim.adamw(1e-2)
    step = ft.with_ema(ft.train_step(model, lambda m, batch: m(batch).square().mean(), tx), 0.9)
    data = [torch.randn(8, 4) for _ in range(3)]
    return ft.fit(ft.init(model, tx, seed=seed), step, data, epochs=1, compile=False, progress=False).state


# ------------------------------------------------------------------------------------------------------ save and restore


def test_a_state_comes_back_bitwise_and_the_given_one_is_untouched(tmp_path):
    state = trained()
    like = trained(seed=1)
    before = like.copy()
    ft.save(tmp_path, state)
    got = ft.restore(tmp_path, like=like)
    assert same(got, state)
    assert same(like, before)
    assert got.counters() == state.counters()
    assert type(got.opt) is type(state.opt)
    assert not {leaf.data_ptr() for leaf in ft.tree.leaves(got)} & {leaf.data_ptr() for leaf in ft.tree.leaves(like)}


def test_like_may_lie_on_meta_then_the_result_lies_on_the_cpu(tmp_path):
    state = trained()
    ft.save(tmp_path, state)
    like = ft.tree.map(lambda leaf: torch.empty_like(leaf, device="meta"), state)
    got = ft.restore(tmp_path, like=like)
    assert same(got, state)
    assert got.device.type == "cpu"
    assert got.counters() == state.counters()


def test_a_restored_state_trains_on_as_the_saved_one(tmp_path):
    model, tx = nn.Linear(3, 1), ft.optim.adam(1e-2)
    step = ft.train_step(model, lambda m, batch: m(batch).square().mean(), tx)
    batches = [torch.randn(4, 3) for _ in range(4)]
    state = ft.init(model, tx)
    for batch in batches[:2]:
        state, _ = step(state, batch)
    ft.save(tmp_path, state)
    got = ft.restore(tmp_path, like=ft.init(model, tx, seed=5))
    for batch in batches[2:]:
        state, _ = step(state, batch)
        got, _ = step(got, batch)
    assert same(got, state)


def test_memory_layout_parameters_and_gradients_are_those_of_like(tmp_path):
    tree = {"w": torch.randn(2, 3, 4, 5), "p": torch.randn(3), "g": torch.randn(3)}
    like = {
        "w": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "p": nn.Parameter(torch.zeros(3), requires_grad=False),
        "g": torch.zeros(3, requires_grad=True),
    }
    ft.save(tmp_path, tree)
    got = ft.restore(tmp_path, like=like)
    assert all(torch.equal(got[name], tree[name]) for name in tree)
    assert got["w"].stride() == like["w"].stride() != tree["w"].stride()
    assert isinstance(got["p"], nn.Parameter)
    assert not got["p"].requires_grad
    assert got["g"].requires_grad


def test_a_donated_state_can_neither_be_saved_nor_be_a_template(tmp_path):
    model, tx = nn.Linear(3, 1), ft.optim.sgd(0.1)
    step = ft.compile(ft.train_step(model, lambda m, batch: m(batch).square().mean(), tx), backend="eager")
    state = ft.init(model, tx)
    ft.save(tmp_path, state)
    step(state, torch.randn(4, 3))
    with pytest.raises(DonatedStateError, match=r"ft\.save"):
        ft.save(tmp_path, state)
    with pytest.raises(DonatedStateError, match=r"ft\.restore"):
        ft.restore(tmp_path, like=state)
    with pytest.raises(DonatedStateError, match=r"ft\.checkpoint\.compare"):
        compare(tmp_path, like=state)


def test_save_takes_the_step_of_the_state(tmp_path):
    state = trained()
    ft.save(tmp_path, state)
    ft.save(tmp_path, state, step=9)
    ft.save(tmp_path / "tree", {"w": torch.ones(1)})
    with Store(tmp_path, write=False) as store:
        assert store.saved == [3, 9]
    with Store(tmp_path / "tree", write=False) as store:
        assert store.saved == [0]
    with pytest.raises(CheckpointError, match="checkpoint of step 3 already"):
        ft.save(tmp_path, state)


def test_config_and_metrics_are_kept(tmp_path):
    ft.save(tmp_path, {"w": torch.ones(1)}, metrics={"loss": math.inf}, config={"lr": 1e-3, "sizes": (1, 2)})
    with Store(tmp_path, write=False) as store:
        document = store.document(0)
    assert document["metrics"] == {"loss": math.inf}
    assert document["config"] == {"lr": 1e-3, "sizes": (1, 2)}
    for bad in ({"loss": torch.ones(())}, {"loss": "0.1"}, {3: 1.0}):
        with pytest.raises(CheckpointError, match=r"metrics= wants numbers by name[\s\S]*metrics\["):
            ft.save(tmp_path, {}, step=1, metrics=bad)


# ------------------------------------------------------------------------------------------------------------ which step


@pytest.fixture
def steps(tmp_path):
    """Steps 1 to 5, each with its number as the parameter."""
    losses = {1: 0.5, 2: math.nan, 3: 0.1, 4: 0.1, 5: 0.3}
    for step, loss in losses.items():
        accuracy = {"accuracy": step / 10} if step % 2 else {}
        ft.save(tmp_path, {"w": torch.tensor(step)}, step=step, metrics={"val/loss": loss, **accuracy})
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 5),
        ({"step": "latest"}, 5),
        ({"step": 2}, 2),
        ({"step": "best", "by": "val/loss"}, 4),
        ({"step": "best", "by": "val/loss", "mode": "max"}, 1),
        ({"step": "best", "by": "accuracy", "mode": "max"}, 5),
    ],
)
def test_which_step_is_restored(steps, given, expected):
    like = {"w": torch.tensor(0)}
    assert ft.restore(steps, like=like, **given)["w"] == expected
    assert compare(steps, like=like, **given).step == expected


def test_steps_that_make_no_sense_are_errors(steps, tmp_path):
    like = {"w": torch.tensor(0)}
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7[\s\S]*one of 1, 2, 3, 4, 5"):
        ft.restore(steps, like=like, step=7)
    with pytest.raises(RestoreError, match=r'by which metric\?[\s\S]*one of: accuracy, val/loss[\s\S]*by="accuracy"'):
        ft.restore(steps, like=like, step="best")
    with pytest.raises(LimitError, match=r"'val/los' never appears[\s\S]*val/loss"):
        ft.restore(steps, like=like, step="best", by="val/los")
    with pytest.raises(LimitError, match="mode='least' is unknown"):
        ft.restore(steps, like=like, step="best", by="val/loss", mode="least")
    with pytest.raises(RestoreError, match=r'go with step="best"'):
        ft.restore(steps, like=like, by="val/loss")
    with pytest.raises(RestoreError, match=r'go with step="best"'):
        ft.restore(steps, like=like, mode="max")
    for bad in ("newest", 1.0, True, None):
        with pytest.raises(RestoreError, match="is no step"):
            ft.restore(steps, like=like, step=bad)
    for call in (ft.restore, ft.checkpoint.compare):
        with pytest.raises(CheckpointError, match=r"there are no checkpoints[\s\S]*got: +no such folder"):
            call(tmp_path / "nowhere", like=like)


def test_the_folder_of_a_step_is_told_from_that_of_the_checkpoints(tmp_path):
    like = {"w": torch.ones(2)}
    ft.save(tmp_path / "run", like, step=5, position=ft.Position(0))
    text = rf'this is the checkpoint itself[\s\S]*ft\.restore\("{re.escape(str(tmp_path))}/run", step=5, like='
    path = tmp_path / "run" / "5"
    for call in (
        lambda: ft.restore(path, like=like),
        lambda: ft.restore(path, like=like, step=5),
        lambda: ft.restore(path, like=like, step="best"),
        lambda: ft.checkpoint.compare(path, like=like),
        lambda: ft.checkpoint.position(path),
        lambda: ft.checkpoint.info(path),
        lambda: ft.checkpoint.to_safetensors(tmp_path / "m", path),
    ):
        with pytest.raises(CheckpointError, match=text):
            call()
    (tmp_path / "8").mkdir()  # called like a step, and no checkpoint
    with pytest.raises(CheckpointError, match=r"there are no checkpoints"):
        ft.restore(tmp_path / "8", like=like)


def test_the_only_metric_needs_no_name(tmp_path):
    for step, loss in ((1, 0.1), (2, 0.2)):
        ft.save(tmp_path, {"w": torch.tensor(step)}, step=step, metrics={"loss": loss})
    assert ft.restore(tmp_path, like={"w": torch.tensor(0)}, step="best")["w"] == 1


def test_a_damaged_step_is_passed_over_by_latest_and_named_where_there_is_no_other(steps):
    (steps / "5" / "document" / "metadata").write_text("{")
    assert ft.restore(steps, like={"w": torch.tensor(0)})["w"] == 4
    for step in range(1, 5):
        (steps / str(step) / "document" / "metadata").write_text("{")
    with pytest.raises(CheckpointError, match="the checkpoints are damaged: steps 1; 2; 3; 4; 5"):
        ft.restore(steps, like={"w": torch.tensor(0)})


# ------------------------------------------------------------------------------------------------------ what is restored

WEIGHTS = {"encoder.0.w": 1.0, "encoder.1.w": 2.0, "head.w": 3.0}


def weights(offset=0.0, **names):
    return {name: torch.full((2,), value + offset) for name, value in (names or WEIGHTS).items()}


@pytest.fixture
def saved(tmp_path):
    """`{"params": ..., "opt": (..., 7), "step": 3}` of WEIGHTS."""
    ft.save(tmp_path, {"params": weights(), "opt": (weights(10), 7), "step": torch.tensor(3)})
    return tmp_path


def template():
    return {"params": weights(100), "opt": (weights(200), 0), "step": torch.tensor(0)}


def values(tree):
    return [float(leaf if isinstance(leaf, int) else leaf.reshape(-1)[0]) for leaf in ft.tree.leaves(tree)]


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (None, [11, 12, 13, 7, 1, 2, 3, 3]),
        ("params", [201, 202, 203, 0, 1, 2, 3, 0]),
        ("params/encoder.*", [201, 202, 203, 0, 1, 2, 103, 0]),
        (["*/head.w", "step"], [201, 202, 13, 0, 101, 102, 3, 3]),
        (lambda path: path.startswith("opt/"), [11, 12, 13, 7, 101, 102, 103, 0]),
        ("opt/0", [11, 12, 13, 0, 101, 102, 103, 0]),
    ],
)
def test_select_takes_some_leaves_and_the_rest_stay(saved, select, expected):
    like = template()
    got = ft.restore(saved, like=like, select=select)
    assert values(got) == expected
    report = compare(saved, like=like, select=select)
    assert report.fits
    assert len(report.taken) + len(report.kept) == 8
    if report.kept:
        kept = dict(zip(ft.checkpoint.paths.leaf_paths(like, "test"), ft.tree.leaves(like), strict=True))
        after = dict(zip(kept, ft.tree.leaves(got), strict=True))
        assert all(after[path] is kept[path] for path in report.kept)


def test_like_may_be_one_part_of_what_was_saved(saved):
    assert values(ft.restore(saved, like=weights(100), select="params")) == [1, 2, 3]
    assert values(ft.restore(saved, like=(weights(100), 0), select="opt")) == [11, 12, 13, 7]
    with pytest.raises(RestoreError, match=r"3 differences|only in the checkpoint: head\.w"):
        ft.restore(saved, like=weights(**{"encoder.0.w": 1.0, "encoder.1.w": 2.0}), select="params")


def test_a_pattern_that_matches_nothing_is_an_error(saved):
    for select in ("parms/*", ["params", "nothing"]):
        with pytest.raises(RestoreError, match=r"matches no leaf[\s\S]*opt/0/encoder\.0\.w"):
            ft.restore(saved, like=template(), select=select)
    with pytest.raises(RestoreError, match="select= holds 3"):
        ft.restore(saved, like=template(), select=[3])


@pytest.mark.parametrize(
    "rename",
    [
        {"params": "model", "opt": None, "step": None},
        {"params/encoder.*": "model/encoder.*", "params/head.w": "model/head.w", "opt/*": None, "step": None},
        lambda path: path.replace("params/", "model/") if path.startswith("params/") else None,
    ],
    ids=["subtree", "pattern", "function"],
)
def test_rename_says_what_leaves_are_called_in_like(saved, rename):
    got = ft.restore(saved, like={"model": weights(100)}, rename=rename)
    assert values(got) == [1, 2, 3]


def test_stars_of_a_rename_stand_in_order(saved):
    rename = {"params/*.*.w": "params/*/layer*/w*"}
    got = compare(saved, like={}, rename=rename)
    assert "params/encoder/layer1/w" in got.extra


def test_renames_that_make_no_sense_are_errors(saved):
    for rename, text in (
        ({"prams": "model"}, r"the key 'prams', which matches no leaf[\s\S]*params/head\.w"),
        ({"params/*": "params/w"}, r"two leaves one name[\s\S]*params/w[\s\S]*params/encoder"),
        (lambda path: 3, "rename= made 3 of"),
    ):
        with pytest.raises(RestoreError, match=text):
            ft.restore(saved, like=template(), rename=rename)


def different():
    """A tree that differs from the saved one in every way."""
    like = template()
    like["params"]["head.w"] = torch.zeros(3)
    like["params"]["encoder.0.w"] = torch.zeros(2, dtype=torch.float64)
    like["params"]["new"] = torch.zeros(1)
    like["opt"] = (like["opt"][0], torch.tensor(0))
    del like["step"]
    return like


def test_a_strict_restore_lists_all_differences_before_it_reads_a_byte(saved):
    import shutil

    shutil.rmtree(saved / "0" / "arrays")
    with pytest.raises(RestoreError) as caught:
        ft.restore(saved, like=different())
    text = str(caught.value)
    assert "5 differences" in text
    for line in (
        "missing in the checkpoint: params/new",
        "only in the checkpoint: step",
        "params/head.w: shape [2] in the checkpoint, [3] in like",
        "params/encoder.0.w: dtype float32 in the checkpoint, float64 in like",
        "opt/1: dtype int in the checkpoint, int64 in like",
    ):
        assert line in text
    report = compare(saved, like=different())  # which reads no array either
    assert not report.fits
    assert len(report.differences()) == 5


def test_what_fits_is_taken_where_that_is_allowed(saved):
    like = different()
    with pytest.warns(
        RestoreWarning, match=r"4 leaves taken, 1 missing, 1 extra, 1 of another shape, 2 of another dtype"
    ):
        got = ft.restore(saved, like=like, strict=False)
    assert values(got["opt"][0]) == [11, 12, 13]
    assert got["params"]["head.w"] is like["params"]["head.w"]
    assert got["params"]["encoder.1.w"].tolist() == [2, 2]
    reports = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ft.restore(saved, like=like, strict=False, report=reports.append)
        ft.restore(saved, like=template(), strict=False)  # nothing was left out
        ft.restore(saved, like=template(), report=reports.append)
    partial, whole = reports
    assert isinstance(partial, Report)
    assert partial.missing == ("params/new",)
    assert partial.extra == ("step",)
    assert partial.shapes == {"params/head.w": ("[2]", "[3]")}
    assert partial.dtypes.keys() == {"params/encoder.0.w", "opt/1"}
    assert len(partial.taken) == 4
    assert whole.fits
    assert str(whole) == f"checkpoint {saved}, step 0: 8 leaves taken"
    assert str(replace(whole, missing=("x",))).splitlines()[1] == "  missing in the checkpoint: x"


def test_another_dtype_is_converted_only_where_that_is_said(saved):
    like = {
        "params": ft.tree.map(lambda leaf: leaf.bfloat16(), weights(100)),
        "opt": template()["opt"],
        "step": torch.tensor(0),
    }
    with pytest.raises(RestoreError, match=r"dtype float32 in the checkpoint, bfloat16 in like[\s\S]*cast=True"):
        ft.restore(saved, like=like)
    got = ft.restore(saved, like=like, cast=True)
    assert got["params"]["head.w"].dtype == torch.bfloat16
    assert values(got["params"]) == [1, 2, 3]
    report = compare(saved, like=like, cast=True)
    assert len(report.cast) == 3
    assert "3 cast" in str(report)
    with pytest.raises(RestoreError, match="opt/1: dtype int in the checkpoint, int64 in like"):  # not a tensor
        ft.restore(saved, like={**like, "opt": (like["opt"][0], torch.tensor(0))}, cast=True)


def test_a_leaf_without_a_value_is_an_error(saved):
    like = {"params": weights(100), "more": torch.empty(2, device="meta")}
    with pytest.raises(RestoreError, match=r"no value in like, either[\s\S]*where:    more"):
        ft.restore(saved, like=like, select="params")


def test_another_optimizer_can_be_warm_started(tmp_path):
    state = trained()
    ft.save(tmp_path, state)
    other = make_state(seed=7, tx=ft.optim.sgd(0.1, momentum=0.9))
    with pytest.raises(RestoreError, match=r"only in the checkpoint: opt/"):
        ft.restore(tmp_path, like=other)
    got = ft.restore(tmp_path, like=other, select=["params", "buffers"])
    assert same(got.params, state.params)
    assert same(got.buffers, state.buffers)
    assert same(got.opt, other.opt)
    assert got.counters() == other.counters()
    with pytest.raises(RestoreError, match=r"params/0\.weight: shape \[5, 4\] in the checkpoint, \[6, 4\] in like"):
        ft.restore(tmp_path, like=make_state(width=6), select="params")


def test_paths_are_told_by_their_names(tmp_path):
    ft.save(tmp_path, trained())
    with Store(tmp_path, write=False) as store:
        paths = store.describe(3)
    assert {
        "params/0.weight",
        "buffers/1.running_mean",
        "step",
        "extra/ema/params/2.bias",
        "extra/ema/count",
    } <= paths.keys()
    assert paths["params/0.weight"] == ("float32", (5, 4))


# ------------------------------------------------------------------------------------------------------------ plain trees


def exact(a, b):
    """Equal in type, bits and order."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(exact(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(exact(x, y) for x, y in zip(a, b, strict=True))
    return bytes_of(a) == bytes_of(b)


def bytes_of(leaf):
    """What tells a leaf from others of its type."""
    if isinstance(leaf, torch.Tensor):
        return leaf.dtype, leaf.shape, bits(leaf)
    if isinstance(leaf, (np.ndarray, np.generic)):
        return leaf.dtype, leaf.shape, leaf.tobytes()
    if isinstance(leaf, complex):
        return struct.pack("dd", leaf.real, leaf.imag)
    return struct.pack("d", leaf) if isinstance(leaf, float) else leaf


TAGS = st.sampled_from(["~tuple", "~dict", "~int", "~tensor", "~", "~~", "plain", ""])
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(2**52, 2**90),
    st.floats(),
    st.complex_numbers(),
    st.text(),
    st.binary(max_size=9),
    st.builds(torch.tensor, st.lists(st.floats(width=32), max_size=3)),
    st.builds(lambda x: np.array(x, np.float64), st.lists(st.floats(), max_size=3)),
    st.builds(np.float32, st.floats(width=32)),
    st.builds(np.bool_, st.booleans()),
)
PLAIN = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=3), TAGS, st.integers()), inner, max_size=3),
    ),
    max_leaves=10,
)


@hypothesis.given(PLAIN)
def test_plain_trees_come_back_exactly(tree):
    encoded, arrays = plain.encode(tree)
    text = json.dumps(encoded, allow_nan=False)
    assert exact(plain.decode(json.loads(text), [array.clone() for array in arrays]), tree)


@pytest.mark.parametrize(
    "tree",
    [
        struct.unpack(">d", bytes.fromhex("7ff8dead00000001"))[0],
        -0.0,
        10**5000,
        -(2**53),
        {"~tuple": [1]},
        {"~tensor": 0, "x": 1},
        {"~dict": [["a", 1]]},
        {1: "int", "1": "text"},
        "\udcff",
        {"b": 1, "a": 2},
        torch.zeros(0, 3, dtype=torch.bfloat16),
        np.zeros((2, 0), np.int8),
        np.array(3.0),
    ],
    ids=lambda tree: type(tree).__name__,
)
def test_odd_plain_trees_come_back_exactly(tree):
    encoded, arrays = plain.encode(tree)
    assert exact(plain.decode(json.loads(json.dumps(encoded, allow_nan=False)), arrays), tree)


class Text(str):
    """A text of another class."""


@pytest.mark.parametrize(
    ("node", "text"),
    [
        (object(), r"where:    tree\['a'\]\[1\][\s\S]*got:      object"),
        (Text("x"), "got:      Text"),
        (torch.Size([1]), "got:      Size"),
        ({1.5: 2}, r"as a key[\s\S]*tree\['a'\]\[1\]\[1\.5\][\s\S]*float"),
        ({True: 2}, r"as a key[\s\S]*bool"),
        ({1, 2}, "got:      set"),
        (nn.Parameter(torch.ones(1)), "got:      Parameter"),
        (np.array(["a"]), "got:      ndarray of <U1"),
        (np.array([None]), "got:      ndarray of object"),
        (torch.eye(2).to_sparse(), "got:      Tensor of torch.float32, torch.sparse_coo"),
        (lambda: 3, "got:      function"),
    ],
)
def test_what_is_not_plain_is_refused_with_its_path(node, text):
    with pytest.raises(CheckpointError, match=text):
        plain.encode({"a": (0, node)})


def test_a_tree_in_itself_is_refused_but_one_that_stands_twice_is_not():
    loop = {"a": []}
    loop["a"].append(loop)
    with pytest.raises(CheckpointError, match=r"contains itself[\s\S]*tree\['a'\]\[0\]"):
        plain.encode(loop)
    twice = [1, 2]
    assert plain.decode(*plain.encode([twice, twice])) == [twice, twice]


def test_a_tag_of_a_newer_version_is_an_error():
    with pytest.raises(CheckpointError, match=r"the tag '~set', which is unknown[\s\S]*newer version"):
        plain.decode({"~set": []}, [])


# ----------------------------------------------------------------------------------------------------------- the format


def rewrite(path, change):
    """Change the record of a step, and its sum with it."""
    file = path / "document" / "metadata"
    found = json.loads(file.read_text())
    del found["check"]
    change(found)
    body = json.dumps(found, sort_keys=True).encode()
    file.write_text(json.dumps({**found, "check": hashlib.sha256(body).hexdigest()}))


def test_a_checkpoint_of_format_0_is_read(tmp_path):
    """Made by hand: its arrays are as ever, its record as format 0 had it."""
    tree = {"w": torch.arange(300000.0), "b": torch.ones(3), "e": torch.empty(0, 2), "n": 3}
    ft.save(tmp_path, tree, step=4)
    file = tmp_path / "4" / "document" / "metadata"
    old = {
        "format": 0,
        "step": 4,
        "folder": json.loads((tmp_path / "ftrain.json").read_text())["folder"],
        "versions": {"ftrain": "0.0"},
        "index": {
            "b": ["float32", [3], ["~packed", "float32"], 0],
            "e": ["float32", [0, 2]],
            "w": ["float32", [300000], ["w"]],
        },
        "plain": {},
        "document": {"note": "old"},
    }
    file.write_text(json.dumps(old))
    del tree["n"]
    got = ft.restore(tmp_path, like=tree)
    assert same(got, tree)
    with Store(tmp_path, write=False) as store:
        assert store.document(4) == {
            "note": "old",
            "format": 1,
            "step": 4,
            "folder": old["folder"],
            "versions": {"ftrain": "0.0"},
        }
    assert json.loads(file.read_text()) == old  # the file stays as it was


def test_there_is_a_way_from_every_format():
    assert record.MIGRATIONS.keys() == set(range(record.FORMAT))


def test_a_newer_format_is_an_error_that_says_what_to_do(tmp_path):
    ft.save(tmp_path, {"w": torch.ones(1)})
    rewrite(tmp_path / "0", lambda found: found.update(format=99))
    with pytest.raises(
        CheckpointError, match=r"format 99, which this version of ftrain does not know[\s\S]*pip install"
    ):
        ft.restore(tmp_path, like={"w": torch.ones(1)}, step=0)


def test_an_index_that_does_not_fit_the_arrays_is_an_error(tmp_path):
    """Orbax checks neither shape nor dtype of what it reads."""
    ft.save(tmp_path, {"w": torch.ones(300000), "b": torch.ones(4)})

    def shape(found):
        found["index"]["w"]["shape"] = [5000]

    def dtype(found):
        found["index"]["w"]["dtype"] = "int32"

    for change, like in ((shape, torch.ones(5000)), (dtype, torch.ones(300000, dtype=torch.int32))):
        rewrite(tmp_path / "0", change)
        with pytest.raises(
            CheckpointError, match=r"is damaged[\s\S]*the array w is float32\[300000\], but the index says"
        ):
            ft.restore(tmp_path, like={"w": like, "b": torch.ones(4)})
        rewrite(tmp_path / "0", lambda found: found["index"]["w"].update(shape=[300000], dtype="float32"))
