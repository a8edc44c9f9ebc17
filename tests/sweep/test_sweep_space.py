"""Search spaces: what is drawn, what is typed of it, and which trials may begin."""

import json

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sweeping import FAKE, rows

from img2prompt.commands.arguments import PATH_KEYS, quoted_paths
from img2prompt.commands.conf import conf_folder, groups
from img2prompt.commands.settings import compose
from img2prompt.commands.sweep import check_parameters, split
from img2prompt.sweep.gpus import slots, told, visible
from img2prompt.sweep.space import draw, overrides_of, plain, read_space, typed_value
from img2prompt.sweep.storage import without_password, without_secrets

ALL_KINDS = """
head: [linear, mlp, attention]
head.hidden: {int: [64, 4096], log: true, when: {head: mlp}}
head.batchnorm: {choice: [true, false], when: {head: [mlp]}}
head.queries: {int: [1, 4], when: {head: attention}}
optim.lr: {float: [1e-5, 1e-2], log: true}
optim.layer_decay: {float: [0.5, 1.0], step: 0.25}
data.batch_size: {int: [16, 64], step: 16}
optim.ema_decay: [null, 0.999]
optim.betas: [[0.9, 0.999], [0.9, 0.95]]
"""


def test_every_kind_is_drawn_within_its_bounds_and_train_reads_what_was_drawn(tmp_path):
    (tmp_path / "all.yaml").write_text(ALL_KINDS)
    parameters = read_space(tmp_path / "all.yaml")
    check_parameters(parameters, split([f"space={tmp_path / 'all.yaml'}"]))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    heads = set()
    for _ in range(60):
        drawn = draw(parameters, study.ask())
        heads.add(drawn["head"])
        assert ("head.hidden" in drawn) == ("head.batchnorm" in drawn) == (drawn["head"] == "mlp")
        assert ("head.queries" in drawn) == (drawn["head"] == "attention")
        assert 1e-5 <= float(drawn["optim.lr"]) <= 1e-2 and float(drawn["optim.layer_decay"]) in (0.5, 0.75, 1.0)
        assert drawn["data.batch_size"] in ("16", "32", "48", "64")
    assert heads == {"linear", "mlp", "attention"}
    found = compose("train", overrides_of(drawn))
    assert found["optim"]["lr"] == float(drawn["optim.lr"]) and found["optim"]["betas"] in ([0.9, 0.999], [0.9, 0.95])
    assert found["optim"]["ema_decay"] in (None, 0.999)


@pytest.mark.parametrize("name", groups(conf_folder())["sweep"])
def test_every_space_of_ours_is_one_that_train_takes(name):
    known = split([f"+sweep={name}"])
    check_parameters(read_space(known.space), known)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("optim.lr: {float: [1e-5, 1e-2]}\n++optim.lr: [0.1]", "is there twice, with and without"),
        ("data.batch_size: {int: [32, 256], step: 300}", "steps of 300 from 32 do not reach 256, but 32"),
        ("optim.layer_decay: {float: [0.1, 0.75], step: 0.25}", "do not reach 0.75, but 0.6"),
        (
            "head: [mlp, linear]\nhead.hidden: {int: [64, 128], when: {head: [mlp, linear]}}",
            "head.hidden .*when: .head",
        ),
        ("head: [mlp, linear]\nhead.hidden: {int: [64, 128]}", "head.hidden .*when: .head"),
    ],
)
def test_a_key_that_only_some_of_the_drawn_choices_have_is_told_before_anything_starts(text, sentence, tmp_path):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        check_parameters(read_space(tmp_path / "s.yaml"), split([f"space={tmp_path / 's.yaml'}"]))


@pytest.mark.parametrize("path", ["/data/it's", "/d/back\\", "a (1), b=2.png"])
def test_a_path_that_is_drawn_reaches_train_as_it_is(path, tmp_path):
    (tmp_path / "s.yaml").write_text(json.dumps({"init_from": [path, "/other"]}))
    parameters = read_space(tmp_path / "s.yaml", PATH_KEYS)
    settings = compose("train", quoted_paths(overrides_of({"init_from": parameters[0].choices[0]})))
    assert settings["init_from"] == path


def test_a_space_is_compared_as_data_whatever_its_file_looks_like(tmp_path):
    (tmp_path / "a.yaml").write_text("# one\noptim.lr: {float: [1e-5, 1.0e-2], log: true}\n")
    (tmp_path / "b.yaml").write_text("optim.lr:\n  log: true\n  float:\n  - 0.00001\n  - 0.01\n")
    a, b = (plain(read_space(tmp_path / name)) for name in ("a.yaml", "b.yaml"))
    assert a == b == json.loads(json.dumps(a))


LETTERS = "ab '\"\\=,[]{}:$()#é-"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-1e6, 1e6) | st.text(LETTERS, max_size=6),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@given(VALUES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_value_of_yaml_reaches_train_as_it_is(value):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    text = f"name={typed_value(value)}"
    parsed = OverridesParser.create().parse_override(text).value()
    assert _plain(parsed) == value


def _plain(parsed):
    if isinstance(parsed, list):
        return [_plain(one) for one in parsed]
    return parsed.text if hasattr(parsed, "text") else parsed


def test_each_worker_has_gpus_of_its_own():
    assert [one["CUDA_VISIBLE_DEVICES"] for one in slots(2, 1, ["0", "1"], {})] == ["0", "1"]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in slots(2, 2, ["0", "1", "2", "3", "4"], {})] == ["0,1", "2,3"]
    shared = slots(3, 1, ["GPU-a", "GPU-b"], {})
    assert [one["CUDA_VISIBLE_DEVICES"] for one in shared] == ["GPU-a", "GPU-b", "GPU-a"]
    assert "3 workers share 2 places" in told(3, 1, ["GPU-a", "GPU-b"]) and "share" not in told(2, 1, ["0", "1"])
    with pytest.raises(ValueError, match="trainer.devices=4, but there are 2 GPUs"):
        slots(1, 4, ["0", "1"], {})
    assert slots(1, 1, [], {}) == [{}]


def test_threads_are_divided_unless_the_user_has_said_how_many():
    counts = {one["OMP_NUM_THREADS"] for one in slots(1000, 1, [], {})}
    assert counts == {"1"}
    assert all("OMP_NUM_THREADS" not in one for one in slots(4, 1, [], {"OMP_NUM_THREADS": "3"}))


def test_gpus_are_those_that_are_named_else_visible_else_the_machines():
    everything = lambda: ["0", "1", "2"]  # noqa: E731
    assert visible("auto", {}, everything) == ["0", "1", "2"]
    assert visible("auto", {"CUDA_VISIBLE_DEVICES": "2, GPU-uuid"}, everything) == ["2", "GPU-uuid"]
    assert visible("auto", {"CUDA_VISIBLE_DEVICES": ""}, everything) == []
    assert visible("auto", {"CUDA_VISIBLE_DEVICES": "1,-1,0"}, everything) == ["1"]
    assert visible([1, "GPU-x"], {"CUDA_VISIBLE_DEVICES": "0"}, everything) == ["1", "GPU-x"]
    assert visible([], {}, everything) == []
    with pytest.raises(ValueError, match="there is no GPU 7 here; there are 0, 1, 2"):
        visible([0, 7], {}, everything)
    with pytest.raises(ValueError, match="there is no GPU 0 here; nvidia-smi names none"):
        visible([0], {}, list)


def test_trials_see_the_gpus_of_their_worker(tmp_path, monkeypatch):
    from img2prompt.commands.sweep import sweep

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAKE", json.dumps({"*": {"seconds": 0.3}}))
    sweep(["+sweep=lr", "sweep_dir=s", "n_trials=4", "workers=2", "gpus=[GPU-a,GPU-b]"], command=FAKE)
    seen = {
        json.loads(path.read_text())["CUDA_VISIBLE_DEVICES"] for path in tmp_path.glob("s/trials/*/environment.json")
    }
    assert seen == {"GPU-a", "GPU-b"} and len(rows(tmp_path / "s")) == 4


@pytest.mark.parametrize(
    "url, hidden",
    [
        ("postgresql://me:pa@ss:w@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        (
            "postgresql://host/db?user=me&password=secret&sslmode=x",
            "postgresql://host/db?user=me&password=***&sslmode=x",
        ),
        ("sqlite:///a.db", "sqlite:///a.db"),
    ],
)
def test_passwords_are_hidden(url, hidden):
    assert without_password(url) == hidden
    said = without_secrets("no pa@ss:w and no secret", url)
    assert ("pa@ss:w" in said, "secret" in said) == ("pa@ss:w" not in url, "password" not in url)
