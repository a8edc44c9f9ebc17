"""Pages and charts: what is text stays text, and odd numbers draw something."""

import base64
import io
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from report.markup import Page

from img2prompt.report import charts
from img2prompt.report.gallery import SHOWN, Card, ScoreRow, extremes, gallery
from img2prompt.report.page import MOST_CHARACTERS, Html, Section, code, element, facts, folded, page, phrase, table
from img2prompt.report.thumbnails import Thumbnail
from img2prompt.report.words import Prompts, cloud

HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "<style>@import url(http://evil.example/x.css);</style>",
    "<!-- --> <?php ?> <![CDATA[ ]]> &lt;b&gt; &#x3c;i&#x3e;",
    "javascript:alert(1)",
    "\x00\x08\x1b[31m\u202eright to left\u202c",
    "\ud800 half of a pair",
)


def whole(text: str) -> str:
    """A page with `text` wherever a text may be."""
    cards = gallery([Card(text, text, 0.5, {text: text})], {text: Thumbnail(text, text, b"", text)}, text)
    chart = charts.histogram([0.1, 0.2], text, {text: 0.15})
    interval = charts.intervals([(text, 0.1, 0.0, 0.2, False)], text)
    matrix = charts.heat([[0.5]], text)
    lengths = charts.shares({text: {1: 2}, text + "2": {2: 1}}, text, text)
    line = charts.curve([(0, 1)], text, text)
    bodies = [table([{text: text}], text), facts({text: text}), code(text), folded(text, code(text)), cards]
    words = cloud(Prompts().add([text]))
    bodies += [chart, interval, matrix, lengths, line, words, charts.reliability([(0.1, 0.2, 3)], text, text)]
    return page(text, text, [Section(text, body, text) for body in bodies])


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_becomes_a_tag_or_an_attribute(text):
    told = whole(text)
    found = Page(told)
    assert text in found.text or not text.isprintable()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", told) and told.encode()


@given(st.text(max_size=60))
@settings(max_examples=80, deadline=None)
def test_any_text_at_all_leaves_the_page_whole(text):
    Page(whole(text))


def test_only_what_element_made_is_html():
    assert element("p", "<b>") == "<p>&lt;b&gt;</p>" and element("p", element("b", "x")) == "<p><b>x</b></p>"
    assert isinstance(element("p"), Html) and element("p", class_=None, aria_label='"') == '<p aria-label="&quot;"></p>'
    # Put together with plain text it is plain text.
    assert not isinstance(element("b") + "<i>", Html) and not isinstance(f"{element('b')}", Html)


def test_a_heat_map_is_a_picture_of_its_values():
    drawing = charts.heat([[0.0, 1.0], [math.nan, 0.5]], "x")
    (address,) = re.findall(r'src="data:image/png;base64,([^"]+)"', drawing)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(address))))
    assert pixels[..., 3].tolist() == [[10, 255], [0, 132]] and "from 0.000 to 1.000" in drawing
    assert len(charts.heat([[0.1 * column for column in range(64)]] * 64, "x")) < 10_000


def test_long_texts_are_cut_where_it_is_seen_and_empty_ones_are_told():
    assert phrase("x" * MOST_CHARACTERS).count("x") == MOST_CHARACTERS
    cut = phrase("y" * 5000)
    assert cut.count("y") == MOST_CHARACTERS and "… (5,000 characters)" in cut
    assert "(empty)" in phrase(" \n ")


def test_a_table_shows_so_many_rows_and_says_how_many_more():
    text = table([{"a": number} for number in range(250)], "numbers")
    assert text.count("<tr>") == 101 and "and 150 more" in text and 'scope="col"' in text and "<caption>" in text


def test_odd_numbers_draw_something_or_nothing():
    assert charts.histogram([], "x") == charts.histogram([math.nan], "x") == charts.curve([], "x", "step") == ""
    assert charts.curve([(0, math.nan)], "x", "step") == charts.shares({}, "x", "words") == charts.heat([], "x") == ""
    for drawing in (
        charts.histogram([0.5] * 7, "one value"),
        charts.histogram([-1.0, math.inf, math.nan, 1.0], "odd ones"),
        charts.histogram([0.5], "x", {"mean": 0.5}, (0.5, 0.5)),
        charts.curve([(3, 0.0)], "a point", "step"),
        charts.histogram([0.1, 1e308, -1e308], "damaged"),
        charts.curve([(0, 1e308), (1, -1e308), (2, 1e90), (3, -1e-90)], "damaged", "step"),
        charts.curve([(0, 1e-12), (1, math.nan), (2, 1e12)], "a gap", "step"),
        charts.shares({"a": {0: 1}}, "no words", "words"),
        charts.shares({"a": {5: 1, 100_000: 1}, "b": {7: 1}}, "a huge one", "words"),
        charts.intervals([("a", 0.5, 0.5, 0.5, True)], "x"),
        charts.reliability([(0.5, 0.5, 1), (math.nan, 1, 1)], "x", "y"),
    ):
        assert 'role="img"' in drawing and not re.search(
            r'="[^"]*\b(nan|inf)\b[^"]*"', re.sub("aria-label=.*?>", "", drawing)
        )
        Page(page("x", "y", [Section("z", drawing)]))
    assert "2 are no numbers" in charts.histogram([-1.0, math.inf, math.nan, 1.0], "odd ones")


def bars(drawing):
    return [int(count) for count in re.findall(r"<rect[^>]*><title>[^<]*: (\d+)</title>", drawing)]


def test_a_histogram_counts_every_value_once():
    values = [number / 997 for number in range(998)] + [0.0] * 5
    assert sum(bars(charts.histogram(values, "x"))) == 1003
    assert bars(charts.histogram([0.5] * 7, "x")) == [7]


def test_a_curve_of_a_million_points_is_small_and_keeps_its_mean():
    drawing = charts.curve([(step, 5.0) for step in range(1_000_000)], "x", "step")
    assert (
        len(drawing) < 20_000 and "1,000,000 points, from 5 to 5" in drawing and "means of 4167 neighbours" in drawing
    )


def test_a_gap_costs_a_long_curve_no_more_than_its_points():
    drawing = charts.curve([(step, math.nan if step % 7 else 0.5) for step in range(70_000)], "x", "step")
    assert drawing.count("M") == 1 and "from 0.5 to 0.5" in drawing


def test_words_are_counted_by_prompt_and_rare_ones_do_not_fill_the_memory(monkeypatch):
    prompts = Prompts().add(["a red red fox", "the Red FOX's den", "星空 星空", ""])
    assert prompts.count == 4 and prompts.frequent(2) == [("fox", 2), ("red", 2)]
    assert prompts.words["星空"] == 1 and "the" not in prompts.words and prompts.lengths == {4: 2, 2: 1, 0: 1}
    drawn = cloud(prompts)
    assert "in 2 of 4 prompts" in drawn and cloud(Prompts()) == ""
    monkeypatch.setattr("img2prompt.report.words._MOST_COUNTED", 100)
    many = Prompts().add(f"fox {''.join(chr(97 + int(digit)) for digit in f'{number:04d}')}q" for number in range(2000))
    assert len(many.words) <= 101 and many.words["fox"] == 2000


def rows(*cosines):
    return [
        ScoreRow(f"{number:03d}", "s", cosine, f"prompt {number // 2}", "n", 0.5)
        for number, cosine in enumerate(cosines)
    ]


def test_best_and_worst_are_of_other_prompts_and_have_numbers():
    found = extremes(rows(*(number / 100 for number in range(40)), math.nan))
    assert [one.id for one in found["best"]] == [f"{39 - 2 * number:03d}" for number in range(SHOWN)]
    assert [one.id for one in found["worst"]] == [f"{2 * number:03d}" for number in range(SHOWN)]
    assert len({one.prompt for one in found["random"]}) == SHOWN
    assert found == extremes(rows(*(number / 100 for number in range(40)), math.nan)[::-1])
    assert extremes(rows(math.nan)) == {"best": [], "worst": [], "random": []}


def test_the_diagonal_stays_in_its_plot():
    drawn = str(charts.reliability([(0.641, 0.65, 5), (0.73, 0.7, 5), (0.812, 0.806, 5)], "x", "y"))
    (line,) = re.findall(r"<line [^>]*class=\"mean\"[^>]*>", drawn)
    ends = {name: float(value) for name, value in re.findall(r"(x1|x2|y1|y2)=\"([-0-9.]+)\"", line)}
    frame = re.findall(r"<line [^>]*class=\"grid\"[^>]*>", drawn)
    sides = [float(value) for one in frame for value in re.findall(r"x[12]=\"([-0-9.]+)\"", one)]
    assert min(sides) <= ends["x1"] < ends["x2"] <= max(sides)
