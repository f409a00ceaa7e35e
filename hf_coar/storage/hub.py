"""What talks to the Hub: one place to read a repository or a folder, one to upload, and errors that say what to do."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hf_coar.errors import CoarError
from hf_coar.storage import swapping

CARD = "README.md"
LICENSE = ("license", "license_name", "license_link")  # keys of the head of a card

_Read = TypeVar("_Read")


class Source:
    """A local folder, or a Hub repository at one commit: whatever is pushed meanwhile, all files are of that commit."""

    def __init__(
        self,
        name: str | Path,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Nothing is downloaded yet.

        Args:
            name: local folder or Hub id.
            revision: branch, tag or commit on the Hub.
            token: for private repositories.
            cache_dir: of the Hub's files; the usual one by default.
            local_files_only: look only at what has been downloaded before.
        """
        self.name = str(name)
        self.is_local = Path(self.name).is_dir()
        self.commit: str | None = None
        self._revision = revision
        self._options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}

    def file(self, filename: str) -> Path:
        """The path of one of its files, downloaded if need be.

        Raises:
            CoarError: there is no such file, revision or repository, or the Hub cannot be reached.
        """
        path = self._path(filename, required=True)
        if path is None:
            raise CoarError(f"{self.name!r} holds no {filename}")
        return path

    def read_whole(self, read: Callable[[], _Read]) -> _Read:
        """What `read` makes of the files, all of them of before or after a save by another process."""
        return swapping.read_whole(Path(self.name), read) if self.is_local else read()

    def settle(self) -> None:
        """Finish a save that was killed half-way, before another library reads the folder.

        Raises:
            CoarError: the folder cannot be written.
        """
        try:
            if self.is_local:
                swapping.settle(Path(self.name))
        except OSError as error:
            raise CoarError(
                f"{self.name} was being saved when the process was killed, and cannot be written now "
                f"({error.strerror or error}); make it writable, and the save ends as it was meant to"
            ) from error

    def file_if_there(self, filename: str) -> Path | None:
        """What `read` gives, or None where the repository lacks the file."""
        return self._path(filename, required=False)

    def _path(self, filename: str, required: bool) -> Path | None:
        if self.is_local:
            path = swapping.current(Path(self.name), filename)
            return path if path.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            revision = self.commit or self._revision
            found = _once_more(lambda: hf_hub_download(self.name, filename, revision=revision, **self._options))
        except EntryNotFoundError as error:
            if not required:
                return None
            raise CoarError(f"cannot read {filename} of {self.name!r}: {explain(error)}") from error
        except _troubles() as error:
            raise CoarError(f"cannot read {filename} of {self.name!r}: {explain(error)}") from error
        path = Path(found)
        if self.commit is None and path.parent.parent.name == "snapshots":
            self.commit = path.parent.name
        return path


def resolve_commit(
    repo_id: str, revision: str | None = None, repo_type: str = "model", token: str | bool | None = None
) -> str | None:
    """The commit that a branch or tag stands at now; None where the Hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        return HfApi(token=token).repo_info(repo_id, revision=revision, repo_type=repo_type, timeout=10).sha
    except _troubles():
        return None


def license_of(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> dict[str, str]:
    """What the card of a model says of its licence, as entries for the head of another card.

    Returns:
        `license`, and for one that the Hub does not know by name `license_name` and `license_link`; nothing where there
        is no card, it says nothing, or the Hub cannot be asked.
    """
    import yaml
    from huggingface_hub import hf_hub_download, metadata_load

    try:
        said = metadata_load(hf_hub_download(repo_id, CARD, revision=revision, token=token)) or {}
    except (*_troubles(), yaml.YAMLError, ValueError):
        return {}
    # Lists and numbers are left out: the Hub refuses cards with a licence that it cannot read.
    return {key: said[key] for key in LICENSE if isinstance(said, dict) and isinstance(said.get(key), str)}


def is_open(data_id: str) -> bool:
    """Whether anybody may see a data set; false where the Hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        found = HfApi(token=False).dataset_info(data_id, timeout=10)
    except (*_troubles(), ValueError):
        return False
    return not (found.private or found.gated)


def upload(
    folder: str | Path,
    repo_id: str,
    patterns: Sequence[str],
    commit_message: str = "Upload with hf_coar",
    token: str | bool | None = None,
    create_pr: bool = False,
    is_generated: Callable[[str], bool] = lambda card: False,
    stale: Sequence[str] = (),
) -> str:
    """Upload files of a folder as one commit, so that nobody ever sees half of it.

    The repository's README.md is replaced only if `is_generated` says of its text that no person wrote it.

    Args:
        folder: local.
        repo_id: from `create`.
        patterns: globs of the files to upload.
        commit_message: first line of the commit.
        token: with the right to write.
        create_pr: propose the commit instead of making it.
        is_generated: tells a card that was made by a program.
        stale: globs of files that are deleted in the repository where the folder lacks them.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        CoarError: the Hub refuses or breaks off; nothing has been changed there then.
    """
    from huggingface_hub import HfApi

    hub = HfApi(token=token, library_name="hf_coar")
    try:
        card = _card(hub, repo_id)
        done = hub.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            create_pr=create_pr,
            allow_patterns=list(patterns),
            ignore_patterns=[CARD] if card is not None and not is_generated(card) else None,
            delete_patterns=list(stale) or None,
        )
    except _troubles() as error:
        raise CoarError(
            f"the Hub did not take the files for {repo_id!r}: {explain(error)}. No file was changed there"
        ) from error
    return str(done.pr_url or done.commit_url)


def create(repo_id: str, private: bool | None = None, token: str | bool | None = None) -> str:
    """Make a repository unless it exists.

    Args:
        repo_id: `user/name`; a name alone is of the user whose token it is.
        private: if it is made; the account's default otherwise.
        token: with the right to write.

    Returns:
        The full id.

    Raises:
        CoarError: the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        return HfApi(token=token, library_name="hf_coar").create_repo(repo_id, private=private, exist_ok=True).repo_id
    except _troubles() as error:
        raise CoarError(f"the Hub did not make {repo_id!r}: {explain(error)}") from error


def _card(hub: Any, repo_id: str) -> str | None:
    """The text of a repository's README.md, None if it has none."""
    from huggingface_hub.errors import RemoteEntryNotFoundError  # not its parent: that is also "no connection"

    try:
        path = hub.hf_hub_download(repo_id, CARD)
    except RemoteEntryNotFoundError:
        return None
    return Path(path).read_text(encoding="utf-8", errors="replace")


def _troubles() -> tuple[type[BaseException], ...]:
    """What huggingface_hub raises: errors of its own, of the system, and of the HTTP library beneath it."""
    from huggingface_hub.errors import HfHubHTTPError

    http_error = HfHubHTTPError.__bases__[0]  # httpx in huggingface_hub 1, httpx2 in 2
    return (OSError, ValueError, RuntimeError, http_error)


def _once_more(download: Callable[[], str]) -> str:
    """A download, which goes on where it was if the connection breaks off: not every version does so by itself."""
    try:
        return download()
    except _troubles() as error:
        if not _is_of_the_connection(error):
            raise
    return download()


def _is_of_the_connection(error: BaseException) -> bool:
    answered = getattr(error, "response", None) is not None
    return isinstance(error, _troubles()[-1] | ConnectionError) and not answered


def explain(error: BaseException) -> str:
    """What a failure of huggingface_hub means, and what to do, in one line."""
    from huggingface_hub import errors

    if type(error) is RuntimeError and isinstance(error.__cause__, _troubles()):
        error = error.__cause__  # "Error while uploading …", which says no more
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # the Hub was reached, and is in trouble
    known = [
        (errors.HFValidationError, "it is neither a folder nor a Hub id such as user/name"),
        (errors.GatedRepoError, "its owner lets in only who accepted the conditions: do so on its page, then "
                                "log in with `hf auth login`"),
        (errors.RevisionNotFoundError, "there is no such revision; give a branch, a tag or a commit"),
        (errors.RepositoryNotFoundError, "there is no such folder and no such repository, or it is private: check the "
                                         "name, and log in with `hf auth login` or pass token"),
        (errors.LocalEntryNotFoundError, "there is no such folder, it was not downloaded before, and the Hub cannot be "
                                         "asked: check the connection, HF_HUB_OFFLINE and local_files_only"),
        (errors.EntryNotFoundError, "the repository has no such file at that revision"),
    ]  # fmt: skip
    for kind, meaning in known:
        if isinstance(error, kind):
            return meaning
    status = getattr(getattr(error, "response", None), "status_code", None)
    return _STATUS.get(status) or (f"the Hub answered {status}; {_LATER}" if status else _without_status(error))


_LATER = "try again later: the same command goes on with what is still to do"
_STATUS = {
    400: "the Hub found a mistake in it (400), most often in the metadata at the top of README.md",
    401: "the Hub does not know you (401): log in with `hf auth login`, or pass a token that is valid",
    403: "the token does not allow it (403): use one with the right to write, or create_pr=True to propose the change",
    409: "somebody else changed the repository at the same time (409): run the same command again",
    413: "a file is larger than the Hub takes (413): give a smaller max_shard_size",
    429: "too many requests (429): wait some minutes, then run the same command again",
}


def _without_status(error: BaseException) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if _is_of_the_connection(error):
        return f"the connection broke off ({first}); {_LATER}"
    return first
