"""When experts that stay on disk are read, by whom, and in which memory."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import MIXTURE, random_model, tiny_config
from sparse import save_sparse, sparsify
from stored_mixtures import FEW, gone, logits, model_of, threads

import llmsparse
from llmsparse.backends.cpu import why_not
from llmsparse.backends.cpu.pages import Arena
from llmsparse.cli.app import main
from llmsparse.inference import foresight
from llmsparse.inference.expert_memory import ExpertMemory
from llmsparse.inference.expert_readers import NativeReaders
from llmsparse.inference.leaving import on_disk_of
from llmsparse.inference.packed_experts import SparseExperts
from llmsparse.inference.stored_experts import StoredExperts

Folders = Callable[..., tuple[Path, Path]]

PROMPT = "def parse("

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason="the kernels cannot be built here"),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`"),
]


@pytest.mark.parametrize("family", [name for name in MIXTURE if name != "llama4_text"])
def test_routers_of_every_family_can_be_asked_ahead(family: str, folders: Folders) -> None:
    packed = folders(family)[1]
    on_disk = on_disk_of(model_of(packed))
    assert on_disk is not None and f"by {len(on_disk.layers)} of {len(on_disk.layers)} routers" in on_disk.plan()


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "glm4_moe", "gpt_oss"])
def test_a_router_chooses_ahead_what_it_chooses_then(family: str, folders: Folders) -> None:
    whole = model_of(folders(family)[1], None)
    name, module = next((name, one) for name, one in whole.named_modules() if isinstance(one, SparseExperts))
    given: list[Any] = []
    module.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    logits(whole)
    ((x, index, _),) = given
    router = foresight.router_of(whole, name, module)
    assert router is not None
    ahead = foresight.choices(router, x, index.shape[1], 4)
    assert torch.equal(ahead.sort().values, index.sort().values)


def test_what_was_foreseen_is_counted(folders: Folders) -> None:
    ours = model_of(folders("mixtral")[1], "145KB")
    on_disk = on_disk_of(ours)
    assert on_disk is not None
    for _ in range(3):
        logits(ours, 1, 1)
    tally = on_disk.memory.tally
    assert tally.asked == 12 and tally.found <= 12 and tally.foreseen <= tally.read_ahead <= tally.read


def test_once_all_fit_nothing_is_read_twice(folders: Folders) -> None:
    ours = model_of(folders("mixtral")[1], "10MB")
    on_disk = on_disk_of(ours)
    assert on_disk is not None and on_disk.memory.room == 8
    for _ in range(3):
        logits(ours, 3, 40)
    assert on_disk.memory.tally.read == 8 and "10.0 MB" not in on_disk.plan(), "it takes no more than it needs"


def test_threads_end_with_the_model(folders: Folders) -> None:
    gc.collect()  # models of other tests
    before = threads()
    ours = model_of(folders("mixtral")[1])
    until = time.monotonic() + 10
    while len(threads() - before) < 3 and time.monotonic() < until:  # each takes its name first
        time.sleep(0.01)
    reading = threads() - before
    assert len(reading) == 3
    del ours
    gc.collect()
    assert gone(reading)


def test_made_dense_or_let_go_it_reads_no_more(folders: Folders) -> None:
    gc.collect()  # models of other tests
    others, before = threads(), set(os.listdir("/proc/self/fd"))
    ours, other = (model_of(folders("mixtral")[1]) for _ in range(2))
    logits(ours), logits(other)
    readers = threads() - others
    ours.dequantize()
    assert on_disk_of(ours) is None
    del other
    gc.collect()
    assert len(readers) == 6 and gone(readers)
    assert set(os.listdir("/proc/self/fd")) == before


ENDS_WHILE_READING = """
import sys
from pathlib import Path
import torch
from llmsparse.inference.leaving import on_disk_of
from llmsparse.inference.load import load_model
model = load_model(Path(sys.argv[1]), device=torch.device("cpu"), backend="cpu-bitmask", expert_memory="125KB")
for turn in range(int(sys.argv[2])):
    on_disk_of(model).memory.foresee([(turn % 2, expert) for expert in range(4)])
"""


@pytest.mark.parametrize("turns", [1, 3, 10, 30])
def test_a_program_may_end_while_experts_are_read(turns: int, folders: Folders) -> None:
    """Python aborts now and then where it ends while a thread is within torch."""
    asked = [sys.executable, "-c", ENDS_WHILE_READING, str(folders("mixtral")[1]), str(turns)]
    done = subprocess.run(asked, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def worded(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("worded")
    save_sparse("mixtral", root / "pruned", vocab_size=384)
    shutil.copytree(tokenizer_folder, root / "pruned", dirs_exist_ok=True)
    llmsparse.pack(str(root / "pruned"), root / "packed")
    return root / "packed"


def test_the_command_says_what_stays_on_disk_and_how_it_went(worded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = ["generate", str(worded), "--prompt", PROMPT, "--max-new-tokens", "6", "--backend", "cpu-bitmask"]
    assert main(usual) == 0
    text = capsys.readouterr().out
    assert main([*usual, "--expert-memory", FEW]) == 0
    out, error = capsys.readouterr()
    plan, *_, summary = [line for line in error.splitlines() if line and "Loading weights" not in line]
    assert out == text and plan.startswith("8 experts of 2 layers stay on disk, ") and " hold " in plan
    assert re.search(
        r"of \d+ experts asked for \d+% were in memory, \d+% were foreseen; .* read, .* s waited for", summary
    )
    assert main([*usual, "--expert-memory", FEW, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["on_disk"]
    assert told["experts"] == 8 and told["asked"] > told["found"] and told["read_bytes"] > 0
    assert main([*usual, "--expert-memory", "1KB"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --expert-memory 1.00 kB: ")


GROWTH = """
import sys, torch
from pathlib import Path
from llmsparse.inference.load import load_model
from llmsparse.runs.memory import PeakMemory, anonymous_bytes
load = lambda name, memory: load_model(Path(sys.argv[1]) / name, device=torch.device("cpu"), backend="cpu-bitmask", expert_memory=memory)
warm = load("small", "200KB")
warm(torch.arange(200)[None])
before = anonymous_bytes()
with PeakMemory(torch.device("cpu")) as memory:
    model = load("large", None if sys.argv[2] == "none" else int(sys.argv[2]))
    for _ in range(3):
        with torch.no_grad():
            model(torch.arange(200)[None], use_cache=False)
            for token in range(20):
                model(torch.tensor([[token]]), use_cache=False)
    print(memory.read() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
def test_it_takes_the_memory_that_it_is_allowed(tmp_path: Path) -> None:
    shapes = {"small": {}, "large": {"hidden_size": 256, "intermediate_size": 1024, "num_local_experts": 24}}
    for name, shape in shapes.items():
        model = sparsify(random_model(tiny_config("mixtral", vocab_size=384, max_position_embeddings=256, **shape)))
        model.to(torch.bfloat16).save_pretrained(tmp_path / f"{name}-pruned")
        llmsparse.pack(str(tmp_path / f"{name}-pruned"), tmp_path / name)
    experts = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))

    def growth(memory: str) -> int:
        ran = subprocess.run(
            [sys.executable, "-c", GROWTH, str(tmp_path), memory],
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        return int(ran.stdout)

    allowed, rest = experts // 5, 12 * 2**20  # activations, what is not packed, and a large page at either end
    assert experts > 24 * 2**20
    assert growth("none") > experts
    assert growth(str(allowed)) < allowed + rest < experts


WAITS = """
import os, signal, threading
from llmsparse.backends.cpu.pages import Arena
from llmsparse.backends.cpu.stored import Readers
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
readers = Readers(Arena.row(1, 8192), 1)
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    while True:
        readers.wait(0)
except KeyboardInterrupt:
    print("interrupted")
readers.close()
readers.join()
"""


def test_who_waits_for_experts_can_be_interrupted() -> None:
    done = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True, timeout=60)
    assert done.stdout == "interrupted\n" and done.returncode == 0


def test_layers_of_any_shapes_are_read_by_the_same_readers(tmp_path: Path) -> None:
    layers: list[StoredExperts] = []
    models: list[Any] = []
    for name, shape in {"wide": (512, 192), "tall": (32, 2048)}.items():
        model = random_model(tiny_config("mixtral", hidden_size=shape[0], intermediate_size=shape[1]))
        sparsify(model).to(torch.bfloat16).save_pretrained(tmp_path / f"{name}-pruned")
        llmsparse.pack(str(tmp_path / f"{name}-pruned"), tmp_path / name)
        models.append(model_of(tmp_path / name, "100MB"))
        on_disk = on_disk_of(models[-1])
        assert on_disk is not None
        layers += on_disk.layers
    *scratches, own = Arena.row(2, StoredExperts.scratch_bytes(layers))
    readers = NativeReaders(layers, scratches, own, lambda: None)
    memory = ExpertMemory(readers, Arena.row(8, 4 * 2**20), lambda key: 1)
    for number, layer in enumerate(layers):
        for expert, _ in memory.arriving(number, range(layer.count)):
            assert expert < layer.count
    assert memory.tally.read == 16 and memory.tally.repeated == 0
    memory.end()
