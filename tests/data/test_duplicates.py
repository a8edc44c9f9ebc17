"""Near duplicates, filters and the report of what they leave."""

import csv
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from img2prompt import search
from img2prompt.commands.sentences import sentence_of
from img2prompt.data.drawings import Drawings
from img2prompt.data.duplicates import joined, largest_cosine, survivors
from img2prompt.data.filters import in_languages, of_length, too_long_for_clip
from img2prompt.data.kaggle import Kaggle
from img2prompt.data.lineage import Lineage
from img2prompt.data.sample import Sample


def rows(*prompts):
    source = Kaggle("unused")
    return [Sample(str(i), prompt, source, str(i)) for i, prompt in enumerate(prompts)]


def kept_one_by_one(embeddings, threshold):
    kept: list[int] = []
    for i, row in enumerate(embeddings):
        if not kept or float((embeddings[kept] @ row).max()) < threshold:
            kept.append(i)
    return kept


@given(st.integers(0, 10_000), st.integers(2, 250), st.floats(0.1, 1.0))
@settings(deadline=None, max_examples=40)
def test_the_survivors_are_those_of_one_prompt_after_another(seed, count, spread):
    chance = torch.Generator().manual_seed(seed)
    centres = torch.randn(8, 16, generator=chance)
    embeddings = centres[torch.randint(0, 8, (count,), generator=chance)] + spread * torch.randn(
        count, 16, generator=chance
    )
    embeddings = normalize(embeddings, dim=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_BLOCK_ROWS", 16)
        patch.setattr(search, "_BLOCK_COLUMNS", 24)
        together = survivors(embeddings, [0.55, 0.8, 0.95])
        for threshold, kept in zip([0.55, 0.8, 0.95], together, strict=True):
            assert np.flatnonzero(kept).tolist() == kept_one_by_one(embeddings, threshold)


def test_groups_are_those_that_a_chain_connects():
    angles = torch.tensor([0.0, 20, 40, 60, 180, 200, 300]) * torch.pi / 180
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1)
    groups = joined(embeddings, 0.9)
    assert len(set(groups[:4].tolist())) == 1 and groups[4] == groups[5] and len(set(groups.tolist())) == 3
    assert len(set(joined(embeddings, None).tolist())) == 7


def test_the_largest_cosine_and_whose_it_is():
    one, other = (normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(n)), dim=1) for n in (50, 70))
    cosine, i, j = largest_cosine(one, other)
    assert cosine == pytest.approx(float((one @ other.T).max())) == pytest.approx(float(one[i] @ other[j]))


def test_prompts_of_more_clip_tokens_are_left_out():
    # Each word of one letter is one token; begin and end are two more.
    fits, long = " ".join("a" * 75), " ".join("a" * 76)
    kept, dropped = too_long_for_clip(rows(fits, long, "a cat"), 77)
    assert [sample.prompt for sample in kept] == [fits, "a cat"]
    assert dropped == [("1", "more than 77 CLIP tokens")]
    assert len(too_long_for_clip(rows(fits, "a cat"), 4)[0]) == 1
    with pytest.raises(ValueError, match="at least 3"):
        too_long_for_clip(rows("a"), 2)


def test_prompts_of_too_few_and_too_many_words_are_left_out():
    samples = rows("cat", "a cat", "a red cat", "a very red cat")
    kept, dropped = of_length(samples, 2, 3)
    assert [sample.id for sample in kept] == ["1", "2"] and {reason for _, reason in dropped} == {"not of 2 to 3 words"}
    assert len(of_length(samples, None, 2)[0]) == 2 and len(of_length(samples, 3, None)[0]) == 2
    with pytest.raises(ValueError, match="nothing is left"):
        of_length(samples, 4, 3)


def test_only_what_is_surely_in_another_language_is_left_out():
    samples = rows(
        "a portrait of an old fisherman in the rain, oil on canvas",
        "ein alter Fischer sitzt im Regen am Hafen und raucht",
        "octane render, 8k, artstation",
        "雨の中の老人の肖像画",
        "two dogs",
    )
    kept, dropped = in_languages(samples, ["en"])
    assert [sample.id for sample in kept] == ["0", "2", "4"] and dropped[0] == ("1", "not in en")
    assert "1" in {sample.id for sample in in_languages(samples, ["en", "de"])[0]}
    for wrong in ([], ["xx"], ["english"]):
        with pytest.raises(ValueError, match=r"data\.languages=.*must be some of ar, "):
            in_languages(samples, wrong)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    monkeypatch.delitem(sys.modules, "img2prompt.data.language", raising=False)
    with pytest.raises(ModuleNotFoundError) as error:
        in_languages(rows("a"), ["en"])
    assert sentence_of("train", error.value) == "py3langid is not installed; pip install 'img2prompt[language]'"


def test_the_report_counts_pairs_and_prompts_in_and_out():
    lineage, samples = Lineage(), rows("a cat", "A  cat", "a dog")
    lineage.add("found", samples, [("9", "no prompt")])
    lineage.add("words", samples[1:], [("0", "too short")], changed=2)
    lineage.survivors = {0.9: 2}
    first, second, last = lineage.table()
    assert (first["pairs_in"], first["pairs_out"], first["prompts_out"], first["reasons"]) == (4, 3, 2, "1 no prompt")
    assert (second["pairs_in"], second["pairs_out"], second["prompts_in"], second["changed"]) == (3, 2, 2, 2)
    assert last["step"] == "would survive at 0.90" and last["prompts_out"] == 2
    assert any("2 at 0.90" in line for line in lineage.lines()) and "too short" in lineage.lines()[2]


def csv_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_its_lineage_and_how_far_its_sides_are_apart(finished_run):
    import json

    steps = csv_of(finished_run / "lineage.csv")
    assert [row["step"] for row in steps][:2] == ["found", "CLIP tokens"] and steps[0]["pairs_out"] == "40"
    split = json.loads((finished_run / "split.json").read_text())
    assert split["train_pairs"] + split["val_pairs"] == 40 and 0 < split["largest_train_val_cosine"] < 1
    assert split["val_prompt"] != split["train_prompt"]


def test_drawings_are_no_files_to_keep(tmp_path):
    from img2prompt.synthesis.procedural import Procedural

    with pytest.raises(ValueError, match="drawings are no files"):
        Drawings(4, 1, 0, Procedural(32)).stamp("0 a")
