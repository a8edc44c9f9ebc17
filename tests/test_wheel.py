"""The wheel carries the configuration: help and a prediction work from it, outside of the checkout."""

import os
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_carries_every_configuration_file_and_nothing_else_beside_the_package(unpacked):
    ours = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    theirs = {path.relative_to(unpacked / "img2prompt/conf") for path in (unpacked / "img2prompt/conf").rglob("*.yaml")}
    assert ours == theirs
    assert {path.name.split("-")[0] for path in unpacked.iterdir()} == {"img2prompt"}


def test_help_and_a_prediction_work_from_the_wheel(unpacked, tmp_path, finished_run, pairs_folder):
    env = {**os.environ, "PYTHONPATH": str(unpacked)}

    def run(*arguments):
        program = f"import sys; sys.path.remove('{ROOT}') if '{ROOT}' in sys.path else None; import runpy; "
        program += "sys.argv[0] = 'img2prompt'; runpy.run_module('img2prompt', run_name='__main__')"
        return subprocess.run(
            [sys.executable, "-c", program, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True
        )

    assert "ckpt:" in run("predict", "--help").stdout
    done = run("predict", f"ckpt={finished_run}", f"images={pairs_folder / 'images'}", "out=p.parquet", "device=cpu")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p.parquet").is_file()
    where = subprocess.run(
        [sys.executable, "-c", "import img2prompt; print(img2prompt.__file__)"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert where.stdout.startswith(str(unpacked))
