"""Five published token-pruning methods and three baselines as functions from tensors to a `Selection`."""

__all__: list[str] = []
