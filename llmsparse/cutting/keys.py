"""The keys of a recipe for `activations` as the command line shows them; `recipe.py` checks values, and takes longer to load."""

from __future__ import annotations

from llmsparse.runs.keys import CALIBRATION, MACHINE, MAX_SHARD_SIZE, Key

HELP = """Choose which inputs of its linear layers MODEL, dense, pruned or packed, leaves out for each token.

    llmsparse activations meta-llama/Llama-3.2-1B --sparsity 0.5
    """
EXAMPLE = "rule=topk"

KEYS = {  # of every key but model, by group
    "What is left out": {
        "sparsity": Key("Share of the inputs left out, weighed by the weights they meet: 0.5 or 50%.", None, "S"),
        "score": Key("wina: size times the norm of the weight's column; teal: size.", "wina", "NAME"),
        "rule": Key("threshold: what scores above it counts; topk: so many of each token.", "threshold", "NAME"),
        "allocation": Key("greedy: shares in a block by the error they make; uniform: all the same.", "greedy", "NAME"),
        "bias": Key(
            "What stands for inputs left out: centre: their median; fold: what is lost on average; none.",
            "centre",
            "NAME",
        ),
        "only": Key("Only layers whose weight's name matches (repeatable).", None, "GLOB", list),
        "exclude": Key("Not layers whose weight's name matches (repeatable).", None, "GLOB", list),
    },
    "Calibration": CALIBRATION | {"calibration_samples": Key("Windows to calibrate on.", "32", "N")},
    "Machine and model": MACHINE,
    "Output": {
        "output": Key("Folder to write; ./NAME-activations-PERCENT if not given.", None, "DIR"),
        "max_shard_size": MAX_SHARD_SIZE,
    },
}
