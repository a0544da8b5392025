"""`write_predictions`: the rows are those of `predict`, a file is there as a whole or not at all."""

from __future__ import annotations

import builtins
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import ftrain as ft
from ftrain.errors import ArgumentError, DataError, LimitError, OutputError, StateError
from ftrain.loops import formats

pq = pytest.importorskip("pyarrow.parquet")

ROWS = 11
EAGER = {"compile": False}


@pytest.fixture
def model():
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()


@pytest.fixture
def state(model):
    return ft.init(model, ft.optim.sgd(0.1), seed=3)


@pytest.fixture
def arrays():
    torch.manual_seed(1)
    return {"x": torch.randn(ROWS, 3, dtype=torch.float64), "key": 100 + torch.arange(ROWS)}


@pytest.fixture
def step(model):
    def fn(model, batch):
        logits = model(batch["x"])
        return {"logits": logits, "class": logits.argmax(dim=1), "pairs": logits[:, :, None] * logits[:, None, :]}

    return ft.predict_step(model, fn)


def read(path: Path) -> dict[str, np.ndarray]:
    """What a file holds, by column, read by nothing of ours."""
    if path.suffix == ".npy":
        return {"output": np.load(path, allow_pickle=False)}
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as found:
            return {name: found[name] for name in found}
    table = pq.read_table(path)
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def left(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# ------------------------------------------------------------------------------------------------------------------ the rows


@pytest.mark.parametrize("ending", ["npz", "parquet"])
def test_what_is_written_is_what_predict_gives_bit_by_bit(tmp_path, state, step, arrays, ending):
    path = tmp_path / f"out.{ending}"
    rows = ft.write_predictions(path, state, step, arrays, batch_size=4, **EAGER)
    wanted = list(ft.predict(state, step, arrays, batch_size=4, **EAGER))
    found = read(path)
    assert rows == ROWS
    assert list(found) == ["id", "logits", "class", "pairs"]
    assert found["id"].tolist() == list(range(ROWS))
    for name in ("logits", "class", "pairs"):
        whole = torch.cat([one[name] for one in wanted]).numpy()
        assert found[name].dtype == whole.dtype
        assert found[name].tobytes() == whole.tobytes()
    assert left(tmp_path) == [path.name]


def test_npy_holds_the_one_tensor(tmp_path, model, state, arrays):
    step = ft.predict_step(model)
    path = tmp_path / "out.npy"
    rows = ft.write_predictions(path, state, step, arrays["x"], batch_size=4, **EAGER)
    wanted = torch.cat(list(ft.predict(state, step, arrays["x"], batch_size=4, **EAGER))).numpy()
    assert rows == ROWS
    assert np.load(path, allow_pickle=False).tobytes() == wanted.tobytes()
    assert np.load(path, mmap_mode="r").shape == (ROWS, 2)


def test_random_predictions_are_those_of_predict(tmp_path, model, state, arrays, rng_guard):
    def fn(model, batch, rng):
        return model(batch["x"]) + ft.rng.normal(rng, (len(batch["x"]), 2)) + torch.randn(len(batch["x"]), 2)

    step = ft.predict_step(model, fn)
    with rng_guard():
        ft.write_predictions(tmp_path / "out.npy", state, step, arrays, batch_size=4, **EAGER)
    wanted = torch.cat(list(ft.predict(state, step, arrays, batch_size=4, **EAGER))).numpy()
    assert np.load(tmp_path / "out.npy").tobytes() == wanted.tobytes()
    assert not np.array_equal(wanted[:4], wanted[4:8])


@pytest.mark.parametrize("size", [1, 2, 5, 11, 64])
def test_any_batch_size_gives_the_same_rows(tmp_path, state, step, arrays, size):
    path = tmp_path / "out.npz"
    assert ft.write_predictions(path, state, step, arrays, batch_size=size, ids="key", **EAGER) == ROWS
    found = read(path)
    wanted = step(state, arrays)
    assert found["id"].tolist() == arrays["key"].tolist()
    for name in ("logits", "class", "pairs"):
        np.testing.assert_allclose(found[name], wanted[name].numpy(), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("ids", [None, "key", lambda batch: batch["key"] - 100])
def test_padding_is_left_out(tmp_path, state, step, arrays, ids):
    plain, padded = (ft.data.source(arrays).batch(4, last=last) for last in ("keep", "pad"))
    assert padded[2]["x"].shape[0] == 4
    assert ft.write_predictions(tmp_path / "a.npz", state, step, plain, ids=ids, **EAGER) == ROWS
    assert ft.write_predictions(tmp_path / "b.npz", state, step, padded, ids=ids, **EAGER) == ROWS
    a, b = read(tmp_path / "a.npz"), read(tmp_path / "b.npz")
    assert a["id"].tolist() == b["id"].tolist()
    for name, column in a.items():
        np.testing.assert_allclose(b[name], column, rtol=1e-13, atol=1e-15)


def test_ids_name_the_samples_of_a_shuffled_source(tmp_path, state, step, arrays):
    data = ft.data.source(arrays, batch_size=4, shuffle=True, seed=5)
    ft.write_predictions(tmp_path / "out.parquet", state, step, data, ids="key", **EAGER)
    found = read(tmp_path / "out.parquet")
    assert found["id"].tolist() != arrays["key"].tolist()
    assert sorted(found["id"].tolist()) == arrays["key"].tolist()
    wanted = step(state, arrays)["logits"].numpy()
    np.testing.assert_allclose(found["logits"], wanted[found["id"] - 100], rtol=1e-13, atol=1e-15)


def test_windows_are_taken_batch_by_batch(tmp_path, state, step, arrays):
    data = ft.data.window(ft.data.source(arrays, batch_size=4), 2)
    assert ft.write_predictions(tmp_path / "out.npz", state, step, data, **EAGER) == ROWS


def test_limit_and_averaged_parameters(tmp_path, model, arrays):
    tx = ft.optim.sgd(0.5)
    train = ft.with_ema(ft.train_step(model, lambda model, batch: model(batch["x"]).square().mean(), tx), 0.9)
    step = ft.predict_step(model, lambda model, batch: model(batch["x"]))
    start = train.init(ft.init(model, tx))
    state = ft.fit(start, train, arrays, batch_size=4, epochs=2, progress=False, **EAGER).state
    assert ft.write_predictions(tmp_path / "a.npy", state, step, arrays, batch_size=4, limit=2, **EAGER) == 8
    assert ft.write_predictions(tmp_path / "b.npy", state, step, arrays, batch_size=4, params="ema", **EAGER) == ROWS
    own = ft.predict_step(model, lambda model, batch: model(batch["x"]), params="ema")
    wanted = torch.cat(list(ft.predict(state, own, arrays, batch_size=4, **EAGER))).numpy()
    assert np.load(tmp_path / "b.npy").tobytes() == wanted.tobytes()
    assert not np.allclose(np.load(tmp_path / "a.npy"), wanted[:8])


# ------------------------------------------------------------------------------------------------------------- the function


def test_a_function_gets_arrays_of_its_own(model, state, arrays):
    held = torch.empty(2, 3, dtype=torch.float64)

    def batches(epoch):  # a loader that fills one buffer again and again
        for start in range(0, ROWS - 1, 2):
            held.copy_(arrays["x"][start : start + 2])
            yield {"x": held}

    step = ft.predict_step(model, lambda model, batch: {"same": batch["x"], "pair": (model(batch["x"]),)})
    kept = []
    before = {name: leaf.clone() for name, leaf in state.params.items()}
    rows = ft.write_predictions(lambda ids, outputs: kept.append((ids, outputs)), state, step, batches, **EAGER)
    assert rows == 10
    assert len(kept) == 5
    assert np.concatenate([ids for ids, _ in kept]).tolist() == list(range(10))
    assert np.array_equal(np.concatenate([outputs["same"] for _, outputs in kept]), arrays["x"][:10].numpy())
    assert all(type(outputs["pair"]) is tuple and outputs["pair"][0].shape == (2, 2) for _, outputs in kept)
    for _, outputs in kept:
        outputs["same"] += 1
    assert all(torch.equal(leaf, before[name]) for name, leaf in state.params.items())


def test_ids_of_a_function_may_be_texts(tmp_path, state, step, arrays):
    def ids(batch):
        return [f"file-{key}" for key in batch["key"].tolist()]

    ft.write_predictions(tmp_path / "out.parquet", state, step, arrays, batch_size=4, ids=ids, **EAGER)
    assert read(tmp_path / "out.parquet")["id"].tolist() == [f"file-{100 + i}" for i in range(ROWS)]
    with pytest.raises(DataError, match=r"numpy's formats take numbers(.|\n)*the column 'id'(.|\n)*parquet"):
        ft.write_predictions(tmp_path / "out.npz", state, step, arrays, batch_size=4, ids=ids, **EAGER)


def test_the_function_runs_under_streams_of_the_states_own(state, step, arrays, rng_guard):
    drawn = []

    def receive(ids, outputs):
        drawn.append((np.random.rand(), torch.rand(()).item()))

    with rng_guard():
        ft.write_predictions(receive, state, step, arrays, batch_size=4, **EAGER)
    first, drawn = drawn, []
    np.random.rand(3)
    ft.write_predictions(receive, state, step, arrays, batch_size=4, **EAGER)
    assert len(first) == 3
    assert [one for one, _ in drawn] == [one for one, _ in first]


def test_memory_does_not_grow_with_the_data(tmp_path, model):
    """The rows go through one batch at a time: what the receiver does not keep is gone by the next batch."""
    import weakref

    state = ft.init(model, ft.optim.sgd(0.1))
    alive: list[weakref.ref] = []
    most = 0

    def batches(epoch):
        nonlocal most
        for _ in range(20):
            most = max(most, sum(one() is not None for one in alive))
            yield torch.zeros(3, 3, dtype=torch.float64)

    def fn(model, batch):
        out = model(batch)
        alive.append(weakref.ref(out))
        return out

    step = ft.predict_step(model, fn)
    assert ft.write_predictions(tmp_path / "out.npy", state, step, batches, **EAGER) == 60
    assert most <= 2


# --------------------------------------------------------------------------------------------------------------- the formats


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "int64", "float16", "float32", "float64", "bfloat16"])
@pytest.mark.parametrize("ending", ["npy", "npz", "parquet"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (2, 0, 3)], ids=str)
def test_dtypes_and_shapes_come_back(tmp_path, state, dtype, ending, shape):
    values = [torch.arange(k * int(np.prod(shape))).reshape(k, *shape).to(getattr(torch, dtype)) for k in (2, 1, 3)]

    def step(state, batch):
        return values[int(batch[0, 0])]

    data = [torch.full((k, 1), i) for i, k in enumerate((2, 1, 3))]
    path = tmp_path / f"out.{ending}"
    assert ft.write_predictions(path, state, step, data, **EAGER) == 6
    found = read(path)["output"]
    wanted = torch.cat(values)
    wanted = (wanted.float() if dtype == "bfloat16" else wanted).numpy()
    if ending == "parquet" and not wanted.size:  # no values: lists that end where they should
        assert found.shape == wanted.shape[: found.ndim]
        assert 0 in found.shape
        return
    assert found.shape == wanted.shape
    if ending != "parquet":
        assert found.dtype == wanted.dtype
    assert np.array_equal(found, wanted)
    if ending == "parquet":
        kind = pq.read_schema(path).field("output").type
        for _ in shape:
            kind = kind.value_type
        assert kind == formats._arrow(wanted.reshape(-1)[:1], "", "").type


def test_complex_numbers_go_to_numpy(tmp_path, state):
    def step(state, batch):
        return torch.view_as_complex(torch.stack([batch, -batch], dim=-1)).conj()

    ft.write_predictions(tmp_path / "out.npy", state, step, [torch.ones(2, 3)], **EAGER)
    assert np.array_equal(np.load(tmp_path / "out.npy"), np.full((2, 3), 1 + 1j, dtype=np.complex64))
    with pytest.raises(DataError, match=r"Parquet has no type(.|\n)*complex64(.|\n)*view_as_real"):
        ft.write_predictions(tmp_path / "out.parquet", state, step, [torch.ones(2, 3)], **EAGER)


def test_parquet_takes_lists_of_any_length(tmp_path, state):
    def step(state, batch):
        return {"tokens": batch * 2}

    data = [torch.ones(2, 3), torch.ones(1, 5)]
    ft.write_predictions(tmp_path / "out.parquet", state, step, data, **EAGER)
    assert [len(row) for row in pq.read_table(tmp_path / "out.parquet")["tokens"].to_pylist()] == [3, 3, 5]
    for ending in ("npz", "npy"):
        with pytest.raises(
            DataError, match=r"not like those(.|\n)*float32\[n, 3\](.|\n)*float32\[n, 5\](.|\n)*parquet"
        ):
            ft.write_predictions(tmp_path / f"out.{ending}", state, lambda s, b: step(s, b)["tokens"], data, **EAGER)
    assert left(tmp_path) == ["out.parquet"]


def test_parquet_is_written_by_row_groups(tmp_path, state, monkeypatch):
    monkeypatch.setattr(formats, "GROUP", 600)  # bytes
    data = [torch.ones(10, 1)] * 10  # 80 bytes of ids and 40 of outputs each
    ft.write_predictions(tmp_path / "out.parquet", state, lambda state, batch: batch[:, 0], data, **EAGER)
    found = pq.ParquetFile(tmp_path / "out.parquet")
    assert found.num_row_groups == 2
    assert found.metadata.num_rows == 100
    assert found.read()["id"].to_pylist() == list(range(100))


def test_the_same_predictions_are_the_same_bytes(tmp_path, state, step, arrays):
    for ending in ("npz", "parquet"):
        paths = [tmp_path / f"{name}.{ending}" for name in "ab"]
        for path in paths:
            ft.write_predictions(path, state, step, arrays, batch_size=4, **EAGER)
        assert paths[0].read_bytes() == paths[1].read_bytes()
    assert zipfile.ZipFile(tmp_path / "a.npz").testzip() is None


# ----------------------------------------------------------------------------------------------------- whole, or not at all


def failing(model, after: int):
    calls = iter(range(100))

    def fn(model, batch):
        if next(calls) == after:
            raise OSError("no more paper")
        return model(batch["x"])

    return ft.predict_step(model, fn)


@pytest.mark.parametrize("ending", ["npy", "npz", "parquet"])
@pytest.mark.parametrize("after", [0, 2])
def test_a_failure_leaves_what_was_there(tmp_path, arrays, ending, after):
    model = torch.nn.Linear(3, 2).double()
    state = ft.init(model, ft.optim.sgd(0.1))
    path = tmp_path / f"out.{ending}"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match=r"^no more paper$"):
        ft.write_predictions(path, state, failing(model, after), arrays, batch_size=4, **EAGER)
    assert path.read_bytes() == b"old"
    assert left(tmp_path) == [path.name]


@pytest.mark.parametrize("ending", ["npy", "npz", "parquet"])
def test_a_full_disk(tmp_path, state, ending):
    """A limit on the size of files stands for the disk."""
    path = tmp_path / f"out.{ending}"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    torch.manual_seed(0)
    data = [torch.randn(1000, 100) for _ in range(5)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"the file cannot be written(.|\n)*File too large(.|\n)*as it was"):
            ft.write_predictions(path, state, lambda state, batch: batch, data, **EAGER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert left(tmp_path) == [path.name]


def test_permissions_and_links_are_kept(tmp_path, state, step, arrays):
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "out.npz", tmp_path / "link.npz"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    ft.write_predictions(link, state, step, arrays, batch_size=4, **EAGER)
    assert link.is_symlink()
    assert real.stat().st_mode & 0o7777 == 0o640
    assert read(real)["id"].shape == (ROWS,)


SLOW = """
import sys, time, torch, ftrain as ft
model = torch.nn.Linear(2, 1)
state = ft.init(model, ft.optim.sgd(0.1))
def batches(epoch):
    for i in range(10_000):
        if i == 50:
            print("going", flush=True)
        if i > 50:
            time.sleep(0.01)
        yield torch.ones(100, 2)
ft.write_predictions(sys.argv[1], state, ft.predict_step(model), batches, compile=False)
"""


@pytest.mark.parametrize("ending", ["npy", "npz", "parquet"])
def test_kill_9_leaves_the_old_file(tmp_path, ending):
    path = tmp_path / f"out.{ending}"
    path.write_bytes(b"old")
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SLOW), str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "going\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(left(tmp_path)) == 2  # and the file that was being written, under a name of its own
    state = ft.init(torch.nn.Linear(2, 1), ft.optim.sgd(0.1))
    ft.write_predictions(path, state, lambda state, batch: batch, [torch.ones(2, 1)], **EAGER)
    assert read(path)["output"].shape == (2, 1)


# ------------------------------------------------------------------------------------------------------------------ bad input


def bad(to="out.npz", step=None, data=None, **rest):
    return to, step, data, rest


def rows_of(fn):
    return lambda state, batch: fn(batch)


BAD = {
    "ending": (bad("out.csv"), ArgumentError, r"'.*out.csv' says no format(.|\n)*\.npy, \.npz or \.parquet"),
    "no ending": (bad("out"), ArgumentError, r"says no format(.|\n)*got: +none"),
    "no folder": (bad("deep/out.npz"), OutputError, r"there is no such folder(.|\n)*os.makedirs"),
    "kind of to": (bad(3), ArgumentError, r"says where the rows go(.|\n)*got: +int"),
    "kind of ids": (bad(ids=3), ArgumentError, r"ids=3 makes no sense(.|\n)*ids=\"id\""),
    "npy and ids": (bad("out.npy", ids="key"), ArgumentError, r"no ids beside it(.|\n)*ids='key'(.|\n)*npz"),
    "no such ids": (bad(ids="kex"), DataError, r"no entry 'kex'(.|\n)*batch 0(.|\n)*'x', 'key'"),
    "ids of no dict": (
        bad(ids="id", data=[torch.ones(2, 1)], step=rows_of(lambda b: b)),
        DataError,
        r"no entry 'id'(.|\n)*got: +Tensor",
    ),
    "too few ids": (bad(ids=lambda b: b["key"][1:]), DataError, r"not one for each(.|\n)*\(4,\)(.|\n)*int64\[3\]"),
    "ids of rank 2": (bad(ids="x"), DataError, r"not one for each sample(.|\n)*batch\['x'\], batch 0"),
    "ids of objects": (bad(ids=lambda b: [None] * 4), DataError, r"numbers or texts(.|\n)*object"),
    "a number": (bad(step=rows_of(lambda b: b["x"].mean())), DataError, r"not a row for each(.|\n)*outputs, batch 0"),
    "another length": (
        bad(step=rows_of(lambda b: {"a": b["x"], "b": b["x"][:3]})),
        DataError,
        r"not a row for each(.|\n)*outputs\['b'\], batch 0(.|\n)*dimension of 4(.|\n)*float64\[3, 3\]",
    ),
    "nothing": (bad(step=rows_of(lambda b: None)), DataError, r"gives nothing(.|\n)*got: +None"),
    "no tensor": (bad(step=rows_of(lambda b: {"a": "text"})), DataError, r"not a row for each(.|\n)*got: +str"),
    "a dict in npy": (bad("out.npy", step=rows_of(lambda b: {"a": b["x"]})), DataError, r"one array(.|\n)*'a': tensor"),
    "a tuple in npz": (bad(step=rows_of(lambda b: (b["x"], b["x"]))), DataError, r"columns of a file are named"),
    "a nested dict": (bad("out.parquet", step=rows_of(lambda b: {"a": {"b": b["x"]}})), DataError, r"'a': dict"),
    "the name id": (bad(step=rows_of(lambda b: {"id": b["x"]})), DataError, r"has the name 'id'"),
    "sparse": (bad(step=rows_of(lambda b: b["x"].to_sparse())), DataError, r"not dense(.|\n)*to_dense"),
    "other names": (
        bad(step=rows_of(lambda b: {str(int(b["key"][0])): b["x"]})),
        DataError,
        r"other names(.|\n)*id, 100(.|\n)*id, 104",
    ),
    "other dtypes": (
        bad("out.parquet", step=rows_of(lambda b: b["x"].float() if b["key"][0] > 100 else b["x"])),
        DataError,
        r"not like those(.|\n)*list<(.|\n)*double(.|\n)*float",
    ),
    "no data": (bad(data=[]), DataError, r"ft.write_predictions: the data has no batches"),
    "no batches": (bad(data=lambda epoch: iter(())), DataError, r"ft.write_predictions: the data has no batches"),
    "limit": (bad(limit=0), LimitError, r"ft.write_predictions: limit=0"),
    "params": (bad(params="ema"), StateError, r"ft.write_predictions: the state has no averaged parameters 'ema'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path, state, step, arrays, case):
    (to, own, data, rest), error, text = BAD[case]
    if isinstance(to, str):
        to = tmp_path / to
    if data is None:
        data, rest = arrays, {"batch_size": 4, **rest}
    with pytest.raises(error, match=text):
        ft.write_predictions(to, state, own or step, data, **EAGER, **rest)
    assert left(tmp_path) == []


def test_a_folder_is_no_file(tmp_path, state, step, arrays):
    (tmp_path / "out.npz").mkdir()
    with pytest.raises(OutputError, match="a folder is no file"):
        ft.write_predictions(tmp_path / "out.npz", state, step, arrays, batch_size=4, **EAGER)


def test_no_state(step, arrays):
    with pytest.raises(StateError, match=r"ft.write_predictions wants a TrainState"):
        ft.write_predictions(print, {"w": 1}, step, arrays, batch_size=4, **EAGER)


def test_without_pyarrow(tmp_path, state, step, arrays, monkeypatch):
    real = builtins.__import__

    def gone(name, *args, **kwargs):
        if name.partition(".")[0] == "pyarrow":
            raise ImportError("No module named 'pyarrow'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", gone)
    with pytest.raises(OutputError, match=r"not installed(.|\n)*pip install pyarrow"):
        ft.write_predictions(tmp_path / "out.parquet", state, step, arrays, batch_size=4, **EAGER)
    assert ft.write_predictions(tmp_path / "out.npz", state, step, arrays, batch_size=4, **EAGER) == ROWS
