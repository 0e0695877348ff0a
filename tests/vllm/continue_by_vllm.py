"""`python continue_by_vllm.py FOLDER [KEY=JSON]...`: what vLLM says after each of PROMPTS, greedily, as token ids in JSON on
the last line. One engine a process: two of them fail."""

from __future__ import annotations

import json
import sys
from typing import Any

PROMPTS = ["def main():", "import os\n\n\nclass ", "    return self.", "The "]
TOKENS = 24


def main() -> None:
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"enforce_eager": True}
    options |= {key: json.loads(value) for key, value in (word.split("=", 1) for word in sys.argv[2:])}
    engine = LLM(model=sys.argv[1], max_model_len=256, max_num_seqs=4, **options)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    prompts: Any = [{"prompt_token_ids": tokenizer(prompt)["input_ids"]} for prompt in PROMPTS]
    asked = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    print(json.dumps([list(done.outputs[0].token_ids) for done in engine.generate(prompts, asked, use_tqdm=False)]))


if __name__ == "__main__":
    main()
