"""The door of every command: help without torch, errors as sentences, exit codes that scripts can trust."""

import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from img2prompt.commands.arguments import quoted_paths
from img2prompt.commands.conf import help_text

COMMANDS = (
    "train",
    "predict",
    "merge",
    "fit",
    "synthesize",
    "export",
    "curriculum",
    "sweep",
    "vary",
    "evaluate",
    "report",
    "app",
)
# Whose keys are another command's.
_KEYS_OF = {"curriculum": "train"}
# Hydra has some for train; the others tell by themselves what is to be done instead.
_WITH_OPTIONS = ("train", "curriculum", "sweep")
_FIRST_LINES = {
    "curriculum": "# img2prompt curriculum run_dir=DIR key=value …\n#\n"
    "# Trains twice: DIR/record finds out which pairs are easy, DIR/easy_first begins with them\n"
    "# (curriculum.stages=3). All other keys are those of train:\n\n"
}
_TRACEBACK = "IMG2PROMPT_TRACEBACK"


def main(command: str, arguments: list[str] | None = None) -> None:
    """Runs one command with `arguments` (sys.argv by default) and exits: 0, 1 with one sentence, 130 on Ctrl-C, or 143
    on SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument in ("-h", "--help") for argument in arguments):
        try:
            _help(command, arguments)
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever reads has seen enough; Python would complain once more when it closes the pipe.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    # Lightning would end the run on SIGTERM as if it had succeeded; it leaves a handler that is there alone.
    signal.signal(signal.SIGTERM, _terminated)
    if command == "export" and signal.getsignal(getattr(signal, "SIGHUP", signal.SIGTERM)) == signal.SIG_DFL:
        # A terminal that is closed: what is half written is removed.
        signal.signal(signal.SIGHUP, _terminated)
    if command == "train" and "WORLD_SIZE" in os.environ and int(os.environ.get("RANK", 0)) > 0:
        # Out of a stage, where all stop together, it is for the first process, or for torchrun, to end this one.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN if "IMG2PROMPT_STARTED" in os.environ else signal.SIG_DFL)
        import_module("img2prompt.commands.follow").main()
        return
    try:
        odd = next((argument for argument in arguments if argument.startswith("-")), None)
        if odd is not None and command not in _WITH_OPTIONS:
            raise ValueError(f"{odd}: {command} takes no options; its keys are written key=value, see --help")
        quoted = quoted_paths(arguments)
        if command not in (*_KEYS_OF, "sweep") and not any(argument.startswith("-") for argument in arguments):
            # What is wrong with a key is said before seconds of imports; a sweep has its values checked job by job.
            from img2prompt.commands.settings import chosen_config, compose

            compose(chosen_config(command, quoted), quoted)
        run: Callable[[list[str]], Any] = import_module(f"img2prompt.commands.{command}").main
        # What it passes on is quoted there.
        run(arguments if command in (*_KEYS_OF, "sweep") else quoted)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        from img2prompt.commands.sentences import sentence_of

        sentence = sentence_of(_KEYS_OF.get(command, command), error)
        if sentence is None or os.environ.get(_TRACEBACK):
            raise
        print(f"{command}: {sentence}\n({_TRACEBACK}=1 shows where)", file=sys.stderr)
        sys.exit(1)


def _help(command: str, arguments: list[str]) -> None:
    chosen = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    print(_FIRST_LINES.get(command, "") + help_text(_KEYS_OF.get(command, command), chosen))
    others = {"fit": ("fit_predictor", "fit_confidence"), "evaluate": ("evaluate_classes", "evaluate_variations")}
    for more in others.get(command, ()):
        print(f"\n{help_text(more, chosen)}")


def _terminated(number: int, frame: Any) -> None:
    print("terminated", file=sys.stderr)
    sys.exit(128 + number)
