"""`curriculum`: a run that records how easy each pair is for it, then a fresh one that begins with the easy ones."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from img2prompt.commands.arguments import quoted_paths
from img2prompt.commands.settings import compose
from img2prompt.training.run_folder import is_finished


def main(arguments: list[str]) -> None:
    """Runs both halves as processes of their own, in run_dir/record and run_dir/easy_first; what is finished is not
    done again, and what was stopped goes on. ValueError says what is wrong with the arguments.
    """
    given = {key: value for key, _, value in (argument.partition("=") for argument in arguments)}
    if any(argument.startswith("-") for argument in arguments):
        raise ValueError("curriculum is two runs, and takes no options of a sweep")
    if "run_dir" not in given:
        raise ValueError("run_dir must be given: the two runs are kept in run_dir/record and run_dir/easy_first")
    for key in ("curriculum", "resume", "curriculum.records", "curriculum.record"):
        if key in given:
            raise ValueError(f"{key}: is set by this command; the same command again goes on where it stopped")
    if given.get("curriculum.scorer", "own_cosine") != "own_cosine":
        raise ValueError(
            f"curriculum.scorer={given['curriculum.scorer']}: no run has to record; train with curriculum=easy_first"
        )
    folder = Path(given["run_dir"]).expanduser()
    shared = [argument for argument in arguments if not argument.startswith(("run_dir=", "curriculum."))]
    own = [argument for argument in arguments if argument.startswith("curriculum.")]
    record, fresh = folder / "record", folder / "easy_first"
    # What is wrong with the second is told before the first.
    compose("train", quoted_paths([*shared, "curriculum=easy_first", f"curriculum.records={record}", *own]))
    _run(record, [*shared, "curriculum=record"])
    _run(fresh, [*shared, "curriculum=easy_first", f"curriculum.records={record}", *own])


def _run(folder: Path, arguments: Sequence[str]) -> None:
    """Trains in `folder`, or goes on there; exits as the run does when it fails."""
    if is_finished(folder):
        print(f"{folder}: finished", flush=True)
        return
    goes_on = (folder / "config.yaml").is_file()
    command = [f"resume={folder}"] if goes_on else [*arguments, f"run_dir={folder}"]
    print(f"{folder}: {'goes on' if goes_on else 'begins'}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "img2prompt", "train", *command])
    try:
        code = process.wait()
    except BaseException:
        # It saves where it is, and ends.
        process.terminate()
        process.wait()
        raise
    if code or not is_finished(folder):
        print(f"{folder}: stopped; the same command again goes on with it", file=sys.stderr)
        sys.exit(code or 1)
