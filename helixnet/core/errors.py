"""The one tree of errors.

```
HelixError                     anything we raise on purpose; the message tells a person what to do next
├── UsageError                 the caller's input is wrong: flag, config key, prompt, address
│   ├── ConfigError            an unknown key or a bad value in configuration
│   └── PromptTooLong          prompt (plus room for one token) does not fit the context
├── ModelError                 a checkpoint cannot be used
│   ├── UnknownModel           no such model here, in the cache or by that name
│   ├── UnsafeCheckpoint       pickle or another format that could run code
│   ├── CorruptCheckpoint      a file is damaged or is not what its hash says
│   └── ManifestMismatch       the swarm serves other weights under this name
├── CapacityError              not enough memory
│   ├── MemoryTooSmall         a peer cannot hold even one layer
│   ├── SwarmTooSmall          the swarm cannot cover every layer
│   └── Busy                   no room for one more session right now
├── NetworkError               the other side cannot be reached, or went away
│   ├── BootstrapUnreachable   none of the addresses to join by answered
│   ├── AddressInUse           the port to listen on is taken
│   ├── PeerGone               a peer died, left or stalled
│   └── DeadlineExceeded       no answer in time
├── EngineGone                 the process that computes ended, or hangs
└── RemoteProtocolError        bytes from a stranger that break the protocol; costs them the connection
```
"""

from __future__ import annotations


class HelixError(Exception):
    """Base of all errors raised on purpose.

    `definite` says whether what was asked certainly did not happen (True) or may have (False).
    `exit_code` is what the command line exits with.
    """

    definite: bool = True
    exit_code: int = 1


class UsageError(HelixError):
    """The caller's input is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """An unknown key or a bad value in configuration."""


class PromptTooLong(UsageError):
    """The prompt does not fit the model's context."""


class ModelError(HelixError):
    """A checkpoint cannot be used."""

    exit_code = 3


class UnknownModel(ModelError):
    """No model is known by that name, path or id."""


class UnsafeCheckpoint(ModelError):
    """The checkpoint is in a format that can run code when loaded (pickle)."""


class CorruptCheckpoint(ModelError):
    """A file is damaged, cut short, or not what its hash says."""


class ManifestMismatch(ModelError):
    """The swarm serves other weights than this peer would."""


class CapacityError(HelixError):
    """Not enough memory for what was asked."""

    exit_code = 4


class MemoryTooSmall(CapacityError):
    """The memory budget cannot hold even one layer."""


class SwarmTooSmall(CapacityError):
    """The peers together cannot hold every layer."""


class Busy(CapacityError):
    """No room for one more session at this moment; trying again later may work."""


class NetworkError(HelixError):
    """The other side cannot be reached, or went away."""

    definite = False
    exit_code = 5


class BootstrapUnreachable(NetworkError):
    """None of the addresses to join by answered."""

    definite = True


class AddressInUse(NetworkError):
    """The address to listen on is taken."""

    definite = True


class PeerGone(NetworkError):
    """A peer died, left or stalled."""


class DeadlineExceeded(NetworkError):
    """No answer came in time."""


class EngineGone(HelixError):
    """The process that computes ended, or does not answer: this peer cannot go on."""

    definite = False
    exit_code = 7


class RemoteProtocolError(HelixError):
    """Bytes from outside that break the protocol; the connection they came on is closed."""

    exit_code = 6
