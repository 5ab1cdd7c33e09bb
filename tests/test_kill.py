"""A small part of `python -m tests.kill_train`."""
import pytest
from kill_train import kill_and_compare

from test_leviathan import loopback_works


@pytest.mark.parametrize("ranks, way, times", [(1, "SIGKILL", 2), (1, "full disk", 1), (2, "one rank", 1)])
def test_stopped_runs_go_on_as_if_nothing_had_happened(tmp_path, tiny_data, ranks, way, times):
    if ranks > 1 and not loopback_works():
        pytest.skip("ranks talk over 127.0.0.1, which is not reachable here")
    kill_and_compare(tmp_path, tiny_data, 150, ranks, way, times)
