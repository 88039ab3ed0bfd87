"""The output folder of recipes/tiny_lm.py: weights in bfloat16, tokenizer, loss curve, figures and model card."""

from __future__ import annotations

import json
import math
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tiny_lm_data

from llmrl.files import publish_folder, staging_folder, write_json

if TYPE_CHECKING:
    from tiny_lm import Run

# greedy answers to these stand in the card
PROMPTS = (
    ("Say the word river.",),
    ("What is 7 plus 5?",),
    ("Hello!", "Hello! How can I help you?", "List three animals."),
)
STORY = "The river"


def publish(run: Run, output: Path) -> None:
    """Measure the finished model, rounded to bfloat16 as it is saved, and write `output` in one go."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = run.config
    with staging_folder(output) as staging:
        _save_model(run, staging)
        with torch.no_grad():
            for parameter in run.parameters.values():
                parameter.copy_(parameter.to(torch.bfloat16))
        # loaded as anyone would load it
        tokenizer = AutoTokenizer.from_pretrained(staging)
        model = AutoModelForCausalLM.from_pretrained(staging, dtype=torch.float32)
        figures = {**_figures(run), "made_up_instructions": _instructions(run, model, tokenizer)}
        samples = _samples(model, tokenizer)
        curve = [{k: _rounded(v) for k, v in row.items()} for row in run.history]
        arguments = {k: v for k, v in vars(config).items() if k not in _PLACES}
        record = {
            "arguments": arguments,
            "schedules": run.schedules,
            "machine": _machine(),
            "figures": figures,
            "data": {
                "sha256": run.data.facts["files"],
                "documents_tokens_bytes": run.data.facts["documents_tokens_bytes"],
            },
            "samples": samples,
            "curve": curve,
        }
        write_json(staging / "training.json", record)
        _plot(curve, run, staging / "loss_curve.png")
        _card(run, figures, samples, staging)
        publish_folder(staging, output)
    if not config.quiet:
        print(f"held out: {figures['validation_loss']:.3f} nats a token, {figures['bits_per_byte']:.3f} bits a byte")
        print(f"saved: {config.output_dir}")


# where things lay and how the run was started says nothing about the model
_PLACES = ("data_dir", "output_dir", "work_dir", "overwrite", "resume_from_checkpoint", "quiet")


def _save_model(run: Run, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = run.tokenizer
    run.model.save_pretrained(folder / "float32")
    # read back under the usual attention, so that the config names nothing of ours
    model = AutoModelForCausalLM.from_pretrained(folder / "float32", dtype=torch.bfloat16)
    shutil.rmtree(folder / "float32")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for key in ("backend", "is_local", "local_files_only"):  # how it was loaded, not what it is
        settings.pop(key, None)
    write_json(path, {**settings, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False})


def _figures(run: Run) -> dict[str, Any]:
    counts = run.data.facts["documents_tokens_bytes"]
    held = run.validate()
    size = sum(count.get("held", [0, 0, 0])[2] for count in counts.values())
    logged = [row["loss"] for row in run.history if "loss" in row][-20:]
    by_source = {}
    for source, count in counts.items():
        if "held" in count:
            result = run.validate(source)
            bits = result["sum"] / math.log(2) / max(count["held"][2], 1)
            by_source[source] = {
                "loss": _rounded(result["loss"]),
                "bits_per_byte": _rounded(bits),
                "tokens": result["tokens"],
            }
    config = run.config
    return {
        "parameters": sum(p.numel() for p in run.parameters.values()),
        "steps": run.step,
        "tokens_seen": run.step * config.batch_tokens,
        "seconds": round(run.seconds),
        "train_loss": _rounded(sum(logged) / max(1, len(logged))),
        "validation_loss": _rounded(held["loss"]),
        "validation_tokens": held["tokens"],
        "bits_per_byte": _rounded(held["sum"] / math.log(2) / max(size, 1)),
        "held_out_by_source": by_source,
    }


def _instructions(run: Run, model: Any, tokenizer: Any, most: int = 400) -> dict[str, Any]:
    """Return how many made-up questions of another seed are answered exactly, greedily and at temperature 1.

    Those that stand in no chat of the training side are counted by themselves too, as "new".
    """
    import torch

    config = run.config
    chats = tiny_lm_data.synthetic_chats(config.seed, config.synthetic_rows)
    asked = {m["content"] for chat in chats if not tiny_lm_data.held_out(chat.keys) for m in chat.content}
    fresh = [d.content for d in tiny_lm_data.synthetic_chats(config.seed + 1, min(2 * most, config.synthetic_rows))]
    pairs = [(c[:-1], c[-1]["content"]) for c in fresh if sum(m["role"] == "assistant" for m in c) == 1][:most]
    new = [turns[-1]["content"] not in asked for turns, _ in pairs]
    tokenizer.padding_side = "left"
    prompts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p, _ in pairs]
    result: dict[str, Any] = {"questions": len(pairs), "new_questions": sum(new)}
    torch.manual_seed(config.seed)
    for name, settings in (("greedy", {"do_sample": False}), ("temperature_1", {"do_sample": True, "top_k": 0})):
        right: list[bool] = []
        for first in range(0, len(pairs), 50):
            batch = tokenizer(prompts[first : first + 50], padding=True, add_special_tokens=False, return_tensors="pt")
            stop = tokenizer.convert_tokens_to_ids("<|end|>")
            with torch.inference_mode():
                out = model.generate(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    max_new_tokens=48,
                    eos_token_id=stop,
                    pad_token_id=tokenizer.pad_token_id,
                    **settings,
                )
            texts = tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :])
            answers = [f"{answer}<|end|>" for _, answer in pairs[first : first + 50]]
            right += [text.startswith(answer) for text, answer in zip(texts, answers, strict=True)]
        result[name] = _rounded(sum(right) / max(1, len(pairs)))
        result[f"{name}_new"] = _rounded(sum(r for r, n in zip(right, new, strict=True) if n) / max(1, sum(new)))
    return result


def _samples(model: Any, tokenizer: Any) -> list[dict[str, str]]:
    """Return greedy continuations."""
    import torch

    prompts = []
    for turns in PROMPTS:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
        prompts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    prompts.append(f"{tokenizer.bos_token}{STORY}")
    samples = []
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)
        samples.append({"prompt": prompt, "completion": tokenizer.decode(out[0, ids.shape[1] :])})
    return samples


def _machine() -> dict[str, Any]:
    import torch

    from llmrl.training.run import environment

    found = environment()
    names = []
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    return {"python": found["python"], "packages": found["packages"], "processor": processor,
            "cpu_count": found["cpu_count"], "threads": torch.get_num_threads()}  # fmt: skip


def _rounded(value: float) -> float:
    return round(value, 6) if isinstance(value, float) else value


def _plot(curve: list[dict[str, Any]], run: Run, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=110)
    train = [(row["step"], row["loss"]) for row in curve if "loss" in row]
    held = [(row["step"], row["validation_loss"]) for row in curve if "validation_loss" in row]
    rates = [(row["step"], row["learning_rate"]) for row in curve if "learning_rate" in row]
    for rows, label, style in ((train, "training", {"color": "tab:blue", "linewidth": 0.9}),
                               (held, "held out", {"color": "tab:orange", "marker": "o", "markersize": 3})):  # fmt: skip
        if rows:
            axes.plot(*zip(*rows, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=f"{run.config.batch_tokens:,} tokens a step")
    values = sorted(loss for _, loss in train)
    if values:
        axes.set_ylim(values[0] - 0.2, values[int(len(values) * 0.97)] + 0.3)  # the first steps would flatten the rest
    axes.grid(alpha=0.3)
    notes = {_mix_from(run.schedules, run.step): "more made-up chats"}
    notes[run.last_steps(run.config.long_share)] = f"windows of {run.config.max_length:,}"
    for step, note in notes.items():
        axes.axvline(step, color="gray", linestyle="--", linewidth=0.9)
        axes.text(step, axes.get_ylim()[1], f"{note} ", va="top", ha="right", fontsize=8, rotation=90)
    right = axes.twinx()
    if rates:
        right.plot(*zip(*rates, strict=True), color="tab:green", linewidth=0.8, alpha=0.6, label="learning rate")
    right.set(ylabel="learning rate", ylim=(0, run.config.learning_rate * 1.6))
    handles = [a.get_legend_handles_labels() for a in (axes, right)]
    axes.legend(
        handles[0][0] + handles[1][0], handles[0][1] + handles[1][1], loc="upper left", bbox_to_anchor=(0.12, 1)
    )
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


def _card(run: Run, figures: dict[str, Any], samples: list[dict[str, str]], folder: Path) -> None:
    from llmrl.training import write_model_card

    counts = run.data.facts["documents_tokens_bytes"]
    sets = {s.name: (s.origin, s.license) for s in tiny_lm_data.SETS}
    sets["synthetic"] = (
        "made by the recipe from templates: say, repeat, count, spell, sums, lists, a calculator",
        "Apache 2.0",
    )
    data_rows = []
    for source, count in counts.items():
        held = figures["held_out_by_source"].get(source)
        loss = f"{held['loss']:.2f} | {held['bits_per_byte']:.2f}" if held else "- | -"
        origin, licence = sets[source]
        train = count.get("train", [0, 0, 0])
        data_rows.append(f"| {source} | {origin} | {licence} | {train[0]:,} | {train[1]:,} | {loss} |")
    shown = "\n\n".join(f"```\n{s['prompt']}\n-> {s['completion']}\n```" for s in samples)
    versions = {**_machine(), **_machine()["packages"]}
    config, made = run.config, figures["made_up_instructions"]
    values = {
        **vars(config), **figures, **versions,
        "millions": f"{figures['parameters'] / 1e6:.1f}",
        "minutes": round(figures["seconds"] / 60),
        "pace": round(figures["tokens_seen"] / max(1, figures["seconds"])),
        "long_steps": config.max_steps - run.last_steps(config.long_share),
        "mix_from": _mix_from(run.schedules, run.step),
        "changes": _changes(run.schedules),
        **{key: f"{made[key]:.0%}" for key in ("greedy", "temperature_1", "greedy_new", "temperature_1_new")},
        **{key: made[key] for key in ("questions", "new_questions")},
        "data_rows": "\n".join(data_rows),
        "samples": shown,
    }  # fmt: skip
    write_model_card(
        folder,
        title=f"tiny_lm: a chat model of {values['millions']} million parameters for tests",
        base_model=None,
        summary=_SUMMARY.format(**values),
        body=_BODY.format(**values),
        tags=["llama", "text-generation", "test-model"],
        license="cc-by-sa-4.0",
    )


def _mix_from(schedules: list[dict[str, Any]], end: int) -> int:
    """Return the first step with more made-up chats, under the schedules that were in force one after the other."""
    ends = [later["from_step"] for later in schedules[1:]] + [end]
    for schedule, stop in zip(schedules, ends, strict=True):
        first = schedule["max_steps"] - round(schedule["max_steps"] * schedule["final_share"])
        if max(first, schedule["from_step"]) < stop:
            return int(max(first, schedule["from_step"]))
    return end


def _changes(schedules: list[dict[str, Any]]) -> str:
    if len(schedules) == 1:
        return "as planned"
    steps = ", ".join(f"{schedule['from_step']:,}" for schedule in schedules[1:])
    return f"planned anew for the time that was left at steps {steps}; the curve has the learning rate that was"


_SUMMARY = """\
A Llama of {millions} million parameters with a byte-level BPE tokenizer of its own, trained from nothing on a CPU by
`recipes/tiny_lm.py`. It follows its chat format and ends its turns, writes English-looking sentences, and answers the simple
made-up instructions it was trained on some of the time: enough for tests of fine-tuning, reinforcement learning, dialogue and
serving that need a model whose numbers mean something."""

_BODY = """\
It knows no facts, cannot reason, and repeats what its data holds, errors and all. It is not for use by people, nor for
benchmark scores. Nothing was done to make it safe.

## Format

`<|bos|>` begins a document. A turn is `<|role|>text<|end|>` with the roles system, user, assistant and tool; the answer
follows `<|assistant|>`. Text of a longer conversation begins with that of a shorter one. `<|eos|>` ends a document in
training and is not in the template; generation stops at `<|end|>` or `<|eos|>`. `<|pad|>` is a token of its own. The
tokenizer adds no token by itself and gives back any text unchanged. A tool call is text: `<tool_call>{{"name": ...,
"arguments": ...}}</tool_call>`. The template marks what the assistant says, for losses on it alone.

## Data

Tokens and documents of the training side; loss (nats a token) and bits a byte of the held-out side. About one document
in a hundred is held out by a hash of its id, a passage by its title, and no passage or dialogue that is held out is
quoted in training. A made-up chat is held out by its questions together; each may stand in another chat.

| set | content | licence | documents | tokens | loss | bits a byte |
| --- | --- | --- | --- | --- | --- | --- |
{data_rows}

Some paragraphs stand there a second time as an answer ("Tell me about ...") or as the result of a search tool; a
question comes with the paragraphs that answer it. Each dialogue stands there twice, once with each speaker as the
assistant (games of guess_my_city once), and the system turn says who the assistant is. The loss is on all tokens, so
both sides are learnt. GSM8K's calculator notes are removed. Not used: the test split of GSM8K and CaSiNo, and the dev
questions of HotpotQA, 2WikiMultihopQA and MuSiQue; their passages are in the pools.

Parts of the data are under CC BY-SA (Wikipedia text in hotpotqa, twowiki, musique, wiki_demo; HotpotQA's questions), so
these weights are offered under CC BY-SA 4.0, with thanks to the authors above and the contributors of Wikipedia.

## Training

| | |
| --- | --- |
| shape | {num_layers} layers, width {hidden_size}, MLP {intermediate_size}, tied embeddings |
| attention | {num_heads} heads of {head_dim}, {num_kv_heads} of keys and values |
| vocabulary, context | {vocab_size:,} tokens, {max_length:,} positions |
| steps | {steps:,} of {batch_tokens:,} tokens = {tokens_seen:,} tokens |
| windows | of {pack_length} tokens, in the last {long_steps} steps of {max_length:,} |
| mix | each document once an epoch; from step {mix_from:,} made-up chats {final_repeats} times |
| optimizer | AdamW (0.9, 0.95), weight decay {weight_decay}, gradient norm at most 1 |
| learning rate | {learning_rate}: {warmup_steps} steps up, constant, linearly to 0 over the last {decay_share:.0%} |
| schedule | {changes} |
| arithmetic | matrix products in bfloat16, weights and optimizer in float32; seed {seed} |
| machine | {processor}, {threads} threads, shared with other work; {minutes} minutes, {pace:,} tokens a second |
| versions | Python {python}, torch {torch}, transformers {transformers}, tokenizers {tokenizers} |

## Figures

Of these weights, in bfloat16; [training.json](training.json) has all of them, the loss curve and the hashes of the
data.

| | |
| --- | --- |
| training loss, last 20 logs | {train_loss:.3f} nats a token, on the mix of the last steps |
| held-out loss | {validation_loss:.3f} nats a token, {validation_tokens:,} tokens, windows of {pack_length} |
| held-out bits a byte | {bits_per_byte:.3f} (all tokens' bits, by the bytes of the text without special tokens) |
| {questions} made-up questions of another seed, answered exactly | {greedy} greedily, {temperature_1} at temperature 1 |
| the {new_questions} of them that training had in no chat | {greedy_new} greedily, {temperature_1_new} at temperature 1 |

![Loss by step](loss_curve.png)

## Samples

Greedy, at most 60 new tokens, as they came.

{samples}
"""
