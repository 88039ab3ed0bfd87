"""The ops that switch LoRA experts under `torch.compile`: the torch path is traced, the kernels are operators."""

import pytest
import torch
from expert_inputs import layer_of

from llmrl_kernels import routed_lora

BACKENDS = ("eager", "aot_eager")


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_path_is_traced_with_its_gradients(backend):
    def mixture(x, A, B, gates, base):
        return routed_lora(x, A, B, gates, 0.7, base=base)

    torch.compiler.reset()
    compiled = torch.compile(mixture, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (3, 8):
        one = layer_of((tokens, 7, 6, 3, 4, 2))
        leaves = [part.requires_grad_() for part in (one.x, one.A, one.B, one.gates, one.base)]
        ours, theirs = (torch.autograd.grad(form(*leaves).square().sum(), leaves) for form in (compiled, mixture))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_torch_path_in_slices_is_traced():
    one = layer_of((5, 7, 9, 4, 3, 2))
    A, gates = torch.cat([one.A, 2 * one.A]), one.gates.repeat(1, 2)

    def mixture(x, gates):
        return routed_lora(x, A, one.B, gates, 0.7, slices=(4, 5))

    torch.compiler.reset()
    compiled = torch.compile(mixture, fullgraph=True, backend="aot_eager", dynamic=True)
    assert compiled(one.x, gates).equal(mixture(one.x, gates))


def test_kernels_under_compile():
    pytest.importorskip("triton", reason="the GPU path needs the package triton")
    from triton_places import PLACES, run_cases

    for where in PLACES:
        run_cases("triton_routed_ops.py", where)
