"""The methods, one paper a file. To add one: write the class, name it in `PRUNERS`, give it a recipe."""

from __future__ import annotations

from llmsparse.pruners.magnitude import Magnitude
from llmsparse.pruners.protocol import Pruned, Pruner
from llmsparse.pruners.wanda import Wanda

PRUNERS: dict[str, type[Pruner]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
}

__all__ = ["PRUNERS", "Magnitude", "Pruned", "Pruner", "Wanda"]
