from __future__ import annotations

import os

import pytest
from serving_process import Running
from soak import soak

SECONDS = float(os.environ.get("LLMSPARSE_SOAK_SECONDS", "60"))


@pytest.mark.slow
def test_clients_that_come_and_go_leave_no_trace(server: Running) -> None:
    seen = soak(server, SECONDS)
    print(seen.summary())
    assert seen.left_running == 0 and seen.reserved == 0 and seen.same
    assert seen.growth < 0.05, seen.summary()
    assert set(seen.ends) == {"200", "hung up waiting", "hung up reading"} and seen.ends["200"] > 50, seen.summary()
