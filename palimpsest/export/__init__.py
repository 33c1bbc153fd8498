"""`palimpsest export`: writes a stored version as a Hugging Face model folder."""
