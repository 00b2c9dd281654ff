"""A run's records: which rows a resumed run keeps."""

from dsv3_jax.runs.directory import RunDirectory
from dsv3_jax.runs.metrics import MetricsWriter, read_rows


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
