"""A trained reward ensemble: a frozen base, K folded heads, and the facts that belong to them; saved as JSON and safetensors.

A folder holds `reward_ensemble.json`, `llmrl_heads.safetensors` (the shared head format of `llmrl.heads`) and, of a backbone
that was trained itself, the checkpoint or adapter in `base/`. The fingerprint is of all that decides a score, so a user's file
made with another ensemble is noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llmrl.errors import HeadMismatchError, ModelError
from llmrl.files import write_json
from llmrl.heads import HEADS_FILE, HeadSpec, head_tensors, load_head_tensors, save_head_tensors
from llmrl.hyre.features import TEXTS, Features, embed_pairs, open_features
from llmrl.hyre.pairs import Messages, Pair
from llmrl.modeling import read_tensors
from llmrl.reward_heads import RewardHead, build_reward_head

ENSEMBLE_FILE = "reward_ensemble.json"
FORMAT = 1
HEAD_NAME, SINGLE_NAME = "reward", "single"
OWN_BASE = "base"  # stands for the checkpoint in the folder; any other local base is named by its absolute path


@dataclass
class RewardEnsemble:
    """K reward heads on a base.

    Attributes:
        head: scores `[..., H] -> [..., K]` of raw features.
        base_name: absolute folder or hub name of the base; OWN_BASE for the one that lies in the ensemble's folder.
        base_kind: "encoder" or "causal_lm".
        base_identity: fingerprints of its weights, tokenizer and template.
        reads: "answer" or "dialogue", see `llmrl.hyre.features.embed_pairs`.
        max_length: tokens read of a text; None: what the base reads.
        revision: of a hub name.
        names: `[K]`, what each head was trained on.
        signs: `[K]`, -1 for heads that were trained to prefer the other side.
        single: one head trained on all pairs, for comparison.
        facts: figures of the training, for people.
        dtype: in which a causal LM reads, as in training; "auto": as its checkpoint is stored.
    """

    head: RewardHead
    base_name: str
    base_kind: str
    base_identity: list[str]
    reads: str
    max_length: int | None = None
    revision: str | None = None
    names: tuple[str, ...] = ()
    signs: tuple[int, ...] = ()
    single: RewardHead | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    _base: Features | None = None

    @property
    def heads(self) -> int:
        """K."""
        return self.head.spec.outputs

    @property
    def fingerprint(self) -> str:
        """A hash of the base, what of it is read and how, and the heads' tensors."""
        scale = self.facts.get("feature_scale", 1.0)  # of corrections
        facts = [self.base_kind, self.base_identity, self.reads, self.max_length, self.dtype, scale]
        digest = hashlib.sha256(json.dumps(facts).encode())
        for name, tensor in sorted(head_tensors(nn.ModuleDict({HEAD_NAME: self.head})).items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return "sha256:" + digest.hexdigest()[:32]

    @property
    def base(self) -> Features:
        """The base, opened when it is first needed.

        Raises:
            HeadMismatchError: it is not the one the heads were trained on.
        """
        if self._base is None:
            base = open_features(self.base_name, max_length=self.max_length, dtype=self.dtype, revision=self.revision)
            if base.identity != self.base_identity:
                raise HeadMismatchError(
                    f"the heads were trained on another base: weights, tokenizer or template of {self.base_name} differ\n"
                    "use the base they were trained on, or train again"
                )
            self._base = base
        return self._base

    def features(
        self, pairs: Sequence[Pair], *, cache_dir: Path | None = None, quiet: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return features of the chosen and of the rejected, `[N, H]` each."""
        return embed_pairs(self.base, pairs, self.reads, cache_dir=cache_dir, quiet=quiet)

    def margins(self, chosen: Tensor, rejected: Tensor) -> NDArray[np.float64]:
        """Return each head's score of the chosen minus that of the rejected, `[N, K]`, of features."""
        return np.asarray((self.head(chosen) - self.head(rejected)).double().numpy())

    def scores(self, prompts: Sequence[Messages], answers: Sequence[str]) -> NDArray[np.float64]:
        """Return the heads' scores of answers, `[N, K]`."""
        if len(prompts) != len(answers):
            raise ModelError(f"expected a prompt for every answer, got {len(prompts)} and {len(answers)}")
        texts = [self.text(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        with torch.inference_mode():
            return np.asarray(self.head(self.base.embed(texts)).double().numpy())

    def text(self, prompt: Messages, answer: str) -> str:
        """Return what is read of an answer: the one text that training, scoring and a served model see."""
        return self.base.text(prompt if self.reads == "dialogue" else (), answer)

    def save(self, folder: Path) -> None:
        """Write the folder."""
        write_json(
            folder / ENSEMBLE_FILE,
            {
                "format": FORMAT,
                "head": self.head.spec.to_json(),
                "base": {
                    "name": self.base_name,
                    "kind": self.base_kind,
                    "identity": self.base_identity,
                    "revision": self.revision,
                    "dtype": self.dtype,
                },
                "reads": self.reads,
                "max_length": self.max_length,
                "fingerprint": self.fingerprint,
                "heads": list(self.names),
                "signs": list(self.signs),
                "single": None if self.single is None else self.single.spec.to_json(),
                "facts": self.facts,
            },
        )
        save_head_tensors(folder, self._modules())

    def _modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({HEAD_NAME: self.head, **({} if self.single is None else {SINGLE_NAME: self.single})})


def load_ensemble(folder: Path | str) -> RewardEnsemble:
    """Read what `RewardEnsemble.save` wrote.

    Raises:
        ModelError: the folder is not one, of another format, or damaged.
    """
    folder = Path(folder).expanduser()
    path = folder / ENSEMBLE_FILE
    if not path.is_file():
        raise ModelError(f"{folder} is no reward ensemble: it has no {ENSEMBLE_FILE}; make one with: llmrl hyre train")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            raise ModelError(
                f"{path} has format {fields['format']!r}, expected {FORMAT}: install the llmrl that wrote it"
            )
        head = build_reward_head(HeadSpec(**fields["head"]))
        base = fields["base"]
        name = str(folder / OWN_BASE) if base["name"] == OWN_BASE else base["name"]
        made = RewardEnsemble(
            head,
            name,
            base["kind"],
            list(base["identity"]),
            fields["reads"],
            fields["max_length"],
            base["revision"],
            tuple(fields["heads"]),
            tuple(fields["signs"]),
            None if fields["single"] is None else build_reward_head(HeadSpec(**fields["single"])),
            dict(fields["facts"]),
            str(base.get("dtype", "auto")),
        )
        said = fields["fingerprint"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is damaged ({type(error).__name__}: {error}): train again") from error
    if made.reads not in TEXTS:
        raise ModelError(f"{path}: expected 'reads' out of {', '.join(TEXTS)}, got {made.reads!r}")
    if any(len(column) not in (0, made.heads) for column in (made.names, made.signs)):
        raise ModelError(f"{path} is damaged: expected a name and a sign for each of {made.heads} heads; train again")
    load_head_tensors(made._modules(), read_tensors(folder / HEADS_FILE))
    made._modules().requires_grad_(False)
    if made.fingerprint != said:
        raise ModelError(
            f"{folder} is damaged: its heads are not the ones {ENSEMBLE_FILE} was written with; train again"
        )
    return made
