"""Who the explorer's server lets in: real requests to the running one, as other sites and other programs would send."""

import http.client
import json
import logging
import socket
import struct
import zlib
from pathlib import Path

import pytest
from test_explore import folder, texts  # noqa: F401 (fixtures)

from hf_coar import explore
from hf_coar.explore import guard
from hf_coar.explore.guard import Door

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def address(folder):  # noqa: F811
    pytest.importorskip("gradio", reason='needs pip install "hf_coar[explore]"')
    address = explore.launch(folder, block=False)
    yield address
    address.close()


def asked(address, path="/", method="GET", body=None, **headers):
    """(status, headers, body) of one request, with exactly these headers beside the length of the body."""
    host = address.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(host, timeout=30)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in {"Host": host, **headers}.items():
        for one in value if isinstance(value, list) else [value]:
            connection.putheader(name.replace("_", "-"), one)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    whole, connection.send = [], lambda part: whole.append(part)
    connection.endheaders(body)
    del connection.send
    # In one go: a server that makes no sense of the head answers and closes, and what comes then resets the connection.
    connection.send(b"".join(whole))
    answer = connection.getresponse()
    found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    connection.close()
    return found


ROUTES = [
    ("GET", "/"), ("GET", "/config"), ("GET", "/gradio_api/info"), ("POST", "/gradio_api/queue/join"),
    ("POST", "/gradio_api/upload"), ("GET", "/gradio_api/queue/data?session_hash=1"), ("OPTIONS", "/config"),
    ("GET", "/gradio_api/file=/etc/passwd"), ("GET", "/theme.css"), ("GET", "/nowhere"), ("POST", "/gradio_api/reset"),
]  # fmt: skip


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_no_route_answers_to_another_name(address, route):
    """A page whose name was pointed at this machine after it was loaded sends its own name."""
    method, path = route
    port = address.rstrip("/").rsplit(":", 1)[1]
    for host in (f"evil.example:{port}", "evil.example", "127.0.0.1.evil.example", "localhost.evil.example",
                 "evil.example@127.0.0.1", "", "169.254.169.254", ["127.0.0.1", "evil.example"]):  # fmt: skip
        status, _, body = asked(address, path, method, b"{}" if method == "POST" else None, Host=host)
        assert status in (400, 403), host
        assert b"hf_coar explorer" not in body or b"answers at 127.0.0.1 only" in body


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_no_route_answers_a_page_of_another_site(address, route):
    method, path = route
    for origin in ("http://evil.example", "null", "http://localhost:3000", "https://127.0.0.1.evil.example"):
        status, headers, body = asked(address, path, method, b"{}" if method == "POST" else None, Origin=origin)
        assert status == 403 and b"asked by a page of" in body, origin
        assert "access-control-allow-origin" not in headers


def test_the_names_that_were_bound_are_answered(address):
    host = address.removeprefix("http://").rstrip("/")
    port = host.rsplit(":", 1)[1]
    for name in (host, f"localhost:{port}", f"LOCALHOST:{port}", "127.0.0.1:9999", f"[::1]:{port}"):
        status, headers, body = asked(address, Host=name, Origin=f"http://{name}")
        assert status == 200 and b"hf_coar explorer" in body, name
    assert headers["content-security-policy"] == "frame-ancestors 'none'" and headers["x-frame-options"] == "DENY"
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "same-origin"


def test_too_many_bytes_are_refused_before_they_are_read(address):
    for path, most in (("/gradio_api/queue/join", 2**18), ("/gradio_api/upload", guard.MOST_UPLOADED + 2**14)):
        status, _, body = asked(address, path, "POST", None, Content_Length=str(most + 1))
        assert status == 413 and b"At most" in body
    host = address.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host[0], int(host[1])), timeout=30) as raw:  # without saying how many will come
        raw.sendall(
            f"POST /gradio_api/queue/join HTTP/1.1\r\nHost: {host[0]}\r\nTransfer-Encoding: chunked\r\n".encode()
        )
        raw.sendall(b"Content-Type: application/json\r\n\r\n")
        try:
            for _ in range(64):
                raw.sendall(b"10000\r\n" + b"a" * 2**16 + b"\r\n")
            raw.sendall(b"0\r\n\r\n")
        except OSError:
            pass  # it hung up
        assert b" 413 " in raw.recv(2**16).split(b"\r\n")[0]


def bomb(width, height):
    """A PNG of one colour, a thousandth of its pixels in size."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    row = bytes(1 + width * 3)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def attributed(address, image=None, text="", start=0):
    """What the page answers to "Attribute it", as text: all events of the queue."""
    config = json.loads(asked(address, "/config")[2])
    elements = {one["id"]: one["props"].get("elem_id") for one in config["components"]}
    event = next(
        one for one in config["dependencies"]
        if len(one["outputs"]) == 3 and "own-image" in [elements.get(i) for i in one["inputs"]]
    )  # fmt: skip
    values = {"own-image": image, "own-text": text, "explained": -1}
    data = [values.get(elements.get(i)) for i in event["inputs"]]
    body = json.dumps({"data": data, "fn_index": event["id"], "session_hash": "s"}).encode()
    status, _, said = asked(address, "/gradio_api/queue/join", "POST", body, Content_Type="application/json")
    if status != 200:
        return said.decode()
    return asked(address, "/gradio_api/queue/data?session_hash=s")[2].decode()


def uploaded(address, name, content):
    head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    body = head + content + b"\r\n--b--\r\n"
    return asked(address, "/gradio_api/upload", "POST", body, Content_Type="multipart/form-data; boundary=b")


def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure memory")
def test_an_image_that_unpacks_to_a_gigabyte_is_refused_unread(address):
    content = bomb(13_000, 13_000)  # 169 megapixels, 507 MB, and as much again for a copy; Pillow's own bound is higher
    assert len(content) < 2**20
    status, _, body = uploaded(address, "small.png", content)
    assert status == 200
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    said = attributed(address, {"path": json.loads(body)[0], "meta": {"_type": "gradio.FileData"}})
    assert "169 megapixels" in said and "at most 25" in said
    assert peak() - before < 100  # MB


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"<svg xmlns='http://www.w3.org/2000/svg'/>", bytes(5000)])
def test_what_is_no_image_is_one_clear_error(address, content):
    _, _, body = uploaded(address, "odd.png", content)
    said = attributed(address, {"path": json.loads(body)[0], "meta": {"_type": "gradio.FileData"}})
    assert "this image cannot be read" in said and "Traceback" not in said


def test_an_image_inside_the_request_is_not_decoded(address):
    said = attributed(address, {"url": "data:image/png;base64,iVBORw0KGgo=", "meta": {"_type": "gradio.FileData"}})
    assert "this image cannot be read" in said


def test_too_long_a_text_is_one_clear_error(texts):  # noqa: F811
    address = explore.launch(texts / "classifier", block=False)
    try:
        assert "the text has 2,001 characters" in attributed(address, text="a " * 1000 + "b")
        assert "At most 262,144 bytes" in attributed(address, text="a" * 300_000)
        assert "first pass" in attributed(address, text="a very good film")
    finally:
        address.close()


# ---------------------------------------------------------------------------------------------------- other settings


def headers(host, origin=None):
    return [(b"host", host.encode())] + ([(b"origin", origin.encode())] if origin else [])


def test_everybody_may_ask_by_address_where_everybody_was_let_in():
    door = Door.of("0.0.0.0")
    for host in ("192.168.1.7:7860", "localhost:7860", socket.gethostname(), "[fe80::1]:7860"):
        assert door.refusal(headers(host, f"http://{host}")) is None
    assert "evil.example" in door.refusal(headers("evil.example"))
    assert Door.of("127.0.0.1").refusal(headers("192.168.1.7:7860")) is not None


def test_a_proxy_a_tunnel_and_a_space_are_let_in_by_name(monkeypatch):
    assert Door.of("127.0.0.1", ["Lab.example"]).refusal(headers("127.0.0.1", "https://lab.example")) is None
    assert Door.of("127.0.0.1", share=True).refusal(headers("ab12.gradio.live", "https://ab12.gradio.live")) is None
    assert Door.of("127.0.0.1").refusal(headers("ab12.gradio.live")) is not None
    assert Door.of("127.0.0.1", share=True).refusal(headers("gradio.live.evil.example")) is not None
    monkeypatch.setenv("SPACE_ID", "user/space")
    monkeypatch.setenv("SPACE_HOST", "user-space.hf.space")
    door = Door.of("0.0.0.0")
    assert door.refusal(headers("user-space.hf.space", "https://user-space.hf.space")) is None
    assert "https://huggingface.co" in door.ancestors and door.refusal(headers("evil.hf.space")) is not None


def test_a_public_address_warns_in_one_line(folder, monkeypatch, caplog):  # noqa: F811
    gradio = pytest.importorskip("gradio", reason='needs pip install "hf_coar[explore]"')
    monkeypatch.setattr(gradio.networking, "setup_tunnel", lambda *args, **more: "https://ab12.gradio.live")
    with caplog.at_level(logging.WARNING, "hf_coar"):
        address = explore.launch(folder, block=False, share=True)
    address.close()
    (said,) = [record.message for record in caplog.records if "explorer" in record.message]
    assert address == "https://ab12.gradio.live" and "can use this machine" in said and "\n" not in said


def test_the_model_runs_one_job_at_a_time(address):
    """All that takes a while waits in one of two queues of one each, and the page shows the place in it."""
    config = json.loads(asked(address, "/config")[2])
    elements = {one["id"]: one["props"].get("elem_id") for one in config["components"]}
    heavy = {"change", "component-list", "edit", "file", "own"}
    slow = [one for one in config["dependencies"] if elements.get(one["outputs"][0] if one["outputs"] else 0) in heavy]
    assert len(slow) > 10 and all(one["queue"] is not False for one in slow)
    assert {one["show_progress"] for one in slow} <= {"full", "minimal"}


def test_what_is_forgotten_is_the_last_attribution_and_not_the_one_that_begins(address):
    """An own input's attribution begins after the last one of the same visitor was told to end, never beside that."""
    config = json.loads(asked(address, "/config")[2])
    elements = {one["id"]: one["props"].get("elem_id") for one in config["components"]}
    found = {one["id"]: one for one in config["dependencies"]}
    owns = [one for one in found.values() if "own" in map(elements.get, one["outputs"][:1])]
    begins = [one for one in owns if len(one["outputs"]) == 3]
    assert len(begins) == 4
    for one in begins:
        before = found[one["trigger_after"]]
        assert not before["outputs"] and before["queue"] is False
