"""`resolve` on hub ids, against a small hub on this machine. One process per environment."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
COMMIT, TAGGED = "a" * 40, "b" * 40
WEIGHTS = bytes(range(256)) * 1200

RESOLVE = """
import json, os, resource, sys
from contextlib import contextmanager
from compress.checkpoint.source import resolve
from compress.errors import EntropressError
from compress.progress import Silent

class Counting(Silent):
    total = done = 0
    @contextmanager
    def step(self, label, total, unit="B"):
        self.total = total
        yield self
    def advance(self, amount):
        self.done += amount

if limit := os.environ.get("FILE_SIZE_LIMIT"):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
answers = []
for model, revision in json.loads(sys.argv[1]):
    progress = Counting()
    try:
        source = resolve(model, revision, progress)
        answers.append({"path": str(source.path), "id": source.id, "revision": source.revision,
                        "total": progress.total, "done": progress.done})
    except EntropressError as error:
        answers.append({"error": type(error).__name__, "code": error.exit_code, "line": str(error)})
print(json.dumps(answers))
"""


class Hub(http.server.ThreadingHTTPServer):
    """Just enough of the hub's API: model info, file tree, files, and how it says no."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fetched: list[str] = []
        base = {"config.json": b"{}", "tokenizer.json": b'{"version": "1.0"}'}
        self.models: dict[str, dict[str, bytes]] = {
            "org/model": base
            | {
                "model.safetensors": WEIGHTS,
                "LICENSE": b"free",
                "modeling_own.py": b"raise SystemExit",
                "pytorch_model.bin": b"pickle",
                "consolidated.safetensors": b"twice",
                "onnx/model.safetensors": b"thrice",
            },
            "single": base | {"model.safetensors": b"1"},
            "org/gated": base | {"model.safetensors": b"2"},
            "org/pickles": base | {"pytorch_model.bin": b"3", "nested/model.safetensors": b"4"},
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/"):
            self.api(path.removeprefix("/api/models/"))
        else:
            model, _, rest = path[1:].partition("/resolve/")
            self.file(model, rest.partition("/")[2])

    def api(self, path: str) -> None:
        model, _, revision = path.partition("/revision/")
        model, is_tree, _ = model.partition("/tree/")
        if model == "org/down":
            self.answer(503)
        elif model not in self.server.models:
            self.answer(401, headers={"X-Error-Code": "RepoNotFound"})
        elif revision not in ("", "main", "v1", COMMIT, TAGGED):
            self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        else:
            files = self.server.models[model]
            sha = TAGGED if revision in ("v1", TAGGED) else COMMIT
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": "0"}
                for name, data in files.items()
            ]
            info = {"id": model, "sha": sha, "siblings": siblings}
            self.answer(200, json.dumps(tree if is_tree else info).encode())

    def file(self, model: str, name: str) -> None:
        if model == "org/gated":
            self.answer(403, headers={"X-Error-Code": "GatedRepo"})
            return
        data = self.server.models[model][name]
        if self.command == "GET":
            self.server.fetched.append(name)
        commit = self.path.split("/resolve/")[1].partition("/")[0]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self.answer(200, data, {"X-Repo-Commit": commit, "ETag": etag})

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(home: Path, endpoint: str, *models: tuple[str, str | None], **env: str) -> list[Any]:
    """What `resolve` answers in a fresh process with that hub and cache."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    own = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, json.dumps(models)],
        env=kept | own | env,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stderr, "huggingface_hub drew a progress bar"
    return list(json.loads(done.stdout))


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture(scope="module")
def online(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any], list[str]]:
    """A cache filled from the hub, the answers, and the files fetched."""
    home = tmp_path_factory.mktemp("hf")
    models = [("org/model", None), ("org/model", "v1"), ("org/model", None), ("single", None)]
    answers = ask(home, hub.url, *models)
    return home, answers, list(hub.fetched)


def test_a_hub_model_is_fetched_with_its_commit(online: Any) -> None:
    _, (model, tagged, again, single), _ = online
    assert (model["id"], model["revision"]) == ("org/model", COMMIT)
    assert (tagged["id"], tagged["revision"]) == ("org/model", TAGGED)
    assert (single["id"], single["revision"]) == ("single", COMMIT)
    assert again["path"] == model["path"] != tagged["path"]
    assert (Path(model["path"]) / "model.safetensors").read_bytes() == WEIGHTS


def test_only_what_a_model_needs_is_fetched(online: Any) -> None:
    _, (model, *_), fetched = online
    wanted = ["LICENSE", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in Path(model["path"]).iterdir()) == wanted
    assert set(fetched) == set(wanted)


def test_progress_counts_the_bytes_that_travel_and_nothing_when_cached(online: Any) -> None:
    _, (model, _, again, _), _ = online
    assert model["total"] == model["done"] > len(WEIGHTS)
    assert again["total"] == again["done"] == 0


def test_the_cache_serves_without_a_hub(online: Any) -> None:
    home, (model, tagged, *_), _ = online
    asked = [("org/model", None), ("org/model", "v1"), ("org/model", COMMIT), ("org/other", None)]
    for endpoint, env in ((closed_port(), {}), (closed_port(), {"HF_HUB_OFFLINE": "1"})):
        first, second, third, other = ask(home, endpoint, *asked, **env)
        assert (first["path"], first["revision"]) == (model["path"], COMMIT)
        assert (second["path"], second["revision"]) == (tagged["path"], TAGGED)
        assert third["path"] == model["path"]
        assert (other["error"], other["code"]) == ("Missing", 3)
        assert ("HF_HUB_OFFLINE" in other["line"].partition(";")[0]) == bool(env)


def test_an_incomplete_cache_is_not_a_model(hub: Hub, tmp_path: Path) -> None:
    (model,) = ask(tmp_path, hub.url, ("org/model", None))
    (Path(model["path"]) / "model.safetensors").unlink()
    (cut,) = ask(tmp_path, closed_port(), ("org/model", None), HF_HUB_OFFLINE="1")
    assert (cut["error"], cut["code"]) == ("Missing", 3)
    for listing in tmp_path.rglob("trees/*.json"):  # as left by loading only a tokenizer
        listing.unlink()
    (cut,) = ask(tmp_path, closed_port(), ("org/model", None), HF_HUB_OFFLINE="1")
    assert (cut["error"], cut["code"]) == ("Missing", 3)
    assert "no weights" in cut["line"]


def test_each_refusal_has_its_line(hub: Hub, tmp_path: Path) -> None:
    before = len(hub.fetched)
    missing, gated, revision, pickles, down, invalid = ask(
        tmp_path,
        hub.url,
        ("org/nowhere", None),
        ("org/gated", None),
        ("org/model", "nowhen"),
        ("org/pickles", None),
        ("org/down", None),
        ("org/a--b", None),
    )
    for answer in (missing, gated, revision, pickles, invalid):
        assert (answer["error"], answer["code"]) == ("BadInput", 2), answer
    assert (down["error"], down["code"]) == ("Missing", 3)
    assert "no such model" in missing["line"]
    assert "private" in missing["line"]
    assert "accept its terms at" in gated["line"]
    assert "hf auth login" in gated["line"]
    assert "revision" in revision["line"]
    assert "nowhen" in revision["line"]
    assert "no safetensors" in pickles["line"]
    assert "pytorch_model.bin" in pickles["line"]
    assert "save_pretrained" in pickles["line"]
    assert "503" in down["line"]
    assert len(hub.fetched) == before, "a refused model was fetched in part"


def test_a_full_disk_is_missing_room(hub: Hub, tmp_path: Path) -> None:
    (answer,) = ask(tmp_path, hub.url, ("org/model", None), FILE_SIZE_LIMIT="100000")
    assert (answer["error"], answer["code"]) == ("Missing", 3)
    assert "no room" in answer["line"]
