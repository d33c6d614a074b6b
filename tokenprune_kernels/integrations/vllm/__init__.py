"""Pruning inside the vLLM engine."""
