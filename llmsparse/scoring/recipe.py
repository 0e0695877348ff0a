"""What measuring a model's experts needs, checked before a byte of it is read."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from llmsparse.runs.recipe import Count, Device, Dtype, Length, PathText, RunRecipe, Seed, Source, Texts
from llmsparse.text.bos import Bos
from llmsparse.text.shares import Sources


class ScoresRecipe(RunRecipe):
    """A model whose experts are measured. `keys.py` says what each key is for."""

    verb: ClassVar[str] = "scores"
    single_file: ClassVar[bool] = True

    model: Source
    output: PathText | None = None
    calibration: Texts = "auto"
    text_field: str | None = None
    bos: Bos | None = None
    calibration_samples: Count = 128
    seq_len: Length | None = None
    batch_size: Count | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    seed: Seed = 0
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def text_source(self) -> Sources:
        return self.calibration

    @property
    def max_shard_size(self) -> str:
        """All is one file."""
        return "1000TB"

    @property
    def output_folder(self) -> Path:
        """The file to write: `output`, or `./<name>-scores.safetensors`."""
        if self.output is not None:
            return Path(self.output)
        name = Path(self.model).resolve().name if Path(self.model).exists() else Path(self.model).name
        return Path(f"{name}-scores.safetensors")
