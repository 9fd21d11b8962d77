import gzip
import json

import pytest

from hmpo.errors import TelemetryError
from hmpo.telemetry import ingest, records
from hmpo.telemetry.sinks import JsonlSink

RUN = {"type": "run", "schema": records.SCHEMA, "run_id": "r", "segment": 0, "config_hash": "c"}
RUN |= {"algo": "power_mean", "seed": 0, "code_version": "0", "group_size": 4, "world_size": 1}
RUN |= {"base": {"lr": 1e-4}}


def step(i, **more):
    return records.step_record("r", {"step": i, **more})


def save(path, items):
    lines = [item if isinstance(item, bytes) else records.encode(item).encode() for item in items]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "telemetry.jsonl"


def kinds(log):
    return [(problem.line, problem.kind) for problem in log.problems]


def test_what_the_sink_wrote_is_read_back_in_full(path):
    written = [RUN, records.eval_record("r", 0, {"eval/greedy": 0.1}), step(1, loss=float("inf"))]
    written += [records.event_record("r", 1, "rollback", {"to": 0}), step(2)]
    written += [records.end_record("r", 2, "completed")]
    with JsonlSink(path) as sink:
        for record in written:
            sink.write(record)
    log = ingest.read_run(path, strict=True)
    assert log.run == RUN and log.end == written[-1] and log.problems == ()
    assert [*log.evals, log.steps[0], *log.events, log.steps[1]] == written[1:5]


def test_gzip_reads_the_same(path, tmp_path):
    save(path, [RUN, step(1)])
    packed = tmp_path / "telemetry.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert ingest.read_run(packed) == ingest.read_run(path)
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(TelemetryError, match="cannot be read"):
        ingest.read_run(packed)


@pytest.mark.parametrize("bad", [b"{", b"\xff\xfe", b"[]", b'{"type":"step","run_id":"r"}', b"{}"])
def test_a_malformed_line_is_named_when_strict_and_counted_when_lenient(path, bad):
    save(path, [RUN, *(step(i) for i in range(1, 120)), bad, step(120)])
    log = ingest.read_run(path)
    assert kinds(log) == [(121, "malformed")] and len(log.steps) == 120
    with pytest.raises(TelemetryError, match=r"telemetry\.jsonl, line 121: "):
        ingest.read_run(path, strict=True)


def test_more_than_one_percent_malformed_lines_are_refused(path):
    save(path, [RUN, *(step(i) for i in range(1, 98)), b"{", b"{"])
    with pytest.raises(TelemetryError, match=r"2 of 100 lines are malformed.*line 99"):
        ingest.read_run(path)


def test_a_torn_last_line_is_the_mark_of_a_crash_and_not_malformed(path):
    save(path, [RUN, step(1)])
    path.write_bytes(path.read_bytes() + b'{"type":"st')
    log = ingest.read_run(path)
    assert kinds(log) == [(3, "torn")] and len(log.steps) == 1 and log.end is None
    with pytest.raises(TelemetryError, match="line 3"):
        ingest.read_run(path, strict=True)


def test_of_duplicates_the_last_wins_and_they_are_counted(path):
    save(path, [RUN, step(1, loss=1.0), step(2, loss=2.0), step(2, loss=3.0), step(3)])
    log = ingest.read_run(path)
    assert [s["step"] for s in log.steps] == [1, 2, 3] and log.steps[1]["loss"] == 3.0
    assert log.count("duplicate") == 1 and kinds(log) == [(4, "duplicate")]


def test_steps_that_go_back_are_reported_and_put_in_order(path):
    save(path, [RUN, step(1), step(5), step(3), step(6)])
    log = ingest.read_run(path)
    assert kinds(log) == [(4, "non_monotone")]
    assert [s["step"] for s in log.steps] == [1, 3, 5, 6]


def test_two_evaluations_of_one_step_are_kept_if_their_names_differ(path):
    evals = [records.eval_record("r", 4, {"eval/name": name}) for name in ("during", "after")]
    assert ingest.read_run(save(path, [RUN, *evals])).evals == tuple(evals)


def test_unknown_keys_and_record_types_are_ignored(path):
    extra = json.dumps({**step(1), "future/x": [1]}).encode()
    log = ingest.read_run(save(path, [RUN, extra, b'{"type":"hologram","x":1}', step(2)]))
    assert len(log.steps) == 2 and log.problems == ()


@pytest.mark.parametrize("schema", ["hmpo.telemetry/2", "other/1", 1])
def test_another_major_version_is_refused_even_when_lenient(path, schema):
    save(path, [{**RUN, "schema": schema}, step(1)])
    with pytest.raises(TelemetryError, match="line 1: schema: got"):
        ingest.read_run(path)


def test_a_log_without_run_record_or_with_another_run_says_so(path):
    assert kinds(ingest.read_run(save(path, [step(1)]))) == [(1, "no_run")]
    other = {**step(2), "run_id": "q"}
    assert kinds(ingest.read_run(save(path, [RUN, step(1), other]))) == [(3, "other_run")]
    assert kinds(ingest.read_run(save(path, []))) == [(1, "no_run")]


def test_a_missing_file_is_a_telemetry_error(tmp_path):
    with pytest.raises(TelemetryError, match="cannot be read"):
        ingest.read_run(tmp_path / "none.jsonl")


def test_timing_merges_the_records_of_a_step_and_the_last_value_counts(tmp_path):
    segments = [records.segment_record("r", i, started_s=1.0 + i, pid=3) for i in (0, 1)]
    first = [records.time_record("r", i, {"tokens_per_s": 10.0 * i}) for i in (1, 2)]
    again = [records.time_record("r", 2, {"tokens_per_s": 5.0, "time/train_s": 1.0})]
    again += [records.time_record("r", 2, {"time/eval_s": 3.0})]
    path = save(tmp_path / "timing.jsonl", [segments[0], *first, segments[1], *again])
    read_segments, times = ingest.read_timing(path)
    assert read_segments == tuple(segments) and [t["step"] for t in times] == [1, 2]
    assert (times[1]["tokens_per_s"], times[1]["time/train_s"], times[1]["time/eval_s"]) == (
        5,
        1,
        3,
    )
