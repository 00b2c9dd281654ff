"""Figures as Prometheus reads them."""

from prometheus_client.parser import text_string_to_metric_families

from dsv3_jax.http_api.metrics import Metrics


def test_large_counters_keep_all_their_digits():
    """A rate is the difference of two of them."""
    text = Metrics().text({"output_tokens": 12_345_679.0, "busy_s": 1_000_000.25, "slots": 64})
    values = {family.name: family.samples[0].value for family in text_string_to_metric_families(text) if family.samples}
    assert values["dsv3_output_tokens"] == 12_345_679
    assert values["dsv3_busy_seconds"] == 1_000_000.25
    assert values["dsv3_slots"] == 64
