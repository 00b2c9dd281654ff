"""A run's records: which rows a resumed run keeps."""

import errno
import threading

from dsv3_jax.runs.directory import RunDirectory
from dsv3_jax.runs.metrics import MetricsWriter, last_row, read_rows


def test_a_resumed_run_drops_what_lies_beyond_its_checkpoint(tmp_path):
    run = RunDirectory(tmp_path)
    first = MetricsWriter(run, 0)
    assert first.dropped is None
    for step in (1, 2, 3, 4):
        first.write({"step": step, "step_time_s": 0.5 * step, "time": 100.0 + step})
    first.close()
    again = MetricsWriter(run, 2)
    assert again.dropped == {"steps": 2, "seconds": 3.5, "last": 104.0}
    again.write({"step": 3, "step_time_s": 9.0, "time": 200.0})
    again.close()
    assert [(row["step"], row["step_time_s"]) for row in read_rows(run.metrics_file)] == [(1, 0.5), (2, 1.0), (3, 9.0)]


def test_a_run_that_begins_again_keeps_the_rows_before(tmp_path):
    """Its checkpoint may have been lost, and the rows be all that is left. Each time under a name of its own."""
    run = RunDirectory(tmp_path)
    for attempt in (1, 2, 3):
        writer = MetricsWriter(run, 0)
        assert (writer.aside and writer.aside.name) == (f"metrics.jsonl.before-{attempt - 1}" if attempt > 1 else None)
        assert writer.dropped == ({"steps": 1, "seconds": 0.5, "last": 99.0 + attempt} if attempt > 1 else None)
        writer.write({"step": 1, "step_time_s": 0.5, "time": 100.0 + attempt})
        writer.write_routing(1, [])
        writer.close()
    for attempt, suffix in ((1, ".before-1"), (2, ".before-2"), (3, "")):
        assert [row["time"] for row in read_rows(tmp_path / f"metrics.jsonl{suffix}")] == [100.0 + attempt]
        assert [row["step"] for row in read_rows(tmp_path / f"routing.jsonl{suffix}")] == [1]


def test_damage_in_the_records_stops_no_start(tmp_path):
    """A byte that is no UTF-8 ended every start; a row without its time or seconds still counts as a step."""
    run = RunDirectory(tmp_path)
    lines = [b'{"step": 1, "step_time_s": 1.0, "time": 101}', b'{"step": 1, "x": "\xff"}', b"[3]", b'{"step": "2"}']
    later = [b'{"step": 3, "step_time_s": "1", "time": null}', b'{"step": 4, "step_time_s": 2, "time": 104}', b"\xff"]
    for file in (run.metrics_file, run.decisions_file, run.routing_file):
        file.write_bytes(b"\n".join([*lines, *later]))
    again = MetricsWriter(run, 2)
    assert again.dropped == {"steps": 2, "seconds": 2.0, "last": 104.0}
    again.write({"step": 3, "step_time_s": 9.0})
    again.close()
    assert [row["step"] for row in read_rows(run.metrics_file)] == [1, 3]
    assert run.decisions_file.read_bytes() == run.routing_file.read_bytes() == b"\n".join(lines) + b"\n"
    run.metrics_file.write_bytes(b'{"step": 7}\n3\nnull\n{"step": -1}\n{"step": ' + b"9" * 400 + b"}\n")
    assert last_row(run.metrics_file) == {"step": 7}


def test_tensorboard_that_cannot_be_written_holds_nothing_up(tmp_path, capsys):
    """Its thread would end with a traceback, its queue fill up, and training wait for it for ever."""
    writer = MetricsWriter(RunDirectory(tmp_path), 0)
    record_file = writer._board.file_writer.event_writer._worker._record_writer._writer  # type: ignore[union-attr]

    def fail(_) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    record_file.write_event = fail
    done = threading.Thread(
        target=lambda: [writer.write({"step": step, **{f"figure {i}": 1.0 for i in range(10)}}) for step in range(1, 6)],
        daemon=True,
    )
    done.start()
    done.join(20)
    assert not done.is_alive()
    writer.close()
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 5
    assert capsys.readouterr().err == "TensorBoard's file ends here: Disk quota exceeded\n"
