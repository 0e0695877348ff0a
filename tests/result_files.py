"""The files of a result, as the promise of identical bytes sees them."""

from __future__ import annotations

import json
import re
from pathlib import Path


def files(folder: Path) -> dict[str, bytes]:
    """What the promise of identical bytes covers: every file, but for what was timed."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    if "llmsparse_report.json" in found:
        report = json.loads(found["llmsparse_report.json"])
        report.pop("timings")
        found["llmsparse_report.json"] = json.dumps(report).encode()
    return found | {"README.md": re.sub(rb"\| took \|.*", b"", found.get("README.md", b""))}
