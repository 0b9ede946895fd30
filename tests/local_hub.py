"""A hub on this machine: what timm asks the hub for, in both directions, answered from a folder.

The client is the real one. It reads its settings at import, so it has to run in a process of its own, with
`LocalHub.environment`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789" * 4
ROOT = Path(__file__).parents[1]


class LocalHub:
    """Serves `folder`, in which `owner/name/file` is a file of the repository `owner/name`, until it is closed.

    Attributes:
        endpoint: Its address.
        requests: What it was asked for, as "METHOD /path".
    """

    def __init__(self, folder: Path):
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"folder": folder, "requests": self.requests})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> "LocalHub":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache: Path, **settings: str) -> dict[str, str]:
        """The environment of a process whose hub this is, and whose cache of it is `cache`."""
        unset = ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "TRITON_INTERPRET")
        inherited = {name: value for name, value in os.environ.items() if name not in unset}
        ours = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT)}
        return inherited | ours | settings


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    requests: list[str]

    def do_HEAD(self):
        self.resolve()

    def do_GET(self):
        self.resolve()

    def resolve(self):
        """A file of a repository."""
        self.requests.append(f"{self.command} {self.path}")
        asked = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/([^/]+)", self.path)
        repository = self.folder / asked[1] if asked else None
        if repository is None or not repository.is_dir():
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        file = repository / asked[2]
        if not file.is_file():
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = file.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.answer(200, {"X-Repo-Commit": COMMIT, "ETag": etag}, content)

    def do_POST(self):
        """An upload: the repository is created, each file's way is asked for, and one commit brings them all."""
        self.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked['organization']}/{asked['name']}"
            (self.folder / repository).mkdir(parents=True, exist_ok=True)
            self.answer_json({"url": f"http://{self.headers['Host']}/{repository}"})
        elif self.path == "/api/validate-yaml":
            self.answer_json({})
        elif self.path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(body)["files"]]
            ways = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
            self.answer_json({"files": ways})
        elif commit := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            for operation in map(json.loads, body.splitlines()):
                if operation["key"] == "file":
                    file = operation["value"]
                    (self.folder / commit[1] / file["path"]).write_bytes(base64.b64decode(file["content"]))
            url = f"http://{self.headers['Host']}/{commit[1]}/commit/{COMMIT}"
            self.answer_json({"success": True, "commitUrl": url, "commitOid": COMMIT})
        else:
            self.answer(404, {})

    def answer_json(self, content: dict):
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def answer(self, status: int, headers: dict[str, str], content: bytes = b""):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass
