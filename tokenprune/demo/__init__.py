"""A small vision-language model built on the spot, for the demo and the tests."""
