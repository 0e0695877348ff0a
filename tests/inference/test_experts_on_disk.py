"""A packed mixture whose experts stay on disk says what it says from memory, in the memory that it is allowed."""

from __future__ import annotations

import contextlib
import copy
import errno
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
from architectures import MIXTURE, random_model, tiny_config, windows
from safetensors.torch import save_file
from sparse import assert_same_tensors, save_sparse, sparsify
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmsparse
from llmsparse.backends.cpu import nested, why_not
from llmsparse.backends.cpu.library import library
from llmsparse.backends.cpu.pages import Arena
from llmsparse.cli.app import main
from llmsparse.errors import CheckpointError, MachineError, RecipeError
from llmsparse.inference import foresight
from llmsparse.inference.expert_memory import ExpertMemory
from llmsparse.inference.expert_readers import NativeReaders
from llmsparse.inference.leaving import on_disk_of
from llmsparse.inference.load import load_model
from llmsparse.inference.packed_experts import SparseExperts
from llmsparse.inference.stored_experts import StoredExperts
from llmsparse.storage.checkpoint import CheckpointReader
from llmsparse.storage.direct import DirectFile

Folders = Callable[..., tuple[Path, Path]]
CPU = torch.device("cpu")
FEW = "125KB"  # holds some of the tiny experts, beside what is read into
PROMPT = "def parse("

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason="the kernels cannot be built here"),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`"),
]


def model_of(folder: Path, memory: str | int | None = FEW, **options: Any) -> Any:
    return load_model(folder, **{"device": CPU, "backend": "cpu-bitmask", "expert_memory": memory} | options)


@torch.no_grad()
def logits(model: Any, *shape: int) -> Tensor:
    (ids,) = windows(shape or (2, 9))
    return model(ids, use_cache=False).logits


def least(folder: Path) -> int:
    """The bytes that a refusal asks for."""
    with pytest.raises(RecipeError) as refused:
        model_of(folder, 1)
    found = re.search(r"give it ([\d.]+) kB", str(refused.value))
    assert found is not None
    return round(float(found[1]) * 1000)


@pytest.mark.parametrize("family", [name for name in MIXTURE if name != "llama4_text"])
def test_it_computes_the_bits_that_it_computes_from_memory(family: str, folders: Folders) -> None:
    packed = folders(family)[1]
    whole, ours = model_of(packed, None), model_of(packed, least(packed))
    on_disk = on_disk_of(ours)
    assert on_disk is not None and on_disk.memory.room == 4 and on_disk_of(whole) is None
    assert sum(one.count for one in on_disk.layers) >= 4
    for shape in ((1, 1), (1, 5), (2, 9), (3, 40), (1, 1)):
        assert torch.equal(logits(ours, *shape), logits(whole, *shape))
    tally = on_disk.memory.tally
    assert tally.asked >= tally.found and tally.read >= 4 and tally.read_bytes > 0 and tally.repeated == 0


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_experts_of_a_pattern_need_no_index(pattern: str, folders: Folders) -> None:
    packed = folders("mixtral", pattern)[1]
    ours = model_of(packed)
    assert torch.equal(logits(ours), logits(model_of(packed, None)))
    on_disk = on_disk_of(ours)
    assert on_disk is not None and sum(one.index_bytes() for one in on_disk.layers) == 0
    assert on_disk.memory.tally.repeated == 0 and all(one.by_number for one in on_disk.layers)


def test_in_another_dtype_it_computes_the_same(folders: Folders) -> None:
    packed = folders("mixtral")[1]
    ours, whole = model_of(packed, "150KB", dtype="float32"), model_of(packed, None, dtype="float32")
    assert logits(ours).dtype == torch.float32 and torch.equal(logits(ours), logits(whole))


@pytest.mark.parametrize("backend", ["cpu-nested", "cpu-nested-int8", "auto"])
@pytest.mark.skipif(nested.why_not() is not None, reason="the kernels cannot be built here")
def test_experts_in_few_bits_stay_on_disk_too(backend: str, few_bits: Path) -> None:
    ours, whole = (model_of(few_bits, memory, backend=backend) for memory in ("200KB", None))
    if backend == "auto":  # from memory such small ones run dense
        assert llmsparse.explain(ours).backends["cpu-nested"] >= 4
    else:
        assert torch.equal(logits(ours), logits(whole)) and torch.equal(logits(ours, 1, 30), logits(whole, 1, 30))


@pytest.mark.skipif(nested.why_not() is not None, reason="the kernels cannot be built here")
def test_numbers_of_experts_in_few_bits_are_in_the_memory_that_is_allowed(tmp_path: Path) -> None:
    """Each reader unpacks a matrix into whole bytes, and looks through them, before it repacks it."""
    few = few_bits_of(tmp_path, hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    with pytest.raises(RecipeError) as refused:
        model_of(few, 1, backend="cpu-nested")
    found = re.search(r"beside ([\d.]+) MB to read with", str(refused.value))
    assert found is not None and 1e6 * float(found[1]) > 3 * 2 * 512 * 256  # gate and up are the larger


@pytest.fixture(scope="module")
def few_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return few_bits_of(tmp_path_factory.mktemp("few_bits"))


def few_bits_of(root: Path, **shape: int) -> Path:
    random_model(tiny_config("mixtral", vocab_size=512, **shape)).save_pretrained(root / "dense")
    save_file({"input_ids": torch.randint(0, 512, (4, 32))}, root / "ids.safetensors")
    llmsparse.quantize(
        str(root / "dense"), bits=2.5, output=root / "few", calibration=str(root / "ids.safetensors"),
        calibration_samples=4, device="cpu",
    )  # fmt: skip
    return root / "few"


def unpacks_one_by_one(folder: Path) -> None:
    on_disk = on_disk_of(model_of(folder, "200KB", backend="auto"))
    assert on_disk is not None
    for stack in (stack for layer in on_disk.layers for stack in layer.stacks.values()):
        assert torch.equal(torch.stack(list(stack.unpacked())), stack.packed().unpack())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_that_are_unpacked_one_by_one_are_those_of_the_whole(family: str, folders: Folders) -> None:
    unpacks_one_by_one(folders(family)[1])


@pytest.mark.skipif(nested.why_not() is not None, reason="the kernels cannot be built here")
def test_so_are_experts_in_few_bits(few_bits: Path) -> None:
    unpacks_one_by_one(few_bits)


# what is read, and when


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


def threads() -> set[str]:
    """Those that read experts."""
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            found |= {task.name} if (task / "comm").read_text() == "experts\n" else set()
    return found


def gone(reading: set[str]) -> bool:
    until = time.monotonic() + 10
    while reading & threads() and time.monotonic() < until:
        time.sleep(0.01)
    return not reading & threads()


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


# what is done to such a model


def test_saved_it_is_the_folder_that_it_came_from(folders: Folders, tmp_path: Path) -> None:
    packed = folders("qwen3_moe")[1]
    model_of(packed).save_pretrained(tmp_path / "again")
    assert_same_tensors(packed, tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["quantization_config"] == json.loads((packed / "config.json").read_text())["quantization_config"]


def test_dequantized_it_is_the_dense_model(folders: Folders) -> None:
    pruned, packed = folders("gpt_oss")
    ours = model_of(packed).dequantize()
    assert torch.equal(logits(ours), logits(AutoModelForCausalLM.from_pretrained(pruned)))


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


FORKS = """
import os, sys
from pathlib import Path
import torch
from llmsparse.errors import RecipeError
from llmsparse.inference.leaving import on_disk_of
from llmsparse.inference.load import load_model
model = load_model(Path(sys.argv[1]), device=torch.device("cpu"), backend="cpu-bitmask", expert_memory="125KB")
memory = on_disk_of(model).memory
child = os.fork()
if child == 0:
    try:
        next(memory.arriving(0, [0]))
    except RecipeError as error:
        print(error, flush=True)
    sys.exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), next(memory.arriving(0, [0]))[0])
"""


def test_a_forked_process_is_refused_experts_in_one_line_and_ends(folders: Folders) -> None:
    asked = [sys.executable, "-c", FORKS, str(folders("mixtral")[1])]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=120)
    refused = "experts of this model are read by another process: load the model in this one, after the fork"
    assert done.stdout.splitlines() == [refused, "0 0"], done.stderr


def test_there_is_no_way_back_through_what_has_made_room_for_others(folders: Folders) -> None:
    ours = model_of(folders("mixtral")[1])
    (ids,) = windows((2, 9))
    loss = ours(ids, labels=ids, use_cache=False).loss
    with pytest.raises(RecipeError, match="have no gradients: load the model without expert_memory"):
        loss.backward()


def test_what_routers_say_ahead_is_not_in_what_the_model_gives(folders: Folders) -> None:
    packed, (ids,) = folders("mixtral")[1], windows((2, 9))
    with torch.no_grad():
        one, two = (
            model_of(packed, memory)(ids, labels=ids, output_router_logits=True, use_cache=False)
            for memory in (FEW, None)
        )
    assert len(one.router_logits) == len(two.router_logits) == 2 and torch.equal(one.aux_loss, two.aux_loss)


def test_a_copy_is_refused_in_one_line(folders: Folders) -> None:
    with pytest.raises(RecipeError, match="stays on disk: load the model without expert_memory"):
        copy.deepcopy(model_of(folders("mixtral")[1]))


def test_it_is_loaded_by_transformers_too(folders: Folders) -> None:
    packed = folders("mixtral")[1]
    config = llmsparse.SparseConfig("cpu-bitmask", expert_memory=FEW)
    ours = AutoModelForCausalLM.from_pretrained(packed, quantization_config=config)
    assert torch.equal(logits(ours), logits(model_of(packed, None)))
    assert ours.num_parameters() == model_of(packed, None).num_parameters()


def test_moving_and_editing_are_refused(folders: Folders) -> None:
    ours = model_of(folders("mixtral")[1])
    assert ours.to(torch.bfloat16) is ours
    with pytest.raises(
        RecipeError, match=r"mlp\.experts\.gate_up_proj stays on disk: load the model without expert_memory"
    ):
        ours.to(torch.float32)
    with pytest.raises(RecipeError, match="stays on disk"):
        ours.load_state_dict(ours.state_dict())


# what goes wrong


def test_a_damaged_expert_is_named_when_it_is_read(folders: Folders, tmp_path: Path) -> None:
    folder = shutil.copytree(folders("mixtral")[1], tmp_path / "damaged")
    on_disk = on_disk_of(model_of(folder))
    assert on_disk is not None
    other = (on_disk.layers[1].largest + 1) % 4  # the largest is read while the model is loaded
    spec = CheckpointReader(folder).spec("model.layers.1.mlp.experts.down_proj_mask")
    with spec.file.open("r+b") as file:
        file.seek(spec.begin + other * (spec.end - spec.begin) // 4)
        file.write(bytes([255]) * ((spec.end - spec.begin) // 4))
    ours = model_of(folder)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=rf"layers\.1\.mlp\.experts\.down_proj, expert {other}: .*disagree"):
            logits(ours, 3, 40)


def test_a_damaged_index_is_refused_when_the_model_is_loaded(folders: Folders, tmp_path: Path) -> None:
    folder = shutil.copytree(folders("mixtral")[1], tmp_path / "damaged")
    spec = CheckpointReader(folder).spec("model.layers.0.mlp.experts.down_proj_offsets")
    with spec.file.open("r+b") as file:
        file.seek(spec.begin + 8)
        file.write(b"\xff\xff\xff\x7f")
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.mlp\.experts\.down_proj: what says where rows begin is damaged"
    ):
        model_of(folder)


def test_a_file_that_is_cut_while_the_model_runs_is_one_line(folders: Folders, tmp_path: Path) -> None:
    folder = shutil.copytree(folders("mixtral")[1], tmp_path / "cut")
    ours = model_of(folder)
    for file in folder.glob("*.safetensors"):
        with file.open("r+b") as stream:
            stream.truncate(100)
    with pytest.raises(CheckpointError, match="or more when the model was loaded; put the whole file back"):
        logits(ours, 3, 40)


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        (
            "mixtral",
            {"memory": "1KB"},
            r"--expert-memory 1.00 kB: beside .* to read with it holds 0 experts of .*; give it",
        ),
        ("mixtral", {"memory": "much"}, "--expert-memory: got 'much', wanted a positive number of bytes"),
        (
            "mixtral",
            {"backend": "dense"},
            "--expert-memory with --backend dense, which unpacks experts: use auto or cpu-bitmask",
        ),
        (
            "mixtral",
            {"optimize": "speed"},
            "--expert-memory with --optimize speed, which keeps dense copies: use memory",
        ),
        ("llama", {}, "the model has no packed experts that could stay on disk"),
    ],
    ids=lambda value: next(iter(value), "dense model") if isinstance(value, dict) else None,
)
def test_what_cannot_be_is_refused(family: str, options: dict[str, Any], said: str, folders: Folders) -> None:
    with pytest.raises(RecipeError, match=said):
        model_of(folders(family)[1], **options)


def test_a_folder_that_is_not_packed_is_refused(folders: Folders) -> None:
    with pytest.raises(RecipeError, match=r"--expert-memory is for packed folders on a CPU, .* is not packed"):
        model_of(folders("mixtral")[0])


# the command, and the memory it takes


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


# processes, signals and systems that refuse


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


def test_files_that_cannot_be_opened_are_one_line(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk = on_disk_of(model_of(folders("mixtral")[1]))
    assert on_disk is not None
    stacks = on_disk.layers[0].stacks
    files = {spec.file: DirectFile(spec.file) for stack in stacks.values() for spec in stack.specs.values()}
    layer = StoredExperts("layer", stacks, files)
    opened = os.open

    def full(*arguments: Any, **options: Any) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(CheckpointError, match=r"safetensors: cannot be opened \(Too many open files\)$"):
        layer.lying(0)
    monkeypatch.setattr(os, "open", opened)
    assert len(layer.lying(0)) == len(stacks), "it is tried again"


def test_a_closed_file_is_not_opened_again(folders: Folders) -> None:
    file = DirectFile(next(folders("mixtral")[1].glob("*.safetensors")))
    with file.used():
        number, _ = file.descriptor()
        file.close()
        assert os.fstat(number).st_size, "somebody reads it"
        with pytest.raises(CheckpointError, match="is not read any more"):
            file.descriptor()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


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


def test_what_fails_while_it_is_loaded_leaves_no_file_open(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = folders("mixtral")[1]
    model_of(packed)
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(RecipeError):
        model_of(packed, 1)
    monkeypatch.setattr(library(), "readers_open", lambda *_: None)
    with pytest.raises(MachineError, match="starts no thread to read them; allow this user more threads"):
        model_of(packed)
    assert set(os.listdir("/proc/self/fd")) == before
