"""What the prompts benchmarks read: one prompt a line, plain or gzipped."""

import gzip
from pathlib import Path


def distinct_prompts(path: str) -> list[str]:
    data = Path(path).read_bytes()
    text = (gzip.decompress(data) if path.endswith(".gz") else data).decode()
    return sorted({line for line in text.split("\n") if line.strip()})
