"""A model on the hub, over real HTTP: what a plan fetches, what a run fetches, and what the written recipe pins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from http_reply import Replying

import llmsparse

SHA = "0123456789abcdef0123456789abcdef01234567"
LATER = "89abcdef0123456789abcdef0123456789abcdef"  # what is pushed while a run goes on
MODEL = "owner/model"
RUN = ["--method", "wanda", "--calibration", "builtin", "--calibration-samples", "4", "--seq-len", "32"]
RUN += ["--match-steps", "0", "--device", "cpu"]


COMMANDS = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from llmsparse.cli.app import main
for command in json.loads(sys.argv[1]):
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main(command)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


@dataclass
class Hub:
    """Serves one folder as the repository owner/model, and counts the bytes of weights that leave it. After a GET of
    /push `main` is another folder."""

    folder: Path
    later: Path = Path()
    head: str = SHA
    url: str = ""
    cache: Path = Path()
    weight_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def llmsparse(self, *commands: list[str], offline: bool = False) -> list[tuple[int, str, str]]:
        """Exit code, stdout and stderr of commands, in one process: huggingface_hub reads its environment once."""
        return [tuple(json.loads(line)) for line in self.python(COMMANDS, json.dumps(commands), offline=offline)]

    def python(self, *words: str, offline: bool = False) -> list[str]:
        """The lines that a program prints."""
        environment = {
            "HF_HOME": str(self.cache),
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(Path(llmsparse.__file__).parents[1]),
        }
        done = subprocess.run(
            [sys.executable, "-c", *words],
            env={**os.environ, **environment},
            cwd=self.cache,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(Replying):
        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path == "/push":
                hub.head = LATER
                return self.reply(200)
            sha = next((one for one in (SHA, LATER) if one in path), hub.head)
            folder = hub.folder if sha == SHA else hub.later
            files = {file.name: file.stat().st_size for file in folder.iterdir()}
            if path.startswith(f"/api/models/{MODEL}") and "/tree/" in path:
                tree = [
                    {"type": "file", "path": name, "size": size, "oid": f"{number:040x}"}
                    for number, (name, size) in enumerate(files.items())
                ]
                self.reply(200, json.dumps(tree).encode(), Content_Type="application/json")
            elif path.startswith(f"/api/models/{MODEL}"):
                info = {"id": MODEL, "sha": sha, "siblings": [{"rfilename": name} for name in files]}
                self.reply(200, json.dumps(info).encode(), Content_Type="application/json")
            elif path.startswith(f"/{MODEL}/resolve/") and path.rpartition("/")[2] in files:
                self.file(folder / path.rpartition("/")[2], sha)
            elif path.startswith(f"/{MODEL}/resolve/"):
                self.reply(404, X_Error_Code="EntryNotFound")
            else:
                self.reply(401, X_Error_Code="RepoNotFound")

        def file(self, file: Path, sha: str) -> None:
            content, status = file.read_bytes(), 200
            if (wanted := self.headers.get("Range", "")).startswith("bytes="):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                content, status = content[int(first) : int(last or len(content)) + 1], 206
            if file.suffix == ".safetensors" and self.command == "GET":
                with hub.lock:
                    hub.weight_bytes += len(content)
            self.reply(status, content, ETag=f'"{sha}{file.name}"', X_Repo_Commit=sha)

        do_HEAD = do_GET

    return Handler


@pytest.fixture(params=[pytest.param(1, marks=pytest.mark.slow), 2], ids=["one file", "two shards"])
def hub(request: pytest.FixtureRequest, tiny_llama: Callable[..., Path], tmp_path: Path) -> Iterator[Hub]:
    folder = tiny_llama(tmp_path / "repository", hidden=128, ffn=256, layers=3, shards=request.param)
    hub = Hub(folder, cache=tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_plan_fetches_headers_and_a_run_the_weights_once(hub: Hub) -> None:
    weights = sum(file.stat().st_size for file in hub.folder.glob("*.safetensors"))
    run = ["prune", MODEL, "-o", "out", "--sparsity", "0.5", *RUN]
    (hub.cache / "taken").mkdir()
    (hub.cache / "taken/mine.txt").touch()

    planned, dry, narrow, taken = hub.llmsparse(
        ["plan", *run[1:], "--json"],
        [*run, "--dry-run"],
        ["prune", MODEL, "--pattern", "3:6", *RUN],
        ["prune", MODEL, "-o", "taken", "--sparsity", "0.5", *RUN],
    )
    assert planned[0] == 0, planned[2]
    plan: dict[str, Any] = json.loads(planned[1])
    assert plan["bytes_to_download"] == pytest.approx(weights, rel=0.01) and len(plan["weights"]) == 21
    assert dry[0] == 0 and "not in the cache yet" in dry[1]
    assert narrow[0] == 2 and "self_attn" in narrow[2]
    assert taken[0] == 2 and "exists already" in taken[2]
    assert hub.weight_bytes < weights / 2

    (offline,) = hub.llmsparse(run, offline=True)
    assert offline[0] == 3 and "only part of it in the cache while offline" in offline[2]

    hub.weight_bytes = 0
    (done,) = hub.llmsparse(run)
    assert done[0] == 0, done[2]
    assert weights <= hub.weight_bytes < 1.5 * weights
    assert f"revision: {SHA}" in (hub.cache / "out/llmsparse_recipe.yaml").read_text()

    hub.weight_bytes = 0
    again, plan_again = hub.llmsparse(
        ["prune", "--recipe", "out/llmsparse_recipe.yaml", "-o", "again"],
        ["plan", *run[1:], "-o", "third"],
        offline=True,
    )
    assert again[0] == 0, again[2]
    for file in (hub.cache / "out").glob("*.safetensors"):
        assert file.read_bytes() == (hub.cache / "again" / file.name).read_bytes()
    assert plan_again[0] == 0 and "not in the cache" not in plan_again[1] and hub.weight_bytes == 0


LOOK_AND_FETCH = """
import os, urllib.request
from llmsparse.models.origin import fetch_model, fetch_what_was_looked_at, look_at_model
origin = look_at_model("owner/model")
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/push")
print(origin.commit, fetch_what_was_looked_at("owner/model", origin), fetch_model("owner/model"), sep="\\n")
"""


def test_what_was_looked_at_is_what_is_fetched_whatever_is_pushed_in_between(
    hub: Hub, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    hub.later = tiny_llama(tmp_path / "later", seed=1, shards=len([*hub.folder.glob("*.safetensors")]))
    commit, fetched, newest = hub.python(LOOK_AND_FETCH)
    assert (commit, Path(fetched).name, Path(newest).name) == (SHA, SHA, LATER)
    for file in hub.folder.glob("*.safetensors"):
        assert (Path(fetched) / file.name).read_bytes() == file.read_bytes()
        assert (Path(newest) / file.name).read_bytes() != file.read_bytes()


def test_a_plan_of_tuning_fetches_headers_of_both_models(hub: Hub, tmp_path: Path, text: str) -> None:
    (tmp_path / "notes.txt").write_text(text[:20_000], encoding="utf-8")
    small = {"calibration_samples": 16, "seq_len": 32, "router_steps": 2, "experts": 4, "shared": 1, "active": 1}
    llmsparse.factorize(
        model=str(hub.folder),
        output=str(tmp_path / "moe"),
        calibration=str(tmp_path / "notes.txt"),
        device="cpu",
        **small,
    )
    tune = ["tune", "moe", "-o", "out", "--text", "notes.txt", "--steps", "2", "--seq-len", "32", "--device", "cpu"]
    planned, unlike = hub.llmsparse(
        [*tune, "--teacher", MODEL, "--dry-run", "--json"],
        ["tune", MODEL, *tune[2:], "--teacher", MODEL],
    )
    assert planned[0] == 0, planned[2]
    plan: dict[str, Any] = json.loads(planned[1])
    assert plan["memory_bytes"] > 0
    assert unlike[0] == 2, unlike
    assert hub.weight_bytes < sum(file.stat().st_size for file in hub.folder.glob("*.safetensors")) / 2
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
