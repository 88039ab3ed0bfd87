"""Runs the tests of the Triton kernel where they can run: in Triton's interpreter, and on a GPU where there is one.

The interpreter takes Python that the compiler refuses, so the kernel is also compiled for a GPU that need not be there.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the GPU path needs the package triton")

from llmrl_kernels.scaled_lse_sweep_triton import fewest_shares

HERE = Path(__file__).parent
CASES = HERE / "triton_scaled_lse_sweep.py"
PLACES = ["interpreter", "gpu"] if torch.cuda.is_available() else ["interpreter"]


@pytest.mark.parametrize("where", PLACES)
def test_scaled_lse_sweep_triton_matches_reference(where):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if where == "interpreter":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-x", str(CASES)]
    ended = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
    assert "passed" in ended.stdout
    assert "skipped" not in ended.stdout


# the signature of a launch with 16-byte alignment, as Triton sees it on bfloat16 tensors of a usual width
COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from llmrl_kernels import scaled_lse_sweep_triton as module

kernel, results = module._sweep_kernel, []
half, single = module._HALF_TILES, module._FLOAT_TILES
for element, tile, present in (("*bf16", half[0], False), ("*bf16", half[-1], True), ("*fp32", single[0], True)):
    constants = {"hidden_column": 1, "weight_column": 1, "EVEN_H": not present, "FEW": False, "INTERPRET": False}
    constants |= {"HAS_BIAS": present, "HAS_CAP": present, **tile.kwargs}
    types = dict.fromkeys(("hidden", "weight", "bias"), element)
    types |= {"rows": "*i64", "labels": "*i64", "scale": "*fp32", "sums": "*fp32", "argmax": "*i32"}
    types |= {"logit_scale": "fp32", "soft_cap": "fp32"}
    names = kernel.arg_names
    aligned = [n for n in names if n not in constants and n not in ("N", "logit_scale", "soft_cap")]
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else types.get(n, "i32") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    results.append({
        "element": element, "options": present, "shared": compiled.metadata.shared, "machine": len(compiled.asm["cubin"]),
        "tensor_cores": ptx.count("wgmma.mma_async"), "wide": ptx.count("cp.async.cg.shared.global"),
        "narrow": ptx.count("cp.async.ca.shared.global") + ptx.count("ld.global.b16"),
    })
json.dump(results, sys.stdout)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for NVIDIA comes with its Linux wheels")
def test_scaled_lse_sweep_triton_compiles_for_hopper(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    ended = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-6000:]
    results = json.loads(ended.stdout)
    assert len(results) == 3
    for one in results:
        assert one["machine"] > 0
        assert one["shared"] <= 227 * 1024  # what a block has on Hopper
        assert (one["tensor_cores"] > 0) == (one["element"] == "*bf16"), one
    plain = results[0]  # a width that is a multiple of 64: hidden states and weights come 16 bytes at a time
    assert plain["wide"] > 0
    assert plain["narrow"] == 0


@pytest.mark.parametrize(
    ("blocks", "processors", "most", "shares"),
    [
        (64, 132, 128, 2),  # 8,192 tokens on an H100: 128 programs
        (132, 132, 128, 1),
        (1, 132, 31, 31),  # one block of tokens, 32,000 entries: not enough of them to fill the card
        (133, 132, 128, 9),  # 1,197 programs in 10 rounds of 132 are 91 %
        (7, 4, 1, 1),
    ],
)
def test_fewest_shares(blocks, processors, most, shares):
    assert fewest_shares(blocks, processors, most) == shares
