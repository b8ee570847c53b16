"""A model end to end on this CPU: 2:4 beside dense in our engine and beside llama.cpp."""
