"""Our IPO (mean) and DPO against trl's DPOTrainer: the loss of a batch and its gradient, from the same ids and weights."""

import pytest
import torch

from llmrl.leret.context import SearchState
from llmrl.leret.datasets import preference_rows
from llmrl.leret.losses import SequenceLogps, dpo_loss, implied_margin, ipo_loss, log_ratios, sequence_logps
from llmrl.leret.pairs import Pair
from llmrl.types import Message

PROMPT = "Once upon a time, there was a little girl"
PAIRS = [
    (" named Lily. She loved to play outside.", " who."),
    (" with a red ball", " named Tom. He liked big cars and small cars and went to the park."),
    (".", " and a dog and a cat"),
]


@pytest.fixture(scope="module")
def models(stories_dir):
    """The example model as the reference, and a policy whose weights were moved away from it; in float64."""
    from transformers import AutoModelForCausalLM

    def load():
        return AutoModelForCausalLM.from_pretrained(stories_dir, dtype=torch.float64, attn_implementation="eager")

    policy, reference = load(), load()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return policy, reference


@pytest.fixture(scope="module")
def trl_batch(models, stories_tokenizer, tmp_path_factory):
    """Return `trl_batch(loss_type, beta)`: trl's trainer and the batch that its own collator makes of the pairs."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    def make(loss_type, beta):
        arguments = DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("dpo")),
            loss_type=[loss_type],
            beta=beta,
            per_device_train_batch_size=len(PAIRS),
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            disable_tqdm=True,
        )
        stories_tokenizer.pad_token = stories_tokenizer.pad_token or stories_tokenizer.eos_token
        trainer = DPOTrainer(
            model=models[0],
            ref_model=models[1],
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": PROMPT, "chosen": c, "rejected": r} for c, r in PAIRS]),
            processing_class=stories_tokenizer,
        )
        examples = [trainer.train_dataset[i] for i in range(len(PAIRS))]
        return trainer, trainer.data_collator(examples)

    return make


def ours(models, batch):
    """The log-ratios of the batch, from logits."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    half = len(labels) // 2

    def logps(model):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        total, length = sequence_logps(logits, labels)
        return SequenceLogps(total[:half], length[:half]), SequenceLogps(total[half:], length[half:])

    chosen, rejected = logps(models[0])
    with torch.no_grad():
        ref_chosen, ref_rejected = logps(models[1])
    return log_ratios(chosen, rejected, ref_chosen.total, ref_rejected.total)


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(
    ("loss_type", "beta", "loss"),
    [
        ("ipo", 0.75, lambda ratios, beta: ipo_loss(ratios, beta, "mean")),
        ("ipo", 3.0, lambda ratios, beta: ipo_loss(ratios, beta, "mean")),
        ("sigmoid", 0.1, dpo_loss),
        ("sigmoid", 2.0, dpo_loss),
    ],
)
def test_mean_ipo_and_dpo_equal_trl(models, trl_batch, loss_type, beta, loss):
    trainer, batch = trl_batch(loss_type, beta)
    models[0].eval()
    theirs = trainer.compute_loss(models[0], dict(batch))
    ratios = ours(models, batch)
    assert ratios.difference.abs().min() > 0.05  # the policy is not the reference, so the losses depend on the models
    assert len(set(ratios.chosen_length.tolist())) == 3
    mine = loss(ratios, beta).mean()
    assert mine.item() == pytest.approx(theirs.item(), abs=1e-5)
    their_gradient, my_gradient = gradient(models[0], theirs), gradient(models[0], mine)
    assert (my_gradient - their_gradient).norm() < 1e-5 * their_gradient.norm()


def test_sum_ipo_is_not_what_trl_computes(models, trl_batch):
    trainer, batch = trl_batch("ipo", 0.75)
    ratios = ours(models, batch)
    total = [ratios.difference[i].item() for i in range(len(PAIRS))]
    asked = implied_margin(0.05, "sum", 10).total
    assert ipo_loss(ratios, 0.05, "sum").tolist() == pytest.approx([(h - asked) ** 2 for h in total])
    assert abs(ipo_loss(ratios, 0.75, "sum").mean().item() - trainer.compute_loss(models[0], dict(batch)).item()) > 0.01


def test_preference_rows_are_what_trl_calls_conversational():
    from datasets import Dataset
    from trl import is_conversational

    (row,) = preference_rows([Pair(SearchState("q"), "good", "bad", 1.0, 0.5)], lambda state: [Message("user", "Ask")])
    assert is_conversational(Dataset.from_list([row])[0])
