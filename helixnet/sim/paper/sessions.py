"""Requests on their way, and the hops that they take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helixnet.planner.flow import Edge

if TYPE_CHECKING:
    from helixnet.sim.paper.machines import Machine
    from helixnet.sim.paper.network import Link


class Hop:
    """A link with what runs at its end: one for each edge, the same for all sessions."""

    __slots__ = ("edge", "flow", "layers", "link", "load", "machine", "segment", "sessions")

    def __init__(self, edge: Edge, link: Link, machine: Machine | None, flow: float, entry: tuple[int, int]) -> None:
        self.edge, self.link, self.machine, self.flow = edge, link, machine, flow
        """`machine` is None at the coordinator's sink. `flow`: tokens/s planned along the edge."""
        self.segment, self.layers = entry
        """Where a session enters the machine's span, and how many layers it runs there."""
        self.load = 0.0
        """Seconds of planned flow sent this way so far; IWRR's."""
        self.sessions = 0
        """Routed this way so far."""


class Session:
    """One request of a user. Only one iteration of it is under way at a time."""

    __slots__ = (
        "arrived_s",
        "cached",
        "in_decode",
        "input",
        "number",
        "output",
        "path",
        "prompted_s",
        "sent_s",
        "stage",
        "started_s",
    )

    def __init__(self, number: int, arrived_s: float, input_tokens: int, output_tokens: int) -> None:
        self.number, self.arrived_s = number, arrived_s
        self.input, self.output = input_tokens, output_tokens
        """Decode steps follow the prompt's iteration; each makes one of the output tokens."""
        self.path: list[Hop] = []
        """So far, where hops are chosen one by one."""
        self.stage = 0
        """Index in the path of the hop under way."""
        self.in_decode = False
        self.cached = 0
        """Tokens whose KV all machines of the path hold."""
        self.started_s = arrived_s
        """When this iteration began at the coordinator."""
        self.sent_s = arrived_s
        """When the transmission under way began."""
        self.prompted_s = 0.0

    @property
    def tokens(self) -> int:
        """In the KV cache when it ends."""
        return self.input + self.output
