"""The keys of a tuning recipe as the command line shows them; `recipe.py` checks values, and takes longer to load."""

from __future__ import annotations

from llmsparse.runs.keys import CALIBRATION, MACHINE, MAX_SHARD_SIZE, Key

HELP = """Train a factorized MODEL, for a few hundred steps, to say what its dense teacher says.

    llmsparse tune ./moe --teacher meta-llama/Llama-3.2-1B --text wikitext2
    """
EXAMPLE = "kl_weight=0.5"

KEYS = {  # of every key but model, by group
    "What is trained, and how": {
        "teacher": Key("The dense model it came from, or one of the same vocabulary, depth and width.", None, "MODEL"),
        "train": Key("router, experts (and router), or lora (and router).", "experts", "WHAT"),
        "steps": Key("Steps to train for.", "500", "N"),
        "learning_rate": Key("Peak learning rate of the experts, or of lora.", "0.001; for lora 0.002", "R"),
        "router_learning_rate": Key("Peak learning rate of the routers.", "0.001", "R"),
        "warmup": Key("Steps that the rates rise for; then they fall along a cosine.", "20", "N"),
        "final_rate": Key("What is left of the rates at the end.", "0.05", "FRACTION"),
        "weight_decay": Key("Of AdamW, on everything that is trained.", "0", "D"),
        "lora_rank": Key("Rank of what lora adds to a matrix.", "16", "N"),
    },
    "What is minimised": {
        "kl_weight": Key("Of KL(teacher ‖ tuned) of the next token.", "1", "W"),
        "layer_weight": Key("Of each FFN's output error against the teacher's.", "0.1", "W"),
        "router_weight": Key("Of what each router says against the best experts.", "0.05", "W"),
        "router_loss": Key("greedy, norm or prior-approximate: which experts are best.", "greedy", "HOW"),
        "balance_weight": Key("Of each layer's imbalance between experts.", "0.01", "W"),
        "language_weight": Key("Of the cross-entropy of the text itself.", "0", "W"),
    },
    "Text": {
        "text": Key("c4, wikitext2, builtin, a .txt, .jsonl, .parquet or .safetensors file, or ORG/NAME:SPLIT.", None, "TEXT"),
        "text_field": CALIBRATION["text_field"],
        "bos": CALIBRATION["bos"],
        "seq_len": CALIBRATION["seq_len"],
        "batch_size": Key("Windows in a step; 4096 tokens of them if not given.", None, "N"),
        "seed": CALIBRATION["seed"],
    },
    "Machine and model": {
        "device": MACHINE["device"],
        "dtype": Key("auto, float32 or bfloat16: of the products; weights are trained in float32.", "auto", "DTYPE"),
        "save_every": Key("Steps between two states to resume from.", "50", "N"),
        "revision": MACHINE["revision"],
        "teacher_revision": Key("The same of the teacher.", None, "R"),
        "trust_remote_code": Key("Run the code that comes with either model.", kind=bool),
    },
    "Output": {
        "output": Key("Folder to write; ./NAME-tuned if not given.", None, "DIR"),
        "max_shard_size": MAX_SHARD_SIZE,
    },
}  # fmt: skip
