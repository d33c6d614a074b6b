"""Maintenance from the root of the repository: `python -m scripts.NAME`, or the targets of the Makefile."""
