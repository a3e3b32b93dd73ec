"""HelixNet: a peer-to-peer network that serves large language models on the computers people own."""

__version__ = "0.1.0"
