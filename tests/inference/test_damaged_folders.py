"""A packed folder that is damaged in any way loads as what it says, or is refused in one line."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmsparse.errors import LlmsparseError
from llmsparse.inference.load import load_model

sys.path.insert(0, str(Path(__file__).parents[1] / "packing"))
from fuzz_packed import Fuzzer

pytestmark = pytest.mark.filterwarnings("ignore")
Folders = Callable[..., tuple[Path, Path]]


@pytest.mark.parametrize("rounds", [6, pytest.param(250, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_damaged_folder_is_refused_in_one_line_or_loads(
    family: str, rounds: int, folders: Folders, tmp_path: Path
) -> None:
    _, packed = folders(family)
    sound, damaged = tmp_path / "sound", tmp_path / "damaged"
    shutil.copytree(packed, sound, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {name: tensor for file in packed.glob("*.safetensors") for name, tensor in load_file(file).items()}
    save_file(tensors, sound / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(sound, damaged)
    fuzzer, found = Fuzzer(sound, damaged), Counter[str]()
    for number in range(rounds):
        fuzzer.damage(random.Random(f"{family}.{number}"))
        try:
            model = load_model(damaged, device=torch.device("cpu"))
            assert model(torch.ones(1, 3, dtype=torch.int64)).logits.shape[:2] == (1, 3)
            found["loads"] += 1
        except LlmsparseError as error:
            assert "\n" not in str(error)
            found["refused"] += 1
        except Exception as error:
            shutil.copytree(damaged, tmp_path / "failed")
            raise AssertionError(f"round {number}: {json.dumps(str(error)[:400])}") from error
    assert found["refused"] > rounds / 3
