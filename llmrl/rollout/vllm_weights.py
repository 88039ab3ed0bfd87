"""How a running vLLM takes new weights: a weight transfer engine that reads a folder, in each of vLLM's workers.

llmrl's vLLM plugin registers it under the name `llmrl_file` in every process of vLLM; a server uses it when started
with `--weight-transfer-config '{"backend": "llmrl_file"}'`. Everything that can be refused is refused before the first
parameter is touched. A direct `model.load_weights` would fail on the CPU build, whose layers replace their parameters
after loading, so the reload goes layer by layer as vLLM's own backends do it.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)

from llmrl.errors import ModelError, SyncError
from llmrl.fingerprints import weight_files
from llmrl.heads import PREFIX
from llmrl.rollout.weight_files import WEIGHTS_TOUCHED, check_names, read_weights, shown
from llmrl.rollout.weights import disk_weights

# tables that are computed from the configuration
_COMPUTED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


@dataclass
class FileInit(WeightTransferInitInfo):
    """Nothing has to be agreed on before the first update."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    """`folder` is what `write_weights` wrote; with `stage` it is only checked."""

    folder: str
    stage: bool = False


class FileWeightTransferEngine(WeightTransferEngine[FileInit, FileUpdate]):
    """Loads a folder of weights into the worker's model."""

    init_info_cls, update_info_cls = FileInit, FileUpdate
    supports_draft_weight_update = False
    _unused: set[str] | None = None

    def init_transfer_engine(self, init_info: FileInit) -> None:
        """Nothing to connect to."""

    def shutdown(self) -> None:
        """Nothing to release."""

    def start_weight_update(self) -> None:
        """Nothing is touched before the new weights have been checked."""
        self._touched = False

    def receive_weights(self, update_info: FileUpdate) -> None:
        """Check the folder, then load it.

        Raises:
            SyncError: a tensor is missing, unknown or changed, or the model took less than all of it.
        """
        tensors = read_weights(Path(update_info.folder))
        expected = checkpoint_shapes(self.model_config)
        found = {name for name in tensors if not name.startswith(PREFIX)} - self._tied()
        # none of the names on disk (a trainer's own prefix): left to the count of loaded numbers below
        if expected is not None and found & expected.keys():
            # found out while loading, any of this would leave a mixture
            wanted = expected.keys() - self._tied()
            if wanted - found:
                wanted -= self._left_alone(wanted)
            check_names(found, wanted, "the weight update")
            wrong = [name for name in found if list(tensors[name].shape) != expected[name]]
            if wrong:
                got = list(tensors[wrong[0]].shape)
                raise SyncError(f"wrong shape: {shown(wrong)}; got {got}, the model has {expected[wrong[0]]}")
        if update_info.stage:
            return
        if hasattr(self.model, "llmrl_switch"):  # experts and router, in parameters that nothing repacks
            self.model.load_weights(iter(tensors.items()))
            return
        self._touched = True
        initialize_layerwise_reload(self.model)
        try:
            with torch.no_grad():
                loaded = self.model.load_weights(iter(tensors.items()))
        except Exception as error:
            raise SyncError(f"the model did not take the weight update ({error}); {WEIGHTS_TOUCHED}") from error
        missing = self._not_loaded(set(loaded or ()))
        if missing:
            finalize_layerwise_reload(self.model, self.model_config)
            raise SyncError(f"the weight update lacks what fills {shown(missing)}; {WEIGHTS_TOUCHED}")

    def _left_alone(self, names: Set[str]) -> set[str]:
        if self._unused is None:
            own = {name for name, _ in self.model.named_parameters()}
            self._unused = never_trained(names, self.model_config) - own
        return self._unused

    def finish_weight_update(self) -> None:
        """Put the loaded layers in place."""
        if self._touched:
            finalize_layerwise_reload(self.model, self.model_config)
            self._follow_embeddings()
        self._touched = False

    def _follow_embeddings(self) -> None:
        """Let a tied output layer see the new embeddings.

        The reload passes it over, as no tensor bears its name. On a GPU it shares the memory; the CPU build keeps a copy
        of its own, packed for the matrix product, which would go on with the old weights.
        """
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)

    def _tied(self) -> set[str]:
        tied = getattr(self.model_config.hf_config, "tie_word_embeddings", False)
        return {"lm_head.weight"} if tied else set()

    def _not_loaded(self, loaded: set[str]) -> list[str]:
        """Return parameters that no tensor reached, and fused ones that some parts did not reach."""
        missing, tied = [], self._tied()
        for name, module in self.model.named_modules():
            # a server with LoRA wraps its layers; names on disk know nothing of it
            name = name.replace(".base_layer", "")
            own = [f"{name}.{p}" for p, _ in module.named_parameters(recurse=False)]
            part_missing = [p for p in own if not (p in loaded or p in tied or p.startswith(PREFIX))]
            info = get_layerwise_info(module)
            # a vocabulary is padded, so its layer never fills up; a layer that is done has been reset
            partial = bool(own) and info.can_load() and 0 < info.load_numel < (info.load_numel_total or 0)
            if part_missing:
                missing += part_missing
            elif partial and not isinstance(module, VocabParallelEmbedding):
                missing.append(f"{name} ({info.load_numel:,} of {info.load_numel_total:,} numbers arrived)")
        return missing


def never_trained(names: Set[str], model_config: object) -> set[str]:
    """Return the names in a checkpoint that belong to no weight of the model, so that no trainer can send them.

    Old files carry tables that are computed today (`rotary_emb.inv_freq`, the causal mask of GPT-2), newer ones layers for
    speculative decoding (`mtp.*`). What a weight is, is asked of the class in transformers, built without memory.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(getattr(model_config, "hf_config"))  # noqa: B009
        known = set(disk_weights(model))
    except Exception:  # vLLM knows models that transformers does not
        return {name for name in names if name.endswith(_COMPUTED)}
    # none in common: the trainer's names have a prefix of their own, and nothing follows from them
    return {name for name in names if name not in known} if known & names else set()


def checkpoint_shapes(model_config: object) -> dict[str, list[int]] | None:
    """Return the shape of each tensor vLLM was started with, heads left out; None when the model is not a folder."""
    from safetensors import safe_open

    folder = Path(str(getattr(model_config, "model", "")))
    if not folder.is_dir():
        return None
    shapes: dict[str, list[int]] = {}
    try:
        files = weight_files(folder)
    except ModelError:  # a folder that holds only heads: its base lies elsewhere
        return None
    for file in files:
        with safe_open(str(file), framework="pt") as tensors:
            names = [name for name in tensors.keys() if not name.startswith(PREFIX)]  # noqa: SIM118
            shapes |= {name: list(tensors.get_slice(name).get_shape()) for name in names}
    return shapes
