"""A Hub of one machine: what the real `huggingface_hub` client asks for over HTTP, kept in memory.

It knows models, branches, commits, and files small (in the commit) and large (sent before it, by Git LFS). Tests drop
connections by `break_download` and `break_upload`, and read what was asked in `requests`.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".model", ".png")


class Repository:
    """Commits by their id, each a dict of path and bytes, and branches that name one of them."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        content = "".join(f"{path} {hashlib.sha1(data).hexdigest()}" for path, data in sorted(files.items()))
        name = hashlib.sha1(f"{len(self.commits)} {content}".encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class LoopbackHub:
    """A running server: `url`, its `repositories` by name, and the `requests` so far, such as "GET /org/name/..."."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # contents by their SHA-256, sent or not yet committed
        self.requests: list[str] = []
        self.break_download: tuple[str, int] | None = None  # once: end of a path, and bytes to send of it
        self.break_upload: str | None = None  # once: refuse the content that begins so
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._describe("/".join(parts[2:4]), parts[4:])
        elif parts[2:3] == ["resolve"]:
            self._send_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._answer(404, {"error": "no such page"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.hub.requests.append(f"POST {self.path}")
        body = self._body()
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif parts == ["api", "validate-yaml"]:
            self._answer(200, {"errors": [], "warnings": []})
        elif parts[-4:] == ["info", "lfs", "objects", "batch"]:
            self._answer(200, {"transfer": "basic", "objects": [self._place(o) for o in json.loads(body)["objects"]]})
        elif parts[:2] == ["api", "models"] and (repository := self._repository("/".join(parts[2:4]))):
            revision = "/".join(parts[5:])
            if parts[4] == "branch":
                if revision in repository.branches:
                    self._answer(409, {"error": "the branch exists"})
                else:
                    repository.branches[revision] = repository.branches["main"]
                    self._answer(200, {})
            elif repository.find(revision) is None:
                self._answer(404, {"error": "no such revision"}, "RevisionNotFound")
            elif parts[4] == "preupload":
                files = [
                    {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular"}
                    | {"shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                self._answer(200, {"files": files})
            elif parts[4] == "commit":
                self._commit(repository, "/".join(parts[2:4]), revision, body.decode().splitlines())
            else:
                self._answer(404, {"error": "no such address"})
        elif parts[:2] != ["api", "models"]:
            self._answer(404, {"error": "no such address"})

    def do_PUT(self) -> None:
        self.hub.requests.append(f"PUT {self.path}")
        content = self._body()
        if self.hub.break_upload is not None and self.path.endswith(self.hub.break_upload):
            self.hub.break_upload = None
            self._answer(403, {"error": "the line is cut"})
        else:
            assert hashlib.sha256(content).hexdigest() == self.path.split("/")[-1]
            self.hub.large[self.path.split("/")[-1]] = content
            self._answer(200, {})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        blocks = []
        while size := int(self.rfile.readline(), 16):
            blocks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(blocks)

    def _repository(self, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and "Authorization" not in self.headers):
            self._answer(404, {"error": "Repository not found"}, "RepoNotFound")
            return None
        return repository

    def _describe(self, name: str, rest: list[str]) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repository.find(revision)
        if commit is None:
            self._answer(404, {"error": f"Invalid rev id: {revision}"}, "RevisionNotFound")
            return
        files = repository.commits[commit]
        if rest[:1] == ["tree"]:
            within = "".join(f"{part}/" for part in rest[2:])
            files = {path: data for path, data in files.items() if path.startswith(within)}
            if not files and within:
                self._answer(404, {"error": "no such folder"}, "EntryNotFound")
                return
            self._answer(200, [{"type": "file", "path": p, "size": len(d), "oid": _oid(d)} for p, d in files.items()])
        else:
            siblings = [{"rfilename": path} for path in files]
            self._answer(200, {"id": name, "sha": commit, "private": repository.private, "siblings": siblings})

    def _send_file(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        commit = repository.find(revision)
        if commit is None:
            self._answer(404, {"error": f"Invalid rev id: {revision}"}, "RevisionNotFound")
            return
        if path not in repository.commits[commit]:
            self._answer(404, {"error": "Entry not found"}, "EntryNotFound", {"X-Repo-Commit": commit})
            return
        data = repository.commits[commit][path]
        first = int(self.headers["Range"].split("=")[1].split("-")[0]) if "Range" in self.headers else 0
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{_oid(data)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(data) - first))
        self.send_header("Accept-Ranges", "bytes")
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            if self.hub.break_download is not None and path.endswith(self.hub.break_download[0]):
                sent, self.hub.break_download = self.hub.break_download[1], None
                self.wfile.write(data[:sent])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
            else:
                self.wfile.write(data[first:])

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repositories:
            self._answer(409, {"error": "it exists", "url": f"{self.hub.url}/{name}"})
            return
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repositories[name] = Repository(private)
        self._answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Where to send a large content, unless it is here already."""
        known = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] in self.hub.large:
            return known
        return known | {"actions": {"upload": {"href": f"{self.hub.url}/large/{wanted['oid']}"}}}

    def _commit(self, repository: Repository, name: str, revision: str, lines: list[str]) -> None:
        files = dict(repository.commits[str(repository.find(revision))])
        for line in map(json.loads, lines):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        oid = repository.commit(revision, files)
        self._answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def _answer(self, status: int, content: Any, code: str | None = None, headers: Any = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if code is not None:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", str(content["error"]))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
