"""Predictions drawn towards the nearest prompts of a bank: what it gains, and that it says when it gains nothing."""

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from test_refine import PROMPTS, fitted, known, world  # noqa: F401 (fixtures)
from torch.nn.functional import normalize

from img2prompt.predictions import read_predictions
from img2prompt.refine.bank_blend import BankBlend
from img2prompt.refine.refiner import mean_cosine


def crowd(count=300, seed=0, noise=0.9):
    """Targets that lie near forty things, predictions that are off, and a bank of others of these things."""
    chance = torch.Generator().manual_seed(seed)
    things = normalize(torch.randn(40, 32, generator=chance), dim=1)

    def some(many):
        return normalize(
            things[torch.randint(0, 40, (many,), generator=chance)]
            + 0.3 * torch.randn(many, 32, generator=chance) / 32**0.5,
            dim=1,
        )

    targets, bank = some(count), some(1000)
    seen = normalize(targets + noise * torch.randn(count, 32, generator=chance) / 32**0.5, dim=1)
    return seen[None], targets, bank, normalize(torch.randn(1000, 32, generator=chance), dim=1)


def test_neighbours_of_the_same_things_help_by_the_fitted_share():
    members, targets, bank, _ = crowd()
    refiner = BankBlend("x", neighbours=10, temperature=0.05)
    refiner.use(bank)
    refiner.fit(members[:, :200], targets[:200], np.arange(200))
    assert refiner.share > 0 and refiner.held_out > refiner.plain + 0.01
    found = refiner.refine(members[:, 200:])
    assert mean_cosine(found, targets[200:]) > mean_cosine(members[0, 200:], targets[200:]) + 0.01
    # Written out, in float64.
    cosines = members[0, 200:].double() @ bank.double().T
    for row in range(5):
        best = cosines[row].argsort(descending=True)[:10]
        weights = (cosines[row][best] / 0.05).softmax(0)
        near = normalize((weights[:, None] * bank[best].double()).sum(0), dim=0)
        drawn = normalize((1 - refiner.share) * members[0, 200 + row].double() + refiner.share * near, dim=0)
        assert torch.allclose(found[row].double(), drawn, atol=1e-5)
    assert "of the nearest 10 of 1000 prompts" in refiner.lines()[0]


def test_a_bank_of_other_things_is_left_out_and_said_to_be():
    members, targets, _, other = crowd()
    refiner = BankBlend("x")
    refiner.use(other)
    refiner.fit(members, targets, np.arange(300))
    assert refiner.share == 0 and refiner.lines()[0].startswith("the bank adds nothing here and is left out: ")
    assert torch.allclose(refiner.refine(members), members[0], atol=1e-6)


def test_the_share_of_a_prompt_is_chosen_by_other_prompts():
    members, targets, bank, _ = crowd(40)
    refiner = BankBlend("x")
    refiner.use(bank)
    refiner.fit(members, targets, np.arange(40) // 20)
    # Two prompts: what is best for one is tried on the other, so that the score is at most that of its own best.
    best = []
    for rows in (slice(0, 20), slice(20, 40)):
        own, near = members[0, rows], refiner._near(members[0, rows])
        drawn = [normalize((1 - share) * own + share * near, dim=1) for share in np.arange(20) / 20]
        best.append(max(mean_cosine(one, targets[rows]) for one in drawn))
    assert refiner.held_out <= np.mean(best) + 1e-6


def test_the_command_leaves_the_sources_own_prompts_out_of_the_bank(world, tmp_path, capsys):  # noqa: F811
    bank = tmp_path / "bank.txt"
    bank.write_text("\n".join([*PROMPTS[:26], *PROMPTS[36:], "a photograph of a horse", ""]))
    out = fitted(world, tmp_path / "o.parquet", "refiner=blend", f"refiner.bank={bank}", truth=world["truth"])
    told = capsys.readouterr()
    assert "26 prompts of the bank are the source's and are left out" in told.err
    assert "blend with a bank" in told.out and len(read_predictions(out)) == 10
    bank.write_text("\n".join(PROMPTS[:26]))
    with pytest.raises(ValueError, match="refiner.bank=.*: all of its prompts are the source's; give others"):
        fitted(world, tmp_path / "p.parquet", "refiner=blend", f"refiner.bank={bank}")


def test_mistakes_get_one_sentence(world, tmp_path):  # noqa: F811
    for overrides, sentence in (
        ((), "refiner.bank must be given"),
        (("refiner.bank=none.txt",), "refiner.bank=none.txt: no such file"),
        (("refiner.bank=x", "refiner.neighbours=0"), "refiner.neighbours must be at least 1, got 0"),
        (("refiner.bank=x", "refiner.temperature=0"), "refiner.temperature must be above 0, got 0"),
    ):
        with pytest.raises((ValueError, InstantiationException), match=sentence):
            fitted(world, tmp_path / "x.parquet", "refiner=blend", *overrides)
