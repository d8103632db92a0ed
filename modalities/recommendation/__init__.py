"""Lists of items for users, from their histories, with generative recommenders."""
