"""Only what lies in a mapped file is copied when a loaded model lets go of its files."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from torch import nn

from llmsparse.inference.mapped import let_go_of_files, lies_in, mapped_files

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what is mapped")


def test_what_is_mapped_is_copied_and_what_is_not_stays(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(torch.arange(2048.0).numpy().tobytes())
    with (tmp_path / "weights").open("rb") as file:
        area = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    model = nn.ParameterDict()
    for name, offset in (("first", 0), ("last", 4 * 2047)):
        model[name] = nn.Parameter(torch.frombuffer(area, dtype=torch.float32, offset=offset, count=1))
    model["own"] = nn.Parameter(torch.ones(4096))
    model.register_buffer("table", torch.ones(5))
    before = {name: tensor.data_ptr() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    let_go_of_files(model)
    after = {name: tensor.data_ptr() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    assert {name for name in before if before[name] != after[name]} == {"first", "last"}
    assert (model["first"].item(), model["last"].item()) == (0, 2047)
    files = mapped_files()
    assert files is not None and not any(lies_in(files, tensor) for tensor in model.values())


def test_both_ends_of_a_file_count() -> None:
    tensor = torch.ones(1)
    at = tensor.data_ptr()
    for files, inside in (([(at, at + 1)], True), ([(0, at)], False), ([(at + 1, at + 9)], False), ([], False)):
        assert lies_in(files, tensor) == inside
