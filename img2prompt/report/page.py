"""A page of HTML that is whole in itself: no script, no link, nothing is fetched.

What is not `Html` is text, and `element` is the one place where text becomes HTML.
"""

import html
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_CHARACTERS = 400  # of a text beside an image
MOST_ROWS = 100
# Browsers show nothing of what they would have to ask another machine for.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_VOID = ("img", "meta")


class Html(str):
    """Text that is HTML already, made by `element`."""


@dataclass(frozen=True)
class Section:
    title: str
    body: Html
    note: str = ""  # a sentence below the title


def element(name: str, /, *children: str, **attributes: object) -> Html:
    """<name …>children</name>. Children that are no Html, and all values, are escaped; `class_` is class, and an
    underscore in another name a hyphen; what is None is left out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{joined(children)}</{name}>")


def joined(parts: Iterable[str]) -> Html:
    return Html("".join(one if isinstance(one, Html) else _escaped(one) for one in parts))


def _escaped(text: str) -> str:
    # A file holds no half of a surrogate pair, and HTML no control characters.
    plain = text.encode("utf-8", "replace").decode()
    return html.escape(
        "".join(
            one if one in "\n\t" or unicodedata.category(one) != "Cc" else "\N{REPLACEMENT CHARACTER}" for one in plain
        )
    )


def clipped(text: str, most: int = MOST_CHARACTERS) -> str:
    """The beginning of a text, and how long all of it is where that is longer."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def phrase(text: str, **attributes: object) -> Html:
    """A prompt: clipped, in its own direction of writing, and told to be empty where it is."""
    if not text.strip():
        return element("span", "(empty)", class_="none")
    return element("bdi", clipped(text), dir="auto", **attributes)


def table(rows: Sequence[Mapping[str, Any]], caption: str, most: int = MOST_ROWS) -> Html:
    """Rows with equal keys, which head the columns; numbers to the right, and no more than `most` rows."""
    if not rows:
        return Html("")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    shown, sides = rows[:most], {column: _side(rows[:most], column) for column in columns}
    head = element("tr", *(element("th", column, scope="col", class_=sides[column]) for column in columns))
    body = []
    for row in shown:
        first, *others = (_cell(row.get(column, "")) for column in columns)
        cells = [element("td", cell, class_=sides[column]) for column, cell in zip(columns[1:], others, strict=True)]
        body.append(element("tr", element("th", first, scope="row"), *cells))
    whole = element("table", element("caption", caption), element("thead", head), element("tbody", *body))
    more = [element("p", f"… and {len(rows) - most:,} more", class_="note")] if len(rows) > most else []
    return joined([element("div", whole, class_="wide", tabindex="0", role="group", aria_label=caption), *more])


def facts(pairs: Mapping[str, Any]) -> Html:
    """Names with their values; those that are None or empty are left out."""
    told = [
        element("div", element("dt", name), element("dd", _cell(value)))
        for name, value in pairs.items()
        if value not in (None, "")
    ]
    return element("dl", *told, class_="facts") if told else Html("")


def code(text: str) -> Html:
    return element("pre", element("code", text), tabindex="0")


def folded(title: str, body: Html) -> Html:
    return element("details", element("summary", title), body)


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole file."""
    present = [section for section in sections if section.body]
    anchors = [f"s{number}" for number in range(1, len(present) + 1)]
    contents = element(
        "nav",
        *(element("a", one.title, href=f"#{anchor}") for one, anchor in zip(present, anchors, strict=True)),
        aria_label="Contents",
    )
    body = [
        element(
            "section",
            element("h2", one.title, id=anchor),
            *([element("p", one.note, class_="note")] if one.note else []),
            one.body,
            aria_labelledby=anchor,
        )
        for one, anchor in zip(present, anchors, strict=True)
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", title),
        element("style", Html(_STYLE)),
    )
    top = element("header", element("h1", phrase(title)), element("p", subtitle, class_="note"), contents)
    whole = element("html", head, element("body", top, element("main", *body)), lang="en")
    return f"<!doctype html>\n{whole}\n"


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value if isinstance(value, Html) else clipped(value)
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.4f}"
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else clipped(str(value))


def _side(rows: Sequence[Mapping[str, Any]], column: str) -> str | None:
    """Columns of numbers, also of written ones."""
    found = [str(row[column]) for row in rows if row.get(column) not in (None, "")]
    return "number" if found and all(one.lstrip("+-")[:1].isdigit() for one in found) else None


_STYLE = """
:root { color-scheme: light dark; --back: #fbfaf7; --card: #ffffff; --text: #1d1f24; --soft: #626872; --line: #e3e0d8;
  --one: #2f6fb0; --two: #c8632b; --fill: #a9c8e6; --mark: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --back: #14161a; --card: #1c1f25; --text: #e7e8ea; --soft: #9aa1ac;
  --line: #30353d; --one: #7db4ea; --two: #f0a06c; --fill: #35577a; --mark: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 5rem; max-width: 72rem; background: var(--back); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; overflow-wrap: anywhere; }
h2 { margin: 3.25rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: 1.35rem; }
h3 { margin: 1.75rem 0 .5rem; font-size: 1.02rem; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .35rem 1.1rem; margin-top: 1rem; }
a { color: var(--one); text-underline-offset: .2em; }
.note, .none, caption, figcaption { color: var(--soft); }
.note { margin: .25rem 0 .9rem; max-width: 60rem; overflow-wrap: anywhere; }
.none { font-style: italic; }
.wide { overflow-x: auto; margin: .75rem 0 1.25rem; }
table { border-collapse: collapse; min-width: 28rem; font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { padding: .38rem .9rem .38rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; max-width: 34rem; }
tbody th { min-width: 6rem; }
thead th { font-weight: 600; color: var(--soft); white-space: nowrap; }
tbody th { font-weight: 600; }
.number { text-align: right; white-space: nowrap; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.facts div { padding: .8rem 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.facts dt { color: var(--soft); font-size: .82rem; }
.facts dd { margin: .1rem 0 0; font-size: 1.12rem; font-weight: 600; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); gap: 1rem;
  align-items: start; }
figure { margin: .5rem 0; padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
figcaption { font-size: .9rem; margin-bottom: .4rem; overflow-wrap: anywhere; }
figcaption strong { color: var(--text); }
section > figure { max-width: 35rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .line { fill: none; stroke: var(--one); stroke-width: 1.8; stroke-linejoin: round; }
svg .dot { fill: var(--one); } svg .bar { fill: var(--fill); } svg .outline { fill: none; stroke: var(--two);
  stroke-width: 1.8; }
svg .mean { stroke: var(--mark); stroke-width: 1.5; stroke-dasharray: 4 3; } svg .floor { fill: var(--soft); }
svg .whisker { stroke: var(--one); stroke-width: 2; } svg .floor-whisker { stroke: var(--soft); stroke-width: 2; }
.heat { display: block; width: 100%; image-rendering: pixelated; } svg text.name { fill: var(--text); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(12.5rem, 1fr)); gap: .9rem; margin: 0;
  padding: 0; list-style: none; }
.cards > li { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; overflow: hidden;
  font-size: .9rem; }
.cards .picture { display: flex; align-items: center; justify-content: center; height: 176px; background: var(--line);
  padding: 8px; text-align: center; color: var(--soft); overflow: hidden; }
.cards img { display: block; width: 100%; height: 160px; object-fit: contain; }
.cards .told { padding: .75rem .9rem .9rem; overflow-wrap: anywhere; }
.cards p { margin: 0 0 .5rem; } .cards .label { color: var(--soft); font-size: .78rem; display: block; }
.score { font-weight: 650; font-size: 1.05rem; font-variant-numeric: tabular-nums; }
bdi { unicode-bidi: isolate; overflow-wrap: anywhere; white-space: pre-line; }
.cloud { display: flex; flex-wrap: wrap; justify-content: center; align-items: baseline; gap: .1rem .9rem; margin: 0;
  padding: 1rem; list-style: none; line-height: 1.25; }
.w1 { font-size: .8rem; } .w2 { font-size: .95rem; } .w3 { font-size: 1.15rem; } .w4 { font-size: 1.45rem; }
.w5 { font-size: 1.8rem; } .w6 { font-size: 2.25rem; } .w7 { font-size: 2.8rem; }
.w1, .w4 { color: var(--soft); } .w2, .w5, .w7 { color: var(--one); } .w3, .w6 { color: var(--text); }
pre { overflow-x: auto; padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
details { margin: .75rem 0; } summary { cursor: pointer; color: var(--one); }
@media print { nav { display: none; } section { break-inside: avoid-page; } }
"""
