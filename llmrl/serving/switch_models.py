"""vLLM model classes with experts routed per token, made on demand from vLLM's own class of the base architecture.

`LlmrlSwitchXForCausalLM` adds to each linear layer `scale sum_e g_e B_e A_e x`. The route of a step is computed once, where
the router reads, into a buffer of fixed address that all later layers read: nothing depends on the requests in a batch, so
mixed routes, chunked prefill, prefix caching and CUDA graphs need no care.

Tensor parallelism: a layer that splits its output splits B and keeps A whole; a layer that splits its input splits A, and
its partial sums pass gate and B before the all-reduce that is there anyway. Expert sums go in where the base's product
ends, ahead of that all-reduce.

Run on: CPU, V1 model runner, one process and two. Not run: GPU, the V2 runner.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from llmrl.errors import ModelError
from llmrl.lora_switch.config import is_routed, layer_number
from llmrl.lora_switch.folder import ARCHITECTURE_PREFIX, CONFIG_KEY, WEIGHTS_FILE, SwitchFolder, check_served
from llmrl.lora_switch.pack import PACKED, pack, slice_rows
from llmrl.lora_switch.router import Router, router_site
from llmrl.lora_switch.routing import dense_gates
from llmrl_kernels.routed_lora import routed_lora

OWN = "llmrl_switch"
_ENDINGS = (".switch_A", ".switch_B")
ROUTER = "switch_router.weight"
_MOST_PACKED = 3  # q, k and v


class SwitchExperts(nn.Module):
    """The experts of one of vLLM's linear layers, its parts packed: A `[n E, r, in]` and B `[out, E r]` of this rank."""

    def __init__(
        self, layer: LinearBase, parts: list[str], adapted: list[bool], described: SwitchFolder, dtype: torch.dtype
    ) -> None:
        super().__init__()
        config = described.switch
        self.parts, self.scale, self.slices = parts, config.scale, output_slices(layer, len(parts))
        dtype = dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        self.input_slice = input_slice(layer)
        self.loaded: set[str] = set()  # names on disk
        width = self.input_slice[1]
        self.outs = [sum(count for _, count in slices) for slices in self.slices]
        self.rows = slice_rows(self.outs, adapted)  # of B a part: each meets the products of its own experts
        down, up = (
            (len(self.rows) * config.num_experts, config.r, width),
            (sum(self.outs), config.num_experts * config.r),
        )
        self.A = nn.Parameter(torch.zeros(down, dtype=dtype), requires_grad=False)
        self.B = nn.Parameter(torch.zeros(up, dtype=dtype), requires_grad=False)

    def packed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's A and B from the tensors of a folder."""
        start, size = self.input_slice
        own: list[tuple[Tensor, Tensor] | None] = []
        for part, slices in zip(self.parts, self.slices, strict=True):
            a, b = (tensors.get(part + ending) for ending in _ENDINGS)
            if a is None or b is None:
                own.append(None)
                continue
            rows = torch.cat([b[row : row + count] for row, count in slices])
            own.append((a[:, :, start : start + size], rows))
        a, b, self.rows = pack(own, self.outs)
        return {"A": a, "B": b}

    def forward(self, x: Tensor, gates: Tensor, out: Tensor) -> Tensor:
        """Return `out` plus the experts' sum."""
        rows, result = x.reshape(-1, x.shape[-1]).to(self.A.dtype), out.reshape(-1, out.shape[-1])
        parts = (rows, self.A, self.B, gates[: len(rows), : len(self.A)], self.scale)
        if result.dtype == rows.dtype:
            return routed_lora(*parts, base=result, slices=self.rows).view_as(out)
        return out + routed_lora(*parts, slices=self.rows).view_as(out).to(out.dtype)


def output_slices(layer: LinearBase, parts: int) -> list[list[tuple[int, int]]]:
    """Return (first row, rows) that this rank computes of each part; several of a part that is fused on disk, too.

    Raises:
        ModelError: the layer has another number of parts.
    """
    own, whole = _row_slices(layer)
    if parts == len(own):
        return [[one] for one in own]
    if parts != 1:
        raise ModelError(
            f"{type(layer).__name__} computes {len(own)} outputs, the base has {parts} layers in its place"
        )
    starts = [sum(whole[:i]) for i in range(len(whole))]
    return [[(start + row, rows) for start, (row, rows) in zip(starts, own, strict=True)]]


def _row_slices(layer: LinearBase) -> tuple[list[tuple[int, int]], list[int]]:
    """Return (first row, rows) of this rank in each output, and the outputs' whole sizes."""
    rank, size = layer.tp_rank, layer.tp_size
    if isinstance(layer, QKVParallelLinear):
        query = layer.num_heads * layer.head_size
        key, value = layer.num_kv_heads * layer.head_size, layer.num_kv_heads * layer.v_head_size
        kv_rank = rank // layer.num_kv_head_replicas
        heads, kv_heads = layer.total_num_heads, layer.total_num_kv_heads
        whole = [heads * layer.head_size, kv_heads * layer.head_size, kv_heads * layer.v_head_size]
        return [(rank * query, query), (kv_rank * key, key), (kv_rank * value, value)], whole
    whole = list(getattr(layer, "output_sizes", None) or [layer.output_size])
    if isinstance(layer, RowParallelLinear) or size == 1:
        return [(0, rows) for rows in whole], whole
    return [(rank * (rows // size), rows // size) for rows in whole], whole


def input_slice(layer: LinearBase) -> tuple[int, int]:
    """Return (first column, columns) that this rank reads of the input."""
    if isinstance(layer, RowParallelLinear) and layer.tp_size > 1:
        size = layer.input_size // layer.tp_size
        return layer.tp_rank * size, size
    return 0, layer.input_size


class SwitchMethod(QuantizeMethodBase):
    """A layer's own method of computing its product, and the experts' sum behind it."""

    def __init__(self, inner: QuantizeMethodBase, experts: SwitchExperts, gates: Tensor) -> None:
        self.inner, self.experts, self.gates = inner, experts, gates

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        """As the layer's own."""
        self.inner.create_weights(*args, **kwargs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """As the layer's own."""
        self.inner.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the layer's product plus the experts'."""
        return self.experts(x, self.gates, self.inner.apply(layer, x, bias))


def _causal_class(base_architecture: str) -> type:
    base = ModelRegistry.models[base_architecture].load_model_cls()

    class Model(base):  # type: ignore[valid-type, misc]
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            described = SwitchFolder.from_json(getattr(vllm_config.model_config.hf_config, CONFIG_KEY))
            _check(vllm_config, described)
            self.secondary_weights = [_base_source(vllm_config, described)]
            self.llmrl_switch = _attach(self, vllm_config, described)

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            own: dict[str, Tensor] = {}

            def rest() -> Iterator[tuple[str, Tensor]]:
                for name, tensor in weights:
                    if name.endswith(_ENDINGS) or name.startswith("switch_router."):
                        own[name] = tensor.clone()  # the iterator may reuse its buffer
                    else:
                        yield name, tensor

            loaded = set(super().load_weights(rest()) or ())
            return loaded | (_load(self.llmrl_switch, own) if own else set())

    return Model


def _check(vllm_config: VllmConfig, described: SwitchFolder) -> None:
    if vllm_config.lora_config is not None:
        raise ModelError("experts and vLLM's own LoRA do not go together: start without --enable-lora")
    if getattr(vllm_config.parallel_config, "use_ubatching", False):
        raise ModelError("micro-batches would share one route: start without --enable-dbo and --ubatch-size")
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ModelError("the route is known on the first pipeline stage alone: use --tensor-parallel-size instead")


def _base_source(vllm_config: VllmConfig, described: SwitchFolder) -> DefaultModelLoader.Source:
    folder, reference = vllm_config.model_config.model, described.base
    if Path(folder).is_dir():  # else a hub name
        check_served(folder)
    return DefaultModelLoader.Source(
        model_or_path=reference.model,
        revision=reference.revision,
        fall_back_to_pt=False,
        allow_patterns_overrides=["*.safetensors"],
    )


def _attach(model: nn.Module, vllm_config: VllmConfig, described: SwitchFolder) -> nn.ModuleDict:
    """Put experts on the layers the folder names; return them by layer, and the router, which fills their gates."""
    config, model_config = described.switch, vllm_config.model_config
    device = next(model.parameters()).device
    rows = vllm_config.scheduler_config.max_num_batched_tokens
    # once for each of the layers that are packed into one
    gates = torch.zeros(rows, _MOST_PACKED * config.num_experts, dtype=torch.float32, device=device)
    packed = {**PACKED, **(getattr(model, "packed_modules_mapping", None) or {})}
    own, stored = nn.ModuleDict(), _stored_names(Path(model_config.model))
    for name, layer in model.named_modules():
        if not isinstance(layer, LinearBase) or layer_number(name) is None:
            continue
        parent, _, leaf = name.rpartition(".")
        parts = [f"{parent}.{part}" for part in packed.get(leaf, (leaf,))]
        if stored is None:
            adapted = [is_routed(config, part) and config.targets(part) for part in parts]
        else:  # vLLM has linear layers where transformers has none: routers of mixtures
            adapted = [part + _ENDINGS[0] in stored for part in parts]
        if not any(adapted):
            continue
        experts = SwitchExperts(layer, parts, adapted, described, model_config.dtype).to(device)
        own[name.replace(".", "-")] = experts
        layer.quant_method = SwitchMethod(layer.quant_method, experts, gates)
    router = Router(config, model_config.hf_text_config.hidden_size).requires_grad_(False).to(device).eval()
    own["router"] = router
    _watch(model, router, gates, described, model_config.hf_text_config.num_hidden_layers)
    return own


def _stored_names(folder: Path) -> set[str] | None:
    """Return the names of the tensors in a folder; None for a hub name."""
    from safetensors import safe_open

    path = folder / WEIGHTS_FILE
    if not path.is_file():
        return None
    with safe_open(str(path), framework="pt") as tensors:
        return set(tensors.keys())


def _watch(model: nn.Module, router: Router, gates: Tensor, described: SwitchFolder, count: int) -> None:
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    site, before = router_site(layers, described.switch)

    def decide(states: Tensor) -> None:
        found = dense_gates(router(states), described.switch.num_experts)
        gates[: states.shape[0]].copy_(found.repeat(1, _MOST_PACKED))

    def reads_input(module: nn.Module, args: Any) -> None:
        decide(args[0])

    def reads_output(module: nn.Module, args: Any, output: Any) -> None:
        # the residual stands beside it from the second layer on
        decide(output[0] if isinstance(output, tuple) else output)

    if before:
        site.register_forward_pre_hook(reads_input)
    else:
        site.register_forward_hook(reads_output)


def _load(own: nn.ModuleDict, tensors: dict[str, Tensor]) -> set[str]:
    """Copy tensors into the packed parameters; return the names of those.

    The first time all there are; an update may come in pieces, a whole layer of vLLM (q, k and v) at a time.

    Raises:
        ModelError: a tensor belongs to no layer, or one is missing.
    """
    layers = {name: module for name, module in own.items() if isinstance(module, SwitchExperts)}
    known = {part + ending for layer in layers.values() for part in layer.parts for ending in _ENDINGS} | {ROUTER}
    unknown = sorted(tensors.keys() - known)
    if unknown:
        raise ModelError(f"{unknown[0]} belongs to no layer of the base: it was made for another base")
    begun = any(layer.loaded for layer in layers.values())
    if not begun and ROUTER not in tensors:
        raise ModelError(f"{ROUTER} is missing: the folder is damaged, save it again")
    values = {"router.weight": tensors[ROUTER]} if ROUTER in tensors else {}
    for name, layer in layers.items():
        given = {part + ending for part in layer.parts for ending in _ENDINGS} & tensors.keys()
        if begun and not given:
            continue
        if not given or (begun and given != layer.loaded):
            lacks = sorted(layer.loaded - given or {layer.parts[0] + _ENDINGS[0]})[0]
            what = "send the experts of q, k and v, and of gate and up, together" if begun else "save the folder again"
            raise ModelError(f"{lacks} is missing: {what}")
        layer.loaded = given
        values |= {f"{name}.{key}": value for key, value in layer.packed(tensors).items()}
    parameters = dict(own.named_parameters())
    for name, value in values.items():
        parameter = parameters[name]
        if parameter.shape != value.shape:
            raise ModelError(
                f"{name}: the folder gives {list(value.shape)}, this base needs {list(parameter.shape)}: it is another's"
            )
        load = getattr(parameter, "weight_loader", None)
        load(parameter, value) if load else parameter.data.copy_(value)
    return {f"{OWN}.{name}" for name in values}


def __getattr__(name: str) -> type:
    """Make and keep the class that vLLM's registry asks for by name."""
    if not name.startswith(ARCHITECTURE_PREFIX):
        raise AttributeError(name)
    made = _causal_class(name.removeprefix(ARCHITECTURE_PREFIX))
    made.__name__ = made.__qualname__ = name
    made.__module__ = __name__
    globals()[name] = made
    return made
