"""Folders of saved attributions: an evaluation is added, or they are pushed to the Hub."""

from pathlib import Path
from typing import Any

from hf_coar.attributions import Attributions, Figures, artefact
from hf_coar.errors import CoarError
from hf_coar.storage import cards, folders, hub


def add_evaluation(folder: str | Path, report: Figures) -> None:
    """Save an evaluation beside the attributions that it judges, and show it on their card.

    Args:
        folder: made by `save_pretrained`, or the folder of a finished run.
        report: from `evaluate`.

    Raises:
        CoarError: no attributions there, or the folder cannot be written.
    """
    folders.claim(folder, folders.ATTRIBUTIONS)
    attributions = Attributions.from_pretrained(folder, verify=False)
    evaluation = cards.check_evaluation(report.to_json())
    if not artefact.is_of(evaluation, attributions.fingerprint()):
        raise CoarError(f"the evaluation is of other attributions than those in {folder}; evaluate these")
    artefact.write_json(Path(folder) / artefact.EVALUATION, evaluation)
    attributions.write_card(Path(folder), ".", attributions.provenance, evaluation)


def push_folder(folder: str | Path, repo_id: str, **settings: Any) -> str:
    """Upload what `save_pretrained` made, with its evaluation and pictures, and its card if a person wrote that.

    Args:
        folder: made by `save_pretrained`, or the folder of a finished run.
        repo_id: made if there is none.
        settings: further ones of `Attributions.push_to_hub`.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        CoarError: no attributions there, or the Hub refuses.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CoarError(f"there is no folder {str(folder)!r}; give one made by `hf-coar attribute` or `hf-coar edit`")
    card = folder / hub.CARD
    written = card.is_file() and not cards.is_generated(card.read_text(encoding="utf-8", errors="replace"))
    return Attributions.from_pretrained(folder, verify=False).push_to_hub(
        repo_id, pictures=folder / artefact.PICTURES, card=card if written else None, **settings
    )
