"""Training K heads at once on features that were computed before: seconds on a CPU.

Each head has its own data (`llmrl.hyre.diversity`) and the objective is the *sum* over heads, so that no head learns slower
because there are more of them. Pairs are scored by Bradley and Terry: -log sigmoid(r(chosen) - r(rejected) - margin). What is
trained, what is frozen and the scale of the features are folded into one `RewardHead` on raw features when it is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrl.errors import DataError, UsageError
from llmrl.heads import HeadSpec
from llmrl.hyre.diversity import HeadPlan
from llmrl.reward_heads import RewardHead, build_reward_head

KINDS = ("linear", "mlp", "epinet")
PRIORS = ("none", "linear", "mlp")


@dataclass(frozen=True)
class HeadShape:
    """What a head is made of.

    Attributes:
        kind: "linear", "mlp" (with hidden units of each head's own) or "epinet" (hidden units shared, told apart by a random
            index z_k of each head; arXiv 2107.08924, with K fixed draws of the index).
        hidden: trained hidden units, of "mlp" and "epinet".
        prior: frozen random network added to each head (Osband et al., 2018): "none", "linear" (which a trained linear head
            takes back as training goes on) or "mlp". An epinet's is an epinet.
        prior_scale: of its outputs, in units of scores.
        prior_hidden: its hidden units.
        index_size: length of z.
    """

    kind: str = "linear"
    hidden: int = 16
    prior: str = "none"
    prior_scale: float = 1.0
    prior_hidden: int = 32
    index_size: int = 8

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.prior not in PRIORS:
            raise UsageError(
                f"expected heads out of {', '.join(KINDS)} with a prior out of {', '.join(PRIORS)}, got {self.kind!r} and "
                f"{self.prior!r}"
            )
        if min(self.hidden, self.prior_hidden, self.index_size) < 1 or not self.prior_scale >= 0:
            raise UsageError("expected hidden, prior_hidden and index_size of at least 1 and a prior_scale not below 0")


@dataclass(frozen=True)
class Pairs:
    """Features `[N, H]` of the chosen and the rejected, and by how much the first must win (`[N]`, in scores; None: 0)."""

    chosen: Tensor
    rejected: Tensor
    margin: Tensor | None = None


@dataclass(frozen=True)
class Labelled:
    """Features `[N, H]` with targets `[N]`: numbers, or classes from 0 on.

    Attributes:
        features, targets: see above.
        classes: C of a classifier; 0 for numbers. A head has one score for two classes (the logit of class 1), and C scores for
            more: the scores of K heads are then `[N, K * C]`, those of a head side by side.
    """

    features: Tensor
    targets: Tensor
    classes: int = 0

    def __post_init__(self) -> None:
        if self.classes == 1 or self.classes < 0:
            raise UsageError(f"expected classes of 2 or more, or 0 for numbers, got {self.classes}")

    @property
    def outputs(self) -> int:
        """Scores of one head."""
        return self.classes if self.classes > 2 else 1


@dataclass(frozen=True)
class FitSettings:
    """How heads are trained.

    Attributes:
        l2: on what is trained, beside a mean loss over a head's rows.
        steps: most iterations of L-BFGS ("linear") or steps of Adam.
        lr: of Adam.
        batch_size: rows a step of Adam.
        center: coefficient of (r(chosen) + r(rejected))^2, which keeps scores around zero (arXiv 2312.09244).
        seed: of priors, starting points and batches.
    """

    l2: float = 1e-3
    steps: int = 200
    lr: float = 3e-3
    batch_size: int = 512
    center: float = 0.0
    seed: int = 0


class TrainedHeads(nn.Module):
    """K heads in training; `fold` returns what is stored. Features are scaled as `(x - shift) * scale` first."""

    def __init__(self, heads: int, width: int, shape: HeadShape, shift: Tensor, scale: Tensor, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=draw)

        self.shape, self.heads, self.width = shape, heads, width
        self.register_buffer("shift", shift.float())
        self.register_buffer("scale", scale.float())
        rows = 1 if shape.kind == "epinet" else heads  # an epinet's base is one for all
        self.weight = nn.Parameter(torch.zeros(rows, width))
        self.bias = nn.Parameter(torch.zeros(rows))
        size, unit = shape.prior_hidden, shape.prior_scale
        self.prior = shape.prior if shape.kind != "epinet" or shape.prior == "none" else "epinet"
        if shape.kind == "mlp":
            self.inner = nn.Parameter(normal(heads, shape.hidden, width))
            self.inner_bias = nn.Parameter(normal(heads, shape.hidden))
            self.out = nn.Parameter(torch.zeros(heads, shape.hidden))
        if shape.kind == "epinet":
            index = normal(heads, shape.index_size) / shape.index_size**0.5
            self.register_buffer("index", index)
            self.inner = nn.Parameter(normal(shape.hidden, width))
            self.inner_bias = nn.Parameter(normal(shape.hidden))
            self.inner_index = nn.Parameter(normal(shape.hidden, shape.index_size))
            self.out = nn.Parameter(torch.zeros(shape.index_size, shape.hidden))
        if self.prior == "linear":
            self.register_buffer("prior_weight", unit * normal(heads, width))
        if self.prior == "mlp":
            self.register_buffer("prior_inner", normal(heads, size, width))
            self.register_buffer("prior_bias", normal(heads, size))
            self.register_buffer("prior_out", unit * normal(heads, size) / size**0.5)
        if self.prior == "epinet":
            self.register_buffer("prior_inner", normal(size, width))
            self.register_buffer(
                "prior_bias", normal(heads, shape.index_size) @ normal(shape.index_size, size) + normal(size)
            )
            self.register_buffer("prior_out", unit * index @ normal(shape.index_size, size) / size**0.5)

    @property
    def convex(self) -> bool:
        """Tell whether training has one optimum, whatever the start."""
        return self.shape.kind == "linear"

    def frozen(self, features: Tensor) -> Tensor:
        """Return the scores of the priors, `[N, K]`, of scaled features."""
        if self.prior == "linear":
            return features @ self.prior_weight.T
        if self.prior == "mlp":
            inner = (features @ self.prior_inner.flatten(0, 1).T).unflatten(-1, self.prior_bias.shape) + self.prior_bias
            return (inner.relu() * self.prior_out).sum(-1)
        if self.prior == "epinet":
            inner = (features @ self.prior_inner.T)[:, None] + self.prior_bias
            return (inner.relu() * self.prior_out).sum(-1)
        return features.new_zeros(len(features), self.heads)

    def trained(self, features: Tensor) -> Tensor:
        """Return the scores of what is trained, `[N, K]`, of scaled features."""
        scores = (features @ self.weight.T + self.bias).expand(-1, self.heads)
        if self.shape.kind == "mlp":
            inner = (features @ self.inner.flatten(0, 1).T).unflatten(-1, self.inner_bias.shape) + self.inner_bias
            scores = scores + (inner.relu() * self.out).sum(-1)
        if self.shape.kind == "epinet":
            bias = self.index @ self.inner_index.T + self.inner_bias
            inner = (features @ self.inner.T)[:, None] + bias
            scores = scores + (inner.relu() * (self.index @ self.out)).sum(-1)
        return scores

    @torch.no_grad()
    def fold(self) -> RewardHead:
        """Return one head on raw features with the same scores."""
        own = (self.shape.hidden if self.shape.kind == "mlp" else 0) + (
            self.shape.prior_hidden if self.prior == "mlp" else 0
        )
        shared = self.shape.hidden if self.shape.kind == "epinet" else 0
        shared += self.shape.prior_hidden if self.prior == "epinet" else 0
        architecture = "mlp" if own or shared else "linear"
        spec = HeadSpec("reward", architecture, self.width, self.heads, intermediate_size=own, shared_size=shared)
        head = build_reward_head(spec)
        weight = self.weight.expand(self.heads, -1) + (self.prior_weight if self.prior == "linear" else 0)
        head.weight.copy_(weight * self.scale)
        head.bias.copy_(self.bias.expand(self.heads) - head.weight @ self.shift)
        trained, priors = hasattr(self, "inner"), hasattr(self, "prior_inner")
        if own:
            inner = (
                torch.cat([*([self.inner] if trained else []), *([self.prior_inner] if priors else [])], 1) * self.scale
            )
            bias = torch.cat([*([self.inner_bias] if trained else []), *([self.prior_bias] if priors else [])], 1)
            head.own_weight.copy_(inner)
            head.own_bias.copy_(bias - inner @ self.shift)
            head.own_out.copy_(torch.cat([*([self.out] if trained else []), *([self.prior_out] if priors else [])], 1))
        if shared:
            inner = torch.cat([self.inner, *([self.prior_inner] if priors else [])]) * self.scale
            bias = torch.cat(
                [self.index @ self.inner_index.T + self.inner_bias, *([self.prior_bias] if priors else [])], 1
            )
            head.shared_weight.copy_(inner)
            head.shared_bias.copy_(bias - inner @ self.shift)
            head.shared_out.copy_(torch.cat([self.index @ self.out, *([self.prior_out] if priors else [])], 1))
        return head.requires_grad_(False)


def row_losses(
    examples: Pairs | Labelled, first: Tensor, second: Tensor | None, signs: Tensor, rows: slice | Tensor
) -> Tensor:
    """Return the loss of every row and head `[n, K]`, without regularisers.

    Args:
        examples: what the scores are of.
        first: `[n, K]` scores of the chosen, or of the features (`[n, K * C]` of more than two classes).
        second: `[n, K]` scores of the rejected; None for `Labelled`.
        signs: `[K]`, see `HeadPlan`.
        rows: which of the examples these are.
    """
    if isinstance(examples, Pairs):
        margins = signs * (first if second is None else first - second)
        if examples.margin is not None:
            margins = margins - examples.margin[rows, None]
        return F.softplus(-margins)
    targets = examples.targets[rows, None]
    if not examples.classes:
        return (signs * first - targets) ** 2 / 2
    if examples.outputs == 1:
        return F.softplus(-signs * torch.where(targets > 0.5, first, -first))
    logits = first.unflatten(-1, (-1, examples.classes)).log_softmax(-1)
    return -logits.gather(-1, targets[..., None].long().expand(-1, logits.shape[1], 1))[..., 0]


def fit_heads(
    examples: Pairs | Labelled,
    plan: HeadPlan,
    shape: HeadShape | None = None,
    settings: FitSettings | None = None,
    *,
    advance: Callable[[int, int], None] | None = None,
) -> RewardHead:
    """Train K heads on features and return them folded.

    Args:
        examples: N rows.
        plan: which rows each head sees, and its sign.
        shape: of the heads.
        settings: of the training.
        advance: called with (steps done, most steps).

    Raises:
        DataError: rows that do not fit the plan, are none, or are not finite; targets that are no classes.
    """
    shape, settings = shape or HeadShape(), settings or FitSettings()
    first = examples.chosen if isinstance(examples, Pairs) else examples.features
    second = examples.rejected if isinstance(examples, Pairs) else None
    heads, count = plan.rows.shape
    if len(first) != count or not count:
        raise DataError(f"expected {count} rows, as the plan has, and at least one; got {len(first)}")
    if not all(torch.isfinite(part).all() for part in (first, second) if part is not None):
        raise DataError("features that are not finite: check the base model and its dtype")
    outputs = heads if isinstance(examples, Pairs) else heads * _checked_outputs(examples, plan, shape)
    shift, scale = feature_scale(examples)
    model = TrainedHeads(outputs, first.shape[1], shape, shift, scale, settings.seed)
    first = (first.float() - shift) * scale
    second = None if second is None else (second.float() - shift) * scale
    weights, signs = torch.from_numpy(plan.rows), torch.from_numpy(plan.signs)
    with torch.no_grad():
        priors = (model.frozen(first), None if second is None else model.frozen(second))

    def objective(rows: slice | Tensor) -> Tensor:
        a = model.trained(first[rows]) + priors[0][rows]
        b = None if second is None or priors[1] is None else model.trained(second[rows]) + priors[1][rows]
        losses = row_losses(examples, a, b, signs, rows)
        if settings.center and b is not None:
            losses = losses + settings.center * (a + b) ** 2
        penalty = sum((p**2).sum() for name, p in model.named_parameters() if not name.endswith("bias"))
        share = 1.0 if isinstance(rows, slice) else count / len(rows)
        return share * (losses * weights.T[rows]).sum() + settings.l2 / 2 * penalty

    if model.convex and isinstance(examples, Labelled) and not examples.classes:
        _solve(model, first, signs[None] * examples.targets[:, None].float() - priors[0], weights, settings.l2)
    elif model.convex:
        _minimise(model, objective, settings, advance)
    else:
        _descend(model, objective, count, settings, advance)
    return model.fold()


def _checked_outputs(examples: Labelled, plan: HeadPlan, shape: HeadShape) -> int:
    """Return the scores of one head.

    Raises:
        DataError: targets that are no classes, are all of one class, or heads turned round among more than two classes.
        UsageError: an epinet, whose base is one score, for more than two classes.
    """
    if not examples.classes:
        return 1
    found = examples.targets.unique()
    if not all(value in range(examples.classes) for value in found.tolist()):
        raise DataError(f"expected classes from 0 to {examples.classes - 1} as targets, got {found.tolist()[:5]}")
    if len(found) < 2:
        raise DataError("all targets are of one class: a classifier needs examples of two at least")
    if examples.outputs > 1 and shape.kind == "epinet":
        raise UsageError("epinet heads have one score: for more than two classes use kind linear or mlp")
    if examples.outputs > 1 and (plan.signs < 0).any():
        raise DataError("a head of more than two classes has no other side to prefer: expected signs of 1")
    return examples.outputs


def feature_scale(examples: Pairs | Labelled) -> tuple[Tensor, Tensor]:
    """Return (shift, scale) `[H]` that give features mean 0 and pairs differences of root mean square norm 1.

    One number scales all dimensions, so that the geometry of an encoder is kept. Of `Labelled`, features have norm 1.
    """
    if isinstance(examples, Pairs):
        differences = examples.chosen.float() - examples.rejected.float()
        shift = (examples.chosen.float().mean(0) + examples.rejected.float().mean(0)) / 2
    else:
        shift = examples.features.float().mean(0)
        differences = examples.features.float() - shift
    size = (differences**2).sum(1).mean().sqrt()
    if not size > 0:
        raise DataError(
            "all features are the same: chosen and rejected do not differ, or the base model ignores its input"
        )
    return shift, (1 / size).expand(len(shift)).clone()


@torch.no_grad()
def _solve(model: TrainedHeads, features: Tensor, targets: Tensor, weights: Tensor, l2: float) -> None:
    """Ridge regression in float64: what is trained plus the prior comes to the target (times the sign) of each head.

    Heads with the same rows share one factorisation. The bias is not penalised.
    """
    x = torch.cat([features, torch.ones(len(features), 1)], 1).double()
    penalty = l2 * torch.eye(x.shape[1], dtype=torch.float64)
    penalty[-1, -1] = 0
    alike, of = torch.unique(weights, dim=0, return_inverse=True)
    for i, rows in enumerate(alike.double()):
        heads = torch.nonzero(of == i).flatten()
        gram = x.T @ (rows[:, None] * x) + penalty
        found = torch.linalg.lstsq(gram, x.T @ (rows[:, None] * targets[:, heads].double()), driver="gelsd").solution
        model.weight[heads] = found[:-1].T.float()
        model.bias[heads] = found[-1].float()


def _minimise(
    model: TrainedHeads,
    objective: Callable[[slice], Tensor],
    settings: FitSettings,
    advance: Callable[[int, int], None] | None,
) -> None:
    """L-BFGS on all heads at once: the problem is convex and its heads are independent."""
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=settings.steps,
        history_size=10,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )
    done = 0

    def closure() -> Tensor:
        nonlocal done
        optimizer.zero_grad()
        loss = objective(slice(None))
        loss.backward()
        done += 1
        if advance is not None:
            advance(min(done, settings.steps), settings.steps)
        return loss

    optimizer.step(closure)


def _descend(
    model: TrainedHeads,
    objective: Callable[[Tensor], Tensor],
    count: int,
    settings: FitSettings,
    advance: Callable[[int, int], None] | None,
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    draw = torch.Generator().manual_seed(settings.seed)
    order = torch.empty(0, dtype=torch.long)
    for step in range(settings.steps):
        if not len(order):
            order = torch.randperm(count, generator=draw)
        rows, order = order[: settings.batch_size], order[settings.batch_size :]
        optimizer.zero_grad()
        objective(rows).backward()
        optimizer.step()
        schedule.step()
        if advance is not None:
            advance(step + 1, settings.steps)
