"""Pictures of edits: `result.plot` has them for every task, with the figures of the result, or refuses clearly."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_edit_tasks import backdoored, batches, biased, blobs, net  # noqa: F401 (fixtures)
from torch import nn

import hf_coar as coar
from hf_coar.data import Examples, showing
from hf_coar.editing.tasks import EditResult, Figures, matching
from hf_coar.editing.tasks import figures as fig
from hf_coar.errors import CoarError


@pytest.fixture(scope="module")
def results(net, biased, backdoored):  # noqa: F811
    """One of every task, and one whose output has no boundary."""
    model, data, components = net
    labels = torch.cat([batch["labels"] for batch in data])
    of = {"components": components, "rivals": ["welch"]}
    with torch.no_grad():
        wrong = (torch.cat([model(batch["inputs"]) for batch in data]).argmax(1) != labels).nonzero()[:1, 0].tolist()
    sides = ((labels == 2).nonzero()[:, 0], (labels == 1).nonzero()[:, 0])
    found = {
        "forget": coar.forget(model, data, 3, others_within=0.05, **of),
        "fix": coar.fix(model, data, wrong, others_within=0.1, **of),
        "steer": coar.steer(model, data, decrease={"label": 1}, others_within=0.03, **of),
        "no boundary": coar.steer(model, data, *sides, output="log_prob", others_within=0.2, **of),
    }
    model, data, components = biased
    found["lift"] = coar.lift(model, data, "place", average_within=0.03, components=components, rivals=["welch"])
    model, clean, triggered, components = backdoored
    most, matching.MOST = matching.MOST, 0.1
    found["match"] = coar.match(model, clean, triggered, clean_within=0.05, components=components, rivals=["welch"])
    matching.MOST = most
    return found


KINDS = ("forget", "fix", "steer", "no boundary", "lift", "match")


def drawn(figure):
    """Its axes, and all texts."""
    figure.canvas.draw()
    texts = [text.get_text() for axes in figure.axes for text in (*axes.texts, *axes.get_yticklabels())]
    return figure.axes, texts, figure.get_suptitle()


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_or_group_with_its_interval(results, kind):
    result = results[kind]
    found = [row for judged in result.judged for row in judged.by_group()]
    assert sum(one.n for _, one, _ in found) == sum(len(judged.rows) for judged in result.judged)
    assert all(one.low <= one.after <= one.high and swapped.before == one.after for _, one, swapped in found)
    (axes,), texts, title = drawn(result.plot.groups())
    names = [text.removeprefix("▶ ") for text in texts if text.endswith(")") and "\n" not in text]
    assert names == [f"{one.what} ({one.n})" for _, one, _ in found]
    assert {text.removeprefix("▶ ") for text in texts if text.startswith("▶")} == {
        f"{one.what} ({one.n})" for marked, one, _ in found if marked
    }
    assert result.task in title and "to judge on" in title
    last = next(line for line in reversed(axes.lines) if line.get_marker() == "D" and len(line.get_xdata()))
    assert last.get_xdata()[0] == pytest.approx(found[-1][1].after * (100 if found[-1][1].share else 1))


def test_groups_are_those_of_the_figures(results):
    """What is drawn of a class is what the figures say of it."""
    for kind, name in (("forget", "target"), ("match", "worst_other")):
        figure = results[kind].figures[name]
        rows = [one for judged in results[kind].judged for _, one, _ in judged.by_group()]
        assert any((one.before, one.after, one.n) == (figure.before, figure.after, figure.n) for one in rows)
    lifted = [one for judged in results["lift"].judged for _, one, _ in judged.by_group()]
    assert min(one.after for one in lifted) == results["lift"].figures["target"].after
    assert {one.what for one in lifted} == {f"class {c}, place {p}" for c in (0, 1) for p in (0, 1)}
    assert "place" in results["lift"].figures["worst_other"].what
    few = drawn(results["forget"].plot.groups(most=2))[1]
    assert sum(text.endswith(")") and "\n" not in text for text in few) == 2 and any(
        text.startswith("▶") for text in few
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_frontier_has_the_way_the_choice_the_limits_and_the_rivals(results, kind):
    result = results[kind]
    (axes,), texts, _ = drawn(result.plot.frontier())
    lines = {line.get_label(): line for line in axes.lines}
    assert "limits, and what keeps them" in lines and result.frontier[0][0] == 0
    target = result.figures["moved" if "moved" in result.figures else "target"]
    others = result.figures["others"]
    x, y = lines["dot edited"].get_xydata()[0]
    scale = [100 if one.share else 1 for one in (target, others)]
    assert (x, y) == pytest.approx((target.after * scale[0], others.change * scale[1]), abs=1e-4)
    measured = [name for name, one in result.figures.rivals.items() if one]
    assert {f"dot {name}" for name in measured} <= set(lines) and set(texts) >= set(measured)
    allowed = -result.limits["others"] * scale[1]
    assert any(
        list(line.get_ydata()) == pytest.approx([allowed, allowed]) for line in axes.lines if len(line.get_xdata())
    )


def test_a_rival_that_keeps_no_limits_is_named(results):
    result = results["forget"]
    figures = Figures(result.figures.measured, {"welch": {}, "logit_bias": result.figures.measured})
    figure = EditResult(result.model, figures, (), "", result.frontier, result.limits).plot.frontier()
    assert [text.get_text() for text in figure.texts if "kept no limits" in text.get_text()] == [
        "kept no limits: welch"
    ]


def test_flips_say_what_changed(results):
    result = results["forget"]
    with pytest.raises(CoarError, match=r"neither images nor texts \(entries: inputs, labels\); give show="):
        result.plot.flips()
    figure = result.plot.flips(show=lambda index: f"example {index}", most=3)
    said = [text.get_text() for text in figure.texts]
    (judged,) = result.judged
    lost = judged.flipped(target=True, better=False)
    assert any(
        f"right → wrong: {len(lost)} of 100" in text or f"{len(lost)} of {int(judged.target.sum())}" in text
        for text in said
    )
    first = int(judged.rows[lost[0]])
    assert f"example {first}" in said and any(text.startswith("class 3 → class ") for text in said)
    assert sum(text.startswith("example") for text in said) <= 3 * 4
    unbound = results["no boundary"].plot.flips(show=lambda index: f"example {index}")
    assert "moved most" in unbound.get_suptitle()
    pairs = results["match"].plot.flips(show=lambda index: "")
    assert any("triggered, wrong → right" in text.get_text() for text in pairs.texts)


def test_nothing_flipped(results):
    result = results["forget"]
    same = tuple(type(one)(**{**vars(one), "after": one.before}) for one in result.judged)
    still = EditResult(result.model, result.figures, look=lambda: same)
    with pytest.raises(CoarError, match=r"no answer to any of the \d+ examples to judge on changed"):
        still.plot.flips()
    with pytest.raises(CoarError, match="holds no examples to look at"):
        EditResult(result.model, result.figures).plot.groups()
    with pytest.raises(CoarError, match="0 models on the way and 0 rivals"):
        EditResult(result.model, Figures(result.figures.measured)).plot.frontier()
    with pytest.raises(CoarError, match="most=0"):
        result.plot.flips(most=0)
    with pytest.raises(CoarError, match=r"unknown picture of an edit 'classes'; there are flips, frontier, groups"):
        result.plot.classes()


class Bright(nn.Module):
    """Two classes of small pictures, bright and dark, with a few neurons."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, pixel_values):
        return self.net(pixel_values)


def test_flipped_images_are_those_of_the_data_set():
    generator = np.random.default_rng(0)
    labels = [i % 2 for i in range(240)]
    images = [Image.fromarray((generator.random((4, 4, 3)) * 120 + 100 * label).astype("uint8")) for label in labels]
    pixels = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1).float() / 255 - 0.6 for one in images])
    model = Bright()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(pixels), torch.tensor(labels)).backward()
        optimiser.step()

    def prepare(rows):
        index = [row["number"] for row in rows]
        return {"pixel_values": pixels[index], "labels": torch.tensor([row["label"] for row in rows])}

    columns = {"image": images, "label": labels, "number": list(range(240))}
    raw = datasets.Dataset.from_dict(columns, features=datasets.Features(
        image=datasets.Image(), label=datasets.Value("int64"), number=datasets.Value("int64"))
    )  # fmt: skip
    for data in (Examples(raw, prepare), list(Examples(raw, prepare))):
        result = coar.forget(model.eval(), data, 1, method="logit_bias", rivals=None)
        (judged,) = result.judged
        figure = result.plot.flips(most=2)
        pictures = [axes.images[0].get_array() for axes in figure.axes]
        lost = judged.flipped(target=True, better=False)
        assert len(pictures) >= 2 and len(lost) > 0
        assert any("class 1\n→ class 0" in axes.get_xlabel() for axes in figure.axes)
        if isinstance(data, Examples):
            wanted = np.array(images[int(judged.rows[lost[0]])])
            assert any(np.array_equal(one, wanted) for one in pictures), "the data set's own image, not the pixels"


def test_flipped_texts_are_decoded(net):  # noqa: F811
    class Words(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.table = inner, torch.randn(400, 12, generator=torch.Generator().manual_seed(1)) * 3

        def forward(self, input_ids):
            return self.inner(self.table[input_ids[:, 0]])

    class Tokenizer:
        def decode(self, tokens, skip_special_tokens):
            return " ".join(f"word{token}" for token in tokens)

    model = Words(net[0])
    tokens = torch.arange(400)[:, None]
    data = batches(tokens, model(tokens).argmax(1))
    data = [{"input_ids": one["inputs"], "labels": one["labels"]} for one in data]
    common = int(torch.cat([one["labels"] for one in data]).bincount().argmax())
    result = coar.forget(model, data, common, method="logit_bias", rivals=None)
    with pytest.raises(CoarError, match="tokenizer is not at hand"):
        result.plot.flips()
    said = [text.get_text() for text in result.plot.flips(tokenizer=Tokenizer()).texts]
    assert any(text.startswith("word") for text in said)


def test_the_interval_of_a_change_is_of_the_same_examples():
    """Wide where many examples turned either way, narrow where few did, whatever the share."""
    before = torch.arange(400) < 300
    one, both = before.clone(), before.clone()
    one[:20] = False
    both[:60], both[300:340] = False, True
    narrow, wide = fig.of_shares("", before, one), fig.of_shares("", before, both)
    assert narrow.change == pytest.approx(-0.05) and wide.change == pytest.approx(-0.05)
    assert 0.015 < narrow.spread < 0.03 < wide.spread < 0.06
    assert fig.of_shares("", before, before).spread > 0, "no change at all is not certain"
    draws = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(400):  # a tenth is lost, a twentieth gained: -5 points
        dice = torch.rand(150, generator=draws)
        was = dice < 0.5
        now = torch.where((dice < 0.1) | (dice > 0.95), ~was, was)
        found = fig.of_shares("", was, now)
        inside += abs(found.change + 0.05) <= found.spread
    assert 0.92 <= inside / 400 <= 0.99
    means = fig.of_means("", torch.tensor([1.0, 5.0, 9.0]), torch.tensor([2.0, 6.0, 10.0]), "nats")
    assert means.spread == 0 and means.high - means.low > 5 and means.row()[0] == " (nats)"


def test_images_and_texts_of_raw_examples():
    image = Image.new("L", (2, 2))
    assert showing.image_column({"a": 1, "b": image}) == "b" and showing.image_column({"a": "x"}) is None
    assert showing.text_column({"title": "x", "text": "y"}) == "text" and showing.text_column({"a": image}) is None
    assert showing.image_of(torch.ones(3)) is None
    assert showing.image_of(torch.rand(3, 4, 5)).size == (5, 4)
