"""JSON objects as lines over a TCP connection."""

import contextlib
import json
import socket
from typing import Any

MAX_LINE_BYTES = 4096
# A machine whose network answers nothing for so long, not even with an acknowledgement by its kernel, is lost; the connection
# then ends with an error. A process that only stands still does not lose its connection.
UNREACHABLE_SECONDS = 100


class Connection:
    """A connection to another process.

    Args:
      connected: the socket; `close` closes it.
    """

    def __init__(self, connected: socket.socket):
        self._socket = connected
        self._lines = connected.makefile("rb")
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * UNREACHABLE_SECONDS))

    def set_timeout(self, seconds: float | None) -> None:
        """Sets how long `receive` waits; None: for ever. A connection that timed out receives no more."""
        self._socket.settimeout(seconds)

    def send(self, **message: Any) -> None:
        """Sends an object. A connection that is gone is no error: the thread that receives from it will notice."""
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def is_gone(self) -> bool:
        """Returns whether the other side has closed the connection, and left nothing to receive."""
        before = self._socket.gettimeout()
        self._socket.setblocking(False)
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except OSError as error:
            return not isinstance(error, BlockingIOError)
        finally:
            self._socket.settimeout(before)

    def receive(self) -> dict[str, Any]:
        """Returns the next object that arrives.

        Raises:
          OSError: the connection is closed, or what arrives is not a line with a JSON object.
        """
        line = self._lines.readline(MAX_LINE_BYTES)
        if not line.endswith(b"\n"):
            raise ConnectionError("closed")
        try:
            message = json.loads(line)
        except ValueError as error:
            raise ConnectionError("not JSON") from error
        if not isinstance(message, dict):
            raise ConnectionError("not an object")
        return message

    def close(self) -> None:
        """Ends the connection; a thread that waits in `receive` gets an error."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._lines.close()
