"""Models to serve, and servers of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_process import KEY, Running, start

import llmsparse
from llmsparse.models.origin import BUILTIN_FOLDER

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if loud %}LOUD {% endif %}assistant:"
)


@pytest.fixture
def started() -> Iterator[Callable[..., Running]]:
    """`start`, and an end to whatever it started."""
    servers: list[Running] = []

    def starting(*arguments: str, **options: Any) -> Running:
        servers.append(start(*arguments, **options))
        return servers[-1]

    yield starting
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def packed(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned and packed model of 128 positions in float32, with a chat template that reads `loud`."""
    folder = tmp_path_factory.mktemp("serve")
    (tiny_llama(folder / "dense") / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    run: dict[str, Any] = {"method": "magnitude", "sparsity": 0.7, "calibration": "builtin", "match_steps": 0}
    llmsparse.prune(
        model=str(folder / "dense"), output=str(folder / "pruned"), calibration_samples=2, seq_len=32, **run
    )
    llmsparse.pack(str(folder / "pruned"), str(folder / "packed"))
    return folder / "packed"


@pytest.fixture(scope="session")
def server(packed: Path) -> Iterator[Running]:
    """One of the packed model, for the tests that leave it as it was."""
    running = start(str(packed), "--api-key", KEY)
    yield running
    running.close()


@pytest.fixture(scope="session")
def trained() -> Iterator[Running]:
    """One of the embedded model, in bf16 and of 512 positions, for the tests that leave it as it was."""
    running = start("builtin")
    yield running
    running.close()


@pytest.fixture
def builtin_with(tmp_path: Path) -> Callable[..., Path]:
    """`builtin_with(template=..., **generation_config)`: a copy of the embedded model that says so."""

    def copy(template: str | None = None, **generation: Any) -> Path:
        folder = Path(shutil.copytree(BUILTIN_FOLDER, tmp_path / f"model{len(list(tmp_path.iterdir()))}"))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        file = folder / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | generation))
        return folder

    return copy


@pytest.fixture(scope="session")
def greedy(packed: Path) -> Callable[[str, int], str]:
    """What `generate` says after a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(packed)
    tokenizer = AutoTokenizer.from_pretrained(packed)

    def after(text: str, tokens: int) -> str:
        ids = tokenizer(text, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    return after
