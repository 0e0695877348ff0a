"""The published one-shot loop, plainly: the yardstick that `eval.speed` times llmsparse against.

The whole model is in memory, one block at a time is calibrated through module hooks with a statistic for every Linear,
and pruned as the papers' released code does it. Written from the papers' equations for timing; llmsparse's own methods
are in `llmsparse/pruners`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def prune_model(folder: Path, output: Path, ids: Tensor, method: str, sparsity: float, device: torch.device) -> None:
    """Prune a Llama-shaped checkpoint in memory and save it. `ids`: (windows, tokens)."""
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    with torch.no_grad():
        hidden = [model.model.embed_tokens(row[None].to(device)) for row in ids]
        positions = torch.arange(ids.shape[1], device=device)[None]
        rotary = model.model.rotary_emb(hidden[0], positions)
        for layer in model.model.layers:

            def forward(x: Tensor, layer: nn.Module = layer) -> Tensor:
                return layer(x, position_ids=positions, position_embeddings=rotary)

            prune_layer(layer, forward, hidden, method, sparsity)
            hidden = [forward(x) for x in hidden]
    model.to(torch.bfloat16).save_pretrained(output)


def prune_layer(
    layer: nn.Module, forward: Callable[[Tensor], Tensor], hidden: list[Tensor], method: str, sparsity: float
) -> None:
    """Pass 1 with a hook on every Linear, then prune each from its own statistic."""
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    statistics: dict[str, Tensor] = {}
    hooks: list[torch.utils.hooks.RemovableHandle] = []
    for name, module in linears.items():
        shape = {"magnitude": (), "wanda": (module.in_features,)}.get(method, (module.in_features,) * 2)
        statistics[name] = torch.zeros(shape, device=module.weight.device)

        def update(_: nn.Module, args: tuple[Tensor], name: str = name) -> None:
            x = args[0].flatten(0, 1).float()  # (tokens, in)
            if method == "wanda":
                statistics[name].add_(x.square().sum(0))
            elif method != "magnitude":
                statistics[name].add_(x.T @ x)

        hooks.append(module.register_forward_pre_hook(update))
    for x in hidden:
        forward(x)
    for hook in hooks:
        hook.remove()
    for name, module in linears.items():
        weight = module.weight.float()
        module.weight.copy_(METHODS[method](weight, statistics[name], sparsity))


def magnitude(weight: Tensor, _: Tensor, sparsity: float) -> Tensor:
    """Zero all entries up to the k-th smallest magnitude of the matrix, found by a full sort."""
    threshold = weight.abs().flatten().sort().values[int(weight.numel() * sparsity)]
    return weight * (weight.abs() > threshold)


def wanda(weight: Tensor, squares: Tensor, sparsity: float) -> Tensor:
    """Zero the smallest |W|·‖X‖ of each row, found by a full sort of the row."""
    order = (weight.abs() * squares.sqrt()).sort(dim=-1, stable=True).indices
    drop = order[:, : int(weight.shape[1] * sparsity)]
    return weight.scatter(1, drop, 0.0)


def sparsegpt(weight: Tensor, gram: Tensor, sparsity: float) -> Tensor:
    """The column sweep over lazily updated blocks of 128."""
    w, h = weight.clone(), 2 * gram
    h.diagonal().add_(0.01 * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    u = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, w.shape[1], 128):
        stop = min(start + 128, w.shape[1])
        block, errors, corner = w[:, start:stop].clone(), torch.zeros_like(w[:, start:stop]), u[start:stop, start:stop]
        score = block.square() / corner.diagonal().square()
        keep = score > score.flatten().sort().values[int(score.numel() * sparsity)]
        for j in range(stop - start):
            column = block[:, j]
            pruned = column * keep[:, j]
            error = (column - pruned) / corner[j, j]
            block[:, j:] -= error[:, None] * corner[j, j:]
            block[:, j] = pruned
            errors[:, j] = error
        w[:, start:stop] = block
        w[:, stop:] -= errors @ u[start:stop, stop:]
    return w


def alps(weight: Tensor, gram: Tensor, sparsity: float) -> Tensor:
    """ADMM with one fp64 eigendecomposition on the CPU, a top-k of the whole matrix each iteration, then ten CG steps."""
    h = gram.double().cpu()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    scale = h.diagonal().sqrt() + 1e-8
    h = h / scale / scale[:, None]
    values, vectors = (part.to(weight.device, torch.float32) for part in torch.linalg.eigh(h))
    h, scale = h.to(weight.device, torch.float32), scale.to(weight.device, torch.float32)
    dense = (weight * scale).T  # (in, out)
    target = h @ dense
    kept = int(weight.numel() * (1 - sparsity))

    def project(b: Tensor) -> Tensor:
        mask = torch.zeros(b.numel(), device=b.device)
        mask[b.abs().flatten().topk(kept).indices] = 1
        return b * mask.view_as(b)

    d, v, rho = project(dense), torch.zeros_like(dense), 0.1
    b, before = d, d != 0
    for step in range(300):
        b = vectors @ ((vectors.T @ (target - v + rho * d)) / (values + rho)[:, None])
        d = project(b + v / rho)
        v = v + rho * (b - d)
        if step % 3 == 2:
            changed = int(((d != 0) ^ before).sum()) / kept
            before = d != 0
            if changed == 0 or (step >= 30 and changed < 3e-4):
                break
            rho *= 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
    mask = (project(b) != 0).float()
    b = b * mask
    residual = (target - h @ b) * mask
    direction, energy = residual, residual.square().sum(0)
    for _ in range(10):
        image = (h @ direction) * mask
        length = energy / (direction * image).sum(0).clamp_min(1e-20)
        b, residual = b + length * direction, residual - length * image
        direction, energy = (
            residual + direction * (residual.square().sum(0) / energy.clamp_min(1e-20)),
            residual.square().sum(0),
        )
    return (b.T / scale).contiguous()


METHODS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
    "alps": alps,
}
