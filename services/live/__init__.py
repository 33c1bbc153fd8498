"""A run while it goes on: what its services say, made into a picture of the whole, on the terminal."""
