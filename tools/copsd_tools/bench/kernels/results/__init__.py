"""Measurements in files, and tables and plots of them."""
