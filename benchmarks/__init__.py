"""Measurements: load, peers, runtime and training. Writes JSON and plots; nothing imports it."""
