"""Files of many forms: the same rows from each, by what is in them, and one line for each fault."""

import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from hmpo.errors import MissingDependencyError, TaskError
from hmpo.tasks import files
from hmpo.tasks.files import read_file

ROWS = [{"prompt": f"{n} + 1, =", "answer": str(n + 1), "note": "a\nb \u00e9"} for n in range(5)]


def jsonl() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def csv(separator: str = ",") -> bytes:
    lines = [separator.join(ROWS[0])]
    lines += [separator.join(f'"{value}"' for value in row.values()) for row in ROWS]
    return ("\n".join(lines) + "\n").encode()


def parquet() -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), buffer)
    return buffer.getvalue()


def arrow(opened) -> bytes:
    buffer, table = io.BytesIO(), pa.Table.from_pylist(ROWS)
    with opened(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


WINDOWS = csv().replace(b'"\n', b'"\r\n').replace(b"note\n", b"note\r\n")
FORMS = {
    "jsonl": jsonl(),
    "jsonl, CRLF": jsonl().replace(b"\n", b"\r\n"),
    "jsonl, mark and empty lines": b"\xef\xbb\xbf\n\n" + jsonl() + b"\n",
    "json": json.dumps(ROWS).encode(),
    "json over lines, mark": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).encode(),
    "csv": csv(),
    "csv, CRLF and mark": b"\xef\xbb\xbf" + WINDOWS,
    "csv by semicolons": csv(";"),
    "csv by tabs": csv("\t"),
    "parquet": parquet(),
    "arrow file": arrow(pa.ipc.new_file),
    "arrow stream": arrow(pa.ipc.new_stream),
}  # fmt: skip


@pytest.mark.parametrize("packed", ["plain", "gzip", "gzip of two parts"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows_whatever_its_name(form, packed, tmp_path: Path) -> None:
    data, path = FORMS[form], tmp_path / "rows.txt"
    half = len(data) // 2
    path.write_bytes(
        {
            "plain": data,
            "gzip": gzip.compress(data),
            "gzip of two parts": gzip.compress(data[:half]) + gzip.compress(data[half:]),
        }[packed]
    )
    found = read_file(str(path))
    assert [row for _, row in found] == ROWS
    assert all(place.startswith(f"{path}, ") for place, _ in found)


def test_places_are_lines_where_there_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for form, first in (("jsonl, mark and empty lines", "line 3"), ("csv", "line 3"),
                        ("json", "row 1"), ("parquet", "row 1")):  # fmt: skip
        path.write_bytes(FORMS[form])
        assert read_file(str(path))[0][0] == f"{path}, {first}", form


def test_an_empty_cell_is_no_value(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("prompt,answer\na,\n,\nb,2\n")
    assert [row for _, row in read_file(str(tmp_path / "a"))] == [
        {"prompt": "a", "answer": None},
        {"prompt": "b", "answer": "2"},
    ]


FAULTS = [
    (b"", "is empty, expected JSONL, JSON, CSV, Parquet or Arrow"),
    (b" \n\xef\xbb\xbf"[:2], "is empty"),
    (b'{"a": 1}\n{"a": \n', "line 2: not JSON"),
    (b'{"a": 1}\n[1]\n', "line 2: got a list, expected an object"),
    (b'{\n "data": []\n}\n', "line 1: not JSON"),
    (b"[1, 2]", "row 1: got a int, expected an object"),
    (b'[{"a": 1}', "is not JSON"),
    (b"a,b\n1,2,3\n", "line 2: got 3 cells, expected 2, one for each of a, b"),
    (b"a,a\n1,2\n", "line 1: two columns have one name"),
    (b'a,b\n1,"2\n', "not CSV"),
    (b"PAR1 and no more", "is damaged"),
    (b"ARROW1 and no more", "is damaged"),
    (b"\xff\xff\xff\xff and no more", "is damaged"),
    (gzip.compress(jsonl(), mtime=0)[:-9], "is cut short"),
    (b"\x1f\x8b and no more", "is damaged"),
    (b"PK\x03\x04", "is a zip archive"),
    (b"\xff\xfe{\x00", "is not UTF-8 text but UTF-16"),
    (b"caf\xe9,b\n", "it is not UTF-8 text"),
]


@pytest.mark.parametrize(("data", "words"), FAULTS)
def test_a_fault_is_one_line_with_the_file(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(data)
    with pytest.raises(TaskError) as caught:
        read_file(str(path))
    text = str(caught.value)
    assert words in text and str(path) in text and "\n" not in text


def test_a_missing_file_says_how_a_data_set_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TaskError, match=r"No such file.*task\.options\.dataset = 'openai/gsm8k'"):
        read_file("openai/gsm8k")
    with pytest.raises(TaskError, match="Is a directory"):
        read_file(str(tmp_path))


def test_what_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files, "LARGEST", 1000)
    (tmp_path / "a").write_bytes(gzip.compress(b" " * 2000))
    with pytest.raises(TaskError, match="unpacks to more than 1000 bytes"):
        read_file(str(tmp_path / "a"))


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a").write_bytes(FORMS["parquet"])
    with pytest.raises(MissingDependencyError, match=r"needs pyarrow: pip install 'hmpo\[data\]'"):
        read_file(str(tmp_path / "a"))
