"""Images, double-written state, the journal ring and the thread that writes and syncs."""
