"""What a tuning will do, decided and checked before a weight is read."""

# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportMissingTypeStubs=false
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmsparse.encodings.reader import open_checkpoint
from llmsparse.errors import CheckpointError
from llmsparse.factorization.containers import CONTAINERS, Container
from llmsparse.factorization.plan import find_ffn
from llmsparse.models.origin import Origin, config_fingerprint, fetch_model, load_config, look_at_model, read_config
from llmsparse.models.streamed import StreamedModel
from llmsparse.models.thresholds import refuse_cut
from llmsparse.ranks.share import Share
from llmsparse.runs.device import DTYPES, window_length
from llmsparse.runs.joint import joint
from llmsparse.runs.opening import fetched, open_model, read_windows
from llmsparse.runs.partial import check_output, held_bytes
from llmsparse.runs.plan import RunPlan
from llmsparse.storage.checkpoint import CheckpointReader
from llmsparse.storage.disk import check_room, parse_size
from llmsparse.text.windows import DEFAULT_SEQ_LEN, is_token_file, stored_length
from llmsparse.tuning.checks import check_router, check_student, check_teacher, check_text
from llmsparse.tuning.recipe import TuneRecipe

TOKENS_PER_STEP = 4096
PARTS = 4  # of a step, whose gradients are added up in a tree: so many processes have something to do
LOGITS_AT_ONCE = 2**23  # numbers in the logits of one forward: 32 MiB in fp32, several times over
LOGITS_KEPT = 8  # copies of them that a step holds: both models' in fp32, their softmaxes, gradients
KEPT_OF_A_BLOCK = 32  # numbers that a backward needs of each token and block, in hidden widths


@dataclass(frozen=True, kw_only=True)
class TunePlan(RunPlan[TuneRecipe]):
    """A tuning that has passed every check that needs no weights; `model` is the factorized one."""

    text_key: ClassVar[str] = "text"

    teacher_origin: Origin
    teacher_reader: CheckpointReader
    container: Container
    mixtures: list[int]  # numbers of the blocks whose FFN is one

    @property
    def teacher(self) -> Path:
        return self.teacher_origin.folder

    @property
    def resolved(self) -> TuneRecipe:
        """The recipe with all that `auto`, the text and the hub decided in it: another run of it does the same."""
        return super().resolved.replace(
            batch_size=self.batch_size, teacher_revision=self.teacher_origin.commit or self.recipe.teacher_revision
        )

    @property
    def active(self) -> int:
        return self.model.config.num_experts_per_tok

    @property
    def seq_len(self) -> int:
        return self.windows.ids.shape[1]

    @cached_property
    def batch_size(self) -> int:
        """Windows in a step."""
        return windows_in_a_step(self.recipe, self.seq_len)

    @cached_property
    def windows_at_once(self) -> int:
        """Windows in one forward, a divisor of `batch_size`: as many as the logits have room for, and so few that there are
        PARTS forwards in a step of so many windows."""
        room = LOGITS_AT_ONCE // (self.seq_len * self.model.vocabulary)
        most = max(1, min(room, self.batch_size // PARTS))
        return next(count for count in range(min(most, self.batch_size), 0, -1) if self.batch_size % count == 0)

    @cached_property
    def share(self) -> Share:
        """Of the forwards of a step, those that this process makes."""
        count = self.batch_size // self.windows_at_once
        return Share(self.ranks, ((self.windows_at_once, self.seq_len),) * count, PARTS)

    @property
    def idle(self) -> str:
        """Which of the processes have nothing to do, in words; "" where all have something."""
        parts, size = len(self.share.leaves), self.ranks.size
        return f"a step has {parts} parts, so {size - parts} of {size} processes have none" if size > parts else ""

    @cached_property
    def batches(self) -> list[Tensor]:
        return [*self.windows.ids.split(self.batch_size)]

    @cached_property
    def schedule(self) -> list[Tensor]:
        """Numbers of the windows of each step (batch_size,): passes over all of them, each in a new order."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        wanted, count = self.recipe.steps * self.batch_size, len(self.windows.ids)
        passes = [torch.randperm(count, generator=generator) for _ in range(-(-wanted // count))]
        return [*torch.cat(passes)[:wanted].split(self.batch_size)]

    def autocast(self) -> torch.autocast:
        """Products in the plan's dtype, weights in fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @property
    def protocol(self) -> dict[str, Any]:
        """Of the text, and how often it is read."""
        protocol = {key: value for key, value in self.windows.protocol.items() if key != "note"}
        trained = self.recipe.steps * self.batch_size
        return protocol | {
            "batch_size": self.batch_size,
            "tokens_trained_on": trained * self.seq_len,
            "passes": round(trained / len(self.windows.ids), 2),
        }

    @cached_property
    def tensors(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of everything that will be written: what the factorized checkpoint holds."""
        return {key: (self.reader.spec(key).shape, self.reader.spec(key).dtype) for key in self.reader.keys()}

    @cached_property
    def trained(self) -> list[str]:
        """Keys that training may change: those of every mixture, or of its router alone."""
        inside, router = f".{self.container.router.partition('.')[0]}.", self.container.router
        keys = [key for number in self.mixtures for key in self.model.block_keys(number) if inside in key]
        return [key for key in keys if key.endswith(router)] if self.recipe.train == "router" else keys

    @cached_property
    def copied(self) -> list[str]:
        return [key for key in self.tensors if key not in set(self.trained)]

    @property
    def state_numbers(self) -> int:
        """Numbers that are trained, each of which has a master and two moments."""
        sizes = {key: torch.Size(self.tensors[key][0]).numel() for key in self.trained}
        if self.recipe.train != "lora":
            return sum(sizes.values())
        shapes = [self.tensors[key][0] for key in self.trained]
        routers = sum(size for key, size in sizes.items() if key.endswith(self.container.router))
        return routers + sum(self.recipe.lora_rank * sum(shape) for shape in shapes if len(shape) == 2)

    @property
    def bytes_to_write(self) -> int:
        """The checkpoint, and the state of a run: weights and two moments in fp32, the new beside the old."""
        return super().bytes_to_write + 2 * 3 * 4 * self.state_numbers

    @property
    def bytes_to_read(self) -> int:
        return super().bytes_to_read + self.teacher_reader.nbytes

    @property
    def bytes_to_download(self) -> int:
        return super().bytes_to_download + self.teacher_origin.bytes_to_download

    def memory_bytes(self) -> int:
        """An estimate of the peak: the process itself, both models, two moments of what is trained and gradients in the tree, and a
        forward with what its backward needs: logits several times over, and of every block the inputs of its products."""
        student = 4 * sum(torch.Size(shape).numel() for shape, _ in self.tensors.values())
        teacher = sum(
            torch.Size(self.teacher_reader.spec(key).shape).numel() for key in self.teacher_reader.keys()
        ) * self.dtype.itemsize  # fmt: skip
        tokens = self.windows_at_once * self.seq_len
        logits = LOGITS_KEPT * 4 * tokens * self.model.vocabulary
        kept = KEPT_OF_A_BLOCK * 4 * tokens * len(self.model.block_names) * self.model.hidden_size
        return (
            self.footprint + student + teacher + (2 + self.share.sums_at_once) * 4 * self.state_numbers + logits + kept
        )

    @property
    def fingerprint(self) -> dict[str, Any]:
        teacher = self.teacher_reader.fingerprint() | config_fingerprint(self.teacher, self.trust_remote_code)
        return super().fingerprint | {"teacher": teacher}

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {
            "teacher": self.recipe.teacher,
            "container": self.container.name,
            "mixtures": len(self.mixtures),
            "train": self.recipe.train,
            "steps": self.recipe.steps,
            "parameters_to_train": self.state_numbers,
        }

    def rows(self, plan: dict[str, Any]) -> dict[str, str]:
        return {
            "model": f"{plan['model']}, {plan['blocks']} blocks, {plan['mixtures']} of them {plan['container']} mixtures",
            "teacher": plan["teacher"],
            "output": plan["output"],
            "train": f"{plan['train']}, {plan['parameters_to_train']:,} parameters, {plan['steps']} steps",
            **({"processes": self.idle} if self.idle else {}),
        }


@joint
def make_plan(recipe: TuneRecipe, *, resume: bool = False, overwrite: bool = False, download: bool = True) -> TunePlan:
    """Resolve and check everything a run needs, from headers and shapes alone, then read the text.

    Last of all weights are downloaded that are not here yet, unless `download` is off: a plan needs none.
    """
    check = partial(check_student, where=recipe.model)
    opened = open_model(recipe, resume=resume, overwrite=overwrite, check=check, dtype_of=choose_product_dtype)
    container = CONTAINERS[opened.config.model_type]
    teacher = look_at_model(recipe.teacher, recipe.teacher_revision)
    refuse_cut(recipe.teacher, read_config(teacher.folder))
    teacher_config = load_config(teacher.folder, recipe.trust_remote_code, encoded=True)
    check_output(opened.output, resume=resume, overwrite=overwrite, source=teacher.folder)
    check_teacher(opened.config, teacher_config, recipe.teacher)
    length = window_length(opened.config, recipe.seq_len, recipe.text)
    length = window_length(teacher_config, length, recipe.text)
    teacher_reader = open_checkpoint(teacher.folder, teacher.absent)
    mixtures = find_mixtures(opened.model, container, recipe.model)
    dense = StreamedModel(
        teacher_reader, device=opened.device, dtype=opened.dtype, trust_remote_code=recipe.trust_remote_code
    )
    for index in mixtures:
        find_ffn(dense, teacher_reader, index)
    if is_token_file(recipe.text):
        length = stored_length(recipe.text, length)
    samples = recipe.steps * windows_in_a_step(recipe, length or DEFAULT_SEQ_LEN)
    windows = read_windows(opened, samples, length=length, purpose="training", text_key=TunePlan.text_key)
    plan = TunePlan(
        **opened.fields, windows=windows, teacher_origin=teacher, teacher_reader=teacher_reader, container=container,
        mixtures=mixtures,
    )  # fmt: skip
    check_router(plan)
    check_text(plan)
    check_room(plan.output, plan.bytes_to_write + parse_size("1MB"), held_bytes(plan.output))
    plan = fetched(plan, download)
    if not teacher.absent or not download:
        return plan
    folder = fetch_model(recipe.teacher, teacher.commit or recipe.teacher_revision)
    return replace(plan, teacher_origin=Origin(folder, commit=teacher.commit), teacher_reader=open_checkpoint(folder))


def choose_product_dtype(name: str, device: torch.device, reader: CheckpointReader) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU, whatever is stored: masters are fp32 anyhow."""
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def find_mixtures(model: StreamedModel, container: Container, where: str) -> list[int]:
    """Numbers of the blocks that have a router. CheckpointError where none has."""
    router = "." + container.router
    found = [n for n in range(len(model.block_names)) if any(key.endswith(router) for key in model.block_keys(n))]
    if not found:
        raise CheckpointError(f"{where}: no block of it has a router, so there is nothing to tune")
    return found


def windows_in_a_step(recipe: TuneRecipe, length: int) -> int:
    """As many as the recipe says, or 4096 tokens of them."""
    return recipe.batch_size or max(1, TOKENS_PER_STEP // length)
