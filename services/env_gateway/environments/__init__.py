"""What an environment is, the ones that come with Palimpsest, and how yours is found."""
