"""The roles, sans I/O: events in, actions out. See ARCHITECTURE.md, "Roles"."""
