"""Models of the decode bench: one random base whose parameters all of them share, and experts on it in several ways."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from decode_bytes import MODULES, ModelShape
from torch import Tensor, nn
from torch.nn import functional as F

from llmrl.lora_switch import SwitchConfig, get_switch_model
from llmrl.lora_switch.layer import ForwardRoute, SwitchLinear
from llmrl.lora_switch.modes import merge_items
from llmrl.lora_switch.routing import choose, dense_gates
from llmrl_kernels import SwitchWorkspace, merge_snr, routed_expand_gathered, routed_shrink_gathered, switch_linear
from llmrl_kernels.merge_all import InPlacePlan, MergeItem
from llmrl_kernels.switch_linear import MAX_TOKENS

WEIGHT = 0.3  # ||experts of a route|| over ||W||: far above what a wrong row could hide in


def build_base(shape: ModelShape, device: str, dtype: torch.dtype, length: int) -> Any:
    """Return a Llama of random weights whose layers keep the size of what they read."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=length, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5)
        model.model.embed_tokens.weight.normal_()
    return model.eval().requires_grad_(False)


@dataclass
class Experts:
    """Random experts for the layers of a base: A `[E, r, in]` and B `[out, E r]` by name, and how tokens are routed."""

    layers: dict[str, tuple[Tensor, Tensor]]
    config: SwitchConfig
    router: Tensor

    @property
    def fixed(self) -> tuple[list[int], list[float]]:
        """The one mixture of the rows that have no router: the first k experts alike."""
        return list(range(self.config.top_k)), [1.0 / self.config.top_k] * self.config.top_k

    def fixed_gates(self) -> Tensor:
        """Return it as `[1, 1, E]`."""
        gates = torch.zeros(1, 1, self.config.num_experts, device=self.router.device)
        gates[..., : self.config.top_k] = 1.0 / self.config.top_k
        return gates


def build_experts(base: Any, config: SwitchConfig) -> Experts:
    """Return experts of a size that shows in the logits."""
    torch.manual_seed(1)
    layers, kind = {}, {"device": base.device, "dtype": base.dtype}
    for name, module in adapted(base, config).items():
        width, out = module.in_features, module.out_features
        A = torch.randn(config.num_experts, config.r, width, **kind) * width**-0.5
        # at equal weights ||scale sum_k (1/k) B A|| = scale sd(B) sqrt(r / k) sqrt(out), and ||W|| = sqrt(out)
        deviation = WEIGHT / config.scale * (config.top_k / config.r) ** 0.5
        layers[name] = A, torch.randn(out, config.num_experts * config.r, **kind) * deviation
    router = torch.randn(config.num_experts, base.config.hidden_size, device=base.device)
    return Experts(layers, config, router * base.config.hidden_size**-0.5)


def adapted(model: Any, config: SwitchConfig) -> dict[str, nn.Linear]:
    """Return the linear layers that get experts."""
    wanted = MODULES["all"] if isinstance(config.target_modules, str) else config.target_modules
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] in wanted}


def shared_copy(model: Any) -> Any:
    """Return a model of its own modules on the same tensors."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def replace(model: Any, name: str, module: nn.Module) -> None:
    """Put `module` in the place that `name` is."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


class MixtureLinear(nn.Module):
    """A linear layer with experts in plain torch: the layer-wise baseline, and in float32 what every row is held to.

    As baseline it has a router of its own and takes all experts in two products, which is kinder to layer-wise routing than
    the published loops over experts. `given` gates take the router's place; `seen` are those of the last pass.
    """

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, scale: float, router: Tensor | None, top_k: int) -> None:
        super().__init__()
        self.base, self.scale, self.top_k = base, scale, top_k
        self.A, self.B, self.router = A, B, router
        self.given: Tensor | None = None
        self.seen: Tensor | None = None

    def gates(self, x: Tensor) -> Tensor:
        """Return `[B, T, E]` gates in x's dtype."""
        if self.given is not None:
            return self.given.to(x.dtype)
        assert self.router is not None
        logits = F.linear(x, self.router)
        values, ids = logits.topk(self.top_k, -1)
        self.seen = torch.zeros_like(logits).scatter_(-1, ids, values.softmax(-1))
        return self.seen

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, T, out]`."""
        inner = F.linear(x, self.A.flatten(0, 1)).unflatten(-1, self.A.shape[:2])
        gated = (inner * self.gates(x).unsqueeze(-1)).flatten(-2)
        return torch.add(self.base(x), F.linear(gated, self.B), alpha=self.scale)


def layerwise_model(base: Any, experts: Experts) -> Any:
    """Return the base with a router in every adapted layer."""
    model, config = shared_copy(base), experts.config
    torch.manual_seed(2)
    for name, module in adapted(model, config).items():
        router = torch.randn(config.num_experts, module.in_features, device=base.device) * module.in_features**-0.5
        made = MixtureLinear(module, *experts.layers[name], config.scale, router.to(base.dtype), config.top_k)
        replace(model, name, made)
    return model


def reference_model(base: Any, experts: Experts) -> Any:
    """Return base and experts in float32, in plain torch, with the gates that it is given."""
    model, config = copy.deepcopy(base).float(), experts.config
    for name, module in adapted(model, config).items():
        A, B = experts.layers[name]
        replace(model, name, MixtureLinear(module, A.float(), B.float(), config.scale, None, config.top_k))
    return model


def mixtures(model: Any) -> list[MixtureLinear]:
    """Return the layers with experts in plain torch, in order."""
    return [module for module in model.modules() if isinstance(module, MixtureLinear)]


def switch_gates(base: Any, experts: Experts, tokens: Tensor) -> Tensor:
    """Return the gates `[B, T, E]` that the one router of all layers gives to tokens `[B, T]`."""
    states = base.model.layers[0].input_layernorm(base.model.embed_tokens(tokens))
    route = choose(F.linear(states.float(), experts.router), experts.config.top_k, experts.config.gate)
    return dense_gates(route, experts.config.num_experts)


def switch_model(base: Any, experts: Experts) -> Any:
    """Return a switch model on the shared tensors."""
    model = get_switch_model(shared_copy(base), experts.config)
    for name, layer in model.switch_layers().items():
        A, B = experts.layers[name]
        layer.switch_A, layer.switch_B = nn.Parameter(A, requires_grad=False), nn.Parameter(B, requires_grad=False)
    model.switch_router.weight = nn.Parameter(experts.router, requires_grad=False)
    return model.eval().requires_grad_(False)


class GatheredLinear(SwitchLinear):
    """The same layer over the chosen experts alone."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, T, out]`."""
        now = self.slot.now
        assert now is not None
        assert now.route is not None
        ids, weights = now.route.ids.flatten(0, 1), now.route.weights.flatten(0, 1)
        base = F.linear(x, self.weight, self.bias).flatten(0, 1)
        u, _ = routed_shrink_gathered(x.flatten(0, 1), self.switch_A, ids, weights)
        return routed_expand_gathered(u, self.switch_B, ids, scale=self.scale, base=base).view(*x.shape[:-1], -1)


class FusedLinear(SwitchLinear):
    """The same layer as one op with the linear layer itself; prompts go the usual way."""

    options: dict[str, Any]

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, T, out]`."""
        rows = x.reshape(-1, self.in_features)
        if len(rows) > MAX_TOKENS:
            return super().forward(x)
        assert self.slot.now is not None
        gates = self.slot.now.gates_for(x).flatten(0, 1)
        weights = (self.weight, self.switch_A, self.switch_B)
        return switch_linear(rows, *weights, gates, self.scale, bias=self.bias, **self.options).view(*x.shape[:-1], -1)


def gathered_model(base: Any, experts: Experts) -> Any:
    """Return a switch model whose layers gather."""
    model = switch_model(base, experts)
    for layer in model.switch_layers().values():
        layer.__class__ = GatheredLinear
    return model


def fused_model(base: Any, experts: Experts, *, fused: bool, backend: str) -> Any:
    """Return a switch model whose layers are one op each, of one launch (`fused`) or two."""
    model, config = switch_model(base, experts), experts.config
    options = {"workspace": SwitchWorkspace(config.num_experts * config.r, base.device), "fused": fused}
    for layer in model.switch_layers().values():
        layer.__class__, layer.options = FusedLinear, {**options, "backend": backend}
    return model


class InPlace:
    """Runs a switch model on weights that each new route is put into and taken out of again, one launch a switch.

    The run mode "in_place" with a plan for top_k experts: that of a model leaves room for a fixed route of all.
    """

    def __init__(self, model: Any) -> None:
        for layer in model.switch_layers().values():
            layer.merged_weight = layer.weight.detach().clone()
        self.items = merge_items(model, {name: layer.merged_weight for name, layer in model.switch_layers().items()})
        config, items = model.switch_config, [MergeItem(i.out, i.out, i.A, i.B) for i in self.items]
        self.plan = InPlacePlan(items, top_k=config.top_k, scale=config.scale)

    def forget(self) -> None:
        """Nothing to do: one plan alone writes the weights."""

    def decided(self, now: ForwardRoute) -> None:
        """Switch before the layers run, where the pass has one route."""
        if now.route is not None and now.route.ids.shape[:-1].numel() == 1:
            self.plan.merge(now.route.ids.reshape(-1), now.route.weights.reshape(-1).float(), check=False)
            now.merged = True


def in_place_model(base: Any, experts: Experts) -> Any:
    """Return a switch model that switches in place."""
    model = switch_model(base, experts)
    model._switch_runner = InPlace(model)
    return model


def merge_snrs(base: Any, experts: Experts) -> dict[str, float]:
    """Return `merge_snr` of the fixed mixture in the first layer, as it is and made smaller, by ||experts|| / ||W||."""
    (ids, weights), name = experts.fixed, next(iter(experts.layers))
    weight = base.get_submodule(name).weight
    delta = sum(w * (B.float() @ A.float()) for w, (A, B) in zip(weights, _chosen(experts, name, ids), strict=True))
    share = experts.config.scale * delta.norm() / weight.float().norm()
    delta = experts.config.scale * delta / share
    return {f"{size:.1g}": merge_snr(weight, delta * size) for size in (float(share), 0.01, 0.001)}


def merged_model(base: Any, experts: Experts) -> Any:
    """Return a plain model with the fixed mixture merged into its weights."""
    model, (ids, weights) = shared_copy(base), experts.fixed
    for name, module in adapted(model, experts.config).items():
        total = module.weight.to(torch.float32, copy=True)
        for A, B in _chosen(experts, name, ids):
            total += experts.config.scale * weights[0] * (B.float() @ A.float())
        module.weight = nn.Parameter(total.to(base.dtype), requires_grad=False)
    return model


def peft_model(base: Any, experts: Experts) -> Any:
    """Return the base with the fixed mixture as one unmerged adapter of peft, of rank k r.

    Raises:
        ImportError: peft is not installed.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config, (ids, weights) = experts.config, experts.fixed
    rank, names = config.top_k * config.r, {name.rpartition(".")[2] for name in experts.layers}
    options = LoraConfig(r=rank, lora_alpha=1, target_modules=sorted(names))
    model = inject_adapter_in_model(options, shared_copy(base)).eval().requires_grad_(False)
    for name in experts.layers:
        layer, pairs = model.get_submodule(name), _chosen(experts, name, ids)
        layer.scaling["default"] = config.scale * weights[0]
        layer.lora_A["default"].weight.copy_(torch.cat([A for A, _ in pairs]))
        layer.lora_B["default"].weight.copy_(torch.cat([B for _, B in pairs], 1))
    return model


def _chosen(experts: Experts, name: str, ids: list[int]) -> list[tuple[Tensor, Tensor]]:
    A, B = experts.layers[name]
    r = experts.config.r
    return [(A[expert], B[:, expert * r : (expert + 1) * r]) for expert in ids]
