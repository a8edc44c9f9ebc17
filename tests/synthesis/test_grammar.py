"""Prompts out of word lists: none twice, the same ones for a seed, and modifiers behind captions."""

import pytest

from img2prompt.synthesis.grammar import SLOTS, grammar, mixed, phrases


def test_a_seed_gives_distinct_prompts_and_of_more_the_same_first_ones():
    prompts = list(grammar(3000, 0))
    assert len(set(prompts)) == 3000 and list(grammar(50, 0)) == prompts[:50]
    assert len(set(prompts) & set(grammar(3000, 1))) < 30


def test_every_phrase_of_every_list_is_used_and_nothing_else():
    prompts = list(grammar(4000, 3))
    for slot in SLOTS:
        assert len(phrases(slot)) >= 20
        assert all(any(phrase in prompt for prompt in prompts) for phrase in phrases(slot)), slot
    left = max(prompts, key=len)
    for phrase in sorted((phrase for slot in SLOTS for phrase in phrases(slot)), key=len, reverse=True):
        left = left.replace(phrase, "", 1)
    assert left.replace(" a ", " ").replace(" an ", " ").strip(" ,") == ""


def test_articles_follow_the_next_word():
    for prompt in grammar(2000, 4):
        words = prompt.split()
        for article, word in zip(words, words[1:], strict=False):
            assert article not in ("a", "an") or (article == "an") == (word[0] in "aeiou"), prompt


def lists_in(folder, **changed):
    few = {"subjects": "fox\ncat", "media": "a photo of", "adjectives": "red", "verbs": "asleep", "modifiers": "moody"}
    for slot, text in {**few, **changed}.items():
        (folder / f"{slot}.txt").write_text(text)
    return folder


def test_small_lists_make_every_prompt_once_and_no_more(tmp_path):
    folder = lists_in(tmp_path)
    prompts = set(grammar(16, 0, folder))
    assert len(prompts) == 16
    assert {"a photo of a fox", "a photo of a red cat asleep, moody"} <= prompts
    with pytest.raises(ValueError, match="count=17: the word lists make 16 different prompts"):
        list(grammar(17, 0, folder))


def test_phrases_that_say_the_same_do_not_make_a_prompt_twice(tmp_path):
    folder = lists_in(tmp_path, subjects="fox\nred fox\n fox \n\n")
    prompts = list(grammar(12, 0, folder))
    assert len(set(prompts)) == 12
    with pytest.raises(ValueError, match="make 12 different prompts"):
        list(grammar(13, 0, folder))


def test_a_list_that_is_missing_or_empty_is_named(tmp_path):
    folder = lists_in(tmp_path, verbs=" \n")
    with pytest.raises(ValueError, match="verbs.txt: no phrase in it"):
        list(grammar(2, 0, folder))
    (folder / "verbs.txt").unlink()
    with pytest.raises(ValueError, match=r"verbs.txt: cannot be read \(FileNotFoundError\)"):
        list(grammar(2, 0, folder))


def test_modifiers_follow_the_caption_and_hang_on_it_and_the_seed_alone():
    captions = [f"A dog on beach {number}." for number in range(200)]
    styles = phrases("modifiers")
    prompts = list(mixed(captions, styles, 1, 3, 0))
    for caption, prompt in zip(captions, prompts, strict=True):
        first, *chosen = prompt.split(", ")
        assert first == caption[:-1] and 1 <= len(chosen) <= 3 and set(chosen) <= set(styles)
        assert len(set(chosen)) == len(chosen)
    assert list(mixed(captions[::-1], styles, 1, 3, 0)) == prompts[::-1] != list(mixed(captions, styles, 1, 3, 1))[::-1]
    assert {len(prompt.split(", ")) for prompt in prompts} == {2, 3, 4}
    assert list(mixed(captions[:1], styles, 0, 0, 0)) == ["A dog on beach 0"]
    for least, most in ((3, 1), (-1, 2), (1, 1000)):
        with pytest.raises(ValueError, match="must be two numbers from 0 to"):
            list(mixed(captions, styles, least, most, 0))
