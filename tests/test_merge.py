"""Merging: averages are what their formulas say, leak nothing, lose nothing, and never score less than promised."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import PREDICT, QUICK, ROOT, TINY, read_csv, settings_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from img2prompt.bank import read_bank
from img2prompt.commands.earlier import earlier_runs, runs_of
from img2prompt.commands.held_out import held_out
from img2prompt.commands.merge import merge
from img2prompt.commands.predict import predict
from img2prompt.commands.settings import compose
from img2prompt.commands.train import train
from img2prompt.data.prompts import prompt_key
from img2prompt.merging import averaged, greedy_soup
from img2prompt.regressor import load_regressor, read_header

BAD = (3, 20)
# A third validates, so that scores tell one epoch from another.
WIDE = ("data.val=0.3", "trainer.max_epochs=4", "trainer.keep_checkpoints=3", "optim.lr=1e-5")


def merged(ckpts, *overrides, **given):
    """Merges in this process, with the defaults of the command: the header of what was written."""
    ckpts = [str(one) for one in ckpts] if isinstance(ckpts, list) else ckpts
    settings = {**compose("merge", ["ckpts=x", "device=cpu", *overrides]), "ckpts": ckpts, **given}
    merge(**settings)
    return read_header(Path(settings["out"]))


def weight_of(header):
    return {Path(one["checkpoint"]).stem: one["weight"] for one in header.made_of["ingredients"]}


def score_of(header):
    return {Path(one["checkpoint"]).stem: one["val_cosine"] for one in header.made_of["ingredients"]}


def bits(path):
    return {key: (value.dtype, value.shape, value.numpy().tobytes()) for key, value in load_file(path).items()}


@pytest.fixture(scope="module")
def start(tmp_path_factory, finished_run):
    """Weights that stand for a published encoder."""
    path = tmp_path_factory.mktemp("start") / "encoder.safetensors"
    weights, name = load_file(finished_run / "checkpoints" / "finetune.safetensors"), "encoder.model."
    save_file({key.removeprefix(name): value for key, value in weights.items() if key.startswith(name)}, path)
    return f"encoder.pretrained={path}"


@pytest.fixture(scope="module")
def run(tmp_path_factory, train_here, start):
    """A run with a probe and three kept epochs."""
    folder = tmp_path_factory.mktemp("merge") / "run"
    train_here(folder, *WIDE, start)
    return folder


@pytest.fixture(scope="module")
def second_seed(run, train_here, start):
    """Another run over the same split."""
    folder = run.with_name("second")
    train_here(folder, *WIDE, start, "seed=1")
    return folder


@pytest.fixture(scope="module")
def other_split(tmp_path_factory, train_here, start):
    folder = tmp_path_factory.mktemp("other") / "other"
    train_here(folder, *WIDE, start, "data.seed=5")
    return folder


def part(run, name):
    return run / "checkpoints" / f"{name}.safetensors"


def kept(run):
    return sorted(run.glob("checkpoints/finetune_step*.safetensors"))


def with_weights(source, goal, change):
    """A copy of a checkpoint with other tensors, beside its run's own."""
    regressor = load_regressor(source)
    regressor.load_state_dict(change(regressor.state_dict()))
    regressor.save(goal, {"rung": "changed"})
    return goal


def test_an_average_is_the_weighted_sum_in_every_tensor(tmp_path):
    generator = np.random.default_rng(0)
    tables = [
        {"a": generator.normal(size=(3, 4)).astype(np.float32), "b": generator.normal(size=5).astype(np.float16)}
        for _ in range(3)
    ]
    paths, weights = [], [0.2, 0.3, 0.5]
    for number, table in enumerate(tables):
        tensors = {key: torch.from_numpy(value) for key, value in table.items()}
        # BatchNorm counts its steps.
        paths.append(tmp_path / f"{number}.safetensors")
        save_file({**tensors, "num_batches_tracked": torch.tensor(10 + number)}, paths[-1])
    found = averaged(paths, weights)
    for key in ("a", "b"):
        exact = sum(weight * table[key].astype(np.float64) for weight, table in zip(weights, tables, strict=True))
        assert np.array_equal(found[key].numpy(), exact.astype(tables[0][key].dtype))
    assert found["num_batches_tracked"] == 12 and found["num_batches_tracked"].dtype == torch.int64
    assert averaged(paths, [0.5, 0.5, 0])["num_batches_tracked"] == 11


def test_a_checkpoint_of_weight_one_comes_back_bit_for_bit_and_one_of_weight_zero_is_not_read(tmp_path):
    values = torch.tensor([-0.0, 1e-45, 3.4e38, 1 / 3])
    save_file({"a": values}, tmp_path / "a.safetensors")
    found = averaged([tmp_path / "a.safetensors", tmp_path / "not there"], [1.0, 0.0])
    assert found["a"].numpy().tobytes() == values.numpy().tobytes()


def test_tensors_of_other_names_or_shapes_are_not_averaged(tmp_path):
    for name, tensors in (("a", {"x": torch.ones(2)}), ("b", {"y": torch.ones(2)}), ("c", {"x": torch.ones(1)})):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    with pytest.raises(ValueError, match="b.safetensors: its tensors are not those of .*first difference: x"):
        averaged([a, b], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"c.safetensors: x is of another shape than in .*: \(1,\) and \(2,\)"):
        averaged([a, c], [0.5, 0.5])


def test_the_soup_takes_in_order_of_the_scores_what_does_not_lower_it():
    gains = {(1,): 0.5, (1, 3): 0.4, (1, 0): 0.5, (1, 0, 2): 0.6}
    asked = []

    def score(some):
        asked.append(tuple(some))
        return gains[tuple(some)]

    assert greedy_soup([0.3, 0.5, 0.1, 0.4], score) == [1, 0, 2]
    assert asked == [(1, 3), (1, 0), (1, 0, 2)]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_a_soup_never_scores_less_than_its_best_ingredient(scores, chance):
    told = {(number,): score for number, score in enumerate(scores)}

    def score(some):
        return told.setdefault(tuple(some), chance.random())

    assert told[tuple(greedy_soup(scores, score))] >= max(scores)


@pytest.mark.parametrize("method", ["soup", "uniform"])
def test_a_merged_file_is_the_mean_of_those_that_its_header_gives_a_weight(method, run, tmp_path):
    header = merged([run], method=method, out=str(tmp_path / "merged.safetensors"))
    weights = weight_of(header)
    assert list(weights) == [path.stem for path in kept(run)] and len(weights) == 3
    chosen = [path for path in kept(run) if weights[path.stem]]
    assert sum(weights.values()) == pytest.approx(1) and set(weights.values()) <= {0.0, 1 / len(chosen)}
    assert len(chosen) == 3 or method == "soup"
    tables = [{key: value.double() for key, value in load_file(path).items()} for path in chosen]
    for key, value in load_file(tmp_path / "merged.safetensors").items():
        expected = torch.stack([table[key] for table in tables]).mean(0)
        assert torch.allclose(value.double(), expected, rtol=1e-7, atol=1e-9)
    assert header.scores["rung"] == method
    assert header.made_of["scored_on"]["images"] == json.loads((run / "summary.json").read_text())["val_pairs"]


def test_the_file_of_a_soup_scores_no_less_than_its_best_ingredient(run, second_seed, tmp_path):
    header = merged([run, second_seed, part(run, "probe")], out=str(tmp_path / "soup.safetensors"))
    told = [one["val_cosine"] for one in header.made_of["ingredients"]]
    assert len(told) == 7 and header.scores["val_cosine"] >= max(told)


def test_ingredients_score_what_their_run_said(run, tmp_path):
    header = merged([run], method="uniform", out=str(tmp_path / "u.safetensors"))
    for path in kept(run):
        assert score_of(header)[path.stem] == pytest.approx(read_header(path).scores["val_cosine"], abs=1e-6)


def test_a_bad_ingredient_is_left_out_of_the_soup_and_spoils_a_uniform_average(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)

    def noise(weights):
        torch.manual_seed(0)
        return {key: torch.randn_like(value) for key, value in weights.items()}

    bad = with_weights(kept(copy)[0], part(copy, "finetune_step9999999"), noise)
    soup = merged([copy], out=str(tmp_path / "soup.safetensors"))
    assert weight_of(soup)[bad.stem] == 0.0 and len(weight_of(soup)) == 4
    merged([run], out=str(tmp_path / "without.safetensors"))
    assert bits(tmp_path / "soup.safetensors") == bits(tmp_path / "without.safetensors")
    uniform = merged([copy], method="uniform", out=str(tmp_path / "uniform.safetensors"))
    assert set(weight_of(uniform).values()) == {0.25}
    assert uniform.scores["val_cosine"] < max(score_of(uniform).values())


def test_wise_ft_at_its_ends_is_its_ends_and_between_them_the_formula(run, tmp_path):
    ends = [part(run, "probe"), part(run, "finetune")]
    assert bits(ends[0]) != bits(ends[1])
    for alpha, end in ((0, ends[0]), (1.0, ends[1])):
        header = merged(ends, method="wise", alpha=alpha, out=str(tmp_path / f"{alpha}.safetensors"))
        assert bits(tmp_path / f"{alpha}.safetensors") == bits(end)
        assert header.scores["val_cosine"] == pytest.approx(read_header(end).scores["val_cosine"], abs=1e-6)
    merged(ends, method="wise", alpha=0.3, out=str(tmp_path / "between.safetensors"))
    start, end = (load_file(path) for path in ends)
    for key, value in load_file(tmp_path / "between.safetensors").items():
        exact = 0.7 * start[key].numpy().astype(np.float64) + 0.3 * end[key].numpy().astype(np.float64)
        assert np.allclose(value.numpy(), exact, rtol=1e-7, atol=1e-9)


def test_the_best_alpha_is_never_worse_than_the_ends_and_a_run_stands_for_its_probe_and_fine_tune(
    run, tmp_path, capsys
):
    header = merged([run], method="wise", out=str(tmp_path / "wise.safetensors"))
    assert list(weight_of(header)) == ["probe", "finetune"]
    assert header.scores["val_cosine"] >= max(score_of(header).values())
    told = dict(line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("alpha "))
    assert len(told) == 11 and max(told.values()) == f"{header.scores['val_cosine']:.4f}"
    assert float(max(told, key=told.get)) == pytest.approx(weight_of(header)["finetune"])


def test_alphas_that_are_given_are_tried_besides_the_ends(run, tmp_path, capsys):
    merged([run], "alphas=[0.25]", method="wise", out=str(tmp_path / "wise.safetensors"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("alpha ")] == ["0", "0.25", "1"]


def test_a_merged_checkpoint_predicts_and_its_score_is_that_of_its_predictions(run, tmp_path, pairs_folder):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    header = merged([copy], method="uniform", out=str(part(copy, "mine")))
    validation = {prompt_key(one) for one in read_bank(copy / "validation.parquet").prompts}
    rows = [row for row in read_csv(pairs_folder / "prompts.csv") if prompt_key(row["prompt"]) in validation]
    images = [str(pairs_folder / "images" / f"{row['imgId']}.png") for row in rows]
    predict(ckpt=str(part(copy, "mine")), images=images, out=str(tmp_path / "p.parquet"), **PREDICT)
    table = pq.read_table(tmp_path / "p.parquet").to_pydict()
    assert len(table["nearest_prompts"]) == len(rows)
    bank = read_bank(copy / "validation.parquet")
    targets = {prompt_key(one): two.float() for one, two in zip(bank.prompts, bank.embeddings, strict=True)}
    prompt = {row["imgId"]: prompt_key(row["prompt"]) for row in rows}
    predicted = torch.tensor(table["embedding"])
    expected = torch.stack([targets[prompt[one]] for one in table["id"]])
    cosine = torch.nn.functional.cosine_similarity(predicted, expected).mean()
    # The bank keeps targets in half precision.
    assert header.scores["val_cosine"] == pytest.approx(float(cosine), abs=1e-3)


def test_runs_of_one_split_are_merged_on_all_of_its_images(run, second_seed, tmp_path):
    header = merged([run, second_seed], out=str(tmp_path / "soup.safetensors"))
    assert len(header.made_of["ingredients"]) == 6
    assert header.made_of["scored_on"]["images"] == json.loads((run / "data.json").read_text())["validate"]
    assert runs_of(tmp_path / "soup.safetensors") == [run.resolve(), second_seed.resolve()]


def test_dropout_of_the_head_may_differ_for_it_changes_no_prediction(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    regressor = load_regressor(kept(copy)[0])
    regressor.head.config = {**regressor.head.config, "dropout": 0.5}
    regressor.save(part(copy, "dropped"))
    header = merged([kept(copy)[1], part(copy, "dropped")], method="uniform", out=str(tmp_path / "u.safetensors"))
    assert weight_of(header)["dropped"] == 0.5


def test_runs_of_other_splits_are_refused_for_the_score_would_leak(run, other_split, tmp_path):
    for order in ([run, other_split], [other_split, run]):
        with pytest.raises(ValueError, match="trained on all but .* of its .* validation images.*runs of one split"):
            merged(order, out=str(tmp_path / "soup.safetensors"))
    assert not list(tmp_path.iterdir())


def test_no_image_is_scored_whose_prompt_any_ingredient_trained_on(tmp_path, train_here, start):
    """Of two runs over growing data the later may validate on prompts that the earlier never saw, and the other way
    round; a prompt that moved to training is left out.
    """
    small, large = tmp_path / "runs" / "small", tmp_path / "runs" / "large"
    train_here(small, *WIDE, start, "data.count=30")
    train_here(large, *WIDE, start)
    before = (large / "trained.json").read_text()
    record = json.loads(before)
    held = sorted(read_bank(small / "validation.parquet").prompts)
    # As if one of these had moved to training when the data grew.
    record["prompts"].append(held[0].upper())
    (large / "trained.json").write_text(json.dumps(record))
    want = load_regressor(part(small, "best")).encoder.preprocessing
    found = held_out(small, [small, large], want, "cpu", None, None)
    assert {sample.prompt for sample in found.data.samples} == set(held[1:])
    assert 0 < len(found.data.samples) < found.of
    header = merged([small, large], out=str(tmp_path / "soup.safetensors"))
    assert header.made_of["scored_on"]["images"] == len(found.data.samples)
    (large / "trained.json").write_text(before)
    # The later run kept clear of the earlier one: nothing is left out.
    header = merged([small, large], run=str(large), out=str(tmp_path / "large.safetensors"))
    assert header.made_of["scored_on"]["images"] == json.loads((large / "data.json").read_text())["validate"]


def test_a_run_from_an_average_never_validates_on_what_any_ingredient_trained_on(run, second_seed, tmp_path, capsys):
    average = part(run, "both")
    merged([run, second_seed], method="uniform", out=str(average))
    (second_seed / "trained.json").rename(tmp_path / "aside")
    record = json.loads((tmp_path / "aside").read_text())
    record["prompts"].append("only the second run saw this")
    (second_seed / "trained.json").write_text(json.dumps(record))
    settings = settings_of("data=kaggle", "data.root=x", f"init_from={average}", "data.keep_split=null")
    try:
        earlier = earlier_runs(settings, tmp_path / "new", lambda prompts: np.zeros((len(prompts), 2), np.float32))
    finally:
        (tmp_path / "aside").rename(second_seed / "trained.json")
        average.unlink()
    assert "only the second run saw this" in earlier.train_prompts
    assert set(json.loads((run / "trained.json").read_text())["prompts"]) < set(earlier.train_prompts)
    assert "may validate here" not in capsys.readouterr().err


def test_an_average_can_be_merged_again_and_remembers_all_its_runs(run, second_seed, tmp_path):
    merged([run, second_seed], out=str(tmp_path / "soup.safetensors"))
    ends = [part(run, "probe"), tmp_path / "soup.safetensors"]
    header = merged(ends, method="wise", out=str(tmp_path / "wise" / "wise.safetensors"))
    assert header.scores["val_cosine"] >= max(score_of(header).values())
    assert runs_of(tmp_path / "wise" / "wise.safetensors") == [run.resolve(), second_seed.resolve()]


@pytest.fixture(scope="module")
def own_data(tmp_path_factory, pairs_folder, start):
    """A run whose data are its own, with two images that cannot be read; one of them would validate."""
    root = tmp_path_factory.mktemp("own") / "pairs"
    shutil.copytree(pairs_folder, root)
    for number in BAD:
        (root / "images" / f"{number:06d}.png").write_bytes(b"")
    folder = root.with_name("run")
    train(settings_of(*QUICK, *TINY, *WIDE, start, f"data.root={root}", "trainer.max_epochs=2"), folder)
    return root, folder


def test_images_that_were_bad_then_are_left_out_now(own_data, tmp_path):
    root, folder = own_data
    counts = json.loads((folder / "summary.json").read_text())
    assert counts["val_pairs"] == json.loads((folder / "data.json").read_text())["validate"] - 1
    header = merged([folder], out=str(tmp_path / "soup.safetensors"))
    assert header.made_of["scored_on"]["images"] == counts["val_pairs"]


def test_data_that_have_changed_are_refused(own_data, tmp_path):
    root, folder = own_data
    out = str(tmp_path / "soup.safetensors")
    image, table = root / "images" / "000007.png", root / "prompts.csv"
    before, text = image.read_bytes(), table.read_text()
    try:
        image.write_bytes((root / "images" / "000021.png").read_bytes())
        with pytest.raises(ValueError, match=f"^{folder}: its images have changed; put them back"):
            merged([folder], out=out)
        image.write_bytes(before)
        table.write_text(text.rsplit("\n", 2)[0] + "\n")
        with pytest.raises(ValueError, match=f"^{folder}: its data have changed: 40 pairs then, 39 now"):
            merged([folder], out=out)
    finally:
        image.write_bytes(before)
        table.write_text(text)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_never_replaced(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    settings = {**compose("merge", ["ckpts=x", "device=cpu"]), "ckpts": [str(copy)]}
    merge(**settings)
    soup = part(copy, "soup")
    before = soup.read_bytes()
    with pytest.raises(ValueError, match="soup.safetensors: is there already and is kept; give out= another name"):
        merge(
            **settings,
        )
    for name in ("best", "finetune"):
        with pytest.raises(ValueError, match="is there already"):
            merge(**{**settings, "out": str(part(copy, name))})
    assert soup.read_bytes() == before and bits(part(copy, "best")) == bits(part(run, "best"))
    assert not list(copy.rglob("*.tmp"))


def test_bad_input_is_told_in_a_sentence_and_nothing_is_written(run, finished_run, tmp_path):
    probe, tuned, goal = part(run, "probe"), part(run, "finetune"), tmp_path / "out" / "x.safetensors"
    best = json.loads((run / "summary.json").read_text())["best_rung"]
    moved = shutil.copy(tuned, tmp_path / "moved.safetensors")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "notes.safetensors").write_text("no tensors")
    changed = {}
    for name, encoder, head, target in (
        ("width", {}, {}, {"dimension": 768}),
        ("target", {}, {}, {"model": "another"}),
        ("encoder", {"image_size_px": 64}, {}, {}),
        ("head", {}, {"_target_": "img2prompt.heads.MLP"}, {}),
    ):
        regressor = load_regressor(tuned)
        regressor.encoder.config = {**regressor.encoder.config, **encoder}
        regressor.head.config = {**regressor.head.config, **head}
        regressor.target = type(regressor.target)(**{**vars(regressor.target), **target})
        changed[name] = tmp_path / "checkpoints" / f"{name}.safetensors"
        regressor.save(changed[name])
    cases = [
        ([probe, tmp_path / "none.safetensors"], {}, "none.safetensors: no such checkpoint"),
        ([probe, tmp_path / "notes.safetensors"], {}, "notes.safetensors: not a safetensors file"),
        ([tmp_path], {}, "it is not a run folder"),
        ([tuned], {}, "a merge needs two checkpoints or more, got only .*finetune.*keep_checkpoints"),
        ([part(run, best), part(run, "best")], {}, f"a merge needs two checkpoints or more, got only .*{best}"),
        ([], {}, "a merge needs two checkpoints or more, got none"),
        ([tuned, part(run, "mean")], {}, "mean.safetensors: the mean rung, which has no encoder to average"),
        ([tuned, changed["width"]], {}, "width.safetensors: its embeddings have 768 numbers, those of .* 384"),
        ([tuned, changed["target"]], {}, "target.safetensors: its target is another .*, that of .*MiniLM"),
        ([tuned, changed["encoder"]], {}, "encoder.safetensors: its encoder has image_size_px=64, that of .* 32"),
        ([tuned, changed["head"]], {}, "head.safetensors: its head has _target_=img2prompt.heads.MLP, that of"),
        ([probe, moved], {}, "moved.safetensors: what it trained on is not known: .* is no run folder"),
        ([probe, tuned], {"method": "mean"}, "method=mean: must be one of soup, wise, uniform"),
        ([probe, tuned], {"alpha": 0.5}, "alpha=0.5 is for method=wise"),
        ([probe, tuned], {"method": "wise", "alpha": 1.5}, "alpha must be between 0 .* and 1 .*, got 1.5"),
        ([probe, tuned], {"method": "wise", "alphas": [0.5, -1]}, "alphas must be between 0 .* got -1"),
        ([probe, tuned], {"method": "wise", "alphas": ["x"]}, "alphas must be between 0 .* got x"),
        (kept(run), {"method": "wise"}, "method=wise takes two checkpoints, the start and the end, got 3"),
        ([finished_run], {"method": "wise"}, "it has no probe.safetensors to go from or to"),
        ([probe, tuned], {"run": str(finished_run)}, "none of the checkpoints is of it; choose one of"),
        ([probe, tuned], {"out": str(tmp_path / "x.pt")}, "out=.*x.pt: the ending must be .safetensors"),
        ([probe, tuned], {"device": "tpu"}, "device=tpu: must be one of auto, cpu"),
        ([probe, tuned], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ]
    larger = shutil.copytree(run, tmp_path / "larger")
    shutil.copy(part(run, "finetune"), part(larger, "finetune_larger"))
    cases.append(([larger], {"method": "wise"}, "it went on from its fine-tune to finetune_larger.safetensors; give"))
    before = {path: path.stat().st_mtime_ns for path in [*run.rglob("*"), *tmp_path.rglob("*")]}
    for ckpts, options, sentence in cases:
        with pytest.raises(ValueError, match=sentence) as told:
            merged(ckpts, **{"out": str(goal), **options})
        assert "\n" not in str(told.value)
    assert {path: path.stat().st_mtime_ns for path in [*run.rglob("*"), *tmp_path.rglob("*")]} == before


def test_an_ingredient_with_values_that_are_not_finite_is_named(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    weights = load_file(part(copy, "probe"))
    weights["head.bias"][0] = float("nan")
    with_weights(part(copy, "probe"), part(copy, "broken"), lambda _: weights)
    with pytest.raises(ValueError, match="broken.safetensors: head.bias holds values that are not finite"):
        merged([part(copy, "finetune"), part(copy, "broken")], out=str(tmp_path / "x.safetensors"))
    assert not (tmp_path / "x.safetensors").exists()


def test_merge_works_as_a_user_runs_it(run, tmp_path):
    shutil.copytree(run, tmp_path / "run=1, (best)")
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'offline'}"}

    command = [sys.executable, "-m", "img2prompt", "merge", 'ckpts=["run=1, (best)"]', "device=cpu"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in ("ingredient", "finetune_step", "validation images of", "slightly optimistic", "predict with it"):
        assert words in done.stdout
    assert (tmp_path / "run=1, (best)" / "checkpoints" / "soup.safetensors").is_file()
