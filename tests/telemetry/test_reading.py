"""What is read from others stays within bounds, and what is shown steers no terminal."""

import contextlib
import gzip
import json

import pytest

from hmpo.errors import TelemetryError
from hmpo.telemetry import reading
from hmpo.telemetry.csvlog import read_csv, table_csv, to_csv
from hmpo.telemetry.foreign import read_log
from hmpo.telemetry.ingest import read_run
from hmpo.telemetry.visible import visible, writable


def test_a_packed_file_that_unpacks_to_much_is_refused_before_it_is_in_memory(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(reading, "MOST_UNPACKED", 200_000)
    for name, line in (("log.jsonl.gz", b"{}\n"), ("log.csv.gz", b"step,loss\n")):
        packed = tmp_path / name
        packed.write_bytes(gzip.compress(line * 1_000_000))
        with pytest.raises(TelemetryError, match=r"of memory unpacked .at line \d{3}.*gunzip it"):
            read_log(packed, adapter="trl")


def test_lists_of_nothing_count_for_the_memory_that_they_take(tmp_path):
    packed = tmp_path / "log.jsonl.gz"
    line = b'{"a":[' + b"[]," * (4 * 2**20) + b"[]]}\n"
    packed.write_bytes(gzip.compress(line * 3))
    numbers = []
    with pytest.raises(TelemetryError, match="of memory unpacked"):
        for number, _ in reading.lines(packed):
            numbers.append(number)
    assert numbers == [1]


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_without_an_end_is_refused(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(reading, "MOST_LINE", 1000)
    path = tmp_path / ("log.jsonl.gz" if packed else "log.jsonl")
    content = b'{"a": "' + b"x" * 5000 + b'"}'
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(TelemetryError, match=r"line 1: longer than .* expected one record a line"):
        read_run(path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("9" * 400, "an integer of 400 digits, a float holds 308"),
        ("-" + "9" * 5000, "an integer of 5000 digits"),
        ("[" * 100 + "]" * 100, "nested deeper than 64 levels"),
        ("[" * 100_000 + "]" * 100_000, "nested deeper than 64 levels"),
        ("NaN", "NaN is not JSON"),
    ],
)
def test_json_that_python_cannot_hold_is_one_line(text, told):
    for form in (f'{{"a": {text}}}', f'{{"a": {text}}}'.encode()):
        with pytest.raises(ValueError, match=told):
            reading.loads(form)


def test_ordinary_json_and_long_texts_of_digits_are_read_as_they_are():
    value = {"a": "9" * 5000, "b": [1, 2.5, None, True], "c": {"d": [[]] * 100}, "e": 10**307}
    assert reading.loads(json.dumps(value)) == value
    assert reading.loads(json.dumps(value).encode("utf-16")) == value
    assert reading.loads(b'"\\ud800"') == "\ud800"


@pytest.mark.parametrize(
    "content", ['{"log_history": 5}', '{"log_history": {"a": 1}}', "[1]", "5", '{"epoch": 1}']
)
def test_a_state_of_a_trainer_without_a_list_of_records_is_one_line(tmp_path, content):
    path = tmp_path / "trainer_state.json"
    path.write_text(content)
    with pytest.raises(TelemetryError, match=r"log_history is (no list|missing); expected"):
        read_log(path)


def test_a_text_that_a_spreadsheet_would_run_is_defused_and_read_back(tmp_path):
    texts = ["=1+1", "+1", "-cmd|x", "@sum(a)", "\tx", "'=1", "a,b", 'say "x"', "a\nb", "''", "'"]
    for text in texts:
        record = {"type": "event", "run_id": text, "step": 1, "name": text}
        path = tmp_path / "log.csv"
        path.write_bytes(to_csv([record]).encode())
        assert [row for _, row in read_csv(path)] == [record]
        cell = table_csv(["a"], [[text]]).split("\n", 1)[1]
        assert cell.lstrip('"')[:1] not in ("=", "+", "-", "@", "\t")
    assert table_csv(["=a", "b"], [[-1.5, "\ud800"]]) == "'=a,b\n-1.5,\\ud800\n"


@pytest.mark.parametrize(
    "cell", ["9" * 400, "-" + "9" * 5000, '"' + "x" * 200_000 + '"'], ids=["400", "5000", "field"]
)
def test_cells_that_cannot_be_read_are_one_line(tmp_path, cell):
    path = tmp_path / "log.csv"
    path.write_text(f"step,loss,note\n1,{cell},x\n")
    told = []
    with contextlib.suppress(TelemetryError):
        told += [row for _, row in read_csv(path)]
        assert len(told) == 1 and isinstance(told[0], TelemetryError)
        assert "digits, a float holds 308" in str(told[0])


def test_what_a_terminal_would_obey_is_shown_as_a_code():
    assert visible("a\x1b[31mb\u202ec\ud800d\te\n") == "a<U+001B>[31mb<U+202E>c<U+D800>d\te\n"
    assert writable("caf\xe9 \x07", "ascii") == "caf\\xe9 <U+0007>"
    assert writable("caf\xe9", "utf-8") == "caf\xe9"
