"""Write a trained search policy as a folder to share: `python recipes/leret_publish.py --policy DIR --output_dir DIR`.

Weights in bfloat16, tokenizer, search_prompt.json, and a model card; recipes/leret/policy was written by it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrl.config import option, parse_config
from llmrl.errors import ModelError, UsageError, run_command
from llmrl.files import check_output_dir, publish_folder, staging_folder, write_text

CARD = """---
library_name: transformers
license: cc-by-sa-4.0
tags:
- llmrl
- leret
- retrieval
---

# A search policy of {parameters:.1f} million parameters

Given a question and the passages a first search brought, it writes the query of the next search. A Llama with a byte-level
BPE of {vocabulary:,} pieces, trained on two CPU cores. Its first weights are wired by hand to copy
words (`recipes/leret_policy_model.py`); `recipes/leret_policy.py` then taught it to write the queries of nine rules, and LeReT
(arXiv 2410.23214) which of them to write when, with BM25 over the passages of HotpotQA and 2WikiMultihopQA.
It copies words it reads and invents none, so it works on questions and passages it has not seen. It knows nothing and
answers nothing.

    llmrl leret eval --model {folder} --questions QUESTIONS.jsonl --passages PASSAGES.jsonl --output_dir report
    llmrl serve {folder}

`search_prompt.json` holds the prompt it was trained with: {hops} hops, {k} passages each; hop 1 searches with the question
itself. Figures, with intervals and every control: evals/results/leret.md, where this is seed {seed} before its weights were
rounded to bfloat16.

## Data

Questions and passages of HotpotQA (Yang et al., 2018; CC BY-SA 4.0) and 2WikiMultihopQA (Ho et al., 2020; Apache 2.0), whose
passages are Wikipedia's (CC BY-SA): the training files in recipes/leret/data. The dev questions there were not read.
These weights are offered under CC BY-SA 4.0. Nothing was done to make the model safe; it repeats what it is given.
"""


@dataclass
class PublishConfig:
    """Options of the script."""

    policy: str = option(help="the folder policy/ of a `llmrl leret train` run with --tuning full")
    output_dir: str = option(help="folder to write")
    seed: int = option(0, help="of the run, for the card")
    overwrite: bool = option(False, help="replace an output folder")


def main(argv: list[str]) -> int:
    """Round, write, open again, compare."""
    config = parse_config(
        PublishConfig, argv, prog="recipes/leret_publish.py", description=str(__doc__).splitlines()[0]
    )
    output = check_output_dir(config.output_dir, overwrite=config.overwrite)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmrl.leret.prompts import load_setup

    setup = load_setup(config.policy)
    if setup is None:
        raise UsageError(f"{config.policy} holds no search_prompt.json: expected the folder policy/ of a LeReT run")
    model = AutoModelForCausalLM.from_pretrained(config.policy, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(config.policy)
    with staging_folder(output) as staging:
        model.to(torch.bfloat16).save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        setup.save(staging)
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        facts = {
            "parameters": parameters,
            "vocabulary": len(tokenizer),
            "hops": setup.hops,
            "k": setup.k,
            "seed": config.seed,
        }
        (staging / "model.safetensors").chmod(0o644)  # safetensors writes it for the owner alone
        write_text(staging / "README.md", CARD.format(folder=config.output_dir, **facts))
        _check(staging, model)
        publish_folder(staging, output)
    size = sum(path.stat().st_size for path in output.iterdir()) / 2**20
    print(f"{output}: {parameters:.2f} million parameters, {size:.1f} MiB")
    return 0


def _check(folder: Path, model: Any) -> None:
    """Compare what a stranger opens with what is in memory."""
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    for name, value in model.state_dict().items():
        if name not in found or not found[name].equal(value):
            raise ModelError(f"{folder}: {name} is not what was written")


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
