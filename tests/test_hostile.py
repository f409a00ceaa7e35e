"""What comes from elsewhere is never executed, never drives a terminal or a page, and is refused in a sentence."""

import io
import json
import os
import pickle
import re
import tarfile
import time

import pytest
import torch
import yaml
from conftest import DEMO, build_net
from test_cards import CONFIG, ENTRIES, EVALUATION
from test_format import tiny

import hf_coar as coar
from hf_coar import cli, data, models
from hf_coar.cli import config, terminal
from hf_coar.errors import CoarError, DataError, ModelError
from hf_coar.plots import page
from hf_coar.storage import cards, escaping

# --------------------------------------------------------------------------------------------------- pickles and code


class Evil:
    """Leaves a file where it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


@pytest.fixture
def evil(tmp_path):
    """(bytes of a pickle that runs, of one that torch wrote, code), and a check that none of them ran."""
    trace = tmp_path / "it-ran"
    by_torch = io.BytesIO()
    torch.save({"weight": Evil(trace)}, by_torch)
    code = f"import os\nos.mkdir({str(trace)!r})\n".encode()
    yield pickle.dumps(Evil(trace)), by_torch.getvalue(), code
    assert not trace.exists(), "it ran"


def test_the_evil_files_would_run(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "a")))
    saved = io.BytesIO()
    torch.save({"weight": Evil(tmp_path / "b")}, saved)
    saved.seek(0)
    torch.load(saved, weights_only=False)
    assert (tmp_path / "a").exists() and (tmp_path / "b").exists()


PICKLES = ("pytorch_model.bin", "open_clip_pytorch_model.bin", "model.pth", "weights.pt", "adapter_model.bin", "tf.pkl")


@pytest.fixture
def no_unpickling(monkeypatch):
    """timm and transformers do not even begin to read one. timm 1.0.20 unpickles what it chooses in a folder."""

    def never(*arguments, **settings):
        raise AssertionError("a pickle was opened")

    import timm.models._builder
    import timm.models._hub

    monkeypatch.setattr(torch, "load", never)
    monkeypatch.setattr(timm.models._hub, "load_state_dict_from_path", never, raising=False)
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_path", never, raising=False)


@pytest.mark.parametrize("weights", ["model.safetensors", "open_clip_model.safetensors"])
@pytest.mark.parametrize("disguised", [False, True])
def test_timm_reads_the_safetensors_file_that_was_checked(tmp_path, evil, weights, disguised, no_unpickling):
    saved, folder = build_net("timm_vit").model, tmp_path / "model"
    models.save_model(saved, folder)
    (folder / "model.safetensors").rename(folder / weights)
    for name in PICKLES:
        (folder / name).write_bytes(evil[1])
    if disguised:  # every way in which a configuration names another source
        known = json.loads((folder / "config.json").read_text())
        known["pretrained_cfg"] |= {"file": str(folder / "pytorch_model.bin"), "source": "", "custom_load": True}
        known["pretrained_cfg"] |= {"url": f"file://{folder}/pytorch_model.bin", "hf_hub_id": "evil/evil"}
        (folder / "config.json").write_text(json.dumps(known))
    loaded = models.load_model(folder)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in saved.state_dict().items())


@pytest.mark.parametrize("net", ["timm_vit", "bert"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_pickle_in_the_place_of_weights(tmp_path, evil, net, which, no_unpickling):
    models.save_model(build_net(net).model, tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_bytes(evil[which])
    with pytest.raises(ModelError):
        models.load_model(tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    for name in PICKLES:
        (tmp_path / "model" / name).write_bytes(evil[which])
    with pytest.raises(ModelError):
        models.load_model(tmp_path / "model")


@pytest.mark.parametrize("index", [False, True])
def test_transformers_reads_safetensors_only(tmp_path, evil, index, no_unpickling):
    saved, folder = build_net("gpt2").model, tmp_path / "model"
    models.save_model(saved, folder)
    for name in PICKLES:
        (folder / name).write_bytes(evil[1])
    if index:
        names = dict.fromkeys(saved.state_dict(), "pytorch_model.bin")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    loaded = models.load_model(folder)
    assert torch.equal(loaded.transformer.wte.weight, saved.transformer.wte.weight)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        models.load_model(folder)


def test_a_pickled_adapter(tmp_path, evil):
    folder = tmp_path / "model"
    models.save_model(build_net("gpt2").model, folder)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "r": 1, "target_modules": ["c_attn"]}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "adapter_model.bin").write_bytes(evil[1])
    with pytest.raises(ModelError):
        models.load_model(folder)


@pytest.mark.parametrize("what", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_code_beside_a_model_is_not_run(tmp_path, evil, what, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *words: "y")  # transformers asks, where it is not told
    folder = tmp_path / "model"
    kind = "bert" if what != "preprocessor_config.json" else "vit"
    models.save_model(build_net(kind).model, folder)
    (folder / "evil.py").write_bytes(evil[2] + b"class Evil: pass\n")
    named = {"config.json": ["AutoConfig", "AutoModel", "AutoModelForSequenceClassification"]}
    named |= {"tokenizer_config.json": ["AutoTokenizer"], "preprocessor_config.json": ["AutoImageProcessor"]}
    known = json.loads((folder / what).read_text()) if (folder / what).exists() else {}
    places = {name: ["evil.Evil", "evil.Evil"] if name == "AutoTokenizer" else "evil.Evil" for name in named[what]}
    known |= {"auto_map": places, "tokenizer_class": "Evil", "image_processor_type": "Evil"}
    known |= {"architectures": ["Evil"], "model_type": "evil"} if what == "config.json" else {}
    (folder / what).write_text(json.dumps(known))
    (tmp_path / "a.csv").write_text("text,label\na,0\nb,1\n")
    with pytest.raises(CoarError):
        model = models.load_model(folder)
        data.load_data(tmp_path / "a.csv" if kind == "bert" else DEMO / "images.parquet", model, batch_size=2)


def test_data_that_hold_code_or_pickles(tmp_path, evil, bert):
    bert.model.hf_coar_record = {"id": str(tmp_path / "no-tokenizer"), "revision": None}
    script = tmp_path / "script"
    script.mkdir()
    (script / "script.py").write_bytes(evil[2])
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for name in ("a.pkl", "train.pickle", "data.pt"):
        (pickled / name).write_bytes(evil[0])
    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "train-0.tar", "w") as archive:
        for name, content in (("0.pth", evil[1]), ("0.pkl", evil[0]), ("0.txt", b"a"), ("0.npy", evil[0])):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "state.json").write_text('{"_data_files": [{"filename": "a.pkl"}], "_fingerprint": "0"}')
    (saved / "dataset_info.json").write_text("{}")
    (saved / "a.pkl").write_bytes(evil[0])
    for folder in (script, pickled, shards, saved, script / "script.py", pickled / "a.pkl"):
        with pytest.raises(DataError):
            data.load_data(folder, bert.model)


# --------------------------------------------------------------------------------------------- hostile configurations


def changed(folder, **entries):
    known = json.loads((folder / "config.json").read_text())
    for key, value in entries.items():
        inner, _, last = key.rpartition("__")
        (known.setdefault(inner, {}) if inner else known)[last] = value
    (folder / "config.json").write_text(json.dumps(known))


HOSTILE = {
    "bert": [
        {"architectures": 3},
        {"architectures": {"a": "b"}},
        {"architectures": ["pipeline"]},
        {"architectures": [["x"]]},
        {"architectures": ["AutoTokenizer"]},
        {"architectures": ["logging"]},
        {"num_hidden_layers": 10**7},
        {"hidden_size": 10**15},
        {"hidden_size": -1},
        {"hidden_size": "x"},
        {"vocab_size": 2**62},
        {"hidden_act": "os.x"},
        {"num_attention_heads": 0},
        {"model_type": "../x"},
        {"model_type": None},
        {"auto_map": [1]},
        {"torch_dtype": "x"},
        {"quantization_config": {"quant_method": "x"}},
        {"intermediate_size": 10**12},
        {"max_position_embeddings": 10**12},
    ],
    "timm_vit": [
        {"architecture": "local-dir:/etc"},
        {"architecture": "hf-hub:evil/evil"},
        {"architecture": None},
        {"architecture": ["x"]},
        {"pretrained_cfg": 3},
        {"pretrained_cfg": {"a": 1}},
        {"model_args__depth": 10**7},
        {"model_args__embed_dim": 10**8},
        {"model_args__num_heads": 0},
        {"model_args": [1]},
        {"num_classes": 10**12},
        {"pretrained_cfg__input_size": [3]},
        {"model_args__checkpoint_path": "/etc/passwd"},
        {"model_args__depth": -1},
        {"model_args__block_fn": "os.system"},
        {"model_args__patch_size": 0},
        {"model_args__act_layer": "os.system"},
    ],
}


@pytest.mark.parametrize("net", HOSTILE)
def test_hostile_configurations_of_models(tmp_path, net):
    """An error of ours at once, and no memory for a giant; or a model, where the entry has no effect."""
    folder = tmp_path / "model"
    for entries in HOSTILE[net]:
        models.save_model(build_net(net).model, folder, overwrite=True)
        changed(folder, **entries)
        started = time.process_time()
        for load in (models.load_model, models.load_architecture):
            try:
                load(folder)
            except CoarError as error:
                assert str(error) and "\n" not in str(error)
        assert time.process_time() - started < 10, entries


@pytest.mark.parametrize(
    "content", [b"[" * 200_000, b"9" * 100_000, b"", b"null", b"[]", b"\xff", b'{"a": NaN}', b"{}"]
)
def test_a_configuration_that_is_none(tmp_path, content):
    models.save_model(build_net("bert").model, tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    for load in (models.load_model, models.load_architecture):
        with pytest.raises(CoarError):
            load(tmp_path)


def test_infinity_in_a_configuration_is_no_harm(tmp_path):
    """Published state-space models have it, as the limit of their time steps."""
    models.save_model(build_net("bert").model, tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("{", '{"time_step_limit": [0.0, Infinity],', 1))
    assert models.load_model(tmp_path).config.time_step_limit[1] == float("inf")


# ------------------------------------------------------------------------------------------------------ files of flags

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
NO_FLAGS = {
    "a date that is none": "seed: 2024-13-45\n",
    "a time that is none": "seed: 2024-01-01 99:99:99\n",
    "a tag": "seed: !!python/object/apply:os.system ['true']\n",
    "a tag of YAML's own": "seed: !!float nan\n",
    "an unknown tag": "seed: !evil x\n",
    "a huge integer": f"seed: {'9' * 50_000}\n",
    "hex": f"seed: 0x{'f' * 50_000}\n",
    "nested deeply": f"include: {'[' * 40_000}\n",
    "nested blocks": "- " * 40_000,
    "keys": "? " * 40_000,
    "an alias bomb": BOMB,
    "an alias to itself": "include: &a [*a]\n",
    "merged": "<<: {seed: 1}\n? [1, 2]\n: 3\n",
    "a binary": "seed: !!binary aGk=\n",
    "a set": "include: !!set {a, b}\n",
    "too large": f"seed: 1 #{'x' * 200_000}\n",
    "no mapping": "- 1\n",
    "nothing": "",
    "no YAML": "{",
    "control": "seed: \x1b[2J\n",
    "infinite": "seed: .inf\n",
    "a mapping in a list": "include: [{a: b}]\n",
    "sexagesimal": "seed: 190:20:30:99:99:99:99\n",
    "float": "seed: 1e999\n",
    "many keys": "".join(f"key{i}: 1\n" for i in range(5000)),
    "a long key": f"{'k' * 50_000}: 1\n",
    "an unknown key with a bell": '"\\a\\e[2J": 1\n',
}


@pytest.mark.parametrize("what", NO_FLAGS)
def test_files_that_are_no_flags_are_refused_at_once(tmp_path, what, capsys):
    path = tmp_path / "flags.yaml"
    path.write_text(NO_FLAGS[what])
    started = time.process_time()
    assert cli.main(["attribute", "x", "y", "--out", str(tmp_path / "out"), "--config", str(path)]) == 2
    assert time.process_time() - started < 3
    said = capsys.readouterr().err
    assert "--config" in said and len(said) < 1500 and "\x1b" not in said and "\a" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_folder_of_flags(tmp_path, make, capsys):
    make(tmp_path / "flags")
    assert cli.main(["attribute", "x", "y", "--out", "z", "--config", str(tmp_path / "flags")]) == 2
    assert "--config" in capsys.readouterr().err
    assert cli.main(["attribute", "x", "y", "--out", "z", "--config", "/dev/zero"]) == 2


def test_what_is_written_back_can_be_read(tmp_path):
    same = ["a", "b"]
    written = config.text("attribute", {"include": same, "exclude": same})
    (tmp_path / "run.yaml").write_text(written)
    assert config._read(tmp_path / "run.yaml")["exclude"] == same == yaml.safe_load(written)["exclude"]


# ------------------------------------------------------------------------------------------------- shown to somebody

NASTY = (
    "\x1b]0;owned\x07\x1b[2J\n# Heading\n<script>alert(1)</script> | [x](javascript:y) ![i](http://t/p.png) `c` \u202e"
)
PYTHON = 'ViT\nimport os; os.system("true")  #'


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_no_sequences_but_our_colours(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for stream in (Screen(), io.StringIO()):
        terminal.write(f"{terminal.bold('a', stream)} {NASTY}\nä\t漢\n", stream)
        rest = stream.getvalue().replace("\033[1m", "").replace("\033[0m", "")
        assert not [c for c in rest if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or c == "\u202e"]
        assert "\\x1b" in rest and rest.endswith("\nä\t漢\n")
    assert "\033[31m" not in escaping.for_terminal("\033[31mred")


def test_messages_on_the_screen_are_harmless(tmp_path, capsys):
    assert cli.main(["push", str(tmp_path / NASTY.replace("/", "")), "a/b"]) == 2
    assert "\x1b" not in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["push", "a", "b", "--\x1b[2J"])
    assert "\x1b" not in capsys.readouterr().err


def nasty_config():
    config = json.loads(json.dumps(CONFIG))
    config["model"] |= {"id": NASTY, "class": PYTHON, "library": "transformers", "revision": NASTY}
    config["data"] |= {"id": f"/x/{NASTY}", "split": NASTY, "revision": NASTY}
    config |= {"output": NASTY, "unit": NASTY, "granularity": NASTY, "method": {"name": NASTY, NASTY: [NASTY]}}
    return config | {"versions": {NASTY: NASTY}, "seed": 0}


def assert_harmless(text):
    """As a reader of Markdown sees it."""
    prose = "".join(part for i, part in enumerate(text.split("```")) if i % 2 == 0)
    prose = re.sub(r"`[^`\n]*`", "code", prose.replace("\\`", ""))  # what stands in code is shown as it is
    assert "<script" not in prose and "\x1b" not in text and "\u202e" not in text
    assert "# Heading" not in [line.strip() for line in prose.splitlines()]
    assert not re.search(r"(?<!\\)\]\((javascript|http://t)", prose)
    widths = {line.count("|") - line.count("\\|") for line in prose.splitlines() if line.startswith("| ")}
    assert widths <= {3, 4, 5}, "a value broke out of its cell"


def test_cards_of_hostile_attributions():
    card = cards.attributions_card(nasty_config(), 3, "a/b", EVALUATION, 0.5, [f"pictures/{NASTY}.png"])
    assert_harmless(card)
    for code in card.split("```python\n")[1:]:
        compile(code.split("\n```")[0], "card", "exec")


def test_cards_of_hostile_edits():
    config = nasty_config()
    entries = {**ENTRIES, "base": config["model"], "data": config["data"], "rule": NASTY, "output": NASTY}
    entries |= {"components": [NASTY, "a`b"], "granularity": NASTY, "figures": [[NASTY] * 3], "reference": NASTY}
    entries |= {"increase": [NASTY], "step": 3, "tried": [[NASTY]]}
    for library in ("transformers", "timm", "torch", NASTY):
        entries["base"] = {**config["model"], "library": library}
        for source in (".", "me/x"):
            card = cards.edited_model_card(entries, source)
            assert_harmless(card)
            for code in card.split("```python\n")[1:]:
                code = code.split("\n```")[0]
                compile(code, "card", "exec")
                assert "os.system" not in code


@pytest.mark.usefixtures("pictures")
def test_report_pages_of_hostile_attributions(tmp_path):
    hostile = coar.Attributions(
        tiny().weights, tiny().bias, None, tiny().components, tiny().identity, nasty_config(), EVALUATION
    )
    page.write(tmp_path, hostile)
    assert_harmless((tmp_path / "report.md").read_text())
    assert "<script>alert" not in (tmp_path / "report.html").read_text()


def test_errors_do_not_quote_a_file():
    path = "/a/" + "b" * 250
    said = str(ModelError(f"{path} has the kind {'x' * 5000}end; give {[1] * 10}"))
    assert path in said and said.endswith("xend; give [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]") and len(said) < 600


def test_names_in_python_that_people_copy():
    assert escaping.python_name("ViTModel", "AutoModel") == "ViTModel"
    for name in (PYTHON, "class", "", "a b", None, 3, "a.b", "\u200bx"):
        assert escaping.python_name(name, "AutoModel") == "AutoModel"
    model = build_net("bert").model
    type(model).__name__, kept = PYTHON, type(model).__name__
    try:
        assert models.load_snippet(model, 'a"b').startswith("transformers.AutoModel.from_pretrained(")
    finally:
        type(model).__name__ = kept


def test_plain_texts_stay_as_they_are():
    for text in (
        "timm/resnet18.a1_in1k",
        "5 %",
        "layer3.1.conv2 filter 7",
        "split validation",
        "path gradient (rounds 8)",
    ):
        assert escaping.for_markdown(text) == text
    assert escaping.for_markdown("# a\n- b") == "\\# a - b"
    assert escaping.for_markdown("- a") == "\\- a" and escaping.for_markdown("1. a") == "1\\. a"
    assert escaping.for_markdown("[x](y) [1:2]") == "[x\\](y) [1:2]" and escaping.for_markdown("98.0 %") == "98.0 %"
    assert escaping.code_span("a`b|c") == "`a'b\u2502c`"


def test_errors_are_a_few_lines_whatever_a_library_says():
    said = str(CoarError(f"cannot be read: {', '.join(f'kind_{i}' for i in range(2000))}; give another one"))
    assert len(said) < 2000 and said.startswith("cannot be read: kind_0") and said.endswith("; give another one")
