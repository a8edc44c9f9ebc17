"""What an export refuses, what it writes beside the weights, and where else it may go."""

import ast
import json
import shutil
import types
from dataclasses import replace
from pathlib import Path

import exporting
import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file

from img2prompt.commands.arguments import quoted_paths
from img2prompt.commands.export import main
from img2prompt.data.fitting import fit
from img2prompt.data.targets import locate
from img2prompt.encoders.encoder import Features
from img2prompt.export import make, push, usage
from img2prompt.export.check import drawn
from img2prompt.export.folding import folded
from img2prompt.predictors.trained import load
from img2prompt.provenance import Provenance, header_of, is_exported, located, read_provenance
from img2prompt.regressor import Target


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def timm_vit(shared) -> Path:
    return exporting.checkpoint(shared, "timm_vit")


@pytest.fixture(scope="module")
def plain(shared, timm_vit) -> Path:
    run(f"ckpt={timm_vit}", "format=safetensors", f"out={shared / 'plain'}")
    return shared / "plain"


def run(*arguments: str) -> None:
    main(quoted_paths(arguments))


@pytest.mark.parametrize("head", ["linear", "mlp", "deep", "vocabulary"])
def test_a_folded_head_is_the_head(head):
    regressor = exporting.tiny("timm_vit", head)
    width = regressor.encoder.width
    projection, features = torch.randn(width, 7), torch.randn(5, 7)
    values = features
    for layer in folded(regressor.head, projection):
        values = values @ layer.weight.T + layer.bias
        values = values if layer.activation is None else layer.activation()(values)
    expected = regressor.head(Features(features @ projection.T)).embedding
    assert torch.allclose(torch.nn.functional.normalize(values), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["format=onyx"], "format=onyx: no such format; did you mean onnx?"),
        (["format=onnx", "int8=true"], "int8=true needs images=DIR"),
        (["format=timm", "int8=true"], "int8=true: is of format=onnx, and without effect on format=timm"),
        (["format=timm", "python=3.12"], "is of format=kaggle"),
        (["format=timm", "images=/nowhere"], "/nowhere"),
        (["format=timm", "push=me"], "push=me: must be user/name"),
        (["format=diffusers"], "the encoder of .* is test_vit, and encoder=sd_unet is needed"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(arguments, sentence, timm_vit, tmp_path):
    with pytest.raises(ValueError, match=sentence) as told:
        run(f"ckpt={timm_vit}", f"out={tmp_path / 'out'}", *arguments)
    assert "\n" not in str(told.value) and not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept(timm_vit, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out=.*: is there already and is kept"):
        run(f"ckpt={timm_vit}", "format=safetensors", f"out={tmp_path / 'out'}")


def test_an_export_that_says_something_else_is_not_kept(timm_vit, tmp_path, monkeypatch):
    monkeypatch.setattr(make.shutil, "copyfile", lambda _, path: exporting.tiny("timm_vit", seed=1).save(path))
    with pytest.raises(ValueError, match="is not what the checkpoint is, and is not kept: 32 drawn images"):
        run(f"ckpt={timm_vit}", "format=safetensors", f"out={tmp_path / 'out'}")
    assert not list(tmp_path.iterdir())


def test_int8_is_taken_where_the_users_images_agree_and_refused_where_one_does_not(timm_vit, tmp_path, monkeypatch):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for item in drawn()[:4]:
        (pictures / f"{item.id}.png").write_bytes(item.read())
    common = (f"ckpt={timm_vit}", "format=onnx", "int8=true", f"images={pictures}")
    run(*common, f"out={tmp_path / 'small'}")
    about = read_provenance(tmp_path / "small")
    assert about.options["int8"] is True and about.checked["images"] == about.checked["int8"]["images"] == 4
    assert 0.99 <= about.checked["int8"]["least"] < about.checked["least"]
    assert (tmp_path / "small" / "model.onnx").stat().st_size < 0.7 * timm_vit.stat().st_size
    monkeypatch.setattr(make, "INT8", 0.9999999)
    with pytest.raises(ValueError, match="int8=true: the export is not what .*; leave it out"):
        run(*common, f"out={tmp_path / 'refused'}")
    assert not (tmp_path / "refused").exists() and not list(tmp_path.glob(".*"))


def test_weights_that_are_too_large_for_a_graph_lie_beside_it(timm_vit, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    for item in drawn()[:2]:
        (tmp_path / f"{item.id}.png").write_bytes(item.read())
    run(f"ckpt={timm_vit}", "format=onnx", f"out={tmp_path / 'out'}", "int8=true", f"images={tmp_path}")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("model*")}
    assert len(sizes) == 2 and sizes["model.onnx"] < 0.5 * sum(sizes.values())


def test_provenance_says_what_was_exported_and_how_it_was_checked(plain, timm_vit):
    said = json.loads((plain / "provenance.json").read_text())
    assert said["format"] == "safetensors" and said["header"]["scores"]["val_cosine"] == 0.5
    assert said["checked"]["images"] == 32 and 0.99999 <= said["checked"]["least"] <= said["checked"]["mean"]
    assert len(said["checkpoint_sha256"]) == 64 and said["versions"]["torch"] == torch.__version__.split("+")[0]
    assert (plain / "model.safetensors").read_bytes() == timm_vit.read_bytes()
    assert is_exported(plain) and header_of(plain).encoder["name"] == "test_vit"


def test_a_card_tells_the_run_and_no_path_of_the_machine(finished_run, tmp_path):
    checkpoint = finished_run / "checkpoints" / "finetune.safetensors"
    run(f"ckpt={checkpoint}", "format=safetensors", f"out={tmp_path / 'out'}", "images=null")
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "img2prompt" and front["license"] == "other"
    summary = json.loads((finished_run / "summary.json").read_text())
    assert f"* training pairs: {summary['train_pairs']}" in card and "| floor: mean |" in card
    assert f"| {summary['nearest_prompt_baseline']:.4f} |" in card
    assert "trained from scratch" in card and "img2prompt.load(" in card and "python predict.py ckpt=" in card
    for path in (tmp_path / "out" / "README.md", tmp_path / "out" / "provenance.json"):
        assert str(finished_run) not in path.read_text() and str(tmp_path) not in path.read_text()


def test_a_folder_of_this_machine_stays_here(tmp_path):
    text = tmp_path / "private" / "minilm"
    shutil.copytree(locate().location, text)
    path = tmp_path / "of_mine.safetensors"
    exporting.tiny("openclip", target=Target(str(text), None, 384)).save(path)
    run(f"ckpt={path}", "format=sentence_transformers", f"out={tmp_path / 'out'}")
    for one in (tmp_path / "out").rglob("*"):
        assert one.is_dir() or str(tmp_path).encode() not in one.read_bytes(), one
    assert header_of(tmp_path / "out").target.model == "./minilm"
    with pytest.raises(ValueError, match="push=me/model: the checkpoint's header names .*minilm, a folder of this"):
        run(f"ckpt={path}", "format=safetensors", f"out={tmp_path / 'pushed'}", "push=me/model")


def shuffled_minilm(folder, **config):
    """MiniLM in a folder, of another space, or with other settings."""
    shutil.copytree(locate().location, folder)
    if config:
        path = folder / "config_sentence_transformers.json"
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **config}))
        return folder
    weights = load_file(folder / "model.safetensors")
    order = torch.randperm(384, generator=torch.Generator().manual_seed(0))
    last = max(key for key in weights if key.endswith("output.LayerNorm.weight"))
    for key in (last, last.replace("weight", "bias")):
        weights[key] = weights[key][order] + 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_texts_of_another_space_are_refused_and_prompts_of_the_text_encoder_are_kept(shared, tmp_path):
    path, other = exporting.checkpoint(shared, "openclip"), shuffled_minilm(tmp_path / "other")
    given = (f"ckpt={path}", "format=sentence_transformers", f"out={tmp_path / 'out'}")
    with pytest.raises(
        ValueError, match="texts lie in another space than the checkpoint's prompts, and nothing is kept"
    ):
        run(*given, f"text_model={other}")
    assert not (tmp_path / "out").exists()
    asked = shuffled_minilm(tmp_path / "asked", default_prompt_name="query", prompts={"query": "Say: "})
    path = tmp_path / "asks.safetensors"
    exporting.tiny("openclip", target=Target(str(asked), None, 384)).save(path)
    run(f"ckpt={path}", *given[1:])
    from sentence_transformers import SentenceTransformer

    model, alone = (SentenceTransformer(str(one), device="cpu") for one in (tmp_path / "out", asked))
    assert np.allclose(model.encode(["a cat"]), alone.encode(["a cat"]), atol=1e-6)
    assert not np.allclose(model.encode(["a cat"], prompt=""), alone.encode(["a cat"]), atol=1e-3)


def test_a_card_calls_no_later_rung_a_floor(finished_run, tmp_path):
    run(f"ckpt={finished_run / 'checkpoints' / 'mean.safetensors'}".replace("mean", "finetune"), "format=safetensors",
        f"out={tmp_path / 'last'}")  # fmt: skip
    card = (tmp_path / "last" / "README.md").read_text()
    assert "| floor: mean |" in card and "floor: finetune" not in card


def test_a_strangers_folder_makes_timm_read_nothing_else(shared, timm_vit, tmp_path):
    out = tmp_path / "out"
    run(f"ckpt={timm_vit}", "format=timm", f"out={out}")
    config = json.loads((out / "config.json").read_text())
    config["model_args"]["checkpoint_path"] = str(tmp_path / "other.pth")
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json: refused, its model_args have checkpoint_path"):
        load(out)


def test_what_timms_own_transform_costs_is_measured(shared, tmp_path, capsys):
    run(f"ckpt={exporting.checkpoint(shared, 'timm_resnet')}", "format=timm", f"out={tmp_path / 'out'}")
    about = read_provenance(tmp_path / "out")
    assert about.checked["own_transform"]["least"] < 0.99999 <= about.checked["least"]
    assert "by timm's own transform: 32 drawn images" in capsys.readouterr().out


def test_names_cannot_break_out_of_a_card():
    about = Provenance("safetensors", header_of_named("evil\n# <script>|`"), [0.0] * 384, "0")
    from img2prompt.export.card import model_card

    card = model_card(about, "x\n---\nlicense: mit", None, None)
    assert "\n# <script>" not in card and "<script>" not in card.replace("\\<script\\>", "")
    assert card.count("\n---\n") == 1
    hostile = Target('x"); import os; ("\n```\n# Owned', None, 384)
    card = model_card(replace(about, header=replace(about.header, target=hostile)), "x", None, None)
    assert "\n# Owned" not in card and card.count("```") == 6
    (code,) = [one for one in card.split("```python\n")[1:] if "index =" in one]
    assert "os" not in {node.id for node in ast.walk(ast.parse(code.split("```")[0])) if isinstance(node, ast.Name)}


def header_of_named(name):
    from img2prompt.regressor import Header

    facts = exporting.tiny("timm_vit").encoder.config
    return Header({**facts, "name": name, "_target_": "x"}, {}, exporting.MINILM, {})


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_the_fitting_that_a_card_shows_is_ours(mode):
    names = {"Image": Image}
    code = usage._FITS[mode].format(size=32, filter="BICUBIC")
    exec(f"def fitted(image):\n{code}", names)
    drawn_values = np.random.default_rng(0)
    for height, width in ((37, 53), (53, 40), (32, 32), (200, 31), (35, 32), (9, 64), (301, 299)):
        picture = Image.fromarray(drawn_values.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height))
        ours = fit(torch.from_numpy(np.array(picture)).permute(2, 0, 1), 32, "bicubic", mode)
        theirs = np.asarray(names["fitted"](picture)).transpose(2, 0, 1)
        assert np.abs(ours.numpy().astype(int) - theirs.astype(int)).max() <= 1, (height, width)


def test_a_damaged_or_foreign_folder_is_told(plain, tmp_path):
    other = shutil.copytree(plain, tmp_path / "other")
    (other / "provenance.json").write_text('{"format": "onnx"}')
    with pytest.raises(ValueError, match="provenance.json: damaged"):
        load(other)
    said = json.loads((plain / "provenance.json").read_text())
    for change in ({"options": None}, {"format": "timm"}, {"format": "nothing"}, {"target_mean": [0.0]}):
        (other / "provenance.json").write_text(json.dumps({**said, **change}))
        with pytest.raises(ValueError, match="provenance.json|cannot be opened as timm"):
            load(other)
    del said["header"]["encoder"]["image_size_px"]
    (other / "provenance.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="provenance.json: damaged"):
        load(other)
    (other / "provenance.json").unlink()
    with pytest.raises(ValueError, match="it is not a run folder; expected .* or what export wrote"):
        load(other)


def test_an_id_of_the_hub_is_opened_from_its_cache(plain, timm_vit, tmp_path, monkeypatch):
    commit = "0" * 40
    home = tmp_path / "models--me--model"
    shutil.copytree(plain, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    asked = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **more: asked(name, cache_dir=tmp_path, **more)
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = located("hf-hub:me/model")
    assert Path(folder).name == commit
    items = [item.read() for item in drawn()[:2]]
    for number, data in enumerate(items):
        (tmp_path / f"{number}.png").write_bytes(data)
    pictures = [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    found, ours = (load(one, "cpu").predict(pictures).embeddings for one in ("hf-hub:me/model", timm_vit))
    assert np.array_equal(found, ours)
    with pytest.raises(ValueError, match="ckpt=hf-hub:me: must be hf-hub:user/name"):
        located("hf-hub:me")
    with pytest.raises(ValueError, match="ckpt=hf-hub:me/nothing: cannot be fetched"):
        located("hf-hub:me/nothing")


class Hub:
    """Stands for the Hub's API, and notes what it is asked."""

    def __init__(self, private: bool | None) -> None:
        self.private, self.asked = private, []

    def repo_info(self, name):
        if self.private is None:
            raise RepositoryNotFoundError("none", response=types.SimpleNamespace(headers={}, request=None))
        return types.SimpleNamespace(private=self.private)

    def create_repo(self, name, private):
        self.asked.append(("create", name, private))

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.asked.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


def test_a_push_is_private_unless_said_otherwise(timm_vit, tmp_path, monkeypatch, capsys):
    hub = Hub(None)
    monkeypatch.setattr(push.huggingface_hub, "HfApi", lambda: hub)
    run(f"ckpt={timm_vit}", "format=safetensors", f"out={tmp_path / 'out'}", "push=me/model")
    files = ["README.md", "model.safetensors", "provenance.json"]
    assert hub.asked == [("create", "me/model", True), ("upload", "me/model", files)]
    assert "pushed: https://huggingface.co/me/model" in capsys.readouterr().out
    assert 'img2prompt.load("hf-hub:me/model")' in (tmp_path / "out" / "README.md").read_text()
    assert push.push_folder(tmp_path / "out", "me/open", False) and hub.asked[2] == ("create", "me/open", False)


def test_what_should_be_private_is_not_sent_where_all_see_it(plain, monkeypatch):
    hub = Hub(False)
    monkeypatch.setattr(push.huggingface_hub, "HfApi", lambda: hub)
    with pytest.raises(ValueError, match="push=me/model: is there and public; say private=false"):
        push.push_folder(plain, "me/model", True)
    assert not hub.asked

    def fail(**settings):
        raise OSError("no network")

    hub.upload_folder = fail
    with pytest.raises(ValueError, match="not sent .OSError: no network.; .* is complete"):
        push.push_folder(plain, "me/model", False)
