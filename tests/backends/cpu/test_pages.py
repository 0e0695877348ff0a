"""Weights lie on large pages where the system hands them out, and doctor says where it does not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmsparse.backends.cpu import pages
from llmsparse.backends.cpu.pages import ALIGNED, HUGE, SHARED
from llmsparse.benchmark.doctor import diagnose

BF16 = torch.bfloat16
large_pages = pytest.mark.skipif(pages.why_not() is not None, reason=f"plain pages: {pages.why_not()}")


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file in which Linux says whether it hands out large pages."""
    file = tmp_path / "enabled"
    monkeypatch.setattr(pages, "SETTING", file)
    pages.why_not.cache_clear()
    yield file
    pages.why_not.cache_clear()


def huge_bytes(tensor: torch.Tensor) -> int:
    """On large pages, of the mapping in which a tensor begins."""
    inside, at = False, tensor.data_ptr()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        span = line.split(maxsplit=1)[0].split("-")
        if len(span) == 2:
            inside = int(span[0], 16) <= at < int(span[1], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("not mapped")


@pytest.mark.parametrize("shape", [(), (0, 7), (3, 5), (1000, 999), (SHARED // 4 + 1, 2)])
@pytest.mark.parametrize("dtype", [torch.uint8, BF16, torch.int64])
def test_zeros_are_zeros_on_a_cache_line(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = pages.zeros(shape, dtype)
    assert (found.shape, found.dtype) == (shape, dtype) and not found.any() and found.is_contiguous()
    assert found.data_ptr() % ALIGNED == 0


def test_tensors_do_not_lie_in_each_other() -> None:
    sizes = [1, 63, 64, 65, SHARED // 2 - 1, SHARED // 2, SHARED // 2 - 1, 5]
    tensors = [pages.zeros((size,), torch.uint8) for size in sizes]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number + 1)
    assert all(bool((tensor == number + 1).all()) for number, tensor in enumerate(tensors))


@large_pages
def test_what_is_large_lies_on_large_pages() -> None:
    tensor = pages.zeros((SHARED,), torch.uint8).fill_(1)
    assert tensor.data_ptr() % HUGE == 0 and huge_bytes(tensor) >= SHARED
    assert huge_bytes(pages.zeros((3 * HUGE,), torch.uint8).fill_(1)) >= 2 * HUGE  # among others in a shared mapping


@large_pages
def test_a_shared_mapping_is_given_back_with_its_last_tensor() -> None:
    shared = pages._Shared()  # pyright: ignore[reportPrivateUsage]
    memory, begin = shared.place(100)
    again, second = shared.place(100)
    assert again is memory and second == begin + 2 * ALIGNED and shared.mapping is not None
    tensors = [torch.frombuffer(memory, dtype=torch.uint8, count=100, offset=place) for place in (begin, second)]
    del memory, again
    tensors.pop()
    assert shared.mapping() is not None
    tensors.pop()
    assert shared.mapping() is None


def test_a_copy_takes_its_own_bytes_and_no_more() -> None:
    tensor = pages.zeros((100,), BF16).fill_(3)
    for copied in (copy.deepcopy(tensor), pages.copy(tensor)):
        assert torch.equal(copied, tensor) and copied.data_ptr() != tensor.data_ptr()
        assert copied.untyped_storage().nbytes() == 200
    turned = torch.arange(6.0).view(2, 3).T
    assert torch.equal(pages.copy(turned), turned)


def test_plain_pages_are_taken_where_the_system_says_never_and_doctor_says_so(setting: Path) -> None:
    setting.write_text("always madvise [never]\n")
    assert not pages.zeros((SHARED,), torch.uint8).any()
    assert "weights on plain pages" in diagnose().devices[0].details and "never" in diagnose().devices[0].details


def test_doctor_says_that_weights_lie_on_large_pages(setting: Path) -> None:
    setting.write_text("always [madvise] never\n")
    assert ("weights on 2 MB pages" in diagnose().devices[0].details) == (pages.why_not() is None)


def test_a_kernel_without_large_pages_is_named(setting: Path) -> None:
    assert pages.why_not() == "this kernel has no transparent huge pages" and not setting.exists()
