"""Checks of one step: loss, penalty, gradients, update, coefficient."""
