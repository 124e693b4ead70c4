"""The pictures decode, show what they should show, and refuse what cannot be drawn."""

import math
import sys
from itertools import pairwise

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from peft_pst import plots
from peft_pst.masking import num_pruned
from peft_pst.patterns import topk_mask
from peft_pst.plots import BLUE, VERMILLION, plot_kept_weights, plot_layer_sparsity, plot_training
from peft_pst.report import LayerSparsity, SparsityReport
from peft_pst.schedule import cubic_sparsity


def pixels(path):
    """(height, width, 3) in [0, 1]."""
    assert path.read_bytes().startswith(b"\x89PNG")
    return plt.imread(path)[..., :3]


def share_of(image, color):
    return float((np.abs(image - np.array(to_rgb(color))).max(-1) < 0.02).mean())


def make_report(blocks, missed=(), target=0.9, kinds=("attn.q", "mlp.up")):
    rows = []
    for block in range(blocks):
        for kind in kinds:
            promised = num_pruned(400, target)
            zeros = 100 if (block, kind) in missed else promised
            rows.append(LayerSparsity(f"model.layers.{block}.{kind}", (20, 20), zeros, promised, target))
    return SparsityReport("tiny", tuple(rows))


@pytest.mark.parametrize("blocks", [1, 6, pytest.param(150, marks=pytest.mark.slow)])
def test_more_sparsity_is_more_blue_and_misses_stand_out(tmp_path, blocks):
    shares = []
    for target in (0.3, 0.9):
        image = pixels(plot_layer_sparsity(make_report(blocks, target=target), tmp_path / "x.png"))
        assert image.shape[1] == 1280
        assert share_of(image, VERMILLION) == 0
        shares.append(share_of(image, BLUE))
    # Three times the zeros, in a picture that is otherwise the same.
    assert shares[1] / shares[0] == pytest.approx(3, rel=0.15)
    image = pixels(plot_layer_sparsity(make_report(blocks, missed=[(0, "mlp.up")]), tmp_path / "x.png"))
    assert share_of(image, VERMILLION) > 0


def test_every_layer_is_drawn_at_its_height(tmp_path, monkeypatch):
    figures = keep_figures(monkeypatch)
    report = make_report(30, missed=[(7, "attn.q")])
    plot_layer_sparsity(report, tmp_path / "x.png")
    heights = {}
    for axes in figures[-1].axes:
        bars = axes.containers[1]
        kind = axes.texts[0].get_text()
        heights[kind] = [round(bar.get_height()) for bar in bars]
        assert [round(bar.get_x() + bar.get_width() / 2) for bar in bars] == list(range(30))
    assert heights == {"attn.q": [90] * 7 + [25] + [90] * 22, "mlp.up": [90] * 30}


def test_many_kinds_and_repeated_block_numbers_share_one_strip(tmp_path, monkeypatch):
    figures = keep_figures(monkeypatch)
    report = make_report(3, kinds=[f"{letter}.up" for letter in "abcdefghijklmnopqrst"])
    plot_layer_sparsity(report, tmp_path / "x.png")
    assert len(figures[-1].axes) == 1
    assert len(figures[-1].axes[0].containers[1]) == 60
    assert "order of the model" in figures[-1].axes[0].get_xlabel()


def keep_figures(monkeypatch):
    figures = []
    write = plots._write
    monkeypatch.setattr(plots, "_write", lambda figure, path: [figures.append(figure), write(figure, path)][1])
    return figures


def matrix_area(image, figure):
    """The pixels of the mask itself, without its frame."""
    height, width = image.shape[:2]
    box = figure.axes[0].get_position()
    rows = slice(round((1 - box.y1) * height) + 2, round((1 - box.y0) * height) - 2)
    return image[rows, round(box.x0 * width) + 2 : round(box.x1 * width) - 2]


@pytest.mark.parametrize("shape", [(8, 12), (40, 10), (5, 60)])
def test_dark_pixels_are_the_kept_weights(tmp_path, monkeypatch, shape):
    figures = keep_figures(monkeypatch)
    torch.manual_seed(0)
    mask = topk_mask(torch.randn(shape), 0.6)
    image = pixels(plot_kept_weights(mask, tmp_path / "x.png"))
    area = matrix_area(image, figures[-1]).mean(-1)
    rows = ((torch.arange(shape[0]) + 0.5) / shape[0] * area.shape[0]).long()
    columns = ((torch.arange(shape[1]) + 0.5) / shape[1] * area.shape[1]).long()
    drawn = torch.tensor(area < 0.5)[rows][:, columns]
    assert torch.equal(drawn, mask)
    assert figures[-1].axes[0].get_ylim() == (shape[0], 0)


def test_a_large_mask_shows_where_weights_are_kept(tmp_path, monkeypatch):
    figures = keep_figures(monkeypatch)
    torch.manual_seed(0)
    mask = topk_mask(torch.randn(900, 500) + torch.linspace(0, 3, 500), 0.8)
    image = pixels(plot_kept_weights(mask, tmp_path / "x.png"))
    area = torch.tensor(1 - matrix_area(image, figures[-1]).mean(-1))
    drawn = torch.nn.functional.adaptive_avg_pool2d(area[None].float(), (9, 10)).flatten()
    kept = torch.nn.functional.adaptive_avg_pool2d(mask[None].float(), (9, 10)).flatten()
    assert torch.corrcoef(torch.stack([drawn, kept]))[0, 1] > 0.97


def test_marginals_are_the_kept_shares(tmp_path, monkeypatch):
    figures = keep_figures(monkeypatch)
    mask = torch.tensor([[True, True, False, True], [False, False, False, True]])
    plot_kept_weights(mask, tmp_path / "x.png")
    above, beside = figures[-1].axes[1:3]
    assert above.patches[0].get_data().values.tolist() == [50, 50, 0, 100]
    assert beside.patches[0].get_data().values.tolist() == [75, 25]
    assert above.lines[0].get_ydata()[0] == pytest.approx(50)


def test_tiles_at_the_edge_are_means_of_what_is_there():
    kept = torch.arange(35.0).reshape(5, 7)
    expected = [[kept[i : i + 2, j : j + 3].mean().item() for j in (0, 3, 6)] for i in (0, 2, 4)]
    torch.testing.assert_close(plots._tile_means(kept, (2, 3)), torch.tensor(expected))


def make_history(steps=200, evaluated=True):
    history = []
    for step in range(10, steps + 1, 10):
        sparsity = cubic_sparsity(step, steps, target_sparsity=0.9)
        history.append({"loss": math.exp(-step / 100), "learning_rate": 1e-3, "step": step, "sparsity": sparsity})
        if evaluated and step % 50 == 0:
            metrics = {"eval_loss": 0.4, "eval_accuracy": step / 400, "eval_runtime": 1.5, "eval_steps_per_second": 2.0}
            history.append({**metrics, "step": step, "sparsity": sparsity})
    return [*history, {"train_loss": 0.3, "train_runtime": 9.0, "step": steps}]


def test_the_training_picture_draws_every_logged_value(tmp_path, monkeypatch):
    figures = keep_figures(monkeypatch)
    history = make_history()
    image = pixels(plot_training(history, tmp_path / "x.png"))
    assert share_of(image, BLUE) > 0.001
    loss, evaluation, sparsity = figures[-1].axes
    assert list(loss.lines[0].get_ydata()) == [entry["loss"] for entry in history if "loss" in entry]
    assert list(loss.lines[1].get_xdata()) == [50, 100, 150, 200]
    assert list(evaluation.lines[0].get_ydata()) == [0.125, 0.25, 0.375, 0.5]
    assert [text.get_text() for text in evaluation.texts] == ["accuracy 0.5"]
    assert max(sparsity.lines[0].get_ydata()) == pytest.approx(90)
    assert len(sparsity.lines[0].get_xdata()) == 20  # one value a step, evaluation or not


def test_a_run_without_evaluation_or_sparsity_has_fewer_panels(tmp_path, monkeypatch):
    figures = keep_figures(monkeypatch)
    plot_training(make_history(evaluated=False), tmp_path / "x.png")
    assert len(figures[-1].axes) == 2
    plot_training([{"loss": 1.0, "step": 1}, {"loss": 0.5, "step": 2}], tmp_path / "x.png")
    assert len(figures[-1].axes) == 1


def test_labels_of_lines_that_end_together_do_not_overlap(tmp_path, monkeypatch):
    figures = keep_figures(monkeypatch)
    entry = {"eval_a": 0.5, "eval_b": 0.5, "eval_c": 0.5, "step": 10}
    plot_training([{**entry, "step": 5, "eval_a": 0.1}, entry], tmp_path / "x.png")
    heights = sorted(text.get_position()[1] for text in figures[-1].axes[0].texts)
    assert len(heights) == 3
    assert min(b - a for a, b in pairwise(heights)) >= 0.119


def test_what_cannot_be_drawn_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="has no layers"):
        plot_layer_sparsity(SparsityReport("empty", ()), tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"mask has the shape \(3,\)"):
        plot_kept_weights(torch.ones(3, dtype=torch.bool), tmp_path / "x.png")
    with pytest.raises(ValueError, match="neither loss nor sparsity"):
        plot_training([{"train_runtime": 1.0, "step": 3}], tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = plot_layer_sparsity(make_report(2), tmp_path / "x.png")
    before = path.read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        plot_layer_sparsity(make_report(3), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_drawing_leaves_matplotlib_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    plot_layer_sparsity(make_report(2), tmp_path / "x.png")
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == []


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'peft-pst\[cli\]'"):
        plot_layer_sparsity(make_report(2), tmp_path / "x.png")
