"""A small Hub on loopback: as much of its HTTP API as huggingface_hub calls to upload, list and download models.

Known to it: the token "hf_me" of the user "me", who may write to "me/..." alone. Weights and pictures go through Git
LFS (clients run with HF_HUB_DISABLE_XET=1), everything else inside the commits. A request that it does not implement is
answered with 404 and remembered in `unknown_requests`.
"""

import base64
import hashlib
import json
import re
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SHUT_RDWR
from threading import Lock, Thread
from urllib.parse import unquote, urlsplit


USERS = {"hf_me": "me"}
LICENSES = ("apache-2.0", "mit", "other")
LFS_SUFFIXES = (".safetensors", ".png")


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repository:
    """Commits, and the LFS objects that were uploaded; a file is `("regular" or "lfs", id)`."""

    def __init__(self, name: str, private: bool = False):
        self.name, self.owner, self.private = name, name.split("/")[0], private
        self.commits: list[dict[str, tuple[str, str]]] = [{}]
        self.blobs: dict[str, bytes] = {}
        self.sent = Counter()
        """How often each LFS object arrived whole, by its SHA-256."""

    @property
    def files(self) -> dict[str, tuple[str, str]]:
        return self.commits[-1]

    @property
    def head(self) -> str:
        return hashlib.sha1(json.dumps([len(self.commits), self.files]).encode()).hexdigest()

    def read(self, path: str) -> bytes:
        return self.blobs[self.files[path][1]]


class HubStandIn:
    """The server; `repositories` by id, and what it saw."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.unknown_requests: list[str] = []
        self.uploads_until_cut: dict[str, int] = {}
        """By repository: after so many LFS uploads the connection is cut in the middle of the next, and stays down."""
        self.is_down = False
        self.lock = Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.storage = f"http://localhost:{self.server.server_port}/lfs"  # another host to clients, as the Hub's is

    @contextmanager
    def running(self):
        thread = Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()
            thread.join()

    def environment(self, home) -> dict[str, str]:
        """What makes a client use this Hub, with caches and no token but `HF_TOKEN`'s in the folder `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(home),
            "HF_MODULES_CACHE": str(home / "modules"),
            "HF_TOKEN": "hf_me",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }


REPOSITORY = r"/(?P<repository>[\w.-]+/[\w.-]+)"
OBJECT = r"/lfs/(?P<stored>.+)/(?P<oid>\w{64})"
ROUTES = {
    "create": "POST /api/repos/create",
    "validate": "POST /api/validate-yaml",
    "check_write": f"GET /api/models{REPOSITORY}/auth-check/write",
    "info": f"GET /api/models{REPOSITORY}(/revision/.+)?",
    "tree": f"GET /api/models{REPOSITORY}/tree/.+",
    "preupload": f"POST /api/models{REPOSITORY}/preupload/.+",
    "batch": rf"POST {REPOSITORY}\.git/info/lfs/objects/batch",
    "upload": f"PUT {OBJECT}",
    "commit": f"POST /api/models{REPOSITORY}/commit/.+",
    "resolve": f"(HEAD|GET) {REPOSITORY}/resolve/[^/]+/(?P<path>.+)",
    "download": f"GET {OBJECT}",
    "not_here": "GET /api/agent-harnesses",  # asked for where an agent runs the tests
}


class Refusal(Exception):
    """An answer of the Hub other than success: status, `X-Error-Code`, message."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_request(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        if hub.is_down:
            self.cut()
            return
        request = f"{self.command} {path}"
        name, match = next(
            ((name, match) for name, pattern in ROUTES.items() if (match := re.fullmatch(pattern, request))), ("", None)
        )
        try:
            if match is None:
                hub.unknown_requests.append(request)
                raise Refusal(404, "", "not implemented")
            arguments = match.groupdict()
            if "repository" in arguments:
                arguments["repository"] = self.repository(arguments["repository"])
            with hub.lock:
                answer = getattr(self, name)(**arguments)
        except Refusal as refusal:
            status, code, message = refusal.args
            self.body()
            headers = {"X-Error-Code": code} if code else {}
            self.answer(status, {"error": message}, {**headers, "X-Error-Message": message})
        else:
            if answer is not None:
                self.answer(200, answer)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def log_message(self, *_):
        pass

    # What every request needs

    def body(self) -> bytes:
        if not hasattr(self, "_body"):
            self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return self._body

    def parse_request(self) -> bool:
        self.__dict__.pop("_body", None)  # a connection is kept for several requests
        return super().parse_request()

    def answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(SHUT_RDWR)

    @property
    def user(self) -> str | None:
        return USERS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def repository(self, name: str) -> Repository:
        repository = self.server.hub.repositories.get(name)
        if repository is None or (repository.private and self.user != repository.owner):
            raise Refusal(404, "RepoNotFound", "Repository not found")
        return repository

    def need_user(self, owner: str | None = None) -> None:
        if self.user is None:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        if owner is not None and self.user != owner:
            raise Refusal(403, "", f"You don't have the rights to write to {owner}")

    # The Hub's API

    def create(self):
        request = json.loads(self.body())
        self.need_user()
        owner = request.get("organization") or self.user
        self.need_user(owner)
        name = f"{owner}/{request['name']}"
        url = f"{self.server.hub.endpoint}/{name}"
        if name in self.server.hub.repositories:
            self.answer(409, {"error": "You already created this model repo", "url": url})
            return None
        self.server.hub.repositories[name] = Repository(name, request.get("visibility") == "private")
        return {"url": url}

    def validate(self):
        license = re.search(r"^license: (.*)$", json.loads(self.body())["content"], flags=re.MULTILINE)
        if license and license[1] not in LICENSES:
            self.answer(400, {"errors": [{"message": f'"license" must be one of {LICENSES}'}], "warnings": []})
            return None
        return {"errors": [], "warnings": []}

    def check_write(self, repository):
        self.need_user(repository.owner)
        return {}

    def info(self, repository):
        siblings = [{"rfilename": path} for path in sorted(repository.files)]
        return {"id": repository.name, "sha": repository.head, "private": repository.private, "siblings": siblings}

    def tree(self, repository):
        entries = []
        for path, (kind, oid) in sorted(repository.files.items()):
            size = len(repository.blobs[oid])
            entry = {"type": "file", "path": path, "size": size, "oid": oid[:40]}
            if kind == "lfs":
                entry["lfs"] = {"oid": oid, "size": size, "pointerSize": 130}
            entries.append(entry)
        return entries

    def preupload(self, repository):
        self.need_user(repository.owner)
        answers = []
        for file in json.loads(self.body())["files"]:
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            _, oid = repository.files.get(file["path"], (None, None))
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def batch(self, repository):
        self.need_user(repository.owner)
        objects = []
        for request in json.loads(self.body())["objects"]:
            answer = {"oid": request["oid"], "size": request["size"]}
            if request["oid"] not in repository.blobs:
                answer["actions"] = {
                    "upload": {"href": f"{self.server.hub.storage}/{repository.name}/{request['oid']}"}
                }
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def upload(self, stored, oid):
        hub = self.server.hub
        if hub.uploads_until_cut.get(stored) == 0:
            hub.is_down = True
            self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
            self.cut()
            return None
        if stored in hub.uploads_until_cut:
            hub.uploads_until_cut[stored] -= 1
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "", "wrong content")
        hub.repositories[stored].blobs[oid] = content
        hub.repositories[stored].sent[oid] += 1
        return b""

    def download(self, stored, oid):
        return self.server.hub.repositories[stored].blobs[oid]

    def not_here(self):
        raise Refusal(404, "", "not here")

    def commit(self, repository):
        self.need_user(repository.owner)
        files = dict(repository.files)
        for line in self.body().splitlines():
            key, value = (json.loads(line)[part] for part in ("key", "value"))
            if key == "file":
                content = base64.b64decode(value["content"])
                repository.blobs[blob_id(content)] = content
                files[value["path"]] = ("regular", blob_id(content))
            elif key == "lfsFile":
                if value["oid"] not in repository.blobs:
                    raise Refusal(400, "", f"{value['path']} was never uploaded")
                files[value["path"]] = ("lfs", value["oid"])
        repository.commits.append(files)
        url = f"{self.server.hub.endpoint}/{repository.name}/commit/{repository.head}"
        return {"commitUrl": url, "commitOid": repository.head}

    def resolve(self, repository, path):
        if path not in repository.files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        kind, oid = repository.files[path]
        headers = {"X-Repo-Commit": repository.head, "ETag": f'"{oid}"'}
        content = repository.blobs[oid]
        if kind == "regular":
            self.answer(200, content, headers)
        else:
            linked = {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            location = {"Location": f"{self.server.hub.storage}/{repository.name}/{oid}"}
            self.answer(302, b"", headers | linked | location)
