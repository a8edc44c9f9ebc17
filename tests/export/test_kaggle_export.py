"""`format=kaggle`: the folder makes the submission by itself, where nothing but torch and its kin is installed."""

import base64
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from exporting import FAMILIES, MINILM, tiny
from PIL import Image

from img2prompt.commands.arguments import quoted_paths
from img2prompt.commands.export import main as export_main
from img2prompt.data.images import decode
from img2prompt.export import install, isolation, kaggle
from img2prompt.export.check import Agreement, drawn
from img2prompt.export.competition import embed, found_images, precision_of, submit
from img2prompt.export.install import LIST, fits
from img2prompt.export.kaggle import GIVEN, write_kaggle
from img2prompt.export.own_code import imports_of, modules_of, others_of
from img2prompt.export.wheels import closure_of, repacked, with_pip
from img2prompt.predictors.trained import load
from img2prompt.regressor import Target
from img2prompt.submission import DIMENSION

ITEMS = drawn()[:3]
RUNNER = """
import json, sys
cells = json.load(open(sys.argv[1]))["cells"]
shared = {}
for cell in cells:
    if cell["cell_type"] == "code":
        exec("".join(cell["source"]), shared)
"""
needs_pip = pytest.mark.skipif(
    subprocess.run([sys.executable, "-m", "pip", "--version"], env=with_pip(), capture_output=True).returncode != 0,
    reason="this Python has no pip, and no copy of it",
)


def tiny_checkpoint(path: Path, family: str, target: Target = MINILM) -> Path:
    tiny(FAMILIES[family], target=target).save(path)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(family) -> its checkpoint, and the folder that was made of it."""
    made: dict[str, tuple[Path, Path]] = {}

    def export(family: str) -> tuple[Path, Path]:
        if family not in made:
            place = tmp_path_factory.mktemp(family)
            folder = place / "export"
            folder.mkdir()
            checkpoint = tiny_checkpoint(place / "tiny.safetensors", family)
            write_kaggle(checkpoint, folder, None, ITEMS, "drawn images")
            made[family] = checkpoint, folder
        return made[family]

    return export


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """A Python that has torch, torchvision, numpy, Pillow, what these require, and nothing else."""
    place = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(place, symlinks=True, with_pip=False)
    (site,) = place.glob("lib/python*/site-packages")
    for distribution in closure_of(GIVEN).values():
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    return place / "bin" / "python"


@pytest.fixture(scope="module")
def competition(tmp_path_factory) -> Path:
    """Images of several sizes, one that is none, and a sample submission that has another order and one image more."""
    folder, drawn = tmp_path_factory.mktemp("competition"), np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(5):
        pixels = drawn.integers(0, 256, (40 + 13 * i, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"im_{i}.png")
    (folder / "images" / "broken.png").write_bytes(b"<html>")
    order = ["im_3", "broken", "absent", "im_0", "im_1"]
    rows = [f"{one}_{i},0.0\n" for one in order for i in range(DIMENSION)]
    (folder / "sample_submission.csv").write_text("imgId_eId,val\n" + "".join(rows))
    return folder


def run_notebook(python: Path, folder: Path, competition: Path, work: Path) -> subprocess.CompletedProcess[str]:
    """Runs the cells with that Python, in a process (and its children) that can open no connection."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT / "tests" / "offline"), *with_pip().get("PYTHONPATH", "").split(os.pathsep)[:1]]
        ),
        "CONNECTIONS": str(work / "connections"),
        "OMP_NUM_THREADS": "1",
        "IMG2PROMPT_LIST": str(folder / LIST),
        "IMG2PROMPT_IMAGES": str(competition / "images"),
    }
    command = [str(python), "-c", RUNNER, str(folder / "submission.ipynb")]
    return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=300)


def embeddings_of(submission: Path) -> dict[str, np.ndarray]:
    found: dict[str, list[float]] = {}
    with submission.open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["imgId_eId"].rpartition("_")[0], []).append(float(row["val"]))
    return {name: np.array(values) for name, values in found.items()}


def assert_notebook_equals_checkpoint(python: Path, checkpoint: Path, folder: Path, competition: Path, work: Path):
    done = run_notebook(python, folder, competition, work)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (work / "connections").exists()
    found = embeddings_of(work / "submission.csv")
    assert list(found) == ["im_3", "broken", "absent", "im_0", "im_1", "im_2", "im_4"]
    trained = load(checkpoint, "cpu")
    ids = [f"im_{i}" for i in range(5)]
    images = [decode((competition / "images" / f"{one}.png").read_bytes()) for one in ids]
    wanted = trained.predict_batch(ids, [trained.prepare(image) for image in images]).embeddings
    cosines = [float(found[one] @ row) for one, row in zip(ids, wanted, strict=True)]
    assert min(cosines) >= 0.99999
    # Another image's prediction would not do.
    assert len({round(float(row[0]), 7) for row in wanted}) == 5
    mean = trained.mean.numpy() / np.linalg.norm(trained.mean.numpy())
    for name in ("broken", "absent"):
        assert found[name] @ mean == pytest.approx(1, abs=1e-5)
        assert f"{name}: " in done.stdout
    assert "not an image of a known format" in done.stdout


@needs_pip
@pytest.mark.parametrize("family", ["timm", "openclip", pytest.param("huggingface", marks=pytest.mark.slow)])
def test_the_notebook_needs_nothing_but_torch_and_its_folder(family, exported, bare_python, competition, tmp_path):
    checkpoint, folder = exported(family)
    names = ("img2prompt", "timm", "open_clip", "transformers", "safetensors", "jaxtyping", "pyarrow", "simplejpeg")
    program = f"import importlib.util as u; print([n for n in {names} if u.find_spec(n)])"
    assert subprocess.check_output([bare_python, "-I", "-c", program], text=True).strip() == "[]"
    assert_notebook_equals_checkpoint(bare_python, checkpoint, folder, competition, tmp_path)


@needs_pip
def test_a_folder_that_lost_a_wheel_says_so(exported, bare_python, competition, tmp_path):
    _, folder = exported("timm")
    for file in folder.iterdir():
        if not file.name.startswith("timm-"):
            (tmp_path / file.name).symlink_to(file)
    done = run_notebook(bare_python, tmp_path, competition, tmp_path)
    assert done.returncode != 0 and "missing, or not as it was exported; upload the whole folder again" in done.stdout
    assert "Traceback" not in done.stdout
    assert not (tmp_path / "submission.csv").exists()


@pytest.mark.network
@pytest.mark.parametrize("family", ["timm", "openclip", "huggingface"])
def test_the_notebook_runs_with_torch_2_6(family, exported, older_python, competition, tmp_path):
    assert_notebook_equals_checkpoint(older_python, *exported(family), competition, tmp_path)


@pytest.fixture(scope="module")
def older_python(tmp_path_factory) -> Path:
    """A Python with the oldest torch; IMG2PROMPT_OLDER_PYTHON names one that is there already."""
    if "IMG2PROMPT_OLDER_PYTHON" in os.environ:
        return Path(os.environ["IMG2PROMPT_OLDER_PYTHON"])
    place = tmp_path_factory.mktemp("older")
    venv.create(place, symlinks=True, with_pip=True)
    packages = ["torch==2.6.0", "torchvision==0.21.0", "numpy==1.26.4", "pillow==11.0.0", "typing_extensions==4.12.2"]
    subprocess.run([place / "bin" / "python", "-m", "pip", "install", "--quiet", *packages], check=True)
    return place / "bin" / "python"


@pytest.mark.network
def test_wheels_of_another_python_come_from_the_index(tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "tiny.safetensors", "timm")
    folder = tmp_path / "export"
    folder.mkdir()
    other = (3, 13) if sys.version_info[:2] == (3, 12) else (3, 12)
    write_kaggle(checkpoint, folder, f"{other[0]}.{other[1]}", ITEMS, "drawn images")
    assert all(fits(wheel.name, other, "x86_64") for wheel in folder.glob("*.whl"))


def test_the_folder_is_flat_and_its_names_are_plain(exported):
    _, folder = exported("openclip")
    files = list(folder.iterdir())
    assert all(file.is_file() and re.fullmatch(r"[A-Za-z0-9._-]+", file.name) for file in files)
    assert {"model.safetensors", "submission.ipynb", LIST} <= {file.name for file in files}
    listed = json.loads((folder / LIST).read_text())["wheels"]
    assert {one["file"] for one in listed} == {file.name for file in folder.glob("*.whl")}


def test_the_weights_are_the_checkpoint_unchanged(exported):
    checkpoint, folder = exported("timm")
    assert (folder / "model.safetensors").read_bytes() == checkpoint.read_bytes()


def test_every_wheel_is_what_its_record_says_and_brings_its_licence(exported):
    _, folder = exported("openclip")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            (record,) = [name for name in names if name.endswith(".dist-info/RECORD")]
            rows = list(csv.reader(archive.read(record).decode().splitlines()))
            assert [row[0] for row in rows] == names
            for name, digest, size in rows[:-1]:
                data = archive.read(name)
                found = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
                assert (digest, int(size)) == (f"sha256={found}", len(data))
            assert not any(name.endswith((".pyc", "INSTALLER")) for name in names)
            about = archive.read(record.replace("RECORD", "METADATA")).decode()
            has_file = any(re.search(r"(?i)dist-info/.*(licen[cs]e|copying)", name) for name in names)
            assert has_file or re.search(r"(?m)^(License|Classifier: License)", about), wheel.name


def test_a_wheel_is_equal_whenever_it_is_made(tmp_path):
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        found.append(repacked(metadata.distribution("jaxtyping"), tmp_path / name))
    assert found[0].name == found[1].name and found[0].read_bytes() == found[1].read_bytes()


def test_the_wheels_are_those_of_the_tested_versions_and_few(exported):
    _, folder = exported("timm")
    listed = {one["name"]: one["version"] for one in json.loads((folder / LIST).read_text())["wheels"]}
    assert {"timm", "safetensors", "jaxtyping"} <= set(listed)
    for name, version in listed.items():
        assert name == "img2prompt-kaggle" or metadata.version(name) == version
    # What Kaggle has, what training needs, what another family needs, and what is required and never imported.
    assert not set(listed) & {"torch", "numpy", "sympy", "lightning", "pyarrow", "open_clip_torch", "hf-xet", "click"}


def test_our_code_goes_along_by_what_it_imports():
    roots = ("img2prompt.export.competition", "img2prompt.export.install", "img2prompt.encoders.timm_model")
    modules = modules_of(roots)
    assert {"img2prompt", "img2prompt.encoders", "img2prompt.encoders.blocks", "img2prompt.files"} <= set(modules)
    assert not any(name.startswith(("img2prompt.training", "img2prompt.commands")) for name in modules)
    assert others_of(modules) == {"PIL", "huggingface_hub", "jaxtyping", "numpy", "safetensors", "timm", "torch"}


def test_imports_are_found_wherever_they_stand_but_not_for_type_checkers(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nimport a.b\nif TYPE_CHECKING:\n    import never\nelse:\n    import c\n"
        "def f():\n    try:\n        from d import e\n    except ImportError:\n        import g\n"
    )
    assert set(imports_of(file)) == {"typing", "typing.TYPE_CHECKING", "a.b", "c", "d", "d.e", "g"}


def test_the_notebook_is_valid_and_small(exported):
    _, folder = exported("timm")
    notebook = json.loads((folder / "submission.ipynb").read_bytes().decode("ascii"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    ids = [cell["id"] for cell in cells]
    assert len(set(ids)) == len(ids) <= 6 and all(re.fullmatch(r"[a-zA-Z0-9-_]{1,64}", one) for one in ids)
    for cell in cells:
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert set(cell) == {"id", "cell_type", "metadata", "source"} | code
        if code:
            assert cell["source"][0].startswith("# ")
            compile("".join(cell["source"]), cell["id"], "exec")


@pytest.mark.parametrize(
    ("wheel", "python", "machine", "does"),
    [
        ("timm-1.0-py3-none-any.whl", (3, 13), "x86_64", True),
        ("six-1.16-py2.py3-none-any.whl", (3, 13), "x86_64", True),
        ("old-1.0-py2-none-any.whl", (3, 13), "x86_64", False),
        ("regex-1-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl", (3, 11), "x86_64", True),
        ("regex-1-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl", (3, 12), "x86_64", False),
        ("regex-1-cp311-cp311-manylinux2014_x86_64.whl", (3, 11), "aarch64", False),
        ("regex-1-cp311-cp311-macosx_11_0_x86_64.whl", (3, 11), "x86_64", False),
        ("safetensors-1-cp310-abi3-manylinux2014_x86_64.whl", (3, 12), "x86_64", True),
        ("safetensors-1-cp313-abi3-manylinux2014_x86_64.whl", (3, 12), "x86_64", False),
        ("tool-1-py3-none-manylinux2014_x86_64.whl", (3, 12), "x86_64", True),
    ],
)
def test_a_wheel_fits_as_its_tags_say(wheel, python, machine, does):
    assert fits(wheel, python, machine) == does
    if "macosx" not in wheel and machine == "x86_64":
        from packaging.tags import compatible_tags, cpython_tags
        from packaging.utils import parse_wheel_filename

        platforms = ["manylinux_2_17_x86_64", "manylinux2014_x86_64"]
        tags = {*cpython_tags(python, platforms=platforms), *compatible_tags(python, platforms=platforms)}
        assert bool(parse_wheel_filename(wheel)[3] & tags) == does


def test_a_package_without_a_wheel_for_this_python_is_left_to_what_is_installed(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: ran.append(command) or subprocess.CompletedProcess([], 0, "", "")
    )

    def folder_of(name: str) -> Path:
        file = f"{name}-0-cp37-cp37m-manylinux2014_x86_64.whl"
        (tmp_path / file).write_bytes(b"wheel")
        one = {"name": name, "version": "0", "file": file, "sha256": hashlib.sha256(b"wheel").hexdigest()}
        (tmp_path / LIST).write_text(json.dumps({"wheels": [one]}))
        return tmp_path

    install.install(folder_of("numpy"), tmp_path / "site")
    told = capsys.readouterr().out
    assert f"{np.__version__}, which is installed on this machine, is used" in told
    assert f"python={sys.version_info[0]}.{sys.version_info[1]}" in told
    assert not any("numpy-0" in argument for argument in ran[0])
    assert {"--no-index", "--no-deps"} <= set(ran[0])
    with pytest.raises(ValueError, match="none is installed on this machine; export again with python=3"):
        install.install(folder_of("nowhere"), tmp_path / "site")


@pytest.mark.parametrize("arrived", [b"wheeL", b"", None])
def test_a_wheel_that_changed_on_its_way_is_not_installed(arrived, tmp_path):
    one = {"name": "a", "version": "1", "file": "a-1-py3-none-any.whl", "sha256": hashlib.sha256(b"wheel").hexdigest()}
    (tmp_path / LIST).write_text(json.dumps({"wheels": [one]}))
    if arrived is not None:
        (tmp_path / one["file"]).write_bytes(arrived)
    with pytest.raises(ValueError, match="a-1-py3-none-any.whl: missing, or not as it was exported"):
        install.install(tmp_path, tmp_path / "site")


def test_what_cannot_be_carried_is_named(tmp_path, monkeypatch):
    def installed(name: str, **files: str) -> metadata.Distribution:
        about = tmp_path / f"{name}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: nowhere\n")
        (about / "WHEEL").write_text("Wheel-Version: 1.0\nTag: py3-none-any\n")
        (about / "RECORD").write_text(f"{name}.py,,\n{about.name}/METADATA,,\n")
        for file, text in files.items():
            (about / f"{file}.json").write_text(text)
        return metadata.Distribution.at(about)

    with pytest.raises(ValueError, match=r"edited==1.0 is not installed from a wheel"):
        repacked(installed("edited", direct_url='{"dir_info": {"editable": true}}'), tmp_path)
    with pytest.raises(ValueError, match=r"damaged 1.0: its file damaged.py cannot be read"):
        repacked(installed("damaged"), tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="damaged requires nowhere, which is not installed"):
        closure_of(["damaged"])


def test_an_export_that_says_something_else_is_refused(tmp_path, monkeypatch):
    checkpoint = tiny_checkpoint(tmp_path / "tiny.safetensors", "timm")

    def turned(visible, code, weights, images, place: Path) -> set[str]:
        trained = load(weights, "cpu")
        place.mkdir()
        names = sorted(path.stem for path in images.iterdir())
        found = [trained.prepare(decode((images / f"{name}.png").read_bytes())) for name in names]
        said = trained.predict_batch(names, found).embeddings
        said[-1] += 0.01 if is_wrong else 0.0
        rows = [f"{name}_{i},{value}" for name, row in zip(names, said, strict=True) for i, value in enumerate(row)]
        (place / "submission.csv").write_text("\n".join(["imgId_eId,val", *rows]))
        return {"timm", "torch"}

    monkeypatch.setattr(isolation, "_submit", turned)
    given = closure_of(["torch"])
    all_of_timm = {**closure_of(["timm"]), **given}
    is_wrong = False
    needed, found = isolation.needed_of(
        {**closure_of(["timm"]), **given}, given, tmp_path, checkpoint, ITEMS, "drawn images"
    )
    assert set(needed) == {"timm"} and found.least == pytest.approx(1, abs=1e-6) and found.images == 3
    is_wrong = True
    with pytest.raises(ValueError, match=r"not what .*tiny.safetensors is, and is not kept: 3 drawn images"):
        isolation.needed_of(all_of_timm, given, tmp_path, checkpoint, ITEMS, "drawn images")


def test_a_model_that_needs_more_than_it_requires_is_refused(tmp_path, monkeypatch):
    checkpoint = tiny_checkpoint(tmp_path / "tiny.safetensors", "timm")
    with pytest.raises(ValueError, match="its prediction needs more than jaxtyping, .* No module named"):
        isolation._submit(
            {"jaxtyping": metadata.distribution("jaxtyping")}, ROOT, checkpoint, tmp_path, tmp_path / "place"
        )


def test_requirements_are_followed_with_their_extras():
    names = set(closure_of(["timm"]))
    assert {"timm", "torch", "huggingface-hub", "safetensors", "sympy", "mpmath"} <= names
    assert "pytest" not in names


def of_header(path: Path, target: str, dimension: int = 384) -> Path:
    from safetensors.torch import save_file

    header = {
        "format_version": 1,
        "kind": "regressor",
        "encoder": {"_target_": target, "name": "x"},
        "head": {},
        "target": {"model": "m", "revision": None, "dimension": dimension},
        "scores": {},
    }
    save_file({"x": torch.zeros(1)}, path, metadata={"img2prompt": json.dumps(header)})
    return path


@pytest.mark.parametrize(
    ("target", "dimension", "python", "message"),
    [
        ("img2prompt.encoders.sd_unet.SDUNet", 384, None, "is SDUNet, which .* it can be timm, openclip, huggingface"),
        ("img2prompt.encoders.blind.Blind", 384, None, "is Blind"),
        ("img2prompt.encoders.timm_model.Timm", 768, None, "768 numbers of m, and the competition asks for the 384"),
        ("img2prompt.encoders.timm_model.Timm", 384, "3.10", "python=3.10: must be 3.11 or later"),
        ("img2prompt.encoders.timm_model.Timm", 384, "three", "python=three: must be"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(target, dimension, python, message, tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    with pytest.raises(ValueError, match=message):
        write_kaggle(of_header(tmp_path / "c.safetensors", target, dimension), folder, python, ITEMS, "")
    assert not list(folder.iterdir())


def test_another_target_and_compiled_packages_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(
        kaggle,
        "needed_of",
        lambda visible, *_: ({key: visible[key] for key in ("timm", "regex")}, Agreement(1, 1, 1, "")),
    )
    checkpoint = tiny_checkpoint(tmp_path / "tiny.safetensors", "openclip", Target("some/other", None, 384))
    folder = tmp_path / "export"
    folder.mkdir()
    lines = "\n".join(write_kaggle(checkpoint, folder, None, ITEMS, "drawn images")[0])
    assert "the target is some/other; the competition is scored by all-MiniLM-L6-v2" in lines
    assert re.search(r"(?m)^regex \S+: compiled for Python 3\.\d+; where Kaggle", lines)


def test_a_gpu_computes_in_float16_and_a_cpu_in_float32():
    # A T4 has no bfloat16.
    assert precision_of(torch.device("cuda")) == torch.float16
    assert precision_of(torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("family", ["timm", "openclip", "huggingface"])
@pytest.mark.parametrize("head", ["linear", "attention"])
def test_float16_stays_near_float32(family, head):
    regressor = tiny(FAMILIES[family], head)
    side = regressor.encoder.preprocessing.image_size_px
    images = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8)
    exact, half = embed(regressor, images, torch.float32), embed(regressor, images, torch.float16)
    assert half.dtype == torch.float32 and not torch.equal(exact, half)
    assert (exact * half).sum(dim=1).min() > 0.999
    assert half.norm(dim=1).allclose(torch.ones(4), atol=1e-6)


def test_what_leaves_the_range_of_float16_is_asked_again_in_float32():
    regressor = tiny("timm_vit")
    with torch.no_grad():
        for parameter in regressor.encoder.model.patch_embed.parameters():
            parameter *= 1e6
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode(), torch.autocast("cpu", torch.float16):
        assert not regressor.features({"images": images}).pooled.isfinite().all()
    assert torch.equal(embed(regressor, images, torch.float16), embed(regressor, images, torch.float32))
    with torch.no_grad():
        regressor.head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        embed(regressor, images, torch.float16)


def test_images_without_a_sample_come_by_name_and_no_two_have_one_id(tmp_path):
    with pytest.raises(ValueError, match="no images there"):
        found_images(tmp_path, tmp_path / "none.csv")
    for name in ("b.png", "a.png", "notes.txt"):
        (tmp_path / name).touch()
    assert list(found_images(tmp_path, tmp_path / "none.csv")) == ["a", "b"]
    (tmp_path / "a.jpg").touch()
    with pytest.raises(ValueError, match=r"a.jpg and a.png have one id"):
        found_images(tmp_path, tmp_path / "none.csv")


def test_a_submission_is_there_whole_or_not_at_all(tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "tiny.safetensors", "timm", Target(MINILM.model, None, 12))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "images" / "a.png")
    with pytest.raises(ValueError, match="has 384 values an image"):
        submit(checkpoint, tmp_path / "images", tmp_path / "none.csv", tmp_path / "submission.csv")
    assert not (tmp_path / "submission.csv").exists()


def test_the_command_writes_it_with_a_card_and_predict_opens_it(tmp_path, capsys):
    checkpoint = tiny_checkpoint(tmp_path / "tiny.safetensors", "timm")
    out = tmp_path / "upload"
    export_main(quoted_paths([f"ckpt={checkpoint}", "format=kaggle", f"out={out}"]))
    told = capsys.readouterr().out
    assert "submission.ipynb writes" in told and "upload the folder as a dataset" in told
    assert {"README.md", "provenance.json", "submission.ipynb", LIST} <= {path.name for path in out.iterdir()}
    assert "Import `submission.ipynb`" in (out / "README.md").read_text()
    assert np.array_equal(load(out, "cpu").regressor.target_mean, load(checkpoint, "cpu").regressor.target_mean)
