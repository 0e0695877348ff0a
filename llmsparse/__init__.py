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

from llmsparse.errors import (
    CalibrationError,
    CheckpointError,
    LlmsparseError,
    MachineError,
    NumericalError,
    PatternError,
    RecipeError,
)
from llmsparse.inference import import_hook
from llmsparse.version import __version__

if TYPE_CHECKING:
    from llmsparse.benchmark.doctor import Diagnosis as Diagnosis
    from llmsparse.benchmark.doctor import diagnose as diagnose
    from llmsparse.cutting.pipeline import activations as activations
    from llmsparse.cutting.profile import Profile as Profile
    from llmsparse.cutting.profile import profile as profile
    from llmsparse.cutting.recipe import ActivationsRecipe as ActivationsRecipe
    from llmsparse.cutting.report import ActivationsReport as ActivationsReport
    from llmsparse.evaluation.perplexity import Perplexity as Perplexity
    from llmsparse.evaluation.perplexity import perplexity as perplexity
    from llmsparse.factorization.pipeline import factorize as factorize
    from llmsparse.factorization.recipe import FactorizeRecipe as FactorizeRecipe
    from llmsparse.factorization.report import FactorizeReport as FactorizeReport
    from llmsparse.inference.experts_interface import fuse as fuse
    from llmsparse.inference.explain import Explanation as Explanation
    from llmsparse.inference.explain import explain as explain
    from llmsparse.inference.generate import Generation as Generation
    from llmsparse.inference.generate import generate as generate
    from llmsparse.inference.quantizer import SparseConfig as SparseConfig
    from llmsparse.packing.inspect import Inspection as Inspection
    from llmsparse.packing.inspect import inspect as inspect
    from llmsparse.packing.pack import pack as pack
    from llmsparse.packing.report import Packing as Packing
    from llmsparse.packing.unpack import Unpacking as Unpacking
    from llmsparse.packing.unpack import unpack as unpack
    from llmsparse.pruning.pipeline import prune as prune
    from llmsparse.pruning.plan import PrunePlan as PrunePlan
    from llmsparse.pruning.recipe import PruneRecipe as PruneRecipe
    from llmsparse.pruning.recipe import Rule as Rule
    from llmsparse.pruning.report import PruneReport as PruneReport
    from llmsparse.quantization.pipeline import quantize as quantize
    from llmsparse.quantization.recipe import QuantizeRecipe as QuantizeRecipe
    from llmsparse.quantization.report import QuantizeReport as QuantizeReport
    from llmsparse.runs.plan import plan as plan
    from llmsparse.scoring.pipeline import scores as scores
    from llmsparse.scoring.recipe import ScoresRecipe as ScoresRecipe
    from llmsparse.scoring.report import ScoresReport as ScoresReport
    from llmsparse.shrinking.pipeline import shrink as shrink
    from llmsparse.shrinking.recipe import ShrinkRecipe as ShrinkRecipe
    from llmsparse.shrinking.report import ShrinkReport as ShrinkReport
    from llmsparse.tuning.pipeline import tune as tune
    from llmsparse.tuning.recipe import TuneRecipe as TuneRecipe
    from llmsparse.tuning.report import TuneReport as TuneReport

_ERRORS = (
    CalibrationError, CheckpointError, LlmsparseError, MachineError, NumericalError, PatternError, RecipeError,
)  # fmt: skip

_LAZY = {  # name → the module it stands in
    "ActivationsRecipe": "cutting.recipe",
    "ActivationsReport": "cutting.report",
    "Diagnosis": "benchmark.doctor",
    "Explanation": "inference.explain",
    "FactorizeRecipe": "factorization.recipe",
    "FactorizeReport": "factorization.report",
    "Generation": "inference.generate",
    "Inspection": "packing.inspect",
    "Packing": "packing.report",
    "Perplexity": "evaluation.perplexity",
    "Profile": "cutting.profile",
    "PrunePlan": "pruning.plan",
    "PruneRecipe": "pruning.recipe",
    "PruneReport": "pruning.report",
    "QuantizeRecipe": "quantization.recipe",
    "QuantizeReport": "quantization.report",
    "Rule": "pruning.recipe",
    "ScoresRecipe": "scoring.recipe",
    "ScoresReport": "scoring.report",
    "ShrinkRecipe": "shrinking.recipe",
    "ShrinkReport": "shrinking.report",
    "SparseConfig": "inference.quantizer",
    "TuneRecipe": "tuning.recipe",
    "TuneReport": "tuning.report",
    "Unpacking": "packing.unpack",
    "activations": "cutting.pipeline",
    "diagnose": "benchmark.doctor",
    "explain": "inference.explain",
    "factorize": "factorization.pipeline",
    "fuse": "inference.experts_interface",
    "generate": "inference.generate",
    "inspect": "packing.inspect",
    "pack": "packing.pack",
    "perplexity": "evaluation.perplexity",
    "plan": "runs.plan",
    "profile": "cutting.profile",
    "prune": "pruning.pipeline",
    "quantize": "quantization.pipeline",
    "scores": "scoring.pipeline",
    "shrink": "shrinking.pipeline",
    "tune": "tuning.pipeline",
    "unpack": "packing.unpack",
}

_FORMER = {  # names of version 0.1, for one version more
    "FactorRecipe": "FactorizeRecipe",
    "FactorReport": "FactorizeReport",
    "Plan": "PrunePlan",
    "Recipe": "PruneRecipe",
    "Report": "PruneReport",
}

__all__ = ["__version__", *sorted([error.__name__ for error in _ERRORS] + [*_LAZY])]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    name = _FORMER.get(name, name)
    if name not in _LAZY:
        raise AttributeError(f"module 'llmsparse' has no attribute {name!r}")
    return getattr(import_module(f"llmsparse.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


import_hook.install()
