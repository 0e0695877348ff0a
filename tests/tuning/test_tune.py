"""`tune` on tiny checkpoints: what it gains, what it writes, how it resumes, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import llmsparse
from llmsparse.cli.app import main
from llmsparse.errors import CalibrationError, CheckpointError, MachineError, NumericalError, RecipeError
from llmsparse.runs import recipe_file
from llmsparse.runs.partial import held_bytes
from llmsparse.runs.progress import Silent
from llmsparse.tuning import plan as planning
from llmsparse.tuning.plan import make_plan
from llmsparse.tuning.recipe import TuneRecipe
from llmsparse.tuning.training import rate_at


@pytest.fixture(scope="module")
def done(
    moe: Path, keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, llmsparse.TuneReport]:
    out = tmp_path_factory.mktemp("done") / "out"
    return out, llmsparse.tune(model=str(moe), output=str(out), **keys | {"steps": 60, "learning_rate": 3e-3})


def files(folder: Path) -> dict[str, bytes]:
    """What the byte-identity promise covers: everything but timings and the name of the folder."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    report = json.loads(found.pop("llmsparse_report.json"))
    report.pop("output")
    report.pop("timings")
    report["recipe"].pop("output")
    found.pop("llmsparse_recipe.yaml")
    found["README.md"] = re.sub(rb"\| (took|output) \|.*", b"", found["README.md"])
    return {**found, "report": json.dumps(report).encode()}


@pytest.mark.parametrize("name", ["glm4_moe", "mixtral"])
def test_perplexity_comes_closer_to_the_teachers_on_text_not_trained_on(
    name: str, mixtures: dict[str, Path], keys: dict[str, Any], tmp_path: Path
) -> None:
    report = llmsparse.tune(
        model=str(mixtures[name]), output=str(tmp_path / "out"), **keys | {"steps": 60, "learning_rate": 3e-3}
    )
    perplexity = report.perplexity
    assert abs(perplexity["after"] - perplexity["teacher"]) < 0.9 * abs(perplexity["before"] - perplexity["teacher"])
    kl = [one["kl"] for one in report.losses]  # of a step each, of other windows
    assert sum(kl[-5:]) < 0.75 * sum(kl[:5])
    assert report.losses[-1]["layer"] < report.losses[0]["layer"]


def test_a_router_made_at_random_learns_which_experts_are_best(
    dense: Path, notes: Path, keys: dict[str, Any], tmp_path: Path
) -> None:
    llmsparse.factorize(
        model=str(dense), output=str(tmp_path / "moe"), calibration=str(notes), experts=8, shared=2, active=2,
        router="random", calibration_samples=24, seq_len=32, device="cpu",
    )  # fmt: skip
    report = llmsparse.tune(
        model=str(tmp_path / "moe"), output=str(tmp_path / "out"),
        **keys | {"steps": 60, "train": "router", "router_learning_rate": 0.03},
    )  # fmt: skip
    assert report.losses[-1]["router"] < report.losses[0]["router"] - 0.1
    assert report.losses[-1]["layer"] < report.losses[0]["layer"]


def test_the_report_is_of_what_was_written(
    done: tuple[Path, llmsparse.TuneReport], moe: Path, dense: Path, keys: dict[str, Any]
) -> None:
    """Perplexities in memory equal those that `perplexity` streams from the two folders, on the same windows."""
    from safetensors.torch import save_file

    out, report = done
    plan = make_plan(TuneRecipe(model=str(moe), output=str(out.with_name("other")), **keys | {"steps": 60}))
    save_file({"input_ids": plan.windows.held_out}, out.with_name("held.safetensors"))
    for name, folder in (("teacher", dense), ("before", moe), ("after", out)):
        expected = llmsparse.perplexity(str(folder), str(out.with_name("held.safetensors")), device="cpu").perplexity
        assert report.perplexity[name] == pytest.approx(expected, rel=1e-5), name


def test_the_report_is_of_the_tuning_and_keeps_what_factorize_said(
    done: tuple[Path, llmsparse.TuneReport], moe: Path
) -> None:
    out, report = done
    stored = json.loads((out / "llmsparse_report.json").read_text())
    before = json.loads((moe / "llmsparse_report.json").read_text())
    assert stored["made_from"] == before
    assert stored["output"] == str(out) and stored["warnings"] == report.warnings
    assert stored["perplexity"]["after"] == report.perplexity["after"]
    tune = stored
    assert [block["name"] for block in tune["blocks"]] == ["model.layers.0", "model.layers.1"]
    for block in tune["blocks"]:
        assert len(block["load"]) == 6 and sum(block["load"]) == pytest.approx(2)
        assert 0 < block["entropy"] <= 1 and block["dead"] == block["load"].count(0)
    assert tune["timings"]["tokens_per_second"] > 0
    assert tune["losses"][-1]["step"] == 60 and len(tune["losses"]) == 60
    assert tune["text"]["passes"] == 1 and tune["text"]["tokens_trained_on"] == 60 * 8 * 32
    card = (out / "README.md").read_text()
    assert "tuned to its dense teacher" in card and "greedy oracle" in card
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "tiny"
    written = TuneRecipe.load(out / "llmsparse_recipe.yaml")
    assert written.resolved() == report.recipe == tune["recipe"]
    assert (written.device, written.dtype, written.seq_len, written.batch_size) == ("cpu", "float32", 32, 8)


def test_rows_of_a_token_file_are_counted_in_steps_of_the_usual_size(
    moe: Path, keys: dict[str, Any], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    save_file({"input_ids": torch.arange(300 * 64).view(300, 64) % 300}, tmp_path / "rows.safetensors")
    given = {key: value for key, value in keys.items() if key not in ("seq_len", "batch_size")}
    plan = make_plan(TuneRecipe(model=str(moe), **given | {"text": str(tmp_path / "rows.safetensors"), "steps": 4}))
    assert (plan.seq_len, plan.batch_size, len(plan.windows.ids)) == (64, 64, 4 * 64)


@pytest.mark.parametrize("train", ["experts", "lora", "router"])
def test_room_is_made_for_the_state_of_a_run_twice(train: str, moe: Path, keys: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    keys = keys | {"train": train, "steps": 2}
    plan = make_plan(TuneRecipe(model=str(moe), output=str(folder), **keys))
    with pytest.raises(KeyboardInterrupt):
        llmsparse.tune(model=str(moe), output=str(folder), **keys, progress=StopsAtStep(1))
    state = (tmp_path / "out.partial" / ".llmsparse" / "tuning.pt").stat().st_size
    checkpoint = (moe / "model.safetensors").stat().st_size
    assert 0.8 * 2 * state < plan.bytes_to_write + 100_000 - checkpoint < 1.5 * 2 * state + 200_000


def test_the_room_of_an_unfinished_run_is_not_asked_for_twice(
    moe: Path, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that the unfinished run has filled but for less than it holds."""
    recipe = TuneRecipe(model=str(moe), output=str(tmp_path / "out"), **keys)
    with pytest.raises(KeyboardInterrupt):
        llmsparse.tune(recipe, progress=StopsAtStep(3))
    free = 10**6 + make_plan(recipe, resume=True).bytes_to_write - held_bytes(tmp_path / "out") // 2
    monkeypatch.setattr("llmsparse.storage.disk.shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    make_plan(recipe, resume=True)
    with pytest.raises(MachineError, match=r"elsewhere needs .*B and its disk has"):
        make_plan(recipe.replace(output=str(tmp_path / "elsewhere")))


def test_same_seed_same_bytes_and_another_seed_others(moe: Path, keys: dict[str, Any], tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        llmsparse.tune(model=str(moe), output=str(tmp_path / name), **keys, seed=seed)
    one, two, three = (files(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert one["model.safetensors"] != three["model.safetensors"]


def test_forwards_of_a_step_add_up_to_one_forward_of_all_its_windows(
    moe: Path, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "PARTS", 1)
    assert make_plan(TuneRecipe(model=str(moe), output=str(tmp_path / "one"), **keys)).windows_at_once == 8
    llmsparse.tune(model=str(moe), output=str(tmp_path / "one"), **keys, balance_weight=0)  # not a mean of tokens
    monkeypatch.setattr(planning, "PARTS", 4)
    monkeypatch.setattr(planning, "LOGITS_AT_ONCE", 2 * 32 * 384)
    plan = make_plan(TuneRecipe(model=str(moe), output=str(tmp_path / "two"), **keys))
    assert (plan.batch_size, plan.windows_at_once) == (8, 2)
    llmsparse.tune(model=str(moe), output=str(tmp_path / "two"), **keys, balance_weight=0)
    start, one, two = (load_file(folder / "model.safetensors") for folder in (moe, tmp_path / "one", tmp_path / "two"))
    for key in start:
        if "shared" in key:
            moved = (one[key] - start[key]).norm()
            assert moved > 0 and (one[key] - two[key]).norm() < 0.05 * moved, key


def test_products_in_bfloat16_train_as_well(moe: Path, keys: dict[str, Any], tmp_path: Path) -> None:
    report = llmsparse.tune(
        model=str(moe), output=str(tmp_path / "out"), **keys | {"steps": 25, "learning_rate": 3e-3}, dtype="bfloat16"
    )
    losses = [loss["kl"] for loss in report.losses]  # one a step, each of other text
    assert mean(losses[-5:]) < 0.8 * mean(losses[:5])
    assert load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.gate.weight"].dtype == torch.float32


def test_rates_rise_fall_along_a_cosine_and_end_where_they_should(moe: Path, keys: dict[str, Any]) -> None:
    plan = make_plan(TuneRecipe(model=str(moe), **keys | {"steps": 110}, warmup=10, final_rate=0.1))
    assert [rate_at(step, plan) for step in (0, 4, 9, 10, 60)] == pytest.approx([0.1, 0.5, 1, 1, 0.55])
    assert 0.1 < rate_at(109, plan) < 0.101


def test_the_papers_recipe_runs_on_what_its_factorize_recipe_wrote(
    tiny_llama: Callable[..., Path], notes: Path, tmp_path: Path
) -> None:
    from llmsparse.factorization.recipe import FactorizeRecipe

    dense = tiny_llama(tmp_path / "dense", ffn=128, layers=1)
    small = {"calibration": str(notes), "calibration_samples": 20, "seq_len": 32, "router_steps": 5, "device": "cpu"}
    llmsparse.factorize(
        FactorizeRecipe.load("factorllm-paper", {"model": str(dense), "output": str(tmp_path / "moe"), **small})
    )
    named = {"model": str(tmp_path / "moe"), "teacher": str(dense), "text": str(notes), "output": str(tmp_path / "out")}
    paper = TuneRecipe.load("factorllm-paper", named)
    assert (paper.rate, paper.steps, paper.warmup, paper.final_rate) == (4e-5, 10_000, 500, 0.001)
    assert paper.weights == {"kl": 0, "layer": 0, "router": 0.05, "balance": 0.01, "language": 1}
    report = llmsparse.tune(TuneRecipe.load("factorllm-paper", named | {"steps": 3, "seq_len": 32, "device": "cpu"}))
    assert set(report.losses[-1]) == {"step", "router", "balance", "language", "loss"}
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "out"))
    router = "model.layers.0.block_sparse_moe.gate.weight"
    assert not torch.equal(before[router], after[router]), "the released code's never changes"


@pytest.mark.parametrize("name", recipe_file.shipped("tune"))
def test_shipped_recipes_can_be_listed_shown_copied_and_checked(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "list"]) == 0
    assert f"tune/{name}" in capsys.readouterr().out
    for verb in ("show", "validate", "copy"):
        assert main(["recipes", verb, f"tune/{name}"]) == 0
        assert ("learning_rate:" in capsys.readouterr().out) == (verb != "copy")
    assert main(["recipes", "validate", f"{name}.yaml"]) == 0


def command(model: Path, out: Path, keys: dict[str, Any]) -> list[str]:
    flags = [part for key, value in keys.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    return ["tune", str(model), "-o", str(out), *flags]


def test_the_command_line_gives_one_document_and_nothing_to_resume(
    moe: Path, keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*command(moe, tmp_path / "out", keys), "--json"]
    assert main(arguments) == 0
    out, _ = capsys.readouterr()
    document = json.loads(out)
    assert document["perplexity"]["after"] > 1 and document["seconds"] > 0
    assert main([*arguments, "--resume"]) == 2
    assert "finished already" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*arguments[:-1], "--overwrite", "-v"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^perplexity .* held-out windows", out, re.MULTILINE)
    assert re.search(
        r"^step \d+: loss [\d.]+, expert load entropy [\d.]+, [\d,]+ tokens/s, \d+ of 6", err, re.MULTILINE
    )


LONG = {"steps": 200, "save_every": 7}  # long enough to be cut short


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "llmsparse", *arguments], env=environment, **pipes)


def end(process: subprocess.Popen[str], state: Path, after: float) -> tuple[int, str]:
    """Wait until a state is on disk and `after` seconds more, send SIGTERM; exit code and stderr."""
    while process.poll() is None and not state.exists():
        time.sleep(0.005)
    time.sleep(after)
    process.terminate()
    _, err = process.communicate()
    return process.returncode, err


@pytest.mark.slow
@pytest.mark.parametrize("train", ["experts", "lora"])
def test_asked_to_end_at_any_moment_it_resumes_to_the_same_bytes(
    train: str, moe: Path, keys: dict[str, Any], tmp_path: Path
) -> None:
    keys = keys | LONG | {"train": train}
    llmsparse.tune(model=str(moe), output=str(tmp_path / "whole"), **keys)
    for after in (0.0, 0.3, 0.8, 2.0):
        out = tmp_path / f"out{after}"
        arguments = command(moe, out, keys)
        status, err = end(start(arguments), tmp_path / f"{out.name}.partial/.llmsparse/tuning.pt", after)
        if not out.exists():  # otherwise it was done before the signal came
            assert status == 130 and err.startswith("error: interrupted; ") and err.count("\n") == 1, err
            assert "go on with: llmsparse tune" in err
            process = start([*arguments, "--resume"])
            _, err = process.communicate()
            assert process.returncode == 0, err
        assert files(out) == files(tmp_path / "whole"), after


class StopsAtStep(Silent):
    """Ctrl-C as this many steps are done."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.left = step

    def batches(self, description: str, total: int) -> Callable[[], None]:
        def advance() -> None:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)

        return advance


def test_ctrl_c_saves_the_step_it_came_in_and_the_rest_gives_the_same_bytes(
    moe: Path, keys: dict[str, Any], tmp_path: Path
) -> None:
    llmsparse.tune(model=str(moe), output=str(tmp_path / "whole"), **keys)
    with pytest.raises(KeyboardInterrupt):
        llmsparse.tune(model=str(moe), output=str(tmp_path / "out"), **keys, progress=StopsAtStep(3))
    state = torch.load(tmp_path / "out.partial" / ".llmsparse" / "tuning.pt", weights_only=True)
    assert state["history"]["step"] == 3 and not (tmp_path / "out").exists()
    llmsparse.tune(model=str(moe), output=str(tmp_path / "out"), **keys, resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_resume_with_other_settings_is_refused_and_names_them(
    moe: Path, keys: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        llmsparse.tune(model=str(moe), output=str(tmp_path / "out"), **keys, progress=StopsAtStep(3))
    with pytest.raises(RecipeError, match=r"cannot be resumed, changed since it was started: recipe"):
        llmsparse.tune(model=str(moe), output=str(tmp_path / "out"), **keys | {"steps": 7}, resume=True)
    state = tmp_path / "out.partial" / ".llmsparse" / "tuning.pt"
    state.write_bytes(b"not a state")
    with pytest.raises(CheckpointError, match=r"tuning\.pt: corrupt; start anew with --overwrite"):
        llmsparse.tune(model=str(moe), output=str(tmp_path / "out"), **keys, resume=True)
    torch.save({"another": 1}, state)
    with pytest.raises(CheckpointError, match=r"tuning\.pt: corrupt; start anew with --overwrite"):
        llmsparse.tune(model=str(moe), output=str(tmp_path / "out"), **keys, resume=True)
    llmsparse.tune(model=str(moe), output=str(tmp_path / "out"), **keys, overwrite=True)
    assert (tmp_path / "out" / "config.json").is_file()


def spoil(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: got '0', wanted at least 1"),
        (["--steps", "-3"], "--steps: got '-3', wanted at least 1"),
        (["--train", "everything"], "--train: got 'everything', wanted router, experts or lora"),
        (["--learning-rate", "0"], "--learning-rate: got '0', wanted more than 0$"),
        (["--learning-rate", "much"], "--learning-rate: got 'much', wanted a number$"),
        (["--train", "router", "--learning-rate", "0.1"], "--learning-rate: no experts are trained; use --router-"),
        (["--recipe", "factorize-50"], "factorize-50: a recipe of factorize; shipped here are factorllm-paper"),
        (["--teacher", "MOE"], "--teacher .*: is a mixture of experts; give the dense model"),
        (["--text", "builtin", "--text-field", "body"], "builtin: its text is known, there is no column 'body'"),
        (["--dtype", "float16"], "--dtype: got 'float16', wanted auto, float32 or bfloat16"),
        (["--seq-len", "500"], "--seq-len 500 is above the model's maximum of 128"),
        (["--batch-size", "5000"], "wanted 5000 for a step and 1; give more text"),
        (["--text", "short.txt"], "short.txt: .* tokens"),
        (["--text", "missing.txt"], "missing.txt: no such file"),
        (["--recipe", "factorllm"], "no recipe 'factorllm'.*did you mean 'factorllm-paper'"),
        (["kl_wieght=2"], "unknown key 'kl_wieght'; did you mean 'kl_weight'"),
        (["kl_weight=0", "layer_weight=0", "router_weight=0", "balance_weight=0"], "every weight of the loss is 0"),
        (["--teacher", "no/such/folder"], "no/such/folder: no such folder"),
        (["--teacher", "."], "no config.json"),
        (["--resume", "--overwrite"], "choose one"),
        (["--resume"], "no such folder, nothing to resume"),
    ],
)  # fmt: skip
def test_impossible_requests_are_one_line_and_exit_2(
    arguments: list[str],
    message: str,
    moe: Path,
    keys: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("A few words.")
    arguments = [str(moe) if argument == "MOE" else argument for argument in arguments]
    given = {key: value for key, value in keys.items() if f"--{key.replace('_', '-')}" not in arguments}
    assert main([*command(moe, Path("out"), given), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert re.search(message, err), err
    assert not any(tmp_path.glob("out*"))


@pytest.mark.parametrize("missing", ["teacher", "text"])
def test_what_cannot_be_guessed_is_asked_for(missing: str, keys: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"{missing}: missing; "):
        TuneRecipe(model="org/name", **{key: value for key, value in keys.items() if key != missing})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 64}, "hidden width is 64, and the model's 32"),
        ({"layers": 3}, "depth is 3, and the model's 2"),
        ({"vocab": 400}, "vocabulary is 400, and the model's 384"),
    ],
)
def test_a_teacher_of_another_shape_is_refused(
    options: dict[str, int],
    message: str,
    tiny_llama: Callable[..., Path],
    moe: Path,
    keys: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tiny_llama(tmp_path / "other", **options)
    capsys.readouterr()
    assert main(command(moe, tmp_path / "out", keys | {"teacher": str(other)})) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --teacher ") and err.count("\n") == 1 and message in err, err
    assert not any(tmp_path.glob("out*"))


def test_a_teacher_that_leaves_inputs_out_is_refused(
    moe: Path, dense: Path, notes: Path, keys: dict[str, Any], tmp_path: Path
) -> None:
    small: dict[str, Any] = {"calibration": str(notes), "calibration_samples": 4, "seq_len": 32, "device": "cpu"}
    llmsparse.activations(dense, output=tmp_path / "cut", sparsity=0.5, allocation="uniform", **small)
    with pytest.raises(CheckpointError, match=r"cut: has thresholds of activations already"):
        llmsparse.tune(model=str(moe), **keys | {"teacher": str(tmp_path / "cut")}, output=str(tmp_path / "out"))


def test_what_factorize_did_not_write_is_refused(
    moe: Path, dense: Path, notes: Path, keys: dict[str, Any], tmp_path: Path
) -> None:
    out = {"output": str(tmp_path / "out")}
    with pytest.raises(CheckpointError, match=r"llama is no mixture of experts; make it one first: llmsparse factor"):
        llmsparse.tune(model=str(dense), **keys, **out)
    with pytest.raises(CheckpointError, match=r"--teacher .*: is a mixture of experts; give the dense model"):
        llmsparse.tune(model=str(moe), **keys | {"teacher": str(moe)}, **out)
    others = shutil.copytree(moe, tmp_path / "others")
    with pytest.raises(CheckpointError, match=r"n_group is 2, where factorize writes 1"):
        llmsparse.tune(model=str(spoil(others, n_group=2)), **keys, **out)
    with pytest.raises(CheckpointError, match=r"olmoe is not what factorize writes"):
        spoil(others, model_type="olmoe", architectures=["OlmoeForCausalLM"], num_experts=8)
        llmsparse.tune(model=str(others), **keys, **out)
    pruned = {"model": str(moe), "output": str(tmp_path / "packed"), "method": "magnitude", "sparsity": 0.75}
    small = {"calibration": str(notes), "calibration_samples": 4, "seq_len": 32, "match_steps": 0, "device": "cpu"}
    llmsparse.prune(**pruned, **small, format="packed")
    with pytest.raises(CheckpointError, match=r"packed by llmsparse; restore it first: llmsparse unpack"):
        llmsparse.tune(model=str(tmp_path / "packed"), **keys, **out)
    assert not any(tmp_path.glob("out*"))


def test_where_every_expert_runs_experts_are_tuned_and_routers_have_nothing_to_learn(
    dense: Path, notes: Path, keys: dict[str, Any], tmp_path: Path
) -> None:
    llmsparse.factorize(
        model=str(dense), output=str(tmp_path / "moe"), calibration=str(notes), experts=4, shared=1, active=3,
        calibration_samples=12, seq_len=32, device="cpu",
    )  # fmt: skip
    arguments = {"model": str(tmp_path / "moe"), "output": str(tmp_path / "out"), **keys}
    for options in ({"train": "router"}, {"kl_weight": 0, "layer_weight": 0}):
        with pytest.raises(RecipeError, match=r"every routed expert runs .* routers have nothing to learn"):
            llmsparse.tune(**arguments, **options)
    report = llmsparse.tune(**arguments)
    assert report.losses[-1]["router"] == 0 and report.entropy == pytest.approx(1)


def test_the_output_may_be_neither_of_the_two_models(moe: Path, dense: Path, keys: dict[str, Any]) -> None:
    for folder in (moe, dense):
        with pytest.raises(RecipeError, match="must lie apart"):
            llmsparse.tune(model=str(moe), **keys, output=str(folder), overwrite=True)
    assert (dense / "model.safetensors").is_file()


def test_a_text_with_nothing_to_hold_out_is_too_short(moe: Path, keys: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("One line of text, and another. " * 12)
    with pytest.raises(CalibrationError, match=r"to train on and 0 to measure on, wanted 1 for a step and 1"):
        llmsparse.tune(
            model=str(moe),
            output=str(tmp_path / "out"),
            **keys | {"text": str(tmp_path / "short.txt"), "batch_size": 1},
        )


def test_weights_that_are_no_numbers_are_named(moe: Path, keys: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    broken = shutil.copytree(moe, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.shared_experts.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"broken: its perplexity is nan, so it holds NaN or Inf"):
        llmsparse.tune(model=str(broken), output=str(tmp_path / "out"), **keys)


def test_a_run_that_diverges_says_so(moe: Path, keys: dict[str, Any], tmp_path: Path) -> None:
    wild = {"layer_weight": 1e39}
    with pytest.raises(NumericalError, match=r"the loss is inf in step 1; lower --learning-rate"):
        llmsparse.tune(model=str(moe), output=str(tmp_path / "out"), **keys | wild)
