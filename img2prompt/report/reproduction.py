"""The command that makes again what a report is of."""

import shlex
from collections.abc import Sequence
from typing import Any

from img2prompt.report.page import Html, code, element, joined

_NOTE = "Relative paths begin where it was started."


def command_of(verb: str, overrides: Sequence[str]) -> str:
    """What a shell is to be given to run `verb` with these arguments."""
    return shlex.join(["python", "-m", "img2prompt", verb, *overrides])


def reproduction(verb: str, overrides: Any) -> Html:
    """Nothing where the arguments were not recorded, as in a run from Python."""
    if not isinstance(overrides, list):
        return Html("")
    title = element("h3", "The command to reproduce it")
    return joined([title, code(command_of(verb, [*map(str, overrides)])), element("p", _NOTE, class_="note")])
