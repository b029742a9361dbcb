"""Files are replaced at once, and what is wrong in one is named by file and line."""

import gzip
import json
import os
import pathlib
import shutil
from collections.abc import Iterator

import pytest
from etils import epath

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.files import bounded


def test_a_file_is_replaced_at_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = epath.Path(tmp_path / "results.json")
    files.write_text(path, "old")
    files.write_text(path, "new")
    assert path.read_text() == "new" and [file.name for file in tmp_path.iterdir()] == ["results.json"]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(path, "half")
    assert path.read_text() == "new"


def test_json_is_read_and_a_missing_file_is_empty(tmp_path: pathlib.Path) -> None:
    assert files.read_json(tmp_path / "absent.json") == {}
    path = tmp_path / "results.json"
    path.write_text('{"score": 0.5}')
    assert files.read_json(str(path)) == {"score": 0.5}
    for content, problem in (
        ('{"score": ', "not JSON"),
        ("[1]", "expected a JSON object .* found a list"),
        ("\udcff", "not JSON"),
    ):
        path.write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match=rf"results\.json: {problem}"):
            files.read_json(path)


LINES = ['{"text": "Zwölf\u2028Boxkämpfer"}', "", '{"text": "next"}']


@pytest.mark.parametrize(("name", "end"), [("texts.jsonl", "\n"), ("texts.jsonl", "\r\n"), ("texts.jsonl.gz", "\n")])
def test_lines_come_with_their_numbers_and_blank_ones_are_skipped(name: str, end: str, tmp_path: pathlib.Path) -> None:
    path, content = tmp_path / name, end.join(LINES).encode()  # U+2028 ends a line in Python's splitlines, not in a file
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert list(files.read_lines(path)) == list(enumerate(LINES, 1))
    objects = list(files.read_json_lines(path))
    assert objects == [(f"{path}:1", json.loads(LINES[0])), (f"{path}:3", {"text": "next"})]
    assert files.text_of(*objects[1], "text") == "next"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', ":2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n["x"]\n', ":3: not a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', ": cannot be read"),
        ("a.jsonl.gz", b'{"text": "x"}\n', ":1: cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n', mtime=0)[:-9], ": cannot be read"),
    ],
)
def test_a_bad_line_is_named(name: str, content: bytes, message: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path}.*{message.removeprefix(':')}"):
        list(files.read_json_lines(path))


def test_a_missing_file_and_a_folder_are_named(tmp_path: pathlib.Path) -> None:
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(UserError, match=f"{path}: no such file"):
            list(files.read_lines(path))


def test_a_missing_text_is_named() -> None:
    for value in ({}, {"text": None}, {"text": 3}):
        with pytest.raises(UserError, match=r"^a.jsonl:7: no text under 'text'$"):
            files.text_of("a.jsonl:7", value, "text")


COPIES = [number * 16 for number in "0a1"]  # names of copies


@pytest.fixture
def cache(tmp_path: pathlib.Path) -> pathlib.Path:
    """A cache of three copies of 10 bytes, used one after the other, beside older files of the user."""
    for time, name in enumerate(("photos", "0123456789abcdef0", "DEADBEEFDEADBEEF", *COPIES[:2], f"{COPIES[2]}.partial")):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "file").write_bytes(b"0123456789")
        os.utime(tmp_path / name, (time, time))
    (tmp_path / ("2" * 16)).write_text("a file")
    return tmp_path


def test_room_is_made_from_copies_alone(cache: pathlib.Path) -> None:
    others = {path.name for path in cache.iterdir() if path.name.split(".")[0] not in COPIES}
    folder = cache / ("f" * 16)
    for needed, kept in ((10, COPIES), (11, COPIES[1:]), (30, COPIES[2:]), (100, [])):
        assert bounded.make_room(folder, 40, needed) == 40 - 10 * len(kept)
        left = {path.name for path in cache.iterdir() if not path.name.endswith(".used")}
        assert left == others | {name if name != COPIES[2] else f"{name}.partial" for name in kept}


def test_room_is_made_while_others_delete_files(cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = os.walk

    def walk_and_delete(path: pathlib.Path) -> Iterator[tuple]:
        for parent, folders, names in walk(path):
            if path.name == COPIES[0]:
                shutil.rmtree(path)
            yield parent, folders, names

    monkeypatch.setattr(os, "walk", walk_and_delete)
    assert bounded.make_room(cache / ("f" * 16), 30, 20) == 20
    assert not (cache / COPIES[0]).exists() and not (cache / COPIES[1]).exists()
