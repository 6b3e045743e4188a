"""The report's pictures, from recorded results: rooflines, ratios to PyTorch, and images a second.

Which pictures there are is decided without matplotlib, so that the text that shows them needs none either;
it is imported where one is drawn.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .recorded import Cell, Key, contributing, shown, shown_dtype
from .schema import DIRECTIONS, LEVELS, OPPONENTS, RIVALS, short_model
from .tables import LEVEL_TITLES, OPPONENT_TITLES, direction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNAVAILABLE = (
    'the plots need matplotlib: pip install "fastmixer[demo]", or ask for the tables alone with --no-plots'
)
COLORS = {name: f"C{index}" for names in (OPPONENTS, LEVELS) for index, name in enumerate(names)}
MARKERS = dict(zip(LEVELS, "vs^oD", strict=True))
MIN_GROUPS = 4  # of bars that an axis has room for, lest one model's bars fill the sheet
LABEL_GAP = 0.032  # between two labels beside the roofline, of the height of its axes


@dataclass(frozen=True)
class Plot:
    """A picture: its file's name, what it shows and of which cells, and what draws it."""

    name: str
    title: str
    cells: Sequence[Cell]
    draw: Callable[[Plot], Figure]

    def figure(self) -> Figure:
        """Draws it; ImportError without matplotlib."""
        return self.draw(self)

    @property
    def heading(self) -> str:
        """The title over the picture: what, then where, when and on which code it was measured."""
        runs = contributing(self.cells)
        code = "; ".join(dict.fromkeys(f"{run.when:%Y-%m-%d}, commit {run.commit}" for run in runs))
        return f"{self.title}\n{textwrap.fill(f'{runs[0].gpu}, {code}', 90)}"


def planned(cells: Sequence[Cell]) -> list[Plot]:
    """The pictures of one GPU, in the order to show them: of one dtype, a set per direction."""
    timed = [cell for cell in cells if cell.opponents]
    dtype = shown_dtype(timed)
    plots = []
    for way in DIRECTIONS:
        subject, suffix = f"{dtype}, {direction(way)}", f"{dtype}-{way.replace('_', '-')}.png"
        here = [cell for cell in timed if cell.key.dtype == dtype and cell.key.direction == way]
        models = [cell for cell in shown(here) if cell.key.level == "model"]
        plots.append(Plot(f"images-{suffix}", f"Images a second, {subject}", models, _draw_images))
        for level in ("block", "model"):
            raced = [c for c in here if c.key.level == level and c.content["best_opponent"]]
            title = f"{LEVEL_TITLES[level]} against PyTorch, {subject}"
            plots.append(Plot(f"ratio-{level}-{suffix}", title, raced, _draw_ratios))
        placed = _with_place(shown(here))
        plots.append(Plot(f"roofline-{suffix}", f"Roofline of fused, {subject}", placed, _draw_roofline))
    return [plot for plot in plots if plot.cells]


# ---- bars ------------------------------------------------------------------------------------------------


def _draw_images(plot: Plot) -> Figure:
    figure, (axes,) = _sheet(4.8)
    names = [f"{short_model(cell.key.model)}\nbatch {cell.key.batch}" for cell in plot.cells]
    values = {name: [cell.figure(name, "images_per_s") for cell in plot.cells] for name in OPPONENTS}
    _bars(axes, names, values, label="{:,.0f}")
    _legend([axes])
    axes.set(title=plot.heading, xlabel="Model (ViT: of the same size)", ylabel="Images/s")
    return figure


def _draw_ratios(plot: Plot) -> Figure:
    """A panel per batch: how many times longer PyTorch takes."""
    batches = sorted({cell.key.batch for cell in plot.cells})
    models = list(dict.fromkeys(cell.key.model for cell in plot.cells))
    ratios = {
        (cell.key.batch, cell.key.model, name): cell.ratio(name) for cell in plot.cells for name in RIVALS
    }
    figure, panels = _sheet(1.2 + 2.3 * len(batches), len(batches))
    for axes, batch in zip(panels, batches, strict=True):
        values = {name: [ratios.get((batch, model, name)) for model in models] for name in RIVALS}
        _bars(axes, [short_model(model) for model in models], values, label="{:.2f}")
        axes.axhline(1, color="black", linewidth=1, linestyle="--")
        axes.set(ylabel="Time / fused time", title=f"Batch {batch}; above the line fused is faster")
    panels[-1].set_xlabel("Model")
    _legend(panels)
    figure.suptitle(plot.heading)
    return figure


def _sheet(height: float, panels: int = 1) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    return figure, figure.subplots(panels, sharex=True, sharey=True, squeeze=False)[:, 0]


def _bars(axes: Axes, groups: Sequence[str], values: Mapping[str, Sequence], *, label: str) -> None:
    """Grouped bars, one per value that is not None, with its figure above it."""
    values = {name: row for name, row in values.items() if any(value is not None for value in row)}
    width = 0.84 / max(len(values), 1)
    for index, (name, row) in enumerate(values.items()):
        at = [group + (index - (len(values) - 1) / 2) * width for group in range(len(row))]
        kept = [(x, value) for x, value in zip(at, row, strict=True) if value is not None]
        bars = axes.bar(*zip(*kept, strict=True), width, label=OPPONENT_TITLES[name], color=COLORS[name])
        axes.bar_label(bars, [label.format(value) for _, value in kept], fontsize=6, rotation=90, padding=2)
    axes.set_xticks(range(len(groups)), groups)
    room = max(0, MIN_GROUPS - len(groups)) / 2
    axes.set_xlim(-0.5 - room, len(groups) - 0.5 + room)
    axes.margins(y=0.25)


def _legend(panels: Sequence[Axes]) -> None:
    """Beside the first panel, where no bar is, of all who have a bar in any."""
    bars = {bars.get_label(): bars for axes in panels for bars in axes.containers}
    panels[0].legend(
        bars.values(), bars.keys(), loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False
    )


# ---- roofline --------------------------------------------------------------------------------------------


def _with_place(cells: Iterable[Cell]) -> list[Cell]:
    """The cells that have a place in a roofline plot, and of the kernels those of one model, to have room."""
    placed = [cell for cell in cells if _ceilings(cell) and _point(cell)]
    models = [cell.key.model for cell in placed if cell.key.level == "kernel"]
    one = "mixer_b16_224" if "mixer_b16_224" in models else next(iter(models), None)
    return [cell for cell in placed if cell.key.level != "kernel" or cell.key.model == one]


def _ceilings(cell: Cell) -> tuple[float, float] | None:
    """TFLOP/s of a product and GB/s of a copy, as the cell's run measured them."""
    ceilings = cell.run.content["ceilings"] or {}
    product = ceilings.get(cell.key.dtype)
    return product and (product["product_tflop_per_s"], ceilings["copy_gb_per_s"])


def _point(cell: Cell) -> tuple[float, float] | None:
    """FLOP/byte and TFLOP/s of fused; None where a logarithmic axis has no place for it."""
    flops, moved = cell.content["flops"], cell.content["bytes"]
    reached = cell.figure("fused", "tflop_per_s")
    return (flops / moved, reached) if flops and moved and reached else None


def _draw_roofline(plot: Plot) -> Figure:
    """The ceilings of every run that has a cell in it, and a labelled point per cell."""
    from matplotlib.ticker import LogFormatter

    figure, (axes,) = _sheet(7)
    points = {cell.key: _point(cell) for cell in plot.cells}
    roofs = list(dict.fromkeys(_ceilings(cell) for cell in plot.cells))
    ridges = [product * 1e3 / copy for product, copy in roofs]
    xs, ys = zip(*points.values(), strict=True)
    left, right = min(*ridges, *xs) / 2, max(*ridges, *xs) * 2
    top = max(*ys, *(product for product, _ in roofs)) * 1.5
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(min(ys) / 2, top))
    axes.set(xlabel="Arithmetic intensity, FLOP/byte (as the report counts both)", ylabel="TFLOP/s")
    axes.set_title(plot.heading)
    for (product, copy), ridge in zip(roofs, ridges, strict=True):
        label = f"measured ceilings: {copy:,.0f} GB/s, {product:,.0f} TFLOP/s"
        axes.plot([left, ridge, right], [left * copy / 1e3, product, product], color="black", label=label)
    for level, marker in MARKERS.items():
        here = [point for key, point in points.items() if key.level == level]
        if here:
            look = {"marker": marker, "color": COLORS[level], "label": LEVEL_TITLES[level]}
            axes.scatter(*zip(*here, strict=True), **look, zorder=3)
    _label_beside(axes, points)
    axes.grid(True, which="both", linewidth=0.3)
    for axis in (axes.xaxis, axes.yaxis):  # 200, not 2 x 10^2
        axis.set_major_formatter(LogFormatter())
        axis.set_minor_formatter(LogFormatter())
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _label_beside(axes: Axes, points: Mapping[Key, tuple[float, float]]) -> None:
    """A column of labels to the right of the axes, each with a line to its point: points may lie anywhere."""
    ordered = sorted(points.items(), key=lambda item: item[1][1])
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [to_axes.transform(point)[1] for _, point in ordered]
    for (key, point), height in zip(ordered, spread(heights, LABEL_GAP), strict=True):
        color = COLORS[key.level]
        axes.annotate(
            f"{key.op or key.level} {short_model(key.model)} x{key.batch}",
            point,
            (1.03, height),
            textcoords="axes fraction",
            fontsize=7,
            va="center",
            color=color,
            arrowprops={"arrowstyle": "-", "relpos": (0, 0.5), "linewidth": 0.4, "color": color},
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Moves ascending places within 0..1 apart, to ``gap`` or what there is room for, and no further."""
    gap = min(gap, 1 / max(len(places) - 1, 1))
    moved: list[float] = []
    for index, place in enumerate(places):
        room = 1 - gap * (len(places) - 1 - index)  # the later ones need the rest
        moved.append(min(max(place, moved[-1] + gap if moved else 0), room))
    return moved
