"""`palimpsest export`: a stored version as a Hugging Face model folder."""
