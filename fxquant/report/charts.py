"""Charts of the page as SVG: numbers in, markup out. Colours are the page's, by class; no text of a file enters here.

Every number that is written is one of ours, formatted, so that the markup can be marked as safe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fxquant.quantizers.statistics.outline import BINS, DECADES, Outline

_WIDTH, _HEIGHT, _TICK = 200.0, 44.0, 6.0
_TALLEST = 255


def histogram(outline: Outline, levels: Sequence[float] | None) -> Markup:
    """Bars of a histogram over ticks at the levels; bars that no level reaches are paler. Heights are logarithmic."""
    span = outline.high - outline.low
    width = _WIDTH / BINS
    reached: list[str] = []
    cut: list[str] = []
    for index, height in enumerate(outline.heights):
        if height:
            up = -height / _TALLEST * _HEIGHT
            bar = f"M{index * width:.1f} {_HEIGHT:.0f}v{up:.1f}h{width - 0.6:.1f}V{_HEIGHT:.0f}z"
            centre = outline.low + (index + 0.5) * span / BINS
            is_cut = levels is not None and not levels[0] - span / BINS <= centre <= levels[-1] + span / BINS
            (cut if is_cut else reached).append(bar)
    parts = [f'<path class="bars" d="{"".join(reached)}"/>', f'<path class="bars cut" d="{"".join(cut)}"/>']
    if levels is not None:
        places = [(level - outline.low) / span * _WIDTH for level in levels]
        inside = [place for place in places if -0.5 <= place <= _WIDTH + 0.5]
        if len(levels) > 2:
            ticks = "".join(f"M{place:.1f} {_HEIGHT + 1.5:.1f}v{_TICK:.0f}" for place in inside)
            parts.append(f'<path class="ticks" d="{ticks}"/>')
        else:
            low, high = max(places[0], 0.0), min(places[-1], _WIDTH)
            if high > low:
                size = f'x="{low:.1f}" y="{_HEIGHT + 2.5:.1f}" width="{high - low:.1f}" height="{_TICK - 2:.0f}"'
                parts.append(f'<rect class="band" {size}/>')
    return Markup(
        f'<svg class="histogram" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT + _TICK + 2:.0f}" preserveAspectRatio="none" '
        f'aria-hidden="true">{"".join(parts)}</svg>'
    )


def share_bar(share: float) -> Markup:
    """A bar as long as the share, 0 to 1."""
    width = min(max(share, 0.0), 1.0) * 100
    return Markup(
        '<svg class="share" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="6"/><rect class="part" width="{width:.2f}" height="6"/></svg>'
    )


@dataclass(frozen=True)
class Axis:
    """Where numbers stand along one side of a chart.

    Args:
        low, high: the numbers at its ends; both above 0 where it is logarithmic.
        start, end: their places, in units of the picture.
        logarithmic: whether equal steps are equal ratios.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """The place of a number."""
        low, high, here = (math.log10(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return self.start + (here - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers between the ends."""
        if self.logarithmic:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1,) if last - first > 3 else (1, 3) if last - first > 1 else (1, 2, 5)
            every = [m * 10.0**e for e in range(first, last + 1) for m in steps]
            return [value for value in every if self.low <= value <= self.high]
        rough = (self.high - self.low) / 6
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        first = math.ceil(self.low / step)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def line_chart(
    points: Sequence[tuple[float, float]], chosen: tuple[float, float], label: str, x_name: str, y_name: str
) -> Markup:
    """A falling line over a linear axis, its losses on a logarithmic one, and a dot at what was chosen.

    Args:
        points: (budget, loss) by ascending budget, losses above 0, at least two different ones.
        chosen: the dot.
        label: what the picture says, for those who do not see it.
        x_name, y_name: words below and above the axes; fixed texts of ours.
    """
    xs, ys = ([pair[side] for pair in (*points, chosen)] for side in (0, 1))
    x = Axis(min(xs), max(xs), 62, 590)
    y = Axis(min(ys) * 0.8, max(ys) * 1.25, 236, 26, logarithmic=True)
    parts = []
    for value in x.ticks():
        parts.append(f'<path class="rule" d="M{x.at(value):.1f} 26V236"/>')
        parts.append(f'<text x="{x.at(value):.1f}" y="254" text-anchor="middle">{value:.4g}</text>')
    for value in y.ticks():
        parts.append(f'<path class="rule" d="M62 {y.at(value):.1f}H590"/>')
        parts.append(f'<text x="54" y="{y.at(value) + 4:.1f}" text-anchor="end">{value:.0e}</text>')
    line = "L".join(f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in points)
    parts.append(f'<path class="line" d="M{line}"/>')
    parts += [f'<circle class="point" cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="2.5"/>' for a, b in points]
    here = x.at(chosen[0]), y.at(chosen[1])
    anchor, shift = ("end", -10) if here[0] > 480 else ("start", 10)
    parts.append(f'<circle class="chosen" cx="{here[0]:.1f}" cy="{here[1]:.1f}" r="6"/>')
    place = f'x="{here[0] + shift:.1f}" y="{here[1] - 9:.1f}" text-anchor="{anchor}"'
    parts.append(f'<text class="strong" {place}>this model</text>')
    parts.append(f'<text x="326" y="276" text-anchor="middle">{x_name}</text>')
    parts.append(f'<text x="4" y="16">{y_name}</text>')
    return Markup(
        Markup('<svg class="chart" viewBox="0 0 600 284" role="img" aria-label="{}">').format(label)
        + Markup("".join(parts) + "</svg>")
    )


HEIGHTS = f"Heights are logarithmic: a bin with a {10**DECADES:,}th of the fullest has none."
"""What a reader of histograms has to know."""
