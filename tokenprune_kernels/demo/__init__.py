"""`python -m tokenprune_kernels demo`: a question about an image, answered with all visual tokens and with some."""


class DemoError(ValueError):
    """What the user asked for cannot be done; the message is the one line they see."""
