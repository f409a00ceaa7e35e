"""The explorer without a browser: links, views, live ablations, edits, own input, export; never the whole matrix."""

import ast
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import same_state, state_of
from torch import nn

import hf_coar as coar
from hf_coar import demo, editing, explore, models
from hf_coar.attributions import rows
from hf_coar.data import Identity
from hf_coar.errors import CoarError, DataError, ModelMismatchError
from hf_coar.explore import columns, drawing, links, measuring, page, pieces, tab
from hf_coar.explore.source import Source, open_source
from hf_coar.explore.tab import View
from hf_coar.explore.tabs import components as components_tab
from hf_coar.explore.tabs import edit, examples, own

N = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Attributions of the demo's first images, on disk; made once for all files of tests."""
    folder = tmp_path_factory.getbasetemp() / "explore-attributions"
    if folder.exists():
        return folder
    model, data = coar.load(demo.MODEL, demo.IMAGES, split=f"train[:{N}]")
    method = coar.PathGradient(rounds=2)
    coar.attribute(model, data, method=method, progress=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(folder):
    return open_source(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of attributions of texts, for a classifier and for a language model."""
    import datasets
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as token_models
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

    base = tmp_path_factory.getbasetemp() / "explore-texts"
    if base.exists():
        return base
    base.mkdir()
    words = ["<pad>", "<eos>", "good", "bad", "film", "very", "a"]
    tokenizer = Tokenizer(token_models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    content = {"text": ["a very good film", "bad film", "a good film", "very bad"], "label": [1, 0, 1, 0]}
    datasets.Dataset.from_dict(content).to_parquet(base / "texts.parquet")
    config = {"vocab_size": 7, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "pad_token_id": 0}
    for name, kind, output in (
        ("classifier", GPT2ForSequenceClassification, "margin"), ("language", GPT2LMHeadModel, "token_margin"),
    ):  # fmt: skip
        torch.manual_seed(0)
        kind(GPT2Config(**config)).save_pretrained(base / f"{name}-model")
        fast.save_pretrained(base / f"{name}-model")
        model, data = coar.load(base / f"{name}-model", base / "texts.parquet")
        attributions = coar.attribute(
            model, data, output=output, method=coar.PathGradient(rounds=2), ablated_fraction=0.1, progress=False
        )
        attributions.save_pretrained(base / name)
    return base


# -------------------------------------------------------------------------------------------------------------- links

VIEWS = {
    "nothing": View(),
    "example": View(example=17, k=20, side="hurt", label=3, wrong=True, page=1),
    "ticked": View(example=2, ticked=(3, 4, 5, 99)),
    "component": View(view="components", component=831, layer="layer1.0"),
    "edit": View(view="edit", lower=(1, 2), higher=(7,), spared=(30, 31, 32), n_components=25),
    "own text": View(view="own", text="größer & <b>kühner</b>?\n#1=2"),
    "own image": View(view="own", image="0123abcd", explained=4),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_link_brings_back_its_view(name):
    view = VIEWS[name]
    assert links.from_query("?" + links.to_query(view), N, 832, 10) == view


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("view=cellar", "'cellar'"), ("example=40", "from 0 to 39"), ("example=x", "'x'"), ("k=-1", "k=-1"),
        ("view=edit&lower=1,2,400", "lower=400"), ("ticked=0-999999999", "list such as"), ("label=10", "from -1 to 9"),
        ("n_components=0", "from 1 to 832"), ("component=832", "from 0 to 831"), ("side=up", "help, hurt"),
        ("text=" + 3000 * "a", "3,000 characters"),
    ],
)  # fmt: skip
def test_a_link_that_makes_no_sense_says_why(query, words):
    with pytest.raises(CoarError, match=re.escape(words)):
        links.from_query(query, N, 832, 10)


def test_entries_of_others_in_a_link_are_ignored():
    assert links.from_query("?__theme=dark&utm=1&example=3", N, 832) == View(example=3)


# -------------------------------------------------------------------------------------------------------------- views


class Checker(HTMLParser):
    """Tags that are opened and closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.buttons, self.acts, self.attributes = [], 0, [], []

    def handle_starttag(self, tag, attributes):
        self.buttons += tag == "button"
        self.attributes += [name for name, _ in attributes]
        self.acts += [value for name, value in attributes if name == "data-act"]
        if tag not in ("img", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(html):
    checker = Checker()
    checker.feed(html)
    assert not checker.open
    return checker


def test_examples_are_buttons_with_their_predictions(source):
    html = pieces.gallery(source, View(example=3))
    assert checked(html).acts.count("example") == pieces.PAGE
    assert html.count('aria-current="true"') == 1 and "page 1 of 2" in html
    outcome = source.predictions([3])[0]
    assert source.class_name(int(outcome.classes[0])) in html


def test_wrong_predictions_are_found(source):
    found, more = pieces.filtered(source, View(wrong=True))
    logits = torch.cat([models.logits(source.model, source.batch([i])).detach() for i in range(N)])
    expected = (logits.argmax(1) != source.attributions.labels).nonzero().flatten().tolist()
    assert found == expected and expected and not more


def test_an_example_shows_its_strongest_components_with_errors(source):
    html = examples.example(source, View(example=5, k=3))
    checked(html)
    weights, errors = source.attributions.row(5), source.attributions.row(5, "standard_errors")
    best = weights.topk(3).indices.tolist()
    assert html.count(" checked>") == 3
    assert all(f'data-act="tick" data-value="{i}"' in html for i in best)
    places = drawing.digits(float(weights.abs().max()))
    assert f"{drawing.number(float(weights[best[0]]), places)} ± {float(errors[best[0]]):.{places}f}" in html
    assert "keeping the component raises the margin" in html


def test_the_heat_map_holds_every_component(source):
    weights = source.attributions.row(0)
    strips = pieces.strips(source.components, weights)
    assert torch.equal(torch.cat([strip.values for strip in strips]), weights)
    assert [strip.first for strip in strips] == [start for _, start, _ in source.components.spans()]


def test_many_matrices_are_drawn_layer_by_layer():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 4)

    components = coar.find_components(nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(40))}))
    weights = torch.randn(len(components))
    strips = pieces.strips(components, weights)
    assert len(components.groups) == 80 and [strip.name for strip in strips[:2]] == ["L0", "L1"]
    assert len(strips) == 40 and torch.equal(torch.cat([strip.values for strip in strips]), weights)


def test_long_rows_of_a_heat_map_share_cells_and_keep_the_sum():
    values, chosen = drawing._cells(drawing.Strip("long", 1000, torch.arange(-300.0, 1000.0)))
    assert len(values) <= drawing.MOST_CELLS and float(values.sum()) == float(torch.arange(-300.0, 1000.0).sum())
    assert int(chosen[0]) == 1000 and int(chosen[-1]) == 1000 + 1299


@pytest.mark.parametrize(
    ("largest", "factor", "said"),
    [(12.0, 1, ""), (0.1, 1, ""), (0.054, 1000, "10⁻³ "), (0.002, 1000, "10⁻³ "), (4e-7, 1e9, "10⁻⁹ "), (0.0, 1, "")],
)
def test_small_numbers_are_written_with_a_power_of_ten(largest, factor, said):
    found, power = drawing.scale(largest)
    assert found == pytest.approx(factor) and power == said
    assert drawing.number(-0.5) == "−0.500"


def test_a_component_shows_whom_it_helps_and_hurts(source):
    html = components_tab.component(source, View(component=100, ticked=(5, 100)))
    checked(html)
    assert "Untick it" in html and "Ablate the 2 ticked" in html
    weights = source.attributions.weights[:, 100]
    html = html[html.index("Most helped") :]
    cards = re.findall(r'coar-card" data-act="example" data-value="(\d+)"', html)
    n_helped = min(8, int((weights > 0).sum()))
    assert [int(card) for card in cards[:n_helped]] == weights.topk(n_helped).indices.tolist()
    assert int(cards[-1]) in weights.topk(8, largest=False).indices.tolist()


def test_the_list_of_components_is_by_size_within_a_layer(source):
    html = components_tab.component_list(source, View(view="components", layer="layer2.0"))
    names, index = source.components.regroup("layer")
    sizes = source.attributions.weights.abs().mean(0).masked_fill(index != names.index("layer2.0"), -1)
    shown = re.findall(r'data-act="component" data-value="(\d+)"', html)
    assert [int(i) for i in shown] == sizes.argsort(descending=True)[: len(shown)].tolist()


def listed(html):
    return [int(i) for i in re.findall(r'data-act="component" data-value="(\d+)"', html)]


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        ("LAYER3.1 conv2", r"layer3\.1\.conv2 "),
        ("conv1 filter 7", r"conv1.* filter 7$"),
        ("831", None),
        ("nothing", "^$"),
    ],
)
def test_components_are_searched_by_name_and_by_number(source, words, pattern):
    found = components_tab.found(source, View(find=words)).tolist()
    names = list(map(str, source.components))
    assert found == ([831] if pattern is None else [i for i, name in enumerate(names) if re.search(pattern, name)])
    inside = components_tab.found(source, View(find=words, layer="layer1.0")).tolist()
    assert inside == [i for i in found if str(source.components[i]).startswith("layer1.0.")]
    html = components_tab.component_list(source, View(find=words))
    checked(html)
    assert set(listed(html)) <= set(found) and bool(listed(html)) == bool(found)


def test_the_strongest_component_is_looked_at_first(source):
    strongest = int(source.attributions.weights.abs().mean(0).argmax())
    title = f'<h2 title="{source.components[strongest]}">{source.components.names.name(strongest)}</h2>'
    assert strongest != 0 and title in components_tab.component(source, View())
    assert listed(components_tab.component_list(source, View()))[0] == strongest


def test_a_link_to_a_component_is_of_the_components_there_are(source):
    with pytest.raises(CoarError, match="from 0 to 831"):
        links.from_query("component=-2", N, 832)


def test_classes_are_named_as_the_attributions_name_them(source, monkeypatch):
    known = source.attributions.provenance
    data = {**known.data, "label_names": [f"thing {i}" for i in range(10)]}
    monkeypatch.setattr(source.attributions, "provenance", dataclasses.replace(known, data=data))
    monkeypatch.setattr(source, "class_names", source._named_classes())
    assert "thing 3" in pieces.gallery(source, View(label=3))


def tokenizers():
    """One of each family: spaces before words, pieces of words, bytes."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds

    spaced = Tokenizer(kinds.Unigram([("<unk>", 0.0), ("▁the", -1.0), ("▁cat", -1.0), ("s", -1.5), ("▁sat", -1.0)], 0))
    spaced.pre_tokenizer, spaced.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    pieces_of = Tokenizer(kinds.WordPiece({"[UNK]": 0, "the": 1, "cat": 2, "##s": 3, "sat": 4}, unk_token="[UNK]"))
    pieces_of.pre_tokenizer, pieces_of.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    in_bytes = Tokenizer(kinds.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    in_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    in_bytes.decoder = decoders.ByteLevel()
    return {"sentencepiece": spaced, "wordpiece": pieces_of, "bytes": in_bytes}


@pytest.mark.parametrize("name", ["sentencepiece", "wordpiece", "bytes"])
def test_tokens_are_written_with_their_spaces(source, monkeypatch, name):
    from transformers import PreTrainedTokenizerFast

    text = "the cats sat" if name != "bytes" else "the cats, größer → sat"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizers()[name])
    monkeypatch.setattr(source, "_tokenizer", tokenizer, raising=False)
    tokens = tokenizer(text)["input_ids"]
    words = source.words(tokens)
    assert "".join(words).replace("\ufffd", "") == text and len(words) == len(tokens)
    if name != "bytes":
        assert words == ["the", " cat", "s", " sat"]
        monkeypatch.delitem(source.__dict__, "_some_word", raising=False)
        assert source.token(tokens[3]) == " sat" and source.token(tokens[2]) == "s"
        monkeypatch.delitem(source.__dict__, "_some_word", raising=False)


def raws():
    from PIL import Image

    image = Image.linear_gradient("L")
    yield from ({"image": image.convert(mode)} for mode in ("1", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"))
    yield {"image": Image.new("LAB", (32, 32))}
    yield {"image": Image.fromarray(torch.arange(1024).reshape(32, 32).numpy().astype("uint16"))}
    yield {"image": Image.new("RGB", (0, 5))}
    yield from ({"pixel_values": torch.randn(shape)} for shape in [(3, 8, 8), (2, 8, 8), (0, 8, 8), (4, 3, 8, 8), (5,)])
    yield {"pixel_values": torch.full((3, 8, 8), torch.nan)}
    yield {"audio": {"array": [0.1] * 99, "sampling_rate": 16000}, "label": 1}
    yield {"input_values": torch.randn(1600), "label": None}
    yield {"tokens": ["a", "b"], "tags": [1, 2], "boxes": [[0.5, 1.0]], "nothing": None, "more": object()}
    yield {}


def test_data_of_any_kind_are_shown():
    for raw in raws():
        html = pieces.content(raw, 88)
        checked(html)
        assert "<img" in html or "coar-snippet" in html
    assert "input_values: [" in pieces.content({"input_values": torch.randn(16)}, 88)


class Unusual(nn.Module):
    """Gives one number, a picture, a mapping, or logits, after one layer of components."""

    def __init__(self, gives):
        super().__init__()
        self.inner, self.head, self.gives = nn.Linear(4, 6), nn.Linear(6, 3), gives

    def forward(self, x):
        logits = self.head(self.inner(x).relu())
        return {"number": logits[:, :1], "picture": logits[:, :, None, None], "mapping": {"a": logits},
                "tokens": logits[:, None].expand(-1, 5, -1), "logits": logits}[self.gives]  # fmt: skip


@pytest.mark.parametrize("gives", ["number", "picture", "mapping", "tokens", "logits"])
def test_outputs_of_any_kind_are_shown(tmp_path, gives):
    """What was attributed with an output that is not here, of a model that gives what the explorer cannot draw."""
    torch.manual_seed(0)
    model = Unusual(gives).eval()
    data = [{"inputs": torch.randn(5, 4), "labels": torch.randint(3, (5,))} for _ in range(2)]
    known = Identity.joined([Identity.of_batch(batch) for batch in data])
    config = {
        "model": {**models.record(model), "fingerprint": models.fingerprint(model)}, "output": "of_somebody_else",
        "unit": "apples", "granularity": "unit", "method": {"name": "none"}, "seed": 0,
    }  # fmt: skip
    found = coar.find_components(model, include=["inner"])
    attributions = coar.Attributions(torch.randn(10, 6), torch.zeros(10), None, found, known, config)
    source = open_source(attributions, model, data)
    assert source.output.name == "of_somebody_else"
    for html in (
        pieces.gallery(source, View()), examples.example(source, View(example=3, k=2)),
        components_tab.component(source, View()), components_tab.component_list(source, View()),
    ):  # fmt: skip
        checked(html)
    assert "apples" in examples.example(source, View(example=3))
    html = examples.change(source, View(example=3), [0, 2], measuring.what_if(source, [0, 2], range(10)))
    checked(html)
    assert "–" in html and "nothing was measured" in html
    assert ("Accuracy by class" in html) == (gives == "logits")
    checked(edit.edit(source, View(lower=(1,)), *edit.preview(source, View(lower=(1,), n_components=2))))


HOSTILE = '"><img src=x onerror="alert(1)">'


def test_texts_of_others_are_no_html(texts, monkeypatch):
    source = open_source(texts / "classifier")
    hostile = {"text": HOSTILE, "label": 0}
    assert "<img" not in pieces.content(hostile, 50)
    monkeypatch.setattr(source, "class_names", [HOSTILE, HOSTILE + "2"])
    monkeypatch.setattr(source, "raw", lambda row: hostile)
    monkeypatch.setattr(type(source), "unit", HOSTILE)
    group = dataclasses.replace(source.components.groups[0], module=HOSTILE, parameter=HOSTILE, kind=HOSTILE)
    source.components = dataclasses.replace(source.components, groups=(group, *source.components.groups[1:]))
    change = measuring.what_if(open_source(texts / "classifier"), [0, 50, 100], range(4))
    view = View(lower=(1,), higher=(2,), ticked=(0,))
    for html in (
        pieces.gallery(source, view), examples.example(source, view), components_tab.component(source, view),
        components_tab.component_list(source, view), examples.change(source, view, [0, 50], change),
        edit.edit(source, view, edit.sides(source, view), [0, 50], change),
    ):  # fmt: skip
        assert "alert(1)" in html and HOSTILE not in html and "<img src=x" not in html
        assert not [name for name in checked(html).attributes if name.startswith("on")]


def test_html_is_made_in_one_place_only():
    """No string is HTML but what `drawing.html` makes of a template in the source: all else is escaped by it."""
    folder = Path(explore.__file__).parent
    for path in folder.rglob("*.py"):
        tree = ast.parse(path.read_text())
        fixed_names = {
            name for node in ast.walk(tree) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for name in map(ast.unparse, node.targets)
        }  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                fixed = "".join(part.value for part in node.values if isinstance(part, ast.Constant))
                assert not re.search(r"</?[a-zA-Z]", fixed), (path.name, node.lineno, fixed)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Html" and path.name != "drawing.py":
                raise AssertionError(f"{path.name}:{node.lineno} makes HTML by itself")
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("html", "drawing.html"):
                template = node.args[0]
                named = isinstance(template, ast.Name) and template.id in fixed_names
                assert named or isinstance(template, ast.Constant), (path.name, node.lineno)
    assert pieces.wrapped("<b>") == '<div class="coar">&lt;b&gt;</div>'


def test_a_tab_is_one_class_that_registers_itself(source, monkeypatch):
    pytest.importorskip("gradio", reason='needs pip install "hf_coar[explore]"')
    monkeypatch.setattr(tab.TABS, "_values", dict(tab.TABS._values))
    monkeypatch.setattr(tab.TABS, "_defined", dict(tab.TABS._defined))

    @tab.TABS.register("weights")
    class Weights(tab.Tab):
        title, place, kept = "Weights", 9, ("k",)

        def build(self):
            self.shown = self.page.html("weights")
            self.sets("k", self.gr.Slider(0, 9))

        def draw(self, view, before):
            return {self.shown: f"<b>{view.k}</b> of {self.source.unit}"}

    made = page.Page(source)
    assert list(made.tabs) == ["examples", "layers", "components", "edit", "own", "weights"]
    drawn = made.shown(View(view="weights", k=3), View())
    assert drawn[made.query] == "view=weights&k=3" and drawn[made.tabs["weights"].shown] == "<b>3</b> of logits"
    assert made.tabs["weights"].shown.postprocess("<b>") == "&lt;b&gt;"
    assert links.from_query("view=weights&k=3", N, 832) == View(view="weights", k=3)
    Weights.acts = {"tick": lambda source, view, value, beside: view}
    with pytest.raises(CoarError, match="act 'tick' is taken"):
        page.Page(source)


def test_clicks_that_make_no_sense_are_one_clear_error(source):
    gradio = pytest.importorskip("gradio", reason='needs pip install "hf_coar[explore]"')
    made = page.Page(source)
    act = made._safely(made._act())
    for value, words in (("99999", "from 0 to 39"), ("-1", "from 0 to 39"), ("1e9", "1e9"), ("9" * 99, "99999")):
        said = act(View(), "", gradio.EventData(None, {"act": "example", "value": value}))
        assert words in said[made.message] and made.view not in said
    assert act(View(), "", gradio.EventData(None, {"act": "example", "value": "7"}))[made.view].example == 7
    assert act(View(), "", gradio.EventData(None, {"act": "nothing"})) == {made.message: ""}


# ------------------------------------------------------------------------------------------------------ live ablations


def test_what_if_measures_the_live_model_and_leaves_it_as_it_was(source):
    before = state_of(source.model)
    components, kept = [26, 300, 700], torch.ones(832, dtype=torch.bool)
    kept[components] = False
    change = measuring.what_if(source, components, [0, 5, 9])
    assert same_state(source.model, before)
    batch = source.batch([0, 5, 9])
    with torch.no_grad():
        was = source.output(models.logits(source.model, batch), batch)
        with coar.ablate(source.model, source.components, kept):
            logits = models.logits(source.model, batch)
            now = source.output(logits, batch)
    torch.testing.assert_close(change.measured, now - was)
    assert torch.equal(change.after.classes, logits.argmax(1))
    plain = source.attributions.forecast.unablated
    for found, expected in zip(
        (change.predicted, *change.between), source.attributions.predict(kept, level=0.95), strict=True
    ):
        torch.testing.assert_close(found, (expected[0] - plain)[[0, 5, 9]], atol=1e-4, rtol=1e-4)


def test_accuracies_and_flips_are_counted(source):
    components = measuring.strongest(source, 5, 20, "help")
    change = measuring.what_if(source, components, range(N))
    found = measuring.accuracies(source, change)
    assert sum(one.count for one in found) == N
    right = int((change.after.classes == source.attributions.labels).sum())
    assert sum(one.after for one in found) == right
    assert len(change.flips()) == int((change.before.classes != change.after.classes).sum()) > 0
    html = examples.change(source, View(example=5), components, change)
    checked(html)
    assert f"Predictions that flip: {len(change.flips())} of {N}" in html


def test_visitors_at_the_same_time_do_not_meet(source):
    """Ablations change the one model for a moment; each visitor sees only the own one."""
    from concurrent.futures import ThreadPoolExecutor

    sets = [measuring.strongest(source, row, 30, "help") for row in range(6)]
    alone = [measuring.what_if(source, one, range(N)).after.outputs for one in sets]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda one: measuring.what_if(source, one, range(N)).after.outputs, sets))
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


def test_nothing_ticked_is_an_error(source):
    with pytest.raises(CoarError, match="no components are ticked"):
        measuring.what_if(source, [], [0])


def test_measured_examples_are_bounded_and_spread(source, monkeypatch):
    monkeypatch.setattr(measuring, "MOST_MEASURED", 8)
    found = measuring.measured_rows(source, [39])
    assert 8 <= len(found) <= 9 and 39 in found and found[0] == 0 and found[4] >= 16


# -------------------------------------------------------------------------------------------------------------- edits


def marked(source, label=1):
    return tuple((source.attributions.labels == label).nonzero().flatten().tolist())


def test_the_preview_ranks_as_editing_does(source):
    view = View(view="edit", lower=marked(source), n_components=7)
    chosen, components, change = edit.preview(source, view)
    expected = editing.rank_components(source.attributions, decrease=view.lower, reference=chosen.spared)
    assert list(components) == expected[:7].tolist()
    held_out = {row for row in range(N) if row % 4 == 3} - set(view.lower)
    assert not held_out & {*chosen.spared, *change.rows}
    checked(edit.edit(source, view, chosen, components, change))


def test_clicks_mark_move_and_unmark():
    view = edit.toggled(View(), 3, "lower")
    assert view.lower == (3,)
    moved = edit.toggled(view, 3, "spared")
    assert (moved.lower, moved.spared) == ((), (3,))
    assert edit.toggled(moved, 3, "spared") == View()


def test_a_saved_edit_loads_with_timm_alone_and_has_its_card(source, tmp_path):
    import timm

    view = View(view="edit", lower=marked(source), n_components=6)
    before = state_of(source.model)
    archive = edit.save_edit(source, view, tmp_path)
    assert same_state(source.model, before)
    zipfile.ZipFile(archive).extractall(tmp_path / "out")
    edited = timm.create_model(f"local-dir:{tmp_path / 'out' / 'edited-model'}", pretrained=True)
    zeroed = sum(
        int((weight.flatten(1) == 0).all(1).sum()) for weight in edited.state_dict().values() if weight.dim() == 4
    )
    assert zeroed == 6
    entries = models.record(models.load_model(tmp_path / "out" / "edited-model"))["edit"]
    assert entries["decrease"] == list(view.lower)  # rows of the attributions, not of the part that was ranked
    _, components, _ = edit.preview(source, view)
    assert sorted(entries["indices"]) == sorted(components)
    card = (tmp_path / "out" / "edited-model" / "README.md").read_text()
    assert "held out" in card and all(str(source.components[i]) in card for i in components)


def test_an_edit_without_targets_or_references_says_so(source):
    with pytest.raises(CoarError, match="no targets yet"):
        edit.sides(source, View())
    with pytest.raises(CoarError, match="none is left to spare"):
        edit.sides(source, View(lower=tuple(range(N))))


# ---------------------------------------------------------------------------------------------------------- own input


def test_own_images_arrive_round_by_round_and_become_more_reliable(source):
    from PIL import Image

    before, image = state_of(source.model), source.raw(4)["image"]
    arrived = list(own.arriving(source, image.convert("RGB").resize((56, 56), Image.Resampling.NEAREST), max_rounds=8))
    assert same_state(source.model, before)
    assert [one.last.rounds for one in arrived] == list(range(9))
    assert arrived[0].last.weights.shape == (1, 832)
    assert len(arrived[-1].errors) == len(arrived[-1].reliabilities) == 7
    assert arrived[-1].reliabilities[-1] > arrived[-1].reliabilities[0]
    expected = source.attributions.row(4)
    assert float(torch.corrcoef(torch.stack([arrived[-1].last.weights[0], expected]))[0, 1]) > 0.8
    for one in (arrived[0], arrived[-1]):
        checked(own.panel(source, image, one, running=True))


def test_own_texts_of_classifiers_and_language_models(texts):
    for name in ("classifier", "language"):
        source = open_source(texts / name)
        arrived = list(own.arriving(source, "a bad good film", max_rounds=2))
        assert len(arrived) == 3
        checked(own.panel(source, "a bad good film", arrived[-1], running=False))
        for html in (pieces.gallery(source, View()), examples.example(source, View(example=1, k=2))):
            checked(html)
        change = measuring.what_if(source, [0, 50, 100], range(4))
        checked(examples.change(source, View(), [0, 50, 100], change))
        assert len(measuring.accuracies(source, change)) == (2 if name == "classifier" else 1)


def test_one_token_of_a_text_can_be_explained(texts):
    source = open_source(texts / "language")
    every = next(own.arriving(source, "a bad good film"))
    single = [next(own.arriving(source, "a bad good film", explained=place)) for place in (1, 2, 3)]
    assert [one.tokens for one in single] == [(6, 3, 2, 4)] * 3
    assert every.value == pytest.approx(sum(one.value for one in single) / 3, abs=1e-5)
    torch.testing.assert_close(every.last.weights, sum(one.last.weights for one in single) / 3, atol=1e-4, rtol=1e-3)
    html = own.panel(source, "a bad good film", single[1], running=False)
    assert checked(html).acts.count("token") == 4 and "of token 2, &#39; good&#39;" in html
    for outside in (0, 4):
        with pytest.raises(CoarError, match="tokens 1 to 3"):
            next(own.arriving(source, "a bad good film", explained=outside))


def test_another_class_can_be_explained(source):
    image = source.raw(4)["image"]
    predicted = next(own.arriving(source, image))
    other = next(own.arriving(source, image, explained=(predicted.explained + 1) % 10))
    assert other.value < 0 < predicted.value


def test_nothing_to_attribute_is_an_error(source, texts):
    with pytest.raises(CoarError, match="upload an image"):
        next(own.arriving(source, None))
    with pytest.raises(CoarError, match="type a text"):
        next(own.arriving(open_source(texts / "language"), "  "))


def test_uploads_are_kept_by_name_and_bounded(source, monkeypatch):
    monkeypatch.setattr(own, "_KEPT_IMAGES", 2)
    uploads = own.Uploads()
    names = [uploads.keep(source.raw(i)["image"]) for i in range(3)]
    assert uploads.get(names[2]).size == (28, 28)
    with pytest.raises(CoarError, match="upload it again"):
        uploads.get(names[0])


# ------------------------------------------------------------------------------------------ never the whole matrix


def wide(tmp_path, n_examples=60, n_components=5000, dtype="float16", max_shard_size="200KB"):
    """Attributions in several half-precision files, where `weights` would read everything."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, n_components), nn.ReLU(), nn.Linear(n_components, 3))
    data = [{"inputs": torch.randn(20, 4), "labels": torch.randint(3, (20,))} for _ in range(n_examples // 20)]
    known = Identity.of_batch({name: torch.cat([batch[name] for batch in data]) for name in data[0]})
    config = {
        "model": {**models.record(model), "fingerprint": models.fingerprint(model)}, "data": {}, "output": "margin",
        "unit": "logits", "granularity": "unit", "n_components": n_components, "method": {"name": "none"},
        "ablated_fraction": 0.05, "seed": 0, "cost": None,
    }  # fmt: skip
    components = coar.find_components(model, include=["0"])
    weights = torch.randn(n_examples, n_components)
    errors = torch.rand(n_examples, n_components) if dtype == "float16" else None
    made = coar.Attributions(weights, torch.zeros(n_examples), errors, components, known, config)
    made.save_pretrained(tmp_path, dtype=dtype, max_shard_size=max_shard_size)
    return model, data, weights.half().float() if dtype == "float16" else weights


def test_no_view_reads_the_whole_matrix(tmp_path, monkeypatch):
    model, data, _ = wide(tmp_path)
    allowed = rows.Rows.tensor

    def forbidden(self):
        assert self.shape[0] < 60, "the whole matrix was asked for"
        return allowed(self)

    monkeypatch.setattr(rows.Rows, "tensor", forbidden)
    source = open_source(tmp_path, model, data)
    checked(pieces.gallery(source, View()) + examples.example(source, View(example=33, k=5)))
    checked(components_tab.component(source, View(component=4321)) + components_tab.component_list(source, View()))
    components = measuring.ablated(source, View(example=33, k=500))
    change = measuring.what_if(source, components, measuring.measured_rows(source, [33]))
    checked(examples.change(source, View(example=33), components, change))
    view = View(lower=(0, 1), n_components=9)
    checked(edit.edit(source, view, *edit.preview(source, view)))
    edit.save_edit(source, view, tmp_path / "edit")
    with pytest.raises(AssertionError, match="whole matrix"):
        _ = source.attributions.weights


def test_columns_and_the_pass_are_those_of_the_matrix(tmp_path):
    _, _, weights = wide(tmp_path)
    attributions = coar.Attributions.from_pretrained(tmp_path)
    assert len(attributions._matrices["weights"]._parts) > 1
    assert torch.equal(columns.column(attributions, 4321), weights[:, 4321])
    torch.testing.assert_close(columns.sizes(attributions), weights.abs().mean(0))


def test_references_of_large_attributions_are_drawn(tmp_path, monkeypatch):
    model, data, _ = wide(tmp_path)
    monkeypatch.setattr(edit, "_MOST_ENTRIES", 20 * 5000)
    chosen = edit.sides(open_source(tmp_path, model, data), View(lower=(0, 1)))
    assert len(chosen.spared) == 18 and chosen.n_others == 43


@pytest.mark.slow
def test_large_attributions_open_in_a_second(tmp_path):
    """5,000 examples × 100,000 components, 2 GB on disk and of memory to make them."""
    model, data, _ = wide(tmp_path, 5000, 100_000, "float32", "5GB")

    def held():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

    source, before = open_source(tmp_path, model, data), held()
    source.sizes()
    for draw in (
        lambda: pieces.gallery(source, View(page=30)), lambda: examples.example(source, View(example=4000)),
        lambda: components_tab.component(source, View(component=99_000)),
        lambda: components_tab.component_list(source, View()),
    ):  # fmt: skip
        started = time.monotonic()
        draw()
        assert time.monotonic() - started < 1
    assert held() - before < 300  # MB, of a matrix of 2,000


# ---------------------------------------------------------------------------------------------- opening and serving


def test_another_model_or_other_data_are_refused(folder):
    attributions = coar.Attributions.from_pretrained(folder)
    model, data = coar.load(demo.MODEL, demo.IMAGES, split=f"train[:{N}]")
    other = models.load_model(demo.MODEL)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(ModelMismatchError):
        open_source(attributions, other, data)
    with pytest.raises(DataError, match="not those of before"):
        open_source(attributions, model, data.select([*range(1, N), 0]))
    with pytest.raises(DataError, match="hold 10 examples"):
        open_source(attributions, model, data.select(range(10)))
    _, stream = coar.load(demo.MODEL, demo.IMAGES, streaming=True)
    with pytest.raises(DataError, match="without streaming"):
        open_source(attributions, model, stream)


def test_attributions_that_name_no_source_say_what_to_give(tmp_path):
    model, _, _ = wide(tmp_path)
    with pytest.raises(CoarError, match="--model"):
        explore.launch(tmp_path)
    with pytest.raises(CoarError, match="--data"):
        open_source(tmp_path, model)
    with pytest.raises(CoarError, match="give --model"):
        explore.export(tmp_path, tmp_path / "space")


def test_a_missing_gradio_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(CoarError, match=re.escape('pip install "hf_coar[explore]"')):
        page.gradio()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fetched(address, seconds=90, alive=lambda: True):
    """The page at an address, as soon as it is served."""
    end = time.monotonic() + seconds
    while True:
        try:
            return urllib.request.urlopen(address, timeout=10).read().decode()
        except OSError:
            if time.monotonic() > end or not alive():
                raise
            time.sleep(0.3)


def test_the_page_is_served_and_closed(folder):
    pytest.importorskip("gradio", reason='needs pip install "hf_coar[explore]"')
    address = explore.launch(folder, block=False, port=free_port())
    try:
        assert "hf_coar explorer" in fetched(address)
    finally:
        address.close()
    with pytest.raises(OSError):
        urllib.request.urlopen(address, timeout=2)


def test_a_taken_port_is_one_clear_error(folder):
    pytest.importorskip("gradio", reason='needs pip install "hf_coar[explore]"')
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(CoarError, match="give another port"):
            explore.launch(folder, block=False, port=taken.getsockname()[1])


def test_ctrl_c_leaves_nothing_but_json_on_standard_output(folder):
    pytest.importorskip("gradio", reason='needs pip install "hf_coar[explore]"')
    port = free_port()
    words = [sys.executable, "-X", "faulthandler", "-m", "hf_coar", "explore", str(folder)]
    words += ["--port", str(port), "--json"]
    # Shells have what runs in the background ignore Ctrl-C, and what it starts inherits that.
    heeds = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    served = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **heeds)
    try:
        lines = []
        while not lines or (lines[-1] and "Ctrl-C" not in lines[-1]):  # by then it is served
            lines.append(served.stderr.readline())
        assert f"http://127.0.0.1:{port}/" in lines[-1], "".join(lines)
        served.send_signal(signal.SIGINT)
        try:
            out, _ = served.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            served.send_signal(signal.SIGABRT)  # tells what every thread waits for
            pytest.fail(served.communicate()[1])
    finally:
        served.kill()
    assert served.returncode == 0 and json.loads(out) == {"address": f"http://127.0.0.1:{port}/"}


# ------------------------------------------------------------------------------------------------------------- export


def test_an_export_stands_alone_and_runs_as_it_is(folder, tmp_path):
    pytest.importorskip("gradio", reason='needs pip install "hf_coar[explore]"')
    space = explore.export(folder, tmp_path / "space", demo.MODEL, demo.IMAGES)
    from huggingface_hub import SpaceCard

    card = SpaceCard.load(space / "README.md").data
    assert (card.sdk, card.app_file) == ("gradio", "app.py") and card.sdk_version.startswith("6.")
    needed = (space / "requirements.txt").read_text().splitlines()  # what was not installed from an index comes along
    assert {"gradio>=6", "timm>=1.0.31"} <= set(needed) and not any("hf_coar" in line or ";" in line for line in needed)
    held = sorted(path.relative_to(space).as_posix() for path in space.rglob("*") if path.is_file())
    assert "attributions/attributions.safetensors" in held and "model/model.safetensors" in held
    assert "data/images.parquet" in held and not any("shards" in path for path in held)
    written = [path for path in space.rglob("*") if path.suffix in (".py", ".md", ".json")]
    assert not [path for path in written if str(demo.FOLDER) in path.read_text()]  # no path of this machine
    port = free_port()
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    app = subprocess.Popen([sys.executable, "app.py"], cwd=space, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert "hf_coar explorer" in fetched(f"http://127.0.0.1:{port}/", alive=lambda: app.poll() is None)
    finally:
        app.kill()
        app.communicate()
    (space / "hf_coar" / "__init__.py").write_text("raise SystemExit('the copy')")
    ended = subprocess.run([sys.executable, "app.py"], cwd=space, stderr=subprocess.PIPE, text=True)
    assert ended.stderr == "the copy\n"


def test_an_export_of_what_an_index_has_names_its_version(folder, tmp_path, monkeypatch):
    released = SimpleNamespace(version="9.9", requires=[], read_text={"WHEEL": "Wheel-Version: 1.0"}.get)
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: released)
    space = explore.export(folder, tmp_path / "space", "timm/resnet18.a1_in1k", "user/pictures")
    assert (space / "requirements.txt").read_text() == "hf_coar[explore]==9.9\n" and not (space / "hf_coar").exists()


def test_an_export_names_what_is_on_the_hub(folder, tmp_path):
    space = explore.export(
        folder, tmp_path / "space", model="timm/resnet18.a1_in1k", data="user/pictures", revision="v1"
    )
    text = (space / "app.py").read_text()
    assert '"timm/resnet18.a1_in1k"' in text and '"user/pictures"' in text and '"v1"' in text
    assert 'HERE / "attributions"' in text and not (space / "model").exists()
    readme = (space / "README.md").read_text()
    assert "- timm/resnet18.a1_in1k" in readme and "- user/pictures" in readme
    compile(text, "app.py", "exec")


def test_an_export_replaces_an_earlier_one_and_nothing_else(folder, tmp_path):
    space = tmp_path / "space"
    explore.export(folder, space, demo.MODEL, demo.IMAGES)
    (space / "hf_coar.whl").write_text("mine")
    (space / "README.md").write_text("# Mine")
    (space / "data" / "notes.txt").write_text("mine, too")
    (tmp_path / "others.parquet").write_bytes(demo.IMAGES.read_bytes())
    explore.export(folder, space, "timm/resnet18.a1_in1k", tmp_path / "others.parquet")
    held = sorted(path.relative_to(space).as_posix() for path in space.rglob("*") if path.is_file())
    assert {"hf_coar.whl", "data/notes.txt", "data/others.parquet"} <= set(held)
    assert "data/images.parquet" not in held and not [name for name in held if name.startswith("model/")]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert (space / "README.md").read_text() == "# Mine"
    (space / "app.py").write_text("print('mine')")
    with pytest.raises(CoarError, match=r"was changed since it was exported: app.py"):
        explore.export(folder, space, demo.MODEL, demo.IMAGES)
    assert (space / "app.py").read_text() == "print('mine')"


@pytest.mark.parametrize("app", ['print("my own")', '"""An hf_coar explorer."""'])
def test_an_export_leaves_what_is_not_its_own(folder, tmp_path, app):
    mine = {"app.py": app, "data/thesis.csv": "precious", "model/model.safetensors": "weeks", "README.md": "# Mine"}
    for name, text in mine.items():
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text(text)
    with pytest.raises(CoarError, match="holds other things"):
        explore.export(folder, tmp_path / "mine", demo.MODEL, demo.IMAGES)
    assert {name: (tmp_path / "mine" / name).read_text() for name in mine} == mine
    assert len([path for path in (tmp_path / "mine").rglob("*") if path.is_file()]) == len(mine)


def test_an_export_that_fails_leaves_the_earlier_one(folder, tmp_path, monkeypatch):
    space = explore.export(folder, tmp_path / "space", demo.MODEL, demo.IMAGES)
    before = {path: path.read_bytes() for path in space.rglob("*") if path.is_file()}

    def full(*args):
        raise OSError(28, "no space")

    monkeypatch.setattr(sys.modules["hf_coar.explore.export"], "_readme", full)
    with pytest.raises(CoarError, match="no space"):
        explore.export(folder, space, demo.MODEL, demo.IMAGES)
    assert {path: path.read_bytes() for path in space.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["space"]


def downloaded(folder, tmp_path, **entries):
    """Attributions as somebody else may have written them, whose configuration names paths of this machine."""
    shutil.copytree(folder, tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    config = json.loads(path.read_text())
    for what, name in entries.items():
        config[what]["id"] = name
    path.write_text(json.dumps(config))
    return tmp_path / "theirs"


@pytest.mark.parametrize("what", ["model", "data"])
@pytest.mark.parametrize("named", ["..", "/etc", ".", "secrets", "~", "a/b/c", "C:/Users", "../../x", "secrets/", ""])
def test_paths_in_a_configuration_are_not_exported(folder, tmp_path, monkeypatch, what, named):
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key.txt").write_text("secret")
    (tmp_path / "secrets" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    theirs = downloaded(folder, tmp_path, **{"model": "user/model", "data": "user/data", what: named})
    with pytest.raises(CoarError, match=rf"give --{what}|which is a path on this machine"):
        explore.export(theirs, tmp_path / "space")
    assert not (tmp_path / "space").exists()
    space = explore.export(theirs, tmp_path / "space", **{what: tmp_path / "secrets"})  # who calls may
    assert list(space.rglob("*.json"))


def test_paths_that_this_user_wrote_here_are_exported(folder, tmp_path):
    space = explore.export(folder, tmp_path / "space")
    assert (space / "model" / "model.safetensors").is_file() and (space / "data" / "images.parquet").is_file()
    assert str(demo.FOLDER) not in (space / "app.py").read_text()


def test_links_that_lead_out_of_a_folder_are_not_exported(folder, tmp_path):
    theirs = downloaded(folder, tmp_path, model="user/model", data="user/data")
    (tmp_path / "secret.md").write_text("secret")
    (theirs / "README.md").unlink()
    (theirs / "README.md").symlink_to(tmp_path / "secret.md")
    with pytest.raises(CoarError, match="out of the folder"):
        explore.export(theirs, tmp_path / "space")
    assert not (tmp_path / "space").exists()


def test_paths_that_attributions_of_the_hub_name_are_not_opened(folder):
    attributions = coar.Attributions.from_pretrained(folder)
    assert len(open_source(attributions)) == N
    attributions.origin = "user/repo"
    with pytest.raises(CoarError, match=r"from the Hub .* which is a path on this machine"):
        open_source(attributions)
    with pytest.raises(CoarError, match="which is a path on this machine"):
        open_source(attributions, demo.MODEL)
    assert len(open_source(attributions, demo.MODEL, demo.IMAGES)) == N


def test_views_are_plain_values():
    assert all(isinstance(field.default, int | str | bool | tuple) for field in dataclasses.fields(View))
    assert isinstance(Source.__doc__, str)
