"""The joint vocabulary head: words of the training prompts, labels, loss, scores, and what is read of a checkpoint."""

import json
import random
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import PREDICT, read_csv, settings_of
from sklearn.metrics import average_precision_score, f1_score
from torch.nn import functional

import img2prompt
from img2prompt.commands.assembly import recipe
from img2prompt.commands.predict import predict
from img2prompt.commands.sentences import sentence_of
from img2prompt.data.labels import Labels, words_of
from img2prompt.data.sample import Batch
from img2prompt.data.vocabulary import vocabulary_of
from img2prompt.encoders.encoder import Features
from img2prompt.heads import DeepMLP, JointVocabulary, Linear, Outputs
from img2prompt.metrics import word_scores
from img2prompt.regressor import load_regressor, read_header
from img2prompt.training.resume import words_digest
from img2prompt.training.words import fit_words

JOINT = ("head=joint_vocabulary", "loss=joint", "head.vocabulary_size=12")
WORDS = ["fox", "red", "running", "star"]
PROMPTS = ["A Red fox’s den, 3 STARS", "a fox running", "red RED red", "the star of the sea", ""]


def batch_of(targets, labels):
    count = len(targets)
    return Batch({}, torch.arange(count), targets, [""] * count, torch.ones(count, dtype=torch.bool), labels)


def unit(count, width, seed):
    return functional.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture(scope="module")
def joint_run(tmp_path_factory, train_here):
    folder = tmp_path_factory.mktemp("joint") / "run"
    train_here(folder, *JOINT)
    return folder


def test_words_are_lower_case_and_of_letters():
    assert words_of("A fox’s CUBS, 3 of 8k; l'été d'Été don't x") == ["fox", "cubs", "of"]
    assert words_of("Cafe\u0301 \uff26\uff4f\uff58") == ["café", "fox"]


def test_a_word_is_labelled_however_it_is_written():
    labels = Labels(PROMPTS, WORDS).of(range(5))
    assert labels.tolist() == [[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert Labels(PROMPTS, WORDS).of([4, 0]).tolist() == labels[[4, 0]].tolist()


def test_the_vocabulary_is_what_most_prompts_say_in_nouns_adjectives_and_verbs():
    prompts = [
        "the red Fox is running",
        "a red fox, very quickly",
        "red wolf of the north",
        "wolf wolf wolf",
        "ox and ape",
    ]
    assert vocabulary_of(prompts, 6) == ["red", "fox", "wolf", "ape", "north", "ox"]
    # A prompt that comes often is one prompt, and the order of the prompts is no matter.
    several = [*prompts, *["a running ox"] * 9]
    random.Random(0).shuffle(several)
    assert vocabulary_of(several, 4) == ["red", "fox", "ox", "running"]
    with pytest.raises(ValueError, match="head.vocabulary_size=9: the training prompts have 7 nouns, adjectives and"):
        vocabulary_of(prompts, 9)


def test_the_loss_is_cosine_and_a_tenth_of_the_cross_entropy_and_huber(tmp_path):
    loss = recipe(settings_of(*JOINT), tmp_path).loss
    embedding, targets, logits = unit(6, 5, 0), unit(6, 5, 1), torch.randn(6, 4) * 3
    labels = (torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    parts = loss(Outputs(embedding, logits), batch_of(targets, labels))
    p, t, z, c = (one.double().numpy() for one in (embedding, targets, logits, labels))
    chances = 1 / (1 + np.exp(-z))
    entropy = -(c * np.log(chances) + (1 - c) * np.log(1 - chances)).mean()
    far = np.abs(p - t)
    huber = np.where(far < 1, 0.5 * far**2, far - 0.5).mean()
    expected = np.mean(1 - (p * t).sum(1)) + 0.1 * entropy + huber
    assert sum(float(value) for value in parts.values()) == pytest.approx(expected, abs=1e-6)
    assert float(parts["vocabulary"]) == pytest.approx(0.1 * entropy, abs=1e-6)


def test_without_weight_the_words_leave_the_embedding_s_gradient_as_it_is(tmp_path):
    loss = recipe(settings_of(*JOINT, "loss.weights.vocabulary=0"), tmp_path).loss
    plain = recipe(settings_of("loss=joint", "~loss.parts.vocabulary", "~loss.weights.vocabulary"), tmp_path).loss
    features, targets, labels = torch.randn(6, 8), unit(6, 5, 1), torch.ones(6, 3)
    joint, linear = JointVocabulary(8, 5, 3), Linear(8, 5)
    linear.load_state_dict(joint.embed.state_dict())
    for head, own in ((joint, loss), (linear, plain)):
        torch.stack(list(own(head(Features(features)), batch_of(targets, labels)).values())).sum().backward()
    for mine, other in zip(joint.embed.parameters(), linear.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad) and mine.grad.any()
    assert not joint.words.weight.grad.any()


def test_the_deep_mlp_is_linear_gelu_batchnorm_and_dropout_twice():
    head = DeepMLP(8, 5, hidden=[16, 12], dropout=0.5)
    assert [type(step).__name__ for step in head.map] == ["Linear", "GELU", "BatchNorm1d", "Dropout"] * 2 + ["Linear"]
    assert [tuple(step.weight.shape) for step in head.map if hasattr(step, "in_features")] == [
        (16, 8),
        (12, 16),
        (5, 12),
    ]
    assert torch.allclose(head(Features(torch.randn(4, 8))).embedding.norm(dim=1), torch.ones(4))
    with pytest.raises(ValueError, match="head.hidden=.0.: must be a .list. of widths"):
        DeepMLP(8, 5, hidden=[0])


def test_words_go_with_a_deep_head_as_well():
    joint = JointVocabulary(8, 5, 3, ["a", "b", "c"], hidden=[16, 12], dropout=0.5).eval()
    deep = DeepMLP(8, 5, hidden=[16, 12], dropout=0.5).eval()
    deep.load_state_dict(joint.embed.state_dict())
    features = Features(torch.randn(4, 8))
    assert torch.equal(joint(features).embedding, deep(features).embedding) and joint(features).words.shape == (4, 3)
    # Ridge is for maps that are affine.
    assert JointVocabulary(8, 5, 3).is_affine and not joint.is_affine
    with pytest.raises(ValueError, match="DeepMLP is no affine map"):
        joint.affine()


def test_scores_of_words_are_scikit_learn_s():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, 6, generator=generator), (torch.rand(40, 6, generator=generator) < 0.2).float()
    labels[:, 2] = 0
    scores = word_scores(logits, labels)
    has = [0, 1, 3, 4, 5]
    assert scores["word_map"] == pytest.approx(
        average_precision_score(labels[:, has].numpy(), logits[:, has].numpy(), average="macro"), abs=1e-6
    )
    assert scores["word_f1"] == pytest.approx(f1_score(labels.numpy(), logits.numpy() > 0, average="micro"), abs=1e-6)
    assert word_scores(labels * 9 - 4, labels) == {"word_map": 1.0, "word_f1": 1.0}
    # One word alone, in the vocabulary or among the prompts, is scored as well.
    alone = word_scores(logits[:, :1], labels[:, :1])
    assert alone["word_map"] == pytest.approx(average_precision_score(labels[:, 0].numpy(), logits[:, 0].numpy()))
    assert word_scores(logits[:, 1:3], labels[:, 1:3])["word_map"] > 0


def test_words_fitted_upon_embeddings_are_those_of_logistic_regression():
    features = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    vocabulary = ["up", "down"]
    prompts = [("up" if row[0] > 0.3 else "") + (" down" if row[1] < -1 else "") for row in features.tolist()]
    head, labels = JointVocabulary(6, 6, 2, vocabulary), Labels(prompts, vocabulary)
    head.set_affine(torch.eye(6), torch.zeros(6))
    fit_words(head, features, list(range(300)), labels)
    with torch.no_grad():
        scores = word_scores(head(Features(features)).words, labels.of(range(300)))
    assert scores["word_map"] > 0.9 and scores["word_f1"] > 0.8


def test_a_run_learns_words_of_its_training_prompts_alone_and_its_checkpoint_keeps_them(joint_run):
    vocabulary = (joint_run / "vocabulary.txt").read_text().split("\n")[:-1]
    train = pq.read_table(joint_run / "bank.parquet")["prompt"].to_pylist()
    held = pq.read_table(joint_run / "validation.parquet")["prompt"].to_pylist()
    assert vocabulary == vocabulary_of(train, 12) != vocabulary_of(train + held, 12)
    checkpoint = joint_run / "checkpoints" / "finetune.safetensors"
    assert read_header(checkpoint).head["vocabulary"] == vocabulary == load_regressor(checkpoint).head.vocabulary
    rows = [row for row in read_csv(joint_run / "metrics.csv") if row["val/cosine"]]
    assert all(0 < float(row["val/word_map"]) <= 1 and 0 <= float(row["val/word_f1"]) <= 1 for row in rows)
    assert len({row["val/word_map"] for row in rows}) > 1


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "npz"])
def test_predictions_say_the_likeliest_words(ending, joint_run, pairs_folder, tmp_path, capsys):
    checkpoint, out = joint_run / "checkpoints" / "finetune.safetensors", tmp_path / f"p.{ending}"
    predict(ckpt=str(checkpoint), images=str(pairs_folder / "images"), out=str(out), **PREDICT)
    if ending == "parquet":
        table = pq.read_table(out).to_pydict()
        words, chances = table["words"], table["word_probabilities"]
    elif ending == "jsonl":
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        words, chances = [row["words"] for row in rows], [row["word_probabilities"] for row in rows]
    else:
        file = np.load(out)
        words, chances = file["words"].tolist(), file["word_probabilities"].tolist()
    vocabulary = read_header(checkpoint).head["vocabulary"]
    assert {len(row) for row in words} == {4} and {word for row in words for word in row} <= set(vocabulary)
    assert all(0 <= low <= high <= 1 for row in chances for high, low in zip(row, row[1:], strict=False))
    assert f": {words[0][0]} ({chances[0][0]:.3f})" in capsys.readouterr().out
    none = img2prompt.load(checkpoint, "cpu", top_words=0).predict(str(pairs_folder / "images"))
    assert "words" not in none.columns


def test_a_part_without_a_readable_image_has_the_columns_of_the_others(joint_run, pairs_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("img2prompt.commands.predict.PART_IMAGES", 2)
    for number, image in enumerate(sorted((pairs_folder / "images").iterdir())[:3]):
        (tmp_path / f"{number}.png").write_bytes(image.read_bytes() if number != 2 else b"broken")
    checkpoint = joint_run / "checkpoints" / "finetune.safetensors"
    predict(ckpt=str(checkpoint), images=str(tmp_path), out=str(tmp_path / "p.parquet"), **PREDICT)
    assert [len(row) for row in pq.read_table(tmp_path / "p.parquet")["words"].to_pylist()] == [4, 4]


def test_a_run_that_goes_on_or_starts_from_another_says_the_same_words(joint_run, train_here, tmp_path):
    run = shutil.copytree(joint_run, tmp_path / "run")
    (run / "summary.json").unlink()
    # Not what the tagger of today would find.
    words = [f"word{chr(97 + number)}" for number in range(12)]
    (run / "vocabulary.txt").write_text("".join(f"{word}\n" for word in words))
    began = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**began, "words": words_digest(words)}))
    (run / "ladder.csv").unlink()
    shutil.rmtree(run / "checkpoints")
    train_here(run, *JOINT)
    assert read_header(run / "checkpoints" / "finetune.safetensors").head["vocabulary"] == words
    other = tmp_path / "other"
    train_here(other, *JOINT, f"init_from={run / 'checkpoints' / 'finetune.safetensors'}", "trainer.max_epochs=1")
    assert read_header(other / "checkpoints" / "finetune.safetensors").head["vocabulary"] == words


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("head=joint_vocabulary",), "head=joint_vocabulary says words, which only loss=joint teaches it; choose both"),
        (("loss=joint",), "loss=joint is of words, which only head=joint_vocabulary says; choose both"),
        ((*JOINT, "head.vocabulary_size=0"), "head.vocabulary_size must be at least 1, got 0"),
        ((*JOINT, "head.vocabulary_size=5000"), r"head.vocabulary_size=5000: the training prompts have \d+ nouns"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_told(overrides, sentence, train_here, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        train_here(tmp_path / "run", *overrides)
    assert not (tmp_path / "run" / "data.json").exists()


def test_without_the_tagger_the_extra_is_named():
    missing = ModuleNotFoundError("No module named 'HanTa'")
    assert sentence_of("train", missing) == "hanta is not installed; pip install 'img2prompt[vocabulary]'"
