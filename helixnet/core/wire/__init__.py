"""What travels: messages, frames, activations."""
