"""Pieces of HTML: numbers, bars, heat maps. Colours are CSS variables, so that light and dark both work.

`html` is the one place where what is shown becomes HTML: its template is written here in the source, and whatever is
put into it is escaped, unless `html` made it too. A test holds every file of the explorer to it.
"""

import base64
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup as Html
from torch import Tensor

POSITIVE, NEGATIVE = (0, 114, 178), (213, 94, 0)  # Okabe and Ito's blue and vermillion, as in `plots`
MOST_CELLS = 128  # of a row of a heat map; more components share cells
_FADED = 0.12  # the faintest visible cell


def number(value: float, digits: int = 3, signed: bool = True) -> str:
    """A number with its sign, with a real minus; a dash where there is none."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return text.replace("-", "−")


def digits(largest: float) -> int:
    """Decimals that give the largest of some numbers three significant ones."""
    return min(9, max(2, 2 - math.floor(math.log10(largest)))) if 0 < largest < math.inf else 2


_POWERS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def scale(largest: float) -> tuple[float, str]:
    """For a table of small numbers: by what to multiply them, and the power of ten that goes before their unit."""
    if not 0 < largest < 0.1:
        return 1.0, ""
    exponent = -3 * math.ceil(-math.log10(largest) / 3)
    return 10.0**-exponent, f"10{str(exponent).translate(_POWERS)} "


def html(template: str, *values: object, **named: object) -> Html:
    """A template with values in the place of its `{}`; all that is no HTML of ours is escaped, so in attributes too."""
    return Html(template).format(*values, **named)


def joined(pieces: Iterable[object]) -> Html:
    """Pieces one after the other; plain text is escaped."""
    return Html("").join(pieces)


def button(
    act: str, value: object, inner: object, classes: str = "coar-link", label: str = "", more: object = ""
) -> Html:
    """A native button, so that Tab, Enter and Space work; `more` are attributes."""
    aria = html(' aria-label="{}"', label) if label else ""
    start = html('<button type="button" class="{}" data-act="{}" data-value="{}"{}', classes, act, value, aria)
    return html("{}{}>{}</button>", start, more, inner)


def wrapped(*inner: object) -> Html:
    """HTML in the explorer's own style."""
    return html('<div class="coar">{}</div>', joined(inner))


def picture(image: object) -> Html:
    """An image that is looked at."""
    return html('<div class="coar-big">{}</div>', image)


def top(content: object, said: object, of_text: bool) -> Html:
    """An example beside what the model says of it; above it, where it is a text."""
    return html('<div class="coar-top{}">{}<div>{}</div></div>', " coar-of-text" if of_text else "", content, said)


def figure(value: object, name: object) -> Html:
    """A number that is read from afar, with what it is beneath."""
    return html('<div class="coar-figure"><b>{}</b><span>{}</span></div>', value, name)


def note(text: object) -> Html:
    """A quiet line."""
    return html('<p class="coar-note">{}</p>', text)


def warning(text: object) -> Html:
    """Something that went wrong, as the whole of a view."""
    return wrapped(html('<p class="coar-warning" role="alert">{}</p>', text))


def heading(text: object) -> Html:
    """The title of a part of a view."""
    return html("<h3>{}</h3>", text)


# ------------------------------------------------------------------------------------------------------------ images


def data_uri(image: Any) -> str:
    """A PIL image as the address of itself."""
    written = io.BytesIO()
    image.save(written, format="PNG")
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()


def thumbnail(image: Any, size: int) -> Html | None:
    """A PIL image, not wider or higher than `size` pixels, as an `<img>`; None for one that cannot be drawn."""
    try:
        small = image.copy()
        small.thumbnail((size, size))
        small = small if small.mode in ("L", "RGB", "RGBA") else _stretched(small).convert("RGB")
        address = data_uri(small)
    except (OSError, ValueError, SystemError):
        return None
    crisp = " coar-crisp" if max(image.size) < 64 else ""
    return html('<img class="coar-image{}" src="{}" alt="">', crisp, address)


def _stretched(image: Any) -> Any:
    """An image of more than 8 bits, its levels from the lowest to the highest."""
    if image.mode not in ("I", "F", "I;16", "I;16B", "I;16L"):
        return image
    image = image.convert("F")
    low, high = image.getextrema()
    return image.point(lambda level: (level - low) * (255 / max(high - low, 1e-12))).convert("L")


# ---------------------------------------------------------------------------------------------------------- heat map


@dataclass(frozen=True)
class Strip:
    """A row of a heat map."""

    name: str  # of the layer or module
    first: int  # its first component
    values: Tensor  # float32 [components of the row]


def heat_map(strips: Sequence[Strip], unit: str, kind: str = "components") -> Html:
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
    return html(
        '<div class="coar-heat" data-unit="{unit}" role="group" aria-label="heat map by layer" tabindex="0">'
        '<div class="coar-heat-row coar-heat-head"><span></span><span>{what}; click to open</span>'
        '<span>layer total, {unit}</span></div>{rows}<div class="coar-key"><span>−{top:.2g}</span>'
        '<span class="coar-ramp" aria-hidden="true"></span><span>+{top:.2g} {unit}</span>'
        '<output class="coar-hover" aria-live="off"></output></div></div>',
        unit=unit, what=what, rows=joined(rows), top=top,
    )  # fmt: skip


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
) -> Html:
    return html(
        '<div class="coar-heat-row"><span class="coar-heat-name">{whole}</span>'
        '<span class="coar-strip" style="width:{width:.1f}%" data-name="{whole}" data-values="{values}" '
        'data-first="{first}" data-components="{chosen}"><img alt="" src="{image}"></span>'
        '<span class="coar-total"><span class="coar-total-bar coar-{sign}" style="width:{part:.1f}%"></span>{total}'
        "</span></div>",
        whole=strip.name, width=max(6.0, 100 * len(values) / widest), first=strip.first,
        values=json.dumps([float(f"{value:.4g}") for value in values.tolist()]), chosen=json.dumps(chosen.tolist()),
        image=_strip_image(values, top), sign=_sign(total), part=45 * abs(total) / largest,
        total=number(total, digits(largest)),
    )  # fmt: skip


def _sign(value: float) -> str:
    return "pos" if value >= 0 else "neg"


def _strip_image(values: Tensor, top: float) -> str:
    """One pixel a cell: the hue is the sign and the opacity the size, so that 0 is the page's own colour."""
    from PIL import Image

    alpha = (values.abs() / top).clamp(0, 1)
    alpha = torch.where(alpha > 0, _FADED + (1 - _FADED) * alpha, alpha)
    colour = torch.where((values >= 0)[:, None], torch.tensor(POSITIVE), torch.tensor(NEGATIVE))
    pixels = torch.cat([colour, (255 * alpha).round().long()[:, None]], dim=1).to(torch.uint8)
    return data_uri(Image.fromarray(pixels[None].contiguous().numpy(), mode="RGBA"))


# -------------------------------------------------------------------------------------------------------------- bars


def whisker_bar(value: float, error: float | None, largest: float, one_sided: bool = False) -> Html:
    """A bar with a line of two standard errors to either side; from the middle, or from the left if one-sided."""
    zero, reach = (2.0, 114.0) if one_sided else (60.0, 56.0)
    end = zero + reach * (abs(value) if one_sided else value) / largest
    low, high = sorted((zero, end))
    whisker: object = ""
    if error:
        half = reach * 2 * error / largest
        whisker = html(
            '<path class="coar-whisker" d="M{0:.1f} 8H{1:.1f}M{0:.1f} 5V11M{1:.1f} 5V11"/>',
            max(0.0, end - half), min(120.0, end + half),
        )  # fmt: skip
    return html(
        '<svg class="coar-bar" viewBox="0 0 120 16" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="coar-{}" x="{:.1f}" y="4" width="{:.1f}" height="8"/>{}'
        '<path class="coar-axis" d="M{:.0f} 1V15"/></svg>',
        _sign(value), low, max(high - low, 0.5), whisker, zero,
    )  # fmt: skip


def fraction_bar(fraction: float, classes: str = "coar-plain") -> Html:
    """A bar of a probability or an accuracy."""
    bar = '<span class="coar-track"><span class="{}" style="width:{:.1f}%"></span></span>'
    return html(bar, classes, 100 * fraction)


def table(head: Sequence[object], rows: Sequence[Sequence[object]], classes: str = "", caption: object = "") -> Html:
    """A table; the first cell of every row is its heading."""
    top = joined(html('<th scope="col">{}</th>', cell) for cell in head)
    body = joined(
        html('<tr><th scope="row">{}</th>{}</tr>', row[0], joined(html("<td>{}</td>", cell) for cell in row[1:]))
        for row in rows
    )
    said = html("<caption>{}</caption>", caption) if caption else ""
    whole = '<table class="coar-table {}">{}<thead><tr>{}</tr></thead><tbody>{}</tbody></table>'
    return html(whole, classes, said, top, body)


# ------------------------------------------------------------------------------------------------------------ charts


def scatter(x: Tensor, y: Tensor, labels: tuple[str, str], marked: int | None = None) -> Html:
    """Points on equal axes with the line y = x; `marked` is drawn larger."""
    size, pad = 240, 34
    if not bool(torch.cat([x, y]).isfinite().all()):
        return note("nothing was measured")
    both = torch.cat([x, y, torch.zeros(1)])
    low, high = float(both.min()), float(both.max())
    span = (high - low) or 1.0
    low, high = low - 0.05 * span, high + 0.05 * span

    def place(value: float) -> float:
        return pad + (size - pad - 6) * (value - low) / (high - low)

    dots = joined(
        html(
            '<circle class="coar-dot{}" cx="{:.1f}" cy="{:.1f}" r="{}"/>',
            " coar-marked" if i == marked else "", place(a), size - place(b), 5 if i == marked else 2.5,
        )
        for i, (a, b) in enumerate(zip(x.tolist(), y.tolist(), strict=True))
    )  # fmt: skip
    places = digits(span) - 1
    return html(
        '<svg class="coar-scatter" viewBox="0 0 {size} {size}" role="img" aria-label="{across} against {up}">'
        '<path class="coar-grid" d="M{zero:.1f} 6V{bottom}M{pad} {level:.1f}H{right}"/>'
        '<path class="coar-same" d="M{pad} {bottom}L{right} 6"/>{dots}'
        '<text x="{middle}" y="{right}" text-anchor="middle">{across}</text>'
        '<text transform="translate(11 {height}) rotate(-90)" text-anchor="middle">{up}</text>'
        '<text x="{pad}" y="{below}" text-anchor="start">{low}</text>'
        '<text x="{right}" y="{below}" text-anchor="end">{high}</text></svg>',
        size=size, pad=pad, bottom=size - pad, right=size - 6, middle=(size + pad) / 2, height=(size - pad) / 2,
        below=size - pad + 13, zero=place(0.0), level=size - place(0.0), dots=dots, across=labels[0], up=labels[1],
        low=number(low, places), high=number(high, places),
    )  # fmt: skip


def histogram(values: Tensor, unit: str, n_bins: int = 31) -> Html:
    """How many examples have which weight; the bins to the right of 0 are blue."""
    reach = float(values.abs().max()) or 1.0
    counts = torch.histc(values, bins=n_bins, min=-reach, max=reach).tolist()
    most, width, places = max(counts) or 1.0, 300 / n_bins, digits(reach)
    bars = joined(
        html(
            '<rect class="coar-{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>',
            "zero" if i == n_bins // 2 else _sign(i - n_bins // 2), i * width + 0.5, 70 - 66 * count / most, width - 1,
            66 * count / most,
        )
        for i, count in enumerate(counts)
        if count
    )  # fmt: skip
    return html(
        '<svg class="coar-histogram" viewBox="0 0 300 88" role="img" aria-label="weights over the examples">{}'
        '<path class="coar-axis" d="M0 70H300M150 66V74"/><text x="0" y="84">{}</text>'
        '<text x="150" y="84" text-anchor="middle">0</text><text x="300" y="84" text-anchor="end">{} {}</text></svg>',
        bars, number(-reach, places), number(reach, places), unit,
    )  # fmt: skip


def line(values: Sequence[float]) -> Html:
    """A small line from 0 up to the largest value, one point a round."""
    top, n = max(max(values), 1e-30), max(len(values) - 1, 1)
    points = " ".join(f"{2 + 66 * i / n:.1f},{20 - 17 * max(value, 0) / top:.1f}" for i, value in enumerate(values))
    return html(
        '<svg class="coar-spark" viewBox="0 0 70 22" role="img" aria-label="by round"><polyline points="{}"/>'
        '<path class="coar-axis" d="M1 21H69"/></svg>',
        points,
    )
