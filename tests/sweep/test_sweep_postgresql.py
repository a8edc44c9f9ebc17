"""A sweep of two processes that share a PostgreSQL server, which is started for the test."""

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from sweeping import lives, pids, rows, started, wait_for

FOLDERS = [*map(str, Path("/usr/lib/postgresql").glob("*/bin")), *os.environ.get("PATH", "").split(os.pathsep)]


def binary(name):
    return shutil.which(name, path=os.pathsep.join(FOLDERS))


def command(*arguments):
    """A server refuses to run as root; then it runs as the user that its package has made."""
    return ["runuser", "-u", "postgres", "--", *arguments] if os.geteuid() == 0 else list(arguments)


def stop(folder):
    """Ends the server at once, whoever is connected."""
    ended = [binary("pg_ctl"), "stop", "-D", f"{folder}/data", "-m", "immediate"]
    subprocess.run(command(*ended), cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture
def server(tmp_path_factory):
    if not binary("initdb") or not binary("postgres"):
        pytest.skip("no PostgreSQL server is installed")
    if os.geteuid() == 0 and not shutil.which("runuser"):
        pytest.skip("a PostgreSQL server does not run as root")
    pytest.importorskip("psycopg2")
    folder = Path(subprocess.check_output(command("mktemp", "-d"), text=True).strip())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    password = folder.parent / f"{folder.name}.password"
    password.write_text("pa@ss/w:rd")
    password.chmod(0o644)
    initdb = [binary("initdb"), "-D", f"{folder}/data", "-U", "me", "-A", "scram-sha-256", f"--pwfile={password}"]
    subprocess.run(command(*initdb), check=True, cwd="/", stdout=subprocess.DEVNULL)
    options = ["-D", f"{folder}/data", "-p", str(port), "-k", str(folder), "-c", "listen_addresses=127.0.0.1"]
    process = subprocess.Popen(command(binary("postgres"), *options), cwd="/", stderr=subprocess.DEVNULL)
    ready = [binary("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
    try:
        wait_for(lambda: subprocess.run(ready).returncode == 0)
        yield f"postgresql://me:pa%40ss%2Fw%3Ard@127.0.0.1:{port}/postgres", lambda: stop(folder)
    finally:
        stop(folder)
        process.wait(60)
        password.unlink()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_two_machines_share_a_study_in_postgresql_and_the_password_is_written_nowhere(server, tmp_path):
    url, _ = server
    arguments = ("n_trials=10", "workers=2", f"storage={url}", "study=both", "dead_after_s=5")
    fake, endless = {"*": {"seconds": 0.3}}, {"*": {"epochs": 1000, "seconds": 0.3}}
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
    with started(one, *arguments, fake=endless) as dying, started(other, *arguments, fake=fake) as living:
        first = wait_for(lambda: len(found := pids(one / "s")) == 2 and found)
        dying.send_signal(signal.SIGKILL)
        told = living.communicate(timeout=200)[0]
        assert living.returncode == 0, told
    assert not any(map(lives, first))
    found = rows(other / "s")
    assert [row["state"] for row in found] == ["finished"] * 10 and len({row["optim.lr"] for row in found}) == 10
    with started(tmp_path, "n_trials=12", *arguments[1:]) as third:
        told += third.communicate(timeout=200)[0]
        assert third.returncode == 0 and "10 of them done" in told, told
    assert len(rows(tmp_path / "s")) == 12
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 30 and "me:***@127.0.0.1" in told
    for secret in ("pa@ss", "pa%40ss"):
        assert secret not in told
        assert not any(secret.encode() in path.read_bytes() for path in files)


@pytest.mark.slow
def test_a_server_that_refuses_is_one_sentence_without_the_password(server, tmp_path):
    wrong = server[0].replace("pa%40ss", "gu%40ss")
    with started(tmp_path, f"storage={wrong}") as process:
        told = process.communicate(timeout=100)[0]
    assert process.returncode == 1 and "password authentication failed" in told and "gu%40ss" not in told
    assert len(told.strip().splitlines()) == 2, told


@pytest.mark.slow
def test_a_server_that_goes_away_ends_the_sweep_with_a_sentence_and_no_training_left(server, tmp_path):
    url, stop_server = server
    endless = {"*": {"epochs": 1000, "seconds": 0.3}}
    with started(tmp_path, f"storage={url}", "workers=2", fake=endless) as process:
        first = wait_for(lambda: len(found := pids(tmp_path / "s")) == 2 and found)
        stop_server()
        told = process.communicate(timeout=100)[0]
    assert process.returncode == 1 and "Traceback" not in told and "pa%40ss" not in told, told
    assert "sweep: the storage does not answer" in told and "the same command goes on" in told, told
    assert not any(map(lives, first))
