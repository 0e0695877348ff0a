"""What every method promises, whatever it does inside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch

from llmsparse.errors import NumericalError, PatternError
from llmsparse.pruners import ALPS, PRUNERS, DSnoT, Magnitude, Pruned, Pruner, SparseGPT, Wanda
from llmsparse.sparsity.patterns import NofM, Pattern, Unstructured
from llmsparse.sparsity.stats import Gram, InputMoments, InputNorm

METHODS: list[Pruner] = [method() for method in PRUNERS.values()] + [
    DSnoT(criterion="paper"),
    DSnoT(Magnitude()),
    DSnoT(SparseGPT()),
    DSnoT(ALPS(), criterion="paper"),
    SparseGPT(block=16),
]
PATTERNS: list[Pattern] = [
    Unstructured(0.5, "matrix"),
    Unstructured(0.7, "row"),
    Unstructured(0.0, "row"),
    NofM(2, 4),
    NofM(1, 3),
    NofM(4, 8),
]
Layer = tuple[torch.Tensor, Gram]


def short(method: Pruner) -> str:
    options = [f"{key}={short(value) if key == 'initial' else value}" for key, value in vars(method).items()]
    changed = [
        text
        for text, value in zip(options, vars(method).items(), strict=True)
        if value not in vars(type(method)()).items()
    ]
    return type(method).__name__ + (f"({', '.join(changed)})" if changed else "")


all_methods = pytest.mark.parametrize("method", METHODS, ids=short)
all_patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=repr)


def layer(correlated: Callable[..., Layer], pattern: Pattern, out: int = 20) -> Layer:
    return correlated(out, 132 if pattern.span == 3 else 136)  # neither is a multiple of a column block


def assert_obeys(result: Pruned, weight: torch.Tensor, pattern: Pattern) -> None:
    out, width = weight.shape
    zeros = ~result.keep
    assert result.weight.dtype == torch.float32
    assert result.keep.dtype == torch.bool
    assert result.weight.shape == result.keep.shape == weight.shape
    assert result.weight.isfinite().all()
    assert (result.weight[zeros].view(torch.int32) == 0).all()  # +0.0, not -0.0
    if isinstance(pattern, NofM):
        assert (result.keep.view(out, -1, pattern.m).sum(dim=2) == pattern.n).all()
    elif isinstance(pattern, Unstructured) and pattern.scope == "row":
        assert zeros.sum(dim=1).tolist() == [round(pattern.sparsity * width)] * out
    else:
        assert int(zeros.sum()) == round(pattern.sparsity * (out * width))


@all_patterns
@all_methods
def test_obeys_the_pattern_exactly(
    method: Pruner, pattern: Pattern, correlated: Callable[..., Layer], generator: torch.Generator
) -> None:
    weight, stat = layer(correlated, pattern)
    assert_obeys(method(weight, stat, pattern, generator), weight, pattern)


@all_patterns
@all_methods
def test_leaves_its_inputs_alone_and_repeats_itself(
    method: Pruner, pattern: Pattern, correlated: Callable[..., Layer]
) -> None:
    weight, stat = layer(correlated, pattern)
    weight_before, xtx_before = weight.clone(), stat.xtx.clone()
    first = method(weight, stat, pattern, torch.Generator().manual_seed(3))
    assert torch.equal(weight, weight_before)
    assert torch.equal(stat.xtx, xtx_before)
    again = method(weight, stat, pattern, torch.Generator().manual_seed(3))
    assert torch.equal(first.weight, again.weight)
    assert torch.equal(first.keep, again.keep)
    assert first.notes == again.notes


@all_methods
def test_a_transposed_view_is_pruned_like_a_copy_and_left_alone(
    method: Pruner, correlated: Callable[..., Layer]
) -> None:
    weight, _ = correlated(24, 64)
    stat, x = Gram(64, torch.device("cpu")), torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    x[:, ::5] = 0.0
    stat.update(x)
    stored = weight.T.clone(memory_format=torch.contiguous_format)
    results = [method(view, stat, NofM(2, 4), torch.Generator().manual_seed(0)) for view in (weight.clone(), stored.T)]
    assert torch.equal(stored.T, weight)
    assert torch.equal(results[0].keep, results[1].keep)
    torch.testing.assert_close(results[0].weight, results[1].weight, atol=1e-5, rtol=1e-4)


@all_patterns
@all_methods
def test_dead_inputs_add_no_zeros_and_no_nan(
    method: Pruner, pattern: Pattern, correlated: Callable[..., Layer], generator: torch.Generator
) -> None:
    weight, _ = layer(correlated, pattern)
    stat = Gram(weight.shape[1], torch.device("cpu"))
    x = torch.randn(300, weight.shape[1], generator=generator)
    x[:, ::7] = 0.0
    stat.update(x)
    assert_obeys(method(weight, stat, pattern, generator), weight, pattern)
    nothing = Gram(weight.shape[1], torch.device("cpu"))
    nothing.update(torch.zeros(5, weight.shape[1]))
    assert_obeys(method(weight, nothing, pattern, generator), weight, pattern)


@pytest.mark.parametrize("method", [Wanda(), SparseGPT(), ALPS(), DSnoT()], ids=short)
def test_dead_inputs_are_pruned_first_and_kept_as_they_are(
    method: Pruner, correlated: Callable[..., Layer], generator: torch.Generator
) -> None:
    weight, _ = correlated(16, 64)
    stat, x = Gram(64, torch.device("cpu")), torch.randn(300, 64, generator=generator)
    x[:, :16] = 0.0
    stat.update(x)
    few = method(weight, stat, Unstructured(8 / 64, "row"), generator)
    assert not (~few.keep[:, 16:]).any()
    assert torch.equal(few.weight[:, :16][few.keep[:, :16]], weight[:, :16][few.keep[:, :16]])
    half = method(weight, stat, Unstructured(0.5, "row"), generator)
    assert not half.keep[:, :16].any()


@all_patterns
@all_methods
def test_weights_that_are_zero_already_may_be_kept(
    method: Pruner, pattern: Pattern, correlated: Callable[..., Layer], generator: torch.Generator
) -> None:
    weight, stat = layer(correlated, pattern)
    weight[torch.rand(weight.shape, generator=generator) < 0.8] = 0.0
    assert_obeys(method(weight, stat, pattern, generator), weight, pattern)


@all_methods
def test_a_broken_activation_is_an_error_to_those_that_look(
    method: Pruner, correlated: Callable[..., Layer], generator: torch.Generator
) -> None:
    weight, _ = correlated(8, 64)
    stat = Gram(64, torch.device("cpu"))
    x = torch.randn(100, 64, generator=generator)
    x[3, 5] = torch.nan
    stat.update(x)
    if method.needs is None:
        method(weight, stat, NofM(2, 4), generator)
    else:
        with pytest.raises(NumericalError, match="activations hold NaN or Inf in 1 of 64 inputs"):
            method(weight, stat, NofM(2, 4), generator)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@all_methods
def test_a_broken_weight_is_an_error(
    method: Pruner, value: float, correlated: Callable[..., Layer], generator: torch.Generator
) -> None:
    weight, stat = correlated(8, 64)
    weight[2, 3] = value
    with pytest.raises(NumericalError, match="NaN"):
        method(weight, stat, Unstructured(0.5, "row"), generator)


@all_methods
def test_groups_that_do_not_divide_the_width_are_an_error(
    method: Pruner, correlated: Callable[..., Layer], generator: torch.Generator
) -> None:
    weight, stat = correlated(8, 66)
    with pytest.raises(PatternError):
        method(weight, stat, NofM(2, 4), generator)


@all_methods
def test_needs_no_more_than_it_says(
    method: Pruner, correlated: Callable[..., Layer], generator: torch.Generator
) -> None:
    weight, _ = correlated(8, 64)
    pattern, device = Unstructured(0.5, method.scope), torch.device("cpu")
    if method.needs is None:
        assert method(weight, None, pattern, generator).keep.any()
        return
    poorest = method.needs(64, device)
    poorest.update(torch.randn(100, 64, generator=generator))
    assert_obeys(method(weight, poorest, pattern, generator), weight, pattern)


def test_every_method_needs_what_its_paper_says() -> None:
    needs = {name: method().needs for name, method in PRUNERS.items()}
    assert needs == {
        "magnitude": None,
        "wanda": InputNorm,
        "sparsegpt": Gram,
        "dsnot": InputMoments,
        "alps": Gram,
        "swaps": Gram,
        "random": None,
    }
    assert DSnoT(SparseGPT()).needs is Gram
    assert DSnoT(Magnitude()).needs is InputMoments


def test_native_scopes() -> None:
    assert {name: method().scope for name, method in PRUNERS.items()} == {
        "magnitude": "matrix",
        "wanda": "row",
        "sparsegpt": "matrix",
        "dsnot": "row",
        "alps": "row",
        "swaps": "matrix",
        "random": "matrix",
    }
    assert DSnoT(Magnitude()).scope == "matrix"


@pytest.mark.parametrize("method", list(PRUNERS.values()), ids=lambda method: method.__name__)
def test_methods_are_frozen_dataclasses_and_equal_by_option(method: type[Pruner]) -> None:
    assert method() == method()
    assert hash(method()) == hash(method())
    assert all(field.init for field in fields(method()))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("pattern", [Unstructured(0.6, "row"), Unstructured(0.6, "matrix"), NofM(2, 4)], ids=repr)
@pytest.mark.parametrize(
    "method", [method for method in METHODS if method.needs and method != DSnoT(Magnitude())], ids=short
)
def test_beats_magnitude_on_layer_error(
    method: Pruner,
    pattern: Pattern,
    correlated: Callable[..., Layer],
    layer_error: Callable[..., float],
    generator: torch.Generator,
) -> None:
    weight, stat = correlated(64, 128)
    error = layer_error(weight, method(weight, stat, pattern, generator).weight, stat)
    assert error < layer_error(weight, Magnitude()(weight, None, pattern, generator).weight, stat)


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.5, "row"), Unstructured(0.7, "matrix"), NofM(2, 4), NofM(4, 8)], ids=repr
)
@pytest.mark.parametrize("seed", range(3))
def test_alps_beats_sparsegpt_beats_wanda_on_correlated_inputs(
    pattern: Pattern,
    seed: int,
    correlated: Callable[..., Layer],
    layer_error: Callable[..., float],
    generator: torch.Generator,
) -> None:
    weight, stat = correlated(64, 128, seed=seed)
    wanda, sparsegpt, alps = (
        layer_error(weight, method(weight, stat, pattern, generator).weight, stat)
        for method in (Wanda(), SparseGPT(), ALPS())
    )
    assert alps < 0.9 * sparsegpt < 0.9 * 0.9 * wanda
