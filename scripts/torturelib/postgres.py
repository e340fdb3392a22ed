"""PostgreSQL with its data on one volume's file system and pg_wal on that of a volume of another primary."""

from __future__ import annotations

import os
import pwd
import random
import shutil
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from scripts.demolib.errors import DemoError
from scripts.demolib.process import Background, attempt, environment, run
from scripts.torturelib.errors import BrokenPromiseError, TortureError
from scripts.torturelib.group import Group

VOLUMES = ("data", "log")
ACCOUNTS, START_BALANCE = 500, 1000
CLIENTS = 3
SOCKET = "@torture"  # abstract: of our network namespace
START_S = 60.0
PROGRAMS = ("initdb", "postgres", "psql", "pg_isready")
_OPTIONS = (
    "-c", f"unix_socket_directories={SOCKET}", "-c", "listen_addresses=", "-c", "shared_buffers=4MB",
    "-c", "max_wal_size=48MB", "-c", "min_wal_size=32MB", "-c", "checkpoint_timeout=30s", "-c", "bgwriter_delay=20ms",
)  # fmt: skip


def programs() -> dict[str, str]:
    """Name to path; those that are not there are missing."""
    places = [environment()["PATH"], *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)]
    found = {name: shutil.which(name, path=os.pathsep.join(reversed(places))) for name in PROGRAMS}
    return {name: path for name, path in found.items() if path}


def why_not() -> str:
    """Why PostgreSQL cannot be had; empty if it can."""
    missing = [name for name in PROGRAMS if name not in programs()]
    return f"PostgreSQL is not installed: no {', '.join(missing)}" if missing else ""


@dataclass
class Found:
    """What a recovered database holds."""

    transactions: dict[int, int] = field(default_factory=dict)  # client to its last transaction
    problems: list[str] = field(default_factory=list)


class Postgres:
    """On the loop devices of a group, at whichever site is active."""

    def __init__(self, group: Group, chance: random.Random) -> None:
        self.group = group
        self.committed = dict.fromkeys(range(CLIENTS), 0)
        self._random = chance
        self._programs = programs()
        self._server: Background | None = None
        self._ending = threading.Event()
        self._clients: list[threading.Thread] = []
        self.errors: list[str] = []

    # life

    def make(self) -> None:
        """File systems, and an empty database."""
        for volume in VOLUMES:
            run(["mkfs.ext4", "-q", "-F", self.group.attach(volume)])
            self._mount(volume)
            point = self._point(volume) / "pg"
            point.mkdir(mode=0o700)
            shutil.chown(point, self._user())
        run([*self._as_user(), self._programs["initdb"], "-D", str(self._point("data") / "pg"), "-X",
             str(self._point("log") / "pg" / "wal"), "-A", "trust", "-U", "torture", "--no-sync", "-N"])  # fmt: skip
        os.sync()
        self._start()
        self.ask(
            "CREATE TABLE account(id int PRIMARY KEY, balance bigint);"
            f"INSERT INTO account SELECT id, {START_BALANCE} FROM generate_series(0, {ACCOUNTS - 1}) id;"
            "CREATE TABLE history(client int, number int, filler text, PRIMARY KEY (client, number));"
        )

    def open(self) -> None:
        """Mount what a disaster left, at the site that is active now; recover."""
        for volume in VOLUMES:
            self.group.attach(volume)
            self._mount(volume)
        with suppress(FileNotFoundError):
            (self._point("data") / "pg" / "postmaster.pid").unlink()
        self._start()

    def close(self) -> None:
        """In order, or however it can be: the disk may be dead."""
        self.end_load()
        if self._server is not None:
            self._server.kill()
            self._server = None
        for volume in VOLUMES:
            point = str(self._point(volume))
            for argv in (["umount", point], ["umount", "-l", point]):
                with suppress(DemoError):
                    if not os.path.ismount(point) or attempt(argv).returncode == 0:
                        break

    def _point(self, volume: str) -> Path:
        return self.group.home / "mnt" / volume

    def _mount(self, volume: str) -> None:
        point = self._point(volume)
        point.mkdir(parents=True, exist_ok=True)
        run(["mount", "-t", "ext4", self.group.attach(volume), str(point)])

    @staticmethod
    def _user() -> str:
        for name in ("postgres", "nobody"):
            with suppress(KeyError):
                return pwd.getpwnam(name).pw_name
        raise TortureError("no user for PostgreSQL, which does not run as root", 5)

    def _as_user(self) -> list[str]:
        """It may come through directories that are closed to it, and nothing more."""
        caps = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
        entry = pwd.getpwnam(self._user())
        return ["setpriv", f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups", *caps]

    def _start(self) -> None:
        argv = [*self._as_user(), self._programs["postgres"], "-D", str(self._point("data") / "pg"), *_OPTIONS]
        self._server = Background(argv, self.group.home / "postgres.log")
        deadline_s = time.monotonic() + START_S
        ready = [self._programs["pg_isready"], "-q", "-h", SOCKET, "-U", "torture"]
        while attempt(ready).returncode != 0:
            if self._server.ended() or time.monotonic() > deadline_s:
                raise BrokenPromiseError(f"PostgreSQL does not start: {self._server.words()}")
            time.sleep(0.05)

    def _psql(self) -> list[str]:
        common = ["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", SOCKET, "-U", "torture", "postgres"]
        return [self._programs["psql"], *common]

    def ask(self, sql: str) -> list[str]:
        """Run it; lines of the answer. Raises DemoError."""
        return run([*self._psql(), "-c", sql]).splitlines()

    # load

    def begin_load(self) -> None:
        """Clients commit, one transaction after the other."""
        self._ending = threading.Event()
        self._clients = [threading.Thread(target=self._client, args=(each,), daemon=True) for each in range(CLIENTS)]
        for client in self._clients:
            client.start()

    def end_load(self) -> None:
        """They stop after the transaction under way, or with the server."""
        self._ending.set()
        for client in self._clients:
            client.join(5.0)
        if self._server is not None and any(client.is_alive() for client in self._clients):
            self._server.kill()
            for client in self._clients:
                client.join(START_S)
        self._clients = []

    def wait_for_more(self, count: int) -> None:
        """So many commits. Raises BrokenPromiseError when they do not come."""
        target, deadline_s = sum(self.committed.values()) + count, time.monotonic() + START_S
        while sum(self.committed.values()) < target:
            if self.errors or time.monotonic() > deadline_s:
                raise BrokenPromiseError(f"PostgreSQL commits nothing: {self.errors[:1]}")
            time.sleep(0.02)

    def _client(self, client: int) -> None:
        chance = random.Random(self._random.random())
        with subprocess.Popen(
            self._psql(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
        ) as process:  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                while not self._ending.is_set():
                    number = self.committed[client] + 1
                    print(self._transaction(chance, client, number), file=process.stdin)
                    line = process.stdout.readline()
                    if line != f"committed {number}\n":
                        if not self._ending.is_set():
                            self.errors.append(line)
                        break
                    self.committed[client] = number
            except OSError as error:
                self.errors.append(str(error))
            with suppress(OSError):
                process.stdin.close()

    @staticmethod
    def _transaction(chance: random.Random, client: int, number: int) -> str:
        # In ascending order of ids, so that clients never wait for each other in a circle.
        one, other = sorted(chance.sample(range(ACCOUNTS), 2))
        amount = chance.randrange(1, 100)
        return (
            f"BEGIN; UPDATE account SET balance = balance - {amount} WHERE id = {one};"
            f"UPDATE account SET balance = balance + {amount} WHERE id = {other};"
            f"INSERT INTO history VALUES ({client}, {number}, repeat('{number} ', {chance.randrange(1, 200)})); COMMIT;"
            f"\n\\echo committed {number}"
        )

    # check

    def check(self, *, may_lose: bool) -> Found:
        """What it holds, against what was committed; then that is what counts."""
        found = Found()
        total = self.ask("SELECT sum(balance) FROM account")[0]
        if int(total) != ACCOUNTS * START_BALANCE:
            found.problems.append(f"PostgreSQL: money came or went: {total}")
        self.ask("SET enable_seqscan = off; SELECT count(filler) FROM history WHERE number > 0")
        for line in self.ask("SELECT client, max(number), count(*) FROM history GROUP BY client"):
            client, last, count = map(int, line.split("|"))
            found.transactions[client] = last
            if last != count:
                found.problems.append(f"PostgreSQL: client {client} has {count} transactions up to {last}: a hole")
        for client, committed in self.committed.items():
            last = found.transactions.get(client, 0)
            if last < committed and not may_lose:
                found.problems.append(f"PostgreSQL: client {client} ends at {last}, {committed} was committed")
        self.committed = {client: found.transactions.get(client, 0) for client in self.committed}
        return found
