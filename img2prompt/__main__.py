"""`python -m img2prompt <command> key=value …`: the same commands as train.py and predict.py."""

import sys

from img2prompt.commands.door import COMMANDS, main


def run() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            f"usage: img2prompt <command> key=value …\ncommands: {', '.join(COMMANDS)}\n"
            "img2prompt <command> --help shows the keys of a command."
        )
        return
    command = arguments[0]
    if command not in COMMANDS:
        sys.exit(f"{command}: no such command; commands: {', '.join(COMMANDS)}")
    main(command, arguments[1:])


if __name__ == "__main__":
    run()
