"""Which share of the zeros each part of a model gets: one paper a file. To add one: write the class, name it here."""

from __future__ import annotations

from llmsparse.pruning.allocation.alphapruning import AlphaPruning
from llmsparse.pruning.allocation.dlp import DLP
from llmsparse.pruning.allocation.erdos_renyi import ErdosRenyi, ErdosRenyiKernel
from llmsparse.pruning.allocation.lsa import LSA
from llmsparse.pruning.allocation.owl import OWL
from llmsparse.pruning.allocation.protocol import Allocation, Uniform
from llmsparse.pruning.allocation.search import Search

ALLOCATIONS: dict[str, type[Allocation]] = {
    "uniform": Uniform,
    "owl": OWL,
    "dlp": DLP,
    "lsa": LSA,
    "alphapruning": AlphaPruning,
    "er": ErdosRenyi,
    "erk": ErdosRenyiKernel,
    "search": Search,
}

__all__ = ["ALLOCATIONS", "Allocation", "Search", "Uniform"]
