"""What a person does wrong when starting a peer: one clear sentence, an exit code of its own, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from helixnet.core.errors import ManifestMismatch
from helixnet.core.swarm.directory import front_key
from helixnet.core.swarm.records import PeerRecord, encode_record
from helixnet.core.types import PeerId
from helixnet.daemon.app import check_swarm
from helixnet.net.memory import MemoryNetwork
from tests.virtual_swarm import MANIFEST

NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWLnCof22fPtHjv3DfLUaDLcoM8nc6jKMnWa3SeC2i44Yb"


def helixnet(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end, in a home of its own."""
    return subprocess.run(
        [sys.executable, "-m", "helixnet", *arguments],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, "HELIXNET_HOME": str(folder / "home"), **environment},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--join", NOBODY), 5, "127.0.0.1/tcp/9"),
        (("--join", "not an address"), 2, "not an address"),
        (("--model", "no-such-model"), 3, "helixnet models list"),
        (("--memory", "10MB"), 4, "too small for one layer"),
        (("--memory", "lots"), 2, "such as 2GB"),
        (("--device", "tpu"), 2, "tpu"),
        (("--preset", "moon"), 2, "lan, wan, home"),
        (("--wings", "2"), 2, "--wings"),
    ],
    ids=["unreachable", "bad address", "unknown model", "memory", "bad memory", "device", "preset", "flag"],
)
def test_a_peer_that_cannot_start_says_why(tmp_path: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    ended = helixnet(tmp_path, "peer", *arguments)
    assert ended.returncode == code, ended.stderr
    assert says in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.slow
def test_a_pickle_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    ended = helixnet(tmp_path, "peer", "--model", str(folder))
    assert ended.returncode == 3 and "safetensors" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.slow
def test_an_unknown_setting_is_named_with_the_one_meant(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('memmory = "2GB"\n')
    ended = helixnet(tmp_path, "peer", "--config", str(config))
    assert ended.returncode == 2 and "memmory" in ended.stderr and "'memory'" in ended.stderr
    ended = helixnet(tmp_path, "peer", HELIXNET_MEMRY="2GB")
    assert ended.returncode == 2 and "HELIXNET_MEMRY" in ended.stderr


async def test_a_peer_with_other_weights_under_the_swarms_name_is_refused() -> None:
    directory = MemoryNetwork().directory("a")
    record = PeerRecord(peer=PeerId("a"), name="a", addresses=(), model=MANIFEST.name, manifest_hash=MANIFEST.hash)
    await directory.publish(front_key("n"), encode_record(record), 60.0)
    await check_swarm(directory, "n", MANIFEST, PeerId("b"))
    other = msgspec.structs.replace(MANIFEST, weights_sha256="another")
    with pytest.raises(ManifestMismatch, match="other weights under the name toy"):
        await check_swarm(directory, "n", other, PeerId("b"))
