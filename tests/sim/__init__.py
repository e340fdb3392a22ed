"""A deterministic simulator of whole groups: the real roles and hosts over a simulated disk, network and clock.

One seed is one run: workload, faults, delays, and what a power cut leaves, all drawn from it.
"""
