"""The keys of a recipe as the command line shows them: help, default, metavar.

Apart from `recipe.py`, which checks values, because `--help` must not wait for the libraries that takes.
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
WINDOW = "Tokens per window; min(2048, the model's maximum) if not given"
BATCH = "Windows run at once; chosen if not given"

KEYS = {  # of every key but model and rules, by group
    "What is pruned, and how": {
        "method": Key("sparsegpt, alps, dsnot, wanda, magnitude or random.", "sparsegpt", "NAME"),
        "sparsity": Key("Fraction of zeros: 0.7 or 70%.", None, "S"),
        "pattern": Key("unstructured, or N:M such as 2:4: keep 2 of every 4.", "unstructured", "N:M"),
        "scope": Key(
            "row or matrix: what an unstructured sparsity counts over; auto: as the method has it.", "auto", "SCOPE"
        ),
        "only": Key("Prune only weights whose name matches (repeatable).", None, "GLOB", list),
        "include": Key("Prune these too, such as lm_head (repeatable).", None, "GLOB", list),
        "exclude": Key("Leave weights whose name matches as they are (repeatable).", None, "GLOB", list),
        "keep_zeros": Key(
            "Leave what is 0 already at 0, whatever the method: to prune a sparse model further.", kind=bool
        ),
        "true_sequential": Key(
            "Measure a block's later weights on what its earlier ones became when pruned: slower.", kind=bool
        ),
        "match_steps": Key(
            "Steps that tune a pruned block to the dense one's output; auto: where affordable, 0: off.", "auto", "N"
        ),
    },
    "Calibration": {
        "calibration": Key(
            "c4, wikitext2, builtin, a .txt, .jsonl, .parquet or .safetensors file, wikitext2:FILE (a copy of it), or "
            "ORG/NAME:SPLIT.",
            "c4",
            "TEXT",
        ),
        "text_field": Key(f"{COLUMN}.", None, "COLUMN"),
        "calibration_samples": Key("Windows to calibrate on.", "128", "N"),
        "seq_len": Key(f"{WINDOW}.", None, "N"),
        "batch_size": Key(f"{BATCH}.", None, "N"),
        "seed": Key("Of all that is drawn: same seed, data and device, same bytes.", "0", "N"),
    },
    "Machine and model": {
        "device": Key("auto, cpu or cuda:0.", "auto", "DEVICE"),
        "dtype": Key("auto, float32, bfloat16 or float16, to compute in; the stored dtype stays.", "auto", "DTYPE"),
        "revision": Key("Branch, tag or commit on the hub.", None, "R"),
        "trust_remote_code": Key("Run the code that comes with the model.", kind=bool),
    },
    "Output": {
        "output": Key("Folder to write; ./NAME-METHOD-PERCENT if not given.", None, "DIR"),
        "format": Key("dense: ordinary, loads anywhere; packed: without the zeros.", "dense", "FORMAT"),
        "max_shard_size": Key("Size of the largest file to write.", "5GB", "SIZE"),
    },
}
