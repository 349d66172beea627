"""Opens the port: the page on an address of this machine, with nothing of the machine behind it."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from multicrafter import UserError
from multicrafter.demo.serve.desk import Desk
from multicrafter.demo.serve.drawing import Limits
from multicrafter.demo.serve.page import build, import_gradio

Scope = MutableMapping[str, Any]
CLOSED = (
    "/gradio_api/file",
    "/gradio_api/proxy",
    "/file",
    "/proxy",
    "/gradio_api/runs",
    "/gradio_api/stream",
    "/monitoring",
)
"""Addresses of gradio that hand out files or fetch foreign pages; the page needs none of them."""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'"
)
"""Content security policy: a browser fetches nothing from anywhere else."""
MOST_WORDS = 1_000_000
"""Bytes of a request that is no upload: a prompt and settings need a hundredth of it."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Guard:
    """ASGI middleware: closes `CLOSED`, bounds what is sent, answers only to the names it was given, and sends `POLICY`."""

    def __init__(self, app: Any, *, max_upload: int, hosts: tuple[str, ...] | None) -> None:
        """Wraps an application.

        Args:
            app: Whatever answers.
            max_upload: Bytes of one upload's body.
            hosts: Names by which a browser may call; None allows all. On loopback it keeps other pages from calling by a name of theirs.
        """
        self.app, self.max_upload, self.hosts = app, max_upload, hosts

    async def __call__(
        self, scope: Scope, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refused(scope["path"], scope["method"], headers)
        if refused is not None:
            status, text = refused
            kind = (b"content-type", b"text/plain; charset=utf-8")
            await send({"type": "http.response.start", "status": status, "headers": [kind]})
            await send({"type": "http.response.body", "body": text.encode()})
            return

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [
                    (b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]  # fmt: skip
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        await self.app(scope, receive, with_policy)

    def _refused(self, path: str, method: str, headers: dict[str, str]) -> tuple[int, str] | None:
        if self.hosts is not None and _host(headers.get("host", "")) not in self.hosts:
            return 403, "This server answers to its own name only."
        if path.startswith(CLOSED):
            return 404, "There is nothing here."
        if method == "POST":
            length, most = headers.get("content-length", ""), MOST_WORDS
            if path.startswith("/gradio_api/upload"):
                most = self.max_upload
            if not length.isdigit():
                return 411, "What is sent must say how long it is."
            if int(length) > most:
                return 413, f"At most {most / 1e6:.0f} MB can be sent at once."
        return None


def _host(given: str) -> str:
    """The name in a Host header, without the port.

    >>> _host("localhost:7860"), _host("[::1]:7860"), _host("127.0.0.1")
    ('localhost', '::1', '127.0.0.1')
    """
    if given.startswith("["):
        return given[1:].partition("]")[0]
    return given.partition(":")[0]


def application(desk: Desk, *, hosts: tuple[str, ...] | None = LOOPBACK) -> Any:
    """The page as an ASGI application.

    Raises:
        ImportError: gradio is missing.
    """
    gr = import_gradio()
    from fastapi import FastAPI

    page = build(desk)
    page.queue(max_size=4 * desk.limits.max_waiting, api_open=False)
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None), page, path="/", footer_links=[], run_history=False, show_error=False,
        max_file_size=desk.limits.max_bytes, ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False,
        theme=_theme(gr), css_paths=[Path(__file__).parent / "style.css"],
    )  # fmt: skip
    # Only a page that "has launched" refuses forged uploads, events that name a file of the machine; one that is mounted must say so.
    page.has_launched = True
    return Guard(app, max_upload=desk.limits.max_references * desk.limits.max_bytes + 100_000, hosts=hosts)


def _theme(gr: Any) -> Any:
    """Gradio's look with fonts that need not be fetched, and with every text dark or light enough to be read."""
    plain = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    faint = ("body_text_color_subdued", "block_info_text_color", "input_placeholder_color")
    return gr.themes.Default(**plain).set(
        **dict.fromkeys(faint, "*neutral_600"), **{f"{name}_dark": "*neutral_400" for name in faint},
        **{f"button_primary_background_fill{end}": "*primary_700" for end in ("", "_dark")},
        **{f"button_primary_background_fill_hover{end}": "*primary_800" for end in ("", "_dark")},
    )  # fmt: skip


def listening(host: str, port: int) -> socket.socket:
    """A socket that is bound and listens, so that whoever reads the address can call; port 0 takes a free one.

    Raises:
        ValueError: The address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"--host must be an address of this machine, got {host!r}: {error}") from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(128)
    except (OSError, OverflowError) as error:
        made.close()
        raise UserError(f"--host and --port must be free to listen on, got {host}:{port}: {error}") from error
    return made


def serve(
    pipeline: Any, *, host: str = "127.0.0.1", port: int = 7860, limits: Limits | None = None, tiny: bool = False
) -> None:
    """Serves the page until it is interrupted; uploads live in a folder of their own, which is gone afterwards.

    Args:
        pipeline: A `MultiCrafterPipeline` with a finder.
        host: Address; the default is reachable from this machine only.
        port: 0 takes a free one.
        limits: What a visitor may ask for.
        tiny: Whether the pipeline is the tiny model.

    Raises:
        ValueError: The address cannot be had.
        ImportError: gradio is missing.
    """
    import_gradio()
    import uvicorn

    bound = listening(host, port)
    desk = Desk(pipeline, limits, tiny=tiny)
    try:
        with uploads(), stopping(), suppress(KeyboardInterrupt):
            app = application(desk, hosts=LOOPBACK if host in LOOPBACK else None)
            shown = f"[{host}]" if ":" in host else host
            print(f"http://{shown}:{bound.getsockname()[1]} shows the page; Ctrl-C ends it", flush=True)
            config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
            uvicorn.Server(config).run(sockets=[bound])
    finally:
        desk.close()
        bound.close()


@contextmanager
def uploads() -> Iterator[Path]:
    """A folder for files on their way into memory, which is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="multicrafter-serve-") as folder:
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


@contextmanager
def stopping() -> Iterator[None]:
    """SIGTERM ends the server as Ctrl-C does, so that nothing is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
