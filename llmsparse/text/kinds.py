"""Which kind of text a name stands for, by its ending: a plain file, a table, stored tokens. Looks at no disk."""

from __future__ import annotations

from pathlib import Path

TEXT_SUFFIX, TOKEN_FILE_SUFFIX = ".txt", ".safetensors"
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # of tables, read through `datasets`
COMPRESSED = (".gz", ".zst")  # behind .json and .jsonl
KINDS = f"{TEXT_SUFFIX}, {', '.join(BUILDERS)} (.json and .jsonl also with .gz or .zst behind) or {TOKEN_FILE_SUFFIX}"
WIKITEXT_COPY = "wikitext2:"  # before a file: rows joined as of wikitext2
SELF = "self"  # text that the model writes itself, to be calibrated on
AUTO = "auto"  # text that is chosen by what can be had
KNOWN = ("builtin", "c4", "wikitext2", SELF, AUTO)  # texts that have a name


def file_kind(path: Path) -> str | None:
    """The ending of a file of text, in lower case, without that of its compression; None for another."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix) if name.removesuffix(suffix).endswith((".json", ".jsonl")) else name
    return next((suffix for suffix in (TEXT_SUFFIX, *BUILDERS) if name.endswith(suffix)), None)


def is_token_file(source: str) -> bool:
    """Whether a source names stored tokens, which need no tokenizer."""
    return source.lower().endswith(TOKEN_FILE_SUFFIX)


def is_file_name(source: str) -> bool:
    """Whether a source ends as a file does that can be read."""
    return is_token_file(source) or file_kind(Path(source)) is not None


def has_columns(source: str) -> bool:
    """Whether a source is a table, of which a column may be named."""
    return not (source in KNOWN or is_token_file(source) or file_kind(Path(source)) == TEXT_SUFFIX)
