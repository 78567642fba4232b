"""What every check shares: findings, the pipeline under examination, what was expected of it, the runner of checks."""
