"""A model's name leads to a folder, a config and a tokenizer, or to one line that says why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from architectures import random_model, tiny_config
from http_reply import Replying

from llmsparse.errors import CheckpointError, MachineError, RecipeError
from llmsparse.models.origin import (
    config_fingerprint,
    copy_side_files,
    fetch_model,
    load_config,
    load_tokenizer,
    write_side_files,
)

LLAMA: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
SHA = "0123456789abcdef0123456789abcdef01234567"

HUB_FILES = {"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"pickle", "x/y.onnx": b"x"}


def model_with(folder: Path, config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


class Hub(Replying):
    """A hub with one good model, one gated, one only pickled, one without weights; everything else is not found."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        names = [name for name in HUB_FILES if "pickled" not in path or "safetensors" not in name]
        names = [name for name in names if "empty" not in path or name == "config.json"]
        if "revision/nope" in path:
            self.reply(404, X_Error_Code="RevisionNotFound")
        elif path.startswith(("/api/models/good/", "/api/models/bad/")) and "/tree/" in path:
            tree = [{"type": "file", "path": name, "size": len(HUB_FILES[name]), "oid": "a" * 40} for name in names]
            self.reply(200, json.dumps(tree).encode(), Content_Type="application/json")
        elif path.startswith(("/api/models/good/", "/api/models/bad/")):
            info = {"id": "good/model", "sha": SHA, "siblings": [{"rfilename": name} for name in names]}
            self.reply(200, json.dumps(info).encode(), Content_Type="application/json")
        elif path.startswith("/bad/gated/resolve"):
            self.reply(403, X_Error_Code="GatedRepo")
        elif "/resolve/" in path:
            content = HUB_FILES[path.split(f"/{SHA}/")[1]]
            self.reply(200, content, ETag='"tag"', X_Repo_Commit=SHA)
        elif "broken" in path:
            self.reply(400, b"bad\nrequest")
        else:
            self.reply(401, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


RESOLVE = """
import json, sys
from llmsparse.errors import LlmsparseError
from llmsparse.models.origin import fetch_model
for line in sys.argv[1:]:
    model, _, revision = line.partition("@")
    try:
        folder = fetch_model(model, revision or None)
        print(json.dumps(["ok", 0, sorted(path.name for path in folder.rglob("*") if path.is_file())]))
    except LlmsparseError as error:
        print(json.dumps([type(error).__name__, error.exit_code, str(error)]))
"""


def resolve_in_process(cache: Path, *models: str, **environment: str) -> list[list[Any]]:
    """What `fetch_model` says in a process of its own: huggingface_hub reads its environment once, at import."""
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, *models],
        env={**os.environ, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_hub_answers(tmp_path: Path, hub: str) -> None:
    good, missing, gated, revision, broken, pickled, empty = resolve_in_process(
        tmp_path,
        *("good/model", "no/such", "bad/gated", "good/model@nope", "no/broken", "bad/pickled", "bad/empty"),
        HF_HUB_OFFLINE="0",
        HF_ENDPOINT=hub,
    )
    assert good == ["ok", 0, ["config.json", "model.safetensors"]]  # no pickle, no export
    assert missing[:2] == ["CheckpointError", 2]
    assert missing[2].startswith(f"no/such: no such folder, and no such model at {hub}")
    assert gated[:2] == ["CheckpointError", 2]
    assert "gated; accept its licence at" in gated[2] and f"{hub}/bad/gated" in gated[2] and "hf auth login" in gated[2]
    assert revision[:2] == ["CheckpointError", 2]
    assert "good/model: has no revision 'nope'" in revision[2]
    assert broken[:2] == ["MachineError", 3]
    assert pickled == ["ok", 0, ["config.json", "pytorch_model.bin"]]
    assert empty[:2] == ["CheckpointError", 2]
    assert "bad/empty: its hub repository holds neither safetensors nor pytorch_model.bin" in empty[2]
    assert not any("\n" in answer[2] for answer in (missing, gated, revision, broken, empty))

    offline, other = resolve_in_process(tmp_path, "good/model", "no/such", HF_HUB_OFFLINE="1", HF_ENDPOINT=hub)
    assert offline == good  # from the cache
    assert other[:2] == ["MachineError", 3]


def test_hub_out_of_reach(tmp_path: Path) -> None:
    (answer,) = resolve_in_process(tmp_path, "good/model", HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    assert answer[:2] == ["MachineError", 3]
    assert "good/model: no such folder, and nothing in the cache, and http://127.0.0.1:9 is out of reach" in answer[2]
    assert "\n" not in answer[2]


@pytest.mark.parametrize("model", ["gpt2", "meta-llama/Llama-3.2-1B"])
def test_hub_id_while_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        MachineError, match=rf"{model}: no such folder, and nothing in the cache while offline"
    ) as error:
        fetch_model(model)
    assert "name a local folder" in str(error.value) and "\n" not in str(error.value)
    assert error.value.exit_code == 3


@pytest.mark.parametrize("model", ["./nope", "../nope", "/nope", "~/nope", "a/b/c", "no such model", "-x", "a..b", ""])
def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such folder|neither a folder nor a hub id|empty") as error:
        fetch_model(model)
    assert (model or "''") in str(error.value) and "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_local_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch_model("owner/name") == Path("owner/name")
    assert fetch_model("~/owner/name") == tmp_path / "owner" / "name"
    assert fetch_model(str(tmp_path)) == tmp_path
    with pytest.raises(RecipeError, match="local folder, which has none"):
        fetch_model("owner/name", "main")


def test_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="a file; name the folder"):
        fetch_model(str(tmp_path / "model.gguf"))


def test_unreadable_folder(locked: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        fetch_model(str(locked / "model"))


@pytest.mark.parametrize(
    "model_type",
    ["llama", "gpt2", "opt", "bloom", "falcon", "mamba", "gemma3_text", "llama4_text", "qwen3_next", "gpt_oss", "dbrx"],
)
def test_decoders_pass(tmp_path: Path, model_type: str) -> None:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    config = CONFIG_MAPPING[model_type]()
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    config.save_pretrained(tmp_path)
    assert load_config(tmp_path).model_type == model_type


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("gemma3", "Gemma3ForConditionalGeneration"),
        ("llama4", "Llama4ForConditionalGeneration"),
        ("llava", "LlavaForConditionalGeneration"),
        ("qwen3_5", "Qwen3_5ForConditionalGeneration"),
        ("voxtral", "VoxtralForConditionalGeneration"),
    ],
)
def test_models_that_wrap_a_language_model_pass(tmp_path: Path, model_type: str, architecture: str) -> None:
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]()
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    assert load_config(tmp_path).model_type == model_type


@pytest.mark.parametrize(
    ("model_type", "architecture", "message"),
    [
        ("t5", "T5ForConditionalGeneration", "t5 is an encoder-decoder"),
        ("bart", "BartForCausalLM", "bart is an encoder-decoder"),
        ("florence2", "Florence2ForConditionalGeneration", "florence2 is an encoder-decoder"),
        ("gemma3", "Gemma3Model", "Gemma3Model is not .* save the Gemma3ForConditionalGeneration that it is a part of"),
        ("bert", "BertForMaskedLM", "BertForMaskedLM is not a causal language model"),
        ("llama", "LlamaForSequenceClassification", "LlamaForSequenceClassification is not a causal language model"),
        ("vit", "ViTForImageClassification", "ViTForImageClassification is not a causal language model"),
    ],
)
def test_other_kinds_of_models_are_refused(tmp_path: Path, model_type: str, architecture: str, message: str) -> None:
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]()
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        load_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "not JSON"),
        ("[]", "not a JSON object"),
        ({"architectures": ["LlamaForCausalLM"]}, "has no model_type"),
        ({"model_type": "llama"}, "has no architectures"),
        ({**LLAMA, "architectures": []}, "has no architectures"),
        ({**LLAMA, "architectures": [1]}, "has no architectures"),
        ({**LLAMA, "model_type": "lama"}, "'lama' is not known to transformers .*, did you mean 'llama'"),
        ({**LLAMA, "model_type": "qqqq"}, "'qqqq' is not known to transformers [0-9.]+; a newer"),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}}, r"already quantized \(gptq\)"),
        ({**LLAMA, "quantization_config": {}, "text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({**LLAMA, "model_type": "mine", "auto_map": {"AutoConfig": "c.C"}}, "allow it with --trust-remote-code"),
        ({**LLAMA, "hidden_size": "wide"}, "transformers cannot read it"),
        ({**LLAMA, "text_config": "none"}, "text_config"),
    ],
)
def test_bad_configs_are_one_line(tmp_path: Path, config: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        load_config(model_with(tmp_path, config))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_config(tmp_path)


def test_native_model_with_remote_code_beside_it_runs_native(tmp_path: Path) -> None:
    folder = model_with(tmp_path, {**LLAMA, "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}})
    (folder / "evil.py").write_text("raise SystemExit('ran remote code')")
    assert type(load_config(folder)).__name__ == "LlamaConfig"


def test_remote_code_runs_when_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    auto_map = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.Mine"}
    folder = model_with(tmp_path / "model", {"model_type": "mine", "architectures": ["Mine"], "auto_map": auto_map})
    (folder / "configuration_mine.py").write_text(
        "from transformers import LlamaConfig\nclass MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
    )
    assert load_config(folder, trust_remote_code=True).model_type == "mine"


def test_tokenizer_loads(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    assert tokenizer.decode(tokenizer("def f():")["input_ids"]) == "def f():"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer"),
        ({"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'}, "no tokenizer"),
        ({"tokenizer.json": "garbage"}, "cannot be loaded"),
        ({"tokenizer.json": '{"version": "1.0", "added_tokens": [], "model": {"type": "Nope"}}'}, "cannot be loaded"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "garbage"}, "cannot be loaded"),
        (
            {"vocab.txt": "a", "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["x.Y", null]}}'},
            "--trust-remote-code",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_missing_or_broken_tokenizer_is_one_line(tmp_path: Path, files: dict[str, str], message: str) -> None:
    model_with(tmp_path, LLAMA)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_side_files_are_carried_over_and_weights_are_not(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    kept = ["config.json", "tokenizer.json", "vocab.txt", "chat_template.jinja", "LICENSE", "modeling.py"]
    left = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "m.gguf"]
    left += [
        "pytorch_model.bin.index.json",
        "README.md",
        ".gitattributes",
        "consolidated.00.pth",
        "llmsparse_report.json",
    ]
    for name in [*kept, *left, "additional_chat_templates/tool.jinja", "onnx/config.json", ".cache/x.json"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (source / "config.json").chmod(0o444)
    (source / "link.json").symlink_to(source / "vocab.txt")  # as in the hub's cache
    target.mkdir()
    copy_side_files(source, target)
    copied = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert copied == {*kept, "link.json", "additional_chat_templates/tool.jinja"}
    assert all((target / name).read_text() == name for name in kept)
    assert not (target / "link.json").is_symlink()
    copy_side_files(source, target)  # again, as a resumed run does


def test_side_files_on_a_full_disk(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    (source / "config.json").write_text("{}")
    (target / "config.json").symlink_to("/dev/full")
    with pytest.raises(MachineError, match="disk full"):
        copy_side_files(source, target)
    (target / "README.md").symlink_to("/dev/full")
    with pytest.raises(MachineError, match="disk full"):
        write_side_files(target, recipe="", report={}, card="card")


def test_what_a_run_writes_about_itself(tmp_path: Path) -> None:
    write_side_files(tmp_path, recipe="method: wanda\n", report={"weights": []}, card="# Card\n")
    assert (tmp_path / "llmsparse_recipe.yaml").read_text() == "method: wanda\n"
    assert json.loads((tmp_path / "llmsparse_report.json").read_text()) == {"weights": []}
    assert (tmp_path / "README.md").read_text() == "# Card\n"


def test_a_report_is_json_that_every_reader_takes(tmp_path: Path) -> None:
    report = {"error": float("nan"), "rows": [{"sparsity": 0.5, "most": float("inf"), "least": (float("-inf"), 1)}]}
    write_side_files(tmp_path, recipe="", report=report, card="")
    text = (tmp_path / "llmsparse_report.json").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    expected = {"error": None, "rows": [{"sparsity": 0.5, "most": None, "least": [None, 1]}]}
    assert json.loads(text, parse_constant=refuse) == expected


def test_nothing_that_is_uploaded_names_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    recipe = "model: /home/alice/m\noutput: /home/alicent/o\ntext: /data/home/alice/t\nhome: /home/alice\n"
    write_side_files(
        tmp_path, recipe=recipe, report={"output": "/home/alice/o", "at": ["/home/alice/x"]}, card="of /home/alice/m."
    )
    assert (tmp_path / "llmsparse_recipe.yaml").read_text() == (
        "model: ~/m\noutput: /home/alicent/o\ntext: /data/home/alice/t\nhome: ~\n"
    )
    assert json.loads((tmp_path / "llmsparse_report.json").read_text()) == {"output": "~/o", "at": ["~/x"]}
    assert (tmp_path / "README.md").read_text() == "of ~/m."


@pytest.mark.parametrize("name", ["owner/code--modeling.Model", ["owner/code--tok.Slow", None]])
def test_code_of_another_repository_is_refused(name: Any, tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m")
    file = folder / ("tokenizer_config.json" if isinstance(name, list) else "config.json")
    config = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": name, "AutoModelForCausalLM": name}}
    file.write_text(json.dumps(config))
    load = load_tokenizer if isinstance(name, list) else load_config
    with pytest.raises(
        CheckpointError, match=r"auto_map runs code of another repository, owner/code, .* in its place"
    ) as caught:
        load(folder, trust_remote_code=True)
    assert "\n" not in str(caught.value)
    assert load(folder, trust_remote_code=False) is not None  # transformers' own class runs


def test_code_in_folders_below_belongs_to_the_fingerprint(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m")
    (folder / "parts").mkdir()
    (folder / "parts" / "norm.py").write_text("EPSILON = 1e-6")
    before = config_fingerprint(folder, trust_remote_code=True)
    (folder / "parts" / "norm.py").write_text("EPSILON = 1e-5")
    assert "parts/norm.py" in before and config_fingerprint(folder, trust_remote_code=True) != before


def test_a_language_model_without_its_head_is_told_what_is_missing(tmp_path: Path) -> None:
    random_model(tiny_config("gemma3_text")).model.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"Gemma3TextModel is not .* save the Gemma3ForCausalLM that it is a part of"
    ):
        load_config(tmp_path)
