"""Customer-service worlds: a policy, a database, tools and a scripted user. docs/worlds.md describes them."""
