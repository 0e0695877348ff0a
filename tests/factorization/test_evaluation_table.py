"""The scripts behind the published table, on a tiny model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eval import factorize as table
from llmsparse.factorization.ffn import FFN
from llmsparse.factorization.split import Layout


@pytest.mark.parametrize("neurons", [172, 768, 5632])
@pytest.mark.parametrize("percent", table.SHARES)
def test_no_more_neurons_run_than_the_table_says(neurons: int, percent: int) -> None:
    layout = table.layout_at(neurons, percent)
    assert percent / 100 - 1 / 16 <= table.running(layout) <= percent / 100
    assert layout.experts * layout.width - neurons < layout.multiple
    assert layout.shared <= layout.active


def test_cmoe_is_written_out_as_its_code_has_it() -> None:
    """Shared neurons are those most often among the 10 largest of normalised h; a chosen expert has gate 1."""
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 48, 8, generator=generator)
    ffn, layout = FFN(gate, up, torch.randn(8, 48, generator=generator)), Layout(48, experts=6, shared=2, active=2)
    x = torch.randn(200, 8, generator=generator)
    split, router = table.by_cmoe(ffn, layout, [x], generator)
    unit = torch.nn.functional.normalize
    hidden = torch.nn.functional.silu(unit(x) @ unit(gate).T) * (unit(x) @ unit(up).T)
    rate = torch.zeros(200, 48).scatter_(1, hidden.abs().topk(10, 1).indices, 1.0).mean(0)
    others = torch.cat(split.routed)
    assert rate[split.shared].min() >= rate[others].max()
    assert sorted([*split.shared.tolist(), *others.tolist()]) == list(range(48))
    gates = router.gates(x)
    assert set(gates.unique().tolist()) == {0.0, 1.0} and gates.sum(1).eq(2).all()


@pytest.mark.slow
def test_table_of_a_tiny_model(
    tiny_llama: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results" / "table.csv")
    monkeypatch.setattr(table, "SEQ_LEN", 64)
    monkeypatch.setattr(table, "SHARES", (50,))
    monkeypatch.setattr(
        "sys.argv", ["table", str(tiny_llama(tmp_path / "tiny", ffn=128)), str(tmp_path / "text.txt"), "3,4"]
    )
    table.main()
    sys.argv[3] = "4"
    table.main()  # replaces the rows of that seed
    rows = [line.split(",") for line in (tmp_path / "results" / "table.csv").read_text().splitlines()[1:]]
    assert len(rows) == 2 * len(table.SHARES) * (len(table.PUBLIC) + len(table.IN_MEMORY))
    assert {row[0] for row in rows} == {"tiny"} and {row[-4] for row in rows} == {"3", "4"}
