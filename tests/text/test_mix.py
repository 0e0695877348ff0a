"""Several texts in shares: exact counts, seeded order, held-out windows of each, and what cannot be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from llmsparse.errors import CalibrationError
from llmsparse.text.mix import held_out_parts, load_mix
from llmsparse.text.shares import Share, apportion, holds_tokens, split_share, split_shares
from llmsparse.text.windows import load_windows

SEQ = 16


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def texts(tmp_path: Path) -> tuple[str, str]:
    """A file of a's and one of b's, the latter with an @ in its name."""
    (tmp_path / "a.txt").write_text("a" * 20_000, encoding="utf-8")
    (tmp_path / "me@home.jsonl").write_text("\n".join(json.dumps({"text": "b" * 500}) for _ in range(40)))
    return str(tmp_path / "a.txt"), str(tmp_path / "me@home.jsonl")


def mix(sources: Any, tokenizer: Any, **options: Any) -> Any:
    return load_mix(sources, tokenizer, **{"seq_len": SEQ, "samples": 30, "seed": 0, "held_out": 16, **options})


@pytest.mark.parametrize(
    ("text", "source", "weight"),
    [
        ("c4", "c4", 1),
        ("c4@2", "c4", 2),
        ("c4@.5", "c4", 0.5),
        ("org/name:train@1e-2", "org/name:train", 0.01),
        ("notes.txt@3", "notes.txt", 3),
        ("me@home.txt", "me@home.txt", 1),
        ("me@home.txt@3", "me@home.txt", 3),
        ("/srv/me@work/code.jsonl.gz", "/srv/me@work/code.jsonl.gz", 1),
        ("wikitext2:/srv/a@2.txt", "wikitext2:/srv/a@2.txt", 1),
        ("2@2.safetensors", "2@2.safetensors", 1),
    ],
)
def test_what_stands_behind_the_last_at_is_a_weight_unless_it_ends_as_a_file_does(
    text: str, source: str, weight: float
) -> None:
    assert split_share(text) == (source, weight)


@pytest.mark.parametrize(
    "wrong", ["c4@0", "c4@-1", "c4@nan", "c4@inf", "c4@1e999", "c4@1e308", "c4@1e-308", "c4@", "c4@two", "@2", "a@b@c4"]
)
def test_a_weight_that_is_no_positive_number_is_one_line(wrong: str) -> None:
    with pytest.raises(CalibrationError, match="wanted the weight of a text, a positive number") as caught:
        split_share(wrong)
    assert "\n" not in str(caught.value)


@given(st.integers(1, 500), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
def test_windows_are_divided_exactly_and_by_less_than_one_from_their_share(windows: int, weights: list[float]) -> None:
    shares = [Share(f"t{n}.txt", weight) for n, weight in enumerate(weights)]
    try:
        counts = apportion(windows, shares)
    except CalibrationError:
        assert min(weights) / sum(weights) * windows < 1
        return
    assert sum(counts) == windows and min(counts) > 0
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - windows * weight / sum(weights)) < 1 + 1e-6


def test_a_mix_holds_each_text_in_its_share_and_in_seeded_order(texts: tuple[str, str], tokenizer: Any) -> None:
    a, b = texts
    windows = mix([f"{a}@2", b], tokenizer)
    of_a = ["a" in tokenizer.decode(row) for row in windows.ids]
    assert sum(of_a) == 20 and len(of_a) == 30
    assert of_a != sorted(of_a) and of_a != sorted(of_a, reverse=True), "not one text after the other"
    again, other = mix([f"{a}@2", b], tokenizer), mix([f"{a}@2", b], tokenizer, seed=1)
    assert again.fingerprint == windows.fingerprint != other.fingerprint
    assert [(name, len(part)) for name, part in held_out_parts(windows)] == [("a.txt", 8), ("me@home.jsonl", 8)]
    for (_, part), letter in zip(held_out_parts(windows), "ab", strict=True):
        assert set(tokenizer.decode(part.flatten())) == {letter}
    sources = windows.protocol["sources"]
    assert [one["source"] for one in sources] == ["a.txt", "me@home.jsonl"]
    assert [(one["weight"], one["windows"]) for one in sources] == [(2.0, 20), (1.0, 10)]
    assert json.loads(json.dumps(windows.protocol)) == windows.protocol


def test_each_text_gives_the_windows_that_it_would_give_alone(texts: tuple[str, str], tokenizer: Any) -> None:
    a, b = texts
    windows = mix([b, a], tokenizer, samples=12)
    alone = load_windows(b, tokenizer, seq_len=SEQ, samples=6, seed=0, held_out=8)
    rows = [row for row in windows.ids if "b" in tokenizer.decode(row)]
    assert sorted(row.tolist() for row in rows) == sorted(alone.ids.tolist())
    assert torch.equal(held_out_parts(windows)[0][1], alone.held_out)


def test_one_text_whatever_its_weight_is_as_if_there_were_no_mixes(texts: tuple[str, str], tokenizer: Any) -> None:
    a, _ = texts
    alone = load_windows(a, tokenizer, seq_len=SEQ, samples=30, seed=0, held_out=16)
    for sources in (a, f"{a}@7", [a]):
        found = mix(sources, tokenizer)
        assert (found.fingerprint, found.protocol, found.held_out_of) == (alone.fingerprint, alone.protocol, ())


def test_stored_tokens_in_a_mix_say_how_long_a_window_is(
    texts: tuple[str, str], tokenizer: Any, tmp_path: Path
) -> None:
    ids = torch.arange(40 * 24).view(40, 24) % 384
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    stored = str(tmp_path / "ids.safetensors")
    windows = mix([texts[0], stored], tokenizer, seq_len=None)
    assert windows.ids.shape == (30, 24) and holds_tokens([texts[0], stored])
    rows = {tuple(row.tolist()) for row in windows.ids}
    assert {tuple(row) for row in ids[:15].tolist()} <= rows
    assert torch.equal(held_out_parts(windows)[1][1], ids[15:23])


@pytest.mark.parametrize(
    ("sources", "options", "said"),
    [
        (["A", "A@2"], {}, "is named twice; name it once, with the weight of both"),
        (["A@1000", "B"], {}, "is none of 30 windows; give it more weight"),
        (["A", "B"], {"samples": 1}, "is none of 1 windows"),
        (["A@1e-3", "B@9999"], {"samples": 10**8}, "and its share is"),
        (["A", "B@4"], {"samples": 2000}, "give more of it, a smaller weight, or fewer --calibration-samples"),
        (["A", "builtin"], {"text_field": "text"}, "no table is among the texts"),
        (["A", "missing.txt"], {}, "no such file"),
        (["T", "U"], {"seq_len": None}, "a mix takes rows of one length"),
    ],
)
def test_a_mix_that_cannot_be_is_one_line(
    texts: tuple[str, str], tokenizer: Any, tmp_path: Path, sources: list[str], options: dict[str, Any], said: str
) -> None:
    named = {"A": texts[0], "B": texts[1]} | {name: str(tmp_path / f"{name}.safetensors") for name in "TU"}
    for name, length in (("T", 8), ("U", 9)):
        save_file({"input_ids": torch.zeros(40, length, dtype=torch.int64)}, named[name])
    given = ["@".join([named.get(name, name), *rest]) for name, *rest in (source.split("@") for source in sources)]
    with pytest.raises(CalibrationError) as caught:
        mix(given, tokenizer, **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_column_is_looked_for_where_there_are_columns(texts: tuple[str, str], tokenizer: Any) -> None:
    assert len(mix(list(texts), tokenizer, text_field="text").ids) == 30
    with pytest.raises(CalibrationError, match="no column 'body'"):
        mix(list(texts), tokenizer, text_field="body")


def test_weights_are_relative(texts: tuple[str, str], tokenizer: Any) -> None:
    a, b = texts
    assert mix([f"{a}@2", b], tokenizer).fingerprint == mix([f"{a}@1", f"{b}@0.5"], tokenizer).fingerprint
    assert math.isclose(split_shares([f"{b}@0.5"])[0].weight, 0.5)
