"""Small models and dialogues for the tests of offline RL."""

from pathlib import Path

import torch

from llmrl.hindsight.batches import DialogueCollator, examples_of
from llmrl.hindsight.dialogues import Dialogue
from llmrl.hindsight.encode import encode_dialogue
from llmrl.types import Message

TINY = Path(__file__).parents[2] / "examples" / "tiny_lm"


def dialogue(name, *turns, rewards=(), done=True):
    """Return a dialogue of texts in turn, the user first; rewards are of the agent's turns."""
    roles = ["user", "assistant"] * len(turns)
    messages = tuple(Message(role, text) for role, text in zip(roles, turns, strict=False))
    given = list(rewards) or [0.0] * (len(turns) // 2)
    spread = [given[i // 2] if i % 2 else 0.0 for i in range(len(turns))]
    return Dialogue(name, messages, tuple(spread), done=done, truncated=not done)


DIALOGUES = [
    dialogue("a", "Hello.", "Hi, how are you?", "Good.", "I am glad.", rewards=(0.5, 1.0)),
    dialogue("b", "Where is the dog?", "It is in the park.", rewards=(-1.0,)),
    dialogue("c", "One", "Two", "Three", "Four", "Five", rewards=(0.0, 2.0), done=False),
]


def batch_of(tokenizer, dialogues=DIALOGUES, *, packing=False, kind="turn", discount=1.0, unit="turn"):
    rows = [encode_dialogue(tokenizer, one) for one in dialogues]
    return DialogueCollator(packing=packing)(examples_of(rows, kind, discount, unit)), rows


def small_llama(vocabulary=40, width=16, seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()
