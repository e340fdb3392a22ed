"""The demo: a group, real file systems, a site disaster, a takeover, and an honest look at what is left."""
