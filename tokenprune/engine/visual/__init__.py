"""The worker's part of visual pruning: which rows go on from one decoder layer to the next."""
