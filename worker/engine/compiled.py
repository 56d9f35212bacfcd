"""Makes fast code of a loaded model's layers, by `torch.compile` and by fused projections.

Each layer is compiled by itself: layers of one class share their code, so that this takes seconds,
not minutes, and the code is kept between starts (``TORCHINDUCTOR_CACHE_DIR``). Added is what the
compiler does not do by itself:

- Linear layers that read the same input (queries, keys and values; gate and up) get one common
  weight. In the compiled code they are one matrix product; the modules stay, so the model's own
  code runs unchanged.
- Perceptrons whose inner width the GPU's matrix units dislike (Qwen2.5-VL's vision tower: 3420) are
  made a little wider with zeros, which adds nothing to any result.
- A convolution that reads each patch once (a vision tower's first layer) is computed as the matrix
  product that it is.
- The norm behind the last layer is compiled like a layer.

The sizes of batches are no part of the code (``dynamic``), but for 1.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.nn.functional import linear, pad

from visq.errors import ConfigurationError
from worker.engine.families.base import Family
from worker.engine.loading import LoadedModel
from worker.engine.toolchain import c_compiler

logger = logging.getLogger(__name__)

FUSED: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of linear layers that, inside one module, read the same input."""

ALIGNED: Final = 64
"""Inner widths of perceptrons are made a multiple of this."""

MOST_VARIANTS: Final = 64
"""Of one function's code, before the compiler gives it up."""


class Part(nn.Module):
    """Some of the output features of a linear layer that it shares with its neighbours."""

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, start: int, end: int
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.start, self.end = start, end
        self.in_features, self.out_features = weight.shape[1], end - start

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)[..., self.start : self.end]


class PatchProduct(nn.Module):
    """A convolution over inputs that are exactly as large as its kernel."""

    def __init__(self, convolution: nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self._convolution = [convolution]  # (not a submodule)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[2:] != self.weight.shape[2:]:
            made: torch.Tensor = self._convolution[0](x)
            return made
        product = linear(x.flatten(1), self.weight.flatten(1), self.bias)
        return product.view(*product.shape, *[1] * (x.ndim - 2))


def compile_model(loaded: LoadedModel, family: Family) -> None:
    """Prepare all layers of `loaded` to be compiled at their first call. After that, their linear
    layers cannot be replaced.

    :raises ConfigurationError: if there is no C compiler, which Triton needs.
    """
    if loaded.device.type == "cuda" and c_compiler() is None:
        raise ConfigurationError(
            "to compile the model's layers for CUDA, a C compiler is needed and none is there: "
            "install gcc, name one in CC, or start with VISQ_EAGER_MODE=true, which is slower"
        )
    raise_limits()
    count = 0
    _replace_convolutions(loaded.model)
    for layer in layers(loaded, family):
        fuse_projections(layer)
        # (Not `layer.compile`, whose code object all modules share.)
        layer.forward = torch.compile(layer.forward, backend=merging, dynamic=True)
        count += 1
    logger.info("%d layers of the model %s will be compiled", count, loaded.name)


def raise_limits() -> None:
    """In each thread that runs compiled code: in newer versions of torch, each has its own limits.
    Beyond them, a layer silently runs uncompiled."""
    torch._dynamo.config.recompile_limit = MOST_VARIANTS
    torch._dynamo.config.accumulated_recompile_limit = 16 * MOST_VARIANTS


def layers(loaded: LoadedModel, family: Family) -> Iterator[nn.Module]:
    """What is called often enough to be compiled: the decoder's layers and its norm, and the
    blocks of the vision tower."""
    yield from family.decoder.layers
    yield family.decoder.norm
    own = set(family.decoder.modules())
    for module in loaded.model.modules():
        if isinstance(module, nn.ModuleList) and module not in own and len(module) > 1:
            kinds = {type(each) for each in module}
            names = [name for name, _ in module[0].named_children()]
            if len(kinds) == 1 and any("attn" in each or "attention" in each for each in names):
                yield from module


def fuse_projections(layer: nn.Module) -> None:
    """Give linear layers of `layer` that read the same input one common weight."""
    for module in list(layer.modules()):
        _widen(module)
        for names in FUSED:
            parts = [getattr(module, name, None) for name in names]
            if all(type(part) is nn.Linear for part in parts):
                _fuse(module, names, parts)  # type: ignore[arg-type]


def _widen(module: nn.Module) -> None:
    """Widen a gated perceptron with zeros to a multiple of `ALIGNED`."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(type(part) is nn.Linear for part in parts):
        return
    gate, up, down = (part for part in parts if isinstance(part, nn.Linear))
    missing = -down.in_features % ALIGNED
    function: Any = getattr(module, "act_fn", None)
    if not missing or function is None or not function(torch.zeros(1)).isfinite().all():
        return
    with torch.no_grad():
        for part in (gate, up):
            part.weight = nn.Parameter(pad(part.weight, (0, 0, 0, missing)), requires_grad=False)
            if part.bias is not None:
                part.bias = nn.Parameter(pad(part.bias, (0, missing)), requires_grad=False)
            part.out_features += missing
        down.weight = nn.Parameter(pad(down.weight, (0, missing)), requires_grad=False)
        down.in_features += missing


def _replace_convolutions(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d | nn.Conv3d) and _reads_patches(child):
                setattr(module, name, PatchProduct(child))


def _reads_patches(convolution: nn.Conv2d | nn.Conv3d) -> bool:
    return (
        convolution.stride == convolution.kernel_size
        and convolution.groups == 1
        and not any(convolution.padding)
    )


def _fuse(module: nn.Module, names: Sequence[str], parts: Sequence[nn.Linear]) -> None:
    biases = [part.bias for part in parts]
    if any(bias is None for bias in biases) and any(bias is not None for bias in biases):
        return
    with torch.no_grad():
        weight = nn.Parameter(torch.cat([part.weight.data for part in parts]), requires_grad=False)
        bias = None
        if biases[0] is not None:
            bias = nn.Parameter(torch.cat(list[torch.Tensor](biases)), requires_grad=False)
    start = 0
    for name, part in zip(names, parts, strict=True):
        setattr(module, name, Part(weight, bias, start, start + part.out_features))
        start += part.out_features


def merging(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
    """The compiler, told first that equal matrix products are one."""
    from torch._inductor.compile_fx import compile_fx

    seen: dict[tuple[Any, ...], torch.fx.Node] = {}
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not torch._C._nn.linear or node.kwargs:
            continue
        first = seen.setdefault(node.args, node)
        if first is not node:
            node.replace_all_uses_with(first)
            module.graph.erase_node(node)
    module.recompile()
    compiled: Any = compile_fx(module, inputs)
    return compiled  # type: ignore[no-any-return]
