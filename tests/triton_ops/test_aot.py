"""The harness that compiles without a GPU tells a good kernel from a bad one."""

from __future__ import annotations

from aot import Compiler, instructions


def test_the_longest_loop_is_found() -> None:
    listing = """
.L_x_0:
        /*0000*/                   LDG.E.128 R4, [R2.64] ;
        /*0010*/              @!P0 FFMA R0, R4, R5, R0 ;
        /*0020*/               @P1 BRA `(.L_x_0) ;
        /*0030*/                   EXIT ;
.L_x_1:
        /*0040*/                   BRA `(.L_x_1) ;
"""
    sass, loop = instructions(listing)
    assert len(sass) == 5 and sass[0] == "LDG.E.128 R4, [R2.64]"
    assert loop == sass[:3]


def test_a_kernel_is_compiled_and_disassembled(compiled: Compiler) -> None:
    copy = compiled(
        kernel="aot_example:copy",
        signature={"source": "*i32", "target": "*i32", "count": "i32"},
        constants={"BLOCK": 512},
        divisible="count",
    )
    assert copy.count(r"LDG\.E\S*\.128") == 1 and copy.count(r"STG\.E\S*\.128") == 1
    assert copy.stack == 0 and 0 < copy.registers < 255
    assert "sizePerThread = [4]" in copy.ttgir
