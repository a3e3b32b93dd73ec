"""The paper's evaluation as one document: cells that are simulated apart from each other, and what is made of them.

A cell (`cells.Cell`) is one simulation with all that determines it. Sections say which cells they need and what their
rows mean; `pool` runs cells on several processes and keeps their rows; `page` and `pictures` only read rows.
"""
