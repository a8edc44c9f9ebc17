"""How easy a pair is, by the id of its image: what a curriculum goes by. The higher a score, the easier.

# N = pairs
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from img2prompt.data.sample import Sample
from img2prompt.files import replacing

# Of the records of a run, the last ones weigh most (Croitoru et al., Reverse Stable Diffusion, 2023).
RECORD_WEIGHTS = (0.1, 0.1, 0.2, 0.2, 0.4)


def write_scores(path: Path, samples: Sequence[Sample], scores: Float[np.ndarray, " N"]) -> None:
    """A Parquet file with the columns id, prompt and score."""
    columns = {
        "id": [sample.id for sample in samples],
        "prompt": [sample.prompt for sample in samples],
        "score": np.asarray(scores, dtype=np.float64),
    }
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def read_scores(path: Path, samples: Sequence[Sample]) -> Float[np.ndarray, " N"]:
    """The scores of these samples; ValueError when the file is of other ones."""
    try:
        table = pq.read_table(path, columns=["id", "prompt", "score"]).to_pydict()
        values = [float(one) for one in table["score"]]
        known = dict(zip(table["id"], zip(table["prompt"], values, strict=True), strict=True))
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise ValueError(f"{path}: no records of difficulty ({' '.join(str(error).split())[:120]})") from None
    if len(known) < len(values):
        raise ValueError(f"{path}: records of an image twice; record anew")
    missing = [sample.id for sample in samples if sample.id not in known]
    other = [sample.id for sample in samples if sample.id in known and known[sample.id][0] != sample.prompt]
    if missing or other:
        told = (
            f"{len(missing)} of {len(samples)} images are not in it" if missing else f"{len(other)} have other prompts"
        )
        raise ValueError(f"{path}: records of another data set: {told} (first: {(missing or other)[0]})")
    scores = np.array([known[sample.id][1] for sample in samples], dtype=np.float64)
    if not np.isfinite(scores).all():
        raise ValueError(f"{path}: it has scores that are not finite")
    return scores


def weighted(records: Sequence[Float[np.ndarray, " N"]]) -> Float[np.ndarray, " N"]:
    """The mean of the last five records of a run, from the earliest on, of which later ones weigh more."""
    last = records[-len(RECORD_WEIGHTS) :]
    return np.average(np.stack(last), axis=0, weights=RECORD_WEIGHTS[-len(last) :])


def shortness(samples: Sequence[Sample]) -> Float[np.ndarray, " N"]:
    """Of each prompt: how few words it has."""
    return -np.array([len(sample.prompt.split()) for sample in samples], dtype=np.float64)


def agreement(members: Sequence[Float[np.ndarray, "N D"]]) -> Float[np.ndarray, " N"]:
    """The mean cosine of each two members' predictions."""
    if len({one.shape[1] for one in members}) > 1:
        widths = ", ".join(str(one.shape[1]) for one in members)
        raise ValueError(f"curriculum.predictions: files of different widths ({widths}); give models of one target")
    unit = [one / np.linalg.norm(one, axis=1, keepdims=True) for one in members]
    pairs = [(one * other).sum(1) for i, one in enumerate(unit) for other in unit[:i]]
    return np.mean(pairs, axis=0).astype(np.float64)
