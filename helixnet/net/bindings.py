"""The one door to hivemind: imported late, off the event loop, and without what its import does to a process."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import multiprocessing
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helixnet.core.errors import UsageError

INSTALL = "install it with: pip install 'helixnet-swarm[peer]'"


@dataclass(frozen=True, slots=True)
class Bindings:
    """The parts of hivemind (untyped) that this room uses."""

    messages: Any
    """`p2pd_pb2`: the control protocol of the libp2p daemon."""
    multiaddr: Any
    p2p: Any
    peer_id: Any
    dht_node: Any
    dht_storage: Any


def daemon_path() -> Path:
    """Where hivemind keeps the libp2p daemon; hivemind is not imported for this.

    Raises:
        UsageError: hivemind is not installed, or without its daemon.
    """
    spec = importlib.util.find_spec("hivemind")
    if spec is None or spec.origin is None:
        raise UsageError(f"hivemind, which brings the libp2p daemon, is not installed; {INSTALL}")
    path = Path(spec.origin).parent / "hivemind_cli" / "p2pd"
    if not path.is_file():
        raise UsageError(f"hivemind is installed without its daemon ({path} is missing); re{INSTALL}")
    return path


@functools.cache
def load_bindings() -> Bindings:
    """Import what we use of hivemind: 0.2 s, and without torch. It still reads files: call it in a thread.

    Undone afterwards: a log handler of its own, "WARN" as the name of level WARNING, and a fixed multiprocessing start
    method. What it logs reaches our handlers from WARNING on.
    """
    start_method: Any = multiprocessing.get_start_method(allow_none=True)
    if "hivemind" not in sys.modules:
        _skip_what_packages_import()
    parts = [importlib.import_module(f"hivemind.{name}") for name in _MODULES]
    messages, multiaddr, p2p, node, storage, its_logging = parts
    if start_method is None:
        multiprocessing.set_start_method(None, force=True)
    its_logging.use_hivemind_log_handler("nowhere")
    logging.addLevelName(logging.WARNING, "WARNING")
    logging.getLogger("hivemind").setLevel(logging.WARNING)
    return Bindings(messages, multiaddr.Multiaddr, p2p.P2P, p2p.PeerID, node.DHTNode, storage.DHTLocalStorage)


_MODULES = (
    "proto.p2pd_pb2",
    "utils.multiaddr",
    "p2p",
    "dht.node",
    "dht.storage",
    "utils.logging",
)
_PACKAGES = ("hivemind", "hivemind.utils", "hivemind.dht")
_NAMES_OF_UTILS = {
    "logging": ("get_logger",),
    "serializer": ("MSGPackSerializer", "SerializerBase"),
    "timed_storage": ("get_dht_time",),
}
"""What the modules we use import from `hivemind.utils` itself, by the module that defines it."""


def _skip_what_packages_import() -> None:
    """Stand in for hivemind's packages, so that importing one of their modules imports only that.

    Their own `__init__` import torch, training and mixtures of experts: 3 s in every client, bootstrap peer and peer.
    The version is pinned to one minor release, and tests of this room run with these modules.
    """
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None, "daemon_path found hivemind"
        sys.modules[name] = importlib.util.module_from_spec(spec)  # not executed
    for module, names in _NAMES_OF_UTILS.items():
        found = importlib.import_module(f"hivemind.utils.{module}")
        for name in names:
            setattr(sys.modules["hivemind.utils"], name, getattr(found, name))
