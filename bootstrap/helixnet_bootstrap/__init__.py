"""A bootstrap peer: the well-known address that others join a swarm by. It serves no layers."""
