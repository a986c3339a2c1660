"""What the report draws: charts in units of their plot area, and pictures as data URIs.

A chart has no pixels and no colours: positions are percentages of the plot area, so that the page
stretches the lines to any width while its text keeps its size, and colours follow light and dark.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

HISTOGRAM_BINS = 80  # over cosines from -1 to 1
DRAWN_POINTS = 400  # of a line: more than a screen shows
DOTTED_POINTS = 12  # of a line: up to here each of them is marked
FLATTEST = 1e-3  # scale for its values: on a shorter one, ticks of 6 digits would read the same

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """A scale: `low` is at 0 % of the plot area, `high` at 100 %."""

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def between(cls, label: str, low: float, high: float) -> Axis:
        """The scale from `low` to `high`, with the round values between them."""
        ticks = _round_values(low, high)
        return cls(label, low, high, tuple(tick for tick in ticks if low <= tick <= high))

    @classmethod
    def around(cls, label: str, low: float, high: float) -> Axis:
        """The smallest scale with round ends that holds `low` and `high`, equal or not."""
        length = FLATTEST * (max(abs(low), abs(high)) or 1)
        margin = max(0.0, length - (high - low)) / 2
        ticks = _round_values(low - margin, high + margin)
        return cls(label, ticks[0], ticks[-1], ticks)

    def percent(self, value: float) -> float:
        """Where a value is."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)


@dataclass(frozen=True)
class Mark:
    """A line or an area of a chart.

    Attributes:
        label: what it shows.
        style: its class in the page's style sheet.
        path: the `d` of an SVG path in a plot area of 100 x 100, y downwards.
        dots: the same of points to be drawn with round caps.
    """

    label: str
    style: str
    path: str
    dots: str = ""


@dataclass(frozen=True)
class Chart:
    """Marks on two scales; `summary` says in words what they show."""

    title: str
    summary: str
    x: Axis
    y: Axis
    marks: tuple[Mark, ...]


def _round_values(low: float, high: float) -> tuple[float, ...]:
    values = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return tuple(float(value) for value in values)


def line_chart(title: str, y_label: str, lines: Mapping[str, tuple[str, Points]]) -> Chart | None:
    """A quantity over the steps of training.

    Args:
        title: what is shown.
        y_label: its name and unit.
        lines: name -> (style, points); those without points are left out.

    Returns:
        None where no line has a point.
    """
    lines = {name: line for name, line in lines.items() if line[1]}
    if not lines:
        return None
    steps, values = zip(*(point for _, points in lines.values() for point in points), strict=True)
    x = Axis.between("step", 0, max(1, *steps))
    y = Axis.around(y_label, min(values), max(values))
    marks, summary = [], []
    for name, (style, points) in lines.items():
        every = max(1, math.ceil((len(points) - 1) / (DRAWN_POINTS - 2)))
        shown = [*points[:-1:every], points[-1]]
        at = [f"{x.percent(step)} {100 - y.percent(value):.2f}" for step, value in shown]
        dots = "".join(f"M{position}h0" for position in at) if len(at) <= DOTTED_POINTS else ""
        marks.append(Mark(name, style, "M" + "L".join(at), dots))
        (first, start), (last, end) = points[0], points[-1]
        summary.append(f"{name}: {start:.3g} at step {first:g}, {end:.3g} at step {last:g}")
    return Chart(title, f"{title}, {y_label}. {'; '.join(summary)}.", x, y, tuple(marks))


def histogram(values: Tensor) -> NDArray[np.int64]:
    """Counts of cosines in `HISTOGRAM_BINS` equal bins from -1 to 1; rounding beyond is clipped."""
    counts, _ = np.histogram(values.clamp(-1, 1).numpy(), HISTOGRAM_BINS, (-1, 1))
    return counts


def histogram_chart(title: str, cosines: Mapping[str, Tensor], low: float) -> Chart:
    """The histograms of Fig. 5 from `low` on, each in shares of its own peak.

    The kinds of pairs are the styles. A kind without a pair is left out.
    """
    edges = np.linspace(-1, 1, HISTOGRAM_BINS + 1)
    x = Axis.between("cosine", low, 1)
    y = Axis.between("share of its peak", 0, 1)
    marks, means = [], []
    for kind, values in cosines.items():
        if not len(values):
            continue
        counts = histogram(values)
        first, last = np.flatnonzero(counts)[[0, -1]]
        steps = zip(counts[first : last + 1], edges[first + 1 : last + 2], strict=True)
        path = f"M{x.percent(edges[first])} 100" + "".join(
            f"V{100 - y.percent(count / counts.max()):.2f}H{x.percent(right)}"
            for count, right in steps
        )
        marks.append(Mark(kind, kind, path + "V100"))
        means.append(f"{kind} {values.mean():.2f}")
    return Chart(title, f"Cosines of pairs; means: {', '.join(means)}.", x, y, tuple(marks))


def overlays(picture: NDArray[np.uint8], masks: Tensor) -> list[Image.Image]:
    """Masks over the grey picture, in viridis: violet where they are closed, yellow where open.

    The contrast is stretched from the lowest to the highest value of all the masks given, which
    are therefore comparable with each other and with nothing else.

    Args:
        picture: (H, W, 3), what the network saw.
        masks: (M, h, w), one of each learner.
    """
    low, high = masks.min(), masks.max()
    stretched = (masks - low) / (high - low).clamp(min=torch.finfo(masks.dtype).tiny)
    size = (picture.shape[1], picture.shape[0])
    grey = np.asarray(Image.fromarray(picture).convert("L"), np.float32)[..., None] / 255
    images = []
    for mask in stretched:
        smooth = Image.fromarray(mask.float().numpy()).resize(size, Image.Resampling.BICUBIC)
        colours = colormaps["viridis"](np.asarray(smooth).clip(0, 1))[..., :3]
        images.append(Image.fromarray((255 * (0.45 * grey + 0.55 * colours)).astype(np.uint8)))
    return images


def selective_channels(masks: Tensor, count: int) -> list[int]:
    """The channels in which learners differ most in where they look.

    By the variance over learners, where a learner that opens or closes a channel as a whole has
    no share: the mean over the places of an image is taken off first.

    Args:
        masks: (B, M, K, h, w), of one network.
        count: how many of the K channels.
    """
    pattern = masks - masks.mean(dim=(-2, -1), keepdim=True)
    variance = pattern.var(dim=1, correction=0).mean(dim=(0, 2, 3))  # (K,)
    return variance.topk(min(count, len(variance))).indices.tolist()


def sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures of one size in rows, which may differ in length, as one picture on white."""
    width, height = rows[0][0].size
    whole = Image.new("RGB", (width * max(map(len, rows)), height * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            whole.paste(picture, (x * width, y * height))
    return whole


def data_uri(image: Image.Image, side: int) -> str:
    """A picture within `side` x `side` pixels as a URI that holds it."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=78, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def series(log: Iterable[Mapping[str, object]], key: str, factor: float = 1) -> Points:
    """(step, value) of the lines of a metrics.jsonl that have a number of that name."""
    return [
        (float(line["step"]), factor * float(line[key]))  # type: ignore[arg-type]
        for line in log
        if line.get(key) is not None
    ]
