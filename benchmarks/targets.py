"""E1, E2: prompts to MiniLM with precision=bf16 against SentenceTransformer.encode(batch_size=32), and a second run.

Goals: at least 1.8x at a cosine of at least 0.9999; at least 50x. PROMPTS is a text file (.gz too), one prompt a line.

    python benchmarks/targets.py PROMPTS [count] [rounds]
"""

import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from prompts import distinct_prompts
from record import record
from rounds import paired, ratio
from sentence_transformers import SentenceTransformer

from img2prompt.data.targets import TextEncoder, embeddings_of, locate


def main() -> None:
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 4096
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 3
    chosen = random.Random(0).sample(distinct_prompts(sys.argv[1]), count)
    model = locate()
    plain = SentenceTransformer(model.location, device="cpu")
    encoders = {precision: TextEncoder(model, "cpu", precision) for precision in ("bf16", "fp32")}
    found: dict[str, np.ndarray] = {}

    def timed(name: str, embed) -> float:
        began = time.perf_counter()
        found[name] = embed()
        return count / (time.perf_counter() - began)

    options = {"batch_size": 32, "normalize_embeddings": True, "show_progress_bar": False}
    speeds = paired(
        {
            "bf16": lambda: timed("bf16", lambda: encoders["bf16"].embed(chosen)),
            "fp32": lambda: timed("fp32", lambda: encoders["fp32"].embed(chosen)),
            "plain": lambda: timed("plain", lambda: plain.encode(chosen, **options)),
        },
        rounds,
    )
    rows = [
        {
            "claim": f"E1 {name}, against SentenceTransformer.encode(batch_size=32)",
            "prompts": count,
            "ours_prompts_per_second": f"{statistics.median(speeds[name]):.0f}",
            "other_prompts_per_second": f"{statistics.median(speeds['plain']):.0f}",
            **ratio(speeds[name], speeds["plain"]),
            "smallest_cosine": f"{(found[name] * found['plain']).sum(1).min():.6f}",
        }
        for name in ("bf16", "fp32")
    ]
    runs: dict[str, list[float]] = {"first": [], "second": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name in runs:
                speed = timed(name, lambda: embeddings_of(chosen, model, "fp32", "cpu", Path(folder)))
                runs[name].append(speed)
    rows.append(
        {
            "claim": "E2 a second run on the same prompts, against the first, loading the model included",
            "prompts": count,
            "ours_prompts_per_second": f"{statistics.median(runs['second']):.0f}",
            "other_prompts_per_second": f"{statistics.median(runs['first']):.0f}",
            **ratio(runs["second"], runs["first"]),
            "smallest_cosine": f"{(found['first'] * found['second']).sum(1).min():.6f}",
        }
    )
    record("targets", rows)


if __name__ == "__main__":
    main()
