"""How `helixnet up` divides memory, and what it leaves for clients to find."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helixnet.core.errors import HelixError, UsageError
from helixnet.core.model import Manifest
from helixnet.daemon.local_swarm import announced, only_one
from helixnet.daemon.up_plan import PEERS_MAX, budgets, budgets_from, threads_each
from helixnet.daemon.up_processes import environment, last_line
from helixnet_client.local import find_local_swarm


def model(layers: int, layer_bytes: int, end_bytes: int) -> Manifest:
    return Manifest(
        name="m",
        architecture="LlamaForCausalLM",
        layers=layers,
        hidden_size=576,
        vocab_size=49_152,
        context_tokens=8_192,
        kv_heads=3,
        head_dim=64,
        dtype="float32",
        layer_bytes=layer_bytes,
        embedding_bytes=end_bytes,
        head_bytes=end_bytes,
        source_format="gguf",
        config_sha256="a",
        tokenizer_sha256="b",
        weights_sha256="c",
    )


SMOLLM2 = model(30, 14_160_384, 113_246_208)
LARGE = model(80, 1_700_000_000, 500_000_000)


@pytest.mark.parametrize("manifest", [SMOLLM2, LARGE], ids=["smollm2", "large"])
@pytest.mark.parametrize("peers", range(2, PEERS_MAX + 1))
def test_no_peer_can_hold_the_whole_model_but_together_they_can(manifest: Manifest, peers: int) -> None:
    sizes = budgets(manifest, peers)
    assert len(sizes) == peers
    assert max(sizes) < manifest.span_bytes(0, manifest.layers)
    # What is left for layers if the first and the last peer hold the two ends.
    room = sum(sizes) - manifest.embedding_bytes - manifest.head_bytes
    assert room >= manifest.layers * manifest.layer_bytes


def test_three_peers_get_uneven_budgets() -> None:
    first, second, third = budgets(SMOLLM2, 3)
    assert first > 1.1 * second > 1.1 * 1.1 * third


def test_a_single_peer_gets_room_for_all_of_it_and_its_kv() -> None:
    (size,) = budgets(SMOLLM2, 1)
    assert size > SMOLLM2.span_bytes(0, 30)


def test_budgets_can_be_given() -> None:
    assert budgets_from("400MB, 350MB", None) == [400_000_000, 350_000_000]


@pytest.mark.parametrize("text", ["400", "", "1GB,,1GB", ",".join(["1GB"] * (PEERS_MAX + 1))])
def test_bad_budgets_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        budgets_from(text, None)


def test_each_peer_gets_at_least_one_thread() -> None:
    assert [threads_each(cores, [1, 2, 3]) for cores in (1, 2, 3, 8)] == [1, 1, 1, 2]


def test_children_do_not_see_the_persons_settings() -> None:
    own = {
        "PATH": "/bin",
        "HELIXNET_MEMORY": "1GB",
        "HELIXNET_JOIN": "x",
        "HELIXNET_CACHE": "/c",
        "HELIXNET_HOME": "/h",
    }
    assert environment(own) == {
        "PATH": "/bin",
        "HELIXNET_CACHE": "/c",
        "HELIXNET_HOME": "/h",
        "PYTHONUNBUFFERED": "1",
    }


def test_the_last_line_of_a_log_is_found(tmp_path: Path) -> None:
    log = tmp_path / "peer.log"
    assert last_line(log) == ""
    log.write_text("x" * 10_000 + "\nit broke\n\n")
    assert last_line(log) == "it broke"


def test_clients_find_the_swarm_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIXNET_HOME", str(tmp_path))
    with announced(["/ip4/127.0.0.1/tcp/1"], "mine", "smollm2"):
        found = find_local_swarm()
        assert found is not None
        assert (found.join, found.network, found.model) == (("/ip4/127.0.0.1/tcp/1",), "mine", "smollm2")
        assert set(json.loads((tmp_path / "swarm.json").read_text())) == {"join", "network", "pid", "model"}
    assert find_local_swarm() is None
    assert list(tmp_path.iterdir()) == []


def test_a_second_swarm_on_one_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIXNET_HOME", str(tmp_path))
    with only_one() as folder:
        assert folder == tmp_path / "up"
        with pytest.raises(HelixError, match="runs on this machine already"), only_one():
            pass
    with only_one():
        pass
