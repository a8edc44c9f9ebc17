"""Averages of weights: one checkpoint of several that began from the same one.

WiSE-FT (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models") weighs a start and its fine-tune, a soup
(Wortsman et al. 2022, "Model soups") averages fine-tunes of one start. Nothing is trained, and a prediction costs what
that of one model does.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


def averaged(paths: Sequence[Path], weights: Sequence[float]) -> dict[str, Tensor]:
    """The sum of the checkpoints' tensors, each times its weight, in the types of the first that counts.

    A checkpoint of weight 0 is not read, and one that is alone comes back bit for bit. Whole numbers, such as the steps
    that BatchNorm has counted, are those of the last that counts; its running statistics are averaged like weights.
    Tensor by tensor, so the memory is that of one model. ValueError when the tensors differ in name or shape.
    """
    counting = [(path, weight) for path, weight in zip(paths, weights, strict=True) if weight != 0]
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path, _ in counting]
        names = sorted(files[0].keys())
        for (path, _), file in zip(counting, files, strict=True):
            odd = sorted(set(file.keys()) ^ set(names))
            if odd:
                raise ValueError(f"{path}: its tensors are not those of {counting[0][0]} (first difference: {odd[0]})")
        for name in names:
            parts = [file.get_tensor(name) for file in files]
            for (path, _), part in zip(counting, parts, strict=True):
                if part.shape != parts[0].shape:
                    shapes = f"{tuple(part.shape)} and {tuple(parts[0].shape)}"
                    raise ValueError(f"{path}: {name} is of another shape than in {counting[0][0]}: {shapes}")
            found[name] = parts[-1]
            if len(parts) > 1 and parts[-1].is_floating_point():
                # In float64: the rounding of many small weights would add up.
                total = torch.zeros(parts[0].shape, dtype=torch.float64)
                for part, (_, weight) in zip(parts, counting, strict=True):
                    total += weight * part.double()
                found[name] = total.to(parts[0].dtype)
    return found


def greedy_soup(scores: Sequence[float], score_of: Callable[[list[int]], float]) -> list[int]:
    """Which of the ingredients to average, by number: the best, and of the others, in the order of their scores, each
    with which the score of the average does not fall ("Model soups", Recipe 1).

    `score_of` says what the average of some of them scores. The result never scores less than the best ingredient.
    """
    ranked = sorted(range(len(scores)), key=lambda one: -scores[one])
    soup, best = ranked[:1], scores[ranked[0]]
    for one in ranked[1:]:
        score = score_of([*soup, one])
        if score >= best:
            soup, best = [*soup, one], score
    return soup
