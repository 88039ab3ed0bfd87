"""One head of ours against trl's RewardTrainer: the loss of a batch and its gradients, from the same ids and weights."""

import pytest
import torch

from llmrl.hyre.backbone import EnsembleRewardModel, EnsembleTrainer, Objective
from llmrl.hyre.fit import HeadShape, TrainedHeads

PAIRS = [
    {"chosen_ids": [5, 9, 12, 30, 7], "rejected_ids": [5, 9]},
    {"chosen_ids": [8, 8, 8, 3], "rejected_ids": [11, 60, 61, 62, 63, 64]},
    {"chosen_ids": [40, 41, 42], "rejected_ids": [5, 60, 61]},
]


@pytest.fixture
def score_weight():
    return 0.5 * torch.randn(1, 32, generator=torch.Generator().manual_seed(3))


def theirs(folder, tokenizer, score_weight, center, tmp_path):
    """Return trl's trainer with a classification model of these weights."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    with torch.no_grad():
        model.score.weight.copy_(score_weight)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    arguments = RewardConfig(
        output_dir=str(tmp_path), center_rewards_coefficient=center, report_to="none", bf16=False, use_cpu=True,
        gradient_checkpointing=False, disable_tqdm=True, per_device_train_batch_size=3,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3)
    trainer = RewardTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    return trainer


def ours(folder, score_weight, center, tmp_path):
    from transformers import AutoModelForCausalLM, TrainingArguments

    heads = TrainedHeads(1, 32, HeadShape(), torch.zeros(32), torch.ones(32), 0)
    with torch.no_grad():
        heads.weight.copy_(score_weight)
    model = EnsembleRewardModel(AutoModelForCausalLM.from_pretrained(folder), heads)
    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=3, report_to="none", use_cpu=True)
    objective = Objective(torch.ones(1), l2=0.0, center=center or 0.0)
    return EnsembleTrainer(model=model, args=arguments, objective=objective, heads_lr=1e-3)


@pytest.mark.parametrize("center", [None, 0.01, 0.5])
@pytest.mark.parametrize("margins", [None, [0.0, 0.7, -0.4]])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_one_head_equals_trl_reward_trainer(
    tiny_model, stories_tokenizer, score_weight, tmp_path, name, margins, center
):
    folder = tiny_model(name)
    trainer = theirs(folder, stories_tokenizer, score_weight, center, tmp_path)
    examples = PAIRS if margins is None else [{**pair, "margin": m} for pair, m in zip(PAIRS, margins, strict=True)]
    batch = trainer.data_collator(examples)
    trainer.model.eval()
    expected = trainer.compute_loss(trainer.model, dict(batch))
    mine = ours(folder, score_weight, center, tmp_path)
    inputs = {**batch, "weights": torch.ones(3, 1), "margin": torch.tensor(margins or [0.0] * 3)}
    found = mine.compute_loss(mine.model, inputs)
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    assert abs(found.item() - 0.6931) > 0.02
    expected.backward()
    found.backward()
    pairs = [(mine.model.heads.weight, trainer.model.score.weight)]
    base = dict(mine.model.backbone.model.named_parameters())
    pairs += [(base[key], parameter) for key, parameter in trainer.model.model.named_parameters()]
    assert len(pairs) == 1 + len(base)
    for own, other in pairs:
        assert (own.grad - other.grad).norm() < 1e-5 * other.grad.norm() + 1e-8
    assert mine.model.backbone.lm_head.weight.grad is None
