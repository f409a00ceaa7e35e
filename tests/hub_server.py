"""A small Hub on 127.0.0.1, in memory: enough of the protocol for the real huggingface_hub client to push and pull.

Run by `hub(…)` in a thread. `Hub.faults` makes it fail on purpose: a fault is [method, part of the path, what, times],
with what = a status code, "die" (the connection closes without an answer) or "truncate" (it closes amid the body).
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGEST_BODY = 2**28
READ_ONLY_TOKEN = "hf_readonly"
RELATIONS = {"finetune", "adapter", "merge", "quantized"}


@dataclass
class Repo:
    """Commits are whole trees; branches and pull requests name one."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)

    def commit(self, ref: str, tree: dict[str, bytes], message: str) -> str:
        """Make a commit on a branch."""
        digest = hashlib.sha1(f"{len(self.commits)} {message}".encode())
        for path, content in sorted(tree.items()):
            digest.update(path.encode() + hashlib.sha1(content).digest())
        self.commits[digest.hexdigest()] = tree
        self.refs[ref] = digest.hexdigest()
        return digest.hexdigest()

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, a pull request or a commit."""
        return self.refs.get(revision, revision if revision in self.commits else None)


@dataclass
class Hub:
    """The state, which tests look at and change."""

    mode: str = "lfs"  # or "regular": every file within the commit
    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)  # "user/name", "datasets/user/name"
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: list[list] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository."""
        return self.repos[repo].commits[self.repos[repo].refs[revision]]

    def add(self, repo: str, files: dict[str, bytes]) -> str:
        """Put a repository there, or a commit on it."""
        found = self.repos.setdefault(repo, Repo())
        old = found.commits.get(found.refs.get("main", ""), {})
        return found.commit("main", {**old, **files}, "added by the test")

    def fault(self, method: str, path: str) -> str | int | None:
        """What is to go wrong with this request."""
        with self.lock:
            for entry in self.faults:
                if entry[0] in (method, "*") and entry[1] in path and entry[3] > 0:
                    entry[3] -= 1
                    return entry[2]
        return None


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args) -> None:
        pass

    def do_GET(self):
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        split = urlsplit(self.path)
        self.path_only, self.query = unquote(split.path), parse_qs(split.query)
        self.hub.requests.append(f"{self.command} {self.path_only}")
        if self.path_only == "/_faults":
            self.hub.faults[:] = json.loads(self._body())
            return self._json({})
        what = self.hub.fault(self.command, self.path_only)
        if what == "die":
            self.close_connection = True
            return self.connection.close()
        body = self._body()
        try:
            if isinstance(what, int):
                raise _Refused(what, message="made to fail by the test")
            with self.hub.lock:
                self._route(body, truncate=what == "truncate")
        except _Refused as refused:
            self._json({"error": refused.message or refused.code}, refused.status, {"X-Error-Code": refused.code})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts, total = [], 0
            while total <= LARGEST_BODY and (size := int(self.rfile.readline(64).strip() or b"0", 16)):
                parts.append(self.rfile.read(size))
                self.rfile.readline(64)
                total += size
            self.rfile.readline(64)
            return b"".join(parts)
        return self.rfile.read(min(int(self.headers.get("Content-Length") or 0), LARGEST_BODY))

    def _json(self, value, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content: bytes, status: int, headers: dict[str, str], truncate: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if truncate else content)
        if truncate:
            self.close_connection = True

    # ------------------------------------------------------------------------------------------------------- routes

    def _route(self, body: bytes, truncate: bool) -> None:
        path = self.path_only
        if self.command == "POST" and path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if path.startswith("/api/whoami"):
            return self._json({"name": "me", "type": "user", "orgs": [], "auth": {"type": "access_token"}})
        if self.command == "PUT" and path.startswith("/objects/"):
            return self._put(path.rsplit("/", 1)[1], body)
        if match := re.fullmatch(r"/(?P<repo>.+)\.git/info/lfs/objects/batch", path):
            return self._batch(match["repo"], json.loads(body))
        if match := re.fullmatch(r"/(?P<repo>(datasets/)?[^/]+/[^/]+)/resolve/(?P<rest>.+)", path):
            return self._resolve(match["repo"], match["rest"], truncate)
        if match := re.fullmatch(r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)(?P<rest>/.*)?", path):
            repo = match["id"] if match["kind"] == "models" else f"datasets/{match['id']}"
            return self._api(repo, (match["rest"] or "").strip("/"), body)
        raise _Refused(404, message=f"no route {path}")

    def _repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.headers.get("Authorization")):
            raise _Refused(404 if repo is None else 401, "RepoNotFound", "Repository not found")
        return repo

    def _tree(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self._repo(name)
        commit = repo.resolve(revision)
        if commit is None and repo.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit or "0" * 40, repo.commits.get(commit, {})

    def _may_write(self) -> None:
        token = self.headers.get("Authorization")
        if not token:
            raise _Refused(401, message="Invalid username or password.")
        if READ_ONLY_TOKEN in token:
            raise _Refused(403, message="You need a token with the right to write")

    def _create(self, wanted: dict) -> None:
        self._may_write()
        prefix = "datasets/" if wanted.get("type") == "dataset" else ""
        name = f"{prefix}{wanted.get('organization') or 'me'}/{wanted['name']}"
        answer = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if name in self.hub.repos:
            return self._json({**answer, "error": "You already created this repo"}, 409)
        repo = Repo(private=bool(wanted.get("private") or wanted.get("visibility") == "private"))
        repo.commit(
            "main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "initial commit"
        )
        self.hub.repos[name] = repo
        self._json(answer)

    def _validate(self, card: str) -> None:
        head = re.match(r"---\n(.*?)\n---", card.replace("\r\n", "\n"), re.DOTALL)
        relation = re.search(r"^base_model_relation: *(\S+)", head[1] if head else "", re.MULTILINE)
        wrong = relation and relation[1] not in RELATIONS
        errors = [{"message": f"base_model_relation {relation[1]}"}] if wrong else []
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _put(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, message="the content is not what was announced")
        self.hub.objects[oid] = body
        self._send(b"", 200, {"ETag": f'"{oid}"'})

    def _batch(self, repo: str, wanted: dict) -> None:
        self._may_write()
        self._repo(repo)
        objects = [{"oid": entry["oid"], "size": entry["size"]} for entry in wanted["objects"]]
        for entry in objects:
            if entry["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.endpoint}/objects/{entry['oid']}", "header": {}}}
        self._send(
            json.dumps({"transfer": "basic", "objects": objects}).encode(), 200,
            {"Content-Type": "application/vnd.git-lfs+json"},
        )  # fmt: skip

    def _resolve(self, repo: str, rest: str, truncate: bool) -> None:
        revision, path = self._split_revision(rest)
        commit, tree = self._tree(repo, revision)
        if path not in tree:
            raise _Refused(404, "EntryNotFound", f"no file {path}")
        content, status = tree[path], 200
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        if path in self._repo(repo).lfs:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
        if start := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            whole, content, status = len(content), content[int(start[1]) :], 206
            headers["Content-Range"] = f"bytes {start[1]}-{whole - 1}/{whole}"
        self._send(content, status, headers, truncate)

    def _split_revision(self, rest: str) -> tuple[str, str]:
        match = re.match(r"(refs/(?:pr|convert)/[^/]+|[^/]+)/?(.*)", rest)
        return match[1], match[2]

    def _api(self, repo: str, rest: str, body: bytes) -> None:
        verb, _, rest = rest.partition("/")
        revision, path = self._split_revision(rest) if rest else ("main", "")
        if verb in ("", "revision"):
            commit, tree = self._tree(repo, revision)
            name = repo.removeprefix("datasets/")
            siblings = [{"rfilename": path} for path in sorted(tree)]
            found = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": [], "downloads": 0}
            return self._json(
                found | {"private": self._repo(repo).private, "likes": 0, "gated": False, "disabled": False}
            )
        if verb == "tree":
            return self._list(repo, revision, path)
        if verb == "paths-info":
            wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode()).get("paths", [])
            _, tree = self._tree(repo, revision)
            return self._json([self._entry(path, tree[path]) for path in wanted if path in tree])
        if verb == "preupload":
            return self._preupload(repo, revision, json.loads(body))
        if verb == "commit":
            return self._commit(repo, revision, body)
        if verb == "refs":
            branches = [{"name": "main", "ref": "refs/heads/main", "targetCommit": self._tree(repo, "main")[0]}]
            return self._json({"branches": branches, "converts": [], "tags": []})
        if verb == "discussions":
            return self._json({"discussions": [], "count": 0, "start": 0})
        raise _Refused(404, message=f"no route {verb}")

    def _entry(self, path: str, content: bytes) -> dict:
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _list(self, repo: str, revision: str, folder: str) -> None:
        _, tree = self._tree(repo, revision)
        prefix = f"{folder}/" if folder else ""
        inside = {path: content for path, content in tree.items() if path.startswith(prefix)}
        if folder and not inside:
            raise _Refused(404, "EntryNotFound", f"no folder {folder}")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        names = sorted(path for path in inside if recursive or "/" not in path[len(prefix) :])
        entries = [self._entry(path, inside[path]) for path in names]
        folders = sorted({prefix + path[len(prefix) :].split("/")[0] for path in inside} - set(inside))
        self._json(entries + [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders])

    def _preupload(self, repo: str, revision: str, wanted: dict) -> None:
        self._may_write()
        commit, _ = self._tree(repo, revision)
        answer = []
        for entry in wanted["files"]:
            lfs = self.hub.mode == "lfs" and not entry["path"].endswith((".json", ".md", ".yaml", ".txt"))
            answer.append({"path": entry["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
        self._json({"files": answer, "commitOid": commit})

    def _commit(self, repo: str, revision: str, body: bytes) -> None:
        self._may_write()
        _, tree = self._tree(repo, revision)
        tree, found, summary = dict(tree), self._repo(repo), ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                summary = value["summary"]
            elif entry["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise _Refused(400, message="an object of the commit was not uploaded")
                tree[value["path"]] = self.hub.objects[value["oid"]]
                found.lfs.add(value["path"])
            elif entry["key"] == "deletedFile":
                tree.pop(value["path"], None)
        proposed = "create_pr" in self.query
        ref = f"refs/pr/{len(found.refs)}" if proposed else revision
        commit = found.commit(ref, tree, summary)
        answer = {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{commit}"}
        if proposed:
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/{ref.rsplit('/', 1)[1]}"
        self._json(answer)


@contextmanager
def hub(mode: str = "lfs") -> Iterator[Hub]:
    """A running Hub."""
    state = Hub(mode)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": state}))
    server.daemon_threads = True
    state.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
