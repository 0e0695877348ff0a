"""How a model's own windows begin."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmsparse.errors import CalibrationError
from llmsparse.text.mix import load_mix, own_windows
from llmsparse.text.own_text import FREE, MOST_RANDOM, Starts
from llmsparse.text.sources import open_texts

NONE = SimpleNamespace()


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


def test_windows_begin_with_the_first_token_every_second_with_random_ones_behind(tokenizer: Any) -> None:
    starts = Starts.find(tokenizer, NONE, 384, "m")
    assert (starts.first, starts.end, starts.name) == (0, 1, "<s>")
    prefixes = starts.prefixes(400, 0)
    assert prefixes.shape == (400, 1 + MOST_RANDOM) and bool((prefixes[:, 0] == 0).all())
    given = (prefixes != FREE).sum(dim=1)
    assert set(given[::2].tolist()) == {1} and set(given[1::2].tolist()) == {2, 3, 4}
    assert {0, 1}.isdisjoint(prefixes[1::2, 1].tolist()), "no special tokens"
    assert len(prefixes[1::2, 1].unique()) > 100
    assert torch.equal(starts.prefixes(400, 0), prefixes) and not torch.equal(starts.prefixes(400, 1), prefixes)


def test_without_a_first_token_they_begin_with_random_ones(tokenizer: Any) -> None:
    starts = Starts(None, torch.arange(10, 20), None, "")
    prefixes = starts.prefixes(50, 0)
    assert bool((prefixes[:, 0] >= 10).all()) and "random" in starts.protocol["starts"]


def test_a_model_without_tokenizer_begins_as_its_config_says() -> None:
    starts = Starts.find(None, SimpleNamespace(bos_token_id=5), 97, "m")
    assert (starts.first, len(starts.others), starts.end) == (5, 0, None)
    assert (starts.prefixes(4, 0)[:, 1:] == FREE).all()


@pytest.mark.parametrize("config", [NONE, SimpleNamespace(bos_token_id=None), SimpleNamespace(bos_token_id=97)])
def test_a_model_without_a_way_to_start_is_one_line(config: Any) -> None:
    with pytest.raises(CalibrationError, match=r"self: \./m has no way to start a text") as caught:
        Starts.find(None, config, 97, "./m")
    assert "\n" not in str(caught.value)


def test_until_they_are_written_windows_have_a_shape_and_no_values(tokenizer: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / "notes.txt").write_text(text[:20_000])
    starts = Starts.find(tokenizer, NONE, 384, "m")
    options: dict[str, Any] = {"seq_len": 16, "samples": 12, "seed": 3, "held_out": 16, "starts": starts}
    planned = load_mix(["self@2", str(tmp_path / "notes.txt")], tokenizer, **options)
    assert planned.ids.is_meta and planned.ids.shape == (12, 16) and planned.held_out.shape == (16, 16)
    assert planned.unwritten is not None and (planned.unwritten.windows, planned.unwritten.calibration) == (16, 8)
    ids = torch.arange(16 * 16).view(16, 16)
    made = own_windows(planned.unwritten, ids)
    assert made.unwritten is None and not made.ids.is_meta and made.protocol == planned.protocol
    own = {tuple(row) for row in ids[:8].tolist()}
    assert len([row for row in made.ids.tolist() if tuple(row) in own]) == 8
    assert torch.equal(made.held_out[:8], ids[8:])
    again = load_mix(["self@2", str(tmp_path / "notes.txt")], tokenizer, **options)
    assert again.fingerprint == planned.fingerprint != load_mix("self", tokenizer, **options).fingerprint
    (tmp_path / "notes.txt").write_text(text[5_000:25_000])
    other = load_mix(["self@2", str(tmp_path / "notes.txt")], tokenizer, **options)
    assert other.fingerprint != planned.fingerprint, "the text that is there already is part of it"


@pytest.mark.parametrize("purpose", ["training", "evaluation"])
def test_nothing_is_trained_or_measured_on_what_the_model_would_write(purpose: Any) -> None:
    with pytest.raises(CalibrationError, match="self is for calibration alone"):
        open_texts("self", purpose)
