"""The Triton kernels compiled ahead of time for GPUs that are not here: `python -m testing.triton_compile`.

shapes.py says which calls are made, record.py turns their launches into the specialisations that Triton's own JIT would
compile, measure.py compiles them and reads registers, shared memory, spills, matrix instructions and how many products
an accumulator takes (accumulators.py) from the results.
"""
