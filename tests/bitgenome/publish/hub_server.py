"""A hub on this machine that speaks what huggingface_hub's client asks for when it makes a repository and commits."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_this_test"


@dataclass
class FakeHub:
    """Repositories by id: whether they are private, and their files."""

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)  # front matter of models that are there
    objects: dict[str, bytes] = field(default_factory=dict)  # large files, by sha256
    asked: list[str] = field(default_factory=list)


@contextmanager
def hub_server() -> Iterator[FakeHub]:
    """Yield a hub that serves on loopback while the context lasts."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(b"")

        def do_POST(self) -> None:
            self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

        do_PUT = do_POST  # noqa: N815

        def answer(self, body: bytes) -> None:
            path = self.path.partition("?")[0]
            hub.asked.append(f"{self.command} {path}")
            status, found, headers = reply(hub, self.command, path, body, self.headers.get("Authorization"))
            content = json.dumps(found).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Stay silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


Reply = tuple[int, Any, dict[str, str]]


def reply(hub: FakeHub, method: str, path: str, body: bytes, authorization: str | None) -> Reply:
    """Return status, JSON and headers."""
    if method == "PUT":  # to the address that the batch of large files gave, which needs no token
        hub.objects[path.rpartition("/")[2]] = body
        return 200, {}, {}
    name = path.removeprefix("/api/models/")
    if card := hub.cards.get(name):
        return 200, {"id": name, "cardData": card, "siblings": []}, {}
    if authorization != f"Bearer {TOKEN}":
        return 401, {"error": "Invalid username or password."}, {}
    if method == "GET":
        if name not in hub.files:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        return 200, {"id": name, "siblings": [{"rfilename": file} for file in hub.files[name]]}, {}
    repository, _, action = name.removesuffix("/main").rpartition("/")
    return posted(hub, repository, path if action in ("create", "batch", "validate-yaml") else action, body)


def posted(hub: FakeHub, repository: str, action: str, body: bytes) -> Reply:
    """Return the reply to what was posted."""
    asked = [json.loads(line) for line in body.splitlines()] if action == "commit" else [json.loads(body)]
    match action:
        case "/api/repos/create":
            made = f"{asked[0].get('organization') or 'me'}/{asked[0]['name']}"
            if made in hub.files:
                return 409, {"error": "exists", "url": f"{hub.url}/{made}"}, {}
            hub.files[made], hub.private[made] = {}, asked[0].get("visibility") == "private"
            return 200, {"url": f"{hub.url}/{made}"}, {}
        case "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        case "preupload":
            modes = {file["path"]: "lfs" if file["path"].endswith(".gguf") else "regular" for file in asked[0]["files"]}
            files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            return 200, {"files": files}, {}
        case "commit":
            for value in (line["value"] for line in asked if line["key"] in ("file", "lfsFile")):
                if "oid" in value:
                    data = hub.objects[value["oid"]]
                    assert hashlib.sha256(data).hexdigest() == value["oid"] and len(data) == value["size"]
                else:
                    data = base64.b64decode(value["content"])
                hub.files[repository][value["path"]] = data
            commit = {"commitUrl": f"{hub.url}/{repository}/commit/1", "commitOid": "1" * 40}
            return 200, {"success": True, **commit}, {}
        case _:  # the addresses that large files go to
            assert action.endswith("/info/lfs/objects/batch")
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/objects/{one['oid']}", "header": {}}}}
                for one in asked[0]["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}, {}
