"""Imports go one way: a module may import only from its own line or from lines above it."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "img2prompt"

LINES = (
    ("files", "hub", "ranks", "search", "ridge", "build", "prediction", "predictions", "data.sample"),
    ("cache",),
    ("bank", "metrics", "losses", "heads", "encoders", "data"),
    ("regressor", "merging", "synthesis", "provenance"),
    ("sdipc",),
    ("predictors", "refine", "training"),
    ("compose", "submission", "export", "evaluation", "classification", "report", "sweep"),
    ("app",),
    ("commands", "__main__"),
)
# The demo's source asks the generator, one line further down, what it draws.
EXCEPTIONS = {("data.drawings", "synthesis")}


def line_of(module: str) -> int:
    for number, names in enumerate(LINES):
        if any(module == name for name in names):
            return number
    for number, names in enumerate(LINES):
        if any(module.startswith(f"{name}.") for name in names):
            return number
    raise AssertionError(f"{module} has no line")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("img2prompt"):
            base = node.module.removeprefix("img2prompt").lstrip(".")
            found |= {base} if base else {alias.name for alias in node.names}
    return found


def modules() -> dict[str, Path]:
    paths = {path: path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")}
    return {name.replace("/", "."): path for path, name in paths.items() if not name.endswith("__init__")}


def test_imports_go_one_way():
    wrong = [
        f"{module} imports {imported}"
        for module, path in modules().items()
        for imported in imports_of(path)
        if line_of(imported) > line_of(module) and (module, imported.split(".")[0]) not in EXCEPTIONS
    ]
    assert not wrong


def test_the_order_test_sees_imports():
    assert "training.stages" in imports_of(PACKAGE / "commands" / "assembly.py")


def test_lightning_is_used_in_training_and_its_command_only():
    users = {
        module
        for module, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning")
    }
    assert users and all(
        user.startswith("training.") or user in ("commands.assembly", "commands.train") for user in users
    )
