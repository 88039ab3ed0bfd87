"""Explorations in processes of their own, which tests start, kill with SIGKILL and resume: see training/sft_run.py.

    run(output_dir, model="scripted" | "tiny_lm", ranks=1 | 2, kill=N, questions=[...])    exit code; log.txt has the output

The process with the highest rank kills itself when it is asked for its N-th query of hop 2. searched-RANK.json holds what
each process searched for.
"""

import functools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from forked_runs import call, training_script

DEFAULTS = {"model": "scripted", "kill": None, "questions": [3, 4, 5, 6]}


run = functools.partial(call, __file__)


def explore(options):
    from explore_world import BARE, CORPUS, QUESTIONS, TINY_LM, ChainRetriever, engine, explorer, style

    from llmrl.leret.export import write_rows
    from llmrl.leret.pairs import PairRule
    from llmrl.leret.prompts import PromptFormat
    from llmrl.rollout.backends import open_engine
    from llmrl.training.distributed import is_main_process, join_processes

    options = {**DEFAULTS, **options}
    join_processes()
    format_ = PromptFormat(instruction="name" if options["model"] == "scripted" else "", max_tokens=10)
    if options["model"] == "scripted":
        answers = engine(killing(options["kill"]))
        styles, settings = [BARE, style("seed"), style("talk")], {"returns": "mean"}
    else:
        answers = open_engine(str(TINY_LM), rollout_backend="transformers", dtype="float32", batch_size=4)
        styles, settings = [format_.bare, style("search")], {"question_first": True, "merge": "rrf"}
    with answers:
        searched = ChainRetriever()
        made = explorer(answers, prompts=format_, samples=2, temperatures=(0.0, 0.8), retriever=searched, **settings)
        questions = [QUESTIONS[i] for i in options["questions"]]
        groups = made.explore(questions, styles, options["output_dir"])
        texts = {question.id: question.text for question in questions}
        asked = Path(options["output_dir"]) / f"searched-{os.environ.get('RANK', 0)}.json"
        asked.write_text(json.dumps([queries for queries, _ in searched.batches]))

        def render(state):
            passages = [CORPUS.by_id[name] for name in made.context(state)]
            return format_.messages(format_.bare, texts[state.question_id], passages)

        if is_main_process():
            rule = PairRule(max_pairs=4, near_duplicate=0.9)
            print(write_rows(options["output_dir"], groups, rule, render, answers.tokenizer), made.asker.tally)


def killing(number):
    """The scripted answers; those of hop 2 come to an end on one process."""
    from explore_world import prompt_text, say

    if number is None or int(os.environ.get("RANK", 0)) + 1 < int(os.environ.get("WORLD_SIZE", 1)):
        return say
    lock, count = threading.Lock(), [0]

    def answer(request):
        if "[1]" in prompt_text(request) and "seed<|end|>" in prompt_text(request):
            with lock:
                count[0] += 1
                if count[0] == number:
                    time.sleep(0.3)  # what was answered before is written
                    os.kill(os.getpid(), signal.SIGKILL)
        return say(request)

    return answer


def main():
    sft_run = training_script()
    from explore_world import tokenizer
    from transformers import LlamaForCausalLM  # noqa: F401

    import llmrl.leret.export
    import llmrl.rollout.transformers_engine  # noqa: F401

    tokenizer()  # what the forks share is loaded once
    sft_run.run = explore
    return sft_run.main()


if __name__ == "__main__":
    sys.exit(main())
