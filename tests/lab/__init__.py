"""The kernel lab: a stock Debian kernel in QEMU whose own initiators are the hosts of our servers.

The guest reaches the machine's loopback as 10.0.2.2 (QEMU's user network); a test gives it commands over a serial
line, one at a time, and does to the servers what it likes in between.
"""
