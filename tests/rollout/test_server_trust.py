"""What a server computes with: it is never taken on trust, neither its label nor that of a server that comes back."""

import pytest
import torch
from server_support import GREEDY, WEIGHTS, ask, wait_for

from llmrl.errors import EngineError, RequestError, SyncError


def test_weights_of_another_client_are_never_sampled_as_version_0(fakes, client):
    a, b = fakes(None, None)
    one = client([a, b])
    for fake in (a, b):
        fake.weights, fake.label = "others", "7-deadbeef"
    b.fault = lambda path, body: (500, "not now") if path == "/pause?mode=wait" else None
    a.fault = b.fault
    with pytest.raises(EngineError, match="holds the weights '7-deadbeef', expected 'default': somebody else updates"):
        one.generate([[1, 2, 3]], GREEDY)
    with pytest.raises(EngineError, match="7-deadbeef"):
        one.score([1, 2, 3])
    # those that can be put back to the start are used again
    a.fault = b.fault = lambda path, body: None
    wait_for(lambda: len(one._pool.up) == 2, 20)
    for fake in (a, b):
        assert fake.label == "default"
        assert fake.weights != "others"


def test_server_without_labels_is_not_asked_for_one(fakes, client):
    (fake,) = fakes(None, sync=False)
    one = client([fake])
    ask(one, 3)
    assert "/weight_info" not in fake.paths()


@pytest.mark.parametrize("updates", [0, 1])
def test_server_that_comes_back_with_other_weights_stays_out(updates, fakes, client):
    """Its label is right, or was made right, and what it computes is not."""
    a, b = fakes(None, None)
    one = client([a, b])
    for _ in range(updates):
        one.update(WEIGHTS)
    a.stop()
    again = a.restarted()
    fakes.more(again)
    again.skew = 0.3
    again.fault = lambda path, body: (500, "once") if path == "/v1/completions" and "logprobs" in body else None
    ask(one)
    member = one._pool.members[0]
    wait_for(lambda: "gives other logprobs than were seen with the weights" in member.error, 20)
    again.fault = lambda path, body: None
    assert "(off by 0.3 nats): restart it" in member.error
    assert again.label == b.label
    again.seen.clear()
    ask(one, 10)
    assert not [body for body in again.completions() if "logprobs" in body]
    again.skew = 0.0  # as after another restart
    wait_for(lambda: member.up, 20)
    ask(one, 10)
    assert [body for body in again.completions() if "logprobs" in body]


def test_server_that_went_back_alone_is_checked_against_what_it_gave_before(fakes, client):
    (fake,) = fakes(None)
    one = client([fake])
    one.update(WEIGHTS)
    fake.fault = lambda path, body: (500, "once") if path == "/v1/completions" else None
    with pytest.raises(EngineError):
        one.generate([[1, 2]], GREEDY)
    fake.fault, fake.skew = lambda path, body: None, 0.3
    wait_for(lambda: "gives other logprobs than were seen" in one._pool.members[0].error)


def test_update_after_which_servers_disagree_is_taken_back(fakes, client):
    servers = fakes(None, None, None)
    one = client(servers)
    before, odd = one.version, servers[1]

    def other_weights(path, body):
        odd.skew = 0.3 if odd.label.startswith("1-") else 0.0

    odd.fault = other_weights
    with pytest.raises(SyncError) as caught:
        one.update(WEIGHTS)
    text = f"{odd.url} did not take the update: gives other logprobs than {servers[0].url} (off by 0.3 nats)"
    assert text in str(caught.value)
    assert "the others are back at version 0" in str(caught.value)
    assert one.version == before
    wait_for(lambda: len(one._pool.up) == 3, 20)
    assert {fake.label for fake in servers} == {"default"}
    assert len({sample.token_ids for sample in ask(one, 9)}) == 9


def test_update_with_weights_that_give_nan_is_for_the_trainer_to_refuse(fakes, client):
    """No server is at fault, and the next update mends it."""
    servers = fakes(None, None)
    one = client(servers)

    def diverged(path, body):
        for fake in servers:
            fake.skew = float("nan") if fake.label.startswith("1-") else 0.0

    for fake in servers:
        fake.fault = diverged
    assert one.update(WEIGHTS).number == 1
    with pytest.raises(RequestError, match="not a number"):
        one.score([1, 2, 3])
    assert one.update(WEIGHTS | {"two": torch.zeros(4)}).number == 2
    assert one.score([1, 2, 3])
