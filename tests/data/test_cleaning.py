"""Cleaning: what is no word goes, what is one stays."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from img2prompt.data.cleaning import clean, cleaned
from img2prompt.data.kaggle import Kaggle
from img2prompt.data.sample import Sample


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("a  cat \n on a\tmat ", "a cat on a mat"),
        ("a cat <lora:more_details:0.8>, red", "a cat, red"),
        ("<lora:a:1><LoRA:b:0.5> a cat", "a cat"),
        ("(masterpiece:1.2), a (red cat:0.9)", "masterpiece, a red cat"),
        ("((masterpiece)), (((best quality))), cat", "masterpiece, best quality, cat"),
        ("((a (red:1.3) cat:1.1), mat:.5)", "a red cat, mat"),
        (r"saber \(fate\), (smile:1.1)", "saber (fate), smile"),
        ("a cat (2022), by someone", "a cat (2022), by someone"),
        ("a cat, , ,, dog,", "a cat, dog"),
        ("ratio 16:9, at 12:30", "ratio 16:9, at 12:30"),
        ("<3 a < b > c", "<3 a < b > c"),
        ("été 猫", "été 猫"),
    ],
)
def test_networks_weights_and_white_space_go_and_words_stay(raw, expected):
    assert clean(raw) == expected


@given(st.text(st.sampled_from("ab ():1.2<>lora,\\\n[]"), max_size=60))
def test_a_clean_prompt_is_never_longer_and_has_no_stray_white_space(text):
    once = clean(text)
    assert len(once) <= len(text) and once == " ".join(once.split())


def test_deep_nesting_ends():
    assert "(" in clean("(" * 5000 + "x" + ":1.1)" * 5000) and clean("(" * 20 + "x" + ":1.1)" * 20) == "x"


def test_the_raw_prompt_is_kept_where_it_differs_and_empty_ones_are_skipped():
    source = Kaggle("unused")
    prompts = ["a cat", "a  cat", "<lora:x:1>"]
    samples, empty = cleaned([Sample(str(i), prompt, source, str(i)) for i, prompt in enumerate(prompts)])
    assert [(sample.prompt, sample.raw_prompt) for sample in samples] == [("a cat", ""), ("a cat", "a  cat")]
    assert empty == [("2", "no words after cleaning")]
