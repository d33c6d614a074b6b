"""A visual question task made from real images that ship in Python wheels, and the small model that answers it.

`scene` composes images of 336 x 336 pixels (24 x 24 visual tokens) from handwritten digits, coins, faces, textures
and photographs; `questions` asks about them in short English with exact answers; `model` is a LLaVA of about two
million parameters; `train` makes its weights, `evaluate` measures its accuracy per question family.
"""
