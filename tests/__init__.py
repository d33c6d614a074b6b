"""Tests in folders by what they test; `make test` runs them from the root of the repository."""
