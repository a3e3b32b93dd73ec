"""`helixnet doctor` on this very machine."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from helixnet.daemon.cli import main
from helixnet.daemon.config import Settings
from helixnet.daemon.doctor import Finding, examine
from helixnet.net import host

NOBODY = "12D3KooWJxWoPZG5vsiPBPACkzuVbjYfVFGzjmCr1C8NbogQkoyd"


@pytest.fixture(autouse=True)
def _fresh_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIXNET_HOME", str(tmp_path))
    monkeypatch.setenv("HELIXNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


@contextlib.contextmanager
def a_taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


async def found(settings: Settings) -> dict[str, Finding]:
    return {finding.check: finding async for finding in examine(settings)}


@pytest.mark.slow
async def test_a_good_machine_passes_every_check() -> None:
    findings = await found(Settings())
    assert {name for name, finding in findings.items() if finding.outcome == "fail"} == set()
    assert {"Python", "packages", "disk", "clock", "device", "listening", "libp2p daemon"} <= set(findings)


@pytest.mark.slow
async def test_a_taken_port_an_absent_device_and_a_dead_bootstrap_peer_are_named() -> None:
    with a_taken_port() as port:
        settings = Settings(
            device="cuda:7", listen=(f"/ip4/127.0.0.1/tcp/{port}",), join=(f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}",)
        )
        findings = await found(settings)
    assert f"port {port} is in use" in findings["listening"].says
    assert "CUDA device 7" in findings["device"].says
    assert "127.0.0.1 port 1: Connection refused" in findings["bootstrap"].says
    for check in ("listening", "device", "bootstrap"):
        assert findings[check].outcome == "fail"
        assert findings[check].fix


@pytest.mark.slow
async def test_whoever_listens_there_must_be_the_peer_of_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "DIAL_S", 1.0)
    with a_taken_port() as port:
        findings = await found(Settings(join=(f"/ip4/127.0.0.1/tcp/{port}/p2p/{NOBODY}",)))
    assert "but it is not …" in findings["bootstrap"].says
    assert findings["bootstrap"].outcome == "fail"


@pytest.mark.slow
def test_the_command_exits_1_and_gives_json_if_something_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--device", "cuda:7"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert {tuple(row) for row in rows} == {("check", "outcome", "says", "fix")}
    assert [row["check"] for row in rows if row["outcome"] == "fail"] == ["device"]
