"""Bytes that a decoding step reads and writes, from shapes alone: what the decode bench divides by time.

Counted are weights, experts and cached keys and values. Activations, norms and the router's own matrix are not: together they
are below 0.1 % of a 7B model. Nothing here looks at a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

MODULES = {
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "qv": ("q_proj", "v_proj"),
}

ALONE = ("merge", "sync", "linears")  # kinds of `step_bytes` that are no decoding step


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-shaped model."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int

    def linears(self, modules: str = "all") -> dict[str, tuple[int, int]]:
        """Return (in, out) of a decoder layer's linear layers that `modules` names."""
        kv = self.hidden // self.heads * self.kv_heads
        into = {"k_proj": kv, "v_proj": kv, "gate_proj": self.intermediate, "up_proj": self.intermediate}
        return {
            name: (self.intermediate if name == "down_proj" else self.hidden, into.get(name, self.hidden))
            for name in MODULES[modules]
        }


SHAPES = {
    "7b": ModelShape(4096, 32, 11_008, 32, 32, 32_000),  # Llama-2-7B
    "1b": ModelShape(2048, 16, 8192, 32, 8, 128_256),  # Llama-3.2-1B
    "toy": ModelShape(64, 2, 128, 4, 4, 256),
}


def linear_parameters(shape: ModelShape, modules: str = "all") -> int:
    """Return the parameters of the linear layers that `modules` names, over all decoder layers."""
    return shape.layers * sum(width * out for width, out in shape.linears(modules).values())


def base_bytes(shape: ModelShape, element: int = 2) -> int:
    """Return what a step reads of the base: every linear layer and the output layer, once for the whole batch."""
    return element * (linear_parameters(shape) + shape.vocab * shape.hidden)


def kv_bytes(shape: ModelShape, rows: int, cached: int, element: int = 2) -> int:
    """Return what attention reads of a static cache of `cached` tokens a row."""
    return element * rows * cached * 2 * shape.layers * shape.kv_heads * (shape.hidden // shape.heads)


def lora_bytes(shape: ModelShape, modules: str, rank: float, element: int = 2) -> float:
    """Return what A and B of `rank` ranks hold over all adapted layers."""
    return element * rank * shape.layers * sum(width + out for width, out in shape.linears(modules).values())


def router_bytes(shape: ModelShape, modules: str, experts: int, element: int = 2) -> int:
    """Return what routers hold where every adapted layer has one."""
    return element * experts * shape.layers * sum(width for width, _ in shape.linears(modules).values())


def rewrite_bytes(shape: ModelShape, modules: str, element: int = 2) -> int:
    """Return what reading and writing all adapted weights once moves."""
    return 2 * element * linear_parameters(shape, modules)


def distinct_experts(experts: int, top_k: int, rows: int) -> float:
    """Return how many experts a batch is expected to name, each row `top_k` of them, all alike likely."""
    return experts * (1.0 - (1.0 - top_k / experts) ** rows)


@dataclass(frozen=True)
class Mixture:
    """What is adapted, and how many tokens and experts a step has."""

    modules: str
    experts: int
    r: int
    top_k: int
    rows: int
    cached: int


def step_bytes(kind: str, shape: ModelShape, mixture: Mixture, *, element: int = 2, change: float = 1.0) -> float:
    """Return the bytes of a decoding step.

    Args:
        kind: "base"; "lora" (one adapter of rank k r beside the base); "layerwise" (all experts, a router a layer); "in_place"
            (subtract and add, as one pass over the weights, whatever the code at hand makes of it); "merged" (out of place, at
            every route that changes); "merge" (that merge alone); "sync" (a merge of one expert in float32); "linears" (the
            adapted layers' weights alone); "dense" (all experts); "gathered" (the distinct ones).
        shape: of the model.
        mixture: of the run.
        element: bytes of a number.
        change: share of the steps whose route is another than the last one's; for "merged" and "in_place".

    Raises:
        KeyError: no such kind.
    """
    lora = lora_bytes(shape, mixture.modules, 1, element)
    chosen, rewrite = mixture.top_k * mixture.r * lora, rewrite_bytes(shape, mixture.modules, element)
    distinct = distinct_experts(mixture.experts, mixture.top_k, mixture.rows)
    dense = mixture.experts * mixture.r * lora
    beside = {
        "base": 0.0,
        "lora": chosen,
        "layerwise": dense + router_bytes(shape, mixture.modules, mixture.experts, element),
        "in_place": change * (rewrite + 2 * chosen),
        "merged": change * (rewrite + chosen),
        "merge": rewrite + chosen,
        "sync": rewrite + lora_bytes(shape, mixture.modules, mixture.r, 4),
        "linears": rewrite / 2,
        "dense": dense,
        "gathered": distinct * mixture.r * lora,
    }[kind]
    if kind in ALONE:
        return beside
    return base_bytes(shape, element) + kv_bytes(shape, mixture.rows, mixture.cached, element) + beside


def merge_overhead(shape: ModelShape, modules: str) -> float:
    """Return the bytes of rewriting the adapted weights, over those of a base step with no cache."""
    return rewrite_bytes(shape, modules) / base_bytes(shape)
