"""Who is let in: requests by the names that were bound, of a sane size, into pages that no other site frames.

A page of another site that has its own name point at this machine (DNS rebinding) sends that name as `Host`, and one
that posts here sends its own `Origin`; a browser lets neither be forged. The guard stands before all routes.
"""

import os
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

MOST_UPLOADED = 20 * 2**20  # bytes of a file
_MOST_SENT = 2**18  # bytes of any other request; the longest text in a link is a hundredth of it
_AROUND_FILE = 2**14  # bytes that a form puts around a file
_HOST = re.compile(r"[0-9a-z._-]+(:\d+)?|\[[0-9a-f:.]+\](:\d+)?", re.IGNORECASE)
_SHARED = ".gradio.live"  # of Gradio's tunnels
_NOTEBOOKS = "'self' http://localhost:* http://127.0.0.1:* https://localhost:* https://127.0.0.1:*"
_SPACES = "'self' https://huggingface.co https://*.hf.space"

Message = MutableMapping[str, Any]
Receive, Send = Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]


@dataclass(frozen=True)
class Door:
    """By which names the explorer may be asked for, and who may frame it."""

    names: frozenset[str] = frozenset()  # that were bound
    public: frozenset[str] = frozenset()  # behind which a proxy stands, so that `Host` may be another
    any_address: bool = False  # whether addresses of other interfaces than loopback are bound
    shared: bool = False
    ancestors: str = "'none'"
    said: str = field(default="", compare=False)  # where it answers, for people

    @classmethod
    def of(cls, host: str, hosts: Iterable[str] = (), share: bool = False, notebook: bool = False) -> "Door":
        """For what `launch` is given; a Space says itself by which name it is reached."""
        everybody = host in ("0.0.0.0", "::", "[::]", "")
        space = [os.environ["SPACE_HOST"]] if os.environ.get("SPACE_ID") and os.environ.get("SPACE_HOST") else []
        public = frozenset(name.strip().lower() for given in (*hosts, *space) for name in given.split(",") if name)
        names = {"localhost", host.strip("[]").lower()}
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()} if everybody else set()
        ancestors = _SPACES if space else _NOTEBOOKS if notebook else "'none'"
        said = ", ".join(sorted({host, *public} | ({f"*{_SHARED}"} if share else set())))
        return cls(frozenset(names - {""}), public, everybody, share, ancestors, said)

    def refusal(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """Why a request is not answered, or None."""
        found: dict[bytes, list[str]] = {b"host": [], b"origin": []}
        for name, value in headers:
            if name.lower() in found:
                found[name.lower()].append(value.decode("latin-1").strip())
        hosts, origins = found[b"host"], found[b"origin"]
        if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]) or not self._knows(hosts[0]):
            return self._refused("asked for as", hosts)
        for origin in origins:
            host = urlsplit(origin).netloc.lower()
            if not _HOST.fullmatch(host) or not (host == hosts[0].lower() or self._is_public(_name(host))):
                return self._refused("asked by a page of", origins)
        return None

    def _refused(self, how: str, values: list[str]) -> str:
        return (
            f"This hf_coar explorer answers at {self.said} only, and was {how} {', '.join(values)[:80]!r}. "
            'If that is a proxy of yours: launch(hosts=["the.name"]), or hf-coar explore --allow-host the.name.\n'
        )

    def _knows(self, host: str) -> bool:
        name = _name(host)
        if name in self.names or self._is_public(name):
            return True
        try:
            address = ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or self.any_address  # nobody can have an address point elsewhere

    def _is_public(self, name: str) -> bool:
        return name in self.public or (self.shared and name.endswith(_SHARED))


def _name(host: str) -> str:
    return re.sub(r":\d+$", "", host.lower()).strip("[]").rstrip(".")


class Guard:
    """An ASGI application in front of another one."""

    def __init__(self, app: Callable[..., Awaitable[None]], door: Door) -> None:
        """Stand before `app`."""
        self.app, self.door = app, door

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer, refuse, or cut off what is too large."""
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        refusal = self.door.refusal(scope["headers"])
        if refusal is not None:
            return await _refuse(scope, send, 403, refusal)
        upload = scope["path"].rstrip("/").endswith("/upload")
        most = MOST_UPLOADED + _AROUND_FILE if upload else _MOST_SENT
        sent, too_much = 0, f"At most {most:,} bytes are taken here: give a smaller file or a shorter text.\n"
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > most:
            return await _refuse(scope, send, 413, too_much)

        async def counted() -> Message:
            nonlocal sent
            message = await receive()
            sent += len(message.get("body", b""))
            return {"type": "http.disconnect"} if sent > most else message

        async def answered(message: Message) -> None:
            if sent > most:
                if message["type"] == "http.response.start":
                    await _refuse(scope, send, 413, too_much)
                return
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self._headers()]
            await send(message)

        await self.app(scope, counted, answered)

    def _headers(self) -> list[tuple[bytes, bytes]]:
        framing = [(b"content-security-policy", f"frame-ancestors {self.door.ancestors}".encode())]
        framing += [(b"x-frame-options", b"DENY")] if self.door.ancestors == "'none'" else []
        # Links hold what a visitor typed, which is nobody else's business.
        return [*framing, (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"same-origin")]

    @classmethod
    def settings(cls, door: Door) -> dict[str, Any]:
        """For Gradio's `app_kwargs`: the guard stands outermost before the first connection is taken."""

        @asynccontextmanager
        async def lifespan(app: Any) -> Any:
            app.middleware_stack = cls(app.middleware_stack, door)
            yield

        return {"lifespan": lifespan}


async def _refuse(scope: Message, send: Send, status: int, said: str) -> None:
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008})
    body = said.encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode()),
        (b"x-content-type-options", b"nosniff"), (b"connection", b"close"),
    ]  # fmt: skip
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
