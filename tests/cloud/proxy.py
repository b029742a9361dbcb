"""A proxy in front of a storage emulator that refuses, delays and cuts answers by chance, and counts requests.

    python -m tests.cloud.proxy --upstream=http://127.0.0.1:4443 --port=4444 --refuse=0.05 --delay=0.01:3 --cut=0.01 --seed=1
    curl http://127.0.0.1:4444/_proxy/counts?depth=2          # {"read data/train": 12, ...}, and {"refused": 3, "delayed": ...}
    curl -X POST 'http://127.0.0.1:4444/_proxy/set?refuse=1'  # other faults from now on; counts=0 begins to count anew

The clients are given the proxy's address instead of the emulator's. A fault befalls a request at most once: what is repeated is
seen as another request. `--only` limits faults to the requests whose line ("GET /storage/...") it matches.
"""

import argparse
import collections
import dataclasses
import http.client
import json
import random
import re
import socket
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length", "host", "expect"}


@dataclasses.dataclass
class Faults:
    """Shares of the requests, 0 to 1.

    Attributes:
      refuse: are answered with a status of `statuses`, and do not reach the emulator.
      statuses: of refusals, in turn.
      delay: are delayed, by `seconds`.
      seconds: of a delay.
      cut: downloads of more than a byte that end in the middle, with the connection.
      only: faults befall only the requests whose line this regular expression finds.
    """

    refuse: float = 0.0
    statuses: tuple[int, ...] = (503, 429)
    delay: float = 0.0
    seconds: float = 2.0
    cut: float = 0.0
    only: str = ""

    def change(self, values: dict[str, str]) -> None:
        """Sets attributes from text: refuse=0.05, statuses=503,429, delay=0.01:3, cut=0.1, only=checkpoints."""
        for name, text in values.items():
            if name == "statuses":
                self.statuses = tuple(int(status) for status in text.split(","))
            elif name == "delay":
                share, _, seconds = text.partition(":")
                self.delay, self.seconds = float(share), float(seconds or self.seconds)
            else:
                setattr(self, name, text if name == "only" else float(text))


def operation(method: str, target: str, body: bytes) -> tuple[str, str, str]:
    """What a request to GCS (JSON or XML) or S3 asks for: (kind, bucket, name of the object or prefix).

    The kinds are read, write, stat, list, delete, copy, batch and bucket.
    """
    url = urllib.parse.urlsplit(target)
    query = {key: values[0] for key, values in urllib.parse.parse_qs(url.query).items()}
    parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
    kind = {"GET": "read", "HEAD": "stat", "PUT": "write", "POST": "write", "DELETE": "delete"}.get(method, method.lower())
    if parts[0] == "batch":
        return "batch", "", ""
    if "b" in parts and "storage" in parts:
        parts = parts[parts.index("b") + 1 :]
        bucket = parts[0] if parts else ""
        if len(parts) < 2:
            return "bucket", bucket, ""
        name = parts[2] if len(parts) > 2 else query.get("name", "")
        if method == "GET" and len(parts) == 2:
            return "list", bucket, query.get("prefix", "")
        if "rewriteTo" in parts or "copyTo" in parts or "moveTo" in parts:
            return "copy", bucket, name
        if method == "GET" and query.get("alt") != "media":
            kind = "stat"
        if not name and (found := re.search(rb'"name":\s*"([^"]+)"', body[:5000])):
            name = found[1].decode()
        return kind, bucket, name
    bucket, name = parts[0], "/".join(parts[1:])
    if not name:
        listed = method == "GET" and ("list-type" in query or "prefix" in query)
        kind = "list" if listed else "delete" if "delete" in url.query else "bucket"
    return kind, bucket, name or query.get("prefix", "")


class Proxy(ThreadingHTTPServer):
    """The proxy; `with Proxy(upstream) as proxy: proxy.address, proxy.faults.refuse = ...`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str, port: int = 0, host: str = "127.0.0.1", seed: int = 0, **faults: Any):
        self.upstream = upstream.removeprefix("http://").rstrip("/")
        self.faults, self.seen = Faults(**faults), collections.Counter[str]()
        self.requests: list[tuple[str, str, str]] = []
        self._random, self._lock = random.Random(seed), threading.Lock()
        super().__init__((host, port), Handler)
        self.address = f"http://{host}:{self.server_port}"

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is not worth a traceback."""

    def draw(self, line: str, operation: tuple[str, str, str]) -> tuple[int, bool, bool]:
        """Counts a request, and draws its faults: (the status of a refusal or 0, whether it is delayed, whether it is cut)."""
        with self._lock:
            self.requests.append(operation)
            chances = [self._random.random() for _ in range(3)]
            if not re.search(self.faults.only, line):
                return 0, False, False
            shares = (self.faults.refuse, self.faults.delay, self.faults.cut)
            refused, delayed, cut = (chance < share for chance, share in zip(chances, shares, strict=True))
            self.seen.update(["refused"] * refused + ["delayed"] * delayed)
            return self.faults.statuses[self.seen["refused"] % len(self.faults.statuses)] if refused else 0, delayed, cut

    def counts(self, depth: int = 2) -> dict[str, int]:
        """The requests by kind and folder: {"read data/train": 12}; `depth` names of the folder count."""
        with self._lock:
            keys = (f"{kind} {'/'.join(name.split('/')[:-1][:depth])}".strip() for kind, _, name in self.requests)
            return dict(sorted(collections.Counter(keys).items()))

    def control(self, path: str) -> dict[str, int]:
        """Answers /_proxy/...: changes the faults, and returns the counts."""
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(path).query))
        counts = self.counts(int(query.pop("depth", 2))) | dict(self.seen)
        if query.pop("counts", "") == "0":
            with self._lock:
                self.requests.clear()
                self.seen.clear()
        self.faults.change(query)
        return counts


class Handler(BaseHTTPRequestHandler):
    """One connection of a client; it keeps one to the emulator."""

    protocol_version = "HTTP/1.1"
    server: Proxy
    upstream: http.client.HTTPConnection | None = None

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def finish(self) -> None:
        super().finish()
        if self.upstream:
            self.upstream.close()

    def log_message(self, *values: Any) -> None:
        """Silence: the counts tell what happened."""

    def read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool = False, length: str = "") -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        if cut:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes, str]:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_HEADERS}
        headers |= {"Host": self.server.upstream, "Content-Length": str(len(body))}
        for attempt in range(2):
            self.upstream = self.upstream or http.client.HTTPConnection(self.server.upstream, timeout=300)
            try:
                self.upstream.request(self.command, self.path, body, headers)
                response = self.upstream.getresponse()
                break
            except (http.client.HTTPException, OSError):  # an idle connection that the emulator has closed
                self.upstream.close()
                self.upstream = None
                if attempt:
                    raise
        content = response.read()
        own = self.server.address
        kept = [(name, value) for name, value in response.getheaders() if name.lower() not in HOP_HEADERS]
        kept = [(name, value.replace(f"http://{self.server.upstream}", own)) for name, value in kept]
        return response.status, kept, content, response.getheader("Content-Length", "") if self.command == "HEAD" else ""

    def handle_any(self) -> None:
        body = self.read_body()
        if self.path.startswith("/_proxy/"):
            self.answer(200, [("Content-Type", "application/json")], json.dumps(self.server.control(self.path)).encode())
            return
        what = operation(self.command, self.path, body)
        status, delayed, cut = self.server.draw(f"{self.command} {urllib.parse.unquote(self.path)}", what)
        if delayed:
            time.sleep(self.server.faults.seconds)
        if status:
            reason = {"error": {"code": status, "message": f"refused by the proxy ({status})"}}
            self.answer(status, [("Content-Type", "application/json")], json.dumps(reason).encode() * (self.command != "HEAD"))
            return
        try:
            status, headers, content, length = self.forward(body)
        except (http.client.HTTPException, OSError):
            self.close_connection = True  # as if the emulator itself had gone
            return
        cut = cut and what[0] == "read" and status < 300 and len(content) > 1
        self.server.seen.update(["cut"] * cut)
        self.answer(status, headers, content, cut, length)

    def __getattr__(self, name: str) -> Any:
        """Every method, do_GET as well as do_PUT, is handled alike."""
        if name.startswith("do_"):
            return self.handle_any
        raise AttributeError(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", required=True, help="http://HOST:PORT of the emulator")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    for name in ("refuse", "statuses", "delay", "cut", "only"):
        parser.add_argument(f"--{name}")
    values = vars(parser.parse_args())
    proxy = Proxy(values.pop("upstream"), values.pop("port"), values.pop("host"), values.pop("seed"))
    proxy.faults.change({name: text for name, text in values.items() if text})
    print(proxy.address, flush=True)
    try:
        proxy.serve_forever()
    except KeyboardInterrupt:
        json.dump(proxy.control("/_proxy/counts"), sys.stdout, indent=1)


if __name__ == "__main__":
    main()
