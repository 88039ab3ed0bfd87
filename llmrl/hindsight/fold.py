"""`llmrl hindsight fold`: a steered policy as a plain checkpoint, for programs that know nothing of values.

The mean of two linear Q heads is one matrix, so beta times it can be added to the output embedding for good. Two things get
lost, and both are measured on held-out dialogues before anything is written: the min of both heads, which keeps to what both
believe, and the support filter. What the folded policy gives to tokens that the filter would leave out may be 1% above what the
behaviour policy gives them, which has its tails too.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmrl.base_model import BaseModel, context_length, load_base, load_tokenizer
from llmrl.config import to_flat
from llmrl.errors import ModelError
from llmrl.files import check_output_dir, publish_folder, staging_folder, write_json
from llmrl.hindsight.batches import DialogueCollator, examples_of
from llmrl.hindsight.datasets import read_files
from llmrl.hindsight.encode import Encoded, encode_dialogues
from llmrl.hindsight.model import DialogueModel
from llmrl.hindsight.options import FoldConfig
from llmrl.hindsight.policy import load_policy, value_config
from llmrl.hindsight.policy_folder import ASIDE, HEAD_NAME, READS, STALE, VALUES, read_reads
from llmrl.training.run import write_model_card, write_run_files
from llmrl.value_heads import ValueHead, fold_values, steer

MOST_OFF_SUPPORT = 0.01
_BATCH = 8
_NO_LIMIT = 1 << 20  # but the model's own


@dataclass(frozen=True)
class Loss:
    """What the fold loses, means over the agent's tokens of held-out dialogues.

    Attributes:
        off_support: probability of tokens that the support filter leaves out.
        of_behaviour: the same of the behaviour policy, which has its tails too.
        gap: total variation between the folded policy and the steered one, both without the filter.
        tokens: over how many.
    """

    off_support: float
    of_behaviour: float
    gap: float
    tokens: int


def fold(config: FoldConfig) -> Loss:
    """Write the folded policy and return what it loses.

    Raises:
        ModelError: a policy without values, with a trunk of their own or an mlp; too much off the support, without `force`.
        OutputError: the folder holds something.
    """
    folder = check_output_dir(config.output_dir, overwrite=config.overwrite)
    described = value_config(config.policy)
    if described is None or (Path(config.policy).expanduser() / VALUES).is_dir():
        what = "has no values" if described is None else "has values on a trunk of its own"
        raise ModelError(f"{config.policy} {what}: only values on the policy's own trunk can be folded into it")
    spec = described.heads[HEAD_NAME]
    if spec.architecture == "mlp":
        raise ModelError("an mlp is no matrix: train with --head linear or low_rank to fold")
    beta = spec.beta if config.beta is None else config.beta
    head = load_policy(config.policy, dtype="float32", device="cpu").llmrl_heads[HEAD_NAME]
    base = load_base(config.policy, device="cpu", without_heads=True)
    read = read_files(config.data, config.data_format)
    rows, read = encode_dialogues(
        base.tokenizer, read, context_length(base.model, base.tokenizer, _NO_LIMIT), read_reads(config.policy).window
    )
    lost = measure(base.model, head, beta, spec.support, rows)
    if not config.quiet:
        print(read.summary(), flush=True)
        print(
            f"beta {beta:g}, {lost.tokens} tokens of held-out dialogues: {lost.off_support:.2%} of the probability lies off "
            f"the support (of the behaviour policy's {lost.of_behaviour:.2%}); the mean of both heads differs from their min "
            f"by {lost.gap:.2%}",
            flush=True,
        )
    gained = lost.off_support - lost.of_behaviour
    if gained > MOST_OFF_SUPPORT and not config.force:
        raise ModelError(
            f"the folded policy would put {gained:.1%} of the probability off the support, beside what the behaviour policy "
            f"has there, more than {MOST_OFF_SUPPORT:.0%}\ntake a smaller --beta, serve the policy as it is (llmrl serve), or "
            "--force"
        )
    with staging_folder(folder) as staging:
        write_folded(base, head, beta, staging)
        shutil.copyfile(Path(config.policy).expanduser() / READS, staging / READS)
        read.write_aside(staging / ASIDE)
        write_json(staging / "report.json", {"beta": beta, **asdict(lost)})
        write_run_files(staging, to_flat(config))
        _card(staging, config, beta, lost)
        publish_folder(staging, folder, stale=STALE)
    if not config.quiet:
        print(f"a plain checkpoint: vllm serve {folder}\n{folder}", flush=True)
    return lost


def _card(staging: Path, config: FoldConfig, beta: float, lost: Loss) -> None:
    summary = (
        f"A dialogue policy with beta = {beta:g} folded into its output embedding; {lost.off_support:.2%} of what it says lies "
        "off the support of the policy it was made from."
    )
    base, tags = config.policy, ["offline-rl"]
    write_model_card(staging, title="Folded dialogue policy", base_model=base, summary=summary, tags=tags)


@torch.inference_mode()
def measure(model: Any, head: ValueHead, beta: float, support: float, rows: list[Encoded]) -> Loss:
    """Return what a fold loses on dialogues."""
    dtype = next(model.parameters()).dtype
    wrapped = DialogueModel(model.float(), None)
    collate, off, own, gap, count = DialogueCollator(), 0.0, 0.0, 0.0, 0
    for start in range(0, len(rows), _BATCH):
        batch = collate(examples_of(rows[start : start + _BATCH], "turn", 1.0, "turn"))
        states = wrapped(**batch).policy
        logits, q = wrapped.logits(states), head.q(states)
        folded = (logits + beta * q.mean(0)).softmax(-1)
        steered = steer(logits, q.amin(0), beta, 0.0).softmax(-1)
        kept: Tensor = torch.isfinite(steer(logits, None, 0.0, support))
        off += float(folded.masked_fill(kept, 0.0).sum())
        own += float(logits.softmax(-1).masked_fill(kept, 0.0).sum())
        gap += float((folded - steered).abs().sum()) / 2
        count += len(states)
    model.to(dtype)
    return Loss(off / count, own / count, gap / count, count)


def write_folded(base: BaseModel, head: ValueHead, beta: float, folder: Path) -> None:
    """Write a plain checkpoint, open it again and compare its logits.

    Raises:
        ModelError: they differ, or the model caps its logits, which no sum passes through.
    """
    from transformers import AutoModelForCausalLM

    model = base.model
    if getattr(model.config.get_text_config(), "final_logit_softcapping", None):
        raise ModelError("this model caps its logits after the output embedding: values cannot be folded into it")
    old = model.get_output_embeddings().weight
    weight = fold_values(old, head, beta)
    model.set_output_embeddings(nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype))
    model.get_output_embeddings().weight = nn.Parameter(weight, requires_grad=False)
    model.config.tie_word_embeddings = False  # the input embedding stays what it was
    plain = base.architecture.removeprefix("Llmrl")
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("llmrl_heads.")}
    made = AutoModelForCausalLM.from_config(_plain_config(model.config, plain), dtype=weight.dtype)
    made.load_state_dict(state)
    made.save_pretrained(folder)
    load_tokenizer(base.folder).save_pretrained(folder)
    probe = torch.arange(1, min(9, weight.shape[0]))[None]
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=weight.dtype)
    with torch.inference_mode():
        difference = float((again(probe).logits - model(probe).logits).abs().max())
    if not difference < 1e-3:
        raise ModelError(
            f"the folded checkpoint does not give the logits it was made with: they differ by {difference:.2g}"
        )


def _plain_config(config: Any, architecture: str) -> Any:
    """Return the base's own configuration, without what llmrl wrote into it."""
    import transformers

    fields = {
        key: value for key, value in config.to_dict().items() if key not in ("llmrl", "architectures", "model_type")
    }
    return getattr(transformers, architecture).config_class(**fields)
