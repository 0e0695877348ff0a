"""Compile kernels for a GPU that is not there, and say what the compiler made of them.

Triton chooses between interpreting and compiling when it is imported, and the tests' own process interprets. So this
runs as a process of its own: a request on a line of stdin, what was compiled on a line of stdout.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

ROOT = str(Path(__file__).parents[2])


@dataclass(frozen=True)
class Compiled:
    """Facts from the TTGIR and the SASS of one kernel for one architecture."""

    ttgir: str
    sass: list[str]  # an instruction each, with its modifiers and operands
    loop: list[str]  # those of its longest loop
    registers: int
    stack: int  # bytes; spilled registers live there
    shared: int  # bytes

    def count(self, pattern: str) -> int:
        """How many instructions begin with `pattern`, a regular expression: `HMMA\\.SP`, `LDG\\.E\\S*\\.128`."""
        return self._count(self.sass, pattern)

    def in_loop(self, pattern: str) -> int:
        return self._count(self.loop, pattern)

    def assembly_layouts(self) -> list[str]:
        """How the result of each inline assembly is dealt to threads, from the TTGIR."""
        named = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", self.ttgir, re.MULTILINE))
        return [named[name] for name in re.findall(r"elementwise_inline_asm.*-> tensor<.*, (#\w+)>", self.ttgir)]

    @staticmethod
    def _count(instructions: list[str], pattern: str) -> int:
        return sum(1 for one in instructions if re.match(rf"(@!?U?P\w+\s+)?{pattern}\b", one))


class Compiler:
    """`Compiler()(kernel="module:function", signature=…, constants=…, cc=90, warps=4) → Compiled`.

    `signature` gives the type of every argument that is no constant: `*bf16`, `*i32`, `i32` …; pointers are taken to be
    aligned to 16 bytes, as torch's are.
    """

    def __init__(self) -> None:
        self.made = dict[str, Compiled]()
        environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([ROOT, *sys.path])}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, **request: Any) -> Compiled:
        line = json.dumps(request)
        if line not in self.made:
            self.made[line] = Compiled(**self._ask(line))
        return self.made[line]

    def launches(self, op: str, n: int, k: int, m: int, cc: int = 90) -> list[str]:
        """The kernels, by name, that `triton_ops.<op>.linear` launches for a weight (N, K) of zeros and M tokens: each
        compiled for its actual arguments, as on a GPU, and not run."""
        return self._ask(json.dumps({"op": op, "n": n, "k": k, "m": m, "cc": cc}))

    def _ask(self, line: str) -> Any:
        assert self.process.stdin and self.process.stdout
        print(line, file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # closes stdin, which ends it


def find_tool(name: str) -> str:
    """A disassembler: triton's own, or CUDA's."""
    import triton

    own = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    found = str(own) if own.exists() else shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if not found:
        raise FileNotFoundError(f"{name} is neither in triton's wheel, nor on PATH, nor in /usr/local/cuda/bin")
    return found


def compile_kernel(
    kernel: str, signature: dict[str, str], constants: dict[str, Any], cc: int = 90, warps: int = 4, divisible: str = ""
) -> Compiled:
    """`divisible`: names of integer arguments, separated by blanks, that are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = kernel.split(":")
    function = getattr(importlib.import_module(module), name)
    types = {argument: signature.get(argument, "constexpr") for argument in function.arg_names}
    aligned = [
        place for place, (name, kind) in enumerate(types.items()) if kind.startswith("*") or name in divisible.split()
    ]
    source = ASTSource(
        fn=function,
        signature=types,
        constexprs=constants,
        attrs={(place,): [["tt.divisibility", 16]] for place in aligned},
    )
    made = triton.compile(
        source, target=GPUTarget("cuda", cc, 32), options={"num_warps": warps, "enable_fp_fusion": True}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _output(find_tool("cuobjdump"), "-res-usage", file.name)
        listing = _output(find_tool("nvdisasm"), "-c", file.name)
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    assert used, usage
    sass, loop = instructions(listing)
    registers, stack, static = map(int, used.groups())
    return Compiled(made.asm["ttgir"], sass, loop, registers, stack, max(static, made.metadata.shared))


class Absent:
    """What Triton asks of a driver before it compiles, answered for a GPU that is not there."""

    def __init__(self, cc: int) -> None:
        self.cc = cc

    def get_current_device(self) -> int:
        return self.cc  # compiled kernels are remembered by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.cc, 32)


def compile_launches(op: str, n: int, k: int, m: int, cc: int) -> list[str]:
    import torch
    from triton.runtime import JITFunction, driver

    names, run = list[str](), JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        names.append(self.__name__)
        return run(self, *args, grid=grid, warmup=True, **options)

    module = importlib.import_module(f"triton_ops.{op}")
    x, weight = torch.zeros(m, k, dtype=torch.bfloat16), torch.zeros(n, k, dtype=torch.bfloat16)
    driver.set_active(Absent(cc))  # type: ignore[arg-type]
    JITFunction.run, module.check = compile_only, lambda *_, **__: None  # x is on the CPU here
    module.linear(x, module.prepare(weight), weight[:, 0].contiguous())
    JITFunction.run = run
    return names


def instructions(listing: str) -> tuple[list[str], list[str]]:
    """All instructions of a disassembly, and those of its longest loop: from a label to the last branch back to it."""
    sass, labels, loop = list[str](), dict[str, int](), list[str]()
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(sass)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            sass.append(found[1])
            back = re.search(r"BRA\b.*`\((\.L_x_\d+)\)", found[1])
            # every kernel ends in a branch to itself, which is no loop
            if back and back[1] in labels and len(loop) < len(sass) - labels[back[1]] > 1:
                loop = sass[labels[back[1]] :]
    return sass, loop


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    for line in sys.stdin:
        try:
            request = json.loads(line)
            answer = compile_launches(**request) if "op" in request else asdict(compile_kernel(**request))
        except Exception as error:  # the test that asked shows it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
