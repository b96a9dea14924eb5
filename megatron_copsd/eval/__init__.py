"""Measuring: answer grading, accuracy metrics, translation scores."""
