"""Recipes a user starts from, with the data they need offline."""
