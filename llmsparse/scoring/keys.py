"""The keys of a recipe for `scores` as the command line shows them; `recipe.py` checks values, and takes longer to load."""

from __future__ import annotations

from llmsparse.runs.keys import CALIBRATION, MACHINE, Key

HELP = """Measure what every routed expert of MODEL does, once, for `shrink` to any number of them.

    llmsparse scores Qwen/Qwen3-30B-A3B -o scores.safetensors
    """
EXAMPLE = "seq_len=512"

KEYS = {  # of every key but model, by group
    "Calibration": CALIBRATION,
    "Machine and model": MACHINE,
    "Output": {"output": Key("File to write; ./NAME-scores.safetensors if not given.", None, "FILE")},
}
