"""Sources beyond one folder: mixtures, a validation set of its own, datasets of the Hub."""

import csv
import io
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import settings_of
from hydra.errors import InstantiationException
from PIL import Image

from img2prompt.commands.sentences import sentence_of
from img2prompt.commands.sources import find, item_source
from img2prompt.commands.table import find_table
from img2prompt.data.decoding import ImageError
from img2prompt.data.sample import Source


def kaggle(folder, prompts):
    (folder / "images").mkdir(parents=True)
    for i in range(len(prompts)):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / "images" / f"{i}.png")
    with (folder / "prompts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("imgId", "prompt"), *((i, prompt) for i, prompt in enumerate(prompts))])
    return folder


def data_of(*overrides):
    return settings_of(*overrides)["data"]


@pytest.fixture
def two(tmp_path):
    return kaggle(tmp_path / "one", ["a cat", "a dog"]), kaggle(tmp_path / "two", ["a cat", "rain", "snow"])


def mixture(one, two, **more):
    items = [{"source": "kaggle", "root": str(one), **more}, {"source": "kaggle", "root": str(two), "weight": 2}]
    return data_of("data=mixture") | {"sources": items}


def test_a_mixture_has_the_rows_of_all_under_their_names(two):
    found = find(mixture(*two))
    assert [sample.id for sample in found.samples] == [
        *("kaggle-one/0", "kaggle-one/1", "kaggle-two/0", "kaggle-two/1", "kaggle-two/2")
    ]
    assert found.weights == {"kaggle-one": 1.0, "kaggle-two": 2}
    last = found.samples[-1]
    assert last.source.name == "kaggle-two" and last.source.read(last.location).startswith(b"\x89PNG")
    assert isinstance(last.source, Source)


def test_the_weights_of_a_mixture_reach_the_order(two):
    from img2prompt.data.lineage import Lineage
    from img2prompt.data.split import Sides
    from img2prompt.training.pairs import Rows

    found = find(mixture(*two))
    rows = Rows(found.samples, torch.zeros(5, 2), found.weights, Sides(np.zeros(5, dtype=bool)), Lineage(), {})
    draws = rows.draws(np.arange(5))
    assert draws.rates.tolist() == [0.5, 0.5, 1, 1, 1]
    # "a cat" is in both and counts once in an epoch.
    assert len(set(draws.prompts.tolist())) == 4 and len(set(draws.images.tolist())) == 5


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        ({"source": "foldr", "root": "."}, "no source foldr; did you mean folder.*diffusiondb, folder, hub, kaggle"),
        ({"source": "kaggle"}, r"expected \{source: "),
        ("here", r"expected \{source: "),
        ({"source": "kaggle", "root": ".", "wieght": 2}, "wieght is no key of kaggle"),
        ({"source": "folder", "root": ".", "on_mising": "skip"}, "did you mean on_missing"),
    ],
)
def test_an_item_that_is_no_source_is_named(item, sentence):
    with pytest.raises(ValueError, match=sentence):
        item_source(item, data_of("data=kaggle"), "data.sources")


def test_mixtures_refuse_two_of_one_name_bad_weights_and_nothing(two):
    with pytest.raises(ValueError, match="two are called kaggle-one"):
        find(mixture(two[0], two[0]))
    for weight in (0, -1, float("nan"), "x", True):
        with pytest.raises(ValueError, match="the weight of kaggle-one must be a number above 0"):
            find(mixture(*two, weight=weight))
    with pytest.raises(ValueError, match="weight is no key of kaggle"):
        item_source({"source": "kaggle", "root": ".", "weight": 2}, data_of("data=kaggle"), "data.val")
    with pytest.raises(ValueError, match=r"data=mixture needs data\.sources"):
        find(data_of("data=mixture"))


def test_a_validation_set_of_its_own_holds_all_that_validates_and_what_is_close_is_not_trained_on(
    tmp_path, train_here, capsys
):
    train = kaggle(
        tmp_path / "train",
        [
            "a portrait of a red fox",
            "portrait of a red fox",
            "a city in the rain",
            "three ships at sea",
            "a bowl of soup",
        ],
    )
    held = kaggle(tmp_path / "held", ["a portrait of the red fox", "mountains of ice", "THREE  ships at sea"])
    options = ("data.batch_size=2", "data.group_threshold=0.7", "trainer.max_epochs=1")
    train_here(tmp_path / "run", *options, f"data.root={train}", f"data.val={{source:kaggle,root:'{held}'}}")
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert (split["train_pairs"], split["val_pairs"]) == (2, 3) and split["largest_train_val_cosine"] < 0.7
    assert "3 of a validation image, or close to a validation prompt" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["val_cosine_by_source"]) == ["val-kaggle-held"]


def test_validation_is_told_for_each_source(tmp_path, train_here, capsys):
    one = kaggle(tmp_path / "one", [f"one {i} {'x' * i}" for i in range(20)])
    two = kaggle(tmp_path / "two", [f"two {i} {'y' * i}" for i in range(20)])
    items = f"data.sources=[{{source:kaggle,root:'{one}'}},{{source:kaggle,root:'{two}'}}]"
    train_here(tmp_path / "run", "data=mixture", "data.root=null", items, "data.val=0.4", "trainer.max_epochs=1")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    by_source = summary["val_cosine_by_source"]
    assert set(by_source) == {"kaggle-one", "kaggle-two"}
    assert min(by_source.values()) <= summary["val_cosine"] <= max(by_source.values())
    assert "validation by source: kaggle-one" in capsys.readouterr().out


def hub_folder(path, prompts, name="caption"):
    import datasets

    pictures = []
    for i in range(len(prompts)):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (i % 256, i // 256, 0)).save(file, "PNG")
        pictures.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), name: datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": pictures, name: prompts}, features=features)
    path.mkdir()
    rows.to_parquet(path / "train-00000-of-00001.parquet")
    return rows


@pytest.fixture
def quiet_hub(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def test_three_hundred_rows_of_a_dataset_have_each_their_own_prompt(tmp_path, quiet_hub):
    from img2prompt.data.hub_dataset import HubDataset
    from img2prompt.data.images import decode

    rows = hub_folder(tmp_path / "data", [f"prompt {i}" for i in range(300)])
    rows.save_to_disk(tmp_path / "disk")
    for root in (tmp_path / "data", tmp_path / "disk"):
        source = HubDataset(root)
        samples = source.find().samples
        assert len(samples) == 300
        for sample in reversed(samples):
            red, green, _ = decode(source.read(sample.location))[:, 0, 0].tolist()
            assert sample.prompt == f"prompt {red + 256 * green}"
        assert source.stamp("1") != source.stamp("2") and source.stamp("1") == source.stamp("1")


def test_rows_without_words_or_images_and_wrong_columns_are_named(tmp_path, quiet_hub):
    from img2prompt.data.hub_dataset import HubDataset

    hub_folder(tmp_path / "data", ["a", "", None], name="text")
    found = HubDataset(tmp_path / "data").find()
    assert [sample.id for sample in found.samples] == ["00000000"]
    assert found.skipped == [("00000001", "no text in the column text"), ("00000002", "no text in the column text")]
    with pytest.raises(ValueError, match=r"no column prompt among image, text; name it with data\.prompt_column"):
        HubDataset(tmp_path / "data", prompt_column="prompt").find()
    with pytest.raises(ValueError, match="cannot be loaded"):
        HubDataset(tmp_path / "data", split="validation").find()
    with pytest.raises(ValueError, match="cannot be loaded"):
        HubDataset("nobody/nothing").find()
    with pytest.raises(ValueError, match="OWNER/NAME"):
        HubDataset(None)
    source = HubDataset(tmp_path / "data")
    source.find()
    source._rows = [{"image": None}]
    with pytest.raises(ImageError, match="no image"):
        source.read("0")


def test_the_extra_of_a_source_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "img2prompt.data.hub_dataset", raising=False)
    monkeypatch.delattr("img2prompt.data.hub_dataset", raising=False)
    with pytest.raises(InstantiationException) as error:
        find_table(data_of("data=hub", "data.root=a/b"))
    assert sentence_of("train", error.value) == "datasets is not installed; pip install 'img2prompt[hub]'"


def test_a_run_that_begins_from_another_never_validates_on_what_that_trained_on(tmp_path, train_here, capsys):
    things = [
        "castle",
        "violin",
        "volcano",
        "tortoise",
        "submarine",
        "cactus",
        "astronaut",
        "waterfall",
        "robot",
        "owl",
    ]
    prompts = [f"{thing} number {'i' * i}" for i, thing in enumerate(things)]
    first = kaggle(tmp_path / "first", prompts)
    # The same again, near ones, and new ones.
    more = kaggle(
        tmp_path / "more", prompts + [f"a {thing}" for thing in things] + ["dust", "glass bridge", "two keys"]
    )
    fine = "checkpoints/finetune.safetensors"
    usual = ("data.group_threshold=0.7", "data.duplicate_threshold=0.99", "data.batch_size=4", "trainer.max_epochs=1")
    train_here(tmp_path / "1", f"data.root={first}", "data.val=0.3", *usual)
    trained = json.loads((tmp_path / "1" / "trained.json").read_text())["prompts"]
    held = set(prompts) - set(trained)
    assert held
    for name, option in (("init", f"init_from={tmp_path / '1' / fine}"), ("keep", f"data.keep_split={tmp_path / '1'}")):
        train_here(tmp_path / name, f"data.root={more}", "data.val=0.2", option, *usual)
        split = json.loads((tmp_path / name / "split.json").read_text())
        again = set(json.loads((tmp_path / name / "trained.json").read_text())["prompts"])
        assert set(trained) <= again and split["pairs_trained_before"] >= len(trained)
        assert split["prompts_moved"] == len(held & again)
    # A third generation remembers the first, which is not among its data.
    other = kaggle(tmp_path / "other", ["one tree", "blue paint", "a choir", "seven stones", "old map", *trained[:2]])
    train_here(tmp_path / "3", f"data.root={other}", "data.val=0.3", f"init_from={tmp_path / 'init' / fine}", *usual)
    record = json.loads((tmp_path / "3" / "trained.json").read_text())
    remembered = {*record["prompts"], *record["earlier"]["prompts"]}
    assert set(trained) <= remembered
    # A validation set of its own leaves out what was trained on.
    item = f"data.val={{source:kaggle,root:'{first}'}}"
    train_here(tmp_path / "4", f"data.root={other}", item, f"init_from={tmp_path / '1' / fine}", *usual)
    assert json.loads((tmp_path / "4" / "split.json").read_text())["val_pairs"] <= len(held)
    assert "close to a prompt that an earlier run trained on" in capsys.readouterr().out


def test_no_prompt_moves_to_validation_when_the_data_of_a_second_run_have_grown(tmp_path, train_here, capsys):
    things = "castle violin volcano tortoise submarine cactus astronaut waterfall robot owl".split()
    data = kaggle(tmp_path / "data", things)
    usual = (f"data.root={data}", "data.val=0.3", "data.group_threshold=0.5", "trainer.max_epochs=1")
    rows = "data.json"
    train_here(tmp_path / "1", *usual)
    train_here(tmp_path / "2", *usual)
    assert (tmp_path / "1" / rows).read_text() == (tmp_path / "2" / rows).read_text()
    before = json.loads((tmp_path / "2" / "trained.json").read_text())
    # New ones, and for one that was held out and one that trained a near one that joins the two.
    left, right = before["held_out"][0], before["prompts"][0]
    shutil.rmtree(data)
    new = ["dust", "glass bridge", "two keys", "a choir", "seven stones", "old map", "blue paint", "a lantern"]
    kaggle(data, [*things, f"{left} and {right}", f"a {left}", f"a {right}", *new])
    train_here(tmp_path / "3", *usual)
    after = json.loads((tmp_path / "3" / "trained.json").read_text())
    assert set(before["prompts"]) <= set(after["prompts"]) and not set(before["prompts"]) & set(after["held_out"])
    assert left in after["prompts"] and set(after["held_out"]) >= set(before["held_out"]) - {left}
    assert json.loads((tmp_path / "3" / "split.json").read_text())["prompts_moved"] == 1
    told = capsys.readouterr().out
    assert f"what trained in {tmp_path / '2'} and 1 more trains" in told
    assert "1 prompts that validated before train now" in told
    # A run goes on though those whose split it keeps are gone.
    shutil.rmtree(tmp_path / "1")
    shutil.rmtree(tmp_path / "2")
    (tmp_path / "3" / "summary.json").unlink()
    (tmp_path / "3" / "data.json").unlink()
    train_here(tmp_path / "3", *usual)
    again = json.loads((tmp_path / "3" / "trained.json").read_text())
    assert all(again[key] == after[key] for key in ("prompts", "images", "held_out"))
    # Other settings of the split are another split.
    for number, other in enumerate(("data.seed=1", "data.val=0.4", "data.keep_split=null")):
        train_here(tmp_path / f"other-{number}", *usual, other)
        assert json.loads((tmp_path / f"other-{number}" / "split.json").read_text())["pairs_trained_before"] == 0


def test_no_prompt_moves_to_validation_whatever_runs_were_between(tmp_path, train_here, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = kaggle(tmp_path / "one", "castle violin volcano tortoise submarine cactus astronaut waterfall".split())
    two = kaggle(tmp_path / "two", "robot owl lantern bridge kettle choir anchor meadow castles violins".split())
    usual = ("data.val=0.3", "data.group_threshold=0.7", "trainer.max_epochs=1")
    both = ("data=mixture", f"data.sources=[{{source:kaggle,root:'{one}'}},{{source:kaggle,root:'{two}'}}]")

    def sides(number, *options):
        train_here(tmp_path / "runs" / "x" / number, *options, *usual)
        record = json.loads((tmp_path / "runs" / "x" / number / "trained.json").read_text())
        return set(record["prompts"]), set(record["held_out"])

    # A path as it is typed means another folder elsewhere.
    first, held = sides("1", "data.root=one")
    monkeypatch.chdir(tmp_path / "two")
    smoke, _ = sides("2", f"data.root={one}", "data.count=5")
    again = sides("3", "data.root=../one", "run_dir=null")
    assert first <= again[0] and not smoke & again[1] and again[1] <= held
    other, _ = sides("4", f"data.root={two}")
    together, apart = sides("5", *both)
    assert first | other <= together and not (first | other) & apart
    # The same image with another caption trains as well.
    rows = (one / "prompts.csv").read_text().splitlines()
    changed = [f"{line.partition(',')[0]},something else {i}" if i else line for i, line in enumerate(rows)]
    (one / "prompts.csv").write_text("\n".join(changed) + "\n")
    trained = {i for i, line in enumerate(rows) if i and line.partition(",")[2] in first}
    assert trained
    try:
        _, recaptioned = sides("6", f"data.root={one}")
    except ValueError as error:
        assert "were trained on by an earlier run" in str(error)
    else:
        assert not {f"something else {i}" for i in trained} & recaptioned


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[" * 5000,
        "null",
        '{"split": 3}',
        '{"prompts": "abc"}',
        '{"prompts": [1], "images": [], "combinations": [], "held_out": [], "earlier": {}}',
    ],
)
def test_a_damaged_record_beside_a_run_is_told_and_stops_nothing(damage, tmp_path, train_here, capsys):
    things = kaggle(tmp_path / "data", "castle violin volcano tortoise submarine cactus astronaut waterfall".split())
    usual = (f"data.root={things}", "data.val=0.3", "trainer.max_epochs=0")
    train_here(tmp_path / "1", *usual)
    (tmp_path / "1" / "trained.json").write_text(damage)
    train_here(tmp_path / "2", *usual)
    assert "damaged, or written by another version; what it trained on may validate here" in capsys.readouterr().err
    for run in ("1", "2"):
        (tmp_path / run / "split.json").write_text(damage)
    train_here(tmp_path / "3", *usual)
    with pytest.raises(ValueError, match="trained.json: damaged"):
        train_here(tmp_path / "4", *usual, f"data.keep_split={tmp_path / '1'}")


def test_runs_with_another_line_of_descent_leave_no_trace_in_the_split(tmp_path, train_here):
    things = kaggle(tmp_path / "data", "castle violin volcano tortoise submarine cactus astronaut waterfall".split())
    usual = (f"data.root={things}", "data.val=0.3", "trainer.max_epochs=1")
    train_here(tmp_path / "else" / "0", *usual, "data.seed=5")
    train_here(tmp_path / "1", *usual)
    train_here(tmp_path / "2", *usual, f"data.keep_split={tmp_path / 'else' / '0'}")
    train_here(tmp_path / "3", *usual)
    assert (tmp_path / "1" / "data.json").read_text() == (tmp_path / "3" / "data.json").read_text()


def test_prompts_that_are_no_unicode_are_left_out(two):
    (two[0] / "prompts.csv").write_text("imgId,prompt\n0,a\n1,b\n")
    from img2prompt.data.filters import well_formed

    samples = find(mixture(*two)).samples
    broken = [samples[0], replace(samples[1], prompt="a \ud83d cat")]
    kept, dropped = well_formed(broken)
    assert kept == broken[:1] and dropped == [(broken[1].id, "text that is no Unicode")]


def test_each_source_of_a_mixture_is_counted_and_an_empty_one_is_named(two):
    table = find_table(mixture(*two) | {"min_words": 2})
    assert table.by_source() == {"kaggle-one": (2, 2), "kaggle-two": (3, 1)}
    (two[0] / "prompts.csv").write_text("imgId,prompt\n0,\n")
    with pytest.raises(ValueError, match=r"no usable pair in kaggle-one, 1 skipped \(first: 0: empty prompt\)"):
        find(mixture(*two))


def test_ids_with_folders_are_written_under_names_that_predict_gives_back(tmp_path, two):
    from img2prompt.data.listing import list_images
    from img2prompt.training.pairs import write_pairs

    write_pairs(find(mixture(*two)).samples, tmp_path / "out")
    with (tmp_path / "out" / "prompts.csv").open(newline="") as file:
        names = [row["imgId"] for row in csv.DictReader(file)]
    assert sorted(names) == [file.id for file in list_images(tmp_path / "out" / "images").files]
