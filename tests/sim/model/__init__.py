"""An exhaustive small model: every interleaving of a tiny group, the real roles over a disk and a network of few lines.

What a machine does upon an event depends on its own state only. So each (state of a machine, event) is run once, by the
real role; the search over the whole group is then over tuples of small numbers.
"""
