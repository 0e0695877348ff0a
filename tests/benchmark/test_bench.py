"""What `bench` measures and says. No test here looks at how long anything took."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import save_random, tiny_config
from rich.console import Console

import llmsparse
from llmsparse.backends import BACKENDS, WeightSpec, table
from llmsparse.backends.choice import choose_backend
from llmsparse.backends.table import Measurement, device_kinds
from llmsparse.benchmark.mixtures import dense_source, mixtures
from llmsparse.benchmark.report import Benchmark, Measured, Speed, Speeds
from llmsparse.benchmark.run import bench, rows, time_weight
from llmsparse.benchmark.timing import MOST_COPIES, Spread, copies_for, side_by_side, spread
from llmsparse.benchmark.workloads import SHAPES, Workload, of_model, of_shapes
from llmsparse.cli.app import main
from llmsparse.errors import CheckpointError
from llmsparse.formats.nested import Nested
from llmsparse.inference.experts_interface import run_by
from llmsparse.inference.fused_experts import fusions
from llmsparse.inference.load import load_model
from llmsparse.runs.progress import Silent

CPU = torch.device("cpu")
QUICK = ("--seconds", "0", "--batch", "1,32", "--no-decode")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own table of backends, empty."""
    before = table.user_file()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiled = before.parent  # the compiled kernels stay in reach
    (tmp_path / "cache").mkdir()
    if compiled.is_dir():
        (tmp_path / "cache" / "llmsparse").mkdir()
        for entry in compiled.iterdir():
            if entry.name != before.name:
                (tmp_path / "cache" / "llmsparse" / entry.name).symlink_to(entry)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def pruned(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    tiny_llama(folder / "dense", hidden=64, ffn=128)
    run: dict[str, Any] = {"method": "magnitude", "sparsity": 0.7, "calibration": "builtin", "match_steps": 0}
    llmsparse.prune(
        model=str(folder / "dense"), output=str(folder / "pruned"), calibration_samples=2, seq_len=32, **run
    )
    return folder / "pruned"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    return main(["bench", *arguments]), *capsys.readouterr()


def test_every_backend_is_measured_or_refused_with_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--shapes", "96x64", *QUICK, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    (one,) = result["measured"]
    assert one["shape"] == [96, 64] and one["pattern"] == "unstructured" and abs(one["sparsity"] - 0.7) < 0.05
    for speeds in one["tables"]:
        timed = {speed["backend"] for speed in speeds["speeds"]}
        assert "dense" in timed
        assert timed | set(speeds["refused"]) | set(one["refused"]) == set(BACKENDS)
    assert one["refused"]["mma24"] == "needs an NVIDIA GPU; the device is cpu"
    for name, limit in one["limits"].items():
        assert (one["tables"][1]["refused"].get(name) is None) == (limit is None or limit >= 32)
    dense = next(speed for speed in one["tables"][0]["speeds"] if speed["backend"] == "dense")
    assert dense["speedup"] == 1 and not dense["streamed"]
    assert {"median", "p25", "p75", "least", "rounds"} == set(dense["seconds"]) and dense["seconds"]["rounds"] >= 7
    assert result["versions"]["torch"] == torch.__version__ and result["protocol"]["copy_gb_per_second"] > 0


def test_the_table_names_the_weight_and_what_was_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--shapes", "96x64", "--pattern", "2:4", *QUICK)
    assert code == 0 and "96×64 bfloat16, 2:4, sparsity 0.500; packed 0.562 × dense" in out
    assert "not mma24: needs an NVIDIA GPU" in out and "stays in the cache" in out


def test_a_model_is_measured_by_its_distinct_weights(pruned: Path, tmp_path: Path) -> None:
    workloads = {(w.packed.shape, w.packed.pattern): w.count for w in of_model(pruned, False, Silent())}
    assert workloads == {  # two blocks: q and o, k and v, gate and up, down
        ((64, 64), "unstructured"): 4,
        ((32, 64), "unstructured"): 4,
        ((128, 64), "unstructured"): 4,
        ((64, 128), "unstructured"): 2,
    }
    llmsparse.pack(str(pruned), str(tmp_path / "packed"))
    packed = {(w.packed.shape, w.packed.pattern): w.count for w in of_model(tmp_path / "packed", False, Silent())}
    assert packed == workloads


def test_the_shapes_of_a_named_model_are_those_of_its_config() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    sizes: dict[str, Any] = {"vocab_size": 8, "tie_word_embeddings": True}
    configs = {
        "llama-3-8b": LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, **sizes
        ),
        "qwen3-4b": Qwen3Config(
            hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
            head_dim=128, **sizes
        ),
    }  # fmt: skip
    for name, config in configs.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        counts: dict[tuple[int, ...], int] = {}
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                counts[tuple(module.weight.shape)] = counts.get(tuple(module.weight.shape), 0) + 1
        assert SHAPES[name] == counts


def test_synthetic_weights_have_the_sparsity_and_pattern_asked_for() -> None:
    (unstructured,) = of_shapes("128x256", 0.9, "unstructured", torch.float32)
    assert abs((unstructured.packed.unpack() == 0).float().mean() - 0.9) < 0.01
    (half,) = of_shapes("32x64", 0.5, "2:4", torch.bfloat16)
    assert ((half.packed.unpack().view(32, 16, 4) != 0).sum(-1) == 2).all()


def speeds(batch: int, **speedups: float) -> Speeds:
    """Of backends that take 1 / speedup seconds."""

    def speed(name: str, gain: float) -> Speed:
        return Speed(name.replace("_", "-"), Spread(1 / gain, 1 / gain, 1 / gain, 1 / gain, 9), gain, 1, 1, True)

    return Speeds(batch, [speed(*one) for one in speedups.items()], {})


def found(*tables: Speeds) -> Benchmark:
    limits = {"dense": None, "dense-lowmem": None, "cpu-bitmask": 4}
    one = Measured("w", 1, (64, 32), "float32", "unstructured", 0.7, 100, 40, {}, limits, list(tables))
    protocol = {"device": "d", "threads": 1, "threads_bound": False, "timed": "clock", "copy_gb_per_second": 1.0}
    return Benchmark("m", protocol, {"torch": "2"}, [one])


def test_the_table_says_where_there_is_no_gain() -> None:
    def shown(result: Benchmark) -> str:
        console = Console(width=200)
        with console.capture() as drawn:
            console.print(result.table())
        return drawn.get()

    assert "no gain here: dense is as fast" in shown(found(speeds(1, dense=1, cpu_bitmask=1.04)))
    assert "no gain here" not in shown(found(speeds(1, dense=1, cpu_bitmask=1.06)))


def spec(sparsity: float = 0.7, shape: tuple[int, int] = (64, 32)) -> WeightSpec:
    return WeightSpec(shape, "unstructured", round(shape[0] * shape[1] * (1 - sparsity)), torch.float32, CPU)


def test_what_is_faster_is_saved_up_to_the_batch_where_it_no_longer_is() -> None:
    result = found(
        speeds(1, dense=1, dense_lowmem=1.5, cpu_bitmask=1.4),
        speeds(2, dense=1, dense_lowmem=1.2, cpu_bitmask=1.01),
        speeds(4, dense=1, dense_lowmem=0.9, cpu_bitmask=2.0),
    )
    faster, lost = rows(result, CPU)
    assert [(row.backend, row.tokens, row.speedup) for row in faster] == [("cpu-bitmask", 1, 1.4)]
    assert [row.backend for row in lost] == ["dense-lowmem"]  # it would be given any number of tokens
    (row,), kinds = faster, device_kinds(CPU)
    assert row.device == kinds[0] and row.covers(spec(), kinds) and row.covers(spec(0.9), kinds)
    assert not row.covers(spec(0.6), kinds) and not row.covers(spec(shape=(64, 64)), kinds)


def test_auto_reads_what_was_saved_and_forgets_what_was_lost() -> None:
    assert choose_backend("w", spec(), 0).backend == "dense"
    faster, lost = rows(found(speeds(1, dense=1, dense_lowmem=1.5)), CPU)
    table.save(faster, lost)
    choice = choose_backend("w", spec(), 0)
    assert choice.backend == "dense-lowmem" and choice.because.startswith("1.5 × dense: ")
    table.save(*rows(found(speeds(1, dense=1, dense_lowmem=0.8)), CPU))
    assert choose_backend("w", spec(), 0).backend == "dense"


def test_save_writes_the_table_that_auto_reads(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    other = Measurement("mma24", "GPU", "bfloat16", "2:4", (0.5, 0.5), (1, 2), (1, 2), 8, 2.0, "before")
    table.save([other])
    code, out, _ = run(capsys, "--shapes", "96x64", *QUICK, "--save", "--json")
    result = json.loads(out)
    assert code == 0 and result["saved"] == str(table.user_file()) and table.user_file().is_relative_to(cache)
    saved = table.read(table.user_file())
    assert other in saved and len(saved) == result["saved_rows"] + 1


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        ([], 2, "give one of the two"),
        (["m", "--shapes", "8x8"], 2, "give one of the two"),
        (["--shapes", "llama-3-8"], 2, "did you mean 'llama-3-8b'?"),
        (["--shapes", "8x6", "--pattern", "2:4"], 2, "not a multiple of 4"),
        (["--shapes", "8x8", "--batch", "1,x"], 2, "--batch '1,x'"),
        (["--shapes", "8x8", "--batch", "0"], 2, "--batch 0"),
        (["--shapes", "8x8", "--backend", "mma42"], 2, "did you mean 'mma24'?"),
        (["--shapes", "8x8", "--dtype", "int8"], 2, "--dtype 'int8'"),
        (["--shapes", "8x8", "--backend", "mma24"], 3, "mma24 cannot run here: needs an NVIDIA GPU"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, complaint: str
) -> None:
    given, out, err = run(capsys, *arguments)
    assert (given, out) == (code, "") and complaint in err and err.count("\n") == 1


def test_a_dense_model_is_refused(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="prune it first"):
        bench(str(tiny_llama(tmp_path / "dense")))


def test_candidates_take_turns_and_each_rotates_its_copies() -> None:
    order: list[str] = []

    def call(name: str) -> Callable[[], None]:
        return lambda: order.append(name)

    taken = side_by_side({"a": [call("a0"), call("a1")], "b": [call("b")]}, CPU, 0)
    assert order[:6] == ["a0", "b", "a1", "b", "a0", "b"]
    assert taken["a"].rounds == taken["b"].rounds == len(order) // 2 - 2


def test_quartiles_of_five_times() -> None:
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3, 2, 4, 1, 5)


def test_copies_are_larger_together_than_the_cache() -> None:
    assert copies_for(10, 100) == 40 and copies_for(10**6, 100) == 2 and copies_for(1, 10**6) == MOST_COPIES


@pytest.mark.slow
def test_a_mixture_is_decoded_by_each_implementation(mixture: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(mixture, tmp_path / "moe")
    shutil.copytree(tokenizer_folder, tmp_path / "moe", dirs_exist_ok=True)
    folder = save_random(tiny_config("glm4_moe", vocab_size=384), tmp_path / "moe")
    result = bench(str(folder), batches=[1], seconds=0)
    assert result.not_decoded is None
    assert [one.run for one in result.decodings] == ["grouped_mm", "llmsparse"]


@pytest.mark.slow
def test_a_model_is_decoded_dense_beside_packed(capsys: pytest.CaptureFixture[str], pruned: Path) -> None:
    code, out, _ = run(capsys, str(pruned), "--backend", "dense-lowmem", "--seconds", "0", "--batch", "1", "--json")
    result = json.loads(out)
    assert code == 0 and result["not_decoded"] is None
    assert [one["run"] for one in result["decodings"]] == ["dense", "dense-lowmem"]
    assert all(one["tokens_per_second"] > 0 and one["memory_bytes"] > 0 for one in result["decodings"])


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tiny_config("glm4_moe"), tmp_path_factory.mktemp("mixture"))


def test_a_mixture_is_measured_beside_a_dense_ffn(mixture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, str(mixture), *QUICK, "--json")
    assert code == 0
    result = json.loads(out)
    (one,) = result["mixtures"]
    assert result["measured"] == [] and one["name"] == "model.layers.1.mlp"
    assert (one["experts"], one["inner"], one["width"], one["neurons"]) == (4, 24, 32, 5 * 24)
    assert one["dense_bytes"] == 3 * 5 * 24 * 32 * 4
    assert one["touched"]["1"] == 2 and 2 < one["touched"]["32"] <= 4
    few, many = one["tables"]
    assert {speed["backend"] for speed in few["speeds"]} == {"dense", "grouped_mm", "eager", "llmsparse"}
    assert {speed["backend"] for speed in many["speeds"]} == {"dense", "grouped_mm", "eager"}
    assert many["refused"] == {"llmsparse": "for up to 16 at once"}
    assert all(isinstance(speeds["gain"], bool) for speeds in one["tables"])


def test_the_table_of_a_mixture_says_what_a_batch_chose(mixture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, str(mixture), *QUICK)
    out = " ".join(out.split())  # whatever the width
    assert code == 0 and "FFN of 120 neurons × 32, float32, 4 routed experts of 24; chosen by a batch: 2.0 for 1" in out
    assert "grouped_mm" in out and "llmsparse for up to 16 at once" in out


def test_what_a_mixture_reads_is_what_was_chosen_and_what_always_runs(mixture: Path) -> None:
    (one,) = mixtures(load_model(mixture, device=CPU, experts="grouped_mm"), 4)
    assert one.expert_bytes == 3 * 24 * 32 * 4
    assert one.shared_bytes == 3 * 24 * 32 * 4 + 4 * 32 * 4  # the shared expert, and the router
    assert one.inputs.shape == (16 * 4, 32)


def test_candidates_share_weights_and_differ_in_what_runs_them(mixture: Path) -> None:
    (one,) = mixtures(load_model(mixture, device=CPU, experts="grouped_mm"), 4)
    x = one.inputs[:3].unsqueeze(1)
    twins = {name: run_by(one.block, name) for name in ("grouped_mm", "eager", "llmsparse")}
    for name, twin in twins.items():
        assert [id(p) for p in twin.parameters()] == [id(p) for p in one.block.parameters()]
        assert {fusion.runs.split()[0] for fusion in fusions(twin)} == {name}
        with torch.inference_mode():
            torch.testing.assert_close(twin(x), one.block(x))


def test_the_dense_model_of_a_factorized_one_is_found(tmp_path: Path) -> None:
    assert dense_source(tmp_path) is None
    report = tmp_path / "llmsparse_report.json"
    for model, container, found in (
        ("builtin", "mixtral", "builtin"),
        (str(tmp_path / "gone"), "mixtral", None),
        ("owner/name", "mixtral", None),
        ("builtin", None, None),  # pruned, not factorized
    ):
        report.write_text(json.dumps({"model": model} | ({"container": container} if container else {})))
        assert dense_source(tmp_path) == found


class Doubled(type(BACKENDS["dense"])):
    """A backend whose products are twice what they should be."""

    name = "doubled"

    def run(self, prepared: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return 2 * super().run(prepared, x, bias)


class Unsure(type(BACKENDS["dense"])):
    """One that has been tried on this device, and erred."""

    name = "unsure"

    def wrong(self, device: torch.device) -> str | None:
        return f"unsure is wrong on {device}"


class Broken(type(BACKENDS["dense"])):
    """One that its compiler refuses."""

    name = "broken"

    def prepare(self, packed: Any, spec: WeightSpec) -> Any:
        raise RuntimeError("PTX\nassembly aborted")


class Late(type(BACKENDS["dense"])):
    """One that is right for a token, and for more of them is not."""

    name = "late"

    def run(self, prepared: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = super().run(prepared, x, bias)
        return y if len(y) < 2 else y.flip(0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_is_wrong_or_fails_is_refused_and_neither_timed_nor_saved(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (Doubled, Unsure, Broken, Late):
        monkeypatch.setitem(BACKENDS, kind.name, kind())
    result = bench(shapes="64x128", dtype=dtype, batches=(1, 4), seconds=0, save=True)
    (one,) = result.measured
    assert one.refused["doubled"].startswith("wrong: off by 1.0e+00 for 1 tokens")
    assert one.refused["late"].startswith("wrong: off by ") and "for 4 tokens" in one.refused["late"]
    assert one.refused["unsure"] == "unsure is wrong on cpu"
    assert one.refused["broken"] == "fails: RuntimeError: PTX assembly aborted"
    timed = {speed.backend for speeds in one.tables for speed in speeds.speeds}
    assert {"dense", "dense-lowmem"} <= timed and not timed & {"doubled", "unsure", "broken", "late"}
    assert not [row for row in table.read(table.user_file()) if row.backend in ("doubled", "unsure", "broken", "late")]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_product_on_another_gpu_than_the_current_one_takes_time() -> None:
    device = torch.device("cuda:1")
    a = torch.randn(4096, 4096, device=device)
    taken = side_by_side({"once": [lambda: a @ a], "twice": [lambda: (a @ a, a @ a)]}, device, 0.1)
    assert taken["once"].median > 1e-5  # an empty graph takes a microsecond


def test_a_kernel_that_rounds_its_input_is_timed_but_not_saved_for_auto() -> None:
    cpu, q = torch.device("cpu"), torch.randn(8, 64).round().to(torch.int8)
    packed = Nested.encode(q, torch.ones(8, 1).to(torch.bfloat16), torch.bfloat16)
    names = ["dense", "cpu-nested", "cpu-nested-int8"]
    one = time_weight(Workload("weight", 1, packed), names, [1], cpu, cache=1, bandwidth=1.0, seconds=0.01)
    assert {speed.backend for speed in one.tables[0].speeds} == set(names)
    about: dict[str, Any] = {"device": "cpu", "threads": 1}
    told = {row.backend for some in rows(Benchmark("weight", about, {}, [one], []), cpu) for row in some}
    assert told == {"cpu-nested"}
