"""Devices: the agent that runs on them, and how to reach them."""
