"""Training: objectives (what is minimised, one file a family) and the loop that minimises them."""


class Diverged(ArithmeticError):
    """The loss of a training is no longer a number."""
