"""What a per-token temperature's losses need of the logits, in one sweep over the vocabulary that never holds them all.

A token has logits z = cap tanh(scale (W h + b) / cap) and a multiplier s = exp(clamp(tau)). The sweep gives

    lse = log sum_i exp(s z_i),  target = s z_y,  top = s max z,  mean = s mean(z),  top_logprob = log p_top = top - lse

with p = softmax(s z), and the slopes of all of them, because the base is frozen and only s moves:

    dlse/ds = E_p[z],   so   d(lse - target)/dtau = s (E_p[z] - z_y),   d(lse - mean)/dtau = s (E_p[z] - mean(z)).

Losses built from these outputs (likelihood of the label, uniform smoothing, confidence of the most likely token) therefore
have exact gradients in tau from stored vectors `[N]`: no backward sweep, 2NHV operations instead of 8NHV with recomputation.

Two paths give the same numbers: chunks in plain torch, and a Triton kernel for GPUs (`scaled_lse_sweep_triton.py`). Both see
the logits as the model computes them: summed in float32, rounded once to the weight's dtype, float32 from there on.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
CHUNK_BYTES = 4 << 20  # of float32 logits at a time on a CPU: more than a core's cache holds gains nothing there
_GPU_CHUNKS = 64  # times as much on a GPU, where small products waste it
_CHUNK_ROWS = 256  # tokens of a chunk where the whole vocabulary does not fit: enough for an efficient product
_FLOOR = -1e30  # stands for -inf where it would be multiplied by 0
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class LseSweep(NamedTuple):
    """Per token, all `[N]`; float32, or float64 for a float64 weight. See the head of the file for the equations.

    The first five carry gradients to tau. With them -log p_y = (top - target) - top_logprob, which is lse - target without
    the cancellation of two large numbers, and exp(top_logprob) is the confidence of the most likely token.

    A token with label -100 is left out of the sweep: zeros, argmax -1, no gradient. A row with a NaN or +inf logit is NaN,
    argmax -1.
    """

    lse: Tensor
    """log sum_i exp(s z_i)."""
    target: Tensor
    """s z_y."""
    top: Tensor
    """s max_i z_i."""
    mean: Tensor
    """s times the mean of z over the entries that are neither padding nor absent."""
    top_logprob: Tensor
    """log p of the most likely token, <= 0, exact where lse and top agree in all their digits."""
    expected: Tensor
    """E_p[z]; a constant to autograd."""
    argmax: Tensor
    """int64, the first of equals."""


class Moments(NamedTuple):
    """What a sweep over a part of the vocabulary leaves, all `[..., N]`; `merge` joins parts."""

    top: Tensor  # m = max z
    total: Tensor  # sum exp(s (z - m))
    weighted: Tensor  # sum exp(s (z - m)) (z - m)
    plain: Tensor  # sum z
    target: Tensor  # z_y, or 0 where y is in another part
    argmax: Tensor


def merge(parts: Moments, scale: Tensor) -> Moments:
    """Join parts `[P, N]` of the vocabulary, in its order, to `[N]`; an empty part has top -1e30 and zeros."""
    top = parts.top.amax(0)
    shift = parts.top - top
    rescale = (scale * shift).exp()
    return Moments(
        top,
        (rescale * parts.total).sum(0),
        (rescale * (parts.weighted + shift * parts.total)).sum(0),  # z - m of every term moves too
        parts.plain.sum(0),
        parts.target.sum(0),
        parts.argmax.gather(0, parts.top.argmax(0, keepdim=True))[0],
    )


@dataclass(frozen=True)
class _OutputLayer:
    """Checked inputs. weight `[V, H]` without padding; absent `[V]` is True where the bias is -inf, or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    absent: Tensor | None
    scale: float
    cap: float

    @property
    def dtype(self) -> torch.dtype:
        """Of everything after the matrix product."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    def count(self) -> int | Tensor:
        """Return how many entries the vocabulary has."""
        return self.weight.shape[0] if self.absent is None else (~self.absent).sum()

    def logits(self, hidden: Tensor, part: slice) -> Tensor:
        """Return z `[T, part]`, freshly allocated; 0 stands where an entry is absent."""
        weight, bias = self.weight[part], None if self.bias is None else self.bias[part]
        if weight.dtype == torch.float16 and weight.device.type == "cpu":  # ten times as fast as the product in float16
            bias = None if bias is None else bias.float()
            z = torch.nn.functional.linear(hidden.float(), weight.float(), bias).half()
        else:
            z = torch.nn.functional.linear(hidden, weight, bias)
        z = z.to(self.dtype)
        if self.scale != 1.0:
            z.mul_(self.scale)
        if self.cap:
            z.div_(self.cap).tanh_().mul_(self.cap)
        return z if self.absent is None else z.masked_fill_(self.absent[part], 0.0)


def scaled_lse_sweep(
    hidden: Tensor,
    weight: Tensor,
    log_scale: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    vocab_size: int | None = None,
    min_log_scale: float = -3.0,
    max_log_scale: float = math.log(10.0),
    backend: str = "auto",
) -> LseSweep:
    """Sweep once over the vocabulary; memory beside the inputs is O(N) plus a chunk of fixed size.

    Args:
        hidden: `[N, H]`, what enters the output layer; cast to the weight's dtype.
        weight: `[V, H]`, bfloat16, float16, float32 or float64 (float64 in plain torch only).
        log_scale: tau `[N]`, log of the multiplier. Gradients go here and nowhere else. It is clipped as by `torch.clamp`:
            the gradient passes at the ends of the range and is 0 beyond them.
        labels: `[N]` integers, the token y; -100 is ignored.
        bias: `[V]`; -inf marks an entry as absent (masked vocabulary), whatever the soft-cap.
        logit_scale: constant factor of the logits (Cohere; 1 / logits_scaling of Granite).
        soft_cap: cap tanh(z / cap) after the factor (Gemma 2); None or 0 is none.
        vocab_size: how many rows of `weight` are real; the ones after are padding. None is all of them.
        min_log_scale: lower end of the clip of tau.
        max_log_scale: upper end.
        backend: "auto" is the Triton kernel on a GPU and plain torch elsewhere; "torch" or "triton" insists.

    Returns:
        LseSweep.

    Raises:
        ValueError: shapes, dtypes, devices or labels do not fit, or hidden, weight or bias asks for a gradient: the base is
            frozen, and the gradient of a trained one would be silently missing.
    """
    layer = _checked_layer(hidden, weight, bias, logit_scale, soft_cap, vocab_size)
    _check_tokens(layer, log_scale, labels, min_log_scale, max_log_scale)
    sweep = _sweep_triton if _use_triton(backend, layer) else _sweep_torch
    ignored = labels == IGNORED
    # out of a padded position a tau may be NaN
    tau = log_scale.to(layer.dtype).masked_fill(ignored, 0.0)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        rows = (~ignored).nonzero()[:, 0]
        scale = tau.clamp(min_log_scale, max_log_scale).exp()
        moments = sweep(layer, scale[rows], labels[rows], rows) if len(rows) else _no_moments(0, layer)
        (top, excess, top_logprob, target, mean), argmax = _statistics(moments, layer.count(), rows, len(labels))
        inside = (tau >= min_log_scale) & (tau <= max_log_scale)
    outputs = _Differentiable.apply(tau, scale, inside, top_logprob, top, excess, target, mean)
    return LseSweep._make([*outputs, top + excess, argmax])


class _Differentiable(torch.autograd.Function):
    """The first five of `LseSweep` as functions of tau, from max z, E_p[z - max z], z_y and mean z at this tau."""

    @staticmethod
    def forward(
        ctx: Any,
        tau: Tensor,
        scale: Tensor,
        inside: Tensor,
        top_logprob: Tensor,
        top: Tensor,
        excess: Tensor,
        target: Tensor,
        mean: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(scale, inside, top, excess, target, mean)
        ctx.set_materialize_grads(False)  # an unused output costs nothing, and 0 times a target of -inf is never taken
        return scale * top - top_logprob, scale * target, scale * top, scale * mean, top_logprob.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        scale, inside, top, excess, target, mean = ctx.saved_tensors
        slopes = (top + excess, target, top, mean, -excess)  # in the multiplier; E_p[z] = max z + excess
        parts = [grad * slope for grad, slope in zip(grads, slopes, strict=True) if grad is not None]
        return (sum(parts, torch.zeros_like(scale)) * scale).where(inside, 0.0), *(None,) * 7


def _statistics(moments: Moments, count: int | Tensor, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return `[5, size]`: m, E_p[z - m], log p_top, z_y and mean z of the swept rows, 0 elsewhere; and argmax `[size]`."""
    top, total, weighted, plain, target, argmax = moments
    bad = total.isnan()
    found = torch.stack([top, weighted / total, -total.log(), target, plain / count]).masked_fill_(bad, math.nan)
    spread = found.new_zeros(5, size).index_copy_(1, rows, found)
    nowhere = torch.full((size,), -1, dtype=torch.int64, device=top.device)
    return spread, nowhere.index_copy_(0, rows, argmax.masked_fill(bad, -1))


def _no_moments(rows: int, layer: _OutputLayer) -> Moments:
    total, weighted, plain, target = torch.zeros(4, rows, dtype=layer.dtype, device=layer.hidden.device)
    argmax = torch.zeros(rows, dtype=torch.int64, device=layer.hidden.device)
    return Moments(torch.full_like(total, _FLOOR), total, weighted, plain, target, argmax)


def _sweep_torch(layer: _OutputLayer, scale: Tensor, labels: Tensor, rows: Tensor) -> Moments:
    vocab = layer.weight.shape[0]
    height, width = _chunk_shape(len(rows), vocab, layer.hidden.device)
    done = []
    for start in range(0, len(rows), height):
        tokens = slice(start, start + height)
        hidden = layer.hidden[rows[tokens]].to(layer.weight.dtype)
        moments = _no_moments(len(hidden), layer)
        for first in range(0, vocab, width):
            entries = slice(first, min(first + width, vocab))
            found = _chunk_moments(layer, hidden, entries, scale[tokens], labels[tokens])
            pair = Moments(*(torch.stack(both) for both in zip(moments, found, strict=True)))
            moments = merge(pair, scale[tokens])
        done.append(moments)
    return Moments(*(torch.cat(parts) for parts in zip(*done, strict=True)))


def _chunk_shape(rows: int, vocab: int, device: torch.device) -> tuple[int, int]:
    """Return tokens and vocabulary entries of a chunk."""
    logits = CHUNK_BYTES // 4 * (1 if device.type == "cpu" else _GPU_CHUNKS)
    height = min(rows, max(_CHUNK_ROWS, logits // vocab))
    return height, max(1, min(vocab, logits // height))


def _chunk_moments(layer: _OutputLayer, hidden: Tensor, part: slice, scale: Tensor, labels: Tensor) -> Moments:
    z = layer.logits(hidden, part)
    plain = z.sum(-1)
    if layer.absent is not None:
        z.masked_fill_(layer.absent[part], -math.inf)
    here = (labels >= part.start) & (labels < part.stop)
    target = z.gather(1, (labels - part.start).clamp(0, z.shape[1] - 1)[:, None])[:, 0].where(here, 0.0)
    top, argmax = z.amax(-1).clamp_min(_FLOOR), z.argmax(-1) + part.start  # together twice as fast as z.max(-1)
    z.sub_(top[:, None])
    p = (z * scale[:, None]).exp_()
    total = p.sum(-1)
    weighted = p.mul_(z.clamp_min_(_FLOOR)).sum(-1)
    return Moments(top, total, weighted, plain, target, argmax)


def _sweep_triton(layer: _OutputLayer, scale: Tensor, labels: Tensor, rows: Tensor) -> Moments:
    from llmrl_kernels.scaled_lse_sweep_triton import sweep_parts

    hidden = layer.hidden.to(layer.weight.dtype)
    sums, argmax = sweep_parts(hidden, layer.weight, layer.bias, rows, labels, scale, layer.scale, layer.cap)
    return merge(Moments._make([*sums.unbind(), argmax.long()]), scale)


def _use_triton(backend: str, layer: _OutputLayer) -> bool:
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend: expected 'auto', 'torch' or 'triton', got {backend!r}")
    if backend == "torch" or (backend == "auto" and not layer.weight.is_cuda):
        return False
    able = layer.weight.dtype in _TRITON_DTYPES and importlib.util.find_spec("triton") is not None
    if backend == "triton" and not able:
        raise ValueError(f"backend 'triton' needs the package triton and a dtype it knows, got {layer.weight.dtype}")
    return able


def _checked_layer(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    soft_cap: float | None,
    vocab_size: int | None,
) -> _OutputLayer:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [N, H] and weight [V, H], got {_shape(hidden)} and {_shape(weight)}; "
            "flatten a batch of sequences with hidden.flatten(0, -2)"
        )
    if not hidden.is_floating_point() or weight.dtype not in (*_TRITON_DTYPES, torch.float64):
        raise ValueError(
            f"expected hidden and weight in bfloat16, float16, float32 or float64, got {hidden.dtype} and {weight.dtype}; "
            "a quantised output layer has to be dequantised first"
        )
    vocab = weight.shape[0] if vocab_size is None else vocab_size
    if not 1 <= vocab <= weight.shape[0]:
        raise ValueError(f"vocab_size: expected 1 to {weight.shape[0]}, the rows of weight, got {vocab}")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"bias: expected floating-point [V] = {_shape(weight[:, 0])}, got {bias.dtype} {_shape(bias)}")
    if soft_cap is not None and not soft_cap >= 0.0:
        raise ValueError(f"soft_cap: expected a positive number or None, got {soft_cap}")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} asks for a gradient, which goes to log_scale alone: pass {name}.detach()")
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"expected all tensors on {hidden.device}, the device of hidden; {name}: {tensor.device}")
    absent = None
    if bias is not None:
        bias = bias[:vocab].to(weight.dtype)
        absent = bias == -math.inf
        if absent.all():
            raise ValueError("bias is -inf everywhere: expected at least one entry of the vocabulary to be left")
        absent = absent if absent.any() else None
    return _OutputLayer(hidden, weight[:vocab], bias, absent, float(logit_scale), float(soft_cap or 0.0))


def _check_tokens(layer: _OutputLayer, log_scale: Tensor, labels: Tensor, low: float, high: float) -> None:
    size = layer.hidden.shape[:1]
    if log_scale.shape != size or not log_scale.is_floating_point():
        raise ValueError(
            f"log_scale: expected floating-point [N] = {list(size)}, one a row of hidden, got {log_scale.dtype} "
            f"{_shape(log_scale)}"
        )
    if labels.shape != size or labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels: expected int64 [N] = {list(size)}, got {labels.dtype} {_shape(labels)}")
    if log_scale.device != layer.hidden.device or labels.device != layer.hidden.device:
        raise ValueError(
            f"expected all tensors on {layer.hidden.device}, the device of hidden; "
            f"log_scale: {log_scale.device}, labels: {labels.device}"
        )
    if not low <= high:
        raise ValueError(f"expected min_log_scale <= max_log_scale, got {low} and {high}")
    vocab = layer.weight.shape[0]
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= vocab))]
    if len(wrong):
        raise ValueError(f"labels: expected 0 to {vocab - 1}, or {IGNORED} for ignored, got {int(wrong[0])}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def scaled_lse_sweep_reference(
    hidden: Tensor,
    weight: Tensor,
    log_scale: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    vocab_size: int | None = None,
    min_log_scale: float = -3.0,
    max_log_scale: float = math.log(10.0),
) -> LseSweep:
    """`scaled_lse_sweep` from its definition, in float64, with all logits `[N, V]` and gradients by autograd."""
    ignored = labels == IGNORED
    z = hidden.to(weight.dtype).double() @ weight[:vocab_size].double().T
    if bias is not None:
        z = z + bias[:vocab_size].to(weight.dtype).double()
    z = z.to(weight.dtype).double() * logit_scale
    if soft_cap:
        z = soft_cap * torch.tanh(z / soft_cap)
    present = torch.ones(z.shape[1], dtype=torch.bool) if bias is None else bias[:vocab_size] > -math.inf
    present = present.to(z.device)
    target = z.masked_fill(~present, -math.inf).gather(1, labels.clamp_min(0).long()[:, None])[:, 0]
    z = z[:, present]
    scale = log_scale.double().masked_fill(ignored, 0.0).clamp(min_log_scale, max_log_scale).exp()
    scaled = scale[:, None] * z
    lse, top = scaled.logsumexp(-1), scaled.amax(-1)
    expected = (scaled.softmax(-1) * z).sum(-1).detach()
    target = scale * target.masked_fill(ignored, 0.0)
    sweep = (lse, target, top, scale * z.mean(-1), scaled.log_softmax(-1).amax(-1), expected)
    argmax = present.nonzero()[:, 0][z.argmax(-1)]
    return LseSweep._make([*(part.masked_fill(ignored, 0.0) for part in sweep), argmax.masked_fill(ignored, -1)])
