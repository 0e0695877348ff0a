"""An output folder appears whole or not at all, whatever happens to the run that writes it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmsparse.errors import CheckpointError, LlmsparseError, MachineError, RecipeError
from llmsparse.runs.partial import STATE_FOLDER, PartialOutput, check_output, held_bytes
from llmsparse.storage.disk import check_room, spell_size

FINGERPRINT: dict[str, Any] = {"recipe": {"method": "wanda"}, "model": {"size": 7}, "seed": 0}


def start(out: Path, *, resume: bool = False, overwrite: bool = False, **options: Any) -> PartialOutput:
    options.setdefault("fingerprint", FINGERPRINT)
    return PartialOutput(out, resume=resume, overwrite=overwrite, **options)


def checkpoint(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(content)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


NEW = {"config.json": "new", "model.safetensors": "new"}
OLD = {"config.json": "old", "model.safetensors": "old"}


def refused(out: Path, kind: type[LlmsparseError], message: str, **options: Any) -> str:
    """The message that refuses a run, and that a plan gives too unless it is about what the run holds."""
    with pytest.raises(kind, match=message) as error, start(out, **options):
        pass
    assert "\n" not in str(error.value)
    assert not list(out.parent.glob("*.lock"))
    if kind is RecipeError and "cannot be resumed" not in message:
        flags = {name: options.get(name, False) for name in ("resume", "overwrite")}
        with pytest.raises(kind, match=message):
            check_output(out, source=options.get("source"), **flags)
    return str(error.value)


def unfinished(out: Path, blocks: int = 2, **options: Any) -> Path:
    with start(out, **options) as partial:
        checkpoint(partial.folder, "half")
        for number in range(blocks):
            partial.journal(f"block {number}", {"rows": [number]})
    return partial.folder


def test_nothing_is_visible_before_it_is_published(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with start(out) as partial:
        checkpoint(partial.folder, "new")
        partial.journal("block 0", {"rows": []})
        assert not out.exists()
        assert partial.publish() == out
    assert contents(out) == NEW
    assert list(out.parent.iterdir()) == [out]


def test_failed_run_leaves_a_folder_to_resume(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), start(out) as partial:
        partial.journal("block 0", {"rows": [1.5], "name": "é"})
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    with start(out, resume=True) as partial:
        assert partial.finished == {"block 0": {"rows": [1.5], "name": "é"}}
        partial.journal("block 1", {})
        assert list(partial.finished) == ["block 0", "block 1"]
        checkpoint(partial.folder, "new")
        partial.publish()
    assert contents(out) == NEW


@pytest.mark.parametrize("torn", [b"", b'{"block": "block 2", "ent', b'{"block": "block 2", "entry": {}}', b"\0" * 100])
def test_torn_last_line_of_the_journal_is_dropped(tmp_path: Path, torn: bytes) -> None:
    journal = unfinished(tmp_path / "out") / STATE_FOLDER / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole + torn)
    with start(tmp_path / "out", resume=True) as partial:
        assert list(partial.finished) == ["block 0", "block 1"]
        assert journal.read_bytes() == whole
        partial.journal("block 2", {"rows": [2]})
    with start(tmp_path / "out", resume=True) as partial:
        assert partial.finished["block 2"] == {"rows": [2]}


@pytest.mark.parametrize(
    "line",
    [
        b"garbage",
        b"",
        b"[" * 100_000,
        b"5",
        b'{"block": "0"}',
        b'{"block": "0", "entry": "x"}',
        b'{"block": [], "entry": {}}',
    ],
    ids=lambda line: line[:30].decode(),
)
def test_corrupt_journal_is_refused(tmp_path: Path, line: bytes) -> None:
    journal = unfinished(tmp_path / "out") / STATE_FOLDER / "journal.jsonl"
    journal.write_bytes(line + b"\n" + journal.read_bytes())
    refused(tmp_path / "out", CheckpointError, r"journal.jsonl:1: corrupt", resume=True)


def test_unfinished_run_wants_a_decision(tmp_path: Path) -> None:
    unfinished(tmp_path / "out")
    refused(
        tmp_path / "out", RecipeError, "unfinished run is there; go on with --resume, or start anew with --overwrite"
    )
    refused(tmp_path / "out", RecipeError, "choose one", resume=True, overwrite=True)
    with start(tmp_path / "out", overwrite=True) as partial:
        assert not partial.finished
        assert [path.name for path in partial.folder.iterdir()] == [STATE_FOLDER]
        assert [path.name for path in (partial.folder / STATE_FOLDER).iterdir()] == ["run.json"]


def test_a_run_noted_before_runs_could_be_other_than_resumable_is_resumed(tmp_path: Path) -> None:
    noted = unfinished(tmp_path / "out") / STATE_FOLDER / "run.json"
    run = json.loads(noted.read_text())
    noted.write_text(json.dumps({key: run[key] for key in ("fingerprint", "overwrite")}))
    with start(tmp_path / "out", resume=True) as partial:
        assert list(partial.finished) == ["block 0", "block 1"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"overwrite": false}',
        "[" * 100_000,
        '{"fingerprint": null, "overwrite": false}',
        '{"fingerprint": {}, "overwrite": 1}',
    ],
    ids=lambda content: content[:50],
)
def test_a_run_that_left_no_sense_is_refused(tmp_path: Path, content: str) -> None:
    (unfinished(tmp_path / "out") / STATE_FOLDER / "run.json").write_text(content)
    refused(tmp_path / "out", RecipeError, "corrupt; delete .* and start anew", resume=True)


def test_what_an_unfinished_run_holds_is_counted_once(tmp_path: Path) -> None:
    assert held_bytes(tmp_path / "out") == 0
    partial = unfinished(tmp_path / "out")
    before = held_bytes(tmp_path / "out")
    (partial / "model.safetensors").write_bytes(b"x" * 2**20)
    assert held_bytes(tmp_path / "out") - before == pytest.approx(2**20, abs=2**14)
    checkpoint(
        partial / STATE_FOLDER / "replaced", "x" * 2**20
    )  # an old OUT, which stays until the new one is complete
    assert held_bytes(tmp_path / "out") - before == pytest.approx(2**20, abs=2**14)


def test_room_is_asked_for_what_is_not_there_yet(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    needed, held = free + 10**9, 2 * 10**9
    check_room(tmp_path / "deep/out", needed, held)
    with pytest.raises(MachineError, match=r"needs .* GB and its disk has .* GB free; make room, or choose another"):
        check_room(tmp_path / "deep/out", needed)
    with pytest.raises(MachineError, match=r"beside the 1\.00 MB of the unfinished run"):
        check_room(tmp_path / "deep/out", needed, 10**6)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (12_345, "12.3 kB"), (999_600, "1.00 MB"), (4_560_000, "4.56 MB"),
     (123_456_789, "123 MB"), (2_470_000_000, "2.47 GB"), (10**15, "1000 TB")],
)  # fmt: skip
def test_sizes_are_spelled_in_the_unit_that_fits(size: int, text: str) -> None:
    assert spell_size(size) == text


def test_nothing_to_resume(tmp_path: Path) -> None:
    refused(tmp_path / "out", RecipeError, "nothing to resume", resume=True)
    checkpoint(tmp_path / "out", "old")
    refused(tmp_path / "out", RecipeError, "finished already", resume=True)
    assert contents(tmp_path / "out") == OLD


def test_resume_names_what_has_changed(tmp_path: Path) -> None:
    unfinished(tmp_path / "out")
    now = {"recipe": {"method": "sparsegpt"}, "model": {"size": 7}, "torch": "x" * 100, "seed": 1}
    message = refused(tmp_path / "out", RecipeError, "cannot be resumed", resume=True, fingerprint=now)
    assert 'recipe ({"method": "wanda"} then, {"method": "sparsegpt"} now), seed (0 then, 1 now), torch;' in message
    assert "model" not in message
    now = FINGERPRINT | {"recipe": {"method": "wanda", "output": "x" * 100}}
    assert ": recipe (output);" in refused(
        tmp_path / "out", RecipeError, "cannot be resumed", resume=True, fingerprint=now
    )
    with start(tmp_path / "out", resume=True, fingerprint=json.loads(json.dumps(FINGERPRINT))):
        pass


def test_existing_output_is_kept_unless_overwrite(tmp_path: Path) -> None:
    out = checkpoint(tmp_path / "out", "old")
    refused(out, RecipeError, "exists already")
    with start(out, overwrite=True) as partial:
        checkpoint(partial.folder, "new")
        assert contents(out) == OLD
    assert contents(out) == OLD
    with start(out, resume=True) as partial:  # leave to overwrite was given when the run began
        partial.publish()
    assert contents(out) == NEW
    assert list(tmp_path.iterdir()) == [out]


def test_output_that_appeared_during_the_run_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RecipeError, match="exists already"), start(out) as partial:
        checkpoint(partial.folder, "new")
        checkpoint(out, "old")
        partial.publish()
    assert contents(out) == OLD
    out.rename(tmp_path / "elsewhere")
    with start(out, resume=True) as partial:
        partial.publish()
    assert contents(out) == NEW


@pytest.mark.parametrize("names", [["thesis.tex"], ["config.json"], ["model.safetensors"]], ids=str)
def test_overwrite_refuses_what_is_no_checkpoint(tmp_path: Path, names: list[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in names:
        (out / name).write_text("precious")
    refused(out, RecipeError, "exists already")
    refused(out, RecipeError, "not a checkpoint, so --overwrite will not replace it", overwrite=True)
    assert set(contents(out).values()) == {"precious"}


def test_file_in_the_place_of_the_output(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    refused(tmp_path / "out", RecipeError, "exists already")
    refused(tmp_path / "out", RecipeError, "not a checkpoint", overwrite=True)
    assert (tmp_path / "out").read_text() == "precious"


def test_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with start(tmp_path / "out") as partial:
        checkpoint(partial.folder, "new")
        partial.publish()
    assert contents(tmp_path / "out") == NEW


def test_foreign_partial_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("precious")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        refused(tmp_path / "out", RecipeError, "not written by llmsparse", **options)
    assert contents(tmp_path / "out.partial") == {"thesis.tex": "precious"}


def test_output_must_lie_apart_from_the_model(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "models" / "m", "old")
    (tmp_path / "link").symlink_to(model)
    for out in (model, model / "out", tmp_path / "models", tmp_path / "link", tmp_path / "link" / "out"):
        refused(out, RecipeError, "must lie apart", source=model, overwrite=True)
    refused(tmp_path / "models" / "x", RecipeError, "must lie apart", source=tmp_path / "models" / "x.partial")
    assert contents(model) == OLD
    with start(tmp_path / "models" / "m-pruned", source=model):
        pass


def test_mount_point_is_refused_at_once() -> None:
    for out in (Path("/"), Path("/proc")):
        with pytest.raises(RecipeError, match="name a folder inside it"):
            start(out)


def test_symlinked_output_is_replaced_where_it_points(tmp_path: Path) -> None:
    checkpoint(tmp_path / "big-disk" / "out", "old")
    (tmp_path / "out").symlink_to(tmp_path / "big-disk" / "out")
    with start(tmp_path / "out", overwrite=True) as partial:
        assert partial.folder == tmp_path / "big-disk" / "out.partial"
        checkpoint(partial.folder, "new")
        partial.publish()
    assert (tmp_path / "out").is_symlink()
    assert contents(tmp_path / "out") == NEW


def test_output_that_is_not_writable(locked: Path) -> None:
    with pytest.raises(MachineError, match=r"not writable \(Permission denied\)") as error:
        start(locked / "out")
    assert error.value.exit_code == 3


def test_plan_sees_what_would_be_refused_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    check_output(out, resume=False, overwrite=False, source=tmp_path / "model")
    assert not list(tmp_path.iterdir())
    with start(out), pytest.raises(MachineError, match=rf"another run \(process {os.getpid()}\)"):
        check_output(out, resume=True, overwrite=False)
    check_output(out, resume=True, overwrite=False)
    with pytest.raises(MachineError, match="cannot be written"):
        (tmp_path / "file").write_text("")
        check_output(tmp_path / "file" / "out", resume=False, overwrite=False)


def test_plan_sees_that_a_place_is_not_writable(locked: Path) -> None:
    for out in (locked / "out", locked / "deep" / "out", Path("/proc/nowhere/out")):
        with pytest.raises(MachineError, match="not writable"):
            check_output(out, resume=False, overwrite=False)


def test_output_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot be written"):
        start(tmp_path / "file" / "out")


HOLD = """
import sys, time
from pathlib import Path
from llmsparse.runs.partial import PartialOutput
with PartialOutput(Path(sys.argv[1]), fingerprint={"seed": 0}, resume=False, overwrite=True) as partial:
    partial.journal("block 0", {})
    print("started", flush=True)
    time.sleep(60)
"""


def test_a_disk_too_full_for_the_lock_keeps_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("llmsparse.runs.partial.os.pwrite", full)
        with pytest.raises(MachineError, match="disk full"):
            start(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with start(tmp_path / "out"):
        pass


def test_second_run_is_told_of_the_first_until_that_dies(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None and first.stdout.readline() == "started\n"
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(MachineError, match=rf"another run \(process {first.pid}\) is writing there") as error:
                start(out, fingerprint={"seed": 0}, **options)
            assert "\n" not in str(error.value)
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert (tmp_path / "out.lock").exists()
        with start(out, fingerprint={"seed": 0}, resume=True) as partial:
            assert list(partial.finished) == ["block 0"]
        assert not (tmp_path / "out.lock").exists()
    finally:
        first.kill()
        first.communicate()


def test_of_several_processes_the_first_alone_looks_who_else_is_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with start(out):
        with pytest.raises(MachineError, match="another run"):
            check_output(out, resume=True, overwrite=False)
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        check_output(out, resume=True, overwrite=False)  # the first one of its own run may hold it by now
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(MachineError, match="another run"):
            check_output(out, resume=True, overwrite=False)


CRASH = """
import os, sys
from pathlib import Path
from llmsparse.runs.partial import PartialOutput

out, moment = Path(sys.argv[1]), int(sys.argv[2])
left = moment

def crash(event, args):
    global left
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "fcntl.flock", "os.scandir"):
        left -= 1
        if left < 0:
            os._exit(9)

def run(resume, overwrite):
    with PartialOutput(out, fingerprint={"seed": 0}, resume=resume, overwrite=overwrite) as partial:
        for block in ("a", "b"):
            if block not in partial.finished:
                partial.journal(block, {})
        for name in ("config.json", "model.safetensors"):
            (partial.folder / name).write_text("new")
        partial.publish()

def contents(folder):
    return sorted({path.read_text() for path in folder.glob("*") if path.is_file()})

had_old = out.exists()
while True:
    child = os.fork()
    if not child:
        sys.addaudithook(crash)
        run(False, had_old)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), status
    if out.exists():
        assert contents(out) in (["old"], ["new"]) and len(list(out.glob("[!.]*"))) == 2, (moment, contents(out))
    resumable = (out.with_name("out.partial") / ".llmsparse" / "run.json").exists()
    if status == 9:
        finished = out.exists() and contents(out) == ["new"]
        run(resumable, not resumable and (had_old or finished))
    assert contents(out) == ["new"] and list(out.parent.iterdir()) == [out], moment
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"], moment
    if status == 0:
        break
    for path in out.iterdir():
        path.write_text("old") if had_old else path.unlink()
    if not had_old:
        out.rmdir()
    moment += 1
    left = moment
print(moment)
"""


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_crash_at_any_moment_loses_nothing(tmp_path: Path, overwrite: bool) -> None:
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    if overwrite:
        checkpoint(out, "old")
    done = subprocess.run([sys.executable, "-c", CRASH, str(out), "0"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_old_output_comes_back_after_a_crash_between_the_two_renames(tmp_path: Path) -> None:
    out = checkpoint(tmp_path / "out", "old")
    with start(out, overwrite=True) as partial:
        checkpoint(partial.folder, "new")
        out.rename(partial.folder / STATE_FOLDER / "replaced")
    refused(out, RecipeError, "unfinished run is there")
    assert contents(out) == OLD
    with start(out, resume=True) as partial:
        partial.publish()
    assert contents(out) == NEW


def test_state_left_by_a_crash_after_the_renames_is_removed(tmp_path: Path) -> None:
    out = checkpoint(tmp_path / "out", "new")
    checkpoint(out / STATE_FOLDER / "replaced", "old")
    refused(out, RecipeError, "exists already")
    assert contents(out) == NEW


def test_crash_before_a_run_has_noted_anything_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "out.partial" / STATE_FOLDER).mkdir(parents=True)
    (tmp_path / "out.partial" / STATE_FOLDER / "run.json.draft").write_text('{"finger')
    refused(tmp_path / "out", RecipeError, "nothing to resume", resume=True)
    with start(tmp_path / "out") as partial:
        assert not partial.finished


def test_importing_it_does_not_import_torch() -> None:
    script = "import sys, llmsparse.runs.partial; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], env=os.environ).returncode == 0
