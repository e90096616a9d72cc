"""The benchmark of large models runs, and what it counts is what is there."""

import socket
import time

import pytest
from conftest import run


@pytest.mark.slow
def test_the_benchmark_runs_and_counts_no_byte(tmp_path):
    """Small, for what does not depend on the size: what goes over the network and into TMPDIR."""
    finished = run(
        *("benchmarks/zero_copy.py", "--sizes", 0.002, "--repeats", 1, "--folder", tmp_path),
        cwd=tmp_path,
    )
    rows = [
        line.split(" | ") for line in finished.out.splitlines() if line.startswith("| 0.002 GB")
    ]
    ways = {row[1]: row for row in rows}
    assert len(rows) == len(ways) >= 9  # and dd past the page cache, where one may
    assert ways["log_model, to a shared folder"][6] == "2.1 MB"
    assert ways["this project"][6] == "0 B"
    assert ways["load_model, through the server"][4:6] == ["2.1 MB", "2.1 MB"]
    assert ways["this project, by path"][4:6] == ["0 B", "0 B"]
    assert list(tmp_path.iterdir()) == []


def test_connection_that_closes_meanwhile_does_not_count():
    """Those of several processes do, when the first of them leaves."""
    from benchmarks import zero_copy

    with socket.create_server(("127.0.0.1", 0)) as server:
        old, new = (socket.create_connection(server.getsockname()) for _ in range(2))
        for connection in (old, new):
            connection.sendall(b"x" * 1000)
        time.sleep(0.2)  # until they are acknowledged
        with zero_copy.measured() as measured:
            old.close()
            new.sendall(b"x" * 500)
            time.sleep(0.2)
        new.close()
    assert measured.network == 500
