"""What `make check-vllm` runs in its own environment; scripts/check_vllm.py starts it."""
