"""What once went wrong without a word while pairs were made."""

import gzip
import json
import shutil

import numpy as np
import pytest
from conftest import read_csv
from test_synthesize import DRAWN, PROMPTS, files, synthesize, told_by
from tiny_diffusion import tiny_stable_diffusion

from img2prompt.commands.settings import compose
from img2prompt.commands.synthesis import carry_out, prepare
from img2prompt.data.prompt_files import PromptSource, read_prompt_files
from img2prompt.data.shards import Shards
from img2prompt.synthesis.contact_sheet import samples_of
from img2prompt.synthesis.pairs import Worker, worker_of
from img2prompt.synthesis.procedural import Procedural
from img2prompt.synthesis.store import Made

SHARDS = 3  # of five


@pytest.fixture
def prompts(tmp_path):
    return listed(tmp_path / "prompts.txt", PROMPTS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_stable_diffusion(tmp_path_factory.mktemp("diffusion"))


def listed(path, prompts):
    path.write_text("\n".join(prompts) + "\n")
    return path


def diffusion(model):
    sizes = ("generator.steps=2", "generator.size_px=32", "generator.saved_px=16", "generator.dtype=fp32")
    return (f"generator.model={model}", "device=cpu", "shard_size=5", "batch_size=5", *sizes)


def planned(prompts, out, *overrides):
    return prepare(compose("synthesize", [f"prompts={prompts}", f"out={out}", *DRAWN, *overrides]))


def trained_further(model, folder):
    """A copy of the model whose files have the same names and sizes, and other weights."""
    other = shutil.copytree(model, folder / model.name)
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    return other


def test_pictures_of_two_models_never_share_a_folder(tmp_path, prompts, model):
    out, other = tmp_path / "out", trained_further(model, tmp_path / "other")
    # A worker without a shard knows no weights, and must not leave a folder of any.
    synthesize(prompts, out, "count=5", "shard=4/5", generator=diffusion(model))
    assert not (out / "synthesis.json").exists()
    synthesize(prompts, out, "count=5", generator=diffusion(model))
    # Also where nothing is left to make, and nothing is loaded.
    for more in ("count=5", "count=10"):
        with pytest.raises(ValueError, match="made with other settings .*weights: folder .* there, folder .* now"):
            synthesize(prompts, out, more, generator=diffusion(other))


@pytest.mark.parametrize("damage", ["zeros", "head", "another shard"])
def test_a_tar_that_does_not_hold_the_pictures_of_its_manifest_is_made_again(damage, tmp_path, prompts):
    out = tmp_path / "out"
    synthesize(prompts, out)
    whole, tar = files(out), out / "00001.tar"
    size = tar.stat().st_size
    tar.write_bytes(
        {
            "zeros": bytes(size),
            "head": whole["00001.tar"][:2048] + bytes(size - 2048),
            "another shard": whole["00000.tar"],
        }[damage]
    )
    assert synthesize(prompts, out).work.missing == [1] and files(out) == whole


def test_a_damaged_picture_is_named_by_the_contact_sheet(tmp_path, prompts):
    out = tmp_path / "out"
    synthesize(prompts, out)
    (out / "contact_sheet.jpg").unlink()
    data = bytearray((out / "00001.tar").read_bytes())
    data[512:612] = bytes(100)
    (out / "00001.tar").write_bytes(data)
    with pytest.raises(ValueError, match="00001.tar: 000000005 is damaged .*; remove the tar, and it is made again"):
        synthesize(prompts, out)


@pytest.mark.parametrize("own, every", [("-1", "2"), ("2", "1"), ("0", "-3"), ("0", "0"), ("", ""), ("a", "2")])
def test_a_worker_that_is_none_is_refused(own, every):
    with pytest.raises(ValueError, match=f"RANK={own} and WORLD_SIZE={every}: no worker i of n"):
        worker_of(None, {"RANK": own, "WORLD_SIZE": every})
    assert worker_of("0/1", {"RANK": own, "WORLD_SIZE": every}) == Worker()


def test_a_plan_that_is_old_makes_no_shard_smaller(tmp_path, prompts):
    out = tmp_path / "out"
    old = planned(prompts, out, "count=7")
    synthesize(prompts, out)
    whole = {name: data for name, data in files(out).items() if name.startswith("0")}
    carry_out(old)
    assert {name: data for name, data in files(out).items() if name.startswith("0")} == whole


def test_not_all_is_there_while_the_last_shard_of_another_worker_is_to_grow(tmp_path, prompts, capsys):
    out = tmp_path / "out"
    synthesize(prompts, out, "count=7")
    synthesize(prompts, out, "shard=0/2", "count=9")
    assert "other workers have shards to make" in capsys.readouterr().out.splitlines()[-1]
    synthesize(prompts, out, "shard=1/2", "count=9")
    assert "all 9 images are in" in capsys.readouterr().out.splitlines()[-1]
    synthesize(prompts, out, "count=4")
    assert "all 4 images are in" in (told := capsys.readouterr().out) and "and 5 more of an earlier time" in told


def test_blank_pictures_are_told_each_time_and_are_no_success_where_there_are_no_others(
    tmp_path, prompts, capsys, monkeypatch
):
    generate = Procedural.generate

    def failing(self, prompts, seeds, precise=False):
        pictures = generate(self, prompts, seeds, precise)
        pictures[["star" in prompt or is_all for prompt in prompts]] = 0
        return pictures

    monkeypatch.setattr(Procedural, "generate", failing)
    is_all = False
    for _ in range(2):
        synthesize(prompts, tmp_path / "some")
        assert "9 of 12 images are in" in (told := capsys.readouterr().out) and "3 stayed blank" in told
    is_all = True
    for _ in range(2):
        with pytest.raises(ValueError, match="every image came out blank: .* remove the folder before the next try"):
            synthesize(prompts, tmp_path / "none")


def test_more_prompts_at_the_end_drop_no_near_duplicate_that_is_made(tmp_path):
    near = [
        "a photo of a red fox in the snow",
        "a drawing of a teapot",
        "photo of a red fox in snow",
        "a red fox, snow",
    ]
    for order in (near, near[::-1]):
        out, some = tmp_path / order[0][:9], ("duplicate_threshold=0.8",)
        for count in range(1, len(order) + 1):
            made = synthesize(listed(tmp_path / "p.txt", order[:count]), out, *some)
            assert made.wanted.prompts[0] == order[0]
        assert len(made.wanted.prompts) < len(order)


def test_a_changed_prompt_is_found_without_the_list_of_prompts(tmp_path, prompts):
    out = tmp_path / "out"
    synthesize(prompts, out)
    (out / "prompts.jsonl").unlink()
    with pytest.raises(ValueError, match="made of other prompts: 'a red fish', .* where 'a purple moon'"):
        synthesize(listed(tmp_path / "p.txt", [*PROMPTS[:2], "a purple moon", *PROMPTS[3:]]), out)
    assert not (out / "prompts.jsonl").exists()


def test_tables_that_do_not_say_where_a_prompt_ends_are_refused(tmp_path):
    for name, text, sentence in (
        ("a.csv", 'prompt\n"a red cat\na blue dog\n', "cannot be read"),
        ("b.csv", "prompt\na cat, on a mat, oil\n", "line 2 has more fields than the header"),
        ("c.tsv", 'prompt\n"hello" says the cat\n', "cannot be read"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}: .*{sentence}"):
            read_prompt_files([tmp_path / name])
    (tmp_path / "mac.txt").write_bytes(b"a cat\ra dog\r")
    assert read_prompt_files([tmp_path / "mac.txt"]) == ["a cat", "a dog"]
    packed = gzip.compress("\n".join(PROMPTS * 50).encode())
    for data in (packed[:-20], packed[:30] + bytes(20) + packed[50:]):
        (tmp_path / "a.txt.gz").write_bytes(data)
        with pytest.raises(ValueError, match="a.txt.gz: cannot be read"):
            read_prompt_files([tmp_path / "a.txt.gz"])


def test_half_characters_are_left_out_wherever_they_stand(tmp_path, prompts):
    broken = tmp_path / "broken.json"
    broken.write_text('["a cat \\ud800", "a dog"]')
    made = synthesize(broken, tmp_path / "styled", "modifiers=builtin", "modifiers_per_prompt=[1,1]")
    assert [prompt.split(",")[0] for prompt in made.wanted.prompts] == ["a dog"]
    away = synthesize(prompts, tmp_path / "away", f"keep_away={broken}", "keep_away_threshold=0.999")
    assert len(away.wanted.prompts) == len(PROMPTS)


def test_what_is_drawn_is_what_training_reads(tmp_path):
    told = ["\ufeffa cat", r"a fox \(sphynx:1.2\)", "a  dog"]
    (tmp_path / "p.json").write_text(json.dumps(told))
    synthesize(tmp_path / "p.json", tmp_path / "out")
    found = Shards(tmp_path / "out").find().samples
    assert [sample.prompt for sample in found] == ["a cat", "a fox sphynx", "a dog"]
    (tmp_path / "two.txt").write_bytes("\ufeffa\n\ufeffb".encode())
    found = PromptSource(read_prompt_files([tmp_path / "two.txt"])).find().samples
    assert [sample.prompt for sample in found] == ["a", "b"]


def test_grammar_gives_all_that_its_filters_leave(tmp_path, capsys):
    lists = {"subjects": "fox\nold red fox", "media": "photo of", "adjectives": "big", "verbs": "running fast"}
    for name, text in (lists | {"modifiers": "oil"}).items():
        (tmp_path / f"{name}.txt").write_text(text)
    made = planned("grammar", tmp_path / "out", f"words={tmp_path}", "count=15", "min_words=6")
    assert 5 < len(made.wanted.prompts) < 15 and all(len(one.split()) >= 6 for one in made.wanted.prompts)
    assert f"what is left of the prompts makes {len(made.wanted.prompts)} images" in capsys.readouterr().err
    # Few are wanted, and fewer of those that are drawn first are left.
    one = planned("grammar", tmp_path / "one", "count=1", "min_words=16")
    assert len(one.wanted.prompts) == 1 and len(one.wanted.prompts[0].split()) >= 16


def test_lists_that_overlap_give_what_is_wanted(tmp_path):
    lists = {"subjects": "fox\nred fox", "media": "photo of", "adjectives": "red", "verbs": "red", "modifiers": "oil"}
    for name, text in lists.items():
        (tmp_path / f"{name}.txt").write_text(text)
    few = planned("grammar", tmp_path / "out", f"words={tmp_path}", "count=5", "min_words=5")
    assert 0 < len(few.wanted.prompts) <= 5
    with pytest.raises(ValueError, match="count=16: the word lists make 12 different prompts"):
        planned("grammar", tmp_path / "out", f"words={tmp_path}", "count=16")


def test_the_contact_sheet_looks_into_every_shard(tmp_path):
    out = tmp_path / "out"
    synthesize(
        listed(tmp_path / "p.txt", [f"a red star {one}" for one in "abcdefghijklmnopqrstuvwxyz"]), out, "shard_size=2"
    )
    seen = [prompt for _, prompt in samples_of(out, "webp")]
    assert len({ord(prompt[-1]) - 97 >> 1 for prompt in seen}) == 13


def test_the_lineage_counts_down_to_what_is_made(tmp_path, prompts):
    synthesize(prompts, tmp_path / "out", "count=5", "replicas=2")
    last = read_csv(tmp_path / "out" / "lineage.csv")[-1]
    assert (last["step"], last["pairs_out"]) == ("count", "3")


def test_own_modifiers_are_drawn_once_each(tmp_path, prompts):
    own = listed(tmp_path / "own.txt", ["8k", "8k ", " oil"])
    made = synthesize(prompts, tmp_path / "out", f"modifiers={own}", "modifiers_per_prompt=[2,2]")
    assert all(sorted(prompt.split(", ")[1:]) == ["8k", "oil"] for prompt in made.wanted.prompts)


def test_a_tar_of_others_in_the_folder_is_none_of_the_pairs(tmp_path, prompts):
    synthesis = synthesize(prompts, tmp_path / "out")
    other = synthesize(prompts, tmp_path / "other")
    (tmp_path / "out" / "sub").mkdir()
    shutil.copy(other.store.folder / "00000.tar", tmp_path / "out" / "sub" / "foreign.tar")
    assert len(Made(synthesis.store, 12).find().samples) == 12


def test_words_of_the_settings_that_mean_nothing_are_told(tmp_path, prompts, model):
    where = (f"prompts={prompts}", f"out={tmp_path / 'out'}", *DRAWN)
    real = (f"prompts={prompts}", f"out={tmp_path / 'out'}", *diffusion(model))
    for overrides, sentence in (
        ((*where, "words=nowhere"), "words=nowhere: only prompts=grammar reads word lists"),
        ((*where, "device=gpu"), "device=gpu: not available here"),
        ((*where, "modifiers_per_prompt=[true,2]"), "modifiers_per_prompt=[True, 2]: must be [least, most]"),
        ((*where, "out=s3://bucket/x"), "out=s3://bucket/x: must be a folder of this machine"),
        ((*where, "out="), "out=: must be a folder"),
        ((*real, "generator.compile=banana"), "generator.compile=banana: must be true or false or null"),
    ):
        assert sentence in told_by(*overrides), overrides
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/out: cannot be made .Not a directory.; choose another folder"):
        synthesize(prompts, tmp_path / "file" / "out")


def test_a_preset_counts_for_any_pipeline(tmp_path, prompts, model):
    given = (f"prompts={prompts}", f"out={tmp_path / 'out'}", "generator=diffusers", f"generator.model={model}")
    made = prepare(compose("synthesize", [*given, "generator.preset=host_exact", "device=cpu"]))
    assert (made.generator.settings["steps"], made.generator.settings["guidance"]) == (50, 9.0)


def test_the_manifest_of_a_pipeline_without_negative_prompts_says_so(model):
    from img2prompt.synthesis.stable_diffusion import StableDiffusion

    plain = {"size_px": 32, "steps": 2, "device": "cpu", "dtype": "fp32", "preset": "plain", "saved_px": 32}
    pictures = [
        StableDiffusion(str(model), **plain, negative_prompt=text).generate(["a cat"], [1]) for text in (None, "", "x")
    ]
    assert StableDiffusion(str(model), **plain).details(1)["negative_prompt"] is None
    assert (pictures[0] == pictures[1]).all() and not np.array_equal(pictures[0], pictures[2])
