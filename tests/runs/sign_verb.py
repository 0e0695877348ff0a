"""A verb in under 60 lines: every matrix becomes its signs times the mean of its magnitudes."""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path

from llmsparse.runs.keys import CALIBRATION, MACHINE, MAX_SHARD_SIZE, Key
from llmsparse.runs.opening import fetched, open_model, read_windows
from llmsparse.runs.plan import RunPlan
from llmsparse.runs.recipe import Count, Device, Dtype, PathText, RunRecipe, Seed, ShardSize, Source, Texts
from llmsparse.runs.report import RunReport, perplexity_lines
from llmsparse.runs.run import Made, Run

HELP, EXAMPLE = "Replace every matrix of MODEL by its signs times a mean.", "seed=1"
OUTPUT = {"output": Key("Folder to write.", None, "DIR"), "max_shard_size": MAX_SHARD_SIZE}
KEYS = {"Calibration": CALIBRATION, "Machine and model": MACHINE, "Output": OUTPUT}


class SignRecipe(RunRecipe):
    model: Source
    output: PathText = "signs"
    calibration: Texts = "builtin"
    text_field: str | None = None
    bos: None = None
    calibration_samples: Count = 8
    seq_len: Count | None = None
    batch_size: Count | None = None
    seed: Seed = 0
    device: Device = "auto"
    dtype: Dtype = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    max_shard_size: ShardSize = "5GB"
    text_source = property(lambda self: self.calibration)
    output_folder = property(lambda self: Path(self.output))


class SignPlan(RunPlan[SignRecipe]):
    tensors = cached_property(lambda self: {k: (s.shape, s.dtype) for k in self.reader for s in [self.reader.spec(k)]})
    weights = cached_property(lambda self: list(chain(*map(self.model.weights, range(len(self.model.block_names))))))
    copied = cached_property(lambda self: [k for k in self.reader if k not in {w.key for w in self.weights}])
    memory_bytes = lambda self: 2 * self.reader.nbytes  # noqa: E731
    rows = lambda self, plan: {"model": plan["model"], "signs": f"{len(self.weights)} weights"}  # noqa: E731


@dataclass
class Signed:
    means: dict[str, float]
    to_json = asdict
    from_json = classmethod(lambda cls, entry: cls(entry["means"]))


@dataclass(kw_only=True)
class SignReport(RunReport):
    perplexity: dict = field(default_factory=dict)
    stored = lambda self: asdict(self) | {"timings": None, "seconds": 0, "peak_memory_bytes": 0}  # noqa: E731
    warn = lambda self: self.warnings.append("signs alone say little")  # noqa: E731
    card = lambda self: f"---\n---\n# {self.model}, signs\n"  # noqa: E731
    findings = lambda self: perplexity_lines(self.perplexity)  # noqa: E731


def make_plan(recipe, *, resume=False, overwrite=False, download=True):
    opened = open_model(recipe, resume=resume, overwrite=overwrite)
    return fetched(SignPlan(**opened.fields, windows=read_windows(opened, recipe.calibration_samples)), download)


def sign(recipe, *, progress=None, **how):
    with Run(make_plan(recipe, **how), progress, **how) as run:
        plan = run.plan
        run.copy_the_rest()
        streams, report = plan.streams(), SignReport(**plan.described())
        for block in run.blocks():
            streams.through_source(block)
            made = run.block(block.name, Signed, lambda block=block: signed(block))
            block.stored.update(made.tensors)
            block.reload(made.tensors.keys())
            streams.through_made(block)
        report.perplexity = streams.perplexity()
        return run.publish(report)


def signed(block):
    matrices = {weight.key: block.view(weight) for weight in block.weights}
    signs = {key: (m.sign() * m.abs().mean()).to(m.dtype) for key, m in matrices.items()}
    return Made(signs, Signed({key: m.abs().mean().item() for key, m in matrices.items()}))
