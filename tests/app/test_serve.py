"""Who may open the page, and how much may be sent to it."""

import asyncio
import os
import socket
from pathlib import Path

import pytest

from diptych.app.serve import MAX_BODY, Gate, is_loopback, listening, private_cache, token_for
from diptych.errors import UserError

TOKEN = "a-word-of-some-length"


def ask(gate, *, method="GET", path="/", query=b"", headers=None, kind="http"):
    """Status and headers that the gate answers with; 200 where it lets the request through."""
    sent = []
    scope = {"type": kind, "path": path, "query_string": query, "method": method}
    scope["headers"] = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]

    async def run():
        async def receive():
            return {}

        async def send(message):
            sent.append(message)

        await gate(scope, receive, send)

    asyncio.run(run())
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


async def inside(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})


LOCAL = {"host": "127.0.0.1:7860"}


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("10.0.0.3", False), ("box", False)],
)
def test_only_addresses_that_others_can_reach_need_a_token(host, loopback):
    assert is_loopback(host) is loopback
    assert (token_for(host, None) is None) is loopback
    assert token_for(host, TOKEN) == TOKEN


def test_a_made_token_is_long_and_a_short_one_is_refused():
    assert token_for("0.0.0.0", None) != token_for("0.0.0.0", None)
    assert len(token_for("0.0.0.0", None)) >= 32
    with pytest.raises(UserError, match="can be guessed"):
        token_for("127.0.0.1", "short")


def test_without_a_token_only_the_names_of_this_machine_are_answered():
    gate = Gate(inside, token=None)
    for host in ("127.0.0.1:7860", "localhost", "[::1]:7860"):
        assert ask(gate, headers={"host": host})[0] == 200
    for host in ("evil.example", "evil.example:7860", "127.0.0.1.evil.example", ""):
        assert ask(gate, headers={"host": host})[0] == 403


def test_the_token_in_the_address_becomes_a_cookie():
    gate = Gate(inside, token=TOKEN)
    assert ask(gate)[0] == 401
    assert ask(gate, query=b"token=wrong")[0] == 401
    status, headers = ask(gate, query=f"token={TOKEN}&view=1".encode())
    assert (status, headers["location"]) == (303, "/?view=1")
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert ask(gate, headers={"cookie": cookie.partition(";")[0]})[0] == 200
    assert ask(gate, headers={"authorization": f"Bearer {TOKEN}"})[0] == 200
    for wrong in ({"cookie": "diptych_token=wrong"}, {"cookie": "\x00;;="}, {"authorization": "Bearer "}):
        assert ask(gate, headers=wrong)[0] == 401


def test_the_redirect_stays_on_this_machine():
    gate = Gate(inside, token=TOKEN)
    assert ask(gate, path="//evil.example/", query=f"token={TOKEN}".encode())[1]["location"] == "/evil.example/"


def test_what_is_too_large_or_of_unknown_length_is_refused():
    gate = Gate(inside, token=None)
    for length, status in ((str(MAX_BODY), 200), (str(MAX_BODY + 1), 413), ("", 411), ("-5", 411)):
        assert ask(gate, method="POST", headers={**LOCAL, "content-length": length})[0] == status
    assert ask(gate, method="POST", headers={**LOCAL, "transfer-encoding": "chunked"})[0] == 411


def test_nothing_is_fetched_from_the_web():
    gate = Gate(inside, token=None)
    assert ask(gate, path="/gradio_api/file=HTTP://evil.example/a.png", headers=LOCAL)[0] == 403


def test_a_port_in_use_is_told():
    with listening("127.0.0.1", 0) as taken:
        assert isinstance(taken, socket.socket)
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}.*another --port"):
            listening("127.0.0.1", port)


def test_uploads_go_to_a_folder_that_is_removed(monkeypatch):
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "before")
    with private_cache() as folder:
        assert os.environ["GRADIO_TEMP_DIR"] == folder
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
        assert Path(folder).stat().st_mode & 0o077 == 0
        (Path(folder) / "sent.png").touch()
    assert not Path(folder).exists()
