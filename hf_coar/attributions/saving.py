"""Saving: attributions as files, on the disk and the Hub.

attributions.safetensors    weights, bias, standard_errors, labels, hashes of the examples, a checksum a row; with a
                            forecast also unablated outputs, effects (single and far) and interactions; if large,
                            attributions-00001-of-00003.safetensors and so on, each with its stretch of the examples
components.json             what the columns are
stand_ins.safetensors       what stands in for ablated components, if that is something else than zero
config.json                 all that determines the numbers, and the checksums of the files above; written last
evaluation.json             predicted against measured, if it was evaluated
README.md                   a card
"""

import hashlib
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from hf_coar.attributions import artefact, looks, rows
from hf_coar.attributions.forecast import Forecast
from hf_coar.attributions.provenance import Provenance
from hf_coar.attributions.rows import Rows
from hf_coar.components import Components
from hf_coar.data import Identity
from hf_coar.errors import CoarError
from hf_coar.storage import cards, files, folders, hub, swapping

logger = logging.getLogger(__name__)

_VERIFIED_AT_LOAD = 64 * 2**20  # bytes; larger files are checked row by row as they are read, or by `verify`


class Figures(Protocol):
    """What `evaluate` gives: figures as JSON values."""

    def to_json(self) -> dict[str, Any]:
        """The figures, without the arrays."""


class Saved:
    """How `Attributions`, which are these, become files and come from them."""

    bias: Tensor
    components: Components
    identity: Identity
    provenance: Provenance
    evaluation: dict[str, Any] | None
    forecast: Forecast | None
    origin: Path | str | None
    made_here: bool
    _matrices: dict[str, Rows]

    def fingerprint(self) -> str:
        """Hash of weights and bias, by which an evaluation knows what it judged, as 32 hexadecimal digits."""
        return _fingerprint(self.matrix(), self.bias)

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: str | torch.dtype | None = None,
        max_shard_size: int | str = "5GB",
        report: Figures | None = None,
        overwrite: bool = False,
    ) -> None:
        """Save to a folder, all or nothing; a README.md that a person wrote or changed is left as it is.

        Args:
            folder: made if it does not exist; otherwise it must be empty, or ours.
            dtype: of the matrices: "float32", or "float16" for half the size.
            max_shard_size: bytes a file, or such as "500MB"; larger matrices are divided between files.
            report: from `evaluate`, to be saved with them and shown on the card.
            overwrite: take a folder that holds other things as well; files of the same names are replaced.

        Raises:
            CoarError: the folder holds other things or cannot be written, the report is of other attributions, or the
                weights do not fit into float16. What was saved there before is as it was then.
        """
        folder = Path(folder)
        folders.check(folder, folders.ATTRIBUTIONS, overwrite)
        evaluation = self._judged(report) or self._left_in(folder)
        others = [*artefact.shards_in(folder), artefact.STAND_INS]
        others += [] if evaluation else [artefact.EVALUATION, cards.RESULTS]
        with folders.replaced(folder, folders.ATTRIBUTIONS, overwrite, self.made_here, others) as new:
            self._write(new, ".", dtype, max_shard_size, evaluation, self.provenance, beside=folder)

    def _judged(self, report: Figures | None) -> dict[str, Any] | None:
        """The figures that belong to these weights."""
        evaluation = self.evaluation if report is None else report.to_json()
        if evaluation is not None and not artefact.is_of(evaluation, self.fingerprint()):
            if report is not None:
                raise CoarError("report is of other attributions than these; evaluate these, or save those")
            logger.warning("the evaluation was of other weights, and is left out; evaluate these")
            return None
        return evaluation

    def _left_in(self, folder: Path) -> dict[str, Any] | None:
        """The evaluation that an earlier save of these weights, or their run, has in its folder."""
        path = swapping.current(folder, artefact.EVALUATION)
        if not path.is_file():
            return None
        evaluation = artefact.read_evaluation(path)
        if evaluation.get("of") is None:  # of an older version: it belongs to what lies beside it
            evaluation["of"] = type(self)._fingerprint_in(folder)
        return evaluation if artefact.is_of(evaluation, self.fingerprint(), unknown=False) else None

    def _write(
        self,
        folder: Path,
        source: str,
        dtype: Any,
        max_shard_size: int | str,
        evaluation: Mapping[str, Any] | None,
        provenance: Provenance,
        beside: Path | None = None,
    ) -> None:
        """All files into an empty folder; `beside` is the one where they will lie, with its card and pictures."""
        stored = rows.stored_dtype(dtype)
        checksums = self._save_matrices(folder, stored, max_shard_size)
        checksums[artefact.COMPONENTS] = artefact.write_components(folder, self.components)
        if evaluation is not None:
            weights = rows.as_rows(rows.converted(self.weights, stored))
            evaluation = {**evaluation, "of": _fingerprint(weights, self.bias)}
            artefact.write_json(folder / artefact.EVALUATION, evaluation)
        self.write_card(folder, source, provenance, evaluation, beside)
        number = artefact.format_of(self.identity, self.components)
        config = {"hf_coar_format": number, "files": checksums, **provenance.to_json()}
        artefact.write_json(folder / artefact.CONFIG, config)

    def _save_matrices(self, folder: Path, dtype: torch.dtype, max_shard_size: int | str) -> dict[str, str]:
        self._check_finite()  # tensors may have been changed since they were given
        columns = {"bias": self.bias.float(), **self.identity.columns()}
        matrices = {name: matrix.tensor() for name, matrix in self._matrices.items()}
        if self.forecast is not None:
            columns["unablated"] = self.forecast.unablated.float()
            matrices |= self.forecast.matrices()
        row_size = max(1, sum(matrix.shape[1] for matrix in matrices.values()) * dtype.itemsize)
        n_rows = max(1, rows.n_bytes(max_shard_size) // row_size)
        starts = range(0, len(self), n_rows)
        checksums = {}
        for name, start in zip(artefact.shard_names(len(starts)), starts, strict=True):
            stretch = slice(start, start + n_rows)
            checksums[name] = rows.save(
                folder / name,
                {key: rows.converted(matrix[stretch], dtype) for key, matrix in matrices.items()},
                {key: column[stretch] for key, column in columns.items()},
            )
        return checksums

    def write_card(
        self,
        folder: Path,
        source: str,
        provenance: Provenance,
        evaluation: Mapping[str, Any] | None,
        beside: Path | None = None,
    ) -> None:
        """Write the card, unless there is one that a person wrote or changed, and the Hub's file of results.

        Args:
            folder: to write to.
            source: from where the reader loads the attributions: Hub id, or "." for the folder itself.
            provenance: as the card is to show it.
            evaluation: `Report.to_json()`, or None.
            beside: the folder with the card so far and the `pictures`; by default the same one.
        """
        there = folder if beside is None else beside
        if cards.may_be_replaced(there / hub.CARD):
            pictures = sorted(
                f"{artefact.PICTURES}/{picture.name}" for picture in (there / artefact.PICTURES).glob("*.png")
            )
            of = provenance.to_json()
            card = cards.attributions_card(
                of, len(self), source, evaluation, self.stability(), pictures, looks.examples_text(self)
            )
            files.write_bytes(folder / hub.CARD, card.encode())
        results = cards.evaluation_yaml(provenance.data, evaluation)
        if results is not None:
            files.write_bytes(folder / cards.RESULTS, results.encode())

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        verify: bool | None = None,
    ) -> Self:
        """Load from a local folder or the Hub. Nothing is unpickled, and nothing is run.

        The matrices are mapped from the files: what is not looked at is not read.

        Args:
            name: folder made by `save_pretrained`, or Hub id.
            revision: branch, tag or commit on the Hub.
            token: for private repositories.
            cache_dir: of the Hub's files; the usual one by default.
            local_files_only: look only at what has been downloaded before.
            verify: check every row now. By default of files up to 64 MB; of larger ones `row` checks the rows that it
                reads, and `verify()` all of them.

        Raises:
            CoarError: no such folder or repository.
            CorruptFileError: the files are damaged, of another format, or not attributions.
        """
        source = hub.Source(name, revision, token, cache_dir, local_files_only)
        return source.read_whole(lambda: cls._read(source, verify))

    @classmethod
    def _read(cls, source: hub.Source, verify: bool | None) -> Self:
        name = source.name
        if source.is_local:
            artefact.check_folder(Path(name))
        checksums, provenance = artefact.read_config(source.file(artefact.CONFIG), str(name))
        components = artefact.read_components(source, checksums.pop(artefact.COMPONENTS), provenance)
        paths = [source.file(file) for file in checksums]
        matrices, columns = rows.load(paths, list(checksums.values()), artefact.MATRICES)
        artefact.check_columns(paths[0], matrices, columns)
        evaluation_path = source.file_if_there(artefact.EVALUATION)
        loaded = cls(
            matrices["weights"],
            columns["bias"],
            matrices.get("standard_errors"),
            components,
            Identity.of(columns),
            provenance,
            forecast=None if provenance.forecast is None else Forecast.from_rows(provenance, matrices, columns),
        )
        loaded.origin = Path(name).resolve() if source.is_local else str(name)
        loaded.made_here = source.is_local and folders.made_here(name)
        if evaluation_path is not None:
            loaded.evaluation = artefact.read_evaluation(evaluation_path)
            loaded.evaluation = loaded._judged(None)
        if verify or (verify is None and sum(map(artefact.size, paths)) <= _VERIFIED_AT_LOAD):
            loaded.verify()
        return loaded

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        commit_message: str = "Upload attributions",
        token: str | bool | None = None,
        create_pr: bool = False,
        dtype: str | torch.dtype | None = None,
        max_shard_size: int | str = "5GB",
        report: Figures | None = None,
        pictures: str | Path | None = None,
        card: str | Path | None = None,
    ) -> str:
        """Upload to the Hub, as one commit; a README.md that a person wrote or changed there is left as it is.

        Every row is checked first. Local paths of the model and the data are shortened to their last part.

        Args:
            repo_id: made if there is none.
            private: if it is made; the account's default otherwise.
            commit_message: first line of the commit.
            token: with the right to write.
            create_pr: propose the commit instead of making it.
            dtype: "float32" or "float16", as in `save_pretrained`.
            max_shard_size: bytes a file, or such as "500MB".
            report: from `evaluate`, for the card and the Hub's evaluation results.
            pictures: a folder of PNG files for the card; the picture of an example is left out unless anybody may
                see its data on the Hub.
            card: a README.md of your own, instead of the one made from the template.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            CoarError: the Hub refuses or cannot be reached; the message says what to do.
            CorruptFileError: what would be uploaded is damaged.
        """
        self.verify()
        repo_id = hub.create(repo_id, private, token)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for picture in self._shared(pictures):
                files.write_bytes(folder / artefact.PICTURES / picture.name, picture.read_bytes())
            if card is not None:
                files.write_bytes(folder / hub.CARD, Path(card).read_bytes())
            public = self.provenance.public()
            public = replace(public, model=artefact.licensed(public.model, token))
            self._write(folder, repo_id, dtype, max_shard_size, self._judged(report), public)
            return hub.upload(
                folder, repo_id, artefact.UPLOADED, commit_message, token, create_pr,
                is_generated=cards.is_generated, stale=("attributions*.safetensors",),
            )  # fmt: skip

    def _shared(self, pictures: str | Path | None) -> list[Path]:
        """The pictures that go to the Hub; an example of data that not anybody may see there stays where it is."""
        found = sorted(Path(pictures).glob("*.png")) if pictures is not None else []
        others = [picture for picture in found if picture.stem != artefact.FIRST_EXAMPLE]
        data = cards.hub_id(self.provenance.data)
        return found if len(others) < len(found) and data and hub.is_open(data) else others

    @classmethod
    def _fingerprint_in(cls, folder: Path) -> str | None:
        try:
            return cls.from_pretrained(folder, verify=False).fingerprint()
        except CoarError:
            return None


def _fingerprint(weights: Rows, bias: Tensor) -> str:
    digest = hashlib.blake2b(weights.fingerprint().encode(), digest_size=16)
    digest.update(files.tensor_bytes(bias.float()))
    return digest.hexdigest()
