"""Checks of the quantizer against its equations."""
