"""What goes wrong with experts on disk, or cannot be: said in one line, and nobody waits for ever."""

from __future__ import annotations

import copy
import errno
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import windows
from stored_mixtures import logits, model_of

from llmsparse.backends.cpu import why_not
from llmsparse.backends.cpu.library import library
from llmsparse.errors import CheckpointError, MachineError, RecipeError
from llmsparse.inference.leaving import on_disk_of
from llmsparse.inference.stored_experts import StoredExperts
from llmsparse.storage.checkpoint import CheckpointReader
from llmsparse.storage.direct import DirectFile

Folders = Callable[..., tuple[Path, Path]]

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason="the kernels cannot be built here"),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`"),
]


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


def test_a_copy_is_refused_in_one_line(folders: Folders) -> None:
    with pytest.raises(RecipeError, match="stays on disk: load the model without expert_memory"):
        copy.deepcopy(model_of(folders("mixtral")[1]))


def test_moving_and_editing_are_refused(folders: Folders) -> None:
    ours = model_of(folders("mixtral")[1])
    assert ours.to(torch.bfloat16) is ours
    with pytest.raises(
        RecipeError, match=r"mlp\.experts\.gate_up_proj stays on disk: load the model without expert_memory"
    ):
        ours.to(torch.float32)
    with pytest.raises(RecipeError, match="stays on disk"):
        ours.load_state_dict(ours.state_dict())


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
