"""A stand-in for the Hub: the part of its HTTP interface that uploading and loading a model use, kept in memory."""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_" + "a" * 34
# The Hub keeps files with these endings, and large ones, in its large file storage.
_LARGE = (".safetensors", ".bin")
_LICENSES = {"apache-2.0", "mit", "unknown", "other", "cc-by-4.0"}
_METADATA = re.compile(r"\s*---\n(.*?)\n---\s*\n", re.DOTALL)


@dataclass
class Repo:
    """One repository: files by branch and name, and what each commit said."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    messages: list[str] = field(default_factory=list)

    def sha(self, branch: str) -> str:
        """What stands for the commit's hash: it changes with the files."""
        digest = hashlib.sha1()
        for name, content in sorted(self.branches[branch].items()):
            digest.update(name.encode() + content)
        return digest.hexdigest()

    def find(self, revision: str) -> dict[str, bytes] | None:
        if revision in self.branches:
            return self.branches[revision]
        return next((files for name, files in self.branches.items() if self.sha(name) == revision), None)


class HubServer(ThreadingHTTPServer):
    """Repositories by name, uploaded objects by their SHA-256, and the requests so far as "METHOD path"."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken: str | None = None  # requests whose path has this in it fail

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serve_hub() -> Iterator[HubServer]:
    """A server that answers while the block runs."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args) -> None:
        """Tests read `HubServer.requests`."""

    def do_POST(self) -> None:
        self._dispatch("POST")

    def do_PUT(self) -> None:
        self._dispatch("PUT")

    def do_GET(self) -> None:
        self._dispatch("GET")

    def do_HEAD(self) -> None:
        self._dispatch("HEAD")

    def _dispatch(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._read_chunks()
        if path != "/api/agent-harnesses":  # which the client asks for once a day, whatever it is about
            self.server.requests.append(f"{method} {path}")
        if self.server.broken and self.server.broken in path:
            self._json({"error": "broken on purpose"}, status=404)
            return
        if method == "POST" and not path.startswith("/api/validate-yaml"):
            sent = self.headers.get("Authorization")
            if sent != f"Bearer {TOKEN}":
                self._json({"error": "Invalid credentials in Authorization header"}, status=401)
                return
        for pattern, answers, name in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in answers:
                getattr(self, name)(**match.groupdict())
                return
        self._json({"error": "Not found"}, status=404, headers={"X-Error-Code": "EntryNotFound"})

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().strip(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _json(self, document, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(document).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if asked.get("organization") == "somebody":
            self._json({"error": "You don't have the rights to create a model under this namespace"}, status=403)
            return
        known = name in self.server.repos
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.server.repos.setdefault(name, Repo(private=private))
        self._json({"url": f"{self.server.url}/{name}", "name": name}, status=409 if known else 200)

    def validate(self) -> None:
        """Some of what the real Hub checks: the metadata block, its licence, its evaluation results."""
        block = _METADATA.match(json.loads(self.body)["content"])
        try:
            data = yaml.safe_load(block[1]) if block else {}
        except yaml.YAMLError as error:
            self._json({"errors": [{"message": str(error)}], "warnings": []}, status=400)
            return
        errors = [] if data.get("license") in _LICENSES | {None} else [f"license {data['license']!r} is not known"]
        for entry in data.get("model-index", []):
            errors += [
                f"a result without {part}" for r in entry["results"] for part in ("task", "metrics") if part not in r
            ]
        if not isinstance(data.get("pipeline_tag", ""), str) or not isinstance(data.get("tags", []), list):
            errors.append("pipeline_tag is a text, tags are a list")
        self._json({"errors": [{"message": error} for error in errors], "warnings": []}, status=400 if errors else 200)

    def info(self, repo: str, revision: str = "main") -> None:
        found = self.server.repos.get(repo)
        if found is None or found.find(revision) is None:
            self._json({"error": "Repository not found"}, status=404, headers={"X-Error-Code": "RepoNotFound"})
            return
        files = [{"rfilename": name} for name in found.find(revision)]
        sha = revision if revision not in found.branches else found.sha(revision)
        self._json({"id": repo, "sha": sha, "private": found.private, "siblings": files, "tags": [], "downloads": 0})

    def branch(self, repo: str, branch: str) -> None:
        branches = self.server.repos[repo].branches
        known = branch in branches
        branches.setdefault(branch, dict(branches["main"]))
        self._json({}, status=409 if known else 200)

    def preupload(self, repo: str, revision: str) -> None:
        asked = json.loads(self.body)["files"]
        answer = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in asked
        ]
        self._json({"files": answer, "commitOid": self.server.repos[repo].sha(revision)})

    def batch(self, repo: str) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            href = f"{self.server.url}/large/{wanted['oid']}"
            actions = {} if wanted["oid"] in self.server.objects else {"actions": {"upload": {"href": href}}}
            objects.append({"oid": wanted["oid"], "size": wanted["size"]} | actions)
        self._json({"transfer": "basic", "objects": objects})

    def large(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.objects[oid] = self.body
        self._send(b"", 200, {})

    def commit(self, repo: str, revision: str) -> None:
        found, added = self.server.repos[repo], {}
        for line in self.body.splitlines():
            item = json.loads(line)
            if item["key"] == "header":
                found.messages.append(item["value"]["summary"])
            elif item["key"] == "file":
                added[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "lfsFile":
                added[item["value"]["path"]] = self.server.objects[item["value"]["oid"]]
        found.branches[revision] |= added
        sha = found.sha(revision)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}"})

    def resolve(self, repo: str, revision: str, name: str) -> None:
        found = self.server.repos.get(repo)
        files = found.find(revision) if found else None
        if files is None or name not in files:
            code = "RepoNotFound" if files is None else "EntryNotFound"
            sha = (
                {}
                if files is None
                else {"X-Repo-Commit": found.sha(revision) if revision in found.branches else revision}
            )
            self._json({"error": code}, status=404, headers={"X-Error-Code": code} | sha)
            return
        sha = found.sha(revision) if revision in found.branches else revision
        etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
        self._send(files[name], 200, {"ETag": etag, "X-Repo-Commit": sha, "Content-Type": "application/octet-stream"})


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ROUTES = (
    ("/api/repos/create", ("POST",), "create"),
    ("/api/validate-yaml", ("POST",), "validate"),
    (rf"/api/models/{_REPO}", ("GET",), "info"),
    (rf"/api/models/{_REPO}/revision/(?P<revision>.+)", ("GET",), "info"),
    (rf"/api/models/{_REPO}/branch/(?P<branch>.+)", ("POST",), "branch"),
    (rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", ("POST",), "preupload"),
    (rf"/api/models/{_REPO}/commit/(?P<revision>.+)", ("POST",), "commit"),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", ("POST",), "batch"),
    (r"/large/(?P<oid>[0-9a-f]{64})", ("PUT",), "large"),
    (rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", ("GET", "HEAD"), "resolve"),
)


def point_client_at(monkeypatch, url: str) -> None:
    """Let huggingface_hub, in this process, talk to `url` and upload without its own storage protocol."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def client_environment(url: str, home: Path) -> dict[str, str]:
    """The same for another process."""
    settings = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    return {**os.environ, **settings, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": TOKEN}
