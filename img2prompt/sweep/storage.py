"""Where the study of a sweep is kept: in a journal, or in any storage of Optuna, whose URL may hold secrets."""

import importlib.util
import os
import re
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend

_ATTEMPTS = 5


class _Journal(JournalFileBackend):
    """A journal that outlives `kill -9` in the middle of a line: its half is taken off before the next one."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with open(self._file_path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            is_whole = file.read(1) in (b"", b"\n")
        if not is_whole:
            self._take_off()
        super().append_logs(logs)

    def _take_off(self) -> None:
        self._lock.acquire()
        try:
            with open(self._file_path, "rb+") as file:
                text = file.read()
                if not text.endswith(b"\n"):
                    file.truncate(text.rfind(b"\n") + 1)
        finally:
            self._lock.release()


def storage_of(storage: str | None, journal: Path) -> BaseStorage:
    if storage is None:
        return JournalStorage(_Journal(str(journal)))
    if "://" not in storage:
        raise ValueError(
            f"storage={without_password(storage)}: must be a URL such as postgresql://USER:PASSWORD@HOST/DATABASE"
        )
    if re.match(r"postgres(ql)?(\+psycopg2)?://", storage):
        if importlib.util.find_spec("psycopg2") is None:
            raise ImportError("psycopg2")
        # Which driver the bare name means, and that postgres:// means it too, depends on SQLAlchemy's version.
        storage = re.sub(r"^[^:]+", "postgresql+psycopg2", storage)
    from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

    # Connections that the server has closed meanwhile are made anew.
    options = {} if storage.startswith("sqlite") else {"pool_pre_ping": True}
    for attempt in range(_ATTEMPTS):
        try:
            return optuna.storages.RDBStorage(storage, engine_kwargs=options)
        except (SQLAlchemyError, StorageInternalError, ImportError, ValueError) as error:
            inner = error.__cause__ or error
            # Two processes that begin together make the same tables.
            if attempt < _ATTEMPTS - 1 and any(
                isinstance(one, IntegrityError | ProgrammingError) for one in (error, inner)
            ):
                time.sleep(1)
                continue
            said = " ".join(str(inner).split("\n")[0].split())
            raise ValueError(f"storage={without_password(storage)}: {without_secrets(said, storage)}") from None
    raise AssertionError


def without_password(storage: str) -> str:
    """The URL as it may be printed and kept."""
    if "://" not in storage:
        # It may be anywhere in what is no URL.
        return storage if ":" not in storage else f"{storage.partition(':')[0]}:***"
    hidden = re.sub(r"(://[^/@:]*):.*@", r"\1:***@", storage)
    shown = "user|host|port|dbname|sslmode|application_name"
    return re.sub(rf"([?&](?!(?:{shown})=)[^=&]*=)[^&]*", r"\1***", hidden)


def without_secrets(text: str, storage: str | None) -> str:
    """What a library said, without the password of the URL."""
    for known in (r"://[^/@:]*:(.*)@", r"(?i)(?:password|passwd)=([^&]+)"):
        found = re.search(known, storage or "")
        text = text.replace(found[1], "***") if found and found[1] else text
    return text
