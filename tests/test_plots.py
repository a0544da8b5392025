"""Curves: what is drawn where is read off the figure; that it looks well was seen by eye."""

import io
import re
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
from matplotlib.figure import Figure

import ftrain
from ftrain.sinks import History, Record
from ftrain.sinks.plots import curves

PARENT = str(Path(ftrain.__file__).parents[1])


def history(*, steps=12, every=4):
    """Training records at each step, evaluations after each epoch of `every` steps."""
    records = []
    for step in range(1, steps + 1):
        records.append(Record(step, step // every, 8 * step, 0.5 * step, "train", {"loss": 1 / step, "lr": 0.1 * step}))
        if step % every == 0:
            metrics = {"loss": 2 / step, "accuracy": step / 20, "confusion": np.eye(2)}
            records.append(Record(step, step // every, 8 * step, 0.5 * step, "val", metrics))
            records.append(Record(step, step // every, 8 * step, 0.5 * step, "test", {"loss": 3 / step}))
    return History(records)


def lines(axes):
    """The labelled lines of a panel by their labels."""
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def of(*values):
    return History([Record(i, 0, i, i, "train", {"loss": value}) for i, value in enumerate(values, 1)])


def test_one_panel_per_metric_training_and_evaluators_together():
    figure = history().plot()
    assert isinstance(figure, Figure)
    assert (
        len({axes.get_xlim() for axes in figure.axes}) == 1
    )  # so that panels can be compared, though val begins later
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "lr", "accuracy"]  # no confusion: it is no number
    loss, lr, accuracy = map(lines, figure.axes)
    assert list(loss) == ["train", "val", "test"]
    assert list(lr) == ["train"]
    assert list(accuracy) == ["val"]
    np.testing.assert_array_equal(loss["train"].get_xydata(), [(step, 1 / step) for step in range(1, 13)])
    np.testing.assert_array_equal(loss["val"].get_xydata(), [(4, 0.5), (8, 0.25), (12, 2 / 12)])
    np.testing.assert_array_equal(accuracy["val"].get_xydata(), [(4, 0.2), (8, 0.4), (12, 0.6)])


def test_legend_markers_and_colours():
    loss, lr, accuracy = history().plot().axes
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["train", "val", "test"]
    assert [text.get_text() for text in lr.get_legend().get_texts()] == ["train"]
    assert {name: line.get_marker() for name, line in lines(loss).items()} == {"train": "None", "val": "o", "test": "o"}
    assert len({line.get_color() for line in lines(loss).values()}) == 3
    assert lines(accuracy)["val"].get_color() == lines(loss)["val"].get_color()


def test_training_comes_first_though_an_evaluation_was_recorded_first():
    records = [Record(0, 0, 0, 0, "val", {"loss": 2.0}), Record(1, 0, 1, 1, "train", {"loss": 1.0})]
    found = lines(curves(records).axes[0])
    assert list(found) == ["train", "val"]
    assert [line.get_color() for line in found.values()] == ["C0", "C1"]


@pytest.mark.parametrize("names", [("lr", "loss"), ("lr", "loss", "lr")], ids=str)
def test_metrics_are_drawn_as_asked_for(names):
    assert [axes.get_ylabel() for axes in history().plot(*names).axes] == ["lr", "loss"]


def test_one_name_may_be_a_string():
    assert [axes.get_ylabel() for axes in curves(history(), "lr").axes] == ["lr"]


@pytest.mark.parametrize(
    ("x", "label", "places"),
    [("step", "step", [4, 8]), ("samples", "samples", [32, 64]), ("seconds", "time (s)", [2, 4])],
)
def test_axes(x, label, places):
    axes = history(steps=8).plot("loss", x=x).axes[0]
    assert axes.get_xlabel() == label
    np.testing.assert_array_equal(lines(axes)["val"].get_xdata(), places)


def test_records_within_an_epoch_are_spread_over_it():
    axes = history(steps=10).plot("loss", x="epoch").axes[0]
    assert axes.get_xlabel() == "epoch"
    np.testing.assert_allclose(lines(axes)["train"].get_xdata(), np.arange(1, 11) / 4)
    np.testing.assert_array_equal(lines(axes)["val"].get_xdata(), [1, 2])


def test_epochs_of_a_resumed_run_and_of_one_that_just_began():
    late = [Record(step, epoch, 0, 0, "train", {"loss": 1}) for step, epoch in [(50, 5), (55, 5), (60, 6), (65, 6)]]
    np.testing.assert_allclose(lines(curves(late, x="epoch").axes[0])["train"].get_xdata(), [5, 5.5, 6, 6.5])
    early = [Record(step, 0, 0, 0, "train", {"loss": 1}) for step in (1, 2)]
    np.testing.assert_allclose(lines(curves(early, x="epoch").axes[0])["train"].get_xdata(), [0, 0])
    empty = [Record(4, 1, 0, 0, "train", {"loss": 1}), Record(4, 2, 0, 0, "train", {"loss": 1})]  # an epoch of no steps
    np.testing.assert_allclose(lines(curves(empty, x="epoch").axes[0])["train"].get_xdata(), [1, 1])
    back = [*late, Record(52, 5, 0, 0, "train", {"loss": 1})]  # rolled back
    np.testing.assert_allclose(lines(curves(back, x="epoch").axes[0])["train"].get_xdata(), [5, 5.5, 6, 6.5, 5.2])


def test_smoothing_is_a_mean_with_falling_weights_before_a_faint_curve():
    axes = of(4.0, 2.0, float("nan"), 1.0).plot(smooth=0.5).axes[0]
    raw, smoothed = axes.get_lines()
    np.testing.assert_array_equal(raw.get_ydata(), [4, 2, np.nan, 1])
    assert raw.get_alpha() < 0.5
    assert raw.get_color() == smoothed.get_color()
    assert smoothed.get_label() == "train"
    expected = [4, (2 + 4 / 2) / (1 + 1 / 2), np.nan, (1 + 2 / 2 + 4 / 4) / (1 + 1 / 2 + 1 / 4)]
    np.testing.assert_allclose(smoothed.get_ydata(), expected)


def test_evaluations_are_not_smoothed():
    with_, without = (lines(history().plot("loss", smooth=smooth).axes[0])["val"] for smooth in (0.9, 0.0))
    np.testing.assert_array_equal(with_.get_ydata(), without.get_ydata())


def test_what_is_not_finite_leaves_a_gap():
    inf, nan = float("inf"), float("nan")
    line = lines(of(1.0, 2.0, inf, 3.0, nan, -inf, 4.0, 5.0).plot().axes[0])["train"]
    np.testing.assert_array_equal(line.get_ydata(), [1, 2, nan, 3, nan, nan, 4, 5])
    assert line.get_marker() == "."
    assert line.get_markevery() == [3]  # a point to which no line leads would not be seen


def test_a_single_point_is_seen():
    line = lines(of(1.0).plot().axes[0])["train"]
    assert (line.get_marker(), line.get_markevery()) == (".", [0])


def test_logarithmic_values():
    axes = of(100.0, 0.0, -1.0, 1.0).plot(log=True).axes[0]
    assert axes.get_yscale() == "log"
    np.testing.assert_array_equal(lines(axes)["train"].get_ydata(), [100, np.nan, np.nan, 1])
    axes.figure.draw_without_rendering()
    assert {"1", "10", "100"} <= {label.get_text() for label in axes.get_yticklabels()}
    assert history().plot("loss").axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("log", [False, True])
def test_a_panel_without_finite_values_says_so(log):
    figure = History([Record(1, 0, 1, 1, "train", {"loss": float("nan"), "lr": 0.1})]).plot(log=log)
    assert [text.get_text() for text in figure.axes[0].texts] == ["no finite values"]
    assert not figure.axes[1].texts
    figure.savefig(io.BytesIO())


@pytest.mark.parametrize(
    ("panels", "grid"), [(1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (4, (2, 2)), (5, (2, 3)), (8, (3, 3))]
)
def test_the_grid_is_tidy(panels, grid):
    names = [f"metric_{i}" for i in range(panels)]
    figure = History([Record(i, 0, i, i, "train", dict.fromkeys(names, i)) for i in range(3)]).plot()
    assert len(figure.axes) == panels
    assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == grid
    labelled = [axes.get_xlabel() == "step" for axes in figure.axes]
    assert labelled == [i + grid[1] >= panels for i in range(panels)]  # the lowest of each column
    if panels == 1:
        assert tuple(figure.get_size_inches()) == (6, 4)


def test_nothing_covers_anything():
    figure = history().plot(smooth=0.5)
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    legends = [axes.get_legend().get_window_extent() for axes in figure.axes]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
        assert legends[i].ymin > figure.axes[i].get_window_extent().ymax - 1  # above the panel, to a pixel
        assert figure.bbox.padded(1).contains(*box.min)
        assert figure.bbox.padded(1).contains(*box.max)


@pytest.mark.parametrize(("suffix", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_figure_is_saved_in_the_format_of_the_suffix(tmp_path, suffix, begins):
    path = tmp_path / "not" / "yet" / f"curves.{suffix}"
    curves(history(), path=path)
    assert path.read_bytes().startswith(begins)
    history().plot(path=str(path))


def test_the_picture_has_ink():
    figure = history().plot("loss")
    data, size = figure._repr_png_()
    assert size == {"width": 600, "height": 400}
    from matplotlib.image import imread

    pixels = imread(io.BytesIO(data))
    assert pixels.shape[:2] == (800, 1200)
    assert 0.01 < np.mean(pixels[..., :3].min(-1) < 0.9) < 0.2


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["los"], {}, r"no record has a number called 'los'(?s:.*)expected: 'loss' or 'lr' or 'accuracy'"),
        (["confusion"], {}, r"no record has a number called 'confusion'"),
        (
            ["val/loss"],
            {},
            r"'val/loss'(?s:.*)cause: +a panel is named for the metric alone(?s:.*)fix: +history.plot\('loss'\)",
        ),
        ([], {"x": "time"}, r"no axis 'time'(?s:.*)expected: 'step' or 'epoch' or 'samples' or 'seconds'"),
        ([], {"smooth": 1.0}, r"expected: 0 <= smooth < 1\n +got: +1.0"),
        ([], {"smooth": -0.1}, r"got: +-0.1"),
        ([], {"smooth": float("nan")}, r"got: +nan"),
    ],
    ids=["unknown", "no number", "with its evaluator", "axis", "smooth=1", "smooth<0", "smooth=nan"],
)
def test_errors_name_what_there_is(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        history().plot(*arguments, **options)


@pytest.mark.parametrize(
    "records", [[], [Record(1, 0, 1, 1.0, "val", {"confusion": np.eye(2)})]], ids=["no records", "no numbers"]
)
def test_nothing_to_draw(records):
    with pytest.raises(ValueError, match=r"there is nothing to draw(?s:.*)log=ft.every\(steps=1\)"):
        History(records).plot()


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plots need matplotlib(?s:.*)fix: +pip install 'ftrain\[plot\]'"):
        history().plot()


# ------------------------------------------------------------------------------------------------- no state, no display


def test_no_pyplot_is_imported():
    code = """
import sys
from ftrain.sinks import History, Record
assert "matplotlib" not in sys.modules
History([Record(i, 0, i, i, "train", {"loss": 1.0}) for i in range(3)]).plot()._repr_png_()
assert "matplotlib.figure" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""
    run = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": PARENT}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


CELL = """
from ftrain.sinks import History, Record
figure = History([Record(i, 0, i, i, "train", {"loss": 1.0}) for i in range(3)]).plot()
figure
"""


@pytest.mark.parametrize("inline", ["", "%matplotlib inline\n"], ids=["bare", "inline"])
def test_jupyter_displays_the_figure_once(monkeypatch, inline):
    monkeypatch.setenv("PYTHONPATH", PARENT)
    monkeypatch.delenv("MPLBACKEND", raising=False)
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(inline + CELL)]
    nbclient.NotebookClient(book, timeout=60, kernel_name="python3").execute()
    (output,) = book.cells[0].outputs
    assert output["output_type"] == "execute_result"
    assert re.match(r"iVBORw0KGgo", output["data"]["image/png"])  # PNG, in base64
    if not inline:
        assert output["metadata"]["image/png"] == {"width": 600, "height": 400}
