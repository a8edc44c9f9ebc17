"""A bank: prompts with their embeddings on disk, so that a prediction can be read as words.

# N = prompts, D = width of the embedding
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from img2prompt.files import replacing
from img2prompt.search import nearest


@dataclass
class Bank:
    """Distinct prompts and their unit embeddings."""

    prompts: list[str]
    embeddings: Float[Tensor, "N D"]

    def nearest(self, queries: Float[Tensor, "Q D"], count: int) -> tuple[list[list[str]], list[list[float]]]:
        """The `count` prompts with the highest cosine for each query, best first, and these cosines."""
        cosines, rows = nearest(queries, self.embeddings, count)
        return [[self.prompts[row] for row in one] for one in rows.tolist()], cosines.tolist()

    def rows_of(self, queries: Float[Tensor, "Q D"]) -> Float[Tensor, "Q D"]:
        """The embedding of the nearest prompt of each query, on the CPU."""
        _, rows = nearest(queries.to(self.embeddings.device), self.embeddings, 1)
        return self.embeddings[rows[:, 0]].float().cpu()


def write_bank(path: Path, prompts: Sequence[str], embeddings: Float[np.ndarray, "N D"]) -> None:
    """Writes the distinct prompts, sorted, as parquet; embeddings in half precision, which costs 1e-4 of a cosine."""
    first = {prompt: i for i, prompt in enumerate(prompts)}
    kept = sorted(first)
    vectors = embeddings[[first[prompt] for prompt in kept]].astype(np.float16)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    with replacing(path) as temporary:
        pq.write_table(pa.table({"prompt": pa.array(kept, pa.string()), "embedding": column}), temporary)


def read_bank(path: Path, device: str | torch.device = "cpu") -> Bank:
    """Reads a bank; ValueError when the file is none."""
    try:
        table = pq.read_table(path, columns=["prompt", "embedding"])
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"{path}: not a bank of prompts ({error})") from None
    kinds = [table.schema.field(name).type for name in ("prompt", "embedding")]
    if not (pa.types.is_string(kinds[0]) and pa.types.is_fixed_size_list(kinds[1])):
        raise ValueError(f"{path}: not a bank of prompts (its columns are {kinds[0]} and {kinds[1]})")
    width = kinds[1].list_size
    flat = table.column("embedding").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    vectors = torch.from_numpy(flat.astype(np.float32)).view(-1, width).to(device)
    return Bank(table.column("prompt").to_pylist(), torch.nn.functional.normalize(vectors, dim=-1))
