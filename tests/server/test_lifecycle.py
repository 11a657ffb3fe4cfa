import socket

from steer_server.lifecycle import tell_systemd


def test_systemd_is_told_at_the_socket_that_it_names(monkeypatch, tmp_path):
    for name, address in ((str(tmp_path / "notify"),) * 2, ("@steer-test", "\0steer-test")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.bind(address)
            systemd.settimeout(5)
            monkeypatch.setenv("NOTIFY_SOCKET", name)
            tell_systemd("READY=1", "STATUS=serving")
            assert systemd.recv(100) == b"READY=1\nSTATUS=serving"


def test_nobody_is_told_where_there_is_no_systemd(monkeypatch, tmp_path):
    for name in ("", str(tmp_path / "none"), "vsock:2:1"):
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        tell_systemd("READY=1")
