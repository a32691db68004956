"""Offline lmms-eval tasks."""
