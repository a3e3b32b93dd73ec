"""The swarm under virtual time: the very machines of `core`, with modelled devices and links, by a seed."""
