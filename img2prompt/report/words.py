"""What the prompts of a report are like: how long they are, and which words most of them have."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from img2prompt.data.labels import words_of
from img2prompt.report.page import Html, element

SHOWN = 80
_SIZES = 7
_LONGEST = 30  # letters
# Ever more different words must not fill the memory: rare ones are forgotten.
_MOST_COUNTED = 200_000
_STOP_WORDS = frozenset(
    "about after all also an and are as at be been but by can do for from had has have he her his how if in into is it "
    "its me my no not of off on one or our out over she so some than that the their them then there these they this to "
    "up very was we were what when where which who will with would you your".split()
)


@dataclass
class Prompts:
    """Of prompts that went by: how many, how many of each number of words, and how many have each word."""

    count: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    words: Counter[str] = field(default_factory=Counter)

    def add(self, prompts: Iterable[str]) -> "Prompts":
        for prompt in prompts:
            self.count += 1
            self.lengths[len(prompt.split())] += 1
            found = (word for word in words_of(prompt) if word not in _STOP_WORDS and len(word) <= _LONGEST)
            self.words.update(dict.fromkeys(found, 1))
            if len(self.words) > _MOST_COUNTED:
                self.words = Counter(dict(self.frequent(_MOST_COUNTED // 2)))
        return self

    def frequent(self, most: int) -> list[tuple[str, int]]:
        """The words that most prompts have, the alphabet deciding between equals."""
        return sorted(self.words.items(), key=lambda item: (-item[1], item[0]))[:most]


def cloud(prompts: Prompts) -> Html:
    """The most frequent words in alphabetical order, larger where more prompts have them.

    A list that flows as text does: no word covers another in any script, and it can be read aloud.
    """
    words = prompts.frequent(SHOWN)
    if not words:
        return Html("")
    most, least = words[0][1] ** 0.5, words[-1][1] ** 0.5
    items = []
    for word, count in sorted(words):
        size = 1 + round((_SIZES - 1) * (count**0.5 - least) / (most - least or 1))
        title = f"in {count:,} of {prompts.count:,} prompts"
        items.append(element("li", element("bdi", word, title=title), class_=f"w{size}"))
    return element("ul", *items, class_="cloud", aria_label="Words, larger where more prompts have them")
