"""Recipe files work from any folder, name nobody's home, and notice when the text that they speak of has changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from llmsparse.cli.app import main
from llmsparse.errors import RecipeError
from llmsparse.pruning.recipe import PruneRecipe
from llmsparse.runs.recipe_paths import for_file, from_file
from llmsparse.runs.report import card_metadata

QUICK = [
    "--method",
    "wanda",
    "--sparsity",
    "0.5",
    "--match-steps",
    "0",
    "--calibration-samples",
    "4",
    "--seq-len",
    "32",
]


@pytest.fixture
def here(tiny_llama: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ./my-model and notes.txt, in which we are."""
    monkeypatch.chdir(tmp_path)
    tiny_llama(tmp_path / "my-model")
    (tmp_path / "notes.txt").write_text(text[:20_000], encoding="utf-8")
    return tmp_path


def told(folder: Path) -> dict[str, str]:
    return yaml.safe_load((folder / "llmsparse_recipe.yaml").read_text())


def test_the_written_recipe_repeats_the_run_from_any_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["prune", "./my-model", "-o", "out", "--calibration", "notes.txt", *QUICK]) == 0
    assert (told(here / "out")["model"], told(here / "out")["calibration"]) == ("../my-model", "../notes.txt")
    (here / "else" / "where").mkdir(parents=True)
    monkeypatch.chdir(here / "else" / "where")
    assert main(["prune", "--recipe", "../../out/llmsparse_recipe.yaml", "-o", "again"]) == 0
    again = here / "else" / "where" / "again"
    assert (again / "model.safetensors").read_bytes() == (here / "out" / "model.safetensors").read_bytes()
    assert told(again)["calibration"] == "../../../notes.txt"
    shutil.copytree(here, here.parent / "moved")  # all of it together
    monkeypatch.chdir(here.parent)
    assert main(["prune", "--recipe", "moved/out/llmsparse_recipe.yaml", "-o", "third", "--dry-run"]) == 0


def test_every_side_file_is_free_of_the_home_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    command = [
        "prune",
        str(here / "my-model"),
        "-o",
        str(here / "out"),
        "--calibration",
        str(here / "notes.txt"),
        *QUICK,
    ]
    assert main(command) == 0
    for name in ("README.md", "llmsparse_recipe.yaml", "llmsparse_report.json"):
        assert str(here) not in (here / "out" / name).read_text(), name
    assert told(here / "out") | {"model": "~/my-model", "calibration": "~/notes.txt"} == told(here / "out")
    monkeypatch.chdir("/")
    assert main(["prune", "--recipe", str(here / "out" / "llmsparse_recipe.yaml"), "-o", str(here / "again")]) == 0


def test_another_text_under_the_same_name_is_noticed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "./my-model", "-o", "out", "--calibration", "notes.txt", *QUICK]) == 0
    recipe = here / "out" / "llmsparse_recipe.yaml"
    assert f"# threads: {os.environ.get('OMP_NUM_THREADS', '1')}\n" in recipe.read_text()
    other = "Nothing of what stood here before. " * 400
    (here / "notes.txt").write_text(other)
    capsys.readouterr()
    assert main(["prune", "--recipe", str(recipe), "-o", "again"]) == 2
    assert "not the text of the run that wrote this recipe" in capsys.readouterr().err and not (here / "again").exists()
    (here / "other.txt").write_text(other)
    for chosen in (["--calibration", "other.txt"], ["--seed", "3"], ["calibration_samples=3"]):
        assert main(["prune", "--recipe", str(recipe), "-o", "again", *chosen, "--overwrite"]) == 0, chosen


def test_a_path_in_a_recipe_stands_beside_it_and_a_name_is_a_name(here: Path) -> None:
    (here / "deep").mkdir()
    (here / "deep" / "beside.txt").write_text("x")
    (here / "deep" / "builtin").mkdir()
    keys = {"calibration": "beside.txt", "model": "../my-model", "text": "./missing.txt", "teacher": "owner/name"}
    read = from_file(keys | {"only": "./x", "output": "~/out"}, here / "deep" / "r.yaml")
    assert read == {
        "calibration": "deep/beside.txt",
        "model": "my-model",
        "text": "deep/missing.txt",
        "teacher": "owner/name",
        "only": "./x",
        "output": os.path.expanduser("~/out"),
    }
    assert from_file({"model": "builtin", "calibration": "notes.txt"}, here / "deep" / "r.yaml") == {
        "model": "builtin",
        "calibration": "notes.txt",  # as on the command line
    }
    copied = from_file({"text": "wikitext2:beside.txt"}, here / "deep" / "r.yaml")
    assert copied == {"text": "wikitext2:deep/beside.txt"}
    assert for_file(copied, here / "out") == {"text": "wikitext2:../deep/beside.txt"}
    absolute = {"model": str(here / "my-model"), "calibration": "~/x.txt", "text": ""}
    assert from_file(absolute, here / "deep" / "r.yaml") == absolute == for_file(absolute, here / "out")


def test_a_way_that_would_name_a_home_is_written_out(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = here / "home" / "alice"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    (home / "m").mkdir()
    monkeypatch.chdir(home)
    assert for_file({"model": "m"}, here / "scratch" / "out") == {"model": str(home / "m")}  # written as ~/m
    assert for_file({"model": "m"}, home / "work" / "out") == {"model": "../../m"}
    assert for_file({"model": "m"}, home) == {"model": "./m"}
    assert for_file({"model": "org/m", "calibration": "c4"}, home) == {"model": "org/m", "calibration": "c4"}


def test_a_note_that_is_none_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("# mine\n# calibration sha256: 12\nmodel: builtin\nsparsity: 0.5\n")
    PruneRecipe.load(file).check_text("calibration", "34")  # only what stands at the head was written by a run
    file.write_text("# calibration sha256: 12\nmodel: builtin\nsparsity: 0.5\n")
    with pytest.raises(RecipeError, match="calibration auto: not the text of the run"):
        PruneRecipe.load(file).check_text("calibration", "34")
    PruneRecipe.load(file).check_text("calibration", "12")
    assert json.loads(json.dumps(PruneRecipe.load(file).resolved()))["model"] == "builtin"


@pytest.mark.parametrize("name", ["owner/model", "yes", "1:20", "a: b", "# x", "'", "12", "{x}", "ümlaut/ä"])
def test_a_card_names_its_base_model_whatever_it_is_called(name: str) -> None:
    assert yaml.safe_load(card_metadata(["sparse"], name))["base_model"] == name
