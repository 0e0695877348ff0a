"""What a tuning will do, decided and checked before a weight is read: the sibling of `llmsparse.planning`."""

# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportMissingTypeStubs=false
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import Tensor

from llmsparse.errors import CalibrationError, CheckpointError, RecipeError
from llmsparse.factorization.containers import CONTAINERS, MIXTURE_KEYS, Container
from llmsparse.factorization.plan import find_ffn
from llmsparse.models.origin import fetch_model, load_config, load_tokenizer
from llmsparse.models.streamed import StreamedModel
from llmsparse.runs.device import DTYPES, choose_device, window_length
from llmsparse.runs.partial import check_output, held_bytes
from llmsparse.runs.plan import held_out_windows, machine, spoken_name
from llmsparse.runs.plan import versions as versions_of
from llmsparse.storage.checkpoint import CheckpointReader, parse_size
from llmsparse.storage.disk import check_room
from llmsparse.text import windows as calibration
from llmsparse.tuning.recipe import TuneRecipe

TOKENS_PER_STEP = 4096
LOGITS_AT_ONCE = 2**23  # numbers in the logits of one forward: 32 MiB in fp32, several times over
SAME = {"vocab_size": "vocabulary", "num_hidden_layers": "depth", "hidden_size": "hidden width"}
AS_FACTORIZED = {"n_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0}  # where a config has the key


@dataclass(frozen=True)
class TunePlan:
    """A run that has passed every check that needs no weights."""

    recipe: TuneRecipe
    folder: Path  # the factorized checkpoint
    teacher: Path
    output: Path
    reader: CheckpointReader
    model: StreamedModel  # the factorized one, without weights: what its tensors are called
    container: Container
    mixtures: list[int]  # numbers of the blocks whose FFN is one
    windows: calibration.Windows
    device: torch.device
    dtype: torch.dtype  # of the products
    teacher_fingerprint: dict[str, Any]

    @property
    def name(self) -> str:
        return spoken_name(self.recipe.model)

    @property
    def resolved(self) -> TuneRecipe:
        """The recipe with all that `auto` and the text decided in it: another run of it does the same."""
        dtype = str(self.dtype).removeprefix("torch.")
        return self.recipe.replace(
            device=str(self.device), dtype=dtype, seq_len=self.seq_len, batch_size=self.batch_size
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
        """Windows in one forward, a divisor of `batch_size`: as many as the logits have room for."""
        most = max(1, LOGITS_AT_ONCE // (self.seq_len * self.model.vocabulary))
        return next(count for count in range(min(most, self.batch_size), 0, -1) if self.batch_size % count == 0)

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

    @property
    def bytes_to_write(self) -> int:
        """The checkpoint, and the state of a run: weights and two moments in fp32, the new beside the old."""
        sizes = {key: torch.Size(shape).numel() for key, (shape, _) in self.tensors.items()}
        inside = f".{self.container.router.partition('.')[0]}."  # an FFN, in this container's words
        ffn = {key: self.tensors[key][0] for key in sizes if inside in key}
        routers = sum(sizes[key] for key in ffn if key.endswith(self.container.router))
        added = sum(self.recipe.lora_rank * sum(shape) for shape in ffn.values() if len(shape) == 2)
        trained = {"experts": sum(sizes[key] for key in ffn), "lora": routers + added, "router": routers}
        state = 3 * 4 * trained[self.recipe.train]
        return sum(size * self.tensors[key][1].itemsize for key, size in sizes.items()) + 2 * state

    @property
    def versions(self) -> dict[str, str]:
        return versions_of() | {"accelerate": accelerate.__version__}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share with the one it resumes."""
        return {
            "recipe": {key: value for key, value in self.recipe.resolved().items() if key != "output"},
            "model": self.reader.fingerprint() | {"config": self.model.config.to_dict()},
            "teacher": self.teacher_fingerprint,
            "text": self.windows.fingerprint,
            "versions": self.versions,
            **machine(self.device),
        }


def make_plan(recipe: TuneRecipe, *, resume: bool = False, overwrite: bool = False) -> TunePlan:
    """Resolve and check everything a run needs, from headers and shapes alone, then read the text."""
    device = choose_device(recipe.device)
    folder, teacher_folder = fetch_model(recipe.model), fetch_model(recipe.teacher)
    config, teacher_config = load_config(folder), load_config(teacher_folder)
    container = check_student(config, recipe.model)
    check_teacher(config, teacher_config, recipe.teacher)
    length = window_length(config, recipe.seq_len, recipe.text)
    length = window_length(teacher_config, length, recipe.text)
    reader, teacher_reader = CheckpointReader(folder), CheckpointReader(teacher_folder)
    model = StreamedModel(reader, device=torch.device("cpu"), dtype=torch.float32)
    mixtures = [
        index
        for index in range(len(model.block_names))
        if any(key.endswith("." + container.router) for key in model.block_keys(index))
    ]
    if not mixtures:
        raise CheckpointError(f"{recipe.model}: no block of it has a router, so there is nothing to tune")
    teacher = StreamedModel(teacher_reader, device=torch.device("cpu"), dtype=torch.float32)
    for index in mixtures:
        find_ffn(teacher, teacher_reader, index)
    for apart in (folder, teacher_folder):
        check_output(recipe.output_folder, resume=resume, overwrite=overwrite, source=apart)

    if calibration.is_token_file(recipe.text):
        length = calibration.stored_length(recipe.text, length)
    windows = calibration.load_windows(
        recipe.text,
        None if calibration.is_token_file(recipe.text) else load_tokenizer(folder),
        seq_len=length,
        samples=recipe.steps * windows_in_a_step(recipe, length or calibration.DEFAULT_SEQ_LEN),
        seed=recipe.seed,
        held_out=held_out_windows(length),
        text_field=recipe.text_field,
        vocabulary=model.vocabulary,
        purpose="training",
    )
    window_length(config, windows.ids.shape[1], recipe.text)
    dtype = DTYPES[recipe.dtype] if recipe.dtype != "auto" else torch.float32
    if recipe.dtype == "auto" and device.type == "cuda":
        dtype = torch.bfloat16
    plan = TunePlan(
        recipe, folder, teacher_folder, recipe.output_folder, reader, model, container, mixtures, windows, device, dtype,
        teacher_reader.fingerprint() | {"config": teacher_config.to_dict()},
    )  # fmt: skip
    check_router(plan)
    check_text(plan)
    check_room(plan.output, plan.bytes_to_write + parse_size("1MB"), held_bytes(plan.output))
    return plan


def windows_in_a_step(recipe: TuneRecipe, length: int) -> int:
    """As many as the recipe says, or 4096 tokens of them."""
    return recipe.batch_size or max(1, TOKENS_PER_STEP // length)


def check_student(config: Any, where: str) -> Container:
    """The container of a factorized model. CheckpointError, in one line, for any other model."""
    kind = config.model_type
    if kind not in CONTAINERS:
        if any(getattr(config, key, None) for key in MIXTURE_KEYS):
            raise CheckpointError(f"{where}: {kind} is not what factorize writes: {', '.join(CONTAINERS)}")
        raise CheckpointError(
            f"{where}: {kind} is no mixture of experts; make it one first: llmsparse factorize {where} -o DIR"
        )
    for key, wanted in AS_FACTORIZED.items():
        if getattr(config, key, wanted) != wanted:
            raise CheckpointError(
                f"{where}: {key} is {getattr(config, key)}, where factorize writes {wanted}; "
                "only what it has written can be tuned"
            )
    return CONTAINERS[kind]


def check_teacher(config: Any, teacher: Any, where: str) -> None:
    """CheckpointError for a teacher whose shape differs from the model's, or that is itself a mixture."""
    if any(getattr(teacher, key, None) for key in MIXTURE_KEYS):
        raise CheckpointError(f"--teacher {where}: is a mixture of experts; give the dense model that it was made from")
    for key, word in SAME.items():
        got, wanted = getattr(teacher, key, None), getattr(config, key)
        if got != wanted:
            raise CheckpointError(
                f"--teacher {where}: {word} is {got}, and the model's {wanted}; the teacher is the dense model that it "
                "was made from, or one of the same vocabulary, depth and hidden width"
            )


def check_router(plan: TunePlan) -> None:
    """RecipeError where only routers would be trained, and have nothing to decide."""
    key = next(key for key in plan.reader.keys() if key.endswith("." + plan.container.router))
    weights = plan.recipe.weights
    routers_only = plan.recipe.train == "router" or not (weights["kl"] or weights["layer"] or weights["language"])
    if routers_only and plan.active == plan.reader.spec(key).shape[0]:
        raise RecipeError(
            f"{plan.recipe.model}: every routed expert runs for every token, so its routers have nothing to learn; use "
            "--train experts with its usual weights"
        )


def check_text(plan: TunePlan) -> None:
    """CalibrationError for a text of less than a step, or with nothing to hold out."""
    count, held = len(plan.windows.ids), len(plan.windows.held_out)
    if count < plan.batch_size or not held:
        most = f", or --batch-size {count} or less" if held else ""
        raise CalibrationError(
            f"{plan.recipe.text}: {count} windows of {plan.seq_len} tokens to train on and {held} to measure on, wanted "
            f"{plan.batch_size} for a step and 1; give more text, or a shorter --seq-len{most}"
        )
