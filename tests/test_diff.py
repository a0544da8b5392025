"""`ft.diff`: laws over pairs of trees, and what it says of each kind of difference."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ftrain as ft
from ftrain.errors import ArgumentError, DonatedStateError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int64,
    torch.uint8,
    torch.bool,
]


def only(found):
    (change,) = found.changes
    return change


def a_state(width=3):
    model = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
    torch.manual_seed(0)
    return ft.init(model, ft.optim.adam(1e-2))


def trees():
    values = st.one_of(
        st.floats(width=32),
        st.integers(-5, 5),
        st.booleans(),
        st.lists(st.floats(width=32), max_size=4).map(lambda xs: torch.tensor(xs, dtype=torch.float32)),
    )
    return st.recursive(
        values,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
            st.tuples(inner, inner),
        ),
        max_leaves=6,
    )


@given(trees())
def test_a_tree_does_not_differ_from_itself_or_a_copy(one):
    copy = ft.tree.map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, one)
    assert not ft.diff(one, one)
    assert not ft.diff(one, copy)


@given(trees(), trees())
def test_it_is_symmetric_and_swaps_missing_and_extra(one, two):
    there, back = ft.diff(one, two), ft.diff(two, one)
    assert bool(there) == bool(back)
    swap = {"missing": "extra", "extra": "missing"}
    assert {(c.path, c.kind) for c in there if c.kind != "structure"} == {
        (c.path, swap.get(c.kind, c.kind)) for c in back if c.kind != "structure"
    }
    assert {c.max_abs for c in there} == {c.max_abs for c in back}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_changed_element_of_each_dtype_is_found(dtype):
    a = torch.zeros(3, 4).to(dtype)
    b = a.clone()
    b[1, 2] = True if dtype is torch.bool else 1
    change = only(ft.diff({"w": a}, {"w": b}))
    assert (change.path, change.kind, change.count, change.size) == ("tree['w']", "values", 1, 12)
    assert change.first == (1, 2)
    assert (change.max_abs, change.max_rel) == (1.0, 1.0)
    assert not ft.diff(b, b.clone())


def test_how_far_apart():
    a = torch.tensor([1.0, 2.0, -4.0, 8.0])
    change = only(ft.diff(a, torch.tensor([1.0, 2.5, -4.0, 4.0])))
    assert (change.count, change.max_abs, change.max_rel, change.first) == (2, 4.0, 0.5, (1,))
    assert (change.a, change.b) == ("2", "2.5")


def test_bits_decide_unless_a_tolerance_is_given():
    a, b = torch.tensor([0.0, 1.0]), torch.tensor([-0.0, math.nextafter(1.0, 2.0)])
    assert only(ft.diff(a[:1], b[:1])).count == 1
    assert not ft.diff(a[:1], b[:1], atol=1e-12)
    x, y = torch.tensor([1.0, 100.0]), torch.tensor([1.5, 101.0])
    assert only(ft.diff(x, y, rtol=0.02)).first == (0,)
    assert only(ft.diff(x, y, atol=0.6)).first == (1,)
    assert not ft.diff(x, y, rtol=0.02, atol=0.5)
    assert ft.diff(torch.tensor([3]), torch.tensor([5]), atol=1)
    assert not ft.diff(torch.tensor([3]), torch.tensor([5]), atol=2)
    assert not ft.diff(1.0, 1.25, atol=0.25)
    assert ft.diff(1.0, 1.25)


def test_nan_is_nan_and_nothing_else():
    nan, inf = math.nan, math.inf
    assert not ft.diff(torch.tensor([nan, inf, -inf]), torch.tensor([-nan, inf, -inf]))
    assert not ft.diff(nan, nan)
    change = only(ft.diff(torch.tensor([nan, inf, 1.0]), torch.tensor([1.0, -inf, 1.0]), atol=1e9))
    assert (change.count, change.max_abs) == (2, inf)
    assert ft.diff(nan, 1.0, rtol=1.0)


@pytest.mark.parametrize(
    ("a", "b", "kind", "text"),
    [
        ({"x": 1}, {}, "missing", "tree['x']  missing: int"),
        ({}, {"x": torch.zeros(2)}, "extra", "tree['x']  extra: float32[2] on cpu"),
        ([torch.zeros(2)], [torch.zeros(3)], "shape", "tree[0]  shape: (2,) -> (3,)"),
        ([torch.zeros(2)], [torch.zeros(2).double()], "dtype", "tree[0]  dtype: torch.float32 -> torch.float64"),
        ([1], [1.0], "type", "tree[0]  type: int -> float"),
        (["a"], ["b"], "values", "tree[0]  'a' -> 'b'"),
        ([1, 2], (1, 2), "structure", "structure: list with 2 entries -> tuple with 2 entries"),
        ({"a": ()}, {"a": None}, "structure", "structure: "),
        (
            [np.arange(2)],
            [np.array([0, 3])],
            "values",
            "tree[0]  1 of 2 elements, max abs 2, max rel 0.67, first at [1]: 1 -> 3",
        ),
        (torch.tensor(2), torch.tensor(4), "values", "tree  2 -> 4  (abs 2, rel 0.5)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_kind(a, b, kind, text):
    change = only(ft.diff(a, b))
    assert change.kind == kind
    assert text in str(change)


class Pair(NamedTuple):
    one: torch.Tensor
    two: torch.Tensor


def test_paths_are_code():
    pair = Pair(torch.zeros(2), torch.ones(1))
    change = only(ft.diff([pair], [pair._replace(two=torch.zeros(1))]))
    assert change.path == "tree[0].two"


def test_states_after_a_step_largest_difference_first():
    model, tx = nn.Linear(4, 2), ft.optim.adam(1e-2)
    state = ft.init(model, tx)
    step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    new, _ = step(state, torch.randn(8, 4))
    found = ft.diff(state, new)
    assert {"state.step", "state.samples", "state.params['weight']", "state.params['bias']"} <= {c.path for c in found}
    assert found.changes[0].path == "state.samples"
    sizes = [change.max_abs for change in found]
    assert sizes == sorted(sizes, reverse=True)
    assert found.leaves == len(ft.tree.leaves(state))
    assert not ft.diff(state, state.copy())


def test_forms_come_before_values_and_the_text_stays_short():
    a = {f"w{i:03}": torch.tensor([float(i)]) for i in range(200)}
    b = {key: value + 1 for key, value in a.items() if key != "w000"} | {"w001": torch.zeros(2)}
    found = ft.diff(a, b)
    assert [change.kind for change in found][:2] == ["missing", "shape"]
    lines = repr(found).splitlines()
    assert lines[0] == "Diff(200 of 200 leaves differ)"
    assert len(lines) == 14
    assert lines[-1] == "  ... and 188 more, in .changes"
    assert repr(ft.diff(a, a)) == "Diff(no difference in 200 leaves)"
    assert len(found) == 200


def test_other_optimizers_differ_by_what_is_missing():
    model = nn.Linear(2, 2)
    found = ft.diff(ft.init(model, ft.optim.adam(1e-2)), ft.init(model, ft.optim.sgd(1e-2)))
    assert {change.kind for change in found} <= {"missing", "extra", "structure"}
    assert any(change.path.startswith("state.opt") and change.kind == "missing" for change in found)


def test_views_and_transposed_tensors_are_compared_by_value():
    x = torch.arange(6.0).reshape(2, 3)
    assert not ft.diff(x.t(), x.t().contiguous())
    assert only(ft.diff(x.t(), (x.t() * 2).contiguous())).count == 5
    z = torch.tensor([1 + 2j, 3 + 1j])
    assert not ft.diff(z.conj(), torch.tensor([1 - 2j, 3 - 1j]))
    assert not ft.diff(z.conj().imag, torch.tensor([-2.0, -1.0]))


def test_empty_tensors_and_gradients():
    assert not ft.diff(torch.zeros(0, 3), torch.zeros(0, 3))
    w = torch.ones(2, requires_grad=True)
    assert not ft.diff(w, torch.ones(2))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ft.diff([1.0], [1.0], rtol=-1), ArgumentError, r"rtol=-1 is no tolerance"),
        (lambda: ft.diff([1.0], [1.0], atol=math.nan), ArgumentError, r"atol=nan is no tolerance"),
        (lambda: ft.diff([1.0], [1.0], atol=True), ArgumentError, r"atol=True is no tolerance"),
        (lambda: ft.diff(nn.Linear(1, 1), nn.Linear(1, 1)), ArgumentError, r"this is a module(.|\n)*state_dict"),
        (
            lambda: ft.diff([torch.zeros(1, device="meta")], [1]),
            ArgumentError,
            r"this leaf has none.\n  where:    tree\[0\]",
        ),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_a_donated_state_says_so():
    model, tx = nn.Linear(2, 1), ft.optim.sgd(0.1)
    state = ft.init(model, tx)
    kept = state.copy()
    ft.compile(ft.train_step(model, lambda m, b: m(b).mean(), tx), rung="eager")(state, torch.ones(2, 2))
    with pytest.raises(DonatedStateError, match=r"ft\.diff"):
        ft.diff(kept, state)
