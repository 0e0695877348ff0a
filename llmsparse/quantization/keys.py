"""The keys of a quantization recipe as the command line shows them; `recipe.py` checks values, and takes longer to load."""

from __future__ import annotations

from llmsparse.runs.keys import CALIBRATION, MACHINE, MAX_SHARD_SIZE, Key

HELP = """Turn the weights of MODEL into small integers, many of them 0, in a packed folder of as few bits as asked for.

    llmsparse quantize meta-llama/Llama-3.2-1B --bits 2.5
    """
EXAMPLE = "rate=0"

KEYS = {  # of every key but model and rules, by group
    "How few bits": {
        "bits": Key("Stored bits a weight, everything counted, of the weights that are quantized.", None, "B"),
        "values": Key("Of a sparse model instead: int8 or int4 for what is not 0.", None, "KIND"),
        "method": Key("gptq: later columns absorb the error; nearest: no calibration decides.", "gptq", "NAME"),
        "group": Key("What shares a step: matrix, row, or so many columns of a row.", "row", "N"),
        "rate": Key("How much rounding gives way to save bits, in squared steps a bit.", "0.1", "R"),
        "damp": Key("Share of the Hessian's mean diagonal added to it.", "0.01", "D"),
        "match_steps": Key("Steps of tuning each block to what it computed before; 0 for none.", "0", "N"),
        "head_bits": Key(
            "Quantize the output head, too, to 4 to 8 bits; one tied to the embedding becomes a matrix of its own.",
            None,
            "N",
        ),
        "only": Key("Quantize only weights whose name matches (repeatable).", None, "GLOB", list),
        "include": Key("Quantize these too (repeatable).", None, "GLOB", list),
        "exclude": Key("Leave weights whose name matches as they are (repeatable).", None, "GLOB", list),
    },
    "Calibration": CALIBRATION,
    "Machine and model": MACHINE,
    "Output": {
        "output": Key("Folder to write; ./NAME-BITSbits if not given.", None, "DIR"),
        "max_shard_size": MAX_SHARD_SIZE,
    },
}
