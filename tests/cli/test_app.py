from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llmsparse
from llmsparse.cli.app import main
from llmsparse.cli.exit import exit_code_of
from llmsparse.cli.terminal import Terminal
from llmsparse.errors import LlmsparseError
from llmsparse.pruning.keys import KEYS
from llmsparse.pruning.recipe import PruneRecipe
from llmsparse.runs.progress import Rich, Silent, for_terminal

SMALL = ("--calibration", "builtin", "--calibration-samples", "4", "--seq-len", "32", "--match-steps", "0")


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("cli") / "tiny", layers=1))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, stdout, stderr of a command line."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(arguments)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def process(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """The command as a process of its own, with pipes."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(Path(llmsparse.__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-m", "llmsparse", *arguments], env=environment, **{**pipes, **options})


def one_error(err: str) -> str:
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err.removeprefix("error: ").rstrip("\n")


def test_version_and_help(run: Any) -> None:
    assert run("--version") == (0, f"llmsparse {llmsparse.__version__}\n", "")
    code, out, err = run()
    assert code == 0 and "prune" in out and "inspect" in out and err == ""


def test_every_key_of_a_recipe_is_a_flag(run: Any) -> None:
    flags = {name: key for keys in KEYS.values() for name, key in keys.items()}
    assert set(flags) == set(PruneRecipe.model_fields) - {"model", "rules"}
    for name, key in flags.items():
        default = PruneRecipe.model_fields[name].default
        assert default in (None, False, ()) if key.default is None else key.default == str(default)
    for verb in ("prune", "plan"):
        _, out, _ = run(verb, "--help")
        assert all(f"--{key.replace('_', '-')}" in out for key in flags if len(key) < 16)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["prune"], "model is missing; name a folder, a hub id or builtin, or a recipe that does"),
        (["prune", "seed=3", "--sparsity", "0.5"], "model is missing"),
        (["factorize", "--recipe", "factorize-50"], "model is missing"),
        (["recipes"], "Missing command. (llmsparse recipes --help)"),
        (["recipes", "shw"], "No such command 'shw'. Did you mean 'show'? (llmsparse recipes --help)"),
        (["inspect"], "Missing argument 'MODEL'. (llmsparse inspect --help)"),
        (["prune", "m", "--sparsty", "0.5"], "--sparsty"),
        (["frobnicate"], "frobnicate"),
        (["prune", "m"], "nothing says how much to prune"),
        (["prune", "m", "--sparsity", "70"], "--sparsity: got 70"),
        (["prune", "m", "--sparsity", "1.0"], "--sparsity: got 1.0"),
        (["prune", "m", "--sparsity", "-0.1"], "--sparsity: got -0.1"),
        (["prune", "m", "--sparsity", "abc"], "--sparsity: got 'abc'"),
        (["prune", "m", "--pattern", "4:2"], "--pattern: pattern 4:2"),
        (["prune", "m", "--pattern", "2:4", "--sparsity", "0.7"], "means sparsity 0.5, not 0.7"),
        (["prune", "m", "--method", "wandaa", "--sparsity", "0.5"], "did you mean 'wanda'?"),
        (["prune", "m", "--recipe", "wanda-5"], "did you mean 'wanda-50'?"),
        (["prune", "m", "--sparsity", "0.5", "here"], "wanted key=value"),
        (["prune", "m", "--sparsity", "0.5", "--resume", "--overwrite"], "choose one"),
        (["prune", "./nowhere", "--sparsity", "0.5"], "./nowhere: no such folder"),
        (["eval", "m"], "--text builtin"),
        (["inspect", "./nowhere"], "./nowhere: no such folder"),
        (["recipes", "show", "wanda"], "did you mean 'wanda-50'?"),
        (["recipes", "validate", "none.yaml"], "no such recipe file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(run: Any, here: Path, arguments: list[str], complaint: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert complaint in one_error(err)
    assert not list(here.iterdir())


def test_what_the_machine_lacks_is_one_line_and_exit_code_3(run: Any, here: Path, model: str) -> None:
    code, _, err = run("inspect", "org/name")
    assert code == 3 and "offline" in one_error(err)
    code, _, err = run("prune", model, "--sparsity", "0.5", "--calibration", "c4")
    assert code == 3 and one_error(err).startswith("c4 cannot be read offline: use --calibration builtin")
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    "verb", ["prune", "plan", "factorize", "eval", "inspect", "pack", "serve", "bench", "generate"]
)
def test_help_says_what_every_switch_does(run: Any, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(verb, "--help")
    assert code == 0 and "MODEL" in out and "{model}" not in out
    shown = [text for line in out.splitlines() if (text := line.strip("│ *")).startswith("--")]
    assert len(shown) > 5
    for line in shown:
        assert re.search(r"\w.*[\w%)]\.( \[|$)", line), line  # a sentence, then perhaps the default
        assert "<bool>" not in line or line.startswith("--help")


def test_debug_shows_the_traceback_before_or_after_the_verb(run: Any) -> None:
    for arguments in (["--debug", "prune", "m"], ["prune", "m", "--debug"]):
        code, _, err = run(*arguments)
        assert code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("error: nothing says")


def test_prune_names_its_output_and_the_result_loads(run: Any, here: Path, model: str) -> None:
    code, out, err = run("prune", model, "--sparsity", "50%", *SMALL)
    assert code == 0 and err == "" and "tiny-sparsegpt-50" in out
    assert sorted(path.name for path in here.iterdir()) == ["tiny-sparsegpt-50"]
    from transformers import AutoModelForCausalLM

    weight = AutoModelForCausalLM.from_pretrained(here / "tiny-sparsegpt-50").model.layers[0].mlp.up_proj.weight
    assert (weight == 0).float().mean() == 0.5


def test_json_is_the_only_thing_on_stdout(run: Any, here: Path, model: str) -> None:
    output = str(here / "out")
    code, out, err = run("prune", model, "--recipe", "wanda-50", *SMALL, "-o", output, "method.name=wanda", "--json")
    report = json.loads(out)
    assert code == 0 and err == "" and report["output"] == output
    assert {"output", "sparsity", "weights"} <= set(report) and len(report["weights"]) == 7

    code, out, _ = run("inspect", output, "--json")
    weights = {row["name"]: row for row in json.loads(out)["weights"]}
    assert code == 0 and weights["model.layers.0.mlp.up_proj"]["sparsity"] == 0.5
    assert {"name", "shape", "sparsity", "pattern"} <= set(weights["model.layers.0.mlp.up_proj"])

    measure = ("eval", output, "--text", "builtin", "--seq-len", "32", "--windows", "4")
    code, out, err = run(*measure, "--baseline", model, "--json")
    result = json.loads(out)
    assert code == 0 and err == "" and result["tokens"] == 4 * 31
    assert result["ratio"] == pytest.approx(result["perplexity"] / result["baseline"]["perplexity"])
    assert result["protocol"]["seq_len"] == result["protocol"]["stride"] == 32
    assert {"dataset", "level"} <= set(result["protocol"])
    code, out, _ = run(*measure, "--baseline", model)
    assert code == 0 and "ratio" in out and "seq_len 32" in out


def test_plan_and_dry_run_say_the_same_and_write_nothing(run: Any, here: Path, model: str) -> None:
    _, planned, _ = run("plan", model, "--pattern", "2:4", *SMALL, "--json")
    code, dry, err = run("prune", model, "--pattern", "2:4", *SMALL, "--json", "--dry-run")
    assert code == 0 and err == ""
    a, b = json.loads(planned), json.loads(dry)
    assert (a["weights"], a["output"]) == (b["weights"], b["output"]) and a["output"] == "tiny-sparsegpt-2of4"
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    "verb",
    [
        ("prune", "--sparsity", "0.5", "--match-steps", "0"),
        ("factorize", "--experts", "4", "--shared", "1", "--active", "1"),
    ],
)
def test_a_dry_run_is_told_what_may_become_of_the_output(
    run: Any, here: Path, model: str, verb: tuple[str, ...]
) -> None:
    dry = (verb[0], model, *verb[1:], *SMALL[:-2], "-o", "old", "--dry-run")
    (here / "old").mkdir()
    (here / "old" / "config.json").touch()
    (here / "old" / "model.safetensors").touch()
    code, _, err = run(*dry)
    assert code == 2 and "--overwrite" in one_error(err)
    assert run(*dry, "--overwrite")[0] == 0
    code, _, err = run(*dry, "--resume")
    assert code == 2 and "nothing to resume" in one_error(err)


def test_an_output_without_a_name_is_refused_in_one_line(run: Any, here: Path, model: str) -> None:
    (here / "full").touch()
    for output in (".", "/"):
        code, _, err = run("prune", model, "--sparsity", "0.5", *SMALL, "-o", output)
        assert code == 2 and one_error(err)


def test_a_slip_in_the_baseline_shows_before_the_model_is_measured(run: Any, model: str) -> None:
    code, _, err = run("eval", model, "--text", "a text that measuring would miss", "--baseline", "./nowhere")
    assert code == 2 and "./nowhere: no such folder" in one_error(err)


def test_the_card_names_a_model_that_is_the_current_folder(
    run: Any, here: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model)
    assert run("prune", ".", "--sparsity", "0.5", *SMALL, "-o", str(here / "out"))[0] == 0
    assert "# tiny, pruned to 50%" in (here / "out" / "README.md").read_text()


def test_globs_repeat_and_rules_come_from_the_recipe(run: Any, here: Path, model: str) -> None:
    (here / "mine.yaml").write_text(
        "sparsity: 0.5\nrules:\n  - {match: '*.up_proj', pattern: 2:4, method: magnitude}\n", encoding="utf-8"
    )
    only = ("--only", "*.up_proj", "--only", "*.q_proj", "--exclude", "*.k_proj")
    code, out, _ = run("plan", model, "--recipe", "mine.yaml", *only, *SMALL, "--json")
    rows = {row["name"].rpartition(".")[2]: (row["method"], row["pattern"]) for row in json.loads(out)["weights"]}
    assert code == 0 and rows == {"up_proj": ("magnitude", "2:4"), "q_proj": ("sparsegpt", "unstructured")}
    code, _, err = run("plan", model, "--recipe", "mine.yaml", *SMALL, "rules.0.match=*.upp_proj")
    assert code == 2 and "matches none" in one_error(err)


def test_recipes_are_listed_shown_copied_and_validated(run: Any, here: Path) -> None:
    code, out, _ = run("recipes", "list", "--json")
    names = [recipe["name"] for recipe in json.loads(out)["recipes"]]
    assert code == 0 and "wanda-50" in names
    assert all(name in run("recipes", "list")[1] for name in names)
    _, shown, _ = run("recipes", "show", "wanda-50")
    assert run("recipes", "copy", "wanda-50") == (0, "wanda-50.yaml\n", "")
    assert (here / "wanda-50.yaml").read_text() == shown
    code, _, err = run("recipes", "copy", "wanda-50")
    assert code == 2 and "exists" in one_error(err)
    (here / "folder").mkdir()
    assert run("recipes", "copy", "wanda-50", "folder")[1] == "folder/wanda-50.yaml\n"
    code, _, err = run("recipes", "copy", "wanda-50", "none/mine.yaml")
    assert code == 3 and "cannot be written" in one_error(err)
    code, out, _ = run("recipes", "validate", "wanda-50.yaml")
    assert code == 0 and "name: wanda" in out
    (here / "bad.yaml").write_text("sparsity: 0.5\nseeed: 1\n")
    code, _, err = run("recipes", "validate", "bad.yaml")
    assert code == 2 and one_error(err).startswith("bad.yaml:2: unknown key 'seeed'; did you mean 'seed'?")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (LlmsparseError("two\nlines"), 1, "two lines"),
        (torch.OutOfMemoryError("CUDA out of memory"), 3, "out of GPU memory: start anew with --batch-size 1"),
        (MemoryError(), 3, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 3, "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 3, "/x: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 3, "/x: Permission denied"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/x"), 2, "/x: File name too long"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), 3, "the current folder is no longer there"),
        (RuntimeError("can't start new thread"), 3, "no further thread may be started here"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_end_has_its_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    def fail() -> None:
        raise error

    assert exit_code_of(fail, Terminal()) == code
    assert said in one_error(capsys.readouterr().err)


def test_a_bug_keeps_its_traceback() -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        exit_code_of(fail, Terminal())


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    terminal = Terminal(["prune", "m", "--overwrite", "-o", "my out"], partial=partial)
    assert terminal.how_to_resume() == ""
    partial.mkdir()
    assert terminal.how_to_resume().endswith("go on with: llmsparse prune m -o 'my out' --resume")


NO_TYPER = """
import sys
class Ctrl_C:
    def find_spec(self, name, *rest):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Ctrl_C())
from llmsparse.__main__ import main
sys.exit(main())
"""


def test_ctrl_c_before_the_command_line_is_there_is_one_line_too() -> None:
    done = subprocess.run([sys.executable, "-c", NO_TYPER], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


def test_a_reader_that_stops_reading_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = process("recipes", "list", stdout=writer)
    os.close(writer)
    assert done.communicate()[1] == "" and done.returncode == 0


@pytest.mark.parametrize("stream", [1, 2])
def test_closed_streams_are_no_error(stream: int) -> None:
    done = process("recipes", "list", preexec_fn=lambda: os.close(stream))
    out, err = done.communicate()
    assert done.returncode == 0 and (out == "") == (stream == 1) and err == ""


def test_standard_output_on_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = process("recipes", "list", stdout=full)
        err = done.communicate()[1]
    assert done.returncode == 3 and "standard output: No space left on device" in one_error(err)


def test_sigterm_ends_a_run_cleanly_and_resume_finishes_it(
    here: Path, tiny_llama: Callable[..., Path], run: Any
) -> None:
    model = str(tiny_llama(here / "deep", layers=16))
    run_it = ("prune", model, "--sparsity", "0.5", *SMALL, "-o", "out")
    started = process(*run_it, cwd=here)
    journal = here / "out.partial" / ".llmsparse" / "journal.jsonl"
    while not (journal.exists() and journal.read_text().count("\n") >= 2) and started.poll() is None:
        time.sleep(0.01)
    started.send_signal(signal.SIGTERM)
    out, err = started.communicate()
    assert (started.returncode, out) == (130, "")
    assert one_error(err).startswith("interrupted; out.partial keeps what is done, go on with: llmsparse prune")
    assert err.endswith("--resume\n") and not (here / "out").exists()
    assert run(*run_it, "--resume")[0] == 0
    assert (here / "out").exists() and not (here / "out.partial").exists()


def test_progress_is_for_eyes_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(for_terminal(), Silent)  # stderr is captured: nobody watches
    for_terminal().log("a note")
    for_terminal(quiet=True).log("nothing")
    assert capsys.readouterr().err == "a note\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    assert isinstance(for_terminal(), Rich) and isinstance(for_terminal(quiet=True), Silent)
    monkeypatch.setenv("CI", "true")
    assert isinstance(for_terminal(), Silent)


def test_a_log_file_gets_a_line_a_block_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    progress = for_terminal(verbose=True)
    with progress:
        progress.start(2)
        progress.block("model.layers.0")
        progress.block("model.layers.1")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "model.layers.0, 1 of 2, 0:00:00 passed"
    assert second.startswith("model.layers.1, 2 of 2, ") and second.endswith(" left")
    assert isinstance(for_terminal(quiet=True, verbose=True), Silent)


def test_bars_count_blocks_and_the_batches_within_one() -> None:
    from io import StringIO

    from rich.console import Console

    screen = StringIO()
    bars = Rich(Console(file=screen, force_terminal=True, width=120, no_color=True))
    for _ in range(2):  # a second run may follow the first
        with bars:
            bars.start(2)
            for name in ("model.layers.0", "model.layers.1"):
                bars.block(name)
                advance = bars.batches(f"calibrating {name}", 3)
                for _ in range(3):
                    advance()
            time.sleep(0.6)  # drawn four times a second
            bars.log("a [note]")
    shown = screen.getvalue()
    assert "model.layers.1" in shown and "1/2" in shown and "3/3" in shown and "GB" in shown and "a [note]" in shown
