"""A run's output folder: invisible under its final name until it is complete.

The run writes `OUT.partial`, which holds its own state in `.llmsparse/`: `run.json` (fingerprint of everything the
result depends on), `journal.jsonl` (one line a finished block), whatever else the run needs to go on and, while a
folder is being replaced, `replaced/`. A crash at any moment leaves no OUT, the old OUT or the new one, each complete,
and a folder to resume from. A lock that the system drops when the process dies, `OUT.lock`, keeps a second run away.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from llmsparse.errors import CheckpointError, RecipeError
from llmsparse.ranks.place import launched
from llmsparse.runs.differences import spell_differences
from llmsparse.runs.lock import Lock
from llmsparse.runs.recipe import refuse_both
from llmsparse.storage.disk import disk_error, fsync, replace_file
from llmsparse.storage.home_folder import expand_home

STATE_FOLDER = ".llmsparse"
NOTED = {"fingerprint": dict, "overwrite": bool, "resumable": bool}  # in run.json


class PartialOutput:
    """`OUT.partial`, locked: a context manager that lets go of the lock and leaves the folder if the run fails.

    `fingerprint` is JSON-able; a resume with a different one is refused, naming the top-level keys that differ.
    `overwrite` allows an existing OUT, if it is a checkpoint, to be replaced by `publish`, and starts anew where an
    unfinished run is found.
    `source` is the model's folder, which OUT may neither be nor hold nor lie in. What is not `resumable` is removed if it
    fails. `single_file`: OUT is one file of the folder.

    Raises RecipeError for what the user must decide, MachineError for a locked, unwritable or full place.
    """

    def __init__(
        self,
        out: Path,
        *,
        fingerprint: dict[str, Any],
        resume: bool,
        overwrite: bool,
        source: Path | None = None,
        resumable: bool = True,
        single_file: bool = False,
    ) -> None:
        self._place = place = _RunFolder(out, source, single_file)
        self._resumable = resumable
        self.out, self.folder, self.state = place.out, place.folder, place.state
        self.finished: dict[str, Any] = {}
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(place.lock, self.out)
            try:
                place.recover()
                run = place.decide(resume, overwrite)
                self._overwrite = overwrite or bool(run and run["overwrite"])
                now: dict[str, Any] = json.loads(json.dumps(fingerprint))
                if run is not None and resume:
                    _check_fingerprint(self.folder, run["fingerprint"], now)
                    self.finished = _read_journal(place.journal)
                else:
                    place.start(now, overwrite, resumable)
            except BaseException:
                self._lock.release()
                raise
        except OSError as error:
            raise disk_error(self.folder, error) from error

    def __enter__(self) -> PartialOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and not self._resumable:
            self._place.recover()  # an old OUT that was being replaced lies in the folder
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def journal(self, block: str, entry: dict[str, Any]) -> None:
        """Note that a block is finished; its tensors must be on disk (`CheckpointWriter.sync`) before."""
        line = json.dumps({"block": block, "entry": entry}) + "\n"
        try:
            with self._place.journal.open("a", encoding="utf-8") as stream:
                stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise disk_error(self._place.journal, error, len(line)) from error
        self.finished[block] = json.loads(line)["entry"]

    def publish(self, file: str | None = None) -> Path:
        """Give the complete folder, or one `file` of it, its final name, in the place of an old one where that was allowed;
        returns OUT."""
        self._place.check_existing(self._overwrite)  # perhaps it is there only since this run began
        if file is not None:
            return self._publish_file(self.folder / file)
        for path in [*self.folder.rglob("*"), self.folder]:
            fsync(path)
        try:
            if self.out.exists() and any(self.out.iterdir()):
                self.out.rename(self._place.replaced)
            self.folder.rename(self.out)
            fsync(self.out.parent)
            shutil.rmtree(self.out / STATE_FOLDER)
        except OSError as error:
            raise disk_error(self.out, error) from error
        return self.out

    def _publish_file(self, file: Path) -> Path:
        fsync(file)
        try:
            file.replace(self.out)
            fsync(self.out.parent)
            shutil.rmtree(self.folder)
        except OSError as error:
            raise disk_error(self.out, error) from error
        return self.out


def check_output(
    out: Path, *, resume: bool, overwrite: bool, source: Path | None = None, single_file: bool = False
) -> None:
    """Refuse what PartialOutput would refuse, but for the fingerprint, without writing anything: for a plan."""
    place = _RunFolder(out, source, single_file)
    try:
        place.decide(resume, overwrite)
        if place.lock.exists() and launched().rank == 0:  # others of the run would be in its way
            Lock(place.lock, place.out).release()
        parent = next(path for path in place.out.parents if path.exists())
        if not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(parent, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise disk_error(place.folder, error) from error


def held_bytes(out: Path) -> int:
    """Disk space of the unfinished run to `out`: a resume needs it no second time, and starting anew frees it first.

    An old OUT is not counted, not even one that waits inside to be replaced: it stays until the new one is complete.
    """
    place = _RunFolder(out, None)
    try:
        files = [path for path in place.folder.rglob("*") if place.replaced not in path.parents]
        return sum(path.lstat().st_blocks * 512 for path in files)
    except OSError as error:
        raise disk_error(place.folder, error) from error


class _RunFolder:
    """The paths of a run, what lies there, and what may be done with it."""

    def __init__(self, out: Path, source: Path | None, single_file: bool = False) -> None:
        self._single_file = single_file
        try:
            self.out = expand_home(out, RecipeError).resolve()
        except RuntimeError:
            raise RecipeError(f"{out}: a symbolic link that leads back to itself; choose another output") from None
        if os.path.ismount(self.out):
            raise RecipeError(f"{self.out}: a mount point, which cannot be replaced; name a folder inside it")
        self.folder = self.out.with_name(self.out.name + ".partial")
        self.lock = self.out.with_name(self.out.name + ".lock")
        self.state = self.folder / STATE_FOLDER
        self.journal = self.state / "journal.jsonl"
        self.replaced = self.state / "replaced"
        model = source.expanduser().resolve() if source is not None else None
        for path in (self.out, self.folder):
            if model is not None and (path == model or model in path.parents or path in model.parents):
                raise RecipeError(f"{self.out}: output and model folder {model} must lie apart; choose another output")

    def decide(self, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """What the unfinished run noted at its start, None if there is none; RecipeError if the flags do not fit."""
        refuse_both(resume, overwrite)
        run = self._run()
        if resume and run is None:
            finished = self.out.is_file() or (self.out.is_dir() and any(self.out.iterdir()))
            reason = f"{self.out}: finished already" if finished else f"{self.folder}: no such folder"
            raise RecipeError(f"{reason}, nothing to resume; leave out --resume")
        self.check_existing(overwrite or bool(run and run["overwrite"]))
        if run is not None and not resume and not overwrite:
            way_out = "go on with --resume, or start anew" if run["resumable"] else "start anew"
            raise RecipeError(f"{self.folder}: an unfinished run is there; {way_out} with --overwrite")
        return run

    def check_existing(self, overwrite: bool) -> None:
        """What is at OUT may be replaced: nothing, an empty folder, or with leave to overwrite a checkpoint."""
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return
        if not overwrite:
            raise RecipeError(f"{self.out}: exists already; choose another output, or replace it with --overwrite")
        if self._single_file:
            if self.out.is_dir() or not is_written_by_us(self.out):
                raise RecipeError(
                    f"{self.out}: no file that llmsparse wrote, so --overwrite will not replace it; name another"
                )
            return
        if not (self.out / "config.json").is_file() or not any(self.out.glob("*.safetensors")):
            raise RecipeError(
                f"{self.out}: not a checkpoint, so --overwrite will not replace it; choose another output"
            )

    def recover(self) -> None:
        """Finish what a crash inside `publish` left undone."""
        if self.replaced.exists() and not self.out.exists():
            self.replaced.rename(self.out)
        if (self.out / STATE_FOLDER).is_dir():
            shutil.rmtree(self.out / STATE_FOLDER)
        if self._single_file and self.out.is_file() and not any(self.folder.glob("*.safetensors")):
            shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, fingerprint: dict[str, Any], overwrite: bool, resumable: bool) -> None:
        """Empty OUT.partial, the journal first, so that a crash leaves nothing to trust, and note this run."""
        self.journal.unlink(missing_ok=True)
        kept = (self.state, self.state / "run.json", self.replaced)
        for path in [*self.folder.glob("*"), *self.folder.glob(".*"), *self.state.glob("*")]:
            if path in kept:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        self.state.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"fingerprint": fingerprint, "overwrite": overwrite, "resumable": resumable}, indent=2) + "\n"
        replace_file(self.state / "run.json", text)
        for folder in (self.state, self.folder, self.out.parent):
            fsync(folder)

    def _run(self) -> dict[str, Any] | None:
        file = self.state / "run.json"
        if file.is_file():
            try:
                run: Any = {"resumable": True} | json.loads(file.read_bytes())
                if any(type(run[key]) is not kind for key, kind in NOTED.items()):
                    raise TypeError("not what is noted")
                return {key: run[key] for key in NOTED}
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise RecipeError(f"{file}: corrupt; delete {self.folder} and start anew") from error
        if self.folder.exists() and any(path.name != STATE_FOLDER for path in self.folder.iterdir()):
            raise RecipeError(f"{self.folder}: in the way, and not written by llmsparse; move it elsewhere")
        return None


def is_written_by_us(file: Path) -> bool:
    """Whether a file is one of tensors, and says that llmsparse wrote it."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: Any = json.loads(stream.read(length)) if length < file.stat().st_size else {}
        return str(header["__metadata__"]["format"]).startswith("llmsparse ")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_fingerprint(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    if changed := spell_differences(before, now, ("then", "now")):
        raise RecipeError(
            f"{folder}: cannot be resumed, changed since it was started: {changed}; "
            "set it back, or start anew with --overwrite"
        )


def _read_journal(file: Path) -> dict[str, Any]:
    """Finished blocks and their entries. A last line without its newline was cut off by a crash, and is removed."""
    if not file.exists():
        return {}
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    finished: dict[str, Any] = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            note: Any = json.loads(line)
            if not isinstance(note["entry"], dict):
                raise TypeError("no entry")
            finished[note["block"]] = note["entry"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{file}:{number}: corrupt; start anew with --overwrite") from error
    if len(whole) < len(data):
        os.truncate(file, len(whole))
    return finished
