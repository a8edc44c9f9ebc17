"""Installed packages as wheels again: the versions that were tested, without asking an index."""

import base64
import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping
from importlib import metadata
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# What an installer wrote, and not the wheel.
_OF_INSTALLERS = ("RECORD", "RECORD.jws", "INSTALLER", "REQUESTED", "direct_url.json", "uv_cache.json", "uv_build.json")
_LINUX = ("2_34", "2_31", "2_28", "2_27", "2_26", "2_24", "2_17", "2014", "2010", "1")


def closure_of(names: Iterable[str]) -> dict[str, metadata.Distribution]:
    """The installed packages of these names and all that they require here, by canonical name; ValueError names what is
    not installed.
    """
    found: dict[str, metadata.Distribution] = {}
    waiting = [(name, "", "") for name in sorted(names)]
    seen = set()
    while waiting:
        name, extra, wanted_by = waiting.pop()
        key = canonicalize_name(name)
        if (key, extra) in seen:
            continue
        seen.add((key, extra))
        try:
            found[key] = distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise ValueError(
                f"{wanted_by or 'img2prompt'} requires {name}, which is not installed: pip install {name}"
            ) from None
        for text in distribution.requires or []:
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                waiting += [(need.name, one, name) for one in ("", *need.extras)]
    return found


def tags_of(distribution: metadata.Distribution) -> list[str]:
    """The tags of the wheel that a package was installed from; ValueError where it came from none."""
    tags = re.findall(r"^Tag: (\S+)$", distribution.read_text("WHEEL") or "", re.MULTILINE)
    link = json.loads(distribution.read_text("direct_url.json") or "{}")
    if distribution.files and tags and not link.get("dir_info", {}).get("editable"):
        return tags
    told = f"{distribution.name}=={distribution.version}"
    raise ValueError(
        f"{told} is not installed from a wheel, so it cannot be carried along; install it from one: pip install "
        f"--force-reinstall --no-deps {told}"
    )


def repacked(distribution: metadata.Distribution, folder: Path) -> Path:
    """The wheel that an installed package came from, in `folder`, without its programs and compiled caches.

    ValueError for a package that is installed editable, or whose files are not all there.
    """
    name, version, tags = distribution.name, distribution.version, tags_of(distribution)
    entries: dict[str, bytes] = {}
    for file in distribution.files or []:
        in_about = file.parent.name.endswith(".dist-info") and file.name in _OF_INSTALLERS
        if in_about or file.suffix == ".pyc" or ".." in file.parts or Path(file).is_absolute():
            continue
        try:
            entries[file.as_posix()] = file.read_binary()
        except OSError as error:
            raise ValueError(
                f"{name} {version}: its file {file} cannot be read ({error.strerror}); install it again"
            ) from None
    kinds, interfaces, systems = (sorted({tag.split("-")[i] for tag in tags}) for i in range(3))
    plain = re.sub(r"[-_.]+", "_", name).lower()
    parts = (plain, version, ".".join(kinds), ".".join(interfaces), ".".join(systems))
    return write_wheel(folder / f"{'-'.join(parts)}.whl", entries)


def fetched(name: str, version: str, python: tuple[int, int], folder: Path) -> Path:
    """The wheel of this version for another CPython on Linux (x86_64), from the package index; ValueError where it
    cannot be had.
    """
    number = f"{python[0]}.{python[1]}"
    command = ["pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--implementation", "cp", "--python-version", number, "--dest", str(folder)]
    command += [f"--platform=manylinux{'_' if '_' in one else ''}{one}_x86_64" for one in _LINUX]
    before = set(folder.glob("*.whl"))
    done = subprocess.run(
        [sys.executable, "-m", *command, f"{name}=={version}"], env=with_pip(), capture_output=True, text=True
    )
    new = sorted(set(folder.glob("*.whl")) - before)
    if done.returncode or len(new) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise ValueError(
            f"python={number}: the package index gave no wheel of {name} {version} for it ({' '.join(lines[-1:])}); "
            f"export without python=, and the {name} of the machine that it runs on is used"
        )
    return new[0]


def with_pip() -> dict[str, str]:
    """An environment in which `python -m pip` works, also where pip is not installed, as uv leaves it."""
    if find_spec("pip") is not None or find_spec("ensurepip") is None:
        return dict(os.environ)
    # Python's own copy is a wheel, and a wheel can be imported as it is.
    copies = (files("ensurepip") / "_bundled").iterdir()
    pip = [str(one) for one in copies if one.name.startswith("pip-")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*pip, *filter(None, [os.environ.get("PYTHONPATH")])])}


def write_wheel(path: Path, entries: Mapping[str, bytes]) -> Path:
    """A wheel of these files, and the record of them, that belongs to the only dist-info among them."""
    about = {name.partition("/")[0] for name in entries if name.partition("/")[0].endswith(".dist-info")}
    assert len(about) == 1, about
    record = f"{about.pop()}/RECORD"
    rows = io.StringIO(newline="")
    writer = csv.writer(rows, lineterminator="\n")
    for name, data in sorted(entries.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        writer.writerow((name, f"sha256={digest}", len(data)))
    writer.writerow((record, "", ""))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in [*sorted(entries.items()), (record, rows.getvalue().encode())]:
            # An entry that is made of a name has no date of today: equal files, equal wheels.
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return path
