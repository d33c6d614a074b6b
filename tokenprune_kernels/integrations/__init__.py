"""Pruning inside other people's models."""
