"""Mixtures that are three times as large as the memory that their experts are allowed: tokens a second by who reads them, and when.

`python -m eval.expert_memory [--shapes small,middle,large] [--rounds 7]` builds synthetic mixtures, packs them, and decodes by turns:

    in memory     all experts, the same kernels
    on demand     an expert that is not there is read when it is to be multiplied, past the page cache
    mapped        the same out of a mapped file: the kernel reads pages as they are touched
    threads       what `--expert-memory` does, but nothing is foreseen: a layer's experts are asked for together
    foreseen      what `--expert-memory` does

All but the first keep what was used last in the same third of the experts' bytes, and what they read is not in the page cache: it is
dropped before a run and after each read. Routers are random and a token's hidden state changes little from layer to layer, as
in trained models; experts of a token are as good as independent of the last one's, as they are not in trained models. Appends
medians to eval/results/expert_memory.csv.
"""

from __future__ import annotations

import argparse
import datetime
import mmap
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import llmsparse
from eval.table import append
from llmsparse.backends.cpu.pages import Arena
from llmsparse.inference import decode, foresight, on_disk
from llmsparse.inference.expert_memory import Tally
from llmsparse.inference.expert_readers import ExpertReaders, Key
from llmsparse.inference.leaving import on_disk_of
from llmsparse.inference.load import load_model
from llmsparse.storage import direct

RESULTS = Path(__file__).parent / "results" / "expert_memory.csv"
SHAPES = {  # width, inner width, experts, layers, experts of a token
    "small": (512, 256, 128, 16, 8),
    "middle": (1024, 512, 64, 12, 4),
    "large": (2048, 1024, 32, 8, 2),
}
QUIET = (
    0.1  # of the machine's processors: a round in which others took more is not counted, unless they gave way at once
)
SHARE = 3  # experts' bytes on disk over the memory they are allowed
RIVALS = ("in memory", "on demand", "mapped", "threads", "foreseen")


@torch.no_grad()
def build(folder: Path, name: str) -> Path:
    """A packed mixture, 70 % of its experts' weights zero."""
    width, inner, experts, layers, k = SHAPES[name]
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=2048, hidden_size=width, intermediate_size=4 * width, moe_intermediate_size=inner, num_experts=experts,
        num_experts_per_tok=k, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
        max_position_embeddings=2048, tie_word_embeddings=False, norm_topk_prob=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for key, parameter in model.named_parameters():
        if parameter.dim() == 3:
            for one in parameter:
                one.masked_fill_(torch.rand(one.shape) < 0.7, 0.0)
        if "embed_tokens" in key:
            parameter.normal_(0, 1)
        elif key.endswith("down_proj"):
            parameter.mul_(4)
    model.save_pretrained(folder / "dense")
    del model
    llmsparse.pack(str(folder / "dense"), folder / "packed")
    shutil.rmtree(folder / "dense")
    os.sync()  # what is not written yet cannot be dropped from the page cache
    return folder / "packed"


class OnDemand:
    """ExpertMemory without threads: the same experts stay, one that is not there is read when it is its turn."""

    def __init__(self, readers: ExpertReaders, arenas: Sequence[Arena], size: Callable[[Key], int]) -> None:
        self.tally, self.room, self.close = Tally(), len(arenas), readers.close
        self._readers, self._free, self._size = readers, list(arenas), size
        self._held: OrderedDict[Key, tuple[Arena, Any]] = OrderedDict()

    def arriving(self, layer: int, experts: Sequence[int], ahead: object = None) -> Iterator[tuple[int, Any]]:
        for key in ((layer, expert) for expert in experts):
            self.tally.asked += 1
            self.tally.found += key in self._held
            if key not in self._held:
                arena = self._free.pop() if self._free else self._held.popitem(last=False)[1][0]
                self._held[key] = arena, self._readers.now(key, arena)
                self.tally.read += 1
                self.tally.read_bytes += self._size(key)
            self._held.move_to_end(key)
            yield key[1], self._held[key][1]

    def foresee(self, keys: Sequence[Key]) -> None:
        pass


class MappedFile(direct.DirectFile):
    """Read by touching pages of a mapping, which are given up again."""

    by_number = False
    _mapping: mmap.mmap | None = None

    def read(self, begin: int, end: int, memory: mmap.mmap, at: int) -> int:
        if self._mapping is None:
            self._number = os.open(self.file, os.O_RDONLY)
            self._mapping = mmap.mmap(self._number, 0, prot=mmap.PROT_READ)
        memory[at : at + end - begin] = self._mapping[begin:end]
        first = begin // direct.BLOCK * direct.BLOCK
        self._mapping.madvise(mmap.MADV_DONTNEED, first, end - first)
        assert self._number is not None
        os.posix_fadvise(self._number, first, end - first, os.POSIX_FADV_DONTNEED)
        return at


class ModelledDisk(direct.DirectFile):
    """A disk that hands over `BYTES_A_SECOND`, one read after the other, whoever asks; its bytes are in the page cache."""

    by_number = False
    BYTES_A_SECOND = 0.0
    free = 0.0  # from when on
    turn = threading.Lock()

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        self._direct = False

    def read(self, begin: int, end: int, memory: mmap.mmap, at: int) -> int:
        with self.turn:
            ModelledDisk.free = max(self.free, time.perf_counter()) + (end - begin) / self.BYTES_A_SECOND
            until = self.free
        with open(self.file, "rb", buffering=0) as file:
            file.seek(begin)
            file.readinto(memoryview(memory)[at : at + end - begin])
        time.sleep(max(0.0, until - time.perf_counter()))
        return at


def load(folder: Path, rival: str, size: int) -> Any:
    """The model, its experts in the hands of a rival."""
    if not ModelledDisk.BYTES_A_SECOND:
        drop(folder)
    place = {"device": torch.device("cpu"), "backend": "cpu-bitmask"}
    if rival == "in memory":
        return load_model(folder, **place)
    kind = ModelledDisk if ModelledDisk.BYTES_A_SECOND else MappedFile if rival == "mapped" else direct.DirectFile
    memory = on_disk.ExpertMemory if rival in ("threads", "foreseen") else OnDemand
    with (
        mock.patch.object(on_disk, "ExpertMemory", memory),
        mock.patch("llmsparse.inference.stored_experts.DirectFile", kind),
    ):
        return load_model(folder, expert_memory=size, **place)


def drop(folder: Path) -> None:
    """Out of the page cache."""
    for file in folder.glob("*.safetensors"):
        number = os.open(file, os.O_RDONLY)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


@dataclass
class Answer:
    """What came after a prompt; all figures are of what came after the first token."""

    tokens: list[int]
    speed: float  # tokens a second
    others: float  # share of the machine's processors that other processes took
    tally: Tally


def answer(model: Any, rival: str, prompt: torch.Tensor, new: int) -> Answer:
    on = on_disk_of(model)
    with mock.patch.object(foresight, "DEPTH", 0 if rival == "threads" else foresight.DEPTH):
        coming = decode.decode(model, prompt, new)
        tokens = [next(coming)]
        before, busy, own, started = Tally(), busy_seconds(), sum(os.times()[:2]), time.perf_counter()
        if on is not None:
            before = replace(on.memory.tally)
        tokens += coming
        seconds = time.perf_counter() - started
    others = (busy_seconds() - busy - (sum(os.times()[:2]) - own)) / (os.cpu_count() or 1) / seconds
    spent = (
        Tally()
        if on is None
        else Tally(*(a - b for a, b in zip(astuple(on.memory.tally), astuple(before), strict=True)))
    )
    return Answer(tokens, (len(tokens) - 1) / seconds, others, spent)


def busy_seconds() -> float:
    """That all processors have worked for anybody."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, irq, softirq, *_ = map(int, file.readline().split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def before_others() -> bool:
    """Whether it runs at real-time priority (`chrt -r 5`): who runs at a usual one gives way."""
    return os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR)


def compare(folder: Path, name: str, rounds: int, new: int) -> list[dict[str, Any]]:
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    models = {rival: load(folder, rival, stored // SHARE) for rival in RIVALS}
    answers: dict[str, list[Answer]] = {rival: [] for rival in RIVALS}
    disturbed = 0
    while len(answers["foreseen"]) <= rounds and disturbed < 5 * rounds:  # the first fills the memories
        number = len(answers["foreseen"])
        prompt = torch.arange(number * 20 + 1, number * 20 + 17)[None]
        found = {rival: answer(model, rival, prompt, new) for rival, model in models.items()}
        print(name, *(f"{rival} {one.speed:.2f} ({one.others:.0%})" for rival, one in found.items()), flush=True)
        if number and not before_others() and max(one.others for one in found.values()) > QUIET:
            disturbed += 1
            continue
        assert all(one.tokens == found["in memory"].tokens for one in found.values())
        for rival, one in found.items():
            answers[rival].append(one)
    width, inner, experts, layers, k = SHAPES[name]
    on = on_disk_of(models["foreseen"])
    assert on is not None
    rows: list[dict[str, Any]] = []
    for rival, (_, *counted) in answers.items():
        speeds = [one.speed for one in counted]
        ratios = [one.speed / base.speed for one, base in zip(counted, answers["on demand"][1:], strict=True)]
        asked = max(1, sum(one.tally.asked for one in counted))
        rows.append(
            {
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "experts": f"{layers} x {experts} of {width} x {inner}, {k} a token",
                "expert_kb": round(on.layers[0].size(0) / 1000),
                "stored_mb": round(stored / 1e6),
                "memory_mb": "" if rival == "in memory" else round(stored / SHARE / 1e6),
                "read": rival,
                "tokens_a_second": round(statistics.median(speeds), 2),
                "least": round(min(speeds), 2),
                "most": round(max(speeds), 2),
                "over_on_demand": round(statistics.median(ratios), 2),
                "found": "" if rival == "in memory" else round(sum(one.tally.found for one in counted) / asked, 3),
                "foreseen": round(sum(one.tally.foreseen for one in counted) / asked, 3) if rival == "foreseen" else "",
                "mb_a_token": round(sum(one.tally.read_bytes for one in counted) / 1e6 / len(counted) / (new - 1), 1),
                "rounds": len(counted),
                "disturbed": disturbed,
                "others": round(statistics.median(one.others for one in counted), 2),
                "priority": "real-time" if before_others() else "usual",
                "threads": torch.get_num_threads(),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--scratch", help="folder on the disk that is to be read; what is built there stays")
    arguments = parser.parse_args()
    for name in arguments.shapes.split(","):
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            kept = Path(arguments.scratch or scratch) / name
            folder = kept / "packed" if (kept / "packed").is_dir() else build(kept, name)
            rows = compare(folder, name, arguments.rounds, arguments.new)
        append(RESULTS, rows)
        for row in rows:
            print(row)


if __name__ == "__main__":
    main()
