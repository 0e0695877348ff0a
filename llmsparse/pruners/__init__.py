"""The methods, one paper a file. To add one: write the class, name it in `PRUNERS`, give it a recipe."""

from __future__ import annotations

from llmsparse.pruners.alps import ALPS
from llmsparse.pruners.dsnot import DSnoT
from llmsparse.pruners.magnitude import Magnitude
from llmsparse.pruners.protocol import Pruned, Pruner, workspace_of
from llmsparse.pruners.random import Random
from llmsparse.pruners.sparsegpt import SparseGPT
from llmsparse.pruners.swaps import Swaps
from llmsparse.pruners.wanda import Wanda

PRUNERS: dict[str, type[Pruner]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "dsnot": DSnoT,
    "alps": ALPS,
    "swaps": Swaps,
    "random": Random,
}

__all__ = [
    "ALPS",
    "PRUNERS",
    "DSnoT",
    "Magnitude",
    "Pruned",
    "Pruner",
    "Random",
    "SparseGPT",
    "Swaps",
    "Wanda",
    "workspace_of",
]
