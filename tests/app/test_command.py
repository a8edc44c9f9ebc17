"""The command: any predictor stands behind the page, and its options reach the answers."""

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tiny_diffusion import tiny_captioner

from img2prompt.app.answers import Upload
from img2prompt.app.cards import cards
from img2prompt.commands import app as command
from img2prompt.commands.predict import predict
from img2prompt.commands.settings import compose
from img2prompt.predictions import read_predictions
from img2prompt.refine.confidence import Confidence, Reliability

VISION = {"layers": 2, "width": 64, "head_width": 32, "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory) -> list[str]:
    torch.manual_seed(0)
    config = open_clip.get_model_config("ViT-S-32-alt")
    model = open_clip.CLIP(config["embed_dim"], {**config["vision_cfg"], **VISION}, config["text_cfg"]).eval()
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    own = [f"+predictor.vision_config.{key}={value}" for key, value in VISION.items()]
    return ["predictor=retrieval", "predictor.model=ViT-S-32-alt", f"predictor.pretrained={path}", *own]


@pytest.fixture
def bank(tmp_path):
    path = tmp_path / "bank.txt"
    path.write_text("a red cat, ink\na blue dog, oil painting\na green car\na boat, ink, at night\n")
    return path


@pytest.fixture
def asked(monkeypatch, pictures):
    """What the page of these settings is given, and all that it would say of three pictures."""
    uploads = [Upload(path.name, path) for path in sorted(pictures.iterdir())]

    def ask(*overrides: str):
        pages = []
        monkeypatch.setattr(command, "build_page", lambda *given: pages.append(given))
        monkeypatch.setattr(command, "serve", lambda build, listening: build())
        command.app(**compose("app", ["device=cpu", "port=0", *overrides]))
        about, answer, _ = pages[0]
        return about, [(found, cards(found)) for found in answer(uploads)]

    return ask


@pytest.fixture
def predicted(pictures, tmp_path):
    """What `predict` says of them."""

    def ask(*overrides: str):
        out = tmp_path / "out.parquet"
        predict(**compose("predict", ["device=cpu", f"images={pictures}", f"out={out}", *overrides]))
        return read_predictions(out)

    return ask


def test_the_answers_are_those_of_predict_and_composed_prompts_come_after(finished_run, asked, predicted):
    given = (f"ckpt={finished_run}", "top_k=2", "views=[flip]", "compose_beams=1", "compose_phrases=3")
    about, [(first, early), (last, late)] = asked(*given)
    expected = predicted(*given, "compose=true")
    assert about == str(finished_run) and np.allclose(last.prediction.embeddings, expected.embeddings, atol=1e-5)
    assert "Composed prompt" not in early and "Composed prompt" in late and "agreement" in early
    for name in ("nearest_prompts", "composed_prompt"):
        assert last.prediction.columns[name] == expected.columns[name]


def test_without_compose_there_is_one_answer_and_without_top_k_there_are_no_prompts(finished_run, asked):
    _, answers = asked(f"ckpt={finished_run}", "compose=false", "top_k=0")
    [(found, shown)] = answers
    assert len(found.prediction) == 3 and "Nearest prompts" not in shown and "<article" in shown


def test_a_captioner_has_a_caption_and_what_needs_a_bank_is_left_out(asked, predicted, tmp_path, capsys):
    folder = tiny_captioner(tmp_path / "blip")
    given = ("predictor=blip", f"predictor.model={folder}", "predictor.max_new_tokens=8")
    about, [(found, shown)] = asked(*given)
    assert about == "predictor=blip" and "Caption" in shown
    assert "no bank of prompts: nearest and composed prompts are left out" in capsys.readouterr().err
    assert found.prediction.columns["caption"] == predicted(*given).columns["caption"]


@pytest.mark.parametrize("name", ["retrieval", "sdipc"])
def test_predictors_with_a_bank_have_nearest_and_composed_prompts(name, asked, predicted, retrieval, folders, bank):
    own = retrieval if name == "retrieval" else ["predictor=sdipc", f"predictor.clip={folders[1]}"]
    given = [*own, f"predictor.bank={bank}"]
    _, answers = asked(*given)
    found, shown = answers[-1]
    assert "Composed prompt" in shown and "Nearest prompts" in shown
    assert np.allclose(found.prediction.embeddings, predicted(*given).embeddings, atol=1e-5)


def test_what_goes_wrong_while_it_answers_is_a_sentence(finished_run, asked, monkeypatch):
    class OutOfMemoryError(RuntimeError):
        pass

    def fails(*_):
        raise OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(command, "answers_of", fails)
    with pytest.raises(ValueError, match="the GPU's memory is not enough; lower batch_size"):
        asked(f"ckpt={finished_run}")


def test_confidence_is_told_where_a_file_says_how(finished_run, asked, tmp_path):
    learnt = Confidence(["norm"], [1.0], [0.5] * 384, [[0.0, 0.25], [100.0, 0.25]], 20, Reliability(None, 0.0, []))
    learnt.save(tmp_path / "c.json")
    _, [(_, shown), *_] = asked(f"ckpt={finished_run}", "compose=false", f"confidence={tmp_path / 'c.json'}")
    assert shown.count("confidence 0.250") == 3
    _, [(_, shown), *_] = asked(f"ckpt={finished_run}", "compose=false")
    assert "confidence" not in shown
