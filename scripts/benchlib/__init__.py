"""`scripts/bench`: blockrepl and its peers, measured on the same work in one run. See docs/bench.md."""
