"""Scores: tasks, what runs the models, metrics, results and reports; and traces of routing."""
