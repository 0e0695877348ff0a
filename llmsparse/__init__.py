"""llmsparse: make a trained language model sparse, and make that sparsity pay.

    import llmsparse

    report = llmsparse.prune(model="meta-llama/Llama-3.2-1B", sparsity=0.5)
    print(llmsparse.perplexity(report.output, "builtin").perplexity)

The names below load what they need when they are first used: `import llmsparse` itself imports neither torch nor
transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmsparse import import_hook
from llmsparse.errors import (
    CalibrationError,
    CheckpointError,
    LlmsparseError,
    MachineError,
    NumericalError,
    PatternError,
    RecipeError,
)

if TYPE_CHECKING:
    from llmsparse.doctor import Diagnosis, diagnose
    from llmsparse.evaluation import Perplexity, perplexity
    from llmsparse.experts_interface import fuse
    from llmsparse.explanation import Explanation, explain
    from llmsparse.factorization.pipeline import factorize
    from llmsparse.factorization.recipe import FactorRecipe
    from llmsparse.factorization.report import FactorReport
    from llmsparse.footprint import Packing
    from llmsparse.generation import Generation, generate
    from llmsparse.hf import SparseConfig
    from llmsparse.inspection import Inspection, inspect
    from llmsparse.packing import pack
    from llmsparse.pipeline import prune
    from llmsparse.planning import Plan, plan
    from llmsparse.recipe import Recipe, Rule
    from llmsparse.report import Report
    from llmsparse.tuning.pipeline import tune
    from llmsparse.tuning.recipe import TuneRecipe
    from llmsparse.tuning.report import TuneReport
    from llmsparse.unpacking import Unpacking, unpack

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "Diagnosis",
    "Explanation",
    "FactorRecipe",
    "FactorReport",
    "Generation",
    "Inspection",
    "LlmsparseError",
    "MachineError",
    "NumericalError",
    "Packing",
    "PatternError",
    "Perplexity",
    "Plan",
    "Recipe",
    "RecipeError",
    "Report",
    "Rule",
    "SparseConfig",
    "TuneRecipe",
    "TuneReport",
    "Unpacking",
    "__version__",
    "diagnose",
    "explain",
    "factorize",
    "fuse",
    "generate",
    "inspect",
    "pack",
    "perplexity",
    "plan",
    "prune",
    "tune",
    "unpack",
]

_MODULES = {
    "Diagnosis": "doctor",
    "Explanation": "explanation",
    "FactorRecipe": "factorization.recipe",
    "FactorReport": "factorization.report",
    "Generation": "generation",
    "Inspection": "inspection",
    "Packing": "footprint",
    "Perplexity": "evaluation",
    "Plan": "planning",
    "Recipe": "recipe",
    "Report": "report",
    "Rule": "recipe",
    "SparseConfig": "hf",
    "TuneRecipe": "tuning.recipe",
    "TuneReport": "tuning.report",
    "Unpacking": "unpacking",
    "diagnose": "doctor",
    "explain": "explanation",
    "factorize": "factorization.pipeline",
    "fuse": "experts_interface",
    "generate": "generation",
    "inspect": "inspection",
    "pack": "packing",
    "perplexity": "evaluation",
    "plan": "planning",
    "prune": "pipeline",
    "tune": "tuning.pipeline",
    "unpack": "unpacking",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'llmsparse' has no attribute {name!r}")
    return getattr(import_module(f"llmsparse.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


import_hook.install()
