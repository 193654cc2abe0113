"""Evaluation: questions, grading, scoring, Best-of-N and the comparison of PRMs."""
