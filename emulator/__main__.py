"""`python -m emulator` (from the root): build the emulator and what its own tests need, and print where it is."""

from .build import build, build_broken, build_broken_program

build_broken()
build_broken_program()
print(build())
