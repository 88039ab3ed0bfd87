"""Merge the chosen experts into many linear layers at once, out of place, from a clean copy of the weights.

    out_i = base_i + scale * sum_k g_k B_i[:, e_k] A_i[e_k]     for every item i,   A [E, r, N],  B [M, E*r],  base [M, N]

One route (ids e, weights g) for all of them: a sequence, a user, or the whole engine. `base` is never written, so a switch has
one rounding behind it however many came before. Updating in place, W += new - old, rounds at every switch, and the errors
walk: in bfloat16 about 0.17 % of ||W|| times the root of the number of switches (`subtract_and_add` is that, as a baseline).

Even one merge loses what is below half a unit in the last place of W; `merge_snr` says how much.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmrl_kernels.backends import KERNEL_DTYPES, expect_device, expect_shape, use_triton

CHUNK_ELEMENTS = 1 << 20  # of a delta in float32 at a time in the torch path

Route = tuple[Sequence[int] | Tensor, Sequence[float] | Tensor]
"""ids `[k]` and weights `[k]`."""


@dataclass(frozen=True, eq=False)
class MergeItem:
    """A linear layer: base and out `[M, N]`, A `[E, r, N]`, B `[M, E*r]`; column e*r + j of B is rank j of expert e."""

    base: Tensor
    out: Tensor
    A: Tensor
    B: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return the four by name."""
        return {"base": self.base, "out": self.out, "A": self.A, "B": self.B}


class MergePlan:
    """Merges one route after another into the same tensors; their addresses are taken once.

    On a GPU a merge is one launch that depends on nothing but device memory: it can be captured in a CUDA graph, with ids and
    weights in buffers that later replays refill.

    Args:
        items: the layers. Tensors are contiguous, on one device, in float32, bfloat16 or float16; A and B share a dtype, and
            all base, all out, all A and B are alike in theirs. E is the same everywhere; r may differ. No `out` shares memory
            with any other tensor. The plan holds on to them; their data may change (then call `invalidate`), not their place.
        top_k: k, how many experts a route names.
        scale: factor of the delta.
        backend: "auto" is the Triton kernel on a GPU and plain torch elsewhere; "torch" or "triton" insists.

    Raises:
        ValueError: shapes, devices, memory or numbers do not fit, or the backend cannot run.
        TypeError: dtypes do not fit.
    """

    in_place = False

    def __init__(self, items: Sequence[MergeItem], *, top_k: int, scale: float, backend: str = "auto") -> None:
        self.items, self.top_k, self.scale = tuple(items), top_k, float(scale)
        self.experts = _check_items(self.items)
        _check_memory(self.items, self.in_place)
        if top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {top_k}")
        self._first = self.items[0].base
        self._applied: bytes | None = None
        self._launch: Any = None
        if use_triton(backend, self._first):
            from llmrl_kernels.merge_all_triton import Launch

            self._addresses = self._read_addresses()
            shapes = [(*item.base.shape, item.A.shape[1]) for item in self.items]
            dtypes = (self._first.dtype, self.items[0].out.dtype, self.items[0].A.dtype)
            sizes = (self.experts, top_k, self.scale, self._first.device)
            self._launch = Launch(self._addresses, shapes, dtypes, *sizes, in_place=self.in_place)

    def merge(
        self, ids: Tensor | Sequence[int], weights: Tensor | Sequence[float], *, check: bool | None = None
    ) -> None:
        """Write every item's `out` for a route; nothing where the route is the one merged last.

        A weight of 0 leaves its expert out, unread; with weights all 0 and out in base's dtype, out is base bit for bit.

        Args:
            ids: `[k]` int32 on the items' device, or numbers on the host.
            weights: `[k]` float32 likewise.
            check: whether to refuse ids that name no expert. None does so where that costs no wait for the device: for numbers
                on the host and tensors on the CPU. Unchecked, such an id fills every out with NaN.

        Raises:
            ValueError: a shape, a device, or (where checked) an id does not fit, or a tensor of the items has moved.
            TypeError: a dtype does not fit.
        """
        given, on_host = ids, not (isinstance(ids, Tensor) and ids.is_cuda)
        ids, weights = _route((ids, weights), self._first.device)
        expect_shape("ids", ids, (self.top_k,), "[k]")
        expect_shape("weights", weights, (self.top_k,), "[k]")
        expect_device("ids", ids, "the items", self._first)
        expect_device("weights", weights, "the items", self._first)
        if on_host if check is None else check:
            _check_ids(given, self.experts)  # not its copy on the device, to have no wait
        if self._launch is not None:
            if self._read_addresses() != self._addresses:  # a launch would write to memory that may be another's by now
                raise ValueError("items: expected tensors where they were, got one that moved: build a new plan")
            self._launch(ids.contiguous(), weights.contiguous())
        else:
            self._merge_torch(ids.tolist(), weights.tolist())

    def invalidate(self) -> None:
        """Make the next merge write whatever its route is: call it after base, A, B or out changed."""
        self._applied = None
        if self._launch is not None:
            self._launch.invalidate()

    def _read_addresses(self) -> list[tuple[int, ...]]:
        return [tuple(tensor.data_ptr() for tensor in item.tensors().values()) for item in self.items]

    def _merge_torch(self, ids: list[int], weights: list[float]) -> None:
        route = struct.pack(f"{len(ids)}i{len(weights)}f", *ids, *weights)
        if route == self._applied:
            return
        with torch.no_grad(), torch.autocast(self._first.device.type, enabled=False):
            for item in self.items:
                for rows in _row_chunks(item.base):
                    delta = _delta(item, rows, ids, weights, self.scale)
                    base = item.base[rows].float()
                    item.out[rows] = torch.where(delta == 0, base, base + delta)  # -0.0 + 0.0 would be 0.0
        self._applied = route


class InPlacePlan(MergePlan):
    """Switches in place: W += new - old in one pass over the weights. A BASELINE THAT DRIFTS, for comparisons.

    This is the fused update of LoRA-Switch (arXiv 2405.17741, its SGMM): on a GPU the launch of `MergePlan`, which takes the
    experts of the last merge out as it puts the new ones in; what was last put in is kept on the device, so it is captured and
    replayed in a CUDA graph as that is. `subtract_and_add` is the same in plain torch, for any two routes.

    Args: as of `MergePlan`, but base is out, W, in every item. W holds no route at first.
    """

    in_place = True
    _held: tuple[list[int], list[float]] | None = None

    def held(self) -> tuple[list[int], list[float]] | None:
        """Return ids and weights of the route that W holds, None for none. Waits for the device."""
        found = self._held if self._launch is None else self._launch.applied()
        return found  # type: ignore[no-any-return]

    def invalidate(self) -> None:
        """Take W for weights without a route: call it after W was written from elsewhere."""
        super().invalidate()
        self._held = None

    def _merge_torch(self, ids: list[int], weights: list[float]) -> None:
        if self._held != (ids, weights):
            subtract_and_add(self.items, self._held, (ids, weights), scale=self.scale)
            self._held = ids, weights


def _delta(item: MergeItem, rows: slice, ids: list[int], weights: list[float], scale: float) -> Tensor:
    """Return scale * sum_k g_k B[rows, e_k] A[e_k] in float32; NaN for an id that is no expert's."""
    experts, rank, width = item.A.shape
    delta = item.base.new_zeros(item.base[rows].shape[0], width, dtype=torch.float32)
    for expert, weight in zip(ids, weights, strict=True):
        if not 0 <= expert < experts:
            return delta.fill_(float("nan"))
        if weight != 0:
            up = item.B[rows, expert * rank : (expert + 1) * rank].float()
            delta += (up @ item.A[expert].float()) * weight
    return delta.mul_(scale)


def _row_chunks(base: Tensor) -> Iterator[slice]:
    height = max(1, CHUNK_ELEMENTS // base.shape[1])
    return (slice(first, first + height) for first in range(0, len(base), height))


def _route(route: Route, device: torch.device) -> tuple[Tensor, Tensor]:
    ids, weights = route
    ids = ids if isinstance(ids, Tensor) else torch.tensor(ids, dtype=torch.int32, device=device)
    weights = weights if isinstance(weights, Tensor) else torch.tensor(weights, dtype=torch.float32, device=device)
    if ids.dtype != torch.int32:
        raise TypeError(f"ids: expected int32, got {ids.dtype}; cast them with ids.int()")
    if weights.dtype != torch.float32:
        raise TypeError(f"weights: expected float32, got {weights.dtype}; cast them with weights.float()")
    return ids, weights


def _check_ids(ids: Tensor | Sequence[int], experts: int) -> None:
    for one in ids.tolist() if isinstance(ids, Tensor) else ids:
        if not 0 <= one < experts:
            raise ValueError(f"ids: expected 0 to {experts - 1}, one of {experts} experts, got {one}")


def _check_items(items: tuple[MergeItem, ...]) -> int:
    """Refuse items that one launch cannot serve; return E."""
    if not items:
        raise ValueError("items: expected at least one, got none")
    first = items[0]
    for index, item in enumerate(items):
        name = f"items[{index}]."
        if item.base.dim() != 2 or item.A.dim() != 3 or 0 in item.base.shape or 0 in item.A.shape:
            raise ValueError(
                f"{name}base and A: expected [M, N] and [E, r, N], none of them 0, got {list(item.base.shape)} and "
                f"{list(item.A.shape)}"
            )
        (height, width), (experts, rank, _) = item.base.shape, item.A.shape
        expect_shape(f"{name}out", item.out, (height, width), "[M, N] as of base")
        expect_shape(f"{name}A", item.A, (first.A.shape[0], rank, width), "[E, r, N], E as in items[0], N as in base")
        expect_shape(f"{name}B", item.B, (height, experts * rank), "[M, E*r]")
        for key, tensor in item.tensors().items():
            _check_tensor(name + key, tensor, "items[0].base", first.base)
            like = "A" if key == "B" else key
            if tensor.dtype != first.tensors()[like].dtype:
                wanted = first.tensors()[like].dtype
                raise TypeError(f"{name}{key}: expected {wanted}, the dtype of items[0].{like}, got {tensor.dtype}")
    return int(first.A.shape[0])


def _check_tensor(name: str, tensor: Tensor, like: str, first: Tensor) -> None:
    if tensor.dtype not in KERNEL_DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {tensor.dtype}")
    expect_device(name, tensor, like, first)
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor, got strides {tensor.stride()}; copy it with .contiguous()"
        )


def _check_memory(items: tuple[MergeItem, ...], in_place: bool) -> None:
    """Refuse an `out` that shares bytes with anything else: a clean base is the point of it all. In place, base is out."""
    spans = []
    for index, item in enumerate(items):
        if in_place and (item.base.data_ptr() != item.out.data_ptr() or item.base.dtype != item.out.dtype):
            raise ValueError(f"items[{index}].out: expected base itself, to be updated in place, got another tensor")
        for key, tensor in item.tensors().items():
            if in_place and key == "base":
                continue
            start = tensor.data_ptr()
            spans.append((start, start + tensor.nbytes, key == "out", f"items[{index}].{key}"))
    spans.sort()
    furthest: dict[bool, tuple[int, str]] = {}  # the last end so far: of every out, and of everything else
    for start, end, written, name in spans:
        for kind, (other_end, other) in furthest.items():
            if start < other_end and (written or kind):
                raise ValueError(f"{other} and {name}: expected an out with memory of its own, got two that overlap")
        if end > furthest.get(written, (0, ""))[0]:
            furthest[written] = (end, name)


def merge_all_reference(
    items: Sequence[MergeItem], ids: Sequence[int] | Tensor, weights: Sequence[float] | Tensor, scale: float
) -> list[Tensor]:
    """Return what a merge writes, from its definition, in float64 and rounded once; no tensor of the items is written."""
    merged = []
    for item in items:
        delta = torch.zeros_like(item.base, dtype=torch.float64)
        up = item.B.double().unflatten(1, item.A.shape[:2])
        for expert, weight in zip(ids, weights, strict=True):
            if weight != 0:
                delta += float(weight) * (up[:, int(expert)] @ item.A[int(expert)].double())
        base = item.base.double()
        merged.append(torch.where(delta == 0, base, base + scale * delta).to(item.out.dtype))
    return merged


def subtract_and_add(
    items: Sequence[MergeItem], old_route: Route | None, new_route: Route | None, *, scale: float
) -> None:
    """Switch in place: W += new - old with W = `out`. A BASELINE THAT DRIFTS, for comparisons; use `MergePlan`.

    This is the update of LoRA-Switch (arXiv 2405.17741): one product of the concatenation of the negated old experts and the
    new ones, in float32, added to W and rounded to W's dtype. `base` is not looked at, so no switch undoes what the roundings
    before it left behind.

    Args:
        items: the layers; `out` holds W with the old route in it.
        old_route: ids and weights to take out, or None.
        new_route: ids and weights to put in, or None.
        scale: factor of both.

    Raises:
        ValueError: an id names no expert.
        TypeError: ids or weights of a tensor are not int32 or float32.
    """
    device = items[0].out.device
    signed: list[tuple[int, float]] = []
    for route, sign in ((old_route, -scale), (new_route, scale)):
        if route is not None:
            ids, weights = _route(route, device)
            _check_ids(ids, items[0].A.shape[0])
            pairs = zip(ids.tolist(), weights.tolist(), strict=True)
            signed += [(expert, sign * weight) for expert, weight in pairs if weight != 0]
    if not signed:
        return
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for item in items:
            up = item.B.unflatten(1, item.A.shape[:2])
            left = torch.cat([up[:, expert].float() for expert, _ in signed], 1)
            right = torch.cat([factor * item.A[expert].float() for expert, factor in signed])
            item.out.copy_(item.out.float() + left @ right)


def merge_snr(base: Tensor, delta: Tensor) -> float:
    """Return ||D|| / ||round(W + D) - (W + D)||: how far the adapter stands above the rounding that merging it costs.

    Around 1 the merged weights say as much about rounding as about the adapter: leave it unmerged. Infinite where nothing is
    lost. Waits for the device.

    Args:
        base: W, of any shape, in the dtype that the merge rounds to.
        delta: D, of the same shape; float32 or longer, or it was rounded already.

    Raises:
        ValueError: the shapes differ.
    """
    expect_shape("delta", delta, tuple(base.shape), "the shape of base")
    exact = base.double() + delta.double()
    lost = (exact.to(base.dtype).double() - exact).norm()
    return float(delta.double().norm() / lost) if lost > 0 else float("inf")
