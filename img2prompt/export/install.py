"""What the notebook of `format=kaggle` runs first: the wheels beside it are unpacked where the model can import them.

This file imports nothing but the standard library, because it runs before anything is installed.
"""

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

LIST = "img2prompt_wheels.json"


def install(folder: Path, site: Path) -> None:
    """Installs the wheels of `folder` into `site`, without asking any index and without what they depend on.

    A package of which no wheel is for this Python is left to what is installed here; ValueError where nothing is, and
    for a wheel that has changed on its way.
    """
    listed = json.loads((folder / LIST).read_text(encoding="utf-8"))["wheels"]
    chosen: list[str] = []
    for wheel in listed:
        path = folder / wheel["file"]
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != wheel["sha256"]:
            raise ValueError(f"{path}: missing, or not as it was exported; upload the whole folder again")
        if fits(wheel["file"], here()):
            chosen.append(str(path))
        else:
            print(_instead(wheel["name"], wheel["version"]))
    # What is imported is found in `site` alone, so that nothing of this machine is replaced.
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--quiet",
        "--target",
        str(site),
    ]
    done = subprocess.run([*pip, *chosen], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"pip installed none of the wheels in {folder}: {done.stderr.strip()[-500:]}")
    print(f"{len(chosen)} wheels installed into {site}")


def here() -> tuple[int, int]:
    return sys.version_info[:2]


def fits(wheel: str, python: tuple[int, int], machine: str | None = None) -> bool:
    """Whether a wheel of this file name is for that CPython on Linux, on this kind of machine or on `machine`."""
    kinds, interfaces, systems = (part.split(".") for part in wheel.removesuffix(".whl").split("-")[-3:])
    machine = machine or platform.machine()
    if not any(one == "any" or ("linux" in one and one.endswith(f"_{machine}")) for one in systems):
        return False
    if "none" in interfaces:
        return any(one.startswith("py3") for one in kinds) or _cp(python) in kinds
    if "abi3" in interfaces:
        return any(_version(one) <= python for one in kinds if one.startswith("cp3"))
    return _cp(python) in interfaces


def _cp(python: tuple[int, int]) -> str:
    return f"cp{python[0]}{python[1]}"


def _version(kind: str) -> tuple[int, int]:
    # cp310 -> (3, 10)
    return int(kind[2]), int(kind[3:] or 0)


def _instead(name: str, version: str) -> str:
    major, minor = here()
    told = f"{name} {version} has no wheel here for Python {major}.{minor} on {platform.machine()}"
    remedy = f"export again with python={major}.{minor}"
    try:
        return f"{told}; {metadata.version(name)}, which is installed on this machine, is used ({remedy} for the other)"
    except metadata.PackageNotFoundError:
        raise ValueError(f"{told}, and none is installed on this machine; {remedy}") from None


def main(arguments: Sequence[str]) -> None:
    folder, site = map(Path, arguments)
    try:
        install(folder, site)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
