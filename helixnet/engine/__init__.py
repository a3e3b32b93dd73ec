"""Runs spans of layers. The only floor that imports torch (and only inside its modules, never here)."""
