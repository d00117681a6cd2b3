"""Serves the report of a run on this machine alone while the run runs: a page that renews itself."""

import threading
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from bitgenome.common.errors import UserError
from bitgenome.report.page import Page, fresh, render
from bitgenome.report.run_page import page_from
from bitgenome.report.source import RunSource

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")  # by which a page may ask: another name may be a foreign page that points here
FRESH = "/fresh"
TYPES = {"/": "text/html; charset=utf-8", FRESH: "application/json"}


def server_of(location: str, port: int) -> ThreadingHTTPServer:
    """Return a server of the report of the run at a path or URL, on the loopback interface; port 0 takes a free one.

    Raises UserError if there is no run, its files are damaged, or the port is taken.
    """
    source, lock = RunSource(location), threading.Lock()
    page_from(source)  # what is damaged is said before anything is served

    def page() -> Page:
        with lock:  # a source reads on from where it was
            return page_from(source)

    return serving({"/": lambda: render(page(), FRESH), FRESH: lambda: fresh(page())}, port)


def serving(answers: dict[str, Callable[[], str]], port: int) -> ThreadingHTTPServer:
    """Return a server of what ``answers`` give, by path. Raises UserError if the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer one request."""
            if self.headers.get("Host", "").partition(":")[0] not in NAMES:
                self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
                return
            if self.path not in answers:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            try:
                body = answers[self.path]().encode()
            except UserError as error:  # such as storage that fails for a while: the page keeps what it shows
                self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, explain=str(error))
                return
            with suppress(ConnectionError):  # the reader has left
                self.send_response(HTTPStatus.OK)
                self.send_header("Content-Type", TYPES[self.path])
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: a page asks every two seconds."""

    try:
        server = ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise UserError(f"expected a free port, found {port} taken ({error.strerror}): choose another --port") from None
    server.daemon_threads = True
    return server
