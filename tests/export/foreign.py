"""Run in a process of its own that can open no connection: what the code on a model card says of pictures.

foreign.py PICTURES TEXT_MODEL OUT FOLDER …: the first two snippets of each folder's README.md, once for each picture;
their embeddings are saved, and what they print is printed.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np


def main(pictures: str, text_model: str, out: str, *folders: str) -> None:
    found = {}
    for folder in folders:
        os.chdir(folder)
        card = Path("README.md").read_text().replace("sentence-transformers/all-MiniLM-L6-v2", text_model)
        first, second = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        for picture in sorted(Path(pictures).iterdir()):
            shutil.copy(picture, "picture.png")
            names: dict = {}
            exec(first, names)
            exec(second, names)
            found[f"{Path(folder).name} {picture.stem}"] = np.asarray(names["image"], dtype=np.float64).reshape(-1)
        Path("picture.png").unlink()
    assert not any(name.startswith("img2prompt") for name in sys.modules) or "safetensors" in folders[0]
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
