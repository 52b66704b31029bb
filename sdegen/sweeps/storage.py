"""The Optuna storage of a sweep: opening it, its samplers, and heartbeats."""

import itertools
import random
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .._compat import need
from ..runs.recorder import first_line

SAMPLERS = ("tpe", "random")
RETRIES = 10
"""How often a job is given to another worker: the job may be what kills them."""
_RACES = ("already exists", "UNIQUE constraint", "UniqueViolation", "is locked")
"""Errors of a database whose tables two workers make at the same time."""


def load_optuna() -> Any:
    """Optuna, or a sentence about where it comes from."""
    hint = "Without it a static grid runs anywhere: --shard 0/4 to --shard 3/4."
    return need("optuna", "a worker", extra="sweep", hint=hint)


@contextmanager
def _experimental() -> Iterator[Any]:
    """Optuna, without its warnings of what is experimental there."""
    optuna = load_optuna()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield optuna


def make_sampler(optuna: Any, name: str | None) -> Any:
    """The Optuna sampler called `name`; for a grid it is not used."""
    if name == "tpe":
        # Points under way count as bad ones: batches do not crowd one place.
        return optuna.samplers.TPESampler(constant_liar=True)
    return optuna.samplers.RandomSampler()


def fail_stale(study: Any) -> None:
    """Fail the trials without heartbeats; a copy of each waits in its place."""
    with _experimental() as optuna:
        optuna.storages.fail_stale_trials(study)


def open_storage(url: str, heartbeat: int, grace: int) -> Any:
    """The storage; waits while other workers make its tables.

    **Arguments:**
    - `url`, `heartbeat`, `grace`: see `work`.
    """
    for attempt in itertools.count():
        try:
            with _experimental() as optuna:
                callback = optuna.storages.RetryHeartbeatStaleTrialCallback(
                    max_retry=RETRIES, inherit_intermediate_values=True
                )
                return optuna.storages.RDBStorage(
                    url,
                    heartbeat_interval=heartbeat,
                    grace_period=grace,
                    heartbeat_stale_trial_callback=callback,
                )
        except ImportError as error:
            raise ImportError(
                f"the storage {_hidden(url)} needs a driver that is not installed "
                f"({error}): pip install 'sdegen[postgres]', for PostgreSQL."
            ) from error
        except Exception as error:
            if attempt < 8 and any(word in str(error) for word in _RACES):
                time.sleep(random.uniform(0.2, 1.0))
                continue
            raise ValueError(
                f"the storage {_hidden(url)} cannot be used: {first_line(error)}. "
                "Expected an Optuna URL such as sqlite:///sweep.db or "
                "postgresql+psycopg://user@host/database."
            ) from error


def _hidden(url: str) -> str:
    """A URL without its password."""
    scheme, at, rest = url.rpartition("@")
    return f"{scheme.split('://')[0]}://...@{rest}" if at else url


class Life:
    """A thread that sends heartbeats for the trials in `ids`, which may change."""

    def __init__(self, storage, interval, ids):
        self._storage, self._interval, self._ids = storage, interval, ids
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self):
        while not self._end.wait(self._interval):
            for id_ in tuple(self._ids):
                try:
                    self._storage.record_heartbeat(id_)
                except Exception as error:  # a server that is restarted, say
                    warnings.warn(f"no heartbeat: {error!s:.200}", stacklevel=2)
        self._storage.remove_session()

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        self._thread.join(timeout=10)
