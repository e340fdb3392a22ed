"""Programs for people who work on blockrepl: not installed with it."""
