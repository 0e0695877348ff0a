"""The keys of a factorization recipe as the command line shows them; `recipe.py` checks values, and takes longer to load."""

from __future__ import annotations

from llmsparse.runs.keys import CALIBRATION, MACHINE, MAX_SHARD_SIZE, Key

HELP = """Turn the FFNs of a dense MODEL into a mixture of experts, without training.

    llmsparse factorize meta-llama/Llama-3.2-1B --recipe factorize-50
    """
EXAMPLE = "router_steps=100"

KEYS = {  # of every key but model, by group
    "Experts": {
        "experts": Key("Parts that each FFN is split into.", "16", "N"),
        "shared": Key("Of these, how many run for every token.", "4", "N"),
        "active": Key("Of the others, how many run for a token.", "4", "N"),
        "split": Key("clustered, contiguous or random: which neurons go together.", "clustered", "HOW"),
        "router": Key(
            "linear, gate-mean, prior-approximate or random: what chooses experts for a token.", "linear", "HOW"
        ),
        "router_steps": Key("Steps that train the router.", "300", "N"),
        "scale": Key("fitted, ratio (experts over active) or none: a factor on each expert.", "fitted", "HOW"),
        "refit": Key("Fit the down projections to the output of the dense FFN.", "refit", kind=bool),
        "container": Key("auto, glm4_moe, mixtral, qwen3_moe or qwen2_moe: what it is written as.", "auto", "NAME"),
        "keep_dense": Key("Blocks to leave as they are: none, or numbers such as 0,-1.", "none", "BLOCKS"),
    },
    "Calibration": CALIBRATION,
    "Machine and model": {name: MACHINE[name] for name in ("device", "dtype", "revision")},
    "Output": {
        "output": Key("Folder to write; ./NAME-factorize-PERCENT if not given.", None, "DIR"),
        "max_shard_size": MAX_SHARD_SIZE,
    },
}
