"""Make transformers know packed checkpoints, without importing it: `import llmsparse` stays fast.

transformers has no entry points for quantizers, so a process must have imported llmsparse before it loads a packed
folder. In which order it imports the two does not matter.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
REGISTERS = "llmsparse.inference.quantizer"  # registers when it is imported


def install() -> None:
    """Register now if transformers is loaded, else as soon as it is."""
    if REGISTRY in sys.modules:
        import_module(REGISTERS)
    elif not any(isinstance(finder, _AfterRegistry) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterRegistry())


class _AfterRegistry(MetaPathFinder):
    """Finds the registry as everybody does, and lets us register once it has been executed.

    It stays on the path for good: `find_spec` alone executes nothing, and may be called by anyone.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            import_module(REGISTERS)

        spec.loader.exec_module = exec_module
        return spec
