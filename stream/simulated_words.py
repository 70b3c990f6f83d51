"""What the simulated shop sells and what its shoppers say: words, by topic.

PURE. A topic is a latent interest: its items, searches, reviews and messages are made of its own
words, so that a text encoder can tell topics apart as it can in a real catalogue. Brands are made
up. Nothing here was written by, or about, anybody real.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Topic:
    """One latent interest and its corner of the catalogue."""

    category: tuple[str, ...]
    price: float  # median, of one piece
    consumable: bool  # used up, and bought again
    nouns: tuple[str, ...]
    qualities: tuple[str, ...]
    uses: tuple[str, ...]


def _topic(
    category: str, price: float, nouns: str, qualities: str, uses: str, *, consumable: bool = False
) -> Topic:
    return Topic(
        tuple(category.split(" > ")),
        price,
        consumable,
        *(tuple(words.split(", ")) for words in (nouns, qualities, uses)),
    )


TOPICS: Final = (
    _topic(
        "Grocery > Coffee & Tea", 12.0,
        "espresso beans, ground coffee, coffee capsules, filter coffee, green tea, earl grey, "
        "chamomile tea, decaf beans",
        "dark roast, organic, single origin, fair trade, medium roast, loose leaf",
        "a strong morning cup, slow afternoons, the moka pot, the office kitchen",
        consumable=True,
    ),
    _topic(
        "Sports > Running", 75.0,
        "running shoes, trail runners, running shorts, running jacket, hydration vest, "
        "compression socks, headband, marathon singlet",
        "lightweight, breathable, cushioned, reflective, waterproof, carbon plated",
        "long runs, muddy trails, the first ten kilometres, race day",
    ),
    _topic(
        "Sports > Cycling", 60.0,
        "road bike tyre, bike helmet, cycling jersey, bike light, chain lube, saddle bag, "
        "clipless pedals, handlebar tape",
        "aero, tubeless, puncture proof, rechargeable, padded, carbon",
        "gravel rides, commuting in traffic, alpine climbs, winter training",
    ),
    _topic(
        "Baby > Care", 15.0,
        "nappies, baby wipes, infant formula, baby lotion, teething ring, baby bottle, "
        "nursing pads, baby shampoo",
        "newborn, hypoallergenic, fragrance free, extra soft, size three, overnight",
        "sensitive skin, the first months, nights without leaks, the changing bag",
        consumable=True,
    ),
    _topic(
        "Pets > Cats & Dogs", 22.0,
        "dry dog food, wet cat food, cat litter, dog treats, dog chew toy, scratching post, "
        "dog leash, cat tunnel",
        "grain free, salmon, clumping, dental, puppy, senior",
        "fussy cats, large breeds, kittens, walks in the park",
        consumable=True,
    ),
    _topic(
        "Garden > Plants & Tools", 28.0,
        "secateurs, garden hose, tomato seeds, potting compost, watering can, raised bed, "
        "rose bush, lawn mower",
        "heirloom, galvanised, drought tolerant, ergonomic, hardy, peat free",
        "balcony growers, heavy clay, spring planting, a tidy hedge",
    ),
    _topic(
        "Home > Candles & Decor", 18.0,
        "scented candle, candle holder, wall mirror, throw cushion, picture frame, vase, "
        "fairy lights, wicker basket",
        "lavender, vanilla, rustic, hand blown, vintage, velvet",
        "cosy evenings, a bare mantelpiece, the guest room, housewarmings",
    ),
    _topic(
        "Kitchen > Cookware", 45.0,
        "frying pan, casserole, chef's knife, chopping board, saucepan set, wok, baking tray, "
        "stand mixer",
        "non stick, cast iron, stainless steel, induction, copper, enamelled",
        "searing steaks, slow stews, Sunday roasts, small kitchens",
    ),
    _topic(
        "Beauty > Skincare", 24.0,
        "face serum, moisturiser, sunscreen, cleansing balm, eye cream, clay mask, toner, "
        "lip balm",
        "hyaluronic, retinol, vitamin C, soothing, oil free, SPF fifty",
        "dry skin, blemishes, summer holidays, a glow before bed",
        consumable=True,
    ),
    _topic(
        "Electronics > Gaming", 55.0,
        "gaming mouse, mechanical keyboard, game controller, gaming headset, graphics card, "
        "console dock, racing wheel, role playing game",
        "wireless, RGB, low latency, limited edition, multiplayer, ultra wide",
        "ranked matches, couch co-op, late night raids, speed runs",
    ),
    _topic(
        "Electronics > Photography", 160.0,
        "prime lens, mirrorless camera, tripod, camera bag, lens filter, flash gun, "
        "film roll, memory card",
        "wide angle, full frame, weather sealed, telephoto, macro, thirty five millimetre",
        "street portraits, birds at dawn, night skies, weddings",
    ),
    _topic(
        "Toys > Board Games & Puzzles", 30.0,
        "strategy board game, jigsaw puzzle, card game, building blocks, dice set, "
        "wooden train, chess set, plush bear",
        "cooperative, thousand piece, award winning, family, miniature, educational",
        "rainy weekends, ages eight and up, party nights, patient children",
    ),
    _topic(
        "Outdoor > Camping", 70.0,
        "two person tent, sleeping bag, camping stove, headlamp, trekking poles, rucksack, "
        "insulated mat, water filter",
        "ultralight, four season, down filled, packable, storm proof, titanium",
        "thru hikes, wild camping, cold nights, festivals",
    ),
    _topic(
        "Books > Crime & Mystery", 11.0,
        "detective novel, murder mystery, noir thriller, cold case story, courtroom drama, "
        "spy novel, locked room puzzle, true crime account",
        "gripping, Nordic, bestselling, hardboiled, Victorian, unabridged",
        "the long train home, fans of clever inspectors, dark winter nights, book clubs",
    ),
    _topic(
        "Office > Stationery", 8.0,
        "fountain pen, notebook, printer paper, sticky notes, desk organiser, gel pens, "
        "ring binder, highlighters",
        "dotted, recycled, refillable, archival, pastel, hardcover",
        "tidy desks, lecture notes, bullet journals, quarterly reports",
        consumable=True,
    ),
    _topic(
        "Jewellery > Necklaces & Rings", 90.0,
        "silver necklace, gold ring, pearl earrings, charm bracelet, pendant, signet ring, "
        "anklet, brooch",
        "sterling, rose gold, engraved, art deco, birthstone, minimalist",
        "anniversaries, everyday wear, a bridesmaid's gift, layering",
    ),
)  # fmt: skip

NOUNS: Final = 8
"""Nouns of each topic."""

_STARTS: Final = ("Al", "Bren", "Cor", "Dor", "El", "Fen", "Gal", "Hal", "Is", "Jor", "Kel", "Lun")
_MIDDLES: Final = ("a", "e", "i", "o", "ari", "eno", "ilo", "ora")
_ENDS: Final = ("dale", "mont", "ra", "vik", "nia", "tec", "wood", "lis", "berg", "zen")
BRANDS: Final = tuple(a + b + c for c in _ENDS for a in _STARTS for b in _MIDDLES)
_BRANDS_PER_TOPIC: Final = 12
_STRIDE: Final = 77  # shares no divisor with the number of brands: neighbours sound different

LABELS: Final = ("negative", "neutral", "positive")
CHANNELS: Final = ("chat", "email", "phone")
PLACEMENTS: Final = ("home", "search", "recommendations", "related")

_REVIEWS: Final = {
    "negative": (
        "Disappointed. The {noun} is not what I hoped for.",
        "Poor quality, the {noun} broke within a week.",
        "Would not buy this {noun} again.",
    ),
    "neutral": (
        "The {noun} is all right for the price.",
        "An average {noun}, does its job.",
        "Neither great nor bad. It is {use} that I bought it for.",
    ),
    "positive": (
        "Love this {noun}! Perfect for {use}.",
        "Excellent {quality} {noun}, exactly as described.",
        "Best {noun} I have had. Ideal for {use}.",
    ),
}
_MESSAGES: Final = {
    "negative": (
        "My {noun} arrived broken and I want my money back.",
        "The {noun} is terrible. How do I return it?",
        "I am very unhappy with the {noun}, it does not work at all.",
    ),
    "neutral": (
        "When will my {noun} be delivered?",
        "Can I change the delivery address of my order of {noun}?",
        "Do you have the {noun} in {quality} as well?",
    ),
    "positive": (
        "Thank you, the {noun} is wonderful!",
        "Just wanted to say how happy I am with the {noun}.",
        "Great service, and the {noun} came a day early. Thanks!",
    ),
}
_SEARCHES: Final = ("{noun}", "{quality} {noun}", "{noun} for {use}", "{quality} {noun}")


def query(topic: int, seed: int) -> str:
    """What a shopper types who wants something of this topic."""
    return _fill(_SEARCHES, topic, seed % NOUNS, seed)


def review(topic: int, noun: int, label: int, seed: int) -> str:
    """A review of an item of this topic and noun, with the feeling of LABELS[label]."""
    return _fill(_REVIEWS[LABELS[label]], topic, noun, seed)


def message(topic: int, noun: int, label: int, seed: int) -> str:
    """What a shopper writes to the support about such an item."""
    return _fill(_MESSAGES[LABELS[label]], topic, noun, seed)


def _fill(templates: tuple[str, ...], topic: int, noun: int, seed: int) -> str:
    words = TOPICS[topic]
    return templates[seed // 512 % len(templates)].format(
        noun=words.nouns[noun],
        quality=words.qualities[seed // 8 % len(words.qualities)],
        use=words.uses[seed // 64 % len(words.uses)],
    )


PICKS: Final = 4
"""Random numbers that `describe` makes an item's words of."""


@dataclass(frozen=True)
class ItemWords:
    """An item's text."""

    title: str
    category: tuple[str, ...]
    brand: str
    description: str


def describe(topic: int, noun: int, place: int, picks: Sequence[int]) -> ItemWords:
    """The `place`-th item of a topic; `picks`: PICKS numbers that choose its words."""
    words = TOPICS[topic]
    quality, other, use, brand = picks
    first = words.qualities[quality % len(words.qualities)]
    second = words.qualities[other % len(words.qualities)]
    maker = BRANDS[(topic * _BRANDS_PER_TOPIC + brand % _BRANDS_PER_TOPIC) * _STRIDE % len(BRANDS)]
    thing = words.nouns[noun]
    both = first if first == second else f"{first} and {second}"
    return ItemWords(
        title=f"{maker} {first} {thing} {place + 1}",
        category=(*words.category, _capital(thing)),
        brand=maker,
        description=(
            f"{_capital(thing)} by {maker}: {both}. Made for {words.uses[use % len(words.uses)]}."
        ),
    )


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
