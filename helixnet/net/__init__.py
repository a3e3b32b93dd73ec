"""Bytes between peers and records about them: libp2p streams, the DHT, and in-memory twins of both."""
