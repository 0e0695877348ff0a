"""Where and how a run computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, MambaConfig

from llmsparse.errors import MachineError, RecipeError
from llmsparse.runs.device import choose_device, choose_dtype, full_float32, split_batches, window_length
from llmsparse.storage.checkpoint import CheckpointReader

CPU = torch.device("cpu")


def test_a_device_this_machine_lacks_is_an_error_of_the_machine() -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(MachineError, match=missing) as caught:
        choose_device(missing)
    assert caught.value.exit_code == 3
    assert choose_device("cpu") == CPU


def test_a_cpu_computes_in_float32_whatever_is_stored(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    reader = CheckpointReader(tiny_llama(tmp_path / "model", dtype=torch.bfloat16))
    assert choose_dtype("auto", CPU, reader) == torch.float32
    assert choose_dtype("auto", torch.device("cuda:0"), reader) == torch.bfloat16
    assert choose_dtype("float16", CPU, reader) == torch.float16


def test_an_unknown_dtype_is_refused_with_the_known_ones(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    reader = CheckpointReader(tiny_llama(tmp_path / "model"))
    with pytest.raises(RecipeError, match=r"--dtype 'fp16' is no dtype.* known: auto, float32, bfloat16, float16"):
        choose_dtype("fp16", CPU, reader)


def test_a_window_is_2048_tokens_or_the_models_maximum() -> None:
    assert window_length(LlamaConfig(max_position_embeddings=8192), None, "c4") == 2048
    assert window_length(LlamaConfig(max_position_embeddings=512), None, "c4") == 512
    assert window_length(MambaConfig(), None, "c4") == 2048
    assert window_length(LlamaConfig(max_position_embeddings=512), None, "tokens.safetensors") is None
    assert window_length(LlamaConfig(max_position_embeddings=512), 100, "c4") == 100
    with pytest.raises(RecipeError, match="--seq-len 513 is above the model's maximum of 512"):
        window_length(LlamaConfig(max_position_embeddings=512), 513, "c4")


def test_batches_hold_a_few_thousand_tokens_and_keep_every_window() -> None:
    ids = torch.arange(10 * 512).view(10, 512)
    assert [len(batch) for batch in split_batches(ids, None, CPU, 64)] == [2] * 5
    assert [len(batch) for batch in split_batches(ids, None, torch.device("cuda"), 64)] == [10]
    assert [len(batch) for batch in split_batches(ids, 3, CPU, 64)] == [3, 3, 3, 1]
    assert torch.equal(torch.cat(split_batches(ids, None, CPU, 64)), ids)
    assert split_batches(ids[:0], None, CPU, 64) == []


def test_batches_are_smaller_where_there_would_be_too_few() -> None:
    for windows in range(1, 40):
        batches = split_batches(torch.zeros(windows, 64), 16, CPU, 64, least=8)
        assert len(batches) >= min(8, windows) and sum(map(len, batches)) == windows
    assert [len(batch) for batch in split_batches(torch.zeros(127, 64), 16, CPU, 64, least=8)] == [16] * 7 + [15]


def test_batches_of_a_wide_model_are_smaller_on_a_cpu_but_never_below_512_tokens() -> None:
    ids = torch.arange(10 * 512).view(10, 512)
    assert [len(batch) for batch in split_batches(ids, None, CPU, 1024)] == [2] * 5
    assert [len(batch) for batch in split_batches(ids, None, CPU, 8192)] == [1] * 10


def test_experts_share_out_more_tokens_on_a_cpu() -> None:
    ids = torch.zeros(10, 512)
    assert [len(batch) for batch in split_batches(ids, None, CPU, 8192, routed=True)] == [4, 4, 2]
    assert [len(batch) for batch in split_batches(ids, 1, CPU, 8192, routed=True)] == [1] * 10


@pytest.mark.parametrize("chosen", ["ieee", "tf32", "none"])
def test_the_callers_precision_of_products_comes_back(chosen: str) -> None:
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = chosen
    try:
        with pytest.raises(KeyboardInterrupt), full_float32():
            assert products.fp32_precision == "ieee"
            raise KeyboardInterrupt
        assert products.fp32_precision == chosen
    finally:
        products.fp32_precision = before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_what_comes_from_other_processes_comes_to_the_gpu_that_this_one_computes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    before = torch.cuda.current_device()
    try:
        assert choose_device("cuda:1") == torch.device("cuda", torch.cuda.current_device()) == torch.device("cuda:1")
    finally:
        torch.cuda.set_device(before)
