from __future__ import annotations

import hashlib

import pytest

from profiles.arithmetic import FORGET
from profiles.schema import EVENT_TYPES
from stream import events as ev
from stream.contributions import DEFAULT_WEIGHTS, Columns, add_columns, columns, event_weights

T_MS = 1_760_000_000_000


def _weights(*events: ev.Event) -> list[float]:
    return columns(events, DEFAULT_WEIGHTS, "USD").weight


def _item_event(kind: type[ev.ItemEvent], **fields: object) -> ev.Event:
    return kind(user_id="u", ts=T_MS, item_id="i", **fields)  # type: ignore[return-value]


def test_every_type_has_a_default_weight_and_purchase_is_the_unit() -> None:
    assert set(DEFAULT_WEIGHTS) == set(EVENT_TYPES)
    assert DEFAULT_WEIGHTS["purchase"] == max(DEFAULT_WEIGHTS.values()) == 1.0


def test_seeing_counts_less_than_wanting_and_taking_out_of_the_cart_counts_against() -> None:
    view, click, cart, out = _weights(
        *(_item_event(k) for k in (ev.View, ev.Click, ev.AddToCart, ev.RemoveFromCart))
    )
    assert out < 0 < view < click < cart


@pytest.mark.parametrize(("rating", "weight"), [(5, 1.0), (4, 0.5), (3, 0.0), (2, -0.5), (1, -1.0)])
def test_a_review_weighs_what_its_rating_is_above_neutral(rating: float, weight: float) -> None:
    assert _weights(_item_event(ev.Review, rating=rating)) == [weight]


def test_weights_can_be_set_per_type() -> None:
    weights = event_weights({"view": 0.5, "remove_from_cart": -2.0})
    assert (weights["view"], weights["remove_from_cart"], weights["click"]) == (0.5, -2.0, 0.3)


@pytest.mark.parametrize("wrong", [{"wink": 1.0}, {"view": 101.0}, {"view": float("nan")}])
def test_unknown_types_and_wild_weights_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="PROFILE_WEIGHTS") as refused:
        event_weights(wrong)
    assert next(iter(wrong)) in str(refused.value)


def test_users_get_rows_in_the_order_of_their_first_event() -> None:
    made = columns(
        [ev.View(user_id=user, ts=T_MS, item_id="i") for user in ("ann", "bob", "ann", "cem")],
        DEFAULT_WEIGHTS,
        "USD",
    )
    assert made.users == {"ann": 0, "bob": 1, "cem": 2}
    assert made.row == [0, 1, 0, 2]


def test_an_event_id_becomes_the_head_of_its_sha256_and_no_id_stays_empty() -> None:
    made = columns(
        [ev.Forget(user_id="u", ts=T_MS, event_id="e-1"), ev.Forget(user_id="u", ts=T_MS)],
        DEFAULT_WEIGHTS,
        "USD",
    )
    head = hashlib.sha256(b"e-1").digest()[:8]
    assert made.event == [int.from_bytes(head, "little"), 0]
    assert made.type == [FORGET, FORGET]


def test_spend_is_price_times_quantity_in_the_shops_currency_and_foreign_otherwise() -> None:
    made = columns(
        [
            _item_event(ev.Purchase, price=2.5, quantity=4),
            _item_event(ev.Purchase, price=2.5, currency="USD"),
            _item_event(ev.Purchase, price=2.5, currency="EUR"),
            _item_event(ev.Purchase),
            _item_event(ev.View, price=9.0),
        ],
        DEFAULT_WEIGHTS,
        "USD",
    )
    assert made.spend == [10.0, 2.5, 0.0, 0.0, 0.0]
    assert made.foreign == [False, False, True, False, False]


def test_searches_and_messages_bring_their_own_text_and_no_item() -> None:
    made = columns(
        [
            ev.Search(user_id="u", ts=T_MS, query="red scarf"),
            ev.Message(user_id="u", ts=T_MS, text="where is it?"),
            _item_event(ev.Review, rating=5, text="lovely"),
        ],
        DEFAULT_WEIGHTS,
        "USD",
    )
    assert made.text == ["red scarf", "where is it?", ""]
    assert made.item_id == ["", "", "i"]


def test_a_text_without_weight_is_not_worth_encoding() -> None:
    weights = event_weights({"search": 0.0})
    made = columns([ev.Search(user_id="u", ts=T_MS, query="red scarf")], weights, "USD")
    assert (made.text, made.weight) == ([""], [0.0])


def test_what_an_event_says_of_its_item_is_kept_and_a_price_alone_says_nothing() -> None:
    made = columns(
        [
            _item_event(ev.View, price=3.0),
            ev.View(user_id="u", ts=T_MS, item_id="j", title="Scarf", category=("Wool", "Red")),
        ],
        DEFAULT_WEIGHTS,
        "USD",
    )
    assert set(made.inline) == {"j"}
    assert made.inline["j"].title == "Scarf"
    assert made.inline["j"].category_name == "Wool > Red"


def test_it_does_not_matter_in_how_many_parts_events_are_added() -> None:
    events: list[ev.Event] = [
        ev.Purchase(user_id="ann", ts=T_MS, item_id="i", price=2.0, quantity=3, currency="EUR"),
        ev.Review(user_id="bob", ts=T_MS, item_id="j", rating=1, title="Wool scarf"),
        ev.Search(user_id="ann", ts=T_MS, query="scarf"),
        ev.Message(user_id="cem", ts=T_MS, text="where is it?", event_id="m1"),
        ev.View(user_id="bob", ts=T_MS, item_id="i"),
        ev.Forget(user_id="ann", ts=T_MS),
    ]
    whole = columns(events, DEFAULT_WEIGHTS, "USD")
    for cut in range(len(events) + 1):
        parts = Columns()
        add_columns(parts, events[:cut], DEFAULT_WEIGHTS, "USD")
        add_columns(parts, events[cut:], DEFAULT_WEIGHTS, "USD")
        assert parts == whole
    assert whole.weight[1] == -1.0
    assert whole.foreign == [True, False, False, False, False, False]
    assert whole.inline["j"].title == "Wool scarf"
