"""The kernel of `switch_linear` against the reference. Run by `test_switch_linear.py` in a process of its own.

The one launch is tried with a single program in the interpreter, which runs programs one after the other: the counting is
held to, the waiting is not.
"""

import math

import pytest
import torch
from expert_inputs import DTYPES, SHAPES, assert_rounded_alike, layer_of, strided

from llmrl_kernels import SwitchWorkspace, switch_linear, switch_linear_reference
from llmrl_kernels.switch_linear_triton import launch, resident_programs
from llmrl_kernels.triton_parts import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"


def layer(shape, dtype=torch.float32, **options):
    one = layer_of((min(shape[0], 16), *shape[1:]), dtype, **options)
    return type(one)(**{name: part.to(DEVICE) for name, part in vars(one).items()})


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"), [*((shape, torch.float32) for shape in SHAPES), (SHAPES[1], torch.bfloat16)], ids=str
)
def test_matches_reference(shape, dtype, fused):
    one = layer(shape, dtype)
    parts = (one.W, one.A, one.B)
    y = switch_linear(strided(one.x), *parts, strided(one.gates), 0.7, bias=one.bias, backend="triton", fused=fused)
    assert_rounded_alike(y, switch_linear_reference(one.x, *parts, one.gates, 0.7, bias=one.bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_paths_agree_bit_for_bit_where_sums_are_exact(dtype):
    one = layer((16, 40, 24, 3, 8, 2), dtype, exact=True)
    arguments = (one.x, one.W, one.A, one.B, one.gates, 0.5)
    expected = switch_linear(*arguments, backend="torch")
    assert expected.equal(switch_linear_reference(*arguments))
    for fused in (False, True):
        assert switch_linear(*arguments, backend="triton", fused=fused).equal(expected)


def test_layers_of_other_sizes_take_turns_in_a_workspace():
    space = SwitchWorkspace(60, DEVICE)
    finished = 0
    for _ in range(2):
        for shape in ((3, 40, 24, 3, 20, 2), (2, 65, 33, 1, 4, 1)):
            one = layer(shape)
            arguments = (one.x, one.W, one.A, one.B, one.gates, 0.5)
            y = switch_linear(*arguments, backend="triton", fused=True, workspace=space)
            assert_rounded_alike(y, switch_linear_reference(*arguments))
            finished += -(-shape[3] * shape[4] // 16)  # tiles of 16 rows of A
            assert space.counters.tolist() == [finished, finished, 0]


def test_counters_may_wrap_around():
    space = SwitchWorkspace(60, DEVICE)
    space.counters[:2] = 2**31 - 2
    one = layer((3, 40, 24, 3, 20, 2))
    arguments = (one.x, one.W, one.A, one.B, one.gates, 0.5)
    y = switch_linear(*arguments, backend="triton", fused=True, workspace=space)
    assert_rounded_alike(y, switch_linear_reference(*arguments))
    assert space.counters.tolist() == [-(2**31) + 2, -(2**31) + 2, 0]


def test_expert_that_is_not_chosen_may_hold_nan():
    one = layer((2, 40, 24, 3, 4, 1))
    gates = torch.eye(3, device=DEVICE)[:2]
    one.A[1] = math.nan
    y = switch_linear(one.x, one.W, one.A, one.B, gates, 1.0, backend="triton")
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


def test_programs_that_do_not_fit_on_the_card_together_are_refused():
    one, space = layer((2, 40, 24, 3, 4, 1)), SwitchWorkspace(12, DEVICE)
    most = resident_programs(one.x.device)
    with pytest.raises(ValueError, match=f"programs: expected at most {most}, .* got {most + 1}"):
        launch(one.x, one.W, one.A, one.B, one.gates, 1.0, None, space.u, space.counters, True, most + 1)


def test_refuses_what_the_kernel_cannot_read():
    one = layer((2, 40, 24, 3, 4, 1))
    with pytest.raises(ValueError, match="W: expected a contiguous tensor, got strides"):
        switch_linear(one.x, strided(one.W), one.A, one.B, one.gates, 1.0, backend="triton")
    space = SwitchWorkspace(1, DEVICE)
    with pytest.raises(ValueError, match=r"workspace: expected one for E\*r = 12, got one for 1"):
        switch_linear(one.x, one.W, one.A, one.B, one.gates, 1.0, backend="triton", workspace=space)
