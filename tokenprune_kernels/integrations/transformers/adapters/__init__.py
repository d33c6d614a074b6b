"""One module per kind of model, with the `FAMILIES` that it describes; ../registry.py lists them.

What several of them use is in frames.py, images.py, packing.py and towers.py: an adapter imports no other adapter.
"""
