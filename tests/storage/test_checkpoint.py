"""Checkpoints are written and read byte for byte, in little memory, and damage shows before any work is done."""

from __future__ import annotations

import json
import os
import random
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file

from llmsparse.errors import CheckpointError, MachineError, RecipeError
from llmsparse.storage import checkpoint
from llmsparse.storage.checkpoint import INDEX, SINGLE, CheckpointReader, CheckpointWriter
from llmsparse.storage.disk import parse_size
from llmsparse.storage.shard import DTYPES

DATA = {"format": "pt"}


def some_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random bytes in that shape: every bit pattern, NaN among them. Booleans are 0 or 1."""
    size = torch.empty(shape, dtype=dtype).nbytes
    generator = torch.Generator().manual_seed(seed)
    top = 2 if dtype == torch.bool else 256
    return torch.randint(0, top, (size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return {k: (t.shape, t.dtype, raw(t)) for k, t in a.items()} == {
        k: (t.shape, t.dtype, raw(t)) for k, t in b.items()
    }


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}


def everything(reader: CheckpointReader) -> dict[str, torch.Tensor]:
    return reader.read(reader.keys())


def write_single(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / SINGLE, metadata=DATA)
    return folder


def assert_one_line(error: pytest.ExceptionInfo[Exception]) -> None:
    assert "\n" not in str(error.value)


tensor_sets = st.dictionaries(
    st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1, max_size=12).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.lists(st.integers(0, 5), max_size=4).map(tuple), st.sampled_from(list(DTYPES.values()))),
    max_size=8,
)


@settings(max_examples=30)
@given(specs=tensor_sets, shard_bytes=st.integers(1, 2000), order=st.randoms(use_true_random=False))
def test_round_trip_in_any_order_over_any_shards(
    tmp_path_factory: pytest.TempPathFactory,
    specs: dict[str, tuple[tuple[int, ...], torch.dtype]],
    shard_bytes: int,
    order: random.Random,
) -> None:
    folder = tmp_path_factory.mktemp("round")
    tensors = {key: some_tensor(*spec, seed=seed) for seed, (key, spec) in enumerate(specs.items())}
    reader = CheckpointReader(write_single(folder / "source", tensors))
    writer = CheckpointWriter(folder / "target", specs, shard_bytes)
    for key in order.sample(list(tensors), len(tensors)):
        if order.random() < 0.5:
            writer.copy(reader, [key])
        else:
            writer.write({key: tensors[key]})
    writer.finish()
    assert same(everything(CheckpointReader(folder / "target")), tensors)
    assert same(writer.read(writer.keys()), tensors)
    assert all(writer.spec(key).begin % writer.spec(key).dtype.itemsize == 0 for key in writer)
    by_library: dict[str, torch.Tensor] = {}
    for file in (folder / "target").glob("*.safetensors"):
        by_library |= load_file(file)
        with safe_open(file, "pt") as stream:
            assert stream.metadata() == DATA
        assert sum(
            spec[1].itemsize * torch.Size(spec[0]).numel() for spec in specs_of(load_file(file)).values()
        ) <= max(shard_bytes, *(t.nbytes for t in load_file(file).values()), 0)
    assert same(by_library, tensors)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 5)], ids=str)
def test_every_dtype_and_shape_survives(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = {"odd": some_tensor((3,), torch.uint8), "x": some_tensor(shape, dtype, seed=1)}
    writer = CheckpointWriter(tmp_path, specs_of(tensors), 10**9)
    writer.write(tensors)
    writer.finish()
    assert same(everything(CheckpointReader(tmp_path)), tensors)
    assert same(load_file(tmp_path / SINGLE), tensors)


def test_transposed_view_is_written_as_it_reads(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    writer = CheckpointWriter(tmp_path, {"w": ((3, 2), torch.float32)}, 10**9)
    writer.write({"w": tensor})
    assert torch.equal(writer.read(["w"])["w"], tensor)


def test_shards_and_index_are_those_of_the_hub_library(tmp_path: Path, tiny_llama) -> None:
    from huggingface_hub import save_torch_state_dict

    tensors = load_file(tiny_llama(tmp_path / "source", tie=False) / SINGLE)
    (tmp_path / "theirs").mkdir()
    save_torch_state_dict(tensors, tmp_path / "theirs", max_shard_size="40KB")
    theirs = json.loads((tmp_path / "theirs" / INDEX).read_text())
    CheckpointWriter(tmp_path / "ours", specs_of(tensors), parse_size("40KB")).finish()
    ours = json.loads((tmp_path / "ours" / INDEX).read_text())
    assert len(set(ours["weight_map"].values())) > 2
    assert ours == theirs
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == sorted({*ours["weight_map"].values(), INDEX})


def test_copied_checkpoint_loads_in_transformers(tmp_path: Path, tiny_llama) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny_llama(tmp_path / "source", shards=3, dtype=torch.bfloat16)
    reader = CheckpointReader(source)
    target = tmp_path / "target"
    writer = CheckpointWriter(target, {key: (reader.spec(key).shape, reader.spec(key).dtype) for key in reader}, 30_000)
    writer.copy(reader, reader.keys())
    writer.finish()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    before = AutoModelForCausalLM.from_pretrained(source)
    after, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(info.values()), info
    assert same(dict(before.state_dict()), dict(after.state_dict()))


def test_order_of_tensors_is_that_of_the_source(tmp_path: Path) -> None:
    tensors = {name: some_tensor((4,), torch.float32, seed) for seed, name in enumerate("zmab")}
    writer = CheckpointWriter(tmp_path, specs_of(tensors), 32)
    assert writer.keys() == list("zmab")
    assert CheckpointReader(tmp_path).keys() == list("zmab")


def test_tensor_above_the_bound_lies_alone(tmp_path: Path) -> None:
    specs = {"a": ((2,), torch.uint8), "big": ((100,), torch.uint8), "b": ((2,), torch.uint8)}
    writer = CheckpointWriter(tmp_path, specs, 10)
    alone = writer.spec("big").file
    assert [key for key in specs if writer.spec(key).file == alone] == ["big"]


def test_reading_maps_nothing_and_shares_nothing(tmp_path: Path) -> None:
    write_single(tmp_path, {"w": torch.zeros(100_000)})
    reader = CheckpointReader(tmp_path)
    first, second = reader.read(["w"])["w"], reader.read(["w"])["w"]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    first.fill_(1)
    assert not second.any()
    assert not reader.read(["w"])["w"].any()


def test_copies_byte_for_byte_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": some_tensor((5, 7), torch.bfloat16), "b": some_tensor((14,), torch.uint8), "c": torch.zeros(0)}
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 7)
    writer = CheckpointWriter(tmp_path / "out", specs_of(tensors), 10**9)
    writer.copy(CheckpointReader(write_single(tmp_path / "in", tensors)), tensors)
    assert same(writer.read(tensors), tensors)


def test_a_copy_may_have_another_name(tmp_path: Path) -> None:
    tensors = {"a": some_tensor((5, 7), torch.bfloat16), "b": some_tensor((14,), torch.uint8)}
    reader = CheckpointReader(write_single(tmp_path / "in", tensors))
    writer = CheckpointWriter(tmp_path / "out", specs_of({"c": tensors["a"], "b": tensors["b"]}), 10**9)
    writer.copy(reader, ["b", "c"], named={"c": "a"})
    assert same(writer.read(["b", "c"]), {"b": tensors["b"], "c": tensors["a"]})


def test_copies_any_size_in_constant_memory(tmp_path: Path) -> None:
    size = 128 << 20
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (tmp_path / SINGLE).open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + size)
    script = """
import resource, sys
from pathlib import Path
import torch
from llmsparse.storage.checkpoint import CheckpointReader, CheckpointWriter
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
source, target = map(Path, sys.argv[1:])
reader = CheckpointReader(source)
writer = CheckpointWriter(target, {"w": (reader.spec("w").shape, reader.spec("w").dtype)}, 10**12)
before = peak()
writer.copy(reader, ["w"])
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) <= 24  # MiB


def test_resume_keeps_what_is_there_and_replaces_what_differs(tmp_path: Path) -> None:
    tensors = {name: some_tensor((8,), torch.float32, seed) for seed, name in enumerate("abc")}
    CheckpointWriter(tmp_path, specs_of(tensors), 32).write({"a": tensors["a"], "c": tensors["c"]})
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"torn")
    again = CheckpointWriter(tmp_path, specs_of(tensors), 32)
    assert torch.equal(again.read(["a"])["a"].view(torch.int32), tensors["a"].view(torch.int32))
    assert not again.read(["c"])["c"].any()
    again.write({"b": tensors["b"], "c": tensors["c"]})
    again.finish()
    assert same(everything(CheckpointReader(tmp_path)), tensors)


def test_partial_checkpoint_can_be_read_before_it_is_finished(tmp_path: Path) -> None:
    tensors = {name: some_tensor((8,), torch.int32, seed) for seed, name in enumerate("abc")}
    CheckpointWriter(tmp_path, specs_of(tensors), 32).write({"b": tensors["b"]})
    assert same(CheckpointReader(tmp_path).read(["b"]), {"b": tensors["b"]})


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.float16)], ids=["shape", "dtype"])
def test_only_planned_shapes_and_dtypes_are_written(tmp_path: Path, wrong: torch.Tensor) -> None:
    writer = CheckpointWriter(tmp_path / "out", {"w": ((3, 2), torch.float32)}, 10**9)
    with pytest.raises(CheckpointError, match=r"tensor 'w': got shape .* planned \[3, 2\] torch.float32"):
        writer.write({"w": wrong})
    with pytest.raises(CheckpointError, match="planned"):
        writer.copy(CheckpointReader(write_single(tmp_path / "in", {"w": wrong})), ["w"])
    with pytest.raises(CheckpointError, match="no place was planned for tensor 'v'"):
        writer.write({"v": wrong})


def test_unknown_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no tensor 'nope'"):
        CheckpointReader(write_single(tmp_path, {"w": torch.zeros(1)})).read(["nope"])


def test_fingerprint_follows_the_checkpoint(tmp_path: Path) -> None:
    write_single(tmp_path, {"w": torch.zeros(4)})
    first = CheckpointReader(tmp_path).fingerprint()
    assert json.loads(json.dumps(first)) == first == CheckpointReader(tmp_path).fingerprint()
    os.utime(tmp_path / SINGLE, ns=(1, 1))
    touched = CheckpointReader(tmp_path).fingerprint()
    write_single(tmp_path, {"v": torch.zeros(4)})
    os.utime(tmp_path / SINGLE, ns=(1, 1))
    renamed = CheckpointReader(tmp_path).fingerprint()
    assert first != touched != renamed
    assert touched[SINGLE]["size"] == renamed[SINGLE]["size"]


def with_header(entries: object, data: int) -> bytes:
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + bytes(data)


def entry(begin: int, end: int, dtype: str = "F32", shape: object = (2,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = with_header({"a": entry(0, 8), "b": entry(8, 16)}, 16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (GOOD[:5], "truncated"),
        (GOOD[:40], "truncated"),
        (GOOD[:-1], f"truncated: {len(GOOD) - 1} bytes, its header wants {len(GOOD)}"),
        (GOOD + b"\0", "corrupt"),
        (b"\xff" * 100, "truncated or not safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (with_header(b"garbage!", 9), "corrupt"),
        (with_header(b"\xff\xfe{}", 0), "corrupt"),
        (with_header(b"[" * 100_000, 0), "corrupt"),
        (with_header([1], 0), "corrupt"),
        (with_header({"a": 1}, 0), "corrupt"),
        (with_header({"a": {"dtype": "F32"}}, 0), "corrupt"),
        (with_header({"a": entry(0, 8), "b": entry(4, 12)}, 12), "tensor 'b' begins at"),
        (with_header({"a": entry(0, 8), "b": entry(12, 20)}, 20), "tensor 'b' begins at"),
        (with_header({"a": entry(0, 8, shape=[3])}, 8), r"tensor 'a' of shape \[3\] F32"),
        (with_header({"a": entry(8, 0)}, 8), "tensor 'a'"),
        (with_header({"a": entry(0, 8, shape=[-1, -2])}, 8), "tensor 'a'"),
        (with_header({"a": entry(0, 8, shape=["2"])}, 8), "tensor 'a'"),
        (with_header({"a": entry(0, 8, dtype="Q4")}, 8), "dtype Q4"),
        (with_header({"\ud800": entry(0, 8)}, 8), "corrupt"),
    ],
)
def test_damage_is_one_line_that_names_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(SafetensorError), safe_open(tmp_path / SINGLE, "pt"):
        pass
    with pytest.raises(CheckpointError, match=message) as error:
        CheckpointReader(tmp_path)
    assert str(tmp_path / SINGLE) in str(error.value)
    assert_one_line(error)


@given(position=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 3))
def test_accepts_exactly_what_safetensors_accepts(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, cut: int
) -> None:
    content = bytearray(save({"a": torch.zeros(2, 3), "b": torch.zeros(3, dtype=torch.bfloat16)}, metadata=DATA))
    content[position % len(content)] = value
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / SINGLE).write_bytes(content[: len(content) - cut])
    try:
        with safe_open(folder / SINGLE, "pt") as stream:
            theirs = {key: stream.get_slice(key).get_shape() for key in stream.offset_keys()}
    except SafetensorError:
        theirs = None
    try:
        reader = CheckpointReader(folder)
        ours = {key: list(reader.spec(key).shape) for key in reader}
    except CheckpointError:
        ours = None
    assert ours == theirs


def test_index_is_held_against_the_shards(tmp_path: Path, tiny_llama) -> None:
    folder = tiny_llama(tmp_path / "model", shards=3)
    index = json.loads((folder / INDEX).read_text())
    missing = "model-00002-of-00003.safetensors"

    (folder / INDEX).write_text(json.dumps({**index, "weight_map": {**index["weight_map"], "ghost": missing}}))
    with pytest.raises(CheckpointError, match=f"names tensor 'ghost' in {missing}") as error:
        CheckpointReader(folder)
    assert_one_line(error)

    (folder / INDEX).write_text(json.dumps(index))
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=f"names shard {missing}, which is missing") as error:
        CheckpointReader(folder)
    assert_one_line(error)


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}']
)
def test_broken_index_is_one_line(tmp_path: Path, index: str) -> None:
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=INDEX) as error:
        CheckpointReader(tmp_path)
    assert_one_line(error)


def test_a_shard_of_a_name_too_long_for_any_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": "x" * 5000}}))
    with pytest.raises(CheckpointError, match="cannot be read") as error:
        CheckpointReader(tmp_path)
    assert_one_line(error)


def test_index_may_not_leave_its_folder(tmp_path: Path) -> None:
    write_single(tmp_path, {"w": torch.zeros(1)})
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": f"../{SINGLE}"}}))
    with pytest.raises(CheckpointError, match="outside of its folder"):
        CheckpointReader(folder)


def test_a_tensor_in_two_shards_is_the_one_the_index_names(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"w": torch.ones(2), "extra": torch.ones(1)}, tmp_path / "two.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": "one.safetensors", "extra": "two.safetensors"}}))
    assert not CheckpointReader(tmp_path).read(["w"])["w"].any()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no weights"),
        (["config.json", "training_args.bin"], "holds no weights"),
        (["pytorch_model.bin"], r"only pickled weights \(pytorch_model.bin\)"),
        (["adapter_model.safetensors"], "has adapter_model.safetensors but neither"),
    ],
)
def test_folder_without_safetensors_weights(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message) as error:
        CheckpointReader(tmp_path)
    assert_one_line(error)
    assert error.value.exit_code == 2


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        CheckpointReader(tmp_path / "nowhere")


def test_file_that_shrinks_under_the_reader(tmp_path: Path) -> None:
    reader = CheckpointReader(write_single(tmp_path, {"w": torch.zeros(1000)}))
    os.truncate(tmp_path / SINGLE, 500)
    with pytest.raises(CheckpointError, match="became shorter"):
        reader.read(["w"])


def test_unreadable_checkpoint(locked: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        CheckpointReader(locked)


def test_full_disk_shows_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"disk full: [\d,]{20,} bytes needed, [\d,]+ free") as error:
        CheckpointWriter(tmp_path / "out", {"w": ((2**30, 2**20), torch.float32)}, 10**9)
    assert_one_line(error)
    assert error.value.exit_code == 3
    assert not list((tmp_path / "out").iterdir())


def test_file_too_large_for_the_file_system_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(MachineError, match="max-shard-size") as error:
            CheckpointWriter(tmp_path / "out", {"a": ((9,), torch.uint8), "w": ((2 << 20,), torch.uint8)}, 1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_line(error)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_disk_that_fills_during_the_run(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, {"w": ((4,), torch.float32)}, 10**9)
    (tmp_path / SINGLE).unlink()
    (tmp_path / SINGLE).symlink_to("/dev/full")
    with pytest.raises(MachineError, match="disk full: 16 bytes needed") as error:
        writer.write({"w": torch.zeros(4)})
    assert_one_line(error)


def test_folder_that_is_not_writable(locked: Path) -> None:
    with pytest.raises(MachineError, match=r"not writable \(Permission denied\)") as error:
        CheckpointWriter(locked / "out", {"w": ((4,), torch.float32)}, 10**9)
    assert_one_line(error)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500mb", 5 * 10**8),
        ("1GiB", 2**30),
        (" 1.5 KiB ", 1536),
        ("12345", 12345),
        (7, 7),
        ("2TB", 2 * 10**12),
        ("9B", 9),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "5XB", "-5GB", "0", 0, -1, "5 5GB", "five", "0.1B", "1IB", "1e9", "9" * 400 + "GB"]
)
def test_sizes_that_are_none(text: str | int) -> None:
    with pytest.raises(RecipeError, match="wanted a positive number of bytes"):
        parse_size(text)


def test_a_system_that_cannot_reserve_room_writes_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    writer = CheckpointWriter(tmp_path, {"w": ((3, 5), torch.float32)}, 10**9)
    assert (tmp_path / SINGLE).stat().st_size == writer.spec("w").end
    writer.write({"w": torch.arange(15.0).view(3, 5)})
    writer.finish()
    assert torch.equal(load_file(tmp_path / SINGLE)["w"], torch.arange(15.0).view(3, 5))
