"""docs/models.md says what happens with every family that transformers knows."""

from __future__ import annotations

import pytest
import transformers
from every_architecture import PAGE, families, page, row, tried

PARTS = 4


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_each_family_does_what_the_page_says(part: int) -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    if f"transformers {transformers.__version__} " not in "\n".join(lines):
        pytest.skip("the page is of another transformers")
    assert [line for kind in families()[part::PARTS] if (line := row(kind, tried(kind))) not in lines] == []


def test_the_page_is_complete_and_nothing_on_it_goes_wrong() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    said = {cells[0].strip("|` "): cells[2].rstrip(" |") for cells in rows}
    assert page(said) == text or f"transformers {transformers.__version__} " not in text
    assert not [kind for kind, verdict in said.items() if verdict.startswith(("fails", "differs"))]
