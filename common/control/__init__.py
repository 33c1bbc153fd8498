"""Access to the HTTP services: tokens and roles, limits of requests, and the shape of their errors."""
