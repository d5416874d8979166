"""A process that waits for others of its launch says which way they are missing, in one line."""

import os
import signal
import socket
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from graft_inference.errors import GraftError
from graft_train.processes import naming_lost_processes

SOON = timedelta(milliseconds=200)


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for_others(port: int) -> None:
    TCPStore("127.0.0.1", port, 2, True, SOON)


def wait_for_the_main_one(port: int) -> None:
    TCPStore("127.0.0.1", port, 2, False, SOON)


def wait_for_a_word(port: int) -> None:
    TCPStore("127.0.0.1", port, 1, True, SOON).get("address")


@pytest.mark.parametrize("wait", [wait_for_others, wait_for_the_main_one, wait_for_a_word])
def test_a_process_that_never_comes_is_told(port, wait):
    """As PyTorch's rendezvous has it: where it does not connect, and where it ends before it says its address."""
    told = pytest.raises(GraftError, match=r"another process of this launch has ended or never came.*run the same")
    with told as error, naming_lost_processes():
        wait(port)
    assert "\n" not in str(error.value)


def test_a_main_process_that_ends_during_the_rendezvous_is_told(port):
    ready, begun = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            store = TCPStore("127.0.0.1", port, 1, True)  # it lives while this name does
            os.write(begun, b".")
            signal.pause()
        finally:
            os._exit(1)  # whatever happens, this copy runs no further test
    os.close(begun)
    try:
        assert os.read(ready, 1) == b"."  # nothing: it has ended
        store = TCPStore("127.0.0.1", port, 1, False, timedelta(seconds=60))
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with pytest.raises(GraftError, match="has ended or never came"), naming_lost_processes():
        store.get("address")


def test_a_port_that_is_taken_is_no_lost_process(port):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(RuntimeError, match="in use") as told, naming_lost_processes():
            TCPStore("127.0.0.1", port, 2, True, SOON)
    assert not isinstance(told.value, GraftError)
