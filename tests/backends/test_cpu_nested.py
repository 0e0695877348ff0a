"""Where `cpu-nested` hands over to the unpacked weight or a dense copy, for weights that are wide and that are not."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from llmsparse.backends import BACKENDS, WeightSpec
from llmsparse.backends.choice import choose_backend
from llmsparse.backends.cpu import nested
from llmsparse.formats.nested import Nested
from llmsparse.inference.linear import PackedMatrix

pytestmark = pytest.mark.skipif(nested.why_not() is not None, reason=str(nested.why_not()))
BF16 = torch.bfloat16
BORDERS = (8, 9, 32, 33, 192, 193)


def weight(wide: bool) -> Nested:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(21, 8192, generator=generator).mul(40.0 if wide else 1.0).round().clamp(-127, 127).to(torch.int8)
    return Nested.encode(q, (torch.rand(21, 1, generator=generator) + 0.01).to(BF16), BF16)


def held(wide: bool, optimize: str, backend: str = "cpu-nested") -> PackedMatrix:
    packed = weight(wide)
    made = PackedMatrix(packed, choose_backend("w", WeightSpec.of(packed), 0, backend=backend, optimize=optimize))
    assert made.prepared.wide == wide
    return made


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("backend", ["cpu-nested", "cpu-nested-int8"])
@torch.no_grad()
def test_for_memory_the_kernel_runs_while_it_beats_unpacking(wide: bool, backend: str) -> None:
    matrix, bias = held(wide, "memory", backend), torch.randn(21).to(BF16)
    exact = nested.kernel_rows(BF16, BF16, wide)
    rounded = nested.kernel_rows(BF16, BF16, wide, True) if backend.endswith("int8") else 0
    assert matrix.copy is None and matrix.choice.tokens == (rounded or exact)
    for tokens in BORDERS:
        x = torch.randn(tokens, 8192).to(BF16)
        if tokens <= rounded:
            wanted = nested.matvec(matrix.prepared, x, bias, int8=True)
        elif tokens <= exact:
            wanted = nested.matvec(matrix.prepared, x, bias)
        else:
            wanted = linear(x, matrix.dense(), bias)
        assert torch.equal(matrix(x, bias), wanted), tokens
        assert torch.equal(matrix.backend.run(matrix.prepared, x, bias), wanted), tokens


@pytest.mark.parametrize("wide", [False, True])
@torch.no_grad()
def test_for_speed_the_dense_copy_multiplies_where_the_kernel_does_not_beat_it(wide: bool) -> None:
    matrix = held(wide, "speed")
    most = min(nested.kernel_rows(BF16, BF16, wide), nested.rows_beside_copy(BF16, BF16))
    assert matrix.choice.tokens == most and matrix.copy is not None
    matrix.copy.zero_()  # so that its products show
    for tokens in BORDERS:
        y = matrix(torch.randn(tokens, 8192).to(BF16), None)
        assert bool(y.any()) == (tokens <= most), tokens


def test_what_is_said_to_run_in_8_bits_is_what_does() -> None:
    spec = WeightSpec.of(weight(False))
    assert BACKENDS["cpu-nested-int8"].tokens(spec) == nested.kernel_rows(BF16, BF16, int8=True)
    assert BACKENDS["cpu-nested"].tokens(spec) == nested.kernel_rows(BF16, BF16)
