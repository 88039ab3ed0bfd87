import dataclasses
import gzip
import json

import pytest
from dataset_files import GAME, TRAJECTORY, reasons, said, turns, write_rows

from llmrl.errors import DataError, UsageError
from llmrl.hindsight.datasets import (
    DIALOGUES,
    LOADERS,
    load,
    load_casino,
    load_craigslist_bargain,
    load_lmrl_gym,
    load_persuasion_for_good,
    read_files,
)
from llmrl.hindsight.options import TrainConfig


@pytest.fixture
def write(tmp_path):
    """`write(rows)`: a file of these rows."""
    return lambda rows, name="rows.jsonl": write_rows(tmp_path / name, rows)


CHARITY = {
    "id": "p4g0",
    "source_id": "x",
    "donation_persuadee": 0.5,
    "turns": turns(
        ("persuader", "Hello. "),
        ("persuader", "Do you know the charity?"),
        ("persuadee", "No."),
        ("persuader", "Would you give?"),
        ("persuadee", "Fifty cents."),
    ),
}


def test_persuasion_for_good(write):
    read = load_persuasion_for_good(write([CHARITY]))
    (talk,) = read.dialogues
    (role, task), *spoken = said(talk)
    assert role == "system"
    assert "Save the Children" in task
    assert spoken == [
        ("assistant", "Hello.\nDo you know the charity?"),
        ("user", "No."),
        ("assistant", "Would you give?"),
        ("user", "Fifty cents."),
    ]
    assert talk.rewards == (0.0, 0.0, 0.0, 0.5, 0.0)
    assert (talk.id, talk.task, talk.done) == ("p4g0", "persuasion_for_good", True)
    assert talk.provenance == {"row": "rows.jsonl:1", "joined": 1, "donation": 0.5}
    assert read.refused == []


@pytest.mark.parametrize(("given", "earned"), [(50.0, 2.0), (2, 2.0), (0.0, 0.0), (-1.0, 0.0)])
def test_donations_are_cut_to_what_could_be_given(given, earned, write):
    (talk,) = load_persuasion_for_good(write([CHARITY | {"donation_persuadee": given}])).dialogues
    assert talk.total == earned
    assert talk.provenance["donation"] == given


def test_persuasion_for_good_keeps_bad_rows_aside(write):
    hello = ("persuader", "Hello.")
    rows = [
        CHARITY,
        CHARITY | {"id": "1", "turns": turns(hello, ("persuadee", " "), hello)},
        CHARITY | {"id": "2", "turns": turns(hello, ("persuader", "\n"))},  # would be gone if it were joined
        CHARITY | {"id": "3", "turns": []},
        CHARITY | {"id": "4", "turns": turns(("persuadee", "Hm."))},
        CHARITY | {"id": "5", "turns": turns(hello, ("moderator", "Stop."))},
        CHARITY | {"id": "6", "donation_persuadee": None},
        CHARITY | {"id": "7", "donation_persuadee": float("nan")},
        CHARITY | {"id": "8", "turns": ["Hello."]},
    ]
    read = load_persuasion_for_good(write(rows))
    assert [talk.id for talk in read.dialogues] == ["p4g0"]
    assert reasons(read) == [
        "empty turn",
        "empty turn",
        "no turns",
        "no agent turn",
        "unknown role",
        "broken row",
        "broken row",
        "broken row",
    ]
    assert read.refused[1][3] == rows[2]
    assert "2 empty turn (first at rows.jsonl:2)" in read.summary()


def deal(mine, yours):
    issues = ("Food", "Water", "Firewood")
    return {
        "issue2youget": {issue: str(n) for issue, n in zip(issues, mine, strict=True)},
        "issue2theyget": {issue: str(n) for issue, n in zip(issues, yours, strict=True)},
    }


def camper(high, medium, low, points):
    return {
        "value2issue": {"Low": low, "High": high, "Medium": medium},
        "value2reason": {"High": f"We need {high}.", "Medium": f"Some {medium}.", "Low": f"Less {low}."},
        "outcomes": {"points_scored": points},
    }


# agent 1 gets 2 food and 3 firewood: 2 * 4 + 3 * 5; agent 2 gets 1 food and 3 water: 3 + 3 * 5
CAMP = {
    "id": "casino0",
    "participants": {
        "mturk_agent_1": camper("Firewood", "Food", "Water", 23),
        "mturk_agent_2": camper("Water", "Firewood", "Food", 18),
    },
    "turns": [
        {"role": "mturk_agent_2", "text": "Hello!"},
        {"role": "mturk_agent_1", "text": "Submit-Deal", "task_data": deal((3, 0, 3), (0, 3, 0))},
        {"role": "mturk_agent_2", "text": "Reject-Deal", "task_data": {"data": "reject_deal"}},
        {"role": "mturk_agent_2", "text": "Submit-Deal", "task_data": deal((1, 3, 0), (2, 0, 3))},
        {"role": "mturk_agent_1", "text": "Accept-Deal", "task_data": {"data": "accept_deal"}},
    ],
}


def test_casino_from_the_side_of_the_camper_who_speaks_first(write):
    (talk,) = load_casino(write([CAMP])).dialogues
    assert said(talk) == [
        (
            "system",
            "You share out 3 packages each of food, water and firewood with another camper.\n"
            "High priority, 5 points a package: water. Reason: We need Water.\n"
            "Medium priority, 4 points a package: firewood. Reason: Some Firewood.\n"
            "Low priority, 3 points a package: food. Reason: Less Food.\n"
            "Without a deal you get 5 points.",
        ),
        ("assistant", "Hello!"),
        (
            "user",
            "I propose this deal: I get 3 food, 0 water, 3 firewood; you get 0 food, 3 water, 0 firewood.",
        ),
        (
            "assistant",
            "I reject this deal.\n"
            "I propose this deal: I get 1 food, 3 water, 0 firewood; you get 2 food, 0 water, 3 firewood.",
        ),
        ("user", "I accept this deal."),
    ]
    assert talk.rewards == (0.0, 0.0, 0.0, 18 / 36, 0.0)
    assert talk.provenance == {"row": "rows.jsonl:1", "joined": 1, "points": 18, "side": "mturk_agent_2"}


def test_casino_from_a_named_side(write):
    (talk,) = load_casino(write([CAMP]), "mturk_agent_1").dialogues
    assert [message.role for message in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert talk.messages[-1].content == "I accept this deal."
    assert talk.rewards == (0.0, 0.0, 0.0, 0.0, 23 / 36)
    assert "firewood. Reason: We need Firewood." in talk.messages[0].content
    assert "Water." not in talk.messages[0].content.split("Low")[0]  # nothing of what the other one needs


def test_casino_walking_away(write):
    leaving = CAMP | {
        "participants": {name: camper("Food", "Water", "Firewood", 5) for name in CAMP["participants"]},
        "turns": [
            {"role": "mturk_agent_1", "text": "All or nothing."},
            {"role": "mturk_agent_2", "text": "Walk-Away", "task_data": {"data": "walk_away"}},
        ],
    }
    (talk,) = load_casino(write([leaving])).dialogues
    assert said(talk)[1:] == [("assistant", "All or nothing."), ("user", "I walk away without a deal.")]
    assert talk.rewards == (0.0, 5 / 36, 0.0)


def test_casino_keeps_bad_rows_aside(write):
    broken = [CAMP["turns"][0], {"role": "mturk_agent_1", "text": "Submit-Deal"}]
    rows = [
        CAMP,
        CAMP | {"id": "1", "turns": broken},
        CAMP | {"id": "2", "participants": {"mturk_agent_2": {"outcomes": {"points_scored": 3}}}},
        CAMP | {"id": "3", "turns": []},
        CAMP | {"id": "4", "participants": {"a": {}, "b": {}}},
    ]
    read = load_casino(write(rows))
    assert reasons(read) == ["broken row", "unknown role", "unknown side", "unknown side"]
    assert "task_data" in read.refused[0][2]


def test_casino_refuses_a_side_that_is_nowhere(write):
    with pytest.raises(DataError, match=r"no dialogue to learn from in .*1 unknown side"):
        load_casino(write([CAMP]), "seller")


def bargain(*said_, id="cb0", low=60, high=100):
    return {
        "id": id,
        "item_name": "bike",
        "buyer_item_description": "A bike.",
        "seller_item_description": "A bike. Little used.",
        "buyer_price": low,
        "seller_price": high,
        "turns": [{"role": role, "strategy": strategy, "text": text} for role, strategy, text in said_],
    }


BARGAIN = bargain(
    ("buyer", "greet", "Hello, is it the 2009 model?"),
    ("seller", "affirm", "Yes, ridden 50 miles. I ask $100."),
    ("buyer", "counter", "I have 70."),
    ("seller", "counter", "Too low."),
    ("seller", "counter", "$80.00 and I bring it."),
    ("buyer", "agree", "80 it is."),
    ("seller", "agree", "Great, deal!"),
)


def test_craigslist_bargain_as_the_seller(write):
    (talk,) = load_craigslist_bargain(write([BARGAIN]), "seller").dialogues
    assert said(talk) == [
        ("system", "You want to sell this item: A bike. Little used.\nYour target price is $100."),
        ("user", "Hello, is it the 2009 model?"),
        ("assistant", "Yes, ridden 50 miles. I ask $100."),
        ("user", "I have 70."),
        ("assistant", "Too low.\n$80.00 and I bring it."),
        ("user", "80 it is."),
        ("assistant", "Great, deal!"),
    ]
    assert talk.rewards == (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5)
    assert talk.provenance == {
        "row": "rows.jsonl:1",
        "joined": 1,
        "price": 80.0,
        "side": "seller",
        "buyer_price": 60,
        "seller_price": 100,
    }


def test_craigslist_bargain_as_the_buyer(write):
    row = BARGAIN | {"buyer_price": 70}
    (talk,) = load_craigslist_bargain(write([row]), "buyer").dialogues
    assert talk.messages[0].content == "You want to buy this item: A bike.\nYour target price is $70."
    assert talk.messages[1].role == "assistant"
    assert talk.rewards == pytest.approx((0.0, 0.0, 0.0, 0.0, 0.0, 2 / 3, 0.0))


OFFER = ("buyer", "propose", "Would you take $75?")


@pytest.mark.parametrize(
    ("price", "turns"),
    [
        (75, [OFFER, ("seller", "agree", "Yes.")]),
        (75, [OFFER, ("seller", "counter", "75 is fine, in cash."), ("buyer", "agree", "Deal.")]),
        (90, [OFFER, ("seller", "agree", "$90 and you have a deal."), ("buyer", "agree", "Fine.")]),
        (75, [OFFER, ("seller", "agree", "Yes."), ("buyer", "inform", "My phone is 347-567-6785, at 80% now.")]),
        (75, [("seller", "propose", "1,000 or 100?"), OFFER, ("seller", "agree", "Yes, within 90 minutes.")]),
    ],
)
def test_a_price_that_the_other_side_agrees_to_is_a_deal(price, turns, write):
    (talk,) = load_craigslist_bargain(write([bargain(*turns)]), "seller").dialogues
    assert talk.provenance["price"] == price
    assert talk.total == pytest.approx((price - 60) / 40)


@pytest.mark.parametrize(
    "turns",
    [
        [OFFER],
        [OFFER, ("seller", "counter-noprice", "Too low.")],
        [OFFER, ("seller", "agree", "$90 and you have a deal.")],  # another price is an offer, whatever its label
        [OFFER, ("buyer", "agree", "Do we agree?"), ("seller", "inform", "Hm.")],
        [OFFER, ("seller", "agree", "Yes."), ("buyer", "counter", "Then $70?")],
        [OFFER, ("seller", "agree", "Yes."), ("buyer", "disagree", "Oh no, I must go.")],
        [("buyer", "inquire", "Is it new?"), ("seller", "agree", "Yes!")],
        [("buyer", "propose", "I give $10."), ("seller", "agree", "Yes.")],  # not near either target
    ],
)
def test_without_an_agreement_there_is_no_outcome(turns, write):
    read = load_craigslist_bargain(write([BARGAIN, bargain(*turns, id="cb1")]), "seller")
    assert reasons(read) == ["no outcome"]


@pytest.mark.parametrize(("price", "seller"), [(50, 0.0), (120, 1.0)])
def test_shares_beyond_the_targets_are_cut(price, seller, write):
    path = write([bargain(("buyer", "propose", f"${price}?"), ("seller", "agree", "Yes."))])
    assert load_craigslist_bargain(path, "seller").dialogues[0].total == seller
    assert load_craigslist_bargain(path, "buyer").dialogues[0].total == 1 - seller


def test_craigslist_bargain_keeps_bad_rows_aside(write):
    rows = [
        BARGAIN,
        bargain(id="1"),
        BARGAIN | {"id": "2", "buyer_price": 100},
        bargain(("buyer", "greet", "Hello."), ("bidder", "agree", "Yes."), id="3"),
        BARGAIN | {"id": "4", "turns": turns(("buyer", "Hello."))},
    ]
    read = load_craigslist_bargain(write(rows), "buyer")
    assert reasons(read) == ["no turns", "no bargaining range", "unknown role", "broken row"]


def test_craigslist_bargain_has_two_sides(write):
    with pytest.raises(UsageError, match="'buyer' or 'seller', got 'first'"):
        load_craigslist_bargain(write([BARGAIN]), "first")


def test_rows_must_be_json(write, tmp_path):
    (tmp_path / "broken.jsonl").write_text(json.dumps(CHARITY) + "\n{\n")
    with pytest.raises(DataError, match=r"broken\.jsonl:2: not JSON"):
        load_persuasion_for_good(tmp_path / "broken.jsonl")
    (tmp_path / "broken.json").write_text("[{},\n")
    with pytest.raises(DataError, match=r"broken\.json: not JSON"):
        load_lmrl_gym(tmp_path / "broken.json")
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        load_persuasion_for_good(tmp_path / "latin.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}" * 50)[:-6])
    with pytest.raises(DataError, match="not a whole gzip file"):
        load_persuasion_for_good(tmp_path / "cut.jsonl.gz")
    with pytest.raises(DataError, match="expected one array of dialogues, got dict"):
        load_lmrl_gym(write({"talkative": [TRAJECTORY]}, "dealer.json"))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: expected an object, got list"):
        load_persuasion_for_good(write([[CHARITY]]))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: expected an object, got str"):
        load_lmrl_gym(write(["Hello."]))


@pytest.mark.parametrize("name", ["chains.pkl", "rows.csv"])
def test_other_files_are_refused_unread(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(DataError, match="another kind of file"):
        load_lmrl_gym(tmp_path / name)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(UsageError, match="not found"):
        load("guess_my_city", tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        load("guess_my_city", tmp_path)


def test_two_rows_of_one_id_are_an_error(write):
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the id 'p4g0' was at rows\.jsonl:1 already"):
        load_persuasion_for_good(write([CHARITY, CHARITY]))


def test_only_bad_rows_are_an_error(write):
    with pytest.raises(DataError, match=r"no dialogue to learn from in .*0 dialogues, 1 kept aside: 1 no turns"):
        load_persuasion_for_good(write([CHARITY | {"turns": []}]))


@pytest.mark.parametrize(
    ("name", "row", "total"),
    [
        ("persuasion_for_good", CHARITY, 0.5),
        ("casino", CAMP, 0.5),
        ("craigslist_bargain_buyer", BARGAIN, 0.5),
        ("craigslist_bargain_seller", BARGAIN, 0.5),
        ("guess_my_city", GAME, -2.0),
        ("lmrl_gym", TRAJECTORY, -2.0),
    ],
)
def test_every_loader_is_found_by_name(name, row, total, write):
    (talk,) = load(name, write([row])).dialogues
    assert talk.total == total
    assert name.startswith(talk.task)


def test_every_name_is_tried_above():
    assert len(LOADERS) == 6


def test_the_options_offer_every_form():
    field = {field.name: field for field in dataclasses.fields(TrainConfig)}["data_format"]
    assert field.metadata["choices"] == (DIALOGUES, *LOADERS)


def test_files_of_one_form_are_read_as_one_set(write):
    other = {**CHARITY, "id": "p4g1"}
    broken = {**CHARITY, "id": "p4g2", "donation_persuadee": "a lot"}
    paths = [write([CHARITY, broken], "a.jsonl"), write([other], "b.jsonl")]
    read = read_files(paths, "persuasion_for_good")
    assert [talk.id for talk in read.dialogues] == ["p4g0", "p4g1"]
    assert reasons(read) == ["broken row"]
    with pytest.raises(DataError, match="the id 'p4g0' is in two of the files"):
        read_files([paths[0], paths[0]], "persuasion_for_good")


def test_files_of_our_own_form(write):
    (talk,) = load("persuasion_for_good", write([CHARITY])).dialogues
    assert read_files([write([talk.to_json()], "ours.jsonl")]).dialogues == [talk]


def test_an_unknown_name_is_an_error_of_use(write):
    with pytest.raises(UsageError, match="no loader for a data set 'casinos'; did you mean 'casino'"):
        load("casinos", write([CAMP]))
