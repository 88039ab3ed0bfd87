"""Eight LoRA experts, chosen per token: trained on four tasks, run three ways, served by vLLM.

    python examples/experts_per_token.py

1. Experts and router are trained on the small chat model of this repository (recipes/lora_switch/four-tasks.yaml, fewer
   steps; some minutes on two CPU cores). What held-out rows lose is printed beside what the base loses.
2. The result is opened and answers one question unmerged, merged token by token, and in a loop with a static cache: the same
   text three times.
3. A fixed mixture of two experts becomes one plain peft adapter.
4. vLLM is started on the folder and compared with transformers, token by token.

It writes runs/experts-per-token and may be run again.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from llmrl.base_model import generate_greedy, load_base, load_tokenizer
from llmrl.commands import quiet_libraries, run_switch
from llmrl.errors import EXIT_DONE, run_command
from llmrl.lora_switch import export_mixture, load_switch_model, set_switch_mode
from llmrl.lora_switch.decode import DecodeLoop
from llmrl.lora_switch.evaluate import evaluate_model, table
from llmrl.lora_switch.tasks import encode, read_rows
from llmrl.vllm_compat import vllm_build, why_no_vllm

FOLDER, RECIPE = Path("runs/experts-per-token"), "recipes/lora_switch/four-tasks.yaml"
TEST = "recipes/lora_switch/data/test.jsonl.gz"
STEPS, HELD_OUT = 60, 160
QUESTION = "Tom has 3 apples and buys 4 more. How many apples has he now?"
NEW_TOKENS = 24


def train() -> None:
    """Print what held-out rows lose without experts, then train and print what they lose with them."""
    base = load_base("examples/tiny_lm", dtype="float32")
    rows, _ = encode(read_rows([TEST])[:: max(1, 400 // HELD_OUT)], base.tokenizer, 192)
    print("=== 1. the base, then eight experts ===\n", flush=True)
    print(table(evaluate_model(base.model, rows)), flush=True)
    argv = ["--config", RECIPE, "--output_dir", str(FOLDER / "model"), "--max_steps", str(STEPS)]
    argv += ["--overwrite", "--quiet"]
    run_switch(argv, action="train")
    print(table(evaluate_model(load_switch_model(FOLDER / "model"), rows)), flush=True)


def run_three_ways() -> Any:
    """Answer a question in every run mode; return the model."""
    print("\n=== 2. one model, three ways to run it ===\n", flush=True)
    model, tokenizer = load_switch_model(FOLDER / "model"), load_tokenizer(FOLDER / "model")
    turns = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    texts = {"generate": generate_greedy(model, ids, NEW_TOKENS)}
    loop = DecodeLoop(model, ids.shape[1] + NEW_TOKENS)
    model.pack_for_inference()
    texts["static cache, q, k, v packed"] = loop.generate(ids, NEW_TOKENS)[0]
    set_switch_mode(model, "merged")
    texts["merged anew for every token"] = loop.generate(ids, NEW_TOKENS)[0]
    for way, found in texts.items():
        shown = tokenizer.decode(found[: len(texts["generate"])])  # the loop goes on after the end
        print(f"{way:<30} {shown!r:.80}", flush=True)
    set_switch_mode(model, "fused")
    return model


def main() -> int:
    """Run all four parts."""
    quiet_libraries(True)
    shutil.rmtree(FOLDER / "mixture", ignore_errors=True)
    train()
    model = run_three_ways()
    print("\n=== 3. a fixed mixture is a peft adapter ===\n", flush=True)
    print(export_mixture(model, {0: 0.5, 1: 0.5}, FOLDER / "mixture"), flush=True)
    print("\n=== 4. in vLLM ===\n", flush=True)
    if vllm_build() is None:
        print(f"not here: {why_no_vllm()}", flush=True)
        return EXIT_DONE
    from llmrl.serving.check import check_serving

    print(check_serving(str(FOLDER / "model")).sentence(), flush=True)
    print(f"serve it: llmrl serve {FOLDER / 'model'}", flush=True)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_command(main))
