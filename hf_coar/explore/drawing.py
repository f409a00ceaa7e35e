"""Pieces of HTML: numbers, bars, heat maps, cards. Colours are CSS variables, so that light and dark both work."""

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor

POSITIVE, NEGATIVE = (0, 114, 178), (213, 94, 0)  # Okabe and Ito's blue and vermillion, as in `plots`
MOST_CELLS = 128  # of a row of a heat map; more components share cells
_FADED = 0.12  # the faintest visible cell


def number(value: float, digits: int = 3, signed: bool = True) -> str:
    """A number with its sign, with a real minus."""
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return text.replace("-", "−")


def digits(largest: float) -> int:
    """Decimals that give the largest of some numbers three significant ones."""
    return min(9, max(2, 2 - math.floor(math.log10(largest)))) if largest > 0 else 2


_POWERS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def scale(largest: float) -> tuple[float, str]:
    """For a table of small numbers: by what to multiply them, and the power of ten that goes before their unit."""
    if not 0 < largest < 0.1:
        return 1.0, ""
    exponent = -3 * math.ceil(-math.log10(largest) / 3)
    return 10.0**-exponent, f"10{str(exponent).translate(_POWERS)} "


def percent(fraction: float) -> str:
    """Such as `93.8 %`."""
    return f"{100 * fraction:.1f} %"


def button(act: str, value: object, inner: str, classes: str = "coar-link", label: str = "", more: str = "") -> str:
    """A native button, so that Tab, Enter and Space work; `inner` is HTML."""
    aria = f' aria-label="{escape(label)}"' if label else ""
    return (
        f'<button type="button" class="{classes}" data-act="{act}" data-value="{escape(str(value))}"{aria}{more}>'
        f"{inner}</button>"
    )


def wrapped(inner: str) -> str:
    """HTML in the explorer's own style."""
    return f'<div class="coar">{inner}</div>'


def figure(name: str, value: str, unit: str) -> str:
    """A number that is read from afar, with what it is beneath."""
    return f'<div class="coar-figure"><b>{value}</b><span>{escape(f"{name}, {unit}")}</span></div>'


def note(text: str) -> str:
    """A quiet line; `text` is plain."""
    return f'<p class="coar-note">{escape(text)}</p>'


def warning(text: str) -> str:
    """Something that went wrong; `text` is plain."""
    return f'<p class="coar-warning" role="alert">{escape(text)}</p>'


def heading(text: str) -> str:
    """Of a part of a view."""
    return f"<h3>{escape(text)}</h3>"


# ------------------------------------------------------------------------------------------------------------ images


def data_uri(image: Any) -> str:
    """A PIL image as the address of itself."""
    written = io.BytesIO()
    image.save(written, format="PNG")
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()


def thumbnail(image: Any, size: int) -> str:
    """A PIL image, not wider or higher than `size` pixels, as an `<img>`; small ones keep their pixels."""
    small = image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB")
    if max(small.size) > size:
        small = small.copy()
        small.thumbnail((size, size))
    crisp = " coar-crisp" if max(image.size) < 64 else ""
    return f'<img class="coar-image{crisp}" src="{data_uri(small)}" alt="">'


def image_of(pixels: Tensor) -> Any:
    """Pixel values float [channels, height, width] as an image, stretched to their own range."""
    from PIL import Image

    pixels = pixels.detach().float().cpu()
    low, high = float(pixels.min()), float(pixels.max())
    levels = ((pixels - low) / max(high - low, 1e-12) * 255).round().to(torch.uint8)
    if len(levels) in (3, 4):
        return Image.fromarray(levels[:3].permute(1, 2, 0).contiguous().numpy())
    return Image.fromarray(levels[0].numpy())


# ---------------------------------------------------------------------------------------------------------- heat map


@dataclass(frozen=True)
class Strip:
    """A row of a heat map.

    Attributes:
        name: of the layer or module.
        first: its first component.
        values: float32 [components of the row].
    """

    name: str
    first: int
    values: Tensor


def heat_map(strips: Sequence[Strip], unit: str, kind: str = "components") -> str:
    """Components by layer: blue where keeping them raises the output, orange where it lowers it."""
    binned = [_cells(strip) for strip in strips]
    every = torch.cat([values for values, _ in binned]).abs()
    top = float(every.quantile(0.995)) if len(every) else 0.0
    top = top or float(every.max()) or 1.0
    widest = max(len(values) for values, _ in binned)
    totals = [float(strip.values.sum()) for strip in strips]
    largest = max(map(abs, totals)) or 1.0
    rows = [
        _strip_row(strip, values, chosen, top, widest, total, largest)
        for strip, (values, chosen), total in zip(strips, binned, totals, strict=True)
    ]
    shared = sum(len(values) < len(strip.values) for strip, (values, _) in zip(strips, binned, strict=True))
    what = f"one cell is one of the {kind}" if not shared else f"in long rows a cell sums up neighbouring {kind}"
    return (
        f'<div class="coar-heat" data-unit="{escape(unit)}" role="group" aria-label="heat map by layer" tabindex="0">'
        f'<div class="coar-heat-row coar-heat-head"><span></span><span>{escape(what)}; click to open</span>'
        f"<span>layer total, {escape(unit)}</span></div>{''.join(rows)}"
        f'<div class="coar-key"><span>−{top:.2g}</span><span class="coar-ramp" aria-hidden="true"></span>'
        f"<span>+{top:.2g} {escape(unit)}</span>"
        f'<output class="coar-hover" aria-live="off"></output></div></div>'
    )


def _cells(strip: Strip) -> tuple[Tensor, Tensor]:
    """Values of the cells, and for each the component that a click on it opens: the strongest one in it."""
    n = len(strip.values)
    per_cell = -(-n // MOST_CELLS)
    n_cells = -(-n // per_cell)
    padded = torch.zeros(n_cells * per_cell)
    padded[:n] = strip.values
    padded = padded.view(n_cells, per_cell)
    strongest = padded.abs().argmax(1) + torch.arange(n_cells) * per_cell
    return padded.sum(1), strip.first + strongest.clamp_max(n - 1)


def _strip_row(
    strip: Strip, values: Tensor, chosen: Tensor, top: float, widest: int, total: float, largest: float
) -> str:
    width = max(6.0, 100 * len(values) / widest)
    data = json.dumps([float(f"{value:.4g}") for value in values.tolist()])
    sign = "pos" if total >= 0 else "neg"
    return (
        f'<div class="coar-heat-row"><span class="coar-heat-name" title="{escape(strip.name)}">'
        f"{escape(short(strip.name))}</span>"
        f'<span class="coar-strip" style="width:{width:.1f}%" data-name="{escape(strip.name)}" data-values="{data}" '
        f'data-first="{strip.first}" data-components="{json.dumps(chosen.tolist())}">'
        f'<img alt="" src="{_strip_image(values, top)}"></span>'
        f'<span class="coar-total"><span class="coar-total-bar coar-{sign}" '
        f'style="width:{45 * abs(total) / largest:.1f}%"></span>{number(total, digits(largest))}</span></div>'
    )


def _strip_image(values: Tensor, top: float) -> str:
    """One pixel a cell: the hue is the sign and the opacity the size, so that 0 is the page's own colour."""
    from PIL import Image

    alpha = (values.abs() / top).clamp(0, 1)
    alpha = torch.where(alpha > 0, _FADED + (1 - _FADED) * alpha, alpha)
    colour = torch.where((values >= 0)[:, None], torch.tensor(POSITIVE), torch.tensor(NEGATIVE))
    pixels = torch.cat([colour, (255 * alpha).round().long()[:, None]], dim=1).to(torch.uint8)
    return data_uri(Image.fromarray(pixels[None].contiguous().numpy(), mode="RGBA"))


def short(name: str, longest: int = 26) -> str:
    """A dotted name that fits into a column; its end tells more than its beginning."""
    return name if len(name) <= longest else "…" + name[-longest + 1 :]


# -------------------------------------------------------------------------------------------------------------- bars


def whisker_bar(value: float, error: float | None, largest: float, one_sided: bool = False) -> str:
    """A bar with a line of two standard errors to either side; from the middle, or from the left if one-sided."""
    zero, reach = (2.0, 114.0) if one_sided else (60.0, 56.0)
    value_there = abs(value) if one_sided else value
    end = zero + reach * value_there / largest
    low, high = sorted((zero, end))
    sign = "pos" if value >= 0 else "neg"
    parts = [f'<rect class="coar-{sign}" x="{low:.1f}" y="4" width="{max(high - low, 0.5):.1f}" height="8"/>']
    if error:
        half = reach * 2 * error / largest
        left, right = max(0.0, end - half), min(120.0, end + half)
        parts.append(f'<path class="coar-whisker" d="M{left:.1f} 8H{right:.1f}M{left:.1f} 5V11M{right:.1f} 5V11"/>')
    return (
        f'<svg class="coar-bar" viewBox="0 0 120 16" preserveAspectRatio="none" aria-hidden="true">{"".join(parts)}'
        f'<path class="coar-axis" d="M{zero:.0f} 1V15"/></svg>'
    )


def fraction_bar(fraction: float, classes: str = "coar-plain") -> str:
    """A bar of a probability or an accuracy."""
    return f'<span class="coar-track"><span class="{classes}" style="width:{100 * fraction:.1f}%"></span></span>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], classes: str = "", caption: str = "") -> str:
    """A table of HTML cells; the first of every row is its heading."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    said = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<table class="coar-table {classes}">{said}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def scatter(x: Tensor, y: Tensor, labels: tuple[str, str], marked: int | None = None) -> str:
    """Points with the line on which both are the same; `marked` is drawn larger."""
    size, pad = 240, 34
    both = torch.cat([x, y, torch.zeros(1)])
    low, high = float(both.min()), float(both.max())
    span = (high - low) or 1.0
    low, high = low - 0.05 * span, high + 0.05 * span

    def place(value: float) -> float:
        return pad + (size - pad - 6) * (value - low) / (high - low)

    dots = "".join(
        f'<circle class="coar-dot{" coar-marked" if i == marked else ""}" cx="{place(a):.1f}" '
        f'cy="{size - place(b):.1f}" r="{5 if i == marked else 2.5}"/>'
        for i, (a, b) in enumerate(zip(x.tolist(), y.tolist(), strict=True))
    )
    zero, places = place(0.0), digits(span) - 1
    return (
        f'<svg class="coar-scatter" viewBox="0 0 {size} {size}" role="img" '
        f'aria-label="{escape(labels[0])} against {escape(labels[1])}">'
        f'<path class="coar-grid" d="M{zero:.1f} 6V{size - pad}M{pad} {size - zero:.1f}H{size - 6}"/>'
        f'<path class="coar-same" d="M{pad} {size - pad}L{size - 6} 6"/>{dots}'
        f'<text x="{(size + pad) / 2}" y="{size - 6}" text-anchor="middle">{escape(labels[0])}</text>'
        f'<text transform="translate(11 {(size - pad) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(labels[1])}</text>"
        f'<text x="{pad}" y="{size - pad + 13}" text-anchor="start">{number(low, places)}</text>'
        f'<text x="{size - 6}" y="{size - pad + 13}" text-anchor="end">{number(high, places)}</text></svg>'
    )


def histogram(values: Tensor, unit: str, n_bins: int = 31) -> str:
    """How many examples have which weight; the bins to the right of 0 are blue."""
    reach = float(values.abs().max()) or 1.0
    counts = torch.histc(values, bins=n_bins, min=-reach, max=reach).tolist()
    most, width = max(counts) or 1.0, 300 / n_bins
    places = digits(reach)
    bars = "".join(
        f'<rect class="coar-{"pos" if i > n_bins // 2 else "neg" if i < n_bins // 2 else "zero"}" '
        f'x="{i * width + 0.5:.1f}" y="{70 - 66 * count / most:.1f}" width="{width - 1:.1f}" '
        f'height="{66 * count / most:.1f}"/>'
        for i, count in enumerate(counts)
        if count
    )
    return (
        f'<svg class="coar-histogram" viewBox="0 0 300 88" role="img" aria-label="weights over the examples">{bars}'
        f'<path class="coar-axis" d="M0 70H300M150 66V74"/><text x="0" y="84">{number(-reach, places)}</text>'
        f'<text x="150" y="84" text-anchor="middle">0</text>'
        f'<text x="300" y="84" text-anchor="end">{number(reach, places)} {escape(unit)}</text></svg>'
    )
