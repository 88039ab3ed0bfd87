"""What is exported gives every head's score: in transformers' own classes, and read back as an ensemble."""

import json
import shutil

import numpy as np
import pytest
import torch
from small_ensembles import ANSWERS, PROMPTS, last_states, random_ensemble, unfolded_scores

from llmrl.encoder import default_encoder
from llmrl.errors import HeadMismatchError, ModelError, OutputError, UsageError
from llmrl.fingerprints import fingerprint_weights
from llmrl.hyre import export
from llmrl.hyre.ensemble import load_ensemble
from llmrl.hyre.export import export_ensemble, padding_id
from llmrl.hyre.pairs import plain_text
from llmrl.rollout.model_facts import read_facts

# the stories tokenizer has no template: these are the texts an ensemble on it reads
TEXTS = [plain_text(prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
STOCK = {
    "llama": "LlamaForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "gemma2": "Gemma2ForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
    "phi": "PhiForSequenceClassification",
}


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory):
    """Return `exported(base name, kind) -> (ensemble, unfolded heads, Exported)`."""
    made = {}

    def make(name, kind):
        if (name, kind) not in made:
            ensemble, unfolded = random_ensemble(tiny_model(name), kind)
            made[name, kind] = ensemble, unfolded, export_ensemble(ensemble, tmp_path_factory.mktemp("out") / "served")
        return made[name, kind]

    return make


def open_stock(folder, **options):
    from transformers import AutoModelForSequenceClassification

    found = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager", **options)
    return found


@pytest.mark.parametrize("name", STOCK)
def test_export_ensemble_stock_gives_each_heads_score_in_transformers(name, exported, tiny_model):
    from transformers import AutoTokenizer

    _, unfolded, done = exported(name, "linear")
    wanted = unfolded_scores(unfolded, last_states(tiny_model(name), TEXTS))
    assert wanted.std(1).min() > 0.1  # heads that differ
    assert done.form == "stock"
    assert done.difference < 1e-5
    model, facts = open_stock(done.folder, output_loading_info=True)
    assert type(model).__name__ == STOCK[name]
    assert not facts["missing_keys"]
    assert not facts["unexpected_keys"]
    bias = np.array(model.config.llmrl_score_bias)
    assert np.abs(bias).min() > 0.01  # it would be missed
    tokenizer = AutoTokenizer.from_pretrained(done.folder)
    # with positions of its own, which transformers counts from the left of a row, gpt2 is padded on the right
    for side in ("right",) if name == "gpt2" else ("right", "left"):
        batch = tokenizer(TEXTS, padding=True, padding_side=side, return_tensors="pt")
        assert len({int(row.sum()) for row in batch["attention_mask"]}) > 1
        with torch.inference_mode():
            logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        assert np.abs(logits.double().numpy() + bias - wanted).max() < 1e-5


def test_export_ensemble_stock_configuration(exported):
    _, _, done = exported("llama", "linear")
    config = json.loads((done.folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["problem_type"] == "regression"
    assert config["id2label"] == {str(i): f"score_{i}" for i in range(5)}
    assert config["pad_token_id"] == 1  # the tokenizer has no padding; no text ends with <s>
    assert "llmrl" not in config  # nothing of llmrl's is needed to open it
    # vLLM reads the files that an index names: not those of the ensemble
    index = json.loads((done.folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    assert "score.weight" in index["weight_map"]
    assert not [name for name in index["weight_map"] if name.startswith("lm_head")]
    facts = read_facts(str(done.folder))  # to the engines, too, it is a plain checkpoint
    assert facts.architecture == config["architectures"][0]
    assert facts.fingerprint == fingerprint_weights(done.folder).removeprefix("sha256:")
    assert "served --port" in (done.folder / "README.md").read_text()


@pytest.mark.parametrize(("name", "kind"), [("llama", "linear"), ("llama", "epinet"), ("granite", "linear")])
def test_export_ensemble_is_an_ensemble_again(name, kind, exported):
    ensemble, unfolded, done = exported(name, kind)
    again = load_ensemble(done.folder)
    assert again.fingerprint == ensemble.fingerprint
    assert again.names == ensemble.names
    assert (ensemble.single is None, again.single) == (False, None)  # what is served has K heads and no other
    wanted = unfolded_scores(unfolded, last_states(ensemble.base_name, TEXTS))
    assert np.abs(again.scores(PROMPTS, ANSWERS) - wanted).max() < 1e-5
    probes = json.loads((done.folder / "reward_export.json").read_text())["probes"]
    states = last_states(ensemble.base_name, [probe["text"] for probe in probes])
    assert np.abs(unfolded_scores(unfolded, states) - [probe["scores"] for probe in probes]).max() < 1e-5


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "mlp"), ("qwen2", "epinet"), ("gemma2", "mlp"), ("granite", "linear"), ("cohere", "mlp")],
)
def test_export_ensemble_plugin_holds_base_and_heads(name, kind, exported, tiny_model):
    """Heads with hidden units, and bases for which transformers has no class that classifies."""
    from safetensors.torch import load_file

    from llmrl.modeling import read_heads_config

    _, unfolded, done = exported(name, kind)
    assert done.form == "plugin"
    described = read_heads_config(done.folder)
    assert described.merged
    assert described.heads["reward"].outputs == 5
    config = json.loads((done.folder / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification")
    assert config["architectures"][0].startswith("Llmrl")
    assert config["problem_type"] == "regression"
    base, own = (load_file(folder / "model.safetensors") for folder in (tiny_model(name), done.folder))
    assert base.keys() == own.keys()
    assert all(torch.equal(base[key], own[key]) for key in base)
    head = load_ensemble(done.folder).head
    states = last_states(tiny_model(name), TEXTS)
    assert np.abs(head(states).double().numpy() - unfolded_scores(unfolded, states)).max() < 1e-5


def test_export_ensemble_keeps_scores_in_float32_beside_a_base_in_16_bits(tiny_model, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model("llama")).save_pretrained(base)
    ensemble, _ = random_ensemble(base, dtype="auto")
    done = export_ensemble(ensemble, tmp_path / "out")
    tensors = load_file(done.folder / "model.safetensors")
    assert tensors.pop("score.weight").equal(ensemble.head.weight)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((done.folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert done.difference < 1e-5  # compared in float32, as is the promise


def test_export_ensemble_of_a_base_that_lies_in_its_folder(tiny_model, tmp_path):
    """As of an ensemble whose base was trained with it."""
    shutil.copytree(tiny_model("llama"), tmp_path / "trained" / "base")
    ensemble, _ = random_ensemble(tmp_path / "trained" / "base")
    wanted = ensemble.scores(PROMPTS, ANSWERS)
    ensemble.base_name = "base"
    ensemble.save(tmp_path / "trained")
    done = export_ensemble(load_ensemble(tmp_path / "trained"), tmp_path / "out")
    assert done.form == "stock"
    assert np.abs(load_ensemble(done.folder).scores(PROMPTS, ANSWERS) - wanted).max() < 1e-6


def test_export_ensemble_leaves_out_probes_that_the_ensemble_does_not_read(tiny_model, tmp_path):
    ensemble, _ = random_ensemble(tiny_model("llama"))
    ensemble.max_length = 40
    export_ensemble(ensemble, tmp_path / "out")
    probes = json.loads((tmp_path / "out" / "reward_export.json").read_text())["probes"]
    lengths = [len(ensemble.base.base.tokenizer(probe["text"])["input_ids"]) for probe in probes]
    assert 1 <= len(lengths) < len(export.PROBES)
    assert max(lengths) <= 40


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_export_ensemble_publishes_nothing_that_scores_differently(kind, tiny_model, tmp_path, monkeypatch):
    ensemble, _ = random_ensemble(tiny_model("llama"), kind)
    name = "_write_stock" if kind == "linear" else "_write_plugin"
    write = getattr(export, name)

    def damaged(ensemble, reference, staging):
        write(ensemble, reference, staging)
        from safetensors.torch import load_file, save_file

        path = staging / "model.safetensors"
        tensors = load_file(path)
        if kind == "linear":
            tensors["score.weight"][3] *= 1.01
        else:
            tensors["model.norm.weight"] *= 1.01
        save_file(tensors, path, metadata={"format": "pt"})

    monkeypatch.setattr(export, name, damaged)
    words = "head 3 differs" if kind == "linear" else "differ"
    with pytest.raises((ModelError, HeadMismatchError), match=words):
        export_ensemble(ensemble, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_export_ensemble_refusals(tiny_model, tmp_path, exported):
    ensemble, _ = random_ensemble(tiny_model("llama"), "mlp")
    with pytest.raises(ModelError, match="no stock form: its heads have hidden units"):
        export_ensemble(ensemble, tmp_path / "out", form="stock")
    linear, _ = random_ensemble(tiny_model("granite"))
    with pytest.raises(ModelError, match="transformers has no granite that classifies"):
        export_ensemble(linear, tmp_path / "out", form="stock")
    with pytest.raises(UsageError, match="expected a form"):
        export_ensemble(ensemble, tmp_path / "out", form="onnx")
    with pytest.raises(OutputError, match="is not empty"):
        export_ensemble(ensemble, exported("llama", "mlp")[2].folder)
    ensemble.base_name = str(tiny_model("mistral"))
    with pytest.raises(HeadMismatchError, match="trained on another base"):
        export_ensemble(ensemble, tmp_path / "out")
    encoder, _ = random_ensemble(default_encoder())
    with pytest.raises(ModelError, match=r"is a sentence encoder.*\n.*EmbeddingRewardClient"):
        export_ensemble(encoder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Tokens:
    """A tokenizer whose texts end with `end`."""

    def __init__(self, end, **ids):
        self.end = end
        for name in ("pad", "bos", "unk", "eos"):
            setattr(self, f"{name}_token_id", ids.get(name))

    def __call__(self, text):
        return {"input_ids": [5, self.end]}


@pytest.mark.parametrize(
    ("tokenizer", "wanted"),
    [
        (Tokens(9, pad=3, bos=1, eos=2), 3),
        (Tokens(2, pad=2, bos=1, eos=2), 1),  # texts end with the token that pads: it would be passed over
        (Tokens(9, pad=64, bos=1), 1),  # a token the base has no row for
        (Tokens(9, eos=2), 2),
    ],
)
def test_padding_id_never_ends_a_text(tokenizer, wanted):
    assert padding_id(tokenizer, ["a"], 64) == wanted


def test_padding_id_refuses_a_tokenizer_without_one():
    with pytest.raises(ModelError, match="set its pad_token"):
        padding_id(Tokens(2, pad=2, eos=2), ["a"], 64)
