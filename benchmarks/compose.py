"""C1: composed prompts against the single nearest prompt of a bank, for predictions that are more or less right.

Predictions are the true embeddings of held-out prompts, turned away from them in a random direction, or towards another
held-out prompt as by a model that takes one thing for another. No regressor errs in just these ways.

    python benchmarks/compose.py PROMPTS [BANK] [HELD_OUT]
"""

import random
import sys
import time

import torch
from prompts import distinct_prompts
from record import record
from torch.nn import functional

from img2prompt.bank import Bank
from img2prompt.cache import cache_folder
from img2prompt.compose import Modifiers, compose, modifiers_of, phrases_of
from img2prompt.data.targets import TextEncoder, embeddings_of, locate
from img2prompt.metrics import bootstrap_interval

# How the predictions err, and the cosine that is left.
ERRORS = (("none", 1.0), ("random", 0.8), ("random", 0.6), ("another prompt", 0.8), ("another prompt", 0.6))
# A held-out prompt that is as near to one of the bank is known already.
SAME = 0.95


def erring(truth: torch.Tensor, error: str, cosine: float) -> torch.Tensor:
    """Unit vectors with this cosine to the true ones."""
    drawn = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    other = drawn if error == "random" else truth.roll(1, dims=0)
    away = functional.normalize(other - (other * truth).sum(1, keepdim=True) * truth, dim=1)
    return cosine * truth + (1 - cosine**2) ** 0.5 * away


def main(path: str, bank_size: int = 20_000, held_out: int = 200) -> None:
    prompts = distinct_prompts(path)
    random.Random(1).shuffle(prompts)
    texts, others = prompts[:bank_size], prompts[bank_size : bank_size + 2 * held_out]
    modifiers = modifiers_of(texts)
    model, cache = locate(), cache_folder(None)
    known, seen, parts = (
        torch.from_numpy(embeddings_of(one, model, "fp32", "cpu", cache)) for one in (texts, others, modifiers)
    )
    truth = seen[(seen @ known.T).amax(1) < SAME][:held_out]
    encoder = TextEncoder(model)
    rows: list[dict[str, object]] = []
    for error, cosine in ERRORS:
        goals = erring(truth, error, cosine)
        to_bank, nearest = (goals @ known.T).max(1)
        began = time.perf_counter()
        found = compose(goals, Bank(texts, known), Modifiers(modifiers, parts), encoder.embed)
        seconds = (time.perf_counter() - began) / len(goals)
        composed = torch.from_numpy(encoder.embed([one.prompt for one in found]))
        bank_right, composed_right = (known[nearest] * truth).sum(1), (composed * truth).sum(1)
        low, high = bootstrap_interval(composed_right - bank_right)
        rows.append(
            {
                "claim": "C1 composed prompt against the nearest of the bank",
                "bank": len(texts),
                "held_out": len(truth),
                "error": error,
                "prediction_to_truth": cosine,
                "bank_to_prediction": f"{to_bank.mean():.4f}",
                "composed_to_prediction": f"{(composed * goals).sum(1).mean():.4f}",
                "bank_to_truth": f"{bank_right.mean():.4f}",
                "composed_to_truth": f"{composed_right.mean():.4f}",
                "gain_to_truth_low": f"{low:.4f}",
                "gain_to_truth_high": f"{high:.4f}",
                "images_nearer_the_truth": f"{(composed_right > bank_right).float().mean():.2f}",
                "phrases": f"{sum(len(phrases_of(one.prompt)) for one in found) / len(found):.1f}",
                "seconds_per_image": f"{seconds:.2f}",
            }
        )
    record("compose", rows)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
