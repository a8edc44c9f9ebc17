"""Reads a report as a browser would, and refuses what it must never have."""

import re
from html.parser import HTMLParser

PAGE_TAGS = set(
    "html head meta title style body header main section nav a h1 h2 h3 p div span strong bdi ul li dl dt dd table "
    "caption thead tbody tr th td figure figcaption pre code details summary img".split()
)
SVG_TAGS = set("svg text line circle rect path title".split())
ATTRIBUTES = set(
    "lang charset http-equiv content name id class aria-label aria-labelledby role tabindex scope dir href src alt "
    "loading title viewbox x y x1 x2 y1 y2 cx cy r d width height fill-opacity".split()
)
VOID = {"img", "meta"}


class Page(HTMLParser):
    """The texts of a page, its images, and the tags that were open at the end."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.texts, self.images, self.open = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert tag in PAGE_TAGS | SVG_TAGS, tag
        for name, value in attributes:
            assert name in ATTRIBUTES, name
            if name == "href":
                assert re.fullmatch(r"#s\d+", value), value
            if name == "src":
                assert tag == "img" and re.fullmatch(r"data:image/(?:jpeg|png);base64,[A-Za-z0-9+/=]+", value)
        if tag == "img":
            self.images.append(dict(attributes))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        raise AssertionError(f"<{tag}/>")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_comment(self, data):
        raise AssertionError(data)

    def handle_pi(self, data):
        raise AssertionError(data)

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            assert "url(" not in data and "@import" not in data and "expression" not in data
        else:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


def read(path) -> Page:
    text = path.read_text(encoding="utf-8")
    assert text.startswith('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">')
    assert "default-src &#x27;none&#x27;; img-src data:" in text
    return Page(text)
