"""The canary's judgement on made-up probes: every server is asked, a standing engine is noticed, rounding is let through."""

import logging
from types import SimpleNamespace

import pytest
import torch

from llmrl.errors import ConfigError, SyncError
from llmrl.rollout.sync import WeightSync, compare
from llmrl.types import PolicyVersion

PROBE = tuple(range(3, 103))


class View:
    """One server: its probe is the trainer's plus `off`, and after a cached prefix plus `stale`."""

    def __init__(self, name, world, off=0.0, stale=0.0, cached=64):
        self.name, self.world, self.off, self.stale, self.cached = name, world, off, stale, cached
        self.takes, self.value, self.asked = True, world.value, 0

    def score(self, ids):
        self.asked += 1
        return [self.value + self.off] * (len(ids) - 1)

    def generate(self, prompt, sampling):
        count = sampling.max_tokens
        return SimpleNamespace(token_ids=(5,) * count, logprobs=(self.value + self.stale,) * count)

    def cached_tokens(self, prompt):
        return self.cached


class World:
    """An engine of several servers and the trainer's one number."""

    def __init__(self, dtype, *views):
        self.value, self.dtype, self.is_trusted, self.takes_adapters, self.reason = -2.0, dtype, True, False, None
        self.views = [View(f"http://server-{i}" if len(views) > 1 else "", self, **v) for i, v in enumerate(views)]
        self.number = 0

    def each(self):
        return self.views

    def update(self, source):
        self.number += 1
        for view in self.views:
            view.value = self.value if view.takes else view.value
        return PolicyVersion(self.number, "made-up")

    def distrust(self, reason):
        self.reason = reason


@pytest.fixture
def world(monkeypatch):
    def make(*views, dtype="float32"):
        made = World(dtype, *(views or ({},)))
        sync = WeightSync(made, torch.nn.Linear(2, 2), probe_ids=PROBE)
        monkeypatch.setattr(sync, "_trainer_probe", lambda ids: [made.value] * (len(ids) - 1))
        return made, sync

    return make


def test_update_asks_every_server_and_names_the_one_that_is_off(world):
    made, sync = world({}, {}, {}, {})
    sync.check()
    made.value = -2.5
    sync.update()
    assert min(view.asked for view in made.views) == max(view.asked for view in made.views) == 2
    made.views[2].off = 0.01
    made.value = -2.6
    with pytest.raises(SyncError, match=r"^http://server-2: engine and trainer disagree after update 2: 0.01 nats"):
        sync.update()
    assert made.reason.startswith("http://server-2")


def test_update_names_the_server_with_a_stale_cache_and_the_one_that_stood_still(world):
    made, sync = world({}, {})
    sync.check()
    made.value, made.views[1].stale = -2.5, 0.1
    with pytest.raises(SyncError, match=r"^http://server-1: stale prefix cache"):
        sync.update()
    made.views[1].stale, made.views[0].takes, made.value = 0.0, False, -3.0
    with pytest.raises(SyncError, match=r"^http://server-0: update 2 did not reach the engine"):
        sync.update()


def test_an_engine_that_never_moves_is_noticed_below_the_rounding_of_16_bits(world):
    """Each step moves the trainer by less than can be told from rounding; not one bit of the engine moves."""
    made, sync = world(dtype="bfloat16")
    sync.check()
    made.views[0].takes = False

    def steps(count):
        for _ in range(count):
            made.value -= 0.0005
            sync.update()

    with pytest.raises(SyncError, match="did not reach the engine"):
        steps(20)
    assert made.number <= 4


def test_an_engine_that_moves_with_the_trainer_passes_in_16_bits(world):
    made, sync = world({"off": 0.004, "stale": 0.01}, dtype="bfloat16")
    sync.check()
    for _ in range(20):
        made.value -= 0.0005
        sync.update()
    assert len(sync.reports) == 20


def test_the_mean_tolerance_of_16_bits_follows_what_equal_weights_show(world):
    made, sync = world({"off": 0.01}, dtype="bfloat16")
    assert sync.mean_tolerance == pytest.approx(0.08)
    sync.check()
    assert sync.mean_tolerance == pytest.approx(0.05)
    made.views[0].off, made.value = 0.06, -2.2
    with pytest.raises(SyncError, match=r"0.06 on average \(tolerance 0.8 and 0.05 for bfloat16\)"):
        sync.update()


def test_single_tokens_may_be_off_in_16_bits_and_not_in_float32():
    one, other = [-2.0] * 100, [-2.0] * 99 + [-3.0]
    gap = compare(one, other)
    assert (gap.largest, gap.at, gap.quantile, gap.mean) == (1.0, 99, 0.0, 0.01)
    model = torch.nn.Linear(2, 2)
    assert WeightSync(World("bfloat16", {}), model, probe_ids=PROBE)._agree(gap)
    assert not WeightSync(World("float32", {}), model, probe_ids=PROBE)._agree(gap)


def test_a_cache_that_held_nothing_is_reported_as_not_checked(world, caplog):
    made, sync = world({"cached": 0, "stale": 0.5})
    with caplog.at_level(logging.WARNING):
        sync.update()
        made.value = -2.1
        sync.update()
    assert [r.difference_after_cached_prefix for r in sync.reports] == [None, None]
    assert len([r for r in caplog.records if "prefix cache is not checked" in r.message]) == 1


@pytest.mark.parametrize(("options", "words"), [({"tolerance": 0.0}, "tolerance"), ({"probe_ids": [1]}, "at least 2")])
def test_weight_sync_refuses_what_would_make_it_blind(options, words):
    with pytest.raises(ConfigError, match=words):
        WeightSync(World("float32", {}), torch.nn.Linear(2, 2), **({"probe_ids": PROBE} | options))


def test_trainer_probe_leaves_mixed_precision_out_and_puts_it_back():
    """accelerate wraps forward in autocast; engines hold the weights, so they are compared with the weights' own dtype."""
    model = torch.nn.Linear(2, 2)
    model.probed = []
    plain = model.forward
    model._original_forward = plain
    model.forward = lambda x: model.probed.append("autocast")
    wrapped = model.forward
    from llmrl.rollout.sync import _without_autocast

    with _without_autocast(model):
        model(torch.zeros(1, 2))
    assert model.probed == []
    assert model.forward is wrapped
