"""Training: the algorithm, the run around it, and what a run leaves behind."""
