"""Rollouts from SGLang servers, which are spoken to over HTTP only."""
