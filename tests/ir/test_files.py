import os
import signal
import socket

import pytest

from bitlower.ir.files import is_file, open_regular, read_bytes, read_text, reason


def test_a_named_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a named pipe, not a file"):
        open_regular(tmp_path / "pipe")


def test_a_file_that_becomes_a_named_pipe_after_a_first_look_is_refused_at_once(tmp_path, monkeypatch):
    def waits(*_):
        raise AssertionError("it waits for the pipe's other end")

    (tmp_path / "file").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    looked = os.stat(tmp_path / "file")
    before = signal.signal(signal.SIGALRM, waits)
    signal.alarm(5)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", lambda path: looked)
            with pytest.raises(OSError, match="it is a named pipe, not a file"):
                open_regular(tmp_path / "pipe")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_folders_sockets_and_devices_are_refused(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path, kind in [(tmp_path, "a folder"), (tmp_path / "socket", "a socket"), ("/dev/zero", "a device")]:
            with pytest.raises(OSError, match=f"it is {kind}, not a file") as refusal:
                read_bytes(path)
            assert reason(refusal.value) == f"it is {kind}, not a file"


def test_names_that_no_file_can_have_are_errors_with_a_reason(tmp_path):
    with pytest.raises(OSError, match="File name too long") as refusal:
        read_bytes(tmp_path / ("a" * 5000))
    assert reason(refusal.value) == "File name too long"
    with pytest.raises(ValueError, match="null"):
        read_bytes(f"{tmp_path}/a\0b")
    assert not is_file(tmp_path / ("a" * 5000))
    assert not is_file(tmp_path / "a\0b")


def test_no_more_is_read_than_the_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10)
    assert read_bytes(path, 10) == b"x" * 10
    with pytest.raises(ValueError, match="it has more than 9 bytes"):
        read_bytes(path, 9)


def test_text_is_utf8_and_its_byte_order_mark_is_dropped(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\xef\xbb\xbfa\xc3\xa4")
    assert read_text(path) == "aä"
    path.write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="byte 2 is not UTF-8"):
        read_text(path)
