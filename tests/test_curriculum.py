"""Easy pairs first: the schedule, its nested epochs, records by id, resume, and the two runs of the command."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import QUICK, ROOT, TINY, read_csv, settings_of
from safetensors.torch import load_file, save_file

from img2prompt.commands.curriculum import main
from img2prompt.data.difficulty import agreement, read_scores, shortness, weighted, write_scores
from img2prompt.data.drawings import Drawings
from img2prompt.data.order import Draws, batch_rows, epoch_rows, place_of, rows_in_epoch, steps_of, steps_per_epoch
from img2prompt.data.sample import Sample
from img2prompt.synthesis.procedural import Procedural
from img2prompt.training.curriculum import Curriculum, write_records
from img2prompt.training.optim import AdamW

FIRST = ("curriculum=easy_first", "curriculum.scorer=prompt_length")


def draws_of(count, stages=1, ease=None, images_per_prompt=1):
    rows = count * images_per_prompt
    return Draws(
        prompts=np.arange(rows) // images_per_prompt,
        images=np.arange(rows),
        rates=np.ones(rows),
        hashes=np.random.default_rng(0).integers(0, 2**63, rows, dtype=np.uint64),
        stages=stages,
        ease=ease,
    )


def samples_of(prompts):
    source = Drawings(2, 1, 0, Procedural(8))
    return [Sample(f"{number:03d}", prompt, source, "") for number, prompt in enumerate(prompts)]


def test_the_fractions_are_those_of_the_paper():
    assert [rows_in_epoch(60, epoch, 1) for epoch in range(3)] == [60, 60, 60]
    assert [rows_in_epoch(60, epoch, 2) for epoch in range(3)] == [30, 60, 60]
    assert [rows_in_epoch(60, epoch, 3) for epoch in range(4)] == [20, 30, 60, 60]
    assert [rows_in_epoch(60, epoch, 4) for epoch in range(5)] == [15, 20, 30, 60, 60]


@pytest.mark.parametrize("images_per_prompt", [1, 3])
def test_an_epoch_has_the_easiest_prompts_and_those_of_the_epoch_before(images_per_prompt):
    ease = np.random.default_rng(1).normal(size=40 * images_per_prompt)
    draws = draws_of(40, 4, ease, images_per_prompt)
    means = ease.reshape(40, -1).mean(1)
    earlier = set()
    for epoch in range(6):
        rows = epoch_rows(draws, 0, "finetune", epoch)
        prompts = (rows // images_per_prompt).tolist()
        assert len(set(prompts)) == len(prompts) == rows_in_epoch(40, epoch, 4)
        assert set(prompts) == set(np.argsort(-means)[: len(prompts)].tolist()) >= earlier
        assert prompts != sorted(prompts)
        earlier = set(prompts)
    assert earlier == set(range(40))


def test_of_equally_easy_prompts_those_with_the_first_ids_come_first():
    rows = epoch_rows(draws_of(30, 3, np.zeros(30)), 0, "finetune", 0)
    assert sorted(rows.tolist()) == list(range(10))


def test_one_stage_is_the_plain_order():
    plain, one = draws_of(30), draws_of(30, 1, np.random.default_rng(0).normal(size=30))
    for step in range(12):
        assert batch_rows(plain, 8, 5, "finetune", step).tolist() == batch_rows(one, 8, 5, "finetune", step).tolist()


@pytest.mark.parametrize(("stages", "batch"), [(1, 8), (2, 8), (3, 7), (4, 5)])
def test_steps_are_as_many_as_batches_and_the_rate_never_rises_again(stages, batch):
    count, epochs = 61, 6
    total = steps_of(count, batch, epochs, stages)
    places = [place_of(count, batch, stages, step) for step in range(total)]
    sizes = [steps_per_epoch(rows_in_epoch(count, epoch, stages), batch) for epoch in range(epochs)]
    assert places == [(epoch, step) for epoch, size in enumerate(sizes) for step in range(size)]
    assert place_of(count, batch, stages, total) == (epochs, 0)
    factors = [AdamW(warmup_fraction=0.0).lr_factor(step, total) for step in range(total)]
    assert all(later <= earlier for earlier, later in zip(factors, factors[1:], strict=False)) and factors[-1] < 0.02
    draws = draws_of(count, stages, np.arange(count) * 1.0)
    taken = [batch_rows(draws, batch, 0, "finetune", step) for step in range(total)]
    assert all(len(rows) == batch for rows in taken)


def test_later_records_weigh_more():
    records = [np.full(2, float(number)) for number in range(7)]
    # The last five: 2, 3, 4, 5, 6.
    assert weighted(records).tolist() == pytest.approx([0.1 * 2 + 0.1 * 3 + 0.2 * 4 + 0.2 * 5 + 0.4 * 6] * 2)
    assert weighted(records[:1]).tolist() == [0, 0] and weighted(records[:2])[0] == pytest.approx(0.4 / 0.6)


def test_other_judges_of_what_is_easy():
    assert shortness(samples_of(["a cat", "a cat on a mat", "cat"])).tolist() == [-2, -5, -1]
    one = np.array([[1.0, 0], [0, 2]])
    assert agreement([one, np.array([[3.0, 0], [1, 0]])]).tolist() == [1, 0]
    three = agreement([one, one, -one])
    assert three.tolist() == pytest.approx([-1 / 3] * 2)


def test_records_of_another_data_set_are_refused(tmp_path):
    samples = samples_of(["a", "b", "c"])
    write_scores(tmp_path / "s.parquet", samples[::-1], np.array([3.0, 2.0, 1.0]))
    assert read_scores(tmp_path / "s.parquet", samples).tolist() == [1, 2, 3]
    for others, sentence in (
        (samples_of(["a", "b", "c", "d"]), "records of another data set: 1 of 4 images are not in it .first: 003"),
        (samples_of(["a", "x", "c"]), "records of another data set: 1 have other prompts .first: 001"),
    ):
        with pytest.raises(ValueError, match=sentence):
            read_scores(tmp_path / "s.parquet", others)
    (tmp_path / "t.parquet").write_text("no")
    with pytest.raises(ValueError, match="t.parquet: no records of difficulty"):
        read_scores(tmp_path / "t.parquet", samples)
    write_scores(tmp_path / "n.parquet", samples, np.array([1.0, np.nan, 1.0]))
    with pytest.raises(ValueError, match="scores that are not finite"):
        read_scores(tmp_path / "n.parquet", samples)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"stages": 0}, "curriculum.stages must be at least 1, got 0"),
        ({"scorer": "chance"}, "curriculum.scorer=chance: must be one of own_cosine, clip_alignment"),
        ({"stages": 2}, "curriculum.scorer=own_cosine needs curriculum.records"),
        (
            {"stages": 2, "scorer": "ensemble_agreement", "predictions": ["a"]},
            "needs curriculum.predictions, two files",
        ),
    ],
)
def test_a_curriculum_that_cannot_be_is_told(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        Curriculum(**given)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, train_here):
    run = tmp_path_factory.mktemp("recorded") / "run"
    train_here(run, "curriculum=record")
    return run


def test_a_run_records_its_cosines_whenever_it_improves_and_is_otherwise_as_ever(recorded, finished_run):
    best, records = -1.0, []
    cosines = [float(row["val/cosine"]) for row in read_csv(recorded / "metrics.csv") if row["val/cosine"]]
    files = sorted((recorded / "own_cosine").glob("*.npz"))
    for cosine in cosines:
        if cosine > best:
            best = cosine
            records.append(np.load(files[len(records)]))
            assert float(records[-1]["val"]) == pytest.approx(cosine, abs=1e-6)
    assert len(records) == len(files) > 1
    table = pq.read_table(recorded / "own_cosine.parquet").to_pydict()
    assert table["score"] == pytest.approx(weighted([record["cosines"] for record in records]).tolist())
    held = set(pq.read_table(recorded / "validation.parquet")["prompt"].to_pylist())
    assert len(table["id"]) == len(set(table["id"])) and not held & set(table["prompt"])
    assert (recorded / "metrics.csv").read_bytes() == (finished_run / "metrics.csv").read_bytes()


def test_a_fresh_run_begins_with_what_was_easy(recorded, train_here, tmp_path):
    run = tmp_path / "run"
    train_here(
        run, "curriculum=easy_first", f"curriculum.records={recorded}", "curriculum.stages=2", "data.batch_size=4"
    )
    used = pq.read_table(run / "difficulty.parquet").to_pydict()
    assert used == pq.read_table(recorded / "own_cosine.parquet").to_pydict()
    prompts = len(set(used["prompt"]))
    steps = [int(row["step"]) for row in read_csv(run / "metrics.csv") if row["val/cosine"]]
    assert steps == [steps_of(prompts, 4, epochs, 2) for epochs in range(1, 5)]


def test_what_descends_on_kept_features_records_nothing(train_here, tmp_path, pairs_folder):
    from safetensors.torch import save_file

    from img2prompt.build import build
    from img2prompt.encoders.encoder import Encoder

    settings = settings_of(*TINY)["encoder"]
    encoder = build({key: value for key, value in settings.items() if key != "pretrained"}, Encoder)
    save_file(encoder.model.state_dict(), tmp_path / "weights.safetensors")
    run = tmp_path / "run"
    given = (f"encoder.pretrained={tmp_path / 'weights.safetensors'}", "head=mlp", "head.hidden=16")
    train_here(run, *given, "curriculum=record", "stages.probe.epochs=6", "trainer.max_epochs=2")
    rows = [row for row in read_csv(run / "metrics.csv") if row["val/cosine"]]
    files = [np.load(path) for path in sorted((run / "own_cosine").glob("*.npz"))]
    assert 1 <= len(files) <= 2
    assert {round(float(file["val"]), 5) for file in files} <= {round(float(row["val/cosine"]), 5) for row in rows[-2:]}


def test_records_of_other_rows_are_put_together_by_row(recorded, train_here, tmp_path):
    from types import SimpleNamespace

    samples = samples_of(["a", "b", "c", "d"])
    (tmp_path / "own_cosine").mkdir()
    for step, rows, values in ((1, [0, 1, 3], [0.1, 0.2, 0.3]), (2, [0, 3], [0.5, 0.9])):
        np.savez(tmp_path / "own_cosine" / f"step{step:07d}.npz", val=step, rows=rows, cosines=values)
    write_records(tmp_path, SimpleNamespace(samples=samples))
    scores = read_scores(tmp_path / "own_cosine.parquet", [samples[0], samples[3]])
    assert scores.tolist() == pytest.approx([(0.2 * 0.1 + 0.4 * 0.5) / 0.6, (0.2 * 0.3 + 0.4 * 0.9) / 0.6])
    with pytest.raises(ValueError, match="give stages.finetune epochs or, without it, stages.probe"):
        train_here(tmp_path / "run", "curriculum=record", "trainer.max_epochs=0")


def test_captions_of_an_image_are_as_easy_as_each_other():
    # Each image has three captions, one of them far easier than the others.
    count = 20
    rows = np.arange(3 * count)
    ease = np.where(rows % 3 == 0, 100.0, 0.0) - rows // 3
    draws = Draws(
        rows, rows // 3, np.ones(60), np.random.default_rng(0).integers(0, 2**63, 60, dtype=np.uint64), 3, ease
    )
    seen = [set((epoch_rows(draws, 0, "finetune", epoch) // 3).tolist()) for epoch in range(4)]
    assert [len(one) for one in seen] == [7, 10, 20, 20] and seen[0] <= seen[1] <= seen[2]
    assert seen[0] == set(range(7))


def test_a_run_that_stops_inside_a_curriculum_goes_on_to_the_byte(train_here, tmp_path, monkeypatch):
    from img2prompt.training.callbacks import Keep

    given = (*FIRST, "curriculum.stages=3", "data.batch_size=4", "trainer.checkpoint_every_n_steps=1")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train_here(whole, *given)
    after = Keep._after_step

    def dying(self, trainer, module):
        after(self, trainer, module)
        if module.step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Keep, "_after_step", dying)
    with pytest.raises(KeyboardInterrupt):
        train_here(halves, *given)
    monkeypatch.undo()
    # The scores are its own by now.
    monkeypatch.setattr(Curriculum, "known_scores", None)
    train_here(halves, *given)
    for name in ("metrics.csv", "checkpoints/finetune.safetensors", "difficulty.parquet"):
        assert (halves / name).read_bytes() == (whole / name).read_bytes(), name


def test_without_a_fine_tune_the_curriculum_is_of_the_probe(train_here, finished_run, tmp_path):
    start = "encoder.model."
    whole = load_file(finished_run / "checkpoints" / "finetune.safetensors")
    save_file(
        {key.removeprefix(start): value for key, value in whole.items() if key.startswith(start)},
        tmp_path / "w.safetensors",
    )
    given = (
        *(f"encoder.pretrained={tmp_path / 'w.safetensors'}", "stages.finetune=null", "stages.probe.epochs=4"),
        *("head=joint_vocabulary", "head.hidden=[16]", "head.vocabulary_size=4", "loss=joint", "data.batch_size=4"),
    )
    record, fresh = tmp_path / "record", tmp_path / "easy_first"
    train_here(record, *given, "curriculum=record")
    train_here(fresh, *given, "curriculum=easy_first", "curriculum.stages=3", f"curriculum.records={record}")
    used = pq.read_table(fresh / "difficulty.parquet").to_pydict()
    assert used == pq.read_table(record / "own_cosine.parquet").to_pydict()
    prompts = len(set(used["prompt"]))
    for run, stages in ((record, 1), (fresh, 3)):
        steps = [int(row["step"]) for row in read_csv(run / "metrics.csv") if row["val/cosine"]]
        assert steps == [steps_of(prompts, 4, epochs, stages) for epochs in range(1, 5)]
        assert all(float(row["val/word_map"]) > 0 for row in read_csv(run / "metrics.csv") if row["val/cosine"])
    with pytest.raises(ValueError, match="give stages.finetune epochs or, without it, stages.probe"):
        train_here(tmp_path / "ridge", *given[:2], "head=linear", "curriculum=record")


def test_predictions_that_agree_are_easy(train_here, finished_run, pairs_folder, tmp_path):
    import img2prompt
    from img2prompt.predictions import write_parquet

    files = []
    for rung in ("finetune", "mean"):
        predicted = img2prompt.load(finished_run / "checkpoints" / f"{rung}.safetensors", "cpu").predict(
            str(pairs_folder / "images")
        )
        files.append(tmp_path / f"{rung}.parquet")
        write_parquet(files[-1], [predicted])
    run = tmp_path / "run"
    members = f"curriculum.predictions=[{files[0]},{files[1]}]"
    given = ("curriculum=easy_first", "curriculum.scorer=ensemble_agreement", "data.batch_size=4", members)
    train_here(run, *given)
    used = pq.read_table(run / "difficulty.parquet").to_pydict()
    tables = [pq.read_table(file).to_pydict() for file in files]
    by_id = [dict(zip(table["id"], table["embedding"], strict=True)) for table in tables]
    expected = [
        float(torch.nn.functional.cosine_similarity(torch.tensor(by_id[0][one]), torch.tensor(by_id[1][one]), dim=0))
        for one in used["id"]
    ]
    assert used["score"] == pytest.approx(expected, abs=1e-6)
    few = img2prompt.load(finished_run, "cpu").predict(sorted((pairs_folder / "images").iterdir())[:3])
    write_parquet(files[1], [few])
    with pytest.raises(ValueError, match="predictions of another data set: .* training images are not in it"):
        train_here(tmp_path / "other", *given)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ((*FIRST, "curriculum.stages=9"), "curriculum.stages=9: stages.finetune has 4 epochs, and would never see all"),
        (
            (*FIRST, "curriculum.stages=4"),
            "the first epoch has 5 images, fewer than a step's 8; lower it, or data.batch",
        ),
        ((*FIRST, "stages.finetune=null"), "give stages.finetune epochs or, without it, stages.probe"),
        (
            ("curriculum=record", "stages.finetune=null", "stages.probe=null"),
            "a curriculum is of stages.finetune or, without it, of a probe; this run has neither",
        ),
        (
            ("curriculum=easy_first", "curriculum.scorer=clip_alignment", "data.batch_size=4"),
            "clip_alignment: the encoder has no pretrained weights; choose a pretrained open_clip encoder, or another",
        ),
        (
            ("curriculum=easy_first", "curriculum.records=nowhere", "data.batch_size=4"),
            "curriculum.records=nowhere: no own_cosine.parquet there; a run with curriculum=record leaves it",
        ),
    ],
)
def test_a_curriculum_that_a_run_cannot_have_is_told(overrides, sentence, train_here, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        train_here(tmp_path / "run", *overrides)


def test_the_second_run_is_given_what_the_first_recorded(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("img2prompt.commands.curriculum._train", lambda arguments: asked.append(list(arguments)))
    monkeypatch.setattr("img2prompt.training.run_folder.is_finished", lambda folder: True)
    main(["data=demo", f"run_dir={tmp_path}", "curriculum.stages=2"])
    record, fresh = f"run_dir={tmp_path / 'record'}", f"run_dir={tmp_path / 'easy_first'}"
    second = ["data=demo", "curriculum=easy_first", f"curriculum.records={tmp_path / 'record'}", "curriculum.stages=2"]
    looked = ["data=demo", "curriculum=easy_first", "curriculum.stages=2", "curriculum.scorer=prompt_length"]
    assert asked == [[*looked, fresh, "dry_run=true"], ["data=demo", "curriculum=record", record], [*second, fresh]]
    for name in ("record", "easy_first"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("")
    asked.clear()
    main(["data=demo", f"run_dir={tmp_path}", "curriculum.stages=2"])
    on = [f"resume={tmp_path / name}" for name in ("record", "easy_first")]
    assert asked == [["data=demo", "curriculum=record", on[0]], [*second, on[1]]]


@pytest.mark.slow
def test_the_command_is_two_runs_and_goes_on_where_it_stopped(pairs_folder, tmp_path):
    given = (*QUICK, *TINY, f"data.root={pairs_folder}", "data.batch_size=4", "run_dir=runs", "curriculum.stages=2")

    def run(*arguments):
        command = [sys.executable, "-m", "img2prompt", "curriculum", *arguments]
        env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'offline'}"}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)

    first = run(*given)
    assert first.returncode == 0, first.stderr
    used = tmp_path / "runs" / "easy_first" / "difficulty.parquet"
    assert pq.read_table(used).equals(pq.read_table(tmp_path / "runs" / "record" / "own_cosine.parquet"))
    before = (tmp_path / "runs" / "easy_first" / "metrics.csv").read_bytes()
    shutil.rmtree(tmp_path / "runs" / "easy_first")
    second = run(*given)
    assert "this run is finished; nothing to do" in second.stdout and second.returncode == 0
    assert (tmp_path / "runs" / "easy_first" / "metrics.csv").read_bytes() == before
    assert json.loads((tmp_path / "runs" / "easy_first" / "summary.json").read_text())["unfinished"] is None
    # Other arguments are no other run's.
    other = run(*given, "seed=1")
    assert other.returncode == 1 and "seed is 0 in that run, not 1" in other.stderr
    # What is wrong with the second run is told before the first, which is long.
    wrong = run(*given, "curriculum.stages=9", "run_dir=wrong")
    assert wrong.returncode == 1 and "would never see all pairs" in wrong.stderr
    plan = run(*given, "run_dir=wrong", "dry_run=true")
    assert plan.returncode == 0 and not (tmp_path / "wrong").exists()


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_saves_where_the_run_is(pairs_folder, tmp_path):
    more = ("trainer.max_epochs=3000", "run_dir=runs", "trainer.checkpoint_every_n_steps=5")
    arguments = (*QUICK, *TINY, f"data.root={pairs_folder}", "curriculum.stages=2", *more)
    process = subprocess.Popen(
        [sys.executable, "-m", "img2prompt", "curriculum", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'offline'}"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    state = tmp_path / "runs" / "record" / "checkpoints" / "last.ckpt"
    until = time.monotonic() + 120
    while not state.exists() and time.monotonic() < until:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "saved at step" in told, told


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["data=demo"], "run_dir must be given"),
        (["run_dir=x", "-m"], "takes no options of a sweep"),
        (["run_dir=x", "resume=auto"], "resume: is set by this command"),
        (["run_dir=x", "curriculum.scorer=prompt_length"], "no run has to record"),
        (["run_dir=x", "curriculum.stagse=3"], "stagse"),
    ],
)
def test_what_the_command_cannot_do_is_told(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=sentence):
        main(arguments)
    assert not list(tmp_path.iterdir())
