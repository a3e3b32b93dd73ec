"""Ask a HelixNet swarm from Python.

```python
from helixnet_client import Client

with Client(join=["/ip4/127.0.0.1/tcp/31337/p2p/12D3Koo..."]) as client:
    print(client.chat([{"role": "user", "content": "What is the capital of France?"}]).text)
    for piece in client.stream("Once upon a time", max_tokens=40):
        print(piece.text, end="", flush=True)
```
Without `join` the client asks the swarm that `helixnet up` runs on this machine. A client is never a
member of the swarm: it serves nothing, needs no model files, and loads no torch of its own.
"""

from __future__ import annotations

from helixnet_client.client import AsyncClient, AsyncStream
from helixnet_client.sync import Client, Stream
from helixnet_client.types import Completion, Message, Piece, Timings, Usage

__all__ = ["AsyncClient", "AsyncStream", "Client", "Completion", "Message", "Piece", "Stream", "Timings", "Usage"]
