"""Edited models: saved and shared with their record and a card, and undone."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar import models
from hf_coar.attributions import artefact
from hf_coar.errors import CoarError, ModelMismatchError
from hf_coar.models import offloading
from hf_coar.models.records import EDIT as RECORD
from hf_coar.storage import cards, files, folders, hub

# What the libraries write, and what a tokenizer or an image processor needs; no pickles, no code.
_UPLOADED = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "*.spm", hub.CARD, "pictures/*.png")

Figures = Sequence[Sequence[str]]  # (what, before, after), such as ("accuracy on bags", "98.0%", "3.2%")


def undo(edited: nn.Module, base: nn.Module) -> nn.Module:
    """The original of an edited model, bit for bit: a copy in which what the edit changed is put back from the base.

    Args:
        edited: from `edit`, or from `models.load_model` of a folder or repository that `hf-coar edit` or `push` made.
        base: the model that was edited.

    Raises:
        CoarError: `edited` has no record of an edit, or was changed otherwise after it (the message says where).
        ModelMismatchError: `base` is not the model that was edited.
    """
    entries = models.record(edited).get("edit")
    if not isinstance(entries, dict) or not isinstance(entries.get("base"), dict):
        raise CoarError(
            f"the {type(edited).__name__} given has no record of an edit; load it with hf_coar.models.load_model from "
            "a folder or repository that holds coar_edit.json"
        )
    _check_base(entries["base"], base)
    restored = models.copy_with_record(edited, **models.record(base), edit=None)
    originals, tensors = _Tensors(base), _Tensors(restored)
    names = originals.shown.keys() | tensors.shown.keys()
    differing = {name for name in names if not _same(originals.value(name), tensors.value(name))}
    # What is not a parameter that the edit names may still share its memory (tied weights), so it is looked at last.
    for name in differing & set(entries.get("parameters") or ()):
        original, present = originals.value(name), tensors.value(name)
        if original is not None and present is not None and original.shape == present.shape:
            tensors.set(name, original)
    left = sorted(name for name in differing if not _same(originals.value(name), tensors.value(name)))
    if left or models.fingerprint(restored) != entries["base"].get("fingerprint"):
        raise CoarError(
            f"the model was changed after its edit, in {len(left)} tensors: {', '.join(left[:8])}; undo only puts back "
            "what the edit changed. The original is the base model itself"
        )
    return restored


class _Tensors:
    """The parameters and persistent buffers of a model, wherever they are kept."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shown = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}

    def value(self, name: str) -> Tensor | None:
        """A tensor; None where there is none of this name."""
        return offloading.value(self.model, name, self.shown[name]) if name in self.shown else None

    @torch.no_grad()
    def set(self, name: str, value: Tensor) -> None:
        """Put another value in its place."""
        if self.shown[name].is_meta:
            offloading.put(self.model, {name: value})
        else:
            self.shown[name].copy_(value)


def _check_base(known: Mapping[str, Any], base: nn.Module) -> None:
    fingerprint = models.fingerprint(base)
    if known.get("fingerprint") != fingerprint:
        raise ModelMismatchError(
            f"the edit was of {known.get('id') or 'a model'} (revision {known.get('revision')}, class "
            f"{known.get('class')}, weights {str(known.get('fingerprint'))[:12]}…), and the base given is a "
            f"{type(base).__name__} with weights {fingerprint[:12]}…; load the model that was edited"
        )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are the same, bit for bit (NaN too)."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(files.as_bytes(a), files.as_bytes(b))


def save(
    edited: nn.Module,
    folder: str | Path,
    figures: Figures = (),
    pictures: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Save an edited model as its own library does, with the record of the edit and a card; all or nothing.

    Args:
        edited: from `edit`.
        folder: made if it does not exist; otherwise it must be empty, or hold a model that was saved here before. A
            README.md that a person wrote or changed there is left as it is.
        figures: every metric, before and after, on examples that nothing was chosen on; for the card.
        pictures: a folder of PNG files for the card.
        overwrite: take a folder that holds other things as well; files of the same names are replaced.

    Raises:
        CoarError: it is not an edited model, or the folder holds other things or cannot be written. What was there is
            as it was then.
    """
    folder, entries = Path(folder), models.record(edited).get("edit")
    if not entries:
        raise CoarError(f"the {type(edited).__name__} given was not made by coar.edit; save it with its own library")
    with models.saved(edited, folder, overwrite) as new:
        _copy_preprocessing(models.record(edited), new)
        for picture in sorted(Path(pictures).glob("*.png")) if pictures is not None else ():
            files.write_bytes(new / artefact.PICTURES / picture.name, picture.read_bytes())
        entries = {**entries, "figures": [[str(cell) for cell in row] for row in figures]}
        files.write_json(new / RECORD, entries)
        write_card(new, entries, ".", folder)


# What tokenizers and processors of images, videos and sounds of transformers consist of.
_PREPROCESSING = (
    "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
    "special_tokens_map.json", "added_tokens.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "chat_template.json", "video_preprocessor_config.json", "normalizer.json",
    "sentencepiece.bpe.model", "source.spm", "target.spm", "target_vocab.json",
)  # fmt: skip


def _copy_preprocessing(origin: Mapping[str, Any], new: Path) -> None:
    """The image processor or tokenizer from where the model was loaded, if it is on this machine, for pipelines.

    Not from where its record says that the base is: a record may come from anybody, and name any folder.
    """
    if origin.get("library") != "transformers" or not origin.get("id"):
        return
    source = hub.Source(origin["id"], origin.get("revision"), local_files_only=True)
    for name in _PREPROCESSING:
        try:
            path = source.file_if_there(name)
        except CoarError:  # neither a folder nor a Hub id
            return
        if path is not None and not (new / name).exists():
            files.write_bytes(new / name, path.read_bytes())


def push_to_hub(
    edited: nn.Module | str | Path,
    repo_id: str,
    figures: Figures = (),
    private: bool | None = None,
    commit_message: str = "Upload edited model",
    token: str | bool | None = None,
    create_pr: bool = False,
    pictures: str | Path | None = None,
) -> str:
    """Upload an edited model as its own library saves it, with its record and a card, as one commit.

    Plain `from_pretrained` or `timm.create_model("hf-hub:…")` loads it. A README.md that a person wrote or changed is
    left as it is, here and there. Local paths are shortened to their last part.

    Args:
        edited: from `edit`, or the folder that `save` made of it; then it brings its figures and pictures along.
        repo_id: made if there is none.
        figures: as for `save`.
        private: if it is made; the account's default otherwise.
        commit_message: first line of the commit.
        token: with the right to write.
        create_pr: propose the commit instead of making it.
        pictures: as for `save`.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        CoarError: it is not an edited model, or the Hub refuses; the message says what to do.
    """
    with tempfile.TemporaryDirectory() as temporary:
        if isinstance(edited, nn.Module):
            save(edited, Path(temporary) / "saved", figures, pictures)
            edited = Path(temporary) / "saved"
        hub.Source(edited).settle()
        entries = artefact.public(read_record(edited))
        if isinstance(entries.get("base"), dict):
            entries["base"] = artefact.licensed(entries["base"], token)
        folder = Path(temporary) / "pushed"
        for pattern in _UPLOADED:
            for path in Path(edited).glob(pattern):
                target = folder / path.relative_to(edited)
                target.parent.mkdir(parents=True, exist_ok=True)
                if path.name not in (RECORD, folders.MARKER) and not target.exists():
                    target.symlink_to(path.resolve())
        repo_id = hub.create(repo_id, private, token)
        files.write_json(folder / RECORD, entries)
        write_card(folder, entries, repo_id)
        return hub.upload(folder, repo_id, _UPLOADED, commit_message, token, create_pr, cards.is_generated)


def read_record(folder: str | Path) -> dict[str, Any]:
    """The record of the edit that made the model in a folder.

    Raises:
        CoarError: there is none.
        CorruptFileError: it is damaged.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise CoarError(f"{folder} holds no edited model: it lacks {RECORD}, which hf_coar writes beside one")
    return models.check_edit(artefact.read_json(path), str(path))


def write_card(folder: Path, entries: Mapping[str, Any], source: str, beside: Path | None = None) -> None:
    """Write the card of the model in a folder, unless there is one that a person wrote or changed.

    Args:
        folder: to write to.
        entries: the record of the edit.
        source: from where the reader loads the model: Hub id, or "." for the folder itself.
        beside: the folder with the card and the `pictures` so far; by default the same one.
    """
    there = folder if beside is None else beside
    if not cards.may_be_replaced(there / hub.CARD):
        return
    names = {picture.name for place in (there, folder) for picture in (place / artefact.PICTURES).glob("*.png")}
    pictures = [f"{artefact.PICTURES}/{name}" for name in sorted(names)]
    files.write_bytes(folder / hub.CARD, cards.edited_model_card(entries, source, pictures).encode())
