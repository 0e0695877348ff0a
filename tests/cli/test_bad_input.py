"""Whatever a user can get wrong: one line that says so, the right exit code, nothing under the final name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmsparse.cli.app import main

Spoil = Callable[[Path], None]
PRUNE = [
    "--sparsity",
    "0.5",
    "--method",
    "wanda",
    "--match-steps",
    "0",
    "--seq-len",
    "32",
    "--calibration-samples",
    "4",
]


@pytest.fixture(scope="module")
def pristine(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("pristine") / "model", shards=2)


@pytest.fixture
def model(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil, in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `prune` on ./model into ./out; check the code, the single line and that nothing got the final name."""

    def run(*arguments: str, code: int = 2, model: str = "model", calibration: str = "builtin") -> str:
        capsys.readouterr()
        got = main(["prune", model, "-o", "out", "--calibration", calibration, *PRUNE, *arguments])
        out, err = capsys.readouterr()
        assert got == code, err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert out == "" and not Path("out").exists()
        return err

    return run


def config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def first_shard(folder: Path) -> Path:
    return folder / "model-00001-of-00002.safetensors"


def truncate(folder: Path) -> None:
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-1000])


def corrupt(folder: Path) -> None:
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:8] + b"garbage!" + shard.read_bytes()[16:])


def empty_bin(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def index_names(folder: Path, key: str, shard: str) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][key] = shard
    file.write_text(json.dumps(index))


def nan(folder: Path) -> None:
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if "model.layers.1.mlp.up_proj.weight" in tensors:
            tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
            save_file(tensors, shard, metadata={"format": "pt"})


def inf_outside(folder: Path, name: str) -> None:
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name].view(-1)[3] = float("inf")
            save_file(tensors, shard, metadata={"format": "pt"})


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def stored_as(folder: Path, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if key in tensors:
            tensors[key] = change(tensors[key])
            save_file(tensors, shard, metadata={"format": "pt"})


K_PROJ = "model.layers.0.self_attn.k_proj.weight"
SPOILT: dict[str, tuple[Spoil, str]] = {
    "truncated shard": (truncate, "model-00001-of-00002.safetensors"),
    "corrupt header": (corrupt, "model-00001-of-00002.safetensors"),
    "pickled weights that hold nothing": (empty_bin, "21 of the tensors that config.json asks for are not on disk"),
    "missing shard": (lambda m: first_shard(m).unlink(), "model-00001-of-00002.safetensors"),
    "missing tensor": (lambda m: index_names(m, "model.x", first_shard(m).name), "model.x"),
    "nan": (nan, "model.layers.1.mlp.up_proj in model holds NaN or Inf"),
    "inf in a norm": (
        lambda m: inf_outside(m, "model.layers.1.input_layernorm.weight"),
        "model.layers.1.input_layernorm in model holds NaN or Inf",
    ),
    "inf in the embedding": (
        lambda m: inf_outside(m, "model.embed_tokens.weight"),
        "model.embed_tokens in model holds NaN or Inf",
    ),
    "no config": (lambda m: (m / "config.json").unlink(), "config.json"),
    "config without architecture": (lambda m: config(m, architectures=None), "architectures"),
    "config of another width": (lambda m: config(m, intermediate_size=80), "mlp"),
    "encoder-decoder": (lambda m: config(m, model_type="t5", architectures=["T5ForConditionalGeneration"]), "t5"),
    "quantized": (lambda m: config(m, quantization_config={"quant_method": "gptq"}), "already quantized (gptq)"),
    "quantized by a list": (lambda m: config(m, quantization_config={"quant_method": []}), "already quantized ([])"),
    "quantized inside by a table": (
        lambda m: config(m, text_config={"quantization_config": {"quant_method": {}}}),
        "already quantized ({})",
    ),
    "unknown architecture": (lambda m: config(m, model_type="llamma"), "llamma"),
    "remote code": (
        lambda m: config(m, model_type="mine", auto_map={"AutoConfig": "mine.MyConfig"}),
        "--trust-remote-code",
    ),
    "an unknown activation": (
        lambda m: config(m, hidden_act="nope"),
        "config.json: transformers cannot build this model",
    ),
    "unknown positions": (lambda m: config(m, rope_parameters={"rope_type": "nope"}), "KeyError: 'nope'"),
    "no heads": (lambda m: config(m, num_attention_heads=0), "config.json: transformers cannot read it"),
    "a negative width": (lambda m: config(m, hidden_size=-32), "negative dimension"),
    "an attention that is not installed": (
        lambda m: config(m, _attn_implementation="flash_attention_2"),
        "config.json: transformers cannot build this model: FlashAttention2",
    ),
    "more blocks than tensors": (
        lambda m: config(m, num_hidden_layers=10**7),
        "config.json asks for 10,000,000 blocks (num_hidden_layers), and there are 20 tensors",
    ),
    "a matrix stored flat": (lambda m: stored_as(m, K_PROJ, torch.flatten), f"tensor '{K_PROJ}' has shape [512]"),
    "a matrix stored transposed": (
        lambda m: stored_as(m, K_PROJ, lambda w: w.T.contiguous()),
        f"tensor '{K_PROJ}' has shape [32, 16]",
    ),
    "a matrix stored in integers": (
        lambda m: stored_as(m, K_PROJ, lambda w: w.view(torch.int32)),
        f"{K_PROJ} is stored in int32, and config.json does not say what that stands for",
    ),
    "no tokenizer": (no_tokenizer, "no tokenizer"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_model_is_refused(case: str, model: Path, fails: Callable[..., str]) -> None:
    spoil, wanted = SPOILT[case]
    spoil(model)
    assert wanted in fails()


@pytest.mark.parametrize("case", [name for name in SPOILT if name.startswith("a matrix") or "blocks" in name])
def test_a_spoilt_model_is_not_run(case: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, wanted = SPOILT[case]
    spoil(model)
    for command in (["generate", "model", "--prompt", "def"], ["eval", "model", "--text", "builtin", "--windows", "1"]):
        assert main(command) == 2
        (error,) = (line for line in capsys.readouterr().err.splitlines() if line and "Loading weights" not in line)
        assert error.startswith("error: ") and wanted in error


@pytest.mark.parametrize("name", ["./nothing", "no/such/model"])
def test_a_model_that_is_not_there(name: str, model: Path, fails: Callable[..., str]) -> None:
    assert name in fails(model=name)


def test_a_hub_id_while_offline(model: Path, fails: Callable[..., str]) -> None:
    assert "meta-llama/Llama-3.2-1B" in fails(model="meta-llama/Llama-3.2-1B", code=3)


FLAGS: dict[str, tuple[list[str], str]] = {
    "sparsity of 70": (["--sparsity", "70"], "70%"),
    "sparsity of 1": (["--sparsity", "1.0"], "below 1"),
    "negative sparsity": (["--sparsity", "-0.1"], "-0.1"),
    "sparsity in words": (["--sparsity", "abc"], "abc"),
    "more kept than there are": (["--pattern", "4:2"], "4:2"),
    "none kept": (["--pattern", "0:4"], "0:4"),
    "two sparsities": (["--sparsity", "0.7", "--pattern", "2:4"], "2:4"),
    "a pattern that does not divide": (["--pattern", "3:6"], "self_attn.q_proj"),
    "unknown method": (["--method", "wandaa"], "did you mean 'wanda'"),
    "unknown key": (["sparsty=0.5"], "did you mean 'sparsity'"),
    "unknown flag": (["--sparsty", "0.5"], "--sparsty"),
    "an include that matches nothing": (["--include", "lm_hed"], "lm_hed"),
    "an exclude that matches nothing": (["--exclude", "*.qq"], "*.qq"),
    "a window beyond the model": (["--seq-len", "129"], "maximum of 128"),
    "no such device": (["--device", "tpu"], "tpu"),
    "bad shard size": (["--max-shard-size", "much"], "much"),
    "nothing to resume": (["--resume"], "nothing to resume"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_a_wrong_flag_is_refused(case: str, model: Path, fails: Callable[..., str]) -> None:
    arguments, wanted = FLAGS[case]
    if "--pattern" in arguments and "--sparsity" not in arguments:
        arguments = [*arguments, "sparsity=null"]
    assert wanted in fails(*arguments)


def test_a_rule_that_matches_nothing(model: Path, fails: Callable[..., str]) -> None:
    Path("r.yaml").write_text("rules:\n  - {match: '*.dwn_proj', sparsity: 0.6}\n")
    assert "*.dwn_proj" in fails("--recipe", "r.yaml")


def test_an_unknown_recipe_key_is_named_with_file_and_line(model: Path, fails: Callable[..., str]) -> None:
    Path("r.yaml").write_text("method: wanda\nsparsty: 0.6\n")
    error = fails("--recipe", "r.yaml")
    assert "r.yaml:2" in error and "did you mean 'sparsity'" in error


LAUGHS = "\n".join(
    ["a: &a [x]", *(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True))]
)


@pytest.mark.parametrize("keys", ["rules: &a [*a]\n", "rules: &a [1]\nonly: *a\n", "only: *q_proj\n", f"{LAUGHS}\n"])
def test_a_recipe_with_aliases(keys: str, model: Path, fails: Callable[..., str]) -> None:
    Path("r.yaml").write_text(f"sparsity: 0.5\n{keys}")
    line = 2 if "&a [*a]" in keys or "q_proj" in keys else 3
    assert f"r.yaml:{line}: holds an alias (*name)" in fails("--recipe", "r.yaml")
    if "q_proj" not in keys:
        assert "holds an alias" in fails("rules=&a [*a]")


@pytest.mark.parametrize(
    "keys", ["output: !!binary aGVsbG8=\n", "seed: !!python/object/apply:os.system [id]\n", "only: !x\n"]
)
def test_a_recipe_with_tags(keys: str, model: Path, fails: Callable[..., str]) -> None:
    Path("r.yaml").write_text(f"sparsity: 0.5\n{keys}")
    assert "r.yaml:2: holds a tag (!" in fails("--recipe", "r.yaml")
    assert "holds a tag (!" in fails(keys.strip().replace(": ", "=", 1))


def test_a_file_too_large_to_be_a_recipe_is_not_read(model: Path, fails: Callable[..., str]) -> None:
    with Path("r.yaml").open("wb") as file:
        file.truncate(10**12)
    assert "r.yaml: is no recipe: 1.00 TB, wanted 1.05 MB at most" in fails("--recipe", "r.yaml")


@pytest.mark.parametrize("name", ["a\\0b", "\\ud800"])
@pytest.mark.parametrize("key", ["output", "model", "calibration"])
def test_a_name_that_no_file_can_have(key: str, name: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"model": "model", "output": "out", "calibration": "builtin"} | {key: f'"{name}"'}
    Path("r.yaml").write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    assert main(["prune", "--recipe", "r.yaml", *PRUNE]) == 2
    error = capsys.readouterr().err
    assert "which no name may be here" in error and error.count("\n") == 1


@pytest.mark.parametrize("verb", ["prune", "pack"])
def test_an_output_that_is_a_link_to_itself(verb: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").symlink_to("out")
    assert main([verb, "model", "-o", "out", *(["--sparsity", "0.5"] if verb == "prune" else [])]) == 2
    error = capsys.readouterr().err
    assert "a symbolic link that leads back to itself" in error and error.count("\n") == 1


def test_a_name_that_is_not_utf_8_is_refused_before_anything_is_computed(
    model: Path, fails: Callable[..., str]
) -> None:
    for given in ({"model": "caf\udce9"}, {"calibration": "caf\udce9.txt"}):
        assert "not UTF-8" in fails(**given)
    assert "not UTF-8" in fails("-o", "caf\udce9")


def test_an_output_of_no_name(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A variable of the shell that is not set is not the current folder."""
    for command in (["prune", "model", "-o", "", *PRUNE], ["pack", "model", "-o", ""], ["unpack", "model", "-o", ""]):
        assert main(command) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_a_number_of_more_digits_than_python_reads(model: Path, fails: Callable[..., str]) -> None:
    Path("r.yaml").write_text(f"sparsity: 0.5\nseed: {'9' * 5000}\n")
    assert "r.yaml:2: seed: got" in fails("--recipe", "r.yaml")


@pytest.mark.parametrize("where", ["calibration", "model"])
@pytest.mark.parametrize("name", ["~nouser/x.txt", "~nouser/x.safetensors"])
def test_the_home_of_nobody(where: str, name: str, model: Path, fails: Callable[..., str]) -> None:
    assert "no such user" in fails(**{where: name})
    assert "no such user" in fails("-o", name)


def test_names_with_brackets_are_shown_as_they_are(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = ("--calibration", "builtin", *PRUNE)
    for command in (
        ["prune", "model", "-o", "x[/v2]", *measured, "--dry-run"],
        ["prune", "model", "-o", "x[/v2]", *measured],
        ["eval", "x[/v2]", "--text", "builtin", "--windows", "1", "--seq-len", "8"],
        ["eval", "x[/v2]", "--text", "builtin", "--windows", "1", "--seq-len", "8", "--baseline", "x[/v2]"],
        ["pack", "x[/v2]", "-o", "p[/v2]"],
        ["unpack", "p[/v2]", "-o", "u[/v2]"],
    ):
        assert main(command) == 0
        assert "[/v2]" in capsys.readouterr().out


CALIBRATIONS: dict[str, tuple[bytes, str]] = {
    "empty.txt": (b"", "empty"),
    "binary.txt": (bytes(range(256)) * 50, "binary.txt"),
    "short.txt": (b"too short", "shorter than one window"),
    "broken.safetensors": (b"\x00" * 100, "broken.safetensors"),
}


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_a_calibration_file_that_cannot_be_used(name: str, model: Path, fails: Callable[..., str]) -> None:
    contents, wanted = CALIBRATIONS[name]
    Path(name).write_bytes(contents)
    assert wanted in fails(calibration=name)


def test_c4_while_offline_names_two_ways_out(model: Path, fails: Callable[..., str]) -> None:
    error = fails(calibration="c4", code=3)
    assert "--calibration builtin" in error and "--calibration FILE" in error


def test_an_output_that_is_there_is_kept(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/precious.txt").write_text("mine")
    for flag in ([], ["--overwrite"]):
        assert main(["prune", "model", "-o", "out", "--calibration", "builtin", *PRUNE, *flag]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in Path("out").iterdir()] == ["precious.txt"]


def test_an_output_inside_the_model_folder(model: Path, fails: Callable[..., str]) -> None:
    assert "model" in fails("-o", "model/pruned")
    assert sorted(path.name for path in model.iterdir()) == sorted(
        path.name for path in model.iterdir() if path.name != "pruned"
    )


def test_overwrite_replaces_a_checkpoint(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prune", "model", "-o", "out", "--calibration", "builtin", *PRUNE]
    assert main(command) == 0
    before = (Path("out") / "model.safetensors").read_bytes()
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--sparsity", "0.6"]) == 0
    assert (Path("out") / "model.safetensors").read_bytes() != before
