"""The whole way in one minute or two: calibrate a released model on real text, open the result, generate, check vLLM.

`make demo` runs this. It writes runs/calibrate-stories260k and may be run again.
"""

import os
import sys
import time
from pathlib import Path

from llmrl.commands import run_calibrate
from llmrl.errors import run_command
from llmrl.vllm_compat import vllm_build, why_no_vllm

OUTPUT = "runs/calibrate-stories260k"
PROMPT = "Dorothy lived in the midst of the great"


def heading(text: str) -> None:
    print(f"\n=== {text} ===\n", flush=True)


def calibrate() -> int:
    arguments = ["--config", "recipes/calibrate/stories260k.yaml", "--overwrite"]
    if vllm_build() is None:
        print(f"vLLM is not checked: {why_no_vllm()}")
    else:
        arguments.append("--check_serving")
    return run_calibrate(arguments)


def generate() -> int:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(OUTPUT)
    base = AutoModelForCausalLM.from_pretrained("examples/stories260k")
    calibrated = AutoModelForCausalLM.from_pretrained(OUTPUT)  # `import llmrl` taught it this folder
    ids = tokenizer(PROMPT, return_tensors="pt")
    texts = []
    for name, model in (("base", base), ("calibrated", calibrated)):
        with torch.inference_mode():
            probabilities = model(**ids).logits[0, -1].softmax(-1)
            output = model.generate(**ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
        best = probabilities.argmax().item()
        texts.append(output[0].tolist())
        print(f"{name:<10}  next token {tokenizer.convert_ids_to_tokens(best)!r} with p = {probabilities[best]:.3f}")
    print(f"\ngreedy text of both: {tokenizer.decode(texts[0], skip_special_tokens=True)!r}")
    return 0 if texts[0] == texts[1] else 1


def main() -> int:
    start = time.time()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything lies in the repository
    os.chdir(Path(__file__).resolve().parent.parent)
    heading("1. calibrate a real 260k-parameter model on four kinds of text it was not trained on, 3 seeds")
    code = calibrate()
    if code:
        return code
    heading("2. open the result with transformers and generate")
    code = generate()
    heading("3. serve it")
    print(f"""    .venv/bin/llmrl serve {OUTPUT}

and, from another terminal:

    curl -s http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{{"model": "{OUTPUT}", "prompt": "{PROMPT}", "max_tokens": 8, "temperature": 0, "logprobs": 1}}'
""")
    print(f"picture: {OUTPUT}/plots/reliability.png    numbers: {OUTPUT}/report.json    {time.time() - start:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(run_command(main))
