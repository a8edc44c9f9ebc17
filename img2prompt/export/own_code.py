"""Those of our modules that a model needs, found by following their imports, as a wheel of their own."""

import ast
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from img2prompt.export.wheels import write_wheel

_PACKAGE = "img2prompt"
_ROOT = Path(__file__).parent.parent
NAME = "img2prompt_kaggle"


def modules_of(roots: Sequence[str]) -> dict[str, Path]:
    """The files of these modules of ours and of all that they import of us, packages included, by module name."""
    found: dict[str, Path] = {}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        path = _file_of(name)
        if name in found or path is None:
            continue
        found[name] = path
        # Importing a module imports the packages that it lies in.
        waiting += [name.rpartition(".")[0], *imports_of(path)]
    return dict(sorted(found.items()))


def others_of(modules: dict[str, Path]) -> set[str]:
    """The top-level names that these modules import and that are neither ours nor Python's."""
    names = {name.partition(".")[0] for path in modules.values() for name in imports_of(path)}
    return names - {_PACKAGE} - sys.stdlib_module_names


def imports_of(path: Path) -> Iterator[str]:
    """What a file imports wherever it stands, except for the eyes of a type checker only; of `from a import b` a and
    a.b, because b may be a module.
    """
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def write_own_wheel(modules: dict[str, Path], folder: Path) -> Path:
    """These modules as a pure wheel under a name of its own, for it is not the whole of us."""
    ours = metadata.distribution(_PACKAGE)
    about = f"{NAME}-{ours.version}.dist-info"
    entries = {path.relative_to(_ROOT.parent).as_posix(): path.read_bytes() for path in modules.values()}
    head = [
        "Metadata-Version: 2.1",
        f"Name: {NAME}",
        f"Version: {ours.version}",
        "Summary: The modules of img2prompt that one exported model needs",
        f"Requires-Python: {ours.metadata['Requires-Python']}",
        "License: MIT",
    ]
    entries[f"{about}/METADATA"] = ("\n".join(head) + "\n").encode()
    entries[f"{about}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: img2prompt\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    for file in ours.files or []:
        if file.name == "LICENSE":
            entries[f"{about}/LICENSE"] = file.read_binary()
    return write_wheel(folder / f"{NAME}-{ours.version}-py3-none-any.whl", entries)


def _file_of(name: str) -> Path | None:
    """None for what is no module of ours."""
    if name.partition(".")[0] != _PACKAGE:
        return None
    place = _ROOT.joinpath(*name.split(".")[1:])
    if (place / "__init__.py").is_file():
        return place / "__init__.py"
    file = place.with_suffix(".py")
    return file if file.is_file() else None
