"""What a command says, and where: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmsparse.errors import RecipeError
from llmsparse.ranks.place import Place
from llmsparse.runs import progress
from llmsparse.storage.strict_json import strict_json

if TYPE_CHECKING:
    from rich.console import RenderableType

PIPE_COLUMNS = 160  # width of a table that no terminal limits: names of weights stay whole


class Result(Protocol):
    """What every verb of the library returns."""

    def to_json(self) -> dict[str, Any]: ...

    def table(self) -> RenderableType: ...


@dataclass
class Terminal:
    """The command line, the switches that every command takes, and what follows from them."""

    arguments: Sequence[str] = ()
    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    partial: Path | None = None  # what a run in progress writes to
    place: Place = field(default_factory=Place)  # among the processes of the run

    def add(self, quiet: bool, verbose: bool, debug: bool) -> None:
        """Switches count before and after the verb."""
        self.quiet |= quiet
        self.verbose |= verbose
        self.debug |= debug

    def share(self, several: bool) -> None:
        """Of several processes the first one speaks. RecipeError where only one can do the work."""
        if self.place.size > 1 and not several:
            raise RecipeError(f"{self.place.size} processes cannot share this work; start it without torchrun, in one")
        if self.place.rank:
            self.quiet = True

    def progress(self) -> progress.Progress:
        return progress.for_terminal(self.quiet, self.verbose)

    def show(self, result: Result, as_json: bool) -> None:
        """One JSON document, or a table; from the first process."""
        if self.place.rank:
            return
        if as_json:
            print(strict_json(result.to_json()))
            return
        from rich.console import Console

        unlimited = not sys.stdout.isatty() and "COLUMNS" not in os.environ
        console = Console(file=sys.stdout, width=PIPE_COLUMNS if unlimited else None)
        with console.capture() as drawn:  # rich would end the process where nobody reads it
            console.print(result.table())
        print(drawn.get(), end="")

    def calm_libraries(self, downloads: bool = True) -> None:
        """Keep what Hugging Face's libraries log off the screen; bars stay for downloads that someone watches."""
        if self.verbose or self.debug:
            return
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DATASETS_VERBOSITY", "critical")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        if self.place.size > 1:  # before torch is loaded: what it logs of lost connections is said in our own words
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
        if self.quiet or not downloads or not progress.watched():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    def will_write(self, output: Path) -> None:
        """What a run that writes `output` leaves where it is interrupted; `.` and `/` have no name of their own."""
        output = output.resolve() if output.name in ("", "..") else output
        self.partial = output.parent / f"{output.name}.partial"

    def how_to_resume(self) -> str:
        """The command that takes up an interrupted run; empty if there is nothing to take up."""
        if self.partial is None or not self.partial.exists():
            return ""
        again = [argument for argument in self.arguments if argument not in ("--overwrite", "--resume")]
        return f"{self.partial} keeps what is done, go on with: {shlex.join(['llmsparse', *again, '--resume'])}"
