"""What one command may ask for: the numbers of the block limits page, and the checks behind them."""

from __future__ import annotations

MAX_TRANSFER_BYTES = 32 << 20
OPTIMAL_TRANSFER_BYTES = 1 << 20
MAX_PREFETCH_BYTES = 4 << 20
MAX_WRITE_SAME_BYTES = 128 << 20
MAX_COMPARE_BLOCKS = 255
MAX_UNMAP_BLOCKS = 1 << 20
MAX_UNMAP_DESCRIPTORS = 256
PAGE_BYTES = 4096  # less is read, modified and written by the page cache, and not given back by a file
