"""Who is in the swarm, what they can do, and who plans for them."""
