"""What the ops that switch LoRA experts share on the host: the choice of a path, and the checks of what comes in."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*KERNEL_DTYPES, torch.float64)
HAS_TRITON = importlib.util.find_spec("triton") is not None  # asked here: torch.compile cannot trace the question


def use_triton(backend: str, tensor: Tensor) -> bool:
    """Choose between the Triton kernel and plain torch for the device and dtype of `tensor`.

    Raises:
        ValueError: `backend` is no backend, or "triton" where it cannot run.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend: expected 'auto', 'torch' or 'triton', got {backend!r}")
    if backend == "torch" or (backend == "auto" and not tensor.is_cuda):
        return False
    able = tensor.dtype in KERNEL_DTYPES and HAS_TRITON
    if backend == "triton" and not able:
        raise ValueError(
            f"backend 'triton' needs the package triton and float32, bfloat16 or float16, got {tensor.dtype}: "
            "use backend 'torch'"
        )
    if able and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend 'triton' runs on a GPU, got tensors on {tensor.device}: move them, or set TRITON_INTERPRET=1"
        )
    return able


def expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...], words: str) -> None:
    """Refuse a tensor of another shape than the one that `words` spell out, such as `[T, E*r]`.

    Raises:
        ValueError: its shape is another.
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected {words} = {list(shape)}, got {list(tensor.shape)}")


def expect_rank(name: str, tensor: Tensor, dims: int, words: str) -> None:
    """Refuse a tensor with another number of dimensions, or an empty dimension after the first.

    Raises:
        ValueError: it has.
    """
    if tensor.dim() != dims or 0 in tensor.shape[1:]:
        raise ValueError(f"{name}: expected {words} with no empty dimension, got {list(tensor.shape)}")


def expect_alike(like: str, first: Tensor, **others: Tensor | None) -> None:
    """Refuse tensors that are not of the dtype and on the device of `first`, which is called `like`.

    Raises:
        TypeError: a dtype is none of float32, bfloat16, float16, float64, or is another.
        ValueError: a device is another.
    """
    if first.dtype not in DTYPES:
        raise TypeError(f"{like}: expected float32, bfloat16, float16 or float64, got {first.dtype}")
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name}: expected {first.dtype}, the dtype of {like}, got {tensor.dtype}")
        expect_device(name, tensor, like, first)


def expect_device(name: str, tensor: Tensor, like: str, first: Tensor) -> None:
    """Refuse a tensor that is not on the device of `first`.

    Raises:
        ValueError: it is not.
    """
    if tensor.device != first.device:
        raise ValueError(f"{name}: expected a tensor on {first.device}, the device of {like}, got {tensor.device}")


def expect_no_gradient(op: str, instead: str, *tensors: Tensor | None) -> None:
    """Refuse tensors whose gradient would silently be missing.

    Raises:
        ValueError: one of them asks for a gradient where gradients are recorded.
    """
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise ValueError(f"{op} has no gradient, expected tensors that ask for none: {instead}")


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """Return in what to sum: float32, or float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
