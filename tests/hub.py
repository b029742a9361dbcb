"""A small local stub of the Hugging Face Hub: the HTTP calls by which a dataset's files are listed and read.

with Hub(folder) as hub:        # the files of datasets/ORG/NAME lie in folder/ORG/NAME
    subprocess.run(..., env=os.environ | {"HF_ENDPOINT": hub.address})
    print(hub.requests)
"""

import http.server
import json
import pathlib
import re
import threading
import urllib.parse
from typing import Any

COMMIT = "c" * 40


class Hub(http.server.ThreadingHTTPServer):
    """The stub; `requests` are the lines "GET /path" that came in."""

    daemon_threads = True

    def __init__(self, folder: pathlib.Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.requests = folder, list[str]()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def entry(self, path: pathlib.Path, root: pathlib.Path) -> dict[str, Any]:
        kind = {"type": "directory", "size": 0} if path.is_dir() else {"type": "file", "size": path.stat().st_size}
        return kind | {"oid": "0" * 40, "path": str(path.relative_to(root))}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *values: Any) -> None:
        pass

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self.server.requests.append(f"GET {urllib.parse.unquote(url.path)}")
        found = re.match(r"(?:/api)?/datasets/(\w+/\w+)(?:/(tree|resolve|revision)/\w+)?/?(.*)", urllib.parse.unquote(url.path))
        root = self.server.folder / found[1] if found else self.server.folder / "none"
        path = root / found[3] if found else root
        if not found or not path.exists():
            self.reply(404, b"{}", X_Error_Code="RepoNotFound", Content_Type="application/json")
        elif found[2] == "resolve":
            self.send_range(path.read_bytes())
        else:
            paths = path.rglob("*") if "recursive=true" in url.query else path.iterdir()
            listing = [self.server.entry(path, root) for path in sorted(paths)] if found[2] == "tree" else None
            answer = json.dumps({"id": found[1], "sha": COMMIT} if listing is None else listing)
            self.reply(200, answer.encode(), Content_Type="application/json")

    def send_range(self, content: bytes) -> None:
        start, end = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-")).groups()
        part = content[int(start) : int(end) + 1 if end else None]
        place = f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}"
        self.reply(206, part, ETag='"e"', X_Repo_Commit=COMMIT, Content_Range=place)
