"""`python -m tokenprune_kernels bench --quick`: what the kernels are worth on this machine, in under a minute."""
