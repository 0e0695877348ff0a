"""Perplexity, streamed block by block, so that a model larger than memory can be measured.

exp of the mean negative log-likelihood of every token but the first of each window, over non-overlapping windows: the
figure papers report. It depends on the window length, so it never travels without its protocol.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmsparse.encodings.reader import open_checkpoint
from llmsparse.errors import CalibrationError, NumericalError, RecipeError
from llmsparse.models.cut_block import cutting, refuse_outside, rules_of
from llmsparse.models.likelihood import negative_log_likelihood, perplexity_of
from llmsparse.models.origin import fetch_model, is_packed, load_config, load_tokenizer, read_config
from llmsparse.models.streamed import StreamedModel
from llmsparse.models.thresholds import Thresholds, read_thresholds
from llmsparse.packing.packed_reader import PackedReader
from llmsparse.ranks.launch import joined
from llmsparse.runs.device import choose_device, choose_dtype, split_batches, window_length
from llmsparse.runs.joint import refuse_others
from llmsparse.runs.progress import Progress, Silent
from llmsparse.storage.home_folder import expand_home
from llmsparse.text import windows as calibration
from llmsparse.text.bos import Bos
from llmsparse.text.shares import split_shares
from llmsparse.text.windows import Windows

if TYPE_CHECKING:
    from rich.console import RenderableType

REPORT = "llmsparse_report.json"
ORIGIN = ("dataset", "config", "split", "file", "text")  # of a protocol: what says which text it is of


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and how it was measured."""

    model: str
    perplexity: float
    tokens: int
    seconds: float
    protocol: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table("model", "perplexity", "tokens", "seconds", box=None)
        table.add_row(Text(self.model), f"{self.perplexity:.4g}", f"{self.tokens:,}", f"{self.seconds:.1f}")
        table.caption = Text(", ".join(f"{key} {value}" for key, value in self.protocol.items() if value is not None))
        return table


def perplexity(
    model: str | Path,
    text: str | Path,
    *,
    seq_len: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    windows: int | None = None,
    text_field: str | None = None,
    bos: Bos | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Perplexity:
    """Measure `model` (folder or hub id, packed or not) on `text` (a file, a dataset, or `builtin`).

    Every full window of `seq_len` tokens (default min(2048, the model's maximum)), or the first `windows` of them, is
    used; the remainder is dropped. Processes that torchrun started share the windows.
    Raises CheckpointError, CalibrationError, RecipeError, MachineError or, for logits that are NaN or Inf, NumericalError,
    each with one line.
    """
    ranks, progress, started = joined(), progress or Silent(), time.perf_counter()
    with ranks.together():
        for name, value, least in (("seq_len", seq_len, 2), ("batch_size", batch_size, 1), ("windows", windows, 1)):
            if value is not None and value < least:
                raise RecipeError(f"{name}: got {value}, wanted at least {least}")
        how = (seq_len, device, dtype, windows, text_field, bos, revision, trust_remote_code)
        streamed, chosen, cut = _open(str(model), str(text), *how)
    batches = split_batches(chosen.ids, batch_size, streamed.device, streamed.hidden_size)
    refuse_others(ranks, {"text": chosen.fingerprint, "batch size": len(batches[0]), "blocks": streamed.block_names})
    if calibrated_on(streamed.folder, str(text), chosen.protocol):
        progress.log(
            f"warning: {model} was calibrated on {text} ({REPORT}), so its perplexity there is flattering; "
            "measure it on another text"
        )
    with torch.no_grad(), progress:
        acts = streamed.embed(batches, ranks)
        progress.start(len(streamed.block_names))
        for block in ranks.each(streamed.blocks()):
            progress.block(block.name)
            with cutting(block.module, rules_of(cut, block.name, block.module) if cut else {}):
                block.run(acts, into=acts)
        if cut:
            refuse_outside(cut, streamed.block_names)
        nll = negative_log_likelihood(streamed, acts, batches)
    if not math.isfinite(nll):
        with ranks.together():
            raise NumericalError(_overflowed(str(model), streamed.dtype))
    tokens = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches)
    protocol = chosen.protocol | {"stride": chosen.ids.shape[1], "level": "token"}
    if cut:
        protocol |= {"activation sparsity": cut.sparsity}
    return Perplexity(str(model), perplexity_of(nll, tokens), tokens, time.perf_counter() - started, protocol)


def _open(
    model: str,
    text: str,
    seq_len: int | None,
    device: str,
    dtype: str,
    windows: int | None,
    text_field: str | None,
    bos: Bos | None,
    revision: str | None,
    trust_remote_code: bool,
) -> tuple[StreamedModel, Windows, Thresholds | None]:
    """The model, the windows of the text, and below which thresholds activations are left out."""
    folder = fetch_model(model, revision)
    config = load_config(folder, trust_remote_code, packed=True, encoded=True)
    reader = PackedReader(folder) if is_packed(read_config(folder)) else open_checkpoint(folder)
    place = choose_device(device)
    streamed = StreamedModel(
        reader, device=place, dtype=choose_dtype(dtype, place, reader), trust_remote_code=trust_remote_code
    )
    stored_tokens = calibration.is_token_file(text)
    tokenizer = None if stored_tokens else load_tokenizer(folder, trust_remote_code)
    chosen = calibration.load_evaluation(
        text,
        tokenizer,
        seq_len=window_length(config, seq_len, text),
        limit=windows,
        text_field=text_field,
        bos=bos,
        vocabulary=streamed.vocabulary,
    )
    window_length(config, chosen.ids.shape[1], text)
    return streamed, chosen, read_thresholds(folder, read_config(folder))


def _overflowed(model: str, dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    way_out = "check the checkpoint" if dtype == torch.float32 else "try --dtype float32"
    return f"{model}: its logits are NaN or Inf when computed in {name}, so there is no perplexity; {way_out}"


def calibrated_on(folder: Path, text: str, protocol: dict[str, Any]) -> bool:
    """Whether the report of a pruned or factorized model names the text that `protocol` is of: the same part of a
    dataset, or a file of that name, unless the one that was named is still there and is another."""
    try:
        report: Any = json.loads((folder / REPORT).read_bytes())
        calibration: dict[str, Any] = report["calibration"]
        noted: list[dict[str, Any]] = calibration.get("sources", [calibration])
        named = [Path(share.source) for share in split_shares(report["recipe"]["calibration"])]
        alike = [
            (one, path)
            for one, path in zip(noted, named, strict=True)
            if all(one.get(key) == protocol.get(key) for key in ORIGIN)
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # no report, or not one of ours
    return any(
        "file" not in one or not path.is_file() or path.samefile(expand_home(text, CalibrationError))
        for one, path in alike
    )
