"""A small part of `python -m tests.kill_train`."""
import pytest

from kill_train import kill_and_compare
from test_train import needs_loopback


@pytest.mark.parametrize("ranks, way, times", [
    (1, "SIGKILL", 2), pytest.param(2, "one rank", 1, marks=needs_loopback)])
def test_stopped_runs_go_on_as_if_nothing_had_happened(tmp_path, tiny_data, ranks, way, times):
    kill_and_compare(tmp_path, tiny_data, 60, ranks, way, times)
