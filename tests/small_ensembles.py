"""Reward ensembles on small models: heads with random weights, as they are in training (unfolded) and as they are stored."""

import numpy as np
import torch

from llmrl.hyre.ensemble import RewardEnsemble
from llmrl.hyre.features import open_features
from llmrl.hyre.fit import HeadShape, TrainedHeads
from llmrl.hyre.posterior import HyrePosterior
from llmrl.hyre.user import User

SHAPES = {
    "linear": HeadShape("linear", prior="linear"),
    "mlp": HeadShape("mlp", hidden=6, prior="mlp", prior_hidden=5),
    "epinet": HeadShape("epinet", hidden=6, prior="mlp", prior_hidden=5),
}
PROMPTS = [
    (("user", "Tell me a story."),),
    (("user", "Hi"),),
    (("user", "One day"), ("assistant", "a dog"), ("user", "and then?")),
]
ANSWERS = [
    "Once upon a time there was a little girl who liked to play in the park.",
    "No.",
    "The dog ran to a big tree.",
]


def conversation(prompt):
    """Return a prompt as trl has it."""
    return [{"role": role, "content": content} for role, content in prompt]


CHATS = [conversation(prompt) for prompt in PROMPTS]
SAID = [[{"role": "assistant", "content": answer}] for answer in ANSWERS]


def random_heads(width, kind="linear", heads=5, seed=0):
    """Return heads as they are in training, with every parameter random and features far from their scale and zero."""
    draw = torch.Generator().manual_seed(seed)
    shift, scale = torch.randn(width, generator=draw), torch.full((width,), 0.7 / width**0.5)
    model = TrainedHeads(heads, width, SHAPES[kind], shift, scale, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return model.requires_grad_(False)


def unfolded_scores(model, features):
    """Return `[N, K]` of raw features, by the formula of training."""
    scaled = (features - model.shift) * model.scale
    return (model.trained(scaled) + model.frozen(scaled)).double().numpy()


def random_ensemble(base, kind="linear", heads=5, reads="dialogue", seed=0, dtype="float32", max_length=None):
    """Return (ensemble, its heads unfolded) on a base."""
    features = open_features(str(base), dtype=dtype, max_length=max_length)
    model = random_heads(features.width, kind, heads, seed)
    names = tuple(f"head {k}" for k in range(heads))
    facts = (features.name, features.kind, features.identity, reads, max_length)
    single = random_heads(features.width, "linear", 1, seed + 1).fold()  # as training leaves one, for comparison
    made = RewardEnsemble(model.fold(), *facts, names=names, signs=(1,) * heads, single=single, _base=features)
    return made, model


def weighted_user(ensemble, seed=0, correction=None):
    """Return a user of the ensemble whose weights are far from uniform."""
    posterior = HyrePosterior(ensemble.heads, ensemble=ensemble.fingerprint)
    posterior.update(np.random.default_rng(seed).normal(size=(4, ensemble.heads)))
    return User(posterior, correction=correction)


def last_states(folder, texts, class_name="AutoModel"):
    """Return the state after the final norm of each text's last token, `[N, H]` float32, one text at a time."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # sdpa leaves Gemma 2's soft-cap of the attention out
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = getattr(transformers, class_name).from_pretrained(folder, **options).eval()
    with torch.inference_mode():
        rows = [model(**tokenizer(t, return_tensors="pt"), output_hidden_states=True) for t in texts]
    return torch.stack([row.hidden_states[-1][0, -1] for row in rows])
