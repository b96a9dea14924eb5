"""Evaluation: answers and their grades, metrics with intervals, translation scores."""
