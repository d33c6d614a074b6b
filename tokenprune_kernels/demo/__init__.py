"""`python -m tokenprune_kernels demo`: which patches of a photograph each method keeps, and how long it takes."""
