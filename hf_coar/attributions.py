"""Attributions: weights by example and component, with everything that determined them. What goes to disk and the Hub.

attributions.safetensors    weights, bias, standard_errors, signatures, labels; a checksum in the header
config.json                 all that determines the numbers
components.json             what the columns are
README.md                   a card
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_coar import cards, files
from hf_coar.components import Components
from hf_coar.data import Identity
from hf_coar.errors import CoarError, CorruptFileError, ModelMismatchError

FORMAT_VERSION = 1
_WEIGHTS, _CONFIG, _COMPONENTS, _CARD = "attributions.safetensors", "config.json", "components.json", "README.md"


@dataclass(frozen=True)
class Attributions:
    """How much every component contributes to every example's output.

    The output of example e when the components outside `kept` are ablated is predicted to be
    `bias[e] + sum_i kept[i] * weights[e, i]`: a positive weight means that keeping the component raises the output.

    Attributes:
        weights: float32 [examples, components], in the unit of the output.
        bias: float32 [examples].
        standard_errors: float32 [examples, components] of the weights, or None.
        components: what the columns are.
        identity: by which the examples are known again, and their labels.
        config: model, data, output, method, ablated fraction, seed, cost and versions, as JSON values.
    """

    weights: Tensor
    bias: Tensor
    standard_errors: Tensor | None
    components: Components
    identity: Identity
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the shapes agree."""
        n_examples, n_components = self.weights.shape
        if n_components != len(self.components) or self.bias.shape != (n_examples,):
            raise CoarError(
                f"weights {list(self.weights.shape)}, bias {list(self.bias.shape)} and {len(self.components)} "
                "components do not fit together"
            )

    def __len__(self) -> int:
        """How many examples."""
        return self.weights.shape[0]

    @property
    def labels(self) -> Tensor:
        """The examples' labels, int64 [examples]; -1 where there are none."""
        return self.identity.labels

    def predict(self, kept: Any) -> Tensor:
        """The outputs expected when components are ablated.

        Args:
            kept: bool or float, [masks, components] or [components]; True or 1 = left in place.

        Returns:
            float32 [masks, examples] ([1, examples] for a single mask).

        Raises:
            CoarError: another shape, or gates outside 0 … 1.
        """
        kept = self.components.check_kept(kept).float()
        return torch.atleast_2d(kept) @ self.weights.T + self.bias

    def check_model(self, fingerprint: str) -> None:
        """Raises `ModelMismatchError` unless a model with this fingerprint was attributed."""
        model = self.config.get("model", {})
        if model.get("fingerprint") != fingerprint:
            raise ModelMismatchError(
                f"these attributions are of {model.get('id') or 'a model'} (class {model.get('class')}, weights "
                f"{str(model.get('fingerprint'))[:12]}…), and the model given has weights {fingerprint[:12]}…; "
                "load the model that was attributed, or attribute this one"
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Save; a README.md that is there already is left as it is.

        Raises:
            CoarError: the folder cannot be written.
        """
        folder = Path(folder)
        tensors = {"weights": self.weights, "bias": self.bias, **vars(self.identity)}
        if self.standard_errors is not None:
            tensors["standard_errors"] = self.standard_errors
        files.write_tensors(folder / _WEIGHTS, tensors)
        files.write_json(folder / _COMPONENTS, self.components.to_json())
        # The configuration comes last: where it is, the rest is whole.
        files.write_json(folder / _CONFIG, {"hf_coar_format": FORMAT_VERSION, **self.config})
        if not (folder / _CARD).exists():
            files.write_bytes(folder / _CARD, cards.attributions_card(self.config, len(self)).encode())

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None, token: str | None = None) -> "Attributions":
        """Load from a local folder or the Hub.

        Args:
            name: folder made by `save_pretrained`, or Hub id.
            revision: branch, tag or commit on the Hub.
            token: for private repositories.

        Raises:
            CoarError: no such folder or repository.
            CorruptFileError: the files are damaged, of a newer format, or not attributions.
        """
        paths = _locate(str(name), revision, token)
        config = files.read_json(paths[_CONFIG])
        if not isinstance(config, dict) or config.get("hf_coar_format") != FORMAT_VERSION:
            found = config.get("hf_coar_format") if isinstance(config, dict) else None
            raise CorruptFileError(
                f"{name} is of hf_coar format {found!r}, and this version reads format {FORMAT_VERSION}"
            )
        components = Components.from_json(files.read_json(paths[_COMPONENTS]))
        tensors = files.read_tensors(paths[_WEIGHTS])
        lacking = {"weights", "bias", "signatures", "labels"} - tensors.keys()
        if lacking or tensors["weights"].dim() != 2:
            raise CorruptFileError(f"{paths[_WEIGHTS]} holds {sorted(tensors)}; it lacks {sorted(lacking)}")
        config = {key: value for key, value in config.items() if key != "hf_coar_format"}
        return cls(
            tensors["weights"].float(),
            tensors["bias"].float(),
            tensors.get("standard_errors"),
            components,
            Identity(tensors["signatures"], tensors["labels"]),
            config,
        )

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        commit_message: str = "Upload attributions",
        token: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload to the Hub; a README.md that is there already is left as it is.

        Returns:
            The address of the commit.

        Raises:
            CoarError: the Hub refuses.
        """
        import tempfile

        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        hub = HfApi(token=token)
        try:
            repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
            has_card = hub.file_exists(repo_id, _CARD)
            with tempfile.TemporaryDirectory() as folder:
                self.save_pretrained(folder)
                done = hub.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    commit_message=commit_message,
                    create_pr=create_pr,
                    ignore_patterns=[_CARD] if has_card else None,
                )
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise CoarError(f"the Hub did not take {repo_id!r}: {str(error).strip().splitlines()[0]}") from error
        return str(done.commit_url)


def _locate(name: str, revision: str | None, token: str | None) -> dict[str, Path]:
    """The three files of an artefact by name, downloaded if `name` is no folder."""
    wanted = (_CONFIG, _COMPONENTS, _WEIGHTS)
    folder = Path(name)
    if folder.is_dir():
        absent = [file for file in wanted if not (folder / file).is_file()]
        if absent:
            raise CoarError(f"{folder} holds no attributions: it lacks {', '.join(absent)}")
        return {file: folder / file for file in wanted}
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return {file: Path(hf_hub_download(name, file, revision=revision, token=token)) for file in wanted}
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CoarError(f"no attributions {name!r}: there is no such folder, and the Hub says: {first}") from error
