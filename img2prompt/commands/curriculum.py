"""`curriculum`: a run that records how easy each pair is for it, then a fresh one that begins with the easy ones."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from img2prompt.commands.arguments import quoted_paths
from img2prompt.commands.settings import compose


def main(arguments: list[str]) -> None:
    """Runs both halves as processes of their own, in run_dir/record and run_dir/easy_first; what is finished is not
    done again, and what was stopped goes on. ValueError says what is wrong with the arguments.
    """
    given = {key.lstrip("+"): value for key, _, value in (argument.partition("=") for argument in arguments)}
    if any(argument.startswith("-") for argument in arguments):
        raise ValueError("curriculum is two runs, and takes no options of a sweep")
    if not given.get("run_dir"):
        raise ValueError("run_dir must be given: the two runs are kept in run_dir/record and run_dir/easy_first")
    for key in ("curriculum", "resume", "curriculum.records", "curriculum.record"):
        if key in given:
            raise ValueError(f"{key}: is set by this command; the same command again goes on where it stopped")
    scorer = given.get("curriculum.scorer", "own_cosine")
    if scorer != "own_cosine":
        from img2prompt.training.curriculum import SCORERS

        if scorer not in SCORERS:
            raise ValueError(f"curriculum.scorer={scorer}: must be one of {', '.join(SCORERS)}")
        raise ValueError(
            f"curriculum.scorer={scorer}: no run has to record; use img2prompt train with curriculum=easy_first and it"
        )
    folder = Path(given["run_dir"]).expanduser()
    shared = [one for one in arguments if not one.lstrip("+").startswith(("run_dir=", "curriculum."))]
    own = [one for one in arguments if one.lstrip("+").startswith("curriculum.")]
    record, fresh = folder / "record", folder / "easy_first"
    second = [*shared, "curriculum=easy_first", f"curriculum.records={record}", *own]
    # What is wrong with the second is told before the first.
    is_dry_run = compose("train", quoted_paths(second))["dry_run"]
    if not (fresh / "config.yaml").is_file():
        print(f"{fresh}: looked at first; {record} is trained before it", flush=True)
        # Nothing is recorded yet: a judge that needs no record stands for it.
        stand_in = [*shared, "curriculum=easy_first", *(one for one in own if ".scorer=" not in one)]
        _train([*stand_in, "curriculum.scorer=prompt_length", f"run_dir={fresh}", "dry_run=true"])
    if is_dry_run:
        return
    _run(record, [*shared, "curriculum=record"])
    _run(fresh, second)


def _run(folder: Path, arguments: Sequence[str]) -> None:
    """Trains in `folder`, or goes on there with the same arguments; exits as the run does when it fails."""
    goes_on = (folder / "config.yaml").is_file()
    print(f"{folder}: {'goes on' if goes_on else 'begins'}", flush=True)
    _train([*arguments, f"resume={folder}" if goes_on else f"run_dir={folder}"])
    from img2prompt.training.run_folder import is_finished

    if not is_finished(folder):
        print(f"{folder}: stopped; the same command again goes on with it", file=sys.stderr)
        sys.exit(1)


def _train(arguments: Sequence[str]) -> None:
    process = subprocess.Popen([sys.executable, "-m", "img2prompt", "train", *arguments])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # The terminal has told the run, too: it saves where it is, and a second signal would end it at once.
        process.wait()
        raise
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code:
        sys.exit(code)
