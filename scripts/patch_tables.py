"""The table and the picture of `patch_language_model.py`."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from hf_coar.plots import canvas

LEAST, MOST = -0.5, 1.75  # of the vertical axis; what overshoots is cut


def table(results: Mapping[str, Any], about: str) -> str:
    """The results as Markdown; `about` is what the script says of itself."""
    lines = ["# Which part of a language model carries a fact", "", *about.split("\n\n", 1)[1].splitlines(), ""]
    for units, result in results.items():
        lines += _heading(units, result) + _fidelity(result) + _gains(result) + _kept(result)
        lines += ["", f"Of the 20 strongest agree: {_agreeing(result['stand_ins']) or 'one stand-in only'}.", ""]
        lines += [f"- {kind}: {', '.join(entry['strongest'][:5])}" for kind, entry in result["stand_ins"].items()]
        lines.append("")
    lines += ["![What the strongest keep](patching.png)", ""]
    return "\n".join(lines)


def _heading(units: str, result: Mapping[str, Any]) -> list[str]:
    n_components = next(iter(result["stand_ins"].values()))["n_components"]
    said = (
        f"{n_components:,} components, {result['n_prompts']} prompts such as “{result['prompt']}”; attributed at "
        f"a = {result['fraction']:.0%}, {result['n_masks']} masks a size; {result['machine']}."
    )
    return [f"## {units}", "", said, ""]


def _fidelity(result: Mapping[str, Any]) -> list[str]:
    sizes = _sizes(result)
    lines = ["| stand-in | method | passes | s | " + " | ".join(f"{float(size):.0%}" for size in sizes) + " |"]
    lines.append("|---|---|---|---|" + "---|" * len(sizes))
    for kind, entry in result["stand_ins"].items():
        best = {size: max(one["correlation"][size][0] for one in entry["methods"].values()) for size in sizes}
        for method, one in entry["methods"].items():
            cells = [_cell(one["correlation"][size], one["slope"][size], best[size]) for size in sizes]
            spent = f"{one['passes']:.0f} | {one['processor_seconds']:.1f}"
            lines.append(f"| {kind} | {method} | {spent} | {' | '.join(cells)} |")
    lines += [
        "",
        "Cells: mean correlation within a prompt, its 95 % interval over masks and prompts · slope; in bold face the",
        "best of a stand-in. Passes: forward passes a prompt, a forward and backward pass being three; s: processor",
        "seconds for all prompts. Integrated gradients to 0 have the number of steps, of 5 and 20, that is best on",
        "these very sets.",
    ]
    for kind, entry in result["stand_ins"].items():
        if entry["off_the_gradient"]:
            said = ", ".join(f"{name}: {share:.1g}" for name, share in entry["off_the_gradient"].items())
            lines += ["", f"Off `gradient` at most, as a share of its largest weight ({kind}): {said}."]
    return lines


def _cell(correlation: list[float], slope: float, best: float) -> str:
    mean, low, high = correlation
    text = f"{mean:.3f}"
    text = f"**{text}**" if mean > best - 0.0005 else text
    return f"{text} ({low:.2f} – {high:.2f}) · {slope:.2f}"


def _gains(result: Mapping[str, Any]) -> list[str]:
    sizes = _sizes(result)
    lines = [
        "",
        "At the same processor time: correlation of the dearest of ours that took no longer, less the rival's.",
        "",
    ]
    lines.append("| stand-in | rival | ours | " + " | ".join(f"{float(size):.0%}" for size in sizes) + " |")
    lines.append("|---|---|---|" + "---|" * len(sizes))
    for kind, entry in result["stand_ins"].items():
        for rival, one in entry["at_equal_time"].items():
            gains = [one["gain"][size] for size in sizes]
            cells = [f"{mean:+.3f} ({low:+.2f} … {high:+.2f})" for mean, low, high in gains]
            ours = one["ours"] if one["affordable"] else f"{one['ours']} (took longer)"
            lines.append(f"| {kind} | {rival} | {ours} | {' | '.join(cells)} |")
    return lines


def _kept(result: Mapping[str, Any]) -> list[str]:
    numbers = list(next(iter(next(iter(result["stand_ins"].values()))["methods"].values()))["kept"])
    lines = ["", "| the k strongest keep | " + " | ".join(numbers) + " |", "|---|" + "---|" * len(numbers)]
    for kind, entry in result["stand_ins"].items():
        for method, one in entry["methods"].items():
            cells = [f"{one['kept'][k]:.2f}" for k in numbers]
            lines.append(f"| {kind}, {method} | {' | '.join(cells)} |")
    return lines


def _agreeing(stand_ins: Mapping[str, Any]) -> str:
    pairs = combinations(stand_ins.items(), 2)
    return ", ".join(f"{a} and {b} {len(set(x['strongest']) & set(y['strongest']))}" for (a, x), (b, y) in pairs)


def _sizes(result: Mapping[str, Any]) -> list[str]:
    methods = next(iter(result["stand_ins"].values()))["methods"]
    return list(next(iter(methods.values()))["correlation"])


def picture(results: Mapping[str, Any]) -> Any:
    """Faithfulness: k, the share of the output that the k strongest keep, a line a method, a panel a stand-in."""
    most = max(len(result["stand_ins"]) for result in results.values())
    figure = canvas.blank(0.9 + 2.6 * len(results), max(6.5, 3.2 * most), layout="constrained")
    panels = figure.subplots(len(results), most, squeeze=False, sharey=True)
    names = list(
        dict.fromkeys(_name(m) for r in results.values() for e in r["stand_ins"].values() for m in e["methods"])
    )
    lines = {}
    for row, (units, result) in zip(panels, results.items(), strict=True):
        for axes in row[len(result["stand_ins"]) :]:  # what was not run for these units
            axes.set_visible(False)
        for axes, (kind, entry) in zip(row, result["stand_ins"].items(), strict=False):
            for method, one in _unlike(entry["methods"]).items():
                place = names.index(_name(method))
                (lines[place],) = axes.plot(
                    [int(k) for k in one["kept"]], list(one["kept"].values()), label=_name(method), linewidth=1.4,
                    color=canvas.COLOURS[place % 7], marker=canvas.MARKERS[place % 7], markersize=4,
                    linestyle=canvas.LINES[place // 7],
                )  # fmt: skip
            numbers = [int(k) for k in next(iter(entry["methods"].values()))["kept"]]
            _dress(axes, f"{units} replaced by {_STAND_INS[kind]}", units, numbers)
        row[0].set_ylabel("share of the output kept", fontsize=9.5)
    canvas.title(figure, "How much of the answer the k strongest keep, all others replaced", _detail(results))
    canvas.legend_below(figure, panels[0][0], [lines[place] for place in sorted(lines)])
    return figure


_STAND_INS = {"patch": "corrupted values", "mean": "their mean", "zero": "zero"}


def _name(method: str) -> str:
    """The same for all stand-ins, whatever was best or chosen there."""
    for word in (" steps", " rounds"):
        method = method.rsplit(", ", 1)[0] if method.endswith(word) else method
    return method.split(" (")[0]


def _unlike(methods: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that keep just what an earlier one keeps."""
    found: dict[str, Any] = {}
    for name, one in methods.items():
        if all(one["kept"] != other["kept"] for other in found.values()):
            found[name] = one
    return found


def _dress(axes: Any, title: str, units: str, numbers: list[int]) -> None:
    axes.set_xscale("log")
    shown = numbers[:: 1 + len(numbers) // 9]  # more would run into each other
    axes.set_xticks(shown, [f"{k:,}" for k in shown])
    axes.set_xticks([], minor=True)
    axes.set_title(title, fontsize=9.5, loc="left", color=canvas.INK)
    axes.set_xlabel(f"k, {units} kept (log scale)", fontsize=9.5)
    axes.axhline(1, color=canvas.INK, linewidth=0.8, linestyle=":")
    axes.axhline(0, color=canvas.INK, linewidth=0.8, linestyle=":")
    axes.grid(color=canvas.FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, LEAST), min(high, MOST))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=canvas.INK)


def _detail(results: Mapping[str, Any]) -> str:
    n_prompts = {result["n_prompts"] for result in results.values()}
    prompts = " and ".join(map(str, sorted(n_prompts)))
    return f"SmolLM2-135M, {prompts} prompts; 1 = as with everything, 0 = as with nothing kept"
