"""Which column of a table is the text: never guessed. Chats go through the chat template."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import llmsparse
from llmsparse.errors import CalibrationError
from llmsparse.text.sources import open_texts
from llmsparse.text.windows import load_evaluation, load_windows

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
)
TURNS = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Well."}]
SPELLED = "[user] How are you?\n[assistant] Well.\n"


@pytest.fixture(scope="module")
def plain(tokenizer_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="module")
def chatty(tokenizer_folder: Path) -> Any:
    """A tokenizer with a chat template, which begins with <s> as the tokenizer itself does with every text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., str]:
    def write(*rows: dict[str, Any], name: str = "rows.jsonl") -> str:
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return str(tmp_path / name)

    return write


def texts(source: str, tokenizer: Any = None, **options: Any) -> list[str]:
    return ["".join(parts) for parts in open_texts(source, "calibration", tokenizer=tokenizer, **options).documents]


@pytest.mark.parametrize(
    "row",
    [
        {"id": 7, "messages": TURNS},
        {"id": "identity_7", "messages": TURNS},
        {"conversations": [{"from": "human", "value": "How are you?"}, {"from": "gpt", "value": "Well."}]},
        {"id": "x", "prompt": "How are you?", "completion": "Well."},
        {"prompt": TURNS[:1], "completion": TURNS[1:], "score": 0.5},
    ],
)
def test_chats_go_through_the_chat_template(row: dict[str, Any], chatty: Any, table: Callable[..., str]) -> None:
    found = open_texts(table(row, row), "calibration", tokenizer=chatty)
    assert ["".join(parts) for parts in found.documents] == [SPELLED, SPELLED]
    assert found.protocol["template"] == "the tokenizer's chat template"
    assert found.protocol["column"] in ("messages", "conversations", "prompt and completion")
    assert found.protocol["rows"] == "each a text, joined by nothing"


def test_what_the_tokenizer_puts_before_every_text_is_not_put_there_twice(
    chatty: Any, table: Callable[..., str]
) -> None:
    source = table(*[{"messages": TURNS}] * 20)
    ids = load_evaluation(source, chatty, seq_len=8).ids.flatten().tolist()
    whole = chatty.apply_chat_template(TURNS, tokenize=False)
    assert whole.startswith("<s>")
    wanted = chatty(whole, add_special_tokens=False)["input_ids"]
    assert ids[: len(wanted) + 1] == [*wanted, 0]


def test_a_chat_without_a_template_is_refused_by_name(plain: Any, table: Callable[..., str]) -> None:
    with pytest.raises(
        CalibrationError, match=r"'messages' holds chats, and .* no chat template .* it has id, messages"
    ):
        open_texts(table({"id": "a", "messages": TURNS}), "calibration", tokenizer=plain)
    with pytest.raises(CalibrationError, match="'prompt' and 'completion' holds chats"):
        open_texts(table({"prompt": "a", "completion": "b"}), "calibration", tokenizer=plain)
    assert texts(table({"prompt": "a", "completion": "b"}), plain, text_field="prompt") == ["a"]


def test_a_role_that_the_template_does_not_know_names_the_row(chatty: Any, table: Callable[..., str]) -> None:
    source = table({"messages": TURNS}, {"messages": [{"role": "referee", "content": "Stop."}]})
    with pytest.raises(CalibrationError, match=r"row 2: the chat template does not take it: unknown role referee"):
        texts(source, chatty)


@pytest.mark.parametrize(
    "row",
    [
        {"content": None, "title": "a title"},  # the text may well be in what the first row leaves out
        {"url": "http://x", "tokens": [1, 2]},
        {"id": "a", "meta": {"source": "b"}},
        {"id": "a", "dialog": TURNS},
    ],
)
def test_a_column_is_not_guessed_beside_another_that_may_be_the_text(
    row: dict[str, Any], chatty: Any, table: Callable[..., str]
) -> None:
    with pytest.raises(CalibrationError, match=f"which column is the text.* it has {', '.join(row)}$"):
        open_texts(table(row), "calibration", tokenizer=chatty)


def test_a_chat_column_of_another_name_may_be_named(chatty: Any, table: Callable[..., str]) -> None:
    assert texts(table({"id": "a", "dialog": TURNS}), chatty, text_field="dialog") == [SPELLED]


def test_numbers_beside_it_leave_no_doubt(table: Callable[..., str]) -> None:
    source = table({"story": "once", "id": 3, "score": 0.5, "kept": True}, {"story": None, "id": 4}, {"story": "twice"})
    assert texts(source) == ["once", "twice"]


@pytest.mark.parametrize("name", ["c4.json.gz", "C4.JSONL.GZ", "c4.jsonl.zst", "NOTES.JSONL"])
def test_tables_may_be_compressed_and_endings_in_any_case(name: str, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"text {i}", "url": "u"}) + "\n" for i in range(3)).encode()
    if name.endswith("zst"):
        if find_spec("zstandard") is None:
            (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd")
            with pytest.raises(CalibrationError, match="zstandard"):
                texts(str(tmp_path / name))
            return
        import zstandard

        lines = zstandard.compress(lines)
    (tmp_path / name).write_bytes(gzip.compress(lines) if name.lower().endswith("gz") else lines)
    found = open_texts(str(tmp_path / name), "calibration")
    assert ["".join(parts) for parts in found.documents] == ["text 0", "text 1", "text 2"]
    assert found.protocol["file"] == name and found.protocol["column"] == "text"


def test_a_damaged_archive_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "torn.json.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 2000)[:40])
    with pytest.raises(CalibrationError, match=r"torn\.json\.gz: cannot be read as json") as caught:
        texts(str(tmp_path / "torn.json.gz"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["notes.txt", "NOTES.TXT"])
def test_a_byte_order_mark_is_no_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbfOnce upon a time")
    assert texts(str(tmp_path / name)) == ["Once upon a time"]


WIKITEXT = ["", " = Title = \n", "", " Words of an article . \n", " More of them . \n", ""]


def test_a_local_copy_of_wikitext_may_be_joined_as_papers_do(tmp_path: Path, plain: Any) -> None:
    from pyarrow import parquet
    from pyarrow import table as make

    parquet.write_table(make({"text": WIKITEXT}), tmp_path / "wiki.parquet")
    (tmp_path / "wiki.test.raw.txt").write_text("\n = Title = \n\n Words of an article . \n More of them . \n\n")
    wanted = "\n\n".join(WIKITEXT)
    for name in ("wiki.parquet", "wiki.test.raw.txt"):
        found = open_texts(f"wikitext2:{tmp_path / name}", "evaluation")
        assert ["".join(parts) for parts in found.documents] == [wanted]
        assert found.protocol["rows"] == "joined by a blank line into one text" and found.protocol["file"] == name
    (tmp_path / "joined.txt").write_text(wanted)
    one, other = (
        load_evaluation(source, plain, seq_len=8).ids
        for source in (f"wikitext2:{tmp_path / 'wiki.parquet'}", str(tmp_path / "joined.txt"))
    )
    assert one.tolist() == other.tolist()
    each = open_texts(str(tmp_path / "wiki.parquet"), "evaluation")
    assert ["".join(parts) for parts in each.documents] == [row for row in WIKITEXT if row]
    assert each.protocol["rows"] == "each a text, joined by nothing"


def test_a_copy_of_wikitext_that_is_none_is_refused(tmp_path: Path, table: Callable[..., str]) -> None:
    with pytest.raises(CalibrationError, match="no such file"):
        open_texts(f"wikitext2:{tmp_path / 'absent.parquet'}", "evaluation")
    with pytest.raises(CalibrationError, match="no column 'text'; it has words"):
        open_texts(f"wikitext2:{table({'words': 'a'})}", "evaluation")


def test_choosing_what_to_hold_out_is_linear_in_the_number_of_texts(plain: Any, table: Callable[..., str]) -> None:
    """Its sum once grew with the texts chosen, for every text: counted here by the lengths that are asked for."""
    import torch

    from llmsparse.text import windows

    asked = 0

    class Counted(torch.Tensor):
        def __len__(self) -> int:
            nonlocal asked
            asked += 1
            return int(self.shape[0])

    texts = [torch.arange(8).as_subclass(Counted) for _ in range(400)]
    ids, held, origin = windows._draw(texts, 8, 100, 200, torch.Generator().manual_seed(0))
    assert ids.shape == (100, 8) and held.shape == (200, 8) and origin == "other texts"
    assert asked < 10 * len(texts)


def test_the_report_of_a_run_names_column_and_template(
    tiny_llama: Callable[..., Path], chatty: Any, table: Callable[..., str], tmp_path: Path
) -> None:
    model = tiny_llama(tmp_path / "model")
    chatty.save_pretrained(model)
    source = table(*[{"id": f"identity_{i}", "messages": TURNS} for i in range(200)])
    report = llmsparse.prune(
        model=str(model), output=str(tmp_path / "out"), method="wanda", sparsity=0.5, match_steps=0, seq_len=32,
        calibration=source, calibration_samples=8, device="cpu",
    )  # fmt: skip
    assert report.protocol["column"] == "messages" and "chat template" in report.protocol["template"]
    written = json.loads((tmp_path / "out" / "llmsparse_report.json").read_text())
    assert written["calibration"]["column"] == "messages"
    windows = load_windows(source, chatty, seq_len=32, samples=1, seed=0)
    assert "[user]" in chatty.decode(windows.ids[0]) and "identity" not in chatty.decode(windows.ids[0])
