"""What the configuration files say, read without Hydra: `--help` must not wait for imports."""

import re
from collections.abc import Mapping
from pathlib import Path


def conf_folder() -> Path:
    """Where the configuration lies: in the installed package or, in a checkout, beside it."""
    package = Path(__file__).parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def help_text(command: str, chosen: Mapping[str, str] | None = None) -> str:
    """The keys of a command with their defaults; of groups those of the `chosen` choices, else of the usual ones."""
    folder = conf_folder()
    root = (folder / f"{command}.yaml").read_text().rstrip()
    lines = [root.partition("\nhydra:")[0].rstrip()]
    choices = groups(folder)
    for group, choice in re.findall(r"^  - (\w+): (\w+)$", root, re.MULTILINE):
        named = (chosen or {}).get(group)
        choice = named if named in choices[group] else choice
        lines += ["", f"{group}={choice}    choices: {', '.join(choices[group])}"]
        # Of these there are few, and their keys differ.
        more = (
            [one for one in choices[group] if one != choice] if group in ("generator", "refiner", "predictor") else []
        )
        for one in [choice, *more]:
            lines += [f"  {line}" for line in (folder / group / f"{one}.yaml").read_text().rstrip().splitlines()]
    if re.search(r"^  - (\w+): (\w+)$", root, re.MULTILINE):
        lines += ["", f"Keys of another choice: img2prompt {command.split('_')[0]} GROUP=CHOICE --help"]
    if command == "sweep":
        for space in choices["sweep"]:
            text = (folder / "sweep" / f"{space}.yaml").read_text().rstrip()
            lines += ["", f"+sweep={space}", *(f"  {line}" for line in text.splitlines())]
        lines += ["", "All other keys are those of train, and hold for every trial: img2prompt train --help"]
    if command != "train":
        return "\n".join(lines)
    lines += ["", f"+experiment=    choices: {', '.join(choices['experiment'])}"]
    lines.append("Options of Hydra: -m (sweep over a,b), --cfg job (show the configuration), --info")
    return "\n".join(lines)


def groups(folder: Path) -> dict[str, list[str]]:
    return {
        group.name: sorted(choice.stem for choice in group.glob("*.yaml"))
        for group in sorted(folder.iterdir())
        if group.is_dir()
    }


def root_keys(command: str) -> list[str]:
    import yaml

    text = yaml.safe_load((conf_folder() / f"{command}.yaml").read_text())
    groups = [next(iter(item)) for item in text.get("defaults", []) if isinstance(item, Mapping)]
    keys = [key for key in text if key not in ("defaults", "hydra")]
    return list(dict.fromkeys(keys + [group for group in groups if not group.startswith("override")]))
