"""Watches over the processes of a run and names those that never joined, died or hang.

JAX's coordination service also ends a run when a process is missing, but without naming it. Beside it, process 0 holds a TCP
connection to every other process, on a port of its own (`watch_port`). Each side sends one line of JSON per second: the step
it is at. A connection that closes without a farewell means that the process died, and ends the run. A process that is silent,
or stands still at a step while others go on, may only be slow: it is named in a warning and shows where it stands, and the run
ends only if that lasts very long. The error of one process is sent to all, so that each ends with the same reason and status.
"""

import errno
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

from absl import logging

from contrastive_jax.config import UserError
from contrastive_jax.runtime.connection import MAX_LINE_BYTES, Connection

BEAT_SECONDS = 1.0
# Longer than process 0 waits, so that its message (which names the missing processes) arrives before our own timeout.
EXTRA_SECONDS = 15


class NotJoinedError(UserError):
    """A process did not join in time, or process 0 does not answer. Starting the run again may help."""

    status = 4


class Status(NamedTuple):
    """Where the main thread of a process is.

    Attributes:
      step: the step it is at; -1 before the first.
      since: when it was first seen there, in seconds of time.monotonic().
      busy: whether it may stand still there while other processes go on.
    """

    step: int
    since: float
    busy: bool


def print_error(error: object) -> None:
    """Prints an error as one line on stderr."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)


def end_process(reason: str, status: int) -> None:
    """Prints the reason as one line on stderr and ends at once: the main thread may be waiting in a collective for ever."""
    print_error(reason)
    sys.stdout.flush()
    os._exit(status)


def show_stacks(reason: str) -> None:
    """Prints on stderr where each thread of this process is, but for those that listen to the other processes."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = [(names.get(ident, "?"), frame) for ident, frame in sys._current_frames().items()]
    stacks = [(name, frame) for name, frame in stacks if not name.startswith("peer ")]
    lines = [f"thread {name}:\n{''.join(traceback.format_stack(frame))}" for name, frame in stacks]
    print(f"{reason}; its threads are at:", *lines, sep="\n", file=sys.stderr, flush=True)


def watch_port(coordinator_port: int) -> int:
    """Returns the port of process 0 for these connections: the one below the coordinator's.

    Under SLURM, JAX takes the coordinator's port from 61440 to 65535 by the number of the job. The port below is then that of
    the job before, which may run on the same node. For such ports it is the one 40,000 below.
    """
    return coordinator_port - (40_000 if coordinator_port >= 61_440 else 1)


def list_processes(numbers: Iterable[int]) -> str:
    """Returns the numbers as text, the first eight of them: "process 1, 2, 3 and 60 more"."""
    numbers = sorted(numbers)
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return "process " + ", ".join(map(str, numbers[:8])) + more


class Peers:
    """The other processes of a run. A context manager: leaving it by an exception tells the others and ends the process.

        peers = Peers("host0:1234", count=4, number=2, silent_seconds=40, hang_seconds=600)
        peers.join(seconds=300)
        with peers:
            for step in range(100):
                peers.at(step)
                ...

    Process 0 is connected to all others, and they to process 0 alone. With one process nothing happens.

    Args:
      address: "HOST:PORT" of the coordinator; the connections use `watch_port` of its port.
      count: the number of processes.
      number: the number of this process, from 0.
      silent_seconds: a process that is silent, or stays at a step that others have passed, for longer than this gets a warning
        and shows where it stands.
      hang_seconds: after so long the process hangs, and the run ends.
      secret: what the processes of this run have in common; others are not let in.
      end: called where the run cannot go on: (reason, exit status) → never returns, except in tests.
    """

    def __init__(
        self,
        address: str,
        count: int,
        number: int,
        silent_seconds: float,
        hang_seconds: float,
        secret: str = "",
        end: Callable[[str, int], None] = end_process,
    ) -> None:
        host, _, port = address.rpartition(":")
        self._host, self._port = host.strip("[]"), watch_port(int(port))
        self._count, self._number, self._end = count, number, end
        self._silent_seconds, self._hang_seconds, self._secret = silent_seconds, hang_seconds, secret
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._connections: dict[int, Connection] = {}
        self._names = {number: socket.gethostname()}
        self._heard: dict[int, float] = {}  # when the last line of each process came
        self._strangers: set[str] = set()  # addresses of processes of other runs that called
        self._left: set[int] = set()  # the processes that said goodbye
        self._next_warnings: dict[int, float] = {}  # after how many seconds a slow process gets its next warning
        self._step, self._busy = -1, True
        self._statuses: dict[int, Status] = {}

    def join(self, seconds: float) -> None:
        """Waits until all processes have joined.

        Raises:
          NotJoinedError: some did not join within so many seconds, or process 0 does not answer; the message names them.
          UserError: a process belongs to another run; the message names it.
        """
        if self._count == 1:
            return
        deadline = time.monotonic() + seconds
        if self._number == 0:
            self._accept_all(deadline, seconds)
        else:
            self._connect(deadline, seconds)
        for number, connection in self._connections.items():
            threading.Thread(target=self._listen, args=(number, connection), name=f"peer {number}", daemon=True).start()
        threading.Thread(target=self._beat, name="peers", daemon=True).start()

    def _open_server(self, deadline: float) -> socket.socket:
        """Process 0: listens; waits while the port is taken, for example by the last connections of the job before."""
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        while True:
            try:
                return socket.create_server(("", self._port), family=family, dualstack_ipv6=dual, backlog=self._count)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                    raise UserError(
                        f"--coordinator: port {self._port}, where the processes watch one another, cannot be opened ({error}); "
                        "choose another port"
                    ) from error
                logging.warning("port %d is taken (%s); trying again", self._port, error)
            time.sleep(1)

    def _accept_all(self, deadline: float, seconds: float) -> None:
        """Process 0: accepts a connection from each other process, then tells them that all have joined."""
        logged = time.monotonic()
        with self._open_server(deadline) as server:
            server.settimeout(1)
            while len(self._present()) < self._count - 1:
                missing = set(range(1, self._count)) - self._connections.keys()
                if time.monotonic() > deadline:
                    reason = f"{list_processes(missing)} of {self._count} did not join within {seconds:.0f} s; {self._joined()}"
                    self._refuse(NotJoinedError(reason))
                if time.monotonic() > logged + 10:
                    logged = time.monotonic()
                    logging.info("waiting for %s of %d", list_processes(missing), self._count)
                try:
                    accepted, address = server.accept()
                except OSError:  # nobody called within a second
                    continue
                self._let_in(Connection(accepted), address[0])
        for number, connection in self._connections.items():
            connection.set_timeout(None)
            connection.send(kind="go", name=self._names[0])
            self._heard[number] = time.monotonic()

    def _present(self) -> dict[int, Connection]:
        """Process 0: the connections of those that have joined, without the lost ones; their processes call again."""
        for number in [number for number, connection in self._connections.items() if connection.is_gone()]:
            self._connections.pop(number).close()
        return self._connections

    def _let_in(self, connection: Connection, address: str) -> None:
        """Process 0: takes a process that calls into the run, and sends strangers away.

        Raises:
          UserError: a process of this run was started with other numbers.
        """
        connection.set_timeout(10)
        try:
            hello = connection.receive()
            number, count, name = int(hello["number"]), int(hello["count"]), str(hello["name"])
        except (OSError, KeyError, TypeError, ValueError):  # not a process of any run: a port scan, for example
            connection.close()
            return
        if hello.get("secret") != self._secret:
            if address not in self._strangers:
                logging.warning("%s (%s) called with the secret of another run; it is ignored", name, address)
            self._strangers.add(address)
            connection.send(kind="stranger")
            connection.close()
            return
        if count != self._count or number not in range(1, self._count):
            reason = f"process {number} ({name}) is one of {count}, process 0 one of {self._count}"
            self._refuse(UserError(reason), connection)
        if number in self._present():
            reason = f"process {number} joined twice, from {self._names[number]} and {name}"
            self._refuse(UserError(reason), connection)
        self._connections[number], self._names[number] = connection, name

    def _joined(self) -> str:
        names = sorted(self._names.items())
        more = ", ..." if len(names) > 8 else ""
        return "joined: " + ", ".join(f"{number} ({name})" for number, name in names[:8]) + more

    def _refuse(self, error: UserError, *more: Connection) -> None:
        """Ends the joining: sends the error to all processes that have joined, and to `more`, and raises it."""
        for connection in (*self._connections.values(), *more):
            connection.send(kind="failed", reason=str(error), status=error.status)
            connection.close()
        raise error

    def _connect(self, deadline: float, seconds: float) -> None:
        """The other processes: call process 0 until it answers, and wait until it says that all have joined."""
        where = f"process 0 at {self._host}:{self._port}"
        while True:
            try:
                connection = Connection(socket.create_connection((self._host, self._port), timeout=5))
            except OSError as error:
                problem = f"does not answer after {seconds:.0f} s ({error})"
            else:
                answer = self._introduce(connection, deadline)
                if answer.get("kind") == "go":
                    break
                connection.close()
                if answer.get("kind") == "failed":
                    refusal = NotJoinedError if answer.get("status") == NotJoinedError.status else UserError
                    raise refusal(str(answer.get("reason")))
                # Perhaps another run that is about to end, on the same port.
                problem = str(answer.get("problem", "belongs to another run"))
            if time.monotonic() > deadline:
                raise NotJoinedError(
                    f"{where} {problem}; is it running, and is this port (see --coordinator) open to the other processes?"
                )
            time.sleep(0.5)
        connection.set_timeout(None)
        self._connections[0], self._names[0] = connection, str(answer.get("name"))
        self._heard[0] = time.monotonic()

    def _introduce(self, connection: Connection, deadline: float) -> dict[str, Any]:
        """Returns the answer of process 0, whose "kind" is "go", "failed" or "stranger"; or else a "problem"."""
        connection.send(number=self._number, count=self._count, name=self._names[self._number], secret=self._secret)
        connection.set_timeout(max(deadline - time.monotonic(), 0) + EXTRA_SECONDS)
        try:
            return connection.receive()
        except OSError as error:
            return {"problem": f"closed the connection before all processes had joined ({error})"}

    def at(self, step: int, busy: bool = False) -> None:
        """Reports where the main thread is; the other processes hear of it within a second.

        Args:
          step: the step it is at.
          busy: whether it may stand still there while other processes go on: to compile, to evaluate, to write.
        """
        self._step, self._busy = step, busy

    def __enter__(self) -> "Peers":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._count == 1 or not self._connections:
            return
        if error is None or isinstance(error, SystemExit):
            self._over.set()
            self._send_all(kind="bye")
            return
        if isinstance(error, UserError):
            status = error.status
            print_error(error)
        else:
            # Probably a collective failed because a peer died. Give the watcher 5 s to report which one.
            time.sleep(5 * BEAT_SECONDS)
            traceback.print_exception(error)
            status = 1
        self._over.set()
        self._tell_failure(f"{self._named(self._number)}: {error}", status)
        # Not by sys.exit: JAX would then wait for the other processes to leave, while they wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def _listen(self, number: int, connection: Connection) -> None:
        """Reads what one process sends until it is gone (a thread per connection)."""
        while True:
            try:
                message = connection.receive()
            except (OSError, ValueError):  # ValueError: this side has closed it
                connection.close()
                if number not in self._left:
                    last = self._statuses.get(number)
                    place = f"at step {last.step}" if last and last.step >= 0 else "starting"
                    self._stop(f"{self._named(number)} is gone, last seen {place}; see its own log")
                return
            self._heard[number] = time.monotonic()
            if message.get("kind") == "bye":
                self._left.add(number)
            elif message.get("kind") == "failed":
                self._stop(str(message.get("reason")), int(message.get("status", 1)))
                return
            elif message.get("kind") == "show":
                show_stacks(str(message.get("reason")))
            else:
                self._note(number, int(message.get("step", -1)), bool(message.get("busy")))

    def _beat(self) -> None:
        """Each second, sends this process's status to the others and looks for processes that hang (a thread)."""
        while not self._over.wait(BEAT_SECONDS):
            self._note(self._number, self._step, self._busy)
            own = self._statuses[self._number]
            self._send_all(step=own.step, busy=own.busy)
            self._check_slow(time.monotonic())

    def _note(self, number: int, step: int, busy: bool) -> None:
        """Stores the status of a process; `since` stays while the process does not move."""
        before = self._statuses.get(number)
        if before is None or (before.step, before.busy) != (step, busy):
            self._statuses[number] = Status(step, time.monotonic(), busy)

    def _check_slow(self, now: float) -> None:
        """Warns of slow processes, asks them where they stand, and ends the run when one has been slow for too long."""
        slow = {number: (what, seconds) for number, what, seconds in self._slow(now) if number not in self._left}
        for number in self._next_warnings.keys() - slow.keys():
            logging.info("%s goes on", self._named(number))
            del self._next_warnings[number]
        for number, (what, seconds) in slow.items():
            line = f"{self._named(number)} {what}"
            if seconds > self._hang_seconds:
                show_stacks(f"{line}: it hangs. This is {self._named(self._number)}")
                self._stop(f"{line}: it hangs")
            elif seconds > self._next_warnings.get(number, 0):
                self._next_warnings[number] = 2 * seconds
                logging.warning("%s", line)
                if number == self._number:
                    show_stacks(line)
                elif self._number == 0:
                    self._connections[number].send(kind="show", reason=line)

    def _slow(self, now: float) -> Iterator[tuple[int, str, float]]:
        """Yields each slow process, what it does, and for how many seconds. Process 0 watches all, the others process 0."""
        furthest = max(status.step for status in list(self._statuses.values()))
        watched = list(self._names) if self._number == 0 else [0]
        for number in watched:
            status = self._statuses.get(number)
            silent = now - self._heard.get(number, now)
            if silent > self._silent_seconds:
                yield number, f"has said nothing for {silent:.0f} s", silent
            elif status and not status.busy and status.step < furthest and now - status.since > self._silent_seconds:
                stands = now - status.since
                yield number, f"has been at step {status.step} for {stands:.0f} s, others are at {furthest}", stands

    def _named(self, number: int) -> str:
        return f"process {number} ({self._names[number]})"

    def _send_all(self, **message: Any) -> None:
        for connection in self._connections.values():
            connection.send(**message)

    def _tell_failure(self, reason: str, status: int) -> None:
        self._send_all(kind="failed", reason=reason[: MAX_LINE_BYTES // 4], status=status)

    def _stop(self, reason: str, status: int = 1) -> None:
        """Ends this process; process 0 tells the others first."""
        with self._lock:
            if self._over.is_set():
                return
            self._over.set()
        if self._number == 0:
            self._tell_failure(reason, status)
        self._end(reason, status)
