"""Checks of a whole training and of what it reported: records, checkpoints, continuity, verdict."""
