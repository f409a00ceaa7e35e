"""What an ablation did, as HTML: accuracies before and after, and the predictions that flip."""

from collections.abc import Sequence
from html import escape

from hf_coar.explore import cards, drawing
from hf_coar.explore.drawing import button, heading, note
from hf_coar.explore.measuring import Accuracy, Change
from hf_coar.explore.source import Source

_FLIPS = 16  # examples shown whose prediction flips
_CLASSES = 40  # rows of the table of accuracies


def accuracy_table(found: Sequence[Accuracy], n_measured: int) -> str:
    """Accuracy of every class before and after."""
    if not found:
        return heading("Accuracy") + note("these examples have no labels")
    shown = found
    if len(found) > _CLASSES:
        shown = sorted(found, key=lambda one: abs(one.after - one.before) / one.count, reverse=True)[:_CLASSES]
    rows = [
        [
            f'{escape(one.name)} <span class="coar-faint">{one.count:,}</span>',
            f'<div class="coar-pair">{drawing.fraction_bar(one.before / one.count, "coar-before")}'
            f"{drawing.fraction_bar(one.after / one.count)}</div>",
            f"{100 * one.before / one.count:.0f} → <b>{100 * one.after / one.count:.0f}</b> %",
        ]
        for one in shown
    ]  # fmt: skip
    total = sum(one.count for one in found)
    before, after = (100 * sum(getattr(one, side) for one in found) / total for side in ("before", "after"))
    said = f"measured on {n_measured:,} examples: {before:.1f} → {after:.1f} % in all"
    said += f"; the {_CLASSES} classes that change most" if len(found) > _CLASSES else ""
    title = "Accuracy by class" if len(found) > 1 else "Accuracy"
    return heading(title) + drawing.table(["class, examples", "", "now → ablated"], rows, caption=said)


def flips(source: Source, found: Change, first: int = -1) -> str:
    """The examples whose prediction changed; the one that is looked at comes first."""
    places = sorted(found.flips(), key=lambda place: found.rows[place] != first)
    if found.before.classes is None or found.after.classes is None:
        return _token_flips(source, found, places)
    title = heading(f"Predictions that flip: {len(places):,} of {len(found.rows):,}")
    shown = places[:_FLIPS]
    extras = []
    for place in shown:
        now = int(found.after.classes[place])
        right = now == source.label(found.rows[place])
        mark = '<span class="coar-faint">→</span>' if right else '<span class="coar-wrong">→</span>'
        extras.append(f"<span>{mark} <b>{escape(source.class_name(now))}</b></span>")
    more = note(f"the first {len(shown)} of them") if len(places) > len(shown) else ""
    return title + more + cards.cards(source, [found.rows[place] for place in shown], "example", extras)


def _token_flips(source: Source, found: Change, places: Sequence[int]) -> str:
    rows, total = [], 0
    for place in places:
        before, after, targets = found.before.tokens[place], found.after.tokens[place], found.before.targets[place]
        where = (before != after).nonzero().flatten().tolist()
        total += len(where)
        for at in where[: min(_FLIPS - len(rows), 4)] if len(rows) < _FLIPS else ():
            context = "".join(source.token(t) for t in targets[max(0, at - 6) : at].tolist())
            cells = [escape(repr(source.token(int(side[at])))) for side in (targets, before, after)]
            opens = button("example", found.rows[place], f"…{escape(context)}", "coar-link")
            rows.append([opens, cells[0], cells[1], f"<b>{cells[2]}</b>"])
    title = heading(f"Next tokens that flip: {total:,}, in {len(places):,} of {len(found.rows):,} texts")
    return title + (drawing.table(["after", "true token", "expected", "with the ablation"], rows) if rows else "")
