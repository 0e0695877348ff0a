"""From what the user calls a model to a folder, a config and a tokenizer; what is not handled is refused here.

A model is a local folder or a hub id. Refused, in one line each: encoder-decoders, quantized checkpoints, custom code
without leave to run it, and whatever transformers knows neither as a causal language model nor as one that wraps one.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llmsparse.encodings.reader import BLOCK as ENCODING
from llmsparse.encodings.reader import encoding_of
from llmsparse.errors import CheckpointError, RecipeError, checkpoint_at_fault, one_line
from llmsparse.formats import compressed_tensors
from llmsparse.models import hub
from llmsparse.models.model_class import auto_class
from llmsparse.storage.disk import disk_error
from llmsparse.storage.home_folder import expand_home, without_home
from llmsparse.storage.shard import Header
from llmsparse.storage.strict_json import strict_json

BUILTIN = "builtin"  # the embedded model ...
BUILTIN_FOLDER = Path(__file__).parents[1] / "demo" / "model"  # ... and where it lies
VOCABULARIES = ["tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json"]
WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
    ".ot",
    ".tflite",
    ".npz",
)
WRITTEN = ("README.md", "llmsparse_recipe.yaml", "llmsparse_report.json")
PACKED = "llmsparse"  # the quant_method of a packed checkpoint
CHAT_TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class Origin:
    """What a plan needs of a model."""

    folder: Path
    absent: Mapping[str, Header] = field(default_factory=dict[str, Header])  # of shards that are not downloaded yet
    commit: str | None = None  # on the hub

    @property
    def bytes_to_download(self) -> int:
        return sum(header.size for header in self.absent.values())


def fetch_model(model: str, revision: str | None = None) -> Path:
    """The folder of `model`: a local one, `builtin` for the embedded one, else a hub id, downloaded or cached.

    Raises CheckpointError where there is no such model or leave to read it, MachineError without a network.
    """
    return _local(model, revision) or hub.fetch(model, revision)


def look_at_model(model: str, revision: str | None = None) -> Origin:
    """As `fetch_model`, but of a hub id's weights, unless they are in the cache, only headers are fetched."""
    folder = _local(model, revision)
    if folder is not None:
        return Origin(folder)
    folder, absent = hub.look_at(model, revision)
    return Origin(folder, absent, hub.commit_of(folder))


def fetch_what_was_looked_at(model: str, origin: Origin) -> Path:
    """The folder of `model` with its weights: of the commit that `look_at_model` saw, whatever its branch holds by now."""
    return fetch_model(model, origin.commit)


def _local(model: str, revision: str | None) -> Path | None:
    """The folder of `model`, None for a hub id."""
    if not model:
        raise CheckpointError("model '': empty; name a folder or a hub id (owner/name)")
    if model == BUILTIN:
        return BUILTIN_FOLDER
    folder = expand_home(model, CheckpointError)
    try:
        is_folder, is_file = folder.is_dir(), folder.is_file()
    except OSError as error:
        raise CheckpointError(f"{model}: cannot be read ({error.strerror})") from error
    if is_folder:
        if revision is not None:
            raise RecipeError(f"revision {revision!r}: {model} is a local folder, which has none; leave out --revision")
        return folder
    if is_file:
        raise CheckpointError(f"{model}: a file; name the folder that holds config.json and the weights")
    if model.startswith((".", "~", "/")) or model.count("/") > 1:
        raise CheckpointError(f"{model}: no such folder")
    return None


def config_fingerprint(folder: Path, trust_remote_code: bool = False) -> dict[str, str]:
    """Checksums of what decides, weights aside, what a model computes: its config, and its code where that is run."""
    files = [folder / "config.json", *(sorted(folder.rglob("*.py")) if trust_remote_code else [])]
    try:
        return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})") from error


def read_config(folder: Path) -> dict[str, Any]:
    """What `config.json` says, as it stands there; CheckpointError where it is missing or no JSON object."""
    file = folder / "config.json"
    if not file.exists():
        raise CheckpointError(f"{folder}: no config.json, so this is no model")
    return read_json(file)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; CheckpointError where a file holds none."""
    try:
        content: Any = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return content


def refuse_code_elsewhere(file: Path, config: Mapping[str, Any]) -> None:
    """CheckpointError where a config runs code of another repository: whatever that holds today, at no fixed commit."""
    named: Any = config.get("auto_map")
    for name in named.values() if isinstance(named, dict) else ():
        for one in name if isinstance(name, list) else [name]:
            if isinstance(one, str) and "--" in one:
                repository, _, code = one.partition("--")
                raise CheckpointError(
                    f"{file}: auto_map runs code of another repository, {repository}, which may change between runs; read it, "
                    f"copy it into {file.parent}, and write {code!r} in its place"
                )


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a config is that of a checkpoint packed by llmsparse."""
    block = config.get("quantization_config")
    return isinstance(block, dict) and block.get("quant_method") == PACKED


def load_config(folder: Path, trust_remote_code: bool = False, *, packed: bool = False, encoded: bool = False) -> Any:
    """The transformers config of a causal language model that can be handled, else CheckpointError. One that llmsparse has
    packed is handled where the caller says `packed`, one that others have stored in few bits where it says `encoded`: its
    config is then that of the model with its weights as they are."""
    import transformers
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig

    file = folder / "config.json"
    raw = read_config(folder)
    kind, architectures, remote = raw.get("model_type"), raw.get("architectures"), raw.get("auto_map")
    if not isinstance(kind, str) or not kind:
        raise CheckpointError(f"{file}: has no model_type, so nothing says what this model is")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise CheckpointError(f'{file}: has no architectures; name the model\'s class there, e.g. ["LlamaForCausalLM"]')
    decoded = encoded and encoding_of(raw) is not None
    if not decoded and not (packed and is_packed(raw)):
        _refuse_compressed(file, raw)
    if kind not in CONFIG_MAPPING and not remote:
        close = get_close_matches(kind, list(CONFIG_MAPPING), n=1)
        raise CheckpointError(
            f"{file}: model_type {kind!r} is not known to transformers {transformers.__version__}"
            f"{f', did you mean {close[0]!r}?' if close else ';'} a newer transformers may know it"
        )
    if kind not in CONFIG_MAPPING and not trust_remote_code:
        raise CheckpointError(
            f"{file}: the model runs code of its own; read it, then allow it with --trust-remote-code"
        )
    if trust_remote_code:
        refuse_code_elsewhere(file, raw)
    with checkpoint_at_fault(file, "read it"):
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        text: Any = config.get_text_config(decoder=True)
    for part in (config, text) if decoded else ():
        part.__dict__.pop(ENCODING, None)
    if not isinstance(text, PretrainedConfig):
        raise CheckpointError(f"{file}: text_config is {text!r}, wanted the config of a language model")
    if config.is_encoder_decoder or text.is_encoder_decoder:
        raise CheckpointError(f"{file}: {kind} is an encoder-decoder; only decoder language models are handled")
    if auto_class(config, trust_remote_code) is None:
        causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        way_out = ""
        if causal is not None and architectures[0].endswith("Model"):
            way_out = f": it lacks the output head; save the {causal.__name__} that it is a part of"
        raise CheckpointError(f"{file}: {architectures[0]} is not a causal language model{way_out}")
    return config


def has_tokenizer(folder: Path) -> bool:
    """Whether a model comes with one."""
    return any(path for pattern in VOCABULARIES for path in folder.glob(pattern))


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers tokenizer in `folder`, else CheckpointError: transformers would make up an empty one."""
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        raise CheckpointError(f"{folder}: no tokenizer (wanted tokenizer.json, tokenizer.model or a vocabulary file)")
    if trust_remote_code and (folder / "tokenizer_config.json").is_file():
        refuse_code_elsewhere(folder / "tokenizer_config.json", read_json(folder / "tokenizer_config.json"))
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer("a")  # some of what is wrong shows only now
        return tokenizer
    except Exception as error:  # tokenizers raises nothing narrower for a corrupt file
        hint = "; read its code, then allow it with --trust-remote-code" if "trust_remote_code" in str(error) else ""
        raise CheckpointError(f"{folder}: tokenizer cannot be loaded: {one_line(error)}{hint}") from error


def copy_side_files(source: Path, target: Path, leaving: Collection[str] = WRITTEN) -> None:
    """Copy whatever belongs to a model but is not weights: configs, tokenizer, chat templates, code, licence; not the
    files named in `leaving`."""
    for path in sorted([*source.glob("*"), *source.glob(f"{CHAT_TEMPLATES}/*")]):
        name = path.name
        weights = name.endswith(WEIGHTS) or name.endswith((".safetensors.index.json", ".bin.index.json"))
        if weights or name.startswith(".") or name in leaving or not path.is_file():
            continue
        copy = target / path.relative_to(source)
        try:
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
        except OSError as error:
            raise disk_error(copy, error, path.stat().st_size) from error


def write_side_files(target: Path, *, recipe: str, report: dict[str, Any], card: str) -> None:
    """Write what a run says about itself beside its weights: recipe (YAML), report (JSON, null for NaN) and model card. No path in
    them names a home folder, since they are what is uploaded with the weights."""
    texts = (card, recipe, strict_json(report) + "\n")
    for name, text in zip(WRITTEN, texts, strict=True):
        try:
            (target / name).write_text(without_home(text), encoding="utf-8")
        except OSError as error:
            raise disk_error(target / name, error, len(text)) from error


def _refuse_compressed(file: Path, config: Mapping[str, Any]) -> None:
    """CheckpointError for weights that are not there as they are, naming the way back if there is one."""
    way_back = f"restore it first: llmsparse unpack {file.parent} -o DIR"
    if is_packed(config):
        raise CheckpointError(f"{file}: packed by llmsparse; {way_back}")
    orphaned = compressed_tensors.format_of(config)
    if orphaned:
        raise CheckpointError(f"{file}: compressed by compressed-tensors ({orphaned}); {way_back}")
    text = config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, dict) else None
    quantized = config.get("quantization_config") or inner
    if quantized:
        method = quantized.get("quant_method", "unknown method") if isinstance(quantized, dict) else quantized
        raise CheckpointError(f"{file}: already quantized ({method}); start from the unquantized checkpoint")
