"""Pairs of turns out of logs, and their loss by hand."""

import pytest
import torch
from hindsight_models import dialogue, small_llama

from llmrl.errors import DataError
from llmrl.hindsight.encode import encode_dialogue
from llmrl.hindsight.losses import dpo_loss
from llmrl.hindsight.model import DialogueModel
from llmrl.hindsight.preferences import PairCollator, add_reference, pair_examples, pair_losses, turn_pairs
from llmrl.hindsight.small_model import word_tokenizer

LOGS = [
    dialogue("a", "Hello.", "Good day.", "Yes?", "Please.", rewards=(0.0, 2.0)),
    dialogue("b", "Hello.", "Good day.", "Yes?", "Now!", rewards=(0.0, -1.0)),
    dialogue("c", "Hello.", "You.", "No.", "Please.", rewards=(0.0, 0.1)),
    dialogue("d", "Other.", "You.", rewards=(5.0,)),
]
WORDS = word_tokenizer(m.content for one in LOGS for m in one.messages)
ROWS = [encode_dialogue(WORDS, one) for one in LOGS]


def test_turns_after_one_history_are_compared_by_what_followed_on_average():
    pairs = turn_pairs(ROWS, 1.0, "turn")
    shown = {(WORDS.decode(p.better[:-1]), WORDS.decode(p.worse[:-1])): p.gap for p in pairs}
    assert shown == pytest.approx({("Good day.", "You."): 0.5 - 0.1, ("Please.", "Now!"): 3.0})
    late = next(p for p in pairs if p.gap == 3.0)
    assert late.history == ROWS[0].input_ids[: ROWS[0].spans[1].start]
    with pytest.raises(DataError, match="no pair of turns"):
        turn_pairs([ROWS[0], ROWS[3]], 1.0, "turn")


def test_the_loss_of_a_pair_is_its_formula():
    examples = pair_examples(turn_pairs(ROWS, 1.0, "turn"))
    model = DialogueModel(small_llama(len(WORDS)), None)
    add_reference(model, examples, 1, "cpu")

    def logprob(history, said):
        ids = torch.tensor([[*history, *said]])
        with torch.no_grad():
            rows = model.policy(ids).logits[0].log_softmax(-1)
        return sum(rows[len(history) - 1 + t, token].item() for t, token in enumerate(said))

    for example in examples:
        wanted = [logprob(example["history"], example[side]) for side in ("better", "worse")]
        assert example["reference"] == pytest.approx(wanted, abs=1e-4)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(0.02)
    batch = PairCollator()(examples)
    losses, watched = pair_losses(model, model, batch, 0.3)
    for i, example in enumerate(examples):
        now = torch.tensor([logprob(example["history"], example[side]) for side in ("better", "worse")])
        reference = torch.tensor(example["reference"])
        nll = -now[0] / len(example["better"])
        assert losses[i].item() == pytest.approx((dpo_loss(now, reference, 0.3) + nll).item(), abs=1e-4)
    assert watched["pairs"] == 2
