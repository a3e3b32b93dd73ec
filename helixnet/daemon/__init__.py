"""The command line and the peer process: where machines, network and engine meet."""
