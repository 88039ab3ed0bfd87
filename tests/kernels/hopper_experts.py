"""Compiles the kernels that switch LoRA experts for a GPU that need not be there: the interpreter takes Python that the
compiler refuses. Prints as JSON, a kernel and dtype each, what the machine code uses. Run by `triton_places.py`."""

import json
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmrl_kernels import merge_all_triton, routed_gathered_triton, routed_lora_triton, switch_linear_triton
from llmrl_kernels.tuning import DEFAULTS

ELEMENTS = {"*bf16": tl.bfloat16, "*fp32": tl.float32}
FLOATS = ("x", "w", "a", "b", "u", "h", "y", "base", "bias", "out")
OTHERS = {"gates": "*fp32", "weights": "*fp32", "ids": "*i32", "order": "*i32", "table": "*i32", "sums": "*fp32"}
OTHERS |= {"scale": "fp32", "pointers": "*i64", "shapes": "*i32", "marks": "*i32", "counters": "*i32"}
# sizes of a launch that are no multiple of 16
SMALL = ("T", "E", "slot", "items", "tiles", "experts", "steps")
DOWN = {"x_column": 1, "gate_column": 1, "STORE_H": True, "SPLIT": False, "EVEN_K": True}
UP = {"u_column": 1, "b_column": 1, "base_column": 1, "SLICES": (4096,), "PARTS": 1, "HAS_BASE": True, "EVEN_R": True}


def build(kernel, element, sizes, constants, types=None):
    """Compile as for contiguous tensors of a usual width; return what to look at."""
    types = dict.fromkeys(FLOATS, element) | OTHERS | (types or {})
    blocks = {name: size for name, size in sizes.items() if name in kernel.arg_names}
    constants = {**blocks, "INTERPRET": False, **constants}
    names = kernel.arg_names
    aligned = [n for n in names if n not in (*constants, *SMALL) and types.get(n, "i32") != "fp32"]
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else types.get(n, "i32") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {name: sizes[name] for name in ("num_warps", "num_stages")}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    return {
        "kernel": kernel.__name__,
        "element": element,
        "shared": compiled.metadata.shared,
        "machine": len(compiled.asm["cubin"]),
        "tensor_cores": ptx.count("wgmma.mma_async") + ptx.count("mma.sync"),
        "narrow": ptx.count("ld.global.b16"),
        "acquire": ptx.count(".acquire."),
        "release": ptx.count(".release."),
    }


def routed():
    for element in ELEMENTS:
        for few in (0, 1) if element == "*bf16" else (0,):  # float32 takes the compiler ten times as long
            yield build(routed_lora_triton._shrink_kernel, element, DEFAULTS["routed_shrink"][few][1], DOWN)
            yield build(routed_lora_triton._expand_kernel, element, DEFAULTS["routed_expand"][few][1], UP)
    for few, parts in ((0, 16), (1, 4)):  # the most that the rule makes of 16 tokens and of 64
        split, packed = DOWN | {"SPLIT": True, "STORE_H": False}, UP | {"PARTS": parts, "SLICES": (4096, 1024, 1024)}
        summed = {"u": "*fp32"}
        yield build(routed_lora_triton._shrink_kernel, "*bf16", DEFAULTS["routed_shrink"][few][1], split, summed)
        yield build(routed_lora_triton._expand_kernel, "*bf16", DEFAULTS["routed_expand"][few][1], packed, summed)
    launch, block = {"num_warps": 4, "num_stages": 1}, routed_lora_triton.REDUCE_BLOCK
    yield build(routed_lora_triton._reduce_kernel, "*bf16", launch, {"PARTS": 16, "BLOCK": block}, {"parts": "*fp32"})
    yield from gathered("*bf16")


def gathered(element):
    down, up = {"x_column": 1, "SLOTS": 2}, {"base_column": 1, "SLOTS": 2, "HAS_BASE": True}
    few, many = (sizes for _, sizes in DEFAULTS["gathered_shrink"])
    yield build(routed_gathered_triton._few_shrink_kernel, element, few, down)
    yield build(routed_gathered_triton._block_shrink_kernel, element, many, down)
    few, many = (sizes for _, sizes in DEFAULTS["gathered_expand"])
    yield build(routed_gathered_triton._few_expand_kernel, element, few, up)
    for first in (True, False):
        ends = {"FIRST": first, "LAST": not first}
        yield build(routed_gathered_triton._block_expand_kernel, element, many, up | ends)


def merge():
    """Both dtypes; a weight update as the engine makes it (float32 experts into bfloat16); and the baseline in place."""
    half, single = ELEMENTS.values()
    for dtype, lora, options in (
        (half, half, {"BLOCK_R": 16}),
        (single, single, {"BLOCK_R": 16}),
        (half, single, {"BLOCK_R": 32, "TOP_K": 1}),
        (half, half, {"BLOCK_R": 16, "IN_PLACE": True}),
    ):
        constants = {"BASE": dtype, "OUT": dtype, "LORA": lora, "ALIGNED": True, "RANK_MULTIPLE": 16, "STEPS": 8}
        constants |= {"TOP_K": 2, "IN_PLACE": False} | options
        yield build(merge_all_triton._merge_kernel, f"*{lora}", DEFAULTS["merge_all"][0][1], constants)


def switch():
    for element, phases in (("*bf16", (0, 1, 2)), ("*fp32", (1,))):
        for phase in phases:
            constants = {
                "x_column": 1,
                "gate_column": 1,
                "PHASE": phase,
                "HAS_BIAS": True,
                "BLOCK_T": 16,
                "BLOCK_E": 64,
            }
            sizes = DEFAULTS["switch_linear"][0][1]
            kernel = switch_linear_triton._switch_kernel
            yield build(kernel, element, sizes, constants, {"u": "*fp32"}) | {"phase": phase}


if __name__ == "__main__":
    json.dump({op.__name__: list(op()) for op in (routed, merge, switch)}, sys.stdout)
