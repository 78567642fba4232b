"""What a pipeline should compute, in float64 and readable as equations; nothing of the code it judges is in here."""
