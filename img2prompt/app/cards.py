"""Answers as HTML. Whatever came with an image (its name, its metadata, what a captioner read off it) is escaped."""

import base64
import html
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from img2prompt.app.answers import Answers, OwnPrompt

# Columns that are shown together, as text and number, in the order of the page.
_LISTS = (
    ("Composed prompt", "composed_prompt", "composed_cosine"),
    ("Nearest prompts", "nearest_prompts", "nearest_cosines"),
    ("Likeliest words", "words", "word_probabilities"),
)
_SHOWN_ELSEWHERE = {"path", "norm", *(name for _, *names in _LISTS for name in names)}

STYLE = """
.card { display: flex; gap: 1.25rem; padding: 1rem; margin-bottom: 1rem; border: 1px solid var(--border-color-primary);
  border-radius: 10px; background: var(--block-background-fill); }
.card > img { width: 200px; max-height: 260px; object-fit: contain; align-self: flex-start; border-radius: 6px; }
.card .said { flex: 1; min-width: 0; overflow-wrap: anywhere; }
.card h3, .rank h3 { margin: 0 0 .25rem; font-size: 1.05rem; overflow-wrap: anywhere; }
.card h4 { margin: .75rem 0 .2rem; font-size: .75rem; font-weight: 600; letter-spacing: .04em;
  text-transform: uppercase; opacity: .7; }
.row { display: flex; gap: .6rem; align-items: baseline; line-height: 1.45; }
.row .text { flex: 1; min-width: 0; white-space: pre-wrap; }
.value { font-variant-numeric: tabular-nums; min-width: 3.2em; opacity: .7; }
.bar { flex: none; width: 60px; height: 6px; border-radius: 3px; background: var(--border-color-primary);
  align-self: flex-start; margin-top: .6em; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--color-accent); }
.marks { display: flex; flex-wrap: wrap; gap: .35rem .5rem; }
.mark { padding: .1rem .55rem; border-radius: 999px; border: 1px solid var(--border-color-primary); }
.subdued { opacity: .7; }
.problems { padding: .75rem 1rem; margin-bottom: 1rem; border-radius: 10px; border: 1px solid #d97706;
  overflow-wrap: anywhere; }
.rank { margin-bottom: 1.5rem; }
.rank .images { display: flex; flex-wrap: wrap; gap: .75rem; }
.rank figure { width: 130px; margin: 0; padding: .4rem; border: 1px solid var(--border-color-primary);
  border-radius: 8px; background: var(--block-background-fill); overflow-wrap: anywhere; font-size: .85rem; }
.rank figure.first { border-color: var(--color-accent); box-shadow: 0 0 0 1px var(--color-accent); }
.rank img { width: 100%; height: 100px; object-fit: contain; margin: 0 0 .3rem; }
@media (max-width: 640px) { .card { flex-direction: column; } }
"""


def cards(answers: Answers) -> str:
    """A card for each image, and first of all the files that could not be read."""
    prediction = answers.prediction
    images = (_card(answers, row) for row in range(len(prediction)))
    return _problems(prediction.skipped) + "".join(images)


def ranking(texts: Sequence[str], cosines: Float[np.ndarray, "T N"], answers: Answers) -> str:
    """For each text the images, the nearest first; and of several texts also the one that is nearest to each image."""
    blocks = []
    for text, values in zip(texts, cosines, strict=True):
        order = np.argsort(-values, kind="stable").tolist()
        kinds = ["first", *[""] * (len(order) - 1)]
        figures = [_figure(answers, row, _value(values[row]), kind) for row, kind in zip(order, kinds, strict=True)]
        blocks.append(_block(text, figures))
    if len(texts) > 1:
        best = cosines.argmax(axis=0).tolist()
        figures = [
            _figure(answers, row, f"{_value(cosines[place, row])} {_text(texts[place])}")
            for row, place in enumerate(best)
        ]
        blocks.append(_block("The nearest text to each image", figures))
    return "".join(blocks)


def note(sentence: str) -> str:
    """A sentence instead of an answer."""
    return f'<p class="subdued">{_text(sentence)}</p>'


def _problems(skipped: Sequence[tuple[str, str]]) -> str:
    if not skipped:
        return ""
    rows = "".join(f"<div><b>{_text(name)}</b>: {_text(reason)}</div>" for name, reason in skipped)
    return f'<div class="problems">{rows}</div>'


def _card(answers: Answers, row: int) -> str:
    columns = answers.prediction.columns
    others = {name: values[row] for name, values in columns.items() if name not in _SHOWN_ELSEWHERE}
    numbers = [
        f"{_name(name)} {value:.3f}" for name, value in others.items() if isinstance(value, int | float | np.floating)
    ]
    parts = [f"<h3>{_text(columns['path'][row])}</h3>"]
    if numbers:
        parts.append(_marks(numbers))
    parts.append(_own(answers.own_prompts[row]))
    for name, value in others.items():
        if isinstance(value, str):
            parts.append(_titled(_name(name).capitalize(), f'<div class="text">{_text(value)}</div>'))
    for title, texts, values in _LISTS:
        if texts not in columns or not columns[texts][row]:
            continue
        said, numbers_of = columns[texts][row], columns[values][row]
        pairs = [(said, numbers_of)] if isinstance(said, str) else list(zip(said, numbers_of, strict=True))
        if texts == "words":
            parts.append(_titled(title, _marks([f"{word} {value:.2f}" for word, value in pairs])))
        else:
            parts.append(_titled(title, "".join(_row(text, value) for text, value in pairs)))
    return f'<article class="card">{_image(answers.thumbnails[row])}<div class="said">{"".join(parts)}</div></article>'


def _own(own: OwnPrompt) -> str:
    title = "Prompt in its metadata"
    if own.reason:
        return _titled(title, f'<div class="subdued">not to be trusted: {_text(own.reason)}</div>')
    if own.label is None:
        return ""
    shown = _row(own.label.prompt, own.cosine)
    if own.label.negative_prompt:
        shown += f'<div class="text subdued">without: {_text(own.label.negative_prompt)}</div>'
    return _titled(f"{title} ({own.label.tool})", shown)


def _row(text: str, cosine: float | None) -> str:
    """A text with its cosine, as a number and as a bar."""
    if cosine is None:
        return f'<div class="row"><span class="text">{_text(text)}</span></div>'
    share = 100 * min(1.0, max(0.0, cosine))
    bar = f'<span class="bar"><i style="width: {share:.0f}%"></i></span>'
    return f'<div class="row">{_value(cosine)}{bar}<span class="text">{_text(text)}</span></div>'


def _figure(answers: Answers, row: int, caption: str, kind: str = "") -> str:
    name = answers.prediction.columns["path"][row]
    return (
        f'<figure class="{kind}">{_image(answers.thumbnails[row])}'
        f'<div>{caption}</div><div class="subdued">{_text(name)}</div></figure>'
    )


def _block(title: str, figures: Sequence[str]) -> str:
    return f'<section class="rank"><h3>{_text(title)}</h3><div class="images">{"".join(figures)}</div></section>'


def _titled(title: str, shown: str) -> str:
    return f"<h4>{_text(title)}</h4>{shown}"


def _marks(texts: Sequence[str]) -> str:
    return f'<div class="marks">{"".join(f"""<span class="mark">{_text(text)}</span>""" for text in texts)}</div>'


def _value(cosine: float | np.floating) -> str:
    return f'<span class="value">{cosine:.3f}</span>'


def _image(jpeg: bytes) -> str:
    # In the page itself, so that no file of anybody is served.
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'


def _name(column: str) -> str:
    return column.replace("_", " ")


def _text(text: str) -> str:
    """Escaped for HTML and for the templates of the page, and with its writing direction to itself."""
    escaped = html.escape(text)
    for character in "${}`":
        escaped = escaped.replace(character, f"&#{ord(character)};")
    return f"<bdi>{escaped}</bdi>"
