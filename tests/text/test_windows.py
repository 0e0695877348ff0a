from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import llmsparse
from llmsparse.errors import CalibrationError, LlmsparseError, MachineError
from llmsparse.text.windows import Windows, load_evaluation, load_windows

SEQ = 16


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="module")
def bos_tokenizer(tokenizer_folder: Path) -> Any:
    """The same, with <s> in front of each text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


@pytest.fixture
def story(tmp_path: Path, text: str) -> str:
    """One text of some thousand tokens."""
    (tmp_path / "story.txt").write_text(text[:20_000], encoding="utf-8")
    return str(tmp_path / "story.txt")


@pytest.fixture
def stories(tmp_path: Path, text: str) -> str:
    """40 texts, the i-th of them made of a character of its own."""
    rows = [{"text": chr(0x100 + i) * 200, "id": i} for i in range(40)]
    (tmp_path / "stories.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(tmp_path / "stories.jsonl")


def load(source: str, tokenizer: Any, **options: Any) -> Windows:
    return load_windows(source, tokenizer, **{"seq_len": SEQ, "samples": 8, "seed": 0, **options})


def refusal(load: Callable[[], Windows], kind: type[LlmsparseError] = CalibrationError) -> str:
    with pytest.raises(kind) as caught:
        load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows(windows: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for row in windows.tolist()}


def test_a_text_is_cut_into_full_windows_in_order(story: str, tokenizer: Any) -> None:
    windows = load_evaluation(story, tokenizer, seq_len=SEQ)
    ids = tokenizer(Path(story).read_text(encoding="utf-8"), verbose=False)["input_ids"]
    count = len(ids) // SEQ
    assert windows.ids.dtype == torch.int64
    assert windows.ids.flatten().tolist() == ids[: count * SEQ]
    assert windows.protocol["tokens"] == count * SEQ and windows.protocol["windows"] == count
    assert torch.equal(load_evaluation(story, tokenizer, seq_len=SEQ, limit=3).ids, windows.ids[:3])


def test_special_tokens_stand_once_in_each_text(stories: str, bos_tokenizer: Any, tokenizer: Any) -> None:
    windows = load_evaluation(stories, bos_tokenizer, seq_len=SEQ)
    plain = bos_tokenizer(chr(0x100) * 200, add_special_tokens=False)["input_ids"]
    assert windows.ids.flatten()[: len(plain) + 2].tolist() == [0, *plain, 0]
    assert windows.protocol["special_tokens"] == "<s>, once per text"
    assert load_evaluation(stories, tokenizer, seq_len=SEQ).protocol["special_tokens"] == "none"


def test_windows_are_a_seeded_choice_of_all(story: str, tokenizer: Any) -> None:
    every = rows(load_evaluation(story, tokenizer, seq_len=SEQ).ids)
    first, again, other = load(story, tokenizer), load(story, tokenizer), load(story, tokenizer, seed=1)
    assert torch.equal(first.ids, again.ids) and first.fingerprint == again.fingerprint
    assert not torch.equal(first.ids, other.ids) and first.fingerprint != other.fingerprint
    assert len(rows(first.ids)) == 8 and rows(first.ids) <= every
    assert first.held_out.shape == (0, SEQ)
    assert first.protocol["seed"] == 0 and first.protocol["file"] == "story.txt"


def test_held_out_windows_of_one_text_are_others_of_its_windows(story: str, tokenizer: Any) -> None:
    windows = load(story, tokenizer, samples=20, held_out=10)
    assert windows.ids.shape == (20, SEQ) and windows.held_out.shape == (10, SEQ)
    assert not rows(windows.ids) & rows(windows.held_out)
    assert "of the same texts" in windows.protocol["held_out_from"]
    assert windows.fingerprint != load(story, tokenizer, samples=20, held_out=9).fingerprint


def test_held_out_windows_come_from_other_texts_where_there_are_several(stories: str, tokenizer: Any) -> None:
    windows = load(stories, tokenizer, samples=50, held_out=20)
    used, held = (set(tokenizer.decode(part.flatten())) - {"\ufffd"} for part in (windows.ids, windows.held_out))
    assert used and held and not used & held
    assert windows.protocol["held_out_from"] == "other texts"


def test_a_short_text_is_used_up_and_says_so(story: str, tokenizer: Any) -> None:
    total = len(load_evaluation(story, tokenizer, seq_len=SEQ).ids)
    windows = load(story, tokenizer, samples=10_000)
    assert len(windows.ids) == total
    assert windows.protocol["note"] == f"the text has fewer windows than asked: {total} of 10000 used"
    shared = load(story, tokenizer, samples=10_000, held_out=10_000)
    assert len(shared.held_out) == total // 8 and len(shared.ids) == total - total // 8
    assert "note" not in load(story, tokenizer).protocol


def test_samples_come_before_windows_to_hold_out(story: str, tokenizer: Any) -> None:
    total = len(load_evaluation(story, tokenizer, seq_len=SEQ).ids)
    assert len(load(story, tokenizer, samples=total - total // 4, held_out=total).held_out) == total // 4


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_local_tables_are_read_by_their_text_column(tmp_path: Path, tokenizer: Any, name: str) -> None:
    table = {"text": ["one text of some words " * 9, "", "another of other words " * 9], "title": ["a", "b", "c"]}
    path = tmp_path / name
    if name == "rows.parquet":
        from pyarrow import parquet
        from pyarrow import table as make

        parquet.write_table(make(table), path)
    else:
        records = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
        path.write_text("\n".join(map(json.dumps, records)) if name == "rows.jsonl" else json.dumps(records))
    windows = load_evaluation(str(path), tokenizer, seq_len=8)
    whole = [token for text in table["text"] for token in tokenizer(text)["input_ids"]]
    assert windows.ids.flatten().tolist() == whole[: len(whole) // 8 * 8]
    titles = load_evaluation(str(path), tokenizer, seq_len=3, text_field="title")
    assert tokenizer.decode(titles.ids[0]) == "abc"


def test_a_single_column_of_text_needs_no_name(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"story": "some words " * 20, "id": 3}) + "\n")
    assert len(load_evaluation(str(path), tokenizer, seq_len=8).ids) > 0


def test_stored_tokens_are_taken_as_they_are(tmp_path: Path) -> None:
    ids = torch.randint(0, 384, (10, 12), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    source = str(tmp_path / "ids.safetensors")
    windows = load_windows(source, None, seq_len=None, samples=6, seed=5, held_out=3, vocabulary=384)
    assert torch.equal(windows.ids, ids[:6].long()) and torch.equal(windows.held_out, ids[6:9].long())
    assert windows.protocol["seq_len"] == 12 and windows.protocol["file"] == "ids.safetensors"
    assert torch.equal(load_evaluation(source, None, seq_len=12).ids, ids.long())
    assert "10 of 128 used" in load_windows(source, None, seq_len=None, samples=128, seed=0).protocol["note"]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32])
def test_stored_tokens_may_be_unsigned(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"input_ids": torch.full((2, 12), 383).to(dtype)}, tmp_path / "ids.safetensors")
    windows = load_evaluation(str(tmp_path / "ids.safetensors"), None, seq_len=None, vocabulary=384)
    assert windows.ids.dtype == torch.int64 and windows.ids.unique().tolist() == [383]


@pytest.mark.parametrize(
    ("tensors", "options", "complaint"),
    [
        ({"input_ids": torch.zeros(2, 12, dtype=torch.long)}, {"seq_len": 8}, "rows of 12 tokens, but --seq-len is 8"),
        ({"tokens": torch.zeros(2, 12, dtype=torch.long)}, {}, "no tensor input_ids"),
        ({"input_ids": torch.zeros(2, 12)}, {}, "input_ids is float32 (2, 12), wanted integers (samples, tokens)"),
        ({"input_ids": torch.zeros(12, dtype=torch.long)}, {}, "wanted integers (samples, tokens)"),
        ({"input_ids": torch.zeros(0, 12, dtype=torch.long)}, {}, "wanted integers (samples, tokens)"),
        ({"input_ids": torch.zeros(2, 12, dtype=torch.complex64)}, {}, "wanted integers (samples, tokens)"),
        ({"input_ids": torch.zeros(4, 1, dtype=torch.long)}, {}, "rows of 1 token, wanted 2 or more"),
        ({"input_ids": torch.full((2, 12), 384)}, {}, "token id 384 is outside the model's vocabulary of 384"),
        ({"input_ids": torch.full((2, 12), -1)}, {}, "token id -1 is outside"),
    ],
)
def test_stored_tokens_that_do_not_fit_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], options: dict[str, Any], complaint: str
) -> None:
    save_file(tensors, tmp_path / "ids.safetensors")
    options = {"seq_len": None, "samples": 2, "seed": 0, "vocabulary": 384, **options}
    assert complaint in refusal(lambda: load_windows(str(tmp_path / "ids.safetensors"), None, **options))


def test_a_tokenizer_of_another_model_is_noticed(story: str, tokenizer: Any) -> None:
    assert "outside the model's vocabulary of 100" in refusal(lambda: load(story, tokenizer, vocabulary=100))


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.txt", b"", "is empty"),
        ("short.txt", b"hello", "shorter than one window of 16"),
        ("nul.txt", b"text\0more" * 99, "is binary"),
        ("latin.txt", b"\xe9t\xe9 " * 99, "is binary, or not UTF-8"),
        ("empty.jsonl", b"", "is empty"),
        ("empty.json", b"[]", "is empty"),
        ("blank.jsonl", b'{"text": ""}\n', "is empty"),
        ("torn.jsonl", b'{"text": "a\n', "cannot be read as json"),
        ("deep.jsonl", b'{"text": ' + b"[" * 1000 + b"]" * 1000 + b"}\n", "cannot be read as json"),
        ("torn.parquet", b"PAR1 not really", "cannot be read as parquet"),
        ("torn.safetensors", b"\xff" * 64, "is not a safetensors file"),
        (
            "two.jsonl",
            b'{"a": "x", "b": "y"}\n',
            "which column is the text? call it 'text', or name it with --text-field; it has a, b",
        ),
        ("number.jsonl", b'{"text": 5}\n', "row 1: 'text' holds 5, wanted text"),
        ("list.jsonl", b'{"text": ["a"]}\n', "row 1: 'text' holds ['a'], wanted text"),
        ("later.jsonl", b'{"text": "a"}\n{"text": 5}\n', "row 2: 'text' holds 5, wanted text"),
        ("notes.md", b"# words", "unknown kind of file, wanted .txt, .jsonl"),
        ("folder", None, "is a folder"),
        ("absent.txt", None, "no such file"),
        ("absent.safetensors", None, "no such file"),
    ],
)
def test_files_that_cannot_be_used_are_refused(
    tmp_path: Path, tokenizer: Any, name: str, content: bytes | None, complaint: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    elif name == "folder":
        path.mkdir()
    for attempt in (load, load_evaluation):
        options = {"seq_len": SEQ} if attempt is load_evaluation else {}
        message = refusal(lambda: attempt(str(path), tokenizer, **options))  # noqa: B023
        assert complaint in message and str(path) in message


def test_a_column_that_is_not_there_is_refused(stories: str, tokenizer: Any) -> None:
    assert "no column 'body'; it has text, id" in refusal(lambda: load(stories, tokenizer, text_field="body"))
    assert "row 1: 'id' holds 0, wanted text" in refusal(lambda: load(stories, tokenizer, text_field="id"))


def test_a_text_file_has_no_columns(story: str, tokenizer: Any) -> None:
    assert "no column 'body'; a .txt file is one text" in refusal(lambda: load(story, tokenizer, text_field="body"))
    assert torch.equal(load(story, tokenizer, text_field="text").ids, load(story, tokenizer).ids)


def test_builtin_calibrates_and_evaluates_on_different_modules(tokenizer: Any) -> None:
    calibration = load("builtin", tokenizer, samples=64, held_out=8)
    evaluation = load_evaluation("builtin", tokenizer, seq_len=SEQ, limit=64)
    assert calibration.protocol["python"] == evaluation.protocol["python"] == sys.version.split()[0]
    assert "calibration" in calibration.protocol["text"] and "evaluation" in evaluation.protocol["text"]
    assert not rows(calibration.ids) & rows(evaluation.ids)
    assert len(calibration.held_out) == 8 and not rows(calibration.held_out) & rows(calibration.ids)


@pytest.mark.parametrize("source", ["c4", "wikitext2", "org/name", "org/name:test"])
def test_datasets_are_refused_offline_with_what_to_use_instead(tokenizer: Any, source: str) -> None:
    name = source.partition(":")[0]
    assert refusal(lambda: load(source, tokenizer), MachineError) == (
        f"{name} cannot be read offline: "
        "use --calibration builtin (Python's standard library text) or --calibration FILE"
    )
    message = refusal(lambda: load_evaluation(source, tokenizer, seq_len=SEQ), MachineError)
    assert "use --text builtin" in message


def test_a_name_that_is_nothing_is_refused(tokenizer: Any) -> None:
    assert "no text 'wikitext'" in refusal(lambda: load("wikitext", tokenizer))


def put_in_hub_cache(home: Path, name: str, revision: str, file: str, content: bytes) -> None:
    """Lay a dataset's file where huggingface_hub would have put it: a link to a blob that is named by its hash."""
    folder = home / "hub" / f"datasets--{name.replace('/', '--')}"
    blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
    link = folder / "snapshots" / revision / file
    for path in (blob, link):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link.symlink_to(blob)


def test_pinned_files_in_the_hub_cache_are_used_offline(tmp_path: Path, tokenizer_folder: Path) -> None:
    from pyarrow import BufferOutputStream, parquet, table

    from llmsparse.text.sources import C4, C4_FILES, WIKITEXT, WIKITEXT_FILES

    for which in ("calibration", "evaluation"):
        documents = "\n".join(json.dumps({"text": f"document {i} of {which} " * 30, "url": "u"}) for i in range(50))
        put_in_hub_cache(tmp_path, *C4, C4_FILES[which][1], gzip.compress(documents.encode()))
        sink = BufferOutputStream()
        parquet.write_table(table({"text": ["", " = Title = \n", "words of an article " * 200]}), sink)
        put_in_hub_cache(tmp_path, *WIKITEXT, WIKITEXT_FILES[which][1], sink.getvalue().to_pybytes())
    code = f"""
import json
from transformers import AutoTokenizer
from llmsparse.text.windows import load_evaluation, load_windows
tokenizer = AutoTokenizer.from_pretrained({str(tokenizer_folder)!r})
c4 = load_windows("c4", tokenizer, seq_len=16, samples=8, seed=0, held_out=4)
wiki = load_evaluation("wikitext2", tokenizer, seq_len=16)
start = tokenizer("\\n\\n = Title = \\n\\n\\nwords of")["input_ids"]
print(json.dumps([c4.protocol, tokenizer.decode(c4.ids[0]), tokenizer.decode(c4.held_out[0]), wiki.protocol,
                  wiki.ids.flatten()[: len(start)].tolist() == start]))
"""
    package = str(Path(llmsparse.__file__).parents[1])
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": package}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    c4, first, held, wikitext, joined_by_blank_lines = json.loads(done.stdout)
    assert c4["dataset"] == "allenai/c4" and c4["revision"] == C4[1] and c4["split"] == "train"
    assert c4["choice"] == "first texts in order" and first.startswith("document 0 of calibration")
    assert held.startswith("document ") and not held.startswith("document 0 ")
    assert wikitext["dataset"] == "Salesforce/wikitext" and wikitext["split"] == "test" and joined_by_blank_lines
    assert not (tmp_path / "datasets").exists()  # nothing is left in the library's own cache
