"""The pipeline and the command line on tiny checkpoints: what comes out, byte by byte, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear, silu

import llmsparse
from llmsparse.cli.app import main
from llmsparse.errors import CheckpointError, MachineError, NumericalError, RecipeError
from llmsparse.factorization.plan import make_plan
from llmsparse.factorization.recipe import FactorizeRecipe
from llmsparse.runs import recipe_file
from llmsparse.runs.progress import Silent
from llmsparse.storage.checkpoint import CheckpointReader

RUN: dict[str, Any] = {
    "calibration_samples": 12,
    "seq_len": 32,
    "router_steps": 20,
    "device": "cpu",
    "experts": 4,
    "shared": 1,
    "active": 1,
}


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny", layers=3)


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    file = tmp_path_factory.mktemp("text") / "notes.txt"
    file.write_text(text[:40_000], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def made(model: Path, notes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, llmsparse.FactorizeReport]:
    out = tmp_path_factory.mktemp("made") / "out"
    return out, llmsparse.factorize(model=str(model), output=str(out), calibration=str(notes), **RUN)


def files(folder: Path) -> dict[str, bytes]:
    """What the byte-identity promise covers: everything but timings and the name of the folder."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    report = json.loads(found.pop("llmsparse_report.json"))
    for name in ("timings", "output"):
        report.pop(name)
    report["recipe"].pop("output")
    found.pop("llmsparse_recipe.yaml")
    return {**found, "report": json.dumps(report).encode()}


def test_plain_transformers_loads_the_result_and_gets_the_reported_perplexity(
    made: tuple[Path, llmsparse.FactorizeReport], notes: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, report = made
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.tensor(AutoTokenizer.from_pretrained(out)(notes.read_text())["input_ids"])
    rows = ids[: len(ids) // 32 * 32].view(-1, 32)
    with torch.no_grad():
        expected = torch.stack([loaded(row[None], labels=row[None]).loss for row in rows]).mean().exp().item()
    assert llmsparse.perplexity(str(out), str(notes), seq_len=32, device="cpu").perplexity == pytest.approx(
        expected, rel=1e-4
    )
    assert report.perplexity is not None and report.perplexity["before"] > 1


def test_written_experts_compute_what_the_report_measured(
    model: Path, made: tuple[Path, llmsparse.FactorizeReport], notes: Path
) -> None:
    """The first block's mixture, computed by transformers from the files, against the dense FFN on the same input."""
    from transformers import AutoModelForCausalLM

    out, report = made
    dense, loaded = (AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp for folder in (model, out))
    plan = make_plan(
        FactorizeRecipe(model=str(model), output=str(out.with_name("other")), calibration=str(notes), **RUN)
    )
    from llmsparse.factorization.block import ffn_inputs

    block = plan.model.block(0)
    x = torch.cat(ffn_inputs(block, plan.model.embed(plan.held_out)))
    with torch.no_grad():
        y, approximate = dense(x), loaded(x[None])[0]
    captured = 1 - (y - approximate).square().sum() / y.square().sum()
    assert report.blocks[0].measured_on == "held-out"
    assert report.blocks[0].routing.captured == pytest.approx(float(captured), abs=1e-3)


def test_scale_and_refit_pay_on_held_out_text(model: Path, notes: Path, tmp_path: Path) -> None:
    plain = llmsparse.factorize(
        model=str(model),
        output=str(tmp_path / "out"),
        calibration=str(notes),
        **RUN | {"refit": False, "scale": "none", "calibration_samples": 128},
    )
    fitted = llmsparse.factorize(
        model=str(model), output=str(tmp_path / "fitted"), calibration=str(notes), **RUN | {"calibration_samples": 128}
    )
    assert fitted.mean("captured") > plain.mean("captured") + 0.02
    assert all(block.routing.captured == pytest.approx(block.routing.unfitted) for block in plain.blocks)


def test_the_report_and_the_card_say_what_was_done(made: tuple[Path, llmsparse.FactorizeReport]) -> None:
    out, report = made
    stored = json.loads((out / "llmsparse_report.json").read_text())
    assert stored["layout"] == {
        "experts": 4, "shared": 1, "routed": 3, "active": 1, "width": 16, "neurons": 64, "active_share": 0.5,
    }  # fmt: skip
    assert [block["name"] for block in stored["blocks"]] == [f"model.layers.{index}" for index in range(3)]
    for block in stored["blocks"]:
        assert block["unfitted"] <= block["oracle"] <= 1 and 0 <= block["entropy"] <= 1 and len(block["load"]) == 3
    card = (out / "README.md").read_text()
    assert "greedy oracle" in card and "perplexity" in card and "model.layers.2" in card
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "tiny"
    again = FactorizeRecipe.load(out / "llmsparse_recipe.yaml")
    assert again.resolved() == report.recipe


def test_same_seed_same_bytes(
    model: Path, made: tuple[Path, llmsparse.FactorizeReport], notes: Path, tmp_path: Path
) -> None:
    llmsparse.factorize(model=str(model), output=str(tmp_path / "out"), calibration=str(notes), **RUN)
    assert files(tmp_path / "out") == files(made[0])


class Failing(Silent):
    """A bit of the first block flips, and then comes Ctrl-C, as the third begins."""

    def __init__(self, partial: Path) -> None:
        self.partial = partial

    def block(self, name: str) -> None:
        if name == "model.layers.2":
            spec = CheckpointReader(self.partial).spec("model.layers.0.mlp.gate.weight")
            with spec.file.open("r+b") as stream:
                stream.seek(spec.begin)
                byte = stream.read(1)[0]
                stream.seek(spec.begin)
                stream.write(bytes([byte ^ 1]))
            raise KeyboardInterrupt


def test_a_finished_block_that_is_not_what_was_written_is_refused_on_resume(
    model: Path, notes: Path, tmp_path: Path
) -> None:
    keys = {"model": str(model), "output": str(tmp_path / "out"), "calibration": str(notes), **RUN}
    with pytest.raises(KeyboardInterrupt):
        llmsparse.factorize(**keys, progress=Failing(tmp_path / "out.partial"))
    with pytest.raises(MachineError, match=r"layers\.0\.mlp\.gate\.weight does not read back"):
        llmsparse.factorize(**keys, resume=True)
    (tmp_path / "out.partial" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lost or damaged"):
        llmsparse.factorize(**keys, resume=True)


def test_kept_blocks_are_copied_byte_for_byte(model: Path, notes: Path, tmp_path: Path) -> None:
    llmsparse.factorize(
        model=str(model), output=str(tmp_path / "out"), calibration=str(notes), keep_dense="0,-1", **RUN
    )
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for index in (0, 2):
        key = f"model.layers.{index}.mlp.down_proj.weight"
        assert torch.equal(before[key], after[key])
    assert "model.layers.1.mlp.experts.0.down_proj.weight" in after
    assert all(torch.equal(before[key], after[key]) for key in before if "mlp" not in key)


def test_calibration_without_held_out_windows_says_so(model: Path, tmp_path: Path) -> None:
    save_file({"input_ids": torch.randint(2, 384, (8, 32))}, tmp_path / "ids.safetensors")
    report = llmsparse.factorize(
        model=str(model), output=str(tmp_path / "out"), calibration=str(tmp_path / "ids.safetensors"), **RUN
    )
    assert report.perplexity is None and report.blocks[0].measured_on == "calibration"


def test_the_result_is_pruned_like_any_other_model(
    made: tuple[Path, llmsparse.FactorizeReport], notes: Path, tmp_path: Path
) -> None:
    report = llmsparse.prune(
        model=str(made[0]), output=str(tmp_path / "out"), method="sparsegpt", pattern="2:4", calibration=str(notes),
        match_steps=0, calibration_samples=12, seq_len=32, device="cpu", only=["*experts*"],
    )  # fmt: skip
    assert len(report.rows) == 3 * 4 * 3
    down = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.shared_experts.down_proj.weight"]
    assert ((down.view(-1, 4) != 0).sum(1) <= 2).all()


def test_padded_neurons_do_not_trip_a_later_prune(tiny_llama: Callable[..., Path], notes: Path, tmp_path: Path) -> None:
    """60 neurons in 4 experts stored as 16 each: dead inputs of the down projections."""
    tiny_llama(tmp_path / "model", ffn=60, layers=1)
    llmsparse.factorize(model=str(tmp_path / "model"), output=str(tmp_path / "moe"), calibration=str(notes), **RUN)
    for method in ("sparsegpt", "alps", "wanda"):
        report = llmsparse.prune(
            model=str(tmp_path / "moe"), output=str(tmp_path / method), method=method, pattern="2:4",
            calibration=str(notes), match_steps=0, calibration_samples=12, seq_len=32, device="cpu",
        )  # fmt: skip
        assert report.sparsity >= 0.5
        assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / method / "model.safetensors").values())


@pytest.mark.parametrize("name", recipe_file.shipped("factorize"))
def test_shipped_recipe_runs(name: str, tiny_llama: Callable[..., Path], notes: Path, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model", ffn=128, layers=1)
    small = {"calibration": str(notes), "calibration_samples": 20, "seq_len": 32, "router_steps": 5, "device": "cpu"}
    recipe = FactorizeRecipe.load(name, {"model": str(tmp_path / "model"), "output": str(tmp_path / "out"), **small})
    report = llmsparse.factorize(recipe)
    assert report.active_share == {"factorize-50": 0.5, "factorize-25": 0.25, "factorllm-paper": 0.5}[name]
    assert report.container == ("mixtral" if name == "factorllm-paper" else "glm4_moe")
    assert (tmp_path / "out" / "llmsparse_recipe.yaml").is_file()


def test_shipped_recipes_can_be_listed_shown_and_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list"]) == 0
    assert "factorize-50" in capsys.readouterr().out
    for verb in ("show", "validate"):
        assert main(["recipes", verb, "factorize-25"]) == 0
        assert "shared: 2" in capsys.readouterr().out
    assert FactorizeRecipe.load("factorize-50", {"model": "org/name"}).output_folder.name == "name-factorize-50"


def test_a_pruned_source_is_told_that_its_zeros_are_not_kept(model: Path, notes: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"calibration": str(notes), "calibration_samples": 12, "seq_len": 32, "device": "cpu"}
    llmsparse.prune(
        model=str(model), output=str(tmp_path / "half"), method="magnitude", sparsity=0.5, match_steps=0, **keys
    )
    made = {"experts": 4, "shared": 1, "active": 1, "router_steps": 5}
    report = llmsparse.factorize(model=str(tmp_path / "half"), output=str(tmp_path / "moe"), **keys, **made)
    assert any(warning.startswith("the dense FFNs were pruned, 50% of them 0") for warning in report.warnings)
    whole = llmsparse.factorize(model=str(model), output=str(tmp_path / "whole"), **keys, **made)
    assert not any("were pruned" in warning for warning in whole.warnings)


def test_command_line_factorizes_measures_and_resumes(
    model: Path, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["factorize", str(model), "-o", str(tmp_path / "out"), "--experts", "4", "--shared", "1", "--active", "1",
               "--router", "gate-mean", "--no-refit", "--calibration", str(notes), "--calibration-samples", "12",
               "--seq-len", "32", "--device", "cpu", "--json"]  # fmt: skip
    assert main([*command, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"]["width"] == 16
    assert not (tmp_path / "out").exists()
    assert main(command) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["recipe"]["refit"] is False and document["container"] == "glm4_moe"
    assert main([*command, "--resume"]) == 2
    assert "finished already" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "out"), "--text", str(notes), "--seq-len", "32", "--baseline", str(model)]) == 0


def spoil(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shared", "4", "--active", "1"], "4 shared and 1 active make 5, more than 4 experts"),
        (["--active", "5"], "1 shared and 5 active make 6, more than 4 experts"),
        (["--experts", "9"], "--experts 9: .* 64 neurons, which are 8 groups of 8; use --experts 8"),
        (["--active", "0"], "--active: got 0, wanted at least 1"),
        (["--container", "mixtral"], "--container mixtral cannot hold this llama: it has no shared experts"),
        (
            ["--container", "mixtral", "--shared", "0", "--keep-dense", "0"],
            "no other container does: glm4_moe needs a shared",
        ),
        (["--recipe", "sparsegpt-50"], "sparsegpt-50: a recipe of prune; shipped here are "),
        (["--recipe", "tune/factorllm-paper"], "tune/factorllm-paper: a recipe of tune"),
        (["--container", "olmoe"], "--container: got 'olmoe', wanted auto"),
        (["--keep-dense", "7"], "--keep-dense 7: there is no block 7, the model has 3"),
        (["--keep-dense", "0,1,2"], "these are all 3 blocks"),
        (["--keep-dense", "first"], "wanted none, or numbers of blocks such as 0,-1"),
        (["--calibration-samples", "2"], "64 tokens of calibration are too few for 4 experts, wanted 128"),
        (["--recipe", "factorise-50"], "no recipe 'factorise-50'.*did you mean 'factorize-50'"),
        (["--router", "best"], "--router: got 'best', wanted linear"),
        (["expert=4"], "unknown key 'expert'; did you mean 'experts'"),
        (["--resume", "--overwrite"], "choose one"),
    ],
)
def test_impossible_requests_are_one_line_and_exit_2(
    arguments: list[str],
    message: str,
    model: Path,
    notes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["--experts", "4", "--shared", "1", "--active", "1", "--calibration", str(notes), "--seq-len", "32",
              "--calibration-samples", "12", "--device", "cpu"]  # fmt: skip
    flags = [flag for flag in zip(common[::2], common[1::2], strict=True) if flag[0] not in arguments]
    assert main(["factorize", str(model), "-o", "out", *(part for flag in flags for part in flag), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert re.search(message, err), err
    assert not any(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "mixture of experts already"),
        ({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}, "gemma2 cannot be factorized"),
    ],
)
def test_sources_of_another_kind_are_one_line_and_exit_2(
    changes: dict[str, Any], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "model")
    spoil(tmp_path / "model", **changes)
    assert main(["factorize", str(tmp_path / "model"), "-o", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err


def test_hidden_units_that_overflow_are_one_line_that_names_the_block(model: Path, notes: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for name in ("gate", "up"):
        tensors[f"model.layers.0.mlp.{name}_proj.weight"].fill_(3e38)
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"hidden units of the FFN of model\.layers\.0 are NaN or Inf"):
        llmsparse.factorize(model=str(tmp_path / "model"), output=str(tmp_path / "out"), calibration=str(notes), **RUN)


def test_weights_that_are_no_numbers_are_named(
    model: Path, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    command = ["factorize", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--experts", "4", "--shared", "1",
               "--active", "1", "--calibration", str(notes), "--seq-len", "32"]  # fmt: skip
    assert main(command) == 2
    assert "model.layers.1.mlp.up_proj" in capsys.readouterr().err


def test_recipes_refuse_what_contradicts_itself_before_a_model_is_read() -> None:
    with pytest.raises(RecipeError, match="experts: 4 shared and 4 active make 8, more than 6 experts"):
        FactorizeRecipe(model="no/such", experts=6)
    with pytest.raises(RecipeError, match="unknown key 'sparsity'"):
        FactorizeRecipe(model="no/such", sparsity=0.5)


def test_silu_of_the_ffn_is_that_of_the_model(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    from llmsparse.factorization.ffn import FFN

    mlp = AutoModelForCausalLM.from_pretrained(model).model.layers[0].mlp
    x = torch.randn(9, 32)
    with torch.no_grad():
        ffn = FFN(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
        torch.testing.assert_close(ffn(x), mlp(x))
        torch.testing.assert_close(ffn.hidden(x), silu(linear(x, ffn.gate)) * linear(x, ffn.up))
