"""Training: objectives (what is minimised, one file a family) and the loop that minimises them."""
