"""Stands for `train` in tests of sweeps: reads its arguments and writes the files that a run writes.

The curve is 1 - (log10(optim.lr) + 3)² / 10, reached over some validations. FAKE, JSON in the environment, says what
happens on the way to each trial by its number, and with * to all others.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main(arguments):
    given = dict(one.lstrip("+").split("=", 1) for one in arguments)
    told = dict(os.environ)
    folder = Path(given.get("resume") or given["run_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    if "resume" in given:
        # The run's own configuration.
        began = json.loads((folder / "arguments.json").read_text())
        given = {**dict(one.lstrip("+").split("=", 1) for one in began), **given}
        (folder / "resumed.json").write_text(json.dumps(arguments))
    else:
        (folder / "arguments.json").write_text(json.dumps(arguments))
    (folder / "environment.json").write_text(json.dumps({key: told.get(key) for key in ("CUDA_VISIBLE_DEVICES",)}))
    starts = folder / "starts.txt"
    starts.write_text(f"{starts.read_text() if starts.exists() else ''}{os.getpid()}\n")
    said = json.loads(told.get("FAKE", "{}"))
    fake = said.get(str(int(folder.name.partition("-")[0])), said.get("*", {}))
    lr = float(given["optim.lr"])
    best = fake.get("best", 1 - (math.log10(lr) + 3) ** 2 / 10)
    (folder / "data.json").write_text("{}")
    if fake.get("child"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (folder / "child.txt").write_text(str(child.pid))
    (folder / "ladder.csv").write_text("rung,val_cosine\nmean,0.1\ntext_only,\nprobe,\n")
    print(f"lr {lr}", flush=True)
    if fake.get("once") and len(starts.read_text().split()) > 1:
        fake = {}
    if fake.get("exit"):
        sys.exit(f"train: {fake['exit']}")
    if fake.get("raises"):
        raise RuntimeError(fake["raises"])
    if fake.get("ignores_sigterm"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    rows, epochs = [], int(fake.get("epochs", 3))
    for epoch in range(1, epochs + 1):
        time.sleep(float(fake.get("seconds", 0.02)))
        rows.append(f"{epoch * 10},3,{best * epoch / epochs:.9g}")
        part = folder / "metrics.tmp"
        part.write_text("\n".join(["step,rung,val/cosine", *rows]) + "\n")
        os.replace(part, folder / "metrics.csv")
        if fake.get("kill_at") == epoch:
            os.kill(os.getpid(), signal.SIGKILL)
    value = float("nan") if fake.get("nan") else best
    with (folder / "ladder.csv").open("a") as ladder:
        ladder.write(f"finetune,{value}\n")
    (folder / "summary.json").write_text(json.dumps({"val_cosine": value}))


if __name__ == "__main__":
    main(sys.argv[1:])
