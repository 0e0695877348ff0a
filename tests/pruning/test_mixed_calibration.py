"""Pruning and factorizing on several texts: what is reported of each, what the recipe says, and how it is repeated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import llmsparse
from llmsparse.cli.app import main
from llmsparse.evaluation.perplexity import calibrated_on
from llmsparse.runs.report import loss_warning, perplexity_lines, spell_protocol

QUICK = [
    "--sparsity",
    "0.6",
    "--method",
    "wanda",
    "--match-steps",
    "0",
    "--calibration-samples",
    "9",
    "--seq-len",
    "32",
]


@pytest.fixture
def here(tiny_llama: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_llama(tmp_path / "model")
    (tmp_path / "code.txt").write_text(text[:30_000], encoding="utf-8")
    rows = [json.dumps({"text": "say it again, " * 40}) for _ in range(20)]
    (tmp_path / "me@home.jsonl").write_text("\n".join(rows))
    return tmp_path


def run(*arguments: str) -> dict[str, Any]:
    assert main([*arguments, "-q"]) == 0
    return json.loads((Path("out") / "llmsparse_report.json").read_text())


def test_perplexity_is_reported_of_every_text_worst_first(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--calibration", "code.txt@2", "--calibration", "me@home.jsonl"]
    report = run("prune", "model", "-o", "out", *given, *QUICK)
    found = report["perplexity"]["sources"]
    assert {one["source"] for one in found} == {"code.txt", "me@home.jsonl"}
    assert [one["windows"] for one in found] == [16, 16], "32 of these tokens, divided"
    assert found[0]["after"] / found[0]["before"] >= found[1]["after"] / found[1]["before"]
    assert report["perplexity"]["tokens"] == sum(one["tokens"] for one in found)
    assert [one["windows"] for one in report["calibration"]["sources"]] == [6, 3]
    printed = capsys.readouterr().out
    assert printed.index(f"tokens of {found[0]['source']}") < printed.index(f"tokens of {found[1]['source']}")
    card = (here / "out" / "README.md").read_text()
    assert "code.txt by 2 (file code.txt" in card and str(here) not in card
    assert all(calibrated_on(here / "out", name, {"file": name}) for name in ("code.txt", "me@home.jsonl"))
    assert not calibrated_on(here / "out", "other.txt", {"file": "other.txt"})


def test_the_perplexity_of_each_text_is_that_of_the_text_alone(here: Path) -> None:
    given = ["--calibration", "code.txt", "--calibration", "me@home.jsonl"]
    mixed = run("prune", "model", "-o", "out", *given, *QUICK)["perplexity"]["sources"]
    before = next(one["before"] for one in mixed if one["source"] == "code.txt")
    held_out = llmsparse.plan("model", sparsity=0.5, calibration=["code.txt", "me@home.jsonl"], seq_len=32,
                              calibration_samples=9).windows.held_out[:16]  # fmt: skip
    from safetensors.torch import save_file

    save_file({"input_ids": held_out.contiguous()}, here / "held.safetensors")
    assert llmsparse.perplexity("model", "held.safetensors").perplexity == pytest.approx(before, rel=1e-6)


def test_the_written_recipe_names_every_text_and_repeats_the_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("prune", "model", "-o", "out", "--calibration", "code.txt@2", "--calibration", "me@home.jsonl", *QUICK)
    written = yaml.safe_load((here / "out" / "llmsparse_recipe.yaml").read_text())
    assert written["calibration"] == ["../code.txt@2", "../me@home.jsonl"]
    (here / "else").mkdir()
    monkeypatch.chdir(here / "else")
    assert main(["prune", "--recipe", "../out/llmsparse_recipe.yaml", "-o", "again"]) == 0
    assert Path("again/model.safetensors").read_bytes() == (here / "out" / "model.safetensors").read_bytes()
    (here / "me@home.jsonl").write_text("\n".join(json.dumps({"text": "say something else " * 40}) for _ in range(20)))
    assert main(["prune", "--recipe", "../out/llmsparse_recipe.yaml", "-o", "third"]) == 2


def test_one_text_is_stored_as_one(here: Path) -> None:
    run("prune", "model", "-o", "out", "--calibration", "code.txt", *QUICK)
    assert yaml.safe_load((here / "out" / "llmsparse_recipe.yaml").read_text())["calibration"] == "../code.txt"
    assert "sources" not in json.loads((here / "out" / "llmsparse_report.json").read_text())["perplexity"]


def test_a_factorization_takes_several_texts_too(here: Path) -> None:
    options = ["--experts", "4", "--shared", "1", "--active", "1", "router_steps=5", "--seq-len", "32"]
    given = ["--calibration", "code.txt", "--calibration", "me@home.jsonl", "--calibration-samples", "16"]
    found = run("factorize", "model", "-o", "out", *given, *options)["perplexity"]["sources"]
    assert [len(found), *(one["windows"] for one in found)] == [2, 16, 16]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--calibration", "code.txt@0"], "--calibration: code.txt@0: got '0' behind @"),
        (["--calibration", "code.txt", "--calibration", "code.txt"], "is named twice"),
        (["calibration=[]"], "wanted a text such as c4"),
        (["calibration=[code.txt, 3]"], "wanted a text such as c4"),
        (["--calibration", "code.txt@500", "--calibration", "me@home.jsonl"], "is none of 9 windows"),
    ],
)
def test_a_mix_that_cannot_be_is_one_line_and_writes_nothing(
    here: Path, given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", "model", "-o", "out", *QUICK, *given]) == 2
    printed = capsys.readouterr().err.strip()
    assert said in printed and "\n" not in printed and not list(here.glob("out*"))


def test_the_text_that_loses_most_is_warned_of() -> None:
    worst = {"source": "code.txt", "before": 2.0, "after": 8.0, "windows": 8, "seq_len": 16}
    other = worst | {"source": "c4", "after": 2.1}
    found = {"before": 2.0, "after": 2.9, "windows": 16, "seq_len": 16, "sources": [worst, other]}
    assert loss_warning(found, "it", "; beware") == ["perplexity on code.txt rose 4.0-fold; beware"]
    assert [text.partition(" of ")[0] for _, text in perplexity_lines(found)] == [
        "2 → 8 on 8 held-out windows",
        "2 → 2.1 on 8 held-out windows",
    ]
    assert spell_protocol({"sources": [{"source": "c4", "weight": 2.0, "split": "train"}]}) == "c4 by 2 (split train)"
