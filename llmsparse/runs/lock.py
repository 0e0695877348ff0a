"""A lock on an output folder that the system drops when its holder dies."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from llmsparse.errors import MachineError


class Lock:
    """An flock on a file beside OUT that names the process; the file goes when the run ends in any orderly way."""

    def __init__(self, file: Path, out: Path) -> None:
        self._file = file
        while True:
            self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(self._descriptor), os.stat(file)):
                    break  # otherwise its last holder removed the file between our two calls
            except FileNotFoundError:
                pass
            except BlockingIOError as error:
                holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
                os.close(self._descriptor)
                raise MachineError(
                    f"{out}: another run (process {holder}) is writing there; wait for it, or choose another output"
                ) from error
            os.close(self._descriptor)
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError:  # a full disk
            self.release()
            raise

    def release(self) -> None:
        """Let go; safe to call again."""
        if self._descriptor >= 0:
            self._file.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1
