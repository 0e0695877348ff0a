"""Whatever moment a run is killed at, it goes on to the bytes of one that was left alone, and nothing half-made is ever
seen under the final name. LLMSPARSE_KILLS is how many kills each verb takes in the slow tier."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from sparse import save_sparse
from warm_process import Kill, WarmProcess

import llmsparse
from llmsparse.errors import RecipeError
from tests.result_files import files

KILLS = int(os.environ.get("LLMSPARSE_KILLS", "40"))
WINDOWS: dict[str, Any] = {"calibration_samples": 8, "seq_len": 32, "device": "cpu"}
PRUNE: dict[str, Any] = {"method": "sparsegpt", "sparsity": 0.7, "match_steps": 4, "max_shard_size": "100KB"}
FACTORIZE: dict[str, Any] = {"experts": 4, "shared": 1, "active": 1, "router_steps": 20}
TUNE: dict[str, Any] = {"seq_len": 32, "batch_size": 8, "steps": 20, "save_every": 3, "device": "cpu"}
JOURNAL: list[Kill] = [("journal.jsonl", 2), ("journal.jsonl", 3)]  # the first block; when resumed, one after that
RUNS: dict[str, list[Kill]] = {
    "prune": JOURNAL,
    "prune to packed": JOURNAL,
    "factorize": JOURNAL,
    "shrink": JOURNAL,
    "quantize": JOURNAL,
    "activations": JOURNAL,
    "tune": [("tuning.pt", 2), ("tuning.pt", 2)],
    "pack": [("llmsparse_packed.json", 1)],
}


class Case:
    """A run of a verb that can be killed and taken up, and what it makes if it is left alone."""

    def __init__(self, process: WarmProcess, verb: str, out: Path, keys: dict[str, Any]) -> None:
        self._process, self.verb, self.out = process, verb, out
        self.keys = keys | {"output": str(out)}
        self.whole, self.seconds = dict[str, bytes](), 0.0

    def left_alone(self) -> None:
        seconds = self._process.run(self.verb, self.keys)
        assert seconds is not None
        self.whole, self.seconds = files(self.out), seconds
        shutil.rmtree(self.out)

    @property
    def noted(self) -> bool:
        """Whether there is a run to go on with."""
        return (self.out.with_name(self.out.name + ".partial") / ".llmsparse" / "run.json").exists()

    def killed(self, moments: list[Kill], old: Path | None = None) -> int:
        """Begin, in the place of an `old` result if there is one, be killed at each of these moments, go on, come to the
        end; how many kills came in time. What is there is the old, the new, or nothing."""
        how, before = {"overwrite": old is not None}, files(shutil.copytree(old, self.out)) if old else None
        kills = 0
        for moment in moments:
            if self._process.run(self.verb, self.keys | how, moment) is not None:
                break
            kills += 1
            if self.out.exists():
                assert files(self.out) in (before, self.whole), f"{self.verb}: half-made, killed at {moments[:kills]}"
                if files(self.out) == self.whole:
                    break
            if self.noted:
                how = {"overwrite": True} if self.verb == "pack" else {"resume": True}  # pack is begun anew
        else:
            assert self._process.run(self.verb, self.keys | how) is not None
        assert files(self.out) == self.whole, f"{self.verb}: other bytes, killed at {moments[:kills]}"
        assert not self.out.with_name(self.out.name + ".partial").exists()
        shutil.rmtree(self.out)
        return kills


@pytest.fixture(scope="module")
def process() -> Generator[WarmProcess, None, None]:
    with WarmProcess() as process:
        yield process


@pytest.fixture(scope="module")
def case_of(
    process: WarmProcess, tiny_llama: Callable[..., Path], text: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Case]:
    """A case by its name, left alone once."""
    folder = tmp_path_factory.mktemp("kills")
    notes = folder / "notes.txt"
    notes.write_text(text[:40_000], encoding="utf-8")
    dense, windows = str(tiny_llama(folder / "tiny", layers=4, shards=2)), WINDOWS | {"calibration": str(notes)}
    factorize = {"model": dense, **FACTORIZE, **windows}
    made: dict[str, Case] = {}

    def keys(name: str) -> dict[str, Any]:
        if name == "tune":
            process.run("factorize", factorize | {"output": str(folder / "moe")})
            return {"model": str(folder / "moe"), "teacher": dense, "text": str(notes), **TUNE}
        if name == "pack":
            sparse = save_sparse("llama", folder / "sparse", num_hidden_layers=12)
            return {"model": str(sparse), "max_shard_size": "40KB"}
        if name == "shrink":
            return {"model": dense, "ffn": "75%", "heads": "50%", **windows}
        if name == "quantize":
            return {"model": dense, "bits": 2.5, "match_steps": 4, **windows}
        if name == "activations":
            return {"model": dense, "sparsity": 0.5, **windows}
        prune = {"model": dense, "format": "packed" if "packed" in name else "dense", **PRUNE, **windows}
        return factorize if name == "factorize" else prune

    def case(name: str) -> Case:
        if name not in made:
            made[name] = Case(process, name.partition(" ")[0], folder / name.replace(" ", "-"), keys(name))
            made[name].left_alone()
        return made[name]

    return case


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_while_it_writes_goes_on_to_the_same_bytes(name: str, case_of: Callable[[str], Case]) -> None:
    assert case_of(name).killed(RUNS[name]) == len(RUNS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_at_random_moments_goes_on_to_the_same_bytes(
    name: str, case_of: Callable[[str], Case], tmp_path: Path
) -> None:
    """One to three times a run, every second one over an old result."""
    case, rng, kills, runs = case_of(name), random.Random(name), 0, 0
    old = tmp_path / "old"
    old.mkdir()
    for file in ("config.json", "model.safetensors", "README.md"):
        (old / file).write_text("old")
    while kills < KILLS:
        moments: list[Kill] = [case.seconds * rng.random() for _ in range(rng.choice((1, 1, 2, 3)))]
        kills += case.killed(moments[: KILLS - kills], old if runs % 2 else None)
        runs += 1
    print(f"{name}: {kills} kills in {runs} runs, all of the same bytes")


def test_a_killed_pack_is_begun_anew_by_leave(process: WarmProcess, case_of: Callable[[str], Case]) -> None:
    case = case_of("pack")
    assert process.run("pack", case.keys, ("llmsparse_packed.json", 1)) is None and case.noted
    with pytest.raises(RecipeError, match="an unfinished run is there; start anew with --overwrite"):
        llmsparse.pack(case.keys["model"], case.out)
    assert not case.out.exists()
    llmsparse.pack(**case.keys, overwrite=True)
    assert files(case.out) == case.whole
