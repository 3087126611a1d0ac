from __future__ import annotations

import warnings

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from training import plots


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures, once they are saved."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *a, **k: figures.append(figure) or save(figure, *a, **k)
    )
    return figures


def test_confusion_plot_shows_shares_of_rows_and_counts(tmp_path, drawn):
    matrix = [[30, 10, 0], [0, 0, 0], [1, 1, 2]]
    plots.plot_confusion(tmp_path / "c.png", matrix, ("a", "b", "c"))
    axes = drawn[0].axes[0]
    expected = [[0.75, 0.25, 0], [0, 0, 0], [0.25, 0.25, 0.5]]
    np.testing.assert_array_equal(axes.images[0].get_array(), expected)
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {(c, r): str(matrix[r][c]) for r in range(3) for c in range(3)}
    assert axes.get_ylabel() == "labelled" and axes.get_xlabel() == "predicted"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]


def test_reliability_plot_leaves_empty_bins_out(tmp_path, drawn):
    bins = {"confidence": [None, 0.6, 0.9], "accuracy": [None, 0.5, 1.0], "count": [0, 2, 4]}
    plots.plot_reliability(tmp_path / "r.png", bins, 0.1)
    upper, lower = drawn[0].axes
    bars = [(bar.get_x(), bar.get_height()) for bar in upper.patches]
    np.testing.assert_allclose(bars, [(1 / 3, 0.5), (2 / 3, 1.0)])
    assert [bar.get_height() for bar in lower.patches] == [0, 2, 4]
    np.testing.assert_array_equal(upper.lines[1].get_xydata(), [(0.6, 0.5), (0.9, 1.0)])


@pytest.mark.parametrize("scores", [{}, {"accuracy": 0.5, "macro_f1": 0.4}])
def test_curves_show_the_loss_and_the_scores_that_there_are(scores, tmp_path, drawn):
    history = [{"epoch": n, "loss": 2 / n, **scores} for n in (1, 2, 3)]
    title = "student, my $\\frac{ faces"  # no formula: the name comes from a file
    plots.plot_curves(tmp_path / "c.png", history, title, "holdout")
    left, *right = drawn[0].axes
    assert left.get_title() == title
    np.testing.assert_array_equal(left.lines[0].get_xydata(), [(1, 2), (2, 1), (3, 2 / 3)])
    labels = [line.get_label() for axes in right for line in axes.lines]
    assert labels == [f"{name} on holdout" for name in ("accuracy", "macro-F1")[: len(scores)]]
    (legend,) = (axes.get_legend() for axes in drawn[0].axes[-1:])
    assert [text.get_text() for text in legend.get_texts()] == ["training loss", *labels]
    with Image.open(tmp_path / "c.png") as image:
        assert image.format == "PNG"


def test_heat_lies_on_the_place_that_it_is_about():
    heat = np.zeros((32, 32))
    heat[:16, :16] = 1  # top left
    figure = Figure(figsize=(4, 2), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    plots.draw_heat_map(axes, np.full((32, 32, 3), 128, np.uint8), heat)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba()).astype(int)  # (200, 400, 4): image, then heat
    assert (pixels[20:180, 20:180, :3] == 128).all()
    red, _, blue, _ = np.moveaxis(pixels, -1, 0)
    assert (red - blue)[20:80, 220:280].min() > 20
    for rows, columns in ((slice(20, 80), slice(320, 380)), (slice(120, 180), slice(220, 380))):
        assert (blue - red)[rows, columns].min() > 20


def test_letters_that_no_font_has_are_one_line(tmp_path, capsys, recwarn):
    """Class names are the folders', in any language; U+E000 is nobody's letter."""
    plots.plot_confusion(
        tmp_path / "c.png", [[1, 0], [0, 1]], ("na\u00efve \ue000", "\ue001\ue002")
    )
    said = capsys.readouterr().err
    assert said.startswith(f"note: {tmp_path / 'c.png'}: some names") and said.count("\n") == 1
    assert not list(recwarn)
    plots.plot_confusion(tmp_path / "d.png", [[1, 0], [0, 1]], ("na\u00efve", "b"))
    assert capsys.readouterr().err == ""


def test_other_warnings_of_a_plot_are_kept(tmp_path):
    with pytest.warns(UserWarning, match="odd"), plots._figure(tmp_path / "x.png", 1, 1):
        warnings.warn("odd", UserWarning, stacklevel=1)


def test_fonts_of_the_system_follow_the_usual_one(monkeypatch):
    wide = plots._WIDE_FONTS[1]
    monkeypatch.setattr("matplotlib.font_manager.get_font_names", lambda: ["A", wide])
    assert plots._fonts()[-1] == wide and len(plots._fonts()) == 2
