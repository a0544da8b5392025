"""The store of checkpoints: what is saved is what is read, whatever happens to the process, the disk or the files.

Each trap of Orbax that `ftrain/checkpoint/` dodges has a test here that fails where the trap is stepped into.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import nn

import ftrain as ft
from ftrain.checkpoint import engine, folder, handler
from ftrain.checkpoint.checksums import checksum
from ftrain.checkpoint.packing import SMALL, lay_out
from ftrain.checkpoint.paths import leaf_paths
from ftrain.checkpoint.store import Store
from ftrain.errors import CheckpointError

ENV = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"} | {"OMP_NUM_THREADS": "1"}


def child(code, *args, cwd, timeout=60, **env):
    """Run code in a new process; what it prints."""
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=cwd,
        env=ENV | env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout, run.stderr


def bits(leaf):
    """The bytes of a leaf's numbers."""
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf)
    whole = leaf.detach().resolve_conj().resolve_neg().contiguous()
    return whole.reshape(-1).view(torch.uint8).numpy().tobytes() if whole.numel() else b""


def same(a, b):
    """Bitwise equal trees of one structure."""
    one, two = ft.tree.leaves(a), ft.tree.leaves(b)
    return ft.tree.same_structure(a, b) and all(
        type(x) is type(y)
        and (not isinstance(x, torch.Tensor) or (x.dtype == y.dtype and x.shape == y.shape))
        and bits(x) == bits(y)
        for x, y in zip(one, two, strict=True)
    )


def samples():
    """A tensor of each dtype, with values that a conversion would change, and of each layout."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (64, 48), generator=generator).to(torch.uint8)
    names = "bfloat16 float16 uint16 int16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
    names += " float32 float64 int8 uint8 int32 uint32 int64 uint64 complex32 complex64 complex128 float4_e2m1fn_x2"
    made = {name: raw.clone().view(getattr(torch, name)) for name in names.split() if hasattr(torch, name)}
    made["bool"] = raw > 100
    made["nan"] = torch.tensor([0x7FC12345, 0x7F812345, -1], dtype=torch.int32).view(torch.float32)
    made["scalar"] = torch.tensor(3.14, dtype=torch.bfloat16)
    made["count"] = torch.tensor(2**53 + 1)
    made["transposed"] = torch.randn(6, 4, generator=generator).t()
    made["strided"] = torch.randn(10, generator=generator)[::2]
    made["conjugate"] = torch.complex(torch.ones(3), torch.ones(3)).conj()
    made["negative"] = torch.complex(torch.ones(3), torch.ones(3)).conj().imag
    made["empty"] = torch.empty(0, 3)
    made["empty bfloat16"] = torch.empty(4, 0, dtype=torch.bfloat16)
    return made


def large(leaf):
    """The same, large enough to be an array of its own."""
    if not leaf.numel():
        return leaf
    flat = leaf.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    whole = flat.repeat(-(-SMALL // flat.numel()) + 1)
    return whole.view(leaf.dtype).view(-1, 1 if leaf.ndim == 0 else leaf.shape[-1])


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "ckpt", write=True) as made:
        yield made


def meta(tree):
    return ft.tree.map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, tree)


# ------------------------------------------------------------------------------------------------- what is saved is read


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("size", ["packed", "arrays"])
def test_every_dtype_and_layout_comes_back_bitwise(store, size):
    tree = samples()
    if size == "arrays":
        tree = {name: large(leaf) for name, leaf in tree.items()}
    store.save(1, tree, {}, block=True)
    got, report = store.load(1, meta(tree))
    assert report.fits
    assert same(got, tree)
    layout = lay_out(tree.items(), "test")
    assert all(("at" in entry) == (size == "packed") for entry in layout.entries.values() if "array" in entry)


Point = namedtuple("Point", ["x", "y"])


def test_values_that_arrays_cannot_hold_come_back(store):
    tree = {
        "numbers": [3, 2**80, -0.0, 0.1 + 0.2, float("inf"), True, 1 + 2j],
        "texts": ("héllo", "\udcff", b"\x00\xff", ""),
        "nothing": None,
        "empty": {},
        "point": Point(torch.ones(2), None),
        7: torch.ones(1),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    store.save(1, tree, {}, block=True)
    got, _ = store.load(1, tree)
    assert same(got, tree)
    assert isinstance(got["point"], Point)
    assert isinstance(got["parameter"], nn.Parameter)
    assert got["nothing"] is None


def test_numpy_arrays_and_scalars_come_back(store):
    import ml_dtypes

    tree = {
        "array": np.arange(6).reshape(2, 3).T,
        "read only": np.broadcast_to(np.float32(1), (3,)),
        "scalar": np.float64(0.1),
        "flag": np.bool_(True),
        "half": np.arange(4).astype(ml_dtypes.bfloat16),
        "zero-dimensional": np.array(3.0),
        "empty": np.zeros((0, 2), np.int8),
    }
    store.save(1, tree, {}, block=True)
    got, _ = store.load(1, tree)
    for name, one in tree.items():
        assert type(got[name]) is type(one)
        assert got[name].dtype == one.dtype
        np.testing.assert_array_equal(got[name], one)


def test_a_tree_without_any_array_is_saved(store):
    store.save(1, {"n": 3, "e": torch.empty(0)}, {"note": "none"}, block=True)
    got, _ = store.load(1, {"n": 0, "e": torch.empty(0)})
    assert got["n"] == 3
    assert store.document(1)["note"] == "none"


def test_a_tree_that_is_one_tensor_is_saved(store):
    store.save(1, torch.arange(3), {}, block=True)
    assert store.load(1, torch.zeros(3, dtype=torch.int64))[0].tolist() == [0, 1, 2]


KEYS = st.one_of(
    st.sampled_from(["a", "b", "a.b", "a/b", "~", "~0", "#1", "1", "", "~packed", "~~1", "*"]),
    st.integers(-2, 3),
    st.text(max_size=3),
)
TREES = st.recursive(
    st.builds(lambda n: torch.tensor([n, n]), st.integers(-9, 9)),
    lambda inner: st.one_of(
        st.dictionaries(KEYS, inner, max_size=4), st.lists(inner, max_size=3), st.tuples(inner, inner)
    ),
    max_leaves=12,
)


@hypothesis.given(TREES)
def test_no_two_leaves_of_a_tree_have_one_path(tree):
    paths = leaf_paths(tree, "test")
    assert len(set(paths)) == len(paths)
    layout = lay_out(zip(paths, ft.tree.leaves(tree), strict=True), "test", small=0)
    names = [".".join(array.key) for array in layout.arrays]
    assert len(set(names)) == len(names)
    assert all(type(key) is str for array in layout.arrays for key in array.key)


def test_names_that_orbax_takes_for_one_are_two(store):
    """`{"a.b": x, "a": {"b": y}}`: Orbax joins keys with dots, and silently writes one over the other."""
    side = torch.ones(SMALL // 4)
    tree = {
        "a.b": side,
        "a": {"b": 2 * side, "c": 3 * side, "c/d": 4 * side},
        "1": 5 * side,
        1: 6 * side,
        "~packed": {"float32": side},
    }
    store.save(1, tree, {}, block=True)
    assert same(store.load(1, tree)[0], tree)


def test_random_trees_come_back(store):
    @hypothesis.settings(max_examples=8)
    @hypothesis.given(TREES)
    def holds(tree):
        step = len(store.saved)
        store.save(step, tree, {}, block=True)
        assert same(store.load(step, meta(tree))[0], tree)

    holds()


def test_leaves_do_not_share_memory(store):
    tree = {name: torch.ones(3) for name in "abc"}
    store.save(1, tree, {}, block=True)
    got, _ = store.load(1, tree)
    assert len({leaf.untyped_storage().data_ptr() for leaf in got.values()}) == 3
    assert all(leaf.untyped_storage().nbytes() == 12 for leaf in got.values())


def test_plain_trees_come_back_without_a_template(store):
    plain = {"place": {"batch": 3, 5: (1, None)}, "rng": torch.arange(700).to(torch.uint8), "np": np.float32([1, 2])}
    store.save(1, {"w": torch.zeros(2)}, {}, plain=plain, block=True)
    got = store.plain(1)
    assert list(got) == list(plain)
    assert got["place"] == plain["place"]
    assert type(got["place"][5]) is tuple
    assert torch.equal(got["rng"], plain["rng"])
    assert got["np"].dtype == np.float32
    assert store.load(1, {"w": torch.zeros(2)})[1].fits  # what belongs to plain trees is no leaf of the tree


def test_documents_and_descriptions_are_read_without_arrays(store):
    store.save(3, {"w": torch.zeros(2, 3, dtype=torch.bfloat16), "n": 1}, {"run": {"loss": float("nan")}}, block=True)
    shutil.rmtree(store.step_path(3) / "arrays")
    document = store.document(3)
    assert document["run"]["loss"] != document["run"]["loss"]
    assert (document["format"], document["step"]) == (1, 3)
    assert document["versions"]["torch"] == torch.__version__
    assert document["versions"].keys() == {"ftrain", "python", "torch", "numpy", "optree", "orbax"}
    assert store.describe(3) == {"w": ("bfloat16", (2, 3)), "n": ("int", ())}


# ---------------------------------------------------------------------------------------------------- others can read it

PLAIN_READER = """
import builtins, json, sys
real = builtins.__import__
def guarded(name, *args, **kwargs):
    assert name.split(".")[0] not in ("torch", "ftrain"), name
    return real(name, *args, **kwargs)
builtins.__import__ = guarded
import numpy as np, orbax.checkpoint as ocp
path = sys.argv[1]
by_manager = ocp.CheckpointManager(path).restore(1, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(), document=ocp.args.JsonRestore()))
by_checkpointer = ocp.StandardCheckpointer().restore(path + "/1/arrays")
index = by_manager.document["index"]
for tree in (by_manager.arrays, by_checkpointer):
    for path, entry in index.items():
        node = tree
        for key in entry["array"]:
            node = node[key]
        n = int(np.prod(entry["shape"]))
        part = node if "at" not in entry else node[entry["at"] : entry["at"] + n].reshape(entry["shape"])
        print(path, part.dtype.name, list(part.shape), float(np.asarray(part, np.float32).sum()))
print(np.asarray(by_checkpointer["params"]["fc.weight"]).shape)
"""


def test_orbax_alone_opens_a_checkpoint(tmp_path):
    """Neither ftrain nor torch is there: the type name under which arrays are saved is numpy's."""
    tree = {"params": {"fc.weight": torch.ones(SMALL // 64, 32), "fc.bias": torch.ones(3, 2, dtype=torch.bfloat16)}}
    with Store(tmp_path, write=True) as store:
        store.save(1, tree, {}, block=True)
    out, _ = child(PLAIN_READER, tmp_path, cwd=tmp_path)
    lines = out.splitlines()
    expected = [
        "params/fc.bias bfloat16 [3, 2] 6.0",
        f"params/fc.weight float32 [{SMALL // 64}, 32] {SMALL / 2}",
    ]
    assert lines == [*expected, *expected, f"({SMALL // 64}, 32)"]


def test_chunks_are_whole_rows_and_none_is_nearly_empty():
    assert handler.rows_of((), 4, 100) == ()
    assert handler.rows_of((1280, 2048), 4, 8 << 20) == (640, 2048)
    assert handler.rows_of((3, 1 << 20), 4, 1 << 20) == (1, 1 << 18)
    for n in range(1, 200):  # zarr writes the last chunk as large as the others: its padding is less than a row a chunk
        (rows,) = handler.rows_of((n,), 1, 16)
        assert rows <= 16
        assert -(-n // rows) * rows - n < -(-n // rows)


# ------------------------------------------------------------------------------------------------ saved in the background


def test_leaves_may_be_overwritten_as_soon_as_save_returns(store):
    generator = torch.Generator().manual_seed(0)
    leaves = {f"w{i}": torch.empty(300, 1000) for i in range(6)} | {f"b{i}": torch.empty(100) for i in range(200)}
    expected = {}
    for step in range(4):
        for leaf in leaves.values():
            leaf.copy_(torch.randn(leaf.shape, generator=generator))
        expected[step] = {name: leaf.clone() for name, leaf in leaves.items()}
        store.save(step, leaves, {})
        for leaf in leaves.values():
            leaf.fill_(float("nan"))
    store.wait()
    for step, tree in expected.items():
        assert same(store.load(step, leaves)[0], tree), step


def test_the_copy_in_host_memory_is_allocated_once(store):
    tree = {"w": torch.randn(1000, 100), "b": torch.randn(10)}
    pointers = set()
    for step in range(3):
        store.save(step, tree, {})
        pointers.add(store._staging._memory.data_ptr())
    assert len(pointers) == 1
    store.save(3, {"small": torch.ones(1)}, {})  # and what is smaller fits into it
    assert store._staging._memory.data_ptr() in pointers
    store.close()
    assert store._staging._memory is None


def test_a_step_before_the_latest_is_saved(store):
    """Orbax leaves it out, and says so only by returning False."""
    for step in (5, 3, 4):
        store.save(step, {"w": torch.full((2,), float(step))}, {}, block=True)
    assert store.saved == [3, 4, 5]
    assert store.load(3, {"w": torch.zeros(2)})[0]["w"].tolist() == [3, 3]


def test_a_step_that_is_there_is_an_error_and_stays(store):
    store.save(1, {"w": torch.ones(2)}, {}, block=True)
    with pytest.raises(CheckpointError, match=r"there is a checkpoint of step 1 already[\s\S]*steps 1"):
        store.save(1, {"w": torch.zeros(2)}, {})
    assert store.load(1, {"w": torch.zeros(2)})[0]["w"].tolist() == [1, 1]
    store.delete(1)
    store.save(1, {"w": torch.zeros(2)}, {}, block=True)
    assert store.load(1, {"w": torch.ones(2)})[0]["w"].tolist() == [0, 0]


@pytest.mark.parametrize("step", [-1, 1.0, True, "3"])
def test_a_step_is_a_number(store, step):
    with pytest.raises(CheckpointError, match=r"is no step[\s\S]*an integer >= 0"):
        store.save(step, {}, {})


def test_all_of_a_step_is_on_the_disk_when_wait_returns(store, monkeypatch):
    """Orbax syncs its arrays, but neither JSON, metadata nor the names in folders."""
    synced, before = set(), set()
    fsync, unfinished = os.fsync, folder.Folder.sync_unfinished

    def recording(handle):
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def about_to_rename(self):
        unfinished(self)
        (one,) = self.path.glob(folder.UNFINISHED)
        before.update(str(file.relative_to(one)) for file in one.rglob("*") if str(file) not in synced)

    monkeypatch.setattr(os, "fsync", recording)
    monkeypatch.setattr(folder.Folder, "sync_unfinished", about_to_rename)
    store.save(1, {"w": torch.ones(SMALL)}, {}, block=True)
    assert before == set()
    step = store.step_path(1)
    assert {str(one) for one in (step, *step.rglob("*"))} | {store.path} <= synced


def test_nobodys_random_stream_is_drawn_from(store, rng_guard):
    tree = {"w": torch.ones(SMALL)}
    with rng_guard():
        store.save(1, tree, {}, block=True)
        store.load(1, tree)
        store.delete(1)


# ------------------------------------------------------------------------------------------------- what cannot be saved


def test_a_leaf_that_cannot_be_saved_is_named_before_anything_is_written(store):
    for leaf, text in (
        (object(), r"where:    opt/fn[\s\S]*got:      object"),
        (torch.zeros(2, device="meta"), "on meta"),
        (torch.eye(2).to_sparse(), "torch.sparse_coo"),
        (np.array(["x"]), "ndarray of <U1"),
        (np.zeros(2, ">f4"), "ndarray of >f4"),
    ):
        with pytest.raises(CheckpointError, match=text):
            store.save(1, {"opt": {"fn": leaf}, "w": torch.ones(2)}, {})
    with pytest.raises(CheckpointError, match=r"tree\[\(1, 2\)\][\s\S]*strings or integers"):
        store.save(1, {(1, 2): torch.ones(2)}, {})
    with pytest.raises(CheckpointError, match="'format', which is ftrain's"):
        store.save(1, {}, {"format": 3})
    with pytest.raises(CheckpointError, match=r"document holds tensors[\s\S]*plain="):
        store.save(1, {}, {"w": torch.ones(2)})
    assert store.saved == []
    assert not any(name.isdigit() for name in os.listdir(store.path))


def test_a_sharded_state_is_refused_by_name(store):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        leaf = distribute_tensor(torch.ones(4), mesh, [Replicate()])
        with pytest.raises(CheckpointError, match=r"a DTensor yet[\s\S]*where:    w[\s\S]*full_tensor"):
            store.save(1, {"w": leaf}, {})
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------- failing disks


@contextlib.contextmanager
def tmpfs(path, size):
    """A small file system of its own, where this process may mount one."""
    path.mkdir()
    run = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, check=False
    )
    if run.returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.mark.parametrize("block", [True, False])
def test_a_full_disk_is_an_error_and_the_last_checkpoint_stays(tmp_path, block):
    small, big = {"w": torch.ones(1 << 20)}, {"w": torch.ones(2 << 20)}  # 4 and 8 MiB on a disk of 12
    with tmpfs(tmp_path / "disk", "12m") as disk:
        store = Store(disk / "ckpt", write=True)
        store.save(1, small, {}, block=True)

        def fill():
            store.save(2, big, {}, block=block)
            assert not block
            store.wait()

        with pytest.raises(CheckpointError, match="the disk is full") as caught:
            fill()
        text = str(caught.value)
        assert f"{8 << 20:,} bytes of space" in text
        assert "bytes free" in text
        assert str(disk / "ckpt" / "2") in text
        assert store.saved == [1]
        assert same(store.load(1, small)[0], small)
        assert not list(Path(store.path).glob(folder.UNFINISHED))
        store.save(3, small, {}, block=True)  # what was written of it is gone again
        assert store.saved == [1, 3]
        store.close()


def test_the_error_of_a_save_in_the_background_is_raised_by_the_next_one(store, monkeypatch):
    store.save(1, {"w": torch.ones(2)}, {}, block=True)

    async def broken(*args):
        raise OSError("the disk is on fire")

    with monkeypatch.context() as patched:
        patched.setattr(handler.TensorHandler, "_write", broken)
        store.save(2, {"w": torch.ones(2)}, {})
        with pytest.raises(
            CheckpointError,
            match=r"step 2 could not be saved\.[\s\S]*on fire[\s\S]*earlier checkpoints are untouched: 1",
        ):
            store.save(3, {"w": torch.ones(2)}, {})
    store.save(3, {"w": torch.ones(2)}, {}, block=True)
    assert store.saved == [1, 3]


def test_closing_raises_what_went_wrong_and_frees_the_folder(tmp_path, monkeypatch):
    async def broken(*args):
        raise OSError("the disk is on fire")

    store = Store(tmp_path, write=True)
    monkeypatch.setattr(handler.TensorHandler, "_write", broken)
    store.save(2, {"w": torch.ones(2)}, {})
    with pytest.raises(CheckpointError, match="on fire"):
        store.close()
    Store(tmp_path, write=True).close()


def test_a_save_that_fails_at_once_does_not_hold_up_the_end_of_the_process(tmp_path):
    """It took Orbax 301 seconds, with folders made asynchronously."""
    code = """
import sys, torch
from ftrain.checkpoint import handler
from ftrain.checkpoint.store import Store
from ftrain.errors import CheckpointError
def broken(*args):
    raise ValueError("broken at once")
handler.TensorHandler.serialize = broken
store = Store(sys.argv[1], write=True)
try:
    store.save(1, {"w": torch.ones(2)}, {})
except CheckpointError as error:
    assert "broken at once" in str(error)
    print("raised")
"""
    start = time.monotonic()
    out, _ = child(code, tmp_path / "ckpt", cwd=tmp_path)
    assert out == "raised\n"
    assert time.monotonic() - start < 30


def test_a_folder_that_cannot_be_written_to_is_an_error_but_can_be_read(tmp_path):
    tree = {"w": torch.ones(3)}
    with tmpfs(tmp_path / "disk", "4m") as disk:
        with Store(disk / "ckpt", write=True) as store:
            store.save(1, tree, {}, block=True)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(CheckpointError, match=r"cannot be written to[\s\S]*Read-only file system"):
            Store(disk / "ckpt", write=True)
        with Store(disk / "ckpt", write=False) as store:
            assert same(store.load(1, tree)[0], tree)


# ------------------------------------------------------------------------------------------------------- damaged files


@pytest.fixture
def two_steps(tmp_path):
    """A folder with two steps, and what is in them: an array of several chunks, a pack, values."""
    tree = {"w": torch.randn(3000, 1000), "b": torch.randn(50), "n": 3}
    with Store(tmp_path / "ckpt", write=True) as store:
        for step in (1, 2):
            store.save(step, tree, {"note": "x"}, plain={"p": torch.arange(9)}, block=True)
    return tmp_path / "ckpt", tree


def outcome(path, tree):
    """`"right"` or the error of reading step 2; anything else fails."""
    with Store(path, write=False) as store:
        try:
            got, _ = store.load(2, meta(tree))
            plain, document = store.plain(2), store.document(2)
        except CheckpointError as error:
            said = str(error)
        else:
            said = ""
        if said:
            assert "damaged" in said
            assert same(store.load(1, meta(tree))[0], tree)  # the one before is untouched
            assert 1 in store.saved
            return "error"
    assert same(got, tree)
    assert plain["p"].tolist() == list(range(9))
    assert document["note"] == "x"
    return "right"


def test_a_flipped_bit_is_an_error_and_never_another_number(two_steps):
    """Without a sum for each chunk 60 of 60 went unnoticed."""
    path, tree = two_steps
    files = sorted((path / "2").rglob("*"), key=lambda one: one.stat().st_size)
    files = [one for one in files if one.is_file() and one.stat().st_size]
    chance = random.Random(0)
    found = []
    for n in range(60):
        file = files[-1] if n % 2 else chance.choice(files)
        data = file.read_bytes()
        at = chance.randrange(len(data))
        file.write_bytes(data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :])
        found.append(outcome(path, tree))
        file.write_bytes(data)
    assert found[1::2] == ["error"] * 30
    assert outcome(path, tree) == "right"


@hypothesis.given(st.integers(1, 20000), st.integers(0), st.integers(0, 7))
def test_a_flipped_bit_changes_the_sum(size, at, bit):
    block = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    other = block.copy()
    other[at % size] ^= 1 << bit
    assert checksum(block) == checksum(block.copy())
    assert checksum(block) != checksum(other)
    assert checksum(block) != checksum(block[:-1])


@pytest.mark.parametrize("shape", [(), (7,), (12, 5), (1, 40), (2, 30)])
def test_parts_of_arrays_are_read_and_checked_by_blocks(tmp_path, monkeypatch, shape):
    """Small chunks: packs and arrays of several blocks, read as a whole, from the middle, from the end."""
    monkeypatch.setattr(handler.TensorHandler.__init__, "__defaults__", (64,))
    tree = {f"{i}": torch.randn(shape) for i in range(9)}
    with Store(tmp_path, write=True) as store:
        store.save(1, tree, {}, block=True)
        for names in (["0"], ["4"], ["8"], ["2", "5"], list(tree)):
            part = {name: tree[name] for name in names}
            assert same(store.load(1, meta(part), strict=False)[0], part)
        sums = store.step_path(1) / "arrays" / "sums.json"
        found = json.loads(sums.read_text())
        found["~packed.float32"]["sums"][-1] = "0"
        sums.write_text(json.dumps(found))
        with pytest.raises(
            CheckpointError, match=r"the sum of the array ~packed\.float32 is not that of what was written"
        ):
            store.load(1, tree)
        if shape == (12, 5):  # another block than that of the first leaf
            assert same(store.load(1, {"0": tree["0"]}, strict=False)[0], {"0": tree["0"]})


@pytest.mark.parametrize("how", ["truncated", "empty", "missing"])
def test_a_file_that_is_cut_off_or_missing_is_an_error(two_steps, how):
    path, tree = two_steps
    errors = set()
    for file in sorted(one for one in (path / "2").rglob("*") if one.is_file()):
        data = file.read_bytes()
        if how == "missing":
            file.unlink()
        else:
            file.write_bytes(data[: len(data) // 2 if how == "truncated" else 0])
        if outcome(path, tree) == "error":
            errors.add(file.relative_to(path / "2").as_posix())
        file.write_bytes(data)
    data_files = {one for one in errors if "/d/" in one}
    assert {"document/metadata", "arrays/_METADATA", "arrays/manifest.ocdbt", "arrays/sums.json"} <= errors
    assert data_files


@pytest.mark.parametrize("item", ["arrays", "document"])
def test_a_missing_folder_is_an_error(two_steps, item):
    path, tree = two_steps
    shutil.rmtree(path / "2" / item)
    assert outcome(path, tree) == "error"


def test_damaged_steps_are_listed_apart(two_steps):
    path, _ = two_steps
    record = path / "2" / "document" / "metadata"
    text = record.read_text()
    with Store(path, write=True) as store:
        assert store.saved == [1, 2]
    record.write_text(text.replace('"n"', '"m"'))
    with Store(path, write=True) as store:
        assert store.saved == [1]
        assert "the sum of metadata is not that of its contents" in store.damaged[2]
        with pytest.raises(CheckpointError, match="was not written in this folder"):
            store.delete(2)
    record.unlink()
    with Store(path, write=False) as store:
        assert store.saved == [1]
        assert "FileNotFoundError" in store.damaged[2]


# ------------------------------------------------------------------------------------------------- folders and writers


def test_a_path_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (True, False):
        with pytest.raises(CheckpointError, match=r"is a file[\s\S]*where: .*file"):
            Store(tmp_path / "file", write=write)


@pytest.mark.parametrize(
    "path",
    ["gs://bucket/run", "s3://bucket/run", "my+scheme://host/run", Path("gs://bucket/run"), Path("s3://bucket/run")],
    ids=repr,
)
def test_a_path_that_is_a_url_is_an_error(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = {"w": torch.ones(1)}
    text = r"remote folders are not supported; save to a local folder and copy it[\s\S]*where: .*(bucket|host)"
    for call in (
        lambda: Store(path, write=True),
        lambda: Store(path, write=False),
        lambda: ft.save(path, tree),
        lambda: ft.restore(path, like=tree),
        lambda: ft.checkpoint.info(path),
        lambda: ft.checkpoint.to_safetensors(tmp_path / "m", path),
    ):
        with pytest.raises(CheckpointError, match=text):
            call()
    assert not list(tmp_path.iterdir())


def test_a_local_path_may_have_colons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("run:1/lr", Path("x:1/lr"), tmp_path / "gs" / "x"):
        ft.save(path, {"w": torch.ones(1)})
        assert ft.restore(path, like={"w": torch.zeros(1)})["w"].item() == 1


def test_a_step_that_is_not_there_is_an_error_that_names_those_that_are(store, tmp_path):
    with pytest.raises(CheckpointError, match="there are no checkpoints"):
        store.load(7, {})
    for step in (1, 20):
        store.save(step, {"w": torch.ones(1)}, {}, block=True)
    for call in (store.document, store.plain, store.describe, store.delete):
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 7[\s\S]*one of 1, 20"):
            call(7)
    with Store(tmp_path / "nowhere", write=False) as other:
        assert other.saved == []
        with pytest.raises(CheckpointError, match=r"there are no checkpoints[\s\S]*no such folder"):
            other.document(1)
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_of_another_program_is_left_alone(tmp_path):
    (tmp_path / "100" / "model").mkdir(parents=True)
    (tmp_path / "100" / "model" / "weights").write_text("precious")
    before = sorted(one.relative_to(tmp_path) for one in tmp_path.rglob("*"))
    for write in (True, False):
        with pytest.raises(CheckpointError, match=r"another program[\s\S]*100 without the marker ftrain.json"):
            Store(tmp_path, write=write)
    left = {".lock", ".writer"}  # the lock had to be taken in order to look
    assert [
        one for one in sorted(x.relative_to(tmp_path) for x in tmp_path.rglob("*")) if one.name not in left
    ] == before


def test_steps_from_elsewhere_are_read_but_never_deleted(tmp_path):
    tree = {"w": torch.ones(3)}
    with Store(tmp_path / "a", write=True) as a:
        a.save(1, tree, {}, block=True)
    with Store(tmp_path / "b", write=True) as b:
        b.save(2, tree, {}, block=True)
        shutil.copytree(a.step_path(1), b.step_path(1))
        (b.step_path(3) / "something").mkdir(parents=True)
        assert b.saved == [1, 2]
        assert b.foreign == [1, 3]
        assert same(b.load(1, tree)[0], tree)
        for step in (1, 3):
            with pytest.raises(CheckpointError, match=rf"step {step} was not written in this folder"):
                b.delete(step)
        b.save(4, tree, {}, block=True)
        b.delete(2)
        assert b.saved == [1, 4]
        assert (b.step_path(3) / "something").exists()
    shutil.copytree(a.step_path(1), tmp_path / "c" / "1")  # a fork: a folder made by hand of one step
    with Store(tmp_path / "c", write=True) as c:
        assert (c.saved, c.foreign) == ([1], [1])


def test_a_folder_goes_on_over_processes(tmp_path):
    for step in (1, 2):
        with Store(tmp_path, write=True) as store:
            store.save(step, {"w": torch.ones(1)}, {}, block=True)
            assert store.foreign == []
    with Store(tmp_path, write=True) as store:
        store.delete(1)
        assert store.saved == [2]


def test_only_one_writes_at_a_time(tmp_path):
    with Store(tmp_path, write=True):
        with pytest.raises(
            CheckpointError, match=rf"another process writes[\s\S]*process {os.getpid()} on {socket.gethostname()}"
        ):
            Store(tmp_path, write=True)
        Store(tmp_path, write=False).close()
    with Store(tmp_path, write=True) as store, pytest.raises(CheckpointError, match="closed, or was opened to read"):
        Store(tmp_path, write=False).save(1, {}, {})
    with pytest.raises(CheckpointError, match="closed, or was opened to read"):
        store.save(1, {}, {})


def test_the_lock_is_gone_with_the_process_even_if_its_workers_live_on(tmp_path):
    """A forked worker of a loader has the same open files, and notices only after seconds that its parent was killed."""
    code = """
import os, sys, time
from ftrain.checkpoint.store import Store
store = Store(sys.argv[1], write=True)
if os.fork() == 0:
    time.sleep(30)
    os._exit(0)
print("ready", flush=True)
time.sleep(30)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True, env=ENV, start_new_session=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(CheckpointError, match=f"process {process.pid} on"):
            Store(tmp_path, write=True)
        process.kill()
        process.wait()
        Store(tmp_path, write=True).close()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    tree = {"w": torch.ones(3)}
    with Store(tmp_path, write=True) as store:
        for step in (1, 2):
            store.save(step, tree, {}, block=True)
    (tmp_path / ".trash").mkdir(exist_ok=True)
    (tmp_path / "1").rename(tmp_path / ".trash" / "1-abc")  # killed while it deleted step 1 ...
    (tmp_path / ".trash" / "1-abc" / "document" / "metadata").unlink()
    shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp-7")  # ... and while it saved step 3
    with Store(tmp_path, write=False) as store:
        assert store.saved == [2]
    assert (tmp_path / ".trash").exists()  # a reader touches nothing
    with Store(tmp_path, write=True) as store:
        assert store.saved == [2]
        assert sorted(os.listdir(tmp_path)) == [".lock", ".writer", "2", "ftrain.json"]
        store.save(3, tree, {}, block=True)


def test_a_deletion_that_is_cut_off_leaves_no_half_of_a_step(tmp_path, monkeypatch):
    with Store(tmp_path, write=True) as store:
        store.save(1, {"w": torch.ones(3)}, {}, block=True)
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "rmtree", lambda path: (path / "document" / "metadata").unlink() or 1 / 0)
            with pytest.raises(ZeroDivisionError):
                store.delete(1)
        assert (store.saved, store.damaged, store.foreign) == ([], {}, [])
        assert list((tmp_path / ".trash").iterdir())
    with Store(tmp_path, write=True) as store:
        assert not (tmp_path / ".trash").exists()


KILLED = """
import sys, torch
from ftrain.checkpoint.store import Store
store = Store(sys.argv[1], write=True)
first = store.saved[-1] + 1 if store.saved else 0
print("ready", flush=True)
for step in range(first, first + 10_000):
    tree = {"w": torch.full((500, 1000), float(step)), "b": torch.full((9,), float(step)), "step": step}
    store.save(step, tree, {"step of": step})
    store.wait()
    print(step, flush=True)
    for old in store.saved[:-2]:
        store.delete(old)
"""


def test_after_kill_9_at_any_moment_every_step_listed_is_whole(tmp_path):
    """Orbax's own collection of old steps leaves halves of steps that are listed: 3 of 30 kills."""
    chance = random.Random(0)
    like = {"w": torch.empty(500, 1000), "b": torch.empty(9), "step": 0}
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE, text=True, env=ENV)
        assert process.stdout.readline() == "ready\n"
        assert process.stdout.readline()  # one save at least
        time.sleep(chance.uniform(0.05, 0.4))
        process.kill()
        said = process.stdout.read().split()
        process.stdout.close()
        process.wait()
        with Store(tmp_path, write=False) as store:
            saved = store.saved
            assert not store.damaged
            if said:
                assert saved[-1] >= int(said[-1])  # nothing that was confirmed is lost
            for step in saved:
                got, _ = store.load(step, like)
                assert got["step"] == step
                assert torch.equal(got["w"], torch.full((500, 1000), float(step)))
                assert torch.equal(got["b"], torch.full((9,), float(step)))


# ------------------------------------------------------------------------------------------------- Orbax and JAX at home

QUIET = """
import logging, sys
logging.basicConfig(level=logging.INFO)
import torch, ftrain as ft
ft.checkpoint
ft.save, ft.restore
assert not {"orbax", "jax"} & sys.modules.keys(), "imported too early"
ft.save(sys.argv[1], {"w": torch.ones(3)})
print(ft.restore(sys.argv[1], like={"w": torch.zeros(3)})["w"].tolist())
import jax
print(jax.config.jax_platforms, jax.default_backend(), jax.process_count(), jax._src.distributed.global_state.client)
"""


def test_orbax_comes_late_says_nothing_and_keeps_jax_on_the_cpu(tmp_path):
    out, err = child(QUIET, tmp_path / "ckpt", cwd=tmp_path)
    assert out.splitlines() == ["[1.0, 1.0, 1.0]", "cpu cpu 1 None"]
    assert "absl" not in err
    assert "orbax" not in err


def test_the_users_choice_of_jax_platforms_is_kept(tmp_path):
    code = "import jax\nfrom ftrain.checkpoint.engine import orbax\norbax()\nprint(jax.config.jax_platforms)"
    out, _ = child(code, cwd=tmp_path, JAX_PLATFORMS="cuda,cpu")
    assert out == "cuda,cpu\n"


def test_orbax_is_set_up_once():
    import logging

    engine.orbax()
    engine.orbax()
    assert logging.getLogger("absl").filters.count(engine._quiet) == 1


def test_the_record_is_json_that_anyone_can_read(store):
    store.save(1, {"w": torch.ones(2)}, {"n": 3}, block=True)
    record = json.loads((store.step_path(1) / "document" / "metadata").read_text())
    assert record["index"] == {"w": {"dtype": "float32", "shape": [2], "array": ["~packed", "float32"], "at": 0}}
    assert record["document"] == {"n": 3}
