"""What runs a weight follows from the tables alone, and says why."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from llmsparse.backends import BACKENDS, WeightSpec
from llmsparse.backends.choice import Choice, check_names, choose_backend
from llmsparse.backends.protocol import KnowsCopies
from llmsparse.backends.table import Measurement, device_kinds, read, save, shipped, user_file
from llmsparse.errors import MachineError, RecipeError

CPU = torch.device("cpu")
SPEC = WeightSpec((4096, 4096), "unstructured", int(0.3 * 4096**2), torch.bfloat16, CPU)
ROW = Measurement(
    "dense-lowmem", "cpu", "bfloat16", "unstructured", (0.6, 1.0), (1, 10**9), (512, 8192), 4, 1.6, "2026, here"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def chosen(spec: WeightSpec = SPEC, backend: str = "auto", optimize: str = "memory") -> Choice:
    return choose_backend("up", spec, 1, backend=backend, optimize=optimize)


def test_the_users_table_decides_first() -> None:
    assert save([ROW]) == user_file()
    choice = chosen()
    assert (choice.backend, choice.because) == ("dense-lowmem", "1.6 × dense: 2026, here")
    assert set(choice.refused) == set(BACKENDS) - {"dense-lowmem"}


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (4096, 11008)},
        {"pattern": "2:4"},
        {"dtype": torch.float32},
        {"nnz": 4096**2 // 2},
        {"device": torch.device("meta")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_row_says_nothing_about_what_it_does_not_cover(change: dict[str, object]) -> None:
    save([ROW])
    assert chosen(replace(SPEC, **change)).backend != "dense-lowmem"  # type: ignore[arg-type]


def test_a_row_for_this_very_device_comes_before_a_general_one() -> None:
    save([ROW, replace(ROW, backend="dense", device=device_kinds(CPU)[0], speedup=1.0)])
    assert chosen().backend == "dense"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the backend can run")
def test_a_backend_that_cannot_run_gives_way_to_the_next_row() -> None:
    save([replace(ROW, backend="bitmask"), ROW])
    choice = chosen()
    assert choice.backend == "dense-lowmem"
    assert choice.refused["bitmask"].startswith("needs an NVIDIA GPU")


def test_a_row_of_a_later_version_is_passed_over() -> None:
    save([replace(ROW, backend="warp9"), ROW])
    assert chosen().refused["warp9"] == "unknown to this version"


def test_without_a_row_dense_runs() -> None:
    choice = chosen(replace(SPEC, device=torch.device("meta")))
    assert (choice.backend, choice.tokens, choice.dense_copy) == ("dense", None, False)
    assert choice.refused["dense-lowmem"] == "not measured faster than dense"


def test_a_kernel_keeps_a_dense_copy_for_speed_only() -> None:
    save([replace(ROW, backend="cpu-bitmask", tokens=2)])
    if chosen().backend != "cpu-bitmask":
        pytest.skip("the CPU kernels cannot be built here")
    assert [chosen(optimize=wish).dense_copy for wish in ("memory", "speed")] == [False, True]
    most = BACKENDS["cpu-bitmask"].tokens(SPEC)
    assert [chosen(optimize=wish).tokens for wish in ("memory", "speed")] == [most, 2], "unpacking costs more than it"
    own = BACKENDS["cpu-bitmask"]
    assert isinstance(own, KnowsCopies) and most is not None
    named = [chosen(backend="cpu-bitmask", optimize=wish).tokens for wish in ("memory", "speed")]
    assert named == [most, min(most, own.tokens_beside_copy(SPEC))]
    save([replace(ROW, backend="cpu-bitmask", tokens=most)])
    assert chosen(optimize="speed").tokens == named[1], "a row of another CPU may claim more"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the backend can run")
def test_a_named_backend_runs_or_says_why_not() -> None:
    assert chosen(backend="dense-lowmem").because == "asked for"
    with pytest.raises(MachineError, match=r"backend bitmask cannot run up: needs an NVIDIA GPU.*use auto or dense"):
        chosen(backend="bitmask")


def test_a_module_that_multiplies_by_itself_is_left_to_dense_backends() -> None:
    spec = replace(SPEC, whole=True)
    save([replace(ROW, backend="cpu-bitmask"), ROW])
    assert chosen(spec).backend == "dense-lowmem"
    with pytest.raises(MachineError, match="in a way of its own"):
        chosen(spec, backend="cpu-bitmask")


def test_names_are_checked() -> None:
    check_names("auto", "speed")
    with pytest.raises(RecipeError, match="did you mean 'dense'"):
        check_names("dens", "memory")


def test_new_rows_replace_those_about_the_same_weights() -> None:
    save([ROW, replace(ROW, columns=(1, 2))])
    save([replace(ROW, speedup=1.9)])
    assert sorted(row.speedup for row in read(user_file())) == [1.6, 1.9]


@pytest.mark.parametrize(
    "text",
    ["{", "[]", json.dumps({"version": 2, "rows": []}), json.dumps({"version": 1, "rows": [{"backend": "dense"}]})],
)
def test_a_damaged_table_is_an_error_that_says_what_to_do(text: str) -> None:
    user_file().parent.mkdir()
    user_file().write_text(text)
    with pytest.raises(RecipeError, match=r"backends\.json.*delete it"):
        chosen()


@pytest.mark.skipif("avx512_vbmi2" not in device_kinds(CPU)[0], reason="the kernel has not been measured on this CPU")
def test_the_cpu_kernel_runs_what_it_was_measured_on() -> None:
    assert chosen().backend == "cpu-bitmask"
    assert chosen(replace(SPEC, nnz=int(0.8 * 4096**2))).backend == "dense"
    assert chosen(replace(SPEC, shape=(32, 32), nnz=300)).backend == "dense"


@pytest.mark.skipif("avx512_vbmi2" not in device_kinds(CPU)[0], reason="the kernel has not been measured on this CPU")
def test_few_bits_run_beside_a_dense_copy_as_long_as_they_beat_it() -> None:
    spec, own = replace(SPEC, format="nested", stored=torch.bfloat16), BACKENDS["cpu-nested"]
    choice = chosen(spec, optimize="speed")
    assert isinstance(own, KnowsCopies)
    assert (choice.backend, choice.tokens) == ("cpu-nested", own.tokens_beside_copy(spec))


def test_the_shipped_table_knows_its_backends_and_only_claims_gains() -> None:
    for row in shipped():
        assert row.backend in BACKENDS
        assert row.speedup > 1.0 and row.measured
        assert asdict(row)
