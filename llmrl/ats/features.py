"""What a head is fitted on, computed once: hidden states, and the log-sum-exp curve that replaces the logits.

For each scored token the base model gives the hidden state h that enters the output embedding and a row of logits z. Kept
are h, the gap m - z_y between the largest logit and the target's, whether they are the same, and the curve of
`llmrl_kernels.lse_curve`; about 0.5 kB a token beside h, whatever the vocabulary. Logits exist for one chunk of tokens at a
time. Finished shards lie on disk, so a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmrl.ats.data import Window
from llmrl.errors import ModelError, OutputError
from llmrl.files import write_json
from llmrl.training.distributed import barrier, rank, world_size
from llmrl_kernels import curve_knots, lse_curve

CHUNK_BYTES = 4 << 20  # of float32 logits at a time: more than a core's cache holds gains nothing on a CPU
WINDOWS_PER_SHARD = 64


@dataclass(frozen=True)
class OutputLayer:
    """The map from hidden states to logits, spelled out: `cap * tanh(scale * (h W^T + b) / cap)`.

    Covers tied and untied embeddings, an lm_head bias, Gemma's final soft-cap, and the constant scale of Cohere
    (multiplied) and Granite (divided).
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    soft_cap: float | None

    @classmethod
    def of(cls, model: Any) -> OutputLayer:
        """Read it off a transformers causal LM."""
        layer, config = model.get_output_embeddings(), model.config
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        cap = getattr(config, "final_logit_softcapping", None)
        return cls(layer.weight.detach(), getattr(layer, "bias", None), scale, cap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits `[N, V]` for hidden states `[N, H]`."""
        z = torch.nn.functional.linear(hidden.to(self.weight.device, self.weight.dtype), self.weight, self.bias).float()
        if self.scale != 1.0:
            z = z * self.scale
        if self.soft_cap:
            z = torch.tanh(z / self.soft_cap) * self.soft_cap
        return z

    def chunk(self) -> int:
        """Return how many tokens' logits fit into one chunk."""
        size = CHUNK_BYTES if self.weight.device.type == "cpu" else 64 * CHUNK_BYTES
        return max(1, size // (4 * self.weight.shape[0]))


@dataclass(frozen=True)
class TokenFeatures:
    """Per scored token, N in all. `window` is the index of the window the token stands in.

    Shapes: hidden `[N, H]` in the model's dtype, gap `[N]` float32 >= 0, correct `[N]` bool, target `[N]` int64,
    window `[N]` int64, curve and slope `[N, K]` float32.
    """

    hidden: Tensor
    gap: Tensor
    correct: Tensor
    target: Tensor
    window: Tensor
    curve: Tensor
    slope: Tensor

    def __len__(self) -> int:
        return self.gap.shape[0]

    def select(self, keep: Tensor) -> TokenFeatures:
        """Return the tokens at the indices (or where the mask) `keep`."""
        return TokenFeatures(**{f.name: getattr(self, f.name)[keep] for f in fields(self)})

    def of_windows(self, windows: list[int]) -> TokenFeatures:
        """Return the tokens of the given windows."""
        return self.select(torch.isin(self.window, torch.tensor(windows)))


def check_output_layer(model: Any, layer: OutputLayer, token_ids: list[int]) -> None:
    """Compare `layer` on the decoder's hidden states with the model's own logits.

    Raises:
        ModelError: they differ, so this architecture does something between decoder and logits that llmrl does not know.
    """
    ids = torch.tensor([token_ids[:64]], device=layer.weight.device)
    with torch.inference_mode():
        own = model(input_ids=ids).logits[0].float()
        ours = layer.logits(_decoder(model)(input_ids=ids).last_hidden_state[0])
    tolerance = 1e-3 if layer.weight.dtype == torch.float32 else 0.1
    error = (own - ours).abs().max().item() / max(1.0, own.abs().max().item())
    if torch.isfinite(own).all() and not error <= tolerance:
        raise ModelError(
            f"{type(model).__name__} computes its logits in a way llmrl does not know (relative error {error:.1e}): "
            "please report the architecture"
        )


def _decoder(model: Any) -> Any:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    return decoder if decoder is not model else model.base_model


def extract_features(
    model: Any,
    windows: list[Window],
    *,
    batch_size: int,
    cache_dir: Path,
    fingerprint: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TokenFeatures:
    """Run the base over all windows, a shard at a time; shards already in `cache_dir` are read instead.

    With several processes each computes its share of the shards; all wait for each other and read all of them.

    Raises:
        ModelError: a logit is NaN; the row is named.
        OutputError: `cache_dir` holds shards of another model, data set or setting.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    _check_manifest(cache_dir, _manifest(windows, fingerprint, max(WINDOWS_PER_SHARD, batch_size)))
    layer = OutputLayer.of(model)
    check_output_layer(model, layer, windows[0].token_ids)
    size = max(WINDOWS_PER_SHARD, batch_size)
    starts = range(0, len(windows), size)
    paths = [cache_dir / f"features-{number:05d}.safetensors" for number in range(len(starts))]
    for number, (path, start) in enumerate(zip(paths, starts, strict=True)):
        part = windows[start : start + size]
        if number % world_size() == rank() and not path.exists():
            _write_shard(path, _features_of(model, layer, part, start, batch_size))
        progress(start + len(part), len(windows))
    barrier()
    shards = [_read_shard(path) for path in paths]
    return TokenFeatures(**{f.name: torch.cat([getattr(s, f.name) for s in shards]) for f in fields(TokenFeatures)})


def _manifest(windows: list[Window], fingerprint: str, shard: int) -> dict[str, Any]:
    digest = hashlib.sha256()
    for window in windows:
        digest.update(json.dumps([window.token_ids, window.scored]).encode())
    return {"base": fingerprint, "windows": len(windows), "data": digest.hexdigest(), "shard": shard, "format": 1}


def _check_manifest(cache_dir: Path, manifest: dict[str, Any]) -> None:
    path = cache_dir / "manifest.json"
    if not path.exists():
        write_json(path, manifest)
    elif json.loads(path.read_text(encoding="utf-8")) != manifest:
        raise OutputError(
            f"{cache_dir} holds the unfinished run of another model, data set or setting\n"
            "--overwrite discards it; another --output_dir keeps it"
        )


def _write_shard(path: Path, features: TokenFeatures) -> None:
    from safetensors.torch import save_file

    temporary = path.with_suffix(".tmp")
    try:
        save_file({f.name: getattr(features, f.name).contiguous() for f in fields(features)}, str(temporary))
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read_shard(path: Path) -> TokenFeatures:
    from safetensors.torch import load_file

    return TokenFeatures(**load_file(str(path)))


def _features_of(model: Any, layer: OutputLayer, windows: list[Window], first: int, batch_size: int) -> TokenFeatures:
    parts: dict[int, TokenFeatures] = {}
    for indices, hidden in _hidden_states(model, windows, batch_size):
        for row, index in enumerate(indices):
            window = windows[index]
            position = torch.tensor([i for i, counts in enumerate(window.scored) if counts])
            target = torch.tensor(window.token_ids)[position]
            states = hidden[row, (position - 1).to(hidden.device)]
            parts[index] = _token_features(layer, states, target, first + index, window)
    ordered = [parts[i] for i in range(len(windows))]
    return TokenFeatures(**{f.name: torch.cat([getattr(p, f.name) for p in ordered]) for f in fields(TokenFeatures)})


def _hidden_states(model: Any, windows: list[Window], batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
    decoder, device = _decoder(model), model.get_input_embeddings().weight.device
    order = sorted(range(len(windows)), key=lambda i: len(windows[i].token_ids))  # little padding
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        width = max(len(windows[i].token_ids) for i in indices)
        ids = torch.zeros(len(indices), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(indices):
            length = len(windows[index].token_ids)
            ids[row, :length] = torch.tensor(windows[index].token_ids)
            mask[row, :length] = 1
        with torch.inference_mode():
            output = decoder(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        yield indices, output.last_hidden_state


def _token_features(layer: OutputLayer, hidden: Tensor, target: Tensor, index: int, window: Window) -> TokenFeatures:
    knots = curve_knots()
    gaps, corrects, curves, slopes = [], [], [], []
    with torch.inference_mode():
        for start in range(0, len(hidden), layer.chunk()):
            z = layer.logits(hidden[start : start + layer.chunk()])
            y = target[start : start + layer.chunk()].to(z.device)
            top, argmax = z.max(-1)
            if not torch.isfinite(top).all():
                raise ModelError(
                    f"the model's logits are NaN or infinite on {window.where}: its weights are damaged, "
                    "or it overflows in this dtype"
                )
            curve, slope = lse_curve(z, knots)
            gaps.append((top - z.gather(1, y[:, None])[:, 0]).cpu())
            corrects.append((argmax == y).cpu())
            curves.append(curve.cpu())
            slopes.append(slope.cpu())
    return TokenFeatures(
        hidden=hidden.cpu().clone(),
        gap=torch.cat(gaps),
        correct=torch.cat(corrects),
        target=target,
        window=torch.full_like(target, index),
        curve=torch.cat(curves),
        slope=torch.cat(slopes),
    )


def exact_lse(layer: OutputLayer, features: TokenFeatures, log_scales: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return L(s) of every token from its logits, not from the curve, for several methods in one sweep.

    Args:
        layer: the base's output layer.
        features: N tokens.
        log_scales: name -> `[N]` log s.

    Returns:
        name -> `[N]` float32 L(s) = log sum_i exp(s (z_i - max z)).
    """
    results = {name: torch.empty(len(features)) for name in log_scales}
    with torch.inference_mode():
        for start in range(0, len(features), layer.chunk()):
            part = slice(start, start + layer.chunk())
            z = layer.logits(features.hidden[part])
            z = z - z.amax(-1, keepdim=True)
            for name, log_scale in log_scales.items():
                results[name][part] = (z * log_scale[part].exp().to(z.device)[:, None]).logsumexp(-1).cpu()
    return results
