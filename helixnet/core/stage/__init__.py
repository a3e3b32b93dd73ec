"""What a peer does for the requests that pass through it: reserve, batch, run, hand on, release."""
