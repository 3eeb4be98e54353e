"""Serving the page: who may open it, and how much may be sent to it.

On a loopback address everyone on the machine may open the page. A request under any other host name is refused, because
a web site could point a name of its own at this machine (DNS rebinding). On every other address a token is needed,
which comes once in the address of the page and then in a cookie.
"""

import hmac
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qsl, urlencode

from diptych.errors import UserError

MAX_FILE_MB = 20
"""Largest file that may be sent, in megabytes of 2^20 bytes."""
MAX_BODY = 128 * 2**20
"""Largest request in bytes: several files that are dropped at once come in one."""
WAITING = 512
"""Number of requests that may wait for a network; later ones are told to come again."""
COOKIE = "diptych_token"
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def token_for(host: str, token: str | None) -> str | None:
    """The token that opens the page: the given one, a new one where other machines can reach ``host``, else none.

    Raises UserError for a token that can be guessed.
    """
    if token is not None and len(token) < 8:
        raise UserError("--token: shorter than 8 characters, which can be guessed; leave it away and one is made")
    return token if token is not None or is_loopback(host) else secrets.token_urlsafe(24)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError for an address that is not of this machine, and for a port in use."""
    made = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
        if os.name == "posix":  # elsewhere it would let two programs listen on one port
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(2048)
        return made
    except (OSError, OverflowError) as error:
        if made is not None:
            made.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{host}, port {port}: cannot be listened on ({reason}); give another --port") from None


class Gate:
    """Lets those requests through to ``app`` that may come in; an ASGI application."""

    def __init__(self, app: App, *, token: str | None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 401 without the token, 403 under a name of another site, 413 for what is too large."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if refused := self._refused(scope, headers):
            await _answer(send, *refused)
        elif self.token is None or self._holds_token(headers):
            await self.app(scope, receive, send)
        else:
            await self._let_in(scope, send)

    def _refused(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        if self.token is None and _host_name(headers.get("host", "")) not in _LOCAL_NAMES:
            return 403, "This page is for this machine alone: open it as http://127.0.0.1."
        # Gradio would fetch an address of the web for whoever asks.
        if "/file=http" in scope["path"].lower():
            return 403, "Nothing is fetched from the web."
        if scope.get("method") in ("POST", "PUT", "PATCH"):
            length = headers.get("content-length", "")
            if not length.isdecimal():
                return 411, "Say how long the request is."
            if int(length) > MAX_BODY:
                return 413, f"More than {MAX_BODY // 2**20} MB at once: send less."
        return None

    def _holds_token(self, headers: dict[str, str]) -> bool:
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            cookie = None
        given = cookie.value if cookie else headers.get("authorization", "").removeprefix("Bearer ")
        return self._is_token(given)

    def _is_token(self, given: str) -> bool:
        assert self.token is not None
        return hmac.compare_digest(given.encode(), self.token.encode())

    async def _let_in(self, scope: Scope, send: Send) -> None:
        """Turn the token in the address into a cookie, so that it does not stay in the address line."""
        query = parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
        if scope["type"] != "http" or not any(name == "token" and self._is_token(value) for name, value in query):
            await _answer(send, 401, "Open the page by the address with the token that `diptych app` printed.")
            return
        rest = urlencode([(name, value) for name, value in query if name != "token"])
        cookie = f"{COOKIE}={self.token}; Path=/; HttpOnly; SameSite=Strict"
        where = "/" + scope["path"].lstrip("/") + (f"?{rest}" if rest else "")
        await _answer(send, 303, "", {"location": where, "set-cookie": cookie})


def _host_name(host: str) -> str:
    """The name in a Host header, without the port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host


async def _answer(send: Send, status: int, text: str, headers: dict[str, str] | None = None) -> None:
    every = {"content-type": "text/plain; charset=utf-8", "cache-control": "no-store"} | (headers or {})
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in every.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": text.encode()})


@contextmanager
def private_cache() -> Iterator[str]:
    """Uploads go to a new folder of this process alone, which is removed at the end. Before gradio is imported."""
    folder = tempfile.mkdtemp(prefix="diptych-app-")
    os.environ.update(
        GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1"
    )
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def serve(page: Any, *, host: str, port: int, token: str | None, ready: Callable[[str], None]) -> None:
    """Serve a page of :func:`diptych.app.page.build` until the process is interrupted.

    ``ready`` is called with the address to open, as soon as requests are accepted. Raises as :func:`listening`.
    """
    import uvicorn
    from fastapi import FastAPI

    from diptych.app.page import mount

    bound = listening(host, port)
    app = Gate(mount(FastAPI(docs_url=None, redoc_url=None, openapi_url=None), page), token=token)
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    shown = f"[{host}]" if ":" in host else host
    ready(f"http://{shown}:{bound.getsockname()[1]}/" + (f"?token={token}" if token else ""))
    # uvicorn stops serving and then hands the signal on, which would end the process before the uploads are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    uvicorn.Server(config).run(sockets=[bound])
