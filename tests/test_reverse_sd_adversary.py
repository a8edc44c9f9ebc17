"""What an adversary found in the chain of Reverse Stable Diffusion."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import PREDICT, settings_of
from torch.nn import functional

from img2prompt.build import build
from img2prompt.commands import predict as command
from img2prompt.commands.checks import check_curriculum
from img2prompt.commands.conf import help_text
from img2prompt.commands.curriculum import main as curriculum_main
from img2prompt.commands.fit import aligned
from img2prompt.commands.settings import all_keys, did_you_mean
from img2prompt.data.difficulty import agreement, read_scores, write_scores
from img2prompt.data.drawings import Drawings
from img2prompt.data.kaggle import Kaggle
from img2prompt.data.labels import Labels, words_of
from img2prompt.data.order import Draws, epoch_rows
from img2prompt.data.vocabulary import vocabulary_of
from img2prompt.encoders.encoder import Encoder, Features
from img2prompt.heads import DeepMLP, JointVocabulary
from img2prompt.metrics import word_scores
from img2prompt.predictions import Prediction, write_parquet
from img2prompt.ridge import fit_from_texts
from img2prompt.synthesis.procedural import Procedural
from img2prompt.synthesis.stable_diffusion import StableDiffusion
from img2prompt.training.curriculum import Curriculum, _of
from img2prompt.training.finetune import FineTune, Probe
from img2prompt.training.words import fit_words

JOINT = ("head=joint_vocabulary", "loss=joint")


def test_without_a_word_on_validation_there_are_no_scores_of_words(train_here, tmp_path):
    assert word_scores(torch.randn(3, 2), torch.zeros(3, 2)) == {}
    for seed in range(3):
        train_here(tmp_path / str(seed), *JOINT, "head.vocabulary_size=1", "trainer.max_epochs=1", f"data.seed={seed}")
        json.loads((tmp_path / str(seed) / "summary.json").read_text())


def test_a_caption_that_images_share_does_not_make_them_equally_easy():
    # Sixty images, each with a caption of its own and one that all share.
    count = 60
    rows = np.arange(2 * count)
    prompts = np.where(rows % 2 == 0, rows // 2, count)
    own = np.random.default_rng(0).normal(size=count)
    ease = np.where(rows % 2 == 0, own[rows // 2], own[rows // 2] - 1)
    draws = Draws(prompts, rows // 2, np.ones(2 * count), rows.astype(np.uint64), 3, ease)
    first = epoch_rows(draws, 0, "finetune", 0)
    assert own[first // 2].mean() > own.mean() + 0.5


def test_words_of_the_text_only_map_are_fitted_where_images_lie():
    drawn = torch.Generator().manual_seed(0)
    texts, gap = torch.randn(300, 16, generator=drawn), 3 * torch.randn(16, generator=drawn)
    targets = functional.normalize(texts @ torch.randn(16, 8, generator=drawn), dim=1)
    images = 4 * functional.normalize(texts, dim=1) + gap
    labels = Labels(["up" if row[0] > 0.3 else "" for row in targets.tolist()], ["up"])
    head = JointVocabulary(16, 8, 1, ["up"])
    head.set_affine(*fit_from_texts(texts, targets, images))
    unit = functional.normalize(texts, dim=1)
    placed = (unit - unit.mean(0)) * images.norm(dim=1).mean() + images.mean(0)
    scores = []
    for given in (placed, texts):
        fit_words(head, given, list(range(300)), labels)
        with torch.no_grad():
            scores.append(word_scores(head(Features(images)).words, labels.of(range(300)))["word_f1"])
    assert scores[0] > 0.8 and scores[0] > scores[1]


def predictions(path, ids, width=4, seed=0, paths=None):
    embeddings = np.random.default_rng(seed).normal(size=(len(ids), width)).astype(np.float32)
    columns = {} if paths is None else {"path": paths}
    write_parquet(path, [Prediction(ids, embeddings, columns)])
    return str(path)


def test_a_member_is_named_once(tmp_path):
    one = predictions(tmp_path / "a.parquet", ["x", "y"])
    with pytest.raises(ValueError, match="source: .*a.parquet is named twice; each member once"):
        aligned([one, str(tmp_path / "." / "a.parquet")], "source")


def test_a_vocabulary_that_was_changed_is_not_gone_on_with(unfinished_words, train_here):
    run, given = unfinished_words
    words = (run / "vocabulary.txt").read_text().splitlines()
    (run / "vocabulary.txt").write_text("".join(f"{word}\n" for word in words[::-1]))
    with pytest.raises(ValueError, match="its vocabulary.txt has changed; put it back"):
        train_here(run, *given)
    # What is lost is found again.
    (run / "vocabulary.txt").unlink()
    train_here(run, *given)


@pytest.fixture
def unfinished_words(tmp_path, train_here):
    given = (*JOINT, "head.vocabulary_size=4", "trainer.max_epochs=1")
    train_here(tmp_path / "run", *given)
    (tmp_path / "run" / "summary.json").unlink()
    return tmp_path / "run", given


def test_predictions_are_matched_by_the_files_that_they_read(tmp_path, pairs_folder):
    samples = Kaggle(pairs_folder).find().samples[:3]
    files = [pairs_folder / "images" / f"{sample.id}.png" for sample in samples]
    # As a folder of captions names them.
    own = [replace(sample, id=f"sub/{sample.id}#2") for sample in samples]
    given = predictions(tmp_path / "a.parquet", [file.stem for file in files], paths=[str(file) for file in files])
    assert _of(given, own).shape == (3, 4)
    # The same names, and other images.
    for file in files:
        (tmp_path / file.name).write_bytes(b"other")
    others = [str(tmp_path / file.name) for file in files]
    ids = [sample.id for sample in samples]
    with pytest.raises(ValueError, match="predictions of another data set: 3 of 3 training images are not in it"):
        _of(predictions(tmp_path / "b.parquet", ids, paths=others), samples)
    # Files that are not here are known by their ids.
    away = predictions(tmp_path / "c.parquet", ids, paths=["/nowhere/x.png"] * 3)
    assert _of(away, samples).shape == (3, 4)
    with pytest.raises(ValueError, match="files of different widths .4, 5.; give models of one target"):
        agreement([np.ones((2, 4)), np.ones((2, 5))])


def test_clip_alignment_is_of_an_encoder_that_has_not_learnt(train_here, tmp_path):
    warm = "+stages.warm={_target_:img2prompt.training.finetune.FineTune,epochs:1}"
    order = ("stages.finetune=null", warm, "stages.probe=null", "stages.text_only=null")
    given = ("curriculum=easy_first", "curriculum.scorer=clip_alignment", "data.batch_size=4")
    with pytest.raises(ValueError, match="a curriculum is of stages.finetune"):
        train_here(tmp_path / "none", *given, *order)
    finetune, warm = FineTune(), FineTune(epochs=1)
    warm.name = "warm"
    judged = Curriculum(stages=3, scorer="clip_alignment")
    blind = build({"_target_": "img2prompt.encoders.blind.Blind"}, Encoder)
    with pytest.raises(ValueError, match="stages.warm takes the encoder out of the space of the prompts before"):
        check_curriculum(judged, [warm, finetune], finetune, blind, None, False)
    check_curriculum(judged, [Probe(), finetune], finetune, blind, None, False)


def test_words_are_found_between_underscores_and_behind_what_is_not_seen():
    assert words_of("red_fox, blue_sky") == ["red", "fox", "blue", "sky"]
    assert words_of("\u0130stanbul fo\u00adx") == ["istanbul", "fox"]
    # A tagger that looks at every part of a word would take minutes.
    assert vocabulary_of(["fox " + "qwertz" * 3000, "fox"], 1) == ["fox"]


@pytest.mark.parametrize("hidden", [8, [8.5], [0], "8", [True]])
def test_widths_that_are_none_are_told(hidden):
    for made in (lambda: DeepMLP(4, 3, hidden), lambda: JointVocabulary(4, 3, 2, hidden=hidden)):
        with pytest.raises(ValueError, match="head.hidden=.*: must be a .list. of widths of at least 1"):
            made()


def test_records_of_an_image_twice_and_of_no_numbers_are_told(tmp_path):
    samples = Drawings(2, 1, 0, Procedural(8)).find().samples
    write_scores(tmp_path / "s.parquet", [samples[0], samples[1], samples[0]], np.array([1.0, 2.0, -9.0]))
    with pytest.raises(ValueError, match="s.parquet: records of an image twice"):
        read_scores(tmp_path / "s.parquet", samples)
    table = pq.read_table(tmp_path / "s.parquet").to_pydict()
    import pyarrow as pa

    pq.write_table(pa.table({**table, "score": ["x", "y", "z"]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="t.parquet: no records of difficulty"):
        read_scores(tmp_path / "t.parquet", samples)


def test_the_command_of_both_runs_reads_its_keys_as_hydra_does(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("img2prompt.commands.curriculum._train", lambda arguments: asked.append(list(arguments)))
    monkeypatch.setattr("img2prompt.training.run_folder.is_finished", lambda folder: True)
    curriculum_main(["data=demo", f"run_dir={tmp_path}", "dry_run=True"])
    assert len(asked) == 1
    asked.clear()
    curriculum_main(["data=demo", f"run_dir={tmp_path}", "++curriculum.stages=2"])
    assert not any("curriculum.stages" in one for one in asked[1])
    with pytest.raises(ValueError, match="run_dir must be given"):
        curriculum_main(["data=demo", "run_dir="])


def test_what_is_missing_is_told_before_a_plan(tmp_path, finished_run):
    from img2prompt.commands.assembly import prepare
    from img2prompt.commands.export import export

    own = ("encoder=timm", "encoder.name=test_vit", "data=kaggle", "data.root=x", "curriculum=easy_first")
    for overrides, sentence in (
        (("curriculum.records=/nowhere",), "curriculum.records=/nowhere: no own_cosine.parquet there"),
        (
            ("curriculum.scorer=ensemble_agreement", "curriculum.predictions=[/a,/b]"),
            "curriculum.predictions=/a: no such file",
        ),
        (
            ("curriculum.scorer=clip_alignment", "encoder.pretrained=true"),
            "clip_alignment: the encoder has no text tower",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            prepare(settings_of(*own, *overrides), tmp_path)
    best = finished_run / "checkpoints" / "mean.safetensors"
    with pytest.raises(ValueError, match="its best rung is the mean, which has no encoder; give another, such"):
        export(str(best), "diffusers", str(tmp_path / "x"))
    with pytest.raises(ValueError, match="generator.model=/nowhere/x: no such folder"):
        StableDiffusion("/nowhere/x").settings  # noqa: B018 (it is computed)


def test_help_and_slips_know_the_choice_that_is_made():
    told = help_text("train", {"head": "joint_vocabulary"})
    assert "vocabulary_size: 1000" in told and "GROUP=CHOICE --help" in told
    assert "vocabulary_size" not in help_text("train", {"head": "nothing"})
    assert did_you_mean("head.vocabulary", list(all_keys("train"))) == "; did you mean head.vocabulary_size?"
    assert did_you_mean("encoder.contxt", list(all_keys("train"))) == "; did you mean encoder.context?"


def test_options_without_effect_are_refused(finished_run, pairs_folder, train_here, tmp_path):
    for wrong in ({"top_words": -3}, {"top_k": -1}):
        with pytest.raises(ValueError, match="top_k and top_words must be at least 0"):
            command.predict(str(finished_run), str(pairs_folder / "images"), str(tmp_path / "p.npz"), **PREDICT | wrong)
    with pytest.raises(ValueError, match="head.vocabulary: is found in the training prompts"):
        train_here(tmp_path / "run", *JOINT, "+head.vocabulary=[zebra,unicorn]", "head.vocabulary_size=2")
