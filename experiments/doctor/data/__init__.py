"""Checks of images, labels, augmentation and loader."""
