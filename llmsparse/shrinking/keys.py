"""The keys of a shrinking recipe as the command line shows them; `recipe.py` checks values, and takes longer to load."""

from __future__ import annotations

from llmsparse.runs.keys import CALIBRATION, MACHINE, MAX_SHARD_SIZE, Key

HELP = """Take whole experts, blocks, FFN channels or heads out of MODEL: a smaller checkpoint that loads anywhere.

    llmsparse shrink Qwen/Qwen3-30B-A3B --experts 75%
    """
EXAMPLE = "match_steps=100"

KEYS = {  # of every key but model, by group
    "What stays": {
        "experts": Key("Routed experts in every layer: a share such as 75%, or a number.", None, "N|N%"),
        "blocks": Key("Blocks: a share, or a number.", None, "N|N%"),
        "ffn": Key("FFN channels in every layer: a share, or a number.", None, "N|N%"),
        "heads": Key("Attention heads in every layer, in whole key-value groups: a share, or a number.", None, "N|N%"),
    },
    "How it is chosen": {
        "score": Key(
            "Of experts: hope, reap, man, mass, frequency or random. Of blocks: suffix or influence. Repeatable.",
            "hope, suffix",
            "NAME",
            list,
        ),
        "scores": Key("What `llmsparse scores` wrote about this model's experts, instead of measuring.", None, "FILE"),
        "blend": Key(
            "Weight of a text of --scores, NAME@2; as measured if not given. Repeatable.", None, "NAME@W", list
        ),
        "one_pass": Key("Measure experts behind dense blocks, not behind shrunk ones.", kind=bool),
        "refit": Key("Fit what stays to the output of the whole layer, where that helps.", "refit", kind=bool),
        "match_steps": Key("Steps that tune a shrunk block to the output of the whole one; 0: off.", "0", "N"),
    },
    "Calibration": CALIBRATION,
    "Machine and model": MACHINE,
    "Output": {
        "output": Key("Folder to write; ./NAME-experts-75 and the like if not given.", None, "DIR"),
        "max_shard_size": MAX_SHARD_SIZE,
    },
}
