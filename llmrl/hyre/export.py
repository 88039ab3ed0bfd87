"""A trained ensemble as a folder that transformers and vLLM open: one forward pass gives the scores of all K heads.

    llmrl hyre export --model runs/hyre --output_dir runs/hyre_served      # then: llmrl serve runs/hyre_served

"stock": linear heads become the `score` matrix `[K, H]` of transformers' own XForSequenceClassification. That layer has no
bias, in transformers and in vLLM alike, so its K logits are the heads' scores less their biases. Margins of pairs do not need
them; scores do, for they set each head's zero (heads trained on pairs: at the mean of the training texts). They stand in
config.json under `llmrl_score_bias`, and `llmrl.hyre.served.ServedEnsemble` adds them. "plugin": heads with hidden units, or a
base without such a class, become a folder of llmrl's vLLM plugin, which applies the whole head. Either holds the ensemble's own
files, so `load_ensemble` opens it, and the scores of a few texts, by which a client knows a server.

A folder is published after it was opened again and gave the ensemble's scores.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from llmrl.base_model import default_device, load_base, load_tokenizer
from llmrl.errors import HeadMismatchError, ModelError, UsageError
from llmrl.files import check_output_dir, publish_folder, staging_folder, write_json
from llmrl.heads import HeadsConfig
from llmrl.hyre.ensemble import HEAD_NAME, RewardEnsemble, load_ensemble
from llmrl.hyre.features import CausalFeatures, last_states, open_features
from llmrl.hyre.options import ExportConfig
from llmrl.hyre.pairs import PROBES, Messages
from llmrl.hyre.run import refuse_inputs
from llmrl.modeling import save_heads_folder
from llmrl.reward_heads import RewardMLPHead
from llmrl.training import write_model_card

FORMS = ("auto", "stock", "plugin")
BIAS_KEY = "llmrl_score_bias"
EXPORT_FILE = "reward_export.json"
EXPORT_FORMAT = 1
TOLERANCE = 1e-4  # of scores in float32, where the largest is 1 or less; else of the largest
_INDEX = "model.safetensors.index.json"

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, its form ("stock" or "plugin"), and the largest difference of a score when reloaded."""

    folder: Path
    form: str
    difference: float


@dataclass(frozen=True)
class _Reference:
    """The base as files, and what the ensemble says of the probes in float32."""

    base_folder: Path
    heads_config: HeadsConfig
    tokenizer: Any
    texts: list[str]
    scores: Array


def export(config: ExportConfig) -> Exported:
    """Do what `llmrl hyre export` is asked for; see `export_ensemble`."""
    refuse_inputs(Path(config.output_dir).expanduser(), [config.model])
    done = export_ensemble(load_ensemble(config.model), config.output_dir, form=config.form, overwrite=config.overwrite)
    if not config.quiet:
        print(
            f"{done.form} form, opened again: the scores of {len(PROBES)} texts differ by {done.difference:.1e} at most\n"
            f"serve: llmrl serve {done.folder}\n{done.folder}",
            flush=True,
        )
    return done


def export_ensemble(
    ensemble: RewardEnsemble,
    folder: Path | str,
    *,
    form: str = "auto",
    probes: Sequence[tuple[Messages, str]] = PROBES,
    overwrite: bool = False,
) -> Exported:
    """Write an ensemble on a causal LM as one checkpoint with K scores.

    Args:
        ensemble: trained.
        folder: where it goes.
        form: "stock" or "plugin", see above; "auto" takes stock where it can.
        probes: (prompt, answer) that are scored before and after, and stored; of different lengths. Those that are longer than
            the ensemble reads are left out.
        overwrite: replace what is in `folder`.

    Raises:
        ModelError: a sentence encoder; a form that these heads or this base do not have; scores that differ when reloaded.
        HeadMismatchError: the base is not the one the heads were trained on.
        OutputError: the folder holds something.
    """
    if form not in FORMS:
        raise UsageError(f"expected a form out of {', '.join(FORMS)}, got {form!r}")
    if ensemble.base_kind != CausalFeatures.kind:
        raise ModelError(
            f"{ensemble.base_name} is a sentence encoder, which no SequenceClassification class pools as it was trained: score "
            "in process (ensemble.scores)\nor serve its vectors (vllm serve ENCODER --runner pooling) and let "
            "llmrl.hyre.served.EmbeddingRewardClient apply the heads"
        )
    target = check_output_dir(folder, overwrite=overwrite)
    with _quiet(), staging_folder(target) as staging:
        reference = _reference(ensemble, probes)
        chosen = _form(ensemble, reference.heads_config, form)
        gc.collect()  # one model at a time in memory
        replace(ensemble, single=None, _base=None).save(staging)
        (_write_stock if chosen == "stock" else _write_plugin)(ensemble, reference, staging)
        difference = _check(staging, reference, chosen)
        probed = [{"text": t, "scores": s} for t, s in zip(reference.texts, reference.scores.tolist(), strict=True)]
        write_json(staging / EXPORT_FILE, {"format": EXPORT_FORMAT, "form": chosen, "probes": probed})
        _card(staging, target.name, ensemble, chosen)
        publish_folder(staging, target)
    return Exported(target, chosen, difference)


def _reference(ensemble: RewardEnsemble, probes: Sequence[tuple[Messages, str]]) -> _Reference:
    """Open the base in float32, whatever it is stored in, and let the ensemble score the probes."""
    features = open_features(
        ensemble.base_name, max_length=ensemble.max_length, dtype="float32", revision=ensemble.revision
    )
    if not isinstance(features, CausalFeatures) or features.identity != ensemble.base_identity:
        raise HeadMismatchError(
            f"the heads were trained on another base: weights, tokenizer or template of {ensemble.base_name} differ\n"
            "use the base they were trained on, or train again"
        )
    tokenizer = features.base.tokenizer
    texts = [features.text(prompt if ensemble.reads == "dialogue" else (), answer) for prompt, answer in probes]
    texts = [text for text in texts if len(tokenizer(text)["input_ids"]) <= features.max_length] or texts
    with torch.inference_mode():
        scores = np.asarray(ensemble.head(features.embed(texts)).double().numpy())
    described = HeadsConfig(
        heads={HEAD_NAME: ensemble.head.spec},
        base=features.reference,
        base_model_type=features.base.model.config.model_type,
        base_architecture=features.base.architecture,
        merged=True,
        method="hyre",
    )
    return _Reference(features.base.folder, described, tokenizer, texts, scores)


def _form(ensemble: RewardEnsemble, described: HeadsConfig, wanted: str) -> str:
    has_units = isinstance(ensemble.head, RewardMLPHead)
    has_class = _stock_class(described.base_model_type) is not None
    if wanted == "stock" and (has_units or not has_class):
        why = (
            "its heads have hidden units"
            if has_units
            else f"transformers has no {described.base_model_type} that classifies sequences"
        )
        raise ModelError(f"the ensemble has no stock form: {why}; use form='plugin' and serve it with llmrl installed")
    return wanted if wanted != "auto" else "plugin" if has_units or not has_class else "stock"


def _stock_class(model_type: str) -> Any:
    from transformers import CONFIG_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(CONFIG_MAPPING[model_type], None)


def _write_stock(ensemble: RewardEnsemble, reference: _Reference, staging: Path) -> None:
    """Let transformers load the base into its own class, put the heads into `score`, and save."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    tokenizer = load_tokenizer(reference.base_folder)
    config = AutoConfig.from_pretrained(reference.base_folder, trust_remote_code=False)
    pad = padding_id(tokenizer, reference.texts, config.get_text_config().vocab_size)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    config.id2label = {i: f"score_{i}" for i in range(ensemble.heads)}
    config.label2id = {name: i for i, name in config.id2label.items()}
    config.problem_type = "regression"  # raw numbers, no softmax
    config.pad_token_id = pad
    setattr(config, BIAS_KEY, ensemble.head.bias.tolist())
    model = AutoModelForSequenceClassification.from_pretrained(
        reference.base_folder, config=config, dtype="auto", use_safetensors=True, trust_remote_code=False
    )
    width, score = ensemble.head.spec.hidden_size, getattr(model, "score", None)
    if not isinstance(score, nn.Linear) or score.weight.shape != (ensemble.heads, width):
        raise ModelError(f"{type(model).__name__} has no linear layer 'score' [K, {width}]: use form='plugin'")
    model.score = nn.Linear(width, ensemble.heads, bias=False)
    with torch.no_grad():
        model.score.weight.copy_(ensemble.head.weight)  # in float32 beside a base in 16 bits: vLLM keeps it so
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    path = staging / "config.json"
    stem = reference.heads_config.base_architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    # transformers chooses by model_type; vLLM by this name, which it forms from that of the causal LM
    fields = json.loads(path.read_text(encoding="utf-8")) | {"architectures": [f"{stem}ForSequenceClassification"]}
    write_json(path, fields)
    _index_weights(staging)


def padding_id(tokenizer: Any, texts: Sequence[str], vocab_size: int) -> int:
    """Return an id that ends no text: transformers reads the last token that is not padding, whoever put it there.

    Args:
        tokenizer: of the base.
        texts: as the ensemble reads them.
        vocab_size: rows of the base's embedding; the padding needs one.

    Raises:
        ModelError: the tokenizer has no special token that would do.
    """
    ends = {tokenizer(text)["input_ids"][-1] for text in texts}
    names = ("pad_token_id", "bos_token_id", "unk_token_id", "eos_token_id")
    ids = [getattr(tokenizer, name, None) for name in names]
    found = next((i for i in ids if i is not None and i not in ends and i < vocab_size), None)
    if found is None:
        raise ModelError(
            "the tokenizer has no special token that could stand for padding without ending a text: set its pad_token, or use "
            "form='plugin'"
        )
    return int(found)


def _index_weights(folder: Path) -> None:
    """Name the files of the checkpoint, where transformers wrote one: vLLM would read the heads' file as weights, too."""
    from safetensors import safe_open

    path = folder / _INDEX
    if path.is_file():
        return
    single = folder / "model.safetensors"
    with safe_open(str(single), framework="pt") as tensors:
        names = list(tensors.keys())
    size = single.stat().st_size
    write_json(path, {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(names, single.name)})


def _write_plugin(ensemble: RewardEnsemble, reference: _Reference, staging: Path) -> None:
    heads = nn.ModuleDict({HEAD_NAME: ensemble.head})
    save_heads_folder(staging, heads, reference.heads_config, reference.tokenizer, reference.base_folder)


def _check(folder: Path, reference: _Reference, form: str) -> float:
    """Open the folder in float32 and compare every head's scores of the probes.

    Raises:
        ModelError: they differ.
    """
    gc.collect()
    found = (_stock_scores if form == "stock" else _plugin_scores)(folder, reference.texts)
    worst = np.abs(found - reference.scores).max(0)
    limit = TOLERANCE * max(1.0, float(np.abs(reference.scores).max()))
    if not (worst <= limit).all():  # NaN is no agreement
        head = int(np.argmax(np.where(np.isnan(worst), np.inf, worst)))
        raise ModelError(
            f"the exported {form} folder does not give the ensemble's scores: head {head} differs by {worst[head]:.2g}, more "
            f"than {limit:.2g}; nothing was written"
        )
    return float(worst.max())


def _stock_scores(folder: Path, texts: Sequence[str]) -> Array:
    """Return logits plus biases, of all texts in one padded batch."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # sdpa, the default, leaves Gemma 2's soft-cap of the attention logits out
    options = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, **options
    )
    model = model.to(default_device()).eval()
    batch = load_tokenizer(folder)(list(texts), padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**{name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}).logits
    return np.asarray(logits.double().cpu().numpy()) + np.asarray(getattr(config, BIAS_KEY))


def _plugin_scores(folder: Path, texts: Sequence[str]) -> Array:
    """Return the scores of the heads that lie in the folder on the base that lies in it."""
    base = load_base(str(folder), dtype="float32", without_heads=True)
    head = load_ensemble(folder).head
    with torch.inference_mode():
        states = last_states(base.model, [base.tokenizer(text)["input_ids"] for text in texts], default_device())
        return np.asarray(head(states).double().numpy())


@contextmanager
def _quiet() -> Iterator[None]:
    """Let transformers say nothing: that `score` is new and the output layer is gone is what is meant."""
    from transformers.utils import logging as of_transformers

    before, bars = of_transformers.get_verbosity(), of_transformers.is_progress_bar_enabled()
    of_transformers.set_verbosity(logging.ERROR)
    of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        of_transformers.set_verbosity(before)
        if bars:
            of_transformers.enable_progress_bar()


def _card(folder: Path, name: str, ensemble: RewardEnsemble, form: str) -> None:
    summary = f"A reward model with {ensemble.heads} scores an answer, to be weighted by whoever asks."
    bias = (
        f"\nIts logits are the scores less `config.{BIAS_KEY}`; the client below adds it.\n" if form == "stock" else ""
    )
    body = f"""
## Use

    llmrl serve {name} --port 8001
{bias}
```python
from llmrl.hyre.reward import hyre_reward
from llmrl.hyre.served import ServedEnsemble
from llmrl.rollout.rewards import HttpRewardClient

reward = hyre_reward(ServedEnsemble(HttpRewardClient("http://127.0.0.1:8001"), "{name}"))
```
"""
    write_model_card(folder, title="Served reward ensemble", base_model=ensemble.base_name, summary=summary, body=body)
