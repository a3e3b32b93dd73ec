"""The life of a request as its client sees it: choose a pipeline, follow the tokens, survive the dead."""
