"""Ports for servers."""

import socket

from clasp_vllm.tools.servers import free_port


def test_a_port_in_use_gets_another():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port(port) != port
