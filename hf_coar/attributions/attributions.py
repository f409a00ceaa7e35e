"""Attributions: weights by example and component, with everything that determined them. What goes to disk and the Hub.

attributions.safetensors    weights, bias, standard_errors, labels, hashes of the examples, a checksum a row; if large
                            attributions-00001-of-00003.safetensors and so on, each with its stretch of the examples
components.json             what the columns are
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
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_coar.attributions import artefact, rows
from hf_coar.attributions.provenance import Provenance
from hf_coar.attributions.rows import Rows
from hf_coar.components import Components
from hf_coar.data import Identity
from hf_coar.errors import CoarError, CorruptFileError, ModelMismatchError, NonFiniteOutputError
from hf_coar.storage import cards, files, folders, hub, swapping

logger = logging.getLogger(__name__)

_TOLD = ("class", "library", "id", "revision", "dtype", "n_parameters")
_VERIFIED_AT_LOAD = 64 * 2**20  # bytes; larger files are checked row by row as they are read, or by `verify`


class Figures(Protocol):
    """What `evaluate` gives: figures as JSON values."""

    def to_json(self) -> dict[str, Any]:
        """The figures, without the arrays."""


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
        provenance: model, data, output, method, ablated fraction, seed, cost and versions.
        evaluation: predicted against measured as JSON values, or None; `evaluate` makes it, `save_pretrained` keeps it.
        origin: the folder that they were loaded from, the Hub id, or None where they were made just now.
        made_here: whether `provenance` comes from this user on this machine, so that local paths in it may be followed.
    """

    origin: Path | str | None = None
    made_here: bool = False

    def __init__(
        self,
        weights: Tensor | Rows,
        bias: Tensor,
        standard_errors: Tensor | Rows | None,
        components: Components,
        identity: Identity,
        config: Provenance | Mapping[str, Any] | None = None,
        evaluation: Mapping[str, Any] | None = None,
    ) -> None:
        """Matrices as tensors, or as rows that lie in files; `config` is the provenance, or its JSON values.

        Raises:
            CoarError: the shapes do not agree.
            NonFiniteOutputError: NaN or infinity; names the example and the component.
        """
        self.provenance = Provenance.from_json(config or {})
        self._matrices = {"weights": rows.as_rows(weights)}
        if standard_errors is not None:
            self._matrices["standard_errors"] = rows.as_rows(standard_errors)
        self.bias = bias
        self.components = replace(components, fingerprint=self.provenance.fingerprint)
        self.identity = identity
        self.evaluation = dict(evaluation) if evaluation is not None else None
        shapes = {name: list(matrix.shape) for name, matrix in self._matrices.items()}
        n_examples = len(self)
        columns = {"bias": bias, **identity.columns()}
        lengths = {name: list(column.shape) for name, column in columns.items() if name not in identity.hash_columns()}
        lengths |= {name: list(column.shape)[:1] for name, column in identity.hash_columns().items()}
        if any(shape != [n_examples, len(components)] for shape in shapes.values()) or any(
            shape != [n_examples] for shape in lengths.values()
        ):
            raise CoarError(f"{shapes | lengths} and {len(components)} components do not fit together")
        self._check_finite()

    def _check_finite(self) -> None:
        """Check all that lies in memory; what lies in files is checked as it is read."""
        for matrix in self._matrices.values():
            if matrix.in_memory:
                matrix.verify(self.components)
        bad = (~self.bias.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise NonFiniteOutputError(f"the bias of example {bad[0]} is {float(self.bias[bad[0]])}; it cannot be used")

    @property
    def config(self) -> dict[str, Any]:
        """The provenance as JSON values, as `config.json` holds it."""
        return self.provenance.to_json()

    @property
    def weights(self) -> Tensor:
        """Float32 [examples, components]; of loaded attributions a view of the file, read where it is used."""
        return self._matrices["weights"].tensor()

    @property
    def standard_errors(self) -> Tensor | None:
        """Float32 [examples, components] of the weights, like them; None where the estimator gave none."""
        return self._matrices["standard_errors"].tensor() if self.has_standard_errors else None

    def __len__(self) -> int:
        """How many examples."""
        return self._matrices["weights"].shape[0]

    def __repr__(self) -> str:
        """Such as `Attributions(200 examples, 832 components, output 'margin')`."""
        output = self.provenance.output
        return f"Attributions({len(self)} examples, {len(self.components)} components, output {output!r})"

    @property
    def labels(self) -> Tensor:
        """The examples' labels, int64 [examples]; -1 where there are none."""
        return self.identity.labels

    def row(self, index: int, of: str = "weights") -> Tensor:
        """One example's weights (or standard errors), float32 [components]; only they are read, and checked.

        Args:
            index: of the example; negative ones count from the end.
            of: "weights" or "standard_errors".

        Raises:
            IndexError: no such example.
            CoarError: there are no standard errors.
            CorruptFileError: the row in the file is not what was written.
        """
        return self.matrix(of).row(index)

    def matrix(self, of: str = "weights") -> rows.Rows:
        """The weights or the standard errors as rows that are read when asked for.

        Args:
            of: "weights" or "standard_errors".

        Raises:
            CoarError: there are no such ones.
        """
        if of not in self._matrices:
            raise CoarError(f"of={of!r}; there are {', '.join(self._matrices)}")
        return self._matrices[of]

    @property
    def has_standard_errors(self) -> bool:
        """Whether there are standard errors; reads nothing."""
        return "standard_errors" in self._matrices

    def verify(self) -> None:
        """Check every row of what was loaded against its checksum; this reads the files once.

        Raises:
            CorruptFileError: a row is not what was written.
            NonFiniteOutputError: a row holds NaN or infinity.
        """
        for matrix in self._matrices.values():
            matrix.verify(self.components)

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

    def stability(self) -> float | None:
        """The correlation expected between an example's weights and those of a second run with another seed.

        The mean over the examples of 1 - (mean squared standard error) / (variance of the weights); the module
        `stability` gives it for each of them. None without standard errors, or where no example's weights vary.
        """
        if not self.has_standard_errors:
            return None
        found = []
        for index in range(len(self)):
            variance = self.row(index).double().var(correction=0)
            noise = self.row(index, "standard_errors").double().square().mean()
            if variance > 0:
                found.append(float(1 - noise / variance))
        return sum(found) / len(found) if found else None

    def sum_by(self, by: str) -> tuple[list[str], Tensor]:
        """Totals over the components of each layer, module or attention head: what ablating all of it would cost.

        Args:
            by: "layer", "module" or "head".

        Returns:
            names [groups], and float32 [examples, groups] in the unit of the output. Components that belong to no group
            (to no head) are in no total.

        Raises:
            CoarError: another `by`, or no component belongs to a head.
        """
        names, index = self.components.regroup(by)
        inside = index >= 0
        totals = torch.zeros(len(self), len(names), dtype=self.weights.dtype)
        return names, totals.index_add_(1, index[inside], self.weights[:, inside].cpu())

    def found(self, name: str | None) -> str | None:
        """Where a model or data set that the provenance names is: a Hub id, or a local path seen from here.

        Raises:
            CoarError: these attributions come from the Hub and name a local path.
        """
        if name is None or self.origin is None:
            return name
        if isinstance(self.origin, str):
            if Path(name).exists():
                raise CoarError(
                    f"attributions from the Hub ({self.origin}) name {name!r}, which is a path on this machine; if it "
                    "is meant, give it yourself with model=… or data=…"
                )
            return name
        # Relative paths are of the folder where the run was made, which is around it as a rule.
        around = [Path(name), *(folder / name for folder in self.origin.parents)]
        there = next((str(path) for path in around if path.exists()), None)
        if there is not None and not self.made_here:
            raise CoarError(
                f"{self.origin} was not made here by you, and names {name!r}, which is a path on this machine; if it "
                "is meant, give it yourself with model=… or data=…"
            )
        return there or name

    def check_model(self, fingerprint: str, given: Mapping[str, Any] | None = None) -> None:
        """Raises `ModelMismatchError` unless a model with this fingerprint was attributed.

        Args:
            fingerprint: `models.fingerprint` of the model.
            given: `models.record` of the model, for the message to name what differs.
        """
        known = self.provenance.model
        if known.get("fingerprint") == fingerprint:
            return
        named = {key: (known.get(key), given.get(key)) for key in _TOLD} if given is not None else {}
        differing = [f"{key} {was!r} against {now!r}" for key, (was, now) in named.items() if was != now]
        if given is not None and "edit" in given:
            differing.append(f"it was edited: {len(given['edit'].get('components', ()))} components are ablated")
        differing.append(f"weights {str(known.get('fingerprint'))[:12]}… against {fingerprint[:12]}…")
        raise ModelMismatchError(
            f"these attributions are of {known.get('id') or 'a model'} (class {known.get('class')}), and not of the "
            f"model given; what differs: {', '.join(differing)}. Load the model that was attributed, or attribute "
            "this one"
        )

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
        others = [*artefact.shards_in(folder), *([] if evaluation else [artefact.EVALUATION, cards.RESULTS])]
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
            evaluation["of"] = _fingerprint_in(folder)
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
        artefact.write_json(folder / artefact.COMPONENTS, self.components.to_json())
        checksums[artefact.COMPONENTS] = artefact.checksum(folder / artefact.COMPONENTS)
        if evaluation is not None:
            weights = rows.as_rows(rows.converted(self.weights, stored))
            evaluation = {**evaluation, "of": _fingerprint(weights, self.bias)}
            artefact.write_json(folder / artefact.EVALUATION, evaluation)
        self.write_card(folder, source, provenance, evaluation, beside)
        artefact.write_json(
            folder / artefact.CONFIG,
            {"hf_coar_format": artefact.format_of(self.identity), "files": checksums, **provenance.to_json()},
        )

    def _save_matrices(self, folder: Path, dtype: torch.dtype, max_shard_size: int | str) -> dict[str, str]:
        self._check_finite()  # tensors may have been changed since they were given
        columns = {"bias": self.bias.float(), **self.identity.columns()}
        matrices = {name: matrix.tensor() for name, matrix in self._matrices.items()}
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
            card = cards.attributions_card(of, len(self), source, evaluation, self.stability(), pictures)
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
    ) -> "Attributions":
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
    def _read(cls, source: hub.Source, verify: bool | None) -> "Attributions":
        name = source.name
        if source.is_local:
            artefact.check_folder(Path(name))
        checksums, provenance = artefact.read_config(source.file(artefact.CONFIG), str(name))
        components_path = source.file(artefact.COMPONENTS)
        if artefact.checksum(components_path) != checksums.pop(artefact.COMPONENTS):
            raise CorruptFileError(
                f"{components_path} is damaged or not finished: its checksum is not the recorded one"
            )
        components = Components.from_json(artefact.read_json(components_path))
        paths = [source.file(file) for file in checksums]
        matrices, columns = rows.load(paths, list(checksums.values()), ("weights", "standard_errors"))
        artefact.check_columns(paths[0], matrices, columns)
        evaluation_path = source.file_if_there(artefact.EVALUATION)
        loaded = cls(
            matrices["weights"],
            columns["bias"],
            matrices.get("standard_errors"),
            components,
            Identity.of(columns),
            provenance,
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
            pictures: a folder of PNG files for the card.
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
            for picture in sorted(Path(pictures).glob("*.png")) if pictures is not None else ():
                files.write_bytes(folder / artefact.PICTURES / picture.name, picture.read_bytes())
            if card is not None:
                files.write_bytes(folder / hub.CARD, Path(card).read_bytes())
            self._write(folder, repo_id, dtype, max_shard_size, self._judged(report), self.provenance.public())
            return hub.upload(
                folder, repo_id, artefact.UPLOADED, commit_message, token, create_pr,
                is_generated=cards.is_generated, stale=("attributions*.safetensors",),
            )  # fmt: skip


def _fingerprint(weights: Rows, bias: Tensor) -> str:
    digest = hashlib.blake2b(weights.fingerprint().encode(), digest_size=16)
    digest.update(files.tensor_bytes(bias.float()))
    return digest.hexdigest()


def _fingerprint_in(folder: Path) -> str | None:
    try:
        return Attributions.from_pretrained(folder, verify=False).fingerprint()
    except CoarError:
        return None
