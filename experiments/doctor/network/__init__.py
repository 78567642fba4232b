"""Checks of the network, its channel groups and the account of compression."""
