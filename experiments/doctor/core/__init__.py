"""What every check shares: findings, the pipeline under examination, what was promised of it, the runner of checks."""
