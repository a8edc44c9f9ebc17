"""The study that processes share: who is dead, which trials count, and whose place is the last."""

import time

import pytest
from optuna.trial import TrialState

from img2prompt.commands.earlier import _records
from img2prompt.sweep import presence as presences
from img2prompt.sweep import study as studies
from img2prompt.sweep.presence import Presence
from img2prompt.sweep.study import claim_trial, counted, is_over, open_study, queue_again, tell


@pytest.fixture
def opened(tmp_path):
    """Opens the study of the test as another process would: (pruner=…) -> study."""

    def study(pruner="none", **pruning):
        known = {"startup_trials": 2, "warmup_validations": 0} | pruning
        return open_study(None, tmp_path / "journal.log", "s", "tpe", pruner, 0, **known)

    return study


def begin(study, worker, n_trials=5):
    trial = claim_trial(study, n_trials, worker)
    if trial is not None:
        trial.suggest_float("x", 0, 1)
    return trial


def test_a_worker_of_another_machine_is_dead_only_when_what_it_says_stops(opened, monkeypatch):
    # Where processes are cannot be told, so that nobody looks for them.
    monkeypatch.setattr(presences, "place", lambda: "")
    ours, theirs = opened(), opened()
    other = Presence(theirs, 0.4)
    trial = begin(theirs, other.worker)
    presence = Presence(ours, 0.4)
    until = time.monotonic() + 1.2
    while time.monotonic() < until:
        other.beat()
        assert presence.queue_dead(retries=1) == []
        time.sleep(0.02)
    while not (found := presence.queue_dead(retries=1)):
        assert time.monotonic() < until + 30
        time.sleep(0.02)
    assert found == [trial.number]
    again = begin(ours, presence.worker)
    assert again.params == trial.params and again.user_attrs["origin"] == trial.number
    # It was only slow: what it says now changes nothing.
    tell(theirs, trial, TrialState.COMPLETE, 0.5)
    tell(ours, again, TrialState.COMPLETE, 0.7)
    assert [(one.state, one.value) for one in counted(ours.get_trials())] == [(TrialState.COMPLETE, 0.7)]


def test_a_worker_of_this_machine_is_dead_as_soon_as_its_process_is_gone(opened, monkeypatch):
    study = opened()
    monkeypatch.setattr(presences.os, "getpid", lambda: 2**22 + 1)
    gone = Presence(study, 1e6)
    trial = begin(study, gone.worker)
    monkeypatch.undo()
    assert Presence(study, 1e6).queue_dead(retries=1) == [trial.number]
    assert not is_over(study.get_trials(), 1)


def test_a_trial_that_nobody_has_marked_as_his_is_found_too(opened):
    study = opened()
    lost = study.ask()
    presence = Presence(study, 0.1)
    assert presence.queue_dead(retries=1) == []
    time.sleep(0.2)
    assert presence.queue_dead(retries=1) == [lost.number]


def test_what_is_queued_again_twice_is_tried_once(opened):
    ours, theirs = opened(), opened()
    one = begin(ours, "a")
    assert queue_again(ours, one.number, "its worker died", 1) and not queue_again(theirs, one.number, "it died", 1)
    # As if both had found it between the two steps of the other.
    studies.enqueue(theirs, theirs.get_trials()[one.number])
    again, twice = begin(ours, "a", 1), begin(theirs, "b", 1)
    assert again is not None and twice is None
    tell(ours, again, TrialState.COMPLETE, 0.1)
    assert is_over(ours.get_trials(), 1) and len(counted(ours.get_trials())) == 1


def test_the_last_place_is_taken_once_whoever_saw_it_free(opened, monkeypatch):
    ours, theirs = opened(), opened()
    begin(ours, "a", 2)
    # Both look before either asks.
    seen = theirs.get_trials()
    assert begin(ours, "a", 2) is not None
    look, looks = theirs.get_trials, []

    def late(**options):
        looks.append(1)
        return seen if len(looks) == 1 else look(**options)

    monkeypatch.setattr(theirs, "get_trials", late)
    assert begin(theirs, "b", 2) is None and len(looks) == 2
    assert len(counted(ours.get_trials())) == 2
    assert begin(ours, "a", 3) is not None


@pytest.mark.parametrize("pruner", ["median", "hyperband", "none"])
def test_pruners_stop_bad_trials_and_never_the_best(opened, pruner):
    study, pruned = opened(pruner), []
    for number in range(30):
        trial = begin(study, "a", 30)
        final = 0.9 - 0.02 * number
        for step in range(1, 10):
            trial.report(final * step / 10, step)
            if trial.should_prune():
                pruned.append(number)
                tell(study, trial, TrialState.PRUNED)
                break
        else:
            tell(study, trial, TrialState.COMPLETE, final)
    assert 0 not in pruned and (len(pruned) > 8) == (pruner != "none")


def test_trials_of_one_seed_differ_from_process_to_process_and_are_drawn_again_alike(tmp_path):
    def drawn(name):
        found = [open_study(None, tmp_path / name, "s", "tpe", "none", 0, startup_trials=5, warmup_validations=1)] * 4
        return [begin(study, "a").params["x"] for study in found]

    first = drawn("one.log")
    assert len(set(first)) == 4 and drawn("two.log") == first


def test_no_trial_follows_the_split_of_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in ("0000", "0001"):
        (tmp_path / "trials" / number).mkdir(parents=True)
        (tmp_path / "trials" / number / "split.json").write_text("{}")
    assert list(_records(tmp_path / "trials" / "0001")) == [tmp_path / "trials" / "0000" / "split.json"]
    (tmp_path / "sweep.yaml").write_text("name: lr\n")
    assert list(_records(tmp_path / "trials" / "0001")) == []


def test_a_journal_whose_last_line_is_torn_goes_on(opened, tmp_path):
    before = opened()
    tell(before, begin(before, "a"), TrialState.COMPLETE, 0.5)
    with (tmp_path / "journal.log").open("ab") as file:
        file.write(b'{"op_code":6,"worker_id":"x","tri')
    after = opened()
    tell(after, begin(after, "b"), TrialState.COMPLETE, 0.7)
    for study in (before, after, opened()):
        assert [one.value for one in study.get_trials()] == [0.5, 0.7]
    assert b'"tri{' not in (tmp_path / "journal.log").read_bytes()
