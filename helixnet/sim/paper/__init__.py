"""The paper's own serving system, simulated ("paper mode"): what arXiv 2406.01566 evaluated in its simulator.

A coordinator is in the token loop: every iteration of a request goes source -> pipeline -> sink and back to the source.
Machines batch whole prompts together with decode steps. Behaviour, and every constant, was learnt from the simulator
published as Thesys-lab/Helix-ASPLOS25 (commit 148b733); its data is read from the artifact's folder.
"""
