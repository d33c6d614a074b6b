"""`python -m emulator` (in tests/): build the emulator and print where it is."""

from .build import build

print(build())
