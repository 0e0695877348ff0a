"""Keys that the recipes of several verbs share, as the command line shows them: help, default, metavar.

Apart from `recipe.py`, which checks values, because `--help` must not wait for the libraries that takes. A verb's own
keys stand in its `keys.py`.
"""

from __future__ import annotations

from typing import NamedTuple


class Key(NamedTuple):
    """One key. `default` is what a user reads, None where `help` says what happens without it."""

    help: str
    default: str | None = None
    metavar: str | None = None
    kind: type = str  # str: the recipe makes a value of it; bool: a switch; list: may be given again


COLUMN = "Column of text, or of chats, where neither its name (text, messages) nor the lack of others says so"
BOS = "Where the token that begins a text stands: each, once (before the first text) or none; as the tokenizer does if not given"
WINDOW = "Tokens per window; min(2048, the model's maximum) if not given"
BATCH = "Windows run at once; chosen if not given"

CALIBRATION = {
    "calibration": Key(
        "c4, self (the model writes it), wikitext2, builtin, a file, wikitext2:FILE, ORG/NAME:SPLIT; several: c4@2, FILE@1.",
        "auto",
        "TEXT[@WEIGHT]",
        list,
    ),
    "text_field": Key(f"{COLUMN}.", None, "COLUMN"),
    "bos": Key(f"{BOS}.", None, "WHERE"),
    "calibration_samples": Key("Windows to calibrate on.", "128", "N"),
    "seq_len": Key(f"{WINDOW}.", None, "N"),
    "batch_size": Key(f"{BATCH}.", None, "N"),
    "seed": Key("Of all that is drawn: same seed and data, same bytes on a CPU.", "0", "N"),
}
MACHINE = {
    "device": Key("auto, cpu or cuda:0.", "auto", "DEVICE"),
    "dtype": Key("auto, float32, bfloat16 or float16, to compute in; the stored dtype stays.", "auto", "DTYPE"),
    "revision": Key("Branch, tag or commit on the hub.", None, "R"),
    "trust_remote_code": Key("Run the code that comes with the model.", kind=bool),
}
MAX_SHARD_SIZE = Key("Size of the largest file to write.", "5GB", "SIZE")
