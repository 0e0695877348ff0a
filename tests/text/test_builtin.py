"""The built-in text: three parts of the standard library that never overlap."""

from pathlib import Path

import pytest

from llmsparse.errors import MachineError
from llmsparse.text import builtin as corpus
from llmsparse.text import sources as texts


def read(purpose: texts.Purpose) -> list[str]:
    return ["".join(document) for document in texts.open_texts("builtin", purpose).documents]


def test_what_is_measured_on_is_neither_calibrated_nor_trained_on() -> None:
    training, calibration, evaluation = (set(read(purpose)) for purpose in ("training", "calibration", "evaluation"))

    assert not training & calibration and not training & evaluation and not calibration & evaluation
    assert len(calibration) == len(corpus.CALIBRATION) and len(evaluation) == len(corpus.EVALUATION)


def test_training_has_the_most_text() -> None:
    assert sum(map(len, read("training"))) > 10 * sum(map(len, read("calibration")))


def test_a_protocol_names_the_part_and_how_many_modules_it_has() -> None:
    described = texts.open_texts("builtin", "training").protocol["text"]

    assert described.endswith(f", {len(read('training'))} modules (training)")


def test_a_python_without_its_source_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_stdlib", lambda: tmp_path)

    with pytest.raises(MachineError, match=r"lacks argparse\.py, so this Python comes without its source; use a \.txt"):
        read("calibration")
