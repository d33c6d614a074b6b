# For type checkers in a checkout, where the package `tokenprune_kernels.reference` is the folder python_ref.
from python_ref import *  # noqa: F403
