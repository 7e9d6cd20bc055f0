"""The laboratory: keeping trained models, and (later) cells, store and suites."""
