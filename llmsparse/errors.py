"""What can go wrong, and with which exit code.

    LlmsparseError            1  the run failed
    ├── NumericalError        1  NaN, Inf, a Hessian that is not positive definite
    ├── RecipeError           2  an option, a recipe or a selection asks for what cannot be
    │   ├── OptionError       2  one option of a recipe, by its place
    │   └── PatternError      2  a sparsity pattern that does not fit a weight
    ├── CheckpointError       2  a model or checkpoint that cannot be read, or is of a kind not handled
    ├── CalibrationError      2  a text, dataset or token file that cannot be used
    └── MachineError          3  the machine: no network, no device, no memory, no disk, a folder in use

Every message is one line that says what, where, got, wanted, and what to do.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


class LlmsparseError(ValueError):
    """Root of all errors that a user can cause; `exit_code` is the process's status."""

    exit_code = 1
    common = False  # every process of the run ends in it, so that the first alone need say it


class NumericalError(LlmsparseError):
    """NaN, Inf, or a matrix that no amount of damping makes positive definite."""


class RecipeError(LlmsparseError):
    """An option, a recipe or a selection that cannot be."""

    exit_code = 2


KeyPath = tuple[str | int, ...]  # into a recipe: ("rules", 0, "sparsity")


class OptionError(RecipeError):
    """What is wrong with the option at `path`; the recipe says where that stands."""

    def __init__(self, path: KeyPath, message: str) -> None:
        super().__init__(message)
        self.path = path


class PatternError(RecipeError):
    """A sparsity pattern that does not fit a weight."""


class CheckpointError(LlmsparseError):
    """A model that cannot be read, or is of a kind that is not handled."""

    exit_code = 2


class CalibrationError(LlmsparseError):
    """A text, dataset or token file that cannot be used."""

    exit_code = 2


class MachineError(LlmsparseError):
    """The machine, not the request: network, device, memory, disk, a folder in use."""

    exit_code = 3


def did_you_mean(name: str, known: list[str] | tuple[str, ...]) -> str:
    """`; did you mean 'wanda'?` when one of the known names is close, then the list of them.

    >>> did_you_mean("wandaa", ["magnitude", "wanda"])
    "; did you mean 'wanda'? known: magnitude, wanda"
    """
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ";"
    return f"{hint} known: {', '.join(known)}"


@contextmanager
def checkpoint_at_fault(file: Path, wanted: str) -> Generator[None]:
    """Within it, what code that reads `file` for us ends in is a CheckpointError: `wanted` is what that was to do. Want of
    memory, and errors that say what is wrong already, pass."""
    try:
        yield
    except (LlmsparseError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        said = one_line(error)
        kind = "" if " " in said else f"{type(error).__name__}: "
        raise CheckpointError(f"{file}: transformers cannot {wanted}: {kind}{said}") from error


def one_line(error: BaseException) -> str:
    """An error of another library, short and on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
