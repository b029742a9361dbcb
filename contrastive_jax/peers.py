"""Watches over the processes of a run: who never came, who died, who hangs.

JAX's coordination service ends a run whose processes are not all there, minutes later and without a name. Beside it, process 0
holds a TCP connection to each of the others, on the port below the coordinator's. Each side says a line of JSON a second: the
step it is at. A connection that closes without a farewell is a death, silence or a step that stands still is a hang, and what
one process fails with is told to all, so that each ends with the same reason.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from absl import logging

from contrastive_jax import cli

BEAT_SECONDS = 1.0
MAX_LINE_BYTES = 4096


def end_process(reason: str, status: int) -> None:
    """One line on stderr, then the end at once: the main thread may wait in a collective for ever."""
    print("error: " + " ".join(reason.split()), file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


def listed(numbers: Iterable[int]) -> str:
    """As in "process 1, 2, 3 and 60 more"."""
    numbers = sorted(numbers)
    return "process " + ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


class Peers:
    """The other processes, as one of them sees them. A context manager: leaving it by an error tells the others.

    Process 0 is connected to all, the others to process 0 alone. With one process nothing happens.

    Args:
      address: "HOST:PORT" of the coordinator; the connections are on the port below.
      count: how many processes there are.
      number: which of them this is.
      silence: seconds after which a process that says nothing, or stands still while others go on, is taken to hang.
      end: what to do where the run cannot go on, (reason, exit status) → never returns but in tests.
    """

    def __init__(
        self, address: str, count: int, number: int, silence: float, end: Callable[[str, int], None] = end_process
    ) -> None:
        host, _, port = address.rpartition(":")
        self._host, self._port = host.strip("[]"), int(port) - 1
        self._count, self._number, self._silence, self._end = count, number, silence, end
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._sockets: dict[int, socket.socket] = {}
        self._names = {number: socket.gethostname()}
        self._heard: dict[int, float] = {}
        self._left: set[int] = set()
        self._step, self._busy = -1, True
        # Of each process: the step it is at, since when, and whether it may stand still there.
        self._at: dict[int, tuple[int, float, bool]] = {}

    def join(self, seconds: float) -> None:
        """Waits until all processes are there.

        Raises:
          ValueError: some did not come within so many seconds, or are no part of this run; the message names them.
        """
        if self._count == 1:
            return
        deadline = time.monotonic() + seconds
        if self._number == 0:
            self._gather(deadline, seconds)
        else:
            self._call(deadline, seconds)
        for number, connection in self._sockets.items():
            self._heard[number] = time.monotonic()
            threading.Thread(target=self._listen, args=(number, connection), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def _gather(self, deadline: float, seconds: float) -> None:
        """Process 0: takes the others in, then tells them that all are there."""
        dual = socket.has_dualstack_ipv6()
        try:
            server = socket.create_server(
                ("", self._port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=self._count
            )
        except OSError as error:
            raise ValueError(f"--coordinator: port {self._port}, below the coordinator's, cannot be opened: {error}") from error
        told = time.monotonic()
        with server:
            server.settimeout(1)
            while len(self._sockets) < self._count - 1:
                missing = set(range(1, self._count)) - self._sockets.keys()
                if time.monotonic() > deadline:
                    self._refuse(f"{listed(missing)} of {self._count} did not join within {seconds:.0f} s; {self._present()}")
                if time.monotonic() > told + 10:
                    told = time.monotonic()
                    logging.info("waiting for %s of %d", listed(missing), self._count)
                try:
                    connection, _ = server.accept()
                except OSError:  # nobody came within the second
                    continue
                try:
                    connection.settimeout(10)
                    hello = read_line(connection)
                    number, count, name = int(hello["number"]), int(hello["count"]), str(hello["name"])
                except (OSError, KeyError, TypeError, ValueError):  # not one of ours
                    connection.close()
                    continue
                if count != self._count or number not in range(1, self._count):
                    self._refuse(f"process {number} ({name}) is one of {count}, process 0 one of {self._count}", connection)
                if number in self._sockets:
                    self._refuse(f"process {number} joined twice, from {self._names[number]} and {name}", connection)
                self._sockets[number], self._names[number] = connection, name
        for number, connection in self._sockets.items():
            connection.settimeout(None)
            self._send(number, kind="go", name=self._names[0])

    def _present(self) -> str:
        there = sorted(self._names.items())
        return "there: " + ", ".join(f"{i} ({name})" for i, name in there[:8]) + (", ..." if len(there) > 8 else "")

    def _refuse(self, reason: str, *more: socket.socket) -> None:
        for connection in (*self._sockets.values(), *more):
            send_line(connection, kind="failed", reason=reason, status=cli.USER_ERROR)
            connection.close()
        raise ValueError(reason)

    def _call(self, deadline: float, seconds: float) -> None:
        """The others: call process 0 until it answers, and wait until all are there."""
        where = f"process 0 at {self._host}:{self._port}"
        while True:
            try:
                connection = socket.create_connection((self._host, self._port), timeout=5)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"{where} does not answer after {seconds:.0f} s ({error}); is it running, and this port (the one below "
                        "the coordinator's) open to the other processes?"
                    ) from error
                time.sleep(0.2)
        send_line(connection, number=self._number, count=self._count, name=self._names[self._number])
        connection.settimeout(max(deadline - time.monotonic(), 0) + 15)  # process 0 names who is missing: it shall speak first
        try:
            answer = read_line(connection)
            if answer.get("kind") != "go":
                raise ValueError(str(answer.get("reason")))
        except OSError as error:
            connection.close()
            raise ValueError(f"{where} closed the connection before all processes were there: {error}") from error
        except ValueError:
            connection.close()
            raise
        connection.settimeout(None)
        self._sockets[0], self._names[0] = connection, str(answer.get("name"))

    def at(self, step: int, busy: bool = False) -> None:
        """Says where the main thread is.

        Args:
          step: the step it is at.
          busy: whether it may stand still there while others go on: to compile, evaluate, write.
        """
        self._step, self._busy = step, busy

    def __enter__(self) -> "Peers":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._count == 1 or not self._sockets:
            return
        if error is None or (isinstance(error, SystemExit) and not isinstance(error, cli.Failure)):
            self._over.set()
            for number in self._sockets:
                self._send(number, kind="bye")
            return
        if not isinstance(error, cli.Failure):
            # Most likely a collective that broke because of another process: the watch knows better in a moment.
            time.sleep(5 * BEAT_SECONDS)
            traceback.print_exception(error)
        status = error.status if isinstance(error, cli.Failure) else 1
        reason = f"process {self._number} ({self._names[self._number]}): {error}"
        self._over.set()
        for number in self._sockets:
            self._send(number, kind="failed", reason=reason[: MAX_LINE_BYTES // 4], status=status)
        # Not by sys.exit: JAX would wait for the others to leave, who wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def _listen(self, number: int, connection: socket.socket) -> None:
        name = f"process {number} ({self._names[number]})"
        while True:
            try:
                message = read_line(connection)
            except OSError:
                if number not in self._left:
                    step = self._at.get(number, (-1,))[0]
                    self._stop(f"{name} is gone, last seen {f'at step {step}' if step >= 0 else 'starting'}; see its own log")
                return
            self._heard[number] = now = time.monotonic()
            if message.get("kind") == "bye":
                self._left.add(number)
            elif message.get("kind") == "failed":
                self._stop(str(message.get("reason")), int(message.get("status", 1)))
                return
            else:
                step, busy = int(message.get("step", -1)), bool(message.get("busy"))
                before = self._at.get(number)
                self._at[number] = (step, before[1] if before and before[::2] == (step, busy) else now, busy)

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            now = time.monotonic()
            step, busy = self._step, self._busy
            before = self._at.get(self._number)
            self._at[self._number] = (step, before[1] if before and before[::2] == (step, busy) else now, busy)
            for number in self._sockets:
                self._send(number, step=step, busy=busy)
            for number, heard in self._heard.items():
                if now - heard > self._silence and number not in self._left:
                    self._stop(f"process {number} ({self._names[number]}) has said nothing for {now - heard:.0f} s: it hangs")
            furthest = max(step for step, _, _ in self._at.values())
            for number, (step, since, busy) in list(self._at.items()):
                if not busy and step < furthest and now - since > self._silence and number not in self._left:
                    self._stop(
                        f"process {number} ({self._names[number]}) has been at step {step} for {now - since:.0f} s, others are "
                        f"at {furthest}: it hangs"
                    )

    def _send(self, number: int, **message: Any) -> None:
        send_line(self._sockets[number], **message)

    def _stop(self, reason: str, status: int = 1) -> None:
        """Ends this process; process 0 tells the others first."""
        with self._lock:
            if self._over.is_set():
                return
            self._over.set()
        if self._number == 0:
            for number in self._sockets:
                self._send(number, kind="failed", reason=reason[: MAX_LINE_BYTES // 4], status=status)
        self._end(reason, status)


def send_line(connection: socket.socket, **message: Any) -> None:
    """Says one thing; a connection that is gone is the listener's to notice."""
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        pass


def read_line(connection: socket.socket) -> dict[str, Any]:
    """The next thing said.

    Raises:
      OSError: the connection is closed, or what comes is not of ours.
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > MAX_LINE_BYTES:
            raise ConnectionError("closed")
        line += byte
    try:
        message = json.loads(line)
    except ValueError as error:
        raise ConnectionError("not JSON") from error
    if not isinstance(message, dict):
        raise ConnectionError("not an object")
    return message
