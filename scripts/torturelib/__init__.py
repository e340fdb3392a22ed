"""Torture: real groups under kill -9, SIGSTOP, cut links, power loss and takeovers; what is left is checked."""
