"""How much of a model's accuracy each pruning method keeps at a token budget: `make retention`."""
