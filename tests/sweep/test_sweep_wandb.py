"""The file for `wandb agent`, given to wandb's own agent, whose server is a stub."""

import json
import os
import queue
import sys

import pytest
import yaml
from conftest import ROOT, TINY

from img2prompt.commands.arguments import quoted_paths
from img2prompt.commands.settings import compose

wandb_agent = pytest.importorskip("wandb.wandb_agent")
FILE = yaml.safe_load((ROOT / "conf" / "wandb_sweep.yaml").read_text())
# What a server sends: a value of each parameter.
DRAWN = {"optim.lr": 0.00031, "optim.weight_decay": 0.012, "head": "mlp"}


@pytest.fixture
def agent(monkeypatch, tmp_path):
    """Gives the agent one run with these arguments before the drawn ones, and returns what it started."""

    def start(*shared, really):
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
        monkeypatch.setenv("WANDB_RUN_ID", "abc")
        monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "")
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.chdir(tmp_path)
        started = []
        process = wandb_agent.AgentProcess

        def noted(*, command, **others):
            started.append(command)
            return process(command=command if really else [sys.executable, "-c", ""], **others)

        monkeypatch.setattr(wandb_agent, "AgentProcess", noted)
        told = wandb_agent.Agent(None, queue.Queue(), sweep_id="s1")
        # As it reads it from the server.
        told._sweep_command = [*FILE["command"][:-1], *shared, FILE["command"][-1]]
        arguments = {key: {"value": value} for key, value in DRAWN.items()}
        answer = told._process_command({"type": "run", "run_id": "abc", "program": FILE["program"], "args": arguments})
        assert "exception" not in answer, answer
        assert told._run_processes["abc"].wait() == 0
        return started[0]

    return start


def test_the_command_that_wandbs_agent_makes_is_one_that_train_takes(agent):
    command = agent(really=False)
    assert command[:2] == ["/usr/bin/env", "python"] and command[2:5] == ["-m", "img2prompt", "train"]
    settings = compose("train", quoted_paths(command[5:]))
    assert settings["optim"]["lr"] == 0.00031 and settings["head"]["hidden"] and "wandb" in settings["logger"]


def test_its_parameters_are_keys_of_train_and_its_metric_is_the_one_that_is_logged():
    assert set(FILE["parameters"]) == set(DRAWN)
    assert FILE["metric"] == {"name": "val/cosine", "goal": "maximize"}
    for key, said in FILE["parameters"].items():
        for value in said.get("values") or [said["min"], said["max"]]:
            compose("train", [f"{key}={value}"])


@pytest.mark.slow
def test_an_agents_run_trains_and_logs_the_metric_that_the_sweep_maximises(agent, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}")
    agent(*TINY, "data.count=60", "trainer.max_epochs=2", "trainer.accelerator=cpu", "run_dir=run", really=True)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["val_cosine"] > 0
    logged = b"".join(path.read_bytes() for path in tmp_path.rglob("*.wandb"))
    assert b"val/cosine" in logged
