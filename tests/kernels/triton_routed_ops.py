"""The kernels under `torch.compile(fullgraph=True)`. Run by `test_routed_ops.py` in a process of its own."""

import pytest
import torch
from expert_inputs import assert_rounded_alike, layer_of

from llmrl_kernels import (
    SwitchWorkspace,
    routed_expand,
    routed_expand_gathered,
    routed_lora,
    routed_lora_gathered,
    routed_lora_reference,
    routed_shrink,
    routed_shrink_gathered,
    switch_linear,
    tuning,
)
from llmrl_kernels.routed_lora_triton import INTERPRETED, shrink

DEVICE = "cpu" if INTERPRETED else "cuda"
SHAPE = (40, 24, 3, 8, 2)  # in, out, E, r, k
SPACE = SwitchWorkspace(24, DEVICE)


@pytest.fixture(params=["eager", "aot_eager"])
def compiled(request):
    """Compile for any number of tokens; the names of the operators that the graphs call."""
    names = []

    def backend(graph, inputs):
        nodes = [
            node for part in graph.modules() if isinstance(part, torch.fx.GraphModule) for node in part.graph.nodes
        ]
        names.extend(str(node.target) for node in nodes if "llmrl" in str(node.target))
        return torch._dynamo.lookup_backend(request.param)(graph, inputs)

    torch.compiler.reset()
    return lambda call: torch.compile(call, fullgraph=True, dynamic=True, backend=backend), names


def layer(tokens, dtype=torch.float32):
    one = layer_of((tokens, *SHAPE), dtype)
    return type(one)(**{name: part.to(DEVICE) for name, part in vars(one).items()})


def dense(one):
    u, h = routed_shrink(one.x, one.A, one.gates, backend="triton")
    return routed_expand(u, one.B, scale=0.7, base=one.base, backend="triton"), h


def shared(one):
    u, none = routed_shrink(one.x, one.A, one.gates, partial=True, backend="triton")
    assert none is None
    return (routed_expand(u, one.B, scale=0.7, backend="triton"),)


def mixture(one):
    return (routed_lora(one.x, one.A, one.B, one.gates, 0.7, base=one.base, backend="triton"),)


def packed(one):
    A, gates = torch.cat([one.A, 2 * one.A]), one.gates.repeat(1, 2)
    return (routed_lora(one.x, A, one.B, gates, 0.7, base=one.base, slices=(20, 4), backend="triton"),)


def gathered(one):
    u, h = routed_shrink_gathered(one.x, one.A, one.ids, one.weights, backend="triton")
    return routed_expand_gathered(u, one.B, one.ids, scale=0.7, base=one.base, backend="triton"), h


def gathered_mixture(one):
    return (routed_lora_gathered(one.x, one.A, one.B, one.ids, one.weights, 0.7, base=one.base, backend="triton"),)


def switched(one):
    return (switch_linear(one.x, one.W, one.A, one.B, one.gates, 0.7, bias=one.bias, backend="triton"),)


def fused(one):
    arguments = (one.x, one.W, one.A, one.B, one.gates, 0.7)
    return (switch_linear(*arguments, workspace=SPACE, fused=True, backend="triton"),)


CALLS = {
    dense: ["routed_shrink", "routed_expand"],
    shared: ["routed_shrink", "routed_expand"],
    mixture: ["routed_lora"],
    packed: ["routed_lora"],
    gathered: ["routed_shrink_gathered", "routed_expand_gathered"],
    gathered_mixture: ["routed_shrink_gathered", "routed_expand_gathered"],
    switched: ["switch_linear"],
    fused: ["switch_linear"],
}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_one_graph_of_operators_for_any_number_of_tokens(compiled, call):
    compiling, names = compiled
    ours = compiling(call)
    for tokens in (4, 7, 16) if "switch_linear" in CALLS[call] else (4, 7, 40):
        one = layer(tokens)
        with torch.no_grad():
            for a, b in zip(ours(one), call(one), strict=True):
                assert a.equal(b)
    assert names == [f"llmrl.{name}" for name in CALLS[call]]  # traced once


def test_tiles_are_chosen_when_an_operator_runs(compiled, monkeypatch):
    """Dynamo cannot trace the look-up in a table; a table of another number of tokens is another split."""
    looked_up = []

    def table_of(op, *key, tokens=1, device=None):
        looked_up.append(tuning.entry_key(op, tuning.token_bucket(tokens), *key))
        tuning._table("no such GPU")
        sizes = tuning.INTERPRETER[op]
        return sizes | ({"BLOCK_K": 16, "SPLIT": 2 if tokens <= 16 else 1} if op == "routed_shrink" else {})

    monkeypatch.setattr("llmrl_kernels.routed_lora_triton.block_sizes", table_of)
    compiling, names = compiled
    ours = compiling(mixture)
    for tokens in (4, 7, 40):
        one = layer(tokens, torch.bfloat16)
        with torch.no_grad():
            assert ours(one)[0].equal(mixture(one)[0])
            parts, _ = shrink(one.x, one.A, one.gates, keep_h=False, partial=True)
        assert parts.dim() == (3 if tokens <= 16 else 2)
    assert names == ["llmrl.routed_lora"]
    assert {key.split("/")[1] for key in looked_up} == {"16", "64"}


def test_training_goes_through_the_operators(compiled):
    compiling, names = compiled

    def train(x, A, B, gates, base):
        return routed_lora(x, A, B, gates, 0.7, base=base, backend="triton")

    ours = compiling(train)
    for tokens in (4, 9):
        one = layer(tokens)
        leaves = [part.requires_grad_() for part in (one.x, one.A, one.B, one.gates, one.base)]
        y, expected = ours(*leaves), routed_lora_reference(*leaves[:4], 0.7, base=leaves[4])
        assert_rounded_alike(y, expected)
        slope = torch.ones_like(y)
        for a, b in zip(
            torch.autograd.grad(y, leaves, slope), torch.autograd.grad(expected, leaves, slope), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert names.count("llmrl.routed_shrink") == names.count("llmrl.routed_expand") > 0


def test_operators_are_what_they_declare():
    """Schemas, shapes of the fakes, no aliases among inputs and outputs."""
    one = layer(5)
    ops, checks = torch.ops.llmrl, ("test_schema", "test_faketensor")
    none = one.x[:0]
    for x, gates, base in ((one.x, one.gates, one.base), (none, one.gates[:0], one.base[:0])):
        for keep_h in (True, False):
            torch.library.opcheck(ops.routed_shrink, (x, one.A, gates, keep_h), test_utils=checks)
        u = torch.ones(len(x), 24, device=DEVICE)
        torch.library.opcheck(ops.routed_expand, (u, one.B, base, 0.7, []), test_utils=checks)
        torch.library.opcheck(ops.routed_lora, (x, one.A, one.B, gates, None, 0.7, [24]), test_utils=checks)
        scratch = (SPACE.u, SPACE.counters)
        arguments = (x, one.W, one.A, one.B, gates, one.bias, *scratch, 0.7, True)
        torch.library.opcheck(ops.switch_linear, arguments, test_utils=checks)
        ids, weights = one.ids[: len(x)], one.weights[: len(x)]
        torch.library.opcheck(ops.routed_shrink_gathered, (x, one.A, ids, weights), test_utils=checks)
        u = torch.ones(len(x), 2, 8, device=DEVICE)
        torch.library.opcheck(ops.routed_expand_gathered, (u, one.B, ids, base, 0.7), test_utils=checks)
