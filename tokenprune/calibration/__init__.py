"""`tokenprune calibrate`: find a method's parameters for one model, without labels."""
