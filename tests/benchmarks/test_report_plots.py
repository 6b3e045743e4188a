"""The report's pictures, from sample results: what there is, its labels, and that it is no empty sheet."""

import copy
import sys

import pytest
import sample_results as sample
from matplotlib.text import Text
from PIL import Image

from benchmarks import plots, recorded, report

FULL = [
    f"{name}-bfloat16-{way}.png"
    for way in ("forward", "forward-backward")
    for name in ("images", "ratio-block", "ratio-model", "roofline")
]


def planned(tmp_path, *contents):
    for index, content in enumerate(contents):
        sample.write(tmp_path, content, f"{index}.json")
    runs = recorded.read_all([tmp_path / sample.SLUG])
    return {plot.name: plot for plot in plots.planned(recorded.newest_cells(runs))}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Every picture of the full sample run, as a matplotlib Figure."""
    folder = tmp_path_factory.mktemp("results")
    return {name: plot.figure() for name, plot in planned(folder, sample.full_run()).items()}


def test_a_full_run_has_every_picture(drawn):
    assert list(drawn) == FULL


@pytest.mark.parametrize("name", FULL)
def test_axes_are_labelled_and_the_title_tells_gpu_date_and_commit(drawn, name):
    figure = drawn[name]
    assert all(axes.get_ylabel() for axes in figure.axes)
    assert figure.axes[-1].get_xlabel()
    titles = [axes.get_title() for axes in figure.axes] + [figure.get_suptitle()]
    heading = next(title for title in titles if "Sample GPU" in title)
    assert "2001-02-03" in heading and "commit 0123456789" in heading and "bfloat16" in heading
    assert figure.legends or figure.axes[0].get_legend()


def test_the_roofline_has_logarithmic_axes_a_ceiling_and_a_label_each_cell(drawn):
    figure = drawn["roofline-bfloat16-forward.png"]
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert "FLOP/byte" in axes.get_xlabel() and axes.get_ylabel() == "TFLOP/s"
    (ceiling,) = axes.get_lines()
    (left, ridge, _), (low, top, end) = ceiling.get_data()
    assert ridge == 250.0 and top == end == 1000.0 and low == pytest.approx(left * 4)
    labels = [text.get_text() for text in axes.texts]
    assert len(labels) == len({*labels}) == 4 * len(sample.MODELS) + len(sample.OPS)
    assert "block B/16 x100" in labels and "channel_fc1 B/16 x100" in labels
    points = [tuple(map(float, point)) for dots in axes.collections for point in dots.get_offsets()]
    assert len(points) == len(labels)
    block = sample.cell()
    assert (block["flops"] / block["bytes"], pytest.approx(225.0)) in points


def test_the_rooflines_labels_do_not_overlap(drawn):
    figure = drawn["roofline-bfloat16-forward.png"]
    figure.draw_without_rendering()
    # Of the text alone: an annotation's own extent has the line to its point in it.
    boxes = [Text.get_window_extent(label) for label in figure.axes[0].texts]
    boxes.sort(key=lambda box: box.y0)
    assert all(above.y0 >= below.y1 for below, above in zip(boxes, boxes[1:], strict=False))
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_bars_have_the_ratios_heights(drawn):
    panels = drawn["ratio-block-bfloat16-forward.png"].axes
    assert ["Batch 10" in panels[0].get_title(), "Batch 100" in panels[1].get_title()] == [True, True]
    for axes in panels:
        heights = {bars.get_label(): {round(bar.get_height(), 6) for bar in bars} for bars in axes.containers}
        assert heights == {"eager": {2.0}, "torch.compile": {1.6}, "max-autotune": {1.25}}


def test_images_per_second_include_vit(drawn):
    (axes,) = drawn["images-bfloat16-forward.png"].axes
    heights = {bars.get_label(): bars[0].get_height() for bars in axes.containers}
    assert heights["fused"] == pytest.approx(100 / 12e-3)
    assert heights["ViT"] == pytest.approx(100 / 36e-3)
    assert axes.get_ylabel() == "Images/s"


def test_the_files_are_pictures_with_something_on_them(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    folder = sample.write(
        tmp_path / "results", sample.run([sample.cell(), sample.cell(level="model")])
    ).parent
    assert report.main(["--readme", str(readme), "--results", str(tmp_path / "results")]) == 0
    names = [path.name for path in sorted(folder.glob("*.png"))]
    assert names == sorted(FULL[:4])
    assert not list(folder.glob("*.tmp"))
    for name in names:
        assert f"]({name})" in (folder / "REPORT.md").read_text()
        with Image.open(folder / name) as image:
            width, height = image.size
            colors = {color: count for count, color in image.convert("RGB").getcolors(width * height)}
        assert height > 400 and width > 1000
        assert colors[255, 255, 255] < 0.99 * width * height
        assert len(colors) > 50


def test_what_was_not_measured_makes_no_picture(tmp_path):
    assert list(planned(tmp_path, sample.run([sample.red()]))) == []
    assert list(planned(tmp_path, sample.run(ceilings=None))) == ["ratio-block-bfloat16-forward.png"]


def test_a_missing_opponent_leaves_a_gap_and_a_red_cell_too(tmp_path):
    lonely = sample.cell()
    for name in ("compile", "compile_max_autotune"):
        del lonely["opponents"][name]
    few = sample.judged(copy.deepcopy(lonely) | {"batch": 10})
    cells = [few, sample.judged(lonely), sample.cell("mixer_s16_224"), sample.red(model="mixer_l16_224")]
    plot = planned(tmp_path, sample.run(cells))["ratio-block-bfloat16-forward.png"]
    panels = plot.figure().axes
    counts = [{bars.get_label(): len(bars) for bars in axes.containers} for axes in panels]
    assert counts == [{"eager": 1}, {"eager": 2, "torch.compile": 1, "max-autotune": 1}]
    legend = [text.get_text() for text in panels[0].get_legend().get_texts()]
    assert legend == ["eager", "torch.compile", "max-autotune"]


def test_the_ceilings_of_every_run_are_drawn_and_the_title_names_both(tmp_path):
    faster = sample.run(
        [sample.cell("mixer_s16_224")],
        updated="2001-03-01T00:00:00+00:00",
        ceilings={"bfloat16": {"product_tflop_per_s": 2000.0}, "copy_gb_per_s": 4000.0},
    )
    plot = planned(tmp_path, sample.run(), faster)["roofline-bfloat16-forward.png"]
    assert len(plot.figure().axes[0].get_lines()) == 2
    assert "2001-03-01" in plot.heading and "2001-02-03" in plot.heading


def test_without_matplotlib_the_tables_and_the_comparison_work_and_plots_are_asked_for_in_vain(
    tmp_path, monkeypatch, capsys
):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    path = sample.write(tmp_path / "results", sample.run())
    options = ["--readme", str(readme), "--results", str(tmp_path / "results")]
    assert report.main(options) == 2
    assert 'pip install "fastmixer[demo]"' in capsys.readouterr().err
    assert readme.read_text() == f"{report.BEGIN}\n{report.END}\n"
    assert report.main([*options, "--no-plots"]) == 0
    assert "One block" in readme.read_text()
    assert report.main(["--compare", str(path), str(path)]) == 0


@pytest.mark.parametrize(
    ("places", "spread"),
    [
        ([], []),
        ([0.5], [0.5]),
        ([0.1, 0.9], [0.1, 0.9]),
        ([0.5, 0.5, 0.5], [0.5, 0.6, 0.7]),
        ([1.0, 1.0, 1.0], [0.8, 0.9, 1.0]),
        ([0.0] * 21, [index / 20 for index in range(21)]),
    ],
)
def test_labels_are_spread(places, spread):
    assert plots.spread(places, 0.1) == pytest.approx(spread)
