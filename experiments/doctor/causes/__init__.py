"""What can be wrong, and where to look: a sentence for every cause that a check can name."""
