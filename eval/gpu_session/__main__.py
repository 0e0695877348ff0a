"""`python -m eval.gpu_session info | right OP [M,M] | times NxK M,M | experts | decode | library | prune | summary`"""

from __future__ import annotations

import sys
import traceback
from importlib import import_module

from eval.gpu_session.record import say

STAGES = {  # name → module: a stage that cannot be imported takes no other along
    "info": "machine",
    "right": "kernels",
    "times": "kernels",
    "experts": "mixtures",
    "decode": "decoding",
    "library": "models",
    "prune": "models",
    "summary": "record",
}


def main(stage: str, *arguments: str) -> int:
    try:
        getattr(import_module(f"eval.gpu_session.{STAGES[stage]}"), stage)(*arguments)
    except Exception as error:
        trace = traceback.format_exc()[-2000:]
        say(stage, arguments=arguments, crashed=f"{type(error).__name__}: {error}"[:400], trace=trace)
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in STAGES:
        sys.exit(f"{__doc__}")
    sys.exit(main(*sys.argv[1:]))
