"""The keys of a pruning recipe as the command line shows them; `recipe.py` checks values, and takes longer to load."""

from __future__ import annotations

from llmsparse.runs.keys import CALIBRATION, MACHINE, MAX_SHARD_SIZE, Key

HELP = """Prune MODEL into a new folder that loads wherever the original does.

    llmsparse prune meta-llama/Llama-3.2-1B --sparsity 0.5
    """
EXAMPLE = "method.damp=0.1"

KEYS = {  # of every key but model and rules, by group
    "What is pruned, and how": {
        "effort": Key("fast, default or best: how long it may take for how little loss.", "default", "EFFORT"),
        "method": Key("sparsegpt, alps, swaps, dsnot, wanda, magnitude or random.", "sparsegpt", "NAME"),
        "sparsity": Key("Fraction of zeros: 0.7 or 70%.", None, "S"),
        "pattern": Key("unstructured, or N:M such as 2:4: keep 2 of every 4.", "unstructured", "N:M"),
        "scope": Key(
            "row or matrix: what an unstructured sparsity counts over; auto: as the method has it.", "auto", "SCOPE"
        ),
        "permute": Key(
            "auto or off: whether inputs are reordered at N:M where that folds away; if not given, as the effort has it.",
            None,
            "HOW",
        ),
        "allocation": Key(
            "auto, uniform, owl, dlp, lsa, alphapruning, er, erk or search: which share of the zeros each unit gets.",
            "auto",
            "NAME",
        ),
        "allocation_level": Key("block, projection or weight: what a unit is.", "block", "LEVEL"),
        "allocation_bounds": Key("The least and the largest sparsity of a unit, such as 0.5,0.8.", None, "LOW,HIGH"),
        "only": Key("Prune only weights whose name matches (repeatable).", None, "GLOB", list),
        "include": Key("Prune these too, such as lm_head (repeatable).", None, "GLOB", list),
        "exclude": Key("Leave weights whose name matches as they are (repeatable).", None, "GLOB", list),
        "true_sequential": Key(
            "Measure a block's later weights on what its earlier ones became when pruned: slower.", kind=bool
        ),
        "keep_zeros": Key(
            "Leave what is 0 already at 0, whatever the method: to prune a sparse model further.", kind=bool
        ),
        "refine": Key(
            "What betters the mask: none, swaps or fading (weights go a few at a time); auto: as the effort has it.",
            "auto",
            "HOW",
        ),
        "match_steps": Key(
            "Steps that tune a pruned block to the dense one's output; auto: where affordable, 0: off.", "auto", "N"
        ),
    },
    "Calibration": CALIBRATION,
    "Machine and model": MACHINE,
    "Output": {
        "output": Key("Folder to write; ./NAME-METHOD-PERCENT if not given.", None, "DIR"),
        "text_only": Key("Write the language model alone, of a model that reads images or sound besides.", kind=bool),
        "format": Key("dense: ordinary, loads anywhere; packed: without the zeros.", "dense", "FORMAT"),
        "values": Key("Of a packed folder: bf16, or int8 or int4 with a loss; as they are if not given.", None, "KIND"),
        "max_shard_size": MAX_SHARD_SIZE,
    },
}
