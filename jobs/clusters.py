"""The clusters that a run's jobs go to, each through its Jobs API, with its own token. Imports no Ray until it connects."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.local_cluster import PROJECT, LocalCluster
from paris_ray.config import ConfigError, RunConfig
from paris_ray.opening import absolute
from paris_ray.progress import clock
from paris_ray.resources import HERE

FIRST_SECONDS, LAST_SECONDS = 1.0, 15.0
"""After how long a cluster that does not answer is asked again: at first, and at last; twice as long each time."""
SAY_SECONDS = 5.0
"""For how long it may not answer before that is worth a line."""
TIMEOUT_SECONDS, STATUS_TIMEOUT_SECONDS = (10.0, 60.0), (5.0, 10.0)
"""For a connection, and for each part of an answer; Ray's own client waits for ever. Questions about jobs, for which all clusters wait, take less."""

BUSY = (408, 425, 429)
"""What a gateway answers that wants to be asked again."""
QUIET = ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env")
"""Loggers that would say of each job which files are sent along."""

SENT = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "paris_ray", "jobs", "serve_app", "cluster_configs")
"""What is sent along of the project's folder. People keep their accounts, keys and runs there too."""

STOP_SECONDS = 20.0
"""How long a job may take to end that is ended."""
LOST = "LOST"
"""Of a job that its cluster no longer knows, because its head was started anew."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED", LOST)


class AwayError(RuntimeError):
    """The cluster does not answer now."""


class Cluster:
    """One cluster's Jobs API. While it does not answer nobody waits for it: it is asked again now and then, and the calls between raise at once.

    Args:
        name: as in the config's ``clusters``, or :data:`paris_ray.resources.HERE`.
        connect: makes a ``ray.job_submission.JobSubmissionClient``; called again whenever the cluster comes back.
        run_dir: the run directory as it is seen there.
        python: what starts Python in an entrypoint.
        runtime_env: of its jobs.
    """

    def __init__(self, name: str, connect: Callable[[], Any], run_dir: str, python: str = "python", runtime_env: dict[str, Any] | None = None):
        self.name, self.run_dir, self.python, self.runtime_env = name, run_dir, python, runtime_env
        self.losses = 0  # how often it has ceased to answer
        self.say: Callable[[str], None] = print
        self._connect, self._client = connect, None
        self._away_since: float | None = None
        self._failed = 0.0  # when it was last asked in vain
        self._said = False
        self._wait = self._next = 0.0
        self.why = ""

    @property
    def label(self) -> str:
        """For people."""
        return "the cluster" if self.name == HERE else f"the cluster {self.name}"

    @property
    def answers(self) -> bool:
        """Whether it did the last time it was asked."""
        return self._away_since is None

    @property
    def away(self) -> float:
        """For how many seconds it has been asked in vain; 0 when it answered the last time."""
        return 0.0 if self._away_since is None else self._failed - self._away_since

    def call(self, function: str, *args: Any, **options: Any) -> Any:
        """One call of the Jobs API.

        Raises:
            AwayError: the cluster does not answer, or not to us.
            RuntimeError, ValueError: it does, and refuses.
        """
        if self._away_since is not None and time.monotonic() < self._next:
            raise AwayError(self.why)
        try:
            if self._client is None:
                self._client = self._connected()
            answer = getattr(self._client, function)(*args, **options)
        except Exception as error:
            if not _is_away(error, function):
                raise
            self._lost(error)
            raise AwayError(self.why) from error
        self._back()
        return answer

    def status(self, submission_id: str) -> str:
        """Of a job, :data:`LOST` if it is not known. Raises AwayError."""
        try:
            return str(self.call("get_job_status", submission_id))
        except AwayError:
            raise
        except RuntimeError:  # there is no such job, or this was somebody on the way
            return next((str(job.status) for job in self.call("list_jobs") if job.submission_id == submission_id), LOST)

    def end(self, submission_id: str) -> None:
        """End a job. Raises AwayError."""
        try:
            self.call("stop_job", submission_id)
        except AwayError:
            raise
        except RuntimeError:
            pass  # likewise; which of them it was, the job's status says
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline and self.status(submission_id) not in ENDED:
            time.sleep(0.3)

    def check(self) -> None:
        """Connect for the first time. Nobody need answer in another cluster yet, but that is said.

        Raises:
            ConfigError: our token is refused, or cannot be read; or nobody answers here.
        """
        try:
            self._client = self._connected()
        except OSError as error:
            if self.name == HERE:
                raise ConfigError(f"--address: no Ray dashboard answers ({error}); give the URL that `ray start` printed") from error
            self._lost(error)
            self._speak()

    def _connected(self) -> Any:
        try:
            return self._connect()
        except RuntimeError as error:  # somebody who is no dashboard
            raise ConnectionError(str(error)) from error

    def _lost(self, error: Exception) -> None:
        self._client, self.why = None, (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        now = self._failed = time.monotonic()
        if self._away_since is None:
            self._away_since, self._wait = now, FIRST_SECONDS
            self.losses += 1
        self._next, self._wait = now + self._wait, min(2 * self._wait, LAST_SECONDS)
        if self.away >= SAY_SECONDS:
            self._speak()

    def _speak(self) -> None:
        if not self._said:
            self._said = True
            self.say(f"{self.label} does not answer ({self.why}); it is asked again every {LAST_SECONDS:.0f} s, and its jobs may go on meanwhile")

    def _back(self) -> None:
        if self._said and self._away_since is not None:
            self.say(f"{self.label} answers again, after {clock(time.monotonic() - self._away_since)}")
        self._away_since, self._said = None, False


def _is_away(error: Exception, function: str) -> bool:
    """Whether an error says that nobody answers, or nobody who knows us, rather than what the answer is."""
    from ray.exceptions import AuthenticationError

    # An OSError: requests' own are. A token: it may be being replaced.
    if isinstance(error, OSError | AuthenticationError | ConfigError):
        return True
    found = re.search(r"status code (\d{3})\b", str(error))
    if found is None:
        return False
    # 5xx: a gateway, or a head that is starting; to a new job it may be the answer. A dashboard never refuses to list its jobs.
    code = int(found[1])
    return function == "list_jobs" or code in BUSY or (code in (502, 503, 504) if function == "submit_job" else code >= 500)


def here(config: RunConfig, where: LocalCluster | str) -> Cluster:
    """The cluster where all stages run that do not say otherwise: our own, or the one whose dashboard is at a URL."""
    ours = isinstance(where, LocalCluster)
    if isinstance(where, LocalCluster):
        where.use()
    address = where.address if isinstance(where, LocalCluster) else where

    def connect() -> Any:
        from ray.exceptions import AuthenticationError

        try:
            return _client(address)
        except AuthenticationError as error:
            raise ConfigError(f"--address: {address} wants its token: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE in the environment") from error

    run_dir = absolute(config.run_dir)
    return Cluster(HERE, connect, run_dir, shlex.quote(sys.executable) if ours else "python", None if ours else _project(config))


def other(config: RunConfig, name: str) -> Cluster:
    """One of the config's other clusters."""
    spec = config.clusters[name]

    def connect() -> Any:
        from ray.exceptions import AuthenticationError

        # An explicit header, be it an empty one: the token of the cluster here is not for others.
        headers = {"Authorization": None if spec.token_file is None else f"Bearer {_token(name, spec.token_file)}"}
        try:
            return _client(spec.address, headers)
        except AuthenticationError:
            if spec.token_file is None:
                raise ConfigError(
                    f"clusters.{name}.token_file: {spec.address} wants a token, and none is given; name the file that holds it"
                ) from None
            raise ConfigError(
                f"clusters.{name}.token_file: {spec.address} refuses the token in {spec.token_file}; put that cluster's own there "
                "(the file that RAY_AUTH_TOKEN_PATH names on its head)"
            ) from None

    runtime_env = _project(config) if spec.image is None else {"image_uri": spec.image}
    return Cluster(name, connect, spec.storage or absolute(config.run_dir), runtime_env=runtime_env)


def _project(config: RunConfig) -> dict[str, Any] | None:
    """For somebody's cluster, which does not see this project's files. What is not of the project stays here, as do tokens that lie in it."""
    if not (PROJECT / "pyproject.toml").exists():
        return None
    tokens = [one.token_file for one in config.clusters.values()] + [os.environ.get("RAY_AUTH_TOKEN_PATH")]
    named = [Path(os.path.abspath(os.path.expanduser(file))) for file in tokens if file]
    # By the name given, by that name in the folder itself, and what a link leads to.
    files = {one for file in named for one in (file, file.parent.resolve() / file.name, file.resolve())}
    # They are patterns: what would mean something else, or be stripped, stands for any letter.
    own = [re.sub(r"[^\w./-]", "?", f"/{file.relative_to(PROJECT)}") for file in sorted(files) if file.is_relative_to(PROJECT)]
    return {"working_dir": str(PROJECT), "excludes": ["/*", "!/.", *(f"!/{name}" for name in SENT), "__pycache__", *own]}


def _token(name: str, file: str) -> str:
    try:
        token = Path(file).expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"clusters.{name}.token_file: {file} cannot be read ({type(error).__name__}); name the file with that cluster's token"
        ) from None
    if not re.fullmatch(r"[!-~]+", token):  # else the HTTP library would refuse the header and print it
        raise ConfigError(f"clusters.{name}.token_file: {file} must hold one word, the token; it is empty or holds more")
    return token


def _client(address: str, headers: dict[str, Any] | None = None) -> Any:
    from ray.dashboard.modules.dashboard_sdk import SubmissionClient
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]
        def __init__(self) -> None:
            # Not its own __init__, which takes another address when RAY_ADDRESS names one.
            SubmissionClient.__init__(self, address, headers=headers)
            self._check_connection_and_version("2.2", "Ray 2.2 or later is needed there.")
            for name in QUIET:
                logging.getLogger(name).setLevel(logging.ERROR)

        def list_nodes(self) -> list[dict[str, Any]]:
            """As Ray's state API has them, the dead ones too; none when it does not say, which is no reason to take the cluster for lost."""
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return list(self._do_request("GET", "/api/v0/nodes?detail=1&limit=10000").json()["data"]["result"]["result"])
            return []

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            status = method == "GET" and endpoint.startswith(("/api/jobs/", "/api/v0/")) and not endpoint.endswith("/logs")
            return super()._do_request(method, endpoint, timeout=STATUS_TIMEOUT_SECONDS if status else TIMEOUT_SECONDS, **options)

    return Client()
