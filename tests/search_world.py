"""A corpus of dams, builders and their towns, questions of two hops about it, and a tiny model that writes queries.

The files have the format of recipes/leret/data/hotpotqa. Chain i is two passages and one question with both as gold:

    d{i}   Alder Dam    Alder Dam was built by Abel Stone in 1901.
    p{i}   Abel Stone   Abel Stone was born in Aachen and studied engineering.
"""

import gzip
import json

import torch

# of each chain: dam, first and last name of its builder, town
CHAINS = [
    ("Alder", "Abel", "Stone", "Aachen"), ("Birch", "Bruno", "River", "Bonn"), ("Cedar", "Clara", "Field", "Celle"),
    ("Dogwood", "Doris", "Wood", "Dresden"), ("Elder", "Edgar", "Hill", "Emden"), ("Foxglove", "Freda", "Marsh", "Fulda"),
    ("Gorse", "Gerda", "Lake", "Goslar"), ("Hazel", "Hanno", "Brook", "Halle"), ("Iris", "Ilse", "Cliff", "Ingolstadt"),
    ("Juniper", "Jonas", "Glen", "Jena"), ("Kale", "Karla", "Heath", "Kassel"), ("Lilac", "Lotte", "Mead", "Lemgo"),
    ("Maple", "Mark", "Ridge", "Mainz"), ("Nettle", "Nora", "Shore", "Neuss"), ("Oak", "Otto", "Vale", "Oldenburg"),
    ("Poplar", "Paula", "West", "Plauen"),
]  # fmt: skip
PLANTS, FIRST, LAST, TOWNS = map(list, zip(*CHAINS, strict=True))
MODEL_SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 32, "max_position_embeddings": 512,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% if m.role == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def passages():
    """Return the rows of the corpus file."""
    rows = []
    for i, (plant, first, last, town) in enumerate(CHAINS):
        built = f"{plant} Dam was built by {first} {last} in {1901 + i}."
        born = f"{first} {last} was born in {town} and studied engineering."
        rows += [
            {"id": f"d{i}", "title": f"{plant} Dam", "text": built},
            {"id": f"p{i}", "title": f"{first} {last}", "text": born},
        ]
    return rows


def questions(chains):
    """Return the rows of a question file about the chains of these numbers."""
    return [
        {
            "id": f"q{i}", "question": f"Where was the builder of {PLANTS[i]} Dam born?", "answer": TOWNS[i], "level": "easy",
            "type": "comparison" if i % 4 == 3 else "bridge", "gold_titles": [f"{PLANTS[i]} Dam", f"{FIRST[i]} {LAST[i]}"],
            "gold_ids": [f"d{i}", f"p{i}"], "context_ids": [f"d{i}", f"p{i}"], "supporting_facts": None,
        }
        for i in chains
    ]  # fmt: skip


def write_rows(path, rows):
    """Write JSON lines, compressed where the name ends in .gz."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_files(folder):
    """Write passages.jsonl.gz, train.jsonl.gz, dev.jsonl and test.jsonl; return `folder`."""
    write_rows(folder / "passages.jsonl.gz", passages())
    write_rows(folder / "train.jsonl.gz", questions(range(10)))
    write_rows(folder / "dev.jsonl", questions(range(10, 13)))
    write_rows(folder / "test.jsonl", questions(range(13, 16)))
    return folder


def make_tokenizer():
    """Return a byte-level BPE that knows most words of this world, with a chat template of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from llmrl.leret.prompts import DEFAULT_INSTRUCTION

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = [row["text"] for row in passages()] + [row["question"] for row in questions(range(16))]
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"],
    )  # fmt: skip
    bpe.train_from_iterator([*texts, *[DEFAULT_INSTRUCTION, "Question: [1] [2] | none yet"] * 4], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>", chat_template=TEMPLATE,
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def write_model(folder, *, steps=40, seed=0):
    """Write a tiny Qwen2 that answers with a few words of this world and an end token; it has not learned which."""
    import transformers

    from llmrl.leret.ask import prompt_ids, written_ids
    from llmrl.leret.corpus import Passage
    from llmrl.leret.prompts import PromptFormat

    tokenizer, form = make_tokenizer(), PromptFormat()
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False, **MODEL_SIZES,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)
    rows = []
    for i, question in enumerate(questions(range(16))):
        for shown in ([], passages()[2 * i : 2 * i + 2]):
            found = [Passage(**row) for row in shown]
            messages = form.messages(form.bare, question["question"], found)
            wanted = f"{PLANTS[-i]} {FIRST[i // 2]} {LAST[i // 2]}" if shown else f"{PLANTS[i // 2]} Dam built"
            rows.append((list(prompt_ids(tokenizer, messages)), list(written_ids(tokenizer, messages, wanted))))
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for i, (prompt, answer) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        batch = torch.randperm(len(rows))[:8]
        model(input_ids=ids[batch], labels=labels[batch]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
