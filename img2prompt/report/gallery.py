"""Pictures with what is said of them, and which of many are shown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TypeVar

from img2prompt.data.prompts import hash_of
from img2prompt.report.page import Html, clipped, element, phrase
from img2prompt.report.thumbnails import Thumbnail

SHOWN = 10
_Row = TypeVar("_Row")


@dataclass(frozen=True)
class ScoreRow:
    """An image with its score, and the prompt that would have been said of it."""

    id: str
    source: str
    cosine: float
    prompt: str
    nearest_prompt: str
    nearest_cosine: float


@dataclass(frozen=True)
class Card:
    id: str
    prompt: str
    cosine: float | None = None
    told: Mapping[str, str] | None = None  # further texts by their names


def drawn(rows: Sequence[_Row], id_of: Callable[[_Row], str], most: int = SHOWN) -> list[_Row]:
    """Some of the rows, by the hash of their ids: always the same."""
    return sorted(rows, key=lambda row: hash_of(id_of(row), 0))[:most]


def extremes(rows: Sequence[ScoreRow], most: int = SHOWN) -> dict[str, list[ScoreRow]]:
    """The best, the worst, and some at random, one image of a prompt, of those with a finite cosine."""
    scored = sorted((row for row in rows if isfinite(row.cosine)), key=lambda row: (-row.cosine, row.id))
    orders = {
        "best": scored,
        "worst": scored[::-1],
        "random": drawn(scored, lambda row: row.id, len(scored)),
    }
    return {kind: _of_other_prompts(order, most) for kind, order in orders.items()}


def _of_other_prompts(rows: Sequence[ScoreRow], most: int) -> list[ScoreRow]:
    found: dict[str, ScoreRow] = {}
    for row in rows:
        if len(found) < most:
            found.setdefault(row.prompt, row)
    return list(found.values())


def gallery(cards: Sequence[Card], thumbnails: Mapping[str, Thumbnail], missing: str) -> Html:
    """The cards beside each other; `missing` is said where a picture is not there."""
    return element("ul", *(_card(card, thumbnails.get(card.id), missing) for card in cards), class_="cards")


def _card(card: Card, picture: Thumbnail | None, missing: str) -> Html:
    if picture is not None and picture.jpeg:
        shown = element("img", src=picture.address, alt=f"Image {clipped(card.id, 80)}", loading="lazy")
    else:
        shown = element("span", clipped(picture.reason, 120) if picture is not None and picture.reason else missing)
    parts = []
    if card.cosine is not None:
        parts.append(element("p", element("span", f"{card.cosine:.4f}", class_="score"), " cosine"))
    parts.append(element("p", element("span", "prompt", class_="label"), phrase(card.prompt)))
    for name, text in (card.told or {}).items():
        parts.append(element("p", element("span", name, class_="label"), phrase(text)))
    parts.append(element("span", clipped(card.id, 80), class_="label"))
    return element("li", element("div", shown, class_="picture"), element("div", *parts, class_="told"))
