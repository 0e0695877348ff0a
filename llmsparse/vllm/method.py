"""How a layer of vLLM is loaded from a packed folder, and what multiplies for it.

vLLM merges q, k and v, gate and up. On disk they are apart, some of them packed and some not, so each is kept as it is read
until all are there; then each goes to a backend of its own choice, and a layer for which that is `dense` throughout to
vLLM's own product.
"""

# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUntypedBaseClass=false, reportUnknownArgumentType=false, reportUnknownParameterType=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from llmsparse.errors import CheckpointError
from llmsparse.formats import layout, restore
from llmsparse.inference.linear import PackedMatrix, chosen
from llmsparse.vllm.product import Part, Parts, Product
from llmsparse.vllm.slicing import cut, share_of

LETTERS = {"q": 0, "k": 1, "v": 2}  # what vLLM calls the shards of an attention
READ = "read_by_llmsparse"  # attribute of a layer that loads: (number of the source, suffix) → tensor as on disk
PRODUCT = "product_of_llmsparse"  # attribute of one that is loaded


class PackedMethod(QuantizeMethodBase):
    """Of a layer that holds the weights `names`, one below the other, at least one of which is packed."""

    plain: Callable[[], Any]  # vLLM's own method for such a layer

    def __init__(self, config: Any, prefix: str, names: Sequence[str]) -> None:
        self.config, self.prefix, self.names = config, prefix, list(names)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Parameters without an element, under the names on disk: what is loaded into them is kept beside."""
        self.width, self.own_width = input_size, input_size_per_partition
        self.sizes, self.dtype = list(output_partition_sizes), params_dtype
        vars(layer)[READ] = {}
        for suffix, dtype in self._stored().items():
            place = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            vars(place)["weight_loader"] = self._loader(layer, suffix)
            layer.register_parameter("weight" + suffix, place)
        self.device = layer.get_parameter("weight").device

    def _stored(self) -> dict[str, torch.dtype]:
        """Suffix → dtype of what lies on disk of the weights; vLLM warns of another one."""
        packed = [layout(self.config.layers[name]) for name in self.names if name in self.config.layers]
        return {"": self.dtype} | {suffix: kind for one in packed for suffix, (_, kind) in one.items()}

    def _loader(self, layer: nn.Module, suffix: str) -> Callable[..., None]:
        def load(place: Tensor, loaded: Tensor, shard: Any = None) -> None:
            shard = getattr(loaded, "shard_id", None) if shard is None else shard  # either, by the model's own loader
            number = LETTERS.get(shard, shard) if shard is not None else 0
            if not isinstance(number, int) or number >= len(self.names):
                raise CheckpointError(f"{self.prefix}: packed weights are not known to be merged as {shard!r}")
            vars(layer)[READ][number, suffix] = loaded.clone()  # what is read next may lie in the same memory

        return load

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Hand what was loaded to backends. CheckpointError where it is damaged or does not fit the layer, MachineError for
        a backend that was asked for by name and cannot run it."""
        read = vars(layer).pop(READ, None)
        if read is None:
            return  # done before
        parts = [self._part(layer, number, read) for number in range(len(self.names))]
        for suffix in self._stored():
            delattr(layer, "weight" + suffix)
        if all(isinstance(part, Tensor) or part.choice.backend == "dense" for part in parts):
            run = self._plain_product(layer, parts)
        else:
            run = Parts([part if isinstance(part, PackedMatrix) else part.contiguous() for part in parts])
        vars(layer)[PRODUCT] = Product(self.prefix, run)

    def _part(self, layer: nn.Module, number: int, read: dict[tuple[int, str], Tensor]) -> Part:
        name = self.names[number]
        described = self.config.layers.get(name)
        tensors = {suffix: tensor for (of, suffix), tensor in read.items() if of == number}
        if "" not in tensors:
            raise CheckpointError(f"{name}: is not in the files; the packed folder is incomplete")
        if described is None:  # this one was left dense
            rows, columns = self._share(layer, number, tuple(tensors[""].shape))
            return tensors[""][rows, columns].to(self.device, self.dtype)
        packed = restore(name, described, tensors, self.dtype)
        packed = cut(name, packed, *self._share(layer, number, packed.shape)).moved(self.device)
        return PackedMatrix(packed, chosen(name, packed, **self.config.options))

    def _share(self, layer: Any, number: int, shape: tuple[int, ...]) -> tuple[slice, slice]:
        """The rows and columns of a weight that are this process's."""
        name, rank, processes = self.names[number], layer.tp_rank, layer.tp_size
        merged = len(self.names) < len(self.sizes)  # on disk already
        if merged and processes > 1:
            raise CheckpointError(
                f"{name}: is merged on disk, and packed weights that are cannot be divided; choose --tensor-parallel-size 1"
            )
        size = sum(self.sizes) if merged else self.sizes[number]
        rows = self._rows(layer, shape[0], size)
        columns = share_of(shape[-1], self.own_width, rank, processes) if len(shape) == 2 else slice(0, 0)
        if len(shape) != 2 or shape[-1] != self.width or not self._fits(rows.stop - rows.start, size):
            raise CheckpointError(
                f"{name}: is {list(shape)}, the model has {size * processes} × {self.width} or less; they do not belong together"
            )
        return rows, columns

    def _rows(self, layer: Any, out: int, size: int) -> slice:
        return share_of(out, size, layer.tp_rank, layer.tp_size)

    def _fits(self, rows: int, size: int) -> bool:
        return rows == size

    def _plain_product(self, layer: nn.Module, parts: Sequence[Part]) -> Callable[[Tensor, Tensor | None], Tensor]:
        """vLLM's product with the parts unpacked."""
        weight = torch.cat([part if isinstance(part, Tensor) else part.dense() for part in parts])
        layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        plain = self.plain()
        plain.process_weights_after_loading(layer)
        return lambda x, bias: plain.apply(layer, x, bias)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) → (..., out)."""
        product = vars(layer)[PRODUCT]
        if torch.compiler.is_compiling():
            return torch.ops.llmsparse.vllm_linear(x, bias, product.key, sum(self.sizes))
        return product.run(x, bias)


class PackedLinearMethod(PackedMethod, LinearMethodBase):
    """Of a linear layer, merged or not."""

    plain = UnquantizedLinearMethod


class PackedHeadMethod(PackedMethod):
    """Of a head that is not tied. vLLM fills the vocabulary up to a size that divides; those logits are 0."""

    plain = UnquantizedEmbeddingMethod

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        raise CheckpointError(
            f"{self.names[0]}: is packed, and config.json says that it is tied; they do not belong together"
        )

    def _rows(self, layer: Any, out: int, size: int) -> slice:
        at = layer.shard_indices
        return slice(at.org_vocab_start_index, min(at.org_vocab_end_index, out))

    def _fits(self, rows: int, size: int) -> bool:
        return rows <= size

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = vars(layer)[PRODUCT].run(x, None)
        logits = functional.pad(logits, (0, sum(self.sizes) - logits.shape[-1]))
        return logits if bias is None else logits + bias
