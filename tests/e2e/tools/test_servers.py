"""Servers that do not start."""

import pytest
from engines import DEMO_MODEL

from clasp_vllm.tools.servers import ServerError, serve


def test_a_server_that_cannot_start_says_why(tmp_path):
    with (
        pytest.raises(ServerError, match=r"(?s)ended with status .*no-such-option"),
        serve(DEMO_MODEL, "--no-such-option", log=tmp_path / "log"),
    ):
        pass
