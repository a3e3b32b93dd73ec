"""The process of an engine that needs one of its own. `RemoteEngine` starts it; it ends with whoever did."""

from __future__ import annotations

import importlib.util
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

import helixnet
from helixnet.core import errors
from helixnet.core.errors import HelixError, UsageError
from helixnet.engine import calls
from helixnet.engine.base import Engine
from helixnet.engine.calls import Answer, Call, Channel
from helixnet.engine.weights.prepared import read_prepared


def main(arguments: list[str]) -> int:
    """`FD FD SETUP`: one channel for everything but loads, one for loads, and what engine to make."""
    work, loads = (Channel(socket.socket(fileno=int(number))) for number in arguments[:2])
    try:
        setup = msgspec.json.decode(arguments[2], type=calls.Setup)
        engine, name = _make(setup)
        work.send(calls.Ready(engine.paging, engine.takes, engine.weight_factor, name))
    except Exception as error:
        work.send(_failure(error))
        return 1
    loader = threading.Thread(target=_serve, args=(loads, engine), name="loader", daemon=True)
    loader.start()
    _serve(work, engine)
    return 0


def _make(setup: calls.Setup) -> tuple[Engine, str]:
    if setup.version != helixnet.__version__:
        raise UsageError(f"the peer is HelixNet {setup.version}, and {sys.executable} has {helixnet.__version__}")
    model = read_prepared(Path(setup.model))
    if setup.engine == "vllm":
        if importlib.util.find_spec("vllm") is None:
            raise UsageError(
                f"vLLM is not installed for {sys.executable}: `pip install 'helixnet-swarm[vllm]'` there, or say with "
                "--vllm-python which Python has it"
            )
        from helixnet.engine.vllm_engine import VllmEngine
        from helixnet.engine.vllm_layers import VERSION

        return VllmEngine(model, device=setup.device, memory_bytes=setup.memory_bytes), f"vLLM {VERSION}"
    from helixnet.engine.torch_engine import TorchEngine

    return TorchEngine(model, device=setup.device, memory_bytes=setup.memory_bytes), "torch"


def _serve(channel: Channel, engine: Engine) -> None:
    """Answer calls until the other side is gone."""
    while True:
        try:
            call = channel.call()
        except (EOFError, OSError):
            return
        try:
            answer = _carry_out(engine, call, channel.send)
        except Exception as error:
            answer = _failure(error)
        try:
            channel.send(answer)
        except OSError:
            return


def _carry_out(engine: Engine, call: Call, say: Callable[[Answer], None]) -> Answer:
    match call:
        case calls.Run():
            return calls.Ran(tuple(engine.run(call.batch)))
        case calls.Open():
            engine.open(call.session, call.layers, call.tokens, call.begun)
        case calls.Extend():
            engine.extend(call.session, call.tokens)
        case calls.Seal():
            engine.seal(call.session, call.blocks)
        case calls.Evict():
            engine.evict(call.blocks)
        case calls.Release():
            engine.release(call.session)
        case calls.Fill():
            engine.fill(call.session, call.tokens)
        case calls.Load():
            engine.load(call.span, lambda done, total: say(calls.Progress(done, total)))
            return calls.Held(engine.held())
        case calls.Drop():
            engine.drop(call.keep)
            return calls.Held(engine.held())
    return calls.Ok()


def _failure(error: Exception) -> calls.Failed:
    kind = type(error).__name__ if isinstance(error, HelixError) and hasattr(errors, type(error).__name__) else ""
    return calls.Failed(kind or "HelixError", str(error) if kind else f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
