"""N1: exact near-duplicate search against faiss (IndexFlatIP.range_search), the same pairs but those within 1e-6.

Goal: at least 2.5x on two cores. PROMPTS is a text file (.gz too), one prompt a line; needs faiss-cpu.

    python benchmarks/near_duplicates.py PROMPTS [threshold] [rounds]
"""

import resource
import statistics
import sys
import time

import faiss
import numpy as np
import torch
from prompts import distinct_prompts
from record import record
from rounds import paired, ratio

from img2prompt.cache import cache_folder
from img2prompt.data.targets import embeddings_of, locate
from img2prompt.search import close_pairs


def main() -> None:
    threshold = float(sys.argv[2]) if len(sys.argv) > 2 else 0.9
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 3
    embeddings = embeddings_of(distinct_prompts(sys.argv[1]), locate(), "fp32", "cpu", cache_folder(None))
    rows = torch.from_numpy(embeddings)
    faiss.omp_set_num_threads(torch.get_num_threads())
    pairs: dict[str, set[tuple[int, int]]] = {}
    peak_gib: list[float] = []

    def ours() -> float:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        found = [np.stack([i, j], axis=1) for i, j, _ in close_pairs(rows, threshold)]
        seconds = time.perf_counter() - began
        peak_gib.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
        pairs["ours"] = set(map(tuple, np.concatenate(found).tolist()))
        return 1 / seconds

    def theirs() -> float:
        began = time.perf_counter()
        index = faiss.IndexFlatIP(embeddings.shape[1])
        index.add(embeddings)
        limits, _, neighbours = index.range_search(embeddings, threshold)
        seconds = time.perf_counter() - began
        queries = np.repeat(np.arange(len(embeddings)), np.diff(limits).astype(np.int64))
        pairs["faiss"] = {(i, j) for i, j in zip(queries.tolist(), neighbours.tolist(), strict=True) if j < i}
        return 1 / seconds

    speeds = paired({"ours": ours, "faiss": theirs}, rounds)
    differing = sorted(pairs["ours"] ^ pairs["faiss"])
    margins = [abs(float(embeddings[i].astype(np.float64) @ embeddings[j]) - threshold) for i, j in differing]
    record(
        f"near_duplicates_{threshold:g}",
        [
            {
                "prompts": len(embeddings),
                "threshold": threshold,
                "pairs": len(pairs["ours"]),
                "faiss_pairs": len(pairs["faiss"]),
                "largest_margin_of_a_differing_pair": f"{max(margins, default=0.0):.1e}",
                "ours_seconds": f"{1 / statistics.median(speeds['ours']):.2f}",
                "faiss_seconds": f"{1 / statistics.median(speeds['faiss']):.2f}",
                **ratio(speeds["ours"], speeds["faiss"]),
                "first_peak_gib_above_start": f"{peak_gib[0]:.2f}",
            }
        ],
    )


if __name__ == "__main__":
    main()
