"""Trained cells in service: packages, the registry of them, and an online API."""
